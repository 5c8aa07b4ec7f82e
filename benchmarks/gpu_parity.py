"""What runs on the device against the same on the CPU: the part of `benchmarks.gpu` that proves before it times.

Each check draws its inputs on the CPU, computes in fp32 there, then on the device in bf16 (fp32 on a CPU, whose
grouped products take it), and returns how far it is off beside what it may be. For bf16 that bound is measured, too: twice as
far as the CPU's own bf16 is off; what fp8 may be off from exact arithmetic is stated (FP8). Kernels run through Triton: its compiler on CUDA, its interpreter on a CPU (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.isolated import show
from pipeline.config.load import load_config
from pipeline.config.schema import CheckpointConfig, ModelConfig, OptimizerConfig, StorageConfig
from pipeline.kernels.activation import plain_swiglu, plain_swiglu_backward
from pipeline.kernels.cross_entropy import plain_cross_entropy
from pipeline.kernels.quantise import plain_rows, plain_stacks
from pipeline.model import offload
from pipeline.model.block import Block
from pipeline.model.experts import MoE
from pipeline.model.grouped_fp8 import plain_grouped_fp8
from pipeline.model.loss import IGNORE, LossOutput
from pipeline.model.moonlight import Moonlight
from pipeline.model.row_products import Fp8Copies
from pipeline.optim.muon import MoonlightOptimizer, build_optimizer
from pipeline.optim.rules import moonlight_rules
from pipeline.parallel import symmetric
from pipeline.parallel.bounded import BoundedDispatch, Room
from pipeline.parallel.device_flight import Wire
from pipeline.parallel.dispatch import AllToAllDispatch, Dispatcher, ranks_plainly
from pipeline.parallel.mesh import Meshes
from pipeline.parallel.rows import place_plainly, sum_plainly
from pipeline.storage import open_storage
from pipeline.training.checkpoint import Checkpointer, load_state
from pipeline.training.commits import RunFacts
from pipeline.training.guard import Guard
from pipeline.training.step import Step

BF16 = torch.bfloat16
# Loss and gradients of a network whose experts multiply fp8; on a CPU 1e-4 and 0.04, in bf16 2e-5 and 0.07 (0.05 without).
FP8 = 1e-3, 0.1


class Off(NamedTuple):
    """A relative distance, and the largest that is allowed."""

    by: float
    allowed: float


Check = Callable[[torch.device], Iterator[tuple[str, Off]]]


def parity(check: Check, device: torch.device) -> dict[str, Any]:
    """A row of the report: all that a check compares."""
    found = list(check(device))
    for name, off in found:
        told = "met" if off.by <= off.allowed else "NOT MET"
        show(f"{f'parity {name}':48} off by {off.by:.1e}, allowed {off.allowed:.1e}: {told}")
    worst = max((off.by / off.allowed if off.allowed else float(off.by > 0)) for _, off in found)
    return {
        "benchmark": f"gpu/parity/{check.__name__}", "ours": worst, "peer": 1.0, "ratio": worst, "target": 1.0,
        "met": all(off.by <= off.allowed for _, off in found), "unit": "distance over the allowed one, the worst of all",
    }  # fmt: skip


def distance(ours: Tensor, exact: Tensor) -> float:
    """||ours - exact|| / ||exact||, in fp64 on the CPU; NaN anywhere counts as infinitely far."""
    ours, exact = ours.detach().cpu().double(), exact.detach().cpu().double()
    off = float((ours - exact).norm() / exact.norm().clamp(min=1e-30))
    return off if off == off else float("inf")


def small() -> ModelConfig:
    return load_config("debug").model.model_copy(update={"num_hidden_layers": 2, "vocab_size": 512})


def network(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, mode: str = "none", *, fp8: bool = False
) -> Moonlight:
    """The same weights everywhere; `fp8`: products of experts."""
    model = Moonlight(config, aux_loss_weight=1e-4)
    model.reset_parameters(0)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for block in model.layers:
        cast(Block, block).activation_checkpointing = mode  # type: ignore[assignment]
        if fp8 and isinstance(block.mlp, MoE):
            block.mlp.experts.fp8 = Fp8Copies()
    return model.to(device)


def ids_of(config: ModelConfig, length: int) -> Tensor:
    return torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(
    model: Moonlight, ids_BS: Tensor, documents: list[list[int]] | None = None
) -> tuple[Tensor, Tensor]:
    """(mean loss, all gradients end to end)."""
    device = next(model.parameters()).device
    labels_BS = ids_BS.clone()
    labels_BS[:, ::7] = IGNORE
    out = cast(LossOutput, model(ids_BS.to(device), labels_BS.to(device), documents))
    (out.loss_sum / out.num_tokens + out.aux_loss).backward()
    gradients = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return out.loss_sum / out.num_tokens, gradients


def device_dtype(device: torch.device) -> torch.dtype:
    return BF16 if device.type == "cuda" else torch.float32


def bounds(
    device: torch.device, exact: tuple[Tensor, Tensor], near: Callable[[], tuple[Tensor, Tensor]]
) -> list[float]:
    """How far loss and gradients may be off: rounding in fp32, twice what bf16 on the CPU is off otherwise."""
    if device_dtype(device) == torch.float32:
        return [1e-6, 1e-5]
    return [2 * distance(a, b) + 1e-3 for a, b in zip(near(), exact)]


def kernels(device: torch.device) -> Iterator[tuple[str, Off]]:
    """Each Triton kernel against the plain function on the CPU."""
    from pipeline.kernels import activation_triton, cross_entropy_triton, sorting_triton

    many = 40 if device.type == "cuda" else 1  # the interpreter is slow
    draw = torch.Generator().manual_seed(0)
    for dtype, allowed in ((torch.float32, 1e-5), (BF16, 2**-7)):  # the interpreter cuts bf16 off where a GPU rounds
        rows = 10 * many
        grad, gate, up = (torch.randn(rows, 520, generator=draw).to(dtype) for _ in range(3))
        weights = torch.rand(rows, generator=draw)
        there = [x.to(device) for x in (grad, gate, up, weights)]
        yield (
            f"swiglu {dtype}",
            Off(distance(activation_triton.swiglu(*there[1:]), plain_swiglu(gate, up, weights)), allowed),
        )
        expected = plain_swiglu_backward(grad, gate, up, weights)
        for number, ours in enumerate(activation_triton.swiglu_backward(*there)):
            yield f"swiglu backward {number} {dtype}", Off(distance(ours, expected[number]), allowed)
        end = torch.tensor([7 * many], dtype=torch.int32, device=device)  # rows behind it are passed over
        for number, ours in enumerate(activation_triton.swiglu_backward(*there, end)):
            name = f"swiglu backward {number} {dtype}, {7 * many} of {rows} rows"
            yield name, Off(distance(ours[: 7 * many], expected[number][: 7 * many]), allowed)
        logits, labels = 3 * torch.randn(rows, 5000, generator=draw), torch.randint(0, 5000, (rows,), generator=draw)
        found = cross_entropy_triton.cross_entropy(logits.to(device), labels.to(device), dtype)
        for name, ours, theirs in zip(("losses", "gradients"), found, plain_cross_entropy(logits, labels, dtype)):
            yield f"cross-entropy {name} {dtype}", Off(distance(ours, theirs), allowed)
    yield from fp8_kernels(device, many, draw)
    experts_NK = torch.rand(tokens := 130 * many, 64, generator=draw).topk(6, dim=1).indices
    met_NW = ranks_plainly(experts_NK, 8, 8)
    same = torch.equal(sorting_triton.ranks_of(experts_NK.to(device), 8, 8).cpu(), met_NW)
    yield "ranks of tokens", Off(float(not same), 0.0)
    for bins_RC, bins, pairs, slots in (
        (experts_NK, 64, 6 * tokens, None),
        (met_NW, 8, 8 * tokens, None),
        (met_NW, 8, 8 * (tokens // 2), tokens // 2),
    ):
        placing = place_plainly(bins_RC, bins, pairs, all_chosen=False, slots=slots)
        placed = sorting_triton.place(bins_RC.to(device), bins, pairs, slots or 0)
        same = all(torch.equal(a.cpu(), b) for a, b in zip(placed, placing[:5], strict=True))
        yield f"places of {pairs} pairs, {slots} slots", Off(float(not same), 0.0)
    assert placing.filled is not None
    x_ND, at = torch.randn(tokens, 96, generator=draw), torch.arange(8 * (tokens // 2))
    there_M = at % placing.slots < placing.counts[at // placing.slots]
    copied = sorting_triton.copy_rows(
        x_ND.to(device), placing.row_M.to(device), placing.counts.to(device), placing.slots
    )
    yield "rows copied", Off(float(not torch.equal(copied.cpu()[there_M], x_ND[placing.row_M][there_M])), 0.0)
    rows_MD = torch.randn(8 * (tokens // 2), 96, generator=draw)
    ours = sorting_triton.bag_sums(rows_MD.to(device), *(t.to(device) for t in (placing.place_M, placing.bags_R1)))
    yield "sums of rows", Off(distance(ours, sum_plainly(rows_MD, placing.place_M, placing.bags_R1)), 1e-6)


def fp8_kernels(device: torch.device, many: int, draw: torch.Generator) -> Iterator[tuple[str, Off]]:
    """Quantised to the same bits; products within the 14 bits or so that a GPU's units sum up with."""
    from pipeline.kernels import grouped_fp8_triton, quantise_triton

    offsets_e = torch.tensor([3, 3, 9], dtype=torch.int32) * many
    for width, columns in ((520, 136), (256, 128)):
        x_MK = torch.randn(10 * many, width, generator=draw).to(BF16)
        x_MK *= torch.exp(4 * torch.randn(x_MK.shape, generator=draw)).to(BF16)
        halves = [torch.randn(3, columns, width // 2, generator=draw).to(BF16) for _ in range(2)]
        rows, stack = plain_rows(x_MK, 2), plain_stacks(halves, transposed=False)
        pairs = {"rows": (quantise_triton.quantised_rows(x_MK.to(device), None, None, 0, 2), rows)}
        for transposed in (False, True):
            found = quantise_triton.quantised_stacks([half.to(device) for half in halves], transposed)
            pairs[f"stacks, transposed {transposed}"] = found, plain_stacks(halves, transposed=transposed)
        for name, (ours, theirs) in pairs.items():
            same = all(torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8)) for a, b in zip(ours, theirs))
            yield f"quantised {name}, {width} wide", Off(float(not same), 0.0)
        there = [each.to(device) for each in (*rows, *stack, offsets_e)]
        product = grouped_fp8_triton.grouped_fp8(*there, 2, torch.float32)[: 9 * many]
        expected = plain_grouped_fp8(rows, stack, offsets_e, torch.float32, 2)[: 9 * many]
        yield f"product in fp8, {width} wide", Off(distance(product, expected), 1e-3 if many > 1 else 1e-6)


