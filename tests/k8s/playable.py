"""Acts of the security model that a cluster can be asked about without making anything: rights, and creations as dry runs."""

from __future__ import annotations

import copy

from k8s.conformance.look import Try
from tests.k8s.acts import ALLOWED, NO_RIGHT, acts

PEOPLE = ("moonlight-researchers", "moonlight-ci", "moonlight-operators")


def tries(overlay: str) -> list[Try]:
    """People and drivers; controllers act by their charts' rights, and a dry run of a change or deletion needs the object."""
    found = []
    for act in acts(overlay):
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
            Try(act.what, act.user.name, act.user.groups, act.verdict == ALLOWED, tuple(question), created, words)
        )
    return found


def aimed(what: list[Try], ident: str) -> list[Try]:
    """The same acts in the throw-away copy of this id: its namespaces, groups and service accounts."""
    return [
        each._replace(
            user=_account(each.user, ident),
            groups=tuple(_group(name, ident) for name in each.groups),
            can_i=tuple(f"{word}-{ident}" if word.startswith("--namespace=") else word for word in each.can_i),
            created=_moved(each.created, ident),
        )
        for each in what
    ]


def _account(name: str, ident: str) -> str:
    head, _, account = name.rpartition(":")
    return f"{head}-{ident}:{account}" if name.startswith("system:serviceaccount:moonlight") else name


def _group(name: str, ident: str) -> str:
    return f"{name}-{ident}" if name.startswith(("moonlight-", "system:serviceaccounts:moonlight")) else name


def _moved(item: dict[str, object] | None, ident: str) -> dict[str, object] | None:
    if item is None:
        return None
    made = copy.deepcopy(item)
    made["metadata"]["namespace"] += f"-{ident}"  # type: ignore[index]
    return made
