from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmplasma.control import Control
from shmplasma.layout import ALIGNMENT, EntryState, Layout, align_up
from shmplasma.moves import Moves
from shmplasma.pins import Boards
from shmplasma.residents import Residents
from shmplasma.room import Room
from shmplasma.table import NO_ENTRY, Table
from tests.conversation import RecordedMemory, name, new_segment

CLIENT = 1


class Storeroom:
    """A room with its table and boards, and one client that pins."""

    def __init__(self, capacity: int) -> None:
        self.layout = layout = Layout.plan(capacity, 4096)
        self.words, self.raw = new_segment(layout)
        self.memory = RecordedMemory()
        self.table = Table(layout, self.words, self.raw, self.memory.commit)
        self.boards = Boards(
            layout, self.words, self.raw, Control(layout, self.words), self.memory.commit
        )
        self.boards.grant(CLIENT, 4711, 1)
        self.visited = self.raw[layout.visited : layout.visited + layout.n_entries]
        self.moves = Moves(self.words, self.raw, self.table)
        residents = Residents(self.table, self.visited)
        self.room = Room(
            layout, self.words, self.table, self.boards, residents, self.memory, self.moves
        )
        self.n_objects = 0
        self.unnamed: list[tuple[int, int]] = []

    def put(self, size_bytes: int) -> int:
        """Store a sealed object of this size and return its entry; what has to go for it goes."""
        offset, _ = self.room.allocate(size_bytes)
        assert offset is not None
        entry = self.table.insert(name(self.n_objects), 0, offset, size_bytes, 0, 1)
        self.n_objects += 1
        self.table.seal(entry, 1)
        self.room.residents.sealed(entry)
        return entry

    def fill(self, size_bytes: int) -> list[int]:
        """Store as many objects of this size as there are lines for; return their entries."""
        count = self.room.free_bytes // align_up(size_bytes, ALIGNMENT)
        return [self.put(size_bytes) for _ in range(count)]

    def is_there(self, number: int) -> bool:
        """Tell whether the object that was stored as number so-and-so is still there."""
        return self.table.find(name(number)) != NO_ENTRY

    def allocate(self, size_bytes: int) -> int | None:
        """Find an extent, evicting and moving what is needed for it."""
        offset = self.room.allocate(size_bytes)[0]
        if offset is not None or not self.room.is_fragmented(size_bytes):
            return offset
        self.room.mover.begin(size_bytes, self.pinned_extents)
        while (done := self.room.mover.advance()) is None:
            self.check()
        return self.room.allocate(size_bytes)[0] if done else None

    def pinned_extents(self) -> list[tuple[int, int]]:
        """Return offset and size of what cannot be moved."""
        pinned = [(self.table.location(e)[0], self.table.size(e)) for e in self.boards.pinned()]
        return pinned + self.unnamed

    def gone(self) -> list[int]:
        """Return the numbers of the objects that are not there any more."""
        return [number for number in range(self.n_objects) if not self.is_there(number)]

    def check(self) -> None:
        """Prove the invariants."""
        self.table.check()
        self.boards.check()
        self.room.check([(offset, align_up(size, ALIGNMENT)) for offset, size in self.unnamed])


# -- extents ---------------------------------------------------------------------------------------


@given(st.integers(1, 20_000))
def test_an_object_of_the_capacity_fits_and_one_byte_more_does_not(capacity: int) -> None:
    """All of a new store can be had in one piece; at most the rest of a line comes on top."""
    storeroom = Storeroom(capacity)
    room = storeroom.room
    assert room.free_bytes == room.largest_bytes == align_up(capacity, ALIGNMENT)
    assert room.allocate(align_up(capacity, ALIGNMENT) + 1) == (None, [])
    assert room.allocate(capacity) == (storeroom.layout.data, [])
    assert room.allocate(1) == (None, [])
    room.give_back(storeroom.layout.data, capacity)
    storeroom.check()


def test_an_object_of_no_bytes_takes_no_room() -> None:
    """It is stored in a full store, and its going frees nothing."""
    storeroom = Storeroom(64)
    storeroom.put(64)
    entries = [storeroom.put(0) for _ in range(3)]
    assert storeroom.room.free_bytes == 0
    storeroom.check()
    assert storeroom.room.take(entries) == entries
    assert storeroom.room.free_bytes == 0
    assert storeroom.is_there(0)
    storeroom.room.give_back(storeroom.layout.data, 0)
    storeroom.check()


