"""Publishing to the hub, by its own client, to a server that speaks its protocol; loaded back by transformers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.publishing import hub as publishing_hub
from pipeline.publishing import registry
from pipeline.publishing.hub import HubRefused, Pushed, push, record_path, revision_of
from pipeline.storage import Storage
from tests.publishing.conftest import PublishedRun
from tests.publishing.fake_hub import READ_ONLY, TOKEN, Hub, serving

REPO = "people/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving(Hub()) as served:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server has plain LFS
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        yield served


def api(hub: Hub, token: str | None = TOKEN) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def push_run(hub: Hub, run: PublishedRun, revision: str = "step-00000050", **options: object) -> Pushed | None:
    return push(api(hub), run.made.storage, run.manifest, REPO, revision, **options)


def test_a_revision_is_the_published_folder_and_loads(hub: Hub, run: PublishedRun, monkeypatch: pytest.MonkeyPatch):
    assert revision_of(run.manifest) == "step-00000050"
    pushed = push_run(hub, run)
    there = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    assert hub.content(REPO, "step-00000050") == there
    assert hub.content(REPO, "main") == {}
    stored = run.made.storage.read(record_path(REPO, "step-00000050"))
    assert Pushed.parse(stored, "there") == pushed

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = AutoModelForCausalLM.from_pretrained(REPO, revision="step-00000050", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(REPO, revision="step-00000050")
    tokens = tokenizer("def area(", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        local = AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.float32)
        assert torch.equal(model(tokens).logits, local(tokens).logits)
        assert float((model(tokens).logits - run.made.model(tokens)).abs().max()) < 1e-4


def test_pushing_again_sends_nothing_and_commits_nothing(hub: Hub, run: PublishedRun):
    first = push_run(hub, run)
    sent, commits = len(hub.uploaded), len(hub.repositories[REPO].commits)
    assert push_run(hub, run) == first
    assert (len(hub.uploaded), len(hub.repositories[REPO].commits)) == (sent, commits)


def test_a_push_that_was_cut_off_goes_on(hub: Hub, run: PublishedRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        publishing_hub, "SMALL", 20_000
    )  # as if the weights were large: one upload each, before the commit
    weights = [entry for entry in run.manifest.files if entry.path.endswith(".safetensors")]
    hub.quota = sum(entry.bytes for entry in weights) * 2 // 3
    with pytest.raises(
        HubRefused, match=r"answers 403 \(.*storage limit.*\); the token may not write there, or a quota"
    ):
        push_run(hub, run)
    before = list(hub.uploaded)
    assert before
    assert hub.content(REPO, "step-00000050") == {}  # no half revision
    hub.quota = 10**12
    push_run(hub, run)
    assert len(hub.uploaded) == len(set(hub.uploaded))  # nothing twice
    assert hub.uploaded[: len(before)] == before
    assert set(hub.content(REPO, "step-00000050")) == {path.name for path in run.folder.iterdir()}


def test_files_of_another_version_go_and_a_tag_stays(hub: Hub, run: PublishedRun):
    other = run.publish(name="tiny", dtype="bf16", promote=False)
    storage = run.made.storage
    assert push(api(hub), storage, other, REPO, "main") is not None
    push_run(hub, run, "main")
    assert set(hub.content(REPO, "main")) == {path.name for path in run.folder.iterdir()}
    tagged = push_run(hub, run, tag=True)
    assert tagged is not None
    assert hub.repositories[REPO].tags == {"step-00000050": tagged.commit}
    assert set(hub.repositories[REPO].branches) == {"main"}
    assert push_run(hub, run, tag=True) == tagged


def test_a_tag_of_another_version_of_the_step_is_refused(hub: Hub, run: PublishedRun):
    """Nothing is recorded as pushed that is not there."""
    other = run.publish(name="tiny", dtype="bf16", promote=False)
    storage = run.made.storage
    push_run(hub, run, tag=True)
    before = storage.read(record_path(REPO, "step-00000050"))
    with pytest.raises(
        HubRefused, match=rf"tag step-00000050: it holds .* {run.manifest.version}, not tiny {other.version}"
    ):
        push(api(hub), storage, other, REPO, "step-00000050", tag=True)
    assert storage.read(record_path(REPO, "step-00000050")) == before
    hub.commit(REPO, "main", {})
    hub.repositories[REPO].tags["step-00000050"] = hub.repositories[REPO].branches["main"]
    with pytest.raises(HubRefused, match="it holds what is no version of ours"):
        push_run(hub, run, tag=True)
    del hub.repositories[REPO].tags["step-00000050"]  # as the message advises
    assert push(api(hub), storage, other, REPO, "step-00000050", tag=True) is not None
    assert set(hub.content(REPO, "step-00000050")) == {entry.path for entry in other.files} | publishing_hub.BESIDE


@pytest.mark.parametrize("same", [True, False])
def test_of_two_publishers_that_race_both_end_well(hub: Hub, run: PublishedRun, same: bool):
    """The other's commit comes between our look and ours: we look again, and find the same there, or replace it."""
    push_run(hub, run, "main")
    files = dict(hub.repositories[REPO].commits[hub.repositories[REPO].branches["main"]])
    hub.commit(REPO, "main", {})
    late = [{**files, **({} if same else {"README.md": files["config.json"]})}]
    hub.before_commit = lambda: hub.commit(REPO, "main", late.pop()) if late else None
    push_run(hub, run, "main")
    assert hub.content(REPO, "main") == {path.name: path.read_bytes() for path in run.folder.iterdir()}


