"""Finding what was put and not read: which records say that something is there, and who has it then."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest

from shmplasma import unread
from shmplasma.absence import Absence
from shmplasma.layout import BOARD_WORDS, CONTROL_BYTES, ControlWord, EntryState, HeaderWord
from shmplasma.leases import BUSY_WORD
from shmplasma.offset_pins import pin_word
from shmplasma.outbox import RECORDS
from shmplasma.pinning import Pin
from shmplasma.posted import Abort, Claim, Detach, Posted, Publish, Seal
from shmplasma.replies import Done, Leased, Number
from shmplasma.requests import AskLease, Contains, Delete, Evict, Flush
from shmplasma.table import NO_ENTRY
from shmplasma.unread import Unread
from tests.conversation import Conversation, name
from tests.crash.damage import Reopened

A, B = map(name, range(1, 3))
SIZE = 1000
CODEC = 3


class Scene:
    """A client that looks for A, one that is going to put it, and a third one.

    Attributes
    ----------
    offset : int
        Where the putter's lease begins.
    when_pinned : callable
        Called when the getter has a slot, before it writes to it.
    """

    def __init__(self) -> None:
        talk = self.talk = Conversation(1 << 20)
        self.getter, self.putter, self.other = talk.client(), talk.client(), talk.client()
        self.offset = self.putter.ask(AskLease(SIZE), Leased).offset
        self.slots = self.getter.free_slots
        self.when_pinned: Callable[[], object] = lambda: None
        segment: Any = SimpleNamespace(layout=talk.layout, read_map=talk.raw, words=talk.words)
        boards: Any = SimpleNamespace(take_one=self._take_one)
        self.unread = Unread(segment, Absence(segment), boards, self._find)
        first = talk.layout.boards // 8
        self._board: Any = SimpleNamespace(
            words=talk.words[first : first + talk.layout.n_boards * BOARD_WORDS],
            free=self.slots,
            wake_word=b"\0",
        )

    def _find(self, object_id: bytes) -> int:
        entry = self.entry_of(object_id)
        return -1 if entry < 0 else self.talk.layout.entry(entry)

    def _take_one(self) -> Pin | None:
        if not self.slots:
            return None
        pin = Pin()
        pin.board, pin.word = self._board, self.slots.pop()
        self.when_pinned()
        return pin

    def entry_of(self, object_id: bytes) -> int:
        """Return the entry of an object."""
        return self.talk.store._parts.table.find(object_id)

    def write(self, *records: Posted) -> None:
        """Have the putter write records that nobody is told of."""
        for record in records:
            self.putter.write_silently(record)

    def publish(self, object_id: bytes = A, size_bytes: int = SIZE) -> Publish:
        """Return what says that an object lies at the beginning of the putter's lease."""
        return Publish(object_id, self.offset, size_bytes, 0, CODEC)

    def claim(self, size_bytes: int = SIZE) -> None:
        """Have the putter create A in its lease, and tell nobody."""
        slot = self.putter.free_slots.pop()
        self.talk.write_slot(slot, pin_word(crc32(A), self.offset))
        self.write(Claim(A, self.offset, size_bytes, 0, CODEC, slot))

    def read(self) -> None:
        """Have the store read what was written."""
        self.putter.ask(Flush(), Done)

    def take(self) -> Any:
        """Return what the getter takes of A."""
        places = self.unread.places()
        assert places is not None
        return self.unread.take(A, places)

    @property
    def pinned(self) -> set[int]:
        """What stands in the getter's slots."""
        board = self.talk.layout.boards // 8
        start = board + BOARD_WORDS * (self.slots[0] // BOARD_WORDS)
        return set(self.talk.words[start + 1 : start + BOARD_WORDS]) - {0}

    def evict(self) -> set[bytes]:
        """Evict what may go; return the ids of what is there."""
        self.other.ask(Evict(1 << 20), Number)
        return self.talk.ids()


@pytest.fixture
def scene() -> Scene:
    """Return one in which nothing was put yet."""
    return Scene()


def _published(scene: Scene) -> None:
    scene.write(scene.publish())


def _claimed(scene: Scene) -> None:
    scene.claim()
    scene.write(Seal(A))


def _claimed_and_read(scene: Scene) -> None:
    scene.claim()
    scene.read()
    scene.write(Seal(A))


def _created(scene: Scene) -> None:
    scene.putter.create(A, SIZE)
    scene.write(Seal(A))


PUT = [_published, _claimed, _claimed_and_read, _created]


@pytest.mark.parametrize("happens", PUT)
def test_what_was_put_is_had_before_the_store_reads_of_it(
    scene: Scene, happens: Callable[[Scene], None]
) -> None:
    """It is where its record says, or its entry; nothing takes it away until it is let go of."""
    happens(scene)
    places = scene.unread.places()
    assert places
    assert scene.unread.has(A, places)
    taken = scene.take()
    assert taken[1:4] == (SIZE, 0, CODEC if happens is not _created else 0)
    assert scene.talk.store._parts.table.state(scene.entry_of(A)) != EntryState.SEALED
    scene.read()
    scene.talk.store.check()
    for board in {scene.putter.free_slots[0] // BOARD_WORDS}:  # whose writer lets go
        for slot in range(board * BOARD_WORDS + 1, (board + 1) * BOARD_WORDS):
            scene.talk.write_slot(slot, 0)
    assert scene.evict() == {A}
    assert scene.unread.places() == {}
    offset = scene.talk.store._parts.table.location(scene.entry_of(A))[0]
    assert taken[0] == offset
    del taken
    assert scene.pinned == set()
    assert scene.evict() == set()
    scene.talk.store.check()


def test_it_is_deleted_when_it_is_let_go_of(scene: Scene) -> None:
    """As any other object that is held, and its holder wakes the store."""
    _published(scene)
    taken = scene.take()
    scene.other.ask(Delete([A]), Done)
    assert scene.talk.ids() == {A}
    assert scene.talk.wake_word
    del taken
    scene.talk.wake()
    assert scene.talk.ids() == set()
    scene.talk.store.check()


def test_nothing_is_unread(scene: Scene) -> None:
    """Then there is no place, and nothing is pinned."""
    assert scene.unread.places() == {}
    assert scene.take() is None
    _published(scene)
    places = scene.unread.places()
    assert places is not None
    assert places.keys() == {A}
    assert scene.unread.take(B, places) is None
    assert not scene.unread.has(B, places)
    scene.read()
    assert scene.unread.places() == {}
    assert not scene.unread.has(A, {})


def _unsealed(scene: Scene) -> None:
    scene.claim()


def _aborted(scene: Scene) -> None:
    scene.claim()
    scene.write(Abort(A))


def _of_two(scene: Scene) -> None:
    scene.write(scene.publish())
    scene.other.write_silently(Publish(A, scene.offset + 4096, SIZE, 0, CODEC))


def _of_three(scene: Scene) -> None:
    _of_two(scene)
    last = scene.talk.client()
    last.write_silently(Publish(A, scene.offset + 8192, SIZE, 0, CODEC))


def _without_bytes(scene: Scene) -> None:
    scene.write(scene.publish(size_bytes=0))


def _claimed_without_bytes(scene: Scene) -> None:
    scene.claim(size_bytes=0)
    scene.write(Seal(A))


def _created_without_bytes(scene: Scene) -> None:
    scene.putter.create(A, 0)
    scene.write(Seal(A))


def _below_the_data(scene: Scene) -> None:
    scene.write(Publish(A, scene.talk.layout.data - 64, SIZE, 0, CODEC))


def _beyond_the_data(scene: Scene) -> None:
    scene.write(Publish(A, scene.talk.layout.segment_bytes - SIZE + 1, SIZE, 0, CODEC))


def _claimed_beyond_the_data(scene: Scene) -> None:
    offset = scene.talk.layout.segment_bytes - SIZE + 1
    scene.write(Claim(A, offset, SIZE, 0, CODEC, scene.putter.free_slots[-1]), Seal(A))


def _too_short(scene: Scene) -> None:
    assert scene.putter.outbox.append(Publish.KIND, scene.publish().encode()[:-1])


def _sealed_by_another(scene: Scene) -> None:
    scene.other.create(A, SIZE)
    scene.write(Seal(A))


def _taken_by_another(scene: Scene) -> None:
    scene.other.create(A, SIZE)
    scene.write(scene.publish())


def _claimed_from_another(scene: Scene) -> None:
    scene.other.create(A, SIZE)
    scene.claim()
    scene.write(Seal(A))


def _claimed_twice(scene: Scene) -> None:
    scene.claim()
    scene.claim()
    scene.write(Seal(A))


def _created_and_going(scene: Scene) -> None:
    _created(scene)
    scene.talk.store._parts.table.set_state(scene.entry_of(A), EntryState.EVICTING)


def _while_chains_are_written_anew(scene: Scene) -> None:
    _published(scene)
    scene.talk.words[HeaderWord.INSERTIONS] |= 1


@pytest.mark.parametrize(
    "happens",
    [
        _unsealed,
        _aborted,
        _of_two,
        _of_three,
        _without_bytes,
        _claimed_without_bytes,
        _created_without_bytes,
        _below_the_data,
        _beyond_the_data,
        _claimed_beyond_the_data,
        _too_short,
        _sealed_by_another,
        _taken_by_another,
        _claimed_from_another,
        _claimed_twice,
        _created_and_going,
        _while_chains_are_written_anew,
    ],
)
def test_what_the_store_has_to_say(scene: Scene, happens: Callable[[Scene], None]) -> None:
    """A record that makes nothing readable, or is not the only one, or whose id is taken: nothing is pinned."""
    happens(scene)
    places = scene.unread.places()
    assert places
    assert A in places
    assert scene.unread.take(A, places) is None
    assert not scene.unread.has(A, places)
    assert scene.pinned == set()


@pytest.mark.parametrize("happens", PUT)
def test_what_is_read_meanwhile_is_in_the_table(
    scene: Scene, happens: Callable[[Scene], None]
) -> None:
    """Whoever has pinned it then has come too late, and lets go of it."""
    happens(scene)
    scene.when_pinned = scene.read
    assert scene.take() is None
    assert scene.pinned == set()
    assert scene.other.ask(Contains(A), Number).value == 1


def test_an_object_that_comes_while_its_chain_is_looked_at(scene: Scene) -> None:
    """An empty chain says that the id is free only if nothing was inserted since before that look."""
    _published(scene)
    places = scene.unread.places()
    assert places
    words, seen = scene.talk.words, list[int]()
    chain = scene.talk.layout.buckets // 8 + (crc32(A) & scene.talk.layout.n_buckets - 1)

    class Words:
        def __getitem__(self, at: int) -> int:
            word = words[at]
            if at == chain and not seen:
                seen.append(word)
                scene.other.create(A, SIZE)
            return word

    looked_at: Any = Words()
    scene.unread._words = looked_at
    assert scene.unread.take(A, places) is None
    assert seen == [0]


def test_a_board_that_has_changed_hands_says_nothing(scene: Scene) -> None:
    """Its outbox is empty, though ACKNOWLEDGED is 0 again."""
    _published(scene)

    board = scene.putter.free_slots[0] // BOARD_WORDS

    def leave() -> None:
        scene.talk.disconnect(scene.putter)
        at = (scene.talk.layout.control + board * CONTROL_BYTES) // 8 + ControlWord.ACKNOWLEDGED
        assert scene.talk.words[at] == 0

    places = scene.unread.places()
    assert places
    scene.when_pinned = leave
    assert scene.unread.take(A, places) is None
    assert scene.pinned == set()
    assert scene.unread.take(A, places) is None


@pytest.mark.parametrize("put", [_published, _claimed])
@pytest.mark.parametrize("object_id", [A, B], ids=["its id", "another id"])
def test_a_board_that_has_changed_hands_tells_of_the_next_client(
    scene: Scene, put: Callable[[Scene], None], object_id: bytes
) -> None:
    """His record has the number of the one that was meant; it is for whoever looks for its id, and for nobody else."""
    put(scene)
    places = scene.unread.places()
    assert places
    _, n_posted = places[A]
    scene.talk.disconnect(scene.putter)
    scene.other.ask(Delete([A]), Done)
    scene.putter = scene.talk.client()
    offset = scene.putter.ask(AskLease(SIZE), Leased).offset
    for _ in range(1, n_posted):
        scene.write(Seal(name(99)))
    scene.write(Publish(object_id, offset, SIZE, 0, CODEC))
    assert (scene.unread.places() or {})[object_id] == places[A]
    assert scene.unread.has(A, places) == (object_id == A)
    taken = scene.unread.take(A, places)
    if object_id == A:
        assert taken is not None
        assert taken[0] == offset
    else:
        assert taken is None
        assert scene.pinned == set()


def test_without_a_free_slot_the_store_is_asked(scene: Scene) -> None:
    """It grants another board."""
    _published(scene)
    last = scene.slots.pop()
    scene.slots.clear()
    assert scene.take() is None
    scene.slots.append(last)
    assert scene.take() is not None
    _created(again := Scene())
    again.slots.clear()
    assert again.take() is None


def test_records_of_other_kinds_say_nothing_of_it(scene: Scene) -> None:
    """As one that deletes the object which was there before."""
    scene.other.put(A, 64)
    remove = scene.talk.removal(A)
    scene.other.ask(Delete([A]), Done)
    scene.write(scene.publish(), remove)
    assert scene.take() is not None


def test_so_much_is_unread_that_it_takes_less_to_ask(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many records, or too many outboxes; up to that all are seen."""
    for number in range(64):
        scene.write(Seal(name(number)))
    places = scene.unread.places()
    assert places is not None
    assert len(places) == 64
    scene.write(Seal(name(64)))
    assert scene.unread.places() is None
    scene.read()
    monkeypatch.setattr(unread, "_MOST_BOARDS", 3)
    assert scene.unread.places() == {}
    scene.talk.client()
    assert scene.unread.places() is None


def test_a_ring_that_goes_round_meanwhile_is_not_seen(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has written so much, and the store has read it, that what came after it may be anywhere."""
    scene.write(Seal(A))
    unpack = unread._NAME.unpack_from

    def unpack_later(*arguments: Any) -> Any:
        monkeypatch.setattr(unread, "_NAME", SimpleNamespace(unpack_from=unpack))
        for number in range(RECORDS + 1):
            if not number % 64:
                scene.read()
            scene.write(Seal(name(number)))
        scene.read()
        return unpack(*arguments)

    monkeypatch.setattr(unread, "_NAME", SimpleNamespace(unpack_from=unpack_later))
    assert scene.unread.places() is None
    assert scene.unread.places() == {}


def test_what_covers_an_address_is_known_by_its_record(scene: Scene) -> None:
    """Its id, which is not in the table, and where it is."""
    assert list(scene.unread.lying_at(scene.offset)) == []
    _published(scene)
    scene.write(Seal(B))
    expected = [(A, scene.offset, SIZE)]
    for at in (scene.offset, scene.offset + SIZE - 1):
        assert list(scene.unread.lying_at(at)) == expected
    for at in (scene.offset - 1, scene.offset + SIZE):
        assert list(scene.unread.lying_at(at)) == []


# -- what is no object -----------------------------------------------------------------------------


@pytest.mark.parametrize("put", [_published, _claimed])
def test_the_room_of_a_record_that_is_refused_stays_as_long_as_it_is_held(
    scene: Scene, put: Callable[[Scene], None]
) -> None:
    """As where two have put the same id, and one of them was seen first."""
    put(scene)
    room = scene.talk.store._parts.room
    taken = scene.take()
    assert taken is not None
    scene.talk.store._parts.table.insert(A, 0, scene.talk.layout.data, 0, 0, 1, EntryState.SEALED)
    before = room.free_bytes
    board = scene.putter.free_slots[0] // BOARD_WORDS
    scene.read()
    for slot in range(board * BOARD_WORDS + 1, (board + 1) * BOARD_WORDS):
        scene.talk.write_slot(slot, 0)
    scene.talk.wake()
    assert room.free_bytes == before
    del taken
    scene.talk.wake()
    assert room.free_bytes == before + ((SIZE + 63) & -64)


def test_its_holders_are_looked_for_when_it_is_acknowledged(scene: Scene) -> None:
    """Up to then somebody may find it by its record, and pin it."""
    scene.other.put(A, 64)
    _published(scene)
    count = scene.talk.layout.control // 8 + ControlWord.ACKNOWLEDGED
    count += scene.putter.free_slots[0] // BOARD_WORDS * (CONTROL_BYTES // 8)
    seen: list[int] = []

    def look() -> None:
        seen.append(scene.talk.words[count])

    scene.talk.memory.at_barrier = look
    acknowledged = scene.talk.words[count]
    scene.read()
    assert seen == [acknowledged + 1]
    scene.talk.store.check()


# -- a putter that leaves --------------------------------------------------------------------------


def test_who_has_what_its_creator_seals_and_leaves_keeps_its_room(scene: Scene) -> None:
    """One thread says that it leaves, another one seals: the pin of who has seen that comes in time, if it comes before the barrier."""
    talk, slot, releases = scene.talk, scene.slots[-1], scene.talk.store._objects.releases
    scene.putter.release(scene.putter.create(A, SIZE))
    entry = scene.entry_of(A)
    talk.memory.at_barrier = lambda: talk.write_slot(slot, entry + 1)
    scene.putter.ask(Detach(), Done)
    scene.write(Seal(A))
    talk.poll()
    assert scene.entry_of(A) == NO_ENTRY
    assert releases.limbo == {entry}
    talk.store.check()
    talk.write_slot(slot, 0)
    talk.wake()
    assert not releases.limbo
    talk.store.check()


def test_what_is_claimed_by_who_has_left_goes_when_that_is_acknowledged(scene: Scene) -> None:
    """Up to then somebody may find it by the record and pin it; so if it is sealed by another record, which is unread."""
    talk = scene.talk
    board = scene.putter.free_slots[0] // BOARD_WORDS
    talk.words[talk.layout.boards // 8 + board * BOARD_WORDS + BUSY_WORD] = 1
    scene.putter.ask(Detach(), Done)
    scene.claim()
    scene.write(Seal(A))
    count = (talk.layout.control + board * CONTROL_BYTES) // 8 + ControlWord.ACKNOWLEDGED
    claimed = talk.words[count] + 1
    table, seen = talk.store._parts.table, list[int]()

    def look() -> None:
        talk.memory.at_barrier = look
        if any(table.state(entry) == EntryState.EVICTING for entry in range(table.end)):
            seen.append(talk.words[count])

    talk.memory.at_barrier = look
    talk.poll()
    talk.turn()
    assert scene.entry_of(A) == NO_ENTRY
    assert seen
    assert min(seen) >= claimed
    talk.store.check()


# -- a store that dies -----------------------------------------------------------------------------


def test_nothing_goes_before_its_record_is_acknowledged(scene: Scene) -> None:
    """A store has entered an object and died; somebody has deleted it meanwhile.  Who finds the record has either the object, or none."""
    _published(scene)
    scene.read()
    board = scene.putter.free_slots[0] // BOARD_WORDS
    count = (scene.talk.layout.control + board * CONTROL_BYTES) // 8 + ControlWord.ACKNOWLEDGED
    scene.talk.words[count] -= 1  # as if it had died before it said so
    scene.talk.mark(A)
    places = scene.unread.places() or {}
    assert places
    assert scene.unread.take(A, places) is None, "it is in the table, where it is deleted"
    seen: list[tuple[int, Any]] = []

    class Watched(Reopened):
        def new_store(self, words: memoryview, raw: memoryview) -> Any:
            store = super().new_store(words, raw)
            room = store._parts.room
            take = room.take

            def watch(*arguments: Any, **options: Any) -> Any:
                taken = take(*arguments, **options)
                seen.append((words[count], scene.unread.take(A, places)))
                return taken

            room.take = watch  # type: ignore[method-assign]
            return store

    later = Watched(scene.talk.layout, scene.talk.words, scene.talk.raw)
    assert seen == [(scene.talk.words[count], None)]
    assert later.ids() == set()
    later.store.check()


@pytest.mark.parametrize("put", [_published, _claimed])
def test_what_is_put_while_there_is_no_store_is_found(
    scene: Scene, put: Callable[[Scene], None]
) -> None:
    """And held: the next store finds the pin."""
    put(scene)
    taken = scene.take()
    assert taken is not None
    later = Reopened(scene.talk.layout, scene.talk.words, scene.talk.raw)
    assert later.ids() == {A}
    other = later.client()
    board = scene.putter.free_slots[0] // BOARD_WORDS
    for slot in range(board * BOARD_WORDS + 1, (board + 1) * BOARD_WORDS):
        later.write_slot(slot, 0)
    other.ask(Evict(1 << 20), Number)
    assert later.ids() == {A}
    del taken
    other.ask(Evict(1 << 20), Number)
    assert later.ids() == set()
    later.store.check()


def test_a_record_that_may_not_be_there_is_no_matter_of_the_first_look(scene: Scene) -> None:
    """Its client is dropped for it when it is read, by a successor as by any store."""
    assert scene.putter.outbox.append(0xFFFF, b"")
    later = Reopened(scene.talk.layout, scene.talk.words, scene.talk.raw)
    later.store.check()
    assert later.ids() == set()
