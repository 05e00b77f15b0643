"""What the figures depend on besides the code: the machine, the kernel, the interpreter, and the date."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["describe", "shared_memory_free"]


def describe() -> dict[str, str]:
    """Return the machine's description, without its name."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": f"{_processor()}, {os.cpu_count()} cores seen",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "huge pages for shared memory": _huge_pages(),
        "Python": platform.python_version(),
    }


def shared_memory_free() -> int:
    """Return how many bytes `/dev/shm`, or the temporary directory in its place, can still take."""
    where = os.statvfs("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp")  # noqa: S108 - only looked at
    return where.f_bavail * where.f_frsize


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        return platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _huge_pages() -> str:
    try:
        choices = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
    except FileNotFoundError:  # not Linux, or a kernel without them
        return "none"
    return choices.partition("[")[2].partition("]")[0]
