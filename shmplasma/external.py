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
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from struct import Struct
from typing import Final, Protocol, TypeVar, cast
from urllib.parse import SplitResult, urlsplit
from zlib import crc32

import xxhash
from pyarrow import ArrowException, fs

from shmplasma.errors import ExternalStoreError
from shmplasma.layout import ALIGNMENT
from shmplasma.spilling import HEADER_BYTES
from shmplasma.transfers import Part

__all__ = ["ExternalStore", "has_containers", "open_external", "without_secrets"]

_MAGIC: Final = b"SHMSPILL"
_VERSION: Final = 1
_HEADER: Final = Struct("<8sII20s4xQQQI4x")
"""Magic, version, codec, id, data size, metadata size, checksum of the contents, checksum of the header."""
_PREFIX: Final = "shmplasma-"
_NOTE: Final = "owner"
_MOST_PARTS: Final = os.sysconf("SC_IOV_MAX")


def _checksum(contents: memoryview) -> int:
    """Return the XXH3 of contents; other threads run meanwhile, as with `xxh3_64_intdigest` they would not."""
    state = xxhash.xxh3_64()
    state.update(contents)
    return state.intdigest()


def _header(part: Part, contents: memoryview) -> bytes:
    """Return what stands before an object with these contents."""
    fields = (part.codec, part.object_id, part.data_size, part.metadata_size, _checksum(contents))
    check = crc32(_HEADER.pack(_MAGIC, _VERSION, *fields, 0))
    return _HEADER.pack(_MAGIC, _VERSION, *fields, check).ljust(HEADER_BYTES, b"\0")


class _Place(Protocol):
    """Where files are, by names with slashes."""

    @property
    def is_on_own_disk(self) -> bool:
        """Whether no other machine can reach it."""

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> None: ...
    def read(self, name: str, offset: int, into: Sequence[memoryview]) -> int: ...
    def delete(self, name: str) -> None: ...
    def list(self, directory: str) -> Mapping[str, int]:
        """Return what is in a directory, and its size in bytes."""

    def delete_directory(self, name: str) -> None: ...


class _Memory:
    """Files in the store's own memory: they end with it, and are for trying things out."""

    is_on_own_disk = False

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        data = b"".join(parts)
        with self._lock:
            self._files[name] = data

    def read(self, name: str, offset: int, into: Sequence[memoryview]) -> int:
        with self._lock:
            if name not in self._files:
                raise FileNotFoundError(name)
            data = memoryview(self._files[name])
        end = offset
        for view in into:
            part = data[end : end + len(view)]
            view[: len(part)] = part
            end += len(part)
        return end - offset

    def delete(self, name: str) -> None:
        with self._lock:
            self._files.pop(name, None)

    def list(self, directory: str) -> Mapping[str, int]:
        start = f"{directory}/" if directory else ""
        with self._lock:
            return {
                name[len(start) :].partition("/")[0]: len(data)
                for name, data in self._files.items()
                if name.startswith(start)
            }

    def delete_directory(self, name: str) -> None:
        with self._lock:
            for each in [file for file in self._files if file.startswith(f"{name}/")]:
                del self._files[each]


class _Directory:
    """Files below a directory of this machine; between them and the segment nothing is copied."""

    def __init__(self, root: str) -> None:
        self._root = root

    @property
    def is_on_own_disk(self) -> bool:
        try:
            # File systems without a disk of their own, those of the network among them, have the major number 0.
            return os.major(os.stat(self._root).st_dev) != 0
        except OSError:
            return False

    def _path(self, name: str) -> str:
        return os.path.join(self._root, name)

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        path = self._path(name)
        try:
            _write_file(path, parts)
        except FileNotFoundError:
            directory = os.path.dirname(path)
            os.makedirs(directory, mode=0o700, exist_ok=True)
            try:
                _write_file(path, parts)
            except OSError:
                with suppress(OSError):  # others write there meanwhile
                    os.rmdir(directory)
                raise

    def read(self, name: str, offset: int, into: Sequence[memoryview]) -> int:
        fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            left, end = list(into), offset
            while left and (n_bytes := os.preadv(fd, left, end)):
                left = _after(n_bytes, left)
                end += n_bytes
        finally:
            os.close(fd)
        return end - offset

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):  # it is as it should be
            os.unlink(self._path(name))

    def list(self, directory: str) -> Mapping[str, int]:
        try:
            with os.scandir(self._path(directory)) as found:
                return {each.name: each.stat(follow_symlinks=False).st_size for each in found}
        except FileNotFoundError:
            return {}

    def delete_directory(self, name: str) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self._path(name))


