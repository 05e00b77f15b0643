"""A socket that ends with its owner."""

from __future__ import annotations

import socket

__all__ = ["OwnedSocket"]


class OwnedSocket(socket.socket):
    """A socket that closes without a word when it is collected, as a user may drop a client."""

    def __del__(self) -> None:
        self.close()
