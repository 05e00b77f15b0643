from __future__ import annotations

from collections.abc import Callable

import pytest

from shmplasma.gets import GetQueue, PendingGet
from shmplasma.replies import ABSENT, Found
from shmplasma.requests import Get

A, B, C = (bytes([n]) * 20 for n in range(3))
PLACE: Found = (4096, 10, 2, 7)


def pending(
    client: int, request_id: int, *object_ids: bytes, slots: tuple[int, ...] = ()
) -> PendingGet:
    """Return a get that waits; its slots are numbered from 1 if not given."""
    slots = slots or tuple(range(1, len(object_ids) + 1))
    return PendingGet.begin(client, request_id, Get(True, object_ids, slots))


def test_a_new_get_misses_everything() -> None:
    """Nothing is found at first, and each id stands where it was asked for."""
    get = pending(1, 2, A, B, A)
    assert (get.client, get.request_id) == (1, 2)
    assert get.found == [ABSENT, ABSENT, ABSENT]
    assert get.missing == {A: [0, 2], B: [1]}


def test_an_object_fills_all_places_where_it_was_asked_for() -> None:
    """A get of the same id twice is one wait, two answers and two pins."""
    get = pending(1, 2, A, B, A, slots=(10, 20, 30))
    assert list(get.fill(A, PLACE)) == [10, 30]
    assert get.found == [PLACE, ABSENT, PLACE]
    assert get.missing == {B: [1]}
    assert list(get.fill(B, PLACE)) == [20]
    assert not get.missing


def test_a_get_is_known_by_client_and_request_id() -> None:
    """The same request id of another client is another get."""
    queue = GetQueue()
    queue.add(pending(1, 5, A))
    assert (1, 5) in queue
    assert (1, 6) not in queue
    assert (2, 5) not in queue
    queue.check()


def test_those_who_wait_for_an_object_are_found_in_order() -> None:
    """All gets that miss an object are handed out once, first come first; others stay."""
    queue = GetQueue()
    first, second, other = pending(1, 1, A), pending(2, 1, B, A), pending(3, 1, B)
    for get in (first, second, other):
        queue.add(get)
    assert queue.waiting_for(A) == [first, second]
    assert queue.waiting_for(A) == []
    for get in (first, second):
        list(get.fill(A, PLACE))
    assert queue.remove(1, 1) is first
    queue.check()
    assert queue.waiting_for(B) == [second, other]


def test_a_get_that_was_removed_waits_no_more() -> None:
    """An answered get leaves both indices, half filled or not; a second removal finds nothing."""
    queue = GetQueue()
    get, other = pending(1, 1, A, B), pending(1, 2, A, A)
    queue.add(get)
    queue.add(other)
    for waiting in queue.waiting_for(B):
        list(waiting.fill(B, PLACE))
    assert queue.remove(1, 1) is get
    assert queue.remove(1, 1) is None
    assert queue.remove(9, 1) is None
    queue.check()
    assert queue.waiting_for(A) == [other]


def test_a_client_that_leaves_is_forgotten() -> None:
    """All its gets go and nobody else's."""
    queue = GetQueue()
    for request_id in (1, 2, 3):
        queue.add(pending(1, request_id, A, B))
    stays = pending(2, 1, B)
    queue.add(stays)
    queue.forget(1)
    queue.forget(1)
    queue.check()
    assert (1, 1) not in queue
    assert queue.waiting_for(A) == []
    assert queue.waiting_for(B) == [stays]


def test_an_empty_queue_keeps_nothing() -> None:
    """What came and went leaves no entry in either index."""
    queue = GetQueue()
    queue.add(pending(1, 1, A, B))
    queue.remove(1, 1)
    queue.add(pending(2, 1, C))
    queue.forget(2)
    assert queue._of_client == {}
    assert queue.waiting == {}


DAMAGES: dict[str, Callable[[GetQueue, PendingGet], object]] = {
    "a complete get": lambda _, get: get.missing.clear(),
    "not where they should be": lambda queue, _: queue.waiting.pop(A),
    "without waiting gets": lambda queue, _: queue.waiting.update({C: []}),
}


@pytest.mark.parametrize("complaint", DAMAGES)
def test_the_proof_fails_for_a_damaged_queue(complaint: str) -> None:
    """Each clause of `check` notices what it is there for."""
    queue = GetQueue()
    get = pending(1, 1, A, B)
    queue.add(get)
    DAMAGES[complaint](queue, get)
    with pytest.raises(AssertionError, match=complaint):
        queue.check()
