"""What a model has to beat: compressors and token frequencies, on the very text the model is scored on.

Two scales meet here. Nats per token depend on the tokenizer; bits per byte (nats / ln 2 / UTF-8 bytes) do not, so they
stand beside general-purpose compressors. A compressor starts from nothing and sees only the held-out text; the unigram
figures are an oracle's: the best any model without context could do, with frequencies taken from the scored tokens
themselves. Cost: `xz -9` is about 3 MB/s on one core and holds up to 700 MB for texts over 64 MB.
"""

from __future__ import annotations

import bz2
import lzma
import math
import zlib

import numpy as np
import numpy.typing as npt

SHOWN = ("xz -9", "bzip2 -9", "zlib -9", "token frequencies")  # the order for readers; stored manifests sort their keys


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits of the compressed text per byte of text, headers included, strongest setting of each compressor."""
    if not text:
        raise ValueError("baselines: there is no held-out text to compress")
    sizes = {
        "xz -9": len(lzma.compress(text, preset=9)),
        "bzip2 -9": len(bz2.compress(text, 9)),
        "zlib -9": len(zlib.compress(text, 9)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def unigram_nats(tokens: npt.NDArray[np.integer]) -> float:
    """Total nats of the tokens coded with their own frequencies: -sum_v n_v ln(n_v / N)."""
    counts = np.unique(tokens, return_counts=True)[1].astype(np.float64)
    return float(-(counts * np.log(counts / counts.sum())).sum())


def unigram_entropy(tokens: npt.NDArray[np.integer]) -> float:
    """Nats per token of the tokens under their own frequencies."""
    return unigram_nats(tokens) / len(tokens)


def bits_per_byte(nats: float, text_bytes: int) -> float:
    return nats / math.log(2) / text_bytes
