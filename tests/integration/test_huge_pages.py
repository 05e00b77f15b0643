"""Stores on huge pages, where the machine has some to spare."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import shmplasma as plasma
from shmplasma import system
from shmplasma.layout import Layout
from tests.clients import figure
from tests.command import PROGRAM
from tests.mounts import huge_pages, mounted
from tests.processes import until


@pytest.fixture(params=["2M", "1G"])
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, int]]:
    """Give an empty hugetlbfs for each size of page, and that size."""
    target = tmp_path / "huge"
    target.mkdir()
    with mounted("hugetlbfs", target, f"pagesize={request.param}") as directory:
        page_bytes = system.huge_page_bytes(directory)
        assert page_bytes is not None
        yield directory, page_bytes


def test_a_store_on_huge_pages(mount: tuple[str, int], tmp_path: Path) -> None:
    """Objects of several pages are put, got, given back to the pool, and put again; all pages come back at the end."""
    directory, page_bytes = mount
    layout = Layout.plan(4 * page_bytes, page_bytes)
    with huge_pages(page_bytes, layout.segment_bytes // page_bytes):
        before = system.huge_pages(page_bytes).available
        path = str(tmp_path / "s")
        command = [*PROGRAM, "-s", path, "-h", "-d", directory]
        with subprocess.Popen(
            [*command, "-m", str(4 * page_bytes), "--trim-floor", "0"], stderr=subprocess.PIPE
        ) as process:
            try:
                with plasma.connect(path) as client:
                    value = (
                        np.arange(5 * page_bytes // 16) if page_bytes < 1 << 30 else np.arange(9)
                    )
                    object_id = client.put(value)
                    np.testing.assert_array_equal(client.get(object_id), value)
                    used = -(-value.nbytes // page_bytes) * page_bytes
                    assert figure(client, "committed bytes") >= used
                    client.delete([object_id])
                    assert client.trim() >= used
                    assert figure(client, "committed bytes") == 0
                    assert (
                        system.huge_pages(page_bytes).available
                        >= before - layout.data // page_bytes
                    )
                    object_id = client.put(value)
                    np.testing.assert_array_equal(client.get(object_id), value)
            finally:
                process.send_signal(signal.SIGTERM)
        until(lambda: system.huge_pages(page_bytes).available == before, "all pages come back")


def test_huge_pages_that_others_have_taken(mount: tuple[str, int], tmp_path: Path) -> None:
    """Where a page cannot be had any more after a trim, a put is a full store with the remedy; nobody is killed."""
    directory, page_bytes = mount
    layout = Layout.plan(3 * page_bytes, page_bytes)
    with huge_pages(page_bytes, layout.segment_bytes // page_bytes):
        path = str(tmp_path / "s")
        command = [*PROGRAM, "-s", path, "-h", "-d", directory, "-m", str(3 * page_bytes)]
        with subprocess.Popen([*command, "--trim-floor", "0"], stderr=subprocess.PIPE) as process:
            try:
                with plasma.connect(path) as client:
                    client.trim()
                    other = os.open(f"{directory}/other", os.O_CREAT | os.O_RDWR)
                    try:
                        free = system.huge_pages(page_bytes).available
                        os.posix_fallocate(other, 0, free * page_bytes)
                        with pytest.raises(plasma.PlasmaStoreFull, match="echo"):
                            client.create(plasma.ObjectID.from_random(), 2 * page_bytes)
                        os.ftruncate(other, 0)
                    finally:
                        os.close(other)
                    client.create(plasma.ObjectID.from_random(), 2 * page_bytes)
            finally:
                process.send_signal(signal.SIGTERM)


def test_too_few(mount: tuple[str, int], tmp_path: Path) -> None:
    """The command refuses to start, and says how many pages are missing, how many there are, and what to do."""
    directory, page_bytes = mount
    with huge_pages(page_bytes, 0):
        pool = system.huge_pages(page_bytes)
        arguments = ["-s", str(tmp_path / "s"), "-h", "-d", directory, "-m", "100GiB"]
        done = subprocess.run([*PROGRAM, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"more huge pages of {page_bytes >> 10} KiB are needed than the {pool.available}" in (
        done.stderr
    )
    assert f"> {pool.setting}" in done.stderr
