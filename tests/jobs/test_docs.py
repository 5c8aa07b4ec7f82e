"""Every command of ours in README and docs is one, and does what it can do on a small prepared dataset.

Its module, options and settings are parsed as they stand. Then it is run, on the dataset of these tests in place of the configuration
that it names, until it would start Ray, reach a Kubernetes cluster or load a published model: others test what follows.
"""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from jobs import main, stages
from pipeline.config.load import load_config, preset_names
from pipeline.config.values import parse_share
from tests.jobs.conftest import Prepared

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    REPOSITORY / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted(REPOSITORY.glob("benchmarks/*.md")),
]
OURS = re.compile(r"(?:^moonlight|python -m jobs\.\w+) +[^`\n#]*")  # `kubectl --namespace moonlight` is another's
LIBRARY = re.compile(r"(?:-m) ((?:benchmarks|pipeline)\.\w+)([^`\n#|]*)")
OPTIONAL = re.compile(r"\[(--[^\]]*)\]")
MODULES = {"pipeline": "run"}
ELSEWHERE = ("storage.root=", "run_id=", "training.start_from=", "schedule.total_tokens=")  # a reader's own
STAND_INS = {
    "web-en": "even",
    "17": "1",
    "120": "12",
    "5000": "50",
    "base": "debug",
    "lower-rate": "debug",
}  # what the small dataset has instead


def text_of(page: Path) -> tuple[str, str]:
    """Its blocks of code, and the `code` in its text."""
    text = page.read_text()
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)) + "\n".join(
        re.findall(r"^    (.*)$", text, re.M)
    )
    return blocks, "\n".join(re.findall(r"`([^`\n]+)`", text))


def commands() -> list[tuple[str, str]]:
    """(page, command): ours."""
    found = []
    for page in PAGES:
        for line in "\n".join(text_of(page)).splitlines():
            found += [(page.name, " ".join(each.split())) for each in OURS.findall(line)]
    return sorted(set(found))


def parsed(command: str, *, optional: bool = True) -> tuple[str, list[str]]:
    """The command's name and its arguments, with or without those in brackets."""
    plain = OPTIONAL.sub(r"\1" if optional else "", command)
    words = shlex.split(plain.partition(" | ")[0])
    name, rest = (words[1], words[2:]) if words[0] == "moonlight" else (words[2].partition(".")[2], words[3:])
    return MODULES.get(name, name), rest


