"""Jobs that are done twice, plain and with a store: their options, their processes, their table, their memory.

Each way of a job runs in a process of its own, in turn with the other way, so that what else the machine does meets both.
A job is done `--times` times in its process, of which the best counts; of `--rounds` processes, the median.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]  # it ships no types

__all__ = ["Job", "main", "peak_of", "pss_bytes"]


@dataclass(frozen=True, slots=True)
class Job:
    """What is done twice.

    Attributes
    ----------
    title : str
        What it is; a format of the options.
    run : callable
        ``run(options, stored)`` does it, and returns the best time in seconds and what there is to say of memory.
    """

    title: str
    run: Callable[[argparse.Namespace, bool], tuple[float, str]]


def pss_bytes() -> int:
    """Return the memory of this process and its children, what they share counted once."""
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


@contextlib.contextmanager
def peak_of(peaks: list[int]) -> Iterator[None]:
    """Append the most memory that is in use at a time during a block, as far as looking now and then tells."""
    done = threading.Event()

    def look() -> None:
        peak = pss_bytes()
        while not done.wait(0.02):
            peak = max(peak, pss_bytes())
        peaks.append(peak)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def main(
    module: str,
    jobs: Mapping[str, Job],
    parser: argparse.ArgumentParser,
    quick: Mapping[str, object],
) -> None:
    """Do what the command line says.

    Parameters
    ----------
    module : str
        What is to be run in a process of its own for each way.
    jobs : mapping
        The jobs, by name.
    parser : ArgumentParser
        Knows the options that are the jobs' own.
    quick : mapping
        The values of these for ``--quick``.
    """
    parser.add_argument("--only", nargs="+", choices=jobs, default=list(jobs))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small sizes: see that it runs")
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    if "--quick" in sys.argv:
        parser.set_defaults(workers=2, times=1, **quick)
    options = parser.parse_args()
    if options.way:
        job, way = options.way
        print(json.dumps(jobs[job].run(options, way == "stored")))
        return
    print(f"| job, {options.workers} workers | plain | with a store | times faster | memory |")
    print("| --- | --- | --- | --- | --- |")
    for name in options.only:
        rounds = [
            [_in_process(module, name, way) for way in ("plain", "stored")]
            for _ in range(options.rounds)
        ]
        (plain, plain_memory), (ours, memory) = map(_median, zip(*rounds, strict=True))
        print(
            f"| {jobs[name].title.format(**vars(options))} | {1000 * plain:,.0f} ms | {1000 * ours:,.0f} ms | "
            f"{plain / ours:.1f} | {memory and f'{memory} (plain {plain_memory})'} |",
            flush=True,
        )


def _median(runs: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    """Return the median of the times, and what the last run said."""
    return statistics.median(seconds for seconds, _ in runs), runs[-1][1]


def _in_process(module: str, job: str, way: str) -> tuple[float, str]:
    program = [sys.executable, "-m", module, *sys.argv[1:], "--way", job, way]
    # Numbers of threads within workers are no matter here.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    said = subprocess.check_output(program, env=environment, text=True)
    seconds, memory = json.loads(said.splitlines()[-1])
    return seconds, memory
