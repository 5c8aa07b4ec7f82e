"""What training sees, as lines of text: steps, sequences, the mixture, rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.near.look import cluster_lines
from jobs.cli import locate, parser, refusing
from jobs.stages.records import open_dataset
from pipeline.config.schema import RunConfig
from pipeline.dataset.order import Order, step_sequences, total_sequences
from pipeline.dataset.provenance import mixture_table, row_tokens, sequences
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage
from pipeline.tokenizer.encoder import Encoder
from pipeline.training.left_out import order_of, read_left_out

WHAT = "step N | sequence N | position N | row SOURCE N | mixture | duplicates"
SHAPES = {"step": 2, "sequence": 2, "position": 2, "row": 3, "mixture": 1, "duplicates": 1}  # words of each


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """`jobs.inspect`. Returns the exit code."""
    made = parser("inspect", "Look at what training sees.")
    made.add_argument("--dataset", help="identity; default: the dataset of this configuration")
    made.usage = f"{made.prog} --config CONFIG [--dataset ID] [section.key=value ...] {WHAT}"
    given = made.parse_args(arguments)
    what = [word for word in given.overrides if "=" not in word]
    overrides = [word for word in given.overrides if "=" in word]
    if not understood(what):
        made.error(f"{' '.join(what) or 'nothing'} is asked for; ask for {WHAT}")
    config, storage = locate(given.config, overrides)
    for line in lines(what, config, open_dataset(config, storage, given.dataset), storage):
        print(line)
    return 0


def understood(what: Sequence[str]) -> bool:
    """Is it one of `WHAT`?"""
    return bool(what) and len(what) == SHAPES.get(what[0]) and (len(what) == 1 or what[-1].isdecimal())


def lines(what: Sequence[str], config: RunConfig, dataset: DatasetManifest, storage: Storage) -> Iterator[str]:
    """A step, a sequence, a row or the mixture, as `WHAT` has it. Raises ValueError if there is no such thing."""
    if what[0] == "duplicates":
        yield from cluster_lines(dataset, storage)
        return
    order = order_of(config, dataset, read_left_out(storage, config.run_id).ranges)
    number = int(what[-1]) if what[-1].isdecimal() else 0
    if what[0] == "step":
        first, count = step_sequences(config.schedule, order.sequence_length, number)
        yield f"step {number}: sequences {first} to {first + count - 1}"
        yield from sequence_lines(order, storage, range(first, first + count))
    elif what[0] == "sequence":
        total = total_sequences(config.schedule, order.sequence_length)
        if not 0 <= number < total:
            raise ValueError(f"sequence {number} is not one of the run's sequences 0 to {total - 1}")
        yield from sequence_lines(order, storage, range(number, number + 1))
    elif what[0] == "position":  # in the order of data that nothing was left out of
        yield from sequence_lines(Order.of_run(config, dataset, skip=()), storage, range(number, number + 1))
    elif what[0] == "mixture":
        yield from mixture_lines(config, order)
    else:
        yield from row_lines(dataset, order, storage, what[1], number)


def sequence_lines(order: Order, storage: Storage, numbers: range) -> Iterator[str]:
    for found in sequences(order, storage, numbers):
        part = f", part {found.part}" if order.parts > 1 else ""
        yield f"{found.number}: {found.source}, epoch {found.epoch}, {found.path}, row group {found.row_group}, row {found.row}{part}"
        for length, piece in zip(found.doc_lens, found.pieces):
            name = piece.document if piece.document is not None else "(document not found)"
            yield f"    {length} tokens of {name}, of its tokens {piece.start} to {piece.stop}"


def mixture_lines(config: RunConfig, order: Order) -> Iterator[str]:
    total = total_sequences(config.schedule, order.sequence_length)
    max_epochs = {source.name: source.max_epochs for source in config.corpus.sources}
    yield f"{total:,} sequences of {order.sequence_length} tokens; order {order.digest[:16]}"
    yield from mixture_table(order, total, max_epochs)
    block_bytes = order.rows_per_group * order.dataset.sequence_length * np.dtype(order.dataset.token_dtype).itemsize
    world = config.parallelism.world_size
    held = order.blocks_open(world) * block_bytes
    enough = "" if held <= config.data.cache_bytes else ": blocks will be read more than once"
    yield (
        f"each of {world} ranks reads from about {order.blocks_open(world)} blocks at a time, {held / 1e6:,.0f} MB; "
        f"data.cache_bytes is {config.data.cache_bytes / 1e6:,.0f} MB{enough}"
    )


def row_lines(dataset: DatasetManifest, order: Order, storage: Storage, source: str, row: int) -> Iterator[str]:
    tokens, doc_lens = row_tokens(order, storage, source, row)
    encoder = Encoder.stored(dataset.tokenizer, storage)
    yield f"{source}, row {row}: documents of {doc_lens} tokens, {len(tokens) - sum(doc_lens)} of padding"
    start = 0
    for length in doc_lens:
        yield f"--- {length} tokens"
        yield encoder.decode(tokens[start : start + length])
        start += length
