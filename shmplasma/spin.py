"""Looking for a message for a while before going to sleep, as both ends of a connection do.

To wake somebody costs as much as to look for 50 us, so who is about to be answered looks.  Between two looks the
processor is given away, in case the other end shares it.  Where there are more processes to run than processors, one
of these may get it for a whole slice of time, some milliseconds; who sleeps instead is woken before the slice is over.
So a look that took so long is the last one for a while.

Whoever is woken may be put on the processor of the one who wakes him, although another is idle: virtual machines do so to spare
their host the wake-up.  He runs when the other sleeps, or gives way to him.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Final

from shmplasma import system

__all__ = ["Spin"]

_SPIN_NS: Final = 50_000
"""Measured on 2 idle processors: a round trip takes 50-80 us when both ends sleep in between, and 20-30 us when
neither does; 50 us of looking is what the sleep and the wake-up would cost."""
_CROWDED_NS: Final = 1_000_000
"""The other end needs less than this for any of its turns; a slice is 3 ms."""
_PAUSE_NS: Final = 100_000_000
"""How long nobody looks then, so that slices given away make a hundredth or two of the time."""


class Spin:
    """Says how often to look.  On a single processor nobody does: it would keep the other end from answering."""

    __slots__ = ("_crowded_until", "_has_others")

    def __init__(self) -> None:
        self._has_others = system.processors() > 1
        self._crowded_until = 0

    def give_way(self) -> None:
        """Let whoever was woken a moment ago run first, where the kernel has put him on the same processor."""
        before = time.monotonic_ns()
        if before >= self._crowded_until:
            os.sched_yield()
            now = time.monotonic_ns()
            if now - before > _CROWDED_NS:
                self._crowded_until = now + _PAUSE_NS

    def looks(self, spin_ns: int = _SPIN_NS) -> Iterator[None]:
        """Yield as often as the caller should look; others may run between two times.

        Parameters
        ----------
        spin_ns : int, optional
            For how long, in nanoseconds; the time that others had does not count.
        """
        now = time.monotonic_ns()
        end = now + spin_ns
        while self._has_others and self._crowded_until <= now <= end:
            yield
            before = time.monotonic_ns()
            os.sched_yield()
            now = time.monotonic_ns()
            end += now - before
            if now - before > _CROWDED_NS:
                self._crowded_until = now + _PAUSE_NS
                yield  # what it has waited for may have come in this time
