"""Weights in and out under the Hugging Face names of `DeepseekV3ForCausalLM`.

Ours differ in two places: the experts of a layer are one stack [E, out, in] instead of E matrices, and the router is
`mlp.router` instead of `mlp.gate`. Everything else is `model.` + our name, `lm_head` excepted.

Both ways are streamed. Import reads, for each parameter, only what this rank keeps of it (for expert stacks: single
experts; else the tensor, of which a shard is kept). Export gathers one parameter at a time; with sharded parameters
every rank must walk through `hf_tensors` to the end, because each gather is a collective.

A folder must hold exactly the model's tensors, and its config.json, if there is one, must describe the same network: heads
of another width, another rope_theta or another scaling factor fit the same shapes. It means what transformers makes of
it, so a key that it lacks has transformers' default, not ours. Rotary `inv_freq` buffers, which older
exports contain, are ignored. The router bias is fp32 here; the release stores it in bf16.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.tensor import DTensor

from pipeline.config.schema import ModelConfig, StorageConfig
from pipeline.integrity import read_checked
from pipeline.manifest import ModelManifest
from pipeline.model.moonlight import Moonlight
from pipeline.model.safetensors import TensorFiles
from pipeline.parallel.local import local_part, local_tensor
from pipeline.storage import Storage

NAMES_SHOWN = 5
NOT_OF_THE_WEIGHTS = {  # settings of config.json that may differ: they say nothing about what the weights compute
    "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "ep_size", "initializer_range",
    "max_position_embeddings", "torch_dtype", "use_cache",
}  # fmt: skip
ROPE = {"rope_theta", "rope_scaling"}  # transformers >= 5 knows them as rope_parameters


def hf_name(name: str) -> str:
    """Our name of a tensor -> the Hugging Face name; of an expert stack -> a pattern with `{expert}`."""
    if name.startswith("lm_head."):
        return name
    name = "model." + name.replace(".mlp.router.", ".mlp.gate.")
    head, experts, projection = name.partition(".mlp.experts.")
    return f"{head}.mlp.experts.{{expert}}.{projection}.weight" if experts else name


def hf_tensors(model: Moonlight) -> Iterator[tuple[str, Tensor]]:
    """All (name, full tensor) of the export, in the order of the model's state; dtypes as they are in the model.

    Tensors may share memory with the model: copy what you keep. Collective if the model is sharded.
    """
    for name, tensor in _state(model):
        yield from hf_split(name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def hf_split(name: str, full: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What one of our tensors is in the export: itself under its other name, or one matrix an expert."""
    if full.dim() == 3:
        for expert, matrix in enumerate(full):
            yield hf_name(name).format(expert=expert), matrix
    else:
        yield hf_name(name), full


def hf_shapes(model: Moonlight) -> dict[str, tuple[int, ...]]:
    """Name and shape of every exported tensor; the model may be on the meta device."""
    return {
        hf: tuple(part.shape)
        for name, tensor in _state(model)
        for hf, part in hf_split(name, torch.empty(tensor.shape, device="meta"))
    }


@torch.no_grad()
def load_hf(
    model: Moonlight, folder: str | Path, storage: Storage | None = None, manifest: ModelManifest | None = None
) -> None:
    """Fill the model from the safetensors files of `folder`: a local path, or with `storage` one below its root ("": the root).
    What `manifest` vouches for is checked before it is used.

    Raises ValueError that names the tensor or setting, what was found and expected, and the remedy, before anything is
    changed.
    """
    if storage is None:
        folder, storage = "", Storage(StorageConfig(root=str(folder)))
    where, prefix = storage.uri(str(folder)), f"{folder}/" if folder else ""
    names = {info.path.removeprefix(prefix) for info in storage.list(str(folder))}

    known = {entry.path: entry for entry in manifest.files} if manifest else {}
    xxh3 = manifest.xxh3 if manifest else {}

    def read(name: str) -> IO[bytes]:
        if name in known and name not in xxh3:
            return io.BytesIO(read_checked(storage, known[name], str(folder)))
        return storage.open(prefix + name)

    if "config.json" in names:
        with read("config.json") as file:
            _check_config(model.config, json.load(file), f"{where}/config.json")
    source = TensorFiles(_weight_files(names, read, where), read, xxh3)
    _check(hf_shapes(model), source, where)
    for name, tensor in _state(model):
        target, part = local_tensor(tensor), local_part(tensor)
        if tensor.dim() == 3:
            for row, expert in enumerate(range(tensor.shape[0])[part[0]]):
                target[row].copy_(source.read(hf_name(name).format(expert=expert))[part[1:]])
        elif target.numel():
            target.copy_(source.read(hf_name(name))[part])


