"""How many threads copy: what is measured decides, and what has changed is noticed."""

from __future__ import annotations

import pytest

from shmplasma.pace import MEASURED_BYTES, Pace

_SIZE = 64 << 20


def _copies(pace: Pace, costs: dict[int, int], times: int, size: int = _SIZE) -> list[int]:
    """Copy so often, at these nanoseconds for each number of threads; return who copied."""
    chosen = []
    for _ in range(times):
        threads = pace.threads(size, 2)
        pace.took(size, threads, costs[threads])
        chosen.append(threads)
    return chosen


@pytest.mark.parametrize(("one", "two", "better"), [(7, 9, 1), (9, 7, 2), (8, 9, 2)])
def test_both_ways_are_tried_and_the_faster_one_is_taken(one: int, two: int, better: int) -> None:
    """Of the first copies one tries the other way, the rest know; where one thread is about as good, several copy."""
    chosen = _copies(Pace(), {1: one * 10**6, 2: two * 10**6}, 16)
    assert chosen[:7] == [2, 2, 2, 2, 2, 2, 1]
    assert set(chosen[7:]) == {better}


@pytest.mark.parametrize("slow", range(7))
def test_a_slow_copy_is_made_good(slow: int) -> None:
    """One of the first decides nothing unless it is the only one of its kind, and that is tried again."""
    pace = Pace()
    for number in range(7):
        threads = pace.threads(_SIZE, 2)
        pace.took(_SIZE, threads, 100 if number == slow else {1: 7, 2: 9}[threads])
    assert pace.threads(_SIZE, 2) == (2 if slow == 6 else 1)
    assert _copies(pace, {1: 7, 2: 9}, 200)[-1] == 1


def test_the_slower_way_is_tried_again() -> None:
    """What was slower may have become faster."""
    pace = Pace()
    _copies(pace, {1: 7, 2: 9}, 16)
    assert _copies(pace, {1: 7, 2: 9}, 16) == [2] + 15 * [1]
    # Now two are much faster: that is noticed at the next trial, and kept to.
    assert _copies(pace, {1: 7, 2: 1}, 16)[1:] == 15 * [2]


def test_one_thread_that_is_far_slower_is_tried_seldom() -> None:
    """It costs as much as two copies; once several are about as slow, it is tried as often as ever."""
    pace = Pace()
    costs = {1: 20, 2: 10}
    assert _copies(pace, costs, 8)[-2:] == [1, 2]
    assert _copies(pace, costs, 256).count(1) == 2
    costs[2] = 19
    assert _copies(pace, costs, 64)[-48:].count(1) == 3


def test_the_chosen_way_that_becomes_slow_is_left() -> None:
    """The chosen way is measured at each copy."""
    pace = Pace()
    assert _copies(pace, {1: 7, 2: 9}, 10)[-1] == 1
    assert _copies(pace, {1: 70, 2: 9}, 10)[-1] == 2


def test_copies_that_failed_decide_nothing() -> None:
    """Of them nobody said how long they took."""
    pace = Pace()
    assert [pace.threads(_SIZE, 2) for _ in range(8)] == 8 * [2]
    pace.took(_SIZE, 2, 9)
    assert pace.threads(_SIZE, 2) == 1


def test_sizes_are_told_apart() -> None:
    """What holds for one size need not hold for another."""
    pace = Pace()
    assert _copies(pace, {1: 7, 2: 9}, 10)[-1] == 1
    assert _copies(pace, {1: 9, 2: 7}, 10, _SIZE * 8)[-1] == 2
    assert _copies(pace, {1: 7, 2: 9}, 1)[-1] == 1


def test_nothing_to_choose() -> None:
    """One thread is one thread, and small copies are not measured."""
    pace = Pace()
    assert [pace.threads(_SIZE, 1) for _ in range(40)] == 40 * [1]
    assert [pace.threads(MEASURED_BYTES - 1, 4) for _ in range(40)] == 40 * [4]
