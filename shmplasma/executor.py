"""An executor with a store of its own: arguments and results pass by reference.  Needs the extra ``[loky]``.

The workers are loky's: they take functions and classes of any kind, as cloudpickle does, and the death of a worker is
noticed.  What was submitted and not done then fails with loky's `TerminatedWorkerError`; what is submitted after
that goes to new workers.

A task, and a result, is a pickle of its own in what loky sends: what refers to the store in it is lent when that pickle is whole.  Of one that
fails nothing is on its way to anybody (`shmplasma.lending`).
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, ParamSpec, TypeVar

from shmplasma.client import PlasmaClient
from shmplasma.embedded import Store
from shmplasma.extras import needed_by
from shmplasma.lending import Loans
from shmplasma.sharing import DEFAULT_MIN_BYTES, Sharing
from shmplasma.store_ref import Loan, StoreRef

with needed_by("StoreExecutor", "loky"):
    from loky.backend.reduction import dumps
    from loky.process_executor import ProcessPoolExecutor

__all__ = ["StoreExecutor"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class _Bar:
    """A bar on standard error: tasks that are done, of those that were submitted.  Thread-safe."""

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415 - 50 ms, for those who want a bar
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TimeElapsedColumn,
        )

        columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("tasks", total=0)
        self._progress.start()

    def __call__(self, done: int, submitted: int) -> None:
        self._progress.update(self._task, completed=done, total=submitted)

    def stop(self) -> None:
        """Leave the bar as it is now."""
        self._progress.stop()


class _Whole:
    """A task, or a result; it arrives as what is in it."""

    __slots__ = ("content",)

    def __init__(self, content: object) -> None:
        self.content = content


class _Passing(Sharing):
    """Reducers that lend nothing for a pickle that fails."""

    @property
    def reducers(self) -> dict[type, Callable[[Any], Any]]:
        """What to enter into a pickler's table, by type."""
        return {**super().reducers, _Whole: self.reduce_whole}

    def reduce_whole(self, whole: _Whole) -> Any:
        """Reduce a task or a result."""
        loans: Loans = []
        lenders: dict[type, Callable[[Any], Any]] = {
            StoreRef: lambda ref: ref.reduce(1, loans),
            Loan: lambda loan: loan.reduce(loans),
        }
        data = dumps(whole.content, {**super().reducers, **lenders})
        for lend in loans:
            lend()
        return pickle.loads, (pickle.PickleBuffer(data),)


def _run(task: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]) -> Any:
    function, args, kwargs = task
    return _Whole(function(*args, **kwargs))


class StoreExecutor(Executor):
    """Runs functions in worker processes, to and from which arrays pass by reference.

    Parameters
    ----------
    max_workers : int, optional
        How many workers; one for each processor if not given.
    memory : int or str
        Capacity of its store, as for `Store`: room for the arguments and results that exist at the same time.
    min_bytes : int, optional
        Smaller arrays are pickled as usual.
    progress : bool or callable, optional
        True draws a bar on standard error; a callable is called as ``progress(done, submitted)`` whenever a task is
        done, in a thread of the executor.

    Attributes
    ----------
    store : Store
        Its store.
    client : PlasmaClient
        A client of that store: any part of the array ``client.put_ref(array).get()`` passes without a copy.

    Notes
    -----
    Thread-safe.  A context manager; leaving it waits for the tasks, and ends workers and store.  Results are read-only
    views that stay valid after that.  An array that is given to many tasks is stored once (see `shmplasma.sharing`).
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        memory: int | str,
        min_bytes: int = DEFAULT_MIN_BYTES,
        progress: bool | Callable[[int, int], object] = False,
    ) -> None:
        self._max_workers = max_workers
        self._bar: _Bar | None = None
        self._ended = False
        self._progress = progress if callable(progress) else None
        self._lock = threading.Lock()
        self._submitted = self._done = 0
        self.store = Store(memory)
        try:
            self.client: PlasmaClient = self.store.connect()
            self._sharing = _Passing(self.store.store_socket_name, min_bytes)
            self._workers = self._new_workers()
            if progress is True:  # the last, as it draws until it is stopped
                self._bar = _Bar()
        except BaseException:
            self.store.close()
            raise

    def _new_workers(self) -> ProcessPoolExecutor:
        reducers = self._sharing.reducers
        return ProcessPoolExecutor(
            self._max_workers, job_reducers=reducers, result_reducers=reducers
        )

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run a function in a worker.

        Returns
        -------
        Future
            The future of its result.

        Raises
        ------
        RuntimeError
            The executor was shut down.
        """
        task = _Whole((fn, args, kwargs))
        with self._lock:
            if self._ended:
                raise RuntimeError("this executor was shut down; make another one")
            try:
                future: Future[_T] = self._workers.submit(_run, task)
            except BrokenProcessPool:
                self._workers.shutdown(wait=False)
                self._workers = self._new_workers()
                future = self._workers.submit(_run, task)
            self._submitted += 1
            if self._bar is not None:
                self._bar(self._done, self._submitted)
        # It keeps this executor, and its store, until then.
        future.add_done_callback(partial(self._count, task))
        return future

    def _count(self, task: _Whole, _: object) -> None:
        # The thread that could not pickle a task keeps it until there is another one.
        task.content = None
        with self._lock:
            self._done += 1
            done, submitted = self._done, self._submitted
            if self._bar is not None:
                self._bar(done, submitted)
        if self._progress is not None:
            self._progress(done, submitted)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the workers, and then the store.

        Parameters
        ----------
        wait : bool, optional
            Whether to wait for the tasks; else they are killed.
        cancel_futures : bool, optional
            Whether to kill the tasks that are not done.
        """
        with self._lock:
            self._ended = True
        self._workers.shutdown(wait=True, kill_workers=cancel_futures or not wait)
        if self._bar is not None:
            self._bar.stop()
        self.client.disconnect()
        self.store.close()
