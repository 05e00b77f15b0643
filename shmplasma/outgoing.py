"""What a store has to say: replies, notifications, and the other effects, in order.  Pure.

Subscribing
-----------
A subscriber is told of each object that is sealed when its `Hello` is answered, and of each later change, once and in order.  The
list of these objects is made so many entries at a time, between requests, and then the `Hello` is answered.  What changes meanwhile is
added to the list where it concerns what was listed: an object in an entry that was looked at already, or one that was told of
and goes.  Anything else is found when its entry is looked at, or is not there any more.

The list waits for the subscriber, not the store: a connection sends it as fast as it is read, and keeps later notifications behind it
(`shmplasma.connections`).  So an object that goes meanwhile is told of first, and what is in its entry by then is another matter.
It has 44 bytes an object, for as long as it is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from shmplasma.effects import Descriptor, Effect, Replay, Send
from shmplasma.protocol import ONE_WAY, encode_frame
from shmplasma.replies import Reply
from shmplasma.reports import notification, sealed_notifications
from shmplasma.table import Table

__all__ = ["NOTHING", "Outgoing"]

NOTHING: Final[Sequence[Effect]] = ()

_LISTED_AT_ONCE: Final = 4096
"""Entries for a first list between two requests: 2 ms."""


@dataclass(slots=True)
class _FirstList:
    """What a subscriber is to be told first, as far as it is made, and of which objects."""

    request_id: int
    welcome: Reply
    table: Table
    next_entry: int = 0
    parts: list[bytes] = field(default_factory=list)
    told: list[set[bytes]] = field(default_factory=list)

    def go_on(self) -> None:
        start, self.next_entry = self.next_entry, self.next_entry + _LISTED_AT_ONCE
        sealed = self.table.summaries(start, self.next_entry)
        told: set[bytes] = set()
        self.parts.append(sealed_notifications(sealed, told))
        self.told.append(told)

    def note_sealed(self, entry: int, object_id: bytes, data: bytes) -> None:
        if entry < self.next_entry:
            self.told[-1].add(object_id)
            self.parts.append(data)

    def note_gone(self, object_id: bytes, data: bytes) -> None:
        for told in self.told:
            if object_id in told:
                told.remove(object_id)
                self.parts.append(data)


class Outgoing:
    """Collects the effects of a request.

    Attributes
    ----------
    effects : list of Effect
        What is to be done; whoever adds to it keeps the order.
    subscribers : set of int
        The clients that are told of each object that is sealed or goes.
    to_be_told : set of int
        These, and those whose first list is being made.
    """

    __slots__ = ("_lists", "_told", "effects", "subscribers", "to_be_told")

    def __init__(self) -> None:
        self.effects: list[Effect] = []
        self.subscribers: set[int] = set()
        self.to_be_told: set[int] = set()
        self._lists: dict[int, _FirstList] = {}
        self._told: list[set[bytes]] = []  # of lists that are made; freed like they were made

    def take(self) -> Sequence[Effect]:
        """Return the effects that were collected, and begin anew."""
        if not self.effects:
            return NOTHING
        effects, self.effects = self.effects, []
        return effects

    def reply(
        self, client: int, request_id: int, reply: Reply, descriptor: Descriptor | None = None
    ) -> None:
        """Answer a request; nobody waits for the answer to a one-way message."""
        if request_id != ONE_WAY:
            data = encode_frame(reply.KIND, request_id, reply.encode())
            self.effects.append(Send(client, data, descriptor))

    def gone(self, object_id: bytes) -> None:
        """Tell the subscribers that a sealed object has gone."""
        if self.to_be_told:
            data = notification(object_id, -1, -1)
            self.effects += [Send(client, data) for client in self.subscribers]
            for each in self._lists.values():
                each.note_gone(object_id, data)

    def sealed(self, entry: int, object_id: bytes, data_size: int, metadata_size: int) -> None:
        """Tell the subscribers of an object that was sealed."""
        if self.to_be_told:
            data = notification(object_id, data_size, metadata_size)
            self.effects += [Send(client, data) for client in self.subscribers]
            for each in self._lists.values():
                each.note_sealed(entry, object_id, data)

    # -- subscribing ---------------------------------------------------------------------------

    def subscribe(self, client: int, request_id: int, welcome: Reply, table: Table) -> None:
        """Begin with what a new subscriber is told first; that, or `advance`, answers it."""
        self.to_be_told.add(client)
        self._lists[client] = _FirstList(request_id, welcome, table)
        self._go_on(client)

    def unsubscribe(self, client: int) -> None:
        """Tell a client nothing any more."""
        self.to_be_told.discard(client)
        self.subscribers.discard(client)
        self._lists.pop(client, None)

    @property
    def is_listing(self) -> bool:
        """Whether there is something that `advance` has to do."""
        return bool(self._lists or self._told)

    def advance(self) -> None:
        """Do one step of a first list."""
        if self._told:
            self._told.pop()
        else:
            self._go_on(next(iter(self._lists)))

    def _go_on(self, client: int) -> None:
        each = self._lists[client]
        each.go_on()
        if each.next_entry >= each.table.end:
            del self._lists[client]
            self._told += each.told[1:]
            self.reply(client, each.request_id, each.welcome)
            self.effects += [Replay(client, part) for part in each.parts if part]
            self.subscribers.add(client)
