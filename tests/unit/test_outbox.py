from __future__ import annotations

from collections import deque

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shmplasma.layout import OUTBOX_BYTES, HeaderWord
from shmplasma.outbox import ANNOUNCED_AT, PLACES, RECORDS, Outbox, Polling, read_record

RECORD_BYTES = OUTBOX_BYTES // RECORDS
WORDS = RECORD_BYTES // 8
MAX_BODY = RECORD_BYTES - 12
"""What a record holds beside its number, its kind and its length."""
KINDS = st.integers(0, 0xFFFF)
BODIES = st.binary(max_size=MAX_BODY)
NEVER_POLLED = memoryview(bytes(8)).cast("Q")
FIRST_STORE = memoryview(bytes(8)).cast("Q")


class Page:
    """An outbox between a client and a store which handles a record when it is told to."""

    def __init__(self, acknowledged: int = 0) -> None:
        self.raw = memoryview(bytearray(OUTBOX_BYTES))
        self.words = self.raw.cast("Q")
        self.counter = memoryview(bytearray(8)).cast("Q")
        self.counter[0] = acknowledged
        self.outbox = Outbox(self.words, self.counter, NEVER_POLLED, FIRST_STORE)

    @property
    def handled(self) -> int:
        """How many records the store has handled."""
        return self.counter[0]

    def handle(self) -> tuple[int, bytes] | None:
        """Take the next record as the store does."""
        record = read_record(self.raw, self.handled)
        if record is not None:
            self.counter[0] += 1
        return record


def test_records_fill_the_page() -> None:
    """The ring is a power of two of whole cache lines, and nothing of its page is left over."""
    assert RECORDS * RECORD_BYTES == OUTBOX_BYTES
    assert RECORDS & (RECORDS - 1) == 0
    assert RECORD_BYTES == 64


def test_an_outbox_begins_empty() -> None:
    """There is no record in a page of zeros."""
    assert read_record(Page().raw, 0) is None


@given(st.lists(st.tuples(KINDS, BODIES), max_size=PLACES))
def test_records_come_out_as_they_went_in(records: list[tuple[int, bytes]]) -> None:
    """Kind and body come back whole and in order, and then there is nothing."""
    page = Page()
    for kind, body in records:
        assert page.outbox.append(kind, body)
    assert [page.handle() for _ in records] == records
    assert page.handle() is None


@given(st.lists(st.none() | st.tuples(KINDS, BODIES), max_size=300))
def test_a_ring_goes_round(steps: list[tuple[int, bytes] | None]) -> None:
    """Appending and handling in any order: a full ring refuses, and nothing is lost or comes twice."""
    page = Page()
    waiting: deque[tuple[int, bytes]] = deque()
    for step in steps:
        if step is None:
            assert page.handle() == (waiting.popleft() if waiting else None)
        else:
            taken = page.outbox.append(*step)
            assert bool(taken) == (len(waiting) < PLACES)
            if taken:
                waiting.append(step)
    assert [page.handle() for _ in range(len(waiting))] == list(waiting)
    assert page.handle() is None


@pytest.mark.parametrize("before", [0, 1, RECORDS - 1, RECORDS, 12345])
def test_a_full_ring_takes_nothing_until_something_is_handled(before: int) -> None:
    """The record after the last free place is refused and leaves the page as it was."""
    page = Page(before)
    for number in range(PLACES):
        assert page.outbox.append(number, b"%d" % number)
    content = bytes(page.raw)
    assert not page.outbox.append(77, b"too much")
    assert not page.outbox.append(77, b"too much")
    assert page.raw == content
    assert page.handle() == (0, b"0")
    assert page.outbox.append(78, b"again")
    assert not page.outbox.append(79, b"too much")
    left = [page.handle() for _ in range(PLACES)]
    assert left == [*((number, b"%d" % number) for number in range(1, PLACES)), (78, b"again")]
    assert page.handle() is None


def test_places_are_kept_for_the_last_records() -> None:
    """A client that leaves, and ends, says so, though nobody reads what it has written; and there is room for each once."""
    page = Page()
    for number in range(PLACES):
        assert page.outbox.append(number, b"")
    assert page.outbox.append(77, b"last but one", is_last=True)
    assert page.outbox.append(78, b"last", is_last=True)
    assert not page.outbox.append(79, b"too much", is_last=True)
    assert [page.handle() for _ in range(RECORDS)][-1] == (78, b"last")


def test_rounds_and_rounds() -> None:
    """A place that is used again shows no record of an earlier round."""
    page = Page()
    for number in range(5 * RECORDS + 3):
        assert read_record(page.raw, number) is None
        assert page.outbox.append(number, number.to_bytes(8, "little"))
        assert read_record(page.raw, number + 1) is None
        assert page.handle() == (number, number.to_bytes(8, "little"))


def test_a_long_body_is_not_read_behind_a_shorter_one() -> None:
    """What an earlier round has left in a place is no part of its record."""
    page = Page()
    for _ in range(RECORDS):
        assert page.outbox.append(1, MAX_BODY * b"x")
        page.handle()
    assert page.outbox.append(2, b"short")
    assert page.handle() == (2, b"short")


# -- interruptions -------------------------------------------------------------------------------


