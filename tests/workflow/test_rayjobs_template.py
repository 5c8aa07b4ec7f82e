"""Template to RayJob: names, what is added and left out, the size of the gang, and every unsafe edit found."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.load import load_config, preset_names
from pipeline.config.schema import ParallelismConfig
from pipeline.workflow.rayjobs_template import STAGES, instantiate, job_name, size_workers, unsafe
from tests.k8s import crds
from tests.workflow.driver import ARGUMENTS, CONFIG, templates

TEMPLATES = {manifest["metadata"]["labels"]["moonlight.ai/stage"]: manifest for manifest in templates()}


@settings(derandomize=True, max_examples=200)
@given(
    run=st.from_regex(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", fullmatch=True),
    stage=st.sampled_from(STAGES),
    attempt=st.integers(1, 999),
)
def test_names_are_short_dns_1035_and_differ(run: str, stage: str, attempt: int) -> None:
    name = job_name(run, stage, attempt)
    assert len(name) <= 47
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert name == job_name(run, stage, attempt)
    assert name != job_name(run, stage, attempt + 1)
    assert name.endswith(f"-{stage}-{attempt}")


def test_long_names_that_share_a_beginning_differ() -> None:
    assert job_name("a" * 39 + "b", "evaluate", 1) != job_name("a" * 39 + "c", "evaluate", 1)
    assert job_name("debug", "train", 1) == "debug-train-1"


@pytest.mark.parametrize("stage", STAGES)
def test_an_attempt_is_the_template_with_little_added(stage: str) -> None:
    template = copy.deepcopy(TEMPLATES[stage])
    template["metadata"]["annotations"]["argocd.argoproj.io/tracking-id"] = "stages:ray.io/RayJob"
    template["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"] = "{}"
    owner = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "w", "uid": "u"}
    config = (
        CONFIG.model_copy(
            update={
                "cluster": CONFIG.cluster.model_copy(update={"use_gpu": True}),
                "parallelism": ParallelismConfig(shard=8),
            }
        )
        if stage == "train"
        else CONFIG
    )
    job = instantiate(
        template, config, stage, 2, [*ARGUMENTS, "tokenizer.eos_token=[a b]"], priority="moonlight-release", owner=owner
    )
    labels, spec = job["metadata"]["labels"], job["spec"]
    assert job["metadata"]["name"] == f"debug-{stage}-2"
    assert job["metadata"]["ownerReferences"] == [owner]
    assert labels["kueue.x-k8s.io/queue-name"] == template["metadata"]["annotations"]["moonlight.ai/queue"]
    assert labels["kueue.x-k8s.io/priority-class"] == "moonlight-release"
    assert (labels["moonlight.ai/run-id"], labels["moonlight.ai/stage"], labels["moonlight.ai/attempt"]) == (
        "debug",
        stage,
        "2",
    )
    assert "moonlight.ai/template" not in labels
    elastic = {"kueue.x-k8s.io/elastic-job"} if stage == "prepare" else set()
    assert set(job["metadata"]["annotations"]) == {"moonlight.ai/arguments"} | elastic
    assert "suspend" not in spec  # fact 8: Kueue is its only writer
    assert spec[
        "entrypoint"
    ] == f"python -m jobs.{stage} --config debug storage.root=s3://bucket/runs 'tokenizer.eos_token=[a b]'" + {
        "evaluate": " parallelism.replicate=1 parallelism.shard=4 parallelism.ep=4 parallelism.elastic=null training.micro_batch=1 training.interleave=false training.profile=null training.recompute_every=null",
        "publish": " cluster.use_gpu=false",
    }.get(stage, "")
    logs = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][1]
    assert logs["args"] == ["--name", f"debug-{stage}-2", *ARGUMENTS, "tokenizer.eos_token=[a b]"]
    assert spec["metadata"]["job_name"] == f"debug: {stage}"
    assert crds.problems(job) == []


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("stage", sorted(TEMPLATES))
def test_what_a_template_adds_fits_every_preset(stage: str, preset: str) -> None:
    """And settings that need the run's own mesh: rank 7 is profiled, halves of a micro-batch take turns."""
    added = shlex.split(TEMPLATES[stage]["metadata"]["annotations"].get("moonlight.ai/overrides", ""))
    mesh = ["parallelism.shard=8", "parallelism.ep=8", "training.micro_batch=2"]
    own = [*mesh, "training.interleave=true", "training.profile={steps: [10, 11], ranks: [7]}"]
    assert load_config(preset, added).run_id
    assert load_config(preset, [*own, *added]).run_id


def test_the_gang_is_as_large_as_the_mesh() -> None:
    cluster = copy.deepcopy(TEMPLATES["train"]["spec"]["rayClusterSpec"])
    size_workers(cluster, load_config("moonlight-16b-a3b"))
    group = cluster["workerGroupSpecs"][0]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (
        32,
        32,
        32,
    )  # 256 ranks on hosts of 8 GPUs


