"""Rules over rendered manifests: each module's `check(objects)` returns the problems it finds, one line each."""

from __future__ import annotations

from tests.k8s.manifests import Manifest
from tests.k8s.rules import agreement, argo, expressions, gitops, kuberay, kueue, network, pods, policies, schema


def problems(objects: list[Manifest], *, digests: bool = False) -> list[str]:
    """Every rule over one overlay; `digests`: images must be given by digest. What the schema refuses is not looked at further."""
    found = schema.check(objects)
    if found:
        return found
    found += pods.check(objects, digests=digests)
    for rule in (kuberay, kueue, policies, argo, agreement, network, expressions):
        found += rule.check(objects)
    return found


def gitops_problems(objects: list[Manifest]) -> list[str]:
    return [*schema.check(objects), *gitops.check(objects)]
