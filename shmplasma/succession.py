"""An upgrade: a store that takes the place of a running one, without its clients losing anything.

The new store, all of it imported and its options found to fit, asks the old one to end.  The old one handles
what it has read, answers nothing more, leaves segment, socket and note where they are, and ends.  The new one
claims the endpoint and recovers the segment as if the old one had died (`shmplasma.recovery`); its clients
notice as much (`shmplasma.link`): a pause.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Final

from shmplasma.endpoint import note_of
from shmplasma.errors import EndpointError, ProtocolError
from shmplasma.exchange import Exchange
from shmplasma.protocol import PROTOCOL_VERSION
from shmplasma.replies import Done, Failed, decode_reply
from shmplasma.requests import Hello, Role
from shmplasma.segment_name import SegmentName

__all__ = ["replace"]

_LOG: Final = logging.getLogger("shmplasma")
_PATIENCE_SECONDS: Final = 10.0
"""For an answer.  Once the old store has agreed to end nothing else can serve its clients, and it may take its time."""

_LOOK_SECONDS: Final = 0.2
"""How often to see whether we are to end ourselves."""

_LOG_SECONDS: Final = 10.0


def replace(
    path: str, check: Callable[[SegmentName], object], is_ending: Callable[[], bool]
) -> None:
    """Have the store that serves a socket end, and leave what it has to us; nothing if there is none.

    Parameters
    ----------
    path : str
        Its socket.
    check : callable
        ``check(name)`` raises if its segment cannot be taken over; the store is left alone then.
    is_ending : callable
        Whether this store is to end, so that it waits no longer for the other one.

    Raises
    ------
    EndpointError
        It is another user's, refuses, or has not ended when this store is to end.
    """
    try:
        if os.stat(path).st_uid != os.geteuid():
            raise EndpointError(
                f"what listens at {path} is another user's, and only that user may replace it"
            )
        Exchange.connect(path, 0, _PATIENCE_SECONDS).close()
    except EndpointError:
        raise
    except OSError as error:
        _LOG.info("nobody to replace at %s: %s", path, error)
        return
    left = SegmentName.decode(note_of(path))
    if left is None:
        raise EndpointError(f"what listens at {path} is no store that could be replaced")
    check(left)
    try:
        # Not before: an external store may take longer to be looked at than a store waits for who has connected to introduce himself.
        exchange = Exchange.connect(path, 0, _PATIENCE_SECONDS)
    except OSError as error:
        raise EndpointError(
            f"the store at {path} has ended meanwhile ({error}); start this one again"
        ) from error
    try:
        hello = Hello(PROTOCOL_VERSION, Role.SUCCESSOR, "successor")
        reply = decode_reply(exchange.call(hello.KIND, hello.encode()))
        if isinstance(reply, Failed):
            raise EndpointError(f"the store at {path} cannot be replaced: {reply.text}")
        assert isinstance(reply, Done)
        _wait_for_the_end(exchange.detach(), path, is_ending)
    except (OSError, ProtocolError) as error:
        if isinstance(error, EndpointError):
            raise
        raise EndpointError(f"the store at {path} will not be replaced: {error}") from error
    finally:
        exchange.close()


def _wait_for_the_end(sock: socket.socket, path: str, is_ending: Callable[[], bool]) -> None:
    """Wait until the process at the other end has closed its socket, which it does when it ends."""
    began = said = time.monotonic()
    sock.settimeout(_LOOK_SECONDS)
    while not is_ending():
        try:
            if not sock.recv(64):
                return
        except TimeoutError:
            now = time.monotonic()
            if now - said >= _LOG_SECONDS:
                said = now
                _LOG.info(
                    "the store at %s has agreed to end, and has not for %.0f s: it ends when what it "
                    "writes to its external store is written",
                    path,
                    now - began,
                )
        except ConnectionResetError:
            return
    raise EndpointError(f"told to end before the store at {path} had ended, which it will")
