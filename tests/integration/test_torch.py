"""PyTorch: tensors in and out of a store, and data sets that live in one."""

from __future__ import annotations

import copyreg
import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil  # type: ignore[import-untyped]  # it ships no types
import pytest

from shmplasma import ObjectID, PlasmaClient, PlasmaStoreFull, SerializationContext, Store
from tests.clients import figure
from tests.processes import in_forked_child, run_python, until

pytest.importorskip("torch", reason="PyTorch is installed where there is a build for CPUs")

import torch  # when it is there

from shmplasma.torch import StoreDataset, register

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.uint16,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def bits(tensor: Any) -> Any:
    """Return a tensor's elements as bytes: not all dtypes can be compared."""
    return tensor.contiguous().view(torch.uint8)


# --- tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (70, 40)], ids=str)
def test_a_tensor_comes_back(client: PlasmaClient, dtype: Any, shape: tuple[int, ...]) -> None:
    """Whatever its dtype and shape, as itself and inside something else."""
    tensor = torch.randint(0, 2, shape).to(dtype)
    got = client.get(client.put(tensor))
    nested = client.get(client.put({"weights": [tensor]}))["weights"][0]
    for each in (got, nested):
        assert type(each) is torch.Tensor
        assert each.dtype is dtype
        assert each.shape == tensor.shape
        assert torch.equal(bits(each.reshape(-1)), bits(tensor.reshape(-1)))


def test_a_tensor_is_not_copied(client: PlasmaClient) -> None:
    """It lies in the store's memory, and keeps it."""
    object_id = client.put(torch.arange(10_000))
    tensor = client.get(object_id)
    assert tensor.data_ptr() == client.get(object_id).data_ptr()
    buffer = client.get_buffers([object_id])[0]
    assert buffer.address <= tensor.data_ptr() < buffer.address + buffer.size
    del buffer
    client.delete(object_id)
    assert client.contains(object_id)
    assert torch.equal(tensor, torch.arange(10_000))
    del tensor
    until(lambda: not client.contains(object_id), "it goes with the last tensor")


def test_a_tensor_that_was_got_warns_of_nothing() -> None:
    """PyTorch's warning of memory that is not writable comes once a process, if it does."""
    run_python(
        """
        import torch, shmplasma, shmplasma.torch
        with shmplasma.Store("10MB") as store, store.connect() as client:
            for value in (torch.ones(1000), [torch.ones(1000)], [torch.ones(1)]):
                client.get(client.put(value))
        """
    )


def test_a_write_to_a_tensor_that_was_got_harms_nobody_else(client: PlasmaClient) -> None:
    """The process that does it ends; what is in the store is as it was."""
    object_id = client.put(torch.zeros(1000))
    assert in_forked_child(lambda: client.get(object_id).add_(1)) == -signal.SIGSEGV
    assert not client.get(object_id).any()


@pytest.mark.parametrize("mode", ["copy", "cow"])
def test_a_tensor_to_write_to(client: PlasmaClient, mode: Any) -> None:
    """Is had by name; nobody else sees what is written."""
    object_id = client.put({"a": torch.zeros(1000)})
    tensor = client.get(object_id, mode=mode)["a"]
    tensor += 1
    assert tensor.sum() == 1000
    assert not client.get(object_id)["a"].any()


def test_a_small_tensor_inside_another_value_is_a_copy(client: PlasmaClient) -> None:
    """Such a one lies in the pickle, in memory that nothing would protect."""
    object_id = client.put([torch.zeros(3)])
    client.get(object_id)[0].add_(1)
    assert not client.get(object_id)[0].any()


def test_an_array_of_the_store_becomes_a_tensor(client: PlasmaClient) -> None:
    """By DLPack, without a copy and without a warning."""
    array = client.get(client.put(np.arange(1000)))
    tensor = torch.from_dlpack(array)
    assert tensor.data_ptr() == array.ctypes.data
    assert torch.equal(tensor, torch.arange(1000))


