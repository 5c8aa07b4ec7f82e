"""A published folder from a 4-rank checkpoint beside `save_pretrained`: MB/s, memory of a worker, the same bytes for any number.

    python -m benchmarks.export [--layers 14] [--workers 1 2 4] [--rounds 2] [--folder DIR]

A network of about 10^9 random parameters is saved by four processes as training on 4 ranks saves it, without the optimizer's state.
In each round every number of Ray tasks writes the weight files anew (jobs/on_ray/publish.py), and `save_pretrained` writes the same
model from memory in files of the same size at most; all of them in bf16. Ours reads a checkpoint in fp32, checks it, rounds, hashes every
file for the manifest, syncs it to the disk and reads it back; the peer starts from tensors in memory and does none of that. `bare` is
ours without checks, hashes, sync and reading back, by 2 workers: what remains beside the peer's work is reading and rounding. The peer's
loading of the model, which ours has no need of, is timed apart and not counted. Ray and its workers are up before (`warm`), as is transformers.
CPU seconds are those of all workers. Memory is the highest of any worker of that number, above what a worker holds once its code is there,
and in all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import positive
from pipeline.config.load import load_config
from pipeline.config.schema import RunConfig
from pipeline.manifest import CheckpointManifest

RANKS = 4
SHARD_BYTES = 256_000_000


def configuration(root: str, layers: int) -> RunConfig:
    shape = {"hidden_size": 1024, "num_hidden_layers": layers, "n_routed_experts": 32, "moe_intermediate_size": 704}
    shape |= {"intermediate_size": 5632, "vocab_size": 32768, "num_attention_heads": 8, "kv_lora_rank": 256}
    overrides = [f"model.{name}={value}" for name, value in shape.items()]
    overrides += [
        f"parallelism.shard={RANKS}",
        "parallelism.ep=2",
        "training.micro_batch=1",
        "tokenizer.vocab_size=32768",
        "run_id=bench",
    ]
    overrides += [f"storage.root={root}", f"publishing.shard_bytes={SHARD_BYTES}", "publishing.dtype=bf16"]
    return load_config("debug", overrides)


def save_rank(rank: int, root: str, layers: int, pipe: Any) -> None:
    import torch.distributed as dist

    from pipeline.config.schema import CheckpointConfig
    from pipeline.model.moonlight import Moonlight
    from pipeline.parallel.mesh import build_meshes
    from pipeline.parallel.shard import shard_model
    from pipeline.storage import open_storage
    from pipeline.training.checkpoint import Checkpointer
    from pipeline.training.commits import RunFacts

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=280)
    )
    config = configuration(root, layers)
    with torch.device("meta"):
        model = Moonlight(config.model)
    shard_model(model, build_meshes(config.parallelism, "cpu"), config.training, torch.device("cpu"))
    model.to_empty(device="cpu")
    model.reset_parameters(config.seed)
    facts = RunFacts(config.run_id, {"a": 1}, "d" * 64, "o" * 64)
    saver = Checkpointer(open_storage(config.storage), CheckpointConfig(async_save=False), facts, torch.device("cpu"))
    saver.save(dict(model.state_dict()), step=1, next_sequence=1, tokens_seen=1, loss=1.0)
    manifest = saver.settle()
    assert manifest is not None
    pipe.send((manifest.model_dump_json(), sum(p.numel() for p in model.parameters())))
    os._exit(0)


def save_on_ranks(root: str, layers: int) -> CheckpointManifest:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    ranks = [spawn.Process(target=save_rank, args=(rank, root, layers, theirs)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    text, parameters = ours.recv()
    for process in ranks:
        process.join()
    print(f"{parameters / 1e6:,.0f} M parameters, saved by {RANKS} ranks", flush=True)
    return CheckpointManifest.model_validate_json(text)


def memory() -> tuple[int, int]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return os.getpid(), int(fields["VmHWM"].split()[0]) // 1024


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in sorted(folder.iterdir())}


def exported(config: RunConfig, checkpoint: CheckpointManifest, workers: int, folder: str) -> Iterator[Any]:
    from jobs.on_ray.publish import write_files

    publishing = config.publishing.model_copy(update={"workers": workers})
    return write_files(config.model_copy(update={"publishing": publishing}), checkpoint, folder)


def peer_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    start = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    print(f"transformers loads the model in {time.monotonic() - start:.1f} s", flush=True)
    return model


def write_bare(config_values: dict[str, Any], checkpoint: str, folder: str, number: int) -> int:
    """A weight file without checks, hashes, sync and reading back; its bytes."""
    from pipeline.config.load import validate
    from pipeline.publishing.layout import plan_files
    from pipeline.publishing.weights import checkpoint_bytes
    from pipeline.storage import open_storage
    from pipeline.training.files import CheckpointReader

    torch.set_num_threads(1)
    config = validate(config_values)
    storage = open_storage(config.storage)
    reader = CheckpointReader(storage, CheckpointManifest.model_validate_json(checkpoint), check=False)
    file = plan_files(config)[number]
    path = Path(storage.key(f"{folder}/{file.name}"))
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as out:
        out.write(file.header)
        for _, part in checkpoint_bytes(file, reader):
            out.write(part)
    return file.nbytes


def exported_bare(config: RunConfig, checkpoint: CheckpointManifest, workers: int, folder: str) -> list[int]:
    import ray

    from pipeline.publishing.layout import plan_files

    task = ray.remote(write_bare).options(num_cpus=1)
    given = (config.model_dump(mode="json"), checkpoint.model_dump_json(), folder)
    return list(ray.get([task.remote(*given, number) for number in range(len(plan_files(config)))]))


def warm(workers: int) -> dict[int, tuple[int, float]]:
    """Start so many workers with their code: MiB and CPU seconds so far of each, by pid."""
    import ray

    def look() -> tuple[int, tuple[int, float]]:
        import jobs.on_ray.publish  # noqa: F401
        from pipeline.publishing import layout, weights  # noqa: F401

        time.sleep(1)  # so that each is another process
        pid, peak = memory()
        return pid, (peak, time.process_time())

    return dict(ray.get([ray.remote(look).options(num_cpus=1).remote() for _ in range(workers)]))


@dataclass(frozen=True)
class Took:
    megabytes: float
    wall_s: float
    cpu_s: float


@dataclass
class Bench:
    """Measurements by row, and the greatest memory of a worker and that above its code, in MiB, by number of workers."""

    config: RunConfig
    checkpoint: CheckpointManifest
    took: dict[str, list[Took]] = field(default_factory=dict)
    memories: dict[int, tuple[int, int]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    model: Any = None

    def add(self, row: str, megabytes: float, wall_s: float, cpu_s: float) -> None:
        self.took.setdefault(row, []).append(Took(megabytes, wall_s, cpu_s))
        print(f"{row}: {megabytes:,.0f} MB in {wall_s:.2f} s, {cpu_s:.2f} CPU-s", flush=True)

    def ours(self, root: Path, number: int) -> None:
        """By so many workers, on a cluster of its own, so that memory is that of workers that did nothing else."""
        import ray

        from jobs.on_ray.local import local_cluster

        env = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}}
        with local_cluster(number, 10**8, dashboard=False) as address:
            ray.init(address=address, runtime_env=env)
            base = warm(number)
            start = time.monotonic()
            written = list(exported(self.config, self.checkpoint, number, f"out-{number}"))
            wall_s = time.monotonic() - start
            after = warm(number)
            self.add(f"{number} workers", sum(each.entry.bytes for each in written) / 1e6, wall_s, spent(base, after))
            peak = max(mib for mib, _ in after.values())
            self.memories[number] = (peak, peak - min(mib for mib, _ in base.values()))
            found = digests(root / f"out-{number}")
            self.digests = self.digests or found
            assert found == self.digests == {each.entry.path: each.entry.sha256 for each in written}
            if number == 2:
                before = warm(number)
                start = time.monotonic()
                sizes = exported_bare(self.config, self.checkpoint, number, "bare")
                wall_s = time.monotonic() - start
                self.add("2 workers, bare", sum(sizes) / 1e6, wall_s, spent(before, warm(number)))
                assert digests(root / "bare") == found
                shutil.rmtree(root / "bare")
            ray.shutdown()
        if self.model is None:
            self.model = load_peer(self.config, root / f"out-{number}")
        shutil.rmtree(root / f"out-{number}")

    def peer(self, folder: Path) -> None:
        start, cpu = time.monotonic(), time.process_time()
        self.model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
        wall_s, cpu_s = time.monotonic() - start, time.process_time() - cpu
        self.add(
            "save_pretrained", sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6, wall_s, cpu_s
        )
        shutil.rmtree(folder)

    def show(self) -> None:
        rates = {
            row: statistics.median(each.megabytes / each.wall_s for each in took) for row, took in self.took.items()
        }
        for row, took in self.took.items():
            cpu = statistics.median(each.cpu_s for each in took)
            print(f"{row:<20} {rates[row]:7,.0f} MB/s {cpu:6.2f} CPU-s")
        for number, (whole, above) in self.memories.items():
            print(f"{number} workers: at most {whole:,} MiB each, {above:,} MiB above their code")
        peer = rates["save_pretrained"]
        line = {"benchmark": "export", "ours": round(rates["2 workers"]), "bare": round(rates["2 workers, bare"])}
        line |= {"peer": round(peer), "ratio": round(rates["2 workers"] / peer, 2), "target": 1.5}
        line |= {
            "met": rates["2 workers"] / peer >= 1.5,
            "largest_worker_mib": max(m for m, _ in self.memories.values()),
        }
        print(json.dumps(line))


def spent(before: dict[int, tuple[int, float]], after: dict[int, tuple[int, float]]) -> float:
    assert before.keys() == after.keys(), "a worker was replaced"
    return sum(cpu for _, cpu in after.values()) - sum(cpu for _, cpu in before.values())


def measure(layers: int, numbers: list[int], rounds: int, folder: str | None) -> None:
    """In each round the peer stands next to our 2 workers."""
    root = tempfile.mkdtemp(dir=folder, prefix="bench-export-")
    try:
        bench = Bench(configuration(root, layers), save_on_ranks(root, layers))
        for number in [number for _ in range(rounds) for number in numbers]:
            bench.ours(Path(root), number)
            if number == 2:
                bench.peer(Path(root) / "peer")
    finally:
        shutil.rmtree(root)
    bench.show()


def load_peer(config: RunConfig, folder: Path) -> Any:
    from pipeline.model.hf import hf_config
    from pipeline.publishing.layout import INDEX, index_of, plan_files

    (folder / INDEX).write_text(json.dumps(index_of(plan_files(config))))
    fields = hf_config(config.model, bos_token_id=None, eos_token_id=1) | {"pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(fields))
    return peer_model(folder)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--layers", type=positive, default=14)
    made.add_argument("--workers", type=positive, nargs="+", default=[1, 2, 4])
    made.add_argument("--rounds", type=positive, default=2)
    made.add_argument("--folder")
    given = made.parse_args()
    if 2 not in given.workers:
        made.error("--workers: 2 of them are what stands beside the peer; name 2 among them")
    torch.set_num_threads(1)
    measure(given.layers, given.workers, given.rounds, given.folder)


if __name__ == "__main__":
    main()
