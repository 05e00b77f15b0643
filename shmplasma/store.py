"""The store's state machine: requests in, effects out.  Pure; `shmplasma.switchboard` carries the effects out.

The parts that `shmplasma.parts` joins each own a piece of the state: `shmplasma.lifecycle` (what becomes of objects),
`shmplasma.publishing` (how they come from leases), `shmplasma.gets` (who waits for them), `shmplasma.pins` (who
holds them); `shmplasma.dispatch` says which part answers what, and `shmplasma.upkeep` what is to be done between requests.
What is left here is the conversation with each connection: its frames, its outbox, its end.

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
a question was asked is always found.  Clients ask where they cannot see by themselves that all outboxes are read
(`shmplasma.absence`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from shmplasma.denials import NoRoom, Refused
from shmplasma.dispatch import Dispatch
from shmplasma.effects import Await, Drop, Effect
from shmplasma.errors import ProtocolError
from shmplasma.greeting import Session
from shmplasma.jobs import Jobs
from shmplasma.outgoing import NOTHING
from shmplasma.parts import Parts, Unsettled
from shmplasma.posts import Posts
from shmplasma.protocol import Frame
from shmplasma.requests import Hello, Post, Role, decode_request
from shmplasma.transfers import Delete, Job
from shmplasma.upkeep import Upkeep

__all__ = ["ObjectStore"]


class ObjectStore:
    """All of a store but its sockets, clock and memory.

    Parameters
    ----------
    parts : Parts
        What it is made of.

    Attributes
    ----------
    upkeep : Upkeep
        What there is to do between requests because somebody waits.
    commitment, trims
        What there is to do while nobody does: how memory is committed ahead of need, and given back.
    ledger : Ledger
        The references to objects.
    deleting : set of int
        The entries for which `settled` is due.
    subscribers : set of int
        The clients that are told of each object that is sealed or goes.

    Notes
    -----
    Time is an argument, in nanoseconds since 1970.  Not thread-safe: one loop drives it.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._outgoing = parts.outgoing
        self._room = parts.room
        self._objects = parts.objects
        self._publishing = parts.publishing
        self._boards = parts.boards
        self._greeter = parts.greeter
        self._answers = parts.answers
        self._creations = parts.creations
        self._refusals = parts.refusals
        self._unsettled = parts.unsettled
        self._polling = parts.polling
        self._queue = parts.queue
        self._memory = parts.memory
        self._deletions = parts.deletions
        self._dispatch = Dispatch(parts, self._heed_all)
        self._posts = Posts(parts, self._dispatch)
        self._jobs = Jobs(parts)
        self.upkeep = Upkeep(parts, self._jobs)
        self.commitment = parts.room.commitment
        self.trims = parts.trims
        self.ledger = parts.ledger
        self.deleting = parts.deletions.begun
        self.subscribers = parts.outgoing.subscribers
        self._latest = -1
        self._now_ns = 0

    def _heed_all(self, now_ns: int) -> int:
        return self._posts.heed_all(now_ns)

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
        self._deletions.end()
        self._now_ns = now_ns
        session = self._greeter.sessions[client]
        session.left = True
        if session.role is Role.CLIENT:
            self._posts.heed_out(session, now_ns)
        del self._greeter.sessions[client]
        self._outgoing.unsubscribe(client)
        self._boards.clear(client)
        self._dispatch.forget(client, now_ns)
        self.ledger.end(client, session.pid, session.start_time)
        self._publishing.end(client)
        self._objects.unsealed.end(client)
        return self.wake()

    def only_claims(self, client: int) -> bool:
        """Tell whether a connection has claimed an awaited client, and not gone on as it."""
        return self._greeter.sessions[client].claims is not None

    def knows(self, client: int) -> bool:
        """Tell whether a client was not forgotten."""
        return client in self._greeter.sessions

    def expel(self, client: int) -> bool:
        """Answer a client no more; what it was given stays its own until `disconnect`.

        Returns
        -------
        bool
            Whether it was given anything that it may still use.
        """
        self._deletions.end()
        session = self._greeter.sessions[client]
        session.detached = True
        self._outgoing.unsubscribe(client)
        self._answers.forget(client)
        self._creations.abandon(client)
        return session.role is Role.CLIENT

    def handle(self, client: int, frame: Frame, now_ns: int) -> Sequence[Effect]:
        """Carry out one request and return what is to be done; then `settled` is to follow, before anything but the next request or a glance."""
        session = self._greeter.sessions[client]
        self._latest, self._now_ns = client, now_ns
        try:
            request = decode_request(frame)
            if session.detached:
                # Another thread of the client may not have noticed yet that it has left.
                return NOTHING
            if type(request) is Hello:
                self._deletions.end()
                if request.role is Role.SUBSCRIBER:
                    self._posts.heed_all(now_ns)  # it is told of nothing that is deleted
                self._greeter.hello(session, frame.request_id, request)
                if session.claims is not None:
                    self._heed_claimed(self._greeter.sessions[session.claims], now_ns)
                    self.ledger.references.come_back(session.claims)
            elif session.claims is not None:
                return self.handle(self._greeter.resume(session), frame, now_ns)
            elif session.role is not Role.CLIENT:
                raise ProtocolError(f"{type(request).__name__} on a connection of no client")
            elif type(request) is Post:
                if self._posts.begin(session, now_ns) and not (self.polls or self._has_listeners):
                    self._polling.start()
            else:
                self._posts.begin(session, now_ns)
                if self.deleting and not self._dispatch.goes_first(session, request):
                    self._deletions.end()
                self._dispatch.request(session, frame.request_id, request, now_ns)
        except (Refused, NoRoom, ProtocolError) as error:
            self._turn_down(client, frame.request_id, error, now_ns)
        return self._outgoing.take()

    def _turn_down(
        self, client: int, request_id: int, error: Refused | NoRoom | ProtocolError, now_ns: int
    ) -> None:
        """Answer a request that is not granted, or drop who may not make it."""
        match error:
            case Refused(failed=failed):
                self._outgoing.reply(client, request_id, failed)
            case NoRoom():
                self._outgoing.reply(client, request_id, self._refusals.answer(error, now_ns))
            case ProtocolError():
                self._outgoing.effects.append(Drop(client, str(error)))

    def _heed_claimed(self, awaited: Session, now_ns: int) -> None:
        """Read what a client has posted that comes back; for what it may not post it does not, however often it tries."""
        try:
            self._posts.heed(awaited, now_ns)
        except ProtocolError:
            awaited.detached = True
            raise

    def take_unsettled(self) -> list[Unsettled]:
        """Return the requests that wait until all outboxes are read, for `settle`."""
        unsettled = self._unsettled.copy()
        self._unsettled.clear()
        if unsettled or self._publishing.are_awaited:
            self._publishing.leases.note_idle()
        return unsettled

    def settle(self, unsettled: Sequence[Unsettled]) -> Sequence[Effect]:
        """Read all outboxes, and answer requests whose answer had to wait for that.

        Some may have to wait once more: see `has_unsettled`.  `settled` is to follow, before anything else.
        """
        self.ledger.references.begin_reading()
        self._posts.heed_all(self._now_ns)
        if self.ledger.delete_nobodys(self._room.most_at_once, asked=bool(unsettled)):
            self._unsettled[:0] = unsettled
            return self._outgoing.take()
        self._publishing.take_idle()
        for client, request_id, request, now_ns in unsettled:
            session = self._greeter.sessions.get(client)
            if session is None or session.detached:
                continue
            self._deletions.end()
            try:
                self._dispatch.settle(session, request_id, request, now_ns)
            except (Refused, NoRoom, ProtocolError) as error:
                # The last may be of what its client has asked for meanwhile.
                self._turn_down(client, request_id, error, now_ns)
        return self._outgoing.take()

    def settled(self) -> Sequence[Effect]:
        """Do what those who asked need not wait for, when all that was returned before is done."""
        self._deletions.end()
        return self._outgoing.take()

    @property
    def n_long(self) -> int:
        """Goes up with each request of which a client has only one in a turn: one that is unsettled, or tells of many references."""
        return len(self._unsettled) + self._dispatch.n_holds

    @property
    def has_unsettled(self) -> bool:
        """Whether something waits until all outboxes are read, or goes on in the next turn."""
        return (
            bool(self._unsettled)
            or self.ledger.references.has_suspects
            or self._creations.makes_room
            or self._publishing.are_awaited
        )

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is to be done but to handle messages: nobody waits, and nothing has its time."""
        creations = self._creations
        return not (
            self._unsettled
            or creations.await_memory
            or creations.await_room
            or self.ledger.references.is_awake
            or self.trims
            or self._room.mover.is_busy
            or self._publishing.is_to_evict
            or self._objects.unsealed.are_left
            or self._objects.spilling is not None
            or self._outgoing.is_listing
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
            self.subscribers
            or self._answers
            or self._creations.await_memory
            or self._creations.await_room
        )

    def poll(self, now_ns: int) -> Sequence[Effect]:
        """Read all outboxes unasked; have clients announce again when nothing comes of it any more."""
        self._posts.poll(now_ns)
        return self._outgoing.take()

    def glance(self, now_ns: int) -> tuple[int, Sequence[Effect]]:
        """Read outboxes, at least that of the client that was handled last; return how much was in them as well.

        `settled` is to follow before anything else is done, but for another glance, or a request.
        """
        return self._posts.glance(self._latest, now_ns), self._outgoing.take()

    def stop_polling(self, now_ns: int) -> Sequence[Effect]:
        """Have clients announce what they put into their outboxes, and read what they did not."""
        self._posts.stop_polling(now_ns)
        return self._outgoing.take()

    # -- the external store --------------------------------------------------------------------

    def take_jobs(self) -> tuple[Sequence[Job], Sequence[Effect]]:
        """Begin what is due with the external store, and return what is to be done: see `job_done`."""
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
            self._unsettled += self._dispatch.evictions
            self._dispatch.evictions = []
        self._jobs.done(job, places, failure)
        return self._outgoing.take()

    @property
    def is_to_take_jobs(self) -> bool:
        """Whether `take_jobs` has ended so that others have their turn, and goes on when it is called again."""
        return self._room.residents.pauses > 0

    def tidy_external(self, found: Mapping[int, int]) -> int:
        """Delete what the external store has and nobody names; these containers there are, of so many bytes.

        Returns
        -------
        int
            How many objects were there alone, and are not any more, or not whole.
        """
        spilling = self._objects.spilling
        return 0 if spilling is None else spilling.tidy(found)

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
        self._publishing.leases.note_idle()
        self._posts.heed_all(now_ns)
        self._publishing.take_idle()
        self._creations.offer(steady_ns, now_ns)
        return self._outgoing.take()

    def wake(self) -> Sequence[Effect]:
        """Let go what waited for a release and is pinned no more; clients have to wake the store anew."""
        self._objects.releases.woken()
        self._objects.releases.wake()
        if self._objects.spilling is not None:
            self._objects.spilling.look_again()
        return self._outgoing.take()

    @property
    def may_miss_a_release(self) -> bool:
        """Whether something waits for a release which may not wake the store."""
        if not self._objects.releases.are_awaited:
            return False
        if self._publishing.leases.are_recalled:  # a lease that comes to rest says nothing
            return True
        # Who has not come back since a recovery has the wake-up pipe of the store that died.
        return not self._memory.has_barrier or self._greeter.expects_somebody

    # -- references ----------------------------------------------------------------------------

    def expire(self, now_ns: int) -> None:
        """Let references that were never received come to their end, so many at a time; `settle` has to follow."""
        self._now_ns = now_ns
        self.ledger.expire()

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
        self._parts.wanted.clear()
        found = self._objects.recover()
        self._greeter.expect(found.owners, now_ns)
        holders = self._posts.acknowledge_published(set(found.referenced))
        holders.update(board for board, owner in found.owners.items() if owner.holds)
        self._objects.releases.settle()
        self.ledger.recover(found.referenced, holders)
        n_posted, dropped = 0, ""
        self._polling.succeed()
        # The locks of those that have ended are gone, and what others have claimed since is theirs (`shmplasma.claims`).
        sessions = self._greeter.sessions.values()
        for session in sorted(sessions, key=lambda each: not is_alive(each.pid, each.start_time)):
            try:
                n_posted += self._posts.heed(session, now_ns)
            except ProtocolError as error:
                # It does not come back, and keeps what it holds until it ends.
                session.detached = True
                dropped += f"; dropped client {session.client} (pid {session.pid}): {error}"
        effects: list[Effect] = []
        for session in tuple(self._greeter.sessions.values()):
            if session.left or not is_alive(session.pid, session.start_time):
                effects += self.disconnect(session.client, now_ns)
        self._outgoing.effects += [each for each in effects if isinstance(each, Await)]
        pids = {session.client: session.pid for session in self._greeter.sessions.values()}
        summary = (
            f"{len(found.cached) + len(found.kept)} objects, {len(found.created)} unsealed, {n_posted} announced "
            f"since, {len(pids)} living clients; {found.dropped} unsealed, torn or damaged entries "
            f"dropped{dropped}"
        )
        return pids, summary

    # -- describing ----------------------------------------------------------------------------

    def describe(self) -> str:
        """Return the store's figures, one a line."""
        return self._dispatch.describe()

    def check(self) -> None:
        """Prove the invariants of all parts."""
        self._parts.check()
