"""A published folder as one GGUF file, which llama.cpp reads: architecture `deepseek2`, tokenizer and pre-tokenizer named.

What llama.cpp wants other than Hugging Face's names (`gguf.get_tensor_name_map` has its own):
- the experts of a layer as one tensor [E, out, in];
- `kv_b_proj` as two: the keys' part of each head transposed, the values' as it is, because it attends in the latent space;
- vectors and the router's weights in fp32, whatever the matrices are;
- `attention.q_lora_rank` 0 said aloud: left out it is guessed from the number of layers;
- the name of the pre-tokenizer, which it has in code. Converters find it by the ids of a test text, know none for a tokenizer that
  was trained yesterday, and give up ("BPE pre-tokenizer was not recognized"). What decides is the split pattern, and Moonlight's is
  called `kimi-k2` there.

Tensors are written one at a time: memory for one expert stack. `check_gguf` reads the file back with the package's reader.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.schema import ModelConfig
from pipeline.model.safetensors import TensorFiles
from pipeline.publishing.layout import INDEX
from pipeline.storage import Storage
from pipeline.tokenizer.files import CONFIG_JSON, TOKENIZER_JSON, split_pattern_of
from pipeline.tokenizer.given import CHAT_TEMPLATE
from pipeline.tokenizer.pattern import SPLIT_PATTERN
from pipeline.training.content import as_bytes

if TYPE_CHECKING:
    import gguf

PRE_TOKENIZERS = {SPLIT_PATTERN: "kimi-k2"}  # llama.cpp's names of split patterns
BF16_ARRAY = np.dtype(np.uint8)  # numpy has no bf16: GGUF takes its bytes


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: what it is made of, and how."""

    name: str
    sources: tuple[str, ...]  # published names; several: stacked
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: str = ""  # of kv_b_proj: "k" or "v"


