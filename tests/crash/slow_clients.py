"""Measures an honest pair of clients alone, and beside clients that stop in the middle or never read.

A hundred connections have sent half of a frame's header, half of them without an introduction, and say no more.  Twenty clients ask for lists, descriptions
and what is there, as fast as their sockets take it, and read no answer; a subscriber reads no notification.  The
honest pair puts, finds, misses and creates, one request after the other::

    python -m tests.crash.slow_clients --seconds 30

Those that do not read, or do not say who they are, have to be dropped, with a reason in the log; what waits for them is bounded until then.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Final, Self

from shmplasma.layout import ID_BYTES
from shmplasma.protocol import PROTOCOL_VERSION, encode_frame
from shmplasma.requests import Contains, Debug, Hello, List, Request, Role
from tests.attacker import Attacker
from tests.crash.mutated_frames import Footprint, StoreProcess
from tests.processes import until

if TYPE_CHECKING:
    from shmplasma import PlasmaClient

__all__ = ["Latencies", "Summary", "run"]

CAPACITY: Final = 32 << 20
N_OBJECTS: Final = 1000
"""They make an answer to `List` 61 KB long."""
_UNREAD: Final = "it does not read"
_STRANGE: Final = "it has not introduced itself"
_PAUSE_SECONDS: Final = 0.001
_LOOK_EACH_SECONDS: Final = 0.1


@dataclass(frozen=True)
class Latencies:
    """How long requests of the honest pair took.

    Attributes
    ----------
    nanoseconds : dict of str to list of int
        Each request's time, by what it was.
    """

    nanoseconds: dict[str, list[int]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many requests there were."""
        return sum(map(len, self.nanoseconds.values()))

    def __str__(self) -> str:
        every = [each for times in self.nanoseconds.values() for each in times]
        lines = [f"  {'':<16} {'count':>8} {'p50 us':>9} {'p99 us':>9} {'worst us':>9}"]
        for name, times in ({**self.nanoseconds, "all": every}).items():
            ordered = sorted(times) or [0]
            p50, p99 = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99))
            figures = " ".join(f"{each / 1000:>9.0f}" for each in (p50, p99, ordered[-1]))
            lines.append(f"  {name:<16} {len(times):>8,} {figures}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Summary:
    """What a run has seen.

    Attributes
    ----------
    alone, beside : Latencies
        Of the honest pair, without the slow ones and beside them.
    wrong : int
        How often the honest pair got another answer than it had to.
    asked : Counter of str
        What the slow ones have sent, and how many of them found their connection closed.
    drops : Counter of str
        Why the store dropped clients.
    before, after : Footprint
        Of the store, before the slow ones came and after they had gone.
    peak_bytes : int
        The store's largest resident memory in between.
    """

    alone: Latencies
    beside: Latencies
    wrong: int
    asked: Counter[str]
    drops: Counter[str]
    before: Footprint
    after: Footprint
    peak_bytes: int

    @property
    def unread_drops(self) -> int:
        """How many were dropped because they did not read."""
        return sum(n for reason, n in self.drops.items() if reason.startswith(_UNREAD))

    @property
    def stranger_drops(self) -> int:
        """How many were dropped because they did not say who they are."""
        return sum(n for reason, n in self.drops.items() if reason.startswith(_STRANGE))

    def __str__(self) -> str:
        return "\n".join(
            (
                f"alone:\n{self.alone}",
                f"beside the slow ones:\n{self.beside}",
                f"wrong answers: {self.wrong}",
                *(f"slow ones, {name}: {n:,}" for name, n in sorted(self.asked.items())),
                *(f"dropped {n:,} x {reason}" for reason, n in self.drops.items()),
                f"the store before: {self.before}",
                f"at its peak:      RSS {self.peak_bytes / 2**20:.1f} MiB",
                f"after:            {self.after}",
            )
        )


# -- the slow ones -----------------------------------------------------------------------------


class _Deaf:
    """A client that asks and never reads.

    Parameters
    ----------
    path : str
        The store's socket.
    rng : random.Random
        Chooses the questions.
    ids : list of bytes
        Objects that are there.
    """

    def __init__(self, path: str, rng: random.Random, ids: list[bytes]) -> None:
        self.connection = Attacker(path)
        self._rng = rng
        self._ids = ids
        self.connection.enter()
        self.connection.sock.setblocking(False)
        self._rest = b""

    def ask(self) -> int | None:
        """Send as much as the socket takes at once; return the number of requests, None if it was closed."""
        asked = 0
        try:
            for _ in range(20):  # the others are to have their turn
                if not self._rest:
                    self._rest = self.connection.frame(self._question())
                    asked += 1
                self._rest = self._rest[self.connection.sock.send(self._rest) :]
        except BlockingIOError:
            pass
        except ConnectionError:
            return None
        return asked

    def _question(self) -> Request:
        rng = self._rng
        match rng.randrange(4):
            case 0:
                return Debug()
            case 1:
                return Contains(rng.choice(self._ids))
            case 2:
                return Contains(bytes(ID_BYTES))  # which is not there: a drain for each
            case _:
                return List(0)


def be_slow(path: str, n_half_open: int, n_deaf: int, ids: list[bytes], orders: Connection) -> None:
    """Be all of the slow ones, until told to go.

    Parameters
    ----------
    path : str
        The store's socket.
    n_half_open, n_deaf : int
        How many stop in the middle of a header, and how many never read.
    ids : list of bytes
        Objects that are there.
    orders : Connection
        Is told when all are there, and gets what was asked when something comes over it.
    """
    counts: Counter[str] = Counter()
    rng = random.Random(1)
    with orders, ExitStack() as stack:
        for number in range(n_half_open):
            half = stack.enter_context(Attacker(path))
            if number % 2:
                half.enter()
            half.send(half.frame(Debug())[: 1 + number % 11])
            counts["half headers"] += 1
        subscriber = stack.enter_context(Attacker(path))
        hello = Hello(PROTOCOL_VERSION, Role.SUBSCRIBER, "subscriber")
        subscriber.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        subscriber.send(encode_frame(hello.KIND, 1, hello.encode()))
        deaf = [_Deaf(path, rng, ids) for _ in range(n_deaf)]
        for each in deaf:
            stack.enter_context(each.connection)
        orders.send("there")
        while not orders.poll(0 if deaf else None):
            progress = 0
            for each in list(deaf):
                asked = each.ask()
                if asked is None:
                    counts["deaf clients dropped"] += 1
                    deaf.remove(each)
                else:
                    progress += asked
            counts["questions"] += progress
            orders.send(len(deaf))
            time.sleep(_PAUSE_SECONDS if progress else 5 * _PAUSE_SECONDS)
        orders.send(counts)


# -- the honest pair ---------------------------------------------------------------------------


class _Pair:
    """Two clients that use a store together, and take the time of each request."""

    def __init__(self, writer: PlasmaClient, reader: PlasmaClient) -> None:
        self._writer = writer
        self._reader = reader
        self.wrong = 0

    def round(self, latencies: Latencies) -> None:
        """Do each thing once."""
        from shmplasma import ObjectID, ObjectNotAvailable

        def timed(name: str, call: Callable[[], object]) -> object:
            start = time.perf_counter_ns()
            result = call()
            times = latencies.nanoseconds.setdefault(name, [])
            times.append(time.perf_counter_ns() - start)
            return result

        fresh, chosen, missing = (ObjectID.from_random() for _ in range(3))
        writer, reader = self._writer, self._reader
        put = timed("put", lambda: writer.put(b"value"))
        assert isinstance(put, ObjectID)
        found = timed("get", lambda: reader.get(put, timeout_ms=0))
        none = timed("get of missing", lambda: reader.get(missing, timeout_ms=0))
        no = timed("contains false", lambda: reader.contains(fresh))
        timed("create and seal", lambda: writer.create_and_seal(chosen, b"data"))
        yes = timed("contains true", lambda: reader.contains(chosen))
        timed("delete", lambda: writer.delete([put, chosen]))
        self.wrong += (found, none, no, yes) != (b"value", ObjectNotAvailable, False, True)


# -- the run -----------------------------------------------------------------------------------


def run(
    seconds: float,
    n_half_open: int = 100,
    n_deaf: int = 20,
    patience_seconds: float = 120,
    say: Callable[[str], object] = len,
) -> Summary:
    """Measure the honest pair, first alone and then beside the slow ones.

    Parameters
    ----------
    seconds : float
        How long each of the two takes.
    n_half_open, n_deaf : int
        How many connections stop in the middle of a header, and how many clients never read.
    patience_seconds : float
        How much longer to wait until all that never read are dropped.
    say : callable
        Is told of the progress.

    Raises
    ------
    AssertionError
        The store has died, or keeps descriptors of those that have gone.  Wrong answers are only counted.
    """
    from shmplasma import connect

    with (
        StoreProcess(CAPACITY) as store,
        connect(store.path) as writer,
        connect(store.path) as reader,
    ):
        ids = [writer.put(number).binary() for number in range(N_OBJECTS)]
        pair = _Pair(writer, reader)
        alone, beside = Latencies(), Latencies()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pair.round(alone)
            time.sleep(_PAUSE_SECONDS)
        say(f"alone:\n{alone}")
        before = store.footprint()
        with _SlowOnes(store.path, n_half_open, n_deaf, ids) as slow:
            peak = looked = 0.0
            end = time.monotonic() + seconds
            patience = end + patience_seconds
            while (now := time.monotonic()) < end or (slow.deaf_left() and now < patience):
                pair.round(beside)
                if now > looked + _LOOK_EACH_SECONDS:
                    looked = now
                    peak = max(peak, store.footprint().rss_bytes)
                time.sleep(_PAUSE_SECONDS)
            say(f"beside the slow ones:\n{beside}")
            asked = slow.leave()
        until(lambda: store.footprint().fds <= before.fds, "the store lets go of the slow", 10)
        after = store.footprint()
        assert store.is_alive, "the store has died"
        drops = store.drops()
    return Summary(alone, beside, pair.wrong, asked, drops, before, after, int(peak))


class _SlowOnes:
    """The process of the slow ones; it has ended with the block."""

    def __init__(self, path: str, n_half_open: int, n_deaf: int, ids: list[bytes]) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        arguments = (path, n_half_open, n_deaf, ids, theirs)
        self._process = context.Process(target=be_slow, args=arguments)
        self._process.start()
        theirs.close()
        self._deaf = n_deaf
        self._counts: Counter[str] = Counter()

    def deaf_left(self) -> int:
        """Return how many of those that never read have not noticed that they were dropped."""
        while self._orders.poll():
            self._deaf = self._orders.recv()
        return self._deaf

    def leave(self) -> Counter[str]:
        """Let all go, and return what they have done."""
        self._orders.send("go")
        while not isinstance(heard := self._orders.recv(), Counter):
            pass
        return heard

    def __enter__(self) -> Self:
        assert self._orders.recv() == "there"
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._orders.send("go")
        self._orders.close()
        self._process.join()
        assert self._process.exitcode == 0, "the slow ones have failed"


def main() -> int:
    """Run as the command line says; 1 if the honest pair got a wrong answer."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--seconds", type=float, default=30, help="of each measurement (default: 30)")
    add("--half-open", type=int, default=100, help="with half a header (default: 100)")
    add("--deaf", type=int, default=20, help="clients that never read (default: 20)")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    summary = run(arguments.seconds, arguments.half_open, arguments.deaf, say=say)
    say(f"\n{summary}")
    return 1 if summary.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
