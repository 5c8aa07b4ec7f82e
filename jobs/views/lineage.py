"""Where a published version comes from: checkpoint, dataset version, tokenizer, configuration, commit, down to the raw files."""

from __future__ import annotations

from collections.abc import Iterator

from botocore.exceptions import BotoCoreError

from data_prep.records import Plan, plan_path
from data_prep.units import Units
from pipeline.file_index import read_dataset
from pipeline.integrity import read_checked, read_record
from pipeline.manifest import CheckpointManifest, DatasetManifest, EvaluationManifest, ModelManifest
from pipeline.publishing import registry
from pipeline.publishing.ask import scored
from pipeline.publishing.registry import Latest
from pipeline.storage import Storage
from pipeline.training.commits import manifest_path, step_folder

FILES_SHOWN = 20  # raw files of a source


def lineage(storage: Storage, model: ModelManifest, current: Latest | None) -> Iterator[str]:
    """Line by line. What has been deleted since is said to be gone; a digest that differs is said, too."""
    promoted = current is not None and current.version == model.version
    yield f"model        {model.name} {model.version}{'  (promoted)' if promoted else ''}"
    yield f"             {storage.uri(registry.folder(model.name, model.version))}"
    size = sum(entry.bytes for entry in model.files)
    yield f"             digest {model.digest}, {len(model.files)} files, {size / 1e6:,.1f} MB"
    run = str(model.config.get("run_id", ""))
    yield f"run          {run}, identity {model.run_identity[:16]}"
    yield f"commit       {model.git_commit}"
    yield from _evaluation(storage, model)
    yield from _checkpoint(storage, model, run)
    dataset = _dataset(storage, model)
    if dataset is None:
        yield f"dataset      {model.dataset_digest[:16]}: gone from {storage.uri('datasets')}"
    else:
        yield f"dataset      {dataset.identity}"
        yield f"             digest {dataset.digest}, {dataset.tokens:,} tokens in {dataset.rows:,} rows"
    folder = "" if dataset is None else f", {storage.uri(dataset.tokenizer.folder)}"
    yield f"tokenizer    {model.tokenizer_sha256[:16]}{folder}"
    yield from _settings(model)
    if dataset is not None:
        yield from _raw_files(storage, dataset)


def _evaluation(storage: Storage, model: ModelManifest) -> Iterator[str]:
    try:
        found: EvaluationManifest | None = scored(storage, model).evaluation
    except ValueError as error:
        found = None
        yield f"evaluation   {model.evaluation_digest[:16]}: {error}"
    if found is not None:
        about = "" if found.overall.stderr is None else f" ± {found.overall.stderr:.4f}"
        yield (
            f"evaluation   {found.digest[:16]}: loss {found.overall.loss:.4f}{about} over {found.overall.documents:,} documents, "
            f"{found.overall.bits_per_byte:.4f} bits per byte"
        )


def _checkpoint(storage: Storage, model: ModelManifest, run: str) -> Iterator[str]:
    path = manifest_path(run, model.step)
    found = read_record(storage, path, CheckpointManifest) if run else None
    where = storage.uri(step_folder(run, model.step))
    if found is None:
        yield f"checkpoint   step {model.step:,}, {model.checkpoint_digest[:16]}: gone from {where}"
    elif found.digest != model.checkpoint_digest:
        yield f"checkpoint   step {model.step:,}, {model.checkpoint_digest[:16]}: {where} is another one, {found.digest[:16]}"
    else:
        yield f"checkpoint   step {model.step:,}, {where}"
        yield f"             digest {found.digest}, {found.tokens_seen:,} tokens seen, order {found.order_digest[:16]}"


def _dataset(storage: Storage, model: ModelManifest) -> DatasetManifest | None:
    """By the identity on record; of an older model the dataset with its digest is looked for."""
    names = [model.dataset] if model.dataset else sorted(storage.names("datasets"))
    for name in names:
        try:
            found = read_dataset(storage, name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if found.digest == model.dataset_digest:
            return found
    return None


def _settings(model: ModelManifest) -> Iterator[str]:
    """The settings that say most; `manifest.json` has all of them."""
    schedule, network = model.config["schedule"], model.config["model"]
    yield (
        f"settings     {network['num_hidden_layers']} layers of {network['hidden_size']}, {network['n_routed_experts']} experts, "
        f"{schedule['total_tokens']:,} tokens, {model.config['optimizer']['name']}, seed {model.config['seed']}"
    )


def _raw_files(storage: Storage, dataset: DatasetManifest) -> Iterator[str]:
    try:
        plan = read_record(storage, plan_path(dataset.identity), Plan)
        units = Units() if plan is None else Units.from_bytes(read_checked(storage, plan.units))
    except (OSError, BotoCoreError) as error:
        yield f"raw files    cannot be read: {error}"
        return
    if plan is None:
        yield "raw files    the dataset's plan is gone"
        return
    files: dict[str, dict[str, str]] = {}
    for unit in units:
        for part in unit.slices:
            files.setdefault(unit.source, {})[part.path] = part.identity
    for source in dataset.sources:
        found = sorted(files.get(source.name, {}).items())
        yield (
            f"raw files    {source.name}: {len(found):,} files, {source.counts.docs_out:,} documents used, {source.tokens:,} tokens"
        )
        for path, identity in found[:FILES_SHOWN]:
            yield f"             {path}  {identity[:23]}"
        if len(found) > FILES_SHOWN:
            yield f"             and {len(found) - FILES_SHOWN:,} more: {storage.uri(plan.units.path)}"
