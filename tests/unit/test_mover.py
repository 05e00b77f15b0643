from __future__ import annotations

from collections.abc import Iterator

import pytest

from shmplasma.layout import REFERENCED, EntryState
from shmplasma.mover import SLICE_BYTES
from shmplasma.moves import PIECE_BYTES
from shmplasma.posted import Detach, Release, Seal
from shmplasma.replies import ABSENT, Created, Done, Failed, Failure, Leased, Number, Objects, Text
from shmplasma.requests import AskLease, Contains, Debug, Delete, Evict, Get, Keep
from shmplasma.room import Room
from shmplasma.table import NO_ENTRY
from shmplasma.waiters import FOR_EVER
from tests.conversation import Conversation, Peer, name

LINE = 64


class Rooms(Conversation):
    """A store of some lines, which moves as little as can be in each slice, and a client with objects in it."""

    def __init__(self, *lines: int, capacity: int | None = None) -> None:
        super().__init__(capacity or LINE * sum(lines))
        self.mover = self.store._room.mover
        self.mover.slice_bytes = 1
        self.store._parts.moves.piece_bytes = LINE
        self.one, self.other = self.client(), self.client()
        for number, count in enumerate(lines):
            self.put(self.one, number, count)

    def put(self, peer: Peer, number: int, lines: int) -> None:
        """Put an object of so many lines."""
        request = peer.new(name(number), lines * LINE)
        offset = peer.ask(request, Created).offset
        self.raw[offset : offset + lines * LINE] = self.content(number, lines)
        peer.release(request.slot)
        peer.ask(Seal(name(number)), Done)

    @staticmethod
    def content(number: int, lines: int) -> bytes:
        """Return what lies in an object."""
        return bytes((number + at // LINE) % 256 for at in range(lines * LINE))

    def delete(self, *numbers: int) -> None:
        """Delete objects."""
        self.one.ask(Delete([name(number) for number in numbers]), Done)

    def look(self, number: int, lines: int) -> None:
        """Prove that an object is whole."""
        (found,), (slot,) = self.one.get(name(number))
        assert bytes(self.raw[found[0] : found[0] + found[1]]) == self.content(number, lines)
        self.one.release(slot)

    def turn_until_hidden(self) -> None:
        """Offer room, and go on until an object is hidden."""
        self.carry_out(self.store.offer_room(self.steady_ns, self.now_ns))
        self.until_hidden()

    def until_hidden(self) -> None:
        """Go on until an object is hidden."""
        while self.mover.hidden == NO_ENTRY:
            assert self.store.upkeep.has_urgent_work, "nothing was hidden"
            self.advance()


@pytest.fixture
def hiding() -> Rooms:
    """Return a store that is about to slide object 1, of 40 lines, down by 3, and then 3, for one of 5."""
    rooms = Rooms(3, 40, 2, 40)
    rooms.delete(0, 2)
    rooms.one.post(rooms.one.new(name(9), 5 * LINE))
    rooms.until_hidden()
    assert rooms.store._parts.table.object_id(rooms.mover.hidden) == name(1)
    return rooms


def test_a_hidden_object_is_there(hiding: Rooms) -> None:
    """Whoever asks whether it is there is told at once, and the list has it."""
    other = hiding.other
    request_id = other.post(Contains(name(1)))
    assert other.take(request_id, Number).value == 1
    assert name(1) in hiding.ids()
    hiding.store.check()


@pytest.mark.parametrize("wait", [False, True])
def test_who_gets_a_hidden_object_waits_for_it(hiding: Rooms, wait: bool) -> None:
    """The answer comes when it has arrived, whether the get would wait or not; others are answered at once."""
    other = hiding.other
    request = other.wanted([name(1)], wait=wait)
    request_id = other.post(request)
    hiding.settle()
    assert request_id not in other.replies
    hiding.turn()
    (found,) = other.take(request_id, Objects).found
    assert bytes(hiding.raw[found[0] : found[0] + found[1]]) == hiding.content(1, 40)
    hiding.store.check()


def test_a_hidden_object_is_deleted_when_it_has_arrived(hiding: Rooms) -> None:
    """The deletion waits, and then it has gone like any other."""
    request_id = hiding.one.post(Delete([name(1)]))
    hiding.settle()
    assert request_id not in hiding.one.replies
    hiding.turn()
    hiding.one.take(request_id, Done)
    assert hiding.ids() == {name(3), name(9)}
    hiding.store.check()


def test_a_hidden_object_is_removed_by_a_record_when_it_has_arrived(hiding: Rooms) -> None:
    """Also if its client has left by then; whoever asks for it removes it as well."""
    removal = hiding.removal(name(1))
    hiding.other.write(removal)
    assert name(1) in hiding.ids()
    assert hiding.other.outbox.read == hiding.other.outbox.written
    hiding.store.check()
    request_id = hiding.one.post(removal)
    hiding.settle()
    assert request_id not in hiding.one.replies
    hiding.disconnect(hiding.other)
    hiding.turn()
    hiding.one.take(request_id, Done)
    assert hiding.ids() == {name(3), name(9)}
    hiding.store.check()


def test_what_is_marked_is_deleted_wherever_it_is_moved(hiding: Rooms) -> None:
    """Nobody is told that it is there while it is hidden, nor finds it when it has arrived."""
    entry, table = hiding.mover.hidden, hiding.store._parts.table
    word = table.state_word(entry)
    hiding.mark_word(entry, word >> 8 << 8 | EntryState.SEALED)
    request_id = hiding.other.post(Contains(name(1)))
    hiding.settle()
    assert hiding.other.take(request_id, Number).value == 0
    hiding.turn()
    assert table.state_word(entry) >> 8 == (word >> 8) + 1
    assert table.is_marked(entry)
    found, _ = hiding.other.get(name(1))
    assert found == [ABSENT]
    assert hiding.ids() == {name(3), name(9)}
    hiding.store.check()


def test_a_get_of_what_is_marked_and_hidden_finds_nothing(hiding: Rooms) -> None:
    """It is answered when the move is over."""
    entry = hiding.mover.hidden
    hiding.mark_word(
        entry, hiding.store._parts.table.state_word(entry) >> 8 << 8 | EntryState.SEALED
    )
    found, _ = hiding.other.get(name(1))
    assert found == [ABSENT]
    hiding.store.check()


def test_a_successor_deletes_what_was_removed_while_it_was_hidden(hiding: Rooms) -> None:
    """The record was read, and will not be read again; the mark says it."""
    entry = hiding.mover.hidden
    hiding.mark_word(
        entry, hiding.store._parts.table.state_word(entry) >> 8 << 8 | EntryState.SEALED
    )
    hiding.other.write(hiding.removal(name(1)))
    successor = hiding.new_store(hiding.words, hiding.raw)
    successor.recover(lambda *_: True, hiding.now_ns)
    assert successor._parts.table.find(name(1)) == NO_ENTRY
    assert successor._parts.table.find(name(3)) != NO_ENTRY
    successor.check()


def test_a_hidden_object_is_evicted_when_it_has_arrived(hiding: Rooms) -> None:
    """So does an eviction of all that may go."""
    assert hiding.one.ask(Evict(1 << 40), Number).value == 80 * LINE
    hiding.store.check()


def test_what_cannot_wait_has_the_move_finished(hiding: Rooms) -> None:
    """Where the store needs the object in the middle of something, it carries the move to its end."""
    entry = hiding.mover.hidden
    assert hiding.store._objects.find_sealed(name(1)) == entry
    assert hiding.mover.hidden == NO_ENTRY
    hiding.store.check()
    hiding.turn()
    hiding.look(1, 40)
    hiding.look(3, 40)


def test_a_creator_that_leaves_is_not_moved_for(hiding: Rooms) -> None:
    """The object that is on its way arrives; nothing else moves, and no room is lost."""
    other = hiding.other
    hiding.disconnect(hiding.one)
    hiding.turn()
    assert not hiding.mover.is_busy
    assert hiding.mover.moves == 1
    assert hiding.store._room.free_bytes == 5 * LINE
    (found,), _ = other.get(name(3))
    assert bytes(hiding.raw[found[0] : found[0] + found[1]]) == hiding.content(3, 40)
    hiding.store.check()


def test_a_client_that_closes_is_answered(hiding: Rooms) -> None:
    """A request that waits for an extent gets its reply also when its client has closed."""
    hiding.one.post(Detach())
    failed = [reply for reply in hiding.one.replies.values() if isinstance(reply, Failed)]
    assert [each.failure for each in failed] == [Failure.NOT_FOUND]
    hiding.turn()
    hiding.store.check()


def test_creators_wait_in_order() -> None:
    """Who came first is granted first; what is in use twice while it is moved is no reason to refuse the other."""
    rooms = Rooms(*[1] * 40)
    rooms.delete(*range(0, 40, 2))
    other = rooms.other
    first = rooms.one.post(rooms.one.new(name(100), 8 * LINE))
    second = other.post(other.new(name(101), 10 * LINE))
    small = other.post(other.new(name(102), 1 * LINE))
    while first not in rooms.one.replies:
        assert second not in other.replies
        rooms.advance()
        rooms.store.check()
    rooms.turn()
    other.take(second, Created)
    other.take(small, Created)
    for number in range(1, 40, 2):
        rooms.look(number, 1)
    assert rooms.store._objects.evictions == 0
    rooms.store.check()


def test_two_creators_of_one_id() -> None:
    """While one waits, another may ask for the same id; one of them gets it."""
    rooms = Rooms(*[1] * 10)
    rooms.delete(*range(0, 10, 2))
    other = rooms.other
    first = rooms.one.post(rooms.one.new(name(100), 3 * LINE))
    second = other.post(other.new(name(100), 2 * LINE))
    rooms.turn()
    rooms.one.take(first, Created)
    assert other.take(second, Failed).failure is Failure.EXISTS
    rooms.store.check()


def test_as_much_is_evicted_as_is_missing() -> None:
    """Free room in pieces counts: only what bytes it lacks are evicted, and the rest is moved."""
    rooms = Rooms(*[2] * 20)
    rooms.delete(*range(1, 20, 4))
    slot = rooms.one.create(name(100), 14 * LINE)
    assert rooms.store._objects.evictions == 2
    rooms.one.release(slot)
    rooms.store.check()


def test_a_pin_of_the_last_moment_is_respected() -> None:
    """An object that somebody pins while it is hidden stays; another way is found."""
    rooms = Rooms(*[1] * 12)
    rooms.delete(*range(0, 12, 2))
    table, board = rooms.store._parts.table, rooms.other
    entry = table.find(name(3))
    where = table.location(entry)
    rooms.one.post(rooms.one.new(name(100), 3 * LINE))
    slot = board.free_slots.pop()
    while rooms.store.upkeep.has_urgent_work:
        rooms.memory.at_barrier = lambda: rooms.write_slot(slot, entry + 1)
        rooms.advance()
    assert table.find(name(100)) != NO_ENTRY
    assert table.location(entry) == where
    rooms.store.check()


def test_where_pins_split_the_room_objects_go_that_have_no_place() -> None:
    """As a last resort the window is cleared by evicting; and the refusal says what is in the way where there is none."""
    rooms = Rooms(4, 1, 10, 1, 4)
    _, (slot, _) = rooms.one.get(name(1), name(3))
    rooms.delete(0, 4)
    rooms.one.create(name(100), 8 * LINE)
    assert rooms.ids() == {name(1), name(3), name(100)}
    assert rooms.store._objects.evictions == 1
    failed = rooms.one.ask(rooms.one.new(name(101), 9 * LINE), Failed)
    assert failed.failure is Failure.FULL
    assert "cannot be moved or evicted" in failed.text
    rooms.one.release(slot)
    rooms.store.check()


def test_where_pins_split_the_room_little_goes_rather_than_that_all_is_moved() -> None:
    """What has no place is evicted at once where it may be spared, and nothing is slid to make it one."""
    rooms = Rooms(4, 1, 5, 1, 5, 1, 1, 5, 1, 5, 1, 1, 609)
    pins = [name(number) for number in (1, 6, 11, 12)]
    _, slots = rooms.one.get(*pins)
    rooms.delete(0, 3, 5, 8, 10)
    rooms.one.create(name(100), 8 * LINE)
    assert rooms.mover.moves == 0
    assert 1 <= rooms.store._objects.evictions <= 2
    assert rooms.ids() >= {name(100), *pins}
    for slot in slots:
        rooms.one.release(slot)
    rooms.store.check()


def test_a_lease_is_asked_back_before_objects_are_moved() -> None:
    """What is leased cannot be moved, so it comes back first; then nothing may need to be moved any more."""
    rooms = Rooms(capacity=1 << 20)
    rooms.put(rooms.one, 1, 100)
    assert rooms.other.ask(AskLease(10), Leased).size_bytes
    rooms.put(rooms.one, 2, 5000)
    rooms.put(rooms.one, 3, rooms.store._room.largest_bytes // LINE)
    rooms.delete(1, 2)
    rooms.one.create(name(4), 5100 * LINE)
    assert rooms.mover.moves == 0
    assert rooms.ids() == {name(3), name(4)}
    rooms.store.check()


def test_nothing_goes_for_a_lease_where_much_is_free_in_small_pieces() -> None:
    """Objects that are created one by one have room there; so there is no lease, and nothing is evicted or moved for one."""
    rooms = Rooms(capacity=1 << 20)
    for number in range(2048):
        rooms.put(rooms.one, number, 8)
    rooms.delete(*range(0, 2048, 2))
    lease = rooms.one.ask(AskLease(10), Leased)
    assert lease.size_bytes == 0
    rooms.one.create(name(3000), 8 * LINE)
    assert rooms.store._objects.evictions == rooms.mover.moves == 0
    rooms.store.check()


def test_memory_that_cannot_be_had_is_not_moved_to() -> None:
    """An object is not copied to where no memory can be committed."""
    rooms = Rooms(capacity=16 << 20)
    rooms.mover.slice_bytes = 1 << 20
    rooms.store._parts.moves.piece_bytes = 1 << 20
    lines = (1 << 20) // LINE
    for number in range(6):
        rooms.put(rooms.one, number, lines)
    rooms.memory.refuse_from = rooms.layout.data + 8 * lines * LINE
    blocked = rooms.other
    rooms.put(rooms.one, 6, 2 * lines)
    blocked.get(name(6))
    rooms.delete(0, 2, 4)
    failed = rooms.one.ask(rooms.one.new(name(7), 9 * lines * LINE), Failed)
    assert failed.failure is Failure.FULL
    for number in (1, 3, 5):
        rooms.look(number, lines)
    rooms.store.check()


def test_the_description_counts_moves() -> None:
    """The figures say how often and how much was moved, and how whole the free room is."""
    rooms = Rooms(*[1] * 10)
    rooms.delete(*range(0, 10, 2))
    assert "\nlargest free extent of all free bytes: 20%\n" in rooms.one.ask(Debug(), Text).text
    rooms.one.create(name(100), 2 * LINE)
    text = rooms.one.ask(Debug(), Text).text
    assert "\ncompactions: 1\nmoves: 1\nmoved bytes: 64\nmoves that met a pin: 0\n" in text


def test_gets_of_others_go_on(hiding: Rooms) -> None:
    """While one object is hidden, another is had at once."""
    other = hiding.other
    request = Get(False, [name(3)], [other.free_slots.pop()])
    request_id = other.post(request)
    assert other.take(request_id, Objects).found[0][1] == 40 * LINE
    hiding.turn()
    assert hiding.read_slot(request.slots[0])
    hiding.store.check()


def test_a_create_is_answered_once(hiding: Rooms) -> None:
    """However long it waited, there is one reply, and the object is its creator's."""
    hiding.turn()
    (reply,) = [each for each in hiding.one.replies.values() if isinstance(each, Created)]
    assert (
        reply.offset
        == hiding.store._parts.table.location(hiding.store._parts.table.find(name(9)))[0]
    )
    hiding.store.check()


@pytest.mark.parametrize("lines", [1, 2])
def test_what_has_come_to_the_place_of_what_was_copied_is_not_taken_for_it(lines: int) -> None:
    """An object that begins before the window leaves room there when it goes, and its entry to whatever comes next."""
    rooms = Rooms(4, 3, capacity=20 * LINE)
    table, start = rooms.store._parts.table, rooms.layout.data // LINE
    entry = table.find(name(0))
    emptying = rooms.mover._empty((start + 2, start + 6), 1 << 30)
    while len(rooms.mover.holding.extents()) < 2:  # the copies of both
        next(emptying)
    rooms.delete(0)
    rooms.put(rooms.one, 9, lines)
    assert (table.find(name(9)), table.location(entry)[0]) == (entry, rooms.layout.data)
    for _ in emptying:
        rooms.store.check()
    rooms.look(9, lines)
    rooms.look(1, 3)
    assert table.location(entry)[0] == rooms.layout.data
    rooms.store.check()


@pytest.mark.parametrize("n_copied", [1, 7, 39])
def test_what_is_deleted_is_not_copied_on(n_copied: int) -> None:
    """Not one piece more is read where there may be no memory any more; its new place is given back."""
    rooms = Rooms(40, capacity=100 * LINE)
    moves, start = rooms.store._parts.moves, rooms.layout.data // LINE
    copied: list[int] = []
    copy = moves.copy

    def counted(source: int, target: int, size_bytes: int) -> Iterator[int]:
        for piece in copy(source, target, size_bytes):
            copied.append(piece)
            yield piece

    moves.copy = counted  # type: ignore[method-assign]
    emptying = rooms.mover._empty((start, start + 40), 1 << 30)
    while len(copied) < n_copied:
        next(emptying)
    rooms.delete(0)
    for _ in emptying:
        rooms.store.check()
    assert copied == [LINE] * n_copied
    assert rooms.store._room.free_bytes == 100 * LINE
    rooms.store.check()


class Glimpses(Rooms):
    """A store of which 3 lines are free at each end, and an object between them at which somebody looks whenever it is to be moved."""

    def __init__(self) -> None:
        super().__init__(3, 2, 3)
        self.one.ask(Keep(True, [name(1)]), Done)
        self.delete(0, 2)
        self.slot = self.other.free_slots.pop()
        self.are_over = False
        self.mover._barrier = self.look_at_it

    def look_at_it(self) -> None:
        """Pin the object just when the store takes it."""
        self.memory.barrier()
        if not self.are_over:
            self.write_slot(self.slot, self.store._parts.table.find(name(1)) + 1)

    def ask(self, number: int, timeout_ns: int = 0) -> int:
        """Ask for what has room only if the object is moved."""
        request = self.one.new(name(number), 5 * LINE)
        request_id = self.one.post(request._replace(timeout_ns=timeout_ns))
        if self.store.has_waiters:
            self.carry_out(self.store.offer_room(self.steady_ns, self.now_ns))
        return request_id

    def go_on(self) -> None:
        """Do one step, after which nobody holds the object."""
        self.advance()
        self.write_slot(self.slot, 0)
        self.store.check()


def test_what_was_pinned_in_passing_is_moved_when_it_is_not() -> None:
    """Who waits is served then, though nothing has changed that the store would have been told of."""
    rooms = Glimpses()
    waiting = rooms.ask(9, FOR_EVER)
    while rooms.mover.compactions < 12:
        assert rooms.store.upkeep.has_urgent_work, "it is not tried any more"
        rooms.go_on()
    rooms.are_over = True
    rooms.turn()
    rooms.one.take(waiting, Created)
    rooms.look(1, 2)


@pytest.mark.parametrize("others_wait", [False, True])
def test_who_does_not_wait_is_refused_when_an_object_is_pinned_again_and_again(
    others_wait: bool,
) -> None:
    """Eight times objects are moved for it in vain, no matter for whom they are moved besides."""
    rooms = Glimpses()
    waiting = rooms.ask(8, FOR_EVER) if others_wait else None
    brief = rooms.ask(9)
    rooms.settle()
    while brief not in rooms.one.replies:
        rooms.go_on()
        assert rooms.mover.compactions <= 9
    assert rooms.one.take(brief, Failed).failure is Failure.FULL
    assert rooms.mover.compactions == 8 + others_wait
    assert waiting not in rooms.one.replies
    rooms.are_over = True
    granted = rooms.ask(10) if waiting is None else waiting
    rooms.turn()
    rooms.one.take(granted, Created)


def test_what_is_moved_for_two_in_vain_is_not_moved_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is tried for one takes the extent of the other, which lacks an entry; that one is refused, as it does not wait."""
    monkeypatch.setattr("shmplasma.layout._MIN_ENTRIES", 16)
    rooms = Rooms(3, 8, 5, 4, 6, 4, 6, 3)
    rooms.one.ask(Keep(True, [name(number) for number in (1, 2, 5, 6, 7)]), Done)
    rooms.delete(0, 3, 4)
    rooms.other.get(name(2))
    for number in range(10, 10 + rooms.store._parts.table.free_entries):
        rooms.one.ask(rooms.one.new(name(number), 0)._replace(keep=True), Created)
    large = rooms.one.new(name(8), 12 * LINE)
    waiting = rooms.one.post(large._replace(timeout_ns=FOR_EVER))
    brief = rooms.one.post(rooms.one.new(name(9), 11 * LINE))
    rooms.settle()
    while brief not in rooms.one.replies:
        rooms.advance()
        assert rooms.mover.compactions <= 4
    assert "object table is full" in rooms.one.take(brief, Failed).text
    rooms.turn()
    assert waiting not in rooms.one.replies
    rooms.store.check()


def test_what_is_let_go_of_at_the_moment_of_the_last_look_is_moved() -> None:
    """Nobody is told of that who has looked just before; the next one looks again."""
    rooms = Glimpses()
    rooms.are_over = True
    room, slot = rooms.store._room, rooms.slot
    fixed = room.fixed

    def look() -> list[tuple[int, int]]:
        found = fixed()
        if rooms.mover.is_busy:
            rooms.write_slot(slot, 0)
        return found

    room.fixed = look
    waiting = rooms.ask(9, FOR_EVER)
    rooms.write_slot(slot, rooms.store._parts.table.find(name(1)) + 1)
    rooms.turn()
    rooms.one.take(waiting, Created)


@pytest.fixture
def sliding() -> Rooms:
    """Return a store that slides four kept objects, of two slices each, down by 64 KiB; one that has a reference lies before them."""
    lines, gap = 2 * SLICE_BYTES // LINE, 1024
    rooms = Rooms(capacity=(1 + 4 * lines + 2 * gap) * LINE)
    rooms.mover.slice_bytes = SLICE_BYTES
    rooms.store._parts.moves.piece_bytes = PIECE_BYTES
    request = rooms.other.new(name(8), LINE, codec=REFERENCED)
    rooms.other.ask(request, Created)
    rooms.other.ask(Seal(name(8)), Done)
    rooms.other.release(request.slot)
    for number, size in enumerate((gap, *[lines] * 4)):
        rooms.one.put(name(number), size * LINE)
    rooms.one.ask(Keep(True, [name(number) for number in range(1, 5)]), Done)
    rooms.delete(0)
    waiting = rooms.one.new(name(9), 2 * gap * LINE)
    rooms.one.post(waiting._replace(timeout_ns=FOR_EVER))
    rooms.turn_until_hidden()
    assert rooms.store._parts.table.object_id(rooms.mover.hidden) == name(1)
    return rooms


def test_an_eviction_does_not_wait_for_what_is_hidden(hiding: Rooms) -> None:
    """Others go at once, if they are enough."""
    request_id = hiding.other.post(Evict(40 * LINE))
    hiding.settle()
    assert hiding.other.take(request_id, Number).value == 40 * LINE
    assert hiding.mover.hidden != NO_ENTRY
    assert name(3) not in hiding.ids()
    hiding.turn()
    hiding.look(1, 40)
    hiding.store.check()


def test_between_two_that_slide_what_nobody_owns_is_deleted(sliding: Rooms) -> None:
    """It waits for one object, and not for a whole run."""
    sliding.other.write(Release(name(8), 0))
    while name(8) in sliding.ids():
        sliding.advance()
        sliding.settle()
    assert sliding.mover.moves == 1
    sliding.turn()
    sliding.store.check()


def test_between_two_that_slide_a_compaction_is_given_up(sliding: Rooms) -> None:
    """No more is moved for one that has left."""
    sliding.disconnect(sliding.one)
    while sliding.mover.is_busy:
        sliding.advance()
    assert sliding.mover.moves == 1
    sliding.store.check()


def test_what_is_given_up_while_memory_is_committed_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The place that an object was to have is free again."""
    rooms = Rooms(2, 1, 2, 1)
    rooms.delete(0, 2)
    asked: list[int] = []

    def prepare(_: Room, offset: int, _size_bytes: int) -> bool:
        asked.append(offset)
        return False

    monkeypatch.setattr(Room, "prepare", prepare)
    rooms.one.post(rooms.one.new(name(9), 3 * LINE))
    while not asked:
        rooms.advance()
    assert rooms.mover.holding.n_bytes
    rooms.mover.cancel()
    rooms.mover.advance()
    assert not rooms.mover.is_busy
    assert not rooms.mover.holding.n_bytes
