"""Turns samples into the page `docs/benchmarks.md`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from benchmarks.cases import Case, Row

__all__ = ["Results", "allocator_table", "page"]

_FACTORS: Final = {"µs": 1e6, "ms": 1e3, "GB/s": 1e-9, "k/s": 1e-3, "B": 1.0}
_US: Final = "shmplasma"
_THEM: Final = "plasma"

_INTRODUCTION: Final = """\
# Benchmarks

Written by `{command}`. All peers run at the same time, each with its own server; a round asks every
peer for one case before it goes on to the next case. The figures are medians (or the percentile that is named) over
{rounds} rounds. Times and bytes: less is better; GB/s and k/s (thousands a second, all clients together): more is better.
The last column says how many times better shmplasma is than Plasma. A shared or busy machine moves all figures: read ratios.

Each peer is used as its users would use it: values of LMDB and Redis are pickled where Python objects are asked for and
plain bytes elsewhere, LMDB lies on a tmpfs and syncs nothing, Redis has a unix socket and saves nothing. The 8 MB
array is plain bytes in LMDB and Redis too. No reference is held between two gets.

The floor of Python is no store: it is what an operation takes in Python when all but its substance is left out, that is what no store in
Python can do without (`benchmarks/peers/floor.py` says what that is).
"""


@dataclass(slots=True)
class Results:
    """All samples of one pass over all peers.

    Attributes
    ----------
    samples : dict
        Samples by case and peer, of all rounds.
    problems : dict
        Why there are none, by case and peer.
    """

    title: str
    samples: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    problems: dict[tuple[str, str], str] = field(default_factory=dict)

    def value(self, case: str, row: Row, peer: str) -> float | None:
        """Return a row's figure in its unit, or None where there is none."""
        samples = self.samples.get((case, peer))
        return row.statistic(samples) * _FACTORS[row.unit] if samples else None

    def cell(self, case: str, row: Row, peer: str) -> str:
        """Return a row's figure as text."""
        if (case, peer) in self.problems:
            return "failed"
        value = self.value(case, row, peer)
        return "" if value is None else _three_digits(value)

    def better(self, case: str, row: Row) -> str:
        """Return how many times better than Plasma we are."""
        ours, theirs = (self.value(case, row, peer) for peer in (_US, _THEM))
        if not ours or not theirs or math.isinf(ours):
            return ""
        ratio = ours / theirs if row.more_is_better else theirs / ours
        return "∞" if math.isinf(ratio) else f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"


def page(
    passes: Iterable[Results],
    cases: Sequence[Case],
    peers: Mapping[str, tuple[str, str]],
    machine: Mapping[str, str],
    command: str,
    rounds: int,
    allocator: str,
    picture: str,
) -> str:
    """Return the whole page.

    Parameters
    ----------
    passes : iterable of Results
        A table is made of each.
    cases : sequence of Case
        In the order of the table.
    peers : mapping
        Title and version of each peer, in the order of the columns.
    machine : mapping
        What `benchmarks.machine.describe` said.
    command : str
        What was run.
    rounds : int
        How often each case was measured.
    allocator : str
        The allocator's table, or nothing.
    picture : str
        Where the first pass is drawn, or nothing.
    """
    machine_table = _table(["", ""], [[name, value] for name, value in machine.items()])
    versions = ", ".join(f"{title}: {version}" for title, version in peers.values())
    parts = [_INTRODUCTION.format(command=command, rounds=rounds)]
    if picture:
        parts.append(f"![What some operations take with each peer]({picture})\n")
    parts += [machine_table, f"{versions}.\n"]
    for results in passes:
        rows = [
            [
                f"{row.title}, {row.unit}",
                *(results.cell(case.name, row, peer) for peer in peers),
                results.better(case.name, row),
            ]
            for case in cases
            for row in case.rows
            if any(results.cell(case.name, row, peer) for peer in peers)
        ]
        header = ["", *(title for title, _ in peers.values()), "times Plasma"]
        parts += [f"## {results.title}\n", _table(header, rows)]
    if allocator:
        parts += ["## The allocator\n", allocator]
    return "\n".join(parts)


def allocator_table(rows: Iterable[Mapping[str, float]]) -> str:
    """Return the table of `benchmarks.allocator`'s rows."""
    return _table(
        ["live extents", "free extents", "free + allocate, median, µs", "p99, µs"],
        [
            [
                f"{row['live_extents']:,}",
                f"{row['free_extents']:,}",
                _three_digits(row["median_us"]),
                _three_digits(row["p99_us"]),
            ]
            for row in rows
        ],
    )


def _three_digits(value: float) -> str:
    if math.isinf(value):
        return "stalls"
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 3)}f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, align, *rows))
