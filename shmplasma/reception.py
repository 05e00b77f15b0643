"""The door of a store: who may connect, and whether there are descriptors for him."""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from shmplasma import system
from shmplasma.connections import close_socket
from shmplasma.protocol import ONE_WAY, encode_frame
from shmplasma.replies import Failed, Failure

__all__ = ["Reception"]

_LOG = logging.getLogger("shmplasma")
_NOBODY_TO_ACCEPT: Final = (errno.EAGAIN, errno.ECONNABORTED)


class Reception:
    """Accepts connections, and says why it accepts some not.

    Parameters
    ----------
    listener : socket.socket
        Listening, non-blocking.
    selector : selectors.BaseSelector
        The loop's.
    shared : bool
        Whether others than this user and root may connect.
    admit : callable
        ``admit(sock, peer)`` takes over a connection; an OSError gives it back.

    Attributes
    ----------
    is_open : bool
        Whether connections are accepted.  Where there are no descriptors for one it waits in the listener's queue, until
        `open`.
    """

    def __init__(
        self,
        listener: socket.socket,
        selector: selectors.BaseSelector,
        *,
        shared: bool,
        admit: Callable[[socket.socket, system.Peer], None],
    ) -> None:
        self._listener = listener
        self._selector = selector
        self._shared = shared
        self._admit = admit
        selector.register(listener, selectors.EVENT_READ, self._accept)
        self.is_open = True

    def open(self) -> None:
        """Accept connections again, if they had to wait."""
        if self.is_open:
            return
        try:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        except OSError as error:
            _LOG.warning("new connections still have to wait: %s", error)
        else:
            self.is_open = True

    def _accept(self) -> None:
        try:
            to_look_with = os.open(os.devnull, os.O_RDONLY)  # at his process, once he is accepted
            try:
                sock, _ = self._listener.accept()
            finally:
                os.close(to_look_with)
        except OSError as error:
            if error.errno not in _NOBODY_TO_ACCEPT:
                _LOG.warning(
                    "no descriptor or memory for a new connection (%s); it waits. Raise the limit "
                    "of open files (ulimit -n)",
                    error,
                )
                self._selector.unregister(self._listener)
                self.is_open = False
            return
        try:
            peer = system.peer(sock)
            if not self._shared and peer.uid not in (0, os.geteuid()):
                _LOG.warning("refused pid %s of uid %s: not this user", peer.pid, peer.uid)
                _refuse(sock)
            else:
                self._admit(sock, peer)
        except OSError as error:
            _LOG.warning("a client left before it was looked at, or cannot be served: %s", error)
            close_socket(sock)


def _refuse(sock: socket.socket) -> None:
    """Tell a stranger that he is one, without hearing him."""
    failed = Failed(
        Failure.DROPPED,
        f"this store serves the user with uid {os.geteuid()} alone; its operator can admit others: start it with "
        "--group NAME --mode 0660, or with --mode 0666",
    )
    sock.setblocking(False)
    with suppress(OSError):
        sock.send(encode_frame(failed.KIND, ONE_WAY, failed.encode()))
    close_socket(sock)
