"""Is the cluster of KUBECONFIG what the guide says? `make conformance`: one table, one exit code, nothing left behind.

In order: versions of the server and of the operators, every object of the overlay (a dry run on the server), alerts that Prometheus has loaded;
then, in throw-away copies (namespaces, queues, policies and rights of their own, `throwaway.py`), every act of the security model that a dry run
can play, by impersonation, and runs from queue to end (`play.py`). `--only-look` makes nothing: the acts are put to what is installed. A check that
needs what is not there (no Prometheus) is named and skipped. The whole pipeline, through Argo, is `make e2e`.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from types import FrameType

import yaml

from k8s.conformance import look, play
from k8s.conformance.kubectl import Kubectl, Pause, Row, kubectl
from k8s.conformance.throwaway import LABEL, Manifest, clean, throwaway

WIDTH = 64


class Table:
    """Rows as they come, each shown at once: some take minutes."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def append(self, row: Row) -> None:
        self.rows.append(row)
        print(f"{row.verdict:<8} {row.check:<{WIDTH}}  {' '.join(row.detail.split())[:200]}".rstrip(), flush=True)

    def __iadd__(self, rows: Iterable[Row]) -> Table:
        for row in rows:
            self.append(row)
        return self

    def summary(self) -> int:
        failed = sum(row.verdict == "FAILED" for row in self.rows)
        skipped = sum(row.verdict == "skipped" for row in self.rows)
        print(f"{len(self.rows)} checks, {failed} failed, {skipped} skipped", flush=True)
        return 1 if failed else 0


def rendered(ask: Kubectl, overlay: str) -> list[Manifest]:
    answer = ask(["kustomize", f"k8s/overlays/{overlay}"], None)
    if answer.code:
        raise RuntimeError(f"k8s/overlays/{overlay} does not build: {answer.text}")
    return [item for item in yaml.load_all(answer.text, Loader=yaml.CSafeLoader) if item]


def image_of(objects: list[Manifest]) -> str:
    """The pipeline's image in an overlay."""
    job = next(item for item in objects if item["kind"] == "RayJob")
    return str(job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"])


def checks(ask: Kubectl, overlay: str, image: str | None, only_look: bool, table: Table, pause: Pause) -> None:
    from tests.k8s.playable import aimed, tries

    table += look.versions(ask)
    if table.rows[0].verdict == "FAILED":
        return
    table += look.objects(ask, overlay)
    table += look.alerts(ask)
    objects = rendered(ask, overlay)
    if only_look:
        table += look.acts(ask, tries(overlay))
        return
    ident = f"c{uuid.uuid4().hex[:6]}"  # it begins names
    acts, runs = f"{ident}a", f"{ident}r"
    print(f"throw-away copies: label {LABEL}; if this is killed: python -m k8s.conformance --clean {acts} {runs}", file=sys.stderr)  # fmt: skip
    with throwaway(ask, objects, acts, table.append, pause):
        table += look.acts(ask, aimed(tries(overlay), acts))
    small = play.prepared(rendered(ask, "kind"), image or image_of(objects))
    with throwaway(ask, small, runs, table.append, pause) as made:
        table += play.paths(play.Stage(ask, made, runs, pause))


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None, ask: Kubectl = kubectl, pause: Pause = time.sleep) -> int:
    made = argparse.ArgumentParser(
        prog="python -m k8s.conformance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--overlay", default="prod")
    made.add_argument("--image", help="the pipeline's image for the runs; the overlay's unless given")
    made.add_argument("--only-look", action="store_true", help="dry runs only, on what is installed: make nothing")
    made.add_argument(
        "--clean", metavar="ID", nargs="+", help="take away what a run that was killed has left, and do nothing else"
    )
    given = made.parse_args(arguments)
    table = Table()
    signal.signal(signal.SIGTERM, _stop)
    try:
        if given.clean:
            table += (clean(ask, ident, pause) for ident in given.clean)
        else:
            checks(ask, given.overlay, given.image, given.only_look, table, pause)
    except RuntimeError as error:
        table.append(Row("the kit itself", "FAILED", str(error)))
    except KeyboardInterrupt:
        table.append(Row("the kit itself", "FAILED", "stopped"))
        table.summary()
        return 130
    return table.summary()


if __name__ == "__main__":
    sys.exit(main())
