from __future__ import annotations

import functools
import gc
import operator
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pytest
from scipy import sparse

import shmplasma as plasma
from tests.clients import MISSING, figure, new_id
from tests.processes import Child, in_forked_child, run_python, until

SLOTS_A_BOARD = 511


def lies_in(
    client: plasma.PlasmaClient, object_id: plasma.ObjectID, address: int, size: int
) -> bool:
    """Tell whether memory is that of an object's buffer."""
    buffer = client.get_buffers(object_id)
    start: int = buffer.address
    return start <= address and address + size <= start + len(buffer)


def assert_is_view(
    client: plasma.PlasmaClient, object_id: plasma.ObjectID, array: npt.NDArray[Any]
) -> None:
    """Fail unless an array lies in its object, 64-byte aligned and read-only."""
    assert not array.flags.writeable
    assert array.ctypes.data % 64 == 0
    if array.nbytes:
        assert lies_in(client, object_id, array.ctypes.data, array.nbytes)


# --- NumPy ------------------------------------------------------------------------------------------

ARRAYS: dict[str, npt.NDArray[Any]] = {
    **{
        f"dtype {dtype}": np.arange(1000).astype(dtype)
        for dtype in (
            "?",
            "i1",
            "u2",
            "<i4",
            ">i4",
            "u8",
            "f2",
            "f4",
            ">f8",
            "c8",
            "c16",
            "S5",
            "U3",
        )
    },
    "datetime": np.arange("2020-01-01", "2022-01-01", dtype="M8[D]"),
    "timedelta": np.arange(1000).astype("m8[ns]"),
    "structured": np.zeros(100, [("a", "i4"), ("b", "f8", (2, 2)), ("c", "S3")]),
    "C order": np.arange(6000.0).reshape(20, 300),
    "Fortran order": np.asfortranarray(np.arange(6000.0).reshape(20, 300)),
    "3-D transposed": np.arange(6000.0).reshape(10, 20, 30).transpose(2, 0, 1),
    "every other": np.arange(6000.0)[::2],
    "backwards": np.arange(6000.0)[::-1],
    "broadcast": np.broadcast_to(np.arange(100.0), (50, 100)),
    "0-D": np.array(5.5),
    "empty": np.empty(0),
    "empty 2-D": np.empty((0, 7), np.int16),
    "one byte": np.ones(1, np.uint8),
    "5 MB": np.random.default_rng(1).random(640_001),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient, array: npt.NDArray[Any]
) -> None:
    """An array comes back equal, of its dtype and shape, as an aligned read-only view of the store."""
    object_id = client.put(array)
    got = client2.get(object_id)
    assert type(got) is np.ndarray
    assert got.dtype == array.dtype
    assert got.shape == array.shape
    np.testing.assert_array_equal(got, array)
    assert_is_view(client2, object_id, got)


def test_arrays_of_objects(client: plasma.PlasmaClient) -> None:
    """An array of Python objects comes back, and large arrays in it are views."""
    inner = np.arange(10_000)
    object_id = client.put(np.array([inner, None, "text"], dtype=object))
    got = client.get(object_id)
    assert (got[0] == inner).all()
    assert list(got[1:]) == [None, "text"]
    assert_is_view(client, object_id, got[0])


def test_arrays_in_other_values(client: plasma.PlasmaClient) -> None:
    """Large arrays at any depth are views, and keep what they are part of."""
    value = {"a": [np.arange(5000), {"b": np.ones((300, 30), np.float32)}], "c": (1, "x")}
    object_id = client.put(value)
    got = client.get(object_id)
    first, second = got["a"][0], got["a"][1]["b"]
    assert got["c"] == (1, "x")
    del got
    client.delete([object_id])
    for array, expected in ((first, np.arange(5000)), (second, np.ones((300, 30)))):
        assert (array == expected).all()
        assert_is_view(client, object_id, array)
    del first
    assert client.contains(object_id)
    del second, array
    until(lambda: not client.contains(object_id), "the last array's end is noticed")


# --- Arrow ------------------------------------------------------------------------------------------

TABLE = pa.table(
    {
        "n": pa.array(range(1000)),
        "f": pa.array([x / 7 if x % 5 else None for x in range(1000)]),
        "s": pa.array([f"text {x}" for x in range(1000)]),
        "l": pa.array([list(range(x % 4)) for x in range(1000)]),
        "d": pa.array(["x", "y"] * 500).dictionary_encode(),
        "t": pa.array(range(1000), pa.timestamp("us", "UTC")),
        "st": pa.array([{"a": x, "b": str(x)} for x in range(1000)]),
    },
    metadata={"made": "here"},
)

