"""Which row is training sequence number n: a closed form, so that the whole state of the loader is n.

Names. L tokens a stored row; S = L / parts tokens a training sequence; R rows a block (a Parquet row group); W blocks a
window; D lanes; M positions a mixture block; N_s rows of source s. For sequence n:

1. Skipped ranges are stepped over: position g = n + (skipped positions before it).
2. row position h = g // parts, part = g % parts: a shorter training length cuts rows and leaves their order alone.
3. lane = h % D, q = h // D: lanes are independent read streams, so that ranks (any divisor of D) share no block.
4. (source s, v) = mixture(lane, q): exact counts per M positions of a lane (mixture.py).
5. A source with few rows has fewer lanes, D_s, a divisor of D: lane l reads lane l % D_s there, interleaved with the
   others. V_s = N_s // D_s rows a lane; epoch e = v // V_s, v = v % V_s; the N_s % D_s rows left over differ every epoch.
6. Rows of a lane are shuffled in windows of W whole blocks, clipped to the lane; boundaries differ from lane to lane, so
   that not all lanes open new blocks in the same step. Permutation keyed by (seed, s, e, lane, window).
7. x = lane * V_s + v: block x // R goes through a permutation of all N_s / R blocks keyed by (seed, s, e).

Every row appears at most once per source epoch. Nothing depends on ranks, batch sizes or restarts. Cost: 1-2 us a
sequence, vectorised over n; memory independent of the size of the dataset. Errors: ValueError naming the key to change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import CorpusConfig, DataConfig, RunConfig, ScheduleConfig
from pipeline.dataset.feistel import key_of, permute, subkey
from pipeline.dataset.mixture import Mixture, Stage
from pipeline.manifest import DatasetManifest, digest_of

Int64 = NDArray[np.int64]

FORMAT = 1  # of the closed form: raised when the same constants would give another order


class Location(NamedTuple):
    """Arrays of one shape: the source (index into `dataset.sources`), its row, and the part of the row."""

    source: Int64
    row: Int64
    part: Int64


class Demand(NamedTuple):
    """What a run asks of one source."""

    rows: int  # drawn, repeats counted
    epochs: float  # of the lane that is furthest on
    max_epochs: float
    supply: int  # rows of one epoch


class Order:
    """The order of one run over one dataset. Construct directly or with `Order.of_run`."""

    def __init__(
        self,
        dataset: DatasetManifest,
        data: DataConfig,
        corpus: CorpusConfig,
        sequence_length: int,
        seed: int,
        skip: Sequence[tuple[int, int]] = (),
    ) -> None:
        for name in ("sequence_length", "rows_per_group"):
            if getattr(data, name) != getattr(dataset, name):
                raise ValueError(
                    f"data.{name} is {getattr(data, name)} but the dataset was packed with {getattr(dataset, name)}; "
                    "set it to the dataset's value or prepare a dataset for it"
                )
        if dataset.sequence_length % sequence_length:
            raise ValueError(
                f"training.sequence_length {sequence_length} must divide the dataset's rows of {dataset.sequence_length} tokens"
            )
        self.dataset = dataset
        self.data = data
        self.sequence_length = sequence_length
        self.parts = dataset.sequence_length // sequence_length
        self.seed = seed
        self.lanes = data.lanes
        self.rows_per_group = data.rows_per_group
        self.window_blocks = data.window_blocks
        self.source_names = tuple(source.name for source in dataset.sources)
        self._skip = _checked_ranges(skip)
        stages = _stages(corpus, self.source_names, dataset.sequence_length, data.lanes, data.mixture_block)
        self.mixture = Mixture(stages, data.mixture_block, data.lanes, seed)

        self._rows = np.array([source.rows for source in dataset.sources], dtype=np.int64)
        used = np.array([any(segment.counts[s] for segment in self.mixture.segments) for s in range(len(self._rows))])
        for s in np.flatnonzero(used & (self._rows < self.rows_per_group)):
            raise ValueError(
                f"source {self.source_names[s]!r} has {self._rows[s]} packed rows, fewer than one block of "
                f"data.rows_per_group={self.rows_per_group}: add text to it, lower data.rows_per_group or remove the source"
            )
        for source in dataset.sources:
            assert source.rows % self.rows_per_group == 0, f"{source.name}: rows must fill whole row groups"
        self._source_lanes = np.array(
            [_source_lanes(int(rows), data.lanes, data.rows_per_group) for rows in self._rows]
        )
        self._lane_rows = self._rows // self._source_lanes  # V_s
        self._blocks = self._rows // self.rows_per_group
        self._block_keys = np.array([key_of(seed, "blocks", name) for name in self.source_names], dtype=np.uint64)
        self._window_keys = np.array([key_of(seed, "windows", name) for name in self.source_names], dtype=np.uint64)

    @classmethod
    def of_run(
        cls, config: RunConfig, dataset: DatasetManifest, skip: Sequence[tuple[int, int]] | None = None
    ) -> Order:
        """`skip`: in place of `training.skip_sequences`."""
        training = config.training
        ranges = training.skip_sequences if skip is None else skip
        return cls(dataset, config.data, config.corpus, training.sequence_length, config.seed, ranges)

    # -- the closed form -----------------------------------------------------------------------------------------

    def positions(self, n: Any) -> Int64:
        """Global positions of training sequences n: the same numbers unless ranges are skipped."""
        position = np.array(n, dtype=np.int64)
        for start, stop in self._skip:
            position = np.where(position >= start, position + (stop - start), position)
        return position

    def locate(self, n: Any) -> Location:
        """Source, row and part of training sequences n (integers >= 0, any shape)."""
        position = self.positions(n)
        shape, g = position.shape, position.reshape(-1)
        h, part = np.divmod(g, self.parts)
        q, lane = np.divmod(h, self.lanes)
        s, v = self.mixture.locate(lane, q)
        row = self._row(s, lane, v)
        return Location(s.reshape(shape), row.reshape(shape), part.reshape(shape))

    def epochs(self, n: Any) -> Int64:
        """How many times each sequence's source was gone through before, in its lane: 0 in the first epoch."""
        q, lane = np.divmod(self.positions(n) // self.parts, self.lanes)
        s, v = self.mixture.locate(lane.reshape(-1), q.reshape(-1))
        _, v = self._fold(s, lane.reshape(-1), v)
        return (v // self._lane_rows[s]).reshape(q.shape)

    def _fold(self, s: Int64, lane: Int64, v: Int64) -> tuple[Int64, Int64]:
        """Lane and position in a source that has fewer lanes than the order (step 5)."""
        lanes = self._source_lanes[s]
        return lane % lanes, v * (self.lanes // lanes) + lane // lanes

    def _row(self, s: Int64, lane: Int64, v: Int64) -> Int64:
        lane, v = self._fold(s, lane, v)
        rows, block_rows = self._lane_rows[s], self.rows_per_group
        epoch, v = np.divmod(v, rows)

        first = lane * rows
        window_rows = self.window_blocks * block_rows
        shift = lane % self.window_blocks * block_rows
        window = (first + v + shift) // window_rows
        start = np.maximum(window * window_rows - shift, first)
        stop = np.minimum((window + 1) * window_rows - shift, first + rows)
        key = subkey(subkey(subkey(self._window_keys[s], epoch), lane), window)
        x = start + permute(first + v - start, stop - start, key)

        block, within = np.divmod(x, block_rows)
        return permute(block, self._blocks[s], subkey(self._block_keys[s], epoch)) * block_rows + within

    # -- identity ------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Everything that decides the order, as plain JSON values. Skipped ranges only move along it: not included."""
        return {
            "format": FORMAT,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "row_tokens": self.sequence_length * self.parts,
            "rows_per_group": self.rows_per_group,
            "lanes": self.lanes,
            "window_blocks": self.window_blocks,
            "mixture_block": self.data.mixture_block,
            "sources": {name: int(rows) for name, rows in zip(self.source_names, self._rows)},
            "mixture": {
                f"row {segment.start * self.lanes}": {
                    "block": segment.block,
                    "counts": dict(zip(self.source_names, segment.counts)),
                }
                for segment in self.mixture.segments
            },
        }

    @property
    def digest(self) -> str:
        return digest_of(self.describe())

    # -- supply --------------------------------------------------------------------------------------------------

    def _drawn(self, sequences: int) -> Int64:
        """[lanes, sources]: rows that the first `sequences` training sequences draw."""
        last = int(self.positions(sequences - 1)) + 1 if sequences else 0
        rounds, rest = divmod(-(-last // self.parts), self.lanes)
        return self.mixture.used(np.where(np.arange(self.lanes) < rest, rounds + 1, rounds))

    def shares(self, sequences: int, first: int = 0) -> dict[str, float]:
        """Share of each source among the rows that training sequences from `first` up to `sequences` draw."""
        drawn = (self._drawn(sequences) - self._drawn(first)).sum(0)
        return {name: float(rows / max(drawn.sum(), 1)) for name, rows in zip(self.source_names, drawn)}

    def demand(self, sequences: int, max_epochs: Mapping[str, float]) -> dict[str, Demand]:
        """What the first `sequences` training sequences draw from each source that they use."""
        drawn = self._drawn(sequences)
        demand = {}
        for s, name in enumerate(self.source_names):
            if drawn[:, s].any():
                lanes = np.arange(self.lanes)
                _, furthest = self._fold(np.full(self.lanes, s), lanes, drawn[:, s] - 1)
                rows = int((furthest[drawn[:, s] > 0] + 1).max())
                supply = int(self._lane_rows[s])
                demand[name] = Demand(
                    int(drawn[:, s].sum()), rows / supply, max_epochs[name], supply * int(self._source_lanes[s])
                )
        return demand

    def check_demand(self, sequences: int, max_epochs: Mapping[str, float]) -> dict[str, Demand]:
        """`demand`, refused with ValueError where a source would be gone through more often than allowed."""
        demand = self.demand(sequences, max_epochs)
        short = [
            f"source {name!r} would be seen up to {need.epochs:.2f} times ({need.rows} rows drawn from {need.supply}) "
            f"but corpus.sources[{name}].max_epochs is {need.max_epochs:g}"
            for name, need in demand.items()
            if need.epochs > need.max_epochs
        ]
        if short:
            raise ValueError(
                "; ".join(short)
                + ": add text, raise max_epochs, lower the source's weight or lower schedule.total_tokens"
            )
        return demand

    def blocks_open(self, world: int) -> int:
        """Blocks a rank holds at a time so that each is read once; the cache should have room for them."""
        lanes = np.maximum(1, self._source_lanes // world)
        return int(np.minimum(lanes * self.window_blocks, self._blocks).sum())


def check_demand(config: RunConfig, dataset: DatasetManifest) -> dict[str, Demand]:
    """Does the dataset fit the run and hold what it asks for? Needs the manifest only. Raises ValueError with the remedy."""
    dataset.check_padding(config.data.max_padding)
    mixture = config.corpus.mixture
    if mixture and mixture[-1].until_tokens < config.schedule.total_tokens:
        raise ValueError(
            f"corpus.mixture: ends at {mixture[-1].until_tokens} tokens but schedule.total_tokens is {config.schedule.total_tokens}"
        )
    if dataset.tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size {config.model.vocab_size} is too small for the dataset, whose tokenizer has "
            f"{dataset.tokenizer.vocab_size} tokens: set it to that, or prepare a dataset with this tokenizer"
        )
    max_epochs = {source.name: source.max_epochs for source in config.corpus.sources}
    sequences = total_sequences(config.schedule, config.training.sequence_length)
    return Order.of_run(config, dataset).check_demand(sequences, max_epochs)


def total_sequences(schedule: ScheduleConfig, sequence_length: int) -> int:
    """Training sequences of the whole run: whole global batches until `total_tokens` are reached."""
    return sum(steps * sequences for steps, sequences in _batches(schedule, sequence_length))


def step_sequences(schedule: ScheduleConfig, sequence_length: int, step: int) -> tuple[int, int]:
    """First sequence number and global batch of optimizer step `step` = 1, 2, ..."""
    first, left = 0, step - 1
    for steps, sequences in _batches(schedule, sequence_length):
        if 0 <= left < steps:
            return first + left * sequences, sequences
        first, left = first + steps * sequences, left - steps
    raise ValueError(f"step {step} is not one of the run's steps 1 to {step - 1 - left}")


def _batches(schedule: ScheduleConfig, sequence_length: int) -> list[tuple[int, int]]:
    """(steps, sequences per step) of each stage: a stage ends with the first step at or after `until_tokens`."""
    stages, seen = [], 0
    for stage in schedule.global_batch:
        missing = max(0, min(stage.until_tokens, schedule.total_tokens) - seen)
        steps = -(-missing // (stage.sequences * sequence_length))
        stages.append((steps, stage.sequences))
        seen += steps * stage.sequences * sequence_length
    return stages


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any], _prefix: str = "") -> str:
    """One readable line on how two `Order.describe()` (or any two JSON objects) differ; '' if they do not."""
    found = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found.append(describe_difference(before, after, f"{_prefix}{key}."))
        else:
            found.append(f"{_prefix}{key}: was {_shown(before)}, is {_shown(after)}")
    return "; ".join(found)


def _shown(value: Any) -> str:
    text = "absent" if value is None else repr(value)
    return text if len(text) <= 300 else f"{text[:297]}..."


def _source_lanes(rows: int, lanes: int, block_rows: int) -> int:
    """The largest divisor of `lanes` that leaves a lane at least one block of the source."""
    return max((d for d in range(1, lanes + 1) if lanes % d == 0 and rows // d >= block_rows), default=1)


def _stages(corpus: CorpusConfig, names: Sequence[str], row_tokens: int, lanes: int, block: int) -> list[Stage]:
    """Mixture stages in lane positions; a boundary goes to the nearest multiple of lanes * row_tokens tokens."""
    configured = {source.name for source in corpus.sources}
    if configured != set(names):
        raise ValueError(
            f"corpus.sources are {sorted(configured)} but the dataset holds {sorted(names)}; prepare a dataset for this corpus"
        )
    if not corpus.mixture:
        default = {source.name: source.weight for source in corpus.sources}
        edges: list[tuple[Mapping[str, float], int | None]] = [(default, None)]
    else:
        edges = [(stage.weights, round(stage.until_tokens / (row_tokens * lanes))) for stage in corpus.mixture[:-1]]
        edges.append((corpus.mixture[-1].weights, None))
    stages, start = [], 0
    for index, (weights, end) in enumerate(edges):
        vector = tuple(float(weights.get(name, 0.0)) for name in names)
        if end is not None and end <= start:
            raise ValueError(
                f"corpus.mixture[{index}]: shorter than one row per lane ({lanes * row_tokens} tokens); lower data.lanes or lengthen the stage"
            )
        for name, weight in zip(names, vector):
            if 0 < weight / sum(vector) * block < 0.5:
                raise ValueError(
                    f"source {name!r}: a share of {weight / sum(vector):.2g} is less than half a position in a mixture block of {block}; "
                    f"raise data.mixture_block to at least {math.ceil(sum(vector) / weight)} or the source's weight"
                )
        stages.append(Stage(vector, end))
        start = end or start
    return stages


def _checked_ranges(skip: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    ranges = tuple((int(start), int(stop)) for start, stop in sorted(skip))
    previous = 0
    for start, stop in ranges:
        if not previous <= start < stop:
            raise ValueError(f"training.skip_sequences: [{start}, {stop}) is empty or overlaps another range")
        previous = stop
    return ranges
