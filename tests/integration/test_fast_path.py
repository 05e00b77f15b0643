from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import os
import random
import signal
import struct
import sys
import termios
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shmplasma import (
    NotConnectedError,
    ObjectID,
    ObjectNotAvailable,
    PlasmaClient,
    PlasmaObjectNotFound,
    PlasmaStoreFull,
    Store,
    connect,
    system,
)
from shmplasma.layout import HeaderWord
from shmplasma.leases import BUSY_WORD, MIN_LEASE_BYTES
from shmplasma.outbox import ANNOUNCED_AT, PLACES
from shmplasma.pins import slots_of
from shmplasma.posted import Abort
from shmplasma.protocol import MAX_REQUEST_BYTES, Frame, FrameDecoder
from shmplasma.requests import (
    AnswerNow,
    AskLease,
    Contains,
    Create,
    Delete,
    Flush,
    Get,
    Grow,
    List,
    Post,
)
from shmplasma.session import Session
from shmplasma.transport import Channel
from tests.command import running
from tests.crash import hammer_order
from tests.processes import until

needs_fast_path = pytest.mark.skipif(
    not system.fast_path_available(),
    reason="the fast path is off: not x86-64 Linux, no membarrier, or SHMPLASMA_FAST_PATH=0",
)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Frame]:
    """Note every message that any client of this process sends."""
    frames: list[Frame] = []
    push = Channel._push

    def note_and_push(
        channel: Channel, data: bytes, flags: int = 0, taken: list[None] | None = None
    ) -> bool:
        before = () if flags else channel._later
        frames.extend(FrameDecoder(MAX_REQUEST_BYTES).feed(b"".join((*before, data))))
        return push(channel, data, flags, taken)

    monkeypatch.setattr(Channel, "_push", note_and_push)
    return frames


def kinds(frames: list[Frame]) -> list[int]:
    """Return what kinds of messages these are."""
    return [frame.kind for frame in frames]


def session_of(client: PlasmaClient) -> Session:
    """Return the client's session."""
    session = client._session
    assert session is not None
    return session


def unread_bytes(client: PlasmaClient) -> int:
    """Return how much of what the client has sent the store has not received."""
    answer = fcntl.ioctl(session_of(client)._link.channel._sock, termios.TIOCOUTQ, bytes(4))
    return int(struct.unpack("i", answer)[0])


