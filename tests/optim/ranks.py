"""What the ranks of the distributed tests run. One spawned group serves many cases: starting it is the slow part."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pipeline.config.schema import ModelConfig, MuonConfig, OptimizerConfig, ParallelismConfig, TrainingConfig
from pipeline.model.moonlight import Moonlight
from pipeline.optim import products
from pipeline.optim.layout import sharded_parameters
from pipeline.optim.muon import MoonlightOptimizer, build_optimizer
from pipeline.optim.plan import Plan
from pipeline.optim.rules import Rule, moonlight_rules
from pipeline.parallel.mesh import Meshes, build_meshes
from pipeline.parallel.shard import shard_model
from tests.optim.oracle import Oracle, Wire, full, no_gathering

LR = 0.02
RULES = [Rule("norm*", "adamw"), Rule("*", "muon")]
# Even, uneven and partly empty chunks for 2, 3 and 4 ranks; tall, wide, square; two of equal shape (batched).
SHAPES = {
    "even": (24, 16),
    "tall": (37, 8),
    "wide": (10, 48),
    "short": (3, 20),
    "one": (1, 8),
    "twin": (24, 16),
    "norm": (13,),
}
MODEL = ModelConfig(
    vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=3, kv_lora_rank=16, qk_nope_head_dim=12,
    qk_rope_head_dim=4, v_head_dim=8, intermediate_size=40, moe_intermediate_size=16, n_routed_experts=4,
    n_shared_experts=1, num_experts_per_tok=2, max_position_embeddings=64,
)  # fmt: skip


def config(**muon: object) -> OptimizerConfig:
    return OptimizerConfig(muon=MuonConfig(**muon))


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sharded(shapes: dict[str, tuple[int, ...]], mesh: DeviceMesh) -> list[tuple[str, nn.Parameter]]:
    """Parameters cut along dim 0 by the last axis of the mesh, copied over the others."""
    placements = [*([Replicate()] * (mesh.ndim - 1)), Shard(0)]
    return [
        (n, nn.Parameter(distribute_tensor(random(s, i), mesh, placements))) for i, (n, s) in enumerate(shapes.items())
    ]


def set_gradients(named: list[tuple[str, nn.Parameter]], step: int) -> dict[str, Tensor]:
    """The same random gradients, cut like the parameters; returns the whole ones."""
    whole = {n: random(tuple(p.shape), 1000 * (step + 1) + i) for i, (n, p) in enumerate(named)}
    for name, p in named:
        if isinstance(p, DTensor):
            p.grad = distribute_tensor(whole[name], p.device_mesh, p.placements)
        else:
            p.grad = whole[name].clone()
    return whole


def compare(
    named: list[tuple[str, nn.Parameter]], cfg: OptimizerConfig, rules: list[Rule], case: str, steps: int = 3
) -> MoonlightOptimizer:
    """Random gradients through our step and the oracle's; bitwise after each step."""
    oracle = Oracle(named, cfg, rules, LR)
    optimizer = build_optimizer(named, cfg, rules)
    for step in range(steps):
        whole = set_gradients(named, step)
        with no_gathering() as gathered, Wire() as wire:
            optimizer.step(LR, torch.ones(()) if step % 2 else None)
        assert gathered == [0], (case, "the step gathered a parameter")
        assert wire.sent == optimizer.stats()["bytes_sent"], (case, wire.sent, optimizer.stats())
        oracle.step(whole)
        oracle.check(named, f"{case}, step {step}")
    return optimizer


def dense_cases(world: int) -> None:
    """Whole matrices on one axis: wire dtypes, buckets of a few bytes, blocks of heads, a missing gradient."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    for wire in ("bf16", "fp32"):
        compare(sharded(SHAPES, mesh), config(wire_dtype=wire), RULES, f"dense {wire}")
    compare(sharded(SHAPES, mesh), config(products="fp32"), RULES, "dense, fp32 products")
    for nesterov in (True, False):
        compare(
            sharded(SHAPES, mesh), config(momentum_dtype="bf16", nesterov=nesterov), RULES, "dense, bf16 momentum", 6
        )
    thrice = {f"{name}{i}": shape for i in range(3) for name, shape in SHAPES.items()}
    optimizer = compare(sharded(thrice, mesh), config(bucket_bytes=1), RULES, "small buckets")
    assert optimizer.stats()["buckets"] >= 2
    heads = {"q": (24, 16), "v": (36, 8), "o": (8, 8)}
    rules = [Rule("q", "muon", 6), Rule("v", "muon", 12), Rule("*", "muon")]
    compare(sharded(heads, mesh), config(), rules, "heads, cut and not")
    named = sharded(SHAPES, mesh)
    optimizer = build_optimizer(named, config(), RULES)
    set_gradients(named, 0)
    frozen = dict(named)["tall"]
    frozen.grad = None
    before = frozen.to_local().clone()
    optimizer.step(LR)
    assert torch.equal(frozen.to_local(), before)
    for i, (name, p) in enumerate(named):
        moved = not torch.equal(full(p), random(tuple(p.shape), i))
        assert moved == (name != "tall"), name


def one_without_products(world: int) -> None:
    """Where the last rank's device lacks 16-bit products every rank multiplies fp32, or none starts."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    has = dist.get_rank() < world - 1
    with mock.patch.object(products, "has_products", return_value=has):
        assert build_optimizer(sharded(SHAPES, mesh), config(), RULES).muon.multiplied == "fp32"
        with pytest.raises(ValueError, match="another rank" if has else "this cpu device"):
            build_optimizer(sharded(SHAPES, mesh), config(products="half"), RULES)


