"""One training step of one rank, run whole without a GPU: forward, backward, Muon, checkpoint.

What runs is the trainer's own code on a device that is not there (device.py): the network sharded over the run's meshes, its
optimizer, its step. Routing is even: every expert gets as many rows as any other, and where the host reads how many, it is
told so. All rows are full. With document masks every row is one document.

Of many micro-batches three are run, the first, one between and the last, and the one between stands for all that are like it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from pipeline.config.schema import RunConfig
from pipeline.model import recomputation
from pipeline.model.block import Block, BlockOutput
from pipeline.model.loss import IGNORE
from pipeline.model.moonlight import Moonlight
from pipeline.optim.muon import build_optimizer
from pipeline.optim.rules import moonlight_rules
from pipeline.optim.schedule import segments
from pipeline.parallel import local, symmetric
from pipeline.parallel.bounded import room_for_all, room_for_pairs, room_for_rows
from pipeline.parallel.device_flight import Parcel
from pipeline.parallel.dispatch import ranks_met
from pipeline.parallel.mesh import build_meshes
from pipeline.parallel.shard import compute_dtype, shard_model
from pipeline.rehearsal import attention as rehearsed
from pipeline.rehearsal.device import TAPE, install
from pipeline.rehearsal.recorder import TO_HOST, Memory, Recorder
from pipeline.rehearsal.tape import Begin, Entry, HostWait, Kernel
from pipeline.training.batches import MicroBatch, StepBatch
from pipeline.training.guard import Guard
from pipeline.training.phases import Stopwatch
from pipeline.training.step import Step

CHECKPOINT = "checkpoint"  # a phase, and a stream of its own
BEHIND = "behind the step"  # the phase in which all of a step has been launched


@dataclass(frozen=True)
class Rehearsal:
    """What a rank does in one step, in launch order, and what it holds."""

    run: tuple[Entry, ...]  # the micro-batches that were run
    memory: Memory
    state_bytes: int  # parameters and optimizer state: what is there before the step
    micro_batches: int  # of the step
    tokens: int  # of this rank

    def whole(self, run: Sequence[Entry] | None = None) -> list[Entry]:
        """The tape of all micro-batches. `run`: another form of the tape that was run."""
        entries = list(self.run if run is None else run)
        if self.micro_batches <= 3:
            return entries
        begins = [index for index, entry in enumerate(entries) if isinstance(entry, Begin)]
        between = entries[begins[1] : begins[2]]
        return entries[: begins[2]] + between * (self.micro_batches - 3) + entries[begins[2] :]

    def host_waits(self) -> list[HostWait]:
        """Also those behind the step (`BEHIND`), whose last results the host asks for."""
        return [entry for entry in self.whole() if isinstance(entry, HostWait)]


class _Batches(list[MicroBatch]):
    """Says on the tape where a micro-batch begins."""

    def __iter__(self) -> Iterator[MicroBatch]:
        for number, micro in enumerate(super().__iter__()):
            TAPE.add(Begin(number))
            yield micro
        TAPE.add(Begin(-1))


def rehearse(config: RunConfig, *, limit: int | None = None) -> Rehearsal:
    """Rank 0 of the configuration's meshes, with the last batch size of its schedule. `limit`: bytes that the device has."""
    world = config.parallelism.world_size
    device = install(world)
    training = config.training.model_copy(update={"compile": False})  # what is compiled is the same arithmetic
    with torch.device("meta"):
        model = Moonlight(config.model, aux_loss_weight=training.aux_loss_weight)
    meshes = build_meshes(config.parallelism, device.type)
    shard_model(model, meshes, training, device)

    memory = Memory(TAPE, limit)
    in_all = segments(config.schedule, training.sequence_length)[-1].sequences // (world * training.micro_batch)
    batch = _batch(config, min(in_all, 3))
    tokens = training.micro_batch * training.sequence_length // (2 if training.interleave else 1)  # that travel at once
    network = config.model
    met = ranks_met(network.n_routed_experts, network.num_experts_per_tok, config.parallelism.ep)
    rows, pairs = int(tokens * met), tokens * network.num_experts_per_tok

    filled = _filled(config, tokens, rows, pairs, compute_dtype(training, device))

    with on_stage(memory, rows, pairs, filled):
        model.to_empty(device=device)
        model.train()
        rules = moonlight_rules(config.model, config.optimizer)
        optimizer = build_optimizer(model.named_parameters(), config.optimizer, rules)
        guard, once = Guard(device, training.spikes), training.gather_once
        step = Step(model, optimizer, guard, meshes, config.optimizer, device, gather_once=once)
        step.before_update = lambda: setattr(TAPE, "phase", "optimizer")
        stopwatch = Stopwatch(device, meshes.exposed)
        state_bytes = memory.now
        _say_where(model)
        stopwatch.begin()
        TAPE.phase, TAPE.running = "forward", True
        stopwatch.enter("compute")
        labels = torch.full((), batch.labels, dtype=torch.int64, device=device)
        loss, aux_loss = step.forward_backward(_Batches(batch.micro_batches), labels, labels)
        step.before_update()
        stopwatch.enter("optimizer")
        times, _ = stopwatch.take()
        fixed = step.fixed_room is not None
        step.update(loss, aux_loss, labels, 1e-4, 1e-3, False, times, may_repeat=fixed)
        TAPE.phase = BEHIND
        if fixed:
            step.happened()
        stopwatch.lap(1)
        stopwatch.read(1)
        with TAPE.during(CHECKPOINT), TAPE.on(CHECKPOINT):
            for tensor in {**model.state_dict(), **optimizer.state_dict()}.values():
                _to_host(memory, tensor)
        TAPE.running = False
    tokens = in_all * training.micro_batch * training.sequence_length
    return Rehearsal(tuple(TAPE.entries), memory, state_bytes, in_all, tokens)


