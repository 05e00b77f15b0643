"""Memory that a client writes to: pages of the data region, mapped before they are filled, and arrays over it that keep a pin."""

from __future__ import annotations

import mmap
from typing import Final

import numpy as np

from shmplasma import system
from shmplasma.attachment import Attachment, not_mapped
from shmplasma.layout import HeaderWord
from shmplasma.pinning import Pin

__all__ = ["POPULATE_BYTES", "Pages", "Writable"]

POPULATE_BYTES: Final = 256 << 10
"""Objects from this size on have their pages mapped in one call before they are filled: writing through
fresh page-table entries runs at 1.2-3.6 GB/s, filling them in advance at 18 GB/s."""


class Writable(np.ndarray[tuple[int], np.dtype[np.uint8]]):
    """Bytes of the segment that keep a pin."""

    pin: Pin


class Pages:
    """Remembers which pages of the data region this process has mapped for writing."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._chunk = attachment.layout.granule_bytes
        self._populated = bytearray(-(-attachment.layout.data_bytes // self._chunk))
        self._trims = 0

    def populate(self, offset: int, size_bytes: int) -> None:
        """Have the pages of an object mapped in one go, unless they are already.

        Notes
        -----
        Goes by granules: these are committed as a whole, so that none has a page which cannot be had.  To be
        called for what nobody can take from this process (`shmplasma.commitment` says why).
        """
        trims = self._attachment.words[HeaderWord.TRIMS]
        if trims != self._trims:
            self._populated[:] = bytes(len(self._populated))
            self._trims = trims
        chunk = self._chunk
        start = offset - self._attachment.layout.data
        first, last = start // chunk, -(-(start + size_bytes) // chunk)
        if 0 not in self._populated[first:last]:
            return
        start, end = first * chunk, last * chunk
        mapping = np.frombuffer(self._attachment.write_map, np.uint8)
        # Not by `ctypes`, which imports something: a finalizer may not when the interpreter ends.
        address = mapping.__array_interface__["data"][0]
        size = min(end, mapping.size) - start
        try:
            is_done = system.populate(address + start, size)
        except OSError as error:
            raise not_mapped(error, size) from error
        if is_done:
            self._populated[first:last] = b"\1" * (last - first)

    def give_back(self, offset: int, size_bytes: int) -> None:
        """Unmap whole pages, if any are mapped for writing."""
        start = offset - self._attachment.layout.data
        first, last = start // self._chunk, -(-(start + size_bytes) // self._chunk)
        if 1 in self._populated[first:last]:
            self._attachment.write_map.madvise(mmap.MADV_DONTNEED, start, size_bytes)
            self._populated[first:last] = bytes(last - first)
