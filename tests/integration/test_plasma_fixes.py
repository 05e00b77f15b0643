from __future__ import annotations

import ctypes
import gc
import mmap
import multiprocessing
import os
import pickle
import random
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import shmplasma as plasma
from shmplasma.attachment import Attachment
from shmplasma.layout import BOARD_BYTES, BOARD_WORDS
from shmplasma.pins import slots_of
from shmplasma.posted import Abort, Detach, Publish, Seal
from shmplasma.protocol import MAX_REQUEST_BYTES, PROTOCOL_VERSION, encode_frame
from shmplasma.replies import Created, Done, Failed, Failure, Number, Objects, Welcome
from shmplasma.requests import (
    AnswerNow,
    Contains,
    Create,
    Debug,
    Delete,
    Evict,
    Get,
    Hello,
    List,
    Request,
    Role,
)
from shmplasma.segment_name import SegmentName
from shmplasma.transport import Channel
from tests.attacker import Attacker
from tests.clients import MISSING, figure, new_id
from tests.processes import Child, in_forked_child, run_python, until, wait_until_asleep

GIGANTIC = [1 << 32, 1 << 48, 1 << 62, (1 << 63) - 64, (1 << 63) - 1]


def serves(client: plasma.PlasmaClient) -> bool:
    """Tell whether the store still does all that this client may want."""
    object_id = client.put_raw_buffer(b"works on")
    assert bytes(client.get_buffers(object_id)) == b"works on"
    client.delete([object_id])
    return not client.contains(object_id)


