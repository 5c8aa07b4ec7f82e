"""The file of a unit's signatures, beside its documents: of every band the documents sorted by hash, and what decides who stays.

Little-endian, in this order: the number of bands (uint32) and of documents (uint32); of each band 257 uint32, the first record of each
leading byte of the hash, then the count; 256 uint64, xxh3 of the records of each leading byte; xxh3 of all that; of each document, by
its number, DOCUMENT; xxh3 of these; RECORD by band and hash.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.hash_sorted import MEND, by_leading_byte, changed
from data_prep.near.signatures import bands
from pipeline.config.near import NearDuplicates
from pipeline.integrity import DamagedFile
from pipeline.storage import Storage

RECORD = np.dtype([("hash", "<u8"), ("ordinal", "<u4")])
DOCUMENT = np.dtype([("hash", "<u8"), ("bytes", "<u8")])  # leading half of the document's hash, size of its text
BAND = np.dtype([("first", "<u4", 257), ("xxh3", "<u8", 256)])


class Signatures:
    """What accumulates while a unit is read."""

    def __init__(self, settings: NearDuplicates) -> None:
        self._settings = settings
        self._ordinals = [np.zeros(0, np.int64)]
        self._hashes = [np.zeros((0, settings.bands), np.uint64)]
        self._documents: list[NDArray[np.void]] = []
        self._count = 0

    def add(self, texts: Sequence[bytes], hashes: Sequence[bytes]) -> None:
        """The next documents, and their hashes (tokenize_unit.document_hash)."""
        found = bands([text.decode() for text in texts], self._settings)
        self._ordinals.append(found.documents + self._count)
        self._hashes.append(found.hashes)
        documents = np.empty(len(texts), DOCUMENT)
        documents["hash"] = np.frombuffer(b"".join(hashes), ">u8")[::2]
        documents["bytes"] = list(map(len, texts))
        self._documents.append(documents)
        self._count += len(texts)

    def to_bytes(self) -> bytes:
        ordinals, hashes = np.concatenate(self._ordinals), np.concatenate(self._hashes)
        heads, records = np.empty(self._settings.bands, BAND), list[bytes]()
        for number, band in enumerate(hashes.T):
            order = np.argsort(band, kind="stable")
            sorted_ = np.empty(len(order), RECORD)
            sorted_["hash"], sorted_["ordinal"] = band[order], ordinals[order]
            heads[number] = by_leading_byte(sorted_, sorted_["hash"])
            records.append(sorted_.tobytes())
        head = np.array([self._settings.bands, self._count], "<u4").tobytes() + heads.tobytes()
        documents = np.concatenate(self._documents).tobytes()
        return b"".join([head, _digest(head), documents, _digest(documents), *records])


def _digest(data: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")


def read_documents(storage: Storage, path: str) -> NDArray[np.void]:
    """DOCUMENT of each. Raises DamagedFile."""
    with storage.open(path) as file:
        counts = np.frombuffer(file.read(8), "<u4")
        bands, documents = (int(count) for count in counts) if len(counts) == 2 else (0, 0)
        file.seek(8 + bands * BAND.itemsize + 8)
        data = file.read(documents * DOCUMENT.itemsize)
        digest = file.read(8)
    if not bands or _digest(data) != digest:
        raise DamagedFile(f"{storage.uri(path)}: its table of documents is torn or changed; {MEND}")
    return np.frombuffer(data, DOCUMENT)


def read_band(storage: Storage, path: str, band: int, low: int = 0, high: int = 256) -> NDArray[np.void]:
    """RECORDs of a band whose leading hash byte is in [low, high). Raises DamagedFile."""
    with storage.open(path) as file:
        start = file.read(8)
        counts = np.frombuffer(start, "<u4")
        bands, documents = (int(count) for count in counts) if len(counts) == 2 else (0, 0)
        data = file.read(bands * BAND.itemsize)
        if band >= bands or _digest(start + data) != file.read(8):
            raise DamagedFile(f"{storage.uri(path)}: its head is torn or changed; {MEND}")
        heads = np.frombuffer(data, BAND)
        first = heads[band]["first"].tolist()
        before = 8 + len(data) + 8 + documents * DOCUMENT.itemsize + 8
        before += int(heads["first"][:band, 256].sum()) * RECORD.itemsize
        file.seek(before + first[low] * RECORD.itemsize)
        data = file.read((first[high] - first[low]) * RECORD.itemsize)
    if (byte := changed(data, RECORD.itemsize, first, heads[band]["xxh3"], low, high)) is not None:
        raise DamagedFile(f"{storage.uri(path)}: band {band}, leading byte {byte:02x}: torn or changed; {MEND}")
    return np.frombuffer(data, RECORD)
