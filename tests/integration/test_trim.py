"""Memory that is committed before it is needed, and given back when it is not, with real stores."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import shmplasma as plasma
from shmplasma.layout import GRANULE_BYTES
from shmplasma.segment_name import SegmentName
from tests.clients import figure, new_id
from tests.command import PROGRAM, running
from tests.processes import Child, until

MIB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives memory back")


def noise(seed: int, size_bytes: int) -> npt.NDArray[np.uint8]:
    """Return bytes that no hole and no other object has."""
    return np.random.default_rng(seed).integers(1, 256, size_bytes, np.uint8)


def memory_of(path: str) -> int:
    """Return how many bytes of memory the segment of a store takes, as the system counts them."""
    name = SegmentName.decode(Path(f"{path}.lock").read_bytes())
    assert name is not None
    file = f"/dev/shm{name.path}" if name.kind == "posix" else name.path
    return os.stat(file).st_blocks * 512


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Give a path for a socket."""
    return str(tmp_path / "s")


def test_memory_that_is_not_used_goes_back(path: str) -> None:
    """After a trim the system has the memory; what is there stays, and what comes is committed again."""
    with (
        running("-s", path, "-m", "200MiB", "--trim-floor", "8MiB"),
        plasma.connect(path) as client,
    ):
        kept = [client.put(noise(seed, 3 * MIB)) for seed in range(3)]
        gone = [client.put(noise(seed, 10 * MIB)) for seed in range(10, 24)]
        last = client.put(noise(99, 100_000))
        before = memory_of(path)
        committed = figure(client, "committed bytes")
        client.delete(gone)
        given_back = client.trim()
        assert given_back > 130 * MIB
        assert before - memory_of(path) == given_back
        assert figure(client, "committed bytes") == committed - given_back
        assert client.trim() == 0
        for seed, object_id in [*enumerate(kept), (99, last)]:
            size = 100_000 if seed == 99 else 3 * MIB
            np.testing.assert_array_equal(client.get(object_id), noise(seed, size))
        # This client has mapped the pages for writing before, and finds them gone.
        again = [client.put(noise(seed, 10 * MIB)) for seed in range(30, 44)]
        with plasma.connect(path) as other:
            for seed, object_id in enumerate(again, 30):
                np.testing.assert_array_equal(other.get(object_id), noise(seed, 10 * MIB))
        assert memory_of(path) >= before


def test_nothing_that_is_held_is_given_back(path: str) -> None:
    """What is deleted and held, or being written, or leased keeps its memory."""
    with running("-s", path, "-m", "100MiB", "--trim-floor", "0"), plasma.connect(path) as client:
        held = client.put(noise(1, 5 * MIB))
        value = client.get(held)
        client.delete(held)
        aborted = new_id()
        writable = client.create(aborted, 5 * MIB)
        client.abort(aborted)
        unsealed = new_id()
        target = np.frombuffer(memoryview(client.create(unsealed, 5 * MIB)), np.uint8)
        small = client.put(b"small")
        client.trim()
        np.testing.assert_array_equal(value, noise(1, 5 * MIB))
        np.frombuffer(memoryview(writable), np.uint8)[:] = 7
        target[:] = noise(2, 5 * MIB)
        client.seal(unsealed)
        client.put(b"from the lease")
        assert client.get(small) == b"small"
        del value, writable, target
        assert client.trim() >= 9 * MIB
        (buffer,) = client.get_buffers([unsealed])
        assert buffer is not None
        np.testing.assert_array_equal(
            np.frombuffer(memoryview(buffer), np.uint8), noise(2, 5 * MIB)
        )


TRIMMER = """
import sys
import numpy as np
import shmplasma as plasma

with plasma.connect(sys.argv[1]) as client:
    print("ready", flush=True)
    while True:
        try:
            objects = [client.put(np.full(1 << 20, n, np.uint8)) for n in range(1, 30)]
            for n, object_id in enumerate(objects, 1):
                value = client.get(object_id)
                assert (value == n).all(), "an object has lost its bytes"
                del value
            client.delete(objects)
            client.trim()
        except plasma.NotConnectedError:
            pass
"""


