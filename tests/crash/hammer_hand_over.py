"""Objects that go from process to process, each put for somebody who waits for it, in a store that is full all the time.

The processes stand in rings.  Each waits for its object, looks whether all its bytes are what they must be, puts the next one, and looks
once more when it lets go of what it has had, some objects later.  Others fill the store meanwhile, so that whatever nobody holds goes at
once and its memory is used anew.  Run it by hand for as long as you like; with ``--kill`` the store is killed again and again, and another
one takes its place::

    python -m tests.crash.hammer_hand_over --seconds 60
    python -m tests.crash.hammer_hand_over --seconds 60 --kill
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
from shmplasma.hinting import Hints
from shmplasma.objects import ObjectID
from shmplasma.pinning import Located
from tests.crash.hammer import Member, hammer, new_parser, report

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["run"]

_SIZES: Final = (8, 64, 1000, 5000, 40_000)
_HELD: Final = 8
_PATIENCE_MS: Final = 500
_MEMBERS: Final = 4
_CREATE_EACH: Final = 3
"""Every so many objects one is created and sealed in two steps."""


def name_of(ring: int, step: int) -> ObjectID:
    """Return the name of an object that everybody knows."""
    return ObjectID(f"{ring:4}{step:16}".encode())


def content_of(ring: int, step: int) -> bytes:
    """Return what must be in it."""
    size = random.Random(f"{ring} {step}").choice(_SIZES)  # the same in each process
    return np.full(size // 8, ring << 48 | step, np.uint64).tobytes()


def relay(path: str, stop: Event, said: Connection, ring: int, member: int) -> None:
    """Be one of a ring: wait, look, put the next one; tell at the end what was seen."""
    counts: Counter[str] = Counter()
    take = Hints.take

    def count(hints: Hints, *arguments: object) -> Located | None:
        located: Located | None = take(hints, *arguments)  # type: ignore[arg-type]
        counts["taken by a hint" if located else "hints that came too late"] += 1
        return located

    Hints.take = count  # type: ignore[assignment,method-assign]
    held: deque[tuple[int, pa.Buffer]] = deque()
    with said, shmplasma.connect(path) as client:

        def put(step: int) -> None:
            content, name = content_of(ring, step), name_of(ring, step)
            try:
                if step % _CREATE_EACH:
                    client.put_raw_buffer(content, name)
                else:
                    np.asarray(client.create(name, len(content)))[:] = np.frombuffer(
                        content, np.uint8
                    )
                    client.seal(name)
            except shmplasma.PlasmaObjectExists:
                counts["put twice"] += 1

        def look(step: int, buffer: pa.Buffer) -> None:
            counts["wrong"] += buffer.to_pybytes() != content_of(ring, step)

        said.send("ready")
        step = member
        if not step:
            put(0)
        while not stop.is_set():
            buffer = client.get_buffers(name_of(ring, step), timeout_ms=_PATIENCE_MS)
            if buffer is None:  # it was evicted before we waited, or the one before us has stopped
                counts["waited in vain"] += 1
                put(step)
                continue
            look(step, buffer)
            held.append((step, buffer))
            del buffer
            if len(held) > _HELD:
                look(*held.popleft())
            counts["handed over"] += 1
            put(step + 1)
            step += _MEMBERS
        while held:
            look(*held.popleft())
        said.send(counts)


def run(seconds: float, n_rings: int, *, kill: bool = False) -> Counter[str]:
    """Hand objects over for so long, and return what was seen."""
    members: list[Member] = [
        (relay, (ring, member)) for ring in range(n_rings) for member in range(_MEMBERS)
    ]
    return hammer(members, seconds, kill=kill)


def main() -> int:
    """Run as the command line says; 1 if a byte was wrong."""
    parser = new_parser(__doc__)
    parser.add_argument("--rings", type=int, default=2, help="of four processes each (default: 2)")
    arguments = parser.parse_args()
    counts = run(arguments.seconds, arguments.rings, kill=arguments.kill)
    return report(counts, "wrong")


if __name__ == "__main__":
    sys.exit(main())
