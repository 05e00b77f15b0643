"""Leases in a full store: how many round trips puts take there, and what goes for them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from shmplasma.layout import align_up
from shmplasma.leases import MIN_LEASE_BYTES
from shmplasma.posted import Publish
from shmplasma.replies import Leased
from shmplasma.requests import AskLease, Post
from tests.conversation import Conversation, Peer, name

CAPACITY = 64 << 20
SIZE_BYTES = 100_000
EXTENT_BYTES = align_up(SIZE_BYTES, 64)
LIMIT_BYTES = CAPACITY // 64


class Putter:
    """A client that puts objects of one size as real clients do, and counts what it asks for.

    Attributes
    ----------
    leases : list of int
        The sizes of its leases.
    """

    def __init__(self, talk: Conversation, numbers: Iterator[int]) -> None:
        self.talk = talk
        self.peer: Peer = talk.client()
        self.leases: list[int] = []
        self._numbers = numbers
        self._next = self._end = self._objects = 0

    def put(self, size_bytes: int = SIZE_BYTES) -> None:
        """Put an object into the lease, or into a new one; tell of every eighth."""
        if self._next + size_bytes > self._end or not self._objects:
            lease = self.peer.ask(AskLease(size_bytes), Leased)
            assert lease.size_bytes >= size_bytes, "there is no lease to be had"
            self.leases.append(lease.size_bytes)
            self._next, self._end = lease.offset, lease.offset + lease.size_bytes
            self._objects = lease.objects
        number = next(self._numbers)
        self.peer.write_silently(Publish(name(number), self._next, size_bytes, 0, 0))
        self._next += align_up(size_bytes, 64)
        self._objects -= 1
        if not number % 8:
            self.peer.tell(Post())
            self.talk.turn()


class Full:
    """A full store, the oldest objects of which are small, and a watcher that counts what goes."""

    def __init__(self, n_small: int = 0) -> None:
        self.talk = Conversation(CAPACITY)
        self.numbers = count()
        filler = self.talk.client()
        for _ in range(n_small):
            filler.put(name(next(self.numbers)), 64)
        while (free := self.talk.store._room.free_bytes) >= 64:
            filler.put(name(next(self.numbers)), min(free, SIZE_BYTES))
        self.watcher = self.talk.subscriber()

    @property
    def gone(self) -> list[bytes]:
        """The ids of the objects that have gone since then, in this order."""
        return [object_id for object_id, size, _ in self.watcher.notifications if size < 0]

    @property
    def free_bytes(self) -> int:
        """How much is free."""
        return self.talk.store._room.free_bytes

    def new_putter(self) -> Putter:
        """Return another client."""
        return Putter(self.talk, self.numbers)


@pytest.fixture
def full() -> Full:
    """Return a full store."""
    return Full()


def test_puts_into_a_full_store_seldom_wait(full: Full) -> None:
    """Of 400 puts 50 take a round trip at most, and no more goes than comes, but for two leases."""
    putter = full.new_putter()
    for _ in range(400):
        putter.put()
    assert len(putter.leases) <= 50
    most = 400 + 2 * LIMIT_BYTES // EXTENT_BYTES
    assert len(full.gone) <= most
    assert full.gone == [name(number) for number in range(len(full.gone))]
    full.talk.store.check()


def test_who_puts_one_object_evicts_one(full: Full) -> None:
    """The first lease is no larger than the object at hand, and nothing goes ahead of need for it."""
    full.new_putter().put()
    assert full.gone == [name(0)]
    assert full.free_bytes < 64
    full.talk.store.check()


@pytest.mark.parametrize("size_bytes", [10, 10_000, SIZE_BYTES])
def test_leases_grow_with_use(full: Full, size_bytes: int) -> None:
    """None is larger than twice all before, a 64th of the capacity, or what a few objects take."""
    putter = full.new_putter()
    used = 0
    for _ in range(1000):
        n_leases, free_before = len(putter.leases), full.free_bytes
        putter.put(size_bytes)
        if len(putter.leases) > n_leases:
            least = max(MIN_LEASE_BYTES, 4 * align_up(size_bytes, 64))
            assert putter.leases[-1] <= min(max(least, 2 * used), LIMIT_BYTES)
            # What goes ahead of need is no more than the client has used.
            assert full.free_bytes <= max(free_before, used + EXTENT_BYTES, least + EXTENT_BYTES)
            used += putter.leases[-1]
    assert putter.leases[-1] > 2 * putter.leases[0]
    full.talk.store.check()


def test_nothing_goes_ahead_of_need_twice(full: Full) -> None:
    """What was evicted for the next lease may be taken by others, and then nothing goes for them."""
    putter, other = full.new_putter(), full.talk.client()
    while full.free_bytes < LIMIT_BYTES:
        putter.put()
    n_gone = len(full.gone)
    slots = [other.create(name(next(full.numbers)), SIZE_BYTES) for _ in range(5)]
    assert len(full.gone) == n_gone
    assert len(slots) == 5
    full.talk.store.check()


def test_an_eviction_ahead_of_need_is_done_in_slices(full: Full) -> None:
    """Between two requests only some objects go for the next lease, and the reply does not wait for them."""
    putter = full.new_putter()
    for _ in range(100):
        putter.put(1000)
    n_gone, sizes = len(full.gone), []
    request_id = putter.peer.post(AskLease(1000))
    assert putter.peer.take(request_id, Leased).size_bytes
    while full.talk.store.upkeep.has_urgent_work:
        full.talk.advance()
        sizes.append(len(full.gone) - n_gone)
        n_gone = len(full.gone)
    assert max(sizes, default=0) <= 32
    assert not full.talk.store.upkeep.has_urgent_work
    full.talk.store.check()


def test_room_in_pieces_makes_small_leases(full: Full) -> None:
    """Between objects that are held there is a lease for each gap; what is free meanwhile has a limit."""
    holder = full.talk.client()
    held = range(0, 400, 2)
    for number in held:
        holder.get(name(number))
    putter = full.new_putter()
    for _ in range(150):
        putter.put()
        assert full.free_bytes <= LIMIT_BYTES + EXTENT_BYTES
    assert max(putter.leases) < 2 * EXTENT_BYTES
    assert len(full.gone) <= 150 + 2 * LIMIT_BYTES // EXTENT_BYTES
    assert not set(full.gone).intersection(map(name, held))
    full.talk.store.check()


def test_a_store_full_of_what_is_held_stays_as_it_is() -> None:
    """Where nothing may go there is no lease, and asking again and again takes nothing."""
    talk = Conversation(1 << 20)
    peer = talk.client()
    peer.create(name(0), (1 << 20) - MIN_LEASE_BYTES + 64)
    for _ in range(3):
        assert peer.ask(AskLease(2000), Leased).size_bytes == 0
    assert not talk.store.upkeep.has_urgent_work
    talk.store.check()


def test_a_large_object_after_many_small_ones() -> None:
    """Where so many would have to go for it that others would wait, it goes by a creation."""
    full = Full(n_small=2000)
    peer = full.talk.client()
    assert peer.ask(AskLease(SIZE_BYTES), Leased).size_bytes == 0
    assert full.gone == [name(number) for number in range(MIN_LEASE_BYTES // 64)]
    peer.put(name(next(full.numbers)), SIZE_BYTES)
    assert len(full.gone) == -(-SIZE_BYTES // 64)
    full.talk.store.check()
