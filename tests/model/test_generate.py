"""Greedy generation against transformers' generate."""

import pytest
import torch

from pipeline.model.generate import generate
from tests.model.oracle import oracle_of, random_model, small_config


def test_greedy_continuation_is_that_of_transformers():
    model = random_model(small_config())
    oracle = oracle_of(model)
    prompt = [3, 1, 4, 1, 5]
    theirs = oracle.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = generate(model, prompt, 12)
    assert ours == theirs[0].tolist()
    assert generate(model, prompt, 12, eos_id=ours[8]) == ours[: ours.index(ours[8], 5) + 1]
    assert model.training


def test_generation_ends_at_the_models_length_and_needs_a_prompt():
    model = random_model(small_config(max_position_embeddings=8))
    assert len(generate(model, [1, 2, 3], 50)) == 8
    with pytest.raises(ValueError, match="empty prompt"):
        generate(model, [], 5)
