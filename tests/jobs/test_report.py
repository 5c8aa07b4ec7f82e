"""`moonlight report` and `moonlight runs`, and the page that a stage's driver keeps while the stage works."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import report, runs
from jobs.stages.records import hold_dataset
from jobs.views import live
from jobs.views.live import LivePage
from pipeline.config.schema import StorageConfig
from pipeline.report.page import report_path
from pipeline.report.run import Run
from pipeline.storage import Storage, open_storage
from pipeline.training.commits import lease_path
from tests.jobs.conftest import Prepared
from tests.report.make import events, journal, recorded, settings
from tests.report.test_page import Page
from tests.workflow.driver import until

pytestmark = pytest.mark.usefixtures("no_ray")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(StorageConfig(root=str(tmp_path / "root")))


def where(storage: Storage) -> list[str]:
    return ["--config", "debug", f"storage.root={storage.root}"]


Shown = pytest.CaptureFixture[str]


def test_the_page_of_a_run_is_written_anew(storage: Storage, tmp_path: Path, capsys: Shown) -> None:
    recorded(storage, "debug")
    assert report.main(where(storage)) == 0
    path = storage.uri(report_path("debug"))
    assert capsys.readouterr() == (f"{path}\n", "")
    journal(storage, "debug", (40, 0, 20))
    copy = tmp_path / "copies" / "page.html"
    assert report.main([*where(storage), "debug", "--output", str(copy)]) == 0
    assert capsys.readouterr().out == f"{copy}\n"
    assert copy.read_text() == Path(path).read_text()
    assert (
        len(Page(copy.read_text()).line("Loss", name="training")) == 60
    )  # 1 ... 20 and, of the second attempt, 81 ... 120


def test_two_runs_in_one_page(storage: Storage, capsys: Shown) -> None:
    recorded(storage, "one")
    recorded(storage, "two", "optimizer.weight_decay=0.05")
    assert report.main([*where(storage), "one", "two", "one"]) == 0
    assert capsys.readouterr().out == f"{storage.uri('reports/one_two.html')}\n"
    page = Page(storage.read("reports/one_two.html").decode())
    assert ["optimizer.weight_decay", "0.1", "0.05"] in page.rows


def test_runs_that_are_not_there_or_share_nothing(storage: Storage, capsys: Shown) -> None:
    recorded(storage, "one")
    settings(storage, "two")
    events(storage, "two", (0, "started", "prepare", {}))
    storage.write("runs/three/events.jsonl", b"")
    for wanted, said in (
        (["four"], f"run four: there is no such run in {storage.uri()}; there are: one, three, two"),
        (["one", "two"], "runs one, two share nothing to lay over each other: two has no logged step yet; train first, or leave out"),
        (["one", "three"], "run three: it has no config.yaml to compare settings by; start the run once more with its configuration"),
    ):  # fmt: skip
        assert report.main([*where(storage), *wanted]) == 2
        assert capsys.readouterr() == ("", f"error: {said}\n")
    assert storage.list("reports") == []


def test_a_damaged_record_is_named(storage: Storage, capsys: Shown) -> None:
    """Of one run the rest is shown; of several it would be compared with half of what it is."""
    recorded(storage, "one")
    recorded(storage, "two")
    path = "runs/two/evaluate/step-00000080.json"
    storage.write(path, storage.read(path).replace(b"4.7", b"3.7"))
    assert report.main([*where(storage), "two"]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith(f"{storage.uri(path)}: not a sound EvaluationManifest (")
    assert "not a sound EvaluationManifest" in storage.read(report_path("two")).decode()
    assert report.main([*where(storage), "one", "two"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: run two: {storage.uri(path)}: not a sound EvaluationManifest (")
    assert shown.err.count("\n") == 1


def test_the_data_as_it_was_prepared(prepared: Prepared, capsys: Shown) -> None:
    storage, run_id = prepared.storage, "watched"
    config = prepared.config.model_copy(update={"run_id": run_id})
    hold_dataset(config, storage, prepared.dataset)
    try:
        assert report.main([*prepared.arguments, run_id]) == 0
        text = storage.read(report_path(run_id)).decode()
    finally:
        storage.delete(f"runs/{run_id}")
    rows = {tuple(row[:3]): row[3:] for row in Page(text).rows if len(row) == 6}
    for source in prepared.dataset.sources:
        texts = prepared.texts[source.name]
        [example, count, share] = rows[source.name, "quarantined", "empty_document"]
        assert example.split()[0].endswith("empty.py")
        assert (count, share) == ("1", f"{1 / source.counts.docs_in:.2%}")
        bars = text.partition(f"lengths of the documents of {source.name}")[2].partition("</div>")[0]
        found = {}
        for bar in bars.split("<i ")[1:]:
            name, _, documents = bar.partition('title="')[2].partition('"')[0].rpartition(": ")
            found[name] = int(documents)
        assert sum(found.values()) == source.counts.docs_out + source.counts.filtered.get("exact_duplicate", 0) + source.counts.heldout  # fmt: skip
        kib = sum(1024 <= len(each.encode()) < 2048 for each in texts.values())
        assert found.get("1 KiB", 0) == kib


def test_the_runs_of_a_storage(storage: Storage, capsys: Shown) -> None:
    recorded(storage, "one", "cluster.use_gpu=true", "parallelism={shard: 4, ep: 2}", "training.micro_batch=4")
    settings(storage, "two")
    events(storage, "two", (5000, "asked", "prepare", {"by": "ann on node-7"}), (5010, "started", "prepare", {}))
    storage.write(lease_path("one"), b'{"who": "bob on node-3 (process 4711)"}')
    assert runs.main(where(storage)) == 0
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert title == f"2 runs in {storage.uri()}"
    assert head.split() == ["run", "state", "step", "loss", "held", "out", "last", "news", "by", "used"]
    assert [line.split("  ")[0] for line in lines] == ["two", "one"]  # the newest first
    assert "ann on node-7" in lines[0]
    assert "silent: prepare" in lines[0]
    fields = [field for field in lines[1].split("  ") if field]
    assert [fields[0], fields[1].strip(), fields[2].strip()] == ["one", "between: evaluate", "120/120"]
    assert fields[4].strip() == "4.5000"
    assert "bob on node-3" in lines[1]
    hours = 4 * (207 + 105 + 14) / 3600  # the killed attempt up to its last step; prepare needs no GPU
    assert f"{hours:.1f} GPU-h" in lines[1]
    assert runs.main([*where(storage), "--price", "2.5"]) == 0
    assert capsys.readouterr().out.splitlines()[3].endswith(f"{2.5 * hours:.2f}")


def test_a_price_that_is_none(storage: Storage, capsys: Shown) -> None:
    with pytest.raises(SystemExit) as exit:
        runs.main([*where(storage), "--price", "cheap"])
    assert exit.value.code == 2
    assert "argument --price: 'cheap' is no price; give a number, as 2.5" in capsys.readouterr().err


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LOOK_S", 0.002)
    monkeypatch.setattr(live, "WRITE_S", 0.0)


@pytest.mark.usefixtures("looks")
def test_the_page_follows_the_run_and_has_its_end(storage: Storage) -> None:
    settings(storage, "debug")
    seen: list[Run] = []

    def steps() -> int:
        data = storage.read_or_none(report_path("debug"))
        return len(Page(data.decode()).plots) and len(Page(data.decode()).line("Loss", name="training")) if data else -1

    with LivePage(storage, "debug", seen.append):
        until(lambda: steps() == 0, "a first page")
        for last in (20, 60):
            journal(storage, "debug", (40, 0, last))
            until(lambda last=last: steps() == last, f"a page with {last} steps")
        journal(storage, "debug", (40, 0, 120))
    assert steps() == 120
    assert seen[-1].step == 120


@pytest.mark.usefixtures("looks")
def test_a_storage_that_is_away_is_said_once(storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys: Shown) -> None:
    settings(storage, "debug")
    tries: list[int] = []

    def away(*_: object) -> None:
        tries.append(1)
        raise OSError("gone")

    with LivePage(storage, "debug"):
        with monkeypatch.context() as outage:
            outage.setattr(Storage, "write", away)
            until(lambda: len(tries) > 3, "tries to write")
    assert capsys.readouterr().err == "the run's page cannot be written (OSError: gone); the stage goes on\n"
    assert storage.exists(report_path("debug"))
