"""Processes that do something to a store that is full all the time, and may be killed again and again."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Final

import shmplasma
from tests.command import killed, running

__all__ = ["Member", "hammer", "new_parser", "report"]

Member = tuple[Callable[..., None], tuple[object, ...]]
"""What a process does, and with what after the store's socket, the event that ends it, and a connection to say "ready" and what it has counted;
connections among these are its own from then on."""

_CAPACITY: Final = 16_000_000
_FILLING_BYTES: Final = 50_000
_KILL_EACH_SECONDS: Final = 0.4


def _keep_full(path: str, stop: Event, said: Connection) -> None:
    """Put whatever fits, over and over."""
    counts: Counter[str] = Counter()
    with said, shmplasma.connect(path) as client:
        said.send("ready")
        while not stop.is_set():
            try:
                client.put_raw_buffer(os.urandom(8) * (_FILLING_BYTES // 8))
            except shmplasma.PlasmaStoreFull:
                # Somebody has waited for long enough while others were served.
                counts["refused, fillings"] += 1
            else:
                counts["fillings"] += 1
        said.send(counts)


def hammer(members: Iterable[Member], seconds: float, *, kill: bool = False) -> Counter[str]:
    """Run so many processes for so long, and one that fills the store; return what they have counted.

    Parameters
    ----------
    members : iterable of Member
        The processes.
    seconds : float
        How long.
    kill : bool, optional
        Whether the store is killed every 0.4 s, and another one takes its place.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        path = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "store")
        store = stack.enter_context(ExitStack())
        store.enter_context((killed if kill else running)("-m", str(_CAPACITY), "-s", path))
        pipes: list[Connection] = []
        processes = []
        for target, arguments in (*members, (_keep_full, ())):
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(path, stop, theirs, *arguments))
            process.start()
            for end in (theirs, *arguments):
                if isinstance(end, Connection):
                    end.close()
            processes.append(process)
            pipes.append(ours)
        assert all(pipe.recv() == "ready" for pipe in pipes)
        end_at = time.monotonic() + seconds
        while (left := end_at - time.monotonic()) > 0:
            time.sleep(min(left, _KILL_EACH_SECONDS) if kill else left)
            if kill:
                store.close()
                store.enter_context(killed("-s", path))
                counts["stores killed"] += 1
        if kill:
            store.close()
            store.enter_context(running("-s", path))
        stop.set()
        for pipe in pipes:
            counts.update(pipe.recv())
            pipe.close()
        for process in processes:
            process.join()
            assert process.exitcode == 0, "a process has failed"
        with shmplasma.connect(path) as client:
            client.delete(client.list())
            text = client.debug_string()
            assert not client.list(), "somebody who has gone holds something"
            assert f"\nfree bytes: {_CAPACITY}\n" in text, f"room has got lost: {text}"
    return counts


def new_parser(text: str) -> argparse.ArgumentParser:
    """Return a parser of the options that all these programs have; `text` is what one's module says of itself."""
    parser = argparse.ArgumentParser(description=text.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: 60)")
    parser.add_argument("--kill", action="store_true", help="kill the store every 0.4 s")
    return parser


def report(counts: Counter[str], *wrong: str) -> int:
    """Write down what was counted, and return a program's exit code: 1 if anything was that is wrong."""
    for what, count in sorted(counts.items()):
        sys.stdout.write(f"{what}: {count:,}\n")
    return int(any(counts[what] for what in wrong))