def test_who_is_no_longer_wanted_leaves_the_branch_alone(hub: Hub, run: PublishedRun):
    push_run(hub, run)
    head = hub.repositories[REPO].branches["main"]
    assert push_run(hub, run, "main", wanted=lambda: False) is None
    assert hub.repositories[REPO].branches["main"] == head


def test_from_s3_the_same_revision(hub: Hub, run: PublishedRun, s3_root, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(publishing_hub, "SMALL", 20_000)
    storage = Storage(s3_root)
    for path in run.folder.iterdir():
        storage.write(f"{registry.folder(run.manifest.name, run.manifest.version)}/{path.name}", path.read_bytes())
    push(api(hub), storage, run.manifest, REPO, "step-00000050")
    assert hub.content(REPO, "step-00000050") == {path.name: path.read_bytes() for path in run.folder.iterdir()}


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (False, r"people/tiny, revision main: the hub answers 401 \(Invalid username or password.\); .* set HF_TOKEN"),
        (READ_ONLY, r"the hub answers 403 \(You don't have the rights.*\); the token may not write there"),
    ],
)
def test_a_hub_that_refuses_is_one_line(hub: Hub, run: PublishedRun, token: str | bool, message: str):
    with pytest.raises(HubRefused, match=message) as refused:
        push(HfApi(endpoint=hub.endpoint, token=token), run.made.storage, run.manifest, REPO, "main")
    assert "\n" not in str(refused.value)


def test_a_hub_that_is_not_there_is_one_line(run: PublishedRun):
    with pytest.raises(HubRefused, match="look at HF_ENDPOINT, HF_HUB_OFFLINE and the network"):
        push(HfApi(endpoint="http://127.0.0.1:9", token=TOKEN), run.made.storage, run.manifest, REPO, "main")


@pytest.mark.parametrize("small", [10, 10**9])
def test_a_file_that_is_gone_is_no_fault_of_the_hub(
    hub: Hub, run: PublishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int
):
    """Sent with the commit or before it."""
    monkeypatch.setattr(publishing_hub, "SMALL", small)
    shutil.copytree(run.folder, tmp_path / run.folder.relative_to(run.made.storage.root))
    storage = Storage(run.made.config.storage.model_copy(update={"root": str(tmp_path)}))
    gone = registry.folder(run.manifest.name, run.manifest.version) + "/model-00001-of-"
    (path,) = (info.path for info in storage.list("models") if info.path.startswith(gone))
    storage.delete(path)
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(path)) as error:
        push(api(hub), storage, run.manifest, REPO, "main")
    assert not isinstance(error.value, HubRefused)
    assert hub.content(REPO, "main") == {}
