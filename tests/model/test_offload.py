"""Activations that wait on the host change memory, never bits."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.model import offload
from pipeline.model.moonlight import Moonlight
from pipeline.model.offload import Offload
from tests.model.oracle import random_model, small_config

LAYERS = 5


@pytest.fixture(autouse=True)
def everything_is_worth_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 1)


def network(mode: str = "none", *, offloaded: bool = True) -> Moonlight:
    model = random_model(small_config().model_copy(update={"num_hidden_layers": LAYERS}), aux_loss_weight=1e-2)
    shared = Offload(torch.device("cpu"), LAYERS) if offloaded else None
    for block in model.layers:
        block.activation_checkpointing = mode
        block.offload = shared
    return model


def step(model: Moonlight, doc_lens: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Two micro-batches, and a pass without gradients between them."""
    loss = torch.zeros(())
    for seed in (0, 1):
        ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(seed))
        out = model(ids, ids, doc_lens)
        (out.loss_sum + out.aux_loss).backward()
        loss += out.loss_sum.detach()
        with torch.no_grad():
            model(ids, ids, doc_lens)
    return loss, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("doc_lens", [None, [[10, 14], [3, 8, 9]]])
def test_the_same_bits(mode: str, doc_lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    send = Offload._send
    monkeypatch.setattr(Offload, "_send", lambda *given: copies.append(given[1].nbytes) or send(*given))
    loss, gradients = step(network(mode, offloaded=False), doc_lens)
    assert not copies
    same_loss, same = step(network(mode), doc_lens)
    assert torch.equal(same_loss, loss)
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)
    assert len(copies) >= 2 * (LAYERS - 2)
    if mode == "full":
        assert len(copies) == 2 * (LAYERS - 2)  # the input of each block, and nothing else


class Slot(offload._Slot):
    known: weakref.WeakSet[Slot] = weakref.WeakSet()

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.known.add(self)


def on_device(model: Moonlight) -> list[int]:
    """Bytes of offloaded storages that the device holds: after each block's forward, then after each block's backward."""
    held: list[int] = []

    def note(*_: Any) -> None:
        held.append(sum(slot.device.nbytes for slot in Slot.known if slot.device is not None))

    hooks = []
    for block in model.layers:
        hooks.append(block.register_forward_hook(note))
        hooks.append(block.register_full_backward_hook(note))
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    out = model(ids, ids)
    out.loss_sum.backward()
    for hook in hooks:
        hook.remove()
    del out
    note()
    return held


def test_at_most_two_blocks_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at work, and one that leaves or comes: when a block is through, forward or backward, one of the two is gone."""
    monkeypatch.setattr(offload, "_Slot", Slot)
    held = on_device(network())
    first_dense, mixture = held[0], held[1]  # each alone: the one before has left
    assert min(first_dense, mixture) > 0
    assert held[LAYERS - 2] == held[LAYERS - 1] == 0  # the last two stay, and all that was sent has left
    assert held[LAYERS : LAYERS + 4] == [0, mixture, mixture, first_dense]  # the one before has come
    assert held[-1] == 0


def test_shared_tables_and_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    send = Offload._send
    monkeypatch.setattr(Offload, "_send", lambda *given: sent.append(given[1].untyped_storage()._cdata) or send(*given))
    model = network()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    out = model(ids, ids)
    assert sent
    assert not weights & set(sent)
    out.loss_sum.backward()


def test_a_view_comes_back_with_its_strides_and_a_storage_travels_once() -> None:
    """Of one storage: a slice, a transpose and another dtype; and once more after it has been written to."""
    shared = Offload(torch.device("cpu"), 3)
    group = offload._Group()
    pack = shared._packing(group, set())
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    views = [base, base[1:4, 2:5], base.t(), base.view(torch.int32), base[:, 0]]
    expected = [view.clone() for view in views]
    packed = [pack(view) for view in views]
    assert len(group.slots) == 1
    base.mul_(2)
    again = pack(base)
    assert len(group.slots) == 2
    group.saving.clear()
    shared._leave(group)
    for view, saved, value in zip(views, packed, expected, strict=True):
        found = shared._unpack(saved)
        assert (found.shape, found.stride(), found.dtype) == (view.shape, view.stride(), view.dtype)
        assert torch.equal(found, value)
        assert found.untyped_storage().data_ptr() != base.untyped_storage().data_ptr()
    assert torch.equal(shared._unpack(again), base)
    assert pack(torch.empty(0)).numel() == 0
