"""The same run on one process and on every mesh: same losses, same norms on all ranks, same router biases."""

import pytest

from pipeline.manifest import DatasetManifest
from pipeline.storage import Storage
from pipeline.training.metrics import StepRecord
from pipeline.training.trainer import Run
from tests.distributed import run_distributed
from tests.training.make import BATCH, SEQUENCE, tiny, tiny_dataset

STEPS = 20
TOLERANCE = 1e-5
Outcome = tuple[list[StepRecord], dict[str, list[float]]]


def gentle(steps: int) -> dict:
    """A learning rate like Moonlight's. Newton-Schulz runs in bf16: a gradient that differs by 1e-7 may round the other way
    there, which at twenty times this rate shows as 1e-4 in the loss."""
    tokens = steps * BATCH * SEQUENCE
    return {"schedule__learning_rate": [{"until_tokens": tokens, "shape": "linear", "start": 5e-4, "end": 5e-5}]}


def trained(root: str, dataset: DatasetManifest, overrides: dict) -> Outcome:
    config = tiny(root, steps=STEPS, **gentle(STEPS), **overrides)
    run = Run(config, dataset, Storage(config.storage))
    records = [run.advance(False).fetch() for _ in range(STEPS)]
    biases = {name: router.e_score_correction_bias.tolist() for name, router in run.model.routers()}
    run.close()
    return records, biases


def all_trained(root: str, dataset: DatasetManifest, cases: list[dict]) -> list[Outcome]:
    return [trained(root, dataset, case) for case in cases]


MECHANICS = {"parallelism", "training__micro_batch", "training__activation_checkpointing"}


def compare(root: str, world: int, cases: list[dict]) -> None:
    """`cases` on `world` ranks against the plain run of this process: whole batches, no checkpointing, no mesh."""
    dataset = tiny_dataset(Storage(tiny(root).storage))
    plain: dict[str, Outcome] = {}
    by_rank = run_distributed(all_trained, world, root, dataset, cases, timeout=280)
    for index, case in enumerate(cases):
        reference = {key: value for key, value in case.items() if key not in MECHANICS}
        if str(reference) not in plain:
            plain[str(reference)] = trained(root, dataset, {**reference, "training__micro_batch": 8})
        records, biases = plain[str(reference)]
        for other, other_biases in (outcomes[index] for outcomes in by_rank):
            assert [r.loss for r in other] == pytest.approx([r.loss for r in records], abs=TOLERANCE), case
            assert [r.gradient_norm for r in other] == pytest.approx([r.gradient_norm for r in records], rel=1e-4), case
            assert [r.load_imbalance for r in other] == [r.load_imbalance for r in records], case
            assert other_biases == biases, case
            assert other == by_rank[0][index][0], case  # every rank sees the same bits
        assert records[-1].loss < records[0].loss - 0.03
        assert any(imbalance > 1 for record in records for imbalance in record.load_imbalance)


FULL, SELECTIVE = ({"training__activation_checkpointing": kind} for kind in ("full", "selective"))
ACCUMULATE = {"training__micro_batch": 1}
EP2 = {"parallelism": {"shard": 2, "ep": 2}}
EP2_EFSDP2 = {"parallelism": {"shard": 4, "ep": 2}}
HSDP = {"parallelism": {"replicate": 2, "shard": 2, "ep": 2}}


def test_two_ranks(tmp_path):
    options = {"training__document_mask": True, "optimizer": {"qk_clip": 0.02}}
    compare(
        str(tmp_path),
        2,
        [
            {"parallelism": {"shard": 2}},
            {"parallelism": {"replicate": 2}, **ACCUMULATE},
            {**EP2, **ACCUMULATE, **FULL},
            {**EP2, **options},
        ],
    )


def test_four_ranks(tmp_path):
    compare(str(tmp_path), 4, [{**EP2_EFSDP2, **SELECTIVE}, {**HSDP, **ACCUMULATE}, {**EP2_EFSDP2, "experts": 2}])


@pytest.mark.long
@pytest.mark.parametrize(
    "mesh", [EP2_EFSDP2, HSDP, {"parallelism": {"shard": 4}}, {"parallelism": {"shard": 4, "ep": 4}}]
)
def test_four_ranks_every_way(tmp_path, mesh):
    compare(
        str(tmp_path), 4, [{**mesh, **save, **micro} for save in ({}, FULL, SELECTIVE) for micro in ({}, ACCUMULATE)]
    )


def compiled(root: str, dataset: DatasetManifest, modes: list[str]) -> list[list[float]]:
    case = {"training__compile": True, "training__document_mask": True, "parallelism": {"shard": 2, "ep": 2}}
    return [
        [record.loss for record in trained(root, dataset, {**case, "training__activation_checkpointing": mode})[0]]
        for mode in modes
    ]


@pytest.mark.long
def test_compiled_blocks(tmp_path):
    dataset = tiny_dataset(Storage(tiny(str(tmp_path)).storage))
    expected = [record.loss for record in trained(str(tmp_path), dataset, {"training__document_mask": True})[0]]
    for losses in run_distributed(compiled, 2, str(tmp_path), dataset, ["none", "selective", "full"], timeout=280)[0]:
        assert losses == pytest.approx(expected, abs=TOLERANCE)


def reduced(root: str, dataset: DatasetManifest) -> list[float]:
    case = {"training__compute_dtype": "bf16", "parallelism": {"shard": 2, "ep": 2}}
    return [record.loss for record in trained(root, dataset, case)[0]]


def test_mixed_precision_stays_near(tmp_path):
    """bf16 weights and activations over fp32 masters: 8 bits of mantissa, hence losses within 1e-2."""
    dataset = tiny_dataset(Storage(tiny(str(tmp_path)).storage))
    expected = [record.loss for record in trained(str(tmp_path), dataset, {})[0]]
    losses = run_distributed(reduced, 2, str(tmp_path), dataset)[0]
    assert losses == pytest.approx(expected, abs=1e-2)
    assert losses != expected
