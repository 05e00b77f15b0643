"""``shmplasma-store``: the command that runs a store.

Order of a start: claim the socket path, recover the segment of a store that died there, or make
one, serve.  Each step is undone if a later one fails.  Signals are held back until the server
can take them, so that none of the steps is interrupted half-way.

A store that fails once it serves leaves everything to a successor, as one does that is killed.

Exit codes: 0 after SIGTERM, SIGINT or SIGHUP, 1 if the store cannot be had (the path is served, there is
not enough room) or has failed, 2 for an error of usage.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import shlex
import signal
import socket
import sys
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING, Final

from shmplasma import system
from shmplasma.backing import default_capacity
from shmplasma.commitment import FLOOR_BYTES
from shmplasma.endings import EndedEarly, hold_back, is_told_to_end
from shmplasma.endpoint import Endpoint, default_socket_path
from shmplasma.errors import (
    AttachError,
    CommitError,
    EndpointError,
    ExternalStoreError,
    LayoutError,
)
from shmplasma.layout import TOKEN_BYTES
from shmplasma.options import PROGRAM, parse
from shmplasma.orphans import sweep
from shmplasma.prefault import prefault
from shmplasma.readiness import notify
from shmplasma.segment import Segment
from shmplasma.segment_name import SegmentName
from shmplasma.server import Server
from shmplasma.spilling import ExternalLimits
from shmplasma.succession import replace
from shmplasma.whereabouts import check_place, note_place

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from shmplasma.spiller import Spiller

__all__ = ["main"]

_LOG: Final = logging.getLogger("shmplasma")

_LIMITS: Final = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EFBIG: "raise the limit of the size of a file (ulimit -f), or start with a smaller -m",
    errno.ENOMEM: "raise the limit of a process's memory (ulimit -v), or start with a smaller -m",
}
"""The limits of this process that a call may have met, and what helps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a store until it is told to end.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of this process if not given.

    Returns
    -------
    int
        Exit code: 0 or 1.

    Raises
    ------
    SystemExit
        With code 2 for an error of usage, with 0 after ``--help`` and ``--version``.

    Notes
    -----
    To be called on the main thread, as it handles signals.  Ends the process when it is told to while the external store
    does not answer.
    """
    options = parse(argv)
    logging.basicConfig(
        format=f"%(asctime)s {PROGRAM}: %(message)s",
        level=logging.DEBUG if options.verbose else logging.INFO,
    )
    logging.raiseExceptions = False  # a full disk under the log is no reason to stop serving
    ending = hold_back()
    try:
        _serve(options, ending)
    except EndedEarly:
        # The external store is still being asked, and Arrow would wait for that.
        logging.shutdown()
        os._exit(0)
    except (AttachError, CommitError, EndpointError, ExternalStoreError, LayoutError) as error:
        return _fail(f"{error}{_remedy(error.__cause__)}")
    except OSError as error:
        return _fail(
            f"the system refused what the store cannot do without: {error}{_remedy(error)}"
        )
    except MemoryError:
        return _fail("the store has no memory left for itself; free some, and start it again")
    except Exception:  # noqa: BLE001 - a bug has no class of its own
        _LOG.exception("the store has failed by an error of its own; please report it")
        return 1
    return 0


def _remedy(error: BaseException | None) -> str:
    """Return what helps where a call has met a limit of this process, at the root of an error, to be added to a message; else nothing."""
    while error is not None:
        remedy = _LIMITS.get(error.errno or 0) if isinstance(error, OSError) else None
        if remedy is not None:
            return f"; {remedy}"
        error = error.__cause__
    return ""


def _fail(text: str) -> int:
    with suppress(OSError):  # there may be no room for the message either
        sys.stderr.write(f"{PROGRAM}: error: {text}\n")
    return 1


def _serve(options: argparse.Namespace, ending: frozenset[signal.Signals]) -> None:
    _raise_file_limit()
    with ExitStack() as stack:
        if options.scratch:
            stack.callback(_remove_directory, os.path.dirname(options.socket))
        owner = None
        if options.owner is not None:
            owner = stack.enter_context(socket.socket(fileno=options.owner))
            owner.settimeout(0)

        def is_ending() -> bool:
            return is_told_to_end() or (owner is not None and _has_gone(owner))

        path = default_socket_path() if options.socket is None else options.socket
        if options.replace:
            replace(path, lambda left: _check_left(left, options, is_ending), is_ending)
        endpoint = stack.enter_context(Endpoint.claim(path, options.mode, options.group))
        segment, is_recovered = _segment(endpoint, options, is_ending)
        stack.callback(_leave_to_successor, endpoint, segment.name)
        capacity = segment.layout.capacity
        floor = options.trim_floor
        if floor is None:
            floor = capacity if options.prefault else FLOOR_BYTES
        shared = options.group is not None or bool(options.mode & 0o066)
        with ExitStack() as on_failure:
            # What could not be recovered this time stays, for another attempt.
            on_failure.enter_context(closing(segment) if is_recovered else segment)
            spiller = _open_spiller(segment, options, is_ending)
            note_place(segment, options.external_store)
            server = Server(
                endpoint.listener,
                segment,
                shared=shared,
                recover=is_recovered,
                may_be_replaced=options.owner is None,
                may_be_recovered=not options.scratch,
                client_limit_bytes=options.client_limit or 0,
                ticket_seconds=options.ticket_seconds,
                floor_bytes=floor,
                spiller=spiller,
            )
            if options.prefault:
                prefault(server.commit_all(), capacity, sys.stderr, is_ending)
            endpoint.write_note(segment.name.encode())
            _wake_by_signals(server, stack)
            on_failure.pop_all()
        stack.callback(_end_segment, segment, server)

        def end(*_: object) -> None:
            for number in ending:  # once is enough, and the rest is not to be interrupted
                signal.signal(number, signal.SIG_IGN)
            server.stop()

        for number in ending:
            signal.signal(number, end)
        if owner is None:
            stack.callback(notify, "STOPPING=1")
            notify("READY=1")
        else:
            _follow(owner, server, end, stack)
        _LOG.info(
            "ready: socket %s, capacity %d bytes, segment %s (%s)",
            path,
            capacity,
            segment.name.path,
            "POSIX shared memory"
            if options.directory is None
            else f"pages of {segment.layout.page_bytes} bytes",
        )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ending)
        server.run()
        if server.is_handed_over:
            segment.close()
            endpoint.hand_over()
            server.close()


def _open_spiller(
    segment: Segment, options: argparse.Namespace, is_ending: Callable[[], bool]
) -> Spiller | None:
    if not options.external_store:
        return None
    from shmplasma.spiller import open_spiller  # noqa: PLC0415 - Arrow takes its time to import

    limits = ExternalLimits(options.max_spill_bytes or 0, options.spill_above)
    return open_spiller(options.external_store, segment.token, segment.name, limits, is_ending)


def _wake_by_signals(server: Server, stack: ExitStack) -> None:
    """Let a signal end the loop's sleep also when it comes just before the loop falls asleep.

    Python runs its handler only when the loop is awake; what it writes to this pipe at once wakes it.
    """
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    stack.callback(os.close, writer)
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)

    def empty() -> None:
        with suppress(OSError):  # what is still in it makes the loop come back here
            os.read(reader, 64)

    server.watch(reader, empty)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    stack.callback(signal.set_wakeup_fd, -1)


def _end_segment(segment: Segment, server: Server) -> None:
    """Close a segment, and remove it unless it is left for another store."""
    if not server.is_left:
        segment.unlink()
    segment.close()


def _leave_to_successor(endpoint: Endpoint, name: SegmentName) -> None:
    """Keep the note of a segment whose name is still there: it can be had back, or swept up, by it."""
    if endpoint.is_claimed and not name.is_gone():
        endpoint.keep_note()
        _LOG.warning("the segment %s stays, for the next store at this socket", name.path)


def _segment(
    endpoint: Endpoint, options: argparse.Namespace, is_ending: Callable[[], bool]
) -> tuple[Segment, bool]:
    """Return the segment to serve, and whether a store that died at this endpoint has left it."""
    left = SegmentName.decode(endpoint.read_note())
    if left is not None and not options.fresh:
        segment = _open_left(left, options, is_ending)
        if segment is not None:
            return segment, True
        _LOG.warning("the store that died here left nothing to recover")
    if left is not None and left.remove():
        _LOG.info("removed %s, the segment of a store that was here", left.path)
    for name in sweep(options.directory):
        _LOG.info(
            "removed %s, whose store was killed together with the program that it served", name
        )
    token = os.urandom(TOKEN_BYTES)
    endpoint.write_note(SegmentName.plan(token, options.directory).encode())
    segment = Segment.create(
        options.memory or default_capacity(options.directory),
        directory=options.directory,
        huge_pages=options.huge_pages,
        mode=options.mode,
        group=options.group,
        token=token,
        scratch=endpoint.path if options.scratch else "",
    )
    return segment, False


def _open_left(
    left: SegmentName,
    options: argparse.Namespace,
    is_ending: Callable[[], bool],
    *,
    runs: bool = False,
) -> Segment | None:
    """Open the segment of another store that was here, or still runs; None if there is none.

    Raises
    ------
    EndpointError
        The options are for another store, or this release cannot read it.
    """
    directory = os.path.dirname(left.path) if left.kind == "file" else None
    try:
        segment = Segment.recover(left, directory)
    except (AttachError, LayoutError) as error:
        raise EndpointError(
            f"the segment {left.path} of the store that was here cannot be taken over: {error}. It stays; "
            "--fresh gives it up and starts empty"
        ) from error
    if segment is None:
        return None
    wanted = None if options.directory is None else os.path.abspath(options.directory)
    capacity = segment.layout.capacity
    if wanted == directory and options.memory in (None, capacity):
        try:
            check_place(segment, options.external_store, is_ending, runs=runs)
        except BaseException:
            segment.close()
            raise
        return segment
    segment.close()
    place = "" if directory is None else f" -d {shlex.quote(directory)}"
    if wanted is not None and directory is None:
        place = " and without -d"
    raise EndpointError(
        f"the store {'that runs' if runs else 'that was'} here has its objects in a segment of {capacity} bytes; start "
        f"with -m {capacity}{place} to {'take them over' if runs else 'have them back'}, or with --fresh to give them up"
    )


def _check_left(
    left: SegmentName, options: argparse.Namespace, is_ending: Callable[[], bool]
) -> None:
    """See whether the segment of a store that is to be replaced can be taken over, if that is wanted.

    Raises
    ------
    EndpointError
        It cannot.
    """
    if options.fresh:
        return
    segment = _open_left(left, options, is_ending, runs=True)
    if segment is None:
        raise EndpointError(f"somebody has removed {left.path}, which the store still uses")
    segment.close()


def _has_gone(owner: socket.socket) -> bool:
    """Tell whether the owner has ended, or said that it will; what it says otherwise means nothing.

    The owner's end closes when the owner ends, unless a child that it has forked holds a copy.  It is the process that made the
    socket pair, and our parent as long as it lives.
    """
    try:
        said = owner.recv(64)
    except BlockingIOError:
        return os.getppid() != system.peer(owner).pid
    except ConnectionResetError:  # it ended before it read that the store is ready
        return True
    return not said


def _follow(
    owner: socket.socket, server: Server, end: Callable[[], None], stack: ExitStack
) -> None:
    """Tell the owner that the store is ready, and have it end with its owner."""

    def heard() -> None:
        if _has_gone(owner):
            end()

    server.watch(owner.fileno(), heard)
    with suppress(ProcessLookupError):
        exited = system.watch_exit(system.peer(owner).pid)
        if exited is not None:
            stack.callback(os.close, exited)
            server.watch(exited, end)
    heard()
    with suppress(BrokenPipeError):
        owner.send(b"R")


def _raise_file_limit() -> None:
    """Allow as many clients as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS states a hard limit that it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _remove_directory(path: str) -> None:
    with suppress(OSError):  # somebody has put a file of his own there
        os.rmdir(path)


if __name__ == "__main__":
    sys.exit(main())
