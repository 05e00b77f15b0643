from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from shmplasma.compaction import Range, Search, best_run, best_window, movable_ranges

LINES = 60


def found(search: Search) -> Range | None:
    """Run a search to its end."""
    while True:
        try:
            next(search)
        except StopIteration as end:
            result: Range | None = end.value
            return result


Region = tuple[list[str], list[int], list[int], list[Range]]


@st.composite
def regions(draw: st.DrawFn) -> Region:
    """Draw a small region: what each line is (free, movable, fixed), and what a planner is told of it."""
    runs = draw(st.lists(st.tuples(st.sampled_from("fffmmmx"), st.integers(1, 9)), max_size=30))
    lines = [kind for kind, length in runs for _ in range(length)][:LINES]
    lines += ["m"] * (LINES - len(lines))
    ends, sizes, fixed = [], [], []
    start = 0
    for line in range(1, LINES + 1):
        if line == LINES or lines[line] != lines[start]:
            if lines[start] == "f":
                ends.append(line)
                sizes.append(line - start)
            elif lines[start] == "x":
                fixed.append((start, line))
            start = line
    return lines, ends, sizes, movable_ranges(0, LINES, fixed)


def is_movable(lines: Sequence[str], begin: int, stop: int) -> bool:
    """Tell whether nothing there is fixed."""
    return "x" not in lines[begin:stop]


@given(regions(), st.integers(1, LINES))
def test_the_window_has_the_most_free_room_of_all(region: Region, wanted: int) -> None:
    """No other window of this length without anything fixed has more free lines; without one there is none."""
    lines, ends, sizes, ranges = region
    window = found(best_window(ends, sizes, ranges, wanted))
    others = [
        lines[begin : begin + wanted].count("f")
        for begin in range(LINES - wanted + 1)
        if is_movable(lines, begin, begin + wanted)
    ]
    if window is None:
        assert not others
        return
    begin, stop = window
    assert stop - begin == wanted
    assert is_movable(lines, begin, stop)
    assert lines[begin:stop].count("f") == max(others)


@given(regions(), st.integers(1, LINES))
def test_the_run_has_the_least_between_its_extents(region: Region, wanted: int) -> None:
    """It begins and ends with free extents and has enough of them; no other has less to be moved."""
    lines, ends, sizes, ranges = region
    run = found(best_run(ends, sizes, ranges, wanted))
    starts = [end - size for end, size in zip(ends, sizes, strict=True)]
    others = [
        lines[begin:stop].count("m")
        for begin in starts
        for stop in ends
        if is_movable(lines, begin, stop) and lines[begin:stop].count("f") >= wanted
    ]
    if run is None:
        assert not others
        return
    begin, stop = run
    assert begin in starts
    assert stop in ends
    assert lines[begin:stop].count("f") >= wanted
    assert is_movable(lines, begin, stop)
    assert lines[begin:stop].count("m") == min(others)


@given(st.lists(st.tuples(st.integers(0, LINES), st.integers(0, 9))))
def test_ranges_are_what_is_not_fixed(fixed: list[tuple[int, int]]) -> None:
    """However what is fixed overlaps, the ranges are all of the rest, and none touches another."""
    extents = [(first, min(first + length, LINES)) for first, length in fixed]
    ranges = movable_ranges(0, LINES, extents)
    covered = {line for first, last in extents for line in range(first, last)}
    assert [line for first, last in ranges for line in range(first, last)] == [
        line for line in range(LINES) if line not in covered
    ]
    assert all(ranges[i][1] < ranges[i + 1][0] for i in range(len(ranges) - 1))


def test_a_long_search_lets_others_work() -> None:
    """A search in many extents yields now and then."""
    ends = list(range(2, 40_002, 2))
    sizes = [1] * len(ends)
    assert len(list(best_window(ends, sizes, [(0, 40_002)], 10_000))) > 4
    assert len(list(best_run(ends, sizes, [(0, 40_002)], 10_000))) > 3
