"""Killed, stopped and resized runs end where an undisturbed run ends."""

import itertools
import json
from unittest import mock

import pytest
import torch.distributed as dist

from pipeline.optim import products
from pipeline.storage import Storage
from pipeline.training.commits import committed, train_folder
from pipeline.training.content import combine, local_sums
from pipeline.training.files import CheckpointReader
from pipeline.training.trainer import Run, TrainingStopped
from tests.distributed import run_distributed
from tests.training.make import Watched, tiny, tiny_dataset

STEPS = 6


class Killed(Exception):
    pass


def stop_after(steps: int):
    """True from the question before step `steps` on: the loop sees it one step later at most."""
    asked = itertools.count(1)
    return lambda: next(asked) >= steps


def losses(root: str) -> list[float]:
    """From the stored metrics, in order."""
    storage = Storage(tiny(root).storage)
    files = storage.list(f"{train_folder('tiny')}/metrics")
    lines = [json.loads(line) for info in files for line in storage.read(info.path).splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("undisturbed"))
    manifest = Watched().train(tiny(root, steps=STEPS))
    return manifest, losses(root)


def test_killed_between_checkpoints(tmp_path, undisturbed):
    """Step 5 is lost, step 4 is safe; metrics, state and losses are the same bytes."""
    config = tiny(str(tmp_path), steps=STEPS)

    class Dying(Watched):
        def train(self, config, **options):
            self.progress = Fuse()
            return super().train(config, **options)

    class Fuse(list):
        def append(self, progress):
            if progress.step == 5:
                raise Killed

    with pytest.raises(Killed):
        Dying().train(config)
    storage = Storage(config.storage)
    assert [manifest.step for manifest in committed(storage, "tiny")] == [2, 4]
    watched = Watched()
    manifest = watched.train(config)
    assert [progress.step for progress in watched.progress] == [5, 6]
    assert manifest.checkpoint.content_sha256 == undisturbed[0].checkpoint.content_sha256
    assert (manifest.digest, manifest.metrics) == (undisturbed[0].digest, undisturbed[0].metrics)
    assert losses(str(tmp_path)) == undisturbed[1]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_asked_to_stop(tmp_path, undisturbed, asynchronous):
    """A checkpoint is taken at once, inside an interval, and the interval's metrics are completed later."""
    config = tiny(str(tmp_path), steps=STEPS, checkpoint__every_steps=4, checkpoint__async_save=asynchronous)
    watched = Watched()
    with pytest.raises(TrainingStopped) as stopped:
        watched.train(config, should_stop=stop_after(2))
    assert stopped.value.checkpoint.step in (2, 3)
    assert watched.checkpoints == [stopped.value.checkpoint]
    manifest = Watched().train(config)
    assert manifest.checkpoint.content_sha256 == undisturbed[0].checkpoint.content_sha256
    assert losses(str(tmp_path)) == undisturbed[1]
    assert manifest.metrics == undisturbed[0].metrics


def test_a_complete_run_is_not_trained_again(tmp_path, undisturbed):
    config = tiny(str(tmp_path), steps=STEPS)
    first = Watched().train(config)
    watched = Watched()
    assert watched.train(config) == first
    assert watched.progress == []


def part(root: str, parallelism: dict, last: int) -> int:
    """Train up to about step `last`, when the last rank is asked to stop; the step reached."""
    config = tiny(root, steps=8, parallelism=parallelism, training__micro_batch=1, **BATCH_OF_12)
    watched = Watched()
    try:
        asked = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        return watched.train(config, should_stop=stop_after(last) if asked else None).checkpoint.step
    except TrainingStopped as stopped:
        return stopped.checkpoint.step


BATCH_OF_12 = {
    "schedule__total_tokens": 8 * 12 * 16,
    "schedule__global_batch": [{"until_tokens": 8 * 12 * 16, "sequences": 12}],
    "schedule__learning_rate": [{"until_tokens": 8 * 12 * 16, "shape": "linear", "start": 1e-3, "end": 1e-4}],
    "schedule__bias_rate": [{"until_tokens": 8 * 12 * 16, "rate": 0.01}],
    "checkpoint__every_steps": 100,
}


