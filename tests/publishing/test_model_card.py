"""The model card: valid for the Hub's own parser, its figures those of the manifests, nothing that changes from run to run."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import pytest
from huggingface_hub import ModelCard, ModelCardData

from pipeline.config.load import validate
from pipeline.config.schema import ParallelismConfig
from pipeline.evaluation.baselines import SHOWN
from pipeline.model.shapes import ParameterCount
from pipeline.publishing.model_card import Sample, model_card, table
from pipeline.publishing.plots import INK, loss_plot, same_settings
from pipeline.publishing.version import published_config, version_name
from pipeline.training.branch import Origin
from tests.publishing.conftest import PROMPTS, PublishedRun


@pytest.fixture(scope="module")
def card(run: PublishedRun) -> str:
    return (run.folder / "README.md").read_text()


def test_the_hub_reads_the_header(card: str, run: PublishedRun):
    parsed = ModelCard(card)
    assert isinstance(parsed.data, ModelCardData)
    assert (parsed.data.library_name, parsed.data.pipeline_tag) == ("transformers", "text-generation")
    results = {result.metric_type: result.metric_value for result in parsed.data.eval_results}
    overall = run.evaluation.overall
    assert results == {"cross_entropy": overall.loss, "bits_per_byte": overall.bits_per_byte}


def test_the_table_has_each_source_beside_its_baselines(card: str, run: PublishedRun):
    scores = {**run.evaluation.sources, "**all**": run.evaluation.overall}
    baselines = {**run.evaluation.source_baselines, "**all**": run.evaluation.baselines}
    table_text = card.split("## Held-out results")[1].split("## Load it")[0]
    rows = {
        cells[0]: [cell.strip("*") for cell in cells[1:]]
        for line in table_text.splitlines()
        if line.startswith("|") and (cells := [cell.strip() for cell in line.strip("|").split("|")])
    }
    assert rows["source"][4:] == list(SHOWN)
    assert list(rows)[2:] == [*(source.name for source in run.made.dataset.sources), "**all**"]
    for name, score in scores.items():
        error = "" if score.stderr is None else f"\u00a0±\u00a0{score.stderr:.3f}"
        figures = [
            f"{score.documents:,}",
            f"{score.tokens:,}",
            f"{score.loss:.3f}{error}",
            f"{score.bits_per_byte:.3f}",
        ]
        assert rows[name] == figures + [f"{baselines[name][other]:.3f}" for other in SHOWN]


def test_it_says_where_everything_comes_from(card: str, run: PublishedRun):
    made = run.made
    for digest in (
        made.checkpoint.digest, made.checkpoint.content_sha256, made.dataset.digest, run.evaluation.digest,
        made.dataset.tokenizer.sha256, made.checkpoint.run_identity,
    ):  # fmt: skip
        assert digest in card
    assert "| code | 75.0% |" in card  # drawn, 3 rows of 4
    assert "![Training and held-out loss over tokens seen](loss.png)" in card
    assert all(prompt in card for prompt in PROMPTS)


def test_nothing_in_it_is_of_one_machine_or_moment(card: str, run: PublishedRun):
    assert str(run.made.storage.root) not in card
    assert not re.search(r"20\d\d-\d\d|\d\d:\d\d|second", card)


def test_products_in_fp8_are_told_of(card: str, run: PublishedRun):
    made = run.made
    training = made.config.training.model_copy(update={"expert_products": "fp8"})
    config = made.config.model_copy(update={"training": training})
    text = model_card(config, made.dataset, made.train, made.checkpoint, run.evaluation, ParameterCount(2, 1), [])
    assert "| products of routed experts | fp8 (e4m3) |" in text
    assert "products of routed experts" not in card


def test_fences_survive_text_with_fences(run: PublishedRun):
    made = run.made
    text = "a ```` b"
    card = model_card(
        made.config, made.dataset, made.train, made.checkpoint, run.evaluation, ParameterCount(2, 1),
        [Sample("`p`\nq", text, "c", 0.8, 0)],
    )  # fmt: skip
    assert f"`````text\n`p`\nq{text}\n`````" in card
    assert "continuation of `'p'`" in card


def test_what_may_change_between_starts_is_the_records_not_the_files(run: PublishedRun):
    """Another mesh in today's configuration, a run that went on after the checkpoint: the card tells of the checkpoint."""
    made = run.made
    later = made.checkpoint.model_copy(update={"step": 90, "tokens_seen": 99_000_000, "skipped_steps": 7})
    train = made.train.model_copy(update={"checkpoint": later, "steps": 90, "skipped_steps": 7})
    config = made.config.model_copy(update={"parallelism": ParallelismConfig(replicate=4, shard=8, ep=4)})
    text = model_card(config, made.dataset, train, made.checkpoint, run.evaluation, ParameterCount(2, 1), [])
    assert "| mesh, at the checkpoint | 1 rank: replicate 1, shard 2, experts over 2 |" in text
    assert "| steps, skipped as non-finite | 50 of 90, 1 |" in text
    assert "Trained from scratch on 12.5k tokens (50 steps)" in text
    assert "99M" not in text


