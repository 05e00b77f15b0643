"""Hit rates of `shmplasma.eviction` beside LRU and FIFO, on four traces and several sizes of the cache.

SIEVE is the store's own code, driven with its visited bytes as the store and its readers do it: a hit sets the byte,
a miss takes the first victim of a sweep and inserts the newcomer.  All objects are of one size.  Run it as
``python -m benchmarks.hit_rate``; with ``--write`` the table and the picture in docs/eviction.md are made anew.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final

from shmplasma.eviction import Sieve

__all__ = ["Row", "main", "measure"]

SEED: Final = 1
CACHES: Final = (500, 2_000, 8_000, 32_000)
ROUNDS: Final = 100
"""Requests for each object that the cache has room for; the first tenth of them fills it and does not count."""
EXPONENT: Final = 0.9
OVER: Final = 10
"""How many times as many objects are asked for as the cache has room for."""

_DOCS: Final = Path(__file__).parents[1] / "docs"
_BEGIN: Final = "<!-- begin: python -m benchmarks.hit_rate --write -->\n"
_END: Final = "<!-- end -->\n"

Policy = Callable[[int, Sequence[int]], Iterator[bool]]


# -- traces ----------------------------------------------------------------------------------------


def zipf(cache: int, rng: random.Random) -> list[int]:
    """Return requests for `OVER` times as many objects as fit, the i-th asked for 1 / i ** `EXPONENT` times as often."""
    weights = list(accumulate(1 / rank**EXPONENT for rank in range(1, OVER * cache + 1)))
    return rng.choices(range(OVER * cache), cum_weights=weights, k=ROUNDS * cache)


def scans(cache: int, rng: random.Random) -> list[int]:
    """Return the same, and after each cache size of requests a scan of half as many objects that are asked for once."""
    requests = zipf(cache, rng)
    mixed: list[int] = []
    cold = OVER * cache
    for start in range(0, len(requests), cache):
        mixed += requests[start : start + cache]
        mixed += range(cold, cold + cache // 2)
        cold += cache // 2
    return mixed


def loop(cache: int, _: random.Random) -> list[int]:
    """Return requests for a tenth more objects than fit, in turn."""
    length = cache + cache // 10
    return [at % length for at in range(ROUNDS * cache)]


def uneven_loop(cache: int, rng: random.Random) -> list[int]:
    """Return the same, but one request in twenty is for any of these objects."""
    length = cache + cache // 10
    return [rng.randrange(length) if rng.random() < 0.05 else at for at in loop(cache, rng)]


TRACES: Final = {
    "Zipf 0.9 over 10x the cache": zipf,
    "the same with scans": scans,
    "a loop of 1.1x the cache": loop,
    "the loop with 5 % elsewhere": uneven_loop,
}


# -- policies --------------------------------------------------------------------------------------


def sieve(cache: int, requests: Sequence[int]) -> Iterator[bool]:
    """Yield whether each request is a hit, under the store's policy."""
    visited = memoryview(bytearray(cache))
    queue = Sieve(visited)
    entry_of: dict[int, int] = {}
    object_in = [-1] * cache
    for wanted in requests:
        entry = entry_of.get(wanted)
        if entry is not None:
            visited[entry] = 1
            yield True
            continue
        if len(queue) < cache:
            entry = len(queue)
        else:
            entry = next(queue.sweep())
            queue.remove(entry)
            del entry_of[object_in[entry]]
        queue.insert(entry)
        entry_of[wanted], object_in[entry] = entry, wanted
        yield False


def lru(cache: int, requests: Sequence[int]) -> Iterator[bool]:
    """Yield whether each request is a hit when the one goes that was not asked for for the longest time."""
    held: OrderedDict[int, None] = OrderedDict()
    for wanted in requests:
        hit = wanted in held
        if hit:
            held.move_to_end(wanted)
        else:
            if len(held) == cache:
                held.popitem(last=False)
            held[wanted] = None
        yield hit


def fifo(cache: int, requests: Sequence[int]) -> Iterator[bool]:
    """Yield whether each request is a hit when the one goes that came first."""
    held: OrderedDict[int, None] = OrderedDict()
    for wanted in requests:
        hit = wanted in held
        if not hit:
            if len(held) == cache:
                held.popitem(last=False)
            held[wanted] = None
        yield hit


POLICIES: Final[dict[str, Policy]] = {"SIEVE": sieve, "LRU": lru, "FIFO": fifo}


# -- measuring -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """Hit rates on one trace: shares of 1, by policy."""

    trace: str
    cache: int
    hit_rates: dict[str, float]

    @property
    def fewer_misses(self) -> float:
        """How many misses fewer SIEVE has than LRU, as a share of those of LRU."""
        return 1 - (1 - self.hit_rates["SIEVE"]) / (1 - self.hit_rates["LRU"])


def measure(trace: str, cache: int) -> Row:
    """Return the hit rates of all policies on a trace, for a cache of so many objects."""
    requests = TRACES[trace](cache, random.Random(SEED))
    warm = len(requests) // 10
    rates: dict[str, float] = {}
    for name, policy in POLICIES.items():
        hits = list(policy(cache, requests))[warm:]
        rates[name] = sum(hits) / len(hits)
    return Row(trace, cache, rates)


# -- showing ---------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| trace | objects that fit | SIEVE | LRU | FIFO | misses of SIEVE below those of LRU |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        rates = " | ".join(f"{100 * row.hit_rates[name]:.2f} %" for name in POLICIES)
        lines.append(f"| {row.trace} | {row.cache:,} | {rates} | {100 * row.fewer_misses:.1f} % |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the miss rates, a panel a trace."""
    import matplotlib as mpl  # noqa: PLC0415 - who only wants the figures needs no library to draw them

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "shmplasma"  # the same picture has the same bytes
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, panels = plt.subplots(1, len(TRACES), figsize=(12, 3), layout="constrained")
    for panel, trace in zip(panels, TRACES, strict=True):
        own = [row for row in rows if row.trace == trace]
        for (name, _), marker in zip(POLICIES.items(), "osv", strict=True):
            misses = [100 * (1 - row.hit_rates[name]) for row in own]
            panel.plot([row.cache for row in own], misses, marker=marker, label=name)
        panel.set_xscale("log")
        panel.set_title(trace, fontsize=10)
        panel.set_xlabel("objects that fit")
    panels[0].set_ylabel("misses, %")
    panels[0].legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write(rows: Sequence[Row]) -> None:
    """Put table and picture into the documentation."""
    draw(rows, _DOCS / "img" / "hit_rate.svg")
    page = _DOCS / "eviction.md"
    head, _, rest = page.read_text().partition(_BEGIN)
    tail = rest.partition(_END)[2]
    picture = "![Misses of SIEVE, LRU and FIFO](img/hit_rate.svg)\n"
    page.write_text(f"{head}{_BEGIN}\n{table(rows)}\n{picture}\n{_END}{tail}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and say by the exit code whether SIEVE is as good as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="also write docs/eviction.md")
    options = parser.parse_args(arguments)
    rows = [measure(trace, cache) for trace in TRACES for cache in CACHES]
    print(table(rows))
    if options.write:
        write(rows)
    good = all(row.fewer_misses >= 0 for row in rows)
    good &= all(row.fewer_misses >= 0.05 for row in rows if row.trace == next(iter(TRACES)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
