"""Throughput of large objects on huge pages, beside pages of 4 KiB.

One client puts an array and reads all of it, again and again, in a store on POSIX shared memory and in one on a
hugetlbfs.  *First* is the first time, in which a page has to be mapped for each write and read; *again* is the median of those
after it.  Needs a directory on a hugetlbfs with room for the largest object (see ``docs/operations.md``).  Run it as
``python -m benchmarks.huge_pages /mnt/hugepages``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter

import numpy as np

import shmplasma as plasma
from shmplasma import system

SIZES_MIB = (64, 128, 256, 512)
TIMES = 9


@dataclass(frozen=True, slots=True)
class Row:
    """One size on one kind of page: GB/s."""

    page_bytes: int
    object_mib: int
    first_put: float
    first_get: float
    put: float
    get: float


def measure(directory: str | None, size_mib: int) -> Row:
    """Put and get arrays of this size in a store of their own."""
    size = size_mib << 20
    value = np.arange(size // 8)
    puts: list[float] = []
    gets: list[float] = []
    with (
        plasma.Store(
            size + (1 << 20), directory=directory, huge_pages=directory is not None
        ) as store,
        store.connect() as client,
    ):
        for _ in range(TIMES):
            begin = perf_counter()
            object_id = client.put(value)
            put = perf_counter()
            found = client.get(object_id)
            total = int(found.sum())
            puts.append(size / (put - begin) / 1e9)
            gets.append(size / (perf_counter() - put) / 1e9)
            assert total == (size // 8) * (size // 8 - 1) // 2
            del found
            client.delete([object_id])
    page = None if directory is None else system.huge_page_bytes(directory)
    return Row(page or 4096, size_mib, puts[0], gets[0], median(puts[1:]), median(gets[1:]))


def rows(directory: str, sizes_mib: Sequence[int]) -> Iterator[Row]:
    """Measure all sizes on both kinds of pages."""
    for size_mib in sizes_mib:
        yield measure(None, size_mib)
        yield measure(directory, size_mib)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", help="on a hugetlbfs")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES_MIB, help="MiB")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(arguments)
    if options.json:
        print(json.dumps([asdict(row) for row in rows(options.directory, options.sizes)], indent=2))
        return
    print("GB/s")
    print(f"{'page':>8}  {'MiB':>5}  {'first put':>9}  {'first get':>9}  {'put':>6}  {'get':>6}")
    for row in rows(options.directory, options.sizes):
        print(
            f"{row.page_bytes >> 10:5} KiB  {row.object_mib:5}  {row.first_put:9.1f}  "
            f"{row.first_get:9.1f}  {row.put:6.1f}  {row.get:6.1f}"
        )


if __name__ == "__main__":
    main()
