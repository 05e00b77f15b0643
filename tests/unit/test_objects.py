from __future__ import annotations

import copy
import gc
import os
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmplasma.objects import ObjectID, fresh_id
from tests.processes import in_forked_child

IDS = st.binary(min_size=20, max_size=20)


@given(IDS)
def test_an_id_is_its_bytes(data: bytes) -> None:
    """The bytes come back, the repr shows them in hex, and two ids of the same bytes are equal."""
    object_id = ObjectID(data)
    assert object_id.binary() == data
    assert repr(object_id) == f"ObjectID({data.hex()})"
    twin = ObjectID(bytes(bytearray(data)))
    assert object_id == twin
    assert hash(object_id) == hash(twin)
    assert len({object_id, twin}) == 1


@given(IDS, IDS)
def test_ids_are_equal_when_their_bytes_are(first: bytes, second: bytes) -> None:
    """Equality and inequality are those of the bytes."""
    assert (ObjectID(first) == ObjectID(second)) == (first == second)
    assert (ObjectID(first) != ObjectID(second)) == (first != second)


@given(IDS)
def test_an_id_carries_the_hash_of_the_table(data: bytes) -> None:
    """CRC-32 does not differ between processes, as Python's own hash does."""
    assert ObjectID(data).hash32 == crc32(data)


def test_an_id_equals_nothing_else() -> None:
    """Not even its own bytes are an id."""
    object_id = ObjectID(20 * b"a")
    assert object_id != 20 * b"a"
    assert object_id != "a"
    assert object_id is not None
    assert object_id.__eq__(20 * b"a") is NotImplemented


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_id_survives_pickling(protocol: int) -> None:
    """An id that comes out of a pickle of any protocol is the one that went in, hash included."""
    object_id = ObjectID.from_random()
    back = pickle.loads(pickle.dumps(object_id, protocol))
    assert back == object_id
    assert hash(back) == hash(object_id)
    assert back.hash32 == object_id.hash32


def test_an_id_can_be_copied() -> None:
    """Copies of an id are equal to it, deep ones too."""
    object_id = ObjectID.from_random()
    assert copy.copy(object_id) == object_id
    assert copy.deepcopy([object_id]) == [object_id]


def test_an_id_can_be_referred_to_weakly() -> None:
    """A weak reference to an id works, and dies with it."""
    object_id = ObjectID.from_random()
    reference = weakref.ref(object_id)
    assert reference() is object_id
    del object_id
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("data", [b"", b"short", 19 * b"a", 21 * b"a"])
def test_another_length_is_refused(data: bytes) -> None:
    """An id of other than 20 bytes is an error that names the length and the remedy."""
    with pytest.raises(ValueError, match=f"20 bytes, not {len(data)}; ObjectID.from_random"):
        ObjectID(data)


@pytest.mark.parametrize("data", [None, 20, 20 * "a", bytearray(20), memoryview(bytes(20))])
def test_what_is_not_bytes_is_refused(data: object) -> None:
    """Only bytes make an id: what can change under it, or has to be encoded first, does not."""
    with pytest.raises(ValueError, match=f"not of {type(data).__name__}"):
        ObjectID(data)  # type: ignore[arg-type]  # the very mistake that is tested


Draw: TypeAlias = Callable[[], ObjectID]
DRAW = pytest.mark.parametrize("draw", [ObjectID.from_random, fresh_id])


@DRAW
def test_random_ids_differ(draw: Draw) -> None:
    """A thousand random ids are a thousand ids of 20 bytes."""
    ids = {draw() for _ in range(1000)}
    assert len(ids) == 1000
    assert {len(object_id.binary()) for object_id in ids} == {20}


@DRAW
def test_threads_draw_different_ids(draw: Draw) -> None:
    """No id is handed out twice where threads draw at the same time."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            drawn = list(threads.map(lambda _: [draw() for _ in range(1000)], range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert len({object_id for some in drawn for object_id in some}) == 8000


@DRAW
def test_a_forked_child_draws_ids_of_its_own(draw: Draw) -> None:
    """What the parent has drawn in advance is the parent's alone."""
    for _ in range(3):
        draw()  # there are some in advance now, or the third was the last of them
    receive, send = os.pipe()

    def draw_many() -> None:
        os.write(send, b"".join(draw().binary() for _ in range(200)))

    assert in_forked_child(draw_many) == 0
    data = os.read(receive, 200 * 20)
    os.close(receive)
    os.close(send)
    theirs = {data[at : at + 20] for at in range(0, len(data), 20)}
    assert len(theirs) == 200
    assert theirs.isdisjoint(draw().binary() for _ in range(200))


@DRAW
def test_a_fork_in_the_middle_of_a_draw(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a signal handler forks there, what is drawn in advance is the parent's alone as well."""
    urandom, children = os.urandom, list[int]()
    receive, send = os.pipe()

    def interrupted(size: int) -> bytes:
        drawn = urandom(size)
        monkeypatch.undo()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
            children.append(os.fork())
        return drawn

    monkeypatch.setattr(os, "urandom", interrupted)
    while not children:
        draw()
    ids = {draw().binary() for _ in range(200)}
    if not children[0]:
        os.write(send, b"".join(ids))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
    data = os.read(receive, 200 * 20)
    os.close(receive)
    os.close(send)
    assert len(data) == 200 * 20
    assert ids.isdisjoint(data[at : at + 20] for at in range(0, len(data), 20))
