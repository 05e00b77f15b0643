"""The claim on a socket path: at most one store serves it, and nothing of anybody else's is harmed.

Beside a socket ``P`` lies its lock file ``P.lock``.  Whoever holds the lock (``flock``) of the file
which is at ``P.lock`` owns ``P``: only the owner binds, removes or replaces what is there.  The
kernel gives the lock up when its holder ends, however that happens, and no program that the holder
starts inherits it.

Claiming
    1. Open ``P.lock``, made if need be, and try to lock it.  Held: a store serves here (or is about
       to, or is just ending), and the claim is refused.
    2. Is the file at ``P.lock`` still the one that was locked?  If not, its owner removed it in
       between: begin again.
    3. Look at ``P``.  A socket of ours on which nobody listens is a dead store's: remove it.
       Anything else is refused, and stays.  Bind.

Closing
    Remove ``P`` if it is the socket that was bound, then ``P.lock``, then give up the lock.

Why this holds
    *Two that start together* lock the same file, and one gets it.  They can only lock two different
    files if the first was removed from ``P.lock`` in between; whoever removes it holds its lock,
    and touches ``P`` no more.  So the holder of the removed file either is that closing owner, or
    has got the lock after him and fails step 2.  As the lock is taken before the check, nobody else
    can remove what has passed it.

    *A crash* leaves a lock file that nobody holds, and perhaps a socket on which nobody listens;
    the next claim takes both over, at whatever step it happened.  The note in the lock file says
    what else there is to sweep up: it is written before what it names is made.

    *A store whose lock file was deleted by hand* still listens, and step 3 sees it.

The argument needs a directory where strangers cannot replace our files: a private one, or one with
the sticky bit, as ``/tmp`` has.
"""

from __future__ import annotations

import fcntl
import grp
import os
import socket
import stat
from contextlib import ExitStack, suppress
from typing import Final, Self

from shmplasma.errors import EndpointError

__all__ = ["Endpoint", "default_socket_path", "fault_of", "may_come_back", "note_of"]

_MAX_PATH_BYTES: Final = 107
"""What fits Linux's ``sockaddr_un`` before its zero byte.  macOS takes 103, and says so itself."""

_BACKLOG: Final = 1024
"""Clients that may wait to be accepted while the store is busy: more than one machine's workers."""

_NOTE_BYTES: Final = 8192

_OTHER_PATH: Final = "name another socket with -s"


