"""Starting a peer's server program."""

from __future__ import annotations

import socket
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["serving"]

_PATIENCE_SECONDS = 30.0
_POLL_SECONDS = 0.001


@contextmanager
def serving(command: list[str], socket_path: str) -> Iterator[int]:
    """Run a server until the block ends; it is ready as soon as its socket accepts.

    Raises
    ------
    RuntimeError
        The server ended, or did not accept within 30 seconds.
    """
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not _accepts(socket_path):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} does not serve (exit code {server.poll()})")
                time.sleep(_POLL_SECONDS)
            yield server.pid
        finally:
            server.terminate()


def _accepts(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0
