"""What counts as a spike, what it does, and that a restart changes neither."""

import math

import numpy as np
import pytest
import torch

from pipeline.config.schema import SpikeConfig
from pipeline.storage import Storage
from pipeline.training.guard import Guard, RunDiverged
from pipeline.training.spikes import LEAST, Spikes
from pipeline.training.step import Step
from tests.training.make import Watched, tiny, tiny_dataset
from tests.training.test_step import build as build_run
from tests.training.test_step import held

CPU = torch.device("cpu")
HORIZON = 20


def judged(losses: list[float], norms: list[float] | None = None, **settings: object) -> tuple[Spikes, list[bool]]:
    spikes = Spikes(SpikeConfig(horizon_steps=HORIZON, **settings), CPU)
    found = []
    for loss, norm in zip(losses, norms or [1.0] * len(losses)):
        finite = torch.tensor(math.isfinite(loss) and math.isfinite(norm))
        found.append(bool(spikes.judge(torch.tensor(loss), torch.tensor(norm), finite)))
    return spikes, found


def noisy(steps: int, level: float = 3.0, spread: float = 0.05) -> list[float]:
    return list(level + spread * np.random.default_rng(0).standard_normal(steps))


def test_the_first_steps_teach_plain_mean_and_variance() -> None:
    losses, norms = noisy(HORIZON), list(np.exp(noisy(HORIZON, 0.0, 0.3)))
    spikes, found = judged(losses, norms)
    expected = [[np.mean(values), np.var(values)] for values in (losses, np.log(norms))]
    torch.testing.assert_close(spikes.spread, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)
    assert not any(found)


def test_then_they_are_exponential_averages() -> None:
    losses = noisy(300)
    spikes, _ = judged(losses)
    mean, variance = np.mean(losses[:HORIZON]), np.var(losses[:HORIZON])
    for loss in losses[HORIZON:]:
        above, weight = loss - mean, 1 / HORIZON
        above = min(above, 3 * max(math.sqrt(variance), LEAST[0]))
        mean, variance = mean + weight * above, (1 - weight) * (variance + weight * above * above)
    torch.testing.assert_close(spikes.spread[0], torch.tensor([mean, variance], dtype=torch.float64), rtol=1e-4, atol=0)


def test_noise_is_no_spike_and_a_falling_loss_is_none() -> None:
    falling = [6.0 * math.exp(-step / 500) + noise for step, noise in enumerate(noisy(5000, 2.0, 0.03))]
    assert not any(judged(falling)[1])


@pytest.mark.parametrize("figure", ["loss", "norm"])
def test_one_spike_is_one_and_does_not_hide_the_next(figure: str) -> None:
    losses, norms = noisy(400), list(np.exp(noisy(400, 0.0, 0.1)))
    for step in (200, 203):
        if figure == "loss":
            losses[step] += 2.0
        else:
            norms[step] *= 30.0
    spikes, found = judged(losses, norms)
    assert [step for step, spike in enumerate(found) if spike] == [200, 203]
    assert (int(spikes.found), int(spikes.in_a_row)) == (2, 0)


def test_a_new_level_becomes_normal() -> None:
    _, found = judged(noisy(200, 3.0) + noisy(400, 4.5))
    assert all(found[200:204])
    assert not any(found[300:])


def test_what_is_not_finite_is_no_spike_and_teaches_nothing() -> None:
    losses = noisy(100)
    with_holes = [*losses[:50], math.nan, math.inf, *losses[50:]]
    plain, holes = judged(losses)[0], judged(with_holes)[0]
    assert torch.equal(plain.spread, holes.spread)
    assert (int(holes.found), int(holes.steps)) == (0, 100)


def test_in_a_row_survives_a_step_that_is_not_finite() -> None:
    spikes, _ = judged([*noisy(100), 9.0, math.nan, 9.0])
    assert int(spikes.in_a_row) == 2


@pytest.mark.parametrize(("action", "allowed"), [("count", 1.0), ("skip", 0.0)])
def test_the_guard_acts_as_configured(action: str, allowed: float) -> None:
    guard = Guard(CPU, SpikeConfig(action=action, horizon_steps=HORIZON))
    for loss in noisy(100):
        assert guard.judge(torch.tensor(loss), torch.tensor(1.0)) == 1.0
    assert guard.judge(torch.tensor(50.0), torch.tensor(1.0)) == allowed
    assert (int(guard.skipped), int(guard.in_a_row), int(guard.spikes.found)) == (action == "skip", 0, 1)


def test_a_skipped_spike_changes_nothing(tmp_path) -> None:
    config = {"training__spikes": {"action": "skip", "horizon_steps": 10}}
    dataset = tiny_dataset(Storage(tiny(str(tmp_path)).storage))
    run = build_run(str(tmp_path), dataset, 1, steps=16, **config)
    for _ in range(12):
        run.advance(False)
    backward = run.step.forward_backward

    def spiking(*arguments):
        loss, aux_loss = backward(*arguments)
        return loss + 50.0, aux_loss

    run.step.forward_backward = spiking
    before = held(run)
    record = run.advance(False).fetch()
    assert (record.spikes, record.spikes_in_a_row, record.skipped_steps) == (1, 1, 1)
    assert all(torch.equal(value, before[name]) for name, value in held(run).items())
    run.step.forward_backward = backward
    record = run.advance(False).fetch()
    assert (record.spikes, record.spikes_in_a_row, record.skipped_steps) == (1, 0, 1)


def test_too_many_in_a_row_end_the_run(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward, calls = Step.forward_backward, []

    def spiking(self: Step, *arguments):
        calls.append(None)
        loss, aux_loss = backward(self, *arguments)
        return loss + (50.0 if len(calls) > 12 else 0.0), aux_loss

    monkeypatch.setattr(Step, "forward_backward", spiking)
    config = tiny(str(tmp_path), steps=20, training__spikes={"horizon_steps": 10, "stop_after": 3})
    with pytest.raises(
        RunDiverged, match=r"step 15: the last 3 steps had a loss or gradient norm far above .*stop_after 3"
    ):
        Watched().train(config)


def test_a_restart_judges_as_if_nothing_had_happened(tmp_path) -> None:
    settings = {"steps": 12, "training__spikes": {"horizon_steps": 10}}
    whole = Watched()
    manifest = whole.train(tiny(str(tmp_path / "whole"), **settings))
    config = tiny(str(tmp_path / "parts"), **settings)
    for stop_at in (4, 3):
        asked: list[int] = []
        with pytest.raises(RuntimeError, match="stopped after step"):
            Watched().train(config, should_stop=lambda asked=asked, at=stop_at: asked.append(0) or len(asked) >= at)
    assert Watched().train(config).checkpoint.content_sha256 == manifest.checkpoint.content_sha256
