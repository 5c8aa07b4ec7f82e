"""Memory that ranks read from each other, and an all-to-all of rows whose splits are read on the device, by NVSHMEM.

`all_to_all` is `torch.ops.symm_mem.all_to_all_vdev` of torch 2.13. What it does was read in PyTorch's source,
torch/csrc/distributed/c10d/symm_mem/{nvshmem_extension.cu, nvshmem_team_manager.hpp, env.hpp}; of its documentation there is none:

- Splits are int64 and count rows, which lie end to end, both sent and arrived, by rank. Two kernels on the current stream: the first
  writes each peer's split and where its rows begin into that peer's pad, and is a barrier of the group; the second fetches rows from the
  peers' memory. Nothing waits for the host, and nothing asks whether rows fit into what they are fetched to.
- What is sent may be overwritten once all peers have fetched it, so not when the call has ended here, but when a later call on the
  group has: a peer enters that one's barrier behind its own fetches. Likewise pads: a peer may be ahead by one call, so two take turns.
  What has arrived is this rank's own.
- A peer's rows are fetched by 64 / W blocks in equal parts of whole bytes (16 / W between nodes), if what is sent is as large as
  `AT_LEAST`; of less by a number of blocks that may divide nothing, which ends the process. So buffers are at least so large, the ranks of
  a group a power of two, and rows multiples of 64 / W bytes.
- Memory is allocated, and made known to the peers, by all ranks of the run at once, in equal sizes; the host waits for that. So it is freed,
  but torch frees it when Python lets go of the tensor, which is at another moment on each rank: when the garbage collector runs, or on one
  rank alone because it has failed, which then hangs and does not tell (PyTorch issue 195500). So nothing is freed here: memory has names, and who asks
  for the same again in this process, as a run that goes back on a spike does, gets what was there.

Legend: W ranks.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

AT_LEAST = 4 * 1024 * 1024  # bytes: 64 blocks of 512 threads fetch 8 times 16 bytes each
BLOCKS = 64

_kept: dict[tuple[Any, ...], Tensor] = {}


def missing(device: torch.device, group: dist.ProcessGroup, row_bytes: int) -> str | None:
    """What `all_to_all` lacks here, or None. On CUDA a collective call of all ranks of the run, which get None together."""
    ranks = group.size()
    if device.type == "cpu":
        return "rows on a CPU travel by gloo"
    if ranks == 1:
        return "NVSHMEM has teams of two ranks and more"
    if not divides(ranks, row_bytes):
        return (
            f"rows are fetched by {BLOCKS} blocks, so it takes ep of a power of two up to that, and rows of a multiple of {BLOCKS} / ep bytes, "
            f"not ep {ranks} and {row_bytes} bytes"
        )
    if device.type != "cuda":
        return None  # a rehearsal's stand-in stands for CUDA with all that there is for it
    build = None
    if torch.version.cuda is None or not symm_mem.is_nvshmem_available():
        build = f"torch {torch.__version__} finds no NVSHMEM here (libnvshmem_host.so.3, of the package nvidia-nvshmem-cu12 or -cu13)"
    return agreed(build, device) or agreed(None if build else _refused(device, group), device)


def divides(ranks: int, row_bytes: int) -> bool:
    """Whether the blocks that fetch rows cut them into equal parts."""
    return BLOCKS % ranks == 0 and row_bytes % (BLOCKS // ranks) == 0


def _refused(device: torch.device, group: dist.ProcessGroup) -> str | None:
    """Why the ranks cannot reach each other's memory."""
    try:
        symm_mem.set_backend("NVSHMEM")
        empty("whether there is any", 1, 1, torch.int64, device, group)
    except RuntimeError as error:
        return f"NVSHMEM does not connect these ranks: {str(error).splitlines()[0]}"
    return None


def agreed(reason: str | None, device: torch.device) -> str | None:
    """A collective call of all ranks of the run: the reason of this rank or, if another one has one, that it has."""
    lacking = torch.tensor(int(reason is not None), device=device)
    dist.all_reduce(lacking, dist.ReduceOp.MAX)
    return reason or ("another rank of the run lacks it" if int(lacking) else None)


def empty(
    name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
) -> Tensor:
    """A tensor that the ranks of `group` read from each other, the one that had this name and size before if there was one; a
    collective call. For one network at a time."""
    key = (name, rows, width, dtype, device)
    tensor = _kept.get(key)
    if tensor is None:
        tensor = _kept[key] = symm_mem.empty(rows, width, dtype=dtype, device=device)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(tensor))  # not freed when the interpreter ends, either
    symm_mem.rendezvous(tensor, group.group_name)
    return tensor


def padded(width: int, dtype: torch.dtype, ranks: int) -> int:
    """The least width of rows that can be fetched, in elements."""
    unit = max(BLOCKS // ranks // dtype.itemsize, 1)
    return -(-width // unit) * unit


def all_to_all(sent: Tensor, arriving: Tensor, splits_W: Tensor, pad_2W: Tensor, group: dist.ProcessGroup) -> None:
    """Rows of `sent`, `splits_W` of them to each rank, end to end, to `arriving`, by rank, on the current stream."""
    torch.ops.symm_mem.all_to_all_vdev(sent, arriving, splits_W, pad_2W, group.group_name)
