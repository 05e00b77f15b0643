"""A client's session with a store: its connection, its view of the segment, and its boards.

The session answers what needs no message from the segment itself (`shmplasma.reader`) and asks the store for
the rest.  It belongs to one `shmplasma.client.PlasmaClient`; what must outlast it is in its `Lifeline`, which
every pin keeps.  So the mapping and the connection live as long as the last buffer, and what a buffer shows
cannot be given away before: not when the client is closed, not when it is collected.  A client that is
closed *detaches*: the store drops what it had not sealed and answers it no more, but leaves it its boards;
the connection ends with the lifeline.

Fork
----
A child's client connects anew at its next use; what it inherits is `shmplasma.inheritance`'s.

Interrupts
----------
A request that is interrupted (Ctrl-C) leaves a reply behind, and the slots that it lent are the store's
until then.  The disposal of the reply gives them back, and undoes what the store has done meanwhile.
"""

from __future__ import annotations

import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from math import ceil
from typing import Final, Literal, TypeVar
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shmplasma import system
from shmplasma.absence import Absence
from shmplasma.asking import Asking
from shmplasma.attachment import Attachment
from shmplasma.census import Census
from shmplasma.claiming import Claimant
from shmplasma.errors import AttachError, ProtocolError
from shmplasma.exchange import RETRY_SECONDS, Exchange
from shmplasma.handshake import greet
from shmplasma.hinting import Hints
from shmplasma.inheritance import register
from shmplasma.layout import (
    CONTROL_BYTES,
    ID_FIELD,
    ControlWord,
    EntryWord,
    HeaderWord,
    Layout,
    align_up,
)
from shmplasma.leasing import LeaseWriter
from shmplasma.link import Link
from shmplasma.lock_file import LockFile
from shmplasma.objects import ObjectID
from shmplasma.offset_pins import OffsetPins, pin_word
from shmplasma.outcomes import expect
from shmplasma.pinning import BoardPool, Lifeline, Located
from shmplasma.posted import Abort, Seal
from shmplasma.protocol import Frame
from shmplasma.reader import FastReader
from shmplasma.removal import Removal
from shmplasma.replies import (
    Created,
    Done,
    Number,
    Reply,
    Welcome,
)
from shmplasma.requests import (
    Attach,
    Create,
    Grow,
    Request,
    Role,
    SetOptions,
)
from shmplasma.segment_name import SegmentName
from shmplasma.settling import Settling
from shmplasma.shared_outbox import SharedOutbox
from shmplasma.transport import Channel
from shmplasma.unread import Unread
from shmplasma.writable import POPULATE_BYTES, Pages, Writable

__all__ = ["Session"]

_SEAL: Final = Seal.KIND
_NEVER: Final = memoryview(bytes(8)).cast("Q")

_ReplyT = TypeVar("_ReplyT", bound=Reply)


