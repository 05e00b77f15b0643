"""A store that is full, with real processes: waiting for room, what an error says, and quotas."""

from __future__ import annotations

import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import shmplasma as plasma
from shmplasma import ObjectID, PlasmaClient, PlasmaStoreFull, Store
from shmplasma.protocol import Frame
from shmplasma.requests import Create, decode_request
from tests.clients import figure, new_id
from tests.command import killed, running
from tests.integration.test_fast_path import sent  # noqa: F401 - a fixture
from tests.processes import Child, until

MB = 1_000_000
WAITING = "requests that wait for room"

_WAITER = """
    import sys
    import shmplasma as plasma

    client = plasma.connect(sys.argv[1])
    client.set_client_options("waiter", 0)
    print("connected", flush=True)
    try:
        client.put(bytes(int(sys.argv[2])), timeout_ms=-1)
        print("put", flush=True)
    except KeyboardInterrupt:
        print("interrupted", len(client.list()), flush=True)
    sys.stdin.readline()
"""


def wait_for_waiters(client: PlasmaClient, count: int) -> None:
    """Wait until so many requests wait for room."""
    until(lambda: figure(client, WAITING) == count, f"{count} requests wait for room")


@pytest.fixture
def hold(client: PlasmaClient) -> Iterator[list[object]]:
    """Hold buffers over nearly all of the store, until the list is emptied."""
    object_id = client.put_raw_buffer(bytes(95 * MB))
    held: list[object] = client.get_buffers([object_id])
    yield held
    held.clear()


def test_a_put_waits_until_others_let_go(
    client: PlasmaClient, client2: PlasmaClient, hold: list[object]
) -> None:
    """It blocks its own thread alone: others use the client meanwhile."""
    stored: list[ObjectID] = []

    def put() -> None:
        stored.append(client2.put(np.zeros(10 * MB, np.uint8), timeout_ms=None))

    thread = threading.Thread(target=put)
    thread.start()
    wait_for_waiters(client, 1)
    small = client2.put("small")
    assert client2.get(small) == "small"
    assert not stored
    hold.clear()
    thread.join()
    assert client.get(stored[0]).nbytes == 10 * MB


def test_each_way_to_store_may_wait(client: PlasmaClient, hold: list[object]) -> None:
    """All of them take a timeout, which is none by default; a number that is none is refused."""
    for timeout in ({}, {"timeout_ms": 0}, {"timeout_ms": 5}, {"timeout_ms": np.float32(2.5)}):
        for store in (
            lambda t: client.create(new_id(), 10 * MB, **t),
            lambda t: client.create_array(new_id(), 10 * MB, np.uint8, **t),
            lambda t: client.create_and_seal(new_id(), bytes(10 * MB), **t),
            lambda t: client.put_raw_buffer(bytes(10 * MB), **t),
            lambda t: client.put(bytes(10 * MB), **t),
        ):
            with pytest.raises(PlasmaStoreFull):
                store(timeout)
    with pytest.raises(ValueError, match="not a number"):
        client.create(new_id(), 1, timeout_ms=float("nan"))
    for refused in (client.put, client.put_raw_buffer, client.put_ref):
        with pytest.raises(TypeError, match="timeout_ms is a number or None, not str"):
            refused(b"1", timeout_ms="1")  # type: ignore[arg-type] # which is the test
    with pytest.raises(TypeError):
        client.create(new_id(), 1, timeout_ms="1")  # type: ignore[arg-type] # which is the test
    assert figure(client, WAITING) == 0
    assert hold


def test_small_puts_wait_as_well(client: PlasmaClient, client2: PlasmaClient) -> None:
    """Where no lease is to be had a small put goes by the store, and waits like any other."""
    object_id = client.put_raw_buffer(bytes(100 * MB))
    held = client.get_buffers([object_id])
    with pytest.raises(PlasmaStoreFull):
        client2.put("small", timeout_ms=1)
    thread = threading.Thread(target=lambda: client2.put("small", timeout_ms=-1))
    thread.start()
    wait_for_waiters(client, 1)
    held.clear()
    thread.join()


