"""The client: Plasma's API over a `shmplasma.session.Session`."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import index
from typing import Any, Final, NoReturn, Self, SupportsIndex, TypedDict, cast, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from shmplasma.arrow_errors import NotConnectedError, PlasmaObjectNotFound, PlasmaStoreFull
from shmplasma.codecs import Codec, Source, copy_into, ndarray_head
from shmplasma.endpoint import default_socket_path
from shmplasma.errors import ShmPlasmaError
from shmplasma.notifications import Subscription, decode
from shmplasma.objects import ObjectID
from shmplasma.replies import Done, Found, Listing, Number, Text
from shmplasma.requests import Abort, Contains, Debug, Delete, Evict, List, Seal, SetOptions
from shmplasma.serialization import SerializationContext, deserialize, serialize
from shmplasma.session import Pin, Session

__all__ = ["ObjectArray", "ObjectInfo", "ObjectNotAvailable", "PlasmaClient", "connect"]

_DEFAULT_RETRIES: Final = 80
"""8 seconds of attempts, as in Plasma."""
_IDS_A_REQUEST: Final = 1 << 16
_MAX_SIZE: Final = 1 << 62
"""Sizes beyond are refused here: they do not fit the protocol's numbers, and no machine."""

_HASH_CHUNKED_BYTES: Final = 1 << 20
_HASH_CHUNKS: Final = 8
_HASH_BLOCK_BYTES: Final = 64

_clients: weakref.WeakSet[PlasmaClient] = weakref.WeakSet()


class ObjectNotAvailable:
    """Stands for the value of an object that did not come in time; the class itself, as in Plasma."""


class ObjectInfo(TypedDict):
    """What `PlasmaClient.list` says of an object.

    Sizes are bytes, `create_time` is in seconds since 1970, `construct_duration` in seconds (-1 until it is
    sealed), `ref_count` the number of clients that hold it, `state` "created" or "sealed".
    """

    data_size: int
    metadata_size: int
    ref_count: int
    create_time: int
    construct_duration: int
    state: str


class ObjectArray(np.ndarray[Any, np.dtype[Any]]):
    """A writable array over a new object; see `PlasmaClient.create_array`.

    As a context manager it seals the object when the block succeeds and aborts it when the block raises.
    """

    _unsealed: tuple[PlasmaClient, ObjectID]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        client, object_id = self._unsealed
        if error_type is None:
            client.seal(object_id)
        else:
            client.abort(object_id)


