"""The command line that all jobs share: `--config <preset or path> [section.key=value ...]`.

Exit codes: 0 done; 1 failed; 2 wrong configuration or input, told in one line before anything starts; 130 and 143 for
SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pipeline.config.load import expand_path, load_config, preset_names
from pipeline.config.schema import RunConfig
from pipeline.storage import Storage, open_storage
from pipeline.training import initial


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
    """`locate`, with the initial weights that the run has pinned. Raises ConfigError."""
    config, storage = locate(config_name, overrides)
    return initial.pinned(config, storage), storage


def locate(config_name: str, overrides: Sequence[str]) -> tuple[RunConfig, Storage]:
    """The configuration, with absolute folders (storage, tasks), and its storage, of which nothing is read. Raises ConfigError."""
    config = load_config(config_name, list(overrides))
    storage = open_storage(config.storage)
    config = config.model_copy(update={"storage": config.storage.model_copy(update={"root": storage.root})})
    if config.evaluation.task_folder is not None:  # the stage runs in another folder
        tasks = {"task_folder": expand_path(config.evaluation.task_folder)}
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=tasks)})
    return config, storage
