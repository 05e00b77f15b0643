"""Churns at a store that is full, for long, and watches what the store has of the machine.

Processes come and go; some are killed.  They put, create, seal, abort, read, hold and delete objects of 64 bytes to
2 MB, whose every 8-byte word says whose it is.  Every few seconds the store's resident memory, its descriptors, and
the names and pages of shared memory are noted; at the end the second tenth of the time is compared with the last::

    python -m tests.crash.soak --minutes 30

Flat means that the median of the last tenth is above that of the second by no more than `TOLERANCES` says.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

import shmplasma
from shmplasma.arrow_errors import PlasmaObjectExists, PlasmaStoreFull
from tests.clients import figure
from tests.crash.mutated_frames import StoreProcess
from tests.crash.stress_fast_path import key_id, mark, wrong_words
from tests.processes import until

__all__ = ["TOLERANCES", "Sample", "Summary", "run"]

CAPACITY: Final = 32 << 20
N_KEYS: Final = 200
_MAX_SIZE: Final = 2 << 20
_HELD: Final = 3
"""How many buffers each process holds for a while."""
_FRESH: Final = 0xFFFF
"""Stands for the key of an object that has a random id."""
_N_WORKERS: Final = 3
_LIFE_SECONDS: Final = (2, 15)
_KILL_EACH_SECONDS: Final = 5.0
_SHARED_MEMORY: Final = Path("/dev/shm")

TOLERANCES: Final = {
    "RSS bytes": 4 << 20,
    "own bytes": 4 << 20,
    "descriptors": 3,
    "names": 0,
    "shared bytes": 1 << 20,
}
"""What each figure may grow by.  A process more or less is a descriptor or two."""


@dataclass(frozen=True)
class Sample:
    """What there was at a moment.

    Attributes
    ----------
    seconds : float
        Since the churn began.
    values : dict of str to int
        By the names in `TOLERANCES`.
    """

    seconds: float
    values: dict[str, int]


@dataclass(frozen=True)
class Summary:
    """What a run has seen.

    Attributes
    ----------
    counts : Counter of str
        puts, reads, wrong words and so on of the processes that were not killed.
    evictions : int
        What the store counted.
    fds_before, fds_after : int
        The store's descriptors before the processes came and after they had gone.
    samples : sequence of Sample
        In order.
    """

    counts: Counter[str]
    evictions: int
    fds_before: int
    fds_after: int
    samples: Sequence[Sample]

    def trend(self, name: str) -> tuple[float, float]:
        """Return the medians of a figure in the second tenth of the time and in the last."""
        end = self.samples[-1].seconds

        def middle(start: float, stop: float) -> float:
            chosen = [s.values[name] for s in self.samples if start <= s.seconds / end <= stop]
            return median(chosen or [sample.values[name] for sample in self.samples])

        return middle(0.1, 0.2), middle(0.9, 1)

    def is_flat(self, name: str) -> bool:
        """Tell whether a figure has grown by no more than it may."""
        early, late = self.trend(name)
        return late - early <= TOLERANCES[name]

    def __str__(self) -> str:
        lines = [f"{name}: {count:,}" for name, count in sorted(self.counts.items())]
        lines.append(f"evictions: {self.evictions:,}")
        lines.append(f"descriptors before: {self.fds_before}, after: {self.fds_after}")
        lines.append("")
        lines.append("seconds " + " ".join(f"{name:>14}" for name in TOLERANCES))
        rows = self.samples[:: max(1, len(self.samples) // 20)]
        for sample in rows:
            values = " ".join(f"{sample.values[name]:>14,}" for name in TOLERANCES)
            lines.append(f"{sample.seconds:7.0f} {values}")
        for name, tolerance in TOLERANCES.items():
            early, late = self.trend(name)
            verdict = "flat" if self.is_flat(name) else "NOT FLAT"
            lines.append(
                f"{name}: {early:,.0f} -> {late:,.0f} (may grow by {tolerance:,}) {verdict}"
            )
        return "\n".join(lines)


# -- the processes -----------------------------------------------------------------------------


class _Worker:
    """One process's part in the churn.

    Parameters
    ----------
    path : str
        The store's socket.
    seed : int
        Decides what it does.
    """

    def __init__(self, path: str, seed: int) -> None:
        self._path = path
        self._rng = random.Random(seed)
        self._generation = seed << 20 & 0xFFFF_FFFF_FFFF
        self._held: deque[tuple[int, Any]] = deque()
        self._fresh: deque[shmplasma.ObjectID] = deque(maxlen=100)
        self.counts: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        """Work for so long, as one client after the other."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.counts["clients"] += 1
            with shmplasma.connect(self._path) as client:
                for _ in range(self._rng.randrange(10, 2000)):
                    if time.monotonic() > end:
                        break
                    self._step(client)
        while self._held:
            self._let_go()

    def _words(self, key: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Return data for an object: mostly small, sometimes large, all sizes in between."""
        size = int(64 * (_MAX_SIZE / 64) ** self._rng.random())
        self._generation += 1
        return np.full(size // 8, mark(key, self._generation), np.uint64)

    def _step(self, client: shmplasma.PlasmaClient) -> None:
        rng, counts = self._rng, self.counts
        key = rng.randrange(N_KEYS)
        try:
            match rng.randrange(10):
                case 0 | 1:
                    self._fresh.append(client.put_raw_buffer(self._words(_FRESH)))
                    counts["puts"] += 1
                case 2:
                    client.create_and_seal(key_id(key), self._words(key))
                    counts["creations"] += 1
                case 3:
                    words = self._words(key)
                    data = memoryview(client.create(key_id(key), words.nbytes))
                    if rng.random() < 0.2:
                        del data
                        client.abort(key_id(key))
                        counts["aborts"] += 1
                    else:
                        np.frombuffer(data, np.uint64)[:] = words
                        client.seal(key_id(key))
                        counts["creations"] += 1
                case 4 if rng.random() < 0.3:
                    client.delete([key_id(key), *self._fresh])
                    counts["deletions"] += 1
                case 5 if rng.random() < 0.05:
                    counts["evicted bytes"] += client.evict(rng.randrange(CAPACITY // 8))
                case 6 | 7 if self._fresh:
                    self._read(client, rng.choice(self._fresh), _FRESH)
                case _:
                    self._read(client, key_id(key), key)
        except PlasmaObjectExists:
            client.delete([key_id(key)])
        except PlasmaStoreFull:
            counts["refusals"] += 1
            while self._held:
                self._let_go()

    def _read(
        self, client: shmplasma.PlasmaClient, object_id: shmplasma.ObjectID, key: int
    ) -> None:
        buffer = client.get_buffers(object_id, timeout_ms=0)
        if buffer is None:
            self.counts["misses"] += 1
            return
        self.counts["reads"] += 1
        self.counts["wrong words"] += wrong_words(buffer, key)
        if self._rng.random() < 0.1:
            self._held.append((key, buffer))
        while len(self._held) > _HELD:
            self._let_go()

    def _let_go(self) -> None:
        key, buffer = self._held.popleft()
        self.counts["looked at again"] += 1
        self.counts["wrong words"] += wrong_words(buffer, key)


def work(path: str, seed: int, seconds: float, result: Connection) -> None:
    """Be one of the processes, and hand over what was counted."""
    with result:
        worker = _Worker(path, seed)
        worker.run(seconds)
        result.send(worker.counts)


# -- the run -----------------------------------------------------------------------------------


class _Crowd:
    """The processes that are at work: who ends is replaced.

    Parameters
    ----------
    path : str
        The store's socket.
    longest_seconds : float
        No process lives longer.
    """

    def __init__(self, path: str, longest_seconds: float) -> None:
        self._path = path
        self._longest = longest_seconds
        self._context = multiprocessing.get_context("spawn")
        self._rng = random.Random(0)
        self._members: list[tuple[BaseProcess, Connection]] = []
        self._seed = 0
        self.counts: Counter[str] = Counter({"wrong words": 0, "killed": 0})

    def fill_up(self) -> None:
        """Take leave of those that have ended, and start as many as are missing."""
        self._leave([member for member in self._members if not member[0].is_alive()])
        while len(self._members) < _N_WORKERS:
            self._seed += 1
            seconds = min(self._rng.uniform(*_LIFE_SECONDS), self._longest)
            ours, theirs = self._context.Pipe(duplex=False)
            process = self._context.Process(
                target=work, args=(self._path, self._seed, seconds, theirs)
            )
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def kill_one(self) -> None:
        """Kill the one that has been there longest, wherever it is."""
        self._members[0][0].kill()

    def end(self) -> None:
        """Wait for all."""
        self._leave(list(self._members))

    def _leave(self, members: list[tuple[BaseProcess, Connection]]) -> None:
        for process, result in members:
            self._members.remove((process, result))
            process.join()
            with result:
                if process.exitcode == -signal.SIGKILL:
                    self.counts["killed"] += 1
                    continue
                assert process.exitcode == 0, "a process has failed"
                self.counts.update(result.recv())
            self.counts["processes that ended"] += 1


def run(
    seconds: float,
    sample_seconds: float = 3,
    say: Callable[[str], object] = len,
) -> Summary:
    """Churn for a while, and prove that the store is in order afterwards.

    Parameters
    ----------
    seconds : float
        How long, not counting start and end.
    sample_seconds : float
        How often the store is looked at.
    say : callable
        Is told of the progress.

    Raises
    ------
    AssertionError
        The store has died, or bytes, pins or room are lost.  Wrong words and growth are only noted.
    """
    others = _names()
    with StoreProcess(CAPACITY) as store, shmplasma.connect(store.path) as client:
        _fill(client)
        fds_before = store.footprint().fds

        def sample() -> Sample:
            has, names = store.footprint(), _ours(_names() - others, store.pid)
            values = (has.rss_bytes, has.anonymous_bytes, has.fds, len(names), _pages(names))
            return Sample(time.monotonic() - start, dict(zip(TOLERANCES, values, strict=True)))

        start = killed = sampled = time.monotonic()
        samples: list[Sample] = []
        crowd = _Crowd(store.path, seconds / 2)
        try:
            while (now := time.monotonic()) < start + seconds:
                crowd.fill_up()
                if now > killed + min(_KILL_EACH_SECONDS, seconds / 3):
                    killed = now
                    crowd.kill_one()
                if now > sampled + sample_seconds:
                    sampled = now
                    samples.append(sample())
                    if len(samples) % 10 == 0:
                        last = samples[-1]
                        values = ", ".join(f"{name} {n:,}" for name, n in last.values.items())
                        say(f"{last.seconds:.0f} s: {values}")
                time.sleep(0.05)
            samples.append(sample())
        finally:
            crowd.end()
        evictions = figure(client, "evictions")
        until(lambda: store.footprint().fds <= fds_before, "the store lets go of the dead", 10)
        fds_after = store.footprint().fds
        _prove_in_order(client)
        assert store.is_alive, "the store has died"
    assert not _ours(_names() - others, store.pid), "shared memory is left"
    return Summary(crowd.counts, evictions, fds_before, fds_after, samples)


def _fill(client: shmplasma.PlasmaClient) -> None:
    """Use the whole capacity once, so that all of its memory is there."""
    whole = shmplasma.ObjectID.from_random()
    client.create_and_seal(whole, bytes(CAPACITY))
    client.delete([whole])
    for _ in range(CAPACITY >> 16):
        client.put_raw_buffer(np.full(1 << 13, mark(_FRESH, 0), np.uint64))


def _names() -> set[str]:
    return {name for name in os.listdir(_SHARED_MEMORY) if name.startswith("shmplasma-")}


def _ours(names: set[str], store_pid: int) -> set[str]:
    """Leave out the names that some process uses, but not this store: they are other stores'."""
    if len(names) <= 1 and Path(f"/proc/{store_pid}").is_dir():
        return names
    used: set[str] = set()
    ours: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended, or is not ours to look at
            mapped = {name for name in names if f"{_SHARED_MEMORY}/{name}" in maps.read_text()}
            used |= mapped
            if maps.parent.name == str(store_pid):
                ours |= mapped
    return names - (used - ours)


def _pages(names: set[str]) -> int:
    """Return how many bytes of memory stand behind some names."""
    pages = 0
    for name in names:
        with suppress(FileNotFoundError):  # another store's, which has just ended
            pages += (_SHARED_MEMORY / name).stat().st_blocks * 512
    return pages


def _prove_in_order(client: shmplasma.PlasmaClient) -> None:
    """Prove that no pin is left of those that have gone, and that all room comes back."""
    client.delete(list(client.list()))
    until(lambda: not figure(client, "pinned objects"), "nobody holds anything", 10)
    client.delete(list(client.list()))
    assert not client.list(), "an object cannot be deleted"
    whole = shmplasma.ObjectID.from_random()
    assert len(client.create(whole, CAPACITY)) == CAPACITY, "room is lost"
    client.abort(whole)


def main() -> int:
    """Run as the command line says; 1 if a wrong word was read or something has grown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="how long (default: 30)")
    parser.add_argument("--sample-seconds", type=float, default=3, help="(default: 3)")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    summary = run(arguments.minutes * 60, arguments.sample_seconds, say)
    say(str(summary))
    return 1 if summary.counts["wrong words"] or not all(map(summary.is_flat, TOLERANCES)) else 0


if __name__ == "__main__":
    sys.exit(main())