class PlasmaClient:
    """A connection to a store; made by `connect`.

    Notes
    -----
    Thread-safe: threads may share a client, and one that waits holds up no other.  A forked child connects
    anew at its first use.  A pickled client connects where it is unpickled.  A context manager: leaving it
    disconnects.

    Buffers and values that were got stay valid after `disconnect` and after the client has gone.
    """

    def __init__(self, store_socket_name: str, num_retries: int) -> None:
        self._path = store_socket_name
        self._session: Session | None = Session.open(
            store_socket_name, num_retries, _program_name()
        )
        self._capacity = self._session.layout.capacity
        self._options: SetOptions | None = None
        self._subscription: Subscription | None = None
        self._forget()
        _clients.add(self)

    def _forget(self) -> None:
        """Begin without anything that belongs to a session."""
        self._unsealed: set[bytes] = set()
        self._connecting = threading.Lock()
        self._forked = False

    # -- the connection ------------------------------------------------------------------------

    @property
    def store_socket_name(self) -> str:
        """The path of the store's socket."""
        return self._path

    def disconnect(self) -> None:
        """Leave the store: what is not sealed goes; buffers that were got stay valid.

        May be called again.
        """
        session, self._session = self._session, None
        self._forked = False
        if session is not None:
            session.detach()
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return connect, (self._path,)

    def __repr__(self) -> str:
        state = "" if self._session or self._forked else ", disconnected"
        return f"PlasmaClient({self._path!r}{state})"

    def _live(self) -> Session:
        """Return the session, a new one in a forked child; raise when there is none."""
        session = self._session
        if session is not None:
            return session
        if not self._forked:
            raise NotConnectedError(
                "this client is disconnected; shmplasma.connect makes a new one"
            )
        with self._connecting:
            if self._session is None:
                self._session = session = Session.open(
                    self._path, 0, _program_name()
                )
                if self._options is not None:
                    session.call(self._options, Done)
                self._forked = False
            return self._session

    def _after_fork(self) -> None:
        """Leave the parent's session and subscription to the parent."""
        forked = self._session is not None or self._forked
        self._session = None
        self._forget()
        self._forked = forked
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None

    # -- writing -------------------------------------------------------------------------------

    def create(
        self,
        object_id: ObjectID,
        data_size: SupportsIndex,
        metadata: bytes | bytearray = b"",
    ) -> pa.Buffer:
        """Make a new object and return its data for writing; `seal` completes it.

        Parameters
        ----------
        object_id : ObjectID
            A name that no object has.
        data_size : int
            Bytes of data, 0 or more.
        metadata : bytes or bytearray, optional
            Kept beside the data; takes room as well.

        Returns
        -------
        pyarrow.Buffer
            Mutable, 64-byte aligned.  The memory stays reserved while it, or anything made of it, lives.

        Raises
        ------
        PlasmaObjectExists
            The id is taken.
        PlasmaStoreFull
            There is no room; its attributes and text say why.
        ValueError
            `data_size` is negative.

        Notes
        -----
        One round trip.  Until it is sealed the object belongs to this client and is removed when the
        client leaves or dies.
        """
        session = self._live()
        return pa.py_buffer(self._create(session, object_id, data_size, metadata, Codec.RAW))

    def create_array(
        self, object_id: ObjectID, shape: int | Sequence[int], dtype: npt.DTypeLike = float
    ) -> ObjectArray:
        """Make a new object that holds an array, and return the array for writing.

        Parameters
        ----------
        object_id : ObjectID
            A name that no object has.
        shape : int or sequence of int
            The array's shape; elements lie in C order.
        dtype : data-type, optional
            Of the elements; not one with Python objects.

        Returns
        -------
        ObjectArray
            Uninitialized.  As a context manager it seals on success and aborts on an exception;
            otherwise call `seal`.  `get` then returns the array.

        Raises
        ------
        PlasmaObjectExists, PlasmaStoreFull
            As `create`.
        TypeError
            The dtype has Python objects.
        """
        session = self._live()
        shape = tuple(map(index, shape)) if isinstance(shape, Iterable) else (index(shape),)
        dtype = np.dtype(dtype)
        head = ndarray_head(dtype, shape)
        count = 1
        for length in shape:
            if length < 0:
                raise ValueError(f"an array cannot have the shape {shape}")
            count *= length
        target = self._create(
            session, object_id, len(head) + count * dtype.itemsize, b"", Codec.NDARRAY
        )
        target[: len(head)] = np.frombuffer(head, np.uint8)
        array = ObjectArray(shape, dtype, target.data, len(head))
        array._unsealed = self, object_id
        return array

    def create_and_seal(
        self, object_id: ObjectID, data: Source, metadata: bytes | bytearray = b""
    ) -> None:
        """Store bytes under an id of one's own.

        Parameters
        ----------
        object_id : ObjectID
            A name that no object has.
        data : bytes-like
            What to store.
        metadata : bytes or bytearray, optional
            Kept beside it.

        Raises
        ------
        PlasmaObjectExists, PlasmaStoreFull
            As `create`.
        """
        self.put_raw_buffer(data, _checked(object_id), metadata)

    def put_raw_buffer(
        self,
        value: Source,
        object_id: ObjectID | None = None,
        metadata: bytes | bytearray = b"",
        memcopy_threads: int = 6,
    ) -> ObjectID:
        """Store bytes.

        Parameters
        ----------
        value : bytes-like
            What to store: anything with the buffer protocol, of any shape; all its bytes.
        object_id : ObjectID, optional
            A name that no object has; a random one if not given.
        metadata : bytes or bytearray, optional
            Kept beside it.
        memcopy_threads : int, optional
            Upper limit on the threads that copy a large value; there are never more than processors.

        Returns
        -------
        ObjectID
            The object's name.

        Raises
        ------
        PlasmaObjectExists, PlasmaStoreFull
            As `create`.
        TypeError
            `value` has no bytes.
        """
        session = self._live()
        target_id = ObjectID.from_random() if object_id is None else _checked(object_id)
        size = value.nbytes if isinstance(value, np.ndarray) else memoryview(value).nbytes
        target = self._create(session, target_id, size, metadata, Codec.RAW)
        with self._completing(session, target_id):
            copy_into(target, value, memcopy_threads)
        return target_id

    def put(
        self,
        value: object,
        object_id: ObjectID | None = None,
        memcopy_threads: int = 6,
        serialization_context: SerializationContext | None = None,
    ) -> ObjectID:
        """Store a Python value.

        Parameters
        ----------
        value : object
            Arrays, Arrow data, data frames, and whatever pickle or cloudpickle takes.
        object_id : ObjectID, optional
            A name that no object has; a random one if not given.
        memcopy_threads : int, optional
            Upper limit on the threads that copy large parts; there are never more than processors.
        serialization_context : SerializationContext, optional
            Serializers for types of one's own; the process's default context if not given.

        Returns
        -------
        ObjectID
            The object's name.

        Raises
        ------
        PlasmaObjectExists, PlasmaStoreFull
            As `create`.
        SerializationError
            The value cannot be serialized; nothing was stored.

        Notes
        -----
        One round trip, and each byte of a large part is copied once.
        """
        session = self._live()
        target_id = ObjectID.from_random() if object_id is None else _checked(object_id)
        payload = serialize(value, serialization_context)
        target = self._create(session, target_id, payload.size_bytes, b"", payload.codec)
        with self._completing(session, target_id):
            payload.write(target, memcopy_threads)
        return target_id

    def seal(self, object_id: ObjectID) -> None:
        """Complete an object that this client has created: it becomes readable for all, and immutable.

        Raises
        ------
        PlasmaObjectNotFound
            This client is not writing such an object.
        PlasmaObjectAlreadySealed
            It is sealed, and this client holds it; a TypeError too, as in Plasma.

        Notes
        -----
        One one-way message.
        """
        session = self._live()
        message = Seal(_checked(object_id)._bytes)
        if message.object_id in self._unsealed:
            self._unsealed.discard(message.object_id)
            session.send(message)
        else:
            session.call(message, Done)

    def abort(self, object_id: ObjectID) -> None:
        """Remove an object that this client has created and not sealed.

        Raises
        ------
        PlasmaObjectNotFound
            This client is not writing such an object.
        """
        message = Abort(_checked(object_id)._bytes)
        self._live().call(message, Done)
        self._unsealed.discard(message.object_id)

    def _create(
        self,
        session: Session,
        object_id: ObjectID,
        data_size: SupportsIndex,
        metadata: bytes | bytearray,
        codec: Codec,
    ) -> npt.NDArray[np.uint8]:
        """Create an object, fill in its metadata, and return its data."""
        if not isinstance(metadata, (bytes, bytearray)):
            raise TypeError(f"metadata is bytes or a bytearray, not {type(metadata).__name__}")
        size = index(data_size)
        if size < 0:
            raise ValueError(f"an object cannot have {size} bytes")
        if size > _MAX_SIZE:
            raise PlasmaStoreFull(f"no store has room for {size} bytes", size)
        id_bytes = _checked(object_id)._bytes
        target = session.create(id_bytes, size, len(metadata), codec)
        self._unsealed.add(id_bytes)
        if metadata:
            target[size:] = np.frombuffer(metadata, np.uint8)
        return target[:size]

    @contextmanager
    def _completing(self, session: Session, object_id: ObjectID) -> Iterator[None]:
        """Seal the object if the block succeeds, and leave nothing of it if not."""
        try:
            yield
        except BaseException:
            self._unsealed.discard(object_id._bytes)
            session.send(Abort(object_id._bytes))
            raise
        self._unsealed.discard(object_id._bytes)
        session.send(Seal(object_id._bytes))

    # -- reading -------------------------------------------------------------------------------

    @overload
    def get_buffers(
        self, object_ids: ObjectID, timeout_ms: float = -1, with_meta: bool = False
    ) -> Any: ...

    @overload
    def get_buffers(
        self, object_ids: Iterable[ObjectID], timeout_ms: float = -1, with_meta: bool = False
    ) -> list[Any]: ...

    def get_buffers(
        self,
        object_ids: ObjectID | Iterable[ObjectID],
        timeout_ms: float = -1,
        with_meta: bool = False,
    ) -> Any:
        """Return the data of sealed objects, without copying it.

        Parameters
        ----------
        object_ids : iterable of ObjectID, or one ObjectID
            Which objects; the same one may be named more than once.
        timeout_ms : float, optional
            How long to wait for those that are not sealed yet, in milliseconds; 0 not at all, a negative
            number (the default) without limit.
        with_meta : bool, optional
            Whether to return the metadata too.

        Returns
        -------
        list of pyarrow.Buffer or None
            Read-only and 64-byte aligned; None for an object that is not there in time.  With
            `with_meta` pairs of metadata (bytes) and buffer, or (None, None).  For one id, its item
            alone.

        Raises
        ------
        NotConnectedError
            The store has gone.

        Notes
        -----
        One round trip.  An object is neither evicted nor changed while its buffer, or anything made of
        it, lives.  Ctrl-C interrupts a wait at once.
        """
        session = self._live()
        items: list[Any] = []
        for got in self._get(session, object_ids, timeout_ms):
            if got is None:
                items.append((None, None) if with_meta else None)
                continue
            (offset, data_size, metadata_size, _), pin = got
            data = session.buffer(offset, data_size, pin)
            if with_meta:
                metadata = session.buffer(offset + data_size, metadata_size, pin)
                items.append((metadata.to_pybytes(), data))
            else:
                items.append(data)
        return items[0] if isinstance(object_ids, ObjectID) else items

    @overload
    def get_metadata(self, object_ids: ObjectID, timeout_ms: float = -1) -> pa.Buffer | None: ...

    @overload
    def get_metadata(
        self, object_ids: Iterable[ObjectID], timeout_ms: float = -1
    ) -> list[pa.Buffer | None]: ...

    def get_metadata(
        self, object_ids: ObjectID | Iterable[ObjectID], timeout_ms: float = -1
    ) -> pa.Buffer | None | list[pa.Buffer | None]:
        """Return the metadata of sealed objects, without copying it.

        Parameters are those of `get_buffers`; the result is a list of read-only buffers, None where absent.
        """
        session = self._live()
        items = [
            None if got is None else session.buffer(got[0][0] + got[0][1], got[0][2], got[1])
            for got in self._get(session, object_ids, timeout_ms)
        ]
        return items[0] if isinstance(object_ids, ObjectID) else items

    def get(
        self,
        object_ids: ObjectID | Sequence[ObjectID],
        timeout_ms: float = -1,
        serialization_context: SerializationContext | None = None,
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

        Returns
        -------
        object, or list of objects
            The value, or the list of values for a sequence.  Arrays in them are read-only and lie in the
            store; they keep it from giving the memory away.  `ObjectNotAvailable` stands for what is not
            there in time.  An object that was not stored by `put` comes as its buffer.

        Raises
        ------
        DeserializationError
            An object cannot be read in this process.
        NotConnectedError
            The store has gone.
        """
        if not isinstance(object_ids, (ObjectID, Sequence)):
            raise TypeError(
                f"get takes an ObjectID or a sequence of them, not {type(object_ids).__name__}"
            )
        session = self._live()
        values = [
            ObjectNotAvailable
            if got is None
            else deserialize(
                session.buffer(got[0][0], got[0][1], got[1]), got[0][3], serialization_context
            )
            for got in self._get(session, object_ids, timeout_ms)
        ]
        return values[0] if isinstance(object_ids, ObjectID) else values

    def _get(
        self, session: Session, object_ids: ObjectID | Iterable[ObjectID], timeout_ms: float
    ) -> list[tuple[Found, Pin] | None]:
        """Find and pin objects."""
        if isinstance(object_ids, ObjectID):
            ids = [object_ids._bytes]
        else:
            ids = [_checked(object_id)._bytes for object_id in object_ids]
        if not isinstance(timeout_ms, (int, float, np.number)):
            raise TypeError(f"timeout_ms is a number, not {type(timeout_ms).__name__}")
        deadline = None if timeout_ms < 0 else time.monotonic() + timeout_ms / 1000
        wait = timeout_ms != 0
        result: list[tuple[Found, Pin] | None] = []
        for start in range(0, len(ids), _IDS_A_REQUEST):
            result += session.get(ids[start : start + _IDS_A_REQUEST], deadline, wait=wait)
        return result

    def contains(self, object_id: ObjectID) -> bool:
        """Tell whether a sealed object of this id is in the store."""
        return self._live().call(Contains(_checked(object_id)._bytes), Number).value == 1

    def hash(self, object_id: ObjectID) -> bytes:
        """Return the object's XXH64, 8 bytes, as Plasma computed it.

        Raises
        ------
        PlasmaObjectNotFound
            There is no such sealed object.

        Notes
        -----
        Below 1 MiB of data: XXH64 (seed 0) of data and metadata, little-endian.  From there on: XXH64 of
        the hashes of eight equal chunks, made of whole 64-byte blocks, and of the rest, each as 8
        little-endian bytes, followed by the metadata.  Computed in this process, at about 10 GB/s.
        """
        _, data = self.get_buffers(object_id, 0, with_meta=True)
        if data is None:
            raise PlasmaObjectNotFound(f"there is no sealed object {object_id.binary().hex()}")
        metadata = self.get_metadata(object_id, 0)
        assert metadata is not None
        digest = xxhash.xxh64()
        view = memoryview(data)
        if len(view) < _HASH_CHUNKED_BYTES:
            digest.update(view)
        else:
            chunk = len(view) // _HASH_BLOCK_BYTES // _HASH_CHUNKS * _HASH_BLOCK_BYTES
            ends = [*range(0, _HASH_CHUNKS * chunk + 1, chunk), len(view)]
            for start, end in zip(ends, ends[1:], strict=False):
                digest.update(xxhash.xxh64_intdigest(view[start:end]).to_bytes(8, "little"))
        digest.update(memoryview(metadata))
        return digest.intdigest().to_bytes(8, "little")

    # -- the store -----------------------------------------------------------------------------

    def delete(self, object_ids: ObjectID | Iterable[ObjectID]) -> None:
        """Delete sealed objects; what is in use goes at its last release, what is missing is ignored.

        Until then it can be found and got, and its id is taken.
        """
        if isinstance(object_ids, ObjectID):
            object_ids = [object_ids]
        ids = [_checked(object_id)._bytes for object_id in object_ids]
        session = self._live()
        for start in range(0, len(ids), _IDS_A_REQUEST):
            session.call(Delete(ids[start : start + _IDS_A_REQUEST]), Done)

    def evict(self, num_bytes: SupportsIndex) -> int:
        """Evict sealed objects that nobody holds until `num_bytes` are free that were not.

        Returns
        -------
        int
            Data plus metadata of what went, in bytes; less than asked for when no more could go.
        """
        wanted = max(0, min(index(num_bytes), _MAX_SIZE))
        return self._live().call(Evict(wanted), Number).value

    def list(self) -> dict[ObjectID, ObjectInfo]:
        """Return what there is in the store, sealed or not.

        Notes
        -----
        O(objects).  Objects that come and go meanwhile may be missing.
        """
        session = self._live()
        objects: dict[ObjectID, ObjectInfo] = {}
        start = 0
        while True:
            listing = session.call(List(start), Listing)
            for (
                object_id,
                data,
                metadata,
                holders,
                created_ns,
                construct_ns,
                sealed,
            ) in listing.records:
                objects[ObjectID(object_id)] = ObjectInfo(
                    data_size=data,
                    metadata_size=metadata,
                    ref_count=holders,
                    create_time=created_ns // 10**9,
                    construct_duration=construct_ns // 10**9 if sealed else -1,
                    state="sealed" if sealed else "created",
                )
            start = listing.next_start
            if not start:
                return objects

    def store_capacity(self) -> int:
        """Return the number of bytes that users can fill."""
        return self._capacity

    def set_client_options(self, client_name: str, limit_output_memory: SupportsIndex) -> None:
        """Name this client, and limit what it may hold.

        Parameters
        ----------
        client_name : str
            What the store calls this client.
        limit_output_memory : int
            Bytes that it may hold or have unsealed; a `create` beyond that is a `PlasmaStoreFull`.
            0 is no limit.

        Raises
        ------
        ValueError
            The limit is negative or beyond 2**62.
        """
        limit = index(limit_output_memory)
        if not 0 <= limit <= _MAX_SIZE:
            raise ValueError(f"a limit of {limit} bytes makes no sense; 0 is no limit")
        if not isinstance(client_name, str):
            raise TypeError(f"a client's name is a str, not {type(client_name).__name__}")
        options = SetOptions(limit, client_name)
        self._live().call(options, Done)
        self._options = options

    def debug_string(self) -> str:
        """Return the store's figures as text, one a line."""
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
        """Begin to receive notifications of sealed and vanished objects.

        All objects that are sealed come first.  A second call begins anew.
        """
        self._live()
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None
        self._subscription = Subscription(self._path, _program_name())

    def get_next_notification(self) -> tuple[ObjectID, int, int]:
        """Wait for the next notification.

        Returns
        -------
        object_id : ObjectID
            Of which object.
        data_size, metadata_size : int
            Its sizes in bytes; -1 and -1 when it was deleted or evicted.

        Raises
        ------
        OSError
            `subscribe` was not called, or the store has gone.
        """
        if self._subscription is None:
            raise NotConnectedError("this client has no subscription; call subscribe() first")
        return self._subscription.next()

    def get_notification_socket(self) -> socket.socket:
        """Return the socket that carries notifications, to wait for several things at once.

        Each is an 8-byte little-endian length and so many bytes for `decode_notifications`.

        Raises
        ------
        ValueError
            `subscribe` was not called.
        """
        if self._subscription is None:
            raise ValueError("this client has no subscription; call subscribe() first")
        return self._subscription.sock

    def decode_notifications(self, buf: bytes) -> tuple[list[ObjectID], list[int], list[int]]:
        """Return the ids, data sizes and metadata sizes in the bytes of a notification."""
        return decode(buf)


def connect(store_socket_name: str | None = None, num_retries: int = -1) -> PlasmaClient:
    """Connect to a store.

    Parameters
    ----------
    store_socket_name : str, optional
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
    return PlasmaClient(path, _DEFAULT_RETRIES if num_retries < 0 else num_retries)


def _checked(object_id: ObjectID) -> ObjectID:
    if not isinstance(object_id, ObjectID):
        raise TypeError(f"an ObjectID is needed here, not {type(object_id).__name__}")
    return object_id


def _program_name() -> str:
    return os.path.basename(sys.argv[0]) if sys.argv else ""


def _after_fork_in_child() -> None:
    for client in list(_clients):
        client._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
