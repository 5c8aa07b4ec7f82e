"""The closed-form order: once per epoch, exact mixtures, no trace of ranks or batches, shuffled well, refused when short."""

import tracemalloc
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.dataset.loader import Loader
from pipeline.dataset.order import Order, check_demand, describe_difference, step_sequences, total_sequences
from pipeline.dataset.reader import BlockId, BlockReader
from pipeline.file_index import dataset_path, read_dataset
from pipeline.manifest import DatasetManifest, PackedFile
from pipeline.storage import Storage, open_storage
from tests.dataset import make, slow_order
from tests.dataset.test_feistel import chi_square


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


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    blocks=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    later=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    edge=st.integers(1, 30),
    group=st.integers(1, 4),
    lanes=st.sampled_from([1, 2, 5, 6, 8]),
    window=st.integers(1, 3),
    block=st.integers(18, 40),
)
def test_equals_the_slow_order_for_any_constants(blocks, weights, later, edge, group, lanes, window, block) -> None:
    count = len(blocks)
    stages = [(weights[:count], edge), (later[:count], None)]
    constants = slow_order.Constants(
        [f"s{s}" for s in range(count)], [b * group for b in blocks], stages, lanes, group, window, block, seed=edge
    )
    order = Order(
        make.rows_only(constants.rows, 16, group),
        make.layout(16, group, lanes=lanes, window=window, block=block),
        make.corpus([1] * count, [((end or 10**6) * lanes * 16, weights) for weights, end in stages]),
        16,
        seed=edge,
    )
    n = np.arange(300)
    location = order.locate(n)
    assert list(zip(location.source, location.row, order.epochs(n))) == list(
        islice(slow_order.rows_in_order(constants), 300)
    )


STAGED = slow_order.Constants(
    names=["s0", "s1", "s2"],
    rows=[44, 120, 12],
    stages=[([6, 3, 1], 25), ([1, 0, 1], 40), ([2, 2, 6], None)],
    lanes=12,
    group=4,
    window=2,
    block=10,
    seed=9,
)


def staged(
    sequence_length: int = 16, skip: list[tuple[int, int]] | None = None, storage: Storage | None = None
) -> Order:
    """Three sources, one smaller than its lanes; stages that end inside blocks; several epochs in a few hundred rows."""
    lane_tokens = STAGED.lanes * 16
    stages = [((end or 10**6) * lane_tokens, weights) for weights, end in STAGED.stages]
    layout = make.layout(16, STAGED.group, lanes=STAGED.lanes, window=STAGED.window, block=STAGED.block)
    dataset = make.rows_only(STAGED.rows, 16, STAGED.group, storage)
    return Order(dataset, layout, make.corpus([1, 1, 1], stages), sequence_length, STAGED.seed, skip or [])


def test_equals_the_slow_order_over_stages_and_epochs() -> None:
    count = STAGED.lanes * 95
    expected = list(islice(slow_order.rows_in_order(STAGED), count))
    location = staged().locate(np.arange(count))
    assert list(zip(location.source, location.row, staged().epochs(np.arange(count)))) == expected
    assert len(set(expected)) == count  # each row once per epoch of its source
    assert len({(s, epoch) for s, _, epoch in expected}) > 12
    halves = staged(8).locate(np.arange(2 * count))
    assert list(zip(halves.source, halves.row, halves.part)) == [
        (s, row, part) for s, row, _ in expected for part in (0, 1)
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 16, 96])
def test_ranks_and_batch_schedules_leave_no_trace(world: int, tmp_path) -> None:
    """Every rank plans its share of randomly sized batches; together they are the one global list."""
    storage = open_storage(StorageConfig(root=str(tmp_path)))
    order = staged(8, [(100, 130)], storage)
    total = 2200
    expected = order.locate(np.arange(total))
    loaders = [Loader(order, storage, rank, world) for rank in range(world)]
    rng = np.random.default_rng(world)
    start = 0
    seen = []
    while start < total:
        count = min(int(rng.integers(1, 300)), total - start)
        for loader in loaders:
            plan = loader.plan(start, count)
            numbers = [number * STAGED.group + row for (_, number), row in zip(plan.blocks, plan.rows)]
            seen += list(zip(plan.sequences.tolist(), [s for s, _ in plan.blocks], numbers, plan.parts))
        start += count
    assert sorted(seen) == list(zip(range(total), expected.source, expected.row, expected.part))
    for loader in loaders:
        loader.close()


