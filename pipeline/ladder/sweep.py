"""A sweep of one setting: which value is best, and where to look next.

The best one is the vertex of a parabola in log setting through the best swept one and its neighbours. A best at an end says only that the
sweep was too short, so it goes on there until a worse value lies on either side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def best(settings: Sequence[float], losses: Sequence[float]) -> float:
    """The setting (a rate, a batch) of least loss: the vertex of the parabola in its logarithm through the best and its neighbours.

    The best itself where it is at an end, or there is no vertex between the neighbours. An infinite loss is one of a run that diverged.
    """
    order = np.argsort(settings)
    x, y = np.log(np.array(settings, float)[order]), np.array(losses, float)[order]
    at = int(np.argmin(y))
    if at in (0, len(x) - 1) or not np.isfinite(y[at - 1 : at + 2]).all():
        return float(np.exp(x[at]))
    bend, slope, _ = np.polyfit(x[at - 1 : at + 2] - x[at], y[at - 1 : at + 2], 2)
    if bend <= 0:
        return float(np.exp(x[at]))
    vertex = float(np.clip(x[at] - slope / (2 * bend), x[at - 1], x[at + 1]))
    return float(np.exp(vertex))


def beyond(settings: Sequence[float], losses: Sequence[float]) -> float | None:
    """The next setting to try, as far from the best as that is from its neighbour; None where the best is no end, or the only one."""
    if len(settings) < 2:
        return None
    found = sorted(zip(settings, losses, strict=True))
    if not math.isfinite(min(losses)):  # all diverged
        return found[0][0] ** 2 / found[1][0]
    at = min(range(len(found)), key=lambda index: found[index][1])
    if at == 0:
        return found[0][0] ** 2 / found[1][0]
    if at == len(found) - 1:
        return found[-1][0] ** 2 / found[-2][0]
    return None
