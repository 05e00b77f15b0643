"""Objects that are waited for: whoever puts one hands it over himself, and the store finds everything in order later."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

import shmplasma as plasma
from shmplasma import ObjectID, PlasmaClient, Store, hinting, payloads
from shmplasma.ear import address_of
from shmplasma.hinting import Hints
from shmplasma.hints import HINT, wanted_at
from shmplasma.layout import BOARD_WORDS, WANTED_WORDS, HeaderWord
from shmplasma.protocol import Frame
from shmplasma.requests import Contains, Get, Post
from shmplasma.spin import Spin
from tests.clients import figure
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


GETTER = """
    import sys
    import shmplasma as plasma

    client = plasma.connect(sys.argv[1])
    object_id = plasma.ObjectID(20 * b"h")
    print("waits", flush=True)
    buffer = client.get_buffers(object_id)
    print("has it", flush=True)
    for line in sys.stdin:
        print(bytes(buffer) == b"h" * 4096, flush=True)
        if line == "release\\n":
            del buffer
            print("released", flush=True)
"""

NAME = ObjectID(20 * b"h")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Give threads that wait."""
    with ThreadPoolExecutor(8) as pool:
        yield pool


_turns = cycle(range(HeaderWord.WANTED, HeaderWord.WANTED + WANTED_WORDS))


def new_id() -> ObjectID:
    """Return a random id whose word no other one of the last hundred has: a get that is over may be named there for a while."""
    turn = next(_turns)
    while wanted_at((object_id := ObjectID.from_random()).hash32) != turn:
        pass
    return object_id


def is_named(client: PlasmaClient, object_id: ObjectID) -> bool:
    """Tell whether the store says that somebody waits for an object."""
    return bool(session_of(client).attachment.words[wanted_at(object_id.hash32)])


@contextmanager
def waiting(client: PlasmaClient) -> Iterator[Child]:
    """Have another process wait for an object, of which the store has said so."""
    with Child(GETTER, client.store_socket_name) as getter:
        assert getter.hear() == "waits"
        until(lambda: is_named(client, NAME), "the store says that it waits")
        yield getter


def wait_in(
    pool: ThreadPoolExecutor, client: PlasmaClient, object_id: ObjectID, get: str = "get_buffers"
) -> Future[Any]:
    """Have a thread wait for an object, and return what it gets."""
    future = pool.submit(getattr(client, get), object_id, timeout_ms=30_000)
    until(lambda: is_named(client, object_id), "the store says that it waits")
    return future


def lease(client: PlasmaClient) -> None:
    """Let a client have a lease, for objects of a page or two."""
    client.put_raw_buffer(bytes(5000))
    client.flush()


@pytest.fixture
def client2(client2: PlasmaClient) -> PlasmaClient:
    """Return the one that puts, with a lease."""
    lease(client2)
    return client2


def fill(client: PlasmaClient) -> None:
    """Have everything evicted that nobody holds, and its room used."""
    client.evict(100_000_000)
    for _ in range(30):
        client.put_raw_buffer(bytes(5_000_000))
    client.flush()


@contextmanager
def forging(
    client: PlasmaClient, object_id: ObjectID
) -> Iterator[Callable[[PlasmaClient, int], None]]:
    """Yield ``hint(putter, n_posted)``, which hints at a record of a putter to a client that waits for an object."""
    attachment = session_of(client).attachment
    request_id = attachment.words[wanted_at(object_id.hash32)] >> 32
    address = address_of(attachment.token, _board_of(client))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mouth:

        def hint(putter: PlasmaClient, n_posted: int) -> None:
            mouth.sendto(HINT.pack(request_id, _board_of(putter), n_posted), address)

        yield hint


def n_posted_by(client: PlasmaClient) -> int:
    """Return how many records a client has written."""
    return session_of(client)._link._outbox.written


def _board_of(client: PlasmaClient) -> int:
    """Return the number of a client's first board."""
    return session_of(client)._boards._boards[0].first_slot // BOARD_WORDS


# -- without the store -------------------------------------------------------------------------


