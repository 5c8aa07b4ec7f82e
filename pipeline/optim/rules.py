"""Which parameter gets which treatment: an ordered list of name patterns that has to cover everything.

The first pattern (fnmatch on the fully qualified name) that matches a parameter decides. Two silent failures of other
implementations are errors here: a parameter that no rule matches, and a rule that matches no parameter (a typing error
in a pattern, or a wrapper that renamed parameters, otherwise sends experts to AdamW without a word).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from pipeline.config.schema import ModelConfig, OptimizerConfig


@dataclass(frozen=True)
class Rule:
    """Parameters whose name matches `pattern` are trained by `treatment`."""

    pattern: str
    treatment: Literal["muon", "adamw"]
    block_rows: int | None = None  # Muon: orthogonalise each run of this many rows on its own; None: the whole matrix


def moonlight_rules(model: ModelConfig, config: OptimizerConfig) -> tuple[Rule, ...]:
    """Moonlight's split: AdamW for embedding, head and norms; Muon for every other matrix, the router included.

    With `muon.blocks: per_head` the up-projections of attention are orthogonalised head by head: q_proj in blocks of
    qk_nope_head_dim + qk_rope_head_dim rows, kv_b_proj in blocks of qk_nope_head_dim + v_head_dim (key and value of a
    head together). kv_a_proj_with_mqa has no heads; o_proj mixes them in its columns and stays whole.
    """
    if config.name == "adamw":
        return (Rule("*", "adamw"),)
    rules = [Rule("embed_tokens.weight", "adamw"), Rule("lm_head.weight", "adamw"), Rule("*norm.weight", "adamw")]
    if config.muon.blocks == "per_head":
        rules.append(Rule("layers.*.self_attn.q_proj.weight", "muon", model.qk_head_dim))
        rules.append(Rule("layers.*.self_attn.kv_b_proj.weight", "muon", model.qk_nope_head_dim + model.v_head_dim))
    rules.append(Rule("layers.*.weight", "muon"))
    if model.first_k_dense_replace < model.num_hidden_layers:
        rules.append(Rule("layers.*.mlp.experts.*_proj", "muon"))
    return tuple(rules)


def match_rules(shapes: Iterable[tuple[str, tuple[int, ...]]], rules: Sequence[Rule]) -> list[Rule]:
    """The rule of each (name, shape), in order. Raises ValueError naming the parameter or the pattern."""
    chosen: list[Rule] = []
    used: set[int] = set()
    for fqn, shape in shapes:
        index = next((i for i, rule in enumerate(rules) if fnmatchcase(fqn, rule.pattern)), None)
        if index is None:
            raise ValueError(
                f"parameter {fqn!r} {shape} is matched by no optimizer rule; add one of {[r.pattern for r in rules]} for it"
            )
        rule = rules[index]
        if rule.treatment == "muon" and len(shape) not in (2, 3):
            raise ValueError(
                f"parameter {fqn!r} has shape {shape}, but rule {rule.pattern!r} gives it to Muon, which takes matrices "
                f"[rows, columns] and stacks [matrices, rows, columns]; put an 'adamw' rule before it"
            )
        if rule.block_rows is not None and shape[-2] % rule.block_rows:
            raise ValueError(
                f"parameter {fqn!r} has {shape[-2]} rows, not a multiple of block_rows {rule.block_rows} of rule {rule.pattern!r}"
            )
        chosen.append(rule)
        used.add(index)
    for index, rule in enumerate(rules):
        if index not in used:
            raise ValueError(
                f"optimizer rule {rule.pattern!r} -> {rule.treatment} matches no parameter; correct or remove it (earlier rules win)"
            )
    return chosen
