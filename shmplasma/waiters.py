"""Waiting for room: in which order, and who may pass whom.  Pure; it knows nothing of room itself.

A request for which there is no room, and which may wait, joins the queue at its end.  Whenever something may have
changed, all that wait are offered room in their order.  One that fits may pass those before it that do not: a small
request need not wait for what only a large one lacks.

Why nobody starves
    Each waiter is passed at most `MAX_PASSES` times, by whoever it may be: by those behind it in the queue, and by
    newcomers that do not wait.  While one has been passed so often, nothing behind it is offered any room, and no
    newcomer gets any.  So from then on room is only given back, but for what the finitely many before it get: it is
    served as soon as others have let go of enough.  The first of the queue has nobody before it; each of the
    others becomes the first, or leaves, in time.

What this costs
    One that waits for more than others ever let go of holds up everybody, once it has been passed `MAX_PASSES` times.
    Its deadline ends that, or its client's end; the refusals of the others say that somebody waits.

Invariants
----------
* A waiter is known by client and request id, and leaves the queue once: granted, refused, withdrawn, or late.
* A deadline is counted from the first `expire` after the waiter has come, on a clock that only goes forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final, Generic, TypeVar

__all__ = ["FOR_EVER", "MAX_PASSES", "Offer", "RoomQueue", "Waiter"]

MAX_PASSES: Final = 64
"""As many small objects are little beside a large one, and many for those who pass."""

FOR_EVER: Final = -1
"""The timeout of one that waits without an end."""


class Offer(Enum):
    """What has become of an offer."""

    TAKEN = "it has its room"
    REFUSED = "it has left, and taken none"
    NOT_ENOUGH = "it goes on waiting"


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits for room.

    Attributes
    ----------
    client, request_id : int
        Whom to answer.
    timeout_ns : int
        How long it waits; `FOR_EVER` without an end.
    deadline_ns : int or None
        Until when; None while that has not been counted yet.
    passed : int
        How often somebody was served before it who came later.
    is_served : bool
        Whether room is being made for it: then its time does not end.
    """

    client: int
    request_id: int
    timeout_ns: int
    deadline_ns: int | None = None
    passed: int = 0
    is_served: bool = False


WaiterT = TypeVar("WaiterT", bound=Waiter)


class RoomQueue(Generic[WaiterT]):
    """All that wait for room, in the order in which they came.

    Notes
    -----
    `join`, `remove` and ``in`` take O(1), all else O(waiters).

    Examples
    --------
    >>> queue = RoomQueue[Waiter]()
    >>> queue.join(Waiter(1, 7, timeout_ns=1000))
    >>> queue.join(Waiter(2, 7, timeout_ns=FOR_EVER))
    >>> queue.offer(lambda waiter: Offer.TAKEN if waiter.client == 2 else Offer.NOT_ENOUGH)
    >>> [waiter.passed for waiter in queue.expire(5)], queue.deadline_ns
    ([], 1005)
    >>> [waiter.passed for waiter in queue.expire(1005)], len(queue)
    ([1], 0)
    """

    def __init__(self) -> None:
        self._waiters: dict[tuple[int, int], WaiterT] = {}

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._waiters)

    def __contains__(self, key: tuple[int, int]) -> bool:
        """Tell whether this client waits with a request of this id."""
        return key in self._waiters

    def __iter__(self) -> Iterator[WaiterT]:
        """Iterate over those that wait, in their order."""
        return iter(self._waiters.values())

    def join(self, waiter: WaiterT) -> None:
        """Let a request wait, behind all others."""
        key = waiter.client, waiter.request_id
        assert key not in self._waiters, "it waits already"
        self._waiters[key] = waiter

    def remove(self, client: int, request_id: int) -> WaiterT | None:
        """Take a request out of the queue; None when it is not there (any more)."""
        return self._waiters.pop((client, request_id), None)

    def forget(self, client: int) -> list[WaiterT]:
        """Take out all requests of a client that has left, and return them."""
        keys = [key for key in self._waiters if key[0] == client]
        return [self._waiters.pop(key) for key in keys]

    @property
    def may_be_passed(self) -> bool:
        """Whether a newcomer may have room before all that wait."""
        return all(waiter.passed < MAX_PASSES for waiter in self._waiters.values())

    def note_pass(self) -> None:
        """Take note that a newcomer got room before all that wait."""
        for waiter in self._waiters.values():
            waiter.passed += 1

    def offer(self, serve: Callable[[WaiterT], Offer]) -> None:
        """Offer room to all that may have it, in their order.

        Parameters
        ----------
        serve : callable
            Tries to serve one; whom it serves or refuses, it leaves to this queue to remove.
        """
        before: list[WaiterT] = []
        for key, waiter in tuple(self._waiters.items()):
            outcome = serve(waiter)
            if outcome is Offer.NOT_ENOUGH:
                before.append(waiter)
            else:
                del self._waiters[key]
                if outcome is Offer.TAKEN:
                    for passed in before:
                        passed.passed += 1
            if any(each.passed >= MAX_PASSES for each in before):
                return

    def expire(self, steady_ns: int) -> list[WaiterT]:
        """Take out, and return, those whose time is over; begin to count the time of those that are new.

        Parameters
        ----------
        steady_ns : int
            The time, on a clock that only goes forward.
        """
        for waiter in self._waiters.values():
            if waiter.deadline_ns is None and waiter.timeout_ns != FOR_EVER:
                waiter.deadline_ns = steady_ns + waiter.timeout_ns
        late = [
            key
            for key, waiter in self._waiters.items()
            if waiter.deadline_ns is not None
            and waiter.deadline_ns <= steady_ns
            and not waiter.is_served
        ]
        return [self._waiters.pop(key) for key in late]

    @property
    def deadline_ns(self) -> int | None:
        """When the next one's time is over; None if no time is being counted."""
        deadlines = (waiter.deadline_ns for waiter in self._waiters.values())
        return min((each for each in deadlines if each is not None), default=None)

    def check(self) -> None:
        """Prove that nobody was passed too often, and that all are known by what they are."""
        for key, waiter in self._waiters.items():
            assert key == (waiter.client, waiter.request_id), "a waiter under another's name"
            assert waiter.passed <= MAX_PASSES, f"{key} was passed {waiter.passed} times"