@given(st.integers(0, 200), BODIES, st.integers(0, RECORD_BYTES))
@example(0, b"", RECORD_BYTES)
@example(RECORDS - 1, b"body", RECORD_BYTES)
def test_a_record_is_there_when_its_number_is(before: int, body: bytes, n_written: int) -> None:
    """A client that dies before it has written the number has written no record."""
    page, whole = Page(), Page()
    for each in (page, whole):
        for _ in range(before):
            assert each.outbox.append(3, b"earlier")
            each.handle()
    assert whole.outbox.append(9, body)
    # Content first, and the number last.
    start = before % RECORDS * RECORD_BYTES
    written = [*range(start + 8, start + RECORD_BYTES), start][:n_written]
    for at in written[: RECORD_BYTES - 8]:
        page.raw[at] = whole.raw[at]
    if start in written:
        page.words[start // 8] = whole.words[start // 8]
    assert page.handle() == ((9, body) if start in written else None)


def test_content_that_was_interrupted_is_written_anew() -> None:
    """An interrupt before the number leaves nothing: the next record takes the place."""
    page = Page()
    page.raw[8:20] = b"half a recor"
    assert page.outbox.append(6, b"x")
    assert page.handle() == (6, b"x")
    assert page.handle() is None


def test_an_outbox_goes_on_where_it_was() -> None:
    """A client that makes its end anew, with all handled, is understood."""
    page = Page()
    for _ in range(RECORDS + 5):
        assert page.outbox.append(1, b"")
        page.handle()
    again = Outbox(page.words, page.counter, NEVER_POLLED, FIRST_STORE)
    assert again.append(2, b"after")
    assert page.handle() == (2, b"after")


def test_nobody_is_silent_to_a_store_that_he_does_not_know() -> None:
    """What a successor polls is announced to it until its client has come back, so that the client notices."""
    header, page = memoryview(bytearray(4096)).cast("Q"), Page()
    polled, incarnation = (
        header[at : at + 1] for at in (HeaderWord.POLLED, HeaderWord.INCARNATION)
    )
    first = Polling(header, lambda: None, possible=True)
    outbox = Outbox(page.words, page.counter, polled, incarnation)

    def is_silent() -> bool:
        return outbox.append(1, b"") > 0

    assert not is_silent()
    first.start()
    assert is_silent()
    second = Polling(header, lambda: None, possible=True)
    second.succeed()
    assert not is_silent()
    second.start()
    assert not is_silent()
    outbox.connected()
    assert is_silent()


def test_a_store_that_stops_looking_says_so_before_the_barrier() -> None:
    """A client of a record that its last look misses sees that, and announces it."""
    header = memoryview(bytearray(4096)).cast("Q")
    seen: list[int] = []
    polling = Polling(header, lambda: seen.append(header[HeaderWord.POLLED]), possible=True)
    polling.start()
    assert header[HeaderWord.POLLED]
    polling.stop()
    assert seen == [0]


def test_a_store_that_lags_is_woken_once() -> None:
    """A client is silent to a store that looks, but for the one record behind which half a ring waits."""
    header, page = memoryview(bytearray(4096)).cast("Q"), Page()
    polled, incarnation = (
        header[at : at + 1] for at in (HeaderWord.POLLED, HeaderWord.INCARNATION)
    )
    Polling(header, lambda: None, possible=True).start()
    outbox = Outbox(page.words, page.counter, polled, incarnation)
    told = []
    for handled in (0, 2, ANNOUNCED_AT, RECORDS + ANNOUNCED_AT):
        page.counter[0] = handled
        while count := outbox.append(1, b""):
            if count < 0:
                told.append(-count)
    assert told == [ANNOUNCED_AT, RECORDS + 2 * ANNOUNCED_AT]
    page.counter[0] = outbox.written
    for _ in range(3 * RECORDS):
        assert outbox.append(1, b"") > 0
        page.counter[0] += 1


def test_what_is_not_urgent_waits_for_what_is() -> None:
    """A store that sleeps is told of neither of a hundred such records, but of the one behind which half a ring waits."""
    page, zero = Page(), memoryview(bytearray(8)).cast("Q")
    outbox = Outbox(page.words, page.counter, zero, zero)
    told = []
    while count := outbox.append(1, b"", is_urgent=False):
        if count < 0:
            told.append(-count)
    assert told == [ANNOUNCED_AT]
    page.counter[0] = outbox.written
    assert outbox.append(1, b"") < 0


# -- what a hostile client may write -------------------------------------------------------------


@given(st.binary(min_size=RECORD_BYTES, max_size=RECORD_BYTES), st.integers(0, 1 << 20))
def test_anything_can_be_read(content: bytes, acknowledged: int) -> None:
    """Garbage under the right number is a record, and its body is no longer than a place."""
    page = Page(acknowledged)
    page.raw[:] = RECORDS * content
    page.words[acknowledged % RECORDS * WORDS] = acknowledged + 1
    record = page.handle()
    assert record is not None
    assert content[12:].startswith(record[1])


@pytest.mark.parametrize("number", [0, 1, 7, 9, 8 + RECORDS, 8 - RECORDS + 1, (1 << 64) - 1])
def test_another_number_is_no_record(number: int) -> None:
    """Only the one number that is expected at a place makes a record of it."""
    page = Page(7)
    assert page.outbox.append(1, b"body")
    page.words[7 * WORDS] = number % (1 << 64)
    assert page.handle() is None


@given(st.integers(0, 0xFFFF))
def test_a_length_that_is_too_large(length: int) -> None:
    """A body ends with its place, however long it says that it is."""
    page = Page()
    assert page.outbox.append(1, MAX_BODY * b"b")
    page.raw[10:12] = length.to_bytes(2, "little")
    record = page.handle()
    assert record == (1, min(length, MAX_BODY) * b"b")