def byte_budget(world: int) -> None:
    """On the wire: 4 (P / W) (W - 1) / W bytes of every rank where whole matrices can be dealt out evenly, of whatever
    shapes; else that is the average, and no rank is far from it."""
    rows_and_columns = {"q": (12, 16), "kv": (4, 12), "o": (8, 16), "up": (22, 16), "router": (1, 16)}
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    for layers, excess in ((world, 0.0), (world + 1, 0.04)):
        shapes = {f"{name}{i}": (m * world, n) for i in range(layers) for name, (m, n) in rows_and_columns.items()}
        named = sharded(shapes, mesh)
        optimizer = build_optimizer(named, config(), [Rule("*", "muon")])
        set_gradients(named, 0)
        with Wire() as wire:
            optimizer.step(LR)
        bound = 4 * sum(p.numel() for _, p in named) / world * (world - 1) / world
        assert _over_ranks(wire.sent) == bound * world
        assert wire.sent <= bound * (1 + excess), (wire.sent, bound, excess)


def _over_ranks(value: int) -> int:
    together = torch.tensor(value)
    dist.all_reduce(together)
    return int(together)


def skipped_step(world: int, **muon: object) -> None:
    """ok = 0 with NaN and infinite gradients on one rank leaves every bit of every state."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("shard",))
    named = sharded(SHAPES, mesh)
    optimizer = build_optimizer(named, config(**muon), RULES)
    set_gradients(named, 0)
    optimizer.step(LR)
    everything = [*optimizer.state_dict().values(), *(p.detach() for _, p in named)]
    before = [_bits(t).clone() for t in everything]
    whole = set_gradients(named, 1)
    for _, p in named:
        local = p.grad.to_local()
        local.view(-1)[::2] = float("nan") if dist.get_rank() == 0 else float("inf")
    optimizer.step(LR, torch.zeros(()))
    assert all(torch.equal(_bits(t), b) for t, b in zip(everything, before))
    set_gradients(named, 1)
    optimizer.step(LR, torch.ones(()))
    assert not any(torch.equal(_bits(t), b) for t, b in zip(everything, before) if b.numel())
    assert all(torch.isfinite(full(p)).all() for _, p in named)
    assert whole


def _bits(tensor: Tensor) -> Tensor:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.view(torch.int16 if local.itemsize == 2 else torch.int32)


def build_model(parallelism: ParallelismConfig, model_config: ModelConfig) -> Moonlight:
    """The real network, sharded as training does it, with the weights of seed 0."""
    meshes: Meshes = build_meshes(parallelism, "cpu")
    with torch.device("meta"):
        model = Moonlight(model_config)
    shard_model(model, meshes, TrainingConfig(), torch.device("cpu"))
    model.to_empty(device="cpu")
    model.reset_parameters(0)
    return model


def backward(model: Moonlight, step: int) -> None:
    """Forward and backward of this rank's own tokens."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    tokens = torch.randint(0, model.config.vocab_size, (2, 9), generator=generator)
    out = model(tokens[:, :-1], tokens[:, 1:])
    (out.loss_sum / 16 / dist.get_world_size()).backward()


