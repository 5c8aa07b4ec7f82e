"""Whatever may change between two starts may change at every start: the run ends complete, with the same weights, and its
metrics have neither gap nor double (docs/training.md, "Stopping and going on")."""

import json
import tempfile

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pipeline.storage import Storage
from pipeline.training.commits import committed
from pipeline.training.trainer import TrainingStopped
from tests.distributed import run_distributed
from tests.training.make import Watched, tiny

STEPS = 9
EXACT = st.fixed_dictionaries(
    {
        "checkpoint__every_steps": st.integers(1, 12),
        "checkpoint__keep": st.integers(1, 3),
        "checkpoint__keep_every": st.none() | st.integers(1, 4),
        "checkpoint__async_save": st.booleans(),
        "training__log_every": st.integers(1, 4),
        "training__activation_checkpointing": st.sampled_from(["none", "selective", "full"]),
        "training__step_timeout_s": st.sampled_from([100.0, 200.0]),
        "evaluation": st.sampled_from([{"checkpoint": "last"}, {"checkpoint": 9}]),
    }
)
START = st.tuples(EXACT, st.sampled_from(["stopped", "killed"]), st.integers(1, STEPS))


class Killed(Exception):
    pass


class Dying(list):
    """Reports of progress that end at a step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def append(self, progress) -> None:
        super().append(progress)
        if progress.step >= self.at:
            raise Killed


def start(root: str, settings: dict, how: str, at: int, **more):
    """One start of the run; its manifest if it came to its end."""
    config = tiny(root, steps=STEPS, **settings, **more)
    watched, asked = Watched(), iter(range(STEPS * 2))
    if how == "killed":
        watched.progress = Dying(at)
    try:
        return watched.train(config, should_stop=lambda: how == "stopped" and next(asked) >= at)
    except (Killed, TrainingStopped):
        return None


def lines(manifest, storage: Storage) -> list[dict]:
    return [json.loads(line) for file in manifest.metrics for line in storage.read(file.path).splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("undisturbed"))
    manifest = start(root, {}, "", 0)
    return manifest, {line["step"]: line for line in lines(manifest, Storage(tiny(root).storage))}


def logged(settings: dict, after: int, up_to: int) -> set[int]:
    every = settings["training__log_every"]
    return {step for step in range(after + 1, up_to + 1) if step % every == 0 or step in (1, STEPS)}


def check(starts: list, undisturbed) -> None:
    with tempfile.TemporaryDirectory() as root:
        storage = Storage(tiny(root).storage)
        expected: set[int] = set()
        at, manifest = 0, None
        for settings_now, how, when in [*starts, ({"training__log_every": 1}, "", 0)]:
            manifest = start(root, settings_now, how, when)
            saved = committed(storage, "tiny")
            now = saved[-1].step if saved else 0
            expected = expected | logged(settings_now, at, now)
            at = now
        assert manifest is not None
        assert manifest.checkpoint.content_sha256 == undisturbed[0].checkpoint.content_sha256
        assert manifest.checkpoint.digest == undisturbed[0].checkpoint.digest
        found = lines(manifest, storage)
        assert [line["step"] for line in found] == sorted(expected)
        assert found == [undisturbed[1][line["step"]] for line in found]


@settings(max_examples=6, derandomize=True, deadline=None, phases=[Phase.generate])
@given(st.lists(START, min_size=1, max_size=4))
def test_any_change_at_any_restart(undisturbed, starts):
    check(starts, undisturbed)


@pytest.mark.long
@settings(max_examples=150, derandomize=True, deadline=None, phases=[Phase.generate])
@given(st.lists(START, min_size=1, max_size=6))
def test_any_change_at_any_restart_at_length(undisturbed, starts):
    check(starts, undisturbed)


def part(root: str, settings: dict, at: int):
    manifest = start(root, settings, "stopped", at)
    return None if manifest is None else manifest.checkpoint.loss


@pytest.mark.long
def test_meshes_and_micro_batches_change_too(tmp_path, undisturbed):
    """Other orders of summation, hence losses instead of bits; the metrics are as contiguous."""
    root = str(tmp_path)
    interval = {"checkpoint__every_steps": 2, "training__log_every": 1}
    run_distributed(part, 2, root, {"parallelism": {"shard": 2, "ep": 2}, "training__micro_batch": 4, **interval}, 2)
    run_distributed(part, 2, root, {"parallelism": {"replicate": 2}, "training__micro_batch": 1, **interval}, 4)
    manifest = start(root, {"training__micro_batch": 8, "checkpoint__every_steps": 7}, "", 0)
    found = lines(manifest, Storage(tiny(root).storage))
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in found] == pytest.approx(
        [undisturbed[1][step]["loss"] for step in range(1, STEPS + 1)], abs=1e-4
    )
