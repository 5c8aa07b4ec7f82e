"""Listing: globs, hash order, identities."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data_prep.listing import list_source
from pipeline.config.load import ConfigError
from pipeline.config.schema import SourceConfig, StorageConfig


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ["a.py", "a.md", "sub/b.py", "sub/tests/c.py", "sub/deep/d.py", ".hidden/e.py", "x.dist-info/METADATA"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    return tmp_path


def names(tree: Path, **settings: object) -> list[str]:
    source = SourceConfig(name="main", path=str(tree), **{"format": "text", **settings})
    return [file.path for file in list_source(source, 0, StorageConfig())]


def test_globs(tree: Path) -> None:
    everything = ["a.md", "a.py", "sub/b.py", "sub/deep/d.py", "sub/tests/c.py", "x.dist-info/METADATA"]
    assert names(tree) == everything
    assert names(tree, include=("**/*.py",)) == ["a.py", "sub/b.py", "sub/deep/d.py", "sub/tests/c.py"]
    assert names(tree, include=("*.py",)) == ["a.py"]
    assert names(tree, include=("sub/*.py", "*.dist-info/METADATA")) == ["sub/b.py", "x.dist-info/METADATA"]
    assert names(tree, exclude=("**/tests/**", "*.m?", "x*/**")) == ["a.py", "sub/b.py", "sub/deep/d.py"]
    assert names(tree, include=("[ab].py", "sub/[!b].py")) == ["a.py"]
    assert names(tree, exclude=("sub/*", "sub/*/*")) == ["a.md", "a.py", "x.dist-info/METADATA"]
    assert names(tree, exclude=("sub/*",)) == [name for name in everything if name != "sub/b.py"]


def test_identity_is_path_size_and_content(tree: Path) -> None:
    source = SourceConfig(name="main", path=str(tree), include=("a.py",), format="text")
    (file,) = list_source(source, 0, StorageConfig())
    content = (tree / "a.py").read_bytes()
    assert (file.path, file.bytes, file.identity) == (
        "a.py",
        len(content),
        f"sha256:{hashlib.sha256(content).hexdigest()}",
    )


def test_a_source_may_be_one_file(tree: Path) -> None:
    assert names(tree / "a.py", include=("*.parquet",)) == ["a.py"]


def test_max_bytes_takes_files_in_hash_order(tree: Path) -> None:
    everything = sorted(names(tree), key=lambda name: hashlib.sha256(name.encode()).digest())
    sizes = [(tree / name).stat().st_size for name in everything]
    for count in range(1, len(everything) + 1):
        assert names(tree, max_bytes=sum(sizes[:count])) == sorted(everything[:count])
    assert names(tree, max_bytes=1) == everything[:1]


def test_nothing_listed_is_named(tree: Path) -> None:
    source = SourceConfig(name="main", path=str(tree), include=("*.parquet",))
    with pytest.raises(
        ConfigError, match=r"corpus\.sources\[3\]\.path: .* holds no file that include \['\*\.parquet'\]"
    ):
        list_source(source, 3, StorageConfig())


def test_links(tree: Path) -> None:
    before = names(tree)
    (tree / "sub" / "up").symlink_to(tree)
    assert names(tree) == before
    (tree / "z").symlink_to(tree / "sub" / "deep")
    assert names(tree) == [*before, "z/d.py"]


def test_a_name_that_is_not_text_is_refused(tree: Path) -> None:
    (tree / "sub" / "bad").mkdir()
    with open(bytes(tree / "sub" / "bad") + b"/\xff.py", "wb") as file:
        file.write(b"x")
    with pytest.raises(ConfigError, match="the file's name is not UTF-8"):
        names(tree)
    assert "a.py" in names(tree, exclude=("sub/bad/**",))


def test_what_holds_no_documents_is_left_out_by_name(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tree / "part.jsonl").write_text('{"text": "a"}\n')
    (tree / "_SUCCESS").touch()
    assert names(tree, format="auto") == ["part.jsonl"]
    (message,) = caplog.messages
    assert message.startswith(
        "source main: 7 files left out (6 of no format known by name, 1 text files beside data files)"
    )
    assert "_SUCCESS, a.md, a.py" in message
    assert names(tree, format="auto", include=("*.md",)) == ["a.md"]
    with pytest.raises(
        ConfigError, match=r"sources\[0\]\.path: .*no file to read, 5 files left out .*sub/b\.py.*format: text"
    ):
        names(tree, format="auto", include=("sub/**", "a.py", "x.dist-info/*"))
    with pytest.raises(ConfigError, match=r"a\.py has a name that says no format; set corpus\.sources\[0\]\.format"):
        names(tree / "a.py", format="auto")
