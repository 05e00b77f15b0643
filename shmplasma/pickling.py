"""Pickles whose arrays lie beside them.

`dump` pickles a value (protocol 5) and takes out of the pickle what is large: arrays and Arrow values at
any depth, in the formats of `shmplasma.codecs`, and the buffers that other types offer to protocol 5.  If
there is nothing of the kind, the object is a plain pickle.  `load` puts it together again, over the
object's buffer.

What plain pickle refuses (lambdas, local classes), and all that mentions ``__main__``, or ``__mp_main__`` as spawned
workers call it, goes to cloudpickle, which stores code by value.  Pickle would store a class of the program's main module as the
name ``__main__.Class``; but in another process that name means that process's main module, so the reader would
fail, or worse, find another class of the same name.

References that a value holds are lent when it is written (`shmplasma.lending`).

Layout of PICKLE_PARTS: `_HEAD` (magic, number of parts, bytes of pickle), offset and size of each part in
8-byte words, the pickle, the parts, each aligned.

Pickles run code when they are read.  All who can write into a store run as the same user or group, and
could do as much without it; a store must not be opened to those whom one does not trust.
"""

from __future__ import annotations

import copyreg
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from operator import methodcaller
from struct import Struct
from types import FunctionType
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shmplasma.codecs import (
    DECODERS,
    ENCODERS,
    MAIN,
    DeserializationError,
    WriteChunks,
)
from shmplasma.copying import Source
from shmplasma.layout import align_up, alignment_of
from shmplasma.lending import LENDERS, Loans
from shmplasma.payloads import BytesPayload, Codec, Payload

__all__ = [
    "BUILT_IN",
    "PROTOCOL",
    "Deserializers",
    "Reducer",
    "dump",
    "load",
    "native_reducer",
    "registered_reducer",
    "split",
]

PROTOCOL: Final = 5
BUILT_IN: Final = frozenset(
    {int, float, str, bool, type(None), type(...), type(NotImplemented), bytes, bytearray}
    | {list, tuple, dict, set, frozenset, type, FunctionType, pickle.PickleBuffer}
)
"""Types that a pickler writes without asking for a reducer."""

Reducer: TypeAlias = Callable[[Any], Any]
"""Returns what to pickle in place of a value, as `object.__reduce_ex__` does."""
Deserializers: TypeAlias = Mapping[object, Callable[[Any], object]]
"""Deserializers of users' types by type id."""

_PICKLE: Final = Codec.PICKLE  # an attribute of an enumeration takes 0.1 us to look up
_MAGIC: Final = b"spPP"
_HEAD: Final = Struct("<4sIQ")
_PLACE: Final = Struct("<QQ")
_INBAND_BYTES: Final = 1024
"""Smaller buffers and arrays stay in the pickle.  Measured: to put and get one more array of a list takes
2.2 us there and 11 us beside it, whatever its size up to here; a copy of 1 KiB takes 0.1 us."""
_FRAME: Final = (b"\x95", b"\x80\x05\x95")
"""How a frame begins, the first of a pickle last.  What names a class is in a frame; other chunks are large values of the user's."""
_GLOBAL: Final = b"\x93"
"""Is in a pickle that names anything.  It is found at 20 GB/s, a longer sequence at 3."""
_MAINS: Final = ("__main__", "__mp_main__")
_plain_reduce: Final = methodcaller("__reduce_ex__", PROTOCOL)
_reading: ContextVar[Deserializers] = ContextVar("_reading", default={})  # noqa: B039  # never changed
"""What the current thread reads by: unpickling can pass nothing to the functions that it calls."""
_private: ContextVar[bool] = ContextVar("_private", default=False)
"""Whether it reads a private copy, whose arrays can be written to."""


# --- reducers -----------------------------------------------------------------------------------------


class _Placeholder(bytearray):
    """Stands for a payload where the pickler wants a buffer to leave out; writable, as a private copy of the value is."""

    payload: Payload


def _embedding(encode: Callable[[Any], Payload | None]) -> Reducer:
    """Return a reducer that stores a value beside the pickle, in its own codec."""

    def reduce(value: Any) -> Any:
        payload = encode(value)
        if payload is None:
            return value.__reduce_ex__(PROTOCOL)
        placeholder = _Placeholder()
        placeholder.payload = payload
        return _embedded, (int(payload.codec), pickle.PickleBuffer(placeholder))

    return reduce


_embed_ndarray: Final = _embedding(ENCODERS[np.ndarray])


