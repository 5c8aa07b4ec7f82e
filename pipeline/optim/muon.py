"""The optimizer: distributed Muon for matrices, AdamW for the rest, one learning rate and one weight decay.

The rule (Moonlight, arXiv 2502.16982 section 2; bit for bit `torch.optim.Muon` with "match_rms_adamw" where the
device multiplies bf16, see `newton_schulz.py`):

    m <- mu m + (1 - mu) g                        momentum (a scaled form of the paper's sum; Newton-Schulz is scale-free)
    d <- mu m + (1 - mu) g                        Nesterov: the momentum seen one step ahead
    o <- newton_schulz(d)                         bf16; every block (matrix, expert or head) on its own
    w <- (1 - lr * wd) w - lr * 0.2 * sqrt(max(rows, columns)) * o

Parameters, gradients and momentum stay the shards that FSDP2 and expert parallelism made of them. A step runs the
buckets of the plan (`layout.py`), each in up to four phases, which end where a collective is in flight:

    1. momentum and direction of my pieces, cast into one flat buffer       -> all-to-all to the owners
    2. Newton-Schulz of the blocks I own, batched by shape                  -> all-to-all back
    3. only if replicas share the work: results to the other replicas       -> all-to-all between replicas
    4. weight decay and update of my pieces

Two exchanges are in flight at a time and local blocks (experts: 94 % of the work) are computed behind them.
Communication is launched first: Newton-Schulz fills a GPU, and a collective launched after it would only start when it
ends. The host never waits for the device.

With `momentum_dtype: bf16` momentum is rounded to nearest where it is put away, and nowhere else: a step advances it in fp32
and takes the direction from what it has before rounding, as `torch.optim.Muon` would whose buffers somebody rounds between
steps, bit for bit. A rounding is at most 2^-8 of the element, and decays with the momentum, so the kept one is within
2^-8 / (1 - mu) of the largest that the fp32 one has been (0.08 at mu 0.95; as errors fall either way, about a hundredth).

On a CPU buckets of local blocks are small enough for their direction, iterates and weights to stay in the cache.

Memory: 4 bytes per Muon element of state, or 2; in a step about 2 x 3 buckets in the wire dtype, fp32 copies of one bucket's
direction, momentum and weights (momentum only with `ok` or if it is kept in bf16, weights only with `ok`), and Newton-Schulz's workspace of four copies of a bucket.

Legend: B matrices of one shape, M rows, N columns.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from pipeline.config.schema import MuonConfig, OptimizerConfig
from pipeline.optim.adamw import AdamW, local
from pipeline.optim.boxes import Box, Layout
from pipeline.optim.exchange import Exchange, Handle, Piece, cut
from pipeline.optim.newton_schulz import CPU_TILE, coefficients, orthogonalize
from pipeline.optim.plan import MuonParameter, Plan, view
from pipeline.optim.products import choose, dtype_of
from pipeline.optim.replicas import plan_of
from pipeline.optim.rules import Rule, match_rules
from pipeline.optim.sent import bytes_sent
from pipeline.parallel.exposed import Exposed


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, rules: Sequence[Rule]
) -> MoonlightOptimizer:
    """The optimizer of a model that is already sharded (or of an unsharded one).

    Args:
        named_parameters: all parameters; those with `requires_grad=False` are left alone.
        config: the run's `optimizer` section.
        rules: who is trained how, usually `moonlight_rules(model_config, config)`.

    Raises:
        ValueError: a parameter without a rule, a rule without a parameter, or a layout that Muon cannot serve.
    """
    trainable = [(fqn, p) for fqn, p in named_parameters if p.requires_grad]
    chosen = match_rules([(fqn, tuple(p.shape)) for fqn, p in trainable], rules)
    matrices = [(fqn, p, rule.block_rows) for (fqn, p), rule in zip(trainable, chosen) if rule.treatment == "muon"]
    others = [(fqn, p) for (fqn, p), rule in zip(trainable, chosen) if rule.treatment == "adamw"]
    return MoonlightOptimizer(
        Muon(matrices, config.muon, config.weight_decay), AdamW(others, config.adamw, config.weight_decay)
    )


class MoonlightOptimizer:
    """Muon and AdamW behind one `step`. Build it with `build_optimizer`."""

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.muon, self.adamw = muon, adamw

    @torch.no_grad()
    def step(
        self, lr: float, ok: Tensor | None = None, *, measure: bool = False, exposed: Exposed | None = None
    ) -> None:
        """Updates every parameter that has a gradient.

        Args:
            lr: learning rate of this step.
            ok: 0-dim tensor on the device. Where it is 0 the step changes nothing, bit for bit, whatever the gradients
                contain; None means 1.
            measure: also accumulate the update RMS that `stats` reports (one more pass over the updates).
            exposed: counts what is waited for.
        """
        self.muon.step(lr, ok, measure, exposed or Exposed())
        self.adamw.step(lr, ok)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for _, parameter in [*self.muon.parameters, *self.adamw.parameters]:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """All state, flat: "<parameter name>.<state>" -> tensor sharded like the parameter. The tensors themselves."""
        return {**self.muon.state(), **self.adamw.state()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copies state in. Raises ValueError if names or shapes differ from this optimizer's."""
        own = self.state_dict()
        for name in [*own, *state_dict]:
            found, expected = state_dict.get(name), own.get(name)
            if found is None or expected is None or found.shape != expected.shape:
                raise ValueError(
                    f"optimizer state {name!r}: found {_shape(found)}, expected {_shape(expected)}; "
                    f"load a checkpoint of the same model with the same optimizer rules"
                )
        with torch.no_grad():
            for name, expected in own.items():
                if state_dict[name] is not expected:
                    expected.copy_(state_dict[name])

    def stats(self) -> dict[str, Any]:
        """Facts about a step on this rank; `update_rms` waits for the device and covers this rank's shards.

        bytes_sent: per step; newton_schulz_flops: of this rank; imbalance: busiest rank over the average; buckets;
        plans: parameters per plan; update_rms: of the last measured step, per group of parameters, before lr.
        """
        plans = {plan.value: self.muon.plan.plans.count(plan) for plan in Plan}
        plans[Plan.ADAMW.value] = len(self.adamw.parameters)
        return {**self.muon.stats(), "plans": plans}


