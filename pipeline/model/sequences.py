"""Which tokens of a packed batch see each other, and where each token stands in its document.

A row of a batch is either one causal sequence or several documents laid end to end (`doc_lens`). With documents,
attention is block-diagonal and positions restart at every document, so a row gives exactly what its documents would
give one by one. What follows the text of a row is padding, and with documents forms a document of its own. Attention is
causal, so no text sees it; it is neither routed to experts nor counted, and what comes out there means nothing.

Built once per forward pass and shared by all layers. The mask form depends on the device: CUDA takes cumulative
document lengths (variable-length attention, no S x S memory); the CPU takes a boolean mask, S^2 bytes a row.

B rows, S tokens a row, R rotary dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.model.devices import is_gpu


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """Tables stay fp32 under mixed precision: FSDP2 is told not to cast inputs (pipeline/parallel/shard.py)."""

    cos: Tensor  # [S, R/2], or [B, S, R/2] with documents; fp32
    sin: Tensor
    mask_B1SS: Tensor | None = None  # True where a query (row) may look at a key (column); CPU with documents
    document_ends: Tensor | None = None  # [documents + 1] int32, cumulative over all rows; CUDA with documents
    longest_document: int = 0
    text_BS: Tensor | None = None  # True where a slot holds text; None: everywhere
    tokens: int = 0  # slots that hold text, over all rows
    sequences: int = 0  # rows that hold text
    halves: tuple[SequenceLayout, SequenceLayout] | None = (
        None  # of the first and the last half of the rows, if mixtures take these in turn
    )

    def tensors(self) -> list[Tensor]:
        """All of them, those of halves included."""
        own = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return own + [tensor for half in self.halves or () for tensor in half.tensors()]


def sequence_layout(
    batch: int,
    length: int,
    doc_lens: Sequence[Sequence[int]] | None,
    lengths: Sequence[int] | None = None,
    *,
    rope_dim: int,
    rope_theta: float,
    device: torch.device,
    halves: bool = False,
) -> SequenceLayout:
    """The layout of `batch` rows of `length` slots. Raises ValueError if the text of a row does not fit in it.

    `lengths`: text of each row in tokens; None: that of its documents, or without these the whole row. `halves`: with those of the two
    halves of the rows, whose number is even.
    """
    whole = _layout(batch, length, doc_lens, lengths, rope_dim, rope_theta, device)
    if not halves:
        return whole
    half = batch // 2
    first, last = (
        _layout(
            half, length, None if doc_lens is None else doc_lens[rows], None if lengths is None else lengths[rows],
            rope_dim, rope_theta, device,
        )
        for rows in (slice(half), slice(half, None))
    )  # fmt: skip
    return replace(whole, halves=(first, last))


def _layout(
    batch: int,
    length: int,
    doc_lens: Sequence[Sequence[int]] | None,
    lengths: Sequence[int] | None,
    rope_dim: int,
    rope_theta: float,
    device: torch.device,
) -> SequenceLayout:
    rows = None if doc_lens is None else _complete(doc_lens, batch, length)
    used = _used(lengths, doc_lens, batch, length)
    tokens, sequences, text_BS = sum(used), sum(n > 0 for n in used), None
    if tokens < batch * length:
        text_BS = to_device(torch.arange(length) < torch.tensor(used)[:, None], device)
    if rows is None or all(len(row) == 1 for row in rows):
        cos, sin = rotary_tables(torch.arange(length, device=device), rope_dim, rope_theta)
        return SequenceLayout(cos, sin, text_BS=text_BS, tokens=tokens, sequences=sequences)
    documents = torch.tensor([n for row in rows for n in row], dtype=torch.int64)
    ends = documents.cumsum(0)
    starts = ends - documents
    positions = torch.arange(batch * length) - starts.repeat_interleave(documents, output_size=batch * length)
    cos, sin = rotary_tables(to_device(positions.view(batch, length), device), rope_dim, rope_theta)
    if is_gpu(device):
        zero = torch.zeros(1, dtype=torch.int64)
        document_ends = to_device(torch.cat([zero, ends]).int(), device)
        return SequenceLayout(
            cos,
            sin,
            document_ends=document_ends,
            longest_document=max(map(max, rows)),
            text_BS=text_BS,
            tokens=tokens,
            sequences=sequences,
        )
    numbers = torch.arange(len(documents))
    document_BS = numbers.repeat_interleave(documents, output_size=batch * length).view(batch, length)
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    mask_B1SS = same_BSS.tril_().unsqueeze(1).to(device)
    return SequenceLayout(cos, sin, mask_B1SS, text_BS=text_BS, tokens=tokens, sequences=sequences)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`. Copied to CUDA from pinned memory: from any other the host waits for all queued work."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def rotary_tables(positions: Tensor, rope_dim: int, rope_theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, frequency i = theta^(-2i/R); shape positions.shape + [R/2], fp32."""
    exponents = torch.arange(0, rope_dim, 2, device=positions.device, dtype=torch.float32) / rope_dim
    angles = positions.float().unsqueeze(-1) * (1.0 / rope_theta**exponents)
    return angles.cos(), angles.sin()


def _used(
    lengths: Sequence[int] | None, doc_lens: Sequence[Sequence[int]] | None, batch: int, length: int
) -> list[int]:
    """Tokens of text in each row."""
    used = [length] * batch if lengths is None else list(lengths)
    if doc_lens is not None:
        used = [sum(row) for row in doc_lens]
    if lengths is not None and (list(lengths) != used or len(used) != batch or not all(0 <= n <= length for n in used)):
        raise ValueError(
            f"lengths: {list(lengths)} must be one number a row for {batch} rows, from 0 to {length}, and with doc_lens their sums"
        )
    return used


def _complete(doc_lens: Sequence[Sequence[int]], batch: int, length: int) -> list[list[int]]:
    """Document lengths per row with the padding added as a last document."""
    if len(doc_lens) != batch:
        raise ValueError(f"doc_lens: {len(doc_lens)} rows given for a batch of {batch}; give one list of lengths a row")
    rows = []
    for index, row in enumerate(doc_lens):
        used = sum(row)
        if used > length or any(n <= 0 for n in row):
            raise ValueError(
                f"doc_lens[{index}]: {list(row)} must be positive and sum to at most the row's {length} tokens"
            )
        rows.append([*row, length - used] if used < length else list(row))
    return rows