def networks(device: torch.device) -> Iterator[tuple[str, Off]]:
    """Loss and gradients of a whole network, with and without checkpointing, and with masked documents."""
    config = small()
    ids_BS, cpu = ids_of(config, 96), torch.device("cpu")
    documents = [[40, 30, 26], [96]]
    for name, mask, mode in (
        ("network", None, "none"),
        ("checkpointed", None, "selective"),
        ("masked", documents, "none"),
    ):
        exact = loss_and_gradients(network(config, cpu, torch.float32), ids_BS, mask)
        allowed = bounds(device, exact, lambda mask=mask: loss_and_gradients(network(config, cpu, BF16), ids_BS, mask))
        found = loss_and_gradients(network(config, device, device_dtype(device), mode), ids_BS, mask)
        for what, ours, theirs, limit in zip(("loss", "gradients"), found, exact, allowed):
            yield f"{name}: {what}", Off(distance(ours, theirs), limit)
    exact = loss_and_gradients(network(config, cpu, torch.float32), ids_BS)
    found = loss_and_gradients(network(config, device, device_dtype(device), fp8=True), ids_BS)
    for what, ours, theirs, limit in zip(("loss", "gradients"), found, exact, FP8):
        yield f"experts in fp8: {what}", Off(distance(ours, theirs), limit)
    deep = config.model_copy(update={"num_hidden_layers": 5})
    again, plain = (loss_and_gradients(network(deep, device, device_dtype(device)), ids_BS) for _ in range(2))
    model = network(deep, device, device_dtype(device))
    on_host = offload.Offload(device, len(model.layers))
    for block in model.layers:
        cast(Block, block).offload = on_host
    with mock.patch.object(offload, "LEAST", 1):
        found = loss_and_gradients(model, ids_BS)
    for what, ours, theirs, twice in zip(("loss", "gradients"), found, plain, again):
        limit = 2 * distance(twice, theirs)  # 0 where the device gives the same bits twice
        yield f"activations on the host: {what}", Off(distance(ours, theirs), limit)
    model = network(config, device, device_dtype(device))
    packed = model(ids_BS[:1].to(device), None, [[40, 30, 26]])
    alone = torch.cat([model(part.to(device)) for part in ids_BS[:1].split([40, 30, 26], dim=1)], dim=1)
    limit = 1e-5 if device_dtype(device) == torch.float32 else 2e-2
    yield "documents in a row and alone", Off(distance(packed, alone), limit)


