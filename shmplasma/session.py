"""A client's session with a store: its connection, its view of the segment, and its boards.

The session answers what needs no message from the segment itself (`shmplasma.reader`) and asks the store for
the rest.  It belongs to one `shmplasma.client.PlasmaClient`; what must outlast it is in its `Lifeline`, which
every pin keeps.  So the mapping and the connection live as long as the last buffer, and what a buffer shows
cannot be given away before: not when the client is closed, not when it is collected.  A client that is
closed *detaches*: the store drops what it had not sealed and answers it no more, but leaves it its boards;
the connection ends with the lifeline.

Fork
----
A child has the parent's mappings, hence its boards, and the pins of buffers that it inherited.  Before the
child runs anything else, each lifeline puts private memory in the place of the boards' mappings
(`Attachment.isolate`), and the child's copy of the connection is closed: whatever a finalizer of the child
writes, the parent's pins stay.  The client connects anew at its next use.

Interrupts
----------
A request that is interrupted (Ctrl-C) leaves a reply behind, and the slots that it lent are the store's
until then.  The disposal of the reply gives them back, and undoes what the store has done meanwhile.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, Literal, TypeVar, assert_never

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shmplasma import system
from shmplasma.arrow_errors import (
    NotConnectedError,
    PlasmaObjectAlreadySealed,
    PlasmaObjectExists,
    PlasmaObjectNotFound,
    PlasmaStoreFull,
)
from shmplasma.errors import AttachError, ProtocolError, ShmPlasmaError
from shmplasma.leasing import LeaseWriter
from shmplasma.pinning import BoardPool, Lifeline, Located, Pin
from shmplasma.protocol import PROTOCOL_VERSION, Frame
from shmplasma.reader import FastReader
from shmplasma.replies import (
    ABSENT,
    Created,
    Done,
    Failed,
    Failure,
    Leased,
    Number,
    Objects,
    Reply,
    Welcome,
    decode_reply,
)
from shmplasma.requests import (
    Abort,
    AnswerNow,
    AskLease,
    Attach,
    Create,
    Detach,
    Get,
    Grow,
    Hello,
    Publish,
    Request,
    Role,
)
from shmplasma.segment import Attachment, SegmentName
from shmplasma.transport import Channel, Exchange

__all__ = ["Session", "expect", "gone", "greet"]

_HANDSHAKE_SECONDS: Final = 10.0
_GIVE_UP_SECONDS: Final = 0.1
"""How long a get that was interrupted waits for its last answer, which usually takes 0.1 ms."""

_POPULATE_BYTES: Final = 256 << 10
"""Objects from this size on have their pages mapped in one call before they are filled: writing through
fresh page-table entries runs at 1.2-3.6 GB/s, filling them in advance at 18 GB/s."""

_ReplyT = TypeVar("_ReplyT", bound=Reply)

_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


class _Writable(np.ndarray[tuple[int], np.dtype[np.uint8]]):
    """Bytes of the segment that keep a pin."""

    pin: Pin


def greet(path: str, num_retries: int, role: Role, name: str) -> tuple[Exchange, Welcome]:
    """Connect to the store at a path and introduce this process.

    Parameters
    ----------
    path : str
        The store's socket.
    num_retries : int
        How often to try again, 0.1 s apart.
    role : Role
        What the connection is for.
    name : str
        What the store is to call this client in its messages.

    Raises
    ------
    NotConnectedError
        No store answers there.
    """
    try:
        exchange = Exchange.connect(path, num_retries, _HANDSHAKE_SECONDS)
    except OSError as error:
        raise NotConnectedError(
            f"no store answers at {path!r} ({error}); start one with: shmplasma-store -s {path}"
        ) from error
    pid = os.getpid()
    hello = Hello(PROTOCOL_VERSION, role, pid, system.start_time(pid) or 0, name)
    try:
        return exchange, expect(Welcome, exchange.call(Hello.KIND, hello.encode()))
    except (OSError, ProtocolError) as error:
        exchange.close()
        if isinstance(error, NotConnectedError):
            raise
        raise NotConnectedError(f"what listens at {path!r} is no store: {error}") from error


class Session:
    """A connection, the segment, and the boards that the store has granted.

    Use `Session.open`.

    Notes
    -----
    Thread-safe.
    """

    def __init__(
        self, channel: Channel, wake_fd: int, attachment: Attachment, board: int, *, fast: bool
    ) -> None:
        self._channel = channel
        self.attachment = attachment
        self.layout = attachment.layout
        self._lifeline = Lifeline(attachment, channel, wake_fd)
        self._boards = BoardPool(self._lifeline, board, partial(_ask_for_board, channel))
        self._mapping = pa.py_buffer(attachment.read_map)
        self.address = self._mapping.address
        self._pages = _Pages(attachment)
        self.reader: FastReader | None = None
        """Reads without a message; None where the platform or the store does not allow it."""
        self.leasing: LeaseWriter | None = None
        """Puts without waiting; None likewise."""
        if fast:
            self.reader = FastReader(self.layout, attachment, self.address, self._boards)
            self.leasing = LeaseWriter(
                attachment, board, partial(_ask_for_lease, channel), self._pages.populate
            )
        _sessions.add(self)

    @classmethod
    def open(cls, path: str, num_retries: int, name: str) -> Session:
        """Connect to a store and attach its segment.

        Parameters are those of `greet`.

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
        channel = Channel(exchange.detach())
        return cls(channel, wake_fd, attachment, welcome.board, fast=fast)

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
        return expect(expected, _call(self._channel, request.KIND, request.encode(), _no_disposal))

    def send(self, message: Request) -> None:
        """Send a one-way message.

        Raises
        ------
        NotConnectedError
            The store has gone.
        """
        try:
            self._channel.send(message.KIND, message.encode())
        except ConnectionError as error:
            raise gone(error) from error

    def publish(self, body: bytes) -> None:
        """Announce an object in the lease under a fresh id; `body` is a `Publish`.

        Raises
        ------
        NotConnectedError
            The store has gone.
        """
        try:
            self._channel.send(Publish.KIND, body)
        except ConnectionError as error:
            raise gone(error) from error

    def publish_and_wait(self, body: bytes) -> None:
        """Announce an object in the lease under an id that somebody may have chosen before.

        Raises
        ------
        PlasmaObjectExists
            Somebody has.
        NotConnectedError
            The store has gone.
        """
        expect(Done, _call(self._channel, Publish.KIND, body, _no_disposal))

    def create(
        self, object_id: bytes, data_size: int, metadata_size: int, codec: int
    ) -> npt.NDArray[np.uint8]:
        """Make an object and return its data followed by its metadata, to be filled.

        Returns
        -------
        ndarray of uint8, shape (data_size + metadata_size,)
            Writable; keeps the object's memory reserved for as long as it, or a view of it, lives.

        Raises
        ------
        PlasmaObjectExists, PlasmaStoreFull, NotConnectedError
        """
        (pin,) = self._boards.take(1)

        def undo(frame: Frame) -> None:
            nonlocal pin
            del pin
            if frame.kind == Created.KIND:
                self.send(Abort(object_id))

        body = Create(object_id, data_size, metadata_size, codec, pin.slot).encode()
        offset = expect(Created, _call(self._channel, Create.KIND, body, undo)).offset
        size = data_size + metadata_size
        if size >= _POPULATE_BYTES:
            try:
                self._pages.populate(offset, size)
            except OSError:
                self.send(Abort(object_id))
                raise
        start = offset - self.layout.data
        writable = _Writable((size,), np.uint8, self.attachment.write_map, start)
        writable.pin = pin
        return writable

    def get(
        self, object_ids: Sequence[bytes], deadline: float | None, *, wait: bool
    ) -> list[Located | None]:
        """Find and pin objects.

        Parameters
        ----------
        object_ids : sequence of bytes
            Which; any of them more than once if need be.
        deadline : float or None
            Time of `time.monotonic` until which to wait for those that are not there; None for ever.
        wait : bool
            Whether to wait at all.

        Returns
        -------
        list
            Location and pin of each object, None for one that is not there.

        Raises
        ------
        NotConnectedError, PlasmaStoreFull
            The latter when there is no board for so many pins.
        """
        pins = self._boards.take(len(object_ids))
        request = Get(wait, object_ids, [pin.slot for pin in pins])
        try:
            frame = self._exchange_get(request, deadline, pins)
        except ConnectionError as error:
            raise gone(error) from error
        found = expect(Objects, frame).found
        # A pin that was not used dies here, which gives its slot back.
        return [
            None if where == ABSENT else (*where, pin)
            for where, pin in zip(found, pins, strict=True)
        ]

    def _exchange_get(self, request: Get, deadline: float | None, pins: list[Pin]) -> Frame:
        """Send a get and wait for its answer; at the deadline, or an interrupt, ask for it at once."""
        channel = self._channel
        body = request.encode()
        request_id = channel.new_request()
        answer_now = AnswerNow(request_id).encode()
        try:
            channel.request(Get.KIND, request_id, body)
            # One that is not to wait is answered by the store's next turn, without being asked again.
            reply = channel.wait(request_id, deadline if request.wait else None)
            if reply is None:
                channel.send(AnswerNow.KIND, answer_now)
                reply = channel.wait(request_id, None)
        except ConnectionError:
            raise
        except BaseException:
            with suppress(ConnectionError):  # the interrupt is what the caller is to see
                # The slots are lent until the answer comes; then the last reference to them goes.
                lent = pins.copy()
                channel.give_up(request_id, lambda _: lent.clear())
                channel.send(AnswerNow.KIND, answer_now)
                channel.read_until(time.monotonic() + _GIVE_UP_SECONDS, lambda: not lent)
            raise
        assert reply is not None
        return reply

    # -- memory --------------------------------------------------------------------------------

    def data(self, located: Located) -> pa.Buffer:
        """Return a read-only buffer over an object's data, which keeps its pin."""
        return pa.foreign_buffer(self.address + located[0], located[1], located[4])

    def metadata(self, located: Located) -> pa.Buffer:
        """Return a read-only buffer over an object's metadata, which keeps its pin."""
        offset, data_size, metadata_size, _, pin = located
        return pa.foreign_buffer(self.address + offset + data_size, metadata_size, pin)

    # -- the end -------------------------------------------------------------------------------

    def detach(self) -> None:
        """Drop what was not sealed and end all requests; buffers stay as they are."""
        with suppress(NotConnectedError):
            self.call(Detach(), Done)
        self._channel.retire()

    def isolate(self) -> None:
        """Cut a forked child off from its parent's boards and connection."""
        self._lifeline.isolate()
        self._channel.abandon()


