"""Sharing: arrays and Arrow data that pass between processes as references instead of bytes.

`multiprocessing` pickles whatever passes through a queue, a pipe or a pool with its `ForkingPickler`, which asks a table of
reducers by type, at any depth of a value.  `share` enters reducers for NumPy arrays and Arrow's values there:

* What is smaller than `min_bytes`, or has Python objects in it, passes as ever.  The threshold is for each array by itself.
* A part of what lies in the store already (a slice of an array or table that came from a reference) passes as a
  reference and a place in it.  Nothing is copied.
* Anything else is stored once, and passes as a reference (`shmplasma.references`) for one receiver.
* A data frame is no special case: its columns are such arrays.

The receiver finds a read-only view.  In a full store everything passes as ever.

What was stored once
    A value that is sent again is not stored again: it is remembered by identity, as long as it lives, together with its
    reference.  NumPy arrays may change in between, so one is compared, byte by byte, with what was stored.
    Arrow's values never change.  When the store is full, what is remembered is let go first.

Which processes have the reducers
    Forked children inherit them.  Others learn by a reducer too: what describes a child for spawn and forkserver has
    an authentication key in it, whose pickle then enters them as well.  In a child they stay for good.
"""

from __future__ import annotations

import multiprocessing
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from multiprocessing.context import BaseContext
from multiprocessing.process import AuthenticationString  # type: ignore[attr-defined]  # it is there
from multiprocessing.reduction import ForkingPickler
from operator import index
from typing import Any, Final, Self, SupportsIndex

import numpy as np
import pyarrow as pa

from shmplasma.arrow_errors import PlasmaObjectNotFound, PlasmaStoreFull
from shmplasma.client import PlasmaClient
from shmplasma.objects import ObjectID
from shmplasma.store_ref import Home, StoreRef, home_of

__all__ = ["DEFAULT_MIN_BYTES", "Sharing", "get_context", "share"]

DEFAULT_MIN_BYTES: Final = 1 << 16
"""From about here on a reference, some 100 us at both ends together, costs less than the copies through a pipe."""

_COMPARED_BYTES: Final = 1 << 18
"""At a time, as comparing makes an array of as many bytes, which is to stay in the cache."""

_ABSENT: Final = ObjectID(20 * b"\0")
_PLAIN_PROTOCOL: Final = 4
"""What `ForkingPickler` uses by default; arrays of protocol 5 would hand over buffers, which it does not take."""


