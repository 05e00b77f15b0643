"""Processes that read, write, delete and evict at full speed in a store that is far too small for them.

Every 8-byte word of an object's data says which object it is and which generation of it, so a reader notices at
once when it looks at memory that was given to somebody else.  Run it by hand for as long as you like::

    python -m tests.crash.stress_fast_path --seconds 60 --readers 4 --writers 2
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import shmplasma
from shmplasma.arrow_errors import PlasmaObjectExists, PlasmaStoreFull
from shmplasma.layout import align_up
from tests.clients import figures_of

__all__ = ["Summary", "run"]

CAPACITY: Final = 1 << 20
N_KEYS: Final = 300
"""Ids that are put, deleted and put again; at 5 KB on average they would fill the store half as much again."""
SIZES: Final = (8, 504, 4096, 16 << 10)
_HELD: Final = 8
"""How many buffers each reader holds for a while: at most an eighth of the store."""
_FRESH: Final = 0xFFFF
"""Stands for the key of an object that has a random id."""


@dataclass(frozen=True)
class Summary:
    """What a run has seen.

    Attributes
    ----------
    counts : Counter of str
        gets, hits, wrong words and so on of all processes.
    takes, takes_that_met_a_pin, evictions : int
        What the store counted.
    """

    counts: Counter[str]
    takes: int
    takes_that_met_a_pin: int
    evictions: int

    def __str__(self) -> str:
        lines = [f"{name}: {count:,}" for name, count in sorted(self.counts.items())]
        lines.append(f"evictions: {self.evictions:,}")
        lines.append(f"takes: {self.takes:,}, of which {self.takes_that_met_a_pin:,} met a pin")
        return "\n".join(lines)


def key_id(key: int) -> shmplasma.ObjectID:
    """Return the id of a key."""
    return shmplasma.ObjectID(key.to_bytes(20, "big"))


def mark(key: int, generation: int) -> int:
    """Return the word of which the data of an object consists."""
    return key << 48 | generation


def wrong_words(buffer: Any, key: int) -> int:
    """Return how many words are not those of one generation of this key."""
    words: npt.NDArray[np.uint64] = np.frombuffer(buffer, np.uint64)
    first = int(words[0])
    if first >> 48 != key:
        return len(words)
    return int(np.count_nonzero(words != first))


# -- the processes -----------------------------------------------------------------------------


def write(client: shmplasma.PlasmaClient, stop: Event, seed: int) -> Counter[str]:
    """Put known ids anew, by create and seal or in one go, and put under fresh ids."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    generation = seed << 32
    while not stop.is_set():
        key, size = rng.randrange(N_KEYS), rng.choice(SIZES)
        generation += 1
        try:
            match rng.randrange(4):
                case 0:
                    values = np.full(size // 8, mark(_FRESH, generation), np.uint64)
                    fresh = client.put_raw_buffer(values)
                    counts["wrong words"] += read_own(client, fresh)
                case 1:
                    values = np.full(size // 8, mark(key, generation), np.uint64)
                    client.create_and_seal(key_id(key), values)
                case 2:
                    client.delete(key_id(key))
                case _:
                    data = memoryview(client.create(key_id(key), size))
                    np.frombuffer(data, np.uint64)[:] = mark(key, generation)
                    client.seal(key_id(key))
            counts["puts and deletes"] += 1
        except PlasmaObjectExists:
            client.delete(key_id(key))
        except PlasmaStoreFull:
            counts["refusals"] += 1
    return counts


def read_own(client: shmplasma.PlasmaClient, object_id: shmplasma.ObjectID) -> int:
    """Read back what was put under a fresh id, unless it was evicted already."""
    buffer = client.get_buffers(object_id, timeout_ms=0)
    return 0 if buffer is None else wrong_words(buffer, _FRESH)


def read(client: shmplasma.PlasmaClient, stop: Event, seed: int) -> Counter[str]:
    """Get known ids, one or several at once, and look at each again and again while it is held."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    held: deque[tuple[int, int, Any]] = deque()
    lately: deque[int] = deque(maxlen=32)
    while not stop.is_set():
        # Mostly what was there a moment ago: that is found without a message, if it is still there.
        hot = lately and rng.random() < 0.9
        keys = rng.sample(lately if hot else range(N_KEYS), 1)
        if rng.random() < 0.2:
            keys += rng.sample(range(N_KEYS), 7)
        buffers = client.get_buffers([key_id(key) for key in keys], timeout_ms=0)
        counts["gets"] += len(keys)
        for key, buffer in zip(keys, buffers, strict=True):
            if buffer is None:
                continue
            if not hot:
                lately.append(key)
            counts["hits"] += 1
            counts["wrong words"] += wrong_words(buffer, key)
            if rng.random() < 0.1:
                held.append((key, int(np.frombuffer(buffer, np.uint64)[0]), buffer))
        del buffers
        buffer = None
        while len(held) > _HELD:
            key, first, buffer = held.popleft()
            counts["looked at again"] += 1
            counts["wrong words"] += wrong_words(buffer, key)
            counts["wrong words"] += int(np.frombuffer(buffer, np.uint64)[0]) != first
    return counts


def press(client: shmplasma.PlasmaClient, stop: Event, seed: int) -> Counter[str]:
    """Evict, and delete several known ids at once."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    while not stop.is_set():
        if rng.random() < 0.5:
            counts["evicted bytes"] += client.evict(rng.randrange(CAPACITY // 16))
        else:
            client.delete([key_id(key) for key in rng.sample(range(N_KEYS), 10)])
        counts["pressed"] += 1
        # What is always gone at once is never read: the writers' need of room presses enough.
        stop.wait(0.01)
    return counts


JOBS: Final = {"read": read, "write": write, "press": press}


def work(path: str, job: str, stop: Event, seed: int, result: Connection) -> None:
    """Be one of the processes: connect, say so, work until the end, and hand over what was counted."""
    with result, shmplasma.connect(path) as client:
        result.send("ready")
        result.send(JOBS[job](client, stop, seed))


# -- the run -----------------------------------------------------------------------------------


def run(seconds: float, n_readers: int, n_writers: int) -> Summary:
    """Let processes work on one store for a while, and prove that it is in order afterwards.

    Parameters
    ----------
    seconds : float
        How long, not counting start and end.
    n_readers, n_writers : int
        How many processes do what, besides one that evicts and deletes.

    Raises
    ------
    AssertionError
        Bytes, pins or room are lost.  Wrong words are only counted.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    jobs = ["read"] * n_readers + ["write"] * n_writers + ["press"]
    processes = []
    counts: Counter[str] = Counter({"wrong words": 0})
    with shmplasma.Store(CAPACITY) as store, store.connect() as client:
        try:
            for seed, job in enumerate(jobs, start=1):
                ours, theirs = context.Pipe(duplex=False)
                arguments = (store.store_socket_name, job, stop, seed, theirs)
                process = context.Process(target=work, args=arguments)
                process.start()
                theirs.close()
                processes.append((process, ours))
            for _, ours in processes:
                assert ours.recv() == "ready"
            stop.wait(seconds)
            figures = figures_of(client)
            stop.set()
            for _, ours in processes:
                counts.update(ours.recv())
        finally:
            stop.set()
            for process, ours in processes:
                process.join()
                ours.close()
        assert all(process.exitcode == 0 for process, _ in processes), "a process has failed"
        prove_in_order(client)
    return Summary(counts, figures["takes"], figures["takes that met a pin"], figures["evictions"])


def prove_in_order(client: shmplasma.PlasmaClient) -> None:
    """Prove that the room is used by objects only, that no pin is left, and that nothing is lost."""
    deadline = time.monotonic() + 30
    # A process that has ended may not have been noticed yet.
    while (figures := figures_of(client))["leased bytes"] or figures["pinned objects"]:
        assert time.monotonic() < deadline, f"pins or leases of the dead: {figures}"
    objects = client.list()
    sizes = [info["data_size"] + info["metadata_size"] for info in objects.values()]
    used = sum(align_up(size, 64) for size in sizes)
    assert figures["capacity bytes"] - figures["free bytes"] == used, "bytes are lost"
    assert all(info["ref_count"] == 0 for info in objects.values()), "a pin is left"
    client.delete(list(objects))
    assert not client.list(), "an object cannot be deleted"
    data = client.create(key_id(0), figures["capacity bytes"])
    assert len(data) == CAPACITY
    del data
    client.abort(key_id(0))


def main() -> int:
    """Run as the command line says; 1 if a wrong word was read."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: 60)")
    parser.add_argument("--readers", type=int, default=3, help="reading processes (default: 3)")
    parser.add_argument("--writers", type=int, default=2, help="writing processes (default: 2)")
    arguments = parser.parse_args()
    summary = run(arguments.seconds, arguments.readers, arguments.writers)
    sys.stdout.write(f"{summary}\n")
    return 1 if summary.counts["wrong words"] else 0


if __name__ == "__main__":
    sys.exit(main())
