"""Generation against transformers' own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation.logits_process import TopPLogitsWarper

from pipeline.generation.sample import Sampling, generate
from pipeline.model.moonlight import Moonlight
from tests.model.oracle import oracle_of, random_model, small_config

EOS, POSITIONS = 1, 128
GREEDY = Sampling()


@pytest.fixture(scope="module")
def model() -> Moonlight:
    torch.set_num_threads(1)
    return random_model(small_config(max_position_embeddings=POSITIONS)).eval().requires_grad_(False)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 96, (1 + 3 * n,), generator=generator).tolist() for n in range(count)]


def ours(model: Moonlight, given: list[list[int]], sampling: Sampling = GREEDY, **options: int) -> list[list[int]]:
    options = {"max_new_tokens": 24, "max_positions": POSITIONS} | options
    return generate(model, given, [sampling] * len(given), eos=EOS, **options)


def test_greedy_is_what_transformers_generates(model: Moonlight):
    """20 prompts of different lengths, in one batch and one by one."""
    oracle = oracle_of(model).eval()
    expected = []
    for prompt in prompts(20):
        ids = torch.tensor([[EOS, *prompt]])
        plan = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=EOS, pad_token_id=EOS)
        text = oracle.generate(ids, attention_mask=torch.ones_like(ids), generation_config=plan)[0].tolist()
        expected.append([token for token in text[ids.shape[1] :] if token != EOS])
    assert ours(model, prompts(20)) == expected
    assert [ours(model, [prompt])[0] for prompt in prompts(20)] == expected


def test_a_text_is_a_function_of_its_prompt_and_seed(model: Moonlight):
    first, second = prompts(2)
    drawn = [ours(model, [first], Sampling(1.0, seed=seed))[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    beside = generate(
        model, [second, first], [Sampling(), Sampling(1.0, seed=2)], eos=EOS, max_new_tokens=24, max_positions=POSITIONS
    )
    assert beside == [ours(model, [second])[0], drawn[2]]


def test_temperature_and_top_p_sharpen(model: Moonlight):
    for sharp in (Sampling(1e-4, seed=5), Sampling(2.0, top_p=1e-9, seed=5)):
        assert ours(model, prompts(2), sharp) == ours(model, prompts(2))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 99), top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]), temperature=st.sampled_from([0.5, 1.0, 2.0])
)
def test_draws_come_from_what_transformers_keeps(seed: int, top_p: float, temperature: float):
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(seed)) * 3
    kept = TopPLogitsWarper(top_p)(None, (logits_V.double() / temperature)[None])[0].isfinite()
    generator = torch.Generator().manual_seed(seed)
    sampling = Sampling(temperature, top_p)
    drawn = torch.bincount(torch.tensor([sampling.choose(logits_V, generator) for _ in range(300)]), minlength=12)
    assert not bool((drawn.bool() & ~kept).any())
    p_V = torch.where(kept, (logits_V.double() / temperature).softmax(-1), 0.0)
    assert (drawn / 300 - p_V / p_V.sum()).abs().max() < 0.12


@pytest.mark.parametrize("count", [0, 1, 7])
def test_exactly_as_many_tokens_as_asked(model: Moonlight, count: int):
    heard: list[tuple[int, int]] = []
    texts = generate(
        model,
        prompts(3),
        [GREEDY] * 3,
        eos=95,
        max_new_tokens=count,
        max_positions=POSITIONS,
        told=lambda row, token: heard.append((row, token)),
    )
    assert [len(text) for text in texts] == [count] * 3
    assert [[token for row, token in heard if row == each] for each in range(3)] == texts


def test_a_text_may_pass_the_last_position(model: Moonlight):
    """It goes on from the second half of what is there; the rows beside it are as if alone."""
    long = prompts(20)[19]
    texts = ours(model, [long, [5]], max_new_tokens=30, max_positions=64)
    assert [len(text) for text in texts] == [30, 30]
    assert texts[1] == ours(model, [[5]], max_new_tokens=30)[0]
    window = [EOS, *long, *texts[0]][:64]
    assert texts[0][64 - len(long) - 1 :] == _continued(model, window[-32:], 30 - (64 - len(long) - 1))


def _continued(model: Moonlight, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    return ids[-count:]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0: give a number from 0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_p": 0.0}, "top_p 0.0: give a probability over 0"),
        ({"top_p": float("nan")}, "top_p nan"),
    ],
)
def test_settings_that_mean_nothing(setting: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)


def test_a_network_without_numbers_says_so(model: Moonlight):
    broken = random_model(small_config()).eval().requires_grad_(False)
    broken.norm.weight.fill_(float("nan"))
    for sampling in (GREEDY, Sampling(1.0)):
        with pytest.raises(ValueError, match="logits are not finite"):
            ours(broken, [[5]], sampling)