def read_config(folder: str, storage: Storage) -> ModelConfig:
    """The network that the config.json of a folder below the storage's root describes ("": the root).

    Raises ValueError without one; whether it is a network of this kind is `load_hf`'s to say.
    """
    path = f"{folder}/config.json" if folder else "config.json"
    data = storage.read_or_none(path)
    if data is None:
        raise ValueError(f"{storage.uri(folder)}: there is no config.json; give a folder in the format of Hugging Face")
    there = _as_transformers_reads(json.loads(data), storage.uri(path))
    known = {name: there[name] for name in ModelConfig.model_fields if there.get(name) is not None}
    try:
        return ModelConfig.model_validate(known)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{storage.uri(path)}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def hf_config(
    config: ModelConfig, *, bos_token_id: int | None, eos_token_id: int, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """config.json of the export: everything `transformers` needs to build the same network, and nothing of the run."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "ep_size": 1,
        "first_k_dense_replace": config.first_k_dense_replace,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "kv_lora_rank": config.kv_lora_rank,
        "max_position_embeddings": config.max_position_embeddings,
        "moe_intermediate_size": config.moe_intermediate_size,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": config.n_routed_experts,
        "n_shared_experts": config.n_shared_experts,
        "norm_topk_prob": config.norm_topk_prob,
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_interleave": True,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "routed_scaling_factor": config.routed_scaling_factor,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "torch_dtype": dtype,
        "use_cache": True,
        "v_head_dim": config.v_head_dim,
        "vocab_size": config.vocab_size,
    }


def _state(model: Moonlight) -> Iterator[tuple[str, Tensor]]:
    """Parameters and router biases, layer by layer."""
    yield from model.state_dict().items()


def _weight_files(names: set[str], read: Callable[[str], IO[bytes]], folder: str) -> list[str]:
    if "model.safetensors.index.json" in names:
        with read("model.safetensors.index.json") as index:
            files = sorted(set(json.load(index)["weight_map"].values()))
        missing = sorted(set(files) - names)
        if missing:
            raise ValueError(
                f"{folder}: {missing[0]} is named in model.safetensors.index.json but not there; fetch it again"
            )
    else:
        files = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if not files:
        raise ValueError(f"{folder}: no *.safetensors file; give a Hugging Face model folder")
    return files


def _check_config(config: ModelConfig, found: dict[str, Any], where: str) -> None:
    there = _as_transformers_reads(found, where)
    problems = []
    for name, expected in hf_config(config, bos_token_id=None, eos_token_id=0).items():
        if name in NOT_OF_THE_WEIGHTS or there.get(name, expected) == expected:
            continue
        given = name in found or (name in ROPE and "rope_parameters" in found)
        value = repr(there[name]) if given else f"absent there, which transformers takes for {there[name]!r},"
        remedy = f"set model.{name}" if name in ModelConfig.model_fields else "this network has no other"
        problems.append(f"{name} is {value} {'there ' if given else ''}and {expected!r} here ({remedy})")
    if problems:
        raise ValueError(f"{where} describes another network: {'; '.join(problems)}")


def _as_transformers_reads(found: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of a config.json with its old names resolved and absent keys at transformers' defaults.

    Keys that transformers does not know are kept as they are; those of multi-token prediction, which it fills in, are not:
    whether there are such layers is known from the tensors.
    """
    from transformers import DeepseekV3Config  # here: 3 s, for runs that start from somebody's weights

    try:
        read = DeepseekV3Config.from_dict(dict(found)).to_dict()
    except (ValueError, TypeError, KeyError) as error:  # it validates types and kinds of rotary embedding
        raise ValueError(f"{where}: transformers refuses it: {' '.join(str(error).split())}") from None
    rope = read.get("rope_parameters") or {}
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    read |= {"rope_theta": rope.get("rope_theta"), "rope_scaling": scaling}
    if "num_nextn_predict_layers" not in found:
        read.pop("num_nextn_predict_layers", None)
    return read | {"model_type": found.get("model_type", read["model_type"])}


def _check(expected: dict[str, tuple[int, ...]], source: TensorFiles, folder: str) -> None:
    found = {name: e.shape for name, e in source.entries.items() if not name.endswith("rotary_emb.inv_freq")}
    remedy = "check that the model section of the config describes this folder's network"
    if missing := sorted(set(expected) - set(found)):
        raise ValueError(
            f"{folder}: {len(missing)} tensors are missing: {_some(missing)}; expected {missing[0]} of shape "
            f"{list(expected[missing[0]])}; fetch all shards, or {remedy}"
        )
    if extra := sorted(set(found) - set(expected)):
        raise ValueError(
            f"{folder}: {len(extra)} tensors are not part of the model: {_some(extra)}; found {extra[0]} of shape "
            f"{list(found[extra[0]])}; {remedy}"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{folder}: {name} has shape {list(found[name])}, expected {list(shape)}; {remedy}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
