"""From a checkpoint to a published Hugging Face folder, and the gate in front of it.

    <root>/models/<name>/step-00000120-1a2b3c4d/
        config.json generation_config.json            DeepseekV3ForCausalLM, read by transformers without remote code
        model-00001-of-00002.safetensors ...          weights in `publishing.dtype`, router biases in fp32
        model.safetensors.index.json
        tokenizer.json tokenizer_config.json          and the chat templates that came with them
        README.md loss.png                            the model card
        manifest.json                                 sha256 of every file and all digests; written last: the commit

Every byte follows from the manifests and the configuration, and the version's name from their digests. A publisher that
was killed is cured by running it again: it writes the same bytes over the half-written folder. A version that exists is
not written again; only its promotion is completed.

The tensors are read from the checkpoint block by block, in the network's order, and cut into files of at most
`publishing.shard_bytes` (one larger tensor makes a file of its own). Memory: one block in fp32 and one file (Moonlight:
8 GB); only samples of text need the whole network. A file passes through the local temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import orjson
import torch
import xxhash
from safetensors.torch import save_file

from pipeline.config.schema import RunConfig
from pipeline.evaluation.report import read_metrics
from pipeline.evaluation.weights import count_parameters, empty_model, load_model, stream_tensors
from pipeline.generation.sample import Sampling, generate
from pipeline.manifest import (
    CheckpointManifest,
    DatasetManifest,
    EvaluationManifest,
    FileEntry,
    ModelManifest,
    TokenizerManifest,
    TrainManifest,
)
from pipeline.model.hf import hf_config, hf_shapes, hf_split
from pipeline.model.moonlight import Moonlight
from pipeline.model.safetensors import header_of
from pipeline.publishing import registry
from pipeline.publishing.gate import refusal
from pipeline.publishing.model_card import Sample, model_card
from pipeline.publishing.plots import loss_plot
from pipeline.publishing.version import PublishProgress, published_config, version_name
from pipeline.storage import Storage, sha256_of
from pipeline.tokenizer import Encoder
from pipeline.tokenizer.files import CONFIG_JSON, RANK_FILE, TOKENIZER_JSON, checked_files
from pipeline.training.content import as_bytes
from pipeline.training.retention import reading

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUTER_BIAS = "e_score_correction_bias"  # stays fp32: it decides near-ties between experts
SAMPLE_TEMPERATURE = 0.8


class GateError(ValueError):
    """The model is not good enough to be published; the message has the loss and the limit."""


def publish(
    config: RunConfig,
    train: TrainManifest,
    evaluation: EvaluationManifest,
    dataset: DatasetManifest,
    storage: Storage,
    *,
    report: Callable[[PublishProgress], None],
    checkpoint: CheckpointManifest | None = None,
    git_commit: str = "unknown",
    check: Callable[[], None] = lambda: None,
) -> ModelManifest:
    """Publish the evaluated checkpoint (the run's last one unless given) and promote it if `publishing.promote`.

    `check`: asked before the version is made to exist; raises if this process may not. Raises GateError, before anything is written, for a loss over `publishing.max_loss` or one that is not finite, and
    ValueError when evaluation, checkpoint and dataset do not belong together.
    """
    checkpoint = checkpoint or train.checkpoint
    _check_inputs(checkpoint, evaluation, dataset)
    why = refusal(evaluation, config.publishing.max_loss)
    if why is not None:
        raise GateError(f"{why}; nothing was published or promoted")
    version = version_name(config, checkpoint, evaluation, dataset)
    manifest = registry.find(storage, config.publishing.name, version)
    if manifest is None:
        manifest = _write(config, train, checkpoint, evaluation, dataset, storage, version, git_commit, report, check)
    else:
        registry.check(storage, manifest)
    if config.publishing.promote:
        registry.promote(storage, manifest)
    return manifest


def _check_inputs(checkpoint: CheckpointManifest, evaluation: EvaluationManifest, dataset: DatasetManifest) -> None:
    if evaluation.checkpoint_digest != checkpoint.digest:
        raise ValueError(
            f"evaluation of step {evaluation.step} scored checkpoint {evaluation.checkpoint_digest[:8]}, not "
            f"{checkpoint.digest[:8]} (step {checkpoint.step}) that is to be published; evaluate that checkpoint first"
        )
    if evaluation.dataset_digest != dataset.digest:
        raise ValueError(
            f"evaluation of step {evaluation.step} used dataset {evaluation.dataset_digest[:8]}, not {dataset.digest[:8]}; "
            "evaluate again with this dataset"
        )


def _write(
    config: RunConfig,
    train: TrainManifest,
    checkpoint: CheckpointManifest,
    evaluation: EvaluationManifest,
    dataset: DatasetManifest,
    storage: Storage,
    version: str,
    git_commit: str,
    report: Callable[[PublishProgress], None],
    check: Callable[[], None],
) -> ModelManifest:
    folder = registry.folder(config.publishing.name, version)
    files: list[FileEntry] = []
    xxh3: dict[str, str] = {}

    def put(name: str, data: bytes) -> None:
        storage.write(f"{folder}/{name}", data)
        files.append(FileEntry(path=name, bytes=len(data), sha256=registry.sha256_bytes(data)))

    storage.sweep(folder)
    with reading(storage, checkpoint.run_id, checkpoint.step):
        files += write_weights(config, checkpoint, storage, folder, report, xxh3)
    tokenizer = tokenizer_files(checked_files(dataset.tokenizer, storage), config)
    ids = _role_ids(dataset.tokenizer, tokenizer)
    put("config.json", registry.pretty_json(_config_json(config, ids)))
    put("generation_config.json", registry.pretty_json(ids))  # a max_length makes max_new_tokens warn
    for name, data in tokenizer.items():
        put(name, data)

    report(PublishProgress("samples and model card", 0, 0))
    curve = [
        (record["tokens"], record["loss"]) for record in read_metrics(train, storage) if record["loss"] is not None
    ]
    heldout = (checkpoint.tokens_seen, evaluation.overall.loss)
    title = f"{config.publishing.name}, step {checkpoint.step:,}"
    put("loss.png", loss_plot(curve, heldout, evaluation.unigram_entropy, title))
    samples = []
    if config.publishing.sample_prompts:
        model = load_model(config, checkpoint, storage)
        samples = write_samples(model, config, Encoder.stored(dataset.tokenizer, storage))
    parameters = count_parameters(config.model)
    put("README.md", model_card(config, dataset, train, checkpoint, evaluation, parameters, samples).encode())

    manifest = ModelManifest(
        name=config.publishing.name,
        version=version,
        files=tuple(sorted(files, key=lambda entry: entry.path)),
        checkpoint_digest=checkpoint.digest,
        evaluation_digest=evaluation.digest,
        dataset_digest=dataset.digest,
        tokenizer_sha256=dataset.tokenizer.sha256,
        run_identity=checkpoint.run_identity,
        config=published_config(config),
        git_commit=git_commit,
        step=checkpoint.step,
        loss=evaluation.overall.loss,
        bits_per_byte=evaluation.overall.bits_per_byte,
        xxh3=xxh3,
    )
    check()
    return registry.commit(storage, manifest)


# -- weights -----------------------------------------------------------------------------------------------------------


def published_dtype(name: str, dtype: str) -> torch.dtype:
    return torch.float32 if name.endswith(ROUTER_BIAS) else DTYPES[dtype]


def plan_shards(sizes: Iterable[tuple[str, int]], limit: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `limit` bytes; a larger tensor is alone in its group."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def write_weights(
    config: RunConfig,
    checkpoint: CheckpointManifest,
    storage: Storage,
    folder: str,
    report: Callable[[PublishProgress], None],
    xxh3: dict[str, str] | None = None,
) -> Iterator[FileEntry]:
    """Write the safetensors files and their index; yields an entry for each as soon as it is in storage.

    `xxh3` is filled with the checksums of tensors and headers (`ModelManifest.xxh3`).
    """
    dtype, shapes = config.publishing.dtype, hf_shapes(empty_model(config.model))
    sizes = {name: prod(shape) * published_dtype(name, dtype).itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes.items(), config.publishing.shard_bytes)
    total, done = sum(sizes.values()), 0
    tensors = (
        part for name, full in stream_tensors(config.model, checkpoint, storage) for part in hf_split(name, full)
    )
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        report(PublishProgress(file, done, total))
        contents = {}
        for expected in names:
            name, tensor = next(tensors)
            assert name == expected, f"the checkpoint gives {name} where {expected} was announced"
            contents[name] = tensor.to(published_dtype(name, dtype), copy=True)  # a view would hold its whole stack
            weight_map[name] = file
            done += sizes[name]
        yield _upload(contents, storage, folder, file, {} if xxh3 is None else xxh3)
    index = {
        "metadata": {"total_parameters": sum(map(prod, shapes.values())), "total_size": total},
        "weight_map": weight_map,
    }
    data = registry.pretty_json(index)
    storage.write(f"{folder}/model.safetensors.index.json", data)
    yield FileEntry(path="model.safetensors.index.json", bytes=len(data), sha256=registry.sha256_bytes(data))
    report(PublishProgress("weights written", done, total))


def _upload(
    contents: dict[str, torch.Tensor], storage: Storage, folder: str, file: str, xxh3: dict[str, str]
) -> FileEntry:
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / file
        save_file(contents, local, metadata={"format": "pt"})
        with local.open("rb") as handle:
            xxh3[file] = xxhash.xxh3_128_hexdigest(header_of(handle))
            handle.seek(0)
            entry = FileEntry(path=file, bytes=local.stat().st_size, sha256=sha256_of(handle))
        xxh3 |= {name: xxhash.xxh3_128_hexdigest(as_bytes(tensor)) for name, tensor in contents.items()}
        storage.upload(local, f"{folder}/{file}")
    return entry


# -- what stands beside the weights -------------------------------------------------------------------------------------


def tokenizer_files(stored: dict[str, bytes], config: RunConfig) -> dict[str, bytes]:
    """What is published of a stored tokenizer: all as it is, but for what the network decides, its limit and its inputs."""
    settings = {
        **orjson.loads(stored[CONFIG_JSON]),
        "model_max_length": config.model.max_position_embeddings,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    kept = {name: data for name, data in stored.items() if name != RANK_FILE}
    return {**kept, CONFIG_JSON: registry.pretty_json(settings)}


def _role_ids(tokenizer: TokenizerManifest, files: dict[str, bytes]) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id as the published tokenizer gives them; a role that it has not is absent."""
    settings = orjson.loads(files[CONFIG_JSON])
    ids = {token["content"]: token["id"] for token in orjson.loads(files[TOKENIZER_JSON])["added_tokens"]}
    found = {}
    for role in ("bos", "eos", "pad"):
        token = settings.get(f"{role}_token")
        if token is not None:
            found[f"{role}_token_id"] = ids[token["content"] if isinstance(token, dict) else token]
    assert found["eos_token_id"] == tokenizer.eos_id, (
        f"tokenizer: EOS is {found['eos_token_id']}, not {tokenizer.eos_id}"
    )
    return found


def _config_json(config: RunConfig, ids: dict[str, int]) -> dict[str, Any]:
    bos, eos, pad = (ids.get(f"{role}_token_id") for role in ("bos", "eos", "pad"))
    assert eos is not None
    dtype = str(DTYPES[config.publishing.dtype]).removeprefix("torch.")
    fields = hf_config(config.model, bos_token_id=bos, eos_token_id=eos, dtype=dtype)
    return {**fields, "dtype": dtype, "pad_token_id": pad}


def write_samples(model: Moonlight, config: RunConfig, encoder: Encoder) -> list[Sample]:
    """The likeliest and one random continuation of each of `publishing.sample_prompts`."""
    prompts, seed = config.publishing.sample_prompts, config.seed
    ways = [Sampling(), Sampling(SAMPLE_TEMPERATURE, seed=seed)]
    found = generate(
        model,
        [encoder.encode([prompt.encode()])[0].tolist() for prompt in prompts for _ in ways],
        ways * len(prompts),
        eos=encoder.eos_id,
        max_new_tokens=config.publishing.sample_tokens,
        max_positions=config.model.max_position_embeddings,
    )
    texts = [encoder.decode(new) for new in found]
    return [
        Sample(prompt, greedy, drawn, SAMPLE_TEMPERATURE, seed)
        for prompt, greedy, drawn in zip(prompts, texts[::2], texts[1::2], strict=True)
    ]
