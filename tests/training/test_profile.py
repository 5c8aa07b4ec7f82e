"""Profiles of a run of two ranks open in the tools that they are for; requests reach a run that is at work; what is past is refused."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.cuda import _memory_viz

from jobs import profile as command
from pipeline.config.load import ConfigError, dump_yaml
from pipeline.config.schema import StorageConfig
from pipeline.parallel.flight_recorder import recorded
from pipeline.storage import open_storage
from pipeline.training import profiles
from pipeline.training.profiles import ask, check, profile_folder
from pipeline.training.watchdog import Watchdog
from tests.distributed import run_distributed
from tests.training.make import Watched, tiny


def _profiled(root: str) -> None:
    profile = {"steps": [3, 4], "ranks": [0, 1]}
    Watched().train(tiny(root, steps=6, parallelism={"shard": 2, "ep": 2}, training__profile=profile))


def test_a_profile_opens_in_its_tools(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_distributed(_profiled, 2, str(tmp_path))
    folder, said = tmp_path / profile_folder("tiny", 3), capfd.readouterr().err
    traces, memories = (sorted(folder.glob(f"rank-*.{kind}")) for kind in ("trace.json.gz", "memory.pickle"))
    assert [path.name.partition(".")[0] for path in traces] == ["rank-00000", "rank-00001"]
    for path in traces:
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = [event.get("name", "") for event in events]
        assert sum(name == "gloo:all_to_all" for name in names) > 0  # tokens on their way to experts
        assert "aten::_fused_adamw_" in names
    assert len(memories) + said.count("no memory snapshot") == 2  # torch cannot always make one on a CPU
    for path in memories:
        assert sum(len(trace) for trace in pickle.loads(path.read_bytes())["device_traces"]) > 1000
        page = tmp_path / "memory.html"
        viz = [sys.executable, _memory_viz.__file__, "trace_plot", str(path), "-o", str(page)]
        subprocess.run(viz, check=True, capture_output=True)
        assert "MemoryViz" in page.read_text()


def test_a_profile_that_torch_cannot_analyse_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def contradicts(_: Any) -> Any:
        raise AssertionError("duplicate outputs")

    monkeypatch.setattr("pipeline.training.profile._profile_to_snapshot", contradicts)
    watched = Watched()
    watched.train(tiny(str(tmp_path), steps=4, training__profile={"steps": [2, 3]}))
    assert watched.progress[-1].step == 4
    assert [path.name for path in (tmp_path / profile_folder("tiny", 2)).iterdir()] == ["rank-00000.trace.json.gz"]
    assert "no memory snapshot: torch cannot make one of this profile (duplicate outputs)" in capsys.readouterr().err


def test_a_run_at_work_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profiles, "LOOK_S", 0.01)
    config = tiny(str(tmp_path), steps=40, checkpoint__every_steps=100)
    storage = open_storage(config.storage)
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    arguments = ["--config", str(tmp_path / "run.yaml")]
    monkeypatch.setattr("jobs.views.profile.require_run", lambda *_: None)
    assert command.main(arguments) == 2
    assert "run tiny is not in training" in capsys.readouterr().err
    asked: list[int] = []

    class Asking(Watched):
        def train(self, config: Any, **options: Any) -> Any:
            return super().train(config, should_stop=lambda: self.ask() or False, **options)

        def ask(self) -> None:
            if len(self.progress) == 3:  # three steps are done, and the request comes
                for given, message in (
                    (["--at", "1"], "--at 1: that step is past"),
                    (["--ranks", "0,3"], "--ranks 0,3: the run has ranks 0 to 0"),
                    (["--at", "39", "--steps", "5"], "steps 39 to 43: the run ends after 40"),
                ):
                    until_logged(storage)
                    assert command.main([*arguments, *given]) == 2
                    assert message in capsys.readouterr().err
                assert command.main([*arguments, "--at", "9", "--steps", "2"]) == 0
                asked.append(9)
                looked.wait(60)

    looked = threading.Event()
    read = profiles.read_request

    def told(*args: Any) -> Any:
        found = read(*args)
        if found is not None:
            looked.set()
        return found

    monkeypatch.setattr("pipeline.training.profile.read_request", told)
    monkeypatch.setattr("pipeline.training.journal.WRITE_S", 0.01)
    Asking().train(config)
    assert asked
    assert (tmp_path / profile_folder("tiny", 9) / "rank-00000.trace.json.gz").exists()
    assert "profile of steps 9 to 10 on rank 0" in capsys.readouterr().out


def until_logged(storage: Any) -> None:
    from pipeline.training.journal import read_journal
    from tests.workflow.driver import until

    until(lambda: bool(read_journal(storage, "tiny").steps), "a line in the journal")


def test_steps_that_are_past(tmp_path: Path) -> None:
    config = tiny(str(tmp_path), steps=4, training__profile={"steps": [2, 2]})
    storage = open_storage(config.storage)
    check(config, storage)
    Watched().train(config)
    check(config, storage)  # these were profiled
    for path in (tmp_path / profile_folder("tiny", 2)).iterdir():
        path.unlink()
    with pytest.raises(
        ValueError, match=r"^training.profile.steps \[2, 2\]: these steps are past, the run goes on after 4"
    ):
        check(config, storage)
    with pytest.raises(ValueError, match="is not in training"):  # it has ended
        ask(storage, config, 3, (0,), None)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"steps": [5, 3]}, "training.profile.steps: .*must be the first and the last step"),
        ({"steps": [1, 100]}, "at most 20 in all"),
        ({"steps": [1, 2], "ranks": [1]}, r"training.profile.ranks \[1\]: the run has ranks 0 to 0"),
    ],
)
def test_bad_input(tmp_path: Path, profile: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(str(tmp_path), training__profile=profile)


def _one_stays_away(root: str) -> bytes:
    """Rank 1 does not take part in the third sum; the watchdog of each notices, and leaves what it recorded."""
    left = threading.Event()
    x = torch.ones(4)
    storage = open_storage(StorageConfig(root=root))
    dog = Watchdog(1.0, storage, "hangs", dist.get_rank(), 2, leave=lambda _: left.set(), collectives=recorded)
    with dog:
        dog.enter("step", 5)
        for _ in range(3 if dist.get_rank() == 0 else 2):
            dist.all_reduce(x, async_op=True)
        left.wait(60)
    return b""


def test_the_flight_recorder_names_who_did_not_take_part(tmp_path: Path) -> None:
    run_distributed(_one_stays_away, 2, str(tmp_path))
    folder = tmp_path / "hangs/flight-00000005"
    assert sorted(path.name for path in folder.iterdir()) == ["rank_0", "rank_1"]
    assert [len(pickle.loads((folder / f"rank_{rank}").read_bytes())["entries"]) for rank in (0, 1)] == [3, 2]
    tool = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(folder), "-p", "rank_", "-v"]
    done = subprocess.run(tool, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert "Not all ranks joining collective, sequence number: 3" in said, said
    assert "missing ranks: {1}" in said, said
