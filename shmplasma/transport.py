"""The client's end of a connection: many threads, one socket, one reply to each request.

Threads that wait for replies share the socket as leader and followers.  Whoever gets the reading lock reads frames for all, hands
each reply to its request, and releases the lock when its own has come.  So no thread of ours runs beside the user's, one waiter costs
no hand-over, and a get that blocks for an hour holds up nobody.  Who has led wakes all followers, and each tries to lead: the thread of
any of them may stand in a signal handler, which itself waits for what the others would read.

Interrupts
----------
A signal handler (Ctrl-C) may raise between any two byte codes of the main thread, thus also after a socket call has moved bytes and
before its result is stored.  Therefore each such call is made by a C loop, ``list.extend(map(call, ...))``, which stores that first.

A request that is given up leaves its reply to whoever reads next; `Channel.give_up` says what is to be done with it then.  That is
done while reading, so it may not ask, and what it tells the store waits for nothing.  Who reads keeps a reply, then looks whether it is
given up; who gives up says so, then looks whether it is kept.  So one of them sees the other, and who takes the reply out disposes of
it.  What is to be done is forgotten last, as an interrupt has the same replies handed out once more; twice does no harm.  An event loop
gives its requests up before it sends them: it reads when the socket has something, and is called by whichever thread reads it (`shmplasma.aio`).

Hints
-----
A get may hear of its object from somebody else than the store (`shmplasma.hints`).  Where a channel has an `ear`, whoever reads
listens to that as well, and a hint is handed to its request as a reply would be; the reply comes nevertheless.
"""

from __future__ import annotations

import errno
import itertools
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final

from shmplasma.ear import Ear
from shmplasma.errors import ProtocolError
from shmplasma.hints import HINT
from shmplasma.nesting import NESTED, is_inside
from shmplasma.protocol import MAX_REPLY_BYTES, ONE_WAY, Frame, encode_frame, split_frames
from shmplasma.replies import Failed, decode_reply
from shmplasma.requests import Post
from shmplasma.spin import Spin

__all__ = ["Channel"]

_READ_BYTES: Final = 1 << 18
_DONT_WAIT: Final = int(socket.MSG_DONTWAIT)
_LAST_WORDS_SECONDS: Final = 0.1
"""To read a connection that has ended takes far less, unless each of two waits for the other."""
_ANNOUNCEMENT: Final = encode_frame(Post.KIND, ONE_WAY, b"")
_SENDING: Final = frozenset(("_send", "_try_push"))
_READING: Final = frozenset(("_try_lead", "read_until", "hear_out"))
"""Who takes the locks."""
_MISHEARD: Final = 1000
"""After so many hints in a row at nothing that anybody waits for, somebody sends nonsense, and nobody listens any more."""
_NO_MEMORY: Final = (errno.ENOBUFS, errno.ENOMEM)
_TRIES, _PAUSE_SECONDS = 100, 0.01
"""How often the system is asked for memory for a message, and how far apart."""
_MAX_REQUEST_ID: Final = 0xFFFF_FFFF


