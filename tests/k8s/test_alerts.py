"""Alerts by `promtool test rules`: every case, and every fault put into a rule is seen by the rule's own cases."""

from __future__ import annotations

import copy
import itertools
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.alert_cases import CASES, Case
from tests.k8s.manifests import REPOSITORY

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)
SPEC = yaml.safe_load((REPOSITORY / "k8s/monitoring/alerts.yaml").read_text())["spec"]
RULES: dict[str, dict[str, Any]] = {rule["alert"]: rule for group in SPEC["groups"] for rule in group["rules"]}


def promtool(variants: list[dict[str, Any]], cases: list[Case], folder: Path) -> list[str]:
    """What one run of promtool says of these cases under each variant of their rule: "SUCCESS", or how it FAILED."""
    for number, rule in enumerate(variants):
        (folder / f"rules-{number}.yaml").write_text(
            yaml.safe_dump({"groups": [{"name": "moonlight", "rules": [rule]}]})
        )
        tests = {
            "rule_files": [f"rules-{number}.yaml"],
            "evaluation_interval": "1m",
            "tests": [_test(rule, case) for case in cases],
        }
        (folder / f"tests-{number}.yaml").write_text(yaml.safe_dump(tests, sort_keys=False))
    files = [f"tests-{number}.yaml" for number in range(len(variants))]
    command = [
        "promtool",
        "test",
        "rules",
        *files,
    ]  # what failed goes to stderr, the names of files and successes to stdout
    output = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    ).stdout
    said = [text.strip() for text in output.split("Unit Testing:")[1:]]
    assert [text.split()[0] for text in said] == files, output
    return [text.partition("\n")[2].strip() for text in said]


def _test(rule: dict[str, Any], case: Case) -> dict[str, Any]:
    """A case in promtool's words."""
    expected = [
        {
            "eval_time": f"{minute}m",
            "alertname": case.alert,
            "exp_alerts": [
                {
                    "exp_labels": {**labels, "severity": rule["labels"]["severity"]},
                    "exp_annotations": {"summary": summary, "runbook": rule["annotations"]["runbook"]},
                }
                for labels, summary in firing
            ],
        }
        for minute, firing in case.rings.items()
    ]
    series = [{"series": name, "values": values} for name, values in case.series.items()]
    return {"name": case.story, "interval": "1m", "input_series": series, "alert_rule_test": expected}


def cases_of(alert: str) -> list[Case]:
    return [case for case in CASES if case.alert == alert]


def test_every_alert_has_cases_of_silence_and_of_ringing() -> None:
    assert set(RULES) == {case.alert for case in CASES}
    assert min(Counter(case.alert for case in CASES).values()) >= 3
    for alert in RULES:
        in_order = [[bool(case.rings[minute]) for minute in sorted(case.rings)] for case in cases_of(alert)]
        assert any((True, False) in itertools.pairwise(minutes) for minutes in in_order), f"{alert} never stops"
        assert any((False, True) in itertools.pairwise(minutes) for minutes in in_order), f"{alert} never begins"
        assert any(not any(case.rings.values()) for case in cases_of(alert)), alert


@needs_promtool
@pytest.mark.parametrize("alert", RULES)
def test_it_rings_when_it_should_and_only_then(alert: str, tmp_path: Path) -> None:
    assert promtool([RULES[alert]], cases_of(alert), tmp_path) == ["SUCCESS"]


