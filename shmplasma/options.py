"""The options of ``shmplasma-store``: what they are called, what they take, and what is said of those that are wrong."""

from __future__ import annotations

import argparse
import grp
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final, SupportsFloat

from shmplasma import __version__, system
from shmplasma.sizes import parse_size
from shmplasma.spilling import ExternalLimits
from shmplasma.tickets import TICKET_NS

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PROGRAM", "check_seconds", "parse"]

PROGRAM: Final = "shmplasma-store"

_SPILL_ABOVE: Final = ExternalLimits().high_water


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options that some arguments state; those of this process if they are None.

    Raises
    ------
    SystemExit
        With code 2 for an error of usage, with 0 after ``--help`` and ``--version``.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if options.huge_pages and (
        options.directory is None or system.huge_page_bytes(options.directory) is None
    ):
        parser.error(
            "-h: huge pages need a hugetlbfs; mount one (mount -t hugetlbfs none /mnt/hugepages) "
            "and name it: -d /mnt/hugepages -h"
        )
    if not options.external_store:
        for name in ("max_spill_bytes", "spill_above"):
            if getattr(options, name) is not None:
                parser.error(
                    f"--{name.replace('_', '-')} is about an external store; name one with -e URI"
                )
    if options.spill_above is None:
        options.spill_above = _SPILL_ABOVE
    return options


def check_seconds(seconds: float) -> float:
    """Return how long a reference may wait for its receiver; raise TypeError or ValueError if it is no such number."""
    if not isinstance(seconds, SupportsFloat):
        raise TypeError(f"a number of seconds is needed here, not {type(seconds).__name__}")
    if not 0 <= seconds < 1e9:
        raise ValueError(f"{seconds} is no number of seconds; write 600 or 0.5")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Run an in-memory object store for the processes of this machine.",
        add_help=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "-m",
        dest="memory",
        metavar="BYTES",
        type=_size,
        help="capacity, also as 4GB or 512MiB (default: 30%% of what is available)",
    )
    add(
        "-s",
        dest="socket",
        metavar="SOCKET",
        help="path of the socket to listen on (default: in a private directory)",
    )
    add(
        "-d",
        dest="directory",
        metavar="DIRECTORY",
        type=_directory,
        help="keep the objects in a file there (default: POSIX shared memory)",
    )
    add(
        "-h",
        dest="huge_pages",
        action="store_true",
        help="use huge pages; -d names a hugetlbfs",
    )
    add(
        "--prefault",
        action="store_true",
        help="commit all memory before the store serves, and keep it",
    )
    add(
        "--trim-floor",
        type=_size_or_0,
        metavar="BYTES",
        help="how much unused memory stays committed (default: 64MiB; with --prefault: all)",
    )
    add(
        "-e",
        dest="external_store",
        metavar="URI",
        help="where objects that no longer fit go, and from where they come back when they are asked for: "
        "file:///directory, s3://bucket/prefix, memory://",
    )
    add(
        "--max-spill-bytes",
        type=_size,
        metavar="BYTES",
        help="how much the external store may hold (default: no limit)",
    )
    add(
        "--spill-above",
        type=_share,
        metavar="SHARE",
        help="the share of the capacity above which objects are written ahead of need "
        f"(default: {_SPILL_ABOVE})",
    )
    add(
        "--mode",
        type=_mode,
        default=0o600,
        metavar="OCTAL",
        help="permissions of the socket and the segment (default: 0600)",
    )
    add("--group", type=_group, metavar="NAME", help="group of the socket and the segment")
    add(
        "--client-limit",
        metavar="BYTES",
        type=_size_or_0,
        help="how much a client may hold or have unsealed, if it sets no limit itself (default: 0, no limit)",
    )
    add(
        "--fresh",
        action="store_true",
        help="start empty, even where a store that has died has left objects",
    )
    add(
        "--replace",
        action="store_true",
        help="take over from the store that serves the socket; its clients lose nothing",
    )
    add(
        "--ticket-seconds",
        type=_seconds,
        default=TICKET_NS / 1e9,
        metavar="SECONDS",
        help="how long a reference that nobody has received outlives its sender, and keeps its object "
        "from being evicted (default: 600)",
    )
    add("-v", dest="verbose", action="store_true", help="log more")
    add(
        "--version",
        action="version",
        version=f"{PROGRAM} {__version__}",
        help="print the version and exit",
    )
    add("--help", action="help", help="print this help and exit")
    # For shmplasma.embedded: the inherited end of a socket pair, and whether the socket's directory
    # was made for this store.
    add("--owner", type=int, help=argparse.SUPPRESS)
    add("--scratch", action="store_true", help=argparse.SUPPRESS)
    return parser


def _share(text: str) -> float:
    with suppress(ValueError):
        share = float(text)
        if 0 <= share <= 1:
            return share
    raise argparse.ArgumentTypeError(
        f"{text!r} is no share of the capacity; write a number from 0 to 1, as 0.8"
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _size_or_0(text: str) -> int:
    return 0 if text == "0" else _size(text)


def _seconds(text: str) -> float:
    try:
        return check_seconds(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of seconds; write 600 or 0.5"
        ) from error


def _directory(text: str) -> str:
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"there is no directory {text}; make it, or leave -d out")
    return text


def _mode(text: str) -> int:
    with suppress(ValueError):
        mode = int(text, 8)
        if mode & 0o600 == 0o600 and not mode & ~0o666:
            return mode
    raise argparse.ArgumentTypeError(
        f"{text!r} is no mode of a socket; write 0600 (this user), 0660 (and a group) or 0666 (all)"
    )


def _group(text: str) -> int:
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"there is no group {text}; see getent group") from error
