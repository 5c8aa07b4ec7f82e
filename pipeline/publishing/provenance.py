"""provenance.json of a published version: an in-toto statement with SLSA's build provenance, for tools that check where things come from.

The subjects are the files of the folder, `manifest.json` among them, by sha256; the build is the run, its parameters the configuration,
its materials the checkpoint, data, tokenizer and evaluation by the digests that the records carry, and the commit of this code.
Like everything published it holds no time, host or path of the storage's root. It lies beside the manifest and not in it, because it
names the manifest's digest, and the commit, which may differ between two publishers of the same bytes.

Sources: in-toto Attestation Framework, Statement v1; SLSA v1.0, Provenance.
"""

from __future__ import annotations

import hashlib
from typing import Any

from pipeline.manifest import CheckpointManifest, DatasetManifest, EvaluationManifest, ModelManifest
from pipeline.publishing import registry
from pipeline.storage import Storage
from pipeline.training.branch import Origin
from pipeline.training.commits import folder_of

FILE = "provenance.json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "urn:moonlight-pipeline:run:v1"  # what `parameters` and materials mean: this module


def write_provenance(
    storage: Storage,
    manifest: ModelManifest,
    checkpoint: CheckpointManifest,
    evaluation: EvaluationManifest,
    dataset: DatasetManifest,
    origin: Origin | None,
) -> None:
    """Beside a version that is committed, unless it is there. Whoever died between the two is cured by the next."""
    path = f"{registry.folder(manifest.name, manifest.version)}/{FILE}"
    if not storage.exists(path):
        made = statement(manifest, checkpoint, evaluation, dataset, origin)
        storage.create(path, registry.pretty_json(made))


def statement(
    manifest: ModelManifest,
    checkpoint: CheckpointManifest,
    evaluation: EvaluationManifest,
    dataset: DatasetManifest,
    origin: Origin | None,
) -> dict[str, Any]:
    """`origin`: where the run branched off, if it did."""
    subjects = [{"name": entry.path, "digest": {"sha256": entry.sha256}} for entry in manifest.files]
    subjects.append({"name": "manifest.json", "digest": {"sha256": hashlib.sha256(manifest.to_json()).hexdigest()}})
    materials = [
        _material("checkpoint", folder_of(checkpoint), checkpoint.digest),
        _material("weights and optimizer state", None, checkpoint.content_sha256),
        _material("dataset", f"datasets/{dataset.identity}", dataset.digest),
        _material("files of the dataset", dataset.files.path, dataset.files.sha256),
        _material("tokenizer", dataset.tokenizer.folder, dataset.tokenizer.sha256),
        _material("evaluation", None, evaluation.digest),
    ]
    if origin is not None:
        where = f"runs/{origin.run_id}/train/step-{origin.step:08d}"
        materials.append(_material("checkpoint that the run started from", where, origin.checkpoint_digest))
    weights = manifest.config["training"].get("initial_weights")
    if weights is not None:
        folder, _, digest = weights.partition("@sha256:")
        materials.append(_material("model that the run started from", folder, digest or None))
    if manifest.git_commit != "unknown":
        materials.append({"name": "moonlight-pipeline", "digest": {"gitCommit": manifest.git_commit}})
    return {
        "_type": STATEMENT,
        "subject": subjects,
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD,
                "externalParameters": {"configuration": manifest.config},
                "internalParameters": {"mesh": checkpoint.mesh, "world_size": checkpoint.world_size},
                "resolvedDependencies": materials,
            },
            "runDetails": {
                "builder": {"id": "urn:moonlight-pipeline", "version": dataset.versions},
                "metadata": {"invocationId": f"{checkpoint.run_id}/{checkpoint.run_identity}"},
            },
        },
    }


def _material(name: str, path: str | None, sha256: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name}
    if path is not None:
        found["uri"] = path if "://" in path else f"storage:{path}"  # below the storage's root
    return found | ({"digest": {"sha256": sha256}} if sha256 else {})