def lost_slots(client: PlasmaClient) -> Counter[int]:
    """Return the slots that are not exactly once among those that are free."""
    free: Counter[int] = Counter()
    for board in session_of(client)._boards._boards:
        free.update(board.first_slot + word for word in board.free)
        free.subtract(slots_of(board.first_slot // len(board.words)))
    return Counter({slot: count for slot, count in free.items() if count})


@contextmanager
def stopped(store: Store) -> Iterator[None]:
    """Keep the store from running."""
    os.kill(store.process.pid, signal.SIGSTOP)
    try:
        _, status = os.waitpid(store.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        yield
    finally:
        os.kill(store.process.pid, signal.SIGCONT)


def put_numbers(client: PlasmaClient, count: int) -> list[ObjectID]:
    """Put 0, 1, ... as 8 bytes each with themselves as metadata; return their ids."""
    words = [number.to_bytes(8, "little") for number in range(count)]
    ids = [client.put_raw_buffer(word, metadata=word) for word in words]
    client.flush()
    return ids


def number_in(buffer: Any) -> int:
    """Return the number that such an object holds."""
    return int.from_bytes(buffer, "little")


def ref_counts(client: PlasmaClient) -> Counter[int]:
    """Return how many objects are held by how many clients."""
    return Counter(info["ref_count"] for info in client.list().values())


# -- what sends nothing --------------------------------------------------------------------------


@needs_fast_path
@pytest.mark.parametrize("count", [1, 1000])
def test_reading_sends_nothing(
    store: Store, client: PlasmaClient, client2: PlasmaClient, sent: list[Frame], count: int
) -> None:
    """While the store is stopped everything sealed can be read, and nothing is on its way to it."""
    ids, numbers = put_numbers(client2, count), list(range(count))
    values = [client2.put({"number": number, "array": np.arange(9)}) for number in numbers]
    client2.flush()
    client.get_buffers(ids)  # grows the boards
    with stopped(store):
        sent.clear()
        assert [number_in(buffer) for buffer in client.get_buffers(ids)] == numbers
        assert [number_in(buffer) for buffer in client.get_metadata(ids)] == numbers
        pairs = client.get_buffers(ids, with_meta=True)
        assert [(number_in(data), number_in(meta)) for meta, data in pairs] == [
            (number, number) for number in numbers
        ]
        del pairs
        assert [value["number"] for value in client.get(values)] == numbers
        assert all(client.contains(object_id) for object_id in ids)
        assert number_in(client.get_buffers(ids[-1])) == count - 1
        assert number_in(client.get_metadata(ids[-1])) == count - 1
        array = client.get(values[-1], timeout_ms=0)["array"]
        assert array.tolist() == list(range(9))
        assert not array.flags.writeable
        del array
        assert sent == []
        assert unread_bytes(client) == 0
    assert lost_slots(client) == {}


@needs_fast_path
def test_listing_sends_nothing(
    store: Store, client: PlasmaClient, client2: PlasmaClient, sent: list[Frame]
) -> None:
    """While the store is stopped, after it has read what was put; the list is what the store itself would say."""
    ids = put_numbers(client2, 50)
    unsealed = ObjectID.from_random()
    client2.create(unsealed, 100)
    held = [client.get_buffers(ids[:10]), client2.get_buffers(ids[5:20])]
    client2.delete(ids[-1])
    client2.flush()
    with stopped(store):
        sent.clear()
        listed = client.list()
        assert sent == []
        assert unread_bytes(client) == 0
    assert listed.keys() == {unsealed, *ids[:-1]}
    counts = [listed[object_id]["ref_count"] for object_id in ids[:-1]]
    assert counts == [1] * 5 + [2] * 5 + [1] * 10 + [0] * 29
    assert listed[unsealed]["ref_count"] == 1
    assert listed[unsealed]["state"] == "created"
    session_of(client).census = None
    assert client.list() == listed
    assert kinds(sent) == [List.KIND]
    del held


@needs_fast_path
def test_what_was_put_and_deleted_just_now_is_listed_right(
    client: PlasmaClient, client2: PlasmaClient
) -> None:
    """Whoever has done it, whether or not the store has read of it."""
    for number in range(200):
        object_id = client2.put(number)
        assert client.list().keys() == {object_id}
        with client.create_array(ObjectID.from_random(), (3,), "u8") as array:
            assert len(client2.list()) == 2
        del array
        client2.delete([*client2.list()])
        assert not client.list()


@needs_fast_path
def test_who_gets_no_lease_asks_again_after_64_puts(
    client: PlasmaClient, sent: list[Frame]
) -> None:
    """A client with a limit is refused, and asks no more often than that."""
    client.set_client_options("limited", 1 << 20)
    sent.clear()
    for number in range(130):
        client.put(number, ObjectID.from_random() if number % 2 else None)
    assert kinds(sent).count(AskLease.KIND) == 2
    assert kinds(sent).count(Create.KIND) == 130


@needs_fast_path
def test_writing_waits_for_nothing(
    store: Store, client: PlasmaClient, client2: PlasmaClient, sent: list[Frame]
) -> None:
    """While the store is stopped puts and seals return, after one message each at most, and are found later."""
    client.put("the first one gets a lease")
    chosen = ObjectID.from_random()
    client.create(chosen, 100)
    with stopped(store):
        sent.clear()
        ids = [client.put(number) for number in range(20)]
        client.seal(chosen)
        assert set(kinds(sent)) <= {Post.KIND}
        assert len(sent) <= 21
    assert client2.get(ids, timeout_ms=0) == list(range(20))
    assert client2.contains(chosen)


@needs_fast_path
def test_a_full_socket_is_not_waited_for(
    store: Store, client: PlasmaClient, client2: PlasmaClient
) -> None:
    """While the store is stopped, fewer of the messages that announce a record fit into it than records into the outbox."""
    put_numbers(client, 2)
    words = session_of(client).attachment.words
    until(lambda: not words[HeaderWord.POLLED], "the store has itself be told of records")
    written: list[ObjectID] = []
    count = ANNOUNCED_AT - 3
    with stopped(store):
        putting = threading.Thread(
            target=lambda: written.extend(client.put(number) for number in range(count))
        )
        putting.start()
        putting.join(10)
        assert len(written) == count
        assert not session_of(client)._link.channel.offer([])
    putting.join()
    assert client2.get(written, timeout_ms=0) == list(range(count))


@needs_fast_path
def test_the_next_lease_is_asked_for_ahead(
    store: Store, client: PlasmaClient, client2: PlasmaClient, sent: list[Frame]
) -> None:
    """Who uses a lease up asks for the next one and goes on; the next put has it, or waits for what was asked."""
    data = bytes(1024)
    first = MIN_LEASE_BYTES // len(data)
    ids = [client.put_raw_buffer(data) for _ in range(first - 1)]
    client.flush()
    with stopped(store):
        sent.clear()
        ids.append(client.put_raw_buffer(data))
        assert [kind for kind in kinds(sent) if kind != Post.KIND] == [AskLease.KIND]
        putting = threading.Thread(target=lambda: ids.append(client.put_raw_buffer(data)))
        putting.start()
        putting.join(0.05)
        assert putting.is_alive()
    putting.join()
    sent.clear()
    ids += [client.put_raw_buffer(data) for _ in range(first)]
    assert set(kinds(sent)) <= {Post.KIND}
    assert client2.get_buffers(ids, timeout_ms=0) == [data] * len(ids)


@needs_fast_path
@pytest.mark.parametrize("chosen", [False, True], ids=["fresh id", "chosen id"])
def test_pages_are_mapped_when_an_object_was_told_of(client: PlasmaClient, chosen: bool) -> None:
    """Pages are mapped for the next object, after the last one is there for others; only a new lease begins with some."""
    session = session_of(client)
    leasing, outbox = session.leasing, session._link._outbox
    assert leasing is not None
    populate = leasing._populate
    mapped: list[bool] = []

    def note(offset: int, size_bytes: int) -> None:
        mapped.append(outbox.written > written)
        populate(offset, size_bytes)

    leasing._populate = note
    n_after = 0
    for _ in range(60):
        mapped.clear()
        written, end = outbox.written, leasing._end
        client.put_raw_buffer(bytes(100_000), ObjectID.from_random() if chosen else None)
        assert leasing._end != end or False not in mapped
        n_after += mapped.count(True)
    assert n_after


@needs_fast_path
@pytest.mark.parametrize("metadata", [b"", b"m"], ids=["small", "any"])
def test_who_puts_is_busy_before_he_looks_whether_his_lease_was_recalled(
    client: PlasmaClient, metadata: bytes
) -> None:
    """The other way round, the store could take a lease back between the two."""
    client.put_raw_buffer(b"x", metadata=metadata)
    leasing = session_of(client).leasing
    assert leasing is not None
    words, epoch, board = leasing._words, leasing._epoch_word, leasing.board
    looks: list[int] = []

    class Words:
        def __getitem__(self, at: int) -> int:
            assert at == epoch
            looks.append(board[BUSY_WORD])
            return words[at]

    looked_at: Any = Words()
    leasing._words = looked_at
    client.put_raw_buffer(b"x", metadata=metadata)
    assert looks == [1]
    assert not board[BUSY_WORD]


@needs_fast_path
@pytest.mark.parametrize("n_bytes", [60_000, 600_000])
def test_pages_that_cannot_be_mapped(
    client: PlasmaClient, monkeypatch: pytest.MonkeyPatch, n_bytes: int
) -> None:
    """A put that fails for want of pages has put nothing, and what was put does not fail for those of the next one."""
    populate, calls = system.populate, [0]

    def refused(address: int, size: int) -> bool:
        calls[0] += 1
        if calls[0] % 2:
            raise OSError(errno.ENOMEM, "no memory")
        return populate(address, size)

    monkeypatch.setattr(system, "populate", refused)
    n_failed = 0
    for number in range(1, 21):
        object_id = ObjectID(number.to_bytes(20, "big"))
        try:
            client.put_raw_buffer(bytes(n_bytes), object_id)
        except OSError as error:
            assert "cannot be mapped here (no memory); free some memory" in str(error)  # noqa: PT017 - not each of them fails
            n_failed += 1
            assert not client.contains(object_id)
            client.put_raw_buffer(bytes(n_bytes), object_id)
        assert client.contains(object_id)
    assert 0 < n_failed < calls[0]


@needs_fast_path
def test_a_lease_that_was_asked_for_ahead_is_recalled() -> None:
    """Nobody puts into it, and it is no reason to be full; when there is room again, there is another one."""
    with Store("4MB") as store, store.connect() as client, store.connect() as other:
        data = bytes(1024)
        for _ in range(MIN_LEASE_BYTES // len(data)):
            client.put_raw_buffer(data)
        leasing = session_of(client).leasing
        assert leasing is not None
        assert leasing._awaited
        whole = ObjectID.from_random()
        content = memoryview(other.create(whole, other.store_capacity())).cast("B")
        content[:] = b"w" * len(content)
        with pytest.raises(PlasmaStoreFull):
            client.put_raw_buffer(data)
        assert bytes(content) == b"w" * len(content)
        del content
        other.abort(whole)
        assert client.get_buffers(client.put_raw_buffer(data)) == data


@needs_fast_path
def test_what_has_no_bytes_is_put_where_there_is_no_lease() -> None:
    """A lease that is used up, with no other to be had, has no room for an empty object either."""
    data = bytes(1024)
    with Store("4MB") as store, store.connect() as client, store.connect() as other:
        for _ in range(MIN_LEASE_BYTES // len(data) - 1):
            client.put_raw_buffer(data, keep=True)
        client.flush()
        rest = other.create(ObjectID.from_random(), other.store_capacity() - MIN_LEASE_BYTES)
        client.put_raw_buffer(data, keep=True)
        with pytest.raises(PlasmaStoreFull):
            client.put_raw_buffer(data, keep=True)
        assert client.get_buffers(client.put_raw_buffer(b"")) == b""
        assert rest.size == other.store_capacity() - MIN_LEASE_BYTES


@needs_fast_path
def test_nothing_is_evicted_for_a_lease_that_is_asked_for_ahead() -> None:
    """Nobody may need it; who does asks once more, and then it is."""
    with Store("20MB") as store, store.connect() as client:
        ids = [client.put_raw_buffer(bytes(100_000)) for _ in range(199)]
        assert "\nevictions: 0\n" in client.debug_string()
        assert client.list().keys() == set(ids)
        for _ in range(20):
            ids.append(client.put_raw_buffer(bytes(100_000)))
            assert client.contains(ids[-1])
        assert not client.contains(ids[0])


@needs_fast_path
def test_a_store_that_dies_before_it_grants_a_lease(tmp_path: Path) -> None:
    """Who has asked for it ahead asks its successor."""
    path, data = str(tmp_path / "s"), bytes(1024)
    with running("-m", "4MB", "-s", path) as (process, _):
        client = connect(path)
        ids = [client.put_raw_buffer(data) for _ in range(MIN_LEASE_BYTES // len(data) - 1)]
        client.flush()
        process.send_signal(signal.SIGSTOP)
        ids.append(client.put_raw_buffer(data))
        process.kill()
        process.wait()
    with running("-s", path), client:
        ids += [client.put_raw_buffer(data) for _ in range(100)]
        assert client.get_buffers(ids, timeout_ms=0) == [data] * len(ids)


@needs_fast_path
def test_puts_in_a_row_are_mostly_silent(
    store: Store, client: PlasmaClient, client2: PlasmaClient, sent: list[Frame]
) -> None:
    """While the store looks by itself a client sends a message only when half a ring waits for it."""
    for number in range(400):
        client.put(number)  # leases grow with use; the one of now has room for all that follow
    polled = session_of(client).attachment.words[HeaderWord.POLLED : HeaderWord.POLLED + 1]
    ids: list[ObjectID] = []
    while not ids:
        client.put("the store looks for more now")
        with stopped(store):
            if polled[0]:
                sent.clear()
                while not sent:
                    ids.append(client.put(len(ids)))
                assert len(ids) <= ANNOUNCED_AT
                for _ in range(PLACES - ANNOUNCED_AT):
                    ids.append(client.put(len(ids)))
    assert kinds(sent) == [Post.KIND]
    assert client2.get(ids, timeout_ms=0) == list(range(len(ids)))
    until(lambda: not polled[0], "the store sleeps")


@needs_fast_path
def test_puts_into_a_full_store_seldom_wait(client: PlasmaClient, sent: list[Frame]) -> None:
    """Each evicts an object, and few of them take a round trip: the store makes room for many at once."""
    data, count = bytes(100_000), 300
    for _ in range(1200):
        client.put_raw_buffer(data)
    before = set(client.list())
    sent.clear()
    ids = [client.put_raw_buffer(data) for _ in range(count)]
    waits = Counter(kinds(sent))
    assert set(waits) <= {Post.KIND, AskLease.KIND, Flush.KIND}
    assert waits[AskLease.KIND] + waits[Flush.KIND] <= count // 5
    left = set(client.list())
    assert left >= set(ids)
    most = count + 2 * client.store_capacity() // 64 // len(data)
    assert len(before - left) <= most


@pytest.mark.parametrize("where", ["client", "store"])
def test_turned_off(monkeypatch: pytest.MonkeyPatch, sent: list[Frame], where: str) -> None:
    """SHMPLASMA_FAST_PATH=0 at either end leaves the same API, all of it by messages."""
    if where == "store":
        monkeypatch.setenv("SHMPLASMA_FAST_PATH", "0")
    with Store("10MB") as store:
        monkeypatch.setenv("SHMPLASMA_FAST_PATH", "0" if where == "client" else "1")
        with store.connect() as client:
            assert session_of(client).reader is None
            assert session_of(client).leasing is None
            ids = put_numbers(client, 10)
            assert Create.KIND in kinds(sent)
            sent.clear()
            buffers = client.get_buffers(ids)
            assert [number_in(buffer) for buffer in buffers] == list(range(10))
            assert kinds(sent) == [Get.KIND]
            assert ref_counts(client) == {1: 10}
            client.delete(ids)
            assert all(client.contains(object_id) for object_id in ids)
            del buffers
            until(lambda: not client.list(), "what was deleted is released")


# -- boards --------------------------------------------------------------------------------------


def test_a_full_board_grows(client: PlasmaClient, client2: PlasmaClient, sent: list[Frame]) -> None:
    """One client holds 3,000 buffers at once; it asks for boards one by one, and uses them again."""
    ids = put_numbers(client2, 3000)
    for _ in range(2):
        sent.clear()
        buffers = [client.get_buffers(object_id) for object_id in ids]
        assert [number_in(buffer) for buffer in buffers] == list(range(3000))
        assert ref_counts(client2) == {1: 3000}
        random.Random(1).shuffle(buffers)
        del buffers[1000:]
        assert ref_counts(client2) == {1: 1000, 0: 2000}
        del buffers
        assert ref_counts(client2) == {0: 3000}
        assert lost_slots(client) == {}
    assert Grow.KIND not in kinds(sent), "a board that is empty again was not used"
    assert len(session_of(client)._boards._boards) == 6


def test_ref_counts_are_exact(client: PlasmaClient, client2: PlasmaClient) -> None:
    """A client counts once however often it holds an object, and no more once it has let go."""
    one, other = put_numbers(client, 2)

    def holders() -> list[int]:
        infos = client.list()
        return [infos[one]["ref_count"], infos[other]["ref_count"]]

    assert holders() == [0, 0]
    first, second = client.get_buffers([one, one])
    metadata = client2.get_metadata(one)
    assert holders() == [2, 0]
    value = client2.get_buffers(other)
    view = memoryview(value)
    del value, first
    assert holders() == [2, 1]
    del second
    assert holders() == [1, 1]
    del metadata, view
    assert holders() == [0, 0]


@needs_fast_path
def test_misses_go_in_one_message(client: PlasmaClient, sent: list[Frame]) -> None:
    """Of a batch only what is not there is waited for, all of it at once, and all comes in order."""
    ids = put_numbers(client, 200)
    absent = [ObjectID.from_random() for _ in range(100)]
    mixed = [*ids, *absent]
    random.Random(2).shuffle(mixed)
    sent.clear()
    buffers = client.get_buffers(mixed, timeout_ms=1)
    assert kinds(sent) == [Get.KIND, AnswerNow.KIND]
    asked = Get.decode(sent[0].body).object_ids
    assert list(asked) == [object_id.binary() for object_id in mixed if object_id in absent]
    for object_id, buffer in zip(mixed, buffers, strict=True):
        if object_id in absent:
            assert buffer is None
        else:
            assert number_in(buffer) == ids.index(object_id)


@needs_fast_path
def test_what_is_not_there_needs_no_message(
    store: Store, client: PlasmaClient, client2: PlasmaClient, sent: list[Frame]
) -> None:
    """Once the store has read what all have put, one or a thousand at once, also among others."""
    ids = put_numbers(client2, 100)
    absent = [ObjectID.from_random() for _ in range(1000)]

    async def get() -> Any:
        return await client.get_async(absent, timeout_ms=0)

    with stopped(store):
        sent.clear()
        assert not client.contains(absent[0])
        assert client.get(absent[0], timeout_ms=0) is ObjectNotAvailable
        assert client.get_buffers(absent, timeout_ms=0) == [None] * 1000
        assert client.get_metadata(absent, timeout_ms=0) == [None] * 1000
        mixed = client.get_buffers([*absent, *ids], timeout_ms=0)
        assert mixed[:1000] == [None] * 1000
        assert list(map(number_in, mixed[1000:])) == list(range(100))
        del mixed
        assert asyncio.run(get()) == [ObjectNotAvailable] * 1000
        with pytest.raises(PlasmaObjectNotFound):
            client.hash(absent[0])
        assert sent == []
    assert lost_slots(client) == {}


@needs_fast_path
def test_what_may_be_there_is_asked_for(
    store: Store, client: PlasmaClient, client2: PlasmaClient, sent: list[Frame]
) -> None:
    """What somebody has put that the store has not read, what is being made, what is deleted and held."""
    absent, unsealed = ObjectID.from_random(), ObjectID.from_random()

    def asks(object_id: ObjectID, answer: bool) -> None:
        sent.clear()
        assert client.contains(object_id) is answer
        # What was deleted just now is looked for first, and a store that sleeps is told.
        assert kinds(sent) in ([Contains.KIND], [Post.KIND, Contains.KIND])
        assert (client.get(object_id, timeout_ms=0) is not ObjectNotAvailable) is answer

    client2.put("the first one gets a lease")
    client2.flush()
    with stopped(store):
        put = client2.put("unread")
        settling = session_of(client).settling
        assert settling is not None
        assert not settling.are_absent_now((put.binary(),))
        assert not settling.are_absent_now((absent.binary(),))
    assert client.contains(put)
    client2.create(unsealed, 100)
    client2.flush()
    asks(unsealed, False)
    client2.seal(unsealed)
    client2.flush()
    held = client2.get_buffers(unsealed)
    client.delete([unsealed])
    asks(unsealed, True)
    del held
    until(lambda: not client.contains(unsealed), "what was deleted is released")
    sent.clear()
    assert not client.contains(unsealed)
    assert sent == []


@needs_fast_path
@pytest.mark.skipif(system.processors() < 2, reason="on one processor nobody looks")
def test_what_was_put_just_now_is_waited_for(
    client: PlasmaClient, client2: PlasmaClient, sent: list[Frame]
) -> None:
    """The store reads it soon, which takes less than to ask; where others keep it from that for long it is asked."""
    ids = [ObjectID.from_random() for _ in range(90)]
    sent.clear()
    for looked_for, got, deleted in zip(*[iter(ids)] * 3, strict=True):
        client2.create_and_seal(looked_for, b"1")
        assert client.contains(looked_for)
        client2.create_and_seal(got, b"2")
        assert client.get_buffers(got, timeout_ms=0) == b"2"
        client2.create_and_seal(deleted, b"3")
        client.delete([deleted])
    asked = kinds(sent)
    for kind in (Contains.KIND, Get.KIND, Delete.KIND):
        assert asked.count(kind) < len(ids) // 3
    assert [client2.contains(object_id) for object_id in ids] == 30 * [True, True, False]


@needs_fast_path
def test_who_asks_again_and_again_hears_that_the_store_has_gone() -> None:
    """Also of what is not there, for which it sends nothing while the store lives."""
    absent = ObjectID.from_random()
    with Store("1MB") as store, store.connect() as client:
        assert not client.contains(absent)
        store.process.kill()
        store.process.wait()
        with pytest.raises(NotConnectedError):
            client.contains(absent)


# -- deleting ------------------------------------------------------------------------------------


@needs_fast_path
def test_deleting_few_objects_asks_for_nothing(
    client: PlasmaClient, client2: PlasmaClient, sent: list[Frame]
) -> None:
    """At most the store is told to look into the outbox; when that returns, nobody finds them."""
    for count in (1, 8, 24):
        for _ in range(20):
            ids = put_numbers(client2, count)
            sent.clear()
            client.delete(ids)
            assert set(kinds(sent)) <= {Post.KIND}
            assert not any(map(client2.contains, ids))
            assert client.get_buffers(ids, timeout_ms=0) == [None] * count
    assert client.list() == {}
    assert lost_slots(client) == {}


@needs_fast_path
def test_deleting_many_objects_takes_one_message(client: PlasmaClient, sent: list[Frame]) -> None:
    """As many records would take longer."""
    ids = put_numbers(client, 25)
    sent.clear()
    client.delete(ids)
    assert kinds(sent) == [Delete.KIND]
    client.delete([])
    assert kinds(sent) == [Delete.KIND]
    assert client.list() == {}


@needs_fast_path
def test_what_another_one_has_just_put_is_deleted(
    store: Store, client: PlasmaClient, client2: PlasmaClient, sent: list[Frame]
) -> None:
    """Although the store has not read of it: then it is asked to read all that there is before."""
    client2.put("the first one gets a lease")
    client2.flush()
    with stopped(store):
        put = client2.put("unread")
        deleting = threading.Thread(target=client.delete, args=([put],))
        deleting.start()
        until(lambda: Delete.KIND in kinds(sent), "the store is asked")
    deleting.join()
    assert not client2.contains(put)


@needs_fast_path
def test_a_store_that_stands_still_is_not_waited_for(
    store: Store, client: PlasmaClient, client2: PlasmaClient
) -> None:
    """What is deleted is not read without asking, by nobody, and what is not is; nor does anything else go later."""
    ids = put_numbers(client, 3)
    held = client2.get_buffers(ids[1])
    read, other = session_of(client).reader, session_of(client2).reader
    assert read is not None
    assert other is not None
    with stopped(store):
        client.delete(ids[:2])
        client.delete(ids[:2])
        for object_id in ids[:2]:
            for reader in (read, other):
                assert not reader.contains(object_id)
                assert reader.buffer(object_id) is None
                assert reader.locate(object_id) is None
        assert number_in(client2.get_buffers(ids[2])) == 2
    assert client2.list().keys() == set(ids[1:])
    assert number_in(held) == 1
    del held
    until(lambda: client2.list().keys() == {ids[2]}, "what was deleted is released")


@needs_fast_path
def test_a_full_outbox_is_waited_for(store: Store, client: PlasmaClient) -> None:
    """Where the store stands still for long; an interrupt ends that at once, and what was deleted before goes."""
    ids = put_numbers(client, PLACES + 2)

    def delete(some: list[ObjectID]) -> None:
        for object_id in some:
            client.delete(object_id)

    with stopped(store):
        deleting = threading.Thread(target=delete, args=(ids[:-1],))
        deleting.start()
        deleting.join(0.5)
        assert deleting.is_alive()
    deleting.join()
    assert list(client.list()) == ids[-1:]

    ids = put_numbers(client, PLACES + 1)
    # Where tests run in the background SIGINT is ignored, so another signal raises KeyboardInterrupt.
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    interrupt = threading.get_ident(), signal.SIGUSR1
    timer = threading.Timer(0.5, signal.pthread_kill, interrupt)
    try:
        with stopped(store):
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                delete(ids)
            timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not any(map(client.contains, ids[:PLACES]))
    client.delete(ids)
    assert lost_slots(client) == {}


@needs_fast_path
def test_what_was_deleted_can_be_created_anew(client: PlasmaClient, client2: PlasmaClient) -> None:
    """By whoever knows of it, at once, and however often; nobody finds what was there before."""
    object_id = ObjectID.from_random()
    for number in range(50):
        for one, other in ((client, client2), (client2, client2), (client, client)):
            one.put(number, object_id)
            assert other.get(object_id) == number
            one.delete(object_id)
            assert not other.contains(object_id)
    assert client.list() == {}


@needs_fast_path
def test_room_of_what_was_deleted_is_there_at_once() -> None:
    """Nothing is evicted for an object that another client creates, nor is it refused."""
    with Store("8MB") as store, store.connect() as client, store.connect() as other:
        kept = client.put_raw_buffer(bytes(1 << 20))
        large = client.put_raw_buffer(bytes(6 << 20))
        for _ in range(10):
            client.delete(large)
            large = other.put_raw_buffer(bytes(6 << 20))
            other.delete(large)
            large = client.put_raw_buffer(bytes(6 << 20))
        assert client.contains(kept)


# -- threads and the collector -------------------------------------------------------------------


def test_threads_share_a_client(client: PlasmaClient) -> None:
    """Threads that read through one client all get what they asked for, and lose no slot."""
    ids = put_numbers(client, 300)
    n_threads = 4
    together = threading.Barrier(n_threads)

    def read(seed: int) -> int:
        rng = random.Random(seed)
        together.wait()
        wrong = 0
        for _ in range(300):
            numbers = rng.sample(range(300), 5)
            buffers = client.get_buffers([ids[number] for number in numbers])
            wrong += [number_in(buffer) for buffer in buffers] != numbers
            wrong += not client.contains(ids[numbers[0]])
        return wrong

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            assert list(pool.map(read, range(n_threads))) == [0] * n_threads
    finally:
        sys.setswitchinterval(interval)
    assert lost_slots(client) == {}
    assert ref_counts(client) == {0: 300}


class Cycle:
    """Keeps something until the collector comes."""

    def __init__(self, kept: object) -> None:
        self.kept = kept
        self.me = self


def test_the_collector_releases_inside_a_get(client: PlasmaClient) -> None:
    """Buffers that the collector finds in the middle of a get are released, and no slot is lost."""
    ids = put_numbers(client, 50)
    threshold = gc.get_threshold()
    gc.collect()
    gc.set_threshold(7, 2, 2)
    try:
        for turn in range(100):
            for number, buffer in enumerate(client.get_buffers(ids)):
                assert number_in(buffer) == number, turn
                Cycle(buffer)
            del buffer
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert lost_slots(client) == {}
    assert ref_counts(client) == {0: 50}


def test_the_collector_releases_in_any_thread(client: PlasmaClient) -> None:
    """Garbage that one thread leaves is released by another one that collects it."""
    ids = put_numbers(client, 50)
    gc.disable()
    try:
        for buffer in client.get_buffers(ids):
            Cycle(buffer)
        del buffer
        assert ref_counts(client) == {1: 50}
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()
    finally:
        gc.enable()
    assert lost_slots(client) == {}
    assert ref_counts(client) == {0: 50}


# -- releases that somebody waits for ------------------------------------------------------------


@needs_fast_path
@pytest.mark.parametrize("holders", [1, 2])
def test_a_release_wakes_the_store(
    client: PlasmaClient, client2: PlasmaClient, sent: list[Frame], holders: int
) -> None:
    """What was deleted while it was held goes at the last release, without a message from anybody."""
    (object_id,) = put_numbers(client, 1)
    buffers = [holder.get_buffers(object_id) for holder in (client, client2)[:holders]]
    words = session_of(client).attachment.words

    def store_waits() -> bool:
        return bool(words[HeaderWord.WAKE])

    assert not store_waits()
    client2.delete(object_id)
    assert client.contains(object_id)
    sent.clear()
    while buffers:
        assert store_waits(), "it went while it was held"
        assert number_in(buffers[-1]) == 0
        del buffers[-1]
    until(lambda: not store_waits(), "the store waits no more")
    assert sent == []
    assert not client.contains(object_id)


@needs_fast_path
def test_releases_wake_the_store_no_more_often_than_it_looks(
    store: Store, client: PlasmaClient, client2: PlasmaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody waits for a release, those that he does not wait for cost nobody a system call each."""
    held, hot = put_numbers(client, 2)
    buffer = client.get_buffers(held)
    client2.delete(held)
    words = session_of(client).attachment.words
    until(lambda: words[HeaderWord.WAKE], "the store waits for the release")
    wake_ups: list[int] = []
    write = os.write

    def note_and_write(fd: int, data: bytes) -> int:
        wake_ups.append(fd)
        return write(fd, data)

    monkeypatch.setattr(os, "write", note_and_write)
    with stopped(store):
        for _ in range(1000):
            client.get_buffers(hot)
        assert len(wake_ups) <= 1
        del buffer
    until(lambda: not words[HeaderWord.WAKE], "the store waits no more")
    assert not client.contains(held)


# -- order ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("spawning")
@pytest.mark.parametrize("count", [2000])
def test_a_negative_answer_comes_last(count: int) -> None:
    """What one process has put before it tells another one is found by that one, every time."""
    nothing = hammer_order.Misses(contains=0, get=0, listed=0, deleted=0)
    assert hammer_order.run(count, n_writers=1) == nothing


@needs_fast_path
def test_what_was_told_past_the_outbox_is_heard_before_a_list(
    store: Store, client: PlasmaClient, sent: list[Frame]
) -> None:
    """As a finalizer tells it that comes in the middle of a record: whoever lists objects asks, as the segment says nothing of it."""
    object_id = ObjectID.from_random()
    client.create(object_id, 100)
    client.flush()
    session = session_of(client)
    with stopped(store), session._link._outbox._lock:
        session.post_soon(Abort.KIND, object_id.id_bytes)
    sent.clear()
    assert object_id not in client.list()
    assert kinds(sent) == [List.KIND]


@needs_fast_path
def test_the_end_of_a_reference_is_told_at_once(
    store: Store,
    client: PlasmaClient,
    sent: list[Frame],
) -> None:
    """A store that does not look by itself is told that there is a record, though nobody asks it anything."""
    with store.connect() as subscriber:
        subscriber.subscribe()
        ref = client.put_ref("owned")
        words = session_of(client).attachment.words
        until(lambda: not words[HeaderWord.POLLED], "the store does not look by itself")
        sent.clear()
        del ref
        gc.collect()
        assert kinds(sent) == [Post.KIND]