def test_a_gang_larger_than_the_template_allows_is_refused_before_it_is_sent() -> None:
    template, config = copy.deepcopy(TEMPLATES["train"]), load_config("moonlight-16b-a3b")
    template["metadata"]["annotations"]["moonlight.ai/max-workers"] = "31"
    with pytest.raises(
        ValueError, match=r"256 ranks need 32 workers, template-train allows 31 \(moonlight.ai/max-workers\)"
    ):
        instantiate(template, config, "train", 1, [], priority="moonlight-interactive")
    template["metadata"]["annotations"]["moonlight.ai/max-workers"] = "32"
    instantiate(template, config, "train", 1, [], priority="moonlight-interactive")


def test_an_elastic_gang_has_room_for_the_most() -> None:
    """Of 16 replicas, with 16 more when there are machines: 32 hosts, of which all but 8 may leave."""
    overrides = ["parallelism.replicate=16", "parallelism.elastic={min_workers: 64, max_workers: 256}"]
    config = load_config("moonlight-16b-a3b", overrides)
    job = instantiate(TEMPLATES["train"], config, "train", 1, ARGUMENTS, priority="moonlight-release")
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (32, 32, 32)
    assert crds.problems(job) == []


def test_a_small_world_on_cpus_takes_one_worker() -> None:
    cluster = copy.deepcopy(TEMPLATES["train"]["spec"]["rayClusterSpec"])
    size_workers(cluster, CONFIG)
    assert cluster["workerGroupSpecs"][0]["replicas"] == 1


@pytest.mark.parametrize(
    ("limits", "overrides", "message"),
    [
        (
            {"cpu": "96", "nvidia.com/gpu": "8"},
            [
                "parallelism.replicate=3",
                "parallelism.shard=4",
                "parallelism.ep=4",
                "schedule.global_batch.0.sequences=96",
            ],
            "whole workers",
        ),
        ({"cpu": "96"}, [], "holds no rank"),
        (
            {"cpu": "4", "nvidia.com/gpu": "8"},
            ["parallelism.shard=8", "parallelism.ep=8", "schedule.global_batch.0.sequences=64"],
            "4 CPUs for 8 ranks",
        ),
    ],
)
def test_a_gang_that_cannot_be_is_refused(limits: dict[str, str], overrides: list[str], message: str) -> None:
    cluster = copy.deepcopy(TEMPLATES["train"]["spec"]["rayClusterSpec"])
    cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"] = limits
    with pytest.raises(ValueError, match=message):
        size_workers(cluster, load_config("debug", ["cluster.use_gpu=true", *overrides]))


@pytest.mark.parametrize("stage", STAGES)
def test_our_templates_are_safe(stage: str) -> None:
    assert unsafe(TEMPLATES[stage]) == []


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "not 'true'": lambda t: t["metadata"]["labels"].pop("moonlight.ai/template"),
    "queue-name] is set": lambda t: t["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "cpu"}),
    "moonlight.ai/queue] is missing": lambda t: t["metadata"]["annotations"].pop("moonlight.ai/queue"),
    "spec.suspend": lambda t: t["spec"].pop("suspend"),
    "shutdownAfterJobFinishes": lambda t: t["spec"].pop("shutdownAfterJobFinishes"),  # fact 1
    "deletionStrategy": lambda t: t["spec"].update(deletionStrategy={"deletionRules": []}),  # fact 1
    "submissionMode": lambda t: t["spec"].update(submissionMode="SidecarMode"),  # facts 10, 12, 16
    "activeDeadlineSeconds": lambda t: t["spec"].pop("activeDeadlineSeconds"),  # fact 9
    "preRunningDeadlineSeconds": lambda t: t["spec"].pop("preRunningDeadlineSeconds"),
    "managedBy": lambda t: t["spec"].update(managedBy="kueue.x-k8s.io/multikueue"),
    "clusterSelector": lambda t: t["spec"].update(clusterSelector={"ray.io/cluster": "shared"}),
    "authOptions": lambda t: t["spec"]["rayClusterSpec"].pop("authOptions"),  # fact 14
    "serviceType": lambda t: t["spec"]["rayClusterSpec"]["headGroupSpec"].update(serviceType="LoadBalancer"),
    "enableIngress": lambda t: t["spec"]["rayClusterSpec"]["headGroupSpec"].update(enableIngress=True),
    "enableInTreeAutoscaling": lambda t: t["spec"]["rayClusterSpec"].update(enableInTreeAutoscaling=True),
}


@pytest.mark.parametrize("message", EDITS)
def test_unsafe_edits_are_found(message: str) -> None:
    template = copy.deepcopy(TEMPLATES["train"])
    EDITS[message](template)
    assert len(unsafe(template)) == 1
    assert message in unsafe(template)[0]
