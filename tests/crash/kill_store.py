"""A store that is killed under load, again and again, and started again on the same socket.

Its clients go on by themselves.  After each restart they rest for a moment, and it is proved that the store holds
exactly what it has acknowledged, byte for byte, and that its accounts are right.  Run it by hand for as long as
you like::

    python -m tests.crash.kill_store --times 200
    python -m tests.crash.kill_store --times 100 --victims 2
    python -m tests.crash.kill_store --objects 100000
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, Self

import shmplasma
from shmplasma.endpoint import Endpoint
from shmplasma.errors import EndpointError
from shmplasma.objects import ObjectID
from shmplasma.segment_name import SegmentName
from tests.clients import figures_of
from tests.command import PROGRAM
from tests.crash.workload import (
    Crew,
    Known,
    Ledger,
    Load,
    Member,
    Report,
    Said,
    content,
    in_small_process,
    prove_accounts,
    prove_empty,
    prove_identical,
    prove_whole,
)

__all__ = ["PATIENCE", "MortalStore", "Recoveries", "Summary", "measure", "run"]

CAPACITY: Final = 100_000_000
_LONGEST_LIFE_SECONDS: Final = 0.06
_SHARE_OF_EARLY_DEATHS: Final = 0.25
"""How often a store is killed before it is ready, hence also while it recovers."""
_START_SECONDS: Final = 60.0
PATIENCE: Final = 600
"""Retries of a client, 0.1 s apart: on a machine that is busy enough a start takes longer than the usual 8 s."""
_LOOK_SECONDS: Final = 0.5
"""How soon a store is noticed that ends instead."""
_MEASURING: Final = "COVERAGE_PROCESS_CONFIG"
_SMALL_BYTES: Final = (60, 100, 200)
_DRIVER: Final = 0xFFFF
"""The number of the load that this program itself is."""


@dataclass(frozen=True)
class Summary:
    """What a run has seen.

    Attributes
    ----------
    deaths, early_deaths : int
        How often the store was killed, and how often of these before it was ready.
    counts : Counter of str
        What the clients have done.
    lost_with_their_clients : int
        Objects that clients have reported as stored and that went when these were killed with the store.
    longest_pause_seconds : float
        How long one call of a client took at most.
    ready_seconds : tuple of float
        From each start of a store to its readiness.
    """

    deaths: int
    early_deaths: int
    counts: Counter[str]
    lost_with_their_clients: int
    longest_pause_seconds: float
    ready_seconds: tuple[float, ...]

    def __str__(self) -> str:
        lines = [f"{name}: {count:,}" for name, count in sorted(self.counts.items())]
        median, longest = statistics.median(self.ready_seconds), max(self.ready_seconds)
        lines += [
            f"deaths: {self.deaths:,}, of which {self.early_deaths:,} before the store was ready",
            f"lost with clients that were killed too: {self.lost_with_their_clients:,}",
            f"longest pause of a client: {self.longest_pause_seconds * 1000:.0f} ms",
            f"start to ready: median {median * 1000:.0f} ms, longest {longest * 1000:.0f} ms",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Recoveries:
    """How long a store with many objects takes to come back, in seconds, time after time.

    Attributes
    ----------
    objects : int
        How many there are.
    ready_seconds : tuple of float
        From the start of the process to its readiness.
    processor_seconds : tuple of float
        How much processor time it took until then; on a busy machine that says more.
    answer_seconds : tuple of float
        From the death of the store to the first answer that a waiting client gets.
    summaries : tuple of str
        What the stores have logged of their recoveries.
    """

    objects: int
    ready_seconds: tuple[float, ...]
    processor_seconds: tuple[float, ...]
    answer_seconds: tuple[float, ...]
    summaries: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"objects: {self.objects:,}"]
        for name, all_seconds in (
            ("process start to ready", self.ready_seconds),
            ("processor time until then", self.processor_seconds),
            ("SIGKILL to the first answer", self.answer_seconds),
        ):
            median = statistics.median(all_seconds)
            each = ", ".join(f"{seconds * 1000:.0f}" for seconds in all_seconds)
            lines.append(f"{name}: median {median * 1000:.0f} ms ({each})")
        return "\n".join((*lines, *self.summaries))


# -- the store -------------------------------------------------------------------------------------


class MortalStore:
    """A store process that can be killed and started again; nothing of it is left after the block.

    Parameters
    ----------
    capacity : int
        What it is started with each time.
    *arguments : str
        More of that.

    Attributes
    ----------
    path : str
        Its socket.
    ready_seconds : list of float
        From each start to readiness.
    """

    def __init__(self, capacity: int, *arguments: str) -> None:
        self._exits = ExitStack()
        directory = Path(self._exits.enter_context(tempfile.TemporaryDirectory(prefix="t-")))
        self.path = str(directory / "store")
        self.ready_seconds: list[float] = []
        self._log = self._exits.enter_context((directory / "log").open("w+b"))
        self._notices = self._exits.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self._notices.bind(str(directory / "ready"))
        self._environment = {
            **{name: value for name, value in os.environ.items() if name != _MEASURING},
            "NOTIFY_SOCKET": str(directory / "ready"),
        }
        self._arguments = ["-m", str(capacity), "-s", self.path, *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0

    def start(self) -> None:
        """Start the process; do not wait for it."""
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            [*PROGRAM, *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            env=self._environment,
        )

    def await_ready(self) -> None:
        """Wait until it serves."""
        assert self._process is not None
        self._notices.settimeout(_LOOK_SECONDS)
        said, deadline = b"", time.monotonic() + _START_SECONDS
        while not said and self._process.poll() is None and time.monotonic() < deadline:
            with suppress(TimeoutError):
                said = self._notices.recv(64)
        assert said == b"READY=1", f"the store does not start: {said!r}\n{self.log}"
        self.ready_seconds.append(time.monotonic() - self._began)

    def kill(self) -> None:
        """Kill it at once; a word of readiness that it has just said is forgotten."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._notices.setblocking(False)
        with suppress(BlockingIOError):
            while self._notices.recv(64):
                pass

    def end(self) -> None:
        """End it in good order; it is to have been alive."""
        assert self._process is not None
        self._process.terminate()
        assert self._process.wait() == 0, f"the store has failed\n{self.log}"

    @property
    def processor_seconds(self) -> float:
        """How long the process has been running on a processor."""
        assert self._process is not None
        return int(Path(f"/proc/{self._process.pid}/schedstat").read_text().split()[0]) / 1e9

    @property
    def condition(self) -> str:
        """What has become of the process, for people."""
        code = None if self._process is None else self._process.poll()
        age = time.monotonic() - self._began
        return (
            f"a store started {age:.1f} s ago {'lives' if code is None else f'ended with {code}'}"
        )

    @property
    def log(self) -> str:
        """What the stores have written so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._exits:
            if self._process is not None and self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._sweep()

    def _sweep(self) -> None:
        try:
            with Endpoint.claim(self.path) as endpoint:
                segment = SegmentName.decode(endpoint.read_note())
                if segment is not None:
                    segment.remove()
                endpoint.write_note(b"")
        except EndpointError as error:
            sys.stderr.write(f"the segment of the store may be left: {error}\n")


# -- the clients -----------------------------------------------------------------------------------


def work(pipe: Connection, path: str, number: int) -> None:
    """Be a client that works until it is told to rest, and says then what there must be."""
    with shmplasma.connect(path, PATIENCE) as client:
        load = Load(client, number)
        pipe.send("ready")
        while (others := pipe.recv()) is not None:
            load.others = others
            while not pipe.poll():
                load.step()
            assert pipe.recv() == "rest"
            pipe.send(load.report())
        load.leave()


def wait(pipe: Connection, path: str) -> None:
    """Be a client of which two threads wait for objects, while a third asks for what is not there."""
    with shmplasma.connect(path, PATIENCE) as client:
        while (orders := pipe.recv()) is not None:
            found: list[object] = []

            def get(order: list[tuple[bytes, Known]], found: list[object] = found) -> None:
                ids = [ObjectID(object_id) for object_id, _ in order]
                for (_, known), buffer in zip(order, client.get_buffers(ids, 60_000), strict=True):
                    prove_identical(known, buffer)
                    found.append(known)

            threads = [threading.Thread(target=get, args=(order,)) for order in orders]
            for thread in threads:
                thread.start()
            pipe.send("asked")
            longest = 0.0
            while any(thread.is_alive() for thread in threads):
                began = time.monotonic()
                assert not client.contains(ObjectID.from_random())
                client.put_raw_buffer(b"a" * 8)
                longest = max(longest, time.monotonic() - began)
                time.sleep(0.001)
            pipe.send((len(found), longest))


def be_a_victim(pipe: Connection, path: str, number: int) -> None:
    """Be a client that says of each thing what it does, until it is killed."""
    with shmplasma.connect(path, PATIENCE) as client:
        load = Load(client, number, tell=pipe.send)
        pipe.send("ready")
        while True:
            load.step()


# -- the run ---------------------------------------------------------------------------------------


class Run:
    """One run: a store, its clients, and what is known of both."""

    def __init__(self, store: MortalStore, crew: Crew, n_clients: int, n_victims: int) -> None:
        self._store = store
        self._crew = crew
        self._n_victims = n_victims
        self._rng = random.Random()
        self._workers = [crew.hire(work, store.path, number + 1) for number in range(n_clients)]
        self._waiter = crew.hire(wait, store.path)
        self._next_number = n_clients + 1
        for worker in self._workers:
            assert worker.hear() == "ready"
        self._client = shmplasma.connect(store.path, PATIENCE)
        self._last_serial = _DRIVER << 32
        self._objects: dict[bytes, Known] = {}
        self._sample: list[bytes] = []
        self.deaths = self.early_deaths = self.lost = 0
        self.counts: Counter[str] = Counter()
        self.longest_seconds = 0.0

    def round(self) -> None:
        """Let clients work, kill the store, start it again, and prove that all is as it must be."""
        victims = self._hire_victims()
        for worker in self._workers:
            worker.pipe.send(self._sample)
        early, late = self._ask()
        time.sleep(self._rng.uniform(0.001, _LONGEST_LIFE_SECONDS))
        self._put(early)
        self._kill(victims)
        while self._rng.random() < _SHARE_OF_EARLY_DEATHS:
            self._store.start()
            time.sleep(self._rng.uniform(0, 1.2 * statistics.median(self._store.ready_seconds)))
            self._store.kill()
            self.deaths += 1
            self.early_deaths += 1
        self._store.start()
        self._put(late)  # which waits for the store as well
        self._store.await_ready()
        count, longest = self._waiter.hear()
        assert count == len(early) + len(late), f"a thread got {count} objects"
        self.counts["waited for"] += count
        self.longest_seconds = max(self.longest_seconds, longest)
        self._prove(victims)

    def finish(self) -> None:
        """Let all clients leave, and prove that nothing is left of them and no room is lost."""
        for member in (*self._workers, self._waiter):
            member.pipe.send(None)
        for member in (*self._workers, self._waiter):
            member.process.join()
            assert member.process.exitcode == 0, f"a client has failed: {member.hear_all()}"
            self._crew.dismiss(member)
        self._client.disconnect()
        with shmplasma.connect(self._store.path, PATIENCE) as client:
            prove_empty(client)
        self._store.end()

    def _hire_victims(self) -> list[tuple[Member, Ledger]]:
        victims = []
        for _ in range(self._n_victims):
            member = self._crew.hire(be_a_victim, self._store.path, self._next_number)
            self._next_number += 1
            victims.append((member, Ledger()))
        for member, _ in victims:
            assert member.hear() == "ready"
        return victims

    def _ask(self) -> tuple[dict[bytes, Known], dict[bytes, Known]]:
        """Let two threads wait for objects; return those to put before the death, and those after it."""
        new = [self._new() for _ in range(4)]
        early, late = dict(new[:2]), dict(new[2:])
        self._waiter.pipe.send([[new[0], new[2]], [new[1], new[3]]])
        assert self._waiter.hear() == "asked"
        return early, late

    def _new(self) -> tuple[bytes, Known]:
        self._last_serial += 1
        return self._rng.randbytes(20), Known(self._last_serial, 504, 0, is_value=False)

    def _put(self, objects: dict[bytes, Known]) -> None:
        for object_id, known in objects.items():
            began = time.monotonic()
            self._client.create_and_seal(ObjectID(object_id), content(known.serial, known.size))
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
            self._objects[object_id] = known

    def _kill(self, victims: list[tuple[Member, Ledger]]) -> None:
        kills: list[Callable[[], None]] = [member.kill for member, _ in victims]
        kills.insert(self._rng.randint(0, len(kills)), self._store.kill)
        for member, ledger in victims:  # that it can go on writing
            self._listen(member, ledger)
        for kill in kills:
            kill()
        self.deaths += 1
        for member, ledger in victims:
            member.process.join()
            self._listen(member, ledger)
            self._crew.dismiss(member)

    @staticmethod
    def _listen(member: Member, ledger: Ledger) -> None:
        for said in member.hear_all():
            assert isinstance(said, Said)
            ledger.note(said)

    def _prove(self, victims: list[tuple[Member, Ledger]]) -> None:
        """Let all rest, and compare what they know with what the store says."""
        for worker in self._workers:
            worker.pipe.send("rest")
        sealed = dict(self._objects)
        unsealed: dict[bytes, Known] = {}
        held: set[bytes] = set()
        for worker in self._workers:
            report = worker.hear()
            assert isinstance(report, Report)
            sealed |= report.objects
            unsealed |= report.unsealed
            held |= report.held
            self.counts.update(report.counts)
            self.longest_seconds = max(self.longest_seconds, report.longest_seconds)
        self._sample = self._rng.sample(sorted(sealed), min(60, len(sealed)))
        listed = {object_id.binary() for object_id in self._client.list()}
        left = self._left_by(victims, listed)
        extra = listed - sealed.keys() - unsealed.keys() - held - left.keys()
        self._prove_extra(extra, victims)
        prove_accounts(self._client, sealed | left, unsealed, held)
        for (metadata, buffer), known in zip(
            self._client.get_buffers([ObjectID(each) for each in self._objects], 0, with_meta=True),
            self._objects.values(),
            strict=True,
        ):
            assert buffer is not None, f"{known} is lost"
            prove_identical(known, buffer, metadata)
            del buffer
        self._client.delete([ObjectID(object_id) for object_id in {**self._objects, **left}])
        self._objects.clear()

    def _left_by(
        self, victims: list[tuple[Member, Ledger]], listed: set[bytes]
    ) -> dict[bytes, Known]:
        """Return what is there of what clients had put that were killed with the store; count the rest."""
        put = {each: known for _, ledger in victims for each, known in ledger.objects.items()}
        left = {object_id: known for object_id, known in put.items() if object_id in listed}
        self.lost += len(put) - len(left)
        self.counts["put by victims"] += len(put)
        ids = [ObjectID(object_id) for object_id in left]
        found = self._client.get_buffers(ids, 0, with_meta=True)
        for known, (metadata, buffer) in zip(left.values(), found, strict=True):
            prove_identical(known, buffer, metadata)
        return left

    def _prove_extra(self, extra: set[bytes], victims: list[tuple[Member, Ledger]]) -> None:
        """Look at what nobody has spoken of, and delete it.

        Such are the objects that the waiting client puts, which are all the same, and one object of each victim,
        which it could not report any more.  What a victim was about to delete may be there or not.
        """
        doubtful = {object_id for _, ledger in victims for object_id in ledger.doubtful}
        ids = [ObjectID(object_id) for object_id in extra]
        unreported: list[str] = []
        for object_id, (metadata, buffer) in zip(
            ids, self._client.get_buffers(ids, 0, with_meta=True), strict=True
        ):
            if buffer is None:
                continue
            if buffer == b"a" * 8:
                self.counts["put beside waiting"] += 1
                continue
            prove_whole(buffer, metadata)
            if object_id.binary() not in doubtful:
                serial = int.from_bytes(bytes(buffer)[:8], sys.byteorder)
                unreported.append(f"{object_id.binary().hex()} of serial number {serial:x}")
        assert len(unreported) <= len(victims), f"these should not be there: {unreported}"
        self._client.delete(ids)


def run(times: int, n_clients: int = 4, n_victims: int = 0, *, progress: bool = False) -> Summary:
    """Kill a store so many times, and prove each time that nothing is lost.

    Parameters
    ----------
    times : int
        How often it is killed when it is ready; it dies early besides.
    n_clients : int, optional
        How many client processes live through all of it, besides two that wait and put.
    n_victims : int, optional
        How many others are killed with it, each time.
    progress : bool, optional
        Whether to write to the standard error how far it is.

    Raises
    ------
    AssertionError
        Something is lost, or wrong, or has come back, or a client has failed.
    """
    return in_small_process(_run, times, n_clients, n_victims, progress)


def _run(times: int, n_clients: int, n_victims: int, progress: bool) -> Summary:
    with MortalStore(CAPACITY) as store, Crew() as crew:
        try:
            store.start()
            store.await_ready()
            running = Run(store, crew, n_clients, n_victims)
            for number in range(times):
                running.round()
                if progress and number % 10 == 9:
                    sys.stderr.write(f"{number + 1} of {times}\n")
            running.finish()
        except BaseException as error:
            last = "\n".join(store.log.splitlines()[-20:])
            error.add_note(f"{store.condition}; the stores have logged:\n{last}")
            raise
    return Summary(
        running.deaths,
        running.early_deaths,
        running.counts,
        running.lost,
        running.longest_seconds,
        tuple(store.ready_seconds),
    )


def measure(objects: int, times: int = 7) -> Recoveries:
    """Measure how long a store takes to come back that holds so many small objects, in no order and with gaps.

    Raises
    ------
    AssertionError
        An object is lost or wrong.
    """
    return in_small_process(_measure, objects, times)


def _churn(client: shmplasma.Client, objects: int) -> tuple[list[ObjectID], list[Known]]:
    """Put objects, and replace half of them by chance, twice; return those that are left."""
    rng = random.Random(objects)
    stored: list[tuple[ObjectID, Known]] = []
    serial = 0
    for _ in range(3):
        rng.shuffle(stored)
        client.delete([object_id for object_id, _ in stored[objects // 2 :]])
        del stored[objects // 2 :]
        while len(stored) < objects:
            known = Known(serial, rng.choice(_SMALL_BYTES), 0, is_value=False)
            object_id = client.put_raw_buffer(content(serial, known.size))
            stored.append((object_id, known))
            serial += 1
    client.flush()
    return [object_id for object_id, _ in stored], [known for _, known in stored]


def _measure(objects: int, times: int) -> Recoveries:
    answered: list[float] = []
    busy: list[float] = []
    with MortalStore(max(CAPACITY, objects * 512)) as store:
        store.start()
        store.await_ready()
        with shmplasma.connect(store.path, PATIENCE) as client:
            ids, known = _churn(client, objects)
            for _ in range(times):
                time.sleep(0.5)
                died = time.monotonic()
                store.kill()

                def ask(died: float = died) -> None:
                    assert not client.contains(ObjectID.from_random())
                    answered.append(time.monotonic() - died)

                asking = threading.Thread(target=ask)
                asking.start()
                store.start()
                store.await_ready()
                busy.append(store.processor_seconds)
                asking.join()
                for each, buffer in zip(known, client.get_buffers(ids, 0), strict=True):
                    prove_identical(each, buffer)
                    del buffer
                assert figures_of(client)["objects"] == objects
        with shmplasma.connect(store.path, PATIENCE) as client:
            prove_empty(client)
        store.end()
        log = store.log
    summaries = tuple(line.partition(": ")[2] for line in log.splitlines() if "recovered" in line)
    return Recoveries(
        objects, tuple(store.ready_seconds[1:]), tuple(busy), tuple(answered), summaries
    )


def main() -> int:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--times", type=int, default=200, help="how often the store is killed (default: 200)")
    add("--clients", type=int, default=4, help="clients under load (default: 4)")
    add("--victims", type=int, default=0, help="clients that are killed with it (default: 0)")
    add(
        "--objects", type=int, help="measure instead how long a store with so many takes to recover"
    )
    arguments = parser.parse_args()
    if arguments.objects is not None:
        sys.stdout.write(f"{measure(arguments.objects)}\n")
        return 0
    summary = run(arguments.times, arguments.clients, arguments.victims, progress=True)
    sys.stdout.write(f"{summary}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
