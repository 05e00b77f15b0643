"""Kill a store again and again while clients put more than fits and read it back; nothing acknowledged may be lost.

Run it by hand for as long as you like: ``python -m tests.crash.kill_spilling_store --times 100``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import shmplasma
from shmplasma import ObjectID
from tests.crash.kill_store import PATIENCE, MortalStore

__all__ = ["Summary", "run"]

_CAPACITY = 16_000_000
_LIVE_BYTES = 4 * _CAPACITY
_MAX_BYTES = 600_000


@dataclass(frozen=True, slots=True)
class Summary:
    """What happened.

    Attributes
    ----------
    kills : int
        How often the store was killed.
    puts, gets : int
        How many objects were put, and how many were read and compared.
    spilled : int
        How many bytes were in the external store only, at the end.
    """

    kills: int
    puts: int
    gets: int
    spilled: int


def content(seed: int) -> tuple[bytes, bytes]:
    """Return data and metadata of the object that is made of a seed."""
    rng = random.Random(seed)
    return rng.randbytes(rng.randrange(1, _MAX_BYTES)), rng.randbytes(rng.randrange(20))


def work(pipe: Connection, path: str, number: int, n_clients: int) -> None:
    """Put, read and delete objects until told to end; send how many were put and read."""
    rng = random.Random(number)
    live: dict[int, int] = {}
    puts = gets = 0
    with shmplasma.connect(path, PATIENCE) as client:
        # However slow the machine is, there is to be more than fits.
        while not (pipe.poll() and sum(live.values()) > 1.5 * _CAPACITY / n_clients):
            if sum(live.values()) < _LIVE_BYTES // n_clients:
                puts += 1
                seed = number << 32 | puts
                data, metadata = content(seed)
                client.create_and_seal(_id(seed), data, metadata)
                live[seed] = len(data)
            seed = rng.choice(list(live))
            _compare(client, seed)
            gets += 1
            if rng.random() < 0.3:
                client.delete([_id(seed)])
                del live[seed]
        for seed in live:  # whatever is left, all of it
            _compare(client, seed)
            gets += 1
        pipe.send((puts, gets))


def _id(seed: int) -> ObjectID:
    return ObjectID(seed.to_bytes(20, "big"))


def _compare(client: shmplasma.PlasmaClient, seed: int) -> None:
    data, metadata = content(seed)
    ((got_metadata, got),) = client.get_buffers([_id(seed)], timeout_ms=60_000, with_meta=True)
    assert got is not None, f"object {seed:x} is lost"
    assert (got.to_pybytes(), got_metadata) == (data, metadata), f"object {seed:x} has changed"


def run(times: int, n_clients: int = 4, *, progress: bool = False) -> Summary:
    """Kill a store so many times while clients use it; return what happened.

    Raises
    ------
    AssertionError
        Something was lost, or is not what it was.
    """
    spawn = multiprocessing.get_context("spawn")
    rng = random.Random()
    with tempfile.TemporaryDirectory(prefix="t-") as directory:
        uri = Path(directory).as_uri()
        with MortalStore(_CAPACITY, "-e", uri) as store:
            store.start()
            store.await_ready()
            pipes, workers = [], []
            for number in range(n_clients):
                ours, theirs = spawn.Pipe()
                arguments = theirs, store.path, number + 1, n_clients
                workers.append(spawn.Process(target=work, args=arguments))
                workers[-1].start()
                theirs.close()
                pipes.append(ours)
            for kill in range(times):
                time.sleep(rng.uniform(0.1, 1))  # they are to be anywhere
                assert all(worker.is_alive() for worker in workers), f"a client failed\n{store.log}"
                store.kill()
                store.start()
                store.await_ready()
                if progress:
                    sys.stdout.write(f"killed {kill + 1} times\n")
            results = []
            for pipe, worker in zip(pipes, workers, strict=True):
                pipe.send("end")
                results.append(pipe.recv())
                pipe.close()
                worker.join()
            with shmplasma.connect(store.path) as client:
                lines = dict(line.split(": ", 1) for line in client.debug_string().splitlines())
            store.end()
        left = [path.name for path in Path(directory).iterdir()]
        assert not left, f"the store leaves behind: {left}"
    puts, gets = map(sum, zip(*results, strict=True))
    return Summary(times, puts, gets, int(lines["spilled bytes"]))


def main() -> int:
    """Run it by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()
    sys.stdout.write(f"{run(options.times, options.clients, progress=True)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
