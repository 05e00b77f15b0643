"""The errors of the layers below the client, and the root of them all.

This module is pure and imports nothing, so that the server starts without Arrow.  The errors which
a user of the client meets under Plasma's names need Arrow's base classes and live in
`shmplasma.arrow_errors`; they share the root `ShmPlasmaError`.
"""

from __future__ import annotations

__all__ = [
    "AttachError",
    "CommitError",
    "EndpointError",
    "LayoutError",
    "ProtocolError",
    "ShmPlasmaError",
]


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


class CommitError(ShmPlasmaError):
    """The file system behind the segment cannot give the pages that are needed.

    Attributes
    ----------
    needed_bytes : int
        Bytes that were asked for.
    free_bytes : int
        Bytes which the file system reported free at that moment.
    remedy : str
        What the operator can do about it.
    """

    def __init__(self, needed_bytes: int, free_bytes: int, remedy: str) -> None:
        super().__init__(
            f"the file system of the segment cannot give {needed_bytes} more bytes "
            f"({free_bytes} are free); {remedy}"
        )
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        self.remedy = remedy
