"""The schema of a run: one YAML file, one `RunConfig`.

Strict on purpose: an unknown key, a string where a number belongs or a mesh that cannot exist is refused here, in one
line that names the key, before any process starts. Fields are named as the field names them (the network's as in
Hugging Face's `DeepseekV3Config`). Units are in the field's comment: tokens, sequences, bytes, seconds.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.config import conditions
from pipeline.config.values import (
    Bytes,
    Count,
    Endpoint,
    Fraction,
    Location,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)


class Section(BaseModel):
    """A group of settings. Strict (no coercion of "3" to 3), closed (no unknown keys), finite and immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StorageConfig(Section):
    """Where every byte goes: a folder or `s3://bucket/prefix`."""

    root: Location = "runs"
    endpoint_url: Endpoint | None = None  # an S3-compatible server; None means AWS
    region: str | None = None

    @property
    def is_s3(self) -> bool:
        return self.root.startswith("s3://")


DEFAULT_EOS = "[EOS]"
DEFAULT_SPECIAL_TOKENS = ("[BOS]", DEFAULT_EOS, "[PAD]", "[UNK]")


class TokenizerConfig(Section):
    """Train a byte-level BPE with Moonlight's split pattern, or load one (`tokenizer.json` or Moonshot's `tiktoken.model`)."""

    path: Location | None = None  # folder or file to load; None trains one on the corpus
    vocab_size: Annotated[int, Field(gt=0, le=10_000_000)] = 8192  # of a trained one; includes the special tokens
    training_bytes: Bytes = 40_000_000  # text sampled from the corpus, spread over `sources`
    sources: dict[
        str, PositiveFloat
    ] = {}  # share of each source in that text; empty: all sources of the corpus, equally
    special_tokens: tuple[str, ...] | None = None  # None: [BOS] [EOS] [PAD] [UNK] if trained, any if loaded
    eos_token: str | None = None  # closes a document; None: [EOS] if trained, the tokenizer's own if loaded

    @property
    def trained_special_tokens(self) -> tuple[str, ...]:
        return DEFAULT_SPECIAL_TOKENS if self.special_tokens is None else self.special_tokens

    @model_validator(mode="after")
    def _eos_is_special(self) -> TokenizerConfig:
        known = self.trained_special_tokens if self.path is None else self.special_tokens
        eos = self.eos_token or (DEFAULT_EOS if self.path is None else None)
        if eos is not None and known is not None and eos not in known:
            raise ValueError(f"eos_token {eos!r} is not among special_tokens {list(known)}")
        if self.path is None and self.vocab_size < 256 + len(self.trained_special_tokens):
            raise ValueError(
                f"vocab_size {self.vocab_size} is too small: 256 bytes + {len(self.trained_special_tokens)} special tokens"
            )
        return self


