"""Several teams: each on the overlay `teams` holds every rule, has walls of its own, and shares one cohort's quota by weight."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from pathlib import Path

import hcl2
import pytest
import yaml

from tests.k8s import rbac
from tests.k8s.acts import NO_RIGHT
from tests.k8s.manifests import REPOSITORY, Manifest, find, needs_kubectl, quantity, render, select
from tests.k8s.people import EVERYBODY, job_of, workflow
from tests.k8s.rbac import Request, User, service_account
from tests.k8s.rules import agreement, argo, expressions, kuberay, kueue, network, pods, problems, schema
from tests.k8s.rules.policies import denials

pytestmark = needs_kubectl
TEAMS = ("north", "south")
FOLDER = REPOSITORY / "k8s/teams"


def cluster() -> list[Manifest]:
    """What stands in a cluster with both teams."""
    return [*render("k8s/overlays/teams"), *(item for team in TEAMS for item in render(f"k8s/teams/{team}"))]


def test_teams_beside_each_other_have_no_problems() -> None:
    objects = cluster()
    assert problems(render("k8s/overlays/teams"), digests=True) == []
    north = [item for item in objects if item not in render("k8s/teams/south")]  # which is north by another name
    assert schema.check(north) == pods.check(north, digests=True) == []
    for rule in (kuberay, kueue, argo, agreement, network, expressions):
        assert rule.check(north) == []
    names = [(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects]
    assert len(set(names)) == len(names)
    for item in objects:  # kustomize does not know which kinds of others have no namespace
        if item["kind"] in ("ClusterQueue", "ClusterRoleBinding", "Cohort", "Namespace"):
            assert "namespace" not in item["metadata"]


def test_the_cohort_has_what_the_queues_of_prod_had() -> None:
    had: dict[tuple[str, str], float] = defaultdict(float)
    for queue in select(render("k8s/overlays/prod"), "ClusterQueue"):
        for flavor in queue["spec"]["resourceGroups"][0]["flavors"]:
            for each in flavor["resources"]:
                had[flavor["name"], each["name"]] += quantity(each["nominalQuota"])
    has = {
        (flavor["name"], each["name"]): quantity(each["nominalQuota"])
        for flavor in find(cluster(), "Cohort", "moonlight")["spec"]["resourceGroups"][0]["flavors"]
        for each in flavor["resources"]
    }
    assert {key: value for key, value in has.items() if value} == {key: value for key, value in had.items() if value}


def test_queues_have_weights_and_nothing_else_of_their_own() -> None:
    queues = list(select(cluster(), "ClusterQueue"))
    assert len(queues) == 6
    for queue in queues:
        spec = queue["spec"]
        assert spec["cohortName"] == "moonlight"
        assert float(spec["fairSharing"]["weight"]) > 0
        assert spec["preemption"]["reclaimWithinCohort"] == "Any"  # else a share that another uses never comes back
        for flavor in spec["resourceGroups"][0]["flavors"]:
            assert {quantity(each["nominalQuota"]) for each in flavor["resources"]} == {0}
    sharing = yaml.safe_load((REPOSITORY / "k8s/queues/manager-config.yaml").read_text())["fairSharing"]
    assert sharing["preemptionStrategies"] == ["LessThanOrEqualToFinalShare", "LessThanInitialShare"]


def test_a_team_is_admitted_into_its_own_queues_only() -> None:
    objects = cluster()
    spaces = {item["metadata"]["name"]: item["metadata"]["labels"] for item in select(objects, "Namespace")}
    for team in TEAMS:
        for name in ("cpu", "gpu"):
            local = find(objects, "LocalQueue", name, f"moonlight-team-{team}")
            wanted = find(objects, "ClusterQueue", local["spec"]["clusterQueue"])["spec"]["namespaceSelector"]["matchLabels"]  # fmt: skip
            admitted = [space for space, labels in spaces.items() if wanted.items() <= labels.items()]
            assert admitted == [f"moonlight-team-{team}"]


def _researcher(team: str) -> User:
    return User(
        f"arn:aws:sts::111122223333:assumed-role/{team}/erin", (f"moonlight-team-{team}-researchers", EVERYBODY)
    )


def _said(objects: list[Manifest], user: User, item: Manifest) -> str:
    group, namespace = item["apiVersion"].rpartition("/")[0], item["metadata"]["namespace"]
    if not rbac.allowed(objects, user, Request("create", group, item["kind"].lower() + "s", namespace)):
        return NO_RIGHT
    return "; ".join(denials(objects, item, user=user))


def _in(namespace: str, item: Manifest) -> Manifest:
    return {**item, "metadata": {**item["metadata"], "namespace": namespace}}


@pytest.mark.parametrize("team", TEAMS)
def test_people_start_runs_in_their_own_team_only(team: str) -> None:
    objects, user = cluster(), _researcher(team)
    for space in ("moonlight", *(f"moonlight-team-{each}" for each in TEAMS)):
        own = space == f"moonlight-team-{team}"
        assert _said(objects, user, _in(space, workflow(user))) == ("" if own else NO_RIGHT), space
        dear = _said(objects, user, _in(space, workflow(user, priority="moonlight-release")))
        assert ("that you may `use`" in dear) if own else dear == NO_RIGHT
        for verb, group, resource in (("list", "ray.io", "rayjobs"), ("get", "", "pods/log")):
            assert rbac.allowed(objects, user, Request(verb, group, resource, space)) == own
        assert not rbac.allowed(objects, user, Request("get", "", "secrets", space, "x"))
    pages = (Request("get", "", "services/proxy", "monitoring", "http:kube-prometheus-stack-grafana:80"), Request("create", "", "pods/portforward", "argo"))  # fmt: skip
    assert all(rbac.allowed(objects, user, page) for page in pages)
    shared = User("x", ("moonlight-researchers", EVERYBODY))
    assert _said(objects, shared, _in(f"moonlight-team-{team}", workflow(shared))) == NO_RIGHT


@pytest.mark.parametrize("team", TEAMS)
def test_drivers_make_jobs_of_their_own_teams_templates_only(team: str) -> None:
    objects, space = cluster(), f"moonlight-team-{team}"
    made = job_of([item for item in objects if item["metadata"].get("namespace") == space], "train")
    assert made["metadata"]["namespace"] == space
    assert _said(objects, service_account(space, "driver"), made) == ""
    foreign = {**made, "spec": {**made["spec"], "backoffLimit": 9}}
    assert "must be its template's" in _said(objects, service_account(space, "driver"), foreign)
    for other in ("moonlight", "moonlight-submit", *(f"moonlight-team-{each}" for each in TEAMS if each != team)):
        assert _said(objects, service_account(other, "driver"), made) == NO_RIGHT


def test_teams_differ_in_name_and_weight_only() -> None:
    def text(team: str, path: Path) -> str:
        return re.sub(r'weight: "\d+"', "weight", path.read_text().replace(team, "NAME"))

    files = sorted(path.relative_to(FOLDER / "north") for path in (FOLDER / "north").rglob("*.yaml"))
    assert files == sorted(path.relative_to(FOLDER / "south") for path in (FOLDER / "south").rglob("*.yaml"))
    for file in files:
        assert text("north", FOLDER / "north" / file) == text("south", FOLDER / "south" / file)


def test_argo_cd_knows_every_team_and_may_touch_its_namespace() -> None:
    made = yaml.safe_load((FOLDER / "application-set.yaml").read_text())
    assert schema.check([made]) == []
    assert tuple(each["team"] for each in made["spec"]["generators"][0]["list"]["elements"]) == TEAMS
    spec = made["spec"]["template"]["spec"]
    assert spec["source"]["path"] == "k8s/teams/{{.team}}"
    project = find(render("k8s/gitops"), "AppProject", spec["project"])["spec"]
    assert spec["source"]["repoURL"] in project["sourceRepos"]
    assert "moonlight-team-*" in {each["namespace"] for each in project["destinations"]}
    assert {path.parent.name for path in FOLDER.glob("*/cluster-queues.yaml")} == set(TEAMS)


def test_logs_of_every_workspace_are_kept_and_of_no_other() -> None:
    """A container's log is called <pod>_<namespace>_<container>-<id>.log."""
    values = find(render("k8s/gitops"), "Application", "fluent-bit")["spec"]["source"]["helm"]["valuesObject"]
    paths = next(line for line in values["config"]["inputs"].splitlines() if " Path /var/log/containers" in line)
    kept = paths.split()[1].split(",")
    spaces = [item["metadata"]["name"] for item in select(cluster(), "Namespace")]
    assert len(spaces) == 2 + len(TEAMS)
    for space in (*spaces, "kube-system", "moonlight-history"):
        file = f"/var/log/containers/first-train-1-x2k9q-worker_{space}_ray-worker-0a1b.log"
        assert any(fnmatch.fnmatchcase(file, path) for path in kept) == (space in spaces), space


def test_infra_calls_namespaces_and_groups_as_the_teams_do() -> None:
    storage = (REPOSITORY / "infra/modules/plan/storage.tf").read_text()
    assert '"moonlight-team-${team}"' in storage
    main = (REPOSITORY / "infra/main.tf").read_text()
    for role in ("researchers", "ci"):
        assert f'kubernetes_groups = ["moonlight-team-${{team}}-{role}"]' in main
        assert any(f"moonlight-team-north-{role}" in str(item.get("subjects")) for item in render("k8s/teams/north"))
    assert hcl2.loads((REPOSITORY / "infra/variables.tf").read_text())
