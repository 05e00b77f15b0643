"""References: who owns an object that is to go with the last handle of it.  Pure.

A *referenced* object is a sealed object whose codec has the bit `layout.REFERENCED`, so that it is known as one after
any death.  It belongs to *holds* and *tickets*: it is deleted when it has none of either.  While it has a hold, or a
ticket that protects, it is not evicted; that it is pinned, moved or spilled is no business of this module.

A *hold* is one `StoreRef` in one process: a client and a number of its choice.  The creator holds under the number 0
from the moment when the object is sealed, so there is none at which it is nobody's.  Each handle has a number of its
own, and clients count nothing: a handle that dies in a finalizer of one thread while another one is made of the
same object would have to be put into order with it, by a lock, which finalizers must not take.

A *ticket* is a handle on its way: 64 random bits in its pickle.

::

    sender                                      receiver
    1. Lend(id, ticket)                         3. Redeem(id, ticket, number)    the ticket's hold begins, and the
    2. the pickle leaves                           ticket is used up: one step
    4. Release(id, number), now or ever         5. Release(id, number)

All of these are records of outboxes: nobody waits for the store, nor wakes it while it looks by itself (`shmplasma.outbox`).
A Release whose record would have to be waited for, by a finalizer perhaps, is a message; the store reads it after
whatever the client had written before.

Why no object is deleted that somebody holds, or is yet to receive
    Of one client the store reads 1 before 4 and 3 before 5.  Between clients it may read 3 before 1.  So it deletes
    nothing when it reads a Release, but takes the object for a suspect, and judges it when it has read *all*
    outboxes after that (`ObjectStore.settle`).  Take any handle or pickle that exists when this reading begins, and
    follow it back from lender to lender.  Every Lend on that way was in an outbox before then, hence has been read.
    Let the last ticket be t.  If Redeem(t) was not read, t stands.  If it was, its receiver holds, until its
    Release.  A ticket that is minted during the reading has a lender to whom all this applies, and so back to the
    creator.
    A Redeem whose ticket is not known is *early*, or came again: the receiver holds in any case, and the ticket is
    remembered until the end of the next such reading, which will have found its Lend; that counts as redeemed then.  What is
    said of an object that is not known is *ahead* of the creator's outbox, and is heard again when that was read.
    The next one: a Redeem that is read in a reading may be younger than that reading's look at the lender's outbox.

Fork
    Before a fork the parent lends all that it holds by a ticket for each so many objects (Bequeath), and waits for the answers.  The child
    tells what handles it has inherited (Hold), under its own connection, and then uses up each ticket, by a Hold of nothing.

Deaths
    The holds of a client end with its connection, after its outbox was read; many of them by and by.  What a store that dies knew is gone.
    Its clients tell its successor what they hold when they come back; and each referenced object begins with a
    ticket for whatever was on its way, which lasts until the last client that held something and lives has come back
    (`shmplasma.holders`), and `ticket_ns` longer.
    Outboxes that the dead store has not read are read by the successor: the tickets and holds in them are known, also those of
    clients that have died since.

How long a ticket may be on its way says `shmplasma.tickets`.

A client may say what it likes.  Of objects that are not there, or are no referenced ones, nothing is noted; a client
that has more than `MAX_OF_A_CLIENT` holds and tickets loses its connection.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Final

from shmplasma.errors import ProtocolError
from shmplasma.holders import Holders
from shmplasma.tickets import TICKET_NS, Tickets

__all__ = ["MAX_OF_A_CLIENT", "References"]

MAX_OF_A_CLIENT: Final = 1 << 20


@dataclass(slots=True)
class _Owners:
    """Who owns one object."""

    holds: set[tuple[int, int]] = field(default_factory=set)
    tickets: set[int] = field(default_factory=set)
    is_protected: bool = False


class References:
    """All holds and tickets of a store.

    Parameters
    ----------
    protect : callable
        ``protect(object_id, whether)`` is told when an object is not to be evicted any more, or may be again.
    note_holder : callable
        As for `shmplasma.holders.Holders`.
    ticket_ns : int
        As for `shmplasma.tickets.Tickets`.

    Attributes
    ----------
    holders : Holders
        Which clients hold something.
    tickets : Tickets
        What is on its way.

    Notes
    -----
    Time is an argument, in nanoseconds, by a clock that only goes forward.  O(1) for what concerns one handle, O(log n) for the time of a ticket.
    """

    def __init__(
        self,
        protect: Callable[[bytes, bool], None],
        note_holder: Callable[[int, bool], None],
        ticket_ns: int = TICKET_NS,
    ) -> None:
        self._protect = protect
        self.holders = Holders(note_holder)
        self.tickets = Tickets(self._owned_by, ticket_ns)
        self._objects: dict[bytes, _Owners] = {}
        self._holds_of: dict[int, set[tuple[bytes, int]]] = {}
        self._ahead: dict[bytes, list[Callable[[], None]]] = {}
        self._overdue: tuple[set[int], set[bytes]] = set(), set()
        self._suspects: set[bytes] = set()
        self._gone: dict[int, None] = {}

    def __len__(self) -> int:
        """Return the number of referenced objects."""
        return len(self._objects)

    @property
    def n_holds(self) -> int:
        """How many handles there are."""
        return sum(map(len, self._holds_of.values()))

    # -- handles -------------------------------------------------------------------------------

    def create(self, object_id: bytes, client: int) -> None:
        """Take note of a referenced object that a client has just sealed."""
        self._objects[object_id] = _Owners()
        self._hold(object_id, client, 0)
        for hear in self._ahead.pop(object_id, ()):
            hear()

    def lend(self, object_id: bytes, ticket: int, client: int, receivers: int, now_ns: int) -> None:
        """Take note of a ticket that a client has minted; one that exists counts for nothing."""
        if object_id in self._objects:
            self.tickets.mint(ticket, (object_id,), receivers, client, now_ns)
        else:
            again = partial(self.lend, object_id, ticket, client, receivers, now_ns)
            self._ahead.setdefault(object_id, []).append(again)

    def redeem(self, object_id: bytes, ticket: int, client: int, number: int, now_ns: int) -> None:
        """Let a client hold what it has received."""
        if object_id not in self._objects:
            again = partial(self.redeem, object_id, ticket, client, number, now_ns)
            self._ahead.setdefault(object_id, []).append(again)
            return
        self._hold(object_id, client, number)
        self.tickets.redeem(ticket, now_ns)

    def release(self, object_id: bytes, client: int, number: int) -> None:
        """End a hold; one that is not known has ended already."""
        self.holders.released(client, (object_id, number))
        if object_id in self._ahead:
            self._ahead[object_id].append(partial(self.release, object_id, client, number))
            return
        self._end_hold(client, (object_id, number))
        owners = self._objects.get(object_id)
        if owners is not None:
            owners.holds.discard((client, number))
            self._review(object_id, owners)

    def bequeath(self, client: int, ticket: int, object_ids: Iterable[bytes], now_ns: int) -> None:
        """Lend what a client names by one ticket, to a child that takes it at once or never."""
        known = {object_id for object_id in object_ids if object_id in self._objects}
        self.tickets.mint(ticket, known, 1, client, now_ns, is_brief=True)

    def hold(
        self, client: int, ticket: int, holds: Iterable[tuple[bytes, int]], now_ns: int
    ) -> None:
        """Let a client hold what it says that it holds, no more if that is nothing, and use up a ticket of its parent's."""
        told = set(holds)
        for object_id, number in self.holders.told(client, told):
            self._hold(object_id, client, number)
        self.tickets.use_up(ticket, now_ns)
        if not told:
            for object_id, number in self.holders.all_told(client):
                self.release(object_id, client, number)
            if not self._holds_of.get(client):
                self.holders.ended(client)
            self._note_who_is_awaited(now_ns)

    def come_back(self, client: int) -> None:
        """Take note that a client of the store that died asks to go on: it will tell what it holds."""
        self.holders.come_back(client, self._holds_of.get(client, ()))

    def _hold(self, object_id: bytes, client: int, number: int) -> None:
        owners = self._objects.get(object_id)
        if owners is None:
            return
        self.holders.begun(client)
        self._holds_of.setdefault(client, set()).add((object_id, number))
        owners.holds.add((client, number))
        self._review(object_id, owners)

    def _end_hold(self, client: int, hold: tuple[bytes, int]) -> None:
        own = self._holds_of.get(client)
        if own is not None:
            own.discard(hold)
            if not own:
                self.holders.ended(client)

    def check_limit(self, client: int) -> None:
        """Raise ProtocolError if a client has more than it may, or lets go without an end of what it may have."""
        count = len(self._holds_of.get(client, ())) + self.tickets.n_of(client)
        count += self.holders.n_released(client)
        if count >= MAX_OF_A_CLIENT:
            raise ProtocolError(f"it has {count} references")

    def _owned_by(self, ticket: int, object_ids: Collection[bytes], owns: bool) -> None:
        """Take note of which objects a ticket owns, and whether it protects them."""
        for object_id in object_ids:
            owners = self._objects[object_id]
            if owns:
                owners.tickets.add(ticket)
            else:
                owners.tickets.discard(ticket)
            self._review(object_id, owners)

    @property
    def is_awake(self) -> bool:
        """Whether something is to be judged, or has its time."""
        return self.tickets.have_times or self.has_suspects

    # -- judging -------------------------------------------------------------------------------

    def _review(self, object_id: bytes, owners: _Owners) -> None:
        """See what a change of its owners means to an object."""
        if not owners.holds and not owners.tickets:
            self._suspects.add(object_id)
        protected = bool(owners.holds) or any(map(self.tickets.protects, owners.tickets))
        if protected != owners.is_protected:
            owners.is_protected = protected
            self._protect(object_id, protected)

    @property
    def has_suspects(self) -> bool:
        """Whether something is to be judged when all outboxes have been read."""
        return bool(self._suspects or self._gone or self.tickets.early or self._ahead)

    def begin_reading(self) -> None:
        """Take note that all outboxes are about to be read: what is early or ahead now will be explained by that, or by nothing."""
        self._overdue = set(self.tickets.early), set(self._ahead)

    def end_reading(self) -> None:
        """Forget what this reading should have explained."""
        tickets, object_ids = self._overdue
        self._overdue = set(), set()
        for ticket in tickets:
            self.tickets.forget_early(ticket)
        for object_id in object_ids:
            self._ahead.pop(object_id, None)

    @property
    def is_ahead(self) -> bool:
        """Whether something waits for the outbox of a creator to be read."""
        return bool(self._ahead)

    @property
    def n_to_judge(self) -> int:
        """How many holds of clients that have gone are to end, and objects to be judged."""
        return len(self._suspects) + sum(len(self._holds_of[client]) for client in self._gone)

    def judge(self, at_most: int | None = None) -> list[bytes]:
        """Return the objects that nobody owns, so many at most, and forget them; all outboxes have been read just now."""
        self.end_reading()
        self._end_holds(at_most)
        nobodys = []
        for object_id in tuple(islice(self._suspects, at_most)):
            self._suspects.remove(object_id)
            owners = self._objects[object_id]
            if not owners.holds and not owners.tickets:
                nobodys.append(object_id)
                del self._objects[object_id]
        return nobodys

    # -- ends ----------------------------------------------------------------------------------

    def forget_object(self, object_id: bytes) -> None:
        """Take note that an object has gone, by whatever way."""
        owners = self._objects.pop(object_id, None)
        if owners is None:
            return
        self._suspects.discard(object_id)
        for client, number in owners.holds:
            self._end_hold(client, (object_id, number))
        for number in owners.tickets:
            self.tickets.forget_object(number, object_id)

    def forget_client(self, client: int, now_ns: int) -> None:
        """Have the holds of a client that has gone end, with `judge`; its tickets are on their way still.

        Nothing that it has said is to be ahead: see `is_ahead`.
        """
        self.holders.forget(client)
        self._note_who_is_awaited(now_ns)
        if client in self._holds_of:
            self._gone[client] = None

    def _end_holds(self, at_most: int | None) -> None:
        """End holds of clients that have gone, so many at most."""
        while self._gone:
            client = next(iter(self._gone))
            own = self._holds_of[client]
            for hold in tuple(islice(own, at_most)):
                own.remove(hold)
                object_id, number = hold
                owners = self._objects[object_id]
                owners.holds.remove((client, number))
                self._review(object_id, owners)
            if not own:
                del self._gone[client], self._holds_of[client]
                self.holders.ended(client)
            if at_most is not None:
                return

    # -- recovering ----------------------------------------------------------------------------

    def recover(self, object_ids: Iterable[bytes], holders: Iterable[int], now_ns: int) -> None:
        """Take over the referenced objects of a store that has died, and who held some, before any outbox is read."""
        known = set(object_ids)
        self.holders.recover(holders)
        if known:
            self._objects = {object_id: _Owners() for object_id in known}
            self.tickets.recover(known)
            self._note_who_is_awaited(now_ns)

    def _note_who_is_awaited(self, now_ns: int) -> None:
        if not self.holders.are_awaited:
            self.tickets.all_came_back(now_ns)

    # -- proof ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Prove that objects, holds and tickets agree."""
        holds = {
            (object_id, client, number)
            for client, own in self._holds_of.items()
            for object_id, number in own
        }
        assert holds == {
            (object_id, client, number)
            for object_id, owners in self._objects.items()
            for client, number in owners.holds
        }, "clients and objects disagree on the holds"
        self.tickets.check({each: owners.tickets for each, owners in self._objects.items()})
        for object_id, owners in self._objects.items():
            protected = bool(owners.holds) or any(map(self.tickets.protects, owners.tickets))
            assert protected == owners.is_protected, "an object is not protected as it should be"
            assert owners.holds or owners.tickets or object_id in self._suspects, "a leak"