class FilterConfig(Section):
    """Language-independent document filters of one source; each rejection is counted by name."""

    min_characters: Annotated[int, Field(ge=0)] = 1
    max_characters: PositiveInt = 100_000_000
    max_repeated_line_fraction: Fraction = 1.0  # share of lines that are copies of an earlier line of the document
    min_alphanumeric_fraction: Fraction = 0.0  # share of characters that are letters or digits
    drop_exact_duplicates: bool = True  # by document hash, within the source
    where: tuple[str, ...] = ()  # conditions on fields that all must hold: score > 0.5, lang == "en"

    @field_validator("where")
    @classmethod
    def _are_conditions(cls, where: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(conditions.parse(text).name for text in where)


class SourceConfig(Section):
    """One named source of documents."""

    name: str
    path: Location  # folder, file or s3:// prefix; `{stdlib}` and `{site_packages}` stand for the running Python's folders
    # auto: by name, where a name says it; anything else (code, say, as text) only if it is named here
    format: Literal["auto", "json", "jsonl", "parquet", "arrow", "csv", "tsv", "text"] = "auto"
    include: tuple[str, ...] = ("**/*",)  # globs relative to path
    exclude: tuple[str, ...] = ()
    max_bytes: Bytes | None = None  # take files in hash order until this many bytes
    text_field: str = "text"  # a field or column, or the path of a nested one: meta.text
    id_field: str | None = None
    weight: PositiveFloat = 1.0  # share of training sequences, normalised over sources
    max_epochs: PositiveFloat = 1.0  # how often a sequence of this source may be seen
    filters: FilterConfig = FilterConfig()

    @field_validator("name")
    @classmethod
    def _name_is_a_path_segment(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name):
            raise ValueError(f"name {name!r} must be lower-case letters, digits, '.', '_' or '-'")
        return name


class MixtureStage(Section):
    """Source weights from the end of the previous stage until this position of training, in slots (see ScheduleConfig)."""

    until_tokens: PositiveInt
    weights: dict[str, NonNegativeFloat]


class CorpusConfig(Section):
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    mixture: tuple[MixtureStage, ...] = ()  # empty: `sources[].weight` throughout
    heldout_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01  # of documents, chosen by document hash
    heldout_max_documents: PositiveInt = 1000  # per source
    unit_bytes: Bytes = 2_000_000_000  # target size of a unit of work (2-5 minutes of one core)
    max_quarantined_fraction: Fraction = 0.5  # of a source's documents: more stop prepare, with the reasons
    max_document_bytes: Bytes = 32 * 1024 * 1024  # a larger record goes to quarantine
    drop_duplicates_across_sources: bool = False  # of equal documents that of the source named first stays
    keep_rejected: bool = False  # write what filters rejected, with the reason, to datasets/rejected/

    @model_validator(mode="after")
    def _names_agree(self) -> CorpusConfig:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"sources: names must differ, got {names}")
        previous = 0
        for stage in self.mixture:
            unknown = sorted(set(stage.weights) - set(names))
            if unknown:
                raise ValueError(f"mixture: no source is named {unknown[0]!r}; sources are {names}")
            if stage.until_tokens <= previous:
                raise ValueError("mixture: until_tokens must increase from stage to stage")
            if sum(stage.weights.values()) <= 0:
                raise ValueError("mixture: weights of a stage must not all be zero")
            previous = stage.until_tokens
        return self


class DataConfig(Section):
    """Layout of the packed shards and the constants of the closed-form order (hashed into every checkpoint)."""

    sequence_length: PositiveInt = 8192  # tokens of a packed row: the longest length training may use
    packing: Literal["best_fit", "concat", "pad"] = "best_fit"
    max_documents_per_row: Count | None = (
        None  # None: as many as fit; document masks do not mind (data_prep/packing.py)
    )
    max_padding: Fraction = 0.02  # share of the slots of a source's packed rows; more is refused
    rows_per_group: Count = 256  # rows of a Parquet row group = one shuffle block = one ranged read
    groups_per_file: Count = 256
    lanes: Count = 1024  # D: independent read streams; a multiple of every rank count expected
    window_blocks: Count = 4  # W: blocks shuffled together within a lane
    mixture_block: PositiveInt = 2048  # M: positions of a lane over which source counts are exact
    cache_bytes: Bytes = 1 << 30  # decoded blocks kept per rank
    zstd_level: Annotated[int, Field(ge=-7, le=22)] = 3


