"""Promotion of one commit between environments' branches, against real git; and the workflow file for users' CI."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.k8s.manifests import REPOSITORY

IMAGE = "k8s/components/image/kustomization.yaml"


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=x", "-c", "user.email=x@example.com")
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def commit(folder: Path, digest: str) -> str:
    (folder / IMAGE).parent.mkdir(parents=True, exist_ok=True)
    (folder / IMAGE).write_text(f"images:\n  - name: moonlight-pipeline\n    digest: {digest}\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "x")
    git(folder, "push", "--quiet", "origin", "HEAD:main")
    return git(folder, "rev-parse", "HEAD")


def promote(folder: Path, *branches: str) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY / "k8s/promote.sh"
    return subprocess.run(["bash", script, *branches], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch=main", "origin.git")
    git(tmp_path, "clone", "--quiet", "origin.git", "work")
    return tmp_path / "work"


def test_a_commit_goes_from_one_environment_to_the_next(fork: Path) -> None:
    first = commit(fork, "sha256:" + "1" * 64)
    assert promote(fork, "main", "staging").returncode == 0
    second = commit(fork, "sha256:" + "2" * 64)
    done = promote(fork, "staging", "production")
    assert done.returncode == 0
    assert git(fork, "ls-remote", "origin", "refs/heads/production").split()[0] == first
    assert "1" * 64 in done.stdout
    assert promote(fork, "main", "staging").returncode == 0
    assert git(fork, "ls-remote", "origin", "refs/heads/staging").split()[0] == second


@pytest.mark.parametrize("digest", ["sha256:" + "0" * 64, "latest", ""])
def test_a_commit_without_an_image_goes_nowhere(fork: Path, digest: str) -> None:
    commit(fork, digest)
    done = promote(fork, "main", "staging")
    assert done.returncode == 2
    assert "names no image" in done.stderr
    assert git(fork, "ls-remote", "origin", "refs/heads/staging") == ""


def test_a_branch_that_went_its_own_way_is_not_overwritten(fork: Path) -> None:
    commit(fork, "sha256:" + "1" * 64)
    assert promote(fork, "main", "staging").returncode == 0
    (fork / "hotfix").write_text("x")
    git(fork, "add", "--all")
    git(fork, "commit", "--quiet", "--message", "by hand")
    git(fork, "push", "--quiet", "origin", "HEAD:staging")
    git(fork, "reset", "--quiet", "--hard", "HEAD~1")
    commit(fork, "sha256:" + "2" * 64)
    done = promote(fork, "main", "staging")
    assert done.returncode == 1
    assert "is not an ancestor" in done.stderr


@pytest.mark.parametrize("branches", [("main", "production"), ("staging", "main"), ("main", "main")])
def test_no_environment_is_skipped(fork: Path, branches: tuple[str, str]) -> None:
    commit(fork, "sha256:" + "1" * 64)
    assert promote(fork, *branches).returncode == 2


def test_the_workflow_runs_targets_and_scripts_that_exist() -> None:
    text = (REPOSITORY / "k8s/ci/github.yaml").read_text()
    workflow = yaml.safe_load(text)
    targets = (REPOSITORY / "Makefile").read_text() + (REPOSITORY / "k8s/k8s.mk").read_text()
    used = re.findall(r"\bmake ([a-z0-9-]+)", text)
    assert {"test", "k8s-check", "e2e-kind", "image"} <= set(used)
    for target in used:
        assert re.search(rf"^{target}:", targets, re.M), target
    assert (REPOSITORY / "k8s/promote.sh").stat().st_mode & 0o111
    assert set(workflow["jobs"]) == {"check", "e2e", "image", "promote"}
    assert workflow["jobs"]["promote"]["environment"] == "${{ inputs.promote }}"
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])
