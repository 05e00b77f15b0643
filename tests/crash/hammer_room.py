"""Large objects in a store that is full all the time of small ones, some of which are held: whatever is not held goes or is moved for them.

Some processes create large objects, and wait for room briefly, for a while, or not at all; others put small ones and hold a few.  Each looks whether
all bytes of what it holds are what they must be, when it lets go of it.  What the store has moved meanwhile is counted.  Run it by hand for as long as
you like; with ``--kill`` the store is killed again and again, and another one takes its place::

    python -m tests.crash.hammer_room --seconds 60
    python -m tests.crash.hammer_room --seconds 60 --kill
"""

from __future__ import annotations

import random
import sys
from collections import Counter, deque
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import TYPE_CHECKING, Final

import numpy as np

import shmplasma
from shmplasma import PlasmaStoreFull
from shmplasma.objects import ObjectID
from tests.crash.hammer import Member, hammer, new_parser, report

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["run"]

_LARGE: Final = (300_000, 800_000, 2_000_000)
_SMALL: Final = (8, 80, 800, 8000, 48_000)
_WAITS_MS: Final = (0, 50, 1000)
_LARGE_HELD: Final = 1
_SMALL_HELD: Final = 20
_SEALED_OF: Final = 0.8
_HELD_OF: Final = 0.1
_MOVES: Final = "moves: "


def content_of(number: int, size: int) -> bytes:
    """Return what must be in an object."""
    return np.full(size // 8, number, np.uint64).tobytes()


def create_large(path: str, stop: Event, said: Connection, number: int) -> None:
    """Create large objects, seal or abort them, and hold some for a while; tell at the end how many objects the store has moved."""
    counts: Counter[str] = Counter()
    chance = random.Random(number)
    held: deque[tuple[bytes, pa.Buffer]] = deque()
    with said, shmplasma.connect(path) as client:
        said.send("ready")
        while not stop.is_set():
            object_id, size = ObjectID.from_random(), chance.choice(_LARGE)
            try:
                buffer = client.create(object_id, size, timeout_ms=chance.choice(_WAITS_MS))
            except PlasmaStoreFull:
                counts["refused, large"] += 1
                buffer = None
            if buffer is not None:
                content = content_of(number, size)
                memoryview(buffer).cast("B")[:] = content
                if chance.random() < _SEALED_OF:
                    client.seal(object_id)
                    counts["sealed, large"] += 1
                    held.append((content, buffer))
                else:
                    client.abort(object_id)
                del buffer
            while len(held) > _LARGE_HELD or (held and chance.random() < 0.5):
                content, buffer = held.popleft()
                counts["wrong"] += buffer.to_pybytes() != content
                del buffer
        lines = client.debug_string().splitlines()
        moves = next(line for line in lines if line.startswith(_MOVES))
        counts["moved"] = int(moves.removeprefix(_MOVES))
        said.send(counts)


def put_small(path: str, stop: Event, said: Connection, number: int) -> None:
    """Put small objects, and hold some for a while."""
    counts: Counter[str] = Counter()
    chance = random.Random(number)
    held: list[tuple[bytes, pa.Buffer]] = []
    with said, shmplasma.connect(path) as client:
        said.send("ready")
        while not stop.is_set():
            content = content_of(number, chance.choice(_SMALL))
            try:
                object_id = client.put_raw_buffer(content)
            except PlasmaStoreFull:  # somebody has waited for long enough while others were served
                counts["refused, small"] += 1
                continue
            counts["put, small"] += 1
            if chance.random() < _HELD_OF:
                (buffer,) = client.get_buffers([object_id], timeout_ms=0)
                if buffer is not None:
                    held.append((content, buffer))
                del buffer
            if len(held) > _SMALL_HELD:
                content, buffer = held.pop(chance.randrange(len(held)))
                counts["wrong"] += buffer.to_pybytes() != content
                del buffer
        while held:
            content, buffer = held.pop()
            counts["wrong"] += buffer.to_pybytes() != content
            del buffer
        said.send(counts)


def run(seconds: float, *, kill: bool = False) -> Counter[str]:
    """Create and put for so long, and return what was seen."""
    members: list[Member] = [
        *((create_large, (number,)) for number in (1, 2)),
        *((put_small, (number,)) for number in (3, 4)),
    ]
    return hammer(members, seconds, kill=kill)


def main() -> int:
    """Run as the command line says; 1 if a byte was wrong."""
    arguments = new_parser(__doc__).parse_args()
    counts = run(arguments.seconds, kill=arguments.kill)
    return report(counts, "wrong")


if __name__ == "__main__":
    sys.exit(main())
