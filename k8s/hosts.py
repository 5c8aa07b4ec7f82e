"""Write k8s/components/hosts from the table of instance types that infra/ reads, too: `python k8s/hosts.py`.

One component an instance type: an overlay that trains on p5en.48xlarge with EFA lists `../../components/hosts/p5en.48xlarge`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "infra/modules/plan/instances.json"
FOLDER = ROOT / "k8s/components/hosts"

KUSTOMIZATION = """\
# Training over Elastic Fabric Adapter on {name}: {gpus} x {gpu}, {efa} interfaces a host. Written by k8s/hosts.py from
# infra/modules/plan/instances.json. The image must bring libfabric and aws-ofi-nccl: build it with BASE set to a Ray image on which AWS's EFA
# installer has run. No hostNetwork and no hostPath: the device plugin hands out the devices.
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
patches:
  - target: {{group: ray.io, kind: RayJob, name: template-train}}
    path: train.yaml
"""
TRAIN = """\
- {{op: test, path: /spec/rayClusterSpec/workerGroupSpecs/0/groupName, value: workers}}
- op: replace
  path: /spec/rayClusterSpec/workerGroupSpecs/0/template/spec/containers/0/resources
  value:
    requests: {{cpu: "{cpus}", memory: {memory}Gi, nvidia.com/gpu: "{gpus}", vpc.amazonaws.com/efa: "{efa}"}}
    limits: {{cpu: "{cpus}", memory: {memory}Gi, nvidia.com/gpu: "{gpus}", vpc.amazonaws.com/efa: "{efa}"}}
- {{op: add, path: /spec/rayClusterSpec/workerGroupSpecs/0/template/spec/containers/0/env/-, value: {{name: FI_PROVIDER, value: efa}}}}
- {{op: add, path: /spec/rayClusterSpec/workerGroupSpecs/0/template/spec/containers/0/env/-, value: {{name: NCCL_SOCKET_IFNAME, value: "^docker,lo,veth"}}}}
"""


def instances() -> dict[str, dict[str, Any]]:
    """Facts by instance type. Raises ValueError for an entry that lacks one."""
    table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())["instances"]
    for name, facts in table.items():
        for key in ("gpu", "gpus", "efa", "first_efa_card", "cpus", "memory_gib", "worker"):
            if key not in facts:
                raise ValueError(f"{TABLE.relative_to(ROOT)}: {name} has no entry {key!r}")
    return table


def files() -> dict[Path, str]:
    """What the folder must hold, by path."""
    found = {}
    for name, facts in instances().items():
        worker = facts["worker"]
        values = {**facts, "name": name, "cpus": worker["cpus"], "memory": worker["memory_gib"]}
        found[FOLDER / name / "kustomization.yaml"] = KUSTOMIZATION.format(**values)
        found[FOLDER / name / "train.yaml"] = TRAIN.format(**values)
    return found


if __name__ == "__main__":
    try:
        written = files()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