def trained(device: torch.device, gradient: float = 1.0) -> tuple[Moonlight, MoonlightOptimizer, Step]:
    """fp32 masters with drawn gradients; `gradient`: what one number of them is multiplied with."""
    config, settings = small(), OptimizerConfig()
    model = network(config, device, torch.float32)
    optimizer = build_optimizer(model.named_parameters(), settings, moonlight_rules(config, settings))
    step = Step(model, optimizer, Guard(device), Meshes(None, None), settings, device)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(device)
    first = next(model.parameters()).grad
    assert first is not None
    first.view(-1)[0] *= gradient
    return model, optimizer, step


def update(step: Step, device: torch.device) -> None:
    one = torch.ones((), device=device)
    step.update(one, one, torch.ones((), dtype=torch.int64, device=device), 1e-2, 1e-3, False)


def optimizer(device: torch.device) -> Iterator[tuple[str, Off]]:
    """One update of Muon and AdamW; a step whose gradient is not finite."""
    changes = {}
    for where in (torch.device("cpu"), device):
        model, _, step = trained(where)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        update(step, where)
        changes[where] = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    exact, found = changes[torch.device("cpu")], changes[device]
    by_muon = {fqn for fqn, _ in trained(device)[1].muon.parameters}
    for kind, allowed in (("Muon", 3e-2), ("AdamW", 1e-5)):
        names = [name for name in exact if (name in by_muon) == (kind == "Muon")]
        yield f"update by {kind}", Off(max(distance(found[name], exact[name]) for name in names), allowed)
    model, optimizer, step = trained(device, float("nan"))
    before = {name: t.clone() for name, t in {**model.state_dict(), **optimizer.state_dict()}.items()}
    update(step, device)
    after = {**model.state_dict(), **optimizer.state_dict()}
    same = all(torch.equal(before[name], after[name]) for name in before)
    yield "a gradient that is NaN changes nothing", Off(float(not same), 0.0)
    yield "and is counted", Off(abs(int(step.guard.skipped) - 1), 0.0)


