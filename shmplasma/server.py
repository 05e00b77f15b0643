"""The store's loop: sockets in and out of `shmplasma.store.ObjectStore`, which does the thinking.

Who may hold up whom
--------------------
Nobody.  The loop never blocks on a socket; a turn handles so many messages of a connection and no more (`shmplasma.switchboard`), and
of those whose answer takes a look at the whole store, or that tell of many references, only one, so a flood waits its turn; half a message
stays in its decoder.  Who does not read his replies is not read from either, and is dropped when that lasts;
so is a subscriber who leaves too much unread (`shmplasma.connections` has the figures).  Memory is committed in
small steps between requests.  When no descriptor is left for a new connection, it waits in the listener's
queue while the others are served.
"""

from __future__ import annotations

import gc
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from shmplasma import system
from shmplasma.commitment import FLOOR_BYTES
from shmplasma.connections import Connection
from shmplasma.effects import Descriptor
from shmplasma.errors import AttachError, CommitError, ExternalStoreError
from shmplasma.exits import close_descriptor
from shmplasma.id_locks import IdLocks
from shmplasma.outbox import MISSED
from shmplasma.parts import Parts
from shmplasma.segment import Segment
from shmplasma.spin import Spin
from shmplasma.store import ObjectStore
from shmplasma.switchboard import LOOK_AT_AWAITED_SECONDS, Switchboard
from shmplasma.tickets import TICKET_NS

if TYPE_CHECKING:
    from shmplasma.spiller import Spiller

__all__ = ["Server"]

_LOG = logging.getLogger("shmplasma")

_WAKE_BYTES: Final = 1 << 16
"""All that a pipe holds."""
_SMALLEST_PIPE_BYTES: Final = 4096
"""What any pipe holds: one that had less was not full."""
_LOOK_AGAIN_SECONDS: Final = 0.1
"""While the listener is shut for want of descriptors, or where a release may not wake the store."""

_POLL_SECONDS: Final = 0.001
"""How often the outboxes are looked into while clients do not announce what they put there."""

_TOLD_SECONDS: Final = 0.2
"""For how long clients announce each record after one has missed what was put: their puts take longer, the gets of others less."""

_LONGEST_SLEEP_SECONDS: Final = 3600.0
"""epoll takes no more than 2,147,483 s, and what is due may be farther off; to wake up early is harmless."""

_COLLECT_AFTER: Final = 100_000

_READ: Final = selectors.EVENT_READ


class _SegmentMemory:
    """`shmplasma.memory.Memory` on a real segment."""

    def __init__(self, segment: Segment) -> None:
        self.commit = segment.commit
        self.punch = segment.punch
        # Clients take part in barriers wherever the platform has them, also with the fast path off.
        ordered = system.register_membarrier()
        self.has_barrier = ordered and system.fast_path_available()
        self.barrier: Callable[[], None] = system.membarrier if ordered else _no_barrier
        self._fd = segment.fd

    def lock(self, at: int) -> bool:
        """Lock an id; where clients do not put without a message, nobody else ever does."""
        if not self.has_barrier:
            return True
        try:
            return system.try_lock(self._fd, at)
        except OSError as error:
            _LOG.debug("an id cannot be locked, and is held to be claimed: %s", error)
            return False

    def unlock(self) -> None:
        """Unlock what was locked; what stays locked does so for nothing."""
        if self.has_barrier:
            try:
                system.unlock(self._fd)
            except OSError as error:
                _LOG.debug("an id cannot be unlocked: %s", error)


def _no_barrier() -> None:
    """Without barriers nobody pins without a message; a wake-up may be missed, so the loop looks again."""