@contextmanager
def running(task: Callable[[], object]) -> Iterator[threading.Thread]:
    """Run a task in a thread; it has to end by itself after the block, and well."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            task()
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield thread
    thread.join()
    if failures:
        raise failures[0]


def collect(results: list[Any], task: Callable[[], object]) -> None:
    """Add what a task returns to a list."""
    results.append(task())


def attack(store: plasma.Store, task: Callable[[Attacker], object]) -> None:
    """Let a child process do something to the store over a raw connection.

    A child, because a client that was dropped keeps what it was given until its process ends.
    """

    def run() -> None:
        with Attacker(store.store_socket_name) as attacker:
            task(attacker)

    assert in_forked_child(run) == 0


# --- what the store died of -------------------------------------------------------------------------


def test_a_blocked_get_of_the_same_object_twice(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """A get that waits for an object under two positions is answered for both when it is sealed."""
    object_id = new_id()
    got: list[Any] = []
    with running(lambda: got.extend(client2.get([object_id, object_id]))) as thread:
        assert serves(client)
        assert thread.is_alive()
        client.put("twice", object_id)
    assert got == ["twice", "twice"]
    assert serves(client)


@pytest.mark.parametrize("size", [-1, -64, -(1 << 63), -(1 << 70)])
def test_negative_sizes(client: plasma.PlasmaClient, size: int) -> None:
    """A negative size is refused in the client already."""
    with pytest.raises(ValueError, match=str(size)):
        client.create(MISSING, size)
    assert MISSING not in client.list()


@pytest.mark.parametrize("size", [*GIGANTIC, 1 << 63, 1 << 64, 1 << 100])
def test_gigantic_sizes(client: plasma.PlasmaClient, size: int) -> None:
    """A size that no machine has is a full store like any other."""
    for metadata in (b"", b"metadata"):
        with pytest.raises(plasma.PlasmaStoreFull):
            client.create(MISSING, size, metadata)
    assert MISSING not in client.list()
    assert serves(client)


@pytest.mark.parametrize("size", [-1, -64, -(1 << 31), -(1 << 63)])
@pytest.mark.parametrize("negative", ["data", "metadata", "both"])
def test_negative_sizes_in_messages(
    store: plasma.Store, client: plasma.PlasmaClient, size: int, negative: str
) -> None:
    """Who sends a negative size is dropped, also if the sum would do."""
    data = size if negative != "metadata" else 1 << 20
    metadata = size if negative != "data" else 1 << 20

    def ask(attacker: Attacker) -> None:
        slot = slots_of(attacker.enter().board)[0]
        attacker.post(Create(MISSING.binary(), data, metadata, 0, slot))
        assert attacker.is_dropped()

    attack(store, ask)
    assert serves(client)


@pytest.mark.parametrize("data", GIGANTIC)
@pytest.mark.parametrize("metadata", [0, 1, 64, (1 << 63) - 1])
def test_gigantic_sizes_in_messages(store: plasma.Store, data: int, metadata: int) -> None:
    """Sums that no 64 bits hold are refused for want of room; the connection goes on."""
    with Attacker(store.store_socket_name) as attacker:
        slot = slots_of(attacker.enter().board)[0]
        failed = attacker.ask(Create(MISSING.binary(), data, metadata, 0, slot), Failed)
        assert failed.failure is Failure.FULL
        created = attacker.ask(Create(MISSING.binary(), 64, 0, 0, slot), Created)
        assert created.offset > 0


def header(length: int, kind: int = Debug.KIND, request_id: int = 1, zeros: int = 0) -> bytes:
    """Return the header of a frame, true or not."""
    return struct.pack("<IIHH", length, request_id, kind, zeros)


NO_FRAMES = {
    "garbage": random.Random(1).randbytes(10_000),
    "text": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "ones": 100 * b"\xff",
    "absurd length": header(0xFFFF_FFFF),
    "length beyond the limit": header(MAX_REQUEST_BYTES + 1),
    "no zeros": header(0, zeros=1),
    "unknown kind": encode_frame(9999, 1, b""),
    "a reply": encode_frame(Welcome.KIND, 1, bytes(40)),
    "kind 0": encode_frame(0, 1, b""),
    "body where none is": encode_frame(Debug.KIND, 1, b"body"),
    "no body where one is": encode_frame(Create.KIND, 1, b""),
    "short id": encode_frame(Contains.KIND, 1, 19 * b"a"),
    "get of too many": encode_frame(Get.KIND, 1, struct.pack("<?I", True, 0xFFFF_FFFF)),
    "get of neither": encode_frame(Get.KIND, 1, struct.pack("<BI", 2, 0)),
    "half an evict": encode_frame(Evict.KIND, 1, bytes(7)),
    "publish without a lease": encode_frame(
        Publish.KIND, 0, Publish(20 * b"p", 1 << 40, 64, 0, 0).encode()
    ),
    "foreign slot": encode_frame(Create.KIND, 1, Create(20 * b"s", 1, 0, 0, 0xFFFF_FFFF).encode()),
    "get into a foreign slot": encode_frame(Get.KIND, 1, Get(False, [20 * b"s"], [1]).encode()),
    "get into no slot": encode_frame(Get.KIND, 1, Get(False, [20 * b"s"], [0]).encode()),
    "one-way get": encode_frame(Get.KIND, 0, Get(False, [], []).encode()),
}


@pytest.mark.parametrize("data", NO_FRAMES.values(), ids=NO_FRAMES)
@pytest.mark.parametrize("known", [False, True])
def test_what_is_no_message(
    store: plasma.Store, client: plasma.PlasmaClient, data: bytes, known: bool
) -> None:
    """Whatever is no message, or not at this point, costs its sender the connection, and only that."""
    pinned = client.get_buffers(client.put_raw_buffer(b"held"))

    def say(attacker: Attacker) -> None:
        if known:
            attacker.enter()
        with suppress(BrokenPipeError, ConnectionResetError):  # it may be dropped in the middle
            attacker.send(data)
        assert attacker.is_dropped()

    attack(store, say)
    assert serves(client)
    assert bytes(pinned) == b"held"


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1, 0xFFFF])
def test_another_version(store: plasma.Store, client: plasma.PlasmaClient, version: int) -> None:
    """A client of another protocol version is told so, with the remedy, and dropped."""
    with Attacker(store.store_socket_name) as attacker:
        failed = attacker.ask(attacker.hello(version=version), Failed)
        assert failed.failure is Failure.VERSION
        assert str(version) in failed.text
        assert "same release" in failed.text
        assert attacker.is_dropped()
    assert serves(client)


def test_requests_before_the_introduction(store: plasma.Store, client: plasma.PlasmaClient) -> None:
    """Who asks before the introduction, introduces itself twice, or subscribes and asks is dropped."""
    hello = Hello(PROTOCOL_VERSION, Role.CLIENT, "attacker")
    subscriber = Hello(PROTOCOL_VERSION, Role.SUBSCRIBER, "attacker")
    conversations: list[list[Request]] = [
        [Debug()],
        [hello, hello],
        [subscriber, Debug()],
    ]
    for said in conversations:

        def say(attacker: Attacker, said: list[Request] = said) -> None:
            attacker.send(b"".join(map(attacker.frame, said)))
            assert attacker.is_dropped()

        attack(store, say)
    assert serves(client)


def test_requests_after_the_leave(store: plasma.Store, client: plasma.PlasmaClient) -> None:
    """What a client that has left may still say changes nothing, and holds up nobody."""
    unsealed, there = new_id(), client.put_raw_buffer(b"there")

    def say(attacker: Attacker) -> None:
        slot = slots_of(attacker.enter().board)[0]
        attacker.ask(Detach(), Done)
        with suppress(BrokenPipeError, ConnectionResetError):  # to drop it would be an answer too
            attacker.post(Create(unsealed.binary(), 64, 0, 0, slot))
            attacker.post(Delete([there.binary()]))
        assert serves(client)

    attack(store, say)
    assert set(client.list()) == {there}


def test_releases_that_nobody_expects(
    store: plasma.Store, client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """Whatever a client writes to its board, or aborts and seals at random, the others keep their pins."""
    held = client.put_raw_buffer(b"held")
    buffer = client2.get_buffers(held)

    def scribble(attacker: Attacker) -> None:
        welcome = attacker.enter()
        kind: Any = welcome.segment_kind
        attachment = Attachment.open(SegmentName(kind, welcome.segment_path), welcome.token)
        board = attachment.board(welcome.board)
        for word in (0, 1, 2, (1 << 64) - 1, 1 << 63, attachment.layout.n_entries + 1):
            board[:] = memoryview(struct.pack("@Q", word) * BOARD_WORDS).cast("Q")
            for message in (Abort, Seal):
                for object_id in (held, MISSING):
                    attacker.ask(message(object_id.binary()), Failed)
            assert attacker.ask(Contains(held.binary()), Number).value == 1
            assert client.evict(10**9) == 0
            assert client.list()[held]["ref_count"] >= 1
        attacker.post(Get(False, [held.binary()], [slots_of(welcome.board)[0]]))

    attack(store, scribble)
    assert bytes(buffer) == b"held"
    assert serves(client)
    del buffer
    until(lambda: client.evict(10**9) == 4, "nobody holds the object any more")


def test_a_client_that_leaves_in_the_middle(
    store: plasma.Store, client: plasma.PlasmaClient
) -> None:
    """A connection may end at any byte of a conversation."""
    with Attacker(store.store_socket_name) as attacker:
        whole = attacker.frame(attacker.hello()) + attacker.frame(Debug())
    for length in range(len(whole) + 1):
        with Attacker(store.store_socket_name) as attacker:
            attacker.send(whole[:length])
    assert serves(client)
    until(lambda: client.debug_string().count("(pid ") == 1, "all of them are forgotten")


def test_a_forked_child_that_drops_a_buffer(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """A child's end of what it inherited changes nothing for its parent."""
    object_id = client.put_raw_buffer(bytes(1000))
    held = [client.get_buffers(object_id)]

    def drop_and_leave() -> None:
        assert bytes(held.pop()) == bytes(1000)
        gc.collect()

    assert in_forked_child(drop_and_leave) == 0
    assert client2.list()[object_id]["ref_count"] == 1
    assert client2.evict(10**9) == 0
    assert bytes(held[0]) == bytes(1000)
    assert serves(client)


