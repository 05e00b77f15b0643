"""Dask: the workers of a host keep large results in its store, and pass references to each other.

`StorePlugin` gives a worker two things:

`StoreMapping`, its ``data``
    A result that is mostly arrays or Arrow data is taken apart: what is large goes into the store, and the result is put together
    again over that.  All else, and what the store has no room for, goes where Dask had kept it: to its `SpillBuffer`,
    say, which spills to disk.
A way to send them
    When a worker asks another for results, each part that lies in the store travels as a reference and a place in it
    (`shmplasma.sharing`).  The receiver finds it in the same place, and its own mapping leaves it there.

Who gets references
    A worker tells the identity of its store in the handshake of each connection that it makes.  Who is asked for data compares
    it with that of its own store.  The identity is a random token in the segment, so it is the same only on the same
    host, whatever addresses and containers say.  Everybody else gets the bytes, as ever: workers of other hosts, workers
    without the plugin, the scheduler and clients.

Lifetimes
    Nothing here counts.  A view keeps the reference that it was made by, and a mapping keeps views: so an object lives while some worker
    has a result that shows part of it, or a message is under way.  A worker that dies takes its references with it.  What other workers
    have got from it they have by references of their own: it stays.  What only it had goes, from the store as from Dask's
    books, and the scheduler has it computed again.  So the two always agree on what there is.

Memory
    Dask limits the resident memory of a worker, and that counts the pages of the store that it has touched.  ``evict`` gives those back
    first, which costs nothing: the data stays in the store, and comes back when it is touched.  Only then does it spill.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, Final

import cloudpickle

from shmplasma.arrow_errors import NotConnectedError, PlasmaObjectNotFound
from shmplasma.endpoint import default_socket_path
from shmplasma.extras import needed_by
from shmplasma.sharing import DEFAULT_MIN_BYTES, Sharing

with needed_by("shmplasma.dask", "dask"):
    from distributed import Worker, WorkerPlugin
    from distributed.protocol.serialize import register_serialization_family
    from distributed.sizeof import safe_sizeof

__all__ = ["StoreMapping", "StorePlugin"]

_FAMILY: Final = "shmplasma"
_INBAND_SHARE: Final = 10
"""A value is worth taking apart if what stays in the pickle is at most a tenth of it."""

_sharings: Final[dict[str, Sharing]] = {}
"""Of this process's plugins, by the identity of the store."""


class StoreMapping(MutableMapping[Any, Any]):
    """What a worker keeps: the large values in a store, the others as before.

    Parameters
    ----------
    socket : str, optional
        Path of the store's socket; where `shmplasma-store` serves by default if not given.
    inner : mutable mapping, optional
        Keeps values that are small or find no room in the store; a dict if not given.  Dask's `SpillBuffer` spills
        them.
    min_bytes : int, optional
        Smaller arrays are not put into the store.

    Raises
    ------
    NotConnectedError
        No store answers there.

    Notes
    -----
    Not thread-safe, nor is Dask's own: a worker uses it in its event loop.  Arrays in the values that it returns are
    read-only.
    """

    def __init__(
        self,
        socket: str | None = None,
        *,
        inner: MutableMapping[Any, Any] | None = None,
        min_bytes: int = DEFAULT_MIN_BYTES,
    ) -> None:
        self.sharing: Final = Sharing(socket or default_socket_path(), min_bytes)
        self._inner: MutableMapping[Any, Any] = {} if inner is None else inner
        self._shared: dict[Any, tuple[Any, Sequence[Any]]] = {}
        """Each value, and what of it lies in the store."""
        self._resident: dict[Any, None] = {}
        """Keys of shared values whose pages may be this process's, the one not used for longest first."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self._shared.pop(key, None)
        self._resident.pop(key, None)
        kept = _kept(value, self.sharing)
        if kept is None:
            self._inner[key] = value
            return
        if key in self._inner:
            del self._inner[key]
        self._shared[key] = kept
        self._resident[key] = None

    def __getitem__(self, key: Any) -> Any:
        if key not in self._shared:
            return self._inner[key]
        self._resident.pop(key, None)
        self._resident[key] = None
        return self._shared[key][0]

    def __delitem__(self, key: Any) -> None:
        if key not in self._shared:
            del self._inner[key]
            return
        del self._shared[key]
        self._resident.pop(key, None)

    def __contains__(self, key: object) -> bool:
        # By the inner mapping's own way: to get an item may bring it back from disk.
        return key in self._shared or key in self._inner

    def __iter__(self) -> Iterator[Any]:
        yield from self._shared
        yield from self._inner

    def __len__(self) -> int:
        return len(self._shared) + len(self._inner)

    @property
    def shared(self) -> Sequence[Any]:
        """The keys of values that lie in the store."""
        return tuple(self._shared)

    @property
    def fast(self) -> Any:
        """What can be evicted, for Dask's memory monitor; empty if there is nothing."""
        return self._resident or self._inner_fast

    @property
    def _inner_fast(self) -> Any:
        return getattr(self._inner, "fast", ())

    def evict(self) -> int:
        """Free memory of this process: give back the pages of one shared value, or spill one other.

        Returns
        -------
        int
            Bytes that were freed; -1 if nothing could be.
        """
        if self._resident:
            key = next(iter(self._resident))
            del self._resident[key]
            return sum(self.sharing.give_back(part) for part in self._shared[key][1])
        if not self._inner_fast:
            return -1
        freed: int = self._inner.evict()  # type: ignore[attr-defined]  # what has the one has the other
        return freed

    @property
    def spilled_total(self) -> Any:
        """What the inner mapping has spilled, if it does."""
        return self._inner.spilled_total  # type: ignore[attr-defined]  # Dask expects an AttributeError


