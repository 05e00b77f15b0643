"""External stores of all kinds: a directory, a bucket of an S3 server, memory; and who may look into them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import shmplasma as plasma
from shmplasma.embedded import Store
from shmplasma.errors import ExternalStoreError
from shmplasma.external import open_external
from shmplasma.segment_name import SegmentName
from shmplasma.spiller import Done, Spiller, open_spiller
from shmplasma.spilling import ExternalLimits
from shmplasma.transfers import Part, Write
from tests.processes import until

CAPACITY = 8_000_000
N_OBJECTS = 24
MOTO = """
import sys, boto3
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
boto3.client(
    "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
    aws_access_key_id="key", aws_secret_access_key="secret",
).create_bucket(Bucket="bucket")
print(port, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Run an S3 server, and return the URI of a place in it."""
    with subprocess.Popen(
        [sys.executable, "-c", MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        yield f"s3://key:secret@bucket/some/prefix?{options}"
        server.kill()


def content(number: int) -> tuple[bytes, bytes]:
    """Return the data and metadata by which an object is known."""
    rng = np.random.default_rng(number)
    return rng.bytes(100_000 + number * 50_000), rng.bytes(number)


def name(number: int) -> plasma.ObjectID:
    """Return an id."""
    return plasma.ObjectID(number.to_bytes(20, "big"))


def fill(client: plasma.PlasmaClient, n_objects: int = N_OBJECTS) -> list[plasma.ObjectID]:
    """Put twice as much as there is room for."""
    for number in range(n_objects):
        client.create_and_seal(name(number), *content(number))
    return [name(number) for number in range(n_objects)]


def is_whole(client: plasma.PlasmaClient, number: int) -> bool:
    """Tell whether an object is what it was."""
    ((metadata, data),) = client.get_buffers([name(number)], with_meta=True)
    return (data.to_pybytes(), metadata) == content(number)


def read_all(client: plasma.PlasmaClient, n_objects: int) -> None:
    """See that objects are what they were."""
    for number in range(n_objects):
        assert is_whole(client, number)


def overfill(client: plasma.PlasmaClient) -> None:
    """Put more than there is room for."""
    for number in range(N_OBJECTS):
        client.create_and_seal(name(1000 + number), bytes(1_000_000))


def containers(directory: Path) -> list[Path]:
    """Return the files in which objects are."""
    return sorted(path for path in directory.glob("shmplasma-*/*") if path.name.isdecimal())


def spilled(client: plasma.PlasmaClient) -> int:
    """Return how many bytes are in the external store only."""
    lines = client.debug_string().splitlines()
    return int(dict(line.split(": ", 1) for line in lines)["spilled bytes"])


@pytest.mark.parametrize("scheme", ["file", "s3", "memory", "hashtable"])
def test_everything_is_there_whatever_fits(scheme: str, tmp_path: Path, s3: str) -> None:
    """A store holds more than its capacity, data and metadata, and leaves nothing behind."""
    uri = {"file": tmp_path.as_uri(), "s3": s3}.get(scheme, f"{scheme}://name")
    with Store(CAPACITY, external_store=uri) as store, store.connect() as client:
        ids = fill(client)
        assert spilled(client)
        assert set(client.list()) == set(ids)
        assert all(client.contains(object_id) for object_id in ids)
        assert all(is_whole(client, number) for number in range(N_OBJECTS))
        assert client.hash(ids[0]) == client.hash(ids[0])
        with pytest.raises(plasma.PlasmaObjectExists):
            client.create(ids[1], 1)
        assert client.evict(1_000_000) >= 1_000_000
        client.delete(ids)
        assert not client.list()
        assert not spilled(client)
    assert not list(tmp_path.iterdir())


def test_others_cannot_look(tmp_path: Path) -> None:
    """The directory is its user's alone."""
    with Store(CAPACITY, external_store=tmp_path.as_uri()):
        (directory,) = tmp_path.iterdir()
        assert directory.stat().st_mode & 0o777 == 0o700


def test_secrets_are_not_logged(s3: str) -> None:
    """Keys are in the URI, and in no message."""
    uri = s3.replace("bucket", "no-such-bucket")
    with pytest.raises(plasma.ShmPlasmaError, match="cannot be written to") as caught:
        Store(CAPACITY, external_store=uri)
    assert "s3://no-such-bucket/some/prefix" in str(caught.value)
    assert "secret" not in str(caught.value)


WITHOUT_PRIVILEGES = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2
for capability in CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH:  # root keeps to permissions then
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-m", "shmplasma.cli", *sys.argv[1:]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_permission_that_is_lost(tmp_path: Path) -> None:
    """A store that may not write or read its files any more says so, and goes on when it may again."""
    path = str(tmp_path / "store")
    arguments = ["-m", str(CAPACITY), "-s", path, "-e", tmp_path.as_uri()]
    with subprocess.Popen(
        [sys.executable, "-c", WITHOUT_PRIVILEGES, *arguments], stderr=subprocess.DEVNULL
    ) as process:
        try:
            with plasma.connect(path) as client:
                fill(client, 16)
                assert client.evict(CAPACITY)
                (files,) = tmp_path.glob("shmplasma-*")
                files.chmod(0)
                with pytest.raises(plasma.ExternalStoreError, match="Permission denied"):
                    read_all(client, 16)
                with pytest.raises(plasma.PlasmaStoreFull, match="Permission denied"):
                    overfill(client)
                files.chmod(0o700)
                client.create_and_seal(name(999), bytes(4_000_000), timeout_ms=30_000)
                read_all(client, 16)
        finally:
            process.terminate()
    assert not list(tmp_path.glob("shmplasma-*"))


def allow_threads(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let so many threads begin, and no more."""
    begin, begun = threading.Thread.start, 0

    def start(thread: threading.Thread) -> None:
        nonlocal begun
        if begun == most:
            raise RuntimeError("can't start new thread")
        begun += 1
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.parametrize("most", [1, 3])
def test_whatever_threads_there_are_do_all_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """A store does not end because the system gives it no further thread; no job is lost."""
    allow_threads(monkeypatch, most)
    place = open_external(f"file://{tmp_path}", bytes(16), b"note")
    spiller = Spiller(place, ExternalLimits(), {})
    raw = memoryview(bytearray(b"object" * 100))
    spiller.start(raw, lambda: None)
    jobs = [Write(n, (Part(0, bytes(20), 0, 0, 600, 0),)) for n in range(1, 20)]
    for job in jobs:
        spiller.submit(job)
    done: list[Done] = []

    def all_are_done() -> bool:
        done.extend(spiller.done())
        return len(done) == len(jobs)

    until(all_are_done, "all jobs are done")
    assert all(each[1:] == ([0], "") for each in done), done
    assert {job.number for job, *_ in done if isinstance(job, Write)} == set(range(1, 20))
    assert len(place.containers()) == len(jobs)
    spiller.close(remove=True)
    assert not list(tmp_path.iterdir())


def test_no_thread_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store does not begin to serve, and says what helps."""
    allow_threads(monkeypatch, 0)
    name = SegmentName.plan(bytes(16), None)
    with pytest.raises(ExternalStoreError, match=r"there is no thread .* \(ulimit -u\)"):
        open_spiller(f"file://{tmp_path}", bytes(16), name, ExternalLimits(), lambda: False)
