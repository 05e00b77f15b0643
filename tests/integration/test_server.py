"""The store's loop."""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from shmplasma import NotConnectedError, Store, connect, system
from shmplasma.connections import Connection, StalledError
from shmplasma.deletions import Deletions
from shmplasma.effects import Await, Drop, Effect, Send
from shmplasma.ledger import Ledger
from shmplasma.outbox import MISSED
from shmplasma.posted import Gone
from shmplasma.protocol import PROTOCOL_VERSION, encode_frame
from shmplasma.requests import Flush, Hello, Role
from shmplasma.segment import Segment
from shmplasma.server import Server
from shmplasma.store import ObjectStore
from tests.clients import new_id
from tests.command import running, segment_in, until_ready
from tests.conversation import outbox_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

polls = pytest.mark.skipif(
    not system.fast_path_available(), reason="without barriers the store does not look by itself"
)

HELLO = encode_frame(Hello.KIND, 1, Hello(PROTOCOL_VERSION, Role.CLIENT, "test").encode())
FLUSH = encode_frame(Flush.KIND, 1, b"")
A_CENTURY_NS = 100 * 365 * 86_400 * 10**9
FAILING = """
import sys
from shmplasma import cli
from shmplasma.requests import Evict
from shmplasma.store import ObjectStore

def fail(store, client, frame, now_ns):
    if frame.kind == Evict.KIND:
        raise {error}
    return handle(store, client, frame, now_ns)

handle, ObjectStore.handle = ObjectStore.handle, fail
sys.exit(cli.main())
"""
"""A store with a bug: whoever asks it to evict something ends it."""


