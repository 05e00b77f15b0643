"""A socket that ends with its owner."""

from __future__ import annotations

import os
import socket

__all__ = ["OwnedSocket"]


class OwnedSocket(socket.socket):
    """A socket that closes without a word when it is freed, as a user may drop a client.

    Not when it is finalized: the collector may do so before others that it has found tell the other end something.
    """

    def __del__(self) -> None:
        self._rest = _Descriptor(self.detach())


class _Descriptor:
    """Closes a descriptor when it is freed."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
