"""File systems that only root can mount, and huge pages that only root can have, for the length of a block."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shmplasma import system

__all__ = ["huge_pages", "mounted"]


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


@contextmanager
def huge_pages(page_bytes: int, count: int) -> Iterator[None]:
    """Have so many more huge pages for the duration of a block; skip where the kernel does not give them."""
    before = system.huge_pages(page_bytes)
    setting = Path(before.setting)
    setting.write_text(str(before.total + count))
    try:
        if system.huge_pages(page_bytes).available < count:
            pytest.skip("this machine has no memory in pieces of a huge page")
        yield
    finally:
        setting.write_text(str(before.total))
