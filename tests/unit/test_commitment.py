from __future__ import annotations

from collections.abc import Callable

import pytest

from shmplasma.allocator import Allocator
from shmplasma.commitment import COMMIT_STEP, FLOOR_BYTES, Commitment
from shmplasma.errors import CommitError
from shmplasma.layout import GRANULE_BYTES, HeaderWord, Layout
from tests.conversation import RecordedMemory, new_segment

G = GRANULE_BYTES
MIB = 1 << 20


class Region:
    """A data region with its allocator, and what is committed of it."""

    def __init__(
        self, capacity: int, floor_bytes: int = FLOOR_BYTES, page_bytes: int = 4096
    ) -> None:
        self.layout = Layout.plan(capacity, page_bytes)
        self.words, _ = new_segment(self.layout)
        self.layout.write(self.words, bytes(16))
        self.data = self.layout.data
        self.memory = RecordedMemory()
        self.floor_bytes = floor_bytes
        self.begin()

    def begin(self) -> None:
        """Have a store begin to work here."""
        self.allocator = Allocator(self.data, self.data + self.layout.data_bytes)
        self.commitment = Commitment(
            self.layout, self.words, self.allocator, self.memory, self.floor_bytes
        )

    def take(self, size_bytes: int) -> int:
        """Hand out an extent, which is committed."""
        offset = self.allocator.allocate(size_bytes)
        assert offset is not None
        self.commitment.hand_out(offset, size_bytes)
        while not self.commitment.step(offset, size_bytes):
            pass
        assert self.memory.has(offset, size_bytes)
        return offset

    def free(self, offset: int, size_bytes: int) -> None:
        """Give an extent back."""
        self.allocator.free(offset, size_bytes)
        self.commitment.freed()

    def sweep(self, *, all_of_it: bool = True) -> int:
        """Give memory back, and return how much."""
        given_back = sum(self.commitment.sweep(all_of_it=all_of_it))
        self.commitment.check()
        return given_back

    def go_ahead(self) -> None:
        """Commit ahead of need until that is enough."""
        while not self.commitment.is_ahead:
            self.commitment.step_ahead()
        self.commitment.check()

    def is_behind(self) -> bool:
        """Tell whether an idle store would look for something to commit."""
        return not self.commitment.is_ahead

    @property
    def committed(self) -> int:
        """Bytes of the data region behind which there is memory."""
        return sum(4096 for page in self.memory.pages if page * 4096 >= self.data)


# -- committing ------------------------------------------------------------------------------------


def test_memory_is_committed_in_steps_up_to_the_end() -> None:
    """An extent is ready when all of its steps are committed, and nothing beyond the region ever is."""
    region = Region(2 * COMMIT_STEP + 1000)
    commitment, data = region.commitment, region.data
    assert not commitment.is_ready(data, 1)
    assert not commitment.step(data, COMMIT_STEP + 1)
    assert commitment.is_ready(data, COMMIT_STEP)
    assert commitment.step(data, COMMIT_STEP + 1)
    assert commitment.step(data + 100, COMMIT_STEP)
    assert commitment.step(data + 2 * COMMIT_STEP, 1000)
    assert region.memory.commits == [
        (data, COMMIT_STEP),
        (data + COMMIT_STEP, COMMIT_STEP),
        (data + 2 * COMMIT_STEP, 1024),
    ]
    assert commitment.committed_bytes == 2 * COMMIT_STEP + 1024
    commitment.check()


def test_a_refused_commit_leaves_the_extent_unready() -> None:
    """What could not be committed is not ready, and can be asked for again."""
    region = Region(100_000)
    region.memory.refuse_from = region.data
    with pytest.raises(CommitError):
        region.commitment.step(region.data, 1)
    assert not region.commitment.is_ready(region.data, 1)
    region.memory.refuse_from = None
    assert region.commitment.step(region.data, 1)
    region.commitment.check()


def test_what_lies_beyond_the_extent_is_not_insisted_on() -> None:
    """Where there is memory for the extent, and not for what comes after it, the extent is ready."""
    region = Region(100 * G)
    region.memory.refuse_from = region.data + 2 * G
    assert region.commitment.step(region.data + 100, G)
    assert region.memory.commits == [(region.data, 2 * G)]
    with pytest.raises(CommitError, match=f"cannot give {G} more bytes"):
        region.commitment.step(region.data + 2 * G, 64)
    region.commitment.check()


def test_idle_memory_is_bounded() -> None:
    """While nothing is to do some of the free room is committed, the lowest, and no more."""
    region = Region(1 << 30)
    region.go_ahead()
    assert region.committed == region.commitment.committed_bytes == 64 * MIB
    region.take(10 * MIB)
    assert not region.is_behind(), "a little is no reason to look again"
    region.take(30 * MIB)
    assert region.is_behind()
    region.go_ahead()
    assert region.committed == (64 + 40) * MIB
    n_commits = len(region.memory.commits)
    region.free(region.data, 10 * MIB)
    region.take(5 * MIB)
    region.go_ahead()
    assert len(region.memory.commits) == n_commits


