"""Buffers that a forked child inherits: valid as long as it lives, whatever becomes of its parent."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from shmplasma import (
    ObjectID,
    ObjectNotAvailable,
    PlasmaClient,
    PlasmaStoreFull,
    Store,
    connect,
    inheritance,
    system,
)
from tests.command import PROGRAM, killed, running
from tests.processes import Child, in_forked_child, run_python, until

PARENT = """
    import gc, os, sys
    import shmplasma as plasma

    client = plasma.connect(sys.argv[1])
    held = client.get_buffers(client.put_raw_buffer(b"inherited" * 1000))
    if not os.fork():
        print(os.getpid(), flush=True)
        sys.stdin.readline()
        print(bytes(held) == b"inherited" * 1000, flush=True)
        del held
        gc.collect()  # what the child has of the parent's session, which is in a cycle
        sys.stdin.readline()
        os._exit(0)
    sys.stdin = None
    import time
    time.sleep(600)
"""


@contextmanager
def forked(task: Callable[[int], object]) -> Iterator[Callable[[], int]]:
    """Fork a child that waits to be told, and then does its task; yield what tells it and returns its code."""
    reader, writer = os.pipe()

    def wait_and_do() -> None:
        os.close(writer)
        os.read(reader, 1)
        task(reader)

    pid = os.fork()
    if not pid:
        code = 1
        try:
            wait_and_do()
            code = 0
        finally:
            os._exit(code)
    os.close(reader)

    def end() -> int:
        nonlocal writer
        if writer >= 0:
            os.close(writer)
            writer = -1
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return 0

    try:
        yield end
    finally:
        end()


def overwrite(client: PlasmaClient) -> None:
    """Fill the store with something else, over and over."""
    for _ in range(40):
        try:
            client.put_raw_buffer(b"\xff" * 9_000_000)
        except PlasmaStoreFull:
            break


def pinned(client: PlasmaClient) -> int:
    """Return how many objects are pinned."""
    (line,) = (line for line in client.debug_string().splitlines() if "pinned objects" in line)
    return int(line.rpartition(" ")[2])


def test_a_parent_that_lets_go(client: PlasmaClient, client2: PlasmaClient) -> None:
    """What a child inherited is neither evicted nor overwritten when its parent lets go of it."""
    object_id = client.put(np.arange(1_000_000))
    arrays = [client.get(object_id)]

    def look(_: int) -> None:
        assert np.array_equal(arrays[0], np.arange(1_000_000))

    with forked(look) as end:
        arrays.clear()
        client2.delete([object_id])
        overwrite(client2)
        assert pinned(client2) == 1
        assert end() == 0
    until(lambda: pinned(client2) == 0, "nothing is pinned when the child has ended")


def test_a_child_that_lets_go(client: PlasmaClient, client2: PlasmaClient) -> None:
    """A child's release is its own: the parent's buffer stays."""
    object_id = client.put_raw_buffer(b"of both")
    buffers = [client.get_buffers(object_id)]

    def let_go() -> None:
        buffers.clear()
        # The connection that bridged the fork is open until the parent has closed its copy, too.
        until(lambda: client2.list()[object_id]["ref_count"] == 1, "only the parent holds it")

    assert in_forked_child(let_go) == 0
    until(lambda: client2.list()[object_id]["ref_count"] == 1, "the child has gone")
    client2.delete([object_id])
    overwrite(client2)
    assert bytes(buffers[0]) == b"of both"


def test_what_a_child_lets_go_of_goes_without_the_collector(client: PlasmaClient) -> None:
    """With its last buffer its connection ends at once."""
    held = client.get_buffers([client.put_raw_buffer(b"x")])

    def let_go() -> None:
        gc.collect()  # what the child has of the parent's session, which is in a cycle
        gc.disable()
        lifelines = [
            weakref.ref(each) for each in inheritance._lifelines if any(each.pinned_words())
        ]
        assert len(lifelines) == 1
        held.clear()
        assert lifelines[0]() is None

    assert in_forked_child(let_go) == 0


def test_a_client_that_was_closed(store: Store, client2: PlasmaClient) -> None:
    """Buffers that have outlived their client are inherited as well."""
    with store.connect() as client:
        object_id = client.put_raw_buffer(b"outlives")
        buffers = [client.get_buffers(object_id)]

    def look(_: int) -> None:
        assert bytes(buffers[0]) == b"outlives"

    with forked(look) as end:
        buffers.clear()
        client2.delete([object_id])
        overwrite(client2)
        assert end() == 0


def test_a_parent_that_is_killed(store: Store, client: PlasmaClient) -> None:
    """The child's buffers stay when its parent is killed, and go when it ends."""
    with Child(PARENT, store.store_socket_name) as child:
        child.hear()
        until(lambda: pinned(client) == 1, "the child has inherited")
        child.kill()
        overwrite(client)
        assert pinned(client) == 1
        child.say()
        assert child.hear() == "True"
        until(lambda: pinned(client) == 0, "the child has let go")
        child.say()


