"""Silent corruption: one step in n is computed a second time with the ranks exchanged, and compared bit by bit.

A processor that computes wrongly now and then raises no error. On a step that is due (`training.recompute_every`) every rank first computes
the micro-batches of another rank and drops the gradients, then its own as always. Both times a digest is taken of what is this rank's
alone: the losses of its micro-batches, and its part of every gradient just before it is summed over ranks. On equal hardware the same
work gives the same bits, so a difference is a wrong result of one of the two, and the run stops before the update.

Whole expert-parallel groups change places: rank r computes what rank r + k * ep (modulo the world) computed. Its experts are the
same ones there, and their rows come in the same order; another order of sums would be other bits. So what is told apart are these groups, which
are single ranks where ep is 1. k changes from one check to the next, so that a rank is compared with others in turn.

A difference is settled by further passes. With three groups or more a third one computes, and the majority is right. With two each repeats its
own: the one that does not get its own result again is named, or else both. Where no two results are the same, nobody is to blame.

Not covered: the sums over ranks themselves, the optimizer's update and the stored weights, which all ranks share.

Cost of a step that is due: one more forward and backward pass with its communication, and the exchange of the rows; no memory, as the
dropped gradients are gone before the others come. A digest is the sum of the words of a buffer as integers: any single
flipped bit changes it, and no order of summation does. Without the option nothing of this exists.
"""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from pipeline.model.moonlight import Moonlight
from pipeline.model.qk_clip import take_max_logits
from pipeline.training.batches import StepBatch
from pipeline.training.guard import RunDiverged
from pipeline.training.step import Compute


class CorruptRank(RunDiverged):
    """A rank computed something else than another one from the same input."""


