"""Stage jobs on a real Ray with its job server: how they end is told truly, and the same work is submitted once."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from pipeline.workflow import ray_jobs
from pipeline.workflow.ray_jobs import StageJob, StageJobFailed, follow, stop, submit_or_attach


@pytest.fixture(scope="module")
def client() -> Iterator[JobSubmissionClient]:
    ray.shutdown()  # a Ray that other tests left has no dashboard
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setattr(ray_jobs, "POLL_S", 0.1)
        context = ray.init(address="local", num_cpus=2, include_dashboard=True, dashboard_port=0, log_to_driver=False)
        yield JobSubmissionClient(f"http://{context.dashboard_url}")
        ray.shutdown()


def job(name: str, code: str) -> StageJob:
    metadata = {"job_name": f"debug {name}", "stage": name}
    return StageJob(name, f'{sys.executable} -S -c "{code}"', metadata, {"env_vars": {"STAGE": name}})


def test_success(client: JobSubmissionClient) -> None:
    submission_id = submit_or_attach(
        client, job("good", "import os, time; time.sleep(0.5); print(os.environ['STAGE'])")
    )
    assert submission_id == "good-1"
    follow(client, submission_id)
    info = client.get_job_info(submission_id)
    assert info.status == JobStatus.SUCCEEDED
    assert info.metadata == {"job_name": "debug good", "stage": "good"}
    assert client.get_job_logs(submission_id).strip().endswith("good")


def test_the_exit_code_and_the_last_lines_of_a_failure(client: JobSubmissionClient) -> None:
    failing = job("bad", "import sys; [print('line', n) for n in range(99)]; sys.exit(7)")
    submission_id = submit_or_attach(client, failing)
    with pytest.raises(StageJobFailed) as error:
        follow(client, submission_id)
    assert error.value.exit_code == 7
    lines = str(error.value).splitlines()
    assert lines[0] == "bad-1 FAILED; its last lines:"
    assert "  | line 98" in lines
    assert len(lines) == 16

    # the same work again is a new attempt, with the old one's end in the list of jobs
    assert submit_or_attach(client, failing) == "bad-2"
    with pytest.raises(StageJobFailed, match="bad-2 FAILED"):
        follow(client, "bad-2")
    assert {info.submission_id for info in client.list_jobs()} >= {"bad-1", "bad-2"}


def test_a_stopped_job_is_a_failure_and_a_running_one_is_attached_to(client: JobSubmissionClient) -> None:
    sleeping = job("sleepy", "import time; time.sleep(300)")
    submission_id = submit_or_attach(client, sleeping)
    while client.get_job_status(submission_id) != JobStatus.RUNNING:
        time.sleep(0.1)
    assert submit_or_attach(client, sleeping) == submission_id  # a second driver
    client.stop_job(submission_id)
    with pytest.raises(StageJobFailed, match="sleepy-1 STOPPED") as error:
        follow(client, submission_id)
    assert error.value.exit_code != 0
    assert submit_or_attach(client, job("sleepy", "pass")) == "sleepy-2"
    follow(client, "sleepy-2")


def test_a_job_is_stopped_although_its_server_is_away_for_a_moment(client: JobSubmissionClient) -> None:
    submission_id = submit_or_attach(client, job("stopped", "import time; time.sleep(300)"))
    away = ["stop_job", "get_job_status", "get_job_status"]

    class Shaky(JobSubmissionClient):
        def answer(self, what: str, submission_id: str) -> Any:
            if away[:1] == [what]:
                del away[0]
                raise ConnectionError("refused")
            return getattr(super(), what)(submission_id)

        def stop_job(self, job_id: str) -> Any:  # type: ignore[override]
            return self.answer("stop_job", job_id)

        def get_job_status(self, job_id: str) -> Any:  # type: ignore[override]
            return self.answer("get_job_status", job_id)

    stop(Shaky(client._address), submission_id, 120.0)
    assert away == []
    assert client.get_job_status(submission_id) == JobStatus.STOPPED


def test_a_job_server_that_is_gone_is_not_waited_for(
    client: JobSubmissionClient, capsys: pytest.CaptureFixture[str]
) -> None:
    stop(client, "nobody", 120.0, silence_s=0.5)
    said = capsys.readouterr().err
    assert said.startswith("nobody: the job server does not say how it ended (")
    assert said.count("\n") == 1


def test_an_entrypoint_that_cannot_start(client: JobSubmissionClient) -> None:
    submission_id = submit_or_attach(client, StageJob("nowhere", "/no/such/program", {}, {}))
    with pytest.raises(StageJobFailed, match="nowhere-1 FAILED") as error:
        follow(client, submission_id)
    assert error.value.exit_code == 127  # the shell's word for it


def test_two_drivers_at_once_submit_once(client: JobSubmissionClient, tmp_path: Path) -> None:
    together = threading.Barrier(2)
    seen = tmp_path / "seen"

    class Late(JobSubmissionClient):
        """Both have looked at the list of jobs before either submits."""

        def submit_job(self, **options: object) -> str:  # type: ignore[override]
            together.wait()
            return str(super().submit_job(**options))

    def drive(_: int) -> str:
        late = Late(client._address)
        submission_id = submit_or_attach(late, job("race", f"open('{seen}', 'a').write('x')"))
        follow(late, submission_id)
        return submission_id

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(drive, range(2))) == ["race-1", "race-1"]
    assert seen.read_text() == "x"


def test_a_job_server_that_stays_away(client: JobSubmissionClient) -> None:
    with pytest.raises(StageJobFailed, match=r"has not answered for 0 s .*run the same command again"):
        follow(client, "never-submitted-1", patience_s=0.3)
