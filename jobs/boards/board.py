"""Grafana boards as JSON: `training` and `data` for any Ray, `cluster` beside them on Kubernetes.

python -m jobs.boards.board FOLDER        writes them; `make boards` those of k8s/monitoring/dashboards
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.boards.panels import CLUSTER, DATA, TRAINING, Panel

WIDTH, HEIGHT, IN_A_ROW = 8, 8, 3
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
BOARDS: dict[str, tuple[str, tuple[Panel, ...], str]] = {  # by file: title, panels, the metric that knows the runs
    "training": ("Moonlight training", TRAINING, "ray_moonlight_step"),
    "data": ("Moonlight data", DATA, "ray_moonlight_prepare_units"),
    "cluster": ("Moonlight cluster", CLUSTER, "ray_moonlight_step"),
}


def board(name: str) -> dict[str, Any]:
    """The dashboard as Grafana reads it, with a variable for the runs to show."""
    title, panels, metric = BOARDS[name]
    runs = {
        "name": "run",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values({metric}, run)", "refId": "run"},
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "refresh": 2,
    }
    return {
        "uid": "moonlight" if name == "training" else f"moonlight-{name}",
        "title": title,
        "tags": ["moonlight"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["moonlight"], "title": "Moonlight", "includeVars": True}],
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}, runs]},
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.stacked:
        defaults["custom"] = {"stacking": {"mode": "normal"}, "fillOpacity": 40}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {
            "x": WIDTH * (number % IN_A_ROW),
            "y": HEIGHT * (number // IN_A_ROW),
            "w": WIDTH,
            "h": HEIGHT,
        },
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": [
            {"expr": query, "legendFormat": legend, "refId": chr(ord("A") + index)}
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }


def write(folder: Path, names: Sequence[str] = tuple(BOARDS)) -> list[Path]:
    """`<folder>/<name>.json` of each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json" for name in names]
    for name, path in zip(names, paths):
        path.write_text(json.dumps(board(name), indent=1) + "\n")
    return paths


if __name__ == "__main__":
    write(Path(sys.argv[1]))
