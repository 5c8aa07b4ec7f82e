"""The files of a checkpoint: what Distributed Checkpoint (DCP) asks of a storage, with every byte checked when it is read.

    __<rank>_0.distcp    the pieces of tensors that a rank holds, raw little-endian bytes, one after the other
    .metadata            JSON: shape and dtype of every tensor; box, file, place, checksum and block size of each of its pieces

DCP plans who writes and who reads which piece, and so reshards; this module moves the bytes. A piece's checksum is the xxh3_128
of the xxh3_128s of its blocks. A block is in the processor's cache because it is written or was read just now, and hashing it by
itself takes two thirds of the time that carrying one checksum from block to block does (130 and 87 GB/s in the cache of a Zen 5):
about 0.01 ns a byte (a checksum of the whole from memory: 0.1). No piece is copied on its way to or from a folder. The manifest has the sha256 of
`.metadata`, so it vouches for every byte that a load uses; nothing is unpickled.

A rank reads the pieces that its shards touch, whole, since only a whole piece can be checked. Memory of a save: none besides
the staged state; of a load: on a folder one piece where layouts differ, on S3 `PARALLEL_READS` pieces.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import orjson
import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future as TorchFuture

from pipeline.manifest import CheckpointManifest, StoredFile
from pipeline.storage import Storage
from pipeline.training.commits import DamagedCheckpoint, parts_of
from pipeline.training.content import RowSum, as_bytes, block_bytes, blocks_of, content_digest, row_bytes
from pipeline.training.pieces import Piece, PieceReader, Read, runs_of_box

METADATA = ".metadata"
FORMAT = 3
READABLE = (2, FORMAT)
PARALLEL_READS = 8  # requests to S3 at a time
WINDOW = 32 * 2**20  # bytes of a piece that one request to S3 asks for where a box is read from front to back


class CheckpointWriter(StorageWriter):
    """Writes a state into `folder`. After `save`, rank 0 knows `files`, `metadata_sha256` and `content_sha256`."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage = storage
        self._folder = folder
        self.files: list[StoredFile] = []
        self.metadata_sha256 = self.content_sha256 = ""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"__{rank}_0.distcp") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        results, start = [], 0
        if plan.items:
            with self._storage.stream(f"{self._folder}/{plan.storage_data}") as stream:
                for item in plan.items:
                    assert item.type != WriteItemType.BYTE_IO, f"{item.index.fqn}: a state holds tensors only"
                    tensor: Any = planner.resolve_data(item)
                    facts: Any = item.tensor_data
                    local = tensor.detach().cpu().contiguous()
                    whole = xxhash.xxh3_128()
                    rows = RowSum(item.index.fqn, facts.size, facts.chunk.offsets, facts.chunk.sizes)
                    for block in blocks_of(local):
                        rows.add(block, row_bytes(local))
                        whole.update(xxhash.xxh3_128_digest(block))
                        stream.write(block)
                    piece = Piece(
                        plan.storage_data, start, local.nbytes, whole.hexdigest(), block_bytes(local), rows.total
                    )
                    results.append(WriteResult(index=item.index, size_in_bytes=local.nbytes, storage_data=piece))
                    start += local.nbytes
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pieces = {result.index: result.storage_data for rank in results for result in rank}
        sums: dict[str, int] = {}
        sizes: dict[str, int] = {}
        for index, piece in pieces.items():
            sums[index.fqn] = sums.get(index.fqn, 0) + piece.row_sum
            sizes[piece.file] = max(sizes.get(piece.file, 0), piece.start + piece.bytes)
        facts: dict[str, Any] = metadata.state_dict_metadata
        data = orjson.dumps(
            {
                "format": FORMAT,
                "tensors": {
                    name: {
                        "dtype": _name_of(tensor.properties.dtype),
                        "shape": list(tensor.size),
                        "pieces": [_pack(chunk, pieces[MetadataIndex(name, chunk.offsets)]) for chunk in tensor.chunks],
                    }
                    for name, tensor in facts.items()
                },
            }
        )
        self._storage.write(f"{self._folder}/{METADATA}", data)
        sizes[METADATA] = len(data)
        self.files = [StoredFile(path=f"{self._folder}/{name}", bytes=size) for name, size in sorted(sizes.items())]
        self.metadata_sha256 = hashlib.sha256(data).hexdigest()
        self.content_sha256 = content_digest(
            {name: (tensor.size, tensor.properties.dtype, sums[name]) for name, tensor in facts.items()}
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class CheckpointReader(StorageReader):
    """Reads the pieces of a checkpoint that a load asks for; raises DamagedCheckpoint for bytes that are not as they were.

    `check=False` is for benchmarks: it reads without hashing.
    """

    def __init__(self, storage: Storage, manifest: CheckpointManifest, *, check: bool = True) -> None:
        self._storage = storage
        self._folder = parts_of(manifest)
        self._expected = manifest.metadata_sha256
        self._check = check
        self._metadata: Metadata | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Shapes and pieces of all tensors, checked and read once."""
        if self._metadata is None:
            path = f"{self._folder}/{METADATA}"
            data = self._storage.read_or_none(path)
            if data is None:
                raise DamagedCheckpoint(f"{self._storage.uri(path)}: the file is missing")
            found = hashlib.sha256(data).hexdigest()
            if found != self._expected:
                raise DamagedCheckpoint(
                    f"{self._storage.uri(path)}: sha256 is {found[:16]}..., the manifest says {self._expected[:16]}..."
                )
            stored = orjson.loads(data)
            if stored["format"] not in READABLE:
                raise ValueError(
                    f"{self._storage.uri(path)}: format {stored['format']} is of another version of this code, which knows "
                    f"{' and '.join(map(str, READABLE))}; load it with the version that wrote it"
                )
            self._metadata = _unpack(stored)
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        places: dict[MetadataIndex, Piece] = self.read_metadata().storage_data
        wanted = [(places[item.storage_index], item) for item in plan.items if _volume(item)]
        wanted.sort(key=lambda pair: (pair[0].file, pair[0].start))
        if self._storage.config.is_s3:
            self._read_ahead(wanted, planner)
        else:
            self._read_files(wanted, planner)
        done: TorchFuture[None] = TorchFuture()
        done.set_result(None)
        return done

    def read_box(self, name: str, target: Tensor, offsets: Sequence[int]) -> None:
        """Fill the contiguous `target` with the box of a stored tensor that begins at `offsets`, in the target's dtype. Raises as
        `box` does."""
        flat, at = target.view(-1), 0
        for block in self.box(name, target.shape, offsets, target.dtype):
            flat[at : at + block.numel()] = block
            at += block.numel()

    def box(self, name: str, shape: Sequence[int], offsets: Sequence[int], dtype: torch.dtype) -> Iterator[Tensor]:
        """The numbers of a box of a stored tensor from the first to the last, in vectors that are valid until
        the next one. Memory: a block of each piece at hand; on S3 `WINDOW` bytes of it.

        Raises ValueError for a tensor that is not stored or has no such box, and, at the latest after the last vector,
        DamagedCheckpoint: who uses them before that must be able to take it back.
        """
        metadata = self.read_metadata()
        facts: Any = metadata.state_dict_metadata.get(name)
        where = f"checkpoint {self._storage.uri(self._folder)}: {name}"
        ends = [start + size for start, size in zip(offsets, shape)]
        if facts is None or len(facts.size) != len(shape) or any(end > size for end, size in zip(ends, facts.size)):
            found = "is missing" if facts is None else f"has shape {list(facts.size)}"
            raise ValueError(
                f"{where} {found}, expected shape {ends} or more; use the model section that the run was trained with"
            )
        runs = list(runs_of_box(offsets, shape, [(chunk.offsets, chunk.sizes) for chunk in facts.chunks]))
        filled = sum(run.count for run in runs)
        if filled != torch.Size(shape).numel():
            raise DamagedCheckpoint(
                f"{where}: its pieces hold {filled:,} of {torch.Size(shape).numel():,} numbers of this part"
            )
        stored: torch.dtype = facts.properties.dtype
        converted = torch.empty(0, dtype=dtype)
        files: dict[str, int] = {}
        pieces: dict[int, PieceReader] = {}
        try:
            for run in runs:
                if run.piece not in pieces:
                    piece: Piece = metadata.storage_data[MetadataIndex(name, facts.chunks[run.piece].offsets)]
                    pieces[run.piece] = self._open(piece, name, files, WINDOW)
                start, stop = run.start * stored.itemsize, (run.start + run.count) * stored.itemsize
                for data in pieces[run.piece].parts(start, stop):
                    part = torch.frombuffer(data, dtype=stored)
                    if dtype != stored:
                        if len(converted) < len(part):
                            converted = torch.empty(len(part), dtype=dtype)
                        part = converted[: len(part)].copy_(part)
                    yield part
            for reader in pieces.values():
                reader.finish()
        finally:
            for number in files.values():
                os.close(number)

    def verify(self) -> Iterator[tuple[str, int, str]]:
        """Read every piece, whatever layout: (path, bytes, what is wrong or '') of each."""
        metadata = self.read_metadata()
        places: dict[MetadataIndex, Piece] = metadata.storage_data
        files: dict[str, int] = {}
        try:
            for index, piece in sorted(places.items(), key=lambda pair: (pair[1].file, pair[1].start)):
                what = ""
                try:
                    self._fill(piece, index.fqn, memoryview(bytearray(piece.bytes)), files)
                except DamagedCheckpoint as error:
                    what = str(error)
                yield f"{self._folder}/{piece.file}", piece.bytes, what
        finally:
            for number in files.values():
                os.close(number)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    # -- bytes ---------------------------------------------------------------------------------------------------

    def _read_files(self, wanted: list[tuple[Piece, ReadItem]], planner: LoadPlanner) -> None:
        """From a folder: straight into the tensor where it holds the whole piece as it is stored."""
        files: dict[str, int] = {}
        try:
            for piece, item in wanted:
                target = planner.resolve_tensor(item).detach()
                shape, dtype = self._stored(item)
                if target.is_cpu and target.dtype == dtype and target.is_contiguous() and target.nbytes == piece.bytes:
                    self._fill(piece, item.storage_index.fqn, as_bytes(target), files)
                else:
                    data = memoryview(bytearray(piece.bytes))
                    self._fill(piece, item.storage_index.fqn, data, files)
                    _copy(data, shape, dtype, item, target)
                planner.commit_tensor(item, target)
        finally:
            for number in files.values():
                os.close(number)

    def _read_ahead(self, wanted: list[tuple[Piece, ReadItem]], planner: LoadPlanner) -> None:
        """From S3: a few ranged requests at a time."""

        def fetch(piece: Piece, item: ReadItem) -> memoryview:
            data = memoryview(bytearray(piece.bytes))
            self._fill(piece, item.storage_index.fqn, data, {})
            return data

        left, running = iter(wanted), deque[tuple[ReadItem, Future[memoryview]]]()
        with ThreadPoolExecutor(PARALLEL_READS, thread_name_prefix="checkpoint-read") as threads:
            while True:
                while len(running) < PARALLEL_READS and (pair := next(left, None)) is not None:
                    running.append((pair[1], threads.submit(fetch, *pair)))
                if not running:
                    return
                item, future = running.popleft()
                target = planner.resolve_tensor(item).detach()
                _copy(future.result(), *self._stored(item), item, target)
                planner.commit_tensor(item, target)

    def _source(self, piece: Piece, files: dict[str, int], window: int) -> Read:
        path = f"{self._folder}/{piece.file}"
        try:
            if self._storage.config.is_s3:
                return _ranges(self._storage, path, piece, window)
            if piece.file not in files:
                files[piece.file] = os.open(self._storage.key(path), os.O_RDONLY)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{self._storage.uri(path)}: the file is missing") from None
        number = files[piece.file]
        return lambda start, into: os.preadv(number, [into], start)

    def _fill(self, piece: Piece, tensor: str, into: memoryview, files: dict[str, int]) -> None:
        """Read a whole piece and check it, block by block while it is in the cache."""
        self._open(piece, tensor, files, piece.bytes).into(into)

    def _open(self, piece: Piece, tensor: str, files: dict[str, int], window: int) -> PieceReader:
        """`files`: those of a folder that are open, by name; `window`: bytes that are asked for at once on S3."""
        where = f"{self._storage.uri(f'{self._folder}/{piece.file}')}: {tensor}"
        return PieceReader(piece, self._source(piece, files, window), where, check=self._check)

    def _stored(self, item: ReadItem) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of the piece that a request reads from."""
        index = item.storage_index
        facts: Any = self.read_metadata().state_dict_metadata[index.fqn]
        chunk = next(chunk for chunk in _hinted(facts.chunks, index.index) if chunk.offsets == index.offset)
        return chunk.sizes, facts.properties.dtype


def _ranges(storage: Storage, path: str, piece: Piece, window: int) -> Read:
    """Of a piece that is read from front to back, `window` bytes a request, the first one now. Raises FileNotFoundError."""

    def fetch(start: int) -> bytes:
        return storage.read_range(path, start, min(start + window, piece.start + piece.bytes))

    at, data = piece.start, fetch(piece.start) if piece.bytes else b""

    def read(start: int, into: memoryview) -> int:
        nonlocal at, data
        if start >= at + len(data):
            at, data = start, fetch(start)
        part = data[start - at : start - at + len(into)]
        into[: len(part)] = part
        return len(part)

    return read


def _hinted(chunks: list[ChunkStorageMetadata], hint: int | None) -> Iterator[ChunkStorageMetadata]:
    if hint is not None and hint < len(chunks):
        yield chunks[hint]
    yield from chunks


def _volume(item: ReadItem) -> int:
    assert item.type == LoadItemType.TENSOR, f"{item.storage_index.fqn}: a state holds tensors only"
    return torch.Size(item.lengths).numel()


def _copy(data: memoryview, shape: torch.Size, dtype: torch.dtype, item: ReadItem, target: Tensor) -> None:
    """The part of a piece that a request asks for, into the tensor that it is for."""
    part = torch.frombuffer(data, dtype=dtype).view(shape)
    for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths)):
        part = part.narrow(dim, offset, length)
    target.copy_(part)


def _pack(chunk: ChunkStorageMetadata, piece: Piece) -> list[Any]:
    return [list(chunk.offsets), list(chunk.sizes), piece.file, piece.start, piece.bytes, piece.xxh3, piece.block]


def _unpack(stored: dict[str, Any]) -> Metadata:
    tensors: dict[str, Any] = {}
    pieces: dict[MetadataIndex, Piece] = {}
    for name, facts in stored["tensors"].items():
        chunks = []
        for offsets, sizes, *place in facts["pieces"]:
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            pieces[MetadataIndex(name, offsets)] = Piece(*place)
        properties = TensorProperties(dtype=getattr(torch, facts["dtype"]))
        tensors[name] = TensorStorageMetadata(properties, torch.Size(facts["shape"]), chunks)
    return Metadata(state_dict_metadata=tensors, storage_data=pieces)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
