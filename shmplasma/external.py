"""The external store: files, of a directory or a bucket, that hold objects for which there is no room.

A *container* holds one object or several small ones, each behind a header that names it and has the checksum of its
contents.  Containers have numbers and are never changed.  Which of them are wanted the object table says, which
outlives the store as they do; so a container that was written half, or that the table does not name, is nobody's,
and no order of writes matters here.

All containers of a store lie in one directory that bears the token of its segment, beside a note that says whose
it is.  Who starts a store removes those directories whose store has gone for good (`ExternalStore.sweep`).

This module imports Arrow, hence the server imports it only when there is an external store.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final, Protocol
from urllib.parse import urlsplit
from zlib import crc32

import xxhash
from pyarrow import ArrowException, fs

from shmplasma.errors import ExternalStoreError
from shmplasma.layout import ALIGNMENT, align_up

__all__ = ["ExternalStore", "Item", "open_external"]

_MAGIC: Final = b"SHMSPILL"
_VERSION: Final = 1
_HEADER: Final = Struct("<8sII20s4xQQQI4x")
"""Magic, version, codec, id, data size, metadata size, checksum of the contents, checksum of the header."""
_HEADER_BYTES: Final = align_up(_HEADER.size, ALIGNMENT)
_PREFIX: Final = "shmplasma-"
_NOTE: Final = "owner"


@dataclass(frozen=True, slots=True)
class Item:
    """An object on its way out or in.

    Attributes
    ----------
    object_id : bytes
        20 bytes.
    codec : int
        What its creator named.
    data_size, metadata_size : int
        Bytes.
    contents : memoryview
        Data and metadata, as they lie in the segment; to be read, or to be filled.
    """

    object_id: bytes
    codec: int
    data_size: int
    metadata_size: int
    contents: memoryview

    def header(self, checksum: int) -> bytes:
        """Return what stands before the contents of this checksum."""
        fields = (self.codec, self.object_id, self.data_size, self.metadata_size, checksum)
        check = crc32(_HEADER.pack(_MAGIC, _VERSION, *fields, 0))
        return _HEADER.pack(_MAGIC, _VERSION, *fields, check).ljust(_HEADER_BYTES, b"\0")


class _Place(Protocol):
    """Where files are, by names with slashes."""

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> None: ...
    def read(self, name: str, offset: int, into: memoryview) -> int: ...
    def delete(self, name: str) -> None: ...
    def list(self, directory: str) -> list[str]: ...
    def delete_directory(self, name: str) -> None: ...


class _Memory:
    """Files in the store's own memory: they end with it, and are for trying things out."""

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        data = b"".join(parts)
        with self._lock:
            self._files[name] = data

    def read(self, name: str, offset: int, into: memoryview) -> int:
        with self._lock:
            if name not in self._files:
                raise FileNotFoundError(name)
            part = memoryview(self._files[name])[offset : offset + len(into)]
        into[: len(part)] = part
        return len(part)

    def delete(self, name: str) -> None:
        with self._lock:
            self._files.pop(name, None)

    def list(self, directory: str) -> list[str]:
        start = f"{directory}/" if directory else ""
        with self._lock:
            inside = [name[len(start) :] for name in self._files if name.startswith(start)]
        return sorted({name.partition("/")[0] for name in inside})

    def delete_directory(self, name: str) -> None:
        with self._lock:
            for each in [file for file in self._files if file.startswith(f"{name}/")]:
                del self._files[each]


class _Arrow:
    """Files of one of Arrow's file systems."""

    def __init__(self, system: fs.FileSystem, root: str) -> None:
        self._system = system
        self._root = root.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        directory = name.rpartition("/")[0]
        if self._system.type_name == "local" and not os.path.isdir(self._path(directory)):
            os.makedirs(self._path(directory), mode=0o700, exist_ok=True)
        with self._system.open_output_stream(self._path(name)) as stream:
            for part in parts:
                stream.write(part)

    def read(self, name: str, offset: int, into: memoryview) -> int:
        with self._system.open_input_file(self._path(name)) as file:
            file.seek(offset)
            done = 0
            while done < len(into) and (got := file.readinto(into[done:])):
                done += got
        return done

    def delete(self, name: str) -> None:
        try:
            self._system.delete_file(self._path(name))
        except FileNotFoundError:
            return  # as it should be

    def list(self, directory: str) -> list[str]:
        selector = fs.FileSelector(self._path(directory), allow_not_found=True)
        return sorted(info.base_name for info in self._system.get_file_info(selector))

    def delete_directory(self, name: str) -> None:
        try:
            self._system.delete_dir(self._path(name))
        except FileNotFoundError:
            return  # as it should be


_memories: Final[dict[str, _Memory]] = {}


def _place(uri: str) -> _Place:
    scheme = urlsplit(uri).scheme
    if scheme in ("memory", "hashtable"):
        return _memories.setdefault(uri.partition("://")[2], _Memory())
    try:
        system, root = fs.FileSystem.from_uri(uri)
    except (ArrowException, OSError, ValueError) as error:
        raise ExternalStoreError(
            f"{_without_secrets(uri)!r} names no external store ({error}); write file:///directory, s3://bucket/prefix, or memory://"
        ) from error
    return _Arrow(system, root)


