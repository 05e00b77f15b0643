"""The beginning of a conversation: one request at a time, and descriptors may come with the replies.

A client introduces itself by an `Exchange`; what follows goes over its socket by a `shmplasma.transport.Channel`.
"""

from __future__ import annotations

import errno
import os
import socket
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from shmplasma.owned_socket import OwnedSocket
from shmplasma.protocol import MAX_REPLY_BYTES, Frame, FrameDecoder, encode_frame

__all__ = ["RETRY_SECONDS", "Exchange", "close_inherited"]

_SEND_BYTES: Final = 32 << 10
"""What may wait unread at the store: some 80 small messages instead of 270."""
RETRY_SECONDS: Final = 0.1
_DESCRIPTORS: Final = 2
"""What a message brings at most."""
_connected: Final[weakref.WeakSet[socket.socket]] = weakref.WeakSet()
"""The sockets of all connections that were made here, whoever has them now; for a forked child."""


class Exchange:
    """One request at a time over a new connection.

    Parameters
    ----------
    sock : socket.socket
        Connected; closed by `close`, or handed on by `detach`.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._descriptors: list[int] = []

    @classmethod
    def connect(cls, path: str, num_retries: int, timeout_seconds: float) -> Exchange:
        """Connect to a Unix socket, again and again while nobody listens there.

        Parameters
        ----------
        path : str
            The socket's path.
        num_retries : int
            How often to try again, 0.1 s apart; the first attempt is not counted.
        timeout_seconds : float
            How long to wait for each reply.

        Raises
        ------
        OSError
            Nobody listens, after all attempts.
        """
        while True:
            sock = OwnedSocket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
            sock.settimeout(timeout_seconds)
            try:
                sock.connect(path)
            except OSError:
                sock.close()
                if num_retries <= 0:
                    raise
            else:
                _connected.add(sock)
                return cls(sock)
            num_retries -= 1
            time.sleep(RETRY_SECONDS)

    def call(self, kind: int, body: bytes) -> Frame:
        """Send a request and return its reply.

        Raises
        ------
        OSError
            The other end closed the connection, or did not answer in time.
        ProtocolError
            The other end does not speak the protocol.
        """
        with suppress(ConnectionError):  # who has closed the connection may have said why
            self._sock.sendall(encode_frame(kind, 1, body))
        decoder = FrameDecoder(MAX_REPLY_BYTES)
        while True:
            # Not a byte beyond the reply: what follows may be no frame (see `Role.SUBSCRIBER`).
            data, descriptors, _, _ = socket.recv_fds(
                self._sock, decoder.missing_bytes, _DESCRIPTORS
            )
            self._descriptors += descriptors
            for fd in descriptors:  # a program that this one becomes, or starts, is to have none
                os.set_inheritable(fd, False)
            if not data:
                raise ConnectionResetError("the store closed the connection")
            for frame in decoder.feed(data):
                return frame

    def take_descriptor(self) -> int:
        """Return the first descriptor that came with the last reply; the caller owns it.

        Raises
        ------
        OSError
            None came: this process has too many open.
        """
        if not self._descriptors:
            raise OSError(errno.EMFILE, "no descriptor arrived; too many files are open here")
        return self._descriptors.pop(0)

    def take_another(self) -> int | None:
        """Return the next one, if there is one; the caller owns it."""
        return self._descriptors.pop(0) if self._descriptors else None

    def detach(self) -> socket.socket:
        """Return the socket, blocking, for a `Channel`; descriptors that nobody took are closed."""
        self._close_descriptors()
        self._sock.settimeout(None)
        return self._sock

    def close(self) -> None:
        """Close the socket and the descriptors that nobody took."""
        self._sock.close()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def close_inherited(kept: Iterable[Exchange]) -> None:
    """Close, in a forked child, its copies of all connections of its parent, but for these.

    Those that other threads of the parent were just making are among them, of which nobody else knows yet: the store would not
    see that the parent has ended.
    """
    stay = {exchange._sock for exchange in kept}  # noqa: SLF001 - it is of this module
    for sock in set(_connected) - stay:
        sock.close()
