"""`python -m pipeline.training --config <preset or path> --dataset <dataset.json> [section.key=value ...]`

Trains without Ray, in one process or under `torchrun --nproc-per-node N -m pipeline.training ...`. The dataset must
exist; `--dataset` is the path of its manifest below the storage root (`datasets/<digest>/dataset.json`).

The same command goes on from the newest checkpoint, on any number of ranks. Exit codes of a rank (torchrun's own is 1
whatever its ranks' were):
  0  the run is complete
  1  the run cannot go on by itself, one line says why
  2  the configuration or the data is wrong, one line says how
  3  stopped by SIGTERM or SIGINT after committing a checkpoint, or the run is somebody else's just now
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from typing import Any

import torch
import torch.distributed as dist
from botocore.exceptions import BotoCoreError

from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.lease import Held, LeaseLost
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage, open_storage, said_by_storage
from pipeline.training import initial
from pipeline.training.commits import committed_steps
from pipeline.training.guard import RunDiverged
from pipeline.training.metrics import TrainProgress
from pipeline.training.trainer import TrainingStopped, train
from pipeline.workflow.duration import duration

FAILED, BAD_INPUT, STOPPED = 1, 2, 3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="preset name or YAML file")
    parser.add_argument("--dataset", required=True, help="path of dataset.json below the storage root")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings in place of the configuration's"
    )
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a checkpoint of one process is meant
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        config = load_config(given.config, given.overrides)
        storage = open_storage(config.storage)
        storage.check_writable()
        dataset = read_dataset(storage, given.dataset)
        config = initial.pin(config, storage)
        initial.check(config, storage, dataset.tokenizer.sha256)
        join_ranks(config)
        config = config.at_size(dist.get_world_size() if dist.is_initialized() else 1)
        if int(os.environ.get("RANK", "0")) == 0:
            print(start_line(config, storage), flush=True)
        manifest = train(config, dataset, storage, report=show, should_stop=stop.is_set)
    except TrainingStopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    except (Held, LeaseLost) as error:
        print(error, file=sys.stderr)
        return STOPPED
    except (ValueError, RunDiverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, ValueError) else FAILED
    except (OSError, BotoCoreError) as error:
        print(f"error: {said_by_storage(error)}", file=sys.stderr)
        return FAILED
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        print(f"rank {os.environ.get('RANK', '0')}: another rank has left; what it says says why", file=sys.stderr)
        return FAILED
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"complete: {manifest.steps} steps, checkpoint {manifest.checkpoint.content_sha256}")
    return 0


def lost_peer(error: RuntimeError) -> bool:
    """Is this what gloo or NCCL says in the middle of a collective when another process has ended?"""
    said = str(error)
    return any(
        words in said for words in ("Connection closed by peer", "Connection reset by peer", "remote process exited")
    )


def read_dataset(storage: Storage, path: str) -> DatasetManifest:
    """Raises ValueError if there is no such manifest, or it is damaged."""
    try:
        return DatasetManifest.parse(storage.read(path), storage.uri(path))
    except FileNotFoundError:
        raise ValueError(f"--dataset {path}: nothing at {storage.uri(path)}; run the prepare stage first") from None


def join_ranks(config: RunConfig) -> None:
    """Join the group that torchrun's environment describes; one process needs none on CPU, and a group of one on CUDA."""
    if config.cluster.use_gpu:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"cluster.use_gpu true: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here, but rank "
                f"{local_rank} of this machine wants one; start fewer ranks, use a machine and a build of torch with CUDA, "
                "or set cluster.use_gpu=false"
            )
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if config.cluster.use_gpu else "gloo"
    options: dict[str, Any] = {}
    if "RANK" not in os.environ:
        if not config.cluster.use_gpu:
            return
        options = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    elif not config.cluster.use_gpu:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        options = own_part_of_store(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    dist.init_process_group(backend, **options)


def own_part_of_store(rank: int, world_size: int) -> dict[str, Any]:
    """Where the ranks of this attempt meet: torchrun starts a group again on the same store, which still has the addresses of the dead
    (findings/torchrun_restart_meets_the_dead.sh)."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
    return {"store": own, "rank": rank, "world_size": world_size}


def start_line(config: RunConfig, storage: Storage) -> str:
    """Which run, on what, from where."""
    parallelism = config.parallelism
    saved = committed_steps(storage, config.run_id)  # which of them is sound the ranks will see
    return (
        f"run {config.run_id}: {config.schedule.total_tokens:,} tokens on {parallelism.world_size} "
        f"{'GPUs' if config.cluster.use_gpu else 'CPU ranks'} (replicate {parallelism.replicate}, shard {parallelism.shard}, "
        f"ep {parallelism.ep}), " + (f"going on after step {saved[-1]}" if saved else "from the beginning")
    )


def show(progress: TrainProgress) -> None:
    left = "?" if progress.eta_s is None else duration(progress.eta_s)
    skipped = f"  {progress.skipped_steps} skipped" if progress.skipped_steps else ""
    print(
        f"step {progress.step}/{progress.steps}  loss {progress.loss:.4f}  "
        f"{progress.tokens_per_second:,.0f} tokens/s  {left} left{skipped}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
