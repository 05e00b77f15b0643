"""A store that dies at each of its writes in turn, and whose clients go on with its successor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from zlib import crc32

import pytest

from shmplasma.layout import BOARD_WORDS, GRANULE_BYTES
from shmplasma.leases import BUSY_WORD
from shmplasma.offset_pins import AT_OFFSET, pin_word
from shmplasma.posted import Abort, Claim, Publish, Seal
from shmplasma.replies import ABSENT, Created, Done, Leased, Listing, Number, Objects
from shmplasma.requests import AskLease, Contains, Create, Delete, Evict, Get, Keep, List, Trim
from shmplasma.waiters import FOR_EVER
from tests.conversation import Conversation, Peer, name, records
from tests.crash.damage import Death, Mortal

_STEP_WHEN_TRACED = 5
"""Where coverage is measured, which takes five times as long, the store dies at one of so many writes; `scripts/test` runs all of them as well."""
KEPT = name(4)
"""What is published under this name is kept."""


class Story:
    """Two clients do one of each thing; what a client was told must stay true, whenever the store dies.

    Attributes
    ----------
    held : dict
        Slots that pin an object, and its id.
    """

    def __init__(self, talk: Mortal | None = None) -> None:
        self.talk = talk or Mortal()
        self.held: dict[int, bytes] = {}
        self.one = self.talk.enter()
        self.other = self.talk.enter()

    # -- what clients do -----------------------------------------------------------------------

    def create(
        self, peer: Peer, object_id: bytes, size: int = 200, *, keep: bool = False
    ) -> Create:
        """Create an object and fill it."""
        request = Create(object_id, size, 0, 0, peer.free_slots.pop(), keep)
        offset = self.talk.call(peer, request, Created).offset
        self.fill(object_id, offset, size)
        self.held[request.slot] = object_id
        return request

    def fill(self, object_id: bytes, offset: int, size: int) -> None:
        """Write the content by which an object is known; there is memory for it."""
        assert self.talk.memory.has(offset, size), "a client writes to a hole"
        self.talk.raw[offset : offset + size] = (object_id * (size // 20 + 1))[:size]

    def seal(self, peer: Peer, object_id: bytes) -> None:
        """Complete an object."""
        self.talk.tell(peer, Seal(object_id))

    def release(self, slot: int) -> None:
        """Let go of an object."""
        self.talk.write_slot(slot, 0)
        del self.held[slot]

    def get(self, peer: Peer, *object_ids: bytes) -> list[int]:
        """Get objects that are there, look at them, and keep them."""
        slots = [peer.free_slots.pop() for _ in object_ids]
        found = self.talk.call(peer, Get(False, object_ids, slots), Objects).found
        for slot, object_id, where in zip(slots, object_ids, found, strict=True):
            assert where != ABSENT, f"{object_id.hex()} is not there"
            offset, data_size, _, _ = where
            self.look(object_id, offset, data_size)
            self.held[slot] = object_id
        return slots

    def look(self, object_id: bytes, offset: int, size: int) -> None:
        """Prove that an object's bytes are its own."""
        assert self.talk.memory.has(offset, size), "a client reads from a hole"
        content = bytes(self.talk.raw[offset : offset + size])
        assert content == (object_id * (size // 20 + 1))[:size]

    def wait_for_room(self, peer: Peer, object_id: bytes, size: int, held: int) -> None:
        """Create an object for which there is room when something that is held is let go."""
        slot = peer.free_slots.pop()
        request = Create(object_id, size, 0, 0, slot, timeout_ns=FOR_EVER)
        asked: int | None = None
        while slot not in self.held:
            try:
                if asked is None:
                    asked = peer.post(request)
                    self.talk.turn()
                if held in self.held:
                    assert asked not in peer.replies
                    self.release(held)
                Conversation.wake(self.talk)
                self.talk.turn()
                self.fill(object_id, peer.take(asked, Created).offset, size)
                self.held[slot] = object_id
            except Death:
                self.talk.revive()
                self.talk.write_slot(slot, 0)
                asked = None

    def publish(self, peer: Peer, *object_ids: bytes) -> None:
        """Put objects into a lease, one of them beginning with room that is skipped."""
        board = self.talk.layout.boards // 8 + peer.free_slots[-1] // BOARD_WORDS * BOARD_WORDS
        self.talk.words[board + BUSY_WORD] = 1
        lease = self.talk.call(peer, AskLease(100), Leased)
        assert lease.size_bytes
        offset = lease.offset + 64
        for object_id in object_ids:
            self.fill(object_id, offset, 100)
            self.talk.tell(peer, Publish(object_id, offset, 100, 0, 0, object_id == KEPT))
            offset += 128
        self.talk.words[board + BUSY_WORD] = 0

    def claim(self, peer: Peer, *object_ids: bytes) -> list[int]:
        """Create objects in a lease, as a client does that has found their ids free; return the slots that pin them."""
        board = self.talk.layout.boards // 8 + peer.free_slots[-1] // BOARD_WORDS * BOARD_WORDS
        self.talk.words[board + BUSY_WORD] = 1
        lease = self.talk.call(peer, AskLease(100), Leased)
        assert lease.size_bytes
        slots = []
        for offset, object_id in enumerate(object_ids, lease.offset // 128 + 1):
            slot = peer.free_slots.pop()
            self.talk.write_slot(slot, pin_word(crc32(object_id), 128 * offset))
            self.talk.tell(peer, Claim(object_id, 128 * offset, 100, 0, 0, slot))
            self.fill(object_id, 128 * offset, 100)
            self.held[slot] = object_id
            slots.append(slot)
        self.talk.words[board + BUSY_WORD] = 0
        return slots

    def store_large(self, peer: Peer, object_id: bytes) -> None:
        """Store an object of several granules, and let go of it."""
        created = self.create(peer, object_id, 3 * GRANULE_BYTES)
        self.seal(peer, object_id)
        self.release(created.slot)
        assert object_id in self.there()

    def there(self) -> dict[bytes, tuple[bool, bool]]:
        """Return which objects there are, whether they are sealed, and whether they are kept."""
        listing = self.talk.call(self.one, List(0), Listing)
        return {each.object_id: (each.sealed, each.keep) for each in records(listing)}

    # -- the story -----------------------------------------------------------------------------

    def run(self) -> dict[bytes, tuple[bool, bool]]:
        """Tell it from the beginning, and return which objects are there at the end."""
        talk, one, other = self.talk, self.one, self.other
        a, b, c, d, e, f, g, h, large, larger, i = map(name, range(1, 12))
        created = self.create(one, a)
        self.seal(one, a)
        self.get(other, a)
        self.publish(other, b, c, d)
        self.get(one, b, d)
        self.create(one, e, 3000, keep=True)
        talk.call(other, Keep(True, [b]), Done)
        dropped = self.create(other, f)
        talk.tell(other, Abort(f))
        self.release(dropped.slot)
        again = self.create(one, f, 64)
        self.seal(one, f)
        self.release(again.slot)
        talk.call(one, Delete([a, c]), Done)
        assert talk.call(other, Contains(c), Number).value == 0
        self.release(created.slot)
        fourth = talk.enter()
        self.publish(fourth, g)
        self.create(fourth, h)
        talk.leave(fourth)
        for slot in [slot for slot in self.held if self.held[slot] == h]:
            del self.held[slot]
        self.get(one, g)
        talk.call(other, Evict(1), Number)
        self.publish(one, h)
        self.get(other, h)
        self.seal(one, e)
        self.get(other, e)
        talk.call(other, Keep(True, [g, h]), Done)
        talk.call(one, Keep(False, [h]), Done)
        for _ in range(2):
            self.store_large(one, i)
            talk.call(one, Delete([i]), Done)
            assert talk.call(other, Trim(), Number).value >= 0
            self.get(other, e, g)
        self.store_large(one, i)
        talk.call(one, Delete([i]), Done)
        talk.trim()
        self.store_large(one, i)
        talk.trim()
        j, k, m, n = map(name, range(12, 16))
        claimed = self.claim(other, j, k, m, n)
        self.seal(other, j)
        self.get(one, j)
        talk.tell(other, Abort(k))
        self.release(claimed[1])
        self.seal(other, m)
        self.release(claimed[2])
        assert k not in self.there()
        assert self.there()[n] == (False, False)
        self.seal(other, n)
        self.release(claimed[3])
        for object_id in (m, n):
            one.remove(object_id)
        talk.glance()
        talk.tell(one, talk.removal(j))  # which is held
        assert m not in self.there()
        assert n not in self.there()
        self.judge()
        self.get(one, a)  # which was deleted, and goes at the last release
        for slot in [slot for slot, object_id in self.held.items() if object_id == a]:
            self.release(slot)
        self.judge()
        filling = self.create(one, large, 3 << 20)
        self.seal(one, large)
        self.wait_for_room(other, larger, 2 << 20, filling.slot)
        self.seal(other, larger)
        self.judge()
        return self.there()

    def judge(self) -> None:
        """Prove that whatever is held is what it was, and that the store is in order."""
        talk = self.talk
        talk.turn()
        talk.wake()
        talk.store.check()
        for slot, object_id in self.held.items():
            word = talk.read_slot(slot)
            assert word, f"the pin of {object_id.hex()} is lost"
            parts = talk.store._parts
            entry = parts.table.find(object_id) if word & AT_OFFSET else word - 1
            assert entry in parts.boards.pinned()
            start = talk.layout.entry(entry)
            assert bytes(talk.raw[start + 8 : start + 28]) == object_id
            offset, data_size = talk.words[start // 8 + 4 : start // 8 + 6]
            self.look(object_id, offset, data_size)


class Removal(Story):
    """A full store in which objects have to move, some of them onto themselves, for others to have room."""

    def __init__(self) -> None:
        super().__init__(Mortal(256 * 64, piece_bytes=1024))

    def put(self, object_id: bytes, lines: int) -> None:
        """Put an object of so many lines, and let go of it."""
        request = self.create(self.one, object_id, lines * 64)
        self.seal(self.one, object_id)
        self.release(request.slot)

    def run(self) -> dict[bytes, tuple[bool, bool]]:
        """Tell it from the beginning, and return which objects are there at the end."""
        talk, one, other = self.talk, self.one, self.other
        a, b, c, d, e, f, g, h = map(name, range(1, 9))
        for object_id, lines in zip((a, b, c, d, e, f, g), (30, 2, 40, 1, 41, 2, 140), strict=True):
            self.put(object_id, lines)
        talk.call(one, Delete([b, d, f]), Done)
        self.put(h, 5)  # for which two slide down by less than their lengths, by way of the stage
        slots = self.get(other, a, c, e, g, h)
        self.judge()
        for slot in slots:
            self.release(slot)
        talk.call(one, Delete([a, g]), Done)
        small = [name(100 + number) for number in range(56)]
        for object_id in small:
            self.put(object_id, 3)
        self.get(other, small[7])
        talk.call(one, Delete(small[::2]), Done)
        self.put(g, 38)  # for which many move to where others were, but not the one that is pinned
        self.put(f, 33)  # and for which something slides by more than the stage holds
        rest = [*small[1::2], c, e, f, g, h]
        slots = self.get(one, *rest)
        self.judge()
        return self.there()


def _deaths(prepare: Callable[[Story, int], None], tell: Callable[[], Story] = Story) -> list[int]:
    """Run the story with a death at each write in turn; return how many deaths there were in each."""
    unharmed = tell()
    expected = unharmed.run()
    deaths = []
    n_writes = unharmed.talk.clock.writes
    assert n_writes > 100
    step = 1 if sys.gettrace() is None else _STEP_WHEN_TRACED
    for number in range(tell().talk.clock.writes, n_writes, step):
        story = tell()
        prepare(story, number)
        try:
            assert story.run() == expected
        except BaseException as error:
            error.add_note(f"the store died at its write {number}")
            raise
        deaths.append(story.talk.deaths)
    return deaths


def test_a_death_at_each_write() -> None:
    """Whatever the store was doing when it died, its clients go on and find what they were promised."""

    def die_once(story: Story, number: int) -> None:
        story.talk.clock.dies_at = number

    assert set(_deaths(die_once)) == {1}


@pytest.mark.parametrize("pause", [0, 1, 3, 7, 20])
def test_a_second_death_while_recovering(pause: int) -> None:
    """A store that dies while it recovers leaves to its successor what it has found."""

    def die_twice(story: Story, number: int) -> None:
        story.talk.clock.dies_at = number
        story.talk.clock.pauses = [pause]

    assert set(_deaths(die_twice)) <= {1, 2}


def test_a_death_at_each_write_of_a_move() -> None:
    """Objects that were on their way are where they were, or where they were to go, and whole."""

    def die_once(story: Story, number: int) -> None:
        story.talk.clock.dies_at = number

    assert set(_deaths(die_once, Removal)) == {1}


@pytest.mark.parametrize("pause", [2])
def test_a_second_death_while_a_move_is_finished(pause: int) -> None:
    """So they are when the successor dies over them."""

    def die_twice(story: Story, number: int) -> None:
        story.talk.clock.dies_at = number
        story.talk.clock.pauses = [pause]

    assert set(_deaths(die_twice, Removal)) <= {1, 2}
