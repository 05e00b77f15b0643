"""An embedded store: a server process that is started here and ends with its owner.

The owner and the server hold the ends of a socket pair.  The server says on it that it is ready,
and ends when the owner's end closes; as a child that the owner has forked may hold a copy of that
end, the server watches the owner's process as well.  So it ends however the owner does, and takes
its socket, its segment and the private directory of the socket with it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket as sockets
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from operator import index
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, NoReturn, Self

from shmplasma.arrow_errors import NotConnectedError
from shmplasma.client import PlasmaClient, connect
from shmplasma.connected import lasting
from shmplasma.endpoint import Endpoint
from shmplasma.errors import EndpointError, StoreNotStartedError, what_helps
from shmplasma.options import PROGRAM, check_seconds
from shmplasma.segment_name import SegmentName
from shmplasma.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Store", "start_plasma_store"]

_READY: Final = b"R"
_USAGE: Final = 2
"""The server's exit code for an error of usage."""


class Store:
    """A running store that belongs to this process.

    Parameters
    ----------
    memory : int or str
        Capacity in bytes, or as a text: ``"2GB"``, ``"512MiB"``.
    socket : str or os.PathLike, optional
        Path of its socket; one in a private temporary directory if not given.
    directory : str or os.PathLike, optional
        Directory of the file that holds the objects; POSIX shared memory if not given.
    huge_pages : bool, optional
        Use huge pages; `directory` is then a hugetlbfs.
    client_limit : int or str, optional
        How much a client may hold or have unsealed, if it sets no limit itself, in bytes or as a text; no limit if 0 or not
        given.
    ticket_seconds : float, optional
        How long a reference that nobody has received outlives its sender, and keeps its object from being
        evicted.
    external_store : str, optional
        URI of the external store to which objects go instead of being evicted, as for the command's ``-e``.
    max_spill_bytes : int or str, optional
        How much the external store may hold, in bytes or as a text; any amount if not given.

    Attributes
    ----------
    store_socket_name : str
        Path of its socket, for `connect`.
    process : subprocess.Popen
        The server.

    Raises
    ------
    StoreNotStartedError
        The server did not start; the message is what it said, or what the system refused.
    ValueError
        A size is none, or less than a byte; `ticket_seconds` is no number of seconds; or `max_spill_bytes` is given without
        an external store.

    Notes
    -----
    A context manager.  Not bound to a thread.  In a forked child, `close` leaves the parent's store
    alone.
    """

    def __init__(
        self,
        memory: int | str,
        *,
        socket: str | os.PathLike[str] | None = None,
        directory: str | os.PathLike[str] | None = None,
        huge_pages: bool = False,
        client_limit: int | str | None = None,
        ticket_seconds: float = 600,
        external_store: str | None = None,
        max_spill_bytes: int | str | None = None,
    ) -> None:
        seconds = check_seconds(ticket_seconds)
        arguments = ["-m", str(_size(memory)), "--ticket-seconds", str(seconds)]
        if client_limit not in (None, 0, "0"):
            arguments += ["--client-limit", str(_size(client_limit))]
        if external_store:
            arguments += ["-e", external_store]
        if max_spill_bytes is not None:
            if not external_store:
                raise ValueError("max_spill_bytes is about an external store; name external_store")
            arguments += ["--max-spill-bytes", str(_size(max_spill_bytes))]
        if directory:
            arguments += ["-d", os.fspath(directory)]
        if huge_pages:
            arguments.append("-h")
        scratch = None
        if socket is None:
            scratch = Path(tempfile.mkdtemp(prefix="shmplasma-"))
            socket = scratch / "store.sock"
            arguments.append("--scratch")
        socket = lasting(os.fspath(socket))
        self.store_socket_name = socket
        self._scratch = scratch
        self._closed = False
        self._owner_pid = os.getpid()
        try:
            self._start([*arguments, "-s", socket])
        except BaseException as error:
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)
            if isinstance(error, OSError):
                raise StoreNotStartedError(
                    f"the store did not start: {error}{what_helps(error)}"
                ) from error
            raise

    def _start(self, arguments: list[str]) -> None:
        # A file and not a pipe: nobody reads on once the server is ready, and it must not block
        # then.
        with tempfile.TemporaryFile() as said:
            self._alive, theirs = sockets.socketpair()
            try:
                with theirs:
                    # The lowest are the server's standard streams, also where this process has none.
                    inherited = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, 3)
                try:
                    self.process = _spawn(arguments, inherited, said)
                finally:
                    os.close(inherited)
            except BaseException:
                self._alive.close()
                raise
            try:
                ready = self._alive.recv(len(_READY)) == _READY
            except BaseException:
                self._end()
                raise
            if not ready:
                self._alive.close()
                code = self.process.wait()
                said.seek(0)
                text = said.read().decode(errors="replace").strip()
                if code == _USAGE:
                    # How to call it is no help here.
                    text = text.rpartition(f"{PROGRAM}: error: ")[2]
                raise StoreNotStartedError(f"the store did not start (exit code {code}): {text}")

    def connect(self) -> PlasmaClient:
        """Return a new client of this store.

        Raises
        ------
        NotConnectedError
            The store was closed, or does not answer.
        """
        if self._closed:
            raise NotConnectedError("this store was closed; shmplasma.Store starts a new one")
        return connect(self.store_socket_name)

    def close(self) -> None:
        """End the server, and wait for its end.  A second call does nothing."""
        if self._owner_pid == os.getpid():
            self._closed = True
            self._end()

    def _end(self) -> None:
        self.process.terminate()
        killed = self.process.wait() != 0
        self._alive.close()
        # Where others wait for this process's children, or nobody has to, how it ended is not known.
        if killed or os.path.lexists(self.store_socket_name):
            self._sweep()

    def _sweep(self) -> None:
        """Remove what a server left behind that was killed."""
        # Whoever serves there now, if anybody does, has swept it up already.
        with suppress(EndpointError), Endpoint.claim(self.store_socket_name) as endpoint:
            segment = SegmentName.decode(endpoint.read_note())
            if segment is not None:
                segment.remove()
            endpoint.write_note(b"")
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Store owns its server and cannot be pickled; pass its store_socket_name, and connect there"
        )


