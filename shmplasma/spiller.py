"""Worker threads that carry out the jobs of `shmplasma.spilling`, so that the store's loop never waits for a file.

This module imports Arrow, hence the server imports it only when there is an external store.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Final

from shmplasma import system
from shmplasma.endings import EndedEarly, wait_for
from shmplasma.errors import ExternalStoreError
from shmplasma.external import ExternalStore, open_external, without_secrets
from shmplasma.segment_name import SegmentName
from shmplasma.spilling import ExternalLimits
from shmplasma.transfers import Job, Read, Write

__all__ = ["Spiller", "is_dead", "note_of", "open_spiller"]

_LOG: Final = logging.getLogger("shmplasma")
_THREADS: Final = 4
_PATIENCE_SECONDS: Final = 8.0
"""Supervisors kill what has not ended after 10 seconds and more."""
_SEPARATOR: Final = b"\n"
_PROCESS: Final = re.compile(rb"[0-9]+ [0-9]+")

Done = tuple[Job, list[int], str]
"""A job that has ended, what it has returned, and, where it has failed, why."""


def open_spiller(
    uri: str,
    token: bytes,
    name: SegmentName,
    limits: ExternalLimits,
    is_ending: Callable[[], bool],
) -> Spiller:
    """Return what serves a segment with the external store at a URI, rid of what dead stores have left there.

    Parameters
    ----------
    uri, token
        As for `shmplasma.external.open_external`.
    name : SegmentName
        The segment's.
    limits : ExternalLimits
        How it is used.
    is_ending : callable
        Whether this store is to end, so that it waits no longer.

    Raises
    ------
    ExternalStoreError
        There is no such place, it cannot be written to, or no thread can be had to do so.
    EndedEarly
        This store is to end.
    """
    _LOG.info("opening the external store %s", without_secrets(uri))

    def open_it() -> Spiller:
        store = open_external(uri, token, note_of(name))
        spiller = Spiller(store, limits, store.containers())
        for left in spiller.sweep():
            _LOG.info("removed %s, which a dead store has left in the external store", left)
        return spiller

    return wait_for(open_it, is_ending)


def note_of(name: SegmentName) -> bytes:
    """Return what a store leaves beside its containers, for `is_dead`: boot, process, directory and name of its segment."""
    pid = os.getpid()
    process = b"%d %d" % (pid, system.start_time(pid) or 0)
    parts = system.boot_id().encode(), process, name.where().encode(), name.encode()
    return _SEPARATOR.join(parts)


def is_dead(note: bytes, *, on_own_disk: bool) -> bool:
    """Tell whether it is certain that the store which left a note has gone for good.

    Parameters
    ----------
    note : bytes
        What `note_of` returned there.
    on_own_disk : bool
        Whether the note lies on a disk that no other machine has.

    Notes
    -----
    A name says little: other machines, and other containers of this one, may use the same bucket, with the same
    host name, and have segments that cannot be seen from here.  There are two proofs:

    * It is of this boot, its segment's directory is the very one (device and inode) that has this name
      here, the segment is not in it, and no process here is that store, whose segment's name somebody may have removed.  As
      long as that store lives, it maps a file of that file system, which therefore exists, and whose number no other one has.
    * It is of another boot, and the place is a disk of this machine: so that boot is over, and with it went
      all shared memory.  A segment in a directory may have outlived it, and be waited for.

    What cannot be proven stays: in a bucket, files of stores that went with their machine.
    """
    boot, _, rest = note.partition(_SEPARATOR)
    process, _, rest = rest.partition(_SEPARATOR)
    where, _, text = rest.partition(_SEPARATOR)
    name, this_boot = SegmentName.decode(text), system.boot_id().encode()
    if name is None or not boot or not this_boot:
        return False
    if boot == this_boot:
        lives = _PROCESS.fullmatch(process) is None or system.is_alive(*map(int, process.split()))
        return bool(where) and where == name.where().encode() and name.is_gone() and not lives
    return on_own_disk and name.kind == "posix"


class Spiller:
    """Runs jobs in threads and keeps what came of them until the loop asks.

    Parameters
    ----------
    store : ExternalStore
        Where objects go.
    limits : ExternalLimits
        How it is used.
    found : mapping
        The sizes in bytes of the containers that there are, by number.

    Notes
    -----
    One thread, that of the loop, calls all methods.  It has one worker from its beginning on, and more as long as the system gives more.
    """

    def __init__(
        self, store: ExternalStore, limits: ExternalLimits, found: Mapping[int, int]
    ) -> None:
        self.limits = limits
        self._found = found
        self._store = store
        self._raw = memoryview(b"")
        self._wake: Callable[[], None] = lambda: None
        self._pool = ThreadPoolExecutor(_THREADS, "spill")
        try:
            self._pool.submit(bool)
        except RuntimeError as error:
            raise ExternalStoreError(
                "there is no thread to serve the external store; raise the limit of processes (ulimit -u), or that of the control group (pids.max)"
            ) from error
        self._done: deque[Done] = deque()

    def start(self, raw: memoryview, wake: Callable[[], None]) -> Mapping[int, int]:
        """Say where objects lie, and whom to tell when a job is done; return what containers there are, and their sizes."""
        self._raw, self._wake = raw, wake
        return self._found

    def sweep(self) -> Iterator[str]:
        """Remove what dead stores have left; yield its names."""
        return self._store.sweep(partial(is_dead, on_own_disk=self._store.is_on_own_disk))

    def submit(self, job: Job) -> None:
        """Have a job carried out."""
        with suppress(RuntimeError):  # it is in the queue, and one worker less takes from that
            self._pool.submit(self._carry_out, job)

    def _carry_out(self, job: Job) -> None:
        places: list[int] = []
        failure = ""
        try:
            places = self._run(job)
        except ExternalStoreError as error:
            failure = str(error)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the store's to say
            failure = repr(error)
        self._done.append((job, places, failure))
        self._wake()

    def _run(self, job: Job) -> list[int]:
        if isinstance(job, Write):
            return self._store.write(job.number, job.parts, self._raw)
        if isinstance(job, Read):
            self._store.read(job.number, job.place, job.part, self._raw)
        else:
            self._store.delete(job.numbers)
        return []

    def done(self) -> list[Done]:
        """Return the jobs that have ended since the last call."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def close(self, *, remove: bool) -> None:
        """Wait for the jobs that are under way, begin no other, and remove all containers if that is wanted.

        Raises
        ------
        ExternalStoreError
            They cannot be removed.
        EndedEarly
            They are to be removed, and that takes too long.  What is left of them is for `sweep`.
        """

        def finish() -> None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            if remove:
                self._store.remove()

        # Jobs write to memory that is left for another store, which therefore waits for them.
        deadline = time.monotonic() + _PATIENCE_SECONDS
        try:
            wait_for(finish, lambda: remove and time.monotonic() > deadline)
        except EndedEarly:
            _LOG.warning(
                "the external store has not answered for %g s, and is waited for no longer; "
                "the next store that is started with it removes what is left there",
                _PATIENCE_SECONDS,
            )
            raise
        self._done.clear()
        self._raw = memoryview(b"")
