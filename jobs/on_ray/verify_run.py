"""The checks of a run's checkpoints and of its published models, a Ray task each; a line per damaged file, a line of result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import ray

from jobs.on_ray.cluster import connect
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.integrity import read_record
from pipeline.manifest import DamagedRecord, ModelManifest
from pipeline.publishing import registry
from pipeline.storage import Storage, open_storage
from pipeline.training.commits import committed_steps

Check = tuple[str, Callable[..., list[str]], tuple[object, ...]]  # what it is, a function of the storage and these


def verify_checkpoints(config: RunConfig, storage: Storage) -> int:
    """Check every committed checkpoint of the run. Returns the exit code: 0 sound, 1 damaged."""
    steps = committed_steps(storage, config.run_id)
    return _all(config, storage, [(f"checkpoint of step {step}", _checkpoint, (config.run_id, step)) for step in steps])


def verify_models(config: RunConfig, storage: Storage) -> int:
    """Check every published version of `publishing.name`. Returns the exit code: 0 sound, 1 damaged."""
    name = config.publishing.name
    versions = [
        version
        for version in sorted(storage.names(f"models/{name}"))
        if storage.exists(f"{registry.folder(name, version)}/manifest.json")
    ]
    return _all(config, storage, [(f"model {name} {version}", _model, (name, version)) for version in versions])


def _all(config: RunConfig, storage: Storage, checks: Sequence[Check]) -> int:
    code = 0
    if not checks:
        print("verify: there is nothing of that kind", flush=True)
        return code
    with contextlib.nullcontext() if ray.is_initialized() else connect(config):
        remote = ray.remote(num_cpus=1, max_retries=3)(_check)
        running = [remote.remote(storage.config, function, arguments) for _, function, arguments in checks]
        for (name, _, _), reference in zip(checks, running):
            damage = ray.get(reference)
            for what in damage:
                print(f"verify: DAMAGED {what}", flush=True)
            print(f"verify: {name} is {'NOT sound' if damage else 'sound'}", flush=True)
            code = 1 if damage else code
    return code


def _check(storage: StorageConfig, function: Callable[..., list[str]], arguments: tuple[object, ...]) -> list[str]:
    return function(open_storage(storage), *arguments)


def _checkpoint(storage: Storage, run_id: str, step: int) -> list[str]:
    from pipeline.training.proof import check_checkpoint  # here: it brings torch

    return list(check_checkpoint(storage, run_id, step).damage)


def _model(storage: Storage, name: str, version: str) -> list[str]:
    try:
        manifest = read_record(storage, f"{registry.folder(name, version)}/manifest.json", ModelManifest)
    except DamagedRecord as error:
        return [str(error)]
    return [] if manifest is None else registry.verify(storage, manifest)
