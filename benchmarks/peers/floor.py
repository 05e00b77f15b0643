"""The floor: what an operation takes in Python when all but its substance is left out.

No store, and nothing to build one on: it keeps no objects apart, checks nothing, and survives nothing.  What is left
is what no store in Python can do without:

* a get finds an entry by its hash, compares, pins and looks again, and makes a buffer that unpins (`shmplasma.pins`); that of an array reads
  its shape and dtype as well, which are known from the last get of one like it;
* a put draws an id, copies, and leaves a record in shared memory;
* a create locks an id, looks for it, makes a buffer that unpins, copies, leaves two records in shared memory, and unlocks;
* a hand-over locks an id, looks for it, copies, leaves a record and sends a message; whoever gets that looks at the record, pins what
  lies there, looks again, and makes a buffer that unpins;
* a large put is a copy, by as many threads as are fastest (`shmplasma.copying`), to memory that this process has touched before.
"""

from __future__ import annotations

import mmap
import pickle
import socket
import struct
import time
from contextlib import contextmanager
from os import urandom
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from benchmarks.peers.base import Client, Peer, UnsupportedError, use
from shmplasma.copying import copy_into
from shmplasma.layout import align_up
from shmplasma.system import try_lock, unlock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from benchmarks.peers.base import Array, Operation

__all__ = ["Floor", "FloorClient"]

_ENTRY: Final = struct.Struct("Q20sIQQQQ")
_ENTRY_BYTES: Final = 64
_SLOTS: Final = 1 << 20
_RECORD: Final = struct.Struct("20sQQQII")
_TABLE_BYTES: Final = _SLOTS * _ENTRY_BYTES
_HEAD: Final = struct.Struct("64s")
"""What stands before the elements of an array, as text: its length and its dtype."""
_PINS: Final = 2048
_THREADS: Final = 2
_BIND_SECONDS: Final = 1e-3
_DATA: Final = _TABLE_BYTES + 8 * _PINS


def _at(key: bytes) -> int:
    """Return where the entry of a key lies; keys are random."""
    return int.from_bytes(key[:4], "little") % _SLOTS * _ENTRY_BYTES


def _check(value: object) -> None:
    """Refuse what nobody would pickle whole."""
    if not isinstance(value, bytes):
        raise UnsupportedError


class _Pin:
    __slots__ = ("free", "slot", "words")

    free: list[int]
    slot: int
    words: memoryview

    def __del__(self) -> None:
        self.words[self.slot] = 0
        self.free.append(self.slot)


