"""The protocols without a message, under every interleaving that x86-TSO allows.

Each model repeats the steps of the code: `shmplasma.reader` and `shmplasma.room` (pin and take), `shmplasma.reader` and
`shmplasma.mover` (pin and move),
`shmplasma.leasing` and `shmplasma.leases` (lease and recall), `shmplasma.pinning` and `shmplasma.releases` (the
wake word), `shmplasma.outbox` (polling).  The bounds are those of `explore`'s arguments.  Each model has twins in which one step is left out or
two are swapped: that the explorer finds what is then wrong shows that it would find it in the original.

The numbers of states are asserted so that a model which no longer runs as far as it should is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pytest

from tests.stateful.tso import (
    Await,
    Fence,
    Load,
    Program,
    Report,
    Stage,
    Store,
    explore,
    membarrier,
    require,
)

FREE, CREATED, SEALED, EVICTING = range(4)
MOVING = 5


def state_word(generation: int, state: int) -> int:
    """Return what lies in an entry's first word."""
    return generation << 8 | state


# -- the model itself --------------------------------------------------------------------------


def test_loads_may_pass_stores() -> None:
    """The one reordering that the machine makes is in the model, and a fence forbids it."""

    def side(mine: str, other: str, fenced: bool) -> Program:
        yield Store(mine, 1)
        if fenced:
            yield Fence()
        return (yield Load(other))

    def both_read_nothing(fenced: bool) -> Report:
        def at_end(_: Mapping[str, int], results: Sequence[Any]) -> None:
            require(results != [0, 0], "both loads passed both stores")

        stages = [Stage(side, ("x", "y", fenced)), Stage(side, ("y", "x", fenced))]
        return explore(stages, {"x": 0, "y": 0}, buffer_size=1, at_end=at_end)

    assert both_read_nothing(fenced=True).violation == ""
    assert both_read_nothing(fenced=False).violation.endswith("both loads passed both stores")


def test_stores_arrive_in_order() -> None:
    """Whoever sees a CPU's second store sees its first, and a CPU sees its own at once."""

    def writer() -> Program:
        yield Store("data", 7)
        yield Store("flag", 1)
        require((yield Load("data")) == 7, "a CPU misses its own store")
        return "written"

    def reader() -> Program:
        flag = yield Load("flag")
        data = yield Load("data")
        require(data == 7 or not flag, "stores were swapped")
        return "read"

    def at_end(_: Mapping[str, int], results: Sequence[Any]) -> None:
        require(results == ["written", "read"], "a program has not ended")

    words = {"data": 0, "flag": 0}
    report = explore([Stage(writer), Stage(reader)], words, buffer_size=2, at_end=at_end)
    assert report.violation == ""


# -- pin and take ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Take:
    """One entry, and the incarnations that pass through it; what is varied about the protocol.

    The id, the field and both words of data of incarnation n are ``ids[n]``, n, n and n.

    Attributes
    ----------
    readers : int
        CPUs 0 to readers - 1; the store is the next.
    attempts : int
        How often the store tries to take the entry.
    ids : tuple of int
        Of each incarnation; the readers look for id 1.
    keep : bool
        Whether readers keep their pins for ever.
    barrier, state_first, pin_first, recheck : bool
        Whether the membarrier is there, whether the state word is read before the id and the field, whether the
        pin comes before the re-check, and whether there is one at all.
    """

    readers: int = 1
    attempts: int = 3
    ids: tuple[int, ...] = (1, 2, 1, 1)
    keep: bool = False
    barrier: bool = True
    state_first: bool = True
    pin_first: bool = True
    recheck: bool = True


def look_up(case: Take, pin: str) -> Program:
    """Find id 1 without a message, read it twice over and release it: `FastReader.buffers`."""
    word = (yield Load("state")) if case.state_first else 0
    found = yield Load("id")
    field = yield Load("field")
    if not case.state_first:
        word = yield Load("state")
    if found != 1 or word & 0xFF != SEALED:
        return "miss"
    if case.pin_first:
        yield Store(pin, 1)
    if case.recheck and (yield Load("state")) != word:
        yield Store(pin, 0)
        return "retreat"
    if not case.pin_first:
        yield Store(pin, 1)
    require(case.ids[field] == 1, f"the field of incarnation {field}, which has another id")
    return Stage(use, (case, pin, field, word >> 8))


