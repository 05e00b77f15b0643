"""Every example of Plasma's documentation, in its order, as a user would type it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import shmplasma as plasma
from tests.processes import run_python

STORE_PROGRAM = str(Path(sys.executable).with_name("shmplasma-store"))


@contextmanager
def terminal(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Type the command of a store, leave the window open, and press Ctrl-C at the end."""
    with subprocess.Popen(
        [STORE_PROGRAM, *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()
            assert "ready:" in said, said
            messages = threading.Thread(target=process.stderr.read)
            messages.start()
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
        messages.join()
    assert process.returncode == 0


def test_a_library_that_knows_only_plasmas_names(tmp_path: Path) -> None:
    """It finds the module under its old name, and the command by a link, as the guide for migration says."""
    (tmp_path / "plasma_store").symlink_to(STORE_PROGRAM)
    code = """
        import os, subprocess, sys
        import pyarrow, shmplasma

        sys.modules["pyarrow.plasma"] = pyarrow.plasma = shmplasma
        sys.modules["pyarrow._plasma"] = pyarrow._plasma = shmplasma

        import pyarrow.plasma as first
        from pyarrow import plasma as second
        from pyarrow.plasma import PlasmaClient
        from pyarrow._plasma import PlasmaObjectExists

        assert first is second is pyarrow.plasma
        directory = sys.argv[1]
        path = os.path.join(directory, "s")
        os.environ["PATH"] = directory + os.pathsep + os.environ["PATH"]
        with subprocess.Popen(["plasma_store", "-m", "1000000", "-s", path], stderr=subprocess.DEVNULL) as store:
            with first.connect(path) as client:
                assert isinstance(client, PlasmaClient)
                object_id = client.put(1)
                try:
                    client.put(2, object_id)
                except PlasmaObjectExists:
                    print(client.get(object_id))
            store.terminate()
    """
    assert run_python(code, str(tmp_path)) == "1\n"


@pytest.fixture
def socket_name(tmp_path: Path) -> Iterator[str]:
    """Start the Plasma store as the page says; it is not /tmp/plasma, which may be somebody's."""
    name = str(tmp_path / "plasma")
    with terminal("-m", "1000000000", "-s", name):
        yield name
    assert not Path(name).exists()


@pytest.fixture
def client(socket_name: str) -> Iterator[plasma.PlasmaClient]:
    """Create a Plasma client as the page says."""
    client = plasma.connect(socket_name)
    yield client
    client.disconnect()


def random_object_id() -> plasma.ObjectID:
    """Return an id; the page's own helper."""
    return plasma.ObjectID(np.random.bytes(20))


def test_a_client_without_a_store(tmp_path: Path) -> None:
    """Either the socket is incorrect or the store is not running: the error says so."""
    name = str(tmp_path / "plasma")
    with pytest.raises(OSError, match=name):
        plasma.connect(name, num_retries=1)


def test_object_ids() -> None:
    """An id is formed from 20 bytes, and shows them in hex."""
    id = plasma.ObjectID(20 * b"a")  # noqa: A001 - as on the page
    assert repr(id) == "ObjectID(6161616161616161616161616161616161616161)"
    assert random_object_id() != random_object_id()


def test_putting_and_getting_python_objects(client: plasma.PlasmaClient) -> None:
    """The high-level API: one object, several at the same time, and a timeout."""
    object_id = client.put("hello, world")
    assert client.get(object_id) == "hello, world"

    object_id1 = client.put(1)
    object_id2 = client.put(2)
    object_id3 = client.put(3)
    assert client.get([object_id1, object_id2, object_id3]) == [1, 2, 3]

    missing = random_object_id()
    assert client.get(missing, timeout_ms=10) is plasma.ObjectNotAvailable


def test_object_buffers(socket_name: str, client: plasma.PlasmaClient) -> None:
    """The low-level API: create, write, seal, and get in another client."""
    object_id = plasma.ObjectID(20 * b"a")
    object_size = 1000
    buffer = memoryview(client.create(object_id, object_size))
    for i in range(1000):
        buffer[i] = i % 128
    client.seal(object_id)

    client2 = plasma.connect(socket_name)
    object_id2 = plasma.ObjectID(20 * b"a")
    [buffer2] = client2.get_buffers([object_id2])

    assert buffer[1] == 1
    assert isinstance(buffer2, plasma.PlasmaBuffer)
    view2 = memoryview(buffer2)
    assert view2[1] == 1
    assert view2[129] == 1
    assert bytes(buffer[1:4]) == b"\x01\x02\x03"
    assert bytes(view2[1:4]) == b"\x01\x02\x03"
    client2.disconnect()


def test_a_get_blocks_until_the_seal(socket_name: str, client: plasma.PlasmaClient) -> None:
    """A get blocks until the object has been sealed; a timeout yields control back."""
    object_id = random_object_id()
    client.create(object_id, 10)
    client2 = plasma.connect(socket_name)
    assert client2.get_buffers([object_id], timeout_ms=10) == [None]
    sealer = threading.Thread(target=client.seal, args=(object_id,))
    sealer.start()
    [buffer2] = client2.get_buffers([object_id])
    sealer.join()
    assert buffer2.size == 10
    client2.disconnect()


def test_listing_objects(client: plasma.PlasmaClient) -> None:
    """Sealed and unsealed objects are listed with what the page shows of them."""
    client.put("hello, world")
    client.put("another object")
    object_id = plasma.ObjectID.from_random()
    client.create(object_id, 100)

    listing = client.list()
    assert len(listing) == 3
    created = listing.pop(object_id)
    assert created["construct_duration"] == -1
    assert created["data_size"] == 100
    assert created["metadata_size"] == 0
    assert created["ref_count"] == 1
    assert created["state"] == "created"
    for sealed in listing.values():
        assert sealed["construct_duration"] == 0
        assert sealed["data_size"] > 0
        assert sealed["metadata_size"] == 0
        assert sealed["ref_count"] == 0
        assert sealed["state"] == "sealed"
        assert sealed["create_time"] <= created["create_time"]


def test_arrow_objects(client: plasma.PlasmaClient) -> None:
    """A tensor is written into a buffer of its size, and read back from there."""
    data = np.random.randn(10, 4)
    tensor = pa.Tensor.from_numpy(data)

    object_id = plasma.ObjectID(np.random.bytes(20))
    data_size = pa.ipc.get_tensor_size(tensor)
    buf = client.create(object_id, data_size)

    stream = pa.FixedSizeBufferWriter(buf)
    pa.ipc.write_tensor(tensor, stream)
    client.seal(object_id)

    [buf2] = client.get_buffers([object_id])
    reader = pa.BufferReader(buf2)
    tensor2 = pa.ipc.read_tensor(reader)
    array = tensor2.to_numpy()
    assert (array == data).all()
    assert buf2.address <= array.ctypes.data < buf2.address + buf2.size


def test_pandas_data_frames(client: plasma.PlasmaClient) -> None:
    """A data frame becomes a record batch, is streamed into a buffer of its size, and comes back."""
    # An index of objects, as it was then: Arrow makes no single batch of pandas 3's own strings.
    index = pd.Index(["a", "b", "c", "d"], dtype=object)
    d = {
        "one": pd.Series([1.0, 2.0, 3.0], index=index[:3]),
        "two": pd.Series([1.0, 2.0, 3.0, 4.0], index=index),
    }
    df = pd.DataFrame(d)
    record_batch = pa.RecordBatch.from_pandas(df)

    object_id = plasma.ObjectID(np.random.bytes(20))
    mock_sink = pa.MockOutputStream()
    with pa.RecordBatchStreamWriter(mock_sink, record_batch.schema) as stream_writer:
        stream_writer.write_batch(record_batch)
    data_size = mock_sink.size()
    buf = client.create(object_id, data_size)

    stream = pa.FixedSizeBufferWriter(buf)
    with pa.RecordBatchStreamWriter(stream, record_batch.schema) as stream_writer:
        stream_writer.write_batch(record_batch)
    client.seal(object_id)

    [data] = client.get_buffers([object_id])
    buffer = pa.BufferReader(data)
    reader = pa.RecordBatchStreamReader(buffer)
    record_batch = reader.read_next_batch()
    result = record_batch.to_pandas()
    pd.testing.assert_frame_equal(result, df, check_index_type=False)


def test_the_page_in_one_session(socket_name: str) -> None:
    """A program in another process does the page from top to bottom, with the import that it names."""
    code = """
        import sys

        import numpy as np
        import pyarrow as pa
        import shmplasma as plasma

        client = plasma.connect(sys.argv[1])
        object_id = client.put("hello, world")
        assert client.get(object_id) == "hello, world"

        object_id = plasma.ObjectID(20 * b"a")
        buffer = memoryview(client.create(object_id, 1000))
        for i in range(1000):
            buffer[i] = i % 128
        client.seal(object_id)

        client2 = plasma.connect(sys.argv[1])
        [buffer2] = client2.get_buffers([plasma.ObjectID(20 * b"a")])
        assert memoryview(buffer2)[129] == 1

        tensor = pa.Tensor.from_numpy(np.random.randn(10, 4))
        object_id = plasma.ObjectID(np.random.bytes(20))
        buf = client.create(object_id, pa.ipc.get_tensor_size(tensor))
        pa.ipc.write_tensor(tensor, pa.FixedSizeBufferWriter(buf))
        client.seal(object_id)
        [buf2] = client2.get_buffers([object_id])
        assert pa.ipc.read_tensor(pa.BufferReader(buf2)).equals(tensor)
        print(len(client.list()))
    """
    assert run_python(code, socket_name) == "3\n"


# --- huge pages -------------------------------------------------------------------------------------

HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
WANTED_PAGES = 48
"""Enough for 32 MB of objects and the regions beside them, where a huge page has 2 MiB."""


@pytest.fixture
def huge_page_directory(tmp_path: Path) -> Iterator[str]:
    """Create the file system and activate huge pages as the page says; put both back at the end."""
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("mounting a hugetlbfs and reserving huge pages needs root on Linux")
    if not HUGE_PAGES.exists():
        pytest.skip("this kernel has no huge pages")
    if "2048 kB" not in Path("/proc/meminfo").read_text().partition("Hugepagesize:")[2]:
        pytest.skip("huge pages of another size than 2 MiB would take too much memory here")
    directory = tmp_path / "hugepages"
    directory.mkdir()
    options = f"uid={os.getuid()},gid={os.getgid()}"
    command = ["mount", "-t", "hugetlbfs", "-o", options, "none", str(directory)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this machine does not mount a hugetlbfs: {done.stderr.strip()}")
    before = int(HUGE_PAGES.read_text())
    try:
        try:
            HUGE_PAGES.write_text(str(before + WANTED_PAGES))
        except OSError as error:
            pytest.skip(f"huge pages cannot be reserved here: {error}")
        if int(HUGE_PAGES.read_text()) < before + WANTED_PAGES:
            pytest.skip("the kernel has not enough contiguous memory for huge pages")
        yield str(directory)
    finally:
        subprocess.run(["umount", str(directory)], check=True)
        HUGE_PAGES.write_text(str(before))
    assert int(HUGE_PAGES.read_text()) == before


def test_huge_pages(tmp_path: Path, huge_page_directory: str) -> None:
    """The store runs on huge pages with ``-d`` and ``-h``, and the page's script writes its tensor there."""
    name = str(tmp_path / "plasma")
    free = "HugePages_Free"

    def free_pages() -> int:
        return int(Path("/proc/meminfo").read_text().partition(f"{free}:")[2].split()[0])

    before = free_pages()
    with terminal("-s", name, "-m", "32000000", "-d", huge_page_directory, "-h"):
        client = plasma.connect(name)
        data = np.random.randn(3_000_000)
        tensor: Any = pa.Tensor.from_numpy(data)
        object_id = plasma.ObjectID(np.random.bytes(20))
        buf = client.create(object_id, pa.ipc.get_tensor_size(tensor))
        stream = pa.FixedSizeBufferWriter(buf)
        stream.set_memcopy_threads(4)
        pa.ipc.write_tensor(tensor, stream)
        client.seal(object_id)
        assert before - free_pages() >= 12, "the objects do not lie on huge pages"

        with plasma.connect(name) as client2:
            [buf2] = client2.get_buffers([object_id])
            assert (pa.ipc.read_tensor(pa.BufferReader(buf2)).to_numpy() == data).all()
        del buf, stream, buf2
        client.disconnect()
    assert not os.listdir(huge_page_directory)
