"""What a new user gets wrong: each ends in one line that names the key and what to do, exit code 2, and nothing is written.

All in one process through the pipeline's command line; Ray is never started. The line must hold every text of the table's second column.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import pipeline
from tests.jobs.conftest import LOOKING

pytestmark = pytest.mark.usefixtures("no_ray")
NINE = ", ".join(["*{0}"] * 9)
BOMB = (
    "[&a ["
    + "1, " * 9
    + "1]"
    + "".join(f", &{new} [{NINE.format(old)}]" for old, new in zip("abcdefgh", "bcdefghi"))
    + "]"
)

SETTINGS: list[tuple[str, tuple[str, ...]]] = [
    # keys
    ("training.mikro_batch=1", ("training.mikro_batch: unknown key", "did you mean 'micro_batch'")),
    ("trainning.micro_batch=1", ("trainning: unknown key", "did you mean 'training'")),
    ("total_tokens=5", ("total_tokens: unknown key", "allowed are")),
    ("schedule.totaltokens=5", ("schedule.totaltokens: unknown key", "total_tokens")),
    ("corpus.sources.0.textfield=body", ("corpus.sources.0.textfield: unknown key", "text_field")),
    ("corpus.sources.3.path=/x", ("corpus.sources.3.path", "not an index of a list of 1")),
    ("corpus.sources.first.path=/x", ("corpus.sources.first.path", "not an index")),
    ("corpus.sources.99999999999.path=/x", ("corpus.sources.99999999999.path", "not an index")),
    ("model.hidden_size.width=3", ("model.hidden_size.width", "is a value, not a section")),
    ("seed", ("override 'seed'", "expected section.key=value")),
    ("=3", ("override '=3'", "expected section.key=value")),
    # types
    ("training.micro_batch=two", ("training.micro_batch", "valid integer", "'two'")),
    ("training.micro_batch=2.5", ("training.micro_batch", "valid integer", "2.5")),
    ("training.micro_batch='2'", ("training.micro_batch", "valid integer", "'2'")),
    ("training.micro_batch=null", ("training.micro_batch", "valid integer", "None")),
    ("training.micro_batch=[2]", ("training.micro_batch", "valid integer", "[2]")),
    ("training.micro_batch={a: 2}", ("training.micro_batch", "valid integer")),
    ("training.micro_batch=true", ("training.micro_batch", "valid integer", "True")),
    ("training.compile=maybe", ("training.compile", "valid boolean", "'maybe'")),
    ("training.compile=1", ("training.compile", "valid boolean")),
    ("optimizer.weight_decay=.nan", ("optimizer.weight_decay", "finite number")),
    ("optimizer.weight_decay=.inf", ("optimizer.weight_decay", "finite number")),
    ("optimizer.weight_decay=small", ("optimizer.weight_decay", "valid number")),
    ("run_id=7", ("run_id", "valid string", "7")),
    ("run_id=null", ("run_id", "valid string")),
    ("model=debug", ("model", "should be an object", "'debug'")),
    ("schedule=[]", ("schedule", "should be an object")),
    ("corpus.sources.0=web", ("corpus.sources.0", "should be an object")),
    ("publishing.sample_prompts=Hello", ("publishing.sample_prompts", "valid array")),
    # numbers that mean nothing
    ("training.micro_batch=0", ("training.micro_batch", "greater than 0")),
    ("training.micro_batch=-1", ("training.micro_batch", "greater than 0")),
    ("training.micro_batch=1e30", ("training.micro_batch", "valid integer")),
    ("training.micro_batch=1000000000000", ("training.micro_batch", "less than or equal to 1000000")),
    ("training.micro_batch=" + "9" * 5000, ("training.micro_batch", "correct it")),
    ("schedule.total_tokens=1e19", ("schedule.total_tokens", "valid integer")),
    ("schedule.total_tokens=10000000000000000000", ("schedule.total_tokens", "less than or equal to")),
    ("schedule.total_tokens=0", ("schedule.total_tokens", "greater than 0")),
    ("schedule.total_tokens=-5", ("schedule.total_tokens", "greater than 0")),
    ("schedule.total_tokens=2M", ("schedule.total_tokens", "valid integer", "'2M'")),
    ("schedule.total_tokens=1", ("schedule.total_tokens 1", "less than one step", "raise it")),
    ("seed=-1", ("seed", "greater than or equal to 0")),
    ("seed=9223372036854775808", ("seed", "less than 9223372036854775808")),
    ("model.num_hidden_layers=1000000000", ("model.num_hidden_layers", "less than or equal to 1000")),
    ("model.n_routed_experts=10000000", ("model.n_routed_experts", "less than or equal to 1000000")),
    ("data.zstd_level=99", ("data.zstd_level", "less than or equal to 22")),
    ("corpus.heldout_fraction=1.5", ("corpus.heldout_fraction", "less than 1")),
    ("corpus.heldout_fraction=-0.1", ("corpus.heldout_fraction", "greater than or equal to 0")),
    ("corpus.max_quarantined_fraction=50", ("corpus.max_quarantined_fraction", "less than or equal to 1")),
    ("corpus.sources.0.rules.classifier={function: score, version: '1', min_score: 0}", ("rules.classifier.function", "should match pattern")),
    ("corpus.sources.0.rules.classifier={function: 'a:b', version: '1'}", ("rules.classifier", "scores would decide nothing")),
    ("corpus.sources.0.rules.classifier={function: 'a:b', version: '1', min_score: 2, max_score: 1}", ("rules.classifier", "nothing would be kept")),
    ("corpus.sources.0.rules.classifier={function: 'a.b:c', version: '1', min_score: 0}", ("rules.classifier.function: a.b:c cannot be loaded", "install its package")),
    ("corpus.duplicate_paragraphs={by: sentence}", ("corpus.duplicate_paragraphs.by", "'paragraph' or 'line'")),
    ("corpus.duplicate_paragraphs={min_characters: 0}", ("corpus.duplicate_paragraphs.min_characters", "greater than or equal to 1")),
    ("corpus.sources.0.languages=[en, de]", ("corpus.sources.0.languages", "give each language its share")),
    ("corpus.sources.0.languages={en: 0}", ("corpus.sources.0.languages", "a number over 0")),
    ("corpus.sources.0.weight=0", ("corpus.sources.0.weight", "greater than 0")),
    ("corpus.sources.0.max_epochs=-1", ("corpus.sources.0.max_epochs", "greater than 0")),
    ("optimizer.muon.momentum=95", ("optimizer.muon.momentum", "less than or equal to 1")),
    ("cluster.max_failures=-2", ("cluster.max_failures", "greater than or equal to -1")),
    ("checkpoint.keep=0", ("checkpoint.keep", "greater than 0")),
    ("checkpoint.every_steps=0", ("checkpoint.every_steps", "greater than 0")),
    ("publishing.max_loss=0", ("publishing.max_loss", "greater than 0")),
    # sizes
    ("corpus.unit_bytes=2 potatoes", ("corpus.unit_bytes", "is no size", "write bytes as a number, or 2GB")),
    ("corpus.unit_bytes=2G", ("corpus.unit_bytes", "is no size", "2GB")),
    ("corpus.unit_bytes=-2GB", ("corpus.unit_bytes", "is no size")),
    ("corpus.unit_bytes=0GB", ("corpus.unit_bytes", "greater than 0")),
    ("data.cache_bytes=5000000TB", ("data.cache_bytes", "less than or equal to")),
    # choices
    ("training.expert_splits=host", ("training.expert_splits", "'auto', 'device' or 'equal'", "'host'")),
    ("training.expert_splits=device", ("training.expert_splits device", "training.expert_capacity", "cluster.use_gpu", "auto")),
    ("training.compute_dtype=fp16", ("training.compute_dtype", "'auto', 'fp32' or 'bf16'", "'fp16'")),
    ("optimizer.name=sgd", ("optimizer.name", "'muon' or 'adamw'")),
    ("data.packing=best", ("data.packing", "'best_fit', 'concat', 'pad' or 'whole'")),
    ("corpus.sources.0.format=xml", ("corpus.sources.0.format", "'auto'", "'xml'")),
    ("publishing.dtype=fp8", ("publishing.dtype", "'fp32' or 'bf16'")),
    ("evaluation.checkpoint=first", ("evaluation.checkpoint", "'last'", "'first'")),
    ("training.activation_checkpointing=some", ("training.activation_checkpointing", "'none', 'selective' or 'full'")),
    # names
    ("run_id=Demo_1", ("run_id", "lower-case letters")),
    ("run_id=../other", ("run_id", "lower-case letters")),
    ("run_id=''", ("run_id", "1-40")),
    ("run_id=" + "a" * 41, ("run_id", "1-40")),
    ("publishing.name=../../evil", ("publishing.name", "letters, digits", "names a folder")),
    ("publishing.name=a/b", ("publishing.name", "names a folder")),
    ("publishing.name=''", ("publishing.name", "names a folder")),
    ("publishing.name='my model'", ("publishing.name", "letters, digits")),
    ("corpus.sources.0.name=Web Pages", ("corpus.sources.0.name", "lower-case letters")),
    ("corpus.sources.0.name=../x", ("corpus.sources.0.name", "lower-case letters")),
    # places
    ("storage.root=gs://bucket/x", ("storage.root", "must be a folder or s3://bucket/prefix")),
    ("storage.root=s3://", ("storage.root", "must be a folder or s3://bucket/prefix")),
    ("storage.root=s3:/bucket/x", ("storage.root", "one slash", "s3://bucket/prefix")),
    ("storage.root=file:/tmp/x", ("storage.root", "one slash")),
    ("storage.root=$HOME/runs", ("storage.root", "variable", "write the path out")),
    ("storage.root=${SCRATCH}/runs", ("storage.root", "variable")),
    ("storage.root=~nobody/runs", ("storage.root", "only ~/")),
    ("storage.root=''", ("storage.root", "must be a path or URI")),
    ("storage.root=' /tmp/x'", ("storage.root", "without blanks")),
    ("storage.root=/dev/null/root", ("storage.root: cannot write to /dev/null/root", "choose a writable folder")),
    ("storage.root=s3://key:secret@bucket/x", ("storage.root", "credentials", "AWS_ACCESS_KEY_ID")),
    ("storage.endpoint_url=localhost:9000", ("storage.endpoint_url", "http://server:port")),
    ("storage.endpoint_url=s3://bucket", ("storage.endpoint_url", "http://server:port")),
    ("storage.endpoint_url=http://localhost:9000", ("storage.endpoint_url", "nothing here is on S3", "leave it out")),
    ("corpus.sources.0.path=/no/such/folder", ("corpus.sources[0].path", "does not exist", "name a folder")),
    ("corpus.sources.0.path=$DATA", ("corpus.sources.0.path", "variable")),
    ("corpus.sources.0.path=s3:/bucket/x", ("corpus.sources.0.path", "one slash")),
    ("corpus.sources.0.path=https://example.org/a.txt", ("corpus.sources.0.path", "must be a folder or s3://bucket/prefix")),
    ("corpus.sources.0.include=['*.parquet']", ("corpus.sources[0].path", "include", "the corpus would be empty")),
    ("corpus.sources.0.exclude=['**']", ("corpus.sources[0].path", "exclude", "the corpus would be empty")),
    ("tokenizer.path=/no/such/tokenizer", ("tokenizer.path", "holds neither tokenizer.json nor")),
    ("tokenizer.path=DATA", ("tokenizer.path", "holds neither tokenizer.json nor")),
    ("tokenizer.path=DATA/broken.json", ("tokenizer.path",)),
    ("evaluation.task_folder=s3:/tasks", ("evaluation.task_folder", "one slash")),
    ("training.initial_weights=/no/such/weights", ("training.initial_weights", "no such folder")),
    ("training.initial_weights=models/gone", ("training.initial_weights", "nothing is at")),
    ("training.initial_weights=promoted", ("training.initial_weights promoted", "publish a model")),
    # the network
    ("model.hidden_size=252", ("model: hidden_size 252", "multiple of 8")),
    ("model.moe_intermediate_size=100", ("model: moe_intermediate_size 100", "multiple of 8")),
    ("model.qk_rope_head_dim=15", ("model: qk_rope_head_dim 15", "must be even")),
    ("model.num_experts_per_tok=9", ("model: num_experts_per_tok 9", "exceeds n_routed_experts 8")),
    ("model.first_k_dense_replace=5", ("model: first_k_dense_replace 5", "exceeds num_hidden_layers 4")),
    ("model.vocab_size=5000", ("tokenizer.vocab_size 4096", "must equal model.vocab_size 5000")),
    ("tokenizer.vocab_size=200", ("tokenizer: vocab_size 200", "too small")),
    ("tokenizer.eos_token=<eos>", ("eos_token '<eos>'", "special_tokens")),
    ("training.sequence_length=1024", ("training.sequence_length 1024", "max_position_embeddings 512")),
    ("training.sequence_length=384", ("training.sequence_length 384", "must divide data.sequence_length 512")),
    ("evaluation.sequence_length=1024", ("evaluation.sequence_length 1024", "max_position_embeddings 512")),
    ("parallelism={shard: 2, ep: 3}", ("parallelism: ep 3", "must divide shard 2")),
    ("parallelism={shard: 16, ep: 16}", ("parallelism.ep 16", "must divide model.n_routed_experts 8")),
    ("parallelism.replicate=3", ("schedule.global_batch[0].sequences 16", "multiple of")),
    ("parallelism.shard=0", ("parallelism.shard", "greater than 0")),
    # the schedule
    ("schedule.learning_rate=[]", ("schedule.learning_rate", "at least 1 item")),
    ("schedule.learning_rate.0.until=120%", ("schedule.learning_rate[0]", "at most 100%")),
    ("schedule.learning_rate.0.until=0%", ("schedule.learning_rate[0]", "share of the run above 0")),
    ("schedule.learning_rate.0.until=0.5", ("schedule.learning_rate[0]", "like 80% or 1/12")),
    ("schedule.learning_rate.0.until=half", ("schedule.learning_rate[0]", "like 80% or 1/12")),
    ("schedule.learning_rate.0.until=1/0", ("schedule.learning_rate[0]", "share of the run")),
    ("schedule.learning_rate.1.until=5%", ("schedule: learning_rate", "must increase")),
    ("schedule.learning_rate.1.until_tokens=7", ("schedule: learning_rate", "must increase")),
    ("schedule.bias_rate=[{until: 50%, rate: 0.1}]", ("schedule: bias_rate: ends at", "total_tokens")),
    ("schedule.bias_rate=[{until: 100%, until_tokens: 5, rate: 0.1}]", ("schedule.bias_rate[0]", "give one")),
    ("schedule.learning_rate.0.shape=straight", ("schedule.learning_rate.0.shape", "'constant', 'linear' or 'cosine'")),
    ("corpus.mixture=[{until: 100%, weights: {webb: 1.0}}]", ("corpus: mixture", "no source is named 'webb'", "sources are")),
    ("corpus.mixture=[{until: 100%, weights: {web: 0.0}}]", ("corpus: mixture", "must not all be zero")),
    ("schedule.total_tokens=1e9", ("schedule.total_tokens 1,000,000,000", "source 'web'", "max_epochs")),
    # stages that could not be done
    ("corpus.heldout_fraction=0", ("corpus.heldout_fraction 0", "set it to")),
    ("evaluation.checkpoint=4000", ("evaluation.checkpoint 4000", "name one of 1 to 120")),
    ("evaluation.checkpoint=-1", ("evaluation.checkpoint", "greater than 0")),
    ("evaluation.tasks=[a, a]", ("evaluation.tasks: tasks: 'a' is named twice",)),
    ("cluster.use_gpu=true", ("cluster.use_gpu", "2 workers", "set cluster.use_gpu=false")),
    ("cluster.prepare_cpus=1000", ("cluster.prepare_cpus 1000", "lower it")),
    ("cluster.prepare_memory_bytes=100TB", ("cluster.prepare_memory_bytes", "lower it")),
    ("cluster.cpus_per_worker=0", ("cluster.cpus_per_worker", "greater than 0")),
    # the data
    ("corpus.sources.0.path=DATA/own.jsonl", ("corpus.sources[0].text_field", "no field 'text'", "it has uid, body, meta, meta.lang")),
    ('corpus.sources.0={"name": "web", "path": "DATA/own.jsonl", "text_field": "body", "id_field": "id"}', ("corpus.sources[0].id_field", "no field 'id'", "uid")),
    ('corpus.sources.0={"name": "web", "path": "DATA/own.csv", "text_field": "body"}', ("corpus.sources[0].text_field", "title, contents")),
    ("corpus.sources.0.path=DATA/broken.jsonl", ("corpus.sources[0]", "can be used", "look at its format")),
    ("corpus.sources.0.path=DATA/empty.txt", ("corpus.sources[0].path", "empty")),
    ("corpus.sources.0.path=DATA/numbers.bin", ("corpus.sources[0].path", "set corpus.sources[0].format")),
    # YAML that means more than it looks
    (f"corpus={BOMB}", ("corpus: more than 100,000 values", "write it out")),
    ("corpus=&a [*a]", ("corpus: an alias that holds itself", "write it out")),
    ("corpus=" + "[" * 2000, ("corpus: ", "write it flat")),
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: texts that are fine, and files that are not what they seem."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "texts").mkdir()
    for number in range(40):
        (folder / "texts" / f"{number}.txt").write_text(f"Page {number}. " + "The moon rose late over the sand. " * 60)
    record = {"uid": 1, "body": "A text.", "meta": {"lang": "en"}}
    (folder / "own.jsonl").write_text(f"{json.dumps(record)}\n" * 3)
    (folder / "own.csv").write_text("title,contents\nOne,First\n")
    (folder / "broken.jsonl").write_text("this is\nno JSON\n")
    (folder / "broken.json").write_text("{")
    (folder / "empty.txt").write_text("")
    (folder / "numbers.bin").write_bytes(bytes(range(256)))
    return folder


def refusal(arguments: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert pipeline.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1, shown.err
    assert shown.out in ("", LOOKING.replace("debug", arguments[arguments.index("--config") + 1]))
    assert not root.exists() or list(root.rglob("*")) == []
    return shown.err


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def base(data: Path, root: Path) -> list[str]:
    source = {"name": "web", "path": str(data / "texts"), "max_epochs": 50}
    corpus = {"sources": [source], "heldout_fraction": 0.05}
    return ["--config", "debug", f"storage.root={root}", f"corpus={json.dumps(corpus)}"]


@pytest.mark.parametrize(("given", "told"), SETTINGS, ids=[given[:60] for given, _ in SETTINGS])
def test_a_setting(
    given: str, told: tuple[str, ...], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    message = refusal([*base(data, root), given.replace("DATA", str(data))], root, capsys)
    for text in told:
        assert text in message
    assert len(message) < 600


def test_the_base_of_the_table_is_right(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mistakes the same command goes on to the cluster."""
    wanted: list[list[str]] = []
    monkeypatch.setattr("jobs.drivers.ray_jobs.run_on_ray", lambda todo, *_: wanted.append(todo))
    monkeypatch.setattr("jobs.drivers.pipeline.print_summary", lambda *_: None)
    assert pipeline.main(base(data, tmp_path / "root")) == 0
    assert wanted == [["prepare", "train", "evaluate", "publish"]]
    assert len(SETTINGS) >= 120


