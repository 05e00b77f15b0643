"""Python values to bytes for an object of the store, and back.

`serialize` looks at a value, copies nothing and returns a `Payload` that knows its size; the caller finds
room and has it written there.  `deserialize` builds the value over the object's buffer: arrays are
read-only views of it and keep it alive.

What becomes of a value
-----------------------
* `bytes` are stored as they are, NumPy arrays and Arrow values in the formats of `shmplasma.codecs`.
* Everything else is pickled (protocol 5).  Arrays and Arrow values in it, at any depth, are taken out
  of the pickle and stored beside it in those same formats, and so are the buffers that other types offer
  to protocol 5.  If there are none, the object is the pickle alone.
* What plain pickle refuses (lambdas, local classes), and all that mentions ``__main__``, goes to
  cloudpickle, which stores code by value.  Pickle would store a class of the program's main module as
  the name ``__main__.Class``; but in another process that name means that process's main module, so the
  reader would fail, or worse, find another class of the same name.
* A type with a registered serializer is stored as what its serializer returns.

Layout of PICKLE_PARTS: `_HEAD` (magic, number of parts, bytes of pickle), offset and size of each part in
8-byte words, the pickle, the parts, each aligned.

Pickles run code when they are read.  All who can write into a store run as the same user or group, and
could do as much without it; a store must not be opened to those whom one does not trust.
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from operator import methodcaller
from struct import Struct
from types import FunctionType
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from shmplasma.codecs import (
    DECODERS,
    ENCODERS,
    Codec,
    DeserializationError,
    Payload,
    SerializationError,
    Source,
    WriteChunks,
    copy_into,
)
from shmplasma.layout import ALIGNMENT, align_up

__all__ = [
    "Codec",
    "DeserializationError",
    "Payload",
    "SerializationContext",
    "SerializationError",
    "copy_into",
    "default_context",
    "deserialize",
    "register_serializer",
    "serialize",
]

_BYTES: Final = Codec.BYTES  # an attribute of an enumeration takes 0.1 us to look up
_PICKLE: Final = Codec.PICKLE
_PICKLE_PARTS: Final = Codec.PICKLE_PARTS

_PROTOCOL: Final = 5
_MAGIC: Final = b"spPP"
_HEAD: Final = Struct("<4sIQ")
_PLACE: Final = Struct("<QQ")
_INBAND_BYTES: Final = 1024
"""Smaller buffers and arrays stay in the pickle.  Measured: to put and get one more array of a list takes
2.2 us there and 11 us beside it, whatever its size up to here; a copy of 1 KiB takes 0.1 us."""
_FRAME_BYTES: Final = 128 << 10
"""Pickle ends a frame at 64 KiB or soon after; larger chunks are single values of the user's."""

_ATOMS: Final = frozenset({int, float, str, bool, complex, type(None)})
"""Types that can contain nothing and need no class: a plain pickle does."""
_BUILT_IN: Final = frozenset(
    {int, float, str, bool, type(None), type(...), type(NotImplemented), bytes, bytearray}
    | {list, tuple, dict, set, frozenset, type, FunctionType, pickle.PickleBuffer}
)
"""Types that the pickler writes without asking anybody."""

_Reducer = Callable[[Any], Any]
_plain_reduce: Final = methodcaller("__reduce_ex__", _PROTOCOL)


class _Registration(NamedTuple):
    type_id: object
    serializer: Callable[[Any], object] | None