def test_a_getter_has_its_object_while_the_store_is_stopped(
    store: Store, client: PlasmaClient, client2: PlasmaClient, pool: ThreadPoolExecutor
) -> None:
    """Bytes, metadata and values, by each way to get them; the store counts them as held when it goes on."""
    array = np.arange(500)
    ways: list[tuple[str, Callable[[Any], bool]]] = [
        ("get_buffers", lambda got: bytes(got) == b"raw"),
        ("get_metadata", lambda got: bytes(got) == b"more"),
        ("get", lambda got: got["array"].tolist() == array.tolist()),
        ("get_encoded", lambda got: (bytes(got.data), bytes(got.metadata)) == (b"raw", b"more")),
    ]
    for get, check in ways:
        object_id = new_id()
        waits = wait_in(pool, client, object_id, get)
        with stopped(store):
            if get == "get":
                client2.put({"array": array}, object_id)
            else:
                client2.put_raw_buffer(b"raw", object_id, b"more")
            got = waits.result(10)
            assert check(got), get
        info = client2.list()[object_id]
        assert info["ref_count"] == 1, get
        assert check(got)
        del got, waits
        gc.collect()
        assert client2.list()[object_id]["ref_count"] == 0, get


@pytest.mark.parametrize("size", [100, 20_000_000])
@pytest.mark.parametrize("is_read", [False, True])
def test_what_is_created_and_sealed_is_handed_over_as_well(
    store: Store,
    client: PlasmaClient,
    client2: PlasmaClient,
    pool: ThreadPoolExecutor,
    size: int,
    is_read: bool,
) -> None:
    """Whether or not the store has read of its creation, and whoever has found room for it."""
    object_id = new_id()
    waits = wait_in(pool, client, object_id)
    room = client2.create(object_id, size)
    np.asarray(room)[:] = 7
    if is_read:
        client2.flush()
    with stopped(store):
        client2.seal(object_id)
        buffer = waits.result(10)
        assert len(buffer) == size
        assert set(bytes(buffer)) == {7}
    del room
    assert client2.list()[object_id]["ref_count"] == 1
    fill(client2)
    assert client2.list()[object_id]["ref_count"] == 1
    assert set(bytes(buffer)) == {7}
    del buffer, waits
    gc.collect()
    assert client2.list()[object_id]["ref_count"] == 0


def test_nothing_is_told_of_a_creation_before_its_seal(
    client: PlasmaClient,
    client2: PlasmaClient,
    pool: ThreadPoolExecutor,
    sent: list[Frame],  # noqa: F811 - the fixture
) -> None:
    """Although somebody waits; who looks for what is there has the store read of it."""
    object_id = new_id()
    waits = wait_in(pool, client, object_id)
    sent.clear()
    np.asarray(client2.create(object_id, 100))[:] = 7
    assert sent == []
    assert not client.contains(object_id)
    assert set(kinds(sent)) <= {Post.KIND, Contains.KIND}
    assert client.list()[object_id]["state"] == "created"
    client2.seal(object_id)
    assert set(bytes(waits.result(10))) == {7}


def test_nothing_is_sent_but_what_was_sent_before(
    client: PlasmaClient,
    client2: PlasmaClient,
    pool: ThreadPoolExecutor,
    sent: list[Frame],  # noqa: F811 - the fixture
) -> None:
    """The question, and the word that there is a record; a lease is there already."""
    sent.clear()
    object_id = new_id()
    waits = wait_in(pool, client, object_id)
    client2.put_raw_buffer(b"x", object_id)
    assert bytes(waits.result(10)) == b"x"
    assert kinds(sent) == [Get.KIND, Post.KIND]