@contextmanager
def failing(error: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a store that fails by an error; give the process and what it said."""
    program = [sys.executable, "-c", FAILING.format(error=error), *arguments]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, until_ready(process)
        finally:
            process.kill()


def fail(path: str) -> None:
    """Let such a store fail."""
    with connect(path, num_retries=0) as client, pytest.raises(NotConnectedError):
        client.evict(1)


@contextmanager
def idle_server(tmp_path: Path) -> Iterator[Server]:
    """Give a store's loop that nobody runs."""
    with Segment.create(10**6) as segment, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        server = Server(listener, segment)
        try:
            yield server
        finally:
            server.close()


def turns(server: Server) -> None:
    """Handle what has come, as the loop does; a first message is read in pieces."""
    switchboard = server._switchboard
    for _ in range(4):
        server._handle(server._selector.select(0))
        switchboard.process_backlog()


@contextmanager
def connected(server: Server, path: Path) -> Iterator[tuple[socket.socket, Connection]]:
    """Give a client that has introduced itself: its end, and the store's."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(path / "s"))
        client.sendall(HELLO)
        turns(server)
        yield client, next(reversed(server._switchboard._connections.values()))


@pytest.mark.parametrize(("asked", "due"), [(Ledger, "wait_ns"), (ObjectStore, "deadline_ns")])
def test_sleeps_however_far_off_the_next_thing_to_do_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: type, due: str
) -> None:
    """What is due in more seconds than the system waits for at once does not end the store."""
    with idle_server(tmp_path) as server:
        monkeypatch.setattr(asked, due, time.time_ns() + A_CENTURY_NS)
        server.stop()  # so that it wakes up at once
        assert server._sleep()


@pytest.mark.parametrize("step", ["sleeps", "is woken", "does what is due"])
def test_deletions_end_before_the_loop_does_anything_but_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Those that have only begun are put off for requests that go first, and for nothing else."""
    seen: list[set[int]] = []

    def note(*_: object) -> tuple[()]:
        seen.append(set(server._store.deleting))
        return ()

    monkeypatch.setattr(Deletions, "end", lambda deletions: deletions.begun.clear())
    with idle_server(tmp_path) as server:
        server._commit_ahead = False
        server._store.deleting.add(7)
        if step == "sleeps":
            monkeypatch.setattr(Server, "_sleep", note)
            server._wait()
        else:
            monkeypatch.setattr(ObjectStore, "wake", note)
            if step == "is woken":
                os.write(server._wake_writer, b"r")
                server._handle(server._selector.select(0))
            else:
                server._finish_turn(idle=True)
    assert seen[:1] == [set()]


def test_who_cannot_be_looked_at_connects_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a descriptor to look with nobody is admitted who could not be told from another one later."""

    def refused(_: int) -> None:
        raise OSError(errno.EMFILE, "too many files are open")

    path = str(tmp_path / "s")
    with idle_server(tmp_path) as server:

        def accept() -> None:
            for key, _ in server._selector.select(5):
                key.data()

        with monkeypatch.context() as patch, socket.socket(socket.AF_UNIX) as client:
            patch.setattr(system, "start_time", refused)
            # What is logged would keep the error, and that the segment.
            patch.setattr(logging.getLogger("shmplasma"), "disabled", True)
            client.connect(path)
            accept()
            assert not client.recv(1)
        assert not server._switchboard.awaited
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            accept()
            (connection,) = server._switchboard.awaited
            assert connection.pid == os.getpid()


def test_who_has_introduced_himself_is_not_waited_for(tmp_path: Path) -> None:
    """Nor who has read what has waited for him: with nobody to wait for the loop has less to do in each turn."""
    with idle_server(tmp_path) as server, socket.socket(socket.AF_UNIX) as client:
        awaited = server._switchboard.awaited
        client.settimeout(5)
        client.connect(str(tmp_path / "s"))
        turns(server)
        (connection,) = awaited
        client.sendall(HELLO[:-1])
        turns(server)
        assert awaited
        client.sendall(HELLO[-1:])
        turns(server)
        assert not awaited

        connection.send(bytes(1 << 20))
        server._switchboard._pause(connection)
        turns(server)
        assert awaited
        while awaited:
            client.recv(1 << 20)
            turns(server)


def test_who_leaves_is_not_waited_for(tmp_path: Path) -> None:
    """Neither one who has not introduced himself, nor one who does not read."""
    with idle_server(tmp_path) as server:
        awaited = server._switchboard.awaited
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))
            turns(server)
            assert awaited
        turns(server)
        assert not awaited
        with connected(server, tmp_path) as (_, connection):
            connection.send(bytes(1 << 20))
            server._switchboard._pause(connection)
            assert awaited
        turns(server)
        assert not awaited
        assert not server._switchboard._connections


def test_what_was_sent_by_one_who_has_not_read(tmp_path: Path) -> None:
    """It is handled when he has gone, though he was waited for to read when it came, and so is his end."""
    with idle_server(tmp_path) as server:
        switchboard = server._switchboard
        with connected(server, tmp_path) as (client, connection):
            connection.send(bytes(1 << 20))
            client.sendall(3 * FLUSH)
            turns(server)
            assert len(connection.frames) == 2
            assert connection in switchboard.awaited
            assert not switchboard.backlog, "the loop sleeps until he reads"
        turns(server)
        assert not connection.frames
        assert not switchboard._connections


def test_who_has_left_a_reply_unread(tmp_path: Path) -> None:
    """He has ended his connection himself, so what he had goes, though his process lives on."""
    with idle_server(tmp_path) as server:
        with connected(server, tmp_path) as (_, connection):
            pass
        assert server._store.knows(connection.client)
        turns(server)
        assert not server._store.knows(connection.client)


def test_nothing_is_left_to_do_for_who_was_dropped(tmp_path: Path) -> None:
    """The loop does not go on looking for his messages."""
    with idle_server(tmp_path) as server, connected(server, tmp_path) as (client, connection):
        client.sendall(70 * FLUSH + encode_frame(999, 1, b"") + FLUSH)
        turns(server)
        assert connection.client not in server._switchboard._connections
        assert not server._switchboard.backlog


def test_who_cannot_be_written_to_is_dropped_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What he has sent at the same time is not read any more."""

    def refused(_: Connection) -> None:
        raise OSError(errno.ENOBUFS, "no buffers are left")

    with idle_server(tmp_path) as server, connected(server, tmp_path) as (client, connection):
        monkeypatch.setattr(Connection, "flush", refused)
        connection.replay(b"what waits for him")
        client.sendall(FLUSH)
        turns(server)
        assert connection.client not in server._switchboard._connections


def test_who_does_not_read_is_waited_for_since_then(tmp_path: Path) -> None:
    """However much he is sent meanwhile."""
    with idle_server(tmp_path) as server, connected(server, tmp_path) as (_, connection):
        server._carry_out([Send(connection.client, bytes(1 << 20))])
        since = connection.paused_at
        assert since is not None
        server._carry_out([Send(connection.client, bytes(100))])
        assert connection.paused_at == since


@pytest.mark.parametrize("is_read", [False, True])
def test_who_is_dropped_for_what_another_one_does_is_not_served_in_this_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_read: bool
) -> None:
    """Neither for what he has just sent, nor for what is left of what he sent before."""

    def drop_others(_: ObjectStore, client: int, *__: object) -> list[Effect]:
        return [Drop(each, "another one is served") for each in numbers if each != client]

    with ExitStack() as stack:
        server = stack.enter_context(idle_server(tmp_path))
        pairs = [stack.enter_context(connected(server, tmp_path)) for _ in range(2)]
        numbers = [connection.client for _, connection in pairs]
        for client, connection in pairs:
            client.sendall(FLUSH)
            connection.replay(b"what waits for him")
            if is_read:
                connection.read()
                server._switchboard.backlog.add(connection.client)
        monkeypatch.setattr(ObjectStore, "handle", drop_others)
        turns(server)
        assert len(server._switchboard._connections) == 1


