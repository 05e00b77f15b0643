"""Objects under ids that their creators choose: whoever creates them, and whatever becomes of him, one of them gets the id."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from secrets import token_bytes
from textwrap import dedent
from typing import Any
from zlib import crc32

import numpy as np
import pytest

import shmplasma as plasma
from shmplasma import ObjectID, PlasmaClient, Store, system
from shmplasma.layout import ID_BYTES
from shmplasma.lock_file import LockFile
from shmplasma.outbox import Outbox
from shmplasma.protocol import Frame
from shmplasma.requests import Create
from tests.clients import new_id
from tests.command import killed, running
from tests.integration.test_fast_path import (  # noqa: F401 - a fixture
    kinds,
    needs_fast_path,
    sent,
    session_of,
    stopped,
)
from tests.processes import INTERRUPTER, Child, in_forked_child, until

pytestmark = needs_fast_path

N_IDS = 500
N_CREATORS = 4


def nth_id(number: int) -> ObjectID:
    """Return an id that all processes know."""
    return ObjectID(number.to_bytes(ID_BYTES, "big"))


def lease(client: PlasmaClient) -> None:
    """Let a client have a lease."""
    client.put(0)
    client.flush()


def exists_for(client: PlasmaClient, object_id: ObjectID) -> bool:
    """Tell whether a client is told that it cannot create this object."""
    try:
        client.create(object_id, 10)
    except plasma.PlasmaObjectExists:
        return True
    return False


# -- ids that nobody chose -------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("by_another", [False, True])
def test_what_was_put_is_there_for_who_creates_at_once(
    client: PlasmaClient, client2: PlasmaClient, by_another: bool, keep: bool
) -> None:
    """An id that `put` or `put_ref` has returned is taken, for whoever knows it, however soon he uses it."""
    lease(client)
    lease(client2)
    creator = client2 if by_another else client
    for number in range(50):
        object_id = client.put(number)
        with pytest.raises(plasma.PlasmaObjectExists):
            creator.put(-1, object_id, keep=keep)
        assert client2.get(object_id) == number
        object_id = client.put_raw_buffer(b"first")
        assert exists_for(creator, object_id)
        with pytest.raises(plasma.PlasmaObjectExists):
            creator.create_and_seal(object_id, bytes(3_000_000), keep=keep)
        assert bytes(client2.get_buffers(object_id)) == b"first"
    ref = client.put_ref("owned")
    assert exists_for(creator, ref.object_id)


def test_an_id_that_nobody_chose_can_be_used_again(
    client: PlasmaClient, client2: PlasmaClient
) -> None:
    """When its object was deleted, anybody may create another one under it."""
    object_id = client.put("first")
    client.delete([object_id])
    client2.put("second", object_id)
    assert client.get(object_id) == "second"


# -- what waits for nothing ----------------------------------------------------------------------


def test_creations_wait_for_nothing(
    store: Store, client: PlasmaClient, client2: PlasmaClient
) -> None:
    """While the store is stopped objects are created, filled, sealed, and put under chosen ids; they are found later."""
    lease(client)
    created, named, value, filled = new_id(), new_id(), new_id(), new_id()
    with stopped(store):
        buffer = client.create(created, 100, b"metadata")
        np.frombuffer(memoryview(buffer), np.uint8)[:] = 7
        client.seal(created)
        client.put_raw_buffer(b"raw", named, b"more")
        client.put([1, 2], value)
        with client.create_array(filled, 5, np.int64) as array:
            array[:] = range(5)
        del buffer, array
    ((metadata, data),) = client2.get_buffers([created], with_meta=True)
    assert (metadata, set(bytes(data))) == (b"metadata", {7})
    ((metadata, data),) = client2.get_buffers([named], with_meta=True)
    assert (metadata, bytes(data)) == (b"more", b"raw")
    assert client2.get(value) == [1, 2]
    assert client2.get(filled).tolist() == list(range(5))


def test_what_goes_by_the_store(client: PlasmaClient, sent: list[Frame]) -> None:  # noqa: F811
    """What is to be kept, has no bytes, or is large, is created by a message."""
    lease(client)
    sent.clear()
    for number, (size, keep) in enumerate([(10, True), (0, False), (1 << 20, False)]):
        client.create(nth_id(number), size, keep=keep)
        assert kinds(sent)[-1] == Create.KIND
        client.seal(nth_id(number))
    assert kinds(sent).count(Create.KIND) == 3


def test_a_removed_name_takes_claims_from_nobody() -> None:
    """Who connects after somebody has removed the segment's name is served, and creates without waiting as well."""
    with Store("10MB") as store, store.connect() as client:
        object_id = client.put("there before")
        os.unlink(os.readlink(f"/proc/self/fd/{session_of(client).attachment._fd}"))
        with store.connect() as late:
            assert late.get(object_id) == "there before"
            lease(late)
            with stopped(store):
                late.put("there", nth_id(1))
            assert exists_for(client, nth_id(1))
            assert client.get(nth_id(1)) == "there"
        store.close()
        assert store.process.returncode == 0