ARROWS: dict[str, Any] = {
    "table": TABLE,
    "table in chunks": pa.concat_tables([TABLE.slice(0, 300), TABLE.slice(500)]),
    "slice": TABLE.slice(100, 50),
    "empty table": TABLE.schema.empty_table(),
    "no columns": pa.table({}),
    "batch": TABLE.to_batches()[0],
    "array": TABLE["n"].chunk(0),
    "strings": TABLE["s"].chunk(0),
    "chunks": pa.chunked_array([[1, 2], [3], []]),
    "nulls": pa.nulls(5),
    "tensor": pa.Tensor.from_numpy(np.arange(6000.0).reshape(20, 300)),
}


@pytest.mark.parametrize("value", ARROWS.values(), ids=ARROWS)
def test_arrow_values(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient, value: Any
) -> None:
    """Arrow values come back equal, of their type, and valid."""
    got = client2.get(client.put(value))
    assert type(got) is type(value)
    assert got.equals(value)
    if hasattr(got, "validate"):
        got.validate(full=True)
    if hasattr(value, "schema"):
        assert got.schema.equals(value.schema, check_metadata=True)


def test_arrow_buffers_are_those_of_the_store(client: plasma.PlasmaClient) -> None:
    """Each buffer of a table lies in its object, aligned; none was copied."""
    object_id = client.put(TABLE)
    got = client.get(object_id)
    allocated = pa.total_allocated_bytes()
    again = client.get(object_id)
    assert pa.total_allocated_bytes() - allocated < 4096
    del again
    buffers = [
        buffer
        for name in ("n", "f", "s", "t")
        for chunk in got[name].chunks
        for buffer in chunk.buffers()
        if buffer is not None
    ]
    assert len(buffers) >= 5
    for buffer in buffers:
        assert lies_in(client, object_id, buffer.address, buffer.size)
        assert buffer.address % 64 == 0
        assert not buffer.is_mutable


def test_tables_are_plain_arrow_streams(client: plasma.PlasmaClient) -> None:
    """Any reader of Arrow's streams reads a table through `get_buffers`, without shmplasma."""
    buffer = client.get_buffers(client.put(TABLE))
    with pa.ipc.open_stream(buffer) as reader:
        assert reader.read_all().equals(TABLE)
    tensor = pa.Tensor.from_numpy(np.arange(12.0).reshape(3, 4))
    buffer = client.get_buffers(client.put(tensor))
    assert pa.ipc.read_tensor(pa.BufferReader(buffer)).equals(tensor)


# --- pandas, SciPy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "arrow"])
def test_data_frames(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient, backend: str
) -> None:
    """A frame comes back equal, index and dtypes included, whatever holds its columns."""
    frame = pd.DataFrame(
        {
            "n": np.arange(1000),
            "f": np.linspace(0, 1, 1000),
            "s": [f"text {i}" for i in range(1000)],
            "t": pd.date_range("2020-01-01", periods=1000, freq="h", tz="Europe/Berlin"),
        },
        index=pd.MultiIndex.from_product([range(10), range(100)], names=["a", "b"]),
    )
    if backend == "arrow":
        frame = frame.convert_dtypes(dtype_backend="pyarrow")
    pd.testing.assert_frame_equal(client2.get(client.put(frame)), frame)
    for name in frame.columns:
        pd.testing.assert_series_equal(client2.get(client.put(frame[name])), frame[name])


def test_columns_are_views(client: plasma.PlasmaClient) -> None:
    """The numbers of a frame are not copied, and cannot be changed by accident."""
    frame = pd.DataFrame({"x": np.arange(10_000.0), "y": np.arange(10_000.0)})
    object_id = client.put(frame)
    got = client.get(object_id)
    column = got["x"].to_numpy()
    assert not column.flags.writeable
    assert lies_in(client, object_id, column.ctypes.data, column.nbytes)
    assert (got["x"] + got["y"]).sum() == frame.to_numpy().sum()
    changed = got.assign(x=1.0)
    assert changed["x"].sum() == 10_000
    assert got["x"].sum() == frame["x"].sum()


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr"])
def test_sparse_matrices(client: plasma.PlasmaClient, kind: str) -> None:
    """A sparse matrix comes back equal, its parts as views."""
    matrix = sparse.random(200, 300, density=0.2, format=kind, rng=1)
    object_id = client.put(matrix)
    got = client.get(object_id)
    assert got.format == kind
    assert abs(got - matrix).sum() == 0
    assert got.data.ctypes.data % 64 == 0
    assert lies_in(client, object_id, got.data.ctypes.data, got.data.nbytes)