def test_what_is_large_begins_on_a_page() -> None:
    """A small object takes what is left before it."""
    large = 16 << 20
    storeroom = Storeroom(2 * large + 4096)
    start = storeroom.layout.data
    entries = [storeroom.put(size) for size in (64, large, 100, large)]
    offsets = [storeroom.table.location(entry)[0] - start for entry in entries]
    assert offsets == [0, 4096, 64, 4096 + large]
    storeroom.check()


def test_what_is_large_takes_the_last_line_as_well() -> None:
    """Where no extent has room for it from a page on, it begins where one begins."""
    large = 16 << 20
    storeroom = Storeroom(large + 64)
    storeroom.put(64)
    assert storeroom.room.allocate(large) == (storeroom.layout.data + 64, [])
    storeroom.room.give_back(storeroom.layout.data + 64, large)
    storeroom.check()


@pytest.mark.parametrize(("count", "size"), [(3, 20_000_000), (5, 20_000_000), (4, 25_000_000)])
def test_large_objects_fill_the_store(count: int, size: int) -> None:
    """As many have room as their sizes say, though not all of them begin on a page then."""
    storeroom = Storeroom(count * size)
    for number in range(count):
        storeroom.put(size)
        assert storeroom.room.free_bytes == (count - number - 1) * size
    storeroom.check()


def test_room_is_made_in_order_of_age() -> None:
    """The oldest objects that were not read go first, and no more of them than are needed."""
    storeroom = Storeroom(640)
    storeroom.fill(64)
    assert storeroom.allocate(100) == storeroom.layout.data
    assert storeroom.gone() == [0, 1]
    storeroom.room.give_back(storeroom.layout.data, 100)
    storeroom.check()


def test_a_read_object_is_spared_once() -> None:
    """An object that was read since the hand last passed stays while another can go."""
    storeroom = Storeroom(256)
    entries = storeroom.fill(64)
    storeroom.room.residents.read(entries[0])
    storeroom.visited[entries[1]] = 255  # as a client may write it
    for expected in ([2], [2, 3], [0, 2, 3]):
        storeroom.allocate(1)
        assert storeroom.gone() == expected


def test_pinned_objects_stay_whatever_is_asked_for() -> None:
    """What cannot be had without a pinned object is refused, and then nothing at all goes."""
    storeroom = Storeroom(640)
    entries = storeroom.fill(64)
    storeroom.boards.pin(1, entries[4])
    assert storeroom.room.allocate(640) == (None, [])
    assert storeroom.gone() == []
    offset = storeroom.allocate(320)
    assert offset == storeroom.layout.data + 5 * 64
    assert storeroom.is_there(4)
    storeroom.room.give_back(offset, 320)
    storeroom.check()


def test_pins_that_split_the_room_make_it_too_small() -> None:
    """When there are bytes enough, but pins between them, no more goes than bytes are needed."""
    storeroom = Storeroom(640)
    entries = storeroom.fill(64)
    storeroom.boards.pin(1, entries[5])
    assert storeroom.allocate(6 * 64) is None
    assert storeroom.gone() == [0, 1, 2, 3, 4, 6]
    assert (storeroom.room.free_bytes, storeroom.room.largest_bytes) == (384, 320)
    storeroom.check()


def test_free_room_in_pieces_costs_nobody_its_place() -> None:
    """Enough free bytes in pieces are a reason to move objects, and none to evict any."""
    storeroom = Storeroom(1024)
    entries = storeroom.fill(64)
    assert storeroom.room.take(entries[1::2]) == entries[1::2]
    assert (storeroom.room.free_bytes, storeroom.room.largest_bytes) == (512, 64)
    assert storeroom.room.allocate(192) == (None, [])
    assert storeroom.room.is_fragmented(192)
    offset = storeroom.allocate(192)
    assert offset is not None
    assert storeroom.gone() == list(range(1, 16, 2))
    storeroom.room.give_back(offset, 192)
    storeroom.check()


@pytest.mark.parametrize("size_bytes", [1, 64, 65, 100])
def test_no_more_objects_go_than_lines_are_needed(size_bytes: int) -> None:
    """What an object frees is its lines, not its bytes: one that is as large makes room for another."""
    storeroom = Storeroom(4096)
    storeroom.fill(size_bytes)
    if storeroom.room.free_bytes:
        storeroom.put(storeroom.room.free_bytes)
    assert storeroom.allocate(size_bytes) == storeroom.layout.data
    assert storeroom.gone() == [0]


