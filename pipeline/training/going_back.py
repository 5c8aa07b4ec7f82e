"""The decision to go back on a spike (left_out.py): where to, what is left out, and whether it may be."""

from __future__ import annotations

import sys

from pipeline.config.schema import RunConfig
from pipeline.dataset.order import total_sequences
from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage
from pipeline.training.guard import RunDiverged
from pipeline.training.left_out import Detour, LeftOut, left_out_path, order_of
from pipeline.workflow.record import add_event


class WentBack(Exception):
    """The run goes on from an earlier checkpoint, without the data after it."""


def decide(config: RunConfig, dataset: DatasetManifest, storage: Storage, before: LeftOut, detour: Detour) -> None:
    """Write the record that goes back, and say so with what to look at. Raises RunDiverged where it may not be."""
    spikes, sequence = config.training.spikes, config.training.sequence_length
    what = (
        f"step {detour.spike}: loss {detour.loss:.4g}, gradient norm {detour.gradient_norm:.4g}, far above the run's own "
        f"(training.spikes.deviations {spikes.deviations:g})"
    )
    begin, end = detour.left_out
    look = f"look at the data with jobs.inspect ... position {begin} to {end - 1}, and at train/metrics"
    if len(before.detours) >= spikes.go_back_limit:
        raise RunDiverged(
            f"{what}; the run has gone back {len(before.detours)} times already (training.spikes.go_back_limit): {look}, then lower the "
            "learning rate or raise the limit"
        )
    after = before.model_copy(update={"detours": (*before.detours, detour)})
    try:
        sequences = total_sequences(config.schedule, sequence)
        epochs = {source.name: source.max_epochs for source in config.corpus.sources}
        order_of(config, dataset, after.ranges).check_demand(sequences, epochs)
    except ValueError as error:
        raise RunDiverged(f"{what}; there is no data to go on with instead: {error}") from None
    storage.write(left_out_path(config.run_id), after.to_json())
    where = f"the checkpoint of step {detour.back_to}" if detour.back_to else "the beginning"
    print(
        f"{what}: the run goes back to {where} and leaves positions {begin:,} to {end:,} of the data out "
        f"({len(after.detours)} of at most {spikes.go_back_limit} times); {look}",
        file=sys.stderr,
        flush=True,
    )
    add_event(storage, config.run_id, "went back", "train", **detour.model_dump(mode="json"))
