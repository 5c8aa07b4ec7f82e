"""A record under the names that users of trackers look for: `train/loss`, `train/learning_rate`, `train/grad_norm`, as transformers'
Trainer writes them, throughput below `perf/`, and the seconds of a step below `time/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {
    "loss": "train/loss",
    "aux_loss": "train/aux_loss",
    "learning_rate": "train/learning_rate",
    "bias_rate": "train/bias_rate",
    "gradient_norm": "train/grad_norm",
    "global_batch": "train/global_batch",
    "tokens": "train/tokens",
    "skipped_steps": "train/skipped_steps",
    "spikes": "train/spikes",
    "tokens_per_second": "perf/tokens_per_second",
    "flops_per_second": "perf/flops_per_second",
    "mfu": "perf/mfu",
    "memory_peak_bytes": "perf/memory_peak_bytes",
    "slowest_rank": "perf/slowest_rank",
    "slowest_seconds": "perf/slowest_seconds",
    "seconds": "time/step",
    "seconds_data": "time/data",
    "seconds_compute": "time/compute",
    "seconds_exchange": "time/exchange",
    "seconds_optimizer": "time/optimizer",
    "seconds_save": "time/save",
    "seconds_other": "time/other",
}
IMBALANCE = "train/load_imbalance/layer_{:02d}"


def named(record: Mapping[str, Any]) -> dict[str, float]:
    """What of a record is known and a number."""
    found = {name: float(record[key]) for key, name in NAMES.items() if record.get(key) is not None}
    layers = enumerate(record.get("load_imbalance") or ())
    return found | {IMBALANCE.format(layer): float(value) for layer, value in layers if value is not None}
