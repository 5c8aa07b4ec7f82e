"""Held-out scores against a direct computation with transformers' network, and the cutting of documents into windows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.schema import ParallelismConfig
from pipeline.evaluation.heldout import by_document, evaluate, plan_batches, score, score_windows, windows
from pipeline.evaluation.result import commit, committed, identity, manifest_path
from pipeline.evaluation.texts import HeldoutText, read_heldout
from pipeline.manifest import EvaluationManifest
from pipeline.model.loss import TokenScores
from tests.distributed import run_distributed
from tests.evaluation.make import SEQUENCE, TEXTS, MadeRun, documents_of
from tests.model.oracle import oracle_of

EOS = 7


def ignore(_: object) -> None:
    pass


@given(st.lists(st.integers(8, 90), max_size=60), st.integers(1, 20))
@settings(max_examples=100, derandomize=True, deadline=None)
def test_every_token_and_the_end_are_predicted_exactly_once(document: list[int], length: int):
    cut = list(windows(np.array(document, dtype=np.int64), EOS, length))
    predicted = [token for window in cut for token in window[1:].tolist()]
    assert predicted == [*document, EOS]
    given_row = [EOS, *document]
    assert [window[0] for window in cut] == [given_row[start] for start in range(0, len(given_row), length)]
    assert all(2 <= len(window) <= length + 1 for window in cut)


class Bigrams(torch.nn.Module):
    """log p(next | current) from a fixed table: its score has a closed form, whatever the windows."""

    def __init__(self, size: int) -> None:
        super().__init__()
        table = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        self.table = torch.nn.Parameter(table.double())

    def forward(
        self, inputs_BS: torch.Tensor, labels_N: torch.Tensor, at_N: torch.Tensor, lengths: list[int]
    ) -> TokenScores:
        assert len(lengths) == len(inputs_BS)
        logits = self.table[inputs_BS].flatten(0, 1)[at_N]
        return TokenScores(logits.log_softmax(-1).gather(1, labels_N[:, None])[:, 0], logits.argmax(-1))


def bigram_nats(model: Bigrams, document: np.ndarray) -> float:
    row = [EOS, *document.tolist(), EOS]
    log_p = model.table.detach().log_softmax(-1)
    return -float(sum(log_p[a, b] for a, b in zip(row, row[1:])))


def texts() -> list[HeldoutText]:
    rng = np.random.default_rng(0)
    lengths = {"a": [40, 0, 3, 17, 33], "b": [16, 15, 14]}
    return [
        HeldoutText(name, [rng.integers(8, 50, n) for n in sizes], [1] * len(sizes)) for name, sizes in lengths.items()
    ]


@pytest.mark.parametrize("batch", [1, 4, 100])
@pytest.mark.parametrize("length", [1, 16, 1000])
def test_score_is_the_sum_over_documents(batch: int, length: int):
    model = Bigrams(50)
    seen = []
    nats = score(model, texts(), eos=EOS, length=length, batch=batch, report=seen.append)
    for found, text in zip(nats, texts(), strict=True):
        assert found.tolist() == pytest.approx([bigram_nats(model, doc) for doc in text.documents])
    total = sum(text.scored_tokens for text in texts())
    assert total == 40 + 0 + 3 + 17 + 33 + 5 + 16 + 15 + 14 + 3
    assert (seen[-1].done_tokens, seen[-1].total_tokens) == (total, total)
    assert sum(progress.new_tokens for progress in seen) == total
    assert seen[-1].loss == pytest.approx(sum(map(sum, nats)) / total)


def rank_scores() -> list[list[float]]:
    return [each.tolist() for each in score(Bigrams(50), texts(), eos=EOS, length=16, batch=2, report=ignore)]


def test_ranks_share_the_work_and_agree():
    alone = rank_scores()
    for found in run_distributed(rank_scores, 2):  # 7 batches: the last turn has one for rank 0 only
        assert found == alone


@pytest.mark.parametrize("parts", [1, 2, 3, 20])
def test_parts_that_know_nothing_of_each_other_give_the_same_digits(parts: int):
    batches = plan_batches(texts(), EOS, 16, 2)
    shares = [score_windows(Bigrams(50), batches, pad=EOS, part=(i, parts), report=ignore) for i in range(parts)]
    assert [each.tolist() for each in by_document(texts(), batches, np.sum(shares, axis=0))] == rank_scores()


def transformers_nats(run: MadeRun, source: str) -> float:
    """One sequence at a time, no batches, no padding: as a user of the published folder would compute it."""
    oracle = oracle_of(run.model).eval()
    eos, nats = run.dataset.tokenizer.eos_id, 0.0
    for document in documents_of(run, source):
        row = torch.tensor([eos, *document, eos])
        for start in range(0, len(row) - 1, SEQUENCE):
            window = row[start : start + SEQUENCE + 1]
            with torch.no_grad():
                logits = oracle(window[None, :-1]).logits[0]
            nats += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return nats


def test_evaluation_is_what_transformers_computes(made: MadeRun):
    result = evaluate(made.config, made.dataset, made.checkpoint, made.storage, report=ignore)
    nats_of = {source: transformers_nats(made, source) for source in TEXTS}
    for source, nats in nats_of.items():
        found = result.sources[source]
        tokens = sum(len(document) + 1 for document in documents_of(made, source))
        size = sum(len(text.encode()) for text in TEXTS[source])
        assert (found.documents, found.tokens, found.text_bytes) == (len(TEXTS[source]), tokens, size)
        assert found.loss == pytest.approx(nats / tokens, abs=1e-5)
        assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, abs=1e-5)
    assert result.overall.loss == pytest.approx(sum(nats_of.values()) / result.overall.tokens, abs=1e-5)
    assert result.overall.text_bytes == sum(score.text_bytes for score in result.sources.values())
    assert result.unigram_entropy < math.log(400)
    assert set(result.baselines) == {"xz -9", "bzip2 -9", "zlib -9", "token frequencies"}
    assert (result.checkpoint_digest, result.dataset_digest) == (made.checkpoint.digest, made.dataset.digest)
    assert result.step == 50


def ranks_evaluate(made: MadeRun) -> EvaluationManifest:
    return evaluate(made.config, made.dataset, made.checkpoint, made.storage, report=ignore)


@pytest.mark.parametrize(
    "parallelism",
    [{"shard": 2, "ep": 2}, pytest.param({"replicate": 2, "shard": 2, "ep": 1}, marks=pytest.mark.long)],
)
def test_ranks_of_a_sharded_model_get_the_same_scores(made: MadeRun, parallelism: dict[str, int]):
    alone = evaluate(made.config, made.dataset, made.checkpoint, made.storage, report=ignore)
    made.storage.delete(manifest_path(made.config, made.checkpoint))
    training = made.config.training.model_copy(update={"expert_capacity": 1.0, "expert_products": "fp8"})
    mesh = ParallelismConfig.model_validate(parallelism)
    config = made.config.model_copy(update={"parallelism": mesh, "training": training})
    found = run_distributed(ranks_evaluate, config.parallelism.world_size, replace(made, config=config, model=None))
    assert found[1:] == found[:-1]
    assert found[0].overall.loss == pytest.approx(alone.overall.loss, abs=2e-6)
    assert {name: score.loss for name, score in found[0].sources.items()} == pytest.approx(
        {name: score.loss for name, score in alone.sources.items()}, abs=2e-6
    )
    assert found[0].identity == alone.identity


def test_evaluating_again_changes_nothing_and_loads_nothing(made: MadeRun):
    first = evaluate(made.config, made.dataset, made.checkpoint, made.storage, report=ignore)
    path = manifest_path(made.config, made.checkpoint)
    assert EvaluationManifest.model_validate_json(made.storage.read(path)) == first
    again = evaluate(made.config, made.dataset, made.checkpoint, made.storage, report=pytest.fail)
    assert again == first


def test_of_two_evaluators_the_first_one_counts(made: MadeRun):
    """Other hardware may sum in another order; what was published after the first result stays what it says."""
    config, checkpoint, storage = made.config, made.checkpoint, made.storage
    first = evaluate(config, made.dataset, checkpoint, storage, report=lambda _: None)
    second = first.model_copy(update={"overall": first.overall.model_copy(update={"loss": first.overall.loss + 1e-6})})
    commit(config, checkpoint, second, storage)
    assert committed(config, made.dataset, checkpoint, storage) == first
    other = first.model_copy(update={"identity": "of other inputs"})
    commit(config, checkpoint, other, storage)
    assert committed(config, made.dataset, checkpoint, storage) is None
    storage.write(manifest_path(config, checkpoint), b"torn")
    commit(config, checkpoint, first, storage)
    assert committed(config, made.dataset, checkpoint, storage) == first


def test_identity_follows_what_decides_the_scores(made: MadeRun):
    def of(**evaluation: object) -> str:
        section = made.config.evaluation.model_copy(update=evaluation)
        return identity(made.config.model_copy(update={"evaluation": section}), made.dataset, made.checkpoint)

    assert of(sequence_length=SEQUENCE) == of(sequence_length=None)
    assert of(batch=1) == of(batch=2)
    assert len({of(), of(sequence_length=32), of(max_tokens_per_source=100)}) == 3


def test_documents_over_the_budget_are_passed_over(made: MadeRun):
    lengths = [len(document) + 1 for document in documents_of(made, "code")]
    budget = lengths[0] + lengths[2]
    assert lengths[1] > lengths[2]
    section = made.config.evaluation.model_copy(update={"max_tokens_per_source": budget})
    config = made.config.model_copy(update={"evaluation": section})
    text = read_heldout(made.dataset.sources[0], made.dataset, config, made.storage)
    assert [len(document) + 1 for document in text.documents] == [lengths[0], lengths[2]]
    section = section.model_copy(update={"max_tokens_per_source": min(lengths) - 1})
    text = read_heldout(
        made.dataset.sources[0], made.dataset, config.model_copy(update={"evaluation": section}), made.storage
    )
    assert [len(document) + 1 for document in text.documents] == [min(lengths)]  # none fits: the shortest


def test_a_dataset_without_held_out_text_is_an_error(made: MadeRun):
    sources = tuple(source.model_copy(update={"heldout": ()}) for source in made.dataset.sources)
    empty = made.dataset.model_copy(update={"sources": sources})
    with pytest.raises(ValueError, match=r"corpus.heldout_fraction 0.01: .* holds out no document"):
        evaluate(made.config, empty, made.checkpoint, made.storage, report=ignore)
