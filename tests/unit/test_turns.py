"""Requests that take many objects: a few of them a turn, and others have theirs in between."""

from __future__ import annotations

from itertools import pairwise

import pytest

from shmplasma.layout import REFERENCED
from shmplasma.lifecycle import Lifecycle
from shmplasma.posted import Release, Seal
from shmplasma.replies import Created, Done, Failed, Failure, Number
from shmplasma.requests import Contains, Create, Delete, Evict, Flush, Trim
from shmplasma.spilling import ExternalLimits
from shmplasma.table import Table
from shmplasma.transfers import Write
from shmplasma.waiters import FOR_EVER, MAX_PASSES
from tests.conversation import Conversation, Peer, name

AT_ONCE = 3
N_OBJECTS = 1024
IDS = [name(number) for number in range(N_OBJECTS)]
NEW = name(N_OBJECTS)


class Street:
    """A store that is full of small objects, and two clients."""

    def __init__(self) -> None:
        self.talk = Conversation()
        self.store = self.talk.store
        self.one, self.other = self.talk.client(), self.talk.client()
        for object_id in IDS:
            self.one.put(object_id)
        self.store._room.most_at_once = AT_ONCE

    def step(self) -> None:
        """Do one turn of the loop."""
        self.talk.steady_ns += 10**9
        if self.store.has_unsettled:
            self.talk.settle()
        if self.store.has_waiters:
            self.talk.carry_out(self.store.offer_room(self.talk.steady_ns, self.talk.now_ns))

    def turns(self, peer: Peer, request_id: int) -> list[int]:
        """Do turns until a request is answered; return how many objects have gone in each."""
        gone = [self.left()]
        while request_id not in peer.replies:
            assert self.store.has_unsettled, "nobody goes on with it"
            self.step()
            gone.append(self.left())
        return [before - after for before, after in pairwise(gone)]

    def left(self) -> int:
        """Return how many of the objects there are."""
        return sum(self.store._objects.contains(object_id) for object_id in IDS)


@pytest.fixture
def street() -> Street:
    """Return a full store."""
    return Street()


def test_a_long_delete_takes_turns(street: Street) -> None:
    """It is answered when all have gone; what is named twice, or is missing, goes once, or not."""
    ids = [*IDS[:8], IDS[0], NEW]
    request_id = street.one.post(Delete(ids))
    assert street.turns(street.one, request_id) == [3, 3, 2, 0]
    street.one.take(request_id, Done)
    assert not street.store.has_unsettled
    street.one.ask(Delete([]), Done)


