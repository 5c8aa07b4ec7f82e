"""Look at what training sees.

    python -m jobs.inspect --config <preset or path> step 120        which rows and documents formed optimizer step 120
    python -m jobs.inspect --config <preset or path> sequence 5000   the same of one training sequence
    python -m jobs.inspect --config <preset or path> mixture         what the run would draw from each source
    python -m jobs.inspect --config <preset or path> row web-en 17   row 17 of a source, as text

Each takes `--dataset <identity>` (default: the dataset of this configuration) and `section.key=value ...`. Other weights can
be tried with `mixture`; where the tokenizer is trained on the corpus, weights decide the dataset, too: name it then. Exit code
2: wrong configuration, or no such dataset, step, sequence, source or row.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator

import numpy as np

from jobs.dataset import open_dataset
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.dataset.order import Order, step_sequences, total_sequences
from pipeline.dataset.provenance import mixture_table, row_tokens, sequences
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage, open_storage
from pipeline.tokenizer.encoder import Encoder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.inspect", description="Look at what training sees.")
    parser.add_argument("--config", required=True, help="preset or path")
    parser.add_argument("--dataset", help="identity; default: the dataset of this configuration")
    what = parser.add_subparsers(dest="what", required=True)
    step = what.add_parser("step", help="rows and documents of an optimizer step")
    step.add_argument("step", type=int)
    sequence = what.add_parser("sequence", help="rows and documents of a training sequence")
    sequence.add_argument("number", type=int)
    what.add_parser("mixture", help="what the run draws from each source")
    row = what.add_parser("row", help="a packed row as text")
    row.add_argument("source")
    row.add_argument("row", type=int)
    for command in what.choices.values():
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
    parsed = parser.parse_args(arguments)
    try:
        config = load_config(parsed.config, parsed.overrides)
        storage = open_storage(config.storage)
        dataset = open_dataset(config, storage, parsed.dataset)
        order = Order.of_run(config, dataset)
        if parsed.what == "step":
            first, count = step_sequences(config.schedule, order.sequence_length, parsed.step)
            print(f"step {parsed.step}: sequences {first} to {first + count - 1}")
            lines = sequence_lines(order, storage, range(first, first + count))
        elif parsed.what == "sequence":
            total = total_sequences(config.schedule, order.sequence_length)
            if not 0 <= parsed.number < total:
                raise ValueError(f"sequence {parsed.number} is not one of the run's sequences 0 to {total - 1}")
            lines = sequence_lines(order, storage, range(parsed.number, parsed.number + 1))
        elif parsed.what == "mixture":
            lines = mixture_lines(config, order)
        else:
            lines = row_lines(dataset, order, storage, parsed.source, parsed.row)
        for line in lines:
            print(line)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


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
    encoder = Encoder.load(dataset.tokenizer.folder, storage)
    yield f"{source}, row {row}: documents of {doc_lens} tokens, {len(tokens) - sum(doc_lens)} of padding"
    start = 0
    for length in doc_lens:
        yield f"--- {length} tokens"
        yield encoder.decode(tokens[start : start + length])
        start += length


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is fine
    sys.exit(main())
