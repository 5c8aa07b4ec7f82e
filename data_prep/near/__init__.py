"""Near-duplicates over all sources: signatures in the unit's task (signatures.py), groups of equal bands by ranges of hashes
(bands.py), connected components and the member of each that is kept (components.py)."""

SIGNATURES_VERSION = 1  # raise when the same texts and settings would give other signatures