class SerializationContext:
    """The serializers of a user's own types.

    Notes
    -----
    A context is not stored with an object: writer and reader each register the type.  Registrations are
    to be made before other threads use the context.

    Examples
    --------
    >>> class Point:
    ...     def __init__(self, x, y):
    ...         self.x, self.y = x, y
    >>> context = SerializationContext()
    >>> context.register_type(
    ...     Point,
    ...     "Point",
    ...     custom_serializer=lambda point: (point.x, point.y),
    ...     custom_deserializer=lambda form: Point(*form),
    ... )
    >>> payload = serialize([Point(1, 2)], context)
    >>> target = np.empty(payload.size_bytes, np.uint8)
    >>> payload.write(target)
    >>> [point] = deserialize(pa.py_buffer(target), payload.codec, context)
    >>> point.y
    2
    """

    __slots__ = ("_deserializers", "_registrations")

    def __init__(self) -> None:
        self._registrations: dict[type, _Registration] = {}
        self._deserializers: dict[object, Callable[[Any], object]] = {}

    def register_type(
        self,
        type_: type,
        type_id: object,
        pickle: bool = False,
        custom_serializer: Callable[[Any], object] | None = None,
        custom_deserializer: Callable[[Any], object] | None = None,
    ) -> None:
        """Say how values of a type are stored, at any depth of the values that are put.

        A value is stored by the registration of its own type, or else of the first base in its method
        resolution order that has one.  Registering a type again replaces what was said before.

        Parameters
        ----------
        type_ : type
            The type.  Numbers, `str`, `bytes`, functions and the built-in containers themselves cannot be
            registered, subclasses of them can.
        type_id : hashable, picklable
            Its name in the store, the same at the writer and the reader.
        pickle : bool
            Pickle values of this type, whatever is registered for its bases.
        custom_serializer : callable, optional
            Takes a value and returns the form to store: anything that can itself be stored.  Arrays in
            it come back without a copy.  Without one the type is pickled.
        custom_deserializer : callable, optional
            Takes that form and returns the value.  Only readers need it.

        Raises
        ------
        ValueError
            `type_` cannot be registered, or both `pickle` and a serializer or deserializer are given.
        """
        if type_ in _BUILT_IN:
            raise ValueError(
                f"{type_.__name__} is stored natively and cannot be registered; register a subclass"
            )
        if pickle and (custom_serializer or custom_deserializer):
            raise ValueError("give either pickle=True or custom functions, not both")
        self._registrations[type_] = _Registration(type_id, custom_serializer)
        if custom_deserializer is not None:
            self._deserializers[type_id] = custom_deserializer
        else:
            self._deserializers.pop(type_id, None)

    def encoder(self, cls: type) -> Callable[[Any], Payload | None] | None:
        """Return what encodes values of exactly this type without a pickle, or None."""
        for base in cls.__mro__:
            if base in self._registrations:
                return None
            if base in ENCODERS:  # a subclass of ndarray has more to it than its elements
                return ENCODERS[base] if base is cls or base is not np.ndarray else None
        return None

    def deserializer(self, type_id: object) -> Callable[[Any], object] | None:
        """Return what was registered under a type id, or None."""
        return self._deserializers.get(type_id)

    def reducer(self, cls: type) -> _Reducer | None:
        """Return what reduces values of a type while they are pickled, or None for no opinion."""
        for base in cls.__mro__:
            registration = self._registrations.get(base)
            if registration is not None:
                if registration.serializer is None:
                    return None
                return _registered(registration.type_id, registration.serializer)
            if base in ENCODERS:
                if base is not np.ndarray:
                    return _arrow_reducer(base)
                if base is cls:
                    return _reduce_ndarray
                return _reduce_subclass if _is_plain_subclass(cls) else None
        return None


default_context: Final = SerializationContext()
"""The context of this process, used where none is given."""

_reading: ContextVar[SerializationContext] = ContextVar("_reading", default=default_context)
"""The context by which the current thread reads: unpickling can pass nothing to what it calls."""


def register_serializer(
    cls: type, serializer: Callable[[Any], object], deserializer: Callable[[Any], object]
) -> None:
    """Register how values of a class are stored, in the default context of this process.

    The class is known to readers by its module and name, where the main module is just ``main``: it is
    ``__main__`` in a program and ``__mp_main__`` in the workers that it spawns.

    Parameters
    ----------
    cls : type
        The class.  It also covers its subclasses, see `SerializationContext.register_type`.
    serializer : callable
        Takes a value and returns the form to store.
    deserializer : callable
        Takes that form and returns the value.

    Raises
    ------
    ValueError
        `cls` cannot be registered.
    """
    module = "main" if cls.__module__ in ("__main__", "__mp_main__") else cls.__module__
    default_context.register_type(
        cls,
        f"{module}.{cls.__qualname__}",
        custom_serializer=serializer,
        custom_deserializer=deserializer,
    )


def serialize(value: object, context: SerializationContext | None = None) -> Payload:
    """Return what is to be written for a value; copies nothing that is large.

    Parameters
    ----------
    value : object
        Anything that pickle or cloudpickle can store, or that has a registered serializer.
    context : SerializationContext, optional
        The user's serializers; the process's default context if not given.

    Returns
    -------
    Payload
        With the codec to store beside the object, the bytes that it needs, and `Payload.write`.

    Raises
    ------
    SerializationError
        The value cannot be serialized.

    Notes
    -----
    Thread-safe.  The payload references the arrays in `value`; they must not change before it is written.
    """
    cls = type(value)
    try:
        if cls is bytes:
            data: bytes = value  # type: ignore[assignment]  # the test above is faster than isinstance
            return Payload(_BYTES, len(data), ((0, len(data), data),))
        if cls in _ATOMS:
            data = pickle.dumps(value, _PROTOCOL)
            return Payload(_PICKLE, len(data), ((0, len(data), data),))
        context = context or default_context
        encode = context.encoder(cls)
        payload = encode(value) if encode is not None else None
        return payload or _pickle(value, context)
    except SerializationError:
        raise
    except Exception as error:  # reducers and serializers of users raise whatever they like
        raise SerializationError(
            f"a value of type {cls.__module__}.{cls.__qualname__} cannot be serialized: {error}; "
            "shmplasma.register_serializer can teach how to store a type"
        ) from error


