"""How creators of one id settle among themselves who gets it, under every interleaving that x86-TSO allows.

The models repeat the steps of `shmplasma.claims`, as `shmplasma.claiming` (clients) and `shmplasma.creations` (the store) take them.
As in `tests.stateful.test_memory_model`, each has twins with a step left out, and the explorer has to find what is wrong with those.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.stateful.tso import (
    Await,
    Fence,
    Load,
    Lock,
    Program,
    Report,
    Stage,
    Step,
    Store,
    explore,
    membarrier,
    require,
)

STRANGER = 9
"""Who has the lock for nothing."""


# -- the lock of an id -------------------------------------------------------------------------


@dataclass(frozen=True)
class Race:
    """Clients that create an object under the same id.

    Attributes
    ----------
    asks : tuple of bool
        Of each client, whether it goes by the store from the beginning; else it does so where it cannot claim the id.
    is_locked : bool
        Whether somebody has the lock for nothing, and lets go of it at any time.
    clients_lock, store_locks : bool
        Whether they lock the id before they look whether it is free.
    until_read : bool
        Whether a client keeps the lock until its record is read.
    remembers : bool
        Whether a client that creates the object once more, before its record is read, knows what it has claimed; its own lock
        keeps nothing from it.
    recalls : bool
        Whether the store recalls leases where it finds a lock.
    reads : bool
        Whether it reads all outboxes after that.
    """

    asks: tuple[bool, ...] = (False, False)
    is_locked: bool = False
    clients_lock: bool = True
    store_locks: bool = True
    until_read: bool = True
    remembers: bool = True
    recalls: bool = True
    reads: bool = True


def claim(case: Race, client: int) -> Program:
    """Claim the id: `Claimant.put` with `Claimant.take`."""
    yield Store(f"busy {client}", 1)
    goes_on = not (yield Load("epoch"))
    if goes_on and case.clients_lock:
        goes_on = bool((yield Lock("lock", client + 1)))
    if goes_on:
        goes_on = not (yield Load("table"))
    if not goes_on:
        yield Store(f"busy {client}", 0)
        return Stage(ask, (client,))
    yield Store(f"outbox {client}", 1)
    yield Store(f"busy {client}", 0)
    if not case.remembers:
        require(bool((yield Load("table"))), "two clients have created it, or one of them twice")
    if case.until_read:
        yield Await(f"read {client}", 1)
    yield Fence()
    if case.clients_lock:
        yield Store("lock", 0)
    return "created"


def ask(client: int) -> Program:
    """Ask the store for the object; a lock that was taken before stays, for nothing."""
    yield Store(f"request {client}", 1)
    yield Fence()
    yield Await(f"answered {client}", 1)
    return "created" if (yield Load(f"granted {client}")) else "exists"


def let_go() -> Program:
    """Let go of a lock that one has for nothing."""
    yield Fence()
    yield Store("lock", 0)
    return "nothing"


def serve(
    case: Race, turns: int, table: int, read: tuple[int, ...], answered: tuple[int, ...]
) -> Program:
    """Handle requests, then outboxes, for so many turns: `Creations.create`, `Publishing.claim`."""
    if not turns:
        return table
    for client in range(len(case.asks)):
        if client in answered or not (yield Load(f"request {client}")):
            continue
        is_mine = not table and case.store_locks and (yield Lock("lock", STRANGER + 1))
        if not table and case.store_locks and not is_mine:
            if case.recalls and (yield from recall(case)):
                continue
            if case.reads:
                table, read = yield from heed(case, table, read)
        if not table:
            table = client + 1
            yield Store("table", table)
            yield Store(f"granted {client}", 1)
        if is_mine:
            yield Fence()
            yield Store("lock", 0)
        yield Store(f"answered {client}", 1)
        answered = (*answered, client)
    table, read = yield from heed(case, table, read)
    return Stage(serve, (case, turns - 1, table, read, answered))


def recall(case: Race) -> Generator[Step, int, int]:
    """Recall all leases, and return how many clients are busy; no lease is granted any more."""
    clients = range(len(case.asks))
    yield Store("epoch", 1)
    yield from membarrier(clients)
    busy = 0
    for client in clients:
        busy += yield Load(f"busy {client}")
    return busy


def heed(
    case: Race, table: int, read: tuple[int, ...]
) -> Generator[Step, int, tuple[int, tuple[int, ...]]]:
    """Read all outboxes."""
    for client in range(len(case.asks)):
        if client not in read and (yield Load(f"outbox {client}")):
            require(not table, "two clients have created it")
            table = client + 1
            read = (*read, client)
            yield Store("table", table)
            yield Store(f"read {client}", 1)
    return table, read


def explore_race(case: Race, turns: int = 2) -> Report:
    """Explore clients that race for an id, and a store."""
    clients = range(len(case.asks))
    words = {"lock": STRANGER if case.is_locked else 0, "table": 0, "epoch": 0}
    for client in clients:
        for word in ("busy", "outbox", "read", "request", "granted", "answered"):
            words[f"{word} {client}"] = 0

    def at_end(_: Mapping[str, int], results: Sequence[Any]) -> None:
        outcomes = results[: len(clients)]
        require(outcomes.count("created") <= 1, "two clients have created it")
        require(None in outcomes or "created" in outcomes, "nobody has created it")

    stages = [
        Stage(ask, (client,)) if case.asks[client] else Stage(claim, (case, client))
        for client in clients
    ]
    stages.append(Stage(serve, (case, turns, 0, (), ())))
    if case.is_locked:
        stages.append(Stage(let_go))
    return explore(stages, words, buffer_size=1, at_end=at_end)


RACES = [
    Race(),
    Race((True, False)),
    Race((False, False), is_locked=True),
    Race((True, False), is_locked=True),
    Race((True, True), is_locked=True),
]


@pytest.mark.parametrize("case", RACES)
def test_one_creator_gets_the_id(case: Race) -> None:
    """Whoever goes which way, and whoever has the lock for nothing: one of them has created the object."""
    report = explore_race(case)
    assert report.violation == ""
    assert report.states > 1_000


@pytest.mark.parametrize(
    "case",
    [
        replace(RACES[0], clients_lock=False),
        replace(RACES[1], store_locks=False),
        replace(RACES[0], until_read=False),
        replace(RACES[0], remembers=False),
        replace(RACES[3], recalls=False),
        replace(RACES[3], reads=False),
    ],
)
def test_the_lock_done_wrong(case: Race) -> None:
    """Whatever is left out, two have created it."""
    assert "two clients have created it" in explore_race(case).violation.splitlines()[-1]


# -- looking whether the id is free ------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """A client looks for id 1 in a chain, bucket to entry 2 to entry 1, while entry 2 goes and comes into another chain.

    Attributes
    ----------
    counted : bool
        Whether the store raises INSERTIONS.
    before : bool
        Whether it does so before it writes to the entry.
    looked_at : bool
        Whether the client looks at it again.
    """

    counted: bool = True
    before: bool = True
    looked_at: bool = True


def look(case: Look, attempts: int) -> Program:
    """Follow the chain: `Absence.look_up`."""
    if not attempts:
        return "asks"
    insertions = yield Load("insertions")
    entry = yield Load("bucket")
    for _ in range(3):
        if entry:
            found = yield Load(f"id {entry}")
            if found == 1:
                return "asks"
            entry = yield Load(f"next of {entry}")
    if case.looked_at and (yield Load("insertions")) != insertions:
        return Stage(look, (case, attempts - 1))
    require(False, "an id that is taken was held to be free")
    return None


def reuse(case: Look) -> Program:
    """Remove entry 2, and insert another object into it, in the other chain."""
    yield Store("state 2", 0)
    yield Store("bucket", 1)
    if case.counted and case.before:
        yield Store("insertions", 2)
    yield Store("id 2", 3)
    yield Store("next of 2", 0)
    yield Store("other bucket", 2)
    yield Store("state 2", 2)
    if case.counted and not case.before:
        yield Store("insertions", 2)
    return None


def explore_look(case: Look) -> Report:
    """Explore a client that looks for an id and a store that uses an entry anew."""
    words = {"bucket": 2, "other bucket": 0, "insertions": 0}
    for entry, following in ((1, 0), (2, 1)):
        words |= {f"id {entry}": entry, f"next of {entry}": following, f"state {entry}": 2}
    stages = [Stage(look, (case, 2)), Stage(reuse, (case,))]
    return explore(stages, words, buffer_size=2)


def test_an_id_that_is_taken_is_not_free() -> None:
    """However the chain changes under him, nobody who looks misses an object."""
    report = explore_look(Look())
    assert report.violation == ""
    assert report.states > 100


@pytest.mark.parametrize("case", [Look(counted=False), Look(before=False), Look(looked_at=False)])
def test_looking_done_wrong(case: Look) -> None:
    """Without the number, with one that comes too late, or with one that nobody heeds, somebody does."""
    assert explore_look(case).violation.endswith("an id that is taken was held to be free")
