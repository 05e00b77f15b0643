"""What is put, and found by its record before the store has read it, under every interleaving that x86-TSO allows.

The models repeat the steps of `shmplasma.unread`, as `Unread.take` (who looks for the object), `Posts.heed`, `Room.take`, `Releases.settle`,
`Unsealed.abort` and `Boards.revoke` (the store) take them.  As in `tests.stateful.test_memory_model`, each has twins with a step left out or two swapped, and the
explorer has to find what is wrong with those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.stateful.tso import (
    Await,
    Load,
    Program,
    Report,
    Stage,
    Store,
    explore,
    membarrier,
    require,
)

FREE, SEALED, EVICTING, CREATED = range(4)
OFFSET, ENTRY = 1, 2
"""What stands in a slot."""
OURS, SOMEBODY_ELSES = 1, 2
"""Whose bytes lie there, and whose record it is."""
GETTER = 0


@dataclass(frozen=True)
class Case:
    """An object is put and looked for, and the store would like to have its room back.

    Attributes
    ----------
    refused : bool
        Whether the store refuses the record, so that the room is free as soon as nobody pins it.
    deleted : bool
        Whether somebody deletes the object as soon as it is in the table, and then tells the getter to look for it.
    leaves : bool
        Whether its putter leaves when the record was read, and somebody else gets his board.
    keep : bool
        Whether the getter never lets go.
    attempts : int
        How often the store tries to take the object.
    checked, pinned_first, compared : bool
        Whether the getter looks at ACKNOWLEDGED after its pin; whether it has pinned the offset before that; and whether it looks at the
        record as well.
    looked : bool
        Whether it looks into the table, in which the object is not, before that.
    barrier, acknowledged_first, cleared_first, resolved : bool
        Whether the store issues a membarrier before it looks at the slots; has acknowledged the record before; clears an outbox before
        its ACKNOWLEDGED; and heeds pins by the offset.
    """

    refused: bool = False
    deleted: bool = False
    leaves: bool = False
    keep: bool = False
    attempts: int = 2
    checked: bool = True
    pinned_first: bool = True
    compared: bool = True
    looked: bool = True
    barrier: bool = True
    acknowledged_first: bool = True
    cleared_first: bool = True
    resolved: bool = True


def put(case: Case) -> Program:
    """Fill the object, write the record, and say so."""
    yield Store("data", OURS)
    yield Store("record", OURS)
    if not case.deleted:
        yield Store("told", 1)
        return "put"
    yield Await("state", SEALED)
    yield Store("mark", 1)
    yield Store("told", 1)
    return "deleted"


def get(case: Case) -> Program:
    """Look for the object in the table, then for its record: `Reading.get_buffers`."""
    yield Await("told", 1)
    if (yield Load("state")) == SEALED:
        yield Store("slot", ENTRY)
        if (yield Load("state")) == SEALED and not (yield Load("mark")):
            return Stage(use, (case,))
        yield Store("slot", 0)
    if (yield Load("acknowledged")) or (yield Load("record")) != OURS:
        return "asks"
    if case.looked and (yield Load("chain")):
        return "asks"
    if case.pinned_first:
        yield Store("slot", OFFSET)
    if (case.checked and (yield Load("acknowledged"))) or (
        case.compared and (yield Load("record")) != OURS
    ):
        yield Store("slot", 0)
        return "asks"
    if not case.pinned_first:
        yield Store("slot", OFFSET)
    require(not case.deleted, "what was deleted is there")
    return Stage(use, (case,))


def use(case: Case) -> Program:
    """Read the object twice over under a pin, and let go of it."""
    for _ in range(2):
        require((yield Load("data")) == OURS, "somebody else's bytes")
    if case.keep:
        return "holds it"
    yield Store("slot", 0)
    return "had it"


def heed(case: Case) -> Program:
    """Carry out a record and acknowledge it: `Posts.heed`."""
    yield Await("record", OURS)
    if not case.refused:
        yield Store("chain", 1)
        yield Store("state", SEALED)
    if case.acknowledged_first:
        yield Store("acknowledged", 1)
    return Stage(settle if case.refused else take, (case, case.attempts))


def take(case: Case, attempts: int) -> Program:
    """Try to take the object and use its room anew: `Room.take`."""
    if not attempts:
        return Stage(after, (case, "kept"))
    yield Store("state", EVICTING)
    if case.barrier:
        yield from membarrier([GETTER])
    slot = yield Load("slot")
    if slot == ENTRY or (case.resolved and slot == OFFSET):
        yield Store("state", SEALED)
        return Stage(take, (case, attempts - 1))
    yield Store("state", FREE)
    yield Store("chain", 0)
    yield Store("data", SOMEBODY_ELSES)
    return Stage(after, (case, "taken"))


def settle(case: Case, attempts: int) -> Program:
    """Use room in limbo anew that nobody pins: `Releases.settle`."""
    if not attempts:
        return Stage(after, (case, "kept"))
    if case.barrier:
        yield from membarrier([GETTER])
    if case.resolved and (yield Load("slot")):
        return Stage(settle, (case, attempts - 1))
    yield Store("data", SOMEBODY_ELSES)
    return Stage(after, (case, "taken"))


def after(case: Case, outcome: str) -> Program:
    """Have the putter leave, and somebody else get his board."""
    if not case.acknowledged_first:
        yield Store("acknowledged", 1)
    if case.leaves:
        words = ("record", "acknowledged") if case.cleared_first else ("acknowledged", "record")
        for word in words:
            yield Store(word, 0)
        yield Store("record", SOMEBODY_ELSES)
    return outcome


def explore_case(case: Case, buffer_size: int = 3) -> Report:
    """Explore a getter, a store and a putter."""
    names = "data", "record", "told", "mark", "state", "chain", "acknowledged", "slot"

    def at_end(words: Mapping[str, int], results: Sequence[Any]) -> None:
        got, kept, _ = results
        # What was evicted before nobody deletes.
        require(case.deleted or None not in results, "somebody waits for ever")
        if got == "holds it":
            require(kept == "kept" and words["data"] == OURS, "what is pinned has gone")
        else:
            require(words["slot"] == 0, "a pin was left behind")

    stages = [Stage(get, (case,)), Stage(heed, (case,)), Stage(put, (case,))]
    return explore(stages, dict.fromkeys(names, 0), buffer_size=buffer_size, at_end=at_end)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "case",
    [{}, {"refused": True}, {"deleted": True}, {"leaves": True}, {"refused": True, "leaves": True}],
)
def test_what_is_found_by_its_record_stays(case: dict[str, bool], keep: bool) -> None:
    """Whatever the store makes of the record meanwhile, and whoever leaves."""
    report = explore_case(Case(**case, keep=keep))
    assert report.violation == ""
    assert report.states > 100


@pytest.mark.parametrize(
    "case",
    [
        Case(barrier=False),
        Case(checked=False),
        Case(pinned_first=False),
        Case(acknowledged_first=False),
        Case(resolved=False),
        Case(refused=True, barrier=False),
        Case(refused=True, checked=False),
        Case(refused=True, pinned_first=False),
        Case(refused=True, acknowledged_first=False),
        Case(refused=True, resolved=False),
        Case(leaves=True, compared=False),
        Case(leaves=True, cleared_first=False),
    ],
)
def test_a_record_that_is_read_meanwhile(case: Case) -> None:
    """Whatever is left out or swapped, somebody reads another object's bytes."""
    assert explore_case(case).violation.endswith("somebody else's bytes")