def use(case: Take, pin: str, field: int, generation: int) -> Program:
    """Read data under a pin."""
    require(field == generation, f"field {field} was read under generation {generation}")
    for word in ("data 0", "data 1", "data 0"):
        data = yield Load(word)
        require(data == field, f"{word} of incarnation {data} read as that of {field}")
    if case.keep:
        return field
    yield Store(pin, 0)
    return "hit"


def take(case: Take, incarnation: int, attempts: int) -> Program:
    """Try to take the entry and reuse it: `Room.take`, `Table.free`, `Table.insert`, the writer, `Table.seal`."""
    if not attempts:
        return incarnation
    yield Store("state", state_word(incarnation, EVICTING))
    if case.barrier:
        yield from membarrier(range(case.readers))
    for reader in range(case.readers):
        if (yield Load(f"pin {reader}")):
            yield Store("state", state_word(incarnation, SEALED))
            return Stage(take, (case, incarnation, attempts - 1))
    incarnation += 1
    yield Store("state", state_word(incarnation, FREE))
    yield Store("id", case.ids[incarnation])
    yield Store("field", incarnation)
    yield Store("state", state_word(incarnation, CREATED))
    yield Store("data 0", incarnation)
    yield Store("data 1", incarnation)
    yield Store("state", state_word(incarnation, SEALED))
    return Stage(take, (case, incarnation, attempts - 1))


def explore_take(case: Take, buffer_size: int = 2) -> Report:
    """Explore readers of one entry against the store."""
    words = {
        "state": state_word(0, SEALED),
        "id": case.ids[0],
        "field": 0,
        "data 0": 0,
        "data 1": 0,
    }
    words |= {f"pin {reader}": 0 for reader in range(case.readers)}

    def at_end(words: Mapping[str, int], results: Sequence[Any]) -> None:
        *read, incarnation = results
        require(None not in results, "somebody waits for ever")
        require(words["state"] == state_word(incarnation, SEALED), "the entry is in no final state")
        for reader, result in enumerate(read):
            kept = isinstance(result, int)
            require(words[f"pin {reader}"] == kept, "a pin was lost, or left behind")
            require(not kept or result == incarnation, "what is pinned has gone")

    stages = [Stage(look_up, (case, f"pin {reader}")) for reader in range(case.readers)]
    stages.append(Stage(take, (case, 0, case.attempts)))
    return explore(stages, words, buffer_size=buffer_size, at_end=at_end)


@pytest.mark.parametrize(
    ("case", "buffer_size", "states"),
    [
        (Take(), 4, 12_932),
        (Take(keep=True), 4, 12_626),
        (Take(readers=2, attempts=2), 2, 352_143),
        (Take(readers=2, attempts=1, keep=True), 4, 49_558),
    ],
)
def test_pin_and_take(case: Take, buffer_size: int, states: int) -> None:
    """A reader that keeps its pin reads one incarnation only, and no pin is lost."""
    report = explore_take(case, buffer_size)
    assert report.violation == ""
    assert report.states == states


@pytest.mark.parametrize(
    ("case", "what"),
    [
        (Take(barrier=False), "data 0 of incarnation 1 read as that of 0"),
        (Take(state_first=False), "field 0 was read under generation 1"),
        (Take(pin_first=False), "data 0 of incarnation 1 read as that of 0"),
        (Take(recheck=False), "the field of incarnation 1, which has another id"),
        (Take(barrier=False, keep=True, readers=2), "data 0 of incarnation 1 read as that of 0"),
    ],
)
def test_pin_and_take_done_wrong(case: Take, what: str) -> None:
    """Without the membarrier, or with two steps swapped, a reader gets another object's bytes."""
    assert explore_take(case, buffer_size=1).violation.endswith(what)


# -- pin and move ------------------------------------------------------------------------------

OURS, TAIL, SOMEBODY_ELSES = 7, 8, 9