class Server:
    """Serves one segment on one listening socket.

    Parameters
    ----------
    listener : socket.socket
        A bound, listening, non-blocking Unix stream socket; the caller closes it.
    segment : Segment
        The segment to serve; the caller closes and unlinks it.
    shared : bool
        Whether others than this user and root may connect; the socket file's mode decides who.
    recover : bool
        Whether the segment is that of a store which has died, with objects in it.
    may_be_replaced : bool
        Whether another store of the same user may take over.
    may_be_recovered : bool
        Whether another store may be started that recovers the segment if this one fails.
    client_limit_bytes : int
        What a client may hold that has no limit of its own; 0 for no limit.
    ticket_seconds : float
        How long a reference that is not received is kept (see `shmplasma.tickets`).
    floor_bytes : int
        How much memory that is not used stays committed.
    spiller : Spiller, optional
        Serves the external store, if there is one; closed with the server.

    Attributes
    ----------
    is_handed_over : bool
        Whether another store takes over: then segment and socket are its.
    is_left : bool
        Whether what is in segment and external store stays for another store: one takes over, or this one has failed.

    Raises
    ------
    CommitError
        Memory that the dead store had cannot be had any more.

    Notes
    -----
    `run` is the only user of everything here; `stop` may be called from a signal handler or a thread.
    """

    def __init__(
        self,
        listener: socket.socket,
        segment: Segment,
        *,
        shared: bool = False,
        recover: bool = False,
        may_be_replaced: bool = True,
        may_be_recovered: bool = True,
        client_limit_bytes: int = 0,
        ticket_seconds: float = TICKET_NS / 1e9,
        floor_bytes: int = FLOOR_BYTES,
        spiller: Spiller | None = None,
    ) -> None:
        self._segment = segment
        self._may_be_recovered = may_be_recovered
        self.is_handed_over = self.is_left = False
        memory = _SegmentMemory(segment)
        parts = Parts(
            segment.layout,
            segment.token,
            segment.words,
            segment.raw,
            segment.name.kind,
            segment.name.path,
            memory,
            time.monotonic_ns,
            client_limit_bytes=client_limit_bytes,
            ticket_ns=round(ticket_seconds * 1e9),
            floor_bytes=floor_bytes,
            external=None if spiller is None else spiller.limits,
        )
        self._store = ObjectStore(parts)
        self._upkeep = self._store.upkeep
        self._spiller = spiller
        self._commit_ahead = True
        self._stopping = False
        self._spin = Spin()
        self._told_until = self._look_at = 0.0
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._switchboard = Switchboard(
            self._store,
            listener,
            self._selector,
            {Descriptor.SEGMENT: segment.fd, Descriptor.WAKE: self._wake_writer},
            IdLocks(segment.reopen if memory.has_barrier else None),
            self._hand_over,
            segment.layout.n_boards,
            shared=shared,
            may_be_replaced=may_be_replaced,
        )
        self._carry_out = self._switchboard.carry_out
        self._selector.register(self._wake_reader, _READ, self._wake)
        if recover:
            self._recover()
        if spiller is not None:
            n_lost = self._store.tidy_external(spiller.start(segment.raw, self._interrupt))
            if n_lost:
                _LOG.warning(
                    "%d objects that were in the external store alone are not there any more, or not whole; a get of one says so",
                    n_lost,
                )

    def _recover(self) -> None:
        began = time.monotonic()
        gc.disable()  # 100,000 objects make no garbage, and as many collections as there are tuples
        try:
            clients, summary = self._store.recover(system.is_alive, time.time_ns())
        finally:
            gc.enable()
        for client, pid in clients.items():
            self._switchboard.exits.watch(client, pid)
        _LOG.info(
            "recovered the segment of a store that has died here in %.0f ms: %s",
            1000 * (time.monotonic() - began),
            summary,
        )

    def commit_all(self) -> Iterator[int]:
        """Commit all memory for objects before `run`, by steps; yield how many bytes that are so far.

        Raises
        ------
        CommitError
            There is not so much memory.
        """
        return self._store.commitment.commit_all()

    def watch(self, fd: int, callback: Callable[[], object]) -> None:
        """Call `callback` in the loop whenever `fd` is readable."""
        self._selector.register(fd, _READ, callback)

    def stop(self) -> None:
        """Let `run` return soon; may be called from anywhere, more than once."""
        if self._stopping:
            return
        self._stopping = True
        self._interrupt()

    def _hand_over(self) -> None:
        self.is_handed_over = self.is_left = self._stopping = True

    def _interrupt(self) -> None:
        """End the loop's sleep; from anywhere."""
        try:
            os.write(self._wake_writer, b"s")
        except OSError as error:
            _LOG.debug("a wake-up is pending already, or cannot be sent: %s", error)

    def run(self) -> None:
        """Serve until `stop`, then `close`; or until another store takes over, and leave that to the caller.

        What ends it otherwise is raised, and everything is left as if the process had been killed: recovery is made for
        what is half done, and nothing else is.  Only a file that somebody has truncated has nothing to recover.
        """
        # Nothing here makes reference cycles by the message; the collector would only look for some.
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER)
        switchboard = self._switchboard
        try:
            while not self._stopping:
                events = self._wait()
                if events:
                    self._handle(events)
                if switchboard.backlog:
                    switchboard.process_backlog()
                idle = events is None or self._is_to_look_again
                if idle or switchboard.awaited or self._spiller or not self._store.is_quiet:
                    self._finish_turn(idle=idle)
        except BaseException as error:
            self.is_left = self._may_be_recovered and not isinstance(error, AttachError)
            raise
        finally:
            try:
                if self._spiller is not None:
                    self._end_spilling(self._spiller)
            finally:
                if not self.is_handed_over:
                    self.close()

    def _handle(self, events: Sequence[tuple[selectors.SelectorKey, int]]) -> None:
        """Handle what the selector has found."""
        for key, mask in events:
            if isinstance(key.data, Connection):
                self._switchboard.ready(key.data, mask)
            else:
                self._settle()
                key.data()

    def _settle(self) -> None:
        """End deletions, for which nobody waits, before anything but a request."""
        if self._store.deleting:
            self._carry_out(self._store.settled())

    def _hear(self, spiller: Spiller) -> None:
        """See what the external store has done."""
        for job, places, failure in spiller.done():
            if failure:
                _LOG.warning("external store: %s", failure)
            self._carry_out(self._store.job_done(job, places, failure))

    def _spill(self, spiller: Spiller) -> None:
        """Have the external store do what is wanted of it; the last of a turn, so that the loop does not sleep on it."""
        jobs, effects = self._store.take_jobs()
        self._carry_out(effects)
        for job in jobs:
            spiller.submit(job)

    def _end_spilling(self, spiller: Spiller) -> None:
        try:
            spiller.close(remove=not self.is_left)
        except ExternalStoreError as error:
            _LOG.warning("%s", error)

    def _finish_turn(self, *, idle: bool) -> None:
        """Do what messages, time, or the want of both have made due."""
        store = self._store
        self._settle()
        if store.ledger.wait_ns is not None:
            store.expire(time.time_ns())
        if self._spiller is not None:
            self._hear(self._spiller)
        if store.has_unsettled:
            self._carry_out(store.settle(store.take_unsettled()))
            self._carry_out(store.settled())
        if store.is_to_stop_polling:
            self._carry_out(store.stop_polling(time.time_ns()))
        if idle or self._upkeep.has_urgent_work:
            self._advance(idle=idle)
        if store.has_waiters:
            self._carry_out(store.offer_room(time.monotonic_ns(), time.time_ns()))
        if self._switchboard.awaited:
            self._switchboard.drop_the_slow()
        if self._spiller is not None:
            self._spill(self._spiller)

    def close(self) -> None:
        """Close all connections; what their clients have is theirs still if it is left for another store."""
        if not self.is_left and self._store.polls:
            self._carry_out(self._store.stop_polling(time.time_ns()))
        self._switchboard.close(keep=self.is_left)
        close_descriptor(self._wake_reader)
        close_descriptor(self._wake_writer)
        self._selector.close()

    def _wait(self) -> list[tuple[selectors.SelectorKey, int]] | None:
        """Wait for something to do, and look a while before going to sleep; None when nothing has come.

        A client that is waited for with the processor awake need not wake it: its send takes 1 µs instead
        of 30, and the message is read at once.  The pause lets a client run that shares the processor.
        """
        if events := self._selector.select(0):
            return events
        if self._has_more_to_do:
            return None
        found = self._look()
        return (self._sleep() or None) if found is None else found

    def _look(self) -> list[tuple[selectors.SelectorKey, int]] | None:
        """Look for messages, and into outboxes, until nothing comes for as long as a sleep would cost; None if so.

        No messages, but not None, when something was in the outboxes from which more follows.
        """
        select, store, switchboard = self._selector.select, self._store, self._switchboard
        goes_on = True
        while goes_on:
            goes_on = False
            for _ in self._spin.looks():
                if events := select(0):
                    return events
                count, effects = store.glance(time.time_ns())
                if effects:
                    self._carry_out([*effects, *store.settled()])
                if count:
                    if switchboard.backlog or switchboard.awaited or not store.is_quiet:
                        return events
                    goes_on = True
                    break
        self._settle()
        return None

    def _sleep(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for an event, or for what a client has put into its outbox while this store polls.

        Who puts something into an outbox need not wake a store that polls, but who misses it then has to.  Where somebody did, the store is
        told of each record for a while.
        """
        store = self._store
        if store.polls and time.monotonic() < self._told_until:
            self._carry_out(store.stop_polling(time.time_ns()))
            if self._has_more_to_do:  # of what was read
                return []
        if not store.polls:
            return self._selector.select(self._timeout())
        events = self._selector.select(_POLL_SECONDS)
        if events:  # most likely of what is in an outbox
            _, effects = store.glance(time.time_ns())
            if effects:
                self._carry_out([*effects, *store.settled()])
        else:
            self._carry_out(store.poll(time.time_ns()))
        return events

    @property
    def _has_more_to_do(self) -> bool:
        """Whether there is something to do that waits for nobody."""
        store = self._store
        if self._switchboard.backlog or (self._commit_ahead and not store.commitment.is_ahead):
            return True
        return not store.is_quiet and (
            store.has_unsettled or self._upkeep.has_urgent_work or store.is_to_take_jobs
        )

    @property
    def _looks_again(self) -> bool:
        """Whether nobody tells of what is waited for: a descriptor for a new connection, or a release."""
        return not self._switchboard.reception.is_open or self._store.may_miss_a_release

    @property
    def _is_to_look_again(self) -> bool:
        """Whether it is time to do that, though clients keep the loop awake."""
        return self._looks_again and time.monotonic() >= self._look_at

    def _timeout(self) -> float:
        store = self._store
        timeouts = [_LONGEST_SLEEP_SECONDS]
        if self._looks_again:
            timeouts.append(_LOOK_AGAIN_SECONDS)
        if self._switchboard.awaited:
            timeouts.append(LOOK_AT_AWAITED_SECONDS)
        steady_ns = time.monotonic_ns()
        if (deadline_ns := store.deadline_ns) is not None:
            timeouts.append(max(0.0, (deadline_ns - steady_ns) / 1e9))
        if (wait_ns := store.ledger.wait_ns) is not None:
            timeouts.append(max(0.001, wait_ns / 1e9))
        if (trim_ns := store.trims.idle_ns(steady_ns)) is not None:
            timeouts.append(trim_ns / 1e9)
        return min(timeouts)

    def _wake(self) -> None:
        """See what a release, of which a client has told, lets go, and note that one has missed what was put."""
        said = b""
        with suppress(OSError):  # what is still in it makes the loop come back here
            said = os.read(self._wake_reader, _WAKE_BYTES)
        if MISSED in said:
            self._told_until = time.monotonic() + _TOLD_SECONDS
        # Into a full pipe nobody could write of a release.
        if said.strip(MISSED) or len(said) >= _SMALLEST_PIPE_BYTES:
            self._carry_out(self._store.wake())

    # -- memory --------------------------------------------------------------------------------

    def _advance(self, *, idle: bool) -> None:
        store = self._store
        if self._upkeep.has_urgent_work:
            self._commit_ahead = True
            self._carry_out(self._upkeep.advance(time.time_ns()))
        elif idle and self._commit_ahead and not store.commitment.is_ahead:
            try:
                store.commitment.step_ahead()
            except CommitError as error:
                _LOG.info("no memory is committed ahead of need: %s", error)
                self._commit_ahead = False
        if idle:
            self._look_at = time.monotonic() + _LOOK_AGAIN_SECONDS
            store.trims.advance_idle(time.monotonic_ns())
            self._segment.check_size()
            self._switchboard.reception.open()
            self._carry_out(store.wake())
