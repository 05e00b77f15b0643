"""joblib: a backend that passes large arrays through a store.

Importing this module registers it::

    import shmplasma.joblib

    with joblib.parallel_config(backend="shmplasma"):
        ...

joblib's own backend writes large arguments to files in a temporary folder and maps them.  This one puts them into a store, whose
memory goes with its owner, and has otherwise the same workers: loky's, as joblib ships it.

What is stored, and for how long
    An argument is stored when it is first pickled for a worker, and remembered until the call of `Parallel` ends, whatever becomes
    of the original: so it is not compared with it for each task.  joblib does the same with its files.  After the call only
    those hold it who still use it.
    A large result is stored by the worker, and comes back as an array that can be written to: a private mapping, of which only
    the pages that are written take memory.

Whose the store is
    Of the process that calls `Parallel`: started at its first call, ended with it, however it ends, and then swept up as all embedded
    stores are (`shmplasma.orphans`).  With ``socket=`` it is somebody else's, and many programs may use it.

Workers are kept for the next call, as joblib does, and end after 300 s without work.  `shutdown` ends them and the store at once.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from shmplasma.backing import default_capacity
from shmplasma.client import connect
from shmplasma.embedded import Store
from shmplasma.errors import ShmPlasmaError
from shmplasma.extras import needed_by
from shmplasma.objects import ObjectID
from shmplasma.sharing import Sharing
from shmplasma.store_ref import StoreRef

with needed_by("shmplasma.joblib", "joblib"):
    import joblib
    from joblib.externals.loky.process_executor import ProcessPoolExecutor
    from joblib.parallel import (
        AutoBatchingMixin,
        FallbackToBackend,
        LokyBackend,
        ParallelBackendBase,
        SequentialBackend,
    )

__all__ = ["StoreBackend", "shutdown"]

_IDLE_SECONDS: Final = 300
"""joblib's own."""
_NEVER: Final = 1 << 62
"""No array has so many bytes."""


class StoreBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]  # joblib has no types
    """The backend ``"shmplasma"`` of joblib.

    Parameters
    ----------
    socket : str, optional
        Path of the socket of the store to use; a store is started if not given.
    memory : int or str, optional
        Capacity of the store that is started, in bytes or as "4GB"; 30 % of the free shared memory if not given.  Only the
        first call starts one.
    idle_worker_timeout : float, optional
        After how many seconds without work a worker ends; 300 if not given.
    nesting_level, inner_max_num_threads : int, optional
        What joblib gives every backend.

    Notes
    -----
    Of the arguments of `joblib.Parallel` about memmapping, these apply: ``max_nbytes``, the size from which on arrays
    and Arrow data pass through the store (None: none do); and ``mmap_mode``, which is "r", as workers get read-only
    arrays, or None, which is the same as ``max_nbytes=None``.  There is no temporary folder.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True

    # What of joblib's backend for these workers has nothing to do with files.
    effective_n_jobs = LokyBackend.effective_n_jobs
    submit = LokyBackend.submit
    retrieve_result_callback = LokyBackend.retrieve_result_callback

    def __init__(
        self,
        *,
        socket: str | None = None,
        memory: int | str | None = None,
        idle_worker_timeout: float = _IDLE_SECONDS,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        self._socket = socket
        self._memory = memory
        self._idle_seconds = idle_worker_timeout
        self._workers: ProcessPoolExecutor | None = None
        self._pool: _Pool | None = None
        self._wanted: _Settings | None = None

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        *,
        max_nbytes: int | None = None,
        mmap_mode: str | None = "r",
        idle_worker_timeout: float | None = None,
        **_: object,
    ) -> int:
        """Have workers ready; return how many (for joblib)."""
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        if mmap_mode not in ("r", None):
            raise ValueError(
                f"mmap_mode={mmap_mode!r} lets workers write to arguments, and what is in a store never changes; "
                "leave it at 'r', and let a worker that has to write make a copy"
            )
        self.parallel = parallel
        self._wanted = _Settings(
            n_jobs,
            self._idle_seconds if idle_worker_timeout is None else idle_worker_timeout,
            tuple(sorted(self._prepare_worker_env(n_jobs).items())),
            _store_path(self._socket, self._memory),
            _NEVER if max_nbytes is None or mmap_mode is None else max_nbytes,
        )
        self._begin()
        return n_jobs

    def _begin(self) -> None:
        assert self._wanted is not None
        self._pool = _pool(self._wanted)
        self._pool.n_calls += 1
        self._workers = self._pool.workers

    def start_call(self) -> None:
        """Have workers of the store that there is by now: one of our own that was killed has another path (for joblib)."""
        assert self._wanted is not None
        wanted = replace(self._wanted, path=_store_path(self._socket, self._memory))
        if wanted != self._wanted:
            self.terminate()
            self._wanted = wanted
            self._begin()

    def stop_call(self) -> None:
        """Forget what was stored for a call (for joblib)."""
        if self._pool is not None:
            self._pool.arguments.forget()

    def terminate(self) -> None:
        """Leave the workers for the next call (for joblib)."""
        self.stop_call()
        if self._pool is not None:
            self._pool.n_calls -= 1
        self._workers = self._pool = None
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Kill what is being done (for joblib)."""
        if self._pool is not None:
            self._pool.end(kill=True)
        self._workers = self._pool = None
        if ensure_ready:
            self._begin()


