"""What a client does for an event loop: waits without holding it up, and without a thread for each wait.

A get that has to wait is the same request as any other, on the same connection, with the same pins.  Only the
ways in and out differ:

*Out.*  Messages are sent as far as the socket takes them; for the rest the loop waits until it takes more.  So a
store that does not read holds up no loop.

*In.*  While a task of it waits, the loop watches the socket, and reads when no thread does.  Whichever of them reads
a reply has it handed to its task.  Nobody needs the other: a thread that waits reads for itself while the loop
is busy, and the loop needs no thread.  (A thread of ours that read for the loop would lead all others, and
each of their replies would take one more change of threads; a thread for each wait is what tasks are to avoid.)

*Time* is the loop's: at the deadline it asks for the answer, as threads do.

What may block and is seldom needed has a thread for as long as it takes, one for all tasks that wait for it: a
store that died is waited for, one more board is asked for, a connection is made.  It is not one of the loop's
own threads, which may all be waiting for a task that waits for this.

A task that is cancelled asks for its answer and waits for it, for `_GIVE_UP_SECONDS` at most, so that the store
has forgotten its get when the cancellation is through.  A coroutine that is closed can only ask.  The pins are lent to
the store until the answer comes, and its reader lets them go.

Invariants
----------
* A loop watches a channel while it waits for replies from it, or has something to send to it, and no longer.
* What belongs to a loop is touched by its thread alone; other threads call into it.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar

from shmplasma.link import Link
from shmplasma.notifications import LENGTH_BYTES, Subscription, decode
from shmplasma.objects import ObjectID
from shmplasma.outcomes import expect
from shmplasma.pinning import BoardPool, Located, Pin, located
from shmplasma.protocol import ONE_WAY, Frame, encode_frame
from shmplasma.replies import Objects
from shmplasma.requests import AnswerNow, Get
from shmplasma.transport import Channel

__all__ = ["get", "notifications", "off_loop"]

_GIVE_UP_SECONDS: Final = 0.1
_READ_BYTES: Final = 1 << 16

_T = TypeVar("_T")


async def get(
    link: Link,
    boards: BoardPool,
    object_ids: Sequence[bytes],
    deadline: float | None,
    *,
    wait: bool,
) -> list[Located | None]:
    """Find and pin objects by the store.

    Parameters
    ----------
    link : Link
        The connection.
    boards : BoardPool
        The client's boards.
    object_ids, deadline, wait
        As for `shmplasma.asking.Asking.get`, as are result and errors.
    """
    ours = _of_running_loop()
    pins = boards.take_free(len(object_ids))
    while len(pins) < len(object_ids):
        await ours.once(boards, boards.with_room)
        pins += boards.take_free(len(object_ids) - len(pins))
    request = Get(wait, object_ids, [pin.slot for pin in pins])
    while True:
        channel = link.channel
        frame = await ours.courier(channel).ask(request, deadline, pins)
        if frame is not None:
            return located(expect(Objects, frame).found, pins)
        await ours.once(channel, partial(link.reconnect, channel, ConnectionError(channel.error)))
        for pin in pins:  # the dead store may have pinned something
            pin.clear()


class _OfLoop:
    """What tasks of one event loop share.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
        The running one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._couriers: dict[Channel, _Courier] = {}
        self._running: dict[object, asyncio.Future[Any]] = {}

    def courier(self, channel: Channel) -> _Courier:
        """Return what asks over a channel."""
        courier = self._couriers.get(channel)
        if courier is None:
            leave = partial(self._couriers.pop, channel)
            courier = self._couriers[channel] = _Courier(self._loop, channel, leave)
        return courier

    async def once(self, key: object, function: Callable[[], object]) -> None:
        """Run what may block in a thread, once for all tasks that need it at this time."""
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = off_loop(function)
            running.add_done_callback(lambda _: self._running.pop(key))
        await asyncio.shield(running)


_loops: Final[weakref.WeakValueDictionary[asyncio.AbstractEventLoop, _OfLoop]] = (
    weakref.WeakValueDictionary()
)
"""As long as a task needs it: a loop that was closed meanwhile keeps its coroutines by nothing else."""


def _of_running_loop() -> _OfLoop:
    loop = asyncio.get_running_loop()
    ours = _loops.get(loop)
    if ours is None:
        ours = _loops[loop] = _OfLoop(loop)
    return ours