def write_gguf(folder: str, storage: Storage, local: Path, name: str) -> None:
    """Write the published folder as a GGUF file at `local`. Raises ValueError for a tokenizer that llama.cpp has no name for."""
    import gguf  # here: only who asks for the file needs the package

    config = json.loads(storage.read(f"{folder}/config.json"))
    tensors = _open(folder, storage)
    network = ModelConfig.model_validate({key: config[key] for key in ModelConfig.model_fields})
    writer = gguf.GGUFWriter(local, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DEEPSEEK2])
    _describe(writer, network, config, name)
    for key, value in vocabulary(folder, storage, network.vocab_size).items():
        getattr(writer, f"add_{key}")(value)
    entries = list(layout(network, tensors))
    for entry in entries:
        half = entry.dtype == torch.bfloat16
        shape = (*entry.shape[:-1], 2 * entry.shape[-1]) if half else entry.shape
        nbytes = int(np.prod(entry.shape)) * entry.dtype.itemsize
        kind = gguf.GGMLQuantizationType.BF16 if half else None
        writer.add_tensor_info(entry.name, shape, BF16_ARRAY if half else np.dtype(np.float32), nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(_array(made(entry, tensors, network)))
    writer.close()


def check_gguf(folder: str, storage: Storage, local: Path) -> None:
    """Read the file back. Raises ValueError for the first tensor, token or name that is not the folder's."""
    import gguf

    config = json.loads(storage.read(f"{folder}/config.json"))
    network = ModelConfig.model_validate({key: config[key] for key in ModelConfig.model_fields})
    tensors = _open(folder, storage)
    reader = gguf.GGUFReader(local)
    found = {tensor.name: tensor for tensor in reader.tensors}
    expected = {entry.name: entry for entry in layout(network, tensors)}
    if found.keys() != expected.keys():
        raise ValueError(f"{local}: its tensors are not the folder's: {sorted(found.keys() ^ expected.keys())[:3]}")
    for name, entry in expected.items():
        ours, theirs = _array(made(entry, tensors, network)), found[name]
        same = tuple(map(int, theirs.shape)) == entry.shape[::-1] and _digest(ours) == _digest(theirs.data)
        if not same:
            raise ValueError(f"{local}: {name} read back is not the published tensor")
    wanted = vocabulary(folder, storage, network.vocab_size)
    for key, value in (
        ("tokens", wanted["token_list"]),
        ("merges", wanted["token_merges"]),
        ("pre", wanted["tokenizer_pre"]),
    ):
        field = reader.fields[f"tokenizer.ggml.{key}"]
        if field.contents() != value:
            raise ValueError(f"{local}: tokenizer.ggml.{key} read back is not the folder's")


def layout(network: ModelConfig, tensors: TensorFiles) -> Iterator[Entry]:
    """The tensors of the file, in the order of the published ones."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, network.num_hidden_layers)

    def called(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, f"llama.cpp has no name for {name}"
        return str(found)

    for name, entry in tensors.entries.items():
        if ".mlp.experts." in name:
            head, _, tail = name.partition(".mlp.experts.")
            expert, projection = tail.split(".", 1)
            if expert == "0":
                stack = tuple(f"{head}.mlp.experts.{e}.{projection}" for e in range(network.n_routed_experts))
                shape = (network.n_routed_experts, *entry.shape)
                yield Entry(called(f"{head}.mlp.experts.{projection}"), stack, shape, entry.dtype)
        elif name.endswith("kv_b_proj.weight"):
            heads, rank = network.num_attention_heads, network.kv_lora_rank
            keys = (heads, rank, network.qk_nope_head_dim)
            yield Entry(called(name.replace("kv_b_proj", "k_b_proj")), (name,), keys, entry.dtype, "k")
            values = (heads, network.v_head_dim, rank)
            yield Entry(called(name.replace("kv_b_proj", "v_b_proj")), (name,), values, entry.dtype, "v")
        elif name.endswith("e_score_correction_bias"):
            yield Entry(called(name.removesuffix("_bias") + ".bias"), (name,), entry.shape, torch.float32)
        else:
            single = len(entry.shape) == 1 or name.endswith(".mlp.gate.weight")
            yield Entry(called(name), (name,), entry.shape, torch.float32 if single else entry.dtype)


def made(entry: Entry, tensors: TensorFiles, network: ModelConfig) -> Tensor:
    """The entry's numbers, from the published tensors."""
    if len(entry.sources) > 1:
        stack = torch.empty(entry.shape, dtype=entry.dtype)
        for row, name in zip(stack, entry.sources):
            row.copy_(tensors.read(name))
        return stack
    whole = tensors.read(entry.sources[0])
    if entry.part:
        parts = whole.view(network.num_attention_heads, network.qk_nope_head_dim + network.v_head_dim, -1)
        keys, values = parts.split([network.qk_nope_head_dim, network.v_head_dim], dim=1)
        whole = keys.transpose(1, 2) if entry.part == "k" else values
    return whole.to(entry.dtype).contiguous()


def vocabulary(folder: str, storage: Storage, size: int) -> dict[str, Any]:
    """The tokenizer's part of the file, by the names of the writer's methods without `add_`."""
    import gguf

    document = json.loads(storage.read(f"{folder}/{TOKENIZER_JSON}"))
    pattern = split_pattern_of(document)
    if pattern not in PRE_TOKENIZERS:
        raise ValueError(
            f"publishing.gguf: llama.cpp cannot read this tokenizer: it has no pre-tokenizer that splits text by {pattern!r}; "
            "set it to false"
        )
    added = {token["id"]: token for token in document["added_tokens"]}
    by_id = {token_id: token for token, token_id in document["model"]["vocab"].items()}
    by_id |= {token_id: token["content"] for token_id, token in added.items()}
    kinds = []
    for token_id in range(size):
        token = added.get(token_id)
        if token is not None:
            kinds.append(gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL if token_id in by_id else gguf.TokenType.UNUSED)
    settings = json.loads(storage.read(f"{folder}/{CONFIG_JSON}"))
    ids = json.loads(storage.read(f"{folder}/generation_config.json"))
    found = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": PRE_TOKENIZERS[pattern],
        "token_list": [by_id.get(token_id, f"[PAD{token_id}]") for token_id in range(size)],
        "token_types": [int(kind) for kind in kinds],
        "token_merges": [" ".join(pair) for pair in document["model"]["merges"]],
        "add_bos_token": False,
    }
    found |= {key: ids[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in ids}
    template = storage.read_or_none(f"{folder}/{CHAT_TEMPLATE}")
    template_text = template.decode() if template is not None else settings.get("chat_template")
    return found | ({"chat_template": template_text} if template_text else {})


def _describe(writer: gguf.GGUFWriter, network: ModelConfig, config: dict[str, Any], name: str) -> None:
    import gguf

    half = config["dtype"] == "bfloat16"
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if half else gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(network.vocab_size)
    writer.add_context_length(network.max_position_embeddings)
    writer.add_embedding_length(network.hidden_size)
    writer.add_block_count(network.num_hidden_layers)
    writer.add_leading_dense_block_count(network.first_k_dense_replace)
    writer.add_feed_forward_length(network.intermediate_size)
    writer.add_layer_norm_rms_eps(network.rms_norm_eps)
    writer.add_rope_freq_base(network.rope_theta)
    writer.add_rope_dimension_count(network.qk_rope_head_dim)
    writer.add_head_count(network.num_attention_heads)
    writer.add_head_count_kv(1)  # one latent head that all share
    writer.add_q_lora_rank(0)
    writer.add_kv_lora_rank(network.kv_lora_rank)
    writer.add_key_length(network.kv_lora_rank + network.qk_rope_head_dim)
    writer.add_value_length(network.kv_lora_rank)
    writer.add_key_length_mla(network.qk_head_dim)
    writer.add_value_length_mla(network.v_head_dim)
    writer.add_expert_feed_forward_length(network.moe_intermediate_size)
    writer.add_expert_count(network.n_routed_experts)
    writer.add_expert_shared_count(network.n_shared_experts)
    writer.add_expert_used_count(network.num_experts_per_tok)
    writer.add_expert_weights_scale(network.routed_scaling_factor)
    writer.add_expert_weights_norm(network.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _open(folder: str, storage: Storage) -> TensorFiles:
    index = json.loads(storage.read(f"{folder}/{INDEX}"))
    return TensorFiles(sorted(set(index["weight_map"].values())), lambda name: storage.open(f"{folder}/{name}"))


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype == torch.bfloat16:
        return np.frombuffer(as_bytes(tensor), np.uint8).reshape(*tensor.shape[:-1], 2 * tensor.shape[-1])
    return tensor.numpy()


def _digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()
