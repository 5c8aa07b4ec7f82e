"""Which checkpoints stay: newest, every n-th, named, evaluated, read just now; and what crashes leave goes."""

import os
import threading

import pytest

from pipeline.config.load import ConfigError
from pipeline.config.schema import CheckpointConfig, StorageConfig
from pipeline.planner.preparing import checkpoints_kept
from pipeline.storage import Storage
from pipeline.training import commits
from pipeline.training import retention as retention_module
from pipeline.training.commits import committed, committed_steps, manifest_path, step_folder, step_folders
from pipeline.training.retention import Retention, check_named, named_steps, pinned, reading
from tests.training.make import Watched, tiny


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(StorageConfig(root=str(tmp_path)))


def retention(storage: Storage, *, named=frozenset(), **config) -> Retention:
    return Retention(storage, "r", CheckpointConfig(**config), named)


def put(storage: Storage, *steps: int, manifest: bool = True) -> None:
    for step in steps:
        storage.write(f"{step_folder('r', step)}/part", b"x")
        if manifest:
            storage.write(manifest_path("r", step), b"{}")


def test_what_is_kept(storage):
    put(storage, *range(1, 13))
    storage.write("runs/r/evaluate/step-00000003.json", b"{}")
    with reading(storage, "r", 6):
        deleted = retention(storage, keep=2, keep_every=5, named=frozenset({4})).collect(11)
    assert committed_steps(storage, "r") == [
        3,
        4,
        5,
        6,
        10,
        11,
        12,
    ]  # 12 is later than the newest: none of its business
    assert deleted == [1, 2, 7, 8, 9]
    assert step_folders(storage, "r") == [3, 4, 5, 6, 10, 11, 12]
    retention(storage, keep=2, keep_every=5).collect(11)
    assert committed_steps(storage, "r") == [3, 5, 10, 11, 12]


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 2},
        {"keep": 9},
        {"keep": 2, "keep_every": 6},
        {"keep": 2, "keep_every": 5},
        {"keep": 1, "follow": True, "waiting": 3},
        {"keep": 1, "follow": True, "waiting": 30},
        {"keep": 1, "average": 4},
        {"keep": 1, "checkpoint": 7},
        {"keep": 2, "keep_every": 10, "average": 3, "follow": True, "waiting": 2},
    ],
)
def test_the_planner_knows_how_many_are_there_at_most(tmp_path, settings):
    """Of a run of 31 steps that saves every second one, while nobody judges what waits."""
    of = {"keep": "checkpoint__keep", "keep_every": "checkpoint__keep_every", "average": "publishing__average_last"}
    of |= {"follow": "evaluation__follow", "waiting": "evaluation__waiting", "checkpoint": "evaluation__checkpoint"}
    config = tiny(str(tmp_path), steps=31, run_id="r", **{of[key]: value for key, value in settings.items()})
    storage, named = Storage(config.storage), named_steps(config)
    kept = Retention(storage, "r", config.checkpoint, named, settings.get("waiting", 0))
    most = 0
    for step in range(1, 32):
        if step % 2 == 0 or step == 31 or step in named:
            put(storage, step)
            kept.collect(step)
            most = max(most, len(committed_steps(storage, "r")))
    twice = 2 if "keep_every" in settings else 0  # what stays for good may be among the newest, or named
    assert most <= checkpoints_kept(config) <= most + twice


def test_folders_without_a_manifest_are_no_checkpoints(storage):
    put(storage, 1, 2, 4)
    put(storage, 3, 5, manifest=False)
    retention(storage, keep=2).collect(4)
    assert step_folders(storage, "r") == [2, 4, 5]


def test_on_s3(s3_root):
    storage = Storage(s3_root)
    put(storage, *range(1, 6))
    with reading(storage, "r", 2):
        assert retention(storage, keep=1).collect(5) == [1, 3, 4]
    assert step_folders(storage, "r") == [2, 5]
    assert storage.names("runs/r/train/pins") == []


