"""`jobs.models`: from its command line to its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.cli import locate, parser, refusing
from jobs.drivers.failures import CLOSED
from jobs.views.models import WHAT, act, understood
from pipeline.publishing.gate import GateError


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """`jobs.models`, of `publishing.name`. Returns the exit code: 2 also for no such version and damaged files."""
    made = parser("models", "The published versions of a model, and which one is in use.")
    made.add_argument("--because", default="", metavar="TEXT", help="why, for the history")
    made.add_argument("--force", action="store_true", help="promote although a gate is closed; needs --because")
    made.usage = f"{made.prog} --config CONFIG [section.key=value ...] [--because TEXT] [--force] {WHAT}"
    given = made.parse_args(arguments)
    what = [word for word in given.overrides if "=" not in word]
    if not understood(what):
        made.error(f"{' '.join(what) or 'nothing'} is asked for; ask for {WHAT}")
    if given.force and not given.because:
        made.error("--force needs --because: the history says why")
    config, storage = locate(given.config, [word for word in given.overrides if "=" in word])
    try:
        for line in act(what, config, storage, because=given.because, force=given.force):
            print(line, flush=True)
    except GateError as error:
        print(f"error: {error}", file=sys.stderr)
        return CLOSED
    return 0
