"""Clients whose connection ends under them: interrupted while they connect again, or dropped between two calls."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import socket
import threading
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from textwrap import dedent

import pytest

import shmplasma as plasma
from shmplasma import exchange, handshake
from shmplasma.outbox import Outbox
from shmplasma.owned_socket import OwnedSocket
from shmplasma.posted import Abort
from shmplasma.session import Session
from shmplasma.transport import Channel
from tests.clients import figure, new_id
from tests.command import killed, running
from tests.processes import INTERRUPTER, Child, run_python, until, wait_until_asleep

INTERRUPTED = """
    import shmplasma as plasma
    from shmplasma import handshake, link, outcomes, pinning, transport

    client = plasma.connect(sys.argv[1])
    client.set_client_options("interrupted", 500_000)
    object_id = client.put_raw_buffer(b"held" * 1000)
    held = client.get_buffers(object_id)
    parts = handshake, link, outcomes, pinning, transport

    def connection():
        return client._session._link.channel

    count = 1
    print("ready", flush=True)
    for _ in sys.stdin:
        broken = connection()
        while connection() is broken and is_interrupted(count, parts, client.flush):
            count += 1
        client.flush()
        assert bytes(held) == b"held" * 1000
        print(count, flush=True)
        count += 1
"""


def fill_outbox(client: plasma.PlasmaClient) -> None:
    """Leave no place in an outbox, but for the last words."""
    session = client._session
    assert session is not None
    while session._link._outbox.post(Abort.KIND, bytes(20)):
        pass


def test_interrupts_while_connecting_again(tmp_path: Path) -> None:
    """Wherever Ctrl-C meets a client that connects again, its pins and limits stay its own.

    Up to the point at which it keeps the new connection all points are tried on one store; those behind it, some of
    them, take a store each.
    """
    path = str(tmp_path / "s")
    points = [0]
    with killed("-m", "1MB", "-s", path):
        child = Child(INTERRUPTER + dedent(INTERRUPTED), path)
        assert child.hear() == "ready"
    with child:
        for _ in range(10):
            with killed("-s", path), plasma.connect(path) as other:
                child.say()
                points.append(int(child.hear()))
                assert figure(other, "pinned objects") == 1
                assert "interrupted (pid" in other.debug_string()
                (object_id,) = other.list()
                with pytest.raises(plasma.PlasmaStoreFull):
                    other.put_raw_buffer(bytes(1_000_000))
                assert object_id in other.list()
    with running("-s", path) as (_, said):
        assert "1 objects" in said
    assert points[1] > 50, points
    assert points[-1] > points[1], points


CLAIMS = """
    import shmplasma as plasma
    from shmplasma import handshake
    from shmplasma.protocol import encode_frame
    from shmplasma.requests import Flush, Role

    def introduce(reclaim):
        exchange, welcome = handshake.greet(sys.argv[1], 0, Role.CLIENT, "", reclaim)
        return exchange.detach(), welcome

    connection, welcome = introduce(0)
    print("ready", flush=True)
    sys.stdin.readline()
    connection, welcome = introduce(welcome.board + 1)
    print(welcome.reclaimed, flush=True)
    sys.stdin.readline()
    connection.sendall(encode_frame(Flush.KIND, 1, b""))
    print("sent", flush=True)
    sys.stdin.readline()
