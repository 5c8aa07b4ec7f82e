"""ValidatingAdmissionPolicies evaluated as the API server does: constraints, bindings, parameters, match conditions, variables, validations.

Every binding of a policy that matches the request is evaluated with each of its parameters; a parameter that is not there refuses before match
conditions are looked at. `authorizer` asks the rights of `tests/k8s/rbac.py`. Source: Kubernetes v1.34 `admission/plugin/policy`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import celpy
from celpy import celtypes

from tests.k8s import rbac
from tests.k8s.manifests import Manifest, canonical, label, pod_templates, select
from tests.k8s.rbac import Request, User
from tests.k8s.rules.kueue import _selects

PLURALS = {
    "RayJob": "rayjobs",
    "RayCluster": "rayclusters",
    "Workflow": "workflows",
    "CronWorkflow": "cronworkflows",
    "ClusterQueue": "clusterqueues",
    "Pod": "pods",
}


def person(*rights: str, name: str = "somebody") -> User:
    """Somebody with these rights from elsewhere, each "verb resource"."""
    rules = [
        {"apiGroups": ["*"], "resources": [resource], "verbs": [verb]} for verb, resource in map(str.split, rights)
    ]
    return User(name, rules=tuple(rules))


KUBERAY = person("update rayclusters/status")
GIT = User("argocd", rules=tuple(rbac.EVERYTHING))  # Argo CD, a cluster administrator


def check(objects: list[Manifest]) -> list[str]:
    """Our own objects and pods pass our own policies; every policy is bound and every binding binds something."""
    found = []
    for item in objects:
        if item["kind"] in ("RayJob", "RayCluster", "Workflow"):
            found += [f"{label(item)}: {denial}" for denial in denials(objects, item, user=GIT)]
        for place, pod in pod_templates(item).items():
            made = {"apiVersion": "v1", "kind": "Pod", **pod}
            made["metadata"] = {**pod.get("metadata", {}), "name": "pod", "namespace": item["metadata"]["namespace"]}
            found += [f"{label(item)} {place}: {denial}" for denial in denials(objects, made, user=GIT)]
    policies = {item["metadata"]["name"]: item for item in select(objects, "ValidatingAdmissionPolicy")}
    bindings = {item["spec"]["policyName"] for item in select(objects, "ValidatingAdmissionPolicyBinding")}
    found += [f"ValidatingAdmissionPolicy/{name}: not bound" for name in sorted(policies.keys() - bindings)]
    found += [f"ValidatingAdmissionPolicyBinding of {name}: no such policy" for name in sorted(bindings - policies.keys())]  # fmt: skip
    for item in select(objects, "ValidatingAdmissionPolicyBinding"):
        spec = item["spec"]
        if "Deny" not in spec["validationActions"]:
            found.append(f"{label(item)}: does not deny")
        policy = policies.get(spec["policyName"], {"spec": {}})
        if ("paramKind" in policy["spec"]) != ("paramRef" in spec):
            found.append(f"{label(item)}: a policy has parameters if and only if its bindings name them")
        if spec.get("paramRef", {}).get("parameterNotFoundAction", "Deny") != "Deny":
            found.append(f"{label(item)}: a missing parameter admits")
    for item in policies.values():
        if item["spec"].get("failurePolicy") != "Fail":
            found.append(f"{label(item)}: failurePolicy is not Fail")
    return found


def denials(
    objects: list[Manifest],
    item: Manifest,
    *,
    operation: str = "CREATE",
    before: Manifest | None = None,
    user: User | None = None,
) -> list[str]:
    """Messages with which the policies among `objects` refuse this request; `before` is what an UPDATE finds (the item itself unless given)."""
    space = item["metadata"].get("namespace")
    namespace = next(select(objects, "Namespace", space), None) if space else {"metadata": {}}
    if namespace is None:
        return []
    labels = namespace["metadata"].get("labels", {})
    who = user or User("somebody")
    now, old = None if operation == "DELETE" else item, None if operation == "CREATE" else before or item
    selected = [each["metadata"].get("labels", {}) for each in (now, old) if each is not None]  # either may be selected
    said = {"username": who.name, "groups": list(who.groups)}
    request = {"operation": operation, "namespace": space or "", "userInfo": said}
    asked = {"object": now, "oldObject": old, "request": request}
    rights = [each for each in objects if each["apiVersion"].startswith("rbac.authorization.k8s.io/")]
    found = []
    for binding in select(objects, "ValidatingAdmissionPolicyBinding"):
        policy = next(select(objects, "ValidatingAdmissionPolicy", binding["spec"]["policyName"]), None)
        matching = binding["spec"].get("matchResources", {})
        if policy is None or not _constrained(policy, item, operation):
            continue
        if space and not _in(matching.get("namespaceSelector", {}), labels):
            continue
        if not any(_in(matching.get("objectSelector", {}), each) for each in selected):
            continue
        name = policy["metadata"]["name"]
        for params in _params(objects, policy, binding, space):
            if params is None:
                found.append(f"{name}: failed to configure binding: no {binding['spec']['paramRef']['name']} found")
                continue
            question = canonical([policy["spec"], {**asked, "params": params}, rights, who])
            found += [f"{name}: {message}" for message in _denials(question)]
    return found


def _params(
    objects: list[Manifest], policy: Manifest, binding: Manifest, namespace: str | None
) -> Iterator[Manifest | None]:
    """The parameter; {} where the policy has none, None where it is missing."""
    kind, reference = policy["spec"].get("paramKind"), binding["spec"].get("paramRef")
    if kind is None:
        yield {}
    else:
        yield next(select(objects, kind["kind"], reference["name"], reference.get("namespace", namespace)), None)


def _in(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return _selects(selector, labels) and all(
        labels.get(entry["key"]) in entry["values"] if entry["operator"] == "In" else entry["key"] not in labels
        for entry in selector.get("matchExpressions", [])
    )


def _constrained(policy: Manifest, item: Manifest, operation: str) -> bool:
    group, _, version = item["apiVersion"].rpartition("/")
    return item["kind"] in PLURALS and any(
        group in rule["apiGroups"]
        and {version, "*"} & set(rule["apiVersions"])
        and operation in rule["operations"]
        and PLURALS[item["kind"]] in rule["resources"]
        for rule in policy["spec"]["matchConstraints"]["resourceRules"]
    )


class _Asked(celtypes.MapType):
    """`authorizer` and what is asked of it so far."""

    def __init__(self, asked: dict[str, str], ask: Callable[[Request], bool]) -> None:
        super().__init__(celpy.json_to_cel(asked))
        self.asked, self.ask = asked, ask


def _with(key: str) -> Any:
    return lambda subject, value: _Asked({**subject.asked, key: str(value)}, subject.ask)


def _check(subject: _Asked, verb: str) -> Any:
    asked = subject.asked
    resource = "/".join(part for part in (asked["resource"], asked.get("subresource")) if part)
    request = Request(str(verb), asked["group"], resource, asked.get("namespace"), asked.get("name", ""))
    return celtypes.BoolType(subject.ask(request))


FUNCTIONS = {
    **{key: _with(key) for key in ("group", "resource", "subresource", "namespace", "name")},
    "check": _check,
    "allowed": lambda decision: decision,
    "replace": lambda text, old, new: celtypes.StringType(text.replace(old, new)),
    "substring": lambda text, start: celtypes.StringType(text[int(start) :]),
}


@functools.cache
def _denials(question: str) -> tuple[str, ...]:
    """One policy's messages about one request; nothing else is looked at, so tests that change other objects share the answer."""
    spec, values, rights, who = json.loads(question)
    variables = celtypes.MapType()
    context = {name: celpy.json_to_cel(value) for name, value in values.items()}
    context["authorizer"] = _Asked({}, functools.partial(rbac.allowed, rights, User(*who)))
    context["variables"] = variables
    if not all(bool(_program(condition["expression"]).evaluate(context)) for condition in spec.get("matchConditions", [])):  # fmt: skip
        return ()
    found = []
    for variable in spec.get("variables", []):  # the API server evaluates them where they are used
        name = celtypes.StringType(variable["name"])
        try:
            variables[name] = _program(variable["expression"]).evaluate(context)
        except celpy.CELEvalError as error:
            variables[name] = error
    for validation in spec["validations"]:
        try:
            value = _program(validation["expression"]).evaluate(context)
        except celpy.CELEvalError as error:  # failurePolicy: Fail
            found.append(f"cannot be evaluated: {error}")
            continue
        if not value or isinstance(value, celpy.CELEvalError):
            expression = validation.get("messageExpression")
            found.append(str(_program(expression).evaluate(context)) if expression else validation["message"])
    return tuple(found)


@functools.cache
def _program(expression: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(expression), functions=FUNCTIONS)