class _Courier:
    """Gets of the tasks of one event loop over one channel.

    Parameters
    ----------
    loop : asyncio.AbstractEventLoop
        The running one.
    channel : Channel
        Whom to ask.
    leave : callable
        Called when there is nothing left to do; the next `ask` is another courier's.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, channel: Channel, leave: Callable[[], object]
    ) -> None:
        self._loop = loop
        self._channel = channel
        self._fd = channel.fileno()
        self._leave = leave
        self._waiting: dict[int, asyncio.Future[Frame | None]] = {}
        self._unsent: list[bytes] = []
        self._is_full = False
        loop.add_reader(self._fd, self._read)

    async def ask(self, request: Get, deadline: float | None, pins: Sequence[Pin]) -> Frame | None:
        """Send a get and return its answer, or None when the connection has ended; at the deadline ask for it."""
        request_id = self._channel.new_request()
        answer_now = encode_frame(AnswerNow.KIND, ONE_WAY, AnswerNow(request_id).encode())
        answer: asyncio.Future[Frame | None] = self._loop.create_future()
        self._waiting[request_id] = answer
        timer: asyncio.TimerHandle | None = None
        try:
            self._channel.give_up(request_id, partial(self._hand_over, request_id, list(pins)))
            self._send(encode_frame(Get.KIND, request_id, request.encode()))
            if request.wait and deadline is not None:
                left = max(0.0, deadline - time.monotonic())
                timer = self._loop.call_later(left, self._send, answer_now)
            return await answer
        except asyncio.CancelledError:
            if answer.cancelled():
                withdrawn = self._waiting[request_id] = self._loop.create_future()
                self._send(answer_now)
                await asyncio.wait((withdrawn,), timeout=_GIVE_UP_SECONDS)
            raise
        except GeneratorExit:  # the loop may have been closed before
            with suppress(ConnectionError):
                self._channel.offer([answer_now])
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if self._channel.error:
                # No reply will come, and what was to be done with one keeps the pins.
                self._channel.drop(request_id)
            del self._waiting[request_id]
            self._leave_if_idle()

    # -- out -----------------------------------------------------------------------------------

    def _send(self, message: bytes) -> None:
        self._unsent.append(message)
        if not self._is_full:
            self._flush()

    def _flush(self) -> None:
        """Send what can be sent, and the rest when the socket takes it."""
        try:
            is_full = not self._channel.offer(self._unsent)
        except ConnectionError:
            self._end()
            return
        if is_full and not self._is_full:
            self._loop.add_writer(self._fd, self._flush)
        elif self._is_full and not is_full:
            self._loop.remove_writer(self._fd)
        self._is_full = is_full
        self._leave_if_idle()

    # -- in ------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Read for all, unless a thread does."""
        self._channel.read_until(0.0, lambda: False)
        if self._channel.error:
            self._end()

    def _hand_over(self, request_id: int, _lent: list[Pin], frame: Frame) -> None:
        """Give a reply to who waits for it; called by whoever has read it.  The slots were lent until now."""
        with suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._answer, request_id, frame)

    def _answer(self, request_id: int, frame: Frame | None) -> None:
        future = self._waiting.get(request_id)
        if future is not None and not future.done():
            future.set_result(frame)

    # -- the end -------------------------------------------------------------------------------

    def _end(self) -> None:
        """Tell all that the connection has ended."""
        self._unsent.clear()
        self._is_full = False
        self._loop.remove_writer(self._fd)
        self._loop.remove_reader(self._fd)
        for request_id in tuple(self._waiting):
            self._answer(request_id, None)
        self._leave_if_idle()

    def _leave_if_idle(self) -> None:
        if not self._waiting and not self._is_full:
            self._loop.remove_reader(self._fd)
            self._leave()


def off_loop(function: Callable[[], _T]) -> asyncio.Future[_T]:
    """Run what may block in a thread of its own, and return its result as a future of the running loop."""
    executor = ThreadPoolExecutor(1, "shmplasma")
    future = asyncio.get_running_loop().run_in_executor(executor, function)
    executor.shutdown(wait=False)
    return future


async def notifications(
    subscribe: Callable[[], Subscription],
) -> AsyncGenerator[tuple[ObjectID, int, int], None]:
    """Yield notifications as they come.

    Parameters
    ----------
    subscribe : callable
        Makes the subscription, which is ended with the generator.

    Yields
    ------
    tuple of ObjectID, int, int
        As `shmplasma.client.PlasmaClient.get_next_notification` returns them.

    Raises
    ------
    NotConnectedError
        The store has gone, or has dropped a subscriber that did not keep up.

    Warns
    -----
    RuntimeWarning
        It has died and come back; see `shmplasma.notifications.Subscription.renew`.
    """
    loop = asyncio.get_running_loop()
    subscription = await off_loop(subscribe)
    try:
        while True:
            subscription.sock.setblocking(False)
            received = b""
            with suppress(ConnectionResetError):
                while data := await loop.sock_recv(subscription.sock, _READ_BYTES):
                    received += data
                    # As long as there is more, nothing else would let other tasks run.
                    await asyncio.sleep(0)
                    while len(received) >= LENGTH_BYTES:
                        end = LENGTH_BYTES + int.from_bytes(received[:LENGTH_BYTES], "little")
                        if len(received) < end:
                            break
                        records = decode(received[LENGTH_BYTES:end])
                        received = received[end:]
                        for record in zip(*records, strict=True):
                            yield record
            await off_loop(subscription.renew)
    finally:
        subscription.close()
