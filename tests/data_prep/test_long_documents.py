"""Where documents are not cut, one that fits into a row stays before one that is longer, which is left out anyway."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from data_prep import long_documents, pack_unit
from data_prep.prepare import prepare
from data_prep.records import UnitManifest
from pipeline.config.schema import RunConfig
from pipeline.storage import Storage, open_storage
from pipeline.tokenizer import Encoder
from tests.data_prep.test_prepare import packed_documents

Make = Callable[..., RunConfig]
PAIRS = 12


@pytest.mark.parametrize(
    ("looked_for", "gone"),
    [
        ("near_duplicates", {"near_duplicate": PAIRS}),
        ("duplicate_paragraphs", {"longer_than_a_row": PAIRS}),
    ],
)
def test_what_fits_stays(
    tmp_path: Path,
    run_config: Make,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    looked_for: str,
    gone: dict[str, int],
) -> None:
    """Pairs of a text and the same with four words of 800 letters more, in a paragraph of their own; of half of them the long one is in
    the source that comes first."""
    rng = Random(0)
    words = sorted({word for text in texts[:20] for word in text.split() if word.isalpha()})
    short = [" ".join(rng.choices(words, k=80)) for _ in range(PAIRS)]
    long = [f"{text}\n\n{' '.join(''.join(rng.choices('abcdefghij', k=800)) for _ in range(4))}" for text in short]
    for source, mine in (("first", (short[::2], long[1::2])), ("second", (long[::2], short[1::2]))):
        (tmp_path / source).mkdir()
        lines = [json.dumps({"text": text}) for part in mine for text in part]
        (tmp_path / source / "a.jsonl").write_text("\n".join(lines))
    corpus: dict[str, Any] = {
        "sources": [{"name": source, "path": str(tmp_path / source)} for source in ("first", "second")],
        "heldout_fraction": 0.0,
        looked_for: {},
    }
    config = run_config("unused", corpus=json.dumps(corpus), data__packing="whole", data__rows_per_group=1)
    storage, read, opened, open_ = open_storage(config.storage), list[str](), list[str](), Storage.open

    def windows(storage: Storage, unit: UnitManifest, dtype: Any) -> Iterator[Any]:
        read.append(unit.source)
        return pack_unit.windows(storage, unit, dtype)

    def opening(storage: Storage, path: str) -> Any:
        opened.append(path)
        return open_(storage, path)

    monkeypatch.setattr(long_documents, "windows", windows)
    monkeypatch.setattr(Storage, "open", opening)
    dataset = prepare(config, storage)
    encoder = Encoder.stored(dataset.tokenizer, storage)
    trained = [encoder.decode(document[:-1]) for document in packed_documents(storage, dataset)]
    assert sorted(trained) == sorted(short)
    filtered = [source.counts.filtered for source in dataset.sources]
    assert {key: sum(each.get(key, 0) for each in filtered) for key in gone} == gone

    (tmp_path / "second" / "b.jsonl").write_text(json.dumps({"text": " ".join(rng.choices(words, k=80))}))
    prepare(config, storage)
    assert read == ["first", "second", "second"]  # old units are not read again
    if looked_for == "near_duplicates":  # in one task for the whole corpus: not a request, of 50 MB on S3, a unit
        assert not [path for path in opened if "/long-" in path]
