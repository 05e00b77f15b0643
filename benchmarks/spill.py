"""Time a store that spills: clients put four times what fits, and read it back, each byte compared.

Beside it, in the same run and by as many processes: plain writes, and reads, of files of the same sizes in the same directory;
and the rate of hot gets of one more client: alone, beside the plain files, beside the store.  Run it as ``python -m benchmarks.spill``;
``--gets 100000`` is the full measure.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import shmplasma
from shmplasma import ObjectID, Store
from shmplasma.sizes import parse_size

MIN_BYTES, MAX_BYTES = 1 << 16, 4 << 20
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
    """

    number: int
    sizes: list[int]
    gets: int

    def object_id(self, index: int) -> ObjectID:
        """Return the id of one of its objects."""
        return ObjectID(self.number.to_bytes(10, "big") + index.to_bytes(10, "big"))

    def content(self, index: int) -> memoryview:
        """Return the data of one of its objects."""
        start = (self.number * 7919 + index * 104_729) % (1 << 16)
        return memoryview(_POOL)[start : start + self.sizes[index]]


def shares(n_clients: int, total_bytes: int, gets: int) -> list[Share]:
    """Return what each client does; sizes are spread evenly over their logarithms."""
    rng = random.Random(2)
    sizes: list[list[int]] = [[] for _ in range(n_clients)]
    at = 0
    while total_bytes > 0:
        size = round(MIN_BYTES * (MAX_BYTES / MIN_BYTES) ** rng.random())
        sizes[at % n_clients].append(size)
        total_bytes -= size
        at += 1
    return [Share(number, own, gets // n_clients) for number, own in enumerate(sizes)]


def put_and_get(path: str, share: Share, start: Barrier, results: Any) -> None:
    """Put all objects of a share, and get some of them, in phases that all clients begin together."""
    rng = random.Random(share.number)
    with shmplasma.connect(path) as client:
        start.wait()
        began = time.perf_counter()
        for index, size in enumerate(share.sizes):
            client.create_and_seal(share.object_id(index), share.content(index), b"%d" % size)
        wrote = time.perf_counter() - began
        start.wait()
        began = time.perf_counter()
        n_bytes = 0
        for at in range(share.gets):
            # Each of them once, and then whichever.
            index = at if at < len(share.sizes) else rng.randrange(len(share.sizes))
            ((metadata, data),) = client.get_buffers([share.object_id(index)], with_meta=True)
            same = memoryview(data).cast("B") == share.content(index)
            if not same or int(metadata) != len(data):
                raise AssertionError(f"object {index} of client {share.number} has changed")
            n_bytes += len(data)
        results.put((wrote, time.perf_counter() - began, n_bytes))


def write_and_read(directory: str, share: Share, start: Barrier, results: Any) -> None:
    """Write files of the sizes of a share, and read them, without any store."""
    start.wait()
    began = time.perf_counter()
    for index in range(len(share.sizes)):
        with open(f"{directory}/{share.number}-{index}", "wb", buffering=0) as file:
            file.write(share.content(index))
    wrote = time.perf_counter() - began
    start.wait()
    began = time.perf_counter()
    n_bytes = 0
    for at in range(share.gets):
        index = at % len(share.sizes)
        with open(f"{directory}/{share.number}-{index}", "rb", buffering=0) as file:
            data = file.read()
        if data != share.content(index):
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
    parser.add_argument("--directory", help="on the disk to be measured (default: temporary files)")
    parser.add_argument("--uri", help="another external store, beside the same files")
    options = parser.parse_args(arguments)
    parts = shares(options.clients, 4 * options.capacity, options.gets)
    total = sum(sum(part.sizes) for part in parts)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        uri = options.uri or Path(directory).as_uri()
        plain = Path(directory, "plain")
        plain.mkdir()
        with Store(options.capacity, external_store=uri) as store:
            path = store.store_socket_name
            ready, stop, results = _SPAWN.Event(), _SPAWN.Event(), _SPAWN.Queue()
            hot = _SPAWN.Process(target=get_hot, args=(path, ready, stop, results))
            hot.start()
            ready.wait()
            time.sleep(2)  # it is measured alone
            plain_began = time.time()
            try:
                plain_wrote, plain_read, plain_bytes = run_all(
                    partial(write_and_read, str(plain)), parts
                )
                began = time.time()
                wrote, read, n_bytes = run_all(partial(put_and_get, path), parts)
            finally:
                stop.set()
            ended = time.time()
            rates = results.get()
            hot.join()
            with store.connect() as client:
                figures = client.debug_string()
    alone, with_plain, with_others = (
        sum(window) / len(window)
        for window in (
            [rate for at, rate in rates if at < plain_began],
            [rate for at, rate in rates if plain_began < at < began],
            [rate for at, rate in rates if began < at < ended],
        )
    )
    n_objects = sum(len(part.sizes) for part in parts)
    print(
        f"{n_objects} objects, {total / 1e9:.2f} GB, {len(parts)} clients, capacity {options.capacity / 1e9:.2f} GB"
    )
    print("| | spilling store, MB/s | plain files, MB/s | ratio |")
    print("| --- | ---: | ---: | ---: |")
    for what, bytes_, seconds, plain_bytes_, plain_seconds in (
        ("put 4x the capacity", total, wrote, total, plain_wrote),
        ("get and compare", n_bytes, read, plain_bytes, plain_read),
    ):
        rate, plain_rate = bytes_ / seconds / 1e6, plain_bytes_ / plain_seconds / 1e6
        print(f"| {what} | {rate:,.0f} | {plain_rate:,.0f} | {rate / plain_rate:.2f} |")
    print(
        f"\n{options.gets} gets, every byte the same.  Hot gets of {N_HOT} objects by one more client: {alone:,.0f}/s alone, "
        f"{with_plain:,.0f}/s beside the processes that use plain files, {with_others:,.0f}/s beside those that "
        f"use the store ({with_others / with_plain:.2f} of that)."
    )
    print(
        "\n".join(
            line
            for line in figures.splitlines()
            if "spilled" in line or "written out" in line or "brought back" in line
        )
    )


if __name__ == "__main__":
    main()
