"""The signals that end a command.  They are held back while it starts, so that none of its steps is interrupted half-way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Final, TypeVar

__all__ = ["EndedEarly", "hold_back", "is_told_to_end", "wait_for"]

_T = TypeVar("_T")
_LOOK_SECONDS: Final = 0.1
"""How often to see whether this process is to end."""

_ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""SIGHUP comes when the terminal is closed; whoever is to outlive that was started with it ignored (``nohup``)."""


def hold_back() -> frozenset[signal.Signals]:
    """Block the signals that end this process, and return them.

    Notes
    -----
    To be called before other threads are started: they inherit it, and one that had not would take the signal.
    """
    ending = frozenset(_ENDING)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        ending -= {signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    return ending


def is_told_to_end() -> bool:
    """Tell whether a signal that was held back waits."""
    return not signal.sigpending().isdisjoint(_ENDING)


class EndedEarly(Exception):  # noqa: N818 - no error
    """The process is to end while it waits for what may take minutes."""


def wait_for(work: Callable[[], _T], is_ending: Callable[[], bool]) -> _T:
    """Return what some work returns, or raise what it raises, unless the process is to end before that.

    Parameters
    ----------
    work : callable
        Runs in a thread of its own: a host that does not answer takes minutes to give up.  Where none can be had it runs here, and is
        waited for.
    is_ending : callable
        Whether this process is to end.

    Raises
    ------
    EndedEarly
        It is to end.  The thread goes on, and does not keep the process from ending by `os._exit`.
    """
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            done.set_exception(error)

    try:
        threading.Thread(target=run, name="open", daemon=True).start()
    except RuntimeError:  # there can be no more threads
        run()
    while not wait([done], _LOOK_SECONDS).done:
        if is_ending():
            raise EndedEarly
    return done.result()
