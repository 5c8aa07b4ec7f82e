"""The units and the tokenizer of a dataset version, committed before any of the work so that every run and restart does the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial

from data_prep.listing import Listing
from data_prep.plan import Unit, plan_source, unit_settings
from data_prep.readers import is_json_lines, row_group_bytes
from data_prep.records import Plan, PrepareProgress, Report, plan_path, units_path
from data_prep.tokenize_unit import open_input
from data_prep.tokenizer_stage import ensure_tokenizer
from data_prep.units import Units
from pipeline.config.schema import RunConfig
from pipeline.integrity import read_checked
from pipeline.manifest import FileEntry, TokenizerManifest
from pipeline.storage import Storage


def plan_dataset(
    config: RunConfig, storage: Storage, listings: dict[str, Listing], dataset_identity: str, report: Report
) -> Plan:
    """The plan that was committed for this identity, or a new one. Of concurrent planners the first one's holds."""
    path = plan_path(dataset_identity)
    if not storage.exists(path):
        report(PrepareProgress("tokenizer", 0, 1, 0, 0, 0, 0, 0.0))
        tokenizer = ensure_tokenizer(config, storage, listings)
        units = Units(planned_units(config, listings, tokenizer, known_units(storage)))
        data = units.to_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        entry = FileEntry(path=units_path(dataset_identity, sha256), bytes=len(data), sha256=sha256)
        storage.write(entry.path, data)
        plan = Plan(identity=dataset_identity, tokenizer=tokenizer, units=entry, count=len(units))
        storage.create(path, plan.to_json())
    return Plan.parse(storage.read(path), path)


def planned_units(
    config: RunConfig, listings: dict[str, Listing], tokenizer: TokenizerManifest, known: Units
) -> Iterator[Unit]:
    """Of all sources, in the order of a plan. `known`: units of earlier plans here."""
    for source in config.corpus.sources:
        settings = unit_settings(source, config.corpus, tokenizer.sha256)
        files, unit_bytes = listings[source.name], config.corpus.unit_bytes
        groups, lines = partial(_row_group_bytes, files.root, config), partial(_is_json_lines, files.root, config)
        yield from plan_source(source, files, unit_bytes, settings, known, groups, lines)


def known_units(storage: Storage) -> Units:
    """Units of earlier plans here, larger plans first: a later version of a dataset contains the earlier ones."""
    heads = [entry.path for entry in storage.list("datasets/plans") if entry.path.endswith(".json")]
    plans = [Plan.parse(storage.read(path), path) for path in heads]
    seen: set[str] = set()

    def new() -> Iterator[Unit]:
        for plan in sorted(plans, key=lambda plan: (-plan.count, plan.identity)):
            for unit in read_units(storage, plan):
                if unit.id not in seen:
                    seen.add(unit.id)
                    yield unit

    return Units(new())


def read_units(storage: Storage, plan: Plan) -> Units:
    """Raises DamagedFile."""
    return Units.from_bytes(read_checked(storage, plan.units))


def _row_group_bytes(root: str, config: RunConfig, path: str) -> list[int] | None:
    with open_input(root, path, config.storage) as file:
        return row_group_bytes(file)


def _is_json_lines(root: str, config: RunConfig, path: str) -> bool:
    with open_input(root, path, config.storage) as file:
        return is_json_lines(path, file)
