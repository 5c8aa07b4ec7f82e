"""The training loop: one process, `torchrun` ranks or Ray Train workers, all the same.

    build      network on the meta device, sharded, shards allocated, weights drawn by name; optimizer with its state
    restore    newest committed checkpoint of the run, if any, resharded to the ranks that are here; else, of a branch, the parent's
    loop       read the step's rows, train on them (step.py), look at the figures of the step before, save when due
    finish     last checkpoint, metrics and the run's manifest

All that a restart needs is (state, next sequence): learning rate, batch size and bias rate are functions of the position
in slots, and the data order is a function of the sequence number. Tokens seen, the labels trained on, are only reported. The same number of ranks gives the same bits; any
other number the same losses up to the order of summation.

The process group, if any, is initialised by the caller; this module reads no environment and knows no launcher.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.schema import RunConfig
from pipeline.dataset.loader import Loader
from pipeline.dataset.order import Order, check_demand
from pipeline.manifest import CheckpointManifest, DatasetManifest, FileEntry, TrainManifest
from pipeline.model.hf import load_hf
from pipeline.model.moonlight import Moonlight
from pipeline.optim.muon import MoonlightOptimizer, build_optimizer
from pipeline.optim.rules import moonlight_rules
from pipeline.optim.schedule import at_step, total_steps
from pipeline.parallel.flight_recorder import recorded
from pipeline.parallel.mesh import Meshes, build_meshes
from pipeline.parallel.shard import shard_model
from pipeline.storage import Storage
from pipeline.tokenizer import Encoder
from pipeline.tracking.follow import Trackers
from pipeline.training import branch, initial
from pipeline.training.batches import read_step
from pipeline.training.checkpoint import Checkpointer
from pipeline.training.collection import collecting
from pipeline.training.commits import RunFacts, committed, train_folder
from pipeline.training.figures import Fetch, PendingRecord
from pipeline.training.flops import flops_per_token, peak_flops
from pipeline.training.going_back import WentBack, decide
from pipeline.training.guard import Guard, check_skipped, check_spikes
from pipeline.training.identity import identity_digest
from pipeline.training.journal import Journal
from pipeline.training.left_out import Detour, order_of
from pipeline.training.metrics import MetricsFiles, Pace, StepRecord, TrainProgress, sound_files
from pipeline.training.phases import Stopwatch
from pipeline.training.profile import Profiler
from pipeline.training.recompute import Recomputation
from pipeline.training.retention import check_named, named_steps
from pipeline.training.step import Step
from pipeline.training.times import TimesOfRanks
from pipeline.training.watchdog import Watchdog
from pipeline.training.writer import Writer, sole_writer

log = logging.getLogger(__name__)


class TrainingStopped(RuntimeError):
    """The run was asked to stop before its end and did, after committing `checkpoint`; starting it again goes on there."""

    def __init__(self, checkpoint: CheckpointManifest) -> None:
        super().__init__(f"stopped after step {checkpoint.step}; the same command continues from its checkpoint")
        self.checkpoint = checkpoint


@dataclass
class Position:
    """Where a run stands. Everything else about it is a function of this and of the tensors."""

    step: int = 0
    next_sequence: int = 0


def train(
    config: RunConfig,
    dataset: DatasetManifest,
    storage: Storage,
    *,
    report: Callable[[TrainProgress], None],
    on_checkpoint: Callable[[CheckpointManifest], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    owner: str | None = None,
) -> TrainManifest:
    """Train the run to its end and return its manifest; every rank calls this and gets the same.

    `report` is called on rank 0 at logged steps; `on_checkpoint` on every rank, in the same order, once a checkpoint is
    known to be committed; `should_stop` is asked every step on every rank, and one yes stops all (TrainingStopped).
    `owner`: a group that is started again under the same word need not wait for its dead self (lease.hold).

    Raises ValueError for what the configuration cannot do here (mesh, data, foreign checkpoint), RunDiverged, Held if somebody
    else trains this run, and LeaseLost if somebody has taken it over.
    """
    check_demand(config, dataset)
    check_named(config, storage)
    ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    config = config.at_size(ranks[1])
    hangs = f"{train_folder(config.run_id)}/hangs"
    with (
        Watchdog(
            config.training.step_timeout_s, storage, hangs, *ranks, collectives=recorded
        ) as watchdog,  # over closing, too: a save may wait for a dead rank
        sole_writer(storage, config.run_id, owner) as writer,
        contextlib.nullcontext() if ranks[0] else Trackers(config, storage, writer.check),
    ):
        while True:
            watchdog.enter("start", 0)
            run = Run(config, dataset, storage, writer)
            try:
                with run.profiler, collecting(config.training.collect_every) as run.collect:
                    return run.train(watchdog, report, on_checkpoint or _ignore, should_stop or _never)
            except WentBack:
                continue  # the record says where to, so it is a start like any other
            finally:
                run.close()
                del run  # its memory


class Run:
    """A run built on this rank, restored from its newest checkpoint."""

    def __init__(
        self, config: RunConfig, dataset: DatasetManifest, storage: Storage, writer: Writer | None = None
    ) -> None:
        """writer: None for a run that nobody else could write, as in a benchmark."""
        self.config = config
        self.writer = writer or Writer(0, None)
        self.storage = storage
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if config.cluster.use_gpu else torch.device("cpu")
        )
        self.meshes = build_meshes(config.parallelism, self.device.type)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.journal: Journal | None = None
        self.dataset = dataset
        self.facts = replace(RunFacts.of(config, dataset, Order.of_run(config, dataset)), fence=self.writer.number)
        self.named = named_steps(config)
        waiting = config.evaluation.waiting if config.evaluation.follow else 0
        self.checkpoints = Checkpointer(
            storage, config.checkpoint, self.facts, self.device, self.named, self.writer.check, waiting
        )
        self.left_out = self.checkpoints.leave_stale()
        parent: CheckpointManifest | None = None
        if config.training.start_from:
            parent = self.checkpoints.on_rank_0(self.parent)
            self.left_out = self.checkpoints.leave_stale()  # the parent's detours, too
        self.order = order_of(config, dataset, self.left_out.ranges)
        self.loader = Loader(self.order, storage, self.rank, self.meshes.world_size)
        self.steps = total_steps(config.schedule, config.training.sequence_length)
        self.answers = None
        if config.training.loss_on == "answers":
            encoder = Encoder.stored(dataset.tokenizer, storage)
            self.answers = encoder.chat.marks(encoder)

        resume_from = self.checkpoints.newest(self.order)
        self.model, self.optimizer = build(config, self.meshes, self.device)
        self.guard = Guard(self.device, config.training.spikes)
        self.at = Position()
        self.loss: float | None = None  # of the last step that had one
        self.tokens_seen = 0  # labels trained on, up to the last step that was observed
        self.spikes = 0  # up to there
        self.checkpoint: CheckpointManifest | None = resume_from
        if resume_from is not None:
            state = self.state()
            self.checkpoint = resume_from = self.checkpoints.restore(state, resume_from, self.order)
            self.optimizer.load_state_dict({name: state[name] for name in self.optimizer.state_dict()})
            self.at = Position(resume_from.step, resume_from.next_sequence)
            self.loss, self.tokens_seen = resume_from.loss, resume_from.tokens_seen
            self.spikes = int(self.guard.spikes.found)
            self.tell_other_products(resume_from)
        elif parent is not None:
            self.branch_off(parent)
        elif config.training.initial_weights:
            import_weights(self.model, config, storage)
        self.checkpoints.collect_leftovers(self.at.step)
        self.step = Step(
            self.model, self.optimizer, self.guard, self.meshes, config.optimizer, self.device,
            gather_once=config.training.gather_once,
        )  # fmt: skip
        self.stopwatch = Stopwatch(self.device, self.meshes.exposed)
        self.profiler = Profiler(config, storage, self.rank, self.device)
        self.step.before_update = self.before_update
        self.step.before_repeat = lambda: self.stopwatch.enter("compute")
        self.collect: Callable[[int], None] = lambda step: None  # garbage, after each step
        self.recomputation: Recomputation | None = None
        if config.training.recompute_every is not None:
            self.recomputation = Recomputation(
                self.model, config.parallelism.ep, config.training.recompute_every, self.device
            )

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a restart needs, by name; sharing memory with the live ones."""
        return {**self.model.state_dict(), **self.optimizer.state_dict(), **self.guard.state()}

    def parent(self) -> CheckpointManifest | None:
        """Of a branch that has no checkpoint of its own: the one that it begins with."""
        if committed(self.storage, self.config.run_id):
            branch.release(self.config, self.storage)  # it may have died between its first commit and this
            return None
        return branch.begin(self.config, self.storage)

    def branch_off(self, parent: CheckpointManifest) -> None:
        """Begin as the parent was (branch.py)."""
        goes_on = self.config.training.start_position == "parent"
        guard = self.guard.state() if goes_on else {name: tensor.clone() for name, tensor in self.guard.state().items()}
        state = {**self.model.state_dict(), **self.optimizer.state_dict(), **guard}
        self.checkpoints.take_over(state, parent)
        self.optimizer.load_state_dict({name: state[name] for name in self.optimizer.state_dict()})
        if goes_on:
            self.at = Position(parent.step, parent.next_sequence)
            self.loss, self.tokens_seen = parent.loss, parent.tokens_seen
            self.spikes = int(
                self.guard.spikes.found
            )  # the parent's are behind: only the next one is a spike of this run
            self.tell_other_products(parent)

    def tell_other_products(self, before: CheckpointManifest) -> None:
        note = other_products(before.newton_schulz, self.optimizer.muon.multiplied)
        if note and self.rank == 0:
            log.warning("%s", note)

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()
        self.loader.close()
        self.checkpoints.close()

    def train(
        self,
        watchdog: Watchdog,
        report: Callable[[TrainProgress], None],
        on_checkpoint: Callable[[CheckpointManifest], None],
        should_stop: Callable[[], bool],
    ) -> TrainManifest:
        config, at, stopwatch = self.config, self.at, self.stopwatch
        logged = self.checkpoint.metrics if self.checkpoint is not None else ()
        files = MetricsFiles(self.storage, train_folder(config.run_id), at.step, logged) if self.rank == 0 else None
        world = self.meshes.world_size
        if self.rank == 0:
            attempt, gone_back = self.writer.number, len(self.left_out.detours)
            self.journal = Journal(
                self.storage, config.run_id, attempt, at.step, world, self.writer.check, gone_back=gone_back
            )
        slots = at.next_sequence * config.training.sequence_length
        flops = flops_per_token(config.model, config.training.sequence_length)
        pace = Pace(self.tokens_seen, slots, self.steps, config.schedule.total_tokens, flops, world * peak(self.device))
        times = TimesOfRanks(world)
        pending: PendingRecord | None = None

        def observe(record: PendingRecord, last: bool = False) -> StepRecord:
            seen = record.fetch(self.tokens_seen)
            times.add(seen.timed, seen.times)
            stopwatch.read(seen.step)
            if last:  # no step follows that would bring them
                values, steps = stopwatch.take()
                times.add(steps, self.step.share(values))
            self.tokens_seen = seen.tokens
            self.loss = seen.loss if math.isfinite(seen.loss) else self.loss
            check_skipped(seen.skipped_in_a_row, config.training.max_skipped_steps, seen.step)
            check_spikes(seen.spikes_in_a_row, config.training.spikes.stop_after, seen.step)
            if files and (seen.step % config.training.log_every == 0 or seen.step in (1, self.steps)):
                files.add(seen)
                now = pace.progress(seen, record.clock, self.checkpoints.committed_step, times.take())
                if self.journal is not None:
                    self.journal.add(seen, now)
                report(now)
            pace.stepped(seen, record.clock)
            spiked, self.spikes = seen.spikes > self.spikes, seen.spikes
            if spiked and config.training.spikes.action == "go_back":
                watchdog.enter("save", at.step)
                settle()
                self.go_back(seen)
            return seen

        def settle() -> None:
            manifest = self.checkpoints.settle()
            if manifest is not None:
                if self.checkpoint is None and config.training.start_from:
                    self.checkpoints.on_rank_0(lambda: branch.release(config, self.storage))
                self.checkpoint = manifest
                on_checkpoint(manifest)

        def write_metrics() -> tuple[FileEntry, ...]:
            self.writer.check()
            assert files is not None
            return files.write(at.step)

        stopwatch.begin()
        stop = False
        while at.step < self.steps and not stop:
            watchdog.enter("step", at.step + 1)
            record = self.advance(should_stop() or self.writer.lost)
            if pending is not None:
                stop = observe(pending).stop
            pending = record
            self.collect(at.step)
            if stop or self.is_due(at.step):
                last = stop or at.step == self.steps
                seen = observe(pending, last)  # waits for the device: a save copies the state anyway
                pending, stop = None, stop or seen.stop
                watchdog.enter("save", at.step)
                stopwatch.enter("save")
                if self.journal is not None:
                    self.journal.flush()
                settle()
                self.checkpoints.save(
                    self.state(),
                    step=at.step,
                    next_sequence=at.next_sequence,
                    tokens_seen=self.tokens_seen,
                    loss=self.loss,
                    skipped_steps=seen.skipped_steps,
                    left_out=self.left_out.ranges,
                    mesh=config.parallelism.model_dump(exclude={"elastic"}),
                    metrics=self.checkpoints.on_rank_0(write_metrics),
                    newton_schulz=self.optimizer.muon.multiplied,
                )
                stopwatch.enter("other")
        watchdog.enter("save", at.step)
        settle()
        assert self.checkpoint is not None
        assert self.checkpoint.step == at.step
        if at.step < self.steps:
            raise TrainingStopped(self.checkpoint)
        return self.finish()

    def is_due(self, step: int) -> bool:
        """Is a checkpoint taken after this step?"""
        return step % self.config.checkpoint.every_steps == 0 or step == self.steps or step in self.named

    def advance(self, stop: bool) -> PendingRecord:
        """Train on the next global batch."""
        at, training = self.at, self.config.training
        now = at_step(self.config.schedule, training.sequence_length, at.step)
        assert now.first_sequence == at.next_sequence, (now, at)
        shape = (now.first_sequence, now.sequences, training.micro_batch, training.document_mask)
        self.profiler.before(at.step + 1)
        self.stopwatch.enter("data")
        batch = read_step(self.loader, *shape, self.answers)
        self.stopwatch.enter("compute")
        check = self.recomputation
        recompute = partial(check, at.step + 1) if check is not None and check.is_due(at.step + 1) else None
        times, timed = self.stopwatch.take()
        values = self.step(batch, now.learning_rate, now.bias_rate, stop, recompute, times)
        at.step += 1
        self.stopwatch.lap(at.step)
        self.profiler.after(at.step)
        at.next_sequence += now.sequences
        slots = at.next_sequence * training.sequence_length
        return PendingRecord(
            at.step, slots, now.learning_rate, now.bias_rate, now.sequences, Fetch(values), time.monotonic(),
            timed, self.meshes.world_size,
        )  # fmt: skip

    def before_update(self) -> None:
        """The weights are about to change: a checkpoint that is being copied first."""
        self.stopwatch.enter("save")
        self.checkpoints.wait_staged()
        self.stopwatch.enter("optimizer")

    def go_back(self, spike: StepRecord) -> None:
        """Leave the data between an earlier checkpoint and the spike out. Raises WentBack, on all ranks, or RunDiverged."""
        config, wanted = self.config, spike.step - self.config.training.spikes.go_back_steps
        target = self.checkpoints.newest(self.order, below=wanted + 1)
        first = branch.first_sequence(config, self.storage) if target is None else target.next_sequence
        end = spike.slots // config.training.sequence_length
        begin, last = (int(position) for position in self.order.positions([first, end - 1]))
        detour = Detour(
            spike=spike.step,
            back_to=0 if target is None else target.step,
            left_out=(begin, last + 1),
            loss=spike.loss,
            gradient_norm=spike.gradient_norm,
        )

        def record() -> None:
            self.writer.check()
            decide(config, self.dataset, self.storage, self.left_out, detour)

        self.checkpoints.on_rank_0(record)
        raise WentBack

    def finish(self) -> TrainManifest:
        """Commit the run: its manifest names the last checkpoint."""

        def commit() -> TrainManifest:
            assert self.checkpoint is not None
            manifest = TrainManifest(
                identity=identity_digest(self.facts.identity),
                checkpoint=self.checkpoint,
                steps=self.steps,
                metrics=sound_files(self.storage, self.checkpoint.metrics),
                skipped_steps=int(self.guard.skipped),
            )
            self.writer.check()
            self.storage.write(f"{train_folder(self.config.run_id)}/manifest.json", manifest.to_json())
            return manifest

        manifest: TrainManifest = self.checkpoints.on_rank_0(commit)
        return manifest


