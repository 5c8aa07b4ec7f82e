"""README.md of a published model: what it is, how good, from what, and how to load it.

Everything in it follows from the manifests and those settings that the run's identity holds: what may differ from start to
start (the mesh) is that of the checkpoint's record, not of today's configuration. No date, duration, host or path appears, so the same
inputs give the same bytes and the card can be hashed like the weights beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.config.schema import RunConfig
from pipeline.evaluation.baselines import SHOWN
from pipeline.manifest import (
    CheckpointManifest,
    DatasetManifest,
    EvaluationManifest,
    SourceScore,
    TaskScore,
    TrainManifest,
)
from pipeline.model.shapes import ParameterCount
from pipeline.report import contamination
from pipeline.report.charts import compact
from pipeline.report.scores import scored_how, scored_sources, task_cells, task_head
from pipeline.training.branch import Origin
from pipeline.training.left_out import order_of


@dataclass(frozen=True)
class Sample:
    """Text that the model wrote after a prompt."""

    prompt: str
    greedy: str  # temperature 0
    sampled: str
    temperature: float
    seed: int


def model_card(
    config: RunConfig,
    dataset: DatasetManifest,
    train: TrainManifest,
    checkpoint: CheckpointManifest,
    evaluation: EvaluationManifest,
    parameters: ParameterCount,
    samples: list[Sample],
    origin: Origin | None = None,
) -> str:
    """The whole card as Markdown with a YAML header. `origin`: where the run branched off, if it did."""
    name, said = config.publishing.name, config.publishing.card
    parts = [
        _header(config, evaluation),
        f"# {name}",
        _summary(config, checkpoint, parameters, origin),
        *(["## Intended use", said.intended_use] if said.intended_use else []),
        *(["## Limits", said.limits] if said.limits else []),
        "![Training and held-out loss over tokens seen](loss.png)",
        "## Held-out results",
        _results(dataset, evaluation),
        *(["## Tasks", _tasks(evaluation)] if evaluation.tasks else []),
        "## Load it",
        _usage(config),
    ]
    if samples:
        parts += ["## What it writes", *(_sample(sample) for sample in samples)]
    parts += [
        "## Data",
        _data(config, dataset, checkpoint, origin),
        "## Training",
        _training(config, train, checkpoint),
        "## Provenance",
        _provenance(config, dataset, train, checkpoint, evaluation, origin),
    ]
    return "\n\n".join(parts) + "\n"


def table(head: list[str], rows: Iterable[list[str]], right: int = 1) -> str:
    """A Markdown table whose columns from index `right` on are right-aligned."""
    rule = [":--" if column < right else "--:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def _header(config: RunConfig, evaluation: EvaluationManifest) -> str:
    name, said = config.publishing.name, config.publishing.card
    metrics = [
        {"type": "cross_entropy", "name": "Held-out loss (nats per token)", "value": evaluation.overall.loss},
        {"type": "bits_per_byte", "name": "Held-out bits per byte", "value": evaluation.overall.bits_per_byte},
    ]
    result: dict[str, Any] = {
        "task": {"type": "text-generation"},
        "dataset": {"name": "held-out documents of the training corpus", "type": "heldout"},
        "metrics": metrics,
    }
    results = [result, *(_task_result(name, score) for name, score in evaluation.tasks.items() if score.group is None)]
    header = {
        **({"license": said.license} if said.license else {}),
        **({"language": list(said.languages)} if said.languages else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moonlight", "deepseek_v3", "mixture-of-experts", *(["muon"] if _is_muon(config) else [])],
        "model-index": [{"name": name, "results": results}],
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _summary(
    config: RunConfig, checkpoint: CheckpointManifest, parameters: ParameterCount, origin: Origin | None
) -> str:
    model = config.model
    if config.training.loss_on == "answers":
        kind = "It was fine-tuned on conversations, with the loss on answers; `chat_template` lays them out."
    else:
        kind = "It is a base model: it continues text and follows no instructions."
    return (
        f"A mixture-of-experts language model with the Moonlight architecture (`DeepseekV3ForCausalLM`): "
        f"**{compact(parameters.total)} parameters, {compact(parameters.active)} active** per token. "
        f"{model.num_hidden_layers} layers of width {model.hidden_size}, multi-head latent attention with "
        f"{model.num_attention_heads} heads, {model.n_routed_experts} routed experts of which "
        f"{model.num_experts_per_tok} see each token, and {model.n_shared_experts} shared. {_beginning(config, origin)} "
        f"{compact(checkpoint.tokens_seen)} tokens ({checkpoint.step:,} steps) with "
        f"{_optimizer_name(config)}. {kind}"
    )


def _beginning(config: RunConfig, origin: Origin | None) -> str:
    """What the weights were before, up to `on ... tokens`."""
    if origin is not None:
        place = f"run `{origin.run_id}` at step {origin.step:,} ({compact(origin.tokens_seen)} tokens)"
        counted = ", which are counted here," if config.training.start_position == "parent" else ""
        return f"Trained from the state of {place}{counted} on"
    weights = config.training.initial_weights
    if weights is not None:
        return f"Trained from the weights of `{weights.partition('@')[0].rstrip('/').rsplit('/', 1)[-1]}` on"
    return "Trained from scratch on"


def _results(dataset: DatasetManifest, evaluation: EvaluationManifest) -> str:
    compressors = [name for name in SHOWN if name in evaluation.baselines]
    head = ["source", "documents", "tokens", "loss", "**bits per byte**", *compressors]

    def row(name: str, score: SourceScore, baselines: dict[str, float]) -> list[str]:
        others = [f"{baselines[compressor]:.3f}" for compressor in compressors]
        figures = [f"{score.documents:,}", f"{score.tokens:,}", _with_error(score), f"**{score.bits_per_byte:.3f}**"]
        return [name, *figures, *others]

    names = [source.name for source in scored_sources(dataset, evaluation)]
    rows = [row(name, evaluation.sources[name], evaluation.source_baselines[name]) for name in names]
    rows.append(row("**all**", evaluation.overall, evaluation.baselines))
    below = evaluation.unigram_entropy - evaluation.overall.loss
    return (
        f"{table(head, rows)}\n\n"
        "Documents that were kept out of training, chosen by hash. Loss is in nats per token, ± its standard error over documents, over windows of "
        f"{evaluation.sequence_length:,} tokens; bits per byte compare across tokenizers. The columns on the right are bits per byte "
        "of the same text under compressors, which have seen nothing else, and under the frequencies of its own tokens "
        f"({evaluation.unigram_entropy:.3f} nats per token; the model is {abs(below):.3f} nats "
        f"{'below' if below >= 0 else 'ABOVE'} that)."
    )


def _with_error(score: SourceScore) -> str:
    return f"{score.loss:.3f}" if score.stderr is None else f"{score.loss:.3f}\u00a0±\u00a0{score.stderr:.3f}"


def _task_result(name: str, score: TaskScore) -> dict[str, Any]:
    metrics = [
        {"type": metric.name, "name": metric.label, "value": metric.value}
        for metric in score.metrics
        if metric.value is not None
    ]
    dataset = {"name": name, "type": name}
    return {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}


def _tasks(evaluation: EvaluationManifest) -> str:
    """The tasks and groups that no other group averages; the evaluation's record has all of them."""
    rows = [
        [name, *cells]
        for name, score in evaluation.tasks.items()
        if score.group is None
        for cells in task_cells(evaluation, score)
    ]
    return f"{table(['task', *task_head(evaluation)], rows, right=2)}\n\n{scored_how(evaluation)}"


