"""Look at a folder of data and write a short configuration for it that runs on this machine.

    moonlight init FOLDER [--output run.yaml]

What is in the files decides the format, the field of the text and how long the run is. Then: `moonlight check --config run.yaml`,
`moonlight run --config run.yaml`. Nothing is overwritten. Exit code 2: no data in the folder, or the output is there already.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.cli import program
from jobs.views.first_run import write


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog=program("init"), description="Look at a folder of data and write a configuration for it."
    )
    made.add_argument("folder", type=Path, help="of JSON Lines, Parquet, CSV, text ...; or one file")
    made.add_argument("--output", type=Path, default=Path("run.yaml"), help="the configuration (run.yaml)")
    given = made.parse_args(arguments)
    try:
        for line in write(given.folder, given.output):
            print(line)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
