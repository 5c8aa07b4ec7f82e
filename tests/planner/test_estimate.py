"""The whole estimate against figures that others measured or published."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import plan
from pipeline.config.load import load_config
from pipeline.planner.estimate import Hardware, estimate
from pipeline.planner.preparing import checkpoint_bytes, model_bytes, preparing

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


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--config", "moonlight-16b-a3b", "--price", "2"]) == 0
    shown = capsys.readouterr().out
    assert "256 GPUs, replicate 32 x shard 8 (experts: efsdp 1 x ep 8)" in shown
    assert "15,960,108,544 parameters" in shown
    assert "dollars" in shown
    assert "assumed    GPUs of 989 TFLOP/s and 80 GB at 39% MFU" in shown
    assert "CPUs" not in shown
    assert "6.4 TB of text at least, for what training asks of it" in shown
    assert "about 1,425.0 billion tokens: 36 CPU hours" in shown
    with pytest.raises(SystemExit):
        plan.main(["--config", "debug", "--price", "-1"])
    assert "--price -1 must be 0 or more" in capsys.readouterr().err


def test_a_plan_for_cpus_is_about_cpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo took 3 min 32 s with AVX-512 (README)."""
    given = ["--config", "debug", f"corpus.sources=[{{name: own, path: {tmp_path}}}]"]
    (tmp_path / "a.txt").write_bytes(b"x" * 7_000_000)
    assert plan.main([*given, "--price", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert "GPU" not in shown.replace("--gpu-memory", "")
    assert "debug: 2 workers" in shown
    assert "a worker has 1 cores with AVX-512, 100 GFLOP/s in fp32 of which steps reach 50%" in shown
    assert "run        4 min" in shown
    assert "0.014 dollars" in shown
    assert "prepare    7.0 MB of text, about 2.0 million tokens: 0.0001 CPU hours at 50 MB/s a core" in shown
    assert "dataset 4.0 MB (documents and packed rows), 2 checkpoints of 63.9 MB, model 27.7 MB" in shown
    assert plan.main([*given, "--corpus-bytes", "3TB"]) == 0
    assert "3.0 TB of text, about 857.1 billion tokens: 17 CPU hours" in capsys.readouterr().out
    assert plan.main([*given, "--corpus-bytes", "lots"]) == 2
    assert "'lots' is no size" in capsys.readouterr().err
    assert plan.main([*given, "--gpu-memory", "0.2"]) == 1
    assert "it does not fit: 0.4 GB of 0" in capsys.readouterr().out


def test_what_a_run_leaves_in_its_storage() -> None:
    config = load_config("moonlight-16b-a3b")
    # fp32 parameters and momentum, and a second moment for embedding, head and norms
    assert checkpoint_bytes(config) == pytest.approx((2 * 15.96 + 0.671) * 4e9, rel=2e-3)
    assert model_bytes(config) == pytest.approx(31.9e9, rel=2e-3)
    # the demo: 24.4 MB of text became 7,042,352 tokens, and 14.4 MB of documents and packed rows
    demo = preparing(load_config("debug"), 24_446_324)
    assert demo.tokens == pytest.approx(7_042_352, rel=0.02)
    assert demo.dataset_bytes == pytest.approx(8_079_370 + 6_347_827, rel=0.05)
    with_adamw = load_config("moonlight-16b-a3b", ["optimizer.name=adamw"])
    assert checkpoint_bytes(with_adamw) == 12 * 15_960_108_544


LONG_ROWS = [
    "data.sequence_length=131072", "training.sequence_length=131072", "model.max_position_embeddings=131072",
    "evaluation.sequence_length=8192", "parallelism.shard=64", "parallelism.replicate=4", "training.gather_once=false",
    "training.activation_checkpointing=full",
]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["training.micro_batch=4"], "Lower training.micro_batch (now 4)."),
        (
            ["parallelism.shard=64", "parallelism.replicate=4", "--gpu-memory", "24"],
            "Set training.activation_checkpointing to full.",
        ),
        ([*LONG_ROWS, "--gpu-memory", "24"], "Set training.offload_activations."),
        (
            [*LONG_ROWS, "training.offload_activations=true", "--gpu-memory", "24"],
            "Lower training.sequence_length (now 131072).",
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
