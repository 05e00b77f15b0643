"""The queue for room beside a plain list: order, the bound on passing, and that everybody is served in the end."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmplasma.waiters import FOR_EVER, MAX_PASSES, Offer, RoomQueue, Waiter

CAPACITY = 100


@dataclass(slots=True, eq=False)
class Wish(Waiter):
    """A request for so much room."""

    size: int = field(kw_only=True)


class QueueMachine(RuleBasedStateMachine):
    """Clients that want room of a store which others fill and empty."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = RoomQueue[Wish]()
        self.model: list[Wish] = []
        self.passed: dict[int, int] = {}
        self.held: list[int] = []
        self.now = 0
        self.numbers = 0

    @property
    def free(self) -> int:
        """How much room there is."""
        return CAPACITY - sum(self.held)

    def serve(self, wish: Wish) -> Offer:
        """Give a wish its room, if there is enough."""
        before = self.model.index(wish)
        assert all(self.passed[each.request_id] < MAX_PASSES for each in self.model[:before])
        if wish.size > CAPACITY:
            self.model.remove(wish)
            return Offer.REFUSED
        if wish.size > self.free:
            return Offer.NOT_ENOUGH
        self.held.append(wish.size)
        self.model.remove(wish)
        for each in self.model[:before]:
            self.passed[each.request_id] += 1
        return Offer.TAKEN

    def join(self, client: int, size: int, timeout: int) -> None:
        """Let a request wait."""
        self.numbers += 1
        wish = Wish(client, self.numbers, timeout, size=size)
        self.queue.join(wish)
        self.model.append(wish)
        self.passed[self.numbers] = 0

    @rule(
        client=st.integers(1, 3),
        size=st.integers(1, CAPACITY + 1),
        timeout=st.sampled_from([FOR_EVER, FOR_EVER, 1, 5]),
    )
    def come(self, client: int, size: int, timeout: int) -> None:
        """Wait for room."""
        self.join(client, size, timeout)

    @rule(size=st.integers(1, 3), times=st.integers(1, MAX_PASSES + 5))
    def rush(self, size: int, times: int) -> None:
        """Want a little, again and again, without waiting, and let go of it at once."""
        for _ in range(times):
            may = all(self.passed[wish.request_id] < MAX_PASSES for wish in self.model)
            assert self.queue.may_be_passed == may
            if may and size <= self.free:
                self.queue.note_pass()
                for wish in self.model:
                    self.passed[wish.request_id] += 1

    @rule()
    def offer(self) -> None:
        """Offer what there is: whoever may have it and fits has it."""
        self.queue.offer(self.serve)
        for wish in self.model:
            assert wish.size > self.free
            if self.passed[wish.request_id] == MAX_PASSES:
                break

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 100))
    def release(self, which: int) -> None:
        """Let go of some room."""
        self.held.pop(which % len(self.held))

    @rule(ticks=st.integers(0, 4))
    def expire(self, ticks: int) -> None:
        """Let time pass: who is late leaves, in order, and not before its time, counted since it was first seen."""
        self.now += ticks
        late = self.queue.expire(self.now)
        assert late == [
            wish
            for wish in self.model
            if wish.deadline_ns is not None and wish.deadline_ns <= self.now
        ]
        for wish in late:
            assert wish.timeout_ns != FOR_EVER
        self.model = [wish for wish in self.model if wish not in late]
        deadlines = [wish.deadline_ns for wish in self.model if wish.timeout_ns != FOR_EVER]
        assert None not in deadlines
        assert self.queue.deadline_ns == min((each for each in deadlines if each), default=None)

    @precondition(lambda self: self.model)
    @rule(which=st.integers(0, 100))
    def withdraw(self, which: int) -> None:
        """Give up one request."""
        wish = self.model.pop(which % len(self.model))
        assert (wish.client, wish.request_id) in self.queue
        assert self.queue.remove(wish.client, wish.request_id) is wish
        assert self.queue.remove(wish.client, wish.request_id) is None

    @rule(client=st.integers(1, 3))
    def die(self, client: int) -> None:
        """End a client: all its requests leave, and nobody else's."""
        mine = [wish for wish in self.model if wish.client == client]
        assert self.queue.forget(client) == mine
        self.model = [wish for wish in self.model if wish.client != client]

    @rule()
    def everybody_is_served(self) -> None:
        """Let holders let go, one after the other, while small ones keep coming: nobody starves."""
        first = list(self.model)
        for _ in range((MAX_PASSES + 2) * (len(first) + 1)):
            self.join(4, 1, FOR_EVER)
            self.queue.offer(self.serve)
            if self.held:
                self.held.pop(0)
        left = [wish for wish in first if wish in self.model]
        assert not left, f"{len(left)} starve"

    @invariant()
    def proves_itself(self) -> None:
        """Let the queue prove its invariants, and find in it what is in the list."""
        self.queue.check()
        assert len(self.queue) == len(self.model)
        assert [wish.passed for wish in self.model] == [
            self.passed[wish.request_id] for wish in self.model
        ]


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(deadline=None, stateful_step_count=30, max_examples=60)


def test_who_is_refused_has_passed_nobody() -> None:
    """It has taken no room from those before it."""
    queue = RoomQueue[Waiter]()
    for client in (1, 2):
        queue.join(Waiter(client, 7, FOR_EVER))
    queue.offer(lambda waiter: Offer.REFUSED if waiter.client == 2 else Offer.NOT_ENOUGH)
    assert [(waiter.client, waiter.passed) for waiter in queue] == [(1, 0)]


def test_no_time_ends_while_room_is_being_made() -> None:
    """It ends when that is over, if it has come by then."""
    queue = RoomQueue[Waiter]()
    waiter = Waiter(1, 7, 10, is_served=True)
    queue.join(waiter)
    assert queue.expire(0) == queue.expire(10) == []
    waiter.is_served = False
    assert queue.expire(11) == [waiter]