def test_a_long_delete_is_not_looked_through_in_each_turn(
    street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an object is hidden by a move, only those that would be deleted next are compared with it."""
    looked_at: list[bytes] = []
    monkeypatch.setattr(Lifecycle, "is_hidden", lambda _, object_id: looked_at.append(object_id))
    monkeypatch.setattr(street.store._room.mover, "hidden", 1)
    street.one.post(Delete(IDS))
    street.step()
    assert looked_at == IDS[:AT_ONCE]


def test_a_trim_is_not_put_off_by_what_nobody_waits_for_yet(street: Street) -> None:
    """Objects are evicted ahead of the next lease after it, as long as others go on putting."""
    request_id = street.one.post(Trim())
    turns = 0
    while request_id not in street.one.replies:
        street.store._parts.publishing._ahead = 1 << 40
        assert street.store.upkeep.has_urgent_work
        street.talk.carry_out(street.store.upkeep.advance(street.talk.now_ns))
        turns += 1
        assert turns < 100
    street.one.take(request_id, Number)


def test_a_long_eviction_takes_turns(street: Street) -> None:
    """It tells how much went in all of them."""
    request_id = street.one.post(Evict(7 * 64 + 1))
    assert street.turns(street.one, request_id) == [3, 3, 2]
    assert street.one.take(request_id, Number).value == 8 * 64
    request_id = street.one.post(Evict(1 << 40))
    street.turns(street.one, request_id)
    assert street.one.take(request_id, Number).value == (N_OBJECTS - 8) * 64


def test_others_are_answered_in_between(street: Street) -> None:
    """A question, and a small creation, wait for a turn and not for all of them."""
    request_id = street.one.post(Delete(IDS[:9]))
    question = street.other.post(Contains(NEW))
    street.step()
    assert street.other.take(question, Number).value == 0
    assert request_id not in street.one.replies
    creation = street.other.post(street.other.new(NEW))
    street.other.take(creation, Created)
    assert sum(street.turns(street.one, request_id)) == 6


@pytest.mark.parametrize("timeout_ns", [0, 1, FOR_EVER])
def test_room_for_a_large_object_takes_turns(street: Street, timeout_ns: int) -> None:
    """As much goes as it needs, as long as that takes: its time to wait does not run meanwhile."""
    request = street.one.new(NEW, 8 * 64)._replace(timeout_ns=timeout_ns)
    request_id = street.one.post(request)
    assert street.left() == N_OBJECTS - AT_ONCE
    assert street.turns(street.one, request_id) == [3, 2]
    street.one.take(request_id, Created)
    assert not street.store.has_unsettled
    street.store._parts.check()


def test_another_creation_meanwhile(street: Street) -> None:
    """What needs as much waits its turn; what needs little has it at once, and takes nothing from the other for good."""
    first = street.one.post(street.one.new(NEW, 8 * 64))
    second = street.other.post(street.other.new(name(2000), 8 * 64))
    third = street.other.post(street.other.new(name(2001), 64))
    street.other.take(third, Created)
    street.turns(street.one, first)
    street.one.take(first, Created)
    street.turns(street.other, second)
    street.other.take(second, Created)
    assert street.left() == N_OBJECTS - 17
    street.store._parts.check()


def test_what_is_held_stays(street: Street) -> None:
    """Objects in use are passed over, however many they are; where too few are left, the refusal comes at once."""
    street.other.get(*IDS[: 2 * AT_ONCE])
    request_id = street.one.post(Evict(5 * 64))
    assert street.turns(street.one, request_id) == [3, 2]
    assert all(map(street.store._objects.contains, IDS[: 2 * AT_ONCE]))
    street.other.get(*(id_ for id_ in IDS[6:300] if street.store._objects.contains(id_)))
    failed = street.one.ask(street.one.new(NEW, 60_000), Failed)
    assert failed.failure is Failure.FULL


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Have few objects passed in a turn, and return how many."""
    passed = 100
    monkeypatch.setattr("shmplasma.residents._PASSED_AT_ONCE", passed)
    monkeypatch.setattr("shmplasma.residents._PASSED_A_PIN", 0)
    return passed


def writes_ahead() -> Conversation:
    """Return a store whose 500 objects were all read, and are to be written ahead of need."""
    talk = Conversation(external=ExternalLimits(high_water=1.0))
    peer = talk.client()
    for object_id in IDS[:500]:
        peer.put(object_id)
    spilling = talk.store._objects.spilling
    assert spilling is not None
    talk.store._room.residents._visited[:500] = b"\1" * 500
    spilling.limits = ExternalLimits(high_water=0.0)
    spilling.look_again()
    return talk


def test_what_was_read_lately_is_written_ahead_by_and_by(few: int) -> None:
    """So many lose their marks in a turn, and then the oldest are written; nobody waits for that."""
    talk = writes_ahead()
    visited = talk.store._room.residents._visited
    marks, jobs = [500], talk.take_jobs()
    while not jobs:
        assert talk.store.is_to_take_jobs
        marks.append(sum(visited[:500]))
        jobs = talk.take_jobs()
    assert marks == list(range(500, -1, -few))
    while talk.store.is_to_take_jobs:
        jobs += talk.take_jobs()
    written = [part.object_id for job in jobs if isinstance(job, Write) for part in job.parts]
    assert written == IDS[: len(written)]
    assert len(written) > few


def test_what_nothing_can_be_written_of_is_passed_twice(few: int) -> None:
    """After that the store waits for something else to come."""
    talk = writes_ahead()
    talk.store._room.residents.busy.update(range(500))
    turns = 1
    assert not talk.take_jobs()
    while talk.store.is_to_take_jobs:
        assert not talk.take_jobs()
        turns += 1
        assert turns < 5 * 500 // few
    assert turns >= 2 * 500 // few


def test_what_was_read_lately_is_passed_by_and_by(street: Street, few: int) -> None:
    """Where all have their marks, so many lose them in a turn; then the oldest goes, as it would have at once."""
    visited = street.store._room.residents._visited
    visited[:N_OBJECTS] = b"\1" * N_OBJECTS
    request_id = street.one.post(street.one.new(NEW))
    marks = [sum(visited[:N_OBJECTS])]
    assert sum(street.turns(street.one, request_id)) == 1
    street.one.take(request_id, Created)
    assert not street.store._objects.contains(IDS[0])
    street.talk.turn()
    street.store._parts.check()
    visited[:N_OBJECTS] = b"\1" * N_OBJECTS
    request_id = street.other.post(street.other.new(name(2000)))
    while request_id not in street.other.replies:
        marks.append(sum(visited[:N_OBJECTS]))
        street.step()
    assert len(marks) > N_OBJECTS // few
    assert all(0 <= before - after <= few for before, after in pairwise(marks))
    street.store._parts.check()


@pytest.mark.parametrize("n_more", [0, 1])
def test_what_may_not_go_is_passed_by_and_by(street: Street, few: int, n_more: int) -> None:
    """What belongs to references is passed in turns as well, and who asks is answered though nothing goes."""
    residents = street.store._room.residents
    for entry in list(residents._queue)[: N_OBJECTS - n_more]:
        residents.protect(entry, True)
    request_id = street.one.post(Evict(1 << 40))
    turns = street.turns(street.one, request_id)
    assert street.one.take(request_id, Number).value == 64 * n_more
    assert N_OBJECTS // few < len(turns) <= 2 * N_OBJECTS // few + 12
    street.one.ask(street.one.new(NEW, 65536), Failed)
    street.store._parts.check()


def test_what_is_read_again_and_again_is_not_looked_at_for_ever(street: Street, few: int) -> None:
    """After two rounds in which everything was read anew there is nothing that goes."""
    visited = street.store._room.residents._visited
    request_id = street.one.post(Evict(64))
    street.turns(street.one, request_id)
    street.one.take(request_id, Number)
    visited[:N_OBJECTS] = b"\1" * N_OBJECTS
    request_id = street.one.post(Evict(64))
    turns = 0
    while request_id not in street.one.replies:
        visited[:N_OBJECTS] = b"\1" * N_OBJECTS
        street.step()
        turns += 1
        assert turns <= 2 * N_OBJECTS // few + 2
    assert street.one.take(request_id, Number).value == 0


def test_a_time_that_is_over(street: Street) -> None:
    """When all that may go has gone, and others hold the rest, time runs."""
    slots = street.other.get(*IDS[:500])[1]
    request: Create = street.one.new(NEW, 40_000)._replace(timeout_ns=1)
    request_id = street.one.post(request)
    assert not street.store.has_unsettled
    street.step()
    street.step()
    assert street.one.take(request_id, Failed).failure is Failure.FULL
    for slot in slots:
        street.other.release(slot)
    street.one.ask(street.one.new(NEW, 40_000), Created)


def test_a_time_that_is_over_behind_others(street: Street) -> None:
    """Whoever stops being served, as nobody may pass the first any more, waits no longer than he has said."""
    slots = street.other.get(*IDS[600:1000])[1]
    first = street.other.post(street.other.new(NEW, 60_000)._replace(timeout_ns=FOR_EVER))
    second = street.one.post(street.one.new(name(2000), 8 * 64)._replace(timeout_ns=10**9))
    street.step()
    assert street.store._creations.makes_room
    next(iter(street.store._queue)).passed = MAX_PASSES
    street.step()
    assert street.one.take(second, Failed).failure is Failure.FULL
    assert not street.store.has_unsettled
    for slot in slots:
        street.other.release(slot)
    street.talk.turn()
    street.other.take(first, Created)


def test_whoever_leaves_has_nothing_go_on(street: Street) -> None:
    """With its client ends what was begun for it, and the store is at rest."""
    for request in (street.one.new(NEW, 8 * 64), Evict(500), Delete(IDS[100:110])):
        street.one.post(request)
    street.step()
    left = street.left()
    street.talk.disconnect(street.one)
    street.step()
    assert not street.store.has_unsettled
    street.talk.turn()  # which ends a move that was under way
    assert street.store.is_quiet
    assert street.left() == left
    assert not street.store._dispatch._freed
    street.store._parts.check()


def test_what_waits_for_its_release_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who creates an object where there is room, or deletes one, is not held up by all that was deleted and is still held."""
    talk = Conversation(1 << 20)
    holder, other = talk.client(), talk.client()
    for object_id in IDS[:302]:
        other.put(object_id)
    _, slots = holder.get(*IDS[:300])
    other.ask(Delete(IDS[:300]), Done)
    looked_at: list[int] = []
    state = Table.state

    def counted(self: Table, entry: int) -> int:
        looked_at.append(entry)
        return state(self, entry)

    monkeypatch.setattr(Table, "state", counted)
    other.ask(other.new(NEW), Created)
    other.ask(Delete([IDS[300]]), Done)
    assert other.ask(Evict(64), Number).value == 64
    assert len(looked_at) < 100
    assert talk.ids() == {*IDS[:300], NEW}
    for slot in slots:
        holder.release(slot)
    other.ask(other.new(name(2000), 1 << 20), Failed)
    assert talk.ids() == {NEW}
    talk.store.check()


def own(owner: Peer, object_id: bytes) -> None:
    """Put a referenced object, whose creator holds it."""
    request = owner.new(object_id, codec=REFERENCED)
    owner.ask(request, Created)
    owner.write(Seal(object_id))
    owner.release(request.slot)


def test_the_end_of_who_owns_many_takes_turns() -> None:
    """What a client alone has owned goes a few objects a turn, and at once when somebody lacks their room."""
    talk = Conversation()
    owner, other = talk.client(), talk.client()
    for object_id in IDS[:1000]:
        own(owner, object_id)
    talk.store._room.most_at_once = AT_ONCE
    talk.disconnect(owner)
    gone = []
    for _ in range(10):
        before = talk.store._room.free_bytes
        talk.settle()
        other.take(other.post(Flush()), Done)
        talk.store.check()
        gone.append((talk.store._room.free_bytes - before) // 64)
    assert max(gone) == AT_ONCE
    assert sum(gone) > AT_ONCE
    assert talk.store.has_unsettled
    other.ask(other.new(NEW, 65536), Created)
    assert not talk.store._room.free_bytes
    talk.store.check()


@pytest.mark.parametrize(("others", "expected"), [(0, [3, 3, 2]), (4, [3, 3, 3, 3, 16])])
def test_who_asks_while_many_go_waits_for_turns(others: int, expected: list[int]) -> None:
    """He is answered when all have gone that had been left then, however many are left meanwhile, and others have turns in between."""
    talk = Conversation()
    owner, busy, other = (talk.client() for _ in range(3))
    for object_id in IDS[:8]:
        own(owner, object_id)
    talk.store._room.most_at_once = AT_ONCE
    talk.disconnect(owner)
    request_id = other.post(Contains(NEW))
    gone = []
    for turn in range(len(expected)):
        assert request_id not in other.replies
        for object_id in IDS[8 + turn * others :][:others]:
            own_and_leave(busy, object_id)
        before = talk.ids()
        talk.settle()
        gone.append(len(before - talk.ids()))
    assert gone == expected
    assert not talk.ids()
    assert other.take(request_id, Number).value == 0
    assert not talk.store.has_unsettled
    talk.store.check()


def own_and_leave(owner: Peer, object_id: bytes) -> None:
    """Put a referenced object that nobody owns, without a turn of the loop."""
    request = owner.new(object_id, codec=REFERENCED)
    owner.take(owner.post(request), Created)
    owner.write(Seal(object_id))
    owner.write(Release(object_id, 0))
    owner.release(request.slot)
