from __future__ import annotations

import random
from collections.abc import Container
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmplasma.eviction import PAUSE, Sieve


class PaperSieve:
    """The algorithm as the NSDI '24 paper states it, over a plain list, oldest first; plus pins."""

    def __init__(self) -> None:
        self.queue: list[int] = []
        self.visited: set[int] = set()
        self.hand: int | None = None

    def insert(self, key: int) -> None:
        """Put a new key at the end; it is not visited."""
        self.queue.append(key)
        self.visited.discard(key)

    def newer(self, key: int) -> int | None:
        """Return the key that was inserted next after this one."""
        following = self.queue.index(key) + 1
        return self.queue[following] if following < len(self.queue) else None

    def remove(self, key: int) -> None:
        """Take a key out, moving the hand on if it is there."""
        if self.hand == key:
            self.hand = self.newer(key)
        self.queue.remove(key)

    def evict(self, pinned: Container[int] = ()) -> int | None:
        """Remove and return the first key from the hand on that is neither visited nor pinned."""
        for _ in range(2 * len(self.queue)):
            key = self.queue[0] if self.hand is None else self.hand
            self.hand = self.newer(key)
            if key in self.visited:
                self.visited.discard(key)
            elif key not in pinned:
                self.queue.remove(key)
                return key
        return None


def filled(n_entries: int, read: tuple[int, ...] = ()) -> tuple[Sieve, memoryview]:
    """Return a queue of so many entries, of which some were read, and its visited bytes."""
    visited = memoryview(bytearray(n_entries))
    sieve = Sieve(visited)
    for index in range(n_entries):
        sieve.insert(index)
    for index in read:
        visited[index] = 1
    return sieve, visited


def evict(sieve: Sieve, pinned: Container[int] = ()) -> int | None:
    """Remove and return the next victim that is not pinned."""
    for victim in sieve.sweep():
        if victim not in pinned:
            sieve.remove(victim)
            return victim
    return None


def test_a_queue_keeps_the_order_of_insertion() -> None:
    """Iteration goes from the oldest to the newest, whatever the indices."""
    sieve = Sieve(memoryview(bytearray(10)))
    for index in (7, 0, 9, 3):
        sieve.insert(index)
    assert list(sieve) == [7, 0, 9, 3]
    assert len(sieve) == 4
    assert [index for index in range(-2, 12) if index in sieve] == [0, 3, 7, 9]
    assert sieve.queued(range(-2, 12)) == [0, 3, 7, 9]
    sieve.check()


def test_an_entry_can_return_after_its_removal() -> None:
    """A removed entry is not queued, and goes to the new end when it is inserted again."""
    sieve, _ = filled(3)
    sieve.remove(1)
    assert list(sieve) == [0, 2]
    assert 1 not in sieve
    sieve.insert(1)
    assert list(sieve) == [0, 2, 1]
    sieve.check()


def test_an_inserted_entry_is_not_visited() -> None:
    """What an earlier object left in the entry's visited byte does not protect the next."""
    visited = memoryview(bytearray(b"\xff\xff"))
    sieve = Sieve(visited)
    sieve.insert(1)
    assert bytes(visited) == b"\xff\x00"


@pytest.mark.parametrize("index", [-1, 4, 1 << 32])
def test_an_entry_that_cannot_be_is_refused(index: int) -> None:
    """Only entries with a visited byte can be queued."""
    sieve = Sieve(memoryview(bytearray(4)))
    with pytest.raises(ValueError, match=f"no entry {index} "):
        sieve.insert(index)
    assert index not in sieve
    sieve.check()


def test_an_entry_is_queued_once() -> None:
    """Inserting a queued entry is an error and changes nothing, its visited byte included."""
    sieve, visited = filled(2, read=(0,))
    with pytest.raises(ValueError, match="entry 0 is in the queue already"):
        sieve.insert(0)
    assert list(sieve) == [0, 1]
    assert visited[0] == 1


@pytest.mark.parametrize("index", [-1, 1, 2, 9])
def test_what_is_not_queued_cannot_be_removed(index: int) -> None:
    """Removing an entry that is not in the queue is an error."""
    sieve, _ = filled(3)
    sieve.remove(1)
    sieve.remove(2)
    with pytest.raises(ValueError, match=f"entry {index} is not in the queue"):
        sieve.remove(index)
    assert list(sieve) == [0]
    sieve.check()


