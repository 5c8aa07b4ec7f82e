"""Names, shapes and files: the published layout, transformers as reader and writer, and folders that do not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from pipeline.config.load import load_config
from pipeline.config.schema import StorageConfig
from pipeline.model.hf import hf_config, hf_shapes, hf_tensors, load_hf
from pipeline.model.moonlight import Moonlight
from pipeline.storage import open_storage
from tests.model.oracle import oracle_of, random_model, small_config


def saved(model, folder, extra=None, without=()):
    tensors = {name: tensor.clone() for name, tensor in hf_tensors(model)} | (extra or {})
    folder.mkdir(exist_ok=True)
    save_file({k: v for k, v in tensors.items() if k not in without}, folder / "model.safetensors")
    return folder


def test_the_real_model_exports_the_tensors_of_the_release():
    """reference/moonlight.md section 6: 5,344 tensors with 27 stale inv_freq buffers, 5,317 without."""
    config = load_config("moonlight-16b-a3b").model
    with torch.device("meta"):
        shapes = hf_shapes(Moonlight(config))
    expected = {
        "model.embed_tokens.weight": (163840, 2048),
        "lm_head.weight": (163840, 2048),
        "model.norm.weight": (2048,),
    }
    for layer in range(27):
        prefix = f"model.layers.{layer}."
        expected |= {
            prefix + "input_layernorm.weight": (2048,),
            prefix + "post_attention_layernorm.weight": (2048,),
            prefix + "self_attn.q_proj.weight": (3072, 2048),
            prefix + "self_attn.kv_a_proj_with_mqa.weight": (576, 2048),
            prefix + "self_attn.kv_a_layernorm.weight": (512,),
            prefix + "self_attn.kv_b_proj.weight": (4096, 512),
            prefix + "self_attn.o_proj.weight": (2048, 2048),
        }
        widths = {"mlp.": 11264} if layer == 0 else {"mlp.shared_experts.": 2816}
        if layer > 0:
            expected |= {prefix + "mlp.gate.weight": (64, 2048), prefix + "mlp.gate.e_score_correction_bias": (64,)}
            widths |= {f"mlp.experts.{expert}.": 1408 for expert in range(64)}
        for name, width in widths.items():
            expected |= {
                f"{prefix}{name}gate_proj.weight": (width, 2048),
                f"{prefix}{name}up_proj.weight": (width, 2048),
                f"{prefix}{name}down_proj.weight": (2048, width),
            }
    assert len(shapes) == 5317
    assert shapes == expected


def test_config_describes_the_release():
    """The values of the published config.json."""
    config = hf_config(load_config("moonlight-16b-a3b").model, bos_token_id=163584, eos_token_id=163585)
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    published = {"hidden_size": 2048, "num_hidden_layers": 27, "kv_lora_rank": 512, "q_lora_rank": None, "n_group": 1}
    published |= {
        "rope_theta": 50000.0,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 2.446,
        "scoring_func": "sigmoid",
    }
    published |= {"topk_method": "noaux_tc", "moe_layer_freq": 1, "tie_word_embeddings": False, "vocab_size": 163840}
    assert {key: config[key] for key in published} == published


def test_transformers_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    model = random_model(small_config())
    folder = saved(model, tmp_path / "ours")
    (folder / "config.json").write_text(
        json.dumps(hf_config(model.config, bos_token_id=None, eos_token_id=1, dtype="float32"))
    )
    oracle, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert isinstance(oracle, DeepseekV3ForCausalLM)
    assert not any(report.values())
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(model(ids), oracle(ids).logits, rtol=1e-4, atol=1e-5)

    oracle_of(random_model(small_config(), seed=5)).save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    load_hf(model, tmp_path / "theirs")
    for (name, ours), (_, expected) in zip(hf_tensors(model), hf_tensors(random_model(small_config(), seed=5))):
        assert torch.equal(ours, expected), name


def test_a_bf16_bias_and_stale_rotary_buffers_are_accepted(tmp_path):
    source = random_model(small_config())
    bias = source.layers[1].mlp.router.e_score_correction_bias.bfloat16()
    stale = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    folder = saved(source, tmp_path / "old", stale | {"model.layers.1.mlp.gate.e_score_correction_bias": bias})
    model = random_model(small_config(), seed=1)
    load_hf(model, folder)
    router = model.layers[1].mlp.router
    assert router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, bias.float())


def test_weights_come_from_any_storage(tmp_path):
    saved(random_model(small_config()), tmp_path / "weights")
    model = random_model(small_config(), seed=1)
    load_hf(model, "weights", open_storage(StorageConfig(root=str(tmp_path))))
    assert torch.equal(model.lm_head.weight, random_model(small_config()).lm_head.weight)


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("extra", "without", "message"),
    [
        ({}, {NAME}, rf"1 tensors are missing: {NAME}; expected .* of shape \[32, 64\]; fetch all shards"),
        (
            {"model.layers.7.norm.weight": torch.ones(3)},
            (),
            r"not part of the model: model.layers.7.norm.weight.*shape \[3\]",
        ),
        (
            {NAME: torch.ones(64, 32)},
            (),
            rf"{NAME} has shape \[64, 32\], expected \[32, 64\]; check that the model section",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused_before_anything_changes(tmp_path, extra, without, message):
    folder = saved(random_model(small_config()), tmp_path / "bad", extra, without)
    model = random_model(small_config(), seed=1)
    with pytest.raises(ValueError, match=message):
        load_hf(model, folder)
    assert torch.equal(model.norm.weight, random_model(small_config(), seed=1).norm.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 10000.0}, r"rope_theta is 10000.0 there and 50000.0 here \(set model.rope_theta\)"),
        ({"routed_scaling_factor": 2.5}, r"routed_scaling_factor is 2.5 there and 2.446 here"),
        ({"num_attention_heads": 4}, r"num_attention_heads is 4 there and 2 here"),
        ({"n_group": 8}, r"n_group is 8 there and 1 here \(this network has no other\)"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4}},
            r"rope_scaling is \{.*'factor': 4.*'rope_type': 'yarn'.*\} there and None",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            r"rope_scaling is .*yarn.*; rope_theta is 10000.0",
        ),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings is True there and False here"),
    ],
)
def test_a_config_of_another_network_is_refused(tmp_path, change, message):
    """All of these have tensors of the same names and shapes."""
    folder = saved(random_model(small_config()), tmp_path / "other")
    described = hf_config(small_config(), bos_token_id=163584, eos_token_id=163586)
    (folder / "config.json").write_text(json.dumps(described | {"max_position_embeddings": 8192, "auto_map": {}}))
    model = random_model(small_config(), seed=1)
    load_hf(model, folder)
    model = random_model(small_config(), seed=1)
    (folder / "config.json").write_text(json.dumps(described | change))
    with pytest.raises(ValueError, match=message):
        load_hf(model, folder)
    assert torch.equal(model.norm.weight, random_model(small_config(), seed=1).norm.weight)


def test_damaged_folders_are_refused(tmp_path):
    model = random_model(small_config())
    with pytest.raises(ValueError, match=r"no \*.safetensors file; give a Hugging Face model folder"):
        load_hf(model, tmp_path / "nowhere")
    folder = saved(model, tmp_path / "cut")
    file = folder / "model.safetensors"
    shutil.copy(file, folder / "second.safetensors")
    with pytest.raises(ValueError, match=r"in both .*; keep one"):
        load_hf(model, folder)
    (folder / "second.safetensors").unlink()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"ends inside tensor .*; the file is cut off"):
        load_hf(model, folder)
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_hf(model, folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(ValueError, match=r"model-1.safetensors is named in .* but not there"):
        load_hf(model, folder)


def test_reader_agrees_with_the_safetensors_package(tmp_path):
    from pipeline.model.safetensors import TensorFiles

    tensors = {
        "a": torch.arange(6).view(2, 3),
        "b": torch.randn(0, 4),
        "c": torch.randn(3).half(),
        "d": torch.tensor(True),
    }
    tensors["e"] = torch.randn(2, 2, 2).bfloat16()
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    files = TensorFiles(["x.safetensors"], lambda name: (tmp_path / name).open("rb"))
    expected = load_file(tmp_path / "x.safetensors")
    assert set(files.entries) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(files.read(name), tensor)


def accepted(folder, described) -> bool:
    """Whether the folder's weights load under this config.json; if so, with the logits that transformers gives them."""
    (folder / "config.json").write_text(json.dumps(described))
    model = random_model(small_config(), seed=1)
    try:
        load_hf(model, folder)
    except ValueError:
        return False
    oracle = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(model(ids), oracle(ids).logits, rtol=1e-4, atol=1e-5)
    return True