def test_less_is_committed_ahead_where_less_may_stay() -> None:
    """What a sweep would give back at once is not committed ahead of need."""
    region = Region(1 << 30, floor_bytes=8 * MIB)
    region.go_ahead()
    assert region.committed == 8 * MIB
    assert region.sweep() == 0
    none = Region(1 << 30, floor_bytes=0)
    none.go_ahead()
    assert none.committed == 0


def test_everything_can_be_committed() -> None:
    """All of the region is committed step by step, to the last byte."""
    region = Region(10 * MIB + 100)
    done = list(region.commitment.commit_all())
    assert done == sorted(done)
    assert done[-1] == region.commitment.committed_bytes == 10 * MIB + 128
    assert region.memory.has(region.data, 10 * MIB + 128)
    assert len(region.memory.commits) == 3


# -- giving back -----------------------------------------------------------------------------------


def test_what_is_not_used_is_given_back() -> None:
    """A sweep takes the memory of all free granules, and of none that is used in part."""
    region = Region(100 * G, floor_bytes=0)
    first = region.take(10 * G + 64)
    second = region.take(20 * G)
    third = region.take(64)
    region.free(second, 20 * G)
    before = region.committed
    assert region.sweep() == before - region.committed
    # The granule in which the first ends, and that of the third.
    assert region.committed == region.commitment.committed_bytes == 12 * G
    assert region.memory.has(first, 10 * G + 64)
    assert region.memory.has(third, 64)
    region.free(first, 10 * G + 64)
    region.free(third, 64)
    region.sweep()
    assert region.committed == 0


def test_an_extent_over_a_hole_is_committed_again() -> None:
    """Nothing is handed out over a hole; what is missing is committed, and only that."""
    region = Region(100 * G, floor_bytes=0)
    first = region.take(100 * G)
    region.free(first, 100 * G)
    region.sweep()
    kept = region.take(3 * G)
    region.memory.commits.clear()
    assert region.allocator.allocate(G) == kept + 3 * G
    region.free(kept, G)
    assert region.take(G) == kept
    assert region.memory.commits == []
    region.commitment.check()


def test_the_floor_is_the_lowest_free_room() -> None:
    """As much free room stays committed as the operator says, where the next objects will lie."""
    region = Region(100 * G, floor_bytes=10 * G)
    first = region.take(90 * G)
    last = region.take(G)
    region.free(first, 90 * G)
    region.sweep()
    assert region.committed == 11 * G
    assert region.memory.has(region.data, 10 * G)
    assert region.memory.has(last, G)
    n_commits = len(region.memory.commits)
    region.go_ahead()
    assert len(region.memory.commits) == n_commits
    assert region.sweep() == 0


def test_a_busy_store_keeps_its_memory() -> None:
    """What was handed out since the last sweep is passed over, and goes with the next one if it stays free."""
    region = Region(100 * G, floor_bytes=0)
    for _ in range(5):
        offset = region.take(50 * G)
        region.free(offset, 50 * G)
        assert region.sweep(all_of_it=False) % COMMIT_STEP < COMMIT_STEP
        assert region.memory.has(offset, 50 * G)
        assert region.commitment.is_stirred
    n_commits = len(region.memory.commits)
    assert region.sweep(all_of_it=False) == 50 * G
    assert region.committed == 0
    assert not region.commitment.is_stirred
    assert len(region.memory.commits) == n_commits


def test_memory_goes_by_steps_between_which_anything_may_happen() -> None:
    """What is handed out while a sweep is under way is not taken."""
    region = Region(400 * G, floor_bytes=0)
    offset = region.take(400 * G)
    region.free(offset, 400 * G)
    steps = region.commitment.sweep(all_of_it=True)
    assert next(steps) == 16 * MIB
    low, high = region.take(64), region.take(300 * G)
    region.commitment.check()
    while next(steps, None) is not None:
        assert region.memory.has(low, 64)
        assert region.memory.has(high, 300 * G)
    assert region.committed == 301 * G


def test_a_short_last_granule_is_left_alone() -> None:
    """A granule that is cut off by the region's end keeps its memory."""
    region = Region(4 * G + 100, floor_bytes=0)
    offset = region.take(4 * G + 100)
    region.free(offset, 4 * G + 100)
    assert region.sweep() == 4 * G
    assert region.commitment.committed_bytes == 128


