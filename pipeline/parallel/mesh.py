"""Device meshes: one grid of ranks seen twice, once for dense parameters and once for experts.

Rank r of a run with `replicate` x `shard` ranks has the dense coordinate (r // shard, r % shard). The same shard axis,
cut again into `efsdp` x `ep`, carries the experts:

    dense parameters    (replicate, shard)         every weight matrix cut over `shard`, copied over `replicate`
    experts             (replicate, efsdp, ep)     whole experts over `ep`, each group cut again over `efsdp`

so the ranks of one ep group are neighbours (the all-to-all of tokens stays inside a node when ep <= GPUs per node).
A `replicate` axis of size one is left out of the meshes that FSDP sees: it would only add collectives of one rank.

Without a process group there is one rank and no mesh: nothing is sharded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pipeline.config.schema import ParallelismConfig
from pipeline.parallel.exposed import Exposed


@dataclass(frozen=True)
class Meshes:
    """The meshes of a run; both are None without a process group."""

    dense: DeviceMesh | None  # axes ("replicate", "shard")
    sparse: DeviceMesh | None  # axes ("replicate", "efsdp", "ep")
    exposed: Exposed = field(default_factory=Exposed, compare=False)  # what this rank waits for the others

    @property
    def world_size(self) -> int:
        return 1 if self.dense is None else self.dense.size()

    @property
    def rank(self) -> int:
        return 0 if self.dense is None else self.dense.get_rank()

    @property
    def replicas(self) -> int:
        """Copies of every parameter."""
        return 1 if self.dense is None else self.dense.size(0)

    @property
    def ep(self) -> DeviceMesh | None:
        """The axis that whole experts are spread over; None where one rank holds them all."""
        if self.sparse is None or self.sparse["ep"].size() == 1:
            return None
        return self.sparse["ep"]

    @property
    def dense_fsdp(self) -> DeviceMesh:
        """What `fully_shard` gets for dense parameters: (shard) or (replicate, shard)."""
        assert self.dense is not None
        return self.dense if self.replicas > 1 else self.dense["shard"]

    @property
    def expert_fsdp(self) -> DeviceMesh:
        """What `fully_shard` gets for experts that already are spread over `ep`: (efsdp) or (replicate, efsdp)."""
        assert self.sparse is not None
        return self.sparse["replicate", "efsdp"] if self.replicas > 1 else self.sparse["efsdp"]


def build_meshes(parallelism: ParallelismConfig, device_type: str) -> Meshes:
    """Lay the meshes over the ranks of the default process group (a collective call).

    `device_type` is explicit because FSDP2 otherwise moves a CPU model to any CUDA device it can see. Raises ValueError
    if the number of ranks is not the one that the configuration asks for.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world != parallelism.world_size:
        raise ValueError(
            f"parallelism: replicate {parallelism.replicate} * shard {parallelism.shard} = {parallelism.world_size} ranks, "
            f"but {world} are running; start that many or change parallelism.shard or parallelism.replicate"
        )
    if not dist.is_initialized():
        return Meshes(dense=None, sparse=None)
    dense = init_device_mesh(
        device_type, (parallelism.replicate, parallelism.shard), mesh_dim_names=("replicate", "shard")
    )
    sparse = init_device_mesh(
        device_type,
        (parallelism.replicate, parallelism.efsdp, parallelism.ep),
        mesh_dim_names=("replicate", "efsdp", "ep"),
    )
    return Meshes(dense=dense, sparse=sparse)