def whole() -> list[tuple[str, str]]:
    """Those that can be typed; `moonlight plan` in a sentence is a name."""
    return [each for each in commands() if {"--config", "--prompt", "/data/texts"} & set(parsed(each[1])[1])]


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_is_one(page: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, rest = parsed(command)
    if name.startswith("--"):
        return
    assert name in main.COMMANDS or name in stages.names(), command
    with pytest.raises(SystemExit) as ended:
        main.main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for option in [word.partition("=")[0] for word in rest if word.startswith("--")]:
        assert option in shown, f"{page}: {command}: there is no option {option}"
    preset = rest[rest.index("--config") + 1] if "--config" in rest[:-1] else ""
    settings = [word for word in rest if re.match(r"[a-z_]+(\.\w+)*=", word) and "..." not in word]
    load_config(preset if preset in preset_names() else "debug", settings)


class Reached(Exception):
    """Where others' tests go on."""


def reached(*_: object, **__: object) -> None:
    raise Reached


# What a command does at last, that costs more than a test of the documentation may.
ENDS = {
    "run": "jobs.drivers.ray_jobs.run_on_ray",
    "verify": "jobs.views.verify.verify_on_ray",
    "generate": "pipeline.generation.published.load_published",
    "models": "jobs.drivers.models.act",
    "profile": "jobs.views.profile.ask",
    "ladder": "jobs.on_ray.cluster.connect",
    **dict.fromkeys(stages.names(), "jobs.on_ray.cluster.connect"),
}


@pytest.mark.usefixtures("no_ray", "cluster")
@pytest.mark.parametrize(("page", "command"), whole())
def test_a_command_runs(
    page: str, command: str, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, rest = parsed(command, optional=False)
    prepared.storage.write(f"runs/{prepared.config.run_id}/config.yaml", b"")  # what `status` asks for
    end = "jobs.drivers.kuberay.run_on_kuberay" if "kuberay" in rest else ENDS.get(name)
    if "--checkpoints" in rest:
        end = None  # there are none to read
    if "--rehearse" in rest:
        end = "jobs.views.rehearsal.rehearse_and_show"
    if end is not None:
        monkeypatch.setattr(end, reached)
    if name == "prepare":  # done already
        monkeypatch.setattr("jobs.stages.prepare.find", lambda *_: None)
    arguments = [name, *ours(rest, prepared, tmp_path)]
    if end is None:
        assert main.main(arguments) == 0
    else:
        with pytest.raises(Reached):
            main.main(arguments)


def ours(rest: list[str], prepared: Prepared, tmp_path: Path) -> list[str]:
    """The arguments for the small dataset: its configuration, and what it has in place of names that a reader would replace."""
    given = iter(rest)
    found: list[str] = []
    for word in given:
        if word == "--config":
            next(given)
        elif word.startswith(ELSEWHERE) or word == "...":
            continue
        elif word == "/data/texts":
            (tmp_path / "texts").mkdir()
            (tmp_path / "texts" / "a.jsonl").write_text(f"{json.dumps({'body': 'The moon rose late. ' * 20})}\n" * 50)
            found += [str(tmp_path / "texts"), "--output", str(tmp_path / "run.yaml")]
        elif word == "page.html":
            found.append(str(tmp_path / word))
        else:
            found.append(STAND_INS.get(word, word))
    # overrides of the dataset come first: what the page says wins
    return [*(prepared.arguments if "--config" in rest else []), *found]


def test_there_are_commands_in_every_page_that_tells_how() -> None:
    told = {page for page, _ in commands()}
    pages = {"first-run.md", "training.md", "kubernetes.md", "data-order.md", "data.md", "evaluation.md", "watching.md"}
    assert {"README.md", *pages} <= told
    assert set(ENDS) <= {parsed(command)[0] for _, command in commands()} | set(stages.names())


def test_targets_of_make_and_modules_of_the_library_are_there() -> None:
    makefiles = (REPOSITORY / "Makefile").read_text() + (REPOSITORY / "k8s" / "k8s.mk").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefiles, re.M))
    seen = set()
    for page in PAGES:
        for line in "\n".join(text_of(page)).splitlines():
            for target in re.findall(r"(?:^|[ ;&])make ([a-z0-9-]+)", line.partition("#")[0]):
                assert target in targets, f"{page.name}: make {target}"
                seen.add(target)
            for module, options in LIBRARY.findall(line):
                found = find_spec(module)
                assert found is not None, f"{page.name}: {module}"
                file = REPOSITORY.joinpath(*module.split("."))
                source = (file / "__main__.py" if file.is_dir() else file.with_suffix(".py")).read_text()
                for option in re.findall(r"--[a-z][a-z0-9-]*", options):
                    assert f'"{option}"' in source, f"{page.name}: {module} has no {option}"
                seen.add(module)
    assert {"demo", "setup", "k8s-check", "benchmarks.loader", "pipeline.training"} <= seen


def test_the_yaml_of_the_first_run(tmp_path: Path) -> None:
    text = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs/first-run.md").read_text(), re.DOTALL)
    (tmp_path / "run.yaml").write_text(text[0])
    config = load_config(str(tmp_path / "run.yaml"))
    assert config.corpus.sources[0].path == str(tmp_path / "texts")
    assert config.schedule.bias_rate[0].until_tokens == parse_share("80%", 2_000_000)
