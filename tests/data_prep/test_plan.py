"""Plans: every byte of every file in exactly one unit, units of the right size, old units untouched when files come."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.listing import InputFile
from data_prep.plan import Unit, plan_source, unit_id
from data_prep.units import Units
from pipeline.config.schema import SourceConfig

SOURCE = SourceConfig(name="main", path="/corpus")
SETTINGS = {"tokenizer": "abc"}
UNIT = 1000
FILES = st.dictionaries(
    st.tuples(st.integers(0, 60), st.sampled_from(["txt", "jsonl", "jsonl.gz", "parquet"])),
    st.integers(0, 5000),
    max_size=30,
)


def listing(sizes: dict[tuple[int, str], int]) -> list[InputFile]:
    return [InputFile(f"{name:03d}.{ending}", size, f"sha256:{name}-{size}") for (name, ending), size in sizes.items()]


def row_groups(path: str) -> list[int]:
    return [400, 700, 1200, 10, 90] if int(path[:3]) % 2 else [100] * 50


def plan(files: list[InputFile], known: list[Unit] | None = None) -> list[Unit]:
    return list(plan_source(SOURCE, files, UNIT, SETTINGS, known or [], row_groups))


@settings(derandomize=True, max_examples=100, deadline=None)
@given(FILES)
def test_every_byte_in_one_unit(sizes: dict[tuple[int, str], int]) -> None:
    files = listing(sizes)
    units = plan(files)
    for file in files:
        slices = [part for unit in units for part in unit.slices if part.path == file.path]
        assert {(part.bytes, part.identity) for part in slices} == {(file.bytes, file.identity)}
        if slices[0].stop is None:
            assert len(slices) == 1
            continue
        end = len(row_groups(file.path)) if file.path.endswith("parquet") else file.bytes
        edges = [edge for part in slices for edge in (part.start, part.stop)]
        assert edges == sorted(edges)
        assert (edges[0], edges[-1]) == (0, end)
        assert edges[1:-1:2] == edges[2:-1:2]
    assert len({unit.id for unit in units}) == len(units)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(FILES)
def test_units_are_size_balanced(sizes: dict[tuple[int, str], int]) -> None:
    """No unit of several slices that hold something is over the size; two neighbours would not fit in one."""
    units = plan(listing(sizes))
    for unit in units:
        assert sum(part.size > 0 for part in unit.slices) <= 1 or unit.size <= UNIT
    for one, two in zip(units, units[1:]):
        assert one.size + two.slices[0].size > UNIT


@settings(derandomize=True, max_examples=100, deadline=None)
@given(FILES, st.randoms(use_true_random=False))
def test_the_order_of_the_listing_is_irrelevant(sizes: dict[tuple[int, str], int], rng: random.Random) -> None:
    files = listing(sizes)
    shuffled = rng.sample(files, len(files))
    assert plan(files) == plan(shuffled)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(FILES, FILES)
def test_growth_keeps_old_units(old: dict[tuple[int, str], int], new: dict[tuple[int, str], int]) -> None:
    first = plan(listing(old))
    added = {(name + 61, ending): size for (name, ending), size in new.items()} | {
        (-name - 1, e): s for (name, e), s in new.items()
    }
    second = plan(listing(old) + listing(added), known=first)
    assert second[: len(first)] == first
    assert {unit.generation for unit in second[len(first) :]} <= {1 if first else 0}
    third = plan(listing(old) + listing(added), known=second)
    assert third == second


def test_a_changed_file_is_planned_anew() -> None:
    files = [InputFile(f"{name:03d}.txt", 600, f"sha256:{name}") for name in range(4)]
    first = plan(files)
    changed = [files[0], InputFile("001.txt", 600, "sha256:other"), *files[2:]]
    second = plan(changed, known=first)
    assert [unit.id for unit in second[:3]] == [first[0].id, first[2].id, first[3].id]
    assert second[3].slices[0].identity == "sha256:other"
    assert second[3].generation == 1


def test_slices_of_a_file_stay_together() -> None:
    """A known unit with part of a file is no use when the unit with the other part does not fit the settings any more."""
    first = plan([InputFile("001.jsonl", 3000, "sha256:x")])
    broken = [first[0], Unit("other", "main", first[1].slices), *first[2:]]
    assert plan([InputFile("001.jsonl", 3000, "sha256:x")], known=broken) == first


def test_identity_covers_settings() -> None:
    unit = plan([InputFile("001.txt", 5, "sha256:x")])[0]
    assert unit.id == unit_id(unit.slices, SETTINGS) != unit_id(unit.slices, {"tokenizer": "xyz"})


@settings(derandomize=True, max_examples=50, deadline=None)
@given(FILES, FILES)
def test_units_are_stored_as_they_are(first: dict[tuple[int, str], int], second: dict[tuple[int, str], int]) -> None:
    planned = plan(listing(first)) + plan_of_another(second)
    units = Units(planned)
    assert list(units) == planned
    assert [units[place] for place in range(len(planned))] == planned == units[:]
    assert (units.ids, units.generations) == ([unit.id for unit in planned], [unit.generation for unit in planned])
    assert sorted(units.of("main") + units.of("other")) == list(range(len(planned)))
    again = Units.from_bytes(units.to_bytes())
    assert (list(again), again.ids, again.sources, again.generations) == (
        planned,
        units.ids,
        units.sources,
        units.generations,
    )


def plan_of_another(sizes: dict[tuple[int, str], int]) -> list[Unit]:
    return list(
        plan_source(SOURCE.model_copy(update={"name": "other"}), listing(sizes), UNIT, SETTINGS, (), row_groups)
    )


def test_a_file_in_two_known_units_is_planned_once() -> None:
    """Of earlier plans that overlap, the first unit that still holds has the file."""
    files = [InputFile(f"{name:03d}.txt", 400, f"sha256:{name}") for name in range(4)]
    first = plan(files)
    other = plan(files[1:])
    known = first + [unit for unit in other if unit not in first]
    assert plan(files, known=known) == first
    assert plan(files[1:], known=known)[0] == first[1]
