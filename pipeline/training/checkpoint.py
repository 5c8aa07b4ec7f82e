"""Checkpoints: written by every rank straight to storage, committed by one manifest, read back at any world size.

    <root>/runs/<run_id>/train/step-00000400/
        writer-<number>/                of the lease under which they were written (writer.py)
            __<rank>_0.distcp, .metadata    pieces of tensors and where each lies (files.py)
        run.json                        what decides the losses (identity.py), to explain a refusal
        manifest.json                   last; without it the checkpoint does not exist

The state is parameters, optimizer moments, router biases and the guard's counters; what is global and small (step, next
sequence, tokens seen, loss) is in the manifest. Owners, buckets and meshes are never stored, so a load reshards to any
number of ranks and any expert degree.

`save` returns at once. A thread copies the local shards (the state must not change until `wait_staged` returns: the trainer
asks before it updates the weights, so the copy runs beside the next forward and backward pass) and then writes, with a gloo
group of its own because its collectives run beside those of training. On CUDA the copy is made before `save` returns. One
save is in flight at a time; `settle` waits for it, and is called before the next one, at the end, and wherever ranks must
agree that it is there. Memory: one copy of the local state; none without `checkpoint.async_save`.

`restore` checks every byte that it uses. A checkpoint that is damaged is named, passed over on all ranks and withdrawn, and
the newest sound one before it is taken.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pipeline.config.schema import CheckpointConfig
from pipeline.dataset.order import Order
from pipeline.manifest import CheckpointManifest, FileEntry, StoredFile, canonical_json
from pipeline.storage import Storage
from pipeline.training.commits import (
    MANIFEST,
    RUN,
    DamagedCheckpoint,
    RunFacts,
    commit,
    continue_from,
    parts_folder,
    step_folder,
)
from pipeline.training.files import CheckpointReader, CheckpointWriter
from pipeline.training.identity import identity_digest
from pipeline.training.left_out import LeftOut, read_left_out
from pipeline.training.retention import Retention


class Checkpointer:
    """Saves and restores one run's state. All methods are collective over the ranks of the default process group."""

    def __init__(
        self,
        storage: Storage,
        config: CheckpointConfig,
        facts: RunFacts,
        device: torch.device,
        named: frozenset[int] = frozenset(),
        check: Callable[[], None] = lambda: None,
        waiting: int = 0,
    ) -> None:
        """`named`, `waiting`: which checkpoints are kept (retention.py). `check`: asked on rank 0 before anything is deleted or
        committed; raises if this process may not."""
        self._storage = storage
        self._config = config
        self._facts = facts
        self._check = check
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._cuda = cuda = device.type == "cuda"
        options = StagingOptions(
            use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
        )
        self._stager = DefaultStager(options)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[CheckpointManifest] | None = None
        self._staged = threading.Event()
        self._retention = Retention(storage, facts.run_id, config, named, waiting)
        self.committed_step = 0  # of the newest checkpoint, as soon as it is committed; rank 0 knows

    # -- save ----------------------------------------------------------------------------------------------------

    def save(
        self,
        state: dict[str, Tensor],
        *,
        step: int,
        next_sequence: int,
        tokens_seen: int,
        loss: float | None,
        metrics: tuple[FileEntry, ...] = (),
        newton_schulz: str = "",
        skipped_steps: int = 0,
        left_out: tuple[tuple[int, int], ...] = (),
        mesh: dict[str, int] | None = None,
    ) -> None:
        """Begin to save; `settle` says when it is committed. Without `checkpoint.async_save` it is when this returns. The
        tensors of `state` must stay as they are until `wait_staged` returns."""
        assert self._pending is None, "settle the previous save first"
        facts: dict[str, Any] = {"step": step, "next_sequence": next_sequence, "tokens_seen": tokens_seen}
        facts |= {"loss": loss, "metrics": metrics, "newton_schulz": newton_schulz}
        facts |= {"skipped_steps": skipped_steps, "left_out": left_out, "mesh": mesh or {}}
        self._staged.clear()
        stage = self._config.async_save
        if stage and self._cuda:
            state = self._stage(state)
            stage = False
        self._pending = self._writer.submit(self._stage_and_write, state, facts, stage)
        if not self._config.async_save:
            self._pending.exception()  # waits; `settle` raises it

    def wait_staged(self) -> None:
        """Wait until the state of the save in flight, if any, has been copied."""
        if self._pending is not None:
            self._staged.wait()

    def settle(self) -> CheckpointManifest | None:
        """Wait for the save in flight, on every rank; its manifest, or None without one. Raises what the save raised."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        return pending.result()

    def close(self) -> None:
        self._writer.shutdown(wait=True)

    def _stage(self, state: dict[str, Tensor]) -> Any:
        return self._stager.stage(state)

    def _stage_and_write(self, state: dict[str, Tensor], facts: dict[str, Any], stage: bool) -> CheckpointManifest:
        try:
            staged = self._stage(state) if stage else state
        finally:
            self._staged.set()
        return self._write(staged, facts)

    def _write(self, state: dict[str, Tensor], facts: dict[str, Any]) -> CheckpointManifest:
        folder = step_folder(self._facts.run_id, facts["step"])
        run = canonical_json(self._facts.identity)
        self.on_rank_0(lambda: self._begin(folder, run))
        writer = CheckpointWriter(self._storage, parts_folder(self._facts.run_id, facts["step"], self._facts.fence))
        try:
            save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:
            raise cause_of(error) from error
        manifest: CheckpointManifest = self.on_rank_0(lambda: self._commit(writer, folder, run, facts))
        return manifest

    def _begin(self, folder: str, run: bytes) -> None:
        """What killed attempts left there goes, but nothing of a later writer's."""
        self._check()
        names = self._storage.names(folder)
        for name in sorted(names, key=lambda name: name != MANIFEST):  # it goes first: half a checkpoint does not exist
            number = name.removeprefix("writer-")
            if number == name or int(number) <= (self._facts.fence or 0):
                self._storage.delete(f"{folder}/{name}")
        self._storage.write(f"{folder}/{RUN}", run)

    def _commit(self, writer: CheckpointWriter, folder: str, run: bytes, facts: dict[str, Any]) -> CheckpointManifest:
        files = [*writer.files, StoredFile(path=f"{folder}/{RUN}", bytes=len(run))]
        manifest = CheckpointManifest(
            run_id=self._facts.run_id,
            run_identity=identity_digest(self._facts.identity),
            dataset_digest=self._facts.dataset_digest,
            order_digest=self._facts.order_digest,
            content_sha256=writer.content_sha256,
            files=tuple(sorted(files, key=lambda file: file.path)),
            metadata_sha256=writer.metadata_sha256,
            world_size=self._world,
            fence=self._facts.fence,
            **facts,
        )
        self._check()
        commit(self._storage, manifest)
        self.committed_step = manifest.step
        self._retention.collect(manifest.step)
        return manifest

    # -- restore -------------------------------------------------------------------------------------------------

    def newest(self, order: Order, *, below: int | None = None) -> CheckpointManifest | None:
        """`continue_from`, the same on all ranks; rank 0 says which checkpoints it passes over."""
        found: CheckpointManifest | None = self.on_rank_0(
            lambda: continue_from(self._storage, self._facts, order, below=below, passed_over=_say)
        )
        self.committed_step = 0 if found is None else found.step
        return found

    def restore(self, state: dict[str, Tensor], manifest: CheckpointManifest, order: Order) -> CheckpointManifest:
        """Fill `state` in place from the checkpoint, or from the newest sound one before it; which it was.

        Raises ValueError that names the first tensor that is missing, extra or misshaped, and DamagedCheckpoint if no
        checkpoint is sound.
        """
        found: CheckpointManifest | None = manifest
        while found is not None:
            try:
                load_state(state, self._storage, found, self._group)
            except DamagedCheckpoint as error:
                if self._rank == 0:
                    _say(found.step, str(error))
                earlier = self.newest(order, below=found.step)
                if earlier is None:
                    raise
                found = earlier
            else:
                return found
        raise AssertionError

    def leave_stale(self) -> LeftOut:
        """What the run has left out so far, the same on all ranks; checkpoints of ways that it has left count no more."""

        def leave() -> LeftOut:
            found = read_left_out(self._storage, self._facts.run_id)
            if found.detours:
                self._check()
                self._retention.withdraw(0, found.is_stale)
            return found

        result: LeftOut = self.on_rank_0(leave)
        return result

    def take_over(self, state: dict[str, Tensor], manifest: CheckpointManifest) -> None:
        """Fill `state` in place from another run's checkpoint, that one or none. Raises as `load_state` does."""
        load_state(state, self._storage, manifest, self._group)

    def collect_leftovers(self, resumed: int) -> None:
        """When the run begins after step `resumed`: later checkpoints are damaged and count no more, and what crashes left
        goes."""

        def collect() -> None:
            self._retention.withdraw(resumed)
            self._retention.sweep(resumed)

        self.on_rank_0(collect)

    # -- between ranks -------------------------------------------------------------------------------------------

    def on_rank_0(self, do: Callable[[], Any]) -> Any:
        """What rank 0 does, the others wait for and get; an error, too."""
        answer: Any = None
        if self._rank == 0:
            try:
                answer = do()
            except Exception as error:
                answer = error
        if self._group is not None:
            box = [answer]
            dist.broadcast_object_list(box, src=0, group=self._group)
            answer = box[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def load_state(
    state: dict[str, Tensor], storage: Storage, manifest: CheckpointManifest, group: dist.ProcessGroup | None
) -> None:
    """Read a checkpoint into the tensors of `state`, each rank its own shards, whatever layout it was written in.

    Collective over `group`; None: this process alone. Raises ValueError if the checkpoint's tensors are not those of
    `state`, and DamagedCheckpoint, on all ranks alike, if a byte that any of them reads is not as it was written.
    """
    reader = CheckpointReader(storage, manifest)
    load_tensors(state, reader, group, lambda stored: _check_names(state, stored, storage, manifest))


def load_tensors(
    state: dict[str, Any],
    reader: CheckpointReader,
    group: dist.ProcessGroup | None,
    check: Callable[[dict[str, tuple[int, ...]]], None],
) -> None:
    """Fill the tensors of `state`; `check` is given the shapes of all stored tensors first, and raises if they do not fit."""
    refusal: Exception | None = None
    try:
        facts = reader.read_metadata().state_dict_metadata
        check({name: tuple(tensor.size) for name, tensor in facts.items() if isinstance(tensor, TensorStorageMetadata)})
    except Exception as error:
        refusal = error
    if group is not None:  # one rank's trouble is everybody's
        refusals: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(refusals, refusal, group=group)
        refusal = next((each for each in refusals if each is not None), None)
    if refusal is not None:
        raise refusal
    try:
        load(state, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise cause_of(error) from error


def _check_names(
    state: dict[str, Tensor], stored: dict[str, tuple[int, ...]], storage: Storage, manifest: CheckpointManifest
) -> None:
    folder = storage.uri(step_folder(manifest.run_id, manifest.step))
    for name in sorted(state.keys() | stored.keys()):
        where = f"checkpoint {folder}: {name}"
        if name not in stored:
            raise ValueError(
                f"{where} is missing; expected shape {tuple(state[name].shape)}: was it made by another version?"
            )
        if name not in state:
            raise ValueError(
                f"{where} {stored[name]} is not a tensor of this run; check the model and optimizer sections"
            )
        if stored[name] != tuple(state[name].shape):
            raise ValueError(
                f"{where} has shape {stored[name]}, expected {tuple(state[name].shape)}; check the model section"
            )


def cause_of(error: CheckpointException) -> BaseException:
    """What went wrong on a rank, which DCP hands to all of them: damage only if that is all that went wrong."""
    causes = [cause for cause, _ in error.failures.values()]
    return next((cause for cause in causes if not isinstance(cause, DamagedCheckpoint)), causes[0])


def _say(step: int, why: str) -> None:
    print(f"checkpoint of step {step} passed over: {why}", file=sys.stderr, flush=True)
