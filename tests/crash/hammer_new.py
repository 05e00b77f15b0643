"""Objects that are got as soon as they are put, before the store has read of them, in a store that is full all the time.

The processes are pairs.  One puts an object and tells the other one by a pipe; that gets it at once, looks whether all its bytes are what they
must be, and once more when it lets go of it, some objects later.  Now and then it deletes one, and looks for it again.  Others fill the store
meanwhile, so that whatever nobody holds goes at once and its memory is used anew.  Run it by hand for as long as you like; with ``--kill`` the store
is killed again and again, and another one takes its place::

    python -m tests.crash.hammer_new --seconds 60
    python -m tests.crash.hammer_new --seconds 60 --kill
"""

from __future__ import annotations

import multiprocessing
import random
import sys
from collections import Counter, deque
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import TYPE_CHECKING, Final

import numpy as np

import shmplasma
from shmplasma.objects import ObjectID
from shmplasma.unread import Unread
from tests.crash.hammer import Member, hammer, new_parser, report

if TYPE_CHECKING:
    import pyarrow as pa

    from shmplasma.pinning import Located
    from shmplasma.unread import Places

__all__ = ["run"]

_SIZES: Final = (8, 64, 1000, 5000, 40_000)
_HELD: Final = 8
_DELETE_EACH: Final = 5


def content_of(pair: int, step: int) -> bytes:
    """Return what must be in an object."""
    size = random.Random(f"{pair} {step}").choice(_SIZES)  # the same in each process
    return np.full(size // 8, pair << 48 | step, np.uint64).tobytes()


def tell(path: str, stop: Event, said: Connection, pair: int, pipe: Connection) -> None:
    """Put objects, each in one of three ways, and say their ids."""
    with said, pipe, shmplasma.connect(path) as client:
        said.send("ready")
        step = 0
        while not stop.is_set():
            content = content_of(pair, step)
            object_id = ObjectID(f"{pair:4}{step:16}".encode())
            if step % 3 == 0:
                object_id = client.put_raw_buffer(content)
            elif step % 3 == 1:
                client.put_raw_buffer(content, object_id)
            else:
                array = np.asarray(client.create(object_id, len(content)))
                array[:] = np.frombuffer(content, np.uint8)
                client.seal(object_id)
                del array
            pipe.send_bytes(object_id.binary())
            step += 1
            pipe.recv_bytes()
        pipe.send_bytes(b"")
        said.send(Counter[str]())


def hear(path: str, _: Event, said: Connection, pair: int, pipe: Connection) -> None:
    """Get each object that the other one says, and tell at the end what was seen."""
    counts: Counter[str] = Counter()
    take = Unread.take

    def count(unread: Unread, object_id: bytes, places: Places) -> Located | None:
        located = take(unread, object_id, places)
        counts["found by their records"] += located is not None
        return located

    Unread.take = count  # type: ignore[assignment,method-assign]
    held: deque[tuple[int, pa.Buffer]] = deque()
    with said, pipe, shmplasma.connect(path) as client:

        def look(step: int, buffer: pa.Buffer) -> None:
            counts["wrong"] += buffer.to_pybytes() != content_of(pair, step)

        said.send("ready")
        step = 0
        while name := pipe.recv_bytes():
            object_id = ObjectID(name)
            (buffer,) = client.get_buffers([object_id], timeout_ms=0)
            if buffer is None:
                counts["evicted before that"] += 1
            else:
                counts["got"] += 1
                look(step, buffer)
                if step % _DELETE_EACH:
                    held.append((step, buffer))
                del buffer
                if not step % _DELETE_EACH:
                    client.delete([object_id])
                    counts["deleted and found"] += client.contains(object_id)
                    (again,) = client.get_buffers([object_id], timeout_ms=0)
                    counts["deleted and found"] += again is not None
            if len(held) > _HELD:
                look(*held.popleft())
            step += 1
            pipe.send_bytes(b"next")
        while held:
            look(*held.popleft())
        said.send(counts)


def run(seconds: float, n_pairs: int, *, kill: bool = False) -> Counter[str]:
    """Put and get for so long, and return what was seen."""
    members: list[Member] = []
    for pair in range(n_pairs):
        one, other = multiprocessing.Pipe()
        members += (tell, (pair, one)), (hear, (pair, other))
    return hammer(members, seconds, kill=kill)


def main() -> int:
    """Run as the command line says; 1 if a byte was wrong, or something that was deleted was there."""
    parser = new_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="of processes (default: 3)")
    arguments = parser.parse_args()
    counts = run(arguments.seconds, arguments.pairs, kill=arguments.kill)
    return report(counts, "wrong", "deleted and found")


if __name__ == "__main__":
    sys.exit(main())