def test_what_has_gaps_is_stored_without_them(client: PlasmaClient) -> None:
    """A slice, a transposed and an expanded tensor are stored as what they show."""
    tensor = torch.arange(100 * 60).reshape(100, 60)
    for each in (tensor[::3, 5:], tensor.T, torch.arange(60).expand(100, 60)):
        assert torch.equal(client.get(client.put(each)), each)


def test_a_model_comes_back(client: PlasmaClient) -> None:
    """Its parameters are parameters, over the store's memory, and require gradients as they did."""
    model = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.ReLU(), torch.nn.Linear(50, 2))
    model[2].weight.requires_grad_(requires_grad=False)
    got = client.get(client.put(model))
    given = torch.rand(3, 100)
    assert torch.equal(got(given), model(given))
    for mine, theirs in zip(model.parameters(), got.parameters(), strict=True):
        assert type(theirs) is torch.nn.Parameter
        assert theirs.requires_grad == mine.requires_grad
    assert client.get(client.put(model.state_dict())).keys() == model.state_dict().keys()


class Marked(torch.Tensor):  # type: ignore[misc]  # a class of PyTorch, which is not always installed
    """A subclass, of which the elements are not all there is."""


def test_other_tensors_are_pickled(client: PlasmaClient) -> None:
    """Sparse ones, views that are conjugate or negative, subclasses, and what belongs to a graph."""
    sparse = torch.eye(5).to_sparse()
    assert torch.equal(client.get(client.put(sparse)).to_dense(), torch.eye(5))
    conjugate = torch.tensor([1 + 2j]).conj()
    assert torch.equal(client.get(client.put(conjugate)), conjugate)
    marked = torch.ones(2).as_subclass(Marked)
    assert type(client.get(client.put(marked))) is Marked
    leaf = torch.ones(2000, requires_grad=True)
    for each in (leaf, leaf * 2):
        got = client.get(client.put(each))
        assert got.requires_grad
        assert torch.equal(got, each)
    buffer = torch.nn.Buffer(torch.ones(2))
    assert torch.equal(client.get(client.put(buffer)), buffer)


def test_what_is_set_on_a_tensor_comes_with_it(client: PlasmaClient) -> None:
    """On parameters and buffers as well, and without a copy of the elements."""
    buffer = torch.nn.Buffer(torch.ones(5000), persistent=False)
    for each in (torch.ones(5000), torch.nn.Parameter(torch.ones(5000)), buffer):
        each.tag = {"of": np.arange(3)}
        object_id = client.put(each)
        got = client.get(object_id)
        assert type(got) is type(each)
        assert got.__dict__.keys() == each.__dict__.keys()
        assert list(got.tag["of"]) == [0, 1, 2]
        assert got.data_ptr() == client.get(object_id).data_ptr()
    got = client.get(client.put(buffer))
    assert isinstance(got, torch.nn.Buffer)
    assert not got.persistent


@pytest.mark.parametrize(
    "tensor",
    [
        torch.rand(2, 3, 40, 40).to(memory_format=torch.channels_last),
        torch.rand(2, 1, 40, 40).to(memory_format=torch.channels_last),
        torch.rand(9, 3, 4, 5).to(torch.bfloat16).to(memory_format=torch.channels_last)[4:],
        torch.rand(2, 3, 4, 5, 6).permute(3, 1, 0, 2, 4),
        torch.rand(70, 40).T,
        torch.rand(2, 2, 3).permute(2, 0, 1),
        torch.empty(0, 1, 3),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}-{tensor.stride()}",
)
def test_what_has_no_gaps_lies_as_it_lay(client: PlasmaClient, tensor: Any) -> None:
    """In whatever order of dimensions, and without a copy of large ones."""
    object_id = client.put(tensor)
    got = client.get(object_id)
    (nested,) = client.get(client.put([tensor]))
    own = client.get(object_id, mode="copy")
    for each in (got, nested, own):
        assert each.stride() == tensor.stride()
        assert torch.equal(each, tensor)
    if tensor.nbytes >= 1024:
        assert got.data_ptr() == client.get(object_id).data_ptr()
    own += 1
    assert torch.equal(client.get(object_id), tensor)


