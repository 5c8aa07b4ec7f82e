"""The Terraform side: formatting, the plan module's own tests, the wiring's arguments, and its agreement with k8s/ and the presets.

`module_names.json` lists the input and output names of the pinned modules (names only), so that a misspelt or removed argument is
found without a registry.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import hcl2
import pytest
import yaml

from pipeline.config.load import PRESETS
from tests.k8s.manifests import REPOSITORY, find, needs_kubectl, quantity, render, select
from tests.k8s.test_overlays import overlay_of_somebody

INFRA = REPOSITORY / "infra"
NAMES = json.loads(Path(__file__).with_name("module_names.json").read_text())
needs_terraform = pytest.mark.skipif(shutil.which("terraform") is None, reason="terraform is not installed")
EFFECTS = {"NO_SCHEDULE": "NoSchedule"}


def terraform(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TF_IN_AUTOMATION": "1", "CHECKPOINT_DISABLE": "1"}
    return subprocess.run(
        ["terraform", *arguments], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


@functools.cache
def plan(example: str) -> dict[str, Any]:
    """The plan module's outputs for an example, worked out by Terraform (no provider, no account)."""
    given = hcl2.loads((INFRA / f"examples/{example}.tfvars").read_text())
    wanted = ("name", "bucket", "storage_prefix", "gpu_train", "efa")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(
            INFRA / "modules/plan", f"{folder}/plan", ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*")
        )
        variables = Path(folder) / "plan" / "terraform.tfvars.json"
        variables.write_text(json.dumps({key: unquoted(given[key]) for key in wanted}))
        for step in (("init", "-input=false"), ("apply", "-auto-approve", "-input=false")):
            done = terraform(*step, folder=variables.parent)
            assert done.returncode == 0, done.stdout + done.stderr
        outputs = json.loads(terraform("output", "-json", folder=variables.parent).stdout)
    return {name: entry["value"] for name, entry in outputs.items()}


def unquoted(value: Any) -> Any:
    """hcl2 keeps the quotes of strings."""
    if isinstance(value, dict):
        return {key.strip('"'): unquoted(below) for key, below in value.items()}
    if isinstance(value, list):
        return [unquoted(below) for below in value]
    return value.strip('"') if isinstance(value, str) else value


@needs_terraform
def test_formatted() -> None:
    done = terraform("fmt", "-check", "-recursive", "-diff", folder=INFRA)
    assert done.returncode == 0, done.stdout


@needs_terraform
def test_the_plan_module_passes_its_own_tests() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(INFRA / "modules/plan", f"{folder}/plan", ignore=shutil.ignore_patterns(".terraform*"))
        assert terraform("init", "-input=false", folder=Path(folder) / "plan").returncode == 0
        done = terraform("test", "-no-color", folder=Path(folder) / "plan")
    assert done.returncode == 0, done.stdout
    assert re.search(r"(\d+) passed, 0 failed", done.stdout)


def test_plan_is_free_of_providers() -> None:
    text = "".join(path.read_text() for path in (INFRA / "modules/plan").glob("*.tf"))
    assert not re.search(r"^(provider|resource|data) ", text, re.M)


def modules() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in INFRA.glob("*.tf"):
        for block in hcl2.loads(path.read_text()).get("module", []):
            found |= {name.strip('"'): body for name, body in block.items()}
    return found


META = {"source", "version", "for_each", "count", "depends_on", "providers"}


@pytest.mark.parametrize(
    "name", [name for name, body in modules().items() if not unquoted(body["source"]).startswith(".")]
)
def test_arguments_exist_in_the_pinned_module(name: str) -> None:
    body = modules()[name]
    known = NAMES[unquoted(body["source"])]
    assert unquoted(body["version"]) == known["version"]
    given = {key for key in body if not key.startswith("__")} - META
    assert given - set(known["inputs"]) == set()


def test_arguments_of_the_plan_exist_and_none_is_forgotten() -> None:
    declared = hcl2.loads((INFRA / "modules/plan/variables.tf").read_text())["variable"]
    names = {key.strip('"'): body for block in declared for key, body in block.items()}
    given = {key for key in modules()["plan"] if not key.startswith("__")} - META
    assert given <= set(names)
    assert {name for name, body in names.items() if "default" not in body} <= given