@dataclass(frozen=True)
class Move:
    """One object of two words that is moved to and fro, or slides down by one word, and what comes where it was.

    Attributes
    ----------
    readers : int
        CPUs 0 to readers - 1; the store is the next.
    attempts : int
        How often the store tries to move it.
    slides : bool
        Whether old and new place overlap: from words 1 and 2 to 0 and 1, instead of 0 and 1 to 2 and 3.
    keep : bool
        Whether readers keep their pins for ever.
    barrier, raised, copied_first, place_first : bool
        Whether the membarrier is there; the generation is raised; the bytes are copied before the object can be seen
        again (for a slide: not before it is hidden); and the place is changed before that.
    """

    readers: int = 1
    attempts: int = 2
    slides: bool = False
    keep: bool = False
    barrier: bool = True
    raised: bool = True
    copied_first: bool = True
    place_first: bool = True

    def places(self, moved: int) -> tuple[int, int]:
        """Return where the object is after so many moves, and where it is to go."""
        return (1, 0) if self.slides else ((0, 2), (2, 0))[moved % 2]


def look_up_moving(case: Move, pin: str) -> Program:
    """Find the object without a message: `FastReader.buffers`."""
    word = yield Load("state")
    place = yield Load("place")
    if word & 0xFF != SEALED:
        return "miss"
    yield Store(pin, 1)
    if (yield Load("state")) != word:
        yield Store(pin, 0)
        return "retreat"
    return Stage(use_moving, (case, pin, place))


def use_moving(case: Move, pin: str, place: int) -> Program:
    """Read the object twice over under a pin."""
    for word, content in ((place, OURS), (place + 1, TAIL), (place, OURS)):
        require((yield Load(f"word {word}")) == content, "another object's bytes, or half of it")
    if case.keep:
        return place
    yield Store(pin, 0)
    return "hit"


def copy_object(target: int) -> Program:
    """Copy the object's words."""
    yield Store(f"word {target}", OURS)
    yield Store(f"word {target + 1}", TAIL)
    return None


def move(case: Move, moved: int, attempts: int) -> Program:
    """Try to move the object: `Mover._hide`, `Moves.copy` and `Moves.arrive`, or `Moves.slide`."""
    if not attempts or (case.slides and moved):
        return moved
    source, target = case.places(moved)
    generation = moved if case.raised else 0
    hidden_first = case.slides == case.copied_first
    if not hidden_first:
        yield from copy_object(target)
    yield Store("state", state_word(generation, MOVING))
    if case.barrier:
        yield from membarrier(range(case.readers))
    for reader in range(case.readers):
        if (yield Load(f"pin {reader}")):
            yield Store("state", state_word(generation, SEALED))
            return Stage(move, (case, moved, attempts - 1))
    if hidden_first and case.copied_first:
        yield from copy_object(target)
    if case.place_first:
        yield Store("place", target)
    yield Store("state", state_word(generation + case.raised, SEALED))
    if not case.place_first:
        yield Store("place", target)
    if hidden_first and not case.copied_first:
        yield from copy_object(target)
    for word in {source, source + 1} - {target, target + 1}:
        yield Store(f"word {word}", SOMEBODY_ELSES)
    return Stage(move, (case, moved + 1, attempts - 1))


def explore_move(case: Move, buffer_size: int = 2) -> Report:
    """Explore readers of an object against the store that moves it."""
    source, _ = case.places(0)
    words = {"state": state_word(0, SEALED), "place": source}
    words |= {f"word {word}": SOMEBODY_ELSES for word in range(4)}
    words |= {f"word {source}": OURS, f"word {source + 1}": TAIL}
    words |= {f"pin {reader}": 0 for reader in range(case.readers)}

    def at_end(words: Mapping[str, int], results: Sequence[Any]) -> None:
        *read, moved = results
        require(None not in results, "somebody waits for ever")
        require(words["state"] == state_word(moved * case.raised, SEALED), "it is hidden for ever")
        place = words["place"]
        require((words[f"word {place}"], words[f"word {place + 1}"]) == (OURS, TAIL), "it is lost")
        for reader, result in enumerate(read):
            kept = isinstance(result, int)
            require(words[f"pin {reader}"] == kept, "a pin was lost, or left behind")
            require(not kept or result == place, "it was moved under a pin")

    stages = [Stage(look_up_moving, (case, f"pin {reader}")) for reader in range(case.readers)]
    stages.append(Stage(move, (case, 0, case.attempts)))
    return explore(stages, words, buffer_size=buffer_size, at_end=at_end)


