"""Ctrl-C, signal handlers and finalizers in the middle of a call: what it has begun is undone, and the client goes on."""

from __future__ import annotations

import select
import signal
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from shmplasma import ObjectID, PlasmaClient, Store, system
from shmplasma.protocol import Frame
from shmplasma.transport import Channel
from tests.clients import figure
from tests.processes import INTERRUPTER, Child, run_python, until, wait_until_asleep

UNDONE = """
    import os, select, signal, sys
    from threading import Thread
    import shmplasma as plasma
    from shmplasma.posted import Abort

    store = plasma.Store("10MB")
    client = store.connect()
    missing = plasma.ObjectID.from_random()
    client.contains(missing)
    pid = store.process.pid

    def stop():
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)

    stop()
    print("waits", flush=True)
    try:
        client.create(plasma.ObjectID.from_random(), 5_000_000)
    except KeyboardInterrupt:
        pass
    os.kill(pid, signal.SIGCONT)
    link = client._session._link
    select.select([link.channel], [], [])  # the object is created, and nobody has read of it

    def ask():
        try:
            client.contains(missing)
        except plasma.NotConnectedError:
            pass

    thread = Thread(target=ask, daemon=True)
    if sys.argv[1] == "full":
        stop()
        while link._outbox.post(Abort.KIND, missing.binary()):
            pass
        thread.start()
        while link.channel._given_up:
            pass
        os.kill(pid, signal.SIGCONT)
    else:
        store.process.kill()
        store.process.wait()
        thread.start()
    thread.join(20)
    print("hangs" if thread.is_alive() else "goes on", flush=True)
    if sys.argv[1] == "full" and not thread.is_alive():
        assert not client.list()
        client.disconnect()
    store.close()
    os._exit(0)
"""


@pytest.mark.parametrize("how", ["full", "dead"])
def test_a_creation_is_undone_later(how: str) -> None:
    """Who reads that an interrupted creation was granted undoes it, and waits neither for the outbox nor for a store."""
    with Child(UNDONE, how) as child:
        assert child.hear() == "waits"
        wait_until_asleep(child.process.pid)
        child.process.send_signal(signal.SIGINT)
        assert child.hear() == "goes on"
        assert child.end() == 0


UNDONE_BY_THE_NEXT = """
    import os, select, signal, subprocess, sys
    import shmplasma as plasma
    from shmplasma.posted import Abort

    def start():
        return subprocess.Popen([sys.executable, "-m", "shmplasma.cli", "-m", "10MB", "-s", sys.argv[1]])

    def stop():
        store.send_signal(signal.SIGSTOP)
        os.waitpid(store.pid, os.WUNTRACED)

    store = start()
    try:
        client = plasma.connect(sys.argv[1])
        missing = plasma.ObjectID.from_random()
        client.contains(missing)
        stop()
        print("waits", flush=True)
        try:
            client.create(plasma.ObjectID.from_random(), 5_000_000)
        except KeyboardInterrupt:
            pass
        store.send_signal(signal.SIGCONT)
        link = client._session._link
        select.select([link.channel], [], [])  # the object is created, and nobody has read of it
        stop()
        while link._outbox.post(Abort.KIND, missing.binary()):
            pass
        store.kill()
        store.wait()
        store = start()
        client.flush()
        assert not client.list()
        client.disconnect()
    finally:
        store.terminate()
        store.wait()
"""


def test_a_creation_is_undone_by_the_next_store(tmp_path: Path) -> None:
    """Its client reads that it was granted when the store has died, and finds no place in the outbox to undo it."""
    with Child(UNDONE_BY_THE_NEXT, str(tmp_path / "s")) as child:
        assert child.hear() == "waits"
        wait_until_asleep(child.process.pid)
        child.process.send_signal(signal.SIGINT)
        assert child.end() == 0


