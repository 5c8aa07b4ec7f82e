"""Schemas taken from CRD files: served versions only, descriptions gone, a property called description kept; strictness added."""

from __future__ import annotations

import json

from tests.k8s import crds
from tests.k8s.fetch_crds import LOCK, schemas

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
    crds._validator.cache_clear()
    thing = {"apiVersion": "example.io/v1", "kind": "Thing", "metadata": {"name": "x"}}
    good = {"size": 1, "port": "http", "note": None, "free": {"any": 1}}
    assert crds.problems({**thing, "spec": good}) == []
    assert crds.problems({**thing, "spec": {"size": None}}) == []  # pruned, then defaulted
    for bad in ({"siez": 1}, {"size": 0}, {"size": "1"}, {"port": 1.5}):
        assert crds.problems({**thing, "spec": bad}), bad
    crds._validator.cache_clear()


def test_the_lock_names_releases() -> None:
    entries = json.loads(LOCK.read_text())
    assert len(entries) == len({entry["url"] for entry in entries}) > 20
    for entry in entries:
        assert entry["url"].startswith("https://raw.githubusercontent.com/")
        assert "/v" in entry["url"]
        assert len(entry["sha256"]) == 64
