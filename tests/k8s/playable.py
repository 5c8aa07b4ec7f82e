"""Acts of the security model that a cluster can be asked about without making anything: rights, and creations as dry runs."""

from __future__ import annotations

import importlib.util
from typing import Any

from tests.k8s.acts import ALLOWED, NO_RIGHT, acts
from tests.k8s.manifests import REPOSITORY

PEOPLE = ("moonlight-researchers", "moonlight-ci", "moonlight-operators")


def module() -> Any:
    """k8s/conformance.py, which is a script."""
    spec = importlib.util.spec_from_file_location("conformance", REPOSITORY / "k8s/conformance.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def tries(overlay: str) -> list[Any]:
    """People and drivers; controllers act by their charts' rights, and a dry run of a change or deletion needs the object."""
    kit, found = module(), []
    assert overlay
    for act in acts():
        driver = act.user.name.startswith("system:serviceaccount:moonlight")
        if not driver and not set(act.user.groups) & set(PEOPLE):
            continue
        request = act.request
        if act.sent is not None and request.verb == "create" and act.verdict != NO_RIGHT:
            words = "" if act.verdict == ALLOWED else act.verdict
            created = act.sent
        elif act.sent is None or act.verdict == NO_RIGHT:
            words, created = "", None
        else:
            continue
        resource, _, subresource = request.resource.partition("/")
        target = f"{resource}.{request.group}" if request.group else resource
        question = [request.verb, f"{target}/{request.name}" if request.name else target]
        question += [f"--subresource={subresource}"] if subresource else []
        question += [f"--namespace={request.namespace}"] if request.namespace else []
        found.append(
            kit.Try(act.what, act.user.name, act.user.groups, act.verdict == ALLOWED, tuple(question), created, words)
        )
    return found
