"""The store's state machine beside Plasma's semantics on plain dicts.

Several clients do anything in any order.  The model knows what each object holds and who holds it.  Which
objects are evicted it learns from a subscriber, and judges: nothing that anybody uses may go, and nothing
while there is room.  Effects are judged one by one in the order in which the store gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TypeVar
from zlib import crc32

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from shmplasma.effects import Drop, Effect
from shmplasma.hints import TAKEN, wanted_at
from shmplasma.layout import BOARD_WORDS, CONTROL_BYTES, ControlWord, align_up
from shmplasma.leases import BUSY_WORD
from shmplasma.mover import SLICE_BYTES
from shmplasma.moves import PIECE_BYTES
from shmplasma.offset_pins import AT_OFFSET, pin_word
from shmplasma.posted import Abort, Claim, Detach, Publish, Seal
from shmplasma.replies import (
    ABSENT,
    Created,
    Done,
    Failed,
    Failure,
    Found,
    Leased,
    Listing,
    Number,
    Objects,
    Reply,
)
from shmplasma.requests import (
    AnswerNow,
    AskLease,
    Contains,
    Create,
    Delete,
    Evict,
    Get,
    Keep,
    List,
    Post,
    Request,
    SetOptions,
    Trim,
)
from shmplasma.table import NO_ENTRY
from shmplasma.waiters import FOR_EVER
from tests.conversation import Conversation, Peer, census_in, name, records

N_IDS = 8
MAX_CLIENTS = 5
CODEC = 5

_T = TypeVar("_T")


@dataclass(eq=False)
class Thing:
    """An object as its users know it."""

    object_id: bytes
    data_size: int
    metadata_size: int
    content: bytes
    creator: Peer | None
    offset: int = 0
    is_sealed: bool = False
    is_doomed: bool = False
    is_kept: bool = False

    @property
    def size(self) -> int:
        """Data and metadata in bytes."""
        return self.data_size + self.metadata_size

    @property
    def found(self) -> Found:
        """What a get says of it."""
        return self.offset, self.data_size, self.metadata_size, CODEC


@dataclass(eq=False)
class Wait:
    """A get that was asked and not yet answered."""

    peer: Peer
    request: Get
    filled: dict[int, Thing]
    is_handled: bool = False
    may_be_partial: bool = False
    is_taken: bool = False
    """Whether its client was hinted at the object, and has it by a slot of its own."""

    def missing(self, object_id: bytes) -> list[int]:
        """Return where the answer still lacks this object."""
        return [
            position
            for position, wanted in enumerate(self.request.object_ids)
            if wanted == object_id and position not in self.filled
        ]


@dataclass(eq=False)
class Rent:
    """A lease, and the object that its client is making in it."""

    start: int
    end: int
    objects: int
    epoch: int
    making: Thing | None = None


class Watched(Conversation):
    """A conversation in which each effect is judged as soon as it was carried out."""

    def __init__(
        self, capacity: int, begin: Callable[[], None], judge: Callable[[Effect], None]
    ) -> None:
        self._begin = begin
        self._judge = judge
        super().__init__(capacity, floor_bytes=0)

    def carry_out(self, effects: Iterable[Effect]) -> None:
        """Carry out and judge one effect after the other."""
        self._begin()
        for effect in effects:
            super().carry_out([effect])
            self._judge(effect)


@dataclass
class Model:
    """What is true of the store, as far as its users can know."""

    things: dict[bytes, Thing] = field(default_factory=dict)
    """All objects that can be found, sealed or not."""
    limbo: set[Thing] = field(default_factory=set)
    """Aborted ones whose release the store may not have seen."""
    pins: dict[int, Thing] = field(default_factory=dict)
    """What each slot holds."""
    waits: dict[tuple[int, int], Wait] = field(default_factory=dict)
    """Gets without an answer, by client and request id."""
    rents: dict[int, Rent] = field(default_factory=dict)
    """Leases, by client."""
    limits: dict[int, int] = field(default_factory=dict)

    def is_pinned(self, thing: Thing) -> bool:
        """Tell whether anybody holds the object."""
        return thing in self.pins.values()

    def held_by(self, peer: Peer, slots: Callable[[Peer, int], bool]) -> set[Thing]:
        """Return what a client pins or writes."""
        held = {thing for slot, thing in self.pins.items() if slots(peer, slot)}
        return held | {t for t in self.things.values() if not t.is_sealed and t.creator is peer}

    def sealed(self) -> dict[bytes, Thing]:
        """Return all objects that can be read."""
        return {object_id: t for object_id, t in self.things.items() if t.is_sealed}

    def note_wake(self) -> None:
        """Take note that the store has looked for releases."""
        self.limbo = {thing for thing in self.limbo if self.is_pinned(thing)}
        left = [t for t in self.things.values() if t.is_doomed and not self.is_pinned(t)]
        assert not left, "a doomed object outlived its last release"


def pick(items: Sequence[_T], number: int) -> _T:
    """Choose one of these by a number, whatever it is."""
    return items[number % len(items)]


IDS = st.integers(0, N_IDS - 1).map(name)
NUMBERS = st.integers(0, 1000)
SHARES = st.one_of(st.just(0), st.integers(1, 300), st.integers(300, 1024))
"""Sizes in 1024ths of the capacity."""


class StoreMachine(RuleBasedStateMachine):
    """Several clients of one store, doing anything in any order."""

    # -- setting up --------------------------------------------------------------------------------

    @initialize(
        capacity=st.sampled_from([4096, 5000, 16384, 65536, 1 << 20, 1 << 21]),
        slice_bytes=st.sampled_from([1, 1000, SLICE_BYTES]),
        piece_bytes=st.sampled_from([64, 1024, PIECE_BYTES]),
        at_once=st.sampled_from([2, 512]),
    )
    def start(self, capacity: int, slice_bytes: int, piece_bytes: int, at_once: int) -> None:
        """Begin with an empty store, its subscriber and a client."""
        self.capacity = capacity
        self.model = Model()
        self.expected: dict[tuple[int, int], Callable[[Reply], None]] = {}
        self.gone_for_reply: list[Thing] = []
        self.ended: list[Thing] = []
        self.at_once = at_once
        self.gone = 0
        self.incarnations = 0
        self.seen = 0
        self.deleting: list[bytes] = []
        self.going: set[bytes] = set()
        self.creators: dict[tuple[int, int], Thing] = {}
        self.given_up: set[tuple[int, int]] = set()
        self.witness: Peer | None = None
        self.talk = Watched(capacity, self.begin_to_judge, self.judge)
        self.talk.store._room.mover.slice_bytes = slice_bytes
        self.talk.store._room.most_at_once = at_once
        self.talk.store._parts.moves.piece_bytes = piece_bytes
        self.commit_all()
        self.boards: dict[int, Peer] = {}
        self.active: list[Peer] = []
        self.detached: list[Peer] = []
        self.witness = self.talk.subscriber()
        self.join()

    def join(self) -> None:
        """Have one more client."""
        peer = self.talk.client()
        self.boards[peer.free_slots[-1] // BOARD_WORDS] = peer
        self.active.append(peer)

    def is_of(self, peer: Peer, slot: int) -> bool:
        """Tell whether a slot lies on this client's board."""
        return self.boards.get(slot // BOARD_WORDS) is peer

    # -- judging -----------------------------------------------------------------------------------

    def begin_to_judge(self) -> None:
        """Take note of where objects lie, before the effects of a request are looked at."""
        self.gone_for_reply.clear()
        self.locate()

    def locate(self) -> None:
        """Take note of where objects lie: those that nobody uses may have been moved."""
        table = self.talk.store._parts.table
        for thing in self.model.things.values():
            if thing.is_sealed:
                entry = table.find(thing.object_id)
                if entry != NO_ENTRY:  # or it will be told of as gone
                    offset = table.location(entry)[0]
                    is_fixed = self.model.is_pinned(thing)
                    assert not is_fixed or offset == thing.offset, "it was moved under a pin"
                    thing.offset = offset

    def judge(self, effect: Effect) -> None:
        """Compare an effect with the model, and bring the model up to date."""
        assert not isinstance(effect, Drop), effect.reason
        if self.witness is not None and effect.client == self.witness.number:
            for object_id, data_size, metadata_size in self.witness.notifications[self.seen :]:
                self.seen += 1
                if data_size < 0:
                    assert metadata_size == -1
                    self.judge_end(object_id)
                else:
                    self.judge_seal(object_id, data_size, metadata_size)
            return
        peer = self.talk.peers.get(effect.client)
        if peer is None:
            return
        for request_id in list(peer.replies):
            judge_reply = self.expected.pop((peer.number, request_id), None)
            if judge_reply is not None:
                judge_reply(peer.replies.pop(request_id))
                self.gone_for_reply.clear()

    def judge_end(self, object_id: bytes) -> None:
        """See an object go: it was sealed, and nobody used it."""
        thing = self.model.things.pop(object_id)
        assert thing.is_sealed
        assert not self.model.is_pinned(thing), "an object in use has gone"
        is_deleted = thing.is_doomed or object_id in self.deleting
        assert is_deleted or not thing.is_kept, "an object that was to be kept has gone"
        for wait in self.model.waits.values():
            if not wait.is_handled:
                wait.filled = {at: t for at, t in wait.filled.items() if t is not thing}
        if object_id in self.going:  # who has deleted it was answered before
            self.going.remove(object_id)
        else:
            self.gone_for_reply.append(thing)
        self.ended.append(thing)
        self.gone += not thing.is_doomed

    def judge_seal(self, object_id: bytes, data_size: int, metadata_size: int) -> None:
        """See an object come: it is pinned for all who wait for it."""
        thing = self.model.things[object_id]
        assert not thing.is_sealed
        assert (thing.data_size, thing.metadata_size) == (data_size, metadata_size)
        thing.is_sealed = True
        for wait in self.model.waits.values():
            for position in wait.missing(object_id):
                wait.filled[position] = thing
                if not wait.is_taken:
                    self.model.pins[wait.request.slots[position]] = thing

    def send(
        self, peer: Peer, request: Request, judge_reply: Callable[[Reply], None]
    ) -> tuple[int, int]:
        """Post a request whose reply will be judged; return its key."""
        key = peer.number, peer.last_id + 1
        self.expected[key] = judge_reply
        peer.post(request)
        return key

    def largest_gap(self, occupied: Iterable[tuple[int, int]]) -> int:
        """Return the size of the largest stretch of the data region that is not occupied."""
        start = self.talk.layout.data
        extents = sorted((offset, align_up(size, 64)) for offset, size in occupied if size)
        # A lease that was recalled, and of which its client does not know yet, may be another's by now.
        ends = accumulate([start, *(offset + size for offset, size in extents)], max)
        starts = [*(offset for offset, _ in extents), start + self.talk.layout.data_bytes]
        return max(follow - end for end, follow in zip(ends, starts, strict=True))

    def unmovable(self) -> list[tuple[int, int]]:
        """Return all extents that have to stay where they are."""
        model = self.model
        things = model.limbo | {
            t for t in model.things.values() if not t.is_sealed or model.is_pinned(t)
        }
        rents = [(r.start, r.end - r.start) for r in model.rents.values() if r.making]
        return [(thing.offset, thing.size) for thing in things] + rents

    def unevictable(self) -> list[tuple[int, int]]:
        """Return all extents that no eviction can free."""
        kept = [t for t in self.model.things.values() if t.is_sealed and t.is_kept]
        kept = [t for t in kept if not self.model.is_pinned(t)]
        return [*self.unmovable(), *((t.offset, t.size) for t in kept)]

    def used(self) -> list[tuple[int, int]]:
        """Return all extents that may be in use."""
        model = self.model
        things = [(t.offset, t.size) for t in (*model.limbo, *model.things.values())]
        return things + [(r.start, r.end - r.start) for r in model.rents.values()]

    # -- connections -------------------------------------------------------------------------------

    @precondition(lambda self: len(self.boards) < MAX_CLIENTS)
    @rule()
    def connect(self) -> None:
        """Let one more client come."""
        self.join()

    @precondition(lambda self: len(self.boards) > 1)
    @rule(which=NUMBERS)
    def disconnect(self, which: int) -> None:
        """Let a client die: its pins and its unsealed objects go, nothing else."""
        peer = pick([*self.active, *self.detached], which)
        slots = [slot for slot in self.model.pins if self.is_of(peer, slot)]
        for slot in slots:
            del self.model.pins[slot]
        self.forget(peer)
        del self.boards[next(board for board, owner in self.boards.items() if owner is peer)]
        for clients in (self.active, self.detached):
            if peer in clients:
                clients.remove(peer)
        self.talk.disconnect(peer)
        self.model.note_wake()
        if not self.active:
            self.join()

    @rule(which=NUMBERS)
    def detach(self, which: int) -> None:
        """Close a client: its unsealed objects and its requests end, its pins stay."""
        peer = pick(self.active, which)
        self.forget(peer)
        self.active.remove(peer)
        self.detached.append(peer)

        def judge_reply(reply: Reply) -> None:
            assert reply == Done()

        self.send(peer, Detach(), judge_reply)
        if not self.active:
            self.join()

    def forget(self, peer: Peer) -> None:
        """Remove a client's unsealed objects and requests from the model."""
        for thing in [t for t in self.model.things.values() if t.creator is peer]:
            if not thing.is_sealed:
                self.drop_unsealed(thing)
        for key in [key for key in self.model.waits if key[0] == peer.number]:
            wait = self.model.waits.pop(key)
            slots = wait.request.slots
            if not wait.is_taken:
                peer.free_slots += [slots[at] for at in range(len(slots)) if at not in wait.filled]
        for key in [key for key in self.expected if key[0] == peer.number]:
            del self.expected[key]
            self.creators.pop(key, None)
        self.model.rents.pop(peer.number, None)
        self.set_busy(peer, False)

    def drop_unsealed(self, thing: Thing) -> None:
        """Take an aborted object out of the model, into limbo if its writer still has it."""
        del self.model.things[thing.object_id]
        if self.model.is_pinned(thing):
            self.model.limbo.add(thing)

    @rule()
    def subscribe(self) -> None:
        """Subscribe, and be told exactly what is sealed."""
        self.talk.turn()
        late = self.talk.subscriber()
        told = {object_id: sizes for object_id, *sizes in late.notifications}
        assert len(told) == len(late.notifications)
        sealed = self.model.sealed().items()
        assert told == {object_id: [t.data_size, t.metadata_size] for object_id, t in sealed}
        self.talk.disconnect(late)
        self.model.note_wake()

    # -- writing -----------------------------------------------------------------------------------

    def new_thing(self, peer: Peer, object_id: bytes, data_size: int, metadata_size: int) -> Thing:
        """Return an object whose content nobody else's looks like."""
        self.incarnations += 1
        size = data_size + metadata_size
        mark = f"{object_id[-1]}:{self.incarnations};".encode()
        content = (mark * (size // len(mark) + 1))[:size]
        return Thing(object_id, data_size, metadata_size, content, peer)

    def fill(self, thing: Thing) -> None:
        """Write an object's content to its place."""
        self.talk.raw[thing.offset : thing.offset + thing.size] = thing.content

    @rule(
        which=NUMBERS,
        object_id=IDS,
        share=SHARES,
        metadata_size=st.integers(0, 99),
        keep=st.booleans(),
        slices=st.integers(0, 20),
        finishes=st.booleans(),
    )
    def create(
        self,
        which: int,
        object_id: bytes,
        share: int,
        metadata_size: int,
        keep: bool,
        slices: int,
        finishes: bool,
    ) -> None:
        """Ask for a new object, and write to it as soon as the store says where."""
        peer, model = pick(self.active, which), self.model
        thing = self.new_thing(peer, object_id, share * self.capacity // 1024, metadata_size)
        thing.is_kept = keep
        wanted = align_up(thing.size, 64)
        slot = peer.free_slots.pop()
        request = Create(object_id, thing.data_size, metadata_size, CODEC, slot, keep)
        fits = thing.size <= self.capacity and self.largest_gap(self.used()) >= wanted
        fits &= not self.talk.store._room.mover.is_busy  # then free room may be held for somebody
        gone_before = self.gone

        def judge_refusal(failure: Failure) -> None:
            assert failure is Failure.FULL
            assert object_id not in model.things
            assert not fits
            stays = self.unevictable()
            beyond = thing.size > self.capacity  # if only by less than a cache line
            assert beyond or self.largest_gap(stays) < wanted, "the store was not full"
            if not self.unmovable() and thing.size <= self.capacity:
                left = self.talk.layout.data_bytes - sum(align_up(size, 64) for _, size in stays)
                assert left < wanted, "nothing is in the way"

        self.send(peer, request, self.judge_of_creator(peer, thing, request, judge_refusal))
        assert not fits or self.gone == gone_before, "an object was evicted while there was room"
        self.work(slices)
        if finishes:
            self.talk.turn()

    def judge_of_creator(
        self, peer: Peer, thing: Thing, request: Create, judge_refusal: Callable[[Failure], None]
    ) -> Callable[[Reply], None]:
        """Return what judges the reply to a creation; `judge_refusal` is for want of room."""
        object_id, model = request.object_id, self.model

        def judge_reply(reply: Reply) -> None:
            limit = model.limits.get(peer.number, 0)
            held = sum(t.size for t in model.held_by(peer, self.is_of))
            is_over = limit > 0 and held + thing.size > limit
            if isinstance(reply, Created):
                assert object_id not in model.things
                assert not is_over
                thing.offset = reply.offset
                self.fill(thing)
                model.things[object_id] = thing
                model.pins[request.slot] = thing
                return
            assert isinstance(reply, Failed)
            assert self.talk.read_slot(request.slot) == 0
            peer.free_slots.append(request.slot)
            if reply.failure is Failure.EXISTS:
                assert object_id in model.things
            elif reply.failure is Failure.OVER_QUOTA:
                assert is_over
                assert object_id not in model.things
            else:
                judge_refusal(reply.failure)

        return judge_reply

    @rule(
        which=NUMBERS, object_ids=st.lists(IDS, min_size=1, unique=True), share=st.integers(1, 200)
    )
    def put(self, which: int, object_ids: list[bytes], share: int) -> None:
        """Put some objects one beside the other, and let go of them; they can be moved then."""
        peer = pick(self.active, which)
        for object_id in object_ids:
            before = self.model.things.get(object_id)
            slot = peer.free_slots[-1]
            self.create(which, object_id, share, 0, False, 0, finishes=True)
            thing = self.model.things.get(object_id)
            if thing is not None and thing is not before:
                self.send(
                    peer,
                    Seal(object_id),
                    self.judge_of_writer(peer, thing, object_id, lambda _: None),
                )
                del self.model.pins[slot]
                peer.release(slot)

    @rule(slices=st.integers(1, 20))
    def work(self, slices: int) -> None:
        """Move objects for a while; the rest of it happens while others do what they do."""
        for _ in range(slices):
            if self.talk.store.upkeep.has_urgent_work:
                self.talk.advance()

    @rule(
        which=NUMBERS,
        object_id=IDS,
        is_fresh=st.booleans(),
        beyond=st.integers(-1, 8),
        timeout_ns=st.sampled_from([FOR_EVER, FOR_EVER, 10, 1000]),
    )
    def wait_for_room(
        self, which: int, object_id: bytes, is_fresh: bool, beyond: int, timeout_ns: int
    ) -> None:
        """Ask for a new object somewhat larger than there can be room for, and wait."""
        peer = pick(self.active, which)
        if is_fresh:
            object_id = name(2000 + self.incarnations)
        size = max(0, min(self.largest_gap(self.unevictable()) + 64 * beyond, self.capacity))
        thing = self.new_thing(peer, object_id, size, 0)
        request = Create(
            object_id, thing.size, 0, CODEC, peer.free_slots.pop(), timeout_ns=timeout_ns
        )
        deadline_ns = self.talk.steady_ns + timeout_ns
        key = peer.number, peer.last_id + 1

        def judge_refusal(_: Failure) -> None:
            is_late = timeout_ns != FOR_EVER and deadline_ns <= self.talk.steady_ns
            assert key in self.given_up or is_late

        judge = self.judge_of_creator(peer, thing, request, judge_refusal)

        def judge_reply(reply: Reply) -> None:
            del self.creators[key]
            judge(reply)

        self.creators[key] = thing
        self.send(peer, request, judge_reply)
        self.talk.turn()

    @precondition(lambda self: self.creators)
    @rule(which=NUMBERS, count=st.integers(1, 9))
    def let_go_for_those_who_wait(self, which: int, count: int) -> None:
        """Let go of what is held, and see that whoever now fits is served."""
        self.release(which=which, count=count, wakes=True)
        self.settle()

    @precondition(lambda self: self.creators)
    @rule(which=NUMBERS)
    def give_up_waiting(self, which: int) -> None:
        """Have a creation not wait any longer: its client was interrupted."""
        key = pick(sorted(self.creators), which)
        self.given_up.add(key)
        self.talk.peers[key[0]].tell(AnswerNow(key[1]))

    @rule(ticks=st.sampled_from([1, 10, 1000]))
    def pass_time(self, ticks: int) -> None:
        """Let time pass: whose deadline it is does not wait any more."""
        self.talk.steady_ns += ticks
        self.talk.turn()

    @rule(which=NUMBERS, number=NUMBERS, any_id=IDS, is_own=st.booleans(), one_way=st.booleans())
    def seal(self, which: int, number: int, any_id: bytes, is_own: bool, one_way: bool) -> None:
        """Seal one's own object, or try to seal another."""
        peer, thing = self.choose(which, number, any_id, is_own)
        if one_way:
            peer.write(Seal(any_id if thing is None else thing.object_id))
        else:
            judge_reply = self.judge_of_writer(peer, thing, any_id, lambda _: None)
            self.send(peer, Seal(any_id if thing is None else thing.object_id), judge_reply)
        assert thing is None or thing.is_sealed

    @rule(which=NUMBERS, number=NUMBERS, any_id=IDS, is_own=st.booleans())
    def abort(self, which: int, number: int, any_id: bytes, is_own: bool) -> None:
        """Abort one's own object, or try to abort another."""
        peer, thing = self.choose(which, number, any_id, is_own)
        judge_reply = self.judge_of_writer(peer, thing, any_id, self.drop_unsealed)
        self.send(peer, Abort(any_id if thing is None else thing.object_id), judge_reply)
        assert thing is None or self.model.things.get(thing.object_id) is not thing

    def choose(
        self, which: int, number: int, any_id: bytes, is_own: bool
    ) -> tuple[Peer, Thing | None]:
        """Choose a client, and an unsealed object of its own if there is one."""
        peer = pick(self.active, which)
        own = [t for t in self.model.things.values() if t.creator is peer and not t.is_sealed]
        if is_own and own:
            return peer, pick(own, number)
        return peer, next((t for t in own if t.object_id == any_id), None)

    def judge_of_writer(
        self, peer: Peer, thing: Thing | None, any_id: bytes, on_done: Callable[[Thing], None]
    ) -> Callable[[Reply], None]:
        """Return what judges the reply to a seal or an abort."""

        def judge_reply(reply: Reply) -> None:
            if thing is not None:
                assert reply == Done()
                on_done(thing)
                return
            assert isinstance(reply, Failed)
            other = self.model.things.get(any_id)
            holds = other in self.model.held_by(peer, self.is_of)
            is_again = other is not None and other.is_sealed and holds
            assert reply.failure is (Failure.SEALED if is_again else Failure.NOT_FOUND)

        return judge_reply

    # -- reading -----------------------------------------------------------------------------------

    @rule(
        which=NUMBERS,
        object_ids=st.lists(IDS, max_size=4) | st.lists(IDS, min_size=1, max_size=1),
        wait=st.booleans(),
    )
    def get(self, which: int, object_ids: list[bytes], wait: bool) -> None:
        """Get objects, waiting for them or not; who waits for one listens for hints."""
        peer, model = pick(self.active, which), self.model
        request = peer.wanted(object_ids, wait=wait, hinted=wait and len(object_ids) == 1)
        key = peer.number, peer.last_id + 1
        sealed = model.sealed()
        filled = {at: sealed[i] for at, i in enumerate(object_ids) if i in sealed}
        pending = model.waits[key] = Wait(peer, request, filled, may_be_partial=not wait)

        def take_note() -> None:
            if not pending.is_handled:
                pending.is_handled = True
                for position, thing in pending.filled.items():
                    model.pins[request.slots[position]] = thing

        def judge_reply(reply: Reply) -> None:
            take_note()
            assert isinstance(reply, Objects)
            del model.waits[key]
            assert len(reply.found) == len(object_ids)
            if pending.is_taken:
                assert self.talk.read_slot(request.slots[0]) & TAKEN, "the store has written to it"
                peer.release(request.slots[0])
            for position, found in enumerate(reply.found):
                there = pending.filled.get(position)
                assert found == (ABSENT if there is None else there.found)
                if there is None:
                    assert pending.may_be_partial
                    peer.free_slots.append(request.slots[position])

        self.send(peer, request, judge_reply)
        take_note()

    @precondition(lambda self: self.model.waits)
    @rule(which=NUMBERS)
    def answer_now(self, which: int) -> None:
        """End the wait of a get: its time is over, or it was interrupted."""
        key = pick(sorted(self.model.waits), which)
        wait = self.model.waits[key]
        wait.may_be_partial = True
        wait.peer.tell(AnswerNow(key[1]))

    @precondition(lambda self: self.model.sealed())
    @rule(which=NUMBERS, number=NUMBERS)
    def pin_without_a_message(self, which: int, number: int) -> None:
        """Find an object in the table and pin it without the store."""
        peer, thing = pick(self.active, which), pick(list(self.model.sealed().values()), number)
        slot = peer.free_slots.pop()
        self.talk.write_slot(slot, self.talk.store._parts.table.find(thing.object_id) + 1)
        self.model.pins[slot] = thing

    @precondition(lambda self: self.model.pins)
    @rule(which=NUMBERS, count=st.integers(1, 4), wakes=st.booleans())
    def release(self, which: int, count: int, wakes: bool) -> None:
        """Let buffers die; if the store asked for it they wake it, sooner or later."""
        # What a get that still waits has found is its client's with the reply.
        lent = {slot for wait in self.model.waits.values() for slot in wait.request.slots}
        for _ in range(count):
            held = sorted(self.model.pins.keys() - lent)
            if not held:
                break
            slot = pick(held, which)
            del self.model.pins[slot]
            self.boards[slot // BOARD_WORDS].release(slot)
        if wakes and self.talk.wake_word:
            self.wake()

    @rule()
    def wake(self) -> None:
        """Look for releases; then nothing waits for one that has happened."""
        self.talk.wake()
        self.model.note_wake()
        waits = bool(self.model.limbo) or any(t.is_doomed for t in self.model.things.values())
        waits = waits or self.talk.store.has_waiters
        assert self.talk.wake_word == waits

    @rule(which=NUMBERS, object_id=IDS)
    def contains(self, which: int, object_id: bytes) -> None:
        """Ask whether an object is there, which only sealed ones are."""

        def judge_reply(reply: Reply) -> None:
            assert reply == Number(object_id in self.model.sealed())

        self.send(pick(self.active, which), Contains(object_id), judge_reply)

    @rule(which=NUMBERS)
    def list_all(self, which: int) -> None:
        """List the objects: what is there, how large, and how many hold it."""

        def judge_reply(reply: Reply) -> None:
            assert isinstance(reply, Listing)
            self.judge_listing(reply)

        self.send(pick(self.active, which), List(0), judge_reply)

    @rule()
    def take_census(self) -> None:
        """List them without asking: the same, or that this cannot be seen."""
        listing = census_in(self.talk).listing(0)
        if listing is not None:
            self.judge_listing(listing)

    def judge_listing(self, listing: Listing) -> None:
        """Compare a list with the model."""
        assert listing.next_start == 0
        there = records(listing)
        listed = {record.object_id: (*record[1:4], *record[6:]) for record in there}
        assert len(listed) == len(there)
        held = [self.model.held_by(p, self.is_of) for p in self.active + self.detached]
        assert listed == {
            object_id: (
                thing.data_size,
                thing.metadata_size,
                sum(thing in things for things in held),
                thing.is_sealed,
                thing.is_kept,
            )
            for object_id, thing in self.model.things.items()
        }

    # -- removing ----------------------------------------------------------------------------------

    @rule(which=NUMBERS, object_ids=st.lists(IDS, max_size=4))
    def delete(self, which: int, object_ids: list[bytes]) -> None:
        """Delete objects; those in use go at their last release."""
        self.deleting += object_ids

        def judge_reply(reply: Reply) -> None:
            assert reply == Done()
            for object_id in object_ids:
                self.deleting.remove(object_id)
                thing = self.model.sealed().get(object_id)
                if thing is not None:
                    thing.is_doomed = True
                    if not self.model.is_pinned(thing):
                        self.going.add(object_id)

        self.send(pick(self.active, which), Delete(object_ids), judge_reply)

    @rule(which=NUMBERS, object_ids=st.lists(IDS, max_size=4), glances=st.booleans())
    def remove(self, which: int, object_ids: list[bytes], glances: bool) -> None:
        """Delete objects by records, but for one that is hidden by a move, which goes later."""
        talk, peer = self.talk, pick(self.active, which)
        talk.glance()
        there, is_hidden = self.model.sealed(), talk.store._objects.is_hidden
        object_ids = [object_id for object_id in object_ids if not is_hidden(object_id)]
        things = [there[object_id] for object_id in object_ids if object_id in there]
        self.deleting += object_ids
        for object_id in object_ids:
            if glances:
                peer.write_silently(talk.removal(object_id))
                _, effects = talk.store.glance(talk.now_ns)
                if effects:
                    talk.carry_out([*effects, *talk.store.settled()])
            else:
                peer.write(talk.removal(object_id))
        talk.glance()
        self.note_removed(object_ids, things)

    def note_removed(self, object_ids: list[bytes], things: list[Thing]) -> None:
        """See that what was deleted has gone, or is in use."""
        for object_id in object_ids:
            self.deleting.remove(object_id)
        for thing in things:
            if self.model.things.get(thing.object_id) is thing:
                assert self.model.is_pinned(thing), "a deleted object stayed"
                thing.is_doomed = True

    @rule(
        which=NUMBERS,
        other=NUMBERS,
        object_ids=st.lists(IDS, max_size=3, unique=True),
        is_asked=st.booleans(),
    )
    def mark(self, which: int, other: int, object_ids: list[bytes], is_asked: bool) -> None:
        """Delete objects by marks and records, of which the store is not told, and have somebody ask for them before it reads those."""
        talk, peer = self.talk, pick(self.active, which)
        talk.glance()
        there, is_hidden = self.model.sealed(), talk.store._objects.is_hidden
        things = [there[id_] for id_ in object_ids if id_ in there and not is_hidden(id_)]
        things = [thing for thing in things if not thing.is_doomed]
        self.deleting += object_ids
        for thing in things:
            peer.remove(thing.object_id)

        def judge_reply(thing: Thing, reply: Reply) -> None:
            assert reply == Number(self.model.is_pinned(thing))

        if is_asked:
            for thing in things:
                asks = Contains(thing.object_id)
                self.send(pick(self.active, other), asks, partial(judge_reply, thing))
            talk.turn()
        talk.glance()
        self.note_removed(object_ids, things)

    @rule(which=NUMBERS, object_ids=st.lists(IDS, max_size=3), keep=st.booleans())
    def keep(self, which: int, object_ids: list[bytes], keep: bool) -> None:
        """Have objects kept, or let them be evicted; all of them must be there."""
        peer, things = pick(self.active, which), self.model.things

        def judge_reply(reply: Reply) -> None:
            found = [things.get(object_id) for object_id in object_ids]
            if all(t is not None and (t.is_sealed or t.creator is peer) for t in found):
                assert reply == Done()
                for object_id in object_ids:
                    things[object_id].is_kept = keep
            else:
                assert isinstance(reply, Failed)
                assert reply.failure is Failure.NOT_FOUND

        self.send(peer, Keep(keep, object_ids), judge_reply)

    @rule(which=NUMBERS, size_bytes=st.integers(-5, 70000) | st.integers(1, 300))
    def evict(self, which: int, size_bytes: int) -> None:
        """Evict objects, and be told how many bytes went."""
        begun = len(self.ended)

        def judge_reply(reply: Reply) -> None:
            assert isinstance(reply, Number)
            freed, gone = reply.value, self.gone_for_reply
            takes_turns = self.at_once < N_IDS
            if takes_turns:  # others take objects in between
                assert freed <= sum(thing.size for thing in self.ended[begun:])
            else:
                assert freed == sum(thing.size for thing in gone)
            if size_bytes <= 0:
                assert freed == 0
            elif freed >= size_bytes:
                assert takes_turns or freed - min(thing.size for thing in gone) < size_bytes, (
                    "an object went that was not needed"
                )
            else:
                model = self.model
                things = model.sealed().values()
                left = [t for t in things if t.size and not t.is_kept and not model.is_pinned(t)]
                assert not left, "there was more to evict"

        self.send(pick(self.active, which), Evict(size_bytes), judge_reply)

    @rule(which=NUMBERS, share=SHARES)
    def set_limit(self, which: int, share: int) -> None:
        """Limit what a client may hold, or lift its limit."""
        peer, limit = pick(self.active, which), share * self.capacity // 1024

        def judge_reply(reply: Reply) -> None:
            assert reply == Done()
            self.model.limits[peer.number] = limit

        self.send(peer, SetOptions(limit, ""), judge_reply)

    @rule()
    def settle(self) -> None:
        """Drain all sockets: then everything is answered but gets that wait."""
        self.talk.wake()
        self.model.note_wake()
        self.talk.turn()
        if self.creators:  # in the order in which they came
            first = next(iter(self.creators.values()))
            assert self.largest_gap(self.unevictable()) < align_up(first.size, 64), (
                "nobody serves it"
            )
        for key in self.expected.keys() - self.creators.keys():
            wait = self.model.waits[key]
            assert not wait.may_be_partial
            assert len(wait.filled) < len(wait.request.object_ids)

    # -- leases ------------------------------------------------------------------------------------

    def set_busy(self, peer: Peer, busy: bool) -> None:
        """Write the word that tells whether a client is making an object in its lease."""
        self.talk.write_slot(self.first_word(peer) + BUSY_WORD, busy)

    def first_word(self, peer: Peer) -> int:
        """Return the number of the first word on a client's board."""
        return next(board for board, owner in self.boards.items() if owner is peer) * BOARD_WORDS

    def epoch(self, peer: Peer) -> int:
        """Return the epoch that the store shows a client."""
        board = self.first_word(peer) // BOARD_WORDS
        line = (self.talk.layout.control + board * CONTROL_BYTES) // 8
        return self.talk.words[line + ControlWord.EPOCH]

    @precondition(lambda self: self.capacity >= 1 << 20)
    @rule(which=NUMBERS, needed_bytes=st.integers(0, 5000))
    def ask_lease(self, which: int, needed_bytes: int) -> None:
        """Ask for a lease, unless the client is about to publish in one."""
        peer, rents = pick(self.active, which), self.model.rents
        rent = rents.get(peer.number)
        if rent is not None and rent.making is not None:
            return

        def judge_reply(reply: Reply) -> None:
            assert isinstance(reply, Leased)
            rents.pop(peer.number, None)
            if reply.size_bytes:
                assert not self.model.limits.get(peer.number)
                assert reply.size_bytes >= needed_bytes
                end = reply.offset + reply.size_bytes
                assert reply.offset >= self.talk.layout.data
                assert end <= self.talk.layout.data + self.talk.layout.data_bytes
                rents[peer.number] = Rent(reply.offset, end, reply.objects, reply.epoch)

        self.send(peer, AskLease(needed_bytes), judge_reply)

    @precondition(lambda self: self.model.rents)
    @rule(which=NUMBERS, gap=st.integers(0, 2), size_bytes=st.integers(0, 5000))
    def begin_to_publish(self, which: int, gap: int, size_bytes: int) -> None:
        """Take room from a lease, unless that was recalled, and write to it."""
        number = pick(sorted(self.model.rents), which)
        peer, rent = self.talk.peers[number], self.model.rents[number]
        if rent.making is not None:
            return
        self.set_busy(peer, True)
        offset = rent.start + 64 * gap
        is_recalled = self.epoch(peer) != rent.epoch
        if is_recalled or offset + align_up(size_bytes, 64) > rent.end or not rent.objects:
            self.set_busy(peer, False)
            del self.model.rents[number]
            if not is_recalled:
                self.send(peer, AskLease(1 << 40), self.judge_no_lease)
            return
        thing = self.new_thing(peer, name(1000 + self.incarnations), size_bytes, 0)
        thing.offset = offset
        self.fill(thing)
        rent.making = thing
        rent.objects -= 1

    def judge_no_lease(self, reply: Reply) -> None:
        """See that nothing is leased for an object that no lease has room for."""
        assert reply == Leased(0, 0, 0, 0)

    @precondition(lambda self: any(rent.making for rent in self.model.rents.values()))
    @rule(
        which=NUMBERS,
        chosen=st.none() | NUMBERS,
        is_hinted_at=st.booleans(),
        found_by=st.none() | NUMBERS,
    )
    def publish(
        self, which: int, chosen: int | None, is_hinted_at: bool, found_by: int | None = None
    ) -> None:
        """Publish what was written: whatever happened meanwhile, it is there; who waits, or finds the record, may have it first."""
        making = sorted(n for n, rent in self.model.rents.items() if rent.making)
        peer = self.talk.peers[pick(making, which)]
        rent = self.model.rents[peer.number]
        thing = rent.making
        assert thing is not None
        if chosen is not None and (free := self.waited_for()):
            thing.object_id = pick(free, chosen)
        rent.making = None
        rent.start = thing.offset + align_up(thing.size, 64)
        self.model.things[thing.object_id] = thing
        word = self.talk.words[wanted_at(crc32(thing.object_id))]
        wait = self.waiting_by(word, thing.object_id)
        peer.write_silently(Publish(thing.object_id, thing.offset, thing.data_size, 0, CODEC))
        if wait is not None and thing.size and is_hinted_at:
            self.take(wait, word, thing)
        if found_by is not None and thing.size:
            slot = pick(self.active, found_by).free_slots.pop()
            self.talk.write_slot(slot, pin_word(crc32(thing.object_id), thing.offset))
            self.model.pins[slot] = thing
        peer.tell(Post())
        self.set_busy(peer, False)
        assert thing.is_sealed
        assert wait is None or self.talk.words[wanted_at(crc32(thing.object_id))] != word

    @precondition(lambda self: self.capacity >= 1 << 20)
    @rule(
        putter=NUMBERS,
        getter=NUMBERS,
        object_id=IDS,
        size_bytes=st.integers(0, 5000),
        is_hinted_at=st.booleans(),
    )
    def hand_over(
        self, putter: int, getter: int, object_id: bytes, size_bytes: int, is_hinted_at: bool
    ) -> None:
        """Have one client wait for what another one publishes then, unless it is there, or there is no lease."""
        rents, number = self.model.rents, pick(self.active, putter).number
        if object_id not in self.model.things:
            self.get(getter, [object_id], wait=True)
        if number not in rents:
            self.ask_lease(putter, 0)
        if number in rents:
            self.begin_to_publish(sorted(rents).index(number), 0, size_bytes)
        making = sorted(n for n, rent in rents.items() if rent.making)
        if number in making:
            waited_for = self.waited_for()
            chosen = waited_for.index(object_id) if object_id in waited_for else None
            self.publish(making.index(number), chosen, is_hinted_at)

    def waited_for(self) -> list[bytes]:
        """Return the ids that somebody waits for and nobody has taken."""
        ids = {i for wait in self.model.waits.values() for i in wait.request.object_ids}
        return sorted(ids - self.model.things.keys())

    def waiting_by(self, word: int, object_id: bytes) -> Wait | None:
        """Return the get that a word of the header names, if that waits for this object."""
        request_id, first_board = word >> 32, (word & 0xFFFF_FFFF) - 1
        if not word:
            return None
        wait = self.model.waits[self.boards[first_board].number, request_id]
        return wait if wait.request.object_ids[0] == object_id else None

    def take(self, wait: Wait, word: int, thing: Thing) -> None:
        """Have the client that waits take what it was hinted at, as the header still names it."""
        slot = wait.peer.free_slots.pop()
        self.talk.write_slot(slot, pin_word(crc32(thing.object_id), thing.offset))
        self.talk.write_slot(wait.request.slots[0], TAKEN)
        assert self.talk.words[wanted_at(crc32(thing.object_id))] == word
        wait.is_taken = True
        self.model.pins[slot] = thing

    @precondition(lambda self: any(rent.making for rent in self.model.rents.values()))
    @rule(which=NUMBERS, object_id=IDS)
    def claim(self, which: int, object_id: bytes) -> None:
        """Create an object of what was written, under an id that is free."""
        making = sorted(n for n, rent in self.model.rents.items() if rent.making)
        peer = self.talk.peers[pick(making, which)]
        rent = self.model.rents[peer.number]
        thing = rent.making
        assert thing is not None
        if not thing.size or object_id in self.model.things:
            return
        thing.object_id = object_id
        rent.making = None
        rent.start = thing.offset + align_up(thing.size, 64)
        slot = peer.free_slots.pop()
        self.talk.write_slot(slot, pin_word(crc32(object_id), thing.offset))
        self.model.things[object_id] = thing
        self.model.pins[slot] = thing
        peer.write(Claim(object_id, thing.offset, thing.data_size, 0, CODEC, slot))
        self.set_busy(peer, False)

    # -- memory ------------------------------------------------------------------------------------

    @rule(which=NUMBERS)
    def trim(self, which: int) -> None:
        """Have all memory given back that nothing uses."""

        def judge_reply(reply: Reply) -> None:
            assert isinstance(reply, Number)
            size = sum(size for _, size in self.talk.memory.punches[n_punches:])
            assert reply.value == size

        n_punches = len(self.talk.memory.punches)
        self.send(pick(self.active, which), Trim(), judge_reply)
        self.model.note_wake()
        self.talk.turn()
        self.commit_all()

    @rule(seconds=st.integers(0, 60))
    def be_idle(self, seconds: int) -> None:
        """Let time pass in which nobody asks for anything."""
        self.talk.trim(seconds)
        self.commit_all()

    def commit_all(self) -> None:
        """Commit all memory: the model knows nothing of objects that wait for theirs."""
        for _ in self.talk.store.commitment.commit_all():
            pass

    # -- what always holds -------------------------------------------------------------------------

    @invariant()
    def proves_itself(self) -> None:
        """Let the store prove its invariants."""
        self.talk.store.check()

    @invariant()
    def lets_go_what_is_deleted(self) -> None:
        """Find nothing that was deleted while nobody used it."""
        assert not self.going, "a deleted object stayed"

    @invariant()
    def keeps_every_byte(self) -> None:
        """Find in what is there, and in what anybody holds, the content that was written."""
        self.locate()
        hidden = self.talk.store._room.mover.hidden
        for thing in {*self.model.things.values(), *self.model.pins.values()}:
            if hidden != NO_ENTRY and hidden == self.talk.store._parts.table.find(thing.object_id):
                continue  # it is on its way
            content = self.talk.raw[thing.offset : thing.offset + thing.size]
            assert content == thing.content, "an object holds what was not written to it"

    @invariant()
    def has_memory_for_every_byte(self) -> None:
        """Find memory behind whatever anybody may read or write."""
        model = self.model
        making = {rent.making for rent in model.rents.values() if rent.making}
        for thing in {*model.things.values(), *model.pins.values(), *making}:
            assert self.talk.memory.has(thing.offset, thing.size), "somebody may meet a hole"

    @invariant()
    def shows_every_pin(self) -> None:
        """Find on the boards what the clients believe."""
        for slot, thing in self.model.pins.items():
            word = self.talk.read_slot(slot)
            assert word
            parts = self.talk.store._parts
            if word & AT_OFFSET:
                client = parts.boards.owner(slot // BOARD_WORDS)
                assert client is not None
                held = map(parts.table.object_id, parts.boards.held_by(client))
                assert thing.object_id in held
            else:
                assert parts.table.object_id(word - 1) == thing.object_id

    @invariant()
    def asks_to_be_woken(self) -> None:
        """Find the header's word set while anything waits for a release that is to come."""
        waits = any(self.model.is_pinned(thing) for thing in self.model.limbo)
        waits = waits or self.talk.store.has_waiters
        if waits or any(thing.is_doomed for thing in self.model.things.values()):
            assert self.talk.wake_word == 1

    @invariant()
    def answers_no_complete_get_late(self) -> None:
        """Keep no get waiting that has everything."""
        for wait in self.model.waits.values():
            assert len(wait.filled) < len(wait.request.object_ids)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(deadline=None, stateful_step_count=50)