class ModelConfig(Section):
    """Moonlight's network (`DeepseekV3ForCausalLM`), field names as in its config.json."""

    vocab_size: Annotated[int, Field(gt=0, le=10_000_000)] = 163_840
    hidden_size: Count = 2048
    num_hidden_layers: Annotated[int, Field(gt=0, le=1000)] = 27
    num_attention_heads: Count = 16
    kv_lora_rank: Count = 512
    qk_nope_head_dim: Count = 128
    qk_rope_head_dim: Count = 64
    v_head_dim: Count = 128
    intermediate_size: Count = 11_264  # dense layers
    moe_intermediate_size: Count = 1408  # one expert
    n_routed_experts: Count = 64
    n_shared_experts: Count = 2
    num_experts_per_tok: Count = 6
    first_k_dense_replace: Annotated[int, Field(ge=0)] = 1
    routed_scaling_factor: PositiveFloat = 2.446
    norm_topk_prob: bool = True
    rms_norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 50_000.0
    max_position_embeddings: PositiveInt = 8192
    initializer_range: PositiveFloat = 0.02

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def shared_intermediate_size(self) -> int:
        """The shared experts are one fused MLP."""
        return self.n_shared_experts * self.moe_intermediate_size

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds n_routed_experts {self.n_routed_experts}"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace {self.first_k_dense_replace} exceeds num_hidden_layers {self.num_hidden_layers}"
            )
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, name) % 8:
                raise ValueError(
                    f"{name} {getattr(self, name)} must be a multiple of 8: the experts' grouped products take rows of whole 16 bytes"
                )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim {self.qk_rope_head_dim} must be even: rotary embedding turns pairs")
        return self


class MuonConfig(Section):
    momentum: Fraction = 0.95
    nesterov: bool = True
    newton_schulz: Literal["moonlight", "polar_express"] = "moonlight"  # coefficients
    newton_schulz_steps: Count = 5
    backend: Literal["plain", "gram"] = "plain"  # how the iteration is evaluated
    products: Literal["auto", "half", "fp32"] = "auto"  # half: 16-bit; auto: half where the device has kernels for them
    blocks: Literal["whole", "per_head"] = "whole"  # Moonlight orthogonalises whole matrices
    update_rms: PositiveFloat = 0.2  # the 0.2 of 0.2 * sqrt(max(rows, cols))
    wire_dtype: Literal["bf16", "fp32"] = "bf16"
    bucket_bytes: Bytes = 128 * 1024 * 1024  # cap of one exchange buffer
    # Replicas share the Newton-Schulz work. auto: of matrices that travel anyway, which never loses; on: of experts, too, as
    # far as twice the bytes go that a rank sends while replicas repeat the work
    hsdp_split: Literal["auto", "on", "off"] = "auto"

    @field_validator("hsdp_split", mode="before")
    @classmethod
    def _yaml_reads_on_as_true(cls, value: object) -> object:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class AdamWConfig(Section):
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: PositiveFloat = 1e-8


class OptimizerConfig(Section):
    """Muon for matrices, AdamW for the rest, with one learning rate and one weight decay (Moonlight's rule)."""

    name: Literal["muon", "adamw"] = "muon"  # adamw: every parameter, for comparisons
    weight_decay: NonNegativeFloat = 0.1
    gradient_clip: NonNegativeFloat = 1.0  # global norm; 0 means no clipping
    muon: MuonConfig = MuonConfig()
    adamw: AdamWConfig = AdamWConfig()
    qk_clip: PositiveFloat | None = None  # K2's threshold on attention logits (100); None: off


class LearningRateStage(Section):
    """From the end of the previous stage until position `until_tokens` the rate goes from `start` to `end`."""

    until_tokens: PositiveInt
    shape: Literal["constant", "linear", "cosine"]
    start: NonNegativeFloat
    end: NonNegativeFloat


class BatchStage(Section):
    until_tokens: PositiveInt
    sequences: PositiveInt  # global batch


class BiasRateStage(Section):
    until_tokens: PositiveInt
    rate: NonNegativeFloat  # u of the router's selection-bias update


