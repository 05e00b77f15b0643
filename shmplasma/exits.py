"""Clients that are not connected and may still live: whoever wants to know hears when their process has ended."""

from __future__ import annotations

import logging
import os
import selectors
from collections.abc import Callable
from contextlib import suppress

from shmplasma import system

__all__ = ["Exits", "close_descriptor"]

_LOG = logging.getLogger("shmplasma")


def close_descriptor(fd: int) -> None:
    """Close a descriptor; an error of a close says nothing that anybody could do."""
    with suppress(OSError):
        os.close(fd)


class Exits:
    """The processes whose end the loop waits for.

    Parameters
    ----------
    selector : selectors.BaseSelector
        The loop's.
    gone : callable
        ``gone(client)`` is called in the loop when that client's process has ended, once for each `watch`, and not after `forget`.
    """

    def __init__(self, selector: selectors.BaseSelector, gone: Callable[[int], None]) -> None:
        self._selector = selector
        self._gone = gone
        self._watched: dict[int, int] = {}

    def watch(self, client: int, pid: int) -> bool:
        """Wait for the end of a client's process, where that can be seen; else the client stays for good.  Tell whether it can."""
        try:
            exited = system.watch_exit(pid) if pid else None
        except ProcessLookupError:
            self._gone(client)
            return True
        if exited is None:
            return False

        def ended() -> None:
            # An earlier event of this turn may have forgotten it.
            if self._watched.get(client) == exited:
                self.forget(client)
                self._gone(client)

        try:
            self._selector.register(exited, selectors.EVENT_READ, ended)
        except OSError as error:
            _LOG.warning("what client %d was given stays its own for good: %s", client, error)
            close_descriptor(exited)
            return False
        self._watched[client] = exited
        return True

    def forget(self, client: int) -> None:
        """Wait no more for a client."""
        exited = self._watched.pop(client, None)
        if exited is not None:
            self._selector.unregister(exited)
            close_descriptor(exited)

    def close(self) -> None:
        """Wait for nobody any more."""
        for exited in self._watched.values():
            close_descriptor(exited)
        self._watched.clear()
