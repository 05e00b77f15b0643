"""Outcomes: what a store's reply means for who has asked, or that there is none: what he wanted, or an error of the public ones."""

from __future__ import annotations

from typing import TypeVar, assert_never

from shmplasma.arrow_errors import (
    NotConnectedError,
    PlasmaObjectAlreadySealed,
    PlasmaObjectExists,
    PlasmaObjectNotFound,
    PlasmaStoreFull,
)
from shmplasma.errors import ExternalStoreError, ProtocolError, ShmPlasmaError
from shmplasma.protocol import Frame
from shmplasma.replies import Failed, Failure, Reply, decode_reply

__all__ = ["expect", "gone", "not_reclaimed"]

_ReplyT = TypeVar("_ReplyT", bound=Reply)


def expect(expected: type[_ReplyT], frame: Frame) -> _ReplyT:
    """Return the reply in a frame, or raise what the store refused with."""
    reply = decode_reply(frame)
    if isinstance(reply, Failed):
        raise _refusal(reply)
    if not isinstance(reply, expected):
        raise ProtocolError(f"the store answered with {type(reply).__name__}")
    return reply


def _refusal(failed: Failed) -> ShmPlasmaError:
    match failed.failure:
        case Failure.EXISTS:
            return PlasmaObjectExists(failed.text)
        case Failure.NOT_FOUND:
            return PlasmaObjectNotFound(failed.text)
        case Failure.EXTERNAL:
            return ExternalStoreError(failed.text)
        case Failure.SEALED:
            return PlasmaObjectAlreadySealed(failed.text)
        case Failure.FULL | Failure.OVER_QUOTA | Failure.NO_BOARD:
            return PlasmaStoreFull(
                failed.text,
                failed.requested_bytes,
                failed.free_bytes,
                failed.largest_bytes,
                failed.pinned_bytes,
                failed.unsealed_bytes,
                failed.leased_bytes,
                failed.kept_bytes,
                failed.spillable_bytes,
                failed.limit_bytes,
                failed.held_bytes,
                failed.holders,
            )
        case Failure.VERSION | Failure.DROPPED:
            return NotConnectedError(failed.text)
        case _:
            assert_never(failed.failure)


def gone(reason: str, path: str = "") -> NotConnectedError:
    """Return what a user is to see when the connection has ended, to a store that may be had again at `path`."""
    remedy = f"; call again once a store serves {path}" if path else ""
    return NotConnectedError(f"the connection to the store has ended: {reason}{remedy}")


def not_reclaimed(token: bytes, own: bytes) -> str:
    """Return what a user is to see when the store that answers knows this client no more."""
    if token == own:
        return "the store has dropped this client, and its log says why; connect again"
    return "the store was started anew, without the objects that were in it; connect again"
