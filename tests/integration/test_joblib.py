"""joblib: the backend that passes large arrays by a store."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
import loky.backend.resource_tracker
import numpy as np
import pandas as pd
import psutil  # type: ignore[import-untyped]  # it ships no types
import pyarrow as pa
import pytest
from joblib.externals.loky.backend import resource_tracker
from joblib.externals.loky.process_executor import TerminatedWorkerError
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

import shmplasma.joblib
from shmplasma import PlasmaClient, Store
from tests.processes import Child, until

N = 1_000_000


@pytest.fixture(scope="session", autouse=True)
def _tracking(spawning: None) -> None:  # noqa: ARG001  # loky needs both processes
    """Start the process that loky keeps for the rest of the session: joblib's copy of it, and that of the package, which some other test may import.

    The two share the name of a context of `multiprocessing`, so that joblib's workers are started by whichever came last.
    """
    resource_tracker.ensure_running()
    loky.backend.resource_tracker.ensure_running()


@contextmanager
def using(store: Store | None, **options: Any) -> Iterator[None]:
    """Make the backend the default one; end what it keeps for the next call."""
    settings = {"n_jobs": 2, **({"socket": store.store_socket_name} if store else {}), **options}
    try:
        with joblib.parallel_config(backend="shmplasma", **settings):
            yield
    finally:
        shmplasma.joblib.shutdown()


def look(value: Any, *_: object) -> tuple[int, str, bool]:
    """Return which worker sees an array, where, and whether it can be written to."""
    array = value if isinstance(value, np.ndarray) else np.asarray(value)
    address, place = array.ctypes.data, ""
    for mapping in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in mapping.split(" ", 1)[0].split("-"))
        if first <= address < last:
            place = mapping.rpartition("/")[2]
    return os.getpid(), place, array.flags.writeable


def test_an_argument_is_stored_once(store: Store, client: PlasmaClient) -> None:
    """All workers see it in the store; it goes with the call, and no folder was made."""
    array = np.arange(N)
    with using(store):
        seen = joblib.Parallel()(joblib.delayed(look)(array, i) for i in range(20))
    assert all(place.startswith("shmplasma-") and not writable for _, place, writable in seen)
    assert os.getpid() not in {pid for pid, *_ in seen}
    assert not [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("joblib")]
    until(lambda: not client.list(), "it goes with the call")


def test_what_else_is_large_is_stored_too(store: Store) -> None:
    """Data frames by their columns, Arrow data, and arrays that lie in files."""
    rows: Any = np.arange(N)
    frame = pd.DataFrame({"a": rows})
    table = pa.table({"a": rows})
    with using(store), tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, np.int64, "w+", shape=N)
        mapped[:] = range(N)
        results = joblib.Parallel()(
            joblib.delayed(lambda value: (look(value)[1], int(np.asarray(value).sum())))(value)
            for value in (frame["a"], table["a"].chunk(0), mapped, mapped[10:])
        )
        del mapped
    total = N * (N - 1) // 2
    assert [place[:10] for place, _ in results] == ["shmplasma-"] * 4
    assert [each for _, each in results] == [total, total, total, total - 45]


def test_an_argument_may_change_between_calls(store: Store) -> None:
    """Each call passes what is there when it begins."""
    array = np.zeros(N)
    with using(store), joblib.Parallel() as parallel:
        for expected in (0, N):
            assert parallel(joblib.delayed(np.sum)(array) for _ in range(4)) == [expected] * 4
            array += 1


def test_results_can_be_written_to(store: Store, client: PlasmaClient) -> None:
    """Large ones lie in the store, small ones not; who writes to one changes nothing else."""
    with using(store):
        large, small = joblib.Parallel()(joblib.delayed(np.zeros)(n) for n in (N, 10))
    assert len(client.list()) == 1
    large += 1
    small += 1
    assert large.min() == small.min() == 1
    del large
    until(lambda: not client.list(), "it goes with the result")


def test_a_part_of_an_argument_that_comes_back_is_no_part_of_it(store: Store) -> None:
    """It can be written to, like any other result."""
    array = np.zeros(N)
    with using(store):
        (half, *_) = joblib.Parallel()(joblib.delayed(np.split)(array, 2) for _ in range(2))
    half[0] += 1
    assert not array.any()
    assert not half[1].any()


@pytest.mark.parametrize("options", [{"max_nbytes": None}, {"mmap_mode": None}])
def test_it_can_be_left_out(store: Store, client: PlasmaClient, options: Any) -> None:
    """Arrays are pickled then, as joblib has it."""
    with using(store, **options):
        seen = joblib.Parallel()(joblib.delayed(look)(np.arange(N)) for _ in range(2))
    assert all(writable and not place.startswith("shmplasma-") for _, place, writable in seen)
    assert not client.list()


def test_the_threshold_is_joblibs(store: Store) -> None:
    """What is smaller than ``max_nbytes`` is pickled."""
    with using(store, max_nbytes="10K"):
        below, above = joblib.Parallel()(
            joblib.delayed(look)(np.zeros(n, np.uint8)) for n in (9_000, 11_000)
        )
    assert not below[1].startswith("shmplasma-")
    assert above[1].startswith("shmplasma-")


def test_an_option_that_there_is_not(store: Store) -> None:
    """Is refused: the store that was meant would not be the one that is used."""
    with pytest.raises(TypeError, match="'sock'"), using(None, sock=store.store_socket_name):
        pass


def test_workers_end_when_they_were_idle(store: Store) -> None:
    """After as long as the backend was told."""
    with using(store, idle_worker_timeout=0.1):
        seen = joblib.Parallel()(joblib.delayed(look)(np.zeros(1)) for _ in range(2))
        until(lambda: not any(psutil.pid_exists(pid) for pid, *_ in seen), "they end")


def test_writing_to_arguments_is_refused(store: Store) -> None:
    """By name: joblib has modes for it, and a store has none."""
    with using(store, mmap_mode="r+"), pytest.raises(ValueError, match=r"mmap_mode='r\+'"):
        joblib.Parallel()(joblib.delayed(look)(np.zeros(N)) for _ in range(2))


def test_one_job_is_done_here(store: Store) -> None:
    """Without workers, as joblib has it."""
    with using(store, n_jobs=1):
        assert joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(2)) == [os.getpid()] * 2


def test_workers_are_kept_for_the_next_call(store: Store) -> None:
    """Of the same kind; others replace them."""
    with using(store):

        def workers(**options: Any) -> set[int]:
            task = joblib.delayed(look)
            return {pid for pid, *_ in joblib.Parallel(**options)(task([0]) for _ in range(20))}

        first = workers()
        assert workers() <= first
        assert not workers(n_jobs=3) & first


def test_a_task_that_fails_says_why(store: Store, client: PlasmaClient) -> None:
    """As itself; the next call works, and nothing stays in the store."""
    array = np.zeros(N)
    with using(store):
        with pytest.raises(ZeroDivisionError):
            joblib.Parallel()(joblib.delayed(lambda _, i: 1 // i)(array, i) for i in range(4))
        assert joblib.Parallel()(joblib.delayed(np.sum)(array) for _ in range(2)) == [0, 0]
    until(lambda: not client.list(), "the argument goes with the call")


def test_after_a_failure_arrays_are_still_stored(store: Store) -> None:
    """In the next call of the same `Parallel`, which has workers anew."""
    array = np.zeros(N)
    with using(store), joblib.Parallel() as parallel:
        with pytest.raises(ZeroDivisionError):
            parallel(joblib.delayed(lambda _, i: 1 // i)(array, i) for i in range(4))
        seen = parallel(joblib.delayed(look)(array) for _ in range(4))
    assert all(place.startswith("shmplasma-") for _, place, _ in seen)


def die_at_two(_: object, number: int) -> None:
    """Kill the worker, if the number is 2."""
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_noticed(store: Store) -> None:
    """As by joblib's own backend; the next call has new workers."""
    array = np.zeros(N)
    with using(store):
        with pytest.raises(TerminatedWorkerError):
            joblib.Parallel()(joblib.delayed(die_at_two)(array, i) for i in range(4))
        assert joblib.Parallel()(joblib.delayed(np.sum)(array) for _ in range(2)) == [0, 0]