def test_a_pin_expires(storage):
    put(storage, 1, 2)
    with reading(storage, "r", 1, seconds=-1):  # its holder was killed an hour ago
        assert storage.names("runs/r/train/pins") != []
        assert pinned(storage, "r") == set()
        assert retention(storage, keep=1).collect(2) == [1]


def test_a_pin_is_renewed_while_the_reader_lives(storage, monkeypatch):
    """Before it expires, and the old one goes once the new one is there."""
    made, enough, pin = [], threading.Event(), retention_module._pin

    def counted(*arguments):
        made.append(pin(*arguments))
        if len(made) == 3:
            enough.set()
        return made[-1]

    monkeypatch.setattr(retention_module, "_pin", counted)
    with reading(storage, "r", 7, seconds=0.03):
        assert enough.wait(60)
    assert storage.names("runs/r/train/pins") == []
    assert len(set(made)) == len(made)


def test_leftovers_of_crashes_are_collected(storage):
    put(storage, 2, 4)
    put(storage, 1, 3, 6, 8, manifest=False)
    storage.write(f"{step_folder('r', 8)}/{commits.WITHDRAWN}", b"{}")
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    temporary = f"{storage.key('runs/r/train')}/manifest.json.tmp-{os.uname().nodename}-{dead}-0123"
    open(temporary, "w").close()
    retention(storage, keep=9).sweep(resumed=4)
    assert step_folders(storage, "r") == [2, 4, 8]
    assert not os.path.exists(temporary)


def test_cost_does_not_grow_with_the_number_of_checkpoints(storage, monkeypatch):
    """Objects that a save asks for, with 3 and with 300 checkpoints that are kept for good."""

    def requests(count: int) -> int:
        put(storage, *range(1, count + 1))
        kept = retention(storage, keep=2, keep_every=1)
        asked: list[str] = []
        for name in ("exists", "read", "delete", "names", "list"):
            whole = getattr(Storage, name)
            monkeypatch.setattr(Storage, name, lambda self, path, whole=whole: asked.append(path) or whole(self, path))
        kept.collect(count)
        with pytest.raises(ValueError):
            _ = committed(storage, "r")[-1]  # `{}` is no manifest: it was read
        monkeypatch.undo()
        return len(asked)

    assert requests(3) == requests(300)


@pytest.mark.parametrize(("keep", "wanted", "steps"), [(1, 2, 6), (3, 2, 8), (3, 3, 8), (1, 8, 8)])
def test_the_checkpoint_that_evaluation_names_is_made_and_kept(tmp_path, keep, wanted, steps):
    config = tiny(
        str(tmp_path), steps=steps, checkpoint__keep=keep, checkpoint__every_steps=2, evaluation={"checkpoint": wanted}
    )
    Watched().train(config)
    there = committed_steps(Storage(config.storage), "tiny")
    assert wanted in there
    assert len(there) == (keep if wanted > steps - 2 * keep and wanted % 2 == 0 else keep + 1)


@pytest.mark.parametrize("wanted", [100, 9])
def test_a_step_that_the_run_does_not_reach_is_refused(tmp_path, wanted):
    config = tiny(str(tmp_path), steps=8, evaluation={"checkpoint": wanted})
    with pytest.raises(ConfigError, match=rf"evaluation.checkpoint {wanted}: the run has 8 steps; name one of 1 to 8"):
        Watched().train(config)
    assert step_folders(Storage(config.storage), "tiny") == []


def test_a_step_that_the_run_has_passed_is_refused(tmp_path):
    Watched().train(tiny(str(tmp_path), steps=8, checkpoint__keep=2))
    config = tiny(str(tmp_path), steps=8, evaluation={"checkpoint": 3})
    with pytest.raises(ConfigError, match=r"checkpoint 3: the run has got to step 8 .* there are \[6, 8\]"):
        check_named(config, Storage(config.storage))
    check_named(tiny(str(tmp_path), steps=8, evaluation={"checkpoint": 6}), Storage(config.storage))
