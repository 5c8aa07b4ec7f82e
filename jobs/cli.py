"""The command line that all jobs share: `--config <preset or path> [section.key=value ...]`.

Exit codes: 0 done; 1 failed; 2 wrong configuration or input, told in one line before anything starts; 3 the
run is somebody else's just now; 4 a gate before publishing is closed; 130 and 143 for SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.load import expand_path, load_config, preset_names
from pipeline.config.schema import CorpusConfig, RunConfig
from pipeline.reach import check_s3
from pipeline.storage import Storage, open_storage
from pipeline.training import initial
from pipeline.workflow.heartbeat import Heartbeat


def program(module: str) -> str:
    """What the user typed: `moonlight check`, or the module."""
    return f"moonlight {module}" if Path(sys.argv[0]).name == "moonlight" else f"python -m jobs.{module}"


def parser(module: str, summary: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every job takes."""
    made = argparse.ArgumentParser(
        prog=program(module),
        description=summary,
        epilog="Every setting is in pipeline/config/schema.py; e.g. schedule.total_tokens=2e6 corpus.unit_bytes=64MB storage.root=s3://bucket/prefix "
        "storage.endpoint_url=http://localhost:5000 corpus.sources.0.weight=0.5",
    )
    made.add_argument("--config", required=True, help=f"a YAML file, or a preset: {', '.join(preset_names())}")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a setting")
    return made


def looking(config_name: str) -> Heartbeat:
    """The first line of a driver, before anything slow: reading storage and data, Ray and what else is heavy to import."""
    what = f"{config_name}: looking at its run and its data"
    print(what, flush=True)
    return Heartbeat(what)


def open_run(config_name: str, overrides: Sequence[str]) -> tuple[RunConfig, Storage]:
    """`locate`, with the initial weights that the run has pinned. Raises ConfigError, and StorageError for an S3 that does not answer."""
    config, storage = locate(config_name, overrides)
    places = [
        config.storage.root,
        config.tokenizer.path,
        config.evaluation.task_folder,
        config.training.initial_weights,
    ]
    if any(place and place.startswith("s3://") for place in (*places, *(each.path for each in config.corpus.sources))):
        check_s3(config.storage)
    return initial.pinned(config, storage), storage


def locate(config_name: str, overrides: Sequence[str]) -> tuple[RunConfig, Storage]:
    """The configuration, with absolute paths, and its storage, of which nothing is read. Raises ConfigError."""
    config = load_config(config_name, list(overrides))
    storage = open_storage(config.storage)
    found = {"storage": config.storage.model_copy(update={"root": storage.root}), "corpus": _corpus(config.corpus)}
    for section, key in (("evaluation", "task_folder"), ("tokenizer", "path"), ("training", "initial_weights")):
        path = getattr(getattr(config, section), key)
        if path is not None and (
            key != "initial_weights" or path.startswith("~")
        ):  # others are below the storage's root
            found[section] = getattr(config, section).model_copy(update={key: _absolute(path)})
    return config.model_copy(update=found), storage


def _corpus(corpus: CorpusConfig) -> CorpusConfig:
    sources = tuple(source.model_copy(update={"path": _absolute(source.path)}) for source in corpus.sources)
    return corpus.model_copy(update={"sources": sources})


def _absolute(path: str) -> str:
    """Stages run in other folders. What stands for a folder of the Python that runs them stays."""
    return path if path.startswith("{") else expand_path(path)
