"""The client's side of a claim: takes an id of the caller's choice without a message (`shmplasma.claims` has the argument).

The steps are those of the table there.  All are made while the client is busy with its lease, by one thread at a time.  Whatever is not as
expected leaves the object to a round trip, by which the store decides.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from shmplasma.absence import Absence
from shmplasma.attachment import Attachment
from shmplasma.claims import pin_word
from shmplasma.leasing import LeaseWriter
from shmplasma.link import Link
from shmplasma.lock_file import LockFile
from shmplasma.objects import ObjectID, is_fresh
from shmplasma.outbox import Outbox
from shmplasma.pinning import BoardPool
from shmplasma.posted import CLAIM, Abort, Claim
from shmplasma.writable import Writable

__all__ = ["Claimant"]

_ABORT: Final = Abort.KIND
_CLAIM: Final = Claim.KIND


class Claimant:
    """Creates objects in the client's lease, under ids that may be taken.

    Parameters
    ----------
    attachment : Attachment
        The segment.
    absence : Absence
        Tells what is not in the table.
    locks : LockFile
        By what ids are locked.
    boards : BoardPool
        The client's boards.
    leasing : LeaseWriter
        Where there is room.
    link : Link
        By which the store is told.
    outbox : Outbox
        The client's; by it can be seen how far the store has read.

    Notes
    -----
    Thread-safe, as `leasing` is.
    """

    def __init__(
        self,
        attachment: Attachment,
        absence: Absence,
        locks: LockFile,
        boards: BoardPool,
        leasing: LeaseWriter,
        link: Link,
        outbox: Outbox,
    ) -> None:
        self._attachment = attachment
        self._absence = absence
        self._locks = locks
        self._data = attachment.layout.data
        self._boards = boards
        self._leasing = leasing
        self._link = link
        self._outbox = outbox
        self._locked: int | None = None
        self._unread: dict[int, int] = {}

    def take(self, object_id: ObjectID) -> bool:
        """Lock an id, and tell whether it is free; to be called by `LeaseWriter.put`.  3 us, and no message."""
        if is_fresh(object_id.id_bytes):
            return False
        at, unread = object_id.hash32, self._unread
        try:
            if self._locked is not None:  # the last claim has left its record by now
                unread[self._locked] = self._outbox.written
                self._locked = None
            if at in unread:
                self.unlock()
                if at in unread:
                    return False
            # Before it is, as an interrupt may leave a lock; the next claim takes it back.
            self._locked = at
            return self._locks.lock(at) and self._absence.is_free(object_id.id_bytes)
        except OSError:  # there are no such locks, or no more of them
            return False

    def unlock(self) -> None:
        """Unlock what was claimed before, as far as the store has read of it.

        To be called like `take`, when the record is written: who waits for the object need not wait for this.
        """
        unread, read = self._unread, self._outbox.read
        if not unread:
            return
        try:
            if self._outbox.written <= read:
                self._locks.unlock_all()
                unread.clear()
            while unread and unread[first := next(iter(unread))] <= read:
                self._locks.unlock(first)
                del unread[first]
        except OSError:  # what stays locked is locked for nothing
            return

    def create(
        self, object_id: ObjectID, data_size: int, metadata_size: int, codec: int
    ) -> npt.NDArray[np.uint8] | None:
        """Create an object, if that can be done without asking; otherwise as `shmplasma.session.Session.create`."""
        size = data_size + metadata_size
        pins = self._boards.take_free(1) if size else ()  # what has no bytes lies nowhere
        if not pins:
            return None
        pin = pins[0]
        created: Writable | None = None
        announced = False

        def announce(_: memoryview, offset: int) -> None:
            nonlocal created, announced
            announced = True
            pin.board.words[pin.word] = pin_word(offset)
            fields = object_id.id_bytes, offset, data_size, metadata_size, codec, pin.slot
            self._link.post(_CLAIM, CLAIM.pack(*fields), is_urgent=False)
            self.unlock()
            start = offset - self._data
            created = Writable((size,), np.uint8, self._attachment.write_map, start)
            created.pin = pin

        try:
            self._leasing.put(size, announce, lambda: self.take(object_id))
        except BaseException:
            if announced:  # and nobody is going to seal it
                self._link.post(_ABORT, object_id.id_bytes)
            raise
        return created
