"""Reading from a real S3 server (moto, over HTTP): the same batches, in one ranged GET a block, retried when it fails."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from pipeline.config.schema import StorageConfig
from pipeline.dataset.loader import Loader
from pipeline.dataset.order import Order
from pipeline.dataset.verify import verify
from pipeline.storage import Storage, open_storage
from tests.dataset import make


class Recorder:
    """WSGI middleware: counts requests by kind, and fails some of them on demand."""

    def __init__(self, app: Callable) -> None:
        self.app = app
        self.requests: Counter[str] = Counter()
        self.fail: Callable[[int], bool] = lambda number: False
        self.drop: Callable[[int], bool] = lambda number: False

    def __call__(self, environ: dict, start_response: Callable) -> object:
        ranged = " ranged" if "HTTP_RANGE" in environ else ""
        self.requests[environ["REQUEST_METHOD"] + ranged] += 1
        if self.fail(self.requests.total()):
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"]
        if self.drop(self.requests.total()):
            return half_of(self.app(environ, start_response))
        return self.app(environ, start_response)


def half_of(body: Iterable[bytes]) -> Iterator[bytes]:
    """The first half of an answer, then the connection breaks."""
    data = b"".join(body)
    yield data[: len(data) // 2]
    raise ConnectionAbortedError


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Recorder]]:
    recorder = Recorder(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, recorder, threaded=True)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", recorder
    http.shutdown()
    thread.join()


@pytest.fixture
def s3(server: tuple[str, Recorder], monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    storage = open_storage(StorageConfig(root="s3://bucket/root", endpoint_url=server[0], region="us-east-1"))
    storage.fs.call_s3("create_bucket", Bucket="bucket")
    return storage


def test_same_batches_in_one_ranged_get_a_block(s3: Storage, server: tuple[str, Recorder], tmp_path) -> None:
    recorder = server[1]
    dataset = make.write(s3, [[3, 4], [5]], row_tokens=64)
    assert make.write(open_storage(StorageConfig(root=str(tmp_path))), [[3, 4], [5]], row_tokens=64) == dataset
    order = Order(dataset, make.layout(64, 4, lanes=4), make.corpus([1, 1]), 64, seed=0)
    local = Loader(order, open_storage(StorageConfig(root=str(tmp_path))), 0, 1)
    remote = Loader(order, s3, 0, 1)
    recorder.requests.clear()
    for start in range(0, 48, 8):
        assert remote.batch(start, 8).tokens_BS.equal(local.batch(start, 8).tokens_BS)
    remote.close()
    counters = remote.reader.counters
    assert recorder.requests == {"GET ranged": counters.requests}
    assert counters.footers == 3  # one a file
    assert counters.requests == counters.footers + counters.blocks
    local.close()


def test_slow_down_answers_are_retried(s3: Storage, server: tuple[str, Recorder]) -> None:
    recorder = server[1]
    dataset = make.write(s3, [[3, 4], [5]], row_tokens=64)
    recorder.requests.clear()
    recorder.fail = lambda number: number == 2
    try:
        assert verify(dataset, s3).ok
    finally:
        recorder.fail = lambda number: False
    blocks, files = 12, 3
    index, again = 1, 1
    assert (
        recorder.requests.total() == index + blocks + 2 * files + again
    )  # a footer is parsed, and read again to be hashed


def test_dropped_connections_are_retried(s3: Storage, server: tuple[str, Recorder]) -> None:
    recorder = server[1]
    dataset = make.write(s3, [[3, 4], [5]], row_tokens=64)
    recorder.requests.clear()
    recorder.drop = lambda number: number in (4, 9)
    try:
        assert verify(dataset, s3).ok
    finally:
        recorder.drop = lambda number: False
    assert recorder.requests.total() == 1 + 12 + 2 * 3 + 2


def test_truncated_object_is_named(s3: Storage) -> None:
    dataset = make.write(s3, [[3]], row_tokens=64)
    entry = make.packed_of(dataset, s3)[0]
    whole = s3.read(entry.path)
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        s3.write(entry.path, whole[:length])
        findings = verify(dataset, s3).findings
        assert [finding.path for finding in findings] == [entry.path], length
    s3.delete(entry.path)
    assert [str(finding) for finding in verify(dataset, s3).findings] == [f"{entry.path}: the file is missing"]
