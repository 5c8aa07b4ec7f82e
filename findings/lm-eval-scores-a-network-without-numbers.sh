#!/usr/bin/env bash
# Version: lm-eval 0.4.13
# Behaviour: a model whose log-likelihoods are all NaN (a diverged checkpoint) gets an accuracy, not an error: multiple choice
#   takes numpy's argmax, which returns the place of the first NaN, so every question is answered with its first choice and
#   acc and acc_norm are the share of questions whose first choice is right.
# Seen: lm-eval 0.4.13, 10 questions, 7 with the first choice right: acc 0.7, acc_norm 0.7
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check lm_eval==0.4.13 datasets==5.2.0
cat >"$folder/see.py" <<'PYTHON'
import importlib.metadata
import json
import pathlib
import sys

from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager


class Broken(LM):
    """A diverged network: every log-likelihood is NaN."""

    def loglikelihood(self, requests, disable_tqdm=False):
        return [(float("nan"), False) for _ in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [float("nan") for _ in requests]

    def generate_until(self, requests, disable_tqdm=False):
        return ["" for _ in requests]


folder = pathlib.Path(sys.argv[1])
rows = [{"q": "1+1=", "c": ["2", "3", "4"], "a": 0 if n < 7 else 1} for n in range(10)]
(folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
(folder / "t.yaml").write_text(f"""
task: t
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/t.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: a
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
manager = TaskManager(include_path=str(folder), include_defaults=False)
found = simple_evaluate(Broken(), tasks=["t"], task_manager=manager, bootstrap_iters=0)["results"]["t"]
acc, acc_norm = found["acc,none"], found["acc_norm,none"]
print(f"lm-eval {importlib.metadata.version('lm_eval')}, 10 questions, 7 with the first choice right: acc {acc}, acc_norm {acc_norm}")
if (acc, acc_norm) != (0.7, 0.7):
    sys.exit("changed")
PYTHON
"$folder/venv/bin/python" "$folder/see.py" "$folder" 2>"$folder/errors" || { tail -3 "$folder/errors" >&2; exit 1; }
