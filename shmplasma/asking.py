"""Gets that the store is asked for: they are answered by it, or by whoever puts what they wait for (`shmplasma.hints`).

A get that is interrupted leaves a reply behind, and the slots that it lent are the store's until then; the disposal of the reply
gives them back.  One that was not taken to be sent has no reply, and has lent nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from shmplasma.hinting import Hints
from shmplasma.link import GIVE_UP_SECONDS, Link
from shmplasma.objects import ObjectID
from shmplasma.outcomes import expect
from shmplasma.pinning import BoardPool, Located, Pin, located
from shmplasma.protocol import Frame
from shmplasma.reader import FastReader
from shmplasma.replies import Objects
from shmplasma.requests import AnswerNow, Get
from shmplasma.transport import Channel

__all__ = ["Asking"]

_HINTS: Final = 4
"""So many hints are followed for one get; two come of its putter, one of them before there is anything."""


class Asking:
    """What a client asks the store for that it has not found by itself.

    Parameters
    ----------
    link : Link
        The connection.
    boards : BoardPool
        The client's boards.
    reader : FastReader or None
        Reads without a message, where that is possible.
    hints : Hints or None
        Takes what others hint at, likewise.

    Notes
    -----
    Thread-safe.
    """

    def __init__(
        self,
        link: Link,
        boards: BoardPool,
        reader: FastReader | None,
        hints: Hints | None,
    ) -> None:
        self._link = link
        self._boards = boards
        self._reader = reader
        self._hints = hints

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
        while True:
            pins = self._boards.take(len(object_ids))
            expected = None
            if wait and len(object_ids) == 1 and self._hears():
                expected = self._boards.take_one()
            request = Get(wait, object_ids, [pin.slot for pin in pins], expected is not None)
            found = self._ask_get(request, deadline, pins, expected)
            if expected is None or found[0] is None or found[0][4].is_set:
                return found
            # The store has thought that this client had taken what it was hinted at.
            if self._reader is not None:
                found = [self._reader.locate(ObjectID(object_ids[0]))]
                if found[0] is not None:
                    return found

    def _hears(self) -> bool:
        """Tell whether hints are heard."""
        channel, hints = self._link.channel, self._hints
        if channel.ear is None and hints is not None:
            ear = hints.listen()
            if ear is not None:
                channel.ear = ear
        return channel.ear is not None

    def _ask_get(
        self,
        request: Get,
        deadline: float | None,
        pins: list[Pin],
        expected: Pin | None,
    ) -> list[Located | None]:
        """Send a get, to another store if this one dies, and return what it finds."""
        while True:
            channel = self._link.channel
            try:
                return self._exchange_get(channel, request, deadline, pins, expected)
            except ConnectionError as error:
                # However short the deadline is: a store that comes back is no reason to fail.
                self._link.reconnect(channel, error)
                for pin in pins:  # the dead store may have pinned something
                    pin.clear()

    def _exchange_get(
        self,
        channel: Channel,
        request: Get,
        deadline: float | None,
        pins: list[Pin],
        expected: Pin | None,
    ) -> list[Located | None]:
        """Send a get and wait for its answer, or a hint; at the deadline, or an interrupt, ask for the answer at once."""
        body = request.encode()
        request_id = channel.new_request()
        answer_now = AnswerNow(request_id).encode()

        taken: list[None] = []

        def let_go(_: Frame) -> None:
            pins.clear()  # lent until the reply comes; then the last reference to them goes

        try:
            if expected is not None:
                channel.expect_hint(request_id)
            channel.request(Get.KIND, request_id, body, taken)
            if expected is not None:
                hinted = self._follow_hints(
                    channel, request, request_id, deadline, expected, pins[0]
                )
                if hinted is not None:
                    channel.give_up(request_id, let_go)
                    return [hinted]
            # One that is not to wait is answered by the store's next turn, without being asked again.
            reply = channel.wait(request_id, deadline if request.wait else None)
            if reply is None:
                channel.send(AnswerNow.KIND, answer_now)
                reply = channel.wait(request_id, None)
        except ConnectionError:
            raise
        except BaseException:
            if not taken:
                channel.drop(request_id)
                raise
            with suppress(ConnectionError):  # the interrupt is what the caller is to see
                channel.give_up(request_id, let_go)
                channel.send(AnswerNow.KIND, answer_now)
                channel.read_until(time.monotonic() + GIVE_UP_SECONDS, lambda: not pins)
            raise
        channel.drop(request_id)
        assert reply is not None
        return located(expect(Objects, reply).found, pins)

    def _follow_hints(
        self,
        channel: Channel,
        request: Get,
        request_id: int,
        deadline: float | None,
        expected: Pin,
        lent: Pin,
    ) -> Located | None:
        """Return what a get was hinted at; None when there is a reply, or is going to be one, or when the deadline comes."""
        assert self._hints is not None
        for _ in range(_HINTS):
            hint = channel.wait_or_hear(request_id, deadline)
            if type(hint) is not bytes:
                return None
            if self._hints.is_there(hint):
                taken = self._hints.take(hint, request.object_ids[0], expected, lent)
                if taken is not None:
                    return taken
        return None