def test_a_child_that_lets_go_after_its_store_has_died(tmp_path: Path) -> None:
    """The next store waits for the child no longer than until its last buffer has gone."""
    path = str(tmp_path / "s")
    with killed("-m", "1MB", "-s", path):
        child = Child(PARENT, path)
        pid = child.hear()
    with child, running("-s", path), connect(path) as client:
        child.kill()
        assert f"(pid {pid})" in client.debug_string()
        assert pinned(client) == 1
        child.say()
        assert child.hear() == "True"
        until(lambda: f"(pid {pid})" not in client.debug_string(), "the child is forgotten")
        assert pinned(client) == 0
        child.say()


TWO_THREADS = """
    import os, sys, threading, warnings
    import numpy as np
    import shmplasma as plasma

    warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
    client = plasma.connect(sys.argv[1])
    held = client.get_buffers(client.put_raw_buffer(b"held"))
    ref = client.put_ref(np.arange(1000))
    lifeline, home = client._session._lifeline, client._home
    codes = []

    def fork_again_and_again():
        for _ in range(20):
            pid = os.fork()
            if not pid:
                pins = any(any(board.words[1:]) for board in lifeline.boards)
                connected = lifeline._wake_fd >= 0 and home._session is not None
                os._exit(not (pins and connected))
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    threads = [threading.Thread(target=fork_again_and_again) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == 40 * [0], codes
"""


def test_threads_that_fork_at_once(store: Store) -> None:
    """The children of each have what they inherit pinned, and hold its references."""
    run_python(TWO_THREADS, store.store_socket_name)


BEFORE_THE_FORK = """
    import os, sys

    late = []  # what happens when all is prepared: hooks run from the last to the first
    os.register_at_fork(before=lambda: [happen() for happen in late])

    import shmplasma as plasma
    from shmplasma import inheritance, system

    client, other = plasma.connect(sys.argv[1]), plasma.connect(sys.argv[1])
    ids = [other.put_raw_buffer(number.to_bytes(4, "big") * 100) for number in range(1100)]
    buffers = {}

    def hold(numbers):
        buffers.update((number, client.get_buffers(ids[number])) for number in numbers)

    def fork(pinned, begin=lambda: None):
        (told, tell), (heard, hear) = os.pipe(), os.pipe()
        pid = os.fork()
        if not pid:
            os.close(tell)
            begin()
            os.write(hear, b"x")
            os.read(told, 1)
            whole = all(bytes(buffer) == n.to_bytes(4, "big") * 100 for n, buffer in buffers.items())
            os._exit(not whole)
        os.close(hear)
        assert os.read(heard, 1)
        buffers.clear()
        listed = other.list()
        assert [n for n, each in enumerate(ids) if listed[each]["ref_count"]] == list(pinned)
        other.delete(ids)
        for _ in ids:
            other.put_raw_buffer(bytes(400), keep=True)  # where the first room is
        os.write(tell, b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
"""A program that looks whether its child's buffers are pinned, and show the bytes that they did."""


