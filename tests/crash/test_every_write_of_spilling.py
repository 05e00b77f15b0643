"""A store with an external store that dies at each of its writes in turn: nothing is lost, and nothing comes back."""

from __future__ import annotations

from typing import TypeVar

import pytest

from shmplasma.layout import EntryState, EntryWord
from shmplasma.posted import Seal
from shmplasma.replies import ABSENT, Created, Done, Listing, Number, Objects, Reply
from shmplasma.requests import Create, Delete, Evict, Get, List, Request
from shmplasma.spilling import ExternalLimits
from shmplasma.table import Table
from tests.conversation import Peer, name, records
from tests.crash.damage import Death, Mortal

_T = TypeVar("_T", bound=Reply)

SIZE = 7000
COUNT = 20
"""More than twice what fits."""


def content(number: int, size: int = SIZE) -> bytes:
    """Return what an object of this name holds."""
    return (b"%d;" % number * size)[:size]


class Story:
    """A client puts more than fits, reads all of it, and deletes some of it, wherever that is."""

    def __init__(self) -> None:
        self.talk = Mortal(65536, ExternalLimits())
        self.peer = self.talk.enter()

    def ask(self, request: Request, expected: type[_T]) -> _T:
        """Ask, have the external store do its part, and ask again where the store dies."""
        peer: Peer = self.peer
        while True:
            try:
                request_id = peer.post(request)
                self.talk.settle_outside()
                return peer.take(request_id, expected)
            except Death:
                self.talk.revive()
                if isinstance(request, Get | Create):
                    for slot in request.slots if isinstance(request, Get) else (request.slot,):
                        self.talk.write_slot(slot, 0)

    def put(self, number: int) -> None:
        """Put an object."""
        request = self.peer.new(name(number), SIZE)
        offset = self.ask(request, Created).offset
        self.talk.raw[offset : offset + SIZE] = content(number)
        self.talk.tell(self.peer, Seal(name(number)))
        self.peer.release(request.slot)

    def look(self, number: int) -> None:
        """Get an object and look at it."""
        request = self.peer.wanted([name(number)])
        (found,) = self.ask(request, Objects).found
        assert found != ABSENT, f"object {number} is lost"
        assert bytes(self.talk.raw[found[0] : found[0] + SIZE]) == content(number)
        self.peer.release(request.slots[0])

    def run(self) -> None:
        """Tell the story."""
        for number in range(COUNT):
            self.put(number)
        for number in range(0, COUNT, 3):
            self.look(number)
        gone = [1, 2, COUNT - 1]
        self.ask(Delete([name(number) for number in gone]), Done)
        self.ask(Evict(3 * SIZE), Number)
        self.put(1)
        left = {name(number) for number in range(COUNT)} - {name(2), name(COUNT - 1)}
        listed = records(self.ask(List(0), Listing))
        assert {record.object_id for record in listed} == left
        assert all(record.sealed for record in listed)
        for number in range(COUNT):
            if name(number) in left:
                self.look(number)
        self.talk.store.check()


@pytest.mark.parametrize("first", range(5))
def test_a_death_at_each_write(first: int) -> None:
    """Whenever the store dies, everything that was put is there, and nothing that was deleted."""
    unharmed = Story()
    unharmed.run()
    n_writes = unharmed.talk.clock.writes
    assert n_writes > 300
    for number in range(Story().talk.clock.writes + first, n_writes, 5):
        story = Story()
        story.talk.clock.dies_at = number
        try:
            story.run()
        except BaseException as error:
            error.add_note(f"the store died at its write {number}")
            raise
        assert story.talk.deaths == 1


DELETED, LIVING, LARGE = 1, 2, 3
HALF = 20_000
"""Two of these leave no room for a large one."""


