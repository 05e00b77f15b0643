"""What ``shmplasma-flight`` does once its options are read: it waits for a store, and serves it until told to end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyarrow import ArrowException

from shmplasma.arrow_errors import NotConnectedError
from shmplasma.client import PlasmaClient, connect
from shmplasma.connected import DEFAULT_RETRIES
from shmplasma.endings import is_told_to_end
from shmplasma.errors import LayoutError, ShmPlasmaError
from shmplasma.exchange import RETRY_SECONDS
from shmplasma.flight_server import StoreFlightServer
from shmplasma.readiness import notify

if TYPE_CHECKING:
    import argparse

__all__ = ["CannotServeError", "serve"]

_LOG: Final = logging.getLogger("shmplasma")
_GRACE_SECONDS: Final = 5.0
"""How long transfers may go on after the end was asked for."""


class CannotServeError(ShmPlasmaError):
    """There is no store to serve, no token, or no address to listen at."""


def serve(options: argparse.Namespace, ending: frozenset[signal.Signals]) -> None:
    """Serve a store until told to end.

    Parameters
    ----------
    options : argparse.Namespace
        Those of `shmplasma.flight_cli`.
    ending : set of signal.Signals
        What tells to end; held back.

    Raises
    ------
    CannotServeError
        It cannot serve.
    """
    try:
        token = None if options.no_token else _token(options.token_file)
        certificates = None
        if options.tls_cert is not None:
            certificates = [(options.tls_cert.read_text(), options.tls_key.read_text())]
        client = _connect(options.socket)
        if client is None:
            return
        with client:
            scheme = "grpc" if certificates is None else "grpc+tls"
            server = StoreFlightServer(
                client,
                f"{scheme}://{options.listen}",
                token=token,
                tls_certificates=certificates,
                read_only=options.read_only,
            )
            host = options.listen.rpartition(":")[0]
            location = f"{scheme}://{host}:{server.port}"
            _LOG.info("ready: location %s, store %s", location, client.store_socket_name)
            notify("READY=1")
            signal.sigwait(ending)
            notify("STOPPING=1")
            _shut_down(server)
    except (NotConnectedError, LayoutError) as error:
        raise CannotServeError(str(error)) from error
    except ArrowException as error:
        reason = _refusal(options.listen) or str(error)
        if options.tls_cert is not None and reason == str(error):
            reason += "; see whether --tls-cert and --tls-key are PEM, and of one key"
        raise CannotServeError(f"cannot serve at {options.listen}: {reason}") from error
    except (OSError, ValueError) as error:
        raise CannotServeError(f"cannot serve at {options.listen}: {error}") from error


def _connect(path: str | None) -> PlasmaClient | None:
    """Return a client of the store, which is waited for as long as any client does; None when told to end before."""
    end = time.monotonic() + DEFAULT_RETRIES * RETRY_SECONDS
    while not is_told_to_end():
        try:
            return connect(path, 0)
        except NotConnectedError:
            if time.monotonic() >= end:
                raise
        time.sleep(RETRY_SECONDS)
    return None


def _refusal(address: str) -> str:
    """Return why the system lets nobody listen at an address, which Flight does not say; empty if it does."""
    host, _, port = address.rpartition(":")
    try:
        for family, kind, _, _, found in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(found)
    except OSError as error:
        return f"{error.strerror}; name another address with --listen"
    return ""


def _shut_down(server: StoreFlightServer) -> None:
    """Let transfers end; end the process with those that do not, as Flight has no other means."""
    ending = threading.Thread(target=server.shutdown, daemon=True)
    ending.start()
    ending.join(_GRACE_SECONDS)
    if ending.is_alive():
        _LOG.warning("transfers were cut off, as they went on for %g s more", _GRACE_SECONDS)
        logging.shutdown()
        os._exit(0)


def _token(path: Path) -> str:
    token = path.read_text(errors="replace").strip()
    if not token:
        raise ValueError(f"there is no token in {path}")
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"no caller can show the token in {path}; write one of ASCII in one line")
    return token
