"""The registry of models on the screen, and the two moves that people make in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from jobs.views.lineage import lineage
from jobs.views.models_diff import difference
from pipeline.config.schema import RunConfig
from pipeline.manifest import ModelManifest
from pipeline.publishing import registry
from pipeline.publishing.ask import ask, scored
from pipeline.publishing.registry import Latest
from pipeline.storage import Storage

WHAT = "list | show [VERSION] | diff VERSION [VERSION] | history | promote VERSION | rollback [VERSION]"
WORDS = {"list": {1}, "show": {1, 2}, "diff": {2, 3}, "history": {1}, "promote": {2}, "rollback": {1, 2}}


def understood(what: Sequence[str]) -> bool:
    """Is it one of `WHAT`?"""
    return bool(what) and len(what) in WORDS.get(what[0], set())


def act(what: Sequence[str], config: RunConfig, storage: Storage, *, because: str, force: bool) -> Iterator[str]:
    """Do one of `WHAT`; what there is to say about it. Raises ValueError, and GateError where a gate is closed."""
    name = config.publishing.name
    current = registry.latest(storage, name)
    match what:
        case ["list"]:
            yield from _list(storage, name, current)
        case ["history"]:
            yield from _history(storage, name, current)
        case ["show", *version]:
            yield from lineage(storage, _named(storage, name, current, version), current)
        case ["diff", first, *second]:
            a, b = _find(storage, name, first), _named(storage, name, current, second)
            yield from difference(storage, a, b)
        case ["promote", version]:
            yield from _promote(config, storage, _find(storage, name, version), because, force)
        case ["rollback", *version]:
            yield from _rollback(storage, name, current, version, because)


def _list(storage: Storage, name: str, current: Latest | None) -> Iterator[str]:
    found = registry.versions(storage, name)
    if not found:
        others = ", ".join(sorted(storage.names("models"))) or "none"
        raise ValueError(f"no version of {name} in {storage.uri('models')}; models there: {others}")
    known = () if current is None else current.order
    for each in found:
        mark = "*" if current is not None and each.version == current.version else " "
        state = "promoted" if mark == "*" else "was promoted" if each.version in known else ""
        run = each.config.get("run_id", "?")
        yield (
            f"{mark} {each.version}  loss {each.loss:.4f}  {each.bits_per_byte:.4f} bits per byte  run {run}  {state}".rstrip()
        )


def _history(storage: Storage, name: str, current: Latest | None) -> Iterator[str]:
    if current is None:
        raise ValueError(f"nothing is promoted: there is no {storage.uri(registry.latest_path(name))}")
    recorded = {move.version for move in current.history}
    for version in current.order:
        if version not in recorded:
            yield f"before the history  promote  {version}"
    for move in current.history:
        told = f"  because {move.because}" if move.because else ""
        yield f"{move.at}  {move.action:<8}  {move.version}  (before: {move.before or 'nothing'})  by {move.who}{told}"


def _promote(config: RunConfig, storage: Storage, manifest: ModelManifest, because: str, force: bool) -> Iterator[str]:
    registry.check(storage, manifest)
    evaluation = scored(storage, manifest).evaluation
    settings = config.publishing.model_copy(update={"promote": True})

    def allowed() -> None:
        answer = ask(settings, evaluation, storage)
        if not (force or answer.open):
            answer.require("not promoted; --force --because TEXT promotes it all the same")

    if registry.move(storage, manifest, "promote", f"forced: {because}" if force else because, allowed):
        yield f"{manifest.name}: {manifest.version} is promoted"
    else:
        yield f"{manifest.name}: {manifest.version} is the promoted version already"


def _rollback(
    storage: Storage, name: str, current: Latest | None, version: Sequence[str], because: str
) -> Iterator[str]:
    """To a version that was promoted once. Its gates were asked then."""
    if current is None:
        raise ValueError(f"nothing is promoted: there is no {storage.uri(registry.latest_path(name))}")
    wanted = version[0] if version else registry.before_current(current)
    if wanted is None:
        raise ValueError(f"{name}: {current.version} is the first version that was promoted; there is none before it")
    if wanted not in current.order:
        raise ValueError(
            f"{name} {wanted} was never promoted, so there is no way back to it; these were: {', '.join(current.order)}"
        )
    manifest = _find(storage, name, wanted)
    registry.check(storage, manifest)
    moved = registry.move(storage, manifest, "rollback", because, partial(_unmoved, storage, name, current, version))
    before = f", {current.version} before" if moved else " already"
    yield f"{name}: {manifest.version} is the promoted version{before}"


def _unmoved(storage: Storage, name: str, seen: Latest, version: Sequence[str]) -> None:
    """`the one before` means the one before what the user saw. Raises ValueError if somebody moved the pointer meanwhile."""
    now = registry.latest(storage, name)
    if not version and now is not None and now.version != seen.version:
        raise ValueError(
            f"{name}: somebody moved the pointer from {seen.version} to {now.version} meanwhile; look again, and name the version"
        )


def _named(storage: Storage, name: str, current: Latest | None, version: Sequence[str]) -> ModelManifest:
    """The version, by default the promoted one."""
    if version:
        return _find(storage, name, version[0])
    if current is None:
        raise ValueError(f"nothing is promoted: there is no {storage.uri(registry.latest_path(name))}; name a version")
    return _find(storage, name, current.version)


def _find(storage: Storage, name: str, version: str) -> ModelManifest:
    """By its name or what only its name ends in. Raises ValueError."""
    found = registry.find(storage, name, version)
    if found is not None:
        return found
    there = [each.version for each in registry.versions(storage, name)]
    ending = [each for each in there if each.endswith(version) or each.startswith(version)]
    if len(ending) == 1 and len(version) >= 4:
        return _find(storage, name, ending[0])
    raise ValueError(f"{name} has no version {version}; it has {', '.join(there) or 'none'}")