def _usage(config: RunConfig) -> str:
    if config.training.loss_on == "answers":
        return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{"role": "user", "content": "What is the moon?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=64)[0, prompt["input_ids"].shape[1]:]
print(tokenizer.decode(answer))
```

No remote code is needed."""
    return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer(tokenizer.eos_token + "import os\\n", add_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```

No remote code is needed. In training every document followed an end-of-text token, so a prompt is best given one."""


def _sample(sample: Sample) -> str:
    ticks = "`" * max(3, 1 + max(_longest_run(text, "`") for text in (sample.prompt, sample.greedy, sample.sampled)))

    def block(text: str) -> str:
        return f"{ticks}text\n{sample.prompt}{text}\n{ticks}"

    return (
        f"The likeliest continuation of `{_inline(sample.prompt)}`:\n\n{block(sample.greedy)}\n\n"
        f"Drawn at temperature {sample.temperature:g} (seed {sample.seed}):\n\n{block(sample.sampled)}"
    )


def _data(
    config: RunConfig, dataset: DatasetManifest, checkpoint: CheckpointManifest, origin: Origin | None = None
) -> str:
    begun = 0 if origin is None or config.training.start_position == "zero" else origin.next_sequence
    since = f" since it went on from `{origin.run_id}`" if origin is not None and begun else ""
    shares = order_of(config, dataset, checkpoint.left_out).shares(checkpoint.next_sequence, begun)
    rows = [
        [
            source.name,
            f"{shares[source.name]:.1%}",
            f"{source.counts.docs_out:,}",
            compact(source.text_bytes),
            compact(source.tokens),
            f"{source.counts.heldout:,}",
        ]
        for source in dataset.sources
    ]
    head = ["source", "share", "documents", "text (bytes)", "tokens", "held out"]
    stages = [
        f"Until {compact(stage.until_tokens)} slots: "
        + ", ".join(f"{name} {weight:g}" for name, weight in stage.weights.items())
        for stage in config.corpus.mixture
    ]
    mixture = "\n\nMixture stages:\n\n" + "\n".join(f"- {stage}" for stage in stages) if stages else ""
    return (
        f"{table(head, rows)}\n\nShare is that of the rows trained on{since}. The tokenizer is a byte-level BPE with "
        f"{dataset.tokenizer.vocab_size:,} entries and Moonlight's split pattern.{mixture}{_contamination(dataset)}"
    )


def _contamination(dataset: DatasetManifest) -> str:
    """Which of the questions that the model is judged by were in its corpus."""
    found = dataset.contamination
    if found is None:
        return ""
    rows = table(contamination.HEAD, contamination.rows(found))
    return f"\n\n### Questions of tasks in the corpus\n\n{rows}\n\n{contamination.sentence(found)}"


def _training(config: RunConfig, train: TrainManifest, checkpoint: CheckpointManifest) -> str:
    schedule, training = config.schedule, config.training
    rates = "; ".join(
        f"{stage.shape} {stage.start:g} to {stage.end:g} until {compact(stage.until_tokens)}"
        for stage in schedule.learning_rate
    )
    batches = "; ".join(f"{stage.sequences:,} until {compact(stage.until_tokens)}" for stage in schedule.global_batch)
    biases = "; ".join(f"{stage.rate:g} until {compact(stage.until_tokens)}" for stage in schedule.bias_rate)
    mesh, ranks = checkpoint.mesh, f"{checkpoint.world_size} rank{'s' if checkpoint.world_size > 1 else ''}"
    if mesh:
        ranks += f": replicate {mesh['replicate']}, shard {mesh['shard']}, experts over {mesh['ep']}"
    mean = f"mean of the checkpoints of steps {', '.join(f'{step:,}' for step in checkpoint.average_of)}, in fp32"
    why = "non-finite" if training.spikes.action == "count" else "non-finite or spikes"
    rows = [
        *([["weights", mean]] if checkpoint.average_of else []),
        ["optimizer", _optimizer_name(config)],
        ["weight decay, gradient clipping", f"{config.optimizer.weight_decay:g}, {config.optimizer.gradient_clip:g}"],
        ["learning rate (by slots)", rates],
        ["sequence length", f"{training.sequence_length:,} tokens"],
        ["sequences per step (by slots)", batches],
        ["router bias rate (by slots)", biases],
        ["balance loss weight", f"{training.aux_loss_weight:g}"],
        ["attention", "within documents" if training.document_mask else "causal over packed rows"],
        ["mesh, at the checkpoint", ranks],
        *([["hardware", config.publishing.card.hardware]] if config.publishing.card.hardware else []),
        *([["products of routed experts", "fp8 (e4m3)"]] if training.expert_products == "fp8" else []),
        *([["loss", "on answers only"]] if training.loss_on == "answers" else []),
        [f"steps, skipped as {why}", f"{checkpoint.step:,} of {train.steps:,}, {checkpoint.skipped_steps:,}"],
        ["seed", str(config.seed)],
    ]
    note = (
        "Tokens, here and above, are labels trained on. Slots are the position of the run, by which schedules go: sequences times "
        "their length, padding included."
    )
    return f"{table(['setting', 'value'], rows, right=2)}\n\n{note}"


def _provenance(
    config: RunConfig,
    dataset: DatasetManifest,
    train: TrainManifest,
    checkpoint: CheckpointManifest,
    evaluation: EvaluationManifest,
    origin: Origin | None,
) -> str:
    rows = [
        ["run", checkpoint.run_id],
        ["run identity", f"`{checkpoint.run_identity}`"],
        ["training", f"`{train.identity}`"],
        ["checkpoint", f"step {checkpoint.step:,}, `{checkpoint.digest}`"],
        ["weights", f"`{checkpoint.content_sha256}`"],
        ["dataset", f"`{dataset.digest}`"],
        ["order of the data", f"`{checkpoint.order_digest}`"],
        ["tokenizer", f"`{dataset.tokenizer.sha256}`"],
        ["evaluation", f"`{evaluation.digest}`"],
    ]
    if origin is not None:
        rows.insert(1, ["started from", f"{origin.run_id}, step {origin.step:,}, `{origin.checkpoint_digest}`"])
    elif config.training.initial_weights is not None:
        rows.insert(1, ["started from", f"`{config.training.initial_weights}`"])
    return (
        f"{table(['made from', 'sha256'], rows, right=2)}\n\n"
        "`manifest.json` holds these digests, the whole configuration and the sha256 of every file in this folder; `provenance.json` "
        "says the same as an in-toto statement (SLSA provenance), `training_log.jsonl` what was logged up to this checkpoint."
    )


def _optimizer_name(config: RunConfig) -> str:
    return "Muon (matrices) and AdamW (the rest)" if _is_muon(config) else "AdamW"


def _is_muon(config: RunConfig) -> bool:
    return config.optimizer.name == "muon"


def _inline(text: str) -> str:
    return text.splitlines()[0].replace("`", "'") if text.strip() else "(nothing)"


def _longest_run(text: str, character: str) -> int:
    longest = run = 0
    for found in text:
        run = run + 1 if found == character else 0
        longest = max(longest, run)
    return longest
