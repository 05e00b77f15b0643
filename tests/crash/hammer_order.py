"""Hammers the promise that a negative answer comes last: what was put before somebody asks is always found.

One process puts and tells another one over a pipe; that asks at once, by `contains` and by a `get` that does not
wait.  Meanwhile others put as fast as they can, so that the store has a queue of sockets to read::

    python -m tests.crash.hammer_order --count 100000 --writers 4
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Final

import shmplasma

__all__ = ["Misses", "run"]

CAPACITY: Final = "64MB"


@dataclass(frozen=True)
class Misses:
    """How often something that was put was not there.

    Attributes
    ----------
    contains, get : int
        Times that `contains` said no, and that `get` found nothing.
    """

    contains: int
    get: int


def keep_busy(path: str, stop: Event, ready: Connection) -> None:
    """Put small objects until told to stop."""
    with ready, shmplasma.connect(path) as client:
        ready.send("ready")
        while not stop.is_set():
            client.put(b"busy")


def answer(path: str, count: int, questions: Connection, result: Connection) -> None:
    """Look for each object that the other side says it has put; every other one is asked for by `get` first."""
    missed_by_contains = missed_by_get = 0
    with questions, result, shmplasma.connect(path) as client:
        for number in range(count):
            object_id = shmplasma.ObjectID(questions.recv_bytes())
            if number % 2:
                missed_by_contains += not client.contains(object_id)
            missed_by_get += client.get(object_id, timeout_ms=0) != number
            missed_by_contains += not client.contains(object_id)
            client.delete(object_id)
            questions.send_bytes(b"next")
        result.send((missed_by_contains, missed_by_get))


def run(count: int, n_writers: int) -> Misses:
    """Put and ask so many times.

    Parameters
    ----------
    count : int
        How many objects are put and asked for.
    n_writers : int
        How many processes keep the store busy.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ExitStack() as stack:
        store = stack.enter_context(shmplasma.Store(CAPACITY))
        path = store.store_socket_name
        readiness = []
        for _ in range(n_writers):
            ours, theirs = context.Pipe(duplex=False)
            stack.enter_context(ours)
            writer = context.Process(target=keep_busy, args=(path, stop, theirs))
            writer.start()
            stack.callback(writer.join)
            theirs.close()
            readiness.append(ours)
        stack.callback(stop.set)
        questions, theirs_of_questions = context.Pipe()
        result, theirs_of_result = context.Pipe(duplex=False)
        asker = context.Process(
            target=answer, args=(path, count, theirs_of_questions, theirs_of_result)
        )
        asker.start()
        stack.callback(asker.join)
        theirs_of_questions.close()
        theirs_of_result.close()
        stack.enter_context(questions)
        stack.enter_context(result)
        for ours in readiness:
            assert ours.recv() == "ready"
        client = stack.enter_context(store.connect())
        for number in range(count):
            questions.send_bytes(client.put(number).binary())
            assert questions.recv_bytes() == b"next"
        return Misses(*result.recv())


def main() -> int:
    """Run as the command line says; 1 if anything was missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="objects (default: 100000)")
    parser.add_argument("--writers", type=int, default=4, help="busy processes (default: 4)")
    arguments = parser.parse_args()
    misses = run(arguments.count, arguments.writers)
    sys.stdout.write(
        f"of {arguments.count:,} objects contains missed {misses.contains}, get {misses.get}\n"
    )
    return 1 if misses.contains or misses.get else 0


if __name__ == "__main__":
    sys.exit(main())