def deserialize(buffer: pa.Buffer, codec: int, context: SerializationContext | None = None) -> Any:
    """Return the value that an object holds, without copying its arrays.

    Parameters
    ----------
    buffer : pyarrow.Buffer
        The object's data: read-only, 64-byte aligned, exactly the bytes that `Payload.write` wrote.
    codec : int
        What was stored beside it.
    context : SerializationContext, optional
        As for `serialize`.

    Returns
    -------
    object
        The value.  All arrays in it are read-only and keep `buffer` alive, except that small arrays
        inside other values are copies.

    Raises
    ------
    DeserializationError
        The codec is unknown, the bytes are damaged, a class cannot be imported here, or a deserializer
        is missing here or failed.

    Notes
    -----
    Thread-safe.  Time does not depend on the size of arrays and Arrow values.
    """
    try:
        if codec == _PICKLE:
            return _unpickle(buffer, (), context)
        decode = DECODERS.get(codec)
        if decode is not None:
            return decode(buffer)
        if codec == _PICKLE_PARTS:
            return _unpickle(*_split(buffer), context)
    except DeserializationError:
        raise
    except Exception as error:  # damaged bytes and users' classes raise whatever they like
        raise DeserializationError(
            f"the object cannot be read here: {type(error).__name__}: {error}"
        ) from error
    raise DeserializationError(
        f"the object has the unknown codec {codec}: another release of shmplasma wrote it; "
        "run the same release in its writers and readers"
    )


# --- writing pickles ------------------------------------------------------------------------------------


class _Placeholder(bytes):
    """Stands for a payload where the pickler wants a buffer to leave out."""

    payload: Payload


class _Reducers(dict[type, _Reducer]):
    """A pickler's dispatch table for one value, filled as types are met.

    A pickler asks it once for each value whose class is not built in; what it finds here costs it nothing,
    and a table that lives no longer than its pickler neither grows nor goes stale.

    Parameters
    ----------
    context : SerializationContext
        What is asked first.
    fallback : mapping
        The table that the pickler would have used.
    """

    __slots__ = ("_context", "_fallback")

    def __init__(self, context: SerializationContext, fallback: Mapping[type, _Reducer]) -> None:
        self._context = context
        self._fallback = fallback

    def __missing__(self, cls: type) -> _Reducer:
        reducer = self._context.reducer(cls) or self._fallback.get(cls)
        if reducer is None:
            if issubclass(cls, type):  # its instances are classes, which the pickler stores by name
                raise KeyError(cls)
            reducer = _plain_reduce
        self[cls] = reducer
        return reducer


_LeaveOut = Callable[[pickle.PickleBuffer], bool]


def _plain_pickler(
    chunks: WriteChunks, context: SerializationContext, leave_out: _LeaveOut
) -> pickle.Pickler:
    pickler = pickle.Pickler(chunks, _PROTOCOL, buffer_callback=leave_out)
    pickler.dispatch_table = _Reducers(context, copyreg.dispatch_table)
    return pickler


def _by_value_pickler(
    chunks: WriteChunks, context: SerializationContext, leave_out: _LeaveOut
) -> pickle.Pickler:
    from cloudpickle import CloudPickler  # noqa: PLC0415  # takes 20 ms, and few values need it

    class ByValue(CloudPickler):
        # The class has a table already, and the base looks for one only when it is initialized.
        dispatch_table = _Reducers(context, CloudPickler.dispatch_table)

    return ByValue(chunks, _PROTOCOL, buffer_callback=leave_out)


def _pickle(value: object, context: SerializationContext) -> Payload:
    try:
        chunks, parts = _dump(value, context, _plain_pickler)
        by_value = any(len(chunk) < _FRAME_BYTES and b"__main__" in chunk for chunk in chunks)
    except Exception:  # noqa: BLE001  # cloudpickle stores the value, or raises it again
        chunks, parts, by_value = WriteChunks(), [], True
    if by_value:
        chunks, parts = _dump(value, context, _by_value_pickler)
    return _join(chunks, parts)


