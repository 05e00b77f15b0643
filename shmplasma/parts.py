"""The parts that a store is made of: each owns a piece of its state; here they are joined.  Pure.

They are made from the bottom up, and each is given those that it asks.  What goes the other way is a callable: of an object that
leaves all are told who may wait for it or own it.  What works on nearly all of them (`shmplasma.dispatch`, `shmplasma.posts`,
`shmplasma.jobs`, `shmplasma.upkeep`) is given them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from shmplasma.answers import Answers
from shmplasma.commitment import FLOOR_BYTES
from shmplasma.control import Control
from shmplasma.creations import Creations, Creator
from shmplasma.deletions import Deletions
from shmplasma.gets import PendingGet
from shmplasma.greeting import Greeter
from shmplasma.hints import Wanted
from shmplasma.layout import Layout
from shmplasma.leases import Leases
from shmplasma.ledger import Ledger
from shmplasma.lifecycle import Lifecycle
from shmplasma.memory import Memory
from shmplasma.moves import Moves
from shmplasma.outbox import Polling
from shmplasma.outgoing import Outgoing
from shmplasma.pins import Boards
from shmplasma.publishing import Publishing
from shmplasma.refusals import Refusals
from shmplasma.requests import Request
from shmplasma.residents import Residents
from shmplasma.room import Room
from shmplasma.spilling import ExternalLimits, Spilling
from shmplasma.table import Table
from shmplasma.tickets import TICKET_NS
from shmplasma.trims import Trims
from shmplasma.waiters import RoomQueue

__all__ = ["Parts", "Unsettled"]

Unsettled = tuple[int, int, Request, int]
"""Client, request id, request and its time: what waits until all outboxes are read."""


class Parts:
    """The parts of one store, each under the name of what it is.

    Parameters
    ----------
    layout : Layout
        The segment's layout.
    token : bytes
        The segment's identity.
    words, raw : memoryview
        The segment as native 8-byte words and as bytes, writable.
    segment_kind, segment_path : str
        How a client finds the segment; passed on as they are.
    memory : Memory
        Commits pages and issues barriers.
    clock : callable
        Returns the time, by a clock that only goes forward, in nanoseconds.
    client_limit_bytes : int, optional
        What a client may hold that has no limit of its own; 0 for no limit.
    ticket_ns : int, optional
        As for `shmplasma.tickets.Tickets`.
    floor_bytes : int, optional
        How much memory that is not used stays committed.
    external : ExternalLimits, optional
        What an external store may take, if there is one.

    Attributes
    ----------
    unsettled : list of Unsettled
        Requests that are to be settled; the same list for as long as this lives.
    """

    def __init__(
        self,
        layout: Layout,
        token: bytes,
        words: memoryview,
        raw: memoryview,
        segment_kind: str,
        segment_path: str,
        memory: Memory,
        clock: Callable[[], int],
        *,
        client_limit_bytes: int = 0,
        ticket_ns: int = TICKET_NS,
        floor_bytes: int = FLOOR_BYTES,
        external: ExternalLimits | None = None,
    ) -> None:
        self.layout = layout
        self.words, self.raw = words, raw
        self.memory = memory
        self.unsettled: list[Unsettled] = []
        self.outgoing = Outgoing()
        self.table = Table(layout, words, raw, memory.commit)
        self.control = Control(layout, words)
        self.boards = Boards(layout, words, raw, self.control, memory.commit)
        visited = raw[layout.visited : layout.visited + layout.n_entries]
        self.moves = Moves(words, raw, self.table)
        residents = Residents(self.table, visited)
        self.room = Room(
            layout, words, self.table, self.boards, residents, memory, self.moves, floor_bytes
        )
        leases = Leases(layout, words, self.control)
        self.objects = Lifecycle(
            layout,
            words,
            self.table,
            self.boards,
            self.room,
            leases,
            memory,
            self._gone,
        )
        if external is not None:
            self.objects.spilling = Spilling(
                self.table, self.boards, self.room, layout.capacity, external
            )
        self.publishing = Publishing(self.table, self.room, leases, self.objects, memory)
        self.deletions = Deletions(self.table, self.objects, self.room.mover)
        self.ledger = Ledger(
            self.table, self.boards, self.room, self.deletions, self.outgoing, clock, ticket_ns
        )
        self.greeter = Greeter(
            layout,
            token,
            (segment_kind, segment_path),
            self.table,
            self.boards,
            self.outgoing,
            memory,
            client_limit_bytes,
        )
        self.wanted = Wanted(words, self.boards, memory)
        self.answers = Answers(
            self.table,
            self.boards,
            residents,
            self.objects,
            self.wanted,
            self.outgoing,
            self.greeter.sessions,
        )
        self.queue = queue = RoomQueue[Creator]()
        sessions = self.greeter.sessions
        self.refusals = Refusals(
            layout, self.table, self.boards, self.room, self.objects, sessions, queue
        )
        self.creations = Creations(
            self.table,
            self.boards,
            self.room,
            self.objects,
            self.publishing,
            self.refusals,
            self.outgoing,
            queue,
        )
        self.trims = Trims(self.room.commitment, self.outgoing)
        self.polling = Polling(words, memory.barrier, possible=memory.has_barrier)

    def answer_later(self, gets: Iterable[PendingGet]) -> None:
        """Have gets that do not wait any more answered once all outboxes are read."""
        self.unsettled += [
            (get.client, get.request_id, get.request, 0)  # whose answer asks for no time
            for get in gets
        ]

    def _gone(self, object_id: bytes) -> None:
        self.ledger.references.forget_object(object_id)
        self.outgoing.gone(object_id)
        if self.answers:
            self.answer_later(self.answers.gone(object_id))

    def check(self) -> None:
        """Prove the invariants of all parts."""
        self.objects.check()
        self.deletions.check()
        self.answers.check()
        self.creations.check()
        self.ledger.references.check()
