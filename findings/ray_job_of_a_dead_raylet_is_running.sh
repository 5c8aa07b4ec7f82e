#!/usr/bin/env bash
# Version: ray 2.60.0
# Behaviour: a submitted job whose node has lost its raylet is RUNNING for ever. The raylet takes the job's supervisor and driver with it,
#   and the node's state is DEAD soon after, but who would note the job's end went too (the job manager lives in the node's agent), while
#   dashboard and GCS stay up and go on answering RUNNING. Whoever polls the job API has to look at the node of the job as well.
# Seen: "60 s after the node is DEAD and the driver is gone: RUNNING"
set -euo pipefail
folder=$(mktemp -d)
temporary=$(mktemp -d)
trap 'pkill -9 -f "$temporary" || true; rm -rf "$folder" "$temporary"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "ray[default]==2.60.0"
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled PATH="$folder/venv/bin:$PATH"

ray start --head --port=0 --dashboard-agent-listen-port=0 --dashboard-port=0 --include-dashboard=true --num-cpus=1 \
    --object-store-memory=100000000 --temp-dir="$temporary" >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
cat >"$folder/ask.py" <<'PY'
import os, signal, subprocess, sys, time
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

temporary = sys.argv[1]
context = ray.init(address=open(f"{temporary}/ray_current_cluster").read(), log_to_driver=False, logging_level="ERROR")
client = JobSubmissionClient(f"http://{context.dashboard_url}")
job = client.submit_job(entrypoint=f"echo {temporary}; exec sleep 3600.25")


def pids(words):
    return [int(pid) for pid in subprocess.run(["pgrep", "-f", words], capture_output=True, text=True).stdout.split()]


def until(condition):
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end, condition
        time.sleep(1)


until(lambda: client.get_job_status(job) == JobStatus.RUNNING and pids("^sleep 3600.25"))
(raylet,) = [pid for pid in pids("raylet/raylet ") if temporary in open(f"/proc/{pid}/cmdline").read()]
os.kill(raylet, signal.SIGKILL)
until(lambda: not any(node["Alive"] for node in ray.nodes()) and not pids("^sleep 3600.25"))
time.sleep(60)
status = client.get_job_status(job).value
print(f"60 s after the node is DEAD and the driver is gone: {status}", flush=True)
os._exit(status != "RUNNING")
PY
python "$folder/ask.py" "$temporary" 2>"$folder/errors" || { tail -5 "$folder/errors" >&2; echo "changed"; exit 1; }
