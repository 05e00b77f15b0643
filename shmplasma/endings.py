"""The signals that end a command.  They are held back while it starts, so that none of its steps is interrupted half-way."""

from __future__ import annotations

import signal
from typing import Final

__all__ = ["ENDING", "hold_back", "is_told_to_end"]

ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""SIGHUP comes when the terminal is closed; whoever is to outlive that was started with it ignored (``nohup``)."""


def hold_back() -> frozenset[signal.Signals]:
    """Block the signals that end this process, and return them.

    Notes
    -----
    To be called before other threads are started: they inherit it, and one that had not would take the signal.
    """
    ending = frozenset(ENDING)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        ending -= {signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    return ending


def is_told_to_end() -> bool:
    """Tell whether a signal that was held back waits."""
    return not signal.sigpending().isdisjoint(ENDING)