def _without_secrets(uri: str) -> str:
    """Return a URI without user, password and options, for messages."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def open_external(uri: str, token: bytes, note: bytes) -> ExternalStore:
    """Return the external store at a URI, after a look at whether it can be written to.

    Parameters
    ----------
    uri : str
        ``file:///directory``, ``s3://bucket/prefix`` and whatever else `pyarrow.fs.FileSystem.from_uri` knows;
        ``memory://``, for which Plasma wrote ``hashtable://``.
    token : bytes
        The segment's identity.
    note : bytes
        What is left beside the containers for `ExternalStore.sweep`.

    Raises
    ------
    ExternalStoreError
        There is no such place, or it cannot be written to.
    """
    store = ExternalStore(_place(uri), _without_secrets(uri), token)
    store.claim(note)
    return store


class ExternalStore:
    """The containers of one segment.

    Parameters
    ----------
    place : _Place
        Where they are.
    uri : str
        For messages.
    token : bytes
        The segment's identity.

    Notes
    -----
    Thread-safe: it has no state.
    """

    def __init__(self, place: _Place, uri: str, token: bytes) -> None:
        self._place = place
        self.uri = uri
        self._directory = f"{_PREFIX}{token.hex()}"

    def claim(self, note: bytes) -> None:
        """Leave a note that says whose containers these are."""
        try:
            self._place.write(f"{self._directory}/{_NOTE}", [note])
        except (ArrowException, OSError) as error:
            raise ExternalStoreError(
                f"the external store {self.uri} cannot be written to ({error}); see whether it "
                "exists and this user may write there"
            ) from error

    def write(self, number: int, items: Sequence[Item]) -> list[int]:
        """Write a container; return where in it each object is, in bytes.

        Raises
        ------
        ExternalStoreError
            It cannot be written; nothing is left of it, if that can be helped.
        """
        parts: list[bytes | memoryview] = []
        places: list[int] = []
        end = 0
        for item in items:
            size = len(item.contents)
            places.append(end)
            filling = bytes(-size % ALIGNMENT)
            parts += [
                item.header(xxhash.xxh3_64_intdigest(item.contents)),
                item.contents,
                filling,
            ]
            end += _HEADER_BYTES + size + len(filling)
        name = self._name(number)
        try:
            self._place.write(name, parts)
        except (ArrowException, OSError) as error:
            self.delete([number])
            raise ExternalStoreError(
                f"{len(items)} objects ({end} bytes) cannot be written to the external store {self.uri}: {error}"
            ) from error
        return places

    def read(self, number: int, offset: int, item: Item) -> None:
        """Fill in the contents of an object.

        Raises
        ------
        ExternalStoreError
            The container is missing, cannot be read, or is damaged.
        """
        what = (
            f"object {item.object_id.hex()} in container {number} of the external store {self.uri}"
        )
        header = bytearray(_HEADER_BYTES)
        name = self._name(number)
        try:
            n_header = self._place.read(name, offset, memoryview(header))
            n_contents = self._place.read(name, offset + _HEADER_BYTES, item.contents)
        except (ArrowException, OSError) as error:
            raise ExternalStoreError(f"{what} cannot be read: {error}") from error
        whole = n_header == _HEADER_BYTES and n_contents == len(item.contents)
        if not whole or header != item.header(xxhash.xxh3_64_intdigest(item.contents)):
            raise ExternalStoreError(f"{what} is damaged: its checksum is not that of its contents")

    def delete(self, numbers: Sequence[int]) -> None:
        """Delete containers; what cannot be deleted now is when the store ends, or is swept."""
        for number in numbers:
            try:
                self._place.delete(self._name(number))
            except (ArrowException, OSError):
                return

    def numbers(self) -> Iterator[int]:
        """Yield the numbers of all containers that there are."""
        try:
            names = self._place.list(self._directory)
        except (ArrowException, OSError) as error:
            raise ExternalStoreError(
                f"the external store {self.uri} cannot be read: {error}"
            ) from error
        for name in names:
            if name.isdecimal():
                yield int(name)

    def remove(self) -> None:
        """Remove all containers and the note, because their store ends."""
        try:
            self._place.delete_directory(self._directory)
        except (ArrowException, OSError) as error:
            raise ExternalStoreError(
                f"the files in {self._directory} of the external store {self.uri} stay: {error}"
            ) from error

    def sweep(self, is_dead: Callable[[bytes], bool]) -> Iterator[str]:
        """Remove what stores have left that are dead; yield its names.

        Parameters
        ----------
        is_dead : callable
            ``is_dead(note)`` tells whether the store that left the note has gone for good.
        """
        try:
            for name in self._place.list(""):
                if not name.startswith(_PREFIX) or name == self._directory:
                    continue
                note = bytearray(4096)
                try:
                    length = self._place.read(f"{name}/{_NOTE}", 0, memoryview(note))
                except FileNotFoundError:
                    continue  # it is just being made, or another one sweeps
                if is_dead(bytes(note[:length])):
                    self._place.delete_directory(name)
                    yield name
        except (ArrowException, OSError):
            return  # it is not ours to look at, or another one sweeps

    def _name(self, number: int) -> str:
        return f"{self._directory}/{number}"
