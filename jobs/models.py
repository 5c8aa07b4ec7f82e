"""The published versions of a model, and which one is in use.

    python -m jobs.models --config <preset or path> list               every version, the promoted one marked
    python -m jobs.models --config <preset or path> show [VERSION]     where it comes from: down to the raw files
    python -m jobs.models --config <preset or path> diff A [B]         settings, data, scores and tensors; B: the promoted one
    python -m jobs.models --config <preset or path> history            every move of the pointer, who and when
    python -m jobs.models --config <preset or path> promote VERSION    point latest.json at it, if the gates of the configuration are open
    python -m jobs.models --config <preset or path> rollback [VERSION] point it back, by default at the version promoted before

The model is `publishing.name` of the configuration. `--because TEXT` goes into the history; `--force` promotes past a closed gate and
needs it. Exit codes: 2 wrong configuration, no such version, damaged files; 4 a gate is closed.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from jobs.cli import locate, parser
from jobs.drivers.failures import CLOSED
from jobs.views.models import WHAT, act, understood
from pipeline.publishing.gate import GateError


def main(arguments: Sequence[str] | None = None) -> int:
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
    try:
        config, storage = locate(given.config, [word for word in given.overrides if "=" in word])
        for line in act(what, config, storage, because=given.because, force=given.force):
            print(line, flush=True)
    except GateError as error:
        print(f"error: {error}", file=sys.stderr)
        return CLOSED
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is fine
    sys.exit(main())