def default_socket_path() -> str:
    """Return the socket path of a store whose operator names none; it is private to this user.

    It is ``$XDG_RUNTIME_DIR/shmplasma/store.sock``, or ``$TMPDIR/shmplasma-<uid>/store.sock`` where
    there is no such directory (``/tmp`` if ``$TMPDIR`` is not set).  The private directory is made
    if need be.

    Raises
    ------
    EndpointError
        What is there is not a directory of this user's alone.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isdir(runtime):
        directory = os.path.join(runtime, "shmplasma")
    else:
        temporary = os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - what is there gets checked
        directory = os.path.join(temporary, f"shmplasma-{os.geteuid()}")
    try:
        os.mkdir(directory, 0o700)
        os.chmod(directory, 0o700)  # the umask may have taken away more
    except FileExistsError:
        pass
    except OSError as error:
        raise EndpointError(f"cannot make {directory}: {error.strerror}; {_OTHER_PATH}") from error
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise EndpointError(f"{directory} is not a directory of this user's; {_OTHER_PATH}")
    if status.st_mode & 0o077:
        raise EndpointError(
            f"{directory} is open to other users; close it (chmod 700 {directory}), "
            f"or {_OTHER_PATH}"
        )
    return os.path.join(directory, "store.sock")


class Endpoint:
    """A claimed socket path, and the socket that listens there.  Use `Endpoint.claim`.

    Attributes
    ----------
    path : str
        The socket's path.
    listener : socket.socket
        Bound, listening, non-blocking.
    """

    __slots__ = ("_bound", "_lock", "_noted", "listener", "path")

    listener: socket.socket
    path: str

    def __init__(self, path: str, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._bound: tuple[int, int] | None = None
        self._noted = False

    @classmethod
    def claim(cls, path: str, mode: int = 0o600, group: int | None = None) -> Endpoint:
        """Take a socket path and listen there.

        Parameters
        ----------
        path : str
            Where; its directory exists.
        mode : int, optional
            Permission bits of the socket, whatever the umask.
        group : int, optional
            Group of the socket; that of this process if not given.

        Raises
        ------
        EndpointError
            The path is served, is somebody else's, is no socket, or cannot be used.
        """
        fault = _wrong_length(path)
        if fault:
            directory = os.environ.get("TMPDIR", "")
            within = directory and path.startswith(directory)
            shorter = ", or set TMPDIR to a shorter one" if within else ""
            raise EndpointError(f"{fault}; name another with -s{shorter}")
        parent = os.path.dirname(path) or "."
        if not os.path.isdir(parent):
            raise EndpointError(f"there is no directory {parent}; make it, or {_OTHER_PATH}")
        self = cls(path, _lock(path))
        try:
            self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            _clear(path)
            self._listen(mode, group)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, EndpointError):
                raise EndpointError(
                    f"cannot listen at {path}: {error.strerror or error}; {_OTHER_PATH}"
                ) from error
            raise
        return self

    def _listen(self, mode: int, group: int | None) -> None:
        self.listener.bind(self.path)
        try:
            self._bound = _identity(self.path)
        except BaseException:
            os.unlink(self.path)  # as long as the lock is ours, nobody else puts anything there
            raise
        # Nobody connects before `listen`, and by then group and mode are what they are to be.
        if group is not None:
            try:
                os.chown(self.path, -1, group, follow_symlinks=False)
            except PermissionError as error:
                raise EndpointError(
                    f"this user is no member of the group {_group_name(group)}, so {self.path} cannot be that group's; "
                    "name one of this user's with --group (id shows them)"
                ) from error
        os.chmod(self.path, mode)
        self.listener.settimeout(0)
        self.listener.listen(_BACKLOG)

    def write_note(self, note: bytes) -> None:
        """Leave at most 8192 bytes to whoever claims the path after a crash of this process.

        Raises
        ------
        EndpointError
            The lock file cannot be written.
        """
        assert len(note) <= _NOTE_BYTES
        self._noted = True
        try:
            # A death in between must not leave the lock file without a note: what it names would be lost.
            os.pwrite(self._lock, note, 0)
            os.ftruncate(self._lock, len(note))
        except OSError as error:
            raise EndpointError(
                f"cannot write the lock file {_lock_path(self.path)}: {error.strerror}; make room there, or {_OTHER_PATH}"
            ) from error

    def keep_note(self) -> None:
        """Let the note outlive `close`, as what it names does."""
        self._noted = False

    def read_note(self) -> bytes:
        """Return the text of a predecessor who did not close, until `write_note`; empty if none.

        Raises
        ------
        EndpointError
            The lock file cannot be read.
        """
        try:
            return os.pread(self._lock, _NOTE_BYTES, 0)
        except OSError as error:
            raise EndpointError(
                f"cannot read the lock file {_lock_path(self.path)}: {error.strerror}; see the kernel's log (dmesg), or {_OTHER_PATH}"
            ) from error

    def close(self) -> None:
        """Remove the socket and the lock file, and give up the claim.  A second call does nothing.

        Notes
        -----
        A lock file whose note nobody has replaced stays, for a successor to read.
        """
        if self._lock < 0:
            return
        lock, self._lock = self._lock, -1
        with ExitStack() as stack:  # whatever fails, the rest is done
            stack.callback(os.close, lock)
            # The listener is closed late: while it is open, no other file can get its inode number.
            if hasattr(self, "listener"):
                stack.callback(self.listener.close)
            stack.callback(self._remove_lock_file, lock)
            stack.callback(self._remove_socket)

    def _remove_socket(self) -> None:
        with suppress(FileNotFoundError):
            if self._bound is not None and _identity(self.path) == self._bound:
                os.unlink(self.path)

    def _remove_lock_file(self, lock: int) -> None:
        with suppress(FileNotFoundError):
            if self._noted or not os.pread(lock, _NOTE_BYTES, 0):
                os.unlink(_lock_path(self.path))

    @property
    def is_claimed(self) -> bool:
        """Whether the claim still holds."""
        return self._lock >= 0

    def hand_over(self) -> None:
        """Give up the claim, and leave socket and note to the next store, which is about to claim them."""
        self.listener.close()
        os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def fault_of(path: str) -> str:
    """Return why no store can listen at a path that another one could have; empty if one can, as far as that can be seen.

    Notes
    -----
    Whether there is a directory, and whose it is, may change; this will hardly.
    """
    try:
        is_other = not stat.S_ISSOCK(os.stat(path).st_mode)
    except (OSError, ValueError):
        is_other = False
    return _wrong_length(path) or (f"{path!r} is no socket" if is_other else "")


def note_of(path: str) -> bytes:
    """Return the note of the store that serves a path, or has died there; empty if there is none."""
    try:
        with open(_lock_path(path), "rb") as file:
            return file.read(_NOTE_BYTES)
    except OSError:
        return b""


def may_come_back(path: str) -> bool:
    """Tell whether the store that listened at a path died there, and was not ended.

    Notes
    -----
    A store that ends removes its lock file; one that dies leaves it, and so does its successor while it
    takes over.
    """
    return os.path.exists(_lock_path(path))


def _wrong_length(path: str) -> str:
    size = len(os.fsencode(path))
    if 0 < size <= _MAX_PATH_BYTES:
        return ""
    return f"a socket path has 1 to {_MAX_PATH_BYTES} bytes, and this one has {size}: {path!r}"


def _group_name(group: int) -> str:
    try:
        return grp.getgrgid(group).gr_name
    except KeyError:
        return str(group)


def _lock_path(path: str) -> str:
    return f"{path}.lock"


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _lock(path: str) -> int:
    """Return the locked lock file of a socket path: steps 1 and 2."""
    lock_path = _lock_path(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    while True:
        try:
            fd = os.open(lock_path, flags, 0o600)
        except OSError as error:
            raise EndpointError(
                f"cannot open the lock file {lock_path}: {error.strerror}; {_OTHER_PATH}"
            ) from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise EndpointError(f"{lock_path} is not a file of this user's; {_OTHER_PATH}")
            os.fchmod(fd, 0o600)  # the umask may have taken away more
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _identity(lock_path) == (status.st_dev, status.st_ino):
                return fd
        except BlockingIOError as error:
            os.close(fd)
            raise EndpointError(f"a store serves {path} already; {_OTHER_PATH}") from error
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError) and not isinstance(error, EndpointError):
                raise EndpointError(
                    f"cannot lock the lock file {lock_path}: {error.strerror}; {_OTHER_PATH}, on a file system that has locks"
                ) from error
            raise
        os.close(fd)


def _clear(path: str) -> None:
    """Remove a dead store's socket, or refuse whatever else is at the path: step 3."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise EndpointError(
            f"{path} exists and is no socket, so it stays; {_OTHER_PATH}, or remove it"
        )
    if status.st_uid != os.geteuid():
        raise EndpointError(f"{path} is another user's socket, so it stays; {_OTHER_PATH}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:  # its queue is full, or it is of another type: somebody listens
            pass
    raise EndpointError(f"a program listens at {path} already; {_OTHER_PATH}")