class ScheduleConfig(Section):
    """Pure functions of the position, which counts slots: sequences so far times their length, padding included.

    `total_tokens` and every `until_tokens` are positions. The last one of each list must reach `total_tokens`.

    Here and in `corpus.mixture` a stage in YAML may say `until: 80%` (or `1/12`) instead of `until_tokens`: with another `total_tokens` the
    schedule then keeps its shape.
    """

    total_tokens: PositiveInt
    learning_rate: tuple[LearningRateStage, ...] = Field(min_length=1)
    global_batch: tuple[BatchStage, ...] = Field(min_length=1)
    bias_rate: tuple[BiasRateStage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _covers_the_run(self) -> ScheduleConfig:
        for name in ("learning_rate", "global_batch", "bias_rate"):
            ends = [stage.until_tokens for stage in getattr(self, name)]
            if any(later <= earlier for earlier, later in zip(ends, ends[1:])):
                raise ValueError(f"{name}: until_tokens must increase from stage to stage, got {ends}")
            if ends[-1] < self.total_tokens:
                raise ValueError(f"{name}: ends at {ends[-1]} tokens but total_tokens is {self.total_tokens}")
        return self


class ParallelismConfig(Section):
    """Meshes: dense parameters on (replicate, shard); experts on (replicate, efsdp, ep) with efsdp * ep = shard."""

    replicate: Count = 1
    shard: Count = 1
    ep: Count = 1

    @property
    def world_size(self) -> int:
        return self.replicate * self.shard

    @property
    def efsdp(self) -> int:
        return self.shard // self.ep

    @model_validator(mode="after")
    def _ep_divides_shard(self) -> ParallelismConfig:
        if self.shard % self.ep:
            raise ValueError(
                f"ep {self.ep} must divide shard {self.shard}: experts live on (efsdp, ep) with efsdp * ep = shard"
            )
        return self


class SpikeConfig(Section):
    """A finite loss or gradient norm far above the run's own (training/spikes.py)."""

    action: Literal["count", "skip"] = "count"  # skip: such a step changes nothing, like one that is not finite
    deviations: PositiveFloat = 10.0  # above the running mean, in running standard deviations
    horizon_steps: Annotated[int, Field(ge=10)] = 200  # of the running mean; as many steps are not judged at first
    stop_after: PositiveInt = 20  # spikes in a row end the run


class TrainingConfig(Section):
    sequence_length: PositiveInt = 8192  # tokens; divides data.sequence_length
    micro_batch: Count = 1  # sequences per rank and forward pass
    compute_dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False  # torch.compile per block
    reshard_after_forward: bool = True
    document_mask: bool = False  # attention stays inside a document of a packed row
    aux_loss_weight: NonNegativeFloat = 1e-4  # sequence-wise balance loss
    initial_weights: Location | None = (
        None  # a Hugging Face folder, promoted or promoted-or-fresh (training/initial.py)
    )
    skip_sequences: tuple[tuple[int, int], ...] = ()  # ranges [from, to) of global positions left out
    max_skipped_steps: PositiveInt = 10  # non-finite steps in a row before the run stops
    spikes: SpikeConfig = SpikeConfig()
    step_timeout_s: PositiveFloat = 1800.0  # heartbeat watchdog
    log_every: Count = 10  # steps


class CheckpointConfig(Section):
    every_steps: PositiveInt = 1000
    keep: Count = 3  # newest checkpoints kept; the last one of a run is never deleted
    keep_every: PositiveInt | None = None  # those of steps that are multiples of it are kept as well
    async_save: bool = True


class EvaluationConfig(Section):
    sequence_length: PositiveInt | None = None  # window of held-out text; None: training.sequence_length
    max_tokens_per_source: PositiveInt = 10_000_000
    batch: Count = 8  # windows per forward pass
    checkpoint: Literal["last"] | Annotated[int, Field(gt=0)] = "last"  # or a step
    tasks: tuple[str, ...] = ()  # of lm-eval, to be scored as well: names of tasks, groups or tags
    task_folder: Location | None = None  # folder or s3:// prefix with own tasks (lm-eval's YAML) and their data
    few_shot: Annotated[int, Field(ge=0)] | None = None  # examples before each question; None: what each task says
    task_limit: PositiveInt | None = None  # documents of each task; None: all

    @field_validator("tasks")
    @classmethod
    def _tasks_differ(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in tasks if tasks.count(name) > 1})
        if twice:
            raise ValueError(f"tasks: {twice[0]!r} is named twice")
        return tasks


# Of EvaluationConfig; without tasks they mean nothing.
TASK_SETTINGS = frozenset({"tasks", "task_folder", "few_shot", "task_limit"})


