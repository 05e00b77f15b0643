"""The floor: what an operation takes in Python when all but its substance is left out.

No store, and nothing to build one on: it keeps no objects apart, checks nothing, and survives nothing.  What is left
is what no store in Python can do without:

* a get finds an entry by its hash, compares, pins and looks again, and makes a buffer that unpins (`shmplasma.pins`);
* a put draws an id, copies, and leaves a record in shared memory;
* a create is a message of the size of ours to another process in Python, and its answer, with both ends looking for 50 µs before
  they sleep (`shmplasma.spin`);
* a hand-over is such a message, and one from there to the process that waits;
* a large put is a copy, in parallel, to memory that this process has touched before.
"""

from __future__ import annotations

import mmap
import pickle
import selectors
import socket
import struct
import sys
import time
from contextlib import contextmanager, suppress
from os import urandom
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from benchmarks.peers.base import Client, Peer, UnsupportedError, use
from benchmarks.peers.servers import serving
from shmplasma.layout import align_up

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
_PINS: Final = 2048
_THREADS: Final = 2
_MESSAGE: Final = 64 * b"e"
_WAIT: Final = 64 * b"w"
_DATA: Final = _TABLE_BYTES + 8 * _PINS
_LOOK_SECONDS: Final = 50e-6


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
    """A table that all processes map, and a connection to the process that answers."""

    def __init__(self, directory: str, capacity: int) -> None:
        with open(f"{directory}/floor", "a+b") as file:
            file.truncate(_DATA + align_up(capacity, 8))
            self._map = mmap.mmap(file.fileno(), 0)
        self._data = np.frombuffer(self._map, np.uint8)[_DATA:]
        self._words = memoryview(self._map).cast("Q")
        self._pins = self._words[_TABLE_BYTES // 8 : _TABLE_BYTES // 8 + _PINS]
        self._free = list(range(_PINS))
        self._address = pa.py_buffer(self._map).address
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(f"{directory}/answers")

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
        self.store_raw(key, array.tobytes())

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
        return lambda: use(np.frombuffer(self._get(key)))

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
        target = pa.py_buffer(self._data[: source.size].data)

        def put() -> bytes:
            writer = pa.FixedSizeBufferWriter(target)
            writer.set_memcopy_threads(_THREADS)
            writer.write(source)
            return urandom(20)

        return put

    def create(self, data: bytes) -> Callable[[bytes], object]:
        def create(_: bytes) -> None:
            self._socket.send(_MESSAGE)
            self._answer()
            self._data[: len(data)] = np.frombuffer(data, np.uint8)

        return create

    def _answer(self) -> None:
        """Take one answer; look for it a while before going to sleep."""
        end = time.perf_counter() + _LOOK_SECONDS
        while time.perf_counter() < end:
            with suppress(BlockingIOError):
                self._socket.recv(64, socket.MSG_DONTWAIT)
                return
        self._socket.recv(64)

    def hand_over(self, key: bytes, data: bytes, pipe: Connection) -> None:
        self._socket.send(64 * b"h")

    def take_over(self, key: bytes, pipe: Connection) -> object:
        self._socket.send(_WAIT)
        return self._socket.recv(64)

    def close(self) -> None:
        self._socket.close()


class Floor(Peer[bytes]):
    """A process that answers, in Python."""

    title = "floor of Python"
    imports = "import numpy, pyarrow"

    def version(self) -> str:
        return f"Python {python_version()}"

    @contextmanager
    def serve(self) -> Iterator[None]:
        path = f"{self.directory}/answers"
        with serving([sys.executable, "-m", "benchmarks.peers.floor", path], path):
            yield

    def connect(self) -> FloorClient:
        return FloorClient(self.directory, self.capacity)


def _answer_all(path: str) -> None:
    """Answer each message, and pass on those for who waits."""
    waiting: socket.socket | None = None
    with selectors.DefaultSelector() as selector, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        selector.register(listener, selectors.EVENT_READ)
        while True:
            end = time.perf_counter() + _LOOK_SECONDS
            events = selector.select(0)
            while not events and time.perf_counter() < end:
                events = selector.select(0)
            for key, _ in events or selector.select():
                if key.fileobj is listener:
                    selector.register(listener.accept()[0], selectors.EVENT_READ)
                    continue
                assert isinstance(key.fileobj, socket.socket)
                message = key.fileobj.recv(64)
                if message.startswith(b"w"):
                    waiting = key.fileobj
                elif message.startswith(b"h"):
                    assert waiting is not None
                    waiting.send(message)
                elif message:
                    key.fileobj.send(message)
                else:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()


if __name__ == "__main__":
    Path(sys.argv[1]).unlink(missing_ok=True)
    _answer_all(sys.argv[1])