class Succession:
    """Two clients of a store that is full, one object in it that has a copy, and its place there."""

    def __init__(self) -> None:
        self.talk = Mortal(65536, ExternalLimits())
        self.peer, self.deleter = self.talk.enter(), self.talk.enter()
        self._put(DELETED)
        self._put(LIVING)
        self.ask(Evict(2 * HALF), Number)
        self.look(DELETED)
        self.ask(self.peer.new(name(LARGE), 44_000), Created)  # above the high-water mark
        self.entry = self.find(DELETED)
        assert self.state == EntryState.SEALED
        assert self.table.copy_of(self.entry)[0]

    @property
    def table(self) -> Table:
        """The table of the store that lives."""
        return self.talk.store._parts.table

    def find(self, number: int) -> int:
        """Return the entry of an object."""
        return self.table.find(name(number))

    @property
    def state(self) -> int:
        """What the entry of the object says that is deleted."""
        return self.table.state(self.entry)

    def _put(self, number: int) -> None:
        request = self.peer.new(name(number), HALF)
        offset = self.ask(request, Created).offset
        self.talk.raw[offset : offset + HALF] = content(number, HALF)
        self.peer.write(Seal(name(number)))
        self.peer.release(request.slot)
        self.talk.settle_outside()

    def ask(self, request: Request, expected: type[_T]) -> _T:
        """Ask, and have the external store do its part."""
        request_id = self.peer.post(request)
        self.talk.settle_outside()
        return self.peer.take(request_id, expected)

    def look(self, number: int) -> bool:
        """Get an object and look at it; tell whether it is there."""
        request = self.peer.wanted([name(number)])
        (found,) = self.ask(request, Objects).found
        if found != ABSENT:
            assert bytes(self.talk.raw[found[0] : found[0] + HALF]) == content(number, HALF)
        self.peer.release(request.slots[0])
        return found != ABSENT

    def delete_while_it_goes(self) -> None:
        """Delete the object without a message; another one takes its place before the store reads of it."""
        offset = self.table.location(self.entry)[0]
        self.deleter.remove(name(DELETED))
        request = self.peer.wanted([name(LIVING)])
        request_id = self.peer.post(request)
        for job in self.talk.take_jobs():
            self.talk.do(job)
        self.peer.take(request_id, Objects)
        self.peer.release(request.slots[0])
        assert self.state == EntryState.SPILLED
        assert self.table.location(self.find(LIVING))[0] == offset


def test_a_second_death_over_what_was_deleted() -> None:
    """What was deleted when it was in the external store alone does not come back where another object is now, whenever the successor dies."""
    unharmed = Succession()
    unharmed.delete_while_it_goes()
    before = unharmed.talk.clock.writes
    unharmed.talk.revive()
    n_writes = unharmed.talk.clock.writes - before
    assert n_writes > 10
    for number in range(n_writes):
        scene = Succession()
        scene.delete_while_it_goes()
        scene.talk.clock.pauses = [number]
        scene.talk.revive()
        try:
            assert scene.talk.deaths == 2
            assert scene.look(LIVING)
            assert not scene.look(DELETED)
            scene.talk.store.check()
        except BaseException as error:
            error.add_note(f"the successor died at its write {number}")
            raise


def test_a_reader_that_is_late_holds_nothing_of_what_was_deleted() -> None:
    """Who has found an object before it went, and writes down that he holds it after that, keeps no extent from others."""
    scene = Succession()
    talk, slot = scene.talk, scene.peer.free_slots.pop()
    scene.deleter.remove(name(DELETED))
    assert talk.store._room.take([scene.entry], spill=True) == [scene.entry]
    talk.write_slot(slot, scene.entry + 1)
    talk.revive()
    assert not talk.store._objects.releases.limbo
    scene.peer.release(slot)
    talk.wake()
    assert not scene.look(DELETED)
    assert scene.look(LIVING)
    talk.store.check()


def test_what_is_damaged_and_held_has_no_copy() -> None:
    """It goes at its last release, and what it says of a copy is of no account."""
    scene = Succession()
    talk, slot = scene.talk, scene.peer.free_slots.pop()
    talk.write_slot(slot, scene.entry + 1)
    talk.words[talk.layout.entry(scene.entry) // 8 + EntryWord.CHECK] ^= 1
    talk.revive()
    assert talk.store._objects.releases.limbo == {scene.entry}
    scene.peer.release(slot)
    talk.wake()
    assert not talk.store._objects.releases.limbo
    assert not scene.look(DELETED)
    talk.settle_outside()
    talk.store.check()
