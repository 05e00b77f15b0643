"""A mixed load on a store, and the proof that what it was promised holds, for tests that kill somebody meanwhile.

The bytes of an object follow from its serial number, which is its first word: so whoever reads one sees whether
all of it belongs together, and who has stored it sees whether it is that object.  A load keeps a ledger of what
the store has acknowledged, and can tell somebody else of each change, before and after it.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import shmplasma
from shmplasma.layout import align_up
from shmplasma.objects import ObjectID
from tests.clients import figures_of

__all__ = [
    "Crew",
    "Known",
    "Ledger",
    "Load",
    "Member",
    "Said",
    "in_small_process",
    "prove_accounts",
    "prove_empty",
    "prove_identical",
    "prove_whole",
]

SIZES: Final = (8, 20, 100, 100, 504, 504, 4096, 4096, 30_000, 70_000, 300_000)
"""Some for leases, some beyond, one that is populated before it is filled."""
_HELD: Final = 12
_UNSEALED: Final = 3
_LIMBO: Final = 2
_STRIDE: Final = 0x9E37_79B9_7F4A_7C15
"""What one word adds to the one before."""
_WORDS: Final[npt.NDArray[np.uint64]] = np.arange(max(SIZES) // 8 + 1, dtype=np.uint64) * np.uint64(
    _STRIDE
)
_PATIENCE_SECONDS: Final = 60.0
"""For what takes milliseconds, unless something hangs."""

T = TypeVar("T")


class Known(NamedTuple):
    """What an object must look like.

    Attributes
    ----------
    serial : int
        Of which its bytes are made.
    size, metadata_size : int
        Bytes; `size` is that of the array in a value.
    is_value : bool
        Whether it was stored by `put`.
    """

    serial: int
    size: int
    metadata_size: int
    is_value: bool


class Said(NamedTuple):
    """A change of a ledger that is about to be made, or was acknowledged."""

    what: str
    object_id: bytes
    known: Known | None


# -- contents --------------------------------------------------------------------------------------


def content(serial: int, size_bytes: int) -> npt.NDArray[np.uint8]:
    """Return the bytes of an object."""
    words = _WORDS[: -(-size_bytes // 8)] + np.uint64(serial)
    return words.view(np.uint8)[:size_bytes]


def prove_identical(known: Known, buffer: Any, metadata: bytes | None = None) -> None:
    """Prove that the bytes are those of this object."""
    data = np.frombuffer(buffer, np.uint8)
    if known.is_value:  # its bytes are somewhere in there
        assert content(known.serial, known.size).tobytes() in data.tobytes(), (
            f"the value {known} has other bytes"
        )
        return
    assert len(data) == known.size, f"{known} has {len(data)} bytes"
    assert np.array_equal(data, content(known.serial, known.size)), f"{known} has other bytes"
    if metadata is not None:
        expected = content(known.serial, known.metadata_size)
        assert metadata == expected.tobytes(), f"{known} has other metadata"


def prove_value(known: Known, value: Any) -> None:
    """Prove that a value is the one that was put."""
    assert value["serial"] == known.serial, f"{known} is the value {value['serial']}"
    assert np.array_equal(value["data"], content(known.serial, known.size)), (
        f"the value {known} has other bytes"
    )


def prove_whole(buffer: Any, metadata: bytes) -> None:
    """Prove that all bytes of an object, of which nothing is known, are those of one."""
    data = np.frombuffer(buffer, np.uint8)
    if metadata == b"" and b"serial" in data[:200].tobytes():
        return  # a value: `get` looks at those
    serial = int.from_bytes(data[:8].tobytes(), sys.byteorder)
    known = Known(serial, len(data), len(metadata), is_value=False)
    prove_identical(known, buffer, metadata)


# -- ledgers ---------------------------------------------------------------------------------------


class Ledger:
    """What a store must hold, as somebody knows who is told of each change.

    Attributes
    ----------
    objects : dict
        Ids of acknowledged objects that are not deleted.
    doubtful : set of bytes
        Ids of objects about which the store was asked and has not answered.
    """

    def __init__(self) -> None:
        self.objects: dict[bytes, Known] = {}
        self.doubtful: set[bytes] = set()

    def note(self, said: Said) -> None:
        """Take note of a change."""
        match said.what:
            case "sealing":
                self.doubtful.add(said.object_id)
            case "sealed":
                assert said.known is not None
                self.doubtful.discard(said.object_id)
                self.objects[said.object_id] = said.known
            case "deleting":
                del self.objects[said.object_id]
                self.doubtful.add(said.object_id)
            case "deleted":
                self.doubtful.discard(said.object_id)
            case _:
                raise AssertionError(f"nobody says {said.what!r}")


def _tell_nobody(_: Said) -> None:
    """Be the listener of those who have none."""


@dataclass(frozen=True)
class Report:
    """What a load knows while it rests.

    Attributes
    ----------
    objects, unsealed : dict
        Ids of what it has stored and not deleted, and of what it is writing.
    held : set of bytes
        Ids of what it holds.
    counts : Counter of str
        What it has done since the last report.
    longest_seconds : float
        How long one call took at most since then.
    """

    objects: dict[bytes, Known]
    unsealed: dict[bytes, Known]
    held: set[bytes]
    counts: Counter[str]
    longest_seconds: float


class Load:
    """One client's load: each `step` does one of the things that clients do.

    Parameters
    ----------
    client : PlasmaClient
        By which.
    number : int
        Of this load, used by no other one.
    tell : callable, optional
        Is told of each change of the ledger.
    most : int, optional
        About how many objects it keeps.

    Attributes
    ----------
    objects : dict
        What is there: ids, and what the objects must look like.
    others : sequence of bytes
        Ids of others' objects, some of which may have gone.
    """

    def __init__(
        self,
        client: shmplasma.PlasmaClient,
        number: int,
        tell: Callable[[Said], None] = _tell_nobody,
        most: int = 150,
    ) -> None:
        self.objects: dict[bytes, Known] = {}
        self.others: Sequence[bytes] = ()
        self._client = client
        self._tell = tell
        self._most = most
        self._rng = random.Random(number)
        self._last_serial = number << 32
        self._unsealed: dict[bytes, tuple[Known, Any]] = {}
        self._limbo: deque[Any] = deque()
        self._held: deque[tuple[bytes, bytes, Any]] = deque()
        self._deleted: deque[bytes] = deque(maxlen=20)
        self._counts: Counter[str] = Counter()
        self._longest_seconds = 0.0
        self._ways = (
            *(self._put_raw, self._put_value, self._put_chosen_value, self._create_and_seal),
            *(self._put_raw, self._put_raw, self._create, self._create, self._seal, self._abort),
            *(self._get_own, self._get_own, self._get_values, self._get_many, self._get_others),
            *(self._hold, self._hold, self._release, self._contains, self._get_missing),
            *(self._delete, self._delete, self._delete_several, self._put_again),
        )

    def step(self) -> None:
        """Do one thing, prove that it came out right, and measure how long it took."""
        way = self._rng.choice(self._ways)
        if len(self.objects) > self._most:
            way = self._delete_several
        began = time.monotonic()
        way()
        self._longest_seconds = max(self._longest_seconds, time.monotonic() - began)
        self._counts[way.__name__.strip("_").replace("_", " ")] += 1

    def take_over(self, ledger: Ledger) -> None:
        """Go on with what somebody has left who was killed."""
        self.objects.update(ledger.objects)
        self.verify()
        for object_id in ledger.doubtful:
            self._remove(object_id)

    def report(self) -> Report:
        """Let go of what was aborted, prove that all is as it must be, and say what there is."""
        self._limbo.clear()
        self._client.flush()
        self.verify()
        counts, self._counts = self._counts, Counter()
        longest, self._longest_seconds = self._longest_seconds, 0.0
        return Report(
            dict(self.objects),
            {object_id: known for object_id, (known, _) in self._unsealed.items()},
            {object_id for object_id, _, _ in self._held},
            counts,
            longest,
        )

    def verify(self) -> None:
        """Prove that every object is there and identical, and that what is held is what it was."""
        ids = list(self.objects)
        found = self._client.get_buffers([ObjectID(each) for each in ids], 0, with_meta=True)
        for object_id, (metadata, buffer) in zip(ids, found, strict=True):
            known = self.objects[object_id]
            assert buffer is not None, f"{object_id.hex()} is lost: {known}"
            prove_identical(known, buffer, metadata)
        for object_id, was, buffer in self._held:
            assert buffer.equals(pa.py_buffer(was)), f"what is held of {object_id.hex()} differs"
        self._counts["verified"] += len(ids)
        self._counts["looked at again"] += len(self._held)

    def leave(self) -> None:
        """Let go of everything and disconnect."""
        self._held.clear()
        self._limbo.clear()
        self._unsealed.clear()
        self._client.disconnect()

    # -- putting -------------------------------------------------------------------------------

    def _new(self, *, is_value: bool = False, metadata: bool = False) -> Known:
        self._last_serial += 1
        size = self._rng.choice(SIZES)
        metadata_size = self._rng.choice((0, 8, 50)) if metadata else 0
        return Known(self._last_serial, size, metadata_size, is_value)

    def _new_id(self) -> bytes:
        return self._rng.randbytes(12) + self._last_serial.to_bytes(8, "big")

    def _sealed(self, object_id: bytes, known: Known) -> None:
        self.objects[object_id] = known
        self._tell(Said("sealed", object_id, known))

    def _put_raw(self) -> None:
        known = self._new(metadata=True)
        object_id = self._client.put_raw_buffer(
            content(known.serial, known.size), metadata=_metadata(known)
        )
        self._sealed(object_id.binary(), known)

    def _put_value(self) -> None:
        known = self._new(is_value=True)
        value = {"serial": known.serial, "data": content(known.serial, known.size)}
        self._sealed(self._client.put(value).binary(), known)

    def _put_chosen_value(self) -> None:
        known = self._new(is_value=True)
        object_id = self._new_id()
        value = {"serial": known.serial, "data": content(known.serial, known.size)}
        self._tell(Said("sealing", object_id, known))
        self._client.put(value, ObjectID(object_id))
        self._sealed(object_id, known)

    def _create_and_seal(self) -> None:
        self._store(self._new_id())

    def _store(self, object_id: bytes) -> None:
        known = self._new(metadata=True)
        self._tell(Said("sealing", object_id, known))
        self._client.create_and_seal(
            ObjectID(object_id), content(known.serial, known.size), _metadata(known)
        )
        self._sealed(object_id, known)

    def _put_again(self) -> None:
        """Store another object under the id of one that was deleted, once all have let go of that."""
        if self._deleted and not self._client.contains(ObjectID(self._deleted[0])):
            self._store(self._deleted.popleft())

    def _create(self) -> None:
        """Create an object and fill half of it."""
        if len(self._unsealed) >= _UNSEALED:
            self._seal()
        known = self._new(metadata=True)
        object_id = self._new_id()
        buffer = self._client.create(ObjectID(object_id), known.size, _metadata(known))
        half = known.size // 2
        np.frombuffer(memoryview(buffer), np.uint8)[:half] = content(known.serial, known.size)[
            :half
        ]
        self._unsealed[object_id] = known, buffer

    def _seal(self) -> None:
        """Fill the other half and seal."""
        if not self._unsealed:
            return
        object_id = next(iter(self._unsealed))
        known, buffer = self._unsealed.pop(object_id)
        half = known.size // 2
        np.frombuffer(buffer, np.uint8)[half:] = content(known.serial, known.size)[half:]
        self._tell(Said("sealing", object_id, known))
        self._client.seal(ObjectID(object_id))
        self._sealed(object_id, known)

    def _abort(self) -> None:
        """Abort, sometimes while the buffer is still held."""
        if not self._unsealed:
            return
        object_id = next(iter(self._unsealed))
        _, buffer = self._unsealed.pop(object_id)
        if self._rng.random() < 0.5:
            self._limbo.append(buffer)
        del buffer
        self._client.abort(ObjectID(object_id))
        assert not self._client.contains(ObjectID(object_id)), "an aborted object is there"
        while len(self._limbo) > _LIMBO:
            self._limbo.popleft()

    # -- getting -------------------------------------------------------------------------------

    def _some(self, count: int = 1) -> list[bytes]:
        return self._rng.sample(list(self.objects), min(count, len(self.objects)))

    def _get_own(self) -> None:
        for object_id in self._some():
            metadata, buffer = self._client.get_buffers(ObjectID(object_id), 60_000, with_meta=True)
            prove_identical(self.objects[object_id], buffer, metadata)

    def _get_values(self) -> None:
        for object_id in self._some(5):
            known = self.objects[object_id]
            if known.is_value:
                prove_value(known, self._client.get(ObjectID(object_id)))

    def _get_many(self) -> None:
        ids = self._some(10)
        found = self._client.get_buffers([ObjectID(each) for each in ids])
        for object_id, buffer in zip(ids, found, strict=True):
            prove_identical(self.objects[object_id], buffer)

    def _get_others(self) -> None:
        """Look at others' objects, which may have been deleted meanwhile, and hold one of them."""
        ids = self._rng.sample(self.others, min(3, len(self.others)))
        found = self._client.get_buffers([ObjectID(each) for each in ids], 0, with_meta=True)
        for object_id, (metadata, buffer) in zip(ids, found, strict=True):
            if buffer is not None:
                prove_whole(buffer, metadata)
                self._counts["others' objects"] += 1
                self._keep(object_id, buffer)

    def _get_missing(self) -> None:
        missing = ObjectID.from_random()
        assert self._client.get_buffers(missing, timeout_ms=0) is None
        assert not self._client.contains(missing)

    def _hold(self) -> None:
        for object_id in self._some():
            buffer = self._client.get_buffers(ObjectID(object_id), 60_000)
            prove_identical(self.objects[object_id], buffer)
            self._keep(object_id, buffer)

    def _keep(self, object_id: bytes, buffer: pa.Buffer) -> None:
        self._held.append((object_id, bytes(buffer), buffer))
        while len(self._held) > _HELD:
            self._release()

    def _release(self) -> None:
        if self._held:
            object_id, was, buffer = self._held.popleft()
            assert buffer.equals(pa.py_buffer(was)), f"what is held of {object_id.hex()} differs"

    def _contains(self) -> None:
        for object_id in self._some():
            assert self._client.contains(ObjectID(object_id)), f"{object_id.hex()} is lost"

    # -- deleting ------------------------------------------------------------------------------

    def _delete(self) -> None:
        for object_id in self._some():
            self._remove(object_id)

    def _delete_several(self) -> None:
        ids = self._some(self._most // 3 if len(self.objects) > self._most else 3)
        for object_id in ids:
            self._tell(Said("deleting", object_id, None))
        self._client.delete([ObjectID(object_id) for object_id in ids])
        for object_id in ids:
            self._forget(object_id)

    def _remove(self, object_id: bytes) -> None:
        if object_id in self.objects:
            self._tell(Said("deleting", object_id, None))
        self._client.delete(ObjectID(object_id))
        self._forget(object_id)

    def _forget(self, object_id: bytes) -> None:
        self.objects.pop(object_id, None)
        self._deleted.append(object_id)
        self._tell(Said("deleted", object_id, None))


def _metadata(known: Known) -> bytes:
    return content(known.serial, known.metadata_size).tobytes()


# -- the store's accounts --------------------------------------------------------------------------


def prove_accounts(
    client: shmplasma.PlasmaClient,
    sealed: Mapping[bytes, Known],
    unsealed: Mapping[bytes, Known],
    held: set[bytes],
    doubtful: Iterable[bytes] | None = (),
) -> None:
    """Prove that a store at rest holds what it must and no more, and that its figures are right.

    Parameters
    ----------
    client : PlasmaClient
        By which to ask.
    sealed, unsealed : mapping
        Ids of what must be there, and what it must look like.
    held : set of bytes
        Ids of what clients hold, deleted objects included.
    doubtful : iterable of bytes or None, optional
        Ids of what may be there; None if there may be others too.
    """
    deadline = time.monotonic() + 30
    while True:  # a release that came just now may not have been noticed
        try:
            _prove_accounts(client, sealed, unsealed, held, doubtful)
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _prove_accounts(
    client: shmplasma.PlasmaClient,
    sealed: Mapping[bytes, Known],
    unsealed: Mapping[bytes, Known],
    held: set[bytes],
    doubtful: Iterable[bytes] | None,
) -> None:
    listed = {object_id.binary(): info for object_id, info in client.list().items()}
    must = sealed.keys() | unsealed.keys() | held
    lost = must - listed.keys()
    assert not lost, f"{len(lost)} objects are not listed: {_names(lost)}"
    if doubtful is not None:
        extra = listed.keys() - must - set(doubtful)
        assert not extra, f"{len(extra)} objects should not be there: {_names(extra)}"
    for object_id, info in listed.items():
        state = "created" if object_id in unsealed else "sealed"
        assert info["state"] == state, f"{object_id.hex()} is {info['state']}, not {state}"
        known = sealed.get(object_id) or unsealed.get(object_id)
        if known is not None and not known.is_value:
            sizes = info["data_size"], info["metadata_size"]
            assert sizes == (known.size, known.metadata_size), f"{known} has the sizes {sizes}"
        is_held = object_id in held or object_id in unsealed
        assert (info["ref_count"] > 0) == is_held, f"{object_id.hex()}: {info}"
    figures = figures_of(client)
    sizes_bytes = (info["data_size"] + info["metadata_size"] for info in listed.values())
    used = sum(align_up(size, 64) for size in sizes_bytes)
    accounted = figures["capacity bytes"] - figures["free bytes"] - figures["leased bytes"]
    assert accounted == used, f"{accounted - used} bytes are used by nothing: {figures}"
    assert figures["pinned objects"] == len(held | unsealed.keys()), f"pins are wrong: {figures}"
    assert figures["evictions"] == 0, "the store is too small for this test"


def _names(ids: Iterable[bytes]) -> str:
    return ", ".join(sorted(object_id.hex() for object_id in ids)[:5])


def prove_empty(client: shmplasma.PlasmaClient) -> None:
    """Prove, when all others have left, that no pin and no lease is left and that all room can be had."""
    deadline = time.monotonic() + 30
    # A process that has ended may not have been noticed yet.
    while (figures := figures_of(client))["leased bytes"] or figures["pinned objects"]:
        assert time.monotonic() < deadline, f"pins or leases of the dead: {figures}"
        time.sleep(0.01)
    objects = client.list()
    assert all(info["ref_count"] == 0 for info in objects.values()), "a pin is left"
    assert all(info["state"] == "sealed" for info in objects.values()), "something is unsealed"
    sizes_bytes = (info["data_size"] + info["metadata_size"] for info in objects.values())
    used = sum(align_up(size, 64) for size in sizes_bytes)
    assert figures["capacity bytes"] - figures["free bytes"] == used, "bytes are lost"
    client.delete(list(objects))
    assert not client.list(), "an object cannot be deleted"
    capacity = client.store_capacity()
    whole = ObjectID.from_random()
    data = client.create(whole, capacity)
    assert len(data) == capacity
    del data
    client.abort(whole)


# -- processes -------------------------------------------------------------------------------------


class Member:
    """A forked process and the pipe to it.

    Parameters
    ----------
    task : callable
        ``task(pipe, *arguments)`` is what the process does; if it raises, its traceback comes by the pipe.
    *arguments : object
        Handed on as they are.
    """

    def __init__(self, task: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_do, args=(self.pipe, theirs, task, *arguments)
        )
        self.process.start()
        theirs.close()

    def hear(self) -> Any:
        """Return what the process says next; fail if it has failed, or says nothing for a minute."""
        if not self.pipe.poll(_PATIENCE_SECONDS):
            assert self.process.pid is not None
            os.kill(self.process.pid, signal.SIGUSR1)  # it says where it hangs
            time.sleep(0.5)
            raise AssertionError(f"the process {self.process.pid} hangs")
        return _judged(self.pipe.recv())

    def hear_all(self) -> list[Any]:
        """Return all that has come, without waiting."""
        heard = []
        with suppress(EOFError, OSError):  # it was killed, perhaps in the middle of a message
            while self.pipe.poll():
                heard.append(_judged(self.pipe.recv()))
        return heard

    def kill(self) -> None:
        """Kill the process, without waiting for its end."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Wait for the end of the process, and close the pipe."""
        self.process.join()
        self.pipe.close()


class _Failure(NamedTuple):
    text: str


def _judged(message: Any) -> Any:
    assert not isinstance(message, _Failure), f"a client has failed:\n{message.text}"
    return message


def _do(ours: Connection, pipe: Connection, task: Callable[..., None], *arguments: object) -> None:
    ours.close()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        task(pipe, *arguments)
    except BaseException:
        pipe.send(_Failure(traceback.format_exc()))
        raise


class Crew:
    """Members that are killed at the end of the block if they live."""

    def __init__(self) -> None:
        self.members: list[Member] = []

    def hire(self, task: Callable[..., None], *arguments: object) -> Member:
        """Fork a process."""
        member = Member(task, *arguments)
        self.members.append(member)
        return member

    def dismiss(self, member: Member) -> None:
        """Wait for the end of a process."""
        member.end()
        self.members.remove(member)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for member in tuple(self.members):
            member.process.kill()
            self.dismiss(member)


def in_small_process(task: Callable[..., T], *arguments: object) -> T:
    """Return what a task returns in a new process, in which nothing but its module is loaded.

    It may fork others, quickly and without the threads and descriptors of this one.

    Raises
    ------
    AssertionError
        The task has failed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_do_and_return, args=(theirs, task, *arguments))
    process.start()
    theirs.close()
    with ours:
        try:
            result, failure = ours.recv()
        except EOFError:
            result, failure = None, "its process has ended without a word"
        process.join()
    assert not failure, failure
    returned: T = result
    return returned


def _do_and_return(pipe: Connection, task: Callable[..., object], *arguments: object) -> None:
    with pipe:
        try:
            pipe.send((task(*arguments), ""))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
            raise