def test_the_getter_may_go_first(
    client: PlasmaClient,
    client2: PlasmaClient,
    pool: ThreadPoolExecutor,
    sent: list[Frame],  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its putter gives way when it is told, before he tells the store; to nobody if nobody waits, nor to threads of his own process."""
    lease(client)
    sent_before: list[int] = []
    monkeypatch.setattr(Spin, "give_way", lambda _: sent_before.append(len(sent)))
    with waiting(client) as getter:
        sent.clear()
        client.put_raw_buffer(b"h" * 4096, NAME)
        assert sent_before == [0]
        assert kinds(sent) == [Post.KIND]
        assert getter.hear() == "has it"
    client.put_raw_buffer(b"x", new_id())
    object_id = new_id()
    waits = wait_in(pool, client2, object_id)
    client.put_raw_buffer(b"x", object_id)
    assert bytes(waits.result(10)) == b"x"
    assert len(sent_before) == 1


def test_it_can_be_deleted_and_evicted_as_any_other(
    store: Store, client: PlasmaClient, client2: PlasmaClient, pool: ThreadPoolExecutor
) -> None:
    """Not before its getter has let go of it, and at once then."""
    kept, deleted = new_id(), new_id()
    waits = [wait_in(pool, client, object_id) for object_id in (kept, deleted)]
    with stopped(store):
        client2.put_raw_buffer(b"k" * 4096, kept)
        client2.put_raw_buffer(b"d" * 4096, deleted)
        buffers = [each.result(10) for each in waits]
    del waits
    client2.delete([deleted])
    fill(client2)
    assert [bytes(each) for each in buffers] == [b"k" * 4096, b"d" * 4096]
    assert client2.contains(kept)
    del buffers
    gc.collect()
    until(lambda: not client2.contains(deleted), "the deleted one has gone")
    fill(client2)
    assert not client2.contains(kept)


def test_one_of_many_has_it_at_once_and_all_have_it_later(
    store: Store, client: PlasmaClient, client2: PlasmaClient, pool: ThreadPoolExecutor
) -> None:
    """Threads and clients that wait for the same object."""
    object_id = new_id()
    waits = [wait_in(pool, client, object_id)]
    others = [pool.submit(each.get_buffers, object_id, 30_000) for each in (client, client2)]
    lent = [session_of(each)._boards._boards[0] for each in (client, client2)]
    until(lambda: all(len(board.free) < 511 for board in lent), "both have lent slots")
    with stopped(store):
        client2.put_raw_buffer(b"x", object_id)
        assert bytes(waits[0].result(10)) == b"x"
    assert [bytes(each.result(10)) for each in others] == [b"x", b"x"]


def test_threads_of_one_client_have_each_its_own(
    store: Store, client: PlasmaClient, client2: PlasmaClient, pool: ThreadPoolExecutor
) -> None:
    """Whichever of them reads for the others."""
    ids = [ObjectID(bytes([number]) * 20) for number in range(6)]
    waits = [wait_in(pool, client, object_id) for object_id in ids]
    with stopped(store):
        for object_id in reversed(ids):
            client2.put_raw_buffer(object_id.binary(), object_id)
        assert [bytes(each.result(10)) for each in waits] == [each.binary() for each in ids]


def test_a_client_hands_over_to_itself(
    store: Store, client: PlasmaClient, pool: ThreadPoolExecutor
) -> None:
    """From one thread to another."""
    lease(client)
    object_id = new_id()
    waits = wait_in(pool, client, object_id)
    with stopped(store):
        client.put([1, 2], object_id)
        assert bytes(waits.result(10)) != b""
    assert client.get(object_id) == [1, 2]


def test_a_value_that_was_handed_over_is_passed_on_by_reference(
    store: Store, client: PlasmaClient, client2: PlasmaClient, pool: ThreadPoolExecutor
) -> None:
    """What shows where a buffer comes from knows of it."""
    object_id = new_id()
    waits = wait_in(pool, client, object_id)
    with stopped(store):
        client2.put_raw_buffer(b"x" * 100, object_id)
        buffer = waits.result(10)
    (found,) = session_of(client).pinned_at(buffer.address + 50)
    assert found[0] == object_id.binary()
    assert found[2] == 100
    assert not list(session_of(client).pinned_at(buffer.address + 100))


# -- early hints -----------------------------------------------------------------------------------


@pytest.fixture
def hinted_at(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list of the records that this process hints at, each with how many it has written by then."""
    records: list[tuple[int, int]] = []
    hint = Hints._hint

    def note(hints: Hints, word: int, n_posted: int) -> None:
        records.append((n_posted, hints._outbox.written))
        hint(hints, word, n_posted)

    monkeypatch.setattr(Hints, "_hint", note)
    return records


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    ("size_bytes", "look_ns", "early", "late"),
    [(100, 1 << 60, 1, 0), (100, -(1 << 60), 1, 1), (1 << 16, 1 << 60, 1, 0), (65537, 1, 0, 1)],
)
def test_who_waits_elsewhere_is_woken_before_a_small_object_is_made(
    client: PlasmaClient,
    hinted_at: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    size_bytes: int,
    look_ns: int,
    early: int,
    late: int,
    steps: int,
) -> None:
    """Put at once, or created and sealed; and told once more if that has taken so long that it may look no more."""
    monkeypatch.setattr(hinting, "_LOOK_NS", look_ns)
    client.put_raw_buffer(bytes(100_000))
    client.flush()
    with waiting(client) as getter:
        if steps == 1:
            client.put_raw_buffer(bytes(size_bytes), NAME)
        else:
            client.create(NAME, size_bytes)
            client.seal(NAME)
        assert getter.hear() == "has it"
    record = n_posted_by(client)
    assert hinted_at == [(record, record - steps)] * early + [(record, record)] * late


