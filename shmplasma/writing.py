"""The writing half of a client: create, fill, seal, put."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from operator import index
from sys import maxsize
from typing import Final, SupportsIndex

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shmplasma.arrow_errors import PlasmaStoreFull
from shmplasma.codecs import ndarray_head
from shmplasma.connected import Connected, checked, wait_seconds, whole_number
from shmplasma.copying import Source
from shmplasma.layout import REFERENCED
from shmplasma.leasing import LARGE_BYTES
from shmplasma.object_array import ObjectArray
from shmplasma.objects import ObjectID, fresh_id
from shmplasma.payloads import BytesPayload, Codec, Payload
from shmplasma.posted import Abort, Seal
from shmplasma.replies import Done
from shmplasma.requests import Flush
from shmplasma.serialization import SerializationContext, checked_context, serialize
from shmplasma.session import Session

__all__ = ["MAX_SIZE", "Writing"]

MAX_SIZE: Final = 1 << 62
"""Sizes beyond are refused at once: they do not fit the protocol's numbers, and no machine."""

_MAX_DIMENSIONS: Final = 64
"""As many as NumPy allows, and as an array's header has room for."""
_RAW: Final = Codec.RAW  # an attribute of an enumeration takes 0.1 us to look up


class Writing(Connected):
    """What a client does to store objects."""

    def create(
        self,
        object_id: ObjectID,
        data_size: SupportsIndex | float,
        metadata: bytes | bytearray = b"",
        *,
        timeout_ms: float | None = 0,
        keep: bool = False,
    ) -> pa.Buffer:
        """Make a new object and return its data for writing; `seal` completes it.

        Parameters
        ----------
        object_id : ObjectID
            A name that no object has.
        data_size : int
            Bytes of data, 0 or more.
        metadata : bytes or bytearray, optional
            Kept beside the data; takes up room too.
        timeout_ms : float or None, optional
            How long to wait for room, in milliseconds: 0 (the default) not at all; None or -1 without limit.
        keep : bool, optional
            Whether the object is never to be evicted (see `PlasmaClient.keep`).

        Returns
        -------
        pyarrow.Buffer
            Mutable, 64-byte aligned.  The memory stays reserved while it, or anything made of it, lives.

        Raises
        ------
        PlasmaObjectExists
            The id is taken.
        PlasmaStoreFull
            There is no room, or none came in time; its attributes and text say why.
        ValueError
            `data_size` is negative.

        Notes
        -----
        An object of up to 256 KiB, or up to 16 MiB if its client creates many such objects, takes a record and no waiting; any other takes a
        round trip (see `shmplasma.claims`).  Until it is sealed the object belongs to this client, and is removed when the client leaves or
        dies.  Requests for room are served in order (see `shmplasma.waiters`); other threads may use the client meanwhile, and Ctrl-C
        interrupts the wait.
        """
        session = self._session or self._live()
        claims = session.claims
        # What most ask for, without the steps that it does not need.
        may_claim = True
        if (
            claims is not None
            and type(object_id) is ObjectID
            and isinstance(data_size, int)
            and data_size > 0
            and timeout_ms == 0
            and type(metadata) is bytes
            and not metadata
            and not keep
        ):
            claimed = claims.create(object_id, data_size, 0, _RAW)
            if claimed is not None:
                self._unsealed.add(object_id.id_bytes)
                return pa.py_buffer(claimed.data)
            may_claim = False
        room = self._create(
            session,
            object_id,
            data_size,
            metadata,
            Codec.RAW,
            timeout_ms=timeout_ms,
            keep=keep,
            may_claim=may_claim,
        )
        return pa.py_buffer(room.data)

    def create_encoded(
        self,
        object_id: ObjectID,
        data_size: SupportsIndex | float,
        metadata: bytes | bytearray,
        codec: int,
        *,
        timeout_ms: float | None = 0,
        keep: bool = False,
    ) -> pa.Buffer:
        """Make a new object to be filled with what `get_encoded` has returned, perhaps elsewhere.

        Otherwise as `create`, but an unknown codec is a ValueError too.  Whether the bytes are what the codec says is seen by whoever gets them.
        """
        codec = index(codec)
        if not 0 <= codec < REFERENCED:
            raise ValueError(f"no object has the codec {codec}; pass on that of get_encoded")
        room = self._create(
            self._live(), object_id, data_size, metadata, codec, timeout_ms=timeout_ms, keep=keep
        )
        return pa.py_buffer(room.data)

    def create_array(
        self,
        object_id: ObjectID,
        shape: int | Sequence[int],
        dtype: npt.DTypeLike = float,
        *,
        timeout_ms: float | None = 0,
        keep: bool = False,
    ) -> ObjectArray:
        """Make a new object that holds an array, and return the array for writing.

        Parameters
        ----------
        object_id : ObjectID
            A name that no object has.
        shape : int or sequence of int
            The array's shape; elements lie in C order.
        dtype : data-type, optional
            The type of the elements; none with Python objects.
        timeout_ms : float or None, optional
            How long to wait for room, in milliseconds: 0 (the default) not at all; None or -1 without limit.
        keep : bool, optional
            Whether the object is never to be evicted (see `PlasmaClient.keep`).

        Returns
        -------
        ObjectArray
            Uninitialized.  As a context manager it seals on success and aborts on an exception; otherwise call ``seal``.  Then `get` returns it.

        Raises
        ------
        PlasmaObjectExists, PlasmaStoreFull
            As `create`.
        TypeError
            The dtype has Python objects.
        ValueError
            No array has this shape.
        """
        session = self._live()
        shape = tuple(map(index, shape)) if isinstance(shape, Iterable) else (index(shape),)
        dtype = np.dtype(dtype)
        if len(shape) > _MAX_DIMENSIONS or not all(0 <= length <= maxsize for length in shape):
            raise ValueError(f"an array cannot have the shape {shape}")
        elements_bytes = prod(shape) * dtype.itemsize
        head = ndarray_head(dtype, shape, elements_bytes)
        size = len(head) + elements_bytes
        target = self._create(
            session, object_id, size, b"", Codec.NDARRAY, timeout_ms=timeout_ms, keep=keep
        )
        try:
            target[: len(head)] = np.frombuffer(head, np.uint8)
            array = ObjectArray(shape, dtype, target.data, len(head))
            array.unsealed = self, object_id
        except BaseException:
            self._unsealed.discard(object_id.id_bytes)
            session.post_soon(Abort.KIND, object_id.id_bytes)
            raise
        return array

    def create_and_seal(
        self,
        object_id: ObjectID,
        data: Source,
        metadata: bytes | bytearray = b"",
        *,
        timeout_ms: float | None = 0,
        keep: bool = False,
    ) -> None:
        """Store bytes under a chosen id.

        Parameters
        ----------
        object_id : ObjectID
            A name that no object has.
        data : bytes-like
            What to store.
        metadata : bytes or bytearray, optional
            Kept beside it.
        timeout_ms : float or None, optional
            How long to wait for room, in milliseconds: 0 (the default) not at all; None or -1 without limit.
        keep : bool, optional
            Whether the object is never to be evicted (see `PlasmaClient.keep`).

        Raises
        ------
        PlasmaObjectExists, PlasmaStoreFull
            As `create`.
        """
        self.put_raw_buffer(data, checked(object_id), metadata, timeout_ms=timeout_ms, keep=keep)

    def put_raw_buffer(
        self,
        value: Source,
        object_id: ObjectID | None = None,
        metadata: bytes | bytearray = b"",
        memcopy_threads: SupportsIndex | float = 6,
        *,
        timeout_ms: float | None = 0,
        keep: bool = False,
    ) -> ObjectID:
        """Store bytes.

        Parameters
        ----------
        value : bytes-like
            What to store: all bytes of anything with the buffer protocol, of any shape.
        object_id : ObjectID, optional
            A name that no object has; a random one if not given.
        metadata : bytes or bytearray, optional
            Kept beside it.
        memcopy_threads : int, optional
            Upper limit on the threads that copy a large value; there are never more than processors.
        timeout_ms : float or None, optional
            How long to wait for room, in milliseconds: 0 (the default) not at all; None or -1 without limit.
        keep : bool, optional
            Whether the object is never to be evicted (see `PlasmaClient.keep`).

        Returns
        -------
        ObjectID
            The object's name.

        Raises
        ------
        PlasmaObjectExists, PlasmaStoreFull
            As `create`.
        TypeError
            `value` has no bytes, or `metadata` is something other than bytes.
        """
        if type(metadata) is not bytes:
            _checked_metadata(metadata)
        if type(value) is bytes:
            if object_id is None and not metadata:
                return self._put_bytes(value, _RAW, memcopy_threads, timeout_ms, keep)
            payload: Payload = BytesPayload(_RAW, value)
        else:
            try:
                size = value.nbytes if isinstance(value, np.ndarray) else memoryview(value).nbytes
            except TypeError:
                raise TypeError(
                    f"bytes or a buffer of them are needed here, not {type(value).__name__}; put takes any value"
                ) from None
            payload = Payload(_RAW, size, ((0, size, value),))
        return self._put(
            payload, object_id, metadata, memcopy_threads, timeout_ms=timeout_ms, keep=keep
        )

    def put(
        self,
        value: object,
        object_id: ObjectID | None = None,
        memcopy_threads: SupportsIndex | float = 6,
        serialization_context: SerializationContext | None = None,
        *,
        timeout_ms: float | None = 0,
        keep: bool = False,
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
            Serializers for your own types; the process's default context if not given.
        timeout_ms : float or None, optional
            How long to wait for room, in milliseconds: 0 (the default) not at all; None or -1 without limit.
        keep : bool, optional
            Whether the object is never to be evicted (see `PlasmaClient.keep`).

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
        An array that is not contiguous is stored in C order; its copy takes as long as any such.  A value of up to 256 KiB, or of up to 16 MiB
        if its client puts many such values, takes a record and no waiting; any other takes a round trip.  Each byte of a large part is copied once.
        """
        payload = serialize(value, checked_context(serialization_context))
        if type(payload) is BytesPayload and object_id is None:
            return self._put_bytes(payload.data, payload.codec, memcopy_threads, timeout_ms, keep)
        return self._put(payload, object_id, b"", memcopy_threads, timeout_ms=timeout_ms, keep=keep)

    def _put_bytes(
        self,
        data: bytes,
        codec: Codec,
        threads: SupportsIndex | float,
        timeout_ms: float | None,
        keep: bool,
    ) -> ObjectID:
        """Store bytes under a fresh id, which is what most puts come to, in as few steps as may be; otherwise as `_put`."""
        if type(timeout_ms) is not int:
            wait_seconds(timeout_ms)
        if type(threads) is not int:
            whole_number(threads, "threads")
        leasing = (self._session or self._live()).leasing
        may_lease = len(data) > LARGE_BYTES
        if leasing is not None and not may_lease:
            object_id = fresh_id()
            if leasing.put_bytes(object_id.id_bytes, data, codec, keep):
                return object_id
        payload = BytesPayload(codec, data)
        return self._put(
            payload, None, b"", threads, timeout_ms=timeout_ms, keep=keep, may_lease=may_lease
        )

    def _put(
        self,
        payload: Payload,
        object_id: ObjectID | None,
        metadata: bytes | bytearray,
        threads: SupportsIndex | float,
        *,
        timeout_ms: float | None,
        keep: bool = False,
        flags: int = 0,
        fresh: bool = False,
        may_lease: bool = True,
    ) -> ObjectID:
        """Store a payload: in the lease if that has room for it, else in room that a round trip gets."""
        if type(timeout_ms) is not int:
            wait_seconds(timeout_ms)  # refuses what is no number, also where there is room
        codec = payload.codec | flags
        if type(threads) is not int:
            threads = whole_number(threads, "threads")
        session = self._session or self._live()
        target_id = fresh_id() if object_id is None else checked(object_id)
        leasing = session.leasing
        if leasing is None or not may_lease:
            is_put = False
        elif object_id is None or fresh:
            is_put = leasing.put(target_id.id_bytes, payload, metadata, threads, codec, keep)
        else:
            claims = None if keep else session.claims
            is_put = claims is not None and claims.put(target_id, payload, metadata, threads, codec)
        if is_put:
            return target_id
        if object_id is None:  # the store is asked, and need not look for this one in outboxes
            target_id = ObjectID.from_random()

        def complete(target: npt.NDArray[np.uint8]) -> None:
            payload.write(target, threads)
            session.seal(target_id)

        self._create(
            session,
            target_id,
            payload.size_bytes,
            metadata,
            codec,
            timeout_ms=timeout_ms,
            keep=keep,
            may_claim=False,  # there was no room on lease
            complete=complete,
        )
        return target_id

    def flush(self) -> None:
        """Wait until the store has handled all that this client has sent.

        Notes
        -----
        One round trip.  Seldom needed: whoever asks the store finds all that was put before.
        """
        self._live().call(Flush(), Done)

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
        id_bytes = checked(object_id).id_bytes
        if id_bytes in self._unsealed:
            self._unsealed.discard(id_bytes)
            session.seal(object_id)
        else:
            session.call(Seal(id_bytes), Done)

    def abort(self, object_id: ObjectID) -> None:
        """Remove an object that this client has created and not sealed.

        Raises
        ------
        PlasmaObjectNotFound
            This client is not writing such an object.
        """
        id_bytes = checked(object_id).id_bytes
        self._live().abort(id_bytes)
        self._unsealed.discard(id_bytes)

    def _create(
        self,
        session: Session,
        object_id: ObjectID,
        data_size: SupportsIndex | float,
        metadata: bytes | bytearray,
        codec: int,
        *,
        timeout_ms: float | None,
        keep: bool,
        may_claim: bool = True,
        complete: Callable[[npt.NDArray[np.uint8]], None] | None = None,
    ) -> npt.NDArray[np.uint8]:
        """Create an object, fill in its metadata, have `complete` fill and seal it if it is to, and return its data."""
        _checked_metadata(metadata)
        size = whole_number(data_size)
        if size < 0:
            raise ValueError(f"an object cannot have {size} bytes")
        if size > MAX_SIZE:
            raise PlasmaStoreFull(f"no store has room for {size} bytes", size)
        id_bytes = checked(object_id).id_bytes
        seconds = wait_seconds(timeout_ms)

        def fill(target: npt.NDArray[np.uint8]) -> None:
            if metadata:
                target[size:] = np.frombuffer(metadata, np.uint8)
            if complete is None:
                self._unsealed.add(id_bytes)
            else:
                complete(target[:size])

        target = None
        if may_claim and session.claims is not None and not keep:
            target = session.claims.create(object_id, size, len(metadata), codec)
        if target is None:
            target = session.create(
                id_bytes, size, len(metadata), codec, keep=keep, wait_seconds=seconds, fill=fill
            )
        else:
            fill(target)
        return target[:size]


def _checked_metadata(metadata: bytes | bytearray) -> None:
    if not isinstance(metadata, (bytes, bytearray)):
        raise TypeError(f"metadata is bytes or a bytearray, not {type(metadata).__name__}")
