"""Clients that are killed at random moments of a mixed load, and replaced; the others and the store must not notice.

Each client says by a pipe what it is about to do and what was acknowledged.  Whoever takes the place of a dead one
finds everything that was acknowledged, byte for byte; so do those that live at the end.  Run it by hand for as long
as you like::

    python -m tests.crash.kill_clients --seconds 60
"""

from __future__ import annotations

import argparse
import mmap
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Final

import shmplasma
from shmplasma.objects import ObjectID
from tests.clients import figures_of
from tests.crash.workload import (
    Crew,
    Known,
    Ledger,
    Load,
    Member,
    Report,
    Said,
    in_small_process,
    prove_accounts,
    prove_empty,
    prove_whole,
)

__all__ = ["Summary", "run"]

CAPACITY: Final = 200_000_000
_EVERY_SECONDS: Final = 0.05
_MOST: Final = 40
"""How many objects a client keeps: its successor looks at all of them before it does anything else."""


@dataclass(frozen=True)
class Summary:
    """What a run has seen.

    Attributes
    ----------
    kills : int
        How many clients were killed.
    counts : Counter of str
        What those that lived at the end have done.
    said : int
        What all of them have said of what they did.
    objects, unreported : int
        How many objects there were at the end, and how many of these were stored by a client that was killed
        before it could say so.
    figures : dict
        The store's, at the end.
    """

    kills: int
    counts: Counter[str]
    said: int
    objects: int
    unreported: int
    figures: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{name}: {count:,}" for name, count in sorted(self.counts.items())]
        takes, met = self.figures["takes"], self.figures["takes that met a pin"]
        lines += [
            f"kills: {self.kills:,}",
            f"said by all clients: {self.said:,}",
            f"objects at the end: {self.objects:,}, of which {self.unreported:,} were never reported",
            f"takes: {takes:,}, of which {met:,} met a pin",
        ]
        return "\n".join(lines)


def work(
    pipe: Connection, path: str, number: int, left: Ledger, others: list[bytes], stop: mmap.mmap
) -> None:
    """Be a client: look at what a dead one has left, go on with it, and report at the end."""
    with shmplasma.connect(path) as client:
        load = Load(client, number, tell=pipe.send, most=_MOST)
        load.others = others
        load.take_over(left)
        while not stop[0]:
            load.step()
        pipe.send(load.report())
        assert pipe.recv() == "leave"
        load.leave()


class Run:
    """One run: clients, and what is known of each."""

    def __init__(self, crew: Crew, path: str, n_clients: int) -> None:
        self._crew = crew
        self._path = path
        self._rng = random.Random()
        self._stop = mmap.mmap(-1, 1)
        self._next_number = 1
        self._clients: dict[Member, Ledger] = {}
        self._waits: set[Member] = set()
        self.kills = self.said = 0
        for _ in range(n_clients):
            self._hire(Ledger())

    def _hire(self, left: Ledger) -> None:
        everything = [each for ledger in self._clients.values() for each in ledger.objects]
        others = self._rng.sample(everything, min(20, len(everything)))
        member = self._crew.hire(work, self._path, self._next_number, left, others, self._stop)
        self._next_number += 1
        self._clients[member] = left

    def kill_one(self) -> None:
        """Kill any one of the clients, and let another one take its place."""
        member = self._rng.choice(list(self._clients))
        ledger = self._clients[member]
        self._listen(member, ledger)
        member.kill()
        self.kills += 1
        member.process.join()
        self._listen(member, ledger)
        self._crew.dismiss(member)
        del self._clients[member]
        self._hire(ledger)

    def listen(self, until: float) -> None:
        """Take note, until a time of `time.monotonic`, of what the clients say."""
        by_pipe: dict[Any, Member] = {member.pipe: member for member in self._clients}
        while (left := until - time.monotonic()) > 0:
            for pipe in wait(list(by_pipe), left):
                member = by_pipe[pipe]
                self._note(self._clients[member], member.hear())

    def _listen(self, member: Member, ledger: Ledger) -> None:
        for said in member.hear_all():
            self._note(ledger, said)

    def _note(self, ledger: Ledger, said: object) -> None:
        assert isinstance(said, Said)
        self.said += 1
        ledger.note(said)

    def finish(self, client: shmplasma.PlasmaClient) -> Summary:
        """Let the clients rest, prove that all is as it must be, and let them leave."""
        self._stop[0] = 1
        counts: Counter[str] = Counter()
        sealed: dict[bytes, Known] = {}
        unsealed: dict[bytes, Known] = {}
        held: set[bytes] = set()
        for member, ledger in self._clients.items():
            while isinstance(said := member.hear(), Said):
                self._note(ledger, said)
            assert isinstance(said, Report)
            assert said.objects == ledger.objects, "a client has not said all"
            sealed |= said.objects
            unsealed |= said.unsealed
            held |= said.held
            counts.update(said.counts)
        prove_accounts(client, sealed, unsealed, held, doubtful=None)
        listed = {object_id.binary() for object_id in client.list()}
        unreported = [ObjectID(each) for each in listed - sealed.keys() - unsealed.keys() - held]
        _prove_each_whole(client, unreported)
        assert len(unreported) <= self.kills, f"{len(unreported)} objects should not be there"
        for member in tuple(self._clients):
            member.pipe.send("leave")
        for member in tuple(self._clients):
            member.process.join()
            assert member.process.exitcode == 0, f"a client has failed: {member.hear_all()}"
            self._crew.dismiss(member)
        figures = figures_of(client)
        prove_empty(client)
        return Summary(self.kills, counts, self.said, len(listed), len(unreported), figures)


def _prove_each_whole(client: shmplasma.PlasmaClient, ids: list[ObjectID]) -> None:
    for metadata, buffer in client.get_buffers(ids, 0, with_meta=True):
        prove_whole(buffer, metadata)


def run(seconds: float, n_clients: int = 8, *, progress: bool = False) -> Summary:
    """Kill clients of one store for a while, and prove that nothing is lost.

    Parameters
    ----------
    seconds : float
        How long, not counting start and end.
    n_clients : int, optional
        How many there are at any time; 50 ms after one was replaced the next one is killed.
    progress : bool, optional
        Whether to write to the standard error how far it is.

    Raises
    ------
    AssertionError
        Something is lost or wrong, or a client has failed that was not killed.
    """
    with shmplasma.Store(CAPACITY) as store:
        summary = in_small_process(_run, store.store_socket_name, seconds, n_clients, progress)
        assert store.process.poll() is None, "the store has died"
    return summary


def _run(path: str, seconds: float, n_clients: int, progress: bool) -> Summary:
    with Crew() as crew:
        running = Run(crew, path, n_clients)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            running.listen(time.monotonic() + _EVERY_SECONDS)
            running.kill_one()
            if progress and running.kills % 100 == 0:
                sys.stderr.write(f"{running.kills} kills\n")
        with shmplasma.connect(path) as client:
            return running.finish(client)


def main() -> int:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: 60)")
    parser.add_argument("--clients", type=int, default=8, help="how many (default: 8)")
    arguments = parser.parse_args()
    summary = run(arguments.seconds, arguments.clients, progress=True)
    sys.stdout.write(f"{summary}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