def whole_model(
    parallelism: ParallelismConfig, model_config: ModelConfig, cfg: OptimizerConfig, case: str
) -> MoonlightOptimizer:
    """Real gradients of the sharded network; our step on shards against torch's on the gathered tensors."""
    model = build_model(parallelism, model_config)
    named = list(model.named_parameters())
    rules = list(moonlight_rules(model_config, cfg))
    oracle = Oracle(named, cfg, rules, LR)
    optimizer = build_optimizer(named, cfg, rules)
    predicted = sharded_parameters([(n, tuple(p.shape)) for n, p in named], rules, parallelism)
    for fake, real in zip(predicted, optimizer.muon.plan.parameters, strict=True):
        coordinates = real.layout.coordinates(dist.get_rank())
        assert (fake.fqn, fake.block_rows, fake.layout.axes) == (real.fqn, real.block_rows, real.layout.axes), case
        assert fake.layout.box(coordinates) == real.layout.box(coordinates), (case, fake.fqn)
    for step in range(5 if cfg.muon.wire_dtype == "bf16" else 2):
        backward(model, step)
        oracle.step({n: full(p.grad) for n, p in named})
        with no_gathering() as gathered, Wire() as wire:
            optimizer.step(LR)
        assert gathered == [0], case
        assert wire.sent == optimizer.stats()["bytes_sent"], case
        optimizer.zero_grad()
        oracle.check(named, f"{case}, step {step}")
    dense = [p for fqn, p in optimizer.muon.parameters if p.dim() == 2]
    W, plan = parallelism.shard, optimizer.muon.plan
    if Plan.REGROUP not in plan.plans and not plan.split_replicas and not any(p.shape[0] % W for p in dense):
        # The sum over ranks is that of the dense matrices: experts send nothing.
        expected = 2 * optimizer.muon.wire.itemsize * sum(p.numel() for p in dense) * (W - 1) // W
        assert _over_ranks(wire.sent) == expected * parallelism.replicate, case
    return optimizer


def checkpoint_writer(folder: str, parallelism: ParallelismConfig) -> None:
    """Two steps, a checkpoint of parameters and state, a third step; the whole tensors go to a plain file."""
    optimizer, named = _model_and_optimizer(parallelism)
    for step in range(2):
        _fixed_gradients(named, step)
        optimizer.step(LR)
    save({**dict(named), **optimizer.state_dict()}, checkpoint_id=f"{folder}/step-2")
    saved = {name: full(t) for name, t in {**dict(named), **optimizer.state_dict()}.items()}
    _fixed_gradients(named, 2)
    optimizer.step(LR)
    after = {name: full(t) for name, t in {**dict(named), **optimizer.state_dict()}.items()}
    if dist.get_rank() == 0:
        torch.save({"saved": saved, "after": after}, f"{folder}/whole.pt")
    dist.barrier()


def checkpoint_reader(folder: str, parallelism: ParallelismConfig) -> None:
    """Another process, world size and EP degree: the same state, and the same third step."""
    optimizer, named = _model_and_optimizer(parallelism)
    state = optimizer.state_dict()
    for tensor in [*dict(named).values(), *state.values()]:
        tensor.detach().fill_(7.0)
    load({**{n: p.detach() for n, p in named}, **state}, checkpoint_id=f"{folder}/step-2")
    optimizer.load_state_dict(state)
    expected = torch.load(f"{folder}/whole.pt")
    for name, tensor in {**dict(named), **optimizer.state_dict()}.items():
        assert torch.equal(full(tensor), expected["saved"][name]), name
    _fixed_gradients(named, 2)
    optimizer.step(LR)
    for name, tensor in {**dict(named), **optimizer.state_dict()}.items():
        assert torch.equal(full(tensor), expected["after"][name]), name


def _model_and_optimizer(parallelism: ParallelismConfig) -> tuple[MoonlightOptimizer, list[tuple[str, nn.Parameter]]]:
    model = build_model(parallelism, MODEL)
    named = list(model.named_parameters())
    return build_optimizer(named, config(), moonlight_rules(MODEL, config())), named


