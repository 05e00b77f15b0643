from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import shmplasma
from shmplasma.embedded import Store, start_plasma_store
from shmplasma.errors import ShmPlasmaError, StoreNotStartedError
from shmplasma.requests import Role
from tests.attacker import Attacker
from tests.command import silent_bucket
from tests.processes import unmeasured

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep the private directories in one of ours, and see that none of them stays."""
    directory = tmp_path / "t"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield directory
    assert not list(directory.iterdir())


def test_a_store_in_a_block() -> None:
    """A store serves within its block; after it, server, socket and directory are gone."""
    with Store(memory="10MB") as store:
        socket_path = Path(store.store_socket_name)
        assert socket_path.is_socket()
        client = store.connect()
        assert client.store_capacity() == 10**7
        object_id = client.put("hello")
        assert client.get(object_id) == "hello"
        client.disconnect()
        assert store.process.poll() is None
    assert store.process.returncode == 0
    assert not socket_path.parent.exists()
    store.close()


def test_an_embedded_store_is_not_replaced() -> None:
    """It is its owner's: who wants to is dropped, and the store serves on."""
    with Store("10MB") as store, store.connect() as client:
        with Attacker(store.store_socket_name) as usurper:
            usurper.post(usurper.hello(Role.SUCCESSOR))
            assert not usurper.sock.recv(100)
        assert client.get(client.put(1)) == 1


def test_nobody_waits_for_an_embedded_store_that_was_killed() -> None:
    """It is started again by nobody."""
    with Store("10MB") as store, store.connect() as client:
        assert client._session is not None
        assert client._session.patience_seconds == 0
        store.process.kill()
        with pytest.raises(shmplasma.NotConnectedError):
            client.flush()


def test_a_store_without_a_block() -> None:
    """A store runs from its making until `close`."""
    store = shmplasma.Store(10**7)
    store.connect().disconnect()
    store.close()
    assert store.process.returncode == 0


def test_a_socket_of_the_users_own(tmp_path: Path) -> None:
    """Socket and file are where the user wants them, and their directories stay."""
    where = tmp_path / "where"
    where.mkdir()
    with Store("10MB", socket=str(where / "s"), directory=str(where)) as store:
        assert store.store_socket_name == str(where / "s")
        assert len(list(where.iterdir())) == 3
        store.connect().disconnect()
    assert not list(where.iterdir())


def test_a_private_directory_with_a_file_in_it(temporary: Path) -> None:
    """A file that the user has put into the private directory survives the store."""
    with Store("10MB") as store:
        mine = Path(store.store_socket_name).with_name("mine")
        mine.write_text("precious")
    assert store.process.returncode == 0
    assert mine.read_text() == "precious"
    mine.unlink()
    mine.parent.rmdir()
    assert not list(temporary.iterdir())


STARTER = """
    import os, sys
    from shmplasma import Store

    if sys.argv[2] and not os.fork():
        sys.stdin.read()
        os._exit(0)
    Store("10MB", external_store=sys.argv[1])
"""


@pytest.mark.parametrize("child", ["", "that has forked"])
def test_an_owner_that_is_killed_while_the_external_store_does_not_answer(child: str) -> None:
    """The server does not wait for it any longer, and leaves nothing."""
    program = [sys.executable, "-c", textwrap.dedent(STARTER)]
    with (
        silent_bucket() as (silent, uri),
        subprocess.Popen([*program, uri, child], stdin=subprocess.PIPE) as owner,
        silent.accept()[0] as asked,
    ):
        owner.kill()
        while asked.recv(1000):  # until the server has ended
            pass


WHERE = """
    import os, sys
    from pathlib import Path
    sys.path[:0] = [Path("nowhere"), sys.argv[1]]
    import here
    from shmplasma import Store

    with Store("10MB") as store, store.connect() as client:
        assert client.get(client.put("there")) == "there"
"""


def test_the_server_imports_from_where_its_owner_does(tmp_path: Path) -> None:
    """The working directory is none of these places, whatever lies there; what the owner has added is, behind Python's own."""
    code = Path(shmplasma.__file__).parent
    added, working = tmp_path / "added", tmp_path / "working"
    for directory in (added, working):
        directory.mkdir()
    (added / "shmplasma").symlink_to(code)
    (added / "here.py").touch()
    (added / "resource.py").write_text("raise SystemExit('not to be imported')")
    (working / "selectors.py").write_text("raise SystemExit('not to be imported')")
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(WHERE))
    environment = {**unmeasured(), "PYTHONPATH": ""}
    subprocess.run(
        [sys.executable, str(program), str(added)], check=True, cwd=working, env=environment
    )


