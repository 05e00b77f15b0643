from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from shmplasma.allocator import _FAN_OUT, Allocator
from shmplasma.layout import ALIGNMENT

START = 64 * ALIGNMENT
LINES = 8 * _FAN_OUT
"""Enough for a tree of several levels when every second line is free."""


class NaiveFirstFit:
    """A region as one flag a line, searched from its start."""

    def __init__(self) -> None:
        self.is_used = [False] * LINES

    def fits(self, line: int, n_lines: int) -> bool:
        """Tell whether these lines are all within the region and free."""
        return (
            line >= 0 and line + n_lines <= LINES and not any(self.is_used[line : line + n_lines])
        )

    def find(self, n_lines: int) -> int | None:
        """Return the lowest place for so many lines."""
        return next((line for line, n_free in self.free_extents() if n_free >= n_lines), None)

    def mark(self, line: int, n_lines: int, is_used: bool) -> None:
        """Take or give back some lines."""
        self.is_used[line : line + n_lines] = [is_used] * n_lines

    def free_extents(self) -> list[tuple[int, int]]:
        """Return first line and number of lines of each free stretch."""
        extents: list[tuple[int, int]] = []
        for line, is_used in enumerate(self.is_used):
            if is_used:
                continue
            if extents and sum(extents[-1]) == line:
                extents[-1] = (extents[-1][0], extents[-1][1] + 1)
            else:
                extents.append((line, 1))
        return extents


def lines_of(size_bytes: int) -> int:
    """Return how many lines so many bytes take."""
    return -(-size_bytes // ALIGNMENT)


SIZES = st.integers(1, 6 * ALIGNMENT) | st.integers(1, LINES * ALIGNMENT + 1)
PLACES = st.integers(-1, LINES)


class AllocatorMachine(RuleBasedStateMachine):
    """Any sequence of operations, right and wrong ones, beside naive first fit."""

    @initialize(comb=st.booleans())
    def start(self, comb: bool) -> None:
        """Begin with an empty region, or with one in which every second line is used."""
        self.allocator = Allocator(START, START + LINES * ALIGNMENT)
        self.model = NaiveFirstFit()
        self.used: dict[int, int] = {}
        for line in range(1, LINES if comb else 0, 2):
            self.take(line, ALIGNMENT)
            self.allocator.reserve(START + line * ALIGNMENT, ALIGNMENT)

    def take(self, line: int, size_bytes: int) -> None:
        """Note an extent as used."""
        self.model.mark(line, lines_of(size_bytes), True)
        self.used[START + line * ALIGNMENT] = size_bytes

    @rule(size_bytes=SIZES)
    def allocate(self, size_bytes: int) -> None:
        """Give the very offset that naive first fit gives, or none where that finds none."""
        line = self.model.find(lines_of(size_bytes))
        offset = self.allocator.allocate(size_bytes)
        assert offset == (None if line is None else START + line * ALIGNMENT)
        if line is not None:
            self.take(line, size_bytes)

    @precondition(lambda self: self.used)
    @rule(data=st.data(), count=st.integers(1, 2 * _FAN_OUT))
    def free(self, data: st.DataObject, count: int) -> None:
        """Give back a run of used extents, upwards or downwards."""
        offsets = sorted(self.used, reverse=data.draw(st.booleans()))
        first = data.draw(st.integers(0, len(offsets) - 1))
        for offset in offsets[first : first + count]:
            size_bytes = self.used.pop(offset)
            self.allocator.free(offset, size_bytes)
            self.model.mark((offset - START) // ALIGNMENT, lines_of(size_bytes), False)

    @rule(line=PLACES, size_bytes=SIZES)
    def reserve(self, line: int, size_bytes: int) -> None:
        """Take exactly the extent if it is free, and refuse it otherwise."""
        offset = START + line * ALIGNMENT
        if self.model.fits(line, lines_of(size_bytes)):
            self.allocator.reserve(offset, size_bytes)
            self.take(line, size_bytes)
        else:
            with pytest.raises(ValueError, match=r"in use|not in the region"):
                self.allocator.reserve(offset, size_bytes)

    @rule()
    def recover(self) -> None:
        """Go on with an allocator that was told what is free."""
        extents = tuple(self.allocator.free_extents())
        self.allocator.refill(extents)

    @rule(line=st.integers(0, LINES), size_bytes=SIZES)
    def next_free(self, line: int, size_bytes: int) -> None:
        """Find the lowest extent from a place on that is large enough, cut off at that place."""
        clipped = [
            (max(first, line), first + n_lines) for first, n_lines in self.model.free_extents()
        ]
        fits = [(first, end) for first, end in clipped if end - first >= lines_of(size_bytes)]
        first, end = min(fits, default=(0, 0))
        expected = (START + first * ALIGNMENT, (end - first) * ALIGNMENT) if fits else None
        assert self.allocator.next_free(START + line * ALIGNMENT, size_bytes) == expected

    @rule(line=PLACES, size_bytes=SIZES)
    def free_wrongly(self, line: int, size_bytes: int) -> None:
        """Refuse to free what is not used from end to end."""
        end = line + lines_of(size_bytes)
        if line < 0 or end > LINES or not all(self.model.is_used[line:end]):
            with pytest.raises(ValueError, match=r"free already|not in the region"):
                self.allocator.free(START + line * ALIGNMENT, size_bytes)

    @invariant()
    def tiles_the_region(self) -> None:
        """Compare all that can be seen with the model; used and free extents tile the region."""
        self.allocator.check(self.used.items())
        extents = self.model.free_extents()
        assert list(self.allocator.free_extents()) == [
            (START + line * ALIGNMENT, n_lines * ALIGNMENT) for line, n_lines in extents
        ]
        free_lines = [n_lines for _, n_lines in extents]
        assert self.allocator.free_bytes == sum(free_lines) * ALIGNMENT
        assert self.allocator.largest_free_bytes == max(free_lines, default=0) * ALIGNMENT


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(deadline=None, stateful_step_count=40)
