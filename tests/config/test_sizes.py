"""The numbers of workers that an elastic run may have."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.load import ConfigError, load_config
from tests.training.make import tiny

ELASTIC = "parallelism.elastic"


def sizes(mesh: dict[str, object], batch: int = 48, micro: int = 1) -> tuple[int, ...]:
    return tiny(".", parallelism=mesh, schedule=schedule(batch), training__micro_batch=micro).sizes


def schedule(batch: int) -> dict[str, object]:
    whole = tiny(".").schedule.model_dump()
    return {**whole, "global_batch": [{**whole["global_batch"][0], "sequences": batch}]}


def test_without_elastic_there_is_one() -> None:
    assert sizes({"replicate": 2, "shard": 4, "ep": 2}) == (8,)


@pytest.mark.parametrize(
    ("mesh", "batch", "micro", "expected"),
    [
        ({"shard": 4, "ep": 2, "elastic": {"min_workers": 2}}, 48, 1, (2, 4)),
        ({"replicate": 3, "shard": 2, "ep": 2, "elastic": {"min_workers": 2}}, 48, 1, (2, 4, 6)),
        ({"replicate": 3, "shard": 4, "ep": 1, "elastic": {"min_workers": 1}}, 48, 1, (1, 2, 3, 4, 8, 12)),
        ({"replicate": 3, "shard": 4, "ep": 1, "elastic": {"min_workers": 1}}, 48, 4, (1, 2, 3, 4, 12)),  # not 8 x 4
        ({"shard": 2, "elastic": {"min_workers": 2, "max_workers": 8}}, 48, 1, (2, 4, 6, 8)),
    ],
    ids=str,
)
def test_sizes(mesh: dict[str, object], batch: int, micro: int, expected: tuple[int, ...]) -> None:
    assert sizes(mesh, batch, micro) == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.sampled_from([1, 2, 4, 6]), st.sampled_from([1, 2]), st.sampled_from([1, 2, 3]))
def test_every_size_is_a_run_that_could_have_been_asked_for(replicate: int, shard: int, ep: int, micro: int) -> None:
    """As a fixed mesh it validates, with the same experts a rank, and of all workers it uses each."""
    if shard % ep:
        return
    mesh = {"replicate": replicate, "shard": shard, "ep": ep}
    batch = replicate * shard * micro * 12
    try:
        fixed = tiny(".", parallelism=mesh, schedule=schedule(batch), training__micro_batch=micro)
    except ConfigError:  # 16 wide layers cannot be cut into any number of slices
        return
    elastic = {**mesh, "elastic": {"min_workers": ep}}
    config = tiny(".", parallelism=elastic, schedule=schedule(batch), training__micro_batch=micro)
    assert fixed.sizes == (replicate * shard,)
    assert replicate * shard in config.sizes
    for size in config.sizes:
        there = config.at_size(size).parallelism
        assert (there.world_size, there.ep, there.elastic) == (size, ep, None)
        assert there.replicate == 1 or there.shard == shard
        same = {"replicate": there.replicate, "shard": there.shard, "ep": there.ep}
        assert tiny(".", parallelism=same, schedule=schedule(batch), training__micro_batch=micro).sizes == (size,)
    assert config.at_size(config.sizes[-1] + 1) is config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"min_workers": 3}, f"{ELASTIC}.min_workers 3 is no size of this run: .* sizes near it are 2, 4"),
        ({"min_workers": 2, "max_workers": 7}, f"{ELASTIC}.max_workers 7 is no size .* 4, 8"),
        (
            {"min_workers": 8, "max_workers": 8},
            f"{ELASTIC}: replicate \\* shard = 4 workers must lie between min_workers 8 and",
        ),
        ({"min_workers": 0}, f"{ELASTIC}.min_workers: "),
        ({}, f"{ELASTIC}.min_workers: required"),
        ({"min_workers": 2, "least": 1}, f"{ELASTIC}.least: unknown key"),
    ],
    ids=str,
)
def test_limits_that_cannot_be(overrides: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sizes({"shard": 4, "ep": 2, "elastic": overrides})


def test_experts_that_cannot_be_cut_are_refused_before_a_rank_starts() -> None:
    with pytest.raises(ConfigError, match=r"parallelism\.shard 12: 4 experts are fewer, and hidden_size 16"):
        sizes({"shard": 12})


def test_the_order_of_data_and_the_identity_do_not_know_of_it(tmp_path) -> None:
    from pipeline.storage import Storage
    from pipeline.training.identity import run_identity
    from tests.training.make import tiny_dataset

    fixed = tiny(str(tmp_path), parallelism={"shard": 4, "ep": 2})
    elastic = tiny(str(tmp_path), parallelism={"shard": 4, "ep": 2, "elastic": {"min_workers": 2}})
    dataset = tiny_dataset(Storage(fixed.storage))
    assert run_identity(fixed, dataset) == run_identity(elastic, dataset)


def test_moonlight_on_fewer_hosts() -> None:
    config = load_config("moonlight-16b-a3b", [f"{ELASTIC}={{min_workers: 64}}"])
    assert config.sizes[0] == 64
    assert config.sizes == (64, 128, 256)  # batches of 2,048 and 4,096 sequences
