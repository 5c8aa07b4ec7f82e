"""The GGUF file, by the gguf package's reader: every tensor as Hugging Face's converter lays it out, tokens, merges and ids."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from pipeline.model.hf import hf_tensors
from pipeline.publishing.gguf_file import check_gguf, write_gguf
from pipeline.storage import Storage
from tests.publishing.conftest import PublishedRun


@pytest.fixture(scope="module")
def file(run: PublishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    folder = str(run.folder.relative_to(run.made.storage.root))
    write_gguf(folder, run.made.storage, path, "tiny")
    check_gguf(folder, run.made.storage, path)
    return path


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tuple(map(int, tensor.shape))[::-1])
        for tensor in gguf.GGUFReader(path).tensors
    }


def test_every_tensor_is_the_models(file: Path, run: PublishedRun):
    found, network = tensors(file), run.made.config.model
    expected = {name: tensor.numpy() for name, tensor in hf_tensors(run.made.model)}
    heads, nope, v = network.num_attention_heads, network.qk_nope_head_dim, network.v_head_dim
    used = set()

    def same(name: str, array: np.ndarray) -> None:
        used.add(name)
        assert np.array_equal(found[name], array), name

    same("token_embd.weight", expected["model.embed_tokens.weight"])
    same("output.weight", expected["lm_head.weight"])
    same("output_norm.weight", expected["model.norm.weight"])
    for layer in range(network.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        for name, other in {
            "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
            "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
            "self_attn.o_proj": "attn_output",
        }.items():  # fmt: skip
            same(f"{theirs}{other}.weight", expected[f"{ours}{name}.weight"])
        kv = expected[f"{ours}self_attn.kv_b_proj.weight"].reshape(heads, nope + v, -1)
        same(f"{theirs}attn_k_b.weight", kv[:, :nope].transpose(0, 2, 1))
        same(f"{theirs}attn_v_b.weight", kv[:, nope:])
        for part in ("gate", "up", "down"):
            if layer < network.first_k_dense_replace:
                same(f"{theirs}ffn_{part}.weight", expected[f"{ours}mlp.{part}_proj.weight"])
                continue
            same(f"{theirs}ffn_{part}_shexp.weight", expected[f"{ours}mlp.shared_experts.{part}_proj.weight"])
            stack = [expected[f"{ours}mlp.experts.{e}.{part}_proj.weight"] for e in range(network.n_routed_experts)]
            same(f"{theirs}ffn_{part}_exps.weight", np.stack(stack))
        if layer >= network.first_k_dense_replace:
            same(f"{theirs}ffn_gate_inp.weight", expected[f"{ours}mlp.gate.weight"])
            same(f"{theirs}exp_probs_b.bias", expected[f"{ours}mlp.gate.e_score_correction_bias"])
    assert used == found.keys()


def test_the_vocabulary_has_its_ids_and_its_pre_tokenizers_name(file: Path, run: PublishedRun):
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items() if name[0] != "G"}
    document = json.loads((run.folder / "tokenizer.json").read_text())
    assert fields["tokenizer.ggml.pre"] == "kimi-k2"
    assert fields["tokenizer.ggml.model"] == "gpt2"
    ids = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    expected = document["model"]["vocab"] | {token["content"]: token["id"] for token in document["added_tokens"]}
    assert ids == expected
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in document["model"]["merges"]]
    special = run.made.dataset.tokenizer.special_tokens
    assert fields["tokenizer.ggml.eos_token_id"] == special["[EOS]"]
    kinds = fields["tokenizer.ggml.token_type"]
    assert all(kinds[token_id] == gguf.TokenType.CONTROL for token_id in special.values())
    assert kinds[0] == gguf.TokenType.NORMAL
    assert fields["general.architecture"] == "deepseek2"
    assert fields["deepseek2.attention.q_lora_rank"] == 0
    assert fields["deepseek2.expert_weights_scale"] == pytest.approx(run.made.config.model.routed_scaling_factor)


def test_bf16_keeps_its_bits_and_vectors_are_fp32(run: PublishedRun, tmp_path: Path):
    manifest = run.publish(dtype="bf16", name="for-gguf", promote=False)
    folder = f"models/{manifest.name}/{manifest.version}"
    write_gguf(folder, run.made.storage, tmp_path / "a.gguf", "tiny")
    check_gguf(folder, run.made.storage, tmp_path / "a.gguf")
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["blk.1.ffn_up_exps.weight"] == gguf.GGMLQuantizationType.BF16
    assert kinds["blk.1.attn_norm.weight"] == kinds["blk.1.ffn_gate_inp.weight"] == gguf.GGMLQuantizationType.F32
    ours = run.made.model.state_dict()["embed_tokens.weight"].bfloat16().float().numpy()
    assert np.array_equal(tensors(tmp_path / "a.gguf")["token_embd.weight"], ours)


def test_a_flip_is_found(file: Path, run: PublishedRun, tmp_path: Path):
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    (tmp_path / "flipped.gguf").write_bytes(data)
    with pytest.raises(ValueError, match="read back is not the published tensor"):
        check_gguf(str(run.folder.relative_to(run.made.storage.root)), run.made.storage, tmp_path / "flipped.gguf")


def test_another_split_pattern_is_refused(run: PublishedRun, tmp_path: Path):
    storage = Storage(run.made.config.storage.model_copy(update={"root": str(tmp_path)}))
    for path in run.folder.iterdir():
        storage.write(f"m/{path.name}", path.read_bytes())
    document = json.loads(storage.read("m/tokenizer.json"))
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    storage.write("m/tokenizer.json", json.dumps(document).encode())
    with pytest.raises(ValueError, match=r"publishing.gguf: llama.cpp cannot read this tokenizer: .*set it to false"):
        write_gguf("m", storage, tmp_path / "x.gguf", "x")