def _reduce_ndarray(array: np.ndarray[Any, Any]) -> Any:
    if array.nbytes >= _INBAND_BYTES or array.dtype.hasobject or not array.itemsize:
        return _embed_ndarray(array)
    return _small_array, (array.tobytes("A"), array.shape, array.dtype, array.flags.fnc)


def _arrow_reducer(cls: type) -> Reducer:
    embed = _embedding(ENCODERS[cls])
    if cls is pa.Tensor:  # which has no way of its own
        return embed

    def reduce(value: Any) -> Any:
        # Arrow's own way takes a tenth of the time, but it stores whole buffers, of a slice too.
        spare_bytes = value.get_total_buffer_size()
        if spare_bytes >= _INBAND_BYTES:  # `nbytes` takes 2 us, most of it all
            spare_bytes -= value.nbytes
        if spare_bytes < _INBAND_BYTES and not _is_lost_on_arrow(value):
            return value.__reduce_ex__(PROTOCOL)
        return embed(value)

    return reduce


def _is_lost_on_arrow(value: Any) -> bool:
    """Tell whether Arrow's own pickle would forget something: how many rows are in no columns, and that maps are sorted."""
    if isinstance(value, (pa.Table, pa.RecordBatch)):
        return not value.num_columns or any(map(_has_sorted_map, value.schema.types))
    return _has_sorted_map(value.type)