# --- functions, classes, registered types -----------------------------------------------------------


class Account:
    """A class that the tests' own module defines."""

    def __init__(self, balance: int) -> None:
        self.balance = balance


def test_what_cloudpickle_stores(client: plasma.PlasmaClient) -> None:
    """Closures, lambdas, partial functions and local classes come back and work."""
    large = np.arange(10_000)

    def closure(index: int) -> int:
        return int(large[index])

    class Local:
        def __init__(self) -> None:
            self.large = large

    object_id = client.put([closure, lambda: 5, functools.partial(operator.add, 1), Local()])
    function, constant, add_one, local = client.get(object_id)
    assert (function(7), constant(), add_one(2)) == (7, 5, 3)
    assert_is_view(client, object_id, local.large)
    assert client.get(client.put(Account(5))).balance == 5


def test_interactive_functions_reach_other_processes(
    store: plasma.Store, client: plasma.PlasmaClient
) -> None:
    """What is defined here runs there, although that process cannot import it."""
    factor = 3
    object_id = client.put((lambda array: array.sum() * factor, np.arange(1000)))
    code = """
        import sys
        import shmplasma as plasma

        with plasma.connect(sys.argv[1]) as client:
            function, array = client.get(plasma.ObjectID(bytes.fromhex(sys.argv[2])))
            print(function(array), array.flags.writeable)
    """
    out = run_python(code, store.store_socket_name, object_id.binary().hex())
    assert out == f"{3 * 499_500} False\n"


SPAWNED = """
    import multiprocessing, sys
    import shmplasma as plasma

    class Model:
        name = "the writer's"

    def put(path, conn):
        with plasma.connect(path) as client:
            conn.send(client.put(Model()).binary())

    if __name__ == "__main__":
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=put, args=(sys.argv[1], theirs))
        process.start()
        print(ours.recv().hex())
        process.join()
"""


def test_classes_of_a_spawned_workers_main_program(
    store: plasma.Store, client: plasma.PlasmaClient, tmp_path: Path
) -> None:
    """They are not looked for in the main program of whoever reads them, by whatever name it goes."""
    program = tmp_path / "program.py"
    program.write_text(dedent(SPAWNED))
    command = [sys.executable, str(program), store.store_socket_name]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    code = """
        import multiprocessing, sys
        import shmplasma as plasma

        class Model:
            name = "the reader's"

        with plasma.connect(sys.argv[1]) as client:
            print(client.get(plasma.ObjectID(bytes.fromhex(sys.argv[2]))).name)
    """
    assert run_python(code, store.store_socket_name, name) == "the writer's\n"
    assert client.get(plasma.ObjectID(bytes.fromhex(name))).name == "the writer's"


REGISTERED = """
    import sys
    import numpy as np
    import shmplasma as plasma

    class Signal:
        def __init__(self, rate, samples):
            self.rate, self.samples = rate, samples

    plasma.register_serializer(
        Signal, lambda signal: (signal.rate, signal.samples), lambda form: Signal(*form)
    )
    with plasma.connect(sys.argv[1]) as client:
        if len(sys.argv) == 2:
            print(client.put({"signal": Signal(44100, np.arange(5000))}).binary().hex())
        else:
            signal = client.get(plasma.ObjectID(bytes.fromhex(sys.argv[2])))["signal"]
            assert type(signal) is Signal
            print(signal.rate, signal.samples.sum(), signal.samples.flags.writeable)
"""


def test_registered_types_across_processes(
    store: plasma.Store, client: plasma.PlasmaClient
) -> None:
    """A type that two programs have registered goes from one to the other; others are told what lacks."""
    name = run_python(REGISTERED, store.store_socket_name).strip()
    assert run_python(REGISTERED, store.store_socket_name, name) == "44100 12497500 False\n"
    with pytest.raises(plasma.DeserializationError, match="Signal"):
        client.get(plasma.ObjectID(bytes.fromhex(name)))


CONNECTED = """
    import os
    import sys
    import shmplasma as plasma

    class Signal:
        pass

    os.dup2(1, 2)
    plasma.register_serializer(Signal, lambda signal: 0, lambda form: Signal())
    client = plasma.connect(sys.argv[1])
    value = client.get(client.put(bytes(10_000)))
"""


def test_the_end_of_a_program_that_has_registered_types(store: plasma.Store) -> None:
    """It is silent: the client ends before its modules, though what was registered could still reach it."""
    assert not run_python(CONNECTED, store.store_socket_name)


