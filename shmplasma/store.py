"""The store's state machine: requests in, effects out.  Pure; `shmplasma.server` carries the effects out.

It joins the parts that each own a piece of the state: `shmplasma.lifecycle` (what becomes of objects),
`shmplasma.publishing` (how they come from leases), `shmplasma.gets` (who waits for them), `shmplasma.pins` (who
holds them); `shmplasma.dispatch` says which part answers what.  What is left here is the conversation with each
connection: its frames, its outbox, its end.

Invariants
----------
* Every request gets exactly one reply, unless its client is dropped.
* What is no request, or comes at the wrong point of the conversation, costs its sender the connection, and
  nobody else anything.

Order
-----
What clients tell the store one-way lies in their outboxes, which the store reads when a message says so, or
when it looks; that may come after another client has asked.  What a client itself has told is read before its
next request is.  So an answer that depends on something *not* being there (contains
false, a get that found too little, and whatever describes the store as a whole) is not given at once: the
request is left unsettled, and `ObjectStore.settle` reads all outboxes before it answers.  What was sealed before
a question was asked is always found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from shmplasma.answers import Answers
from shmplasma.commitment import FLOOR_BYTES
from shmplasma.control import Control
from shmplasma.creations import Creations, Creator
from shmplasma.denials import NoRoom, Refused
from shmplasma.dispatch import Dispatch, Unsettled
from shmplasma.effects import Drop, Effect
from shmplasma.errors import ProtocolError
from shmplasma.gets import PendingGet
from shmplasma.greeting import Greeter, Session
from shmplasma.jobs import Jobs
from shmplasma.layout import Layout
from shmplasma.leases import Leases
from shmplasma.ledger import Ledger
from shmplasma.lifecycle import Lifecycle
from shmplasma.moves import Moves
from shmplasma.outbox import Polling
from shmplasma.outgoing import NOTHING, Outgoing
from shmplasma.pins import Boards
from shmplasma.posts import Posts
from shmplasma.protocol import Frame
from shmplasma.publishing import Publishing
from shmplasma.references import TICKET_NS
from shmplasma.refusals import Refusals
from shmplasma.requests import (
    Hello,
    Post,
    Role,
    decode_request,
)
from shmplasma.room import Memory, Room
from shmplasma.spilling import Delete, ExternalLimits, Job, Spilling
from shmplasma.table import Table
from shmplasma.trims import Trims
from shmplasma.waiters import RoomQueue

__all__ = ["ObjectStore"]


class ObjectStore:
    """All of a store but its sockets, clock and memory.

    Parameters
    ----------
    layout : Layout
        The segment's layout.
    token : bytes
        The segment's identity.
    words, raw : memoryview
        The segment as native 8-byte words and as bytes, writable.
    segment_kind, segment_path : str
        How a client finds the segment; passed on as they are.
    memory : Memory
        Commits pages and issues barriers.
    client_limit_bytes : int, optional
        What a client may hold that has no limit of its own; 0 for no limit.
    ticket_ns : int, optional
        As for `shmplasma.references.References`.
    floor_bytes : int, optional
        How much memory that is not used stays committed.
    external : ExternalLimits, optional
        What an external store may take, if there is one.

    Notes
    -----
    Time is an argument, in nanoseconds since 1970.  Not thread-safe: one loop drives it.
    """

    def __init__(
        self,
        layout: Layout,
        token: bytes,
        words: memoryview,
        raw: memoryview,
        segment_kind: str,
        segment_path: str,
        memory: Memory,
        client_limit_bytes: int = 0,
        ticket_ns: int = TICKET_NS,
        floor_bytes: int = FLOOR_BYTES,
        external: ExternalLimits | None = None,
    ) -> None:
        self._layout = layout
        self._memory = memory
        self._words = words
        self._raw = raw
        self._outgoing = Outgoing()
        self._table = Table(layout, words, raw, memory.commit)
        self._control = Control(layout, words)
        self._boards = Boards(layout, words, raw, self._control, memory.commit)
        visited = raw[layout.visited : layout.visited + layout.n_entries]
        self._moves = Moves(words, raw, self._table)
        self._room = Room(
            layout, words, self._table, self._boards, visited, memory, self._moves, floor_bytes
        )
        leases = Leases(layout, words, self._control)
        self._objects = Lifecycle(
            layout,
            words,
            self._table,
            self._boards,
            self._room,
            leases,
            memory,
            self._gone,
        )
        if external is not None:
            self._objects.spilling = Spilling(
                self._table, self._boards, self._room, layout.capacity, external
            )
        self._publishing = Publishing(self._table, self._room, leases, self._objects, memory)
        self._ledger = Ledger(self._table, self._room, self._objects, ticket_ns)
        self._greeter = Greeter(
            layout,
            token,
            (segment_kind, segment_path),
            self._table,
            self._boards,
            self._outgoing,
            memory,
            client_limit_bytes,
        )
        self._answers = Answers(
            self._table,
            self._boards,
            self._room,
            self._objects,
            self._outgoing,
            self._greeter.sessions,
        )
        self._queue = queue = RoomQueue[Creator]()
        sessions = self._greeter.sessions
        self._refusals = Refusals(layout, self._boards, self._room, self._objects, sessions, queue)
        self._creations = Creations(
            self._table,
            self._boards,
            self._room,
            self._objects,
            self._publishing,
            self._refusals,
            self._outgoing,
            queue,
        )
        self._trims = Trims(self._room.commitment, self._outgoing)
        self._dispatch = Dispatch(
            layout,
            self._table,
            self._boards,
            self._room,
            self._objects,
            self._publishing,
            self._greeter,
            self._answers,
            self._creations,
            self._ledger,
            self._trims,
            self._outgoing,
            self._heed_all,
        )
        self._polling = Polling(words, memory.barrier, possible=memory.has_barrier)
        self._posts = Posts(
            layout,
            words,
            raw,
            self._control,
            self._publishing,
            self._outgoing,
            sessions,
            self._polling,
            self._dispatch.request,
        )
        self._jobs = Jobs(
            self._table, self._objects, self._answers, self._refusals, self._answer_later
        )
        self._latest = -1
        self._now_ns = 0

    def _heed_all(self, now_ns: int) -> int:
        return self._posts.heed_all(now_ns)

    def _gone(self, object_id: bytes) -> None:
        self._ledger.references.forget_object(object_id)
        self._outgoing.gone(object_id)
        if self._answers:
            self._answer_later(self._answers.gone(object_id))

    def _answer_later(self, gets: Iterable[PendingGet]) -> None:
        """Have gets that do not wait answered once all outboxes are read."""
        self._dispatch.unsettled += [
            (get.client, get.request_id, get.request, self._now_ns) for get in gets
        ]

    # -- connections ---------------------------------------------------------------------------

    def connect(
        self,
        client: int,
        pid: int,
        start_time: int,
        now_ns: int,
        *,
        command: str = "",
        trusted: bool = False,
    ) -> None:
        """Take note of a new connection.

        Parameters
        ----------
        client : int
            A number that was never used before, and no board's.
        pid, start_time : int
            The process at its other end; 0 where it cannot be seen.
        now_ns : int
            The time.
        command : str, optional
            That process's command line, for others who find the store full.
        trusted : bool, optional
            Whether it may have this store end in favour of another.
        """
        session = Session(client, pid, start_time, trusted=trusted, command=command)
        session.connected_ns, session.limit_bytes = now_ns, self._greeter.limit_bytes
        self._greeter.sessions[client] = session

    def disconnect(self, client: int, now_ns: int) -> Sequence[Effect]:
        """Forget a connection: what it has posted counts, its pins and its unsealed objects go."""
        self._now_ns = now_ns
        session = self._greeter.sessions[client]
        if session.role is Role.CLIENT and not session.detached:
            try:
                self._posts.heed(session, now_ns)
            except ProtocolError:
                session.detached = True  # it goes anyway
        del self._greeter.sessions[client]
        self._outgoing.subscribers.discard(client)
        self._boards.revoke(client)
        self._dispatch.forget(client, now_ns)
        self._publishing.end(client)
        self._note_who_came_back()
        return self.wake()

    def expel(self, client: int) -> bool:
        """Answer a client no more; what it was given stays its own until `disconnect`.

        Returns
        -------
        bool
            Whether it was given anything that it may still use.
        """
        session = self._greeter.sessions[client]
        session.detached = True
        self._outgoing.subscribers.discard(client)
        self._answers.forget(client)
        self._creations.withdraw(client)
        return session.role is Role.CLIENT

    def handle(self, client: int, frame: Frame, now_ns: int) -> Sequence[Effect]:
        """Carry out one request and return what is to be done."""
        session = self._greeter.sessions[client]
        self._latest, self._now_ns = client, now_ns
        try:
            request = decode_request(frame)
            if session.detached:
                # Another thread of the client may not have noticed yet that it has left.
                return NOTHING
            if type(request) is Hello:
                self._greeter.hello(session, frame.request_id, request)
                if session.claims is not None:
                    self._posts.heed(self._greeter.sessions[session.claims], now_ns)
                    self._ledger.references.come_back(session.claims)
            elif session.claims is not None:
                number = self._greeter.resume(session)
                effects = self.handle(number, frame, now_ns)
                self._note_who_came_back()
                return effects
            elif session.role is not Role.CLIENT:
                raise ProtocolError(f"{type(request).__name__} on a connection of no client")
            elif type(request) is Post:
                if self._posts.heed(session, now_ns) and not (self.polls or self._has_listeners):
                    self._polling.start()
            else:
                self._posts.heed(session, now_ns)
                self._dispatch.request(session, frame.request_id, request, now_ns)
        except Refused as refused:
            self._outgoing.reply(client, frame.request_id, refused.failed)
        except NoRoom as no_room:
            failed = self._refusals.answer(no_room, now_ns)
            self._outgoing.reply(client, frame.request_id, failed)
        except ProtocolError as error:
            self._outgoing.effects.append(Drop(client, str(error)))
        return self._outgoing.take()

    def take_unsettled(self) -> list[Unsettled]:
        """Return the requests that wait until all outboxes are read, for `settle`."""
        unsettled, self._dispatch.unsettled = self._dispatch.unsettled, []
        if unsettled:
            self._publishing.note_idle()
        return unsettled

    def settle(self, unsettled: Iterable[Unsettled]) -> Sequence[Effect]:
        """Read all outboxes, and answer requests whose answer had to wait for that.

        Some may have to wait once more: see `has_unsettled`.
        """
        self._ledger.references.begin_reading()
        self._posts.heed_all(self._now_ns)
        self._ledger.delete_nobodys()
        self._publishing.take_idle()
        for client, request_id, request, now_ns in unsettled:
            session = self._greeter.sessions.get(client)
            if session is None or session.detached:
                continue
            try:
                self._dispatch.settle(session, request_id, request, now_ns)
            except Refused as refused:
                self._outgoing.reply(client, request_id, refused.failed)
            except NoRoom as no_room:
                failed = self._refusals.answer(no_room, now_ns)
                self._outgoing.reply(client, request_id, failed)
        return self._outgoing.take()

    @property
    def subscribers(self) -> set[int]:
        """The clients that are told of each object that is sealed or goes."""
        return self._outgoing.subscribers

    @property
    def n_unsettled(self) -> int:
        """How many requests wait until all outboxes are read."""
        return len(self._dispatch.unsettled)

    @property
    def has_unsettled(self) -> bool:
        """Whether something waits until all outboxes are read."""
        return bool(self._dispatch.unsettled) or self._ledger.references.has_suspects

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is to be done but to handle messages: nobody waits, and nothing has its time."""
        creations = self._creations
        return not (
            self._dispatch.unsettled
            or creations.await_memory
            or creations.await_room
            or self._ledger.references.is_awake
            or self._trims
            or self._room.mover.is_busy
            or self._publishing.is_to_evict
            or self._objects.spilling is not None
            or (self._polling.is_on and self._has_listeners)
        )

    @property
    def polls(self) -> bool:
        """Whether clients count on the store to look into their outboxes soon: see `poll`."""
        return self._polling.is_on

    @property
    def is_to_stop_polling(self) -> bool:
        """Whether clients count on the store's looking while somebody waits for what they do."""
        return self._polling.is_on and self._has_listeners

    @property
    def _has_listeners(self) -> bool:
        """Whether somebody waits for what others do."""
        return bool(
            self._outgoing.subscribers
            or self._answers
            or self._creations.await_memory
            or self._creations.await_room
        )

    def poll(self, now_ns: int) -> Sequence[Effect]:
        """Read all outboxes unasked; have clients announce again when nothing comes of it any more."""
        self._posts.poll(now_ns)
        return self._outgoing.take()

    def glance(self, now_ns: int) -> Sequence[Effect]:
        """Read the outbox of the client that was handled last, which most likely goes on."""
        self._posts.heed_or_drop(self._greeter.sessions.get(self._latest), now_ns)
        return self._outgoing.take()

    def stop_polling(self, now_ns: int) -> Sequence[Effect]:
        """Have clients announce what they put into their outboxes, and read what they did not."""
        self._posts.stop_polling(now_ns)
        return self._outgoing.take()

    # -- the external store --------------------------------------------------------------------

    def take_jobs(self) -> tuple[Sequence[Job], Sequence[Effect]]:
        """Begin what is due with the external store, and return what is to be done: see `job_done`."""
        if self._objects.spilling is None:
            return (), NOTHING
        jobs = self._jobs.take(self._now_ns)
        return jobs, self._outgoing.take()

    def job_done(self, job: Job, places: Sequence[int], failure: str) -> Sequence[Effect]:
        """Take note of what came of a job.

        Parameters
        ----------
        job : Job
            One that `take_jobs` has returned.
        places : sequence of int
            Of a `Write`: where each object is in its container.
        failure : str
            Why it failed; empty if it did not.
        """
        if not isinstance(job, Delete):
            self._dispatch.unsettled += self._dispatch.evictions
            self._dispatch.evictions = []
        self._jobs.done(job, places, failure)
        return self._outgoing.take()

    def tidy_external(self, found: Mapping[int, int]) -> None:
        """Delete what the external store has and nobody names; these containers there are, of so many bytes."""
        self._jobs.tidy(found)

    # -- waiting for room ----------------------------------------------------------------------

    @property
    def has_waiters(self) -> bool:
        """Whether somebody waits for room: then `offer_room` has to be called in each turn."""
        return self._creations.await_room

    @property
    def deadline_ns(self) -> int | None:
        """When `offer_room` has to be called at the latest, by its steady clock; None for no such time."""
        return self._queue.deadline_ns

    def offer_room(self, steady_ns: int, now_ns: int) -> Sequence[Effect]:
        """Serve those that wait for room as far as there is any, and refuse those whose time is over.

        Parameters
        ----------
        steady_ns : int
            The time, on a clock that only goes forward.
        now_ns : int
            The time.
        """
        self._publishing.note_idle()
        self._posts.heed_all(now_ns)
        self._publishing.take_idle()
        self._creations.offer(steady_ns, now_ns)
        return self._outgoing.take()

    def wake(self) -> Sequence[Effect]:
        """Let go what waited for a release and is pinned no more."""
        self._objects.releases.wake()
        if self._objects.spilling is not None:
            self._objects.spilling.look_again()
        return self._outgoing.take()

    # -- references ----------------------------------------------------------------------------

    @property
    def next_due_ns(self) -> int | None:
        """When `expire` is to be called; None if not for the sake of time."""
        return self._ledger.references.next_due_ns

    def expire(self, now_ns: int) -> None:
        """Let references that were never received come to their end; `settle` has to follow."""
        self._now_ns = now_ns
        self._ledger.references.expire(now_ns)

    def _note_who_came_back(self) -> None:
        """See whether a client that the dead store had is still waited for."""
        if not any(session.awaited for session in self._greeter.sessions.values()):
            self._ledger.references.all_came_back(self._now_ns)

    # -- recovering ----------------------------------------------------------------------------

    def recover(
        self, is_alive: Callable[[int, int], bool], now_ns: int
    ) -> tuple[dict[int, int], str]:
        """Take over the segment of a store that has died, instead of an empty one.

        Parameters
        ----------
        is_alive : callable
            ``is_alive(pid, start_time)`` tells whether that process still lives.
        now_ns : int
            The time.

        Returns
        -------
        clients : dict
            The clients that may come back, and the pids of those that can be seen: `disconnect` one when
            it has ended.
        summary : str
            What was found, for the log.

        Raises
        ------
        CommitError
            Memory that was there before cannot be had any more.
        """
        self._now_ns = now_ns
        found = self._objects.recover()
        self._ledger.references.recover(found.referenced)
        for board, owner in found.owners.items():
            session = Session(board, owner.pid, owner.start_time, "recovered", Role.CLIENT)
            session.board, session.awaited = board, True
            session.connected_ns, session.limit_bytes = now_ns, self._greeter.limit_bytes
            self._greeter.sessions[board] = session
        n_posted = 0
        self._polling.succeed()
        for session in self._greeter.sessions.values():
            try:
                n_posted += self._posts.heed(session, now_ns, recovering=True)
            except ProtocolError:
                session.detached = True  # it is not waited for, and keeps what it holds
        for session in tuple(self._greeter.sessions.values()):
            if not is_alive(session.pid, session.start_time):
                self.disconnect(session.client, now_ns)
        self._note_who_came_back()
        pids = {session.client: session.pid for session in self._greeter.sessions.values()}
        summary = (
            f"{len(found.cached) + len(found.kept)} objects, {len(found.created)} unsealed, {n_posted} announced "
            f"since, {len(pids)} living clients; {found.dropped} unsealed, torn or damaged entries "
            "dropped"
        )
        return pids, summary

    # -- memory --------------------------------------------------------------------------------

    @property
    def may_miss_a_release(self) -> bool:
        """Whether something waits for a release which may not wake the store."""
        if not self._objects.releases.are_awaited:
            return False
        if self._publishing.are_recalled:  # a lease that comes to rest says nothing
            return True
        # Who has not come back since a recovery has the wake-up pipe of the store that died.
        return not self._memory.has_barrier or any(
            session.awaited for session in self._greeter.sessions.values()
        )

    @property
    def has_urgent_work(self) -> bool:
        """Whether a creator waits for memory to be committed, or a client for it to be given back, or objects are moved."""
        return (
            self._creations.await_memory
            or self._room.mover.is_busy
            or bool(self._trims)
            or self._publishing.is_to_evict
            or self._jobs.await_commit
        )

    def advance(self) -> Sequence[Effect]:
        """Do one step of the urgent work; answer who has waited for it.

        Room that this makes is whose who waits for it, if `offer_room` is called before another request is handled.
        """
        if self._creations.await_memory:
            self._creations.advance()
        elif self._jobs.await_commit:
            self._jobs.commit(self._now_ns)
        elif self._room.mover.is_busy:
            self._objects.note_evicted(self._room.advance())
            self._answers.look_again()
        elif self._publishing.is_to_evict:
            self._publishing.evict_ahead()
        else:
            self._trims.advance()
        return self._outgoing.take()

    @property
    def has_idle_work(self) -> bool:
        """Whether memory should be committed ahead of need."""
        return not self._room.commitment.is_ahead

    def commit_ahead(self) -> None:
        """Commit one step of memory ahead of need.

        Raises
        ------
        CommitError
            There is no memory.
        """
        self._room.commitment.step_ahead()

    def commit_all(self) -> Iterator[int]:
        """Commit the whole data region by steps; yield how many bytes that are so far.

        Raises
        ------
        CommitError
            There is no memory.
        """
        return self._room.commitment.commit_all()

    def trim_ns(self, now_ns: int) -> int | None:
        """Return when an idle store has to `trim`, in nanoseconds from now; None if not before it is used.

        Any clock will do that does not go back.
        """
        return self._trims.idle_ns(now_ns)

    def trim(self, now_ns: int) -> None:
        """Give back one step of memory that was not used for a while, if it is time to look for some."""
        self._trims.advance_idle(now_ns)

    # -- describing ----------------------------------------------------------------------------

    def describe(self) -> str:
        """Return the store's figures, one a line."""
        return self._dispatch.describe()

    def check(self) -> None:
        """Prove the invariants of all parts."""
        self._objects.check()
        self._answers.check()
        self._creations.check()
        self._ledger.references.check()
