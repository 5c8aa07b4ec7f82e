"""Presets, overrides and the one line that every mistake gets."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.load import ConfigError, dump_yaml, expand_path, load_config, preset_names, validate
from pipeline.config.values import parse_share
from pipeline.storage import open_storage


def refusal(*overrides: str, config: str = "debug") -> str:
    with pytest.raises(ConfigError) as error:
        load_config(config, list(overrides))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("preset", preset_names())
def test_presets_validate_and_round_trip(preset: str, tmp_path: Path) -> None:
    assert preset in preset_names()
    config = load_config(preset, [f"storage.root={tmp_path / 'runs'}"])
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    assert load_config(str(tmp_path / "run.yaml")) == config
    assert validate(config.model_dump(mode="json")) == config


NUMBER_LIKE = st.from_regex(r"[-+]?[0-9.]{0,3}[eE_:][-+]?[0-9]{1,3}", fullmatch=True)


@given(st.lists(st.text(max_size=6) | NUMBER_LIKE, min_size=20, max_size=20))
@settings(derandomize=True, max_examples=12, deadline=None)
def test_any_text_survives_a_round_trip(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    """Prompts and special tokens that look like numbers, dates or nothing stay text."""
    config = load_config("debug", ["storage.root=/somewhere"])
    publishing = config.publishing.model_copy(
        update={"sample_prompts": (*texts, "1e5", "2.5", "~", "2026-01-01", "\x85", "\ufeff")}
    )
    config = config.model_copy(update={"publishing": publishing})
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(str(path)) == config


@given(st.floats(1e-300, 1e300))
@settings(derandomize=True, max_examples=12, deadline=None)
def test_numbers_in_every_spelling(value: float) -> None:
    for text in (repr(value), f"{value:.17e}", f"+{value:.17E}"):
        assert load_config("debug", [f"optimizer.weight_decay={text}"]).optimizer.weight_decay == value


def test_overrides() -> None:
    config = load_config(
        "debug",
        [
            "schedule.learning_rate.0.end=1e-4",
            "schedule.learning_rate.1.start=.5E-3",
            "optimizer.adamw={eps: 1e-9}",
            "optimizer.gradient_clip=2",
            "corpus.sources.2.include=[a/*, '*.md']",
            "corpus.sources.1.max_bytes=null",
            "training.skip_sequences=[[3, 9]]",
            "evaluation.checkpoint=40",
            "publishing.max_loss=7",
            "publishing.sample_prompts=['1e5', \"2.5\", '']",
            'tokenizer.special_tokens=["[EOS]", "1e5", "2026-01-01"]',
            "storage.root=s3://bucket/a=b",
            "storage.endpoint_url=http://localhost:5000",
        ],
    )
    assert config.schedule.learning_rate[0].end == 1e-4
    assert config.schedule.learning_rate[1].start == 5e-4
    assert config.optimizer.adamw.eps == 1e-9
    assert (config.optimizer.gradient_clip, config.publishing.max_loss) == (2.0, 7.0)
    assert config.corpus.sources[2].include == ("a/*", "*.md")
    assert config.corpus.sources[1].max_bytes is None
    assert config.training.skip_sequences == ((3, 9),)
    assert config.evaluation.checkpoint == 40
    assert config.publishing.sample_prompts == ("1e5", "2.5", "")
    assert config.tokenizer.special_tokens == ("[EOS]", "1e5", "2026-01-01")
    assert config.storage.root == "s3://bucket/a=b"
    assert config.storage.endpoint_url == "http://localhost:5000"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hiden_size=3", "model.hiden_size: unknown key; did you mean 'hidden_size'?"),
        ("modle.hidden_size=3", "modle: unknown key; did you mean 'model'?"),
        ("corpus.sources.0.wieght=3", "corpus.sources.0.wieght: unknown key; did you mean 'weight'?"),
        ("optimizer.muon.zzz=3", "optimizer.muon.zzz: unknown key; allowed are momentum, nesterov, newton_schulz,"),
        ("model.hidden_size=wide", "model.hidden_size: input should be a valid integer, got 'wide'"),
        ("model.hidden_size='256'", "model.hidden_size: input should be a valid integer, got '256'"),
        ("model.hidden_size=2.5", "model.hidden_size: input should be a valid integer, got 2.5"),
        ("model.hidden_size=true", "model.hidden_size: input should be a valid integer, got True"),
        ("model.hidden_size=-1", "model.hidden_size: input should be greater than 0, got -1"),
        ("optimizer.weight_decay='0.1'", "optimizer.weight_decay: input should be a valid number, got '0.1'"),
        ("optimizer.weight_decay=.nan", "optimizer.weight_decay: input should be a finite number, got nan"),
        ("optimizer.weight_decay=.inf", "optimizer.weight_decay: input should be a finite number, got inf"),
        ("training.compile=1", "training.compile: input should be a valid boolean, got 1"),
        ("training.compute_dtype=fp16", "training.compute_dtype: input should be 'auto', 'fp32' or 'bf16', got 'fp16'"),
        ("run_id=5", "run_id: input should be a valid string, got 5"),
        ("run_id=Demo_1", "run_id: run_id 'Demo_1' must be 1-40 lower-case letters"),
        ("corpus.sources=[]", "corpus.sources: tuple should have at least 1 item"),
        ("corpus.sources.0.name=A/B", "corpus.sources.0.name: name 'A/B' must be lower-case"),
        ("corpus.sources.1.name=documentation", "corpus: sources: names must differ"),
        ("corpus.sources.7.weight=1", "corpus.sources.7.weight: '7' is not an index of a list of 3"),
        ("corpus.mixture=[{until_tokens: 5, weights: {web: 1.0}}]", "corpus: mixture: no source is named 'web'"),
        ("schedule=null", "schedule: input should be an object, got None"),
        ("seed.x=3", "seed: input should be a valid integer, got {'x': 3}"),
        ("model.hidden_size.x=3", "model.hidden_size.x: model.hidden_size is a value, not a section"),
        ("seed", "override 'seed': expected section.key=value"),
        ("=3", "override '=3': expected section.key=value"),
        ("evaluation.checkpoint=first", "evaluation.checkpoint: input should be 'last', got 'first'; evaluation.check"),
        ("storage.root=gs://bucket", "storage.root: 'gs://bucket' must be a folder or s3://bucket/prefix"),
        ("storage.root=s3://", "storage.root: 's3://' must be a folder or s3://bucket/prefix"),
        ("storage.root=''", "storage.root: '' must be a path or URI without blanks around it"),
        ("parallelism={shard: 4, ep: 3}", "parallelism: ep 3 must divide shard 4"),
        (
            "parallelism={shard: 16, ep: 16}",
            "parallelism.ep 16 must divide model.n_routed_experts 8",
        ),
        ("parallelism.replicate=3", "schedule.global_batch[0].sequences 16 must be a multiple of replicate * shard *"),
        ("training.sequence_length=1024", "training.sequence_length 1024 exceeds model.max_position_embeddings 512"),
        (
            "evaluation.sequence_length=1024",
            "evaluation.sequence_length 1024 exceeds model.max_position_embeddings 512",
        ),
        ("training.sequence_length=384", "training.sequence_length 384 must divide data.sequence_length 512"),
        ("model.num_experts_per_tok=9", "model: num_experts_per_tok 9 exceeds n_routed_experts 8"),
        ("model.qk_rope_head_dim=15", "model: qk_rope_head_dim 15 must be even"),
        ("tokenizer.vocab_size=5000", "tokenizer.vocab_size 5000 must equal model.vocab_size 4096"),
        ("tokenizer.vocab_size=200", "tokenizer: vocab_size 200 is too small: 256 bytes + 4 special tokens"),
        ("tokenizer.eos_token=<eos>", "tokenizer: eos_token '<eos>' is not among special_tokens"),
        (
            "schedule.bias_rate=[{until_tokens: 983039, rate: 0.0}]",
            "schedule: bias_rate: ends at 983039 tokens but total_tokens is 983040",
        ),
        ("schedule.learning_rate.1.until_tokens=7", "schedule: learning_rate: until_tokens must increase"),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(override: str, message: str) -> None:
    assert message in refusal(override)


def test_a_schedule_in_shares_keeps_its_shape() -> None:
    """`schedule.total_tokens` alone makes a longer run, of every preset; the published recipe is met to the token."""
    for preset in preset_names():
        short = load_config(preset)
        longer = load_config(preset, [f"schedule.total_tokens={7 * short.schedule.total_tokens}"])
        for name in ("learning_rate", "global_batch", "bias_rate"):
            for before, after in zip(getattr(short.schedule, name), getattr(longer.schedule, name), strict=True):
                assert abs(after.until_tokens - 7 * before.until_tokens) <= 4
                assert after.model_dump(exclude={"until_tokens"}) == before.model_dump(exclude={"until_tokens"})
        for before, after in zip(short.corpus.mixture, longer.corpus.mixture, strict=True):
            assert abs(after.until_tokens - 7 * before.until_tokens) <= 4
    recipe = load_config("moonlight-16b-a3b").schedule
    assert [stage.until_tokens for stage in recipe.learning_rate] == [
        33_554_432_000, 5_200_000_000_000, 5_203_355_443_200, 5_700_000_000_000,
    ]  # fmt: skip
    assert load_config("debug", ["schedule.total_tokens=2000000"]).schedule.bias_rate[0].until_tokens == 1_600_000


@given(st.integers(1, 10**15), st.integers(1, 10**6), st.integers(1, 10**6))
@settings(derandomize=True, max_examples=50, deadline=None)
def test_a_share_is_exact(total: int, part: int, whole: int) -> None:
    if part > whole:
        part, whole = whole, part
    exact = Fraction(part * total, whole)
    assert abs(parse_share(f"{part}/{whole}", total) - exact) <= (Fraction(1, 2) if exact > 1 else 1)
    assert parse_share("100%", total) == total


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GB", 2 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("64MiB", 64 << 20),
        ("500kB", 500_000),
        ("2_000b", 2000),
        ("1e9", 10**9),
        ("2_000_000", 2_000_000),
    ],
)
def test_sizes_as_people_write_them(text: str, expected: int) -> None:
    config = load_config("debug", [f"corpus.unit_bytes={text}"])
    assert config.corpus.unit_bytes == expected
    assert validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    "key",
    ["storage.root", "storage.endpoint_url", "corpus.sources.0.path", "tokenizer.path", "training.initial_weights"],
)
@pytest.mark.parametrize("scheme", ["s3", "https"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(key: str, scheme: str) -> None:
    message = refusal(f"{key}={scheme}://name:secret@host/x")
    assert message.startswith(f"{key}: must not hold credentials; give them as AWS_ACCESS_KEY_ID")
    assert "secret" not in message.replace("AWS_SECRET", "")


def test_all_mistakes_are_told_at_once_and_long_values_are_cut() -> None:
    line = refusal("seed=x", f"model=[{'1, ' * 500}]", "publishing.promote=2")
    assert "seed: input should be a valid integer, got 'x'; model: input should be an object, got [1, 1, " in line
    assert line.endswith("publishing.promote: input should be a valid boolean, got 2")
    assert len(line) < 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping of sections, got NoneType"),
        ("- a\n- b\n", "expected a mapping of sections, got list"),
        ("run_id: [", "not readable as YAML: while parsing"),
        ("run_id: a\nseed: 1\nseed: 2\n", "seed is given twice"),
        ("run_id: \xff\n".encode("latin-1"), "not readable as YAML"),
        ("run_id: a\n", "tokenizer: required, but not given; corpus: required, but not given; schedule: required"),
        ("2026-01-01: 5\n1: 2\n", "2026-01-01: unknown key"),
    ],
)
def test_bad_files(tmp_path: Path, text: Any, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refusal(config=str(path))


def test_no_such_config(tmp_path: Path) -> None:
    for name in ("debgu", str(tmp_path), str(tmp_path / "none.yaml")):
        assert refusal(config=name) == (
            f"--config {name}: no such preset or file; presets are {', '.join(preset_names())}"
        )


def test_a_configuration_on_s3(bucket: tuple[str, str]) -> None:
    """Stage jobs read the run's own copy; where S3 is comes from the overrides."""
    endpoint, name = bucket
    where = [f"storage.endpoint_url={endpoint}", "storage.region=us-east-1"]
    config = load_config("debug", [*where, f"storage.root=s3://{name}/root"])
    open_storage(config.storage).write("runs/debug/config.yaml", dump_yaml(config).encode())
    uri = f"s3://{name}/root/runs/debug/config.yaml"
    assert load_config(uri, where) == config
    assert load_config(uri, [*where, "seed=9"]).seed == 9
    missing = refusal(*where, config=f"s3://{name}/none.yaml")
    assert missing.startswith(f"--config s3://{name}/none.yaml: cannot be read (FileNotFoundError")


def test_expand_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert expand_path("{stdlib}/json/__init__.py") == json.__file__
    assert Path(expand_path("{site_packages}/yaml/__init__.py")).is_file()
    assert expand_path("texts") == str(tmp_path / "texts")
    assert expand_path("~/texts") == str(Path.home() / "texts")
    assert expand_path("s3://bucket/a b") == "s3://bucket/a b"