def test_node_group_arguments_exist() -> None:
    text = (INFRA / "main.tf").read_text()
    block = text[text.index("eks_managed_node_groups = {") : text.index("node_security_group_additional_rules")]
    given = set(re.findall(r"^      (\w+) +=", block, re.M))
    assert {"instance_types", "labels", "taints", "network_interfaces", "cloudinit_pre_nodeadm"} <= given
    assert not given & {"enable_efa_support", "create_placement_group"}  # a group that no reservation lies in
    assert given - set(NAMES["terraform-aws-modules/eks/aws"]["eks_managed_node_groups"]) == set()


def test_an_apply_with_the_same_inputs_changes_no_version() -> None:
    """The pinned EKS module takes the newest image and add-ons unless told not to, and a group with another image is replaced host by host."""
    text = (INFRA / "main.tf").read_text()
    groups = text[text.index("eks_managed_node_groups = {") : text.index("node_security_group_additional_rules")]
    assert re.search(r"^      use_latest_ami_release_version = false$", groups, re.M)
    assert re.search(r"^      ami_release_version +=  ?lookup\(var\.ami_release_versions, pool, null\)$", groups, re.M)
    addons = text[text.index("\n  addons = {") : text.index("\n  access_entries")]
    assert "most_recent = false, addon_version = lookup(var.addon_versions, name, null)" in addons
    assert text.count("most_recent") == 1
    for body in modules().values():
        assert unquoted(body["source"]).startswith(".") or re.fullmatch(r"\d+\.\d+\.\d+", unquoted(body["version"]))


def test_machine_images_of_karpenter_are_pinned() -> None:
    for path in (REPOSITORY / "k8s").rglob("node-class*.yaml"):
        for term in yaml.safe_load(path.read_text())["spec"]["amiSelectorTerms"]:
            assert re.fullmatch(r"[a-z0-9]+@v\d{8}", term["alias"]), f"{path.name}: {term}"


@needs_terraform
def test_pins_are_typed_and_checked(tmp_path: Path) -> None:
    """The variables alone, in a module without providers."""
    text = (INFRA / "variables.tf").read_text()
    blocks = [block for block in re.findall(r"^variable .*?^}", text, re.M | re.S) if "_versions" in block]
    assert len(blocks) == 2
    (tmp_path / "main.tf").write_text("\n".join(blocks))
    assert terraform("init", "-input=false", folder=tmp_path).returncode == 0

    def plans(pins: dict[str, Any]) -> bool:
        (tmp_path / "terraform.tfvars.json").write_text(json.dumps(pins))
        return terraform("plan", "-input=false", folder=tmp_path).returncode == 0

    assert plans({})
    assert plans(
        {"addon_versions": {"coredns": "v1.12.4-eksbuild.1"}, "ami_release_versions": {"gpu-train": "1.34.1-20260810"}}
    )
    assert not plans({"ami_release_versions": {"gpu_train": "1.34.1-20260810"}})