def test_restarts_at_1000_random_positions() -> None:
    """A fresh order asked at n gives what the running one gave: no state but n. Every 50th also in a new object."""
    expected = staged().locate(np.arange(5000))
    fresh = staged()
    for number, n in enumerate(np.random.default_rng(0).permutation(4990)[:1000]):
        if number % 50 == 0:
            fresh = staged()
        count = 1 + number % 10
        location = fresh.locate(np.arange(n, n + count))
        assert location.source.tolist() == expected.source[n : n + count].tolist()
        assert location.row.tolist() == expected.row[n : n + count].tolist()


@pytest.mark.parametrize(
    ("lanes", "window", "group", "batch", "rows"),
    [
        (1024, 4, 256, 1024, 1 << 24),
        (256, 4, 256, 1024, 1 << 23),
        (4096, 4, 256, 2048, 1 << 26),
        (16, 4, 16, 16, 20_000),
    ],
)
def test_batches_are_representative_of_sorted_data(lanes: int, window: int, group: int, batch: int, rows: int) -> None:
    """Rows sorted by some property: its mean over a batch spreads like that of random batches, or less (lanes stratify).

    Holds while lanes * window_blocks reach the batch.
    """
    order = Order(
        make.rows_only([rows], 16, group),
        make.layout(16, group, lanes=lanes, window=window, block=2048),
        make.corpus([1]),
        16,
        1,
    )
    steps = 300
    value = order.locate(np.arange(steps * batch)).row.reshape(steps, batch) / rows
    ideal = (1 / 12 / batch) ** 0.5
    assert value.mean(axis=1).std() <= 1.2 * ideal


