"""Every command of ours in README and docs is one: its module, its options, its settings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from jobs import main, stages
from pipeline.config.load import load_config, preset_names
from pipeline.config.values import parse_share

REPOSITORY = Path(__file__).parents[1]
PAGES = [
    REPOSITORY / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted(REPOSITORY.glob("benchmarks/*.md")),
]
OURS = re.compile(r"(?:^moonlight|python -m jobs\.\w+) +[^`\n#]*")  # `kubectl --namespace moonlight` is another's
MODULES = {"pipeline": "run"}


def commands() -> list[tuple[str, str]]:
    """(page, command) of code blocks and of `code` in the text."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)) + "\n".join(
            re.findall(r"^    (.*)$", text, re.M)
        )
        inline = "\n".join(re.findall(r"`((?:moonlight |python -m jobs\.)[^`]+)`", text))
        for line in f"{blocks}\n{inline}".splitlines():
            found += [(page.name, " ".join(each.split())) for each in OURS.findall(line)]
    return sorted(set(found))


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command(page: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command.partition(" | ")[0])
    name, rest = (words[1], words[2:]) if words[0] == "moonlight" else (words[2].partition(".")[2], words[3:])
    name = MODULES.get(name, name)
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


def test_there_are_commands_in_every_page_that_tells_how() -> None:
    told = {page for page, _ in commands()}
    assert {
        "README.md",
        "first-run.md",
        "training.md",
        "kubernetes.md",
        "data-order.md",
        "data.md",
        "evaluation.md",
    } <= told


def test_the_yaml_of_the_first_run(tmp_path: Path) -> None:
    text = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs/first-run.md").read_text(), re.DOTALL)
    (tmp_path / "run.yaml").write_text(text[0])
    config = load_config(str(tmp_path / "run.yaml"))
    assert config.corpus.sources[0].path == str(tmp_path / "texts")
    assert config.schedule.bias_rate[0].until_tokens == parse_share("80%", 2_000_000)
