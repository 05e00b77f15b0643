"""How bytes are copied into an object, once and by as many threads as help."""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shmplasma.helpers import are_late, share
from shmplasma.layout import align_up
from shmplasma.pace import MEASURED_BYTES, Pace

__all__ = ["SLICE_BYTES", "Source", "copy_into", "writer_over"]

Source: TypeAlias = "bytes | bytearray | memoryview | pa.Buffer | npt.NDArray[Any]"
"""Whatever has bytes to copy; at run time any object with the buffer protocol will do."""

_PARALLEL_BYTES: Final = 4 << 20
"""From here on several threads copy.  Measured on 2 CPUs into warm shared memory, 1 and 2 threads, GB/s:
1 MiB 14 and 11, 2 MiB 14 and 11, 4 MiB 13 and 17, 8 MiB 13 and 21.  With the other CPU busy the second thread neither
helps nor harms much.  What is larger is left to `shmplasma.pace`."""
SLICE_BYTES: Final = 1 << 20
"""Below this a slice assignment copies: it saves 2 us, and holds the GIL for 80 us at most."""
_BLOCK_BYTES: Final = 4096
"""Threads divide a copy at pages, so that no two of them wait for the same page fault."""
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
        Upper limit on the threads that copy 4 MiB or more of contiguous memory; there are never more
        than processors (`pyarrow.cpu_count`), and only one where that is faster.

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
        return
    if not array.flags.forc:
        if array.dtype.names is not None:  # NumPy would leave out the gaps between fields
            array = array.view(np.dtype((np.void, array.dtype.itemsize)))
        np.copyto(np.ndarray(array.shape, array.dtype, target), array)
        return
    flat = (array if array.flags.c_contiguous else array.T).reshape(-1).view(np.uint8)
    if target.size < SLICE_BYTES:
        target.data[:] = flat.data
        return
    if target.size < MEASURED_BYTES:
        _copy(target, flat, threads)
        return
    threads = _PACE.threads(target.size, _at_most(threads))
    began = time.perf_counter_ns()
    _copy(target, flat, threads)
    _PACE.took(target.size, threads, time.perf_counter_ns() - began)


def _copy(target: npt.NDArray[np.uint8], flat: npt.NDArray[np.uint8], threads: int) -> None:
    if threads < 2 or target.size < _PARALLEL_BYTES:
        np.copyto(target, flat)
        return
    if are_late():
        with writer_over(target, threads) as writer:
            writer.write(pa.py_buffer(flat.data))
        return
    step = align_up(-(-target.size // threads), _BLOCK_BYTES)
    starts = range(0, target.size, step)
    share(partial(np.copyto, target[at : at + step], flat[at : at + step]) for at in starts)


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
