"""What compaction does for a store's free room, and what it costs others.

The first part simulates an hour: objects of sizes from 1 KiB to 32 MiB, each power of two as likely as the next, come at
random times and are deleted after lifetimes of seconds to many minutes; the room is the store's own code on anonymous
memory, and when it is full, objects are evicted.  It is told twice: with the store's compaction, and with what a store without
it would have to do, which is to evict on until one extent is large enough.

The second part compacts a real store again and again while another process gets the same objects over and over.

Run it as ``python -m benchmarks.fragmentation``.
"""

from __future__ import annotations

import argparse
import heapq
import mmap
import multiprocessing
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from statistics import mean, median
from time import perf_counter, process_time, sleep
from typing import Final

import numpy as np

import shmplasma
from shmplasma.control import Control
from shmplasma.layout import Layout
from shmplasma.moves import Moves
from shmplasma.pins import Boards
from shmplasma.residents import Residents
from shmplasma.room import Room
from shmplasma.table import NO_ENTRY, Table

__all__ = ["Hour", "main", "measure", "simulate"]

SEED: Final = 1
CAPACITY: Final = 256 << 20
SECONDS: Final = 3600
ARRIVALS_A_SECOND: Final = 4.0
SMALLEST, LARGEST = 10, 25
"""Powers of two between which the sizes lie."""
SAMPLES_A_MINUTE: Final = 6


# -- an hour, simulated ----------------------------------------------------------------------------


class _Machine:
    """Memory that is there already, and no other process."""

    has_barrier = True

    def commit(self, offset: int, size_bytes: int) -> None:
        """Do nothing: the memory is there."""

    def punch(self, offset: int, size_bytes: int) -> bool:  # noqa: ARG002 - as a room expects it
        """Keep the memory."""
        return False

    def barrier(self) -> None:
        """Do nothing: nobody reads."""

    def lock(self, at: int) -> bool:  # noqa: ARG002 - as above
        """Nobody else creates anything."""
        return True

    def unlock(self) -> None:
        """Do nothing: nothing is locked."""


@dataclass(slots=True)
class Hour:
    """What an hour was like.

    Attributes
    ----------
    wholeness : list of float
        Largest free extent as a share of all free bytes, sampled.
    stored_bytes, evicted_bytes, moved_bytes : int
        What was put, what had to go before its time, and what was moved.
    evictions, compactions, refused : int
        How often.
    moving_seconds : float
        Processor time that the compactions took.
    slices : list of float
        Processor time of each slice.
    """

    wholeness: list[float] = field(default_factory=list)
    stored_bytes: int = 0
    evicted_bytes: int = 0
    moved_bytes: int = 0
    evictions: int = 0
    compactions: int = 0
    refused: int = 0
    moving_seconds: float = 0.0
    slices: list[float] = field(default_factory=list)


