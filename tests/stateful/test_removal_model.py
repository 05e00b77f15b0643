"""That nobody finds what was deleted, under every interleaving that x86-TSO allows.

The model repeats the steps of `shmplasma.removal` and `shmplasma.pins`, as `FastReader.hold` and `Removal` (who deletes), `FastReader.buffer`
and `FastReader.contains` (who reads), and `Room.take` and `Table.relocate` (the store) take them.  There is one entry, with one object in its
first generation and, if the store uses it anew, or has moved the object, one in its second.  As in `tests.stateful.test_memory_model`
it has twins with a step left out, or in the wrong order, and the explorer has to find what is wrong with those.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import pytest

from shmplasma.layout import EntryState
from tests.stateful.tso import (
    Await,
    Fence,
    Load,
    Program,
    Report,
    Stage,
    Step,
    Store,
    explore,
    membarrier,
    require,
)

EVICTING, FREE, SEALED = (
    int(state) for state in (EntryState.EVICTING, EntryState.FREE, EntryState.SEALED)
)
DOOMED, MOVING = int(EntryState.DOOMED), int(EntryState.MOVING)
CLIENTS = (1, 2, 3)
"""The CPUs of who deletes the first object, who deletes the second, and who reads; the store's is 0."""


def word(generation: int, state: int) -> int:
    """Return a state word."""
    return generation << 3 | state


@dataclass(frozen=True)
class Case:
    """What is done.

    Attributes
    ----------
    pins : bool
        Whether who deletes holds the object.
    looks_again : bool
        Whether he looks at the state once more after that.
    marks_first : bool
        Whether he marks it before he tells of it.
    lets_go_after : bool
        Whether he lets go of it after he has marked it.
    heeds : bool
        Whether who reads looks at the mark.
    heeds_in_time : bool
        Whether who asks if it is there does so before he looks at the state again.
    barrier : bool
        Whether the store issues a barrier.
    carries : bool
        Whether it moves a mark with its object.
    carries_first : bool
        Whether it does so before the object can be found in its next generation.
    """

    pins: bool = True
    looks_again: bool = True
    marks_first: bool = True
    lets_go_after: bool = True
    heeds: bool = True
    heeds_in_time: bool = True
    barrier: bool = True
    carries: bool = True
    carries_first: bool = True


def delete(case: Case, number: int) -> Program:
    """Delete an object and tell the reader of that (`Removal.delete`); ask the store if that is not as expected."""
    generation = number
    if number > 1:
        yield Await(f"put {number}", 1)
    found = yield Load("state")
    if found != word(generation, SEALED):
        return "asks"
    if case.pins:
        yield Store(f"slot {number}", 1)
    if case.looks_again and (yield Load("state")) != found:
        yield Store(f"slot {number}", 0)
        return "asks"
    if (yield Load("mark")) != found:
        yield Store(f"record {number}", 1)
        if not case.marks_first:
            yield Store(f"told {number}", 1)
        if not case.lets_go_after:
            yield Store(f"slot {number}", 0)
        yield Store("mark", found)
    yield Store(f"slot {number}", 0)
    yield Store(f"told {number}", 1)
    return "deleted"


def read(case: Case, number: int, by: str) -> Program:
    """Look for an object of whose deletion it was told: `FastReader.buffer`, or `FastReader.contains`, which pins nothing."""
    yield Await(f"told {number}", 1)
    found = yield Load("state")
    if found & 7 != SEALED or (yield Load("object")) != number:
        return "asks"
    if by == "get":
        yield Store("slot 3", 1)
    mark = (yield Load("mark")) if case.heeds and case.heeds_in_time else 0
    if (yield Load("state")) != found:
        return "asks"
    if case.heeds and not case.heeds_in_time:
        mark = yield Load("mark")
    require(mark == found, "what was deleted is found")
    return "asks"


def pinned() -> Generator[Step, int, bool]:
    """Tell whether anybody pins the entry."""
    for client in CLIENTS:
        if (yield Load(f"slot {client}")):
            return True
    return False


def put_second() -> Program:
    """Put the second object in the entry, which nobody pins."""
    yield Store("state", word(2, FREE))
    yield Store("object", 2)
    yield Store("state", word(2, SEALED))
    yield Store("put 2", 1)
    return "replaced"


def replace(case: Case) -> Program:
    """Evict the first object, or delete it when its record is there, and put the second in its entry (`Room.take`)."""
    yield Store("state", word(1, EVICTING))
    if case.barrier:
        yield from membarrier(CLIENTS)
    if (yield from pinned()):
        yield Store("state", word(1, SEALED))
        yield Await("record 1", 1)
        yield Store("state", word(1, DOOMED))
        yield Fence()
        yield Await("slot 1", 0)
        yield Await("slot 3", 0)
    return (yield from put_second())


def delete_and_replace(case: Case) -> Program:
    """Do so, and never evict."""
    yield Await("record 1", 1)
    yield Store("state", word(1, DOOMED))
    if case.barrier:
        yield from membarrier(CLIENTS)
    yield Await("slot 1", 0)
    yield Await("slot 3", 0)
    return (yield from put_second())


def move(case: Case) -> Program:
    """Move the object to its next generation (`Mover` and `Table.relocate`)."""
    yield Store("state", word(1, MOVING))
    if case.barrier:
        yield from membarrier(CLIENTS)
    if (yield from pinned()):
        yield Store("state", word(1, SEALED))
        return "pinned"
    is_marked = case.carries and (yield Load("mark")) == word(1, SEALED)
    if is_marked and case.carries_first:
        yield Store("mark", word(2, SEALED))
    yield Store("state", word(2, SEALED))
    if is_marked and not case.carries_first:
        yield Store("mark", word(2, SEALED))
    return "moved"


def explore_case(case: Case, store: Stage, number: int, by: str, *, deletes: int) -> Report:
    """Explore a store, one or two who delete, and one who reads."""
    words = {"state": word(1, SEALED), "object": 1, "mark": 0, "put 2": 0, "slot 3": 0}
    for each in (1, 2):
        words |= {f"{name} {each}": 0 for name in ("slot", "record", "told")}
    second = Stage(delete, (case, 2)) if deletes > 1 else Stage(rest)
    stages = [store, Stage(delete, (case, 1)), second, Stage(read, (case, number, by))]
    return explore(stages, words, buffer_size=3)


def rest() -> Program:
    """Do nothing."""
    yield Fence()
    return "rested"


def violations(case: Case) -> list[str]:
    """Explore all that may happen to an entry; return what went wrong."""
    found: list[str] = []
    for by in ("get", "contains"):
        for store in (replace, delete_and_replace):
            for number in (1, 2):
                report = explore_case(case, Stage(store, (case,)), number, by, deletes=2)
                found.append(report.violation)
        report = explore_case(case, Stage(move, (case,)), 1, by, deletes=1)
        found.append(report.violation)
    return [each.splitlines()[-1] for each in found if each]


def test_nobody_finds_what_was_deleted() -> None:
    """Whatever becomes of the entry meanwhile, whoever reads, and however."""
    assert violations(Case()) == []


@pytest.mark.parametrize(
    "case",
    [
        Case(pins=False),
        Case(looks_again=False),
        Case(marks_first=False),
        Case(lets_go_after=False),
        Case(heeds=False),
        Case(heeds_in_time=False),
        Case(barrier=False),
        Case(carries=False),
        Case(carries_first=False),
    ],
)
def test_deletion_done_wrong(case: Case) -> None:
    """Whatever is left out, or done in the wrong order, somebody finds what was deleted."""
    assert set(violations(case)) == {"what was deleted is found"}
