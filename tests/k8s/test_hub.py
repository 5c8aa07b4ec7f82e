"""Publishing to the Hugging Face hub (k8s/components/hub): who gets the token, and that the wall lets nobody else have it."""

from __future__ import annotations

import functools

from tests.k8s.manifests import Manifest, find, label, needs_kubectl, pod_templates, render, select
from tests.k8s.people import DRIVER, head, job, job_of, pod, worker
from tests.k8s.rules import problems
from tests.k8s.rules.policies import GIT, denials
from tests.k8s.test_overlays import overlay_of_somebody

pytestmark = needs_kubectl
TOKEN = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "moonlight-hub", "key": "token"}}}


@functools.cache
def with_hub() -> list[Manifest]:
    with overlay_of_somebody("hub", ["resources: [../overlays/prod]", "components: [../components/hub]"]) as folder:
        return render(folder)


def test_it_builds_and_holds() -> None:
    assert problems(with_hub(), digests=True) == []


def test_only_the_workers_of_publish_see_the_hub_and_its_token() -> None:
    """`_push` (jobs/on_ray/publish.py) runs on a worker; the head runs no tasks."""
    found = {
        (label(item), where, container["name"])
        for item in with_hub()
        for where, template in pod_templates(item).items()
        for container in template["spec"]["containers"] + template["spec"].get("initContainers", [])
        if any(each["name"] in ("HF_TOKEN", "HF_HUB_OFFLINE") for each in container.get("env", []))
    }
    assert found == {("RayJob/moonlight/template-publish", "worker group workers", "ray-worker")}
    (container,) = worker(find(with_hub(), "RayJob", "template-publish"))["containers"]
    assert container["env"] == [{"name": "HF_HUB_OFFLINE", "value": "0"}, TOKEN]
    start = find(with_hub(), "RayJob", "template-publish")["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]
    assert start["num-cpus"] == "0"


def test_a_driver_publishes_and_no_other_stage_asks_for_the_token() -> None:
    objects = with_hub()
    assert denials(objects, job_of(objects, "publish"), user=DRIVER) == []
    for stage in ("prepare", "train", "evaluate"):
        asked = job_of(objects, stage, change=lambda j: worker(j)["containers"][0].setdefault("env", []).append(TOKEN))
        (denial,) = denials(objects, asked, user=DRIVER)
        assert "worker groups with their pods" in denial
    moved = job_of(objects, "publish", change=lambda j: head(j)["containers"][0]["env"].append(TOKEN))
    assert any("the head's containers" in denial for denial in denials(objects, moved, user=DRIVER))


def test_without_the_component_the_token_is_not_on_the_list() -> None:
    image = worker(job("publish"))["containers"][0]["image"]
    asks = {"env": [TOKEN]}
    assert denials(with_hub(), pod(image, container=asks), user=GIT) == []
    for objects, namespace in ((render("k8s/overlays/prod"), "moonlight"), (with_hub(), "moonlight-submit")):
        (denial,) = denials(objects, pod(image, namespace, container=asks), user=GIT)
        assert "come from no Secret but those" in denial


def test_nobody_gets_a_right_by_it() -> None:
    """Roles and bindings are prod's."""
    for kind in ("Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"):
        assert list(select(with_hub(), kind)) == list(select(render("k8s/overlays/prod"), kind))
