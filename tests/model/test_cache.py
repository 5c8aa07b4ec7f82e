"""Passes over new tokens only, against one pass over everything and against transformers' own cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from pipeline.config.schema import ParallelismConfig, TrainingConfig
from pipeline.model import cached_attention
from pipeline.model.cache import CachedPass, LatentCache
from pipeline.model.moonlight import Moonlight
from pipeline.parallel.mesh import build_meshes
from pipeline.parallel.shard import shard_model
from tests.distributed import run_distributed
from tests.model.oracle import oracle_of, random_model, small_config

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def model() -> Moonlight:
    torch.set_num_threads(1)
    return random_model(small_config()).eval().requires_grad_(False)


def texts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 96, (length,), generator=generator).tolist() for length in lengths]


def padded(rows: list[list[int]]) -> torch.Tensor:
    """Padding that would be seen if it were looked at."""
    ids_BS = torch.randint(0, 96, (len(rows), max(map(len, rows))))
    for row, tokens in enumerate(rows):
        ids_BS[row, : len(tokens)] = torch.tensor(tokens)
    return ids_BS


def run(model: Moonlight, rows: list[list[int]], cache: LatentCache | None, continues: list[int] | None = None):
    """The pass and the logits of each row's own tokens."""
    cached = CachedPass(cache, [len(tokens) for tokens in rows], continues)
    with torch.no_grad():
        logits_BSV = model(padded(rows), cached=cached)
    return cached, [logits_BSV[row, : len(tokens)] for row, tokens in enumerate(rows)]


def whole(model: Moonlight, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0]


def test_a_cached_token_costs_latent_and_rotary_key_a_layer(model: Moonlight):
    cached, _ = run(model, texts(5, 9), None)
    cache = cached.result(room=3)
    config = model.config
    assert len(cache.layers) == config.num_hidden_layers
    assert {kv.shape for kv in cache.layers} == {(2, 9 + 3, config.kv_lora_rank + config.qk_rope_head_dim)}
    assert (cache.lengths, cache.room) == ([5, 9], 12)


def test_tokens_one_by_one_after_prompts_of_different_lengths(model: Moonlight):
    rows, starts = texts(20, 13, 27), [5, 9, 1]
    cached, logits = run(model, [tokens[:start] for tokens, start in zip(rows, starts)], None)
    expected = [whole(model, tokens) for tokens in rows]
    for found, full, start in zip(logits, expected, starts):
        torch.testing.assert_close(found, full[:start], **CLOSE)
    cache = cached.result(room=4)
    for step in range(4):
        _, logits = run(model, [[tokens[start + step]] for tokens, start in zip(rows, starts)], cache)
        for found, full, start in zip(logits, expected, starts):
            torch.testing.assert_close(found, full[start + step : start + step + 1], **CLOSE)
    assert cache.lengths == [9, 13, 5]
    with pytest.raises(AssertionError, match="14 tokens in a cache with room for 13"):
        run(model, [[1], [2], [3]], cache)


def test_padding_is_not_routed(model: Moonlight):
    counted: list[int] = []
    experts = [block.mlp.experts for block in model.layers[1:]]
    hooks = [each.register_forward_pre_hook(lambda _, inputs: counted.append(inputs[1].pairs)) for each in experts]
    cached, _ = run(model, texts(9, 2), None)
    run(model, texts(5, 1), cached.result(), [0, 1])
    for hook in hooks:
        hook.remove()
    assert counted == [11 * model.config.num_experts_per_tok] * 2 + [6 * model.config.num_experts_per_tok] * 2


def test_rows_that_end_are_left_out(model: Moonlight):
    rows = texts(8, 5, 6)
    cached, _ = run(model, [tokens[:4] for tokens in rows], None)
    cache = cached.result(room=2).select([2, 0])
    _, logits = run(model, [[rows[2][4]], [rows[0][4]]], cache)
    for found, tokens in zip(logits, (rows[2], rows[0])):
        torch.testing.assert_close(found[0], whole(model, tokens)[4], **CLOSE)


