"""Gets: answered at once, when the last object comes, or when the client asks for what there is.  Pure."""

from __future__ import annotations

from collections.abc import Mapping

from shmplasma.denials import Refused
from shmplasma.errors import ProtocolError
from shmplasma.gets import GetQueue, PendingGet
from shmplasma.greeting import Session
from shmplasma.hints import Wanted
from shmplasma.lifecycle import Lifecycle
from shmplasma.outgoing import Outgoing
from shmplasma.pins import Boards
from shmplasma.protocol import ONE_WAY
from shmplasma.replies import Failed, Failure, Objects
from shmplasma.requests import Get
from shmplasma.residents import Residents
from shmplasma.table import NO_ENTRY, Table

__all__ = ["Answers"]


class Answers:
    """All gets, and those that wait for objects.

    Parameters
    ----------
    table, boards, residents, objects, wanted, outgoing
        The parts of the store that it joins.
    sessions : mapping
        All connections, by their numbers.
    """

    def __init__(
        self,
        table: Table,
        boards: Boards,
        residents: Residents,
        objects: Lifecycle,
        wanted: Wanted,
        outgoing: Outgoing,
        sessions: Mapping[int, Session],
    ) -> None:
        self._table = table
        self._boards = boards
        self._residents = residents
        self._objects = objects
        self._wanted = wanted
        self._outgoing = outgoing
        self._sessions = sessions
        self._queue = GetQueue()
        self._hidden: set[bytes] = set()

    def get(self, client: int, request_id: int, request: Get) -> bool:
        """Begin a get; answer it if all its objects are there.

        Returns
        -------
        bool
            False when it is to be answered with `answer_now` once all outboxes are read, as it does not wait.

        Raises
        ------
        ProtocolError
            Its request id or its slots are not its to use.
        """
        if request_id == ONE_WAY or (client, request_id) in self._queue:
            raise ProtocolError(f"a get under the request id {request_id}")
        if not self._boards.may_lend(client, request.slots):
            raise ProtocolError("a get names slots that are not its to lend")
        lent = self._sessions[client].lent
        if lent and not lent.isdisjoint(request.slots):
            raise ProtocolError("a get names slots that another one waits with")
        get = PendingGet.begin(client, request_id, request)
        for object_id in list(get.missing):
            if self._objects.is_hidden(object_id):
                self._hidden.add(object_id)
                continue
            entry = self._objects.find_sealed(object_id)
            if entry != NO_ENTRY:
                self._fill(get, object_id, entry)
            elif (spilled := self._objects.find_spilled(object_id)) != NO_ENTRY:
                self._bring(get, object_id, spilled)
        if not get.missing:
            self._outgoing.reply(client, request_id, Objects(get.found))
            return True
        lent.update(request.slots)
        self._queue.add(get)
        if request.hinted and not get.returning and request.object_ids[0] not in self._hidden:
            self._wanted.ask(get, request.object_ids[0], self._sessions[client].board)
        return request.wait or bool(get.returning)

    def _bring(self, get: PendingGet, object_id: bytes, entry: int) -> None:
        """Have an object brought back that a get asks for."""
        spilling = self._objects.spilling
        if spilling is None:
            text = f"object {object_id.hex()} is in an external store; start the store with -e as before"
            raise Refused(Failed(Failure.EXTERNAL, text))
        get.returning.add(object_id)
        spilling.bring(entry)

    def came_back(self, entry: int) -> list[PendingGet]:
        """Tell those who wait for an object that it is in memory again.

        Returns
        -------
        list of PendingGet
            Those that miss something else and do not wait: `answer_now` is due when all outboxes are read.
        """
        object_id = self._table.object_id(entry)
        due: list[PendingGet] = []
        for get in self._queue.waiting_for(object_id):
            self._fill(get, object_id, entry)
            if not get.missing:
                self.answer_now(get.client, get.request_id)
            elif not (get.request.wait or get.returning):
                due.append(get)
        return due

    def gone(self, object_id: bytes) -> list[PendingGet]:
        """Take note that an object was deleted, perhaps while it came back; return what `came_back` returns."""
        due: list[PendingGet] = []
        for get in self._queue.who_wait_for(object_id):
            if object_id in get.returning:
                get.returning.remove(object_id)
                if not (get.request.wait or get.returning):
                    due.append(get)
        return due

    def fail(self, object_id: bytes, failed: Failed) -> None:
        """Tell those who wait for an object that it cannot be had."""
        for get in self._queue.who_wait_for(object_id):
            self._remove(get.client, get.request_id)
            self._outgoing.reply(get.client, get.request_id, failed)

    def _fill(self, get: PendingGet, object_id: bytes, entry: int) -> None:
        """Enter a sealed object into a get and pin it for its client, if that has not taken it."""
        self._wanted.withdraw(get)
        codec = self._table.id_and_codec(entry)[1]
        for slot in get.fill(object_id, (*self._table.location(entry), codec)):
            if not get.is_taken:
                self._boards.pin(slot, entry)
        self._residents.read(entry)

    def withdraw(self, object_id: bytes) -> None:
        """Have nobody be hinted at an object any more, about which the store is going to say something."""
        if self._queue:
            for get in self._queue.who_wait_for(object_id):
                self._wanted.withdraw(get)

    def announce(self, entry: int) -> None:
        """Tell those who wait for an object, and the subscribers, that it is sealed."""
        if not (self._outgoing.to_be_told or self._queue.waiting):
            return
        object_id = self._table.object_id(entry)
        _, data_size, metadata_size = self._table.location(entry)
        self._outgoing.sealed(entry, object_id, data_size, metadata_size)
        self._give(object_id, entry)

    def _give(self, object_id: bytes, entry: int) -> None:
        """Enter an object into all gets that wait for it."""
        for get in self._queue.waiting_for(object_id):
            self._fill(get, object_id, entry)
            if not get.missing:
                self.answer_now(get.client, get.request_id)

    def look_again(self) -> None:
        """Find what was asked for while it was hidden by a move, and is not any more."""
        for object_id in [each for each in self._hidden if not self._objects.is_hidden(each)]:
            self._hidden.discard(object_id)
            entry = self._objects.find_sealed(object_id)
            if entry != NO_ENTRY:
                self._give(object_id, entry)

    def awaits_hidden(self, client: int, request_id: int) -> bool:
        """Tell whether this get lacks an object only because that is hidden by a move."""
        return any(map(self._objects.is_hidden, self._queue.missing(client, request_id)))

    def answer_now(self, client: int, request_id: int) -> None:
        """Answer a get with what it has; one that was answered meanwhile needs nothing."""
        get = self._remove(client, request_id)
        if get is not None:
            self._outgoing.reply(client, request_id, Objects(get.found))

    def _remove(self, client: int, request_id: int) -> PendingGet | None:
        get = self._queue.remove(client, request_id)
        if get is not None:
            self._wanted.withdraw(get)
            self._sessions[client].lent.difference_update(get.request.slots)
        return get

    def forget(self, client: int) -> None:
        """Drop all gets of a client that has left."""
        for get in self._queue.forget(client):
            self._wanted.withdraw(get)

    def __bool__(self) -> bool:
        """Tell whether anybody waits for an object."""
        return bool(self._queue)

    def check(self) -> None:
        """Prove that the queue is in order."""
        self._queue.check()
