"""How jobs/ is built: no circle, thin commands, and a fifth stage is one file and one line."""

from __future__ import annotations

from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import grimp
import pytest

from jobs import pipeline, stages, status
from jobs.stages.records import Records
from jobs.stages.stage import Stage
from pipeline.config.schema import RunConfig
from pipeline.manifest import Record
from pipeline.storage import Storage
from pipeline.workflow.record import StageProgress, read_events
from tests.jobs.conftest import Prepared

JOBS = Path(__file__).parents[2] / "jobs"


def test_no_import_circle() -> None:
    """Imports inside functions are counted, those for type checkers as well."""
    graph = grimp.build_graph("jobs", "data_prep", "pipeline", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert "jobs.stages.train" in imports["jobs.stages"]
    TopologicalSorter(imports).prepare()  # raises CycleError with the circle


def test_commands_only_call() -> None:
    """An entry module says the first line and calls; what it does, and its parser, are elsewhere."""
    entries = {path for path in JOBS.glob("*.py") if "__main__" in path.read_text()} - {JOBS / "main.py"}
    assert {path.stem for path in entries} >= {*stages.names(), "pipeline", "check", "plan", "verify"}
    for path in entries:
        assert len(path.read_text().splitlines()) < 30, path.name


class Card(Record):
    """`<root>/card.json`: what the fifth stage leaves."""

    title: str


def fifth() -> Stage:
    """A room that writes a card about the published model."""
    room = ModuleType("jobs.stages.announce")

    def find(config: RunConfig, storage: Storage, records: Records) -> Card | None:
        data = storage.read_or_none("card.json")
        return None if data is None else Card.model_validate_json(data)

    def do(config: RunConfig, storage: Storage, records: Records, report: Callable[[str], None]) -> None:
        report("half")
        storage.create("card.json", Card(title=config.run_id).to_json())

    def check(config: RunConfig, storage: Storage, records: Records, *, here: bool) -> None:
        if config.publishing.name == "nameless":
            raise ValueError("publishing.name: nameless cannot be announced")

    def progress() -> Callable[[str], StageProgress]:
        return lambda at: StageProgress("announce", 1, 1, "cards", 0.0, "cards", None, at)

    for name, value in {
        "NAME": "announce",
        "SUMMARY": "Tell the world.",
        "GAUGES": {"cards": "Cards written."},
    }.items():
        setattr(room, name, value)
    for function in (find, do, check, progress):
        setattr(room, function.__name__, function)
    return room  # type: ignore[return-value]


@pytest.fixture
def announced(monkeypatch: pytest.MonkeyPatch, no_ray: None) -> None:
    monkeypatch.setattr(stages, "STAGES", (*stages.STAGES, fifth()))


@pytest.mark.usefixtures("announced")
def test_a_fifth_stage_is_one_file_and_one_line(
    prepared: Prepared, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        pipeline.main(["--help"])
    assert "(prepare, train, evaluate, publish, announce)" in " ".join(capsys.readouterr().out.split())

    prepared.storage.write("runs/debug/config.yaml", b"")
    assert status.main(prepared.arguments) == 0
    assert capsys.readouterr().out.splitlines()[1:6] == [
        "  prepare   done",
        *(f"  {stage:<9} not done" for stage in ("train", "evaluate", "publish", "announce")),
    ]

    wanted: list[list[str]] = []
    monkeypatch.setattr("jobs.drivers.ray_jobs.run_on_ray", lambda todo, *_: wanted.append(todo))
    monkeypatch.setattr("jobs.drivers.pipeline.print_summary", lambda *_: None)
    assert pipeline.main(prepared.arguments) == 0
    assert wanted == [["train", "evaluate", "publish", "announce"]]
    capsys.readouterr()
    assert pipeline.main([*prepared.arguments, "publishing.name=nameless"]) == 2
    assert capsys.readouterr().err == "error: publishing.name: nameless cannot be announced\n"
    prepared.storage.delete("runs/debug")


@pytest.mark.usefixtures("announced")
def test_a_fifth_stage_is_done_like_the_others(
    prepared: Prepared, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, run_id = prepared.storage, "fifth"
    config = prepared.config.model_copy(update={"run_id": run_id})
    with pytest.raises(stages.MissingInput, match="announce needs the result of train"):
        stages.run("announce", config, storage)
    for room in stages.STAGES[1:4]:
        monkeypatch.setattr(room, "find", lambda *_: Card(title="done"))
    stages.run("announce", config, storage)
    assert capsys.readouterr().out == "announce  100%  1/1 cards  half\n"
    assert [event["event"] for event in read_events(storage, run_id)] == ["started", "finished"]
    stages.run("announce", config, storage)
    assert capsys.readouterr().out == "announce: up to date\n"
    storage.delete("card.json")
    storage.delete(f"runs/{run_id}")