def _hosts() -> Any:
    """k8s/hosts.py, which is a script."""
    spec = importlib.util.spec_from_file_location("hosts", REPOSITORY / "k8s/hosts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_instance_types_is_read_by_both_sides() -> None:
    """k8s/components/hosts is what k8s/hosts.py makes of the table, and every type that manifests or examples name is in it."""
    hosts = _hosts()
    written = hosts.files()
    assert {path: path.read_text() for path in hosts.FOLDER.rglob("*.yaml")} == written
    table = hosts.instances()
    assert len(table) == 7
    for path in (REPOSITORY / "k8s").rglob("node-pool.yaml"):
        template = yaml.safe_load(path.read_text())["spec"]["template"]
        if template["metadata"]["labels"] != {"moonlight.ai/node-pool": "gpu-train"}:
            continue  # the table is of training hosts
        for entry in template["spec"]["requirements"]:
            if entry["key"] == "node.kubernetes.io/instance-type":
                assert set(entry["values"]) <= set(table), path
    for example in ("dev", "staging", "prod"):
        given = unquoted(hcl2.loads((INFRA / f"examples/{example}.tfvars").read_text()))["gpu_train"]
        assert given["instance_type"] in table


def test_a_type_without_an_efa_entry_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hosts = _hosts()
    table = json.loads(hosts.TABLE.read_text())
    del table["instances"]["p5en.48xlarge"]["efa"]
    (tmp_path / "instances.json").write_text(json.dumps(table))
    monkeypatch.setattr(hosts, "TABLE", tmp_path / "instances.json")
    monkeypatch.setattr(hosts, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"instances.json: p5en.48xlarge has no entry 'efa'"):
        hosts.files()


@needs_kubectl
@pytest.mark.parametrize("path", sorted((REPOSITORY / "k8s/components/hosts").iterdir()), ids=lambda path: path.name)
def test_every_host_builds_a_train_of_its_size(path: Path) -> None:
    facts = json.loads((INFRA / "modules/plan/instances.json").read_text())["instances"][path.name]
    lines = ["resources: [../stages]", f"components: [../components/hosts/{path.name}]"]
    with overlay_of_somebody(path.name, lines) as folder:
        job = find(render(folder), "RayJob", "template-train")
    limits = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"][
        "limits"
    ]
    assert (limits["nvidia.com/gpu"], limits["vpc.amazonaws.com/efa"]) == (str(facts["gpus"]), str(facts["efa"]))
    assert int(limits["cpu"]) <= facts["cpus"] - 4
    assert quantity(limits["memory"]) <= facts["memory_gib"] * 0.94 * 2**30


def test_two_environments_never_share_a_prefix() -> None:
    """Runs, leases and life cycle rules of one would meet the other's."""
    given = [unquoted(hcl2.loads(path.read_text())) for path in (INFRA / "examples").glob("*.tfvars")]
    places = [(entry["bucket"], entry["storage_prefix"]) for entry in given]
    assert len(set(places)) == len(places)
    assert len({entry["name"] for entry in given}) == len(given)


def test_association_arguments_exist() -> None:
    text = (INFRA / "main.tf").read_text()
    block = text[text.index("\n  associations = {") :]
    given = set(re.findall(r"^      (\w+) +=", block[: block.index("\n  }\n")], re.M))
    assert given == {"cluster_name", "namespace", "service_account"}
    assert given <= set(NAMES["terraform-aws-modules/eks-pod-identity/aws"]["associations"])


def test_outputs_that_are_used_exist() -> None:
    sources = {name: unquoted(body["source"]) for name, body in modules().items()}
    text = "".join(path.read_text() for path in INFRA.glob("*.tf"))
    for module, output in re.findall(r"module\.(\w+)\.(\w+)", text):
        if sources[module] in NAMES:
            assert output in NAMES[sources[module]]["outputs"], f"module.{module}.{output}"
        else:
            assert f'output "{output}"' in (INFRA / "modules/plan/outputs.tf").read_text()


def test_variables_that_are_used_are_declared() -> None:
    text = "".join(path.read_text() for path in INFRA.glob("*.tf"))
    declared = set(re.findall(r'^variable "(\w+)"', text, re.M))
    assert set(re.findall(r"\bvar\.(\w+)", text)) == declared
    needed = {
        name.strip('"')
        for block in hcl2.loads((INFRA / "variables.tf").read_text())["variable"]
        for name, body in block.items()
        if "default" not in body
    }
    assert "admin_role_arns" in needed  # nobody is an administrator by accident, and never nobody
    for example in ("dev", "staging", "prod"):
        given = set(hcl2.loads((INFRA / f"examples/{example}.tfvars").read_text())) - {"__comments__"}
        assert needed <= given <= declared


def test_the_bucket_is_private_encrypted_and_kept() -> None:
    body = modules()["bucket"]
    for setting in ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets"):
        assert body[setting] is True
    assert body["attach_deny_insecure_transport_policy"] is True
    assert body["versioning"]["enabled"] is True
    assert "AES256" in str(body["server_side_encryption_configuration"])
    assert "force_destroy" not in body


