"""The closed-form order: once per epoch, exact mixtures, no trace of ranks or batches, shuffled well, refused when short."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.load import load_config
from pipeline.dataset.order import Order, check_demand, describe_difference, total_sequences
from tests.dataset import make


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    blocks=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    group=st.integers(1, 5),
    lanes=st.sampled_from([1, 2, 3, 4, 6, 12, 16]),
    window=st.integers(1, 4),
    block=st.integers(6, 20),
    seed=st.integers(0, 1000),
)
def test_every_row_at_most_once_per_source_epoch(blocks, group, lanes, window, block, seed) -> None:
    """Over three epochs and more; an epoch leaves out only what does not divide among the source's lanes."""
    rows = [count * group for count in blocks]
    order = Order(
        make.rows_only(rows, 16, group),
        make.layout(16, group, lanes=lanes, window=window, block=block),
        make.corpus([1.0] * len(rows)),
        16,
        seed,
    )
    n = np.arange(4 * sum(rows) + 4 * lanes * block)
    location, epoch = order.locate(n), order.epochs(n)
    for s, count in enumerate(rows):
        of_source = location.source == s
        seen = np.stack([epoch[of_source], location.row[of_source]])
        assert 0 <= seen[1].min() <= seen[1].max() < count
        assert len(np.unique(seen, axis=1).T) == of_source.sum()
        source_lanes = max((d for d in range(1, lanes + 1) if lanes % d == 0 and count // d >= group), default=1)
        assert (seen[0] == 0).sum() == count // source_lanes * source_lanes


def test_mixture_is_exact_in_every_block_of_every_stage() -> None:
    lanes, block = 8, 10
    corpus = make.corpus([1, 1, 1], [(8 * 45 * 16, [0.6, 0.3, 0.1]), (10**9, [0.2, 0.2, 0.6])])
    order = Order(make.rows_only([800, 800, 800]), make.layout(16, 4, lanes=lanes, block=block), corpus, 16, 0)
    n = np.arange(lanes * 95)
    source = order.locate(n).source.reshape(95, lanes)

    def counts(first: int, last: int) -> list[list[int]]:
        return [np.bincount(source[first:last, lane], minlength=3).tolist() for lane in range(lanes)]

    for start in range(0, 40, block):
        assert counts(start, start + block) == [[6, 3, 1]] * lanes
    assert counts(40, 45) == [[3, 2, 0]] * lanes  # the stage ends inside a block: 3, 1.5, 0.5 rounded to a sum of 5
    for start in range(45, 95, block):
        assert counts(start, start + block) == [[2, 2, 6]] * lanes


def test_debug_preset_demand_and_total() -> None:
    config = load_config("debug")
    names = [source.name for source in config.corpus.sources]
    dataset = make.rows_only([4000, 4000, 2000], 512, 16)
    dataset = dataset.model_copy(
        update={"sources": tuple(s.model_copy(update={"name": name}) for s, name in zip(dataset.sources, names))}
    )
    assert total_sequences(config.schedule, 512) == 1920
    demand = check_demand(config, dataset)
    assert [demand[name].rows for name in names] == [768, 768, 384]
    order = Order.of_run(config, dataset)
    drawn = np.bincount(order.locate(np.arange(1920)).source)
    assert drawn.tolist() == [768, 768, 384]


@settings(derandomize=True, max_examples=25, deadline=None)
@given(sequences=st.integers(1, 700), lanes=st.sampled_from([1, 4, 8]), skip=st.integers(0, 50))
def test_demand_is_what_the_order_draws(sequences: int, lanes: int, skip: int) -> None:
    ranges = [(30, 30 + skip)] if skip else []
    order = Order(
        make.rows_only([40, 200]), make.layout(16, 4, lanes=lanes), make.corpus([3, 5], max_epochs=9), 8, 5, ranges
    )
    demand = order.demand(sequences, {"s0": 9, "s1": 9})
    plain = Order(make.rows_only([40, 200]), make.layout(16, 4, lanes=lanes), make.corpus([3, 5]), 16, 5)
    drawn = plain.locate(np.arange(-(-(int(order.positions(sequences - 1)) + 1) // 2))).source
    last_epoch = {
        s: int(order.epochs(np.arange(sequences))[order.locate(np.arange(sequences)).source == s].max(initial=0))
        for s in (0, 1)
    }
    for s in (0, 1):
        need = demand.get(f"s{s}")
        assert (need.rows if need else 0) == (drawn == s).sum()
        if need and not skip:
            assert np.ceil(need.epochs) == last_epoch[s] + 1


def test_short_supply_is_refused_with_names_and_remedy() -> None:
    order = Order(make.rows_only([48, 80]), make.layout(16, 4, lanes=4), make.corpus([1, 1]), 16, 0)
    assert order.check_demand(96, {"s0": 1.0, "s1": 1.0})["s0"].epochs == 1.0
    with pytest.raises(
        ValueError,
        match=r"source 's0' would be seen up to 1\.\d+ times.*drawn from 48.*max_epochs is 1.*lower schedule.total_tokens",
    ):
        order.check_demand(112, {"s0": 1.0, "s1": 1.0})


def test_wrong_constants_are_refused_by_name() -> None:
    dataset = make.rows_only([40, 3])
    dataset = dataset.model_copy(
        update={"sources": (dataset.sources[0], dataset.sources[1].model_copy(update={"rows": 0}))}
    )
    with pytest.raises(ValueError, match=r"source 's1' has 0 packed rows.*data\.rows_per_group=4"):
        Order(dataset, make.layout(16, 4, lanes=4), make.corpus([1, 1]), 16, 0)
    good = make.rows_only([40, 40])
    with pytest.raises(ValueError, match=r"data\.rows_per_group is 8 but the dataset was packed with 4"):
        Order(good, make.layout(16, 8, lanes=4), make.corpus([1, 1]), 16, 0)
    with pytest.raises(ValueError, match=r"training\.sequence_length 5 must divide"):
        Order(good, make.layout(16, 4, lanes=4), make.corpus([1, 1]), 5, 0)
    with pytest.raises(ValueError, match=r"source 's1': a share of 0\.0099 .*data\.mixture_block to at least 101"):
        Order(good, make.layout(16, 4, lanes=4), make.corpus([1, 0.01]), 16, 0)
    with pytest.raises(ValueError, match=r"corpus\.sources are \['s0'\] but the dataset holds \['s0', 's1'\]"):
        Order(good, make.layout(16, 4, lanes=4), make.corpus([1]), 16, 0)
    with pytest.raises(ValueError, match=r"skip_sequences: \[5, 9\) is empty or overlaps"):
        Order(good, make.layout(16, 4, lanes=4), make.corpus([1, 1]), 16, 0, [(0, 7), (5, 9)])


def test_skipped_ranges_are_stepped_over() -> None:
    plain = Order(make.rows_only([400]), make.layout(16, 4, lanes=4), make.corpus([1]), 16, 0)
    skipping = Order(make.rows_only([400]), make.layout(16, 4, lanes=4), make.corpus([1]), 16, 0, [(50, 60), (10, 13)])
    kept = [g for g in range(200) if not (10 <= g < 13 or 50 <= g < 60)]
    assert skipping.positions(np.arange(len(kept))).tolist() == kept
    assert skipping.locate(np.arange(len(kept))).row.tolist() == plain.locate(kept).row.tolist()
    assert skipping.digest == plain.digest


def test_digest_and_readable_difference() -> None:
    def order(rows=(40, 80), seed=0, lanes=4, weights=(1, 1)) -> Order:
        return Order(make.rows_only(rows), make.layout(16, 4, lanes=lanes), make.corpus(weights), 16, seed)

    base = order()
    assert base.digest == order().digest
    for other in (order(seed=1), order(lanes=8), order(weights=(1, 3)), order(rows=(40, 84))):
        assert other.digest != base.digest
        assert describe_difference(base.describe(), other.describe())
    assert describe_difference(base.describe(), order(rows=(40, 84), seed=7).describe()) == (
        "seed: was 0, is 7; sources.s1: was 80, is 84"
    )


def test_golden_order() -> None:
    """The order is a format: a change of it must be deliberate (raise order.FORMAT) because running jobs depend on it."""
    order = Order(make.rows_only([400, 120]), make.layout(16, 4, lanes=8), make.corpus([3, 1]), 16, 42)
    location = order.locate(np.arange(10**6, 10**6 + 8))
    assert location.source.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert location.row.tolist() == [201, 90, 259, 306, 299, 211, 70, 0]
