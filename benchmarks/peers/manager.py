"""A dict in a `multiprocessing` manager: what the standard library offers for sharing objects by name."""

from __future__ import annotations

from contextlib import contextmanager
from multiprocessing import active_children, get_context
from multiprocessing.managers import BaseManager, DictProxy
from os import urandom
from platform import python_version
from queue import Queue
from typing import TYPE_CHECKING

from benchmarks.peers.base import Client, Peer, use

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from benchmarks.peers.base import Operation

__all__ = ["ManagerClient", "ManagerDict"]

_AUTHKEY = b"benchmark"
_objects: dict[bytes, object] = {}
_handed_over: Queue[bytes] = Queue()


def _the_objects() -> dict[bytes, object]:
    return _objects


def _the_queue() -> Queue[bytes]:
    return _handed_over


class _Manager(BaseManager):
    if TYPE_CHECKING:

        def objects(self) -> DictProxy[bytes, object]: ...
        def queue(self) -> Queue[bytes]: ...


_Manager.register("objects", callable=_the_objects, proxytype=DictProxy)
_Manager.register("queue", callable=_the_queue)


class ManagerClient(Client[bytes]):
    """Proxies of the manager's dict and queue."""

    def __init__(self, address: str) -> None:
        manager = _Manager(address=address, authkey=_AUTHKEY)
        manager.connect()
        self._objects = manager.objects()
        self._queue = manager.queue()

    def key(self, name: bytes) -> bytes:
        return name

    def drop(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._objects.pop(key, None)

    def store_raw(self, key: bytes, data: bytes) -> None:
        self._objects[key] = data

    def store_object(self, key: bytes, value: object) -> None:
        self._objects[key] = value

    def get_raw(self, key: bytes) -> Operation:
        return self.get_object(key)

    def get_object(self, key: bytes) -> Operation:
        get = self._objects.__getitem__
        return lambda: get(key)

    def get_array(self, key: bytes) -> Operation:
        get = self._objects.__getitem__
        return lambda: use(get(key))  # type: ignore[arg-type]  # the case has stored an array

    def contains(self, key: bytes) -> Operation:
        contains = self._objects.__contains__
        return lambda: contains(key)

    def put_raw(self, data: bytes) -> Callable[[], bytes]:
        return self.put_object(data)

    def put_object(self, value: object) -> Callable[[], bytes]:
        store = self._objects.__setitem__

        def put() -> bytes:
            key = urandom(20)
            store(key, value)
            return key

        return put

    def create(self, data: bytes) -> Callable[[bytes], object]:
        setdefault = self._objects.setdefault
        return lambda key: setdefault(key, data)

    def hand_over(self, key: bytes, data: bytes, pipe: Connection) -> None:
        self._queue.put(data)

    def take_over(self, key: bytes, pipe: Connection) -> object:
        return self._queue.get()


class ManagerDict(Peer[bytes]):
    """The manager is a process of its own."""

    title = "Manager dict"
    imports = "import multiprocessing.managers"

    @property
    def _socket(self) -> str:
        return f"{self.directory}/manager"

    def version(self) -> str:
        return f"Python {python_version()}"

    @contextmanager
    def serve(self) -> Iterator[int | None]:
        before = set(active_children())
        with _Manager(address=self._socket, authkey=_AUTHKEY, ctx=get_context("spawn")):
            yield next(child.pid for child in active_children() if child not in before)

    def connect(self) -> ManagerClient:
        return ManagerClient(self._socket)
