"""Creations: objects whose writers are told where they lie once memory stands behind them.  Pure.

Memory is committed in steps between requests, so that nobody waits for another one's gigabytes.
"""

from __future__ import annotations

from shmplasma.errors import CommitError, ProtocolError
from shmplasma.greeting import Session
from shmplasma.lifecycle import Lifecycle, Refused
from shmplasma.outgoing import Outgoing
from shmplasma.pins import Boards
from shmplasma.protocol import ONE_WAY
from shmplasma.publishing import Publishing
from shmplasma.replies import Created, Failed, Failure
from shmplasma.requests import Create
from shmplasma.room import Room
from shmplasma.table import Table

__all__ = ["Creations"]


class Creations:
    """All creations, and those that wait for memory.

    Parameters
    ----------
    table, boards, room, objects, publishing, outgoing
        The parts of the store that it joins.
    """

    def __init__(
        self,
        table: Table,
        boards: Boards,
        room: Room,
        objects: Lifecycle,
        publishing: Publishing,
        outgoing: Outgoing,
    ) -> None:
        self._table = table
        self._boards = boards
        self._room = room
        self._objects = objects
        self._publishing = publishing
        self._outgoing = outgoing
        self._waiting: dict[int, tuple[int, int]] = {}

    def __bool__(self) -> bool:
        """Tell whether a creator waits for memory."""
        return bool(self._waiting)

    def __contains__(self, entry: int) -> bool:
        """Tell whether the creator of this entry does."""
        return entry in self._waiting

    def create(self, session: Session, request_id: int, request: Create, now_ns: int) -> bool:
        """Make an object and tell its writer where, at once or when its memory is committed.

        Returns
        -------
        bool
            False when there is no room, but leases may come back: ask again when they have.

        Raises
        ------
        ProtocolError
            The sizes are impossible.
        Refused
            It is not granted.
        """
        client = session.client
        if request.data_size < 0 or request.metadata_size < 0:
            raise ProtocolError(f"an object of {request.data_size}+{request.metadata_size} bytes")
        try:
            entry = self._objects.create(client, request, session.limit_bytes, now_ns)
        except Refused as refused:
            # Leases are never the reason: they come back first.
            if refused.failed.failure is not Failure.FULL or not self._publishing.recall():
                raise
            return False
        offset, data_size, metadata_size = self._table.location(entry)
        if data_size + metadata_size and offset + data_size + metadata_size > self._room.watermark:
            self._waiting[entry] = (client, request_id)
        else:
            self._outgoing.reply(client, request_id, Created(offset))
        return True

    def take_back(self, client: int, entry: int) -> None:
        """Answer a creation that waits for memory, if this is one, because it is not wanted any more."""
        creator, request_id = self._waiting.get(entry, (None, ONE_WAY))
        if creator == client:
            del self._waiting[entry]
            self._boards.unpin_all(client, entry)
            failed = Failed(Failure.NOT_FOUND, "the object was aborted before it had its memory")
            self._outgoing.reply(client, request_id, failed)

    def forget(self, client: int) -> None:
        """Answer all that a client waits for, because it leaves."""
        for entry, (creator, _) in list(self._waiting.items()):
            if creator == client:
                self.take_back(client, entry)

    def advance(self) -> None:
        """Commit one step of memory, ahead of need if nobody waits; answer the creator that waited for it.

        Raises
        ------
        CommitError
            There is no memory, and nobody waits for it.
        """
        if not self._waiting:
            self._room.commit_step(self._room.idle_target)
            return
        entry, (client, request_id) = next(iter(self._waiting.items()))
        offset, data_size, metadata_size = self._table.location(entry)
        try:
            if self._room.commit_step(offset + data_size + metadata_size):
                del self._waiting[entry]
                self._outgoing.reply(client, request_id, Created(offset))
        except CommitError as error:
            del self._waiting[entry]
            self._boards.unpin_all(client, entry)
            self._objects.abort(client, self._table.object_id(entry))
            refused = self._objects.full(data_size + metadata_size, str(error))
            self._outgoing.reply(client, request_id, refused.failed)
