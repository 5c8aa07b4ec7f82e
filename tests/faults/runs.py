"""The run that all faults happen to, on two ranks: a network of every kind of layer, a corpus of two sources, 16 steps.

`train` starts it as `torchrun --nproc-per-node 2 -m pipeline.training ...` would, each rank a process of its own, but forked from a
process that has imported torch already. A fault is a function that runs in a rank before its `main` does.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_prep.prepare import prepare
from pipeline.config.load import load_config
from pipeline.config.schema import StorageConfig
from pipeline.manifest import TrainManifest
from pipeline.storage import Storage
from pipeline.training.commits import committed, train_folder
from tests.data_prep.faulty_s3 import FaultyS3

RUN = "faults"
STEPS, EVERY = 16, 4  # steps; of these between two checkpoints
SEQUENCE, BATCH = 32, 8
GRACE_S = 30.0  # of ranks whose peer has refused
LIMIT_S = 480.0  # for one start of a run, on a machine that is busy with others
# Of a run that is met at work without being slowed down.
LONG_STEPS, LONG_EVERY = 400, 20
LONG = (f"schedule.total_tokens={LONG_STEPS * BATCH * SEQUENCE}", f"checkpoint.every_steps={LONG_EVERY}")
RANKS = 2
DATA = {"sequence_length": SEQUENCE, "rows_per_group": 4, "groups_per_file": 8, "lanes": 4, "mixture_block": 4, "window_blocks": 2, "max_padding": 1.0}  # fmt: skip
MODEL = {
    "vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "intermediate_size": 24, "moe_intermediate_size": 8, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "max_position_embeddings": SEQUENCE,
}  # fmt: skip

Harm = Callable[[int], None]  # given the rank
now = time.time  # as it is when nobody has changed the clock


def prepare_corpus(folder: Path) -> Path:
    """`texts/`, `run.yaml` and a prepared `root/` in the folder."""
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    sources = []
    for number, name in enumerate(("code", "more-code")):
        (folder / "texts" / name).mkdir(parents=True)
        for path in [path for path in library if 500 < path.stat().st_size < 8_000][number::2][:20]:
            (folder / "texts" / name / path.name).write_text(path.read_text())
        sources.append({"name": name, "path": str(folder / "texts" / name), "format": "text", "weight": 2 - number, "max_epochs": 99.0})  # fmt: skip
    tokens = STEPS * BATCH * SEQUENCE
    values = {
        "run_id": RUN,
        "tokenizer": {"vocab_size": MODEL["vocab_size"], "training_bytes": 100_000},
        "corpus": {"sources": sources, "unit_bytes": 50_000, "heldout_fraction": 0.1, "heldout_max_documents": 4},
        "data": DATA,
        "model": MODEL,
        "schedule": {
            "total_tokens": tokens,
            "learning_rate": [{"until": "100%", "shape": "linear", "start": 0.01, "end": 0.001}],
            "global_batch": [{"until": "100%", "sequences": BATCH}],
            "bias_rate": [{"until": "100%", "rate": 0.01}],
        },
        "parallelism": {"shard": 2, "ep": 2},
        "training": {"sequence_length": SEQUENCE, "micro_batch": 2, "log_every": 1, "step_timeout_s": 100.0},
        "checkpoint": {"every_steps": EVERY, "keep": 2},
        "evaluation": {"max_tokens_per_source": 400, "batch": 4},
        "publishing": {
            "name": RUN,
            "dtype": "fp32",
            "sample_tokens": 4,
            "beats_frequencies": False,
        },  # 16 steps learn little
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    config = load_config(str(folder / "run.yaml"), [f"storage.root={folder / 'root'}"])
    prepare(config, Storage(config.storage))
    return folder


@dataclass
class Place:
    """Where a run lies, and the command that trains it there."""

    name: str
    corpus: Path
    folder: Path  # for logs
    config: StorageConfig
    proxy: FaultyS3 | None

    @property
    def storage(self) -> Storage:
        return Storage(self.config)

    def settings(self, *more: str) -> list[str]:
        """--config and overrides of every command."""
        where = [("root", self.config.root), ("endpoint_url", self.config.endpoint_url), ("region", self.config.region)]
        return [
            "--config",
            str(self.corpus / "run.yaml"),
            *(f"storage.{key}={value}" for key, value in where if value),
            *more,
        ]

    def training_arguments(self, *more: str) -> list[str]:
        """Of `python -m pipeline.training`."""
        (dataset,) = [info.path for info in self.storage.list("datasets") if info.path.endswith("/dataset.json")]
        return ["--dataset", dataset, *self.settings(*more)]

    def train(self, *more: str, harm: Harm | None = None, ranks: int = RANKS) -> Started:
        arguments = self.training_arguments(*more)
        return Started(arguments, ranks, harm, self.folder / f"log-{len(list(self.folder.glob('log-*')))}")

    def steps(self) -> list[int]:
        """Of the committed checkpoints."""
        return [manifest.step for manifest in committed(self.storage, RUN)]

    def manifest(self, run_id: str = RUN) -> TrainManifest:
        path = f"{train_folder(run_id)}/manifest.json"
        return TrainManifest.parse(self.storage.read(path), path)


@dataclass
class Line:
    time: float
    text: str


STEP = re.compile(r"(?:step |train .*?)(\d+)/\d+")


class Log:
    """What a command prints, with the time of each line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    @property
    def lines(self) -> list[Line]:
        found = []
        for line in self.path.read_text(errors="replace").splitlines():
            stamp, _, text = line.partition(" ")
            found.append(
                Line(float(stamp), text) if stamp.replace(".", "").isdigit() and "." in stamp else Line(0.0, line)
            )
        return found

    @property
    def text(self) -> str:
        return "\n".join(line.text for line in self.lines)

    def steps(self) -> list[tuple[float, int]]:
        """(time, step) of each line that reports one."""
        return [(line.time, int(match.group(1))) for line in self.lines if (match := STEP.match(line.text))]

    def reached(self) -> int:
        return max((step for _, step in self.steps()), default=0)


