"""ValidatingAdmissionPolicies evaluated as the API server does: constraints, match conditions, variables, validations, bindings."""

from __future__ import annotations

import functools
from typing import Any

import celpy
from celpy import celtypes

from tests.k8s.manifests import Manifest, label, select
from tests.k8s.rules.kueue import _selects

KUBERAY = {"update rayclusters/status"}  # rights that only the operator has
PLURALS = {"RayJob": "rayjobs", "RayCluster": "rayclusters", "Workflow": "workflows"}


def check(objects: list[Manifest]) -> list[str]:
    """Our own objects pass our own policies; every policy is bound and every binding binds something."""
    found = []
    for item in objects:
        if item["kind"] in PLURALS:
            found += [f"{label(item)}: {denial}" for denial in denials(objects, item, rights={"update rayjobs"})]
    policies = {item["metadata"]["name"] for item in select(objects, "ValidatingAdmissionPolicy")}
    bindings = {item["spec"]["policyName"] for item in select(objects, "ValidatingAdmissionPolicyBinding")}
    found += [f"ValidatingAdmissionPolicy/{name}: not bound" for name in sorted(policies - bindings)]
    found += [f"ValidatingAdmissionPolicyBinding of {name}: no such policy" for name in sorted(bindings - policies)]
    for item in select(objects, "ValidatingAdmissionPolicyBinding"):
        if "Deny" not in item["spec"]["validationActions"]:
            found.append(f"{label(item)}: does not deny")
    for item in select(objects, "ValidatingAdmissionPolicy"):
        if item["spec"].get("failurePolicy") != "Fail":
            found.append(f"{label(item)}: failurePolicy is not Fail")
    return found


def denials(
    objects: list[Manifest],
    item: Manifest,
    *,
    operation: str = "CREATE",
    before: Manifest | None = None,
    username: str = "somebody",
    rights: set[str] = frozenset(),  # type: ignore[assignment]
) -> list[str]:
    """Messages with which the policies among `objects` refuse this request.

    `before` is what an UPDATE finds (the item itself unless given), `rights` are the user's: `update rayjobs`, ...
    """
    namespace = next(select(objects, "Namespace", item["metadata"].get("namespace")), None)
    found = []
    for binding in select(objects, "ValidatingAdmissionPolicyBinding"):
        selector = binding["spec"].get("matchResources", {}).get("namespaceSelector", {})
        policy = next(select(objects, "ValidatingAdmissionPolicy", binding["spec"]["policyName"]), None)
        if policy is None or namespace is None or not _in(selector, namespace["metadata"].get("labels", {})):
            continue
        if _constrained(policy, item, operation):
            context = _context(item, operation, before, username, rights)
            found += [
                f"{policy['metadata']['name']}: {message}" for message in _denials(policy, context, sorted(rights))
            ]
    return found


def _in(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    expressions = selector.get("matchExpressions", [])
    return _selects(selector, labels) and all(labels.get(entry["key"]) in entry["values"] for entry in expressions)


def _constrained(policy: Manifest, item: Manifest, operation: str) -> bool:
    group, _, version = item["apiVersion"].rpartition("/")
    return any(
        group in rule["apiGroups"]
        and version in rule["apiVersions"]
        and operation in rule["operations"]
        and PLURALS[item["kind"]] in rule["resources"]
        for rule in policy["spec"]["matchConstraints"]["resourceRules"]
    )


def _context(
    item: Manifest, operation: str, before: Manifest | None, username: str, rights: set[str]
) -> dict[str, Any]:
    now, before = (None, item) if operation == "DELETE" else (item, (before or item) if operation == "UPDATE" else None)
    request = {
        "operation": operation,
        "namespace": item["metadata"].get("namespace"),
        "userInfo": {"username": username, "groups": []},
    }
    values = {"object": now, "oldObject": before, "request": request, "authorizer": ""}
    return {name: celpy.json_to_cel(value) for name, value in values.items()}


def _denials(policy: Manifest, context: dict[str, Any], rights: list[str]) -> list[str]:
    functions = {
        "group": lambda subject, name: name,
        "resource": lambda subject, name: name,
        "subresource": lambda resource, name: celtypes.StringType(f"{resource}/{name}"),
        "namespace": lambda resource, name: resource,
        "check": lambda resource, verb: celtypes.BoolType(f"{verb} {resource}" in rights),
        "allowed": lambda decision: decision,
    }

    def evaluate(expression: str) -> Any:
        environment, tree = _parsed(expression)
        return environment.program(tree, functions=functions).evaluate({**context, "variables": variables})

    variables = celtypes.MapType()
    spec = policy["spec"]
    if not all(bool(evaluate(condition["expression"])) for condition in spec.get("matchConditions", [])):
        return []
    found = []
    for variable in spec.get("variables", []):
        variables[celtypes.StringType(variable["name"])] = evaluate(variable["expression"])
    for validation in spec["validations"]:
        try:
            holds = bool(evaluate(validation["expression"]))
        except celpy.CELEvalError as error:  # failurePolicy: Fail
            found.append(f"cannot be evaluated: {error}")
            continue
        if not holds:
            found.append(validation["message"])
    return found


@functools.cache
def _parsed(expression: str) -> tuple[celpy.Environment, Any]:
    environment = celpy.Environment()
    return environment, environment.compile(expression)