def _write_file(path: str, parts: Sequence[bytes | memoryview]) -> None:
    """Write a file, of which nothing is left if that fails."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        left: list[bytes | memoryview] = list(parts)
        while left:
            left = _after(os.writev(fd, left[:_MOST_PARTS]), left)
    except OSError:
        with suppress(OSError):  # why it cannot be written is what counts
            os.unlink(path)
        raise
    finally:
        os.close(fd)


_Bytes = TypeVar("_Bytes", bound=bytes | memoryview)


def _after(n_bytes: int, parts: Sequence[_Bytes]) -> list[_Bytes]:
    """Return what is left of parts of which so many bytes are done."""
    for at, part in enumerate(parts):
        if n_bytes < len(part):
            return [cast("_Bytes", part[n_bytes:]), *parts[at + 1 :]]
        n_bytes -= len(part)
    return []


class _Arrow:
    """Files of one of Arrow's file systems."""

    is_on_own_disk = False

    def __init__(self, system: fs.FileSystem, root: str) -> None:
        self._system = system
        self._root = root.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        with self._system.open_output_stream(self._path(name)) as stream:
            for part in parts:
                stream.write(part)

    def read(self, name: str, offset: int, into: Sequence[memoryview]) -> int:
        with self._system.open_input_file(self._path(name)) as file:
            file.seek(offset)
            left = list(into)
            while left and (n_bytes := file.readinto(left[0])):
                left = _after(n_bytes, left)
            return int(file.tell()) - offset

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):  # it is as it should be
            self._system.delete_file(self._path(name))

    def list(self, directory: str) -> Mapping[str, int]:
        selector = fs.FileSelector(self._path(directory), allow_not_found=True)
        return {info.base_name: info.size or 0 for info in self._system.get_file_info(selector)}

    def delete_directory(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._system.delete_dir(self._path(name))


_REMEDY: Final = "write file:///directory, s3://bucket/prefix, or memory://"

_memories: Final[dict[str, _Memory]] = {}


def _place(uri: str) -> _Place:
    scheme = _parts(uri).scheme
    if scheme in ("memory", "hashtable"):
        return _memories.setdefault(uri.partition("://")[2], _Memory())
    try:
        system, root = fs.FileSystem.from_uri(uri)
    except OSError as error:
        raise ExternalStoreError(
            f"the external store {without_secrets(uri)} cannot be reached ({error}); see whether it exists, and "
            "whether this machine can reach its host"
        ) from error
    except (ArrowException, ValueError) as error:
        raise ExternalStoreError(
            f"{without_secrets(uri)!r} names no external store ({error}); {_REMEDY}"
        ) from error
    if system.type_name != "local":
        return _Arrow(system, root)
    # The directory itself may be new.  More than one that is missing is most likely a slip.
    parent = os.path.dirname(os.path.normpath(root))
    try:
        os.stat(parent)
    except OSError as error:
        raise ExternalStoreError(
            f"the external store {uri} cannot be made: {parent}: {error.strerror}; make that directory, or name "
            "another place with -e"
        ) from error
    return _Directory(root)


def _parts(uri: str) -> SplitResult:
    try:
        return urlsplit(uri)
    except ValueError:
        # Neither the error nor what cannot be taken apart is shown: a password may be in it.
        raise ExternalStoreError(
            f"the URI of the external store names none, as its host cannot be read; {_REMEDY}"
        ) from None


def without_secrets(uri: str) -> str:
    """Return a URI without user, password and options, for messages."""
    parts = _parts(uri)
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
    store = ExternalStore(_place(uri), without_secrets(uri), token)
    store.claim(note)
    return store


def has_containers(uri: str, token: bytes) -> bool:
    """Tell whether there are containers of a segment at a URI; errors as `open_external`."""
    return bool(ExternalStore(_place(uri), without_secrets(uri), token).containers())


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

    @property
    def is_on_own_disk(self) -> bool:
        """Whether no other machine can reach it."""
        return self._place.is_on_own_disk

    def claim(self, note: bytes) -> None:
        """Leave a note that says whose containers these are."""
        try:
            self._place.write(f"{self._directory}/{_NOTE}", [note])
        except (ArrowException, OSError) as error:
            raise ExternalStoreError(
                f"the external store {self.uri} cannot be written to ({error}); see whether it "
                "exists and has room, and this user may write there"
            ) from error

    def write(self, number: int, objects: Sequence[Part], raw: memoryview) -> list[int]:
        """Write a container of objects in a segment; return where in it each of them is, in bytes.

        Raises
        ------
        ExternalStoreError
            It cannot be written; nothing is left of it, if that can be helped.
        """
        parts: list[bytes | memoryview] = []
        places: list[int] = []
        end = 0
        for each in objects:
            contents = each.contents(raw)
            places.append(end)
            filling = bytes(-len(contents) % ALIGNMENT)
            parts += [_header(each, contents), contents, filling]
            end += HEADER_BYTES + len(contents) + len(filling)
        name = self._name(number)
        try:
            self._place.write(name, parts)
        except (ArrowException, OSError) as error:
            self.delete([number])
            raise ExternalStoreError(
                f"{len(objects)} objects ({end} bytes) cannot be written to the external store {self.uri}: {error}"
            ) from error
        return places

    def read(self, number: int, offset: int, part: Part, raw: memoryview) -> None:
        """Fill in the contents of an object in a segment.

        Raises
        ------
        ExternalStoreError
            The container is missing, cannot be read, or is damaged.
        """
        what = (
            f"object {part.object_id.hex()} in container {number} of the external store {self.uri}"
        )
        header = bytearray(HEADER_BYTES)
        contents = part.contents(raw)
        into = memoryview(header), contents
        try:
            n_bytes = self._place.read(self._name(number), offset, into)
        except (ArrowException, OSError) as error:
            raise ExternalStoreError(f"{what} cannot be read: {error}") from error
        is_whole = n_bytes == HEADER_BYTES + len(contents)
        if not is_whole or header != _header(part, contents):
            raise ExternalStoreError(f"{what} is damaged: its checksum is not that of its contents")

    def delete(self, numbers: Sequence[int]) -> None:
        """Delete containers; what cannot be deleted now is when the store ends, or is swept."""
        for number in numbers:
            try:
                self._place.delete(self._name(number))
            except (ArrowException, OSError):
                return

    def containers(self) -> dict[int, int]:
        """Return the sizes in bytes of all containers that there are, by number."""
        try:
            found = self._place.list(self._directory)
        except (ArrowException, OSError) as error:
            raise ExternalStoreError(
                f"the external store {self.uri} cannot be read: {error}"
            ) from error
        return {int(name): size for name, size in found.items() if name.isdecimal()}

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
            names = self._place.list("")
        except (ArrowException, OSError):
            return  # it is not ours to look at
        for name in names:
            if not name.startswith(_PREFIX) or name == self._directory:
                continue
            note = bytearray(4096)
            try:
                length = self._place.read(f"{name}/{_NOTE}", 0, [memoryview(note)])
                if not is_dead(bytes(note[:length])):
                    continue
                self._place.delete_directory(name)
            except (ArrowException, OSError):
                continue  # it is just being made, is another user's, or another one sweeps
            yield name

    def _name(self, number: int) -> str:
        return f"{self._directory}/{number}"
