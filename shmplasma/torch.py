"""PyTorch: tensors in a store, and data sets whose samples live there.

Importing this module teaches the process's default serialization context to store tensors; `register` teaches another
one.  Processes that read tensors have to import it as well.

A tensor on the CPU is stored as its elements, and comes back over the memory of the store.  PyTorch has no read-only
tensors: it would warn of such memory once, whoever the first to get a tensor was, and then treat it as any other.  So a
tensor that was got in the usual way looks writable and is not: an operation in place ends the process with a
SIGSEGV, and cannot change what others read.  ``get(..., mode="cow")`` and ``mode="copy"`` give tensors to write to.

`StoreDataset` keeps many samples in few objects, its *blocks*, which it owns by references.  A block whose
samples are all of one form (the same nesting, the same shapes and dtypes) is *stacked*: one array for each leaf of the
form, in which a sample is a row; so a batch takes a few calls, however many samples it has.  Any other block is *packed*:
its samples are serialized one after the other.  A sample that is taken out is a copy in either case: nobody can write to
the store by way of it, and what is done to it in place is forgotten in the next epoch.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from operator import index
from typing import Any, Final, NamedTuple, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shmplasma.client import PlasmaClient
from shmplasma.extras import needed_by
from shmplasma.layout import ALIGNMENT, align_up
from shmplasma.serialization import SerializationContext, default_context, deserialize, serialize
from shmplasma.store_ref import StoreRef

with needed_by("shmplasma.torch", "torch"):
    import torch
    from torch.utils.data import Dataset

__all__ = ["StoreDataset", "register"]

_Array: TypeAlias = npt.NDArray[Any]
_Rows: TypeAlias = npt.NDArray[np.int64]
_Layout: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...]]"
"""Shape and strides, in elements."""

_BLOCK_BYTES: Final = 64 << 20
"""A block is read by one `get` a process, and a shuffled batch takes a few calls for each block that it meets."""


# --- tensors ----------------------------------------------------------------------------------------


def register(context: SerializationContext) -> None:
    """Teach a serialization context to store tensors and parameters; the default context knows them already.

    Parameters
    ----------
    context : SerializationContext
        The context that `PlasmaClient.put` and `PlasmaClient.get` are given.

    Notes
    -----
    Strided tensors on the CPU are stored directly, and read without a copy, with their attributes and strides; gaps
    between elements are left out.  Of a tensor that is part of a graph, only its elements are stored, and whether it
    requires a gradient.  All others (sparse, nested, quantized, on a device, subclasses) are pickled in PyTorch's own
    way.
    """
    context.register_type(
        torch.Tensor,
        "torch.Tensor",
        custom_serializer=_tensor_form,
        custom_deserializer=_tensor_of,
    )
    context.register_type(
        torch.nn.Parameter,
        "torch.nn.Parameter",
        custom_serializer=_parameter_form,
        custom_deserializer=_parameter_of,
    )


class _Own:
    """Stands for a tensor in a form, and is pickled and read as PyTorch pickles that."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        reduce = copyreg.dispatch_table.get(type(self._tensor))
        return reduce(self._tensor) if reduce else self._tensor.__reduce_ex__(protocol)


def _tensor_form(tensor: torch.Tensor) -> object:
    if type(tensor) is not torch.Tensor or not _is_plain(tensor):
        return _Own(tensor)
    layout = _layout(tensor)
    elements = _elements(tensor.detach(), layout)
    return elements, layout, str(tensor.dtype), tensor.requires_grad, tensor.__dict__


def _tensor_of(form: Any) -> torch.Tensor:
    if not isinstance(form, tuple):
        return form  # by way of `_Own`
    array, layout, dtype, requires_grad, attributes = form
    tensor = _tensor(_as_if_writable(array), dtype)
    if layout is not None:
        tensor = tensor.as_strided(*layout)
    if requires_grad:
        tensor.requires_grad_()
    tensor.__dict__.update(attributes)
    return tensor


def _parameter_form(parameter: torch.nn.Parameter) -> object:
    cls = type(parameter)
    # A class that inherits PyTorch's own way would come back as a Parameter.
    if cls.__reduce_ex__ is not torch.nn.Parameter.__reduce_ex__ or cls in copyreg.dispatch_table:
        return _Own(parameter)
    return cls, parameter.data, parameter.requires_grad, parameter.__dict__