class Stubborn:
    """Cannot be stored."""

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        raise RuntimeError("it does not want to")


@pytest.mark.parametrize(
    "value",
    [Stubborn(), [np.arange(100_000), Stubborn()], threading.Lock(), (x for x in "abc")],
    ids=["object", "beside an array", "lock", "generator"],
)
@pytest.mark.parametrize("own_id", [False, True])
def test_what_cannot_be_stored_leaves_nothing(
    client: plasma.PlasmaClient, value: object, own_id: bool
) -> None:
    """A failing serialization is a TypeError with the reason; no object, no bytes, no pin stays."""
    object_id = new_id() if own_id else None
    free = figure(client, "free bytes") + figure(client, "leased bytes")
    with pytest.raises(plasma.SerializationError, match="register_serializer"):
        client.put(value, object_id)
    assert not client.list()
    assert figure(client, "free bytes") + figure(client, "leased bytes") == free
    assert figure(client, "unsealed bytes") == figure(client, "pinned bytes") == 0
    if object_id is not None:
        assert client.put("afterwards", object_id) == object_id


def test_a_failure_while_writing_leaves_nothing(client: plasma.PlasmaClient) -> None:
    """An object whose bytes could not be written is aborted."""

    class Growing(np.ndarray):
        @property
        def nbytes(self) -> int:
            return 200_000

    object_id = new_id()
    with pytest.raises((ValueError, TypeError, BufferError)):
        client.put_raw_buffer(np.zeros(100_000, np.uint8).view(Growing), object_id)
    assert not client.list()
    assert figure(client, "unsealed bytes") == figure(client, "pinned bytes") == 0


# --- life of buffers --------------------------------------------------------------------------------


def test_values_outlive_their_client(store: plasma.Store, client: plasma.PlasmaClient) -> None:
    """Arrays, tables and frames that were got stay as they are when their client is no more."""
    array, frame = np.arange(100_000), pd.DataFrame({"x": np.arange(50_000)})
    ids = [client.put(array), client.put(TABLE), client.put(frame)]
    reader = store.connect()
    got = reader.get(ids)
    reader.disconnect()
    del reader
    gc.collect()
    client.delete(ids)
    for _ in range(40):
        client.put_raw_buffer(5_000_000 * b"\xff")
    assert (got[0] == array).all()
    assert got[1].equals(TABLE)
    pd.testing.assert_frame_equal(got[2], frame)
    del got
    until(lambda: not any(map(client.contains, ids)), "all of them are released")


def test_thousands_of_buffers(client: plasma.PlasmaClient, client2: plasma.PlasmaClient) -> None:
    """A client may hold more buffers than a board has slots; each release is one."""
    count = 4 * SLOTS_A_BOARD + 7
    ids = [client.put_raw_buffer(i.to_bytes(4)) for i in range(count)]
    for reader in (client, client2):
        buffers = reader.get_buffers(ids)
        singly = [reader.get_buffers(object_id) for object_id in ids[:SLOTS_A_BOARD]]
        assert [int.from_bytes(buffer) for buffer in buffers] == list(range(count))
        assert figure(client, "pinned objects") == count
        assert client.evict(10**9) == 0
        random.Random(1).shuffle(buffers)
        del buffers[count // 2 :]
        assert figure(client, "pinned objects") >= count // 2
        del buffers, singly
        assert figure(client, "pinned objects") == 0
    assert client.evict(10**9) == 4 * count


def test_thousands_of_unsealed_objects(client: plasma.PlasmaClient) -> None:
    """A client may write more objects at once than a board has slots."""
    ids = [new_id() for _ in range(SLOTS_A_BOARD + 100)]
    targets = [client.create(object_id, 8) for object_id in ids]
    for number, target in enumerate(targets):
        memoryview(target).cast("B")[:] = number.to_bytes(8)
    for object_id in ids:
        client.seal(object_id)
    del targets, target
    got = client.get_buffers(ids)
    assert [int.from_bytes(buffer) for buffer in got] == list(range(len(ids)))


def test_many_ids_in_one_call(client: plasma.PlasmaClient) -> None:
    """A get of very many ids comes in order, whatever number of messages it takes."""
    there = client.put_raw_buffer(b"here")
    ids = [there if i % 1000 == 0 else new_id() for i in range(70_000)]
    got = client.get_buffers(ids, timeout_ms=0)
    assert [i for i, buffer in enumerate(got) if buffer is not None] == list(range(0, 70_000, 1000))
    del got
    client.delete(ids)
    assert not client.contains(there)


# --- threads ----------------------------------------------------------------------------------------


def test_many_threads_on_one_client(client: plasma.PlasmaClient) -> None:
    """Threads that put, get, wait, create, delete and list at once get what is theirs."""

    def work(seed: int) -> int:
        source = random.Random(seed)
        for step in range(40):
            value = (seed, step, "x" * source.randrange(2000))
            object_id = client.put(value, new_id() if source.random() < 0.5 else None)
            assert client.get(object_id) == value
            assert client.get(MISSING, 0) is plasma.ObjectNotAvailable
            with client.create_array(new_id(), 100, np.int64) as array:
                array[:] = seed
            match source.randrange(4):
                case 0:
                    client.delete([object_id])
                    assert not client.contains(object_id)
                case 1:
                    assert client.list()[object_id]["state"] == "sealed"
                case 2:
                    assert client.get([object_id, MISSING], 1)[0] == value
                case _:
                    assert client.hash(object_id) == client.hash(object_id)
        return seed

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(work, range(12))) == list(range(12))