def test_who_is_dropped_with_another_one_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though both were found to have kept the store waiting for too long."""
    disconnect = ObjectStore.disconnect

    def drop_all(store: ObjectStore, client: int, now_ns: int) -> list[Effect]:
        return [*disconnect(store, client, now_ns), *(Drop(each, "deaf") for each in numbers)]

    def is_stalled(_: Connection, __: float) -> bool:
        raise StalledError

    with idle_server(tmp_path) as server, ExitStack() as stack:
        for _ in range(2):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(tmp_path / "s"))
        turns(server)
        switchboard = server._switchboard
        numbers = [connection.client for connection in switchboard.awaited]
        assert len(numbers) == 2
        monkeypatch.setattr(ObjectStore, "disconnect", drop_all)
        monkeypatch.setattr(Connection, "is_awaited", is_stalled)
        switchboard.drop_the_slow()
        assert not switchboard._connections


def test_who_cannot_be_told_that_another_one_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He is dropped while the store ends, and that once."""
    with ExitStack() as stack:
        server = stack.enter_context(idle_server(tmp_path))
        numbers = [stack.enter_context(connected(server, tmp_path))[1].client for _ in range(3)]
        disconnect = ObjectStore.disconnect

        def tell(store: ObjectStore, client: int, now_ns: int) -> list[Effect]:
            return [
                *disconnect(store, client, now_ns),
                *(Drop(each, "it is deaf") for each in numbers),
            ]

        monkeypatch.setattr(ObjectStore, "disconnect", tell)
        server._switchboard.close(keep=False)
        assert not server._switchboard._connections


def test_who_is_dropped_and_has_gone_is_forgotten_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the store reads of his end what he has written after that for which he is dropped."""

    def has_ended(_: int) -> None:
        raise ProcessLookupError

    with idle_server(tmp_path) as server, connected(server, tmp_path) as (_, connection):
        segment, session = server._segment, server._store._greeter.sessions[connection.client]
        outbox = outbox_in(segment.layout, segment.words, session.board)
        outbox.append(99, b"no record")
        outbox.append(Gone.KIND, b"", is_last=True)
        monkeypatch.setattr(system, "watch_exit", has_ended)
        server._carry_out(server._store.poll(time.time_ns()))
        assert not server._store.knows(connection.client)


def test_a_process_is_not_taken_for_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose number it has by now: the one that has sent references has ended then."""
    with idle_server(tmp_path) as server:
        ended: list[int] = []
        monkeypatch.setattr(server._store.ledger, "end_process", ended.append)
        started = system.start_time(os.getpid())
        assert started is not None
        server._carry_out([Await(1, os.getpid(), started), Await(2, os.getpid(), started + 1)])
        assert ended == [2]


