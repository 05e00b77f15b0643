"""What a client leaves unsealed: how that goes by and by, and that nobody sees a difference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import pytest

from shmplasma.layout import BOARD_WORDS
from shmplasma.pins import slots_of
from shmplasma.posted import Detach, Publish, Seal
from shmplasma.protocol import PROTOCOL_VERSION
from shmplasma.replies import Created, Done, Failure, Leased, Reply, Welcome
from shmplasma.requests import AskLease, Create, Flush, Hello, Request, Role
from shmplasma.store import ObjectStore
from shmplasma.table import NO_ENTRY
from tests.conversation import Conversation, Peer, name
from tests.crash.damage import Reopened

CAPACITY = 1 << 20
SIZE_BYTES = 1000
N_LEFT = 50
AT_ONCE = 4

_T = TypeVar("_T", bound=Reply)


def ask_now(peer: Peer, request: Request, expected: type[_T]) -> _T:
    """Send a request that is answered before the store does anything else."""
    return peer.take(peer.post(request), expected)


class Scene:
    """A store, a client that has not sealed what it has created, and another one."""

    def __init__(self) -> None:
        self.talk = Conversation(CAPACITY)
        self.store: ObjectStore = self.talk.store
        self.store._room.most_at_once = AT_ONCE
        self.other: Peer = self.talk.client()
        self.leaver: Peer = self.talk.connect()
        self.board = self.leaver.hello().board
        for number in range(N_LEFT):
            self.leaver.release(self.leaver.create(name(number), SIZE_BYTES))
        self.n_boards_free = self.store._boards.n_free

    def left(self) -> list[int]:
        """Return the numbers of the objects that have not gone yet."""
        return [n for n in range(N_LEFT) if self.store._parts.table.find(name(n)) != NO_ENTRY]

    def turns(self) -> Iterator[int]:
        """Do what is urgent, step by step; yield how many objects went in each."""
        while self.store.upkeep.has_urgent_work:
            before = len(self.left())
            self.talk.advance()
            self.store.check()
            yield before - len(self.left())


@pytest.fixture
def scene() -> Scene:
    """Return it before anybody has left."""
    return Scene()


def test_what_is_left_goes_by_and_by(scene: Scene) -> None:
    """Of many objects some go at once and some in each turn; others are answered in between, and all is as before then."""
    scene.talk.disconnect(scene.leaver)
    assert (len(scene.left()), scene.store.is_quiet) == (N_LEFT - AT_ONCE, False)
    assert scene.store._boards.n_free == scene.n_boards_free
    counts = []
    for count in scene.turns():
        ask_now(scene.other, Flush(), Done)
        counts.append(count)
    assert sum(counts) == N_LEFT - AT_ONCE
    assert max(counts) == AT_ONCE
    assert scene.store.is_quiet
    assert scene.store._boards.n_free == scene.n_boards_free + 1
    assert scene.store._room.free_bytes == scene.talk.layout.data_bytes


def test_little_goes_at_once(scene: Scene) -> None:
    """What goes in one turn leaves nothing to be done, and no board behind."""
    scene.store._room.most_at_once = N_LEFT
    scene.talk.disconnect(scene.leaver)
    assert (scene.left(), scene.store.is_quiet) == ([], True)
    assert scene.store._boards.n_free == scene.n_boards_free + 1
    scene.store.check()


def test_an_id_is_free_at_once(scene: Scene) -> None:
    """Who creates, or puts, an object under the id of one that is left does so, and keeps it."""
    lease = scene.other.ask(AskLease(SIZE_BYTES), Leased)
    scene.talk.disconnect(scene.leaver)
    first, second, *_ = scene.left()
    ask_now(scene.other, scene.other.new(name(first), SIZE_BYTES), Created)
    scene.other.write(Publish(name(second), lease.offset, SIZE_BYTES, 0, 0))
    assert len(scene.left()) == N_LEFT - AT_ONCE
    scene.store.check()
    assert sum(scene.turns()) == N_LEFT - AT_ONCE - 2
    assert scene.left() == [first, second]


def test_the_last_one_may_go_for_its_id(scene: Scene) -> None:
    """The board goes with it."""
    scene.talk.disconnect(scene.leaver)
    for number in scene.left():
        ask_now(scene.other, scene.other.new(name(number), 8), Created)
    assert scene.store.is_quiet
    assert scene.store._boards.n_free == scene.n_boards_free + 1
    scene.store.check()


def fill(scene: Scene) -> int:
    """Fill the room beside what is left with what could be evicted; return how many objects that takes."""
    number = 1000
    while (free := scene.store._room.free_bytes) >= 64:
        scene.other.put(name(number), min(free, 32_000))
        number += 1
    return number - 1000


def test_nothing_is_evicted_for_want_of_what_is_left(scene: Scene) -> None:
    """A creation that finds no other room has that of all that is left, at once."""
    n_objects = fill(scene)
    scene.talk.disconnect(scene.leaver)
    ask_now(scene.other, scene.other.new(name(999), 20_000), Created)
    assert scene.left() == []
    assert all(scene.store._objects.contains(name(1000 + n)) for n in range(n_objects))
    scene.store.check()


def test_nothing_is_evicted_for_a_lease_for_want_of_what_is_left(scene: Scene) -> None:
    """A lease has that room as well."""
    n_objects = fill(scene)
    scene.talk.disconnect(scene.leaver)
    assert ask_now(scene.other, AskLease(SIZE_BYTES), Leased).size_bytes
    assert scene.left() == []
    assert all(scene.store._objects.contains(name(1000 + n)) for n in range(n_objects))
    scene.store.check()


def test_nobody_is_refused_for_want_of_an_entry_that_is_left(scene: Scene) -> None:
    """Where the table is full, what is left goes first."""
    number = 1000
    while scene.store._parts.table.free_entries:
        scene.other.put(name(number), 8)
        number += 1
    scene.talk.disconnect(scene.leaver)
    for more in range(AT_ONCE + 1):
        ask_now(scene.other, scene.other.new(name(number + more), 8), Created)
    assert all(scene.store._objects.contains(name(n)) for n in range(1000, number))
    scene.store.check()


def test_what_a_thread_seals_that_has_left_is_not_sealed(scene: Scene) -> None:
    """A client that has said that it leaves seals nothing any more, whatever another of its threads does."""
    ask_now(scene.leaver, Detach(), Done)
    for number in scene.left():
        scene.leaver.write_silently(Seal(name(number)))
    scene.talk.poll()
    assert scene.left()
    assert sum(scene.turns()) == N_LEFT - AT_ONCE
    scene.talk.disconnect(scene.leaver)
    assert scene.store._boards.n_free == scene.n_boards_free + 1
    scene.store.check()


def test_who_leaves_and_then_ends_is_one(scene: Scene) -> None:
    """The boards of a client go when both has happened: it has ended, and nothing is left."""
    ask_now(scene.leaver, Detach(), Done)
    next(scene.turns())
    scene.talk.disconnect(scene.leaver)
    assert scene.store._boards.n_free == scene.n_boards_free
    assert sum(scene.turns()) == N_LEFT - 2 * AT_ONCE
    assert scene.store._boards.n_free == scene.n_boards_free + 1


@pytest.mark.parametrize("n_turns", [0, 3])
def test_a_successor_gives_what_is_left_to_nobody(scene: Scene, n_turns: int) -> None:
    """A store that dies in between leaves objects to a board that is nobody else's."""
    scene.talk.disconnect(scene.leaver)
    newcomer = scene.talk.connect()
    board = ask_now(newcomer, Hello(PROTOCOL_VERSION, Role.CLIENT, ""), Welcome).board
    ask_now(newcomer, Create(name(2000), SIZE_BYTES, 0, 0, slots_of(board)[0]), Created)
    for _ in range(n_turns):
        assert next(scene.turns()) == AT_ONCE
    later = Reopened(scene.talk.layout, scene.talk.words, scene.talk.raw)
    unsealed = later.store._objects.unsealed
    assert len(unsealed.of(board)) == 1
    assert set(unsealed.creators.values()) == {board, scene.board}
    # It does not see its process any more.
    later.carry_out(later.store.disconnect(scene.board, later.now_ns))
    later.turn()
    assert set(unsealed.creators.values()) == {board}
    later.store.check()


@pytest.mark.parametrize("granted_comes_first", [True, False])
def test_a_successor_knows_the_creation_that_was_granted(granted_comes_first: bool) -> None:
    """Of two threads that create one id the one has it that had it, whichever repeats its request first; and only once."""
    talk = Conversation(CAPACITY)
    client = talk.client()
    granted, late = client.new(name(1), SIZE_BYTES), client.new(name(1), SIZE_BYTES)
    client.ask(granted, Created)
    later = Reopened(talk.layout, talk.words, talk.raw)
    again = later.connect()
    board = granted.slot // BOARD_WORDS
    hello = Hello(PROTOCOL_VERSION, Role.CLIENT, "", reclaim=board + 1)
    assert again.ask(hello, Welcome).reclaimed
    later.write_slot(granted.slot, 0)  # as a client does before it repeats a creation
    if not granted_comes_first:
        assert again.refused(late) is Failure.EXISTS
    again.ask(granted, Created)
    assert later.read_slot(granted.slot)
    assert again.refused(late) is Failure.EXISTS
    later.write_slot(granted.slot, 0)
    assert again.refused(granted) is Failure.EXISTS
    later.store.check()
