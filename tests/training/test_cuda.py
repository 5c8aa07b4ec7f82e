"""What only CUDA runs, without one: fake tensors that say they are on a GPU take its branches and know shapes, dtypes,
strides and devices, but no values. So a read on the host, a tensor left on the CPU, an operand that a kernel refuses or a
dtype that is not the intended one fails here. Nothing is computed; autograd needs a build with CUDA, so what backward
calls is called by itself.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pipeline.config.schema import ModelConfig, OptimizerConfig, TrainingConfig
from pipeline.model import grouped, sequences
from pipeline.model.devices import check_fp8
from pipeline.model.loss import _CrossEntropySum
from pipeline.model.moonlight import Moonlight
from pipeline.model.qk_clip import observe_max_logits
from pipeline.model.row_products import Fp8, Fp8Copies, Places, Stacks, kept
from pipeline.optim.muon import build_optimizer
from pipeline.optim.rules import moonlight_rules
from pipeline.parallel.bounded import BoundedDispatch, Room
from pipeline.parallel.device_flight import Wire
from pipeline.parallel.dispatch import AllToAllDispatch, Choices
from pipeline.parallel.mesh import Meshes
from pipeline.parallel.rows import Filled, place
from pipeline.parallel.shard import shard_model
from pipeline.training.guard import Guard
from pipeline.training.step import Step

CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16
MODEL = ModelConfig(
    vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=32, intermediate_size=96,
    moe_intermediate_size=48, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=2, max_position_embeddings=64,
)  # fmt: skip


def getitem(x: Tensor, index: Any) -> Tensor:
    """x[index] for ints, slices, None and an ellipsis from plain operators. The method itself asks for a CUDA build, whatever the tensor."""
    dim = 0
    parts = index if isinstance(index, tuple) else (index,)
    for position, part in enumerate(parts):
        if part is Ellipsis:
            dim = x.dim() - len(parts[position + 1 :])
        elif isinstance(part, int):
            x = torch.ops.aten.select.int(x, dim, part)
        elif part is None:
            x, dim = torch.ops.aten.unsqueeze.default(x, dim), dim + 1
        else:
            assert isinstance(part, slice), part
            x, dim = torch.ops.aten.slice.Tensor(x, dim, part.start, part.stop, part.step or 1), dim + 1
    return x


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with (
        torch.no_grad(),
        FakeTensorMode(),
        mock.patch.object(sequences, "to_device", lambda x, device: x.to(device)),  # fake memory is never pinned
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(Tensor, "__getitem__", getitem),
        mock.patch.object(Tensor, "__invert__", lambda x: torch.ops.aten.bitwise_not.default(x)),
        mock.patch.object(Tensor, "copy_", lambda x, source: torch.ops.aten.copy_.default(x, source)),
    ):
        yield


def on_cuda(dtype: torch.dtype) -> Moonlight:
    with torch.device("meta"):
        model = Moonlight(MODEL, aux_loss_weight=1e-4)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=CUDA)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=CUDA))
    return model


def test_fake_tensors_refuse_host_reads():
    with pytest.raises(DataDependentOutputException):
        torch.empty((), device=CUDA).item()


@pytest.mark.parametrize(
    ("documents", "lengths"), [(None, None), (None, [50, 64]), (None, [0, 0]), ([[30, 20], [64]], None)]
)
@pytest.mark.parametrize("observe", [False, True])
def test_forward(documents, lengths, observe):
    model = on_cuda(BF16)
    observe_max_logits(model, observe)
    ids_BS = torch.empty(2, 64, dtype=torch.int64, device=CUDA)
    out = model(ids_BS, ids_BS, documents, lengths=lengths)
    assert {(t.device, t.dtype) for t in (out.loss_sum, out.aux_loss)} == {(CUDA, torch.float32)}
    assert model(ids_BS, None, documents).dtype == torch.float32


def test_precisions():
    """Router and combination weights in fp32, rows and results of experts in bf16."""
    model = on_cuda(BF16)
    mixture = model.layers[1].mlp
    x_BSD = torch.empty(2, 64, 64, dtype=BF16, device=CUDA)
    routing, plan = mixture.route(x_BSD)
    assert (routing.weights_NK.dtype, routing.aux_loss.dtype) == (torch.float32, torch.float32)
    assert routing.tokens_per_expert_E.dtype == torch.int64
    assert {out.dtype for out in mixture.mix(x_BSD, routing, plan)} == {BF16}


def test_gradients_of_the_loss():
    saved: list[Tensor] = []
    context = SimpleNamespace(needs_input_grad=(True, True, False), save_for_backward=lambda *t: saved.extend(t))
    x_ND, weight_VD = torch.empty(2048, 64, dtype=BF16, device=CUDA), torch.empty(512, 64, dtype=BF16, device=CUDA)
    loss = _CrossEntropySum.forward(context, x_ND, weight_VD, torch.empty(2048, dtype=torch.int64, device=CUDA))
    assert (loss.dtype, loss.device) == (torch.float32, CUDA)
    assert [(t.shape, t.dtype, t.device) for t in saved] == [(t.shape, BF16, CUDA) for t in (x_ND, weight_VD)]


@pytest.mark.parametrize(("capability", "rows"), [((9, 0), 24), ((10, 0), 24), ((9, 0), 0)])
def test_grouped_products_take_their_operands(capability, rows):
    """Forward and both gradients; torch's own shape inference checks what the kernel asks of strides."""
    x_MI, grad_MO = (torch.empty(rows, n, dtype=BF16, device=CUDA) for n in (64, 48))
    weight_eOI = torch.empty(4, 48, 64, dtype=BF16, device=CUDA)
    offsets_e = torch.empty(4, dtype=torch.int32, device=CUDA)
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=capability):
        assert grouped._rows._init_fn(x_MI, weight_eOI, offsets_e, True).shape == (rows, 48)
        assert grouped._rows._init_fn(grad_MO, weight_eOI, offsets_e, False).shape == (rows, 64)
        assert grouped._outer._init_fn(grad_MO, x_MI, offsets_e).shape == (4, 48, 64)
    narrow = torch.empty(4, 44, 64, dtype=BF16, device=CUDA)
    if rows:
        with pytest.raises(RuntimeError, match="16"):  # the check is there
            grouped._rows._init_fn(torch.empty(rows, 44, dtype=BF16, device=CUDA), narrow, offsets_e, False)