@pytest.mark.parametrize("n_held", [0, 10, 511, 1022])
def test_boards_that_come_late(store: Store, n_held: int) -> None:
    """What is pinned when all is prepared, on boards that were asked for since, is pinned for the child; so is all else."""
    end = """
    hold(range(int(sys.argv[2])))
    late.append(lambda: hold(range(1022, 1060)))
    fork([*range(int(sys.argv[2])), *range(1022, 1060)])
"""
    run_python(BEFORE_THE_FORK + end, store.store_socket_name, str(n_held))


IN_THE_MIDST = """
    import os, sys
    import shmplasma as plasma
    from shmplasma import leasing

    with plasma.connect(sys.argv[1]) as client:
        client.put_raw_buffer(b"first")
        (hears, tells), pids, keys = os.pipe(), [], []

        def handler(frame, *_):
            if frame.f_code is leasing.LeaseWriter.put_bytes.__code__:
                sys.settrace(None)
                pids.append(os.fork())
                if pids[0]:
                    keys.append(client.put_raw_buffer(b"by the parent"))
                    os.write(tells, b".")
                else:
                    os.read(hears, 1)

        sys.settrace(handler)
        try:
            client.put_raw_buffer(b"in both of them")
        except plasma.NotConnectedError:
            os._exit(3)
        if not pids[0]:
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 3
        assert client.get_buffers(keys)[0].to_pybytes() == b"by the parent"
"""


@pytest.mark.skipif(not system.fast_path_available(), reason="nothing is put on lease")
def test_a_fork_in_the_middle_of_a_put(store: Store) -> None:
    """When a signal handler forks, the child that goes on with the put is told of it, and writes over nothing that its parent has put."""
    run_python(IN_THE_MIDST, store.store_socket_name)


def test_a_fork_in_the_middle_of_another(store: Store) -> None:
    """When a signal handler forks, both children have what they inherit pinned, and the parent keeps nothing open."""
    end = """
    def interrupt():
        late.clear()
        pid = os.fork()
        if not pid:
            os._exit(bytes(buffers[7]) != bytes([0, 0, 0, 7]) * 100)
        assert not os.waitpid(pid, 0)[1]

    hold(range(10))
    late.append(interrupt)
    opened = len(os.listdir("/proc/self/fd"))
    fork(range(10))
    assert len(os.listdir("/proc/self/fd")) == opened + 3, "there are more than the pipes"
"""
    run_python(BEFORE_THE_FORK + end, store.store_socket_name)


def test_a_slot_that_changes_hands(store: Store) -> None:
    """A child inherits what is pinned when the store has been asked for everything, not what was before."""
    end = """
    hold([0])

    def greet(*arguments):
        answer = ask(*arguments)
        if buffers.pop(0, None):
            hold([1])
        return answer

    ask, inheritance.greet = inheritance.greet, greet
    fork([1])
"""
    run_python(BEFORE_THE_FORK + end, store.store_socket_name)


def test_a_buffer_that_dies_while_its_pin_moves(store: Store) -> None:
    """A child's pin whose buffer the collector takes meanwhile is nobody's."""
    end = """
    hold(range(5))
    late.append(lambda: hold(range(5, 10)))
    barrier = system.membarrier
    program = os.getpid()

    def collect():
        barrier()
        if os.getpid() != program:
            buffers.pop(2, None)
            buffers.pop(7, None)

    system.membarrier = collect
    fork([0, 1, 3, 4, 5, 6, 8, 9])
"""
    run_python(BEFORE_THE_FORK + end, store.store_socket_name)


