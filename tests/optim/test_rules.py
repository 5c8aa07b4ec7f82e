"""Who is trained by what: exhaustive for the real network, loud about anything that does not fit."""

import pytest
import torch

from pipeline.config.load import load_config
from pipeline.config.schema import OptimizerConfig
from pipeline.model.moonlight import Moonlight
from pipeline.optim.rules import Rule, match_rules, moonlight_rules


@pytest.fixture(scope="module")
def debug():
    model = load_config("debug", []).model
    with torch.device("meta"):
        return model, [(fqn, tuple(p.shape)) for fqn, p in Moonlight(model).named_parameters()]


def test_moonlights_split(debug):
    model, shapes = debug
    treatments = {
        fqn: rule.treatment
        for (fqn, _), rule in zip(shapes, match_rules(shapes, moonlight_rules(model, OptimizerConfig())))
    }
    for fqn, shape in shapes:
        vector_or_table = len(shape) == 1 or fqn in ("embed_tokens.weight", "lm_head.weight")
        assert treatments[fqn] == ("adamw" if vector_or_table else "muon"), fqn
    assert treatments["layers.1.mlp.router.weight"] == treatments["layers.1.mlp.experts.gate_proj"] == "muon"


def test_heads_get_their_own_blocks(debug):
    model, shapes = debug
    rules = moonlight_rules(model, OptimizerConfig.model_validate({"muon": {"blocks": "per_head"}}))
    rows = {fqn: rule.block_rows for (fqn, _), rule in zip(shapes, match_rules(shapes, rules))}
    assert rows["layers.0.self_attn.q_proj.weight"] == 64
    assert rows["layers.0.self_attn.kv_b_proj.weight"] == 96
    assert rows["layers.0.self_attn.o_proj.weight"] is None


def test_adamw_takes_everything(debug):
    model, shapes = debug
    rules = moonlight_rules(model, OptimizerConfig(name="adamw"))
    assert {rule.treatment for rule in match_rules(shapes, rules)} == {"adamw"}


def test_a_model_without_experts_has_no_rule_for_them(debug):
    model, shapes = debug
    dense = model.model_copy(update={"first_k_dense_replace": model.num_hidden_layers})
    only_dense = [(fqn, shape) for fqn, shape in shapes if "experts" not in fqn]
    match_rules(only_dense, moonlight_rules(dense, OptimizerConfig()))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("w*", "muon")], r"parameter 'bias' \(4,\) is matched by no optimizer rule"),
        ([Rule("*", "adamw"), Rule("w", "muon")], r"rule 'w' -> muon matches no parameter"),
        ([Rule("weigth", "muon"), Rule("*", "adamw")], r"rule 'weigth' -> muon matches no parameter"),
        ([Rule("*", "muon")], r"'bias' has shape \(4,\), but rule '\*' gives it to Muon"),
        ([Rule("w", "muon", 3), Rule("*", "adamw")], r"'w' has 4 rows, not a multiple of block_rows 3"),
    ],
)
def test_what_does_not_fit_is_named(rules, message):
    with pytest.raises(ValueError, match=message):
        match_rules([("w", (4, 6)), ("bias", (4,))], rules)
