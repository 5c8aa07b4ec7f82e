"""Look at a folder of data and write a short configuration for it that runs on this machine.

    moonlight init FOLDER [--output run.yaml]

What is in the files decides the format, the field of the text and how long the run is. Then: `moonlight check --config run.yaml`,
`moonlight run --config run.yaml`. Nothing is overwritten. Exit code 2: no data in the folder, or the output is there already.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    from jobs.views.first_run import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