def test_a_store_that_cannot_start() -> None:
    """What the server said and its exit code are in the error, and not how to call it."""
    with pytest.raises(StoreNotStartedError, match=r"exit code 1\).*-d DIRECTORY"):
        Store("1000TB")
    with pytest.raises(StoreNotStartedError, match=r"exit code 2\): .*no directory /nowhere"):
        Store("10MB", directory="/nowhere")
    with pytest.raises(StoreNotStartedError, match=r"exit code 2\): .*huge pages need"):
        Store("10MB", huge_pages=True)


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EMFILE, r"ulimit -n"), (errno.EAGAIN, r"ulimit -u")]
)
def test_a_system_that_starts_no_process(
    monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    """It is said what was refused and what helps, and nothing is left."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "Popen", refused)
    text = rf"the store did not start: \[Errno {number}\] {os.strerror(number)}; .*{remedy}"
    with pytest.raises(StoreNotStartedError, match=text):
        Store("10MB")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"memory": 0}, "less than a byte"),
        ({"memory": -1}, "not a size"),
        ({"client_limit": "lots"}, "not a size"),
        ({"client_limit": -1}, "not a size"),
        ({"external_store": "memory://a", "max_spill_bytes": "x"}, "not a size"),
        ({"external_store": "memory://a", "max_spill_bytes": 0}, "less than a byte"),
        ({"max_spill_bytes": "1GB"}, "name external_store"),
        ({"external_store": "", "max_spill_bytes": "1GB"}, "name external_store"),
        ({"ticket_seconds": float("nan")}, "no number of seconds"),
        ({"ticket_seconds": -1}, "no number of seconds"),
    ],
)
def test_values_that_are_none(arguments: dict[str, Any], says: str) -> None:
    """They are refused before anything starts."""
    with pytest.raises(ValueError, match=says):
        Store(**{"memory": "10MB", **arguments})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"memory": 2e9}, "a whole number of bytes, or a text such as '2GB', not float"),
        ({"client_limit": b"1"}, "a whole number of bytes, or a text such as '2GB', not bytes"),
        ({"ticket_seconds": "600"}, "a number of seconds is needed here, not str"),
    ],
)
def test_values_of_wrong_types(arguments: dict[str, Any], says: str) -> None:
    """The error says what is needed, and not what Python could not do with the argument."""
    with pytest.raises(TypeError, match=says):
        Store(**{"memory": "10MB", **arguments})


def test_a_temporary_directory_with_a_long_name(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No socket has room in it, and the error says what to set."""
    deep = temporary / (100 * "d")
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(StoreNotStartedError, match="set TMPDIR to a shorter one"):
        Store("1MB")
    deep.rmdir()


def test_a_store_that_is_pickled() -> None:
    """It is not, and the error says what to pass in its place."""
    with (
        Store("1MB") as store,
        pytest.raises(TypeError, match="pass its store_socket_name, and connect there"),
    ):
        pickle.dumps(store)


def test_no_limit_and_no_places() -> None:
    """A limit of 0 is none, as in `set_client_options`; an empty name is none either."""
    with (
        Store("10MB", client_limit=0, directory="", external_store="") as store,
        store.connect() as client,
    ):
        client.put(bytes(8_000_000))
        assert "spilled bytes" not in client.debug_string()


def test_a_store_that_was_closed() -> None:
    """Nobody waits for it: the error comes at once, and says that it was closed."""
    store = Store("10MB")
    store.close()
    with pytest.raises(shmplasma.NotConnectedError, match="this store was closed"):
        store.connect()


def test_paths(tmp_path: Path) -> None:
    """Socket and directory may be paths, and so may what `connect` is given."""
    with (
        Store("10MB", socket=tmp_path / "s", directory=tmp_path) as store,
        shmplasma.connect(tmp_path / "s") as client,
    ):
        assert store.store_socket_name == client.store_socket_name == str(tmp_path / "s")
        assert list(tmp_path.glob("shmplasma-*"))


def test_an_owner_without_standard_streams(tmp_path: Path) -> None:
    """A daemon, which has closed them, can have a store as well."""
    code = """if True:
        import sys, shmplasma
        with shmplasma.Store("10MB") as store, store.connect() as client:
            assert client.get(client.put("there")) == "there"
        open(sys.argv[1], "w").close()
    """
    done = tmp_path / "done"
    command = [sys.executable, "-c", code, str(done)]
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=False)
    assert done.exists()


def test_a_store_on_a_live_socket() -> None:
    """A second store on the same socket is an error, and the first serves on."""
    with Store("10MB") as store:
        with pytest.raises(ShmPlasmaError, match="already"):
            Store("10MB", socket=store.store_socket_name)
        store.connect().disconnect()


def test_what_is_no_size() -> None:
    """A memory that is no size is refused before anything starts."""
    with pytest.raises(ValueError, match="4GB, 512MiB"):
        Store("much")
    with pytest.raises(TypeError):
        Store(1.5)  # type: ignore[arg-type]  # the point of the test


def test_an_exception_in_the_block() -> None:
    """An exception in the block ends the store as well, and is not hidden."""
    with pytest.raises(KeyError), Store("10MB") as store:
        raise KeyError
    assert store.process.returncode == 0


def segment_of(store: Store) -> Path:
    """Return where the segment of a store lies."""
    with store.connect() as client:
        session = client._session
        assert session is not None
        return Path(os.readlink(f"/proc/self/fd/{session.attachment._fd}"))