def test_transformers_with_its_own_cache_says_the_same(model: Moonlight):
    oracle = oracle_of(model).eval()
    (tokens,) = texts(12)
    cached, _ = run(model, [tokens[:7]], None)
    cache, theirs = cached.result(room=5), DynamicCache(config=oracle.config)
    with torch.no_grad():
        oracle(torch.tensor([tokens[:7]]), past_key_values=theirs, use_cache=True)
        for token in tokens[7:]:
            expected = oracle(torch.tensor([[token]]), past_key_values=theirs, use_cache=True).logits[0]
            torch.testing.assert_close(run(model, [[token]], cache)[1][0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["absorbed", "expanded", "in pieces"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    pasts=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    ends=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_many_rows_continue_few(model: Moonlight, way: str, pasts: list[int], ends: list[tuple[int, int]], seed: int):
    """Both orders of multiplication, two levels deep."""
    ends = sorted((past % len(pasts), length) for past, length in ends)
    first, second = texts(*pasts, seed=seed), texts(*(length for _, length in ends), seed=seed + 1)
    continues = [past for past, _ in ends]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached_attention, "absorbing_is_cheaper", lambda *_: way == "absorbed")
        if way == "in pieces":
            patch.setattr(cached_attention, "CPU_LOGITS", 150)
        cached, _ = run(model, first, None)
        cached, logits = run(model, second, cached.result(), continues)
        for past, tokens, found in zip(continues, second, logits):
            torch.testing.assert_close(found, whole(model, first[past] + tokens)[pasts[past] :], **CLOSE)
        kept = [0, len(second) - 1]
        (third,) = texts(3, seed=seed + 2)
        _, logits = run(model, [third, third], cached.result(kept), [0, 1])
        for row, found in zip(kept, logits):
            before = first[continues[row]] + second[row]
            torch.testing.assert_close(found, whole(model, before + third)[len(before) :], **CLOSE)


def test_rows_of_one_past_stand_together(model: Moonlight):
    cached, _ = run(model, texts(3, 4), None)
    with pytest.raises(AssertionError, match="stand together"):
        run(model, texts(2, 2, 2), cached.result(), [0, 1, 0])


def test_logits_where_they_are_asked_for(model: Moonlight):
    (tokens,) = texts(9)
    with torch.no_grad():
        found = model(torch.tensor([tokens]), at_N=torch.tensor([8, 2]))
    torch.testing.assert_close(found, whole(model, tokens)[[8, 2]], **CLOSE)


def differences_under_mixed_precision() -> tuple[list[float], set[torch.dtype]]:
    """On every rank of a model whose weights are gathered in bf16: how far cached passes are from one over everything."""
    device = torch.device("cpu")
    with torch.device("meta"):
        model = Moonlight(small_config(n_routed_experts=2, num_experts_per_tok=2))  # near ties between experts apart
    settings = TrainingConfig(compute_dtype="bf16")
    shard_model(model, build_meshes(ParallelismConfig(shard=2, ep=2), "cpu"), settings, device)
    model.to_empty(device=device)
    model.reset_parameters(0)
    model.eval().requires_grad_(False)
    rows, starts = texts(12, 9), [7, 4]
    expected = [whole(model, tokens) for tokens in rows]
    cached, _ = run(model, [tokens[:start] for tokens, start in zip(rows, starts)], None)
    cache, apart = cached.result(room=5), []
    for step in range(5):
        _, logits = run(model, [[tokens[start + step]] for tokens, start in zip(rows, starts)], cache)
        apart += [
            float((found[0] - full[start + step]).abs().max()) for found, full, start in zip(logits, expected, starts)
        ]
    cached, logits = run(
        model,
        [tokens[start:] for tokens, start in zip(rows, starts)],
        run(model, [rows[0][:7], rows[1][:4]], None)[0].result(),
        [0, 1],
    )
    apart += [float((found - full[start:]).abs().max()) for found, full, start in zip(logits, expected, starts)]
    return apart, {kv.dtype for kv in cache.layers}


def test_sharded_in_bf16_as_on_gpus():
    """What layers leave in a pass is not lost in copies that FSDP makes of arguments; the cache is as wide as activations."""
    for apart, dtypes in run_distributed(differences_under_mixed_precision, 2):
        assert len(apart) == 12
        assert max(apart) < 0.02
        assert dtypes == {torch.bfloat16}
