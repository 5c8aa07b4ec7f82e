"""A published version in a repository of the Hugging Face hub, as a revision of its own.

    main                     the promoted version, if `hub_main`
    step-00000120            a branch (or tag) for each version published, named after its step

One commit makes a revision what the version's folder is: files are added, those of another version there go. Large files travel
before the commit, one at a time and under the sha256 that the manifest has, so a push that was cut off goes on where it stood: what the hub
already holds is not sent again, and a revision that is there already takes no commit. Every commit names the one it follows; of two
publishers that race one is told that the branch has moved, looks again, and finds the same content there or tries once more.

Endpoint and token are the caller's (`HfApi`). A hub that refuses ends in one line: what it said, and what to do about it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.manifest import DamagedRecord, ModelManifest, Record
from pipeline.publishing import registry
from pipeline.storage import Storage

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

SMALL = 11_000_000  # bytes of a file that is sent with the commit; the hub takes 10 MB as plain git
ATTEMPTS = 10  # lost races in a row
BESIDE = {"manifest.json", "provenance.json"}  # of a version's folder, and not in its manifest
KEPT = {".gitattributes"}  # the hub's own
REMEDIES = {
    401: "the token is missing or unknown: set HF_TOKEN to one of yours",
    402: "the account's storage or plan does not allow it: free space there, or publish to another account",
    403: "the token may not write there, or a quota is used up: take a token with write access, or another repository",
    404: "there is no such repository for this token: check publishing.hub.repo and HF_ENDPOINT",
    413: "a file is too large for it: lower publishing.shard_bytes",
    429: "too many requests: wait, and run the same command again",
    507: "its storage is full: free space there, and run the same command again",
}


class HubRefused(ValueError):
    """The hub did not take the version; one line with its answer and the remedy. Running again goes on where it stood."""


class Pushed(Record):
    """`<root>/hub/<namespace>--<repository>/<revision>.json`: what a revision of the hub holds."""

    repo: str
    revision: str
    version: str
    manifest_digest: str
    commit: str

    VOLATILE = frozenset({"commit"})


def revision_of(manifest: ModelManifest) -> str:
    """`step-00000120`: the version without the digest of its inputs."""
    return f"step-{manifest.step:08d}"


def record_path(repo: str, revision: str) -> str:
    return f"hub/{repo.replace('/', '--')}/{revision}.json"


def push(
    api: HfApi,
    storage: Storage,
    manifest: ModelManifest,
    repo: str,
    revision: str,
    *,
    private: bool = True,
    tag: bool = False,
    wanted: Callable[[], bool] = lambda: True,
) -> Pushed | None:
    """Make `revision` of the repository the published version; None if it was no longer `wanted` when its turn came.

    The repository is made where there is none. `tag`: the revision is a tag, made from a branch that is removed again. One that is there
    stays where it is. Raises HubRefused, also for a tag that holds another version (two can be of one step), and what storage raises if it does not give back the version's files.
    """
    branch = f"{revision}-incoming" if tag else revision
    with _refusals(f"{repo}, revision {revision}"):
        api.create_repo(repo, private=private, exist_ok=True)
        if tag and (there := _tagged(api, repo, revision)) is not None:
            _require(api, repo, revision, manifest)
            commit = there
        else:
            if branch != "main":
                api.create_branch(repo, branch=branch, exist_ok=True)
            found = _commit(api, storage, manifest, repo, branch, wanted)
            if found is None:
                return None
            commit = found
            if tag:
                api.create_tag(repo, tag=revision, revision=commit, exist_ok=True)
                api.delete_branch(repo, branch=branch)
    pushed = Pushed(
        repo=repo, revision=revision, version=manifest.version, manifest_digest=manifest.digest, commit=commit
    )
    storage.write(record_path(repo, revision), pushed.to_json())
    return pushed


def _commit(
    api: HfApi, storage: Storage, manifest: ModelManifest, repo: str, branch: str, wanted: Callable[[], bool]
) -> str | None:
    from huggingface_hub import CommitOperationDelete
    from huggingface_hub.errors import HfHubHTTPError

    for left in reversed(range(ATTEMPTS)):
        with _of_storage():
            if not wanted():
                return None
        head = str(api.repo_info(repo, revision=branch).sha)
        files = {*BESIDE, *(entry.path for entry in manifest.files)}
        there = set(api.list_repo_files(repo, revision=head))
        with tempfile.TemporaryDirectory() as scratch:
            operations = [_added(api, storage, manifest, repo, branch, path, Path(scratch)) for path in sorted(files)]
            gone = [CommitOperationDelete(path) for path in sorted(there - files - KEPT)]
            try:
                made = api.create_commit(
                    repo,
                    [*operations, *gone],
                    commit_message=f"{manifest.name} {manifest.version}",
                    commit_description=f"manifest sha256 {manifest.digest}",
                    revision=branch,
                    parent_commit=head,
                )
                return str(made.oid)
            except HfHubHTTPError as error:  # somebody committed between the look and this
                if error.response.status_code not in (409, 412) or not left:
                    raise
    raise AssertionError


def _added(
    api: HfApi, storage: Storage, manifest: ModelManifest, repo: str, branch: str, path: str, scratch: Path
) -> CommitOperationAdd:
    """A file that the commit adds; a large one is at the hub when this returns, and only its digest is kept."""
    from huggingface_hub import CommitOperationAdd

    folder = registry.folder(manifest.name, manifest.version)
    entry = next((entry for entry in manifest.files if entry.path == path), None)
    with _of_storage():
        if entry is None or entry.bytes <= SMALL:
            return CommitOperationAdd(path, storage.read(f"{folder}/{path}"))
        local = Path(storage.key(f"{folder}/{path}"))
        if storage.config.is_s3:
            local = scratch / path
            local.parent.mkdir(parents=True, exist_ok=True)
            storage.fs.get_file(storage.key(f"{folder}/{path}"), str(local))
        operation = CommitOperationAdd(path, local)  # looks at the file
    operation.upload_info.sha256 = bytes.fromhex(entry.sha256)  # what the hub must find, whatever the disk says now
    api.preupload_lfs_files(repo, [operation], revision=branch)
    if storage.config.is_s3:
        local.unlink()
    return operation


def _tagged(api: HfApi, repo: str, tag: str) -> str | None:
    return next((str(each.target_commit) for each in api.list_repo_refs(repo).tags if each.name == tag), None)


def _require(api: HfApi, repo: str, tag: str, manifest: ModelManifest) -> None:
    """Raises HubRefused if the tag holds anything but this version."""
    from huggingface_hub.errors import EntryNotFoundError

    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = api.hf_hub_download(repo, "manifest.json", revision=tag, local_dir=scratch)
            found = ModelManifest.parse(Path(path).read_bytes(), f"manifest.json of {repo}, tag {tag}")
        except (EntryNotFoundError, DamagedRecord):
            found = None
    if found is None or found.digest != manifest.digest:
        what = "what is no version of ours" if found is None else f"{found.name} {found.version}"
        raise HubRefused(
            f"publishing.hub: {repo}, tag {tag}: it holds {what}, not {manifest.name} {manifest.version}, and a tag does not move; delete "
            "it there and run the same command again, or set publishing.hub.revisions=branches"
        )


class _Unread(Exception):
    """A file of the version cannot be read: no fault of the hub's, whose client raises an OSError of its own, too."""

    def __init__(self, error: OSError | ValueError) -> None:
        self.error = error


@contextlib.contextmanager
def _of_storage() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise _Unread(error) from None


@contextlib.contextmanager
def _refusals(where: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except _Unread as unread:
        raise unread.error from None
    except HubRefused:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # uploads wrap theirs in a RuntimeError
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            said = f"the hub answers {status} ({_line(cause.server_message or str(cause).splitlines()[0])})"
            remedy = REMEDIES.get(status, "run the same command again: it goes on where it stood")
        else:
            said = f"{type(cause).__name__}: {_line(str(cause))}"
            remedy = "look at HF_ENDPOINT, HF_HUB_OFFLINE and the network, then run the same command again: it goes on where it stood"
        raise HubRefused(f"publishing.hub: {where}: {said}; {remedy}") from None


def _line(text: str) -> str:
    return " ".join(text.split())
