"""Writes down every operator that would be a kernel, and counts the device's memory, byte by byte.

A dispatch mode below FSDP2, autograd and DTensor sees the operators that a device would be given. From shapes and dtypes
follow FLOPs (PyTorch's own counter, and ours for our operators) and bytes read and written. Operators that only look
at memory otherwise (views) or take it (empty) are no kernels.

Memory is that of storages, in units of the caching allocator's 512 bytes: a storage counts from the operator that made
it until Python and autograd have dropped it, or FSDP2 has shrunk it to nothing. How a real allocator wastes is not known
here.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from pipeline.rehearsal.device import NAME, Group
from pipeline.rehearsal.tape import HostWait, Kernel, Tape

UNIT = 512  # bytes
TO_HOST, FROM_HOST = "copy to host", "copy from host"


@dataclass(frozen=True)
class Holder:
    """What has taken memory, and when."""

    what: str  # shape and dtype
    phase: str
    where: str


class Memory:
    """Bytes allocated on the device now and at most, and who holds them. `limit`: bytes that the device has."""

    def __init__(self, tape: Tape, limit: int | None = None) -> None:
        self.tape, self.limit = tape, limit
        self.now = 0
        self.peak = 0
        self.by_phase: dict[str, int] = {}  # peaks
        self.too_much: tuple[Holder, int] | None = None  # the first allocation that the limit has no room for
        self._size: dict[int, int] = {}
        self._holders: dict[int, Holder] = {}
        self._history: list[tuple[int, int]] = []  # (storage, its size from now on)
        self._at_peak = 0  # entries of the history up to the peak
        self._numbers = WeakIdKeyDictionary()  # storage -> number

    def number(self, tensor: Tensor) -> int:
        """Of a tensor's storage, which counts as allocated from when it is first seen."""
        storage = tensor.untyped_storage()
        found: int | None = self._numbers.get(storage)
        if found is None:
            self._numbers[storage] = found = self.tape.number()
            if tensor.device.type == NAME:
                what = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
                self._holders[found] = Holder(what, self.tape.phase, self.tape.where)
                self._resize(found, storage.nbytes())
                weakref.finalize(storage, self._resize, found, 0)
        return found

    def resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 gives gathered weights back by shrinking their storages."""
        number = self._numbers.get(storage)
        if number in self._holders:
            self._resize(number, storage.nbytes())

    def held_at_peak(self) -> list[tuple[Holder, int]]:
        """(who, bytes), the largest first."""
        sizes = dict(self._history[: self._at_peak])
        found = [(self._holders[number], size) for number, size in sizes.items() if size]
        return sorted(found, key=lambda item: -item[1])

    def _resize(self, number: int, size: int) -> None:
        size = -(-size // UNIT) * UNIT
        self.now += size - self._size.get(number, 0)
        self._size[number] = size
        self._history.append((number, size))
        self.by_phase[self.tape.phase] = max(self.by_phase.get(self.tape.phase, 0), self.now)
        if self.now > self.peak:
            self.peak, self._at_peak = self.now, len(self._history)
        if self.limit is not None and self.now > self.limit and self.too_much is None:
            self.too_much = self._holders[number], size


class Recorder(TorchDispatchMode):
    """`filled`: of buffers that have room for so many rows, how many hold one; kernels that know see no others."""

    def __init__(self, tape: Tape, memory: Memory, filled: Mapping[int, int] | None = None) -> None:
        super().__init__()
        self.tape, self.memory, self.filled = tape, memory, filled or {}
        self._shrink = torch.UntypedStorage.resize_

    def __enter__(self) -> Recorder:
        memory, shrink = self.memory, self._shrink

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            shrink(storage, size)
            memory.resized(storage)
            return storage

        torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment,method-assign]
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        torch.UntypedStorage.resize_ = self._shrink  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local tensors come by
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == NAME:
            self.tape.add(HostWait("item", self.tape.stream, self.tape.phase, self.tape.where))
        if func is torch.ops.symm_mem.all_to_all_vdev.default:
            self._write_all_to_all(*args)
            return None
        out = func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        on_device = [t for t in (*inputs, *outputs) if t.device.type == NAME]
        if on_device:
            self._write(func, args, kwargs, out, inputs, outputs)
        return out

    def _write(self, func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        known = {self.memory.number(t): t for t in inputs}
        changed = _changed(func, args, kwargs)
        made = [t for t in outputs if self.memory.number(t) not in known]
        if func in _TAKES_MEMORY or not (made or changed):
            return
        if func in _COPIES and len({tensor.device.type for tensor in (*inputs, *outputs)}) == 2:
            self._write_host_copy(next(t for t in (*inputs, *outputs) if t.device.type == NAME), changed or made)
            return
        seen = self._seen if func._schema.name in _SEE_WHAT_IS_FILLED else _size
        writes = [(self.memory.number(t), seen(t)) for t in (*made, *changed)]
        overwrites = func in _OVERWRITES or func._schema.name.endswith("_into")
        taken = {number for number, _ in writes} if overwrites else set()
        gathered = sum(map(_size, outputs)) if func in _GATHERS else None
        reads = [
            (self.memory.number(t), seen(t) if gathered is None else min(_size(t), gathered))
            for t in inputs
            if self.memory.number(t) not in taken
        ]
        reads *= 2 if func._schema.name in _READ_TWICE else 1
        self.tape.add(
            Kernel(
                func._schema.name.split("::")[1],
                kind_of(func, inputs),
                self.tape.stream,
                self.tape.phase,
                self.tape.where,
                self._flops(func, args, kwargs, out),
                tuple(reads),
                tuple(writes),
            )
        )

    def _write_all_to_all(self, sent: Tensor, arriving: Tensor, splits_W: Tensor, pad_2W: Tensor, group: str) -> None:
        """An even share of the rows that are there goes to each rank, on the stream that launches it."""
        names = dist.distributed_c10d._world.pg_names
        wire = next(each for each, name in names.items() if name == group)
        assert isinstance(wire, Group)
        wire.device_all_to_all(sent, self.filled[sent.shape[0]] // wire.size())

    def _write_host_copy(self, on_device: Tensor, written: list[Tensor]) -> None:
        """What goes over the bus: counted once, where it is on the device."""
        side = ((self.memory.number(on_device), _size(on_device)),)
        back = written[0].device.type == NAME
        name, reads, writes = (FROM_HOST, (), side) if back else (TO_HOST, side, ())
        at = self.tape
        at.add(Kernel(name, "host_copy", at.stream, at.phase, at.where, 0, reads, writes))

    def _seen(self, tensor: Tensor) -> int:
        """Bytes of the rows that are filled."""
        size = _size(tensor)
        rows = tensor.shape[0] if tensor.dim() else 0
        return size * self.filled[rows] // rows if rows in self.filled else size

    def _flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> int:
        flops = flops_of(func, args, kwargs, out)
        name = func._schema.name
        rows = (
            args[-2 if "bag_sums" in name else 0].shape[0] if name in _SEE_WHAT_IS_FILLED else 0
        )  # of a sum, the places
        return flops * self.filled[rows] // rows if rows in self.filled else flops


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor that lie in memory: what is repeated by a stride of 0 counts once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride()):
        count *= 1 if stride == 0 else length
    return count * tensor.element_size()


@functools.cache
def _mutable_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _changed(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    found = []
    for index, name in _mutable_arguments(func):
        value = args[index] if index < len(args) else kwargs.get(name)
        found += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return found


def kind_of(func: Any, inputs: list[Tensor]) -> str:
    """The rate that an operator goes by."""
    name = func._schema.name.split("::")[1]
    if name == "grouped_fp8":
        return "grouped_fp8"
    if name in ("grouped_rows", "grouped_outer", "_grouped_mm", "_scaled_grouped_mm"):
        return "grouped"
    if name in ("rehearsed_attention", "_varlen_attn"):
        return "attention_forward"
    if name in ("rehearsed_attention_backward", "_varlen_attn_backward"):
        return "attention_backward"
    if name in _PRODUCTS:
        return "matmul_fp32" if all(x.dtype == torch.float32 for x in inputs) else "matmul"  # a sum may be fp32
    return "own" if func.namespace == "moonlight" else "memory"


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    name = func._schema.name
    if name in _FLOPS:
        return _FLOPS[name](*args)
    counter = flop_registry.get(func._overloadpacket)
    return 0 if counter is None else int(counter(*args, **kwargs, out_val=out))


def _grouped_rows(x_MI: Tensor, weight_eOI: Tensor, *_: Any) -> int:
    return 2 * x_MI.shape[0] * weight_eOI.shape[-1] * weight_eOI.shape[-2]


def _grouped_fp8(x_MK: Tensor, _: Tensor, weight_eNK: Tensor, *__: Any) -> int:
    return 2 * x_MK.numel() * weight_eNK.shape[1]


def _quantised_rows(x_RK: Tensor, row_M: Tensor | None, *_: Any) -> int:
    """The largest of a tile, the product with its scale, and the rounding."""
    return 12 * (x_RK if row_M is None else row_M).shape[0] * x_RK.shape[1]


def _quantised_stacks(stacks: list[Tensor], _: bool) -> int:
    return 12 * sum(stack.numel() for stack in stacks)


def _grouped_outer(grad_MO: Tensor, x_MI: Tensor, *_: Any) -> int:
    return 2 * grad_MO.shape[0] * grad_MO.shape[1] * x_MI.shape[1]


def _addmm(_: Tensor, x_MI: Tensor, y_IO: Tensor, *__: Any, **___: Any) -> int:
    """PyTorch's counter does not take the overload that says the dtype of the sum."""
    return 2 * x_MI.numel() * y_IO.shape[1]


