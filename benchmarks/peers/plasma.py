"""Plasma and shmplasma: the same code for both, as it is the same API."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.peers.base import Client, Peer, use
from benchmarks.peers.servers import serving

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from multiprocessing.connection import Connection

    from benchmarks.peers.base import Operation

__all__ = ["Plasma11", "PlasmaClient", "ShmPlasma"]

_DELETE_AT_ONCE = 1000


class PlasmaClient(Client[Any]):
    """A connection of either module."""

    def __init__(self, module_name: str, path: str) -> None:
        module = import_module(module_name)
        self._object_id = module.ObjectID
        self._client = module.connect(path)

    def key(self, name: bytes) -> Any:
        return self._object_id(name)

    def drop(self, keys: Sequence[Any]) -> None:
        for start in range(0, len(keys), _DELETE_AT_ONCE):
            self._client.delete(list(keys[start : start + _DELETE_AT_ONCE]))

    def store_raw(self, key: Any, data: bytes) -> None:
        self._client.put_raw_buffer(data, key)

    def store_object(self, key: Any, value: object) -> None:
        self._client.put(value, key)

    def get_raw(self, key: Any) -> Operation:
        return self.get_many([key])

    def get_many(self, keys: Sequence[Any]) -> Operation:
        get_buffers, ids = self._client.get_buffers, list(keys)
        return lambda: get_buffers(ids)

    def get_object(self, key: Any) -> Operation:
        get = self._client.get
        return lambda: get(key)

    def get_array(self, key: Any) -> Operation:
        get = self._client.get
        return lambda: use(get(key))

    def contains(self, key: Any) -> Operation:
        contains = self._client.contains
        return lambda: contains(key)

    def get_missing(self, key: Any) -> Operation:
        get_buffers, ids = self._client.get_buffers, [key]
        return lambda: get_buffers(ids, timeout_ms=0)

    def list_all(self) -> Operation:
        operation: Operation = self._client.list
        return operation

    def put_raw(self, data: bytes) -> Callable[[], Any]:
        put_raw_buffer = self._client.put_raw_buffer
        return lambda: put_raw_buffer(data)

    def put_object(self, value: object) -> Callable[[], Any]:
        put = self._client.put
        return lambda: put(value)

    def create(self, data: bytes) -> Callable[[Any], object]:
        create, seal, size = self._client.create, self._client.seal, len(data)

        def create_and_seal(key: Any) -> None:
            memoryview(create(key, size)).cast("B")[:] = data
            seal(key)

        return create_and_seal

    def create_for(self, key: Any, data: bytes) -> None:
        self.create(data)(key)

    def take_over(self, key: Any, pipe: Connection) -> object:
        return self._client.get_buffers([key])

    def close(self) -> None:
        self._client.disconnect()


class _PlasmaLike(Peer[Any]):
    module: ClassVar[str]
    program: ClassVar[str]

    @property
    def _socket(self) -> str:
        return f"{self.directory}/plasma"

    def serve(self) -> AbstractContextManager[int]:
        program = str(Path(sys.executable).with_name(self.program))
        return serving([program, "-m", str(self.capacity), "-s", self._socket], self._socket)

    def connect(self) -> PlasmaClient:
        return PlasmaClient(self.module, self._socket)


class ShmPlasma(_PlasmaLike):
    """The project itself."""

    title = "shmplasma"
    imports = "import shmplasma as plasma; plasma.connect, plasma.ObjectID"
    module = "shmplasma"
    program = "shmplasma-store"

    def version(self) -> str:
        from importlib.metadata import version  # noqa: PLC0415 - beside its only use

        return version("shmplasma")

    def half_message(self) -> tuple[str, bytes]:
        # Its header is 12 bytes: length of the body, request id, kind, zeros.
        return self._socket, b"\x10\x00\x00\x00\x01\x00"


class Plasma11(_PlasmaLike):
    """The last Plasma that a current Python can install."""

    title = "Plasma 11"
    imports = "import pyarrow.plasma as plasma; plasma.connect, plasma.ObjectID"
    module = "pyarrow.plasma"
    program = "plasma_store"

    def version(self) -> str:
        return f"pyarrow {import_module('pyarrow').__version__}"

    def half_message(self) -> tuple[str, bytes]:
        # Its header is three 8-byte integers, the protocol's version first, which is 0.
        return self._socket, bytes(12)