def test_threads_hand_over(client: plasma.PlasmaClient) -> None:
    """Threads that wait for each other's objects, all on one client, all come to their end."""
    rounds = [[new_id() for _ in range(6)] for _ in range(30)]

    def work(number: int) -> list[int]:
        seen = []
        for ids in rounds:
            client.put(number, ids[number])
            seen.append(client.get(ids[(number + 1) % 6]))
        return seen

    with ThreadPoolExecutor(6) as pool:
        for number, seen in enumerate(pool.map(work, range(6))):
            assert seen == [(number + 1) % 6] * len(rounds)


def test_disconnecting_while_others_read(store: plasma.Store, client: plasma.PlasmaClient) -> None:
    """Threads that use a client which another one disconnects get values, or an OSError; none hangs."""
    ids = [client.put(np.full(1000, i)) for i in range(20)]
    for _ in range(20):
        shared = store.connect()
        begun = threading.Semaphore(0)

        def read(shared: plasma.PlasmaClient = shared, begun: Any = begun) -> list[Any]:
            kept = []
            try:
                while True:
                    for object_id in ids:
                        kept.append(shared.get(object_id))
                        shared.get([MISSING], 1)
                    begun.release()
                    del kept[:-5]
            except OSError:
                return kept

        def wait(shared: plasma.PlasmaClient = shared, begun: Any = begun) -> list[Any]:
            begun.release()
            with pytest.raises(OSError, match="disconnected"):
                shared.get(MISSING)
            return []

        with ThreadPoolExecutor(5) as pool:
            futures = [pool.submit(task) for task in (read, read, read, wait, wait)]
            for _ in futures:
                begun.acquire()
            shared.disconnect()
            for future in futures:
                assert all((array == array[0]).all() for array in future.result())
        del shared, futures, future, read, wait
        until(lambda: client.debug_string().count("(pid ") == 1, "the store has let it go")


def test_threads_put_large_values(client: plasma.PlasmaClient) -> None:
    """Copies that several threads make with several threads each do not mix."""

    def work(number: int) -> bool:
        array = np.full(1_000_000, number, np.uint64)
        object_id = client.put(array)
        got = client.get(object_id)
        same = bool((got == array).all())
        del got
        client.delete([object_id])
        return same

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


# --- create_array, abort ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [5, (5,), (3, 4), [2, 3, 4], (), 0, (0, 3), np.int64(6)])
@pytest.mark.parametrize("dtype", [float, "i2", np.dtype("M8[s]"), [("a", "i4"), ("b", "f8")]])
def test_create_array(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient, shape: Any, dtype: Any
) -> None:
    """A block gives a writable array, and seals the object at its end; `get` returns the array."""
    object_id = new_id()
    with client.create_array(object_id, shape, dtype) as array:
        expected = np.ones(shape, dtype)
        assert array.shape == expected.shape
        assert array.dtype == expected.dtype
        assert array.flags.writeable
        assert array.ctypes.data % 64 == 0
        assert not client2.contains(object_id)
        array[...] = expected
    got = client2.get(object_id, 0)
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == expected.dtype
    assert_is_view(client2, object_id, got)


def test_create_array_aborts(client: plasma.PlasmaClient) -> None:
    """A block that raises leaves no object, and the exception is not hidden."""
    object_id = new_id()
    with pytest.raises(KeyError), client.create_array(object_id, 100):
        raise KeyError
    assert object_id not in client.list()
    with client.create_array(object_id, 3) as array:
        array[:] = 7
    assert (client.get(object_id) == 7).all()


