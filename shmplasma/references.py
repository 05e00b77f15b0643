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

The same bytes, unpickled more than once
    As long as anybody holds the object, each unpickling is one more holder and nothing else.  A sender that knows
    how many will redeem says so (`receivers`): the ticket stands for that many.  Otherwise it is not used up by the first
    one but *lingers* for `LINGER_NS` after the latest, so that many may be sent the same bytes by somebody who
    does not keep the handle.  Queues and pipes of `multiprocessing` hand each pickle to one receiver, and say so:
    what they carry goes at once.

Tickets whose receiver never comes (it died, or a queue was thrown away unread)
    A ticket lives as long as its sender, and `ticket_ns` longer: so a queue may hold it for as long as anybody
    knows.  It protects from eviction for `ticket_ns` from its minting only.  So what a living sender has thrown away
    takes no room for ever from those who need it, and what takes its time in a queue is lost only when the store is
    full.

Fork
    Before a fork the parent lends all that it holds by one ticket (Bequeath), and waits for the answer.  The child
    tells what handles it has inherited (Hold), with that ticket, under its own connection.

Deaths
    The holds of a client end with its connection, after its outbox was read; many of them by and by.  What a store that dies knew is gone.
    Its clients tell its successor what they hold when they come back; and all referenced objects begin with one
    ticket for whatever was on its way, which lasts until the last client that lives has come back, and `ticket_ns` longer.
    Outboxes that the dead store has not read are read by the successor: the tickets and holds in them are known, also those of
    clients that have died since.  A Lend that comes again after its ticket was used up is of no harm: its ticket ends with
    its sender, as one that nobody takes does.

Coming back
    A client asks to go on (1), hears that it may, notes what it holds (2), and tells so (3), while its other threads
    redeem and release by its outbox, of which the store may read anything at any time.  So what it holds at 2 is neither
    all that it holds when 3 is read, nor is all of that held still.
    *What the store knows at 1, having read the outbox, and is not told of at 3 has ended*: it was begun before 1, so it was
    let go before 2; the message that said so may have died with the old store.
    *What the store learns between 1 and 3 stays*, as it may be newer than 2.  A Release of it that went to the dead
    store after 1 is sent once more after 3 (`shmplasma.link`).
    *Whose Release is read between 1 and 3 has ended*, though it be told of at 3.

A client may say what it likes.  Of objects that are not there, or are no referenced ones, nothing is noted; a client
that has more than `MAX_OF_A_CLIENT` holds and tickets loses its connection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Final

from shmplasma.deadlines import Deadlines
from shmplasma.errors import ProtocolError

__all__ = ["LINGER_NS", "MAX_OF_A_CLIENT", "TICKET_NS", "References"]

TICKET_NS: Final = 600 * 10**9
"""How long a ticket protects, and how long it outlives its sender: tasks may wait in a queue."""
LINGER_NS: Final = 5 * 10**9
"""For processes that are sent the same bytes at the same time, on a busy machine."""
MAX_OF_A_CLIENT: Final = 1 << 20


@dataclass(slots=True)
class _Owners:
    """Who owns one object."""

    holds: set[tuple[int, int]] = field(default_factory=set)
    tickets: set[int] = field(default_factory=set)
    is_protected: bool = False


@dataclass(slots=True)
class _Ticket:
    """A reference to some objects that is on its way: to a single one, or to the set of those that are still there.

    `receivers` is 0 where nobody knows; `sender` is None when the sender has gone or does not matter any more.
    """

    object_ids: tuple[bytes] | set[bytes]
    receivers: int
    sender: int | None
    protects: bool = True


@dataclass(frozen=True, slots=True)
class _Return:
    """What a client that comes back is known to hold and has not said yet, and what it has let go meanwhile."""

    doubted: set[tuple[bytes, int]]
    ended: set[tuple[bytes, int]] = field(default_factory=set)


