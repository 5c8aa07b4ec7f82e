"""Near-duplicates: the banding curve, clusters against a plain union-find, who stays, and that the order of arrival does not matter."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.near.components import root, unite
from data_prep.near.file import RECORD, Signatures, read_band, read_documents
from data_prep.near.look import cluster_lines
from data_prep.near.signatures import bands, normalised, word_hashes
from data_prep.prepare import prepare
from data_prep.tokenize_unit import document_hash
from pipeline.config.near import NearDuplicates
from pipeline.config.schema import RunConfig
from pipeline.dataset.verify import verify
from pipeline.file_index import open_index
from pipeline.integrity import DamagedFile
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage, open_storage
from tests.data_prep.sources import write_in_three

Make = Callable[..., RunConfig]
VOCABULARY = ["".join(Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=7)) for n in range(4000)]


def words(seed: int, count: int = 300) -> list[str]:
    rng = Random(seed)
    return [VOCABULARY[int(rng.random() * len(VOCABULARY))] for _ in range(count)]


def pair(seed: int, similarity: float, count: int = 300) -> tuple[str, str]:
    """Two documents of whose 5-grams that share are common: they begin alike and go on differently."""
    first, other = words(2 * seed, count), words(2 * seed + 1, count)
    common = round(2 * (count - 4) * similarity / (1 + similarity)) + 4
    return " ".join(first), " ".join(first[:common] + other[common:])


@pytest.mark.parametrize("similarity", [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_pairs_are_found_as_often_as_the_banding_says(similarity: float) -> None:
    """1 - (1 - s^8)^14, within four standard errors of 500 pairs."""
    pairs = [pair(seed, similarity) for seed in range(500)]
    first, other = (bands(side, NearDuplicates()).hashes for side in zip(*pairs))
    found = (first == other).any(axis=1).mean()
    expected = 1 - (1 - similarity**8) ** 14
    assert abs(found - expected) <= 4 * (max(expected * (1 - expected), 1e-3) / 500) ** 0.5


def test_normalisation() -> None:
    same = [
        "The café on 21 May, 2024, cost 3.14 euros -- naïve!",
        "the CAFÉ on 9 may 1 cost 2.7 EUROS; naive",
        "THE CAFE on 0 May. 12345 cost 0 0 euros (Naïve)",
    ]
    hashes, first = word_hashes(same)
    assert len(set(map(tuple, (hashes[start:stop] for start, stop in pairwise(first))))) == 1
    assert normalised("漢字kana").decode().split() == ["漢", "字", "kana"]
    assert bands(["one two three four", "", "..."], NearDuplicates()).documents.tolist() == []
    assert bands(["", "one two three four five", "ab"], NearDuplicates()).documents.tolist() == [1]


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=8))
def test_a_document_has_the_same_bands_whatever_it_is_with(texts: list[str]) -> None:
    few = NearDuplicates(n_gram=2, bands=3, rows_per_band=2)
    together = bands(texts, few)
    alone = {number: bands([text], few).hashes for number, text in enumerate(texts)}
    assert together.documents.tolist() == [number for number, found in alone.items() if len(found)]
    for number, found in zip(together.documents.tolist(), together.hashes):
        assert np.array_equal(found, alone[number][0])


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60), st.integers(1, 7))
def test_components_against_a_plain_search(edges: list[tuple[int, int]], chunk: int) -> None:
    parent = np.arange(30, dtype=np.uint32)
    for start in range(0, len(edges), chunk):
        part = np.array(edges[start : start + chunk], np.uint32)
        unite(parent, part[:, 0], part[:, 1])
    found = root(parent, np.arange(30, dtype=np.uint32)).tolist()
    label = list(range(30))
    for _ in range(30):
        for a, b in edges:
            label[a] = label[b] = min(label[a], label[b])
    assert found == label


def test_the_file_of_signatures(tmp_path: Path) -> None:
    few = NearDuplicates(n_gram=3, bands=4, rows_per_band=2)
    texts = [" ".join(words(seed, 20)).encode() for seed in range(50)] + [b"too short"]
    made = Signatures(few)
    for start in range(0, 51, 17):
        part = texts[start : start + 17]
        made.add(part, [document_hash(text) for text in part])
    storage = open_storage(RunConfig.model_fields["storage"].default.model_copy(update={"root": str(tmp_path)}))
    storage.write("a.bands", made.to_bytes())
    expected = bands([text.decode() for text in texts], few)
    for band in range(4):
        records = np.concatenate([read_band(storage, "a.bands", band, low, low + 64) for low in range(0, 256, 64)])
        assert records.dtype == RECORD
        assert (np.diff(records["hash"].astype(object)) >= 0).all()
        assert dict(zip(records["ordinal"].tolist(), records["hash"].tolist())) == dict(
            zip(expected.documents.tolist(), expected.hashes[:, band].tolist())
        )
    documents = read_documents(storage, "a.bands")
    assert documents["bytes"].tolist() == list(map(len, texts))
    assert documents["hash"].tolist() == [int.from_bytes(document_hash(text)[:8], "big") for text in texts]
    data = bytearray(made.to_bytes())
    for place in range(0, len(data), len(data) // 97):
        data[place] ^= 1
        storage.write("a.bands", bytes(data))
        with pytest.raises(DamagedFile):
            _read_all(storage)
        data[place] ^= 1


def _read_all(storage: Storage) -> None:
    read_documents(storage, "a.bands")
    for band in range(4):
        read_band(storage, "a.bands", band)


def corpus(folder: Path) -> dict[str, list[str]]:
    """Two sources; a cluster over both, one within each, documents that only look alike, and exact copies."""
    other, web = (
        [" ".join(words(seed, 120)) for seed in range(30)],
        [" ".join(words(seed, 120)) for seed in range(100, 130)],
    )
    web.append(other[3] + " and more words at the end of it")  # of the source that is named first, so it stays
    web += [web[5] + " longer", web[5], web[5] + " longest of them"]
    other += [other[7] + " again", web[9]]
    near, far = pair(77, 0.97, 120)
    other += [near, far]
    texts = {"web": web, "other": other}
    for name, documents in texts.items():
        write_in_three(folder, name, documents)
    return texts


def near_config(folder: Path, root: Path, run_config: Make, **more: str) -> RunConfig:
    sources = [{"name": name, "path": str(folder / name), "id_field": "id"} for name in ("web", "other")]
    options = {
        "storage__root": str(root),
        "corpus": json.dumps({"sources": sources, "unit_bytes": 8000, "heldout_fraction": 0.0, "near_duplicates": {}}),
        "tokenizer": json.dumps({"vocab_size": 400, "training_bytes": 20000}),
        "model__vocab_size": "400",
        **more,
    }
    return run_config(folder, **options)


def kept(storage: Storage, dataset: DatasetManifest) -> dict[str, int]:
    """Of every source how many documents are packed; names of those that were left out, by reason."""
    found: Counter[str] = Counter()
    for files in open_index(storage, dataset).rejected:
        for file in files:
            table = pq.read_table(storage.open(file.path)).to_pydict()
            found.update(f"{doc_id} {reason}" for doc_id, reason in zip(table["doc_id"], table["reason"]))
    return dict(found)


def test_one_of_each_cluster_stays_whatever_the_order_of_arrival(tmp_path: Path, run_config: Make) -> None:
    corpus(tmp_path / "all")
    whole = near_config(tmp_path / "all", tmp_path / "root-all", run_config, corpus__keep_rejected="true")
    storage = open_storage(whole.storage)
    dataset = prepare(whole, storage)
    expected = {
        "web-5 near_duplicate": 1,  # the longest of four stays
        "web-31 near_duplicate": 1,
        "web-32 exact_duplicate": 1,
        "other-3 near_duplicate": 1,  # web's is shorter or longer, but web is named first
        "other-7 near_duplicate": 1,
        "other-31 near_duplicate": 1,  # a copy of web's
        "other-32 near_duplicate": 1,
    }
    found = kept(storage, dataset)
    last = next(name for name in found if name.startswith(("other-32", "other-33")))  # of equal length, by hash
    assert found == {**{name: 1 for name in expected if name != "other-32 near_duplicate"}, last: 1}
    near = dataset.near_duplicates
    assert near is not None
    assert (near.count, near.dropped) == (5, 7)
    assert verify(dataset, storage).findings == ()
    lines = list(cluster_lines(dataset, storage))
    assert lines[:4] == [
        "5 clusters; 7 of 68 documents go, copies among them",
        "  4 of 2 documents",
        "  1 of 3 to 4",
        "4 documents; web web-33 stays, without it",
    ]
    assert sorted(lines[4:7]) == ["    web web-31", "    web web-32", "    web web-5"]
    for order in ((2, 1, 0),):  # files come one after the other
        folder, root_ = tmp_path / f"grown-{order[0]}", tmp_path / f"root-{order[0]}"
        config = near_config(folder, root_, run_config, corpus__keep_rejected="true")
        before: set[str] = set()
        for part in order:
            for name in ("web", "other"):
                (folder / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(tmp_path / "all" / name / f"{part}.jsonl", folder / name)
            grown = open_storage(config.storage)
            dataset = prepare(config, grown)
            now = {entry.path: entry.etag for entry in grown.list("datasets/units")}
            assert before <= set(now.items()), "an old unit was touched"
            before = set(now.items())
        assert {name.split()[0] for name in kept(grown, dataset)} == {name.split()[0] for name in found}
        assert dataset.near_duplicates is not None
        assert dataset.near_duplicates.dropped == near.dropped


CLUSTERS = (
    {"web-30", "other-3"},
    {"web-5", "web-31", "web-32", "web-33"},
    {"other-7", "other-30"},
    {"web-9", "other-31"},
    {"other-32", "other-33"},
)


def test_nothing_like_a_held_out_document_is_trained_on(tmp_path: Path, run_config: Make) -> None:
    texts = corpus(tmp_path / "all")
    config = near_config(tmp_path / "all", tmp_path / "root", run_config)
    shares = {"heldout_fraction": 0.3, "heldout_max_documents": 100, "keep_rejected": True}
    config = config.model_copy(update={"corpus": config.corpus.model_copy(update=shares)})
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    left_out = {name.split()[0] for name in kept(storage, dataset)}
    held = {
        doc_id
        for source in dataset.sources
        for file in source.heldout
        for doc_id in pq.read_table(storage.open(file.path))["doc_id"].to_pylist()
    }
    assert any(cluster & held for cluster in CLUSTERS)
    assert any(not cluster & held for cluster in CLUSTERS)
    for cluster in CLUSTERS:
        trained_on = cluster - held - left_out
        assert len(trained_on) == (0 if cluster & held else 1)
    assert sum(source.counts.docs_out for source in dataset.sources) == sum(map(len, texts.values())) - len(
        held | left_out
    )
