"""The output head and its loss, without ever holding all logits.

`torch.nn.functional.linear_cross_entropy` goes through the tokens in chunks: logits of a chunk, its loss, and at once
its gradients with respect to hidden states and weight, which backward only scales. Memory: chunk x vocabulary instead
of tokens x vocabulary (8192 x 163,840 fp32 logits would be 5.4 GB, and twice that with their gradient).

Its own choice of chunk follows the ratio of vocabulary to hidden size: 64 rows for the real model, which re-reads the
weight 128 times a sequence and is three times slower than the reference on a CPU. Chunks of a fixed number of rows
are as fast as no chunking, or faster.

In bf16 the operator also sums the loss in bf16, off by about one per cent after a hundred chunks. There the losses
come token by token and are summed in fp32; backward then computes the logits once more.

Legend: B rows, S tokens, N = B*S, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # label of a token that has no loss
CHUNK_TOKENS = {"cpu": 256, "cuda": 1024}


class LossOutput(NamedTuple):
    loss_sum: Tensor  # fp32: sum of the cross-entropy (nats) over the labelled tokens
    aux_loss: Tensor  # fp32: balance loss, weighted, mean over sequences, summed over layers
    num_tokens: Tensor  # int64: labelled tokens


class Head(nn.Module):
    """Hidden states to logits, or with labels to the summed loss. A module, so that FSDP gathers its weight for it."""

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden))

    def forward(self, x_BSD: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        if labels_BS is None:
            return F.linear(x_BSD, self.weight).float()
        return cross_entropy_sum(x_BSD.flatten(0, 1), self.weight, labels_BS.flatten())


def cross_entropy_sum(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Sum over tokens with a label of -log softmax(W x)[label], fp32 scalar."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_TOKENS[x_ND.device.type])
    exact = x_ND.dtype in (torch.float32, torch.float64)
    loss = F.linear_cross_entropy(
        x_ND, weight_VD, labels_N, reduction="sum" if exact else "none", ignore_index=IGNORE, options=options
    )
    return loss if exact else loss.float().sum()
