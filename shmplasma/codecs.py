"""How one array or Arrow value lies in an object.

An encoder looks at a value and returns a `Payload`: the size that the object needs and the parts it is
made of (`shmplasma.payloads`).  A decoder builds the value over the object's
buffer again, without a copy.  What is neither an array nor Arrow is the work of
`shmplasma.pickling`.

Formats
-------
``NDARRAY``
    `_HEAD` (magic, order, number of dimensions, length of the dtype's description, offset of the data),
    the shape in 8-byte words, the dtype's description, zeros up to the data, the elements in C or F
    order.  The description is NumPy's own short string (``<f8``), or a pickle where that says too little.
``TABLE``, ``RECORD_BATCH``, ``ARRAY``, ``CHUNKED_ARRAY``
    One Arrow IPC stream, never compressed; arrays are its only column.  Any Arrow implementation reads it.
``TENSOR``
    One Arrow IPC tensor message.

Invariants
----------
* All data that a decoded value points at begins on a multiple of `ALIGNMENT` in the object.
* Damaged bytes raise an exception.  The contents of pickles and of Arrow buffers (offsets of strings,
  say) are trusted all the same: only processes that may write the segment can have written them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from struct import Struct
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow.lib import ArrowSerializationError

from shmplasma.copying import Piece, Source, writer_over
from shmplasma.errors import ShmPlasmaError
from shmplasma.layout import ALIGNMENT, align_up, alignment_of
from shmplasma.payloads import BytesPayload, Codec, Payload

__all__ = [
    "DECODERS",
    "ENCODERS",
    "MAIN",
    "DeserializationError",
    "SerializationError",
    "WriteChunks",
    "ndarray_head",
]


class SerializationError(ShmPlasmaError, TypeError, ArrowSerializationError):
    """A value cannot be turned into bytes; nothing has been written."""


class DeserializationError(ShmPlasmaError, ValueError, ArrowSerializationError):
    """An object's bytes cannot be turned into a value by this process."""


_NDARRAY: Final = Codec.NDARRAY  # an attribute of an enumeration takes 0.1 us to look up


MAIN: Final = b"_main__\x94"
"""What the names of main modules, ``__main__`` and ``__mp_main__``, have in common, and what follows each name in a pickle."""


class WriteChunks(list[Any]):
    """A file that keeps what is written, piece by piece and by reference.

    Pickle hands over large `bytes` and Arrow its buffers as they are: their bytes are not copied here.

    Attributes
    ----------
    n_bytes : int
        How many were written; those of a `bytearray` may be more or less by now.
    """

    closed = False
    n_bytes = 0

    def write(self, chunk: Any) -> None:
        """Keep a piece: bytes of some kind, or a buffer of Arrow's."""
        self.append(chunk)
        self.n_bytes += len(chunk)


# --- NumPy arrays ---------------------------------------------------------------------------------

_MAGIC: Final = b"spND"
_HEAD: Final = Struct("<4sBBxxII")
_LINE: Final = Struct(f"{ALIGNMENT}s")
"""All of most headers, but for zeros."""
_SHAPES: Final = tuple(Struct(f"<{ndim}q") for ndim in range(65))
"""By number of dimensions, of which NumPy allows 64."""
_PICKLE_PROTO: Final = b"\x80"
"""How a pickle begins, and how no dtype string does."""

_Layout: TypeAlias = "tuple[tuple[int, ...], np.dtype[Any], int, Literal['C', 'F']]"
"""Shape, dtype, offset of the data, order."""
_LAYOUTS: Final[dict[bytes, _Layout]] = {}
"""What headers say, by all of them that is not zeros, in whole lines: to parse one takes longer than all the rest of decoding."""
_MAX_LAYOUTS: Final = 4096  # shapes may differ without end
_FEW_BYTES: Final = 4096
"""Up to so many are copied beside their header first, in 0.2 us: to copy two parts into an object takes 1.9 us, one takes 0.1."""