@pytest.mark.parametrize("heard", ["once", "twice", "later"])
def test_a_creation_is_undone_once(
    client: PlasmaClient, monkeypatch: pytest.MonkeyPatch, heard: str
) -> None:
    """However often, and whenever, its reply is heard: another thread may have created an object under its id since."""
    session, key = client._session, ObjectID.from_random()
    assert session is not None
    link = session._link
    aborted: list[bytes] = []
    give_up = Channel.give_up

    def post_soon(kind: int, body: bytes) -> None:
        aborted.append(body)
        link.post_soon(kind, body)
        if heard == "later":
            raise KeyboardInterrupt

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def give_up_twice(channel: Channel, request_id: int, dispose: Callable[[Frame], None]) -> None:
        def give(frame: Frame) -> None:
            dispose(frame)
            dispose(frame)

        give_up(channel, request_id, give)

    def leave_unread(channel: Channel, *_: object) -> None:
        select.select([channel], [], [])

    monkeypatch.setattr(session, "post_soon", post_soon)
    with monkeypatch.context() as patch:
        patch.setattr(Channel, "wait", interrupted)
        if heard == "twice":
            patch.setattr(Channel, "give_up", give_up_twice)
        if heard == "later":
            patch.setattr(Channel, "read_until", leave_unread)
        with pytest.raises(KeyboardInterrupt):
            client.create(key, 20 << 20)
    client.flush()
    assert aborted == [key.id_bytes]
    assert key not in client.list()


