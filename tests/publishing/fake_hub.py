"""A server that speaks what publishing to the Hugging Face hub and loading from it need: repositories, branches and tags, LFS, commits."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN, READ_ONLY = "hf_write", "hf_read"
LARGE = (".safetensors", ".gguf", ".png")


@dataclass
class Repository:
    commits: dict[str, dict[str, str]] = field(default_factory=dict)  # oid -> path -> sha256 of the content
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> str | None:
        known = {**self.branches, **self.tags, **{oid: oid for oid in self.commits}}
        return known.get(revision)


class Refusal(Exception):
    def __init__(self, status: int, message: str = "", code: str = "", **more: str) -> None:
        self.status, self.message, self.code, self.more = status, message, code, more


class Hub:
    """What the server knows. `before_commit` runs where another client's commit may come first; `quota`: bytes of LFS it takes."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploaded: list[str] = []  # sha256 of LFS uploads, as they came
        self.quota = 10**12
        self.before_commit = lambda: None
        self.lock = threading.RLock()
        self.endpoint = ""

    def commit(self, repo: str, branch: str, files: dict[str, str]) -> str:
        repository = self.repositories[repo]
        described = [branch, sorted(files.items()), len(repository.commits)]
        oid = hashlib.sha1(json.dumps(described).encode()).hexdigest()
        repository.commits[oid] = files
        repository.branches[branch] = oid
        return oid

    def content(self, repo: str, revision: str) -> dict[str, bytes]:
        repository = self.repositories[repo]
        oid = repository.at(revision)
        assert oid is not None
        return {path: self.blobs[sha] for path, sha in repository.commits[oid].items()}

    # -- requests ------------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> Any:
        if method == "PUT":
            sha = path.rsplit("/", 1)[1]
            if sum(map(len, self.blobs.values())) + len(body) > self.quota:
                raise Refusal(403, "Private repository storage limit reached")
            assert hashlib.sha256(body).hexdigest() == sha
            self.blobs[sha] = body
            self.uploaded.append(sha)
            return {}
        if token not in (TOKEN, READ_ONLY):
            raise Refusal(401, "Invalid username or password.")
        if method != "GET" and token == READ_ONLY:
            raise Refusal(403, "You don't have the rights to do this")
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
            if name in self.repositories:
                raise Refusal(409, "You already created this model repo", url=f"{self.endpoint}/{name}")
            self.repositories[name] = Repository()
            self.commit(name, "main", {})
            return {"url": f"{self.endpoint}/{name}"}
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return {"transfer": "basic", "objects": [self._upload(each) for each in json.loads(body)["objects"]]}
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)(?:/(.+))?)?", path)
        if match is None:
            raise Refusal(404, f"no {method} {path}")
        repo, what, revision = match.group(1), match.group(2), unquote(match.group(3) or "main")
        if what == "tree" and "/" in revision:
            raise Refusal(404, "there are no folders", "EntryNotFound")
        if repo not in self.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self._about(method, repo, what, revision, body)

    def _about(self, method: str, repo: str, what: str | None, revision: str, body: bytes) -> Any:
        repository = self.repositories[repo]
        if what == "refs":
            kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
            found = {
                kind: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": oid} for n, oid in names.items()]
                for kind, (ref, names) in kinds.items()
            }
            return found | {"converts": []}
        if what == "branch":
            if method == "DELETE":
                del repository.branches[revision]
            elif revision in repository.branches:
                raise Refusal(409, "Reference already exists")
            else:
                repository.branches[revision] = repository.branches["main"]
            return {}
        oid = repository.at(revision)
        if oid is None:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        files = repository.commits[oid]
        if what == "tag":
            name = json.loads(body)["tag"]
            if name in repository.tags:
                raise Refusal(409, "Tag already exists")
            repository.tags[name] = oid
            return {}
        if what in (None, "revision"):
            siblings = [{"rfilename": path} for path in files]
            return {
                "id": repo,
                "sha": oid,
                "siblings": siblings,
                "private": True,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
        if what == "tree":
            return [
                {"type": "file", "path": path, "size": len(self.blobs[sha]), "oid": sha} for path, sha in files.items()
            ]
        if what == "preupload":
            return {"files": [self._mode(each["path"], files) for each in json.loads(body)["files"]]}
        assert what == "commit"
        return self._commit(repo, revision, body)

    def _mode(self, path: str, files: dict[str, str]) -> dict[str, Any]:
        large, sha = path.endswith(LARGE), files.get(path)
        data = self.blobs.get(sha or "", b"")
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        oid = None if sha is None else sha if large else git
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.blobs:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.endpoint}/lfs/{wanted['oid']}", "header": {}}}}

    def _commit(self, repo: str, branch: str, body: bytes) -> Any:
        self.before_commit()
        lines = [json.loads(line) for line in body.splitlines()]
        repository = self.repositories[repo]
        head = repository.branches[branch]
        if lines[0]["value"].get("parentCommit") not in (None, head):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                data = base64.b64decode(value["content"])
                files[value["path"]] = sha = hashlib.sha256(data).hexdigest()
                self.blobs[sha] = data
            elif line["key"] == "lfsFile":
                assert value["oid"] in self.blobs
                files[value["path"]] = value["oid"]
            else:
                del files[value["path"]]
        oid = self.commit(repo, branch, files)
        return {"commitUrl": f"{self.endpoint}/{repo}/commit/{oid}", "commitOid": oid, "success": True}


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _respond(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(length)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            path = urlsplit(self.path).path
            headers, status = {"Content-Type": "application/json"}, 200
            try:
                if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    data, headers = self._file(match.group(1), unquote(match.group(2)), unquote(match.group(3)))
                else:
                    with hub.lock:
                        data = json.dumps(hub.answer(self.command, path, body, token)).encode()
            except Refusal as refusal:
                status, data = refusal.status, json.dumps({"error": refusal.message, **refusal.more}).encode()
                headers |= {"X-Error-Message": refusal.message} | (
                    {"X-Error-Code": refusal.code} if refusal.code else {}
                )
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _file(self, repo: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
            repository = hub.repositories.get(repo)
            oid = repository.at(revision) if repository else None
            if repository is None or oid is None:
                raise Refusal(404, "not found", "RepoNotFound" if repository is None else "RevisionNotFound")
            sha = repository.commits[oid].get(path)
            if sha is None:
                raise Refusal(404, "Entry not found", "EntryNotFound")
            return hub.blobs[sha], {
                "ETag": f'"{sha}"',
                "X-Repo-Commit": oid,
                "Content-Type": "application/octet-stream",
            }

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _respond

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
