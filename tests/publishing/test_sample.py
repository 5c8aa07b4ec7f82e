"""Generation against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.publishing.sample import generate
from tests.publishing.conftest import PublishedRun

PROMPT = [40, 50, 60]


def ours(run: PublishedRun, **options: object) -> list[int]:
    eos = run.made.dataset.tokenizer.eos_id
    return generate(run.made.model, PROMPT, eos=eos, **{"max_new_tokens": 12, "max_positions": 64} | options)


def test_greedy_is_what_transformers_generates(run: PublishedRun):
    model = AutoModelForCausalLM.from_pretrained(run.folder)
    eos = run.made.dataset.tokenizer.eos_id
    prompt = torch.tensor([[eos, *PROMPT]])
    theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    assert ours(run) == theirs[0, prompt.shape[1] :].tolist()


def test_sampling_is_a_function_of_the_seed(run: PublishedRun):
    drawn = [ours(run, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_temperature_sharpens(run: PublishedRun):
    assert ours(run, temperature=1e-4, seed=5) == ours(run)


def test_it_stops_before_the_end_of_text_and_slides_past_the_last_position():
    class Counting(torch.nn.Module):
        """Always predicts the last token plus one, and insists on its context length."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(20).roll(1, dims=1))

        def forward(self, ids_BS: torch.Tensor) -> torch.Tensor:
            assert ids_BS.shape[1] <= 4
            return self.weight[ids_BS]

    model = Counting()
    assert generate(model, [5], eos=12, max_new_tokens=50, max_positions=4) == [6, 7, 8, 9, 10, 11]
    assert generate(model, [5], eos=19, max_new_tokens=3, max_positions=4) == [6, 7, 8]


@pytest.mark.parametrize("count", [0, 1])
def test_exactly_as_many_tokens_as_asked(run: PublishedRun, count: int):
    assert len(ours(run, max_new_tokens=count)) == count
