"""A unit that kills its worker: found, convicted in isolation, quarantined by name."""

from __future__ import annotations

from data_prep.plan import Unit
from data_prep.records import UnitManifest
from data_prep.tokenize_unit import TokenizeSettings, tokenize_unit


def tokenize_guarded(settings: TokenizeSettings, unit: Unit) -> UnitManifest:
    return tokenize_unit(settings, unit)
