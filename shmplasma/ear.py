"""Where hints arrive (`shmplasma.hints`): a datagram socket, whose address follows from the segment and the board of its client.

The address lies in a name space that needs no file and ends with the socket.  It is Linux's, as is all that the fast path needs.
"""

from __future__ import annotations

import socket

from shmplasma.hints import HINT
from shmplasma.owned_socket import OwnedSocket

__all__ = ["Ear", "address_of"]


def address_of(token: bytes, board: int) -> bytes:
    """Return where a client hears hints.

    Parameters
    ----------
    token : bytes
        The segment's identity.
    board : int
        The client's first board.
    """
    return b"\0shmplasma-%s-%d" % (token.hex().encode(), board)


class Ear:
    """What hears the hints for one client; parameters are those of `address_of`.

    Raises
    ------
    OSError
        There is no such socket to be had.
    """

    __slots__ = ("_sock",)

    def __init__(self, token: bytes, board: int) -> None:
        self._sock = OwnedSocket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._sock.setblocking(False)
            self._sock.bind(address_of(token, board))
        except BaseException:
            self._sock.close()
            raise

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    @property
    def is_open(self) -> bool:
        """Whether it hears anything."""
        return self._sock.fileno() >= 0

    def hear(self) -> bytes | None:
        """Return what has come, if anything has; empty if that is no hint."""
        try:
            hint = self._sock.recv(HINT.size + 1)
        except OSError:  # there is none, or it is closed
            return None
        return hint if len(hint) == HINT.size else b""

    def close(self) -> None:
        """Hear nothing any more."""
        self._sock.close()
