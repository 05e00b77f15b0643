"""Python values to bytes for an object of the store, and back.

`serialize` looks at a value, copies nothing and returns a `Payload` that knows its size; the caller finds
room and has it written there.  `deserialize` builds the value over the object's buffer: arrays are
read-only views of it and keep it alive.

What becomes of a value
-----------------------
* `bytes` are stored as they are, NumPy arrays and Arrow values in the formats of `shmplasma.codecs`.
* A type with a registered serializer is stored as what its serializer returns, at any depth.
* Everything else is pickled by `shmplasma.pickling`, the arrays in it beside the pickle.
"""

from __future__ import annotations

import atexit
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from shmplasma.codecs import (
    DECODERS,
    ENCODERS,
    DeserializationError,
    SerializationError,
)
from shmplasma.layout import REFERENCED
from shmplasma.payloads import BytesPayload, Codec, Payload
from shmplasma.pickling import (
    BUILT_IN,
    PROTOCOL,
    Deserializers,
    Reducer,
    dump,
    load,
    native_reducer,
    registered_reducer,
    split,
)

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "Codec",
    "DeserializationError",
    "Payload",
    "SerializationContext",
    "SerializationError",
    "checked_context",
    "default_context",
    "deserialize",
    "register_serializer",
    "serialize",
]

_BYTES: Final = Codec.BYTES  # an attribute of an enumeration takes 0.1 us to look up
_PICKLE: Final = Codec.PICKLE
# To compare a number with a member of an enumeration takes 0.03 us more than with a number.
_PICKLE_NUMBER: Final = Codec.PICKLE.value
_PARTS_NUMBER: Final = Codec.PICKLE_PARTS.value

_ATOMS: Final = frozenset({int, float, str, bool, complex, type(None)})
"""Types that can contain nothing and need no class: a plain pickle does."""
_TEACH: Final = "shmplasma.register_serializer can teach how to store a type"
_FLATTEN: Final = "it is nested too deeply, or without an end: flatten it, or raise the limit by sys.setrecursionlimit"


class _Registration(NamedTuple):
    type_id: object
    serializer: Callable[[Any], object] | None


class SerializationContext:
    """The serializers of a user's own types.

    Notes
    -----
    A context is not stored with an object: writer and reader each register the type.  Make all registrations before
    other threads use the context.

    Examples
    --------
    >>> import shmplasma as plasma
    >>> class Point:
    ...     def __init__(self, x, y):
    ...         self.x, self.y = x, y
    >>> context = plasma.SerializationContext()
    >>> context.register_type(
    ...     Point,
    ...     "Point",
    ...     custom_serializer=lambda point: (point.x, point.y),
    ...     custom_deserializer=lambda form: Point(*form),
    ... )
    >>> with plasma.Store(memory="1MB") as store, store.connect() as client:
    ...     object_id = client.put([Point(1, 2)], serialization_context=context)
    ...     [point] = client.get(object_id, serialization_context=context)
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

        A value is stored by the registration of its own type, or else by that of the first base in its method
        resolution order that has one.  Registering a type again replaces the former registration.

        Parameters
        ----------
        type_ : type
            The type.  Numbers, `str`, `bytes`, functions and the built-in containers themselves cannot be registered,
            unless to be pickled, as they are; subclasses of them can.
        type_id : hashable, picklable
            Its name in the store, the same at the writer and the reader.
        pickle : bool
            Whether to pickle values of this type, whatever is registered for its bases.
        custom_serializer : callable, optional
            Takes a value and returns the form to store: anything that can itself be stored.  Arrays in it come back
            without a copy.  If there is no serializer, the type is pickled.
        custom_deserializer : callable, optional
            Takes that form and returns the value.  Only readers need it.

        Raises
        ------
        ValueError
            `type_` cannot be registered, or both `pickle` and a serializer or deserializer are given.
        """
        is_native = type_ in BUILT_IN or type_ in _ATOMS
        if is_native and pickle and not (custom_serializer or custom_deserializer):
            return  # it is pickled anyway
        if is_native:
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

    @property
    def deserializers(self) -> Deserializers:
        """What was registered for readers, by type id."""
        return self._deserializers

    def _forget(self) -> None:
        self._registrations.clear()
        self._deserializers.clear()

    def encoder(self, cls: type) -> Callable[[Any], Payload | None] | None:
        """Return what encodes values of exactly this type without a pickle, or None."""
        for base in cls.__mro__:
            if base in self._registrations:
                return None
            if base in ENCODERS:  # a subclass of ndarray has more to it than its elements
                return ENCODERS[base] if base is cls or base is not np.ndarray else None
        return None

    def reducer(self, cls: type) -> Reducer | None:
        """Return what reduces values of a type while they are pickled, or None to leave it to pickle."""
        for base in cls.__mro__:
            registration = self._registrations.get(base)
            if registration is not None:
                if registration.serializer is None:
                    return None
                return registered_reducer(registration.type_id, registration.serializer)
            if base in ENCODERS:
                return native_reducer(cls, base)
        return None


default_context: Final = SerializationContext()
"""The context of this process, used where none is given."""
# The functions of a program keep its clients, which need their modules to end, and those go next.
atexit.register(default_context._forget)  # noqa: SLF001 - it is of this module


def checked_context(context: SerializationContext | None) -> SerializationContext | None:
    """Return a context that is one, or None; raise TypeError for anything else."""
    if context is not None and not isinstance(context, SerializationContext):
        raise TypeError(
            f"serialization_context is a shmplasma.SerializationContext, not {type(context).__name__}"
        )
    return context


def register_serializer(
    cls: type, serializer: Callable[[Any], object], deserializer: Callable[[Any], object]
) -> None:
    """Register how values of a class are stored, in the default context of this process.

    Readers know the class by its module and name.  The main module counts as ``main``, as it is ``__main__`` in a
    program and ``__mp_main__`` in the workers that the program spawns.

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
            return BytesPayload(_BYTES, data)
        if cls in _ATOMS:
            data = pickle.dumps(value, PROTOCOL)
            return BytesPayload(_PICKLE, data)
        context = context or default_context
        encode = context.encoder(cls)
        payload = encode(value) if encode is not None else None
        return payload or dump(value, context.reducer)
    except MemoryError:
        raise
    except Exception as error:  # reducers and serializers of users raise whatever they like
        why = _text(error)
        remedy = _FLATTEN if "recursion" in why else _TEACH
        raise SerializationError(
            f"a value of type {cls.__module__}.{cls.__qualname__} cannot be serialized: {why}; {remedy}"
        ) from error


def _text(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # which is a user's as well
        return type(error).__name__


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
        if codec == _PICKLE_NUMBER:
            return load(buffer, (), (context or default_context).deserializers)
        decode = DECODERS.get(codec)
        if decode is not None:
            return decode(buffer)
        if codec == _PARTS_NUMBER:
            return load(*split(buffer), (context or default_context).deserializers)
    except (DeserializationError, MemoryError):
        raise
    except Exception as error:  # damaged bytes and users' classes raise whatever they like
        raise DeserializationError(
            f"the object cannot be read here: {type(error).__name__}: {error}"
        ) from error
    if codec & REFERENCED:
        return deserialize(buffer, codec & ~REFERENCED, context)
    raise DeserializationError(
        f"the object has the unknown codec {codec}: another release of shmplasma wrote it; "
        "run the same release in its writers and readers"
    )
