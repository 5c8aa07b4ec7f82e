"""The published folder by the rules of vLLM and SGLang, which need a GPU to run: the parameters that their DeepSeek-V3 network has,
built from config.json alone, and how their loaders send a tensor there by its name. A tensor without a place ends their load with a
KeyError, and a place without a tensor stays uninitialised.

Read in `deepseek_v2.py` of vllm-project/vllm at 002d6073 and sgl-project/sglang at 00114aef; where one of them reads a key without
a default, it is read so here.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from tests.publishing.conftest import PublishedRun

Place = tuple[str, str | int | None]  # a parameter, and which part of it
FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}  # of dense and shared experts
STACKED = {"gate_proj": "w13_weight", "up_proj": "w13_weight", "down_proj": "w2_weight"}  # of routed experts


def places(config: dict[str, Any]) -> dict[Place, tuple[int, ...]]:
    """Shapes of all parts of the network that they build."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    latent, experts, width = config["kv_lora_rank"], config["n_routed_experts"], config["moe_intermediate_size"]
    assert config["q_lora_rank"] is None  # else there are q_a_proj and q_b_proj instead of q_proj
    found: dict[Place, tuple[int, ...]] = {
        ("model.embed_tokens.weight", None): (config["vocab_size"], hidden),
        ("model.norm.weight", None): (hidden,),
        ("lm_head.weight", None): (config["vocab_size"], hidden),
    }

    def mlp(name: str, size: int) -> None:
        for part in FUSED:
            found[f"{name}.gate_up_proj.weight", part] = (size, hidden)
        found[f"{name}.down_proj.weight", None] = (hidden, size)

    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{base}.{norm}.weight", None] = (hidden,)
        for name, shape in {
            "q_proj": (heads * (nope + rope), hidden),
            "kv_a_proj_with_mqa": (latent + rope, hidden),
            "kv_a_layernorm": (latent,),
            "kv_b_proj": (heads * (nope + value), latent),
            "o_proj": (hidden, heads * value),
        }.items():
            found[f"{base}.self_attn.{name}.weight", None] = shape
        if layer < config["first_k_dense_replace"] or layer % config["moe_layer_freq"]:
            mlp(f"{base}.mlp", config["intermediate_size"])
            continue
        found[f"{base}.mlp.gate.weight", None] = (experts, hidden)
        if config["topk_method"] == "noaux_tc":
            found[f"{base}.mlp.gate.e_score_correction_bias", None] = (experts,)
        mlp(f"{base}.mlp.shared_experts", width * config["n_shared_experts"])
        for expert in range(experts):
            for part in FUSED:
                found[f"{base}.mlp.experts.w13_weight", f"{expert} {part}"] = (width, hidden)
            found[f"{base}.mlp.experts.w2_weight", f"{expert} down_proj"] = (hidden, width)
    return found


def place_of(name: str) -> Place:
    """Where their loaders put a tensor."""
    if ".mlp.experts." in name:
        base, _, rest = name.partition(".experts.")
        expert, part, _ = rest.split(".")
        return f"{base}.experts.{STACKED[part]}", f"{expert} {part}"
    for part, fused in FUSED.items():
        if f".{part}." in name:
            return name.replace(part, fused), part
    return name, None


def test_every_tensor_has_a_place_and_every_place_a_tensor(run: PublishedRun) -> None:
    config = json.loads((run.folder / "config.json").read_text())
    found: dict[Place, tuple[int, ...]] = {}
    dtypes = {}
    for file in sorted(run.folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                place = place_of(name)
                assert place not in found, name
                found[place] = tuple(tensors.get_slice(name).get_shape())
                dtypes[name] = tensors.get_tensor(name).dtype
    assert found == places(config)
    biases = [name for name in dtypes if name.endswith("e_score_correction_bias")]
    assert biases
    assert {dtypes[name] for name in biases} == {torch.float32}  # as their parameter is


def test_what_they_read_of_the_configuration_is_the_networks(run: PublishedRun) -> None:
    config, network = json.loads((run.folder / "config.json").read_text()), run.made.config.model
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]  # the name in both registries
    assert "auto_map" not in config  # nothing that --trust-remote-code would be asked for
    assert config["hidden_act"] == "silu"  # anything else is refused
    assert config["scoring_func"] == "sigmoid"  # vLLM would take softmax where it is missing
    assert (config["n_group"], config["topk_group"]) == (1, 1)  # both choose experts by group always
    assert config["norm_topk_prob"] is True
    assert config["routed_scaling_factor"] == network.routed_scaling_factor
    assert config["num_key_value_heads"] == network.num_attention_heads
    assert config["num_nextn_predict_layers"] == 0  # layers from this number on would be left out
    assert config["torch_dtype"] == config["dtype"] == "float32"
    loaded = AutoConfig.from_pretrained(run.folder)
    assert loaded.rope_parameters["rope_type"] == "default"  # vLLM makes any other YaRN
    assert loaded.rope_parameters["rope_theta"] == network.rope_theta