def test_a_model_of_channels_last_can_be_trained_further(store: Store) -> None:
    """Its parameters are leaves that lie as they lay, and those that were one are one."""
    # In a program of its own: autograd starts threads, which a fork would harm.
    run_python(
        """
        import sys, torch, shmplasma, shmplasma.torch
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), torch.nn.Conv2d(3, 3, 3))
        model.to(memory_format=torch.channels_last)
        model[1].weight = model[0].weight
        with shmplasma.connect(sys.argv[1]) as client:
            got = client.get(client.put(model), mode="copy")
        assert got[0].weight is got[1].weight
        assert got[0].weight.is_contiguous(memory_format=torch.channels_last)
        got(torch.rand(1, 3, 8, 8)).sum().backward()
        torch.optim.SGD(got.parameters(), lr=0.1).step()
        assert not torch.equal(got[0].weight, model[0].weight)
        """,
        store.store_socket_name,
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_come_back(client: PlasmaClient) -> None:
    """They say that they are strided, and are not."""
    parts = [torch.ones(3), torch.ones(5)]
    got = client.get(client.put(torch.nested.nested_tensor(parts)))
    assert got.is_nested
    assert all(map(torch.equal, got.unbind(), parts))


class Scale(torch.nn.Parameter):  # type: ignore[misc]  # a class of PyTorch, which is not always installed
    """A subclass that is made of more than its elements."""

    def __new__(cls, data: Any, unit: str) -> Self:
        """Make one that requires no gradient."""
        scale: Self = super().__new__(cls, data, requires_grad=False)
        scale.unit = unit
        return scale


def test_a_subclass_of_parameter_comes_back(client: PlasmaClient) -> None:
    """As what it was, where PyTorch's own pickle would make it a Parameter; as a leaf."""
    for trained in (False, True):
        scale = Scale(torch.ones(5000), "m").requires_grad_(trained)
        got = client.get(client.put({"scale": scale}))["scale"]
        assert type(got) is Scale
        assert got.unit == "m"
        assert got.is_leaf
        assert got.requires_grad is trained
        assert torch.equal(got, scale)


def test_subclasses_that_cannot_be_imported_come_back(store: Store, client: PlasmaClient) -> None:
    """Of a function, of the main program; with large attributes, which are not copied."""

    class Local(torch.Tensor):  # type: ignore[misc]  # a class of PyTorch, which is not always installed
        pass

    local = torch.ones(3).as_subclass(Local)
    local.table = np.arange(5000)
    got = client.get(client.put(local))
    assert type(got).__name__ == "Local"
    assert torch.equal(got.as_subclass(torch.Tensor), torch.ones(3))
    assert not got.table.flags.writeable
    name = run_python(
        """
        import sys, torch, shmplasma, shmplasma.torch
        class Mine(torch.Tensor):
            def third(self): return self[2].item()
        class Weight(torch.nn.Parameter):
            def third(self): return self[2].item()
        value = [torch.arange(90_000.0).as_subclass(Mine), Weight(torch.arange(9.0))]
        with shmplasma.connect(sys.argv[1]) as client:
            print(client.put(value).binary().hex(), end="")
        """,
        store.store_socket_name,
    )
    assert [each.third() for each in client.get(ObjectID(bytes.fromhex(name)))] == [2, 2]


@pytest.mark.parametrize("cls", [Marked, Scale])
def test_what_copyreg_says_of_a_class_counts(
    client: PlasmaClient, monkeypatch: pytest.MonkeyPatch, cls: Any
) -> None:
    """As it does for pickle."""
    monkeypatch.setitem(copyreg.dispatch_table, cls, lambda tensor: (str, (tensor.sum().item(),)))
    assert client.get(client.put([torch.ones(4).as_subclass(cls)])) == ["4.0"]


def test_the_default_device_is_of_no_account(store: Store) -> None:
    """What is stored is what was put, wherever new tensors are to be made."""
    run_python(
        """
        import sys, torch, shmplasma, shmplasma.torch
        torch.set_default_device("meta")
        with shmplasma.connect(sys.argv[1]) as client:
            given = torch.tensor([1.0, 2.0], dtype=torch.float64, device="cpu")
            got = client.get(client.put(given))
            assert got.device.type == "cpu" and got.tolist() == [1, 2]
        """,
        store.store_socket_name,
    )


def test_a_context_can_be_taught(client: PlasmaClient) -> None:
    """`register` does for any context what the import does for the default one."""
    context = SerializationContext()
    register(context)
    object_id = client.put(torch.arange(1000), serialization_context=context)
    assert torch.equal(client.get(object_id, serialization_context=context), torch.arange(1000))


# --- data sets ----------------------------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    """Tell whether two samples are equal, and of the same types."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if one.__dict__ != other.__dict__:
            return False
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, dict):
        return same(list(one), list(other)) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def regular(number: int) -> Any:
    """Return one of many samples of the same form."""
    return {
        "image": torch.full((4, 5), number % 256, dtype=torch.uint8),
        "half": torch.full((3,), float(number), dtype=torch.bfloat16),
        "others": [np.arange(number, number + 3), (number, number / 2, number % 2 == 0)],
    }