class Untouched(set[int]):
    """A set that is asked for single members alone."""

    def __iter__(self) -> Iterator[int]:
        pytest.fail("each member was looked at")

    __or__ = __ror__ = lambda *_: pytest.fail("each member was looked at")


def test_what_is_protected_is_not_looked_at_to_find_room() -> None:
    """However many objects references own: the bytes of all of them are known, and those that go are asked for one by one."""
    storeroom = Storeroom(1024)
    entries, residents = storeroom.fill(64), storeroom.room.residents
    for entry in entries[:8]:
        residents.protect(entry, True)
    storeroom.boards.pin(1, entries[7])
    storeroom.boards.pin(2, entries[8])
    residents._protected = Untouched(residents._protected)
    assert storeroom.room.attainable_bytes == 7 * 64
    assert storeroom.room.may_make(7 * 64)
    assert not storeroom.room.may_make(8 * 64)
    assert storeroom.room.make_room(7 * 64) == [name(number) for number in range(9, 16)]


def test_what_is_pinned_is_summed_up_only_where_what_goes_next_is_too_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many objects are held: who needs room for a small one hears from those that go next that there is some."""
    storeroom = Storeroom(1024)
    for slot, entry in enumerate(storeroom.fill(64)[:8], 1):
        storeroom.boards.pin(slot, entry)
    assert storeroom.room.make_room(64) == [name(8)]
    with monkeypatch.context() as patch:
        patch.setattr(Residents, "evictable_bytes", lambda *_: pytest.fail("all were looked at"))
        assert storeroom.room.may_make(8 * 64)
    monkeypatch.setattr("shmplasma.residents._LOOKED_AT", 3)
    assert storeroom.room.may_make(8 * 64)
    assert not storeroom.room.may_make(9 * 64)


def test_where_most_is_pinned_the_rest_is_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may go is known from the smaller part of the objects: the sizes of the others are not looked at."""
    storeroom = Storeroom(1024)
    entries = storeroom.fill(64)
    storeroom.room.residents.protect(entries[15], True)
    sizes, looked_at = Table.sizes, list[int]()

    def counted(self: Table, entries: Iterable[int]) -> dict[int, int]:
        looked_at.append(len(found := sizes(self, entries)))
        return found

    monkeypatch.setattr(Table, "sizes", counted)
    for slot, entry in enumerate(entries, 1):
        assert storeroom.room.attainable_bytes == 64 * max(15 - entry, 0)
        storeroom.boards.pin(slot, entry)
    assert looked_at == list(range(11))


def test_the_bytes_of_what_is_protected_are_known() -> None:
    """Whatever becomes of it: it is kept or cached, it is protected twice or no more, or goes."""
    storeroom = Storeroom(1024)
    first, second, third = (storeroom.put(size) for size in (64, 100, 200))
    room, residents = storeroom.room, storeroom.room.residents
    for entry in (first, first, second, third):
        residents.protect(entry, True)
        storeroom.check()
    assert room.attainable_bytes == 1024 - 64 - 128 - 256
    residents.keep(second, True)
    storeroom.check()
    residents.protect(second, False)
    residents.protect(second, True)
    residents.keep(second, False)
    storeroom.check()
    assert room.attainable_bytes == 1024 - 64 - 128 - 256
    assert room.take([third]) == [third]
    residents.protect(second, False)
    storeroom.check()
    assert room.attainable_bytes == 1024 - 64


# -- moving ----------------------------------------------------------------------------------------


def test_what_a_compaction_holds_can_be_had_when_it_is_done() -> None:
    """Also what an object is just being copied to."""
    storeroom = Storeroom(1024)
    mover = storeroom.room.mover
    mover.slice_bytes = 1
    storeroom.room.take(storeroom.fill(64)[1::2])
    mover.begin(192, storeroom.pinned_extents)
    while mover.advance() is None:
        assert storeroom.room.attainable_bytes == 1024


def test_all_of_a_run_slide_at_once() -> None:
    """However many they are, each of them is moved once."""
    storeroom = Storeroom(20 * 4 * ALIGNMENT)
    entries = [storeroom.put(lines * ALIGNMENT) for _ in range(20) for lines in (3, 1)]
    storeroom.room.take(entries[1::2])
    assert storeroom.allocate(20 * ALIGNMENT) == storeroom.layout.data + 60 * ALIGNMENT
    assert storeroom.room.mover.moves == 19


