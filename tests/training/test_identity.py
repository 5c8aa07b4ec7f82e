"""Which changes of configuration make a different run."""

import pytest

from pipeline.training.identity import as_before, differences, identity_of
from tests.training.make import tiny

CHANGES = {
    "model__rope_theta": 10_000.0,
    "optimizer__weight_decay": 0.2,
    "training__document_mask": True,
    "training__aux_loss_weight": 0.5,
    "seed": 1,
}
SAME = {
    "parallelism": {"shard": 2, "ep": 2},
    "training__micro_batch": 1,
    "training__activation_checkpointing": "full",
    "training__log_every": 7,
    "checkpoint__every_steps": 3,
    "cluster": {"max_failures": 9},
    "optimizer__muon": {"bucket_bytes": 1024},
}


def of(root: str = "here", **overrides):
    return identity_of(tiny(root, **overrides), "dataset", {"lanes": 4, "sources": {"web": 100}})


@pytest.mark.parametrize("key", CHANGES)
def test_what_decides_the_losses(key):
    found = differences(of(**{key: CHANGES[key]}), of(), 0)
    assert len(found) == 1
    assert found[0].startswith(f"{key.replace('__', '.')} is {CHANGES[key]!r} here and ")


def test_the_dtype_of_momentum_decides_and_is_none_of_older_runs():
    assert "optimizer.muon.momentum_dtype" not in of()
    kept_short = of(optimizer={"muon": {"momentum_dtype": "bf16"}})
    assert differences(kept_short, of(), 0) == ["optimizer.muon.momentum_dtype is 'bf16' here and None there"]


def test_products_of_experts_in_fp8_decide_and_are_none_of_older_runs():
    assert "training.expert_products" not in of()
    narrow = of(training__expert_products="fp8")
    assert differences(narrow, of(), 0) == ["training.expert_products is 'fp8' here and None there"]
    assert differences(of(), narrow, 0) == ["training.expert_products is None here and 'fp8' there"]
    plain, other = (tiny("here", **made).training.model_dump() for made in ({}, {"training__expert_products": "fp8"}))
    assert "expert_products" not in as_before(plain)  # a version's name is made of all others
    assert as_before(other) == plain | {"expert_products": "fp8"}


def test_another_data_order_is_named():
    config = tiny("here")
    found = differences(identity_of(config, "other", {"lanes": 8, "sources": {"web": 120}}), of(), 0)
    assert found == [
        "dataset is 'other' here and 'dataset' there",
        "order.lanes is 8 here and 4 there",
        "order.sources.web is 120 here and 100 there",
    ]


@pytest.mark.parametrize("key", SAME)
def test_what_does_not(key):
    assert of("elsewhere", **{key: SAME[key]}) == of()


def test_ranges_left_out_later_do_not_matter_yet():
    plain, skipping = of(), of(training__skip_sequences=[[100, 120]])
    assert differences(skipping, plain, position=100) == []
    assert differences(skipping, plain, position=110) == [
        "training.skip_sequences is [[100, 110]] here and [] there",
    ]
    assert (
        differences(of(training__skip_sequences=[[10, 20], [100, 120]]), of(training__skip_sequences=[[10, 20]]), 50)
        == []
    )


def test_what_is_done_about_spikes_is_told_and_may_change():
    counting, skipping = (
        of(training__spikes={"stop_after": 3}),
        of(training__spikes={"action": "skip", "stop_after": 3}),
    )
    assert counting == of()
    assert skipping["training.spikes.action"] == "skip"
    assert differences(skipping, counting, position=100) == differences(counting, skipping, position=100) == []