class References:
    """All holds and tickets of a store.

    Parameters
    ----------
    protect : callable
        ``protect(object_id, whether)`` is told when an object is not to be evicted any more, or may be again.
    ticket_ns : int
        How long a ticket protects, and how long it outlives its sender.

    Notes
    -----
    Time is an argument, in nanoseconds.  O(1) for what concerns one handle, O(log n) for the time of a ticket.
    """

    def __init__(self, protect: Callable[[bytes, bool], None], ticket_ns: int = TICKET_NS) -> None:
        self._protect = protect
        self._ticket_ns = ticket_ns
        self._objects: dict[bytes, _Owners] = {}
        self._tickets: dict[int, _Ticket] = {}
        self._holds_of: dict[int, set[tuple[bytes, int]]] = {}
        self._minted_by: dict[int, set[int]] = {}
        self._early: Counter[int] = Counter()
        self._ahead: dict[bytes, list[Callable[[], None]]] = {}
        self._overdue: tuple[set[int], set[bytes]] = set(), set()
        self._suspects: set[bytes] = set()
        self._gone: dict[int, None] = {}
        self._due = Deadlines()  # of tickets; what has none waits for its sender to go
        self._recovered: _Ticket | None = None
        self._returns: dict[int, _Return] = {}

    def __len__(self) -> int:
        """Return the number of referenced objects."""
        return len(self._objects)

    def is_returning(self, client: int) -> bool:
        """Tell whether a client is yet to tell what it holds."""
        return client in self._returns

    @property
    def n_holds(self) -> int:
        """How many handles there are."""
        return sum(map(len, self._holds_of.values()))

    @property
    def n_tickets(self) -> int:
        """How many handles are on their way."""
        return len(self._tickets)

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
            self._lend((object_id,), ticket, client, receivers, now_ns)
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
        if ticket in self._tickets:
            self._use_up(ticket, now_ns)
        else:
            self._early[ticket] += 1

    def release(self, object_id: bytes, client: int, number: int) -> None:
        """End a hold; one that is not known has ended already."""
        if client in self._returns:
            self._returns[client].ended.add((object_id, number))
        if object_id in self._ahead:
            self._ahead[object_id].append(partial(self.release, object_id, client, number))
            return
        self._holds_of.get(client, set()).discard((object_id, number))
        owners = self._objects.get(object_id)
        if owners is not None:
            owners.holds.discard((client, number))
            self._review(object_id, owners)

    def bequeath(self, client: int, ticket: int, now_ns: int) -> None:
        """Lend all that a client holds by one ticket."""
        held = {object_id for object_id, _ in self._holds_of.get(client, ())}
        self._lend(held, ticket, client, 1, now_ns)

    def hold(
        self, client: int, ticket: int, holds: Iterable[tuple[bytes, int]], now_ns: int
    ) -> None:
        """Let a client hold what it says that it holds, and use up a ticket of its parent's."""
        told = set(holds)
        returning = self._returns.get(client)
        if returning is not None:
            returning.doubted.difference_update(told)
            if told:
                told -= returning.ended
            else:
                del self._returns[client]
                for object_id, number in returning.doubted:
                    self.release(object_id, client, number)
        for object_id, number in told:
            self._hold(object_id, client, number)
        if ticket in self._tickets:
            self._use_up(ticket, now_ns)

    def come_back(self, client: int) -> None:
        """Take note that a client of the store that died asks to go on: it will tell what it holds."""
        self._returns[client] = _Return(self._holds_of.get(client, set()).copy())

    def _hold(self, object_id: bytes, client: int, number: int) -> None:
        owners = self._objects.get(object_id)
        if owners is None:
            return
        self._holds_of.setdefault(client, set()).add((object_id, number))
        owners.holds.add((client, number))
        self._review(object_id, owners)

    def check_limit(self, client: int) -> None:
        """Raise ProtocolError if a client has more than it may, or lets go without an end of what it may have."""
        count = len(self._holds_of.get(client, ())) + len(self._minted_by.get(client, ()))
        if client in self._returns:
            count += len(self._returns[client].ended)
        if count >= MAX_OF_A_CLIENT:
            raise ProtocolError(f"it has {count} references")

    # -- tickets -------------------------------------------------------------------------------

    def _lend(
        self,
        object_ids: tuple[bytes] | set[bytes],
        ticket: int,
        client: int,
        receivers: int,
        now_ns: int,
    ) -> None:
        if ticket in self._tickets or not object_ids:
            return
        self._minted_by.setdefault(client, set()).add(ticket)
        self._add(ticket, _Ticket(object_ids, receivers, client))
        self._due.set(ticket, now_ns + self._ticket_ns)
        for _ in range(self._early.pop(ticket, 0)):
            if ticket in self._tickets:
                self._use_up(ticket, now_ns)

    def _add(self, number: int, ticket: _Ticket) -> None:
        self._tickets[number] = ticket
        for object_id in ticket.object_ids:
            owners = self._objects[object_id]
            owners.tickets.add(number)
            self._review(object_id, owners)

    def _use_up(self, number: int, now_ns: int) -> None:
        """Count one receiver of a ticket."""
        ticket = self._tickets[number]
        if ticket.receivers == 1:
            self._remove(number)
        elif ticket.receivers:
            ticket.receivers -= 1
        else:
            self._disown(number, ticket)
            self._due.set(number, now_ns + LINGER_NS)
            self._stop_protecting(ticket)

    def _disown(self, number: int, ticket: _Ticket) -> None:
        """Let a ticket not depend on its sender any more."""
        if ticket.sender is not None:
            self._minted_by[ticket.sender].discard(number)
            ticket.sender = None

    def _remove(self, number: int) -> None:
        ticket = self._tickets.pop(number)
        self._due.forget(number)
        self._disown(number, ticket)
        for object_id in ticket.object_ids:
            owners = self._objects[object_id]
            owners.tickets.remove(number)
            self._review(object_id, owners)

    def _stop_protecting(self, ticket: _Ticket) -> None:
        ticket.protects = False
        for object_id in ticket.object_ids:
            self._review(object_id, self._objects[object_id])

    @property
    def next_due_ns(self) -> int | None:
        """When `expire` has something to do; None when nothing waits for its time."""
        return self._due.next_ns

    @property
    def is_awake(self) -> bool:
        """Whether something is to be judged, or has its time."""
        return bool(self._due) or self.has_suspects

    def expire(self, now_ns: int) -> None:
        """Let those tickets end, or protect no more, whose time has come."""
        while (number := self._due.take(now_ns)) is not None:
            ticket = self._tickets[number]
            if ticket.sender is None:
                self._remove(number)
            else:
                self._stop_protecting(ticket)

    # -- judging -------------------------------------------------------------------------------

    def _review(self, object_id: bytes, owners: _Owners) -> None:
        """See what a change of its owners means to an object."""
        if not owners.holds and not owners.tickets:
            self._suspects.add(object_id)
        protected = bool(owners.holds) or any(
            self._tickets[number].protects for number in owners.tickets
        )
        if protected != owners.is_protected:
            owners.is_protected = protected
            self._protect(object_id, protected)

    @property
    def has_suspects(self) -> bool:
        """Whether something is to be judged when all outboxes have been read."""
        return bool(self._suspects or self._gone or self._early or self._ahead)

    def begin_reading(self) -> None:
        """Take note that all outboxes are about to be read: what is early or ahead now will be explained by that, or by nothing."""
        self._overdue = set(self._early), set(self._ahead)

    def end_reading(self) -> None:
        """Forget what this reading should have explained."""
        tickets, object_ids = self._overdue
        self._overdue = set(), set()
        for ticket in tickets:
            self._early.pop(ticket, None)
        for object_id in object_ids:
            self._ahead.pop(object_id, None)

    @property
    def is_ahead(self) -> bool:
        """Whether something waits for the outbox of a creator to be read."""
        return bool(self._ahead)

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
            self._holds_of[client].discard((object_id, number))
        for number in owners.tickets:
            ticket = self._tickets[number]
            if len(ticket.object_ids) == 1:
                del self._tickets[number]
                self._due.forget(number)
                self._disown(number, ticket)
            elif isinstance(ticket.object_ids, set):
                ticket.object_ids.remove(object_id)  # the next object of this id is none of its own

    def forget_client(self, client: int, now_ns: int) -> None:
        """Have the holds of a client that has gone end, with `judge`; the time of its tickets begins.

        Nothing that it has said is to be ahead: see `is_ahead`.
        """
        self._returns.pop(client, None)
        if client in self._holds_of:
            self._gone[client] = None
        for number in self._minted_by.pop(client, ()):
            ticket = self._tickets[number]
            ticket.sender = None
            self._due.set(number, now_ns + self._ticket_ns)

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
            if at_most is not None:
                return

    # -- recovering ----------------------------------------------------------------------------

    def recover(self, object_ids: Iterable[bytes]) -> None:
        """Take over the referenced objects of a store that has died, before any outbox is read."""
        known = set(object_ids)
        if known:
            self._objects = {object_id: _Owners() for object_id in known}
            self._recovered = _Ticket(known, 1, None)
            self._add(_RECOVERED, self._recovered)

    def all_came_back(self, now_ns: int) -> None:
        """Take note that no client is waited for any more."""
        ticket, self._recovered = self._recovered, None
        if ticket is not None and self._tickets.get(_RECOVERED) is ticket:
            self._due.set(_RECOVERED, now_ns + self._ticket_ns)

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
        for number, ticket in self._tickets.items():
            assert ticket.object_ids, "a ticket is for nothing"
            assert all(
                each in self._objects and number in self._objects[each].tickets
                for each in ticket.object_ids
            ), "a ticket is lost"
            assert (ticket.sender is None) or number in self._minted_by[ticket.sender]
        self._due.check()
        due = set(self._due)
        assert due <= self._tickets.keys(), "a ticket's time outlives it"
        assert all(
            ticket.sender is not None or number in due or ticket is self._recovered
            for number, ticket in self._tickets.items()
        ), "a ticket has no end"
        for client, own in self._minted_by.items():
            assert all(self._tickets[number].sender == client for number in own)
        for object_id, owners in self._objects.items():
            assert owners.tickets <= self._tickets.keys(), "a ticket that is used up protects"
            protected = bool(owners.holds) or any(
                self._tickets[number].protects for number in owners.tickets
            )
            assert protected == owners.is_protected, "an object is not protected as it should be"
            assert owners.holds or owners.tickets or object_id in self._suspects, "a leak"


_RECOVERED: Final = -1
"""The ticket of a recovery: no client can name it."""
