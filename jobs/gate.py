"""May this run be published? Compares the newest evaluation with `publishing.max_loss` and says `open` or `closed`.

`python -m jobs.gate --config <preset or path> --output <folder> [section.key=value ...]` writes the files `gate` and `reason` into the
folder, for a workflow's step outputs. Without an evaluation the gate stays closed. The exit code is 0 either way: a closed gate is an
answer, not a failure. 2: wrong configuration; 12: the storage does not answer, ask again. Publishing checks the same limit again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from botocore.exceptions import BotoCoreError

from jobs.cli import parser
from pipeline.config.load import ConfigError, load_config
from pipeline.config.schema import RunConfig
from pipeline.manifest import EvaluationManifest
from pipeline.storage import Storage, open_storage


def decide(config: RunConfig, storage: Storage) -> tuple[str, str]:
    """(`open` or `closed`, why)."""
    folder = f"runs/{config.run_id}/evaluate"
    found = [entry.path for entry in storage.list(folder) if entry.path.rsplit("/", 1)[-1].startswith("step-")]
    if not found:
        return "closed", f"no evaluation below {storage.uri(folder)}"
    evaluation = EvaluationManifest.model_validate_json(storage.read(max(found)))
    loss, limit = evaluation.overall.loss, config.publishing.max_loss
    facts = f"step {evaluation.step}: held-out loss {loss:.4f}, {evaluation.overall.bits_per_byte:.4f} bits per byte"
    if limit is not None and loss > limit:
        return "closed", f"{facts}; publishing.max_loss is {limit:g}"
    return "open", facts


def main(arguments: list[str]) -> int:
    made = parser("gate", "May this run be published? Compares the newest evaluation with publishing.max_loss.")
    made.add_argument("--output", required=True, type=Path, help="folder for the files gate and reason")
    given = made.parse_args(arguments)
    try:
        config = load_config(given.config, given.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        gate, reason = decide(config, open_storage(config.storage))
    except (OSError, BotoCoreError) as error:
        from pipeline.workflow.rayjobs import Outcome  # here: it loads the Kubernetes client

        print(f"{config.storage.root} does not answer ({type(error).__name__}: {error})", file=sys.stderr)
        return int(Outcome.INFRASTRUCTURE)
    (given.output / "gate").write_text(gate)
    (given.output / "reason").write_text(reason)
    print(f"gate {gate}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
