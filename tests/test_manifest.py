"""Digests depend on the thing alone; records read back as they were written."""

from __future__ import annotations

import hashlib
import json
import math
import random
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.manifest import (
    CheckpointManifest,
    DamagedRecord,
    DocumentCounts,
    FileEntry,
    Record,
    StoredFile,
    TrainManifest,
    canonical_json,
    digest_of,
)

FILE = FileEntry(path="a/b", bytes=3, sha256="0" * 64)
CHECKPOINT = CheckpointManifest(
    run_id="debug",
    run_identity="1" * 64,
    step=40,
    next_sequence=640,
    tokens_seen=327680,
    dataset_digest="2" * 64,
    order_digest="3" * 64,
    content_sha256="4" * 64,
    files=(StoredFile(path="a/b", bytes=3),),
    metadata_sha256="6" * 64,
    loss=5.25,
    world_size=2,
)
TRAIN = TrainManifest(identity="5" * 64, checkpoint=CHECKPOINT, steps=40, metrics=(FILE,), skipped_steps=0)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(list(value))}
    return [reversed_keys(inner) for inner in value] if isinstance(value, list) else value


@given(JSON)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_canonical_json_depends_on_the_value_alone(value: Any) -> None:
    data = canonical_json(value)
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data
    assert canonical_json(reversed_keys(value)) == data
    assert digest_of(value) == hashlib.sha256(data).hexdigest()


def test_digests_never_change() -> None:
    """Literal bytes and digests: identities in storage were made by this rule. sha256sum is the oracle."""
    data = '{"a":[1,2.5,null],"月":"é\\n"}'.encode()
    assert canonical_json({"月": "é\n", "a": (1, 2.5, None)}) == data
    assert digest_of({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    assert digest_of({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert FILE.digest == digest_of({"sha256": "0" * 64, "bytes": 3, "path": "a/b"}) == digest_of(FILE)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_has_no_json_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": [value]})
    broken = CHECKPOINT.model_copy(update={"loss": value})
    with pytest.raises(ValueError, match="not JSON compliant"):
        _ = broken.digest
    with pytest.raises(ValueError, match="not JSON compliant"):
        broken.to_json()


def test_volatile_fields_are_not_in_the_digest() -> None:
    moved = CHECKPOINT.model_copy(update={"files": (), "world_size": 64, "metrics": (FILE,), "fence": 7})
    assert moved.digest == CHECKPOINT.digest
    assert moved != CHECKPOINT
    assert TRAIN.model_copy(update={"checkpoint": moved}).digest == TRAIN.digest  # nor in that of what holds them
    for name in CheckpointManifest.model_fields.keys() - CheckpointManifest.VOLATILE:
        value = getattr(CHECKPOINT, name)
        other = f"{value}x" if isinstance(value, str) else (*value, 1) if isinstance(value, tuple) else value + 1
        assert CHECKPOINT.model_copy(update={name: other}).digest != CHECKPOINT.digest, name


def test_volatile_fields_within_dictionaries() -> None:
    class Inner(Record):
        VOLATILE: ClassVar[frozenset[str]] = frozenset({"seconds"})
        value: int
        seconds: float

    class Outer(Record):
        inner: dict[str, tuple[Inner, ...]]

    def outer(seconds: float) -> Outer:
        return Outer(inner={"a": (Inner(value=1, seconds=seconds),)})

    assert outer(1.0).digest == outer(2.0).digest == digest_of({"inner": {"a": [{"value": 1}]}})


def test_round_trip() -> None:
    for record in (FILE, CHECKPOINT, TRAIN):
        data = record.to_json()
        again = type(record).model_validate_json(data)
        assert again == record
        assert (again.digest, again.to_json()) == (record.digest, data)
        assert data.endswith(b"}\n")


def test_records_are_closed_and_frozen() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        FileEntry.model_validate({**FILE.model_dump(), "mtime": 3})
    with pytest.raises(ValidationError, match="Field required"):
        FileEntry.model_validate({"path": "a"})
    with pytest.raises(ValidationError, match="frozen"):
        FILE.path = "b"  # type: ignore[misc]


def test_document_counts_balance() -> None:
    counts = DocumentCounts(docs_in=10, docs_out=4, heldout=1, filtered={"a": 2}, quarantined={"b": 1, "c": 2})
    assert counts.balanced()
    assert not counts.model_copy(update={"docs_in": 11}).balanced()


def test_every_flip_that_changes_a_record_is_named() -> None:
    """300 single-bit flips of the stored bytes; in white space between fields one may change nothing."""
    data, rng = TRAIN.to_json(), random.Random(0)
    named = 0
    for bit in rng.sample(range(8 * len(data)), 300):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert TrainManifest.parse(bytes(flipped), "runs/x/manifest.json") == TRAIN
        except DamagedRecord as error:
            named += str(error).startswith("runs/x/manifest.json: not a sound TrainManifest (")
        else:
            assert data[bit // 8 : bit // 8 + 1].isspace()
            named += 1
    assert named == 300


def test_a_torn_record_is_named() -> None:
    data = TRAIN.to_json()
    for length in range(len(data) - 1):
        with pytest.raises(DamagedRecord, match=r"^a/b: not a sound TrainManifest"):
            TrainManifest.parse(data[:length], "a/b")


def test_a_record_edited_by_hand_has_no_digest_of_its_own() -> None:
    lines = [line for line in FILE.to_json().splitlines() if b"record_sha256" not in line]
    assert FileEntry.parse(b"\n".join(lines).replace(b'"bytes": 3', b'"bytes": 4'), "x").bytes == 4