def test_hooks_that_let_go(store: Store) -> None:
    """A child that drops buffers before shmplasma's hook has run leaves its parent's pins alone; they are put off, not lost."""
    program = """
    import os, sys

    cache = {}
    os.register_at_fork(before=lambda: cache.pop(0, None), after_in_child=lambda: cache.pop(1, None))

    import shmplasma as plasma

    client, other = plasma.connect(sys.argv[1]), plasma.connect(sys.argv[1])
    ids = [other.put_raw_buffer(b"cached") for _ in range(3)]
    cache.update(enumerate(client.get_buffers(ids)))

    def holders():
        listed = other.list()
        return [listed[object_id]["ref_count"] for object_id in ids]

    (told, tell), (heard, hear) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.close(tell)
        os.write(hear, b"x")
        os.read(told, 1)
        os._exit(0)
    os.close(hear)
    assert os.read(heard, 1)
    assert holders() == [0, 1, 2], holders()
    cache.clear()
    assert holders() == [0, 0, 1], holders()
    os.close(tell)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""
    run_python(program, store.store_socket_name)


AT_EACH_STEP = """
    import os, signal, sys

    def end_at_last():
        signal.alarm(60)  # a release that is noted again and again would never end

    end_at_last()
    os.register_at_fork(after_in_child=end_at_last)
    import shmplasma as plasma
    from shmplasma import inheritance

    client, other = plasma.connect(sys.argv[1]), plasma.connect(sys.argv[1])
    buffers = client.get_buffers([other.put_raw_buffer(bytes(100)) for _ in range(2000)])
    (lifeline,) = (each for each in inheritance._lifelines if any(map(inheritance._holds, each.boards)))

    def drop(frame, *_):
        if frame.f_code.co_filename == inheritance.__file__:
            if frame.f_code.co_name != "_move":  # its steps are those of each slot
                buffers.pop()
            return drop

    def check():
        for board in lifeline.boards:
            assert len(set(board.free)) == len(board.free), "a slot was given back twice"
            assert not any(board.words[slot] for slot in board.free)
        assert sum(511 - len(board.free) for board in lifeline.boards) == len(buffers)

    sys.settrace(drop)
    pid = os.fork()
    sys.settrace(None)
    check()
    if not pid:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sum(each["ref_count"] for each in other.list().values()) == len(buffers) < 1970
"""


def test_buffers_that_die_at_each_step_of_a_fork(store: Store) -> None:
    """Wherever the collector takes a buffer, in parent and child, its slot is given back, once."""
    run_python(AT_EACH_STEP, store.store_socket_name)


def test_a_store_without_boards(store: Store) -> None:
    """A child that gets none of its own uses what it has inherited; of what came late, and has no board, a warning tells."""
    end = """
    import warnings

    hold(range(511))
    late.append(lambda: hold(range(511, 520)))
    program, ask, warned = os.getpid(), inheritance.greet, []

    def greet(*arguments):
        if os.getpid() == program:
            return ask(*arguments)
        raise plasma.PlasmaStoreFull("all pin boards are in use")

    def look():
        (text,) = warned
        assert "not pinned for it: all pin boards are in use" in text
        for number in range(511, 520):
            del buffers[number]

    inheritance.greet = greet
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *_: warned.append(str(message))
    fork(range(511), look)
