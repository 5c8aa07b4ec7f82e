"""The prepared dataset to checkpoints: the stage is `jobs/stages/train.py`."""

from __future__ import annotations

import sys

from jobs.stage import main

if __name__ == "__main__":
    sys.exit(main("train"))
