from __future__ import annotations

import gc
import inspect
import os
import pickle
import signal
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from pyarrow.lib import ArrowException, ArrowSerializationError, ArrowTypeError

import shmplasma as plasma
from tests.clients import MISSING, figure, new_id
from tests.processes import Child, until

MIB = 1 << 20


def as_bytes(buffer: pa.Buffer | None) -> bytes:
    """Return the contents of a buffer, which is there."""
    assert buffer is not None
    return buffer.to_pybytes()


def returns_none(call: Callable[..., object], *arguments: object) -> bool:
    """Tell whether a call returns None, as Plasma's does."""
    return call(*arguments) is None


def fill(buffer: pa.Buffer, data: bytes) -> None:
    """Write bytes to a new object."""
    memoryview(buffer).cast("B")[:] = data


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "ObjectID",
        "ObjectNotAvailable",
        "PlasmaBuffer",
        "PlasmaClient",
        "PlasmaObjectExists",
        "PlasmaObjectNotFound",
        "PlasmaStoreFull",
    ],
)
def test_plasmas_classes_are_there(name: str) -> None:
    """Each class of Plasma's is in the module, and in what ``import *`` and `dir` give."""
    assert inspect.isclass(getattr(plasma, name))
    assert name in plasma.__all__
    assert name in dir(plasma)


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (plasma.connect, "store_socket_name, num_retries=-1"),
        (
            plasma.start_plasma_store,
            (
                "plasma_store_memory, use_valgrind=False, use_profiler=False, "
                "plasma_directory=None, use_hugepages=False, external_store=None"
            ),
        ),
        (plasma.PlasmaClient.create, "object_id, data_size, metadata=b''"),
        (plasma.PlasmaClient.create_and_seal, "object_id, data, metadata=b''"),
        (plasma.PlasmaClient.seal, "object_id"),
        (plasma.PlasmaClient.get_buffers, "object_ids, timeout_ms=-1, with_meta=False"),
        (plasma.PlasmaClient.get_metadata, "object_ids, timeout_ms=-1"),
        (
            plasma.PlasmaClient.put_raw_buffer,
            "value, object_id=None, metadata=b'', memcopy_threads=6",
        ),
        (
            plasma.PlasmaClient.put,
            "value, object_id=None, memcopy_threads=6, serialization_context=None",
        ),
        (plasma.PlasmaClient.get, "object_ids, timeout_ms=-1, serialization_context=None"),
        (plasma.PlasmaClient.contains, "object_id"),
        (plasma.PlasmaClient.hash, "object_id"),
        (plasma.PlasmaClient.evict, "num_bytes"),
        (plasma.PlasmaClient.delete, "object_ids"),
        (plasma.PlasmaClient.list, ""),
        (plasma.PlasmaClient.subscribe, ""),
        (plasma.PlasmaClient.get_next_notification, ""),
        (plasma.PlasmaClient.get_notification_socket, ""),
        (plasma.PlasmaClient.decode_notifications, "buf"),
        (plasma.PlasmaClient.set_client_options, "client_name, limit_output_memory"),
        (plasma.PlasmaClient.debug_string, ""),
        (plasma.PlasmaClient.store_capacity, ""),
        (plasma.PlasmaClient.to_capsule, ""),
        (plasma.PlasmaClient.disconnect, ""),
    ],
)
def test_calls_of_plasma_are_accepted(function: Callable[..., object], signature: str) -> None:
    """Whatever binds to Plasma's signature, by position or by name, binds to ours; what is new is by name only."""
    ours = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    for parameter, theirs in zip(ours, filter(None, signature.split(", ")), strict=False):
        name, _, default = theirs.partition("=")
        assert parameter.name == name
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if default:
            assert repr(parameter.default) == default
    for parameter in ours[len(list(filter(None, signature.split(", ")))) :]:
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default is not parameter.empty


def test_start_plasma_store() -> None:
    """The context manager yields the socket's name and the process, which SIGTERM ends with code 0."""
    with plasma.start_plasma_store(plasma_store_memory=10**7) as (name, process):
        with plasma.connect(name) as client:
            assert client.store_capacity() == 10**7
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        assert not Path(name).exists()


# --- ObjectID ---------------------------------------------------------------------------------------


def test_object_id() -> None:
    """An id gives its bytes, compares, hashes, pickles and prints by them, and may be referred to weakly."""
    object_id = plasma.ObjectID(20 * b"a")
    assert object_id.binary() == 20 * b"a"
    assert object_id == plasma.ObjectID(20 * b"a")
    assert object_id != plasma.ObjectID(20 * b"b")
    assert hash(object_id) == hash(plasma.ObjectID(20 * b"a"))
    assert pickle.loads(pickle.dumps(object_id)) == object_id
    assert weakref.ref(object_id)() is object_id
    assert repr(object_id) == f"ObjectID({20 * '61'})"
    assert len({plasma.ObjectID.from_random() for _ in range(100)}) == 100
    assert len(plasma.ObjectID.from_random().binary()) == 20


@pytest.mark.parametrize("wrong", [b"", 19 * b"a", 21 * b"a", 20 * "a", None, 20, bytearray(20)])
def test_what_is_no_object_id(wrong: Any) -> None:
    """Anything but 20 bytes is a ValueError."""
    with pytest.raises(ValueError, match="20"):
        plasma.ObjectID(wrong)


# --- create, seal -----------------------------------------------------------------------------------


def test_create_gives_a_mutable_buffer(client: plasma.PlasmaClient) -> None:
    """The buffer is of the right size, aligned, and writable through all that Plasma's was."""
    object_id = new_id()
    buffer = client.create(object_id, 1000)
    assert isinstance(buffer, plasma.PlasmaBuffer)
    assert buffer.size == len(buffer) == 1000
    assert buffer.is_mutable
    assert buffer.address % 64 == 0
    with pa.FixedSizeBufferWriter(buffer) as writer:
        writer.write(1000 * b"\3")
    view = memoryview(buffer)
    assert not view.readonly
    assert view.nbytes == 1000
    view.cast("B")[10:20] = 10 * b"\2"
    array: Any = np.frombuffer(memoryview(buffer), dtype="uint8")
    array[:10] = 1
    client.seal(object_id)
    (got,) = client.get_buffers([object_id])
    assert got.to_pybytes() == 10 * b"\1" + 10 * b"\2" + 980 * b"\3"