def test_batches_are_uniform_in_low_and_high_bits() -> None:
    """Neighbours in batches a window apart (no block twice): chi-square per degree of freedom of pairs on a 64 x 64 grid
    and of differences, and correlation."""
    rows, lanes, window_rows = 1 << 29, 4096, 1024
    order = Order(
        make.rows_only([rows], 16, 256),
        make.layout(16, 256, lanes=lanes, window=4, block=2048),
        make.corpus([1]),
        16,
        3,
    )
    first = np.arange(rows // lanes // window_rows) * lanes * window_rows
    row = order.locate(first[:, None] + np.arange(lanes)).row
    low, high = row % 64, row * 64 // rows
    difference = (row[:, 1:] - row[:, :-1]) % rows * 4096 // rows
    for values in (low[:, :-1] * 64 + low[:, 1:], high[:, :-1] * 64 + high[:, 1:], difference):
        assert 0.8 < chi_square(values.reshape(-1), 4096) < 1.2
    assert abs(np.corrcoef(row[:, :-1].reshape(-1), row[:, 1:].reshape(-1))[0, 1]) < 0.01


@pytest.mark.timeout(1800)
def test_a_dataset_of_45_000_files_opens_and_seeks_in_little_memory(tmp_path) -> None:
    """Nothing behind the files: opening and 1,000 seeks allocate under 150 MB and read no file; ranks are sent two strings."""
    storage = open_storage(StorageConfig(root=str(tmp_path)))
    files = [
        [
            PackedFile(
                path=f"p/{s}/{i}", bytes=3 * 10**8, sha256="0" * 64, rows=65_536, tokens=1, group_crc32="0" * 2056
            )
            for i in range(9000)
        ]
        for s in range(5)
    ]
    made = make.manifest(files, 4096, 256, "uint32", storage)
    head = made.to_json()
    assert len(head) < 10_000
    storage.write(dataset_path("test"), head)
    del files
    tracemalloc.start()
    dataset = read_dataset(storage, "test", made.digest)
    assert dataset == made
    assert dataset.rows * dataset.sequence_length > 5.7e12
    order = Order(
        dataset, make.layout(4096, 256, lanes=4096, window=4, block=2048), make.corpus([9, 4, 4, 2, 1]), 4096, 0
    )
    reader = BlockReader(dataset, storage, cache_bytes=0)  # finds blocks, reads none
    last = dataset.rows - 1
    for n in np.random.default_rng(0).integers(0, last, 1000):
        location = order.locate(n)
        entry, group = reader.find(BlockId(int(location.source), int(location.row) // 256))
        assert 0 <= group < 256
        assert entry.path.startswith(f"p/{location.source}/")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150e6


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


def dataset_for(config: RunConfig, rows: list[int], dtype: str = "uint16") -> DatasetManifest:
    """Manifests of a preset's sources, no data behind them."""
    dataset = make.rows_only(rows, config.data.sequence_length, config.data.rows_per_group)
    tokenizer = dataset.tokenizer.model_copy(update={"vocab_size": config.model.vocab_size})
    names = [source.name for source in config.corpus.sources]
    sources = tuple(
        source.model_copy(update={"name": name}) for source, name in zip(dataset.sources, names, strict=True)
    )
    return dataset.model_copy(update={"tokenizer": tokenizer, "sources": sources, "token_dtype": dtype})


def test_debug_preset_demand_and_total() -> None:
    config = load_config("debug")
    dataset = dataset_for(config, [4000, 4000, 2000])
    assert total_sequences(config.schedule, 512) == 1920
    demand = check_demand(config, dataset)
    assert [need.rows for need in demand.values()] == [768, 768, 384]
    order = Order.of_run(config, dataset)
    assert np.bincount(order.locate(np.arange(1920)).source).tolist() == [768, 768, 384]


def test_moonlight_preset() -> None:
    """5.7 T tokens: the cooldown's mixture begins where it should, a rank's open blocks fit its cache, demand is met."""
    config = load_config("moonlight-16b-a3b")
    shares = [0.45, 0.20, 0.20, 0.10, 0.05]
    dataset = dataset_for(config, [int(350e6 * share) // 256 * 256 for share in shares], "uint32")
    order = Order.of_run(config, dataset)
    starts = [segment.start * order.lanes * 8192 for segment in order.mixture.segments]
    assert abs(starts[-1] - 5.2e12) <= config.data.lanes * 8192 / 2
    cooldown = order.locate(np.arange(starts[-1] // 8192, starts[-1] // 8192 + 2 * 2048 * 4096, 4097)).source
    assert np.abs(np.bincount(cooldown) / len(cooldown) - [0.25, 0.10, 0.30, 0.25, 0.10]).max() < 0.02
    block_bytes = 256 * 8192 * 4
    assert order.blocks_open(config.parallelism.world_size) * block_bytes <= config.data.cache_bytes
    demand = check_demand(config, dataset)
    assert sum(need.rows for need in demand.values()) == total_sequences(config.schedule, 8192) >= 5.7e12 / 8192
    assert all(1.5 < need.epochs < 2.5 for need in demand.values())


def test_steps_and_sequences() -> None:
    """Against stepping through the schedule; two batch sizes, the first stage's last step overshooting its end."""
    config = load_config(
        "debug",
        ['schedule.global_batch=[{"until_tokens":50000,"sequences":16},{"until_tokens":983040,"sequences":48}]'],
    )
    first = 0
    for step in range(1, 1000):
        if first * 512 >= config.schedule.total_tokens:
            break
        batch = 16 if first * 512 < 50_000 else 48
        assert step_sequences(config.schedule, 512, step) == (first, batch)
        first += batch
    assert total_sequences(config.schedule, 512) == first
    with pytest.raises(ValueError, match=rf"step {step} is not one of the run's steps 1 to {step - 1}"):
        step_sequences(config.schedule, 512, step)
    with pytest.raises(ValueError, match="step 0 is not one of"):
        step_sequences(config.schedule, 512, 0)


def test_a_run_that_does_not_fit_the_dataset_is_refused() -> None:
    config = load_config("debug")
    dataset = dataset_for(config, [4000, 4000, 2000])
    with pytest.raises(ValueError, match=r"source 'documentation' would be seen up to \d+\.\d+ times.*max_epochs is 8"):
        check_demand(config, dataset_for(config, [4000, 4000, 32]))
    tokenizer = dataset.tokenizer.model_copy(update={"vocab_size": 5000})
    foreign = dataset.model_copy(update={"tokenizer": tokenizer})
    with pytest.raises(ValueError, match=r"model\.vocab_size 4096 is too small .* whose tokenizer has 5000"):
        check_demand(config, foreign)
    short = load_config("debug", ['corpus.mixture=[{"until_tokens": 1000, "weights": {"documentation": 1.0}}]'])
    with pytest.raises(ValueError, match=r"corpus\.mixture: ends at 1000 tokens but schedule\.total_tokens is 983040"):
        check_demand(short, dataset)


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
    assert describe_difference(base.describe(), order(weights=(1, 3)).describe()) == (
        "mixture.row 0.counts.s0: was 4, is 2; mixture.row 0.counts.s1: was 4, is 6"
    )


def test_golden_order() -> None:
    """The order is a format: a change of it must be deliberate (raise order.FORMAT) because running jobs depend on it."""
    order = Order(make.rows_only([400, 120]), make.layout(16, 4, lanes=8), make.corpus([3, 1]), 16, 42)
    location = order.locate(np.arange(10**6, 10**6 + 8))
    assert location.source.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert location.row.tolist() == [201, 90, 259, 306, 299, 211, 70, 0]
