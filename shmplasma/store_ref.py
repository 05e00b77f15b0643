"""Handles that own an object of a store: `StoreRef` (`shmplasma.references` has the argument).

All handles of one process to one store stand on one connection, the process's *home* at that store, whatever client
they were made by.  It is made when the first of them is, and closed with the last; so a handle outlives the client that
made it, and one that is unpickled needs none.  A handle tells the store when it begins and when it ends, by messages
that nobody waits for.

Two words are to be kept in step when a store dies: what this process holds, and what the store was told.  `Home._held` has the
first.  A hold is in it before the store is told that it begins, and is taken out before the store is told that it ends;
who connects to a successor, or anew, tells it all of `_held`, and then the end of whatever is not in it any more
(`shmplasma.link`, `Home._open`).

A forked child has the handles of its parent, and becomes their holder at once, by a connection of its own.  What another thread
of the parent receives and drops again while the process forks is not protected for the child.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import Any, Final, Self

import pyarrow as pa

from shmplasma.arrow_errors import NotConnectedError, PlasmaObjectNotFound
from shmplasma.connected import DEFAULT_RETRIES
from shmplasma.errors import ShmPlasmaError
from shmplasma.layout import REFERENCED
from shmplasma.lending import LENDERS, Loans
from shmplasma.nesting import NESTED, is_inside
from shmplasma.objects import ObjectID, fresh_id
from shmplasma.posted import Lend, Redeem, Release
from shmplasma.reading import Mode, ObjectNotAvailable, Reading
from shmplasma.replies import Done
from shmplasma.requests import MAX_HOLDS, Bequeath, Flush, Hold, holds_told
from shmplasma.serialization import SerializationContext, deserialize, serialize
from shmplasma.session import Session
from shmplasma.writing import Writing

__all__ = ["Home", "Loan", "StoreRef", "home_of"]

_CONNECTING: Final = frozenset({"home_of"})


class Home(Reading, Writing):
    """What all handles of this process to one store stand on; use `home_of`.

    Parameters
    ----------
    path : str
        The store's socket.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, path: str) -> None:
        self._held: set[tuple[bytes, int]] = set()
        self._numbers = count(1)
        self._tickets: list[int] = []
        self._dropped: Session | None = None
        self._refs: weakref.WeakValueDictionary[bytes, StoreRef] = weakref.WeakValueDictionary()
        super().__init__(path, DEFAULT_RETRIES)

    def _open(self, num_retries: int) -> Session:
        session = super()._open(num_retries)
        session.restate(weakref.WeakMethod(self._holds))
        told = self._holds()
        for request in holds_told(told):
            session.call(request, Done)
        while self._tickets:
            session.call(Hold(self._tickets[-1], ()), Done)
            self._tickets.pop()
        self._session = session  # from here on `end` tells it
        self._dropped = None
        for hold in set(told) - self._held:
            session.post_soon(Release.KIND, Release(*hold).encode())
        return session

    def _lose(self) -> None:
        session = self._session
        if session is not None and session.was_dropped:
            # The objects are held by it until another one has told of them.
            self._dropped = session
        super()._lose()

    def _holds(self) -> Sequence[tuple[bytes, int]]:
        return tuple(self._held)

    def put_ref(
        self,
        value: object,
        threads: int = 6,
        context: SerializationContext | None = None,
        timeout_ms: float | None = 0,
    ) -> StoreRef:
        """Store a value and return what owns it; errors as `PlasmaClient.put`."""
        payload = serialize(value, context)
        ref = StoreRef(self, fresh_id(), 0)
        try:
            self._put(
                payload,
                ref.object_id,
                b"",
                threads,
                timeout_ms=timeout_ms,
                flags=REFERENCED,
                fresh=True,
            )
        except BaseException:
            ref.release()
            raise
        return ref

    def renew(self) -> None:
        """Turn to the successor of a store that has ended; else the next request would only say that it has."""
        session = self._session
        if session is not None and not session.is_quiet:
            try:
                session.call(Flush(), Done)
            except NotConnectedError:
                if self._session is session:  # it may come back
                    raise

    def begin(self, object_id: ObjectID, number: int) -> None:
        """Take note of a handle."""
        self._held.add((object_id.id_bytes, number))

    def buffer(self, ref: StoreRef) -> tuple[pa.Buffer, int]:
        """Return the data of a handle's object, which keeps the handle, and its codec.

        Raises
        ------
        PlasmaObjectNotFound
            It is gone.
        """
        session = self._live()
        (got,) = self._locate(session, (ref.object_id,), 0)
        if got is None:
            raise ref.gone()
        offset, size, _, codec, pin = got
        self._refs[ref.object_id.id_bytes] = ref
        return pa.foreign_buffer(session.address + offset, size, (pin, ref)), codec

    def owner_of(self, address: int, size_bytes: int) -> tuple[StoreRef, int] | None:
        """Return the handle whose `buffer` covers these bytes, and where in it they begin; None if there is none.

        Notes
        -----
        Goes by this process's pins: what a living buffer shows is pinned, and so is where it was.  O(pins).
        """
        self.renew()
        session = self._session
        if session is None:
            return None
        for object_id, offset, data_size in session.pinned_at(address):
            ref = self._refs.get(object_id)
            start = address - session.address - offset
            if ref is not None and ref.is_held and start + size_bytes <= data_size:
                return ref, start
        return None

    def give_back(self, address: int, size_bytes: int) -> int:
        """Take pages of the store out of this process, until it touches them again; return how many bytes.

        Parameters
        ----------
        address, size_bytes : int
            A range of memory; what of it is not the store's is left alone.
        """
        session = self._session
        return 0 if session is None else session.give_back(address, size_bytes)

    @property
    def identity(self) -> str:
        """What no other store has."""
        return self._live().attachment.token.hex()

    def end(self, object_id: ObjectID, number: int) -> bool:
        """Tell the store that a handle has ended; False if it had ended before.  For finalizers, too."""
        hold = object_id.id_bytes, number
        try:
            self._held.remove(hold)
        except KeyError:
            return False
        session = self._session
        if session is not None:
            session.post_soon(Release.KIND, Release(*hold).encode())
        return True

    def lend(self, object_id: ObjectID, ticket: int, receivers: int) -> None:
        """Announce that a handle is to leave this process, with a new ticket."""
        self._live().post(Lend.KIND, Lend(object_id.id_bytes, ticket, receivers).encode())

    def receive(self, object_id: ObjectID, ticket: int) -> StoreRef:
        """Return a handle that has come with a ticket."""
        self.renew()
        number = next(self._numbers)
        ref = StoreRef(self, object_id, number)
        self._live().post(Redeem.KIND, Redeem(object_id.id_bytes, ticket, number).encode())
        return ref

    def bequeath(self) -> list[int]:
        """Lend all that this process holds to a child; return the tickets."""
        session = self._session
        object_ids = list({object_id for object_id, _ in self._holds()})
        tickets: list[int] = []
        if session is not None:
            for start in range(0, len(object_ids), MAX_HOLDS):
                tickets.append(_new_ticket())
                lent = object_ids[start : start + MAX_HOLDS]
                session.call(Bequeath(tickets[-1], lent), Done)
        return tickets

    def inherit(self, tickets: list[int]) -> None:
        """Hold, in a forked child, what the parent has lent."""
        self._tickets = tickets
        self._live()


