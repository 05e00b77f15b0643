"""Notifications: which objects were sealed, and which have gone.

The store sends them on a connection of their own, each as an 8-byte little-endian length and then so many
bytes, which hold one or more records (`shmplasma.replies.NOTIFICATION`).  This is how Plasma framed them;
what is inside the bytes is ours to choose, as only `decode` reads it.
"""

from __future__ import annotations

import socket
from typing import Final

from shmplasma.arrow_errors import NotConnectedError
from shmplasma.link import greet
from shmplasma.objects import ObjectID
from shmplasma.replies import NOTIFICATION
from shmplasma.requests import Role

__all__ = ["ENDED", "LENGTH_BYTES", "Subscription", "decode"]

LENGTH_BYTES: Final = 8
"""What stands before a notification: how many bytes it has."""
ENDED: Final = "the store has ended the subscription; subscribe again"


def decode(notification: bytes) -> tuple[list[ObjectID], list[int], list[int]]:
    """Return the ids, data sizes and metadata sizes in a notification; sizes are -1 for what has gone.

    Raises
    ------
    ValueError
        These bytes are not a notification.

    Examples
    --------
    >>> decode(NOTIFICATION.pack(20 * b"a", 5, 0))
    ([ObjectID(6161616161616161616161616161616161616161)], [5], [0])
    """
    if len(notification) % NOTIFICATION.size:
        raise ValueError(
            f"{len(notification)} bytes are no notification; pass what follows the 8-byte length, "
            "all of it"
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

    Attributes
    ----------
    sock : socket.socket
        The connection, for those who wait for several things at once.

    Raises
    ------
    NotConnectedError
        No store answers there.
    """

    def __init__(self, path: str, name: str) -> None:
        exchange, _ = greet(path, 0, Role.SUBSCRIBER, name)
        self.sock: socket.socket = exchange.detach()

    def next(self) -> tuple[ObjectID, int, int]:
        """Wait for the next notification and return id, data size and metadata size.

        Raises
        ------
        NotConnectedError
            The store has gone, or has dropped a subscriber that did not keep up.
        """
        length = int.from_bytes(self._read(LENGTH_BYTES), "little")
        ids, data_sizes, metadata_sizes = decode(self._read(length))
        return ids[0], data_sizes[0], metadata_sizes[0]

    def _read(self, size_bytes: int) -> bytes:
        data = self.sock.recv(size_bytes, socket.MSG_WAITALL)
        if len(data) < size_bytes:
            raise NotConnectedError(ENDED)
        return data

    def close(self) -> None:
        """End the subscription."""
        self.sock.close()
