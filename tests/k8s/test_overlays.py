"""Every overlay, and what Argo CD is shown, holds against every rule."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import pytest
import yaml

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
WORKSPACES = ("moonlight", "moonlight-submit")


@contextlib.contextmanager
def overlay_of_somebody(name: str, lines: list[str]) -> Iterator[str]:
    """A folder beside ours for a while, with a kustomization of these lines."""
    folder = REPOSITORY / "k8s" / f".test-{name}"
    folder.mkdir()
    try:
        (folder / "kustomization.yaml").write_text("\n".join(lines) + "\n")
        yield f"k8s/{folder.name}"
    finally:
        (folder / "kustomization.yaml").unlink(missing_ok=True)
        folder.rmdir()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_has_no_problems(overlay: str) -> None:
    assert problems(render(f"k8s/overlays/{overlay}"), digests=overlay != "kind") == []


def test_gitops_has_no_problems() -> None:
    assert gitops_problems(render("k8s/gitops")) == []


BRANCHES = {"dev": "main", "staging": "staging", "prod": "production"}


@pytest.mark.parametrize("environment", BRANCHES)
def test_the_root_of_an_environment_leads_to_its_overlay(environment: str) -> None:
    root = yaml.safe_load((REPOSITORY / f"k8s/roots/{environment}/root.yaml").read_text())
    objects = render(f"k8s/roots/{environment}")
    assert schema.check([root]) == []
    assert root["spec"]["source"]["path"] == f"k8s/roots/{environment}"
    source = find(objects, "Application", "moonlight")["spec"]["source"]
    assert source["path"] == f"k8s/overlays/{environment}"
    assert source["targetRevision"] == root["spec"]["source"]["targetRevision"] == BRANCHES[environment]
    overlay = render(f"k8s/overlays/{environment}")
    cluster = find(overlay, "EC2NodeClass", "moonlight")["spec"]["subnetSelectorTerms"][0]["tags"][
        "karpenter.sh/discovery"
    ]
    values = find(objects, "Application", "karpenter")["spec"]["source"]["helm"]["valuesObject"]
    assert values["settings"] == {"clusterName": cluster, "interruptionQueue": f"Karpenter-{cluster}"}
    bucket = yaml.safe_load(find(overlay, "ConfigMap", "artifact-repositories")["data"]["s3"])["s3"]["bucket"]
    outputs = find(objects, "Application", "fluent-bit")["spec"]["source"]["helm"]["valuesObject"]["config"]["outputs"]
    assert f"bucket {bucket}\n" in outputs
    by_hand = "automated" not in find(objects, "Application", "moonlight")["spec"]["syncPolicy"]
    assert by_hand == (environment != "dev")


def test_a_commit_carries_one_image_for_every_environment() -> None:
    images = {environment: set(images_of(render(f"k8s/overlays/{environment}"))) for environment in BRANCHES}
    assert images["dev"] == images["staging"] == images["prod"]
    assert len(images["prod"]) == 1


def test_staging_has_no_problems() -> None:
    assert problems(render("k8s/overlays/staging"), digests=True) == []


@pytest.mark.parametrize("component", ["provisioning-request", "history-server", "spot-evaluate"])
def test_opt_in_components_build_and_hold(component: str) -> None:
    """They stand on prod as an overlay of somebody's would."""
    lines = ["resources: [../overlays/prod]", f"components: [../components/{component}]"]
    if component == "provisioning-request":  # it needs pools that may be empty, topology needs Ready nodes
        lines[0] = "resources: [../overlays/dev]"
    digest = "0" * 64
    images = [f"{{name: kuberay-history-{name}, digest: 'sha256:{digest}'}}" for name in ("collector", "server")]
    lines.append(f"images: [{', '.join(images)}]")
    with overlay_of_somebody(component, lines) as folder:
        objects = render(folder)
    assert [problem for problem in problems(objects, digests=True) if "part-of" not in problem] == []


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


def test_generated_names_are_followed_everywhere() -> None:
    """Fact 17: in RayJobs, RayClusters and Argo's templates kustomize follows them only by our configuration."""
    lines = ["resources: [../overlays/prod]", "configMapGenerator:"]
    lines += [f"  - {{name: moonlight-runs, namespace: {name}, literals: [in={name}]}}" for name in WORKSPACES]
    with overlay_of_somebody("runs", lines) as folder:
        objects = render(folder)
    for namespace in WORKSPACES:
        made = [
            item["metadata"]["name"]
            for item in select(objects, "ConfigMap", namespace=namespace)
            if item.get("data", {}).get("in") == namespace
        ]
        used = {
            volume["configMap"]["name"]
            for item in objects
            if item["metadata"].get("namespace") == namespace
            for pod in pod_templates(item).values()
            for volume in pod["spec"]["volumes"]
            if volume["name"] == "runs"
        }
        assert [*used] == made
        assert made != ["moonlight-runs"]


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


def test_evaluate_on_spot_is_where_its_flavor_and_pool_are() -> None:
    """As the training host's pool: labels and taints of the flavor are its pool's; the head stays where nothing is reclaimed."""
    lines = ["resources: [../overlays/prod]", "components: [../components/spot-evaluate]"]
    with overlay_of_somebody("evaluate-on-spot", lines) as folder:
        objects = render(folder)
    flavor, pool = find(objects, "ResourceFlavor", "gpu-small-spot"), find(objects, "NodePool", "gpu-small-spot")
    assert flavor["spec"]["nodeLabels"] == pool["spec"]["template"]["metadata"]["labels"]
    assert flavor["spec"]["nodeTaints"] == pool["spec"]["template"]["spec"]["taints"]
    cluster = find(objects, "RayJob", "template-evaluate")["spec"]["rayClusterSpec"]
    assert cluster["workerGroupSpecs"][0]["template"]["spec"]["nodeSelector"] == flavor["spec"]["nodeLabels"]
    assert cluster["headGroupSpec"]["template"]["spec"]["nodeSelector"] == {"moonlight.ai/node-pool": "cpu-on-demand"}


def test_kind_needs_no_gpu_and_no_node_labels() -> None:
    objects = render("k8s/overlays/kind")
    for job in select(objects, "RayJob"):
        assert "nodeSelector" not in str(job)
        assert "nvidia.com/gpu" not in str(job)
    assert len(list(select(objects, "ResourceFlavor"))) == 1
