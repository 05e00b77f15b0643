"""The store's state machine: requests in, effects out.  Pure; `shmplasma.server` carries the effects out.

It joins the parts that each own a piece of the state: `shmplasma.lifecycle` (what becomes of objects),
`shmplasma.gets` (who waits for them), `shmplasma.pins` (who holds them).  What is left here is the
conversation with each connection.

Invariants
----------
* Every request gets exactly one reply, unless its client is dropped.
* What is no request, or comes at the wrong point of the conversation, costs its sender the connection, and
  nobody else anything.

Order
-----
`Seal` may come one-way, and a client may have sent it before another one even asked.  So an answer that
depends on something *not* being there (contains false, a get that found too little, and whatever describes
the store as a whole) is not given at once: the request is left unsettled, the caller drains every socket
once, and then `ObjectStore.settle` answers.  What was sealed before a question was asked is always found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, assert_never

from shmplasma.control import Control
from shmplasma.effects import Adopt, Descriptor, Drop, Effect, HandOver, Send
from shmplasma.errors import CommitError, ProtocolError
from shmplasma.gets import GetQueue, PendingGet
from shmplasma.layout import BOARD_BYTES, OUTBOX_BYTES, Layout
from shmplasma.lifecycle import Lifecycle, Refused
from shmplasma.outbox import RECORDS, read_record
from shmplasma.pins import Boards
from shmplasma.protocol import ONE_WAY, PROTOCOL_VERSION, Frame, encode_frame
from shmplasma.replies import (
    Created,
    Done,
    Failed,
    Failure,
    Leased,
    Listing,
    Number,
    Objects,
    Reply,
    Text,
    Welcome,
)
from shmplasma.reports import describe, list_objects, notification, sealed_notifications
from shmplasma.requests import (
    Abort,
    AnswerNow,
    AskLease,
    Attach,
    Contains,
    Create,
    Debug,
    Delete,
    Detach,
    Evict,
    Flush,
    Get,
    Grow,
    Hello,
    List,
    Post,
    Publish,
    Request,
    Role,
    Seal,
    SetOptions,
    decode_posted,
    decode_request,
)
from shmplasma.room import Memory, Room
from shmplasma.table import NO_ENTRY, Table

__all__ = ["ObjectStore"]


Unsettled = tuple[int, int, Request, int]
"""Client, request id, request and its time: what waits for a drain."""
_DONE: Final = Done()
_NOTHING: Final[Sequence[Effect]] = ()


@dataclass(slots=True)
class _Session:
    """What the store knows of one connection.

    One that was recovered is *awaited* until its client connects again, and *resumed* from then on.
    """

    client: int
    pid: int
    start_time: int
    name: str = ""
    role: Role | None = None
    detached: bool = False
    limit_bytes: int = 0
    board: int = 0
    trusted: bool = False
    awaited: bool = False
    resumed: bool = False
    lent: set[int] = field(default_factory=set)
    """Slots of its gets that wait: each waits with slots of its own, so there is an end to their number."""


class ObjectStore:
    """All of a store but its sockets, clock and memory.

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

    Notes
    -----
    Time is an argument, in nanoseconds since 1970.  Not thread-safe: one loop drives it.
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
    ) -> None:
        self._layout = layout
        self._token = token
        self._memory = memory
        self._raw = raw
        self._segment = (segment_kind, segment_path)
        self._table = Table(layout, words, raw, memory.commit)
        self._control = Control(layout, words)
        self._boards = Boards(layout, words, raw, self._control, memory.commit)
        visited = raw[layout.visited : layout.visited + layout.n_entries]
        self._room = Room(layout, words, self._table, self._boards, visited, memory)
        self._objects = Lifecycle(
            layout,
            words,
            self._control,
            self._table,
            self._boards,
            self._room,
            memory,
            self._gone,
        )
        self._gets = GetQueue()
        self._sessions: dict[int, _Session] = {}
        self._subscribers: set[int] = set()
        self._uncommitted: dict[int, tuple[int, int]] = {}
        self._unsettled: list[Unsettled] = []
        self._effects: list[Effect] = []

    # -- connections ---------------------------------------------------------------------------

    def connect(self, client: int, pid: int, start_time: int, *, trusted: bool = False) -> None:
        """Take note of a new connection.

        Parameters
        ----------
        client : int
            A number that was never used before, and no board's.
        pid, start_time : int
            The process at its other end; 0 where it cannot be seen.
        trusted : bool, optional
            Whether it may have this store end in favour of another.
        """
        self._sessions[client] = _Session(client, pid, start_time, trusted=trusted)

    def disconnect(self, client: int, now_ns: int) -> Sequence[Effect]:
        """Forget a connection: what it has posted counts, its pins and its unsealed objects go."""
        session = self._sessions[client]
        if session.role is Role.CLIENT and not session.detached:
            try:
                self._heed(session, now_ns)
            except ProtocolError:
                session.detached = True  # it goes anyway
        del self._sessions[client]
        self._subscribers.discard(client)
        self._boards.revoke(client)
        self._forget(client)
        self._objects.end_lease(client)
        return self.wake()

    def expel(self, client: int) -> bool:
        """Answer a client no more; what it was given stays its own until `disconnect`.

        Returns
        -------
        bool
            Whether it was given anything that it may still use.
        """
        session = self._sessions[client]
        session.detached = True
        self._subscribers.discard(client)
        self._gets.forget(client)
        return session.role is Role.CLIENT

    def _forget(self, client: int) -> None:
        """Drop what a client waits for and what it has not sealed."""
        self._gets.forget(client)
        for entry, (creator, _) in list(self._uncommitted.items()):
            if creator == client:
                self._refuse_uncommitted(client, entry)
        self._objects.abort_all(client)

    def handle(self, client: int, frame: Frame, now_ns: int) -> Sequence[Effect]:
        """Carry out one request and return what is to be done."""
        session = self._sessions[client]
        try:
            request = decode_request(frame)
            if session.detached:
                # Another thread of the client may not have noticed yet that it has left.
                return _NOTHING
            if type(request) is Hello:
                self._hello(session, frame.request_id, request)
            elif session.role is not Role.CLIENT:
                raise ProtocolError(f"{type(request).__name__} on a connection of no client")
            elif type(request) is Post:
                self._heed(session, now_ns)
            else:
                self._request(session, frame.request_id, request, now_ns)
        except Refused as refused:
            self._reply(client, frame.request_id, refused.failed)
        except ProtocolError as error:
            self._effects.append(Drop(client, str(error)))
        return self._take_effects()

    def take_unsettled(self) -> list[Unsettled]:
        """Return the requests that wait for a drain of all sockets; pass them to `settle` after it."""
        if self._unsettled:
            self._objects.note_idle_leases()
        unsettled, self._unsettled = self._unsettled, []
        return unsettled

    def settle(self, unsettled: Iterable[Unsettled]) -> Sequence[Effect]:
        """Answer requests whose answer had to wait until every socket was drained once.

        Some may have to wait for another drain: see `has_unsettled`.
        """
        self._objects.take_idle_leases()
        for client, request_id, request, now_ns in unsettled:
            session = self._sessions.get(client)
            if session is None or session.detached:
                continue
            try:
                self._settle(session, request_id, request, now_ns)
            except Refused as refused:
                self._reply(client, request_id, refused.failed)
        return self._take_effects()

    @property
    def has_unsettled(self) -> bool:
        """Whether requests wait for a drain of all sockets."""
        return bool(self._unsettled)

    def wake(self) -> Sequence[Effect]:
        """Let go what waited for a release and is pinned no more."""
        self._objects.wake()
        return self._take_effects()

    # -- recovering ----------------------------------------------------------------------------

    def recover(
        self, is_alive: Callable[[int, int], bool], now_ns: int
    ) -> tuple[dict[int, int], str]:
        """Take over the segment of a store that has died, instead of an empty one.

        Parameters
        ----------
        is_alive : callable
            ``is_alive(pid, start_time)`` tells whether that process still lives.
        now_ns : int
            The time.

        Returns
        -------
        clients : dict
            The clients that may come back, and the pids of those that can be seen: `disconnect` one when
            it has ended.
        summary : str
            What was found, for the log.

        Raises
        ------
        CommitError
            Memory that was there before cannot be had any more.
        """
        found = self._objects.recover()
        for board, owner in found.owners.items():
            session = _Session(board, owner.pid, owner.start_time, "recovered", Role.CLIENT)
            session.board, session.awaited = board, True
            self._sessions[board] = session
        n_posted = 0
        for session in self._sessions.values():
            try:
                n_posted += self._heed(session, now_ns, recovering=True)
            except ProtocolError:
                session.detached = True  # it is not waited for, and keeps what it holds
        for session in tuple(self._sessions.values()):
            if not is_alive(session.pid, session.start_time):
                self.disconnect(session.client, now_ns)
        pids = {session.client: session.pid for session in self._sessions.values()}
        summary = (
            f"{len(found.sealed)} objects, {len(found.created)} unsealed, {n_posted} announced "
            f"since, {len(pids)} living clients; {found.dropped} unsealed, torn or damaged entries "
            "dropped"
        )
        return pids, summary

    def _heed(self, session: _Session, now_ns: int, *, recovering: bool = False) -> int:
        """Carry out what a client has posted, and return how much that was.

        At a recovery the first record may have been carried out already.
        """
        board = session.board
        start = self._layout.outboxes + board * OUTBOX_BYTES
        page = self._raw[start : start + OUTBOX_BYTES]
        acknowledged = self._control.acknowledged(board)
        count = 0
        # A client that writes on and on is not to keep the others waiting.
        while count < RECORDS and (record := read_record(page, acknowledged)) is not None:
            message = decode_posted(*record)
            if not (
                recovering
                and not count
                and isinstance(message, Publish)
                and self._objects.was_published(session.client, message.offset)
            ):
                try:
                    self._request(session, ONE_WAY, message, now_ns)
                except Refused as refused:
                    self._reply(session.client, ONE_WAY, refused.failed)
            acknowledged += 1
            count += 1
            self._control.acknowledge(board, acknowledged)
        return count

    # -- memory ahead of need ------------------------------------------------------------------

    @property
    def may_miss_a_release(self) -> bool:
        """Whether something waits for a release which, for want of barriers, may not wake the store."""
        return not self._memory.has_barrier and self._objects.awaits_release > 0

    @property
    def has_urgent_work(self) -> bool:
        """Whether a creator waits for memory to be committed."""
        return bool(self._uncommitted)

    @property
    def has_idle_work(self) -> bool:
        """Whether memory should be committed ahead of need."""
        return self._room.watermark < self._room.idle_target

    def advance(self) -> Sequence[Effect]:
        """Commit one step of memory; answer the creator that waited for it.

        Raises
        ------
        CommitError
            There is no memory, and nobody waits for it.
        """
        if not self._uncommitted:
            self._room.commit_step(self._room.idle_target)
            return []
        entry, (client, request_id) = next(iter(self._uncommitted.items()))
        offset, data_size, metadata_size = self._table.location(entry)
        try:
            if self._room.commit_step(offset + data_size + metadata_size):
                del self._uncommitted[entry]
                self._reply(client, request_id, Created(offset))
        except CommitError as error:
            del self._uncommitted[entry]
            self._boards.unpin_all(client, entry)
            self._objects.abort(client, self._table.object_id(entry))
            refused = self._objects.full(data_size + metadata_size, str(error))
            self._reply(client, request_id, refused.failed)
        return self._take_effects()

    # -- requests ------------------------------------------------------------------------------

    def _request(  # noqa: PLR0912, PLR0915 - a branch for each kind of request, most of them one line
        self, session: _Session, request_id: int, request: Request, now_ns: int
    ) -> None:
        client = session.client
        match request:
            case Publish():
                self._publish(session, request_id, request, now_ns)
            case Create():
                if not self._boards.may_lend(client, (request.slot,)):
                    raise ProtocolError(f"slot {request.slot} is not its to lend")
                self._create(session, request_id, request, now_ns)
            case Seal():
                if self._uncommitted and self._table.find(request.object_id) in self._uncommitted:
                    raise ProtocolError("it seals what it was not told the place of")
                entry = self._objects.seal(client, request.object_id, now_ns)
                if self._subscribers or self._gets:
                    self._announce(entry)
                self._reply(client, request_id, _DONE)
            case Get():
                self._get(client, request_id, request)
            case AskLease():
                needed = request.needed_bytes
                # What a client with a limit stores is counted object by object.
                none = Leased(0, 0, 0, 0)
                limited = session.limit_bytes > 0
                lease = none if limited else self._objects.lease(client, session.board, needed)
                self._reply(client, request_id, lease)
            case Flush():
                self._reply(client, request_id, _DONE)
            case Contains() if self._objects.find_sealed(request.object_id) != NO_ENTRY:
                self._reply(client, request_id, Number(1))
            case AnswerNow() if request_id != ONE_WAY:
                raise ProtocolError("an AnswerNow that asks for an answer of its own")
            case Contains() | Delete() | Evict() | List() | AnswerNow() | Debug():
                self._unsettled.append((client, request_id, request, now_ns))
            case Abort():
                self._refuse_uncommitted(client, self._table.find(request.object_id))
                self._objects.abort(client, request.object_id)
                self._reply(client, request_id, _DONE)
            case SetOptions():
                session.name, session.limit_bytes = request.name, request.limit_bytes
                self._objects.recall_leases()
                self._reply(client, request_id, _DONE)
            case Grow():
                self._reply(client, request_id, Number(self._grant(session)))
            case Attach():
                self._reply(client, request_id, Done(), Descriptor.SEGMENT)
            case Detach():
                session.detached = True
                self._forget(client)
                self._objects.end_lease(client)
                self._reply(client, request_id, _DONE)
            case Hello() | Post():
                raise AssertionError("it was handled before")
            case _:
                assert_never(request)

    def _settle(self, session: _Session, request_id: int, request: Request, now_ns: int) -> None:
        client = session.client
        match request:
            case Create():
                self._create(session, request_id, request, now_ns)
            case Contains():
                found = self._objects.find_sealed(request.object_id) != NO_ENTRY
                self._reply(client, request_id, Number(found))
            case Get():
                self._answer_now(client, request_id)
            case AnswerNow():
                self._answer_now(client, request.request_id)
            case Delete():
                self._objects.delete(request.object_ids)
                self._reply(client, request_id, _DONE)
            case Evict():
                self._reply(client, request_id, Number(self._objects.evict(request.size_bytes)))
            case List():
                self._reply(client, request_id, self._list(request.start))
            case Debug():
                self._reply(client, request_id, Text(self.describe()))
            case _:
                raise AssertionError(f"{request} is answered at once")

    def _hello(self, session: _Session, request_id: int, hello: Hello) -> None:
        client = session.client
        if session.role is not None:
            raise ProtocolError("a second Hello")
        if hello.version != PROTOCOL_VERSION:
            text = (
                f"the store speaks protocol version {PROTOCOL_VERSION}, the client version "
                f"{hello.version}; run the same release of shmplasma on both sides"
            )
            self._reply(client, request_id, Failed(Failure.VERSION, text))
            raise ProtocolError(f"it speaks protocol version {hello.version}")
        if hello.reclaim:
            awaited = self._sessions.get(hello.reclaim - 1)
            if awaited is not None and awaited.awaited and _same_process(awaited, session):
                self._resume(session, awaited, request_id, hello.name)
                return
        if hello.role is Role.SUCCESSOR:
            if not session.trusted:
                raise ProtocolError("it may not replace this store")
            session.role = hello.role
            self._reply(client, request_id, _DONE)
            self._effects.append(HandOver(client))
            return
        if hello.role is Role.CLIENT:
            session.board = self._grant(session)
            descriptor = Descriptor.WAKE
        else:
            descriptor = None
            self._subscribers.add(client)
        session.role, session.name = hello.role, hello.name
        self._reply(client, request_id, self._welcome(session), descriptor)
        if hello.role is Role.SUBSCRIBER:
            self._replay(client)

    def _resume(self, session: _Session, awaited: _Session, request_id: int, name: str) -> None:
        """Let a client whose store has died go on with all that it has, over a new connection."""
        del self._sessions[session.client]
        awaited.awaited, awaited.resumed, awaited.name = False, True, name
        self._effects.append(Adopt(session.client, awaited.client))
        self._reply(awaited.client, request_id, self._welcome(awaited), Descriptor.WAKE)

    def _welcome(self, session: _Session) -> Welcome:
        barrier = self._memory.has_barrier
        return Welcome(self._token, session.board, barrier, session.resumed, *self._segment)

    def _grant(self, session: _Session) -> int:
        try:
            board = self._boards.grant(session.client, session.pid, session.start_time)
        except CommitError as error:
            raise self._objects.full(BOARD_BYTES, str(error)) from error
        if board is None:
            text = (
                f"all {self._layout.n_boards} pin boards of the store are in use; close clients or "
                "release buffers"
            )
            raise Refused(Failed(Failure.NO_BOARD, text))
        return board

    def _create(self, session: _Session, request_id: int, request: Create, now_ns: int) -> None:
        client = session.client
        if request.data_size < 0 or request.metadata_size < 0:
            raise ProtocolError(f"an object of {request.data_size}+{request.metadata_size} bytes")
        try:
            entry = self._objects.create(client, request, session.limit_bytes, now_ns)
        except Refused as refused:
            # Leases are never the reason: they come back first.
            if refused.failed.failure is not Failure.FULL or not self._objects.recall_leases():
                raise
            self._unsettled.append((client, request_id, request, now_ns))
            return
        offset, data_size, metadata_size = self._table.location(entry)
        if data_size + metadata_size and offset + data_size + metadata_size > self._room.watermark:
            self._uncommitted[entry] = (client, request_id)
        else:
            self._reply(client, request_id, Created(offset))

    def _refuse_uncommitted(self, client: int, entry: int) -> None:
        """Answer a creation that waits for memory, if this is one, because it is taken back."""
        creator, request_id = self._uncommitted.get(entry, (None, ONE_WAY))
        if creator == client:
            del self._uncommitted[entry]
            self._boards.unpin_all(client, entry)
            failed = Failed(Failure.NOT_FOUND, "the object was aborted before it had its memory")
            self._reply(client, request_id, failed)

    def _publish(self, session: _Session, request_id: int, message: Publish, now_ns: int) -> None:
        """Enter a published object; the hot path of putting."""
        repeatable = session.resumed and request_id != ONE_WAY
        if repeatable and self._objects.is_repeated(session.client, message):
            self._reply(session.client, request_id, _DONE)
            return
        entry = self._objects.publish(session.client, message, now_ns)
        if self._subscribers or self._gets:
            self._announce(entry)  # whoever has waited is told before the writer is
        self._reply(session.client, request_id, _DONE)

    # -- get -----------------------------------------------------------------------------------

    def _get(self, client: int, request_id: int, request: Get) -> None:
        if request_id == ONE_WAY or (client, request_id) in self._gets:
            raise ProtocolError(f"a get under the request id {request_id}")
        if not self._boards.may_lend(client, request.slots):
            raise ProtocolError("a get names slots that are not its to lend")
        lent = self._sessions[client].lent
        if lent and not lent.isdisjoint(request.slots):
            raise ProtocolError("a get names slots that another one waits with")
        get = PendingGet.begin(client, request_id, request)
        for object_id in list(get.missing):
            entry = self._objects.find_sealed(object_id)
            if entry != NO_ENTRY:
                self._fill(get, object_id, entry)
        if not get.missing:
            self._reply(client, request_id, Objects(get.found))
            return
        lent.update(request.slots)
        self._gets.add(get)
        if not request.wait:
            self._unsettled.append((client, request_id, request, 0))

    def _fill(self, get: PendingGet, object_id: bytes, entry: int) -> None:
        """Enter a sealed object into a get and pin it for its client."""
        codec = self._table.id_and_codec(entry)[1]
        for slot in get.fill(object_id, (*self._table.location(entry), codec)):
            self._boards.pin(slot, entry)
        self._room.read(entry)

    def _announce(self, entry: int) -> None:
        """Tell those who wait for an object, and the subscribers, that it is sealed."""
        object_id = self._table.object_id(entry)
        _, data_size, metadata_size = self._table.location(entry)
        self._notify(object_id, data_size, metadata_size)
        for get in self._gets.waiting_for(object_id):
            self._fill(get, object_id, entry)
            if not get.missing:
                self._answer_now(get.client, get.request_id)

    def _answer_now(self, client: int, request_id: int) -> None:
        """Answer a get with what it has; one that was answered meanwhile needs nothing."""
        get = self._gets.remove(client, request_id)
        if get is not None:
            self._sessions[client].lent.difference_update(get.request.slots)
            self._reply(client, request_id, Objects(get.found))

    # -- describing ----------------------------------------------------------------------------

    def _list(self, start: int) -> Listing:
        holders = Counter(e for client in self._sessions for e in self._objects.held_by(client))
        return list_objects(self._table, holders, start)

    def describe(self) -> str:
        """Return the store's figures, one a line."""
        clients = [
            f"{_shown(session.name)} (pid {session.pid})"
            for client, session in self._sessions.items()
            if session.role is Role.CLIENT
            and (not session.detached or self._objects.held_by(client))
        ]
        return describe(self._layout, self._table, self._boards, self._room, self._objects, clients)

    def check(self) -> None:
        """Prove the invariants of all parts."""
        self._objects.check()
        self._gets.check()

    # -- effects -------------------------------------------------------------------------------

    def _take_effects(self) -> Sequence[Effect]:
        if not self._effects:
            return _NOTHING
        effects, self._effects = self._effects, []
        return effects

    def _reply(
        self, client: int, request_id: int, reply: Reply, descriptor: Descriptor | None = None
    ) -> None:
        if request_id != ONE_WAY:
            data = encode_frame(reply.KIND, request_id, reply.encode())
            self._effects.append(Send(client, data, descriptor))

    def _gone(self, object_id: bytes) -> None:
        self._notify(object_id, -1, -1)

    def _notify(self, object_id: bytes, data_size: int, metadata_size: int) -> None:
        if self._subscribers:
            data = notification(object_id, data_size, metadata_size)
            self._effects += [Send(client, data) for client in self._subscribers]

    def _replay(self, client: int) -> None:
        """Send a new subscriber all objects that are sealed."""
        self._effects += [Send(client, data) for data in sealed_notifications(self._table)]


def _same_process(one: _Session, other: _Session) -> bool:
    """Tell whether two connections are of one process; where it cannot be seen, its word counts."""
    return (one.pid, one.start_time) == (other.pid, other.start_time)


def _shown(name: str) -> str:
    """Return a client's name as it stands in the store's description: in one line, whatever it is."""
    return "".join(c if c.isprintable() else "?" for c in name) or "unnamed"
