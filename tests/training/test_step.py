"""The optimizer step: what a bad gradient may not do, what the host may not wait for, and what the loss is."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.manifest import DatasetManifest
from pipeline.model import row_products
from pipeline.model.hf import hf_tensors
from pipeline.parallel.local import local_tensor
from pipeline.storage import Storage
from pipeline.training import trainer
from pipeline.training.batches import read_step
from pipeline.training.guard import RunDiverged
from pipeline.training.step import Step
from pipeline.training.trainer import Run
from tests.distributed import run_distributed
from tests.training.make import Watched, tiny, tiny_dataset

PARALLELISM = {1: {}, 2: {"shard": 2, "ep": 2}}


def build(root: str, dataset: DatasetManifest, world: int, **overrides) -> Run:
    config = tiny(root, parallelism=PARALLELISM[world], **overrides)
    return Run(config, dataset, Storage(config.storage))


def held(run: Run) -> dict[str, Tensor]:
    """A copy of what this rank holds, the guard's own counters aside."""
    return {name: local_tensor(t).clone() for name, t in run.state().items() if not name.startswith("guard.")}


def poison(run: Run, rank: int, value: float) -> None:
    """The next step finds `value` in one element of one gradient of one rank."""
    backward = run.step.forward_backward

    def poisoned(*args):
        result = backward(*args)
        if (dist.get_rank() if dist.is_initialized() else 0) == rank:
            gradient = local_tensor(run.model.layers[1].mlp.experts.up_proj.grad)
            gradient.view(-1)[3] = value
        run.step.forward_backward = backward
        return result

    run.step.forward_backward = poisoned


def skipped(root: str, dataset: DatasetManifest, world: int, value: float) -> None:
    run = build(root, dataset, world)
    for _ in range(2):
        before = run.advance(False).fetch()
    poison(run, world - 1, value)
    state = held(run)
    bad = run.advance(False).fetch()
    after = held(run)
    changed = [name for name in state if not torch.equal(state[name], after[name])]
    assert changed == []
    assert (before.skipped_steps, bad.skipped_steps, bad.skipped_in_a_row) == (0, 1, 1)
    assert (run.at.step, run.at.next_sequence) == (3, 24)  # the batch is passed over

    good = run.advance(False).fetch()
    assert (good.skipped_steps, good.skipped_in_a_row) == (1, 0)
    assert good.loss < before.loss + 0.5
    moved = [name for name, tensor in held(run).items() if not torch.equal(tensor, after[name])]
    assert {
        name for name, _ in run.model.named_parameters() if local_tensor(run.model.get_parameter(name)).numel()
    } <= set(moved)
    run.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_gradient_changes_nothing(tmp_path, value):
    skipped(str(tmp_path), tiny_dataset(Storage(tiny(str(tmp_path)).storage)), 1, value)


def test_one_bad_gradient_on_one_rank_changes_nothing_anywhere(tmp_path):
    dataset = tiny_dataset(Storage(tiny(str(tmp_path)).storage))
    run_distributed(skipped, 2, str(tmp_path), dataset, 2, float("nan"))


