"""Holders: which clients hold references, as far as a successor has to know, and who of them has told it what.  Pure.

A store writes down of each client whether it holds anything (`shmplasma.control`): before it acknowledges the record by which the
first hold begins, and no more when the last one has ended.  What is held a store that dies takes along.  So its successor
*awaits* those of whom that was written down, and those whose first unread record is that of a referenced object that is sealed: this
may have been carried out, and not written down (`Posts.acknowledge_published`).  Of all others it knows what they hold, as that has
begun in records that are unread, and it reads these.

Who is awaited may be idle for as long as it lives; who holds nothing is not awaited, however idle.

Coming back
    A client asks to go on (1), hears that it may, notes what it holds (2), and tells so (3), while its other threads
    redeem and release by its outbox, of which the store may read anything at any time.  So what it holds at 2 is neither
    all that it holds when 3 is read, nor is all of that held still.
    *What the store knows at 1, having read the outbox, and is not told of at 3 has ended*: it was begun before 1, so it was
    let go before 2; the message that said so may have died with the old store.
    *What the store learns between 1 and 3 stays*, as it may be newer than 2.  A Release of it that went to the dead
    store after 1 is sent once more after 3 (`shmplasma.link`).
    *Whose Release is read between 1 and 3 has ended*, though it be told of at 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

__all__ = ["Holders"]

Hold = tuple[bytes, int]
"""Object id and number."""


@dataclass(frozen=True, slots=True)
class _Return:
    """What a client that comes back is known to hold and has not said yet, and what it has let go meanwhile."""

    doubted: set[Hold]
    ended: set[Hold] = field(default_factory=set)


class Holders:
    """Who holds something, and who is to tell it.

    Parameters
    ----------
    note : callable
        ``note(client, whether)`` writes down whether a client holds anything.
    """

    def __init__(self, note: Callable[[int, bool], None]) -> None:
        self._note = note
        self._noted: set[int] = set()
        self._awaited: set[int] = set()
        self._returns: dict[int, _Return] = {}

    def recover(self, clients: Iterable[int]) -> None:
        """Await the clients of a store that has died of whom it had written down that they hold something."""
        self._awaited = set(clients)
        self._noted = self._awaited.copy()

    @property
    def are_awaited(self) -> bool:
        """Whether a client that may hold something has not told what."""
        return bool(self._awaited)

    def begun(self, client: int) -> None:
        """Take note that a client holds something."""
        if client not in self._noted:
            self._noted.add(client)
            self._note(client, True)

    def ended(self, client: int) -> None:
        """Take note that a client holds nothing, as far as is known."""
        if client in self._noted and client not in self._awaited and client not in self._returns:
            self._noted.remove(client)
            self._note(client, False)

    def forget(self, client: int) -> None:
        """Forget a client that has gone."""
        self._awaited.discard(client)
        self._returns.pop(client, None)
        self.ended(client)

    # -- coming back ---------------------------------------------------------------------------

    def come_back(self, client: int, known: Iterable[Hold]) -> None:
        """Take note that a client asks to go on, of which so much is known."""
        self._returns[client] = _Return(set(known))

    def is_returning(self, client: int) -> bool:
        """Tell whether a client is yet to tell what it holds."""
        return client in self._returns

    def n_released(self, client: int) -> int:
        """Return how many releases are remembered of a client."""
        return len(self._returns[client].ended) if client in self._returns else 0

    def released(self, client: int, hold: Hold) -> None:
        """Take note that a client lets go of something."""
        if client in self._returns:
            self._returns[client].ended.add(hold)

    def told(self, client: int, holds: set[Hold]) -> set[Hold]:
        """Return what of the things that a client tells of it holds still."""
        returning = self._returns.get(client)
        if returning is None:
            return holds
        returning.doubted.difference_update(holds)
        return holds - returning.ended

    def all_told(self, client: int) -> set[Hold]:
        """Take note that a client has told all that it holds; return what has ended by that."""
        self._awaited.discard(client)
        returning = self._returns.pop(client, None)
        return set() if returning is None else returning.doubted