def _size(value: int | str) -> int:
    """Return a size in bytes; raise TypeError or ValueError if it is none."""
    if isinstance(value, str):
        return parse_size(value)
    try:
        return parse_size(str(index(value)))
    except TypeError:
        raise TypeError(
            f"a size is a whole number of bytes, or a text such as '2GB', not {type(value).__name__}"
        ) from None


def _spawn(arguments: list[str], owner: int, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    entries: list[object] = [*sys.path]
    places = [each for each in entries if isinstance(each, str)]  # others mean nothing to Python
    # Python's own come first, as in an owner that had started before it added others: a program may have a resource.py.
    library = os.path.dirname(os.__file__)
    own = library, os.path.join(library, "lib-dynload")
    places.sort(key=lambda each: each not in own)
    return subprocess.Popen(
        # It imports from where its owner does, and not from the directory in which that happens to run (-P).
        [sys.executable, "-P", "-m", "shmplasma.cli", "--owner", str(owner), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=[owner],
        process_group=0,  # Ctrl-C at the terminal is for the owner, who may want to go on
    )


@contextmanager
def start_plasma_store(
    plasma_store_memory: int,
    use_valgrind: bool = False,
    use_profiler: bool = False,
    plasma_directory: str | None = None,
    use_hugepages: bool = False,
    external_store: str | None = None,
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a store for the duration of a ``with`` block, as Plasma's function of this name did.

    Parameters
    ----------
    plasma_store_memory : int
        Capacity in bytes.
    use_valgrind, use_profiler : bool, optional
        Refused: they were for examining Plasma's C++ code.
    plasma_directory : str, optional
        Directory of the file that holds the objects; POSIX shared memory if not given, or empty.
    use_hugepages : bool, optional
        Use huge pages; `plasma_directory` is then a hugetlbfs.
    external_store : str, optional
        As for `Store`.

    Yields
    ------
    tuple of str and subprocess.Popen
        Path of the store's socket, and the server.  SIGTERM ends the server with exit code 0.

    Raises
    ------
    StoreNotStartedError
        The server did not start; the message is what it said.  A RuntimeError.
    ValueError
        An option that is refused was given.
    """
    if use_valgrind or use_profiler:
        raise ValueError(
            "use_valgrind and use_profiler examine C++, and this store is Python; run it under a "
            "Python profiler: python -m cProfile -m shmplasma.cli"
        )
    with Store(
        plasma_store_memory,
        directory=plasma_directory,
        huge_pages=use_hugepages,
        external_store=external_store,
    ) as store:
        yield store.store_socket_name, store.process
