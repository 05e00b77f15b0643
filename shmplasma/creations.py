"""Creations: objects whose writers are told where they lie once there is room, and memory behind it.  Pure.

A creation that finds no room waits for it (`shmplasma.waiters`): if it may, until others let go of some; else *briefly*: only as long as
the store makes some by itself, by evicting many objects, moving them, or writing them to the external store, or until leases are back that
were recalled.  For one that waits briefly objects are moved only so often in vain (`shmplasma.attempts`).  One that has room may still
wait for memory.  All of this goes in steps between requests, so that nobody waits for another one's gigabytes.

An object that waits for memory is its creator's: it goes with its wait alone.  Who leaves, or is answered no more, waits for nothing
(`Creations.forget`, `Creations.abandon`) before anything of his goes.

While anybody waits for room

* whoever lets go of a pin wakes the store (`shmplasma.releases` has the WAKE word);
* leases are recalled, and none is granted;
* the loop calls `Creations.offer` in each turn: any message may have made room, and it costs little to look;
* while objects are moved it is offered only what is there already: the rest is in use twice, and comes together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shmplasma.denials import Claimed, MakesRoom, NoRoom, Refused, existing
from shmplasma.errors import CommitError, ProtocolError
from shmplasma.greeting import Session
from shmplasma.lifecycle import Lifecycle
from shmplasma.objects import is_fresh
from shmplasma.outgoing import Outgoing
from shmplasma.pins import Boards
from shmplasma.protocol import ONE_WAY
from shmplasma.publishing import Publishing
from shmplasma.refusals import Refusals
from shmplasma.replies import Created, Failed, Failure
from shmplasma.requests import Create
from shmplasma.room import Room
from shmplasma.table import Table
from shmplasma.waiters import FOR_EVER, MAX_PASSES, Offer, RoomQueue, Waiter

__all__ = ["Creations", "Creator"]


@dataclass(slots=True, eq=False)
class Creator(Waiter):
    """A creation that waits for room."""

    session: Session = field(kw_only=True)
    request: Create = field(kw_only=True)
    is_brief: bool = field(default=False, kw_only=True)
    """Whether it waits for room only as long as the store makes some by itself."""
    text: str = field(default="", kw_only=True)
    """Why there was no room when it was last tried, if that is another reason than that the store is full."""
    failures: int = field(default=0, kw_only=True)
    """How often a write to the external store had failed when it joined."""
    met_pins: int = field(default=0, kw_only=True)
    """How many compactions had been in vain because of pins when it joined."""


class Creations:
    """All creations, and those that wait for room or for memory.

    Parameters
    ----------
    table, boards, room, objects, publishing, refusals, outgoing
        The parts of the store that it joins.
    queue : RoomQueue
        Those that wait for room.
    """

    def __init__(
        self,
        table: Table,
        boards: Boards,
        room: Room,
        objects: Lifecycle,
        publishing: Publishing,
        refusals: Refusals,
        outgoing: Outgoing,
        queue: RoomQueue[Creator],
    ) -> None:
        self._table = table
        self._boards = boards
        self._room = room
        self._objects = objects
        self._publishing = publishing
        self._refusals = refusals
        self._outgoing = outgoing
        self._queue = queue
        self._waiting: dict[int, tuple[int, int, int]] = {}
        self._evicts = self._awaits_leases = False

    @property
    def await_memory(self) -> bool:
        """Whether a creator waits for memory."""
        return bool(self._waiting)

    @property
    def await_room(self) -> bool:
        """Whether a creator waits for room."""
        return len(self._queue) > 0

    @property
    def makes_room(self) -> bool:
        """Whether objects go for one of these by and by, or leases come back, so that `offer` is due in each turn."""
        return (self._evicts or self._awaits_leases) and self.await_room

    @property
    def n_waiting(self) -> int:
        """How many creators wait for room."""
        return len(self._queue)

    def __contains__(self, entry: int) -> bool:
        """Tell whether the creator of this entry waits for memory."""
        return entry in self._waiting

    def create(
        self,
        session: Session,
        request_id: int,
        request: Create,
        now_ns: int,
        *,
        all_read: bool = False,
    ) -> bool:
        """Make an object and tell its writer where, at once or when there is room and memory.

        Parameters
        ----------
        session, request_id, request, now_ns
            Who asks for what, and when.
        all_read : bool, optional
            Whether all outboxes were just read.

        Returns
        -------
        bool
            False when its id may be somebody's of whom that was not read yet, or there is no room, but leases may come back:
            ask again when outboxes are read, and leases have come back.

        Raises
        ------
        ProtocolError
            The sizes are impossible, or the request id is not its to use.
        Refused, NoRoom
            It is not granted.
        """
        client, queue = session.client, self._queue
        may_wait = request.timeout_ns != 0
        if request.data_size < 0 or request.metadata_size < 0:
            raise ProtocolError(f"an object of {request.data_size}+{request.metadata_size} bytes")
        if request.slot in session.lent:
            raise ProtocolError("a create names a slot that another request waits with")
        if request_id == ONE_WAY or (client, request_id) in queue:
            raise ProtocolError(f"a create under the request id {request_id}")
        if is_fresh(request.object_id) and not all_read:
            return False
        if (
            self.await_room
            and (may_wait or not queue.may_be_passed)
            and not self._objects.exists(request.object_id)
        ):
            self._objects.refuse_what_cannot_come(client, request.size_bytes, session.limit_bytes)
            self._join(session, request_id, request)
            return True
        try:
            entry = self._create(session, request, now_ns, all_read=all_read)
        except Claimed:
            return False
        except MakesRoom:
            self._join(session, request_id, request)
            self._evicts = True
            return True
        except NoRoom as no_room:
            if self._objects.spilling is not None:
                self._objects.spilling.look_again()  # pins may have gone of which nobody was to tell
            # Leases are never the reason: they come back first, as what is leased cannot be moved either.
            if not no_room.may_come:
                raise
            if not may_wait and self._publishing.recall():
                return False
            if not may_wait and not self._makes_room(request, self._failures):
                raise
            self._join(session, request_id, request, no_room.text)
            return True
        queue.note_pass()
        self._grant(client, request_id, entry, now_ns)
        return True

    def _create(
        self, session: Session, request: Create, now_ns: int, *, all_read: bool = True
    ) -> int:
        """Make an object and return its entry, whoever has the lock of its id for nothing (see `shmplasma.claims`).

        Raises
        ------
        Claimed
            He may have it for something: try again when all outboxes are read.
        MakesRoom
            It will be: try again in the next turn.
        Refused, NoRoom
            It is not granted.
        """
        client, limit = session.client, session.limit_bytes
        try:
            return self._objects.create(client, request, limit, now_ns)
        except Claimed:
            if not all_read or self._publishing.recall():
                raise
            if self._publishing.leases.are_recalled:  # its client was stopped
                raise existing(request.object_id) from None
        return self._objects.create(client, request, limit, now_ns, for_nothing=True)

    def _grant(self, client: int, request_id: int, entry: int, now_ns: int) -> None:
        """Tell a writer where its object lies, if there is memory."""
        offset, data_size, metadata_size = self._table.location(entry)
        size = data_size + metadata_size
        if size and not self._room.commitment.is_ready(offset, size):
            self._waiting[entry] = (client, request_id, now_ns)
        else:
            self._outgoing.reply(client, request_id, Created(offset))

    # -- waiting for room ----------------------------------------------------------------------

    @property
    def _failures(self) -> int:
        spilling = self._objects.spilling
        return 0 if spilling is None else spilling.failures

    def _makes_room(self, request: Create, failures: int) -> bool:
        """Have objects written to the external store, or moved; tell whether some room may come of it.

        Nothing more is written for whom a write has failed since there were so many failures.
        """
        spilling, size = self._objects.spilling, request.size_bytes
        # What is written has to be some day, and moves nothing; objects are moved where that does not help.
        if spilling is not None and failures == self._failures and spilling.demand(size):
            return True
        return self._room.compact(size)

    def _join(self, session: Session, request_id: int, request: Create, text: str = "") -> None:
        is_brief = request.timeout_ns == 0
        self._publishing.recall()
        creator = Creator(
            session.client,
            request_id,
            FOR_EVER if is_brief else request.timeout_ns,
            session=session,
            request=request,
            text=text,
            is_brief=is_brief,
            failures=self._failures,
            met_pins=self._room.attempts.met_pins,
        )
        self._queue.join(creator)
        session.lent.add(request.slot)
        self._objects.releases.await_room(wanted=True)

    def _left(self, creator: Creator) -> None:
        """Take note that a creator has left the queue, or is about to."""
        creator.session.lent.discard(creator.request.slot)

    def offer(self, steady_ns: int, now_ns: int) -> None:
        """Serve those that wait for room as far as there is any, and refuse those whose time is over.

        Parameters
        ----------
        steady_ns : int
            The time, on a clock that only goes forward; deadlines are counted by it.
        now_ns : int
            The time, in nanoseconds since 1970.
        """
        attainable: int | None = None
        self._evicts = self._awaits_leases = False
        for each in self._queue:  # not all may be reached
            each.is_served = False

        def was_tried(creator: Creator) -> bool:
            return creator.is_brief and self._room.attempts.are_enough(creator.met_pins)

        def wait(creator: Creator) -> Offer:
            if creator.is_brief and self._publishing.recall():
                self._awaits_leases = True
                return Offer.NOT_ENOUGH
            comes = not was_tried(creator) and self._makes_room(creator.request, creator.failures)
            if comes or not creator.is_brief:
                return Offer.NOT_ENOUGH
            self._refuse(creator, now_ns)
            return Offer.REFUSED

        def serve(creator: Creator) -> Offer:
            nonlocal attainable
            request, size = creator.request, creator.request.size_bytes
            if not self._objects.exists(request.object_id):
                if attainable is None:
                    attainable = self._room.attainable_bytes
                if size > attainable:
                    creator.text = ""
                    return wait(creator)
                is_under_way = self._room.mover.is_busy or self._evicts
                if is_under_way and size > self._room.largest_bytes:
                    return wait(creator) if was_tried(creator) else Offer.NOT_ENOUGH
            try:
                entry = self._create(creator.session, request, now_ns)
            except Claimed:
                return Offer.NOT_ENOUGH
            except MakesRoom:
                creator.is_served = self._evicts = True
                return Offer.NOT_ENOUGH
            except NoRoom as no_room:
                if no_room.may_come:
                    creator.text = no_room.text
                    return wait(creator)
                failed = self._refusals.answer(no_room, now_ns)
            except Refused as refused:
                failed = refused.failed
            else:
                self._left(creator)
                self._grant(creator.client, creator.request_id, entry, now_ns)
                attainable = None
                return Offer.TAKEN
            self._left(creator)
            self._outgoing.reply(creator.client, creator.request_id, failed)
            return Offer.REFUSED

        self._queue.offer(serve)
        for creator in (*self._held_up(), *self._queue.expire(steady_ns)):
            self._refuse(creator, now_ns)
        self._note_who_left()

    def _held_up(self) -> list[Creator]:
        """Take out those who wait briefly behind one whose wait has no such end, and that may not be passed any more.

        Nobody as long as objects are written to the external store, or read: that may make room for all.
        """
        held_up: list[Creator] = []
        spilling = self._objects.spilling
        if spilling is not None and spilling.is_under_way:
            return held_up
        is_held_up = False
        for creator in self._queue:
            if creator.is_brief and is_held_up:
                held_up.append(creator)
            is_held_up |= creator.passed >= MAX_PASSES and not creator.is_brief
        for creator in held_up:
            self._queue.remove(creator.client, creator.request_id)
        return held_up

    def _note_who_left(self) -> None:
        """Take note that the queue may be empty now: then nothing is moved for anybody in it."""
        self._objects.releases.await_room(wanted=self.await_room)
        if not self.await_room:
            self._room.mover.cancel()

    def answer_now(self, client: int, request_id: int, now_ns: int) -> None:
        """Refuse a creation that waits for room, as it is not to wait any more."""
        creator = self._queue.remove(client, request_id)
        if creator is not None:
            self._refuse(creator, now_ns)
            self._note_who_left()

    def _refuse(self, creator: Creator, now_ns: int) -> None:
        self._left(creator)
        no_room = NoRoom(creator.request.size_bytes, creator.text)
        failed = self._refusals.answer(no_room, now_ns)
        self._outgoing.reply(creator.client, creator.request_id, failed)

    def _withdraw(self, client: int) -> list[Creator]:
        """Take out of the queue whatever a client waits for room with, and return it."""
        withdrawn = self._queue.forget(client)
        for creator in withdrawn:
            self._left(creator)
            self._note_who_left()
        return withdrawn

    def abandon(self, client: int) -> None:
        """End all that a client waits for, because it is answered no more: of what waits for memory it will never be told."""
        self._withdraw(client)
        for entry, (creator, _, _) in list(self._waiting.items()):
            if creator == client:
                self._take_away(client, entry)

    # -- waiting for memory --------------------------------------------------------------------

    def _take_away(self, client: int, entry: int) -> None:
        """Remove an object of whose place its creator was not told."""
        del self._waiting[entry]
        self._boards.unpin_all(client, entry)
        self._objects.abort(client, self._table.object_id(entry))

    def take_back(self, client: int, entry: int) -> None:
        """Answer a creation that waits for memory, if this is one, because it is not wanted any more."""
        creator, request_id, _ = self._waiting.get(entry, (None, ONE_WAY, 0))
        if creator == client:
            del self._waiting[entry]
            self._boards.unpin_all(client, entry)
            failed = Failed(Failure.NOT_FOUND, "the object was aborted before it had its memory")
            self._outgoing.reply(client, request_id, failed)

    def forget(self, client: int) -> None:
        """End all that a client waits for, because it leaves."""
        for waiting in self._withdraw(client):
            failed = Failed(Failure.NOT_FOUND, "its client has left before there was room")
            self._outgoing.reply(client, waiting.request_id, failed)
        for entry, (creator, _, _) in list(self._waiting.items()):
            if creator == client:
                self.take_back(client, entry)

    def advance(self) -> None:
        """Commit one step of memory for the first creator; answer it when that is all."""
        entry, (client, request_id, now_ns) = next(iter(self._waiting.items()))
        offset, data_size, metadata_size = self._table.location(entry)
        try:
            if self._room.commitment.step(offset, data_size + metadata_size):
                del self._waiting[entry]
                self._outgoing.reply(client, request_id, Created(offset))
        except CommitError as error:
            self._take_away(client, entry)
            no_room = NoRoom(data_size + metadata_size, str(error))
            self._outgoing.reply(client, request_id, self._refusals.answer(no_room, now_ns))

    def check(self) -> None:
        """Prove that the queue is in order, and that who waits for memory still has an object to wait with."""
        self._queue.check()
        creators = self._objects.unsealed.creators
        for entry, (client, _, _) in self._waiting.items():
            assert creators.get(entry) == client, f"entry {entry} is nobody's"
