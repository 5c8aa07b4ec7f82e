"""The command line that all jobs share: `--config <preset or path> [section.key=value ...]`.

Exit codes: 0 done; 1 failed; 2 wrong configuration or input, told in one line before anything starts; 130 and 143 for
SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipeline.config.load import expand_path, load_config, preset_names
from pipeline.config.schema import RunConfig
from pipeline.storage import Storage, open_storage
from pipeline.training import initial

SUMMARIES = {
    "prepare": "Tokenize and shard the corpus into a packed, checksummed dataset.",
    "train": "Train the model on the prepared dataset, from the newest checkpoint if there is one.",
    "evaluate": "Score a checkpoint on the held-out documents of each source, and on tasks of lm-eval.",
    "publish": "Export the evaluated checkpoint as a Hugging Face folder and promote it.",
}


def parser(module: str, summary: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every job takes."""
    made = argparse.ArgumentParser(
        prog=f"python -m jobs.{module}",
        description=summary,
        epilog="Every setting is in pipeline/config/schema.py; e.g. schedule.total_tokens=2000000 storage.root=s3://bucket/prefix "
        "storage.endpoint_url=http://localhost:5000 corpus.sources.0.weight=0.5",
    )
    made.add_argument("--config", required=True, help=f"a YAML file, or a preset: {', '.join(preset_names())}")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a setting")
    return made


def open_run(config_name: str, overrides: Sequence[str]) -> tuple[RunConfig, Storage]:
    """The configuration, with absolute folders (storage, tasks) and the initial weights that the run has pinned, and its storage.

    Raises ConfigError.
    """
    config = load_config(config_name, list(overrides))
    storage = open_storage(config.storage)
    config = config.model_copy(update={"storage": config.storage.model_copy(update={"root": storage.root})})
    if config.evaluation.task_folder is not None:  # the stage runs in another folder
        tasks = {"task_folder": expand_path(config.evaluation.task_folder)}
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=tasks)})
    return initial.pinned(config, storage), storage


def stage_main(stage: str, arguments: Sequence[str] | None = None) -> int:
    """`python -m jobs.<stage>`: do one stage on the Ray cluster at RAY_ADDRESS, or on a local one."""
    given = parser(stage, SUMMARIES[stage]).parse_args(arguments)
    from jobs import stages

    try:
        config, storage = open_run(given.config, given.overrides)
        storage.check_writable()
        if stage == "train":
            config = initial.pin(config, storage)
        records = stages.find(config, storage, stage)
        if records.done(stage):
            stages.hold_dataset(config, storage, records)
            print(f"{stage}: up to date")
            return 0
        stages.require_inputs(stage, config, storage, records)
        if stage == "evaluate":
            stages.check_tasks(config, records)
        from jobs.cluster import connect

        with connect(config):
            stages.run(stage, config, storage)
    except ValueError as error:  # ConfigError, StorageError, MissingInput, GateError: the message is the whole story
        print(f"{stage}: {error}", file=sys.stderr)
        return 2
    return 0