@pytest.mark.parametrize("filled", [None, Filled(torch.empty(1, dtype=torch.int32), 24)])
def test_products_of_experts_in_fp8(filled):
    """What is multiplied is e4m3, what comes of it is bf16, and the host reads nothing."""
    stacks = Stacks(*(torch.empty(4, *shape, dtype=BF16, device=CUDA) for shape in ((48, 64), (48, 64), (64, 48))))
    ends = torch.empty(4, dtype=torch.int32, device=CUDA)
    places = Places(torch.empty(24, dtype=torch.int64, device=CUDA), ends, filled and Filled(ends[-1:], 24))
    copies = Fp8Copies()
    with kept([copies]):
        products = Fp8(stacks, places, copies)
        rows_RD, hidden_MF, both_M2F = (
            torch.empty(*shape, dtype=BF16, device=CUDA) for shape in ((9, 64), (24, 48), (24, 96))
        )
        found = (*products.gate_up(rows_RD), products.down(hidden_MF))
        found += (products.through_down(found[2]), products.through_gate_up(both_M2F))
        assert [(t.shape[1], t.dtype, t.device) for t in found] == [(n, BF16, CUDA) for n in (48, 48, 64, 48, 64)]
        for each in (*copies.forward(stacks), *copies.backward(stacks)):
            assert (each.values.dtype, each.scales.dtype) == (torch.float8_e4m3fn, torch.float32)