# -- who gets the id -----------------------------------------------------------------------------


def test_an_id_is_taken_before_the_store_knows(
    store: Store, client: PlasmaClient, client2: PlasmaClient
) -> None:
    """Whoever creates an object again is told that it exists, sealed or not, and as often as he tries."""
    lease(client)
    lease(client2)
    with stopped(store):
        for number in range(10):
            client.create(nth_id(number), 10)
            if number % 2:
                client.seal(nth_id(number))
    for number in range(10):
        assert exists_for(client2 if number % 3 else client, nth_id(number))
    for number in range(10, 300):
        client.create(nth_id(number), 10)
        assert exists_for(client, nth_id(number))
        assert exists_for(client2, nth_id(number))
        client.seal(nth_id(number))
        assert exists_for(client, nth_id(number))


def test_an_id_is_used_again_and_again(client: PlasmaClient, client2: PlasmaClient) -> None:
    """By the same client or by another one: deleted is free, aborted is free."""
    key = new_id()
    for number in range(200):
        one, other = (client, client2) if number % 3 else (client2, client)
        one.put(number, key)
        assert other.get(key) == number
        assert exists_for(other, key)
        other.delete([key])
        other.create(key, 100)
        other.abort(key)


def test_threads_of_a_client_race(client: PlasmaClient) -> None:
    """One of them gets each id."""

    def create_all(_: int) -> int:
        return sum(not exists_for(client, nth_id(number)) for number in range(N_IDS))

    with ThreadPoolExecutor(4) as threads:
        created = list(threads.map(create_all, range(4)))
    assert sum(created) == N_IDS
    for number in range(N_IDS):
        client.seal(nth_id(number))


def race(path: str, number: int, start: Connection) -> None:
    """Create all objects, as fast as possible, with this process's number in them; tell which were granted."""
    with plasma.connect(path) as client, start:
        lease(client)
        start.send("ready")
        start.recv()
        granted = []
        for each in range(N_IDS):
            try:
                if (each + number) % 2:
                    client.put(number, nth_id(each))
                else:
                    data = client.create(nth_id(each), 100, b"raw")
                    np.frombuffer(memoryview(data), np.uint8)[:] = number
                    client.seal(nth_id(each))
            except plasma.PlasmaObjectExists:
                continue
            granted.append(each)
        start.send(granted)