def _fixed_gradients(named: list[tuple[str, nn.Parameter]], step: int) -> None:
    """Gradients that do not depend on the number of ranks: a function of the (equal) weights."""
    for _, p in named:
        local = p.to_local() if isinstance(p, DTensor) else p.detach()
        gradient = local.detach().abs() * 3 - 0.1 * step  # exact whatever the length: no vectorised transcendental
        p.grad = (
            DTensor.from_local(gradient, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
            if isinstance(p, DTensor)
            else gradient
        )


def one_rank() -> None:
    for wire in ("bf16", "fp32"):
        optimizer = whole_model(ParallelismConfig(), MODEL, config(wire_dtype=wire), f"FSDP on a mesh of one, {wire}")
        assert optimizer.stats()["bytes_sent"] == 0
        assert optimizer.stats()["plans"]["local"] == len(optimizer.muon.parameters)


def two_ranks(folder: str) -> None:
    dense_cases(2)
    byte_budget(2)
    skipped_step(2)
    skipped_step(2, momentum_dtype="bf16")
    for wire in ("bf16", "fp32"):
        whole_model(ParallelismConfig(shard=2), MODEL, config(wire_dtype=wire), f"FSDP 2, {wire}")
        whole_model(ParallelismConfig(shard=2, ep=2), MODEL, config(wire_dtype=wire), f"EP 2, {wire}")
    checkpoint_reader(folder, ParallelismConfig(shard=2))


def three_ranks(folder: str) -> None:
    dense_cases(3)
    one_without_products(3)
    byte_budget(3)
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("ep",))
    for wire in ("bf16", "fp32"):
        optimizer = compare(
            sharded({"stack": (7, 6, 4), "sparse": (4, 8, 6)}, mesh),
            config(wire_dtype=wire), [Rule("*", "muon")], f"uneven experts, {wire}",
        )  # fmt: skip
        assert optimizer.stats()["bytes_sent"] == 0
    checkpoint_reader(folder, ParallelismConfig(shard=3))


def four_ranks(folder: str) -> None:
    checkpoint_writer(folder, ParallelismConfig(shard=4, ep=2))
    dense_cases(4)
    byte_budget(4)
    skipped_step(4)
    whole_model(ParallelismConfig(shard=4), MODEL, config(blocks="per_head"), "per head, cut by FSDP")


def expert_cases(wire: str) -> None:
    """Whole networks: experts whole on their rank, cut between ranks along dim 0 (strided, uneven) and within (dim 1)."""
    few, many = (
        MODEL.model_copy(update={"n_routed_experts": 2, "num_experts_per_tok": 1}),
        MODEL.model_copy(update={"n_routed_experts": 6}),
    )
    stacks = 3  # of the one mixture-of-experts layer
    for parallelism, model, plan, case in (
        ({"shard": 4, "ep": 4}, MODEL, "local", "EP 4"),
        ({"shard": 4, "ep": 2}, MODEL, "local", "EP 2 x EFSDP 2, Shard(0), strided"),
        ({"shard": 4, "ep": 2}, many, "local", "EP 2 x EFSDP 2, three experts on two ranks"),
        ({"shard": 4, "ep": 2}, few, "regroup", "EP 2 x EFSDP 2, Shard(1)"),
        ({"shard": 4}, few, "regroup", "EFSDP 4, Shard(1)"),
    ):
        optimizer = whole_model(ParallelismConfig(**parallelism), model, config(wire_dtype=wire), f"{case}, {wire}")
        assert optimizer.stats()["plans"][plan] == stacks, case
    for muon in ({"products": "fp32"}, {"momentum_dtype": "bf16"}):
        cfg = config(wire_dtype=wire, **muon)
        whole_model(ParallelismConfig(shard=4, ep=2), few, cfg, f"{muon}, {wire}")
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("efsdp",))
    named = sharded({"stack": (2, 6, 4), "other": (3, 6, 4)}, mesh)
    optimizer = compare(named, config(wire_dtype=wire), [Rule("*", "muon")], f"fewer experts than ranks, {wire}")
    assert optimizer.stats()["plans"]["regroup"] == 2
    assert optimizer.stats()["imbalance"] <= 2.0


def replicated_cases(wire: str) -> None:
    """HSDP 2 x 2: replicas repeat each other's work or share it."""
    hsdp = ParallelismConfig(replicate=2, shard=2, ep=2)
    plans = {}
    for split in ("off", "on", "auto"):
        cfg = config(hsdp_split=split, wire_dtype=wire)
        optimizer = whole_model(hsdp, MODEL, cfg, f"HSDP 2x2, split {split}, {wire}")
        plans[split] = optimizer.muon.plan
    assert not plans["off"].split_replicas
    assert any(bucket.shared and bucket.axis is None for bucket in plans["on"].buckets), "no expert is shared"
    assert not any(bucket.shared and bucket.axis is None for bucket in plans["auto"].buckets)
    assert any(bucket.shared and bucket.axis is not None for bucket in plans["on"].buckets)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for split in ("off", "on", "auto"):
        cfg = config(hsdp_split=split, bucket_bytes=600, wire_dtype=wire)
        named = sharded({"stack": (3, 6, 4), "lone": (1, 6, 4), **SHAPES}, mesh)
        optimizer = compare(named, cfg, RULES, f"HSDP, uneven, split {split}, {wire}")
        assert optimizer.stats()["plans"]["regroup"] == 1
