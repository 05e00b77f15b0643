"""Pickling over a pipe to the process that has the data: what passing arguments to a worker process does."""

from __future__ import annotations

from contextlib import contextmanager
from multiprocessing import get_context
from os import urandom
from platform import python_version
from typing import TYPE_CHECKING, Any

from benchmarks.peers.base import Client, Peer, UnsupportedError, use

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from benchmarks.peers.base import Operation

__all__ = ["PicklePipe", "PipeClient"]

_pipes: dict[str, Connection] = {}
"""This process's ends, by directory: a pipe belongs to the two processes that it was made for."""


def _hold_objects(pipe: Connection) -> None:
    """Say that we are ready, and keep a dict for the process at the other end until it sends None."""
    objects: dict[bytes, object] = {}
    pipe.send(None)
    while (request := pipe.recv()) is not None:
        match request:
            case ("put", key, value):
                objects[key] = value
                pipe.send(None)
            case ("get", key):
                pipe.send(objects[key])
            case ("contains", key):
                pipe.send(key in objects)
            case ("drop", keys):
                for key in keys:
                    objects.pop(key, None)
                pipe.send(None)
            case _:
                raise ValueError(f"the holder of objects cannot {request}")


class PipeClient(Client[bytes]):
    """The end of the process that started the other."""

    def __init__(self, pipe: Connection | None) -> None:
        self._pipe = pipe

    def key(self, name: bytes) -> bytes:
        return name

    def drop(self, keys: Sequence[bytes]) -> None:
        self._ask("drop", keys)

    def store_raw(self, key: bytes, data: bytes) -> None:
        self._ask("put", key, data)

    def store_object(self, key: bytes, value: object) -> None:
        self._ask("put", key, value)

    def get_raw(self, key: bytes) -> Operation:
        return lambda: self._ask("get", key)

    def get_object(self, key: bytes) -> Operation:
        return lambda: self._ask("get", key)

    def get_array(self, key: bytes) -> Operation:
        return lambda: use(self._ask("get", key))

    def contains(self, key: bytes) -> Operation:
        return lambda: self._ask("contains", key)

    def put_raw(self, data: bytes) -> Callable[[], bytes]:
        return self.put_object(data)

    def put_object(self, value: object) -> Callable[[], bytes]:
        def put() -> bytes:
            key = urandom(20)
            self._ask("put", key, value)
            return key

        return put

    def hand_over(self, key: bytes, data: bytes, pipe: Connection) -> None:
        pipe.send(data)

    def take_over(self, key: bytes, pipe: Connection) -> object:
        return pipe.recv()

    def _ask(self, *request: object) -> Any:
        if self._pipe is None:
            raise UnsupportedError
        self._pipe.send(request)
        return self._pipe.recv()


class PicklePipe(Peer[bytes]):
    """Two processes and no more."""

    title = "pickle over a pipe"
    imports = "import multiprocessing.connection"

    def version(self) -> str:
        return f"Python {python_version()}"

    @contextmanager
    def serve(self) -> Iterator[int | None]:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        with ours, theirs:
            holder = context.Process(target=_hold_objects, args=(theirs,))
            holder.start()
            ours.recv()
            _pipes[self.directory] = ours
            yield holder.pid
            del _pipes[self.directory]
            ours.send(None)
            holder.join()

    def connect(self) -> PipeClient:
        return PipeClient(_pipes.get(self.directory))