def test_a_key_that_is_absent_means_transformers_default(tmp_path):
    """Each key left out, alone: the same logits as transformers', or a refusal that names the key and what it stands for."""
    folder = saved(random_model(small_config()), tmp_path / "hand-made")
    whole = hf_config(small_config(), bos_token_id=None, eos_token_id=1, dtype="float32")
    fine = {
        "architectures", "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "ep_size", "hidden_act",
        "initializer_range", "max_position_embeddings", "moe_layer_freq", "norm_topk_prob", "num_nextn_predict_layers",
        "rope_interleave", "rope_scaling", "scoring_func", "tie_word_embeddings", "topk_method", "torch_dtype", "use_cache",
    }  # fmt: skip
    found = {
        key for key in whole if key != "model_type" and accepted(folder, {k: v for k, v in whole.items() if k != key})
    }
    assert found == fine
    (folder / "config.json").write_text(json.dumps({k: v for k, v in whole.items() if k != "rms_norm_eps"}))
    message = (
        r"rms_norm_eps is absent there, which transformers takes for 1e-06, and 1e-05 here \(set model.rms_norm_eps\)"
    )
    with pytest.raises(ValueError, match=message):
        load_hf(random_model(small_config()), folder)


def test_a_config_that_transformers_writes_or_refuses(tmp_path):
    """Its own names for the rotary embedding, a base that it fills in, and a kind that lacks what it needs."""
    folder = saved(random_model(small_config()), tmp_path / "theirs")
    whole = hf_config(small_config(), bos_token_id=None, eos_token_id=1, dtype="float32")
    theirs = {k: v for k, v in whole.items() if k not in ("rope_theta", "rope_scaling")}
    assert accepted(folder, theirs | {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}})
    assert not accepted(folder, theirs | {"rope_parameters": {"rope_type": "default"}})  # 10000
    (folder / "config.json").write_text(json.dumps(theirs | {"rope_parameters": {"rope_type": "yarn"}}))
    with pytest.raises(ValueError, match=r"config\.json: transformers refuses it: .*factor"):
        load_hf(random_model(small_config()), folder)
