"""Calls inside calls: what a signal handler, or a finalizer that the collector runs, does in the middle of another call of its thread.

A lock that the interrupted call has is not released before the inner one ends; so that one must not wait for it.  Who
has a lock has, for as long, the function on its stack that took it.  To look there costs the others nothing.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Final

__all__ = ["NESTED", "is_inside"]

NESTED: Final = (
    "a signal handler or a finalizer has called this client inside another call of this client by the same thread, "
    "which would wait for itself; have it set a flag, or use a client of its own"
)


def is_inside(owner: object, names: frozenset[str]) -> bool:
    """Tell whether a method of `owner` with one of these names is under way in this thread; its caller is not counted.

    Notes
    -----
    O(depth of the stack), some microseconds.
    """
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - there is no other way to one's own stack
    while frame is not None:
        if frame.f_code.co_name in names and frame.f_locals.get("self") is owner:
            return True
        frame = frame.f_back
    return False
