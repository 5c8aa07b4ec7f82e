"""Storage that fails, records that kill, processes that are killed: the dataset is the one of a clean run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from data_prep.attempts import REASON
from data_prep.contamination.questions import to_bytes, write_questions
from data_prep.prepare import prepare
from data_prep.records import shard_path
from data_prep.units import unpacked
from pipeline.config.schema import RunConfig
from pipeline.file_index import open_index
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage, open_storage
from tests.data_prep.faulty_s3 import FaultyS3
from tests.data_prep.test_prepare import objects

Make = Callable[..., RunConfig]
ROOT = Path(__file__).parents[2]
WORKER = re.compile("ray::(Map|IDLE|Classifier)")  # without the node's agents: if one of them dies, the node does
KILLER = """
# stands in front of the real orjson: parsing the poison kills the process
import importlib.machinery, os, sys
others = [path for path in sys.path if path != os.path.dirname(__file__)]
__path__ = importlib.machinery.PathFinder.find_spec("orjson", others).submodule_search_locations
from orjson.orjson import *
from orjson.orjson import loads as parse
def loads(data):
    if b"POISON" in bytes(data):
        os.kill(os.getpid(), 9)
    return parse(data)
"""


# Every rule, a classifier among them, near-duplicates, repeated lines and questions of tasks; thresholds that leave some of the code that the tests read.
EVERYTHING = {
    "corpus__rules": json.dumps(
        {
            "languages": True,
            "gopher_repetition": {"max_duplicate_line_fraction": 0.5},
            "gopher_quality": {"min_alphabetic_word_fraction": 0.5},
            "c4": {"require_terminal_punctuation": False, "drop_curly_bracket": False},
            "fineweb": {
                "max_newline_word_ratio": 1.0,
                "min_punctuated_line_fraction": 0.0,
                "max_duplicate_line_character_fraction": 0.5,
            },
            "classifier": {"function": "tests.data_prep.plugs:score", "version": "1", "min_score": 0.1},
            "personal_data": True,
        }
    ),
    "corpus__near_duplicates": "{}",
    "corpus__duplicate_paragraphs": json.dumps({"by": "line", "min_characters": 20}),
    "corpus__keep_rejected": "true",
    "cluster__classifier_actors": "2",
    "cluster__classifier_cpus": "0.2",
}
MORE = pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["plain", "everything"])


def looking_for(texts: list[str], more: dict[str, str]) -> dict[str, str]:
    """Settings under which parts of some of the texts are looked for as questions, and cut out."""
    if not more:
        return more
    sha256 = hashlib.sha256(to_bytes(asked(texts))).hexdigest()
    return {**more, "corpus__decontamination": json.dumps({"action": "cut", "questions": sha256})}


def asked(texts: list[str]) -> dict[str, list[tuple[str, list[str]]]]:
    return {"exam": [(str(number), [text[500:700]]) for number, text in enumerate(texts[::9])]}


def opened(config: RunConfig, texts: list[str]) -> Storage:
    """The storage, with what the run looks for."""
    storage = open_storage(config.storage)
    if config.corpus.decontamination is not None:
        write_questions(storage, asked(texts))
    return storage


@MORE
def test_bad_requests_and_cut_connections(
    jsonl: Path, texts: list[str], bucket: tuple[str, str], run_config: Make, more: dict[str, str]
) -> None:
    """Far more faults than S3 has: 10 % errors, 5 % cut connections."""
    endpoint, name = bucket
    (jsonl / "part-3.jsonl").unlink()
    more = looking_for(texts, more)
    clean = run_config(jsonl, storage__root=str(jsonl.parent / "clean"), corpus__unit_bytes=1_000_000, **more)
    dataset = prepare(clean, opened(clean, texts))
    if more:
        assert dataset.contamination is not None
        assert dataset.contamination.tasks["exam"].seen > 3
        assert dataset.sources[0].changes["duplicate_paragraphs.lines"] > 100
        assert dataset.sources[0].counts.filtered["classifier.min_score"] > 2
    with FaultyS3(endpoint, 0.10, 0.05) as proxy:
        config = run_config(
            jsonl,
            storage__root=f"s3://{name}/faulty",
            storage__endpoint_url=proxy.url,
            corpus__unit_bytes=1_000_000,
            **more,
        )
        assert prepare(config, opened(config, texts)).digest == dataset.digest
        assert proxy.faults > 10
    direct = run_config(jsonl, storage__root=f"s3://{name}/faulty", storage__endpoint_url=endpoint)
    assert objects(open_storage(direct.storage)) == objects(open_storage(clean.storage))


def poison(jsonl: Path) -> None:
    path = jsonl / "part-2.jsonl"
    path.write_text(path.read_text() + json.dumps({"text": "POISON"}) + "\n")


def quarantined_unit(storage: Storage, dataset: DatasetManifest) -> None:
    source = dataset.sources[0]
    (failed,) = source.failed_units
    assert source.counts.quarantined == {REASON: 1}
    (entry,) = [entry for entry in open_index(storage, dataset).quarantine[0] if failed in entry.path]
    line = json.loads(storage.read(entry.path))
    assert line["location"] == f"unit {failed}"
    assert any("part-2.jsonl" in part for part in line["slices"])
    assert "SIGKILL" in line["excerpt"]
    assert not storage.list("datasets/attempts")


def test_a_deadly_unit_is_convicted_in_isolation(
    jsonl: Path, tmp_path: Path, run_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both suspects have two attempts that never ended; only the one that kills its child, too, is quarantined."""
    config = run_config(jsonl, corpus__unit_bytes=300_000)
    storage = open_storage(config.storage)
    poison(jsonl)
    planned = []

    class Stop(Exception):
        pass

    def planning(function: object, items: list) -> object:
        planned.extend(map(unpacked, items))
        raise Stop

    with pytest.raises(Stop):
        prepare(config, storage, map_units=planning)
    guilty = [unit for unit in planned if any(part.path == "part-2.jsonl" for part in unit.slices)][-1]
    for unit in (planned[0], guilty):
        storage.create(shard_path("attempts", unit.id, "/0"), b"")
        storage.create(shard_path("attempts", unit.id, "/1"), b"")
    (tmp_path / "killer").mkdir()
    (tmp_path / "killer" / "orjson.py").write_text(KILLER)
    monkeypatch.syspath_prepend(tmp_path / "killer")
    dataset = prepare(config, storage)
    quarantined_unit(storage, dataset)
    assert dataset.sources[0].failed_units == (guilty.id,)