def ndarray_head(
    dtype: np.dtype[Any], shape: tuple[int, ...], size_bytes: int, fortran: bool = False
) -> bytes:
    """Return what stands before the elements of an array: its header, in whole cache lines, or pages.

    Parameters
    ----------
    dtype : numpy.dtype
        Of plain elements: no Python objects in it, and not empty.
    shape : tuple of int
        At most 64 dimensions.
    size_bytes : int
        Of all elements.
    fortran : bool
        The elements follow in F order, not in C order.

    Raises
    ------
    TypeError
        Elements of this dtype are not plain bytes.
    """
    if dtype.hasobject or not dtype.itemsize:
        raise TypeError(f"the elements of an array with the dtype {dtype} are not plain bytes")
    # A dtype string leaves out fields, user metadata, and all of a dtype that is not NumPy's own.
    if dtype.metadata is None and (dtype.isbuiltin == 1 or _is_told_by_its_string(dtype)):
        description = dtype.str.encode("ascii")
    else:
        description = pickle.dumps(dtype, 5)
    ndim = len(shape)
    end = _HEAD.size + 8 * ndim + len(description)
    start = align_up(end, alignment_of(size_bytes))
    prefix = _HEAD.pack(_MAGIC, fortran, ndim, len(description), start)
    return prefix + _SHAPES[ndim].pack(*shape) + description + bytes(start - end)


def _is_told_by_its_string(dtype: np.dtype[Any]) -> bool:
    told = np.dtype(dtype.str)
    return dtype.names is None and told == dtype and told.type is dtype.type


def _encode_ndarray(array: npt.NDArray[Any]) -> Payload | None:
    dtype = array.dtype
    if dtype.hasobject or not dtype.itemsize:
        return None
    flags = array.flags
    fortran = flags.fnc
    size = array.nbytes
    try:
        head = ndarray_head(dtype, array.shape, size, fortran)
    except (pickle.PicklingError, AttributeError):  # a class of its records has no name
        return None
    if dtype.isbuiltin != 1 and MAIN in head:  # or one that means nothing to other processes
        return None
    if size <= _FEW_BYTES and flags.forc:
        return BytesPayload(_NDARRAY, head + array.tobytes("A"))
    start = len(head)
    return Payload(
        _NDARRAY,
        start + size,
        ((0, start, head), (start, size, array.T if fortran else array)),
    )


def _decode_ndarray(buffer: pa.Buffer) -> npt.NDArray[Any]:
    # NumPy wants to write first, and a view's refusal takes 0.2 us less than Arrow's; the array's base is the buffer all the same.
    view = memoryview(buffer)
    (line,) = _LINE.unpack_from(view)  # a slice of a buffer takes 0.25 us
    try:
        layout = _LAYOUTS[line]
    except KeyError:  # not met before, or longer
        layout = _read_head(buffer)
    shape, dtype, start, order = layout
    # NumPy checks that there are the bytes for all elements.
    return np.ndarray(shape, dtype, view, start, None, order)


def _read_head(buffer: pa.Buffer) -> _Layout:
    magic, fortran, ndim, length, start = _HEAD.unpack_from(buffer)
    shape_end = _HEAD.size + 8 * ndim
    end = align_up(shape_end + length, ALIGNMENT)
    if magic != _MAGIC or not end <= start <= buffer.size:
        raise ValueError("it does not begin with the header of an array")
    head = buffer.slice(0, end).to_pybytes()
    known = _LAYOUTS.get(head)
    if known is not None:
        return known
    description = head[shape_end : shape_end + length]
    dtype: np.dtype[Any]
    if description.startswith(_PICKLE_PROTO):
        dtype = pickle.loads(description)
    else:
        dtype = np.dtype(description.decode("ascii"))
    if dtype.hasobject:
        raise ValueError(f"an array in the store cannot have the dtype {dtype!r}")
    order: Literal["C", "F"] = "F" if fortran else "C"
    layout = _SHAPES[ndim].unpack_from(head, _HEAD.size), dtype, start, order
    if dtype.names is None:  # fields can be renamed in place, by whoever got the array
        if len(_LAYOUTS) >= _MAX_LAYOUTS:
            _LAYOUTS.clear()
        _LAYOUTS[head] = layout
    return layout