def test_a_new_array_is_put_as_an_array(client: plasma.PlasmaClient) -> None:
    """What is put of it elsewhere is a plain array: nobody can seal a copy."""
    with client.create_array(new_id(), 500) as array:
        array[:] = 7
        for got in (client.get(client.put(array)), *client.get(client.put([array]))):
            assert type(got) is np.ndarray
            assert (got == 7).all()


def test_create_array_without_a_block(client: plasma.PlasmaClient) -> None:
    """Without a block the array is sealed like any object."""
    object_id = new_id()
    array = client.create_array(object_id, (2, 2))
    array[:] = [[1, 2], [3, 4]]
    assert client.get(object_id, 0) is plasma.ObjectNotAvailable
    client.seal(object_id)
    assert client.get(object_id).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("shape", "dtype", "error"),
    [
        (-1, float, ValueError),
        ((3, -2), float, ValueError),
        ((0, -2), float, ValueError),
        (5, object, TypeError),
        (2.5, float, TypeError),
        ("ab", float, TypeError),
        ((1 << 40, 1 << 40), float, plasma.PlasmaStoreFull),
        ((1 << 40, 1 << 40, 0), float, ValueError),
        (1 << 70, float, ValueError),
        (65 * (1,), float, ValueError),
    ],
)
def test_impossible_arrays(
    client: plasma.PlasmaClient, shape: Any, dtype: Any, error: type[Exception]
) -> None:
    """Shapes and dtypes that no array can have are refused, and leave nothing."""
    object_id = new_id()
    with pytest.raises(error):
        client.create_array(object_id, shape, dtype)
    assert not client.list()
    with client.create_array(object_id, 3) as array:
        array[:] = 5


@pytest.mark.parametrize("metadata", ["", "text", [], None, 0, memoryview(b"bytes")])
def test_impossible_metadata(client: plasma.PlasmaClient, metadata: Any) -> None:
    """What is neither bytes nor a bytearray is no metadata, by whichever way it comes; nothing is stored."""
    for action in (
        lambda: client.create(new_id(), 1, metadata),
        lambda: client.create_and_seal(new_id(), b"x", metadata),
        lambda: client.put_raw_buffer(b"x", metadata=metadata),
        lambda: client.put_raw_buffer(b"x", new_id(), metadata, keep=True),
    ):
        with pytest.raises(TypeError, match="metadata is bytes or a bytearray, not"):
            action()
    assert not client.list()


@pytest.mark.parametrize(
    ("codec", "error"), [(-1, ValueError), (1 << 40, ValueError), ("", TypeError)]
)
def test_impossible_codecs(client: plasma.PlasmaClient, codec: Any, error: type[Exception]) -> None:
    """A number that is no codec is refused, and leaves nothing."""
    with pytest.raises(error):
        client.create_encoded(new_id(), 10, b"", codec)
    assert not client.list()


def test_abort(client: plasma.PlasmaClient, client2: plasma.PlasmaClient) -> None:
    """An aborted object is gone, its id and its room can be used anew; only its creator may abort it."""
    object_id = new_id()
    buffer = client.create(object_id, 90_000_000)
    with pytest.raises(plasma.PlasmaObjectNotFound):
        client2.abort(object_id)
    client.abort(object_id)
    assert object_id not in client.list()
    for wrong in (object_id, MISSING, client.put(1)):
        with pytest.raises(plasma.PlasmaObjectNotFound):
            client.abort(wrong)
    with pytest.raises(plasma.PlasmaObjectNotFound):
        client.seal(object_id)
    # As long as the writer could still write there, nobody else gets the room.
    with pytest.raises(plasma.PlasmaStoreFull):
        client2.create(object_id, 90_000_000)
    memoryview(buffer).cast("B")[:3] = b"xyz"
    del buffer
    until(lambda: figure(client, "objects that wait for a release") == 0, "the room is free")
    client2.create(object_id, 90_000_000)
    client2.abort(object_id)


def test_a_sealed_object_cannot_be_aborted(client: plasma.PlasmaClient) -> None:
    """What is sealed stays."""
    object_id = new_id()
    buffer = client.create(object_id, 1)
    client.seal(object_id)
    with pytest.raises(plasma.ShmPlasmaError):
        client.abort(object_id)
    assert client.contains(object_id)
    del buffer


def test_what_was_created_and_aborted_wakes_nobody(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """A get that waits for an aborted object goes on waiting, for the next one of that id."""
    object_id = new_id()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client2.get, object_id)
        client.create(object_id, 10)
        client.abort(object_id)
        assert client.get(object_id, 5) is plasma.ObjectNotAvailable
        assert not future.done()
        client.put("at last", object_id)
        assert future.result() == "at last"