def test_ctrl_c_interrupts_a_wait(store: Store, client: PlasmaClient, hold: list[object]) -> None:
    """The client leaves the queue, gets nothing, and goes on."""
    with Child(_WAITER, store.store_socket_name, str(20 * MB)) as child:
        assert child.hear() == "connected"
        wait_for_waiters(client, 1)
        child.process.send_signal(signal.SIGINT)
        assert child.hear() == "interrupted 1"
        wait_for_waiters(client, 0)
        hold.clear()
        client.put_raw_buffer(bytes(95 * MB))
        child.say()
        assert child.end() == 0


def test_a_waiter_that_is_killed_leaves_the_queue(
    store: Store, client: PlasmaClient, hold: list[object]
) -> None:
    """What it waited for goes to the one behind it."""
    arguments = store.store_socket_name, str(99 * MB)
    with Child(_WAITER, *arguments) as first:
        wait_for_waiters(client, 1)
        with Child(_WAITER, *arguments) as second:
            assert second.hear() == "connected"
            wait_for_waiters(client, 2)
            first.kill()
            wait_for_waiters(client, 1)
            hold.clear()
            assert second.hear() == "put"


def test_a_waiter_goes_on_with_the_next_store(tmp_path: Path) -> None:
    """Its store is killed while it waits: it joins the queue of the one that takes its place."""
    path = str(tmp_path / "socket")
    first = Store("100MB", socket=path)
    client = plasma.connect(path)
    held = client.get_buffers([client.put_raw_buffer(bytes(95 * MB))])
    with Child(_WAITER, path, str(20 * MB)) as child:
        assert child.hear() == "connected"
        wait_for_waiters(client, 1)
        first.process.kill()
        first.process.wait()
        with Store("100MB", socket=path):
            wait_for_waiters(client, 1)
            held.clear()
            assert child.hear() == "put"
            child.say()
            assert child.end() == 0
            client.disconnect()
    first.close()


def test_a_waiter_goes_on_for_what_is_left_of_its_time(
    tmp_path: Path,
    sent: list[Frame],  # noqa: F811
) -> None:
    """The next store is not asked to let it wait for all of it once more."""
    path, key = str(tmp_path / "s"), new_id()
    with killed("-m", "1MB", "-s", path):
        client = plasma.connect(path)
        held = client.get_buffers([client.put_raw_buffer(bytes(900_000))])
        thread = threading.Thread(
            target=client.put_raw_buffer, args=(bytes(500_000), key), kwargs={"timeout_ms": 60_000}
        )
        thread.start()
        wait_for_waiters(client, 1)
    with running("-s", path), client:
        wait_for_waiters(client, 1)
        held.clear()
        thread.join()
        assert client.contains(key)
    asked = [decode_request(frame) for frame in sent if frame.kind == Create.KIND]
    first, second = (
        each.timeout_ns
        for each in asked
        if isinstance(each, Create) and each.object_id == key.id_bytes
    )
    assert 0 < second < first


def test_waiting_without_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that has no barrier looks again now and then."""
    monkeypatch.setenv("SHMPLASMA_FAST_PATH", "0")
    with Store("100MB") as store, store.connect() as client:
        held = client.get_buffers([client.put_raw_buffer(bytes(95 * MB))])
        with Child(_WAITER, store.store_socket_name, str(20 * MB)) as child:
            assert child.hear() == "connected"
            wait_for_waiters(client, 1)
            held.clear()
            assert child.hear() == "put"
            child.kill()


# -- what an error says ----------------------------------------------------------------------------

_HOLDER = """
    import pickle
    import sys
    import shmplasma as plasma

    client = plasma.connect(sys.argv[1])
    client.set_client_options("the one that holds", 0)
    created = client.create(plasma.ObjectID(bytes(20)), 30_000_000)
    held = client.get_buffers([client.put_raw_buffer(bytes(60_000_000))])
    print("holds", flush=True)
    sys.stdin.readline()
    try:
        client.put(bytes(50_000_000))
    except plasma.PlasmaStoreFull as error:
        print(pickle.dumps(error).hex(), flush=True)
    sys.stdin.readline()
