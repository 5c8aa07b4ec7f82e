"""A run's workflow survives every ending of a pod that a retry can cure, ends on the others, and says what happened in plain words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pipeline.workflow.rayjobs import Outcome
from tests.k8s.manifests import REPOSITORY
from tests.k8s.pod_endings import ENDINGS, Ending

SPEC = yaml.safe_load((REPOSITORY / "k8s/workflows/run.yaml").read_text())["spec"]
TEMPLATES: dict[str, dict[str, Any]] = {template["name"]: template for template in SPEC["templates"]}
NOTIFY: str = TEMPLATES["notify"]["script"]["source"]


def retries(expression: str, ending: Ending) -> bool:
    """expr-lang as far as ours goes. Argo asks only when a try has Failed or is in Error; all its variables are strings."""
    assert re.fullmatch(r"[\w\s.=\"|()\[\],-]+", expression), expression
    last = SimpleNamespace(status=ending.status, exitCode=ending.exit_code, message=ending.message)
    names = {"__builtins__": {}, "lastRetry": last, "asInt": int}
    return ending.status in ("Failed", "Error") and bool(eval(expression.replace("||", " or "), names))


@pytest.mark.parametrize("template", ["stage", "gate", "notify"])
@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.name)
def test_a_retry_cures_what_it_can(template: str, ending: Ending) -> None:
    strategy = TEMPLATES[template]["retryStrategy"]
    assert strategy["retryPolicy"] == "Always"  # Argo asks for both: the policy and the expression
    assert retries(strategy["expression"], ending) == ending.retried


def test_every_exit_code_of_the_driver_is_in_the_table() -> None:
    listed = {int(ending.exit_code) for ending in ENDINGS}
    assert {int(outcome) for outcome in Outcome} <= listed


def notification(folder: Path, url: str = "", **environment: str) -> str:
    (folder / "url").write_text(url + "\n") if url else None
    script = folder / "notify.py"
    script.write_text(NOTIFY.replace("/etc/moonlight/notify/url", str(folder / "url")))
    given = {
        "RUN": "r",
        "SECONDS_TAKEN": "5400",
        "FAILURES": r'"null"',
        "CONFIG": "debug",
        "RUN_ID": "r",
        "OVERRIDES": "",
    }
    done = subprocess.run(
        [sys.executable, script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **given, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip().splitlines()[-1]


def gate(folder: Path, body: str) -> None:
    """A `jobs.gate` that answers as it is told."""
    (folder / "jobs").mkdir()
    (folder / "jobs/gate.py").write_text(
        f"import pathlib, sys\nto = pathlib.Path(sys.argv[sys.argv.index('--output') + 1])\n{body}\n"
    )


def failures(*entries: dict[str, str]) -> str:
    """As Argo gives them: JSON, quoted once more."""
    return json.dumps(json.dumps(list(entries)))


def failed(step: str, message: str, at: int, template: str = "stage") -> dict[str, str]:
    return {
        "displayName": step,
        "message": message,
        "templateName": template,
        "phase": "Failed",
        "finishedAt": f"2026-11-28T0{at}:00:00Z",
    }


def test_a_closed_gate_says_so(tmp_path: Path) -> None:
    gate(tmp_path, "(to / 'gate').write_text('closed'); (to / 'reason').write_text('loss 3.1 is over 2.5')")
    said = notification(tmp_path, STATUS="Succeeded")
    assert said == "r: Succeeded after 1.5 h; NOT published, the gate is closed: loss 3.1 is over 2.5"


def test_the_real_gate_is_asked(tmp_path: Path) -> None:
    said = notification(tmp_path, STATUS="Succeeded", SECONDS_TAKEN="0.4", PYTHONPATH=str(REPOSITORY), OVERRIDES=f"storage.root={tmp_path}/runs")  # fmt: skip
    assert said.startswith("r: Succeeded after 0 min; NOT published, the gate is closed: ")


def test_an_open_gate_is_published_also_after_retries(tmp_path: Path) -> None:
    gate(
        tmp_path,
        "assert sys.argv[-2:] == ['a.b=1', 'c.d=2']; (to / 'gate').write_text('open'); (to / 'reason').write_text('loss 2.1')",
    )
    cured = failures(failed("train(0)", "main: Error (exit code 143)", 1))
    assert (
        notification(tmp_path, STATUS="Succeeded", FAILURES=cured, OVERRIDES="a.b=1 c.d=2")
        == "r: Succeeded after 1.5 h; published: loss 2.1"
    )


def test_a_gate_that_cannot_be_read(tmp_path: Path) -> None:
    gate(tmp_path, "sys.exit(12)")
    assert notification(tmp_path, STATUS="Succeeded").endswith(
        "; whether it was published could not be read, see this step's log"
    )


def test_a_failure_names_step_words_and_tries(tmp_path: Path) -> None:
    found = failures(
        failed("r", "", 5, "run"),
        failed("train", "No more retries left", 4),
        failed("train(1)", 'main: Error (exit code 10): "quoted"', 3),
        failed("train(0)", "main: Error (exit code 143)", 2),
    )
    assert notification(tmp_path, STATUS="Failed", FAILURES=found) == (
        'r: Failed after 1.5 h; train: main: Error (exit code 10): "quoted" - the stage\'s program failed, try 2'
    )


@pytest.mark.parametrize(
    ("given", "said"), [(r'"null"', "no step says why"), ("not JSON", "not JSON"), (failures(failed("gate", "x" * 999, 1, "gate")), "gate: " + "x" * 300)]
)  # fmt: skip
def test_other_failures(tmp_path: Path, given: str, said: str) -> None:
    assert notification(tmp_path, STATUS="Error", FAILURES=given) == f"r: Error after 1.5 h; {said}"


def test_it_is_posted(tmp_path: Path) -> None:
    got: list[bytes] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        said = notification(tmp_path, url=f"http://127.0.0.1:{server.server_port}/hook", STATUS="Failed")
    assert json.loads(got[0]) == {"text": said}


def test_every_exit_code_has_words() -> None:
    means = re.search(r"MEANS = (\{.*?\})", NOTIFY, re.S)
    assert means
    assert set(yaml.safe_load(means.group(1))) == {int(outcome) for outcome in Outcome} - {0} | {137}