def _dump(
    value: object,
    context: SerializationContext,
    make_pickler: Callable[[WriteChunks, SerializationContext, _LeaveOut], pickle.Pickler],
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

    make_pickler(chunks, context, leave_out).dump(value)
    return chunks, parts


def _join(chunks: WriteChunks, parts: list[Payload | memoryview]) -> Payload:
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
        start = align_up(end, ALIGNMENT)
        size = part.size_bytes if isinstance(part, Payload) else part.nbytes
        places.append((start, size, part))
        table += start, size
        end = start + size
    head += Struct(f"<{len(table)}Q").pack(*table)
    return Payload(_PICKLE_PARTS, end, [(0, len(head), head), *places])


def _embedding(encode: Callable[[Any], Payload | None]) -> _Reducer:
    """Return a reducer that stores a value beside the pickle, in its own codec."""

    def reduce(value: Any) -> Any:
        payload = encode(value)
        if payload is None:
            return value.__reduce_ex__(_PROTOCOL)
        placeholder = _Placeholder()
        placeholder.payload = payload
        return _embedded, (int(payload.codec), pickle.PickleBuffer(placeholder))

    return reduce


_embed_ndarray: Final = _embedding(ENCODERS[np.ndarray])


def _reduce_ndarray(array: np.ndarray[Any, Any]) -> Any:
    if array.nbytes >= _INBAND_BYTES or array.dtype.hasobject or not array.itemsize:
        return _embed_ndarray(array)
    return _small_array, (array.tobytes("A"), array.shape, array.dtype, array.flags.fnc)


def _arrow_reducer(cls: type) -> _Reducer:
    embed = _embedding(ENCODERS[cls])
    if cls is pa.Tensor:  # which has no way of its own
        return embed

    def reduce(value: Any) -> Any:
        # Arrow's own way takes a tenth of the time, but it stores whole buffers, of a slice too.
        if value.get_total_buffer_size() - value.nbytes < _INBAND_BYTES:
            return value.__reduce_ex__(_PROTOCOL)
        return embed(value)

    return reduce


def _is_plain_subclass(cls: type[np.ndarray[Any, Any]]) -> bool:
    """Say whether instances of a subclass of ndarray are pickled by ndarray's methods."""
    return all(
        getattr(cls, name) is getattr(np.ndarray, name)
        for name in ("__reduce__", "__reduce_ex__", "__setstate__")
    )


def _reduce_subclass(array: np.ndarray[Any, Any]) -> Any:
    return _as_subclass, (type(array), array.view(np.ndarray))


def _registered(type_id: object, serializer: Callable[[Any], object]) -> _Reducer:
    return lambda value: (_restored, (type_id, serializer(value)))


# --- reading pickles ------------------------------------------------------------------------------------
# The functions that pickles name: moving or renaming one makes stored objects unreadable.


def _embedded(codec: int, data: pa.Buffer) -> object:
    return DECODERS[codec](data)


def _small_array(
    data: bytes, shape: tuple[int, ...], dtype: np.dtype[Any], fortran: bool
) -> np.ndarray[Any, Any]:
    return np.ndarray(shape, dtype, data, 0, None, "F" if fortran else "C")


def _as_subclass(cls: type[np.ndarray[Any, Any]], array: np.ndarray[Any, Any]) -> object:
    return array.view(cls)


def _restored(type_id: object, form: object) -> object:
    deserializer = _reading.get().deserializer(type_id)
    if deserializer is None:
        raise DeserializationError(
            f"no deserializer is registered here for the type {type_id!r}; register it as its writer did"
        )
    return deserializer(form)


def _split(buffer: pa.Buffer) -> tuple[memoryview, list[pa.Buffer]]:
    """Return the pickle and the parts of an object."""
    view = memoryview(buffer).cast("B")
    magic, n_parts, pickle_bytes = _HEAD.unpack_from(view)
    start = _HEAD.size + 16 * n_parts
    if magic != _MAGIC or start + pickle_bytes > len(view):
        raise ValueError("it has no header of a pickle with parts")
    parts: list[pa.Buffer] = []
    for offset, size in _PLACE.iter_unpack(view[_HEAD.size : start]):
        if offset + size > len(view):
            raise ValueError(f"a part ends at {offset + size} of {len(view)} bytes")
        parts.append(buffer.slice(offset, size))
    return view[start : start + pickle_bytes], parts


def _unpickle(
    data: pa.Buffer | memoryview,
    parts: Sequence[pa.Buffer],
    context: SerializationContext | None,
) -> object:
    context = context or default_context
    if context is _reading.get():
        return pickle.loads(data, buffers=parts)
    token = _reading.set(context)
    try:
        return pickle.loads(data, buffers=parts)
    finally:
        _reading.reset(token)