"""


def check_error(error: PlasmaStoreFull, pid: int) -> None:
    """See that an error says who holds what."""
    assert error.requested_bytes >= 50 * MB
    assert (error.pinned_bytes, error.unsealed_bytes) == (90 * MB, 30 * MB)
    assert error.free_bytes < 10 * MB
    assert 0 < error.largest_bytes <= error.free_bytes
    assert (error.kept_bytes, error.spillable_bytes) == (1000, 1000)
    assert (error.limit_bytes, error.held_bytes) == (0, 0)
    assert error.leased_bytes >= 0
    (holder,) = error.holders
    assert holder.name == "the one that holds"
    assert holder.held_bytes == 90 * MB
    assert holder.age_seconds >= 0
    if sys.platform == "linux":
        assert holder.pid == pid
        assert "-W error " in holder.command
        assert f"the one that holds (pid {pid}, " in str(error)
    for figure_ in (error.requested_bytes, error.free_bytes, 90 * MB, 30 * MB):
        assert f" {figure_} " in str(error)


def test_an_error_says_who_holds_what(store: Store, client: PlasmaClient) -> None:
    """With the figures of the store and the process that has most; also when it comes out of a pickle."""
    client.put_raw_buffer(bytes(1000), keep=True)
    with Child(_HOLDER, store.store_socket_name) as child:
        assert child.hear() == "holds"
        with pytest.raises(PlasmaStoreFull) as caught:
            client.put(bytes(50 * MB))
        check_error(caught.value, child.process.pid)
        child.say()
        remote = pickle.loads(bytes.fromhex(child.hear()))
        assert type(remote) is PlasmaStoreFull
        check_error(remote, child.process.pid)
        child.kill()


def test_when_everything_is_kept_the_error_says_so(client: PlasmaClient) -> None:
    """Nothing is dropped for a new object, and the kept bytes are told."""
    kept = [client.put_raw_buffer(bytes(10 * MB), keep=True) for _ in range(9)]
    with pytest.raises(PlasmaStoreFull, match="90000000 are kept") as caught:
        client.put_raw_buffer(bytes(11 * MB))
    assert caught.value.kept_bytes == caught.value.spillable_bytes == 90 * MB
    assert caught.value.holders == ()
    assert all(client.contains(object_id) for object_id in kept)
    client.cache(kept[-1])
    client.put_raw_buffer(bytes(11 * MB))
    assert [object_id for object_id in kept if not client.contains(object_id)] == kept[-1:]


# -- quotas ----------------------------------------------------------------------------------------


def test_a_default_limit_of_the_server() -> None:
    """It counts pins and unsealed objects, each once; what is put and let go of is free again."""
    with Store("100MB", client_limit="1MB") as store, store.connect() as client:
        for _ in range(100):
            client.put("small")
            client.put_raw_buffer(bytes(100_000))
        held = [client.create(new_id(), 400_000)]
        stored = client.put_raw_buffer(bytes(400_000))
        held += client.get_buffers([stored, stored])
        with pytest.raises(PlasmaStoreFull) as caught:
            client.put_raw_buffer(bytes(200_001), timeout_ms=-1)
        error = caught.value
        assert (error.limit_bytes, error.held_bytes) == (MB, 800_000)
        assert error.requested_bytes == 200_001
        assert "1000000 bytes, holds 800000, and asks for 200001 more" in str(error)
        client.set_client_options("greedy", 2 * MB)
        client.put_raw_buffer(bytes(200_001))
        client.set_client_options("greedy", 0)
        held.clear()
        with pytest.raises(PlasmaStoreFull):
            client.put_raw_buffer(bytes(MB + 1))
