"""A driver's list of the corpus, handed to the job that prepares: of a million files a list costs 20 CPU-seconds and a thousand requests.

    <root>/runs/<run_id>/listing/00000.arrow   the files of the first source, a compressed Arrow stream; its root in the schema

The job is told the digest of all lists by its environment and takes them only if they are those; whoever is not told lists
anew, and so does a job that finds them gone or damaged. A file that changed since it was listed is found when its unit is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import pyarrow as pa

from data_prep.listing import ROWS, SCHEMA, Listing
from pipeline.config.schema import RunConfig
from pipeline.manifest import digest_of
from pipeline.storage import Storage

ENVIRONMENT = "MOONLIGHT_LISTING"


def listing_folder(run_id: str) -> str:
    return f"runs/{run_id}/listing"


def hand_over(config: RunConfig, storage: Storage, listings: Mapping[str, Listing]) -> str:
    """Write the lists, in memory of some thousand rows. The digest that `handed` must be told."""
    for place, source in enumerate(config.corpus.sources):
        listing = listings[source.name]
        schema = SCHEMA.with_metadata({"root": listing.root})
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with (
            storage.stream(_path(config, place)) as file,
            pa.ipc.new_stream(file, schema, options=options) as writer,
        ):
            for batch in listing.table.to_batches(ROWS):
                writer.write_batch(batch)
    return _digest(config, listings)


def handed(config: RunConfig, storage: Storage) -> dict[str, Listing]:
    """The lists that this process was told of; none if it was not, or if they are not there as they were written."""
    told = os.environ.get(ENVIRONMENT)
    if not told:
        return {}
    listings = {}
    for place, source in enumerate(config.corpus.sources):
        try:
            with storage.open(_path(config, place)) as file, pa.ipc.open_stream(file) as reader:
                root = (reader.schema.metadata or {}).get(b"root", b"").decode()
                listings[source.name] = Listing.of(root, reader.read_all().replace_schema_metadata())
        except (OSError, ValueError):  # Arrow's errors are of these kinds
            return {}
    return listings if _digest(config, listings) == told else {}


def forget(config: RunConfig, storage: Storage) -> None:
    """When prepare has ended: the next command lists for itself."""
    storage.delete(listing_folder(config.run_id))


def _digest(config: RunConfig, listings: Mapping[str, Listing]) -> str:
    """Of the files as listed, not of what was written."""
    return digest_of([[name, found.root, found.digest] for name, found in sorted(listings.items())])


def _path(config: RunConfig, place: int) -> str:
    return f"{listing_folder(config.run_id)}/{place:05d}.arrow"
