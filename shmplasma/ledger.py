"""What a store is told of references, and what it does about them (`shmplasma.references`).  Pure."""

from __future__ import annotations

from shmplasma.deletions import Deletions
from shmplasma.layout import REFERENCED
from shmplasma.posted import Lend, Redeem, Release
from shmplasma.references import References
from shmplasma.requests import Bequeath, Hold
from shmplasma.room import Room
from shmplasma.table import NO_ENTRY, Table

__all__ = ["Ledger"]


class Ledger:
    """The references of a store, and its objects.

    Parameters
    ----------
    table, room, objects
        The parts of the store that it joins.
    ticket_ns : int
        As for `References`.

    Attributes
    ----------
    references : References
        Who owns what.
    """

    def __init__(self, table: Table, room: Room, deletions: Deletions, ticket_ns: int) -> None:
        self._table = table
        self._room = room
        self._deletions = deletions
        self.references = References(self._protect, ticket_ns)

    def _protect(self, object_id: bytes, whether: bool) -> None:
        entry = self._table.find(object_id)
        if entry != NO_ENTRY:
            self._room.residents.protect(entry, whether)

    def sealed(self, client: int, entry: int) -> None:
        """Take note of an object that a client has sealed or published, if it is a referenced one."""
        object_id, codec = self._table.id_and_codec(entry)
        if codec & REFERENCED:
            self.references.create(object_id, client)

    def handle(
        self, client: int, request: Lend | Redeem | Release | Hold | Bequeath, now_ns: int
    ) -> None:
        """Carry out what a client says of its references; before a Hold or Bequeath all outboxes are read.

        Raises
        ------
        ProtocolError
            It has too many.
        """
        references = self.references
        if not isinstance(request, Release) or references.is_returning(client):
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
            case Bequeath(ticket):
                references.bequeath(client, ticket, now_ns)

    def delete_nobodys(self, at_most: int | None) -> None:
        """Delete what nobody owns, so many objects at most, but while a move hides an object; all outboxes have been read just now."""
        if self.references.has_suspects and self._room.mover.hidden == NO_ENTRY:
            self._deletions.delete(self.references.judge(at_most))