joblib.register_parallel_backend("shmplasma", StoreBackend)


# --- the workers ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Settings:
    """What workers are started with; who wants others gets others."""

    n_workers: int
    idle_seconds: float
    environment: tuple[tuple[str, str], ...]
    path: str
    min_bytes: int


class _Pool:
    """Workers of a thread, what passes to them and back, and how many calls use them."""

    def __init__(self, settings: _Settings) -> None:
        self.settings = settings
        self.thread = threading.current_thread()
        self.n_calls = 0
        self.arguments = _Arguments(settings.path, settings.min_bytes)
        self.workers = ProcessPoolExecutor(
            settings.n_workers,
            job_reducers=self.arguments.reducers,
            result_reducers=_Results(settings.path, settings.min_bytes).reducers,
            timeout=settings.idle_seconds,
            env=dict(settings.environment),
        )

    @property
    def is_usable(self) -> bool:
        """Whether the workers take tasks: none has died, and nobody has ended them."""
        flags = self.workers._flags  # noqa: SLF001  # loky says so nowhere else
        return not (flags.broken or flags.shutdown)

    def end(self, *, kill: bool) -> None:
        """End the workers; when they are killed, with all that was on its way to them."""
        self.workers.shutdown(kill_workers=kill)
        if kill:
            self.arguments.delete()
        self.arguments.forget()


class _State(threading.local):
    """What a thread keeps for its next call: as in joblib, workers are not shared by threads."""

    pool: _Pool | None = None


_state: Final = _State()
_pools: Final[list[_Pool]] = []
_lock: Final = threading.Lock()
_store: Store | None = None


def _pool(wanted: _Settings) -> _Pool:
    pool = _state.pool
    if pool is not None:
        if pool.settings == wanted and pool.is_usable:
            return pool
        _end(pool)
    for other in tuple(_pools):
        # A generator of results goes on when the thread that has made it has ended.
        if not other.thread.is_alive() and not other.n_calls:
            _end(other)
    pool = _state.pool = _Pool(wanted)
    _pools.append(pool)
    return pool


def _end(pool: _Pool) -> None:
    try:
        _pools.remove(pool)
    except ValueError:  # `shutdown` has ended it, in another thread
        return
    pool.end(kill=False)


def _store_path(socket: str | None, memory: int | str | None) -> str:
    """Return the path of the store to use, and start one if need be."""
    global _store  # noqa: PLW0603  # one a process
    if socket is not None:
        return os.path.abspath(socket)
    with _lock:
        if _store is not None and _store.process.poll() is not None:
            _store.close()  # it was killed
            _store = None
        if _store is None:
            _store = Store(default_capacity() if memory is None else memory)
        return _store.store_socket_name


def shutdown() -> None:
    """End the workers and the store that were kept for the next call, which starts new ones."""
    global _store  # noqa: PLW0603  # one a process
    while _pools:
        _pools.pop().end(kill=False)
    _state.pool = None
    with _lock:
        if _store is not None:
            _store.close()
            _store = None


atexit.register(shutdown)


def _leave_to_parent() -> None:
    global _store  # noqa: PLW0603  # one a process
    _state.pool = _store = None
    _pools.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


# --- what passes ----------------------------------------------------------------------------------------


class _Arguments(Sharing):
    """Reducers for what goes to the workers: what was stored is taken for unchanged until it is forgotten."""

    def __init__(self, path: str, min_bytes: int) -> None:
        super().__init__(path, min_bytes)
        self._ids: set[ObjectID] = set()

    @property
    def reducers(self) -> dict[type, Callable[[Any], Any]]:
        """What to enter into a pickler's table, by type."""
        return {**super().reducers, np.memmap: self.reduce_array}

    def forget(self) -> None:
        """Let go of what was stored."""
        self._stored.clear()
        self._ids.clear()

    def delete(self) -> None:
        """Delete what was stored: references on their way to workers that were killed would keep it."""
        path = self._home.store_socket_name
        # A store that has gone has taken it along.
        with suppress(ShmPlasmaError, OSError), connect(path, num_retries=0) as client:
            client.delete(self._ids)

    def _store(self, value: Any, _: Callable[[Any, StoreRef], bool]) -> StoreRef | None:
        return super()._store(value, lambda *_: True)

    def _put(self, value: Any) -> StoreRef | None:
        ref = super()._put(np.asarray(value) if isinstance(value, np.memmap) else value)
        if ref is not None:
            self._ids.add(ref.object_id)
        return ref


class _Results(Sharing):
    """Reducers for what comes back: arrays that can be written to, as those of joblib's own backend."""

    def reduce_array(self, array: np.ndarray[Any, Any]) -> Any:
        """Reduce an array."""
        large = self.passes(array)
        ref = self._put(array) if large else None
        return array.__reduce_ex__(4) if ref is None else (_own, (ref,))


def _own(ref: StoreRef) -> Any:
    return ref.get(mode="cow")
