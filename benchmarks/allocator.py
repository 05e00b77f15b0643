"""Time the allocator in a fragmented region: how long do one free and one allocation take?

A region is filled with N extents of random size (64 bytes to 64 KiB, log-uniform) and aged: random
ones are freed and others of random size allocated, twice as often as there are extents.  Then pairs
of free and allocate are timed one by one.  Run it as ``python -m benchmarks.allocator``.
"""

from __future__ import annotations

import argparse
import json
import random
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from time import perf_counter_ns

from shmplasma.allocator import Allocator

LIVE_EXTENTS = (1_000, 100_000, 1_000_000)
PAIRS = 50_000
SEED = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: microseconds for a pair of free and allocate."""

    live_extents: int
    free_extents: int
    median_us: float
    p99_us: float


def random_size(rng: random.Random) -> int:
    """Return a size from 64 bytes to 64 KiB, each power of two as likely as the next."""
    return int(2 ** rng.uniform(6, 16))


def measure(live_extents: int, rng: random.Random) -> Row:
    """Build an aged region of so many used extents and time pairs in it."""
    allocator = Allocator(0, live_extents * 65536)
    sizes = array("Q", (random_size(rng) for _ in range(live_extents)))
    offsets = array("Q")
    for size in sizes:
        offset = allocator.allocate(size)
        assert offset is not None, "the region holds as many extents of the largest size"
        offsets.append(offset)

    def exchange() -> int:
        victim, size = rng.randrange(live_extents), random_size(rng)
        old_offset, old_size = offsets[victim], sizes[victim]
        begin = perf_counter_ns()
        allocator.free(old_offset, old_size)
        offset = allocator.allocate(size)
        elapsed = perf_counter_ns() - begin
        assert offset is not None, "fragments have eaten what is mostly empty"
        offsets[victim], sizes[victim] = offset, size
        return elapsed

    for _ in range(2 * live_extents):
        exchange()
    times = [exchange() / 1000 for _ in range(PAIRS)]
    free_extents = sum(1 for _ in allocator.free_extents())
    return Row(
        live_extents, free_extents, round(median(times), 2), round(quantiles(times, n=100)[-1], 2)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(arguments)
    rows = [measure(live_extents, random.Random(SEED)) for live_extents in LIVE_EXTENTS]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    print(f"{'live extents':>12}  {'free extents':>12}  {'median us':>9}  {'p99 us':>9}")
    for row in rows:
        counts = f"{row.live_extents:12,}  {row.free_extents:12,}"
        print(f"{counts}  {row.median_us:9.2f}  {row.p99_us:9.2f}")


if __name__ == "__main__":
    main()
