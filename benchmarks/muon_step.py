"""The optimizer step against `torch.optim.Muon` and microsoft/dion's Muon: same matrices, same gradients, one run.

    python -m benchmarks.muon_step [--preset debug] [--layers 4] [--rounds 9] [--ranks 1 4] [--dion FOLDER]

Each system updates the Muon matrices of the preset's network (attention, router, shared and stacked experts) by the same
rule: five Newton-Schulz steps, Nesterov, 0.2 sqrt(max(rows, columns)), weight decay. On several gloo ranks (one
thread each) matrices are FSDP2-style `Shard(0)` DTensors and every rank holds whole experts.

ours     `pipeline.optim`: packed bf16 all-to-all to owners, batches of equal shape
torch    `torch.optim.Muon`, which takes 2-D tensors in one process: gradients of cut matrices are gathered
         (`full_tensor`), every rank updates whole copies and keeps its slice; experts are given one by one
dion     `dion.Muon` on the same DTensors; skipped, with the reason, where it cannot be imported or run. `--dion` names a
         checkout to import it from. Run eagerly: its compiled functions, one compilation per shape, exceed torch's limit

Two times of each step, in milliseconds: CPU time of the process, the average of the ranks, which other programs on the
machine disturb little; and wall time from barrier to barrier, which contains what a rank waits, for other ranks and
for a core. Medians of interleaved rounds, after two warm-up rounds; every round begins with another system. The result is
in CPU time, a ratio above 1 means ours is faster; `wall_ratio` stands beside it. `distance` is the largest difference of a
weight from torch's after all rounds: ours is 0 where the processor multiplies bf16, and elsewhere what other sums round to
in the last bits of bf16; dion has coefficients of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from benchmarks.arguments import folder_of, positive
from benchmarks.processor import processor
from pipeline.config.load import load_config, preset_names
from pipeline.config.schema import OptimizerConfig
from pipeline.model.moonlight import Moonlight
from pipeline.optim.muon import build_optimizer
from pipeline.optim.rules import Rule, match_rules, moonlight_rules

LR, WEIGHT_DECAY, WARM_UP = 1e-3, 0.1, 2
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=preset_names(), default="debug")
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 4])
    parser.add_argument("--dion", type=folder_of("dion"), help="folder that contains the package dion")
    arguments = parser.parse_args()
    results = []
    for world in arguments.ranks:
        with tempfile.TemporaryDirectory(prefix="muon-step-") as folder:
            mp.spawn(run_rank, (world, folder, arguments), nprocs=world)
            with open(f"{folder}/result.json") as file:
                results += report(world, json.load(file))
    print(json.dumps(results))


def report(world: int, result: dict[str, Any]) -> list[dict[str, Any]]:
    print(f"\n{processor()}")
    print(f"{world} rank(s): {result['matrices']} matrices, {result['elements'] / 1e6:.1f} M elements")
    times, walls = (
        {name: statistics.median(found) * 1e3 for name, found in result[kind].items()} for kind in ("cpu", "wall")
    )
    for name in times:
        print(
            f"  {name:6} {times[name]:9.1f} ms CPU {walls[name]:9.1f} ms wall   distance {result['distance'][name]:.1e}"
        )
    for name, reason in result["skipped"].items():
        print(f"  {name:6} skipped: {reason}")
    return [
        {
            "benchmark": f"muon_step: {world} rank(s) vs {peer}",
            "ours": round(times["ours"], 2),
            "peer": round(times[peer], 2),
            "ratio": round(times[peer] / times["ours"], 2),
            "target": 1.0,
            "met": times[peer] >= times["ours"],
            "unit": "CPU ms",
            "wall_ratio": round(walls[peer] / walls["ours"], 2),
        }
        for peer in times
        if peer != "ours"
    ]


def run_rank(rank: int, world: int, folder: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    shapes = muon_shapes(arguments.preset, arguments.layers)
    named: dict[str, list[tuple[str, nn.Parameter]]] = {}
    steps: dict[str, Step] = {}
    skipped: dict[str, str] = {}
    for name, build in {"ours": ours, "torch": looped_torch, "dion": dion}.items():
        parameters = make_parameters(shapes, mesh)
        try:
            steps[name] = build(parameters, mesh, arguments)
            for _ in range(WARM_UP):
                steps[name]()
            named[name] = parameters
        except (ImportError, RuntimeError, NotImplementedError) as error:
            if name != "dion":
                raise
            steps.pop(name, None)
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(arguments.rounds):
        for name in order:
            dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            steps[name]()
            busy = torch.tensor(time.process_time() - start_cpu)
            dist.barrier()
            wall[name].append(time.perf_counter() - start)
            dist.all_reduce(busy)
            cpu[name].append(busy.item() / world)
        order.append(order.pop(0))
    distance = {name: max_distance(found, named["torch"]) for name, found in named.items()}
    if rank == 0:
        elements = sum(p.numel() for _, p in named["ours"])
        result = {"cpu": cpu, "wall": wall, "distance": distance, "skipped": skipped, "elements": elements}
        with open(f"{folder}/result.json", "w") as file:
            json.dump(result | {"matrices": sum(s[0] if len(s) == 3 else 1 for s in shapes.values())}, file)
    dist.destroy_process_group()


def muon_shapes(preset: str, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Muon parameters of the preset's network with `layers` layers."""
    model = load_config(preset, []).model.model_copy(update={"num_hidden_layers": layers})
    with torch.device("meta"):
        shapes = [(fqn, tuple(p.shape)) for fqn, p in Moonlight(model).named_parameters()]
    rules = match_rules(shapes, moonlight_rules(model, OptimizerConfig()))
    return {fqn: shape for (fqn, shape), rule in zip(shapes, rules) if rule.treatment == "muon"}