# What somebody might edit: text of the rule, and what it becomes. "for" is the waiting time.
MUTATIONS: dict[str, list[tuple[str, str]]] = {
    "MoonlightTrainingStalled": [
        ("[2m]", "[20m]"), ("== 0", ">= 0"), ("for", "10m"), ("for", "1h"), ("changes(", "resets("),
        (" unless on (ray_io_cluster) (ray_moonlight_step unless ray_moonlight_step offset 2m)", ""),
    ],
    "MoonlightTrainingSilent": [
        ("Running", "Suspended"), ("-train-", "-"), ("for", "10m"), ("for", "3h"), ("on (name)", "on (run)"), ("{5}", "{4}"),
    ],
    "MoonlightLossNotFinite": [
        ("> 3", "> 2"), ("> 3", "> 4"), ("[30m]", "[5m]"), ("[30m]", "[2h]"), ("max_over_time", "min_over_time"),
        ("max by (ray_io_cluster) (max_over_time(ray_moonlight_skipped_steps[30m]) - min_over_time(ray_moonlight_skipped_steps[30m]))", "max by (ray_io_cluster) (delta(ray_moonlight_skipped_steps[30m]))"),
    ],
    "MoonlightCheckpointTooOld": [("3 * 3600", "1 * 3600"), ("3 * 3600", "4 * 3600"), ("max by", "min by"), ("> 3", "< 3"), ("for", "30m")],
    "MoonlightTrainingRestartsOften": [("> 5", "> 4"), ("> 5", "> 6"), ("[6h]", "[30m]"), ("[6h]", "[12h]"), ("changes(", "resets(")],
    "MoonlightStageFailed": [("Failed|Validation", "Validation"), ("|ValidationFailed", ""), ("Failed|", "Failed|Retrying|"), ("offset 12h", "offset 1h"), ("12h", "24h"), ('namespace=~"moonlight(-team-.+)?", ', "")],
    "MoonlightStageRetries": [("Retrying", "Failed"), ("offset 1h", "offset 5m"), ("offset 1h", "offset 12h"), ("namespace, name, retry_count", "namespace, name"), ("for", "5m")],
    "MoonlightHeadRestarted": [("> 0", "> 1"), ("> 1", "> 2"), ("[30m]", "[5m]"), ("[30m]", "[2h]"), (', container="ray-head"', ""), (', pod=~".+-head(-[a-z0-9]{5})?"', ""), ("(-[a-z0-9]{5})?", ""), ("cluster, uid)", "cluster)"), ("for", "5m")],
    "MoonlightOrphanCluster": [("|Running", ""), ('"Initializing', '"Complete|Failed|Initializing'), ("for", "30m"), ("for", "3h"), (', owner_kind="RayJob"', ""), ("on (namespace, rayjob)", "on (namespace)"), ("{5}", "{6}")],
    "MoonlightWorkflowFailed": [
        ("|Error", ""), ("Failed|", ""), (', namespace=~"moonlight(-team-.+)?"', ""), ("> 0", "> 1"), ("[15m]", "[5m]"), ("15m", "45m"),
        ('(argo_workflows_total_count{phase=~"Failed|Error", namespace=~"moonlight(-team-.+)?"} unless argo_workflows_total_count{phase=~"Failed|Error", namespace=~"moonlight(-team-.+)?"} offset 15m) or ', ""),
        (' unless argo_workflows_total_count{phase=~"Failed|Error", namespace=~"moonlight(-team-.+)?"} offset 15m', ""), ("for", "5m"),
    ],
    "MoonlightQueuePending": [("> 0", "> 1"), ("> 0", ">= 0"), ("for", "6h"), ("for", "1d"), ('"}', '", status="active"}'), ("max by", "min by")],
    "MoonlightQueueInadmissible": [("inadmissible", "active"), (" unless on (cluster_queue) kueue_admitted_active_workloads > 0", ""), ("workloads > 0", "workloads >= 0"), ("on (cluster_queue)", "on ()"), ("for", "10m"), ("for", "1h")],
    "MoonlightGangEvictedOften": [("> 2.5", "> 2"), ("> 2.5", "> 3.5"), ("> 2.5", "> 1.5"), ("[6h]", "[1h]"), (', reason="PodsReadyTimeout"', ""), (" unless last_over_time(kueue_evicted_workloads_total[1h] offset 6h)", ""), ("for", "15m")],
    "MoonlightQueueStopped": [("== 0", "== 1"), ('status="active"', 'status="terminating"'), ("for", "5m"), ("for", "1h"), (', status="active"', "")],
}  # fmt: skip


def test_there_are_enough_mutations() -> None:
    assert set(MUTATIONS) == set(RULES)
    assert sum(map(len, MUTATIONS.values())) >= 60


@needs_promtool
@pytest.mark.long
@pytest.mark.parametrize("alert", RULES)
def test_a_fault_in_the_rule_is_seen_by_its_cases(alert: str, tmp_path: Path) -> None:
    variants = [_mutated(RULES[alert], old, new) for old, new in MUTATIONS[alert]]
    said = promtool([RULES[alert], *variants], cases_of(alert), tmp_path)
    assert said[0] == "SUCCESS"
    assert [
        fault for fault, words in zip(MUTATIONS[alert], said[1:], strict=True) if not words.startswith("FAILED:")
    ] == []


def _mutated(rule: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    rule = copy.deepcopy(rule)
    rule["expr"] = " ".join(rule["expr"].split())
    if old == "for":
        assert rule.get("for") != new
        rule["for"] = new
    else:
        assert old in rule["expr"], old
        rule["expr"] = rule["expr"].replace(old, new)
    return rule
