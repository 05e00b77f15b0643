"""Values to bytes and back: round trips, alignment, zero copies, damaged bytes."""

from __future__ import annotations

import collections
import copyreg
import datetime as dt
import gc
import pickle
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shmplasma import codecs, serialization
from shmplasma.codecs import ndarray_head
from shmplasma.copying import copy_into
from shmplasma.errors import ShmPlasmaError
from shmplasma.serialization import (
    Codec,
    DeserializationError,
    Payload,
    SerializationContext,
    SerializationError,
    deserialize,
    register_serializer,
    serialize,
)

Bytes = npt.NDArray[np.uint8]
make_table: Any = pa.table  # the stubs do not know NumPy arrays here
make_column: Any = pd.array  # nor dtypes of Arrow's
make_chunked: Any = pa.chunked_array  # nor chunks of any type
make_map: Any = pa.map_  # nor what this argument is called
GUARD = 64


class Segment:
    """The owner of an object's memory, which a buffer over it keeps alive."""

    def __init__(self, size: int, fill: int = 0xAA) -> None:
        room = np.full(size + 3 * GUARD, fill, np.uint8)
        start = GUARD + -(room.ctypes.data + GUARD) % GUARD
        self.room = room
        self.start = start
        self.data: Bytes = room[start : start + size]

    def buffer(self) -> pa.Buffer:
        """Return the object as `get_buffers` would."""
        return pa.foreign_buffer(self.data.ctypes.data, self.data.size, base=self)

    def outside(self) -> Bytes:
        """Return the memory around the object."""
        return np.concatenate([self.room[: self.start], self.room[self.start + self.data.size :]])


def stored(
    value: object, context: SerializationContext | None = None, threads: int = 1
) -> tuple[pa.Buffer, Codec]:
    """Write a value into memory with guards around it and check all that holds for every value."""
    payload = serialize(value, context)
    segments = [Segment(payload.size_bytes, fill) for fill in (0xAA, 0x55)]
    for segment in segments:
        payload.write(segment.data, threads)
    assert (segments[0].outside() == 0xAA).all()
    assert segments[0].data.tobytes() == segments[1].data.tobytes()
    filled = Segment(payload.size_bytes)
    payload.fill(filled.data.data, threads)
    assert (filled.outside() == 0xAA).all()
    assert filled.data.tobytes() == segments[0].data.tobytes()
    return segments[0].buffer(), payload.codec


def round_trip(value: object, context: SerializationContext | None = None) -> Any:
    """Write a value and read it back."""
    buffer, codec = stored(value, context)
    return deserialize(buffer, codec, context)


def within(address: int, size: int, buffer: pa.Buffer) -> bool:
    """Say whether a range of memory lies in a buffer."""
    return buffer.address <= address and address + size <= buffer.address + buffer.size


def check_view(array: npt.NDArray[Any], buffer: pa.Buffer) -> None:
    """Check that an array is a read-only, aligned view of an object."""
    assert not array.flags.writeable
    if array.size:
        assert array.ctypes.data % 64 == 0
        assert within(array.ctypes.data, array.nbytes, buffer)


def raw(array: npt.NDArray[Any]) -> bytes:
    """Return the elements, in C order, with the gaps between their fields."""
    if not array.itemsize:
        return b""
    return np.asarray(array).view(np.dtype((np.void, array.itemsize))).tobytes()