"""
    run_python(BEFORE_THE_FORK + end, store.store_socket_name)


def test_what_a_parent_keeps(client: PlasmaClient) -> None:
    """A fork leaves nothing open in the parent, however many children live."""
    buffer = client.get_buffers(client.put_raw_buffer(b"held"))
    client.flush()

    def opened() -> set[tuple[str, str]]:
        found = set()
        for fd in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # what lists the directory
                found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
        return found

    gc.collect()
    before = opened()
    with forked(bytes) as one, forked(bytes) as two, forked(bytes) as three:
        assert len(opened() - before) == 3, opened() - before  # the pipes
        assert (three(), two(), one()) == (0, 0, 0)  # each has the writing ends of those before
    assert bytes(buffer) == b"held"


def test_generations(client: PlasmaClient, client2: PlasmaClient) -> None:
    """A grandchild inherits from a child what that has inherited."""
    object_id = client.put_raw_buffer(b"from generation to generation")
    buffers = [client.get_buffers(object_id)]

    def look(_: int) -> None:
        def grandchild() -> None:
            assert bytes(buffers[0]) == b"from generation to generation"

        assert in_forked_child(grandchild) == 0
        assert client.get([ObjectID.from_random()], timeout_ms=0) == [ObjectNotAvailable]
        assert bytes(buffers[0]) == b"from generation to generation"

    with forked(look) as end:
        buffers.clear()
        client2.delete([object_id])
        overwrite(client2)
        assert end() == 0


ORPHANS = """
    import os, sys, warnings
    import shmplasma as plasma

    warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, where threads are about
    os.dup2(1, 2)
    with plasma.Store("1MB") as ended, ended.connect() as client:
        orphan = client.get_buffers(client.put_raw_buffer(b"orphan"))
    client = plasma.connect(sys.argv[1])
    held = client.get_buffers(client.put_raw_buffer(b"held"))
    reader, writer = os.pipe()
    if not os.fork():
        os.close(writer)
        os.read(reader, 1)  # until the parent has let go
        if not os.fork():
            assert bytes(orphan) == b"orphan"
            del held
            os._exit(0)
        failed = os.wait()[1]
        os._exit(failed or "pinned objects: 1\\n" not in plasma.connect(sys.argv[1]).debug_string())
    del held
    os.close(writer)
    assert not os.wait()[1]
"""


def test_generations_one_store_of_which_has_ended(store: Store) -> None:
    """A grandchild holds what is left of that store, and what it lets go of, of another one, its parent holds still."""
    assert not run_python(ORPHANS, store.store_socket_name)


CONNECTING = """
    import os, signal, sys, threading, time, warnings
    import shmplasma as plasma
    from shmplasma.exchange import Exchange

    warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, where threads are about
    call, connected, clients = Exchange.call, threading.Event(), []

    def wait(*arguments):
        connected.set()
        forked.wait()
        return call(*arguments)

    Exchange.call, forked = wait, threading.Event()
    thread = threading.Thread(target=lambda: clients.append(plasma.connect(sys.argv[1])))
    thread.start()
    connected.wait()
    pid = os.fork()
    if not pid:
        time.sleep(3600)
    print(pid, flush=True)
    forked.set()
    thread.join()
    clients[0].put_raw_buffer(b"1")
    clients[0].flush()
    print("connected", flush=True)
    sys.stdin.readline()
"""


def test_a_fork_while_another_thread_connects(store: Store, client: PlasmaClient) -> None:
    """The child has no part in that connection: it ends with the parent."""
    with Child(CONNECTING, store.store_socket_name) as parent:
        child = int(parent.hear())
        try:
            assert parent.hear() == "connected"
            its_pid = f"(pid {parent.process.pid})"
            assert its_pid in client.debug_string()
            parent.kill()
            until(lambda: its_pid not in client.debug_string(), "the parent has gone")
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("how", ["ended", "died"])
def test_a_fork_without_a_store(tmp_path: Path, how: str) -> None:
    """The fork goes on; where the store may come back, and would not know of the child, a warning says so."""
    path = str(tmp_path / "s")
    command = [*PROGRAM, "-m", "10MB", "-s", path]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process, connect(path) as client:
        buffer = client.get_buffers(client.put_raw_buffer(b"held"))
        client.flush()
        process.send_signal(signal.SIGKILL if how == "died" else signal.SIGTERM)
        process.wait()
        if how == "died":
            with pytest.warns(RuntimeWarning, match="not pinned"):
                assert in_forked_child(lambda: None) == 0
        else:
            assert in_forked_child(lambda: None) == 0
        assert bytes(buffer) == b"held"
        del buffer
    if how == "died":
        command.append("--fresh")
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process, connect(path):
            process.terminate()