def test_the_marker_of_a_worker_that_died_after_its_commit(jsonl: Path, run_config: Make) -> None:
    config = run_config(jsonl)
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    storage.delete(f"datasets/{dataset.identity}/dataset.json")
    unit = Path(storage.list("datasets/units")[0].path).stem
    storage.create(shard_path("attempts", unit, "/0"), b"")
    storage.create(shard_path("attempts", "another", "/0"), b"")
    assert prepare(config, storage).digest == dataset.digest
    assert [entry.path for entry in storage.list("datasets/attempts")] == [shard_path("attempts", "another", "/0")]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_deadly_unit_on_ray(jsonl: Path, tmp_path: Path, run_config: Make) -> None:
    config = run_config(jsonl)
    poison(jsonl)
    (tmp_path / "killer").mkdir()
    (tmp_path / "killer" / "orjson.py").write_text(KILLER)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'killer'}:{ROOT}"}
    # the driver samples text for the tokenizer from the same files: give it one that is trained already
    prepared = run_config(jsonl)
    train_tokenizer_only(prepared)
    done = start(config, environment)
    output, _ = done.communicate(timeout=1700)
    assert done.returncode == 0, output
    storage = open_storage(config.storage)
    dataset = prepare(config, storage)
    quarantined_unit(storage, dataset)


def train_tokenizer_only(config: RunConfig) -> None:
    class Stop(Exception):
        pass

    def stop(function: object, items: object) -> object:
        raise Stop

    with pytest.raises(Stop):
        prepare(config, open_storage(config.storage), map_units=stop)