def test_any_number_of_ranks_and_any_expert_degree(tmp_path):
    """4 ranks (ep 2) -> 2 (ep 2) -> 3 (ep 1, uneven shards) -> 1, against one process throughout."""
    whole, resized = str(tmp_path / "whole"), str(tmp_path / "resized")
    part(whole, {}, 100)
    for world, ep in [(4, 2), (2, 2), (3, 1)]:
        before = committed(Storage(tiny(resized).storage), "tiny")
        reached = run_distributed(part, world, resized, {"shard": world, "ep": ep}, 1)
        assert len(set(reached)) == 1
        assert (before[-1].step if before else 0) < reached[0] < 8
    assert part(resized, {}, 100) == 8
    assert losses(resized) == pytest.approx(losses(whole), abs=1e-5)


def test_a_reshard_moves_every_bit(tmp_path):
    """What 2 ranks (ep 2) wrote is what one process holds after reading it: the digest of the contents says so."""
    run_distributed(part, 2, str(tmp_path), {"shard": 2, "ep": 2}, 1)
    storage = Storage(tiny(str(tmp_path)).storage)
    manifest = committed(storage, "tiny")[-1]
    run = Run(tiny(str(tmp_path), steps=8, training__micro_batch=1, **BATCH_OF_12), tiny_dataset(storage), storage)
    run.close()
    assert run.at.step == manifest.step
    assert manifest.world_size == 2
    assert combine([local_sums(run.state(), 0)], run.state()) == manifest.content_sha256


def test_going_on_with_other_products_is_said_in_one_line(tmp_path, caplog):
    """The checkpoint records what Newton-Schulz multiplied; the choice is no part of the run's identity."""
    muon = {"muon": {"products": "fp32"}}
    with pytest.raises(TrainingStopped) as stopped:
        Watched().train(tiny(str(tmp_path), optimizer=muon), should_stop=stop_after(2))
    assert stopped.value.checkpoint.newton_schulz == "fp32"
    assert "Newton-Schulz" not in caplog.text
    with mock.patch.object(products, "has_products", return_value=True):
        manifest = Watched().train(tiny(str(tmp_path)))
    assert manifest.checkpoint.newton_schulz == "bf16"
    (line,) = [record.getMessage() for record in caplog.records if record.name == "pipeline.training.trainer"]
    assert line.startswith("Newton-Schulz multiplies bf16 here and multiplied fp32 up to this checkpoint")
    caplog.clear()  # a branch, too, goes on from what was multiplied before it
    Watched().train(tiny(str(tmp_path), optimizer=muon, run_id="branch", training__start_from="tiny@4", steps=6))
    (line,) = [record.getMessage() for record in caplog.records if record.name == "pipeline.training.trainer"]
    assert line.startswith("Newton-Schulz multiplies fp32 here and multiplied bf16 up to this checkpoint")


def test_bf16_momentum_is_in_checkpoints_and_stays(tmp_path):
    """Stopped and resumed, the run is bit by bit the one that was not stopped; another dtype is refused by name."""
    muon = {"optimizer": {"muon": {"momentum_dtype": "bf16"}}}
    whole, stopping = (tiny(str(tmp_path / name), steps=STEPS, **muon) for name in ("whole", "stopping"))
    manifest = Watched().train(whole)
    with pytest.raises(TrainingStopped):
        Watched().train(stopping, should_stop=stop_after(3))
    with pytest.raises(ValueError, match=r"optimizer.muon.momentum_dtype is None here and 'bf16' there"):
        Watched().train(tiny(str(tmp_path / "stopping"), steps=STEPS))
    assert Watched().train(stopping).checkpoint.content_sha256 == manifest.checkpoint.content_sha256
    storage = Storage(whole.storage)
    stored = CheckpointReader(storage, manifest.checkpoint).read_metadata().state_dict_metadata
    kept = {str(facts.properties.dtype) for name, facts in stored.items() if name.endswith(".momentum_buffer")}
    assert kept == {"torch.bfloat16"}


def test_bf16_momentum_trains_as_well(tmp_path):
    """Of what 40 steps learn, not more than a hundredth is another: rounding momentum is noise below that of data."""
    found = {}
    for dtype in ("fp32", "bf16"):
        root = str(tmp_path / dtype)
        Watched().train(tiny(root, steps=40, optimizer={"muon": {"momentum_dtype": dtype}}))
        found[dtype] = losses(root)
    learnt = found["fp32"][0] - found["fp32"][-1]
    assert learnt > 0.5
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], abs=learnt / 100)
