"""Every checkpoint once, in order, whatever kills the follower; and training keeps what waits, but not without end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.dataset.order import Order
from pipeline.evaluation import follow as follow_module
from pipeline.evaluation.follow import Followed, follow
from pipeline.evaluation.result import identity, manifest_path, tasks_are_due
from pipeline.manifest import CheckpointManifest, DatasetManifest, EvaluationManifest, SourceScore, TrainManifest
from pipeline.storage import Storage
from pipeline.training import branch
from pipeline.training.commits import DamagedCheckpoint, ForeignCheckpoint, RunFacts, committed_steps, read_manifest
from pipeline.training.commits import manifest_path as checkpoint_path
from pipeline.training.identity import identity_digest
from pipeline.training.retention import Retention, named_steps, pinned
from tests.training.make import tiny, tiny_dataset

STEPS, EVERY = 16, 2


class Killed(BaseException):
    """SIGKILL, as far as a function can be given it."""


class Run:
    """A run of 8 checkpoints, whose trainer commits the next one whenever it is asked to go on."""

    def __init__(self, root: Any, **settings: Any) -> None:
        settings = {"evaluation__follow": True, "checkpoint__keep": 1, "checkpoint__every_steps": EVERY} | settings
        self.config = tiny(str(root), steps=STEPS, **settings)
        self.storage = Storage(self.config.storage)
        self.dataset: DatasetManifest = tiny_dataset(self.storage)
        order = Order.of_run(self.config, self.dataset)
        self.facts = RunFacts.of(self.config, self.dataset, order)
        self.retention = Retention(
            self.storage, "tiny", self.config.checkpoint, named_steps(self.config), self.config.evaluation.waiting
        )
        self.step = 0
        self.judged: list[int] = []
        self.with_tasks: list[bool] = []

    def train(self, checkpoints: int = 1) -> None:
        for _ in range(checkpoints):
            if self.step == STEPS:
                return
            self.step += EVERY
            manifest = CheckpointManifest(
                run_id="tiny", run_identity=identity_digest(self.facts.identity), step=self.step, next_sequence=8 * self.step,
                tokens_seen=100 * self.step, dataset_digest=self.dataset.digest, order_digest=self.facts.order_digest,
                content_sha256=str(self.step), files=(), loss=1.0, world_size=1,
            )  # fmt: skip
            self.storage.write(checkpoint_path("tiny", self.step), manifest.to_json())
            self.retention.collect(self.step)
            if self.step == STEPS:
                whole = TrainManifest(identity="i", checkpoint=manifest, steps=STEPS, metrics=(), skipped_steps=0)
                self.storage.write("runs/tiny/train/manifest.json", whole.to_json())

    def judge(self, checkpoint: CheckpointManifest, with_tasks: bool) -> EvaluationManifest:
        """Slow: two checkpoints more are there when it has judged one."""
        self.train(2)
        assert read_manifest(self.storage, "tiny", checkpoint.step) is not None, "deleted while it is read"
        assert checkpoint.step in pinned(self.storage, "tiny")
        score = SourceScore(documents=1, tokens=9, text_bytes=9, loss=9.0 - checkpoint.step / 10, bits_per_byte=1.0)
        record = EvaluationManifest(
            identity=identity(self.config, self.dataset, checkpoint, with_tasks=with_tasks), checkpoint_digest=checkpoint.digest,
            dataset_digest=self.dataset.digest, step=checkpoint.step, sequence_length=8, overall=score, sources={"s0": score},
            unigram_entropy=9.0, baselines={}, source_baselines={}, tokens_seen=checkpoint.tokens_seen,
        )  # fmt: skip
        self.storage.write(manifest_path(self.config, checkpoint), record.to_json())
        self.judged.append(checkpoint.step)
        self.with_tasks.append(with_tasks)
        return record

    def follow(self, judge: Callable[..., EvaluationManifest] | None = None) -> Followed:
        def wait() -> bool:
            self.train()
            return True

        return follow(
            self.config, self.dataset, self.storage, judge=judge or self.judge, wait=wait, say=lambda line: None
        )


def test_eight_checkpoints_and_a_slow_follower_that_is_killed_twice(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    run = Run(tmp_path)
    deaths = iter([3, 5])  # in the third checkpoint before its result is there, in the fifth after
    dying = next(deaths)

    def judge(checkpoint: CheckpointManifest, with_tasks: bool) -> EvaluationManifest:
        nonlocal dying
        if len(run.judged) + 1 == dying == 3:
            dying = next(deaths)
            raise Killed
        found = run.judge(checkpoint, with_tasks)
        if len(run.judged) == dying:
            dying = 0
            raise Killed
        return found

    ends = 0
    with monkeypatch.context() as patch:
        patch.setattr(follow_module._Pins, "__exit__", lambda *_: None)  # a killed process takes no pin away
        for _ in range(2):
            with pytest.raises(Killed):
                run.follow(judge)
            ends += 1
            run.train()
    done = run.follow(judge)
    assert ends == 2
    assert run.judged == list(range(EVERY, STEPS + 1, EVERY))  # all once, in order
    assert [found.step for found in done.judged] == run.judged[5:]
    assert done.missing == []
    assert done.passed_over == {}
    curve = [run.storage.read(f"runs/tiny/evaluate/step-{step:08d}.json") for step in run.judged]
    assert [EvaluationManifest.parse(data, "").tokens_seen for data in curve] == [100 * step for step in run.judged]
    assert pinned(run.storage, "tiny") == set()
    assert committed_steps(run.storage, "tiny") == [STEPS]  # nothing stays for the dead


def test_what_is_judged_need_not_stay(tmp_path: Any):
    run = Run(tmp_path, checkpoint__keep_every=6)
    run.follow()
    for name in run.storage.names("runs/tiny/train/pins"):
        run.storage.delete(f"runs/tiny/train/pins/{name}")
    assert committed_steps(run.storage, "tiny") == [6, 12, 16]  # keep_every, and the newest


def test_training_keeps_no_more_than_may_wait_and_says_which_go_without(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
):
    run = Run(tmp_path, evaluation__waiting=3)
    run.train(8)  # and nobody follows
    assert committed_steps(run.storage, "tiny") == [10, 12, 14, 16]  # three that wait, and the newest
    assert (
        "checkpoint of step 2 goes without a result: 4 wait to be judged, and evaluation.waiting keeps 3"
        in capsys.readouterr().err
    )
    done = run.follow()
    assert run.judged == [10, 12, 14, 16]
    assert done.missing == [2, 4, 6, 8]


def test_a_follower_alone_holds_what_it_has_seen(tmp_path: Any):
    """The trainer's own configuration knows nothing of it."""
    run = Run(tmp_path)
    run.retention = Retention(run.storage, "tiny", run.config.checkpoint, frozenset())
    run.train(2)
    run.follow()
    assert run.judged[0] == 4  # 2 was gone before it came
    assert run.judged == sorted(set(run.judged))


