"""What training sees, for people: which rows and documents formed a step, what a mixture would draw, what a row says.

Packed rows hold no document names. A row's file is named after its pack, whose record names the unit, whose document
shard holds tokens and names: the pieces of the row are searched for there (a byte search, fractions of a second per
shard). Of two documents with the same tokens the first is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.dataset.checks import PACKS, TAILS
from pipeline.dataset.loader import cut
from pipeline.dataset.order import Order
from pipeline.dataset.packed_file import Block
from pipeline.dataset.reader import BlockId, BlockReader
from pipeline.integrity import DamagedFile, read_fields
from pipeline.manifest import PackedFile
from pipeline.storage import Storage


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a document, EOS after its last token not counted."""

    document: str | None  # None: not found in the unit's document shard
    start: int
    stop: int


@dataclass(frozen=True)
class Provenance:
    """Where a training sequence comes from."""

    number: int
    source: str
    epoch: int  # 0: the source is seen for the first time
    path: str
    row_group: int
    row: int  # in the row group
    part: int  # of the row, if training sequences are shorter than rows
    doc_lens: list[int]
    pieces: list[Piece]


def sequences(order: Order, storage: Storage, numbers: Sequence[int]) -> Iterator[Provenance]:
    """The sequences by number, one by one, with the documents they were cut from. Each costs the reading of a block and of
    the document shard behind it."""
    reader = BlockReader(order.dataset, storage, order.data.cache_bytes)
    location, epochs = order.locate(np.array(numbers)), order.epochs(np.array(numbers))
    try:
        for n, s, row, part, epoch in zip(numbers, location.source, location.row, location.part, epochs):
            block_id = BlockId(int(s), int(row) // order.rows_per_group)
            block = reader.get([block_id])[block_id]
            entry, group = reader.find(block_id)
            within = int(row) % order.rows_per_group
            start, stop = int(part) * order.sequence_length, (int(part) + 1) * order.sequence_length
            lengths = block.document_lengths(within)
            pack_id = pack_of(storage, entry, group * order.rows_per_group + within)
            pieces = documents_of(storage, pack_id, _pieces(block, within), order.dataset.tokenizer.eos_id)
            yield Provenance(
                number=int(n),
                source=order.source_names[int(s)],
                epoch=int(epoch),
                path=entry.path,
                row_group=group,
                row=within,
                part=int(part),
                doc_lens=cut(lengths, start, stop),
                pieces=[pieces[i] for i in _overlapping(lengths, start, stop)],
            )
    finally:
        reader.close()


def row_tokens(order: Order, storage: Storage, source: str, row: int) -> tuple[NDArray[np.int64], list[int]]:
    """The tokens of row number `row` of a source, and its document lengths."""
    if source not in order.source_names:
        raise ValueError(f"no source is named {source!r}; sources are {list(order.source_names)}")
    s = order.source_names.index(source)
    rows = order.dataset.sources[s].rows
    if not 0 <= row < rows:
        raise ValueError(f"source {source!r} has rows 0 to {rows - 1}, not {row}")
    reader = BlockReader(order.dataset, storage, 0)
    block_id = BlockId(s, row // order.rows_per_group)
    block = reader.get([block_id])[block_id]
    reader.close()
    within = row % order.rows_per_group
    return block.tokens[within].astype(np.int64), block.document_lengths(within)


def mixture_table(order: Order, total: int, max_epochs: Mapping[str, float]) -> list[str]:
    """Lines of text: what each stretch of the mixture and the whole run draw from each source. Reads nothing."""
    segments, lines = order.mixture.segments, []
    starts = [segment.start * order.lanes * order.parts for segment in segments]
    for segment, start, stop in zip(segments, starts, [*starts[1:], total]):
        if start < total:
            counts = zip(order.source_names, segment.counts)
            shares = ", ".join(f"{name} {count}" for name, count in counts if count)
            slots = f"{start * order.sequence_length:,} to {min(stop, total) * order.sequence_length:,}"
            lines.append(f"slots {slots}: of every {segment.block} rows of a lane: {shares}")
    demand = order.demand(total, max_epochs)
    lines.append(f"{'source':24s} {'rows drawn':>14s} {'share':>7s} {'rows':>14s} {'epochs':>8s} {'allowed':>8s}")
    drawn = sum(need.rows for need in demand.values())
    for name, need in demand.items():
        short = "  TOO FEW ROWS" if need.epochs > need.max_epochs else ""
        lines.append(
            f"{name:24s} {need.rows:14,d} {need.rows / drawn:7.2%} {need.supply:14,d} {need.epochs:8.3f} {need.max_epochs:8g}{short}"
        )
    return lines


def pack_of(storage: Storage, entry: PackedFile, row: int) -> str:
    """The pack of row number `row` of a file: the file is the pack's own, or a tail of the last rows of many packs."""
    name = _owner(entry.path)
    record = read_fields(storage, f"{TAILS}/{name[:2]}/{name}.json")
    if record is None:
        return name
    row += sum(file["rows"] for file in record["packed"] if file["path"] < entry.path)
    for path, rows in record["rests"]:
        if row < rows:
            return _owner(path)
        row -= rows
    raise ValueError(f"{entry.path}: {TAILS}/{name[:2]}/{name}.json accounts for fewer rows than the file has")


def _owner(path: str) -> str:
    """`.../<id>-00000.parquet` and `.../<id>-rest.parquet` belong to <id>."""
    return path.rpartition("/")[2].rpartition("-")[0]


def documents_of(storage: Storage, pack_id: str, pieces: list[NDArray[np.unsignedinteger]], eos_id: int) -> list[Piece]:
    """The document of each piece of a row, searched for in the document shard the row was packed from."""
    pack = _record(storage, f"{PACKS}/{pack_id[:2]}/{pack_id}.json")
    unit = _record(storage, f"datasets/units/{pack['unit'][:2]}/{pack['unit']}.json")
    found = [Piece(None, 0, len(piece)) for piece in pieces]
    exact = [False] * len(pieces)
    with storage.open(unit["documents"]["path"]) as file:
        shard = pq.ParquetFile(file, page_checksum_verification=True)
        for group in range(shard.num_row_groups):
            table = shard.read_row_group(group, columns=["tokens", "doc_id"], use_threads=False).combine_chunks()
            documents, names = table.column("tokens").to_pylist(), table.column("doc_id").to_pylist()
            data = b"".join(documents)
            ends = np.cumsum([len(document) for document in documents])
            for i, piece in enumerate(pieces):
                if not exact[i]:
                    hit = _search(data, ends, piece, eos_id)
                    if hit is not None and (found[i].document is None or hit[1] == 0):
                        number, start, stop = hit
                        found[i] = Piece(names[number], start, stop)
                        exact[i] = start == 0
    return found


def _record(storage: Storage, path: str) -> dict[str, Any]:
    found = read_fields(storage, path)
    if found is None:
        raise DamagedFile(f"{storage.uri(path)}: the file is missing")
    return found


def _search(
    data: bytes, ends: NDArray[np.int64], piece: NDArray[np.unsignedinteger], eos_id: int
) -> tuple[int, int, int] | None:
    """(document, first token, last token + 1) of a piece among concatenated documents; from a document's start if any."""
    size = piece.itemsize
    is_end = bool(piece[-1] == eos_id)
    wanted = (piece[:-1] if is_end else piece).tobytes()
    if not wanted:
        return None
    best = None
    at = data.find(wanted)
    while at >= 0:
        number = int(np.searchsorted(ends, at, side="right"))
        first = int(ends[number - 1]) if number else 0
        stop = at + len(wanted)
        if at % size == 0 and (stop == ends[number] if is_end else stop <= ends[number]):
            hit = number, (at - first) // size, (stop - first) // size
            if at == first:
                return hit
            best = best or hit
        at = data.find(wanted, at + 1)
    return best


def _pieces(block: Block, row: int) -> list[NDArray[np.unsignedinteger]]:
    lengths = block.document_lengths(row)
    ends = np.cumsum(lengths)
    return [block.tokens[row, end - length : end] for end, length in zip(ends, lengths)]


def _overlapping(doc_lens: list[int], start: int, stop: int) -> list[int]:
    ends = np.cumsum(doc_lens)
    return [i for i, (end, length) in enumerate(zip(ends, doc_lens)) if end > start and end - length < stop]
