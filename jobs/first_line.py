"""The first line of a command, before anything slow: what else it imports, storage, Ray. So this module imports next to nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

LOOKING = "looking at its run and its data"


def say(arguments: Sequence[str] | None, doing: str = LOOKING, file: TextIO | None = None) -> None:
    """`debug: looking at its run and its data`, of the `--config` among the arguments (None: the process's own).

    Nothing where help is asked for or no configuration is named: argparse will speak.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    config = config_of(given)
    if config is not None and not {"-h", "--help"} & set(given):
        print(f"{config}: {doing}", file=file or sys.stdout, flush=True)


def config_of(arguments: Sequence[str]) -> str | None:
    """As argparse reads it: `--config x` or `--config=x`, or shortened; the last one counts."""
    found = None
    for word, following in zip(arguments, [*arguments[1:], None]):
        option, equals, value = word.partition("=")
        if len(option) > 2 and "--config".startswith(option):
            found = value if equals else following
    return found
