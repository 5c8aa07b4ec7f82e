"""Paragraphs and lines of several documents: against plain dictionaries over all texts, whatever the order of arrival."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import hash_sorted
from data_prep.paragraphs.parts import PART, Parts, parts, without
from data_prep.prepare import prepare
from data_prep.tokenize_unit import document_hash
from pipeline.config.schema import DuplicateParagraphs, RunConfig
from pipeline.dataset.verify import verify
from pipeline.file_index import open_index
from pipeline.integrity import DamagedFile
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage, open_storage
from pipeline.tokenizer import Encoder
from tests.data_prep.sources import write_in_three
from tests.data_prep.test_prepare import objects, packed_documents

Make = Callable[..., RunConfig]
TEXT = st.text(st.sampled_from("ab \t\n\r\u2028é"), max_size=40)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(TEXT, st.sampled_from(["paragraph", "line"]), st.integers(1, 4))
def test_parts(text: str, by: str, least: int) -> None:
    wanted = DuplicateParagraphs(by=by, min_characters=least)  # type: ignore[arg-type]
    found = parts(text, wanted)
    assert all(part == part.strip() and len(part) >= least for _, part in found)
    assert without(text, [], wanted) == text.strip()
    every = [number for number, _ in parts(text, wanted.model_copy(update={"min_characters": 1}))]
    assert without(text, every, wanted) == ""
    for number, part in found:
        rest = parts(without(text, [number], wanted), wanted)
        others = [other for place, other in found if place != number]
        assert [other for _, other in rest] == others, part


def test_the_file_of_a_unit(tmp_path: Path) -> None:
    wanted = DuplicateParagraphs(min_characters=3)
    texts = [f"one {n % 7} two\n \nthree {n}\n\nab\n\nfour".encode() for n in range(60)]
    made = Parts(wanted)
    for start in (0, 20, 40):
        made.add(texts[start : start + 20], [document_hash(text) for text in texts[start : start + 20]])
    storage = open_storage(RunConfig.model_fields["storage"].default.model_copy(update={"root": str(tmp_path)}))
    data = bytearray(made.to_bytes())
    storage.write("a.parts", bytes(data))
    records = hash_sorted.read(storage, "a.parts", PART)
    assert sorted(zip(records["ordinal"].tolist(), records["number"].tolist())) == [
        (n, k) for n in range(60) for k in (0, 1, 3)
    ]
    equal = Counter(records["hash"].tolist())
    assert sorted(equal.values()) == sorted([1] * 60 + [9] * 4 + [8] * 3 + [60])
    for place in range(0, len(data), len(data) // 53):
        data[place] ^= 1
        storage.write("a.parts", bytes(data))
        with pytest.raises(DamagedFile):
            hash_sorted.read(storage, "a.parts", PART)
        data[place] ^= 1


def corpus(folder: Path, by: str) -> dict[str, list[str]]:
    """Two sources of documents of a few parts each, most of them of one document, some of many; copies, near-duplicates."""
    rng, between = Random(5), {"paragraph": "\n\n", "line": "\n"}[by]
    words = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(3000)]

    def part() -> str:
        return " ".join(rng.choices(words, k=14))

    common = [part() for _ in range(12)]
    made = {}
    for name in ("web", "other"):
        documents = [
            between.join(rng.choice(common) if rng.random() < 0.4 else part() for _ in range(rng.randint(1, 5)))
            for _ in range(40)
        ]
        documents += [common[0], common[1] + between + common[2], between.join([common[3], "short", common[3]])]
        long = between.join(part() for _ in range(6))
        documents += [long, long + " and more", documents[4], long + between + common[5]]
        made[name] = documents
        write_in_three(folder, name, documents)
    return made


def paragraph_config(
    folder: Path, root: Path, run_config: Make, by: str, heldout: float = 0.0, **more: str
) -> RunConfig:
    sources = [
        {"name": name, "path": str(folder / name), "id_field": "id", "max_epochs": 1e3} for name in ("web", "other")
    ]
    section = {
        "sources": sources,
        "unit_bytes": 6000,
        "heldout_fraction": heldout,
        "near_duplicates": {},
        "keep_rejected": True,
    }
    section["duplicate_paragraphs"] = {"by": by, "min_characters": 40}
    options = {
        "storage__root": str(root),
        "corpus": json.dumps(section),
        "tokenizer": json.dumps({"vocab_size": 400, "training_bytes": 20000}),
        "model__vocab_size": "400",
        "data__packing": "concat",
        "data__rows_per_group": "1",  # no rest is dropped
        **more,
    }
    return run_config(folder, **options)


def trained_on(config: RunConfig, storage: Storage, dataset: DatasetManifest) -> list[str]:
    """The texts of all documents in packed rows (concat: a document's pieces follow each other)."""
    encoder = Encoder.stored(dataset.tokenizer, storage)
    texts, waiting = [], list[int]()
    for piece in packed_documents(storage, dataset):
        waiting += piece
        while encoder.eos_id in waiting:
            end = waiting.index(encoder.eos_id)
            texts.append(encoder.decode(waiting[:end]))
            assert waiting[:end] == encoder.check(texts[-1].encode()).tolist()  # the ids of the text that is left
            waiting = waiting[end + 1 :]
    return sorted(texts)


def expected(
    made: dict[str, list[str]], gone: set[tuple[str, int]], heldout: set[tuple[str, int]], by: str
) -> list[str]:
    """By dictionaries: `gone` are copies and near-duplicates."""
    wanted = DuplicateParagraphs(by=by, min_characters=40)  # type: ignore[arg-type]
    keeper: dict[str, tuple[int, int, str, int]] = {}
    ranked = {}
    for rank, (name, texts) in enumerate(made.items()):
        for number, text in enumerate(texts):
            if (name, number) not in gone:
                key = (
                    -1 if (name, number) in heldout else rank,
                    int.from_bytes(document_hash(text.encode())[:8], "big"),
                    name,
                    number,
                )
                ranked[name, number] = key
                for _, part in parts(text, wanted):
                    keeper[part] = min(keeper.get(part, key), key)
    left = []
    for (name, number), key in ranked.items():
        if (name, number) not in heldout:
            text = made[name][number]
            going = [place for place, part in parts(text, wanted) if keeper[part] != key]
            left.append(without(text, going, wanted) if going else text)
    return sorted(text for text in left if text)


def left_out(storage: Storage, dataset: DatasetManifest) -> dict[tuple[str, int], str]:
    found = {}
    for files in open_index(storage, dataset).rejected:
        for file in files:
            table = pq.read_table(storage.open(file.path)).to_pydict()
            for doc_id, reason in zip(table["doc_id"], table["reason"]):
                name, number = doc_id.rsplit("-", 1)
                found[name, int(number)] = reason
    return found


@pytest.mark.parametrize(("by", "heldout"), [("paragraph", 0.0), ("line", 0.25)])
def test_one_document_keeps_a_part_whatever_the_order_of_arrival(
    tmp_path: Path, run_config: Make, by: str, heldout: float
) -> None:
    made = corpus(tmp_path / "all", by)
    whole = paragraph_config(tmp_path / "all", tmp_path / "root-all", run_config, by, heldout)
    storage = open_storage(whole.storage)
    dataset = prepare(whole, storage)
    reasons = left_out(storage, dataset)
    gone = {key for key, reason in reasons.items() if reason != "duplicate_paragraphs"}
    held = set()
    for source in dataset.sources:
        for file in source.heldout:
            ids = pq.read_table(storage.open(file.path))["doc_id"].to_pylist()
            held |= {(name, int(number)) for name, number in (doc_id.rsplit("-", 1) for doc_id in ids)}
    assert bool(held) is (heldout > 0)
    texts = trained_on(whole, storage, dataset)
    assert texts == expected(made, gone, held, by)
    counts = Counter(
        part
        for text in texts
        for part in {part for _, part in parts(text, DuplicateParagraphs(by=by, min_characters=40))}
    )  # type: ignore[arg-type]
    assert max(counts.values()) == 1
    emptied = sum(source.counts.filtered.get("duplicate_paragraphs", 0) for source in dataset.sources)
    assert emptied == sum(reason == "duplicate_paragraphs" for reason in reasons.values()) > 0
    assert all(source.changes[f"duplicate_paragraphs.{by}s"] > 5 for source in dataset.sources)
    assert sum(source.text_bytes for source in dataset.sources) == sum(len(text.encode()) for text in texts)
    assert verify(dataset, storage).findings == ()
    if heldout:
        return  # which documents are held out depends on what came first
    folder, config = tmp_path / "grown", paragraph_config(tmp_path / "grown", tmp_path / "root-grown", run_config, by)
    before: set[tuple[str, str]] = set()
    for number in (2, 0, 1):
        for name in ("web", "other"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "all" / name / f"{number}.jsonl", folder / name)
        grown = open_storage(config.storage)
        later = prepare(config, grown)
        now = {(entry.path, entry.etag) for entry in grown.list("datasets/units")}
        assert before <= now, "an old unit was touched"
        before = now
    assert trained_on(config, grown, later) == texts
    again = open_storage(paragraph_config(folder, tmp_path / "root-again", run_config, by).storage)
    assert objects(again) == {}


def test_without_it_nothing_changes(tmp_path: Path, run_config: Make) -> None:
    corpus(tmp_path / "all", "line")
    config = paragraph_config(tmp_path / "all", tmp_path / "root", run_config, "line")
    plain = config.model_copy(update={"corpus": config.corpus.model_copy(update={"duplicate_paragraphs": None})})
    storage = open_storage(plain.storage)
    dataset = prepare(plain, storage)
    assert not any(entry.path.endswith(".parts") for entry in storage.list("datasets"))
    assert all(
        not source.changes and "duplicate_paragraphs" not in source.counts.filtered for source in dataset.sources
    )
