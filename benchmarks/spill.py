"""Time a store that spills: clients put four times what fits, and read it back, each byte compared.

Beside it, in the same run: plain writes, and reads, of files of the same sizes in the same directory, by one process as `dd`
does it, and by as many as there are clients; in rounds, of which the medians are given.  Then the rate of hot gets of one more client: alone, beside the processes
that use plain files, beside the clients when all that they put fits, and beside the clients when it is spilled.
Run it as ``python -m benchmarks.spill``; ``--gets 100000`` is the full measure.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import pyarrow as pa

import shmplasma
from shmplasma import ObjectID, Store
from shmplasma.sizes import parse_size

MAX_BYTES = 4 << 20
N_HOT = 16
HOT_SECONDS = 0.02
"""How often it is noted how many hot gets there were."""
_SPAWN = multiprocessing.get_context("spawn")
_POOL = random.Random(1).randbytes(MAX_BYTES + (1 << 16))


@dataclass(frozen=True, slots=True)
class Share:
    """What one client does.

    Attributes
    ----------
    number : int
        Which client it is.
    sizes : list of int
        Of its objects, in bytes.
    gets : int
        How many it reads.
    disk : bool
        Whether what is written has to be on the disk, and is read from there.
    """

    number: int
    sizes: list[int]
    gets: int
    disk: bool

    def wrote(self) -> None:
        """Wait until all that was written, by whomever, is on the disk."""
        if self.disk:
            os.sync()

    def before_reading(self) -> None:
        """Have the system forget what it has read and written."""
        if self.disk:
            Path("/proc/sys/vm/drop_caches").write_text("1")

    def object_id(self, index: int) -> ObjectID:
        """Return the id of one of its objects."""
        return ObjectID(self.number.to_bytes(10, "big") + index.to_bytes(10, "big"))

    def content(self, index: int) -> memoryview:
        """Return the data of one of its objects."""
        start = (self.number * 7919 + index * 104_729) % (1 << 16)
        return memoryview(_POOL)[start : start + self.sizes[index]]


@dataclass(frozen=True, slots=True)
class Run:
    """What one process, or all of them, did.

    Attributes
    ----------
    wrote, read : float
        Seconds of writing and of reading; of all, those of the slowest.
    n_bytes : int
        Read.
    first, last : float
        When it began and ended, in seconds since 1970; of all, when each of them was at it.
    """

    wrote: float
    read: float
    n_bytes: int
    first: float
    last: float


def shares(
    n_clients: int,
    total_bytes: int,
    gets: int,
    least: int = 1 << 16,
    most: int = MAX_BYTES,
    *,
    disk: bool = False,
) -> list[Share]:
    """Return what each client does; sizes are spread evenly over their logarithms."""
    rng = random.Random(2)
    sizes: list[list[int]] = [[] for _ in range(n_clients)]
    at = 0
    while total_bytes > 0:
        size = round(least * (most / least) ** rng.random())
        sizes[at % n_clients].append(size)
        total_bytes -= size
        at += 1
    return [Share(number, own, gets // n_clients, disk) for number, own in enumerate(sizes)]


def same(data: Any, expected: memoryview) -> bool:
    """Compare bytes, as fast as memory allows."""
    return bool(pa.py_buffer(data).equals(pa.py_buffer(expected)))


def put_and_get(path: str, share: Share, start: Barrier, results: Any) -> None:
    """Put all objects of a share, and get some of them, in phases that all clients begin together."""
    rng = random.Random(share.number)
    with shmplasma.connect(path) as client:
        start.wait()
        first, began = time.time(), time.perf_counter()
        for index, size in enumerate(share.sizes):
            client.create_and_seal(share.object_id(index), share.content(index), b"%d" % size)
        share.wrote()
        wrote = time.perf_counter() - began
        share.before_reading()
        start.wait()
        began = time.perf_counter()
        n_bytes = 0
        for at in range(share.gets):
            # Each of them once, and then whichever.
            index = at if at < len(share.sizes) else rng.randrange(len(share.sizes))
            ((metadata, data),) = client.get_buffers([share.object_id(index)], with_meta=True)
            if not same(data, share.content(index)) or int(metadata) != len(data):
                raise AssertionError(f"object {index} of client {share.number} has changed")
            n_bytes += len(data)
        results.put(Run(wrote, time.perf_counter() - began, n_bytes, first, time.time()))


def write_and_read(directory: str, share: Share, start: Barrier, results: Any) -> None:
    """Write files of the sizes of a share, and read them, without any store."""
    rng = random.Random(share.number)
    start.wait()
    first, began = time.time(), time.perf_counter()
    for index in range(len(share.sizes)):
        with open(f"{directory}/{share.number}-{index}", "wb", buffering=0) as file:
            file.write(share.content(index))
    share.wrote()
    wrote = time.perf_counter() - began
    share.before_reading()
    start.wait()
    began = time.perf_counter()
    n_bytes = 0
    for at in range(share.gets):
        index = at if at < len(share.sizes) else rng.randrange(len(share.sizes))
        with open(f"{directory}/{share.number}-{index}", "rb", buffering=0) as file:
            data = file.read()
        if not same(data, share.content(index)):
            raise AssertionError(f"file {index} of process {share.number} has changed")
        n_bytes += len(data)
    results.put(Run(wrote, time.perf_counter() - began, n_bytes, first, time.time()))


def run_all(work: Callable[[Share, Barrier, Any], None], parts: Sequence[Share]) -> Run:
    """Have each part worked by a process."""
    start, results = _SPAWN.Barrier(len(parts)), _SPAWN.Queue()
    workers = [_SPAWN.Process(target=work, args=(part, start, results)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            start.abort()  # the others do not wait for it
            raise SystemExit(f"a process has failed with {worker.exitcode}")
    runs: list[Run] = [results.get() for _ in parts]
    return Run(
        max(run.wrote for run in runs),
        max(run.read for run in runs),
        sum(run.n_bytes for run in runs),
        max(run.first for run in runs),
        min(run.last for run in runs),
    )


def get_hot(path: str, ready: Event, stop: Event, results: Any) -> None:
    """Get a few small objects again and again; report the rates and when they were."""
    rates: list[tuple[float, float]] = []
    with shmplasma.connect(path) as client:
        ids = [client.put_raw_buffer(os.urandom(1000)) for _ in range(N_HOT)]
        ready.set()
        while not stop.is_set():
            count, end = 0, time.perf_counter() + HOT_SECONDS
            while time.perf_counter() < end:
                client.get_buffers(ids)
                count += 1
            rates.append((time.time(), count / HOT_SECONDS))
    results.put(rates)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see ``--help``."""
    parser = argparse.ArgumentParser(prog="benchmarks.spill", description=__doc__)
    parser.add_argument("--capacity", type=parse_size, default=parse_size("256MB"))
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--gets", type=int, default=2000, help="of all clients together")
    parser.add_argument("--least", type=parse_size, default=1 << 16, help="of an object's size")
    parser.add_argument("--most", type=parse_size, default=MAX_BYTES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", help="on the disk to be measured (default: temporary files)")
    parser.add_argument("--uri", help="another external store, beside the same files")
    parser.add_argument(
        "--disk",
        action="store_true",
        help="writes count until they are on the disk, and reads come from there (as root)",
    )
    options = parser.parse_args(arguments)
    sizes = options.least, options.most
    parts = shares(options.clients, 4 * options.capacity, options.gets, *sizes, disk=options.disk)
    total = sum(sum(part.sizes) for part in parts)
    every = [size for part in parts for size in part.sizes]
    alone = [Share(0, every, options.gets, options.disk)]
    runs: list[tuple[Run, Run, Run]] = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            dd = run_all(partial(write_and_read, directory), alone)
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            plain = run_all(partial(write_and_read, directory), parts)
        with (
            tempfile.TemporaryDirectory(dir=options.directory) as directory,
            Store(
                options.capacity, external_store=options.uri or Path(directory).as_uri()
            ) as store,
        ):
            ours = run_all(partial(put_and_get, store.store_socket_name), parts)
        runs.append((ours, dd, plain))
    n_objects = sum(len(part.sizes) for part in parts)
    print(
        f"{n_objects} objects of {options.least} to {options.most} bytes, {total / 1e9:.2f} GB, {len(parts)} clients, "
        f"capacity {options.capacity / 1e9:.2f} GB; medians of {options.rounds} rounds"
    )
    print(
        f"| MB/s | spilling store | files, one process | files, {len(parts)} processes | of the one, in each round | of the {len(parts)} |"
    )
    print("| --- | ---: | ---: | ---: | --- | --- |")
    puts = [[total / run.wrote / 1e6 for run in each] for each in runs]
    gets = [[run.n_bytes / run.read / 1e6 for run in each] for each in runs]
    for what, rates in (("put 4x the capacity", puts), ("get and compare", gets)):
        medians = (statistics.median(each) for each in zip(*rates, strict=True))
        of_one = ", ".join(f"{rate[0] / rate[1]:.2f}" for rate in rates)
        of_all = ", ".join(f"{rate[0] / rate[2]:.2f}" for rate in rates)
        print(
            f"| {what} | {' | '.join(f'{median:,.0f}' for median in medians)} | {of_one} | {of_all} |"
        )
    print(f"\n{options.rounds} times {options.gets} gets, every byte the same.")
    hot_gets(options, parts)


def hot_gets(options: argparse.Namespace, parts: Sequence[Share]) -> None:
    """Print the rate of hot gets beside what others do."""
    rates: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        with ExitStack() as stack:
            files = stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory))
            spilled = stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory))
            spilling = stack.enter_context(
                Store(options.capacity, external_store=options.uri or Path(spilled).as_uri())
            )
            roomy = stack.enter_context(Store(6 * options.capacity))
            cases: dict[str, tuple[Store, Callable[[], Run]]] = {
                "nothing": (spilling, _rest),
                "processes that use files": (
                    spilling,
                    partial(run_all, partial(write_and_read, files), parts),
                ),
                "clients, all fits": (
                    roomy,
                    partial(run_all, partial(put_and_get, roomy.store_socket_name), parts),
                ),
                "clients, it is spilled": (
                    spilling,
                    partial(run_all, partial(put_and_get, spilling.store_socket_name), parts),
                ),
            }
            for case, (store, others) in cases.items():
                rates.setdefault(case, []).append(_hot_rate(store, others))
    print(f"\n| one client gets {N_HOT} hot objects beside | gets/s | in each round |")
    print("| --- | ---: | --- |")
    for case, each in rates.items():
        in_each = ", ".join(f"{rate:,.0f}" for rate in each)
        print(f"| {case} | {statistics.median(each):,.0f} | {in_each} |")


def _rest() -> Run:
    first = time.time()
    time.sleep(2)
    return Run(0, 0, 0, first, time.time())


def _hot_rate(store: Store, others: Callable[[], Run]) -> float:
    """Return how many hot gets one client makes a second, while others are at their work."""
    ready, stop, results = _SPAWN.Event(), _SPAWN.Event(), _SPAWN.Queue()
    hot = _SPAWN.Process(target=get_hot, args=(store.store_socket_name, ready, stop, results))
    hot.start()
    ready.wait()
    try:
        run = others()
    finally:
        stop.set()
    rates: list[tuple[float, float]] = results.get()
    hot.join()
    return statistics.mean(rate for at, rate in rates if run.first + HOT_SECONDS < at < run.last)


if __name__ == "__main__":
    main()
