"""Bytes per collective against what real ranks hand to torch.distributed in one step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.manifest import DatasetManifest
from pipeline.model.moonlight import Moonlight
from pipeline.planner.estimate import _muon_plan
from pipeline.planner.sizes import sizes_of
from pipeline.planner.traffic import row_bytes, traffic
from pipeline.storage import Storage
from pipeline.training.trainer import Run
from tests.distributed import run_distributed
from tests.training.make import BATCH, tiny, tiny_dataset

MESH = {"parallelism": {"replicate": 1, "shard": 4, "ep": 2}, "training__micro_batch": 1}


def sent_in_a_step(root: str, dataset: DatasetManifest) -> Counter[str]:
    """Bytes that leave this rank by ring algorithms, by what carries them; rows of tokens with those that stay."""
    config = tiny(root, **MESH)
    run = Run(config, dataset, Storage(config.storage))
    sent: Counter[str] = Counter()
    # torch 2.13 renamed the first two.
    gather_name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    scatter_name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    gather, scatter, exchange = getattr(dist, gather_name), getattr(dist, scatter_name), dist.all_to_all_single

    def count_gather(output_tensor: Any, input_tensor: Any, **kwargs: Any) -> Any:
        sent["weights"] += output_tensor.nbytes - input_tensor.nbytes
        return gather(output_tensor, input_tensor, **kwargs)

    def count_scatter(output: Any, input: Any, **kwargs: Any) -> Any:
        sent["gradients"] += input.nbytes - output.nbytes
        return scatter(output, input, **kwargs)

    def count_exchange(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        if input.dtype == torch.int64:  # counts, of rows first
            sent["rows"] += int(input[:, 0].sum())
        elif input.dim() == 2:  # rows of tokens and their weights; Muon's buffers are flat
            sent["tokens"] += input.nbytes
        return exchange(output, input, *args, **kwargs)

    setattr(dist, gather_name, count_gather)
    setattr(dist, scatter_name, count_scatter)
    dist.all_to_all_single = count_exchange
    run.advance(False).fetch()
    run.close()
    sent["muon"] = run.optimizer.stats()["bytes_sent"]
    return sent


def test_a_step_of_four_ranks(tmp_path: Path) -> None:
    dataset = tiny_dataset(Storage(tiny(str(tmp_path)).storage), padding=False)  # which is not sent anywhere
    ranks = run_distributed(sent_in_a_step, 4, str(tmp_path), dataset)
    config = tiny(str(tmp_path), **MESH)
    shapes = {fqn: tuple(p.shape) for fqn, p in Moonlight(config.model).named_parameters()}
    expected = traffic(config, sizes_of(shapes), _muon_plan(config, shapes), BATCH, itemsize=4)
    for sent in ranks:
        assert sent["weights"] == expected.weights
        assert sent["gradients"] == expected.gradients
    ep = config.parallelism.ep
    tokens = sum(sent["tokens"] for sent in ranks)
    assert tokens == sum(sent["rows"] for sent in ranks) * row_bytes(config, itemsize=4)
    assert tokens == pytest.approx(4 * expected.tokens * ep // (ep - 1), rel=0.15)  # it is not routed evenly
    assert max(sent["muon"] for sent in ranks) == expected.muon
