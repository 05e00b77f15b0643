"""Tools: joblib, Dask and PyTorch with a store and without.

``python -m benchmarks.tools`` prints a table; sizes are options.  Each way runs in a process of its own, and its figure is the best of
some runs.  Memory is that of all processes, what they share counted once (PSS).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import psutil  # type: ignore[import-untyped]  # it ships no types

import shmplasma as plasma
from shmplasma.sizes import parse_size

__all__ = ["main"]

_SPARE_BYTES: Final = 64 << 20
_SAMPLE_SHAPE: Final = 28, 28


def _pss_bytes() -> int:
    """Return the memory of this process and its children, what they share counted once."""
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


@contextlib.contextmanager
def _peak(peaks: list[int]) -> Iterator[None]:
    """Append the most memory that is in use at a time during a block, as far as looking now and then tells."""
    done = threading.Event()

    def look() -> None:
        peak = _pss_bytes()
        while not done.wait(0.02):
            peak = max(peak, _pss_bytes())
        peaks.append(peak)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


# --- joblib: a large argument -------------------------------------------------------------------------------


def _part_sum(array: Any, number: int, count: int) -> float:
    step = -(-array.size // count)
    return float(array[number * step : (number + 1) * step].sum())


def _joblib(options: argparse.Namespace, *, stored: bool) -> tuple[float, str]:
    import joblib  # noqa: PLC0415  # each way is a process, which needs one of the tools

    import shmplasma.joblib  # noqa: PLC0415

    array = np.ones(options.array_bytes // 8)
    count = 4 * options.workers
    memory = options.array_bytes + _SPARE_BYTES
    settings = {"backend": "shmplasma", "memory": memory} if stored else {"backend": "loky"}
    best = float("inf")
    peaks: list[int] = []

    def call() -> None:
        sums = joblib.Parallel()(
            joblib.delayed(_part_sum)(array, number, count) for number in range(count)
        )
        if sum(sums) != array.size:
            raise SystemExit("the sum is wrong")

    with joblib.parallel_config(**settings, n_jobs=options.workers):
        joblib.Parallel()(joblib.delayed(time.sleep)(0.1) for _ in range(count))
        for _ in range(options.times):
            began = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - began)
        with _peak(peaks):  # which takes time
            call()
    shmplasma.joblib.shutdown()
    return best, f"{peaks[0] / array.nbytes:.2f} of the data at most, with the original"


# --- Dask: one result that all workers read --------------------------------------------------------------------


def _make(size_bytes: int) -> Any:
    return np.ones(size_bytes // 8)


def _read(array: Any, _: int) -> float:
    return float(array.sum())


def _dask(options: argparse.Namespace, *, stored: bool) -> tuple[float, str]:
    import dask  # noqa: PLC0415
    from distributed import Client, LocalCluster, wait  # noqa: PLC0415

    from shmplasma.dask import StorePlugin  # noqa: PLC0415

    best, copies = float("inf"), 0.0
    dask.config.set({"distributed.worker.memory.terminate": False})
    with (
        tempfile.TemporaryDirectory() as directory,
        plasma.Store(options.result_bytes + _SPARE_BYTES) as store,
        LocalCluster(
            n_workers=options.workers,
            threads_per_worker=1,
            dashboard_address=":0",
            memory_limit=0,
            local_directory=directory,
        ) as cluster,
        Client(cluster) as client,
    ):
        if stored:
            client.register_plugin(StorePlugin(store.store_socket_name))
        workers = list(client.scheduler_info(n_workers=-1)["workers"])
        client.gather(client.map(_read, [np.ones(1)] * len(workers), range(len(workers))))
        before = _pss_bytes()
        for _ in range(options.times):
            result = client.submit(_make, options.result_bytes, workers=workers[:1], pure=False)
            wait(result)
            began = time.perf_counter()
            reads = [
                client.submit(_read, result, number, workers=[worker], pure=False)
                for number, worker in enumerate(workers)
            ]
            sums = client.gather(reads)
            best = min(best, time.perf_counter() - began)
            copies = (_pss_bytes() - before) / options.result_bytes
            if set(sums) != {options.result_bytes // 8}:
                raise SystemExit("a sum is wrong")
            del result, reads
            while any(client.has_what().values()):
                time.sleep(0.01)
    return best, f"{copies:.2f} copies on the host"


# --- PyTorch: many small samples -------------------------------------------------------------------------------


def _torch(options: argparse.Namespace, *, stored: bool) -> tuple[float, str]:
    import torch  # noqa: PLC0415
    from torch.utils.data import DataLoader  # noqa: PLC0415

    from shmplasma.torch import StoreDataset  # noqa: PLC0415

    def samples() -> Iterator[tuple[Any, int]]:
        for number in range(options.samples):
            yield torch.full(_SAMPLE_SHAPE, number % 256, dtype=torch.uint8), number % 10

    with contextlib.ExitStack() as stack:
        dataset: Any
        if stored:
            store = stack.enter_context(plasma.Store(options.samples * 1024 + _SPARE_BYTES))
            with store.connect() as client:
                dataset = StoreDataset(client, samples())
        else:
            dataset = list(samples())
        best, growth = float("inf"), 0
        for _ in range(options.times):
            loader = DataLoader(dataset, batch_size=64, shuffle=True, num_workers=options.workers)
            batches = iter(loader)
            seen = len(next(batches)[1])
            before = after = _pss_bytes()
            began = time.perf_counter()
            for number, (_, labels) in enumerate(batches, 2):
                seen += len(labels)
                if number == len(loader) - 2 * options.workers:
                    pause = time.perf_counter()
                    after = _pss_bytes()
                    began += time.perf_counter() - pause
            best = min(best, time.perf_counter() - began)
            growth = after - before
            if seen != options.samples:
                raise SystemExit("samples are lost")
        del dataset
    return best, f"{growth / 2**20:+.0f} MiB over an epoch"


# --- all of them -----------------------------------------------------------------------------------------------

_TOOLS: Final[dict[str, Callable[..., tuple[float, str]]]] = {
    "joblib": _joblib,
    "dask": _dask,
    "torch": _torch,
}


def _title(tool: str, options: argparse.Namespace) -> str:
    return {
        "joblib": f"joblib: an argument of {options.array_bytes:,} bytes for {4 * options.workers} tasks",
        "dask": f"Dask: a result of {options.result_bytes:,} bytes, read by all workers",
        "torch": f"DataLoader: an epoch of {options.samples:,} samples",
    }[tool]


def _in_process(tool: str, way: str) -> tuple[float, str]:
    program = [sys.executable, "-m", "benchmarks.tools", *sys.argv[1:], "--way", tool, way]
    # Numbers of threads within workers are no matter here.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    said = subprocess.check_output(program, env=environment, text=True)
    seconds, memory = json.loads(said.splitlines()[-1])
    return seconds, memory


def main() -> None:
    """Run what the options say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=_TOOLS, default=list(_TOOLS))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--array-bytes", type=parse_size, default=1 << 30)
    parser.add_argument("--result-bytes", type=parse_size, default=500_000_000)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        tool, way = options.way
        print(json.dumps(_TOOLS[tool](options, stored=way == "stored")))
        return
    print(f"| job, {options.workers} workers | plain | with a store | times faster | memory |")
    print("| --- | --- | --- | --- | --- |")
    for tool in options.only:
        plain, plain_memory = _in_process(tool, "plain")
        ours, memory = _in_process(tool, "stored")
        print(
            f"| {_title(tool, options)} | {1000 * plain:,.0f} ms | {1000 * ours:,.0f} ms | {plain / ours:.1f} | "
            f"{memory} (plain {plain_memory}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
