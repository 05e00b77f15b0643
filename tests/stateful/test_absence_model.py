"""When a client may say that something is not there, under every interleaving that x86-TSO allows.

The model repeats the steps of `shmplasma.absence`, as `shmplasma.outbox.unread` (the client that asks), `Outbox.append` (who puts) and
`Posts.heed` (the store) take them.  As in `tests.stateful.test_memory_model` it has twins with a step left out, and the explorer has to
find what is wrong with those.  How the chain is followed is in `tests.stateful.test_claim_model`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.stateful.tso import Await, Load, Program, Report, Stage, Store, explore, require

PLACES = 2
"""Of the ring: as few as let it go round."""
OBJECTS = 3
ASKED = 2
"""The object that is put before the question is asked; object 3 is put at any time."""


@dataclass(frozen=True)
class Case:
    """What is done.

    Attributes
    ----------
    looks : bool
        Whether who asks looks into the outbox at all.
    again : bool
        Whether it looks at ACKNOWLEDGED again when it has seen how much is written.
    waits : bool
        Whether it waits until that was read.
    after : bool
        Whether the store acknowledges a record after it has entered the object.
    in_order : bool
        Whether the number of a record is written after what it says.
    """

    looks: bool = True
    again: bool = True
    waits: bool = True
    after: bool = True
    in_order: bool = True


def put(case: Case, number: int) -> Program:
    """Put objects, from this one on, and tell after the second."""
    place = (number - 1) % PLACES
    if number > PLACES:
        yield Await(f"read {number - PLACES}", 1)
    if not case.in_order:
        yield Store(f"number {place}", number)
    yield Store(f"record {place}", number)
    if case.in_order:
        yield Store(f"number {place}", number)
    if number == ASKED:
        yield Store("told", 1)
    return Stage(put, (case, number + 1)) if number < OBJECTS else "put"


def heed(case: Case, read: int) -> Program:
    """Enter what the next record says."""
    place = read % PLACES
    yield Await(f"number {place}", read + 1)
    said = yield Load(f"record {place}")
    if not case.after:
        yield Store("acknowledged", read + 1)
    yield Store(f"object {said}", 1)
    if case.after:
        yield Store("acknowledged", read + 1)
    yield Store(f"read {read + 1}", 1)
    return Stage(heed, (case, read + 1)) if read + 1 < OBJECTS else "read"


def ask(case: Case) -> Program:
    """Look for an object of which it was told: `Settling`.

    Who waits loads ACKNOWLEDGED until it is what he waits for; the explorer has the load that sees it at any time.
    """
    yield Await("told", 1)
    if case.looks:
        end = yield Load("acknowledged")
        while (yield Load(f"number {end % PLACES}")) == end + 1:
            end += 1
        if case.again and (yield Load("acknowledged")) > end:
            return "asks"
        if case.waits and (yield Load("acknowledged")) < end:
            return "waits"
    found = yield Load(f"object {ASKED}")
    require(bool(found), "what was put is not there")
    return "found"


def explore_case(case: Case) -> Report:
    """Explore one who puts, a store, and one who asks."""
    words = {"told": 0, "acknowledged": 0}
    words |= {f"{word} {place}": 0 for place in range(PLACES) for word in ("number", "record")}
    words |= {f"{word} {number}": 0 for number in range(OBJECTS + 1) for word in ("object", "read")}
    stages = [Stage(put, (case, 1)), Stage(heed, (case, 0)), Stage(ask, (case,))]
    return explore(stages, words, buffer_size=3)


def test_what_was_put_before_is_not_held_to_be_absent() -> None:
    """However far the store has read, and however often the ring goes round meanwhile."""
    report = explore_case(Case())
    assert report.violation == ""
    assert report.states > 1_000


@pytest.mark.parametrize(
    "case",
    [
        Case(looks=False),
        Case(again=False),
        Case(waits=False),
        Case(after=False),
        Case(in_order=False),
    ],
)
def test_absence_done_wrong(case: Case) -> None:
    """Whatever is left out, or done in the wrong order, somebody misses what was put."""
    assert "what was put is not there" in explore_case(case).violation.splitlines()[-1]
