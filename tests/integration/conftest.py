"""File systems of a size, or a kind, that only root can make; how signals are taken."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmplasma import system
from tests.mounts import huge_pages, mounted


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[str]:
    """Give a directory that holds 8 MB."""
    target = tmp_path / "small"
    target.mkdir()
    with mounted("tmpfs", target, "size=8m") as directory:
        yield directory


@pytest.fixture
def huge_directory(tmp_path: Path) -> Iterator[str]:
    """Give a hugetlbfs with 20 pages more than there were, and put everything back."""
    target = tmp_path / "huge"
    target.mkdir()
    with mounted("hugetlbfs", target, "rw") as directory:
        page_bytes = system.huge_page_bytes(directory)
        assert page_bytes is not None
        with huge_pages(page_bytes, 20):
            yield directory


@pytest.fixture
def hangups() -> Iterator[None]:
    """Have SIGHUP end what is started, also where the tests themselves were started with ``nohup``."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, handler)
