"""Every overlay, and what Argo CD is shown, holds against every rule."""

from __future__ import annotations

from collections import Counter

import pytest
import yaml

from tests.k8s import crds
from tests.k8s.manifests import (
    OVERLAYS,
    REPOSITORY,
    Manifest,
    find,
    is_custom,
    needs_kubectl,
    pod_templates,
    render,
    select,
)
from tests.k8s.rules import gitops_problems, problems, schema

pytestmark = needs_kubectl


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_has_no_problems(overlay: str) -> None:
    assert problems(render(f"k8s/overlays/{overlay}"), digests=overlay != "kind") == []


def test_gitops_has_no_problems() -> None:
    root = yaml.safe_load((REPOSITORY / "k8s/gitops/root.yaml").read_text())
    assert gitops_problems(render("k8s/gitops")) == []
    assert schema.check([root]) == []
    assert root["spec"]["source"]["path"] == "k8s/gitops"


@pytest.mark.parametrize("component", ["provisioning-request", "history-server"])
def test_opt_in_components_build_and_hold(component: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """They stand on prod as an overlay of somebody's would."""
    folder = REPOSITORY / "k8s" / f".test-{component}"
    folder.mkdir()
    try:
        lines = ["resources: [../overlays/prod]", f"components: [../components/{component}]"]
        if component == "provisioning-request":  # it needs pools that may be empty, topology needs Ready nodes
            lines[0] = "resources: [../overlays/dev]"
        digest = "0" * 64
        lines.append(f"images: [{{name: kuberay-history-collector, digest: 'sha256:{digest}'}}]")
        (folder / "kustomization.yaml").write_text("\n".join(lines) + "\n")
        objects = render(f"k8s/.test-{component}")
        assert [problem for problem in problems(objects, digests=True) if "part-of" not in problem] == []
    finally:
        (folder / "kustomization.yaml").unlink(missing_ok=True)
        folder.rmdir()


@crds.needs_crds
def test_cel_rules_of_the_crds_are_really_evaluated() -> None:
    """A check that checks nothing must not look like one."""
    counts: Counter[str] = Counter()
    for item in render("k8s/overlays/prod"):
        if is_custom(item):
            counts[item["kind"]] += schema.evaluated_rules(item)
    assert counts["NodePool"] >= 30
    assert counts["EC2NodeClass"] >= 20
    assert counts["ClusterQueue"] >= 6
    assert counts["ResourceFlavor"] >= 5


def test_kustomize_settings_are_the_same_in_every_overlay() -> None:
    """Kustomize reads no file from outside an overlay, so each has its copy."""
    assert len({(REPOSITORY / f"k8s/overlays/{overlay}/kustomizeconfig.yaml").read_text() for overlay in OVERLAYS}) == 1


def test_images_are_rewritten_everywhere() -> None:
    """Fact 17: kustomize finds RayJob's containers by itself, Argo's templates only by our configuration."""
    objects = render("k8s/overlays/prod")
    images = set(images_of(objects))
    assert len(images) == 1
    assert "@sha256:" in images.pop()
    assert (
        sum(1 for _ in images_of(objects)) == 4 * 3 + 1 + 3
    )  # four stages (head, logs, worker), the submit cluster, three steps


def images_of(objects: list[Manifest]) -> list[str]:
    return [
        container["image"]
        for item in objects
        for pod in pod_templates(item).values()
        for container in pod["spec"]["containers"]
        if container["name"] != "autoscaler"
    ]


def test_prod_trains_with_efa_and_topology_and_prepares_on_spot() -> None:
    objects = render("k8s/overlays/prod")
    train = find(objects, "RayJob", "template-train")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    assert train["spec"]["containers"][0]["resources"]["limits"]["vpc.amazonaws.com/efa"] == "32"
    assert "kueue.x-k8s.io/podset-preferred-topology" in train["metadata"]["annotations"]
    prepare = find(objects, "RayJob", "template-prepare")["spec"]["rayClusterSpec"]
    assert prepare["workerGroupSpecs"][0]["template"]["spec"]["nodeSelector"] == {"moonlight.ai/node-pool": "cpu-spot"}
    assert prepare["headGroupSpec"]["template"]["spec"]["nodeSelector"] == {"moonlight.ai/node-pool": "cpu-on-demand"}


def test_kind_needs_no_gpu_and_no_node_labels() -> None:
    objects = render("k8s/overlays/kind")
    for job in select(objects, "RayJob"):
        assert "nodeSelector" not in str(job)
        assert "nvidia.com/gpu" not in str(job)
    assert len(list(select(objects, "ResourceFlavor"))) == 1