def test_what_was_pinned_again_and_again_is_moved_when_it_is_not() -> None:
    """What was taken for one that cannot be moved is tried again before the compaction ends in vain."""
    storeroom = Storeroom(8 * ALIGNMENT)
    entries = [storeroom.put(lines * ALIGNMENT) for lines in (3, 2, 3)]
    storeroom.room.take(entries[::2])
    mover, boards = storeroom.room.mover, storeroom.boards

    def let_go() -> list[tuple[int, int]]:
        boards.unpin_all(CLIENT, entries[1])
        return []

    mover.begin(5 * ALIGNMENT, let_go)
    done = None
    while done is None:
        if mover.pins_met < 8:
            storeroom.memory.at_barrier = lambda: boards.pin(1, entries[1])
        done = mover.advance()
    assert (done, mover.pins_met) == (True, 8)
    storeroom.check()


def test_nothing_goes_for_room_that_was_given_away_meanwhile() -> None:
    """When there are too few bytes left, the compaction ends."""
    storeroom = Storeroom(1024)
    storeroom.room.take(storeroom.fill(64)[1::2])
    gone, mover = storeroom.gone(), storeroom.room.mover
    mover.begin(192, storeroom.pinned_extents, 1024)
    for _ in range(6):
        storeroom.put(64)
    while (done := mover.advance()) is None:
        storeroom.check()
    assert not done
    assert storeroom.gone() == gone


def test_no_more_goes_than_may_be_spared_in_all() -> None:
    """What was evicted for one window counts for the next."""
    storeroom = Storeroom(256)
    entries, mover, table = storeroom.fill(64), storeroom.room.mover, storeroom.table
    objects = [(table.location(entry)[0], 64, table.state_word(entry), entry) for entry in entries]
    mover.begin(64, storeroom.pinned_extents, 128)
    told = [mover._displace([each], mover._spare_bytes) for each in objects]
    assert told == [True, True, False, False]
    assert storeroom.gone() == [0, 1]


# -- taking ----------------------------------------------------------------------------------------


def test_taking_announces_itself_before_it_looks() -> None:
    """At the barrier all victims are EVICTING and still linked; a pin from before it saves one."""
    storeroom = Storeroom(640)
    entries = storeroom.fill(64)
    words_before = [storeroom.table.state_word(entry) for entry in entries]
    seen: list[int] = []

    def at_barrier() -> None:
        seen.extend(storeroom.table.state(entry) for entry in entries)
        storeroom.boards.pin(7, entries[3])

    storeroom.memory.at_barrier = at_barrier
    taken = storeroom.room.take(entries)
    assert seen == [EntryState.EVICTING] * 10
    assert storeroom.memory.barriers == 1
    assert taken == [entry for entry in entries if entry != entries[3]]
    assert storeroom.is_there(3)
    assert storeroom.table.state_word(entries[3]) == words_before[3]
    assert [storeroom.table.object_id(e) for e in taken] == [name(n) for n in range(10) if n != 3]
    storeroom.check()


def test_what_is_deleted_stays_so_while_it_is_taken() -> None:
    """A successor of a store that dies then sees it; nothing is left of that when it has gone."""
    storeroom = Storeroom(64)
    (entry,) = storeroom.fill(64)
    storeroom.table.set_state(entry, EntryState.DOOMED)
    storeroom.room.doomed.add(entry)
    seen: list[int] = []
    storeroom.memory.at_barrier = lambda: seen.append(storeroom.table.state(entry))
    assert storeroom.room.take([entry]) == [entry]
    assert seen == [EntryState.DOOMED]
    assert not storeroom.room.doomed


def test_taking_one_sees_a_pin_of_the_last_moment() -> None:
    """The cheap way to look for a single entry comes after the barrier as well."""
    storeroom = Storeroom(64)
    (entry,) = storeroom.fill(64)
    storeroom.memory.at_barrier = lambda: storeroom.boards.pin(1, entry)
    assert storeroom.room.take([entry]) == []
    assert storeroom.table.state(entry) == EntryState.SEALED
    storeroom.check()
    storeroom.boards.unpin_all(CLIENT, entry)
    assert storeroom.room.take([entry]) == [entry]
    assert storeroom.room.free_bytes == 64


def test_eviction_goes_on_when_a_victim_was_pinned_meanwhile() -> None:
    """A pin that comes at the barrier costs another object its place, not the request."""
    storeroom = Storeroom(256)
    entries = storeroom.fill(64)
    storeroom.memory.at_barrier = lambda: storeroom.boards.pin(1, entries[0])
    storeroom.room.evict(64)
    assert storeroom.gone() == [1]
    storeroom.check()


