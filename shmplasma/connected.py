"""What every part of a client stands on: a session that lasts as long as the client wants it."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from contextlib import suppress
from math import isfinite, isnan
from operator import index
from typing import Final, Self, SupportsIndex

import numpy as np

from shmplasma.arrow_errors import NotConnectedError
from shmplasma.endpoint import fault_of
from shmplasma.nesting import NESTED, is_inside
from shmplasma.notifications import Subscription
from shmplasma.objects import ObjectID
from shmplasma.requests import MAX_NAME_BYTES, SetOptions
from shmplasma.session import Session

__all__ = [
    "DEFAULT_RETRIES",
    "Connected",
    "checked",
    "lasting",
    "program_name",
    "wait_seconds",
    "whole_number",
]

DEFAULT_RETRIES: Final = 80
"""8 seconds of attempts, as in Plasma."""

_LONGEST_MS: Final = 10**9
"""Beyond these eleven days, which the system's calls can still count, a wait is without an end."""

_CONNECTING: Final = frozenset({"_live"})
_DISCONNECTED: Final = "this client is disconnected; shmplasma.connect makes a new one"

_clients: weakref.WeakSet[Connected] = weakref.WeakSet()


class Connected:
    """The connection of a client: made, closed, pickled, made anew in a forked child or when the store is another.

    Parameters
    ----------
    store_socket_name : str
        Path of the store's socket.
    num_retries : int
        How often to try again, 0.1 s apart, while no store answers.
    """

    def __init__(self, store_socket_name: str, num_retries: int) -> None:
        self._given_path = store_socket_name
        self._path = lasting(store_socket_name)
        self._left = False
        self._session: Session | None = self._open(num_retries)
        self._capacity = self._session.layout.capacity
        self._options: SetOptions | None = None
        self._subscription: Subscription | None = None
        self._forget()
        _clients.add(self)

    def _forget(self) -> None:
        """Begin without anything that belongs to a session."""
        self._unsealed: set[bytes] = set()
        self._connecting = threading.Lock()

    def _open(self, num_retries: int) -> Session:
        return Session.open(self._path, num_retries, program_name(), weakref.WeakMethod(self._lose))

    def _lose(self) -> None:
        """Connect anew at the next use: the store has gone for good, and all that was in it."""
        self._session = None

    @property
    def store_socket_name(self) -> str:
        """The path of the store's socket, as it was given."""
        return self._given_path

    @property
    def socket_path(self) -> str:
        """The same, as it is connected to from wherever this process is."""
        return self._path

    def disconnect(self) -> None:
        """Leave the store: what is not sealed goes; buffers that were got stay valid.

        May be called again.
        """
        self._left = True  # before it is looked for a session, as `_live` looks for this after it has made one
        session, self._session = self._session, None
        if session is not None:
            session.detach()
        self._unsubscribe()

    def _unsubscribe(self) -> None:
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def __reduce__(self) -> tuple[type[Self], tuple[str, int]]:
        return type(self), (self._path, DEFAULT_RETRIES)

    def __repr__(self) -> str:
        state = ", disconnected" if self._left else ""
        return f"{type(self).__name__}({self._path!r}{state})"

    def _live(self) -> Session:
        """Return the session, a new one where it has to be; raise when there is none.

        Raises
        ------
        NotConnectedError
            The client is disconnected, perhaps by another thread at this moment; or no store answers.
        RuntimeError
            A call of this thread was interrupted in it.
        """
        session = self._session
        if session is not None:
            return session
        if self._connecting.locked() and is_inside(self, _CONNECTING):
            raise RuntimeError(NESTED)
        with self._connecting:
            session = self._session
            if session is None:
                if self._left:
                    raise NotConnectedError(_DISCONNECTED)
                session = self._open(0)
                if self._options is not None:
                    session.set_options(self._options)
                self._unsealed = set()
                self._session = session
                if self._has_left():  # meanwhile, in another thread
                    self._session = None
                    session.detach()
                    raise NotConnectedError(_DISCONNECTED)
            return session

    def _has_left(self) -> bool:
        return self._left

    def leave_to_parent(self) -> None:
        """Leave, in a forked child, the parent's session and subscription to the parent."""
        self._session = None
        self._forget()
        self._unsubscribe()


def lasting(path: str) -> str:
    """Return a path of a socket that outlasts a change of the directory, unless it is too long, or closed to this user."""
    absolute = os.path.abspath(path)
    with suppress(FileNotFoundError, ValueError):  # it need not be there yet
        try:
            os.stat(absolute)
        except PermissionError:  # of a directory above this one
            return path
    return absolute if path and not fault_of(absolute) else path


def wait_seconds(timeout_ms: float | None) -> float | None:
    """Return how long to wait, in seconds; None without an end.

    None and -1 are without an end.  Other negative numbers are what is left of a time that is over.

    Raises
    ------
    TypeError, ValueError
        It is no number.
    """
    if timeout_ms is None:
        return None
    if not isinstance(timeout_ms, (int, float, np.number)):
        raise TypeError(f"timeout_ms is a number or None, not {type(timeout_ms).__name__}")
    if isnan(timeout_ms):
        raise ValueError("timeout_ms is not a number")
    if timeout_ms == -1 or timeout_ms > _LONGEST_MS:
        return None
    return max(0.0, float(timeout_ms / 1000))


def whole_number(number: SupportsIndex | float, unit: str = "bytes") -> int:
    """Return a number of bytes, or of something else; of a float what is before the point, as Plasma takes it.

    Raises
    ------
    TypeError, ValueError
        It is no number, or not a finite one.
    """
    if not isinstance(number, (float, np.floating)):
        try:
            return index(number)
        except TypeError:
            raise TypeError(
                f"a number of {unit} is needed here, not {type(number).__name__}"
            ) from None
    if not isfinite(number):
        raise ValueError(f"there are no {number} {unit}")
    return int(number)


def checked(object_id: ObjectID) -> ObjectID:
    """Return an id that is one; raise TypeError for anything else."""
    if not isinstance(object_id, ObjectID):
        raise TypeError(
            f"an ObjectID is needed here, not {type(object_id).__name__}; ObjectID(data) makes one of 20 bytes"
        )
    return object_id


def program_name() -> str:
    """Return what a store calls a client that has not named itself."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return name.encode(errors="replace")[:MAX_NAME_BYTES].decode(errors="ignore")


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client.leave_to_parent()


os.register_at_fork(after_in_child=_after_fork_in_child)
