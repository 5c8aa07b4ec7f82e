"""Schemas taken from CRD files: served versions only, descriptions gone, a property called description kept; strictness added."""

from __future__ import annotations

import json
from pathlib import Path

from tests.k8s import crd_facts, crds
from tests.k8s.fetch_crds import LOCK, schemas
from tests.k8s.manifests import is_custom, needs_kubectl, render

CRD = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: things.example.io}
spec:
  group: example.io
  names: {kind: Thing, plural: things}
  versions:
    - name: v1
      served: true
      schema:
        openAPIV3Schema:
          description: words
          type: object
          properties:
            spec:
              type: object
              description: more words
              properties:
                description: {type: string, description: what it is}
                size: {type: integer, default: 3, minimum: 1}
                port: {x-kubernetes-int-or-string: true}
                note: {type: string, nullable: true}
                free: {type: object, x-kubernetes-preserve-unknown-fields: true}
              x-kubernetes-validations: [{rule: self.size > 0, message: too small}]
    - {name: v1beta1, served: false, schema: {openAPIV3Schema: {type: object}}}
"""


def test_schemas_of_a_crd() -> None:
    found = schemas(CRD.encode())
    assert list(found) == ["example.io_v1_Thing"]
    spec = found["example.io_v1_Thing"]["properties"]["spec"]
    assert "description" not in spec
    assert spec["properties"]["description"] == {"type": "string"}
    assert spec["x-kubernetes-validations"] == [{"rule": "self.size > 0", "message": "too small"}]


def test_strict_validation(monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "example.io_v1_Thing.json").write_text(json.dumps(schemas(CRD.encode())["example.io_v1_Thing"]))
    monkeypatch.setattr(crds, "FOLDER", str(tmp_path))
    _forget()
    thing = {"apiVersion": "example.io/v1", "kind": "Thing", "metadata": {"name": "x"}}
    good = {"size": 1, "port": "http", "note": None, "free": {"any": 1}}
    assert crds.problems({**thing, "spec": good}) == []
    assert crds.problems({**thing, "spec": {"size": None}}) == []  # pruned, then defaulted
    for bad in ({"siez": 1}, {"size": 0}, {"size": "1"}, {"port": 1.5}):
        assert crds.problems({**thing, "spec": bad}), bad
    _forget()


def _forget() -> None:
    crds._validator.cache_clear()
    crds.schema_of.cache_clear()


def test_facts_are_the_schemas_without_prose() -> None:
    thing = schemas(CRD.encode())["example.io_v1_Thing"]
    twice = {
        **thing["properties"]["spec"],
        "properties": {**thing["properties"]["spec"]["properties"], "again": thing["properties"]["spec"]},
    }
    whole = {**thing, "properties": {**thing["properties"], "spec": twice, "more": twice}}
    packed = crd_facts.pack({"x": whole})
    assert packed["parts"]
    back = crd_facts.unpack(json.loads(crd_facts.written(packed)))["x"]
    assert back["properties"]["more"] == back["properties"]["spec"]
    spec = back["properties"]["spec"]["properties"]["again"]
    assert spec["x-kubernetes-validations"] == [{"rule": "self.size > 0"}]
    assert spec["properties"] == thing["properties"]["spec"]["properties"]


def test_the_kept_facts_are_those_of_every_kind_and_say_enough() -> None:
    """The file is what packing gives again; where a folder was fetched, what packing that folder gives."""
    kept = crd_facts.kept()
    assert set(kept) == set(crd_facts.KINDS)
    again = crd_facts.written(crd_facts.of_folder(Path(crds.FOLDER)) if crds.FOLDER else crd_facts.pack(kept))
    assert again == crd_facts.FILE.read_text()
    assert len(again) < 150_000
    assert kept["ray.io_v1_RayJob"]["properties"]["spec"]["properties"]["backoffLimit"] == {"default": 0, "format": "int32", "type": "integer"}  # fmt: skip
    queue = kept["kueue.x-k8s.io_v1beta2_ClusterQueue"]["properties"]["spec"]["properties"]
    assert queue["preemption"]["properties"]["reclaimWithinCohort"]["enum"] == ["Never", "LowerPriority", "Any"]


@needs_kubectl
def test_every_custom_kind_that_we_make_is_among_the_facts() -> None:
    for folder in ("overlays/prod", "overlays/kind", "overlays/teams", "teams/north", "gitops", "roots/prod"):
        for item in render(f"k8s/{folder}"):
            if is_custom(item):
                assert crds.schema_of(item["apiVersion"], item["kind"]), item["kind"]


def test_the_lock_names_releases() -> None:
    entries = json.loads(LOCK.read_text())
    assert len(entries) == len({entry["url"] for entry in entries}) > 20
    for entry in entries:
        assert entry["url"].startswith("https://raw.githubusercontent.com/")
        assert "/v" in entry["url"]
        assert len(entry["sha256"]) == 64
