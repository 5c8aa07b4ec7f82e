"""The command line that all jobs share: `--config <preset or path> [section.key=value ...]`.

Exit codes: 0 done; 1 failed; 2 wrong configuration or input, told in one line before anything starts; 3 the
run is somebody else's just now; 4 a gate before publishing is closed; 130 and 143 for SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs.first_line import LOOKING
from pipeline.config.load import load_config, preset_names, with_absolute_paths
from pipeline.config.places import places
from pipeline.config.schema import RunConfig
from pipeline.reach import check_s3
from pipeline.storage import Storage, open_storage
from pipeline.training import initial
from pipeline.workflow.heartbeat import Heartbeat


def refusing(command: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """A command that tells wrong configuration or input in one line, with exit code 2: every ValueError is meant for its user."""

    @functools.wraps(command)
    def run(arguments: Sequence[str] | None) -> int:
        try:
            return command(arguments)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run


def program(module: str) -> str:
    """What the user typed: `moonlight check`, or the module."""
    return f"moonlight {module}" if Path(sys.argv[0]).name == "moonlight" else f"python -m jobs.{module}"


class _Parser(argparse.ArgumentParser):
    """Settings may stand between options, in any order: argparse takes a list of them in one place only."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)


def parser(module: str, summary: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every job takes."""
    made = _Parser(
        prog=program(module),
        description=summary,
        epilog="Every setting is in pipeline/config/schema.py; e.g. schedule.total_tokens=2e6 corpus.unit_bytes=64MB storage.root=s3://bucket/prefix "
        "storage.endpoint_url=http://localhost:5000 corpus.sources.0.weight=0.5",
    )
    made.add_argument("--config", required=True, help=f"a YAML file, or a preset: {', '.join(preset_names())}")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a setting")
    return made


def looking(config_name: str) -> Heartbeat:
    """What the first line has said goes on, while its `with` block runs."""
    return Heartbeat(f"{config_name}: {LOOKING}")


def open_run(config_name: str, overrides: Sequence[str]) -> tuple[RunConfig, Storage]:
    """`locate`, with the initial weights that the run has pinned. Raises ConfigError, and StorageError for an S3 that does not answer."""
    config, storage = locate(config_name, overrides)
    used = [place.path for place in places(RunConfig, config.model_dump(mode="json"))]
    if any(path.startswith("s3://") for path in used):
        check_s3(config.storage)
    return initial.pinned(config, storage), storage


def locate(config_name: str, overrides: Sequence[str]) -> tuple[RunConfig, Storage]:
    """The configuration, with absolute paths, and its storage, of which nothing is read. Raises ConfigError."""
    config = with_absolute_paths(load_config(config_name, list(overrides)))
    storage = open_storage(config.storage)
    return config.model_copy(update={"storage": config.storage.model_copy(update={"root": storage.root})}), storage