@pytest.mark.usefixtures("spawning")
def test_processes_race(store: Store, client: PlasmaClient) -> None:
    """One of them gets each id, and it is his object that is there."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for number in range(N_CREATORS):
        ours, theirs = context.Pipe()
        process = context.Process(target=race, args=(store.store_socket_name, number, theirs))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        assert pipe.recv() == "ready"
    for pipe in pipes:
        pipe.send("go")
    granted = [pipe.recv() for pipe in pipes]
    for pipe, process in zip(pipes, processes, strict=True):
        process.join()
        pipe.close()
    assert Counter(each for ids in granted for each in ids) == Counter(range(N_IDS))
    for number, ids in enumerate(granted):
        for each in ids:
            ((metadata, data),) = client.get_buffers([nth_id(each)], with_meta=True)
            content = bytes(data)[0] if metadata == b"raw" else client.get(nth_id(each))
            assert content == number
            del data


def test_ids_with_the_same_hash(client: PlasmaClient, client2: PlasmaClient) -> None:
    """They have one lock, and are two ids."""
    seen: dict[int, bytes] = {}
    while True:
        one = token_bytes(ID_BYTES)
        other = seen.setdefault(crc32(one), one)
        if one != other:
            break
    lease(client)
    client.put(1, ObjectID(one))
    client2.put(2, ObjectID(other))
    client.delete([ObjectID(one)])
    client.put(3, ObjectID(one))
    assert client2.get([ObjectID(one), ObjectID(other)]) == [3, 2]


# -- what is held --------------------------------------------------------------------------------


def test_a_writers_buffer_keeps_the_object_in_place(
    client: PlasmaClient, client2: PlasmaClient
) -> None:
    """As long as it lives; then the object can be evicted."""
    lease(client)
    key = new_id()
    buffer = client.create(key, 1000)
    np.frombuffer(memoryview(buffer), np.uint8)[:] = 5
    client.seal(key)
    client2.evict(100_000_000)
    assert client2.contains(key)
    client.delete([key])
    others = [client2.put(bytes(1000)) for _ in range(100)]
    assert set(bytes(buffer)) == {5}
    del buffer
    gc.collect()
    assert not client2.contains(key)
    client2.delete(others)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_inherits_a_writers_buffer(client: PlasmaClient) -> None:
    """It stays where it is for the child when the parent has let go of it."""
    lease(client)
    key = new_id()
    buffer = client.create(key, 1000)
    np.frombuffer(memoryview(buffer), np.uint8)[:] = 5
    client.seal(key)
    path = session_of(client)._lifeline.path

    def look() -> None:
        with plasma.connect(path) as other:
            other.evict(100_000_000)
            other.delete([key])
            for _ in range(100):
                other.put(bytes(1000))
            assert set(bytes(buffer)) == {5}

    assert in_forked_child(look) == 0


def test_what_an_exception_leaves_unsealed_goes(client: PlasmaClient) -> None:
    """And its id is free."""
    lease(client)
    key = new_id()
    with pytest.raises(RuntimeError), client.create_array(key, 5):
        raise RuntimeError
    client.put(1, key)
    assert client.get(key) == 1


# -- when there are no locks, or no store ----------------------------------------------------------


def test_without_locks_the_store_is_asked(
    client: PlasmaClient,
    client2: PlasmaClient,
    sent: list[Frame],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a file system that has none, or no more of them."""

    def refuse(fd: int, at: int) -> bool:
        raise OSError(fd, f"no locks available for {at}")

    lease(client)
    monkeypatch.setattr(system, "try_lock", refuse)
    key = new_id()
    sent.clear()
    client.put(1, key)
    assert Create.KIND in kinds(sent)
    assert exists_for(client2, key)


CLAIMING = """
    import sys
    import shmplasma as plasma

    path, number = sys.argv[1:]
    with plasma.connect(path) as client:
        client.put(0)
        client.flush()
        print("ready", flush=True)
        sys.stdin.readline()
        client.put("dead", plasma.ObjectID(int(number).to_bytes(20, "big")))
        print("claimed", flush=True)
        sys.stdin.readline()
"""


def test_a_lock_outlasts_a_killed_client(store: Store, client: PlasmaClient) -> None:
    """Until the store has read what the client has left; nobody claims the id in between."""
    locks = session_of(client)._lifeline.locks
    assert locks is not None
    with Child(CLAIMING, store.store_socket_name, "7") as child:
        assert child.hear() == "ready"
        with stopped(store):
            child.say()
            assert child.hear() == "claimed"
            child.kill()
            assert not locks.lock(nth_id(7).hash32)
        assert exists_for(client, nth_id(7))
    assert client.get(nth_id(7)) == "dead"


def test_claims_outlast_the_store(tmp_path: Path) -> None:
    """What was created and sealed while it was dead is there afterwards, and what was not can be sealed."""
    path = str(tmp_path / "s")
    with killed("-m", "10MB", "-s", path):
        one = plasma.connect(path)
        lease(one)
        other = plasma.connect(path)
        lease(other)
        open_before = one.create(nth_id(0), 10)
        one.put("before", nth_id(1))
    open_after = one.create(nth_id(2), 10)
    one.create(nth_id(3), 10)
    one.seal(nth_id(3))
    other.put("meanwhile", nth_id(4))
    with running("-s", path):
        assert one.get([nth_id(1), nth_id(4)]) == ["before", "meanwhile"]
        for number in range(5):
            assert exists_for(other if number != 4 else one, nth_id(number))
        assert exists_for(one, nth_id(3))
        one.seal(nth_id(0))
        one.seal(nth_id(2))
        assert other.contains(nth_id(2))
        assert other.contains(nth_id(3))
        for client in (one, other):
            for number in range(100):
                key = new_id()
                client.put(number, key)
                client.delete([key])
        del open_before, open_after
        one.disconnect()
        other.disconnect()


