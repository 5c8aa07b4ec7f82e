"""The schedules against the paper's numbers (arXiv 2502.16982, section 3.3) and against a step-by-step loop."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.load import load_config
from pipeline.config.schema import BatchStage, BiasRateStage, LearningRateStage, ScheduleConfig
from pipeline.optim import schedule as sched

TRILLION = 10**12


@pytest.fixture(scope="module")
def moonlight() -> ScheduleConfig:
    return load_config("moonlight-16b-a3b", []).schedule


def test_step_counts_of_the_full_run(moonlight):
    until = lambda tokens: sched.steps_until(moonlight, 8192, tokens)  # noqa: E731
    assert until(2000 * 2048 * 8192) == 2000  # warm-up
    assert until(201_326_592_000) == 12_000  # batch doubles
    assert until(int(5.2 * TRILLION)) == 160_973  # 160,972.4 steps
    assert sched.total_steps(moonlight, 8192) == 175_874
    assert sched.segments(moonlight, 8192) == (
        sched.Segment(0, 0, 12_000, 2048),
        sched.Segment(12_000, 12_000 * 2048, 163_874, 4096),
    )


def test_learning_rate_at_the_edges(moonlight):
    rate = lambda step: sched.at_step(moonlight, 8192, step).learning_rate  # noqa: E731
    assert rate(0) == pytest.approx(4.2e-4 / 2000)
    assert rate(1999) == 4.2e-4
    assert rate(2000) < 4.2e-4
    assert sched.learning_rate(moonlight, int(5.2 * TRILLION)) == 4.2e-5
    middle = (2000 * 2048 * 8192 + int(5.2 * TRILLION)) // 2
    assert sched.learning_rate(moonlight, middle) == pytest.approx((4.2e-4 + 4.2e-5) / 2)
    cooldown = int(5.2 * TRILLION) + 100 * 4096 * 8192
    assert sched.learning_rate(moonlight, cooldown) == 1.0e-4
    assert sched.learning_rate(moonlight, cooldown + 1) < 1.0e-4
    assert rate(175_873) == 0.0
    assert sched.learning_rate(moonlight, 6 * TRILLION) == 0.0


def test_batch_and_bias_rate_at_the_edges(moonlight):
    before, after = sched.at_step(moonlight, 8192, 11_999), sched.at_step(moonlight, 8192, 12_000)
    assert (before.sequences, after.sequences) == (2048, 4096)
    assert after.first_sequence == 12_000 * 2048
    assert sched.at_step(moonlight, 8192, 160_972).bias_rate == 1e-3  # still begins before 5.2 T
    assert sched.at_step(moonlight, 8192, 160_973).bias_rate == 0.0
    assert sched.global_batch(moonlight, 6 * TRILLION) == 4096


def test_a_step_outside_of_the_run_is_refused(moonlight):
    for step in (-1, 175_874):
        with pytest.raises(ValueError, match=f"step {step} is outside of the run, which has 175874 steps"):
            sched.at_step(moonlight, 8192, step)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    ends=st.lists(st.integers(1, 400), min_size=1, max_size=4, unique=True).map(sorted),
    batches=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    total=st.integers(1, 400),
    length=st.integers(1, 7),
)
def test_closed_form_equals_the_loop(ends, batches, total, length):
    ends = [*ends[:-1], max(ends[-1], total)]
    config = ScheduleConfig(
        total_tokens=total,
        learning_rate=(LearningRateStage(until_tokens=ends[-1], shape="cosine", start=1.0, end=0.1),),
        global_batch=tuple(BatchStage(until_tokens=e, sequences=b) for e, b in zip(ends, batches)),
        bias_rate=(BiasRateStage(until_tokens=ends[-1], rate=0.5),),
    )
    tokens = sequences = step = 0
    while tokens < total:
        found = sched.at_step(config, length, step)
        n = sched.global_batch(config, tokens)
        assert (found.first_sequence, found.sequences, found.slots_before) == (sequences, n, tokens)
        fraction = min(1.0, (tokens + n * length) / ends[-1])
        assert math.isclose(found.learning_rate, 0.1 + 0.45 * (1 + math.cos(math.pi * fraction)), rel_tol=1e-12)
        tokens, sequences, step = tokens + n * length, sequences + n, step + 1
    assert sched.total_steps(config, length) == step
