"""Activation checkpointing and torch.compile change memory and speed, never numbers or counts."""

import gc

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from pipeline.model.qk_clip import observe_max_logits, take_max_logits
from pipeline.model.recomputation import KEPT
from tests.model.oracle import random_model, small_config

DOCUMENTS = [[10, 14], [3, 8, 9]]


class Scribbler(fx.Interpreter):
    """Runs a compiled graph and, as Inductor may, writes into the memory of every result that is not an output."""

    def run_graph(self, *args):
        self.results = []
        out = self.run(*args)
        live = {t.untyped_storage().data_ptr() for t in (*args, *out) if isinstance(t, Tensor)}
        for result in self.results:
            if result.untyped_storage().data_ptr() not in live:
                result.data.fill_(torch.nan)
        return out

    def run_node(self, n):
        out = super().run_node(n)
        outs = out if isinstance(out, tuple) else (out,)
        self.results += [t for t in outs if isinstance(t, Tensor) and t.is_floating_point()]
        return out


def scribble(graph: fx.GraphModule, _):
    return make_boxed_func(Scribbler(graph).run_graph)


scribbling = aot_autograd(fw_compiler=scribble, bw_compiler=scribble, partition_fn=min_cut_rematerialization_partition)


def step(mode: str, backend=None, doc_lens=None):
    torch._dynamo.reset()
    counters.clear()
    model = random_model(small_config(), aux_loss_weight=1e-2)
    for block in model.layers:
        block.activation_checkpointing = mode
        if backend is not None:
            block.compile(backend=backend)
    observe_max_logits(model, True)
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    out = model(ids, ids, doc_lens)
    (out.loss_sum + out.aux_loss).backward()
    counts = [router.tokens_per_expert.clone() for _, router in model.routers()]
    return out, {name: p.grad for name, p in model.named_parameters()}, counts, take_max_logits(model)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_gives_the_same_step_and_counts_once(mode):
    plain, gradients, counts, max_logits = step("none")
    out, same, recounted, observed = step(mode)
    assert torch.equal(observed, max_logits)
    assert torch.equal(out.loss_sum, plain.loss_sum)
    assert torch.equal(out.aux_loss, plain.aux_loss)
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)
    for once, again in zip(counts, recounted, strict=True):
        assert torch.equal(once, again)
        assert once.sum() == 2 * 24 * 3


def saved_bytes(mode: str) -> int:
    model = random_model(small_config())
    for block in model.layers:
        block.activation_checkpointing = mode
    seen: dict[int, int] = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 96, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, ids)
    return sum(seen.values())


def test_full_checkpointing_keeps_less():
    assert saved_bytes("full") < 0.6 * saved_bytes("none")


def test_observed_logits_are_not_kept():
    """They are products, which selective checkpointing keeps; of these it may keep their largest only."""
    model = random_model(small_config())
    observe_max_logits(model, True)
    for block in model.layers:
        block.activation_checkpointing = "selective"
    rows, heads = 2, model.config.num_attention_heads
    ids = torch.randint(0, 96, (rows, 40), generator=torch.Generator().manual_seed(0))
    out = model(ids, ids)
    held = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.shape[-2:] == (40, 40)]
    assert not any(t.numel() == rows * heads * 40 * 40 for t in held)
    out.loss_sum.backward()


def test_counts_add_up_over_micro_batches_and_not_in_evaluation():
    model = random_model(small_config())
    ids = torch.randint(0, 96, (2, 24))
    model(ids, ids)
    model(ids, ids)
    model.eval()
    model(ids)
    assert [int(router.tokens_per_expert.sum()) for _, router in model.routers()] == [2 * 144, 2 * 144]


def assert_compiled_is_eager(mode: str, backend, doc_lens) -> None:
    plain, gradients, counts, max_logits = step("none", doc_lens=doc_lens)
    out, same, recounted, observed = step(mode, backend, doc_lens)
    torch.testing.assert_close(observed, max_logits)
    assert counters["stats"]["unique_graphs"] == 3  # dense; to the experts, the sum: for all layers
    assert out.loss_sum.item() == pytest.approx(plain.loss_sum.item(), rel=1e-6)
    for name, gradient in gradients.items():
        assert (same[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    text = 2 * 24 if doc_lens is None else sum(map(sum, doc_lens))
    for once, again in zip(counts, recounted, strict=True):
        assert torch.equal(once, again)
        assert once.sum() == text * 3


@pytest.mark.parametrize("doc_lens", [None, DOCUMENTS])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_compiled_pieces_give_the_same_step(mode, doc_lens):
    assert_compiled_is_eager(mode, scribbling, doc_lens)


def test_compiled_pieces_follow_the_padding_without_compiling_again():
    """Whole rows, rows with padding, and from the third amount of it on nothing new."""
    torch._dynamo.reset()
    counters.clear()
    model, eager = random_model(small_config()), random_model(small_config())
    for block in model.layers:
        block.compile(backend="aot_eager")
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    graphs = []
    for lengths in ([24, 24], [24, 20], [19, 24], [3, 24], [24, 24], [11, 12]):
        losses = []
        for each in (model, eager):
            out = each(ids, ids, lengths=lengths)
            out.loss_sum.backward()
            losses.append(out.loss_sum.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[3:] == [graphs[2]] * 3
    for name, parameter in model.named_parameters():
        expected = eager.get_parameter(name).grad
        assert (parameter.grad - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.long
@pytest.mark.timeout(1800)  # its C++ compiler, on a busy machine
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_inductor_gives_the_same_step(mode):
    assert_compiled_is_eager(mode, "inductor", DOCUMENTS)


def test_kept_operators_exist():
    from torch.nn.attention import varlen  # noqa: F401

    for name in KEPT:
        namespace, _, operator = name.partition("::")
        operator, _, overload = operator.partition(".")
        assert getattr(getattr(getattr(torch.ops, namespace), operator), overload or "default").name() == name


def test_selective_checkpointing_obeys_its_list_in_a_compiled_graph():
    """Kept products run once; what stands between them runs again in backward."""
    calls = {"forward": [], "backward": []}

    def record(phase):
        def compiler(graph: fx.GraphModule, _):
            calls[phase] += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=record("forward"), bw_compiler=record("backward"), partition_fn=min_cut_rematerialization_partition
    )
    step("selective", backend)
    for kept in ("moonlight.linear.default", "moonlight.causal_attention.default"):
        assert kept in calls["forward"]
    assert "moonlight.linear.default" not in calls["backward"]
    assert "moonlight.causal_attention.default" not in calls["backward"]
    for again in ("aten.sigmoid.default", "aten.rsqrt.default"):
        assert again in calls["backward"]
