"""File systems of a size, or a kind, that only root can make."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shmplasma import system


@contextmanager
def mounted(kind: str, target: Path, options: str) -> Iterator[str]:
    """Mount a file system for the duration of a block; skip where that is not allowed."""
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("mounting a file system needs root on Linux")
    command = ["mount", "-t", kind, "-o", options, "none", str(target)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this machine does not mount a {kind}: {done.stderr.strip()}")
    try:
        yield str(target)
    finally:
        subprocess.run(["umount", str(target)], check=True)


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[str]:
    """Give a directory that holds 8 MB."""
    target = tmp_path / "small"
    target.mkdir()
    with mounted("tmpfs", target, "size=8m") as directory:
        yield directory


@pytest.fixture
def huge_directory(tmp_path: Path) -> Iterator[str]:
    """Give a hugetlbfs with 16 pages more than there were, and put everything back."""
    target = tmp_path / "huge"
    target.mkdir()
    with mounted("hugetlbfs", target, "rw") as directory:
        page_bytes = system.huge_page_bytes(directory)
        assert page_bytes is not None
        before = system.huge_pages(page_bytes)
        setting = Path(before.setting)
        setting.write_text(str(before.total + 16))
        try:
            if system.huge_pages(page_bytes).available < 16:
                pytest.skip("this machine has no memory in pieces of a huge page")
            yield directory
        finally:
            setting.write_text(str(before.total))