# --- what the store stood still on ------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
def test_half_a_message(store: plasma.Store, client: plasma.PlasmaClient, known: bool) -> None:
    """Half a message holds up nobody, and counts once its other half has come."""
    with ExitStack() as stack:
        attackers = [stack.enter_context(Attacker(store.store_socket_name)) for _ in range(50)]
        for number, attacker in enumerate(attackers):
            if known:
                attacker.enter()
                whole = attacker.frame(Contains(MISSING.binary()))
            else:
                whole = attacker.frame(attacker.hello())
            cut = number % (len(whole) - 1) + 1
            attacker.send(whole[:cut])
            assert serves(client)
            stack.callback(attacker.reply, Number if known else Welcome)
            stack.callback(attacker.send, whole[cut:])


def test_a_client_that_asks_and_never_reads(
    store: plasma.Store, client: plasma.PlasmaClient
) -> None:
    """Who never reads is dropped at some point; until then and after it all others are served."""
    ids = [client.put_raw_buffer(b"") for _ in range(4000)]

    def ask(attacker: Attacker) -> None:
        attacker.enter()
        attacker.sock.setblocking(False)
        questions = b"".join(attacker.frame(List(0)) for _ in range(100))

        def is_dropped() -> bool:
            try:
                attacker.sock.send(questions)
            except BlockingIOError:
                pass
            except (BrokenPipeError, ConnectionResetError):
                return True
            return not serves(client)

        until(is_dropped, "the store drops who does not read")

    attack(store, ask)
    assert serves(client)
    assert set(client.list()) == set(ids)


def test_a_subscriber_that_never_reads(store: plasma.Store, client: plasma.PlasmaClient) -> None:
    """A subscriber that does not keep up does not hold up those who store."""
    with Attacker(store.store_socket_name) as attacker:
        attacker.ask(attacker.hello(role=Role.SUBSCRIBER), Welcome)
        for _ in range(5000):
            client.put_raw_buffer(b"")
        assert serves(client)


def test_subscribing_twice(client: plasma.PlasmaClient, client2: plasma.PlasmaClient) -> None:
    """A second subscription begins anew, and the store serves on."""
    object_id = client.put_raw_buffer(b"1")
    for _ in range(3):
        client2.subscribe()
        assert client2.get_next_notification() == (object_id, 1, 0)
    other = client.put_raw_buffer(b"22")
    assert client2.get_next_notification() == (other, 2, 0)
    assert serves(client)


STORE_PROGRAM = str(Path(sys.executable).with_name("shmplasma-store"))


