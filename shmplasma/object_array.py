"""The array over an object that is being made."""

from __future__ import annotations

from typing import Any, Protocol, Self, SupportsIndex

import numpy as np

from shmplasma.objects import ObjectID

__all__ = ["ObjectArray"]


class _Writer(Protocol):
    """The client that makes the object."""

    def seal(self, object_id: ObjectID) -> None:
        """Complete it."""

    def abort(self, object_id: ObjectID) -> None:
        """Remove it."""


class ObjectArray(np.ndarray[Any, np.dtype[Any]]):
    """A writable array over a new object; see `PlasmaClient.create_array`.

    As a context manager it seals the object when the block succeeds and aborts it when the block raises.
    """

    unsealed: tuple[_Writer, ObjectID]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Copy the array alone: a copy is no object that can be sealed."""
        return self.view(np.ndarray).__reduce_ex__(protocol)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        client, object_id = self.unsealed
        if error_type is None:
            client.seal(object_id)
        else:
            client.abort(object_id)
