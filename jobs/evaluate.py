"""A checkpoint to its scores: the stage is `jobs/stages/evaluate.py`."""

from __future__ import annotations

import sys

from jobs.stage import main

if __name__ == "__main__":
    sys.exit(main("evaluate"))