class Stamped:
    """A text stream that puts the time in front of every line."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1)  # noqa: SIM115
        self._begun = True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self._file.write(f"{now():.3f} {line}" if self._begun else line)
            self._begun = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def isatty(self) -> bool:
        return False


@dataclass
class Started:
    """A run that was started on some ranks. As a launcher does, `wait` ends the other ranks when one has failed."""

    arguments: list[str]
    ranks: int
    harm: Harm | None
    path: Path
    codes: list[int | None] = field(default_factory=list)
    ended: float = 0.0  # UNIX time of the first rank's end

    def __post_init__(self) -> None:
        self.log = Log(self.path)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["tests.faults.runs", "torch", "pipeline.training.__main__", "s3fs", "pyarrow.parquet"]
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(self.ranks)}
        environment |= {"LOCAL_WORLD_SIZE": str(max(self.ranks, 2)), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        self.processes = []
        for rank in range(self.ranks):
            here = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(
                target=_rank, args=(self.arguments, here, self.harm, rank, str(self.path)), daemon=True
            )
            process.start()
            self.processes.append(process)

    def wait(self, limit: float = LIMIT_S) -> list[int | None]:
        """Exit codes by rank. After the first that is not 0 the others have a moment, then SIGKILL."""
        deadline = time.monotonic() + limit
        while any(process.is_alive() for process in self.processes):
            failed = [process.exitcode for process in self.processes if process.exitcode not in (None, 0)]
            if failed and not self.ended:
                self.ended = now()
                deadline = min(deadline, time.monotonic() + (0.0 if -signal.SIGKILL in failed else GRACE_S))
            if time.monotonic() > deadline:
                for process in self.processes:
                    process.kill()
            multiprocessing.connection.wait([process.sentinel for process in self.processes if process.is_alive()], 0.2)
        self.ended = self.ended or now()
        self.codes = [process.exitcode for process in self.processes]
        return self.codes

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def wait_for(self, condition: Callable[[], Any], limit: float = LIMIT_S) -> None:
        """Until it holds. Fails if the run ends first."""
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline, self.log.text
            assert all(process.is_alive() for process in self.processes), self.log.text
            time.sleep(0.05)


def _rank(arguments: list[str], environment: dict[str, str], harm: Harm | None, rank: int, log: str) -> None:
    os.environ.update(environment)
    for name in ("stdout", "stderr"):
        setattr(sys, name, Stamped(log))
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    from pipeline.training.__main__ import main

    if harm is not None:
        harm(rank)
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


def plain_environment() -> dict[str, str]:
    """Of a command of its own: nothing of a Ray that a test has joined."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


class Reference:
    """Undisturbed runs by their settings."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self._corpus, self._folder = corpus, folder
        self._known: dict[tuple[Any, ...], TrainManifest] = {}

    def __call__(self, *more: str, harm: Harm | None = None, ranks: int = RANKS) -> TrainManifest:
        """What the run ends with if nothing (or only `harm`) happens to it."""
        key = (more, ranks, repr(harm))
        if key not in self._known:
            folder = self._folder / str(len(self._known))
            shutil.copytree(self._corpus / "root", folder / "root")
            place = Place("folder", self._corpus, folder, StorageConfig(root=str(folder / "root")), None)
            started = place.train(*more, harm=harm, ranks=ranks)
            assert started.wait() == [0] * ranks, started.log.text
            self._known[key] = place.manifest()
        return self._known[key]


def same(place: Place, expected: TrainManifest) -> str:
    """'yes' if the run that lies there ended with the same weights, checkpoint record and metrics, and nothing besides."""
    found = place.manifest()
    assert found.checkpoint.content_sha256 == expected.checkpoint.content_sha256
    assert found.digest == expected.digest
    assert found.metrics == expected.metrics
    if place.name == "folder":
        left = [path for path in Path(place.config.root).rglob("*.tmp-*") if not path.name.endswith(".tmp-lock")]
        assert left == []
    return "yes"


def one_line(text: str, path: str = "") -> str:
    """The line in which a command refuses, each rank for itself, no traceback beside it. All of them name the path."""
    assert "Traceback" not in text, text
    found = {line for line in text.splitlines() if line.startswith("error: ")}
    assert found, text
    assert all(path in line for line in found), text
    assert path or len(found) == 1, text
    return found.pop()


def lost(before: Log, fault: float, resumed: int, after: Log) -> tuple[int, float]:
    """(steps that were trained again, seconds from the fault until the run was where it had been)."""
    reached = max((step for when, step in before.steps() if when <= fault + 0.5), default=0)
    back = next((when for when, step in after.steps() if step >= reached), None)
    return max(reached - resumed, 0), max((back or fault) - fault, 0.0)
