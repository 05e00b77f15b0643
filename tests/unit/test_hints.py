"""Hints as the store sees them: whom it names, and what becomes of what was taken before it had read of it."""

from __future__ import annotations

from collections.abc import Callable
from zlib import crc32

import pytest

from shmplasma.hints import TAKEN, wanted_at, wanted_word
from shmplasma.layout import BOARD_WORDS, WANTED_WORDS, HeaderWord
from shmplasma.leases import BUSY_WORD
from shmplasma.offset_pins import pin_word
from shmplasma.posted import Claim, Detach, Publish, Seal
from shmplasma.protocol import ONE_WAY
from shmplasma.replies import ABSENT, Done, Failure, Leased, Number, Objects
from shmplasma.requests import AskLease, Contains, Delete, Evict, Flush, Get
from shmplasma.store import ObjectStore
from tests.conversation import Conversation, Peer, name
from tests.crash.damage import Reopened

A, B, C = map(name, range(1, 4))
SIZE = 1000


class Putter:
    """A client that puts into a lease."""

    def __init__(self, talk: Conversation) -> None:
        self.talk = talk
        self.peer = talk.client()
        self.board = self.peer.free_slots[-1] // BOARD_WORDS
        self.next = self.peer.ask(AskLease(SIZE), Leased).offset

    def put(self, object_id: bytes, size_bytes: int = SIZE) -> int:
        """Write a record that nobody is told of, and return the object's offset."""
        offset, self.next = self.next, self.next + ((size_bytes + 63) & -64)
        self.peer.write_silently(Publish(object_id, offset, size_bytes, 0, 3))
        return offset

    def set_busy(self, busy: bool) -> None:
        """Write the word that says whether an object is being made."""
        first = self.talk.layout.boards // 8
        self.talk.words[first + self.board * BOARD_WORDS + BUSY_WORD] = busy


