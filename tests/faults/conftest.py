"""A prepared corpus of two small sources, copied to a folder or an S3 server of each test; and the table at the end of a session."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.schema import StorageConfig
from pipeline.storage import Storage
from tests.data_prep.faulty_s3 import FaultyS3
from tests.faults.runs import Place, Reference, prepare_corpus
from tests.faults.table import Row, row_name, update

found = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", help="the document whose table of faults is updated with what was found")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[found] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    row = getattr(item, "funcargs", {}).get("row")
    if call.when == "call" and isinstance(row, Row):
        if report.passed:
            item.config.stash[found].append(row)
        else:
            row.happened = "FAILED"
            item.config.stash[found].append(row)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[found]
    for row in rows:
        terminalreporter.write_line(" | ".join(row.cells()))
    if config.getoption("--reliability"):
        update(Path(config.getoption("--reliability")), [row for row in rows if row.happened != "FAILED"])


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Row:
    mark = request.node.get_closest_marker("faults")
    parameters = request.node.callspec.params
    return Row(row_name(mark.args[0], parameters.get("case")), parameters["place"])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root that holds nothing but the dataset, and beside it the texts and the configuration."""
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Reference:
    """Undisturbed runs, each trained once a session, on a folder."""
    return Reference(corpus, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, corpus: Path) -> Iterator[Place]:
    """An own root with the prepared dataset. On S3 all requests go through a proxy that can be told to fail."""
    if request.param == "folder":
        shutil.copytree(corpus / "root", tmp_path / "root")
        yield Place("folder", corpus, tmp_path, StorageConfig(root=str(tmp_path / "root")), None)
        return
    endpoint, bucket = request.getfixturevalue("bucket")
    with FaultyS3(endpoint, 0, 0) as proxy:
        config = StorageConfig(root=f"s3://{bucket}/root", endpoint_url=proxy.url, region="us-east-1")
        storage = Storage(config)
        for path in sorted((corpus / "root").rglob("*")):
            if path.is_file():
                storage.upload(path, str(path.relative_to(corpus / "root")))
        yield Place("s3", corpus, tmp_path, config, proxy)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for is done already: no Ray is started for it."""

    def refuse(*_: object) -> None:
        raise AssertionError("Ray was asked for")

    monkeypatch.setattr("jobs.drivers.ray_jobs.run_on_ray", refuse)
