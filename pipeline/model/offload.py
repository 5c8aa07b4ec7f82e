"""Activations wait in the host's memory for their backward pass (`training.offload_activations`).

What autograd saves in a block goes to the host while the next block computes, and comes back while the block behind it is
differentiated, on two streams of their own, so that both directions of the bus are used beside kernels. A block's memory on
the device is free one block later; where the bus is slower than the blocks the device waits for it, rather than hold more.
Backward needs the last two blocks at once: they stay.

What moves is a storage, whole and once, whatever views of it are saved: bits come back as they were, and views with their
strides. What stays: storages below LEAST bytes, weights, and the tables that all blocks share. With full checkpointing that is a
block's input, the best bargain; without checkpointing everything. Selective checkpointing keeps products inside of its own
pieces, out of autograd's sight, and these stay.

On a CPU the same copies are made and nothing is gained: for tests.

Source: Rajbhandari et al., ZeRO-Infinity, arXiv 2104.07857, section 5; `torch.autograd.graph.save_on_cpu` does the same on the
stream that computes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

LEAST = 1024 * 1024  # bytes of a storage that is worth a copy
STAY = 2  # blocks, the last ones

Out = TypeVar("Out")


class _Slot:
    """A storage as a flat tensor: on the device, on the host, or on both while it is copied."""

    def __init__(self, group: _Group, device: Tensor, host: Tensor) -> None:
        self.group, self.host = group, host
        self.device: Tensor | None = device


class _Saved(NamedTuple):
    """What autograd holds in place of a tensor. The slot goes with the last one."""

    slot: _Slot
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Group:
    """The slots of one block in one pass."""

    def __init__(self) -> None:
        self.slots: list[weakref.ref[_Slot]] = []
        self.saving: dict[tuple[int, int], _Slot] = {}  # by storage and version, while the block is at work
        self.sent: Any = None  # event: all copies to the host are made
        self.came: Any = None  # event: all copies from it are made, and nobody has waited yet

    def live(self) -> list[_Slot]:
        return [slot for ref in self.slots if (slot := ref()) is not None]


class Offload:
    """Of the blocks of one network on one device."""

    def __init__(self, device: torch.device, blocks: int) -> None:
        self._blocks = blocks
        self._device = device
        self._streams: Any = torch.get_device_module(device)
        self._out, self._back = self._streams.Stream(), self._streams.Stream()
        self._newest: _Group | None = None

    def run(
        self, index: int, forward: Callable[[], Out], result: Callable[[Out], Tensor], shared: Iterable[Tensor]
    ) -> Out:
        """`forward()` of block `index`; `result` of it is what its gradient reaches first. `shared`: tensors that stay."""
        before = self._newest if index else None
        group = None
        if index < self._blocks - STAY:
            group = _Group()
            with saved_tensors_hooks(self._packing(group, {_storage(tensor) for tensor in shared}), self._unpack):
                out = forward()
            group.saving.clear()  # autograd keeps the hooks, and with them whatever they refer to
            group.sent = self._out.record_event()
        else:
            out = forward()
        if before is not None:
            self._leave(before)
        self._newest = group
        coming = [each for each in (group, before) if each is not None]
        if coming and result(out).requires_grad:
            result(out).register_hook(lambda _: self._bring(coming))
        return out

    def _packing(self, group: _Group, stay: set[int]) -> Callable[[Tensor], Any]:
        def pack(tensor: Tensor) -> Any:
            if not self._moves(tensor) or _storage(tensor) in stay:
                return tensor
            key = _storage(tensor), tensor._version
            slot = group.saving.get(key)
            if slot is None:
                slot = group.saving[key] = self._send(tensor, group)
            return _Saved(slot, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

        return pack

    def _moves(self, tensor: Tensor) -> bool:
        return (
            not isinstance(tensor, DTensor)
            and tensor.device.type == self._device.type
            and tensor.layout == torch.strided
            and tensor.untyped_storage().nbytes() >= LEAST
        )

    def _send(self, tensor: Tensor, group: _Group) -> _Slot:
        count = tensor.untyped_storage().nbytes() // tensor.itemsize
        flat = tensor.detach().as_strided((count,), (1,), 0)
        host = torch.empty(count, dtype=tensor.dtype, pin_memory=self._device.type == "cuda")
        self._out.wait_event(self._streams.current_stream().record_event())
        with self._streams.stream(self._out):
            host.copy_(flat, non_blocking=True)
        slot = _Slot(group, flat, host)
        group.slots.append(weakref.ref(slot))
        return slot

    def _leave(self, group: _Group) -> None:
        """What is queued from here on may take the group's memory on the device."""
        self._streams.current_stream().wait_event(group.sent)
        for slot in group.live():
            slot.device = None

    def _bring(self, groups: Iterable[_Group]) -> None:
        """Queue copies to the device of what has left it, for memory that what is queued so far has done with."""
        for group in groups:
            gone = [slot for slot in group.live() if slot.device is None]
            if not gone:
                continue
            for slot in gone:
                slot.device = torch.empty_like(slot.host, device=self._device)
            self._back.wait_event(self._streams.current_stream().record_event())
            with self._streams.stream(self._back):
                for slot in gone:
                    assert slot.device is not None
                    slot.device.copy_(slot.host, non_blocking=True)
            group.came = self._back.record_event()

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Saved):
            return saved
        slot, group = saved.slot, saved.slot.group
        if slot.device is None:
            self._bring([group])
        if group.came is not None:
            self._streams.current_stream().wait_event(group.came)
            group.came = None
        assert slot.device is not None
        flat = slot.device if slot.device.dtype == saved.dtype else slot.device.view(saved.dtype)
        return flat.as_strided(saved.size, saved.stride, saved.offset)


def _storage(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage()._cdata
