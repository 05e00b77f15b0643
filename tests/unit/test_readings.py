"""How often the store reads the boards for one request in a full store: what that takes is as much as clients hold."""

from __future__ import annotations

from typing import cast

import pytest

from shmplasma.layout import BOARD_BYTES
from shmplasma.replies import Created, Done, Failed, Number
from shmplasma.requests import Grow, SetOptions
from shmplasma.waiters import FOR_EVER
from tests.conversation import Conversation, Peer, name

N_OBJECTS = 64
CAPACITY = N_OBJECTS * 64
NEW = name(N_OBJECTS)
BARRIER = -1


class Readings:
    """The segment as bytes, with a note of each board that is read.

    Attributes
    ----------
    events : list of int
        Boards that were read, and `BARRIER` for each barrier of which that was to be noted.
    """

    def __init__(self, raw: memoryview, first: int) -> None:
        self._raw = raw
        self._first = first
        self.events: list[int] = []

    def __getitem__(self, where: slice) -> memoryview:
        """Read a part of a board."""
        self.events.append((where.start - self._first) // BOARD_BYTES)
        return self._raw[where]

    def __setitem__(self, where: slice, content: bytes) -> None:
        """Write to the segment."""
        self._raw[where] = content


class Full:
    """A full store whose objects are held by three clients, the second of which has two boards, but for the oldest four."""

    def __init__(self) -> None:
        self.talk = Conversation(CAPACITY)
        self.holders = [self.talk.client() for _ in range(3)]
        self.boards = [0, 1, 2, self.holders[1].ask(Grow(), Number).value]
        table = self.talk.store._parts.table
        for number in range(N_OBJECTS):
            self.holders[0].put(name(number))
        for number in range(4, N_OBJECTS):
            slot = self.boards[number % 4] * 512 + 100 + number
            self.talk.write_slot(slot, table.find(name(number)) + 1)
        self.asker = self.talk.client()
        self.boards.append(4)
        self.readings = Readings(self.talk.raw, self.talk.layout.boards)
        self.talk.store._parts.boards._raw = cast("memoryview", self.readings)

    def read(self) -> list[int]:
        """Return how often each board was read since the last time."""
        events = self.readings.events[:]
        self.readings.events.clear()
        return [events.count(board) for board in self.boards]

    def wait(self, size_bytes: int) -> int:
        """Let a creation wait for room, and return its request's id."""
        request_id = self.asker.post(self.asker.new(NEW, size_bytes)._replace(timeout_ns=FOR_EVER))
        self.talk.turn()
        self.read()
        return request_id


@pytest.fixture
def full() -> Full:
    """Return a full store."""
    return Full()


@pytest.mark.parametrize("n_victims", [1, 4])
def test_a_creation_reads_each_board_before_a_take_and_after_its_barrier(
    full: Full, n_victims: int
) -> None:
    """The first reading says whether there is room to be made, and what may go; the second one what goes."""
    events = full.readings.events
    full.talk.memory.at_barrier = lambda: events.append(BARRIER)
    full.asker.ask(full.asker.new(NEW, 64 * n_victims), Created)
    at = events.index(BARRIER)
    assert sorted(events[:at]) == sorted(events[at + 1 :]) == sorted(full.boards)
    assert full.talk.ids() == {*map(name, range(n_victims, N_OBJECTS)), NEW}
    full.talk.store.check()


def test_a_creation_that_has_room_reads_none(full: Full) -> None:
    """Whatever is held."""
    full.talk.store._parts.room.make_room(64)
    full.read()
    full.asker.ask(full.asker.new(NEW, 64), Created)
    assert full.read() == [0] * 5


def refuse(full: Full, asker: Peer, size_bytes: int) -> Failed:
    """Ask for what cannot be had, with nothing read before it."""
    full.read()
    return asker.ask(asker.new(name(N_OBJECTS + 1), size_bytes), Failed)


def test_a_refusal_reads_each_board_twice(full: Full) -> None:
    """Once to find that there is no room, and once for all that is told of who holds what."""
    failed = refuse(full, full.asker, 64 * 5)
    assert full.read() == [2] * 5
    assert failed.pinned_bytes == 64 * 60
    assert sorted(holder.held_bytes for holder in failed.holders) == [64 * 15, 64 * 15, 64 * 30]
    assert "held most: " in failed.text


def test_a_refusal_for_its_size_reads_each_board_once(full: Full) -> None:
    """What is larger than the store needs no look for room."""
    failed = refuse(full, full.asker, CAPACITY + 1)
    assert "larger than the store" in failed.text
    assert full.read() == [1] * 5


def test_a_refusal_for_a_limit_reads_the_boards_of_its_client_once_more(full: Full) -> None:
    """What the client holds, and then who holds what."""
    full.holders[1].ask(SetOptions(64 * 30, "limited"), Done)
    failed = refuse(full, full.holders[1], 64)
    assert (failed.held_bytes, failed.limit_bytes) == (64 * 30, 64 * 30)
    assert full.read() == [1, 2, 1, 2, 1]


def test_what_one_pins_twice_or_makes_up_is_counted_once_or_not(full: Full) -> None:
    """Of holders, and of all; what is not sealed counts for its creator, pinned or not."""
    table = full.talk.store._parts.table
    oldest, end = table.find(name(0)), table.end
    for slot, word in ((1, oldest + 1), (2, oldest + 1), (514, oldest + 1), (515, end + 1)):
        full.talk.write_slot(slot, word)
    slot = full.holders[2].create(NEW)
    for each in (slot, 0):
        failed = refuse(full, full.asker, CAPACITY + 1)
        assert failed.pinned_bytes == 64 * (62 if each else 61)
        assert failed.unsealed_bytes == 64
        held = sorted(holder.held_bytes for holder in failed.holders)
        assert held == [64 * 16, 64 * 16, 64 * 31]
        full.talk.write_slot(slot, 0)


def test_whoever_waits_is_served_with_three_readings(full: Full) -> None:
    """How much can be had, what may go for the first of those that wait, and what goes; nothing after the last one has it."""
    request_id = full.wait(64 * 5)
    assert request_id not in full.asker.replies
    full.talk.write_slot(100 + 4, 0)
    full.talk.turn()
    full.asker.take(request_id, Created)
    assert full.read() == [3] * 5
    full.talk.store.check()


def test_whoever_goes_on_waiting_costs_one_reading(full: Full) -> None:
    """As long as no more can be had than that."""
    request_id = full.wait(64 * 5)
    full.talk.carry_out(full.talk.store.offer_room(0, 0))
    assert request_id not in full.asker.replies
    assert full.read() == [1] * 5
