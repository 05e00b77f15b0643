"""Time puts into a full store: each of 100 KB, for which one object has to go.  shmplasma and Plasma side by side.

Each store is filled one and a half times over, so that every put that is timed evicts.  The peers take turns, so that
a busy machine slows all of them.  Run it as ``python -m benchmarks.full_store``; Plasma is measured where
``scripts/bench`` has installed it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from os import urandom
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.cases import p99
from benchmarks.peers import make_peer

SIZE_BYTES = 100_000
PEERS = ("shmplasma", "plasma")
PLASMA_PYTHON = Path(__file__).parents[1] / ".venv-plasma11" / "bin" / "python"


def measure(name: str, capacity: int, count: int) -> list[float]:
    """Fill a store of this peer, and return the seconds that each of so many further puts took."""
    data = urandom(SIZE_BYTES)
    with tempfile.TemporaryDirectory() as directory:
        peer = make_peer(name, directory, capacity)
        with peer.serve():
            client = peer.connect()
            put = client.put_raw(data)
            for _ in range(3 * capacity // SIZE_BYTES // 2):
                put()
            samples: list[float] = []
            for _ in range(count):
                began = perf_counter()
                put()
                samples.append(perf_counter() - began)
            client.close()
    return samples


def report(samples: dict[str, list[float]]) -> str:
    """Return a Markdown table of what was measured."""
    lines = [
        f"| puts of {SIZE_BYTES:,} bytes into a full store | puts/s | median, µs | p99, µs |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, times in samples.items():
        rate = len(times) / sum(times)
        lines.append(
            f"| {name} | {rate:,.0f} | {1e6 * median(times):,.0f} | {1e6 * p99(times):,.0f} |"
        )
    if len(samples) == len(PEERS):
        ours, theirs = (sum(samples[name]) / len(samples[name]) for name in PEERS)
        lines.append(f"\nshmplasma puts {theirs / ours:.1f} times as many as Plasma.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark; see ``--help``."""
    parser = argparse.ArgumentParser(prog="benchmarks.full_store", description=__doc__)
    parser.add_argument("--capacity", type=int, default=1 << 30, help="of each store, in bytes")
    parser.add_argument("--count", type=int, default=5000, help="puts that are timed in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--plasma-python", default=str(PLASMA_PYTHON), help="an interpreter that has pyarrow.plasma"
    )
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peer:
        print(json.dumps(measure(options.peer, options.capacity, options.count)))
        return
    interpreters = {"shmplasma": sys.executable, "plasma": options.plasma_python}
    if not Path(options.plasma_python).exists():
        print("plasma is left out: scripts/bench installs it for Python 3.11")
        del interpreters["plasma"]
    samples: dict[str, list[float]] = {name: [] for name in interpreters}
    for _ in range(options.rounds):
        for name, interpreter in interpreters.items():
            command = [interpreter, "-m", "benchmarks.full_store", "--peer", name]
            sizes = ["--capacity", str(options.capacity), "--count", str(options.count)]
            samples[name] += json.loads(subprocess.check_output([*command, *sizes]))
    print(report(samples))


if __name__ == "__main__":
    main()
