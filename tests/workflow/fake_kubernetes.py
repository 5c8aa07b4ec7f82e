"""A small Kubernetes API server over real HTTP: RayJobs and LocalQueues of one namespace, watches, faults, and a KubeRay to play.

It keeps a resource version, an event log that can be compacted (a watch from before it gets 410, inside a 200 stream as the
real one sends it), and validates every write by the CRD schema. Kueue's defaulting webhook is played
too: a RayJob created with a queue label is stored suspended.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kubernetes import client

from pipeline.workflow.rayjobs_api import RayJobApi
from tests.k8s import crds

NAMESPACE = "moonlight"


class FakeKubernetes:
    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.events: list[tuple[int, str, tuple[str, str], dict[str, Any]]] = []
        self.version = 1
        self.oldest = 0  # watches from an older version get 410
        self.faults: list[
            str | None
        ] = []  # one a request: a status code, "drop" (before acting), "lost" (acted), "gone" (410 on a watch), "no such path"
        self.created: list[str] = []  # names, in order, of RayJobs created through the API
        self.requests: list[tuple[str, str]] = []
        self.closing = False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        with self.lock:
            self.closing = True
            self.lock.notify_all()
        self.server.shutdown()
        self.server.server_close()

    def api(self, **options: Any) -> RayJobApi:
        """A client that waits milliseconds where the real one waits seconds."""
        configuration = client.Configuration()
        configuration.host = f"http://127.0.0.1:{self.server.server_port}"
        configuration.retries = False
        settings = {"patience_s": 60.0, "watch_s": 1, "pause_s": 0.002, "longest_pause_s": 0.01} | options
        return RayJobApi(client.ApiClient(configuration), NAMESPACE, **settings)

    # -- what kubectl and KubeRay do -----------------------------------------------------------------------------

    def apply(self, manifest: dict[str, Any]) -> None:
        with self.lock:
            self._store(_plural(manifest["kind"]), copy.deepcopy(manifest), "ADDED")

    def get(self, name: str, plural: str = "rayjobs") -> dict[str, Any] | None:
        with self.lock:
            return copy.deepcopy(self.objects.get((plural, name)))

    def jobs(self) -> list[dict[str, Any]]:
        """RayJobs that are not templates."""
        with self.lock:
            found = [copy.deepcopy(item) for (plural, _), item in self.objects.items() if plural == "rayjobs"]
        return [job for job in found if "moonlight.ai/template" not in job["metadata"].get("labels", {})]

    def set_status(self, name: str, suspend: bool | None = None, **status: Any) -> None:
        """Patch the status as KubeRay does (and spec.suspend as Kueue does)."""
        with self.lock:
            job = copy.deepcopy(self.objects[("rayjobs", name)])
            job["status"] = {**job.get("status", {}), **status}
            if suspend is not None:
                job["spec"]["suspend"] = suspend
            self._store("rayjobs", job, "MODIFIED")

    def set_workload(self, name: str, active: bool, **condition: str) -> None:
        """Kueue's Workload of a RayJob."""
        job = self.objects[("rayjobs", name)]
        labels = {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}
        condition = {"lastTransitionTime": "2026-01-01T00:00:00Z", **condition}
        pods = {"name": "head", "count": 1, "template": {"spec": {"containers": [{"name": "ray"}]}}}
        manifest = {
            "apiVersion": "kueue.x-k8s.io/v1beta2",
            "kind": "Workload",
            "metadata": {"name": f"rayjob-{name}", "labels": labels},
        }
        self.apply({**manifest, "spec": {"active": active, "podSets": [pods]}, "status": {"conditions": [condition]}})

    def remove(self, name: str) -> None:
        with self.lock:
            gone = self.objects.pop(("rayjobs", name), None)
            if gone:
                self._log("DELETED", ("rayjobs", name), gone)

    def start_deleting(self, name: str) -> None:
        """Asked for, but KubeRay's finalizer has not let go yet."""
        with self.lock:
            job = copy.deepcopy(self.objects[("rayjobs", name)])
            job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            self._store("rayjobs", job, "MODIFIED")

    def compact(self) -> None:
        """Forget all events: every running watch's version is now too old, and its connection ends."""
        with self.lock:
            self.version += 1
            self.oldest = self.version
            self.lock.notify_all()

    # -- inside --------------------------------------------------------------------------------------------------

    def _store(self, plural: str, manifest: dict[str, Any], event: str) -> dict[str, Any]:
        assert not _problems(json.dumps({**manifest, "metadata": {}}, sort_keys=True))
        metadata = manifest["metadata"]
        self.version += 1
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata["resourceVersion"] = str(self.version)
        self.objects[(plural, metadata["name"])] = manifest
        self._log(event, (plural, metadata["name"]), manifest)
        return manifest

    def _log(self, event: str, key: tuple[str, str], manifest: dict[str, Any]) -> None:
        self.version += event == "DELETED"
        self.events.append((self.version, event, key, copy.deepcopy(manifest)))
        self.lock.notify_all()


