"""Keep a cluster's logs: copy Ray's session logs into the run's folder while the cluster lives, and once more when it goes.

`python -m jobs.logs --name <RayJob> --config <preset or path> [section.key=value ...]` runs beside the head of a stage (container `logs` in
k8s/stages) and writes `<root>/runs/<run_id>/logs/<RayJob>/<cluster>/<pod>/<file>`: a retry is another cluster, a head that came back another pod.
Logs must never take a stage down, so this ends only on SIGTERM.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    from jobs.on_ray.logs import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
