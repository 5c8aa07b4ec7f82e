"""What `moonlight check` says: the network, the data as prepare will see it, the disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from data_prep.look import Look, look
from data_prep.tokenizer_stage import find_tokenizer
from jobs import stages
from jobs.cli import looking, open_run, parser, refusing
from jobs.on_ray.demand import check_cluster
from jobs.stages.records import Records
from pipeline.config.schema import RunConfig
from pipeline.model.shapes import count_parameters
from pipeline.optim.schedule import total_steps
from pipeline.planner.preparing import checkpoint_bytes
from pipeline.storage import Storage
from pipeline.tokenizer import Encoder

SHOWN_TOKENS = 60


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """`jobs.check`. Returns the exit code."""
    made = parser("check", "What can be wrong with a run, and a look into its data, before anything is started.")
    made.add_argument("--document", action="store_true", help="print one document, and its tokens")
    given = made.parse_args(arguments)
    with looking(given.config):
        config, storage = open_run(given.config, given.overrides)
        records = stages.find(config, storage)
        todo = [stage for stage in stages.names() if not records.done(stage)]
        stages.check(todo, config, storage, records)
        for line in lines(config, storage, records, document=given.document):
            print(line, flush=True)
        check_cluster(config, todo)
    print("nothing is wrong that can be known beforehand")
    return 0


def lines(config: RunConfig, storage: Storage, records: Records, *, document: bool) -> Iterator[str]:
    """All that is known before anything is started; with `document` one document with its tokens. Raises ConfigError."""
    parameters = count_parameters(config.model)
    yield (
        f"network: {parameters.total:,} parameters, {parameters.active:,} used by a token; "
        f"{total_steps(config.schedule, config.training.sequence_length):,} steps, {checkpoint_bytes(config) / 1e9:,.1f} GB a checkpoint"
    )
    if records.done("prepare"):
        yield "data: prepared"
        return
    listings = records.corpus(config)
    looks = [look(source, index, listings[source.name], config) for index, source in enumerate(config.corpus.sources)]
    manifest = find_tokenizer(config, storage, listings)
    encoder = None if manifest is None else Encoder.load(manifest.folder, storage)
    for each in looks:
        yield from each.lines()
        yield from _tokens(each, encoder)
    if document:
        yield from _document(looks, encoder)


def _tokens(seen: Look, encoder: Encoder | None) -> Iterator[str]:
    size = sum(len(record.text) for record in seen.kept)
    if encoder is None:
        yield f"  {size:,} bytes of text in them; their tokens are known once the tokenizer is trained"
    elif size:
        tokens = len(encoder.encode([record.text for record in seen.kept])[0])
        yield f"  {size:,} bytes of text in them, {tokens:,} tokens: about {seen.bytes * tokens // size:,} in the source, if uncompressed"


def _document(looks: list[Look], encoder: Encoder | None) -> Iterator[str]:
    record = next((each.kept[0] for each in looks if each.kept), None)
    if record is None:
        return
    text = record.text.decode()
    yield f"--- {record.location}"
    yield text[:2000] + (" ..." if len(text) > 2000 else "")
    if encoder is not None:
        ids = encoder.encode([record.text])[0][:SHOWN_TOKENS]
        yield "--- " + " | ".join(repr(encoder.decode([int(token)]))[1:-1] for token in ids)