def same(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> bool:
    """Say whether two arrays agree in everything but where and in which order they lie."""
    return (
        type(left) is type(right)
        and left.dtype == right.dtype
        and left.shape == right.shape
        and raw(left) == raw(right)
    )


def check_arrow(value: Any, buffer: pa.Buffer, smallest: int = 1) -> None:
    """Check that the buffers of an Arrow value, from some size on, are aligned places in an object."""
    columns = value.columns if hasattr(value, "columns") else [value]
    for column in columns:
        for chunk in getattr(column, "chunks", [column]):
            for part in chunk.buffers():
                if part is not None and part.size >= smallest:
                    assert part.address % 64 == 0
                    assert within(part.address, part.size, buffer)
                    assert not part.is_mutable


# --- NumPy ------------------------------------------------------------------------------------------

GRID = np.arange(24.0).reshape(4, 6)
RECORDS = np.array(
    [(1, 2.5, b"ab"), (3, 4.5, b"c")],
    np.dtype([("a", "i1"), ("b", "f8"), ("c", "S3")], align=True),
)
ARRAYS = {
    "C": GRID,
    "F": np.asfortranarray(GRID),
    "strided": GRID[::2, 1::3],
    "strided F": GRID.T[::2, ::2],
    "negative": GRID[::-1, ::-2],
    "transposed": np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
    "broadcast": np.broadcast_to(np.arange(3), (1000, 3)),
    "scalar": np.array(3.5),
    "empty": np.empty((0, 3)),
    "empty inside": np.empty((3, 0, 2), order="F"),
    "structured": RECORDS,
    "structured, strided": np.repeat(RECORDS, 4)[::3],
    "structured, nested": np.zeros(3, [("a", [("b", "<f4", (2, 2))]), ("c", "M8[s]")]),
    "one field": np.repeat(RECORDS, 4)["b"],
    "datetime": np.array(["2026-01-01", "NaT"], "M8[ns]"),
    "25 seconds": np.arange(3).astype("m8[25s]"),
    "void": np.array([b"abc", b"de"], "V3"),
    "bool": np.array([True, False]),
    "complex": np.array([1 + 2j]),
    "big-endian": np.arange(5, dtype=">f8"),
    "bytes": np.array([b"a", b"bcd"]),
    "text": np.array(["a", "bcdé"]),
    "half": np.arange(4, dtype=np.float16),
    "long": np.arange(4, dtype=np.longdouble),
    "64 dimensions": np.zeros((1,) * 64),
    "no bytes": np.empty(3, "V0"),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays_come_back_as_views(array: npt.NDArray[Any]) -> None:
    """An array of any layout and dtype without objects is a view of its object."""
    buffer, codec = stored(array)
    result = deserialize(buffer, codec)
    assert same(result, array)
    if array.itemsize:
        assert codec == Codec.NDARRAY
        check_view(result, buffer)


@given(
    hnp.arrays(
        st.one_of(
            hnp.scalar_dtypes(),
            hnp.array_dtypes(),
            hnp.byte_string_dtypes(),
            hnp.unicode_string_dtypes(),
        ),
        hnp.array_shapes(min_dims=0, min_side=0, max_side=5),
        fill=st.nothing(),
    ).flatmap(
        lambda array: st.tuples(
            st.just(array), hnp.basic_indices(array.shape), st.sampled_from("CFT")
        )
    )
)
def test_any_array(case: tuple[npt.NDArray[Any], Any, str]) -> None:
    """Whatever dtype, shape, order and slice Hypothesis finds survives, alone and in a container."""
    array, index, order = case
    array = np.asarray(np.array(array, order="C" if order == "C" else "F")[index])
    array = array.T if order == "T" else array
    buffer, codec = stored(array)
    result = deserialize(buffer, codec)
    assert same(result, array)
    if array.itemsize:
        check_view(result, buffer)
    inside = round_trip([array, array])
    assert same(inside[0], array)
    assert inside[0] is inside[1]
    assert not inside[0].flags.writeable or not array.itemsize


@pytest.mark.parametrize("name", ["C", "F"])
def test_order_is_kept(name: str) -> None:
    """Contiguous arrays keep their order, inside containers too, large or small."""
    for array in (ARRAYS[name], np.array(np.ones((50, 60)), order=name)):  # type: ignore[call-overload]  # a Literal
        for result in (round_trip(array), round_trip([array])[0]):
            assert result.flags.c_contiguous == array.flags.c_contiguous
            assert result.flags.f_contiguous == array.flags.f_contiguous


@pytest.mark.parametrize(
    "array",
    [
        np.arange(64.0).reshape(8, 8)[::2, ::2],
        np.arange(64.0).reshape(8, 8).T[::2, ::2],
        np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
        np.broadcast_to(np.arange(3.0)[:, None], (3, 4)),
        np.arange(5000.0)[::-1],
    ],
)
def test_arrays_that_are_not_contiguous_become_so(array: npt.NDArray[Any]) -> None:
    """In C order, as Plasma leaves them: by what lies there, they can be viewed as bytes."""
    for result in (round_trip(array), round_trip([array])[0]):
        assert result.flags.c_contiguous
        assert pa.py_buffer(result).to_pybytes() == array.tobytes()


@pytest.mark.parametrize(
    "dtype",
    [
        np.dtype(("i4", [("a", "i2"), ("b", "i2")])),
        np.dtype((np.record, 8)),
        np.dtype((np.record, [("a", "i4")])),
    ],
)
def test_dtypes_that_look_like_others(dtype: np.dtype[Any]) -> None:
    """Fields over a scalar, and a type of one's own, are in no dtype string."""
    for result in (round_trip(np.zeros(300, dtype)), round_trip([np.zeros(300, dtype)])[0]):
        assert result.dtype == dtype
        assert result.dtype.fields == dtype.fields
        assert result.dtype.type is dtype.type


def test_dtypes_keep_what_their_string_leaves_out() -> None:
    """User metadata, titles and alignment of a dtype survive."""
    plain = np.zeros(2, "f8")
    tagged = np.zeros(2, np.dtype("f8", metadata={"unit": "m"}))
    for array in (plain, tagged, plain):
        assert round_trip(array).dtype.metadata == array.dtype.metadata
    titled = np.zeros(2, [(("title", "a"), "f8")])
    assert round_trip(titled).dtype.fields == titled.dtype.fields
    assert round_trip(RECORDS).dtype.isalignedstruct


def test_gaps_between_fields_are_written() -> None:
    """The padding of a structured dtype is stored as it is, so that equal arrays give equal objects."""
    stored(np.repeat(RECORDS, 50)[::3])  # which compares two targets that held different bytes


@pytest.mark.parametrize(
    "array",
    [
        np.array([1, "a", None, [2]], object),
        np.array([("a", 1)], [("o", object), ("i", int)]),
        np.array(["a", "long" * 20], np.dtypes.StringDType()),
    ],
    ids=["object", "object field", "StringDType"],
)
def test_arrays_of_references_are_pickled(array: npt.NDArray[Any]) -> None:
    """What has no plain elements goes to pickle."""
    result = round_trip(array)
    assert result.dtype == array.dtype
    assert result.tolist() == array.tolist()


def test_large_arrays_inside_an_object_array_are_views() -> None:
    """The elements of an array of objects are stored as any other value."""
    array = np.empty(2, object)
    array[0] = np.arange(1000)
    buffer, codec = stored(array)
    check_view(deserialize(buffer, codec)[0], buffer)


class Tagged(np.ndarray[Any, Any]):
    """A subclass without ways of its own."""


@pytest.mark.parametrize(
    "array",
    [
        np.arange(1000.0).view(Tagged),
        np.arange(1000.0)[::2].view(Tagged),
        np.zeros(500, "f8,i4").view(np.recarray),
    ],
    ids=["subclass", "strided", "recarray"],
)
def test_subclasses_of_ndarray_are_views_of_their_own_type(array: npt.NDArray[Any]) -> None:
    """A plain subclass of ndarray comes back as itself, and without a copy."""
    buffer, codec = stored(array)
    result = deserialize(buffer, codec)
    assert same(result, array)
    check_view(result, buffer)


MASKED: dict[str, Any] = {
    "float": np.ma.masked_greater(np.arange(10_000.0), 500),
    "no mask": np.ma.MaskedArray(np.arange(10_000)),
    "fill value": np.ma.MaskedArray(np.arange(10_000), np.arange(10_000) % 3 == 0, fill_value=-7),
    "records": np.ma.array(  # type: ignore[call-overload]  # which knows no values of records
        np.zeros(10_000, "i4, f8"), mask=(True, False), fill_value=(5, 7)
    ),
    "F order": np.ma.masked_less(np.asfortranarray(np.ones((100, 200))), 0),
    "small": np.ma.MaskedArray([1, 2], [True, False]),
    "matrix": np.ma.MaskedArray(np.ones((100, 200)).view(np.matrix), np.zeros((100, 200), bool)),
}


@pytest.mark.parametrize("array", MASKED.values(), ids=MASKED)
def test_masked_arrays(array: np.ma.MaskedArray[Any, Any]) -> None:
    """A masked array comes back with its mask, and both are views."""
    buffer, codec = stored(array)
    for result, within in ((deserialize(buffer, codec), buffer), (round_trip([array])[0], None)):
        assert type(result) is np.ma.MaskedArray
        assert result.dtype == array.dtype
        assert result.baseclass is array.baseclass
        assert result.flags.f_contiguous == array.flags.f_contiguous
        assert result.data.tobytes() == array.data.tobytes()
        assert np.array_equal(result.mask, array.mask)
        assert (result.mask is np.ma.nomask) == (array.mask is np.ma.nomask)
        assert result.fill_value == array.fill_value
        for part in (result.data, np.asarray(result.mask)):
            assert not part.flags.writeable or not part.ndim
            if within is not None and part.nbytes >= 4096:
                check_view(part, within)


def test_masked_arrays_of_objects_are_pickled() -> None:
    """One of Python objects is left to the way of its own."""
    array = np.ma.MaskedArray(np.array([1, "a", None], object), [True, False, False])
    result = round_trip(array)
    assert result.tolist() == array.tolist() == [None, "a", None]


def test_memory_mapped_arrays(tmp_path: Path) -> None:
    """An array over a file is stored by its contents."""
    array = np.memmap(tmp_path / "file", "f8", "w+", shape=(30, 40))
    array[:] = 3
    assert same(round_trip(array), array)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_matrix() -> None:
    """Even a matrix comes back as a matrix."""
    array = np.matrix(np.arange(1200.0).reshape(30, 40))
    assert same(round_trip(array), array)


# --- Arrow ------------------------------------------------------------------------------------------

STRINGS = pa.array(["one", None, "three", "fourth"] * 50)
TABLE = make_table(
    {
        "int": pa.array([1, None, 3, 4] * 50, pa.int32()),
        "str": STRINGS,
        "cat": STRINGS.dictionary_encode(),
        "nested": pa.array([[{"a": 1, "b": "x"}], None, [], [{"a": None, "b": "y"}]] * 50),
        "null": pa.nulls(200),
        "bool": pa.array([True, False, None, True] * 50),
        "view": STRINGS.cast(pa.string_view()),
        "decimal": pa.array([1, 2, 3, None] * 50, pa.decimal128(10, 2)),
        "uuid": pa.array([bytes(16), None] * 100, pa.uuid()),
        "time": pa.array([dt.datetime(2026, 1, 1)] * 200),  # noqa: DTZ001  # Arrow's are naive
    },
    metadata={"made": "here"},
)
TABLES = {
    "table": TABLE,
    "slice": TABLE.slice(3, 70),
    "chunks": pa.concat_tables([TABLE, TABLE.slice(5, 9)]),
    "no rows": TABLE.slice(0, 0),
    "no chunks": TABLE.schema.empty_table(),
    "no columns": make_table({}),
    "rows without columns": TABLE.select([]),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_are_aligned_arrow_streams(table: pa.Table) -> None:
    """Any reader of Arrow streams reads a table's bytes, and all of its buffers are aligned."""
    buffer, codec = stored(table)
    assert codec == Codec.TABLE
    for result in (deserialize(buffer, codec), pa.ipc.open_stream(buffer).read_all()):
        assert result.equals(table, check_metadata=True)
        assert result.num_rows == table.num_rows
        result.validate(full=True)
        check_arrow(result, buffer)


@pytest.mark.parametrize("batch", [b for t in TABLES.values() for b in t.to_batches()[:1]])
def test_record_batches(batch: pa.RecordBatch) -> None:
    """A batch comes back as a batch."""
    buffer, codec = stored(batch)
    assert codec == Codec.RECORD_BATCH
    for result in (deserialize(buffer, codec), pa.ipc.open_stream(buffer).read_next_batch()):
        assert result.equals(batch, check_metadata=True)
        check_arrow(result, buffer)


@pytest.mark.parametrize("name", TABLE.column_names)
def test_arrow_arrays(name: str) -> None:
    """Arrays and chunked arrays of each kind keep their type, whole and sliced."""
    whole = TABLE[name].chunk(0)
    for array in (whole, whole.slice(7, 50), whole.slice(0, 0)):
        buffer, codec = stored(array)
        assert codec == Codec.ARRAY
        result = deserialize(buffer, codec)
        assert type(result) is type(array)
        assert result.equals(array)
        check_arrow(result, buffer)
        chunked = make_chunked([array, whole])
        buffer, codec = stored(chunked)
        assert codec == Codec.CHUNKED_ARRAY
        result = deserialize(buffer, codec)
        assert result.equals(chunked)
        assert result.type == chunked.type
        check_arrow(result, buffer)
    empty = make_chunked([], type=whole.type)
    assert round_trip(empty).equals(empty)


def test_dictionaries_that_differ_between_chunks() -> None:
    """A categorical column whose chunks have different categories survives."""
    column = make_chunked(
        [pa.array(["a", "b"]).dictionary_encode(), pa.array(["c"] * 30).dictionary_encode()]
    )
    buffer, codec = stored(column)
    assert deserialize(buffer, codec).to_pylist() == column.to_pylist()


@pytest.mark.parametrize(
    "values",
    [GRID, np.asfortranarray(GRID), GRID[:, ::2], np.arange(3000, dtype="f4").reshape(30, 10, 10)],
)
def test_tensors(values: npt.NDArray[Any]) -> None:
    """A tensor keeps its values and its names, is aligned, and any Arrow reads it."""
    tensor = pa.Tensor.from_numpy(values, dim_names=[f"d{i}" for i in range(values.ndim)])
    buffer, codec = stored(tensor)
    assert codec == Codec.TENSOR
    for result in (deserialize(buffer, codec), pa.ipc.read_tensor(pa.BufferReader(buffer))):
        assert result.equals(tensor)
        assert result.dim_names == tensor.dim_names
        check_view(result.to_numpy(), buffer)
    assert round_trip([tensor])[0].equals(tensor)


def test_slices_do_not_store_their_parents() -> None:
    """A slice costs what it shows, as a value of its own and inside another one."""
    table = make_table({"x": np.arange(100_000.0), "s": pa.array([str(i) for i in range(100_000)])})
    frame = table.to_pandas()
    arrow_frame = table.to_pandas(types_mapper=pd.ArrowDtype)
    parts: list[Any] = [table.slice(50, 10), table["s"].slice(50, 10), frame[50:60]]
    parts += [arrow_frame[50:60], frame["s"][50:60], frame["x"].to_numpy()[50:60]]
    for part in parts:
        for value in (part, [part]):
            assert serialize(value).size_bytes < 8000


def test_arrow_values_in_containers_keep_their_chunks() -> None:
    """Whole or sliced, Arrow values inside other values are equal, aligned and not copied."""
    table = make_table({"x": np.arange(2000.0)})
    value = {"table": table, "slice": table.slice(1000), "array": table["x"].chunk(0)}
    buffer, codec = stored(value)
    result = deserialize(buffer, codec)
    for name, item in value.items():
        assert result[name].equals(item)
        check_arrow(result[name], buffer)


# --- everything else --------------------------------------------------------------------------------


@dataclass
class Point:
    """A user's class, importable."""

    x: float
    y: npt.NDArray[Any] = field(default_factory=lambda: np.arange(2000.0))


class Colour(Enum):
    """An enumeration."""

    RED = 1


Pair = collections.namedtuple("Pair", ["left", "right"])  # noqa: PYI024  # the plain kind is meant

PLAIN = [
    None, True, 0, -5, 10**40, 3.5, 1 + 2j, "", "text", "é" * 70_000, b"", b"bytes", b"x" * 3_000_000,
    bytearray(b"array"), bytearray(200_000), [], (1, "a"), {"k": [1, {2}]}, frozenset({3}), ...,
    NotImplemented, range(5), Fraction(1, 3), dt.date(2026, 1, 1), Colour.RED, Pair(1, 2),
    re.compile("a+"), len, Fraction, int, np.float32(2.5), np.dtype("f8"), pa.int32(), pa.scalar(4),
    TABLE.schema, [b"x" * 200_000, "y" * 100_000, bytearray(70_000)], Colour, pd.Timestamp("2026-01-01"),
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_values(value: object) -> None:
    """Values of the standard library and the like come back equal and of the same type."""
    result = round_trip(value)
    assert type(result) is type(value)
    assert result == value


def test_bytes_are_stored_as_they_are() -> None:
    """The object of a bytes value holds these bytes; the value read is bytes again."""
    buffer, codec = stored(b"abc")
    assert (codec, buffer.to_pybytes()) == (Codec.BYTES, b"abc")
    assert deserialize(buffer, codec) == b"abc"


def test_raw_objects_are_their_buffer() -> None:
    """What a user wrote is handed out as it is."""
    buffer = pa.py_buffer(b"raw")
    assert deserialize(buffer, Codec.RAW) is buffer


def test_objects_without_arrays_are_plain_pickles() -> None:
    """Any Python can read an object without arrays."""
    buffer, codec = stored({"a": [1, 2]})
    assert codec == Codec.PICKLE
    assert pickle.loads(buffer) == {"a": [1, 2]}


def test_arrays_at_any_depth_are_views() -> None:
    """Arrays inside containers and classes are aligned views; the same array twice is stored once."""
    array = np.arange(5000.0)
    value = {
        "list": [array, array],
        "point": Point(1.0),
        "strided": array[::2],
        "datetime": np.zeros(1000, "M8[ns]"),
        "buffer": pa.py_buffer(b"x" * 5000),
        "view": pickle.PickleBuffer(bytes(3000)),
    }
    buffer, codec = stored(value)
    assert codec == Codec.PICKLE_PARTS
    result = deserialize(buffer, codec)
    assert result["list"][0] is result["list"][1]
    for left, right in [
        (result["list"][0], array),
        (result["point"].y, value["point"].y),  # type: ignore[attr-defined]  # a Point
        (result["strided"], array[::2]),
        (result["datetime"], value["datetime"]),
    ]:
        assert same(left, right)
        check_view(left, buffer)
    for part in (result["buffer"], result["view"]):
        assert within(part.address, part.size, buffer)
        assert part.address % 64 == 0
        assert not part.is_mutable


def test_small_arrays_in_containers_are_read_only_too() -> None:
    """Whether an array is a view does not show in what can be done with it."""
    result = round_trip([np.arange(3), np.ones((2, 2), order="F")[:, :1], np.zeros((0, 2))])
    assert [array.flags.writeable for array in result] == [False] * 3
    assert result[0].tolist() == [0, 1, 2]


def test_a_header_that_is_cut_off() -> None:
    """What lies behind the object is not looked at."""
    buffer, codec = stored(RECORDS)
    with pytest.raises(DeserializationError, match="does not begin with the header of an array"):
        deserialize(buffer.slice(0, 64), codec)


def test_what_is_read_after_a_private_copy_is_read_only() -> None:
    """Only the arrays of the copy can be written to."""
    buffer, codec = stored([np.arange(3)])
    private = pa.py_buffer(bytearray(buffer))
    flags = [
        deserialize(each, codec, SerializationContext())[0].flags.writeable
        for each in (private, buffer)
    ]
    assert flags == [True, False]


def test_circular_structures() -> None:
    """A list may contain itself."""
    value: list[Any] = [np.arange(1000)]
    value.append(value)
    result = round_trip(value)
    assert result[1] is result


ROWS = 3000
FRAME = pd.DataFrame(
    {
        "a": np.arange(ROWS, dtype="f8"),
        "b": np.arange(ROWS, dtype="i4"),
        "s": pd.Series([f"row {i}" for i in range(ROWS)], dtype="str"),
        "c": pd.Categorical(["x", "y", "z"] * (ROWS // 3)),
        "t": pd.date_range("2026-01-01", periods=ROWS, tz="UTC"),
        "n": pd.array([1, None, 3] * (ROWS // 3), dtype="Int64"),
        "d": make_column([1.5, None, 3] * (ROWS // 3), dtype=pd.ArrowDtype(pa.float64())),
        "o": [(1, "a"), None, "x"] * (ROWS // 3),
    }
)


@pytest.mark.parametrize(
    "frame",
    [
        FRAME,
        FRAME.set_index("s"),
        FRAME[100:200],
        FRAME[::7],
        FRAME.iloc[:0],
        FRAME.set_index(["c", "b"]),
        pd.DataFrame(np.ones((500, 4))),
        pd.DataFrame(),
    ],
)
def test_data_frames(frame: pd.DataFrame) -> None:
    """DataFrames with NumPy and Arrow columns come back equal, and so do their columns."""
    pd.testing.assert_frame_equal(round_trip(frame), frame)
    for name in frame:
        pd.testing.assert_series_equal(round_trip(frame[name]), frame[name])


def test_columns_of_data_frames_are_views() -> None:
    """NumPy and Arrow columns of a DataFrame are not copied."""
    buffer, codec = stored(FRAME)
    result = deserialize(buffer, codec)
    for name in ("a", "b"):
        column = result[name].to_numpy()
        assert within(column.ctypes.data, column.nbytes, buffer)
    for name in ("s", "d"):
        check_arrow(result[name].array.__arrow_array__(), buffer, smallest=1024)


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr"])
def test_sparse_matrices(kind: str) -> None:
    """SciPy's sparse matrices and arrays come back without copying their data."""
    value = scipy.sparse.random_array((300, 200), density=0.2, format=kind, rng=1)
    buffer, codec = stored(value)
    result = deserialize(buffer, codec)
    assert type(result) is type(value)
    assert (result != value).nnz == 0
    check_view(result.data, buffer)


def test_lambdas_and_local_classes_are_stored_by_value() -> None:
    """What pickle refuses goes to cloudpickle, arrays and all."""
    array = np.arange(1000.0)

    class Local:
        def __init__(self) -> None:
            self.array = array

    assert round_trip(lambda x: x + 1)(2) == 3
    buffer, codec = stored([Local(), lambda: array])
    result = deserialize(buffer, codec)
    assert type(result[0]).__qualname__ == Local.__qualname__
    check_view(result[0].array, buffer)
    assert same(result[1](), array)


MAIN_PROGRAM = """
import sys
import numpy as np
from dataclasses import dataclass
from shmplasma.serialization import serialize, deserialize, register_serializer
import pyarrow as pa

@dataclass
class Thing:
    number: int
    def double(self):
        return self.number * 2

class Known:
    pass

register_serializer(Known, lambda value: 7, lambda form: Known())
payload = serialize([{thing}, print, {extra}])
target = np.empty(payload.size_bytes, np.uint8)
payload.write(target)
assert type(deserialize(pa.py_buffer(target), payload.codec)[0]) is type({thing})
sys.stdout.buffer.write(bytes([payload.codec]) + target.tobytes())
"""


@pytest.mark.parametrize("thing", ["Thing(21)", "Thing"])
@pytest.mark.parametrize("extra", ["None", "np.arange(1000)", "b'x' * 300_000", "1 << 3_000_000"])
def test_classes_of_the_main_program_travel_by_value(thing: str, extra: str) -> None:
    """Another process reads a class, or an instance of it, that only the writer's main module has."""
    program = MAIN_PROGRAM.replace("{thing}", thing).replace("{extra}", extra)
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout
    thing_read, function, rest = deserialize(pa.py_buffer(output[1:]), output[0])
    assert (thing_read(21) if isinstance(thing_read, type) else thing_read).double() == 42
    assert function is print
    assert rest is None or isinstance(rest, int) or len(rest) >= 1000


OF_MAIN = "np.zeros(500, np.dtype((Record, [('a', 'i4')])))"


@pytest.mark.parametrize("value", [OF_MAIN, f"[{OF_MAIN}]", f"[{OF_MAIN}[:5]]"])
def test_records_of_the_main_program_travel_by_value(value: str) -> None:
    """Another process reads an array whose elements are of a class that only the writer's main module has."""
    program = f"""
import sys
import numpy as np
from shmplasma.serialization import serialize
class Record(np.record):
    def plus(self, number):
        return self.a + number
payload = serialize({value})
target = np.empty(payload.size_bytes, np.uint8)
payload.write(target)
sys.stdout.buffer.write(bytes([payload.codec]) + target.tobytes())
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout
    result = deserialize(pa.py_buffer(output[1:]), output[0])
    array = result[0] if isinstance(result, list) else result
    assert array[3].plus(7) == 7
    assert not array.flags.writeable


def test_records_of_a_local_class() -> None:
    """Arrays of them are stored as other values of local classes are."""
    record: Any = type("Record", (np.record,), {})  # which nothing can import
    array = np.zeros(500, np.dtype((record, [("a", "i4")])))
    for result in (round_trip(array), round_trip([array])[0]):
        assert result.dtype.type.__name__ == "Record"
        assert result.tobytes() == array.tobytes()


def test_what_is_to_travel_by_value_is_not_pickled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance of a class of the main program, and all that follows it."""

    class OfMain:
        __module__ = "__main__"
        __qualname__ = "OfMain"

    class Counted:
        times = 0

        def __reduce__(self) -> Any:
            Counted.times += 1
            return int, ()

    monkeypatch.setattr(sys.modules["__main__"], "OfMain", OfMain, raising=False)
    assert type(round_trip([OfMain(), Counted()])[0]).__qualname__ == "OfMain"
    assert Counted.times == 1


# --- registered types -------------------------------------------------------------------------------


class Signal:
    """A class that refuses to be pickled."""

    def __init__(self, samples: npt.NDArray[Any]) -> None:
        self.samples = samples

    def __reduce_ex__(self, protocol: object) -> Any:
        raise RuntimeError("signals are not pickled")


class LoudSignal(Signal):
    """A subclass of a registered class."""


class QuietSignal(LoudSignal):
    """A subclass that pickles itself."""

    def __reduce_ex__(self, protocol: object) -> Any:
        return QuietSignal, (self.samples,)


@pytest.fixture
def context() -> SerializationContext:
    """Return a context that knows signals."""
    context = SerializationContext()
    context.register_type(
        Signal,
        "signal",
        custom_serializer=lambda signal: {"samples": signal.samples},
        custom_deserializer=lambda form: Signal(form["samples"]),
    )
    return context


def test_registered_types_at_any_depth(context: SerializationContext) -> None:
    """A registered type is stored by its serializer wherever it stands, its arrays without a copy."""
    signal = Signal(np.arange(1000.0))
    for value in (signal, {"deep": [(signal,)]}):
        buffer, codec = stored(value, context)
        result = deserialize(buffer, codec, context)
        found = result if value is signal else result["deep"][0][0]
        assert type(found) is Signal
        check_view(found.samples, buffer)
    function = round_trip([signal, lambda: signal], context)[1]
    assert same(function().samples, signal.samples)


def test_subclasses_use_the_nearest_registration(context: SerializationContext) -> None:
    """The first registered base in the method resolution order counts; pickle=True ends the search."""
    value = [LoudSignal(np.arange(3)), QuietSignal(np.arange(4))]
    assert [type(item) for item in round_trip(value, context)] == [Signal, Signal]
    context.register_type(QuietSignal, "quiet", pickle=True)
    assert [type(item) for item in round_trip(value, context)] == [Signal, QuietSignal]
    context.register_type(
        LoudSignal, "loud", custom_serializer=len, custom_deserializer=lambda form: form
    )
    with pytest.raises(SerializationError, match=r"list cannot be serialized.*len\(\)"):
        serialize(value, context)


def test_a_type_may_be_registered_again(context: SerializationContext) -> None:
    """The last registration of a type counts."""
    context.register_type(
        Signal, "signal", custom_serializer=lambda _: 1, custom_deserializer=lambda form: form + 1
    )
    assert round_trip([Signal(np.arange(3))], context) == [2]


def test_native_types_can_be_registered(context: SerializationContext) -> None:
    """A user's serializer goes before our own, of arrays and of Arrow values."""
    context.register_type(
        np.ndarray,
        "array",
        custom_serializer=lambda array: array.tolist(),
        custom_deserializer=lambda form: ("array", form),
    )
    context.register_type(
        pa.Array,
        "arrow",
        custom_serializer=lambda array: array.to_pylist(),
        custom_deserializer=lambda form: ("arrow", form),
    )
    for value, expected in [
        (np.arange(2), ("array", [0, 1])),
        (pa.array([1, 2]), ("arrow", [1, 2])),
    ]:
        assert round_trip(value, context) == expected
        assert round_trip([value], context) == [expected]


def test_readers_need_the_registration(context: SerializationContext) -> None:
    """A reader without the deserializer is told which one it lacks."""
    buffer, codec = stored([Signal(np.arange(3))], context)
    for other in (None, SerializationContext()):
        with pytest.raises(DeserializationError, match=r"no deserializer is registered.*'signal'"):
            deserialize(buffer, codec, other)
    context.register_type(Signal, "signal")
    with pytest.raises(DeserializationError, match="'signal'"):
        deserialize(buffer, codec, context)


def test_contexts_nest(context: SerializationContext) -> None:
    """A deserializer may read another object with another context."""
    inner, inner_codec = stored([Signal(np.arange(3))], context)
    outer = SerializationContext()
    outer.register_type(
        Fraction,
        "fraction",
        custom_serializer=str,
        custom_deserializer=lambda form: (form, deserialize(inner, inner_codec, context)[0]),
    )
    (first, signal), (second, _) = round_trip([Fraction(1, 3), Fraction(2, 3)], outer)
    assert (first, second, type(signal)) == ("1/3", "2/3", Signal)


class Plugged:
    """A class for the default context."""

    def __init__(self, number: int) -> None:
        self.number = number


def test_register_serializer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default context serves those who give none, and names the main module alike everywhere."""
    monkeypatch.setattr(serialization.default_context, "_registrations", {})
    monkeypatch.setattr(serialization.default_context, "_deserializers", {})
    register_serializer(Plugged, lambda value: value.number, Plugged)
    assert round_trip([Plugged(4)])[0].number == 4
    monkeypatch.setattr(Plugged, "__module__", "__mp_main__")
    register_serializer(Plugged, lambda value: value.number, Plugged)
    assert b"main.Plugged" in stored(Plugged(4))[0].to_pybytes()
    assert b"__m" not in stored(Plugged(4))[0].to_pybytes()


@pytest.mark.parametrize("type_", [int, str, bytes, list, dict, type, type(lambda: 0)])
def test_types_that_pickle_keeps_to_itself_cannot_be_registered(type_: type) -> None:
    """A registration that would have no effect is refused."""
    with pytest.raises(ValueError, match="natively"):
        SerializationContext().register_type(type_, "x", custom_serializer=str)


def test_contradictory_registrations_are_refused() -> None:
    """Plain pickling and a serializer exclude each other."""
    with pytest.raises(ValueError, match="not both"):
        SerializationContext().register_type(Signal, "x", pickle=True, custom_serializer=str)


class Copied:
    """A class with a reducer in copyreg."""


class Meta(type):
    """A metaclass."""


class WithMeta(metaclass=Meta):
    """A class whose type is not type."""


def test_what_pickle_knows_by_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reducers in copyreg count, and classes of any metaclass are stored by name."""
    monkeypatch.setitem(copyreg.dispatch_table, Copied, lambda _: (str, ("copied",)))
    assert round_trip([Copied(), WithMeta]) == ["copied", WithMeta]


# --- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        threading.Lock,
        lambda: [np.arange(5000), threading.Lock()],
        lambda: (number for number in range(3)),
        lambda: memoryview(bytes(5)).cast("B") and Signal(np.arange(3)),
    ],
    ids=["lock", "lock inside", "generator", "own refusal"],
)
def test_what_cannot_be_serialized(make: Callable[[], object]) -> None:
    """The error names type and remedy, chains the cause, and is what old code catches."""
    value = make()
    name = type(value).__qualname__
    with pytest.raises(SerializationError, match=rf"{name} cannot .*register_serializer") as caught:
        serialize(value)
    assert isinstance(caught.value, ShmPlasmaError)
    assert isinstance(caught.value, TypeError)
    assert caught.value.__cause__ is not None


def test_lack_of_memory_is_no_fault_of_the_value(context: SerializationContext) -> None:
    """A MemoryError stays what it is, on both sides."""
    error = [False]

    def fail(value: object) -> object:
        if error[0]:
            raise MemoryError
        return value

    context.register_type(Fraction, "f", custom_serializer=str, custom_deserializer=fail)
    buffer, codec = stored(Fraction(1, 3), context)
    error[0] = True
    with pytest.raises(MemoryError):
        deserialize(buffer, codec, context)
    context.register_type(Fraction, "f", custom_serializer=fail)
    with pytest.raises(MemoryError):
        serialize(Fraction(1, 3), context)


def test_headers_are_for_plain_elements() -> None:
    """No header says that objects, or nothing at all, lie in shared memory."""
    for dtype in (np.dtype(object), np.dtype("V0"), np.dtype([("a", object)])):
        with pytest.raises(TypeError, match="plain bytes"):
            ndarray_head(dtype, (3,), 24)


def test_large_arrays_begin_on_a_page() -> None:
    """From 16 MiB on elements begin on a page of the object, alone or in other values; the next get knows the header."""
    large = np.zeros((1 << 20, 2))
    for value in (large, large.T, {"small": np.zeros(3), "large": large}):
        buffer, codec = stored(value)
        known = None
        for _ in range(2):
            got = deserialize(buffer, codec)
            array = got["large"] if isinstance(got, dict) else got
            check_view(array, buffer)
            assert (array.ctypes.data - buffer.address) % 4096 == 0
            assert known in (None, len(codecs._LAYOUTS))
            known = len(codecs._LAYOUTS)
    assert stored(large[:-1])[0].size == large[:-1].nbytes + 64


def test_known_headers_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of ever new shapes are read without remembering all of them."""
    monkeypatch.setattr(codecs, "_MAX_LAYOUTS", 5)
    for size in range(1000, 1020):
        assert round_trip(np.zeros(size)).shape == (size,)
    assert len(codecs._LAYOUTS) <= 5


def test_fields_that_are_renamed() -> None:
    """Who renames the fields of an array that was got changes no other one."""
    buffer, codec = stored(np.zeros(3, [("a", "i4"), ("b", "f8")]))
    renamed, other = deserialize(buffer, codec), deserialize(buffer, codec)
    renamed.dtype.names = ("p", "q")
    assert other.dtype.names == deserialize(buffer, codec).dtype.names == ("a", "b")


def test_unknown_codecs() -> None:
    """An object of a later release is refused, not guessed at."""
    with pytest.raises(DeserializationError, match=r"unknown codec 4000.*another release"):
        deserialize(pa.py_buffer(b"data"), 4000)


def test_classes_that_the_reader_cannot_import() -> None:
    """The reader is told which module it lacks."""
    data = b"cno_such_module\nThing\n."
    with pytest.raises(DeserializationError, match="No module named 'no_such_module'"):
        deserialize(pa.py_buffer(data), Codec.PICKLE)


@given(
    codec=st.sampled_from([Codec.NDARRAY, Codec.PICKLE_PARTS, Codec.TABLE, Codec.ARRAY]),
    data=st.binary(max_size=200),
)
@example(Codec.NDARRAY, b"")
@example(Codec.PICKLE_PARTS, b"")
def test_garbage_is_refused(codec: Codec, data: bytes) -> None:
    """Random bytes raise our error and no other."""
    with pytest.raises(DeserializationError):
        deserialize(pa.py_buffer(data), codec)


@pytest.mark.parametrize("value", [GRID, RECORDS], ids=["short header", "long header"])
def test_damaged_array_headers(value: npt.NDArray[Any]) -> None:
    """Each byte of a header may be anything: an error, or an array inside the object."""
    original = bytearray(stored(value)[0].to_pybytes())
    outcomes = set()
    for position in range(16 + 8 * value.ndim):
        for byte in (0, 1, 0x40, 0x7F, 0xFF):
            damaged = bytearray(original)
            damaged[position] = byte
            buffer = pa.py_buffer(bytes(damaged))
            try:
                array = deserialize(buffer, Codec.NDARRAY)
            except DeserializationError:
                outcomes.add("refused")
            else:
                outcomes.add("read")
                assert not array.nbytes or within(array.ctypes.data, array.nbytes, buffer)
    assert outcomes == {"refused", "read"}


def test_arrays_cut_short() -> None:
    """An array that lacks its last byte is refused."""
    buffer, codec = stored(GRID)
    with pytest.raises(DeserializationError, match="too small"):
        deserialize(buffer.slice(0, buffer.size - 1), codec)


def test_object_dtypes_in_a_header_are_refused() -> None:
    """Bytes are never taken for pointers."""
    data = stored(np.zeros(8, "|V8"))[0].to_pybytes().replace(b"|V8", b"|O8")
    with pytest.raises(DeserializationError, match="dtype"):
        deserialize(pa.py_buffer(data), Codec.NDARRAY)


def test_damaged_tables_of_parts() -> None:
    """Parts that lie outside the object are refused, wherever they claim to be."""
    original = stored([np.arange(1000.0), np.arange(2000.0)])[0].to_pybytes()
    refused = 0
    for position in range(48):
        damaged = bytearray(original)
        damaged[position] ^= 0xFF
        buffer = pa.py_buffer(bytes(damaged))
        try:
            arrays = deserialize(buffer, Codec.PICKLE_PARTS)
        except DeserializationError:
            refused += 1
        else:
            assert all(within(array.ctypes.data, array.nbytes, buffer) for array in arrays)
    assert refused > 40


# --- payloads and copies ----------------------------------------------------------------------------


def test_serialize_copies_nothing() -> None:
    """What changes before the payload is written is stored changed: nothing large was copied."""
    array = np.zeros(5000)
    column = np.zeros(5000)
    value = [array, make_table({"x": column}).slice(1), bytearray(200_000)]
    payloads = [serialize(value), serialize(array), serialize(make_table({"x": column}))]
    array[7] = column[7] = 3.0
    value[2][9] = 9
    results = []
    for payload in payloads:
        segment = Segment(payload.size_bytes)
        payload.write(segment.data)
        results.append(deserialize(segment.buffer(), payload.codec))
    assert results[0][0][7] == 3.0
    assert results[0][1]["x"][6].as_py() == 3.0
    assert results[0][2][9] == 9
    assert results[1][7] == 3.0
    assert results[2]["x"][7].as_py() == 3.0


VALUES: list[object] = [GRID, TABLE, pa.Tensor.from_numpy(GRID), [GRID, "a"], "text", b"bytes"]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_targets_of_another_size_are_refused(value: object) -> None:
    """A payload is written whole or not at all."""
    payload = serialize(value)
    for size in (payload.size_bytes - 1, payload.size_bytes + 1):
        segment = Segment(size)
        with pytest.raises(ValueError, match=f"{size} bytes"):
            payload.write(segment.data)
        with pytest.raises(ValueError, match=f"{size} bytes"):
            payload.fill(segment.data.data)
        assert (segment.room == 0xAA).all()


def test_sources_that_change_their_size() -> None:
    """A bytearray that shrinks between serialize and write is noticed."""
    data = bytearray(200_000)
    payload = serialize([data])
    del data[100:]
    with pytest.raises(ValueError, match="do not fit"):
        payload.write(Segment(payload.size_bytes).data)


@pytest.mark.parametrize("value", VALUES[:4], ids=lambda value: type(value).__name__)
def test_values_keep_their_object_alive(value: object) -> None:
    """The buffer lives as long as an array over it, and no longer."""
    payload = serialize([value, GRID.repeat(100)])
    segment = Segment(payload.size_bytes)
    payload.write(segment.data)
    alive = weakref.ref(segment)
    result = deserialize(segment.buffer(), payload.codec)[1]
    del segment
    gc.collect()
    assert alive() is not None
    assert result.sum() == GRID.sum() * 100
    del result
    gc.collect()
    assert alive() is None


LARGE = np.arange(9 << 20, dtype=np.uint8).reshape(9, 1 << 20)


def sources() -> Iterator[tuple[str, Any, bytes]]:
    """Yield sources of many kinds and the bytes which they stand for."""
    for name, array in ARRAYS.items():
        yield name, array, raw(array.T if array.flags.fnc else array)
    for size in (0, 1, 100, (1 << 20) - 1, 1 << 20, (4 << 20) + 5):
        data = LARGE.reshape(-1)[:size].tobytes()
        yield f"bytes {size}", data, data
        yield f"bytearray {size}", bytearray(data), data
        yield f"buffer {size}", pa.py_buffer(data), data
    yield "rows", LARGE, LARGE.tobytes()
    yield "columns", LARGE.T, LARGE.tobytes()
    yield "memoryview of doubles", GRID.data, GRID.tobytes()
    yield "memoryview, F", np.asfortranarray(GRID).data, GRID.T.tobytes()
    yield "memoryview, strided", GRID.data[::2], GRID[::2].tobytes()
    yield "strided", LARGE[:, ::3], LARGE[:, ::3].tobytes()


@pytest.mark.parametrize("threads", [1, 6])
def test_copy_into(threads: int) -> None:
    """Sources of each kind and size are copied exactly, by one thread or several."""
    for name, source, data in sources():
        segment = Segment(len(data))
        copy_into(segment.data, source, threads)
        assert segment.data.tobytes() == data, name
        assert (segment.outside() == 0xAA).all(), name


def test_copy_into_refuses() -> None:
    """Sizes must agree, and objects have no bytes."""
    for source in (b"abc", bytearray(5), np.zeros(3), np.zeros((3, 3), np.uint8)[:, 1]):
        with pytest.raises(ValueError, match="do not fit"):
            copy_into(np.zeros(4, np.uint8), source)
    with pytest.raises(TypeError):
        copy_into(np.zeros(8, np.uint8), np.array([None]))
    with pytest.raises(TypeError):
        copy_into(np.zeros(8, np.uint8), "text")  # type: ignore[arg-type]  # that is the point


def test_large_values_are_copied_by_threads() -> None:
    """Values above the threshold of parallel copies come back equal."""
    value = {"rows": LARGE, "bytes": LARGE.tobytes(), "table": make_table({"x": LARGE.reshape(-1)})}
    buffer, codec = stored(value, threads=6)
    result = deserialize(buffer, codec)
    assert same(result["rows"], LARGE)
    assert result["bytes"] == value["bytes"]
    assert result["table"].equals(value["table"])


def test_threads_serialize_at_once() -> None:
    """Several threads serialize and read at the same time without mixing their contexts."""
    failures: list[object] = []

    def work(number: int) -> None:
        context = SerializationContext()
        context.register_type(
            Fraction,
            "fraction",
            custom_serializer=lambda value: value.denominator,
            custom_deserializer=lambda form: (number, form),
        )
        for _ in range(50):
            result = round_trip([Fraction(1, 3), np.full(500, number)], context)
            if result[0] != (number, 3) or result[1][0] != number:
                failures.append(result)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_payloads_say_what_they_need() -> None:
    """A payload states codec and size before anything is written."""
    payload = serialize(np.arange(8.0))
    assert isinstance(payload, Payload)
    assert (payload.codec, payload.size_bytes) == (Codec.NDARRAY, 64 + 64)


@pytest.mark.parametrize(
    "source",
    [
        np.array([object(), 1]),
        np.array([object(), 1, 2, 3])[::2],
        np.array([object(), 1]).data,
        np.array([object(), 1, 2, 3]).data[::2],
        np.array(["a", "b"], np.dtypes.StringDType()),
        np.array(["a", "b", "c", "d"], np.dtypes.StringDType())[::2],
    ],
    ids=["array", "strided", "memoryview", "strided memoryview", "strings", "strided strings"],
)
def test_copy_into_refuses_addresses(source: Any) -> None:
    """What lies in an array of objects is of no use elsewhere, and NumPy would let go of what lay in the target."""
    target = np.full(16, 0x41, np.uint8)
    with pytest.raises(TypeError, match=r"elements are Python objects.* put stores"):
        copy_into(target, source)
    assert (target == 0x41).all()


def test_names_of_fields_are_no_objects() -> None:
    """Whatever letters are in them: it is the format that counts."""
    target = np.zeros(24, np.uint8)
    copy_into(target, np.ones(3, [("Open", "f8")]).data)
    assert target.view("f8").tolist() == [1, 1, 1]


class Registered(np.ndarray[Any, Any]):
    """An array with something to it that only its own reducer knows."""

    info: str


def make_registered(info: str, array: npt.NDArray[Any]) -> Registered:
    """Make one."""
    result = array.view(Registered)
    result.info = info
    return result


def test_a_reducer_of_copyreg(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked before an array's own is."""

    def reduce(array: Registered) -> Any:
        return make_registered, (array.info, np.asarray(array))

    monkeypatch.setitem(copyreg.dispatch_table, Registered, reduce)
    result = round_trip(make_registered("hello", np.arange(5000.0)))
    assert type(result) is Registered
    assert result.info == "hello"


def test_an_array_that_contains_itself() -> None:
    """A subclass of ndarray as well as ndarray."""
    array = np.empty(1, object).view(Registered)
    array[0] = array
    result = round_trip(array)
    assert type(result) is Registered
    assert result[0] is result


class Unregistered(pa.ExtensionType):
    """An extension type of which Arrow knows nothing where a stream is read."""

    def __init__(self) -> None:
        super().__init__(pa.int64(), "shmplasma.tests.unregistered")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: object, serialized: bytes) -> Unregistered:
        return cls()


def unstreamable() -> Iterator[Any]:
    """Yield Arrow values whose types Arrow's format cannot hold."""
    words = pa.array(["x", "y"]).dictionary_encode()
    nested: Any = pa.DictionaryArray.from_arrays(pa.array([0, 1, None] * 1000), words)
    extended = pa.ExtensionArray.from_storage(Unregistered(), pa.array(range(5000)))
    for array in (nested, extended):
        yield array
        yield array[:0]
        yield array[7:400]
        yield make_chunked([array[:200], array[300:]])
        yield make_chunked([], array.type)
        table = make_table({"a": array})
        yield table
        yield table[:0]
        yield table.to_batches()[0]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("value", list(unstreamable()))
def test_types_that_a_stream_cannot_hold(value: Any, nested: bool) -> None:
    """Dictionaries of dictionaries, and extension types that are not registered, come back as they were."""
    result = round_trip([value])[0] if nested else round_trip(value)
    if isinstance(value, (pa.Table, pa.RecordBatch)):
        assert result.schema == value.schema
        result, value = result.column(0), value.column(0)
    result.validate(full=True)
    assert result.type == value.type
    assert result.to_pylist() == value.to_pylist()


def sorted_maps() -> pa.Array[Any]:
    """Return maps whose type says that their keys are sorted."""
    kind: pa.DataType = make_map(pa.string(), pa.int8(), keys_sorted=True)
    values: Any = [[("a", 1)]] * 5000
    return pa.array(values, kind)


@pytest.mark.parametrize(
    "value",
    [
        sorted_maps(),
        sorted_maps()[:10],
        make_chunked([sorted_maps(), sorted_maps()[:10]]),
        make_table({"a": sorted_maps()}),
        pa.ListArray.from_arrays(list(range(5001)), sorted_maps()),
    ],
)
def test_sorted_maps_in_other_values(value: Any) -> None:
    """Arrow's own pickle would forget that they are sorted."""
    for result in (round_trip(value), round_trip([value])[0]):
        assert getattr(result, "type", None) == getattr(value, "type", None)
        assert str(getattr(result, "schema", "")) == str(getattr(value, "schema", ""))
        assert result.equals(value)


def test_rows_of_no_columns_in_other_values() -> None:
    """Arrow's own pickle would forget how many there are."""
    table = make_table({"a": [1, 2, 3]}).select([])
    assert round_trip(table).num_rows == 3
    assert round_trip([table])[0].num_rows == 3
    assert round_trip([table.to_batches()[0] if table.to_batches() else table])[0].num_rows == 3


class Changer:
    """Changes the size of a bytearray while it is pickled."""

    def __init__(self, data: bytearray, change: Callable[[bytearray], object]) -> None:
        self.data = data
        self.change = change

    def __reduce__(self) -> Any:
        self.change(self.data)
        return int, ()


@pytest.mark.parametrize("change", [bytearray.clear, lambda data: data.extend(b"more")])
def test_a_bytearray_that_changes_its_size(change: Callable[[bytearray], object]) -> None:
    """It is refused: the pickle says that it had another size."""
    data = bytearray(200_000)
    with pytest.raises(SerializationError, match=r"bytearray in it changed its size.* put a copy"):
        serialize([data, Changer(data, change)])