class Muon:
    """Plans once, then executes the plan on the local shards of named matrices and stacks."""

    def __init__(
        self, parameters: Sequence[tuple[str, nn.Parameter, int | None]], config: MuonConfig, weight_decay: float
    ) -> None:
        self.parameters = [(fqn, p) for fqn, p, _ in parameters]
        self.config, self.weight_decay = config, weight_decay
        self.device = local(self.parameters[0][1]).device if self.parameters else torch.device("cpu")
        kept = torch.bfloat16 if config.momentum_dtype == "bf16" else torch.float32
        self.momentum = [
            torch.zeros_like(p, dtype=kept, memory_format=torch.preserve_format) for _, p in self.parameters
        ]
        self.wire = torch.bfloat16 if config.wire_dtype == "bf16" else torch.float32
        self.schedule = coefficients(config.newton_schulz, config.newton_schulz_steps)
        planned = [MuonParameter(fqn, layout_of(fqn, p), block_rows) for fqn, p, block_rows in parameters]
        meshes = [p.device_mesh if isinstance(p, DTensor) else None for _, p in self.parameters]
        ranks = {_mesh_rank(mesh, item.layout) for mesh, item in zip(meshes, planned) if mesh is not None}
        if len(ranks) > 1:
            raise ValueError(
                f"the meshes of the parameters number this rank differently: {sorted(ranks)}; build them from one mesh"
            )
        rank = ranks.pop() if ranks else 0
        self.stored: list[Box] = [item.layout.box(item.layout.coordinates(rank)) for item in planned]
        on_cpu = self.device.type == "cpu"
        self.plan = plan_of(planned, config, CPU_TILE * self.wire.itemsize if on_cpu else None)
        self.rank = rank
        mesh_groups = next((mesh.get_all_groups() for mesh in meshes if mesh is not None), [])
        self.products = choose(config.products, config.backend, self.device, mesh_groups)
        replica, replica_group, replicas = (
            _replicas(planned, meshes, rank) if self.plan.split_replicas else (0, None, 1)
        )
        groups = {
            item.layout.axes[a][0]: mesh.get_group(a)
            for mesh, item in zip(meshes, planned)
            if mesh is not None
            for a in range(mesh.ndim)
        }
        self.exchanges = [
            Exchange(
                bucket, self.device, groups[bucket.axis] if bucket.axis else None, replica, replica_group, replicas
            )
            for bucket in view(self.plan, rank)
        ]
        self.bytes_sent = bytes_sent(self.plan, rank, self.wire.itemsize)
        self.squares: dict[str, tuple[Tensor, int]] = {}

    def state(self) -> dict[str, Tensor]:
        return {f"{fqn}.momentum_buffer": m for (fqn, _), m in zip(self.parameters, self.momentum)}

    @property
    def multiplied(self) -> str:
        """What Newton-Schulz multiplies here: bf16, fp16 or fp32; nothing without matrices."""
        return dtype_of(self.products, self.config.backend) if self.parameters else ""

    def stats(self) -> dict[str, Any]:
        return {
            "bytes_sent": self.bytes_sent,
            "newton_schulz_flops": self.plan.loads[self.rank],
            "imbalance": self.plan.imbalance,
            "buckets": len(self.plan.buckets),
            "update_rms": {name: math.sqrt(total.item() / count) for name, (total, count) in self.squares.items()},
        }

    def step(self, lr: float, ok: Tensor | None, measure: bool, exposed: Exposed) -> None:
        """One update; see `MoonlightOptimizer.step`."""
        if measure:
            self.squares = {}
        ok = None if ok is None else ok != 0
        work = [(exchange, self._run(exchange, lr, ok, measure)) for exchange in self.exchanges]
        overlap([run for e, run in work if e.group is not None], [run for e, run in work if e.group is None], exposed)

    def _run(self, exchange: Exchange, lr: float, ok: Tensor | None, measure: bool) -> Iterator[Handle]:
        """The phases of one bucket; yields what has to be waited for before it is resumed."""
        send = torch.empty(sum(exchange.send_splits), dtype=self.wire, device=exchange.device)
        self._directions(exchange.pieces, exchange.slots(send), ok)
        self._momentum([piece for piece in exchange.other_pieces if self._gradient(piece) is not None], ok)
        received, handle = exchange.forth(send)
        yield handle
        results = [
            orthogonalize(x_BMN, self.schedule, self.config.backend, self.products)
            for x_BMN in exchange.assemble(received)
        ]
        del send, received
        pieces, updates = exchange.pieces, [o_MN for o_BMN in results for o_MN in o_BMN.unbind(0)]
        if exchange.group is not None or exchange.replica_group is not None:
            buffer, handle = exchange.back(exchange.disassemble(results, self.wire))
            yield handle
            updates = exchange.slots(buffer)
        if exchange.replica_group is not None:
            theirs, handle = exchange.share(buffer)
            yield handle
            pieces = pieces + exchange.other_pieces
            updates = updates + cut(theirs, [piece.region for piece in exchange.other_pieces])
        self._apply(pieces, updates, lr, ok, measure)

    def _momentum(self, pieces: Sequence[Piece], ok: Tensor | None) -> list[Tensor]:
        """Advances the momentum of the pieces (which have gradients) and returns it; not ok: as if it had advanced."""
        momenta = [self._view(self.momentum[piece.block.parameter], piece) for piece in pieces]
        gradients = [self._view(self._gradient(piece), piece) for piece in pieces]
        if not momenta:
            return []
        weight = 1 - self.config.momentum
        if ok is None and self.config.momentum_dtype == "fp32":
            torch._foreach_lerp_(momenta, gradients, weight)
            return momenta
        if self.config.momentum_dtype == "fp32":
            advanced = list(torch._foreach_lerp(momenta, gradients, weight))
        else:
            advanced = [torch.empty_like(gradient) for gradient in gradients]
            torch._foreach_copy_(advanced, momenta)
            torch._foreach_lerp_(advanced, gradients, weight)
        if ok is None:
            torch._foreach_copy_(momenta, advanced)
        else:
            _select(ok, advanced, momenta)
        return advanced

    def _directions(self, pieces: Sequence[Piece], slots: Sequence[Tensor], ok: Tensor | None) -> None:
        """Advances momentum and writes the (Nesterov) direction into the slots; zero where there is no gradient."""
        has_gradient = [self._gradient(piece) is not None for piece in pieces]
        live = list(compress(pieces, has_gradient))
        for slot, found in zip(slots, has_gradient):
            if not found:
                slot.zero_()
        directions = self._momentum(live, ok)
        if not directions:
            return
        if self.config.nesterov:
            gradients = [self._view(self._gradient(piece), piece) for piece in live]
            directions = list(torch._foreach_lerp(gradients, directions, self.config.momentum))
        torch._foreach_copy_(list(compress(slots, has_gradient)), directions)

    def _apply(
        self, pieces: Sequence[Piece], updates: Sequence[Tensor], lr: float, ok: Tensor | None, measure: bool
    ) -> None:
        """Weight decay with the plain learning rate, then the update with the learning rate scaled by its shape."""
        by_scale: dict[float, list[tuple[Piece, Tensor]]] = {}
        for piece, update in zip(pieces, updates, strict=True):
            if self._gradient(piece) is not None:
                scale = self.config.update_rms * math.sqrt(max(piece.block.matrix))
                by_scale.setdefault(scale, []).append((piece, update))
        for scale, items in by_scale.items():
            weights = [self._view(self.parameters[piece.block.parameter][1], piece) for piece, _ in items]
            directions = [update for _, update in items]
            if ok is None:
                new = weights
                torch._foreach_mul_(new, 1 - lr * self.weight_decay)
            else:
                new = list(torch._foreach_mul(weights, 1 - lr * self.weight_decay))
            torch._foreach_add_(new, directions, alpha=-(lr * scale))
            if ok is not None:
                _select(ok, new, weights)
            if measure:
                self._measure(items, scale)

    def _measure(self, items: Sequence[tuple[Piece, Tensor]], scale: float) -> None:
        for piece, update in items:
            name = re.sub(r"\.\d+\.", ".*.", self.parameters[piece.block.parameter][0])
            total, count = self.squares.get(name, (torch.zeros((), device=update.device), 0))
            self.squares[name] = (total + update.float().square().sum() * scale**2, count + update.numel())

    def _gradient(self, piece: Piece) -> Tensor | None:
        return self.parameters[piece.block.parameter][1].grad

    def _view(self, tensor: Tensor | None, piece: Piece) -> Tensor:
        assert tensor is not None
        return piece.of(local(tensor), self.stored[piece.block.parameter])


