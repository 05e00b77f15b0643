"""A client's link to its store, which outlasts the store: connects, asks, and connects again.

When the connection ends, and not because this client was closed or dropped, the store has died.  A store that
is started again on the socket recovers the segment (`shmplasma.recovery`) and waits for its clients.  The link
connects to it, shows by its process and its first board which client it is, and repeats what was not answered;
whoever calls sees a pause.

What is repeated, and why it may be
    *One-way messages* are records of the outbox; the store has them (`shmplasma.outbox`).
    *Create* names a slot, by which a store knows a creation that its predecessor granted and could not answer; one
    that waits for room joins the queue anew, for as long as it has left.
    *Get* begins anew; the pins that the dead store wrote are cleared first, and the slots are lent again.
    *Abort* that was carried out finds nothing any more: it is done.
    All others change nothing, or the same again.

Interrupts
    A new connection only *claims* this client until the store gets its first message after the `Welcome`
    (`shmplasma.greeting`); if it ends before that, nothing has happened, and the store goes on waiting.  The link
    sends none before it keeps the connection, by one assignment to `Link.channel`.  So an interrupt (Ctrl-C)
    before the assignment costs an attempt, one after it finds the client connected, and in neither case does the
    store take a living client for dead.  What the store has to be told first (`Link.options`) waits in the
    channel for the first message, whoever sends it.

A store that was ended has removed its segment; one that was started with nothing is another one.  Both end the
link for good: what this client had is gone, and it must be told so.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, TypeVar

from shmplasma.arrow_errors import NotConnectedError, PlasmaObjectNotFound
from shmplasma.endpoint import may_come_back
from shmplasma.errors import ShmPlasmaError
from shmplasma.exchange import Exchange
from shmplasma.handshake import greet_again
from shmplasma.nesting import NESTED, is_inside
from shmplasma.outcomes import expect, gone, not_reclaimed
from shmplasma.posted import Abort, Detach, Gone
from shmplasma.protocol import ONE_WAY, Frame, encode_frame
from shmplasma.replies import Done, Reply, Welcome
from shmplasma.requests import AnswerNow, Flush, Hold, Request, Role, SetOptions, holds_told
from shmplasma.shared_outbox import SharedOutbox
from shmplasma.transport import Channel

__all__ = ["GIVE_UP_SECONDS", "Link"]

GIVE_UP_SECONDS: Final = 0.1
"""How long a request that was interrupted waits for its last answer, which usually takes 0.1 ms."""

_CONNECTING: Final = frozenset({"reconnect"})

_ReplyT = TypeVar("_ReplyT", bound=Reply)


class Link:
    """Requests and one-way messages to a store that may die and come back.

    Parameters
    ----------
    path : str
        The store's socket.
    channel : Channel
        The connection; closed when the link is collected.
    name : str
        What the store calls this client.
    board : int
        The client's first board.
    token : bytes
        The segment's identity.
    outbox : SharedOutbox
        The client's.
    renew : weakref.WeakMethod
        ``renew(wake_fd, locks_fd)`` takes over what another store has given.  Weak, as its owner keeps the link.
    patience_seconds : float
        How long a store that has died is waited for.
    when_lost : weakref.WeakMethod
        Called when the store, or what this client had in it, is gone for good.

    Attributes
    ----------
    options : SetOptions or None
        What a store that comes back has to be told.
    channel : Channel
        The connection at this moment.
    patience_seconds : float
        As given.
    holds : weakref.WeakMethod or None
        Returns the references that a store that comes back has to be told of (`shmplasma.references`).
    aside : int
        How much the store was told past the outbox, and may not have heard; whoever asks it next may set it to 0.

    Notes
    -----
    Thread-safe.
    """

    def __init__(
        self,
        path: str,
        channel: Channel,
        name: str,
        board: int,
        token: bytes,
        outbox: SharedOutbox,
        renew: weakref.WeakMethod[Callable[[int, int | None], None]],
        patience_seconds: float,
        when_lost: weakref.WeakMethod[Callable[[], None]],
    ) -> None:
        self.channel = channel
        self.options: SetOptions | None = None
        self._path = path
        self._name = name
        self._board = board
        self._token = token
        self._outbox = outbox
        self._renew = renew
        self.patience_seconds = patience_seconds
        self._when_lost = when_lost
        self.holds: weakref.WeakMethod[Callable[[], Sequence[tuple[bytes, int]]]] | None = None
        self._lost = False
        self._connecting = threading.Lock()
        self._untold: list[tuple[int, bytes]] | None = None
        self.aside = 0

    def call(
        self,
        request: Request,
        expected: type[_ReplyT],
        dispose: Callable[[Frame], None] | None = None,
        again: Callable[[], Request] | None = None,
        *,
        may_wait: bool = False,
    ) -> _ReplyT:
        """Send a request and return its reply.

        Parameters
        ----------
        request : Request
            What to ask.
        expected : type
            The reply if it is granted.
        dispose : callable, optional
            Gets the reply if waiting for it is interrupted; that waits a little longer for it then.
        again : callable, optional
            Returns what is to be sent to another store, if that is not the same.
        may_wait : bool, optional
            Whether the store may take its time; then it is told when waiting is interrupted.

        Raises
        ------
        NotConnectedError
            The store has gone.
        ShmPlasmaError
            The store refused; the subclass says why.
        """
        while True:
            channel = self.channel
            kind, body = request.KIND, request.encode()
            try:
                reply = _exchange(channel, kind, body, dispose, may_wait=may_wait)
            except ConnectionError as error:
                self.reconnect(channel, error)
                if again is not None:
                    request = again()
            else:
                return expect(expected, reply)

    def begin(
        self,
        request: Request,
        expected: type[_ReplyT],
        begun: list[Callable[[], _ReplyT | None]],
    ) -> None:
        """Send a request whose reply nobody waits for yet, if it can be sent now: not inside another call.

        Parameters
        ----------
        request, expected
            As for `call`.
        begun : list
            Gets what waits for the reply and returns it; None if the store has died, or has refused, which it tells again to who asks again.
            After an interrupt it can be called again, as after the RuntimeError by which it says that a call of this thread would have to go
            on first.
        """
        channel = self.channel
        if channel.is_entered:
            return
        request_id = channel.new_request()
        taken: list[None] = []
        replies: list[Frame] = []

        def finish() -> _ReplyT | None:
            try:
                if taken and not replies:
                    if channel.is_entered:
                        raise RuntimeError(NESTED)
                    reply = channel.wait(request_id, None)
                    assert reply is not None
                    replies.append(reply)
                channel.drop(request_id)
                return expect(expected, replies[0]) if replies else None
            except (ConnectionError, ShmPlasmaError):
                return None

        try:
            begun.append(finish)  # so that no interrupt can come between this and the request
            channel.request(request.KIND, request_id, request.encode(), taken)
        except BaseException as error:
            begun.clear()
            if taken:
                channel.give_up(request_id, _ignore)
            if not isinstance(error, ConnectionError):  # whoever asks next connects again
                raise

    def abort(self, object_id: bytes) -> None:
        """Ask for an object to be removed that this client has not sealed.

        Raises
        ------
        PlasmaObjectNotFound
            This client is not writing such an object.
        NotConnectedError
            The store has gone.
        """
        first = self.channel
        try:
            self.call(Abort(object_id), Done)
        except PlasmaObjectNotFound:
            if self.channel is first:
                raise

    def post(
        self,
        kind: int,
        body: bytes,
        written: Callable[[int], None] | None = None,
        *,
        is_urgent: bool = True,
    ) -> None:
        """Tell the store something, and do not wait.

        Parameters
        ----------
        kind, body
            What.
        written : callable, optional
            Told how many records there were with this one, before the store is told that there is one.
        is_urgent : bool, optional
            As for `Outbox.append`.

        Raises
        ------
        NotConnectedError
            The store has gone.
        RuntimeError
            A call of this thread was interrupted while it wrote a record.
        """
        while not (count := self._outbox.post(kind, body, is_urgent=is_urgent)):
            self.call(Flush(), Done)
        if written is not None:
            written(abs(count))
        if count < 0:
            self.announce()

    def publish(
        self,
        fields: tuple[bytes, int, int, int, int, bool],
        written: Callable[[int], None] | None = None,
    ) -> None:
        """Tell the store of an object in the lease, by the fields of a `Publish`; as `post`, but in one piece."""
        while not (count := self._outbox.publish(*fields)):
            self.call(Flush(), Done)
        if written is not None:
            written(abs(count))
        if count < 0:
            self.announce()

    def post_soon(self, kind: int, body: bytes) -> None:
        """Tell the store something from a finalizer, which may have come in the middle of `post`.

        Nobody is told that the store has gone.  What cannot be written to the outbox just now is sent, and read after it.
        """
        count = self._outbox.post_soon(kind, body)
        if not count:
            self.aside += 1
            # In this order: whoever reconnects makes the list, then the channel, then drops the list.
            untold = self._untold
            if untold is not None:
                untold.append((kind, body))
            self.channel.send_soon(kind, body)
        elif count < 0:
            with suppress(ConnectionError):
                self.channel.announce()

    def announce(self) -> None:
        """Tell the store, or the one that comes back, that there is a record in the outbox."""
        while True:
            channel = self.channel
            try:
                channel.announce()
            except ConnectionError as error:
                self.reconnect(channel, error)
            else:
                return

    def leave(self) -> None:
        """Drop what was not sealed and end all requests; a store that is not there is not waited for, and its successor told.

        Inside another call of this thread the store is not waited for either.
        """
        channel = self.channel
        if channel.is_entered or not _is_told(channel, Detach.KIND):
            self._outbox.post_soon(Detach.KIND, b"", is_last=True)
        channel.retire()
        if (latest := self.channel) is not channel:  # another thread has just connected again
            latest.retire()

    def end(self) -> None:
        """Write the last record, when nothing of this client is left: a store that has died cannot see the connection end."""
        self._outbox.post_soon(Gone.KIND, b"", is_last=True)

    def abandon(self) -> None:
        """Close a forked child's copy of the connection, and leave the parent's alone."""
        self.channel.abandon()

    def reconnect(self, broken: Channel, error: ConnectionError) -> None:
        """Return when there is another connection than the broken one, which has ended so; the caller sends something by it.

        Raises
        ------
        NotConnectedError
            There will be none.
        RuntimeError
            A call of this thread was interrupted in it.
        """
        if self._connecting.locked() and is_inside(self, _CONNECTING):
            raise RuntimeError(NESTED)
        with self._connecting:
            if self.channel is not broken:
                return
            # What `post_soon` sends from here on is sent once more: to hear the broken one out may undo a creation.
            untold = self._untold = []
            try:
                reason = broken.hear_out()
                if broken.is_final or self._lost:
                    if self.holds is not None and not self._lost:
                        self._lose()  # whose connection is nobody's to close and open again
                    raise gone(reason) from error
                channel = self._connect_again(reason, error)
                channel.ear = broken.ear
                self._go_on(broken, channel)
            finally:
                self._untold = None
            for message in untold:
                channel.send_soon(*message)

    def _go_on(self, broken: Channel, channel: Channel) -> None:
        """Use another connection; others may from here on, so nobody may close it."""
        self.channel = channel
        if broken.is_final:  # by `leave` in another thread, meanwhile
            channel.retire()

    def _connect_again(self, reason: str, error: ConnectionError) -> Channel:
        """Return a connection to the store that has come back."""
        exchange, welcome = self._greet_again(reason)
        try:
            if not welcome.reclaimed or welcome.token != self._token:
                self._lose()
                raise NotConnectedError(not_reclaimed(welcome.token, self._token)) from error
            renew = self._renew()
            assert renew is not None, "who calls the link keeps its owner"
            wake_fd = exchange.take_descriptor()
            renew(wake_fd, exchange.take_another())
            self._outbox.connected()
            return Channel(exchange.detach(), self._first_message(self._held()))
        except BaseException:
            exchange.close()
            raise

    def _first_message(self, held: Sequence[tuple[bytes, int]]) -> bytes:
        """Return what a store that has come back is to be told first."""
        requests: list[Request] = [] if self.options is None else [self.options]
        requests += holds_told(held)
        if self.holds is not None:
            requests.append(Hold(0, ()))  # that was all
        return b"".join(encode_frame(each.KIND, ONE_WAY, each.encode()) for each in requests)

    def _held(self) -> Sequence[tuple[bytes, int]]:
        holds = None if self.holds is None else self.holds()
        return () if holds is None else holds()

    def _greet_again(self, reason: str) -> tuple[Exchange, Welcome]:
        """Introduce this client to the store that has come back, once it has."""
        reclaim, patience = self._board + 1, self.patience_seconds
        try:
            return greet_again(self._path, Role.CLIENT, self._name, reclaim, patience)
        except NotConnectedError as error:
            if not may_come_back(self._path):
                self._lose()
            raise gone(reason, self._path) from error

    def _lose(self) -> None:
        self._lost = True
        when_lost = self._when_lost()
        if when_lost is not None:
            when_lost()


def _ignore(_: Frame) -> None:
    """Have a reply for nothing."""


def _is_told(channel: Channel, kind: int) -> bool:
    """Make a request without a body; tell whether it was answered."""
    try:
        _exchange(channel, kind, b"")
    except ConnectionError:
        return False
    return True


def _exchange(
    channel: Channel,
    kind: int,
    body: bytes,
    dispose: Callable[[Frame], None] | None = None,
    *,
    may_wait: bool = False,
) -> Frame:
    """Send a request and wait; if that is interrupted, let `dispose` have the reply, soon if possible."""
    request_id = channel.new_request()
    taken: list[None] = []
    try:
        channel.request(kind, request_id, body, taken)
        reply = channel.wait(request_id, None)
    except ConnectionError:
        raise
    except BaseException:
        if not taken:
            raise
        disposed: list[None] = []

        def give(reply: Frame) -> None:
            if dispose is not None:
                dispose(reply)
            disposed.append(None)

        channel.give_up(request_id, give)
        with suppress(ConnectionError):  # the interrupt is what the caller is to see
            if may_wait:
                channel.send(AnswerNow.KIND, AnswerNow(request_id).encode())
            if dispose is not None:
                channel.read_until(time.monotonic() + GIVE_UP_SECONDS, lambda: bool(disposed))
        raise
    channel.drop(request_id)
    assert reply is not None
    return reply