def _parameter_of(form: Any) -> torch.nn.Parameter:
    if not isinstance(form, tuple):
        return form  # by way of `_Own`
    cls, data, requires_grad, attributes = form
    # What the constructor of Parameter calls, which those of subclasses need not do.
    parameter = torch.Tensor._make_subclass(cls, data, requires_grad)  # noqa: SLF001
    parameter.__dict__.update(attributes)
    return parameter


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether the elements are all there is to a tensor, and lie in this process's memory."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _layout(tensor: torch.Tensor) -> _Layout | None:
    """Return shape and strides of a tensor without gaps; None if it has gaps, or its shape says it all."""
    shape = tuple(tensor.shape)
    if tensor.is_contiguous() and 1 not in shape:  # of which the stride may be any
        return None
    strides = tensor.stride()
    order = sorted(range(len(shape)), key=strides.__getitem__, reverse=True)
    return (shape, strides) if tensor.permute(order).is_contiguous() else None


def _elements(tensor: torch.Tensor, layout: _Layout | None) -> _Array:
    """Return the elements without a copy, as they lie in memory if there is a layout; as integers if NumPy lacks the dtype."""
    if layout is not None:
        tensor = tensor.as_strided((tensor.numel(),), (1,))
    array: _Array = tensor.view(_carrier(tensor.dtype)).numpy()
    return array


