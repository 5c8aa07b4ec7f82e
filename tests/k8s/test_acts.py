"""The wall: every act of tests/k8s/acts.py, by impersonation, against RBAC and admission policies of prod."""

from __future__ import annotations

import functools
from collections import Counter

from tests.k8s import rbac
from tests.k8s.acts import ALLOWED, NO_RIGHT, Act, acts
from tests.k8s.manifests import Manifest, needs_kubectl, render
from tests.k8s.rules.policies import denials

pytestmark = needs_kubectl
OPERATIONS = {"create": "CREATE", "update": "UPDATE", "patch": "UPDATE", "delete": "DELETE"}


@functools.cache
def prod() -> list[Manifest]:
    return render("k8s/overlays/prod")


def answer(act: Act) -> list[str]:
    """What the API server says: nothing when it does what is asked."""
    if not rbac.allowed(prod(), act.user, act.request):
        return [NO_RIGHT]
    if act.sent is None:
        return []
    return denials(prod(), act.sent, operation=OPERATIONS[act.request.verb], before=act.before, user=act.user)


@functools.cache
def answers() -> list[tuple[Act, list[str]]]:
    return [(act, answer(act)) for act in acts()]


def test_every_act_ends_as_the_security_model_says() -> None:
    wrong = []
    for act, said in answers():
        found = "; ".join(said) or ALLOWED
        if found != act.verdict and (act.verdict in (ALLOWED, NO_RIGHT) or act.verdict not in found):
            wrong.append(f"{act.user.name}: {act.what}: {found}, expected {act.verdict}")
    assert wrong == []


def test_there_are_acts_of_every_kind() -> None:
    """A matrix in which everything is refused, or allowed, or by one person, shows nothing."""
    counts = Counter((act.user.name.split("/")[-1].split(":")[-1], act.verdict in (ALLOWED,)) for act in acts())
    assert sum(counts.values()) >= 120
    for who in ("alice", "build-17", "carol", "driver"):
        assert counts[who, True] >= 5, who
        assert counts[who, False] >= 5, who
    assert len({(act.user.name, act.what) for act in acts()}) == len(acts())
