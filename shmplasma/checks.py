"""The checksums of an entry: how a successor knows a whole object from what a death has torn.  Pure.

Two words of an entry hold them.

* CHECK is over id, codec, offset and sizes, begun with the generation and with whether the object is sealed.  It is written
  before the state that it goes with; so an entry of the state SEALED always has the checksum of a sealed object; one
  that was freed, or was never completed, or has a flipped bit, has not.
* COPY_CHECK is over where the external store has a copy, and of what: not over the offset and the generation, which
  change when the object is moved or brought back.
"""

from __future__ import annotations

from struct import Struct
from typing import Final
from zlib import crc32

__all__ = ["CHECKED_BYTES", "PRESENT", "check_seed", "copy_check"]

CHECKED_BYTES: Final = 48
"""What CHECK is over: words 1 to 6 of an entry."""
PRESENT: Final = 1 << 32
"""Keeps the checksum of whatever from being 0, which an entry has that was never used."""

_COPIED: Final = Struct("@24sQQQ")
"""Words 1 to 3, 5, 6 and 14: what does not change when an object is moved or brought back."""


def check_seed(generation: int, sealed: bool) -> int:
    """Return what a checksum begins with: CHECK is ``PRESENT | crc32(words 1 to 6, seed)``."""
    return (generation << 1 | sealed) & 0xFFFF_FFFF


def copy_check(fields: bytes | memoryview, data_size: int, metadata_size: int, copy: int) -> int:
    """Return the checksum of where a copy is; `fields` begins with words 1 to 3 of the entry."""
    return PRESENT | crc32(_COPIED.pack(bytes(fields[:24]), data_size, metadata_size, copy))
