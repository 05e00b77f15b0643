"""Plasma's object hash.  Pure computation over buffers."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import xxhash

__all__ = ["object_hash"]

_CHUNKED_BYTES: Final = 1 << 20
_CHUNKS: Final = 8
_BLOCK_BYTES: Final = 64


def object_hash(data: memoryview, metadata: memoryview) -> bytes:
    """Return the hash of an object, as Plasma 11 computes it.

    Parameters
    ----------
    data, metadata : memoryview
        The object's bytes.

    Returns
    -------
    bytes
        8 bytes, little-endian.

    Notes
    -----
    Below 1 MiB of data: XXH64 (seed 0) of data and metadata.  From there on: XXH64 of the hashes of eight
    equal chunks, made of whole 64-byte blocks, and of the rest, each as 8 little-endian bytes, followed by
    the metadata.  O(bytes), about 10 GB/s.

    Examples
    --------
    >>> object_hash(memoryview(b""), memoryview(b"")).hex()
    '99e9d85137db46ef'
    """
    digest = xxhash.xxh64()
    if len(data) < _CHUNKED_BYTES:
        digest.update(data)
    else:
        chunk = len(data) // _BLOCK_BYTES // _CHUNKS * _BLOCK_BYTES
        ends = [*range(0, _CHUNKS * chunk + 1, chunk), len(data)]
        for start, end in pairwise(ends):
            digest.update(xxhash.xxh64_intdigest(data[start:end]).to_bytes(8, "little"))
    digest.update(metadata)
    return digest.intdigest().to_bytes(8, "little")
