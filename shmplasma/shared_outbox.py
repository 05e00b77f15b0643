"""An outbox that the threads of a client share, and its signal handlers and finalizers."""

from __future__ import annotations

import threading
from typing import Final

from shmplasma.nesting import NESTED, is_inside
from shmplasma.outbox import ANNOUNCED_AT, PLACES, RECORD_BYTES, RECORDS, Outbox
from shmplasma.posted import PUBLISH, PUBLISH_RECORD, Publish

__all__ = ["SharedOutbox"]

_WRITING: Final = frozenset(("post", "post_soon", "publish"))
"""Who takes the lock."""
_MASK: Final = RECORDS - 1
_KIND: Final = Publish.KIND
_BODY_BYTES: Final = PUBLISH.size


class SharedOutbox(Outbox):
    """An outbox to which one thread writes at a time.

    Parameters
    ----------
    *words : memoryview
        As for `Outbox`.

    Notes
    -----
    Thread-safe, but for `append`.  Each way to write a record returns what `append` does.
    """

    __slots__ = ("_lock",)

    def __init__(self, *words: memoryview) -> None:
        super().__init__(*words)
        self._lock = threading.Lock()

    def post(self, kind: int, body: bytes, *, is_urgent: bool = True) -> int:
        """Write a record; parameters as for `append`.

        Raises
        ------
        RuntimeError
            A call of this thread was interrupted while it wrote a record.
        """
        lock = self._lock
        if lock.locked() and is_inside(self, _WRITING):
            raise RuntimeError(NESTED)
        with lock:
            return self.append(kind, body, is_urgent=is_urgent)

    def post_soon(self, kind: int, body: bytes, *, is_last: bool = False) -> int:
        """Write a record from a finalizer; 0 as well if somebody is writing one."""
        acquired: list[bool] = []
        try:
            acquired.extend(map(self._lock.acquire, (False,)))
            return self.append(kind, body, is_last=is_last) if acquired[0] else 0
        finally:
            if acquired and acquired[0]:
                self._lock.release()

    def publish(
        self,
        object_id: bytes,
        offset: int,
        data_size: int,
        metadata_size: int,
        codec: int,
        keep: bool,
    ) -> int:
        """Write a `Publish`; as `post`, but the steps of `append` are repeated: each call of a function would take 4 % of a put."""
        lock, lags = self._lock, False
        if lock.locked() and is_inside(self, _WRITING):
            raise RuntimeError(NESTED)
        with lock:
            count = self.written
            if count >= self._look_at:
                unread = self._look()
                if unread >= PLACES:
                    return 0
                lags = unread == ANNOUNCED_AT - 1
            at = (count & _MASK) * RECORD_BYTES
            PUBLISH_RECORD.pack_into(
                self.raw,
                at + 8,
                _KIND,
                _BODY_BYTES,
                object_id,
                offset,
                data_size,
                metadata_size,
                codec,
                keep,
            )
            self._words[at >> 3] = self.written = count = count + 1
        return -count if lags or self._polled[0] != self._store else count
