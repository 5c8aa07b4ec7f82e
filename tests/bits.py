"""Equal to the last bit: as NaN is to itself, and zero is not to minus zero."""

import torch
from torch import Tensor

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether shape, dtype and bits are the same."""
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return False
    words = WORDS[ours.element_size()]
    return torch.equal(ours.contiguous().view(words), theirs.contiguous().view(words))