@pytest.mark.parametrize(
    ("case", "buffer_size", "states"),
    [
        (Move(attempts=3), 4, 6_410),
        (Move(keep=True), 4, 2_404),
        (Move(readers=2), 1, 79_286),
        (Move(slides=True), 4, 635),
        (Move(slides=True, readers=2), 2, 17_294),
    ],
)
def test_pin_and_move(case: Move, buffer_size: int, states: int) -> None:
    """A reader reads the object at its old place or at its new one, and it moves under no pin."""
    report = explore_move(case, buffer_size)
    assert report.violation == ""
    assert report.states == states


@pytest.mark.parametrize(
    "case",
    [
        Move(barrier=False),
        Move(raised=False),
        Move(place_first=False),
        Move(copied_first=False),
        Move(slides=True, barrier=False),
        Move(slides=True, raised=False),
        Move(slides=True, copied_first=False),
    ],
    ids=repr,
)
def test_pin_and_move_done_wrong(case: Move) -> None:
    """Without the membarrier or the new generation, or in another order, a reader gets another object's bytes."""
    assert explore_move(case, buffer_size=2).violation.endswith(
        "another object's bytes, or half of it"
    )


# -- a chain of entries ------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """Two entries in one chain, which are unlinked, freed, and linked anew with each other's extents.

    Entry 1 holds id 1 in extent 1, entry 2 id 2 in extent 2, and the bucket leads to 2 and on to 1.  An
    extent's word is ``id << 4 | number of the insertion``.

    Attributes
    ----------
    readers : int
        How many look for id 1.
    plan : tuple
        What the store does, in order: take the object of an id, or insert one.
    barrier, state_first : bool
        As for `Take`.
    """

    plan: tuple[tuple[str, int], ...]
    readers: int = 1
    barrier: bool = True
    state_first: bool = True


SWAP: Final = (("take", 1), ("take", 2), ("insert", 1), ("insert", 2), ("take", 1), ("insert", 3))
"""Id 1 moves to entry 2, in extent 1; then id 3 comes to where it was."""

_Links = tuple[tuple[int, int, int], ...]
"""Entry, id and extent of each entry in the chain, the head first: what the store knows."""


def walk(case: Chain, pin: str, entry: int, hops: int) -> Program:
    """Look at one entry of the chain, and go on with the next."""
    if not entry or not hops:
        return "miss"
    word = (yield Load(f"state {entry}")) if case.state_first else 0
    found = yield Load(f"id {entry}")
    extent = yield Load(f"extent of {entry}")
    following = yield Load(f"next of {entry}")
    if not case.state_first:
        word = yield Load(f"state {entry}")
    if found != 1:
        return Stage(walk, (case, pin, following, hops - 1))
    if word & 0xFF != SEALED:
        return "miss"
    yield Store(pin, entry)
    if (yield Load(f"state {entry}")) != word:
        yield Store(pin, 0)
        return "retreat"
    return Stage(use_extent, (pin, extent))


def start_walk(case: Chain, pin: str) -> Program:
    """Read the head of the chain."""
    return Stage(walk, (case, pin, (yield Load("bucket")), 3))


def use_extent(pin: str, extent: int) -> Program:
    """Read twice what lies in the extent."""
    first = yield Load(f"extent {extent}")
    require(first >> 4 == 1, f"read object {first >> 4} for 1")
    require((yield Load(f"extent {extent}")) == first, "the data changed under a pin")
    yield Store(pin, 0)
    return "hit"


def change(case: Chain, done: int, chain: _Links, free: tuple[tuple[int, int], ...]) -> Program:
    """Carry out one action of the plan: `Room.take`, `Table.remove`; `Table.insert`."""
    if done == len(case.plan):
        return chain
    action, object_id = case.plan[done]
    here = next((place for place, link in enumerate(chain) if link[1] == object_id), None)
    if action == "take" and here is not None:
        entry, _, extent = chain[here]
        word = yield Load(f"state {entry}")
        yield Store(f"state {entry}", word & ~0xFF | EVICTING)
        if case.barrier:
            yield from membarrier(range(case.readers))
        for reader in range(case.readers):
            if (yield Load(f"pin {reader}")) == entry:
                yield Store(f"state {entry}", word)
                return Stage(change, (case, done + 1, chain, free))
        following = chain[here + 1][0] if here + 1 < len(chain) else 0
        yield Store(f"state {entry}", state_word((word >> 8) + 1, FREE))
        yield Store(f"next of {chain[here - 1][0]}" if here else "bucket", following)
        chain = (*chain[:here], *chain[here + 1 :])
        free = (*free, (entry, extent))
    elif action == "insert" and here is None and free:
        # Entries are reused last in first out, extents from the lowest address on.
        entry, extent = free[-1][0], min(extent for _, extent in free)
        others = [pair for pair in free if pair[0] != entry]
        left = [pair[1] for pair in free if pair[1] != extent]
        free = tuple((pair[0], at) for pair, at in zip(others, left, strict=True))
        yield Store(f"extent {extent}", object_id << 4 | done)
        yield Store(f"id {entry}", object_id)
        yield Store(f"extent of {entry}", extent)
        yield Store(f"next of {entry}", chain[0][0] if chain else 0)
        yield Store("bucket", entry)
        word = yield Load(f"state {entry}")
        yield Store(f"state {entry}", word & ~0xFF | SEALED)
        chain = ((entry, object_id, extent), *chain)
    return Stage(change, (case, done + 1, chain, free))


def explore_chain(case: Chain) -> Report:
    """Explore readers of a chain against the store."""
    words = {"bucket": 2}
    for entry, following in ((1, 0), (2, 1)):
        words[f"state {entry}"] = state_word(0, SEALED)
        words[f"id {entry}"] = words[f"extent of {entry}"] = entry
        words[f"next of {entry}"] = following
        words[f"extent {entry}"] = entry << 4
    words |= {f"pin {reader}": 0 for reader in range(case.readers)}

    def at_end(words: Mapping[str, int], results: Sequence[Any]) -> None:
        require(None not in results, "somebody waits for ever")
        entry = words["bucket"]
        for expected, object_id, extent in results[-1]:
            require(entry == expected, "the chain is broken")
            require(words[f"state {entry}"] & 0xFF == SEALED, "an entry is in no final state")
            require(words[f"extent {extent}"] >> 4 == object_id, "an object has changed")
            entry = words[f"next of {entry}"]
        require(not entry, "the chain goes on")

    stages = [Stage(start_walk, (case, f"pin {reader}")) for reader in range(case.readers)]
    stages.append(Stage(change, (case, 0, ((2, 2, 2), (1, 1, 1)), ())))
    return explore(stages, words, buffer_size=1, at_end=at_end)


@pytest.mark.parametrize(
    ("case", "states"), [(Chain(SWAP), 9_357), (Chain(SWAP[:4], readers=2), 304_198)]
)
def test_chains_change_under_readers(case: Chain, states: int) -> None:
    """However entries and extents are exchanged, a reader finds its object or nothing."""
    report = explore_chain(case)
    assert report.violation == ""
    assert report.states == states


@pytest.mark.parametrize(
    ("case", "what"),
    [
        (Chain(SWAP, barrier=False), "the data changed under a pin"),
        (Chain(SWAP, state_first=False), "read object"),
    ],
)
def test_chains_done_wrong(case: Chain, what: str) -> None:
    """The same two mistakes are found in a chain."""
    assert what in explore_chain(case).violation.splitlines()[-1]


# -- lease and recall --------------------------------------------------------------------------

MINE, OTHERS = 1, 2


@dataclass(frozen=True)
class Recall:
    """Clients that put objects into their leases while the store recalls all of them.

    Attributes
    ----------
    clients : int
        CPUs 0 to clients - 1; the store is the next.
    objects : int
        How many each puts; each has room for so many.
    turns : int
        How often the store looks at a busy client.
    stopped : bool
        Whether client 0 is stopped for ever in the middle of its first put.
    barrier, busy_first, epoch_first, publish_first, drain_last : bool
        Whether the membarrier is there; BUSY is set before EPOCH is read; EPOCH is raised before BUSY is read; an
        object is sent before BUSY is cleared; the socket is drained after BUSY is read.
    """

    clients: int = 1
    objects: int = 3
    turns: int = 3
    stopped: bool = False
    barrier: bool = True
    busy_first: bool = True
    epoch_first: bool = True
    publish_first: bool = True
    drain_last: bool = True


def put(case: Recall, client: int, number: int) -> Program:
    """Put one object into the lease: `LeaseWriter.put`, from BUSY = 1 to BUSY = 0.  BUSY says which object it is, from 1.

    The socket is a row of plain words: not even the barriers in a system call are taken for granted.
    """
    if number == case.objects:
        return number
    if case.busy_first:
        yield Store(f"busy {client}", number + 1)
    epoch = yield Load(f"epoch {client}")
    if epoch:
        yield Store(f"busy {client}", 0)
        return number
    if not case.busy_first:
        yield Store(f"busy {client}", number + 1)
    yield Store(f"room {client} {number}", MINE)
    if case.stopped and not client:
        return "stopped"
    if not case.publish_first:
        yield Store(f"busy {client}", 0)
    yield Store(f"message {client} {number}", 1)
    if case.publish_first:
        yield Store(f"busy {client}", 0)
    return Stage(put, (case, client, number + 1))


def recall(case: Recall) -> Program:
    """Ask for all leases back: `Leases.recall` and the barrier."""
    if case.epoch_first:
        for client in range(case.clients):
            yield Store(f"epoch {client}", 1)
        if case.barrier:
            yield from membarrier(range(case.clients))
    return Stage(take_back, (case, 0, case.turns, ()))


def take_back(case: Recall, client: int, turns: int, taken: tuple[int, ...]) -> Program:
    """Look at one client until it is not busy, drain its socket, and give what is left to somebody else.

    The result has the number of objects that were published for a lease that came back, and the negative number of the
    object that its client was busy with for one that did not.
    """
    if client == case.clients:
        return taken
    cursor = 0
    if not case.drain_last:
        cursor = yield from drained(case, client)
    busy = yield Load(f"busy {client}")
    if busy and turns > 1:
        return Stage(take_back, (case, client, turns - 1, taken))
    if not busy:
        if case.drain_last:
            cursor = yield from drained(case, client)
        if not case.epoch_first:
            yield Store(f"epoch {client}", 1)
            yield from membarrier(range(case.clients))
        for number in range(cursor, case.objects):
            yield Store(f"room {client} {number}", OTHERS)
    return Stage(take_back, (case, client + 1, case.turns, (*taken, -busy if busy else cursor)))


def drained(case: Recall, client: int) -> Any:
    """Read the client's messages and return how many objects it has published."""
    cursor = 0
    while cursor < case.objects and (yield Load(f"message {client} {cursor}")):
        cursor += 1
    return cursor