def build(config: RunConfig, meshes: Meshes, device: torch.device) -> tuple[Moonlight, MoonlightOptimizer]:
    """The network and its optimizer on this rank, with initial weights."""
    with torch.device("meta"):
        model = Moonlight(config.model, aux_loss_weight=config.training.aux_loss_weight)
    shard_model(model, meshes, config.training, device)
    model.to_empty(device=device)
    model.reset_parameters(config.seed)
    model.train()
    rules = moonlight_rules(config.model, config.optimizer)
    return model, build_optimizer(model.named_parameters(), config.optimizer, rules)


def peak(device: torch.device) -> float:
    """FLOP/s of one processor by its data sheet, NaN where it is not known."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else math.nan


def import_weights(model: Moonlight, config: RunConfig, storage: Storage) -> None:
    """Fill the model from `training.initial_weights`. Raises ValueError for a folder that does not fit."""
    weights = config.training.initial_weights
    assert weights is not None
    if weights in initial.QUESTIONS:
        raise ValueError(f"training.initial_weights {weights}: ask initial.pin() which model that is, before training")
    initial.check(config, storage)
    folder, _ = initial.split(weights)
    if folder.startswith("s3://") or Path(folder).is_absolute():
        place, inside = Storage(storage.config.model_copy(update={"root": folder})), ""
    else:
        place, inside = storage, folder
    load_hf(model, inside, place, initial.manifest_in(place, inside))


def other_products(before: str, now: str) -> str:
    """A line if Newton-Schulz multiplied something else up to the checkpoint than it does here; '' if not."""
    if not before or before == now:
        return ""
    return (
        f"Newton-Schulz multiplies {now} here and multiplied {before} up to this checkpoint: losses go on, to other bits "
        f"than there (optimizer.muon.products)"
    )


def _ignore(_: CheckpointManifest) -> None:
    pass


def _never() -> bool:
    return False