def test_without_reads_the_oldest_goes_first() -> None:
    """Entries that nobody reads leave in order of insertion."""
    sieve, _ = filled(4)
    assert [evict(sieve) for _ in range(4)] == [0, 1, 2, 3]
    assert list(sieve.sweep()) == []


def test_a_read_entry_survives_one_pass_of_the_hand() -> None:
    """The hand passes over a visited entry, clears its byte, and leaves it in its place."""
    sieve, visited = filled(4, read=(0, 2))
    assert evict(sieve) == 1
    assert list(visited) == [0, 0, 1, 0]
    assert evict(sieve) == 3
    assert list(sieve) == [0, 2]
    assert evict(sieve) == 0


@pytest.mark.parametrize("value", [1, 2, 0x80, 0xFF])
def test_any_value_but_zero_means_visited(value: int) -> None:
    """The bytes are written by others, who need not write 1."""
    sieve, visited = filled(2)
    visited[0] = value
    assert evict(sieve) == 1


def test_the_hand_stays_between_sweeps() -> None:
    """A new sweep begins where the last one stopped, and not with the oldest."""
    sieve, _ = filled(5, read=(0, 1))
    assert evict(sieve) == 2
    assert evict(sieve) == 3
    assert list(sieve) == [0, 1, 4]
    assert list(sieve.sweep()) == [4, 0, 1]


def test_newcomers_wait_for_the_hand_that_has_passed_the_newest() -> None:
    """A hand beyond the newest goes back to the oldest, even if entries were inserted since."""
    sieve, _ = filled(2, read=(0,))
    assert evict(sieve) == 1
    sieve.insert(1)
    assert evict(sieve) == 0


def test_the_hand_moves_on_from_an_entry_that_is_removed() -> None:
    """Removing the entry under the hand moves it to the next newer one."""
    sieve, _ = filled(5, read=(0,))
    assert evict(sieve) == 1
    sieve.remove(2)
    sieve.check()
    assert evict(sieve) == 3
    sieve.remove(4)
    sieve.check()
    assert evict(sieve) == 0


def test_a_pinned_candidate_stays_and_is_not_offered_again() -> None:
    """One that the consumer leaves is offered once; the hand moves past it."""
    sieve, _ = filled(4, read=(1,))
    offered = []
    for index in sieve.sweep():
        offered.append(index)
        if index == 2:
            sieve.remove(index)
    assert offered == [0, 2, 3, 1]
    assert list(sieve) == [0, 1, 3]
    sieve.check()


def test_an_entry_that_has_gone_and_comes_again_is_offered_again() -> None:
    """It is another object by then."""
    sieve, _ = filled(3, read=(1,))
    offered = []
    for index in sieve.sweep():
        offered.append(index)
        if offered == [0]:
            sieve.remove(0)
        elif offered == [0, 2]:
            sieve.insert(0)
    assert offered == [0, 2, 1, 0]


def test_a_sweep_ends_although_everything_is_read_all_the_time() -> None:
    """Readers who visit every entry again after each candidate cannot keep the hand going round."""
    sieve, visited = filled(50)
    offered = []
    for index in sieve.sweep():
        offered.append(index)
        visited[:] = b"\x01" * 50
    assert offered == [0, 1]


def test_a_sweep_that_has_offered_all_leaves_what_is_read_then() -> None:
    """The second round is for entries that were passed over; without any, no byte is cleared."""
    sieve, visited = filled(3)
    for index in sieve.sweep():
        visited[index] = 1
    assert list(visited) == [1, 1, 1]


def test_a_batch_can_be_removed_while_its_sweep_goes_on() -> None:
    """Candidates may be collected and removed together, and any other entry with them."""
    sieve, _ = filled(8, read=(2, 3))
    sweep = sieve.sweep()
    assert [next(sweep), next(sweep), next(sweep)] == [0, 1, 4]
    for index in (0, 1, 4, 5, 6):
        sieve.remove(index)
        sieve.check()
    assert list(sweep) == [7, 2, 3]


