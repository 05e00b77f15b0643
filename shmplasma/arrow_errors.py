"""The errors that a client raises, under the names and with the bases that code for Plasma catches.

They are apart from `shmplasma.errors` because their bases need Arrow, which the server never imports.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyarrow.lib import ArrowException, ArrowTypeError

from shmplasma.errors import Holder, ShmPlasmaError

__all__ = [
    "NotConnectedError",
    "PlasmaObjectAlreadySealed",
    "PlasmaObjectExists",
    "PlasmaObjectNotFound",
    "PlasmaStoreFull",
]


class PlasmaObjectExists(ShmPlasmaError, ArrowException):  # noqa: N818 - Plasma's name
    """The object id is taken."""


class PlasmaObjectNotFound(ShmPlasmaError, ArrowException):  # noqa: N818 - Plasma's name
    """There is no such object, or it is not this client's to seal or abort."""


class PlasmaObjectAlreadySealed(ShmPlasmaError, ArrowTypeError):  # noqa: N818 - as its siblings
    """The object is sealed already."""


class PlasmaStoreFull(ShmPlasmaError, ArrowException):  # noqa: N818 - Plasma's name
    """There is no room for an object, even if all that may go were evicted; or a quota is used up.

    Attributes
    ----------
    requested_bytes : int
        What was asked for.
    free_bytes : int
        Bytes in free extents.
    largest_bytes : int
        The largest free extent.
    pinned_bytes : int
        Bytes of objects that clients hold buffers of.
    unsealed_bytes : int
        Bytes of objects that are still being written.
    leased_bytes : int
        Bytes that clients have set aside for what they put; they come back before anything fails.
    kept_bytes : int
        Bytes of objects that are never evicted.
    spillable_bytes : int
        Those of them that nobody pins: an external store could take them.
    limit_bytes, held_bytes : int
        What this client may hold, and what it does hold, if that is the reason; else 0.
    holders : tuple of Holder
        Who holds most, the largest first.
    """

    def __init__(
        self,
        text: str = "the store is full",
        requested_bytes: int = 0,
        free_bytes: int = 0,
        largest_bytes: int = 0,
        pinned_bytes: int = 0,
        unsealed_bytes: int = 0,
        leased_bytes: int = 0,
        kept_bytes: int = 0,
        spillable_bytes: int = 0,
        limit_bytes: int = 0,
        held_bytes: int = 0,
        holders: Sequence[Holder] = (),
    ) -> None:
        super().__init__(text)
        self.requested_bytes = requested_bytes
        self.free_bytes = free_bytes
        self.largest_bytes = largest_bytes
        self.pinned_bytes = pinned_bytes
        self.unsealed_bytes = unsealed_bytes
        self.leased_bytes = leased_bytes
        self.kept_bytes = kept_bytes
        self.spillable_bytes = spillable_bytes
        self.limit_bytes = limit_bytes
        self.held_bytes = held_bytes
        self.holders = tuple(holders)


class NotConnectedError(ShmPlasmaError, ConnectionError):
    """There is no store at the path, it has gone, or the client was disconnected; an `OSError`."""
