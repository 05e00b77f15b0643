"""What a store is told of references, and what it does about them (`shmplasma.references`).  Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from shmplasma.deletions import Deletions
from shmplasma.layout import REFERENCED
from shmplasma.outgoing import Outgoing
from shmplasma.pins import Boards
from shmplasma.posted import Lend, Redeem, Release
from shmplasma.references import References
from shmplasma.requests import Bequeath, Hold
from shmplasma.room import Room
from shmplasma.senders import Senders
from shmplasma.table import NO_ENTRY, Table

__all__ = ["Ledger"]


class Ledger:
    """The references of a store, and its objects.

    Parameters
    ----------
    table, boards, room, deletions, outgoing
        The parts of the store that it joins.
    clock : callable
        Returns the time, by a clock that only goes forward, in nanoseconds.
    ticket_ns : int
        As for `References`.

    Attributes
    ----------
    references : References
        Who owns what.
    """

    def __init__(
        self,
        table: Table,
        boards: Boards,
        room: Room,
        deletions: Deletions,
        outgoing: Outgoing,
        clock: Callable[[], int],
        ticket_ns: int,
    ) -> None:
        self._table = table
        self._room = room
        self._deletions = deletions
        self._clock = clock
        self.references = References(self._protect, boards.note_holder, ticket_ns)
        self._senders = Senders(self.references.tickets, outgoing)
        self._turns = 0

    def _protect(self, object_id: bytes, whether: bool) -> None:
        entry = self._table.find(object_id)
        if entry != NO_ENTRY:
            self._room.residents.protect(entry, whether)

    def sealed(self, client: int, entry: int) -> None:
        """Take note of an object that a client has sealed or published, if it is a referenced one."""
        object_id, codec = self._table.id_and_codec(entry)
        if codec & REFERENCED:
            self.references.create(object_id, client)

    def handle(self, client: int, request: Lend | Redeem | Release | Hold | Bequeath) -> None:
        """Carry out what a client says of its references; before a Hold or Bequeath all outboxes are read.

        Raises
        ------
        ProtocolError
            It has too many.
        """
        references, now_ns = self.references, self._clock()
        if not isinstance(request, Release) or references.holders.is_returning(client):
            references.check_limit(client)
        match request:
            case Lend(object_id, ticket, receivers):
                references.lend(object_id, ticket, client, receivers, now_ns)
            case Redeem(object_id, ticket, number):
                references.redeem(object_id, ticket, client, number, now_ns)
            case Release(object_id, number):
                references.release(object_id, client, number)
            case Hold(ticket, holds):
                references.hold(client, ticket, holds, now_ns)
            case Bequeath(ticket, object_ids):
                references.bequeath(client, ticket, object_ids, now_ns)

    def delete_nobodys(self, at_most: int, *, asked: bool) -> bool:
        """Delete what nobody owns, so many objects at most, but while a move hides an object; all outboxes have been read just now.

        Returns
        -------
        bool
            Whether who has asked for something has to wait until more is deleted: for so many turns as take what there was at first,
            after which all that there is goes at once.
        """
        references = self.references
        if not references.has_suspects or self._room.mover.hidden != NO_ENTRY:
            self._turns = 0
            return False
        if asked:
            self._turns = (self._turns or references.n_to_judge // at_most + 1) - 1
        self._deletions.delete(references.judge(None if asked and not self._turns else at_most))
        if not references.n_to_judge:
            self._turns = 0
        return asked and self._turns > 0

    # -- clients and processes that go -------------------------------------------------------------

    def forget(self, client: int) -> None:
        """Have the holds of a client end that has left; all that it has said of objects that were not known was heard."""
        self.references.forget_client(client, self._clock())

    def end(self, client: int, pid: int, start_time: int) -> None:
        """Take note that the connection of a client has ended; `forget` came before."""
        self._senders.add(client, pid, start_time, self._clock())

    def end_process(self, sender: int) -> None:
        """Take note that a process has ended, as an `Await` has asked for."""
        self._senders.end(sender, self._clock())

    def recover(self, object_ids: Iterable[bytes], holders: Iterable[int]) -> None:
        """Take over the referenced objects of a store that has died, and who held some."""
        self.references.recover(object_ids, holders, self._clock())

    @property
    def wait_ns(self) -> int | None:
        """In how many nanoseconds `expire` has something to do; None if not for the sake of time."""
        due_ns = self.references.tickets.next_due_ns
        return None if due_ns is None else max(0, due_ns - self._clock())

    def expire(self) -> None:
        """Let references that were never received come to their end, so many at a time."""
        self.references.tickets.expire(self._clock(), self._room.most_at_once)
