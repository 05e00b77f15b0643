"""Dispatch: which part of the store answers which request.  Pure.

A request is answered at once, or by the part that it was given to, or it is left *unsettled*: its answer depends
on something not being there, and `shmplasma.store` comes back with it when all outboxes have been read.  So is the rest of one that takes
many objects: between two requests only so many go (`Room.most_at_once`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final, assert_never

from shmplasma.effects import Descriptor
from shmplasma.errors import ProtocolError
from shmplasma.greeting import Session
from shmplasma.layout import REFERENCED, alignment_of
from shmplasma.parts import Parts, Unsettled
from shmplasma.posted import Abort, Claim, Detach, Lend, Publish, Redeem, Release, Remove, Seal
from shmplasma.protocol import ONE_WAY
from shmplasma.replies import Done, Leased, Listing, Number, Text
from shmplasma.reports import describe, list_objects, printable
from shmplasma.requests import (
    AnswerNow,
    AskLease,
    Attach,
    Bequeath,
    Contains,
    Create,
    Debug,
    Delete,
    Evict,
    Flush,
    Get,
    Grow,
    Hello,
    Hold,
    Keep,
    List,
    Post,
    Request,
    Role,
    SetOptions,
    Trim,
)
from shmplasma.table import NO_ENTRY

__all__ = ["Dispatch"]

_DONE: Final = Done()


class Dispatch:
    """Requests of clients that have introduced themselves.

    Parameters
    ----------
    parts : Parts
        The parts of the store, which it joins.
    heed_all : callable
        ``heed_all(now_ns)`` reads all outboxes.

    Attributes
    ----------
    evictions : list of Unsettled
        Requests that wait until objects are written to the external store.
    n_holds : int
        How many clients have told of references, ever.
    """

    def __init__(self, parts: Parts, heed_all: Callable[[int], object]) -> None:
        self._layout = parts.layout
        self._table = parts.table
        self._boards = parts.boards
        self._room = parts.room
        self._objects = parts.objects
        self._deletions = parts.deletions
        self._publishing = parts.publishing
        self._greeter = parts.greeter
        self._sessions = parts.greeter.sessions
        self._answers = parts.answers
        self._creations = parts.creations
        self._ledger = parts.ledger
        self._trims = parts.trims
        self._outgoing = parts.outgoing
        self._unsettled = parts.unsettled
        self._heed_all = heed_all
        self.evictions: list[Unsettled] = []
        self.n_holds = 0
        self._failures: dict[tuple[int, int], int] = {}
        self._freed: dict[tuple[int, int], int] = {}

    def request(  # noqa: PLR0912, PLR0915 - a branch for each kind of request, most of them one line
        self, session: Session, request_id: int, request: Request, now_ns: int
    ) -> None:
        """Answer a request, or leave it unsettled.

        Raises
        ------
        ProtocolError
            It may not come here.
        Refused, NoRoom
            It is not granted.
        """
        client = session.client
        match request:
            case Publish():
                self.publish(session, request, now_ns)
                self._outgoing.reply(client, request_id, _DONE)
            case Claim():
                if not self._boards.owns(client, request.slot):
                    raise ProtocolError(f"slot {request.slot} is not its own")
                self._publishing.claim(client, request, now_ns)
                # Nobody is going to seal it; it goes when its record is acknowledged.
                if session.detached:
                    self._objects.unsealed.leave(client, at_once=False)
                self._outgoing.reply(client, request_id, _DONE)
            case Create():
                if not self._boards.may_lend_one(client, request.slot):
                    raise ProtocolError(f"slot {request.slot} is not its to lend")
                # What is deleted goes before anything is evicted, as does what nobody owns.
                is_short = self._lacks_room(request)
                if is_short:
                    self._heed_all(now_ns)
                if (
                    is_short and self._ledger.references.has_suspects
                ) or not self._creations.create(session, request_id, request, now_ns):
                    self._unsettled.append((client, request_id, request, now_ns))
            case Seal():
                if (
                    self._creations.await_memory
                    and self._table.find(request.object_id) in self._creations
                ):
                    raise ProtocolError("it seals what it was not told the place of")
                entry = self._objects.seal(client, request.object_id, now_ns)
                self._ledger.sealed(client, entry)
                self._answers.announce(entry)
                self._outgoing.reply(client, request_id, _DONE)
            case Remove() if request_id == ONE_WAY:
                self._deletions.begin_one(request)
            case Lend() | Redeem() | Release():
                self._ledger.handle(client, request)
                self._outgoing.reply(client, request_id, _DONE)
            case Hold() | Bequeath():
                self.n_holds += 1
                self._heed_all(now_ns)
                self._ledger.handle(client, request)
                self._outgoing.reply(client, request_id, _DONE)
            case Get():
                if not self._answers.get(client, request_id, request):
                    self._unsettled.append((client, request_id, request, now_ns))
            case AskLease():
                # What a client with a limit stores is counted object by object; and who waits for room is first.
                awaited = self._creations.await_room or self._publishing.are_awaited
                if session.limit_bytes or awaited:
                    self._publishing.end(client)
                    lease = Leased(0, 0, 0, 0)
                else:
                    if not self.goes_first(session, request):
                        self._heed_all(now_ns)  # as above
                    lease = self._publishing.lease(client, session.board, request)
                self._outgoing.reply(client, request_id, lease)
            case Flush():
                self._outgoing.reply(client, request_id, _DONE)
            case Contains() if self._objects.contains(request.object_id):
                self._outgoing.reply(client, request_id, Number(1))
            case AnswerNow() if request_id != ONE_WAY:
                raise ProtocolError("an AnswerNow that asks for an answer of its own")
            case (
                Contains() | Delete() | Remove() | Evict() | List() | AnswerNow() | Debug() | Keep()
            ):
                self._unsettled.append((client, request_id, request, now_ns))
            case Abort():
                self._creations.take_back(client, self._table.find(request.object_id))
                self._objects.abort(client, request.object_id)
                self._outgoing.reply(client, request_id, _DONE)
            case SetOptions():
                session.name = request.name
                session.limit_bytes = request.limit_bytes or self._greeter.limit_bytes
                self._publishing.recall()
                self._outgoing.reply(client, request_id, _DONE)
            case Trim():
                self._heed_all(now_ns)  # what was deleted or released meanwhile goes as well
                self._objects.releases.wake()
                self._trims.ask(client, request_id)
            case Grow():
                self._outgoing.reply(client, request_id, Number(self._greeter.grant(session)))
            case Attach():
                if session.attached:
                    # What nobody reads would use up the descriptors that may be under way.
                    raise ProtocolError("a second Attach")
                session.attached = True
                self._outgoing.reply(client, request_id, Done(), Descriptor.SEGMENT)
            case Detach() if request_id == ONE_WAY:  # it may be read while other outboxes are
                self._unsettled.append((client, request_id, request, now_ns))
            case Detach():
                self._detach(session, now_ns)
                self._outgoing.reply(client, request_id, _DONE)
            case Hello() | Post():
                raise AssertionError("it was handled before")
            case _:
                assert_never(request)

    def settle(  # noqa: PLR0912, PLR0915 - as above
        self, session: Session, request_id: int, request: Request, now_ns: int
    ) -> None:
        """Answer a request that was left unsettled, now that all outboxes are read.

        Who deletes need not wait until memory is given back: `Deletions.end` is to follow.

        Raises
        ------
        Refused, NoRoom
            It is not granted.
        """
        client = session.client
        match request:
            case _ if self._is_early(client, request_id, request):
                self._unsettled.append((client, request_id, request, now_ns))
            case Create():
                if not self._creations.create(session, request_id, request, now_ns, all_read=True):
                    self._unsettled.append((client, request_id, request, now_ns))
            case Contains():
                found = self._objects.contains(request.object_id)
                self._outgoing.reply(client, request_id, Number(found))
            case Get():
                self._answers.answer_now(client, request_id)
            case AnswerNow() if self._is_unsettled_creation(client, request.request_id):
                self._unsettled.append((client, request_id, request, now_ns))
            case AnswerNow():
                self._answers.answer_now(client, request.request_id)
                self._creations.answer_now(client, request.request_id, now_ns)
            case Delete():
                at_once = self._room.most_at_once
                self._deletions.begin(request.object_ids[:at_once])
                if rest := request.object_ids[at_once:]:
                    self._unsettled.append((client, request_id, Delete(rest), now_ns))
                else:
                    self._outgoing.reply(client, request_id, _DONE)
            case Remove():
                self._deletions.begin_one(request)
                self._outgoing.reply(client, request_id, _DONE)
            case Keep():
                self._objects.keep(client, request.object_ids, request.keep)
                self._outgoing.reply(client, request_id, _DONE)
            case Evict() if self._spills_for(client, request_id, request.size_bytes):
                self.evictions.append((client, request_id, request, now_ns))
            case Evict():
                freed, goes_on = self._objects.evict(request.size_bytes)
                # What a move hides may go when it has arrived.
                goes_on |= freed < request.size_bytes and self._room.mover.hidden != NO_ENTRY
                freed_before = self._freed.pop((client, request_id), 0)
                if goes_on:
                    self._freed[client, request_id] = freed_before + freed
                    request = Evict(request.size_bytes - freed)
                    self._unsettled.append((client, request_id, request, now_ns))
                else:
                    self._outgoing.reply(client, request_id, Number(freed_before + freed))
            case Detach():
                self._detach(session, now_ns)
            case List():
                self._outgoing.reply(client, request_id, self._list(request.start))
            case Debug():
                self._outgoing.reply(client, request_id, Text(self.describe()))
            case _:
                raise AssertionError(f"{request} is answered at once")

    def _spills_for(self, client: int, request_id: int, size_bytes: int) -> bool:
        """Tell whether objects are being written to the external store so that so many bytes can be evicted.

        No more are written for an eviction since whose beginning a write has failed.
        """
        spilling, key = self._objects.spilling, (client, request_id)
        if spilling is not None and spilling.clean_bytes < size_bytes:
            failures = self._failures.setdefault(key, spilling.failures)
            wanted = self._room.free_bytes + size_bytes
            if failures == spilling.failures and spilling.demand(wanted):
                return True
        self._failures.pop(key, None)
        return False

    def goes_first(self, session: Session, request: Request) -> bool:
        """Tell whether a request is granted before deletions end that have begun (see `shmplasma.deletions`): nothing has to go for it."""
        if (
            not (isinstance(request, AskLease) and request.ahead)
            or session.limit_bytes
            or self._creations.await_room
            or self._publishing.are_awaited
            or self._objects.spilling is not None
        ):
            return False
        leases = self._publishing.leases
        size = leases.size_for(session.client, request.needed_bytes)
        n_entries = leases.objects_left + leases.objects_for(size)
        return size <= self._room.largest_bytes and n_entries <= self._table.free_entries

    def _lacks_room(self, request: Create) -> bool:
        """Tell whether something may have to go for an object."""
        size = request.size_bytes
        is_short = size + alignment_of(size) > self._room.largest_bytes
        return is_short or not self._table.free_entries

    def _is_unsettled_creation(self, client: int, request_id: int) -> bool:
        """Tell whether a creation is still kept back for the lock of its id, or for leases."""
        return any(
            (owner, number) == (client, request_id) and isinstance(request, Create)
            for owner, number, request, _ in self._unsettled
        )

    def _is_early(self, client: int, request_id: int, request: Request) -> bool:
        """Tell whether a request has to wait until an object that is hidden by a move can be read again."""
        if self._room.mover.hidden == NO_ENTRY:
            return False
        match request:
            case Get():
                return self._answers.awaits_hidden(client, request_id)
            case AnswerNow():
                return self._answers.awaits_hidden(client, request.request_id)
            case Delete():  # no more are deleted in this turn
                at_once = request.object_ids[: self._room.most_at_once]
                return any(map(self._objects.is_hidden, at_once))
            case Keep():
                return any(map(self._objects.is_hidden, request.object_ids))
            case Remove():
                return self._objects.is_hidden(request.object_id)
            case _:
                return False

    def publish(self, session: Session, message: Publish, now_ns: int) -> None:
        """Enter a published object; the hot path of putting.

        Raises
        ------
        ProtocolError, Refused
            As `request`.
        """
        withdraw = self._answers.withdraw
        entry = self._publishing.publish(session.client, message, now_ns, withdraw)
        if message.codec & REFERENCED:
            self._ledger.sealed(session.client, entry)
        self._answers.announce(entry)

    def _detach(self, session: Session, now_ns: int) -> None:
        """Let a client go that leaves, but for what it pins."""
        session.detached = True
        self.forget(session.client, now_ns)
        # Another thread of the client may be in the midst of a put: then its lease comes back later.
        self._publishing.recall_of(session.client)
        self._heed_all(now_ns)
        self._publishing.take_idle()

    def forget(self, client: int, now_ns: int) -> None:
        """Drop what a client waits for, what it has not sealed, and what it holds."""
        self._answers.forget(client)
        self._creations.forget(client)
        self._trims.forget(client)
        for begun in self._failures, self._freed:
            for key in [key for key in begun if key[0] == client]:
                del begun[key]
        self._objects.unsealed.leave(client)
        references = self._ledger.references
        if references.is_ahead:
            references.begin_reading()
            self._heed_all(now_ns)
            references.end_reading()
        self._ledger.forget(client)

    def _list(self, start: int) -> Listing:
        holders = Counter(e for client in self._sessions for e in self._objects.held_by(client))
        return list_objects(self._table, holders, start)

    def describe(self) -> str:
        """Return the store's figures, one a line."""
        clients = [
            f"{printable(session.name) or 'unnamed'} (pid {session.pid})"
            for client, session in self._sessions.items()
            if session.role is Role.CLIENT
            and (not session.detached or self._objects.held_by(client))
        ]
        return describe(
            self._layout,
            self._table,
            self._boards,
            self._room,
            self._objects,
            self._ledger.references,
            clients,
            self._creations.n_waiting,
        )
