"""A run that begins at another one's step: its losses are the parent's while nothing differs, and the parent keeps what it needs."""

from __future__ import annotations

import pytest

from pipeline.config.load import ConfigError
from pipeline.storage import Storage
from pipeline.training import branch
from pipeline.training.commits import committed_steps, manifest_path, read_manifest, step_folder
from pipeline.training.retention import pinned
from pipeline.training.trainer import Position, Run
from tests.training.make import BATCH, SEQUENCE, Watched, tiny, tiny_dataset

STEP = BATCH * SEQUENCE


def parent(root: str, **changes: object) -> Watched:
    watched = Watched()
    watched.train(tiny(root, steps=8, run_id="base", checkpoint__keep=9, **changes))
    return watched


def child(root: str, start: str = "base@4", **changes: object):
    return tiny(root, **{"steps": 8, "run_id": "child", "training__start_from": start} | changes)


def test_a_branch_goes_on_as_the_parent_did_bit_for_bit(tmp_path):
    base, again = parent(str(tmp_path)), Watched()
    end = again.train(child(str(tmp_path)))
    assert [each.step for each in again.progress] == [5, 6, 7, 8]
    assert again.losses == base.losses[4:]
    assert end.checkpoint.content_sha256 == base.checkpoints[-1].content_sha256  # momentum and counters, too
    assert end.checkpoint.tokens_seen == base.checkpoints[-1].tokens_seen
    assert end.checkpoint.next_sequence == base.checkpoints[-1].next_sequence
    assert end.checkpoint.run_identity != base.checkpoints[-1].run_identity


def test_a_branch_that_died_goes_on_from_its_own_checkpoint(tmp_path):
    base = parent(str(tmp_path))
    config = child(str(tmp_path))
    first = Watched()
    stops = iter([False, True])
    with pytest.raises(RuntimeError, match="stopped after step 6"):
        first.train(config, should_stop=lambda: next(stops))
    storage = Storage(config.storage)
    assert pinned(storage, "base") == set()
    branch.begin(config, storage)  # as if it had died before it took the pin away
    storage.delete(step_folder("base", 4))  # needed no more
    second = Watched()
    second.train(config)
    assert pinned(storage, "base") == set()
    assert first.losses + second.losses == base.losses[4:]


def test_an_anneal_and_a_longer_run(tmp_path):
    """The rate falls to zero from step 4 on; another goes on to step 12. Both are the parent's up to there."""
    base = parent(str(tmp_path))
    tokens = 6 * STEP
    rates = [
        {"until_tokens": 4 * STEP, "shape": "linear", "start": 0.01, "end": 0.0055},
        {"until_tokens": tokens, "shape": "linear", "start": 0.0055, "end": 0.0},
    ]
    schedule = {
        "total_tokens": tokens, "learning_rate": rates,
        "global_batch": [{"until_tokens": tokens, "sequences": BATCH}], "bias_rate": [{"until_tokens": tokens, "rate": 0.01}],
    }  # fmt: skip
    annealed = Watched()
    annealed.train(child(str(tmp_path), schedule=schedule))
    assert [each.step for each in annealed.progress] == [5, 6]
    assert annealed.losses[0] == base.losses[4]
    assert annealed.progress[-1].learning_rate == 0.0
    longer = Watched()
    longer.train(child(str(tmp_path), "base@8", steps=12, run_id="longer"))
    assert [each.step for each in longer.progress] == [9, 10, 11, 12]


def test_another_mixture_from_there_on(tmp_path):
    base = parent(str(tmp_path))
    sources = tiny("x").corpus.model_dump(mode="json")["sources"]
    mixture = [
        {"until_tokens": 4 * STEP, "weights": {"s0": 1.0, "s1": 1.0}}, {"until_tokens": 8 * STEP, "weights": {"s1": 1.0}}
    ]  # fmt: skip
    other = Watched()
    other.train(child(str(tmp_path), corpus={"sources": sources, "mixture": mixture}))
    assert [each.step for each in other.progress] == [5, 6, 7, 8]
    assert other.losses != base.losses[4:]
    assert other.losses[0] < base.losses[0]  # with what the parent knew


def test_from_zero_only_the_state_is_the_parents(tmp_path):
    base, fresh = parent(str(tmp_path)), Watched()
    config = child(str(tmp_path), steps=2, training__start_position="zero")
    end = fresh.train(config)
    assert [each.step for each in fresh.progress] == [1, 2]
    assert end.checkpoint.next_sequence == 2 * BATCH
    assert end.checkpoint.tokens_seen < base.checkpoints[1].tokens_seen
    assert fresh.losses[0] < base.losses[0]