class PublishingConfig(Section):
    name: str = "moonlight"  # of the folder below models/
    max_loss: PositiveFloat | None = None  # gate on the held-out loss (nats per token)
    promote: bool = True  # move latest.json to the new version
    shard_bytes: Bytes = 5_000_000_000  # of one safetensors file
    dtype: Literal["fp32", "bf16"] = "bf16"
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: Count = 64

    @field_validator("name")
    @classmethod
    def _name_is_a_path_segment(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", name):
            raise ValueError(f"name {name!r} must be 1-96 letters, digits, '.', '_' or '-': it names a folder")
        return name


Cpus = Annotated[float, Field(gt=0.0, le=10_000.0)]


class ClusterConfig(Section):
    """What the stages ask of Ray."""

    use_gpu: bool = False
    cpus_per_worker: Cpus = 1.0
    grows: bool = False  # nodes come when they are asked for: what is not there yet is no mistake
    prepare_cpus: Cpus = 1.0  # per unit task
    prepare_memory_bytes: Bytes = 1_000_000_000  # per unit task; 2 GB where Parquet has pages of hundreds of MB
    max_failures: Annotated[int, Field(ge=-1)] = 3  # restarts of the training group


class RunConfig(Section):
    """One run. `run_id` names it: the same run_id and settings continue, never repeat, what is already done."""

    run_id: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    storage: StorageConfig = StorageConfig()
    tokenizer: TokenizerConfig
    corpus: CorpusConfig
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    parallelism: ParallelismConfig = ParallelismConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    publishing: PublishingConfig = PublishingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("run_id")
    @classmethod
    def _run_id_is_a_name(cls, run_id: str) -> str:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", run_id):
            raise ValueError(
                f"run_id {run_id!r} must be 1-40 lower-case letters, digits or '-', starting with a letter (it names Kubernetes objects)"
            )
        return run_id

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        problems = list(_disagreements(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _disagreements(run: RunConfig) -> list[str]:
    """What no section can see alone. Each message starts with the key to change."""
    found = []
    unknown = sorted(set(run.tokenizer.sources) - {source.name for source in run.corpus.sources})
    if unknown:
        found.append(f"tokenizer.sources: no source of the corpus is named {unknown[0]!r}")
    model, training, parallelism = run.model, run.training, run.parallelism
    if training.sequence_length > model.max_position_embeddings:
        found.append(
            f"training.sequence_length {training.sequence_length} exceeds model.max_position_embeddings {model.max_position_embeddings}"
        )
    if run.data.sequence_length % training.sequence_length:
        found.append(
            f"training.sequence_length {training.sequence_length} must divide data.sequence_length {run.data.sequence_length}: rows are cut into equal parts"
        )
    if run.evaluation.sequence_length and run.evaluation.sequence_length > model.max_position_embeddings:
        found.append(
            f"evaluation.sequence_length {run.evaluation.sequence_length} exceeds model.max_position_embeddings {model.max_position_embeddings}"
        )
    if model.n_routed_experts % parallelism.ep:
        found.append(f"parallelism.ep {parallelism.ep} must divide model.n_routed_experts {model.n_routed_experts}")
    if run.tokenizer.path is None and run.tokenizer.vocab_size != model.vocab_size:
        found.append(f"tokenizer.vocab_size {run.tokenizer.vocab_size} must equal model.vocab_size {model.vocab_size}")
    where, used = run.storage, [run.tokenizer.path, run.training.initial_weights, run.evaluation.task_folder]
    used += [where.root, *(source.path for source in run.corpus.sources)]
    if where.endpoint_url is not None and not any(place and place.startswith("s3://") for place in used):
        found.append(
            f"storage.endpoint_url {where.endpoint_url}: nothing here is on S3; leave it out, or set storage.root to s3://bucket/prefix"
        )
    per_step = parallelism.world_size * training.micro_batch
    for index, stage in enumerate(run.schedule.global_batch):
        if stage.sequences % per_step:
            found.append(
                f"schedule.global_batch[{index}].sequences {stage.sequences} must be a multiple of replicate * shard * micro_batch = {per_step}"
            )
    return found
