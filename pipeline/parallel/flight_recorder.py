"""torch's flight recorder: the last collectives of a process, each with its stack, sizes and state, kept by c10d itself.

It records by default, 2,000 collectives of each process (TORCH_FR_BUFFER_SIZE); `torchfrtrace` compares the dumps of all ranks and
names who did not take part in what. What gloo leaves out of its dump, which ranks a group has, is added: the tool needs it.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch.distributed as dist


def recorded() -> bytes | None:
    """A dump of this process, as `torchfrtrace` reads it; None without a process group. Waits for no device."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    from torch._C import _distributed_c10d as c10d

    nccl = getattr(c10d, "_dump_nccl_trace", None)
    if nccl is not None and "nccl" in str(dist.get_backend_config()):
        found: bytes = nccl()
        return found
    dump: dict[str, Any] = pickle.loads(c10d._dump_fr_trace())  # type: ignore[attr-defined]
    groups = {
        name: dist.get_process_group_ranks(group) for group, name in dist.distributed_c10d._world.pg_names.items()
    }
    described = dict(entry["process_group"] for entry in dump["entries"])
    dump["pg_config"] = {
        name: {"name": name, "desc": described.get(name, ""), "ranks": str(ranks)} for name, ranks in groups.items()
    }
    return pickle.dumps(dump)
