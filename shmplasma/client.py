"""The client: Plasma's API."""

from __future__ import annotations

import builtins
import os
import socket
from collections.abc import AsyncGenerator, Iterable
from typing import Final, NoReturn, SupportsFloat, SupportsIndex

from shmplasma.arrow_errors import NotConnectedError
from shmplasma.connected import DEFAULT_RETRIES, checked, program_name, whole_number
from shmplasma.endpoint import default_socket_path
from shmplasma.errors import ShmPlasmaError
from shmplasma.listings import ObjectInfo, described
from shmplasma.notifications import Subscription, decode
from shmplasma.object_array import ObjectArray
from shmplasma.objects import ObjectID
from shmplasma.reading import ObjectNotAvailable, Reading
from shmplasma.replies import Done, Listing, Number, Text
from shmplasma.requests import (
    MAX_KEPT_IDS,
    MAX_NAME_BYTES,
    Debug,
    Delete,
    Evict,
    Keep,
    List,
    SetOptions,
    Trim,
)
from shmplasma.serialization import SerializationContext
from shmplasma.store_ref import Home, StoreRef, home_of
from shmplasma.writing import MAX_SIZE, Writing

__all__ = ["ObjectArray", "ObjectInfo", "ObjectNotAvailable", "PlasmaClient", "connect"]

_IDS_A_REQUEST: Final = 1 << 16


