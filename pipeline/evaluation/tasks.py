"""The tasks of EleutherAI's lm-evaluation-harness (lm-eval) that a run asks for: what they are and whether they can be scored.

`evaluation.tasks` names tasks, groups or tags of lm-eval, `evaluation.task_folder` may hold more: YAML files in lm-eval's
format and their data. Relative `data_files` in there are relative to the folder; an s3:// folder is fetched first.

`check` finds what is wrong before anything is started or loaded. It needs no torch, and only a run that asks for tasks
imports lm-eval (which brings `datasets`, and reads 15,000 YAML files for an index of its own tasks: seconds).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.load import ConfigError, expand_path
from pipeline.config.schema import RunConfig, StorageConfig
from pipeline.manifest import digest_of
from pipeline.storage import Storage

DEFAULT_NEW_TOKENS = 256  # of a task that does not say how much to generate, as lm-eval's own models have it
NEW_TOKENS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # its names in a task, first wins


def identity(config: RunConfig) -> dict[str, Any]:
    """What decides the tasks' scores, the checkpoint apart; empty without tasks."""
    section = config.evaluation
    if not section.tasks:
        return {}
    folder = folder_digest(config)
    return {"tasks": section.tasks, "few_shot": section.few_shot, "limit": section.task_limit, "folder": folder}


def folder_digest(config: RunConfig) -> str | None:
    """Of names and content of `evaluation.task_folder`; None without one. Raises ConfigError."""
    return None if config.evaluation.task_folder is None else _digest(_folder(config))


def check(config: RunConfig, *, data: bool) -> None:
    """Raises ConfigError for a package, task or folder that is not there; with `data` also loads the tasks' data.

    Without data it costs seconds. Nothing happens without tasks.
    """
    if not config.evaluation.tasks:
        return
    with _local_folder(config) as folder:
        manager = _manager(config, folder)
        if data:
            _load(config, manager, folder)


@contextlib.contextmanager
def loaded(config: RunConfig) -> Iterator[tuple[Any, list[Any]]]:
    """(lm-eval's TaskManager, its Task and Group objects) with their data. Raises ConfigError as `check` does."""
    with _local_folder(config) as folder:
        manager = _manager(config, folder)
        yield manager, _load(config, manager, folder)


@contextlib.contextmanager
def read(config: RunConfig, names: Sequence[str], key: str) -> Iterator[dict[str, Any]]:
    """The harness's Task objects behind these names, with their data, whether or not the model can be asked them. Raises ConfigError, which
    begins with the setting `key`."""
    with _local_folder(config) as folder:
        with _in_folder(folder):
            found, name = {}, ""
            manager = _manager(config, folder, names, key)
            try:
                for name in names:
                    found.update(manager.load([name])["tasks"])
            except Exception as error:  # as in `_load`
                raise ConfigError(_cannot_be_loaded(key, name, error)) from error
            yield found


def new_tokens(generation: dict[str, Any]) -> int:
    """How many tokens a task generates at most, from its `generation_kwargs`."""
    given = (generation[name] for name in NEW_TOKENS if generation.get(name) is not None)
    return int(next(given, DEFAULT_NEW_TOKENS))


# -- the folder ------------------------------------------------------------------------------------------------------


def _folder(config: RunConfig) -> Storage:
    """Raises ConfigError if there is nothing at `evaluation.task_folder`."""
    assert config.evaluation.task_folder is not None
    where = config.storage
    try:
        folder = Storage(
            StorageConfig(
                root=expand_path(config.evaluation.task_folder), endpoint_url=where.endpoint_url, region=where.region
            )
        )
        found = bool(_files(folder))
    except (OSError, ValueError) as error:
        message = (
            f"evaluation.task_folder: cannot list {config.evaluation.task_folder} ({type(error).__name__}: {error})"
        )
        raise ConfigError(" ".join(message.split())) from None
    if not found:
        raise ConfigError(
            f"evaluation.task_folder: there is nothing in {folder.root}; name a folder or s3:// prefix with tasks in YAML"
        )
    return folder


def _files(folder: Storage) -> list[str]:
    """What belongs to the tasks: not what Python leaves beside functions that a task imports, and nothing hidden."""
    paths = [info.path for info in folder.list("")]
    return [path for path in paths if not any(p.startswith(".") or p == "__pycache__" for p in path.split("/"))]


def _digest(folder: Storage) -> str:
    """Of names and content: an edited task is another task."""
    return digest_of({path: hashlib.sha256(folder.read(path)).hexdigest() for path in _files(folder)})


