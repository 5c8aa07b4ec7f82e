"""Rights as the API server's RBAC authorizer gives them, from rendered Roles, ClusterRoles and their bindings.

A rule allows a request if verb, API group, resource (`pods/log` for a subresource) and, where the rule names objects, the object's name
match; a ClusterRole bound by a RoleBinding holds in the binding's namespace only. A request without a name (create, list) matches no rule
that names objects. Source: Kubernetes v1.34 `plugin/pkg/auth/authorizer/rbac`, `component-helpers/auth/rbac/validation`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.k8s.manifests import Manifest, select

EVERYTHING = [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]


class User(NamedTuple):
    """Who asks. `rules` are rights from outside of our manifests: the operators' own charts, cluster administration."""

    name: str
    groups: tuple[str, ...] = ()
    rules: tuple[dict[str, Any], ...] = ()


def service_account(namespace: str, name: str, rules: tuple[dict[str, Any], ...] = ()) -> User:
    """The user that a pod of this account is."""
    groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated")
    return User(f"system:serviceaccount:{namespace}:{name}", groups, rules)


class Request(NamedTuple):
    """What is asked: `resource` with its subresource behind a slash; no namespace for cluster-scoped objects, no name for create and list."""

    verb: str
    group: str
    resource: str
    namespace: str | None = None
    name: str = ""


def allowed(objects: list[Manifest], user: User, request: Request) -> bool:
    return any(_matches(rule, request) for rule in _rules(objects, user, request.namespace))


def _rules(objects: list[Manifest], user: User, namespace: str | None) -> Iterator[dict[str, Any]]:
    yield from user.rules
    for binding in select(objects, "ClusterRoleBinding"):
        if _binds(binding, user):
            yield from _role(objects, binding["roleRef"], None)
    if namespace is not None:
        for binding in select(objects, "RoleBinding", namespace=namespace):
            if _binds(binding, user):
                yield from _role(objects, binding["roleRef"], namespace)


def _role(objects: list[Manifest], reference: dict[str, str], namespace: str | None) -> list[dict[str, Any]]:
    where = namespace if reference["kind"] == "Role" else None
    role = next(select(objects, reference["kind"], reference["name"], where), None)
    return role["rules"] if role else []


def _binds(binding: Manifest, user: User) -> bool:
    for subject in binding.get("subjects", []):
        if subject["kind"] == "ServiceAccount":
            if user.name == f"system:serviceaccount:{subject['namespace']}:{subject['name']}":
                return True
        elif subject["name"] in (user.groups if subject["kind"] == "Group" else (user.name,)):
            return True
    return False


def _matches(rule: dict[str, Any], request: Request) -> bool:
    subresource = request.resource.partition("/")[2]
    resources = {"*", request.resource} | ({f"*/{subresource}"} if subresource else set())
    names = rule.get("resourceNames")
    return (
        bool({"*", request.verb} & set(rule["verbs"]))
        and bool({"*", request.group} & set(rule.get("apiGroups", [])))
        and bool(resources & set(rule.get("resources", [])))
        and (not names or request.name in names)
    )
