"""Which commit of the code runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def git_commit() -> str:
    """Of the code that runs: from the image or submission, the installed package, else from the checkout; 'unknown' outside of both."""
    given = os.environ.get("MOONLIGHT_GIT_COMMIT")
    if given and given != "unknown":
        return given
    built = Path(__file__).parent / "COMMIT"  # what setup.py left in the wheel
    if built.exists():
        return built.read_text().strip()
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
