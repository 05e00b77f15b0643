"""The store's loop: sockets in and out of `shmplasma.store.ObjectStore`, which does the thinking.

Who may hold up whom
--------------------
Nobody.  The loop never blocks on a socket; a turn handles at most `_FRAMES_A_TURN` messages of a connection,
so a flood waits its turn; half a message stays in its decoder; what a client does not read waits in a
bounded queue, and who lets it run over is dropped.  Memory is committed in small steps between requests.
When no descriptor is left for a new connection, it waits in the listener's queue while the others are
served.

An answer that needs a drain (see `shmplasma.store`) costs one pass over the sockets that have something to
read, as no message that was sent before the question can be anywhere else than in a socket or a decoder.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from shmplasma import system
from shmplasma.effects import Descriptor, Drop, Effect, Send
from shmplasma.errors import CommitError, ProtocolError
from shmplasma.protocol import MAX_REQUEST_BYTES, SPIN_NS, Frame, FrameDecoder
from shmplasma.segment import Segment
from shmplasma.store import ObjectStore

__all__ = ["Server"]

_LOG = logging.getLogger("shmplasma")

_READ_BYTES: Final = 1 << 16
_DRAIN_BYTES: Final = 1 << 20
"""More than a Unix socket holds by default (208 KiB), hence enough for one that was full."""
_FRAMES_A_TURN: Final = 64
_MAX_UNREAD_BYTES: Final = 32 << 20
"""What may wait for a client that does not read: four of the longest replies."""
_LOOK_AGAIN_SECONDS: Final = 0.1
"""While the listener is shut for want of descriptors, or where a release may not wake the store."""

_COLLECT_AFTER: Final = 100_000

_READ: Final = selectors.EVENT_READ
_WRITE: Final = selectors.EVENT_WRITE


class _SegmentMemory:
    """`shmplasma.room.Memory` on a real segment."""

    def __init__(self, segment: Segment) -> None:
        self.commit = segment.commit
        # Clients take part in barriers wherever the platform has them, also with the fast path off.
        ordered = system.register_membarrier()
        self.has_barrier = ordered and system.fast_path_available()
        self.barrier: Callable[[], None] = system.membarrier if ordered else _no_barrier


def _no_barrier() -> None:
    """Without barriers nobody pins without a message; a wake-up may be missed, so the loop looks again."""


class _Connection:
    """A client's socket and what is on its way through it."""

    __slots__ = ("client", "decoder", "frames", "out", "out_bytes", "pid", "sock")

    def __init__(self, client: int, pid: int | None, sock: socket.socket) -> None:
        self.client = client
        self.pid = pid
        self.sock = sock
        self.decoder = FrameDecoder(MAX_REQUEST_BYTES)
        self.frames: deque[Frame] = deque()
        self.out: deque[bytes] = deque()
        self.out_bytes = 0


