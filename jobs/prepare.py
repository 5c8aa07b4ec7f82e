"""Raw files to a committed dataset: the stage is `jobs/stages/prepare.py`."""

from __future__ import annotations

import sys

from jobs.stage import main

if __name__ == "__main__":
    sys.exit(main("prepare"))