# --- single ids, timeouts, context manager ----------------------------------------------------------


def test_one_id_or_a_list(client: plasma.PlasmaClient) -> None:
    """For one id, its item comes alone."""
    object_id = client.put_raw_buffer(b"data", metadata=b"meta")
    assert bytes(client.get_buffers(object_id)) == b"data"
    metadata, buffer = client.get_buffers(object_id, with_meta=True)
    assert (metadata, bytes(buffer)) == (b"meta", b"data")
    alone = client.get_metadata(object_id)
    assert alone is not None
    assert alone.to_pybytes() == b"meta"
    del alone
    assert client.get_buffers(MISSING, 0) is None
    assert client.get_buffers(MISSING, 0, with_meta=True) == (None, None)
    assert client.get_metadata(MISSING, timeout_ms=1) is None
    client.delete(MISSING)
    del buffer
    client.delete(object_id)
    assert not client.contains(object_id)


@pytest.mark.parametrize(
    "timeout", [0, 1, 0.5, np.int32(2), np.float64(0.0), 1e-9, -2, -1000, -0.5, -1.5, np.int64(-5)]
)
def test_timeouts(client: plasma.PlasmaClient, timeout: float) -> None:
    """Whatever number a timeout is, what is absent is said to be so, and what is there comes along.

    A negative one, other than -1, is what is left of a time that is over.
    """
    there = client.put("there")
    assert client.get([there, MISSING], timeout) == ["there", plasma.ObjectNotAvailable]
    first, absent = client.get_buffers([there, MISSING], timeout_ms=timeout)
    assert first is not None
    assert absent is None
    assert [m is None for m in client.get_metadata([there, MISSING], timeout_ms=timeout)] == [
        False,
        True,
    ]


@pytest.mark.parametrize("timeout", [-1, -1.0, np.int64(-1), None, float("inf"), 1e12])
def test_timeouts_without_an_end(client: plasma.PlasmaClient, timeout: float | None) -> None:
    """-1 and None have no end, and an enormous one practically none."""
    object_id = new_id()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.get, object_id, timeout)
        assert client.get(MISSING, 5) is plasma.ObjectNotAvailable
        assert not future.done()
        client.put("late", object_id)
        assert future.result() == "late"


def test_a_client_in_a_block(store: plasma.Store, client: plasma.PlasmaClient) -> None:
    """Leaving the block disconnects, also by an exception; what was got stays."""
    unsealed = new_id()
    inner = store.connect()
    array = inner.get(inner.put(np.arange(100)))
    inner.create(unsealed, 10)
    with pytest.raises(KeyError), inner as entered:
        raise KeyError(entered)
    assert "disconnected" in repr(inner)
    with pytest.raises(OSError, match="disconnected"):
        inner.list()
    assert unsealed not in client.list()
    assert (array == np.arange(100)).all()


def test_a_disconnected_client_in_a_cycle(store: plasma.Store) -> None:
    """A client that was disconnected leaves no warning, whoever refers to whom when it is collected."""
    holder: dict[str, Any] = {}
    with store.connect() as inner:
        holder["holder"], holder["client"] = holder, inner
    del holder, inner
    gc.collect()


def test_nothing_is_inherited_by_a_program_that_is_started(store: plasma.Store) -> None:
    """The descriptors that a client gets from its store end with an exec, as all of Python's do."""
    code = """
        import os, sys
        import shmplasma as plasma

        def inheritable():
            for fd in map(int, os.listdir("/proc/self/fd")):
                try:
                    if os.get_inheritable(fd):
                        yield fd
                except OSError:  # what has listed the directory
                    pass

        before = set(inheritable())
        with plasma.connect(sys.argv[1]) as client:
            client.put_raw_buffer(b"1")
            print(set(inheritable()) - before)
    """
    assert run_python(code, store.store_socket_name) == "set()\n"


def test_a_client_that_is_just_dropped(store: plasma.Store, client: plasma.PlasmaClient) -> None:
    """A client that nobody disconnects leaves when it is collected."""
    dropped = store.connect()
    assert client.debug_string().count("(pid ") == 2
    del dropped
    gc.collect()
    until(lambda: client.debug_string().count("(pid ") == 1, "the store has noticed")


# --- other processes --------------------------------------------------------------------------------


