"""Copies of several parts of a value: each byte once, by one thread or by several that copy about as much each."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmplasma import copying, helpers
from shmplasma.copying import copy_all, copy_into
from shmplasma.helpers import LATE_NS
from shmplasma.serialization import deserialize, serialize

PAGE = 4096
MIB = 1 << 20
GROUPS = list[list[int]]
make_table: Any = pa.table  # the stubs do not know NumPy arrays here

sizes_of_parts = st.lists(st.integers(1, 5 * PAGE), min_size=1, max_size=12)


def parts_of(sizes: list[int]) -> tuple[np.ndarray[Any, Any], list[Any], np.ndarray[Any, Any]]:
    """Return memory with gaps, pieces to copy to it, and what it is to be afterwards."""
    memory = np.full(sum(sizes) + 3 * len(sizes), 0xAA, np.uint8)
    wanted, pieces, start = memory.copy(), [], 0
    for number, size in enumerate(sizes):
        source = np.random.default_rng(number).integers(0, 256, size, np.uint8)
        wanted[start : start + size] = source
        pieces.append((memory[start : start + size], source))
        start += size + 3
    return memory, pieces, wanted


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> GROUPS:
    """Return a list of what is shared by threads: for each of them the sizes of what it copies."""
    found: GROUPS = []
    share = helpers.share

    def note(jobs: Any) -> None:
        jobs = list(jobs)
        found.extend([target.size for target, _ in job.args[0]] for job in jobs)
        share(jobs)

    monkeypatch.setattr(copying, "share", note)
    monkeypatch.setattr(copying, "are_late", lambda: False)
    monkeypatch.setattr(pa, "cpu_count", lambda: 8)
    return found


@given(
    sizes=sizes_of_parts,
    threads=st.integers(1, 5),
    held=st.booleans(),
    lead=st.integers(0, 2 * PAGE),
)
def test_all_is_copied(sizes: list[int], threads: int, held: bool, lead: int) -> None:
    """Exactly, and nothing beside it."""
    memory, pieces, wanted = parts_of(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "_PARALLEL_BYTES", 2 * PAGE)
        patch.setattr(copying, "_LEAD_BYTES", lead)
        patch.setattr(copying, "are_late", lambda: held)
        patch.setattr(pa, "cpu_count", lambda: 8)
        copy_all(pieces, threads)
    assert (memory == wanted).all()


@given(sizes=sizes_of_parts, threads=st.integers(2, 5), lead=st.integers(0, 2 * PAGE))
def test_each_thread_copies_about_as_much(sizes: list[int], threads: int, lead: int) -> None:
    """Up to a page for each thread, and the last of them what is more; what two copy of one part is divided at a page."""
    _, pieces, _ = parts_of(sizes)
    lead = min(lead, sum(sizes))
    most = -(-(sum(sizes) - lead) // threads)
    groups = list(copying._divided(pieces, threads, most))
    copied = [target for group in groups for target, _ in group]
    assert b"".join(map(bytes, copied)) == b"".join(bytes(target) for target, _ in pieces)
    shares = [sum(target.size for target, _ in group) for group in groups]
    assert all(share < most + PAGE for share in shares[:-1])
    assert shares[-1] < most + lead + PAGE
    assert len(groups) <= threads
    starts = [target.ctypes.data for target, _ in pieces]
    for target in copied:
        before = max(start for start in starts if start <= target.ctypes.data)
        assert (target.ctypes.data - before) % PAGE == 0


GRID = np.arange(6 * 50 * 70, dtype=np.int32).reshape(6, 50, 70)
STRIDED: dict[str, Any] = {
    "columns": GRID[0, :, :33],
    "rows from behind": GRID[1, ::-2],
    "axes in another order": GRID.transpose(1, 2, 0),
    "planes to colours": GRID[:3].transpose(1, 2, 0),
    "colours from behind": GRID.reshape(-1, 70, 3)[..., ::-1],
    "pairs, each of them twice": np.broadcast_to(GRID[..., None, :2], (6, 50, 70, 2)),
    "columns of a table": GRID.reshape(4, -1).T[:, ::2],
    "one row": GRID[:1, :, 3:],
    "few long rows": GRID[:5, 1:],
    "every other byte": GRID.view(np.uint8).reshape(-1)[::2],
    "records": np.zeros(3000, "i4, f8, i2")[::2],
}


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", STRIDED)
def test_what_is_not_contiguous(
    name: str, threads: int, held: bool, groups: GROUPS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written in C order, by as many threads, of which each copies whole rows."""
    monkeypatch.setattr(copying, "_PARALLEL_BYTES", 2 * PAGE)
    monkeypatch.setattr(copying, "are_late", lambda: held)
    array = STRIDED[name]
    room = np.zeros(array.nbytes, np.uint8)
    copy_into(room, array, threads)
    assert np.array_equal(room.view(array.dtype).reshape(array.shape), array)
    assert len(groups) <= threads
    assert (len(groups) > 1) == (
        threads > 1 and not held and array.nbytes >= 2 * PAGE and len(array) > 1
    )


