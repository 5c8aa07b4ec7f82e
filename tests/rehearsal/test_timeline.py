"""Streams by hand: what runs side by side, what waits, and what compilation makes of a tape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import plan
from pipeline.config.load import load_config
from pipeline.rehearsal.chips import FOLDER, check_chip, load_chip
from pipeline.rehearsal.fuse import fuse
from pipeline.rehearsal.tape import MAIN, Await, AwaitMark, Collective, Entry, HostWait, Kernel, Mark
from pipeline.rehearsal.timeline import simulate
from pipeline.rehearsal.trace import to_trace

CHIP = load_chip("h100").model_copy(
    update={
        "matmul": 1.0,
        "memory_tb_s": 1.0,
        "node_gb_s": 1.0,
        "node_latency_us": 1e-6,
        "launch_us": 1e-6,
        "kernel_us": 1e-6,
        "host_wait_us": 1e-6,
    }
)


def product(seconds: float, stream: str = MAIN) -> Kernel:
    return Kernel("mm", "matmul", stream, "forward", "", round(seconds * 1e12), (), ())


def exchange(seconds: float, number: int, stream: str = MAIN) -> Collective:
    return Collective("all_to_all", "2 neighbours", (0, 1), stream, "forward", "", "bf16", round(seconds * 1e9), number)


def elementwise(reads: dict[int, int], writes: dict[int, int], name: str = "add") -> Kernel:
    return Kernel(name, "memory", MAIN, "forward", "", 0, tuple(reads.items()), tuple(writes.items()))


@pytest.mark.parametrize(
    ("behind", "step", "shown"),
    [(0.0, 5.0, 2.0), (1.0, 5.0, 1.0), (3.0, 6.0, 0.0)],
)
def test_an_exchange_hides_behind_what_is_launched_before_it_is_awaited(
    behind: float, step: float, shown: float
) -> None:
    tape: list[Entry] = [
        product(1.0),
        exchange(2.0, 1),
        *([product(behind)] if behind else []),
        Await(MAIN, 1),
        product(2.0),
    ]
    found = simulate(tape, CHIP)
    assert found.seconds == pytest.approx(step, abs=1e-5)
    assert found.idle.get("all_to_all, 2 neighbours", 0.0) == pytest.approx(shown, abs=1e-5)
    assert sum(found.busy.values()) + sum(found.idle.values()) == pytest.approx(found.seconds, abs=1e-5)


def test_collectives_of_a_group_queue_up() -> None:
    tape = [exchange(2.0, 1), exchange(3.0, 2), Await(MAIN, 2), product(1.0)]
    assert simulate(tape, CHIP).seconds == pytest.approx(6.0, abs=1e-5)


def test_streams_run_side_by_side_until_one_waits_for_a_mark() -> None:
    tape = [
        product(3.0, "other"),
        Mark(7, "other"),
        product(1.0),
        AwaitMark(MAIN, 7),
        product(1.0),
        product(1.0, "third"),
    ]
    found = simulate(tape, CHIP)
    assert found.seconds == pytest.approx(4.0, abs=1e-5)
    assert {span.stream: span.start for span in found.spans}["third"] == pytest.approx(0.0, abs=1e-5)


def test_a_host_that_waits_launches_nothing_meanwhile() -> None:
    free, waits = (
        [product(1.0), product(1.0, "other")],
        [product(1.0), HostWait("item", MAIN, "forward", ""), product(1.0, "other")],
    )
    assert simulate(free, CHIP).seconds == pytest.approx(1.0, abs=1e-5)
    assert simulate(waits, CHIP).seconds == pytest.approx(2.0, abs=1e-5)
    slow = CHIP.model_copy(update={"launch_us": 1e6})
    behind = simulate([product(0.25)] * 4, slow)
    assert behind.idle["host"] == pytest.approx(3.25, abs=1e-4)  # 1 + 3 x 0.75
    assert behind.launching == pytest.approx(4.0, abs=1e-4)
    assert simulate([*waits, exchange(1.0, 1)], slow).launching == pytest.approx(3.0, abs=1e-4)  # a wait is none


def test_a_run_of_elementwise_work_moves_what_crosses_its_border() -> None:
    first = elementwise({1: 100}, {2: 100})
    second = elementwise({2: 100, 3: 10}, {4: 100}, "mul")
    read_later = Kernel("mm", "matmul", MAIN, "forward", "", 1, ((4, 100),), ((5, 1),))
    one, product_ = fuse([first, second, read_later])
    assert isinstance(one, Kernel)
    assert (one.reads, one.writes) == (((1, 100), (3, 10)), ((4, 100),))  # 2 never reaches memory
    assert product_ is read_later
    assert fuse([first, exchange(1.0, 1), second])[0] is first  # nothing is moved past an exchange
    in_place = elementwise({9: 50}, {9: 50})
    late = replace(in_place, phase="optimizer")
    assert fuse([late, late]) == [late, late]


def test_the_trace_has_every_span_on_a_line_of_its_stream() -> None:
    found = simulate([product(1.0), exchange(2.0, 1)], CHIP)
    events = json.loads(to_trace(found, "x"))["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert [(event["name"], event["ts"], event["dur"]) for event in spans] == [
        ("mm", pytest.approx(0, abs=5), pytest.approx(1e6)), ("all_to_all", pytest.approx(1e6, abs=5), pytest.approx(2e6)),
    ]  # fmt: skip
    assert len({event["tid"] for event in spans}) == 2


def test_chips(tmp_path: Path) -> None:
    for file in FOLDER.glob("*.yaml"):
        chip = load_chip(file.stem)
        assert max(chip.matmul, chip.grouped, chip.attention_forward) < chip.peak_tflops
    text = (FOLDER / "h100.yaml").read_text()
    (tmp_path / "mine.yaml").write_text("\n".join(line for line in text.splitlines() if not line.startswith("grouped")))
    with pytest.raises(ValueError, match=r"^--chip \S+mine\.yaml: grouped is missing; add the rate"):
        load_chip(str(tmp_path / "mine.yaml"))
    for written, said in (
        (b"", "must hold names with rates"),
        (b"- 650", "must hold names with rates"),
        (b"matmul: [", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (text.replace("grouped: ", "grouped: -").encode(), "grouped: input should be greater than 0"),
        (text.replace("grouped: ", "groupde: ").encode(), "grouped is missing"),
        ((text + "\nfp64: 3\n").encode(), "fp64: extra inputs are not permitted"),
    ):
        (tmp_path / "mine.yaml").write_bytes(written)
        with pytest.raises(ValueError, match=rf"^--chip \S+mine\.yaml: {said}[^\n]*$"):
            load_chip(str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("\n".join(line for line in text.splitlines() if "grouped_fp8" not in line))
    without, plain = load_chip(str(tmp_path / "mine.yaml")), load_config("moonlight-16b-a3b")
    fp8 = load_config("moonlight-16b-a3b", ["training.expert_products=fp8"])
    for chip in (without, load_chip("mi300x")):
        check_chip(chip, plain)
        with pytest.raises(ValueError, match=f"training.expert_products fp8: {chip.name} has no rate for it"):
            check_chip(chip, fp8)
    check_chip(load_chip("h200"), fp8)
    with pytest.raises(ValueError, match="known are b200, h100, h200, mi300x"):
        load_chip("h1000")


def test_fp8_asked_of_a_chip_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, before anything is rehearsed."""
    given = ["--config", "debug", "training.expert_products=fp8", "--rehearse", "--chip", "mi300x"]
    assert plan.main(given) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert (
        "training.expert_products fp8: MI300X 192 GB has no rate for it (grouped_fp8 in the chip's file); set it to compute_dtype"
        in said.err
    )
    assert "rehearsed" not in said.out


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-9, 1e-3), min_size=2, max_size=30))
def test_what_follows_does_not_overlap(durations: list[float]) -> None:
    """Perfetto counts in nanoseconds and drops what overlaps by one."""
    found = simulate([product(seconds) for seconds in durations], CHIP)
    events = [event for event in json.loads(to_trace(found, "x"))["traceEvents"] if event["ph"] == "X"]
    times = [(round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3)) for event in events]
    assert len(times) == len(durations)
    assert all(before[1] <= after[0] for before, after in zip(times, times[1:]))
    assert all(end - start == pytest.approx(s * 1e9, abs=1.5) for (start, end), s in zip(times, durations))
