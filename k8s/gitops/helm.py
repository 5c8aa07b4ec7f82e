"""Install operators with helm as Argo CD would: chart, version, namespace and values are those of operators/<name>.yaml.

`python k8s/gitops/helm.py NAME...`, in the order given: prometheus first, whose kinds the others' values use. Running it again upgrades.
"""

import subprocess
import sys
from pathlib import Path

import yaml


def install(name: str) -> None:
    spec = yaml.safe_load((Path(__file__).parent / "operators" / f"{name}.yaml").read_text())["spec"]
    source = spec["source"]
    repository, chart = source["repoURL"], source["chart"]
    where = [chart, "--repo", repository] if repository.startswith("https://") else [f"oci://{repository}/{chart}"]
    release, namespace = source["helm"]["releaseName"], spec["destination"]["namespace"]
    command = ["helm", "upgrade", "--install", release, *where, "--version", source["targetRevision"]]
    command += ["--namespace", namespace, "--create-namespace", "--wait", "--timeout", "15m", "--values", "-"]
    print(f"{name}: {chart} {source['targetRevision']} in {namespace}", flush=True)
    subprocess.run(command, input=yaml.safe_dump(source["helm"]["valuesObject"]), text=True, check=True)


if __name__ == "__main__":
    known = sorted(path.stem for path in (Path(__file__).parent / "operators").glob("*.yaml"))
    if unknown := sorted(set(sys.argv[1:]) - set(known)):
        sys.exit(f"no operator {', '.join(unknown)}; there are {', '.join(known)}")
    try:
        for given in sys.argv[1:]:
            install(given)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