@pytest.mark.parametrize("metadata", [b"", b"m", b"meta\0data", bytearray(b"array"), bytes(5000)])
def test_create_with_metadata(client: plasma.PlasmaClient, metadata: bytes | bytearray) -> None:
    """Metadata may be bytes or a bytearray, and is kept as it is."""
    object_id = new_id()
    fill(client.create(object_id, 3, metadata), b"abc")
    client.seal(object_id=object_id)
    assert client.get_buffers([object_id], with_meta=True)[0][0] == metadata
    assert as_bytes(client.get_metadata(object_id)) == metadata
    assert client.get_buffers([object_id])[0].to_pybytes() == b"abc"


def test_create_by_name(client: plasma.PlasmaClient) -> None:
    """All parameters may be given by name."""
    object_id = new_id()
    buffer = client.create(object_id=object_id, data_size=10, metadata=b"x")
    assert buffer.size == 10
    client.abort(object_id)


@pytest.mark.parametrize(
    "data",
    [b"some data", bytearray(b"some data"), memoryview(b"some data"), pa.py_buffer(b"some data")],
    ids=lambda data: type(data).__name__,
)
def test_create_and_seal(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient, data: Any
) -> None:
    """Bytes of any type are stored in one call, which returns None; others see them at once."""
    object_id = new_id()
    assert returns_none(client.create_and_seal, object_id, data)
    assert client2.get_buffers([object_id], 0)[0].to_pybytes() == b"some data"
    other = new_id()
    client.create_and_seal(other, data, metadata=b"note")
    assert client2.get_buffers([other], with_meta=True)[0][0] == b"note"