@contextmanager
def on_stage(memory: Memory, rows: int = 0, pairs: int = 0, filled: Mapping[int, int] | None = None) -> Iterator[None]:
    """What is computed on the device inside is written down. `rows`, `pairs`: those that travel at once and meet experts;
    `filled`: see Recorder."""
    with ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(
                torch.nn.functional, "scaled_dot_product_attention", rehearsed.scaled_dot_product_attention
            )
        )
        stack.enter_context(
            mock.patch.object(recomputation, "KEPT", recomputation.KEPT | {"moonlight::rehearsed_attention"})
        )
        stack.enter_context(mock.patch.object(symmetric, "empty", _room))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda x: _even(x, rows, pairs)))
        stack.enter_context(mock.patch.object(FakeTensor, "__bool__", _yes))
        # makes tensors from numbers on the CPU first, as fake mode does where there is no GPU
        stack.enter_context(mock.patch.object(fake_tensor, "_is_privateuse1_backend_available", return_value=False))
        stack.enter_context(mock.patch.object(local, "compute_local_shape_and_global_offset", _really(local)))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(Recorder(TAPE, memory, filled))
        yield


def _filled(config: RunConfig, tokens: int, rows: int, pairs: int, dtype: torch.dtype) -> dict[int, int]:
    """Of the buffers of fixed size, how much is in use: {room: rows}."""
    capacity, ranks, model = config.training.expert_capacity, config.parallelism.ep, config.model
    if capacity is None or ranks == 1:
        return {}
    E, K = model.n_routed_experts, model.num_experts_per_tok
    in_all = room_for_all(tokens, E, K, ranks, capacity)  # and one row of NaN
    parcels = Parcel(in_all, model.hidden_size, dtype), Parcel(in_all, E // ranks, torch.float32)
    rooms = {ranks * room_for_rows(tokens, E, K, ranks, capacity), in_all, in_all + 1}
    rooms |= {parcel.lines(ranks)[0] for parcel in parcels}
    return dict.fromkeys(rooms, rows) | {room_for_pairs(tokens, E, K, ranks, capacity): pairs}


def _room(_: str, rows: int, width: int, dtype: torch.dtype, device: torch.device, group: Any) -> Tensor:
    return torch.empty(rows, width, dtype=dtype, device=device)


def _batch(config: RunConfig, micro_batches: int) -> StepBatch:
    B, S = config.training.micro_batch, config.training.sequence_length
    tokens_BS = torch.zeros(B, S, dtype=torch.int64)
    labels_BS = tokens_BS.clone()
    labels_BS[:, -1] = IGNORE
    documents = [[S]] * B if config.training.document_mask else None
    micro = MicroBatch(tokens_BS, labels_BS, [S] * B, documents)
    return StepBatch([micro] * micro_batches, micro_batches * B * (S - 1))


def _really(module: Any) -> Any:
    """DTensor's arithmetic of shards makes tensors and reads them, all on the host."""
    compute = module.compute_local_shape_and_global_offset

    def run(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return compute(*args, **kwargs)

    return run


def _even(x: Tensor, rows: int, pairs: int) -> Any:
    """The host reads how many rows, and pairs with experts, go to each rank and come from each: even shares."""
    TAPE.add(HostWait("tolist", TAPE.stream, TAPE.phase, TAPE.where))
    sides, kinds, ranks = x.shape
    assert kinds == 2, x.shape
    return [[[count // ranks] * ranks for count in (rows, pairs)] for _ in range(sides)]


def _yes(_: Tensor) -> bool:
    """The host asks whether all went well."""
    TAPE.add(HostWait("bool", TAPE.stream, TAPE.phase, TAPE.where))
    return True


def _say_where(model: Moonlight) -> None:
    """Name the part of the network that is at work: in forward by hooks, in backward when a gradient reaches its output."""

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            TAPE.phase, TAPE.part = "forward", name

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            TAPE.part = ""
            x = out.x_BSD if isinstance(out, BlockOutput) else out
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(lambda _: _begin_backward(name))

        return hook

    parts = {f"layers.{index}": block for index, block in enumerate(model.layers)}
    parts |= {"embed_tokens": model.embed_tokens, "lm_head": model.lm_head}
    for name, part in parts.items():
        assert isinstance(part, Block | nn.Module)
        part.register_forward_pre_hook(enter(name))
        part.register_forward_hook(leave(name))


def _begin_backward(name: str) -> None:
    TAPE.phase, TAPE.part = "backward", name


def _to_host(memory: Memory, tensor: Tensor) -> None:
    """A tensor's share on this rank copied to the host, as a checkpoint stages it."""
    local = getattr(tensor, "_local_tensor", tensor)
    size = local.numel() * local.element_size()
    TAPE.add(Kernel(TO_HOST, "host_copy", TAPE.stream, TAPE.phase, "", 0, ((memory.number(local), size),), ()))
