from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shmplasma.endpoint import Endpoint, default_socket_path
from shmplasma.errors import EndpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make others' files")

SOMEBODY = 12345

DIE = """
    import os, sys
    from shmplasma.endpoint import Endpoint
    endpoint = Endpoint.claim(sys.argv[1])
    endpoint.write_note(b"a note that is longer than the next one")
    endpoint.write_note(b"the note")
    os.kill(os.getpid(), 9)
"""


def run(code: str, *arguments: str) -> int:
    """Return the exit code of a Python program."""
    program = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(program, check=False).returncode


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Give a path for a socket, in a directory of its own."""
    directory = tmp_path / "d"
    directory.mkdir()
    return str(directory / "s")


def beside(path: str) -> set[str]:
    """Return the names in a socket's directory."""
    return set(os.listdir(Path(path).parent))


@contextmanager
def listening(path: str) -> Iterator[socket.socket]:
    """Have a program that is no store listen at a path."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        yield listener


def connect(path: str) -> None:
    """Connect, and leave again."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_claim(path: str) -> None:
    """A claimed path takes connections, and nothing is left after it was closed."""
    with Endpoint.claim(path) as endpoint:
        assert endpoint.path == path
        assert not endpoint.listener.getblocking()
        assert endpoint.read_note() == b""
        assert beside(path) == {"s", "s.lock"}
        connect(path)
        accepted, _ = endpoint.listener.accept()
        accepted.close()
    assert not beside(path)
    endpoint.close()


