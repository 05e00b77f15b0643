"""Deleting by a mark and a record: what the client does in which order, and what the store makes of either."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shmplasma.absence import Absence
from shmplasma.layout import BOARD_WORDS, EntryState
from shmplasma.link import Link
from shmplasma.outbox import RECORDS
from shmplasma.pinning import BoardPool, Pin, PinBoard
from shmplasma.posted import Remove, Seal
from shmplasma.reader import FastReader
from shmplasma.removal import Removal
from shmplasma.replies import ABSENT, Created, Done, Failure, Leased, Listing, Number, Objects
from shmplasma.requests import AskLease, Contains, Create, Flush, Get, List
from shmplasma.settling import Settling
from shmplasma.table import NO_ENTRY
from tests.conversation import Conversation, Peer, ids_of, name

A, B, C = map(name, range(1, 4))


class Deleter:
    """A client of a conversation that sees the segment and writes to it, as one with a fast path does.

    Attributes
    ----------
    free : list of int
        Words of its board that pin nothing.
    at_record : callable
        Called where the record is about to be written.
    """

    def __init__(self, talk: Conversation) -> None:
        self.talk = talk
        self.peer = talk.client()
        layout, first = talk.layout, self.peer.free_slots[0] // BOARD_WORDS * BOARD_WORDS
        at = layout.boards // 8 + first
        self.words = talk.words[at : at + BOARD_WORDS]
        self.free = [slot - first for slot in self.peer.free_slots]
        self.marks = talk.raw[layout.marks : layout.marks + layout.n_entries * 8].cast("Q")
        self.announced = 0
        self.pinned_at_post: list[int] = []
        self.at_record: Callable[[], None] = lambda: None
        self.at_pin: Callable[[], None] = lambda: None
        segment: Any = SimpleNamespace(
            layout=layout,
            read_map=talk.raw,
            words=talk.words,
            visited=talk.raw[layout.visited : layout.visited + layout.n_entries],
            marks=self.marks,
        )
        board = SimpleNamespace(words=self.words, free=self.free, wake_word=b"\0")
        self.board = cast("PinBoard", board)
        boards = SimpleNamespace(take_free=self._take_free, with_room=lambda: self.board)
        self.channel = SimpleNamespace(is_entered=False, is_quiet=True, announce=self._announce)
        link = cast("Link", SimpleNamespace(channel=self.channel, post=self._post))
        reader = FastReader(layout, segment, 0, cast("BoardPool", boards))
        absence = Absence(segment)
        settling = Settling(segment, absence, link, lambda: None)
        self.removal = Removal(link, absence, settling, reader, self.marks)

    def _announce(self) -> None:
        self.announced += 1

    def _take_free(self, count: int) -> list[Pin]:
        pins: list[Pin] = []
        while self.free and len(pins) < count:
            pin = Pin()
            pin.board, pin.word = self.board, self.free.pop()
            pins.append(pin)
        self.at_pin()
        return pins

    def _post(self, kind: int, body: bytes, written: Callable[[int], None]) -> None:
        self.at_record()
        assert kind == Remove.KIND
        self.peer.write_silently(Remove.decode(body))
        written(self.peer.outbox.written)
        self.pinned_at_post.append(self.pinned)

    @property
    def pinned(self) -> int:
        """How many of its words pin something."""
        return sum(map(bool, self.words[1:]))

    def is_marked(self, object_id: bytes) -> bool:
        """Tell whether the object that there is now is marked."""
        table = self.talk.store._parts.table
        return table.is_marked(table.find(object_id))


@pytest.fixture
def talk() -> Conversation:
    """Return a store of 64 KiB."""
    return Conversation(65536)


@pytest.fixture
def deleter(talk: Conversation) -> Deleter:
    """Return a client that deletes."""
    return Deleter(talk)


@pytest.fixture
def other(talk: Conversation) -> Peer:
    """Return another client."""
    return talk.client()


# -- the client -----------------------------------------------------------------------------------


def test_the_record_comes_first_and_the_mark_while_it_is_held(deleter: Deleter) -> None:
    """So who sees the mark knows of the record, and nobody marks an entry that has another object."""
    deleter.peer.put(A)
    seen: list[object] = []
    deleter.at_record = lambda: seen.append((deleter.pinned, deleter.is_marked(A)))
    assert not deleter.removal.delete([A])
    assert seen == [(1, False)]
    assert deleter.pinned_at_post == [0], "the store is told of what it cannot take"
    assert deleter.is_marked(A)
    assert deleter.pinned == 0
    assert len(deleter.free) == BOARD_WORDS - 1
    assert deleter.peer.outbox.written - deleter.peer.outbox.read == 1
    deleter.talk.glance()
    assert deleter.talk.ids() == set()
    deleter.talk.store.check()


def test_what_is_marked_needs_no_record(deleter: Deleter) -> None:
    """Somebody has written one, so there is nothing to be done."""
    deleter.peer.put(A)
    for _ in range(3):
        assert not deleter.removal.delete([A, A])
    assert deleter.peer.outbox.written - deleter.peer.outbox.read == 1
    assert deleter.pinned == 0


def test_what_is_not_there_or_not_sealed_costs_nothing(deleter: Deleter, other: Peer) -> None:
    """But where the store may not have read of it, or has gone, it is asked."""
    slot = other.create(A)
    assert not deleter.removal.delete([A, B])
    deleter.channel.is_quiet = False
    assert deleter.removal.delete([A, B]) == [A, B]
    deleter.channel.is_quiet = True
    other.write_silently(Seal(A))
    assert deleter.removal.delete([A]) == [A]
    assert deleter.removal.delete([B]) == [B]
    deleter.talk.glance()
    assert not deleter.removal.delete([B, A])
    assert deleter.is_marked(A)
    # Its own record is not read now, and somebody may have put anything before that.
    assert deleter.removal.delete([B]) == [B]
    deleter.talk.glance()
    # It is doomed as long as its creator has it.
    assert not deleter.removal.delete([A])
    other.release(slot)


@pytest.mark.parametrize("state", [EntryState.EVICTING, EntryState.MOVING, EntryState.SPILLED])
def test_what_is_unsure_is_left_to_the_store(deleter: Deleter, state: EntryState) -> None:
    """The rest goes without it."""
    for object_id in (A, B):
        deleter.peer.put(object_id)
    table = deleter.talk.store._parts.table
    table.set_state(table.find(A), state)
    assert deleter.removal.delete([A, B]) == [A]
    assert deleter.is_marked(B)


def test_what_is_taken_meanwhile_is_left_to_the_store(deleter: Deleter) -> None:
    """Between the look and the pin."""
    deleter.peer.put(A)
    table = deleter.talk.store._parts.table
    deleter.at_pin = lambda: table.set_state(table.find(A), EntryState.EVICTING)
    assert deleter.removal.delete([A]) == [A]
    assert deleter.pinned == 0
    assert deleter.peer.outbox.written == deleter.peer.outbox.read


def test_what_cannot_be_held_is_left_to_the_store(deleter: Deleter) -> None:
    """When all slots are in use, and when there are many objects, for which one message is cheaper."""
    deleter.peer.put(A)
    assert list(deleter.removal.delete([A] * 25)) == [A] * 25
    deleter.free.clear()
    assert deleter.removal.delete([A]) == [A]
    assert not deleter.is_marked(A)


def test_inside_another_call_all_is_left_to_the_store(deleter: Deleter) -> None:
    """Which is refused then."""
    deleter.peer.put(A)
    deleter.channel.is_entered = True
    assert deleter.removal.delete([A, B]) == [A, B]
    assert not deleter.is_marked(A)


def test_an_error_has_the_store_read_what_was_written(deleter: Deleter) -> None:
    """And leaves nothing pinned, nor marked without a record."""
    for object_id in (A, B):
        deleter.peer.put(object_id)

    def fail() -> None:
        if deleter.is_marked(A):
            raise KeyboardInterrupt

    deleter.at_record = fail
    with pytest.raises(KeyboardInterrupt):
        deleter.removal.delete([A, B])
    assert deleter.announced == 1
    assert deleter.pinned == 0
    assert (deleter.is_marked(A), deleter.is_marked(B)) == (True, False)


def test_an_old_mark_says_nothing_of_what_comes_after(deleter: Deleter, other: Peer) -> None:
    """The next object in the entry is found, and only its own mark deletes it."""
    table = deleter.talk.store._parts.table
    for object_id in (A, B, A):
        other.put(object_id)
        assert table.find(object_id) == 0
        assert deleter.marks[0] != table.state_word(0)
        assert other.ask(Contains(object_id), Number).value == 1
        assert not deleter.removal.delete([object_id])
        deleter.talk.glance()
        assert deleter.talk.ids() == set()


# -- the store, before it has read the record ----------------------------------------------------------


def test_nobody_finds_it_by_asking(deleter: Deleter, other: Peer) -> None:
    """Whatever is asked, and although the question is answered at once."""
    for object_id in (A, B, C):
        deleter.peer.put(object_id)
        deleter.peer.remove(object_id)
    assert other.ask(Contains(A), Number).value == 0
    slot = other.free_slots[-1]
    request_id = other.post(Get(False, [B], [other.free_slots.pop()]))
    deleter.talk.turn()
    (found,) = other.take(request_id, Objects).found
    assert found == ABSENT
    assert deleter.talk.read_slot(slot) == 0
    assert other.ask(Create(C, 64, 0, 0, other.free_slots.pop()), Created).offset
    assert deleter.talk.ids() == {C}
    deleter.talk.store.check()


def test_a_question_that_waits_for_nothing_has_it_deleted(deleter: Deleter, other: Peer) -> None:
    """One that is answered before any outbox is read."""
    deleter.peer.put(A)
    deleter.peer.remove(A)
    request_id = other.post(Get(True, [A], [other.free_slots.pop()]))
    assert request_id not in other.replies
    assert deleter.talk.ids() == set()
    deleter.talk.glance()
    other.put(A)
    assert request_id in other.replies


def test_what_is_in_use_is_found_until_it_is_released(deleter: Deleter, other: Peer) -> None:
    """As after any deletion."""
    deleter.peer.put(A)
    (found,), (slot,) = other.get(A)
    deleter.peer.remove(A)
    assert other.ask(Contains(A), Number).value == 1
    assert other.refused(Create(A, 64, 0, 0, other.free_slots.pop())) is Failure.EXISTS
    deleter.talk.glance()
    deleter.talk.store.check()
    other.release(slot)
    deleter.talk.wake()
    assert deleter.talk.ids() == set()
    assert found[1] == 64


def test_the_list_has_nothing_that_is_deleted(deleter: Deleter, other: Peer) -> None:
    """It is made when all is read."""
    for object_id in (A, B):
        deleter.peer.put(object_id)
    deleter.peer.remove(A)
    assert ids_of(other.ask(List(0), Listing)) == [B]


def test_nothing_is_evicted_for_what_is_deleted(deleter: Deleter, other: Peer) -> None:
    """An object that needs the room has it from what is deleted, although nobody has read of that."""
    talk, witness = deleter.talk, deleter.talk.subscriber()
    for number in range(4):
        other.put(name(number), 16384)
    deleter.peer.remove(name(2))
    other.put(name(9), 16384)
    assert talk.ids() == {name(number) for number in (0, 1, 3, 9)}
    gone = [object_id for object_id, *sizes in witness.notifications if sizes == [-1, -1]]
    assert gone == [name(2)]
    assert talk.store._objects.evictions == 0


def test_nothing_is_evicted_for_a_lease() -> None:
    """Likewise."""
    talk = Conversation(8 << 20)
    peer, other = talk.client(), talk.client()
    for number in range(4):
        other.put(name(number), 2 << 20)
    for number in range(4):
        peer.remove(name(number))
    assert other.ask(AskLease(64), Leased).size_bytes > 0
    assert talk.ids() == set()
    assert talk.store._objects.evictions == 0


def test_a_successor_deletes_what_is_marked(deleter: Deleter) -> None:
    """Also where the record was read by the store that has died."""
    talk = deleter.talk
    for object_id in (A, B):
        deleter.peer.put(object_id)
    talk.mark(A)
    successor = talk.new_store(talk.words, talk.raw)
    successor.recover(lambda *_: True, talk.now_ns)
    assert successor._parts.table.find(A) == NO_ENTRY
    assert successor._parts.table.find(B) != NO_ENTRY
    successor.check()


def test_a_full_outbox_of_deletions(deleter: Deleter) -> None:
    """They are carried out in one reading, in order, with what comes between."""
    ids = [name(number) for number in range(RECORDS // 4)]
    for object_id in ids:
        deleter.peer.put(object_id)
    for object_id in ids:
        assert not deleter.removal.delete([object_id])
    assert deleter.peer.ask(Flush(), Done) == Done()
    assert deleter.talk.ids() == set()
    deleter.talk.store.check()
