"""Padding of packed rows changes nothing: any documents, any padding, any row length, whoever holds which row."""

import json
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.model.moonlight import Moonlight
from pipeline.model.qk_clip import observe_max_logits, take_max_logits
from pipeline.model.router import update_router_bias
from pipeline.parallel.local import local_tensor
from pipeline.parallel.mesh import build_meshes
from pipeline.storage import Storage
from pipeline.training import trainer
from pipeline.training.batches import MicroBatch, StepBatch, labels_of
from pipeline.training.guard import Guard
from pipeline.training.step import Step
from pipeline.training.trainer import TrainingStopped, build
from tests.distributed import run_distributed
from tests.training.make import EOS, VOCABULARY, Watched, tiny

CPU = torch.device("cpu")
TOLERANCE = 1e-6


class Learnt(NamedTuple):
    loss: Tensor
    aux_loss: Tensor
    counts: list[Tensor]
    biases: list[Tensor]
    max_logits: Tensor
    gradients: dict[str, Tensor]


def network(mode: str = "none") -> Moonlight:
    model = Moonlight(tiny("none").model, aux_loss_weight=1.0)
    model.reset_parameters(3)
    with torch.no_grad():
        for _, router in model.routers():
            router.weight.mul_(20)  # loads that differ
    for block in model.layers:
        block.activation_checkpointing = mode
    observe_max_logits(model, True)
    return model