# -- agreement with k8s/ ---------------------------------------------------------------------------------------------


@needs_terraform
@needs_kubectl
@pytest.mark.parametrize("overlay", ["dev", "staging", "prod"])
class TestAgreement:
    def test_quota_of_the_training_pool(self, overlay: str) -> None:
        quota = plan(overlay)["gpu_train_quota"]
        group = find(render(f"k8s/overlays/{overlay}"), "ClusterQueue", "moonlight-gpu")["spec"]["resourceGroups"][0]
        flavor = next(entry for entry in group["flavors"] if entry["name"] == "gpu-train")
        found = {resource["name"]: quantity(resource["nominalQuota"]) for resource in flavor["resources"]}
        expected = {key: float(quota[key]) for key in ("cpu", "nvidia.com/gpu", "vpc.amazonaws.com/efa")}
        assert found == {**expected, "memory": quota["memory_gib"] * 2**30}

    def test_a_training_worker_is_what_the_plan_reckons_with(self, overlay: str) -> None:
        hosts = unquoted(hcl2.loads((INFRA / f"examples/{overlay}.tfvars").read_text()))["gpu_train"]["hosts"]
        job = find(render(f"k8s/overlays/{overlay}"), "RayJob", "template-train")
        requests = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0][
            "resources"
        ]["requests"]
        quota = plan(overlay)["gpu_train_quota"]
        assert quantity(requests["cpu"]) * hosts == quota["cpu"]
        assert quantity(requests["memory"]) * hosts == quota["memory_gib"] * 2**30
        assert int(requests["nvidia.com/gpu"]) * hosts == quota["nvidia.com/gpu"]
        assert int(requests.get("vpc.amazonaws.com/efa", 0)) * hosts == quota["vpc.amazonaws.com/efa"]

    def test_every_flavor_has_nodes_with_its_labels_and_taints(self, overlay: str) -> None:
        objects = render(f"k8s/overlays/{overlay}")
        pools: dict[str, tuple[dict[str, str], list[tuple[str, ...]]]] = {}
        for name, group in plan(overlay)["node_groups"].items():
            pools[name] = (
                group["labels"],
                [(taint["key"], taint["value"], EFFECTS[taint["effect"]]) for taint in group["taints"].values()],
            )
        for pool in select(objects, "NodePool"):
            template = pool["spec"]["template"]
            taints = [(taint["key"], taint["value"], taint["effect"]) for taint in template["spec"].get("taints", [])]
            assert pool["metadata"]["name"] not in pools, "a pool is either Karpenter's or a managed group"
            pools[pool["metadata"]["name"]] = template["metadata"]["labels"], taints
        for flavor in select(objects, "ResourceFlavor"):
            labels, taints = pools[flavor["metadata"]["name"]]
            assert flavor["spec"]["nodeLabels"].items() <= labels.items()
            assert [
                (taint["key"], taint["value"], taint["effect"]) for taint in flavor["spec"].get("nodeTaints", [])
            ] == taints

    def test_service_accounts(self, overlay: str) -> None:
        accounts = {
            (item["metadata"]["namespace"], item["metadata"]["name"])
            for item in select(render(f"k8s/overlays/{overlay}"), "ServiceAccount")
        }
        assert {
            (entry["namespace"], entry["name"])
            for entries in plan(overlay)["service_accounts"].values()
            for entry in entries
            if entry["namespace"] != "logging"
        } == accounts

    def test_the_account_of_node_logs(self, overlay: str) -> None:
        application = find(render("k8s/gitops"), "Application", "fluent-bit")["spec"]
        name = application["source"]["helm"]["valuesObject"]["serviceAccount"]["name"]
        expected = [{"namespace": application["destination"]["namespace"], "name": name}]
        assert plan(overlay)["service_accounts"]["node-logs"] == expected

    def test_bucket_and_prefixes(self, overlay: str) -> None:
        given = unquoted(hcl2.loads((INFRA / f"examples/{overlay}.tfvars").read_text()))
        objects = render(f"k8s/overlays/{overlay}")
        repository = yaml.safe_load(find(objects, "ConfigMap", "artifact-repositories")["data"]["s3"])["s3"]
        assert (repository["bucket"], repository["region"]) == (given["bucket"], given["region"])
        folder = repository["keyFormat"].split("{{")[0]
        driver = json.loads(plan(overlay)["policies"]["driver"])
        assert f"arn:aws:s3:::{given['bucket']}/{folder}*" in statement(driver, "Write")["Resource"]
        text = yaml.safe_dump_all(objects)
        for bucket in re.findall(r"s3://([a-z0-9.-]+)", text):
            assert bucket == given["bucket"]
        for root in re.findall(r"storage\.root=(\S+)", text):
            assert root.strip("'\"") == plan(overlay)["storage_root"]

    def test_karpenter_finds_its_cluster(self, overlay: str) -> None:
        name = unquoted(hcl2.loads((INFRA / f"examples/{overlay}.tfvars").read_text()))["name"]
        node_class = find(render(f"k8s/overlays/{overlay}"), "EC2NodeClass", "moonlight")["spec"]
        assert node_class["role"] == f"{name}-karpenter-node"
        for terms in ("subnetSelectorTerms", "securityGroupSelectorTerms"):
            assert node_class[terms] == [{"tags": {"karpenter.sh/discovery": name}}]


