"""Notifications: which objects were sealed, and which have gone.

The store sends them on a connection of their own, each as an 8-byte little-endian length and then so many
bytes, which hold one or more records (`shmplasma.replies.NOTIFICATION`).  This is how Plasma framed them;
what is inside the bytes is ours to choose, as only `decode` reads it.

A subscription outlasts a store that dies and comes back, as a client does.  A new one begins with all that is
sealed; so what was sealed meanwhile is told, and what was told before is told again.  What went meanwhile is not:
a warning says so.
"""

from __future__ import annotations

import socket
import warnings
from typing import Final

from shmplasma import system
from shmplasma.arrow_errors import NotConnectedError
from shmplasma.handshake import greet, greet_again
from shmplasma.objects import ObjectID
from shmplasma.replies import NOTIFICATION
from shmplasma.requests import Role

__all__ = ["LENGTH_BYTES", "Subscription", "decode"]

LENGTH_BYTES: Final = 8
"""What stands before a notification: how many bytes it has."""
_ENDED: Final = "the store has ended the subscription; subscribe again"
_UNREAD: Final = (
    "the store has dropped this subscription, as too much of it was unread; subscribe again"
)
_GAP: Final = (
    "the store has died and come back: notifications go on with all objects that are sealed, and those that went "
    "meanwhile are not told of; compare with list()"
)


def decode(notification: bytes) -> tuple[list[ObjectID], list[int], list[int]]:
    """Return the ids, data sizes and metadata sizes in a notification; sizes are -1 for what has gone.

    Raises
    ------
    TypeError, ValueError
        These are no bytes, or not those of a notification.

    Examples
    --------
    >>> decode(NOTIFICATION.pack(20 * b"a", 5, 0))
    ([ObjectID(6161616161616161616161616161616161616161)], [5], [0])
    """
    size = memoryview(notification).nbytes
    if size % NOTIFICATION.size:
        raise ValueError(
            f"{size} bytes are no notification; pass what follows the 8-byte length, all of it"
        )
    records = list(NOTIFICATION.iter_unpack(notification))
    return (
        [ObjectID(object_id) for object_id, _, _ in records],
        [data_size for _, data_size, _ in records],
        [metadata_size for _, _, metadata_size in records],
    )


class Subscription:
    """A connection that carries notifications.

    Parameters
    ----------
    path : str
        The store's socket.
    name : str
        What the store calls this client.
    patience_seconds : float
        How long a store that has died is waited for.

    Attributes
    ----------
    sock : socket.socket
        The connection, for those who wait for several things at once; another one after `renew`.

    Raises
    ------
    NotConnectedError
        No store answers there.
    """

    def __init__(self, path: str, name: str, patience_seconds: float) -> None:
        exchange, welcome = greet(path, 0, Role.SUBSCRIBER, name)
        self.sock: socket.socket = exchange.detach()
        self._received: list[bytes] = []
        self._path = path
        self._name = name
        self._patience_seconds = patience_seconds
        self._token = welcome.token
        self._store = _process(self.sock)

    def next(self) -> tuple[ObjectID, int, int]:
        """Wait for the next notification and return id, data size and metadata size.

        Raises
        ------
        NotConnectedError
            The store has gone, or has dropped a subscriber that did not keep up.

        Warns
        -----
        RuntimeWarning
            As `renew` does.
        """
        while True:
            try:
                length = int.from_bytes(self._read(LENGTH_BYTES)[:LENGTH_BYTES], "little")
                message = self._read(LENGTH_BYTES + length)
            except ConnectionResetError:
                self.renew()
                continue
            ids, data_sizes, metadata_sizes = decode(message[LENGTH_BYTES:])
            self._received = []
            return ids[0], data_sizes[0], metadata_sizes[0]

    def _read(self, size_bytes: int) -> bytes:
        """Return the first bytes of the message, those that an interrupted call has received included."""
        received = self._received
        while (missing := size_bytes - sum(map(len, received))) > 0:
            # A C loop, so that no interrupt comes before they are kept (see `shmplasma.transport`).
            received.extend(map(self.sock.recv, (missing,), (socket.MSG_WAITALL,)))
            if not received[-1]:
                raise ConnectionResetError("the store closed the connection")
        return b"".join(received)

    def renew(self) -> None:
        """Go on, after the end of the connection, with the store that comes back if this one has died.

        Raises
        ------
        NotConnectedError
            There is none, or one with other objects; or the store lives, and did not want this subscriber.

        Warns
        -----
        RuntimeWarning
            There is one, and it does not tell of objects that went meanwhile.
        """
        try:
            exchange, welcome = greet_again(
                self._path, Role.SUBSCRIBER, self._name, 0, self._patience_seconds
            )
        except NotConnectedError as error:
            raise NotConnectedError(_ENDED) from error
        sock = exchange.detach()
        store = _process(sock)
        lives = store is not None and store == self._store
        if lives or welcome.token != self._token:
            sock.close()
            raise NotConnectedError(_UNREAD if lives else _ENDED)
        self.sock.close()
        self.sock, self._store, self._received = sock, store, []
        warnings.warn(_GAP, RuntimeWarning, stacklevel=3)

    def close(self) -> None:
        """End the subscription."""
        self.sock.close()


def _process(sock: socket.socket) -> tuple[int, int] | None:
    """Return pid and start time of the store at the other end, where they can be seen."""
    pid = system.peer(sock).pid
    try:
        start_time = system.start_time(pid) if pid else None
    except OSError:  # there is no descriptor to look with
        return None
    return (pid, start_time) if pid and start_time else None
