"""The run's checkpoints over tokens, where people look: a page and a picture in the run's folder."""

from __future__ import annotations

from pipeline.manifest import EvaluationManifest
from pipeline.report.curves import page_path, picture_path, read_all, render
from pipeline.storage import Storage


def write_curves(storage: Storage, run_id: str) -> None:
    """Write both anew; nothing without a result. Raises DamagedRecord."""
    found = read_all(storage, run_id)
    if found:
        from pipeline.publishing.plots import curves_plot  # here: it brings matplotlib

        storage.write(page_path(run_id), render(run_id, found).encode())
        title = f"{run_id}: held-out loss of {len(found)} checkpoints"
        storage.write(picture_path(run_id), curves_plot(_curves(found), found[-1].unigram_entropy, title))


def _curves(found: list[EvaluationManifest]) -> dict[str, list[tuple[int, float]]]:
    curves = {"all": [(each.tokens_seen or 0, each.overall.loss) for each in found]}
    names = dict.fromkeys(name for each in found for name in each.sources)
    for name in names if len(names) > 1 else ():
        curves[name] = [(each.tokens_seen or 0, each.sources[name].loss) for each in found if name in each.sources]
    return curves