def test_a_store_that_is_killed_while_it_trims(path: str) -> None:
    """Clients write and read, and memory comes and goes; whenever the store dies, they go on."""
    arguments = ("-m", "100MiB", "--trim-floor", "0")
    with running("-s", path, *arguments) as (first, _), Child(TRIMMER, path) as writer:
        writer.hear()
        with plasma.connect(path) as client:
            kept = client.put(noise(1, 2 * MIB))
            store, stores = first, []
            try:
                for _ in range(8):
                    given_back = figure(client, "trims")
                    while figure(client, "trims") < given_back + 3:
                        pass
                    store.send_signal(signal.SIGKILL)
                    store.wait()
                    entered = running("-s", path, *arguments)
                    store, _ = entered.__enter__()
                    stores.append(entered)
                    np.testing.assert_array_equal(client.get(kept), noise(1, 2 * MIB))
                assert writer.process.poll() is None, "a client met a hole, or another's bytes"
                writer.kill()

                def is_given_back() -> bool:
                    client.delete([object_id for object_id in client.list() if object_id != kept])
                    client.trim()
                    # Of the granules in which it begins and ends the object has only a part.
                    return figure(client, "committed bytes") <= 2 * MIB + 2 * GRANULE_BYTES

                until(is_given_back, "only the memory that is used is left")
            finally:
                for entered in reversed(stores):
                    entered.__exit__(None, None, None)


def test_prefault(path: str) -> None:
    """All memory is there when the store is ready, and stays there."""
    with (
        running("-s", path, "-m", "50MB", "--prefault") as (_, said),
        plasma.connect(path) as client,
    ):
        assert "committed 50000000 bytes" in said
        assert memory_of(path) >= 50_000_000
        assert figure(client, "committed bytes") >= 50_000_000
        assert client.trim() == 0
        object_id = client.put(noise(1, 40_000_000))
        np.testing.assert_array_equal(client.get(object_id), noise(1, 40_000_000))


def test_a_file_system_that_another_fills(small_tmpfs: str, path: str) -> None:
    """What cannot be committed is refused with the figures and the remedy; nobody is killed, and the store goes on."""
    arguments = ("-m", "6MiB", "-d", small_tmpfs, "--trim-floor", "0")
    with running("-s", path, *arguments), plasma.connect(path) as client:
        object_id = client.put(noise(1, 100_000))
        client.trim()  # else what was committed ahead of need suffices, or is given back while the other writes
        other = Path(small_tmpfs, "other")
        other.write_bytes(bytes(os.statvfs(small_tmpfs).f_bavail * 4096 - MIB))
        free = os.statvfs(small_tmpfs).f_bavail * 4096
        with pytest.raises(plasma.PlasmaStoreFull, match=f"make room in {small_tmpfs}") as caught:
            client.create(plasma.ObjectID.from_random(), 5 * MIB)
        assert f"({free} are free)" in str(caught.value)
        del caught  # its frames hold the mapping
        np.testing.assert_array_equal(client.get(object_id), noise(1, 100_000))
        other.unlink()
        client.create(plasma.ObjectID.from_random(), 5 * MIB)


def test_prefault_without_the_memory(small_tmpfs: str, path: str) -> None:
    """A store that finds the memory taken does not start, says what is missing, and leaves the objects alone."""
    arguments = ("-m", "6MiB", "-d", small_tmpfs, "--trim-floor", "0")
    with running("-s", path, *arguments) as (process, _):
        with plasma.connect(path) as client:
            object_id = client.put(noise(1, 100_000))
        process.kill()
        process.wait()
    other = Path(small_tmpfs, "other")
    other.write_bytes(bytes(os.statvfs(small_tmpfs).f_bavail * 4096 - MIB))
    done = subprocess.run(
        [*PROGRAM, "-s", path, *arguments, "--prefault"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert f"make room in {small_tmpfs}" in done.stderr
    other.unlink()
    with running("-s", path, *arguments, "--prefault"), plasma.connect(path) as client:
        np.testing.assert_array_equal(client.get(object_id), noise(1, 100_000))


def test_prefault_on_a_terminal(path: str) -> None:
    """A live line says how far it is, and is gone when the store is ready."""
    main, side = pty.openpty()
    with subprocess.Popen(
        [*PROGRAM, "-s", path, "-m", "6GB", "--prefault"], stderr=side
    ) as process:
        os.close(side)
        said = b""
        try:
            while b"ready:" not in said:
                said += os.read(main, 4096)
        finally:
            process.terminate()
            os.close(main)
    assert b"\r\x1b[Kcommitting memory: " in said
    assert b" s left\r\x1b[K" in said


def test_a_prefault_that_is_ended(path: str) -> None:
    """A signal need not wait until all memory is committed."""
    with subprocess.Popen(
        [*PROGRAM, "-s", path, "-m", "6GB", "--prefault"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert "committing 6000000000 bytes" in process.stderr.readline()
        process.terminate()
        said = process.stderr.read()
    assert process.returncode == 0
    assert "committed 6000000000 bytes" not in said
    assert not os.path.exists(path)