class PlasmaClient(Reading, Writing):
    """A connection to a store; made by `connect`.

    Notes
    -----
    Thread-safe: threads may share a client, and one that waits holds up no other.  A forked child connects anew at its
    first call.  A pickled client connects where it is unpickled.  A context manager: leaving it disconnects.

    Buffers and values that `get` and the like have returned stay valid after `disconnect` and after the client has
    gone.

    A signal handler, or a finalizer that the collector runs, may come in the middle of another call of the same thread.
    `disconnect` may be called there; objects that are not sealed are removed when the connection ends.  Any other call
    that would have to wait for the interrupted one raises a RuntimeError.
    """

    _home: Home | None = None
    """Kept once it was used: the next reference needs no new connection."""

    def disconnect(self) -> None:
        """Leave the store: unsealed objects are removed; buffers and references stay valid.

        May be called again.
        """
        super().disconnect()
        self._home = None

    # -- references ----------------------------------------------------------------------------

    def put_ref(
        self,
        value: object,
        memcopy_threads: int = 6,
        serialization_context: SerializationContext | None = None,
        *,
        timeout_ms: float | None = 0,
    ) -> StoreRef:
        """Store a value and return a handle that owns it.

        Parameters
        ----------
        value, memcopy_threads, serialization_context, timeout_ms
            As for `put`.

        Returns
        -------
        StoreRef
            The object is deleted when this handle and all handles that came of it by pickling are gone; it is not
            evicted before.

        Raises
        ------
        PlasmaStoreFull, SerializationError
            As `put`.

        Notes
        -----
        As `put`; over the connection that all references of this process to this store share.
        """
        home = self._home
        if home is None:
            self._live()
            home = self._home = home_of(self._path)
        return home.put_ref(value, memcopy_threads, serialization_context, timeout_ms)

    # -- the store -----------------------------------------------------------------------------

    def delete(self, object_ids: ObjectID | Iterable[ObjectID]) -> None:
        """Delete sealed objects; one in use goes at its last release, one that is missing or not sealed is left alone.

        Until its last release an object can be found and got, and its id is taken.  An object that is not sealed is aborted by
        its writer (`abort`).

        Notes
        -----
        Up to 24 objects are deleted without waiting for the store, in some 10 us each.  For more objects than that, or
        if the client cannot see whether one of them is there, it takes a round trip for each 65,536 objects.
        """
        ids = _id_bytes(object_ids)
        session = self._live()
        rest = ids if session.removal is None else session.removal.delete(ids)
        for start in range(0, len(rest), _IDS_A_REQUEST):
            session.call(Delete(rest[start : start + _IDS_A_REQUEST]), Done)

    def keep(self, object_ids: ObjectID | Iterable[ObjectID]) -> None:
        """Keep objects from being evicted; only `delete` removes them.

        Parameters
        ----------
        object_ids : ObjectID or iterable of ObjectID
            Sealed objects, or unsealed ones of this client.

        Raises
        ------
        PlasmaObjectNotFound
            One of them is not there.  None of the objects of the same request, which has up to 2,048, is changed then.

        Notes
        -----
        A round trip for each 2,048 objects.  Holds until `cache` is called, even across the death of a store.
        """
        self._say_keep(object_ids, keep=True)

    def cache(self, object_ids: ObjectID | Iterable[ObjectID]) -> None:
        """Let objects be evicted when room is needed, which is the default; undoes `keep`.

        Parameters, errors and costs are those of `keep`.
        """
        self._say_keep(object_ids, keep=False)

    def _say_keep(self, object_ids: ObjectID | Iterable[ObjectID], *, keep: bool) -> None:
        ids = _id_bytes(object_ids)
        session = self._live()
        for start in range(0, len(ids), MAX_KEPT_IDS):
            session.call(Keep(keep, ids[start : start + MAX_KEPT_IDS]), Done)

    def evict(self, num_bytes: SupportsIndex | float) -> int:
        """Evict sealed objects that nobody holds or keeps, until `num_bytes` more are free.

        As many as needed; an object that turns out not to be needed for the room stays.  One without bytes goes in its
        turn.

        Returns
        -------
        int
            Data plus metadata of the objects that went, in bytes; less than asked for if no more could go.
        """
        wanted = max(0, min(whole_number(num_bytes), MAX_SIZE))
        return self._live().call(Evict(wanted), Number).value

    def trim(self) -> int:
        """Give memory that no object uses back to the system, down to the store's ``--trim-floor``.

        Returns
        -------
        int
            Bytes that were given back; 0 where the system takes none back (other systems than Linux).

        Notes
        -----
        0.12 s per GiB, during which the store serves others.  The capacity stays the same: memory is committed again
        when it is needed, and if there is none by then, a `create` raises `PlasmaStoreFull`.  An idle store does the
        same by itself within a minute.
        """
        return self._live().call(Trim(), Number).value

    def list(self) -> dict[ObjectID, ObjectInfo]:
        """Return all objects in the store, sealed or not.

        Notes
        -----
        O(objects); no message is sent as long as no object is deleted while in use, being moved, or in an external
        store.  Objects that come or go meanwhile may be missing.
        """
        session = self._live()
        census = session.census
        objects: dict[ObjectID, ObjectInfo] = {}
        start = 0
        while True:
            listing = None if census is None else census.listing(start)
            if listing is None:
                listing = session.call(List(start), Listing)
            objects.update(described(listing))
            start = listing.next_start
            if not start:
                return objects

    def store_capacity(self) -> int:
        """Return the number of bytes that users can fill."""
        return self._capacity

    def set_client_options(
        self, client_name: str, limit_output_memory: SupportsIndex | float
    ) -> None:
        """Name this client, and limit what it may hold.

        Parameters
        ----------
        client_name : str
            What the store calls this client.
        limit_output_memory : int
            Bytes that it may hold or have unsealed; a `create` beyond that raises `PlasmaStoreFull`.  0 means the
            store's default (`--client-limit`), or no limit if that was not given.

        Raises
        ------
        ValueError
            The limit is negative or beyond 2**62, or the name is longer than 255 bytes.
        """
        limit = whole_number(limit_output_memory)
        if not 0 <= limit <= MAX_SIZE:
            raise ValueError(f"a limit of {limit} bytes makes no sense; 0 is the default")
        if not isinstance(client_name, str):
            raise TypeError(f"a client's name is a str, not {type(client_name).__name__}")
        if len(client_name.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"a client's name has at most {MAX_NAME_BYTES} bytes")
        options = SetOptions(limit, client_name)
        self._live().set_options(options)
        self._options = options

    def debug_string(self) -> str:
        """Return the store's figures as text, one per line."""
        return self._live().call(Debug(), Text).text

    def to_capsule(self) -> NoReturn:
        """Raise: there is no C++ client that a capsule could hold.

        Raises
        ------
        ShmPlasmaError
            Always.
        """
        raise ShmPlasmaError(
            "a capsule holds a C++ client, and this client is Python; in C++ read the buffer's address"
        )

    # -- notifications -------------------------------------------------------------------------

    def subscribe(self) -> None:
        """Begin to receive notifications of objects that are sealed, deleted or evicted.

        All objects that are sealed already come first.  A second call begins anew.
        """
        self._unsubscribe()
        self._subscription = self._subscribe()

    def get_next_notification(self) -> tuple[ObjectID, int, int]:
        """Wait for the next notification.

        Returns
        -------
        object_id : ObjectID
            The object.
        data_size, metadata_size : int
            Its sizes in bytes; -1 and -1 when it was deleted or evicted.

        Raises
        ------
        OSError
            `subscribe` was not called, or the store has gone, or has dropped this subscriber as it did not keep up.

        Warns
        -----
        RuntimeWarning
            The store has died and come back: all sealed objects come again, and deletions meanwhile are not reported.
        """
        if self._subscription is None:
            raise NotConnectedError("this client has no subscription; call subscribe() first")
        return self._subscription.next()

    def notifications(self) -> AsyncGenerator[tuple[ObjectID, int, int], None]:
        """Return an asynchronous iterator over notifications, with a subscription of its own.

        It gives what `get_next_notification` returns; all objects that are sealed already come first.  It subscribes at
        its first step, and the subscription ends with the iterator: with `contextlib.aclosing`, at the end of the
        block.

        Raises
        ------
        NotConnectedError
            While iterating: no store answers, or it has gone, or has dropped this subscriber as it did not keep up.

        Warns
        -----
        RuntimeWarning
            As `get_next_notification` does.
        """
        from shmplasma import aio  # noqa: PLC0415 - asyncio takes 30 ms to import

        return aio.notifications(self._subscribe)

    def _subscribe(self) -> Subscription:
        return Subscription(self._path, program_name(), self._live().patience_seconds)

    def get_notification_socket(self) -> socket.socket:
        """Return the socket that carries notifications, to wait for several things at once.

        Each notification is an 8-byte little-endian length and that many bytes for `decode_notifications`.  The socket
        ends with its store; `subscribe` makes another one.

        Raises
        ------
        ValueError
            `subscribe` was not called.
        """
        if self._subscription is None:
            raise ValueError("this client has no subscription; call subscribe() first")
        return self._subscription.sock

    def decode_notifications(
        self, buf: bytes
    ) -> tuple[builtins.list[ObjectID], builtins.list[int], builtins.list[int]]:
        """Return the ids, data sizes and metadata sizes in the bytes of a notification."""
        return decode(buf)


def _id_bytes(object_ids: ObjectID | Iterable[ObjectID]) -> list[bytes]:
    if isinstance(object_ids, ObjectID):
        object_ids = [object_ids]
    return [checked(object_id).id_bytes for object_id in object_ids]


def connect(
    store_socket_name: str | os.PathLike[str] | None = None, num_retries: int = -1
) -> PlasmaClient:
    """Connect to a store.

    Parameters
    ----------
    store_socket_name : str or os.PathLike, optional
        Path of the store's socket; where `shmplasma-store` serves by default if not given.
    num_retries : int, optional
        How often to try again, 0.1 s apart, while no store answers; by default for 8 s.

    Returns
    -------
    PlasmaClient
        A context manager.

    Raises
    ------
    OSError
        No store answers there.
    """
    path = default_socket_path() if store_socket_name is None else os.fspath(store_socket_name)
    if not isinstance(path, str):
        raise TypeError(f"a socket's path is a str, not {type(path).__name__}")
    if not isinstance(num_retries, SupportsFloat):
        raise TypeError(f"num_retries is a number, not {type(num_retries).__name__}")
    return PlasmaClient(path, DEFAULT_RETRIES if num_retries < 0 else num_retries)
