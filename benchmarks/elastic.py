"""The losses of a run that changed its size beside those of one that did not, as a plot.

    pytest -m long tests/jobs/test_elastic.py --basetemp /tmp/elastic
    python -m benchmarks.elastic /tmp/elastic/*/elastic /tmp/elastic/*/whole --run-id tiny --plot docs/images/elastic.png

Each argument is a storage root. Prints the largest difference of a step's loss.
"""

from __future__ import annotations

import argparse
import json

from matplotlib.figure import Figure

from pipeline.config.schema import StorageConfig
from pipeline.storage import Storage, open_storage
from pipeline.training.commits import train_folder
from pipeline.workflow.record import read_events

INK, ELASTIC, WHOLE = "#1f2933", "#d9480f", "#a5c8ff"


def losses(storage: Storage, run_id: str) -> list[float]:
    """Of every step."""
    files = sorted(info.path for info in storage.list(f"{train_folder(run_id)}/metrics"))
    return [json.loads(line)["loss"] for path in files for line in storage.read(path).splitlines()]


def sizes(storage: Storage, run_id: str) -> list[tuple[int, int]]:
    """(the step after which it began, workers) of each group of workers."""
    return [(event["step"], event["workers"]) for event in read_events(storage, run_id) if event["event"] == "sized"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("elastic")
    parser.add_argument("whole")
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--plot", required=True)
    given = parser.parse_args()
    elastic, whole = (open_storage(StorageConfig(root=root)) for root in (given.elastic, given.whole))
    changed, steady = losses(elastic, given.run_id), losses(whole, given.run_id)
    groups = sizes(elastic, given.run_id)
    difference = max(abs(ours - theirs) for ours, theirs in zip(changed, steady, strict=True))
    print(
        f"{len(changed)} steps on {', then '.join(f'{workers}' for _, workers in groups)} workers: losses within {difference:.1e}"
    )

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[4, 1])
    steps = range(1, len(changed) + 1)
    above.plot(steps, steady, color=WHOLE, linewidth=6, label=f"{groups[0][1]} workers throughout")
    above.plot(steps, changed, color=ELASTIC, linewidth=1.6, label="two leave, and come back later")
    above.set_ylabel("loss (nats per token)", color=INK)
    above.legend(frameon=False)
    bounds = [step for step, _ in groups] + [len(changed)]
    for (begin, workers), end in zip(groups, bounds[1:]):
        below.fill_between([begin, end], workers, step="post", color=ELASTIC, alpha=0.35)
    below.set_yticks(sorted({0, *(workers for _, workers in groups)}))
    below.set_ylabel("workers", color=INK)
    below.set_xlabel("step", color=INK)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(given.plot)


if __name__ == "__main__":
    main()
