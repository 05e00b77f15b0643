"""The command: starts a worker for each peer, asks them for all cases round by round, writes the report."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import machine, picture, report
from benchmarks.cases import CASES
from benchmarks.peers import PEERS
from benchmarks.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.cases import Case

__all__ = ["main"]

_PROJECT: Final = Path(__file__).parents[1]
_PAGE: Final = _PROJECT / "docs" / "benchmarks.md"
_PLASMA_PYTHON: Final = _PROJECT / ".venv-plasma11" / "bin" / "python"
_CAPACITY: Final = 2 << 30
_QUICK_CAPACITY: Final = 64 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; see ``--help``."""
    options = _parse(arguments)
    cases = [case for case in CASES if not options.only or case.name in options.only]
    capacity = _QUICK_CAPACITY if options.quick else _CAPACITY
    # Every peer may fill its store once, and LMDB leaves as much behind in freed pages.
    needed = (len(options.peers) + 1) * capacity
    if (free := machine.shared_memory_free()) < needed:
        capacity = capacity * free // needed
        print(
            f"shared memory has {free >> 20} MiB free, not {needed >> 20}: the largest puts are left out"
        )

    all_cores = report.Results("Free to use every core")
    one_core = report.Results("Everything pinned to one core")
    peers = _measure(all_cores, cases, options.rounds, options, capacity)
    passes = [all_cores]
    if hasattr(os, "sched_setaffinity"):
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        repeated = [case for case in cases if not case.once]
        _measure(one_core, repeated, options.rounds, options, capacity)
        os.sched_setaffinity(0, cores)
        passes.append(one_core)
    else:
        print("this system cannot pin processes to a core: no second table")

    allocator = "" if options.quick or options.only else _allocator()
    command = " ".join(["scripts/bench", *(sys.argv[1:] if arguments is None else arguments)])
    described = machine.describe()
    picture_path = ""
    if options.output:
        picture_path = f"img/{options.output.stem}.svg"
        target = options.output.parent / picture_path
        target.parent.mkdir(exist_ok=True)
        picture.draw(all_cores, cases, peers, described["date"], target)
    text = report.page(
        passes, cases, peers, described, command, options.rounds, allocator, picture_path
    )
    if options.output:
        options.output.write_text(text)
        print(f"wrote {options.output}")
    else:
        print(text)
    return 1 if any(results.problems for results in passes) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure shmplasma and its peers side by side, free and pinned to one core.",
        epilog=f"cases: {', '.join(names)}",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few repetitions, small stores: does it run?"
    )
    parser.add_argument("--only", nargs="+", metavar="CASE", choices=names, help="only these cases")
    parser.add_argument(
        "--peers",
        nargs="+",
        metavar="PEER",
        choices=PEERS,
        default=list(PEERS),
        help=", ".join(PEERS),
    )
    parser.add_argument("--rounds", type=int, help="how often to measure each case (3; 1 if quick)")
    parser.add_argument(
        "--output",
        type=Path,
        help="where the report goes (docs/benchmarks.md for a full run, else the terminal)",
    )
    options = parser.parse_args(arguments)
    if options.rounds is None:
        options.rounds = 1 if options.quick else 3
    full = not options.quick and not options.only and options.peers == list(PEERS)
    if options.output is None and full:
        options.output = _PAGE
    return options


def _allocator() -> str:
    print("==> The allocator with up to 1,000,000 live extents", flush=True)
    command = [sys.executable, "-m", "benchmarks.allocator", "--json"]
    return report.allocator_table(json.loads(subprocess.check_output(command)))


def _measure(
    results: report.Results,
    cases: Sequence[Case],
    rounds: int,
    options: argparse.Namespace,
    capacity: int,
) -> dict[str, tuple[str, str]]:
    print(f"==> {results.title}", flush=True)
    with ExitStack() as stack:
        workers = dict(_workers(stack, options.peers, capacity, quick=options.quick))
        for number in range(1, rounds + 1):
            for case in cases:
                if case.once and number > 1:
                    continue
                print(f"round {number} of {rounds}: {case.name:<14}", end="", flush=True)
                for turn in range(1, case.turns + 1):
                    for name, worker in workers.items():
                        answer = worker.run(case.name)
                        if answer.problem:
                            results.problems[case.name, name] = answer.problem
                            print(f"\n{worker.title} failed: {answer.problem}", flush=True)
                        elif answer.samples:
                            results.samples.setdefault((case.name, name), []).extend(answer.samples)
                        if turn == case.turns:
                            cell = results.cell(case.name, case.rows[0], name)
                            print(f"  {name} {cell or '-'}", end="", flush=True)
                print(f"  ({case.rows[0].unit})", flush=True)
        return {name: (worker.title, worker.version) for name, worker in workers.items()}


def _workers(
    stack: ExitStack, peers: Sequence[str], capacity: int, *, quick: bool
) -> Iterator[tuple[str, Worker]]:
    for name in peers:
        if name == "plasma" and not _PLASMA_PYTHON.exists():
            print("plasma is left out: scripts/bench installs it for Python 3.11")
            continue
        interpreter = str(_PLASMA_PYTHON) if name == "plasma" else sys.executable
        worker = Worker(interpreter, name, capacity, quick=quick)
        stack.callback(worker.close)
        if worker.problem:
            print(f"{name} is left out: {worker.problem}")
        else:
            yield name, worker
