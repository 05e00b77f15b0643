"""The reading half of a client: find, wait, and turn into values.

What is there already is read without a message (`shmplasma.reader`); whatever that does not find is asked of
the store, all of it in one message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple, NoReturn, TypeAlias, overload

import numpy as np
import pyarrow as pa
from pyarrow import foreign_buffer

from shmplasma.arrow_errors import PlasmaObjectNotFound
from shmplasma.connected import Connected, checked, wait_seconds
from shmplasma.copying import copy_into
from shmplasma.hashing import object_hash
from shmplasma.layout import REFERENCED
from shmplasma.objects import ObjectID
from shmplasma.pinning import Located
from shmplasma.replies import Number
from shmplasma.requests import Contains
from shmplasma.serialization import SerializationContext, checked_context, deserialize
from shmplasma.session import Session
from shmplasma.unread import Places

__all__ = ["Encoded", "Mode", "ObjectNotAvailable", "Reading"]

Mode: TypeAlias = Literal["view", "copy", "cow"]
"""What the arrays of a value are that is got."""

_COPYING_THREADS: Final = 6
"""At most, for a private copy; as a put by default."""
_IDS_A_REQUEST: Final = 1 << 11
"""The store looks for all ids of a request in one turn of its loop: 1 us each, or 2.5 where it has to answer for them."""


class ObjectNotAvailable:
    """Stands for the value of an object that did not come in time; the class itself, as in Plasma."""


class Encoded(NamedTuple):
    """An object as it lies in the store.

    Attributes
    ----------
    data, metadata : pyarrow.Buffer
        Read-only; they keep the object.
    codec : int
        How the data is to be read (`shmplasma.codecs.Codec`).
    """

    data: pa.Buffer
    metadata: pa.Buffer
    codec: int


class Reading(Connected):
    """What a client does to get objects."""

    @overload
    def get_buffers(
        self, object_ids: ObjectID, timeout_ms: float | None = -1, with_meta: bool = False
    ) -> Any: ...

    @overload
    def get_buffers(
        self, object_ids: Iterable[ObjectID], timeout_ms: float | None = -1, with_meta: bool = False
    ) -> list[Any]: ...

    def get_buffers(
        self,
        object_ids: ObjectID | Iterable[ObjectID],
        timeout_ms: float | None = -1,
        with_meta: bool = False,
    ) -> Any:
        """Return the data of sealed objects, without copying it.

        Parameters
        ----------
        object_ids : iterable of ObjectID, or one ObjectID
            Which objects; the same one may be named more than once.
        timeout_ms : float, optional
            How long to wait for objects that are not sealed yet, in milliseconds: 0 not at all, None or -1 (the default)
            without limit.
        with_meta : bool, optional
            Whether to return the metadata too.

        Returns
        -------
        list of pyarrow.Buffer or None
            Read-only and 64-byte aligned; None for an object that is not there in time.  With `with_meta`, pairs of
            metadata (bytes) and buffer, or (None, None).  For a single id, its item instead of a list.

        Raises
        ------
        NotConnectedError
            The store has gone.

        Notes
        -----
        No message for objects that are there, including those that were put just now; else one round trip.  With
        `timeout_ms=0` there is no message either for objects that are seen not to be there (see `contains`).  An object
        is neither evicted nor changed while its buffer, or anything made of it, lives.  Ctrl-C interrupts a wait at
        once.
        """
        if type(timeout_ms) is not int:
            wait_seconds(timeout_ms)  # refuses what is no number, also where nobody is to wait
        session = self._session or self._live()
        reader = session.reader
        # One object is what most ask for, and a list of one what Plasma's users have to ask for.
        if (
            reader is not None
            and not with_meta
            and type(object_ids) is list
            and len(object_ids) == 1
        ):
            try:
                buffer = reader.buffer(object_ids[0])
            except AttributeError:
                _refuse(object_ids)
            if buffer is None:
                found = self._find_new(session, object_ids, timeout_ms)
                buffer = None if found is None else session.data(found)
            return [buffer]
        ids = _ids(object_ids)
        items: list[Any]
        if reader is None or with_meta:
            located = self._locate(session, ids, timeout_ms)
            if with_meta:
                items = [_with_metadata(session, got) for got in located]
            else:
                items = [None if got is None else session.data(got) for got in located]
        else:
            try:
                items = list(map(reader.buffer, ids))
            except AttributeError:
                _refuse(ids)
            misses = [at for at, buffer in enumerate(items) if buffer is None]
            if misses:
                places = None if session.unread is None else session.unread.places()
                asked = self._ask(session, [ids[at] for at in misses], timeout_ms, places)
                for at, got in zip(misses, asked, strict=True):
                    items[at] = None if got is None else session.data(got)
        return items[0] if isinstance(object_ids, ObjectID) else items

    @overload
    def get_metadata(
        self, object_ids: ObjectID, timeout_ms: float | None = -1
    ) -> pa.Buffer | None: ...

    @overload
    def get_metadata(
        self, object_ids: Iterable[ObjectID], timeout_ms: float | None = -1
    ) -> list[pa.Buffer | None]: ...

    def get_metadata(
        self, object_ids: ObjectID | Iterable[ObjectID], timeout_ms: float | None = -1
    ) -> pa.Buffer | list[pa.Buffer | None] | None:
        """Return the metadata of sealed objects, without copying it.

        Parameters are those of `get_buffers`; the result is a list of read-only buffers, None where absent.
        """
        session = self._session or self._live()
        items = [
            None if got is None else session.metadata(got)
            for got in self._locate(session, _ids(object_ids), timeout_ms)
        ]
        return items[0] if isinstance(object_ids, ObjectID) else items

    def get_encoded(self, object_id: ObjectID, timeout_ms: float | None = -1) -> Encoded | None:
        """Return an object of any kind as it lies in the store, without copying it.

        Parameters are those of `get_buffers`; None if it is not there in time.
        """
        session = self._session or self._live()
        (got,) = self._locate(session, (object_id,), timeout_ms)
        if got is None:
            return None
        # That references own it is no affair of a copy.
        return Encoded(session.data(got), session.metadata(got), got[3] & ~REFERENCED)

    def get(
        self,
        object_ids: ObjectID | Sequence[ObjectID],
        timeout_ms: float | None = -1,
        serialization_context: SerializationContext | None = None,
        *,
        mode: Mode = "view",
    ) -> Any:
        """Return the values of objects.

        Parameters
        ----------
        object_ids : ObjectID or sequence of ObjectID
            Which objects.
        timeout_ms : float, optional
            As for `get_buffers`.
        serialization_context : SerializationContext, optional
            As for `put`.
        mode : {"view", "copy", "cow"}, optional
            What arrays are: read-only views of the store; private copies that can be written to; or private mappings
            that can be written to and take memory only for the pages that are written.  Mappings keep the object in the
            store, as views do.

        Returns
        -------
        object, or list of objects
            The value, or the list of values for a sequence.  Arrays in them are read-only and lie in the store, unless
            `mode` says otherwise; they keep the store from giving the memory away.  `ObjectNotAvailable` stands for an
            object that is not there in time.  An object that was not stored by `put` comes as its buffer.

        Raises
        ------
        DeserializationError
            An object cannot be read in this process.
        NotConnectedError
            The store has gone.
        ValueError
            There is no such mode.
        """
        if type(timeout_ms) is not int:
            wait_seconds(timeout_ms)
        if serialization_context is not None:
            checked_context(serialization_context)
        session = self._session or self._live()
        value = _value if mode == "view" else _writable_value(mode)
        if isinstance(object_ids, ObjectID):
            got = None if session.reader is None else session.reader.locate(object_ids)
            if got is None:
                got = self._find_new(session, (object_ids,), timeout_ms)
            if value is not _value or got is None:
                return value(session, got, serialization_context)
            # As `_value`, whose call takes 0.1 us.
            offset, data_size, _, codec, pin = got
            buffer = foreign_buffer(session.address + offset, data_size, pin)
            return deserialize(buffer, codec, serialization_context)
        return [
            value(session, got, serialization_context)
            for got in self._locate(session, _sequence(object_ids), timeout_ms)
        ]

    async def get_async(
        self,
        object_ids: ObjectID | Sequence[ObjectID],
        timeout_ms: float | None = -1,
        serialization_context: SerializationContext | None = None,
    ) -> Any:
        """Return the values of objects, without holding up the event loop.

        Parameters, result and errors are those of `get`.

        Notes
        -----
        Objects that are there are returned at once, without leaving the event loop.  Waiting takes no thread, however
        many tasks wait.  A task that is cancelled withdraws its request.  Tasks of several event loops, and threads,
        may use one client.
        """
        if type(timeout_ms) is not int:
            wait_seconds(timeout_ms)
        session = self._session
        if session is None:
            from shmplasma.aio import off_loop  # noqa: PLC0415 - asyncio takes 30 ms to import

            session = await off_loop(self._live)
        ids = (object_ids,) if isinstance(object_ids, ObjectID) else _sequence(object_ids)
        items, misses = self._find(session, ids)
        if misses:
            deadline, wait = _deadline(timeout_ms)
            names = [checked(ids[at]).id_bytes for at in misses]
            unread = session.unread
            places = None if unread is None else unread.places()
            if unread is not None and places:
                for at, name in zip(misses, names, strict=True):
                    items[at] = unread.take(name, places)
                misses = [at for at in misses if items[at] is None]
                names = [ids[at].id_bytes for at in misses]
            asked: list[Located | None] = []
            for start in range(0, len(names), _IDS_A_REQUEST):
                part = names[start : start + _IDS_A_REQUEST]
                asked += await session.get_async(part, deadline, wait=wait)
            for at, got in zip(misses, asked, strict=True):
                items[at] = got
        values = [_value(session, got, serialization_context) for got in items]
        return values[0] if isinstance(object_ids, ObjectID) else values

    def contains(self, object_id: ObjectID) -> bool:
        """Tell whether a sealed object with this id is in the store.

        Notes
        -----
        No message if it is.  False is exact: whatever was put before is found.  It takes no request either, unless an
        object with this id is being made, deleted or moved, or clients write more than can be looked through.
        """
        session = self._session or self._live()
        reader, unread, settling = session.reader, session.unread, session.settling
        if reader is not None and unread is not None and settling is not None:
            try:
                if reader.contains(object_id):
                    return True
            except AttributeError:
                _refuse((object_id,))
            name = object_id.id_bytes
            places = unread.places()
            if places and unread.has(name, places):
                return True
            is_seen = places is not None and name not in places
            if is_seen or settling.settle() is not None:
                if settling.are_absent((name,)):
                    return False
                if reader.contains(object_id):  # it was read meanwhile
                    return True
        return session.call(Contains(checked(object_id).id_bytes), Number).value == 1

    def hash(self, object_id: ObjectID) -> bytes:
        """Return the object's XXH64 as Plasma computed it: 8 bytes (see `shmplasma.hashing`).

        Raises
        ------
        PlasmaObjectNotFound
            There is no such sealed object.

        Notes
        -----
        Computed in this process, at about 10 GB/s.
        """
        session = self._session or self._live()
        (got,) = self._locate(session, (checked(object_id),), 0)
        if got is None:
            raise PlasmaObjectNotFound(f"there is no sealed object {object_id.binary().hex()}")
        return object_hash(memoryview(session.data(got)), memoryview(session.metadata(got)))

    def _locate(
        self, session: Session, ids: Sequence[ObjectID], timeout_ms: float | None
    ) -> list[Located | None]:
        """Find and pin objects, those that are there without a message."""
        items, misses = self._find(session, ids)
        if misses:
            missing = [ids[position] for position in misses]
            places = None if session.unread is None else session.unread.places()
            asked = self._ask(session, missing, timeout_ms, places)
            for position, got in zip(misses, asked, strict=True):
                items[position] = got
        return items

    def _find(
        self, session: Session, ids: Sequence[ObjectID]
    ) -> tuple[list[Located | None], Sequence[int]]:
        """Find and pin what can be without a message; return the positions of the rest as well."""
        if session.reader is None:
            return [None] * len(ids), range(len(ids))
        try:
            items = list(map(session.reader.locate, ids))
        except AttributeError:
            _refuse(ids)
        return items, [at for at, got in enumerate(items) if got is None]

    def _find_new(
        self, session: Session, ids: Sequence[ObjectID], timeout_ms: float | None
    ) -> Located | None:
        """Find and pin one object that was not found in the table: mostly it was put just now, or is waited for."""
        unread = session.unread
        if unread is None:
            return self._ask(session, ids, timeout_ms, None)[0]
        places = unread.places()
        if places:
            got = unread.take(checked(ids[0]).id_bytes, places)
            if got is not None:
                return got
        return self._ask(session, ids, timeout_ms, places)[0]

    def _ask(
        self,
        session: Session,
        ids: Sequence[ObjectID],
        timeout_ms: float | None,
        places: Places | None,
    ) -> list[Located | None]:
        """Find and pin objects that are not in the table: unread ones by themselves, others by asking the store."""
        deadline, wait = _deadline(timeout_ms)
        names = [checked(object_id).id_bytes for object_id in ids]
        items: list[Located | None] = [None] * len(ids)
        misses: Sequence[int] = range(len(ids))
        unread, settling = session.unread, session.settling
        if unread is not None and settling is not None:
            if places:
                items = [unread.take(name, places) for name in names]
                misses = [at for at, got in enumerate(items) if got is None]
                if not misses:
                    return items
                names = [names[at] for at in misses]
            is_seen = places is not None and places.keys().isdisjoint(names)
            if is_seen or settling.settle() is not None:
                if not wait and settling.are_absent(names):
                    return items
                # What was read meanwhile is there.
                found, rest = self._find(session, [ids[at] for at in misses])
                for at, got in zip(misses, found, strict=True):
                    items[at] = got
                names = [names[at] for at in rest]
                misses = [misses[at] for at in rest]
                if not misses:
                    return items
        asked: list[Located | None] = []
        for start in range(0, len(names), _IDS_A_REQUEST):
            part = names[start : start + _IDS_A_REQUEST]
            asked += session.asking.get(part, deadline, wait=wait)
        for at, got in zip(misses, asked, strict=True):
            items[at] = got
        return items


def _ids(object_ids: ObjectID | Iterable[ObjectID]) -> Sequence[ObjectID]:
    """Return a sequence for whatever a user may give."""
    if isinstance(object_ids, ObjectID):
        return (object_ids,)
    return object_ids if isinstance(object_ids, (list, tuple)) else list(object_ids)


def _sequence(object_ids: Sequence[ObjectID]) -> Sequence[ObjectID]:
    """Return a sequence that is one; raise TypeError for anything else."""
    if not isinstance(object_ids, Sequence):
        raise TypeError(
            f"get takes an ObjectID or a sequence of them, not {type(object_ids).__name__}"
        )
    return object_ids


def _deadline(timeout_ms: float | None) -> tuple[float | None, bool]:
    """Return the time of `time.monotonic` to stop waiting at, None for never, and whether to wait at all."""
    seconds = wait_seconds(timeout_ms)
    return None if seconds is None else time.monotonic() + seconds, seconds != 0


def _refuse(object_ids: Iterable[ObjectID]) -> NoReturn:
    """Say which of these is no id; the fast path only notices that one lacks an attribute."""
    for object_id in object_ids:
        checked(object_id)
    raise AssertionError("an ObjectID lacks its attributes")


def _with_metadata(
    session: Session, got: Located | None
) -> tuple[bytes, pa.Buffer] | tuple[None, None]:
    if got is None:
        return None, None
    return session.metadata(got).to_pybytes(), session.data(got)


def _value(session: Session, got: Located | None, context: SerializationContext | None) -> Any:
    if got is None:
        return ObjectNotAvailable
    offset, data_size, _, codec, pin = got
    # As `Session.data`, whose call would take as long as making the buffer.
    buffer = foreign_buffer(session.address + offset, data_size, pin)
    return deserialize(buffer, codec, context)


def _copied(session: Session, got: Located) -> pa.Buffer:
    """Return a private copy of an object's data."""
    data = session.data(got)
    copy = pa.allocate_buffer(data.size)
    copy_into(np.frombuffer(memoryview(copy), np.uint8), data, _COPYING_THREADS)
    return copy


def _writable_value(mode: str) -> _Value:
    """Return what makes values of a mode other than views."""
    try:
        make = _WRITABLE[mode]
    except KeyError:
        raise ValueError(f"there is no mode {mode!r}; the modes are view, copy and cow") from None

    def value(session: Session, got: Located | None, context: SerializationContext | None) -> Any:
        if got is None:
            return ObjectNotAvailable
        return deserialize(make(session, got), got[3], context)

    return value


_Value: TypeAlias = Callable[[Session, "Located | None", "SerializationContext | None"], Any]
_WRITABLE: Final = {"copy": _copied, "cow": Session.private}
