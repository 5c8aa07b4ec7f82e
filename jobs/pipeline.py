"""From raw text to a published model: the four stages as follow-on Ray jobs, each done once.

    python -m jobs.pipeline --config debug                                  everything on this machine
    ray job submit --working-dir . -- python -m jobs.pipeline --config ...  on the cluster of RAY_ADDRESS
    python -m jobs.pipeline --backend kuberay --config ...                  one KubeRay RayJob a stage

What is already done is read from storage first: a finished run costs seconds and no cluster. Kill anything at any moment and
run the same command again. The exit code is the truth: 0 only if the model is published; 2 for wrong configuration or input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.first_line import say


def main(arguments: Sequence[str] | None = None) -> int:
    say(arguments)
    from jobs.drivers.pipeline import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