def test_a_sweep_pauses_when_it_has_passed_many() -> None:
    """Whatever it passes counts, and one that is dropped in a pause is gone on with by the next."""
    sieve, _ = filled(10, read=(0, 1, 2, 3, 4, 5, 7))
    assert list(islice(sieve.sweep(4), 3)) == [PAUSE, 6, PAUSE]
    assert list(islice(sieve.sweep(4), 5)) == [8, 9, 0, 1, PAUSE]


def test_a_queue_that_is_emptied_ends_its_sweep() -> None:
    """A sweep whose queue has become empty has nothing more to offer."""
    sieve, _ = filled(3)
    sweep = sieve.sweep()
    assert next(sweep) == 0
    for index in range(3):
        sieve.remove(index)
    assert list(sweep) == []


@pytest.mark.parametrize("capacity", [1, 10, 100])
def test_a_cache_evicts_what_the_paper_evicts(capacity: int) -> None:
    """On a skewed trace a cache has the same misses and victims as the paper's algorithm."""
    rng = random.Random(capacity)
    visited = memoryview(bytearray(1000))
    sieve, paper = Sieve(visited), PaperSieve()
    for _ in range(5000):
        key = min(int(rng.paretovariate(0.7)), 1000) - 1
        assert (key in sieve) == (key in paper.queue) == (sieve.queued([key]) == [key])
        if key in sieve:
            visited[key] = 1
            paper.visited.add(key)
            continue
        if len(sieve) == capacity:
            assert evict(sieve) == paper.evict()
        sieve.insert(key)
        paper.insert(key)
    assert list(sieve) == paper.queue
    sieve.check()


KEYS = 12


@given(
    st.lists(
        st.tuples(st.sampled_from(["toggle", "read", "evict"]), st.integers(0, KEYS - 1)),
        max_size=60,
    ),
    st.frozensets(st.integers(0, KEYS - 1)),
)
def test_any_history_is_that_of_the_paper(
    history: list[tuple[str, int]], pinned: frozenset[int]
) -> None:
    """Insertions, removals, reads and evictions past pinned entries do what a plain list does."""
    visited = memoryview(bytearray(KEYS))
    sieve, paper = Sieve(visited), PaperSieve()
    for action, key in history:
        if action == "evict":
            assert evict(sieve, pinned) == paper.evict(pinned)
        elif action == "read":
            visited[key] = 1
            paper.visited.add(key)
        elif key in sieve:
            sieve.remove(key)
            paper.remove(key)
        else:
            sieve.insert(key)
            paper.insert(key)
        sieve.check()
        assert list(sieve) == paper.queue
        assert len(sieve) == len(paper.queue)
        assert {key for key in range(KEYS) if visited[key]} == paper.visited


@given(
    st.lists(st.booleans(), min_size=1, max_size=30),
    st.integers(0, 30),
    st.sets(st.integers(0, 29)),
)
def test_a_sweep_offers_each_entry_once(read: list[bool], hand: int, removed: set[int]) -> None:
    """From any hand and with any visited bytes a whole sweep offers every entry exactly once."""
    sieve, visited = filled(len(read))
    for _ in zip(range(hand), sieve.sweep(), strict=False):
        """Moves the hand."""
    visited[:] = bytes(read)
    offered = []
    for index in sieve.sweep():
        offered.append(index)
        if index in removed:
            sieve.remove(index)
    assert sorted(offered) == list(range(len(read)))
    assert list(sieve) == [index for index in range(len(read)) if index not in removed]
    assert not any(visited)


def test_an_entry_costs_a_few_bytes() -> None:
    """The links of a queue take at most 12 bytes an entry."""
    sieve, _ = filled(10_000)
    links = (sieve._newer, sieve._older)
    assert sum(len(memoryview(link).cast("B")) for link in links) <= 12 * 10_000


def test_check_finds_a_broken_link() -> None:
    """The check follows the ring in both directions."""
    sieve, _ = filled(4)
    sieve._older[2] = 4
    with pytest.raises(AssertionError, match="wrong older one"):
        sieve.check()


def test_check_finds_a_hand_outside_the_queue() -> None:
    """The check knows where the hand may be."""
    sieve, _ = filled(4)
    sieve._hand = 2
    sieve.check()
    sieve._newer[1], sieve._older[3] = 3, 1
    sieve._newer[2] = sieve._older[2] = 0xFFFF_FFFF
    sieve._length = 3
    with pytest.raises(AssertionError, match="the hand"):
        sieve.check()