def test_what_was_spared_goes_when_a_victim_was_pinned_meanwhile() -> None:
    """It was to stay because the other one would have been enough."""
    storeroom = Storeroom(4096)
    entries = [storeroom.put(size) for size in (100, 200)]
    storeroom.memory.at_barrier = lambda: storeroom.boards.pin(1, entries[1])
    storeroom.room.evict(200)
    assert storeroom.gone() == [0]
    storeroom.check()


def test_eviction_goes_on_until_it_is_enough() -> None:
    """Objects go until their sizes are what was asked for, none too many, or until nothing more may go."""
    storeroom = Storeroom(4096)
    entries = [storeroom.put(size) for size in (100, 200, 300, 400)]
    storeroom.boards.pin(1, entries[3])
    for size_bytes, expected in ((100, [0]), (201, [0, 2]), (1 << 62, [0, 1, 2])):
        storeroom.room.evict(size_bytes)
        assert storeroom.gone() == expected
    assert storeroom.room.free_bytes == 4096 - 448
    storeroom.check()


def test_so_many_objects_go_at_most() -> None:
    """Whoever must not keep others waiting says how many may go; they are the oldest ones."""
    storeroom = Storeroom(1024)
    storeroom.fill(64)
    assert storeroom.room.make_room(512, 3) == [name(0), name(1), name(2)]
    assert storeroom.gone() == [0, 1, 2]
    assert len(storeroom.room.make_room(64, 3)) == 1
    storeroom.check()


def test_neighbours_that_go_leave_one_extent() -> None:
    """Whatever their order in the queue is, and wherever something stays between them."""
    storeroom = Storeroom(640)
    entries = storeroom.fill(64)
    taken = [entries[n] for n in (7, 2, 1, 8, 4, 3)]
    assert storeroom.room.take(taken) == taken
    start = storeroom.layout.data
    extents = list(storeroom.room._allocator.free_extents())
    assert extents == [(start + 64, 256), (start + 448, 128)]
    storeroom.check()


# -- proof -----------------------------------------------------------------------------------------


DAMAGES: dict[str, Callable[[Storeroom], object]] = {
    "the queue disagree": lambda s: s.table.set_state(0, EntryState.CREATED),
    "what is not there": lambda s: s.room.residents._queue.insert(9),
    "sum of evictable bytes": lambda s: setattr(s.room.residents, "_cached_bytes", 1),
    "sum of protected bytes": lambda s: setattr(s.room.residents, "_protected_bytes", 1),
    "that of evictable ones": lambda s: setattr(s.room.residents, "_protected_cached_bytes", 1),
    "sum of kept bytes": lambda s: setattr(s.room.residents, "_kept_bytes", 1),
    "a gap or an overlap": lambda s: s.room.give_back(s.layout.data, 64),
}


@pytest.mark.parametrize("complaint", DAMAGES)
def test_the_proof_fails_for_a_damaged_room(complaint: str) -> None:
    """Each clause of `check` notices what it is there for."""
    storeroom = Storeroom(640)
    storeroom.put(64)
    storeroom.put(64)
    storeroom.check()
    DAMAGES[complaint](storeroom)
    with pytest.raises(AssertionError, match=complaint):
        storeroom.room.check([])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_no_entry_names_may_come_into_the_way_at_any_time(count: int) -> None:
    """A lease that is granted while a compaction goes on stays what it is, at whatever point of it that happens."""
    for steps in range(200):
        storeroom = Storeroom(128 * ALIGNMENT)
        entries = [storeroom.put(lines * ALIGNMENT) for lines in (3, 40, 2, 40, 3, 30)]
        storeroom.room.mover.slice_bytes = 1
        storeroom.moves.piece_bytes = ALIGNMENT
        storeroom.room.take(entries[::2])
        mover = storeroom.room.mover
        mover.begin(12 * ALIGNMENT, storeroom.pinned_extents)
        for _ in range(steps):
            if mover.is_busy:
                mover.advance()
        if not mover.is_busy:
            break
        for _ in range(count):
            offset, _ = storeroom.room.allocate(3 * ALIGNMENT)
            if offset is not None:
                storeroom.unnamed.append((offset, 3 * ALIGNMENT))
        while mover.is_busy:
            mover.advance()
            storeroom.check()
    else:
        pytest.fail("the compaction has no end")
