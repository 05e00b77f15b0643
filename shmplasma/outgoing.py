"""What a store has to say: replies, notifications, and the other effects, in order.  Pure.

Subscribing
-----------
A subscriber is told of each object that is sealed when its `Hello` is answered, and of each later change, once and in order.  No
change is missed or told twice, as the table is copied, and the subscriber entered, between two changes.  The copy waits for
the subscriber, not the store: a connection sends it as fast as it is read, and keeps later notifications behind it
(`shmplasma.connections`).  So an object that goes meanwhile is told of first, and what is in its entry by then is another matter.
The copy has 44 bytes an object, for as long as it is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shmplasma.effects import Descriptor, Effect, Replay, Send
from shmplasma.protocol import ONE_WAY, encode_frame
from shmplasma.replies import Reply
from shmplasma.reports import notification, sealed_notifications
from shmplasma.table import Table

__all__ = ["NOTHING", "Outgoing"]

NOTHING: Final[Sequence[Effect]] = ()


class Outgoing:
    """Collects the effects of a request.

    Attributes
    ----------
    effects : list of Effect
        What is to be done; whoever adds to it keeps the order.
    subscribers : set of int
        The clients that are told of each object that is sealed or goes.
    """

    __slots__ = ("effects", "subscribers")

    def __init__(self) -> None:
        self.effects: list[Effect] = []
        self.subscribers: set[int] = set()

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
        self.notify(object_id, -1, -1)

    def notify(self, object_id: bytes, data_size: int, metadata_size: int) -> None:
        """Tell the subscribers of an object that was sealed."""
        if self.subscribers:
            data = notification(object_id, data_size, metadata_size)
            self.effects += [Send(client, data) for client in self.subscribers]

    def replay(self, client: int, table: Table) -> None:
        """Tell a new subscriber of all objects that are sealed."""
        if data := sealed_notifications(table):
            self.effects.append(Replay(client, data))