def test_settings_that_may_change_at_any_start_make_no_other_version(run: PublishedRun):
    made = run.made
    values = made.config.model_dump(mode="json")
    values["parallelism"] = {"replicate": 1, "shard": 2, "ep": 2}
    values["training"] |= {"micro_batch": 2, "log_every": 3, "activation_checkpointing": "full", "compile": True}
    values["training"] |= {
        "interleave": True,
        "expert_capacity": 1.5,
        "expert_splits": "equal",
        "gather_once": True,
        "offload_activations": True,
    }
    values["training"] |= {"profile": {"steps": [1, 2]}}
    values["optimizer"]["muon"] |= {"bucket_bytes": 1 << 20, "products": "fp32", "hsdp_split": "off"}
    values["tracking"] |= {"trackers": ["tensorboard"], "project": "elsewhere"}
    values["checkpoint"] |= {"every_steps": 7}
    values["data"] |= {"cache_bytes": 12345}
    values["evaluation"] |= {"batch": 1}
    other = validate(values)
    facts = (made.checkpoint, run.evaluation, made.dataset)
    assert version_name(other, *facts) == version_name(made.config, *facts) == run.manifest.version
    values["parallelism"] |= {"replicate": 2}  # somebody to compute again what others did
    values["training"] |= {"micro_batch": 1, "interleave": False, "recompute_every": 9}
    assert version_name(validate(values), *facts) == run.manifest.version
    assert (
        "expert_products" not in published_config(made.config)["training"]
    )  # as in configurations older than the setting
    for section, decides in (("publishing", {"dtype": "bf16"}), ("training", {"expert_products": "fp8"})):
        assert version_name(validate({**values, section: values[section] | decides}), *facts) != run.manifest.version


def test_the_share_of_a_source_is_what_was_drawn(run: PublishedRun):
    """With stages of the mixture the weights of the sources decide nothing."""
    made = run.made
    mixture = [{"until_tokens": 6400, "weights": {"code": 1.0}}, {"until_tokens": 12800, "weights": {"prose": 1.0}}]
    values = made.config.model_dump(mode="json")
    values["corpus"]["mixture"] = mixture
    text = model_card(
        validate(values), made.dataset, made.train, made.checkpoint, run.evaluation, ParameterCount(2, 1), []
    )
    assert "| code | 50.0% |" in text
    assert "| prose | 50.0% |" in text


def test_a_branch_tells_of_the_rows_that_it_drew_itself(run: PublishedRun):
    """Those before were the parent's, of whatever mixture that had."""
    made = run.made
    origin = Origin(
        run_id="base", step=25, checkpoint_digest="d", content_sha256="c", next_sequence=100, tokens_seen=6000
    )
    values = made.config.model_dump(mode="json")
    mixture = [{"until_tokens": 6400, "weights": {"code": 1.0}}, {"until_tokens": 12800, "weights": {"prose": 1.0}}]
    values["corpus"]["mixture"], values["training"]["start_from"] = mixture, "base@25"
    values["training"]["spikes"] = {"action": "skip"}
    facts = (made.dataset, made.train, made.checkpoint, run.evaluation, ParameterCount(2, 1), [], origin)
    text = model_card(validate(values), *facts)
    assert "| prose | 100.0% |" in text
    assert "Share is that of the rows trained on since it went on from `base`." in text
    assert "| steps, skipped as non-finite or spikes | 50 of 50, 1 |" in text
    values["training"]["start_position"] = "zero"
    assert "| prose | 50.0% |" in model_card(validate(values), *facts)


def test_table():
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| :-- | --: |\n| x | 1 |"


def test_plot_is_a_png_that_depends_on_the_numbers_alone():
    curve = [(1000 * step, 8.0 / step**0.3) for step in range(1, 50)]
    first = loss_plot(curve, (49_000, 2.6), 6.3, "tiny, step 49")
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"matplotlib" not in first.lower()
    import matplotlib

    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30}):  # a user's own settings
        assert loss_plot(curve, (49_000, 2.6), 6.3, "tiny, step 49") == first
    assert loss_plot(curve, (49_000, 2.7), 6.3, "tiny, step 49") != first
    assert loss_plot([], (49_000, 2.7), 6.3, "no training curve")[:4] == b"\x89PNG"


def test_pictures_of_two_threads_do_not_change_each_others_settings():
    began = threading.Event()

    def second() -> object:
        with same_settings():
            began.set()
            return matplotlib.rcParams["text.color"]

    before = dict(matplotlib.rcParams)
    with ThreadPoolExecutor() as threads:
        with same_settings():
            other = threads.submit(second)
            together = began.wait(0.5)
        assert other.result() == INK
    assert not together  # else the first to end takes the settings from the other
    assert dict(matplotlib.rcParams) == before
