"""``python -m benchmarks.flight``: a table out of a store by Arrow Flight, beside the same table out of plain Flight's memory.

Both servers are processes of their own, on the loopback interface, and take turns; a reader goes through the batches and keeps
none.  Plain Flight serves the table as it is, in one batch, and once more in the pieces that shmplasma makes of it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

import numpy as np
import pyarrow as pa
from pyarrow import flight

from benchmarks.machine import describe
from shmplasma import Store, connect
from shmplasma.flight import fetch, pieces
from shmplasma.flight_server import StoreFlightServer
from shmplasma.sizes import parse_size

__all__ = ["main"]

_COLUMNS: Final = 8


class _MemoryServer(flight.FlightServerBase):
    """Serves one table, whole or in pieces."""

    def __init__(self, table: pa.Table) -> None:
        self._tables = {
            b"whole": table,
            b"pieces": pa.Table.from_batches(list(pieces(table)), table.schema),
        }
        super().__init__("grpc://127.0.0.1:0")

    def do_get(
        self,
        context: flight.ServerCallContext,  # noqa: ARG002 - Flight's signature
        ticket: flight.Ticket,
    ) -> flight.RecordBatchStream:
        return flight.RecordBatchStream(self._tables[ticket.ticket])


def _table(size_bytes: int) -> pa.Table:
    rows = size_bytes // 8 // _COLUMNS
    return pa.table({f"c{n}": pa.array(np.arange(n, n + rows)) for n in range(_COLUMNS)})


def _serve(what: str, argument: str) -> None:
    """Run one of the servers until the standard input ends."""
    server: flight.FlightServerBase
    if what == "memory":
        server = _MemoryServer(_table(int(argument)))
    else:
        server = StoreFlightServer(connect(argument))
    print(server.port, flush=True)
    sys.stdin.read()
    server.shutdown()


@contextmanager
def _served(what: str, argument: str) -> Iterator[flight.FlightClient]:
    program = [sys.executable, "-m", "benchmarks.flight", "--serve", what, argument]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with flight.connect(f"grpc://127.0.0.1:{int(process.stdout.readline())}") as flights:
            yield flights
        process.stdin.close()


def _read(flights: flight.FlightClient, ticket: bytes, rows: int) -> None:
    got = 0
    for chunk in flights.do_get(flight.Ticket(ticket)):
        assert chunk.data is not None
        got += chunk.data.num_rows
    assert got == rows, f"{got} rows came of {rows}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser("python -m benchmarks.flight", description=__doc__)
    parser.add_argument("--size", type=parse_size, default=10**9, help="of the table (1GB)")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median counts (7)")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        _serve(*options.serve)
        return 0
    size = options.size
    with ExitStack() as stack:
        enter = stack.enter_context
        store, near = (enter(Store(size + size // 8 + (1 << 20))) for _ in range(2))
        client, here = enter(store.connect()), enter(near.connect())
        table = _table(size)
        object_id, rows = client.put(table), table.num_rows
        del table
        ours = enter(_served("store", store.store_socket_name))
        plain = enter(_served("memory", str(size)))

        def fetch_it() -> None:
            fetch(here, ours, object_id)

        cases: dict[str, Callable[[], object]] = {
            "shmplasma, do_get": lambda: _read(ours, object_id.binary(), rows),
            "plain Flight, do_get, the table as it is": lambda: _read(plain, b"whole", rows),
            "plain Flight, do_get, in the same pieces": lambda: _read(plain, b"pieces", rows),
            "shmplasma, fetch into another store": fetch_it,
        }
        seconds: dict[str, list[float]] = {case: [] for case in cases}
        for _ in range(options.rounds):
            for case, run in cases.items():
                begin = time.perf_counter()
                run()
                seconds[case].append(time.perf_counter() - begin)
                here.delete(object_id)
    for key, value in describe().items():
        print(f"{key}: {value}")
    print(f"\n| {size / 1e9:g} GB | GB/s | ours is |\n| --- | --- | --- |")
    medians = {case: statistics.median(times) for case, times in seconds.items()}
    base = medians["shmplasma, do_get"]
    for case, median in medians.items():
        print(f"| {case} | {size / median / 1e9:.3g} | {median / base:.2f} times as fast |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