class Channel:
    """Requests and replies over a connected stream socket.

    Parameters
    ----------
    sock : socket.socket
        Connected and blocking; the channel owns it from now on.
    first : bytes, optional
        What is to be sent before whatever is sent first.

    Notes
    -----
    Thread-safe.  Sending and waiting raise ConnectionError once the other end has gone.  The socket is closed when the channel is collected.
    """

    def __init__(self, sock: socket.socket, first: bytes = b"") -> None:
        self._sock = sock
        self._spin = Spin()
        self._sending = threading.Lock()
        self._reading = threading.Lock()
        self._outgoing: tuple[bytes, list[int]] = (first, [])
        self._later: deque[bytes] = deque()
        self._received: list[bytes] = []
        self._ids = itertools.count()
        self._replies: dict[int, Frame] = {}
        self._waiters: dict[int, SimpleQueue[None]] = {}
        self._given_up: dict[int, Callable[[Frame], None]] = {}
        self._hints: dict[int, list[bytes]] = {}
        self._ear: Ear | None = None
        self._misheard = 0
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._error = ""
        self.is_final = False
        """Whether the end, once it has come, is one after which nobody is to connect again."""

    # -- sending -------------------------------------------------------------------------------

    def send(self, kind: int, body: bytes) -> None:
        """Send a one-way message; inside another call that is sending, have that send it."""
        if self._sending.locked() and is_inside(self, _SENDING):
            self.send_soon(kind, body)
        else:
            self._send(encode_frame(kind, ONE_WAY, body))

    def send_soon(self, kind: int, body: bytes) -> None:
        """Send a one-way message from a finalizer, which may have come in the middle of another one; say nothing if the other end has gone.

        It takes no lock that somebody has: whoever is sending sends it afterwards.
        """
        self._later.append(encode_frame(kind, ONE_WAY, body))
        with suppress(ConnectionError):
            self._send_later()

    def announce(self) -> None:
        """Send an empty message, which says that there is something in the outbox, from anywhere; a full socket has unread ones, each of which says it."""
        if self._try_push([_ANNOUNCEMENT], _DONT_WAIT) is None:
            self._later.append(_ANNOUNCEMENT)
        self._send_later()

    def _send_later(self) -> None:
        while self._later and self._try_push([]) is not None:
            pass

    def _try_push(self, messages: list[bytes], flags: int = 0) -> bool | None:
        """Take these out of their list and push them, unless somebody else is at it: then return None."""
        acquired: list[bool] = []
        is_sent: bool | None = None
        try:
            acquired.extend(map(self._sending.acquire, (False,)))
            if acquired[0]:
                data = b"".join(messages)
                messages.clear()
                is_sent = self._push(data, flags)
        finally:
            if acquired and acquired[0]:
                self._sending.release()
        return is_sent

    def new_request(self) -> int:
        """Return an id for a request that is about to be sent; RuntimeError if a call of this thread would have to go on first."""
        if self.is_entered:
            raise RuntimeError(NESTED)
        return next(self._ids) % _MAX_REQUEST_ID + 1

    @property
    def is_entered(self) -> bool:
        """Whether this thread is reading or sending already, and was interrupted in it."""
        if not (self._reading.locked() or self._sending.locked()):
            return False
        return is_inside(self, _SENDING | _READING)

    @property
    def ear(self) -> Ear | None:
        """What hears hints, if anything does."""
        return self._ear

    @ear.setter
    def ear(self, ear: Ear | None) -> None:
        self._ear = ear
        if ear is not None and ear.is_open:
            self._poll.register(ear, select.POLLIN)

    def expect_hint(self, request_id: int) -> None:
        """Let `wait_or_hear` return a hint as well, instead of the reply, until `wait`, `drop` or `give_up`."""
        self._hints[request_id] = []

    def request(self, kind: int, request_id: int, body: bytes, taken: list[None]) -> None:
        """Send a request; `taken` gets an item if there will be a reply, which an interrupt leaves to be given up."""
        self._send(encode_frame(kind, request_id, body), taken)

    def offer(self, messages: list[bytes]) -> bool:
        """Take messages out of the list, unless another thread is sending, and send what the socket takes; tell whether nothing is left."""
        is_sent = self._try_push(messages, _DONT_WAIT)
        self._send_later()
        return bool(is_sent)

    def _send(self, data: bytes, taken: list[None] | None = None) -> None:
        with self._sending:
            self._push(data, 0, taken)
        self._send_later()

    def _push(self, data: bytes, flags: int = 0, taken: list[None] | None = None) -> bool:
        """Send this, holding the lock, and before it what waits, unless it is not to block; tell whether all was sent."""
        # Nobody comes back for what a full socket did not take of it.
        while self._later and not flags:
            data = self._later.popleft() + data
        if self._error:
            raise ConnectionError(self._error)
        unsent, sent = self._outgoing
        if unsent and sum(sent) < len(unsent):
            # What is to be sent first, or what an interrupt or a full socket kept from being sent.
            data = unsent[sum(sent) :] + data
        if taken is not None:
            taken += (None,)  # between this and the assignment below is no call, hence no interrupt
        tries = _TRIES
        while data:
            # One assignment changes what is to be sent and what of it has been: there is no moment at
            # which the two do not fit.
            sent = []
            self._outgoing = data, sent
            try:
                sent.extend(map(self._sock.send, (data,), (flags,)))
            except BlockingIOError:
                return False
            except OSError as error:
                tries -= 1
                if tries and error.errno in _NO_MEMORY:
                    time.sleep(_PAUSE_SECONDS)
                    continue
                self._fail(str(error))
                raise ConnectionError(str(error)) from error
            data = data[sum(sent) :]
        return True

    # -- receiving -----------------------------------------------------------------------------

    def wait(self, request_id: int, deadline: float | None) -> Frame | None:
        """Wait as `wait_or_hear` does, and hear no hints any more."""
        self._hints.pop(request_id, None)
        reply = self.wait_or_hear(request_id, deadline)
        assert not isinstance(reply, bytes)
        return reply

    def wait_or_hear(self, request_id: int, deadline: float | None) -> Frame | bytes | None:
        """Wait for the reply to a request; it is kept until `drop`, so that an interrupt does not lose it.

        Parameters
        ----------
        request_id : int
            As `request` returned it.
        deadline : float or None
            Time of `time.monotonic` to stop waiting at.

        Returns
        -------
        Frame, bytes or None
            The reply; or a hint, if one is expected; or None when the deadline came first: then wait once more, or `give_up`.
        """
        try:
            leading, reply = self._try_lead(request_id, deadline)
            return reply if leading else self._follow(request_id, deadline)
        except BaseException:
            self._pass_on()  # an interrupt may have come between the end of a lead and this
            raise

    def _follow(self, request_id: int, deadline: float | None) -> Frame | bytes | None:
        """Wait while others lead, and lead when they have left."""
        # The waiter is known before the lead is tried again: a leader who leaves in between wakes it.
        waiter: SimpleQueue[None] = SimpleQueue()
        self._waiters[request_id] = waiter
        try:
            while True:
                reply = self._reply_to(request_id)
                if reply is not None:
                    return reply
                leading, reply = self._try_lead(request_id, deadline)
                if leading:
                    return reply
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                try:
                    waiter.get(timeout=left)
                except Empty:
                    return self._reply_to(request_id)
        finally:
            del self._waiters[request_id]

    def _reply_to(self, request_id: int) -> Frame | bytes | None:
        reply = self._replies.get(request_id)
        if reply is None and (hints := self._hints.get(request_id)):
            return hints.pop(0)
        return reply

    def _try_lead(
        self, request_id: int, deadline: float | None
    ) -> tuple[bool, Frame | bytes | None]:
        """Read for all, if nobody else does; tell whether that was so, and the reply."""
        acquired: list[bool] = []
        try:
            acquired.extend(map(self._reading.acquire, (False,)))
            if not acquired[0]:
                return False, None
            return True, self._lead(request_id, deadline)
        finally:
            # Nothing before the release calls Python code, in which an interrupt could forestall it.
            if acquired and acquired[0]:
                self._reading.release()
                if self._waiters:
                    self._pass_on()

    def drop(self, request_id: int) -> None:
        """Forget a request: whoever has waited for its reply has that, or none will come."""
        self._hints.pop(request_id, None)
        self._replies.pop(request_id, None)
        self._given_up.pop(request_id, None)

    def give_up(self, request_id: int, dispose: Callable[[Frame], None]) -> None:
        """Let `dispose` have the reply of a request for which nobody waits any more, when it comes; after an interrupt perhaps twice."""
        self._hints.pop(request_id, None)
        self._given_up[request_id] = dispose
        reply = self._replies.pop(request_id, None)
        if reply is not None:
            dispose(reply)
            self._given_up.pop(request_id, None)

    def read_until(self, deadline: float, done: Callable[[], bool]) -> None:
        """Read for all until something is so, or a time has come; not while another thread reads."""
        acquired: list[bool] = []
        try:
            acquired.extend(map(self._reading.acquire, (False,)))
            while acquired[0]:
                self._deliver()
                if done() or self._error or not self._listen(deadline):
                    break
        finally:
            if acquired and acquired[0]:
                self._reading.release()
                self._pass_on()

    def hear_out(self) -> str:
        """Read what the other end has said last, which may be why it has ended; return how it ended, as it has."""
        acquired: list[bool] = []
        try:
            acquired.extend(map(self._reading.acquire, (True,), (_LAST_WORDS_SECONDS,)))
            if acquired[0]:
                self._deliver()
                while self._receive(_DONT_WAIT) and self._received[-1]:
                    self._deliver()
        finally:
            if acquired and acquired[0]:
                self._reading.release()
                self._pass_on()
        return self._error

    def _lead(self, request_id: int, deadline: float | None) -> Frame | bytes | None:
        """Read for all until the reply is there, or a hint."""
        while True:
            if self._received:
                self._deliver()
            reply = self._reply_to(request_id)
            if reply is not None:
                return reply
            if self._error:
                raise ConnectionError(self._error)
            if self._look():
                continue
            if deadline is None and self._ear is None:
                self._receive(0)
            elif not self._listen(deadline):
                return None

    def _look(self) -> bool:
        """Look for what comes soon, before going to sleep; tell whether something came (see `spin`)."""
        for _ in self._spin.looks():
            # 0.8 us; a receive of nothing takes 2.7, most of it for its exception.
            if ready := self._poll.poll(0):
                self._take(ready)
                return True
        return False

    def _listen(self, deadline: float | None) -> bool:
        """Sleep until something comes, reply or hint, and take it; False when the deadline comes first."""
        left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = self._poll.poll(left)
        self._take(ready)
        return bool(ready)

    def _take(self, ready: Sequence[tuple[int, int]]) -> None:
        """Take the replies and hints that have come."""
        for number, _ in ready:
            if number == self._sock.fileno():
                self._receive(_DONT_WAIT)
            else:
                self._hear()

    def _hear(self) -> None:
        """Hand a hint that is there to its request, if that still waits for one."""
        ear = self._ear
        hint = None if ear is None else ear.hear()
        if ear is None or hint is None:
            return
        request_id = HINT.unpack(hint)[0] if hint else ONE_WAY
        hints = self._hints.get(request_id)
        if hints is not None:
            self._misheard = 0
            hints.append(hint)
            if self._waiters:
                self._wake(request_id)
            return
        self._misheard += 1
        if self._misheard > _MISHEARD:
            self._poll.unregister(ear)
            ear.close()

    def _wake(self, request_id: int) -> None:
        if (waiter := self._waiters.get(request_id)) is not None:
            waiter.put(None)

    def _receive(self, flags: int) -> bool:
        """Take what the socket has, or its end; tell whether there was either."""
        try:
            self._received.extend(map(self._sock.recv, (_READ_BYTES,), (flags,)))
        except BlockingIOError:
            return False
        except OSError as error:
            self._fail(str(error))
            self._received.append(b"")
        return True

    def _deliver(self) -> None:
        """Hand out the replies in what was received, which one assignment drops at the end: an interrupt before it hands them out once more."""
        received = self._received
        if not received:
            return
        if not received[-1]:
            self._fail("the store closed the connection")
            return
        data = received[0] if len(received) == 1 else b"".join(received)
        try:
            frames, consumed, _ = split_frames(data, MAX_REPLY_BYTES)
        except ProtocolError as error:
            self._fail(str(error))
            self._stop_reading()  # event loops learn of the end by the socket
            return
        for frame in frames:
            if frame.request_id == ONE_WAY:
                self._end(frame)
                continue
            self._replies[frame.request_id] = frame  # first, as in `give_up` it is second
            dispose = self._given_up.get(frame.request_id)
            if dispose is None:
                self._wake(frame.request_id)
            elif self._replies.pop(frame.request_id, None) is not None:
                dispose(frame)
                self._given_up.pop(frame.request_id, None)
        received[:] = [data[consumed:]] if consumed < len(data) else []

    def _pass_on(self) -> None:
        """Wake all followers, of whom one takes the lead if nobody else has."""
        for waiter in tuple(self._waiters.values()):
            if waiter.empty():
                waiter.put(None)

    def _end(self, frame: Frame) -> None:
        """Take note of why the store ends the connection."""
        try:
            reply = decode_reply(frame)
        except ProtocolError as error:
            self._fail(str(error))
            return
        if isinstance(reply, Failed):
            self._error = reply.text  # whatever has failed since failed for this
            self.is_final = True

    def _fail(self, reason: str) -> None:
        # A text: an exception would keep, by its traceback, the channel that keeps it.
        self._error = self._error or reason or "unknown error"

    # -- the end -------------------------------------------------------------------------------

    @property
    def error(self) -> str:
        """How the connection has ended; empty as long as it has not."""
        return self._error

    @property
    def is_quiet(self) -> bool:
        """Whether the connection has not ended, and the other end has said nothing that is still to be read."""
        if self._error:
            return False
        poll = select.poll()  # one of its own, as any thread may ask
        poll.register(self._sock.fileno(), select.POLLIN)
        return not poll.poll(0)

    def fileno(self) -> int:
        """Return the socket's descriptor, for who waits for several things; only the channel reads from it."""
        return self._sock.fileno()

    def retire(self) -> None:
        """End all requests, now and later, with a ConnectionError; the other end still sees us."""
        self.is_final = True
        self._fail("the client was disconnected")
        self._stop_reading()

    def _stop_reading(self) -> None:
        with suppress(OSError):  # the other end may have gone before
            self._sock.shutdown(socket.SHUT_RD)

    def abandon(self) -> None:
        """Close a forked child's copy of the socket, and leave the parent's connection alone."""
        self.is_final = True
        self._fail("the connection belongs to the parent process")
        self._sock.close()
        if self._ear is not None:
            self._ear.close()