@pytest.mark.parametrize(
    "case", [Case(deleted=True, looked=False), Case(deleted=True, acknowledged_first=False)]
)
def test_a_record_of_what_was_deleted(case: Case) -> None:
    """Whatever is left out or swapped, what somebody was told to be deleted is found by its record."""
    assert explore_case(case).violation.endswith("what was deleted is there")


# -- what its creator seals, and leaves ------------------------------------------------------------


@dataclass(frozen=True)
class Leave:
    """An object that was created is sealed by a record, and the store takes it back meanwhile, as its creator leaves.

    Attributes
    ----------
    barrier, hidden : bool
        Whether the store issues a membarrier before it looks at the slots, and says before that that the object goes.
    compared : bool
        Whether the getter looks at the state of its entry after his pin.
    """

    barrier: bool = True
    hidden: bool = True
    compared: bool = True


def seal() -> Program:
    """Fill the object and write the record: another thread of its creator."""
    yield Store("data", OURS)
    yield Store("record", OURS)
    return "sealed"


def get_created(case: Leave) -> Program:
    """Look for the record, and pin what it makes readable: `Unread._take_created`."""
    yield Await("record", OURS)
    if (yield Load("acknowledged")) or (yield Load("state")) != CREATED:
        return "asks"
    yield Store("slot", ENTRY)
    if (yield Load("acknowledged")) or (case.compared and (yield Load("state")) != CREATED):
        yield Store("slot", 0)
        return "asks"
    return Stage(use, (Case(),))


def abort(case: Leave, attempts: int) -> Program:
    """Take the object back and use its room anew, at once or when it is let go of; refuse the record then: `Unsealed.abort`."""
    if case.hidden:
        yield Store("state", EVICTING)
    while attempts:
        if case.barrier:
            yield from membarrier([GETTER])
        if not (yield Load("slot")):
            yield Store("state", FREE)
            yield Store("data", SOMEBODY_ELSES)
            break
        attempts -= 1
    if (yield Load("record")):
        yield Store("acknowledged", 1)
    return "taken" if attempts else "in limbo"


def explore_leave(case: Leave) -> Report:
    """Explore a getter, a store and a thread that seals."""
    words = {**dict.fromkeys(("data", "record", "acknowledged", "slot"), 0), "state": CREATED}

    def at_end(words: Mapping[str, int], _: Sequence[Any]) -> None:
        require(words["slot"] == 0, "a pin was left behind")

    stages = [Stage(get_created, (case,)), Stage(abort, (case, 2)), Stage(seal, ())]
    return explore(stages, words, buffer_size=3, at_end=at_end)


def test_what_is_sealed_by_who_leaves_stays_with_who_has_found_it() -> None:
    """Who finds the record, and the entry as it was after his pin, reads what was put."""
    report = explore_leave(Leave())
    assert report.violation == ""
    assert report.states > 100


@pytest.mark.parametrize("step", ["barrier", "hidden", "compared"])
def test_what_is_sealed_by_who_leaves_goes(step: str) -> None:
    """Whatever is left out, somebody reads another object's bytes."""
    assert explore_leave(Leave(**{step: False})).violation.endswith("somebody else's bytes")
