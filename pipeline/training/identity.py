"""What makes two runs the same run.

A checkpoint may be continued exactly by the configuration that would have produced it. Its identity holds everything
that decides the losses: network, optimizer, schedules, data order, seed, and the settings of the loss. It leaves out
how the work is spread and watched (meshes, micro-batches, recomputation, storage, cluster, logging), because those may
change from one start to the next. `skip_sequences` is special: it exists to be changed in mid-run, so two runs agree on
it as far as they have got. So is what is done about spikes: it is part of what a run was, and may change where it stands.
"""

from __future__ import annotations

from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.dataset.order import Order
from pipeline.manifest import DatasetManifest, digest_of

# Where, in what pieces and with which products the updates are computed.
MECHANICS_OF_MUON = {"bucket_bytes", "hsdp_split", "products"}
DECIDE_THE_LOSS = {
    "sequence_length",
    "compute_dtype",
    "document_mask",
    "aux_loss_weight",
    "initial_weights",
    "skip_sequences",
}
LATER = {"expert_products": "compute_dtype"}  # settings with what they were before there was a choice
SKIPS = "training.skip_sequences"
SPIKES = "training.spikes."


def identity_of(config: RunConfig, dataset_digest: str, order: dict[str, Any]) -> dict[str, Any]:
    """Flat: `model.hidden_size` -> 2048, ... with the dataset's digest as `dataset` and the constants of the data order
    (`Order.describe()`) as `order.lanes`, `order.sources.web`, ..., so that a difference says what changed."""
    values: dict[str, Any] = {
        "seed": config.seed,
        "dataset": dataset_digest,
        "order": order,
        "model": config.model.model_dump(mode="json"),
        "optimizer": config.optimizer.model_dump(mode="json", exclude={"muon": MECHANICS_OF_MUON}),
        "schedule": config.schedule.model_dump(mode="json"),
        "training": config.training.model_dump(mode="json", include=DECIDE_THE_LOSS),
    }
    if config.optimizer.muon.momentum_dtype == "fp32":  # as it was before there was a choice
        del values["optimizer"]["muon"]["momentum_dtype"]
    spikes = config.training.spikes
    if spikes.action != "count":
        decide = {"action", "deviations", "horizon_steps", *(["go_back_steps"] if spikes.action == "go_back" else [])}
        values["training"]["spikes"] = spikes.model_dump(mode="json", include=decide)
    if config.training.expert_products != "compute_dtype":
        values["training"]["expert_products"] = config.training.expert_products
    if config.training.loss_on != "all":
        values["training"]["loss_on"] = config.training.loss_on
    if config.training.start_from is not None:
        values["training"] |= config.training.model_dump(mode="json", include={"start_from", "start_position"})
    return dict(_flatten("", values))


def as_before(training: dict[str, Any]) -> dict[str, Any]:
    """A section `training` without settings that came later than names made of whole sections, where they are not used: such names stay."""
    return {key: value for key, value in training.items() if LATER.get(key, ...) != value}


def run_identity(config: RunConfig, dataset: DatasetManifest) -> str:
    """`TrainManifest.identity` of the run, before it has run."""
    return identity_digest(identity_of(config, dataset.digest, Order.of_run(config, dataset).describe()))


def identity_digest(identity: dict[str, Any]) -> str:
    return digest_of(identity)


def differences(ours: dict[str, Any], theirs: dict[str, Any], position: int) -> list[str]:
    """Every key, with both values, that forbids continuing a checkpoint that has consumed data up to a global position."""
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        if key.startswith(SPIKES):
            continue
        mine, other = ours.get(key), theirs.get(key)
        if key == SKIPS:
            mine, other = _before(mine, position), _before(other, position)
        if mine != other:
            found.append(f"{key} is {mine!r} here and {other!r} there")
    return found


def _before(ranges: Any, position: int) -> list[list[int]]:
    return sorted([begin, min(end, position)] for begin, end in ranges or [] if begin < position)


def _flatten(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [pair for key, inner in value.items() for pair in _flatten(f"{prefix}.{key}" if prefix else key, inner)]
