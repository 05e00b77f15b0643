"""A segment in which bits have flipped while no store looked after it.

A store refuses a header that is damaged, and leaves the segment alone.  Whatever it makes of the rest, it must come
up, be in order, and give nobody a byte that is not the object's.  An object's content follows from its id.  Run it
by hand for as long as you like::

    python -m tests.crash.flipped_bits --count 10000
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from typing import Final

from shmplasma.errors import LayoutError
from shmplasma.layout import (
    BOARD_BYTES,
    CONTROL_BYTES,
    ENTRY_BYTES,
    HEADER_BYTES,
    OUTBOX_BYTES,
    Layout,
)
from shmplasma.posted import Abort
from shmplasma.replies import ABSENT, Done, Number
from shmplasma.requests import Delete, Evict
from tests.conversation import TOKEN, Conversation, name
from tests.crash.damage import Reopened

__all__ = ["run"]

N_OBJECTS: Final = 40
N_BOARDS: Final = 3
_MAX_FLIPS: Final = 6


class Subject:
    """A segment with objects of all kinds, as a store that was killed leaves it."""

    def __init__(self) -> None:
        talk = Conversation(4 << 20)
        self.layout, self.words, self.raw = talk.layout, talk.words, talk.raw
        self.layout.write(self.words, TOKEN)
        one, other = talk.client(), talk.client()
        ids = [name(number) for number in range(N_OBJECTS)]
        self.sizes = {object_id: 20 * (1 + at % 7) for at, object_id in enumerate(ids)}
        for object_id in ids:
            one.put(object_id, self.sizes[object_id])
        for object_id in ids:
            ((offset, size, _, _),), (slot,) = other.get(object_id)
            self.raw[offset : offset + size] = object_id * (size // 20)
            other.release(slot)
        doomed, gone, unsealed, limbo = ids[3], ids[9], name(1000), name(1001)
        other.get(doomed, ids[5])
        one.ask(Delete([doomed, gone]), Done)
        one.create(unsealed, 300)
        one.create(limbo, 300)
        one.ask(Abort(limbo), Done)
        layout = self.layout
        self._regions = [
            (0, HEADER_BYTES),
            (layout.buckets, layout.n_buckets * 8),
            (layout.entries, (N_OBJECTS + 60) * ENTRY_BYTES),
            (layout.control, N_BOARDS * CONTROL_BYTES),
            (layout.boards, N_BOARDS * BOARD_BYTES),
            (layout.outboxes, N_BOARDS * OUTBOX_BYTES),
        ]
        self._pristine = [bytes(self.raw[start : start + size]) for start, size in self._regions]

    def restore(self) -> None:
        """Undo all damage."""
        for (start, _), content in zip(self._regions, self._pristine, strict=True):
            self.raw[start : start + len(content)] = content

    def damage(self, source: random.Random) -> None:
        """Flip some bits, most of them where something is written."""
        for _ in range(source.randint(1, _MAX_FLIPS)):
            start, size = source.choice(self._regions)
            at = start + source.randrange(size)
            if source.random() < 0.8:
                for _ in range(1000):
                    if self.raw[at]:
                        break
                    at = start + source.randrange(size)
            self.raw[at] ^= 1 << source.randrange(8)

    def examine(self) -> str:
        """Start a store on it, use the store, and say how much of the segment it has found."""
        try:
            layout, token = Layout.read(self.words[: HEADER_BYTES // 8])
        except LayoutError:
            return "header refused"
        if token != TOKEN or layout != self.layout:
            return "header refused"
        talk = Reopened(layout, self.words, self.raw)
        client = talk.client()
        n_found = 0
        for object_id, size in self.sizes.items():
            ((offset, data_size, metadata_size, _),), (slot,) = client.get(object_id)
            if (offset, data_size, metadata_size, 0) == ABSENT:
                continue
            n_found += 1
            content = bytes(self.raw[offset : offset + data_size])
            assert (data_size, metadata_size) == (size, 0), f"{object_id.hex()} has another size"
            assert content == object_id * (size // 20), f"{object_id.hex()} has another content"
            client.release(slot)
        for number in range(2000, 2020):
            client.put(name(number), 5000)
        client.ask(Delete([name(number) for number in range(2000, 2010)]), Done)
        client.ask(Evict(1), Number)
        talk.store.check()
        return "all objects" if n_found >= N_OBJECTS - 1 else "some objects lost"


def run(count: int, seed: int, *, progress: bool = False) -> Counter[str]:
    """Damage a segment again and again.

    Parameters
    ----------
    count : int
        How many mutants.
    seed : int
        Of the random numbers.
    progress : bool, optional
        Whether to say how far it is.

    Returns
    -------
    Counter of str
        How often all objects were found, some were lost, or the header was refused.

    Raises
    ------
    AssertionError
        A wrong byte, or a store that is not in order; the note says which mutant.
    """
    subject = Subject()
    outcomes: Counter[str] = Counter()
    assert subject.examine() == "all objects"
    for number in range(count):
        subject.restore()
        subject.damage(random.Random(f"{seed}-{number}"))
        try:
            outcomes[subject.examine()] += 1
        except Exception as error:
            error.add_note(f"mutant {number} of seed {seed}")
            raise
        if progress and number % 500 == 499:
            sys.stderr.write(f"\r{number + 1:,} of {count:,}: {dict(outcomes)}")
    return outcomes


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="mutants (default: 10,000)")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers (default: 1)")
    options = parser.parse_args()
    outcomes = run(options.count, options.seed, progress=True)
    sys.stderr.write("\n")
    for outcome, number in outcomes.most_common():
        sys.stdout.write(f"{outcome}: {number:,}\n")
    sys.stdout.write("wrong bytes: 0, stores that did not come up: 0\n")


if __name__ == "__main__":
    main()
