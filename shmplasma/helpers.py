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

Helpers are never given back: they sleep.  They are daemons, as whoever has work for them waits for it.  A child that was
forked has none, and makes its own.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Final

from shmplasma import system

__all__ = ["NAME", "share"]

NAME: Final = "shmplasma-helper"
"""What all helpers are called."""


class _Work:
    """The jobs of one call."""

    def __init__(self, jobs: Iterable[Callable[[], object]]) -> None:
        self._jobs = list(jobs)
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
        try:
            self.do()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
            self._errors.append(error)

    def end(self, locks: Iterable[threading.Lock]) -> None:
        """Begin nothing more, and return when nothing is being done."""
        try:
            self._jobs.clear()
            for lock in locks:
                with lock:
                    pass
        except BaseException:
            self.end(locks)
            raise

    def raise_errors(self) -> None:
        """Raise what a helper has met."""
        if self._errors:
            raise self._errors[0]


class _Helper(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name=NAME, daemon=True)
        self.is_free = True
        self._asked: SimpleQueue[tuple[threading.Lock, _Work]] = SimpleQueue()

    def ask(self, lock: threading.Lock, work: _Work) -> None:
        self._asked.put((lock, work))

    def run(self) -> None:
        while True:
            lock, work = self._asked.get()
            self.is_free = False
            with lock:
                work.help()
            del lock, work
            self.is_free = True


_helpers: Final[list[_Helper]] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.clear)


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
    work = _Work(jobs)
    helpers = _find_helpers(len(work) - 1)
    locks = [threading.Lock() for _ in helpers]
    try:
        for helper, lock in zip(helpers, locks, strict=True):
            helper.ask(lock, work)
        work.do()
        work.end(locks)
    except BaseException:
        work.end(locks)
        raise
    work.raise_errors()


def _find_helpers(most: int) -> list[_Helper]:
    """Return up to so many helpers that are free, if they may run on another processor than this thread does."""
    if sys.is_finalizing():  # there are no other threads any more, and none can be made
        return []
    found = [helper for helper in _helpers if helper.is_free][:most]
    while len(found) < most and len(_helpers) < system.processors() - 1:
        helper = _Helper()
        try:
            helper.start()
        except RuntimeError:  # there can be no more threads
            break
        _helpers.append(helper)
        found.append(helper)
    may_run = system.keep_away([helper.native_id for helper in found if helper.native_id])
    return found if may_run else []
