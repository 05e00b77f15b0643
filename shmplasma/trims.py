"""When memory that is committed and not used goes back to the system.  Pure.

A client may ask for it, and the store does it by itself while it is idle.  Either goes by steps between requests
(`shmplasma.commitment` says of what, and why a busy store keeps what it has).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from shmplasma.commitment import Commitment
from shmplasma.outgoing import Outgoing
from shmplasma.replies import Number

__all__ = ["Trims"]

_PERIOD_NS: Final = 30 * 10**9
"""Between two sweeps of an idle store.  To commit a GiB anew takes it half a second."""


@dataclass(slots=True)
class _Asked:
    """A client that waits for the end of a sweep, and what that has given back so far."""

    client: int
    request_id: int
    steps: Iterator[int]
    given_back: int = 0


class Trims:
    """All sweeps.

    Parameters
    ----------
    commitment : Commitment
        Gives memory back.
    outgoing : Outgoing
        Takes the answers.
    """

    def __init__(self, commitment: Commitment, outgoing: Outgoing) -> None:
        self._commitment = commitment
        self._outgoing = outgoing
        self._asked: list[_Asked] = []
        self._idle: Iterator[int] | None = None
        self._not_before_ns = 0

    def __bool__(self) -> bool:
        """Tell whether a client waits for one."""
        return bool(self._asked)

    def ask(self, client: int, request_id: int) -> None:
        """Give everything back that may go, and tell the client how much that was."""
        steps = self._commitment.sweep(all_of_it=True)
        self._asked.append(_Asked(client, request_id, steps))

    def advance(self) -> None:
        """Do one step of what the first client waits for."""
        asked = self._asked[0]
        given_back = next(asked.steps, None)
        if given_back is None:
            self._answer(asked)
        else:
            asked.given_back += given_back

    def forget(self, client: int) -> None:
        """Answer what a client waits for, because it leaves."""
        for asked in [asked for asked in self._asked if asked.client == client]:
            self._answer(asked)

    def _answer(self, asked: _Asked) -> None:
        self._asked.remove(asked)
        self._outgoing.reply(asked.client, asked.request_id, Number(asked.given_back))

    def idle_ns(self, now_ns: int) -> int | None:
        """Return how long an idle store may sleep before it sweeps; None for as long as it is idle."""
        if self._idle is not None:
            return 0
        return max(0, self._not_before_ns - now_ns) if self._commitment.is_stirred else None

    def advance_idle(self, now_ns: int) -> None:
        """Do one step of an idle store's sweep, if it is time for one."""
        if self.idle_ns(now_ns) != 0:
            return
        if self._idle is None:
            self._idle = self._commitment.sweep(all_of_it=False)
        if next(self._idle, None) is None:
            self._idle = None
            self._not_before_ns = now_ns + _PERIOD_NS
