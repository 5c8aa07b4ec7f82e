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


def test_ci_files_run_targets_and_scripts_that_exist() -> None:
    targets = (REPOSITORY / "Makefile").read_text() + (REPOSITORY / "k8s/k8s.mk").read_text()
    for name in ("github", "gitlab"):
        text = (REPOSITORY / f"k8s/ci/{name}.yaml").read_text()
        used = re.findall(r"(?m)(?:-|run:) make ([a-z0-9-]+)|^ +make ([a-z0-9-]+)", text)
        used = [first or second for first, second in used]
        assert {"setup", "lint", "test", "k8s-check", "e2e-kind", "image"} <= set(used), name
        for target in used:
            assert re.search(rf"^{target}:", targets, re.M), target
        assert "main staging" in text
        assert "staging production" in text
    assert (REPOSITORY / "k8s/promote.sh").stat().st_mode & 0o111


def test_github_asks_for_a_review_and_pins_its_actions() -> None:
    jobs = yaml.safe_load((REPOSITORY / "k8s/ci/github.yaml").read_text())["jobs"]
    assert set(jobs) == {"check", "e2e", "image", "promote"}
    assert jobs["promote"]["environment"] == "${{ inputs.promote }}"
    for job in jobs.values():
        for step in job["steps"]:
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])


# What GitLab takes at the top for itself, so that no job may be called so: docs.gitlab.com/ci/yaml, "Job name" and "Global keywords".
RESERVED = {
    "image", "services", "stages", "before_script", "after_script", "variables", "cache", "include", "pages:deploy", "spec", "true", "false", "nil",
}  # fmt: skip


def test_gitlabs_jobs_have_stages_and_only_a_hand_promotes() -> None:
    file = yaml.safe_load((REPOSITORY / "k8s/ci/gitlab.yaml").read_text())
    jobs = {name: job for name, job in file.items() if name not in ("stages", "workflow", "variables")}
    assert not set(jobs) & RESERVED
    for name, job in jobs.items():
        whole = {**jobs[job["extends"]], **job} if "extends" in job else job
        if name.startswith("."):
            continue
        assert whole["stage"] in file["stages"], name
        assert whole["script"]
        assert whole["rules"], f"{name} would run on every pipeline"
    versions = {name: file["variables"][name] for name in ("KUBECTL", "TERRAFORM", "KIND", "HELM")}
    assert all(re.fullmatch(r"v?\d+\.\d+\.\d+", version) for version in versions.values())
    for branch, target in (("main", "staging"), ("staging", "production")):
        assert jobs[target]["rules"] == [
            {"if": f'$CI_COMMIT_BRANCH == "{branch}"', "when": "manual", "allow_failure": True}
        ]
        assert jobs[target]["environment"] == target
        assert jobs[target]["script"] == [f"k8s/promote.sh {branch} {target}"]