@contextmanager
def store_program(
    *arguments: str, open_files: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run the console script until the end of the block; it is ready to serve."""

    def limit() -> None:
        if open_files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

    with subprocess.Popen(
        [STORE_PROGRAM, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,  # noqa: PLW1509 - no other thread of Python's runs here
    ) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()
            assert "ready:" in said, said
            # Nobody reads on, and a full pipe would hold up the store.
            drain = threading.Thread(target=process.stderr.read)
            drain.start()
            yield process
        finally:
            process.terminate()
            process.wait()
        drain.join()


def test_descriptors_that_are_there_again(tmp_path: Path) -> None:
    """Whoever waits to be accepted is, though another client goes on talking."""
    path = str(tmp_path / "s")
    with store_program("-m", "1MB", "-s", path) as process, plasma.connect(path) as client:
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        used = len(os.listdir(f"/proc/{process.pid}/fd"))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (used, hard))
        with Attacker(path) as late:
            late.post(late.hello())
            for _ in range(20):
                assert serves(client)
            assert not select.select([late.sock], [], [], 0)[0]
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (soft, hard))

            def is_served() -> bool:
                client.flush()
                return bool(select.select([late.sock], [], [], 0)[0])

            until(is_served, "it is served")
            late.reply(Welcome)


def test_no_descriptors_left(tmp_path: Path) -> None:
    """Who is connected is served although nobody else can be accepted; the others come in later."""
    path = str(tmp_path / "s")
    with store_program("-m", "1MB", "-s", path, open_files=32), plasma.connect(path) as client:
        with ExitStack() as stack:
            attackers = [stack.enter_context(Attacker(path)) for _ in range(60)]
            for attacker in attackers:
                attacker.post(attacker.hello())
            for _ in range(3):
                assert serves(client)
            accepted = set(select.select([a.sock for a in attackers], [], [], 0)[0])
            waiting = [a for a in attackers if a.sock not in accepted]
            assert waiting
            while waiting:
                assert serves(client)
                for attacker in attackers:
                    if attacker not in waiting:
                        attacker.reply(Welcome)
                        attacker.close()
                attackers = waiting
                ready = set(select.select([a.sock for a in waiting], [], [], 60)[0])
                assert ready, "nobody is accepted although descriptors are free"
                waiting = [a for a in attackers if a.sock not in ready]
        with plasma.connect(path, 0) as late:
            assert serves(late)


# --- wrong results ----------------------------------------------------------------------------------


def test_a_get_with_duplicates_waits_for_what_is_missing(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """Duplicates of what is there do not stand for what is missing."""
    there, late = client.put("there"), new_id()
    got: list[Any] = []
    with running(lambda: got.extend(client2.get([there, there, late], 60_000))) as thread:
        assert serves(client)
        assert thread.is_alive()
        client.put("late", late)
    assert got == ["there", "there", "late"]
    assert client.get([there, there, MISSING], 20) == ["there", "there", plasma.ObjectNotAvailable]


def test_a_get_of_nothing_at_all(client: plasma.PlasmaClient) -> None:
    """A value of zero bytes is a value."""
    object_id = new_id()
    client.create(object_id, 0)
    client.seal(object_id)
    value = client.get(object_id, timeout_ms=0)
    assert value is not plasma.ObjectNotAvailable
    assert value.size == 0
    assert client.get(client.put(b""), 0) == b""


def test_ones_own_unsealed_object_is_not_there(client: plasma.PlasmaClient) -> None:
    """Not even its creator finds an object before it is sealed."""
    object_id = new_id()
    buffer = client.create(object_id, 10)
    assert not client.contains(object_id)
    assert client.get(object_id, 0) is plasma.ObjectNotAvailable
    assert client.get_buffers([object_id], 20) == [None]
    client.seal(object_id)
    del buffer
    assert client.contains(object_id)


@pytest.mark.parametrize("state", ["missing", "unsealed", "held", "evicted"])
def test_a_delete_concerns_no_later_object(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient, state: str
) -> None:
    """An object under an id that was deleted before, whatever there was then, stays."""
    object_id = new_id()
    buffer = None
    if state == "unsealed":
        buffer = client.create(object_id, 10)
    elif state in {"held", "evicted"}:
        client.put_raw_buffer(b"before", object_id)
    if state == "held":
        buffer = client.get_buffers(object_id)
    elif state == "evicted":
        assert client.evict(10**9) == 6
    client2.delete([object_id])
    if state == "unsealed":
        client.abort(object_id)
    del buffer
    until(lambda: object_id not in client.list(), "the earlier object has gone")
    client2.put_raw_buffer(b"after", object_id)
    for each in (client, client2):
        for _ in range(3):
            assert bytes(each.get_buffers(object_id, 0)) == b"after"
    gc.collect()
    assert client.contains(object_id)


def test_what_was_evicted_and_deleted_is_gone(client: plasma.PlasmaClient) -> None:
    """Nothing brings an object back."""
    object_id = client.put_raw_buffer(b"1")
    client.evict(1)
    client.delete([object_id])
    assert client.get_buffers([object_id], 20) == [None]
    assert not client.contains(object_id)
    assert object_id not in client.list()


@pytest.mark.parametrize("how", ["disconnect", "forget", "both"])
def test_a_buffer_outlives_its_client(
    store: plasma.Store, client: plasma.PlasmaClient, how: str
) -> None:
    """What a client has got keeps its contents after the client, while others fill the store."""
    value = np.random.default_rng(1).integers(0, 1 << 60, 100_000)
    object_id = client.put(value)
    reader = store.connect()
    buffer, array = reader.get_buffers(object_id), reader.get(object_id)
    if how != "forget":
        reader.disconnect()
    if how != "disconnect":
        del reader
        gc.collect()
    for number in range(60):
        client.put_raw_buffer(number.to_bytes() * 5_000_000)
    assert (array == value).all()
    assert buffer.equals(client.get_buffers(object_id))
    client.delete([object_id])
    assert client.contains(object_id)
    del buffer, array
    until(lambda: not client.contains(object_id), "the last buffer's end is noticed")


def test_a_buffer_outlives_its_store() -> None:
    """A buffer keeps its contents when the store has ended, or was killed."""
    for end in ("terminate", "kill"):
        with plasma.Store("10MB") as store, store.connect() as client:
            array = client.get(client.put(np.arange(100_000)))
            getattr(store.process, end)()
            store.process.wait()
        assert (array == np.arange(100_000)).all()


@pytest.mark.parametrize("limit", [-1, -(1 << 63), 1 << 64])
def test_a_quota_that_makes_no_sense(client: plasma.PlasmaClient, limit: int) -> None:
    """A negative quota is refused, and changes nothing."""
    with pytest.raises(ValueError, match=str(limit)):
        client.set_client_options("name", limit)
    assert serves(client)


def test_an_object_without_an_id(client: plasma.PlasmaClient) -> None:
    """An id is needed, and None is none."""
    nothing: Any = None
    with pytest.raises(TypeError, match="ObjectID"):
        client.create(nothing, 10)
    assert not client.list()


@pytest.mark.parametrize(
    "value",
    [
        np.arange(12).reshape(3, 4),
        np.arange(12, dtype=np.float32).reshape(2, 3, 2),
        np.ones((0, 5)),
        np.arange(6, dtype=np.int16).reshape(2, 3).data,
        np.array(5.0),
    ],
    ids=["2-D", "3-D", "empty", "view", "0-D"],
)
def test_raw_buffers_of_any_shape(client: plasma.PlasmaClient, value: Any) -> None:
    """All bytes of an array are stored, whatever its shape and item size."""
    object_id, other = client.put_raw_buffer(value), new_id()
    client.create_and_seal(other, value)
    for each in (object_id, other):
        assert bytes(client.get_buffers(each)) == value.tobytes()


# --- what the client's process died of --------------------------------------------------------------


def test_getting_ones_own_unsealed_object(client: plasma.PlasmaClient) -> None:
    """A get without a timeout waits until another thread of the creator seals the object."""
    object_id = new_id()
    target = client.create(object_id, 3)
    got: list[bytes] = []
    with running(lambda: got.append(bytes(client.get_buffers(object_id)))) as thread:
        assert serves(client)
        assert thread.is_alive()
        memoryview(target).cast("B")[:] = b"own"
        client.seal(object_id)
    assert got == [b"own"]


def test_releasing_twice(client: plasma.PlasmaClient) -> None:
    """However often and in whatever order views are released, an object is released once."""
    object_id = client.put_raw_buffer(b"1234")
    buffer = client.get_buffers(object_id)
    view, other = memoryview(buffer), memoryview(buffer)
    for _ in range(2):
        view.release()
    del buffer
    assert client.evict(10**9) == 0
    assert bytes(other) == b"1234"
    for _ in range(2):
        other.release()
    assert client.evict(10**9) == 4


# --- waiting ----------------------------------------------------------------------------------------


def test_a_blocked_get_holds_up_no_other_thread(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """While threads of a client wait, its other threads do whatever they like."""
    ids = [new_id() for _ in range(5)]
    got: list[Any] = []
    with ExitStack() as stack:
        timeouts = (-1, 60_000, -1, 60_000, -1)
        waits = [partial(client.get, *each) for each in zip(ids, timeouts, strict=True)]
        threads = [stack.enter_context(running(partial(collect, got, wait))) for wait in waits]
        for _ in range(50):
            assert serves(client)
            assert client.get(MISSING, 0) is plasma.ObjectNotAvailable
            assert client.get([MISSING], 1) == [plasma.ObjectNotAvailable]
        assert all(thread.is_alive() for thread in threads)
        for number, object_id in enumerate(reversed(ids)):
            (client, client2)[number % 2].put(object_id.binary(), object_id)
    assert sorted(got) == sorted(object_id.binary() for object_id in ids)


def test_a_reply_that_comes_before_anybody_waits() -> None:
    """A reply that the reading thread has delivered before its own thread asks for it is not lost."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    bodies: list[bytes] = []

    def wait(request_id: int) -> None:
        frame = channel.wait(request_id, None)
        assert frame is not None
        bodies.append(frame.body)

    with ours, theirs:
        first, second, third = (channel.new_request() for _ in range(3))
        for request_id in (first, second, third):
            channel.request(Debug.KIND, request_id, b"", [])
        with running(partial(wait, first)):
            with running(partial(wait, third)):
                theirs.send(encode_frame(Number.KIND, second, b"second"))
                theirs.send(encode_frame(Number.KIND, third, b"third"))
            # The third is there, hence the second too, and another thread goes on reading.
            with running(partial(wait, second)) as thread:
                thread.join(10)
                theirs.send(encode_frame(Number.KIND, first, b"first"))
    assert bodies == [b"third", b"second", b"first"]


INTERRUPTED = """
    import sys, threading
    import shmplasma as plasma

    path, missing, there, how = sys.argv[1:]
    missing, there = plasma.ObjectID(bytes.fromhex(missing)), plasma.ObjectID(bytes.fromhex(there))
    client = plasma.connect(path)
    other = threading.Thread(target=client.get, args=(plasma.ObjectID(20 * b"o"),))
    if how == "follower":
        other.start()
        client.put(1, plasma.ObjectID(20 * b"f"))  # the reply comes by way of the other thread
    if how == "notification":
        client.subscribe()
        client.get_next_notification()
    print("waits", flush=True)
    try:
        if how == "timed":
            client.get([there, missing], timeout_ms=10**7)
        elif how == "buffers":
            client.get_buffers([there, missing])
        elif how == "notification":
            client.get_next_notification()
        else:
            client.get([there, missing])
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    assert sys.stdin.readline() == "go on\\n"
    for number in range(100):
        object_id = client.put(number)
        assert client.get(object_id) == number
        assert client.get([missing], timeout_ms=1) == [plasma.ObjectNotAvailable]
        client.delete([object_id])
    print("works on", flush=True)
    sys.stdin.readline()
    if how == "follower":
        other.join()
"""


@pytest.mark.parametrize("how", ["get", "timed", "buffers", "follower", "notification"])
def test_ctrl_c_ends_a_wait(store: plasma.Store, client: plasma.PlasmaClient, how: str) -> None:
    """An interrupt ends a wait at once; the client goes on, and holds nothing that it did not get."""
    missing, there = new_id(), client.put_raw_buffer(b"there")
    ids = [object_id.binary().hex() for object_id in (missing, there)]
    with Child(INTERRUPTED, store.store_socket_name, *ids, how) as child:
        assert child.hear() == "waits"
        wait_until_asleep(child.process.pid)
        child.process.send_signal(signal.SIGINT)
        assert child.hear() == "interrupted"
        until(lambda: figure(client, "pinned objects") == 0, "nothing is pinned")
        child.say("go on")
        assert child.hear() == "works on"
        client.put_raw_buffer(b"late", missing)
        assert figure(client, "pinned objects") == 0
        assert client.list()[missing]["ref_count"] == 0
        client.put(0, plasma.ObjectID(20 * b"o"))
        child.say()
        assert child.end() == 0


MANY_INTERRUPTS = """
    import gc, random, signal, sys
    import shmplasma as plasma

    # An interrupt inside a finalizer is swallowed by the interpreter, hence the next one 20 ms later.
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    client = plasma.connect(sys.argv[1])
    missing = plasma.ObjectID(20 * b"m")

    def use():
        object_id = client.put_raw_buffer(b"some bytes")
        assert bytes(client.get_buffers(object_id)) == b"some bytes"
        client.get([missing], timeout_ms=1)
        client.delete([object_id])
        mine = plasma.ObjectID.from_random()
        client.create(mine, 100)
        client.abort(mine)
        client.put(b"under its own id", mine)

    def use_until_interrupted(seconds):
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, 0.02)
            while True:
                use()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    source = random.Random(1)
    for _ in range(100):
        try:
            use_until_interrupted(source.uniform(1e-5, 3e-3))
        except KeyboardInterrupt:
            pass
    use()
    for object_id, info in client.list().items():
        if info["state"] == "created":
            client.abort(object_id)
    print("survived", flush=True)
    sys.stdin.readline()
"""


def test_a_client_that_is_interrupted_again_and_again(
    store: plasma.Store, client: plasma.PlasmaClient
) -> None:
    """Interrupts at any point of any call leave a client that works, and nothing pinned when it leaves."""
    with Child(MANY_INTERRUPTS, store.store_socket_name) as child:
        assert child.hear() == "survived"
        child.say()
        assert child.end() == 0
    until(lambda: figure(client, "pinned objects") == 0, "nothing is pinned")


# --- protection -------------------------------------------------------------------------------------


def test_readers_cannot_write(client: plasma.PlasmaClient) -> None:
    """No way that Python offers leads to a writable view of a sealed object."""
    buffer = client.get_buffers(client.put_raw_buffer(bytes(100)))
    array = client.get(client.put(np.arange(100)))
    for view in (memoryview(buffer), memoryview(array)):
        assert view.readonly
        with pytest.raises(TypeError):
            view[0] = 1
    for each in (np.frombuffer(buffer, np.uint8), array):
        with pytest.raises(ValueError, match="read-only"):
            each[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            each.setflags(write=True)
    with pytest.raises((TypeError, BufferError)):
        (ctypes.c_char * 100).from_buffer(buffer)


def test_a_stray_write_hits_the_writer(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """A write to the address of a reader's buffer kills the process that does it, and nothing else."""
    object_id = client.put_raw_buffer(b"precious")
    buffer = client2.get_buffers(object_id)
    code = in_forked_child(lambda: ctypes.memset(buffer.address, 0, 1))
    assert code in {-signal.SIGSEGV, -signal.SIGBUS}
    assert bytes(buffer) == b"precious"
    assert serves(client)
    assert client.hash(object_id) == client2.hash(object_id)


def test_a_wild_write_hits_no_other_part(client: plasma.PlasmaClient) -> None:
    """Below and above a reader's buffer there is nothing writable either: tables cannot be hit."""
    buffer = client.get_buffers(client.put_raw_buffer(bytes(100)))
    for distance in (-mmap.PAGESIZE, -64, 64, mmap.PAGESIZE, BOARD_BYTES * 100):
        code = in_forked_child(partial(ctypes.memset, buffer.address + distance, 0, 1))
        assert code in {-signal.SIGSEGV, -signal.SIGBUS}
    assert serves(client)


# --- processes --------------------------------------------------------------------------------------


def test_a_forked_child_has_a_connection_of_its_own(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """A child uses the inherited client as its own: other connection, other pins, other objects."""
    object_id, from_child, unsealed = client.put("from the parent"), new_id(), new_id()
    buffer = client.get_buffers(object_id)
    writing = client.create(unsealed, 10)

    def use() -> None:
        assert client.get(object_id) == "from the parent"
        mine = client.get_buffers(object_id)
        # The parent, what was inherited from it, and the child's own client.
        assert client.list()[object_id]["ref_count"] == 3
        with pytest.raises(plasma.PlasmaObjectNotFound):
            client.seal(unsealed)
        client.put("from the child", from_child)
        del mine
        client.disconnect()
        client.disconnect()

    assert in_forked_child(use) == 0
    assert client.get(from_child) == "from the child"
    assert client2.list()[object_id]["ref_count"] == 1
    assert client2.list()[unsealed]["state"] == "created"
    client.seal(unsealed)
    del buffer, writing
    assert client2.list()[object_id]["ref_count"] == 0


def test_parent_and_child_at_the_same_time(client: plasma.PlasmaClient) -> None:
    """Parent and children that work at the same time do not take each other's replies."""

    def work() -> None:
        for number in range(200):
            assert client.get(client.put((os.getpid(), number))) == (os.getpid(), number)

    codes: list[int] = []
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(running(lambda: codes.append(in_forked_child(work))))
        work()
    assert codes == [0, 0, 0]


def test_a_fork_while_another_thread_waits(client: plasma.PlasmaClient) -> None:
    """A child that is forked while a thread of its parent is in a get is not held up by that."""
    awaited = new_id()
    with running(lambda: client.get(awaited)):
        assert serves(client)
        assert in_forked_child(lambda: client.put("from the child", awaited)) == 0
    assert client.get(awaited) == "from the child"


def test_a_forked_child_of_a_disconnected_client(store: plasma.Store) -> None:
    """A child does not revive what its parent has disconnected."""
    client = store.connect()
    client.disconnect()

    def use() -> None:
        with pytest.raises(OSError, match="disconnected"):
            client.put(1)

    assert in_forked_child(use) == 0


def test_a_child_inherits_a_subscription_as_nothing(
    client: plasma.PlasmaClient, client2: plasma.PlasmaClient
) -> None:
    """A child subscribes anew, and takes nothing from its parent's subscription."""
    client.subscribe()

    def use() -> None:
        with pytest.raises(OSError, match="subscribe"):
            client.get_next_notification()
        client.subscribe()

    assert in_forked_child(use) == 0
    object_id = client2.put_raw_buffer(b"1")
    assert client.get_next_notification() == (object_id, 1, 0)


def test_a_pickled_client(store: plasma.Store, client: plasma.PlasmaClient) -> None:
    """A client that comes out of a pickle is another client of the same store."""
    with pickle.loads(pickle.dumps(client)) as copy:
        assert type(copy) is plasma.PlasmaClient
        assert copy.store_socket_name == store.store_socket_name
        object_id = copy.put("from the copy")
        buffers = [each.get_buffers(object_id) for each in (client, copy)]
        assert client.list()[object_id]["ref_count"] == 2
        del buffers
    assert client.get(object_id) == "from the copy"


def total(client: plasma.PlasmaClient, ids: list[plasma.ObjectID], answers: Connection) -> None:
    """Send the sum of some arrays: the work of a process."""
    answers.send(sum(int(array.sum()) for array in client.get(ids)))
    client.disconnect()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.usefixtures("spawning")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # Arrow's threads
def test_a_client_as_an_argument(client: plasma.PlasmaClient, method: str) -> None:
    """A client can be handed to a process of `multiprocessing`, however that is started."""
    ids = [client.put(np.arange(number)) for number in range(10)]
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=total, args=(client, ids, theirs))
    process.start()
    theirs.close()
    with ours:
        assert ours.recv() == sum(sum(range(number)) for number in range(10))
    process.join()
    assert process.exitcode == 0
    process.close()


def test_a_client_as_an_argument_by_way_of_a_server(store: plasma.Store) -> None:
    """So it can to one that a `forkserver` starts, which lives in a program of its own here."""
    run_python(
        """
        import multiprocessing, sys
        import shmplasma as plasma

        with plasma.connect(sys.argv[1]) as client:
            object_id = plasma.ObjectID.from_random()
            context = multiprocessing.get_context("forkserver")
            process = context.Process(target=client.put, args=("from there", object_id))
            process.start()
            process.join()
            assert process.exitcode == 0
            assert client.get(object_id) == "from there"
        """,
        store.store_socket_name,
    )


HOLDERS = """
    import sys
    import shmplasma as plasma

    path, *ids = sys.argv[1:]
    client = plasma.connect(path)
    buffers = client.get_buffers([plasma.ObjectID(bytes.fromhex(i)) for i in ids])
    mine = [client.create(plasma.ObjectID.from_random(), 1000) for _ in range(3)]
    client.put(b"small")  # takes a lease where there are any
    print("holds", flush=True)
    sys.stdin.readline()
"""


def test_pins_do_not_drift_as_clients_are_killed(
    store: plasma.Store, client: plasma.PlasmaClient
) -> None:
    """When all holders were killed, pinned and unsealed bytes are 0 and all room can be had."""
    ids = [client.put_raw_buffer(bytes(1000)) for _ in range(20)]
    texts = [object_id.binary().hex() for object_id in ids]
    for _ in range(2):
        with ExitStack() as stack:
            children = [
                stack.enter_context(Child(HOLDERS, store.store_socket_name, *texts))
                for _ in range(3)
            ]
            for child in children:
                assert child.hear() == "holds"
            assert figure(client, "pinned bytes") == 20_000 + 9_000
            assert figure(client, "unsealed bytes") == 9_000
            assert {client.list()[object_id]["ref_count"] for object_id in ids} == {3}
            for child in children:
                child.kill()
            until(lambda: figure(client, "pinned bytes") == 0, "nothing is pinned")
            assert figure(client, "unsealed bytes") == 0
    assert client.evict(10**9) >= 20_000
    whole = client.create(new_id(), client.store_capacity())
    assert whole.size == 10**8
    del whole


# --- values -----------------------------------------------------------------------------------------


@dataclass
class Point:
    """A plain object."""

    x: int
    y: Any


def test_what_plasma_refused_to_put(client: plasma.PlasmaClient) -> None:
    """Lambdas, local functions and classes, plain objects and data frames come back as they were."""
    factor = 3

    class Local(Point):
        def area(self) -> int:
            return self.x * int(self.y)

    assert client.get(client.put(lambda x: x * factor))(5) == 15
    assert client.get(client.put(Local(2, 3))).area() == 6
    assert client.get(client.put(Local))(4, 5).area() == 20
    point = client.get(client.put(Point(1, np.arange(1000))))
    assert point.x == 1
    assert (point.y == np.arange(1000)).all()
    frame = pd.DataFrame(
        {
            "n": np.arange(100),
            "f": np.linspace(0, 1, 100),
            "s": [f"text {i}" for i in range(100)],
            "c": pd.Categorical(["a", "b"] * 50),
            "t": pd.date_range("2020", periods=100, tz="UTC"),
            "i": pd.array([1, None] * 50, dtype="Int64"),
        }
    )
    pd.testing.assert_frame_equal(client.get(client.put(frame)), frame)


def test_what_was_put_elsewhere(store: plasma.Store, client: plasma.PlasmaClient) -> None:
    """What another program's main module defines can be used here."""
    code = """
        import sys
        import shmplasma as plasma

        class Account:
            def __init__(self, balance):
                self.balance = balance
            def double(self):
                return 2 * self.balance

        with plasma.connect(sys.argv[1]) as client:
            object_id = client.put([Account(21), lambda account: account.double()])
            print(object_id.binary().hex())
    """
    text = run_python(code, store.store_socket_name)
    account, function = client.get(plasma.ObjectID(bytes.fromhex(text)))
    assert account.double() == function(account) == 42


# --- the server -------------------------------------------------------------------------------------


def test_only_what_is_needed_is_evicted() -> None:
    """For one object more, one of the same size goes; eviction stops once enough is free."""
    size = 99_968
    with plasma.Store(10 * size) as store, store.connect() as client:
        ids = [client.put_raw_buffer(bytes(size), new_id()) for _ in range(10)]
        assert all(map(client.contains, ids))
        ids.append(client.put_raw_buffer(bytes(size), new_id()))
        assert sum(map(client.contains, ids)) == 10
        assert client.evict(1) == size
        assert sum(map(client.contains, ids)) == 9
        ids.append(client.put_raw_buffer(bytes(size), new_id()))
        assert sum(map(client.contains, ids)) == 10


def test_a_full_store_says_why() -> None:
    """The message and the attributes name what was asked for, what is free, and who has the rest."""
    with plasma.Store(10**6) as store, store.connect() as client:
        held = client.get_buffers(client.put_raw_buffer(bytes(600_000)))
        unsealed = client.create(new_id(), 200_000)
        with pytest.raises(plasma.PlasmaStoreFull) as caught:
            client.create(new_id(), 300_000)
        error = caught.value
        assert (error.requested_bytes, error.pinned_bytes) == (300_000, 800_000)
        assert error.unsealed_bytes == 200_000
        assert 0 < error.largest_bytes <= error.free_bytes <= 200_000
        for figure_ in (300_000, 800_000, 200_000, error.free_bytes):
            assert str(figure_) in str(error)
        assert "-m" in str(error)
        del held, unsealed


def test_more_than_the_machine_can_give() -> None:
    """A store that could not keep its promise does not start, and says what helps."""
    with pytest.raises(plasma.ShmPlasmaError, match=r"-d DIRECTORY"):
        plasma.Store("1000TB")


def test_a_live_stores_socket_is_left_alone(
    store: plasma.Store, client: plasma.PlasmaClient
) -> None:
    """A second store on a live one's socket refuses, and the first serves on, also new clients."""
    with pytest.raises(plasma.ShmPlasmaError, match=store.store_socket_name):
        plasma.Store("1MB", socket=store.store_socket_name)
    assert serves(client)
    with store.connect() as late:
        assert serves(late)


def test_a_file_at_the_sockets_path_stays(tmp_path: Path) -> None:
    """A store never removes a regular file."""
    path = tmp_path / "precious"
    path.write_text("precious")
    with pytest.raises(plasma.ShmPlasmaError, match="no socket"):
        plasma.Store("1MB", socket=str(path))
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["precious"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_stays_at_the_exit(tmp_path: Path, number: signal.Signals) -> None:
    """A store that ends takes its socket along, with clients or without."""
    path = str(tmp_path / "s")
    with store_program("-m", "1MB", "-s", path) as process, plasma.connect(path) as client:
        assert serves(client)
        process.send_signal(number)
        assert process.wait() == 0
        assert not os.listdir(tmp_path)


SIGNALLED = """
    import operator, os, selectors, signal, sys
    from functools import partial

    class Selector(selectors.EpollSelector):
        asleep = False

        def select(self, timeout):
            if timeout > 60 and not self.asleep:
                self.asleep = True
                # All of it C code: Python's handler cannot run between the signal and the sleep.
                events = []
                steps = partial(os.killpg, 0, signal.SIGTERM), partial(self._selector.poll, 5)
                events.extend(map(operator.call, steps))
                assert events[1], "the store sleeps on"
            return super().select(timeout)

    os.setpgrp()
    selectors.DefaultSelector = Selector
    from shmplasma import cli

    sys.exit(cli.main(["-m", "1MB", "-s", sys.argv[1]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has epoll")
def test_a_signal_at_the_wrong_moment(tmp_path: Path) -> None:
    """A signal that arrives just before the loop goes to sleep ends the store as any other."""
    with Child(SIGNALLED, str(tmp_path / "s")) as child:
        assert child.end() == 0
    assert not os.listdir(tmp_path)


def test_a_peer_that_is_no_store(tmp_path: Path) -> None:
    """A client that finds something else at the path says so, and waits for nothing."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1 << 16)
                sock.send(b"220 smtp.example.org ESMTP ready\r\n")

        with running(answer), pytest.raises(OSError, match=f"{path}.*no store"):
            plasma.connect(path, 0)


def test_an_answer_to_a_get_that_was_given_up(store: plasma.Store) -> None:
    """`AnswerNow` ends a wait with what is there; for a get that is over it means nothing."""
    with Attacker(store.store_socket_name) as attacker:
        slots = slots_of(attacker.enter().board)
        attacker.post(Get(True, [MISSING.binary()], [slots[0]]))
        for _ in range(3):
            attacker.send(encode_frame(AnswerNow.KIND, 0, AnswerNow(2).encode()))
        assert attacker.reply(Objects).found == [(0, 0, 0, 0)]
        assert attacker.ask(Contains(MISSING.binary()), Number).value == 0
        attacker.ask(Detach(), Done)