def start(config: RunConfig, environment: dict[str, str] | None = None, *log: str) -> subprocess.Popen[str]:
    environment = environment or {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.data_prep.run_prepare", config.model_dump_json(), *log]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def manifests(storage: Storage) -> dict[str, str]:
    return {entry.path: entry.etag for kind in ("units", "packs") for entry in storage.list(f"datasets/{kind}")}


def run_through_kills(config: RunConfig, kills: int, stride: int, seed: int, log: Path) -> str:
    """Start the driver again and again; after every 1 to `stride` commits kill a worker, the driver or all of Ray.

    A killed worker may cost the unit it was at, and the other kills one unit of each of the two workers: no unit may be begun
    more often. Returns the last driver's last line.
    """
    rng = random.Random(seed)
    storage = open_storage(config.storage)
    committed: dict[str, str] = {}
    sizes = []  # how much was committed at each kill
    kinds: Counter[str] = Counter()
    lost = 0  # units that the kills so far may have cost
    while True:
        driver = start(config, None, str(log))
        relatives = family(driver)
        killed = False
        while len(sizes) < kills and driver.poll() is None:
            target = len(committed) + rng.randint(1, stride)
            while len(now := manifests(storage)) < target and driver.poll() is None:
                time.sleep(0.05)
                relatives = family(driver) or relatives
            if driver.poll() is not None:
                break  # by itself
            assert committed.items() <= now.items(), "a committed unit was done again"
            committed = now
            time.sleep(rng.uniform(0, 0.3))
            relatives = family(driver) or relatives
            workers = [process for process in relatives[1:] if WORKER.search("".join(_cmdline(process)))]
            sizes.append(len(now))
            what = rng.choice(["worker", "worker", "driver", "cluster"])  # starting Ray again takes longest
            if what == "worker" and workers:
                kinds["worker"] += 1
                kill([rng.choice(workers)])
                lost += 1
                continue
            kinds["driver" if what == "driver" else "cluster"] += 1
            kill([relatives[0]] if what == "driver" else relatives[::-1])
            lost, killed = lost + 2, True
            break
        output, _ = driver.communicate(timeout=3600)
        kill(relatives[::-1])
        assert killed or driver.returncode == 0, output
        again = [count - 1 for count in Counter(line.rsplit(" ", 1)[0] for line in starts(log)).values()]
        assert sum(again) <= lost, f"{sum(again)} units were begun again after kills that cost at most {lost}"
        if driver.returncode == 0:
            assert len(sizes) == kills, f"the work was done after {len(sizes)} kills"
            assert len(set(sizes)) > kills // 2
            assert len(kinds) == 3
            assert committed.items() <= manifests(storage).items(), "a committed unit was done again"
            assert len(again) == len(manifests(storage)), "the log does not name every unit and every pack"
            assert sum(again) > 0, "no kill met a worker at work"
            print(f"{len(again)} units and packs; {sum(again)} begun again, of at most {lost}; kills: {dict(kinds)}")
            return output.splitlines()[-1]


def starts(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.fixture
def large(tmp_path: Path, texts: list[str]) -> Path:
    """60 files of varied text, 24 MB: a run takes long enough to be killed in."""
    folder = tmp_path / "large"
    folder.mkdir()
    for part in range(60):
        lines = [json.dumps({"text": f"{part} {text}"}) for text in texts[part % 7 :: 3]]
        (folder / f"{part:02d}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.long
@pytest.mark.timeout(7200)
@MORE
def test_twenty_kills_on_a_folder(
    large: Path, texts: list[str], tmp_path: Path, run_config: Make, more: dict[str, str]
) -> None:
    more = looking_for(texts, more)
    clean = run_config(large, storage__root=str(tmp_path / "clean"), **more)
    dataset = prepare(clean, opened(clean, texts))
    config = run_config(large, **more)
    storage = opened(config, texts)
    assert f"digest {dataset.digest}" in run_through_kills(config, 20, 15, seed=1, log=tmp_path / "starts")
    assert objects(storage) == objects(open_storage(clean.storage))
    left = [path.name for path in Path(config.storage.root).rglob("*.tmp-*")]
    assert [name for name in left if not name.endswith(".tmp-lock")] == []  # locks stay: a deleted one locks nobody out


@pytest.mark.long
@pytest.mark.timeout(7200)
@MORE
def test_twenty_kills_on_a_faulty_s3(
    large: Path, texts: list[str], tmp_path: Path, bucket: tuple[str, str], run_config: Make, more: dict[str, str]
) -> None:
    endpoint, name = bucket
    # requests: moto is slow
    fewer = {"corpus__unit_bytes": 1_000_000, "data__groups_per_file": 256, **looking_for(texts, more)}
    clean = run_config(large, storage__root=str(tmp_path / "clean"), **fewer)
    dataset = prepare(clean, opened(clean, texts))
    with FaultyS3(endpoint) as proxy:
        config = run_config(large, storage__root=f"s3://{name}/killed", storage__endpoint_url=proxy.url, **fewer)
        opened(config, texts)
        assert f"digest {dataset.digest}" in run_through_kills(config, 20, 3, seed=2, log=tmp_path / "starts")
        assert proxy.faults > 50
    direct = run_config(large, storage__root=f"s3://{name}/killed", storage__endpoint_url=endpoint)
    assert objects(open_storage(direct.storage)) == objects(open_storage(clean.storage))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("where", ["folder", "faulty s3"])
def test_twenty_kills_of_one_process(
    jsonl: Path, texts: list[str], tmp_path: Path, bucket: tuple[str, str], run_config: Make, where: str
) -> None:
    """Everything on, without Ray: after every 1 to 15 objects of whatever kind, the last steps' among them."""
    more = {"corpus__unit_bytes": 60_000, **looking_for(texts, EVERYTHING)}
    clean = run_config(jsonl, storage__root=str(tmp_path / "clean"), **more)
    dataset = prepare(clean, opened(clean, texts))
    endpoint, name = bucket
    places = {"folder": {}, "faulty s3": {"storage__root": f"s3://{name}/alone"}}
    with FaultyS3(endpoint) as proxy:
        if where != "folder":
            places[where]["storage__endpoint_url"] = proxy.url
        config = run_config(jsonl, **places[where], **more)
        storage = opened(config, texts)
        rng, kills, last = random.Random(7), 0, ""
        while not last:
            command = [sys.executable, "-m", "tests.data_prep.run_alone", config.model_dump_json()]
            driver = subprocess.Popen(
                command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, stdout=subprocess.PIPE, text=True
            )
            target = len(storage.list("datasets")) + rng.randint(1, 15)
            while kills < 20 and driver.poll() is None and len(storage.list("datasets")) < target:
                time.sleep(0.02)
            if kills < 20 and driver.poll() is None:
                driver.kill()
                kills += 1
            output, _ = driver.communicate(timeout=1800)
            last = output.splitlines()[-1] if driver.returncode == 0 else ""
            assert driver.returncode in (0, -9)
        assert (kills, last) == (20, f"digest {dataset.digest}")
    if where != "folder":
        assert proxy.faults > 10
        storage = open_storage(config.storage.model_copy(update={"endpoint_url": endpoint}))
    assert objects(storage) == objects(open_storage(clean.storage))