class _Pages:
    """Remembers which pages of the data region this process has mapped for writing."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._populated = bytearray(attachment.layout.data_bytes // _POPULATE_BYTES + 1)

    def populate(self, offset: int, size_bytes: int) -> None:
        """Have the pages of an object mapped in one go, unless they are already.

        Notes
        -----
        Goes by whole chunks: memory is committed in multiples of them, so that none has a page which
        cannot be had.
        """
        start = offset - self._attachment.layout.data
        first, last = start // _POPULATE_BYTES, -(-(start + size_bytes) // _POPULATE_BYTES)
        if 0 not in self._populated[first:last]:
            return
        start, end = first * _POPULATE_BYTES, last * _POPULATE_BYTES
        mapping = np.frombuffer(self._attachment.write_map, np.uint8)
        if system.populate(mapping.ctypes.data + start, min(end, mapping.size) - start):
            self._populated[first:last] = b"\1" * (last - first)


def _ask_for_lease(channel: Channel, needed_bytes: int) -> Leased:
    return expect(
        Leased, _call(channel, AskLease.KIND, AskLease(needed_bytes).encode(), _no_disposal)
    )


def _call(channel: Channel, kind: int, body: bytes, dispose: Callable[[Frame], None]) -> Frame:
    """Send a request and wait; if that is interrupted, let `dispose` have the reply."""
    try:
        request_id = channel.new_request()
        try:
            channel.request(kind, request_id, body)
            reply = channel.wait(request_id, None)
        except ConnectionError:
            raise
        except BaseException:
            channel.give_up(request_id, dispose)
            raise
    except ConnectionError as error:
        raise gone(error) from error
    assert reply is not None
    return reply


def _ask_for_board(channel: Channel) -> int:
    return expect(Number, _call(channel, Grow.KIND, b"", _no_disposal)).value


def _attach(exchange: Exchange, welcome: Welcome) -> Attachment:
    """Attach by name, or by descriptor where the name is not this process's to see."""
    if welcome.segment_kind not in ("posix", "file"):
        raise ProtocolError(f"a segment of the unknown kind {welcome.segment_kind!r}")
    kind: Literal["posix", "file"] = "posix" if welcome.segment_kind == "posix" else "file"
    with suppress(AttachError):
        return Attachment.open(SegmentName(kind, welcome.segment_path), welcome.token)
    expect(Done, exchange.call(Attach.KIND, Attach().encode()))
    return Attachment.from_fd(exchange.take_descriptor(), welcome.token)