"""


def test_a_client_that_goes_on_and_ends_at_once(tmp_path: Path) -> None:
    """A store that reads its message when its process has ended already takes leave of it once, and goes on."""
    path = str(tmp_path / "s")
    with killed("-m", "1MB", "-s", path):
        child = Child("import sys\n" + dedent(CLAIMS), path)
        assert child.hear() == "ready"
    with child, running("-s", path) as (process, said), plasma.connect(path) as other:
        assert "1 living clients" in said
        child.say()
        assert child.hear() == "True"
        process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        child.say()
        assert child.hear() == "sent"
        child.kill()
        process.send_signal(signal.SIGCONT)
        gone = f"(pid {child.process.pid})"
        until(lambda: gone not in other.debug_string(), "the client has gone")
        assert process.poll() is None


def test_an_abort_that_a_dead_store_has_carried_out(tmp_path: Path) -> None:
    """It could not say so: the next one finds nothing to abort, and that is no error; at another abort it is one."""
    path, unsealed = str(tmp_path / "s"), new_id()
    with killed("-m", "1MB", "-s", path):
        client = plasma.connect(path)
        client.create(unsealed, 100_000)
        session = client._session
        assert session is not None
        session.abort(unsealed.id_bytes)
    with running("-s", path), client:
        client.abort(unsealed)
        with pytest.raises(plasma.PlasmaObjectNotFound):
            client.abort(unsealed)


@pytest.mark.parametrize("is_full", [False, True])
def test_who_disconnects_while_its_store_is_dead(tmp_path: Path, is_full: bool) -> None:
    """The next store waits for its last buffer alone: what it had not sealed, and what only it held, goes."""
    path = str(tmp_path / "s")
    unsealed, kept = new_id(), new_id()
    with killed("-m", "1MB", "-s", path):
        leaver = plasma.connect(path)
        leaver.put_raw_buffer(b"kept" * 1000, kept)
        (held,) = leaver.get_buffers([kept])
        leaver.create(unsealed, 100_000)
    if is_full:
        fill_outbox(leaver)
    leaver.disconnect()
    with running("-s", path), plasma.connect(path) as client:
        client.create(unsealed, 900_000)
        client.seal(unsealed)
        assert held.to_pybytes() == b"kept" * 1000


@pytest.mark.parametrize("is_full", [False, True])
def test_who_has_gone_while_its_store_is_dead(tmp_path: Path, is_full: bool) -> None:
    """The next store does not wait for its process."""
    path = str(tmp_path / "s")
    with killed("-m", "1MB", "-s", path):
        leaver = plasma.connect(path)
    if is_full:
        fill_outbox(leaver)
    leaver.disconnect()
    del leaver
    gc.collect()
    with running("-s", path) as (_, said):
        assert "0 living clients" in said


GONE = """
    import gc, sys
    import shmplasma as plasma

    client = plasma.connect(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    client.disconnect()
    del client
    gc.collect()
    print("gone", flush=True)
    sys.stdin.readline()
"""


def test_who_has_gone_before_he_has_come_back(tmp_path: Path) -> None:
    """The next store forgets him when he says so, and his process, which ends later, as well."""
    path = str(tmp_path / "s")
    with killed("-m", "1MB", "-s", path):
        child = Child(GONE, path)
        assert child.hear() == "ready"
    with child, running("-s", path) as (process, said), plasma.connect(path) as other:
        assert "1 living clients" in said
        child.say()
        assert child.hear() == "gone"
        other.debug_string()  # for which the store reads what everybody has said
        with plasma.connect(path) as next_one:
            assert next_one._session is not None
            assert next_one._session._link._board == 0, "the board is free"
        child.kill()
        for _ in range(2):
            other.flush()
        assert process.poll() is None


def test_threads_that_wait_for_the_next_store(tmp_path: Path) -> None:
    """One of them connects again, and all go on."""
    path, key = str(tmp_path / "s"), new_id()
    found: list[object] = []
    with killed("-m", "1MB", "-s", path):
        client = plasma.connect(path)
        session = client._session
        assert session is not None
        threads = [threading.Thread(target=lambda: found.append(client.get(key))) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: len(session._link.channel._waiters) == 2, "one reads for all")
    with running("-s", path), plasma.connect(path) as other:
        other.put("there", key)
        for thread in threads:
            thread.join()
        client.disconnect()
    assert found == ["there"] * 3


def test_what_is_lost_is_lost_once(tmp_path: Path) -> None:
    """A thread that learns late that its store was started anew takes nothing from a client that goes on with the new one."""
    path = str(tmp_path / "s")
    with killed("-m", "1MB", "-s", path):
        client = plasma.connect(path)
    session = client._session
    assert session is not None
    link = session._link
    with running("-m", "1MB", "-s", path, "--fresh"), client:
        with pytest.raises(plasma.NotConnectedError, match="started anew"):
            client.flush()
        client.flush()
        anew = client._session
        with pytest.raises(plasma.NotConnectedError):
            link.reconnect(link.channel, ConnectionResetError())
        assert client._session is anew


def test_who_disconnects_while_another_thread_waits_for_the_next_store(tmp_path: Path) -> None:
    """The other thread's call ends when there is one, and says why."""
    path = str(tmp_path / "s")
    with killed("-m", "1MB", "-s", path):
        leaver = plasma.connect(path)
        held = leaver.put_raw_buffer(b"held")
    said: list[str] = []

    def ask() -> None:
        with pytest.raises(plasma.NotConnectedError) as caught:
            leaver.flush()
        said.append(str(caught.value))

    session = leaver._session
    assert session is not None
    thread = threading.Thread(target=ask)
    thread.start()
    until(session._link._connecting.locked, "it waits for a store")
    leaver.disconnect()
    with running("-s", path), plasma.connect(path) as client:
        thread.join()
        assert client.contains(held)
    assert len(said) == 1


def test_who_disconnects_while_another_thread_keeps_a_new_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two is first, that connection ends requests as well: nobody waits for an answer that will not come."""
    path = str(tmp_path / "s")
    with killed("-m", "1MB", "-s", path):
        clients = [plasma.connect(path) for _ in range(2)]
    links = [client._session._link for client in clients if client._session]
    connected, retire = Outbox.connected, Channel.retire

    def leave(outbox: Outbox) -> None:
        monkeypatch.setattr(Outbox, "connected", connected)
        connected(outbox)
        clients[0].disconnect()

    def keep(channel: Channel) -> None:
        monkeypatch.setattr(Channel, "retire", retire)
        links[1].reconnect(channel, ConnectionResetError())
        retire(channel)

    with running("-s", path):
        monkeypatch.setattr(Outbox, "connected", leave)
        with pytest.raises(plasma.NotConnectedError):
            clients[0].flush()
        monkeypatch.setattr(Channel, "retire", keep)
        clients[1].disconnect()
        assert all(link.channel.is_final for link in links)


def test_what_a_finalizer_says_while_another_thread_keeps_a_new_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reaches the next store, though it is sent by the broken connection when the new one is kept."""
    path, unsealed = str(tmp_path / "s"), new_id()
    with killed("-m", "1MB", "-s", path):
        client = plasma.connect(path)
        client.create(unsealed, 100)
    session = client._session
    assert session is not None
    link, connected, sends = session._link, Outbox.connected, Channel.send_soon
    has_list, is_said = threading.Event(), threading.Event()

    def wait(outbox: Outbox) -> None:
        monkeypatch.setattr(Outbox, "connected", connected)
        has_list.set()
        assert is_said.wait(20)
        connected(outbox)

    def send_slowly(channel: Channel, kind: int, body: bytes) -> None:
        monkeypatch.setattr(Channel, "send_soon", sends)
        is_said.set()
        thread.join()
        sends(channel, kind, body)

    monkeypatch.setattr(Outbox, "connected", wait)
    monkeypatch.setattr(Channel, "send_soon", send_slowly)
    with running("-s", path), client:
        thread = threading.Thread(target=client.flush)
        thread.start()
        assert has_list.wait(20)
        with link._outbox._lock:  # as in the middle of a record
            link.post_soon(Abort.KIND, unsealed.id_bytes)
        client.flush()
        assert not client.list()


def test_who_disconnects_while_another_thread_connects_anew(
    store: plasma.Store, client: plasma.PlasmaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is disconnected then, and its new session has ended."""
    other = store.connect()
    opens = other._open

    def meanwhile(num_retries: int) -> Session:
        session = opens(num_retries)
        other.disconnect()
        return session

    monkeypatch.setattr(other, "_open", meanwhile)
    other._lose()  # as where there is another store now
    for _ in range(2):
        with pytest.raises(plasma.NotConnectedError, match="disconnected"):
            other.create(new_id(), 100)
    assert "disconnected" in repr(other)
    assert not client.list()


LEFT = """
    import signal, sys
    import shmplasma as plasma

    client = plasma.connect(sys.argv[1])
    (held,) = client.get_buffers([plasma.ObjectID(20 * b"h")])
    signal.signal(signal.SIGTERM, lambda *_: client.disconnect())
    print("waits", flush=True)
    try:
        client.get(plasma.ObjectID(20 * b"m"))
    except plasma.NotConnectedError:
        print("has left", flush=True)
    input()
    assert held.to_pybytes() == 1000 * b"h"
"""


def test_buffers_of_a_client_that_was_disconnected_in_the_middle_of_a_call(
    client: plasma.PlasmaClient,
) -> None:
    """They stay valid, also when the store answers the call, which nobody hears any more."""
    held, missing = plasma.ObjectID(20 * b"h"), plasma.ObjectID(20 * b"m")
    client.put_raw_buffer(1000 * b"h", held)
    with Child(LEFT, client.store_socket_name) as child:
        assert child.hear() == "waits"
        wait_until_asleep(child.process.pid)
        child.process.terminate()
        assert child.hear() == "has left"
        client.put_raw_buffer(b"m", missing)
        client.flush()
        client.evict(100_000_000)
        assert client.contains(held)
        child.say()
        assert child.end() == 0
    until(lambda: figure(client, "pinned objects") == 0, "what it held is let go of")


COLLECTED = """
    import gc, sys
    import shmplasma as plasma
    from shmplasma import session

    class Between:
        def __del__(self):
            for _ in range(3):
                other.flush()
            later.append(plasma.connect(sys.argv[1]))

    def lifeline(*arguments):
        betweens.append(Between())  # so that the collector comes to it between the socket and this
        return made(*arguments)

    other = plasma.connect(sys.argv[1])
    later, betweens = [], []
    made, session.Lifeline = session.Lifeline, lifeline
    gc.disable()
    client = plasma.connect(sys.argv[1])
    (between,) = betweens
    between.client, client.between = client, between
    betweens.clear()
    del client, between
    gc.collect()
    (client,) = later
    object_id = client.put_raw_buffer(b"x")
    (held,) = client.get_buffers([object_id])
    other.flush()
    client.flush()
    assert "\\npinned objects: 1\\n" in other.debug_string()
"""


def test_a_client_that_the_collector_takes(store: plasma.Store) -> None:
    """Its last word does not reach another client, which may have its place as soon as its connection has ended."""
    run_python(COLLECTED, store.store_socket_name)


DROPPED = """
    import select, sys
    from threading import Thread
    import shmplasma as plasma
    from shmplasma.layout import HeaderWord

    path, use, beside = sys.argv[1:]
    missing = plasma.ObjectID.from_random()
    client = plasma.connect(path)
    mine = plasma.ObjectID.from_random()
    client.create(mine, 100)
    client.put(b"takes a lease")
    uses = {
        "asks": lambda: client.contains(missing),
        "seals": lambda: client.seal(mine),
        "puts": lambda: client.put(b"by the lease"),
        "gets": lambda: client.get(missing, timeout_ms=10),
    }
    heard = []

    def hear(task):
        try:
            task()
        except plasma.NotConnectedError as error:
            heard.append(str(error))

    threads = [Thread(target=hear, args=(lambda: client.get(missing),)) for _ in range(int(beside))]
    for thread in threads:
        thread.start()
    channel = client._session._link.channel
    while threads and not (channel._reading.locked() and len(channel._waiters) == len(threads) - 1):
        pass  # until all have asked: whoever sends beside one who fails to leaves it to him
    channel.send(999, b"")
    poll = select.poll()
    poll.register(channel._sock, 0)
    assert poll.poll(), "the store drops this client"
    while client._session.attachment.words[HeaderWord.POLLED]:
        pass  # until the store has to be told of records
    hear(uses[use])
    hear(uses["asks"])
    for thread in threads:
        thread.join()
    assert len(heard) == 2 + len(threads), heard
    assert all("dropped this client" in each and "999" in each for each in heard), heard
"""


@pytest.mark.parametrize("use", ["asks", "seals", "puts", "gets"])
@pytest.mark.parametrize("beside", [0, 2])
def test_who_was_dropped_hears_why(store: plasma.Store, use: str, beside: int) -> None:
    """A client that is dropped while it does not look hears the reason at its next call, whatever that is."""
    run_python(DROPPED, store.store_socket_name, use, str(beside))


def test_who_has_posted_what_is_no_record_hears_so(tmp_path: Path) -> None:
    """A client whose store has died is not taken back for it, and not kept waiting; the log says why."""
    path = str(tmp_path / "s")
    with killed("-m", "1MB", "-s", path):
        client = plasma.connect(path)
    session = client._session
    assert session is not None
    session._link._outbox.append(99, b"no record")
    with running("-s", path) as (_, said):
        assert f"dropped client 0 (pid {os.getpid()}): " in said
        with pytest.raises(plasma.NotConnectedError, match="its log says why"):
            client.evict(1)
        client.disconnect()


def test_a_subscriber_of_a_store_that_comes_back(tmp_path: Path) -> None:
    """It hears of all that is sealed, and on of what comes, and a warning says that something may be missing."""
    path = str(tmp_path / "s")
    with killed("-m", "1MB", "-s", path):
        client = plasma.connect(path)
        client.subscribe()
        kept, gone, late, later = (plasma.ObjectID.from_random() for _ in range(4))
        for object_id in (kept, gone):
            client.put_raw_buffer(b"", object_id)
        client.flush()
        assert client.get_next_notification()[0] == kept
    with client:
        with killed("-s", path):
            client.delete([gone])
            client.put_raw_buffer(b"late", late)
            assert client.get_next_notification() == (gone, 0, 0), "it was there before"
            with pytest.warns(RuntimeWarning, match="went meanwhile are not told of"):
                assert client.get_next_notification() == (kept, 0, 0)
            assert client.get_next_notification() == (late, 4, 0)
            client.put_raw_buffer(b"later", later)
            assert client.get_next_notification() == (later, 5, 0)
        with running("-s", path, "--fresh"):
            with pytest.raises(plasma.NotConnectedError, match="has ended the subscription"):
                client.get_next_notification()
            with pytest.raises(plasma.NotConnectedError, match="started anew"):
                client.contains(plasma.ObjectID.from_random())
            client.subscribe()
            client.put_raw_buffer(b"late", late)
            assert client.get_next_notification() == (late, 4, 0)


def test_an_iterator_over_notifications_of_a_store_that_comes_back(tmp_path: Path) -> None:
    """It goes on as well, without blocking its event loop."""
    path = str(tmp_path / "s")

    async def main() -> None:
        with killed("-m", "1MB", "-s", path):
            client = plasma.connect(path)
            kept = client.put_raw_buffer(b"kept")
            notifications = client.notifications()
            assert await anext(notifications) == (kept, 4, 0)
        with client, running("-s", path):
            with pytest.warns(RuntimeWarning, match="died and come back"):
                assert await anext(notifications) == (kept, 4, 0)
            late = client.put_raw_buffer(b"late")
            assert await anext(notifications) == (late, 4, 0)
            await notifications.aclose()

    asyncio.run(main())


def test_a_subscriber_that_does_not_keep_up(
    store: plasma.Store, client: plasma.PlasmaClient
) -> None:
    """One that is dropped by a store that lives is told so, instead of being told all objects again and again."""
    with store.connect() as subscriber:
        subscriber.subscribe()
        subscriber.get_notification_socket().send(b"this is no message")
        with pytest.raises(plasma.NotConnectedError, match="has dropped this subscription"):
            subscriber.get_next_notification()
        subscriber.subscribe()
        object_id = client.put_raw_buffer(b"12345")
        assert subscriber.get_next_notification() == (object_id, 5, 0)


@pytest.mark.parametrize("path", ["", "/tmp/" + 103 * "a"])
def test_a_path_of_an_impossible_length(path: str) -> None:
    """Nobody waits for a store there, nor is told to start one that would be refused."""
    with pytest.raises(
        plasma.NotConnectedError, match=r"a socket path has 1 to 107 bytes.* give the path at which"
    ):
        plasma.connect(path)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EMFILE, "too many files are open here"),
        (errno.ENOMEM, "there is no memory for a connection"),
        (errno.ENOBUFS, "there is no memory for a connection"),
    ],
)
@pytest.mark.parametrize("call", ["connect", "recvmsg"])
def test_nothing_for_a_connection(
    client: plasma.PlasmaClient,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    text: str,
    call: str,
) -> None:
    """Who has too many files open, or no memory, is told so, and not that there is no store."""

    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(OwnedSocket, call, refused)
    with pytest.raises(OSError, match=text) as raised:
        plasma.connect(client.store_socket_name)
    assert raised.value.errno == number
    assert not isinstance(raised.value, plasma.NotConnectedError)


def test_a_store_that_does_not_accept(tmp_path: Path) -> None:
    """Where too many wait already it is not said that there is no store, nor that one is to be started."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as stack:
        listener.bind(path)
        listener.listen(0)
        with suppress(BlockingIOError):
            while True:
                stack.enter_context(closing(exchange.Exchange.connect(path, 0, 1)))
        with pytest.raises(plasma.NotConnectedError, match="has too many connections waiting"):
            plasma.connect(path, num_retries=0)


def test_what_is_no_socket(tmp_path: Path) -> None:
    """A file or a directory becomes no store."""
    file = tmp_path / "file"
    file.touch()
    for path in (file, tmp_path):
        with pytest.raises(plasma.NotConnectedError, match=f"'{path}' is no socket; give the path"):
            plasma.connect(path)


def test_the_command_that_starts_a_store_can_be_pasted(tmp_path: Path) -> None:
    """Whatever is in the path."""
    path = tmp_path / "there is; none"
    with pytest.raises(plasma.NotConnectedError, match=f"shmplasma-store -s '{path}'$"):
        plasma.connect(path, num_retries=0)


def test_after_the_end_of_its_store_a_client_has_the_next_one(tmp_path: Path) -> None:
    """The error says that another call will do once there is a store, and so it does."""
    path = str(tmp_path / "s")
    with ExitStack() as stack:
        with running("-m", "10MB", "-s", path):
            client = stack.enter_context(plasma.connect(path))
        ended = f"has ended: .*; call again once a store serves {path}"
        with pytest.raises(plasma.NotConnectedError, match=ended):
            client.evict(1)
        with pytest.raises(plasma.NotConnectedError, match="no store answers"):
            client.evict(1)
        with running("-m", "10MB", "-s", path):
            assert client.get(client.put("there")) == "there"
            client.disconnect()


ELSEWHERE = """
    import os, sys, warnings
    import shmplasma as plasma

    warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, where threads are about
    os.chdir(sys.argv[1])
    with plasma.connect("s") as client:
        assert client.store_socket_name == "s"
        object_id = client.put(1)
        os.chdir("/")
        print("put", flush=True)
        sys.stdin.readline()
        assert client.contains(object_id)
        pid = os.fork()
        if not pid:
            os._exit(not client.contains(object_id))
        print(os.waitpid(pid, 0)[1], flush=True)
"""


def test_a_program_that_changes_its_directory(tmp_path: Path) -> None:
    """A client of a relative path finds its store again from elsewhere, and so does a forked child."""
    with Child(ELSEWHERE, str(tmp_path)) as child:
        with killed("-m", "1MB", "-s", str(tmp_path / "s")):
            assert child.hear() == "put"
        with running("-s", str(tmp_path / "s")):
            child.say()
            assert child.hear() == "0"
            assert child.end() == 0


def test_a_store_that_does_not_answer_yet(
    store: plasma.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who connects waits for it as long as its retries last; a wait counts for as many as would have fit into it."""
    monkeypatch.setattr(handshake, "_HANDSHAKE_SECONDS", 0.3)
    store.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(plasma.NotConnectedError, match="no store: timed out"):
            plasma.connect(store.store_socket_name, num_retries=7)
        wakes = threading.Timer(0.5, store.process.send_signal, (signal.SIGCONT,))
        wakes.start()
        with plasma.connect(store.store_socket_name, num_retries=1000) as client:
            assert client.list() == {}
        wakes.join()
    finally:
        store.process.send_signal(signal.SIGCONT)