def _linear_backward(grad: Tensor, x: Tensor, weight_OI: Tensor) -> int:
    return 4 * grad.numel() * weight_OI.shape[-1]


def _linear(x: Tensor, weight_OI: Tensor) -> int:
    return 2 * x.numel() * weight_OI.shape[0]


def _attention(q_BHSQ: Tensor, k_BHSQ: Tensor, v_BHSV: Tensor, *_: Any) -> int:
    B, H, S, Q = q_BHSQ.shape
    return B * H * S * S * (Q + v_BHSV.shape[-1])  # causal: half of 2 * 2 * S^2 * width


def _attention_backward(grad: Tensor, q_BHSQ: Tensor, k: Tensor, v_BHSV: Tensor, *_: Any) -> int:
    return 5 * _attention(q_BHSQ, k, v_BHSV) // 2


def _swiglu(gate_MF: Tensor, *_: Any) -> int:
    """An exponent and a division count as one each, as any operation of a kernel of our own."""
    return 6 * gate_MF.numel()


def _swiglu_backward(grad_MF: Tensor, *_: Any) -> int:
    return 16 * grad_MF.numel()


def _bag_sums(rows_MD: Tensor, place_M: Tensor, _: Tensor) -> int:
    return place_M.shape[0] * rows_MD.shape[1]


