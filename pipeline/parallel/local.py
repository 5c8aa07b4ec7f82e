"""What of a tensor is here: the local storage of a parameter and its place in the whole.

Plain tensors are whole. A `DTensor` sharded along dim 0 or others, also by FSDP over expert parallelism (strided
shards), holds one contiguous box of the whole; `local_part` gives that box as slices.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_tensor(tensor: Tensor) -> Tensor:
    """The storage on this rank (shares memory with the parameter)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: Tensor) -> tuple[slice, ...]:
    """Slices of the whole tensor that `local_tensor` holds; empty ones where this rank holds nothing."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(shape) == tuple(tensor.to_local().shape), (shape, tensor.to_local().shape, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape))
