#!/usr/bin/env bash
# Version: mlflow-skinny 3.17.2
# Behaviour: a tracking URI that is a folder, which every MLflow before took and used by default, is refused when the first run starts: the
#   file store is in maintenance, and only MLFLOW_ALLOW_FILE_STORE=true lets it write; with it runs and metrics are written and read as
#   before. Setting the URI and making a client raise nothing, so a trainer that logs to a folder learns it after its start.
# Seen: "the URI is taken, the run refused: MlflowException names MLFLOW_ALLOW_FILE_STORE; with it: loss at steps [1, 2]"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "mlflow-skinny==3.17.2"
cat >"$folder/ask.py" <<'PY'
import os
import sys

import mlflow


def log():
    with mlflow.start_run() as run:
        for step in (1, 2):
            mlflow.log_metric("loss", 1.0 / step, step=step)
    return run.info.run_id


os.environ.pop("MLFLOW_ALLOW_FILE_STORE", None)
mlflow.set_tracking_uri(f"file:{sys.argv[1]}/first")
try:
    log()
except mlflow.exceptions.MlflowException as error:
    assert "MLFLOW_ALLOW_FILE_STORE" in str(error), error
else:
    sys.exit("the file store is taken as it is again")
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
mlflow.set_tracking_uri(f"file:{sys.argv[1]}/second")
history = mlflow.MlflowClient().get_metric_history(log(), "loss")
steps = [metric.step for metric in history]
assert steps == [1, 2], steps
print(f"the URI is taken, the run refused: MlflowException names MLFLOW_ALLOW_FILE_STORE; with it: loss at steps {steps}")
PY
cd "$folder"
seen=$("$folder/venv/bin/python" -W ignore ask.py "$folder/runs" 2>"$folder/log") || { cat "$folder/log" >&2; exit 1; }
echo "$seen"
[ "$seen" = "the URI is taken, the run refused: MlflowException names MLFLOW_ALLOW_FILE_STORE; with it: loss at steps [1, 2]" ] || exit 1
