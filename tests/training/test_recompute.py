"""A rank that computes wrongly is found by what another rank computes from the same micro-batches."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from pipeline.config.load import ConfigError
from pipeline.parallel.local import local_tensor
from pipeline.storage import Storage
from pipeline.training import trainer
from pipeline.training.commits import committed
from pipeline.training.recompute import CorruptRank, _wrong
from pipeline.training.trainer import Run
from tests.distributed import run_distributed
from tests.training.make import Watched, tiny, tiny_dataset


def world_of(mesh: dict[str, int]) -> int:
    return mesh.get("replicate", 1) * mesh.get("shard", 1)


def config_of(root: str, mesh: dict[str, int], every: int | None, **overrides):
    batch = 12 if world_of(mesh) == 3 else 8
    schedule = tiny(root).schedule
    stage = schedule.global_batch[0].model_copy(update={"sequences": batch})
    schedule = schedule.model_copy(update={"global_batch": (stage,)})
    return tiny(
        root, parallelism=mesh, schedule=schedule.model_dump(), training__micro_batch=1, training__recompute_every=every,
        checkpoint__every_steps=1, **overrides,
    )  # fmt: skip


def checked_and_plain(root: str, mesh: dict[str, int]) -> tuple[str, str, int, int]:
    """Weights of a run that is checked at every step, with every shift, and of one that is not; groups of parameters, and how many of
    them were watched."""
    checked = Watched().train(config_of(f"{root}/checked", mesh, 1)).checkpoint.content_sha256
    plain = Watched().train(config_of(f"{root}/plain", mesh, None)).checkpoint.content_sha256
    config = config_of(f"{root}/watched", mesh, 1)
    run = Run(config, tiny_dataset(Storage(config.storage)), Storage(config.storage))
    run.advance(False)
    digests = run.recomputation._digests
    run.close()
    return checked, plain, len(digests), sum(int(digest.total) != 0 for digest in digests)


def flipped(value: torch.Tensor) -> torch.Tensor:
    """One bit of one number, far down."""
    changed = value.clone(memory_format=torch.contiguous_format)
    changed.view(-1)[5:6].view(torch.int32).bitwise_xor_(1 << 9)
    return changed


def corrupt(run: Run, where: str, wrong: Callable[[], bool]) -> None:
    """This rank's results at a place of the network are wrong whenever `wrong()`."""
    block = run.model.layers[1]
    module = block.mlp.experts if where.startswith("experts") else block.self_attn
    backward = where.endswith("backward")

    def hook(_module, _arguments, output):
        if not torch.is_grad_enabled() or not wrong():
            return output
        if not backward:
            return flipped(output.detach()) + (output - output.detach())
        output.register_hook(flipped)
        return output

    module.register_forward_hook(hook)


def message_of(root: str, mesh: dict[str, int], rank: int, where: str, how: str) -> tuple[str, int, bool]:
    """What stops a run whose rank is wrong in the third step: always, once, or every rank in another way each time. The step it
    stands at, and whether its state is as it was before."""
    config = config_of(root, mesh, 3)
    storage = Storage(config.storage)
    run = Run(config, tiny_dataset(storage), storage)
    for _ in range(2):
        run.advance(False).fetch()
    before = {name: local_tensor(tensor).clone() for name, tensor in run.state().items()}
    calls = itertools.count()
    micro_batches = 8 // world_of(mesh)
    if how == "restless":
        run.model.layers[1].self_attn.register_forward_hook(lambda _m, _a, out: out * (1 + next(calls) * 2**-20))
    elif dist.get_rank() == rank:
        # the first pass is of somebody else's micro-batches, the second of its own
        wrong = (lambda: True) if how == "always" else (lambda: next(calls) == micro_batches)
        corrupt(run, where, wrong)
    with pytest.raises(CorruptRank) as stopped:
        run.advance(False)
    same = all(torch.equal(local_tensor(tensor), before[name]) for name, tensor in run.state().items())
    run.close()
    return str(stopped.value), run.at.step, same


def stopped_before_a_checkpoint(root: str) -> tuple[str, list[int]]:
    """The whole run: corrupt from its third step on, checked at every second one."""
    config = config_of(root, {"shard": 2}, 2)
    original = trainer.Run.advance

    def advance(self, stop):
        if self.at.step == 2 and dist.get_rank() == 1:
            corrupt(self, "attention", lambda: True)
        return original(self, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Run, "advance", advance)
        with pytest.raises(CorruptRank) as stopped:
            Watched().train(config)
    dist.barrier()
    return str(stopped.value), [manifest.step for manifest in committed(Storage(config.storage), "tiny")]


