"""What a test must not leave behind: descriptors, processes, threads, socket files, shared memory."""

from __future__ import annotations

import gc
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it ships no types

from shmplasma.helpers import NAME as HELPER

__all__ = ["Belongings"]

_SHARED_MEMORY = Path("/dev/shm")
_PREFIXES = ("shmplasma-", "psm_")
"""Of segments, and of what `multiprocessing` makes; other names are other programs'."""
_NAME = re.compile("shmplasma-([0-9a-f]{16}|[a-z0-9_]{8})")
"""Of a segment, and of the private directory of an embedded store."""


class Belongings:
    """All that this process has, as text, at the moment when it is made.

    Parameters
    ----------
    places : iterable of Path
        Directories that are searched, whole, for what stores make.
    """

    def __init__(self, places: Iterable[Path]) -> None:
        self._places = list(places)
        self._before = self._now()

    def new(self) -> list[str]:
        """Return what has come since, and does not go with what is unreachable."""
        if self._now() - self._before:
            gc.collect()
        return sorted(map(_described, self._now() - self._before))

    def _now(self) -> set[str]:
        return {
            *_descriptors(),
            *_processes(),
            *_threads(),
            *_names_of_shared_memory(),
            *(f"file {path}" for place in self._places for path in _made_by_stores(place)),
        }


def _threads() -> Iterator[str]:
    for thread in threading.enumerate():
        if thread.name != HELPER:  # these are the process's, once made
            yield f"thread {thread.name} {thread.ident}"


def _descriptors() -> Iterator[str]:
    for fd in map(int, os.listdir("/dev/fd")):
        with suppress(OSError):  # what listed the directory is closed by now
            status = os.fstat(fd)
            target = os.readlink(f"/proc/self/fd/{fd}") if Path("/proc").is_dir() else ""
            yield f"descriptor {fd} of {target or (status.st_dev, status.st_ino)}"


def _processes() -> Iterator[str]:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            yield f"process {process.pid} ({process.name()})"


def _described(belonging: str) -> str:
    """Say of a process what it is and does."""
    if not belonging.startswith("process "):
        return belonging
    try:
        process = psutil.Process(int(belonging.split()[1]))
        return f"{belonging}, {process.status()}: {' '.join(process.cmdline())}"
    except psutil.Error as error:
        return f"{belonging}: {error}"


def _names_of_shared_memory() -> Iterator[str]:
    """Yield all names but those that only others' processes use."""
    if not _SHARED_MEMORY.is_dir():
        return
    names = {name for name in os.listdir(_SHARED_MEMORY) if name.startswith(_PREFIXES)}
    if names:
        names -= _mapped_by_others(names)
    yield from (f"shared memory {name}" for name in names)


def _mapped_by_others(names: set[str]) -> set[str]:
    me = psutil.Process()
    ours = {me.pid, *(child.pid for child in me.children(recursive=True))}
    found: set[str] = set()
    for pid in set(psutil.pids()) - ours:
        with suppress(OSError):  # it has ended, or is not ours to look at
            maps = os.fsdecode(Path(f"/proc/{pid}/maps").read_bytes())
            found |= {name for name in names if f"{_SHARED_MEMORY}/{name}" in maps}
    return found


def _made_by_stores(place: Path) -> Iterator[Path]:
    """Yield segments, private directories, and sockets beside whose path is the note of a segment."""
    for directory, directories, files in os.walk(place):
        for name in (*directories, *files):
            path = Path(directory, name)
            with suppress(FileNotFoundError):
                if _NAME.fullmatch(name) or Path(f"{path}.lock").stat().st_size:
                    yield path
