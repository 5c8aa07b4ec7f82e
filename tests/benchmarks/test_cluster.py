"""The benchmark of a cluster on gloo ranks."""

from argparse import Namespace
from typing import Any

import torch

from benchmarks import cluster
from tests.distributed import run_distributed


def tiny() -> list[dict[str, Any]]:
    return cluster.report(Namespace(layers=2, steps=1, tiny=True), torch.device("cpu"))


def test_every_ep_gives_the_loss_of_ep_1_and_waits_are_counted():
    for records in run_distributed(tiny, 2):
        assert [record["benchmark"] for record in records] == ["cluster/2/ep1/equal", "cluster/2/ep2/equal"]
        assert all(record["met"] for record in records)
        alone, spread = records
        assert alone["hidden"] is None
        assert spread["hidden"] <= 1.0  # something was waited for


def test_a_shard_is_eight_ranks_at_most():
    for world, ep, shard, replicate in ((16, 8, 8, 2), (4, 1, 4, 1)):
        parallelism = cluster.config_for(world, ep, "equal", 9, False).parallelism
        assert (parallelism.shard, parallelism.replicate, parallelism.ep) == (shard, replicate, ep)
