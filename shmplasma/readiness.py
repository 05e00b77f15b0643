"""Readiness: whoever supervises a service is told that it serves, or ends."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

__all__ = ["notify"]


def notify(state: str) -> None:
    """Tell systemd about the state of this service, as ``sd_notify`` does.

    Parameters
    ----------
    state : str
        For example ``"READY=1"``.

    Notes
    -----
    Does nothing unless ``$NOTIFY_SOCKET`` is set, and is silent if nobody listens there any more.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state.encode(), address)