@pytest.mark.parametrize(
    ("array", "copies"),
    [
        (GRID[:3].transpose(1, 2, 0), 3),
        (GRID[0, :, :4], 4),
        (GRID.reshape(-1, 100, 3)[:, 1:], 1),  # runs of 99 times 3
        (GRID.transpose(1, 2, 0), 1),
        (GRID[:, :2, :3], 1),
    ],
)
def test_a_short_last_axis_is_copied_by_planes(
    array: npt.NDArray[Any], copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else, as there is no use in it."""
    counted: list[int] = []
    copyto = np.copyto

    def count(target: Any, source: Any) -> None:
        counted.append(target.size)
        copyto(target, source)

    monkeypatch.setattr(np, "copyto", count)
    copy_into(np.zeros(array.nbytes, np.uint8), array)
    assert len(counted) == copies


@pytest.mark.parametrize(
    "value",
    [
        make_table({f"c{n}": np.arange(MIB // 8) for n in range(8)}),
        {n: np.arange(MIB // 8) for n in range(8)},
        [make_table({"c": np.arange(MIB // 8)})[:-1] for _ in range(8)],
        [np.arange(MIB // 8) for _ in range(4)] + [bytes(4 * MIB)],
    ],
    ids=["table", "arrays", "tables", "parts of all sizes"],
)
def test_threads_share_the_parts_of_a_value(value: Any, groups: GROUPS) -> None:
    """None of them is large enough for several threads."""
    payload = serialize(value)
    room: Any = np.empty(payload.size_bytes, np.uint8)
    payload.write(room, 2)
    other, caller = (sum(group) for group in groups)
    assert abs(caller - other - copying._LEAD_BYTES) <= 3 * PAGE
    assert other + caller > 0.99 * payload.size_bytes
    assert serialize(deserialize(pa.py_buffer(room), payload.codec)).size_bytes == room.size


@pytest.mark.parametrize("source", [bytes(8 * MIB), np.zeros((8, MIB), np.uint8)])
def test_the_caller_copies_more_than_who_helps(source: Any, groups: GROUPS) -> None:
    """He has begun by the time they are awake, and does not wait for them at the end."""
    copy_into(np.empty(8 * MIB, np.uint8), source, 4)
    *others, (caller,) = groups
    assert len(others) == 3
    assert all(group == others[0] for group in others)
    assert 0 <= others[0][0] + copying._LEAD_BYTES - caller <= 4 * PAGE


def test_who_gathers_has_no_lead(groups: GROUPS) -> None:
    """Each byte takes several times as long, and nobody waits long for what the last one has left."""
    source = np.zeros((2 * MIB, 16), np.uint8)[:, ::2]
    copy_into(np.empty(source.size, np.uint8), source, 2)
    (other,), (caller,) = groups
    assert abs(other - caller) <= 2 * PAGE


@pytest.mark.parametrize(
    ("size_bytes", "threads"), [(100_000, 2), (copying.SHARED_BYTES, 1)], ids=["small", "one"]
)
def test_one_thread_copies(size_bytes: int, threads: int, groups: GROUPS) -> None:
    """Where others would cost more than they do."""
    value = [np.arange(size_bytes // 8) for _ in range(5 * MIB // size_bytes)]
    payload = serialize(value)
    payload.write(np.empty(payload.size_bytes, np.uint8), threads)
    assert not groups


def test_who_has_waited_for_the_lock_keeps_it(
    monkeypatch: pytest.MonkeyPatch, groups: GROUPS
) -> None:
    """Other threads compute: it would wait for it after each part, up to 5 ms."""
    copyto, unlocked = np.copyto, []

    def wait(target: Any, source: Any) -> None:
        copyto(target, source)
        unlocked.append(target.size)
        time.sleep(2e-9 * LATE_NS)

    monkeypatch.setattr(np, "copyto", wait)
    monkeypatch.setattr(copying, "_LEAD_BYTES", 0)
    memory, pieces, wanted = parts_of(4 * [MIB] + [4 * MIB, MIB, MIB])
    copy_all(pieces, 2)
    assert (memory == wanted).all()
    assert groups == [5 * [MIB], [3 * MIB, MIB, MIB]]
    assert sorted(unlocked) == [MIB, 3 * MIB]


def test_a_source_that_is_not_as_it_was() -> None:
    """Nothing is written beside its room."""
    memory, pieces, _ = parts_of(3 * [MIB])
    pieces[1] = pieces[1][0], bytes(MIB + 1)
    with pytest.raises(ValueError, match="do not fit"):
        copy_all(pieces, 2)
    assert (memory[[MIB, MIB + 1, MIB + 2]] == 0xAA).all()
