from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest

from shmplasma import external
from shmplasma.errors import ExternalStoreError
from shmplasma.external import ExternalStore, open_external
from shmplasma.transfers import Part

TOKEN, OTHER = bytes(16), bytes(15) + b"1"
CONTENTS = (b"first", b"", 5000 * b"third")
RAW = memoryview(b"".join(CONTENTS))
PARTS = [
    Part(n, bytes([n]) * 20, n, end - len(each), max(0, len(each) - 1), min(1, len(each)))
    for n, (each, end) in enumerate(zip(CONTENTS, accumulate(map(len, CONTENTS)), strict=True))
]
"""Objects with these contents, one behind the other, the last byte of each its metadata."""


def room() -> memoryview:
    """Return memory that is to be filled."""
    return memoryview(bytearray(len(RAW)))


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ExternalStore:
    """Return an external store with one container, of number 7."""
    uri = f"{request.param}://{tmp_path}"
    store = open_external(uri, TOKEN, b"mine")
    assert store.write(7, PARTS, RAW) == [0, 192, 320]
    return store


def test_what_was_written_is_read(store: ExternalStore) -> None:
    """Each object comes back from its place, and a container is there until it is deleted."""
    filled = room()
    for place, part in zip([0, 192, 320], PARTS, strict=True):
        store.read(7, place, part, filled)
        assert part.contents(filled) == part.contents(RAW)
    assert list(store.containers()) == [7]
    store.delete([7, 8])
    assert list(store.containers()) == []
    with pytest.raises(ExternalStoreError, match="cannot be read"):
        store.read(7, 0, PARTS[0], room())
    store.remove()


def test_nothing_is_left_of_a_write_that_fails(
    store: ExternalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even what was written before it did."""
    write = store._place.write

    def write_a_part(name: str, parts: Sequence[bytes | memoryview]) -> None:
        write(name, parts[:1])
        raise OSError("no space left")

    monkeypatch.setattr(store._place, "write", write_a_part)
    with pytest.raises(ExternalStoreError, match=r"3 objects .* no space left"):
        store.write(8, PARTS, RAW)
    assert list(store.containers()) == [7]


def test_another_object_is_not_taken_for_it(store: ExternalStore) -> None:
    """What lies at a place has to be the object that is asked for, whole."""
    first, second, third = PARTS
    for place, part in ((192, first), (0, second), (9999, first), (0, third)):
        with pytest.raises(ExternalStoreError, match="is damaged"):
            store.read(7, place, part, room())


@pytest.mark.parametrize("position", [0, 9, 40, 70, 130])
def test_a_damaged_file(tmp_path: Path, position: int) -> None:
    """One byte that has changed, in header or contents, is found; the other objects can be read."""
    store = open_external(f"file://{tmp_path}", TOKEN, b"mine")
    store.write(1, PARTS, RAW)
    (path,) = tmp_path.glob("*/1")
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ExternalStoreError, match=r"object 0{40} in container 1 of .* is damaged"):
        store.read(1, 0, PARTS[0], room())
    store.read(1, 320, PARTS[2], room())


def test_places_that_are_none(tmp_path: Path) -> None:
    """What is no URI, or cannot be written to, is refused with what to write instead, and no password is shown."""
    file = tmp_path / "file"
    file.write_text("not a directory")
    for uri in (
        "nonsense",
        "s4://bucket",
        "",
        "s3://[bucket/prefix",
        "s3://[me:secret@bucket]",
        "s3://me:secret\u2100@bucket",
    ):
        with pytest.raises(
            ExternalStoreError, match="write file:///directory, s3://bucket"
        ) as caught:
            open_external(uri, TOKEN, b"mine")
        assert "secret" not in str(caught.value)
    with pytest.raises(ExternalStoreError, match="cannot be written to"):
        open_external(f"file://{file}", TOKEN, b"mine")


def test_a_place_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that does not answer makes no wrong URI, and the error does not say so."""

    def from_uri(_: str) -> None:
        raise OSError("Could not resolve hostname")

    system = SimpleNamespace(FileSystem=SimpleNamespace(from_uri=from_uri))
    monkeypatch.setattr(external, "fs", system)
    with pytest.raises(
        ExternalStoreError, match=r"s3://bucket cannot be reached \(Could not resolve"
    ) as caught:
        open_external("s3://me:secret@bucket", TOKEN, b"mine")
    assert "names no external store" not in str(caught.value)


def test_only_the_last_directory_is_made(tmp_path: Path) -> None:
    """A directory that is not there is made, but not one below another that is not there."""
    with pytest.raises(
        ExternalStoreError, match=f"{tmp_path}/a: No such file.*make that directory"
    ):
        open_external(f"file://{tmp_path}/a/b/", TOKEN, b"mine")
    assert not list(tmp_path.iterdir())
    open_external(f"file://{tmp_path}/a/", TOKEN, b"mine").remove()
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_plasmas_name_for_memory() -> None:
    """``hashtable://`` is ``memory://``."""
    store = open_external("hashtable://test", TOKEN, b"mine")
    store.write(1, PARTS, RAW)
    assert list(open_external("memory://test", TOKEN, b"mine").containers()) == [1]
    store.remove()
    assert not list(store.containers())


def test_what_dead_stores_have_left(store: ExternalStore) -> None:
    """Their files are removed; those of the living, and one's own, are not."""
    other = ExternalStore(store._place, "other", OTHER)
    other.claim(b"theirs")
    other.write(1, PARTS, RAW)
    assert list(store.sweep(lambda note: note == b"nobody's")) == []
    assert list(other.containers()) == [1]
    assert list(store.sweep(lambda _: True)) == [f"shmplasma-{OTHER.hex()}"]
    assert list(other.containers()) == []
    assert list(store.containers()) == [7]
    store.remove()


def test_what_cannot_be_looked_at_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What dead stores have left is removed, whatever else lies there: a file, or what is another user's."""
    store = open_external(f"file://{tmp_path}", TOKEN, b"mine")
    other = ExternalStore(store._place, "other", OTHER)
    other.claim(b"theirs")
    (tmp_path / "shmplasma-file").touch()
    (tmp_path / "shmplasma-strange" / "owner").mkdir(parents=True)
    names = sorted(store._place.list(""), reverse=True)
    assert names[-1] == f"shmplasma-{TOKEN.hex()}"
    monkeypatch.setattr(store._place, "list", lambda _: names)
    assert list(store.sweep(lambda note: note == b"theirs")) == [f"shmplasma-{OTHER.hex()}"]
