from __future__ import annotations

from collections.abc import Callable

import pytest

from shmplasma.control import Control
from shmplasma.deletions import Deletions
from shmplasma.denials import NoRoom, Refused
from shmplasma.layout import BOARD_WORDS, EntryState, HeaderWord, Layout
from shmplasma.leases import Leases
from shmplasma.lifecycle import Lifecycle
from shmplasma.moves import Moves
from shmplasma.pins import Boards, slots_of
from shmplasma.replies import Failure
from shmplasma.requests import Create
from shmplasma.residents import Residents
from shmplasma.room import Room
from shmplasma.table import NO_ENTRY, Table
from tests.conversation import RecordedMemory, name, new_segment

ALICE, BOB = 0, 1
"""Clients; the numbers are those of their boards as well."""


class Household:
    """The parts of a store below the conversation, and two clients that have a board each."""

    def __init__(self, capacity: int = 4096) -> None:
        self.layout = layout = Layout.plan(capacity, 4096)
        self.words, raw = new_segment(layout)
        self.memory = RecordedMemory()
        control = Control(layout, self.words)
        self.table = Table(layout, self.words, raw, self.memory.commit)
        self.boards = Boards(layout, self.words, raw, control, self.memory.commit)
        visited = raw[layout.visited : layout.visited + layout.n_entries]
        moves = Moves(self.words, raw, self.table)
        residents = Residents(self.table, visited)
        self.room = Room(layout, self.words, self.table, self.boards, residents, self.memory, moves)
        self.gone: list[bytes] = []
        self.objects = Lifecycle(
            layout,
            self.words,
            self.table,
            self.boards,
            self.room,
            Leases(layout, self.words, control),
            self.memory,
            self.gone.append,
        )
        self.deletions = Deletions(self.table, self.objects, self.room.mover)
        assert [self.boards.grant(client, 4711, 1) for client in (ALICE, BOB)] == [ALICE, BOB]
        self._free_slots = [list(slots_of(client)) for client in (ALICE, BOB)]

    def slot(self, client: int) -> int:
        """Return a slot of the client's that is free."""
        return self._free_slots[client].pop()

    def create(self, number: int, size_bytes: int = 64, client: int = ALICE, limit: int = 0) -> int:
        """Create an object and return the slot that pins it."""
        request = Create(name(number), size_bytes, 0, 0, self.slot(client))
        self.objects.create(client, request, limit, 1)
        return request.slot

    def put(self, number: int, size_bytes: int = 64, client: int = ALICE) -> None:
        """Create an object, seal it, and let go of it."""
        slot = self.create(number, size_bytes, client)
        self.objects.seal(client, name(number), 2)
        self.release(slot)

    def pin(self, number: int, client: int = ALICE) -> int:
        """Pin a sealed object, as a get does, and return the slot."""
        slot = self.slot(client)
        self.boards.pin(slot, self.objects.find_sealed(name(number)))
        return slot

    def release(self, slot: int) -> None:
        """Let go of what a slot pins, as a client does."""
        self.words[self.layout.boards // 8 + slot] = 0
        self._free_slots[slot // BOARD_WORDS].append(slot)

    def refused(self, action: Callable[[], object]) -> Failure:
        """Do something that is refused, and return why."""
        with pytest.raises(Refused) as refused:
            action()
        assert str(refused.value) == refused.value.failed.text
        return refused.value.failed.failure

    def no_room(self, action: Callable[[], object]) -> NoRoom:
        """Do something for which there is no room, and return why."""
        with pytest.raises(NoRoom) as no_room:
            action()
        return no_room.value

    def sealed(self) -> list[int]:
        """Return the numbers of the objects that can be read."""
        return [n for n in range(200) if self.objects.find_sealed(name(n)) != NO_ENTRY]

    @property
    def wake_word(self) -> int:
        """The header's word that asks clients to wake the store."""
        return min(1, self.words[HeaderWord.WAKE])


@pytest.fixture
def house() -> Household:
    """Return an empty store of 4096 bytes."""
    return Household()


# -- create, seal, abort ---------------------------------------------------------------------------


def test_an_object_is_there_once_it_is_sealed(house: Household) -> None:
    """Before the seal it has a creator and cannot be found; after it, the reverse."""
    house.create(1, 100)
    entry = house.table.find(name(1))
    assert house.objects.find_sealed(name(1)) == NO_ENTRY
    assert house.objects.unsealed.creators == {entry: ALICE}
    assert house.objects.unsealed_bytes == 100
    assert house.objects.seal(ALICE, name(1), 5) == entry
    assert house.objects.find_sealed(name(1)) == entry
    assert not house.objects.unsealed.creators
    assert house.objects.unsealed_bytes == 0
    house.objects.check()


def test_the_writer_pins_its_object(house: Household) -> None:
    """A new object cannot go while its writer has it, sealed or not."""
    slot = house.create(1)
    assert house.boards.held_by(ALICE) == {house.table.find(name(1))}
    house.objects.seal(ALICE, name(1), 1)
    assert house.objects.evict(1) == (0, False)
    house.release(slot)
    assert house.objects.evict(1) == (64, False)
    house.objects.check()


def test_an_id_is_taken_as_long_as_its_object_can_be_found(house: Household) -> None:
    """Unsealed, sealed and doomed objects keep their id; aborted and deleted ones do not."""

    def refusal() -> Failure:
        return house.refused(lambda: house.create(1, client=BOB))

    house.create(1)
    assert refusal() is Failure.EXISTS
    house.objects.abort(ALICE, name(1))
    slot = house.create(1)
    house.objects.seal(ALICE, name(1), 1)
    assert refusal() is Failure.EXISTS
    house.deletions.delete([name(1)])
    assert refusal() is Failure.EXISTS
    house.release(slot)
    house.objects.releases.wake()
    house.create(1, client=BOB)
    house.objects.check()


def test_only_the_creator_seals_and_aborts(house: Household) -> None:
    """To others, and for ids that nobody has created, there is no such object."""
    house.create(1)
    for number in (1, 2):
        for action in (
            lambda n=number: house.objects.seal(BOB, name(n), 1),
            lambda n=number: house.objects.abort(BOB, name(n)),
        ):
            assert house.refused(action) is Failure.NOT_FOUND
    house.objects.seal(ALICE, name(1), 1)
    assert house.refused(lambda: house.objects.abort(BOB, name(1))) is Failure.NOT_FOUND


def test_sealing_twice_says_so_while_the_buffer_is_held(house: Household) -> None:
    """Who still holds what it has sealed is told that; without it the object is not its any more."""
    slot = house.create(1)
    house.objects.seal(ALICE, name(1), 1)
    assert house.refused(lambda: house.objects.seal(ALICE, name(1), 1)) is Failure.SEALED
    assert house.refused(lambda: house.objects.abort(ALICE, name(1))) is Failure.SEALED
    house.release(slot)
    assert house.refused(lambda: house.objects.seal(ALICE, name(1), 1)) is Failure.NOT_FOUND


def test_an_aborted_object_keeps_its_room_until_the_writer_lets_go(house: Household) -> None:
    """In limbo an object is in no chain, its extent is not free, and its id can be used anew."""
    slot = house.create(1, 4000)
    house.objects.abort(ALICE, name(1))
    house.objects.check()
    assert house.table.find(name(1)) == NO_ENTRY
    assert (house.room.free_bytes, house.objects.releases.n_waiting, house.wake_word) == (64, 1, 1)
    house.create(1, 64, BOB)
    assert house.no_room(lambda: house.create(2)).may_come
    house.release(slot)
    house.objects.releases.wake()
    assert (house.room.free_bytes, house.objects.releases.n_waiting, house.wake_word) == (
        4032,
        0,
        0,
    )
    assert house.gone == []
    house.objects.check()


def test_an_aborted_object_goes_at_once_when_its_writer_has_let_go(house: Household) -> None:
    """Nobody has to be woken for an abort after the release."""
    slot = house.create(1)
    house.release(slot)
    house.objects.abort(ALICE, name(1))
    assert (house.room.free_bytes, house.wake_word) == (4096, 0)
    assert house.memory.barriers == 1, "who has it from a record may hold it"
    house.objects.check()


def test_a_client_that_leaves_takes_what_it_has_not_sealed(house: Household) -> None:
    """All its unsealed objects go; what it has sealed, and what others write, stays."""
    for number in (1, 2, 3):
        house.create(number)
    house.create(4, client=BOB)
    house.objects.seal(ALICE, name(2), 1)
    house.boards.clear(ALICE)
    house.objects.unsealed.leave(ALICE)
    house.objects.check()
    assert house.sealed() == [2]
    assert [house.table.find(name(n)) != NO_ENTRY for n in (1, 2, 3, 4)] == [0, 1, 0, 1]
    house.objects.unsealed.leave(ALICE)
    house.objects.check()


# -- limits ----------------------------------------------------------------------------------------


def test_a_limit_counts_what_a_client_holds(house: Household) -> None:
    """Pinned and unsealed objects count once each, those of others do not; exactly the limit is allowed."""
    house.put(1, 100, BOB)
    slot = house.pin(1)
    house.create(2, 100)
    house.create(3, 400, BOB)
    no_room = house.no_room(lambda: house.create(4, 101, limit=300))
    assert (no_room.limit_bytes, no_room.held_bytes, no_room.may_come) == (300, 200, False)
    house.create(4, 100, limit=300)
    assert house.no_room(lambda: house.create(5, 1, limit=300)).held_bytes == 300
    house.release(slot)
    house.create(5, 100, limit=300)
    house.objects.check()


def test_a_full_table_makes_room_for_one_more() -> None:
    """Where entries are short and not bytes, one object is evicted and no more."""
    house = Household(1 << 20)
    for number in range(house.layout.n_entries):
        house.put(number, 1)
    house.create(9999, 1)
    assert house.gone == [name(0)]
    assert house.objects.evictions == 1
    house.objects.check()


def test_a_table_full_of_empty_objects_makes_room_for_one_more() -> None:
    """An object of no bytes frees an entry like any other: again one goes and no more."""
    house = Household()
    for number in range(house.layout.n_entries):
        house.put(number, 0)
    house.create(9999, 0)
    assert house.gone == [name(0)]


def test_a_table_full_of_objects_in_use_refuses() -> None:
    """Where nothing can go the reply names the number of objects, and the extent goes back."""
    house = Household()
    for number in range(house.layout.n_entries):
        if number % 500 == 0:
            assert house.boards.grant(ALICE, 4711, 1) is not None
        house.objects.create(
            ALICE, Create(name(number), 0, 0, 0, number // 500 * 512 + 1025 + number % 500), 0, 1
        )
    no_room = house.no_room(lambda: house.create(9999, 64))
    assert no_room.text.startswith("the object table is full (4096 objects")
    assert no_room.may_come
    assert house.room.free_bytes == 4096
    house.objects.check()


def test_a_table_that_cannot_grow_refuses(house: Household) -> None:
    """The reply carries what the file system said, the extent goes back, and later it works."""
    house.memory.refuse_from = 0
    no_room = house.no_room(lambda: house.create(1))
    assert "free some memory" in no_room.text
    assert not no_room.may_come
    assert house.room.free_bytes == 4096
    house.objects.check()
    house.memory.refuse_from = None
    house.create(1)


# -- delete ----------------------------------------------------------------------------------------


def test_deleting_removes_at_once_what_nobody_pins(house: Household) -> None:
    """Sealed objects go, each is told of once; unsealed and unknown ones are left alone."""
    house.put(1)
    house.put(2)
    house.create(3)
    house.deletions.delete([name(1), name(3), name(4), name(1)])
    assert house.sealed() == [2]
    assert house.gone == [name(1)]
    assert house.wake_word == 0
    house.deletions.delete([])
    house.objects.check()


def test_a_pinned_object_goes_at_its_last_release(house: Household) -> None:
    """Until then it can be found, and the header asks for wake-ups; after it, neither."""
    house.put(1)
    slots = [house.pin(1), house.pin(1), house.pin(1, BOB)]
    house.deletions.delete([name(1)])
    for slot in slots:
        assert house.sealed() == [1]
        assert house.gone == []
        assert house.wake_word == 1
        house.objects.check()
        house.release(slot)
        house.objects.releases.wake()
    assert (house.sealed(), house.gone, house.wake_word) == ([], [name(1)], 0)
    house.objects.check()


def test_a_release_at_the_barrier_is_not_missed(house: Household) -> None:
    """Who lets go before the wake word can be seen is found by the second look at the boards."""
    house.put(1)
    slot = house.pin(1)
    seen: list[int] = []

    def second() -> None:
        seen.append(house.wake_word)
        house.release(slot)

    def first() -> None:
        house.memory.at_barrier = second

    house.memory.at_barrier = first
    house.deletions.delete([name(1)])
    assert seen == [1]
    assert (house.sealed(), house.gone, house.wake_word) == ([], [name(1)], 0)


def test_what_goes_while_it_is_kept(house: Household) -> None:
    """Of several that are to be kept, one that was deleted may go as another one is looked for; the rest is kept."""
    for number in (1, 2, 3):
        house.put(number)
    slots = [house.pin(1), house.pin(2)]
    house.deletions.delete([name(1)])
    entry = house.table.find(name(2))
    house.words[house.layout.marks // 8 + entry] = house.table.state_word(entry)
    # When it is found that the second one is deleted.
    house.memory.at_barrier = lambda: house.release(slots[0])
    house.objects.keep(ALICE, [name(1), name(2), name(3)], keep=True)
    assert house.gone == [name(1)]
    assert house.room.residents.kept_bytes == 128
    house.objects.check()


def test_a_doomed_object_that_was_released_can_be_evicted(house: Household) -> None:
    """Between the release and the wake-up the room may be needed; the id is told of once, then."""
    house.put(1)
    house.put(2)
    slot = house.pin(1)
    house.deletions.delete([name(1)])
    house.release(slot)
    assert house.objects.evict(1 << 40) == (128, False)
    assert sorted(house.gone) == [name(1), name(2)]
    house.objects.releases.wake()
    house.objects.check()
    assert sorted(house.gone) == [name(1), name(2)]
    assert house.wake_word == 0


@pytest.mark.parametrize("is_sealed", [False, True])
def test_no_delete_mark_outlives_its_object(house: Household, is_sealed: bool) -> None:
    """A new object in the place of one that was doomed, and evicted, is not taken for it."""
    house.put(1, 4096)
    slot = house.pin(1)
    house.deletions.delete([name(1)])
    house.release(slot)
    slot = house.create(2, 4096)
    if is_sealed:
        house.objects.seal(ALICE, name(2), 1)
    house.release(slot)
    house.objects.releases.wake()
    house.objects.check()
    assert house.gone == [name(1)]
    assert house.table.find(name(2)) != NO_ENTRY


def test_a_second_delete_after_the_release_ends_the_wait(house: Household) -> None:
    """A doomed object that another delete has removed asks for no more wake-ups."""
    house.put(1)
    slot = house.pin(1)
    house.deletions.delete([name(1)])
    house.deletions.delete([name(1)])
    assert house.objects.releases.n_waiting == 1
    house.release(slot)
    house.deletions.delete([name(1)])
    assert house.gone == [name(1)]
    assert house.objects.releases.n_waiting == 0
    house.objects.releases.wake()
    assert house.wake_word == 0
    house.objects.check()


def test_the_wake_word_stays_while_anything_waits(house: Household) -> None:
    """The last of several doomed and aborted objects ends the wait, not the first."""
    house.put(1)
    house.put(2)
    slots = [house.pin(1), house.pin(2, BOB), house.create(3)]
    house.deletions.delete([name(1), name(2)])
    house.objects.abort(ALICE, name(3))
    for waiting, slot in zip((3, 2, 1), slots, strict=True):
        assert house.objects.releases.n_waiting == waiting
        assert house.wake_word == 1
        house.release(slot)
        house.objects.releases.wake()
        house.objects.check()
    assert house.wake_word == 0


# -- evict -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_bytes", [0, -1, -(1 << 63)])
def test_evicting_nothing_evicts_nothing(house: Household, size_bytes: int) -> None:
    """Zero or a negative number frees 0 bytes."""
    house.put(1)
    assert house.objects.evict(size_bytes) == (0, False)
    assert house.sealed() == [1]


def test_evicting_counts_and_tells(house: Household) -> None:
    """At least so many bytes go if they can, and each object is told of; unsealed ones stay."""
    for number in range(5):
        house.put(number, 100)
    house.create(9, 1000)
    house.pin(0)
    assert house.objects.evict(101) == (200, False)
    assert house.gone == [name(1), name(2)]
    assert house.objects.evict(1 << 62) == (200, False)
    assert house.objects.evictions == 4
    assert house.sealed() == [0]
    assert house.table.find(name(9)) != NO_ENTRY
    house.objects.check()


def test_a_creation_tells_of_what_went_for_it_even_if_it_fails(house: Household) -> None:
    """Objects that were evicted for a creation in vain are gone all the same, and told of."""
    for number in range(64):
        house.put(number)
    house.pin(31)
    assert house.no_room(lambda: house.create(99, 33 * 64)).requested_bytes == 33 * 64
    gone = [n for n in range(34) if n != 31]
    assert sorted(house.gone) == [name(n) for n in gone]
    assert house.sealed() == [n for n in range(64) if n not in gone]
    house.objects.check()


# -- clients that lie ------------------------------------------------------------------------------


def test_pins_of_what_is_not_there_are_no_invariant_of_ours(house: Household) -> None:
    """A client may write any entry to its board: free and never used ones harm nobody's proof."""
    house.put(1)
    house.deletions.delete([name(1)])
    for entry in (0, 1, 4000, house.layout.n_entries - 1):
        house.boards.pin(house.slot(BOB), entry)
    house.objects.check()
    house.put(2)
    house.objects.check()


# -- proof -----------------------------------------------------------------------------------------


def forget_creators(house: Household) -> None:
    """Leave unsealed objects to nobody."""
    house.objects.unsealed._creators.clear()
    house.objects.unsealed._of_client.clear()


DAMAGES: dict[str, Callable[[Household], object]] = {
    "creators and their unsealed": lambda h: h.objects.unsealed._creators.clear(),
    "has no creator": forget_creators,
    "being taken for ever": lambda h: h.objects.releases.limbo.clear(),
    "nobody will wake": lambda h: h.words.__setitem__(HeaderWord.WAKE, 0),
}


@pytest.mark.parametrize("complaint", DAMAGES)
def test_the_proof_fails_for_a_damaged_store(house: Household, complaint: str) -> None:
    """Each clause of `check` notices what it is there for."""
    house.create(1)
    house.create(2)
    house.objects.abort(ALICE, name(2))
    house.objects.check()
    DAMAGES[complaint](house)
    with pytest.raises(AssertionError, match=complaint):
        house.objects.check()


def test_the_proof_fails_for_a_doomed_object_that_has_gone(house: Household) -> None:
    """Only what is sealed can be doomed."""
    house.create(1)
    house.objects.check()
    house.objects.releases.doomed.add(0)
    house.words[HeaderWord.WAKE] = 1
    assert house.table.state(0) == EntryState.CREATED
    with pytest.raises(AssertionError):
        house.objects.check()
