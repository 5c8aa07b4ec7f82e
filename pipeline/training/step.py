"""One optimizer step: forward and backward over the micro-batches, then one update that may turn out to be nothing.

    loss = sum over all labels of the global batch of -log p / number of those labels  +  mean over its sequences of the
           balance loss (already weighted by the network); a row without text is no sequence

The numbers of labels and sequences are reduced first (16 bytes), so each rank divides by the global count and gradients
are plain sums over ranks and micro-batches: the same step whatever the world size, micro-batch or amount of padding, which
is neither routed nor counted.

After the last backward one float64 vector is summed over all ranks, the only reduction of the update:

    [loss, balance loss, stop requests, this rank's share of the squared gradient norm, tokens per expert of all layers]

(float64 holds token counts exactly). From it follow, on the device and identically on every rank: the norm, the verdict
of the guard, the clipping, the update of the router biases (after the verdict), and the figures to log. The host reads
them one step later and never waits here, except with `training.expert_capacity` once, behind the step (room.py). Behind the sums each rank's times of an earlier step may travel (phases.py), in a place of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from pipeline.config.schema import OptimizerConfig
from pipeline.model.loss import LossOutput
from pipeline.model.moonlight import Moonlight
from pipeline.model.qk_clip import observe_max_logits, qk_clip_, take_max_logits
from pipeline.model.router import update_router_bias
from pipeline.model.row_products import kept
from pipeline.model.sequences import to_device
from pipeline.optim.muon import MoonlightOptimizer
from pipeline.parallel.grad_norm import clip_, local_gradients, local_squared_norm
from pipeline.parallel.mesh import Meshes
from pipeline.parallel.shard import keep_whole, lasting_copies, room_of, whole_groups
from pipeline.training.batches import MicroBatch, StepBatch
from pipeline.training.guard import Guard
from pipeline.training.room import FixedRoom

Compute = Callable[
    [StepBatch], tuple[Tensor, Tensor]
]  # gradients of a batch; this rank's share of loss and balance loss


class Step:
    """Callable; owns nothing but references to the parts it drives."""

    def __init__(
        self,
        model: Moonlight,
        optimizer: MoonlightOptimizer,
        guard: Guard,
        meshes: Meshes,
        config: OptimizerConfig,
        device: torch.device,
        *,
        gather_once: bool = False,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.guard = guard
        self.meshes = meshes
        self.gradient_clip = config.gradient_clip
        self.qk_clip = config.qk_clip
        self.device = device
        self.parameters = list(model.parameters())
        self.routers = dict(model.routers())
        self.whole = whole_groups(model, cut_too=gather_once)
        self.copies = lasting_copies(model, self.whole)
        self.before_update: Callable[[], None] = lambda: None  # asked when the weights are about to change
        self.before_repeat: Callable[[], None] = lambda: None  # told when a step is about to be computed again
        room = room_of(model)
        self.fixed_room = None if room is None else FixedRoom(room, tell=meshes.rank == 0)
        observe_max_logits(model, self.qk_clip is not None)

    def __call__(
        self,
        batch: StepBatch,
        learning_rate: float,
        bias_rate: float,
        stop: bool,
        recompute: Callable[[StepBatch, Compute, Callable[[], None]], tuple[Tensor, Tensor]] | None = None,
        times: Sequence[float] = (),
    ) -> Tensor:
        """Train on one global batch; the figures of the step as a device vector (see figures.py).

        `recompute`: computes the gradients in a way of its own, with the plain one at hand (recompute.py). `times`: this rank's; the
        result ends with those of all ranks."""
        sequences = sum(micro.sequences for micro in batch.micro_batches)
        counts = torch.stack([self._fill(batch.labels), self._fill(sequences)])
        if self.meshes.world_size > 1:
            with self.meshes.exposed:
                dist.all_reduce(counts)
        labels, sequences_in_all = counts.unbind()
        at_least_one = labels.clamp(min=1), sequences_in_all.clamp(min=1)

        def compute(batch: StepBatch) -> tuple[Tensor, Tensor]:
            return self.forward_backward(batch.micro_batches, *at_least_one)

        fixed = self.fixed_room is not None and self.fixed_room.begin()
        loss, aux_loss = compute(batch) if recompute is None else recompute(batch, compute, self.optimizer.zero_grad)
        self.before_update()
        rates = learning_rate, bias_rate
        values = self.update(loss, aux_loss, labels, *rates, stop, times, may_repeat=fixed)
        if fixed and not self.happened():
            self.before_repeat()
            loss, aux_loss = compute(batch)
            self.before_update()
            values = self.update(loss, aux_loss, labels, *rates, stop, times)
        return values

    def happened(self) -> bool:
        """Of a step with buffers of fixed size: whether they sufficed. The host waits."""
        assert self.fixed_room is not None
        return self.fixed_room.sufficed(self.guard.finite)

    def _fill(self, number: int) -> Tensor:
        """A number on the device; unlike a copy from the host a fill waits for nothing."""
        return torch.full((), number, dtype=torch.int64, device=self.device)

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], labels: Tensor, sequences: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the global loss, accumulated; returns this rank's share of loss and balance loss.

        `labels`, `sequences`: those of the global batch.
        """
        with kept(self.copies):
            return self._forward_backward(micro_batches, labels, sequences)

    def _forward_backward(
        self, micro_batches: Sequence[MicroBatch], labels: Tensor, sequences: Tensor
    ) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), device=self.device)
        aux_loss = torch.zeros((), device=self.device)
        for index, micro in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            if isinstance(self.model, FSDPModule) and self.meshes.replicas > 1:  # copies meet once a step
                self.model.set_requires_all_reduce(last)
            keep_whole(self.whole, last)
            out = self.model(
                to_device(micro.tokens_BS, self.device),
                to_device(micro.labels_BS, self.device),
                micro.doc_lens,
                lengths=micro.lengths,
            )
            assert isinstance(out, LossOutput)
            share = out.loss_sum / labels
            aux_share = out.aux_loss * (micro.sequences / sequences)
            (share + aux_share).backward()
            loss += share.detach()
            aux_loss += aux_share.detach()
        return loss, aux_loss

    @torch.no_grad()
    def update(
        self,
        loss: Tensor,
        aux_loss: Tensor,
        labels: Tensor,
        learning_rate: float,
        bias_rate: float,
        stop: bool,
        times: Sequence[float] = (),
        *,
        may_repeat: bool = False,
    ) -> Tensor:
        """Apply the gradients unless the guard objects. Nothing here reads a device value on the host. `may_repeat`: see Guard."""
        gradients = local_gradients(self.parameters)
        squares = local_squared_norm(gradients, self.meshes.replicas)
        counts = [router.tokens_per_expert.double() for router in self.routers.values()]
        stopping = torch.full((), float(stop), dtype=torch.float64, device=self.device)
        sums = [torch.stack([loss.double(), aux_loss.double(), stopping, squares]), *counts]
        packed = torch.cat([*sums, *self._in_own_place(times)])
        if self.meshes.world_size > 1:
            with self.meshes.exposed:
                dist.all_reduce(packed)
        counted = packed.numel() - len(times) * self.meshes.world_size
        loss, aux_loss, stopping, squares = packed[:4].unbind()
        loss = torch.where(labels > 0, loss, torch.nan)  # the mean over nothing is no loss: the guard skips the step
        counts_LE = packed[4:counted].view(-1, self.model.config.n_routed_experts)

        norm = squares.sqrt()
        ok = self.guard.judge(loss, norm, may_repeat=may_repeat)
        clip_(gradients, norm, self.gradient_clip)
        self.optimizer.step(learning_rate, ok, exposed=self.meshes.exposed)
        self.optimizer.zero_grad()
        update_router_bias(self.model, dict(zip(self.routers, counts_LE)), bias_rate * ok)
        for router in self.routers.values():
            router.tokens_per_expert.zero_()

        if self.qk_clip is not None:
            self.clip_logits(self.qk_clip, ok)

        imbalance_L = counts_LE.amax(1) / counts_LE.mean(1)
        figures = torch.stack([loss, aux_loss, norm, labels * ok.double()])
        skipped = torch.stack([self.guard.skipped, self.guard.in_a_row, *self.guard.spikes.counters]).double()
        return torch.cat([figures, skipped, stopping.unsqueeze(0), imbalance_L, packed[counted:]])

    def share(self, values: Sequence[float]) -> list[float]:
        """What `times` of a step would bring, now: the host waits for it."""
        shared = torch.cat(self._in_own_place(values))
        if self.meshes.world_size > 1:
            dist.all_reduce(shared)
        found: list[float] = shared.tolist()
        return found

    def _in_own_place(self, values: Sequence[float]) -> list[Tensor]:
        """To be summed over ranks: this rank's values where they belong, zeros where the others' do. Fills, as of `_fill`."""
        if not values:
            return []
        rank, others = self.meshes.rank, torch.zeros(len(values), dtype=torch.float64, device=self.device)
        mine = torch.stack([torch.full((), value, dtype=torch.float64, device=self.device) for value in values])
        return [others] * rank + [mine] + [others] * (self.meshes.world_size - rank - 1)

    def clip_logits(self, threshold: float, ok: Tensor) -> None:
        """QK-clip by the largest logits of the whole global batch; a skipped step clips nothing. One more small all-reduce."""
        max_logits_LH = take_max_logits(self.model)
        if self.meshes.world_size > 1:
            with self.meshes.exposed:
                dist.all_reduce(max_logits_LH, dist.ReduceOp.MAX)
        qk_clip_(self.model, torch.where(ok.bool(), max_logits_LH, -torch.inf), threshold)
