"""kubectl, and what every check says: one row of the table."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Answer(NamedTuple):
    code: int
    text: str  # stdout, or stderr where the command failed


class Row(NamedTuple):
    check: str
    verdict: str  # passed, FAILED, skipped
    detail: str = ""


Kubectl = Callable[[Sequence[str], str | None], Answer]
Pause = Callable[[float], None]


def kubectl(arguments: Sequence[str], given: str | None = None) -> Answer:
    """In a session of its own: Ctrl-C is this program's to answer, or it would also end the commands that clean up."""
    done = subprocess.run(
        ["kubectl", *arguments], input=given, capture_output=True, text=True, check=False, start_new_session=True
    )
    return Answer(done.returncode, done.stdout if done.returncode == 0 else done.stderr.strip())


def judged(check: str, good: bool, detail: str = "") -> Row:
    return Row(check, "passed" if good else "FAILED", detail)


def wait_for(read: Callable[[], str], wanted: Callable[[str], bool], patience_s: float, pause: Pause) -> str:
    """The last answer: one that is wanted, or what there was when patience ended."""
    seen, waited = read(), 0.0
    while not wanted(seen) and waited < patience_s:
        pause(5.0)
        seen, waited = read(), waited + 5.0
    return seen