def test_many_may_wait(path: str) -> None:
    """A thousand clients can connect before the store accepts one."""
    with Endpoint.claim(path) as endpoint:
        clients = []
        try:
            for _ in range(1000):
                clients.append(client := socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(path)
        finally:
            for client in clients:
                client.close()
        accepted, _ = endpoint.listener.accept()
        accepted.close()


def test_relative_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path without a directory is one in the working directory."""
    monkeypatch.chdir(Path(path).parent)
    with Endpoint.claim("s"):
        connect(path)
    assert not beside(path)


@pytest.mark.parametrize("umask", [0, 0o777])
def test_mode_and_group(path: str, umask: int) -> None:
    """The socket has the mode and the group asked for, the lock file is private, whatever the umask."""
    group = max(os.getgroups() or [os.getegid()])
    before = os.umask(umask)
    try:
        with Endpoint.claim(path, 0o660, group):
            status = Path(path).stat()
            lock = Path(f"{path}.lock").stat()
    finally:
        assert os.umask(before) == umask
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, group)
    assert stat.S_IMODE(lock.st_mode) == 0o600


def test_nobody_connects_before_the_mode_is_right(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket has it when its owner begins to listen."""
    listen, modes = socket.socket.listen, list[int]()

    def note_and_listen(sock: socket.socket, backlog: int) -> None:
        modes.append(stat.S_IMODE(os.stat(path).st_mode))
        listen(sock, backlog)

    monkeypatch.setattr(socket.socket, "listen", note_and_listen)
    with Endpoint.claim(path, 0o640):
        assert modes == [0o640]


def test_a_lock_file_that_was_removed_in_between_claims_nothing(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner has closed while it was opened: another one is made, and locked."""
    flock, owners = fcntl.flock, [path]

    def close_and_lock(fd: int, how: int) -> None:
        if owners:
            os.unlink(f"{owners.pop()}.lock")
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", close_and_lock)
    with Endpoint.claim(path), pytest.raises(EndpointError, match="already"):
        Endpoint.claim(path)


def test_a_claimed_path_is_refused(path: str) -> None:
    """A second claim is refused, and the first goes on."""
    with Endpoint.claim(path) as endpoint:
        endpoint.write_note(b"note")
        with pytest.raises(EndpointError, match="already"):
            Endpoint.claim(path)
        connect(path)
        assert endpoint.read_note() == b"note"
    assert not beside(path)


def test_a_dead_store_is_succeeded(path: str) -> None:
    """The socket of a store that was killed is taken over, and its note can be read."""
    assert run(DIE, path) == -9
    assert beside(path) == {"s", "s.lock"}
    with Endpoint.claim(path) as endpoint:
        assert endpoint.read_note() == b"the note"
        connect(path)
        endpoint.write_note(b"new")
        assert endpoint.read_note() == b"new"
    assert not beside(path)


def test_a_note_stays_until_it_is_replaced(path: str) -> None:
    """A successor who closes without a word of its own leaves the note to the next."""
    assert run(DIE, path) == -9
    with Endpoint.claim(path):
        pass
    with Endpoint.claim(path) as endpoint:
        assert endpoint.read_note() == b"the note"


def test_a_socket_without_a_lock_file(path: str) -> None:
    """A dead socket whose lock file is gone is taken over as well."""
    with listening(path):
        pass
    with Endpoint.claim(path):
        connect(path)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_live_socket_stays(path: str, kind: socket.SocketKind) -> None:
    """A path where any program listens is refused, whatever the lock file says."""
    with socket.socket(socket.AF_UNIX, kind) as listener:
        listener.bind(path)
        if kind == socket.SOCK_STREAM:
            listener.listen()
        with pytest.raises(EndpointError, match="listens at"):
            Endpoint.claim(path)
    assert beside(path) == {"s"}


def test_a_live_socket_with_a_full_queue_stays(path: str) -> None:
    """A program that is too busy to accept is alive."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen(0)
        client.connect(path)
        with pytest.raises(EndpointError, match="listens at"):
            Endpoint.claim(path)
    assert beside(path) == {"s"}


def test_a_file_stays(path: str) -> None:
    """A regular file is refused, and keeps its contents."""
    Path(path).write_text("precious")
    with pytest.raises(EndpointError, match="no socket"):
        Endpoint.claim(path)
    assert Path(path).read_text() == "precious"
    assert beside(path) == {"s"}


def test_a_directory_stays(path: str) -> None:
    """A directory is refused."""
    Path(path).mkdir()
    for name in (path, f"{path}/"):
        with pytest.raises(EndpointError, match="no socket"):
            Endpoint.claim(name)
    assert beside(path) == {"s"}
    assert not beside(f"{path}/s")


def test_a_symlink_stays(path: str) -> None:
    """A symbolic link is refused, even one to a dead socket, and is not followed."""
    with listening(f"{path}.dead"):
        pass
    Path(path).symlink_to(f"{path}.dead")
    with pytest.raises(EndpointError, match="no socket"):
        Endpoint.claim(path)
    assert beside(path) == {"s", "s.dead"}


def test_a_refused_claim_keeps_the_note(path: str) -> None:
    """A claim that fails leaves a predecessor's note where it was."""
    assert run(DIE, path) == -9
    Path(path).unlink()
    Path(path).write_text("precious")
    with pytest.raises(EndpointError, match="no socket"):
        Endpoint.claim(path)
    Path(path).unlink()
    with Endpoint.claim(path) as endpoint:
        assert endpoint.read_note() == b"the note"


@needs_root
def test_somebody_elses_socket_stays(path: str) -> None:
    """Another user's socket is refused, even if nobody listens there."""
    with listening(path):
        pass
    os.chown(path, SOMEBODY, -1)
    with pytest.raises(EndpointError, match="another user's"):
        Endpoint.claim(path)
    assert beside(path) == {"s"}


@needs_root
def test_somebody_elses_lock_file_stays(path: str) -> None:
    """Another user's lock file is refused."""
    Path(f"{path}.lock").write_text("theirs")
    os.chown(f"{path}.lock", SOMEBODY, -1)
    with pytest.raises(EndpointError, match="not a file of this user's"):
        Endpoint.claim(path)
    assert Path(f"{path}.lock").read_text() == "theirs"


def test_a_symlink_in_the_lock_files_place(path: str) -> None:
    """A lock file that is a symbolic link is not followed."""
    target = Path(f"{path}.target")
    target.write_text("precious")
    Path(f"{path}.lock").symlink_to(target)
    with pytest.raises(EndpointError, match="cannot open the lock file"):
        Endpoint.claim(path)
    assert target.read_text() == "precious"


def test_a_fifo_in_the_lock_files_place(path: str) -> None:
    """A lock file that is no regular file is refused, and not waited for."""
    os.mkfifo(f"{path}.lock")
    with pytest.raises(EndpointError, match="not a file of this user's"):
        Endpoint.claim(path)
    assert beside(path) == {"s.lock"}


def test_a_socket_that_was_replaced_stays(path: str) -> None:
    """Closing removes nothing that was put in the socket's place meanwhile."""
    endpoint = Endpoint.claim(path)
    Path(path).unlink()
    with listening(path):
        endpoint.close()
        connect(path)
    assert beside(path) == {"s"}


def test_a_lock_file_that_was_removed(path: str) -> None:
    """A store whose lock file was deleted by hand is still found, and closes well."""
    with Endpoint.claim(path):
        Path(f"{path}.lock").unlink()
        with pytest.raises(EndpointError, match="listens at"):
            Endpoint.claim(path)
    assert not beside(path)


def test_impossible_paths(tmp_path: Path) -> None:
    """Paths that are empty, too long, or in no directory are refused with the reason."""
    with pytest.raises(EndpointError, match="1 to 107 bytes"):
        Endpoint.claim("")
    with pytest.raises(EndpointError, match="this one has 108"):
        Endpoint.claim("/" + 107 * "a")
    with pytest.raises(EndpointError, match="there is no directory"):
        Endpoint.claim(str(tmp_path / "missing" / "s"))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_the_longest_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of exactly the limit works."""
    monkeypatch.chdir(tmp_path)
    with Endpoint.claim(107 * "a"):
        connect(107 * "a")
    assert not list(tmp_path.iterdir())


@needs_root
def test_a_group_that_cannot_be_given(path: str) -> None:
    """A claim whose socket cannot get its group is refused, and leaves nothing."""
    Path(path).parent.chmod(0o777)
    code = """
        import os, sys
        from shmplasma.endpoint import Endpoint
        from shmplasma.errors import EndpointError
        os.chdir(os.path.dirname(sys.argv[1]))
        os.setgroups([])
        os.setgid(12345)
        os.setuid(12345)
        try:
            Endpoint.claim("s", 0o660, 0)
        except EndpointError as error:
            assert "no member of the group" in str(error), error
            sys.exit(3)
    """
    assert run(code, path) == 3
    assert not beside(path)


RACE = """
    import os, sys
    from shmplasma.endpoint import Endpoint
    from shmplasma.errors import EndpointError
    path, rounds = sys.argv[1], int(sys.argv[2])
    won = 0
    for _ in range(rounds):
        try:
            endpoint = Endpoint.claim(path)
        except EndpointError as error:
            # Whatever else a loser meets would be a hole in the protocol.
            assert "serves" in str(error), error
            continue
        won += 1
        # Alone at the path, or this fails.
        os.close(os.open(path + ".alone", os.O_CREAT | os.O_EXCL))
        os.unlink(path + ".alone")
        if won % 10 == 0:
            endpoint.listener.close()  # as if it had died
            os.close(endpoint._lock)
        else:
            endpoint.close()
    print(won)
"""


def test_many_that_start_and_end_together(path: str) -> None:
    """However claims, ends and deaths fall together, there is one owner at a time."""
    program = [sys.executable, "-c", textwrap.dedent(RACE), path, "300"]
    racers = [subprocess.Popen(program, stdout=subprocess.PIPE) for _ in range(6)]
    won = [int(racer.communicate()[0] or 0) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * len(racers)
    assert sum(won) > 0


class TestDefaultSocketPath:
    """Where a store listens whose operator says nothing."""

    @pytest.fixture(autouse=True)
    def environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make the temporary directory one of our own."""
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        monkeypatch.setenv("TMPDIR", str(tmp_path))

    @pytest.fixture
    def private(self, tmp_path: Path) -> Path:
        """Give the directory that is used without ``$XDG_RUNTIME_DIR``."""
        return tmp_path / f"shmplasma-{os.geteuid()}"

    def test_runtime_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a runtime directory it is there."""
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert default_socket_path() == str(tmp_path / "shmplasma" / "store.sock")

    def test_runtime_directory_that_is_gone(
        self, tmp_path: Path, private: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A runtime directory that does not exist is not made."""
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
        assert default_socket_path() == str(private / "store.sock")

    @pytest.mark.parametrize("umask", [0, 0o777])
    def test_private(self, private: Path, umask: int) -> None:
        """The directory is this user's alone whatever the umask, and is used again."""
        before = os.umask(umask)
        try:
            first = default_socket_path()
        finally:
            os.umask(before)
        assert first == default_socket_path() == str(private / "store.sock")
        assert stat.S_IMODE(private.stat().st_mode) == 0o700

    @pytest.mark.parametrize("mode", [0o710, 0o701])
    def test_open_to_others(self, private: Path, mode: int) -> None:
        """A directory that others may enter is refused."""
        private.mkdir()
        private.chmod(mode)
        with pytest.raises(EndpointError, match="chmod 700"):
            default_socket_path()

    def test_symlink(self, tmp_path: Path, private: Path) -> None:
        """A symbolic link is refused, even to a private directory."""
        (tmp_path / "target").mkdir(0o700)
        private.symlink_to(tmp_path / "target")
        with pytest.raises(EndpointError, match="not a directory of this user's"):
            default_socket_path()

    @needs_root
    def test_somebody_elses(self, private: Path) -> None:
        """Another user's directory is refused."""
        private.mkdir(0o700)
        os.chown(private, SOMEBODY, -1)
        with pytest.raises(EndpointError, match="not a directory of this user's"):
            default_socket_path()

    def test_nowhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where no directory can be made, the message says which."""
        monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
        with pytest.raises(EndpointError, match="cannot make"):
            default_socket_path()


def test_a_lock_that_cannot_be_had(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system has no locks the file is named, and what helps; nothing stays open."""

    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    text = (
        rf"cannot lock the lock file {path}\.lock: No locks available; name another socket with -s"
    )
    with pytest.raises(EndpointError, match=text):
        Endpoint.claim(path)


@pytest.mark.parametrize(
    ("name", "use", "text"),
    [
        ("pread", Endpoint.read_note, r"cannot read the lock file {path}\.lock: no such luck"),
        ("pwrite", lambda endpoint: endpoint.write_note(b"new"), "cannot write the lock file"),
    ],
)
def test_a_note_that_cannot_be_read_or_replaced(
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    use: Callable[[Endpoint], object],
    text: str,
) -> None:
    """The file is named, and stays as it is: what it names is not lost."""
    run(DIE, path)

    def refused(*_: object) -> None:
        raise OSError(errno.EIO, "no such luck")

    with Endpoint.claim(path) as endpoint:
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refused)
            with pytest.raises(EndpointError, match=text.format(path=path)):
                use(endpoint)
        assert endpoint.read_note() == b"the note"


def test_a_socket_that_cannot_be_looked_at_does_not_stay(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be known to nobody, who could remove it."""
    lstat = os.lstat

    def refused(at: str) -> os.stat_result:
        if at == path and os.path.exists(path):
            raise OSError(errno.EIO, "Input/output error")
        return lstat(at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", refused)
        with pytest.raises(EndpointError, match="cannot listen"):
            Endpoint.claim(path)
    assert not beside(path)
