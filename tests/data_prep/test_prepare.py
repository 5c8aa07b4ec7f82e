"""The whole of prepare: what the dataset holds, that it is the same everywhere and after everything, and what is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from data_prep.identity import identity, list_corpus
from data_prep.listing import list_source
from data_prep.mapping import map_in_process, map_on_ray
from data_prep.prepare import prepare
from data_prep.records import PrepareProgress, UnitManifest, lease_path
from data_prep.tokenizer_stage import ensure_tokenizer
from data_prep.units import unpacked
from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.file_index import dataset_path, open_index
from pipeline.lease import Held, Lease, LeaseLost, give_way, hold
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage, filesystem, open_storage
from pipeline.tokenizer import Encoder
from pipeline.tokenizer.engines import Gigatoken

Make = Callable[..., RunConfig]


def objects(storage: Storage) -> dict[str, str]:
    """Every object and the sha256 of its content, but for who wrote it."""
    entries = [entry for entry in storage.list("") if not entry.path.endswith("/writer.json")]
    return {entry.path: hashlib.sha256(storage.read(entry.path)).hexdigest() for entry in entries}


def packed_documents(storage: Storage, dataset: DatasetManifest) -> list[list[int]]:
    """The pieces of all rows, read with pyarrow alone."""
    pieces = []
    for files in open_index(storage, dataset).packed:
        for entry in files:
            with storage.open(entry.path) as file:
                table = pq.read_table(file)
            for tokens, doc_lens in zip(table["tokens"].to_pylist(), table["doc_lens"].to_pylist()):
                row = np.frombuffer(tokens, dataset.token_dtype)
                assert len(row) == dataset.sequence_length
                assert sum(doc_lens) <= len(row)
                assert (row[sum(doc_lens) :] == dataset.tokenizer.eos_id).all()
                start = 0
                for length in doc_lens:
                    pieces.append(row[start : start + length].tolist())
                    start += length
    return pieces


def heldout_documents(storage: Storage, dataset: DatasetManifest) -> list[tuple[str, int, list[int]]]:
    found = []
    for source in dataset.sources:
        for entry in source.heldout:
            with storage.open(entry.path) as file:
                table = pq.read_table(file).to_pydict()
            ids = [np.frombuffer(tokens, dataset.token_dtype).tolist() for tokens in table["tokens"]]
            found += list(zip(table["doc_id"], table["n_bytes"], ids))
    return found


def test_every_document_is_trained_on_or_held_out(jsonl: Path, texts: list[str], run_config: Make) -> None:
    """Tokens are those of Hugging Face's encoder on the committed tokenizer.json; a row longer than all documents holds each whole."""
    config = run_config(jsonl, data__sequence_length=32768, data__rows_per_group=1, data__packing="pad")
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    oracle = Tokenizer.from_str(storage.read(f"{dataset.tokenizer.folder}/tokenizer.json").decode())
    expected = {tuple(oracle.encode(text, add_special_tokens=False).ids): text for text in texts}
    heldout = heldout_documents(storage, dataset)
    trained = packed_documents(storage, dataset)
    eos = dataset.tokenizer.eos_id
    assert all(piece[-1] == eos for piece in trained)
    found = [tuple(piece[:-1]) for piece in trained] + [tuple(ids) for _, _, ids in heldout]
    assert Counter(found) == Counter(expected.keys())
    assert all(len(expected[tuple(ids)].encode()) == n_bytes for _, n_bytes, ids in heldout)
    counts = dataset.sources[0].counts
    assert (counts.docs_in, counts.docs_out, counts.heldout) == (120, 120 - len(heldout), len(heldout))
    assert 0 < len(heldout) <= 5
    assert dataset.sources[0].tokens == sum(map(len, trained))
    assert dataset.sources[0].text_bytes == sum(len(t.encode()) for t in texts) - sum(n for _, n, _ in heldout)
    assert dataset.token_dtype == "uint16"


