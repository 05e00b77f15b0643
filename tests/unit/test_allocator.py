from __future__ import annotations

import random

import pytest

from shmplasma.allocator import _FAN_OUT, Allocator
from shmplasma.layout import ALIGNMENT

START = 4096


def comb(n_extents: int) -> tuple[Allocator, list[tuple[int, int]]]:
    """Return an allocator with so many free lines between used ones, and the used ones."""
    allocator = Allocator(START, START + (2 * n_extents + 1) * ALIGNMENT)
    used = [(START + i * ALIGNMENT, ALIGNMENT) for i in range(2 * n_extents + 1)]
    for _ in used:
        allocator.allocate(ALIGNMENT)
    for extent in used[1::2]:
        allocator.free(*extent)
    return allocator, used[::2]


def state(allocator: Allocator) -> tuple[list[tuple[int, int]], int]:
    """Return all that an operation which failed must not have changed."""
    return list(allocator.free_extents()), allocator.free_bytes


def test_a_new_region_is_one_free_extent() -> None:
    """All of a new region can be had in one piece, and it is counted as free."""
    allocator = Allocator(START, START + 640)
    assert list(allocator.free_extents()) == [(START, 640)]
    assert allocator.free_bytes == 640
    assert allocator.largest_free_bytes == 640
    assert allocator.allocate(640) == START
    assert allocator.free_bytes == 0
    assert allocator.largest_free_bytes == 0
    allocator.check([(START, 640)])


def test_an_empty_region_gives_nothing() -> None:
    """A region of no bytes is lawful and always full."""
    allocator = Allocator(START, START)
    assert allocator.allocate(1) is None
    allocator.check([])


@pytest.mark.parametrize(("start", "end"), [(1, 64), (0, 65), (128, 64), (-64, 64)])
def test_an_impossible_region_is_refused(start: int, end: int) -> None:
    """A region that is not aligned, or runs backwards, is an error."""
    with pytest.raises(ValueError, match="is no region"):
        Allocator(start, end)


def test_sizes_are_rounded_up_to_whole_lines() -> None:
    """One byte takes a line, one byte more than a line takes two, and free rounds likewise."""
    allocator = Allocator(0, 1024)
    assert [allocator.allocate(1), allocator.allocate(65), allocator.allocate(64)] == [0, 64, 192]
    assert allocator.free_bytes == 1024 - 256
    allocator.free(64, 65)
    assert list(allocator.free_extents()) == [(64, 128), (256, 768)]


def test_first_fit_takes_the_lowest_extent_and_not_the_best() -> None:
    """Of several extents that fit the lowest is taken, from its front."""
    allocator = Allocator(0, 4096)
    allocator.reserve(192, 64)
    allocator.reserve(320, 64)
    allocator.reserve(512, 64)
    assert list(allocator.free_extents()) == [(0, 192), (256, 64), (384, 128), (576, 3520)]
    assert allocator.allocate(64) == 0
    assert allocator.allocate(192) == 576
    assert allocator.allocate(128) == 64
    assert allocator.allocate(128) == 384
    assert allocator.allocate(64) == 256


def test_a_deep_tree_finds_what_a_walk_through_the_free_extents_finds() -> None:
    """Among thousands of fragments each request gets the first one that is large enough."""
    rng = random.Random(5)
    allocator = Allocator(START, START + (1 << 23))
    sizes = [rng.randrange(1, 12) * ALIGNMENT for _ in range(6 * _FAN_OUT**2)]
    used = [(allocator.allocate(size) or 0, size) for size in sizes]
    for extent in used[1::2]:
        allocator.free(*extent)
    used = used[::2]
    for _ in range(500):
        allocator.free(*used.pop(rng.randrange(len(used))))
        size = rng.randrange(1, 40) * ALIGNMENT
        first = next(offset for offset, free in allocator.free_extents() if free >= size)
        assert allocator.allocate(size) == first
        used.append((first, size))
    assert allocator._root.children[0].children
    allocator.check(used)