# --- Arrow ------------------------------------------------------------------------------------------

_OPTIONS: Final = pa.ipc.IpcWriteOptions(allow_64bit=True, compression=None)
"""Also more than 2**31 rows; and the environment cannot ask for the format of before 2019."""
_PLAIN: Final = frozenset(
    kind.id
    for kinds in (
        (pa.bool_(), pa.int8(), pa.int16(), pa.int32(), pa.int64()),
        (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
        (pa.float16(), pa.float32(), pa.float64()),
        (pa.date32(), pa.date64(), pa.timestamp("ns")),
        (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()),
    )
    for kind in kinds
)
"""Types that any stream can hold, by their numbers."""
_CONTINUATION: Final = b"\xff\xff\xff\xff"
"""What each message of an Arrow stream begins with."""
_DICTIONARY_BATCH: Final = 2
_WORD: Final = Struct("<q")
_BUFFER: Final = Struct("<qq")


def _field(table: int, number: int, metadata: bytearray) -> int:
    """Return where a field of a flatbuffer table lies."""
    vtable = table - int.from_bytes(metadata[table : table + 4], "little", signed=True)
    slot = vtable + 4 + 2 * number
    return table + int.from_bytes(metadata[slot : slot + 2], "little")


def _follow(position: int, metadata: bytearray) -> int:
    """Return what the relative reference at a position of a flatbuffer points at."""
    return position + int.from_bytes(metadata[position : position + 4], "little")


def _spread(metadata: bytearray, body: list[pa.Buffer]) -> tuple[int, list[int]]:
    """Move the buffers of a message's body to aligned places; return its size and the places.

    Arrow's writer aligns them to 8 bytes and lets nobody but C++ change that.  Where they lie is stated
    in the metadata, a flatbuffer, by numbers of fixed size: those are overwritten in place.
    """
    message = _follow(0, metadata)
    batch = _follow(_field(message, 2, metadata), metadata)
    if metadata[_field(message, 1, metadata)] == _DICTIONARY_BATCH:
        batch = _follow(_field(batch, 1, metadata), metadata)
    entries = _follow(_field(batch, 2, metadata), metadata)
    n_entries = int.from_bytes(metadata[entries : entries + 4], "little")
    end = 0
    places: list[int] = []
    for entry in range(entries + 4, entries + 4 + n_entries * _BUFFER.size, _BUFFER.size):
        _, size = _BUFFER.unpack_from(metadata, entry)
        _BUFFER.pack_into(metadata, entry, end, size)
        if size:  # Arrow does not write the empty ones
            assert size == body[len(places)].size
            places.append(end)
            end = align_up(end + size, ALIGNMENT)
    _WORD.pack_into(metadata, _field(message, 3, metadata), end)
    return end, places


def _encode_stream(codec: Codec, table: pa.Table | pa.RecordBatch) -> Payload | None:
    schema = table.schema
    # What Arrow's format cannot hold: dictionaries of dictionaries, and extension types that nobody has registered.
    if any(kind.id not in _PLAIN for kind in schema.types) and not pa.ipc.read_schema(
        schema.serialize()
    ).equals(schema):
        return None
    chunks = WriteChunks()
    sink = pa.PythonFile(chunks, "w")  # type: ignore[arg-type]  # it needs no more of a file
    with pa.ipc.new_stream(sink, schema, options=_OPTIONS) as writer:
        writer.write(table)
    messages: list[tuple[bytearray, list[pa.Buffer]]] = []
    for chunk in chunks:
        if isinstance(chunk, pa.Buffer):
            messages[-1][1].append(chunk)
        elif chunk == _CONTINUATION:
            messages.append((bytearray(), []))
        else:
            # Length, metadata; then padding of the body, cut off below.
            messages[-1][0].extend(chunk)
    parts: list[tuple[int, int, Source | Payload]] = []
    position = 0
    for head, body in messages:
        length = int.from_bytes(head[:4], "little")
        metadata = head[4 : 4 + length]
        size = len(_CONTINUATION) + 4 + length
        places: list[int] = []
        body_bytes = 0
        if body:
            padding = -(position + size) % ALIGNMENT
            metadata += bytes(padding)
            size += padding
            body_bytes, places = _spread(metadata, body)
        prefix = _CONTINUATION + len(metadata).to_bytes(4, "little")
        parts.append((position, size, prefix + metadata))
        position += size
        parts += [
            (position + place, chunk.size, chunk) for place, chunk in zip(places, body, strict=True)
        ]
        position += body_bytes
    return Payload(codec, position, parts)


def _encode_array(array: pa.Array[Any]) -> Payload | None:
    return _encode_stream(Codec.ARRAY, pa.RecordBatch.from_arrays([array], [""]))


def _encode_chunked(array: pa.ChunkedArray[Any]) -> Payload | None:
    return _encode_stream(Codec.CHUNKED_ARRAY, pa.Table.from_arrays([array], [""]))


class _TensorPayload(Payload):
    """A tensor, which only Arrow itself can write.

    One that is not contiguous is copied twice: Arrow would write it without the names of its dimensions.
    """

    __slots__ = ("_tensor",)

    def __init__(self, tensor: pa.Tensor) -> None:
        if not tensor.is_contiguous:
            tensor = pa.Tensor.from_numpy(np.array(tensor), tensor.dim_names)
        super().__init__(Codec.TENSOR, pa.ipc.get_tensor_size(tensor), ())
        self._tensor = tensor

    def write_leaving(
        self, later: list[Piece], target: npt.NDArray[np.uint8], threads: int
    ) -> None:
        super().write_leaving(later, target, threads)
        with writer_over(target, threads) as writer:
            pa.ipc.write_tensor(self._tensor, writer)


def _decode_table(buffer: pa.Buffer) -> pa.Table:
    return pa.ipc.open_stream(buffer).read_all()


def _decode_batch(buffer: pa.Buffer) -> pa.RecordBatch:
    return pa.ipc.open_stream(buffer).read_next_batch()


def _decode_array(buffer: pa.Buffer) -> pa.Array[Any]:
    return _decode_batch(buffer).column(0)


def _decode_chunked(buffer: pa.Buffer) -> pa.ChunkedArray[Any]:
    return _decode_table(buffer).column(0)


def _decode_tensor(buffer: pa.Buffer) -> pa.Tensor:
    return pa.ipc.read_tensor(pa.BufferReader(buffer))


ENCODERS: Final[dict[type, Callable[[Any], Payload | None]]] = {
    np.ndarray: _encode_ndarray,
    pa.Table: partial(_encode_stream, Codec.TABLE),
    pa.RecordBatch: partial(_encode_stream, Codec.RECORD_BATCH),
    pa.Array: _encode_array,
    pa.ChunkedArray: _encode_chunked,
    pa.Tensor: _TensorPayload,
}
"""Encoders by type.  None in place of a payload leaves the value to pickle."""

DECODERS: Final[dict[int, Callable[[pa.Buffer], object]]] = {
    Codec.RAW.value: lambda buffer: buffer,
    Codec.NDARRAY.value: _decode_ndarray,
    Codec.TABLE.value: _decode_table,
    Codec.RECORD_BATCH.value: _decode_batch,
    Codec.ARRAY.value: _decode_array,
    Codec.CHUNKED_ARRAY.value: _decode_chunked,
    Codec.TENSOR.value: _decode_tensor,
    Codec.BYTES.value: pa.Buffer.to_pybytes,
}
"""Decoders by the number of a codec, which is faster to look up than the codec; of all that needs no pickle."""
