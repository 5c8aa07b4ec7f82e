"""Every record of a run, torn in the middle: named and refused, or named and done without; mended, the same command ends the same run."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import pytest

from jobs import pipeline, stages
from pipeline.config.load import load_config
from pipeline.config.schema import StorageConfig
from pipeline.evaluation.heldout import evaluate
from pipeline.publishing.export import publish
from pipeline.storage import Storage
from pipeline.training.commits import train_folder
from pipeline.training.left_out import LeftOut, left_out_path
from pipeline.workflow.record import add_event
from tests.faults.runs import RUN, STEPS, Place, Reference, one_line, same
from tests.faults.table import Row, fault

REFUSED, WITHOUT, UNUSED = "refused", "without", "unused"
LAST = f"runs/{RUN}/train/step-{STEPS:08d}"
# Of a run that is complete and asked for once more.
COMPLETE = {
    "dataset.json": ("datasets/*/dataset.json", REFUSED),
    "the run's dataset.json": (f"runs/{RUN}/dataset.json", REFUSED),
    "config.yaml": (f"runs/{RUN}/config.yaml", UNUSED),
    "train/manifest.json": (f"runs/{RUN}/train/manifest.json", REFUSED),
    "evaluation": (f"runs/{RUN}/evaluate/step-*.json", REFUSED),
    "published manifest.json": (f"models/{RUN}/*/manifest.json", REFUSED),
    "published model.safetensors": (f"models/{RUN}/*/model*.safetensors", REFUSED),
    "latest.json": (f"models/{RUN}/latest.json", REFUSED),
    "events.jsonl": (f"runs/{RUN}/events.jsonl", WITHOUT),
}
# Of a run that is killed before its last record, and trained on.
TRAINED = {
    "dataset.json in training": ("datasets/*/dataset.json", REFUSED),
    "files.arrow": ("datasets/*/files.arrow", REFUSED),
    "the checkpoint's manifest.json": (f"{LAST}/manifest.json", WITHOUT),
    "the checkpoint's .metadata": (f"{LAST}/writer-1/.metadata", WITHOUT),
    "the checkpoint's part": (f"{LAST}/writer-1/__0_0.distcp", WITHOUT),
    "run.json": (f"{LAST}/run.json", WITHOUT),
    "an older checkpoint's manifest.json": (f"runs/{RUN}/train/step-{STEPS - 4:08d}/manifest.json", UNUSED),
    "writer.json": (f"runs/{RUN}/train/writer.json", REFUSED),
    "metrics": (f"runs/{RUN}/train/metrics/*.jsonl", WITHOUT),
    "left_out.json": (f"runs/{RUN}/train/left_out.json", REFUSED),
}


@pytest.fixture(scope="session")
def complete(corpus: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four stages done, by the library."""
    folder = tmp_path_factory.mktemp("complete")
    shutil.copytree(corpus / "root", folder / "root")
    place = Place("folder", corpus, folder, StorageConfig(root=str(folder / "root")), None)
    run = place.train()
    assert run.wait() == [0, 0], run.log.text
    storage = place.storage
    storage.write(left_out_path(RUN), LeftOut().to_json())
    assert stage_by_stage(place) == ["evaluate", "publish"]
    assert pipeline.main(place.settings()) == 0
    add_event(storage, RUN, "finished", "publish", seconds=1.0)
    return folder / "root"


def stage_by_stage(place: Place) -> list[str]:
    """Do, in this process and without Ray, what is not done of evaluate and publish; which that was."""
    config, storage = load_config(place.settings()[1], place.settings()[2:]), place.storage
    done, records = [], stages.find(config, storage)
    assert records.dataset is not None
    assert records.train is not None
    assert records.checkpoint is not None
    evaluation = records.evaluation
    if evaluation is None:
        evaluation = evaluate(config, records.dataset, records.checkpoint, storage, report=lambda _: None)
        done.append("evaluate")
    if stages.find(config, storage).model is None:
        publish(config, records.train, evaluation, records.dataset, storage, report=lambda _: None)
        done.append("publish")
    return done


@pytest.fixture
def whole(place: Place, complete: Path) -> Place:
    """The complete run at the place."""
    for path in sorted(complete.rglob("*")):
        if path.is_file():
            place.storage.upload(path, str(path.relative_to(complete)))
    return place


def tear(storage: Storage, pattern: str) -> tuple[str, bytes]:
    """Leave half of the only, or first, file of that name; its path and what it was."""
    found = [info.path for info in storage.list("") if fnmatch.fnmatch(info.path, pattern)]
    assert found, pattern
    data = storage.read(found[0])
    storage.write(found[0], data[: len(data) // 2])
    return found[0], data


TOLD = {
    REFUSED: "refused in one line with the record's path, exit 2; restored, the same command ends the run",
    WITHOUT: "named, and done without",
    UNUSED: "not read by this command",
}


QUICK = [
    "dataset.json@s3",
    "train/manifest.json@folder",
    "evaluation@folder",
    "published model.safetensors@s3",
    "events.jsonl@folder",
]


@fault("a record of a complete run torn", cases=COMPLETE, quick=QUICK)
def test_complete(
    whole: Place,
    place: Place,
    case: str,
    row: Row,
    reference: Reference,
    capfd: pytest.CaptureFixture[str],
    no_ray: None,
) -> None:
    """All stages are asked for once more; Ray is never needed."""
    pattern, how = COMPLETE[case]
    path, data = tear(place.storage, pattern)
    capfd.readouterr()
    code, said = pipeline.main(place.settings()), capfd.readouterr().err
    assert "Traceback" not in said
    if how == REFUSED:
        assert code == 2, said
        assert path in one_line(said, path)
        place.storage.write(path, data)
        code = pipeline.main(place.settings())
    elif how == WITHOUT:
        assert path in said
    assert code == 0, said
    row.same, row.happened = same(place, reference()), TOLD[how]


@fault("a record of a run at work torn", cases=TRAINED, quick=["the checkpoint's .metadata@s3", "writer.json@folder"])
def test_trained(whole: Place, place: Place, case: str, row: Row, reference: Reference) -> None:
    """Killed before its last record was written."""
    place.storage.delete(f"{train_folder(RUN)}/manifest.json")
    pattern, how = TRAINED[case]
    path, data = tear(place.storage, pattern)
    run = place.train()
    codes = run.wait()
    if how == REFUSED:
        assert 2 in codes, run.log.text
        assert set(codes) <= {1, 2}, run.log.text  # 1: of a rank that waited for one that had refused
        assert path in one_line(run.log.text, path)
        place.storage.write(path, data)
        run = place.train()
        codes = run.wait()
    elif how == WITHOUT:
        assert path in run.log.text
        assert "Traceback" not in run.log.text
    assert codes == [0, 0], run.log.text
    if case == "metrics":  # a run is worth more than its curve
        assert place.manifest().checkpoint.content_sha256 == reference().checkpoint.content_sha256
        row.same = "yes, but for the lost metrics"
    else:
        row.same = same(place, reference())
    row.happened = TOLD[how]