@polls
def test_ids_stay_locked_until_what_their_client_has_left_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or another one could claim an id that is taken."""
    with idle_server(tmp_path) as server, connected(server, tmp_path) as (client, connection):
        _, (wake_fd, locks_fd), _, _ = socket.recv_fds(client, 1 << 16, 2)
        os.close(wake_fd)
        assert system.try_lock(locks_fd, 7)
        os.close(locks_fd)
        disconnect = ObjectStore.disconnect
        locked: list[bool] = []

        def look(store: ObjectStore, client: int, now_ns: int) -> Sequence[Effect]:
            locked.append(not system.try_lock(server._segment.fd, 7))
            return disconnect(store, client, now_ns)

        monkeypatch.setattr(ObjectStore, "disconnect", look)
        server._switchboard._close(connection.client)
        assert locked == [True]
        assert system.try_lock(server._segment.fd, 7)


@polls
@pytest.mark.parametrize("said", [b"r", b"rr", MISSED, MISSED + b"r"])
def test_a_store_that_was_woken_for_what_was_put_is_told_of_it_from_then_on(
    tmp_path: Path, said: bytes
) -> None:
    """Not so one that was woken by a release: it goes on looking by itself."""
    with idle_server(tmp_path) as server:
        polling = server._store._polling
        polling.start()
        for _ in range(2):
            os.write(server._wake_writer, said)
            for key, _ in server._sleep():
                key.data()
        assert polling.is_on == (MISSED not in said)


@pytest.mark.parametrize(
    ("said", "wakes"), [(b"r", 1), (MISSED, 0), (MISSED + b"r", 1), (4096 * MISSED, 1)]
)
def test_a_release_is_not_taken_for_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes, wakes: int
) -> None:
    """Whatever else is in the wake-up pipe, and also if that has left no room for it."""
    with idle_server(tmp_path) as server:
        woken: list[ObjectStore] = []

        def wake(store: ObjectStore) -> tuple[()]:
            woken.append(store)
            return ()

        monkeypatch.setattr(ObjectStore, "wake", wake)
        os.write(server._wake_writer, said)
        server._wake()
        assert len(woken) == wakes


@polls
def test_what_a_store_reads_before_it_sleeps_is_done_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record may come while it stops looking by itself, and leave something to do that waits for nobody."""
    with idle_server(tmp_path) as server:
        os.write(server._wake_writer, MISSED)
        server._wake()
        server._store._polling.start()
        monkeypatch.setattr(Server, "_has_more_to_do", property(lambda _: True))
        assert server._sleep() == []


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("KeyError('a bug')", "\nKeyError: 'a bug'\n"),
        ("OSError('no such call')", "error: the system refused what the store cannot do without"),
    ],
)
def test_a_store_that_fails_is_succeeded(tmp_path: Path, error: str, says: str) -> None:
    """What ends the loop ends the store with 1 and is logged; its clients go on with the next store, and find all objects."""
    path, external = str(tmp_path / "s"), tmp_path / "external"
    arguments = ["-s", path, "-e", f"file://{external}"]
    with failing(error, "-m", "8MB", *arguments) as (process, said):
        client = connect(path)
        contents = {client.put_raw_buffer(data): data for data in map(os.urandom, 40 * [400_000])}
        unsealed = client.create(named := new_id(), 100)
        held_id = client.put(np.arange(1000))
        held = client.get(held_id)
        fail(path)
        assert process.wait() == 1
        assert process.stderr is not None
        log = process.stderr.read()
    assert says in log
    assert ("Traceback" in log) == ("a bug" in error)
    assert "stays, for the next store" in log
    with running(*arguments) as (_, said_then), client:
        assert "recovered" in said_then
        assert segment_in(said_then) == segment_in(said)
        for object_id, data in contents.items():
            assert bytes(client.get_buffers(object_id)) == data
        np.frombuffer(memoryview(unsealed), np.uint8)[:] = 7
        client.seal(named)
        assert set(bytes(client.get_buffers(named))) == {7}
        assert held.sum() == client.get(held_id).sum() == 499_500
        del held, unsealed
    assert not list(external.iterdir())


def test_a_store_that_fails_once_its_file_was_truncated(tmp_path: Path) -> None:
    """What nobody can recover is removed."""
    path = str(tmp_path / "s")
    error = "cli.AttachError('somebody has changed the size')"
    with failing(error, "-m", "8MB", "-s", path) as (process, said):
        fail(path)
        assert process.wait() == 1
        assert process.stderr is not None
        assert process.stderr.read().endswith("error: somebody has changed the size\n")
    assert not os.path.exists(f"/dev/shm{segment_in(said)}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("own_socket", [False, True])
def test_an_embedded_store_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_socket: bool
) -> None:
    """It removes all that it has; where the user named the socket its owner removes the segment, as after a kill."""
    popen = subprocess.Popen

    def spawn(program: list[str], **options: object) -> subprocess.Popen[bytes]:
        code = FAILING.format(error="KeyError('a bug')")
        return popen([program[0], "-c", code, *program[program.index("--owner") :]], **options)  # type: ignore[call-overload, no-any-return]  # as given

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(subprocess, "Popen", spawn)
    external = tmp_path / "external"
    path = str(tmp_path / "s") if own_socket else None
    with Store("8MB", socket=path, external_store=f"file://{external}") as store:
        with store.connect() as client:
            for _ in range(40):
                client.put_raw_buffer(bytes(400_000))
        fail(store.store_socket_name)
        assert store.process.wait() == 1
        assert own_socket == bool(list(external.iterdir()))
    assert [each.name for each in tmp_path.iterdir()] == ["external"]