def test_threads_have_workers_of_their_own(store: Store) -> None:
    """Two calls at once do not disturb each other."""
    array = np.ones(N)
    sums: list[Any] = []

    def call() -> None:
        backend = shmplasma.joblib.StoreBackend(socket=store.store_socket_name, nesting_level=0)
        with joblib.parallel_config(backend=backend, n_jobs=2):
            sums.extend(joblib.Parallel()(joblib.delayed(np.sum)(array) for _ in range(3)))

    with using(store):
        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sums == [N] * 6


def test_workers_of_threads_that_have_ended(store: Store) -> None:
    """They end when the next ones are started; `shutdown` ends those of all threads, which may call again."""

    def call() -> None:
        backend = shmplasma.joblib.StoreBackend(socket=store.store_socket_name, nesting_level=0)
        with joblib.parallel_config(backend=backend, n_jobs=2):
            assert joblib.Parallel()(joblib.delayed(abs)(i) for i in range(3)) == [0, 1, 2]

    def call_twice() -> None:
        call()
        called.set()
        shut_down.wait(60)
        call()
        done.append(1)

    called, shut_down = threading.Event(), threading.Event()
    done: list[int] = []
    with using(store):
        for _ in range(3):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        assert len(shmplasma.joblib._pools) == 1
        thread = threading.Thread(target=call_twice)
        thread.start()
        called.wait(60)
        shmplasma.joblib.shutdown()
        shut_down.set()
        thread.join()
    assert done


