"""The few calls on the Kubernetes API that a driver needs, made to outlive an API server that is away for a while.

Transient trouble (no connection, 401 while a token rotates, 408, 429, 5xx - a webhook that is down answers 500; a 409 that is not
AlreadyExists: quota counters in dispute) is retried with growing pauses for `patience_s`. A create whose answer was lost is simply repeated: the second try finds the object,
because names are deterministic. `changes` turns get + watch into one stream of states; whenever a watch ends, for whatever
reason (timeout, broken connection, 410 Gone), it reads the object afresh and watches from there, so it cannot miss the end.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import urllib3.exceptions
from kubernetes import client as kubernetes_client
from kubernetes import config as kubernetes_config
from kubernetes.client.exceptions import ApiException

from pipeline.workflow.rayjobs_template import RayJob

log = logging.getLogger(__name__)

RAYJOBS: dict[str, Any] = {"group": "ray.io", "version": "v1", "plural": "rayjobs"}
LOCAL_QUEUES: dict[str, Any] = {"group": "kueue.x-k8s.io", "version": "v1beta2", "plural": "localqueues"}
WORKLOADS: dict[str, Any] = {"group": "kueue.x-k8s.io", "version": "v1beta2", "plural": "workloads"}
TRANSIENT = {401, 408, 409, 429, 500, 502, 503, 504}
ORDINARY = {(404, "NotFound"), (409, "AlreadyExists")}  # answers, not errors
CONNECT_S, READ_S = 5.0, 30.0
PATIENCE_S = 900.0


class ApiUnavailable(Exception):
    """The API server did not answer for `patience_s`."""


class Refused(Exception):
    """The API server or an admission webhook said no; repeating will not help."""


class NotServed(Exception):
    """The API server knows no such kind: its operator is not installed, or in another version."""


@dataclass
class RayJobApi:
    """RayJobs of one namespace. Retries inside; raises ApiUnavailable, Refused or NotServed."""

    client: kubernetes_client.ApiClient
    namespace: str
    patience_s: float = PATIENCE_S
    watch_s: int = 120
    pause_s: float = 1.0  # first pause after a failure, and between two watches
    longest_pause_s: float = 30.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _objects: kubernetes_client.CustomObjectsApi = field(init=False)

    def __post_init__(self) -> None:
        self._objects = kubernetes_client.CustomObjectsApi(self.client)

    def get(self, name: str) -> RayJob | None:
        found: RayJob | None = self._call(self._objects.get_namespaced_custom_object, **RAYJOBS, name=name)
        return found

    def find(self, selector: str) -> list[RayJob]:
        found = self._call(self._objects.list_namespaced_custom_object, **RAYJOBS, label_selector=selector)
        items: list[RayJob] = (found or {}).get("items", [])
        return items

    def create(self, job: RayJob) -> RayJob | None:
        """The created object, or None if the name is taken."""
        created: RayJob | None = self._call(self._objects.create_namespaced_custom_object, **RAYJOBS, body=job)
        return created

    def delete(self, name: str) -> None:
        """Ask for deletion; nothing there is fine. KubeRay's finalizer stops the Ray job, the cluster goes with its owner."""
        self._call(self._objects.delete_namespaced_custom_object, **RAYJOBS, name=name, propagation_policy="Background")

    def queue_exists(self, name: str) -> bool:
        return self._call(self._objects.get_namespaced_custom_object, **LOCAL_QUEUES, name=name) is not None

    def workload(self, job_uid: str) -> dict[str, Any] | None:
        """Kueue's Workload of a RayJob, None before Kueue made it. An elastic job may have several: the newest counts."""
        found = self._call(
            self._objects.list_namespaced_custom_object, **WORKLOADS, label_selector=f"kueue.x-k8s.io/job-uid={job_uid}"
        )
        items: list[dict[str, Any]] = (found or {}).get("items", [])
        return max(items, key=lambda item: str(item["metadata"].get("creationTimestamp", "")), default=None)

    def changes(self, name: str) -> Iterator[RayJob | None]:
        """The object's state now and after every change; None (and the end) when it does not exist any more."""
        while True:
            job = self.get(name)
            yield job
            if job is None:
                return
            try:
                for event in self._watch(name, job["metadata"]["resourceVersion"]):
                    if event["type"] == "DELETED":
                        break
                    if event["type"] == "ERROR":  # 410 Gone: the version is too old to watch from
                        log.info("watch of %s ended: %s", name, event["object"].get("message", event["object"]))
                        break
                    if event["type"] != "BOOKMARK":
                        yield event["object"]
            except (ApiException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                log.info("watch of %s broke off: %s", name, _short(error))
            self.sleep(self.pause_s)

    def _watch(self, name: str, resource_version: str) -> Iterator[dict[str, Any]]:
        response: Any = self._objects.list_namespaced_custom_object(
            **RAYJOBS,
            namespace=self.namespace,
            field_selector=f"metadata.name={name}",
            resource_version=resource_version,
            timeout_seconds=self.watch_s,
            watch=True,
            _preload_content=False,
            _request_timeout=(CONNECT_S, self.watch_s + READ_S),
        )
        try:
            pending = b""
            for chunk in response.stream(amt=None, decode_content=False):
                *lines, pending = (pending + chunk).split(b"\n")
                yield from (json.loads(line) for line in lines if line)
        finally:
            response.close()

    def _call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """None for an object that is not there, or already is (the callers' normal cases)."""
        started, pause = self.clock(), self.pause_s
        while True:
            try:
                return function(namespace=self.namespace, _request_timeout=(CONNECT_S, READ_S), **arguments)
            except ApiException as error:
                status = _status(error)
                if (error.status, status.get("reason")) in ORDINARY:
                    return None
                if error.status == 404:  # no Status object: there is not even such a path
                    raise NotServed(
                        f"the cluster serves no {arguments['plural']} of {arguments['group']}/{arguments['version']}; "
                        "install the operator that brings them (docs/kubernetes.md, Install)"
                    ) from error
                if error.status not in TRANSIENT and error.status:
                    raise Refused(f"{error.status} {status.get('message') or error.reason}") from error
                trouble: Exception = error
            except (urllib3.exceptions.HTTPError, OSError) as error:
                trouble = error
            if self.clock() - started > self.patience_s:
                raise ApiUnavailable(
                    f"no answer from the Kubernetes API for {self.patience_s:g} s: {_short(trouble)}"
                ) from trouble
            told = logging.WARNING if pause >= self.longest_pause_s else logging.INFO  # a blink is nobody's business
            log.log(told, "Kubernetes API: %s; again in %.1f s", _short(trouble), pause)
            self.sleep(pause)
            pause = min(2 * pause, self.longest_pause_s)


def connect(environ: Mapping[str, str], patience_s: float = PATIENCE_S) -> RayJobApi:
    """Inside a cluster by the pod's service account, elsewhere by the kubeconfig. MOONLIGHT_NAMESPACE names the namespace."""
    configuration = kubernetes_client.Configuration()
    try:
        kubernetes_config.load_incluster_config(client_configuration=configuration)
    except kubernetes_config.ConfigException:
        try:
            kubernetes_config.load_kube_config(client_configuration=configuration)
        except kubernetes_config.ConfigException as error:
            raise ValueError(
                f"no Kubernetes cluster to talk to ({error}); set KUBECONFIG or run inside the cluster"
            ) from None
    namespace = environ.get("MOONLIGHT_NAMESPACE", "moonlight")
    return RayJobApi(kubernetes_client.ApiClient(configuration), namespace, patience_s)


def _status(error: ApiException) -> dict[str, Any]:
    """The Status object of an answer; empty when it is something else, as from a proxy or for an unknown path."""
    try:
        found = json.loads(error.body or "")
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _short(error: BaseException) -> str:
    """One line; an ApiException's own words are a page of headers."""
    if isinstance(error, ApiException):
        return f"{error.status} {_status(error).get('message') or error.reason}"
    return " ".join(str(error).split())[:300] or type(error).__name__