def explore_recall(case: Recall, outcomes: set[tuple[Any, ...]] | None = None) -> Report:
    """Explore clients that put against a store that recalls their leases."""
    words: dict[str, int] = {}
    for client in range(case.clients):
        words |= {f"busy {client}": 0, f"epoch {client}": 0}
        for number in range(case.objects):
            words |= {f"room {client} {number}": 0, f"message {client} {number}": 0}

    def at_end(words: Mapping[str, int], results: Sequence[Any]) -> None:
        require(None not in results, "somebody waits for ever")
        *clients, taken = results
        if outcomes is not None:
            outcomes.add((*clients, taken))
        for client, (published, left) in enumerate(zip(clients, taken, strict=True)):
            if published == "stopped":
                require(left == -1, "the lease of a busy client was taken")
                continue
            require(words[f"busy {client}"] == 0, "a client is busy for ever")
            if left < 0:
                require(published <= -left, "a client went on with a lease that was recalled")
            else:
                require(published == left, "what was published is lost")
            for number in range(published):
                require(words[f"room {client} {number}"] == MINE, "a byte is in two objects")

    stages = [Stage(put, (case, client, 0)) for client in range(case.clients)]
    return explore([*stages, Stage(recall, (case,))], words, buffer_size=3, at_end=at_end)


