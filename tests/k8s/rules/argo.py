"""Argo workflows: references inside `{{...}}`, the DAG, retries and conditions - nothing else looks into these strings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pipeline.config.load import ConfigError, load_config
from pipeline.training.initial import QUESTIONS
from tests.k8s.manifests import Manifest, canonical, label, select

TAG = re.compile(r"\{\{(=?)(.*?)\}\}", re.S)
GLOBAL = {
    "workflow.name",
    "workflow.namespace",
    "workflow.uid",
    "workflow.status",
    "workflow.duration",
    "workflow.failures",
    "workflow.serviceAccountName",
}
EXIT_ONLY = {"workflow.status", "workflow.duration", "workflow.failures"}
OUTSIDE = {"pod.name"}
SAFE_SUCCESS = {"status.jobStatus == SUCCEEDED", "status.jobDeploymentStatus == Complete"}


def check(objects: list[Manifest]) -> list[str]:
    found = []
    for item in select(objects, "WorkflowTemplate"):
        found += [f"{label(item)}: {problem}" for problem in _template(item["spec"])]
    for item in select(objects, "CronWorkflow"):
        found += [f"{label(item)}: {problem}" for problem in _cron(objects, item)]
    found += [f"{label(item)}: a Workflow is a run, and runs are not in Git" for item in select(objects, "Workflow")]
    return found


def _template(spec: dict[str, Any]) -> Iterator[str]:
    templates = {template["name"]: template for template in spec["templates"]}
    for key in ("entrypoint", "onExit"):
        if spec.get(key) not in templates:
            yield f"{key} {spec.get(key)!r} is no template"
    if "activeDeadlineSeconds" in spec:
        yield "activeDeadlineSeconds would count the time in the queue"
    for key in ("ttlStrategy", "podGC", "archiveLogs", "serviceAccountName"):
        if not spec.get(key):
            yield f"{key} is missing"
    parameters = {entry["name"] for entry in spec.get("arguments", {}).get("parameters", [])}
    for name, template in templates.items():
        yield from (
            f"template {name}: {problem}"
            for problem in _one(template, templates, parameters, exit_=name == spec.get("onExit"))
        )


def _one(template: dict[str, Any], templates: dict[str, Any], parameters: set[str], exit_: bool) -> Iterator[str]:
    tasks = {task["name"]: task for task in template.get("dag", {}).get("tasks", [])}
    known = {f"workflow.parameters.{name}" for name in parameters} | (GLOBAL if exit_ else GLOBAL - EXIT_ONLY)
    known |= {f"inputs.parameters.{entry['name']}" for entry in template.get("inputs", {}).get("parameters", [])}
    for name, task in tasks.items():
        made = templates.get(task["template"], {}).get("outputs", {}).get("parameters", [])
        known |= {f"tasks.{name}.outputs.parameters.{entry['name']}" for entry in made}
    for is_expression, body in TAG.findall(canonical(template)):
        if is_expression:
            yield from _expression(body, known)
        elif body.strip() not in known:
            yield f"{{{{{body}}}}} refers to nothing"
    for name, task in tasks.items():
        yield from _task(name, task, tasks, templates)
    if "activeDeadlineSeconds" in template or "timeout" in template:
        yield "a deadline here would count the time in the queue"
    if "resource" in template:
        yield from _resource(template)
    for entry in template.get("outputs", {}).get("parameters", []):
        if "default" not in entry.get("valueFrom", {}):
            yield f"output {entry['name']} has no default: a skipped step would be an error"
    if retry := template.get("retryStrategy"):
        if "maxDuration" in retry.get("backoff", {}):
            yield "backoff.maxDuration becomes a deadline of the waiting pod"
        if "backoff" in retry and "cap" not in retry["backoff"]:
            yield "backoff without cap: the tenth try would wait for hours"
        expression = retry.get("expression", "")
        if retry.get("retryPolicy") != "Always" or "lastRetry" not in expression:
            yield "retryStrategy must be Always with an expression over lastRetry: a verdict on the stage is final, an evicted pod is not"
        yield from _expression(expression, known | {"lastRetry.status", "lastRetry.exitCode", "lastRetry.message"})
    elif "container" in template or "script" in template:
        yield "no retryStrategy: an evicted pod would fail the run"


def _task(name: str, task: dict[str, Any], tasks: dict[str, Any], templates: dict[str, Any]) -> Iterator[str]:
    if task["template"] not in templates:
        yield f"task {name}: no template {task['template']}"
        return
    for other in re.findall(
        r"[A-Za-z][\w-]*",
        re.sub(
            r"\.(Succeeded|Failed|Errored|Skipped|Omitted|Daemoned|AnySucceeded|AllFailed)", "", task.get("depends", "")
        ),
    ):
        if other not in tasks:
            yield f"task {name}: depends on {other}, which does not exist"
    needed = {
        entry["name"]
        for entry in templates[task["template"]].get("inputs", {}).get("parameters", [])
        if "value" not in entry
    }
    given = {entry["name"] for entry in task.get("arguments", {}).get("parameters", [])}
    if needed != given:
        yield f"task {name}: parameters {sorted(given)} are not {sorted(needed)}"
    for other in re.findall(r"tasks\.([\w-]+)\.", canonical(task)):
        if other not in re.findall(r"[\w-]+", task.get("depends", "")):
            yield f"task {name}: uses {other} without depending on it"


def _resource(template: dict[str, Any]) -> Iterator[str]:
    """Facts 4-8, for whoever waits on RayJobs without the driver (docs/kubernetes.md, "Without the driver")."""
    resource = template["resource"]
    if resource["action"] in ("apply", "patch"):
        yield "apply and patch would revert what Kueue wrote (fact 8)"
    if resource["action"] == "create" and ("successCondition" in resource or "failureCondition" in resource):
        yield "create and wait must be two steps: a retried create meets AlreadyExists (fact 7)"
    if "successCondition" in resource and set(re.split(r",\s*", resource["successCondition"])) != SAFE_SUCCESS:
        yield "successCondition must ask for both status fields (facts 4, 5)"
    if "jobStatus == FAILED" in resource.get("failureCondition", "").replace("  ", " "):
        yield "jobStatus == FAILED is also true while KubeRay retries (fact 6)"


def _expression(text: str, known: set[str]) -> Iterator[str]:
    """expr-lang, as far as our strings go: quotes and brackets close, and dotted names are known."""
    plain = re.sub(r"'[^']*'|\"[^\"]*\"", "''", text.replace('\\"', '"'))
    if plain.count("'") % 2 or plain.count('"') % 2:
        yield f"expression {text!r}: a quote does not close"
    for left, right in ("()", "[]", "{}"):
        if plain.count(left) != plain.count(right):
            yield f"expression {text!r}: {left} does not close"
    for name in re.findall(r"workflow\.parameters\['([^']*)'\]", text):
        if f"workflow.parameters.{name}" not in known:
            yield f"expression {text!r}: no parameter {name}"
    for name in re.findall(r"\b(?:workflow|tasks|inputs|lastRetry)(?:\.[\w-]+)+", text):
        if name not in known | {"workflow.parameters"}:
            yield f"expression {text!r}: {name} refers to nothing"
    if re.search(r"(?<![=!<>])=(?!=)", plain):
        yield f"expression {text!r}: a single '='"


def _cron(objects: list[Manifest], item: Manifest) -> Iterator[str]:
    spec = item["spec"]
    if spec.get("concurrencyPolicy") != "Forbid":
        yield "concurrencyPolicy is not Forbid: two runs would train at once"
    if spec.get("suspend") is not True:
        yield "the committed schedule must be suspended"
    for key in ("startingDeadlineSeconds", "timezone", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"):
        if not spec.get(key):
            yield f"{key} is missing"
    for schedule in spec.get("schedules", []):
        if len(schedule.split()) != 5:
            yield f"schedule {schedule!r} has not five fields"
    if len(item["metadata"]["name"]) + 11 > 40:
        yield "the workflow's name (name and scheduled time) would be too long for a run_id"
    reference = spec["workflowSpec"].get("workflowTemplateRef", {}).get("name")
    template = next(select(objects, "WorkflowTemplate", reference, item["metadata"].get("namespace")), None)
    if template is None:
        yield f"no WorkflowTemplate {reference}"
        return
    values = {entry["name"]: entry["value"] for entry in template["spec"]["arguments"]["parameters"]}
    for entry in spec["workflowSpec"].get("arguments", {}).get("parameters", []):
        if entry["name"] not in values:
            yield f"parameter {entry['name']} does not exist in {reference}"
        values[entry["name"]] = entry["value"]
    weights = values.get("initial-weights", "")
    if weights not in ("", *QUESTIONS) and "/" not in weights:
        yield f"initial-weights {weights!r} is neither {' nor '.join(QUESTIONS)} nor a folder"
    try:
        load_config(values["config"], [*values["overrides"].split(), f"run_id={item['metadata']['name']}-1767225600"])
    except ConfigError as error:
        yield f"config and overrides: {error}"