def test_files_have_the_layout(jsonl: Path, run_config: Make) -> None:
    config = run_config(jsonl)
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    source = dataset.sources[0]
    packed = open_index(storage, dataset).packed[0]
    assert source.rows == sum(entry.rows for entry in packed) > 100
    for entry in packed:
        data = storage.read(entry.path)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256)
        with storage.open(entry.path) as file:
            parquet = pq.ParquetFile(file)
            groups = [parquet.metadata.row_group(group) for group in range(parquet.metadata.num_row_groups)]
            assert {group.num_rows for group in groups} == {4}
            assert len(groups) <= 8
            assert sum(group.num_rows for group in groups) == entry.rows
            assert entry.tokens == sum(map(sum, parquet.read(["doc_lens"])["doc_lens"].to_pylist()))
            tokens = groups[0].column(0)
            assert (tokens.path_in_schema, tokens.physical_type) == ("tokens", "FIXED_LEN_BYTE_ARRAY")
            assert (tokens.compression, tokens.is_stats_set, tokens.has_dictionary_page) == ("ZSTD", False, False)
            assert str(parquet.schema_arrow.field("tokens").type) == "fixed_size_binary[1024]"


def test_less_than_one_group_is_dropped(jsonl: Path, texts: list[str], run_config: Make) -> None:
    """Each of the units has rows short of a group; together they lose fewer than one group's."""
    config = run_config(jsonl, data__rows_per_group=16, data__packing="pad")
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    source = dataset.sources[0]
    assert len(storage.list("datasets/packs")) > 4
    assert source.dropped_rows < 16
    oracle = Tokenizer.from_str(storage.read(f"{dataset.tokenizer.folder}/tokenizer.json").decode())
    lengths = [len(oracle.encode(text, add_special_tokens=False).ids) + 1 for text in texts]
    lengths = list(
        (Counter(lengths) - Counter(len(ids) + 1 for _, _, ids in heldout_documents(storage, dataset))).elements()
    )
    assert source.rows + source.dropped_rows == sum(-(-length // 512) for length in lengths)
    assert {entry.rows % 16 for entry in open_index(storage, dataset).packed[0]} == {0}


def test_a_rerun_changes_nothing(jsonl: Path, run_config: Make) -> None:
    config = run_config(jsonl)
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    before = {entry.path: entry.etag for entry in storage.list("")}
    assert prepare(config, storage).digest == dataset.digest
    assert {entry.path: entry.etag for entry in storage.list("")} == before
    assert identity(config, list_corpus(config)) == dataset.identity


def test_committed_units_are_not_sent_out_again_and_not_counted_as_this_runs_work(
    jsonl: Path, run_config: Make
) -> None:
    config = run_config(jsonl)
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    storage.delete(f"datasets/{dataset.identity}/dataset.json")
    first, *others = storage.list("datasets/units")
    lost = json.loads(storage.read(first.path))
    storage.delete(first.path)
    sent: dict[str, list[Any]] = {}
    seen: list[PrepareProgress] = []

    def sending(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        sent[function.func.__name__] = list(items)
        return map_in_process(function, items)

    assert prepare(config, storage, map_units=sending, report=seen.append).digest == dataset.digest
    assert [unpacked(packed).id for packed in sent["_tokenize_unit"]] == [lost["id"]]
    begin, end = (at for at in seen if at.phase == "tokenize")
    total = len(others) + 1
    assert (begin.units_done, begin.units_total, begin.units_before, begin.eta_seconds) == (
        total - 1,
        total,
        total - 1,
        None,
    )
    assert (end.units_done, end.text_bytes, end.documents) == (total, lost["text_bytes"], lost["counts"]["docs_in"])
    assert end.eta_seconds == 0.0
    assert PrepareProgress("tokenize", 6, 10, 0, 0, 0, 0, 8.0, 2).eta_seconds == 8.0


def test_the_same_files_elsewhere_are_the_same_dataset(jsonl: Path, tmp_path: Path, run_config: Make) -> None:
    moved = tmp_path / "elsewhere" / "texts"
    moved.parent.mkdir()
    first = run_config(jsonl)
    dataset = prepare(first, open_storage(first.storage))
    jsonl.rename(moved)
    second = run_config(moved, storage__root=str(tmp_path / "second"))
    assert prepare(second, open_storage(second.storage)).digest == dataset.digest


def test_all_goes_into_the_storage_that_is_given(jsonl: Path, tmp_path: Path, run_config: Make) -> None:
    config = run_config(jsonl)
    elsewhere = open_storage(config.storage.model_copy(update={"root": str(tmp_path / "elsewhere")}))
    assert prepare(config, elsewhere) == prepare(config, open_storage(config.storage))
    assert objects(elsewhere) == objects(open_storage(config.storage))


def test_folder_and_s3_give_the_same_objects(jsonl: Path, bucket: tuple[str, str], run_config: Make) -> None:
    endpoint, name = bucket
    local = run_config(jsonl)
    dataset = prepare(local, open_storage(local.storage))
    remote = run_config(jsonl, storage__root=f"s3://{name}/some/prefix", storage__endpoint_url=endpoint)
    assert prepare(remote, open_storage(remote.storage)).digest == dataset.digest
    assert objects(open_storage(remote.storage)) == objects(open_storage(local.storage))


def test_a_corpus_on_s3(jsonl: Path, bucket: tuple[str, str], run_config: Make) -> None:
    endpoint, name = bucket
    config = run_config(f"s3://{name}/texts", storage__endpoint_url=endpoint, source={"include": ["*.jsonl"]})
    storage = open_storage(config.storage)
    fs = filesystem("s3://", config.storage)
    for path in jsonl.iterdir():
        fs.put_file(str(path), f"{name}/texts/{path.name}")
    fs.pipe_file(f"{name}/texts/readme.md", b"not ours")
    dataset = prepare(config, storage)
    assert dataset.sources[0].counts.docs_in == 120
    local = run_config(jsonl, storage__root=config.storage.root + "-local")
    assert prepare(local, open_storage(local.storage)).sources[0].tokens == dataset.sources[0].tokens


def test_ray_gives_the_same_objects(jsonl: Path, tmp_path: Path, run_config: Make, ray_cluster: None) -> None:
    here = run_config(jsonl)
    there = run_config(jsonl, storage__root=str(tmp_path / "ray"))
    dataset = prepare(here, open_storage(here.storage))
    lines: list[str] = []
    on_ray = prepare(
        there,
        open_storage(there.storage),
        map_units=map_on_ray(there.cluster),
        report=lambda progress: lines.append(progress.line()),
    )
    assert on_ray.digest == dataset.digest
    assert objects(open_storage(there.storage)) == objects(open_storage(here.storage))
    units = len(open_storage(there.storage).list("datasets/units"))
    assert sum(line.startswith(f"tokenize: {units}/{units} units, 120 documents") for line in lines) == 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("survivors", [0, 1, 3, 4, 6, 8])
def test_a_killed_run_goes_on(jsonl: Path, tmp_path: Path, run_config: Make, survivors: int) -> None:
    """The map dies after `survivors` units (over all phases); the next run ends in the same bytes and redoes none of them."""
    clean = run_config(jsonl, storage__root=str(tmp_path / "clean"))
    dataset = prepare(clean, open_storage(clean.storage))
    config = run_config(jsonl)
    storage = open_storage(config.storage)
    left = survivors

    def dying(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        nonlocal left
        for index, item in enumerate(items):
            if not left:
                raise Killed
            left -= 1
            yield index, function(item)

    with pytest.raises(Killed):
        prepare(config, storage, map_units=dying)
    before = {entry.path: entry.etag for entry in storage.list("datasets/units")}
    before |= {entry.path: entry.etag for entry in storage.list("datasets/documents")}
    assert prepare(config, storage).digest == dataset.digest
    after = {entry.path: entry.etag for entry in storage.list("datasets")}
    assert before.items() <= after.items()
    assert objects(storage) == objects(open_storage(clean.storage))


def test_a_task_is_sent_what_is_its_own(jsonl: Path, run_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task names no other unit and no partition: of 45,000 units in 256 partitions each would carry megabytes."""
    monkeypatch.setattr("data_prep.resolve.PARTITION_DOCUMENTS", 2)
    config = run_config(jsonl, corpus__drop_duplicates_across_sources=True)
    sent: dict[str, list[Any]] = {}

    def sending(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        sent[function.func.__name__] = [pickle.dumps(item) for item in items]
        return map_in_process(function, items)

    prepare(config, open_storage(config.storage), map_units=sending)
    assert len(sent["_pack_unit"]) == len(sent["_tokenize_unit"]) > 4
    assert len(sent["find_duplicates"]) == 2 * 64  # 120 documents, of the source and of all
    for tasks in (sent["_pack_unit"], sent["_tokenize_unit"], sent["find_duplicates"]):
        assert max(map(len, tasks)) < 500


def test_two_runs_at_once_converge(
    jsonl: Path, tmp_path: Path, run_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the tasks of a writer that has lost its lease work on for a while."""
    everybody = iter(range(3))

    @contextmanager
    def own(storage: Storage, path: str, **_: Any) -> Iterator[Lease]:
        with hold(storage, f"{path}-{next(everybody)}/writer.json", what="") as lease:
            yield lease

    clean = run_config(jsonl, storage__root=str(tmp_path / "clean"))
    dataset = prepare(clean, open_storage(clean.storage))
    config = run_config(jsonl)
    monkeypatch.setattr("data_prep.prepare.hold", own)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(prepare, config, open_storage(config.storage)) for _ in range(3)]
        assert {run.result().digest for run in runs} == {dataset.digest}
    assert objects(open_storage(config.storage)) == objects(open_storage(clean.storage))


def test_one_prepares_at_a_time(jsonl: Path, run_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one leaves; a holder that was taken for dead commits nothing, and who took over finds its units."""
    config = run_config(jsonl)
    storage = open_storage(config.storage)
    path = lease_path(identity(config, list_corpus(config)))
    monkeypatch.setattr("data_prep.prepare.hold", partial(hold, beat_s=0.1))
    first = [True]

    def meanwhile(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        if not first:
            yield from map_in_process(function, items)
            return
        first.clear()
        with pytest.raises(
            Held, match=r"dataset [0-9a-f]{8} is being written by .* take over with `moonlight release`"
        ):
            prepare(config, open_storage(config.storage))
        yield from map_in_process(function, items)
        give_way(storage, path)

    with pytest.raises(LeaseLost, match="nothing more is written"):
        prepare(config, storage, map_units=meanwhile)
    assert not storage.exists(dataset_path(identity(config, list_corpus(config))))
    dataset = prepare(config, storage)
    assert json.loads(storage.read(path))["released"]
    assert dataset.digest == prepare(config, storage).digest


def test_a_file_that_changes_under_the_run(jsonl: Path, run_config: Make) -> None:
    def meddling(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        (jsonl / "part-1.jsonl").write_text("{}")
        yield from map_in_process(function, items)

    config = run_config(jsonl)
    with pytest.raises(RuntimeError, match=r"part-1\.jsonl is not the file that was listed any more"):
        prepare(config, open_storage(config.storage), map_units=meddling)


def test_encoders_that_disagree(jsonl: Path, run_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first document of a unit is always encoded twice; a token of difference, and the reference encodes the unit."""
    encode = Gigatoken.encode

    def wrong(engine: Gigatoken, documents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = encode(engine, documents)
        return np.where(np.arange(len(ids)) == offsets[1] - 1, 0, ids).astype(np.uint32), offsets

    config = run_config(jsonl)
    storage = open_storage(config.storage)
    ensure_tokenizer(config, storage, {"main": list_source(config.corpus.sources[0], 0, config.storage)})
    monkeypatch.setattr(Gigatoken, "encode", wrong)
    dataset = prepare(config, storage)
    units = [UnitManifest.model_validate_json(storage.read(entry.path)) for entry in storage.list("datasets/units")]
    assert {unit.engines for unit in units} == {("tokenizers",)}
    monkeypatch.undo()
    other = run_config(jsonl, storage__root=f"{config.storage.root}-2")
    fine = prepare(other, open_storage(other.storage))
    assert dataset.tokenizer.engines == fine.tokenizer.engines == ("gigatoken", "fastokens")
    ours, theirs = (open_index(open_storage(c.storage), d).packed for c, d in ((config, dataset), (other, fine)))
    assert [list(files) for files in ours] == [list(files) for files in theirs]


def test_nothing_is_committed_where_the_reference_disagrees_with_itself(
    jsonl: Path, run_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Encoder.check

    def wrong(encoder: Encoder, document: bytes) -> np.ndarray:
        return np.append(check(encoder, document)[:-1], 0)

    monkeypatch.setattr(Encoder, "check", wrong)
    config = run_config(jsonl)
    storage = open_storage(config.storage)
    with pytest.raises(RuntimeError, match=r"part-0\.jsonl@0: the two encoders disagree from token \d+ on"):
        prepare(config, storage)
    assert not storage.list("datasets/units")
    assert not storage.list("datasets/attempts")
    monkeypatch.undo()
    assert prepare(config, storage).rows > 0


def test_units_in_any_order(jsonl: Path, tmp_path: Path, run_config: Make) -> None:
    def backwards(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for index in reversed(range(len(items))):
            yield index, function(items[index])

    here = run_config(jsonl)
    there = run_config(jsonl, storage__root=str(tmp_path / "backwards"))
    dataset = prepare(here, open_storage(here.storage), map_units=map_in_process)
    assert prepare(there, open_storage(there.storage), map_units=backwards).digest == dataset.digest


def test_copies_across_units_are_dropped_and_never_leak(
    jsonl: Path, texts: list[str], tmp_path: Path, run_config: Make
) -> None:
    clean = run_config(
        jsonl,
        storage__root=str(tmp_path / "clean"),
        data__sequence_length=32768,
        data__rows_per_group=1,
        data__packing="pad",
    )
    without = prepare(clean, open_storage(clean.storage))
    (jsonl / "part-4.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    config = run_config(
        jsonl,
        data__sequence_length=32768,
        data__rows_per_group=1,
        data__packing="pad",
        tokenizer__training_bytes=200_000,
    )
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    counts = dataset.sources[0].counts
    heldout = without.sources[0].counts.heldout
    assert counts.docs_in == 240
    assert counts.docs_out == 120 - heldout
    assert counts.filtered == {"exact_duplicate": 120 - heldout, "heldout_copy": heldout}
    held = {tuple(ids) for _, _, ids in heldout_documents(storage, dataset)}
    trained = [tuple(piece[:-1]) for piece in packed_documents(storage, dataset)]
    assert not held & set(trained)
    assert len(trained) == len(set(trained)) == counts.docs_out


def test_duplicates_stay_if_asked(jsonl: Path, texts: list[str], run_config: Make) -> None:
    (jsonl / "part-4.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    config = run_config(jsonl, source={"filters": {"drop_exact_duplicates": False}})
    counts = prepare(config, open_storage(config.storage)).sources[0].counts
    assert counts.filtered == {"heldout_copy": counts.heldout}
    assert counts.docs_out == 240 - 2 * counts.heldout


def test_growth_shares_old_shards(jsonl: Path, texts: list[str], run_config: Make) -> None:
    """New files, one before and one after the old ones, are tokenized; nothing else is, and nothing old changes."""
    for path in jsonl.iterdir():
        path.rename(path.with_name(path.name.replace("part", "m")))
    config = run_config(jsonl)
    storage = open_storage(config.storage)
    first = prepare(config, storage)
    before = objects(storage)
    for name in ("a", "z"):
        lines = [json.dumps({"text": f"{name} {text}"}) for text in texts[:10]]
        (jsonl / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    second = prepare(config, storage)
    assert second.identity != first.identity
    assert second.tokenizer == first.tokenizer
    assert second.sources[0].counts.docs_in == 140
    old, new = open_index(storage, first), open_index(storage, second)
    assert set(old.documents[0]) < set(new.documents[0])
    assert set(old.packed[0]) < set(new.packed[0])
    assert set(old.records) < set(new.records)
    assert first.sources[0].heldout == second.sources[0].heldout
    after = objects(storage)
    assert before.items() <= after.items()
    new_units = {path for path in after if path.startswith("datasets/units/")} - set(before)
    slices = [part["path"] for path in new_units for part in json.loads(storage.read(path))["slices"]]
    assert sorted(slices) == ["a.jsonl", "z.jsonl"]


def test_another_sequence_length_tokenizes_nothing(jsonl: Path, run_config: Make) -> None:
    config = run_config(jsonl)
    storage = open_storage(config.storage)
    first = prepare(config, storage)
    units = {entry.path: entry.etag for entry in storage.list("datasets/units")}
    second = prepare(run_config(jsonl, data__sequence_length=1024), storage)
    assert {entry.path: entry.etag for entry in storage.list("datasets/units")} == units
    assert [*open_index(storage, second).documents[0]] == [*open_index(storage, first).documents[0]]
    assert second.sources[0].counts == first.sources[0].counts
    assert second.sequence_length == 1024


@pytest.mark.parametrize("packing", ["concat", "pad"])
def test_other_packings(jsonl: Path, texts: list[str], run_config: Make, packing: str) -> None:
    config = run_config(jsonl, data__packing=packing, data__rows_per_group=1)
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    oracle = Tokenizer.from_str(storage.read(f"{dataset.tokenizer.folder}/tokenizer.json").decode())
    total = sum(len(oracle.encode(text, add_special_tokens=False).ids) + 1 for text in texts)
    heldout = sum(len(ids) + 1 for _, _, ids in heldout_documents(storage, dataset))
    assert dataset.sources[0].tokens == total - heldout


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", r"corpus\.sources\[0\]\.path: .*missing does not exist"),
        (lambda folder: folder / "empty", r"corpus\.sources\[0\]\.path: .*empty holds no file"),
        (lambda folder: folder / "zero", r"corpus\.sources\[0\]\.path: all 1 files .* are empty"),
    ],
)
def test_a_corpus_that_is_not_there(
    tmp_path: Path, run_config: Make, make: Callable[[Path], Path], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "a.txt").touch()
    config = run_config(make(tmp_path))
    with pytest.raises(ConfigError, match=message):
        identity(config, list_corpus(config))


def test_an_s3_corpus_that_is_not_there(bucket: tuple[str, str], run_config: Make) -> None:
    endpoint, name = bucket
    config = run_config(f"s3://{name}/nothing", storage__endpoint_url=endpoint)
    with pytest.raises(ConfigError, match=r"corpus\.sources\[0\]\.path: there is no object"):
        identity(config, list_corpus(config))


def test_padding_over_the_limit_is_refused_by_name_before_the_commit(tmp_path: Path, run_config: Make) -> None:
    """Documents of a few tokens, one a row or eight: what is wasted is said, and nothing is called a dataset."""
    folder = tmp_path / "qa"
    folder.mkdir()
    rng = random.Random(0)
    words = [f"w{number}" for number in range(200)]
    lines = (json.dumps({"text": " ".join(rng.choices(words, k=4))}) for _ in range(6000))
    (folder / "a.jsonl").write_text("\n".join(lines))
    said: list[PrepareProgress] = []
    for changes, share in ({"data__max_documents_per_row": 8}, "8"), ({"data__packing": "pad"}, "9"):
        changes |= {"storage__root": str(tmp_path / next(iter(changes)))}
        config = run_config(folder, data__max_padding=0.02, **changes)
        storage = open_storage(config.storage)
        with pytest.raises(
            ConfigError,
            match=rf"source 'main': .* slots .* are padding \({share}\d\.\d%\), and data\.max_padding is 0\.02",
        ):
            prepare(config, storage, report=said.append)
        assert said[-1].phase == "packed"
        assert said[-1].padding > 0.8
        assert "% padding" in said[-1].line()
        assert not [entry.path for entry in storage.list("datasets") if entry.path.endswith("/dataset.json")]
        allowed = run_config(folder, data__max_padding=0.99, **changes)
        prepare(allowed, storage)
        with pytest.raises(ConfigError, match="padding"):  # also where it has been made since
            prepare(config, storage)

    config = run_config(folder, data__max_padding=0.02)  # as many documents a row as fit
    dataset = prepare(config, open_storage(config.storage), report=said.append)
    assert said[-1].padding == dataset.padding < 0.02
    assert len(packed_documents(open_storage(config.storage), dataset)) > 30 * dataset.rows


def test_a_process_that_prepares_imports_no_library_for_nothing(jsonl: Path, run_config: Make) -> None:
    """pandas and awkward would take 0.6 CPU seconds of each: Arrow and gigatoken import them when asked in the wrong way."""
    config = run_config(jsonl)
    prepare(config, open_storage(config.storage))
    again = config.model_copy(update={"data": config.data.model_copy(update={"sequence_length": 256})})
    shutil.rmtree(Path(config.storage.root) / "datasets")
    program = (
        "import pickle, sys; from data_prep.prepare import prepare; from pipeline.storage import open_storage;"
        "config = pickle.load(sys.stdin.buffer); assert prepare(config, open_storage(config.storage)).tokens;"
        "print(*({'pandas', 'awkward', 'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(again), capture_output=True)
    assert (done.returncode, done.stdout.decode().split()) == (0, []), done.stderr.decode()[-2000:]
