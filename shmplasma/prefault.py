"""``--prefault``: all memory is committed before the store serves, and somebody may be watching.

On a terminal a line is kept up to date; a log gets a line at the beginning, at the end, and now and then between.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Final, TextIO

from shmplasma.errors import CommitError

__all__ = ["prefault"]

_LOG: Final = logging.getLogger("shmplasma")

_TERMINAL_SECONDS: Final = 0.1
_LOG_SECONDS: Final = 10.0


def prefault(
    steps: Iterator[int], capacity: int, stream: TextIO, is_ending: Callable[[], bool]
) -> None:
    """Commit all memory, and say how far that has come.

    Parameters
    ----------
    steps : iterator of int
        Commits a step each time it is asked, and says how many bytes that are so far.
    capacity : int
        How many bytes there are to be.
    stream : text file
        Where the live line goes, if it is a terminal.
    is_ending : callable
        Whether the store is to end, so that the rest does not matter.

    Raises
    ------
    CommitError
        There is not so much memory; it says how much is missing.
    """
    is_live = stream.isatty()
    interval = _TERMINAL_SECONDS if is_live else _LOG_SECONDS
    began = said = time.monotonic()
    done = 0
    _LOG.info("committing %d bytes of memory before the store serves", capacity)
    try:
        for done in steps:
            now = time.monotonic()
            if is_ending():
                break
            if now - said > interval:
                said = now
                _say(done, capacity, now - began, stream if is_live else None)
    except CommitError as error:
        raise CommitError(capacity - done, error.free_bytes, error.remedy, error.limit) from error
    finally:
        if is_live and said > began:
            stream.write("\r\x1b[K")  # the line has had its time
            stream.flush()
    _LOG.info("committed %d bytes in %.1f s", min(done, capacity), time.monotonic() - began)


def _say(done: int, capacity: int, seconds: float, stream: TextIO | None) -> None:
    left = seconds * (capacity - done) / done
    text = (
        f"committing memory: {done / 2**30:.1f} of {capacity / 2**30:.1f} GiB "
        f"({100 * done // capacity} %), {left:.0f} s left"
    )
    if stream is None:
        _LOG.info("%s", text)
    else:
        stream.write(f"\r\x1b[K{text}")
        stream.flush()
