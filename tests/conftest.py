"""Fixtures shared by all tests, one S3 server a session among them, and how two workers share the tests (`make test`)."""

from __future__ import annotations

import gc
import os
import signal
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from moto.server import ThreadedMotoServer
from xdist.scheduler import LoadScopeScheduling

from pipeline.config.schema import StorageConfig
from pipeline.storage import filesystem

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which PyTorch does late: tests/kernels

# Of all property tests, whatever else theirs say: a machine at work fails none of them for the time that it took, nor draws others than yesterday.
settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


ONE_AFTER_ANOTHER = ("tests/data_prep/", "tests/faults/", "tests/jobs/", "tests/workflow/")
"""Where Ray is started. Two that start at once reach for the same ports."""


class Lanes(LoadScopeScheduling):
    """A file is one worker's, so that what its tests share is made once; all that starts Ray is one worker's."""

    def _split_scope(self, nodeid: str) -> str:
        return "Ray" if nodeid.startswith(ONE_AFTER_ANOTHER) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    config.option.loadscopereorder = False  # in the order of one process
    return Lanes(config, log)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """A command that ran in this process leaves its handlers; of one that notes a signal and goes on, processes that a later test forks
    (lm-eval's bootstrap) would hear SIGTERM and never end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        if handler is not None:  # else it is not Python's
            signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Two threads spin for each other on a busy machine, at many times the cost of these tiny networks."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _thawed_at_the_end() -> Iterator[None]:
    """Or extension modules say, as the interpreter ends, that their types leaked."""
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def _leave_what_was_there() -> None:
    """Modules, reports and fixtures of the files before are looked at once and no more: a full collection, which training makes at
    its start, takes a second of the whole session's objects, and as much as this file made of what is left."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of a real S3 server (moto, over HTTP), with credentials for it in the environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str) -> tuple[str, str]:
    """(endpoint, name) of an empty bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    filesystem("s3://", StorageConfig(root="s3://any", endpoint_url=s3_server)).mkdir(name)
    return s3_server, name


@pytest.fixture
def s3_root(bucket: tuple[str, str]) -> StorageConfig:
    """A storage root in an empty bucket."""
    endpoint, name = bucket
    return StorageConfig(root=f"s3://{name}/root", endpoint_url=endpoint, region="us-east-1")
