"""Buffers that a forked child inherits: valid as long as it lives, whatever becomes of its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from shmplasma import ObjectID, ObjectNotAvailable, PlasmaClient, PlasmaStoreFull, Store, connect
from tests.processes import Child, in_forked_child, run_python, until

PARENT = """
    import os, sys
    import shmplasma as plasma

    client = plasma.connect(sys.argv[1])
    held = client.get_buffers(client.put_raw_buffer(b"inherited" * 1000))
    if not os.fork():
        print(os.getpid(), flush=True)
        sys.stdin.readline()
        print(bytes(held) == b"inherited" * 1000, flush=True)
        del held
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


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
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


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
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


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
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


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
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


@pytest.mark.parametrize("how", ["ended", "died"])
def test_a_fork_without_a_store(tmp_path: Path, how: str) -> None:
    """The fork goes on; where the store may come back, and would not know of the child, a warning says so."""
    path = str(tmp_path / "s")
    command = [sys.executable, "-m", "shmplasma.cli", "-m", "10MB", "-s", path]
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