def texts(rows: list[list[int]], seed: int = 0) -> list[Tensor]:
    """Tokens of each row's documents, laid end to end; each document ends with EOS."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for lengths in rows:
        tokens = torch.randint(2, VOCABULARY, (sum(lengths),), generator=generator)
        tokens[torch.tensor(lengths, dtype=torch.int64).cumsum(0) - 1] = EOS
        found.append(tokens)
    return found


def learnt(model: Moonlight, loss: Tensor, aux_loss: Tensor) -> Learnt:
    (loss + aux_loss).backward()
    counts = {name: router.tokens_per_expert.clone() for name, router in model.routers()}
    update_router_bias(model, counts, 0.01)
    biases = [router.e_score_correction_bias.clone() for _, router in model.routers()]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Learnt(loss.detach(), aux_loss.detach(), list(counts.values()), biases, take_max_logits(model), gradients)


def alone(rows: list[list[int]], mask: bool) -> Learnt:
    """Every row by itself and as long as its text: there is no padding anywhere. Formulas of training/step.py by hand."""
    model, loss, aux_loss, labels = network(), torch.zeros(()), torch.zeros(()), 0
    full = [(lengths, tokens) for lengths, tokens in zip(rows, texts(rows)) if lengths]
    for lengths, tokens_S in full:
        labels_1S = labels_of(tokens_S[None], [lengths], mask)
        out = model(tokens_S[None], labels_1S, [lengths] if mask else None)
        loss, aux_loss, labels = loss + out.loss_sum, aux_loss + out.aux_loss / len(full), labels + int(out.num_tokens)
    return learnt(model, loss / max(labels, 1), aux_loss)


def packed(rows: list[list[int]], length: int) -> Tensor:
    tokens_BS = torch.full((len(rows), length), EOS)
    for row, tokens in enumerate(texts(rows)):
        tokens_BS[row, : len(tokens)] = tokens
    return tokens_BS


def together(rows: list[list[int]], mask: bool, length: int, mode: str) -> Learnt:
    model, tokens_BS = network(mode), packed(rows, length)
    labels_BS = labels_of(tokens_BS, rows, mask)
    out = model(tokens_BS, labels_BS, rows if mask else None, lengths=[sum(row) for row in rows])
    return learnt(model, out.loss_sum / out.num_tokens.clamp(min=1), out.aux_loss)


def assert_same(found: Learnt, expected: Learnt) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found.counts, expected.counts, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found.biases, expected.biases, strict=True))
    torch.testing.assert_close(found.loss, expected.loss, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(found.max_logits, expected.max_logits, rtol=1e-5, atol=1e-7)
    scale = max(float(gradient.norm()) for gradient in expected.gradients.values() if gradient is not None)
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).norm() <= TOLERANCE * gradient.norm() + 1e-8 * scale, name


documents = st.lists(st.integers(1, 9), max_size=4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(documents, min_size=1, max_size=4).filter(any),
    more=st.integers(0, 20),
    mask=st.booleans(),
    mode=st.sampled_from(["none", "selective", "full"]),
)
def test_padding_changes_nothing(rows, more, mask, mode):
    """Counts and biases bit for bit; rows without any text among them."""
    assert_same(together(rows, mask, max(map(sum, rows)) + more, mode), alone(rows, mask))


def test_every_text_slot_is_counted_and_no_other():
    rows = [[8], [3, 2], [], [1]]
    found = together(rows, False, 16, "none")
    assert [int(counts.sum()) for counts in found.counts] == [14 * 2]


def test_a_network_that_is_not_told_routes_every_slot():
    model = network()
    model(packed([[8]], 16))
    assert [int(router.tokens_per_expert.sum()) for _, router in model.routers()] == [16 * 2]


def test_lengths_that_do_not_fit_are_refused():
    model, tokens_BS = network(), packed([[4]], 8)
    for lengths, documents_of in ([9], None), ([4, 4], None), ([-1], None), ([5], [[4]]):
        with pytest.raises(ValueError, match=r"lengths: .* from 0 to 8"):
            model(tokens_BS, doc_lens=documents_of, lengths=lengths)


# -- the optimizer step ------------------------------------------------------------------------------------------------

ROWS = [[9, 7], [5], [], [3, 3, 2], [16], [1, 2], [], [6]]


def step_of(rows: list[list[int]], length: int, micro_batch: int, parallelism: dict[str, int], mask: bool) -> Any:
    """(figures, biases, weights before and after: what this rank holds) of one step on this rank's rows."""
    config = tiny("none", parallelism=parallelism, training__aux_loss_weight=1.0, optimizer={"qk_clip": 1e-4})
    meshes = build_meshes(config.parallelism, "cpu")
    model, optimizer = build(config, meshes, CPU)
    step = Step(model, optimizer, Guard(CPU), meshes, config.optimizer, CPU)
    rank = dist.get_rank() if dist.is_initialized() else 0
    mine = [
        row if (len(rows) // meshes.world_size) * rank <= at < (len(rows) // meshes.world_size) * (rank + 1) else None
        for at, row in enumerate(rows)
    ]
    kept = [at for at, row in enumerate(mine) if row is not None]
    tokens_BS = packed(rows, length)[kept]
    doc_lens = [rows[at] for at in kept]
    labels_BS = labels_of(tokens_BS, doc_lens, mask)
    micro_batches = [
        MicroBatch(
            tokens_BS[at : at + micro_batch],
            labels_BS[at : at + micro_batch],
            [sum(row) for row in doc_lens[at : at + micro_batch]],
            doc_lens[at : at + micro_batch] if mask else None,
        )
        for at in range(0, len(kept), micro_batch)
    ]
    figures = step(StepBatch(micro_batches, int((labels_BS != -100).sum())), 0.01, 0.01, False)
    biases = [router.e_score_correction_bias.tolist() for _, router in model.routers()]
    head = local_tensor(model.lm_head.weight).detach().flatten().tolist()
    return figures.tolist(), biases, head


@pytest.mark.parametrize("mask", [False, True])
def test_a_step_is_the_same_for_any_row_length_and_micro_batch(mask):
    expected = step_of(ROWS, 16, 8, {}, mask)
    assert expected[0][3] == sum(sum(row) - 1 for row in ROWS if row) - mask * sum(len(row) - 1 for row in ROWS if row)
    for length, micro_batch in (16, 1), (24, 8), (40, 2):
        found = step_of(ROWS, length, micro_batch, {}, mask)
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert found[1] == expected[1]
        assert found[2] == pytest.approx(expected[2], rel=1e-4, abs=1e-6)


def test_a_rank_whose_rows_are_all_padding_takes_part():
    """Two ranks, experts spread over them, the second without a token."""
    rows = [[9, 7], [5], [3, 3], [16], [], [], [], []]
    figures, biases, head = step_of(rows, 16, 8, {}, False)
    ranks = run_distributed(step_of, 2, rows, 16, 2, {"shard": 2, "ep": 2}, False)
    for found in ranks:
        assert found[0] == pytest.approx(figures, rel=1e-5)
        assert found[1] == biases
    assert [*ranks[0][2], *ranks[1][2]] == pytest.approx(head, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("mask", [False, True])
def test_tokens_that_are_reported_are_labels_trained_on(tmp_path, monkeypatch, mask):
    """Over a restart; the position, by which schedules go, counts slots."""
    labels = []
    read = trainer.read_step
    monkeypatch.setattr(trainer, "read_step", lambda *args: labels.append(read(*args)) or labels[-1])
    watched = Watched()
    config = tiny(str(tmp_path), steps=6, training__document_mask=mask)
    with pytest.raises(TrainingStopped):
        watched.train(config, should_stop=lambda: len(labels) >= 3)
    manifest = watched.train(config)
    counts = [batch.labels for batch in labels]
    seen = [sum(counts[:step]) for step in range(1, 7)]
    assert [progress.tokens for progress in watched.progress] == seen
    assert manifest.checkpoint.tokens_seen == seen[-1] < 6 * 8 * 16
    storage = Storage(config.storage)
    lines = [json.loads(line) for entry in manifest.metrics for line in storage.read(entry.path).splitlines()]
    assert [(line["slots"], line["tokens"]) for line in lines] == [(step * 128, seen[step - 1]) for step in range(1, 7)]


def test_a_step_that_is_skipped_trains_on_nothing():
    config = tiny("none")
    model, optimizer = build(config, build_meshes(config.parallelism, "cpu"), CPU)
    step = Step(model, optimizer, Guard(CPU), build_meshes(config.parallelism, "cpu"), config.optimizer, CPU)
    bad = torch.tensor(torch.nan)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert step.update(bad, bad, torch.tensor(50), 0.01, 0.01, False)[3] == 0
