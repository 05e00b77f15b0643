"""Attempts: which compactions are worth another one.  Pure.

One that was in vain is not begun anew as long as all is there that was in its way, though a smaller one succeeds.  That is what could not be
moved when it last looked.
What was pinned in passing, when it came to move it, does not count: that may have been let go of since, and nothing would
say so.  So one that has met a pin may be begun anew at once, and whoever is not to wait for long counts these.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

__all__ = ["Attempts"]

_MOST: Final = 8
"""So many are begun for one that does not wait for long: somebody who pins an object at each look would hold it up for ever."""


class Attempts:
    """What came of the last compaction.

    Attributes
    ----------
    met_pins : int
        How many were in vain that have met a pin.
    """

    def __init__(self) -> None:
        self.met_pins = 0
        self._wanted = self._pins_before = 0
        self._in_the_way: list[tuple[int, int]] = []
        self._in_vain: tuple[int, object] | None = None

    def look(self, fixed: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Take note of what cannot be moved just now, and return it."""
        self._in_the_way = sorted(fixed)
        return self._in_the_way

    def is_promising(self, size_bytes: int, situation: object) -> bool:
        """Tell whether one for so many bytes can do what the last one could not; `look` was just called."""
        if self._in_vain is None:
            return True
        least, before = self._in_vain
        return size_bytes < least or before != (situation, self._in_the_way)

    def are_enough(self, before: int) -> bool:
        """Tell whether so many have met a pin since there were `before` that one who does not wait for long is to be refused."""
        return self.met_pins - before >= _MOST

    def begin(self, size_bytes: int, pins_met: int) -> None:
        """Take note of one that begins, when so many pins were met by all before."""
        self._wanted, self._pins_before = size_bytes, pins_met

    def end(self, situation: object, pins_met: int, *, done: bool) -> None:
        """Take note of what came of it."""
        has_met_pins = not done and pins_met > self._pins_before
        self.met_pins += has_met_pins
        if has_met_pins:
            self._in_vain = None
        elif not done:
            self._in_vain = self._wanted, (situation, self._in_the_way)
