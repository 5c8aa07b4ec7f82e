"""Checkpoints: written by every rank straight to storage, committed by one manifest, read back at any world size.

    <root>/runs/<run_id>/train/step-00000400/
        __<rank>_0.distcp, .metadata    torch Distributed Checkpoint, a flat state keyed by parameter name
        run.json                        what decides the losses (identity.py), to explain a refusal
        manifest.json                   last; without it the checkpoint does not exist

The state is parameters, optimizer moments, router biases and the guard's counters; what is global and small (step, next
sequence, tokens seen, loss) is in the manifest. Owners, buckets and meshes are never stored, so a load reshards to any
number of ranks and any expert degree.

`save` stages the local shards in host memory and returns; a thread then writes, with a gloo group of its own because
its collectives run beside those of training. One save is in flight at a time; `settle` waits for it, and is called
before the next one, at the end, and wherever ranks must agree that it is there. Cost of a save to the training thread:
one copy of the local state (12 bytes a parameter divided by the ranks of a replica).
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pipeline.config.schema import CheckpointConfig
from pipeline.dataset.order import Order
from pipeline.manifest import CheckpointManifest, FileEntry, canonical_json
from pipeline.storage import Storage
from pipeline.training.commits import MANIFEST, RUN, ForeignCheckpoint, RunFacts, committed, continue_from, step_folder
from pipeline.training.content import combine, local_sums
from pipeline.training.files import CheckpointReader, CheckpointWriter
from pipeline.training.identity import identity_digest


class Checkpointer:
    """Saves and restores one run's state. All methods are collective over the ranks of the default process group."""

    def __init__(self, storage: Storage, config: CheckpointConfig, facts: RunFacts, device: torch.device) -> None:
        self._storage = storage
        self._config = config
        self._facts = facts
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        cuda = device.type == "cuda"
        options = StagingOptions(
            use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
        )
        self._stager = DefaultStager(options)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[CheckpointManifest] | None = None
        self.committed_step = 0  # of the newest checkpoint, as soon as it is committed; rank 0 knows

    # -- save ----------------------------------------------------------------------------------------------------

    def save(self, state: dict[str, Tensor], *, step: int, next_sequence: int, tokens_seen: int, loss: float) -> None:
        """Begin to save; `settle` says when it is committed. Without `checkpoint.async_save` it is when this returns."""
        assert self._pending is None, "settle the previous save first"
        staged: Any = self._stager.stage(state)
        facts = {"step": step, "next_sequence": next_sequence, "tokens_seen": tokens_seen, "loss": loss}
        self._pending = self._writer.submit(self._write, staged, facts)
        if not self._config.async_save:
            self._pending.exception()  # waits; `settle` raises it

    def settle(self) -> CheckpointManifest | None:
        """Wait for the save in flight, on every rank; its manifest, or None without one. Raises what the save raised."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        return pending.result()

    def close(self) -> None:
        self._writer.shutdown(wait=True)

    def _write(self, state: dict[str, Tensor], facts: dict[str, Any]) -> CheckpointManifest:
        folder = step_folder(self._facts.run_id, facts["step"])
        if self._rank == 0:
            self._storage.delete(folder)  # what a killed attempt left there
            self._storage.write(f"{folder}/{RUN}", canonical_json(self._facts.identity))
        self._barrier()
        writer = CheckpointWriter(self._storage, folder)
        save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        shares = self._gather((local_sums(state, self._rank), writer.entries))
        manifest = None
        if shares is not None:
            files = [FileEntry.model_validate(entry) for _, entries in shares for entry in entries]
            manifest = CheckpointManifest(
                run_id=self._facts.run_id,
                run_identity=identity_digest(self._facts.identity),
                dataset_digest=self._facts.dataset_digest,
                order_digest=self._facts.order_digest,
                content_sha256=combine([sums for sums, _ in shares], state),
                files=tuple(sorted(files, key=lambda entry: entry.path)),
                world_size=self._world,
                **facts,
            )
            self._storage.write(f"{folder}/{MANIFEST}", manifest.to_json())
            self.committed_step = manifest.step
            self._retire()
        return self._from_rank_0(manifest)

    def _retire(self) -> None:
        """Keep the newest `checkpoint.keep`; the manifest goes first, so a half-deleted checkpoint does not exist."""
        for old in committed(self._storage, self._facts.run_id)[: -self._config.keep]:
            folder = step_folder(old.run_id, old.step)
            self._storage.delete(f"{folder}/{MANIFEST}")
            self._storage.delete(folder)

    # -- restore -------------------------------------------------------------------------------------------------

    def newest(self, order: Order) -> CheckpointManifest | None:
        """`continue_from`, the same on all ranks."""
        found: CheckpointManifest | ForeignCheckpoint | None = None
        if self._rank == 0:
            try:
                found = continue_from(self._storage, self._facts, order)
            except ForeignCheckpoint as refusal:
                found = refusal
        found = self._from_rank_0(found)
        if isinstance(found, ForeignCheckpoint):
            raise found
        self.committed_step = 0 if found is None else found.step
        return found

    def restore(self, state: dict[str, Tensor], manifest: CheckpointManifest) -> None:
        """Fill `state` in place. Raises ValueError that names the first tensor that is missing, extra or misshaped."""
        load_state(state, self._storage, manifest, self._group)

    # -- between ranks -------------------------------------------------------------------------------------------

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(group=self._group)

    def _gather(self, value: Any) -> list[Any] | None:
        """The values of all ranks, on rank 0."""
        if self._group is None:
            return [value]
        values: list[Any] | None = [None] * self._world if self._rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values

    def _from_rank_0(self, value: Any) -> Any:
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def load_state(
    state: dict[str, Tensor], storage: Storage, manifest: CheckpointManifest, group: dist.ProcessGroup | None
) -> None:
    """Read a checkpoint into the tensors of `state`, each rank its own shards, whatever layout it was written in.

    Collective over `group`; None: this process alone. Raises ValueError if the checkpoint's tensors are not those of
    `state`.
    """
    folder = step_folder(manifest.run_id, manifest.step)
    reader = CheckpointReader(storage, folder)
    stored = {
        name: tuple(facts.size) if isinstance(facts, TensorStorageMetadata) else ()
        for name, facts in reader.read_metadata().state_dict_metadata.items()
    }
    for name in sorted(state.keys() | stored.keys()):
        where = f"checkpoint {storage.uri(folder)}: {name}"
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
    load(state, storage_reader=reader, process_group=group, no_dist=group is None)
