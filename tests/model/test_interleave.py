"""The two halves of a micro-batch in turn: the order of work, and the numbers of the whole."""

import pytest
import torch

from pipeline.model.interleave import in_turn
from tests.model.oracle import random_model, small_config
from tests.training.make import tiny

DOCUMENTS = [[10, 14], [3, 8, 9], [24], [5]]


def test_each_runs_to_its_next_pause_in_turn():
    done = []

    def work(name, pauses):
        for number in range(pauses):
            done.append((name, number))
            yield
        return name

    assert in_turn(work("a", 2), work("b", 0), work("c", 3)) == ["a", "b", "c"]
    assert done == [("a", 0), ("c", 0), ("a", 1), ("c", 1), ("c", 2)]


def step(interleave, mode, doc_lens, lengths):
    model = random_model(small_config(), aux_loss_weight=1e-2)
    model.interleave = interleave
    for block in model.layers:
        block.activation_checkpointing = mode
    ids = torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(0))
    out = model(ids, ids, doc_lens, lengths=lengths)
    (out.loss_sum + out.aux_loss).backward()
    counts = [router.tokens_per_expert.clone() for _, router in model.routers()]
    return out, {name: p.grad for name, p in model.named_parameters()}, counts


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("doc_lens", "lengths"), [(None, None), (DOCUMENTS, None), (None, [24, 7, 0, 13]), (None, [24, 3, 0, 0])]
)
def test_the_step_of_the_whole(mode, doc_lens, lengths):
    """Also where one half has less text than the other one, or none: the balance loss is the mean over rows with text."""
    plain, gradients, counts = step(False, "none", doc_lens, lengths)
    out, same, recounted = step(True, mode, doc_lens, lengths)
    torch.testing.assert_close(out.loss_sum, plain.loss_sum, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.aux_loss, plain.aux_loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        assert (same[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-12, name
    for once, again in zip(counts, recounted, strict=True):
        assert torch.equal(once, again)


def test_only_training_takes_turns():
    """An evaluation has any number of rows."""
    model = random_model(small_config())
    ids = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(0))
    expected = model.eval()(ids)
    model.interleave = True
    assert torch.equal(model(ids), expected)


@pytest.mark.parametrize(("micro_batch", "parallelism"), [(1, {"shard": 2, "ep": 2}), (2, {"shard": 2})])
def test_what_it_needs(tmp_path, micro_batch, parallelism):
    with pytest.raises(ValueError, match=r"training\.interleave"):
        tiny(str(tmp_path), training__interleave=True, training__micro_batch=micro_batch, parallelism=parallelism)