@contextlib.contextmanager
def _local_folder(config: RunConfig) -> Iterator[Path | None]:
    if config.evaluation.task_folder is None:
        yield None
        return
    folder = _folder(config)
    if not folder.config.is_s3:
        yield Path(folder.root)
        return
    with tempfile.TemporaryDirectory(prefix="moonlight-tasks-") as copy:
        for path in _files(folder):
            target = Path(copy, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(folder.read(path))
        yield Path(copy)


# -- lm-eval ---------------------------------------------------------------------------------------------------------


def _manager(
    config: RunConfig, folder: Path | None, names: Sequence[str] | None = None, key: str = "evaluation.tasks"
) -> Any:
    """An index that knows every name that is asked for, by the setting `key`."""
    names = config.evaluation.tasks if names is None else names
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"{key} {list(names)}: the package lm-eval is not installed; pip install -c constraints.txt lm-eval, or leave {key} empty"
        )
    from lm_eval.tasks import TaskManager

    own: list[str] = []
    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        own = manager.all_tasks
        if not own:
            raise ConfigError(
                f"evaluation.task_folder: no YAML file in {config.evaluation.task_folder} is a task or group of lm-eval; "
                "each needs `task: <name>` or `group: <name>` (lm-eval's docs/new_task_guide.md)"
            )
        if set(names) <= set(own) and _is_closed(manager.task_index):
            return manager
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise ConfigError(f"{key}: {_unknown(unknown[0], manager.all_tasks, own)}")
    return manager


def _is_closed(index: dict[str, Any]) -> bool:
    """Do the groups of an index have all their members in it?"""
    members = [entry.cfg["task"] for entry in index.values() if entry.kind.name == "GROUP"]
    return all(isinstance(name, str) and name in index for names in members for name in names)


def _unknown(name: str, known: list[str], own: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "lm-eval ls tasks lists its own"
    folder = f"; evaluation.task_folder has {', '.join(own[:10])}" if own else ""
    return f"lm-eval knows no task, group or tag {name!r}; {hint}{folder}"


def _load(config: RunConfig, manager: Any, folder: Path | None) -> list[Any]:
    """Raises ConfigError for data that cannot be had and for tasks that a base model cannot be asked."""
    found: list[Any] = []
    name = ""
    with _in_folder(folder):
        try:
            for name in config.evaluation.tasks:
                loaded = manager.load([name])
                _set_shots(config, name, loaded["tasks"].values())
                one = loaded["groups"].get(name) or loaded["tasks"].get(name)
                found += [one] if one is not None else loaded["tasks"].values()  # those of a tag
            everything = manager.load(found)
            tasks = everything["tasks"]
        except Exception as error:  # whatever reading files, the Hub and a task's own code may raise
            raise ConfigError(_cannot_be_loaded("evaluation.tasks", name, error)) from error
    for name, task in tasks.items():
        _check_task(config, name, task)
    _check_gates(config, tasks, everything["groups"])
    return found


def _in_folder(folder: Path | None) -> contextlib.AbstractContextManager[None]:
    """Relative names of data files are relative to the folder."""
    return contextlib.chdir(folder) if folder is not None else contextlib.nullcontext()


def _cannot_be_loaded(key: str, name: str, error: Exception) -> str:
    return (
        f"{key}: {name} cannot be loaded ({type(error).__name__}: {_short(error)}); put the task and its data "
        "into evaluation.task_folder, or load it once where the Hugging Face Hub is reachable (HF_HUB_OFFLINE, HF_HOME)"
    )


def _set_shots(config: RunConfig, name: str, tasks: Iterable[Any]) -> None:
    """The examples that `evaluation.few_shot` says for a task or for those of a group; one that has none on purpose stays so, as
    with lm-eval's own option."""
    shots = config.evaluation.few_shot
    if isinstance(shots, dict) and name in shots:
        for task in tasks:
            if task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=shots[name])


def _check_gates(config: RunConfig, tasks: dict[str, Any], groups: Iterable[str]) -> None:
    """A gate on what nobody computes would stay closed after weeks of training."""
    for index, gate in enumerate(config.publishing.gates):
        if gate.task is None:
            continue
        key = f"publishing.gates[{index}]"
        if gate.task not in {*tasks, *groups}:
            known = sorted({*tasks, *groups})
            more = f" and {len(known) - 12} more" if len(known) > 12 else ""
            raise ConfigError(
                f"{key}.task: nobody computes {gate.task!r}; evaluation.tasks are {', '.join(known[:12])}{more}: add it there"
            )
        metrics = sorted(tasks[gate.task].higher_is_better()) if gate.task in tasks else []
        if metrics and gate.metric not in metrics:
            raise ConfigError(f"{key}.metric: {gate.task} has no metric {gate.metric!r}; it has {', '.join(metrics)}")


def _check_task(config: RunConfig, name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"evaluation.tasks: {name} runs code that the model wrote, which is not done here; leave it out"
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"evaluation.tasks: {name} needs pictures or sound, and the model reads text; leave it out")
    if task.OUTPUT_TYPE != "generate_until":
        return
    generation = dict(task.get_config("generation_kwargs") or {})
    if generation.get("do_sample") or generation.get("temperature"):
        raise ConfigError(
            f"evaluation.tasks: {name} draws its answers (do_sample, temperature), which is not done here; take a greedy one"
        )
    length = config.evaluation.sequence_length or config.training.sequence_length
    if new_tokens(generation) >= length:
        raise ConfigError(
            f"evaluation.tasks: {name} generates up to {new_tokens(generation)} tokens, which leaves no room for a prompt in "
            f"{length}; raise evaluation.sequence_length or leave it out"
        )


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