class FloorClient(Client[bytes]):
    """A table that all processes map, and an address at which one of them waits."""

    def __init__(self, directory: str, capacity: int) -> None:
        self._file = open(f"{directory}/floor", "a+b")  # noqa: SIM115 - its locks are this client's
        self._file.truncate(_DATA + align_up(capacity, 8))
        self._map = mmap.mmap(self._file.fileno(), 0)
        self._data = np.frombuffer(self._map, np.uint8)[_DATA:]
        self._words = memoryview(self._map).cast("Q")
        self._pins = self._words[_TABLE_BYTES // 8 : _TABLE_BYTES // 8 + _PINS]
        self._free = list(range(_PINS))
        self._address = pa.py_buffer(self._map).address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._waits_at = f"{directory}/waits"
        self._layouts: dict[bytes, tuple[tuple[int, ...], np.dtype[Any]]] = {}

    def key(self, name: bytes) -> bytes:
        return name

    def drop(self, keys: Sequence[bytes]) -> None:
        """Nothing is kept."""

    def store_raw(self, key: bytes, data: bytes) -> None:
        self._data[: len(data)] = np.frombuffer(data, np.uint8)
        _ENTRY.pack_into(self._map, _at(key), 1, key, 0, _DATA, len(data), 0, 0)

    def store_object(self, key: bytes, value: object) -> None:
        _check(value)
        self.store_raw(key, pickle.dumps(value, protocol=5))

    def store_array(self, key: bytes, array: Array) -> None:
        head = f"{array.size} {array.dtype.str} "
        self.store_raw(key, _HEAD.pack(head.encode()) + array.tobytes())

    def _get(self, key: bytes) -> Any:
        at = _at(key)
        word, found, _, offset, size, _, _ = _ENTRY.unpack_from(self._map, at)
        if found != key:
            return None
        pin = _Pin()
        pin.words, pin.free, pin.slot = self._pins, self._free, self._free.pop()
        pin.words[pin.slot] = at
        if self._words[at >> 3] != word:
            return None
        return pa.foreign_buffer(self._address + offset, size, pin)

    def get_raw(self, key: bytes) -> Operation:
        return lambda: self._get(key)

    def get_many(self, keys: Sequence[bytes]) -> Operation:
        return lambda: [self._get(key) for key in keys]

    def get_object(self, key: bytes) -> Operation:
        return lambda: pickle.loads(self._get(key))

    def get_array(self, key: bytes) -> Operation:
        def get() -> float:
            view = memoryview(self._get(key))
            (head,) = _HEAD.unpack_from(view)
            try:
                shape, dtype = self._layouts[head]
            except KeyError:
                length, text, _ = head.decode().split(" ")
                shape, dtype = self._layouts[head] = (int(length),), np.dtype(text)
            return use(np.ndarray(shape, dtype, view, _HEAD.size))

        return get

    def contains(self, key: bytes) -> Operation:
        def contains() -> bool:
            at = _at(key)
            fields = _ENTRY.unpack_from(self._map, at)
            return bool(fields[1] == key and self._words[at >> 3] == fields[0])

        return contains

    def put_raw(self, data: bytes) -> Callable[[], bytes]:
        size = len(data)

        def put() -> bytes:
            key = urandom(20)
            self._data[:size] = np.frombuffer(data, np.uint8)
            _RECORD.pack_into(self._map, _TABLE_BYTES, key, 0, size, 0, 0, 0)
            self._words[0] += 1
            return key

        return put if size < 1 << 20 else self._put_large(pa.py_buffer(data))

    def put_object(self, value: object) -> Callable[[], bytes]:
        _check(value)

        def put() -> bytes:
            data = pickle.dumps(value, protocol=5)
            return self.put_raw(data)()

        return put

    def put_array(self, array: Array) -> Callable[[], bytes]:
        return self._put_large(pa.py_buffer(array.data))

    def _put_large(self, source: pa.Buffer) -> Callable[[], bytes]:
        target = self._data[: source.size]

        def put() -> bytes:
            copy_into(target, source, _THREADS)
            return urandom(20)

        return put

    def create(self, data: bytes) -> Callable[[bytes], object]:
        fd, size = self._file.fileno(), len(data)

        def create(key: bytes) -> None:
            at = _at(key)
            if not try_lock(fd, at) or _ENTRY.unpack_from(self._map, at)[1] == key:
                return
            pin = _Pin()
            pin.words, pin.free, pin.slot = self._pins, self._free, self._free.pop()
            pin.words[pin.slot] = at
            target = pa.foreign_buffer(self._address + _DATA, size, pin)
            _RECORD.pack_into(self._map, _TABLE_BYTES, key, 0, size, 0, 0, 0)
            self._data[: target.size] = np.frombuffer(data, np.uint8)
            _RECORD.pack_into(self._map, _TABLE_BYTES, key, 0, 0, 0, 0, 0)
            unlock(fd)

        return create

    def hand_over(self, key: bytes, data: bytes, pipe: Connection) -> None:
        fd, at, size = self._file.fileno(), _at(key), len(data)
        if not try_lock(fd, at) or _ENTRY.unpack_from(self._map, at)[1] == key:
            return
        self._data[:size] = np.frombuffer(data, np.uint8)
        _RECORD.pack_into(self._map, _TABLE_BYTES, key, _DATA, size, 0, 0, 0)
        while True:
            try:
                self._socket.sendto(key, self._waits_at)
            except FileNotFoundError:  # it has not waited before
                time.sleep(_BIND_SECONDS)
            else:
                break
        unlock(fd)

    def take_over(self, key: bytes, pipe: Connection) -> object:
        if not Path(self._waits_at).exists():
            self._socket.bind(self._waits_at)
        while self._socket.recv(64) != key:
            pass
        found, offset, size, _, _, _ = _RECORD.unpack_from(self._map, _TABLE_BYTES)
        pin = _Pin()
        pin.words, pin.free, pin.slot = self._pins, self._free, self._free.pop()
        pin.words[pin.slot] = offset
        if found != key or self._words[_TABLE_BYTES // 8 + pin.slot] != offset:
            return None
        return pa.foreign_buffer(self._address + offset, size, pin)

    def close(self) -> None:
        self._socket.close()
        self._file.close()


class Floor(Peer[bytes]):
    """Processes that share a file."""

    title = "floor of Python"
    imports = "import numpy, pyarrow"

    def version(self) -> str:
        return f"Python {python_version()}"

    @contextmanager
    def serve(self) -> Iterator[None]:
        yield

    def connect(self) -> FloorClient:
        return FloorClient(self.directory, self.capacity)