def locks_of(client: PlasmaClient) -> LockFile:
    """Return that by which a client locks ids."""
    locks = session_of(client)._lifeline.locks
    assert locks is not None
    return locks


def test_locks_are_given_back_at_a_seal(client: PlasmaClient, client2: PlasmaClient) -> None:
    """Those of objects that the store has read of by then; who only creates, or puts, gives them back from time to time."""
    claims, of_other = session_of(client).claims, locks_of(client2)
    assert claims is not None
    keys = [new_id() for _ in range(50)]
    for key in keys[:5]:
        client.create(key, 10)
        client.seal(key)
        client.flush()
    assert len(claims._unread) <= 1
    for key in keys[5:25]:
        client.create(key, 10)
        client.flush()
    assert len(claims._unread) <= 9
    for key in keys[25:]:
        client.put(1, key)
        client.flush()
    assert len(claims._unread) <= 2
    assert sum(not of_other.lock(key.hash32) for key in keys) <= 3
    of_other.unlock_all()


def test_an_id_whose_record_is_read_is_claimed_again(
    client: PlasmaClient,
    client2: PlasmaClient,
    sent: list[Frame],  # noqa: F811
) -> None:
    """Without a message, and all that was locked for nothing is unlocked."""
    lease(client)
    key = new_id()
    client.put(1, key)
    client.delete([key])
    client.flush()
    assert locks_of(client).lock(7)  # as one leaves it that is interrupted
    assert not locks_of(client2).lock(7)
    sent.clear()
    client.put(2, key)
    assert Create.KIND not in kinds(sent)
    assert locks_of(client2).lock(7)
    locks_of(client2).unlock_all()


def test_nothing_is_unlocked_while_another_thread_claims(
    client: PlasmaClient, client2: PlasmaClient
) -> None:
    """It may have locked its id already, and not have written its record."""
    lease(client)
    session = session_of(client)
    claims, leasing = session.claims, session.leasing
    assert claims is not None
    assert leasing is not None
    for number in range(2):
        client.create(nth_id(number), 10)
    client.flush()
    del leasing.token[0]
    assert locks_of(client).lock(7)
    claims.unlock()
    assert not locks_of(client2).lock(7)
    leasing.token.append(None)
    claims.unlock()
    assert locks_of(client2).lock(7)
    locks_of(client2).unlock_all()


@pytest.mark.parametrize("comes_back", [False, True])
def test_what_a_client_has_locked_is_free_when_it_has_gone(
    tmp_path: Path, comes_back: bool
) -> None:
    """Though a child that it has forked has the description still, and also where it has gone on with another store."""
    path = str(tmp_path / "s")
    with ExitStack() as stack:
        process, _ = stack.enter_context(running("-m", "10MB", "-s", path))
        one = plasma.connect(path)
        if comes_back:
            process.kill()
            process.wait()
            stack.enter_context(running("-s", path))
        one.flush()
        other = stack.enter_context(plasma.connect(path))
        assert locks_of(one).lock(7)
        inherited = os.dup(locks_of(one)._fd)
        stack.callback(os.close, inherited)
        assert not locks_of(other).lock(7)
        one.disconnect()
        del one
        gc.collect()
        until(lambda: locks_of(other).lock(7), "it is free")


# -- interrupts ----------------------------------------------------------------------------------