def make_parameters(shapes: dict[str, tuple[int, ...]], mesh: DeviceMesh) -> list[tuple[str, nn.Parameter]]:
    """The same random weights and (constant) gradients for every system."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for name, shape in shapes.items():
        whole, gradient = (torch.randn(shape, generator=generator) * 0.02 for _ in range(2))
        if mesh.size() > 1:
            p = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
            p.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        else:
            p = nn.Parameter(whole)
            p.grad = gradient
        found.append((name, p))
    return found


def ours(named: list[tuple[str, nn.Parameter]], mesh: DeviceMesh, arguments: argparse.Namespace) -> Step:
    optimizer = build_optimizer(named, OptimizerConfig(weight_decay=WEIGHT_DECAY), [Rule("*", "muon")])
    return lambda: optimizer.step(LR)


def looped_torch(named: list[tuple[str, nn.Parameter]], mesh: DeviceMesh, arguments: argparse.Namespace) -> Step:
    """Whole copies of cut matrices; views of local experts."""
    copies: list[tuple[nn.Parameter, nn.Parameter]] = []  # (whole, its shard)
    matrices: list[nn.Parameter] = []
    for _, p in named:
        shard, gradient = local(p.detach()), local(p.grad)
        if p.ndim == 3:
            for w_MN, g_MN in zip(shard, gradient):
                matrices.append(nn.Parameter(w_MN))
                matrices[-1].grad = g_MN
        elif isinstance(p, DTensor):
            matrices.append(nn.Parameter(p.detach().full_tensor()))
            copies.append((matrices[-1], p))
        else:
            matrices.append(p)
    optimizer = torch.optim.Muon(matrices, lr=LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")

    def step() -> None:
        for whole, p in copies:
            assert isinstance(p.grad, DTensor)
            whole.grad = p.grad.full_tensor()
        optimizer.step()
        for whole, p in copies:
            mine = local(p.detach())
            pieces = whole.detach().chunk(mesh.size())
            if mine.numel():
                mine.copy_(pieces[mesh.get_local_rank()])

    return step


def dion(named: list[tuple[str, nn.Parameter]], mesh: DeviceMesh, arguments: argparse.Namespace) -> Step:
    if arguments.dion:
        sys.path.insert(0, arguments.dion)
    from dion import Muon

    torch.compiler.set_stance("force_eager")
    optimizer = Muon(
        [p for _, p in named],
        distributed_mesh=mesh if mesh.size() > 1 else None,
        lr=LR,
        mu=0.95,
        weight_decay=WEIGHT_DECAY,
        nesterov=True,
        adjust_lr="rms_norm",
        use_polar_express=False,
    )
    return optimizer.step


def local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def max_distance(found: list[tuple[str, nn.Parameter]], expected: list[tuple[str, nn.Parameter]]) -> float:
    """Largest difference of a weight on this rank."""
    pairs = [(local(a.detach()), local(b.detach())) for (_, a), (_, b) in zip(found, expected)]
    return max(((a - b).abs().max().item() for a, b in pairs if a.numel()), default=0.0)


if __name__ == "__main__":
    main()
