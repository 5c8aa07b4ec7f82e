"""From a checkpoint to a published Hugging Face folder, and the gate in front of it.

    <root>/models/<name>/step-00000120-1a2b3c4d/
        config.json generation_config.json            DeepseekV3ForCausalLM, read by transformers without remote code
        model-00001-of-00002.safetensors ...          weights in `publishing.dtype`, router biases in fp32
        model.safetensors.index.json
        tokenizer.json tokenizer_config.json          and the chat templates that came with them
        README.md loss.png training_log.jsonl         the model card, and what was logged up to the checkpoint
        NAME-bf16.gguf                                with `publishing.gguf`: one file for llama.cpp (gguf_file.py)
        evaluation.json evaluation-documents.parquet  what it scored, and every document: later models are compared with it
        manifest.json                                 sha256 of every file and all digests; written last: the commit
        provenance.json                               where all of it comes from, as tools read it (provenance.py)

Every byte follows from the manifests and the configuration, and the version's name from their digests. A publisher that
was killed is cured by running it again: it writes the same bytes over the half-written folder. A version that exists is
not written again; only its promotion is completed.

The weight files are laid out before anything is written (layout.py), so any number of writers write the same bytes
(weights.py); here one after the other, on Ray several at a time. All of it is checked before it is committed (check.py).
Memory: a block of a piece a writer, and the first layers; only samples of text need the whole network.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import torch

from pipeline.config.schema import RunConfig
from pipeline.generation.sample import Sampling, generate
from pipeline.manifest import (
    CheckpointManifest,
    DatasetManifest,
    EvaluationManifest,
    FileEntry,
    ModelManifest,
    TokenizerManifest,
    TrainManifest,
    canonical_json,
)
from pipeline.model.hf import hf_config, load_hf
from pipeline.model.moonlight import Moonlight
from pipeline.model.shapes import count_parameters
from pipeline.publishing import registry
from pipeline.publishing.ask import ask, published_files
from pipeline.publishing.check import check_first_layers, check_texts, open_published
from pipeline.publishing.gate import require_score
from pipeline.publishing.gguf_file import check_gguf, write_gguf
from pipeline.publishing.layout import DTYPES, INDEX, index_of, plan_files
from pipeline.publishing.model_card import Sample, model_card
from pipeline.publishing.plots import loss_plot
from pipeline.publishing.provenance import write_provenance
from pipeline.publishing.version import PublishProgress, published_config, version_name
from pipeline.publishing.weights import Written, write_file
from pipeline.storage import Storage, sha256_of
from pipeline.tokenizer import Encoder
from pipeline.tokenizer.files import CONFIG_JSON, RANK_FILE, TOKENIZER_JSON, checked_files
from pipeline.training.branch import origin_of
from pipeline.training.files import CheckpointReader
from pipeline.training.metrics import read_metrics
from pipeline.training.retention import reading

WriteFiles = Callable[[RunConfig, CheckpointManifest, str], Iterable[Written]]
SAMPLE_TEMPERATURE = 0.8


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
    write_files: WriteFiles | None = None,
) -> ModelManifest:
    """Publish the evaluated checkpoint (the run's last one unless given) and promote it if `publishing.promote`.

    `check`: asked before the version is made to exist; raises if this process may not. `write_files(config, checkpoint, folder)`
    writes all weight files, in any order; None: here, one after the other.

    Raises GateError, before anything is written, where a gate is closed (gate.py), and ValueError when evaluation, checkpoint and dataset do not belong together.
    """
    checkpoint = checkpoint or train.checkpoint
    _check_inputs(checkpoint, evaluation, dataset)
    require_score(evaluation)
    name, version = config.publishing.name, version_name(config, checkpoint, evaluation, dataset)
    manifest = registry.find(storage, name, version)
    settled = manifest is not None and registry.is_settled(registry.latest(storage, name), manifest)
    ask(config.publishing, evaluation, storage, settled=settled).require()
    if manifest is None:
        manifest = _write(
            config, train, checkpoint, evaluation, dataset, storage, version, git_commit, report, check, write_files
        )
    else:
        registry.check(storage, manifest)
    write_provenance(storage, manifest, checkpoint, evaluation, dataset, origin_of(checkpoint.run_id, storage))
    if config.publishing.promote:

        def allowed() -> None:  # beside the model that is promoted by then
            ask(config.publishing, evaluation, storage).require("published, but not promoted")

        registry.promote(storage, manifest, allowed)
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
    write_files: WriteFiles | None,
) -> ModelManifest:
    folder = registry.folder(config.publishing.name, version)
    files: list[FileEntry] = []
    xxh3: dict[str, str] = {}
    layout = plan_files(config)
    total = sum(file.nbytes for file in layout)

    def put(name: str, data: bytes) -> None:
        storage.write(f"{folder}/{name}", data)
        files.append(FileEntry(path=name, bytes=len(data), sha256=registry.sha256_bytes(data)))

    storage.sweep(folder)
    with reading(storage, checkpoint.run_id, checkpoint.step):
        report(PublishProgress("weights", 0, total))
        for written in (write_files or partial(write_here, storage))(config, checkpoint, folder):
            files.append(written.entry)
            xxh3 |= written.xxh3
            report(PublishProgress(written.entry.path, sum(file.bytes for file in files), total))
    put(INDEX, registry.pretty_json(index_of(layout)))
    tokenizer = tokenizer_files(checked_files(dataset.tokenizer, storage), config)
    ids = _role_ids(dataset.tokenizer, tokenizer)
    fields = _config_json(config, ids)
    put("config.json", registry.pretty_json(fields))
    put("generation_config.json", registry.pretty_json(ids))  # a max_length makes max_new_tokens warn
    for name, data in tokenizer.items():
        put(name, data)

    report(PublishProgress("reading back", total, total))
    with reading(storage, checkpoint.run_id, checkpoint.step):
        tensors = open_published(config, layout, storage, folder, xxh3)
        check_first_layers(config, CheckpointReader(storage, checkpoint), tensors, fields, storage.uri(folder))

    if config.publishing.gguf:
        report(PublishProgress("gguf", total, total))
        files.append(_put_gguf(config, storage, folder))

    report(PublishProgress("samples and model card", total, total))
    log = [record for record in read_metrics(train.metrics, storage) if record["step"] <= checkpoint.step]
    put("training_log.jsonl", b"".join(canonical_json(record) + b"\n" for record in log))
    curve = [(record["tokens"], record["loss"]) for record in log if record["loss"] is not None]
    heldout = (checkpoint.tokens_seen, evaluation.overall.loss)
    title = f"{config.publishing.name}, step {checkpoint.step:,}"
    put("loss.png", loss_plot(curve, heldout, evaluation.unigram_entropy, title))
    samples = write_samples(config, dataset.tokenizer, storage, folder)
    for name, data in published_files(storage, evaluation).items():
        put(name, data)
    parameters = count_parameters(config.model)
    origin = origin_of(checkpoint.run_id, storage)
    card = model_card(config, dataset, train, checkpoint, evaluation, parameters, samples, origin)
    put("README.md", card.encode())

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
        dataset=dataset.identity,
    )
    check()
    return registry.commit(storage, manifest)


def _put_gguf(config: RunConfig, storage: Storage, folder: str) -> FileEntry:
    """The folder as one file, made and read back beside the program, then stored."""
    name = f"{config.publishing.name}-{config.publishing.dtype}.gguf"
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / name
        write_gguf(folder, storage, local, config.publishing.name)
        check_gguf(folder, storage, local)
        with local.open("rb") as handle:
            entry = FileEntry(path=name, bytes=local.stat().st_size, sha256=sha256_of(handle))
        storage.upload(local, f"{folder}/{name}")
    return entry


def write_here(storage: Storage, config: RunConfig, checkpoint: CheckpointManifest, folder: str) -> Iterator[Written]:
    """`publish`'s weight files, one after the other in this process."""
    reader = CheckpointReader(storage, checkpoint)
    return (write_file(file, reader, storage, folder) for file in plan_files(config))


# -- what stands beside the weights -------------------------------------------------------------------------------------


def tokenizer_files(stored: dict[str, bytes], config: RunConfig) -> dict[str, bytes]:
    """What is published of a stored tokenizer: all as it is, but for what the network decides, its limit and its inputs."""
    settings = {
        **orjson.loads(stored[CONFIG_JSON]),
        "model_max_length": config.model.max_position_embeddings,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    came_as_ranks = config.tokenizer.path is not None  # else they are only how this project keeps its own
    kept = {name: data for name, data in stored.items() if name != RANK_FILE or came_as_ranks}
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


def write_samples(config: RunConfig, tokenizer: TokenizerManifest, storage: Storage, folder: str) -> list[Sample]:
    """The likeliest and one random continuation of each of `publishing.sample_prompts`, by the weights in the published folder.

    Raises NotTheModel if transformers finds other continuations likelier."""
    prompts, seed = config.publishing.sample_prompts, config.seed
    if not prompts:
        return []
    encoder = Encoder.stored(tokenizer, storage)
    ways = [Sampling(), Sampling(SAMPLE_TEMPERATURE, seed=seed)]
    encoded = [encoder.encode([prompt.encode()])[0].tolist() for prompt in prompts]
    device = torch.device("cuda", torch.cuda.current_device()) if config.cluster.use_gpu else torch.device("cpu")
    with torch.device("meta"):
        model = Moonlight(config.model)
    model.to_empty(device=device)
    load_hf(model, folder, storage)
    found = generate(
        model.eval().requires_grad_(False),
        [prompt for prompt in encoded for _ in ways],
        ways * len(prompts),
        eos=encoder.eos_id,
        max_new_tokens=config.publishing.sample_tokens,
        max_positions=config.model.max_position_embeddings,
    )
    del model
    greedy = [([encoder.eos_id, *prompt], new) for prompt, new in zip(encoded, found[::2])]
    check_texts(storage, folder, greedy, config.model.max_position_embeddings, device)
    texts = [encoder.decode(new) for new in found]
    return [
        Sample(prompt, greedy, drawn, SAMPLE_TEMPERATURE, seed)
        for prompt, greedy, drawn in zip(prompts, texts[::2], texts[1::2], strict=True)
    ]