class NoHostReads(TorchDispatchMode):
    """Fails where a value goes from a tensor to Python, which on a GPU would stop the host until the device is there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default), func
        assert func is not torch.ops.aten.nonzero.default, "the size of the result is a host read"
        return func(*args, **(kwargs or {}))


def test_the_host_never_waits(tmp_path, monkeypatch):
    """Forward, backward, guard, clipping, optimizer and router bias of a step without a read; then the check's own check.

    The CPU's grouped product walks its offsets in Python (pipeline/model/grouped.py); CUDA's does not.
    """
    run = build(str(tmp_path), tiny_dataset(Storage(tiny(str(tmp_path)).storage)), 1)
    run.advance(False)
    reads = []

    def watch(name: str) -> None:
        original = getattr(Tensor, name)

        def read(self: Tensor, *args):
            reads.append(Path(sys._getframe(1).f_code.co_filename).name)
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, read)

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
        watch(name)
    batch = read_step(run.loader, 8, 8, 2, False)
    reads.clear()
    with NoHostReads():
        values = run.step(batch, 0.01, 0.01, False)
    assert set(reads) == {"grouped.py"}
    with pytest.raises(AssertionError), NoHostReads():
        values[0].item()
    run.close()


def test_too_many_in_a_row_stop_the_run(tmp_path, monkeypatch):
    original = Step.forward_backward
    monkeypatch.setattr(
        Step, "forward_backward", lambda self, *args: tuple(value * torch.nan for value in original(self, *args))
    )
    watched = Watched()
    with pytest.raises(RunDiverged, match=r"the last 3 steps had a non-finite loss"):
        watched.train(tiny(str(tmp_path), steps=8, training__max_skipped_steps=3))
    assert [progress.step for progress in watched.progress] == [1, 2]


def test_the_loss_is_the_mean_over_valid_tokens(tmp_path):
    """Against cross_entropy on the logits of the same network, over rows with different amounts of padding."""
    run = build(str(tmp_path), tiny_dataset(Storage(tiny(str(tmp_path)).storage)), 1, training__aux_loss_weight=0.0)
    micro = read_step(run.loader, 0, 8, 8, False).micro_batches[0]
    with torch.no_grad():
        logits = run.model(micro.tokens_BS)
    expected = F.cross_entropy(logits.flatten(0, 1), micro.labels_BS.flatten(), ignore_index=-100)
    counts = (micro.labels_BS != -100).sum(1)
    assert counts.min() < counts.max()
    assert run.advance(False).fetch().loss == pytest.approx(expected.item(), rel=1e-6)
    run.close()


def test_a_step_without_labels_is_no_perfect_one(tmp_path, monkeypatch):
    """It is skipped and counted, its loss is unknown and not 0, and neither decay nor momentum moves a weight."""
    read = trainer.read_step

    def silent(*args):
        batch = read(*args)
        for micro in batch.micro_batches:
            micro.labels_BS.fill_(-100)
        return replace(batch, labels=0)

    run = build(str(tmp_path), tiny_dataset(Storage(tiny(str(tmp_path)).storage)), 1)
    run.advance(False).fetch()
    before = held(run)
    monkeypatch.setattr(trainer, "read_step", silent)
    found = run.advance(False).fetch()
    assert math.isnan(found.loss)
    assert (found.skipped_steps, found.skipped_in_a_row) == (1, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in held(run).items())
    run.close()


def test_a_network_without_experts(tmp_path):
    """Dense layers only: nothing to balance, no rule for experts, no loads to report."""
    watched = Watched()
    watched.train(tiny(str(tmp_path), model__first_k_dense_replace=2))
    assert watched.losses[-1] < watched.losses[0]
    assert math.isnan(watched.progress[-1].expert_load)


def test_starts_from_published_weights(tmp_path):
    """Another seed, the weights of a Hugging Face folder: the run begins where the exported network stands."""
    dataset = tiny_dataset(Storage(tiny(str(tmp_path)).storage))
    source = build(str(tmp_path), dataset, 1)
    (tmp_path / "hf").mkdir()
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in hf_tensors(source.model)},
        tmp_path / "hf/model.safetensors",
    )
    source.close()
    for folder in (str(tmp_path / "hf"), "hf"):  # a local path, or one below the storage root
        run = build(str(tmp_path), dataset, 1, seed=7, training__initial_weights=folder)
        assert torch.equal(run.model.lm_head.weight, source.model.lm_head.weight)
        assert run.at.step == 0
        run.close()


def casts_in_a_step(root: str, dataset: DatasetManifest, kept: bool) -> tuple[int, int]:
    """How often this rank casts a stack of experts from its fp32 masters in a step of four micro-batches, and how often from there to fp8."""
    options = {"training__micro_batch": 1, "training__compute_dtype": "bf16", "training__expert_products": "fp8"}
    run = build(root, dataset, 2, **options)
    stack = local_tensor(run.model.layers[1].mlp.experts.up_proj).numel()

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            to = (kwargs or {}).get("dtype")
            if func.__name__.startswith("_to_copy") and to == torch.bfloat16 and args[0].shape == (stack,):
                self.count += 1
            return func(*args, **(kwargs or {}))

    quantised = row_products.quantised_stacks
    to_fp8 = mock.Mock(side_effect=lambda stacks, **options: quantised(stacks, **options))
    if not kept:
        run.step.whole = run.step.copies = []
    with Casts() as casts, mock.patch.object(row_products, "quantised_stacks", to_fp8):
        run.advance(False).fetch()
    run.close()
    return casts.count, sum(len(call.args[0]) for call in to_fp8.call_args_list)


def test_whole_experts_are_cast_once_a_step(tmp_path):
    dataset = tiny_dataset(Storage(tiny(str(tmp_path)).storage))
    stacks, passes, micro_batches = 3, 2, 4
    once, often = stacks, stacks * passes * micro_batches
    # to fp8 for forward, and the other way round for backward
    assert run_distributed(casts_in_a_step, 2, str(tmp_path), dataset, True) == [(once, passes * once)] * 2
    assert run_distributed(casts_in_a_step, 2, str(tmp_path), dataset, False) == [(often, often)] * 2
