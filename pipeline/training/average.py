"""The mean of the weights of the last checkpoints, as a checkpoint of its own: `publishing.average_last`.

    <root>/runs/<run_id>/average/step-00000400-last-3/    pieces, and the manifest that commits them

Of parameters and router biases alike, in fp32: the checkpoints are added up from the oldest to the newest and the sum is
divided by their number. There is no optimizer's state in it, so nothing trains on from it; it is evaluated and published as
any checkpoint is. Averaging the tail of a schedule whose rate has not come down yet does what its last decay would do (stochastic
weight averaging, arXiv 1803.05407; of pre-training checkpoints, arXiv 2306.03241).

Memory: two copies of the largest tensor (Moonlight: 2.7 GB), whatever the network and the number of checkpoints: the writer asks for
a tensor when it writes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import save

from pipeline.config.load import ConfigError
from pipeline.config.schema import ModelConfig, RunConfig
from pipeline.manifest import CheckpointManifest
from pipeline.model.moonlight import Moonlight
from pipeline.storage import Storage
from pipeline.training.checkpoint import cause_of, load_tensors
from pipeline.training.commits import MANIFEST, average_folder, committed_steps, find_average, parts_of, read_manifest
from pipeline.training.files import CheckpointReader, CheckpointWriter
from pipeline.training.retention import averaged_steps, reading

Report = Callable[[str, int, int], None]  # tensor, tensors done, of all


def make_average(config: RunConfig, storage: Storage, report: Report = lambda *_: None) -> CheckpointManifest:
    """Average the checkpoints that `publishing.average_last` means; an average that is there is returned as it is.

    Raises ConfigError that names a checkpoint which is gone, ValueError for one of another network, and DamagedCheckpoint.
    """
    steps = averaged_steps(config)
    folder = average_folder(config.run_id, steps[-1], len(steps))
    sources = [_source(config, storage, step) for step in steps]
    found = find_average(storage, config.run_id, steps)
    if found is not None:
        return found
    manifest = sources[-1].model_copy(
        update={
            "average_of": steps,
            "average_content": tuple(source.content_sha256 for source in sources),
            "files": (),
            "metrics": (),
            "loss": None,
            "fence": None,
        }
    )
    storage.delete(f"{folder}/{MANIFEST}")
    with contextlib.ExitStack() as pins:
        for step in steps:
            pins.enter_context(reading(storage, config.run_id, step))
        readers = [CheckpointReader(storage, source) for source in sources]
        writer = CheckpointWriter(storage, parts_of(manifest))
        state = _empty_state(config.model)
        try:
            save(state, storage_writer=writer, planner=_Means(readers, report, len(state)), no_dist=True)
        except CheckpointException as error:
            raise cause_of(error) from error
    made = manifest.model_copy(
        update={
            "files": tuple(writer.files),
            "metadata_sha256": writer.metadata_sha256,
            "content_sha256": writer.content_sha256,
        }
    )
    storage.write(f"{folder}/{MANIFEST}", made.to_json())
    return made


def mean_of(readers: list[CheckpointReader], name: str, like: Tensor) -> Tensor:
    """(x_1 + x_2 + ... + x_k) / k of one tensor, in fp32. `like` has its shape."""

    def check(stored: dict[str, tuple[int, ...]]) -> None:
        if stored.get(name) != tuple(like.shape):
            raise ValueError(
                f"a checkpoint to be averaged has {name} of shape {stored.get(name)}, expected {tuple(like.shape)}; use the model "
                "section that the run was trained with"
            )

    total = torch.zeros(like.shape, dtype=torch.float32)
    part = torch.empty(like.shape, dtype=torch.float32)
    for number, reader in enumerate(readers):
        load_tensors({name: part}, reader, None, check)
        if number:
            total += part
        else:
            total.copy_(part)
    return total.div_(len(readers))


class _Means(DefaultSavePlanner):
    """Makes each tensor when it is written."""

    def __init__(self, readers: list[CheckpointReader], report: Report, total: int) -> None:
        super().__init__()
        self._readers, self._report, self._total, self._done = readers, report, total, 0

    def resolve_data(self, write_item: WriteItem) -> Any:
        name = write_item.index.fqn
        self._report(name, self._done, self._total)
        self._done += 1
        return mean_of(self._readers, name, self.lookup_object(write_item.index))


def _empty_state(config: ModelConfig) -> dict[str, Tensor]:
    """Names and shapes of what a checkpoint has of the network."""
    with torch.device("meta"):
        state: dict[str, Tensor] = Moonlight(config).state_dict()
    assert all(tensor.is_floating_point() for tensor in state.values())
    return state


def _source(config: RunConfig, storage: Storage, step: int) -> CheckpointManifest:
    found = read_manifest(storage, config.run_id, step)
    if found is None:
        raise ConfigError(
            f"publishing.average_last {config.publishing.average_last}: there is no checkpoint of step {step}; there are "
            f"{committed_steps(storage, config.run_id)}: lower it, or set it before the run is trained, so that they are kept"
        )
    return found
