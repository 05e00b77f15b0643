"""How a segment is found: its name, the file behind it, and a mapping of that.

A segment is a POSIX shared-memory object, or a file in a directory of the operator's choice (a
tmpfs, a disk, a hugetlbfs).

Invariants
----------
* A name that comes from elsewhere (a note that a store left behind) names a segment or is refused.
* No mapping reserves anything: what may be touched is the business of whoever commits it.
"""

from __future__ import annotations

import mmap
import os
import re
from dataclasses import dataclass
from typing import Final, Literal, cast

import posix_ipc

from shmplasma import system
from shmplasma.errors import AttachError

__all__ = ["SegmentName", "map_segment", "open_segment", "refusal"]

# Half of the token: macOS allows 31 characters to a name.
_NAME_TOKEN_BYTES: Final = 8
_NOTE: Final = re.compile(rb"(?:posix:|file:(?:/[^\0]*)?)/shmplasma-[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class SegmentName:
    """How a client of the same mount namespace finds a segment.

    Attributes
    ----------
    kind : {"posix", "file"}
        Whether `path` is a shared-memory name or a file name.
    path : str
        ``/shmplasma-<hex>``, or an absolute file name that ends like that.

    Examples
    --------
    >>> SegmentName.plan(bytes(16), "/mnt/huge")
    SegmentName(kind='file', path='/mnt/huge/shmplasma-0000000000000000')
    """

    kind: Literal["posix", "file"]
    path: str

    @classmethod
    def plan(cls, token: bytes, directory: str | None) -> SegmentName:
        """Return the name of the segment with this identity, which need not exist yet."""
        name = f"shmplasma-{token[:_NAME_TOKEN_BYTES].hex()}"
        if directory is None:
            return cls("posix", f"/{name}")
        return cls("file", os.path.join(os.path.abspath(directory), name))

    def encode(self) -> bytes:
        """Return the name as a line of text that `decode` reads."""
        return f"{self.kind}:".encode() + os.fsencode(self.path)

    @classmethod
    def decode(cls, text: bytes) -> SegmentName | None:
        """Return the name in a text, or None unless it is one that `plan` could have given.

        Examples
        --------
        >>> SegmentName.decode(b"posix:/shmplasma-0000000000000000")
        SegmentName(kind='posix', path='/shmplasma-0000000000000000')
        >>> SegmentName.decode(b"file:/etc/passwd")
        """
        if not _NOTE.fullmatch(text):
            return None
        kind, _, path = text.partition(b":")
        return cls("posix" if kind == b"posix" else "file", os.fsdecode(path))

    def where(self) -> str:
        """Return what tells the directory of this name from all others of this boot; empty where that cannot be known."""
        try:
            found = os.stat(
                os.path.dirname(self.path) if self.kind == "file" else system.SHM_DIRECTORY
            )
        except OSError:
            return ""
        return f"{found.st_dev}:{found.st_ino}"

    def remove(self) -> bool:
        """Remove the name from the system; whoever has the segment open keeps it.

        Returns
        -------
        bool
            Whether there was such a name, and it could be removed.
        """
        try:
            if self.kind == "posix":
                posix_ipc.unlink_shared_memory(self.path)
            else:
                os.unlink(self.path)
        except (OSError, posix_ipc.Error):
            return False
        return True

    def is_gone(self) -> bool:
        """Return whether there is no such name, as far as can be seen."""
        try:
            os.close(open_segment(self, create=False))
        except (FileNotFoundError, posix_ipc.ExistentialError):
            return True
        except (OSError, ValueError, posix_ipc.Error):
            return False
        return False


def open_segment(name: SegmentName, *, create: bool) -> int:
    """Open the file behind a name, readable and writable, and return its descriptor.

    Raises
    ------
    OSError, ValueError, posix_ipc.Error
        It may not be opened; it is there already (`create`) or is not there.
    """
    if name.kind == "posix":
        flags = posix_ipc.O_CREX if create else 0
        return cast("int", posix_ipc.SharedMemory(name.path, flags=flags, mode=0o600).fd)
    flags = os.O_CREAT | os.O_EXCL if create else 0
    return os.open(name.path, flags | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def map_segment(fd: int, offset: int, size: int, *, writable: bool) -> mmap.mmap:
    """Map a range of a segment's file, shared; `offset` lies at a page's beginning."""
    protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    return mmap.mmap(fd, size, mmap.MAP_SHARED | system.MAP_NORESERVE, protection, offset=offset)


def refusal(verb: str, name: SegmentName, error: Exception, remedy: str = "") -> AttachError:
    """Return the error that says what could not be done with a segment, why, and what helps if that is known."""
    if isinstance(error, AttachError):
        return error
    return AttachError(f"cannot {verb} the segment {name.path}: {error}{remedy}")
