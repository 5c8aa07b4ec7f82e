"""What `moonlight data sample` says: by source and rule what would be dropped and changed, with examples."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.contamination.finder import Finder
from data_prep.contamination.questions import parse, to_bytes
from data_prep.identity import list_corpus
from data_prep.rules import language
from data_prep.sample import Sampled, clusters, repeated, sample
from jobs.cli import looking, open_run, parser, refusing
from pipeline.config.rules import C4, FineWeb, GopherQuality, GopherRepetition, Languages, PersonalData, Rules
from pipeline.config.schema import DuplicateParagraphs, NearDuplicates, RunConfig
from pipeline.evaluation.questions import questions

SHOWN_CHARACTERS = 90
SHOWN_CLUSTERS = 5
WHAT = ("sample",)


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """`jobs.data`. Returns the exit code."""
    made = parser("data", "Look at what filters and rules do to the sources, before they are prepared.")
    made.add_argument("--examples", type=int, default=3, help="documents shown of each threshold (3)")
    made.usage = f"{made.prog} sample --config CONFIG [--examples N] [section.key=value ...]"
    words = list(sys.argv[1:] if arguments is None else arguments)
    what = next((word for word in words if word in WHAT), "")  # anywhere, as other commands take it
    if what:
        words.remove(what)
    given = made.parse_args(words)
    others = [word for word in given.overrides if "=" not in word]
    if not what or others:
        made.error(f"{' '.join(others) or 'nothing'} is asked for; ask for {' | '.join(WHAT)}")
    with looking(given.config):
        config, _ = open_run(given.config, given.overrides)
        listings = list_corpus(config)
        finder, samples = looked_for(config), list[Sampled]()
        for index, source in enumerate(config.corpus.sources):
            rules = source.rules if source.rules.any or source.conversations else every_rule()
            samples.append(sample(config, index, listings[source.name], rules, finder))
            for line in (
                *source_lines(samples[-1], given.examples),
                *question_lines(samples[-1], finder, given.examples),
            ):
                print(line, flush=True)
        for line in (
            *cluster_lines(samples, config.corpus.near_duplicates),
            *paragraph_lines(samples, config.corpus.duplicate_paragraphs, given.examples),
        ):
            print(line, flush=True)
    return 0


def every_rule() -> Rules:
    """With the published thresholds: what a source without rules is shown with."""
    return Rules(
        languages=Languages() if language.is_installed() else None,
        gopher_repetition=GopherRepetition(),
        gopher_quality=GopherQuality(),
        c4=C4(),
        fineweb=FineWeb(),
        personal_data=PersonalData(),
    )


def looked_for(config: RunConfig) -> Finder | None:
    """The questions of the run's tasks, asked of the harness; None where they are not looked for. Raises ConfigError."""
    section = config.corpus.decontamination
    return None if section is None else Finder(parse(to_bytes(questions(config))), section)


def question_lines(found: Sampled, finder: Finder | None, examples: int) -> Iterator[str]:
    """Of each task how many documents hold a question of it."""
    if finder is None:
        return
    done = {"drop": "dropped", "cut": "cut", "report": "left as they are"}[finder.settings.action]
    yield f"  documents with questions of tasks ({done}):" + ("" if found.held else " none")
    for task, numbers in sorted(found.held.items()):
        yield f"    {task:56}{len(numbers):8,}{len(numbers) / len(found.records):8.1%}"
        for number in numbers[:examples]:
            yield f"      {found.records[number].location}  {_excerpt(found.records[number].text)}"


def source_lines(found: Sampled, examples: int) -> Iterator[str]:
    yield f"source {found.source.name}: {found.seen:,} documents of {found.files:,} of {found.all_files:,} files"
    for verb, counts in (("filtered", found.filtered), ("quarantined", found.quarantined)):
        if counts:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common())
            yield f"  {verb}: {reasons}"
    if found.source.conversations:
        yield "  conversations have no rules"
        return
    if not found.source.rules.any:
        yield "  it has no rules; these are what all of them would do with their published thresholds (docs/data.md, Rules)"
    total = len(found.outcomes)
    if not total:
        return
    yield f"  {'rule and threshold':58}{'drops':>8}{'share':>8}"
    dropped = found.dropped()
    for rule, count in found.alone.items():
        yield f"  {rule + ' (if it were alone)':58}{count:8,}{count / total:8.1%}"
        for name in sorted(name for name in dropped if name.partition(".")[0] == rule):
            yield f"    {name:56}{dropped[name]:8,}{dropped[name] / total:8.1%}"
            shown = [pair for pair in zip(found.records, found.outcomes) if pair[1].rejected == name][:examples]
            for record, _ in shown:
                yield f"      {record.location}  {_excerpt(record.text)}"
    kept = found.kept
    yield f"  kept: {len(kept):,} ({len(kept) / total:.1%})"
    if changes := found.changes():
        yield f"  changed in them: {', '.join(f'{name} {count:,}' for name, count in sorted(changes.items()))}"
    if languages := found.languages:
        shares = ", ".join(f"{code} {count / languages.total():.1%}" for code, count in languages.most_common(8))
        yield f"  languages: {shares}"
    if scores := found.scores():
        tenths = ", ".join(f"{score:.4g}" for score in np.quantile(scores, [0.1, 0.25, 0.5, 0.75, 0.9]))
        yield f"  classifier's scores of {len(scores):,}, 10 %, 25 %, median, 75 %, 90 %: {tenths}"
    yield f"  characters of a document, 10 %, median, 90 %: {_quantiles([len(record.text.decode()) for record in found.records])} before"
    if kept:
        yield f"  {'':45} {_quantiles([len(outcome.text) for outcome in kept])} after"


def cluster_lines(samples: Sequence[Sampled], settings: NearDuplicates | None) -> Iterator[str]:
    found = clusters(samples, settings or NearDuplicates())
    kept = sum(len(each.kept) for each in samples)
    unset = "" if settings else " (corpus.near_duplicates is not set)"
    yield f"near-duplicates among the {kept:,} kept: {len(found):,} clusters, {sum(map(len, found)) - len(found):,} documents more than one of each{unset}"
    for group in found[:SHOWN_CLUSTERS]:
        shown = ", ".join(f"{source} {location}" for source, location in group[:3])
        yield f"  {len(group):,}: {shown}{', ...' if len(group) > 3 else ''}"


def paragraph_lines(samples: Sequence[Sampled], settings: DuplicateParagraphs | None, examples: int) -> Iterator[str]:
    wanted = settings or DuplicateParagraphs()
    found = repeated(samples, wanted)
    unset = "" if settings else " (corpus.duplicate_paragraphs is not set)"
    copies, characters = sum(more for more, _ in found), sum(more * len(part) for more, part in found)
    yield f"{wanted.by}s that several of them have: {len(found):,}, {copies:,} copies of {characters:,} characters more than one of each{unset}"
    for more, part in found[:examples]:
        yield f"  {more + 1:,} documents: {_excerpt(part.encode())}"


def _excerpt(text: bytes) -> str:
    words = " ".join(text[: 4 * SHOWN_CHARACTERS].decode(errors="ignore").split())
    shown = "".join(character if character.isprintable() else "?" for character in words[:SHOWN_CHARACTERS])
    return shown + ("..." if len(words) > SHOWN_CHARACTERS else "")


def _quantiles(sizes: list[int]) -> str:
    return ", ".join(f"{int(size):,}" for size in np.quantile(sizes, [0.1, 0.5, 0.9]))
