"""Time a store that spills: clients put four times what fits, and read it back, each byte compared.

Beside it, in the same run: plain writes, and reads, of files of the same sizes in the same directory, by one process as `dd`
does it, and by as many as there are clients; in rounds, of which the medians are given.  Then the rate of hot gets of one more client: alone, beside the plain files, which
is what the machine itself costs it, and beside the store.  Run it as ``python -m benchmarks.spill``; ``--gets 100000`` is the full measure.
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
        began = time.perf_counter()
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
        results.put((wrote, time.perf_counter() - began, n_bytes))


def write_and_read(directory: str, share: Share, start: Barrier, results: Any) -> None:
    """Write files of the sizes of a share, and read them, without any store."""
    rng = random.Random(share.number)
    start.wait()
    began = time.perf_counter()
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
    results.put((wrote, time.perf_counter() - began, n_bytes))


def run_all(
    work: Callable[[Share, Barrier, Any], None], parts: Sequence[Share]
) -> tuple[float, float, int]:
    """Have each part worked by a process; return seconds of writing and of reading, and bytes read."""
    start, results = _SPAWN.Barrier(len(parts)), _SPAWN.Queue()
    workers = [_SPAWN.Process(target=work, args=(part, start, results)) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            start.abort()  # the others do not wait for it
            raise SystemExit(f"a process has failed with {worker.exitcode}")
    wrote, read, n_bytes = zip(*(results.get() for _ in parts), strict=True)
    return max(wrote), max(read), sum(n_bytes)


def get_hot(path: str, ready: Event, stop: Event, results: Any) -> None:
    """Get a few small objects again and again; report the gets of each tenth of a second."""
    rates: list[tuple[float, int]] = []
    with shmplasma.connect(path) as client:
        ids = [client.put_raw_buffer(os.urandom(1000)) for _ in range(N_HOT)]
        ready.set()
        while not stop.is_set():
            count, end = 0, time.perf_counter() + 0.1
            while time.perf_counter() < end:
                client.get_buffers(ids)
                count += 1
            rates.append((time.time(), count * 10))
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
    puts: list[tuple[float, float, float]] = []
    gets: list[tuple[float, float, float]] = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            dd_wrote, dd_read, n_dd_bytes = run_all(partial(write_and_read, directory), alone)
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            plain_wrote, plain_read, n_bytes = run_all(partial(write_and_read, directory), parts)
        with (
            tempfile.TemporaryDirectory(dir=options.directory) as directory,
            Store(
                options.capacity, external_store=options.uri or Path(directory).as_uri()
            ) as store,
        ):
            wrote, read, _ = run_all(partial(put_and_get, store.store_socket_name), parts)
        puts.append((total / wrote / 1e6, total / dd_wrote / 1e6, total / plain_wrote / 1e6))
        gets.append((n_bytes / read / 1e6, n_dd_bytes / dd_read / 1e6, n_bytes / plain_read / 1e6))
    n_objects = sum(len(part.sizes) for part in parts)
    print(
        f"{n_objects} objects of {options.least} to {options.most} bytes, {total / 1e9:.2f} GB, {len(parts)} clients, "
        f"capacity {options.capacity / 1e9:.2f} GB; medians of {options.rounds} rounds"
    )
    print(
        f"| MB/s | spilling store | files, one process | files, {len(parts)} processes | of the one, in each round | of the {len(parts)} |"
    )
    print("| --- | ---: | ---: | ---: | --- | --- |")
    for what, rates in (("put 4x the capacity", puts), ("get and compare", gets)):
        ours, dd, plain = (statistics.median(each) for each in zip(*rates, strict=True))
        of_one = ", ".join(f"{rate[0] / rate[1]:.2f}" for rate in rates)
        of_all = ", ".join(f"{rate[0] / rate[2]:.2f}" for rate in rates)
        print(f"| {what} | {ours:,.0f} | {dd:,.0f} | {plain:,.0f} | {of_one} | {of_all} |")
    print(f"\n{options.rounds} times {options.gets} gets, every byte the same.")
    hot_gets(options, parts)


def hot_gets(options: argparse.Namespace, parts: Sequence[Share]) -> None:
    """Print the rate of hot gets: alone, beside plain files, and beside clients whose objects are spilled."""
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        plain = Path(directory, "plain")
        plain.mkdir()
        with Store(
            options.capacity, external_store=options.uri or Path(directory).as_uri()
        ) as store:
            path = store.store_socket_name
            ready, stop, results = _SPAWN.Event(), _SPAWN.Event(), _SPAWN.Queue()
            hot = _SPAWN.Process(target=get_hot, args=(path, ready, stop, results))
            hot.start()
            ready.wait()
            time.sleep(2)  # it is measured alone
            plain_began = time.time()
            try:
                run_all(partial(write_and_read, str(plain)), parts)
                began = time.time()
                run_all(partial(put_and_get, path), parts)
            finally:
                stop.set()
            ended = time.time()
            rates = results.get()
            hot.join()
    alone, with_plain, with_others = (
        statistics.mean(rate for at, rate in rates if first < at < last)
        for first, last in ((0.0, plain_began), (plain_began, began), (began, ended))
    )
    print(
        f"Hot gets of {N_HOT} objects by one more client: {alone:,.0f}/s alone, {with_plain:,.0f}/s beside the processes "
        f"that use plain files, {with_others:,.0f}/s beside those that use the store ({with_others / with_plain:.2f} of that)."
    )


if __name__ == "__main__":
    main()