def test_seal_returns_none_and_publishes(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """An object is there for others from the seal on, not before."""
    object_id = new_id()
    client.create(object_id, 10)
    assert client2.get_buffers([object_id], timeout_ms=0) == [None]
    assert not client2.contains(object_id)
    assert returns_none(client.seal, object_id)
    assert client2.contains(object_id)
    assert client2.get_buffers([object_id], timeout_ms=0)[0].size == 10


# --- get_buffers, get_metadata ----------------------------------------------------------------------


def test_get_buffers_are_read_only(client: plasma.PlasmaClient) -> None:
    """What comes is a PlasmaBuffer that nobody can write through."""
    (buffer,) = client.get_buffers([client.put_raw_buffer(b"abc")])
    assert isinstance(buffer, plasma.PlasmaBuffer)
    assert not buffer.is_mutable
    assert memoryview(buffer).readonly
    assert not np.frombuffer(memoryview(buffer), np.uint8).flags.writeable
    assert bytes(buffer) == buffer.to_pybytes() == b"abc"


@pytest.mark.parametrize("make", [list, tuple, set, dict.fromkeys, iter], ids=lambda m: m.__name__)
def test_any_collection_of_ids(client: plasma.PlasmaClient, make: Callable[[Any], Any]) -> None:
    """Lists, tuples, sets, dicts and iterators of ids are accepted; their order is that of the result."""
    ids = [client.put_raw_buffer(bytes([i]), metadata=bytes([i])) for i in range(5)]
    order = list(make(ids))
    values = {object_id: bytes([i]) for i, object_id in enumerate(ids)}
    assert [bytes(b) for b in client.get_buffers(make(ids))] == [values[i] for i in order]
    assert [bytes(b) for b in client.get_metadata(make(ids))] == [values[i] for i in order]
    with_meta = client.get_buffers(make(ids), with_meta=True)
    assert [m for m, _ in with_meta] == [values[i] for i in order]
    del with_meta
    client.delete(make(ids))
    assert not any(client.contains(object_id) for object_id in ids)


def test_a_generator_of_ids(client: plasma.PlasmaClient) -> None:
    """A generator is used once, from its beginning to its end, whatever is absent."""
    ids = [client.put_raw_buffer(b"a"), MISSING, client.put_raw_buffer(b"c")]
    first, absent, last = client.get_buffers((object_id for object_id in ids), 0)
    assert (bytes(first), absent, bytes(last)) == (b"a", None, b"c")


def test_no_ids_at_all(client: plasma.PlasmaClient) -> None:
    """Nothing gives nothing, without waiting."""
    assert client.get_buffers([]) == []
    assert client.get_buffers((), with_meta=True) == []
    assert client.get_metadata([]) == []
    assert client.get([]) == []
    assert returns_none(client.delete, [])


def test_absent_objects(client: plasma.PlasmaClient) -> None:
    """None stands for what is absent, a pair of them with metadata, the class for values."""
    there = client.put("value")
    assert client.get_buffers([MISSING], 0) == [None]
    assert client.get_buffers([MISSING], timeout_ms=20) == [None]
    assert client.get_buffers([MISSING], 0, True) == [(None, None)]
    assert client.get_metadata([MISSING], 0) == [None]
    assert client.get(MISSING, 0) is plasma.ObjectNotAvailable
    assert client.get([MISSING, there, MISSING], timeout_ms=20) == [
        plasma.ObjectNotAvailable,
        "value",
        plasma.ObjectNotAvailable,
    ]


def test_with_meta_gives_pairs(client: plasma.PlasmaClient) -> None:
    """A pair is the metadata, as bytes, and the buffer."""
    object_id = client.put_raw_buffer(b"data", metadata=b"meta")
    ((metadata, buffer),) = client.get_buffers([object_id], with_meta=True)
    assert metadata == b"meta"
    assert type(metadata) is bytes
    assert bytes(buffer) == b"data"
    assert not buffer.is_mutable


def test_a_get_waits_for_the_seal(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """Without a timeout a get waits until the object is sealed, be it created before or after."""
    first, second = new_id(), new_id()
    target = client.create(first, 5)

    def complete() -> None:
        fill(target, b"first")
        client.seal(first)
        client.create_and_seal(second, b"second")

    thread = threading.Thread(target=complete)
    thread.start()
    got = client2.get_buffers([second, first])
    thread.join()
    assert [bytes(buffer) for buffer in got] == [b"second", b"first"]


def test_one_object_more_than_once(client: plasma.PlasmaClient) -> None:
    """An id that is named more than once gives a result for each."""
    object_id = client.put(5)
    assert client.get([object_id, object_id]) == [5, 5]
    first, absent, second = client.get_buffers([object_id, MISSING, object_id], 0)
    assert absent is None
    assert first.equals(second)


# --- put, get ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4096, MIB, 9 * MIB + 5])
@pytest.mark.parametrize("threads", [1, 6])
def test_put_raw_buffer(client: plasma.PlasmaClient, size: int, threads: int) -> None:
    """Bytes come back as they were, whatever their number and that of the threads."""
    value = np.random.default_rng(size).bytes(size)
    object_id = client.put_raw_buffer(value, None, b"meta", threads)
    assert isinstance(object_id, plasma.ObjectID)
    ((metadata, buffer),) = client.get_buffers([object_id], with_meta=True)
    assert metadata == b"meta"
    assert buffer.equals(pa.py_buffer(value))


def test_put_under_ones_own_id(client: plasma.PlasmaClient, client2: plasma.PlasmaClient) -> None:
    """The id that was given is used, and returned."""
    first, second = new_id(), new_id()
    assert client.put_raw_buffer(b"raw", first) == first
    assert client.put([1, "two", 3.0], second, memcopy_threads=2) == second
    assert bytes(client2.get_buffers([first])[0]) == b"raw"
    assert client2.get(second) == [1, "two", 3.0]


@pytest.mark.parametrize("value", [None, True, 5, 2.5, "text", b"bytes", [1, [2]], {"a": (1, 2)}])
def test_put_and_get(client: plasma.PlasmaClient, value: object) -> None:
    """A value comes back equal and of its type: alone for an id, in a list for a sequence."""
    object_id = client.put(value)
    assert isinstance(object_id, plasma.ObjectID)
    assert client.get(object_id) == value
    assert type(client.get(object_id)) is type(value)
    assert client.get([object_id]) == client.get((object_id,)) == [value]


def test_a_serialization_context(client: plasma.PlasmaClient) -> None:
    """`put` and `get` take a context by Plasma's name of the parameter."""
    context = plasma.SerializationContext()
    context.register_type(
        Path, "Path", custom_serializer=str, custom_deserializer=lambda text: Path("/read", text)
    )
    object_id = client.put([Path("x")], serialization_context=context)
    assert client.get(object_id, serialization_context=context) == [Path("/read/x")]


def test_a_get_of_values_that_waits(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """A get of values waits like one of buffers."""
    object_id = new_id()
    thread = threading.Thread(target=client.put, args=("late", object_id))
    thread.start()
    assert client2.get(object_id) == "late"
    thread.join()


# --- contains, hash ---------------------------------------------------------------------------------


def test_contains(client: plasma.PlasmaClient, client2: plasma.PlasmaClient) -> None:
    """True from the seal to the end of the object, for everybody; a bool."""
    object_id = new_id()
    assert client.contains(object_id) is False
    client.create(object_id, 10)
    assert client.contains(object_id) is False
    client.seal(object_id)
    assert client.contains(object_id) is True
    assert client2.contains(object_id) is True
    client2.delete([object_id])
    assert client.contains(object_id) is False


PATTERN = bytes(range(251))

HASHES = [
    (0, b"", "99e9d85137db46ef"),
    (0, b"metadata", "c66952de7fc68d59"),
    (1, b"", "682705db4aa834e9"),
    (1, b"metadata", "60eb8d501634843a"),
    (63, b"", "4f8e5fa9e2a96ae2"),
    (63, b"metadata", "859027d3d78f8f7c"),
    (64, b"", "f01367db0173c6f7"),
    (64, b"metadata", "e1319ffc89cc8666"),
    (100, b"", "9765163280e5c16a"),
    (100, b"metadata", "70d74e97190eac03"),
    (MIB - 1, b"", "309a568f1b562153"),
    (MIB - 1, b"metadata", "0542eb51b9874d19"),
    (MIB, b"", "c8693799b90c551e"),
    (MIB, b"metadata", "5b20069d63a37ceb"),
    (MIB + 1, b"", "4b8eff388895e13b"),
    (MIB + 1, b"metadata", "e18f0a5e0448c6b6"),
    (5 * MIB + 77, b"", "e9f87819972cabe2"),
    (5 * MIB + 77, b"metadata", "8118f81de06483c5"),
]
"""Size of data (`PATTERN`, repeated), metadata, and the hash that Plasma 11 gave for them."""


@pytest.mark.parametrize(("size", "metadata", "expected"), HASHES)
def test_hashes_are_plasmas(
    client: plasma.PlasmaClient, size: int, metadata: bytes, expected: str
) -> None:
    """The hash is the one that Plasma 11 has computed."""
    data = (PATTERN * (size // len(PATTERN) + 1))[:size]
    object_id = client.put_raw_buffer(data, metadata=metadata)
    assert client.hash(object_id) == bytes.fromhex(expected)


@pytest.mark.parametrize("size", [17, 5000, MIB + 511, MIB + 512, 2 * MIB + 513, 3_333_333])
@pytest.mark.parametrize("metadata", [b"", b"x", bytes(range(200))])
def test_hashes_follow_the_formula(client: plasma.PlasmaClient, size: int, metadata: bytes) -> None:
    """The hash is what the description of Plasma's says: of the data, or of its chunks' hashes."""
    data = np.random.default_rng(size).bytes(size)
    head = data
    if size >= MIB:
        chunk = size // 64 // 8 * 64
        chunks = [data[i * chunk : (i + 1) * chunk] for i in range(8)] + [data[8 * chunk :]]
        numbers = [xxhash.xxh64_intdigest(part, seed=0) for part in chunks]
        head = np.array(numbers, "<u8").tobytes()
        assert len(head) == 72
    expected = xxhash.xxh64_intdigest(head + metadata, seed=0).to_bytes(8, "little")
    assert client.hash(client.put_raw_buffer(data, metadata=metadata)) == expected


# --- evict ------------------------------------------------------------------------------------------


def test_evict(client: plasma.PlasmaClient) -> None:
    """Eviction returns the data plus metadata that it freed, at least what was asked for."""
    ids = [client.put_raw_buffer(bytes(1000), metadata=bytes(100)) for _ in range(5)]
    assert client.evict(1) == 1100
    assert client.evict(1101) == 2200
    assert sum(client.contains(object_id) for object_id in ids) == 2
    assert client.evict(10**9) == 2200
    assert client.evict(10**9) == 0
    assert not client.list()


def test_evict_takes_empty_objects_in_their_turn(client: plasma.PlasmaClient) -> None:
    """Objects without bytes go with the first later one that has some, oldest first; none after it goes."""
    client.subscribe()
    empty = [client.put_raw_buffer(b"") for _ in range(3)]
    full = client.put_raw_buffer(b"data", metadata=b"metadata")
    last = client.put_raw_buffer(b"")
    assert [client.get_next_notification()[0] for _ in range(5)] == [*empty, full, last]
    assert client.evict(1) == 12
    gone = [client.get_next_notification() for _ in range(4)]
    assert gone == [(object_id, -1, -1) for object_id in (*empty, full)]
    assert list(client.list()) == [last]


@pytest.mark.parametrize("number", [0, -1, -(10**30)])
def test_evict_nothing(client: plasma.PlasmaClient, number: int) -> None:
    """Zero or less evicts nothing."""
    object_id = client.put(1)
    assert client.evict(number) == 0
    assert client.contains(object_id)


def test_evict_skips_what_is_held(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """What any client holds a buffer of stays, and goes once it is released."""
    held, free = client.put_raw_buffer(bytes(100)), client.put_raw_buffer(bytes(50))
    buffer = client2.get_buffers(held)
    unsealed = new_id()
    writing = client.create(unsealed, 70)
    assert client.evict(10**9) == 50
    assert not client.contains(free)
    assert client.contains(held)
    del buffer
    assert client.evict(10**9) == 100
    client.seal(unsealed)
    assert client.evict(10**9) == 0
    del writing
    assert client.evict(10**9) == 70


# --- delete -----------------------------------------------------------------------------------------


def test_delete_always_returns_none(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """Missing, unsealed or in use: nothing is said, and the sealed ones that nobody holds go."""
    there, unsealed, used = new_id(), new_id(), new_id()
    for object_id in (there, used):
        client.create_and_seal(object_id, b"1")
    client.create(unsealed, 10)
    buffer = client2.get_buffers(used)
    assert returns_none(client.delete, [there, unsealed, used, MISSING, there])
    assert not client.contains(there)
    assert client.contains(used)
    assert client.list()[unsealed]["state"] == "created"
    client.seal(unsealed)
    assert client.contains(unsealed)
    del buffer


def test_a_delete_is_deferred_to_the_last_release(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """Until the last release the object is found, can be got anew, and its id is taken."""
    object_id = client.put_raw_buffer(b"precious")
    first = client2.get_buffers(object_id)
    client.delete([object_id])
    assert client.contains(object_id)
    second = client.get_buffers(object_id, timeout_ms=0)
    with pytest.raises(plasma.PlasmaObjectExists):
        client.create(object_id, 10)
    del first
    assert client.contains(object_id)
    assert bytes(second) == b"precious"
    del second
    until(lambda: not client.contains(object_id), "the object has gone")
    assert not client.list()


def test_a_deferred_delete_goes_with_its_holder(
    store: plasma.Store, client: plasma.PlasmaClient
) -> None:
    """The last release may be the death of a client."""
    object_id = client.put_raw_buffer(b"x")
    with holder(store, object_id) as child:
        client.delete([object_id])
        assert client.contains(object_id)
        child.kill()
        until(lambda: not client.contains(object_id), "the object has gone")


# --- list -------------------------------------------------------------------------------------------


def test_list(client: plasma.PlasmaClient, client2: plasma.PlasmaClient) -> None:
    """Each object has Plasma's six fields, with Plasma's units and types, and whether it is kept."""
    before = int(time.time())
    sealed = client.put_raw_buffer(bytes(100), metadata=b"12345")
    created = new_id()
    client.create(created, 70, b"1")
    buffers = [c.get_buffers(sealed) for c in (client, client2, client2)]
    after = int(time.time())
    listing = client.list()
    assert set(listing) == {sealed, created}
    one, other = listing[sealed], listing[created]
    fields = "data_size metadata_size ref_count create_time construct_duration state keep"
    assert set(one) == set(other) == set(fields.split())
    assert (one["data_size"], one["metadata_size"], one["state"]) == (100, 5, "sealed")
    assert (other["data_size"], other["metadata_size"], other["state"]) == (70, 1, "created")
    assert one["ref_count"] == len({id(c) for c in (client, client2)})
    assert other["ref_count"] == 1
    for info in (one, other):
        assert before <= info["create_time"] <= after
        assert isinstance(info["create_time"], int)
    assert 0 <= one["construct_duration"] <= after - before + 1
    assert other["construct_duration"] == -1
    del buffers
    assert client.list()[sealed]["ref_count"] == 0


@pytest.mark.parametrize("size", [10, 500_000])
def test_how_long_it_took(client: plasma.PlasmaClient, size: int) -> None:
    """From the create to the seal, whenever the store has heard of either."""
    object_id = new_id()
    # A lease, so that the next creation needs no message, and a store that sleeps.
    client.create_and_seal(new_id(), bytes(100_000))
    time.sleep(0.1)
    before = int(time.time())
    client.create(object_id, size)
    created = time.time()
    time.sleep(1.2)
    client.seal(object_id)
    info = client.list()[object_id]
    assert before <= info["create_time"] <= created + 0.002
    assert 1 <= info["construct_duration"] <= time.time() - before


def test_a_long_list(client: plasma.PlasmaClient) -> None:
    """A list of many objects comes whole."""
    ids = {client.put_raw_buffer(b"") for _ in range(10_000)}
    assert set(client.list()) == ids


# --- notifications ----------------------------------------------------------------------------------


def test_notifications(client: plasma.PlasmaClient, client2: plasma.PlasmaClient) -> None:
    """What is sealed comes first, then what happens, in order; -1 and -1 mean that it went."""
    old = {client2.put_raw_buffer(bytes(i), metadata=bytes(2 * i)): i for i in range(4)}
    client2.create(new_id(), 10)  # not sealed, hence not replayed
    client.subscribe()
    replayed = [client.get_next_notification() for _ in old]
    assert {object_id: (data, metadata) for object_id, data, metadata in replayed} == {
        object_id: (i, 2 * i) for object_id, i in old.items()
    }
    sealed, deleted, put = new_id(), next(iter(old)), new_id()
    client2.create(sealed, 100, b"xyz")
    client2.seal(sealed)
    assert client.get_next_notification() == (sealed, 100, 3)
    client2.delete([deleted])
    assert client.get_next_notification() == (deleted, -1, -1)
    client2.put_raw_buffer(b"12", put)
    assert client.get_next_notification() == (put, 2, 0)
    assert client2.evict(10**9) > 0
    gone = [client.get_next_notification() for _ in range(5)]
    assert {object_id for object_id, _, _ in gone} == {sealed, put, *old} - {deleted}
    assert all(sizes == (-1, -1) for _, *sizes_ in gone for sizes in [tuple(sizes_)])


def test_a_deferred_deletion_is_told_when_it_happens(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """A subscriber hears of a deletion at the last release, not before."""
    client.subscribe()
    held = client2.put_raw_buffer(b"1")
    buffer = client2.get_buffers(held)
    client2.delete(held)
    other = client2.put_raw_buffer(b"22")
    client2.flush()
    del buffer
    heard = [client.get_next_notification() for _ in range(3)]
    assert heard == [(held, 1, 0), (other, 2, 0), (held, -1, -1)]


def test_the_notification_socket(client: plasma.PlasmaClient, client2: plasma.PlasmaClient) -> None:
    """The socket carries lengths of 8 bytes and so many bytes, which `decode_notifications` reads."""
    client.subscribe()
    sock = client.get_notification_socket()
    object_id = client2.put_raw_buffer(b"123", metadata=b"4567")
    client2.delete([object_id])
    heard: list[tuple[plasma.ObjectID, int, int]] = []
    sock.settimeout(60)
    while len(heard) < 2:
        length = int.from_bytes(receive(sock, 8), "little")
        ids, data_sizes, metadata_sizes = client.decode_notifications(receive(sock, length))
        heard += zip(ids, data_sizes, metadata_sizes, strict=True)
    assert heard == [(object_id, 3, 4), (object_id, -1, -1)]


def receive(sock: Any, size: int) -> bytes:
    """Return exactly so many bytes."""
    data = b""
    while len(data) < size:
        data += sock.recv(size - len(data))
    return data


@pytest.mark.parametrize("wrong", [b"1", bytes(37)])
def test_what_is_no_notification(client: plasma.PlasmaClient, wrong: bytes) -> None:
    """Bytes that are no notification are a ValueError."""
    with pytest.raises(ValueError, match="notification"):
        client.decode_notifications(wrong)


# --- options, figures -------------------------------------------------------------------------------


def test_a_quota(client: plasma.PlasmaClient, client2: plasma.PlasmaClient) -> None:
    """A quota limits what this client holds, and nobody else; a refusal does not take the id."""
    assert returns_none(client.set_client_options, "careful", 1000)
    first, second = new_id(), new_id()
    held = client.create(first, 600)
    with pytest.raises(plasma.PlasmaStoreFull, match="1000"):
        client.create(second, 401)
    with pytest.raises(plasma.PlasmaStoreFull):
        client.put_raw_buffer(bytes(401), second)
    with pytest.raises(plasma.PlasmaStoreFull):
        client.put(np.zeros(401, np.uint8))
    client2.put_raw_buffer(bytes(5000))
    assert second not in client.list()
    assert client.create(second, 400).size == 400
    client.abort(second)
    client.seal(first)
    with pytest.raises(plasma.PlasmaStoreFull):  # it is still held
        client.create(second, 401)
    del held
    client.put_raw_buffer(bytes(1000), second)
    client.set_client_options("careful", 0)
    client.put_raw_buffer(bytes(5000))


def test_the_name_of_a_client(client: plasma.PlasmaClient, client2: plasma.PlasmaClient) -> None:
    """The name that a client gives itself is what others see."""
    client.set_client_options("a name of its own", 10**6)
    assert f"a name of its own (pid {os.getpid()})" in client2.debug_string()


def test_debug_string(client: plasma.PlasmaClient) -> None:
    """The text states capacity, use and holders."""
    object_id = client.put_raw_buffer(bytes(6400))
    buffer = client.get_buffers(object_id)
    assert figure(client, "capacity bytes") == 10**8
    assert figure(client, "pinned bytes") == 6400
    assert figure(client, "objects") == 1
    del buffer
    assert figure(client, "pinned bytes") == 0


@pytest.mark.parametrize("capacity", [1, 4095, 1_000_001])
def test_the_capacity_is_exact(capacity: int) -> None:
    """`store_capacity` is what ``-m`` said; an object of that size fits, one byte more does not."""
    with plasma.Store(capacity) as store, store.connect() as client:
        assert client.store_capacity() == capacity
        for data_size, metadata in ((capacity, b""), (capacity - 1, b"m")):
            object_id = new_id()
            with pytest.raises(plasma.PlasmaStoreFull):
                client.create(object_id, data_size + 1, metadata)
            fill(client.create(object_id, data_size, metadata), data_size * b"7")
            client.seal(object_id)
            assert client.get_buffers(object_id).size == data_size
            client.delete([object_id])


def test_the_socket_name(store: plasma.Store, client: plasma.PlasmaClient) -> None:
    """The client knows the path that it connected to."""
    assert client.store_socket_name == store.store_socket_name
    assert isinstance(client.store_socket_name, str)


def test_to_capsule(client: plasma.PlasmaClient) -> None:
    """There is no C++ client, which is said."""
    with pytest.raises(plasma.ShmPlasmaError, match="C\\+\\+"):
        client.to_capsule()


def test_disconnect_twice(store: plasma.Store) -> None:
    """Disconnecting returns None, and once more None."""
    client = store.connect()
    assert returns_none(client.disconnect)
    assert returns_none(client.disconnect)


# --- sizes, the end of a client ---------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [b"", b"only metadata"])
def test_size_zero(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient, metadata: bytes
) -> None:
    """An object of no data is an object like any other."""
    first, second = new_id(), new_id()
    assert client.create(first, 0, metadata).size == 0
    client.seal(first)
    client.put_raw_buffer(b"", second, metadata)
    for object_id in (first, second):
        assert client2.contains(object_id)
        assert client2.get_buffers([object_id], 0, with_meta=True)[0][0] == metadata
        assert client2.get_buffers(object_id, 0).size == 0
        assert as_bytes(client2.get_metadata(object_id)) == metadata
        assert client2.list()[object_id]["data_size"] == 0
    assert client.hash(first) == client2.hash(second)
    client2.delete([first, second])
    assert not client.list()


HOLDER = """
    import sys
    import shmplasma as plasma

    path, held, unsealed = sys.argv[1:]
    client = plasma.connect(path)
    buffer = client.get_buffers(plasma.ObjectID(bytes.fromhex(held)))
    target = client.create(plasma.ObjectID(bytes.fromhex(unsealed)), 1000)
    print("holds", flush=True)
    if sys.stdin.readline() == "disconnect\\n":
        client.disconnect()
        print("disconnected", flush=True)
        sys.stdin.readline()
"""


def holder(
    store: plasma.Store, held: plasma.ObjectID, unsealed: plasma.ObjectID | None = None
) -> Child:
    """Return a process that holds an object and writes another one."""
    ids = [object_id.binary().hex() for object_id in (held, unsealed or new_id())]
    child = Child(HOLDER, store.store_socket_name, *ids)
    assert child.hear() == "holds"
    return child


def test_the_death_of_a_client(store: plasma.Store, client: plasma.PlasmaClient) -> None:
    """What it had not sealed is aborted, what it held is released."""
    held, unsealed = client.put_raw_buffer(bytes(100)), new_id()
    with holder(store, held, unsealed) as child:
        assert client.list()[held]["ref_count"] == 1
        assert client.list()[unsealed]["state"] == "created"
        assert client.evict(10**9) == 0
        child.kill()
        until(lambda: unsealed not in client.list(), "the unsealed object has gone")
        assert client.list()[held]["ref_count"] == 0
        client.put_raw_buffer(b"anew", unsealed)
        assert client.evict(10**9) == 104


def test_a_disconnected_client(store: plasma.Store, client: plasma.PlasmaClient) -> None:
    """What it had not sealed goes at once; the buffers that it keeps stay valid, hence held."""
    held, unsealed = client.put_raw_buffer(bytes(100)), new_id()
    with holder(store, held, unsealed) as child:
        child.say("disconnect")
        assert child.hear() == "disconnected"
        assert unsealed not in client.list()
        assert client.evict(10**9) == 0
        child.say()
        assert child.end() == 0
        until(lambda: client.evict(10**9) == 100, "the object is released")


# --- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (plasma.PlasmaObjectExists, (ArrowException,)),
        (plasma.PlasmaObjectNotFound, (ArrowException,)),
        (plasma.PlasmaStoreFull, (ArrowException,)),
        (plasma.PlasmaObjectAlreadySealed, (ArrowTypeError, ArrowException, TypeError)),
        (plasma.NotConnectedError, (OSError, ConnectionError)),
    ],
)
def test_the_bases_of_errors(error: type[Exception], bases: tuple[type[Exception], ...]) -> None:
    """Code that catches Plasma's errors, or Arrow's, catches ours; all have our root."""
    for base in (*bases, plasma.ShmPlasmaError):
        assert issubclass(error, base)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    "store_it",
    [
        lambda client, object_id: client.create(object_id, 5),
        lambda client, object_id: client.create_and_seal(object_id, b"other"),
        lambda client, object_id: client.put_raw_buffer(b"other", object_id),
        lambda client, object_id: client.put("other", object_id),
        lambda client, object_id: client.create_array(object_id, 5),
    ],
    ids=["create", "create_and_seal", "put_raw_buffer", "put", "create_array"],
)
def test_an_id_that_exists(
    client: plasma.PlasmaClient,
    client2: plasma.PlasmaClient,
    store_it: Callable[[plasma.PlasmaClient, plasma.ObjectID], object],
    sealed: bool,
) -> None:
    """Whoever stores under a taken id is refused, sealed or not, and the first object stays as it was."""
    object_id = new_id()
    target = client.create(object_id, 5)
    fill(target, b"first")
    if sealed:
        client.seal(object_id)
    for each in (client, client2):
        with pytest.raises(plasma.PlasmaObjectExists, match=object_id.binary().hex()):
            store_it(each, object_id)
    if not sealed:
        client.seal(object_id)
    assert bytes(client2.get_buffers(object_id)) == b"first"


@pytest.mark.parametrize(
    "store_it",
    [
        lambda client, object_id, size: client.create(object_id, size),
        lambda client, object_id, size: client.create_and_seal(object_id, bytes(size)),
        lambda client, object_id, size: client.put_raw_buffer(bytes(size), object_id),
        lambda client, object_id, size: client.put(bytes(size), object_id),
        lambda client, object_id, size: client.create_array(object_id, size, np.uint8),
    ],
    ids=["create", "create_and_seal", "put_raw_buffer", "put", "create_array"],
)
def test_a_full_store(store_it: Callable[[plasma.PlasmaClient, plasma.ObjectID, int], Any]) -> None:
    """Without room a store refuses, evicting nothing in vain; the id is free afterwards."""
    with plasma.Store(10**6) as store, store.connect() as client:
        pinned = client.get_buffers(client.put_raw_buffer(bytes(600_000)))
        bystander = client.put_raw_buffer(bytes(100_000))
        object_id = new_id()
        with pytest.raises(plasma.PlasmaStoreFull) as caught:
            store_it(client, object_id, 500_000)
        assert caught.value.requested_bytes >= 500_000
        assert caught.value.pinned_bytes == 600_000
        assert client.contains(bystander)
        assert object_id not in client.list()
        del pinned
        store_it(client, object_id, 500_000)


def test_sealing_twice(client: plasma.PlasmaClient, client2: plasma.PlasmaClient) -> None:
    """While the buffer is held a second seal is a TypeError that is Arrow's; afterwards it is not found."""
    object_id = new_id()
    buffer = client.create(object_id, 10)
    client.seal(object_id)
    with pytest.raises(TypeError, match="sealed already") as caught:
        client.seal(object_id)
    assert isinstance(caught.value, ArrowException)
    with pytest.raises(plasma.PlasmaObjectNotFound):
        client2.seal(object_id)
    del buffer
    with pytest.raises(plasma.PlasmaObjectNotFound):
        client.seal(object_id)
    assert client.contains(object_id)


def test_what_cannot_be_sealed(client: plasma.PlasmaClient, client2: plasma.PlasmaClient) -> None:
    """Unknown and foreign objects are not found; nor are those that were put, as nobody holds them."""
    unsealed = new_id()
    buffer = client2.create(unsealed, 10)
    for object_id in (MISSING, unsealed, client.put(1), client2.put(2)):
        with pytest.raises(plasma.PlasmaObjectNotFound):
            client.seal(object_id)
    client2.seal(unsealed)
    del buffer


def test_what_has_no_hash(client: plasma.PlasmaClient) -> None:
    """A missing object has no hash, nor has one that is not sealed, even one's own."""
    unsealed = new_id()
    buffer = client.create(unsealed, 10)
    for object_id in (MISSING, unsealed):
        with pytest.raises(plasma.PlasmaObjectNotFound):
            client.hash(object_id)
    del buffer


def test_no_store_at_the_path(tmp_path: Path) -> None:
    """With `num_retries=0` the absence of a store is an OSError at once, naming path and remedy."""
    path = str(tmp_path / "nobody")
    with pytest.raises(OSError, match=rf"{path}.*shmplasma-store"):
        plasma.connect(path, num_retries=0)
    with pytest.raises(OSError, match=path):
        plasma.connect(path, 2)


def test_how_long_connect_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default a client tries for 8 seconds."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(OSError, match="nobody"):
        plasma.connect(str(tmp_path / "nobody"))
    assert sum(slept) == pytest.approx(8)


def test_a_store_that_comes_late(tmp_path: Path) -> None:
    """A client that tries again finds the store which has started meanwhile."""
    path = str(tmp_path / "s")
    clients: list[plasma.PlasmaClient] = []
    thread = threading.Thread(target=lambda: clients.append(plasma.connect(path, 600)))
    thread.start()
    with plasma.Store(10**6, socket=path):
        thread.join()
        assert clients[0].store_capacity() == 10**6
        clients.pop().disconnect()


USES: dict[str, Callable[[plasma.PlasmaClient], object]] = {
    "create": lambda client: client.create(new_id(), 10),
    "create_and_seal": lambda client: client.create_and_seal(new_id(), b"1"),
    "create_array": lambda client: client.create_array(new_id(), 10),
    "seal": lambda client: client.seal(MISSING),
    "abort": lambda client: client.abort(MISSING),
    "get_buffers": lambda client: client.get_buffers([MISSING]),
    "get_buffers, timed": lambda client: client.get_buffers([MISSING], 5),
    "get_metadata": lambda client: client.get_metadata([MISSING]),
    "put_raw_buffer": lambda client: client.put_raw_buffer(b"1", new_id()),
    "put": lambda client: client.put(1, new_id()),
    "get": lambda client: client.get(MISSING),
    "get, at once": lambda client: client.get([MISSING], 0),
    "contains": lambda client: client.contains(MISSING),
    "hash": lambda client: client.hash(MISSING),
    "evict": lambda client: client.evict(1),
    "delete": lambda client: client.delete([MISSING]),
    "list": lambda client: client.list(),
    "subscribe": lambda client: client.subscribe(),
    "set_client_options": lambda client: client.set_client_options("name", 5),
    "debug_string": lambda client: client.debug_string(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_after_disconnect(
    store: plasma.Store, use: Callable[[plasma.PlasmaClient], object]
) -> None:
    """A disconnected client refuses everything with an OSError."""
    client = store.connect()
    client.disconnect()
    with pytest.raises(OSError, match="disconnected"):
        use(client)


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_the_store_has_gone(how: str) -> None:
    """When the store has gone, everything that needs it is an OSError, now and later."""
    with plasma.Store(10**6) as store:
        client = plasma.connect(store.store_socket_name, 1)
        getattr(store.process, how)()
        store.process.wait()
        for use in USES.values():
            with pytest.raises(OSError):  # noqa: PT011 - the text may be the system's
                use(client)
        client.disconnect()


def test_a_get_that_waits_when_the_store_goes() -> None:
    """A get that is waiting ends with an OSError when the store does."""
    with plasma.Store(10**6) as store, store.connect() as client:
        caught: list[BaseException] = []

        def wait() -> None:
            try:
                client.get(MISSING)
            except OSError as error:
                caught.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        store.process.terminate()
        thread.join()
        assert caught


def test_notifications_without_a_subscription(client: plasma.PlasmaClient) -> None:
    """They are an OSError, their socket a ValueError."""
    with pytest.raises(OSError, match="subscribe"):
        client.get_next_notification()
    with pytest.raises(ValueError, match="subscribe"):
        client.get_notification_socket()


WRONG: dict[str, Callable[[Any], object]] = {
    "create: bytes": lambda client: client.create(20 * b"a", 10),
    "create: None": lambda client: client.create(None, 10),
    "create: size": lambda client: client.create(new_id(), "10"),
    "create: metadata array": lambda client: client.create(new_id(), 10, np.zeros(3, np.uint8)),
    "create: metadata": lambda client: client.create(new_id(), 10, "text"),
    "create: no metadata": lambda client: client.create(new_id(), 10, None),
    "create_and_seal: id": lambda client: client.create_and_seal("a", b"1"),
    "create_and_seal: None": lambda client: client.create_and_seal(None, b"1"),
    "create_and_seal: data": lambda client: client.create_and_seal(new_id(), 5),
    "create_and_seal: metadata": lambda client: client.create_and_seal(new_id(), b"1", 5),
    "seal": lambda client: client.seal(20 * b"a"),
    "seal: None": lambda client: client.seal(None),
    "abort": lambda client: client.abort([MISSING]),
    "get_buffers: bytes": lambda client: client.get_buffers([20 * b"a"]),
    "get_buffers: None": lambda client: client.get_buffers(None),
    "get_buffers: text": lambda client: client.get_buffers("text", 0),
    "get_buffers: timeout": lambda client: client.get_buffers([MISSING], "5"),
    "get_buffers: timeout of one that is there": lambda client: there(client, "get_buffers", "5"),
    "get: timeout of one that is there": lambda client: there(client, "get", "5"),
    "get: context": lambda client: there(client, "get", -1, 5),
    "put: threads": lambda client: client.put(1, None, "x"),
    "put: context": lambda client: client.put(1, None, 6, 5),
    "put_raw_buffer: threads": lambda client: client.put_raw_buffer(b"1", None, b"", "x"),
    "put_raw_buffer: addresses": lambda client: client.put_raw_buffer(np.array([object()])),
    "put_raw_buffer: strided addresses": lambda client: client.put_raw_buffer(
        np.array([{}, 1])[::2]
    ),
    "get_buffers: meta": lambda client: client.get_buffers([5], with_meta=True),
    "get_metadata": lambda client: client.get_metadata([None], 0),
    "put_raw_buffer: int": lambda client: client.put_raw_buffer(5),
    "put_raw_buffer: str": lambda client: client.put_raw_buffer("text"),
    "put_raw_buffer: id": lambda client: client.put_raw_buffer(b"1", 20 * b"a"),
    "put_raw_buffer: metadata": lambda client: client.put_raw_buffer(b"1", metadata="text"),
    "put: id": lambda client: client.put(1, 20 * b"a"),
    "get: bytes": lambda client: client.get(20 * b"a"),
    "get: a set": lambda client: client.get({MISSING}),
    "get: None": lambda client: client.get([None]),
    "contains": lambda client: client.contains(20 * b"a"),
    "contains: None": lambda client: client.contains(None),
    "hash": lambda client: client.hash("a"),
    "evict": lambda client: client.evict("1"),
    "evict: None": lambda client: client.evict(None),
    "delete: bytes": lambda client: client.delete([20 * b"a"]),
    "delete: None": lambda client: client.delete(None),
    "set_client_options: name": lambda client: client.set_client_options(5, 5),
    "set_client_options: limit": lambda client: client.set_client_options("name", "5"),
    "decode_notifications": lambda client: client.decode_notifications("text"),
    "decode_notifications: as long as one": lambda client: client.decode_notifications(36 * "a"),
    "connect: bytes": lambda _: plasma.connect(MISSING, 0),  # type: ignore[arg-type]  # the point
}


@pytest.mark.parametrize("use", WRONG.values(), ids=WRONG)
def test_wrong_types(client: plasma.PlasmaClient, use: Callable[[Any], object]) -> None:
    """An argument of a wrong type is a TypeError, and changes nothing."""
    with pytest.raises(TypeError):
        use(client)
    assert not client.list()
    assert client.get(client.put("works on")) == "works on"


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (
            lambda client: client.get(20 * b"a"),
            r"an ObjectID is needed here, not int; ObjectID\(data\) makes one of 20 bytes",
        ),
        (
            lambda client: client.create(new_id(), "5"),
            "a number of bytes is needed here, not str",
        ),
        (
            lambda client: client.put(1, None, "x"),
            "a number of threads is needed here, not str",
        ),
        (
            lambda client: client.put_raw_buffer("text"),
            "bytes or a buffer of them are needed here, not str; put takes any value",
        ),
        (
            lambda client: plasma.connect(client.store_socket_name, "3"),  # type: ignore[arg-type]  # the point
            "num_retries is a number, not str",
        ),
    ],
)
def test_what_is_said_of_wrong_types(
    client: plasma.PlasmaClient, use: Callable[[Any], object], said: str
) -> None:
    """The error says what is needed, and not what Python could not do with the argument."""
    with pytest.raises(TypeError, match=f"^{said}$"):
        use(client)


@pytest.mark.parametrize("size", [10.0, np.ceil(9.5), np.float32(10.9), np.int64(10)])
def test_sizes_that_are_floats(client: plasma.PlasmaClient, size: Any) -> None:
    """What is behind the point does not count; a number that is none is refused."""
    object_id = new_id()
    assert client.create(object_id, size).size == 10
    client.seal(object_id)
    assert client.evict(size) == 10
    client.set_client_options("name", size)
    for wrong in (float("nan"), float("inf")):
        for use in (lambda n: client.create(new_id(), n), client.evict):
            with pytest.raises(ValueError, match=r"no (nan|inf) bytes"):
                use(wrong)
    assert not client.list()


@pytest.mark.parametrize("threads", [2.5, np.float32(1.0), 0.5, np.int64(3), True])
def test_threads_that_are_floats(client: plasma.PlasmaClient, threads: Any) -> None:
    """As half of the processors may be; a number that is none is refused, and nothing is stored."""
    value = np.arange(500_000)
    assert np.array_equal(client.get(client.put(value, memcopy_threads=threads)), value)
    object_id = client.put_raw_buffer(value, memcopy_threads=threads)
    assert client.get_buffers([object_id])[0].to_pybytes() == value.tobytes()
    client.evict(client.store_capacity())
    for wrong in (float("nan"), float("inf")):
        for put in (client.put, client.put_raw_buffer):
            with pytest.raises(ValueError, match=r"no (nan|inf) threads"):
                put(b"1", memcopy_threads=wrong)
    assert not client.list()


def test_errors_are_made_as_plasmas(client: plasma.PlasmaClient) -> None:
    """By hand, without an argument; and what fails to be pickled is one of Arrow's errors of that kind, too."""
    for cls in (plasma.PlasmaStoreFull, plasma.PlasmaObjectExists, plasma.PlasmaObjectNotFound):
        with pytest.raises(cls):
            raise cls
    with pytest.raises(ArrowSerializationError):
        client.put(threading.Lock())
    context = plasma.SerializationContext()
    context.register_type(Path, "Path", custom_serializer=str, custom_deserializer=Path)
    object_id = client.put(Path("x"), serialization_context=context)
    with pytest.raises(ArrowSerializationError):
        client.get(object_id)


@pytest.mark.parametrize("type_", [type(lambda: 0), type, int, dict, list, str, type(None)])
def test_types_that_are_pickled_anyway(type_: type) -> None:
    """They can be registered to be pickled, as Plasma's users did, and in no other way."""
    context = plasma.SerializationContext()
    context.register_type(type_, "name", pickle=True)
    with pytest.raises(ValueError, match="stored natively"):
        context.register_type(type_, "name", custom_serializer=str)


@pytest.mark.parametrize("name", ["SparseCOOTensor", "SparseCSRMatrix", "SparseCSCMatrix"])
def test_sparse_tensors(client: plasma.PlasmaClient, name: str) -> None:
    """Arrow's own, alone and in a value, with the names of their dimensions; their numbers lie in the store."""
    dense = np.zeros((40, 50))
    dense[::3, ::2] = np.arange(14 * 25).reshape(14, 25)
    sparse: Any = getattr(pa, name).from_dense_numpy(dense, dim_names=["a", "b"])
    object_id, inside = client.put(sparse), client.put({"x": sparse})
    for got in (client.get(object_id), client.get(inside)["x"]):
        assert type(got) is type(sparse)
        assert got.equals(sparse)
        assert got.dim_names == sparse.dim_names
        assert np.array_equal(got.to_tensor().to_numpy(), dense)
    assert client.list()[object_id]["ref_count"] == 0
    kept = client.get(object_id)
    assert client.list()[object_id]["ref_count"] == 1
    del kept


def test_what_was_never_sealed(client: plasma.PlasmaClient) -> None:
    """Errors say that it is to be sealed or aborted; whoever seals again is not told to create it."""
    object_id = new_id()
    client.create(object_id, 100)
    client.delete([object_id])
    with pytest.raises(plasma.PlasmaObjectExists, match="never sealed, its writer can abort it"):
        client.create(object_id, 100)
    rest = client.create(new_id(), client.store_capacity() - 10_000)
    with pytest.raises(plasma.PlasmaStoreFull, match="seal or abort what is being written"):
        client.create(new_id(), 100_000)
    del rest
    client.abort(object_id)
    client.create(object_id, 100)
    client.seal(object_id)
    with pytest.raises(plasma.PlasmaObjectNotFound, match="it is sealed already"):
        client.seal(object_id)


def there(client: Any, method: str, *arguments: object) -> None:
    """Call a method for an object that is there, and delete that."""
    object_id = client.put(1)
    try:
        getattr(client, method)([object_id], *arguments)
    finally:
        client.delete([object_id])


def test_wrong_ids_after_right_ones(client: plasma.PlasmaClient) -> None:
    """A wrong id among right ones is a TypeError, and pins nothing."""
    right = client.put_raw_buffer(b"1")
    ids: Any = [right, None, right]
    for use in (client.get_buffers, client.get_metadata, client.get, client.delete):
        with pytest.raises(TypeError):
            use(ids)
    gc.collect()
    assert client.list()[right]["ref_count"] == 0
