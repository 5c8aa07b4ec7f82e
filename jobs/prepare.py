"""The prepare stage on Ray: raw files to a committed dataset (data_prep/prepare.py), units of work as Ray Data tasks."""

from __future__ import annotations

import sys

from jobs.cli import stage_main

if __name__ == "__main__":
    sys.exit(stage_main("prepare"))