def test_a_server_that_was_killed() -> None:
    """Closing a store whose server was killed is no error, and sweeps up what the server left."""
    with Store("10MB") as store:
        segment = segment_of(store)
        store.process.kill()
        store.process.wait()
        assert segment.exists()
    assert not segment.exists()
    assert not Path(store.store_socket_name).parent.exists()


def test_a_server_that_was_killed_and_for_which_nobody_waits() -> None:
    """What it left is swept up as well, though how it ended is not known."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Store("10MB") as store:
            segment = segment_of(store)
            store.process.kill()
        assert not segment.exists()
        assert not Path(store.store_socket_name).parent.exists()
    finally:
        signal.signal(signal.SIGCHLD, handler)


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is that of the directory in which the store was started, wherever its owner goes."""
    monkeypatch.chdir(tmp_path)
    with Store("10MB", socket="s") as store:
        monkeypatch.chdir("/")
        segment = segment_of(store)
        store.process.kill()
    assert not segment.exists()
    assert not list(tmp_path.glob("s*"))


def test_not_bound_to_a_thread() -> None:
    """A store outlives the thread that started it."""
    made: list[Store] = []
    thread = threading.Thread(target=lambda: made.append(Store("10MB")))
    thread.start()
    thread.join()
    with made[0] as store:
        store.connect().disconnect()
        assert store.process.poll() is None


def test_not_in_the_terminals_group() -> None:
    """Ctrl-C at the owner's terminal does not reach the server."""
    with Store("10MB") as store:
        assert os.getpgid(store.process.pid) != os.getpgid(0)


def test_a_forked_child_leaves_the_store_alone() -> None:
    """A child that leaves the block does not end its parent's store."""
    with Store("10MB") as store:
        pid = os.fork()
        if not pid:
            store.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert store.process.poll() is None
        store.connect().disconnect()


OWNER = """
    import os, shmplasma, signal, sys
    store = shmplasma.Store("10MB")
    if sys.argv[1] == "fork" and not os.fork():
        # A child that holds a copy of everything and lives on.
        os.close(0); os.close(1); os.close(2)
        signal.pause()
    print(store.process.pid, store.store_socket_name, flush=True)
    input()
    if sys.argv[1] == "exit":
        sys.exit(5)
    elif sys.argv[1] == "_exit":
        os._exit(5)
"""


@contextmanager
def owner(how: str) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    """Run an owner; give its process, the server's pid, and the socket."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(OWNER), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        pid, path = process.stdout.readline().split()
        try:
            yield process, int(pid), Path(path)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_exit(pid: int) -> None:
    """Wait for the end of a process which is not our child."""
    if sys.platform != "linux":
        pytest.skip("only Linux lets one wait for others' children")
    import select

    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(fd):
        assert select.select([fd], [], [], 60)[0]


@pytest.mark.parametrize("how", ["exit", "_exit", "kill", "fork"])
def test_ends_with_its_owner(how: str) -> None:
    """However the owner ends, the server ends too, and takes everything with it."""
    with owner(how) as (process, pid, path):
        assert path.is_socket()
        if how in {"kill", "fork"}:
            process.kill()
        else:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        wait_for_exit(pid)
        assert not path.parent.exists()


def test_start_plasma_store() -> None:
    """Plasma's context manager gives socket and process, and SIGTERM ends that with 0."""
    with start_plasma_store(10**7) as (name, process):
        shmplasma.connect(name).disconnect()
        process.terminate()
        assert process.wait() == 0
    with start_plasma_store(plasma_store_memory=10**7) as (name, process):
        assert Path(name).is_socket()
    assert process.returncode == 0
    assert not Path(name).parent.exists()


def test_start_plasma_store_in_a_directory(tmp_path: Path) -> None:
    """Plasma's name of the directory works."""
    with start_plasma_store(10**7, plasma_directory=str(tmp_path)):
        assert list(tmp_path.glob("shmplasma-*"))
    assert not list(tmp_path.glob("shmplasma-*"))


def test_start_plasma_store_in_no_directory() -> None:
    """An empty name is none, as with Plasma; one that is not there is a RuntimeError, as with Plasma."""
    with start_plasma_store(10**7, plasma_directory="", external_store="") as (name, _):
        shmplasma.connect(name).disconnect()
    with (
        pytest.raises(RuntimeError, match="no directory /nowhere"),
        start_plasma_store(10**7, plasma_directory="/nowhere"),
    ):
        raise AssertionError


def test_an_external_store() -> None:
    """Objects that do not fit are there all the same."""
    with (
        start_plasma_store(10**7, external_store="hashtable://here") as (path, _),
        shmplasma.connect(path) as client,
    ):
        ids = [client.put_raw_buffer(bytes([number]) * 10**6) for number in range(30)]
        for number, object_id in enumerate(ids):
            assert client.get_buffers(object_id) == bytes([number]) * 10**6


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"use_valgrind": True}, "examine C"),
        ({"use_profiler": True}, "examine C"),
    ],
)
def test_what_is_refused(arguments: dict[str, object], says: str) -> None:
    """What this store has not is refused, and never silently ignored."""
    with (
        pytest.raises(ValueError, match=says),
        start_plasma_store(10**7, **arguments),  # type: ignore[arg-type]  # parametrized
    ):
        raise AssertionError