def overlap(exchanges: Sequence[Iterator[Handle]], computations: Sequence[Iterator[Handle]], exposed: Exposed) -> None:
    """Runs all to their ends: at most two exchanges in flight, computations while they are.

    The order depends only on the numbers of both, which are equal on all ranks, so collectives match up.
    """
    waiting, computing = deque(exchanges), deque(computations)
    flying: deque[tuple[Iterator[Handle], dist.Work]] = deque()

    def resume(run: Iterator[Handle]) -> None:
        for handle in run:
            if handle is not None:
                flying.append((run, handle))
                return

    while waiting or computing or flying:
        while waiting and len(flying) < 2:
            resume(waiting.popleft())
        if computing:
            resume(computing.popleft())
        if flying:
            run, handle = flying.popleft()
            with exposed:
                handle.wait()
            resume(run)


def layout_of(fqn: str, parameter: Tensor) -> Layout:
    """How a parameter's mesh cuts it. Raises ValueError for placements Muon does not know."""
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return Layout(shape)
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or tuple(f"axis{index}" for index in range(mesh.ndim))
    dims: list[int | None] = []
    for name, placement in zip(names, parameter.placements):
        if isinstance(placement, Shard | _StridedShard):
            dims.append(placement.dim % len(shape))
        elif isinstance(placement, Replicate):
            dims.append(None)
        else:
            raise ValueError(
                f"parameter {fqn!r}: placement {placement} on mesh axis {name!r}; Muon takes Shard and Replicate"
            )
    # FSDP2 writes _StridedShard for an axis that cuts after the axes to its right (expert parallelism cuts first).
    plain = [a for a, placement in enumerate(parameter.placements) if not isinstance(placement, _StridedShard)]
    strided = [a for a, placement in enumerate(parameter.placements) if isinstance(placement, _StridedShard)]
    return Layout(shape, tuple(zip(names, mesh.shape)), tuple(dims), (*plain, *reversed(strided)))


def _mesh_rank(mesh: DeviceMesh, layout: Layout) -> int:
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is not part of the parameter's mesh"
    return layout.rank(coordinate)


def _replicas(
    planned: Sequence[MuonParameter], meshes: Sequence[DeviceMesh | None], rank: int
) -> tuple[int, dist.ProcessGroup, int]:
    """(index, group, number) of the replicas that share the work."""
    for item in planned:
        if len(item.layout.replicas) != 1:
            raise ValueError(
                f"parameter {item.fqn!r} is replicated along {len(item.layout.replicas)} mesh axes; muon.hsdp_split needs "
                f"every parameter replicated along exactly one: set it to 'off'"
            )
    axis = planned[0].layout.replicas[0]
    assert meshes[0] is not None
    return planned[0].layout.coordinates(rank)[axis], meshes[0].get_group(axis), planned[0].layout.axes[axis][1]


def _select(ok: Tensor, new: Sequence[Tensor], old: Sequence[Tensor]) -> None:
    """old <- new, in old's dtype, where ok; a select, not a product, so that NaN in `new` cannot pass."""
    for candidate, target in zip(new, old):
        torch.where(ok, candidate.to(target.dtype), target, out=target)


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else str(tuple(tensor.shape))