def _tensor(array: _Array, dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    wanted = getattr(torch, dtype.removeprefix("torch."))
    return tensor if tensor.dtype is wanted else tensor.view(wanted)


@cache
def _carrier(dtype: torch.dtype) -> torch.dtype:
    """Return a dtype of NumPy's in whose place elements can be stored: itself, or integers of their size."""
    try:
        torch.empty(0, dtype=dtype, device="cpu").numpy()
    except TypeError:
        integers: torch.dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
        return integers
    return dtype


class _Memory:
    """An array's memory, which is said to be writable."""

    __slots__ = ("__array_interface__", "_array")

    def __init__(self, array: _Array) -> None:
        self._array = array
        interface = dict(array.__array_interface__)
        interface["data"] = array.ctypes.data, False
        self.__array_interface__ = interface


def _as_if_writable(array: _Array) -> _Array:
    """Return an array of which PyTorch does not know that it is read-only; a copy where it is not the store's memory."""
    if array.flags.writeable:
        return array
    base: object = array.base
    # A small one inside another value lies in a `bytes`, which no SIGSEGV protects.
    return array.copy() if isinstance(base, bytes) else np.asarray(_Memory(array))


register(default_context)


# --- the form of samples ------------------------------------------------------------------------------


class _Leaf(NamedTuple):
    """One place of a form."""

    kind: str
    """tensor, array, or the name of a Python type"""
    dtype: object
    shape: tuple[int, ...]


class _Branch(NamedTuple):
    """A tuple, list or dict of forms."""

    kind: str
    keys: tuple[object, ...]
    forms: tuple[_Form, ...]


_Form: TypeAlias = "_Leaf | _Branch"

_SCALARS: Final = {bool: np.bool_, int: np.int64, float: np.float64}


class _Irregular(Exception):  # noqa: N818  # no error: the block is packed
    """A value that no array can stand for."""


def _split(value: Any, leaves: list[Any]) -> _Form:
    """Return the form of a sample; append its leaves to `leaves`, tensors as arrays."""
    cls = type(value)
    if cls is torch.Tensor:
        if not _is_plain(value) or value.requires_grad or value.__dict__:
            raise _Irregular
        leaves.append(_elements(value, None))
        return _Leaf("tensor", str(value.dtype), tuple(value.shape))
    if cls is np.ndarray:
        if value.dtype.hasobject or not value.ndim:
            raise _Irregular
        leaves.append(value)
        return _Leaf("array", value.dtype, value.shape)
    if cls in _SCALARS:
        if cls is int and not -(1 << 63) <= value < 1 << 63:
            raise _Irregular
        leaves.append(_SCALARS[cls](value))
        return _Leaf(cls.__name__, None, ())
    # Of an empty one, no row would tell how many there are.
    if cls not in (tuple, list, dict) or not value:
        raise _Irregular
    if cls is not dict:
        return _Branch(cls.__name__, (), tuple(_split(item, leaves) for item in value))
    # Keys of other types may be equal and differ, as True does from 1.
    if not {str, int}.issuperset(map(type, value)):
        raise _Irregular
    return _Branch("dict", tuple(value), tuple(_split(item, leaves) for item in value.values()))


def _join(form: _Form, columns: Iterator[_Array]) -> Sequence[Any]:
    """Return samples of a form, given an array of rows for each of its leaves."""
    if isinstance(form, _Leaf):
        rows = next(columns)
        if form.kind == "tensor":
            tensors: Sequence[Any] = _tensor(rows, str(form.dtype)).unbind(0)
            return tensors
        return list(rows) if form.kind == "array" else rows.tolist()
    parts = zip(*[_join(each, columns) for each in form.forms], strict=True)
    if form.kind == "tuple":
        return list(parts)
    if form.kind == "list":
        return list(map(list, parts))
    return [dict(zip(form.keys, row, strict=True)) for row in parts]


# --- blocks -------------------------------------------------------------------------------------------


class _Stacked(NamedTuple):
    """Samples of one form, by columns."""

    form: _Form
    columns: list[_Array]

    def take(self, rows: _Rows) -> Sequence[Any]:
        """Return copies of samples."""
        # NumPy gathers them; PyTorch would start threads for it.
        return _join(self.form, iter([column[rows] for column in self.columns]))


class _Packed(NamedTuple):
    """Samples one after the other, each as `serialize` makes it."""

    data: npt.NDArray[np.uint8]
    places: list[tuple[int, int, int]]
    """Offset, size and codec of each."""

    def take(self, rows: _Rows) -> Sequence[Any]:
        """Return copies of samples."""
        samples = []
        for start, size, codec in map(self.places.__getitem__, rows.tolist()):
            own = self.data[start : start + size].copy()
            samples.append(deserialize(pa.py_buffer(own.data), codec))
        return samples


_Block: TypeAlias = "_Stacked | _Packed"
_Part: TypeAlias = "tuple[_Block, _Rows, _Rows]"
"""A block, which places of a batch its samples have, and which rows they are."""


def _gather(parts: list[_Part], count: int) -> list[Any]:
    """Return copies of samples from blocks."""
    if len(parts) == 1:
        ((block, _, rows),) = parts
        return list(block.take(rows))
    forms = [block.form if isinstance(block, _Stacked) else None for block, _, _ in parts]
    if forms and forms[0] is not None and forms.count(forms[0]) == len(forms):
        return list(_join(forms[0], iter(_columns(parts, count))))
    samples: list[Any] = [None] * count
    for block, places, rows in parts:
        for place, sample in zip(places.tolist(), block.take(rows), strict=True):
            samples[place] = sample
    return samples


def _columns(parts: list[_Part], count: int) -> Iterator[_Array]:
    """Yield a column with the rows of all parts for each leaf of the form that they share."""
    columns = [block.columns for block, _, _ in parts if isinstance(block, _Stacked)]
    for pieces in zip(*columns, strict=True):
        whole = np.empty((count, *pieces[0].shape[1:]), pieces[0].dtype)
        for piece, (_, places, rows) in zip(pieces, parts, strict=True):
            whole[places] = piece[rows]
        yield whole


def _blocks(samples: Iterable[Any], block_bytes: int) -> Iterator[tuple[int, _Block]]:
    """Yield blocks and how many samples each has."""
    pending: list[Any] = []
    size = 0
    for sample in samples:
        pending.append(sample)
        size += _size_bytes(sample)
        if size >= block_bytes:
            yield len(pending), _block(pending)
            pending, size = [], 0
    if pending:
        yield len(pending), _block(pending)


def _size_bytes(sample: object) -> int:
    leaves: list[Any] = []
    try:
        _split(sample, leaves)
    except _Irregular:
        return serialize(sample).size_bytes
    return sum(leaf.nbytes for leaf in leaves)


def _block(samples: list[Any]) -> _Block:
    try:
        return _stack(samples)
    except _Irregular:
        return _pack(samples)


def _stack(samples: list[Any]) -> _Stacked:
    rows: list[list[Any]] = []
    form = None
    for sample in samples:
        leaves: list[Any] = []
        own = _split(sample, leaves)
        if rows and own != form:
            raise _Irregular
        form = own
        rows.append(leaves)
    assert form is not None
    return _Stacked(form, list(map(_column, zip(*rows, strict=True))))


def _column(leaves: Sequence[Any]) -> _Array:
    """Return an array whose rows are arrays or scalars, of exactly their dtype: NumPy would choose native and packed ones."""
    first = leaves[0]
    return np.stack(leaves, out=np.empty((len(leaves), *first.shape), first.dtype))


def _pack(samples: list[Any]) -> _Packed:
    payloads = [serialize(sample) for sample in samples]
    sizes = [align_up(payload.size_bytes, ALIGNMENT) for payload in payloads]
    starts = list(accumulate(sizes, initial=0))
    data = np.zeros(starts.pop(), np.uint8)
    places = []
    for start, payload in zip(starts, payloads, strict=True):
        size = payload.size_bytes
        payload.write(data[start : start + size])
        places.append((start, size, int(payload.codec)))
    return _Packed(data, places)


# --- the data set -------------------------------------------------------------------------------------


class StoreDataset(Dataset):  # type: ignore[misc]  # a class of PyTorch, which is not always installed
    """A map-style data set whose samples live in a store, once for all processes that use it.

    Parameters
    ----------
    client : PlasmaClient
        A client of the store; needed only now.
    samples : iterable
        What to store: a map-style data set, or anything that can be iterated over, which is done once.  A sample may be
        any value that can be put.
    block_bytes : int, optional
        Size from which on a block is complete; building takes about three times as much memory.

    Raises
    ------
    PlasmaStoreFull
        There is no room; no part of the data set stays in the store.
    SerializationError
        A sample cannot be serialized.

    Notes
    -----
    Pickling a data set, for a worker that is spawned, pickles references.  A process needs only one connection, however
    many samples and data sets there are.  The samples stay in the store until the last process has let go of the data
    set.

    A sample is a new copy each time, in one or a few pieces of memory.  A `DataLoader` that makes batches gets all
    samples of a batch at once.

    Examples
    --------
    >>> import shmplasma
    >>> with shmplasma.Store("10MB") as store, store.connect() as client:
    ...     dataset = StoreDataset(client, [(torch.full((2,), i), i) for i in range(1000)])
    ...     loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    ...     features, labels = next(iter(loader))
    >>> labels
    tensor([0, 1, 2, 3])
    """

    def __init__(
        self, client: PlasmaClient, samples: Iterable[Any], *, block_bytes: int = _BLOCK_BYTES
    ) -> None:
        if isinstance(samples, Dataset) and hasattr(samples, "__len__"):
            # Few of them end with an IndexError, as iterating over them would ask for.
            samples = map(samples.__getitem__, range(len(samples)))
        self._refs: list[StoreRef] = []
        ends = [0]
        for count, block in _blocks(samples, block_bytes):
            self._refs.append(client.put_ref(block))
            ends.append(ends[-1] + count)
        self._starts = np.array(ends[:-1])
        self._length = ends[-1]
        self._open: dict[int, _Block] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: SupportsIndex) -> Any:
        """Return a copy of a sample; positions below 0 count from the end."""
        return self.__getitems__((position,))[0]

    def __getitems__(self, positions: Sequence[SupportsIndex]) -> list[Any]:
        """Return copies of samples, which is faster than one by one.

        Raises
        ------
        IndexError
            There is no such sample.
        """
        found = self._found(positions)
        blocks = np.searchsorted(self._starts, found, side="right") - 1
        parts = []
        for number in set(blocks.tolist()):
            places = np.flatnonzero(blocks == number)
            parts.append((self._block(number), places, found[places] - self._starts[number]))
        return _gather(parts, len(found))

    def _found(self, positions: Sequence[SupportsIndex]) -> npt.NDArray[np.int64]:
        """Return positions, counted from the beginning."""
        wanted = list(map(index, positions))
        length = self._length
        if wanted and not -length <= min(wanted) <= max(wanted) < length:
            wrong = next(each for each in wanted if not -length <= each < length)
            raise IndexError(f"there is no sample {wrong} of {length}")
        return np.array(wanted, np.int64) % max(length, 1)

    def _block(self, number: int) -> _Block:
        block = self._open.get(number)
        if block is None:
            block = self._open[number] = self._refs[number].get()
        return block

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}
