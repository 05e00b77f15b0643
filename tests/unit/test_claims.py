"""Claims as the store sees them: what clients create in their leases, and who else wants the same id."""

from __future__ import annotations

from zlib import crc32

import pytest

from shmplasma.layout import CONTROL_BYTES, ControlWord, HeaderWord
from shmplasma.leases import BUSY_WORD
from shmplasma.offset_pins import pin_word
from shmplasma.posted import Abort, Claim, Publish, Seal, stamp_of
from shmplasma.replies import Created, Done, Failure, Leased, Number
from shmplasma.requests import AskLease, Contains, Create, Delete, Evict, Flush
from shmplasma.waiters import FOR_EVER
from tests.conversation import Conversation, Peer, name

A, B = map(name, range(1, 3))
SIZE = 1000


class Claimer:
    """A client with a lease that claims ids, in a store of 1 MiB."""

    def __init__(self, talk: Conversation | None = None) -> None:
        self.talk = talk or Conversation(1 << 20)
        self.peer = self.talk.client()
        self.board = self.peer.free_slots[-1] // 512
        self.lease = self.peer.ask(AskLease(SIZE), Leased)
        self.next = self.lease.offset

    def claim(self, object_id: bytes, *, silently: bool = False) -> tuple[int, int]:
        """Create an object and return the slot that pins it, and its offset."""
        slot, offset = self.peer.free_slots.pop(), self.next
        self.talk.write_slot(slot, pin_word(crc32(object_id), offset))
        self.next += (SIZE + 63) & -64
        message = Claim(object_id, offset, SIZE, 0, 3, slot)
        (self.peer.write_silently if silently else self.peer.write)(message)
        return slot, offset

    def put(self, object_id: bytes) -> None:
        """Claim an id, and seal the object and let go of it."""
        slot, _ = self.claim(object_id)
        self.peer.write(Seal(object_id))
        self.peer.release(slot)

    def set_busy(self, busy: bool) -> None:
        """Write the word that says whether a claim is being made."""
        self.talk.words[self.talk.layout.boards // 8 + self.board * 512 + BUSY_WORD] = busy

    @property
    def is_recalled(self) -> bool:
        """Whether the lease was recalled."""
        start = self.talk.layout.control + self.board * CONTROL_BYTES
        return self.talk.words[start // 8 + ControlWord.EPOCH] != self.lease.epoch


@pytest.fixture
def claimer() -> Claimer:
    """Return a client with a lease."""
    return Claimer()


@pytest.fixture
def other(claimer: Claimer) -> Peer:
    """Return another client of the same store."""
    return claimer.talk.client()


def lock(claimer: Claimer, object_id: bytes) -> None:
    """Lock an id, as somebody else than the store."""
    claimer.talk.memory.locked.add(crc32(object_id))


def test_a_claimed_object_is_one_that_was_created(claimer: Claimer, other: Peer) -> None:
    """It is its creator's until he seals it, and anybody's after that."""
    slot, offset = claimer.claim(A)
    assert claimer.talk.ids() == {A}
    assert other.refused(other.new(A)) is Failure.EXISTS
    assert other.refused(Seal(A)) is Failure.NOT_FOUND
    assert other.ask(Contains(A), Number).value == 0
    claimer.peer.write(Seal(A))
    found, _ = other.get(A)
    assert found == [(offset, SIZE, 0, 3)]
    claimer.peer.release(slot)
    claimer.talk.store.check()


def test_it_stays_where_it_is_while_its_writer_holds_it(claimer: Claimer, other: Peer) -> None:
    """By the offset in his slot, which he writes before the store knows of the object."""
    slot, _ = claimer.claim(A)
    claimer.peer.write(Seal(A))
    assert other.ask(Evict(1), Number).value == 0
    assert "pinned bytes: 1000" in claimer.talk.store.describe()
    claimer.peer.release(slot)
    assert other.ask(Evict(1), Number).value == SIZE
    claimer.talk.store.check()


def test_one_that_is_deleted_goes_when_its_writer_lets_go(claimer: Claimer, other: Peer) -> None:
    """As one that was created by a round trip does, and he wakes the store."""
    slot, _ = claimer.claim(A)
    claimer.peer.write(Seal(A))
    other.ask(Delete([A]), Done)
    assert claimer.talk.wake_word
    assert other.refused(other.new(A)) is Failure.EXISTS
    claimer.peer.release(slot)
    claimer.talk.wake()
    assert claimer.talk.ids() == set()
    claimer.talk.store.check()


def test_one_that_is_aborted_leaves_its_room_when_its_writer_lets_go(claimer: Claimer) -> None:
    """Its id is free at once."""
    slot, _ = claimer.claim(A)
    claimer.peer.write(Abort(A))
    assert claimer.talk.ids() == set()
    assert claimer.talk.wake_word
    claimer.peer.release(slot)
    claimer.talk.wake()
    assert not claimer.talk.wake_word
    claimer.talk.store.check()


def test_what_a_client_has_claimed_goes_with_it(claimer: Claimer, other: Peer) -> None:
    """But for what it had sealed, also if the store has not read that yet."""
    claimer.claim(A, silently=True)
    claimer.peer.write_silently(Seal(A))
    claimer.claim(B, silently=True)
    claimer.talk.disconnect(claimer.peer)
    assert other.ask(Contains(A), Number).value == 1
    assert claimer.talk.ids() == {A}
    assert other.ask(Evict(1), Number).value == SIZE
    claimer.talk.store.check()


def test_an_id_that_is_taken_cannot_be_claimed(claimer: Claimer, other: Peer) -> None:
    """What a client writes all the same is dropped, when it lets go of it; what was there is not touched."""
    other.put(A, 64)
    slot, offset = claimer.claim(A)
    assert claimer.talk.wake_word
    claimer.peer.write(Seal(A))  # in vain
    found, (pinned,) = other.get(A)
    assert found[0][:2] != (offset, SIZE)
    other.release(pinned)
    claimer.talk.store.check()
    claimer.peer.release(slot)
    claimer.talk.wake()
    assert not claimer.talk.wake_word
    assert claimer.peer.dropped is None
    claimer.talk.store.check()


@pytest.mark.parametrize("wrong", ["slot", "offset"])
def test_a_claim_of_what_is_not_its_own_drops_the_sender(
    claimer: Claimer, other: Peer, wrong: str
) -> None:
    """Be it the slot of another client, or room outside of the lease."""
    slot = other.free_slots[-1] if wrong == "slot" else claimer.peer.free_slots[-1]
    offset = claimer.next + (1 << 16 if wrong == "offset" else 0)
    claimer.peer.write(Claim(A, offset, SIZE, 0, 3, slot))
    assert claimer.peer.dropped is not None
    assert claimer.talk.ids() == set()
    claimer.talk.store.check()


STAMP_NS = 1 << 20
"""The unit of a stamp."""


@pytest.mark.parametrize("age", [0, 1, 3, 4, 5, 1000, 2**31 - 1])
@pytest.mark.parametrize("rest", [0, 1, STAMP_NS - 1])
def test_a_claim_says_when_it_was_made(age: int, rest: int) -> None:
    """To two stamps, and after its writing; what is read soon counts from then."""
    now_ns = (5 << 52) + 123_456
    written_ns = (((now_ns >> 20) - age) << 20) + rest
    created_ns = Claim(A, 0, SIZE, 0, 3, 0, stamp_of(written_ns)).created_ns(now_ns)
    assert created_ns <= now_ns
    if age < 4:
        assert created_ns == now_ns
    else:
        assert written_ns < created_ns <= written_ns + 2 * STAMP_NS


@pytest.mark.parametrize("ahead", [1, 1000, 2**31])
def test_a_claim_by_a_clock_that_is_ahead_counts_from_its_reading(ahead: int) -> None:
    """As does one that does not say when it was made."""
    now_ns = (5 << 52) + 123_456
    stamp = stamp_of(now_ns + ahead * STAMP_NS)
    assert Claim(A, 0, SIZE, 0, 3, 0, stamp).created_ns(now_ns) == now_ns
    assert Claim(A, 0, SIZE, 0, 3, 0).created_ns(now_ns) == now_ns


def test_a_claim_that_says_nonsense_was_made_at_the_beginning() -> None:
    """A time is never negative, whatever the clocks say."""
    assert Claim(A, 0, SIZE, 0, 3, 0, 2**31 + 1).created_ns(123_456) == 0


def test_pins_by_offset_mean_what_lies_there_now(claimer: Claimer, other: Peer) -> None:
    """A slot that names the place of an object that has gone pins the next one that is claimed there, and no other."""
    claimer.put(A)
    assert other.ask(Evict(1), Number).value == SIZE
    start, claimer.next = claimer.lease.offset, claimer.peer.ask(AskLease(SIZE), Leased).offset
    assert claimer.next == start
    other.put(A, 64)  # in the entry that was free
    slot, _ = claimer.claim(B)
    claimer.peer.write(Seal(B))
    assert other.ask(Evict(SIZE), Number).value == 64
    assert claimer.talk.ids() == {B}
    claimer.peer.release(slot)
    assert other.ask(Evict(1), Number).value == SIZE
    claimer.talk.store.check()


# -- who else wants the id ------------------------------------------------------------------------


def test_the_store_locks_an_id_while_it_inserts_it(claimer: Claimer, other: Peer) -> None:
    """And no longer, also where there is no room."""
    held: list[int] = []
    memory = claimer.talk.memory
    unlock = memory.unlock

    def note() -> None:
        held.append(memory.locks)
        unlock()

    memory.unlock = note  # type: ignore[method-assign]
    other.create(A)
    assert other.refused(other.new(B, 2 << 20)) is Failure.FULL
    assert other.refused(other.new(B, 1 << 20)) is Failure.FULL
    assert held
    assert set(held) == {1}
    assert memory.locks == 0


def test_what_was_claimed_before_is_read_before_an_id_is_given_away(
    claimer: Claimer, other: Peer
) -> None:
    """Its client has the lock, and has told the store in its outbox, which nobody has announced."""
    lock(claimer, A)
    claimer.claim(A, silently=True)
    assert other.refused(other.new(A)) is Failure.EXISTS
    assert not claimer.is_recalled
    claimer.talk.store.check()


def test_a_lock_for_nothing_keeps_nobody_from_an_id(claimer: Claimer, other: Peer) -> None:
    """Leases are recalled; then nobody can be about to use it."""
    lock(claimer, A)
    other.create(A)
    assert claimer.is_recalled
    claimer.talk.store.check()


@pytest.mark.parametrize("timeout_ns", [0, FOR_EVER])
def test_who_is_about_to_claim_an_id_is_waited_for(
    claimer: Claimer, other: Peer, timeout_ns: int
) -> None:
    """He is busy; what he claims then is his."""
    lock(claimer, A)
    claimer.set_busy(True)
    request = other.new(A)._replace(timeout_ns=timeout_ns)
    request_id = other.post(request)
    for _ in range(3):
        claimer.talk.settle()
    assert other.replies == {}
    assert claimer.is_recalled
    claimer.claim(A, silently=True)
    claimer.set_busy(False)
    claimer.talk.turn()
    assert other.replies.pop(request_id).failure is Failure.EXISTS  # type: ignore[union-attr]
    claimer.talk.store.check()


def test_who_was_about_to_claim_an_id_may_leave_it(claimer: Claimer, other: Peer) -> None:
    """He finds the lease recalled, or somebody interrupts him."""
    lock(claimer, A)
    claimer.set_busy(True)
    request_id = other.post(other.new(A))
    claimer.talk.settle()
    claimer.set_busy(False)
    claimer.talk.turn()
    other.take(request_id, Created)
    claimer.talk.store.check()


def test_who_has_stopped_in_the_midst_of_a_claim_is_not_waited_for(
    claimer: Claimer, other: Peer
) -> None:
    """The id counts as taken; other ids do not."""
    lock(claimer, A)
    claimer.set_busy(True)
    assert other.refused(other.new(A)) is Failure.EXISTS
    other.create(B)
    claimer.talk.store.check()


def test_who_waits_for_room_waits_for_the_id_as_well(claimer: Claimer, other: Peer) -> None:
    """In the queue, where an id may be locked when its turn comes; what is claimed meanwhile is another's."""
    talk = claimer.talk
    slot = other.create(B, 1 << 20)  # for which all leases are recalled
    waiting = other.post(Create(A, SIZE, 0, 0, other.free_slots.pop(), False, FOR_EVER))
    talk.turn()
    assert other.replies == {}
    lock(claimer, A)
    other.tell(Abort(B))
    other.release(slot)
    talk.wake()
    talk.turn()
    other.take(waiting, Created)
    talk.store.check()


# -- looking whether an id is free -------------------------------------------------------------


def test_insertions_are_counted(claimer: Claimer, other: Peer) -> None:
    """Twice for each: an odd number says that chains are written."""
    word = claimer.talk.words[HeaderWord.INSERTIONS]
    claimer.claim(A)
    other.put(B)
    claimer.peer.write(Publish(name(3), claimer.next, 64, 0, 3))
    claimer.peer.ask(Flush(), Done)
    assert claimer.talk.words[HeaderWord.INSERTIONS] == word + 6
    other.ask(Delete([B]), Done)
    assert claimer.talk.words[HeaderWord.INSERTIONS] == word + 6


def test_while_chains_are_written_anew_insertions_are_odd(claimer: Claimer) -> None:
    """A successor that takes the table over says so before it writes to it, and counts on after that."""
    talk = claimer.talk
    claimer.put(A)
    word = talk.words[HeaderWord.INSERTIONS]
    successor = talk.new_store(talk.words, talk.raw)
    seen: list[int] = []

    def is_alive(_pid: int, _start_time: int) -> bool:
        seen.append(talk.words[HeaderWord.INSERTIONS])
        return True

    table = successor._parts.table
    dead = table.take_over()
    assert talk.words[HeaderWord.INSERTIONS] == word + 1
    assert dead.scan().complete[0]
    successor = talk.new_store(talk.words, talk.raw)
    successor.recover(is_alive, talk.now_ns)
    assert set(seen) == {word + 2}


def test_a_successor_reads_the_outboxes_of_the_dead_last() -> None:
    """A client that died with its store had lost its lock: who has claimed the id since has it, whatever the boards' order."""
    for first_is_dead in (True, False):
        talk = Conversation(1 << 20)
        dead, living = Claimer(talk), Claimer(talk)
        if not first_is_dead:
            dead, living = living, dead
        dead.claim(A, silently=True)
        dead.peer.write_silently(Seal(A))
        _, offset = living.claim(A, silently=True)
        living.peer.write_silently(Seal(A))
        # All clients are of one process here; the order in which they are asked for tells them apart.
        successor = talk.new_store(talk.words, talk.raw)
        asked: list[int] = []

        def is_alive(
            _pid: int, _start_time: int, asked: list[int] = asked, dead: int = dead.board
        ) -> bool:
            asked.append(len(asked))
            return asked[-1] % 2 != dead

        successor.recover(is_alive, talk.now_ns)
        entry = successor._parts.table.find(A)
        assert successor._parts.table.location(entry)[0] == offset
        successor.check()
