"""`jobs.pipeline --backend kuberay` from its command line to a RayJob, by a kubeconfig, against the fake API server."""

from __future__ import annotations

import inspect
import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import stages, status
from jobs.drivers import kuberay
from jobs.drivers.options import KUBERAY
from jobs.pipeline import main
from jobs.views import status as status_view
from pipeline.config.schema import StorageConfig
from pipeline.storage import open_storage
from pipeline.workflow import rayjobs, rayjobs_api
from pipeline.workflow.rayjobs import Outcome, StageStatus
from pipeline.workflow.record import StageProgress, read_events, read_progress
from tests.workflow.driver import Driver, job_appears
from tests.workflow.fake_kubernetes import FakeKubernetes


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, Outcome.STOPPED),
        (
            {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"},
            Outcome.NO_MANIFEST,
        ),  # nobody prepared anything
        ({"jobDeploymentStatus": "ValidationFailed", "message": "no"}, Outcome.VALIDATION),
    ],
)
def test_the_exit_code_is_the_truth(
    cluster: FakeKubernetes, tmp_path: Path, status: dict[str, str], expected: Outcome
) -> None:
    codes: list[int] = []
    arguments = ["--backend", "kuberay", "--only", "prepare", "--config", "debug", f"storage.root={tmp_path / 'runs'}"]
    driver = threading.Thread(target=lambda: codes.append(main(arguments)), daemon=True)
    driver.start()
    name = job_appears(cluster, "debug-prepare-1")
    job = cluster.get(name)
    assert job is not None
    assert job["spec"]["entrypoint"] == f"python -m jobs.prepare --config debug storage.root={tmp_path / 'runs'}"
    cluster.set_status(name, **status)
    driver.join(180)
    assert codes == [int(expected)]


