from __future__ import annotations

import sys
from threading import Event, Thread
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmplasma import outbox, shared_outbox
from shmplasma.layout import OUTBOX_BYTES
from shmplasma.nesting import NESTED
from shmplasma.outbox import PLACES, RECORDS, Outbox, read_record
from shmplasma.posted import Abort, Publish
from shmplasma.shared_outbox import SharedOutbox

A, B = 20 * b"a", 20 * b"b"


class Shared:
    """An outbox, and the words that its store writes."""

    def __init__(self, outbox: type[Outbox] = SharedOutbox) -> None:
        self.page = memoryview(bytearray(OUTBOX_BYTES))
        self.acknowledged, self.polled, incarnation = (
            memoryview(bytearray(8)).cast("Q") for _ in range(3)
        )
        self.outbox: Any = outbox(self.page.cast("Q"), self.acknowledged, self.polled, incarnation)

    def poll(self, *, is_on: bool) -> None:
        """Let clients be silent, or not."""
        self.polled[0] = is_on


@given(st.lists(st.integers(0, 2 * RECORDS) | st.booleans(), max_size=12))
def test_what_is_published_is_what_would_be_appended(steps: list[int]) -> None:
    """The same records and the same answers, whatever the store has read, and whether it looks by itself."""
    short, plain = Shared(), Shared(Outbox)
    for step in steps:
        if isinstance(step, bool):
            short.poll(is_on=step)
            plain.poll(is_on=step)
            read = plain.acknowledged[0] + (plain.outbox.written - plain.acknowledged[0]) // 2
            short.acknowledged[0] = plain.acknowledged[0] = read
            continue
        for number in range(step):
            message = Publish(A, number, 100, number % 7, 3, bool(number % 2))
            count = plain.outbox.append(Publish.KIND, message.encode())
            assert short.outbox.publish(*message) == count
    assert short.page == plain.page
    assert short.outbox.written == plain.outbox.written


def test_the_ring_is_full_for_all() -> None:
    """Whichever way a record would be written; but the last one has a place."""
    shared = Shared()
    for number in range(PLACES):
        assert shared.outbox.publish(A, number, 1, 0, 0, False)
    content = bytes(shared.page)
    assert not shared.outbox.publish(A, 0, 1, 0, 0, False)
    assert not shared.outbox.post(Abort.KIND, A)
    assert not shared.outbox.post_soon(Abort.KIND, A)
    assert shared.page == content
    assert shared.outbox.post_soon(Abort.KIND, A, is_last=True)
    shared.acknowledged[0] = PLACES
    assert shared.outbox.publish(A, 0, 1, 0, 0, False)


class Interrupted:
    """The word POLLED or ACKNOWLEDGED, at which something else is done."""

    def __init__(self, word: memoryview, done: Any) -> None:
        self._word, self._done = word, done

    def __getitem__(self, at: int) -> int:
        self._done()
        return int(self._word[at])


def at_each_look(shared: Shared, done: Any) -> None:
    """Have something done while a record is written, when it is looked how many were read."""
    shared.outbox._look_at = 0
    shared.outbox._acknowledged = Interrupted(shared.acknowledged, done)


@pytest.mark.parametrize("way", ["post", "publish"])
def test_a_signal_handler_in_the_midst_of_a_record(way: str) -> None:
    """It is not to wait for the call that it has interrupted; what a finalizer says goes another way."""
    shared = Shared()
    said: list[object] = []

    def handler() -> None:
        with pytest.raises(RuntimeError, match=NESTED[:40]):
            shared.outbox.post(Abort.KIND, B)
        with pytest.raises(RuntimeError, match=NESTED[:40]):
            shared.outbox.publish(B, 0, 1, 0, 0, False)
        said.append(shared.outbox.post_soon(Abort.KIND, B))

    at_each_look(shared, handler)
    if way == "post":
        assert shared.outbox.post(Abort.KIND, A) == -1
    else:
        assert shared.outbox.publish(A, 0, 1, 0, 0, False) == -1
    assert said == [0]
    assert shared.outbox.written == 1


def test_threads_write_one_after_the_other() -> None:
    """Another thread waits until the record is there, and writes the next one; a finalizer in it does not wait."""
    shared = Shared()
    inside, go_on = Event(), Event()
    soon: list[int] = []

    def is_looking() -> None:
        shared.outbox._acknowledged = shared.acknowledged
        inside.set()
        assert go_on.wait(20)

    at_each_look(shared, is_looking)
    first = Thread(target=shared.outbox.publish, args=(A, 0, 1, 0, 0, False))
    first.start()
    assert inside.wait(20)
    soon.append(shared.outbox.post_soon(Abort.KIND, B))
    second = Thread(target=shared.outbox.post, args=(Abort.KIND, B))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    go_on.set()
    first.join(20)
    second.join(20)
    assert soon == [0]
    kinds = [record[0] for n in range(2) if (record := read_record(shared.page, n))]
    assert kinds == [Publish.KIND, Abort.KIND]


@pytest.mark.parametrize("way", ["post", "post_soon", "publish"])
def test_an_exception_between_two_lines(way: str) -> None:
    """As a debugger's user may raise it: the record is not written or it is counted, and the next one has a place of its own."""

    def write(shared: Shared) -> None:
        if way == "publish":
            shared.outbox.publish(A, 0, 1, 0, 0, False)
        else:
            getattr(shared.outbox, way)(Abort.KIND, A)

    def lines_until(last: int, shared: Shared) -> int:
        """Write a record up to a line, or to the end; return how many lines that were."""
        count = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal count
            if frame.f_code.co_filename not in (outbox.__file__, shared_outbox.__file__):
                return None
            if event == "line":
                count += 1
                if count == last:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            write(shared)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        return count

    n_lines = lines_until(0, Shared())
    assert n_lines > 5
    for last in range(1, n_lines + 1):
        shared = Shared()
        assert lines_until(last, shared) == last
        shared.acknowledged[0] = read = sum(read_record(shared.page, n) is not None for n in (0, 1))
        assert shared.outbox.append(Abort.KIND, B)
        assert read_record(shared.page, read) == (Abort.KIND, B), last