class Recomputation:
    """Watches the gradients of a sharded model. `checked`: the last step whose two results were the same, 0 for none."""

    def __init__(self, model: Moonlight, ep: int, every: int, device: torch.device) -> None:
        self.model = model
        self.ep = ep
        self.every = every
        self.device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.groups = self.world // ep
        self.checked = 0
        self._digests: list[_Digest] = []
        sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        groups = [group for module in sharded for group in module._get_fsdp_state()._fsdp_param_groups]  # type: ignore[attr-defined]
        for group in dict.fromkeys(groups):  # modules that are gathered together share one
            group._reduce_scatter_comm = digest = _Digest(device)
            self._digests.append(digest)

    def is_due(self, step: int) -> bool:
        return step % self.every == 0

    def __call__(
        self, step: int, batch: StepBatch, compute: Compute, drop: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        """`compute(batch)`, after somebody else's batch was computed and dropped. Raises CorruptRank, on all ranks alike."""
        shift = 1 + (step // self.every) % (self.groups - 1)
        theirs = self._pass(shift, batch, compute)
        drop()
        with self._watching():
            result = compute(batch)
            own = self._gathered(result)
        results = [(0, own), (shift, theirs)]
        if bool((self._by_group(*results[0]) == self._by_group(*results[1])).all()):
            self.checked = step
            return result
        others = [k for k in range(self.groups) if k not in (0, shift)][:1] or [0, shift]
        for k in others:
            drop()
            results.append((k, self._pass(k, batch, compute)))
        drop()
        raise CorruptRank(self._verdict(step, results))

    def _pass(self, shift: int, batch: StepBatch, compute: Compute) -> Tensor:
        """Compute the batch of the rank that is `shift` groups further; all ranks' digests."""
        theirs = self._batch_of(shift, batch)
        with self._watching():
            gathered = self._gathered(compute(theirs))
        take_max_logits(self.model)  # what a pass counts is the step's own, which is still to come
        for _, router in self.model.routers():
            router.tokens_per_expert.zero_()
        return gathered

    @contextmanager
    def _watching(self) -> Iterator[None]:
        for digest in self._digests:
            digest.begin()
        yield
        for digest in self._digests:
            digest.watching = False

    def _gathered(self, result: tuple[Tensor, Tensor]) -> Tensor:
        """[world, digests] int64."""
        losses = torch.stack([_words(part.detach().float()) for part in result])
        mine = torch.cat([losses, torch.stack([digest.total for digest in self._digests])])
        found = mine.new_empty(self.world * len(mine))
        dist.all_gather_single(found, mine)
        return found.view(self.world, -1).cpu()

    def _by_group(self, shift: int, gathered: Tensor) -> Tensor:
        """[groups, ranks of a group * digests] by whose batch it was, from [world, digests] by who computed it."""
        return gathered.view(self.groups, -1).roll(shift, dims=0)

    def _batch_of(self, shift: int, batch: StepBatch) -> StepBatch:
        """The batch of the rank `shift` groups further; this one's goes to the rank as far behind."""
        if shift == 0:
            return batch
        behind, further = ((self.rank + sign * shift * self.ep) % self.world for sign in (-1, 1))
        data = pickle.dumps(batch)
        sizes = torch.tensor([len(data), 0])
        _swap(sizes[:1], behind, sizes[1:], further)
        arriving = torch.empty(int(sizes[1]), dtype=torch.uint8)
        _swap(torch.frombuffer(bytearray(data), dtype=torch.uint8), behind, arriving, further)
        found: StepBatch = pickle.loads(arriving.numpy().tobytes())
        return found

    def _verdict(self, step: int, results: list[tuple[int, Tensor]]) -> str:
        """Who is wrong, and what to do."""
        tables = [self._by_group(shift, table) for shift, table in results]
        suspects: set[int] = set()
        repeated = False
        for owner in range(self.groups):
            by_digest: dict[bytes, list[int]] = defaultdict(list)
            for (shift, _), table in zip(results, tables):
                by_digest[table[owner].numpy().tobytes()].append((owner - shift) % self.groups)
            repeated |= any(len(who) > 1 for who in by_digest.values())
            suspects |= _wrong(list(by_digest.values()))
        hosts: list[Any] = [None] * self.world
        dist.all_gather_object(hosts, os.uname().nodename)
        if not repeated:
            return (
                f"step {step}: recomputed with ranks exchanged (training.recompute_every {self.every}), no two results were the same: the "
                "kernels are not deterministic here, or the ranks' hardware or libraries differ, so this check cannot be used; nothing of "
                "the step was applied"
            )
        ranks = [group * self.ep + place for group in sorted(suspects) for place in range(self.ep)]
        named = ", ".join(f"{rank} on {hosts[rank]}" for rank in ranks)
        what = "one of the ranks" if len(suspects) > 1 or self.ep > 1 else "the rank"
        since = f"since step {self.checked}, the last one that was the same," if self.checked else "of this process"
        return (
            f"step {step}: {what} {named} computes wrongly: recomputed with ranks exchanged (training.recompute_every {self.every}) the same "
            f"micro-batches gave other bits. Nothing of this step was applied or saved. Take the machine out and start again; checkpoints "
            f"{since} may hold what it spoilt: remove them"
        )


def _wrong(answers: list[list[int]]) -> set[int]:
    """Who gave another answer than most, from the holders of each distinct answer; all of them where there is no most."""
    if len(answers) == 1:
        return set()
    weights = [(len(set(who)), len(who)) for who in answers]  # different groups count first, then how often
    leading = [who for who, weight in zip(answers, weights) if weight == max(weights)]
    if len(leading) > 1:
        return {each for who in answers for each in who}
    return {each for who in answers if who is not leading[0] for each in who}


class _Digest(DefaultReduceScatter):
    """FSDP's reduce-scatter, which sums up what is handed to it: one group of parameters.

    FSDP takes two buffers of it, fills the first with this rank's gradients, and then takes the second; it calls for the sum itself only if
    the group has other ranks. So the first is looked at when the second is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self.watching = False
        self._filled: Tensor | None = None

    def begin(self) -> None:
        self.total.zero_()
        self.watching, self._filled = True, None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer: Tensor = super().allocate(size, dtype=dtype, device=device)
        if not self.watching:
            return buffer
        if self._filled is None:
            self._filled = buffer
        else:
            self.total += _words(self._filled)
            self._filled = None
        return buffer


def _words(values: Tensor) -> Tensor:
    """The sum of a contiguous tensor's words, as integers modulo 2^64."""
    values = values.reshape(-1)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.view(kind).sum(dtype=torch.int64)


def _swap(outgoing: Tensor, to: int, arriving: Tensor, of: int) -> None:
    sent, received = dist.isend(outgoing, to), dist.irecv(arriving, of)
    assert sent is not None
    assert received is not None
    sent.wait()
    received.wait()
