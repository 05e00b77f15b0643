"""What a case may ask of a peer.

A method named after an operation prepares it and returns it as a function: the case times only that function.  What
a peer cannot do raises `UnsupportedError`, and its cell in the report stays empty.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from multiprocessing.connection import Connection

    import numpy as np
    from numpy.typing import NDArray

    Operation = Callable[[], object]
    Array = NDArray[np.float64]

__all__ = ["Client", "Peer", "UnsupportedError", "use"]

K = TypeVar("K")
"""What the peer itself names an object by."""


class UnsupportedError(Exception):
    """The peer has no such operation."""


def use(array: Array) -> float:
    """Touch both ends of an array, which shows that it can be used."""
    return float(array[0] + array[-1])


class Client(ABC, Generic[K]):
    """The connection of one process."""

    @abstractmethod
    def key(self, name: bytes) -> K:
        """Return the peer's own form of a name of 20 bytes."""

    @abstractmethod
    def drop(self, keys: Sequence[K]) -> None:
        """Remove the objects that are still there."""

    def store_object(self, key: K, value: object) -> None:
        """Store any Python value under a key."""
        raise UnsupportedError

    def store_array(self, key: K, array: Array) -> None:
        """Store an array the way that is read back fastest."""
        self.store_object(key, array)

    @abstractmethod
    def store_raw(self, key: K, data: bytes) -> None:
        """Store bytes under a key."""

    def get_raw(self, key: K) -> Operation:
        """Read bytes and let go of them."""
        raise UnsupportedError

    def get_many(self, keys: Sequence[K]) -> Operation:
        """Read the bytes of all keys at once and let go of them."""
        raise UnsupportedError

    def get_object(self, key: K) -> Operation:
        """Read a Python value."""
        raise UnsupportedError

    def get_array(self, key: K) -> Operation:
        """Read an array and use it."""
        raise UnsupportedError

    def contains(self, key: K) -> Operation:
        """Ask whether there is such an object."""
        raise UnsupportedError

    def get_missing(self, key: K) -> Operation:
        """Ask for an object that is not there, without waiting."""
        raise UnsupportedError

    def list_all(self) -> Operation:
        """List all objects with what is known of each."""
        raise UnsupportedError

    def put_raw(self, data: bytes) -> Callable[[], K]:
        """Store bytes under a fresh random key."""
        raise UnsupportedError

    def put_object(self, value: object) -> Callable[[], K]:
        """Store a Python value under a fresh random key."""
        raise UnsupportedError

    def put_array(self, array: Array) -> Callable[[], K]:
        """Store an array under a fresh random key."""
        return self.put_object(array)

    def create(self, data: bytes) -> Callable[[K], object]:
        """Store bytes under a chosen key that must be new."""
        raise UnsupportedError

    def hand_over(self, key: K, data: bytes, pipe: Connection) -> None:
        """Give bytes to the process that waits for them in `take_over` at the other end of `pipe`."""
        self.store_raw(key, data)

    def create_for(self, key: K, data: bytes) -> None:
        """Create the object that another process waits for in `take_over`, fill it, and seal it, in steps of its own."""
        raise UnsupportedError

    def take_over(self, key: K, pipe: Connection) -> object:
        """Wait until `hand_over` or `create_for` has stored the bytes, and read them."""
        raise UnsupportedError

    def close(self) -> None:
        """Disconnect."""


@dataclass(frozen=True)
class Peer(ABC, Generic[K]):
    """A kind of store; it can be pickled, so that any process can connect to the same one."""

    directory: str
    capacity: int

    title: ClassVar[str]
    imports: ClassVar[str]
    """What a program imports to use it."""

    def within(self, name: str) -> Self:
        """Return the same kind of store in a directory of its own, which is made."""
        directory = Path(self.directory, name)
        directory.mkdir(exist_ok=True)
        return replace(self, directory=str(directory))

    @abstractmethod
    def version(self) -> str:
        """Return the version of what is measured."""

    @abstractmethod
    def serve(self) -> AbstractContextManager[int | None]:
        """Start what serves the store, until it is ready; yields its process id, if there is one."""

    @abstractmethod
    def connect(self) -> Client[K]:
        """Return a new connection."""

    def half_message(self) -> tuple[str, bytes]:
        """Return the socket's path and the first half of a message's header."""
        raise UnsupportedError