class StorePlugin(WorkerPlugin):  # type: ignore[misc]  # distributed has no types
    """Gives each worker a `StoreMapping`, and has workers of one store exchange references.

    Parameters
    ----------
    socket : str, optional
        Path of the store's socket, the same on each host for the host's own store; where `shmplasma-store` serves by
        default if not given.
    min_bytes : int, optional
        Smaller arrays go the usual way.

    Notes
    -----
    ``client.register_plugin(StorePlugin(path))``.  On a host where no store answers at that path, the plugin cannot be
    set up.
    """

    name = _FAMILY

    def __init__(self, socket: str | None = None, *, min_bytes: int = DEFAULT_MIN_BYTES) -> None:
        self._socket = socket
        self._min_bytes = min_bytes

    def setup(self, worker: Worker) -> None:
        """Put the mapping around what the worker keeps, and announce the store."""
        data = worker.data
        if not isinstance(data, StoreMapping):
            data = StoreMapping(self._socket, inner=data, min_bytes=self._min_bytes)
            worker.state.data = worker.memory_manager.data = data
        identity = data.sharing.store_identity
        _sharings[identity] = data.sharing
        arguments = worker.rpc.connection_args
        overrides = arguments.get("handshake_overrides") or {}
        arguments["handshake_overrides"] = {**overrides, _FAMILY: identity}
        worker.handlers["get_data"] = _offering_references(worker, identity)

    def teardown(self, worker: Worker) -> None:
        """Exchange bytes again; results that are in the store stay there as long as the worker keeps them."""
        arguments = worker.rpc.connection_args
        overrides = arguments.get("handshake_overrides") or {}
        arguments["handshake_overrides"] = {
            name: value for name, value in overrides.items() if name != _FAMILY
        }
        worker.handlers["get_data"] = worker.get_data


def _offering_references(worker: Worker, identity: str) -> Callable[..., Any]:
    """Return a worker's handler of requests for data that lets those of the same store have references."""

    async def get_data(
        comm: Any, keys: Any, who: str | None = None, serializers: list[str] | None = None
    ) -> Any:
        if serializers is None and comm.remote_info.get(_FAMILY) == identity:
            serializers = [_FAMILY, "dask", "pickle"]
        return await worker.get_data(comm, keys, who=who, serializers=serializers)

    return get_data


# --- the family of serializers --------------------------------------------------------------------------


