"""`multiprocessing.shared_memory`: one named block for each object, and a pipe to tell others of it."""

from __future__ import annotations

from contextlib import nullcontext
from multiprocessing.shared_memory import SharedMemory
from os import urandom
from platform import python_version
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.peers.base import Client, Peer, use

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from multiprocessing.connection import Connection

    from benchmarks.peers.base import Array, Operation

__all__ = ["BlockClient", "SharedMemoryBlocks"]


class BlockClient(Client[str]):
    """Blocks need no connection.

    A block may be larger than what was stored, as it is made of pages, and does not say what it holds: a reader knows.
    """

    def key(self, name: bytes) -> str:
        return f"bench-{name.hex()}"

    def drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            block = SharedMemory(key)
            block.close()
            block.unlink()

    def store_raw(self, key: str, data: bytes) -> None:
        block = SharedMemory(key, create=True, size=len(data))
        _view(block)[: len(data)] = data
        block.close()

    def store_array(self, key: str, array: Array) -> None:
        block = SharedMemory(key, create=True, size=array.nbytes)
        np.ndarray(array.shape, array.dtype, _view(block))[:] = array
        block.close()

    def get_raw(self, key: str) -> Operation:
        return lambda: SharedMemory(key).close()

    def get_array(self, key: str) -> Operation:
        def get() -> None:
            block = SharedMemory(key)
            use(np.frombuffer(_view(block)))
            block.close()

        return get

    def put_raw(self, data: bytes) -> Callable[[], str]:
        def put() -> str:
            key = self.key(urandom(20))
            self.store_raw(key, data)
            return key

        return put

    def put_array(self, array: Array) -> Callable[[], str]:
        def put() -> str:
            key = self.key(urandom(20))
            self.store_array(key, array)
            return key

        return put

    def create(self, data: bytes) -> Callable[[str], object]:
        return lambda key: self.store_raw(key, data)

    def hand_over(self, key: str, data: bytes, pipe: Connection) -> None:
        self.store_raw(key, data)
        pipe.send(key)

    def take_over(self, key: str, pipe: Connection) -> object:
        block = SharedMemory(pipe.recv())
        data = bytes(_view(block))
        block.close()
        return data


def _view(block: SharedMemory) -> memoryview:
    assert block.buf is not None  # it is, once closed
    return block.buf


class SharedMemoryBlocks(Peer[str]):
    """No server: the kernel keeps the blocks."""

    title = "shared_memory"
    imports = "import multiprocessing.shared_memory"

    def version(self) -> str:
        return f"Python {python_version()}"

    def serve(self) -> AbstractContextManager[None]:
        return nullcontext()

    def connect(self) -> BlockClient:
        return BlockClient()
