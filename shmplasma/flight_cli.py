"""``shmplasma-flight``: the command that serves a store to other hosts.

Who reaches the server reaches the store, which else only its own user does: therefore it wants a token, or to be told that
there is to be none.  The token is read from a file, as the arguments of a process are for all to see.

NumPy and Arrow start threads when they are imported, and a thread that does not hold a signal back takes it.  Therefore what
needs them is in `shmplasma.gateway`, and imported late.

Exit codes: 0 after SIGTERM, SIGINT or SIGHUP, 1 if it cannot serve, 2 for an error of usage.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from shmplasma import __version__
from shmplasma.endings import hold_back

__all__ = ["main"]

_PROGRAM: Final = "shmplasma-flight"


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
    ending = hold_back()
    from shmplasma.gateway import CannotServeError, serve  # noqa: PLC0415 - see above

    try:
        serve(options, ending)
    except CannotServeError as error:
        sys.stderr.write(f"{_PROGRAM}: error: {error}\n")
        return 1
    return 0


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
    if not host or not port.isdecimal() or int(port) >= 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is no address; write HOST:PORT")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise argparse.ArgumentTypeError(f"an address of IPv6 has brackets; write [{host}]:{port}")
    return text


if __name__ == "__main__":
    sys.exit(main())
