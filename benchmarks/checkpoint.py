"""Checkpoints beside `torch.distributed.checkpoint`: save, load, what the loop waits, and retention among many.

    python -m benchmarks.checkpoint [--layers 12] [--rounds 3] [--folder DIR] [--s3 100] [--loads 10 [--cold]]

One process, one thread, the state of a real network and its optimizer. Every round does each thing once, in turn (the two
kinds of loads in alternating order), into new folders that it deletes, so that all meet the same machine; figures are medians over the rounds, in MB (10^6) of state per
second of CPU (user and system, all threads) and of wall time. The first copy of a run also pays for its memory. Loads read what the page cache still holds; `--cold`: from the disk, as after a node was replaced. `--s3`
adds a save of that many MB to an S3 server (moto) in a process of its own on the same cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from benchmarks.arguments import positive
from pipeline.config.load import load_config
from pipeline.config.schema import CheckpointConfig, StorageConfig
from pipeline.manifest import CheckpointManifest
from pipeline.parallel.mesh import build_meshes
from pipeline.storage import Storage, open_storage
from pipeline.training import checkpoint as checkpoints
from pipeline.training.checkpoint import Checkpointer, load_state
from pipeline.training.commits import RunFacts, committed, manifest_path, step_folder
from pipeline.training.files import CheckpointReader
from pipeline.training.retention import Retention
from pipeline.training.trainer import build

FACTS = RunFacts("bench", {"a": 1}, "d" * 64, "o" * 64)
MANY = 10_000
SYNCHRONOUS = "save: without a copy (checkpoint.async_save false)"


class Clock:
    """`with Clock() as took: ...`: seconds of wall time and of CPU."""

    def __enter__(self) -> Clock:
        self._wall, self._cpu = time.monotonic(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.monotonic() - self._wall, time.process_time() - self._cpu


def make_state(layers: int) -> dict[str, Tensor]:
    shape = {"hidden_size": 1024, "num_hidden_layers": layers, "n_routed_experts": 24, "moe_intermediate_size": 384}
    shape |= {"intermediate_size": 2816, "vocab_size": 32768}
    overrides = [f"model.{name}={value}" for name, value in shape.items()]
    overrides += ["tokenizer.vocab_size=32768", "parallelism.shard=1", "parallelism.ep=1"]
    config = load_config("debug", overrides)
    model, optimizer = build(config, build_meshes(config.parallelism, "cpu"), torch.device("cpu"))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M parameters", flush=True)
    return {**model.state_dict(), **optimizer.state_dict()}


def saver_of(storage: Storage, asynchronous: bool) -> Checkpointer:
    return Checkpointer(storage, CheckpointConfig(async_save=asynchronous, keep=99), FACTS, torch.device("cpu"))


def save(saver: Checkpointer, state: dict[str, Tensor], step: int) -> tuple[float, CheckpointManifest]:
    """(seconds that the loop waits if its next pass takes longer than the copy, manifest)."""
    with Clock() as waited:
        saver.save(state, step=step, next_sequence=step, tokens_seen=step, loss=1.0)
    manifest = saver.settle()
    assert manifest is not None
    return waited.wall, manifest


def peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(layers: int, rounds: int, folder: str | None) -> None:
    state = make_state(layers)
    megabytes = sum(tensor.nbytes for tensor in state.values()) / 1e6
    print(f"state {megabytes:,.0f} MB", flush=True)
    took: dict[str, list[tuple[float, float]]] = {}
    waited, memory = [], {}

    def timed(name: str, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        before = peak_mib()
        with Clock() as clock:
            result = work(*arguments, **options)
        took.setdefault(name, []).append((clock.wall, clock.cpu))
        memory.setdefault(name, peak_mib() - before)
        return result

    root = tempfile.mkdtemp(dir=folder, prefix="bench-checkpoint-")
    storage = open_storage(StorageConfig(root=root))
    plain, copying = saver_of(storage, False), saver_of(storage, True)
    try:
        for number in range(rounds + 1):
            timed("save: dcp.save", dcp.save, state, checkpoint_id=f"{root}/dcp", no_dist=True)
            _, manifest = timed(SYNCHRONOUS, save, plain, state, 1)
            name = "save: with a copy, waited for at once" if number else "save: with a copy, the first of a run"
            blocked, _ = timed(name, save, copying, state, 2)
            waited.append(blocked)
            timed("load: dcp.load, unverified", dcp.load, state, checkpoint_id=f"{root}/dcp", no_dist=True)
            load_unverified(state, storage, manifest)  # whoever reads first after another folder pays for it
            loads = [("load: unverified", load_unverified), ("load: verified", load_verified)]
            for name, load in loads if number % 2 else loads[::-1]:
                timed(name, load, state, storage, manifest)
            for made in ("dcp", step_folder("bench", 1), step_folder("bench", 2)):
                storage.delete(made)
    finally:
        plain.close()
        copying.close()
        shutil.rmtree(root)
    for name, rows in took.items():
        wall, cpu = (statistics.median(column) for column in zip(*rows))
        print(
            f"{name:<52} {megabytes / cpu:7,.0f} MB per CPU-s {megabytes / wall:7,.0f} MB/s   peak memory +{memory[name]:,} MiB"
        )
    whole = statistics.median(wall for wall, _ in took[SYNCHRONOUS])
    print(
        f"`save` returns after {statistics.median(waited):.4f} s, {statistics.median(waited) / whole:.2%} of a synchronous save"
    )


def measure_loads(layers: int, times: int, folder: str | None, cold: bool) -> None:
    """Verified and unverified loads in turn, of files that lie in the page cache or none of which does; each pair in the other order
    than the one before."""
    state = make_state(layers)
    root = tempfile.mkdtemp(dir=folder, prefix="bench-checkpoint-")
    storage = open_storage(StorageConfig(root=root))
    plain = saver_of(storage, False)
    try:
        _, manifest = save(plain, state, 1)
        compare_loads(
            state, storage, manifest, times, lambda: forget(Path(root)) if cold else None, "cold" if cold else ""
        )
    finally:
        plain.close()
        shutil.rmtree(root)


def compare_loads(
    state: dict[str, Tensor],
    storage: Storage,
    manifest: CheckpointManifest,
    times: int,
    before: Callable[[], None],
    where: str,
) -> None:
    """Loads in turn, `before` ahead of each, and their rates."""
    size = sum(tensor.nbytes for tensor in state.values()) / 1e6
    took: dict[str, list[Clock]] = {"unverified": [], "verified": []}
    pairs = [("unverified", load_unverified), ("verified", load_verified)]
    for _, load in pairs:  # whoever reads first pays for it
        load(state, storage, manifest)
    for number in range(times):
        for name, load in pairs if number % 2 else pairs[::-1]:
            before()
            with Clock() as clock:
                load(state, storage, manifest)
            took[name].append(clock)
    for unit, seconds in (("MB per CPU-s", lambda each: each.cpu), ("MB/s", lambda each: each.wall)):
        rates = {name: [size / seconds(each) for each in clocks] for name, clocks in took.items()}
        ratios = [verified / plain for verified, plain in zip(rates["verified"], rates["unverified"])]
        print(
            f"{f'{where} ' if where else ''}load of {size:,.0f} MB, {times} times in turn, {unit}: "
            f"unverified {statistics.median(rates['unverified']):,.0f}, "
            f"verified {statistics.median(rates['verified']):,.0f}; ratio of pairs {min(ratios):.2f} to {max(ratios):.2f}, "
            f"median {statistics.median(ratios):.2f}",
            flush=True,
        )


def forget(root: Path) -> None:
    """Out of the page cache with all files of a folder."""
    for path in root.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)  # only what lies on the disk can go
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def load_verified(state: dict[str, Tensor], storage: Storage, manifest: CheckpointManifest) -> None:
    load_state(state, storage, manifest, None)


def load_unverified(state: dict[str, Tensor], storage: Storage, manifest: CheckpointManifest) -> None:
    reader = CheckpointReader(storage, manifest, check=False)
    checkpoints.load_tensors(state, reader, None, lambda stored: None)


def measure_many(folder: str | None) -> None:
    """`committed` and `collect` among few and many checkpoints that are kept for good."""
    root = tempfile.mkdtemp(dir=folder, prefix="bench-checkpoint-")
    storage = open_storage(StorageConfig(root=root))
    manifest = CheckpointManifest(
        run_id="bench", run_identity="r", step=1, next_sequence=1, tokens_seen=1, dataset_digest="d", order_digest="o",
        content_sha256="c", files=(), loss=1.0, world_size=64,
    )  # fmt: skip
    try:
        done = 0
        for count in (10, MANY):
            for step in range(done + 1, count + 1):
                path = Path(storage.key(manifest_path("bench", step)))
                path.parent.mkdir(parents=True)
                path.write_bytes(manifest.model_copy(update={"step": step}).to_json() if step == count else b"{}")
            done = count
            kept = Retention(storage, "bench", CheckpointConfig(keep=3, keep_every=1), frozenset())
            looks, collects = [], []
            for _ in range(9):
                with Clock() as look:
                    assert committed(storage, "bench")[-1].step == count
                with Clock() as collect:
                    assert kept.collect(count) == []
                looks.append(look)
                collects.append(collect)
            print(
                f"{count:>6,} checkpoints: the newest one {_milliseconds(looks)}, retention when a run begins "
                f"{_milliseconds(collects[:1])}, at each save {_milliseconds(collects[1:])}",
                flush=True,
            )
    finally:
        shutil.rmtree(root)


def _milliseconds(took: list[Clock]) -> str:
    cpu, wall = statistics.median(each.cpu for each in took), statistics.median(each.wall for each in took)
    return f"{1e3 * cpu:.2f} ms of CPU ({1e3 * wall:.2f} ms)"


def serve(pipe: Any) -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    pipe.send(server.get_host_and_port())
    pipe.recv()
    server.stop()


def measure_s3(megabytes: int, times: int) -> None:
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs,))
    process.start()
    try:
        host, port = ours.recv()
        storage = open_storage(StorageConfig(root="s3://bench/root", endpoint_url=f"http://{host}:{port}"))
        storage.fs.mkdir("bench")
        state = {f"layers.{index}": torch.randn(1024, 1000) for index in range(max(1, megabytes // 4))}
        size = sum(tensor.nbytes for tensor in state.values()) / 1e6
        save(saver_of(storage, True), state, 1)
        with Clock() as whole:
            save(saver_of(storage, False), state, 2)
        waited, manifest = save(saver_of(storage, True), state, 3)
        print(
            f"S3, {size:,.0f} MB: a synchronous save {size / whole.wall:,.0f} MB/s; `save` returns after "
            f"{waited:.4f} s, {waited / whole.wall:.2%} of it"
        )
        compare_loads(state, storage, manifest, times, lambda: None, "S3,")
    finally:
        ours.send(None)
        process.join()


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--layers", type=positive, default=12, help="of a network of 34 M parameters a layer")
    made.add_argument("--rounds", type=positive, default=3)
    made.add_argument("--folder", help="where to write; default: the temporary folder")
    made.add_argument("--s3", type=positive, default=0, metavar="MB")
    made.add_argument(
        "--loads",
        type=positive,
        default=0,
        metavar="TIMES",
        help="measure loads alone, so often; of the S3 server with --s3",
    )
    made.add_argument("--cold", action="store_true", help="with --loads: nothing of it is in the page cache")
    given = made.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if given.loads and given.s3:
        measure_s3(given.s3, given.loads)
        return
    if given.loads:
        measure_loads(given.layers, given.loads, given.folder, given.cold)
        return
    measure_many(given.folder)
    if given.s3:
        measure_s3(given.s3, given.rounds)
    measure(given.layers, given.rounds, given.folder)


if __name__ == "__main__":
    main()
