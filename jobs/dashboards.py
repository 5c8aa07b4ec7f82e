"""A Prometheus and a Grafana of this machine, with our boards, beside the Ray that runs on it.

    python -m jobs.dashboards [--ray FOLDER] [--prometheus-port 9090] [--grafana-port 3000]

Where they are installed; without a Grafana the boards wait for one in Ray's folder. They end with the command, or with Ray. Exit code 2:
no Prometheus, no Ray on this machine, or a port that is taken.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    from jobs.views.dashboards import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
