"""What is measured, and how: the same for every peer.

A case returns samples in seconds an operation, bytes a second, operations a second or bytes, as its rows say.  An operation is prepared
before and cleaned up after the time is taken.  Hot gets hold no reference between two gets: while one is held, Plasma answers without its store.
"""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import repeat
from os import urandom
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from benchmarks.crew import Crew
from benchmarks.peers.base import Client, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from benchmarks.peers.base import Operation, Peer

__all__ = ["CASES", "Bench", "Case", "Row", "p99"]

_MIB: Final = 1 << 20
_SMALL: Final = 100 * b"x"
_LISTED: Final = (10, 1000)
_KIBIBYTE: Final = 1024 * b"x"
_ARRAY_ITEMS: Final = 1_000_000
_FRAME_ROWS: Final = 1_000_000
_PUT_MIB: Final = (1, 8, 64, 512)
_TURNS: Final = 6
"""In a virtual machine two threads may copy twice as fast in one second as in the next; so each peer has a turn in more than one of these."""
_TURN_SECONDS: Final = 0.5
"""After so long in a turn no further put is begun: a peer that is so slow needs no more samples."""
_WARM_UP_MIB: Final = 64
"""So much is put before large puts are timed: what is used again and again has been touched then, by all peers."""
_CLIENTS: Final = (1, 2, 4, 8)
_HALF_HEADERS: Final = 100
_STALLED_AFTER_SECONDS: Final = 3.0
_BLOCKED_AFTER_SECONDS: Final = 0.002
"""How long the putter leaves the getter to fall asleep."""