@pytest.mark.parametrize(
    ("capability", "hip", "said"),
    [
        ((9, 0), None, None),
        ((8, 9), None, None),
        ((12, 0), None, None),
        ((8, 0), None, "has compute capability 8.0"),
        ((9, 4), "6.4", "AMD"),
    ],
)
def test_fp8_is_refused_by_a_chip_without_it(capability, hip, said):
    config = TrainingConfig(expert_products="fp8", compile=True)
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(torch.cuda, "get_device_name", return_value="Some GPU"),
        mock.patch.object(torch.version, "hip", hip),
    ):
        if said is None:
            check_fp8(CUDA)
            return
        with pytest.raises(
            ValueError, match=f"^training.expert_products fp8: the device Some GPU .*{said}.* set it to compute_dtype$"
        ):
            shard_model(on_cuda(torch.float32), Meshes(None, None), config, CUDA)  # before anything else
    check_fp8(torch.device("cpu"))


class Landed:
    def wait(self) -> None:
        pass


@pytest.fixture
def eight_ranks() -> Iterator[Any]:
    """A group whose exchanges come to nothing: values do not exist here anyway."""
    group = SimpleNamespace(size=lambda: 8)
    with mock.patch.object(dist, "all_to_all_single", return_value=Landed()):
        yield group


@pytest.mark.parametrize("lengths", [None, [50, 64]])
@pytest.mark.parametrize("fp8", [None, Fp8Copies()])
def test_a_pass_over_ranks_waits_for_nothing_on_the_host(eight_ranks, lengths, fp8):
    """With room set aside; a read of counts would raise here, as it does without."""
    model = on_cuda(BF16)
    ids_BS = torch.empty(2, 64, dtype=torch.int64, device=CUDA)
    experts = model.layers[1].mlp.experts
    experts.fp8 = fp8
    experts.dispatcher = BoundedDispatch(eight_ranks, Room(1.25))
    out = model(ids_BS, ids_BS, lengths=lengths)
    assert out.loss_sum.device == CUDA
    experts.dispatcher = AllToAllDispatch(eight_ranks)
    with pytest.raises(DataDependentOutputException):
        model(ids_BS, ids_BS, lengths=lengths)


@pytest.mark.parametrize(
    "dispatch",
    [
        AllToAllDispatch,
        lambda group: BoundedDispatch(group, Room(1.25)),
        lambda group: BoundedDispatch(group, Room(1.25), wire=cast(Wire, SimpleNamespace())),
    ],
)
def test_tokens_are_sorted_without_a_read(eight_ranks, dispatch):
    experts_NK = torch.empty(128, 2, dtype=torch.int64, device=CUDA)
    choices = Choices(experts_NK, torch.empty(128, 2, device=CUDA), 256, True)
    plan = dispatch(eight_ranks).plan(choices, torch.empty(16, dtype=torch.int64, device=CUDA))
    assert {t.device for t in (*plan.placing[:5], plan.weights_LE, plan.counts_W2)} == {CUDA}
    assert place(experts_NK, 4, 256, all_chosen=True).choice_M.shape == (256,)


@pytest.mark.parametrize("muon", [{}, {"backend": "gram", "newton_schulz": "polar_express"}, {"blocks": "per_head"}])
def test_update(muon):
    """fp32 masters: norm, verdict, clipping, Muon, AdamW, router bias and QK-clip."""
    model = on_cuda(torch.float32)
    config = OptimizerConfig.model_validate({"muon": muon, "qk_clip": 100.0})
    optimizer = build_optimizer(model.named_parameters(), config, moonlight_rules(MODEL, config))
    step = Step(model, optimizer, Guard(CUDA), Meshes(None, None), config, CUDA)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    loss = torch.empty((), device=CUDA)
    figures = step.update(loss, loss, torch.empty((), dtype=torch.int64, device=CUDA), 1e-3, 1e-3, False)
    assert (figures.shape, figures.dtype, figures.device) == ((10,), torch.float64, CUDA)
    assert all(parameter.grad is None for parameter in model.parameters())
