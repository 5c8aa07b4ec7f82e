"""Every command, path and name on docs/kubernetes.md exists: files, make targets, modules, objects, labels, versions, sections."""

from __future__ import annotations

import re
import shlex

import pytest

from pipeline.workflow.rayjobs import Outcome
from tests.k8s.manifests import REPOSITORY, Manifest, needs_kubectl, render
from tests.k8s.rules.agreement import RUNS

PAGE = (REPOSITORY / "docs/kubernetes.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.strip().splitlines()]
TOOLS = {
    "k8s/promote.sh",
    "make",
    "kubectl",
    "terraform",
    "aws",
    "docker",
    "argocd",
    "argo",
    "ray",
    "python",
    "cp",
    "export",
}
NAMESPACES = {
    "moonlight-history",
    "logging",
    "moonlight",
    "moonlight-submit",
    "kuberay-system",
    "kueue-system",
    "argo",
    "monitoring",
}
RUN = "first"  # the run that the page starts: its objects exist once somebody did
KINDS = {
    "rayjob": "RayJob",
    "rayjobs": "RayJob",
    "rayclusters": "RayCluster",
    "workflow": "Workflow",
    "workflows": "Workflow",
    "workloads": "Workload",
    "events": "Event",
    "cronworkflow": "CronWorkflow",
    "clusterqueue": "ClusterQueue",
    "clusterqueues": "ClusterQueue",
    "nodeclaims": "NodeClaim",
    "pods": "Pod",
    "workflowtemplate": "WorkflowTemplate",
}
VERBS = {
    "auth",
    "apply",
    "create",
    "get",
    "describe",
    "delete",
    "patch",
    "kustomize",
    "port-forward",
    "wait",
    "logs",
    "proxy",
}
PATHS = re.compile(r"(?<![\w/.:])((?:k8s|infra|docs|tests|pipeline)/[\w./-]*\w)")


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 40


@pytest.mark.parametrize("path", sorted(set(PATHS.findall(PAGE))))
def test_path_exists(path: str) -> None:
    assert path == "infra/terraform.tfvars" or (REPOSITORY / path).exists()


@pytest.mark.parametrize("line", COMMANDS)
def test_command_starts_with_a_tool(line: str) -> None:
    words = shlex.split(line.rstrip("& "))
    assert words[0] in TOOLS or "=" in words[0], line


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?m)(?:`|^)make ([a-z0-9-]+)", PAGE))))
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (REPOSITORY / "k8s/k8s.mk").read_text(), re.M)


@needs_kubectl
@pytest.mark.parametrize("line", [line for line in COMMANDS if "kubectl" in line])
def test_kubectl_names_what_exists(line: str) -> None:
    objects = render("k8s/overlays/prod")
    for command in re.findall(r"kubectl ([^|)]*)", line):
        words = shlex.split(command.rstrip("& "))
        options = {
            word: words[index + 1]
            for index, word in enumerate(words[:-1])
            if word in ("--namespace", "--selector", "--filename", "--patch")
        }
        values = set(options.values())
        assert options.get("--namespace", "moonlight") in NAMESPACES
        plain = [word for word in words if not word.startswith("-") and word not in values]
        assert plain[0] in VERBS, plain
        if plain[0] in ("get", "describe", "delete", "patch", "wait") and len(plain) > 1:
            name = (
                plain[2] if len(plain) > 2 and plain[2] != "merge" and not plain[2].startswith("condition=") else None
            )
            _named(objects, plain[1], name)
        for key in re.findall(r"([\w./-]+)=", options.get("--selector", "")):
            assert key in ("moonlight.ai/run-id", "app.kubernetes.io/managed-by", "ray.io/cluster")


def _named(objects: list[Manifest], kind: str, name: str | None) -> None:
    assert kind in KINDS, kind
    if name is None or name.startswith(RUN) or name == ".lastTimestamp":
        return
    assert any(item["kind"] == KINDS[kind] and item["metadata"]["name"] == name for item in objects), f"{kind} {name}"


@needs_kubectl
@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("argo submit")])
def test_workflow_parameters_exist(line: str) -> None:
    objects = render("k8s/overlays/prod")
    template = next(item for item in objects if item["kind"] == "WorkflowTemplate")
    assert f"workflowtemplate/{template['metadata']['name']}" in line
    known = {entry["name"] for entry in template["spec"]["arguments"]["parameters"]}
    assert set(re.findall(r"--parameter ([\w-]+)=", PAGE)) <= known


def test_names_in_the_text() -> None:
    """Alerts, annotations, environment variables and exit codes named on the page are the code's."""
    alerts = (REPOSITORY / "k8s/monitoring/alerts.yaml").read_text()
    for alert in re.findall(r"\bMoonlight[A-Z]\w+", PAGE):
        assert f"alert: {alert}\n" in alerts
    code = "".join(path.read_text() for path in (REPOSITORY / "pipeline/workflow").glob("rayjobs*.py"))
    for variable in set(re.findall(r"\bMOONLIGHT_\w+", PAGE)) - {"MOONLIGHT_CRD_SCHEMAS"}:
        assert variable in code
    table = {int(code_) for code_ in re.findall(r"^\| (\d+) \|", PAGE, re.M)}
    assert table == {int(outcome) for outcome in Outcome} - {0}


def test_a_configuration_is_named_by_where_pods_mount_it() -> None:
    assert set(re.findall(r"(/etc/[\w/]+)/my-run.yaml", PAGE)) == {RUNS["mountPath"]}


def test_runbooks_of_alerts_are_sections() -> None:
    sections = set(re.findall(r"^#+ (.*)$", PAGE, re.M))
    for section in re.findall(
        r'runbook: docs/kubernetes.md, "(.*)"', (REPOSITORY / "k8s/monitoring/alerts.yaml").read_text()
    ):
        assert section in sections


def test_settings_named_on_the_page_exist() -> None:
    from pipeline.config.load import load_config

    config = load_config("debug").model_dump()
    for section, key in re.findall(r"`(storage|training|checkpoint|parallelism|publishing|cluster)\.(\w+)", PAGE):
        assert key in config[section], f"{section}.{key}"


def test_terraform_addresses_and_variables_exist() -> None:
    text = "".join(path.read_text() for path in (REPOSITORY / "infra").glob("*.tf"))
    for line in (line for line in COMMANDS if "state rm" in line):
        for address in line.split("state rm ")[1].split():
            kind, name = address.split(".")
            assert f'{kind} "{name}"' in text or f'resource "{kind}" "{name}"' in text, address
    declared = set(re.findall(r"^(?:variable|output) \"(\w+)\"|^    (\w+) += optional", text, re.M))
    names = {name for pair in declared for name in pair if name}
    assert {"admin_role_arns", "researcher_role_arns", "api_access_cidrs", "placement_group", "cost_per_hour"} <= names
    for name in re.findall(r"`(\w+_(?:arns|cidrs|group|hour))`", PAGE):
        assert name in names, name


def test_where_your_names_belong_the_examples_stand() -> None:
    table = PAGE[PAGE.index("| Yours | In |") :].split("\n\n")[0]
    texts = {path: (REPOSITORY / path).read_text() for path in PATHS.findall(table)}
    assert len(texts) == 7
    for path, example in {
        "k8s/components/image/kustomization.yaml": "111122223333.dkr.ecr",
        "k8s/overlays/prod/kustomization.yaml": "moonlight-prod",
        "k8s/roots/prod/kustomization.yaml": "bucket moonlight\n",
        "k8s/base/artifact-repository.yaml": "bucket: moonlight",
        "k8s/overlays/prod/retrain.yaml": "storage.root=s3://moonlight/",
        "k8s/queues/cluster-queues.yaml": "name: gpu-train",
        "k8s/gitops/operators/karpenter.yaml": "clusterName: moonlight-prod",
    }.items():
        assert example in texts[path], path


def test_the_section_of_troubleshooting_is_where_help_points_to() -> None:
    from jobs.drivers.options import KUBERAY

    page, section = re.findall(r'\((docs/[\w.]+), "(.*)"\)', KUBERAY)[0]
    assert f"## {section}\n" in (REPOSITORY / page).read_text()
