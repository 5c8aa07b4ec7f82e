"""Which commit of the code runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def git_commit() -> str:
    """Of the code that runs: from the image or submission, else from the checkout; 'unknown' outside of both."""
    given = os.environ.get("MOONLIGHT_GIT_COMMIT")
    if given and given != "unknown":
        return given
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
