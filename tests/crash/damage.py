"""A segment whose store dies between any two of its stores to memory, and one in which bits have flipped.

`Dying` stands between the state machine and the segment.  It counts the writes, and raises `Death` instead of
one of them; what was written before stays, as it does in shared memory.  A write of several words is cut in the
middle as well.  `Reopened` gives the same memory to a new store.
"""

from __future__ import annotations

from typing import Any, TypeVar

from shmplasma.commitment import FLOOR_BYTES
from shmplasma.layout import (
    BOARD_WORDS,
    CONTROL_BYTES,
    OUTBOX_BYTES,
    ControlWord,
    EntryWord,
    HeaderWord,
    Layout,
)
from shmplasma.moves import PIECE_BYTES
from shmplasma.outbox import read_record
from shmplasma.posted import Posted
from shmplasma.protocol import ONE_WAY, PROTOCOL_VERSION
from shmplasma.replies import Reply, Welcome
from shmplasma.requests import Create, Get, Hello, Post, Request, Role
from shmplasma.spilling import ExternalLimits
from shmplasma.store import ObjectStore
from tests.conversation import Conversation, Peer, RecordedMemory

__all__ = ["Death", "Mortal", "Reopened"]

_T = TypeVar("_T", bound=Reply)


class Death(BaseException):
    """The store is killed here."""


class Dying:
    """A memoryview that can die at a write.

    Parameters
    ----------
    view : memoryview
        The segment.
    clock : Clock
        Counts the writes of all views together.
    """

    def __init__(self, view: memoryview, clock: Clock) -> None:
        self._view = view
        self._clock = clock

    def __getitem__(self, key: Any) -> Any:
        return self._view[key]

    def __len__(self) -> int:
        return len(self._view)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, slice):
            start, stop, _ = key.indices(len(self._view))
            half = (stop - start) // 16 * 8
            if half:  # the first half of it may be all that is written
                self._clock.tick()
                self._view[start : start + half] = value[:half]
        self._clock.tick()
        self._view[key] = value


class Clock:
    """Counts writes, and ends the life of a store at one of them.

    Attributes
    ----------
    writes : int
        How many there were.
    dies_at : int or None
        The number of the write that does not happen.
    pauses : list of int
        How many writes the following stores live, the next one last.
    """

    def __init__(self) -> None:
        self.writes = 0
        self.dies_at: int | None = None
        self.pauses: list[int] = []

    def next_death(self) -> int | None:
        """Return the number of the write at which the next store dies, if it does."""
        return self.writes + self.pauses.pop() if self.pauses else None

    def tick(self) -> None:
        """Count a write, or raise `Death`."""
        if self.writes == self.dies_at:
            raise Death
        self.writes += 1