class Sharing:
    """Reducers that pass large values by the store of a client.

    Parameters
    ----------
    path : str
        The store's socket.
    min_bytes : int
        Smaller values pass as ever.

    Raises
    ------
    TypeError
        `min_bytes` is no whole number.

    Notes
    -----
    Thread-safe.  Can be pickled; it remembers nothing then.
    """

    def __init__(self, path: str, min_bytes: int) -> None:
        if not isinstance(min_bytes, SupportsIndex):
            raise TypeError(f"min_bytes is a number of bytes, not {type(min_bytes).__name__}")
        self._min_bytes = index(min_bytes)
        self._home: Home = home_of(path)
        self._types = self.reducers.keys() - {StoreRef}
        self._stored: dict[int, tuple[weakref.ref[Any], StoreRef]] = {}

    def __reduce__(self) -> tuple[type[Self], tuple[str, int]]:
        return type(self), (self._home.store_socket_name, self._min_bytes)

    @property
    def reducers(self) -> dict[type, Callable[[Any], Any]]:
        """What to enter into a pickler's table, by type."""
        return {
            StoreRef: self.reduce_ref,
            np.ndarray: self.reduce_array,
            pa.Buffer: self.reduce_buffer,
            **dict.fromkeys(_arrow_types(), self.reduce_arrow),
        }

    # -- reducers ------------------------------------------------------------------------------

    def reduce_ref(self, ref: StoreRef) -> Any:
        """Reduce a reference, for the one receiver that a queue or pipe has."""
        return ref.reduce(1)

    def reduce_array(self, array: np.ndarray[Any, Any]) -> Any:
        """Reduce an array."""
        if array.nbytes < self._min_bytes or array.dtype.hasobject:
            return array.__reduce_ex__(_PLAIN_PROTOCOL)
        if not array.flags.writeable:
            address, size = _span(array)
            owned = self._home.owner_of(address, size)
            if owned is not None:
                owner, start = owned
                start += array.ctypes.data - address
                return _view, (owner, start, array.shape, array.strides, array.dtype)
        ref = self._store(array, _is_unchanged)
        return array.__reduce_ex__(_PLAIN_PROTOCOL) if ref is None else (_value, (ref,))

    def reduce_buffer(self, buffer: pa.Buffer) -> Any:
        """Reduce a buffer of an Arrow value that passes in parts."""
        owned = None
        if buffer.size >= self._min_bytes and not buffer.is_mutable:
            owned = self._home.owner_of(buffer.address, buffer.size)
        if owned is None:
            return buffer.__reduce_ex__(_PLAIN_PROTOCOL)
        return _part, (*owned, buffer.size)

    def reduce_arrow(self, value: Any) -> Any:
        """Reduce an Arrow value: in parts if it lies in the store, else as a whole."""
        whole = value.nbytes >= self._min_bytes and not self._is_owned(value)
        ref = self._store(value, _is_constant) if whole else None
        return value.__reduce_ex__(_PLAIN_PROTOCOL) if ref is None else (_value, (ref,))

    def _is_owned(self, value: Any) -> bool:
        if isinstance(value, np.ndarray):
            return not value.flags.writeable and self._home.owner_of(*_span(value)) is not None
        largest = max(_buffers(value), key=lambda buffer: buffer.size, default=None)
        return largest is not None and self._home.owner_of(largest.address, 1) is not None

    # -- for those who keep values, and do not only send them ----------------------------------

    @property
    def min_bytes(self) -> int:
        """Smaller values are none of its business."""
        return self._min_bytes

    @property
    def store_identity(self) -> str:
        """What no other store has."""
        return self._home.identity

    def passes(self, value: object) -> bool:
        """Tell whether a value by itself, not something in it, would pass by the store."""
        if isinstance(value, pa.Buffer) or type(value) not in self._types:
            return False
        large: Any = value
        plain = not (isinstance(value, np.ndarray) and value.dtype.hasobject)
        return plain and bool(large.nbytes >= self._min_bytes)

    def keep(self, value: Any) -> Any:
        """Return a value that `passes` as it lies in the store; None if there is no room.

        Returns
        -------
        object
            The value itself if it lies there already, else a view of a copy.  It keeps the object.
        """
        if self._is_owned(value):
            return value
        ref = self._put(value)
        return None if ref is None else ref.get()

    def give_back(self, value: Any) -> int:
        """Take the pages of a value that was kept out of this process; they are there again when they are touched.

        Returns
        -------
        int
            How many bytes that makes.
        """
        if isinstance(value, np.ndarray):
            return self._home.give_back(*_span(value))
        return sum(self._home.give_back(each.address, each.size) for each in _buffers(value))

    # -- storing -------------------------------------------------------------------------------

    def _store(self, value: Any, is_same: Callable[[Any, StoreRef], bool]) -> StoreRef | None:
        """Return a reference to a copy of a value in the store; None if there is no room."""
        known = self._stored.get(id(value))
        if known is not None and known[0]() is value and self._serves(known[1], value, is_same):
            return known[1]
        ref = self._put(value)
        if ref is not None:
            stored, key = self._stored, id(value)

            def forget(gone: weakref.ref[Any]) -> None:
                found = stored.get(key)
                if found is not None and found[0] is gone:
                    del stored[key]

            stored[key] = weakref.ref(value, forget), ref
        return ref

    def _serves(self, ref: StoreRef, value: Any, is_same: Callable[[Any, StoreRef], bool]) -> bool:
        """Tell whether a reference still stands for a value: its object is there, and is the same."""
        self._home.renew()
        with suppress(PlasmaObjectNotFound):  # it may go meanwhile
            return self._home.contains(ref.object_id) and is_same(value, ref)
        return False

    def _put(self, value: Any) -> StoreRef | None:
        self._home.renew()
        try:
            return self._home.put_ref(value)
        except PlasmaStoreFull:
            if not self._stored:
                return None
        self._stored.clear()
        self._home.contains(_ABSENT)  # when that is answered, what was let go has gone
        try:
            return self._home.put_ref(value)
        except PlasmaStoreFull:
            return None


