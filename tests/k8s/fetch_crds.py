"""Make the folder that MOONLIGHT_CRD_SCHEMAS names: `python -m tests.k8s.fetch_crds FOLDER`.

Downloads the CRDs listed in crds.lock.json from their projects' releases, refuses any whose sha256 differs, and writes the schema of
each served version as `<group>_<version>_<Kind>.json`. Descriptions are left out; defaults and validation rules are kept.
"""

from __future__ import annotations

import hashlib
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import yaml

LOCK = Path(__file__).with_name("crds.lock.json")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for entry in json.loads(LOCK.read_text()):
        with urllib.request.urlopen(entry["url"], timeout=60) as response:
            data = response.read()
        found = hashlib.sha256(data).hexdigest()
        if found != entry["sha256"]:
            raise SystemExit(f"{entry['url']}: sha256 is {found}, crds.lock.json says {entry['sha256']}")
        for name, schema in schemas(data).items():
            (folder / f"{name}.json").write_text(json.dumps(schema, separators=(",", ":")))
            print(name)


def schemas(data: bytes) -> dict[str, dict[str, Any]]:
    """`<group>_<version>_<Kind>` -> schema, of one CRD file."""
    found = {}
    for crd in yaml.load_all(data, Loader=yaml.CSafeLoader):
        for version in crd["spec"]["versions"]:
            if version["served"]:
                name = f"{crd['spec']['group']}_{version['name']}_{crd['spec']['names']['kind']}"
                found[name] = without_descriptions(version["schema"]["openAPIV3Schema"])
    return found


def without_descriptions(node: Any, inside_properties: bool = False) -> Any:
    """A property may itself be called `description`: those stay."""
    if isinstance(node, list):
        return [without_descriptions(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: without_descriptions(value, inside_properties=key == "properties" and not inside_properties)
        for key, value in node.items()
        if inside_properties or key != "description"
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m tests.k8s.fetch_crds FOLDER")
    main(Path(sys.argv[1]))
