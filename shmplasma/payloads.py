"""Values that are ready to be written: how many bytes they take, what goes where, and how it is to be read.

Nothing is copied before `Payload.write`, which writes each byte of its target exactly once, padding included, so that equal values give
equal objects whatever the memory held before.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from shmplasma.copying import SHARED_BYTES, SLICE_BYTES, Piece, Source, copy_all, copy_into

__all__ = ["BytesPayload", "Codec", "Payload"]


class Codec(IntEnum):
    """How an object's data is to be read: 32 bits that are kept beside the object, not in it."""

    RAW = 0
    """Bytes that a user wrote: the value is the buffer itself."""
    PICKLE = 1
    """A plain pickle and nothing else."""
    NDARRAY = 2
    TABLE = 3
    RECORD_BATCH = 4
    ARRAY = 5
    CHUNKED_ARRAY = 6
    TENSOR = 7
    BYTES = 8
    """The contents of a `bytes` value."""
    PICKLE_PARTS = 9
    """A pickle and the parts that lie beside it (see `shmplasma.pickling`)."""


class Payload:
    """A value that is ready to be written.

    Parameters
    ----------
    codec : Codec
        How to read it back.
    size_bytes : int
        Bytes that the object needs.
    parts : iterable of (offset, size, source)
        What goes where, in bytes, by ascending offset.  A source is written in C order, or is a payload.

    Notes
    -----
    The sources are referenced: who changes them before `write` stores the change.
    """

    __slots__ = ("_parts", "codec", "size_bytes")

    def __init__(
        self, codec: Codec, size_bytes: int, parts: Iterable[tuple[int, int, Source | Payload]]
    ) -> None:
        self.codec = codec
        self.size_bytes = size_bytes
        self._parts = parts

    def write(self, target: npt.NDArray[np.uint8], threads: int = 1) -> None:
        """Fill `target`; may be called again for another target.

        Parameters
        ----------
        target : numpy.ndarray of uint8, 1-D, contiguous, writable
            Exactly `size_bytes` long; 64-byte aligned if the values read from it are to be.
        threads : int
            Upper limit on the threads that copy large parts.

        Raises
        ------
        ValueError
            `target` has another size, or a source has changed its size since it was serialized.
        """
        if target.size != self.size_bytes:
            raise ValueError(f"the target has {target.size} bytes, not {self.size_bytes}")
        later: list[Piece] = []
        self.write_leaving(later, target, threads)
        if later:
            copy_all(later, threads)

    def write_leaving(
        self, later: list[Piece], target: npt.NDArray[np.uint8], threads: int
    ) -> None:
        """Fill `target`, but for what is left to be copied `later`, by all threads together."""
        end = 0
        for offset, size, source in self._parts:
            if offset != end:
                target[end:offset] = 0
            end = offset + size
            part = target if size == self.size_bytes else target[offset:end]
            if isinstance(source, Payload):
                source.write_leaving(later, part, threads)
            elif size >= SHARED_BYTES and threads > 1:
                later.append((part, source))
            else:
                copy_into(part, source)

    def fill(self, room: memoryview, threads: int = 1) -> None:
        """Fill `room`, bytes that can be written, as `write` fills its target."""
        self.write(np.frombuffer(room, np.uint8), threads)


class BytesPayload(Payload):
    """A value that is ready to be written, as one `bytes`: what most small values come to.

    Parameters
    ----------
    codec : Codec
        How to read it back.
    data : bytes
        All of it.
    """

    __slots__ = ("data",)

    def __init__(self, codec: Codec, data: bytes) -> None:
        self.codec = codec
        self.size_bytes = len(data)
        self.data = data

    def write_leaving(
        self, later: list[Piece], target: npt.NDArray[np.uint8], threads: int
    ) -> None:
        """Fill `target`; as `Payload.write_leaving`."""
        if self.size_bytes >= SHARED_BYTES and threads > 1:
            later.append((target, self.data))
        else:
            copy_into(target, self.data)

    def fill(self, room: memoryview, threads: int = 1) -> None:
        """Fill `room` without an array over it, which takes as long as the copy of a small value."""
        if self.size_bytes == room.nbytes < SLICE_BYTES:
            room[:] = self.data
        else:
            super().fill(room, threads)