class Server:
    """Serves one segment on one listening socket.

    Parameters
    ----------
    listener : socket.socket
        A bound, listening, non-blocking Unix stream socket; the caller closes it.
    segment : Segment
        The segment to serve; the caller closes and unlinks it.
    socket_path : str
        For the log.
    shared : bool
        Whether others than this user and root may connect; the socket file's mode decides who.

    Notes
    -----
    `run` is the only user of everything here; `stop` may be called from a signal handler or a thread.
    """

    def __init__(
        self,
        listener: socket.socket,
        segment: Segment,
        *,
        socket_path: str,
        shared: bool = False,
    ) -> None:
        self._listener = listener
        self._segment = segment
        self._path = socket_path
        self._shared = shared
        self._store = ObjectStore(
            segment.layout,
            segment.token,
            segment.words,
            segment.raw,
            segment.name.kind,
            segment.name.path,
            _SegmentMemory(segment),
        )
        self._connections: dict[int, _Connection] = {}
        self._backlog: set[int] = set()
        self._watched: set[int] = set()
        self._clients = 0
        self._accepting = True
        self._commit_ahead = True
        self._stopping = False
        self._spin_ns = SPIN_NS if system.processors() > 1 else 0
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._selector.register(listener, _READ, self._accept)
        self._selector.register(self._wake_reader, _READ, self._wake)

    def watch(self, fd: int, callback: Callable[[], object]) -> None:
        """Call `callback` in the loop whenever `fd` is readable."""
        self._selector.register(fd, _READ, callback)

    def stop(self) -> None:
        """Let `run` return soon; may be called from anywhere, more than once."""
        if self._stopping:
            return
        self._stopping = True
        try:
            os.write(self._wake_writer, b"s")
        except BlockingIOError:
            _LOG.debug("a wake-up is pending already")

    def run(self) -> None:
        """Serve until `stop`, then close all connections."""
        # Nothing here makes reference cycles by the message; the collector would only look for some.
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER)
        try:
            while not self._stopping:
                events = self._wait()
                for key, mask in events:
                    if isinstance(key.data, _Connection):
                        self._ready(key.data, mask)
                    else:
                        key.data()
                if self._backlog:
                    self._process_backlog(_FRAMES_A_TURN)
                if self._store.has_unsettled:
                    self._settle()
                if not events or self._store.has_urgent_work:
                    self._advance(idle=not events)
        finally:
            for client in tuple(self._connections):
                self._close(client)
            for fd in self._watched:
                os.close(fd)
            self._selector.close()
            os.close(self._wake_reader)
            os.close(self._wake_writer)

    def _wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for something to do; look a while before going to sleep.

        A client that is waited for with the processor awake need not wake it: its send takes 1 µs instead
        of 30, and the message is read at once.  The pause lets a client run that shares the processor.
        """
        select = self._selector.select
        if events := select(0):
            return events
        timeout = self._timeout()
        if timeout == 0:
            return events
        end = time.monotonic_ns() + self._spin_ns
        while not (events := select(0)):
            if time.monotonic_ns() > end:
                return select(timeout)
            os.sched_yield()
        return events

    def _timeout(self) -> float | None:
        store = self._store
        if self._backlog or store.has_unsettled or store.has_urgent_work:
            return 0
        if self._commit_ahead and store.has_idle_work:
            return 0
        if not self._accepting or store.may_miss_a_release:
            return _LOOK_AGAIN_SECONDS
        return None

    # -- connections ---------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                _LOG.warning(
                    "no descriptor or memory for a new connection (%s); it waits. Raise the limit "
                    "of open files (ulimit -n)",
                    error,
                )
                self._selector.unregister(self._listener)
                self._accepting = False
            elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EINTR):
                raise
            return
        try:
            peer = system.peer(sock)
        except OSError as error:
            _LOG.info("a client left before it was looked at: %s", error)
            sock.close()
            return
        if not self._shared and peer.uid not in (None, 0, os.geteuid()):
            _LOG.warning("refused pid %s of uid %s: not this user", peer.pid, peer.uid)
            sock.close()
            return
        sock.setblocking(False)
        self._clients += 1
        connection = _Connection(self._clients, peer.pid, sock)
        self._connections[connection.client] = connection
        self._selector.register(sock, _READ, connection)
        self._store.connect(connection.client, peer.pid or 0)

    def _accept_again(self) -> None:
        if not self._accepting:
            self._accepting = True
            self._selector.register(self._listener, _READ, self._accept)

    def _close(self, client: int) -> None:
        """End a connection that its client has ended: its objects and pins go."""
        self._hang_up(client)
        self._carry_out(self._store.disconnect(client))

    def _hang_up(self, client: int) -> None:
        connection = self._connections.pop(client)
        self._backlog.discard(client)
        self._selector.unregister(connection.sock)
        connection.sock.close()
        self._accept_again()

    def _drop(self, client: int, reason: str) -> None:
        """End a connection that its client has not ended.

        Its process may still read and write by the boards, the lease and the unsealed objects that it
        was given; so they stay its own until it has gone.  Where that cannot be seen they stay for good.
        """
        connection = self._connections[client]
        _LOG.warning("dropped client %d (pid %s): %s", client, connection.pid, reason)
        self._hang_up(client)
        if not self._store.expel(client):
            self._carry_out(self._store.disconnect(client))
            return
        try:
            exited = system.watch_exit(connection.pid) if connection.pid else None
        except ProcessLookupError:
            self._carry_out(self._store.disconnect(client))
            return
        if exited is not None:

            def gone() -> None:
                self._selector.unregister(exited)
                os.close(exited)
                self._watched.discard(exited)
                self._carry_out(self._store.disconnect(client))

            self._watched.add(exited)
            self._selector.register(exited, _READ, gone)

    # -- reading -------------------------------------------------------------------------------

    def _ready(self, connection: _Connection, mask: int) -> None:
        if connection.client not in self._connections:
            return  # it was dropped by an earlier event of this turn
        if mask & _WRITE:
            self._flush(connection)
        if mask & _READ and connection.client in self._connections and not connection.frames:
            self._read(connection, _READ_BYTES)
            self._process(connection, _FRAMES_A_TURN)

    def _read(self, connection: _Connection, limit_bytes: int) -> bool:
        """Feed the decoder with what the socket holds; tell whether the connection goes on."""
        if connection.client not in self._connections:
            return False
        try:
            data = connection.sock.recv(limit_bytes)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            _LOG.info("client %d: %s", connection.client, error)
            self._close(connection.client)
            return False
        if not data:
            if connection.decoder.incomplete:
                _LOG.info("client %d left in the middle of a message", connection.client)
            self._process(connection, None)
            if connection.client in self._connections:
                self._close(connection.client)
            return False
        try:
            connection.frames += connection.decoder.feed(data)
        except ProtocolError as error:
            self._drop(connection.client, str(error))
            return False
        return True

    def _process_backlog(self, limit: int | None) -> None:
        for client in tuple(self._backlog):
            connection = self._connections.get(client)
            if connection is not None:
                self._process(connection, limit)

    def _process(self, connection: _Connection, limit: int | None) -> None:
        """Handle at most `limit` messages of a connection; remember whether there are more."""
        frames, client = connection.frames, connection.client
        handle, now_ns = self._store.handle, time.time_ns()
        for _ in range(len(frames) if limit is None else min(limit, len(frames))):
            effects = handle(client, frames.popleft(), now_ns)
            if effects:
                self._carry_out(effects)
                if client not in self._connections:
                    return
        if frames and client in self._connections:
            self._backlog.add(client)
        else:
            self._backlog.discard(client)

    def _settle(self) -> None:
        """Drain every socket once, and then answer what depended on it."""
        unsettled = self._store.take_unsettled()
        self._process_backlog(None)
        for key, mask in self._selector.select(0):
            if isinstance(key.data, _Connection) and mask & _READ:
                self._read(key.data, _DRAIN_BYTES)
                self._process(key.data, None)
        self._carry_out(self._store.settle(unsettled))

    def _wake(self) -> None:
        """See what a release, of which a client has told, lets go."""
        os.read(self._wake_reader, _READ_BYTES)
        self._carry_out(self._store.wake())

    # -- memory --------------------------------------------------------------------------------

    def _advance(self, *, idle: bool) -> None:
        store = self._store
        if store.has_urgent_work:
            self._commit_ahead = True
            self._carry_out(store.advance())
        elif idle and self._commit_ahead and store.has_idle_work:
            try:
                store.advance()
            except CommitError as error:
                _LOG.info("no memory is committed ahead of need: %s", error)
                self._commit_ahead = False
        if idle:
            self._accept_again()
            self._carry_out(store.wake())

    # -- writing -------------------------------------------------------------------------------

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            connection = self._connections.get(effect.client)
            if connection is None:
                continue
            if isinstance(effect, Drop):
                self._drop(effect.client, effect.reason)
            else:
                self._send(connection, effect)

    def _send(self, connection: _Connection, send: Send) -> None:
        data = send.data
        if not connection.out:
            try:
                if send.descriptor is None:
                    sent = connection.sock.send(data)
                else:
                    fd = self._descriptor(send.descriptor)
                    sent = socket.send_fds(connection.sock, [data], [fd])
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError as error:
                _LOG.info("client %d: %s", connection.client, error)
                self._close(connection.client)
                return
            if sent == len(data):
                return
            if send.descriptor is not None and not sent:
                self._drop(connection.client, "it asks for a descriptor and does not read")
                return
            data = data[sent:]
            self._selector.modify(connection.sock, _READ | _WRITE, connection)
        elif send.descriptor is not None:
            self._drop(connection.client, "it asks for a descriptor and does not read")
            return
        connection.out.append(data)
        connection.out_bytes += len(data)
        if connection.out_bytes > _MAX_UNREAD_BYTES:
            self._drop(
                connection.client,
                f"it does not read: {connection.out_bytes} bytes wait for it",
            )

    def _flush(self, connection: _Connection) -> None:
        out = connection.out
        while out:
            try:
                sent = connection.sock.send(out[0])
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                _LOG.info("client %d: %s", connection.client, error)
                self._close(connection.client)
                return
            connection.out_bytes -= sent
            if sent < len(out[0]):
                out[0] = out[0][sent:]
                return
            out.popleft()
        self._selector.modify(connection.sock, _READ, connection)

    def _descriptor(self, descriptor: Descriptor) -> int:
        return self._segment.fd if descriptor is Descriptor.SEGMENT else self._wake_writer