def test_a_run_that_a_later_template_does_not_fit_is_refused_before_its_first_stage(
    cluster: FakeKubernetes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six experts train on two ranks; evaluate's host has four."""
    arguments = ["--backend", "kuberay", "--config", "debug", f"storage.root={tmp_path / 'runs'}"]
    assert main([*arguments, "model.n_routed_experts=6"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: template-evaluate adds parallelism.replicate=1 parallelism.shard=4")
    assert "parallelism.ep 4 must divide model.n_routed_experts 6; change the run's setting" in told
    assert cluster.get("debug-prepare-1") is None


def test_a_storage_that_fails_on_the_way_is_infrastructure_and_the_job_goes_on(
    cluster: FakeKubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from botocore.exceptions import EndpointConnectionError

    def away(*arguments: object) -> bool:
        raise EndpointConnectionError(endpoint_url="http://away")

    monkeypatch.setattr(stages, "finished", away)
    codes: list[int] = []
    arguments = ["--backend", "kuberay", "--only", "prepare", "--config", "debug", f"storage.root={tmp_path / 'runs'}"]
    driver = threading.Thread(target=lambda: codes.append(main(arguments)), daemon=True)
    driver.start()
    cluster.set_status(job_appears(cluster, "debug-prepare-1"), jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    driver.join(180)
    assert codes == [int(Outcome.INFRASTRUCTURE)]
    assert "http://away" in capsys.readouterr().err


def state(deployment: str, job: str = "", message: str = "", dashboard: str = "") -> StageStatus:
    return StageStatus("debug-train-1", "train", 1, job, deployment, message=message, dashboard_url=dashboard)


def small_corpus(folder: Path) -> str:
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("a text")
    return "corpus=" + json.dumps({"sources": [{"name": "web", "path": str(folder / "texts")}]})


def test_progress_and_events_hold_what_a_rayjob_waits_for_and_its_dashboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(StorageConfig(root=str(tmp_path)))
    kuberay.show(storage, "debug", state("Suspended", message="quota in use"))
    waiting = read_progress(storage, "debug")
    assert waiting is not None
    assert waiting.line() == "train      debug-train-1: queued  quota in use"
    with monkeypatch.context() as later:
        later.setattr("jobs.views.status.time.time", lambda: waiting.updated + 7200)
        assert status.main(["--config", "debug", f"storage.root={tmp_path}", small_corpus(tmp_path)]) == 0
    assert "now: train      debug-train-1: queued  quota in use\n" in capsys.readouterr().out  # and no word of silence
    kuberay.show(storage, "debug", state("Running", "RUNNING", dashboard="head:8265"))
    running = read_progress(storage, "debug")
    assert running is not None
    assert running.note == "debug-train-1: running    dashboard head:8265"
    working = StageProgress("train", 4, 120, "steps", 9.0, "tokens", 95.0, "loss 5")
    storage.write("runs/debug/progress.json", json.dumps(working.__dict__).encode())
    kuberay.show(storage, "debug", state("Running", "RUNNING", dashboard="head:8265"))  # another driver took over
    assert read_progress(storage, "debug") == working
    kuberay.show(storage, "debug", replace(state("Running", "RUNNING"), began=working.updated + 1))  # a later try
    begun = read_progress(storage, "debug")
    assert begun is not None
    assert (begun.unit, begun.note) == ("", "debug-train-1: running")
    kuberay.show(storage, "debug", state("Retrying", "FAILED"))
    retrying = read_progress(storage, "debug")
    assert retrying is not None
    assert (retrying.total, retrying.note) == (0, "debug-train-1: retrying")
    events = read_events(storage, "debug")
    assert [(event["phase"], event["dashboard"]) for event in events][:2] == [("queued", ""), ("running", "head:8265")]


def test_status_shows_the_run_from_anywhere_and_from_the_cluster(
    cluster: FakeKubernetes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--config", "debug", f"storage.root={tmp_path / 'runs'}", small_corpus(tmp_path)]
    driver = Driver(cluster, done=lambda: False)
    name = job_appears(cluster, "debug-prepare-1")
    cluster.set_status(
        name, jobDeploymentStatus="Failed", jobStatus="FAILED", reason="AppFailed", dashboardURL="head:8265"
    )
    driver.wait()
    storage = open_storage(StorageConfig(root=str(tmp_path / "runs")))
    for seen in driver.reports:
        kuberay.show(storage, "debug", seen)
    capsys.readouterr()
    assert status.main(arguments) == 0
    assert re.search(
        r"RayJob debug-prepare-1: failed at 2.* UTC  AppFailed  dashboard head:8265", capsys.readouterr().out
    )
    assert status.main(["--kubernetes", *arguments]) == 0
    assert "RayJob debug-prepare-1: failed  AppFailed   dashboard head:8265" in capsys.readouterr().out
    cluster.remove(name)
    assert status.main(["--kubernetes", *arguments]) == 0
    assert "no RayJobs of this run" in capsys.readouterr().out
    monkeypatch.setattr(status_view, "PATIENCE_S", 0.0)
    cluster.faults = ["503"]
    assert status.main(["--kubernetes", *arguments]) == 1
    shown = capsys.readouterr()
    assert "prepare   not done" in shown.out
    assert "no answer from the Kubernetes API" in shown.err


def test_help_teaches_every_exit_code_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert KUBERAY in capsys.readouterr().out
    codes = KUBERAY[KUBERAY.index("exit codes") :]
    assert {int(code) for code in re.findall(r"(?:^|\s)(\d+) [a-zA-Z]", codes)} == {int(outcome) for outcome in Outcome}
    read = "".join(inspect.getsource(module) for module in (rayjobs, rayjobs_api))
    variables = set(re.findall(r"MOONLIGHT_\w+", KUBERAY))
    assert variables == set(re.findall(r'environ(?:\.get\(|\[)"(MOONLIGHT_\w+)"', read)) - {
        "MOONLIGHT_OWNER_NAME",
        "MOONLIGHT_OWNER_UID",
    }