class Getter:
    """A client that waits for an object, and may be hinted at it."""

    def __init__(self, talk: Conversation, object_id: bytes = A) -> None:
        self.talk = talk
        self.peer = talk.client()
        self.request = self.peer.wanted([object_id], wait=True, hinted=True)
        self.lent = self.request.slots[0]
        self.own = self.peer.free_slots.pop()
        self.request_id = self.peer.post(self.request)
        self._hash32 = crc32(object_id)
        self._word_at = wanted_at(self._hash32)

    @property
    def is_named(self) -> bool:
        """Whether the header says that it waits."""
        word = wanted_word(self.request_id, self.lent // BOARD_WORDS)
        return bool(self.talk.words[self._word_at] == word)

    def take(self, offset: int) -> bool:
        """Take what lies at an offset, as a client does that was hinted at it; tell whether it is had."""
        self.talk.write_slot(self.own, pin_word(self._hash32, offset))
        self.talk.write_slot(self.lent, TAKEN)
        if self.is_named:
            return True
        self.release()
        self.talk.write_slot(self.lent, 0)
        return False

    def release(self) -> None:
        """Let go of it."""
        self.talk.write_slot(self.own, 0)


@pytest.fixture
def talk() -> Conversation:
    """Return a store of 1 MiB that nobody has talked to."""
    return Conversation(1 << 20)


@pytest.fixture
def putter(talk: Conversation) -> Putter:
    """Return a client with a lease."""
    return Putter(talk)


def words(talk: Conversation) -> set[int]:
    """Return what stands in the words that name gets."""
    return set(talk.words[HeaderWord.WANTED : HeaderWord.WANTED + WANTED_WORDS])


def is_evicted(talk: Conversation, peer: Peer, object_id: bytes) -> bool:
    """Have all evicted that can be, and tell whether an object was among it."""
    peer.ask(Evict(1 << 20), Number)
    return object_id not in talk.ids()


# -- who is named ----------------------------------------------------------------------------------


def test_a_get_that_waits_is_named_until_it_is_answered(talk: Conversation) -> None:
    """By its id's word; whoever puts the object by a message finds the store, which answers."""
    getter = Getter(talk)
    assert getter.is_named
    talk.client().put(A)
    found = getter.peer.take(getter.request_id, Objects).found
    assert found != [ABSENT]
    assert talk.read_slot(getter.lent) > 0
    assert words(talk) == {0}
    talk.store.check()


@pytest.mark.parametrize(
    "asked",
    [
        lambda peer: peer.wanted([A], wait=True),
        lambda peer: peer.wanted([A, B], wait=True),
        lambda peer: peer.wanted([A]),
    ],
)
def test_others_are_not(talk: Conversation, asked: Callable[[Peer], Get]) -> None:
    """Who does not say that it listens, waits for several objects, or does not wait."""
    peer = talk.client()
    peer.post(asked(peer))
    assert words(talk) == {0}


def test_nor_is_anybody_without_a_barrier(talk: Conversation) -> None:
    """By which alone the store can tell what was taken."""
    talk.memory.has_barrier = False
    assert not Getter(talk).is_named


def test_what_is_there_is_waited_for_by_nobody(talk: Conversation) -> None:
    """The answer comes at once."""
    talk.client().put(A)
    getter = Getter(talk)
    assert not getter.is_named
    getter.peer.take(getter.request_id, Objects)


@pytest.mark.parametrize("flags", [2, 4, 7])
def test_flags_that_no_get_has_are_refused(talk: Conversation, flags: int) -> None:
    """Whoever does not wait has nobody hint at anything; and what is not known may mean anything."""
    peer = talk.client()
    body = bytearray(peer.wanted([A]).encode())
    body[0] = flags
    talk.deliver_body(peer, Get.KIND, 1, bytes(body))
    assert peer.dropped is not None


def test_a_word_names_one_get_at_a_time(talk: Conversation) -> None:
    """The first; all others are answered by the store, and the word is for others when that get has ended."""
    first, second = Getter(talk), Getter(talk)
    assert first.is_named
    assert not second.is_named
    assert first.peer.answer_now(first.request_id) == [ABSENT]
    third = Getter(talk)
    assert third.is_named
    talk.client().put(A)
    for getter in (second, third):
        assert getter.peer.take(getter.request_id, Objects).found != [ABSENT]
    assert words(talk) == {0}
    talk.store.check()


@pytest.mark.parametrize("leave", ["detach", "die", "be expelled"])
def test_who_leaves_is_named_no_more(talk: Conversation, leave: str) -> None:
    """However it leaves."""
    getter = Getter(talk)
    if leave == "detach":
        getter.peer.ask(Detach(), Done)
    elif leave == "die":
        talk.disconnect(getter.peer)
    else:
        talk.deliver_body(getter.peer, 0xFFFF, ONE_WAY, b"")
    assert words(talk) == {0}
    talk.store.check()


# -- what was taken --------------------------------------------------------------------------------


def test_what_was_taken_is_pinned_when_the_store_reads_of_it(
    talk: Conversation, putter: Putter
) -> None:
    """By the offset: it stays as long as that pin, and no longer, whenever the reply is read."""
    getter = Getter(talk)
    offset = putter.put(A)
    assert getter.take(offset)
    putter.peer.ask(Flush(), Done)
    assert getter.peer.take(getter.request_id, Objects).found == [(offset, SIZE, 0, 3)]
    assert talk.read_slot(getter.lent) == TAKEN, "the store has written to it"
    assert words(talk) == {0}
    assert not is_evicted(talk, putter.peer, A)
    getter.release()
    talk.store.check()
    assert is_evicted(talk, putter.peer, A)


def test_it_counts_as_any_object_that_is_held(talk: Conversation, putter: Putter) -> None:
    """It is deleted at its last release, which wakes the store."""
    getter = Getter(talk)
    assert getter.take(putter.put(A))
    putter.peer.ask(Delete([A]), Done)
    assert talk.ids() == {A}
    assert talk.wake_word
    getter.release()
    talk.wake()
    assert talk.ids() == set()
    talk.store.check()


def test_it_may_be_released_before_the_store_reads_of_it(
    talk: Conversation, putter: Putter
) -> None:
    """Then nobody holds it."""
    getter = Getter(talk)
    assert getter.take(putter.put(A))
    getter.release()
    putter.peer.ask(Flush(), Done)
    assert is_evicted(talk, putter.peer, A)
    talk.store.check()


def test_who_takes_it_at_the_last_moment_has_it(talk: Conversation, putter: Putter) -> None:
    """Whoever has looked before the word was cleared is seen after the barrier that follows."""
    getter = Getter(talk)
    offset = putter.put(A)

    def take() -> None:
        talk.write_slot(getter.own, pin_word(crc32(A), offset))
        talk.write_slot(getter.lent, TAKEN)

    talk.memory.at_barrier = take
    putter.peer.ask(Flush(), Done)
    assert not is_evicted(talk, putter.peer, A)
    assert talk.read_slot(getter.lent) == TAKEN
    talk.store.check()


def test_who_comes_too_late_has_the_store_s_pin_or_none(talk: Conversation, putter: Putter) -> None:
    """What stands in the lent slot when the reply has come says which."""
    getter = Getter(talk)
    offset = putter.put(A)
    putter.peer.ask(Flush(), Done)
    assert 0 < talk.read_slot(getter.lent) < TAKEN
    assert not getter.take(offset)
    assert talk.read_slot(getter.lent) == 0
    assert is_evicted(talk, putter.peer, A)
    talk.store.check()


def test_a_failed_attempt_that_the_store_has_seen_holds_nothing(
    talk: Conversation, putter: Putter
) -> None:
    """The reply comes without a pin, and nothing is left of the attempt."""
    getter = Getter(talk)
    offset = putter.put(A)
    talk.memory.at_barrier = lambda: talk.write_slot(getter.lent, TAKEN)
    putter.peer.ask(Flush(), Done)
    talk.write_slot(getter.lent, 0)
    assert getter.peer.take(getter.request_id, Objects).found == [(offset, SIZE, 0, 3)]
    assert is_evicted(talk, putter.peer, A)
    talk.store.check()


def test_others_who_wait_are_answered_as_ever(talk: Conversation, putter: Putter) -> None:
    """With the pins of the store."""
    taker, other = Getter(talk), Getter(talk)
    assert taker.take(putter.put(A))
    putter.peer.ask(Flush(), Done)
    assert other.peer.take(other.request_id, Objects).found != [ABSENT]
    taker.release()
    assert not is_evicted(talk, putter.peer, A)
    other.peer.release(other.lent)
    assert is_evicted(talk, putter.peer, A)


@pytest.mark.parametrize("end", ["time", "detach"])
def test_what_was_taken_outlasts_its_get(talk: Conversation, putter: Putter, end: str) -> None:
    """Whatever ends that before the store reads of the object; buffers outlast their client as well."""
    getter = Getter(talk)
    assert getter.take(putter.put(A))
    if end == "time":
        # The store does not read its outbox before: it was told to answer what it has, and this comes first.
        talk.store._parts.answers.answer_now(getter.peer.number, getter.request_id)
    else:
        getter.peer.post(Detach())
    putter.peer.ask(Flush(), Done)
    assert not is_evicted(talk, putter.peer, A)
    getter.release()
    assert is_evicted(talk, putter.peer, A)
    talk.store.check()


def test_what_was_taken_is_not_moved(talk: Conversation, putter: Putter) -> None:
    """A pin by an offset is one wherever pins are looked at."""
    getter = Getter(talk)
    offset = putter.put(A)
    assert getter.take(offset)
    putter.peer.ask(Flush(), Done)
    entry = talk.store._parts.table.find(A)
    assert entry in talk.store._parts.boards.held_by(getter.peer.number)
    assert talk.store._parts.boards.is_pinned(entry)


# -- what is no object -----------------------------------------------------------------------------


def test_room_that_was_taken_is_not_given_back_when_its_record_is_refused(
    talk: Conversation, putter: Putter
) -> None:
    """Somebody else is about to seal the object: whoever has the other bytes keeps them as long as he likes."""
    getter = Getter(talk)
    creator = talk.client()
    slot = creator.create(A, SIZE)
    offset = putter.put(A)
    assert getter.take(offset)
    before = free_bytes(talk)
    putter.peer.ask(Flush(), Done)
    assert free_bytes(talk) == before
    assert talk.wake_word
    getter.release()
    talk.wake()
    assert free_bytes(talk) == before + ((SIZE + 63) & -64)
    creator.write(Seal(A))
    assert getter.peer.take(getter.request_id, Objects).found != [ABSENT]
    assert talk.read_slot(getter.lent) == TAKEN, "he has had an object"
    creator.release(slot)
    talk.store.check()


def test_it_is_given_back_where_nobody_has_taken_it(talk: Conversation, putter: Putter) -> None:
    """The get waits on, and is answered when the other one is sealed."""
    getter = Getter(talk)
    creator = talk.client()
    creator.create(A, SIZE)
    putter.put(A)
    before = free_bytes(talk)
    putter.peer.ask(Flush(), Done)
    assert free_bytes(talk) == before + ((SIZE + 63) & -64)
    creator.write(Seal(A))
    assert 0 < talk.read_slot(getter.lent) < TAKEN
    talk.store.check()


# -- who puts and leaves ---------------------------------------------------------------------------


@pytest.mark.parametrize("leave", ["detach", "die", "be expelled"])
def test_what_was_put_counts_however_its_putter_leaves(
    talk: Conversation, putter: Putter, leave: str
) -> None:
    """So that whoever has taken it has an object."""
    getter = Getter(talk)
    assert getter.take(putter.put(A))
    if leave == "detach":
        putter.peer.ask(Detach(), Done)
    elif leave == "die":
        talk.disconnect(putter.peer)
    else:
        talk.deliver_body(putter.peer, 0xFFFF, ONE_WAY, b"")
        talk.disconnect(putter.peer)
    assert talk.ids() == {A}
    assert not is_evicted(talk, getter.peer, A)
    talk.store.check()


@pytest.mark.parametrize("is_dropped", [True, False])
def test_a_record_that_may_not_be_there_hides_none_behind_it(
    talk: Conversation, putter: Putter, is_dropped: bool
) -> None:
    """Its writer is dropped, or dies before that, and what it has put properly was put."""
    getter = Getter(talk)
    putter.peer.write_silently(Publish(B, 0, SIZE, 0, 3))
    assert getter.take(putter.put(A))
    if is_dropped:
        putter.peer.post(Flush())
        assert putter.peer.dropped is not None
    talk.disconnect(putter.peer)
    assert talk.ids() == {A}
    assert not is_evicted(talk, getter.peer, A)
    talk.store.check()


def test_its_lease_is_not_given_back_before_they_are_read(
    talk: Conversation, putter: Putter
) -> None:
    """All leases are recalled when somebody finds no room, also those of who has written nonsense."""
    getter = Getter(talk)
    putter.peer.write_silently(Publish(B, 0, SIZE, 0, 3))
    assert getter.take(putter.put(A))
    other = talk.client()
    assert other.refused(other.new(C, 1 << 20)) is Failure.FULL
    assert putter.peer.dropped is not None
    assert not is_evicted(talk, getter.peer, A)
    talk.store.check()


def test_a_lease_that_is_being_written_to_is_not_given_back_by_another_thread(
    talk: Conversation, putter: Putter
) -> None:
    """One thread leaves while another one puts: the room is its own until it is done, and the object counts."""
    putter.set_busy(True)
    before = free_bytes(talk)
    putter.peer.ask(Detach(), Done)
    assert free_bytes(talk) == before
    putter.put(A)
    putter.set_busy(False)
    assert talk.client().ask(Contains(A), Number).value == 1
    assert free_bytes(talk) > before
    talk.store.check()


def test_a_lease_at_rest_is_given_back_when_its_client_leaves(
    talk: Conversation, putter: Putter
) -> None:
    """At once."""
    before = free_bytes(talk)
    putter.peer.ask(Detach(), Done)
    assert free_bytes(talk) > before


def test_what_is_claimed_by_a_client_that_has_left_is_nobody_s(
    talk: Conversation, putter: Putter
) -> None:
    """Nobody is going to seal it; the room is its writer's as long as he holds it."""
    putter.set_busy(True)
    putter.peer.ask(Detach(), Done)
    slot = putter.peer.free_slots.pop()
    talk.write_slot(slot, pin_word(crc32(B), putter.next))
    putter.peer.write_silently(Claim(B, putter.next, SIZE, 0, 3, slot))
    putter.set_busy(False)
    talk.client().ask(Contains(B), Number)
    assert talk.ids() == set()
    talk.store.check()
    talk.disconnect(putter.peer)
    talk.store.check()


# -- a store that dies -----------------------------------------------------------------------------


def test_a_successor_knows_what_was_taken(talk: Conversation, putter: Putter) -> None:
    """Though nobody has told it: the pin is by an offset at which there was nothing."""
    getter = Getter(talk)
    assert getter.take(putter.put(A))
    later = Reopened(talk.layout, talk.words, talk.raw)
    assert words(later) == {0}
    assert later.ids() == {A}
    assert not is_evicted(later, later.client(), A)
    getter.release()
    assert is_evicted(later, later.client(), A)
    later.store.check()


def test_a_successor_that_refuses_the_record_keeps_the_room(
    talk: Conversation, putter: Putter
) -> None:
    """As the id was given to another object meanwhile: its reader has what he has."""
    getter = Getter(talk)
    creator = talk.client()
    creator.create(A, SIZE)
    offset = putter.put(A)
    assert getter.take(offset)
    later = Reopened(talk.layout, talk.words, talk.raw)
    before = free_bytes(later)
    assert later.wake_word
    getter.release()
    later.wake()
    assert free_bytes(later) == before + ((SIZE + 63) & -64)
    later.store.check()


@pytest.mark.parametrize("dies", [False, True])
def test_what_has_no_bytes_is_not_what_was_taken_there(
    talk: Conversation, putter: Putter, dies: bool
) -> None:
    """An object without bytes lies where the next one does; a pin by the offset means that."""
    getter, _ = Getter(talk), Getter(talk, B)
    putter.put(B, 0)
    assert getter.take(putter.put(A))
    if dies:
        later: Conversation = Reopened(talk.layout, talk.words, talk.raw)
    else:
        later = talk
        # As if its client had left at this moment: a Detach has all outboxes read before the answer.
        talk.store._parts.answers.forget(getter.peer.number)
    assert not is_evicted(later, later.client(), A)
    getter.release()
    assert is_evicted(later, later.client(), A)
    later.store.check()


def test_words_that_a_dead_store_has_left_name_nobody(talk: Conversation) -> None:
    """They are cleared before the successor looks at any pin."""
    getter = Getter(talk)
    assert getter.is_named
    recovered: list[bool] = []

    class Watched(Reopened):
        def new_store(self, segment: memoryview, raw: memoryview) -> ObjectStore:
            self.memory.at_barrier = lambda: recovered.append(words(self) == {0})
            return super().new_store(segment, raw)

    Watched(talk.layout, talk.words, talk.raw)
    assert recovered == [True]


def free_bytes(talk: Conversation) -> int:
    """Return how much of the data region is nobody's."""
    return talk.store._parts.room.free_bytes
