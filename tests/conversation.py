"""Clients and a store that talk without a network: what one says, the other is handed at once.

`RecordedMemory` stands for the machine, an anonymous mapping for the segment, and a `Peer` for a client: it
sends requests, keeps the replies, and reads and writes its part of the segment as a real client does.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence
from struct import Struct
from types import SimpleNamespace
from typing import NamedTuple, TypeVar, cast

from shmplasma.absence import Absence
from shmplasma.attachment import Attachment
from shmplasma.census import Census
from shmplasma.commitment import FLOOR_BYTES
from shmplasma.effects import (
    Adopt,
    Await,
    Descriptor,
    Drop,
    Effect,
    Forget,
    HandOver,
    Replay,
    Send,
)
from shmplasma.errors import CommitError
from shmplasma.layout import (
    ALIGNMENT,
    CONTROL_BYTES,
    OUTBOX_BYTES,
    STATE_MASK,
    ControlWord,
    EntryState,
    HeaderWord,
    Layout,
)
from shmplasma.outbox import Outbox
from shmplasma.parts import Parts, Unsettled
from shmplasma.pins import slots_of
from shmplasma.posted import Posted, Remove, Seal
from shmplasma.protocol import (
    MAX_REPLY_BYTES,
    ONE_WAY,
    PROTOCOL_VERSION,
    Frame,
    FrameDecoder,
    encode_frame,
)
from shmplasma.replies import (
    NOTIFICATION,
    Created,
    Failed,
    Failure,
    Found,
    Listing,
    Objects,
    Reply,
    Welcome,
    decode_reply,
)
from shmplasma.reports import list_objects
from shmplasma.requests import AnswerNow, Create, Get, Hello, Post, Request, Role
from shmplasma.settling import Settling
from shmplasma.spilling import HEADER_BYTES, ExternalLimits
from shmplasma.store import ObjectStore
from shmplasma.table import NO_ENTRY
from shmplasma.transfers import Delete, Job, Read, Write

__all__ = [
    "TOKEN",
    "Conversation",
    "Peer",
    "Record",
    "RecordedMemory",
    "census_in",
    "ids_of",
    "name",
    "new_segment",
    "outbox_in",
    "records",
]

TOKEN = bytes(range(16))
PAGE_BYTES = 4096

_T = TypeVar("_T", bound=Reply)


def name(number: int) -> bytes:
    """Return an object id that is easy to tell from others."""
    return number.to_bytes(20, "big")


class Record(NamedTuple):
    """What a listing says of an object; times in ns since 1970, and from then to the seal."""

    object_id: bytes
    data_size: int
    metadata_size: int
    holders: int
    created_ns: int
    construct_ns: int
    sealed: bool
    keep: bool


_ENTRY = Struct("@Q20s12xQQ8xQQ16xQ24x")
_CREATED = int(EntryState.CREATED)


def records(listing: Listing) -> list[Record]:
    """Return what a listing says."""
    entries = _ENTRY.iter_unpack(listing.entries)
    holders = memoryview(listing.holders).cast("I")
    return [
        Record(
            object_id, data, metadata, n, created, took, word & STATE_MASK != _CREATED, keep != 0
        )
        for (word, object_id, data, metadata, created, took, keep), n in zip(
            entries, holders, strict=True
        )
    ]


def ids_of(listing: Listing) -> list[bytes]:
    """Return the ids of a listing, in its order."""
    return [record.object_id for record in records(listing)]


def census_in(talk: Conversation) -> Census:
    """Return what a client lists objects by that does not wait until all is read."""
    segment = cast(
        "Attachment", SimpleNamespace(layout=talk.layout, read_map=talk.raw, words=talk.words)
    )
    absence = Absence(segment)
    settling = SimpleNamespace(all_is_read=lambda: absence.unread() == [])
    return Census(segment, cast("Settling", settling))


def new_segment(layout: Layout) -> tuple[memoryview, memoryview]:
    """Return an empty segment as words and as bytes; it costs memory only where it is touched."""
    raw = memoryview(mmap.mmap(-1, layout.segment_bytes))
    return raw.cast("Q"), raw


POLLED = int(HeaderWord.POLLED)
INCARNATION = int(HeaderWord.INCARNATION)


def outbox_in(layout: Layout, words: memoryview, board: int) -> Outbox:
    """Return the outbox that belongs to a board, as its client has it."""
    start = (layout.outboxes + board * OUTBOX_BYTES) // 8
    count = (layout.control + board * CONTROL_BYTES) // 8 + ControlWord.ACKNOWLEDGED
    page = words[start : start + OUTBOX_BYTES // 8]
    header = (words[at : at + 1] for at in (POLLED, INCARNATION))
    return Outbox(page, words[count : count + 1], *header)


class RecordedMemory:
    """The machine's memory: it notes commits, holes and barriers, and can refuse to commit.

    Parameters
    ----------
    raw : memoryview, optional
        The segment, whose contents are lost in a hole.

    Attributes
    ----------
    commits : list
        Offset and size of each commit, in bytes.
    punches : list
        Offset and size of each hole.
    pages : set of int
        Numbers of the pages behind which there is memory.
    keeps_all : bool
        Whether it takes no memory back.
    barriers : int
        How many barriers there were.
    refuse_from : int or None
        Offset in the segment from which on nothing can be committed.
    at_barrier : callable or None
        What other processes do at the moment of the next barrier.
    locked : set of int
        What other processes have locked.
    locks : int
        How much the store has locked.
    """

    has_barrier = True

    def __init__(self, raw: memoryview | None = None) -> None:
        self._raw = raw
        self.commits: list[tuple[int, int]] = []
        self.punches: list[tuple[int, int]] = []
        self.pages: set[int] = set()
        self.keeps_all = False
        self.barriers = 0
        self.refuse_from: int | None = None
        self.at_barrier: Callable[[], object] | None = None
        self.locked: set[int] = set()
        self.locks = 0

    def commit(self, offset: int, size_bytes: int) -> None:
        """Note a commit, or refuse it."""
        if self.refuse_from is not None and offset + size_bytes > self.refuse_from:
            raise CommitError(size_bytes, 123, "free some memory")
        self.commits.append((offset, size_bytes))
        self.pages.update(_pages(offset, size_bytes))

    def punch(self, offset: int, size_bytes: int) -> bool:
        """Make a hole, or refuse to."""
        assert not offset % PAGE_BYTES
        if self.keeps_all:
            return False
        self.punches.append((offset, size_bytes))
        self.pages.difference_update(_pages(offset, size_bytes))
        if self._raw is not None:
            self._raw[offset : offset + size_bytes] = bytes(size_bytes)
        return True

    def has(self, offset: int, size_bytes: int) -> bool:
        """Tell whether a range can be touched."""
        return self.pages.issuperset(_pages(offset, size_bytes))

    def lock(self, at: int) -> bool:
        """Lock what nobody else has."""
        self.locks += at not in self.locked
        return at not in self.locked

    def unlock(self) -> None:
        """Unlock it."""
        self.locks = 0

    def barrier(self) -> None:
        """Note a barrier, and let happen what is to happen at it, once."""
        self.barriers += 1
        at_barrier, self.at_barrier = self.at_barrier, None
        if at_barrier is not None:
            at_barrier()


def _pages(offset: int, size_bytes: int) -> range:
    return range(offset // PAGE_BYTES, -(-(offset + size_bytes) // PAGE_BYTES))


class Peer:
    """A connection, seen from its client.

    Attributes
    ----------
    replies : dict
        Replies that were not asked for yet, by request id.
    descriptors : list of Descriptor
        Those that came along with replies.
    dropped : str or None
        Why the store ended the connection.
    free_slots : list of int
        Slots that the client may lend, the next one last.
    notifications : list of tuple
        What a subscriber was told: id, data size, metadata size.
    """

    def __init__(self, conversation: Conversation, number: int) -> None:
        self._conversation = conversation
        self.number = number
        self.replies: dict[int, Reply] = {}
        self.descriptors: list[Descriptor] = []
        self.dropped: str | None = None
        self.free_slots: list[int] = []
        self.notifications: list[tuple[bytes, int, int]] = []
        self._awaits_notifications = False
        self._decoder = FrameDecoder(MAX_REPLY_BYTES)
        self.last_id = 0
        self._answered: set[int] = set()
        self._role = Role.CLIENT

    # -- messages ------------------------------------------------------------------------------

    def receive(self, send: Send) -> None:
        """Take in what the store has sent."""
        if send.descriptor is not None:
            self.descriptors.append(send.descriptor)
        if self._awaits_notifications:
            assert int.from_bytes(send.data[:8], "little") == NOTIFICATION.size
            self.notifications.append(NOTIFICATION.unpack(send.data[8:]))
            return
        (frame,) = self._decoder.feed(send.data)
        assert frame.request_id not in self._answered, "a request was answered twice"
        assert 0 < frame.request_id <= self.last_id, "a reply to no request"
        self._answered.add(frame.request_id)
        reply = self.replies[frame.request_id] = decode_reply(frame)
        self._awaits_notifications = isinstance(reply, Welcome) and self._role is Role.SUBSCRIBER

    def post(self, request: Request) -> int:
        """Send a request and return its id; the answer may come later."""
        self.last_id += 1
        self._conversation.deliver(self, request, self.last_id)
        return self.last_id

    def tell(self, request: Request) -> None:
        """Send a one-way message as a frame of its own, whatever a real client would do."""
        self._conversation.deliver(self, request, ONE_WAY)

    def write(self, message: Posted) -> None:
        """Post something as clients do: a record, and a message which says that there is one."""
        self.write_silently(message)
        self.tell(Post())

    def write_silently(self, message: Posted) -> bool:
        """Write a record, and be interrupted before the message that says so; tell whether there would have been one."""
        count = self.outbox.append(message.KIND, message.encode())
        assert count
        return count < 0

    def remove(self, object_id: bytes) -> None:
        """Delete a sealed object as clients do that need not wait, when the store sleeps on it."""
        self.write_silently(self._conversation.removal(object_id))
        self._conversation.mark(object_id)

    def ask(self, request: Request, expected: type[_T]) -> _T:
        """Send a request, let the store do all that it has to do, and return the reply."""
        request_id = self.post(request)
        self._conversation.turn()
        return self.take(request_id, expected)

    def take(self, request_id: int, expected: type[_T]) -> _T:
        """Return the reply to a request, which has come."""
        reply = self.replies.pop(request_id)
        assert isinstance(reply, expected), reply
        return reply

    def refused(self, request: Request) -> Failure:
        """Send a request that is refused, and return why."""
        return self.ask(request, Failed).failure

    def hello(self, role: Role = Role.CLIENT, text: str = "") -> Welcome:
        """Introduce this connection."""
        self._role = role
        welcome = self.ask(Hello(PROTOCOL_VERSION, role, text), Welcome)
        if role is Role.CLIENT:
            self.free_slots = list(reversed(slots_of(welcome.board)))
            self.outbox = self._conversation.outbox(welcome.board)
        return welcome

    # -- objects -------------------------------------------------------------------------------

    def new(
        self, object_id: bytes, data_size: int = 64, metadata_size: int = 0, codec: int = 0
    ) -> Create:
        """Return a request for a new object, with a slot that is free."""
        return Create(object_id, data_size, metadata_size, codec, self.free_slots.pop())

    def create(self, object_id: bytes, data_size: int = 64, metadata_size: int = 0) -> int:
        """Create an object and return the slot that pins it."""
        request = self.new(object_id, data_size, metadata_size)
        self.ask(request, Created)
        return request.slot

    def put(self, object_id: bytes, data_size: int = 64, metadata_size: int = 0) -> None:
        """Create an object, seal it, and let go of it."""
        slot = self.create(object_id, data_size, metadata_size)
        self.write(Seal(object_id))
        self.release(slot)

    def wanted(
        self, object_ids: Sequence[bytes], *, wait: bool = False, hinted: bool = False
    ) -> Get:
        """Return a request for objects, with slots that are free."""
        return Get(wait, object_ids, [self.free_slots.pop() for _ in object_ids], hinted)

    def get(self, *object_ids: bytes) -> tuple[list[Found], list[int]]:
        """Get objects without waiting; return where they are, and the slots that were lent."""
        request = self.wanted(object_ids)
        return list(self.ask(request, Objects).found), list(request.slots)

    def answer_now(self, request_id: int) -> list[Found]:
        """End the wait of a get and return its answer."""
        self.tell(AnswerNow(request_id))
        self._conversation.turn()
        return list(self.take(request_id, Objects).found)

    def release(self, slot: int) -> None:
        """Let go of what a slot pins, as the finalizer of a buffer does."""
        self._conversation.write_slot(slot, 0)
        self.free_slots.append(slot)


class Conversation:
    """A store on a segment of its own, and the clients that talk to it.

    Parameters
    ----------
    capacity : int
        The store's capacity in bytes.
    floor_bytes : int
        How much free room stays committed.
    external : ExternalLimits, optional
        How much an external store takes, if there is one.

    Attributes
    ----------
    containers : dict
        What is in the external store, by number.
    failure : str
        Why whatever is asked of it fails; empty if it does not.
    processes_live_on : bool
        Whether a process goes on when its connection has ended, until `end_process`.
    awaited : list of Await
        The processes whose end the store waits for.
    """

    processes_live_on = False

    def __init__(
        self,
        capacity: int = 65536,
        floor_bytes: int = FLOOR_BYTES,
        external: ExternalLimits | None = None,
    ) -> None:
        self.external = external
        self.containers: dict[int, bytes] = {}
        self.failure = ""
        self.layout = Layout.plan(capacity, PAGE_BYTES)
        self.words, self.raw = new_segment(self.layout)
        self.floor_bytes = floor_bytes
        self.memory = RecordedMemory(self.raw)
        self.store = self.new_store(self.words, self.raw)
        self.peers: dict[int, Peer] = {}
        self.awaited: list[Await] = []
        self.successor: int | None = None
        self.now_ns = 1_000_000_000
        self.steady_ns = 0
        self.idle_ns = 0
        self._connections = 0

    def new_store(self, words: memoryview, raw: memoryview) -> ObjectStore:
        """Return a store on this segment."""
        parts = Parts(
            self.layout,
            TOKEN,
            words,
            raw,
            "posix",
            "/segment",
            self.memory,
            lambda: self.steady_ns,
            floor_bytes=self.floor_bytes,
            external=self.external,
        )
        return ObjectStore(parts)

    # -- connections ---------------------------------------------------------------------------

    def connect(self) -> Peer:
        """Return a new connection that has not said anything."""
        self._connections += 1
        peer = self.peers[self._connections] = Peer(self, self._connections)
        self.store.connect(peer.number, 4711, 1, self.now_ns)
        return peer

    def client(self, text: str = "") -> Peer:
        """Return a client that has introduced itself."""
        peer = self.connect()
        peer.hello(text=text)
        return peer

    def subscriber(self) -> Peer:
        """Return a subscriber, which has been told what is there."""
        peer = self.connect()
        peer.hello(Role.SUBSCRIBER)
        return peer

    def disconnect(self, peer: Peer) -> None:
        """Close a connection from the client's side, or end the process of one that was dropped."""
        self.peers.pop(peer.number, None)
        self.carry_out(self.store.disconnect(peer.number, self.now_ns))

    # -- the store's loop ----------------------------------------------------------------------

    def deliver(self, peer: Peer, request: Request, request_id: int) -> None:
        """Hand a request to the store."""
        self.deliver_body(peer, request.KIND, request_id, request.encode())

    def deliver_body(self, peer: Peer, kind: int, request_id: int, body: bytes) -> None:
        """Hand a message to the store, whatever it is."""
        (frame,) = FrameDecoder(1 << 30).feed(encode_frame(kind, request_id, body))
        self.deliver_frame(peer, frame)

    def deliver_frame(self, peer: Peer, frame: Frame) -> None:
        """Hand a frame to the store."""
        self.now_ns += 1000
        self.carry_out(self.store.handle(peer.number, frame, self.now_ns))
        self.carry_out(self.store.settled())

    def turn(self) -> None:
        """Do what a turn of the store's loop does: settle, and commit what somebody waits for."""
        if self.store.has_waiters:
            self.carry_out(self.store.offer_room(self.steady_ns, self.now_ns))
        while self.store.has_unsettled or self.store.upkeep.has_urgent_work:
            self.settle()
            if self.store.upkeep.has_urgent_work:
                self.advance()
            elif self.store.has_waiters:
                self.carry_out(self.store.offer_room(self.steady_ns, self.now_ns))

    def settle_outside(self) -> None:
        """Do turns, and what the external store is asked for, until nothing is asked any more."""
        self.turn()
        while jobs := self.take_jobs():
            for job in jobs:
                self.do(job)
                self.turn()

    def take_jobs(self) -> list[Job]:
        """Return what the external store is asked for."""
        jobs, effects = self.store.take_jobs()
        self.carry_out(effects)
        return list(jobs)

    def do(self, job: Job) -> None:
        """Do what the external store is asked for, and tell what came of it."""
        places: list[int] = []
        if isinstance(job, Delete):
            for number in job.numbers:
                self.containers.pop(number, None)
        elif isinstance(job, Write) and not self.failure:
            data = b""
            for part in job.parts:
                places.append(len(data))
                data += bytes(HEADER_BYTES)
                data += bytes(part.contents(self.raw))
                data += bytes(-len(data) % ALIGNMENT)
            self.containers[job.number] = data
        elif isinstance(job, Read) and not self.failure:
            start = job.place + HEADER_BYTES
            data = self.containers[job.number][start : start + job.part.size_bytes]
            job.part.contents(self.raw)[:] = data
        failure = "" if isinstance(job, Delete) else self.failure
        self.carry_out(self.store.job_done(job, places, failure))

    def settle(self, unsettled: Sequence[Unsettled] | None = None) -> None:
        """Answer what had to wait for a drain."""
        unsettled = self.store.take_unsettled() if unsettled is None else unsettled
        self.carry_out(self.store.settle(unsettled))
        self.carry_out(self.store.settled())

    def commit_ahead(self) -> None:
        """Commit memory as an idle store does, until that is enough."""
        while not self.store.commitment.is_ahead:
            self.store.commitment.step_ahead()

    def trim(self, seconds: float = 60) -> None:
        """Let the store be idle until so many seconds have passed, and give memory back as it does then."""
        self.idle_ns += int(seconds * 1e9)
        while self.store.trims.idle_ns(self.idle_ns) == 0:
            self.store.trims.advance_idle(self.idle_ns)

    def advance(self) -> None:
        """Do one step of the store's urgent work, and offer what room that has made."""
        self.carry_out(self.store.upkeep.advance(self.now_ns))
        if self.store.has_waiters:
            self.carry_out(self.store.offer_room(self.steady_ns, self.now_ns))

    def poll(self) -> None:
        """Have the store look into the outboxes."""
        self.carry_out(self.store.poll(self.now_ns))

    def later(self, seconds: float) -> None:
        """Let time pass, and the store do what it then has to do."""
        self.now_ns += round(seconds * 1e9)
        self.steady_ns += round(seconds * 1e9)
        while self.store.ledger.wait_ns == 0:
            self.store.expire(self.now_ns)
        self.turn()

    def glance(self) -> int:
        """Have the store look into outboxes while it looks for messages; return how much was there."""
        count, effects = self.store.glance(self.now_ns)
        self.carry_out([*effects, *self.store.settled()])
        return count

    def wake(self) -> None:
        """Have the store look for releases."""
        self.carry_out(self.store.wake())

    def carry_out(self, effects: Iterable[Effect]) -> None:
        """Do what the server does with effects."""
        for effect in effects:
            if isinstance(effect, Await):
                self.awaited.append(effect)
                if not self.processes_live_on:
                    self.end_process(effect)
                continue
            if isinstance(effect, Forget):
                assert self.store.knows(effect.client)
                self.peers.pop(effect.client, None)
                self.carry_out(self.store.disconnect(effect.client, self.now_ns))
                continue
            peer = self.peers.get(effect.client)
            if peer is None:
                continue
            if isinstance(effect, Drop):
                peer.dropped = effect.reason
                del self.peers[peer.number]
                if not self.store.expel(peer.number):
                    self.carry_out(self.store.disconnect(peer.number, self.now_ns))
            elif isinstance(effect, Adopt):
                del self.peers[effect.client]
                peer.number = effect.number
                self.peers[peer.number] = peer
            elif isinstance(effect, HandOver):
                self.successor = effect.client
            elif isinstance(effect, Replay):
                for start in range(0, len(effect.data), 8 + NOTIFICATION.size):
                    data = effect.data[start : start + 8 + NOTIFICATION.size]
                    peer.receive(Send(effect.client, data))
            else:
                peer.receive(effect)

    def end_process(self, sender: Await) -> None:
        """End a process that lives on when its connection has ended."""
        self.awaited.remove(sender)
        self.store.ledger.end_process(sender.client)

    # -- the segment ---------------------------------------------------------------------------

    def outbox(self, board: int) -> Outbox:
        """Return the outbox that belongs to a board, as its client has it."""
        return outbox_in(self.layout, self.words, board)

    def write_slot(self, slot: int, word: int) -> None:
        """Write a word to a board."""
        self.words[self.layout.boards // 8 + slot] = word

    def read_slot(self, slot: int) -> int:
        """Return a word of a board."""
        return self.words[self.layout.boards // 8 + slot]

    @property
    def wake_word(self) -> int:
        """Whether the header's word asks clients to wake the store: 0 or 1."""
        return min(1, self.words[HeaderWord.WAKE])

    def removal(self, object_id: bytes) -> Remove:
        """Return what deletes the object that there is of this name, if there is one."""
        table = self.store._parts.table
        entry = table.find(object_id)
        return Remove(object_id, 0 if entry == NO_ENTRY else table.created_ns(entry))

    def mark(self, object_id: bytes) -> None:
        """Mark an object as who deletes it does: its record is written."""
        table = self.store._parts.table
        entry = table.find(object_id)
        self.mark_word(entry, table.state_word(entry))

    def mark_word(self, entry: int, word: int) -> None:
        """Write an entry's mark."""
        self.words[self.layout.marks // 8 + entry] = word

    def ids(self) -> set[bytes]:
        """Return the ids of all objects, sealed or not, as a listing has them."""
        listing = list_objects(self.store._parts.table, {}, 0)
        assert listing.next_start == 0
        return set(ids_of(listing))