@pytest.mark.parametrize(
    ("case", "states"), [(Recall(objects=4), 1_381), (Recall(clients=2, objects=2), 47_689)]
)
def test_lease_and_recall(case: Recall, states: int) -> None:
    """No byte is in two objects, nothing published is lost, and a busy client lets go at its next put."""
    outcomes: set[tuple[Any, ...]] = set()
    report = explore_recall(case, outcomes)
    assert report.violation == ""
    assert report.states == states
    lefts = {left for *_, taken in outcomes for left in taken}
    assert lefts == {*range(-case.objects, 0), *range(case.objects + 1)}, "a case was never reached"


def test_a_busy_client_blocks_only_its_own_lease() -> None:
    """While one client is stopped in the middle of a put, the lease of the other one comes back."""
    outcomes: set[tuple[Any, ...]] = set()
    report = explore_recall(Recall(clients=2, objects=2, turns=2, stopped=True), outcomes)
    assert report.violation == ""
    assert ("stopped", 2, (-1, 2)) in outcomes


@pytest.mark.parametrize(
    ("case", "what"),
    [
        (Recall(barrier=False), "what was published is lost"),
        (Recall(busy_first=False), "what was published is lost"),
        (Recall(epoch_first=False), "what was published is lost"),
        (Recall(publish_first=False), "what was published is lost"),
        (Recall(drain_last=False), "what was published is lost"),
    ],
)
def test_lease_and_recall_done_wrong(case: Recall, what: str) -> None:
    """Without the membarrier, or with two steps swapped, room is given away that was published."""
    assert explore_recall(case).violation.endswith(what)


