"""How bytes are copied into an object, once and by as many threads as help."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shmplasma.helpers import LATE_NS, are_late, share
from shmplasma.layout import align_up
from shmplasma.pace import MEASURED_BYTES, Pace

__all__ = [
    "SHARED_BYTES",
    "SLICE_BYTES",
    "Piece",
    "Source",
    "copy_all",
    "copy_into",
    "writer_over",
]

Source: TypeAlias = "bytes | bytearray | memoryview | pa.Buffer | npt.NDArray[Any]"
"""Whatever has bytes to copy; at run time any object with the buffer protocol will do."""

Piece: TypeAlias = "tuple[npt.NDArray[np.uint8], Source]"
"""A target, and what is to be copied there."""
_Pair: TypeAlias = "tuple[npt.NDArray[Any], npt.NDArray[Any]]"

_PARALLEL_BYTES: Final = 4 << 20
"""From here on several threads copy.  Measured on 2 CPUs into warm shared memory, 1 and 2 threads, GB/s:
1 MiB 14 and 11, 2 MiB 14 and 11, 4 MiB 13 and 17, 8 MiB 13 and 21.  With the other CPU busy the second thread neither
helps nor harms much.  What is larger is left to `shmplasma.pace`."""
_LEAD_BYTES: Final = 512 << 10
"""So much more than each helper the caller copies, who has begun when he wakes them, 20 to 45 us before them.  He is to be the last: to wait and to be
woken takes 50 us.  Without this and with it, 2 CPUs, us: 8 MiB 409 and 343, 16 MiB 720 and 640."""
SLICE_BYTES: Final = 1 << 20
"""Below this a slice assignment copies: it saves 2 us, and holds the GIL for 80 us at most."""
SHARED_BYTES: Final = 512 << 10
"""From here on several threads copy different parts of a value.  Measured as above, 1 and 2 threads, GB/s: 64 of 1 MiB 26 and 51, of 512 KiB
24 and 65; of less, in whole puts, no more with two than with one."""
_BLOCK_BYTES: Final = 4096
"""Threads divide a copy at pages, so that no two of them wait for the same page fault."""
_FEW: Final = 4
"""Up to so many elements, as the colours of a picture, are a short last axis: NumPy would begin anew after each few of them.  Measured, 4 MB of
`uint8` as 3 planes to 3 colours, colours from behind, and columns of a table, ms: 4.2 and by planes 1.1, 4.2 and 1.1, 3.9 and 1.1; 4
elements of 8 bytes 4.5 and 3.3; 6 of them longer."""
_PACE: Final = Pace()
_NAMES: Final = re.compile(":[^:]*:")
"""Those of fields, in the format of a buffer."""
_OBJECTS: Final = (
    "its elements are Python objects, whose addresses mean nothing to other processes; "
    "put stores the objects themselves"
)


def copy_into(target: npt.NDArray[np.uint8], source: Source, threads: int = 1) -> None:
    """Copy all bytes of `source` to `target`, each exactly once.

    Parameters
    ----------
    target : numpy.ndarray of uint8, 1-D, contiguous, writable
        Exactly as long as the source has bytes.
    source : bytes-like, pyarrow.Buffer or numpy.ndarray without objects
        Contiguous memory, in C or F order, is copied as it lies.  Anything else is written in C order.
    threads : int
        Upper limit on the threads that copy 4 MiB or more; there are never more than processors (`pyarrow.cpu_count`), and only
        one where that is faster.

    Raises
    ------
    ValueError
        The sizes differ.
    TypeError
        `source` has no bytes to copy, or they are the addresses of Python objects.

    Examples
    --------
    >>> target = np.zeros(4, np.uint8)
    >>> copy_into(target, np.array([[1, 2], [3, 4]], np.uint8)[::-1])
    >>> target.tolist()
    [3, 4, 1, 2]
    """
    if type(source) is bytes and len(source) == target.size < SLICE_BYTES:
        target.data[:] = source
        return
    pair = _paired(target, source)
    if pair is None:
        return
    if target.size < SLICE_BYTES and pair[0] is target:
        target.data[:] = pair[1].data
    else:
        _copy([pair], threads)


def copy_all(pieces: Sequence[Piece], threads: int) -> None:
    """Copy several sources, each to its target, as `copy_into` does one; each thread copies some of them.

    Parameters
    ----------
    pieces : sequence of (target, source)
        As for `copy_into`.  Worth it for sources of `SHARED_BYTES` and more.
    threads : int
        Upper limit on the threads that copy, where all of them together have 4 MiB or more.
    """
    pairs = [_paired(target, source) for target, source in pieces]
    _copy([pair for pair in pairs if pair is not None], threads)


def _paired(target: npt.NDArray[np.uint8], source: Source) -> _Pair | None:
    """Return what is to be copied as two arrays of the same shape, of bytes if the source is contiguous; None if there is nothing."""
    # What is put often; the way of other buffers takes 8 us more after a large copy.
    if type(source) is bytes:
        source = np.frombuffer(source, np.uint8)
    if not isinstance(source, np.ndarray):
        source = memoryview(source)
        if "O" in _NAMES.sub("", source.format):
            raise TypeError(_OBJECTS)
        if source.contiguous:  # Arrow takes it as it lies, NumPy would not take every format
            source = memoryview(pa.py_buffer(source)).cast("B")
    array = np.asarray(source)
    if array.dtype.hasobject:
        raise TypeError(_OBJECTS)
    if array.nbytes != target.size:
        raise ValueError(f"{array.nbytes} bytes do not fit a target of {target.size} exactly")
    if not array.nbytes:
        return None
    if array.flags.forc:
        array = array if array.flags.c_contiguous else array.T
        return target, array.reshape(-1).view(np.uint8)
    if array.dtype.names is not None:  # NumPy would leave out the gaps between fields
        array = array.view(np.dtype((np.void, array.dtype.itemsize)))
    return np.ndarray(array.shape, array.dtype, target), array


def _copy(pairs: Sequence[_Pair], threads: int) -> None:
    size = sum([target.nbytes for target, _ in pairs])
    threads = 1 if size < _PARALLEL_BYTES else _at_most(threads)
    # What is not contiguous takes its time to be gathered, and each thread gathers its share.
    is_plain = size >= _PARALLEL_BYTES and all(map(_are_bytes, pairs))
    lead = _LEAD_BYTES if is_plain else 0
    if size < MEASURED_BYTES or not is_plain:
        _copy_by(threads, pairs, size, lead)
        return
    threads = _PACE.threads(size, threads)
    began = time.perf_counter_ns()
    _copy_by(threads, pairs, size, lead)
    _PACE.took(size, threads, time.perf_counter_ns() - began)


def _copy_by(threads: int, pairs: Sequence[_Pair], size: int, lead: int) -> None:
    if threads < 2:
        _copy_each(pairs, SLICE_BYTES)
    elif are_late():
        for pair in pairs:
            _copy_late(pair, threads)
    else:
        most = -(-(size - lead) // threads)
        share(partial(_copy_each, group, 0) for group in _divided(pairs, threads, most))


def _are_bytes(pair: _Pair) -> bool:
    target, source = pair
    return target.ndim == 1 and target.dtype == np.uint8 and source.flags.c_contiguous


def _copy_late(pair: _Pair, threads: int) -> None:
    """Copy while other threads compute: let go of the interpreter lock only once, and only for what is large."""
    target, source = pair
    if target.nbytes >= _PARALLEL_BYTES and _are_bytes(pair):
        with writer_over(target, threads) as writer:
            writer.write(pa.py_buffer(source.data))
    else:
        _copy_each([pair], _PARALLEL_BYTES)


def _copy_each(pairs: Sequence[_Pair], held_bytes: int) -> None:
    """Copy them one after the other, smaller ones than `held_bytes` without letting go of the interpreter lock."""
    for target, source in pairs:
        if target.nbytes < held_bytes and _are_bytes((target, source)):
            target.data[:] = source.data
            continue
        began = time.perf_counter_ns()
        _copy_elements(target, source)
        if target.nbytes < _PARALLEL_BYTES and time.perf_counter_ns() - began > LATE_NS:
            # Other threads compute, and it would wait up to 5 ms for the lock again and again.
            held_bytes = _PARALLEL_BYTES


def _copy_elements(target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
    """Copy element by element, or in whole runs where they lie so; a short last axis plane by plane."""
    if source.ndim > 1 and source.shape[-1] <= _FEW < source.shape[-2]:
        width = source.shape[-1]
        if source.strides[-2] != width * source.strides[-1]:  # else two axes are as one
            for plane in range(width):
                np.copyto(target[..., plane], source[..., plane])
            return
    np.copyto(target, source)


def _divided(pairs: Sequence[_Pair], groups: int, most: int) -> Iterator[Sequence[_Pair]]:
    """Yield them in so many groups or fewer, in their order: the last has the rest, the others `most` bytes.

    What is in two groups is divided at a page, or between rows.
    """
    group: list[_Pair] = []
    room = most
    for target, source in pairs:
        row_bytes = target.nbytes // len(target)
        while groups > 1 and len(target) > (
            n_rows := -(-align_up(room, _BLOCK_BYTES) // row_bytes)
        ):
            if n_rows:
                group.append((target[:n_rows], source[:n_rows]))
            yield group
            groups -= 1
            target, source, group, room = target[n_rows:], source[n_rows:], [], most  # noqa: PLW2901
        group.append((target, source))
        room = max(0, room - target.nbytes)
    yield group


def writer_over(target: npt.NDArray[np.uint8], threads: int) -> pa.FixedSizeBufferWriter:
    """Return Arrow's writer over `target`, which copies without the GIL."""
    writer = pa.FixedSizeBufferWriter(pa.py_buffer(target.data))
    writer.set_memcopy_threads(_at_most(threads))
    writer.set_memcopy_threshold(_PARALLEL_BYTES)
    writer.set_memcopy_blocksize(_BLOCK_BYTES)
    return writer


def _at_most(threads: int) -> int:
    """Return how many of so many threads may copy: one where this process may use one processor."""
    return max(1, min(threads, pa.cpu_count()))
