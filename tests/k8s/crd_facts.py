"""The schemas of the custom resources that we make, small enough to be kept: `crd_facts.json`.

What a CRD says of its fields (names, types, enumerations, defaults, limits, CEL rules) is its interface, and most of it is said many times over: a
RayJob holds three pods, an Argo workflow forty. So equal parts are kept once, under `parts`, and named by `{"=": number}`; prose is left out
(descriptions, messages of rules). 2 MB become 0.1. Sources and their digests are in crds.lock.json, all under the Apache licence 2.0.

`python -m tests.k8s.crd_facts FOLDER` writes the file anew from a folder that `python -m tests.k8s.fetch_crds FOLDER` made.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("crd_facts.json")
KINDS = (
    "argoproj.io_v1alpha1_AppProject", "argoproj.io_v1alpha1_Application", "argoproj.io_v1alpha1_ApplicationSet",
    "argoproj.io_v1alpha1_CronWorkflow", "argoproj.io_v1alpha1_Workflow", "argoproj.io_v1alpha1_WorkflowTemplate",
    "karpenter.k8s.aws_v1_EC2NodeClass", "karpenter.sh_v1_NodePool",
    "kueue.x-k8s.io_v1beta2_AdmissionCheck", "kueue.x-k8s.io_v1beta2_ClusterQueue", "kueue.x-k8s.io_v1beta2_Cohort",
    "kueue.x-k8s.io_v1beta2_LocalQueue", "kueue.x-k8s.io_v1beta2_ProvisioningRequestConfig", "kueue.x-k8s.io_v1beta2_ResourceFlavor",
    "kueue.x-k8s.io_v1beta2_Topology", "kueue.x-k8s.io_v1beta2_Workload", "kueue.x-k8s.io_v1beta2_WorkloadPriorityClass",
    "monitoring.coreos.com_v1_PodMonitor", "monitoring.coreos.com_v1_PrometheusRule",
    "ray.io_v1_RayCluster", "ray.io_v1_RayCronJob", "ray.io_v1_RayJob",
)  # fmt: skip
REFERENCE = "="
WORTH = 48  # a part shorter than this is written out


def pack(schemas: dict[str, Any]) -> dict[str, Any]:
    """The file's content of whole schemas by kind."""
    bare = {kind: _bare(schema) for kind, schema in sorted(schemas.items())}
    counts: Counter[str] = Counter()
    _count(bare, counts)
    numbers: dict[str, int] = {}
    parts: list[Any] = []

    def write(node: Any) -> Any:
        if isinstance(node, list):
            return [write(item) for item in node]
        if not isinstance(node, dict):
            return node
        text = _text(node)
        if counts[text] < 2 or len(text) < WORTH:
            return {key: write(value) for key, value in node.items()}
        if text not in numbers:
            made = {key: write(value) for key, value in node.items()}
            numbers[text] = len(parts)
            parts.append(made)
        return {REFERENCE: numbers[text]}

    return {
        "parts": parts,
        "kinds": {kind: {key: write(value) for key, value in schema.items()} for kind, schema in bare.items()},
    }


def unpack(packed: dict[str, Any]) -> dict[str, Any]:
    """Whole schemas by kind; equal parts are one object, so copy before you change any."""
    parts: list[Any] = []

    def read(node: Any) -> Any:
        if isinstance(node, list):
            return [read(item) for item in node]
        if not isinstance(node, dict):
            return node
        if node.keys() == {REFERENCE}:
            return parts[node[REFERENCE]]
        return {key: read(value) for key, value in node.items()}

    for part in packed["parts"]:  # a part names earlier ones only
        parts.append(read(part))
    return {kind: read(schema) for kind, schema in packed["kinds"].items()}


@functools.cache
def kept() -> dict[str, Any]:
    return unpack(json.loads(FILE.read_text()))


def of_folder(folder: Path) -> dict[str, Any]:
    return pack({kind: json.loads((folder / f"{kind}.json").read_text()) for kind in KINDS})


def written(packed: dict[str, Any]) -> str:
    """One part and one kind a line, so that a new release is a readable change."""
    lines = ['{"parts": [', ",\n".join(map(_text, packed["parts"])), '], "kinds": {']
    lines.append(",\n".join(f"{json.dumps(kind)}: {_text(schema)}" for kind, schema in packed["kinds"].items()))
    return "\n".join([*lines, "}}"]) + "\n"


def _bare(schema: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = _without_messages(schema)
    return made


def _without_messages(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_messages(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: _without_messages(value) for key, value in node.items()}
    if "x-kubernetes-validations" in found:
        found["x-kubernetes-validations"] = [{"rule": each["rule"]} for each in found["x-kubernetes-validations"]]
    return found


def _count(node: Any, counts: Counter[str]) -> None:
    if isinstance(node, dict):
        counts[_text(node)] += 1
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            _count(item, counts)


def _text(node: Any) -> str:
    return json.dumps(node, sort_keys=True, separators=(",", ":"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tests.k8s.crd_facts FOLDER")
    FILE.write_text(written(of_folder(Path(sys.argv[1]))))