class Mortal(Conversation):
    """A conversation with a store that can die; its clients go on with the next one.

    Parameters
    ----------
    capacity : int
        The store's capacity in bytes.
    external : ExternalLimits, optional
        How much an external store takes, if there is one.
    piece_bytes : int
        How much of an object its stores move in one go.

    Attributes
    ----------
    clock : Clock
        The store's writes.
    deaths : int
        How often it has died.
    """

    def __init__(
        self,
        capacity: int = 4 << 20,
        external: ExternalLimits | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        super().__init__(capacity, floor_bytes=0, external=external)
        self.clock = Clock()
        self._piece_bytes = piece_bytes
        self.deaths = 0
        self._may_be_there: set[bytes] = set()
        self.store = self._new_store()
        self._connections = self.layout.n_boards
        self._boards: dict[Peer, int] = {}

    def _new_store(self) -> ObjectStore:
        words: Any = Dying(self.words, self.clock)
        raw: Any = Dying(self.raw, self.clock)
        store = self.new_store(words, raw)
        store._parts.moves.piece_bytes = self._piece_bytes
        return store

    def enter(self) -> Peer:
        """Return a client that has introduced itself."""
        try:
            peer = self.client()
        except Death:
            self.peers.popitem()
            self.revive()
            return self.enter()
        self._boards[peer] = peer.free_slots[-1] // BOARD_WORDS
        return peer

    def call(self, peer: Peer, request: Request, expected: type[_T]) -> _T:
        """Ask, and ask again where the store dies, as `shmplasma.link` does."""
        while True:
            try:
                return peer.ask(request, expected)
            except Death:
                self.revive()
                if isinstance(request, Get | Create):
                    for slot in request.slots if isinstance(request, Get) else (request.slot,):
                        self.write_slot(slot, 0)

    def tell(self, peer: Peer, message: Posted) -> None:
        """Post something to the store."""
        try:
            peer.write(message)
        except Death:
            self.revive()

    def glance(self) -> int:
        """Have the store look into outboxes; at a death its successor does."""
        try:
            return super().glance()
        except Death:
            self.revive()
            return 0

    def trim(self, seconds: float = 60) -> None:
        """Let the store be idle for so long, as far as it lives."""
        try:
            super().trim(seconds)
        except Death:
            self.revive()

    def wake(self) -> None:
        """Have the store look for releases."""
        try:
            super().wake()
        except Death:
            self.revive()

    def leave(self, peer: Peer) -> None:
        """End a client's process."""
        del self._boards[peer]
        try:
            self.disconnect(peer)
        except Death:
            self.peers.pop(peer.number, None)
            self.revive()

    def revive(self) -> None:
        """Start another store on the same memory, which may die as well, and let the clients connect to it."""
        peers = list(self._boards)
        living = set(self._boards.values())
        while True:
            self.deaths += 1
            if not self.words[HeaderWord.INSERTIONS] & 1:
                self._may_be_there = self._linked() | self._posted()
            self.clock.dies_at = self.clock.next_death()
            self.store = self._new_store()
            self.peers.clear()
            try:
                # All clients are of one process here; a board tells whose it is.
                clients, _ = self.store.recover(lambda *_: True, self.now_ns)
                for board in set(clients) - living:
                    self.carry_out(self.store.disconnect(board, self.now_ns))
                self.store.check()
                assert self._linked() <= self._may_be_there, (
                    "what was in no chain is an object again"
                )
                self.store.tidy_external({n: len(data) for n, data in self.containers.items()})
                for peer in peers:
                    self._connect_again(peer)
            except Death:
                continue
            return

    def _linked(self) -> set[bytes]:
        """Return the ids that a client finds to be taken."""
        ids: set[bytes] = set()
        layout, words = self.layout, self.words
        for head in words[layout.buckets // 8 : layout.buckets // 8 + layout.n_buckets]:
            entry = head
            while entry:
                start = layout.entry(entry - 1)
                ids.add(bytes(self.raw[start + 8 : start + 28]))
                entry = words[start // 8 + EntryWord.NEXT]
        return ids

    def _posted(self) -> set[bytes]:
        """Return the ids in records that were not acknowledged; their clients have locked them."""
        ids: set[bytes] = set()
        layout = self.layout
        for board in range(layout.n_boards):
            count = (layout.control + board * CONTROL_BYTES) // 8 + ControlWord.ACKNOWLEDGED
            start = layout.outboxes + board * OUTBOX_BYTES
            page, read = self.raw[start : start + OUTBOX_BYTES], self.words[count]
            while record := read_record(page, read):
                ids.add(record[1][:20])
                read += 1
        return ids

    def _connect_again(self, peer: Peer) -> None:
        self._connections += 1
        peer.number = self._connections
        self.peers[peer.number] = peer
        self.store.connect(peer.number, 4711, 1, self.now_ns)
        hello = Hello(PROTOCOL_VERSION, Role.CLIENT, "", self._boards[peer] + 1)
        assert peer.ask(hello, Welcome).reclaimed
        self.deliver(peer, Post(), ONE_WAY)


class Reopened(Conversation):
    """A conversation with a store that was started on memory which another one has left; all clients live.

    Parameters
    ----------
    layout : Layout
        What lies where.
    words, raw : memoryview
        The segment.
    """

    def __init__(self, layout: Layout, words: memoryview, raw: memoryview) -> None:
        self.layout, self.words, self.raw = layout, words, raw
        self.memory = RecordedMemory(raw)
        self.floor_bytes = FLOOR_BYTES
        self.external, self.containers, self.failure = None, {}, ""
        self.store = self.new_store(words, raw)
        self.peers, self.awaited = {}, []
        self.now_ns = 2_000_000_000
        self.steady_ns = 0
        self.idle_ns = 0
        self._connections = layout.n_boards
        self.store.recover(lambda *_: True, self.now_ns)
        self.store.check()