def _has_sorted_map(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.MapType) and kind.keys_sorted:
        return True
    if isinstance(kind, pa.DictionaryType):
        return _has_sorted_map(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return _has_sorted_map(kind.storage_type)
    return any(_has_sorted_map(kind.field(number).type) for number in range(kind.num_fields))


def _reduce_sparse(matrix: Any) -> Any:
    return _sparse, (type(matrix).__name__, matrix.to_numpy(), matrix.shape, matrix.dim_names)


_SPARSE: Final[frozenset[type]] = frozenset(
    {pa.SparseCOOTensor, pa.SparseCSRMatrix, pa.SparseCSCMatrix}
)
"""Those of Arrow's sparse tensors that tell all of what they are; CSF keeps the order of its axes to itself."""


def _reduce_subclass(array: np.ndarray[Any, Any]) -> Any:
    if array.dtype.hasobject:  # it may contain itself, which only pickle sees
        return array.__reduce_ex__(PROTOCOL)
    return _as_subclass, (type(array), array.view(np.ndarray))


def _reduce_masked(array: np.ma.MaskedArray[Any, Any]) -> Any:
    if array.dtype.hasobject:
        return array.__reduce_ex__(PROTOCOL)
    return _masked, (array.data, array.mask, array.fill_value)


def native_reducer(cls: type, base: type) -> Reducer | None:
    """Return what reduces values of a class to what an encoder makes of them.

    Parameters
    ----------
    cls : type
        Class of the values.
    base : type
        Its nearest base in `ENCODERS`.

    Returns
    -------
    callable or None
        None for a subclass of ndarray that is pickled in a way of its own.
    """
    if base is not np.ndarray:
        return _arrow_reducer(base)
    if base is cls:
        return _reduce_ndarray
    if cls in copyreg.dispatch_table:
        return None
    if cls is np.ma.MaskedArray:  # its own way copies it twice
        return _reduce_masked
    inherited = ("__reduce__", "__reduce_ex__", "__setstate__")
    if all(getattr(cls, name) is getattr(np.ndarray, name) for name in inherited):
        return _reduce_subclass
    return None


def registered_reducer(type_id: object, serializer: Callable[[Any], object]) -> Reducer:
    """Return what reduces values of a user's type to the form that its serializer returns."""
    return lambda value: (_restored, (type_id, serializer(value)))


# --- writing ------------------------------------------------------------------------------------------


class _Reducers(dict[type, Reducer]):
    """A pickler's dispatch table for one value, filled as types are met.

    A pickler asks it for each value whose class is not built in; what it finds here costs it nothing, and
    a table that lives no longer than its pickler neither grows without end nor goes stale.

    Parameters
    ----------
    find : callable
        Takes a class and returns its reducer or None; asked first.
    fallback : mapping
        The table that the pickler would have used.
    loans : list
        Takes what the pickle lends.
    by_value : bool
        Whether the pickler stores code by value.  If not, it is in vain to go on with an instance of a class of a main
        module.
    """

    __slots__ = ("_by_value", "_fallback", "_find", "_loans")

    def __init__(
        self,
        find: Callable[[type], Reducer | None],
        fallback: Mapping[type, Reducer],
        loans: Loans,
        *,
        by_value: bool,
    ) -> None:
        self._find = find
        self._fallback = fallback
        self._loans = loans
        self._by_value = by_value

    def __missing__(self, cls: type) -> Reducer:
        reducer = self._find(cls) or self._fallback.get(cls)
        if reducer is None and cls in LENDERS:
            lender, loans = LENDERS[cls], self._loans
            reducer = lambda value: lender(value, loans)  # noqa: E731 - it is one of many
        if reducer is None and cls in _SPARSE:
            reducer = _reduce_sparse
        if reducer is None:
            if issubclass(cls, type):  # its instances are classes, which the pickler stores by name
                raise KeyError(cls)
            if not self._by_value and cls.__module__ in _MAINS:
                raise pickle.PicklingError(f"{cls.__qualname__} is to be stored by value")
            reducer = _plain_reduce
        self[cls] = reducer
        return reducer


def dump(value: object, find: Callable[[type], Reducer | None]) -> Payload:
    """Return what is to be written for any value.

    Parameters
    ----------
    value : object
        What to pickle.
    find : callable
        Takes a class that is met in `value` and returns its reducer, or None to leave it to pickle.

    Raises
    ------
    Exception
        Whatever cloudpickle, a class in `value` or a reducer raises.
    """
    loans: Loans = []
    try:
        try:
            chunks, parts = _dump(value, find, loans, by_value=False)
            by_value = _mentions_main(chunks)
        except Exception:  # noqa: BLE001  # cloudpickle stores the value, or raises it again
            chunks, parts, by_value = WriteChunks(), [], True
        if by_value:
            loans.clear()
            chunks, parts = _dump(value, find, loans, by_value=True)
        payload = _join(chunks, parts)
        return _LendingPayload(payload, tuple(loans)) if loans else payload
    finally:
        loans.clear()  # which cloudpickle's classes keep until the collector comes


def _mentions_main(chunks: WriteChunks) -> bool:
    """Tell whether a pickle names anything, and anything of a main module; it may say so where it does not."""
    if len(chunks) == 1:  # as nearly always
        return _GLOBAL in chunks[0] and MAIN in chunks[0]
    frames = [chunk for chunk in chunks if chunk.startswith(_FRAME)]
    return any(_GLOBAL in frame for frame in frames) and any(MAIN in frame for frame in frames)


class _LendingPayload(Payload):
    """A pickle that holds references, which are lent when it is written: there is room for it then."""

    __slots__ = ("_loans", "_payload")

    def __init__(self, payload: Payload, loans: tuple[Callable[[], object], ...]) -> None:
        super().__init__(payload.codec, payload.size_bytes, ())
        self._payload = payload
        self._loans = loans

    def write(self, target: npt.NDArray[np.uint8], threads: int = 1) -> None:
        self._payload.write(target, threads)
        for lend in self._loans:
            lend()


def _dump(
    value: object, find: Callable[[type], Reducer | None], loans: Loans, *, by_value: bool
) -> tuple[WriteChunks, list[Payload | memoryview]]:
    """Return the pickle, in chunks, and what was left out of it."""
    chunks = WriteChunks()
    parts: list[Payload | memoryview] = []

    def leave_out(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if type(view.obj) is _Placeholder:
            parts.append(view.obj.payload)
            return False
        if view.nbytes < _INBAND_BYTES:
            return True
        parts.append(view)
        return False

    if by_value:
        # It takes 20 ms, and few values need it.
        from cloudpickle import CloudPickler, register_pickle_by_value  # noqa: PLC0415

        main = sys.modules.get("__mp_main__")
        # Else it is another name of `__main__`, which cloudpickle knows.
        if main is not None and main.__name__ == "__mp_main__":
            register_pickle_by_value(main)

        class ByValue(CloudPickler):  # type: ignore[misc]  # cloudpickle has no types
            # CloudPickler has a table of its own, and the base looks for one only in its __init__.
            dispatch_table = _Reducers(find, CloudPickler.dispatch_table, loans, by_value=True)

        ByValue(chunks, PROTOCOL, buffer_callback=leave_out).dump(value)
    else:
        pickler = pickle.Pickler(chunks, PROTOCOL, buffer_callback=leave_out)
        pickler.dispatch_table = _Reducers(find, copyreg.dispatch_table, loans, by_value=False)
        pickler.dump(value)
    return chunks, parts


def _join(chunks: WriteChunks, parts: list[Payload | memoryview]) -> Payload:
    if not parts and len(chunks) == 1:  # its only frame
        return BytesPayload(_PICKLE, chunks[0])
    if sum(map(len, chunks)) != chunks.n_bytes:
        raise BufferError("a bytearray in it changed its size meanwhile; put a copy of it")
    places: list[tuple[int, int, Source | Payload]] = []
    table: list[int] = []
    end = _HEAD.size + 16 * len(parts) if parts else 0
    for chunk in chunks:
        places.append((end, len(chunk), chunk))
        end += len(chunk)
    if not parts:
        return Payload(_PICKLE, end, places)
    head = _HEAD.pack(_MAGIC, len(parts), end - _HEAD.size - 16 * len(parts))
    for part in parts:
        size = part.size_bytes if isinstance(part, Payload) else part.nbytes
        start = align_up(end, alignment_of(size))
        places.append((start, size, part))
        table += start, size
        end = start + size
    head += Struct(f"<{len(table)}Q").pack(*table)
    return Payload(Codec.PICKLE_PARTS, end, [(0, len(head), head), *places])


# --- reading ------------------------------------------------------------------------------------------


def split(buffer: pa.Buffer) -> tuple[memoryview, list[pa.Buffer]]:
    """Return the pickle and the parts of an object in the format PICKLE_PARTS.

    Raises
    ------
    ValueError, struct.error
        The object is damaged.
    """
    view = memoryview(buffer).cast("B")
    magic, n_parts, pickle_bytes = _HEAD.unpack_from(view)
    start = _HEAD.size + 16 * n_parts
    if magic != _MAGIC or start + pickle_bytes > len(view):
        raise ValueError("it has no header of a pickle with parts")
    parts: list[pa.Buffer] = []
    for offset, size in _PLACE.iter_unpack(view[_HEAD.size : start]):
        if offset + size > len(view):
            raise ValueError(f"a part ends at {offset + size} of {len(view)} bytes")
        # A slice of a buffer cannot be written to, whatever the buffer is.
        part = view[offset : offset + size]
        parts.append(pa.py_buffer(part) if buffer.is_mutable else buffer.slice(offset, size))
    return view[start : start + pickle_bytes], parts


def load(
    data: pa.Buffer | memoryview, parts: Sequence[pa.Buffer], deserializers: Deserializers
) -> object:
    """Return the value of a pickle.

    Parameters
    ----------
    data : bytes-like
        The pickle.
    parts : sequence of pyarrow.Buffer
        What was left out of it.
    deserializers : mapping
        Those of users' types.

    Raises
    ------
    DeserializationError
        A deserializer is missing.
    Exception
        Whatever pickle, a class or a deserializer raises.
    """
    private = not memoryview(data).readonly
    if not (private or deserializers or _reading.get()):
        return pickle.loads(data, buffers=parts)
    token = _reading.set(deserializers)
    private_token = _private.set(private)
    try:
        return pickle.loads(data, buffers=parts)
    finally:
        _private.reset(private_token)
        _reading.reset(token)


# Pickles name the functions that follow: to move or rename one makes stored objects unreadable.


def _embedded(codec: int, data: pa.Buffer) -> object:
    return DECODERS[codec](data)


def _sparse(name: str, parts: Sequence[Any], shape: tuple[int, ...], dim_names: Any) -> object:
    return getattr(pa, name).from_numpy(*parts, shape, dim_names)


def _small_array(
    data: bytes, shape: tuple[int, ...], dtype: np.dtype[Any], fortran: bool
) -> np.ndarray[Any, Any]:
    memory = bytearray(data) if _private.get() else data
    return np.ndarray(shape, dtype, memory, 0, None, "F" if fortran else "C")


def _as_subclass(cls: type[np.ndarray[Any, Any]], array: np.ndarray[Any, Any]) -> object:
    return array.view(cls)


def _masked(data: np.ndarray[Any, Any], mask: Any, fill_value: Any) -> object:
    return np.ma.MaskedArray(data, mask, keep_mask=False, fill_value=fill_value)


def _restored(type_id: object, form: object) -> object:
    deserializer = _reading.get().get(type_id)
    if deserializer is None:
        raise DeserializationError(
            f"no deserializer is registered here for the type {type_id!r}; register it as its writer did"
        )
    return deserializer(form)