class Bench:
    """One peer at work: its running server, our connection, and further processes; a context manager."""

    def __init__(self, peer: Peer[Any], *, quick: bool) -> None:
        self.peer = peer
        self.quick = quick
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.peer.serve())
        self.client: Client[Any] = self.peer.connect()
        self._stack.callback(self.client.close)
        self.crew = self._stack.enter_context(Crew(self.peer))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def less(self, number: int) -> int:
        """Return a number of repetitions, reduced for a quick run."""
        return max(1, number // 20) if self.quick else number

    @property
    def seconds(self) -> float:
        """How long a load of several clients lasts."""
        return 0.05 if self.quick else 0.4


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report: a statistic over a case's samples."""

    title: str
    unit: str
    statistic: Callable[[Sequence[float]], float] = median

    @property
    def more_is_better(self) -> bool:
        """Whether it is a rate."""
        return self.unit.endswith("/s")


@dataclass(frozen=True, slots=True)
class Case:
    """Something to measure, in every round unless `once`; in each round the peers take so many turns."""

    name: str
    run: Callable[[Bench], list[float]]
    rows: tuple[Row, ...]
    once: bool = False
    turns: int = 1


def p99(samples: Sequence[float]) -> float:
    """Return the 99th percentile."""
    if len(samples) < 2:
        return samples[0]
    return quantiles(samples, n=100, method="inclusive")[98]


def _time(operation: Operation, bench: Bench) -> list[float]:
    now = time.perf_counter
    n_operations, elapsed = 1, 0.0
    while elapsed < 0.005:
        n_operations *= 2
        began = now()
        for _ in repeat(None, n_operations):
            operation()
        elapsed = now() - began
    samples = []
    for _ in range(bench.less(7)):
        began = now()
        for _ in repeat(None, n_operations):
            operation()
        samples.append((now() - began) / n_operations)
    return samples


def _time_get(
    bench: Bench,
    store: Callable[[Any], None],
    prepare: Callable[[Any], Operation],
) -> list[float]:
    key = bench.client.key(urandom(20))
    operation = prepare(key)
    store(key)
    try:
        return _time(operation, bench)
    finally:
        bench.client.drop([key])


def _get_raw(bench: Bench) -> list[float]:
    client = bench.client
    return _time_get(bench, lambda key: client.store_raw(key, _SMALL), client.get_raw)


def _get_object(bench: Bench) -> list[float]:
    client = bench.client
    return _time_get(bench, lambda key: client.store_object(key, _SMALL), client.get_object)


def _get_array(bench: Bench) -> list[float]:
    client, array = bench.client, np.arange(_ARRAY_ITEMS, dtype=np.float64)
    return _time_get(bench, lambda key: client.store_array(key, array), client.get_array)


def _contains(bench: Bench) -> list[float]:
    client = bench.client
    return _time_get(bench, lambda key: client.store_raw(key, _SMALL), client.contains)


def _contains_missing(bench: Bench) -> list[float]:
    return _time(bench.client.contains(bench.client.key(urandom(20))), bench)


def _get_missing(bench: Bench) -> list[float]:
    return _time(bench.client.get_missing(bench.client.key(urandom(20))), bench)


def _get_new(bench: Bench) -> list[float]:
    client, crew, samples = bench.client, bench.crew, []
    crew.ask(0, "ready")
    names = [urandom(20) for _ in range(bench.less(400))]
    for name in names:
        get = client.get_raw(client.key(name))
        crew.ask(0, "store", name, _SMALL)
        began = time.perf_counter()
        get()
        samples.append(time.perf_counter() - began)
    client.drop([client.key(name) for name in names])
    return samples


def _list(n_objects: int) -> Callable[[Bench], list[float]]:
    def list_all(bench: Bench) -> list[float]:
        client, operation = bench.client, bench.client.list_all()
        put = client.put_raw(_SMALL)
        keys = [put() for _ in range(n_objects)]
        try:
            return _time(operation, bench)
        finally:
            client.drop(keys)

    return list_all


def _delete(bench: Bench) -> list[float]:
    client, samples = bench.client, []
    put = client.put_raw(_SMALL)
    for _ in range(bench.less(7)):
        keys = [put() for _ in range(bench.less(200))]
        began = time.perf_counter()
        for key in keys:
            client.drop([key])
        samples.append((time.perf_counter() - began) / len(keys))
    return samples


def _get_many(bench: Bench) -> list[float]:
    client = bench.client
    keys = [client.key(urandom(20)) for _ in range(1000)]
    operation = client.get_many(keys)
    for key in keys:
        client.store_raw(key, _SMALL)
    try:
        return [sample / len(keys) for sample in _time(operation, bench)]
    finally:
        client.drop(keys)


def _time_put(put: Callable[[], Any], bench: Bench) -> list[float]:
    samples, n_operations = [], bench.less(200)
    for _ in range(bench.less(7)):
        began = time.perf_counter()
        keys = [put() for _ in repeat(None, n_operations)]
        samples.append((time.perf_counter() - began) / n_operations)
        bench.client.drop(keys)
    return samples


def _put_raw(bench: Bench) -> list[float]:
    return _time_put(bench.client.put_raw(_SMALL), bench)


def _put_object(bench: Bench) -> list[float]:
    return _time_put(bench.client.put_object(_SMALL), bench)


def _create(bench: Bench) -> list[float]:
    client = bench.client
    create, samples = client.create(_SMALL), []
    for _ in range(bench.less(7)):
        keys = [client.key(urandom(20)) for _ in range(bench.less(200))]
        began = time.perf_counter()
        for key in keys:
            create(key)
        samples.append((time.perf_counter() - began) / len(keys))
        client.drop(keys)
    return samples


def _each_put(put: Callable[[], Any], bench: Bench, number: int, warm_up: int = 1) -> list[float]:
    """Return how many seconds each of so many puts takes, or of fewer where they are slow."""
    for _ in range(bench.less(warm_up)):
        bench.client.drop([put()])
    samples: list[float] = []
    last = time.perf_counter() + _TURN_SECONDS
    while len(samples) < bench.less(number) and (began := time.perf_counter()) < last:
        key = put()
        samples.append(time.perf_counter() - began)
        bench.client.drop([key])
    return samples


def _put_large(mib: int, *, as_array: bool) -> Callable[[Bench], list[float]]:
    def put_large(bench: Bench) -> list[float]:
        size = mib * _MIB
        if size * 3 > bench.peer.capacity:
            raise UnsupportedError
        array = np.arange(size // 8, dtype=np.float64)
        put = bench.client.put_array(array) if as_array else bench.client.put_raw(array.tobytes())
        number, warm_up = max(4, min(20, 1024 // mib)), max(1, min(16, _WARM_UP_MIB // mib))
        return [size / seconds for seconds in _each_put(put, bench, number, warm_up)]

    return put_large


def _frame(bench: Bench) -> Any:
    """Return a data frame of ten columns of floats and one of strings."""
    try:
        import pandas as pd  # noqa: PLC0415 - not every peer's interpreter has it
    except ImportError as error:
        raise UnsupportedError from error
    rows = bench.less(_FRAME_ROWS)
    columns: dict[str, Any] = {f"x{n}": np.arange(rows, dtype=np.float64) + n for n in range(10)}
    return pd.DataFrame({**columns, "name": pd.array([f"row {n}" for n in range(rows)], "str")})


def _put_frame(bench: Bench) -> list[float]:
    return _each_put(bench.client.put_object(_frame(bench)), bench, 5)


def _get_frame(bench: Bench) -> list[float]:
    name = urandom(20)
    key = bench.client.key(name)
    bench.client.store_object(key, _frame(bench))
    try:
        samples: list[float] = bench.crew.ask(0, "get_frame", name, 1 + bench.less(5))
        return samples[1:]  # pandas is imported by the first
    finally:
        bench.client.drop([key])


def _time_hand_over(bench: Bench, give: Callable[[Any], object]) -> list[float]:
    crew, client, samples = bench.crew, bench.client, []
    crew.ask(0, "ready")
    names = [urandom(20) for _ in range(bench.less(400))]
    for name in names:
        crew.pipe(0).send(("take_over", name))
        time.sleep(_BLOCKED_AFTER_SECONDS)
        began = time.perf_counter()
        give(client.key(name))
        samples.append(crew.answer(0) - began)
    client.drop([client.key(name) for name in names])
    return samples


def _hand_over(bench: Bench) -> list[float]:
    client, pipe = bench.client, bench.crew.pipe(0)
    return _time_hand_over(bench, lambda key: client.hand_over(key, _KIBIBYTE, pipe))


def _hand_over_created(bench: Bench) -> list[float]:
    client = bench.client
    if type(client).create_for is Client.create_for:  # before anybody waits in vain
        raise UnsupportedError
    return _time_hand_over(bench, lambda key: client.create_for(key, _KIBIBYTE))


def _gets_together(n_clients: int) -> Callable[[Bench], list[float]]:
    def gets_together(bench: Bench) -> list[float]:
        name = urandom(20)
        key = bench.client.key(name)
        bench.client.store_raw(key, _SMALL)
        try:
            return [bench.crew.rate(n_clients, bench.seconds, "gets", name)]
        finally:
            bench.client.drop([key])

    return gets_together


def _puts_together(n_clients: int) -> Callable[[Bench], list[float]]:
    def puts_together(bench: Bench) -> list[float]:
        return [bench.crew.rate(n_clients, bench.seconds, "puts", _KIBIBYTE)]

    return puts_together


def _import(bench: Bench) -> list[float]:
    program = f"import time; t = time.perf_counter(); {bench.peer.imports}; print(time.perf_counter() - t)"
    return [
        float(subprocess.check_output([sys.executable, "-c", program]))
        for _ in range(bench.less(3))
    ]


def _start(bench: Bench) -> list[float]:
    began = time.perf_counter()
    with bench.peer.within("started").serve() as pid:
        if pid is None:
            raise UnsupportedError
        return [time.perf_counter() - began]


def _growth(bench: Bench) -> list[float]:
    peer, n_objects = bench.peer.within("filled"), bench.less(100_000)
    with peer.serve() as pid:
        if pid is None:
            raise UnsupportedError
        client = peer.connect()
        put = client.put_raw(_SMALL)
        for _ in range(100):
            put()
        before = _resident_bytes(pid)
        for _ in range(n_objects):
            put()
        growth = _resident_bytes(pid) - before
        client.close()
    return [growth / n_objects]


def _resident_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError as error:  # not Linux
        raise UnsupportedError from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def _beside_half_headers(bench: Bench) -> list[float]:
    path, half = bench.peer.half_message()
    name = urandom(20)
    key = bench.client.key(name)
    bench.client.store_raw(key, _SMALL)
    with Crew(bench.peer) as crew:
        crew.ask(0, "contains", name, 1)
        with ExitStack() as stack:
            for _ in range(_HALF_HEADERS):
                stalled = stack.enter_context(socket.socket(socket.AF_UNIX))
                stalled.connect(path)
                stalled.sendall(half)
            crew.pipe(0).send(("contains", name, bench.less(2000)))
            try:
                samples: list[float] = crew.answer(0, _STALLED_AFTER_SECONDS)
            except TimeoutError:
                samples = [math.inf]
    bench.client.drop([key])
    return samples


CASES: Final = (
    Case("get-raw", _get_raw, (Row("get of 100 B, raw", "µs"),)),
    Case("get-object", _get_object, (Row("get of 100 B, object", "µs"),)),
    Case("get-array", _get_array, (Row("get of an 8 MB array, until used", "µs"),)),
    Case("get-many", _get_many, (Row("get of 1,000 ids at once, each", "µs"),)),
    Case("contains", _contains, (Row("contains", "µs"),)),
    Case("contains-missing", _contains_missing, (Row("contains, of what is not there", "µs"),)),
    Case("get-missing", _get_missing, (Row("get of what is not there, without waiting", "µs"),)),
    Case("get-new", _get_new, (Row("get of what another process has just put", "µs"),)),
    *(
        Case(f"list-{n_objects}", _list(n_objects), (Row(f"list of {n_objects:,} objects", "µs"),))
        for n_objects in _LISTED
    ),
    Case("delete", _delete, (Row("delete of one object", "µs"),)),
    Case("put-raw", _put_raw, (Row("put of 100 B, raw", "µs"),)),
    Case("put-object", _put_object, (Row("put of 100 B, object", "µs"),)),
    Case("create", _create, (Row("create, fill and seal 100 B under a chosen id", "µs"),)),
    *(
        Case(
            f"put-{kind}-{mib}",
            _put_large(mib, as_array=kind == "array"),
            (Row(f"put of {mib} MiB, {kind}", "GB/s"),),
            turns=_TURNS,
        )
        for kind in ("raw", "array")
        for mib in _PUT_MIB
    ),
    Case(
        "put-frame",
        _put_frame,
        (Row("put of a data frame, 1,000,000 rows, 10 floats and a string", "ms"),),
    ),
    Case("get-frame", _get_frame, (Row("get of it in another process, until used", "ms"),)),
    Case(
        "hand-over",
        _hand_over,
        (
            Row("to a blocked getter in another process, median", "µs"),
            Row("to a blocked getter in another process, p99", "µs", p99),
        ),
    ),
    Case(
        "hand-over-created",
        _hand_over_created,
        (
            Row("the same, created, filled and sealed in three steps, median", "µs"),
            Row("the same, created, filled and sealed in three steps, p99", "µs", p99),
        ),
    ),
    *(
        Case(
            f"gets-{n_clients}",
            _gets_together(n_clients),
            (Row(f"gets of 100 B, {n_clients} client processes together", "k/s"),),
        )
        for n_clients in _CLIENTS
    ),
    *(
        Case(
            f"puts-{n_clients}",
            _puts_together(n_clients),
            (Row(f"puts of 1 KiB, {n_clients} client processes together", "k/s"),),
        )
        for n_clients in _CLIENTS
    ),
    Case(
        "half-headers",
        _beside_half_headers,
        (Row(f"contains beside {_HALF_HEADERS} half-open headers, p99", "µs", p99),),
    ),
    Case("import", _import, (Row("import in a fresh interpreter", "ms"),)),
    Case("start", _start, (Row("start of the store until it serves", "ms"),)),
    Case(
        "growth",
        _growth,
        (Row("growth of the server for each of 100,000 objects of 100 B", "B"),),
        once=True,
    ),
)
