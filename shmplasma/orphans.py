"""Sweeping up: segments that no store will ever want again.

An embedded store has a socket in a private directory and ends with the program that it serves.  When both are
killed its segment stays, and nobody will start a store there again to recover it.  So the header of such a
segment names the socket, and the store holds a lock of the file (``flock``) as long as it lives.

Whoever starts a store looks at all segments of this user.  One whose lock is free and whose header names a
socket is an orphan.  It is removed under the lock, so of two that sweep together one does it, and the other
finds the name gone.  A store that is just being made takes the lock before it writes the header: it is either
locked, or does not look like a segment yet and is left alone; its maker waits for the lock.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from shmplasma import system
from shmplasma.errors import LayoutError
from shmplasma.layout import HEADER_BYTES, Layout
from shmplasma.segment_name import SegmentName

__all__ = ["sweep"]

_NAME: Final = re.compile(r"shmplasma-[0-9a-f]{16}")


def sweep(directory: str | None) -> Iterator[str]:
    """Remove the orphans in a directory; yield the paths of their segments.

    Parameters
    ----------
    directory : str or None
        Where the files are; None for POSIX shared memory, where the system shows it as a directory.
    """
    place = system.SHM_DIRECTORY if directory is None else directory
    try:
        names = [name for name in os.listdir(place) if _NAME.fullmatch(name)]
    except OSError:
        return
    for name in names:
        with suppress(OSError):  # it has gone meanwhile, or is not ours to look at
            if _remove_orphan(os.path.join(place, name), directory):
                yield name


def _remove_orphan(path: str, directory: str | None) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return False
        if status.st_size < HEADER_BYTES:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as whole, memoryview(whole) as view:
            scratch = _scratch(view)
        if not scratch:
            return False
        name = os.path.basename(path)
        kept = SegmentName("posix", f"/{name}") if directory is None else SegmentName("file", path)
        removed = kept.remove()
        _remove_scratch(os.fsdecode(scratch))
        return removed
    finally:
        os.close(fd)


def _scratch(view: memoryview) -> bytes:
    """Return the socket path in a segment's header, or nothing where it has none or is none."""
    with view[:HEADER_BYTES] as header, header.cast("Q") as words:
        try:
            Layout.read(words)
        except LayoutError:
            return b""
        return Layout.scratch(words)


def _remove_scratch(socket_path: str) -> None:
    """Remove what is left of a private directory that was made for a store."""
    directory = os.path.dirname(socket_path)
    with suppress(OSError):
        status = os.lstat(directory)
        private = stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o700
        if not private or status.st_uid != os.geteuid():
            return
        for path in (socket_path, f"{socket_path}.lock"):
            with suppress(FileNotFoundError):
                os.unlink(path)
        os.rmdir(directory)