def _cross_entropy(logits_CV: Tensor, *_: Any) -> int:
    return 10 * logits_CV.numel()


_FLOPS: dict[str, Callable[..., int]] = {
    "aten::addmm": _addmm,
    "moonlight::grouped_rows": _grouped_rows,
    "moonlight::grouped_fp8": _grouped_fp8,
    "moonlight::quantised_rows": _quantised_rows,
    "moonlight::quantised_stacks": _quantised_stacks,
    "moonlight::swiglu": _swiglu,
    "moonlight::swiglu_backward": _swiglu_backward,
    "moonlight::bag_sums": _bag_sums,
    "moonlight::bag_sums_into": lambda into_RD, *rows: _bag_sums(*rows),
    "moonlight::cross_entropy": _cross_entropy,
    "moonlight::grouped_outer": _grouped_outer,
    "moonlight::linear": _linear,
    "moonlight::linear_backward": _linear_backward,
    "moonlight::rehearsed_attention": _attention,
    "moonlight::rehearsed_attention_backward": _attention_backward,
}
_SEE_WHAT_IS_FILLED = frozenset(
    {
        "moonlight::grouped_rows", "moonlight::grouped_outer", "moonlight::grouped_fp8", "moonlight::quantised_rows",
        "moonlight::bag_sums", "moonlight::bag_sums_into", "moonlight::copy_rows", "moonlight::copy_rows_into", "moonlight::swiglu", "moonlight::swiglu_backward",
    }
)  # fmt: skip
_PRODUCTS = frozenset({"mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "linear_backward"})
_READ_TWICE = frozenset({"moonlight::cross_entropy"})  # its inputs
_aten = torch.ops.aten
_TAKES_MEMORY = frozenset(
    {
        _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
        _aten.new_empty_strided.default,
    }
)  # fmt: skip
_COPIES = frozenset({_aten.copy_.default, _aten._to_copy.default})
_GATHERS = frozenset({_aten.index_select.default, _aten.embedding.default, _aten.gather.default, _aten.index.Tensor})
_OVERWRITES = frozenset({_aten.copy_.default, _aten.zero_.default, _aten.fill_.Scalar, _aten._foreach_copy_.default})
