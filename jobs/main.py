"""The console command `moonlight`: every job as a subcommand, also `python -m jobs`.

    moonlight init my-run          look at your data and write my-run/run.yaml
    moonlight check --config ...   what can be wrong, before anything is started
    moonlight run --config ...     the whole pipeline

Each is the module `jobs.<name>` (`python -m jobs.<name>`), loaded when it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from functools import partial

from jobs.commit import git_commit

COMMANDS = {
    "init": "look at a folder of data and write a configuration for it",
    "check": "what can be wrong, and a look into the data, before anything is started",
    "data": "what filters and rules would do to a thousand documents of each source",
    "run": "all stages, each done once",
    "status": "where a run stands",
    "runs": "the runs of a storage, a line each",
    "report": "the page of a run, or several runs laid over each other",
    "ladder": "how loss falls with compute for Muon and AdamW, at several sizes",
    "profile": "a close look at some steps of a run that is training",
    "track": "send a run's records to its trackers",
    "dashboards": "Prometheus and Grafana with our boards, beside the Ray of this machine",
    "plan": "memory, traffic, time, storage and cost, before a GPU is rented",
    "verify": "prove a dataset: every checksum, count and invariant",
    "inspect": "which documents formed a step, a row as text, the mixture",
    "generate": "what a published model says after a prompt",
    "chat": "a conversation with a published model",
    "release": "let somebody else do a stage of a run, whoever is at work on it now",
    "gate": "may this run be published?",
    "models": "published versions: list, show, diff, promote, rollback",
    "logs": "keep a cluster's logs in the run's folder",
}

# stages that are modules of jobs as well, for `python -m jobs.train`
ENTRIES = ("prepare", "train", "evaluate", "publish")


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(f"moonlight {importlib.metadata.version('moonlight-pipeline')}, commit {git_commit()}")
        return 0
    command = _command(given[0])
    if command is None:
        print(f"moonlight: no command {given[0]!r}; commands are {', '.join([*COMMANDS, *_stages()])}", file=sys.stderr)
        return 2
    return command(given[1:])


def usage() -> str:
    """All commands, a line each; the stages as `jobs.stages` lists them."""
    lines = [f"  {name:<10} {text}" for name, text in [*COMMANDS.items(), *_stages().items()]]
    options = "  --version  version and commit\n  COMMAND --help"
    return "\n".join(
        ["usage: moonlight COMMAND [--config PRESET_OR_FILE] [section.key=value ...]", "", *lines, "", options]
    )


def _stages() -> dict[str, str]:
    from jobs import stages  # here: --version needs none of it

    return {stage.NAME: stage.SUMMARY[0].lower() + stage.SUMMARY[1:].rstrip(".") for stage in stages.STAGES}


def _command(name: str) -> Callable[[Sequence[str]], int] | None:
    if name in COMMANDS or name in ENTRIES:  # without importing the stages: nothing heavy comes before the first line
        found: Callable[[Sequence[str]], int] = importlib.import_module(
            f"jobs.{'pipeline' if name == 'run' else name}"
        ).main
        return found
    if name in _stages():
        from jobs.stage import main as stage_main

        return partial(stage_main, name)
    return None


if __name__ == "__main__":
    sys.exit(main())