def test_what_comes_by_another_record_than_was_hinted_at_is_hinted_at_again(
    client: PlasmaClient, hinted_at: list[tuple[int, int]]
) -> None:
    """As whoever has created it puts something else before the seal."""
    lease(client)
    with waiting(client) as getter:
        client.create(NAME, 100)
        client.put_raw_buffer(b"another", new_id())
        client.seal(NAME)
        assert getter.hear() == "has it"
    record = n_posted_by(client)
    assert hinted_at == [(record - 1, record - 3), (record, record)]


def test_who_shares_interpreter_or_processor_is_hinted_at_when_there_is_something(
    client: PlasmaClient,
    client2: PlasmaClient,
    pool: ThreadPoolExecutor,
    hinted_at: list[tuple[int, int]],
) -> None:
    """Woken before, he would only keep the putter from going on."""
    object_id = new_id()
    waits = wait_in(pool, client, object_id)
    client2.put_raw_buffer(b"x", object_id)
    waits.result(10)
    hints = session_of(client2)._hints
    assert hints is not None
    hints._is_alone = True
    with waiting(client) as getter:
        client2.put_raw_buffer(bytes(4096), NAME)
        assert getter.hear() == "has it"
    assert [n_posted - n_written for n_posted, n_written in hinted_at] == [0, 0]


def test_a_record_that_does_not_come_is_waited_for_elsewhere(
    store: Store, client: PlasmaClient, client2: PlasmaClient, pool: ThreadPoolExecutor
) -> None:
    """The next hint is heard as well, but not one after the other without an end."""
    listens_to = session_of(client)._link.channel._hints
    for n_vain in (1, 3, 5, 50):
        object_id = new_id()
        waits = wait_in(pool, client, object_id)
        with forging(client, object_id) as hint:
            for _ in range(n_vain):
                hint(client2, n_posted_by(client2) + 1)
        if n_vain < 4:
            with stopped(store):
                client2.put_raw_buffer(b"x", object_id)
                assert bytes(waits.result(10)) == b"x"
        else:
            until(lambda: not listens_to, "it listens no more")
            client2.put_raw_buffer(b"x", object_id)
            assert bytes(waits.result(10)) == b"x"


def test_the_record_of_another_object_is_no_reason_to_hear_no_more(
    store: Store,
    client: PlasmaClient,
    client2: PlasmaClient,
    pool: ThreadPoolExecutor,
) -> None:
    """Ids may share the word that says who waits, and threads of a putter their outbox."""
    object_id = new_id()
    waits = wait_in(pool, client, object_id)
    with stopped(store), forging(client, object_id) as hint:
        client2.put_raw_buffer(b"another", new_id())
        hint(client2, n_posted_by(client2))
        client2.put_raw_buffer(b"x", object_id)
        assert bytes(waits.result(10)) == b"x"