class Session:
    """A connection, the segment, and the boards that the store has granted.

    Use `Session.open`.

    Notes
    -----
    Thread-safe.
    """

    def __init__(
        self,
        link: Link,
        lifeline: Lifeline,
        attachment: Attachment,
        board: int,
        outbox: SharedOutbox,
        *,
        fast: bool,
    ) -> None:
        self._link = link
        self.attachment = attachment
        self.layout = attachment.layout
        self._lifeline = lifeline
        self._boards = BoardPool(lifeline, board, partial(_ask_for_board, link))
        self._hints: Hints | None = None
        self._mapping = pa.py_buffer(attachment.read_map)
        self.address = self._mapping.address
        self._pages = Pages(attachment)
        self.reader: FastReader | None = None
        """Reads without a message; None where the platform or the store does not allow it."""
        self.leasing: LeaseWriter | None = None
        """Puts without waiting; None likewise."""
        self.claims: Claimant | None = None
        """The same under ids that may be taken; None also if the store has given nothing to lock them by."""
        self.removal: Removal | None = None
        """Deletes without waiting; None as `reader`."""
        self.settling: Settling | None = None
        """Tells what is not there, likewise."""
        self.unread: Unread | None = None
        """Gets what the store has not read, likewise."""
        self.census: Census | None = None
        """Lists objects without a message, likewise."""
        if fast:
            absence = Absence(attachment)
            self.reader = FastReader(self.layout, attachment, self.address, self._boards)
            self.settling = Settling(attachment, absence, link, lifeline.wake_reading_store)
            self.census = Census(attachment, self.settling)
            self.removal = Removal(link, absence, self.settling, self.reader, attachment.marks)
            self.unread = Unread(attachment, absence, self._boards, self.reader.find)
            self._hints = Hints(attachment, board, outbox, self.unread)
            self.leasing = LeaseWriter(attachment, board, link, outbox, self._pages.populate)
            lifeline.isolate_lease = weakref.WeakMethod(self.leasing.isolate)
            if lifeline.locks is not None:
                self.claims = Claimant(
                    attachment,
                    absence,
                    lifeline.locks,
                    self._boards,
                    self.leasing,
                    link,
                    outbox,
                    self._hints,
                )
        self.asking = Asking(link, self._boards, self.reader, self._hints)
        """Gets what the store has to be asked for."""
        register(lifeline)

    @classmethod
    def open(
        cls,
        path: str,
        num_retries: int,
        name: str,
        when_lost: weakref.WeakMethod[Callable[[], None]],
    ) -> Session:
        """Connect to a store and attach its segment.

        Parameters
        ----------
        path, num_retries, name
            As for `shmplasma.handshake.greet`.
        when_lost : weakref.WeakMethod
            Called when the store, or what this client had in it, is gone for good.

        Raises
        ------
        NotConnectedError
            No store answers there.
        AttachError, LayoutError
            Its segment cannot be attached.
        """
        exchange, welcome = greet(path, num_retries, Role.CLIENT, name)
        try:
            wake_fd = exchange.take_descriptor()
            locks_fd = exchange.take_another()
            locks = None if locks_fd is None else LockFile(locks_fd)
            try:
                os.set_blocking(wake_fd, False)
                attachment = _attach(exchange, welcome)
            except BaseException:
                os.close(wake_fd)
                raise
        except BaseException:
            exchange.close()
            raise
        # Also with the fast path off: a release has to be ordered against the WAKE word.
        ordered = system.register_membarrier()
        fast = ordered and welcome.fast_path and system.fast_path_available()
        board = welcome.board
        lifeline = Lifeline(attachment, wake_fd, locks, path, name)
        count = (attachment.layout.control + board * CONTROL_BYTES) // 8 + ControlWord.ACKNOWLEDGED

        def header(word: HeaderWord) -> memoryview:
            return attachment.words[word : word + 1]

        # An embedded store that was killed is started again by nobody.
        returns = not Layout.scratch(attachment.words)
        outbox = SharedOutbox(
            attachment.outbox(board),
            attachment.words[count : count + 1],
            header(HeaderWord.POLLED) if ordered else _NEVER,
            header(HeaderWord.INCARNATION),
        )
        link = Link(
            path,
            Channel(exchange.detach()),
            name,
            board,
            attachment.token,
            outbox,
            weakref.WeakMethod(lifeline.renew),
            num_retries * RETRY_SECONDS if returns else 0,
            when_lost,
        )
        lifeline.connection = link
        return cls(link, lifeline, attachment, board, outbox, fast=fast)

    @property
    def patience_seconds(self) -> float:
        """How long a store that has died is waited for."""
        return self._link.patience_seconds

    @property
    def was_dropped(self) -> bool:
        """Whether the store has ended the connection, and said so; what this client holds stays its own until its last buffer has gone."""
        return self._link.channel.is_final

    @property
    def is_quiet(self) -> bool:
        """Whether nothing has come that was not read, the end of the connection included."""
        return self._link.channel.is_quiet

    # -- requests ------------------------------------------------------------------------------

    def call(self, request: Request, expected: type[_ReplyT]) -> _ReplyT:
        """Send a request and return its reply.

        Raises
        ------
        NotConnectedError
            The store has gone.
        ShmPlasmaError
            The store refused; the subclass says why.
        """
        return self._link.call(request, expected)

    def set_options(self, options: SetOptions) -> None:
        """Tell the store, and each that takes its place, how to treat this client."""
        self._link.options = options
        self._link.call(options, Done)

    def post(self, kind: int, body: bytes) -> None:
        """Tell the store something, and do not wait.

        Raises
        ------
        NotConnectedError
            The store has gone.
        """
        self._link.post(kind, body)

    def seal(self, object_id: ObjectID) -> None:
        """Tell the store that this client has completed an object, and who waits for it first."""
        written = None if self._hints is None else partial(self._hints.tell, object_id)
        self._link.post(_SEAL, object_id.id_bytes, written)
        if self.claims is not None:
            self.claims.unlock()

    def post_soon(self, kind: int, body: bytes) -> None:
        """Tell the store something from a finalizer."""
        self._link.post_soon(kind, body)

    def restate(self, holds: weakref.WeakMethod[Callable[[], Sequence[tuple[bytes, int]]]]) -> None:
        """Have a store that comes back told of what `holds` returns."""
        self._link.holds = holds

    def abort(self, object_id: bytes) -> None:
        """Ask for an object to be removed that this client has not sealed; errors as `Link.abort`."""
        self._link.abort(object_id)

    def create(
        self,
        object_id: bytes,
        data_size: int,
        metadata_size: int,
        codec: int,
        *,
        keep: bool,
        wait_seconds: float | None,
        fill: Callable[[npt.NDArray[np.uint8]], None],
    ) -> npt.NDArray[np.uint8]:
        """Make an object, have `fill` do something with its data followed by its metadata, and return those.

        It waits for room as long as `wait_seconds` says; None for ever.  If it raises, `fill` included, the object is aborted,
        unless it is sealed by then.

        Returns
        -------
        ndarray of uint8, shape (data_size + metadata_size,)
            Writable; keeps the object's memory reserved for as long as it, or a view of it, lives.

        Raises
        ------
        PlasmaObjectExists, PlasmaStoreFull, NotConnectedError
        """
        pins = self._boards.take(1)
        aborted = False

        def undo(frame: Frame) -> None:
            if frame.kind == Created.KIND and pins and not aborted:
                self.post_soon(Abort.KIND, object_id)
            pins.clear()

        end = None if wait_seconds is None else time.monotonic() + wait_seconds
        timeout_ns = -1 if wait_seconds is None else ceil(wait_seconds * 1e9)
        request = Create(object_id, data_size, metadata_size, codec, pins[0].slot, keep, timeout_ns)

        def again() -> Create:
            pins[0].clear()
            if end is None:
                return request
            return request._replace(timeout_ns=ceil(max(0.0, end - time.monotonic()) * 1e9))

        may_wait = timeout_ns != 0
        try:
            offset = self._link.call(request, Created, undo, again, may_wait=may_wait).offset
            size = data_size + metadata_size
            if size >= POPULATE_BYTES:
                self._pages.populate(offset, size)
            start = offset - self.layout.data
            writable = Writable((size,), np.uint8, self.attachment.write_map, start)
            writable.pin = pins[0]
            fill(writable)
        except BaseException:
            # The store has pinned what it has granted, heard of or not, and writes to the slot no more.
            if any(pin.is_set for pin in pins):
                aborted = True
                self.post_soon(Abort.KIND, object_id)
                pins.clear()
            raise
        return writable

    async def get_async(
        self, object_ids: Sequence[bytes], deadline: float | None, *, wait: bool
    ) -> list[Located | None]:
        """Find and pin objects as `get` does, without holding up the event loop."""
        if not wait and self.settling is not None and self.settling.are_absent_now(object_ids):
            return [None] * len(object_ids)
        from shmplasma import aio  # noqa: PLC0415 - asyncio takes 30 ms to import

        return await aio.get(self._link, self._boards, object_ids, deadline, wait=wait)

    # -- memory --------------------------------------------------------------------------------

    def data(self, located: Located) -> pa.Buffer:
        """Return a read-only buffer over an object's data, which keeps its pin."""
        return pa.foreign_buffer(self.address + located[0], located[1], located[4])

    def pinned_at(self, address: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield id, offset and data size of the objects that this client pins and that cover an address."""
        at = address - self.address
        layout = self.layout
        if not layout.data <= at < layout.segment_bytes:
            return
        held = self._lifeline.pinned_words()
        found: set[bytes] = set()
        # Before the table, where an object is when it is not unread any more.
        if self.unread is not None:
            for object_id, offset, size in self.unread.lying_at(at):
                if pin_word(crc32(object_id), offset) in held:
                    found.add(object_id)
                    yield object_id, offset, size
        words = self.attachment.words
        by_offset = OffsetPins(layout, words)
        for word in held:
            entry = word - 1 if word <= layout.n_entries else by_offset.entry(word)
            if entry < 0:
                continue
            start = layout.entry(entry)
            offset = words[start // 8 + EntryWord.OFFSET]
            size = words[start // 8 + EntryWord.DATA_SIZE]
            if offset <= at < offset + size:
                object_id, _ = ID_FIELD.unpack_from(
                    self.attachment.read_map, start + EntryWord.ID * 8
                )
                if object_id not in found:
                    found.add(object_id)
                    yield object_id, offset, size

    def give_back(self, address: int, size_bytes: int) -> int:
        """Take pages of the data region out of this process's mappings; return how many bytes.

        They stay in the segment, and are mapped again when they are touched.  Huge pages are left alone: nobody counts
        them as a process's memory.
        """
        layout, page = self.layout, self.layout.page_bytes
        start = max(address - self.address, layout.data)
        end = min(address - self.address + size_bytes, layout.segment_bytes)
        start, end = align_up(start, page), end & -page
        if start >= end or page != mmap.PAGESIZE or not hasattr(mmap, "MADV_DONTNEED"):
            return 0
        self.attachment.read_map.madvise(mmap.MADV_DONTNEED, start, end - start)
        self._pages.give_back(start, end - start)
        return end - start

    def private(self, located: Located) -> pa.Buffer:
        """Return a writable buffer over an object's data, of which only changed pages are copied."""
        offset, size, _, _, pin = located
        if not size:
            return self.data(located)
        writable = Writable((size,), np.uint8, self.attachment.private(offset, size))
        writable.pin = pin
        return pa.py_buffer(writable.data)

    def metadata(self, located: Located) -> pa.Buffer:
        """Return a read-only buffer over an object's metadata, which keeps its pin."""
        offset, data_size, metadata_size, _, pin = located
        return pa.foreign_buffer(self.address + offset + data_size, metadata_size, pin)

    # -- the end -------------------------------------------------------------------------------

    def detach(self) -> None:
        """Drop what was not sealed and end all requests; buffers stay as they are."""
        self._link.leave()


def _ask_for_board(link: Link) -> int:
    return link.call(Grow(), Number).value


def _attach(exchange: Exchange, welcome: Welcome) -> Attachment:
    """Attach by name, or by descriptor where the name is not this process's to see."""
    if welcome.segment_kind not in ("posix", "file"):
        raise ProtocolError(f"a segment of the unknown kind {welcome.segment_kind!r}")
    kind: Literal["posix", "file"] = "posix" if welcome.segment_kind == "posix" else "file"
    with suppress(AttachError):
        return Attachment.open(SegmentName(kind, welcome.segment_path), welcome.token)
    expect(Done, exchange.call(Attach.KIND, Attach().encode()))
    return Attachment.from_fd(exchange.take_descriptor(), welcome.token)
