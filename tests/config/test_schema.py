"""The presets against the published values, typed in here from the paper and the model's config.json."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipeline.config.load import load_config
from pipeline.config.schema import ModelConfig, ParallelismConfig, RunConfig, ScheduleConfig

TOKENS_8K = 8192


@pytest.fixture(scope="module")
def published() -> RunConfig:
    return load_config("moonlight-16b-a3b")


def test_network_is_the_published_one(published: RunConfig) -> None:
    """config.json of moonshotai/Moonlight-16B-A3B; the schema's defaults are the same network."""
    assert published.model.model_dump() == {
        "vocab_size": 163840,
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.446,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
    }
    assert published.model == ModelConfig()
    assert (published.model.qk_head_dim, published.model.shared_intermediate_size) == (192, 2816)


def test_parameters_add_up_to_the_paper(published: RunConfig) -> None:
    """15.29 B in all and 2.24 B active, without embedding and head."""
    m = published.model
    heads, rank = m.num_attention_heads, m.kv_lora_rank
    attention = (
        m.hidden_size * heads * m.qk_head_dim
        + m.hidden_size * (rank + m.qk_rope_head_dim)
        + rank
        + rank * heads * (m.qk_nope_head_dim + m.v_head_dim)
        + heads * m.v_head_dim * m.hidden_size
    )
    expert = 3 * m.hidden_size * m.moe_intermediate_size
    shared = 3 * m.hidden_size * m.shared_intermediate_size
    router = m.hidden_size * m.n_routed_experts
    dense = m.first_k_dense_replace * 3 * m.hidden_size * m.intermediate_size
    common = m.num_hidden_layers * (attention + 2 * m.hidden_size) + dense + m.hidden_size
    moe_layers = m.num_hidden_layers - m.first_k_dense_replace
    assert common + moe_layers * (m.n_routed_experts * expert + shared + router) == 15_289_019_904
    assert common + moe_layers * (m.num_experts_per_tok * expert + shared + router) == 2_243_685_888


def test_optimizer_is_the_published_one(published: RunConfig) -> None:
    optimizer = published.optimizer
    assert (optimizer.name, optimizer.weight_decay) == ("muon", 0.1)
    muon = optimizer.muon
    assert (muon.momentum, muon.nesterov, muon.newton_schulz, muon.newton_schulz_steps) == (0.95, True, "moonlight", 5)
    assert (muon.update_rms, muon.blocks, optimizer.qk_clip) == (0.2, "whole", None)
    assert (optimizer.adamw.beta1, optimizer.adamw.beta2, optimizer.adamw.eps) == (0.9, 0.95, 1e-8)
    assert published.training.aux_loss_weight == 1e-4


def test_schedule_is_the_published_one(published: RunConfig) -> None:
    """Three stages: 2,000 steps of warm-up, cosine to 5.2 T, 100 steps up and linear to zero at 5.7 T."""
    schedule = published.schedule
    small, large = 2048 * TOKENS_8K, 4096 * TOKENS_8K
    assert (small, large) == (16_777_216, 33_554_432)
    assert schedule.total_tokens == 5_700_000_000_000
    assert [tuple(stage.model_dump().values()) for stage in schedule.learning_rate] == [
        (2000 * small, "linear", 0.0, 4.2e-4),
        (5_200_000_000_000, "cosine", 4.2e-4, 4.2e-5),
        (5_200_000_000_000 + 100 * large, "linear", 4.2e-5, 1e-4),
        (5_700_000_000_000, "linear", 1e-4, 0.0),
    ]
    assert [(stage.until_tokens, stage.sequences) for stage in schedule.global_batch] == [
        (12_000 * small, 2048),
        (5_700_000_000_000, 4096),
    ]
    assert [(stage.until_tokens, stage.rate) for stage in schedule.bias_rate] == [
        (5_200_000_000_000, 1e-3),
        (5_700_000_000_000, 0.0),
    ]
    assert published.training.sequence_length == published.data.sequence_length == TOKENS_8K
    assert published.training.document_mask is False
    assert published.training.initial_weights is None


def test_published_tokens_and_meshes(published: RunConfig) -> None:
    assert published.tokenizer.vocab_size == 163_840
    assert published.tokenizer.eos_token == "[EOS]"
    assert published.parallelism.world_size == 256
    assert published.parallelism.efsdp == 1


@pytest.mark.parametrize("given", ["on", "off", "auto"])
def test_on_and_off_are_words_although_yaml_reads_truth_values(given: str) -> None:
    assert load_config("debug", [f"optimizer.muon.hsdp_split={given}"]).optimizer.muon.hsdp_split == given


def test_the_demo_fits_two_cores() -> None:
    debug = load_config("debug")
    assert (debug.parallelism.shard, debug.parallelism.ep, debug.parallelism.world_size) == (2, 2, 2)
    assert not debug.cluster.use_gpu
    assert debug.model.first_k_dense_replace == 1  # every kind of layer is there
    assert debug.model.num_hidden_layers > 1


@pytest.mark.parametrize(("replicate", "shard", "ep"), [(1, 6, 4), (2, 2, 4), (1, 1, 2)])
def test_meshes_that_cannot_exist(replicate: int, shard: int, ep: int) -> None:
    with pytest.raises(ValidationError, match=rf"ep {ep} must divide shard {shard}"):
        ParallelismConfig(replicate=replicate, shard=shard, ep=ep)


def test_sections_are_immutable_and_schedules_cover_the_run() -> None:
    debug = load_config("debug")
    with pytest.raises(ValidationError, match="frozen"):
        debug.model.hidden_size = 3  # type: ignore[misc]
    values = debug.schedule.model_dump()
    for name in ("learning_rate", "global_batch", "bias_rate"):
        short = [{**stage, "until_tokens": 1000 + index} for index, stage in enumerate(values[name])]
        with pytest.raises(ValidationError, match=f"{name}: ends at"):
            ScheduleConfig.model_validate({**values, name: tuple(short)})
