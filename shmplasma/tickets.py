"""Tickets: references that are on their way, and how long they may be (`shmplasma.references`).  Pure.

A ticket is for some objects, each of which it owns until it is used up, or ends.

The same bytes, unpickled more than once
    As long as anybody holds the object, each unpickling is one more holder and nothing else.  A sender that knows
    how many will redeem says so (`receivers`): the ticket stands for that many.  Otherwise it is not used up by the first
    one but *lingers* for `LINGER_NS` after the latest, so that many may be sent the same bytes by somebody who
    does not keep the handle.  Queues and pipes of `multiprocessing` hand each pickle to one receiver, and say so:
    what they carry goes at once.

Tickets whose receiver never comes (it died, or a queue was thrown away unread)
    A ticket lives as long as the process that sent it, and `ticket_ns` longer: so a queue may hold it for as long as
    anybody knows.  A process may end the connection by which it has sent something, and usually does with its last handle;
    its tickets are passed on to a number that stands for the process (`shmplasma.senders`).
    A ticket protects from eviction for `ticket_ns` from its minting only.  So what a living sender has thrown away
    takes no room for ever from those who need it, and what takes its time in a queue is lost only when the store is
    full.
    A forked child takes at once what it was lent, or never: it was killed, or there is none.  So a ticket for one does not
    wait for its sender to go: it is *brief*, and ends `ticket_ns` after its minting.

A Lend that comes again after its ticket was used up is of no harm: its ticket ends with its sender, as one that nobody takes does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final

from shmplasma.deadlines import Deadlines

__all__ = ["LINGER_NS", "TICKET_NS", "Tickets"]

TICKET_NS: Final = 600 * 10**9
"""How long a ticket protects, and how long it outlives its sender: tasks may wait in a queue."""
LINGER_NS: Final = 5 * 10**9
"""For processes that are sent the same bytes at the same time, on a busy machine."""
_RECOVERED: Final = -1
"""The first ticket of a recovery, and the others are below it: no client can name them."""
_OBJECTS_OF_A_RECOVERED: Final = 1 << 12
"""A ticket ends for all its objects at once, some us for each."""


@dataclass(slots=True)
class _Ticket:
    """A reference to some objects that is on its way: to a single one, or to the set of those that are still there.

    `receivers` is 0 where nobody knows; `sender` is None when the sender has gone or does not matter any more.
    """

    object_ids: tuple[bytes] | set[bytes]
    receivers: int
    sender: int | None
    is_brief: bool = False
    protects: bool = True


class Tickets:
    """All tickets of a store.

    Parameters
    ----------
    changed : callable
        ``changed(number, object_ids, owns)`` is told which objects a ticket owns from now on, or does not any more, or owns without
        protecting them any more.
    ticket_ns : int
        How long a ticket protects, and how long it outlives its sender.
    """

    def __init__(
        self, changed: Callable[[int, Collection[bytes], bool], None], ticket_ns: int
    ) -> None:
        self._changed = changed
        self._ticket_ns = ticket_ns
        self._tickets: dict[int, _Ticket] = {}
        self._minted_by: dict[int, set[int]] = {}
        self._early: Counter[int] = Counter()
        self._due = Deadlines()  # what has none waits for its sender to go
        self._recovered: set[int] = set()

    def __len__(self) -> int:
        """Return the number of tickets."""
        return len(self._tickets)

    def protects(self, number: int) -> bool:
        """Tell whether a ticket keeps its objects from being evicted."""
        return self._tickets[number].protects

    # -- minting and using up ------------------------------------------------------------------

    def mint(
        self,
        number: int,
        object_ids: tuple[bytes] | set[bytes],
        receivers: int,
        sender: int,
        now_ns: int,
        *,
        is_brief: bool = False,
    ) -> None:
        """Take note of a ticket; one that exists, or is for nothing, counts for nothing."""
        if number in self._tickets or not object_ids:
            return
        self._minted_by.setdefault(sender, set()).add(number)
        self._add(number, _Ticket(object_ids, receivers, sender, is_brief))
        self._due.set(number, now_ns + self._ticket_ns)
        for _ in range(self._early.pop(number, 0)):
            self.use_up(number, now_ns)

    def _add(self, number: int, ticket: _Ticket) -> None:
        self._tickets[number] = ticket
        self._changed(number, ticket.object_ids, True)

    def redeem(self, number: int, now_ns: int) -> None:
        """Count one receiver of a ticket, which may be minted only after this."""
        if number in self._tickets:
            self.use_up(number, now_ns)
        else:
            self._early[number] += 1

    def use_up(self, number: int, now_ns: int) -> None:
        """Count one receiver of a ticket, if there is such a one."""
        ticket = self._tickets.get(number)
        if ticket is None:
            return
        if ticket.receivers == 1:
            self._remove(number)
        elif ticket.receivers:
            ticket.receivers -= 1
        else:
            self._disown(number, ticket)
            self._due.set(number, now_ns + LINGER_NS)
            self._stop_protecting(number, ticket)

    @property
    def early(self) -> Collection[int]:
        """The tickets that were redeemed and are not known."""
        return self._early.keys()

    def forget_early(self, number: int) -> None:
        """Expect no more that a ticket becomes known."""
        self._early.pop(number, None)

    # -- ending --------------------------------------------------------------------------------

    def _disown(self, number: int, ticket: _Ticket) -> None:
        """Let a ticket not depend on its sender any more."""
        if ticket.sender is not None:
            minted = self._minted_by[ticket.sender]
            minted.remove(number)
            if not minted:
                del self._minted_by[ticket.sender]
            ticket.sender = None

    def _remove(self, number: int) -> None:
        ticket = self._tickets.pop(number)
        self._due.forget(number)
        self._disown(number, ticket)
        self._changed(number, ticket.object_ids, False)

    def _stop_protecting(self, number: int, ticket: _Ticket) -> None:
        ticket.protects = False
        self._changed(number, ticket.object_ids, True)

    def forget_object(self, number: int, object_id: bytes) -> None:
        """Take note that an object of a ticket has gone."""
        ticket = self._tickets[number]
        if len(ticket.object_ids) == 1:
            del self._tickets[number]
            self._due.forget(number)
            self._disown(number, ticket)
        elif isinstance(ticket.object_ids, set):
            ticket.object_ids.remove(object_id)  # the next object of this id is none of its own

    @property
    def have_times(self) -> bool:
        """Whether something has its time."""
        return bool(self._due)

    @property
    def next_due_ns(self) -> int | None:
        """When `expire` has something to do; None when nothing waits for its time."""
        return self._due.next_ns

    def expire(self, now_ns: int, at_most: int) -> None:
        """Let tickets end, or protect no more, whose time has come; no more when they were for so many objects."""
        count = 0
        while count < at_most and (number := self._due.take(now_ns)) is not None:
            ticket = self._tickets[number]
            count += len(ticket.object_ids)
            if ticket.sender is None or ticket.is_brief:
                self._remove(number)
            else:
                self._stop_protecting(number, ticket)

    # -- senders -------------------------------------------------------------------------------

    def n_of(self, sender: int) -> int:
        """Return how many tickets of a sender are on their way."""
        return len(self._minted_by.get(sender, ()))

    def pass_on(self, sender: int, heir: int) -> None:
        """Let the tickets of a sender last as long as those of another one."""
        minted = self._minted_by.pop(sender, set())
        self._minted_by.setdefault(heir, set()).update(minted)
        for number in minted:
            self._tickets[number].sender = heir

    def forget_sender(self, sender: int, now_ns: int) -> None:
        """Let the time begin of the tickets of a sender that has gone."""
        for number in self._minted_by.pop(sender, ()):
            ticket = self._tickets[number]
            ticket.sender = None
            if not ticket.is_brief:
                self._due.set(number, now_ns + self._ticket_ns)

    # -- recovering ----------------------------------------------------------------------------

    def recover(self, object_ids: Iterable[bytes]) -> None:
        """Make tickets for what was on its way when a store died; they have no end before `all_came_back`."""
        rest = iter(object_ids)
        number = _RECOVERED
        while part := set(islice(rest, _OBJECTS_OF_A_RECOVERED)):
            self._recovered.add(number)
            self._add(number, _Ticket(part, 1, None))
            number -= 1

    def all_came_back(self, now_ns: int) -> None:
        """Let the time of these tickets begin: nobody is waited for any more."""
        for number in self._recovered & self._tickets.keys():
            self._due.set(number, now_ns + self._ticket_ns)
        self._recovered.clear()

    # -- proof ---------------------------------------------------------------------------------

    def check(self, owners: Mapping[bytes, Collection[int]]) -> None:
        """Prove that tickets, senders and times agree with each other and with the owners of each object."""
        for number, ticket in self._tickets.items():
            assert ticket.object_ids, "a ticket is for nothing"
            assert all(number in owners.get(each, ()) for each in ticket.object_ids), (
                "a ticket is lost"
            )
            assert (ticket.sender is None) or number in self._minted_by[ticket.sender]
        assert all(self._tickets.keys() >= set(numbers) for numbers in owners.values()), (
            "a ticket that is used up owns something"
        )
        self._due.check()
        due = set(self._due)
        assert due <= self._tickets.keys(), "a ticket's time outlives it"
        assert all(
            (ticket.sender is not None and not ticket.is_brief)
            or number in due
            or number in self._recovered
            for number, ticket in self._tickets.items()
        ), "a ticket has no end"
        for client, own in self._minted_by.items():
            assert own, "who has sent nothing is remembered"
            assert all(self._tickets[number].sender == client for number in own)
