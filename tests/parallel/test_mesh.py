"""Meshes: coordinates of ranks, and the refusal of a world that does not fit."""

import pytest
import torch.distributed as dist

from pipeline.config.schema import ParallelismConfig
from pipeline.parallel.mesh import build_meshes
from tests.distributed import run_distributed


def coordinates(replicate: int, shard: int, ep: int) -> tuple[list[int], list[int], int]:
    meshes = build_meshes(ParallelismConfig(replicate=replicate, shard=shard, ep=ep), "cpu")
    assert meshes.world_size == dist.get_world_size()
    return list(meshes.dense.get_coordinate()), list(meshes.sparse.get_coordinate()), meshes.replicas


def test_ranks_of_an_expert_group_are_neighbours():
    assert run_distributed(coordinates, 4, 1, 4, 2) == [
        ([0, 0], [0, 0, 0], 1),
        ([0, 1], [0, 0, 1], 1),
        ([0, 2], [0, 1, 0], 1),
        ([0, 3], [0, 1, 1], 1),
    ]


def test_a_mesh_that_does_not_fit():
    with pytest.raises(ValueError, match=r"replicate 2 \* shard 4 = 8 ranks, but 1 are running; start that many"):
        build_meshes(ParallelismConfig(replicate=2, shard=4), "cpu")


def test_one_process_has_no_mesh():
    meshes = build_meshes(ParallelismConfig(), "cpu")
    assert (meshes.dense, meshes.sparse, meshes.ep, meshes.world_size, meshes.replicas) == (None, None, None, 1, 1)