def expect(expected: type[_ReplyT], frame: Frame) -> _ReplyT:
    """Return the reply in a frame, or raise what the store refused with."""
    reply = decode_reply(frame)
    if isinstance(reply, Failed):
        raise _refusal(reply)
    if not isinstance(reply, expected):
        raise ProtocolError(f"the store answered with {type(reply).__name__}")
    return reply


def _refusal(failed: Failed) -> ShmPlasmaError:
    match failed.failure:
        case Failure.EXISTS:
            return PlasmaObjectExists(failed.text)
        case Failure.NOT_FOUND:
            return PlasmaObjectNotFound(failed.text)
        case Failure.SEALED:
            return PlasmaObjectAlreadySealed(failed.text)
        case Failure.FULL | Failure.OVER_QUOTA | Failure.NO_BOARD:
            return PlasmaStoreFull(
                failed.text,
                failed.requested_bytes,
                failed.free_bytes,
                failed.largest_bytes,
                failed.pinned_bytes,
                failed.unsealed_bytes,
            )
        case Failure.VERSION:
            return NotConnectedError(failed.text)
        case _:
            assert_never(failed.failure)


def gone(error: ConnectionError) -> NotConnectedError:
    """Return what a user is to see when the connection has ended."""
    return NotConnectedError(f"the connection to the store has ended: {error}")


def _no_disposal(_: Frame) -> None:
    """Drop a reply that nobody waits for and that holds nothing."""


def _after_fork_in_child() -> None:
    for session in list(_sessions):
        session.isolate()


os.register_at_fork(after_in_child=_after_fork_in_child)