class _Yard:
    """A room with its table and boards, and nobody to talk to."""

    def __init__(self, capacity: int, hour: Hour, *, compacts: bool) -> None:
        layout = Layout.plan(capacity, 4096)
        raw = memoryview(mmap.mmap(-1, layout.segment_bytes))
        words = raw.cast("Q")
        machine = _Machine()
        self.hour = hour
        self.compacts = compacts
        self.sizes: dict[bytes, int] = {}
        self.table = Table(layout, words, raw, machine.commit)
        boards = Boards(layout, words, raw, Control(layout, words), machine.commit)
        visited = raw[layout.visited : layout.visited + layout.n_entries]
        moves = Moves(words, raw, self.table)
        residents = Residents(self.table, visited)
        self.room = Room(layout, words, self.table, boards, residents, machine, moves)

    def put(self, object_id: bytes, size: int) -> None:
        """Store an object, with whatever that takes."""
        offset = self._allocate(size)
        if offset is None:
            self.hour.refused += 1
            return
        entry = self.table.insert(object_id, 0, offset, size, 0, 0)
        self.table.seal(entry, 0)
        self.room.residents.sealed(entry)
        self.sizes[object_id] = size
        self.hour.stored_bytes += size

    def _allocate(self, size: int) -> int | None:
        room = self.room
        offset, evicted = room.allocate(size)
        self._note_evicted(evicted)
        if offset is None and self.compacts and room.compact(size):
            self._compact()
            offset, evicted = room.allocate(size)
            self._note_evicted(evicted)
        while offset is None and room.is_fragmented(size):
            evicted = room.evict(max(1, size // 16))[1]
            if not evicted:
                break
            self._note_evicted(evicted)
            offset = room.allocate(size)[0]
        return offset

    def _note_evicted(self, evicted: Sequence[bytes]) -> None:
        self.hour.evictions += len(evicted)
        self.hour.evicted_bytes += sum(self.sizes.pop(object_id) for object_id in evicted)

    def _compact(self) -> None:
        mover, hour = self.room.mover, self.hour
        hour.compactions += 1
        moved = mover.moved_bytes
        while mover.is_busy:
            begin = process_time()  # others may be using the machine
            evicted = self.room.advance()
            hour.slices.append(process_time() - begin)
            self._note_evicted(evicted)
        hour.moved_bytes += mover.moved_bytes - moved
        hour.moving_seconds = sum(hour.slices)

    def delete(self, object_id: bytes) -> None:
        """Delete an object if it is still there."""
        entry = self.table.find(object_id)
        if entry != NO_ENTRY:
            self.room.take([entry])
            del self.sizes[object_id]


def simulate(*, compacts: bool, seconds: int = SECONDS, capacity: int = CAPACITY) -> Hour:
    """Tell the story of an hour; the same objects come in each telling."""
    rng = random.Random(SEED)
    hour = Hour()
    yard = _Yard(capacity, hour, compacts=compacts)
    ends: list[tuple[float, bytes]] = []
    now = next_sample = 0.0
    number = 0
    while (now := now + rng.expovariate(ARRIVALS_A_SECOND)) < seconds:
        while ends and ends[0][0] <= now:
            yard.delete(heapq.heappop(ends)[1])
        number += 1
        object_id = number.to_bytes(20, "big")
        yard.put(object_id, int(2 ** rng.uniform(SMALLEST, LARGEST)))
        heapq.heappush(ends, (now + rng.expovariate(1 / rng.choice((5, 60, 900))), object_id))
        if now >= next_sample:
            next_sample += 60 / SAMPLES_A_MINUTE
            if yard.room.free_bytes:
                hour.wholeness.append(yard.room.largest_bytes / yard.room.free_bytes)
    return hour


# -- a real store ----------------------------------------------------------------------------------


def _read(path: str, ids: list[bytes], count: Synchronized[int], ready: Event, end: Event) -> None:
    """Get objects as fast as it goes, and count."""
    wanted = [shmplasma.ObjectID(each) for each in ids]
    with shmplasma.connect(path) as client:
        client.get_buffers(wanted)
        ready.set()
        while not end.is_set():
            for each in wanted:
                client.get_buffers([each])
            count.value += len(wanted)


_PIECE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Cost:
    """What compactions cost: medians over all of them."""

    seconds_a_gib: float
    moved_bytes: int
    gets_a_second_beside: float
    gets_a_second_without: float
    gets_a_second_beside_a_copy: float
    """While a process that is no store copies memory."""


def measure(capacity: int, size: int, rounds: int) -> Cost:
    """Compact a store again and again, and count what another process reads meanwhile."""
    context = multiprocessing.get_context("spawn")
    count = context.Value("q", 0, lock=False)
    ready, end = context.Event(), context.Event()
    costs: list[float] = []
    beside: list[float] = []
    without: list[float] = []
    beside_a_copy: list[float] = []
    source, target = (np.ones(capacity // 2, np.uint8) for _ in range(2))
    total = 0
    with shmplasma.Store(memory=capacity) as store, store.connect() as client:
        hot = [number.to_bytes(20, "big") for number in range(16)]
        for each in hot:
            client.create_and_seal(shmplasma.ObjectID(each), bytes(100))
        path = store.store_socket_name
        reader = context.Process(target=_read, args=(path, hot, count, ready, end))
        reader.start()
        ready.wait()
        for _ in range(rounds):
            ids: list[shmplasma.ObjectID] = []
            for _ in range((capacity - (1 << 20)) // size):
                ids.append(shmplasma.ObjectID.from_random())
                client.create_and_seal(ids[-1], bytes(size))
            client.delete(ids[1::2])
            before = _moved(client)
            seen, begin = count.value, perf_counter()
            sleep(0.3)
            without.append((count.value - seen) / (perf_counter() - begin))
            large = shmplasma.ObjectID.from_random()
            seen, begin = count.value, perf_counter()
            buffer = client.create(large, capacity * 45 // 100)
            elapsed = perf_counter() - begin
            beside.append((count.value - seen) / elapsed)
            seen, begin = count.value, perf_counter()
            while perf_counter() < begin + elapsed:
                for at in range(0, len(source), _PIECE):
                    target[at : at + _PIECE] = source[at : at + _PIECE]
            beside_a_copy.append((count.value - seen) / (perf_counter() - begin))
            del buffer
            client.abort(large)
            moved = _moved(client) - before
            total += moved
            costs.append(elapsed / moved * 2**30)
            client.delete(ids)
        end.set()
        reader.join()
    return Cost(median(costs), total, median(beside), median(without), median(beside_a_copy))


def _moved(client: shmplasma.PlasmaClient) -> int:
    lines = client.debug_string().splitlines()
    return int(next(line for line in lines if line.startswith("moved bytes: ")).split()[-1])


# -- showing ---------------------------------------------------------------------------------------


def _describe(hour: Hour) -> str:
    share = sorted(hour.wholeness)
    return (
        f"{mean(share):.0%} | {share[len(share) // 20]:.0%} | {hour.stored_bytes / 2**30:.1f} | "
        f"{hour.evictions:,} | {hour.evicted_bytes / 2**30:.2f} | {hour.moved_bytes / 2**30:.2f} | "
        f"{hour.refused}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was measured, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=SECONDS, help="simulated (default: 3600)")
    parser.add_argument("--rounds", type=int, default=5, help="of the real store (default: 5)")
    parser.add_argument("--capacity", type=int, default=64 << 20, help="of the real store, bytes")
    options = parser.parse_args(arguments)
    print(
        "|  | largest of free, mean | worst 5 % | GiB put | evictions | GiB evicted | GiB moved | refused |"
    )
    print("| --- " + "| ---: " * 7 + "|")
    compacted = simulate(compacts=True, seconds=options.seconds)
    print(f"| with compaction | {_describe(compacted)} |")
    other = simulate(compacts=False, seconds=options.seconds)
    print(f"| without compaction | {_describe(other)} |")
    slices = sorted(compacted.slices)
    print(
        f"\nsimulated: {compacted.compactions} compactions, "
        f"{compacted.moving_seconds / compacted.moved_bytes * 2**30:.2f} s a moved GiB; slices: median "
        f"{1000 * median(slices):.2f} ms, p99 {1000 * slices[len(slices) * 99 // 100]:.2f} ms, longest "
        f"{1000 * slices[-1]:.2f} ms"
    )
    print(
        "\n| objects of | s a moved GiB | hot gets a second beside it | without it | share | beside a process that copies | share |"
    )
    print("| ---: " * 7 + "|")
    for size in (4 << 10, 64 << 10, 1 << 20):
        cost = measure(options.capacity, size, options.rounds)
        beside, without = cost.gets_a_second_beside, cost.gets_a_second_without
        beside_a_copy = cost.gets_a_second_beside_a_copy
        print(
            f"| {size >> 10} KiB | {cost.seconds_a_gib:.2f} | {beside:,.0f} | {without:,.0f} | {beside / without:.2f} | "
            f"{beside_a_copy:,.0f} | {beside / beside_a_copy:.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