GAPS = np.dtype({"names": ["a", "b"], "formats": ["i1", "<i4"], "offsets": [0, 8], "itemsize": 32})
SAMPLES: dict[str, Callable[[int], Any]] = {
    "of one form": regular,
    "texts": lambda number: ("x" * number, number),
    "of all lengths": torch.arange,
    "large numbers": lambda number: 10**20 + number,
    "empty": lambda _: (),
    "mixed": lambda number: regular(number) if number % 70 else None,
    "scalar arrays": np.array,
    "strings": lambda number: np.array([str(number)]),
    "objects": lambda number: np.array([number, None]),
    "requires a gradient": lambda number: torch.ones(number + 1, requires_grad=True),
    "parameters": lambda number: torch.nn.Parameter(torch.full((2,), float(number))),
    "buffers": lambda number: torch.nn.Buffer(torch.full((2,), number), persistent=number == 1),
    "masked": lambda number: np.ma.array([number, 1], mask=[False, True]),
    "big-endian": lambda number: (np.arange(number, number + 4, dtype=">i4"), number),
    "dates": lambda number: np.array([number, 0], ">M8[s]"),
    "fields with gaps": lambda number: np.array([(number % 100, number)], GAPS),
    "keys that are equal": lambda number: {(1, True)[number % 2]: number},
    "channels last": lambda number: torch.full((5, 4, 3), number).permute(2, 0, 1),
}


@pytest.mark.parametrize("block_bytes", [1, 2000, 1 << 20])
@pytest.mark.parametrize("kind", SAMPLES)
def test_samples_come_back(client: PlasmaClient, kind: str, block_bytes: int) -> None:
    """Of whatever form, one by one and many at once, also when each makes a block."""
    make = SAMPLES[kind]
    dataset = StoreDataset(client, map(make, range(150)), block_bytes=block_bytes)
    assert len(dataset) == 150
    for position in (0, 1, 77, 149, -1, -150):
        assert same(dataset[position], make(position % 150))
    wanted = [149, 3, 3, 0, 100, -150]
    got = dataset.__getitems__(wanted)
    assert all(same(each, make(position % 150)) for each, position in zip(got, wanted, strict=True))


def test_iterating_ends(client: PlasmaClient) -> None:
    """By an IndexError, as of any sequence; beyond both ends."""
    dataset = StoreDataset(client, range(10))
    assert list(dataset) == list(range(10))
    for position in (10, -11):
        with pytest.raises(IndexError, match=f"no sample {position} of 10"):
            dataset[position]
    assert len(StoreDataset(client, [])) == 0


