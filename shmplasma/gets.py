"""Gets that wait: which client waits for which objects, and what it has so far.

Invariants
----------
* Each get is known by client and request id, and is answered once: when nothing is missing any more, or
  when its client asks for an answer now.
* What has been found is pinned in its slot at once, so that it cannot go while the get waits for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from shmplasma.replies import ABSENT, Found
from shmplasma.requests import Get

__all__ = ["GetQueue", "PendingGet"]


@dataclass(slots=True, eq=False)
class PendingGet:
    """A get and its answer so far.

    Attributes
    ----------
    client, request_id : int
        Whom to answer.
    request : Get
        What was asked.
    found : list of Found
        The answer, `ABSENT` where nothing was found yet.
    missing : dict
        Where each missing id stands in the answer; an id may have been asked for more than once.
    returning : set of bytes
        Those of them that are there, and are being brought back from the external store.
    wanted_at : int
        Which word of the header says that it may be hinted at; 0 for none (see `shmplasma.hints`).
    is_taken : bool
        Whether its client has, or is about to find that it has not, what it was hinted at: its slot is not the store's.
    """

    client: int
    request_id: int
    request: Get
    found: list[Found]
    missing: dict[bytes, list[int]]
    returning: set[bytes] = field(default_factory=set)
    wanted_at: int = 0
    is_taken: bool = False

    @classmethod
    def begin(cls, client: int, request_id: int, request: Get) -> PendingGet:
        """Return a get of which nothing has been found."""
        missing: dict[bytes, list[int]] = {}
        for position, object_id in enumerate(request.object_ids):
            missing.setdefault(object_id, []).append(position)
        return cls(client, request_id, request, [ABSENT] * len(request.object_ids), missing)

    def fill(self, object_id: bytes, found: Found) -> Iterator[int]:
        """Enter an object that has been found; yield the slots that are to pin it."""
        self.returning.discard(object_id)
        for position in self.missing.pop(object_id):
            self.found[position] = found
            yield self.request.slots[position]


class GetQueue:
    """All gets that wait.  O(1) for each id of a get.

    Attributes
    ----------
    waiting : dict
        The gets that wait for an object, by its id.
    """

    def __init__(self) -> None:
        self._of_client: dict[int, dict[int, PendingGet]] = {}
        self.waiting: dict[bytes, list[PendingGet]] = {}

    def __bool__(self) -> bool:
        """Tell whether anybody waits."""
        return bool(self.waiting)

    def __contains__(self, key: tuple[int, int]) -> bool:
        """Tell whether this client has a waiting get with this request id."""
        client, request_id = key
        return request_id in self._of_client.get(client, ())

    def add(self, get: PendingGet) -> None:
        """Let a get wait for what it misses."""
        self._of_client.setdefault(get.client, {})[get.request_id] = get
        for object_id in get.missing:
            self.waiting.setdefault(object_id, []).append(get)

    def who_wait_for(self, object_id: bytes) -> list[PendingGet]:
        """Return the gets which wait for an object."""
        return list(self.waiting.get(object_id, ()))

    def waiting_for(self, object_id: bytes) -> list[PendingGet]:
        """Take the gets which wait for an object that is there now; the caller fills them in."""
        return self.waiting.pop(object_id, [])

    def missing(self, client: int, request_id: int) -> Iterable[bytes]:
        """Return the ids that a get still lacks; none if it does not wait."""
        get = self._of_client.get(client, {}).get(request_id)
        return () if get is None else get.missing

    def remove(self, client: int, request_id: int) -> PendingGet | None:
        """Take a get out of the queue; None when it is not there (any more)."""
        gets = self._of_client.get(client, {})
        get = gets.pop(request_id, None)
        if get is None:
            return None
        if not gets:
            del self._of_client[client]
        for object_id in get.missing:
            others = self.waiting[object_id]
            others.remove(get)
            if not others:
                del self.waiting[object_id]
        return get

    def forget(self, client: int) -> list[PendingGet]:
        """Drop all gets of a client that has left, and return them."""
        gets = list(self._of_client.get(client, {}).values())
        for get in gets:
            self.remove(client, get.request_id)
        return gets

    def check(self) -> None:
        """Prove that both indices agree, and that no complete get is left."""
        gets = [get for gets in self._of_client.values() for get in gets.values()]
        assert all(get.missing for get in gets), "a complete get still waits"
        pending = {(id(get), object_id) for get in gets for object_id in get.missing}
        waiting = {(id(get), object_id) for object_id, w in self.waiting.items() for get in w}
        assert pending == waiting, "waiting gets are not where they should be"
        assert all(self.waiting.values()), "an id without waiting gets is kept"
