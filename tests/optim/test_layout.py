"""The planner on fake meshes: every element once, sender and receiver agree, and the real model balanced up to 512 ranks."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.load import load_config
from pipeline.config.schema import MuonConfig, ParallelismConfig
from pipeline.model.moonlight import Moonlight
from pipeline.optim.boxes import Layout, numel
from pipeline.optim.layout import REPLICA_BUDGET, plan_muon, sharded_parameters
from pipeline.optim.newton_schulz import coefficients, flops, orthogonalize
from pipeline.optim.plan import MuonParameter, Plan, view
from pipeline.optim.replicas import never_loses, plan_of
from pipeline.optim.rules import moonlight_rules
from pipeline.optim.sent import bytes_by_rank


@st.composite
def fake_models(draw):
    """A few matrices and stacks on consistent meshes: (replicate, shard) and (replicate, efsdp, ep)."""
    replicate, efsdp, ep = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    dense = (("replicate", replicate), ("shard", efsdp * ep))
    sparse = (("replicate", replicate), ("efsdp", efsdp), ("ep", ep))
    size = st.integers(1, 13)
    parameters = []
    for index in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["matrix", "heads", "stack by 0", "stack by 1"]))
        rows, columns, heads = draw(size), draw(size), draw(st.integers(1, 4))
        if kind == "matrix":
            parameter = MuonParameter(f"p{index}", Layout((rows, columns), dense, (None, 0)))
        elif kind == "heads":
            parameter = MuonParameter(f"p{index}", Layout((heads * rows, columns), dense, (None, 0)), block_rows=rows)
        else:
            dim = int(kind[-1])
            parameter = MuonParameter(
                f"p{index}", Layout((heads * ep, rows, columns), sparse, (None, dim, 0), (0, 2, 1))
            )
        parameters.append(parameter)
    return parameters, replicate, replicate * efsdp * ep


@settings(max_examples=60, deadline=None, derandomize=True)
@given(model=fake_models(), split=st.booleans(), bucket_bytes=st.sampled_from([1, 200, 10**6]))
def test_every_element_once_and_both_ends_agree(model, split, bucket_bytes):
    parameters, replicas, world = model
    plan = plan_muon(parameters, bucket_bytes=bucket_bytes, split_replicas=split)
    views = [view(plan, rank) for rank in range(world)]
    worked: Counter = Counter()
    for rank in range(world):
        stored = {}
        for i, p in enumerate(parameters):
            box = p.layout.box(p.layout.coordinates(rank))
            stored[i] = np.zeros(p.layout.shape, int)
            stored[i][tuple(slice(a, b) for a, b in box)] = 1
        for bucket in views[rank]:
            for share in bucket.shares:
                piece = share.piece(bucket.me)
                if piece is not None:
                    stored[share.block.parameter][tuple(slice(a, b) for a, b in piece)] -= 1
                coordinates = parameters[share.block.parameter].layout.coordinates(rank)
                if share.block.owner == bucket.me and share.block.replica in (None, coordinates[0]):
                    assert sum(numel(p) for p in share.pieces if p) == numel(share.block.box)
                    worked[share.block.parameter, share.block.box] += 1
        assert all(not mask.any() for mask in stored.values())  # the pieces tile what the rank stores
    once = {(b.parameter, b.box) for bucket in plan.buckets for b in bucket.blocks if b.replica is not None}
    assert once <= set(worked)
    assert split or not once
    assert all(bucket.shared == (block.replica is not None) for bucket in plan.buckets for block in bucket.blocks)
    blocks = sum(
        math.prod(p.layout.shape) // ((p.block_rows or p.layout.shape[-2]) * p.layout.shape[-1]) for p in parameters
    )
    assert len(worked) == blocks
    assert all(times == (1 if block in once or replicas == 1 else replicas) for block, times in worked.items())
    for index, bucket in enumerate(plan.buckets):  # members of a group list the same blocks in the same order
        for rank in range(world):
            for other in range(world):
                mine, theirs = views[rank][index].shares, views[other][index].shares
                assert mine == theirs or not {s.block for s in mine} & {s.block for s in theirs}
        assert len(bucket.blocks) > 0
    costs = {(b.parameter, b.box): b.cost for bucket in plan.buckets for b in bucket.blocks}
    assert sum(plan.loads) == sum(times * costs[block] for block, times in worked.items())
    sent = [sum(_sent_by(views[rank], rank, parameters)) for rank in range(world)]
    assert bytes_by_rank(plan, 1) == sent


def _sent_by(views, rank, parameters):
    """Elements that leave a rank, block by block, from its views alone."""
    for bucket in views:
        for share in bucket.shares:
            layout = parameters[share.block.parameter].layout
            copies = layout.replica_ranks(layout.coordinates(rank))
            stored = [numel(piece) if piece else 0 for piece in share.pieces]
            mine = stored[bucket.me]
            if share.block.replica in (None, copies.index(rank)):
                yield sum(stored) - mine if share.block.owner == bucket.me else mine
                if bucket.shared:
                    yield mine * (len(copies) - 1)


@pytest.fixture(scope="module")
def moonlight():
    """(name, shape) of every parameter of the real network, from the meta device, and Moonlight's rules."""
    run = load_config("moonlight-16b-a3b", [])
    with torch.device("meta"):
        shapes = [(fqn, tuple(p.shape)) for fqn, p in Moonlight(run.model).named_parameters()]
    return shapes, moonlight_rules(run.model, run.optimizer)