def test_a_record_that_comes_while_it_is_looked_for(
    store: Store,
    client: PlasmaClient,
    client2: PlasmaClient,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is no other hint at it, nor an answer of the store."""
    object_id = new_id()
    waits = wait_in(pool, client, object_id)
    looks = Spin.looks

    def put_meanwhile(spin: Spin, *spin_ns: int) -> Iterator[None]:
        if spin_ns:
            client2.put_raw_buffer(b"x", object_id)
            yield
        else:
            yield from looks(spin)

    monkeypatch.setattr(Spin, "looks", put_meanwhile)
    monkeypatch.setattr(Hints, "tell", lambda *_: None)
    with stopped(store), forging(client, object_id) as hint:
        hint(client2, n_posted_by(client2) + 1)
        assert bytes(waits.result(10)) == b"x"


def test_a_put_that_is_refused_hands_nothing_over(
    client: PlasmaClient, hinted_at: list[tuple[int, int]]
) -> None:
    """Its early hint was in vain; the object comes when it is sealed by whoever has created it."""
    lease(client)
    with waiting(client) as getter:
        room = client.create(NAME, 4096)
        hinted_at.clear()
        with pytest.raises(plasma.PlasmaObjectExists):
            client.put_raw_buffer(b"x" * 4096, NAME)
        assert len(hinted_at) == 1
        np.asarray(room)[:] = ord("h")
        client.seal(NAME)
        assert getter.hear() == "has it"
        getter.say()
        assert getter.hear() == "True"


# -- by the store ----------------------------------------------------------------------------------


def create_and_seal_later(client: PlasmaClient, object_id: ObjectID) -> None:
    """Store an object in two steps."""
    client.create(object_id, 3)
    client.seal(object_id)


PUTS: list[Callable[[PlasmaClient, ObjectID], object]] = [
    lambda client, object_id: client.put_raw_buffer(b"", object_id),
    lambda client, object_id: client.put_raw_buffer(bytes(20_000_000), object_id),
    lambda client, object_id: client.put_raw_buffer(b"abc", object_id, keep=True),
    create_and_seal_later,
]


@pytest.mark.parametrize("put", PUTS)
def test_what_nobody_is_hinted_at_comes_as_ever(
    client: PlasmaClient,
    client2: PlasmaClient,
    pool: ThreadPoolExecutor,
    put: Callable[[PlasmaClient, ObjectID], object],
) -> None:
    """What has no bytes, is large, is sealed, or is to be kept."""
    object_id = new_id()
    waits = wait_in(pool, client, object_id)
    put(client2, object_id)
    assert waits.result(10).size in (0, 3, 20_000_000)


@pytest.mark.parametrize("missing", ["ear", "mouth", "hint"])
def test_hints_are_only_hints(
    client: PlasmaClient,
    client2: PlasmaClient,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    """Who cannot hear any, or is sent none, or finds nothing where one says so, has the object from the store."""

    def refuse(*_: object) -> None:
        return None

    method = {"ear": "listen", "mouth": "tell", "hint": "take"}[missing]
    monkeypatch.setattr(Hints, method, refuse)
    for number in range(10):
        object_id = new_id()
        if missing == "ear":
            waits = pool.submit(client.get, object_id, timeout_ms=30_000)
        else:
            waits = wait_in(pool, client, object_id, "get")
        client2.put(number, object_id)
        assert waits.result(10) == number
    words = session_of(client).attachment.words
    assert not any(words[HeaderWord.WANTED : HeaderWord.WANTED + WANTED_WORDS])


def test_nobody_is_misled(
    store: Store, client: PlasmaClient, client2: PlasmaClient, pool: ThreadPoolExecutor
) -> None:
    """Whatever is sent to where hints are heard: the getter waits on, and has its object when it is put."""
    object_id = new_id()
    waits = wait_in(pool, client, object_id)
    attachment = session_of(client).attachment
    word = attachment.words[wanted_at(object_id.hash32)]
    request_id, board = word >> 32, (word & 0xFFFF_FFFF) - 1
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mouth:
        for hint in [
            b"",
            b"x",
            bytes(1000),
            HINT.pack(request_id + 1, 0, 1),
            HINT.pack(0, 0, 1),
            HINT.pack(request_id, 1 << 31, 1),
            HINT.pack(request_id, 0, 0),
            HINT.pack(request_id, 0, (1 << 64) - 1),
            HINT.pack(request_id, 1, 1),
        ]:
            with stopped(store):
                mouth.sendto(hint, address_of(attachment.token, board))
            assert not waits.done()
    client2.put_raw_buffer(b"x", object_id)
    assert bytes(waits.result(10)) == b"x"


def test_nobody_is_hinted_at_what_has_gone(
    client: PlasmaClient, client2: PlasmaClient, pool: ThreadPoolExecutor
) -> None:
    """A record stays where it is after the store has read it; its object may have been deleted since."""
    object_id = new_id()
    client2.put_raw_buffer(b"old", object_id)
    client2.flush()
    n_posted = n_posted_by(client2)
    client2.delete([object_id])
    waits = wait_in(pool, client, object_id)
    with forging(client, object_id) as hint:
        hint(client2, n_posted)
    client.flush()  # by which it has been heard
    assert not waits.done()
    client2.put_raw_buffer(b"new", object_id)
    assert bytes(waits.result(10)) == b"new"


def test_who_is_sent_nothing_but_nonsense_stops_listening(
    client: PlasmaClient, client2: PlasmaClient, pool: ThreadPoolExecutor
) -> None:
    """The store says what there is, as ever."""
    for _ in range(2):
        object_id = new_id()
        waits = wait_in(pool, client, object_id)
        channel = session_of(client)._link.channel
        assert channel.ear is not None
        address = address_of(session_of(client).attachment.token, _board_of(client))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mouth:
            while channel.ear.is_open:
                with suppress(ConnectionRefusedError):
                    mouth.sendto(b"nonsense", address)
        client2.put_raw_buffer(b"x", object_id)
        assert bytes(waits.result(10)) == b"x"


def test_the_time_of_a_get_comes_to_its_end(client: PlasmaClient) -> None:
    """And the word that named it is for others."""
    object_id = new_id()
    assert client.get_buffers(object_id, timeout_ms=20) is None
    assert not is_named(client, object_id)
    assert session_of(client)._link.channel._hints == {}


# -- deaths ------------------------------------------------------------------------------------


PUTTER = """
    import sys
    import shmplasma as plasma

    client = plasma.connect(sys.argv[1])
    client.put_raw_buffer(bytes(5000))
    client.flush()
    print("ready", flush=True)
    sys.stdin.readline()
    client.put_raw_buffer(b"h" * 4096, plasma.ObjectID(20 * b"h"))
    print("put", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def handed_over(path: str, pid: int) -> Iterator[tuple[Child, Child]]:
    """Yield a getter that has an object and its putter, both of a store that is stopped and has not heard of it."""
    with (
        Child(GETTER, path) as getter,
        Child(PUTTER, path) as putter,
        plasma.connect(path) as other,
    ):
        assert putter.hear() == "ready"
        assert getter.hear() == "waits"
        until(lambda: is_named(other, NAME), "the store says that it waits")
        other.disconnect()
        os.kill(pid, signal.SIGSTOP)
        putter.say()
        assert putter.hear() == "put"
        assert getter.hear() == "has it"
        yield getter, putter


def test_hints_are_heard_when_a_store_has_come_back(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """By whoever has heard some before."""
    path, before, after = str(tmp_path / "s"), new_id(), new_id()
    with killed("-m", "100MB", "-s", path):
        client, client2 = plasma.connect(path), plasma.connect(path)
        waits = wait_in(pool, client, before)
        client2.put_raw_buffer(b"x", before)
        assert bytes(waits.result(10)) == b"x"
    with running("-s", path) as (process, _), client, client2:
        lease(client2)
        waits = wait_in(pool, client, after)
        process.send_signal(signal.SIGSTOP)
        try:
            client2.put_raw_buffer(b"x", after)
            assert bytes(waits.result(10)) == b"x"
        finally:
            process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("putter_dies", [False, True])
def test_a_store_that_dies_before_it_hears_of_it(tmp_path: Path, putter_dies: bool) -> None:
    """Its successor has the object, and leaves it to the getter as long as that holds it; so if the putter dies as well."""
    path = str(tmp_path / "s")
    with ExitStack() as stack:
        with running("-m", "100MB", "-s", path) as (process, _):
            getter, putter = stack.enter_context(handed_over(path, process.pid))
            process.kill()
            process.wait()
            if putter_dies:
                putter.kill()
        stack.enter_context(running("-s", path))
        client = stack.enter_context(plasma.connect(path))
        assert bytes(client.get_buffers(NAME, timeout_ms=10_000)) == b"h" * 4096
        fill(client)
        assert client.list()[NAME]["ref_count"] == 1
        getter.say()
        assert getter.hear() == "True"
        getter.say("release")
        assert [getter.hear(), getter.hear()] == ["True", "released"]
        fill(client)
        assert not client.contains(NAME)


@pytest.mark.parametrize("dies", ["getter", "putter"])
def test_who_dies_before_the_store_hears_of_it(tmp_path: Path, dies: str) -> None:
    """The object is there, held by who lives."""
    path = str(tmp_path / "s")
    with (
        running("-m", "100MB", "-s", path) as (process, _),
        handed_over(path, process.pid) as (getter, putter),
    ):
        (getter if dies == "getter" else putter).kill()
        process.send_signal(signal.SIGCONT)
        with plasma.connect(path) as client:
            held = dies == "putter"
            until(
                lambda: NAME in client.list() and client.list()[NAME]["ref_count"] == held,
                "the object is there, and held by who lives",
            )
            fill(client)
            assert client.contains(NAME) == held
            if held:
                getter.say()
                assert getter.hear() == "True"


def test_a_forked_child_keeps_what_was_handed_over(
    store: Store, client: PlasmaClient, client2: PlasmaClient, pool: ThreadPoolExecutor
) -> None:
    """Though its parent lets go of it."""
    object_id = new_id()
    waits = wait_in(pool, client, object_id)
    with stopped(store):
        client2.put_raw_buffer(b"f" * 4096, object_id)
        buffer = waits.result(10)
    reading, writing = os.pipe()

    def look() -> None:
        os.read(reading, 1)
        assert bytes(buffer) == b"f" * 4096

    def let_go() -> None:
        nonlocal buffer
        del buffer
        fill(client2)
        assert client2.contains(object_id)
        os.write(writing, b"x")

    del waits
    letting_go = threading.Timer(1, let_go)
    letting_go.start()
    assert in_forked_child(look) == 0
    letting_go.join()
    os.close(reading)
    os.close(writing)


# -- interrupts ------------------------------------------------------------------------------------


INTERRUPTED = """
    import gc, threading
    import shmplasma as plasma
    from shmplasma import asking, ear, hinting, transport

    parts = asking, ear, hinting, transport
    path = sys.argv[1]
    with plasma.connect(path) as client, plasma.connect(path) as putter:
        putter.put_raw_buffer(b"lease")
        putter.flush()
        words = client._session.attachment.words
        count = 0
        interrupted = True
        while interrupted:
            count += 1
            name = plasma.ObjectID.from_random()
            over = threading.Event()

            def put():
                # When it waits, or does not any more.
                while not (words[hinting.wanted_at(name.hash32)] or over.is_set()):
                    pass
                putter.put_raw_buffer(b"x" * 100, name)

            thread = threading.Thread(target=put)
            thread.start()
            interrupted = is_interrupted(count, parts, client.get_buffers, name)
            over.set()
            thread.join()
            client.flush()  # which takes in what an interrupted request has left
            assert bytes(client.get_buffers(name)) == b"x" * 100
            gc.collect()
            assert client.list()[name]["ref_count"] == 0, count
            client.delete([name])
            assert name not in client.list(), count
        print(count, flush=True)
        assert "pinned objects: 0\\n" in client.debug_string()
        assert not any(words[128:256])
"""


def test_interrupts_at_each_point_of_a_get_that_is_hinted_at(store: Store) -> None:
    """Wherever Ctrl-C meets it, nothing stays pinned, and the next get has the object."""
    with Child(INTERRUPTER + dedent(INTERRUPTED), store.store_socket_name) as child:
        assert int(child.hear()) > 50
        assert child.end() == 0


# -- a client that leaves while it puts --------------------------------------------------------


def test_a_client_that_leaves_while_it_puts(
    store: Store,
    client2: PlasmaClient,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One thread disconnects, another one is filling its object: nobody else's is written to."""
    client = store.connect()
    client.put_raw_buffer(bytes(2000))
    client.flush()
    filling, may_fill = threading.Event(), threading.Event()
    fill_whole = payloads.Payload.fill

    def fill_slowly(payload: Any, room: memoryview, threads: int = 1) -> None:
        if payload.size_bytes == 2048:
            filling.set()
            assert may_fill.wait(20)
        fill_whole(payload, room, threads)

    monkeypatch.setattr(payloads.Payload, "fill", fill_slowly)
    putting = pool.submit(client.put_raw_buffer, bytearray(b"!" * 2048))
    assert filling.wait(20)
    client.disconnect()
    ids = [client2.put_raw_buffer(b"." * 100_000) for _ in range(900)]
    may_fill.set()
    with suppress(plasma.NotConnectedError):  # if the store had to be told that there is something
        putting.result(20)
    assert all(bytes(buffer) == b"." * 100_000 for buffer in client2.get_buffers(ids, 0) if buffer)
    assert figure(client2, "objects") > 0
