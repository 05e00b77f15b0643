"""Threads that work beside their caller, each on a processor that is not his.

NumPy copies without the interpreter lock, so another thread can copy at the same time.  Arrow's pool does so as well, but its caller sleeps
meanwhile: two threads have to be woken for the work of one, and then the caller.  Here he does his share himself, and takes over whatever
nobody else has begun.  Side by side, 2 processors, puts in GB/s, Arrow's pool and this: 8 MiB 34 and 49, 64 MiB 41 and 44, 512 MiB 41 and 42.

*Where a helper runs.*  A kernel likes to wake a thread on the processor of whoever wakes it, above all where it cannot tell that another
one is idle, as in a virtual machine: some ms after the last copy 64 MiB took as long with a helper as without (20 GB/s).  So each is told to keep
away from the caller's processor before it is woken (35 GB/s).

*When a caller returns, nobody works for him any more.*  A helper takes a lock first that is its and this call's alone, and a job then, and gives
the lock back when it finds no more jobs.  The caller empties the list of jobs and then waits for each of these locks: a helper that has not taken its
own by then will find nothing to do.  That is so if he is interrupted as well, as the memory that is copied to may be somebody else's as soon as he
has gone.  An interrupt while he waits is raised when he has waited.  (Only another one, less than a microsecond after it, would end the wait.)

*Where other threads compute*, each of those here waits for the interpreter lock, up to 5 ms at a time: a helper before it begins, and its caller
after each job.  Arrow's pool needs it once in all.  So after a helper has come late, the next copies are made by that (`are_late`).

*A child that is forked by a signal handler in the midst of a call* has no helpers, and the memory that is copied to may be its parent's to give
away, at any time.  So there is nothing left to do in it: jobs and locks are let go of before the child runs, and the call is an error there.

Helpers are never given back: they sleep.  They are daemons, as whoever has work for them waits for it.  A child that was
forked has none, and makes its own.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Final

from shmplasma import system

__all__ = ["LATE_NS", "NAME", "are_late", "share"]

NAME: Final = "shmplasma-helper"
"""What all helpers are called."""

LATE_NS: Final = 1_000_000
"""Who waits longer than this waits for the interpreter lock."""
_COPIES_AFTER_A_LATE_ONE: Final = 32
_countdown: Final = [0]


class _Work:
    """The jobs of one call, and the locks of those who help."""

    locks: Sequence[threading.Lock] = ()

    def __init__(self, jobs: Iterable[Callable[[], object]]) -> None:
        self._jobs = list(jobs)
        self._is_the_parents = False
        self._asked_ns = time.perf_counter_ns()
        self._errors: list[BaseException] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def do(self) -> None:
        """Do, one after the other, what nobody has begun."""
        while True:
            try:
                job = self._jobs.pop()
            except IndexError:
                return
            job()

    def help(self) -> None:
        """Do so in a helper."""
        if time.perf_counter_ns() - self._asked_ns > LATE_NS:
            _countdown[0] = _COPIES_AFTER_A_LATE_ONE
        try:
            self.do()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
            self._errors.append(error)

    def end(self) -> None:
        """Begin nothing more, and return when nothing is being done."""
        try:
            self._jobs.clear()
            for lock in self.locks:
                with lock:
                    pass
        except BaseException:
            self.end()
            raise

    def leave_to_parent(self) -> None:
        """Let go of everything, in a forked child."""
        self._is_the_parents = True
        self._jobs.clear()
        for lock in self.locks:
            with suppress(RuntimeError):  # its helper had not begun, or had ended
                lock.release()

    def raise_errors(self) -> None:
        """Raise what a helper has met, or that a child cannot go on."""
        if self._is_the_parents:
            raise RuntimeError(
                "a signal handler forked this process in the middle of a copy, which is the parent's; "
                "have it set a flag, and fork when the call has ended"
            )
        if self._errors:
            raise self._errors[0]


class _Helper(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name=NAME, daemon=True)
        self.is_free = False
        self._asked: SimpleQueue[tuple[threading.Lock, _Work]] = SimpleQueue()

    def ask(self, lock: threading.Lock, work: _Work) -> None:
        self._asked.put((lock, work))

    def run(self) -> None:
        while True:
            self.is_free = True
            lock, work = self._asked.get()
            self.is_free = False
            with lock:
                work.help()
            del lock, work


_helpers: Final[list[_Helper]] = []
_under_way: Final[weakref.WeakSet[_Work]] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    _helpers.clear()
    for work in tuple(_under_way):
        work.leave_to_parent()


os.register_at_fork(after_in_child=_after_fork_in_child)


def share(jobs: Iterable[Callable[[], object]]) -> None:
    """Do all jobs, each once, in any order, by this thread and others that are free; return when they are done.

    Parameters
    ----------
    jobs : iterable of callable
        Each may be called in any thread.  They are worth it if they run without the interpreter lock.

    Raises
    ------
    BaseException
        What a job raised.  Some of the others were not done then.
    RuntimeError
        This is a child that was forked in the midst of the call.

    Notes
    -----
    Thread-safe: several callers share the helpers, of which there is one less than processors.  25 us for the first of them.

    Examples
    --------
    >>> done = []
    >>> share([lambda: done.append(1), lambda: done.append(2)])
    >>> sorted(done)
    [1, 2]
    """
    if sys.is_finalizing():  # there are no other threads any more, and none can be made
        for job in jobs:
            job()
        return
    work = _Work(jobs)
    helpers = _find_helpers(len(work) - 1)
    work.locks = [threading.Lock() for _ in helpers]
    _under_way.add(work)
    try:
        for helper, lock in zip(helpers, work.locks, strict=True):
            helper.ask(lock, work)
        work.do()
        work.end()
    except BaseException:
        work.end()
        raise
    work.raise_errors()


def are_late() -> bool:
    """Tell whether helpers have come late not long ago: then this, and some calls after it, should do without them."""
    if not _countdown[0]:
        return False
    _countdown[0] -= 1
    return True


def _find_helpers(most: int) -> list[_Helper]:
    """Return up to so many helpers that are free, if they may run on another processor than this thread does."""
    found = [helper for helper in _helpers if helper.is_free][:most]
    while len(found) < most and len(_helpers) < system.processors() - 1:
        helper = _Helper()
        _helpers.append(helper)  # before others look how many there are
        try:
            helper.start()
        except BaseException as error:
            _helpers.remove(helper)
            if isinstance(error, RuntimeError):  # there can be no more threads
                break
            raise
        found.append(helper)
    may_run = system.keep_away([helper.native_id for helper in found if helper.native_id])
    return found if may_run else []