def checkpoint(device: torch.device) -> Iterator[tuple[str, Off]]:
    """Saved from the device with and without a copy beside the next step, loaded back bit for bit."""
    model, optimizer, step = trained(device)
    update(step, device)
    state = {**model.state_dict(), **optimizer.state_dict(), **step.guard.state()}
    facts = RunFacts("bench", {"a": 1}, "d" * 64, "o" * 64)
    for number, asynchronous in enumerate((False, True), start=1):
        with tempfile.TemporaryDirectory() as root:
            storage = open_storage(StorageConfig(root=root))
            saver = Checkpointer(storage, CheckpointConfig(async_save=asynchronous, keep=9), facts, device)
            saver.save(state, step=number, next_sequence=number, tokens_seen=number, loss=1.0)
            saver.wait_staged()
            manifest = saver.settle()
            assert manifest is not None
            back = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            load_state(back, storage, manifest, None)
            saver.close()
        same = all(torch.equal(back[name], state[name]) for name in state)
        yield f"checkpoint, {'a' if asynchronous else ''}synchronous", Off(float(not same), 0.0)


def compilation(device: torch.device) -> Iterator[tuple[str, Off]]:
    """Compiled blocks against the same ones as they are."""
    config = small()
    ids_BS, dtype = ids_of(config, 96), device_dtype(device)
    eager = network(config, device, dtype, "selective")
    compiled = copy.deepcopy(eager)
    for block in compiled.layers:
        cast(Block, block).compile()
    pairs = zip(("loss", "gradients"), loss_and_gradients(compiled, ids_BS), loss_and_gradients(eager, ids_BS))
    for what, ours, theirs in pairs:
        yield f"compiled: {what}", Off(distance(ours, theirs), 1e-4 if dtype == torch.float32 else 5e-2)


def exchanges(device: torch.device) -> Iterator[tuple[str, Off]]:
    """A mixture layer whose rows travel in buffers of fixed size, in equal parts and by splits read on the device, against buffers that fit:
    the same bits, on a group of this process alone. Between GPUs: benchmarks.cluster."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group, config = dist.group.WORLD, small()
        missing = symmetric.missing(device, group, config.hidden_size * device_dtype(device).itemsize)
        if missing:
            show(f"parity of splits read on the device: skipped, {missing}")
        wires = {"equal parts": None} | ({} if missing else {"splits on the device": Wire(group, device)})
        ids_BS = ids_of(config, 96)
        exact, again = (loss_and_gradients(spread(config, device, AllToAllDispatch(group)), ids_BS) for _ in range(2))
        for name, wire in wires.items():
            found = loss_and_gradients(spread(config, device, BoundedDispatch(group, Room(1.0), wire=wire)), ids_BS)
            for what, ours, theirs, twice in zip(("loss", "gradients"), found, exact, again):
                limit = 2 * distance(twice, theirs)  # 0 where the device gives the same bits twice
                yield f"{name}: {what}", Off(distance(ours, theirs), limit)
    finally:
        dist.destroy_process_group()


def spread(config: ModelConfig, device: torch.device, dispatcher: Dispatcher) -> Moonlight:
    model = network(config, device, device_dtype(device))
    for block in (cast(Block, block) for block in model.layers):
        if isinstance(block.mlp, MoE):
            block.mlp.experts.dispatcher = dispatcher
    return model


CHECKS: tuple[Check, ...] = (kernels, networks, optimizer, checkpoint, compilation, exchanges)
