"""What is stored, against a real network with its optimizer; what is held on the way, where it must come from."""

from __future__ import annotations

from pipeline.config.load import load_config
from pipeline.evaluation.weights import empty_model
from pipeline.model.moonlight import Moonlight
from pipeline.optim.muon import build_optimizer
from pipeline.optim.rules import moonlight_rules
from pipeline.planner.memory import memory
from pipeline.planner.preparing import checkpoint_bytes
from pipeline.planner.sizes import Sizes, sizes_of
from tests.training.make import tiny


def _real_sizes() -> Sizes:
    shapes = empty_model(load_config("moonlight-16b-a3b", []).model).named_parameters()
    return sizes_of({fqn: tuple(p.shape) for fqn, p in shapes})


SIZES = _real_sizes()
MESH = ["parallelism.shard=64", "parallelism.replicate=4"]


def test_what_is_stored_is_what_a_network_and_its_optimizer_hold() -> None:
    for optimizer in ({}, {"name": "adamw"}, {"muon": {"momentum_dtype": "bf16"}}):
        config = tiny("nowhere", optimizer=optimizer)
        model = Moonlight(config.model)
        built = build_optimizer(
            model.named_parameters(), config.optimizer, moonlight_rules(config.model, config.optimizer)
        )
        found = memory(config, sizes_of({fqn: tuple(p.shape) for fqn, p in model.named_parameters()}), itemsize=4)
        assert found.parameters == 2 * sum(p.nbytes for p in model.parameters())  # and as much for gradients
        state = sum(tensor.nbytes for fqn, tensor in built.state_dict().items() if not fqn.endswith(".step"))
        # The planner gives norms to AdamW with everything that is no matrix in a layer, as the rules do.
        assert found.optimizer == state
        assert checkpoint_bytes(config) == state + sum(p.nbytes for p in model.parameters())


def test_settings_move_what_they_should() -> None:
    def plan(*overrides: str) -> dict[str, int]:
        config = load_config("moonlight-16b-a3b", [*MESH, *overrides])
        return vars(memory(config, SIZES, itemsize=2))

    usual = plan()
    wider = plan("parallelism.shard=128", "parallelism.replicate=2")
    assert wider["parameters"] * 2 == usual["parameters"]
    assert wider["activations"] == usual["activations"]
    twice = plan("training.micro_batch=2")
    assert twice["activations"] > 1.7 * usual["activations"]  # the chunk of logits does not grow
    assert twice["parameters"] == usual["parameters"]
    kinds = [plan(f"training.activation_checkpointing={kind}")["activations"] for kind in ("none", "selective", "full")]
    assert kinds == sorted(kinds, reverse=True)
    assert kinds[0] > 1.05 * kinds[1] > 4 * kinds[2]
    assert plan("parallelism.ep=16")["gathered"] < usual["gathered"]


def test_sizes_of_the_real_network() -> None:
    # reference: 0.894 G elements of dense matrices for Muon, 14.395 G of experts, 2 x 335.5 M of embedding and head
    assert SIZES.experts == 26 * 3 * 64 * 1408 * 2048
    assert round(SIZES.matrices / 1e9, 3) == 0.894
    assert SIZES.embedding == 163_840 * 2048
    assert SIZES.total == 15_960_108_544
    assert SIZES.experts_of_block == 3 * 64 * 1408 * 2048
