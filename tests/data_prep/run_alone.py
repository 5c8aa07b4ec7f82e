"""`prepare` in one process, without Ray: config as JSON on the command line."""

from __future__ import annotations

import sys

from data_prep.prepare import prepare
from pipeline.config.schema import RunConfig
from pipeline.storage import open_storage

if __name__ == "__main__":
    config = RunConfig.model_validate_json(sys.argv[1])
    print("digest", prepare(config, open_storage(config.storage)).digest, flush=True)
