"""A published folder from a 4-rank checkpoint beside `save_pretrained`: MB/s, memory of a worker, the same bytes for any number.

    python -m benchmarks.export [--layers 14] [--workers 1 2 4] [--rounds 2] [--folder DIR]

A network of about 10^9 random parameters is saved by four processes as training on 4 ranks saves it, without the optimizer's state.
In each round every number of Ray tasks writes the weight files anew (jobs/on_ray/publish.py), and `save_pretrained` writes the same
model from memory in files of the same size at most; all of them in bf16. Ours reads a checkpoint in fp32, checks it, rounds, hashes every
file for the manifest, syncs it to the disk and reads it back; the peer starts from tensors in memory and does none of that. Its loading
of the model, which ours has no need of, is timed apart and not counted. Ray and its workers are up before (`warm`). Memory is the
highest of any worker of that number, above what a worker holds once its code is there, and in all.
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
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

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


def warm(workers: int) -> dict[int, int]:
    """Start so many workers with their code; pid and MiB of each."""
    import ray

    def look() -> tuple[int, int]:
        import pipeline.publishing.layout
        import pipeline.publishing.weights  # noqa: F401

        time.sleep(1)  # so that each is another process
        return memory()

    return dict(ray.get([ray.remote(look).options(num_cpus=1).remote() for _ in range(workers)]))


def measure(layers: int, numbers: list[int], rounds: int, folder: str | None) -> None:
    import ray

    from jobs.on_ray.local import local_cluster

    root = tempfile.mkdtemp(dir=folder, prefix="bench-export-")
    config = configuration(root, layers)
    rates: dict[str, list[float]] = {}
    memories: dict[int, tuple[int, int]] = {}
    try:
        checkpoint = save_on_ranks(root, layers)
        env = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}}
        first: dict[str, str] = {}
        model = None
        for number in [number for _ in range(rounds) for number in numbers]:
            # a cluster of its own for each, so that memory is that of workers that did nothing else
            with local_cluster(number, 10**8, dashboard=False) as address:
                ray.init(address=address, runtime_env=env)
                base = warm(number)
                start = time.monotonic()
                written = list(exported(config, checkpoint, number, f"out-{number}"))
                took = time.monotonic() - start
                megabytes = sum(each.entry.bytes for each in written) / 1e6
                rates.setdefault(f"{number} workers", []).append(megabytes / took)
                peak = max(warm(number).values())
                memories[number] = (peak, peak - min(base.values()))
                ray.shutdown()
            found = digests(Path(root) / f"out-{number}")
            first = first or found
            assert found == first == {each.entry.path: each.entry.sha256 for each in written}
            print(f"{number} workers: {len(written)} files, {megabytes:,.0f} MB in {took:.1f} s", flush=True)
            if model is None:
                model = load_peer(config, Path(root) / f"out-{number}")
            shutil.rmtree(Path(root) / f"out-{number}")
            if number == 2 or len(numbers) == 1:
                start = time.monotonic()
                model.save_pretrained(Path(root) / "peer", max_shard_size=SHARD_BYTES)
                took = time.monotonic() - start
                megabytes = sum(path.stat().st_size for path in (Path(root) / "peer").glob("*.safetensors")) / 1e6
                rates.setdefault("save_pretrained", []).append(megabytes / took)
                print(f"save_pretrained: {megabytes:,.0f} MB in {took:.1f} s", flush=True)
                shutil.rmtree(Path(root) / "peer")
    finally:
        ray.shutdown()
        shutil.rmtree(root)
    for name, values in rates.items():
        print(f"{name:<20} {statistics.median(values):7,.0f} MB/s")
    for number, (whole, above) in memories.items():
        print(f"{number} workers: at most {whole:,} MiB each, {above:,} MiB above their code")
    ours, peer = statistics.median(rates["2 workers"]), statistics.median(rates["save_pretrained"])
    line = {
        "benchmark": "export",
        "ours": round(ours),
        "peer": round(peer),
        "ratio": round(ours / peer, 2),
        "target": 1.5,
    }
    print(json.dumps(line | {"met": ours / peer >= 1.5, "largest_worker_mib": max(m for m, _ in memories.values())}))


def load_peer(config: RunConfig, folder: Path) -> Any:
    from pipeline.model.hf import hf_config
    from pipeline.publishing.layout import INDEX, index_of, plan_files

    (folder / INDEX).write_text(json.dumps(index_of(plan_files(config))))
    fields = hf_config(config.model, bos_token_id=None, eos_token_id=1) | {"pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(fields))
    return peer_model(folder)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--layers", type=int, default=14)
    made.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--folder")
    given = made.parse_args()
    torch.set_num_threads(1)
    measure(given.layers, given.workers, given.rounds, given.folder)


if __name__ == "__main__":
    main()
