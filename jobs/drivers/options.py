"""What a driver is told on its command line, and the environment of the one that makes RayJobs."""

from __future__ import annotations

import argparse
import textwrap

from jobs import stages

KUBERAY = """
--backend kuberay makes one RayJob a stage, <run_id>-<stage>-<attempt>, from the template of that stage, in the cluster of KUBECONFIG or of
the pod that this runs in. It can be killed and started again at any time, anywhere: it finds the RayJob and goes on watching.

  MOONLIGHT_NAMESPACE      where templates and queues are (moonlight)
  MOONLIGHT_PRIORITY       a WorkloadPriorityClass: moonlight-interactive, -scheduled or -release (moonlight-interactive)
  MOONLIGHT_ATTEMPTS       RayJobs that one call may make of a stage, each with retries of its own (1)
  MOONLIGHT_ON_TERMINATE   on SIGTERM: detach leaves the RayJob running, cancel deletes it (detach)

Its exit codes: 0 done  2 wrong configuration, or template, queue or operator missing  4 a gate is closed
  10 the stage's program failed  11 a deadline passed  12 KubeRay lost the job, or the API server or the storage stayed away  13 the RayJob was refused
  14 stopped  15 deleted  16 success without a manifest  17 Kueue gave up  143 SIGTERM, the job goes on
  (docs/kubernetes.md, "Troubleshooting")"""


def add_options(made: argparse.ArgumentParser) -> None:
    """The options of `jobs.pipeline`, beside those of every job."""
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.epilog = f"{textwrap.fill(made.epilog or '', 110)}\n{KUBERAY}"
    backend = "ray: jobs of the Ray cluster at RAY_ADDRESS or of a local one; kuberay: RayJobs, see below"
    made.add_argument("--backend", choices=["ray", "kuberay"], default="ray", help=backend)
    only = "this stage alone (its inputs must be there); follow: evaluate beside training, with --backend kuberay"
    made.add_argument("--only", choices=[*stages.names(), "follow"], help=only)
