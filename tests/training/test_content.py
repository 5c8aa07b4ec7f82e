"""The digest of a state: the same for every layout, different for every difference."""

import torch
import torch.distributed as dist
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from pipeline.training.content import combine, local_sums
from tests.distributed import run_distributed


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (7, 5), "stack": (3, 4, 6), "vector": (11,), "scalar": (), "empty": (0, 3)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**tensors, "count": torch.tensor(3)}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    return combine([local_sums(tensors, 0)], tensors)


def sharded_digest() -> str | None:
    """On 4 ranks: dim 0 over two axes, dim 1 of the stack, copies over the other axis, uneven everywhere."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    placements = {
        "matrix": [Shard(0), Shard(0)],
        "stack": [Replicate(), Shard(1)],
        "vector": [Shard(0), Replicate()],
        "empty": [Replicate(), Shard(0)],
    }
    whole = state()
    parts = {
        name: distribute_tensor(tensor, mesh, placements[name]) if name in placements else tensor
        for name, tensor in whole.items()
    }
    shares: list = [None] * 4
    dist.all_gather_object(shares, local_sums(parts, dist.get_rank()))
    return combine(shares, parts)


def test_sharding_does_not_matter():
    assert run_distributed(sharded_digest, 4) == [digest(state())] * 4


def test_a_tensor_is_the_sum_of_its_rows():
    """Against the definition, written out for one small matrix."""
    tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    seed = xxhash.xxh3_64_intdigest(b"w")
    rows = [xxhash.xxh3_128_intdigest(tensor[index].numpy().tobytes(), (seed + index) % 2**64) for index in (0, 1)]
    expected = sum(rows) % 2**128
    assert local_sums({"w": tensor}, 0) == {"w": expected}
    assert local_sums({"w": tensor}, 1) == {"w": 0}  # a copy is counted by the first rank only


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.sampled_from(["matrix", "stack", "vector"]), st.data())
def test_any_change_changes_it(name, data):
    whole, changed = state(), state()
    flat = changed[name].reshape(-1)
    first, second = data.draw(st.lists(st.integers(0, flat.numel() - 1), min_size=2, max_size=2, unique=True))
    flat[[first, second]] = flat[[second, first]]  # a swap: the same values elsewhere
    assert digest(changed) != digest(whole)


def test_names_shapes_and_dtypes_count():
    assert digest({"a": torch.zeros(2, 3)}) != digest({"b": torch.zeros(2, 3)})
    assert digest({"a": torch.zeros(2, 3)}) != digest({"a": torch.zeros(3, 2)})
    assert digest({"a": torch.zeros(2)}) != digest({"a": torch.zeros(2, dtype=torch.int32)})
