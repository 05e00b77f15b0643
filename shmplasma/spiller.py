"""Worker threads that carry out the jobs of `shmplasma.spilling`, so that the store's loop never waits for a file.

This module imports Arrow, hence the server imports it only when there is an external store.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from shmplasma.errors import ExternalStoreError
from shmplasma.external import ExternalStore, Item, open_external
from shmplasma.segment_name import SegmentName
from shmplasma.spilling import ExternalLimits, Job, Part, Read, Write

__all__ = ["Spiller", "open_spiller"]

_THREADS: Final = 4
_SEPARATOR: Final = b"\n"

Done = tuple[Job, list[int], str]
"""A job that has ended, what it has returned, and, where it has failed, why."""


def open_spiller(uri: str, token: bytes, name: SegmentName, limits: ExternalLimits) -> Spiller:
    """Return what serves a segment with the external store at a URI.

    Raises
    ------
    ExternalStoreError
        There is no such place, or it cannot be written to.
    """
    return Spiller(open_external(uri, token, _node() + _SEPARATOR + name.encode()), limits)


def _node() -> bytes:
    return os.uname().nodename.encode()


def _is_dead(note: bytes) -> bool:
    """Tell whether the store that left a note has gone for good: it was of this host, and its segment is gone."""
    node, _, name = note.partition(_SEPARATOR)
    segment = SegmentName.decode(name)
    return node == _node() and segment is not None and segment.is_gone()


class Spiller:
    """Runs jobs in threads and keeps what came of them until the loop asks.

    Parameters
    ----------
    store : ExternalStore
        Where objects go.
    limits : ExternalLimits
        How it is used.

    Notes
    -----
    One thread, that of the loop, calls all methods.
    """

    def __init__(self, store: ExternalStore, limits: ExternalLimits) -> None:
        self.limits = limits
        self._store = store
        self._raw = memoryview(b"")
        self._wake: Callable[[], None] = lambda: None
        self._pool = ThreadPoolExecutor(_THREADS, "spill")
        self._done: deque[Done] = deque()

    def start(self, raw: memoryview, wake: Callable[[], None]) -> list[int]:
        """Say where objects lie, and whom to tell when a job is done; return the containers that there are."""
        self._raw, self._wake = raw, wake
        return list(self._store.numbers())

    def sweep(self) -> Iterator[str]:
        """Remove what dead stores have left; yield its names."""
        return self._store.sweep(_is_dead)

    def submit(self, job: Job) -> None:
        """Have a job carried out."""
        self._pool.submit(self._run, job).add_done_callback(lambda future: self._note(job, future))

    def _run(self, job: Job) -> list[int]:
        if isinstance(job, Write):
            return self._store.write(job.number, [self._item(part) for part in job.parts])
        if isinstance(job, Read):
            self._store.read(job.number, job.place, self._item(job.part))
        else:
            self._store.delete(job.numbers)
        return []

    def _item(self, part: Part) -> Item:
        end = part.offset + part.data_size + part.metadata_size
        contents = self._raw[part.offset : end]
        return Item(part.object_id, part.codec, part.data_size, part.metadata_size, contents)

    def _note(self, job: Job, future: Future[list[int]]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self._done.append((job, future.result(), ""))
        else:
            text = str(error) if isinstance(error, ExternalStoreError) else repr(error)
            self._done.append((job, [], text))
        self._wake()

    def done(self) -> list[Done]:
        """Return the jobs that have ended since the last call."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def close(self, *, remove: bool) -> None:
        """Wait for the jobs that are under way, begin no other, and remove all containers if that is wanted.

        Raises
        ------
        ExternalStoreError
            They cannot be removed.
        """
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._done.clear()
        self._raw = memoryview(b"")
        if remove:
            self._store.remove()
