"""A ladder whose runs are a formula finds the formula's laws, rates and share; its rungs differ in what they are meant to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import ladder as command
from pipeline.config.load import ConfigError, load_config
from pipeline.config.schema import RunConfig
from pipeline.ladder.climb import Ladder, Measure, climb
from pipeline.ladder.rungs import Beginning, Measured, Rung, configure, flops
from pipeline.ladder.show import lines, plot
from pipeline.model.shapes import count_parameters

RATES = {"muon": 1.3, "adamw": 0.7}  # the best ones at hidden size 64; they fall with the square root of size
SHARE, EXPONENT = 0.6, 0.1


def formula(rungs: Sequence[Rung]) -> dict[Rung, Measured]:
    found = {}
    for rung in rungs:
        compute = 1e9 * rung.hidden**3
        useful = compute / (SHARE if rung.optimizer == "muon" else 1.0)
        off = math.log(rung.rate / (RATES[rung.optimizer] * (64 / rung.hidden) ** 0.5))
        worse = 0.05 * (rung.batch != 2.0)
        noise = 1e-4 * (rung.seed - 1)
        loss = 50 * useful**-EXPONENT * (1 + 0.02 * off**2 + worse + noise)
        found[rung] = Measured(compute, loss, Beginning(8.3 + rung.seed / 10, f"{rung.seed}"))
    return found


def test_what_a_ladder_finds(tmp_path: Path) -> None:
    asked: list[Rung] = []

    def measure(rungs: Sequence[Rung]) -> dict[Rung, Measured]:
        asked.extend(rungs)
        return formula(rungs)

    found = climb(Ladder((64, 128, 256, 512), (1.0, 2.0, 4.0), (1.0, 2.0), 3), measure)
    assert found.share.value == pytest.approx(SHARE, rel=0.01)
    assert found.share.low <= found.share.value <= found.share.high
    assert {name: fit.law.exponent for name, fit in found.fits.items()} == pytest.approx(
        dict.fromkeys(RATES, EXPONENT), rel=1e-3
    )
    for name, rate in RATES.items():
        assert found.rates[name] == pytest.approx(
            {size: rate * (64 / size) ** 0.5 for size in (64, 128, 256, 512)}, rel=0.01
        )
    assert found.batch == {"muon": 2.0, "adamw": 2.0}
    further = {("muon", 64): [0.5], ("muon", 128): [0.5], ("adamw", 64): [0.5, 0.25], ("adamw", 128): [0.5, 0.25]}
    assert found.swept == {name: {size: [1.0, 2.0, 4.0, *further[name, size]] for size in (64, 128)} for name in RATES}
    sweeps = 4 * 3 + 6
    assert len(asked) == len(set(asked)) == sweeps + 2 * (2 + 4 * 3 - 1)  # the best batch at 64 was known
    said = list(lines(found))
    assert said[0] == "| swept: d | optimizer | 0.25 | 0.5 | 1 | 2 | 4 |"
    assert said[2].startswith("| 64 | Muon |  | 1.")  # not tried at 0.25
    assert [len(line.split("|")) for line in said[2:6]] == [9] * 4
    assert [line.split()[0] for line in said[-3:]] == ["Muon", "AdamW", "share"]
    assert plot(found).startswith(b"\x89PNG")
    assert json.loads(found.to_json())["share"]["value"] == found.share.value


def test_what_a_ladder_refuses() -> None:
    def but(changed: Callable[[Rung, Measured], Measured]) -> Measure:
        return lambda rungs: {rung: changed(rung, each) for rung, each in formula(rungs).items()}

    ladder = Ladder((64, 128, 256), (0.5, 1.0, 2.0), (1.0,), 2)
    steeper = but(lambda rung, each: replace(each, loss=each.loss / rung.rate))
    with pytest.raises(
        ValueError, match=r"--rates: \w+ at hidden size \d+ is still best at the end of its sweep; begin at \d+ times"
    ):
        climb(ladder, steeper)
    lost = but(lambda rung, each: Measured(each.flops, math.inf, None) if rung.hidden == 256 else each)
    with pytest.raises(ValueError, match=r"muon d=256 .* diverged .*: raise --tuned"):
        climb(ladder, lost)
    with pytest.raises(AssertionError, match="start from different weights"):
        climb(ladder, but(lambda rung, each: replace(each, beginning=Beginning(8 + rung.rate, "0"))))
    with pytest.raises(AssertionError, match="see different data"):
        climb(ladder, but(lambda rung, each: replace(each, beginning=Beginning(8.0, rung.optimizer))))


def test_rungs_are_the_recipe_at_another_size() -> None:
    recipe = load_config("debug")
    small, large = (configure(recipe, Rung("muon", hidden, 0.5), 1.0, "d") for hidden in (64, 512))
    again, other = (
        configure(recipe, Rung("muon", 64, 0.5), 1.0, "d"),
        configure(recipe, Rung("muon", 64, 0.5, seed=1), 1.0, "d"),
    )
    assert (small.run_id, other.seed) == (again.run_id, small.seed + 1)
    narrow = configure(load_config("debug", ["training.expert_products=fp8"]), Rung("muon", 64, 0.5), 1.0, "d")
    assert len({small.run_id, large.run_id, other.run_id, narrow.run_id}) == 4
    peer = configure(recipe, Rung("adamw", 64, 0.5), 1.0, "d")
    differ = {key for key, value in small.model_dump().items() if value != peer.model_dump()[key]}
    assert differ == {"run_id", "optimizer"}
    assert peer.optimizer.model_copy(update={"name": "muon"}) == small.optimizer
    for config in (small, large):
        assert config.model.hidden_size // config.model.num_attention_heads == 64
        assert config.schedule.total_tokens == pytest.approx(count_parameters(config.model).active, rel=0.05)
        peak = max(stage.end for stage in config.schedule.learning_rate)
        assert peak == pytest.approx(0.5 * max(stage.end for stage in recipe.schedule.learning_rate))
    assert 100 < flops(large) / flops(small) < 1000  # the square of the parameters


def rung_of(*overrides: str) -> RunConfig:
    return configure(load_config("debug", overrides), Rung("muon", 64, 0.5), 1.0, "d")


def test_a_recipe_of_many_ranks_that_is_asked_tasks_has_rungs() -> None:
    """Rungs are one process, and their held-out loss is all that is asked for."""
    plain = rung_of()
    mesh = ("parallelism={replicate: 1, shard: 2, ep: 2}", "training.micro_batch=2")
    tasks = ("evaluation.tasks=[hellaswag]", "evaluation.few_shot={hellaswag: 2}", "corpus.decontamination={}")
    for overrides in ((*mesh, "training.interleave=true"), tasks, ("evaluation.task_preset=moonlight",)):
        found = rung_of(*overrides)
        assert (found.evaluation.tasks, found.training.interleave) == ((), False)
        assert found.run_id == plain.run_id


def test_a_rung_is_named_by_what_decides_its_loss() -> None:
    """What is done is found by the name: other weights of sources are other runs, other time-outs are not."""
    plain = rung_of().run_id
    same = ("training.step_timeout_s=77", "training.collect_every=9", "evaluation.waiting=3", "data.cache_bytes=1GB")
    same = (*same, "optimizer.muon.bucket_bytes=1000000", "checkpoint.every_steps=7")
    assert [override for override in same if rung_of(override).run_id != plain] == []
    other = ("corpus.sources.0.weight=7.0", "data.window_blocks=3", "evaluation.max_tokens_per_source=99", "seed=3")
    name = load_config("debug").corpus.sources[0].name
    other = (
        *other,
        f"corpus.mixture=[{{until_tokens: 10000000, weights: {{{name}: 1}}}}]",
        "training.aux_loss_weight=0.5",
        "optimizer.weight_decay=0.3",
        "training.document_mask=true",
    )
    assert [override for override in other if rung_of(override).run_id == plain] == []


def test_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--sizes 100: must be a multiple of 64"):
        configure(load_config("debug"), Rung("muon", 100, 1.0), 1.0, "d")
    assert command.main(["--config", "debug", "--sizes", "64"]) == 2
    assert "--sizes 64: a power law needs at least two sizes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--config", "debug", "--sizes", "64,x"])
    assert "must be numbers, separated by commas" in capsys.readouterr().err