class StoreRef:
    """A handle that owns an object of a store; made by `PlasmaClient.put_ref`.

    The object stays as long as there is a handle of it, in whatever process: until then it is not evicted, and is
    deleted only by an explicit `delete`.  It goes with the last handle.  A handle can be pickled, and so can be sent to
    any process of the machine by whatever takes pickles; one that is on its way counts.

    Attributes
    ----------
    object_id : ObjectID
        The object's name, for whoever has a client.

    Notes
    -----
    Thread-safe, and safe to fork.  A context manager: leaving it releases the handle.

    A handle that was sent and is never received counts until 600 seconds (``--ticket-seconds`` of the store) after the
    process that sent it has gone; from 600 seconds after it was sent, it no longer keeps the object from being evicted.
    """

    __slots__ = ("__weakref__", "_home", "_number", "object_id")

    def __init__(self, home: Home, object_id: ObjectID, number: int) -> None:
        self._home = home
        self._number = number
        self.object_id: Final = object_id
        home.begin(object_id, number)

    @property
    def store_socket_name(self) -> str:
        """The path of the store's socket."""
        return self._home.store_socket_name

    def get(
        self,
        serialization_context: SerializationContext | None = None,
        *,
        mode: Mode = "view",
    ) -> Any:
        """Return the object's value.

        Parameters
        ----------
        serialization_context : SerializationContext, optional
            As for `PlasmaClient.put`.
        mode : {"view", "copy", "cow"}, optional
            As for `PlasmaClient.get`.

        Returns
        -------
        object
            Arrays in it are read-only and lie in the store, unless `mode` says otherwise.  Such a view keeps the
            handle, and so the object, for as long as it lives.

        Raises
        ------
        PlasmaObjectNotFound
            The object was deleted, or lost with its store.
        ValueError
            This handle was released.

        Notes
        -----
        No message, as for `PlasmaClient.get`.
        """
        self._check()
        if mode == "view":
            buffer, codec = self._home.buffer(self)
            return deserialize(buffer, codec, serialization_context)
        value = self._home.get(self.object_id, 0, serialization_context, mode=mode)
        if value is ObjectNotAvailable:
            raise self.gone()
        return value

    def buffer(self) -> pa.Buffer:
        """Return the object's data; it keeps the handle."""
        self._check()
        return self._home.buffer(self)[0]

    def gone(self) -> PlasmaObjectNotFound:
        """Return what is to be said when the object is not there."""
        return PlasmaObjectNotFound(
            f"the object {self.object_id.binary().hex()} of this reference is gone: it was deleted, or its store was "
            "started anew, or this is a second copy of a reference that nobody held meanwhile; put the "
            "value again, and keep a reference until all copies have arrived, or send ref.lend(receivers)"
        )

    def lend(self, receivers: int) -> Loan:
        """Return what is to be sent instead of the handle if it is pickled once and unpickled `receivers` times.

        The pickle of a handle itself may be unpickled more than once too; but then the object stays only while somebody
        has a handle, and for 5 seconds after each unpickling.

        Parameters
        ----------
        receivers : int
            How often the pickle will be unpickled; each time gives a handle.

        Raises
        ------
        ValueError
            `receivers` is below 1.
        """
        self._check()
        if not 1 <= receivers < 1 << 32:
            raise ValueError(f"a reference cannot be lent to {receivers} receivers")
        return Loan(self, receivers)

    def release(self) -> None:
        """Let go of the object, as the end of the handle does; may be called more than once."""
        self._home.end(self.object_id, self._number)
        self._number = -1

    @property
    def is_held(self) -> bool:
        """Whether this handle was not released."""
        return self._number >= 0

    def _check(self) -> None:
        if not self.is_held:
            raise ValueError("this reference was released; put the value again, or keep it longer")

    def reduce(self, receivers: int, loans: Loans | None = None) -> tuple[Any, ...]:
        """Return what a pickle for so many receivers holds, 0 if nobody knows; it has to leave this process.

        It is lent at once, or by what is added to `loans`, when that is called.
        """
        self._check()
        ticket = _new_ticket()
        if loans is None:
            self._lend(ticket, receivers)
        else:
            loans.append(partial(self._lend, ticket, receivers))
        return _receive, (self._home.store_socket_name, self.object_id.binary(), ticket)

    def _lend(self, ticket: int, receivers: int) -> None:
        self._check()  # another thread may have released it meanwhile
        self._home.lend(self.object_id, ticket, receivers)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduce(0)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoreRef) and self.object_id == other.object_id

    def __hash__(self) -> int:
        return hash(self.object_id)

    def __repr__(self) -> str:
        return (
            f"StoreRef({self.object_id.binary().hex()[:12]}...{', released' * (self._number < 0)})"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self._home.end(self.object_id, self._number)


class Loan:
    """A `StoreRef` that is to be unpickled a known number of times; see `StoreRef.lend`."""

    __slots__ = ("_receivers", "_ref")

    def __init__(self, ref: StoreRef, receivers: int) -> None:
        self._ref = ref
        self._receivers = receivers

    def reduce(self, loans: Loans | None = None) -> tuple[Any, ...]:
        """Return what a pickle holds, as `StoreRef.reduce`."""
        return self._ref.reduce(self._receivers, loans)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduce()


LENDERS[StoreRef] = lambda ref, loans: ref.reduce(0, loans)
LENDERS[Loan] = Loan.reduce


def home_of(path: str) -> Home:
    """Return this process's home at the store of a socket, made if there is none.

    Raises
    ------
    NotConnectedError
        No store answers there.
    RuntimeError
        A call of this thread was interrupted in it.
    """
    return _registry.home_of(os.path.abspath(path))


def _receive(path: str, object_id: bytes, ticket: int) -> StoreRef:
    """Return the handle of a pickle, which names this function."""
    return home_of(path).receive(ObjectID(object_id), ticket)


def _new_ticket() -> int:
    return int.from_bytes(os.urandom(8), "little") | 1


class _Registry:
    """The homes of this process, by path; each lasts as long as somebody has it."""

    def __init__(self) -> None:
        self.homes: weakref.WeakValueDictionary[str, Home] = weakref.WeakValueDictionary()
        self.lock = threading.Lock()
        self.lent: dict[int, list[tuple[Home, list[int]]]] = {}  # by the thread that forks

    def home_of(self, path: str) -> Home:
        """Return the home at the store of a socket, made if there is none."""
        if self.lock.locked() and is_inside(self, _CONNECTING):
            raise RuntimeError(NESTED)
        with self.lock:
            home = self.homes.get(path)
            if home is None:
                home = self.homes[path] = Home(path)
            return home

    def before_fork(self) -> None:
        """Lend a child what this process holds."""
        lent = self.lent[threading.get_ident()] = []
        for home in list(self.homes.values()):
            try:
                tickets = home.bequeath()
            except (ShmPlasmaError, OSError, RuntimeError) as error:  # the last in a signal handler
                _warn(error)
                continue
            if tickets:
                lent.append((home, tickets))

    def after_fork_in_parent(self) -> None:
        """Forget what was lent."""
        self.lent.pop(threading.get_ident(), None)

    def after_fork_in_child(self) -> None:
        """Hold what was lent."""
        self.lock = threading.Lock()
        lent = self.lent.pop(threading.get_ident(), [])
        self.lent.clear()  # what other threads of the parent have lent to their children
        for home, tickets in lent:
            try:
                home.inherit(tickets)
            except (ShmPlasmaError, OSError) as error:
                _warn(error)


def _warn(error: Exception) -> None:
    warnings.warn(
        f"references that the child inherits are not held by it, as its store cannot be asked: {error}",
        RuntimeWarning,
        stacklevel=3,
    )


_registry: Final = _Registry()

os.register_at_fork(
    before=_registry.before_fork,
    after_in_parent=_registry.after_fork_in_parent,
    after_in_child=_registry.after_fork_in_child,
)
