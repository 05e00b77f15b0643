"""Redis over its unix socket, values pickled."""

from __future__ import annotations

import pickle
import shutil
import subprocess
from os import urandom
from typing import TYPE_CHECKING, Any

import numpy as np
import redis

from benchmarks.peers.base import Client, Peer, use
from benchmarks.peers.servers import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from multiprocessing.connection import Connection

    from benchmarks.peers.base import Array, Operation

__all__ = ["Redis", "RedisClient"]

_DELETE_AT_ONCE = 1000


class RedisClient(Client[bytes]):
    """One connection."""

    def __init__(self, path: str) -> None:
        self._redis: Any = redis.Redis(unix_socket_path=path)
        self._redis.ping()

    def key(self, name: bytes) -> bytes:
        return name

    def drop(self, keys: Sequence[bytes]) -> None:
        for start in range(0, len(keys), _DELETE_AT_ONCE):
            self._redis.delete(*keys[start : start + _DELETE_AT_ONCE])

    def store_raw(self, key: bytes, data: bytes) -> None:
        self._redis.set(key, data)

    def store_object(self, key: bytes, value: object) -> None:
        self._redis.set(key, pickle.dumps(value, protocol=5))

    def store_array(self, key: bytes, array: Array) -> None:
        self._redis.set(key, array.data.cast("B"))

    def get_raw(self, key: bytes) -> Operation:
        get = self._redis.get
        return lambda: get(key)

    def get_many(self, keys: Sequence[bytes]) -> Operation:
        mget, names = self._redis.mget, list(keys)
        return lambda: mget(names)

    def get_object(self, key: bytes) -> Operation:
        get = self._redis.get
        return lambda: pickle.loads(get(key))

    def get_array(self, key: bytes) -> Operation:
        get = self._redis.get
        return lambda: use(np.frombuffer(get(key)))

    def contains(self, key: bytes) -> Operation:
        exists = self._redis.exists
        return lambda: exists(key)

    def put_raw(self, data: bytes) -> Callable[[], bytes]:
        return self._put(lambda: data)

    def put_object(self, value: object) -> Callable[[], bytes]:
        return self._put(lambda: pickle.dumps(value, protocol=5))

    def put_array(self, array: Array) -> Callable[[], bytes]:
        return self._put(lambda: array.data.cast("B"))

    def create(self, data: bytes) -> Callable[[bytes], object]:
        redis_set = self._redis.set
        return lambda key: redis_set(key, data, nx=True)

    def hand_over(self, key: bytes, data: bytes, pipe: Connection) -> None:
        self._redis.rpush(key, data)

    def take_over(self, key: bytes, pipe: Connection) -> object:
        return self._redis.blpop([key])

    def close(self) -> None:
        self._redis.close()

    def _put(self, encode: Callable[[], bytes | memoryview]) -> Callable[[], bytes]:
        redis_set = self._redis.set

        def put() -> bytes:
            key = urandom(20)
            redis_set(key, encode())
            return key

        return put


class Redis(Peer[bytes]):
    """A server of its own, nothing written to disk."""

    title = "Redis"
    imports = "import redis"

    @property
    def _socket(self) -> str:
        return f"{self.directory}/redis"

    def version(self) -> str:
        program = self._program()
        words = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        return next(word for word in words.stdout.split() if word.startswith("v=")).replace(
            "v=", "redis "
        )

    def serve(self) -> AbstractContextManager[int]:
        memory_only = ["--port", "0", "--save", "", "--appendonly", "no", "--dir", self.directory]
        return serving([self._program(), "--unixsocket", self._socket, *memory_only], self._socket)

    def connect(self) -> RedisClient:
        return RedisClient(self._socket)

    def half_message(self) -> tuple[str, bytes]:
        return self._socket, b"*2\r\n$6\r\nEXI"

    @staticmethod
    def _program() -> str:
        program = shutil.which("redis-server")
        if program is None:
            raise ModuleNotFoundError("redis-server is not installed")
        return program
