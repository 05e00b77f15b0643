"""``shmplasma-flight``: the command that serves a store to other hosts.

Who reaches the server reaches the store, which else only its own user does: therefore it wants a token, or to be told that
there is to be none.  The token is read from a file, as the arguments of a process are for all to see.

Exit codes: 0 after SIGTERM or SIGINT, 1 if it cannot serve, 2 for an error of usage.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa

from shmplasma import __version__
from shmplasma.arrow_errors import NotConnectedError
from shmplasma.client import connect
from shmplasma.flight_server import StoreFlightServer
from shmplasma.readiness import notify

__all__ = ["main"]

_PROGRAM: Final = "shmplasma-flight"
_ENDING: Final = frozenset({signal.SIGTERM, signal.SIGINT})
_LOG: Final = logging.getLogger(__name__)
_GRACE_SECONDS: Final = 5.0
"""How long transfers may go on after the end was asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve a store until told to end.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of this process if not given.

    Returns
    -------
    int
        Exit code: 0 or 1.

    Raises
    ------
    SystemExit
        With code 2 for an error of usage, with 0 after ``--help`` and ``--version``.

    Notes
    -----
    To be called on the main thread, before others are started: it waits for signals.  Ends the process when transfers do
    not end in time.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if (options.tls_cert is None) != (options.tls_key is None):
        parser.error("--tls-cert and --tls-key go together")
    logging.basicConfig(format=f"%(asctime)s {_PROGRAM}: %(message)s", level=logging.INFO)
    # Also for Flight's threads, which inherit it.
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        token = None if options.no_token else _token(options.token_file)
        certificates = None
        if options.tls_cert is not None:
            certificates = [(options.tls_cert.read_text(), options.tls_key.read_text())]
        with connect(options.socket) as client:
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
            signal.sigwait(_ENDING)
            notify("STOPPING=1")
            _shut_down(server)
    except NotConnectedError as error:
        return _fail(str(error))
    except (OSError, ValueError, pa.ArrowException) as error:
        return _fail(f"cannot serve at {options.listen}: {error}")
    return 0


def _fail(text: str) -> int:
    sys.stderr.write(f"{_PROGRAM}: error: {text}\n")
    return 1


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
    token = path.read_text().strip()
    if not token:
        raise ValueError(f"there is no token in {path}")
    return token


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        _PROGRAM, description="Serve a store to other hosts, by Arrow Flight.", allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "-s",
        dest="socket",
        metavar="SOCKET",
        help="the store's socket (default: where shmplasma-store serves by default)",
    )
    add(
        "--listen",
        metavar="HOST:PORT",
        type=_address,
        default="127.0.0.1:8815",
        help="where to listen (default: 127.0.0.1:8815; 0.0.0.0:8815 for other hosts; port 0: any)",
    )
    tokens = parser.add_mutually_exclusive_group(required=True)
    tokens.add_argument("--token-file", metavar="FILE", type=Path, help="what callers have to show")
    tokens.add_argument("--no-token", action="store_true", help="serve whoever can connect")
    add("--tls-cert", metavar="FILE", type=Path, help="certificate chain (PEM), for TLS")
    add("--tls-key", metavar="FILE", type=Path, help="its private key (PEM)")
    add("--read-only", action="store_true", help="refuse puts and deletes")
    add("--version", action="version", version=f"{_PROGRAM} {__version__}")
    return parser


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if host and port.isdecimal() and int(port) < 1 << 16:
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no address; write HOST:PORT")


if __name__ == "__main__":
    sys.exit(main())