FILES = {
    "nothing": (b"", "expected a mapping"),
    "a list": (b"- a\n", "expected a mapping"),
    "open bracket": (b"run_id: [", "not readable as YAML"),
    "a key twice": (b"seed: 1\nseed: 2\n", "seed is given twice"),
    "latin-1": ("run_id: \xff\n".encode("latin-1"), "not readable as YAML"),
    "a Python object": (b"run_id: !!python/object:os.system {}\n", "not readable as YAML"),
    "sections missing": (b"run_id: a\n", "schedule: required, but not given"),
    "a bomb": (f"corpus: {BOMB}\n".encode(), "more than 100,000 values"),
    "merges of merges": (
        b"a: &a {k: 1}\n" + b"".join(b"%c: &%c {<<: [%s]}\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 9)) for n in range(98, 106)),
        "more than 100,000 values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, told = FILES[name]
    (tmp_path / "run.yaml").write_bytes(content)
    message = refusal(["--config", str(tmp_path / "run.yaml")], tmp_path / "runs", capsys)
    assert "--config" in message or "required" in message
    assert told in message


def test_no_such_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("debgu", str(tmp_path), str(tmp_path / "none.yaml"), "s3://", "s3:/bucket/run.yaml"):
        assert "--config" in refusal(["--config", name], tmp_path / "runs", capsys)


WHERE = {
    "no dashboard": ("http://127.0.0.1:9", ("RAY_ADDRESS http://127.0.0.1:9", "nothing answers", "unset it")),
    "no head": ("127.0.0.1:9", ("RAY_ADDRESS", "nothing answers", "unset it")),
    "no client server": ("ray://127.0.0.1:9", ("RAY_ADDRESS ray://127.0.0.1:9", "nothing answers")),
    "no such host": ("http://no-such-host.invalid:8265", ("RAY_ADDRESS", "nothing answers")),
    "no port": ("http://127.0.0.1:99999", ("RAY_ADDRESS", "nothing answers")),
}


@pytest.mark.parametrize("name", WHERE)
def test_an_address_that_leads_nowhere(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, told = WHERE[name]
    monkeypatch.setenv("RAY_ADDRESS", address)
    message = refusal(base(data, tmp_path / "root"), tmp_path / "root", capsys)
    for text in told:
        assert text in message


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))


@pytest.mark.usefixtures("no_credentials")
@pytest.mark.parametrize("key", ["storage.root", "corpus.sources.0.path", "tokenizer.path", "training.initial_weights"])
def test_s3_without_credentials(key: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal([*base(data, tmp_path / "root"), f"{key}=s3://bucket/x"], tmp_path / "root", capsys)
    assert "no credentials for S3; set AWS_ACCESS_KEY_ID" in message


def test_an_s3_server_that_does_not_answer(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    given = ["corpus.sources.0.path=s3://bucket/x", "storage.endpoint_url=http://127.0.0.1:9"]
    message = refusal([*base(data, tmp_path / "root"), *given], tmp_path / "root", capsys)
    assert "storage.endpoint_url http://127.0.0.1:9: nothing answers" in message


def test_a_bucket_that_does_not_exist(
    s3_root: object, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = s3_root.endpoint_url  # type: ignore[attr-defined]
    for key in ("corpus.sources.0.path", "tokenizer.path"):
        given = [f"{key}=s3://no-such-bucket/x", f"storage.endpoint_url={endpoint}"]
        message = refusal([*base(data, tmp_path / "root"), *given], tmp_path / "root", capsys)
        assert key.replace(".0.", "[0].") in message


def test_the_other_doors(data: Path, tmp_path: Path) -> None:
    """Processes of their own: a stage alone, the check, the console command."""
    root = tmp_path / "root"
    bad = [*base(data, root), f"corpus.sources.0.path={data}/own.jsonl"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    for command in (["jobs.prepare", *bad], ["jobs", "check", *bad], ["jobs", "nonsense"]):
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, env=environment, timeout=60
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stdout == "" if command[1] == "nonsense" else done.stdout.startswith(LOOKING)
    assert not root.exists() or list(root.rglob("*")) == []