def _dumps(value: Any, context: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[bytes]]:
    """Serialize a value as references, for a recipient of the same store.

    Raises
    ------
    NotImplementedError
        There is nothing to refer to, or no store: Dask's word for "not of this family", at which it goes on with the next one.
    """
    recipient = (context or {}).get("recipient", {})
    sharing = _sharings.get(recipient.get(_FAMILY, ""))
    if sharing is not None:
        with suppress(NotConnectedError):  # the bytes of a value need no store
            apart = _stored(value, sharing)
            if apart is not None:
                body, _, kept = apart
                return {}, [body, _referred(kept, sharing)]
    # No stub: by this type alone `distributed.protocol.serialize` is told that a value is not of this family, and goes on with the next one.
    raise NotImplementedError("there is no store in common, nothing large, or no room in it")


def _referred(kept: Sequence[Any], sharing: Sharing) -> bytes:
    """Return a pickle of values that lie in the store, as references."""
    sink = io.BytesIO()
    pickler = pickle.Pickler(sink, pickle.HIGHEST_PROTOCOL)
    table: dict[type, Any] = {**copyreg.dispatch_table, **sharing.reducers}
    pickler.dispatch_table = table
    pickler.dump(kept)
    return sink.getvalue()


def _loads(_: dict[str, Any], frames: list[bytes]) -> Any:
    body, parts = frames
    try:
        kept = pickle.loads(parts)
    except PlasmaObjectNotFound as error:
        # After an `OSError` Dask closes the connection and asks again; after others it goes on in the midst of a conversation.
        raise ConnectionError(f"a result has gone on its way: {error}") from error
    return _together(bytes(body), kept)


register_serialization_family(_FAMILY, _dumps, _loads)


# --- taking values apart --------------------------------------------------------------------------------


def _kept(value: Any, sharing: Sharing) -> tuple[Any, Sequence[Any]] | None:
    """Return a value as it lies in the store, and its parts there; None if it is to stay as it is."""
    apart = _stored(value, sharing)
    if apart is None:
        return None
    body, parts, kept = apart
    if all(mine is theirs for mine, theirs in zip(kept, parts, strict=True)):
        return value, parts
    try:
        return _together(body, kept), kept
    except Exception:  # noqa: BLE001  # as little as what cannot be pickled
        return None


def _stored(value: Any, sharing: Sharing) -> tuple[bytes, list[Any], list[Any]] | None:
    """Return a pickle of a value, what was left out of it, and that as it lies in the store; None if it is to stay as it is."""
    apart = _apart(value, sharing)
    if apart is None:
        return None
    body, parts = apart
    kept = [sharing.keep(part) for part in parts]
    return None if any(part is None for part in kept) else (body, parts, kept)


def _apart(value: Any, sharing: Sharing) -> tuple[bytes, list[Any]] | None:
    """Return a pickle of a value and what was left out of it; None if that is not most of it."""
    size = safe_sizeof(value)
    if size < sharing.min_bytes:
        return None
    sink = _Sink(size // _INBAND_SHARE)
    pickler = _Pickler(sink, sharing)
    try:
        pickler.dump(value)
    except Exception:  # noqa: BLE001  # whatever cannot be pickled stays as it is; Dask says so if it must be sent
        return None
    return (sink.getvalue(), pickler.parts) if pickler.parts else None


class _TooMuchError(Exception):
    """More has to stay in the pickle than is worth it."""


class _Sink(io.BytesIO):
    """Takes so many bytes and no more."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self._limit:
            raise _TooMuchError
        return super().write(data)


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]  # cloudpickle has no types
    """Leaves out what is large."""

    def __init__(self, sink: io.BytesIO, sharing: Sharing) -> None:
        super().__init__(sink, pickle.HIGHEST_PROTOCOL)
        self._sharing = sharing
        self._numbers: dict[int, int] = {}
        self.parts: list[Any] = []

    def persistent_id(self, value: Any) -> int | None:
        """Return the number of what is left out, None for what is not."""
        if not self._sharing.passes(value):
            return None
        number = self._numbers.setdefault(id(value), len(self.parts))
        if number == len(self.parts):
            self.parts.append(value)
        return number


class _Unpickler(pickle.Unpickler):
    def __init__(self, body: bytes, parts: Sequence[Any]) -> None:
        super().__init__(io.BytesIO(body))
        self._parts = parts

    def persistent_load(self, number: Any) -> Any:
        return self._parts[number]


def _together(body: bytes, parts: Sequence[Any]) -> Any:
    return _Unpickler(body, parts).load()