def test_what_the_parent_was_judged_at_is_not_missing(tmp_path: Any):
    """A branch has no checkpoints of the steps before it began, whatever its schedule says of them."""
    run = Run(tmp_path, checkpoint__keep=8, training__start_from="base@6")
    run.storage.write(
        branch.origin_path("tiny"),
        branch.Origin(
            run_id="base", step=6, checkpoint_digest="d", content_sha256="c", next_sequence=48, tokens_seen=600
        ).to_json(),
    )
    run.step = 6
    done = run.follow()
    assert run.judged == [8, 10, 12, 14, 16]
    assert done.missing == []


def test_following_again_judges_nothing_and_new_settings_judge_anew(tmp_path: Any):
    run = Run(tmp_path, checkpoint__keep=8)
    run.follow()
    count = len(run.judged)
    assert run.follow().judged == []
    section = run.config.evaluation.model_copy(update={"max_tokens_per_source": 5})
    run.config = run.config.model_copy(update={"evaluation": section})
    run.follow()
    assert run.judged[count:] == run.judged[:count]


def test_a_checkpoint_that_a_run_takes_again_is_judged_again(tmp_path: Any):
    """It went back on a spike after step 8 had been judged."""
    run = Run(tmp_path, checkpoint__keep=8)
    again = False

    def judge(checkpoint: CheckpointManifest, with_tasks: bool) -> EvaluationManifest:
        nonlocal again
        found = run.judge(checkpoint, with_tasks)
        if checkpoint.step == 8 and not again:
            again = True
            path = checkpoint_path("tiny", 8)
            other = CheckpointManifest.parse(run.storage.read(path), path).model_copy(
                update={"content_sha256": "other"}
            )
            run.storage.write(path, other.to_json())
            run.storage.write("runs/tiny/train/left_out.json", b"{}")
        return found

    run.follow(judge)
    assert run.judged == [2, 4, 6, 8, 8, 10, 12, 14, 16]


def test_tasks_are_due_at_chosen_checkpoints(tmp_path: Any):
    run = Run(tmp_path, checkpoint__keep=8, evaluation__tasks=["a"], evaluation__tasks_every=6)
    run.follow()
    assert dict(zip(run.judged, run.with_tasks)) == {
        2: False,
        4: False,
        6: True,
        8: False,
        10: False,
        12: True,
        14: False,
        16: True,
    }
    assert run.follow().judged == []
    chosen = tiny(str(tmp_path), steps=STEPS, evaluation__tasks=["a"], evaluation__checkpoint=4)
    assert [step for step in range(2, 17, 2) if tasks_are_due(chosen, step)] == [4]


def test_a_damaged_checkpoint_is_named_and_the_others_are_judged(tmp_path: Any):
    run = Run(tmp_path, checkpoint__keep=8)

    def judge(checkpoint: CheckpointManifest, with_tasks: bool) -> EvaluationManifest:
        if checkpoint.step == 6:
            raise DamagedCheckpoint("part 1: the file is missing")
        return run.judge(checkpoint, with_tasks)

    done = run.follow(judge)
    assert done.passed_over == {6: "part 1: the file is missing"}
    assert run.judged == [2, 4, 8, 10, 12, 14, 16]
    assert done.missing == [6]


def test_checkpoints_of_other_settings_are_refused(tmp_path: Any):
    run = Run(tmp_path)
    run.train(1)
    run.config = tiny(str(tmp_path), steps=STEPS, optimizer__weight_decay=0.5)
    with pytest.raises(ForeignCheckpoint, match="a checkpoint of a different run"):
        run.follow()