def test_a_claim_that_was_not_written_is_not_aborted(
    client: PlasmaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may have created an object under its id meanwhile, which stays that thread's."""
    lease(client)
    session = session_of(client)
    assert session.leasing is not None
    leasing, post = session.leasing, session._link.post
    created: list[object] = []

    def interrupted(*_: object, **__: object) -> None:
        monkeypatch.setattr(session._link, "post", post)
        raise KeyboardInterrupt

    class Meanwhile(list[None]):
        def append(self, _: None) -> None:
            leasing.token = [None, None]
            created.append(client.create(nth_id(0), 10))

    monkeypatch.setattr(session._link, "post", interrupted)
    monkeypatch.setattr(leasing, "token", Meanwhile([None, None]))
    with pytest.raises(KeyboardInterrupt):
        client.create(nth_id(0), 10)
    assert len(created) == 1
    client.flush()
    client.seal(nth_id(0))
    assert client.contains(nth_id(0))
    created.clear()


def test_a_claim_that_was_written_is_aborted(
    client: PlasmaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its creator is interrupted after that, and nobody is going to seal it."""
    lease(client)
    link = session_of(client)._link
    post = link.post

    def interrupted(kind: int, body: bytes, **options: Any) -> None:
        monkeypatch.setattr(link, "post", post)
        post(kind, body, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(link, "post", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.create(nth_id(0), 10)
    client.flush()
    assert nth_id(0) not in client.list()
    client.create(nth_id(0), 10)
    client.abort(nth_id(0))


def test_what_was_locked_before_an_interrupt_stays_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that connects again locks by what it was given, and is interrupted before it keeps the connection."""
    path = str(tmp_path / "s")
    with killed("-m", "10MB", "-s", path):
        one = plasma.connect(path)
    session = session_of(one)
    locks, connected = session._lifeline.locks, Outbox.connected
    assert locks is not None

    def interrupted(_: Outbox) -> None:
        monkeypatch.setattr(Outbox, "connected", connected)
        assert locks.lock(7)  # as another thread does that claims an id
        raise KeyboardInterrupt

    with running("-s", path), plasma.connect(path) as other:
        monkeypatch.setattr(Outbox, "connected", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.flush()
        one.flush()
        other.flush()
        of_other = session_of(other)._lifeline.locks
        assert of_other is not None
        assert not of_other.lock(7)
        locks.unlock_all()
        assert of_other.lock(7)
        one.disconnect()


INTERRUPTED = """
    import gc
    import shmplasma as plasma
    from shmplasma import claiming, leasing, link, lock_file, outbox, session, writing

    parts = claiming, leasing, link, lock_file, outbox, session, writing
    path = sys.argv[1]
    with plasma.connect(path) as client, plasma.connect(path) as other:
        client.put(0)
        for action in (client.create, client.put_raw_buffer):
            count, own = 0, 0
            while True:
                count += 1
                key = plasma.ObjectID.from_random()
                argument = (key, 100) if action == client.create else (b"x", key)
                if not is_interrupted(count, parts, action, *argument):
                    break
                client.flush()  # which takes in what an interrupted request has left
                try:
                    other.create(key, 10)
                except plasma.PlasmaObjectExists:
                    own += 1
                    if not other.contains(key):
                        client.abort(key)
                        other.put(1, key)
                else:
                    other.abort(key)
            if action == client.create:
                client.abort(key)
            else:
                client.delete([key])
            print(count, own, flush=True)
        gc.collect()
        board = client._session._boards._boards[0]
        assert sorted(board.free) == list(range(1, 512)), "a slot is lost"
        assert "pinned objects: 0\\n" in client.debug_string()
        client.put(1, key)
"""


def test_interrupts_at_each_point(store: Store) -> None:
    """Wherever Ctrl-C meets a creation, its id is free, or it is complete, or its client can abort it; no slot is lost."""
    with Child(INTERRUPTER + dedent(INTERRUPTED), store.store_socket_name) as child:
        for _ in range(2):
            count, own = map(int, child.hear().split())
            assert count > 20
            assert own < count / 2
        assert child.end() == 0


def test_old_descriptions_are_closed_where_nothing_was_locked() -> None:
    """However often a store comes back, but for the last one, which another thread may just be using."""
    fds = [os.open(os.devnull, os.O_RDWR) for _ in range(5)]
    locks = LockFile(fds[0])
    for fd in fds[1:]:
        locks.renew(fd)
    closed = [fd for fd in fds if not Path(f"/dev/fd/{fd}").exists()]
    assert closed == fds[:-2]
    locks.close()
