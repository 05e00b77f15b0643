"""Descriptions of the segment's file, one for each client, by which it locks ids (`shmplasma.claims` has the argument).

The store keeps a descriptor of each as well: what a client has locked stays locked until the store has read what it has
left, also when its process was killed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from shmplasma import system
from shmplasma.exits import close_descriptor

__all__ = ["IdLocks"]

_LOG = logging.getLogger("shmplasma")


class IdLocks:
    """The descriptions that clients were given.

    Parameters
    ----------
    reopen : callable or None
        Returns a descriptor of the segment's file with a description of its own; OSError if there is none to be had.  None
        where clients create nothing by themselves.
    """

    def __init__(self, reopen: Callable[[], int] | None) -> None:
        self._reopen = reopen
        self._of_client: dict[int, int] = {}

    def give(self, client: int) -> int | None:
        """Return a descriptor for a client; None if there is none, and it has to ask for whatever it creates."""
        if self._reopen is None:
            return None
        try:
            fd = self._of_client[client] = self._reopen()
        except OSError as error:
            _LOG.warning("client %d cannot claim ids: %s", client, error)
            return None
        return fd

    def rename(self, client: int, number: int) -> None:
        """Take note that a client goes under another number."""
        fd = self._of_client.pop(client, None)
        if fd is not None:
            self._of_client[number] = fd

    def end(self, client: int, *, unlock: bool) -> None:
        """Close the descriptor of a client.

        Parameters
        ----------
        client : int
            Which.
        unlock : bool
            Whether what it has locked is taken back, as all that it has left was read.  What was given to a connection that only claimed
            a client stays locked: that lives, and may lock by it already.
        """
        fd = self._of_client.pop(client, None)
        if fd is None:
            return
        if unlock:
            try:
                system.unlock(fd)  # a child that it has forked may have the description still
            except OSError as error:
                _LOG.debug("what client %d has locked stays so for nothing: %s", client, error)
        close_descriptor(fd)

    def close(self) -> None:
        """Close all; clients keep what they have locked."""
        while self._of_client:
            close_descriptor(self._of_client.popitem()[1])