def real_model(moonlight, shard, replicate=1, ep=8):
    return sharded_parameters(*moonlight, ParallelismConfig(replicate=replicate, shard=shard, ep=ep))


@pytest.mark.parametrize(
    ("shard", "ep"),
    [*((shard, 8) for shard in (8, 16, 32, 64, 128, 256, 512)), (256, 1), (256, 64), (512, 1), (512, 64)],
)
def test_the_real_model_is_balanced(moonlight, shard, ep):
    plan = plan_muon(real_model(moonlight, shard, ep=ep))
    assert plan.imbalance <= 1.05
    assert sum(plan.loads) == pytest.approx(590.2e12, rel=1e-3)  # reference: about 590 TFLOP a step
    kinds = Counter(plan.plans)
    experts = 26 * 3
    assert kinds[Plan.OWNED] == 26 * 4 + 4 + 26 * 3 + 3 + 26  # attention, shared experts, dense layer, routers
    assert kinds[Plan.LOCAL if shard <= 64 else Plan.REGROUP] == experts
    if shard <= 64:
        only_experts = plan_muon([p for p in plan.parameters if len(p.layout.shape) == 3])
        assert not any(bytes_by_rank(only_experts, 2))


@pytest.mark.parametrize("ep", [1, 8, 64])
def test_at_1024_ranks_of_one_copy_the_largest_matrix_decides(moonlight, ep):
    """The dense layer's matrices, 11,264 x 2,048, cost 1.79 times what an average rank does there: no plan of whole matrices
    is better than this one. Two copies of 512 ranks are balanced."""
    plan = plan_muon(real_model(moonlight, 1024, ep=ep))
    largest = flops(11_264, 2048, 5)
    assert max(plan.loads) == largest
    assert plan.excess == 1.0
    assert plan.imbalance == pytest.approx(1.788, abs=0.001)
    assert sorted(plan.loads)[-4] <= 1.18 * sum(plan.loads) / 1024  # all but three owners; six experts are 1.14
    assert plan_muon(real_model(moonlight, 512, replicate=2, ep=ep)).imbalance <= 1.05


@pytest.mark.parametrize("shard", [8, 32, 64])
def test_every_rank_sends_its_share(moonlight, shard):
    """2 bytes of each element to its owner and 2 back, less what stays: 4 (P / W) (W - 1) / W, or what one matrix forces.

    Whole matrices cannot be shared out to the last element, hence 1 %: all sizes are multiples of 2^17 and P / W is not, so
    with any owners some rank is above the average. At 64 ranks the dense layer's three matrices are
    larger than P / W; whoever owns one sends its results and its own pieces of all others, and nobody sends more.
    """
    plan = plan_muon(real_model(moonlight, shard))
    blocks = [(block, numel(block.box)) for bucket in plan.buckets if bucket.axis for block in bucket.blocks]
    elements = sum(n for _, n in blocks)
    assert all(n % 2**17 == 0 for _, n in blocks)
    assert elements % (shard * 2**17)
    sent = bytes_by_rank(plan, 2)
    assert sum(sent) * shard == 4 * elements * (shard - 1)
    bound = 4 * elements / shard * (shard - 1) / shard
    forced = {block.owner: 2 * (elements + n * (shard - 2)) / shard for block, n in blocks if n > elements / shard}
    assert len(forced) == (3 if shard == 64 else 0)
    for rank, found in enumerate(sent):
        assert found <= max(1.01 * bound, forced.get(rank, 0)), rank