def test_a_put_is_found_by_whoever_was_told(
    store: plasma.Store, client: plasma.PlasmaClient
) -> None:
    """An id that is passed on as soon as `put` returns is found at once, each time."""
    code = """
        import sys
        import shmplasma as plasma

        client = plasma.connect(sys.argv[1])
        print("ready", flush=True)
        for line in sys.stdin:
            object_id = plasma.ObjectID(bytes.fromhex(line.strip()))
            found = client.contains(object_id), client.get(object_id, timeout_ms=0)
            print(*found, flush=True)
    """
    with Child(code, store.store_socket_name) as child:
        assert child.hear() == "ready"
        for number in range(300):
            child.say(client.put(number, new_id() if number % 3 == 0 else None).binary().hex())
            assert child.hear() == f"True {number}"


def test_processes_share_one_copy(client: plasma.PlasmaClient) -> None:
    """Children that get the same object see the same bytes, and hold it each for itself."""
    array = np.random.default_rng(1).random(1_000_000)
    object_id = client.put(array)

    def check() -> None:
        got = client.get(object_id)
        assert (got == array).all()
        assert not got.flags.owndata

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: in_forked_child(check), range(3))) == [0, 0, 0]
    assert client.list()[object_id]["ref_count"] == 0


ELSEWHERE = """
    import os, sys
    import numpy as np
    import shmplasma as plasma

    assert not os.listdir("/dev/shm")
    with plasma.connect(sys.argv[1]) as client:
        array = client.get(plasma.ObjectID(bytes.fromhex(sys.argv[2])))
        assert not array.flags.writeable
        print(client.put(array * 2).binary().hex(), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has mount namespaces")
def test_a_client_that_does_not_see_the_segment(
    store: plasma.Store, client: plasma.PlasmaClient
) -> None:
    """In another mount namespace, where only the socket is shared, the segment comes by descriptor."""
    if os.geteuid() or shutil.which("unshare") is None:
        pytest.skip("making a mount namespace needs root and unshare(1)")
    inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    hide = "mount -t tmpfs none /dev/shm"
    if subprocess.run([*inside, hide], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs in a namespace of its own")
    object_id = client.put(np.arange(100_000))
    prefix = [*inside, f'{hide} && exec "$@"', "sh"]
    with Child(
        ELSEWHERE, store.store_socket_name, object_id.binary().hex(), prefix=prefix
    ) as child:
        answer = plasma.ObjectID(bytes.fromhex(child.hear()))
        assert child.end() == 0
    assert (client.get(answer) == 2 * np.arange(100_000)).all()


@pytest.mark.parametrize("in_directory", [False, True])
def test_a_store_in_a_directory(tmp_path: Path, in_directory: bool) -> None:
    """Objects are the same wherever the segment lies."""
    directory = str(tmp_path) if in_directory else None
    with (
        plasma.Store("20MB", directory=directory) as store,
        store.connect() as client,
        store.connect() as client2,
    ):
        assert bool(list(tmp_path.glob("shmplasma-*"))) == in_directory
        array = np.arange(1_000_000)
        object_id = client.put(array)
        assert (client2.get(object_id) == array).all()
    assert not os.listdir(tmp_path)


def create_and_abort(client: plasma.PlasmaClient) -> None:
    """Create an object in vain."""
    client.create(MISSING, 10)
    client.abort(MISSING)


def be_refused(client: plasma.PlasmaClient) -> None:
    """Ask for what cannot be had."""
    with pytest.raises(plasma.PlasmaObjectNotFound):
        client.seal(MISSING)
    with pytest.raises(plasma.PlasmaStoreFull):
        client.create(MISSING, 10**9)


USES: dict[str, Callable[[plasma.PlasmaClient], object]] = {
    "get": lambda client: client.get(client.put(np.arange(3000))),
    "miss": lambda client: client.get(MISSING, 0),
    "create and seal": lambda client: client.create_and_seal(new_id(), b"12345"),
    "delete": lambda client: client.delete([client.put(1)]),
    "abort": create_and_abort,
    "refused": be_refused,
    "connect": lambda client: plasma.connect(client.store_socket_name).disconnect(),
    "subscribe": lambda client: client.subscribe(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_nothing_piles_up(
    client: plasma.PlasmaClient, use: Callable[[plasma.PlasmaClient], object]
) -> None:
    """Whatever is done a thousand times leaves no descriptor, no pin and no room behind."""
    use(client)
    # The first get that waits opens a socket, by which it may hear of what it waits for.
    client.get(MISSING, 1)
    gc.collect()
    descriptors = len(os.listdir("/dev/fd"))
    for _ in range(200):
        use(client)
    gc.collect()
    assert len(os.listdir("/dev/fd")) == descriptors
    assert figure(client, "pinned objects") == 0
    assert figure(client, "unsealed bytes") == 0