def test_a_generator_that_outlives_its_thread(store: Store) -> None:
    """Its workers stay as long as results are to come, whoever calls meanwhile."""
    made: list[Any] = []

    def make() -> None:
        backend = shmplasma.joblib.StoreBackend(socket=store.store_socket_name, nesting_level=0)
        with joblib.parallel_config(backend=backend, n_jobs=2):
            task = joblib.delayed(abs)
            made.append(joblib.Parallel(return_as="generator")(task(i) for i in range(40)))

    with using(store):
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        assert next(made[0]) == 0
        assert joblib.Parallel()(joblib.delayed(abs)(i) for i in range(4)) == [0, 1, 2, 3]
        assert list(made[0]) == list(range(1, 40))


def test_a_generator_of_results(store: Store) -> None:
    """Comes as they come, and the workers are there for the next."""
    with using(store):
        task = joblib.delayed(np.full)
        got = joblib.Parallel(return_as="generator")(task(N, i) for i in range(4))
        assert [array[0] for array in got] == [0, 1, 2, 3]


def test_scikit_learn_searches_a_grid(store: Store) -> None:
    """With the same result as alone, and without a temporary folder."""
    features, labels = make_classification(2_000, 50, random_state=1)
    grid = {"C": [0.01, 0.1, 1.0]}
    alone = GridSearchCV(LogisticRegression(), grid, cv=3).fit(features, labels)
    before = set(os.listdir(tempfile.gettempdir()))
    with using(store, max_nbytes="100K"):
        search = GridSearchCV(LogisticRegression(), grid, cv=3, n_jobs=2).fit(features, labels)
        assert set(os.listdir(tempfile.gettempdir())) == before
    assert search.best_params_ == alone.best_params_
    assert search.best_score_ == pytest.approx(alone.best_score_)


def test_it_has_a_store_of_its_own() -> None:
    """Which is kept for the next call, and ends with `shutdown`."""
    array = np.arange(N)
    place = ""
    with using(None, memory="50MB"):
        for _ in range(2):
            seen = joblib.Parallel()(joblib.delayed(look)(array) for _ in range(4))
            (place,) = {place for _, place, _ in seen}
            assert Path("/dev/shm", place).exists()
    assert not Path("/dev/shm", place).exists()


def test_a_store_of_its_own_that_was_killed_is_replaced() -> None:
    """At the next call."""
    array = np.ones(N)
    with using(None, memory="50MB"):
        for _ in range(2):
            assert joblib.Parallel()(joblib.delayed(np.sum)(array) for _ in range(2)) == [N, N]
            server = shmplasma.joblib._store
            assert server is not None
            server.process.kill()
            server.process.wait()


def test_a_store_of_its_own_is_replaced_within_a_parallel() -> None:
    """Whose next call has workers anew, and stores what is large."""
    array = np.ones(N)
    with using(None, memory="50MB"), joblib.Parallel() as parallel:
        for _ in range(2):
            seen = parallel(joblib.delayed(look)(array) for _ in range(2))
            assert all(place.startswith("shmplasma-") for _, place, _ in seen)
            server = shmplasma.joblib._store
            assert server is not None
            server.process.kill()
            server.process.wait()
        assert len(shmplasma.joblib._pools) == 1


def test_a_store_that_was_started_anew(tmp_path: Path) -> None:
    """The next call goes by it, with the same workers."""
    array = np.ones(N)
    path = str(tmp_path / "store")
    store = Store("50MB", socket=path)
    with using(store), joblib.Parallel() as parallel:
        for _ in range(3):
            seen = parallel(joblib.delayed(look)(array) for _ in range(4))
            assert all(place.startswith("shmplasma-") for _, place, _ in seen)
            results = parallel(joblib.delayed(np.negative)(array) for _ in range(2))
            assert [each.sum() for each in results] == [-N, -N]
            del results
            store.close()
            store = Store("50MB", socket=path)
    store.close()


PROGRAM = """
    import sys
    import joblib, numpy as np
    import shmplasma.joblib

    def wait(array, i):
        print(array.sum(), flush=True)
        sys.stdin.readline() if i < 0 else __import__("time").sleep(600)

    with joblib.parallel_config(backend="shmplasma", n_jobs=2, memory="50MB"):
        joblib.Parallel()(joblib.delayed(wait)(np.ones(1_000_000), i) for i in range(4))
"""


def test_a_program_that_is_killed_leaves_nothing() -> None:
    """Its store ends, and takes segment and socket along, while the workers are still busy."""
    with Child(PROGRAM) as program:
        assert program.hear() == "1000000.0"
        family = psutil.Process(program.process.pid).children(recursive=True)
        (store,) = (each for each in family if "shmplasma.cli" in each.cmdline())
        maps = Path(f"/proc/{store.pid}/maps").read_text()
        names = {name for name in os.listdir("/dev/shm") if name in maps}
        assert names
        program.kill()
        store.wait(timeout=30)
        assert not names & set(os.listdir("/dev/shm"))
        for each in family:
            if each.is_running():
                each.kill()
        psutil.wait_procs(family)


def test_a_program_that_ends_leaves_nothing() -> None:
    """It ends its workers and its store by itself."""
    with Child(PROGRAM.replace("__import__", "0 and __import__")) as program:
        assert program.end() == 0
