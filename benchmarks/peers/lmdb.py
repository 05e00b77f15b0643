"""LMDB on a tmpfs: a B-tree in memory that every process maps, with one lock for writers and none for readers."""

from __future__ import annotations

import pickle
import time
from contextlib import nullcontext
from os import urandom
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb
import numpy as np

from benchmarks.peers.base import Client, Peer, use

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from multiprocessing.connection import Connection

    from benchmarks.peers.base import Array, Operation

__all__ = ["Lmdb", "LmdbClient"]

_POLL_SECONDS = 50e-6


class LmdbClient(Client[bytes]):
    """One environment: a process may open it once."""

    def __init__(self, path: str, capacity: int) -> None:
        # A tmpfs has nothing to sync; pages freed by a transaction can be used by the one after the next.
        self._env: Any = lmdb.open(
            path, map_size=2 * capacity, sync=False, writemap=True, max_readers=64
        )

    def key(self, name: bytes) -> bytes:
        return name

    def drop(self, keys: Sequence[bytes]) -> None:
        with self._env.begin(write=True) as txn:
            for key in keys:
                txn.delete(key)

    def store_raw(self, key: bytes, data: bytes) -> None:
        with self._env.begin(write=True) as txn:
            txn.put(key, data)

    def store_object(self, key: bytes, value: object) -> None:
        self.store_raw(key, pickle.dumps(value, protocol=5))

    def store_array(self, key: bytes, array: Array) -> None:
        with self._env.begin(write=True) as txn:
            txn.put(key, array.data)

    def get_raw(self, key: bytes) -> Operation:
        begin = self._env.begin

        def get() -> None:
            with begin(buffers=True) as txn:
                txn.get(key)

        return get

    def get_many(self, keys: Sequence[bytes]) -> Operation:
        begin = self._env.begin

        def get() -> None:
            with begin(buffers=True) as txn:
                for key in keys:
                    txn.get(key)

        return get

    def get_object(self, key: bytes) -> Operation:
        begin = self._env.begin

        def get() -> object:
            with begin(buffers=True) as txn:
                return pickle.loads(txn.get(key))

        return get

    def get_array(self, key: bytes) -> Operation:
        begin = self._env.begin

        def get() -> float:
            with begin(buffers=True) as txn:
                return use(np.frombuffer(txn.get(key)))

        return get

    def contains(self, key: bytes) -> Operation:
        begin = self._env.begin

        def contains() -> bool:
            with begin(buffers=True) as txn:
                return txn.get(key) is not None

        return contains

    def put_raw(self, data: bytes) -> Callable[[], bytes]:
        return self._put(lambda: data)

    def put_object(self, value: object) -> Callable[[], bytes]:
        return self._put(lambda: pickle.dumps(value, protocol=5))

    def put_array(self, array: Array) -> Callable[[], bytes]:
        return self._put(lambda: array.data)

    def create(self, data: bytes) -> Callable[[bytes], object]:
        begin = self._env.begin

        def create(key: bytes) -> bool:
            with begin(write=True) as txn:
                added: bool = txn.put(key, data, overwrite=False)
                return added

        return create

    def take_over(self, key: bytes, pipe: Connection) -> object:
        while True:
            with self._env.begin(buffers=True) as txn:
                if (found := txn.get(key)) is not None:
                    return bytes(found)
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        self._env.close()

    def _put(self, encode: Callable[[], object]) -> Callable[[], bytes]:
        begin = self._env.begin

        def put() -> bytes:
            key = urandom(20)
            with begin(write=True) as txn:
                txn.put(key, encode())
            return key

        return put


class Lmdb(Peer[bytes]):
    """No server: every process opens the files."""

    title = "LMDB"
    imports = "import lmdb"

    def version(self) -> str:
        return f"lmdb {lmdb.__version__}"

    def serve(self) -> AbstractContextManager[None]:
        return nullcontext()

    def connect(self) -> LmdbClient:
        path = Path(self.directory, "lmdb")
        path.mkdir(exist_ok=True)
        return LmdbClient(str(path), self.capacity)