# -- the wake word -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Wake:
    """Clients that release what the store waits for.

    Attributes
    ----------
    clients : int
        CPUs 0 to clients - 1; the store is the next.
    pins : int
        How many pins each has; it releases them one after the other.
    barrier, flag_first, clear_first, anew, ordered : bool
        Whether the membarrier is there; WAKE is raised before the boards are read; a pin is cleared before WAKE is
        read; the store sets another number when it has emptied the pipe, and lets a barrier pass after that as well.
    """

    clients: int = 2
    pins: int = 1
    barrier: bool = True
    flag_first: bool = True
    clear_first: bool = True
    anew: bool = True
    ordered: bool = True


def release(case: Wake, client: int, number: int, woken_by: int) -> Program:
    """Clear a pin, and wake the store if it wants to know and was not told since it looked: `Pin.__del__`.

    The pipe holds one byte, so that it is often full.
    """
    if number == case.pins:
        return "released"
    wanted = 0 if case.clear_first else (yield Load("wake"))
    yield Store(f"pin {client} {number}", 0)
    if case.clear_first:
        wanted = yield Load("wake")
    if wanted not in (0, woken_by):
        if not (yield Load("pipe")):
            yield Store("pipe", 1)
        woken_by = wanted
    return Stage(release, (case, client, number + 1, woken_by))


def wait_for_release(case: Wake) -> Program:
    """Raise WAKE, let a barrier pass, and read the boards: `Releases._await`."""
    if case.flag_first:
        yield Store("wake", 1)
        if case.barrier:
            yield from membarrier(range(case.clients))
        return Stage(scan, (case, 1))
    pinned = 0
    for word in _pins(case):
        pinned += yield Load(word)
    yield Store("wake", 1)
    return Stage(sleep, (case, 1)) if pinned else "gone"


def _pins(case: Wake) -> list[str]:
    return [
        f"pin {client} {number}" for client in range(case.clients) for number in range(case.pins)
    ]


def scan(case: Wake, number: int) -> Program:
    """Read the boards: `Releases.wake`."""
    for word in _pins(case):
        if (yield Load(word)):
            return Stage(sleep, (case, number))
    yield Store("wake", 0)
    return "gone"


def sleep(case: Wake, number: int) -> Program:
    """Wait until something is in the pipe, empty it, set another number, and look again: `Server._wake`, `Releases.woken`."""
    yield Await("pipe", 1)
    yield Store("pipe", 0)
    yield Fence()
    if case.anew:
        number += 1
        yield Store("wake", number)
        if case.ordered:
            yield from membarrier(range(case.clients))
    return Stage(scan, (case, number))


def explore_wake(case: Wake) -> Report:
    """Explore releases against a store that waits for them."""
    words = {"wake": 0, "pipe": 0} | dict.fromkeys(_pins(case), 1)

    def at_end(_: Mapping[str, int], results: Sequence[Any]) -> None:
        require(results[-1] == "gone", "the store sleeps although all pins were released")

    stages = [Stage(release, (case, client, 0, 0)) for client in range(case.clients)]
    stages.append(Stage(wait_for_release, (case,)))
    return explore(stages, words, buffer_size=2, at_end=at_end)


@pytest.mark.parametrize(
    ("clients", "pins", "states"), [(1, 1, 84), (2, 1, 1_285), (1, 3, 669), (2, 2, 22_733)]
)
def test_nobody_sleeps_for_ever(clients: int, pins: int, states: int) -> None:
    """When all pins are released the store notices, however the steps fall."""
    report = explore_wake(Wake(clients, pins))
    assert report.violation == ""
    assert report.states == states


