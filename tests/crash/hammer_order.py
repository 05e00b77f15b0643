"""Hammers the promise that an answer knows of all that was done before: what was put is found, and what was deleted is not.

One process puts and tells another one over a pipe; that asks at once, by `contains`, by a `get` that does not
wait, and now and then by `list`.  Then the first one deletes the object, tells the other, and that asks again.  Meanwhile others put and delete as fast as they
can, so that the store has a queue of sockets and outboxes to read::

    python -m tests.crash.hammer_order --count 100000 --writers 4
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Final

import shmplasma

__all__ = ["Misses", "run"]

CAPACITY: Final = "64MB"
_LIST_EACH: Final = 20
_DELETE_EACH: Final = 500
"""So many objects of each writer at a time; the store never evicts."""


@dataclass(frozen=True)
class Misses:
    """How often something that was put was not there, or something that was deleted was.

    Attributes
    ----------
    contains, get, listed : int
        Times that `contains` said no, that `get` found nothing, and that the list did not have it.
    deleted : int
        Times that one of them found what was deleted.
    """

    contains: int
    get: int
    listed: int
    deleted: int


def keep_busy(path: str, stop: Event, ready: Connection) -> None:
    """Put small objects, and delete them again, until told to stop."""
    with ready, shmplasma.connect(path) as client:
        ready.send("ready")
        while not stop.is_set():
            ids = [client.put(b"busy") for _ in range(_DELETE_EACH)]
            client.delete(ids[::2])
            for object_id in ids[1::2]:
                client.delete(object_id)


def answer(path: str, count: int, questions: Connection, result: Connection) -> None:
    """Look for each object that the other side says it has put, and then deleted; every other one is asked for by `get` first."""
    missed_by_contains = missed_by_get = missed_by_list = found = 0
    with questions, result, shmplasma.connect(path) as client:
        for number in range(count):
            object_id = shmplasma.ObjectID(questions.recv_bytes())
            if number % 2:
                missed_by_contains += not client.contains(object_id)
            missed_by_get += client.get(object_id, timeout_ms=0) != number
            missed_by_contains += not client.contains(object_id)
            if number % _LIST_EACH == 0:
                missed_by_list += object_id not in client.list()
            questions.send_bytes(b"seen")
            assert questions.recv_bytes() == b"deleted"
            if number % _LIST_EACH == 0:
                found += object_id in client.list()
            if number % 2:
                found += client.contains(object_id)
            found += client.get(object_id, timeout_ms=0) == number
            found += client.contains(object_id)
            questions.send_bytes(b"next")
        result.send((missed_by_contains, missed_by_get, missed_by_list, found))


def run(count: int, n_writers: int, *, progress: bool = False) -> Misses:
    """Put and ask so many times.

    Parameters
    ----------
    count : int
        How many objects are put and asked for.
    n_writers : int
        How many processes keep the store busy.
    progress : bool, optional
        Whether to say on standard error how many it were so far.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    questions, asked = context.Pipe()
    result, ours = context.Pipe(duplex=False)
    ready, is_ready = context.Pipe(duplex=False)
    with shmplasma.Store(CAPACITY) as store, questions, result, ready:
        path = store.store_socket_name
        processes = [context.Process(target=answer, args=(path, count, asked, ours))]
        processes += [
            context.Process(target=keep_busy, args=(path, stop, is_ready)) for _ in range(n_writers)
        ]
        for process in processes:
            process.start()
        for end in (asked, ours, is_ready):
            end.close()
        try:
            for _ in range(n_writers):
                assert ready.recv() == "ready"
            with store.connect() as client:
                for number in range(count):
                    object_id = client.put(number)
                    questions.send_bytes(object_id.binary())
                    assert questions.recv_bytes() == b"seen"
                    client.delete(object_id)
                    questions.send_bytes(b"deleted")
                    assert questions.recv_bytes() == b"next"
                    if progress and number % 500 == 499:
                        sys.stderr.write(f"\r{number + 1:,} of {count:,} objects")
                        sys.stderr.flush()
            misses = Misses(*result.recv())
        finally:
            stop.set()
            questions.close()
            for process in processes:
                process.join()
        assert all(process.exitcode == 0 for process in processes), "a process has failed"
        return misses


def main() -> int:
    """Run as the command line says; 1 if anything was missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="objects (default: 100000)")
    parser.add_argument("--writers", type=int, default=4, help="busy processes (default: 4)")
    arguments = parser.parse_args()
    misses = run(arguments.count, arguments.writers, progress=True)
    sys.stdout.write(
        f"\nof {arguments.count:,} objects contains missed {misses.contains}, get {misses.get}, the list {misses.listed}; "
        f"{misses.deleted} were found when they were deleted\n"
    )
    return 0 if misses == Misses(0, 0, 0, 0) else 1


if __name__ == "__main__":
    sys.exit(main())