@pytest.mark.parametrize("shard", [128, 512])
def test_beyond_one_expert_a_rank_the_experts_fill_what_dense_matrices_leave(moonlight, shard):
    """Experts travel within EFSDP groups: 4 (P_e / W) (EF - 1) / EF more; owners of large matrices get fewer of them."""
    plan = plan_muon(real_model(moonlight, shard))
    sizes = Counter({2: 0, 3: 0})
    for bucket in plan.buckets:
        for block in bucket.blocks:
            sizes[len(plan.parameters[block.parameter].layout.shape)] += numel(block.box)
    efsdp = shard // 8
    bound = 4 / shard * (sizes[2] * (shard - 1) / shard + sizes[3] * (efsdp - 1) / efsdp)
    assert max(bytes_by_rank(plan, 2)) <= 1.05 * bound  # an expert is 3 % of what a rank owns at 128, 10 % at 512


MESHES = [(2, 8), (32, 8), (128, 8), (8, 64), (2, 512)]  # copies, ranks of each


@pytest.mark.parametrize(("replicate", "shard"), MESHES)
def test_copies_share_work_within_twice_the_bytes(moonlight, replicate, shard):
    parameters = real_model(moonlight, shard, replicate)
    repeated, split = plan_muon(parameters), plan_muon(parameters, split_replicas=True)
    bound = sum(bytes_by_rank(repeated, 2)) / (replicate * shard)
    assert max(bytes_by_rank(split, 2)) <= REPLICA_BUDGET * bound
    assert max(split.loads) <= max(repeated.loads)
    assert (sum(split.loads) < sum(repeated.loads)) == (replicate < 128)  # there a matrix for all copies exceeds it


@pytest.mark.parametrize(("replicate", "shard"), MESHES)
def test_the_default_never_loses(moonlight, replicate, shard):
    """Against copies that repeat each other's work: no more operations for the busiest rank, no more bytes for the fullest."""
    parameters = real_model(moonlight, shard, replicate)
    repeated, found = plan_of(parameters, MuonConfig(hsdp_split="off")), plan_of(parameters, MuonConfig())
    assert not repeated.split_replicas
    assert max(found.loads) <= max(repeated.loads)
    assert max(bytes_by_rank(found, 2)) <= max(bytes_by_rank(repeated, 2))
    assert found.excess <= 1.1
    assert found.split_replicas == never_loses(repeated, plan_muon(parameters, split_replicas=True, split_local=False))
    if (replicate, shard) == (2, 512):  # nothing but exchanged matrices: half the work
        assert sum(found.loads) * 2 == sum(repeated.loads)
        assert max(found.loads) < 0.9 * max(repeated.loads)


def test_a_bucket_keeps_below_its_cap(moonlight):
    cap = 64 * 2**20
    plan = plan_muon(real_model(moonlight, 64), bucket_bytes=cap)
    for bucket in view(plan, 5):
        owned = sum(numel(s.block.box) for s in bucket.shares if s.block.owner == bucket.me and s.piece(bucket.me))
        sent = sum(numel(s.piece(bucket.me)) for s in bucket.shares if s.piece(bucket.me))
        assert max(owned, sent) * 2 <= cap
    assert len(plan.buckets) > len(plan_muon(real_model(moonlight, 64), bucket_bytes=2**40).buckets)


def test_costs_follow_the_formula():
    assert flops(1408, 2048, 5) == flops(2048, 1408, 5) == 5 * (4 * 1408**2 * 2048 + 2 * 1408**3)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6])
@pytest.mark.parametrize(("rows", "columns"), [(8, 24), (24, 8), (12, 12)])
@pytest.mark.parametrize("backend", ["plain", "gram"])
def test_costs_are_what_is_multiplied(backend, rows, columns, steps):
    x_BMN = torch.randn(1, rows, columns)
    with FlopCounterMode(display=False) as counter:
        orthogonalize(x_BMN, coefficients("moonlight", steps), backend)
    assert counter.get_total_flops() == flops(rows, columns, steps, backend)


def test_two_axes_through_one_matrix_are_refused():
    layout = Layout((8, 6), (("a", 2), ("b", 2)), (0, 1))
    with pytest.raises(ValueError, match=r"'w' \(8, 6\): mesh axes \['a', 'b'\] both cut through"):
        plan_muon([MuonParameter("w", layout)])


def test_meshes_of_different_sizes_are_refused():
    one, other = (Layout((8, 6), (("shard", n),), (0,)) for n in (2, 4))
    with pytest.raises(ValueError, match=r"same ranks, found sizes \[2, 4\]"):
        plan_muon([MuonParameter("v", one), MuonParameter("w", other)])