EP = {"shard": 4, "ep": 2}
MESHES = {  # the second: FSDP's group of the experts has one rank
    2: [{"shard": 2}],
    4: [EP, {"replicate": 2, "shard": 2, "ep": 2}, {"replicate": 4}],
    3: [{"shard": 3}],  # 64 tokens and 4 experts in three uneven parts
}
FAULTS = {  # mesh, rank, where, how: who is named
    2: [
        ({"shard": 2}, 1, "attention", "always", "one of the ranks 0 on {host}, 1 on {host} computes"),
        ({"shard": 2}, 1, "attention", "once", "the rank 1 on {host} computes"),
        ({"shard": 2}, 0, "experts backward", "once", "the rank 0 on {host} computes"),
    ],
    4: [
        ({"shard": 4}, 2, "attention backward", "always", "the rank 2 on {host} computes"),
        ({"replicate": 2, "shard": 2}, 3, "experts", "once", "the rank 3 on {host} computes"),
        (EP, 3, "experts", "once", "one of the ranks 2 on {host}, 3 on {host} computes"),
        (EP, 0, "attention", "restless", "the kernels are not deterministic here"),
    ],
    3: [({"shard": 3}, 1, "experts", "always", "the rank 1 on {host} computes")],
}


def everything(root: str, world: int) -> tuple[list, list, list]:
    """All that one set of processes can try: they take longer to start than to train."""
    sound = [checked_and_plain(f"{root}/sound-{number}", mesh) for number, mesh in enumerate(MESHES[world])]
    found = [message_of(f"{root}/fault-{number}", *fault[:4]) for number, fault in enumerate(FAULTS[world])]
    return sound, found, [stopped_before_a_checkpoint(f"{root}/whole")] if world == 2 else []


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.long) for world in (3, 4))])
def test_a_wrong_bit_stops_the_run_and_names_the_rank(tmp_path, world):
    ranks = run_distributed(everything, world, str(tmp_path), world)
    for sound, found, _ in ranks:
        for mesh, (checked, plain, groups, watched) in zip(MESHES[world], sound, strict=True):
            assert checked == plain, mesh  # what is sound is left as it is
            assert watched == groups == (5 if mesh.get("ep", 1) > 1 else 4), (
                mesh
            )  # experts spread over ep are one of their own
        for fault, (message, step, same) in zip(FAULTS[world], found, strict=True):
            assert message.startswith("step 3: "), fault
            assert fault[-1].format(host=os.uname().nodename) in message, fault
            assert (step, same) == (2, True), fault  # nothing was applied
        assert found == ranks[0][1]  # the ranks agree
    if world == 2:
        for _, _, [(message, steps)] in ranks:
            assert message.startswith("step 4: ")
            assert "checkpoints since step 2, the last one that was the same, may hold what it spoilt" in message
            assert steps == [1, 2, 3]  # no checkpoint holds the result


def test_the_majority_is_right():
    assert _wrong([[0, 1, 2]]) == set()
    assert _wrong([[0], [1, 2]]) == {0}
    assert _wrong([[0], [1], [2]]) == {0, 1, 2}
    assert _wrong([[0, 0], [1, 1]]) == {0, 1}  # each repeats its own: who knows
    assert _wrong([[0], [0, 1, 1]]) == {0}


def test_without_the_option_nothing_is_there(tmp_path):
    config = tiny(str(tmp_path))
    run = Run(config, tiny_dataset(Storage(config.storage)), Storage(config.storage))
    assert run.recomputation is None
    run.close()


@pytest.mark.parametrize(
    "parallelism", [{}, {"shard": 4, "ep": 4}, {"shard": 4, "ep": 2, "elastic": {"min_workers": 2}}], ids=str
)
def test_one_group_cannot_be_checked(tmp_path, parallelism):
    with pytest.raises(ConfigError, match=r"training.recompute_every 5: \d workers are one group of parallelism.ep"):
        tiny(str(tmp_path), parallelism=parallelism, training__recompute_every=5, training__micro_batch=1)
