"""Standard errors of held-out scores, and of the difference of two models on the same documents. No torch in here.

A document is the unit that was drawn, not the token: tokens of one document are alike. The loss is a ratio of sums over D
documents, nats x_i over tokens n_i, so its standard error is that of a ratio estimator (Cochran, Sampling Techniques, 6.4):

    L = sum x_i / sum n_i        SE(L) = sqrt(D / (D - 1) * sum (x_i - L n_i)^2) / sum n_i

Two models on the same documents: the same with d_i = a_i - b_i for x_i. What both find hard cancels, so this paired error is
many times smaller than that of two independent scores, sqrt(SE_a^2 + SE_b^2). Bits per byte: bits for nats, bytes for tokens.
A mean over documents, as of a task's accuracy, is the case n_i = 1: the standard error of the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.floating] | npt.NDArray[np.integer]


@dataclass(frozen=True)
class Estimate:
    value: float
    stderr: float | None  # None: of one document there is none


def ratio(x: Numbers, n: Numbers) -> Estimate:
    """sum x / sum n over documents. There must be one."""
    total, documents = float(n.sum()), len(n)
    value = float(x.sum()) / total
    if documents < 2:
        return Estimate(value, None)
    squares = float(((x - value * n) ** 2).sum())
    return Estimate(value, math.sqrt(documents / (documents - 1) * squares) / total)


def paired(a: Numbers, b: Numbers, n: Numbers) -> Estimate:
    """(sum a - sum b) / sum n of the same documents."""
    return ratio(a - b, n)


def independent(a: Estimate, b: Estimate) -> Estimate:
    """a - b of different documents."""
    known = a.stderr is not None and b.stderr is not None
    return Estimate(a.value - b.value, math.hypot(a.stderr or 0.0, b.stderr or 0.0) if known else None)
