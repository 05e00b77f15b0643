"""The client's side of a claim: takes an id of the caller's choice without a message (`shmplasma.claims` has the argument).

The steps are those of the table there.  All are made while the client is busy with its lease, by one thread at a time.  Whatever is not as
expected leaves the object to a round trip, by which the store decides.
"""

from __future__ import annotations

from functools import partial
from time import time_ns
from typing import Final

import numpy as np
import numpy.typing as npt

from shmplasma.absence import NOWHERE, Absence
from shmplasma.attachment import Attachment
from shmplasma.hinting import Hints
from shmplasma.leases import BUSY_WORD
from shmplasma.leasing import LeaseWriter, fill
from shmplasma.link import Link
from shmplasma.lock_file import LockFile
from shmplasma.objects import ObjectID, is_fresh
from shmplasma.offset_pins import pin_word
from shmplasma.outbox import Outbox
from shmplasma.payloads import Payload
from shmplasma.pinning import BoardPool
from shmplasma.posted import CLAIM, Abort, Claim, stamp_of
from shmplasma.writable import Writable

__all__ = ["Claimant"]

_ABORT: Final = Abort.KIND
_CLAIM: Final = Claim.KIND
_KEPT: Final = 8
"""So many objects may be created one after the other before it is looked which of their ids can be unlocked, as at a seal."""
_EARLY_BYTES: Final = 1 << 16
"""Who waits for an object of up to this size is woken before it is made: to make it takes no longer than to wake up."""


class Claimant:
    """Creates and puts objects in the client's lease, under ids that may be taken.

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
    hints : Hints
        Tells who waits.

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
        hints: Hints,
    ) -> None:
        self._attachment = attachment
        self._absence = absence
        self._locks = locks
        self._data = attachment.layout.data
        self._boards = boards
        self._leasing = leasing
        self._link = link
        self._outbox = outbox
        self._hints = hints
        self._locked: int | None = None
        self._unread: dict[int, int] = {}

    def take(self, object_id: ObjectID) -> bool:
        """Lock an id, and tell whether it is free; to be called by who has entered the lease.  3 us, and no message."""
        if is_fresh(object_id.id_bytes):
            return False
        at, unread = object_id.hash32, self._unread
        try:
            if self._locked is not None:  # the last claim has left its record by now
                unread[self._locked] = self._outbox.written
                self._locked = None
            if at in unread:
                self._unlock()
                if at in unread:
                    return False
            # Before it is, as an interrupt may leave a lock; the next claim takes it back.
            self._locked = at
            return self._locks.lock(at) and self._absence.look_up(object_id.id_bytes) == NOWHERE
        except OSError:  # there are no such locks, or no more of them
            return False

    def unlock(self) -> None:
        """Unlock what was claimed before, as far as the store has read of it, unless another thread claims something just now."""
        if self._unread:
            entered = [False]
            try:
                if self._leasing.hold(entered):
                    self._unlock()
            finally:
                if entered[0]:
                    self._leasing.token.append(None)

    def _unlock(self) -> None:
        """Do so when others are kept out of the lease."""
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
        pin = self._boards.take_one() if size else None  # what has no bytes lies nowhere
        if pin is None:
            return None
        leasing = self._leasing
        claim, since = b"", 0
        entered = [False]
        try:
            try:
                offset = leasing.enter(entered, size)
                if offset < 0 or not self.take(object_id):
                    return None
                if size <= _EARLY_BYTES:
                    self._hints.tell_early(object_id, 2)
                leasing.take(size)
                pin.board.words[pin.word] = pin_word(object_id.hash32, offset)
                fields = object_id.id_bytes, offset, data_size, metadata_size, codec, pin.slot
                claim, since = CLAIM.pack(*fields, stamp_of(time_ns())), self._outbox.written
                self._link.post(_CLAIM, claim, is_urgent=False)
                if len(self._unread) > _KEPT:
                    self._unlock()
                start = offset - self._data
                created = Writable((size,), np.uint8, self._attachment.write_map, start)
                created.pin = pin
                leasing.look_ahead(size)
            finally:
                if entered[0]:
                    leasing.board[BUSY_WORD] = 0
                    leasing.token.append(None)
        except BaseException:
            # If it is written nobody is going to seal the object; if not, another thread may have created one under this id since.
            if claim and self._outbox.has(_CLAIM, claim, since):
                self._link.post(_ABORT, object_id.id_bytes)
            raise
        return created

    def put(
        self,
        object_id: ObjectID,
        payload: Payload,
        metadata: bytes | bytearray,
        threads: int,
        codec: int,
    ) -> bool:
        """Put an object, and tell who waits for it; otherwise as `shmplasma.leasing.LeaseWriter.put`."""
        data_size, size = payload.size_bytes, payload.size_bytes + len(metadata)
        leasing, hints = self._leasing, self._hints
        if data_size <= _EARLY_BYTES:
            hints.tell_early(object_id)
        entered = [False]
        try:
            offset = leasing.enter(entered, size)
            if offset < 0 or not self.take(object_id):
                return False
            fill(leasing.take(size), payload, metadata, threads)
            fields = object_id.id_bytes, offset, data_size, len(metadata), codec, False
            self._link.publish(fields, partial(hints.tell, object_id))
            self._unlock()  # whoever waits for the object need not wait for this
            leasing.look_ahead(size)
            return True
        finally:
            if entered[0]:
                leasing.board[BUSY_WORD] = 0
                leasing.token.append(None)
