"""The switchboard: who is connected to a store, what he says to it, and what it says to him.

The loop (`shmplasma.server`) says when; `shmplasma.store` says what.  Nobody is waited for here: who does not read is not read from
either, and dropped when that lasts; of one connection at most `_FRAMES_A_TURN` messages are handled in a turn.

Invariants
----------
* Each connection is under the number of its client, and is read, written and ended here alone.
* The backlog has the clients of which messages were read that a turn did not come to.
* Awaited are those who have to introduce themselves, or to read.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from shmplasma import system
from shmplasma.connections import Connection, StalledError
from shmplasma.effects import Adopt, Await, Descriptor, Drop, Effect, Forget, Replay, Send
from shmplasma.errors import ProtocolError
from shmplasma.exits import Exits
from shmplasma.id_locks import IdLocks
from shmplasma.protocol import ONE_WAY, encode_frame
from shmplasma.reception import Reception
from shmplasma.replies import Failed, Failure
from shmplasma.store import ObjectStore

__all__ = ["LOOK_AT_AWAITED_SECONDS", "Switchboard"]

_LOG = logging.getLogger("shmplasma")

_FRAMES_A_TURN: Final = 64
LOOK_AT_AWAITED_SECONDS: Final = 1.0
"""How often to look whether who is waited for was waited for too long."""

_READ: Final = selectors.EVENT_READ
_WRITE: Final = selectors.EVENT_WRITE


class Switchboard:
    """The connections of a store.

    Parameters
    ----------
    store : ObjectStore
        Whose they are.
    listener : socket.socket
        A bound, listening, non-blocking Unix stream socket; the caller closes it.
    selector : selectors.BaseSelector
        The loop's; a `Connection` is registered with itself as data, for `ready`.
    descriptors : mapping
        What a client may ask for.
    locks : IdLocks
        What each client is given.
    hand_over : callable
        Called when another store takes over.
    first_number : int
        Connections are numbered above it: lower numbers are of clients that are recovered.
    shared : bool
        Whether others than this user and root may connect; the socket file's mode decides who.
    may_be_replaced : bool
        Whether another store of the same user may take over.

    Attributes
    ----------
    backlog : set of int
        Clients of which messages wait for the next turn.
    awaited : set of Connection
        Those of which something is expected.
    exits : Exits
        Tells when a process has gone whose connection is not there.
    reception : Reception
        Accepts connections.
    """

    def __init__(
        self,
        store: ObjectStore,
        listener: socket.socket,
        selector: selectors.BaseSelector,
        descriptors: Mapping[Descriptor, int],
        locks: IdLocks,
        hand_over: Callable[[], None],
        first_number: int,
        *,
        shared: bool,
        may_be_replaced: bool,
    ) -> None:
        self._store = store
        self._selector = selector
        self._descriptors = descriptors
        self._locks = locks
        self._hand_over = hand_over
        self._may_be_replaced = may_be_replaced
        self._connections: dict[int, Connection] = {}
        self._last_number = first_number
        self._look_at = 0.0
        self.backlog: set[int] = set()
        self.awaited: set[Connection] = set()
        self.exits = Exits(selector, self._forget)
        self._senders = Exits(selector, store.ledger.end_process)
        self.reception = Reception(listener, selector, shared=shared, admit=self._admit)

    def close(self, *, keep: bool) -> None:
        """End all connections; `keep` says that what their clients have stays theirs, for another store."""
        for client, connection in tuple(self._connections.items()):
            if keep:
                connection.hang_up()
            elif client in self._connections:  # or it could not be told that another one has gone
                self._close(client)
        self.exits.close()
        self._senders.close()
        self._locks.close()

    # -- connections ---------------------------------------------------------------------------

    def _admit(self, sock: socket.socket, peer: system.Peer) -> None:
        started = system.start_time(peer.pid) or 0  # without it nobody is told from another one
        connection = Connection(self._last_number + 1, peer.pid, sock, self._selector)
        self._last_number += 1
        self._connections[connection.client] = connection
        self.awaited.add(connection)
        trusted = self._may_be_replaced and peer.uid in (0, os.geteuid())
        self._store.connect(
            connection.client,
            peer.pid,
            started,
            time.time_ns(),
            command=system.command(peer.pid),
            trusted=trusted,
        )

    def _close(self, client: int) -> None:
        """End a connection that its client has ended: its objects and pins go."""
        self._hang_up(client)
        self._forget(client)

    def _forget(self, client: int) -> None:
        """Take back what a client had that has gone."""
        had_locks = not self._store.only_claims(client)
        self.carry_out(self._store.disconnect(client, time.time_ns()))
        self._locks.end(client, unlock=had_locks)

    def _see_off(self, client: int) -> None:
        """Take back what a client had of which nothing is left, as it says."""
        if client in self._connections:
            self._close(client)
        elif self._store.knows(client):
            self.exits.forget(client)
            self._forget(client)

    def _await(self, sender: Await) -> None:
        """Wait for the end of a process of which a connection has ended."""
        is_alive = system.is_alive(sender.pid, sender.start_time)
        if not (is_alive and self._senders.watch(sender.client, sender.pid)):
            self._store.ledger.end_process(sender.client)

    def _hang_up(self, client: int, last: bytes = b"") -> None:
        connection = self._connections.pop(client)
        self.backlog.discard(client)
        self.awaited.discard(connection)
        connection.hang_up(last)
        self.reception.open()

    def _lose(self, client: int, error: OSError) -> None:
        """End a connection that can be neither read nor written any more.

        Only where the error says that the other end is closed may what it held be given to others.  Who reads no more may have
        buffers still: a client that was disconnected in the middle of a call.  If it has ended, that is read.
        """
        if isinstance(error, BrokenPipeError):
            connection = self._connections[client]
            connection.send_no_more()
            self._go_on(connection)
        elif isinstance(error, ConnectionResetError):
            _LOG.info("client %d: %s", client, error)
            self._close(client)
        else:
            self._drop(client, f"its connection has failed: {error}")

    def _drop(self, client: int, reason: str) -> None:
        """End a connection that its client has not ended.

        Its process may still read and write by the boards, the lease and the unsealed objects that it
        was given; so they stay its own until it has gone.  Where that cannot be seen they stay for good.
        """
        connection = self._connections[client]
        _LOG.warning("dropped client %d (pid %s): %s", client, connection.pid, reason)
        last = Failed(Failure.DROPPED, f"the store has dropped this client: {reason}")
        was_given = self._store.expel(client)
        # It hears why, if it listens; a subscriber hears nothing.
        self._hang_up(client, encode_frame(last.KIND, ONE_WAY, last.encode()) if was_given else b"")
        if was_given:
            self.exits.watch(client, connection.pid)
        else:
            self._forget(client)

    def _adopt(self, connection: Connection, number: int) -> None:
        """Let a connection go on as a client that was waited for."""
        before = connection.client
        del self._connections[before]
        connection.client = number
        self._connections[number] = connection
        self._locks.rename(before, number)
        self.exits.forget(number)

    # -- reading -------------------------------------------------------------------------------

    def ready(self, connection: Connection, mask: int) -> None:
        """Read from a connection, or write to it, as the selector has said it can be."""
        if connection.client not in self._connections:
            return  # it was dropped by an earlier event of this turn
        if mask & _WRITE:
            self._flush(connection)
        if (
            mask & _READ
            and connection.client in self._connections
            and not connection.frames
            and connection.paused_at is None
        ):
            self._read(connection)

    def _read(self, connection: Connection) -> None:
        try:
            goes_on = connection.read()
        except ProtocolError as error:
            self._drop(connection.client, str(error))
        except OSError as error:
            self._lose(connection.client, error)
        else:
            if self.awaited and connection.owes_nothing:
                self.awaited.discard(connection)
            if goes_on:
                self._process(connection)
                return
            # What it has sent before is handled by now: as long as there is some, nothing is read.
            if connection.is_incomplete:
                _LOG.info("client %d left in the middle of a message", connection.client)
            self._close(connection.client)

    def process_backlog(self) -> None:
        """Handle messages that the last turn did not come to."""
        for client in tuple(self.backlog):
            connection = self._connections.get(client)
            if connection is not None:
                self._process(connection)

    def _process(self, connection: Connection) -> None:
        """Handle messages of a connection, and remember whether there are more."""
        frames, client = connection.frames, connection.client
        store, now_ns = self._store, time.time_ns()
        handle, deleting = store.handle, store.deleting
        for _ in range(min(_FRAMES_A_TURN, len(frames))):
            if connection.paused_at is not None:
                break
            n_long = store.n_long
            effects = handle(client, frames.popleft(), now_ns)
            if effects:
                self.carry_out(effects)
                if deleting:
                    self.carry_out(store.settled())
                client = connection.client  # it may have turned out to be one that was waited for
                if client not in self._connections:
                    return
            if store.n_long > n_long:
                break
        if frames and connection.paused_at is None:
            self.backlog.add(client)
        else:
            self.backlog.discard(client)

    # -- clients that are waited for ---------------------------------------------------------------

    def _pause(self, connection: Connection) -> None:
        """Take nothing more from a client until it reads."""
        self.awaited.add(connection)
        connection.pause()

    def drop_the_slow(self) -> None:
        """Drop who was waited for too long, if it is time to look."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_AT_AWAITED_SECONDS
        for connection in tuple(self.awaited):
            if connection not in self.awaited:
                continue  # it went with another one
            try:
                if not connection.is_awaited(now):
                    self.awaited.discard(connection)
            except StalledError as error:
                self._drop(connection.client, str(error))

    # -- writing -------------------------------------------------------------------------------

    def carry_out(self, effects: Iterable[Effect]) -> None:
        """Do what the store has said is to be done."""
        for effect in effects:
            connection = self._connections.get(effect.client)
            if connection is None:
                if isinstance(effect, Forget):
                    self._see_off(effect.client)
                elif isinstance(effect, Await):
                    self._await(effect)
            elif type(effect) is Send:  # nearly always
                self._send(connection, effect)
            elif isinstance(effect, Forget):
                self._see_off(effect.client)
            elif isinstance(effect, Drop):
                self._drop(effect.client, effect.reason)
            elif isinstance(effect, Adopt):
                self._adopt(connection, effect.number)
            elif isinstance(effect, Replay):
                self._replay(connection, effect.data)
            else:
                _LOG.info("another store (pid %s) takes over", connection.pid)
                self._hand_over()

    def _send(self, connection: Connection, send: Send) -> None:
        fds: tuple[int, ...] = ()
        if send.descriptor is not None:
            fds = (self._descriptors[send.descriptor],)
            if send.descriptor is Descriptor.WAKE:
                locks = self._locks.give(send.client)
                fds = fds if locks is None else (*fds, locks)
        try:
            connection.send(send.data, fds)
            if (
                connection.is_slow
                and connection.paused_at is None
                # Subscribers only read, in their own time.
                and connection.client not in self._store.subscribers
            ):
                self._pause(connection)
        except StalledError as error:
            self._drop(connection.client, str(error))
        except OSError as error:
            self._lose(connection.client, error)

    def _replay(self, connection: Connection, data: bytes) -> None:
        try:
            connection.replay(data)
        except OSError as error:
            self._lose(connection.client, error)

    def _flush(self, connection: Connection) -> None:
        was_paused = connection.paused_at is not None
        try:
            connection.flush()
        except OSError as error:
            self._lose(connection.client, error)
            return
        if was_paused:
            self._go_on(connection)

    def _go_on(self, connection: Connection) -> None:
        """Take messages of a client again, if it may send any."""
        if connection.owes_nothing:
            self.awaited.discard(connection)
            if connection.frames:
                self.backlog.add(connection.client)