def test_huge_pages_are_granules() -> None:
    """Where pages are larger than granules they are committed and given back as a whole."""
    page = 2 * MIB
    region = Region(8 * page, floor_bytes=page, page_bytes=page)
    offset = region.take(3 * page + 64)
    region.free(offset, 3 * page + 64)
    region.sweep()
    assert region.committed == page
    assert all(size % page == 0 for _, size in region.memory.punches)


def test_extents_that_cover_no_granule_are_looked_at_by_and_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many there are, each step of a sweep, or of what is committed ahead, looks at some of them."""
    region = Region(1 << 30, floor_bytes=8 * MIB)
    size = G + 64
    free = list(range(region.data + 128, region.data + (1 << 30) - size, 2 * size))[:-1]
    last = (region.data + (1 << 30) - 4 * G, 4 * G)
    region.allocator.refill([*((offset, size) for offset in free), last])
    region.commitment.step(*last)
    looks: list[int] = []
    next_free = Allocator.next_free

    def counted(self: Allocator, position: int, size_bytes: int) -> tuple[int, int] | None:
        looks[-1] += 1
        return next_free(self, position, size_bytes)

    monkeypatch.setattr(Allocator, "next_free", counted)
    steps = region.commitment.sweep(all_of_it=True)
    looks.append(0)
    while next(steps, None) is not None:
        looks.append(0)
    assert sum(looks) > len(free) > 1500
    assert max(looks) <= 128
    assert region.memory.has(*last), "it is the lowest free room, hence stays"
    while region.is_behind():
        looks.append(0)
        region.commitment.step_ahead()
    assert max(looks) <= 1024
    region.commitment.check()


def test_a_machine_that_keeps_everything_is_asked_once() -> None:
    """Where no holes can be made nothing is given back, and nothing is lost."""
    region = Region(100 * G, floor_bytes=0)
    region.memory.keeps_all = True
    offset = region.take(90 * G)
    region.free(offset, 90 * G)
    assert region.sweep() == region.sweep() == 0
    assert region.take(90 * G) == offset
    region.commitment.check()


def test_clients_are_told_before_there_is_a_hole() -> None:
    """The header's number is another one when memory goes, so that clients map their pages anew."""
    region = Region(100 * G, floor_bytes=0)
    numbers = [region.words[HeaderWord.TRIMS]]
    punch = region.memory.punch

    def watched(offset: int, size_bytes: int) -> bool:
        numbers.append(region.words[HeaderWord.TRIMS])
        return punch(offset, size_bytes)

    region.memory.punch = watched  # type: ignore[method-assign] # looks at what is there at that moment
    offset = region.take(90 * G)
    region.free(offset, 90 * G)
    region.sweep()
    assert len(numbers) > 2
    assert numbers == sorted(set(numbers))


# -- recovering ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", [False, True])
def test_a_successor_takes_nothing_for_ready(damaged: bool) -> None:
    """It commits what it hands out, and gives back what its predecessor had committed."""
    region = Region(100 * G, floor_bytes=0)
    region.take(50 * G)
    if damaged:
        region.words[HeaderWord.WATERMARK] ^= 1
    region.begin()
    region.commitment.recover()
    assert not region.commitment.is_ready(region.data, 1)
    region.take(64)
    region.commitment.check()
    region.sweep()
    assert region.committed == region.commitment.committed_bytes == G


def test_a_death_between_a_commit_and_its_note_hides_nothing() -> None:
    """What is to be committed is written down first, so that a successor gives it back."""
    region = Region(100 * G, floor_bytes=0)
    seen: list[int] = []

    def watched(offset: int, size_bytes: int) -> None:
        seen.append(region.words[HeaderWord.WATERMARK] - (offset + size_bytes - region.data))

    region.memory.commit = watched  # type: ignore[method-assign] # looks at what is there at that moment
    region.commitment.step(region.data, 60 * G)
    assert seen == [0]


def test_what_a_refused_commit_has_left_is_given_back() -> None:
    """Some of its pages may be there."""
    region = Region(100 * G, floor_bytes=0)
    region.memory.refuse_from = region.data
    with pytest.raises(CommitError):
        region.commitment.step(region.data, G)
    left = region.commitment.committed_bytes
    assert left >= G
    assert sum(region.commitment.sweep(all_of_it=True)) == left


# -- proof -----------------------------------------------------------------------------------------


DAMAGES: dict[str, Callable[[Commitment], object]] = {
    "without memory": lambda c: c._backed.__setitem__(0, 0),
    "a successor would not know": lambda c: setattr(c, "_ever", 0),
}


@pytest.mark.parametrize("complaint", DAMAGES)
def test_the_proof_fails_for_a_damaged_one(complaint: str) -> None:
    """Each clause of `check` notices what it is there for."""
    region = Region(100 * G)
    region.take(64)
    region.commitment.check()
    DAMAGES[complaint](region.commitment)
    with pytest.raises(AssertionError, match=complaint):
        region.commitment.check()
