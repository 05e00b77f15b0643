"""A program that shares by a store in all the ways that there are; run with a start method by `test_sharing`."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

import shmplasma as plasma
from tests.clients import figure
from tests.processes import until

SIZE = 100_000


class Holder:
    """Something of a user's that has an array in it."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array


def look(value: Any) -> tuple[Any, ...]:
    """Return what a worker sees of a value, and something large made of it."""
    if isinstance(value, Holder):
        value = value.array
    if isinstance(value, pd.DataFrame):
        value = value["x"].to_numpy()
    if isinstance(value, pa.Table):
        value = value.column("x").chunk(0).to_numpy()
    return bool(value.flags.writeable), float(value.sum()), np.full(SIZE, value.sum())


def objects(client: plasma.PlasmaClient) -> int:
    """Return how many objects there are in the store."""
    return len(client.list())


def echo(pipe: Connection, queue: Any) -> None:
    """Send back what comes."""
    queue.put(pipe.recv() * 2)


def values(client: plasma.PlasmaClient) -> dict[str, Any]:
    """Return all sorts of values, of the same sum, and what lies in the store already."""
    numbers: Any = np.arange(SIZE, dtype=np.float64)
    twice = client.put_ref(np.concatenate([numbers, numbers])).get()
    table = pa.table({"x": numbers})
    longer: Any = np.concatenate([numbers[:10], numbers])
    shared = client.put_ref(pa.table({"x": longer})).get()
    return {
        "array": numbers,
        "F order": np.asfortranarray(numbers.reshape(100, -1)),
        "part": twice[SIZE:],
        "reversed": twice[SIZE - 1 :: -1],
        "in an object": Holder(numbers + 0),
        "table": table,
        "part of a table": shared.slice(10),
        "frame": pd.DataFrame({"x": numbers + 0, "s": "text"}),
    }


@contextmanager
def pool_of(n_workers: int, context: Any) -> Iterator[Any]:
    """Give a pool whose workers end by themselves.

    They have coverage's handler of SIGTERM at times, and one that is about to wait for a lock when `Pool.terminate` sends that waits on.
    """
    with context.Pool(n_workers) as pool:
        yield pool
        pool.close()
        pool.join()


def check_pool(client: plasma.PlasmaClient, context: Any) -> None:
    """Send all sorts of values to a pool, twice, and see what they are there, and what is stored."""
    sent = values(client)
    with pool_of(2, context) as pool:
        before = objects(client)
        for _ in range(2):
            for name, (writable, total, large) in zip(
                sent, pool.map(look, sent.values(), chunksize=1), strict=True
            ):
                assert not writable, name
                assert total == SIZE * (SIZE - 1) / 2, name
                assert not large.flags.writeable, name
                assert large[-1] == total, name
            del large
        # Parts of what lies there are not stored again, nor is what was sent before; a frame is two arrays, one small.
        until(lambda: objects(client) - before == 5, f"five objects more than {before} are there")
        writable, _, _ = pool.apply(look, (np.arange(10),))
        assert writable, "a small one is as ever"
        writable, _, _ = pool.apply(look, (np.array([{}] * SIZE).astype(bool).astype(object),))
        assert writable, "Python objects are as ever"
        array = sent["array"]
        assert pool.apply(look, (array,))[1] == SIZE * (SIZE - 1) / 2
        array[0] = 1000
        assert pool.apply(look, (array,))[1] == SIZE * (SIZE - 1) / 2 + 1000, "changed since"


def check_others(context: Any) -> None:
    """Pass arrays by a process's arguments, a pipe, a queue and an executor."""
    ours, theirs = context.Pipe()
    queue = context.Queue()
    process = context.Process(target=echo, args=(theirs, queue))
    process.start()
    ours.send(np.ones(SIZE))
    result = queue.get()
    assert result.sum() == 2 * SIZE
    assert not result.flags.writeable
    process.join()
    assert len(pickle.dumps(result)) > result.nbytes, "plain pickles know nothing of all this"
    for end in (ours, theirs):
        end.close()
    queue.close()
    queue.join_thread()
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        assert not executor.submit(look, np.ones(SIZE)).result()[0]


def check_full(client: plasma.PlasmaClient, context: Any) -> None:
    """Pass what does not fit any more."""
    refs = []
    try:
        while True:
            refs.append(client.put_ref(np.zeros(1_000_000)))
    except plasma.PlasmaStoreFull:
        pass
    with pool_of(1, context) as pool:
        writable, total, large = pool.apply(look, (np.ones(1_200_000),))
        assert (writable, total, large[0]) == (True, 1_200_000, 1_200_000)


def main(method: str) -> None:
    """Do all of it with a start method."""
    with plasma.Store("100MB") as store, store.connect() as client:
        with plasma.share(client, min_bytes=10_000):
            context = multiprocessing.get_context(method)
            check_pool(client, context)
            check_others(context)
            until(lambda: objects(client) == 0, "nothing is left")
            check_full(client, context)
        own: Any = plasma.get_context(method, client, min_bytes=10_000)
        check_others(own)
        del own
        reader, writer = multiprocessing.Pipe(duplex=False)
        writer.send(np.ones(1000))
        assert reader.recv().flags.writeable, "it is in force no more"
        reader.close()
        writer.close()
        until(lambda: figure(client, "referenced objects") == 0, "nothing is left")


if __name__ == "__main__":
    main(sys.argv[1])
