"""A store with an external store that dies at each of its writes in turn: nothing is lost, and nothing comes back."""

from __future__ import annotations

from typing import TypeVar

import pytest

from shmplasma.posted import Seal
from shmplasma.replies import ABSENT, Created, Done, Listing, Number, Objects, Reply
from shmplasma.requests import Create, Delete, Evict, Get, List, Request
from shmplasma.spilling import ExternalLimits
from tests.conversation import Peer, name, records
from tests.crash.damage import Death, Mortal

_T = TypeVar("_T", bound=Reply)

SIZE = 7000
COUNT = 20
"""More than twice what fits."""


def content(number: int) -> bytes:
    """Return what an object of this name holds."""
    return (b"%d;" % number * SIZE)[:SIZE]


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
