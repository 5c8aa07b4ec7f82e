"""The whole estimate against figures that others measured or published."""

from __future__ import annotations

import pytest

from jobs import plan
from pipeline.config.load import load_config
from pipeline.planner.estimate import Hardware, estimate

CARD = [  # Megatron-Bridge's verification card of Moonlight: 16 H100s, 22,528 tokens/s a GPU at 386.6 TFLOP/s
    "parallelism.replicate=1", "parallelism.shard=16", "training.sequence_length=4096", "optimizer.name=adamw",
]  # fmt: skip


def test_the_published_card() -> None:
    found = estimate(load_config("moonlight-16b-a3b", CARD), Hardware(mfu=386.6 / 989))
    assert found.tokens_per_second == pytest.approx(22_528, rel=2e-3)
    assert found.step.newton_schulz == 0.0


def test_the_published_run() -> None:
    found = estimate(load_config("moonlight-16b-a3b", ["parallelism.shard=64", "parallelism.replicate=4"]), Hardware())
    assert found.parameters.total == 15_960_108_544
    assert found.steps == 175_874
    gpu_hours = found.seconds * 256 / 3600
    assert gpu_hours == pytest.approx(77_000, rel=0.02)  # reference/moonlight.md: 5.7 T tokens at 8 k
    assert found.newton_schulz_imbalance <= 1.1
    assert found.step.newton_schulz == pytest.approx(0.0165, rel=0.1)  # 64 ranks at 550 TFLOP/s
    # fp32 parameters and momentum, and a second moment for embedding, head and norms
    assert found.checkpoint_bytes == pytest.approx((2 * 15.96 + 0.671) * 4e9, rel=2e-3)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--config", "moonlight-16b-a3b", "--price", "2"]) == 0
    shown = capsys.readouterr().out
    assert "256 GPUs, replicate 32 x shard 8 (experts: efsdp 1 x ep 8)" in shown
    assert "15,960,108,544 parameters" in shown
    assert "dollars" in shown
    assert "assumed    GPUs of 989 TFLOP/s and 80 GB at 39% MFU" in shown
    assert "CPUs" not in shown
    assert plan.main(["--config", "debug"]) == 0
    assert "runs on CPUs, for which time and cost say nothing" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plan.main(["--config", "debug", "--price", "-1"])
    assert "--price -1 must be 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["training.micro_batch=4"], "Lower training.micro_batch (now 4)."),
        (
            ["parallelism.shard=64", "parallelism.replicate=4", "--gpu-memory", "24"],
            "Set training.activation_checkpointing to full.",
        ),
        (["parallelism.shard=1", "parallelism.ep=1"], "Raise parallelism.shard (now 1)."),
    ],
)
def test_what_does_not_fit_names_the_setting(
    overrides: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["--config", "moonlight-16b-a3b", *overrides]) == 1
    assert capsys.readouterr().out.endswith(f"{remedy}\n")


def test_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--config", "moonlight-16b-a3b", "parallelism.ep=7"]) == 2
    assert "parallelism" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan.main(["--config", "debug", "--mfu", "1.5"])
    assert "--mfu 1.5" in capsys.readouterr().err
