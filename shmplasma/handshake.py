"""The handshake, as a client does it: it connects, says who it is, and is told where the segment is."""

from __future__ import annotations

import errno
import shlex
import time
from typing import Final

from shmplasma.arrow_errors import NotConnectedError
from shmplasma.endpoint import fault_of, may_come_back
from shmplasma.errors import ProtocolError
from shmplasma.exchange import RETRY_SECONDS, Exchange
from shmplasma.outcomes import expect
from shmplasma.protocol import PROTOCOL_VERSION
from shmplasma.replies import Welcome
from shmplasma.requests import Hello, Role

__all__ = ["greet", "greet_again"]

_HANDSHAKE_SECONDS: Final = 10.0
_RETRY_SECONDS: Final = 0.005
"""A store that recovers is back after some tens of milliseconds."""


def greet(
    path: str, num_retries: int, role: Role, name: str, reclaim: int = 0
) -> tuple[Exchange, Welcome]:
    """Connect to the store at a path and introduce this process.

    Parameters
    ----------
    path : str
        The store's socket.
    num_retries : int
        How often to try again, 0.1 s apart.
    role : Role
        What the connection is for.
    name : str
        What the store is to call this client in its messages.
    reclaim : int, optional
        First board + 1 of a client that wants to go on after the death of its store.

    Raises
    ------
    NotConnectedError
        No store answers there, or none ever can.
    OSError
        There is no descriptor, or no memory, for a connection.
    """
    fault = fault_of(path)
    if fault:
        raise NotConnectedError(f"{fault}; give the path at which a store serves (its -s)")
    while True:
        try:
            exchange = Exchange.connect(path, num_retries, _HANDSHAKE_SECONDS)
        except PermissionError as error:
            raise NotConnectedError(
                f"the store at {path!r} is another user's ({error}); its operator can admit others: start it with "
                "--group NAME --mode 0660, or with --mode 0666"
            ) from error
        except OSError as error:
            _raise_own(error, path)
            if error.errno == errno.EAGAIN:
                raise NotConnectedError(
                    f"the store at {path!r} has too many connections waiting; its log may say why; connect again later"
                ) from error
            raise NotConnectedError(
                f"no store answers at {path!r} ({error}); start one with: shmplasma-store -s {shlex.quote(path)}"
            ) from error
        hello = Hello(PROTOCOL_VERSION, role, name, reclaim)
        try:
            return exchange, expect(Welcome, exchange.call(Hello.KIND, hello.encode()))
        except (OSError, ProtocolError) as error:
            exchange.close()
            if isinstance(error, NotConnectedError):
                raise
            _raise_own(error, path)
            # One that listens and does not answer may still be starting; a store that died just now may be back soon.
            is_slow = isinstance(error, TimeoutError)
            may_answer = is_slow or (isinstance(error, ConnectionError) and may_come_back(path))
            tried = round(_HANDSHAKE_SECONDS / RETRY_SECONDS) if is_slow else 0
            if num_retries <= tried or not may_answer:
                raise NotConnectedError(f"what listens at {path!r} is no store: {error}") from error
            num_retries -= tried
        except BaseException:
            exchange.close()
            raise
        num_retries -= 1
        time.sleep(RETRY_SECONDS)


def _raise_own(error: Exception, path: str) -> None:
    """Raise what a user is to see if it is this process, and not the store, to which a connection has failed."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE):
        text = f"there is no descriptor for a connection to {path!r}; too many files are open here"
        raise OSError(number, text) from error
    if number in (errno.ENOMEM, errno.ENOBUFS):
        text = f"there is no memory for a connection to {path!r}; free some, and connect again"
        raise OSError(number, text) from error


def greet_again(
    path: str, role: Role, name: str, reclaim: int, patience_seconds: float
) -> tuple[Exchange, Welcome]:
    """Introduce this process to a store that has died and may come back, once it has; otherwise as `greet`.

    Parameters
    ----------
    patience_seconds : float
        How long to wait for it.
    """
    end = time.monotonic() + patience_seconds
    while True:
        try:
            return greet(path, 0, role, name, reclaim)
        except NotConnectedError:
            if time.monotonic() >= end or not may_come_back(path):
                raise
        time.sleep(_RETRY_SECONDS)
