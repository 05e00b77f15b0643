"""Tools: joblib, Dask and PyTorch with a store and without.

``python -m benchmarks.tools`` prints a table; sizes are options (see `benchmarks.pairs`).  Memory is that of all processes, what they
share counted once (PSS).
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

import shmplasma as plasma
from benchmarks.pairs import Job, main, peak_of, pss_bytes
from shmplasma.sizes import parse_size

_SPARE_BYTES: Final = 64 << 20
_SAMPLE_SHAPE: Final = 28, 28


# --- joblib: a large argument -------------------------------------------------------------------------------


def _part_sum(array: Any, number: int, count: int) -> float:
    step = -(-array.size // count)
    return float(array[number * step : (number + 1) * step].sum())


def _joblib(options: argparse.Namespace, stored: bool) -> tuple[float, str]:
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
        with peak_of(peaks):  # which takes time
            call()
    shmplasma.joblib.shutdown()
    return best, f"{peaks[0] / array.nbytes:.2f} of the data at most, with the original"


# --- Dask: one result that all workers read --------------------------------------------------------------------


def _make(size_bytes: int) -> Any:
    return np.ones(size_bytes // 8)


def _read(array: Any, _: int) -> float:
    return float(array.sum())


def _dask(options: argparse.Namespace, stored: bool) -> tuple[float, str]:
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
        before = pss_bytes()
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
            copies = (pss_bytes() - before) / options.result_bytes
            if set(sums) != {options.result_bytes // 8}:
                raise SystemExit("a sum is wrong")
            del result, reads
            while any(client.has_what().values()):
                time.sleep(0.01)
    return best, f"{copies:.2f} copies on the host"


# --- PyTorch: many small samples -------------------------------------------------------------------------------


def _torch(options: argparse.Namespace, stored: bool) -> tuple[float, str]:
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
            before = after = pss_bytes()
            began = time.perf_counter()
            for number, (_, labels) in enumerate(batches, 2):
                seen += len(labels)
                if number == len(loader) - 2 * options.workers:
                    pause = time.perf_counter()
                    after = pss_bytes()
                    began += time.perf_counter() - pause
            best = min(best, time.perf_counter() - began)
            growth = after - before
            if seen != options.samples:
                raise SystemExit("samples are lost")
        del dataset
    return best, f"{growth / 2**20:+.0f} MiB over an epoch"


# --- all of them -----------------------------------------------------------------------------------------------

_JOBS: Final = {
    "joblib": Job("joblib: an argument of {array_bytes:,} bytes for 4 tasks a worker", _joblib),
    "dask": Job("Dask: a result of {result_bytes:,} bytes, read by all workers", _dask),
    "torch": Job("DataLoader: an epoch of {samples:,} samples", _torch),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.tools", description=__doc__)
    parser.add_argument("--array-bytes", type=parse_size, default=1 << 30)
    parser.add_argument("--result-bytes", type=parse_size, default=500_000_000)
    parser.add_argument("--samples", type=int, default=100_000)
    return parser


if __name__ == "__main__":
    main(
        "benchmarks.tools",
        _JOBS,
        _parser(),
        {"array_bytes": 4 << 20, "result_bytes": 4 << 20, "samples": 2000},
    )