def _span(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Return the address and the size of the memory that an array covers."""
    spans = [(n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)]
    before = -sum(span for span in spans if span < 0)
    after = sum(span for span in spans if span > 0) + array.itemsize
    return array.ctypes.data - before, before + after


def _is_unchanged(array: np.ndarray[Any, Any], ref: StoreRef) -> bool:
    """Tell whether an array is still, to the byte, what was stored of it."""
    stored: np.ndarray[Any, Any] = ref.get()
    same = (array.shape, array.dtype, array.flags.fnc) == (
        stored.shape,
        stored.dtype,
        stored.flags.fnc,
    )
    if not same or not array.flags.forc:
        return False
    ours, theirs = (each.reshape(-1, order="A").view(np.uint8) for each in (array, stored))
    return all(
        np.array_equal(
            ours[start : start + _COMPARED_BYTES], theirs[start : start + _COMPARED_BYTES]
        )
        for start in range(0, ours.size, _COMPARED_BYTES)
    )


def _is_constant(*_: object) -> bool:
    return True


def _buffers(value: Any) -> Iterator[pa.Buffer]:
    """Yield the buffers of an Arrow value."""
    if isinstance(value, pa.Array):
        yield from (buffer for buffer in value.buffers() if buffer is not None)
    elif isinstance(value, pa.ChunkedArray):
        for chunk in value.chunks:
            yield from _buffers(chunk)
    else:
        for column in value.columns:
            yield from _buffers(column)


@cache
def _arrow_types() -> tuple[type, ...]:
    """Return the types of Arrow's values: a pickler asks by the very type."""
    named = (each for each in vars(pa.lib).values() if isinstance(each, type))
    arrays = {each for each in named if issubclass(each, pa.Array)}
    return (pa.Table, pa.RecordBatch, pa.ChunkedArray, *arrays)


# -- what arrives; pickles name these functions ------------------------------------------------


def _value(ref: StoreRef) -> Any:
    return ref.get()


def _view(
    ref: StoreRef,
    start: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: np.dtype[Any],
) -> np.ndarray[Any, Any]:
    data: Any = ref.buffer()  # what may be one, NumPy's types say only from 2.5 on
    return np.ndarray(shape, dtype, data, start, strides)


def _part(ref: StoreRef, start: int, size_bytes: int) -> pa.Buffer:
    return ref.buffer().slice(start, size_bytes)


# -- multiprocessing ---------------------------------------------------------------------------

_active: list[Sharing] = []
"""Those that are entered, the latest last."""


def share(client: PlasmaClient, min_bytes: int = DEFAULT_MIN_BYTES) -> AbstractContextManager[None]:
    """Let large arrays and Arrow data pass between processes through a store.

    Parameters
    ----------
    client : PlasmaClient
        Of the store.
    min_bytes : int, optional
        Values that are smaller by themselves are pickled as usual.

    Returns
    -------
    context manager
        Within it, this holds for all that `multiprocessing` and `concurrent.futures` pickle in this process; and for
        all that children that are started within it send, for as long as they live.

    Raises
    ------
    TypeError
        `client` is no client, or `min_bytes` no whole number.

    Notes
    -----
    The receiver gets read-only views.  What is written to an array after it was sent does not reach the receiver.
    """
    return _sharing(_shared_by(client, min_bytes))


def _shared_by(client: PlasmaClient, min_bytes: int) -> Sharing:
    if not isinstance(client, PlasmaClient):
        raise TypeError(f"share takes a client of a store, not {type(client).__name__}")
    return Sharing(client.socket_path, min_bytes)


def get_context(
    method: str | None, client: PlasmaClient, min_bytes: int = DEFAULT_MIN_BYTES
) -> BaseContext:
    """Return a context of `multiprocessing` whose processes share through a store.

    Parameters
    ----------
    method : str or None
        "fork", "spawn" or "forkserver"; None for the default.
    client, min_bytes
        As for `share`.

    Returns
    -------
    multiprocessing.context.BaseContext
        A new context.  `share` is in force in this process while it lives: `multiprocessing` has one table of reducers
        for all contexts.

    Raises
    ------
    TypeError
        As for `share`.
    ValueError
        There is no such method on this platform.
    """
    known = multiprocessing.get_context(method or multiprocessing.get_start_method())
    context = type(known)()
    sharing = _shared_by(client, min_bytes)
    _enter(sharing)
    weakref.finalize(context, _leave, sharing)
    return context


@contextmanager
def _sharing(sharing: Sharing) -> Iterator[None]:
    _enter(sharing)
    try:
        yield
    finally:
        _leave(sharing)


def _enter(sharing: Sharing) -> None:
    _active.append(sharing)
    _register(sharing.reducers)
    ForkingPickler.register(AuthenticationString, _reduce_key)


def _leave(sharing: Sharing) -> None:
    _active.remove(sharing)
    table: dict[type, Any] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]  # noqa: SLF001 - there is no unregister
    for cls in (*sharing.reducers, AuthenticationString):
        table.pop(cls, None)
    if _active:
        _register(_active[-1].reducers)
        ForkingPickler.register(AuthenticationString, _reduce_key)


def _register(reducers: Mapping[type, Callable[[Any], Any]]) -> None:
    for cls, reducer in reducers.items():
        ForkingPickler.register(cls, reducer)


def _reduce_key(key: AuthenticationString) -> Any:
    """Have a child that is told its key enter what its parent has entered."""
    _, (content,) = key.__reduce__()
    return _learn, (_active[-1], content)


def _learn(sharing: Sharing, content: bytes) -> AuthenticationString:
    if not _active:
        _enter(sharing)
    return AuthenticationString(content)
