"""What many small objects cost the store: its resident memory for each, and the time of each operation.

A store is filled with objects of 100 bytes, to one number after the other.  At each number a round of puts, gets,
deletes and evictions is timed, by the object and in batches, so that the store's work shows and not the round trip.
The store's resident memory is what it takes beyond that of an empty store: its heap, and what it has touched of the
segment's table (129 bytes an object); the data is its clients'.  Run it as ``python -m benchmarks.many_objects``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from time import perf_counter

import psutil  # type: ignore[import-untyped]  # it ships no types

import shmplasma as plasma
from shmplasma import ObjectID, PlasmaClient

COUNTS = (10_000, 100_000, 1_000_000)
CAPACITY = "1GB"
OBJECT_BYTES = 100
SAMPLE = 5_000
BATCH = 500
ROUNDS = 5
SEED = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One number of objects: bytes an object, microseconds an object, and the longest pause of the store."""

    objects: int
    resident_bytes: float
    heap_bytes: float
    put_us: float
    get_us: float
    delete_us: float
    evict_us: float
    longest_ms: float


def timed(client: PlasmaClient, task: Callable[[], object]) -> float:
    """Return microseconds that a task takes, with all that it leaves to the store."""
    client.flush()
    begin = perf_counter()
    task()
    client.flush()
    return (perf_counter() - begin) * 1e6


def fill(client: PlasmaClient, count: int) -> list[ObjectID]:
    """Put so many objects."""
    data = bytes(OBJECT_BYTES)
    return [client.put_raw_buffer(data) for _ in range(count)]


def get(client: PlasmaClient, ids: Sequence[ObjectID]) -> None:
    """Get these objects one by one."""
    for object_id in ids:
        client.get_buffers([object_id])


def delete(client: PlasmaClient, ids: Sequence[ObjectID]) -> None:
    """Delete these objects in batches."""
    for at in range(0, len(ids), BATCH):
        client.delete(ids[at : at + BATCH])


def evict(client: PlasmaClient, count: int) -> None:
    """Evict so many objects in batches."""
    for _ in range(count // BATCH):
        freed = client.evict(BATCH * OBJECT_BYTES)
        assert freed == BATCH * OBJECT_BYTES


def rounds(
    client: PlasmaClient, ids: list[ObjectID]
) -> Iterator[tuple[float, float, float, float]]:
    """Time each operation on a sample of what is there; leave as many objects as there were."""
    rng = random.Random(SEED)
    for _ in range(ROUNDS):
        wanted = rng.sample(ids, SAMPLE)
        get_us = timed(client, partial(get, client, wanted))
        delete_us = timed(client, partial(delete, client, wanted))
        put_us = timed(client, partial(fill, client, SAMPLE))
        evict_us = timed(client, partial(evict, client, SAMPLE))
        fill(client, SAMPLE)
        ids[:] = client.list()
        yield put_us, get_us, delete_us, evict_us


def longest_pause(
    client: PlasmaClient, other: PlasmaClient, count: int
) -> tuple[list[ObjectID], float]:
    """Put so many objects, and return the longest that another client waited for an answer meanwhile."""
    ids: list[ObjectID] = []
    longest = 0.0
    for _ in range(count // SAMPLE):
        ids += fill(client, SAMPLE)
        begin = perf_counter()
        other.flush()
        longest = max(longest, perf_counter() - begin)
    client.flush()
    return ids, longest * 1e3


def measure(counts: Sequence[int]) -> Iterator[Row]:
    """Fill a store, and look at it whenever it has so many objects."""
    with plasma.Store(CAPACITY) as store, store.connect() as client, store.connect() as other:
        process = psutil.Process(store.process.pid)
        client.flush()
        empty = process.memory_info()
        ids: list[ObjectID] = []
        for count in counts:
            new, pause_ms = longest_pause(client, other, count - len(ids))
            ids += new
            now = process.memory_info()
            resident = (now.rss - empty.rss) / count
            heap = (now.rss - now.shared - empty.rss + empty.shared) / count
            times = zip(*rounds(client, ids), strict=True)
            put_us, get_us, delete_us, evict_us = (median(each) / SAMPLE for each in times)
            yield Row(
                count, resident, heap, put_us, get_us, delete_us, evict_us, longest_ms=pause_ms
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="numbers of objects")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(arguments)
    rows = []
    if not options.json:
        print(
            f"{'objects':>10}  {'RSS bytes':>9}  {'of it heap':>10}  {'put us':>7}  {'get us':>7}  "
            f"{'delete us':>9}  {'evict us':>8}  {'pause ms':>8}"
        )
    for row in measure(options.counts):
        rows.append(row)
        if not options.json:
            print(
                f"{row.objects:10,}  {row.resident_bytes:9.0f}  {row.heap_bytes:10.0f}  {row.put_us:7.2f}  "
                f"{row.get_us:7.2f}  {row.delete_us:9.2f}  {row.evict_us:8.2f}  {row.longest_ms:8.1f}"
            )
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