@functools.lru_cache(maxsize=512)
def _problems(manifest: str) -> list[str]:
    return crds.problems(json.loads(manifest))


def _plural(kind: str) -> str:
    return f"{kind.lower()}s"


def _matches(item: dict[str, Any], query: dict[str, list[str]]) -> bool:
    labels = item["metadata"].get("labels", {})
    wanted = dict(pair.split("=", 1) for pair in query.get("labelSelector", [""])[0].split(",") if pair)
    name = query.get("fieldSelector", [""])[0].removeprefix("metadata.name=")
    return all(labels.get(key) == value for key, value in wanted.items()) and name in ("", item["metadata"]["name"])


def _handler(cluster: FakeKubernetes) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def _answer(self, code: int, body: dict[str, Any]) -> None:
            if self.fault == "lost":
                self.close_connection = True
                return
            self._send(code, "application/json", json.dumps(body).encode())

        def _send(self, code: int, kind: str, data: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _status(self, code: int, reason: str, message: str = "") -> None:
            self._answer(
                code,
                {"kind": "Status", "status": "Failure", "reason": reason, "message": message or reason, "code": code},
            )

        def _begin(self) -> tuple[str, str | None, dict[str, list[str]]] | None:
            url = urlsplit(self.path)
            parts = url.path.strip("/").split("/")  # apis/<group>/<version>/namespaces/<ns>/<plural>[/<name>]
            with cluster.lock:
                cluster.requests.append((self.command, url.path))
                self.fault = cluster.faults.pop(0) if cluster.faults else None
            if self.fault == "drop":
                self.close_connection = True
                return None
            if self.fault == "no such path":
                self._send(404, "text/plain", b"404 page not found\n")
                return None
            if self.fault and self.fault.isdigit():
                self._status(int(self.fault), {"409": "Conflict"}.get(self.fault, "InternalError"))
                return None
            return parts[5], parts[6] if len(parts) > 6 else None, parse_qs(url.query)

        def do_GET(self) -> None:
            found = self._begin()
            if found is None:
                return
            plural, name, query = found
            if query.get("watch") == ["True"]:
                self._watch(plural, query)
                return
            with cluster.lock:
                if name:
                    item = copy.deepcopy(cluster.objects.get((plural, name)))
                else:
                    items = [copy.deepcopy(value) for (kind, _), value in cluster.objects.items() if kind == plural]
                    item = {"kind": "List", "items": [value for value in items if _matches(value, query)]}
            if item is None:
                self._status(404, "NotFound")
            else:
                self._answer(200, item)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = self._begin()
            if found is None:
                return
            plural, name = found[0], body["metadata"]["name"]
            with cluster.lock:
                if (plural, name) in cluster.objects:
                    self._status(409, "AlreadyExists", f"{plural} {name!r} already exists")
                    return
                if "kueue.x-k8s.io/queue-name" in body["metadata"].get("labels", {}):
                    body["spec"]["suspend"] = True
                cluster.created.append(name)
                stored = copy.deepcopy(cluster._store(plural, body, "ADDED"))
            self._answer(201, stored)

        def do_DELETE(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = self._begin()
            if found is None:
                return
            cluster.remove(str(found[1]))
            self._answer(200, {"kind": "Status", "status": "Success"})

        def _watch(self, plural: str, query: dict[str, list[str]]) -> None:
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")  # as the real one: each event is there at once
            self.end_headers()
            seen, ends = int(query["resourceVersion"][0]), float(query["timeoutSeconds"][0])
            with cluster.lock:
                if seen < cluster.oldest or self.fault == "gone":
                    gone = {
                        "kind": "Status",
                        "code": 410,
                        "reason": "Expired",
                        "message": f"too old resource version: {seen}",
                    }
                    self._chunk({"type": "ERROR", "object": gone})
                    self.wfile.write(b"0\r\n\r\n")
                    return
            for _ in range(int(ends / 0.05)):
                with cluster.lock:
                    cluster.lock.wait(0.05)
                    news = [
                        event
                        for event in cluster.events
                        if event[0] > seen and event[2][0] == plural and _matches(event[3], query)
                    ]
                    if cluster.closing or seen < cluster.oldest:
                        return
                    seen = max([seen, *(event[0] for event in news)])
                try:
                    for _, kind, _, item in news:
                        self._chunk({"type": kind, "object": item})
                except OSError:  # the client left
                    return
            with contextlib.suppress(OSError):
                self.wfile.write(b"0\r\n\r\n")

        def _chunk(self, event: dict[str, Any]) -> None:
            line = json.dumps(event).encode() + b"\n"
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
            self.wfile.flush()

    return Handler
