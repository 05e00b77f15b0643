"""The errors of the layers below the client, and the root of them all.

This module is pure and imports nothing of the others, so that the server starts without Arrow.  The errors which
a user of the client meets under Plasma's names need Arrow's base classes and live in
`shmplasma.arrow_errors`; they share the root `ShmPlasmaError`.
"""

from __future__ import annotations

import errno
from typing import Final, NamedTuple

__all__ = [
    "AttachError",
    "CommitError",
    "EndpointError",
    "ExternalStoreError",
    "Holder",
    "LayoutError",
    "ProtocolError",
    "ShmPlasmaError",
    "StoreNotStartedError",
    "what_helps",
]

_LIMITS: Final = {
    errno.EMFILE: "close some files, or raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close some files, or raise the system's limit of open files (fs.file-max)",
    errno.ENOMEM: "free some memory, or raise the limit of a process's memory (ulimit -v) or that of its mappings (vm.max_map_count)",
    errno.EAGAIN: "end some processes, or raise their limit (ulimit -u), or that of the control group (pids.max)",
}
"""The limits that a client may have met, and what helps."""


def what_helps(error: OSError) -> str:
    """Return what helps a client that has met a limit, to be added to a message; empty if it is none."""
    remedy = _LIMITS.get(error.errno or 0)
    return "" if remedy is None else f"; {remedy}"


class ShmPlasmaError(Exception):
    """Root of every error that shmplasma raises on purpose."""


class ProtocolError(ShmPlasmaError):
    """A peer sent bytes that are not a message of the protocol; the connection is of no more use."""


class LayoutError(ShmPlasmaError):
    """A header does not describe a segment of this layout version, or describes an impossible one."""


class AttachError(ShmPlasmaError, OSError):
    """A segment could not be created or attached."""


class EndpointError(ShmPlasmaError, OSError):
    """A socket path cannot be served: it is in use, is not ours, or is no socket."""


class StoreNotStartedError(ShmPlasmaError, RuntimeError):
    """The server of an embedded store did not start; a RuntimeError, as with Plasma."""


class ExternalStoreError(ShmPlasmaError):
    """The external store cannot give or take an object; only that object is concerned."""


class CommitError(ShmPlasmaError):
    """What is behind the segment cannot give the pages that are needed.

    Attributes
    ----------
    needed_bytes : int
        Bytes that were asked for.
    free_bytes : int
        Bytes which were free at that moment, by the least of all limits.
    remedy : str
        What the operator can do about it.
    limit : str
        What has no more: the file system, the memory.
    """

    def __init__(
        self,
        needed_bytes: int,
        free_bytes: int,
        remedy: str,
        limit: str = "the file system of the segment",
    ) -> None:
        super().__init__(
            f"{limit} cannot give {needed_bytes} more bytes ({free_bytes} are free); {remedy}"
        )
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        self.remedy = remedy
        self.limit = limit


class Holder(NamedTuple):
    """A client that holds memory of a store, as a `PlasmaStoreFull` names it.

    Attributes
    ----------
    name : str
        What the client calls itself: its program, or what `set_client_options` said.
    pid : int
        Its process; 0 if the store cannot see it (another pid namespace).
    command : str
        That process's command line when it connected, up to 255 bytes of it; empty if it cannot be seen.
    held_bytes : int
        Data and metadata of the objects that it holds buffers of or has not sealed; what several hold counts
        for each of them.
    age_seconds : float
        How long it has been connected (to this store, or since it was recovered); the store cannot know when a buffer was got.
    """

    name: str
    pid: int
    command: str
    held_bytes: int
    age_seconds: float