def test_a_creation_that_was_refused_undoes_nothing(
    client: PlasmaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object that there is under its id is another thread's, which writes to it."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    key = ObjectID.from_random()
    client.create(key, 20 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(Channel, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.create(key, 20 << 20)
    client.flush()
    client.seal(key)
    assert client.contains(key)


LARGE_PUTS = """
    import gc
    import shmplasma as plasma
    from shmplasma import link, session, transport, writing

    parts = link, session, transport, writing
    value = bytes(17 << 20)  # more than is put on lease
    with plasma.connect(sys.argv[1]) as client:
        client.put(value, plasma.ObjectID(20 * b"f"))
        client.delete([plasma.ObjectID(20 * b"f")])
        count, sealed, key = 0, 0, plasma.ObjectID(20 * b"k")
        interrupted = True
        while interrupted:
            count += 1
            interrupted = is_interrupted(count, parts, client.put, value, key)
            client.flush()  # which takes in what an interrupted request has left
            states = [each["state"] for each in client.list().values()]
            assert states in ([], ["sealed"]), (count, states)
            sealed += len(states)
            client.delete([key])
        print(count, sealed, flush=True)
        gc.collect()
        assert "pinned objects: 0\\n" in client.debug_string()
"""


def test_interrupts_at_each_point_of_a_large_put(store: Store) -> None:
    """Wherever Ctrl-C meets a put that goes by the store, its object is sealed or gone, and nothing is pinned."""
    with Child(INTERRUPTER + dedent(LARGE_PUTS), store.store_socket_name) as child:
        count, sealed = map(int, child.hear().split())
        assert count > 50
        assert sealed < count / 2
        assert child.end() == 0


USED_UP = """
    import gc
    import shmplasma as plasma
    from shmplasma import claiming, leasing, link, shared_outbox, transport
    from shmplasma.leases import BUSY_WORD

    parts = claiming, leasing, link, shared_outbox, transport
    value = bytes(36_000)  # three of them fit the first lease
    with plasma.connect(sys.argv[1]) as client:
        keys = []

        def puts():
            for _ in range(4):
                chosen = plasma.ObjectID.from_random() if sys.argv[2] == "chosen" else None
                metadata = b"m" if sys.argv[2] == "metadata" else b""
                keys.append(client.put_raw_buffer(value, chosen, metadata))

        puts()
        lease = client._session.leasing
        count, interrupted = 0, True
        while interrupted:
            count += 1
            client.delete(keys)
            keys.clear()
            client.flush()
            interrupted = is_interrupted(count, parts, puts)
            assert len(lease.token) == 2, count
            assert not lease.board[BUSY_WORD], count
            puts()
            client.flush()
            found = client.list()
            assert found.keys() >= set(keys), count
            assert len(found) <= len(keys) + 1, count
            client.delete(list(found))
        print(count, flush=True)
        gc.collect()
        assert "pinned objects: 0\\n" in client.debug_string()
        assert len(client._session._link.channel._replies) <= 1  # of the lease that was asked for ahead
"""


@pytest.mark.skipif(not system.fast_path_available(), reason="nothing is put on lease")
@pytest.mark.parametrize("how", ["fresh", "metadata", "chosen"])
def test_interrupts_at_each_point_of_puts_that_use_a_lease_up(how: str) -> None:
    """Wherever Ctrl-C meets them: what was put is there, the next put works, nobody is kept out of the lease, and none stays behind."""
    with Store("10MB") as store, store.connect() as other:
        with Child(INTERRUPTER + dedent(USED_UP), store.store_socket_name, how) as child:
            assert int(child.hear()) > 50
            assert child.end() == 0
        until(lambda: figure(other, "leased bytes") == 0, "the lease comes back")


NO_MEMORY = """
    import sys
    import _testcapi
    import shmplasma as plasma
    from shmplasma.leases import BUSY_WORD

    with plasma.connect(sys.argv[1]) as client:
        metadata = b"m" if sys.argv[2] == "metadata" else b""

        def put():
            client.put_raw_buffer(b"x", key, metadata)

        denied = 0
        for count in range(1, 120):
            key = plasma.ObjectID.from_random() if sys.argv[2] == "chosen" else None
            client.put_raw_buffer(b"x", None, metadata)  # and draws ids
            _testcapi.set_nomemory(count, count + 1)
            try:
                put()
            except MemoryError:
                denied += 1
            finally:
                _testcapi.remove_mem_hooks()
            assert len(client._session.leasing.token) == 2, count
            assert not client._session.leasing.board[BUSY_WORD], count
        assert denied > 5
        client.flush()
"""


@pytest.mark.skipif(not system.fast_path_available(), reason="nothing is put on lease")
@pytest.mark.parametrize("how", ["fresh", "metadata", "chosen"])
def test_puts_for_which_there_is_no_memory(how: str, store: Store) -> None:
    """Whichever of its allocations fails: nobody is kept out of the lease, and nobody is busy with it."""
    pytest.importorskip("_testcapi", reason="this Python came without the modules of its own tests")
    run_python(NO_MEMORY, store.store_socket_name, how)


NOTIFIED = """
    import shmplasma as plasma
    from shmplasma import notifications

    with plasma.connect(sys.argv[1]) as client:
        client.subscribe()
        ids = [client.put_raw_buffer(b"x" * size) for size in range(60)]
        client.flush()
        told = []

        def hear():
            told.append(client.get_next_notification())

        count = 1
        while is_interrupted(count, (notifications,), hear):
            count += 1
        while told[-1][0] != ids[-1]:
            hear()
        assert count > 10
        # What was taken from a message as a whole goes with the call that was interrupted after it.
        assert len(told) >= 55, told
        assert all(size == ids.index(key) for key, size, _ in told), told
"""


def test_interrupts_at_each_point_of_a_notification(store: Store) -> None:
    """Wherever Ctrl-C meets a subscriber, what it hears next is a notification that begins where one does."""
    with Child(INTERRUPTER + dedent(NOTIFIED), store.store_socket_name) as child:
        assert child.end() == 0


HANDLED = """
    import signal, sys
    import shmplasma as plasma

    path, what = sys.argv[1:]
    client = plasma.connect(path)
    missing = plasma.ObjectID.from_random()
    client.create(missing, 100)

    def handle(*_):
        if what == "disconnect":
            client.disconnect()
            print("ends", flush=True)
            sys.exit(7)
        client.delete([missing])

    signal.signal(signal.SIGTERM, handle)
    print("waits", flush=True)
    try:
        client.get(plasma.ObjectID.from_random())
    except RuntimeError as error:
        assert "inside another call of this client" in str(error), error
        print("refused", flush=True)
    client.delete([missing])
    sys.exit(8)
"""


@pytest.mark.parametrize(
    ("what", "said", "code"), [("disconnect", "ends", 7), ("ask", "refused", 8)]
)
def test_a_signal_handler_that_uses_the_client(
    store: Store, client: PlasmaClient, what: str, said: str, code: int
) -> None:
    """In the middle of another call it may disconnect, and hears that it may not ask; nobody waits for himself."""
    with Child(HANDLED, store.store_socket_name, what) as child:
        assert child.hear() == "waits"
        wait_until_asleep(child.process.pid)
        child.process.terminate()
        assert child.hear() == said
        assert child.end() == code
    until(lambda: not client.list(), "what was not sealed has gone")


WAITED = """
    import signal, subprocess, sys
    import shmplasma as plasma

    path = sys.argv[1]

    def start():
        return subprocess.Popen([sys.executable, "-m", "shmplasma.cli", "-m", "10MB", "-s", path])

    def handle(*_):
        global store
        try:
            client.contains(missing)
        except RuntimeError as error:
            refused.append(str(error))
        store = start()

    refused = []
    missing = plasma.ObjectID.from_random()
    store = start()
    try:
        client = plasma.connect(path)
        store.kill()
        store.wait()
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert not client.contains(missing)
    finally:
        store.terminate()
        store.wait()
    assert "inside another call of this client" in refused[0], refused
"""


def test_a_signal_handler_while_a_store_is_waited_for(tmp_path: Path) -> None:
    """It hears that it may not ask, and the call goes on when there is a store again."""
    run_python(WAITED, str(tmp_path / "socket"))


FULL = """
    import sys
    import shmplasma as plasma

    client = plasma.connect(sys.argv[1])
    key = client.put_raw_buffer(b"x")
    refused = []
    pool = client._session._boards
    grant = pool._grant

    def interrupted():  # as by a signal handler
        try:
            client.get_buffers([key])
        except RuntimeError as error:
            refused.append(str(error))
        return grant()

    pool._grant = interrupted
    held = [client.get_buffers([key]) for _ in range(600)]
    assert len(refused) == 1, refused
    assert "inside another call of this client" in refused[0], refused
"""


def test_a_signal_handler_while_a_board_is_asked_for(store: Store) -> None:
    """Where all slots are taken it is refused one; the call that was interrupted gets another board."""
    run_python(FULL, store.store_socket_name)


AWAITED = """
    import faulthandler, os, signal, sys
    from threading import Timer
    import shmplasma as plasma

    faulthandler.dump_traceback_later(30, exit=True)
    with plasma.Store("10MB") as store:
        pid = store.process.pid
        client = store.connect()
        leasing = client._session.leasing
        client.put_raw_buffer(b"x" * 1000)
        while leasing._end - leasing._cursor >= 2048:
            client.put_raw_buffer(b"x" * 1000)
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        while not leasing._awaited:
            client.put_raw_buffer(b"x" * 1000)

        def handle(*_):
            try:
                client.put_raw_buffer(b"y")
            except RuntimeError as error:
                assert "inside another call of this client" in str(error), error
                print("refused", flush=True)
            os.kill(pid, signal.SIGCONT)

        signal.signal(signal.SIGTERM, handle)
        print("waits", flush=True)
        assert client.get_buffers([plasma.ObjectID.from_random()], 2000) == [None]
        assert leasing._awaited
        client.put_raw_buffer(b"z")
        assert not leasing._awaited
        assert leasing._end
        client.disconnect()
"""


@pytest.mark.skipif(not system.fast_path_available(), reason="nothing is put on lease")
def test_a_signal_handler_that_needs_the_lease_that_was_asked_for() -> None:
    """In the middle of another call it hears that it may not wait for it; the next put has the lease."""
    with Child(AWAITED) as child:
        assert child.hear() == "waits"
        wait_until_asleep(child.process.pid)
        child.process.terminate()
        assert child.hear() == "refused"
        assert child.end() == 0


REOPENED = """
    import faulthandler, sys
    import shmplasma as plasma

    faulthandler.dump_traceback_later(30, exit=True)
    client = plasma.connect(sys.argv[1])
    key = client.put_raw_buffer(b"x")
    client.flush()
    refused = []
    opens = client._open

    def interrupted(num_retries):  # as by a signal handler, or a finalizer
        try:
            client.contains(key)
        except RuntimeError as error:
            refused.append(str(error))
        return opens(num_retries)

    client._open = interrupted
    client._lose()  # as where there is another store now
    assert client.contains(key)
    assert len(refused) == 1, refused
    assert "inside another call of this client" in refused[0], refused
"""


def test_a_signal_handler_while_a_client_connects_anew(store: Store) -> None:
    """It hears that it may not ask, and the call that was interrupted has a new session."""
    run_python(REOPENED, store.store_socket_name)


AT_HOME = """
    import faulthandler, sys
    import shmplasma as plasma
    from shmplasma.store_ref import Home, home_of

    faulthandler.dump_traceback_later(30, exit=True)
    path = sys.argv[1]
    refused = []
    opens = Home._open

    def interrupted(self, num_retries):  # as by a signal handler, or a finalizer
        try:
            home_of(path)
        except RuntimeError as error:
            refused.append(str(error))
        return opens(self, num_retries)

    Home._open = interrupted
    with plasma.connect(path) as client:
        assert client.put_ref(1).get() == 1
    assert len(refused) == 1, refused
    assert "inside another call of this client" in refused[0], refused
"""


def test_a_signal_handler_while_the_first_reference_is_made(store: Store) -> None:
    """One that makes another one is refused, and the first is made."""
    run_python(AT_HOME, store.store_socket_name)


GETS = """
    import gc
    import shmplasma as plasma
    from shmplasma import asking, link, transport

    parts = asking, link, transport
    missing = [plasma.ObjectID(bytes([number]) * 20) for number in range(int(sys.argv[2]))]
    with plasma.connect(sys.argv[1]) as client:
        client.get(missing, 0)
        session = client._session
        count = 1
        while is_interrupted(count, parts, client.get, missing, 1):
            count += 1
            client.flush()  # which takes in what an interrupted request has left
            gc.collect()
            assert not session._link.channel._given_up, count
            assert not session._link.channel._hints, count
            (board,) = session._lifeline.boards
            assert len(board.free) == 511, (count, len(board.free))
        print(count, flush=True)
"""


@pytest.mark.parametrize("n_missing", [1, 2])
def test_interrupts_at_each_point_of_a_get(store: Store, n_missing: int) -> None:
    """Wherever Ctrl-C meets a get that is asked for, its slots come back, also where nobody is going to answer it."""
    with Child(INTERRUPTER + dedent(GETS), store.store_socket_name, str(n_missing)) as child:
        assert int(child.hear()) > 50
        assert child.end() == 0


COLLECTED = """
    import gc, sys
    import shmplasma as plasma

    class Socket:
        # The collector runs while a message is being sent, as it may at any time.
        def __init__(self, sock):
            self.sock = sock

        def send(self, *arguments):
            gc.collect()
            return self.sock.send(*arguments)

        def __getattr__(self, name):
            return getattr(self.sock, name)

    class Circular:
        def __init__(self):
            self.itself = self

        def __del__(self):
            try:
                client.delete([missing])
            except RuntimeError as error:
                refused.append(error)

    client = plasma.connect(sys.argv[1])
    missing = plasma.ObjectID.from_random()
    refused = []
    gc.disable()
    channel = client._session._link.channel
    channel._sock = Socket(channel._sock)
    for number in range(100):
        Circular()
        client.flush()
    print(len(refused))
"""


def test_a_finalizer_that_uses_the_client(store: Store) -> None:
    """One that comes in the middle of another call hears that it may not ask, and that call goes on."""
    assert int(run_python(COLLECTED, store.store_socket_name)) == 100


LATE = """
    import sys
    import shmplasma as plasma

    class Late:
        client = plasma.connect(sys.argv[1])
        value = bytes(20 << 20)
        object_id = plasma.ObjectID(20 * b"l")

        def __del__(self):
            self.client.put_raw_buffer(self.value, self.object_id)

    late = Late()
    late.itself = late
"""


def test_a_finalizer_at_the_end_of_the_interpreter(store: Store, client: PlasmaClient) -> None:
    """One that puts a large object then, when nothing can be imported any more, has put it."""
    run_python(LATE, store.store_socket_name)
    assert client.contains(ObjectID(20 * b"l"))