def test_what_the_parent_left_out_the_branch_leaves_out(tmp_path):
    """It went back on a spike before the branch (left_out.py): its sequence n is another position of the data since."""
    parent(str(tmp_path))
    config = child(str(tmp_path))
    storage = Storage(config.storage)
    manifest = read_manifest(storage, "base", 4)
    assert manifest is not None
    detour = manifest.model_copy(update={"left_out": ((5, 8),)})
    storage.write(manifest_path("base", 4), detour.to_json())
    stops = iter([False, True])
    with pytest.raises(RuntimeError, match="stopped after step 6"):
        Watched().train(config, should_stop=lambda: next(stops))
    run = Run(config, tiny_dataset(storage), storage)
    run.close()
    assert run.at == Position(6, 6 * BATCH)
    assert run.order.positions([4, 5, 4 * BATCH]).tolist() == [4, 8, 4 * BATCH + 3]
    assert run.checkpoint is not None
    assert run.checkpoint.left_out == ((5, 8),)


# -- the parent keeps what is needed ----------------------------------------------------------------------------------


def test_the_parents_checkpoint_stays_until_the_branch_has_its_own(tmp_path):
    root = str(tmp_path)
    parent(root)
    config = child(root)
    storage = Storage(config.storage)
    found = branch.begin(config, storage)
    assert pinned(storage, "base") == {4}
    Watched().train(tiny(root, steps=12, run_id="other", training__start_from="base@8"))
    assert pinned(storage, "base") == {4}  # its own pin is gone, and no other
    trimmed = tiny(root, steps=8, run_id="base", checkpoint__keep=1)
    storage.delete(step_folder("base", 8))
    Watched().train(trimmed)  # the parent saves step 8 again, and only the newest stays
    assert committed_steps(storage, "base") == [4, 8]
    again = Watched()
    again.train(config)
    assert again.progress[0].step == found.step + 1
    assert pinned(storage, "base") == set()
    origin = branch.origin_of("child", storage)
    assert origin is not None
    assert (origin.run_id, origin.step, origin.checkpoint_digest) == ("base", 4, found.digest)


def test_a_parent_that_was_trained_again_is_not_the_parent(tmp_path):
    root = str(tmp_path)
    parent(root)
    config = child(root)
    storage = Storage(config.storage)
    branch.begin(config, storage)
    storage.delete("runs/base")
    parent(root, seed=1)
    with pytest.raises(ConfigError, match=r"run 'child' began at base@4 with content .* take another run_id"):
        Watched().train(config)


@pytest.mark.parametrize(
    ("start", "changes", "message"),
    [
        ("base@5", {}, r"run 'base' has no checkpoint of step 5 in .*; it has \[2, 4, 6, 8\]"),
        ("nobody@2", {}, r"run 'nobody' has no checkpoint of step 2 in .*; it has none"),
        ("base@8", {}, r"schedule.total_tokens 1,024: the run ends at step 8, and .* begins at step 8; raise it"),
        (
            "base@4",
            {"experts": 8},
            r"model.n_routed_experts is 8 here and 4 there; model.num_experts_per_tok is 1 here",
        ),
        ("base@4", {"optimizer__name": "adamw"}, r"optimizer.name is 'adamw' here and 'muon' there"),
        (
            "base@4",
            {"training__skip_sequences": [[0, 4]]},
            r"training.skip_sequences is \[\[0, 4\]\] here and \[\] there",
        ),
        (
            "base@4",
            {"evaluation__checkpoint": 3},
            r"evaluation.checkpoint 3: the run begins at step 4 and has no checkpoint of step 3; name another step",
        ),
        (
            "base@4",
            {"publishing__average_last": 3},
            r"publishing.average_last 3: the run begins at step 4 and has no checkpoint of step 4; lower it, or leave it out",
        ),
        (
            "base@4",
            {"schedule__global_batch": [{"until_tokens": 8 * STEP, "sequences": 4}]},
            r"schedule.global_batch: by it step 4 begins at sequence 16, and the parent had come to 32",
        ),
    ],
)
def test_what_cannot_begin_there_is_named(tmp_path_factory, start, changes, message):
    root = _parent_once(tmp_path_factory)
    with pytest.raises(ConfigError, match=message):
        branch.check(child(root, start, **changes), Storage(tiny(root).storage))


def test_a_damaged_parent_is_named(tmp_path):
    parent(str(tmp_path))
    config = child(str(tmp_path))
    storage = Storage(config.storage)
    manifest = read_manifest(storage, "base", 4)
    assert manifest is not None
    storage.delete(next(file.path for file in manifest.files if file.path.endswith(".distcp")))
    with pytest.raises(
        ConfigError, match=r"base@4: .*distcp: the file is missing; take another step, of \[2, 4, 6, 8\]"
    ):
        branch.begin(config, storage)
    assert pinned(storage, "base") == set()


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"start_from": "base"}, "must be RUN@STEP"),
        ({"start_from": "tiny@4"}, "a run cannot start from itself"),
        ({"start_from": "base@4", "initial_weights": "promoted"}, "both say where the weights come from"),
        ({"start_position": "zero"}, "start_position is of a run that starts from another one"),
    ],
)
def test_settings_that_make_no_sense(training, message):
    with pytest.raises(ConfigError, match=message):
        tiny("x", **{f"training__{key}": value for key, value in training.items()})


def _parent_once(factory) -> str:
    root = factory.getbasetemp() / "branch-parent"
    if not root.exists():
        parent(str(root))
    return str(root)