class Squares(torch.utils.data.Dataset):  # type: ignore[misc]  # a class of PyTorch, which is not always installed
    """A data set that has a length and no end."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, position: int) -> int:
        return position**2


def test_a_data_set_can_be_stored(client: PlasmaClient) -> None:
    """By its length: few end by themselves."""
    assert list(StoreDataset(client, Squares())) == [number**2 for number in range(20)]


@pytest.mark.parametrize("kind", ["one form", "all lengths"])
def test_what_is_done_to_a_sample_is_forgotten(client: PlasmaClient, kind: str) -> None:
    """A sample is a copy: it can be written to, and the next one is as it was."""

    def make(number: int) -> Any:
        length = number if kind == "all lengths" else 1000
        return torch.full((length,), number), np.full(length, number)

    dataset = StoreDataset(client, map(make, range(1000)))
    tensor, array = dataset[999]
    tensor.zero_()
    array[:] = 0
    assert same(dataset[999], make(999))


def test_many_samples_are_few_objects(client: PlasmaClient) -> None:
    """And few pins, and go with the data set."""
    dataset = StoreDataset(client, map(regular, range(20_000)))
    assert len(client.list()) == 1
    assert dataset[19_999]["others"][1][0] == 19_999
    assert figure(client, "pinned objects") == 1
    del dataset
    until(lambda: not client.list(), "the blocks go with the data set")


def test_what_does_not_fit_leaves_nothing(client: PlasmaClient) -> None:
    """A data set of which there is no room for some block is none."""
    with pytest.raises(PlasmaStoreFull):
        StoreDataset(client, (np.zeros(1 << 20) for _ in range(20)), block_bytes=8 << 20)
    until(lambda: not client.list(), "the blocks that were put go")


class Watched(torch.utils.data.Dataset):  # type: ignore[misc]  # a class of PyTorch, which is not always installed
    """A data set that tells of each sample which process took it, and what that had then."""

    def __init__(self, dataset: StoreDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, positions: list[int]) -> Any:
        samples = self._dataset.__getitems__(positions)
        private = psutil.Process().memory_full_info().uss
        fds = len(os.listdir("/proc/self/fd"))
        return [(sample.sum(), os.getpid(), fds, private) for sample in samples]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.usefixtures("spawning")
def test_workers_read_what_there_is_once(client: PlasmaClient, method: str) -> None:
    """An epoch of many samples takes a worker no memory of its own, and no more descriptors than one sample."""
    size, count = 2048, 20_000
    rows = torch.randint(0, 9, (count, size), dtype=torch.uint8)
    dataset = StoreDataset(client, rows, block_bytes=1 << 20)
    loader = torch.utils.data.DataLoader(
        Watched(dataset), batch_size=50, num_workers=2, multiprocessing_context=method
    )
    seen: dict[int, list[tuple[int, int]]] = {}
    total = 0
    for sums, pids, fds, private in loader:
        total += sums.sum().item()
        for pid in pids.unique().tolist():
            seen.setdefault(pid, []).append((fds[0].item(), private[0].item()))
    assert total == rows.sum().item()
    assert len(seen) == 2
    for figures in seen.values():
        descriptors, memory = zip(*figures, strict=True)
        # Batches on their way to the parent are descriptors, too, and some of them are open at any time.
        assert max(descriptors) - descriptors[0] < 16
        assert memory[-1] - memory[0] < size * count // 4
    assert len(dataset) == count


def test_a_data_set_outlives_its_makers_client(store: Store) -> None:
    """It stands on references, which need no client."""
    with store.connect() as client:
        dataset = StoreDataset(client, map(regular, range(10)))
    copy = pickle.loads(pickle.dumps(dataset))
    del dataset
    assert same(copy[7], regular(7))
