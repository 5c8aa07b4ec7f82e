"""The Dockerfile, as far as it can be read: who runs, what comes in, and versions that agree with the rest of the repository."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib

import yaml

from tests.k8s.manifests import REPOSITORY

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
INSTRUCTIONS = re.findall(r"^([A-Z]+) ((?:.*\\\n)*.*)", DOCKERFILE, re.M)
RAY = "2.60.0"


def all_of(name: str) -> list[str]:
    return [text for instruction, text in INSTRUCTIONS if instruction == name]


def test_runs_as_uid_1000_from_an_absolute_base() -> None:
    assert all_of("USER")[-1] == "1000"
    assert all_of("FROM") == ["${BASE}"]
    assert all_of("ARG")[0] == f"BASE=rayproject/ray:{RAY}-py311-gpu"


def test_adds_no_compiler_and_installs_only_what_is_locked() -> None:
    commands = "\n".join(all_of("RUN"))
    assert not re.search(r"\b(apt|apt-get|gcc|g\+\+|build-essential|curl|wget)\b", commands)
    assert "--only-binary :all: --no-binary rouge-score,sqlitedict,word2number" in commands  # of lm-eval, all Python
    assert "--constraint /tmp/build/constraints.txt" in commands
    assert "--no-cache-dir" in commands


def test_copies_only_what_runs() -> None:
    assert [text.split()[0] for text in all_of("COPY")] == ["pyproject.toml", "pipeline", "data_prep", "jobs"]
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == {
        "pyproject.toml",
        "constraints.txt",
        "pipeline",
        "data_prep",
        "jobs",
    }


def test_says_which_version_and_commit_it_is() -> None:
    labels = " ".join(all_of("LABEL"))
    assert "org.opencontainers.image.version" in labels
    assert "org.opencontainers.image.revision" in labels
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert f"VERSION={project['version']}" in all_of("ARG")


def test_make_passes_on_what_an_image_may_be_given() -> None:
    given = {"IMAGE_BASE": "a/base:1", "PIP_ARGS": "--index-url x", "EXTRAS": "eval gguf"}
    command = ["make", "--dry-run", "image", *(f"{name}={value}" for name, value in given.items())]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    passed = dict(word.split("=", 1) for word in shlex.split(said.replace("$(", "(")) if re.match(r"[A-Z_]+=", word))
    assert passed.keys() == {text.partition("=")[0] for text in all_of("ARG")} - {"VERSION"}
    assert [passed[name.removeprefix("IMAGE_")] for name in given] == list(given.values())


def test_everything_that_is_written_goes_below_tmp() -> None:
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(all_of("ENV"))))
    for name in ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert environment[name].startswith("/tmp/")


def test_ray_is_one_version_everywhere() -> None:
    """The image's, the lock's, and the one that KubeRay reads from the templates (agreement.RAY_VERSION holds those)."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert any(entry.startswith("ray[") and ">=2.60,<2.61" in entry for entry in project["dependencies"])
    constraints = REPOSITORY / "constraints.txt"
    if constraints.exists():
        assert re.search(r"^ray==2\.60\.", constraints.read_text(), re.M)
    for path in [
        *sorted((REPOSITORY / "k8s/stages").glob("*.yaml")),
        REPOSITORY / "k8s/submit-cluster/raycluster.yaml",
    ]:
        if path.stem != "kustomization":
            spec = yaml.safe_load(path.read_text())["spec"]
            assert spec.get("rayClusterSpec", spec)["rayVersion"] == RAY
    assert f"rayproject/ray:{RAY}-py311" in (REPOSITORY / "k8s/e2e/e2e.sh").read_text()
