from __future__ import annotations

import os
import pickle
import subprocess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shmplasma import ObjectID, PlasmaClient, get_context, share
from shmplasma.reading import Mode
from tests.processes import STRICT, run_python

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_all_that_multiprocessing_has(method: str) -> None:
    """Pools, pipes, queues, arguments and executors pass arrays as read-only views, and leave nothing behind."""
    done = subprocess.run(
        [*STRICT, "-m", "tests.sharers", method],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_what_cannot_be_shared_by(client: PlasmaClient) -> None:
    """A threshold that is no number of bytes, and what is no client, are refused here and not in some child."""
    with pytest.raises(TypeError, match="min_bytes is a number of bytes, not str"):
        share(client, "64KB")  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(TypeError, match="a client of a store, not str"):
        share("x")  # type: ignore[arg-type]  # likewise
    with pytest.raises(TypeError, match="a client of a store, not str"):
        get_context("spawn", "x")  # type: ignore[arg-type]  # likewise


def test_an_executor() -> None:
    """It stores one array for many tasks once, counts, survives a killed worker, and leaves results behind."""
    run_python(
        """
        import os, signal
        import numpy as np
        import shmplasma as plasma

        seen = []
        with plasma.StoreExecutor(
            2, memory="50MB", progress=lambda done, submitted: seen.append((done, submitted))
        ) as executor:
            array = np.arange(100_000.0)
            futures = [executor.submit(lambda a, i: (a.flags.writeable, a * i), array, i) for i in range(8)]
            results = [future.result() for future in futures]
            assert [writable for writable, _ in results] == 8 * [False]
            assert len(executor.client.list()) == 9
            assert (8, 8) in seen
            killed = executor.submit(lambda: os.kill(os.getpid(), signal.SIGKILL))
            assert isinstance(killed.exception(), plasma.executor.BrokenProcessPool)
            assert list(executor.map(lambda a: a.sum(), [array, array])) == 2 * [4_999_950_000]
        assert [large[-1] for _, large in results] == [99_999 * i for i in range(8)]
        try:
            executor.submit(len, "")
        except RuntimeError:
            pass
        else:
            raise AssertionError("it was shut down")
        """
    )


def test_a_task_that_cannot_be_pickled() -> None:
    """Nor can a result: what was stored of it before that showed goes with the arrays, and not with the executor."""
    run_python(
        """
        import gc, threading, time
        import numpy as np
        import shmplasma as plasma

        def fail(i):
            return np.full(100_000, i), threading.Lock()

        with plasma.StoreExecutor(1, memory="50MB") as executor:
            array = np.arange(100_000.0)
            kept = executor.client.put_ref(np.zeros(100_000))
            futures = [executor.submit(len, array, kept, threading.Lock())]
            futures += [executor.submit(fail, i) for i in range(3)]
            for future in futures:
                assert "pickle" in repr(future.exception()), future.exception()
            assert executor.submit(lambda ref: ref.get().sum(), kept).result() == 0
            del array, kept, future
            executor.submit(gc.collect).result()  # what the last error has kept
            deadline = time.monotonic() + 30
            while executor.client.list():
                assert time.monotonic() < deadline, executor.client.debug_string()
                time.sleep(0.01)
        """
    )


def test_an_executor_that_draws_a_bar() -> None:
    """At its end the bar says that all is done, also of what has failed; standard output is the program's."""
    said = run_python(
        """
        import io, sys
        import shmplasma as plasma

        sys.stderr = io.StringIO()
        with plasma.StoreExecutor(1, memory="10MB", progress=True) as executor:
            futures = [executor.submit(divmod, 7, number) for number in range(3)]
            print(*(type(future.exception()).__name__ for future in futures))
        assert "3/3" in sys.stderr.getvalue(), sys.stderr.getvalue()
        """
    )
    assert said == "ZeroDivisionError NoneType NoneType\n"


def test_an_executor_that_was_shut_down_stays_so() -> None:
    """Also where a worker had died; and one whose arguments are refused leaves no thread that draws."""
    said = run_python(
        """
        import os, signal, threading
        import shmplasma as plasma

        with plasma.StoreExecutor(1, memory="10MB") as executor:
            print(type(executor.submit(signal.raise_signal, signal.SIGKILL).exception()).__name__)
        try:
            executor.submit(os.getpid)
        except RuntimeError as error:
            print(error)
        before = threading.active_count()
        try:
            plasma.StoreExecutor(1, memory="nonsense", progress=True)
        except ValueError:
            print(threading.active_count() - before)
        """
    )
    assert said == "TerminatedWorkerError\nthis executor was shut down; make another one\n0\n"


def test_an_executor_whose_arguments_are_refused_has_ended_its_store() -> None:
    """Not only when the collector comes, which cannot as long as somebody has the error."""
    said = run_python(
        """
        import os
        import shmplasma as plasma

        for arguments in ({"max_workers": 0}, {"min_bytes": "many"}):
            try:
                plasma.StoreExecutor(memory="10MB", **arguments)
            except (TypeError, ValueError) as error:
                try:
                    os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    print(error)
        """
    )
    assert said == "max_workers must be greater than 0\nmin_bytes is a number of bytes, not str\n"


class Buffers:
    """Offers its memory to protocol 5, as a user's class may."""

    def __init__(self, size: int, data: object = None) -> None:
        self.array: Any = np.zeros(size) if data is None else np.frombuffer(data)  # type: ignore[call-overload]

    def __reduce_ex__(self, _: object) -> Any:
        return type(self), (self.array.size, pickle.PickleBuffer(self.array.data))


@pytest.mark.parametrize("mode", ["copy", "cow"])
def test_arrays_made_in_the_store_can_be_written_to(client: PlasmaClient, mode: Mode) -> None:
    """What `create_array` gave is put by its buffer."""
    with client.create_array(ObjectID.from_random(), (1000,)) as array:
        array[:] = 1
    mine = client.get(client.put([array]), mode=mode)[0]
    mine[:] = 2
    assert array.sum() == 1000


@pytest.mark.parametrize("mode", ["copy", "cow"])
def test_values_that_can_be_written_to(client: PlasmaClient, mode: Mode) -> None:
    """A change of a private copy, or of a private mapping, reaches nobody else."""
    value = {
        "a": np.arange(10_000),
        "b": np.ones(3),
        "c": "text",
        "d": Buffers(1000),
        "e": Buffers(9),
    }
    object_id = client.put(value)
    mine = client.get(object_id, mode=mode)
    mine["a"][5000:] = -1
    mine["b"][0] = 7
    mine["d"].array[:] = mine["e"].array[:] = 7
    assert not client.get(object_id)["d"].array.any()
    assert mine["a"].sum() == 5000 * 4999 // 2 - 5000
    for other in (client.get(object_id), client.get([object_id], mode=mode)[0]):
        assert np.array_equal(other["a"], np.arange(10_000))
        assert other["c"] == "text"
    with client.put_ref(np.zeros(5)) as ref:
        array = ref.get(mode=mode)
        array += 1
        assert ref.get().sum() == 0


def test_what_was_sent_and_has_gone_is_sent_anew(client: PlasmaClient) -> None:
    """Arrays and tables alike, whoever has deleted what was stored of them."""
    array, table = np.arange(100_000), pa.table({"x": list(range(100_000))})
    with share(client):
        for _ in range(2):
            assert np.array_equal(ForkingPickler.loads(ForkingPickler.dumps(array)), array)
            assert ForkingPickler.loads(ForkingPickler.dumps(table)).equals(table)
            client.delete(list(client.list()))
            client.flush()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_outlasts_its_store(method: str) -> None:
    """The first tasks after the store was started anew pass by the new one, those with views of the old one included."""
    run_python(
        f"""
        import multiprocessing, tempfile
        import numpy as np
        import shmplasma as plasma

        if __name__ == "__main__":
            array = np.ones(100_000)
            with tempfile.TemporaryDirectory() as directory:
                path = directory + "/store"
                store = plasma.Store("50MB", socket=path)
                with store.connect() as client, plasma.share(client):
                    view = client.put_ref(array).get()
                    with multiprocessing.get_context("{method}").Pool(2) as pool:
                        for _ in range(2):
                            done = pool.map_async(np.negative, [array, view] * 4, chunksize=1)
                            assert [each.sum() for each in done.get(60)] == [-100_000] * 8
                            store.close()
                            store = plasma.Store("50MB", socket=path)
                        pool.close()
                        pool.join()
                store.close()
        """
    )


def test_a_view_of_a_reference_that_was_released(client: PlasmaClient) -> None:
    """It is stored once more, as nobody can be given what it was a view of."""
    with client.put_ref(np.arange(100_000)) as ref:
        view = ref.get()
    with share(client):
        assert np.array_equal(ForkingPickler.loads(ForkingPickler.dumps(view)), view)


def test_what_a_mode_pins(client: PlasmaClient) -> None:
    """A private mapping keeps its object, as a view does; a copy does not."""
    object_id = client.put(np.arange(10_000))
    copy = client.get(object_id, mode="copy")
    assert client.list()[object_id]["ref_count"] == 0
    mapping = client.get(object_id, mode="cow")
    assert client.list()[object_id]["ref_count"] == 1
    client.delete(object_id)
    client.put(np.zeros(12_000_000))
    assert np.array_equal(mapping, copy)


def test_private_mappings_take_no_descriptors(client: PlasmaClient) -> None:
    """A program may hold more of them than it may have files open; what is written stays in each."""
    object_id = client.put(np.arange(10_000))
    before = os.listdir("/dev/fd")
    mappings = [client.get(object_id, mode="cow") for _ in range(10)]
    assert len(os.listdir("/dev/fd")) == len(before)
    for number, mapping in enumerate(mappings):
        mapping[::2] = -number
    for number, mapping in enumerate(mappings):
        assert (mapping[::2] == -number).all()
        assert np.array_equal(mapping[1::2], np.arange(1, 10_000, 2))


def test_a_mode_that_there_is_not(client: PlasmaClient) -> None:
    """The error names those that there are."""
    object_id = client.put(1)
    with pytest.raises(ValueError, match="no mode 'write'; the modes are view, copy and cow"):
        client.get(object_id, mode="write")  # type: ignore[arg-type]  # the test
