"""What is put, hinted at and taken, under every interleaving that x86-TSO allows.

The models repeat the steps of `shmplasma.hints`, as `shmplasma.hinting` and `shmplasma.session` (getter), `shmplasma.answers` and
`shmplasma.dispatch` (store) take them.  As in `tests.stateful.test_memory_model`, each has twins with a step left out or two swapped, and the
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

FREE, SEALED, EVICTING, REUSED, CREATED = range(5)
OFFSET, ENTRY, TAKEN = 1, 2, 3
"""What stands in slots."""
OURS, SOMEBODY_ELSES = 1, 2
GETTER = 0


@dataclass(frozen=True)
class Hint:
    """A getter waits for an object that is put, and the store would like to have its room back.

    Attributes
    ----------
    hinted : bool
        Whether the getter hears of it by a hint; else by the reply alone.
    refused : bool
        Whether the store refuses the record, so that the room is free as soon as nobody pins it.
    sealed : bool
        Whether the record is a `Seal`, of an object that has an entry already.
    succeeded : bool
        Whether the store that has named the getter has died before it read the record.
    keep : bool
        Whether the getter never lets go.
    attempts : int
        How often the store tries to take the object.
    checked, pinned_first : bool
        Whether the getter looks at the word, and whether it has pinned the offset before.
    cleared_first, barrier, resolved, looked : bool
        Whether the store clears the word before it looks at the slots; issues a membarrier in between; heeds pins by the offset;
        and looks at the lent slot before it writes to it.
    """

    hinted: bool = True
    refused: bool = False
    sealed: bool = False
    succeeded: bool = False
    keep: bool = False
    attempts: int = 2
    checked: bool = True
    pinned_first: bool = True
    cleared_first: bool = True
    barrier: bool = True
    resolved: bool = True
    looked: bool = True


def put(case: Hint) -> Program:
    """Fill the object, write the record, send the hint."""
    yield Store("data", OURS)
    yield Store("record", 1)
    if case.hinted:
        yield Store("hint", 1)
    return "put"


def hear(case: Hint) -> Program:
    """Take what a hint says: `Hints.take`."""
    if not case.hinted:
        return Stage(await_reply, (case,))
    yield Await("hint", 1)
    require(bool((yield Load("record"))), "a hint at no record")
    if case.sealed and (yield Load("state")) != CREATED:
        return Stage(await_reply, (case,))
    if case.pinned_first:
        yield Store("own", ENTRY if case.sealed else OFFSET)
        yield Store("lent", TAKEN)
    if case.checked and not (yield Load("wanted")):
        yield Store("own", 0)
        yield Store("lent", 0)
        return Stage(await_reply, (case,))
    if not case.pinned_first:
        yield Store("own", ENTRY if case.sealed else OFFSET)
        yield Store("lent", TAKEN)
    return Stage(use, (case, "own"))


def await_reply(case: Hint) -> Program:
    """Wait for the store, and see whether it has pinned the object."""
    yield Await("reply", 1)
    return Stage(use, (case, "lent")) if (yield Load("lent")) == ENTRY else Stage(look_up, (case,))


def look_up(case: Hint) -> Program:
    """Look in the table: `FastReader.locate`."""
    if (yield Load("state")) == SEALED:
        yield Store("found", ENTRY)
        if (yield Load("state")) == SEALED:
            return Stage(use, (case, "found"))
        yield Store("found", 0)
    return "begins anew"


def use(case: Hint, slot: str) -> Program:
    """Read the object twice over under a pin, and let go of it; nothing is read from the store any more."""
    for _ in range(2):
        require((yield Load("data")) == OURS, "somebody else's bytes")
    if case.keep:
        return slot
    yield Store(slot, 0)
    return "had it"


def read_record(case: Hint) -> Program:
    """Enter the object, see whether it was taken, and reply: `Dispatch._publish`, `Answers._fill`."""
    if case.succeeded:
        return Stage(succeed, (case,))
    yield Await("record", 1)
    if not case.refused:
        yield Store("state", SEALED)
    is_taken = False
    if not case.cleared_first:
        is_taken = (yield Load("lent")) == TAKEN
    yield Store("wanted", 0)
    if case.barrier:
        yield from membarrier([GETTER])
    if case.cleared_first:
        is_taken = case.looked and (yield Load("lent")) == TAKEN
    if case.refused:
        if not (case.resolved and (yield Load("own"))):
            yield Store("data", SOMEBODY_ELSES)
        return "refused"
    if not is_taken:
        yield Store("lent", ENTRY)
    yield Store("reply", 1)
    return Stage(take, (case, case.attempts))


def succeed(case: Hint) -> Program:
    """Take over from a store that has died: `ObjectStore.recover`.  Its client connects anew for the reply."""
    yield Store("wanted", 0)
    if case.barrier:
        yield from membarrier([GETTER])
    yield Await("record", 1)
    yield Store("state", SEALED)
    return Stage(take, (case, case.attempts))


def take(case: Hint, attempts: int) -> Program:
    """Try to take the object and use its room anew: `Room.take`."""
    if not attempts:
        return "kept"
    yield Store("state", EVICTING)
    if case.barrier:
        yield from membarrier([GETTER])
    own = yield Load("own")
    pinned = own == ENTRY or (case.resolved and own == OFFSET)
    pinned = pinned or (yield Load("found")) == ENTRY or (yield Load("lent")) == ENTRY
    if pinned:
        yield Store("state", SEALED)
        return Stage(take, (case, attempts - 1))
    yield Store("state", REUSED)
    yield Store("data", SOMEBODY_ELSES)
    return "taken"


def explore_hint(case: Hint, buffer_size: int = 2) -> Report:
    """Explore a getter, a store and a putter."""
    words = dict.fromkeys(("data", "record", "hint", "own", "lent", "found", "reply"), 0)
    words |= {"state": CREATED if case.sealed else FREE, "wanted": 1}

    def at_end(words: Mapping[str, int], results: Sequence[Any]) -> None:
        got, kept, _ = results
        require(kept is not None, "the store waits for ever")
        require(got is not None or case.refused or case.succeeded, "the getter waits for ever")
        if got in ("own", "found", "lent"):
            require(kept != "taken" and words["data"] == OURS, "what is pinned has gone")
        elif got == "had it":
            left = words["own"], words["found"], words["lent"]
            require(left in ((0, 0, 0), (0, 0, TAKEN)), "a pin was left behind")
        elif got == "begins anew":
            require(case.hinted, "a getter that nobody has hinted at got nothing")

    stages = [Stage(hear, (case,)), Stage(read_record, (case,)), Stage(put, (case,))]
    return explore(stages, words, buffer_size=buffer_size, at_end=at_end)


CASES = [
    Hint(),
    Hint(keep=True),
    Hint(hinted=False),
    Hint(refused=True),
    Hint(refused=True, keep=True),
    Hint(succeeded=True),
    Hint(succeeded=True, keep=True),
    Hint(sealed=True),
    Hint(sealed=True, keep=True),
    Hint(sealed=True, resolved=False),
    Hint(sealed=True, succeeded=True),
]


@pytest.mark.parametrize("case", CASES)
def test_what_was_taken_stays(case: Hint) -> None:
    """Whoever comes first, and whether the record is entered, refused, or left to a successor."""
    report = explore_hint(case, buffer_size=3)
    assert report.violation == ""
    assert report.states > (200 if case.hinted else 50)


@pytest.mark.parametrize(
    "case",
    [
        Hint(barrier=False),
        Hint(checked=False),
        Hint(pinned_first=False),
        Hint(resolved=False),
        Hint(sealed=True, barrier=False),
        Hint(sealed=True, checked=False),
        Hint(sealed=True, pinned_first=False),
        Hint(refused=True, barrier=False),
        Hint(refused=True, checked=False),
        Hint(refused=True, pinned_first=False),
        Hint(refused=True, resolved=False),
        Hint(succeeded=True, barrier=False),
        Hint(succeeded=True, checked=False),
        Hint(succeeded=True, pinned_first=False),
        Hint(succeeded=True, resolved=False),
    ],
)
def test_hints_done_wrong(case: Hint) -> None:
    """Whatever is left out or swapped, somebody reads another object's bytes."""
    assert explore_hint(case).violation.endswith("somebody else's bytes")


@pytest.mark.parametrize("case", [Hint(cleared_first=False), Hint(looked=False)])
def test_a_store_that_does_not_know_what_was_taken(case: Hint) -> None:
    """It pins for somebody who has the object already, and may have let go of it: until he reads the reply, if ever."""
    assert explore_hint(case).violation.endswith("a pin was left behind")
