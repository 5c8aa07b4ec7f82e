"""Listing: globs, hash order, identities."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data_prep.listing import InputFile, Listing, list_source
from pipeline.config.load import ConfigError
from pipeline.config.schema import SourceConfig, StorageConfig
from pipeline.storage import filesystem


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


def test_objects_of_a_bucket(bucket: tuple[str, str]) -> None:
    """`d` beside `d/x`; a source that is one object; a prefix that is an object, too."""
    storage = StorageConfig(root=f"s3://{bucket[1]}/any", endpoint_url=bucket[0])
    fs = filesystem(storage.root, storage)
    for key in ("c/d", "c/d/x", "c/d/y/z z", "c/e.txt", "c/folder/"):
        fs.pipe_file(f"{bucket[1]}/{key}", key.encode())
    etag = {key: "etag:" + fs.info(f"{bucket[1]}/{key}")["ETag"].strip('"') for key in ("c/d", "c/e.txt")}

    def listed(path: str, **settings: object) -> Listing:
        source = SourceConfig(name="main", path=f"s3://{bucket[1]}/{path}", format="text", **settings)
        return list_source(source, 0, storage)

    assert [file.path for file in listed("c")] == ["d", "d/x", "d/y/z z", "e.txt"]
    assert listed("c")[0] == InputFile("d", 3, etag["c/d"])
    assert [file.path for file in listed("c", include=("d", "**/x"))] == ["d", "d/x"]
    one = listed("c/e.txt", include=("*.parquet",))
    assert (list(one), one.root) == ([InputFile("e.txt", 7, etag["c/e.txt"])], f"s3://{bucket[1]}/c")
    assert [file.path for file in listed("c/d/")] == ["x", "y/z z"]
    with pytest.raises(
        ConfigError, match=r"c/d is an object, and there are others below it; write s3://\S+/c/d/ for those"
    ):
        listed("c/d")
    with pytest.raises(ConfigError, match="there is no object at or below"):
        listed("none")


def test_a_listing_is_walked_in_the_order_of_its_paths(tmp_path: Path) -> None:
    """Whatever sorts between a folder's name and the slash that follows it: '-' and '.' do, '0' does not."""
    for name in ("a/b", "a-b/c", "a.txt", "a0", "a/b.d/e", "a/b-d", "\u00e9", "z\U0001f600", "z\uffff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if not (tmp_path / name).is_dir():
            (tmp_path / (name if name != "a/b" else "a/b_")).write_bytes(name.encode())
    found = names(tmp_path)
    assert found == sorted(found)
    assert len(found) == 9


def test_the_digest_covers_every_part_of_every_file(tmp_path: Path) -> None:
    files = [("a", 1, "x"), ("b", 2, "y")]
    first = Listing("/", files)
    assert (
        first.digest == Listing("/elsewhere", files).digest == hashlib.sha256(b"a\0001\0x\0\nb\0002\0y\0\n").hexdigest()
    )
    others = [
        [("a", 1, "x")],
        [("a", 1, "x"), ("c", 2, "y")],
        [("a", 1, "x"), ("b", 3, "y")],
        [("a", 1, "z"), ("b", 2, "y")],
    ]
    assert len({first.digest, *(Listing("/", other).digest for other in others)}) == 5
    assert (first.bytes, len(first), first[1], first[:1]) == (3, 2, InputFile("b", 2, "y"), [InputFile("a", 1, "x")])


def test_more_files_than_are_held_as_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.listing.ROWS", 3)
    files = [(f"{number:03d}", number, f"sha256:{number}") for number in range(10)]
    listing = Listing("/", iter(files))
    assert list(listing) == [InputFile(*file) for file in files]
    assert [listing[place] for place in (0, 3, 9)] == [InputFile(*files[place]) for place in (0, 3, 9)]