@needs_terraform
@needs_kubectl
def test_the_history_server_reads_where_collectors_write() -> None:
    """One place, in the bucket and region of the logs, below the prefix that the roles of `history = true` reach."""
    text = (REPOSITORY / "k8s/components/history-server/storage.yaml").read_text()
    writes, reads = (item["data"] for item in yaml.safe_load_all(text))
    assert writes == reads
    repository = find(render("k8s/overlays/prod"), "ConfigMap", "artifact-repositories")["data"]["s3"]
    logs = yaml.safe_load(repository)["s3"]
    assert (writes["S3_BUCKET"], writes["S3_REGION"]) == (logs["bucket"], logs["region"])
    assert f"s3://{writes['S3_BUCKET']}/{writes['STORAGE_ROOT_DIR']}" == f"{plan('prod')['storage_root']}/history"


def statement(policy: dict[str, Any], sid: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in policy["Statement"] if entry["Sid"] == sid)
    return found


@needs_terraform
def test_the_presets_buckets_are_those_of_prod() -> None:
    """Every s3:// path of the preset lies under a prefix that `prepare` may read, its root is the plan's."""
    preset = yaml.safe_load((PRESETS / "moonlight-16b-a3b.yaml").read_text())
    outputs = plan("prod")
    assert preset["storage"]["root"] == outputs["storage_root"]
    readable = statement(json.loads(outputs["policies"]["prepare"]), "Read")["Resource"]
    for path in [preset["tokenizer"]["path"], *(source["path"] for source in preset["corpus"]["sources"])]:
        arn = path.replace("s3://", "arn:aws:s3:::")
        assert any(arn.startswith(resource.removesuffix("*")) for resource in readable), path


@needs_terraform
@pytest.mark.parametrize(
    ("stage", "path", "may"),
    [
        ("prepare", "datasets/x/dataset.json", True),
        ("prepare", "models/moonlight/1/model.safetensors", False),
        ("train", "runs/r/train/step-1/manifest.json", True),
        ("train", "datasets/x/dataset.json", False),
        ("evaluate", "runs/r/evaluate/step-1.json", True),
        ("publish", "models/moonlight/latest.json", True),
        ("driver", "runs/r/progress.json", True),
        ("driver", "models/moonlight/latest.json", False),
        ("driver", "ladders/r/ladder.json", True),
        ("train", "ladders/r/ladder.json", False),
        *((stage, ".probe-0123", True) for stage in ("prepare", "train", "evaluate", "publish", "driver")),
    ],
)
def test_who_may_write_what(stage: str, path: str, may: bool) -> None:
    """Paths of design section 2 against the IAM documents."""
    resources = statement(json.loads(plan("prod")["policies"][stage]), "Write")["Resource"]
    assert (
        any(
            f"arn:aws:s3:::moonlight/production/{path}".startswith(resource.removesuffix("*")) for resource in resources
        )
        == may
    )
