"""An evaluated checkpoint to a published model: the stage is `jobs/stages/publish.py`."""

from __future__ import annotations

import sys

from jobs.stage import main

if __name__ == "__main__":
    sys.exit(main("publish"))