def test_nothing_is_given_when_no_single_extent_fits() -> None:
    """Free bytes in pieces do not serve a request that is larger than each of them."""
    allocator, used = comb(10)
    assert allocator.free_bytes == 10 * ALIGNMENT
    assert allocator.allocate(ALIGNMENT + 1) is None
    allocator.check(used)


@pytest.mark.parametrize("n_extents", [3, _FAN_OUT, 3 * _FAN_OUT, 4 * _FAN_OUT**2])
def test_used_neighbours_decide_what_coalesces(n_extents: int) -> None:
    """Each used line between two free ones, freed in any order, joins them, across all nodes."""
    allocator, used = comb(n_extents)
    allocator.check(used)
    random.Random(n_extents).shuffle(used)
    for n_freed, extent in enumerate(list(used), start=1):
        allocator.free(*extent)
        if n_freed % max(1, n_extents // 8) == 0:
            allocator.check(used[n_freed:])
    whole = (2 * n_extents + 1) * ALIGNMENT
    assert list(allocator.free_extents()) == [(START, whole)]
    allocator.check([])


@pytest.mark.parametrize("backwards", [False, True])
def test_the_tree_shrinks_as_free_extents_are_used_up(backwards: bool) -> None:
    """Taking every free extent of a large tree, from either end, leaves a lawful tree each time."""
    allocator, used = comb(20 * _FAN_OUT)
    extents = list(allocator.free_extents())
    for count, extent in enumerate(reversed(extents) if backwards else extents):
        allocator.reserve(*extent)
        used.append(extent)
        if count % 50 == 0:
            allocator.check(used)
    assert allocator.allocate(1) is None
    assert list(allocator.free_extents()) == []
    allocator.check(used)


@pytest.mark.parametrize(
    ("offset", "size"), [(1024, 64), (1024, 1024), (1984, 64), (1088, 128), (1984, 63)]
)
def test_reserve_takes_exactly_the_extent(offset: int, size: int) -> None:
    """What is reserved at the front, at the back or amid a free extent is used, and no more is."""
    allocator = Allocator(1024, 2048)
    allocator.reserve(offset, size)
    rounded = -(-size // ALIGNMENT) * ALIGNMENT
    rest = [(1024, offset - 1024), (offset + rounded, 2048 - offset - rounded)]
    assert list(allocator.free_extents()) == [extent for extent in rest if extent[1]]
    allocator.check([(offset, size)])


def test_reserve_rebuilds_what_was_there() -> None:
    """Reserving each used extent, in any order, makes a fresh allocator like the old one."""
    rng = random.Random(7)
    old = Allocator(START, START + (1 << 22))
    used: list[tuple[int, int]] = []
    for _ in range(3000):
        if used and rng.random() < 0.4:
            old.free(*used.pop(rng.randrange(len(used))))
        size = rng.randrange(1, 2000)
        offset = old.allocate(size)
        if offset is not None:
            used.append((offset, size))
    rng.shuffle(used)
    new = Allocator(START, START + (1 << 22))
    for extent in used:
        new.reserve(*extent)
    assert state(new) == state(old)
    new.check(used)


@pytest.mark.parametrize("size", [0, -1, -64])
def test_an_extent_without_size_is_refused(size: int) -> None:
    """No operation takes a size below 1."""
    allocator = Allocator(0, 1024)
    with pytest.raises(ValueError, match="at least 1 byte"):
        allocator.allocate(size)
    with pytest.raises(ValueError, match="at least 1 byte"):
        allocator.free(0, size)
    with pytest.raises(ValueError, match="at least 1 byte"):
        allocator.reserve(0, size)
    allocator.check([])


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [
        (START - 64, 64, "not in the region"),
        (START + 960, 65, "not in the region"),
        (START + 1024, 64, "not in the region"),
        (START, 1 << 63, "not in the region"),
        (-64, 64, "not in the region"),
        (START + 1, 64, "not a multiple of 64"),
    ],
)
def test_an_extent_that_cannot_be_is_refused(offset: int, size: int, message: str) -> None:
    """What is misaligned or reaches beyond the region is neither freed nor reserved."""
    used = Allocator(START, START + 1024)
    used.allocate(1024)
    with pytest.raises(ValueError, match=message):
        used.free(offset, size)
    used.check([(START, 1024)])
    free = Allocator(START, START + 1024)
    with pytest.raises(ValueError, match=message):
        free.reserve(offset, size)
    free.check([])


@pytest.mark.parametrize("n_extents", [1, 2 * _FAN_OUT])
def test_a_double_free_is_refused_and_changes_nothing(n_extents: int) -> None:
    """An extent that is free, or overlaps a free one at either side, cannot be freed."""
    allocator, used = comb(n_extents)
    before = state(allocator)
    for offset, size in list(allocator.free_extents()):
        for wrong in [(offset, size), (offset - 64, 128), (offset, 128), (offset - 64, 192)]:
            with pytest.raises(ValueError, match="free already"):
                allocator.free(*wrong)
    assert state(allocator) == before
    allocator.check(used)


@pytest.mark.parametrize("n_extents", [1, 2 * _FAN_OUT])
def test_reserving_what_is_used_is_refused_and_changes_nothing(n_extents: int) -> None:
    """An extent that is used, or overlaps a used one at either side, cannot be reserved."""
    allocator, used = comb(n_extents)
    before = state(allocator)
    for offset, size in used:
        with pytest.raises(ValueError, match="in use"):
            allocator.reserve(offset, size)
    for offset, size in list(allocator.free_extents()):
        for wrong in [(offset - 64, 128), (offset, size + 1), (offset - 64, 192)]:
            with pytest.raises(ValueError, match="in use"):
                allocator.reserve(*wrong)
    assert state(allocator) == before
    allocator.check(used)


@pytest.mark.parametrize(
    "used",
    [
        pytest.param([], id="an extent is missing"),
        pytest.param([(0, 64)], id="an extent is too short"),
        pytest.param([(0, 192)], id="an extent is too long"),
        pytest.param([(0, 128), (64, 64)], id="extents overlap"),
        pytest.param([(0, 128), (1024, 64)], id="an extent is outside"),
        pytest.param([(0, 128), (128, 0)], id="an extent is empty"),
    ],
)
def test_check_finds_wrong_accounts(used: list[tuple[int, int]]) -> None:
    """The check fails for each list of used extents that does not fill the gaps exactly."""
    allocator = Allocator(0, 1024)
    allocator.allocate(128)
    with pytest.raises(AssertionError):
        allocator.check(used)


def test_check_finds_a_wrong_summary() -> None:
    """The check compares what inner nodes say with what lies below them."""
    allocator, used = comb(2 * _FAN_OUT)
    allocator._root.sizes[0] += 1
    with pytest.raises(AssertionError, match="an inner size is not that of its child"):
        allocator.check(used)


def test_check_finds_free_extents_that_touch() -> None:
    """The check fails when two free extents are neighbours and were not coalesced."""
    allocator = Allocator(0, 1024)
    allocator._root.ends.insert(0, 4)
    allocator._root.sizes[:1] = [4, 12]
    with pytest.raises(AssertionError, match="two free extents meet"):
        allocator.check([])


@pytest.mark.parametrize("n_extents", [0, 1, _FAN_OUT - 1, _FAN_OUT, _FAN_OUT + 1, 3 * _FAN_OUT**2])
def test_a_refilled_region_is_as_one_that_has_come_to_it(n_extents: int) -> None:
    """Free extents that are given all at once are those of an allocator that took what lies between them."""
    allocator, used = comb(n_extents)
    refilled = Allocator(START, START + (2 * n_extents + 1) * ALIGNMENT)
    refilled.refill(allocator.free_extents())
    assert state(refilled) == state(allocator)
    refilled.check(used)
    for extent in used:
        refilled.free(*extent)
    refilled.check([])