@pytest.mark.parametrize(
    "case",
    [
        Wake(barrier=False),
        Wake(flag_first=False),
        Wake(clear_first=False),
        Wake(1, 2, anew=False),
        Wake(1, 2, ordered=False),
    ],
    ids=repr,
)
def test_the_wake_word_done_wrong(case: Wake) -> None:
    """Without one of the barriers, with two steps swapped, or with one number for ever, the store sleeps for ever."""
    assert explore_wake(case).violation.endswith("although all pins were released")


# -- the outboxes that are polled --------------------------------------------------------------


@dataclass(frozen=True)
class Poll:
    """Clients that write records while a store which has polled goes to sleep.

    Attributes
    ----------
    clients, records : int
        CPUs 0 to clients - 1, and how many records each writes; the store is the next.
    barrier, clear_first, record_first : bool
        Whether the membarrier is there; POLLED is cleared before the outboxes are read for the last time; a record
        is written before POLLED is read.
    """

    clients: int = 1
    records: int = 2
    barrier: bool = True
    clear_first: bool = True
    record_first: bool = True


def post(case: Poll, client: int, number: int) -> Program:
    """Write a record and announce it unless the store polls: `Channel.post`.

    A socket has one byte, so that it is often full; sending is a system call, and passes a barrier.
    """
    if number == case.records:
        return "posted"
    polled = 0 if case.record_first else (yield Load("polled"))
    yield Store(f"record {client} {number}", 1)
    if case.record_first:
        polled = yield Load("polled")
    if not polled:
        yield Fence()
        if not (yield Load("socket")):
            yield Store("socket", 1)
    return Stage(post, (case, client, number + 1))


def stop_polling(case: Poll) -> Program:
    """Clear POLLED, let a barrier pass, and read the outboxes: `ObjectStore.stop_polling`."""
    if case.clear_first:
        yield Store("polled", 0)
        if case.barrier:
            yield from membarrier(range(case.clients))
        return Stage(heed_all, (case,))
    read = yield from heeded(case)
    yield Store("polled", 0)
    yield from membarrier(range(case.clients))
    return "all" if read == case.clients * case.records else Stage(await_message, (case,))


def heed_all(case: Poll) -> Program:
    """Read the outboxes: `Posts.heed_all`."""
    read = yield from heeded(case)
    return "all" if read == case.clients * case.records else Stage(await_message, (case,))


def heeded(case: Poll) -> Any:
    """Read all outboxes and return how many records are there."""
    count = 0
    for client in range(case.clients):
        for number in range(case.records):
            if not (yield Load(f"record {client} {number}")):
                break
            count += 1
    return count


def await_message(case: Poll) -> Program:
    """Sleep until a message comes, and read the outboxes: `Server._sleep`."""
    yield Await("socket", 1)
    yield Store("socket", 0)
    yield Fence()
    return Stage(heed_all, (case,))


def explore_poll(case: Poll) -> Report:
    """Explore clients that post against a store that stops polling."""
    words = {"polled": 1, "socket": 0}
    for client in range(case.clients):
        words |= {f"record {client} {number}": 0 for number in range(case.records)}

    def at_end(_: Mapping[str, int], results: Sequence[Any]) -> None:
        require(results[-1] == "all", "the store sleeps over a record")

    stages = [Stage(post, (case, client, 0)) for client in range(case.clients)]
    return explore([*stages, Stage(stop_polling, (case,))], words, buffer_size=3, at_end=at_end)


@pytest.mark.parametrize(
    ("case", "states"), [(Poll(records=3), 356), (Poll(clients=2), 7_200)], ids=repr
)
def test_no_record_is_slept_over(case: Poll, states: int) -> None:
    """A record that was not announced is read before the store sleeps, however the steps fall."""
    report = explore_poll(case)
    assert report.violation == ""
    assert report.states == states


@pytest.mark.parametrize(
    "case", [Poll(barrier=False), Poll(clear_first=False), Poll(record_first=False)], ids=repr
)
def test_polling_done_wrong(case: Poll) -> None:
    """Without the membarrier, or with two steps swapped, the store sleeps over a record."""
    assert explore_poll(case).violation.endswith("the store sleeps over a record")
