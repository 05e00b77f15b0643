from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shmplasma.errors import LayoutError
from shmplasma.layout import (
    ALIGNMENT,
    BOARD_BYTES,
    BOARD_WORDS,
    CONTROL_BYTES,
    ENTRY_BYTES,
    ENTRY_WORDS,
    GENERATION_SHIFT,
    HEADER_BYTES,
    ID_BYTES,
    ID_FIELD,
    LAYOUT_VERSION,
    MARK_BYTES,
    MAX_SEGMENT_BYTES,
    OUTBOX_BYTES,
    STAGE_START,
    STATE_MASK,
    WANTED_WORDS,
    EntryState,
    EntryWord,
    HeaderWord,
    Layout,
    align_up,
    mark_end,
    read_end,
    recover_end,
)

TOKEN = bytes(range(100, 116))
ENDS = [
    HeaderWord.ENTRIES_END,
    HeaderWord.BOARDS_END,
    HeaderWord.WATERMARK,
    HeaderWord.ENTRIES_USED,
]
PAGES = st.sampled_from([4096, 16384, 65536, 2 << 20, 1 << 30])
CAPACITIES = st.integers(1, 1 << 20) | st.integers(1, MAX_SEGMENT_BYTES)
FIELD_NAMES = [field.name for field in fields(Layout)]


def header_of(layout: Layout) -> memoryview:
    """Return a header page that states this layout."""
    words = memoryview(bytearray(HEADER_BYTES)).cast("Q")
    layout.write(words, TOKEN)
    return words


@given(st.integers(0, 1 << 64), st.integers(0, 30).map(lambda power: 1 << power))
def test_align_up_gives_the_next_multiple(number: int, alignment: int) -> None:
    """The result is a multiple, not below the number, and less than one alignment above it."""
    aligned = align_up(number, alignment)
    assert aligned % alignment == 0
    assert 0 <= aligned - number < alignment


@given(CAPACITIES, PAGES)
@example(1, 4096)
@example(MAX_SEGMENT_BYTES, 4096)
def test_regions_follow_each_other_on_page_boundaries(capacity: int, page_bytes: int) -> None:
    """Each region begins on a page, has the room it needs, and ends before the next one begins."""
    layout = Layout.plan(capacity, page_bytes)
    regions = [
        (0, HEADER_BYTES),
        (layout.buckets, layout.n_buckets * 8),
        (layout.entries, layout.n_entries * ENTRY_BYTES),
        (layout.visited, layout.n_entries),
        (layout.marks, layout.n_entries * MARK_BYTES),
        (layout.control, layout.n_boards * CONTROL_BYTES),
        (layout.boards, layout.n_boards * BOARD_BYTES),
        (layout.outboxes, layout.n_boards * OUTBOX_BYTES),
        (layout.data, layout.data_bytes),
        (layout.segment_bytes, 0),
    ]
    for (start, size), (following, _) in pairwise(regions):
        assert start % page_bytes == 0
        assert start + size <= following
    assert layout.segment_bytes % page_bytes == 0


@given(CAPACITIES, PAGES)
def test_the_capacity_is_the_users(capacity: int, page_bytes: int) -> None:
    """An object of exactly the capacity fits, and at most a line is added to it."""
    layout = Layout.plan(capacity, page_bytes)
    assert layout.capacity == capacity
    assert 0 <= layout.data_bytes - capacity < ALIGNMENT
    assert layout.data_bytes % ALIGNMENT == 0


@given(CAPACITIES, PAGES)
def test_the_table_is_large_enough_and_bounded(capacity: int, page_bytes: int) -> None:
    """Chains stay short in a full table: buckets are a power of two, near a quarter of the entries."""
    layout = Layout.plan(capacity, page_bytes)
    assert 4096 <= layout.n_entries <= 1 << 25
    assert layout.n_buckets & (layout.n_buckets - 1) == 0
    assert layout.n_entries // 4 <= layout.n_buckets < layout.n_entries


def test_more_capacity_has_more_entries() -> None:
    """A store of 1 GiB has room for millions of objects; huge pages, which are not sparse, for fewer."""
    assert Layout.plan(1 << 30, 4096).n_entries == 1 << 22
    assert Layout.plan(1 << 30, 2 << 20).n_entries == 1 << 17


@pytest.mark.parametrize("capacity", [0, -1, -(1 << 63)])
def test_a_capacity_below_one_byte_is_refused(capacity: int) -> None:
    """A store that can hold nothing is an error that names the number."""
    with pytest.raises(ValueError, match=f"at least 1 byte, not {capacity}"):
        Layout.plan(capacity, 4096)


@pytest.mark.parametrize("page_bytes", [0, 1, 2048, 4095, 4097, 12288, -4096])
def test_what_is_no_page_size_is_refused(page_bytes: int) -> None:
    """A page is a power of two, and not below 4096 bytes."""
    with pytest.raises(ValueError, match="is not a page size"):
        Layout.plan(1, page_bytes)


def test_words_of_the_format_fit_their_places() -> None:
    """An id and its codec fill words 1 to 3, no two words of an entry coincide, and lines hold lines."""
    assert ID_FIELD.size == (EntryWord.OFFSET - EntryWord.ID) * 8
    assert ID_FIELD.size == ID_BYTES + 4
    taken = {EntryWord.ID + 1, EntryWord.ID + 2, *EntryWord}
    assert len(taken) == len(EntryWord) + 2
    assert max(taken) < ENTRY_WORDS
    assert EntryWord.NEXT < 64 // 8, "what a reader needs lies in the first cache line"
    assert max(EntryState) <= STATE_MASK == (1 << GENERATION_SHIFT) - 1
    assert BOARD_WORDS * 8 == BOARD_BYTES
    complements = {word + 16 for word in ENDS}
    assert complements.isdisjoint(HeaderWord)
    words = complements.union(HeaderWord)
    assert all(4 + len(FIELD_NAMES) <= word < HEADER_BYTES // 8 for word in words)
    words.remove(HeaderWord.WANTED)
    assert max(words) == HeaderWord.SCRATCH_BYTES, "a path follows it"
    assert HeaderWord.SCRATCH_BYTES + 1 + 108 // 8 < HeaderWord.WANTED, "no longer than a socket's"
    assert (HeaderWord.WANTED + WANTED_WORDS) * 8 <= STAGE_START
    assert WANTED_WORDS & (WANTED_WORDS - 1) == 0


@given(st.integers(0, 1 << 20))
def test_entries_lie_in_a_row(index: int) -> None:
    """Entry n begins n entries after the region, so that its words are aligned."""
    layout = Layout.plan(1, 4096)
    assert layout.entry(index) == layout.entries + index * ENTRY_BYTES
    assert layout.entry(index) % 64 == 0


@given(CAPACITIES, PAGES, st.binary(min_size=16, max_size=16))
def test_a_header_says_what_was_written(capacity: int, page_bytes: int, token: bytes) -> None:
    """Layout and token come back as they were."""
    layout = Layout.plan(capacity, page_bytes)
    words = memoryview(bytearray(HEADER_BYTES)).cast("Q")
    layout.write(words, token)
    assert Layout.read(words) == (layout, token)


def test_a_header_that_is_not_complete_is_not_recognized() -> None:
    """The magic number comes last: after a write that broke off there is none."""
    words = memoryview(bytearray(HEADER_BYTES)).cast("Q")
    too_large = replace(Layout.plan(1, 4096), data=1 << 64)
    with pytest.raises(ValueError, match="value"):
        too_large.write(words, TOKEN)
    assert words[1] == LAYOUT_VERSION
    with pytest.raises(LayoutError, match="no magic number"):
        Layout.read(words)


def test_a_page_that_is_too_short_is_no_header() -> None:
    """A file that is cut off within its header is refused before it is looked at."""
    words = header_of(Layout.plan(1, 4096))
    with pytest.raises(LayoutError, match="no magic number"):
        Layout.read(words[:-1])
    with pytest.raises(LayoutError, match="no magic number"):
        Layout.read(words[:0])


@pytest.mark.parametrize("version", [0, LAYOUT_VERSION - 1, LAYOUT_VERSION + 1, (1 << 64) - 1])
def test_another_version_is_refused_with_the_remedy(version: int) -> None:
    """Who attaches to a segment of another release is told both versions and what to do."""
    words = header_of(Layout.plan(1, 4096))
    words[1] = version
    with pytest.raises(LayoutError, match=f"version {version}, .* run the release that made it"):
        Layout.read(words)


@pytest.mark.parametrize("field", FIELD_NAMES)
@pytest.mark.parametrize("value", [0, 1, 4096 + 64, (1 << 64) - 1])
def test_a_damaged_field_is_noticed(field: str, value: int) -> None:
    """No number of the header can be changed alone, the capacity included, unless it means the same."""
    words = header_of(Layout.plan(1_000_000, 4096))
    words[4 + FIELD_NAMES.index(field)] = value
    with pytest.raises(LayoutError, match="header is damaged"):
        Layout.read(words)


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=14), st.integers(0, 14), st.booleans())
def test_garbage_is_a_layout_or_a_layout_error(
    numbers: list[int], at: int, keeps_head: bool
) -> None:
    """Whatever stands in a header, reading it raises LayoutError and nothing else."""
    words = header_of(Layout.plan(1_000_000, 4096))
    start = at + 2 if keeps_head else at
    for word, number in enumerate(numbers, start=start):
        words[word] = number
    try:
        layout, _ = Layout.read(words)
    except LayoutError:
        return
    assert layout == Layout.plan(layout.capacity, layout.page_bytes)


# -- how far regions were used -------------------------------------------------------------------


@pytest.mark.parametrize("word", ENDS)
def test_a_new_segment_was_used_nowhere(word: HeaderWord) -> None:
    """A header begins with ends that are known, and 0."""
    words = header_of(Layout.plan(1, 4096))
    assert read_end(words, word, 100) == recover_end(words, word, 100) == 0


@given(st.sampled_from(ENDS), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
@example(HeaderWord.WATERMARK, 5, 5)
@example(HeaderWord.WATERMARK, 6, 5)
@example(HeaderWord.WATERMARK, (1 << 64) - 1, (1 << 64) - 1)
def test_an_end_is_what_was_marked_or_the_limit(word: HeaderWord, end: int, limit: int) -> None:
    """An end comes back as it was; one above the limit is none."""
    words = header_of(Layout.plan(1, 4096))
    mark_end(words, word, end)
    assert read_end(words, word, limit) == recover_end(words, word, limit) == min(end, limit)
    assert all(read_end(words, other, limit) == 0 for other in ENDS if other != word)
    assert Layout.read(words) == (Layout.plan(1, 4096), TOKEN)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_a_death_between_the_words_of_an_end(before: int, after: int) -> None:
    """With one of the two words written an end is unsure; a successor takes the greater one, as nothing was used above that."""
    words, whole = header_of(Layout.plan(1, 4096)), header_of(Layout.plan(1, 4096))
    mark_end(words, HeaderWord.BOARDS_END, before)
    mark_end(whole, HeaderWord.BOARDS_END, after)
    words[HeaderWord.BOARDS_END] = whole[HeaderWord.BOARDS_END]
    assert read_end(words, HeaderWord.BOARDS_END, 5000) == (after if after == before else 5000)
    assert recover_end(words, HeaderWord.BOARDS_END, 5000) == max(before, after)


@given(st.integers(0, 1000), st.integers(0, 63), st.booleans())
def test_a_damaged_end_is_the_limit(end: int, bit: int, of_the_complement: bool) -> None:
    """Any bit of an end that is flipped makes it unsure; no successor takes less for it than it was, nor more than there can be."""
    words = header_of(Layout.plan(1, 4096))
    mark_end(words, HeaderWord.ENTRIES_END, end)
    words[HeaderWord.ENTRIES_END + 16 * of_the_complement] ^= 1 << bit
    assert read_end(words, HeaderWord.ENTRIES_END, 5000) == 5000
    assert recover_end(words, HeaderWord.ENTRIES_END, 5000) == min(max(end, end ^ 1 << bit), 5000)


@pytest.mark.parametrize("path", [b"", b"/tmp/s", 107 * b"p"])
def test_a_scratch_path_says_that_nobody_starts_the_store_again(path: bytes) -> None:
    """The path comes back, and is no part of the layout."""
    layout = Layout.plan(1, 4096)
    words = memoryview(bytearray(HEADER_BYTES)).cast("Q")
    layout.write(words, TOKEN, path)
    assert Layout.scratch(words) == path
    assert Layout.read(words) == (layout, TOKEN)


@given(st.integers(0, (1 << 64) - 1))
def test_a_damaged_scratch_length_is_harmless(length: int) -> None:
    """However long a path is said to be, no more than the header is read."""
    words = header_of(Layout.plan(1, 4096))
    words[HeaderWord.SCRATCH_BYTES] = length
    start = (HeaderWord.SCRATCH_BYTES + 1) * 8
    assert len(Layout.scratch(words)) == min(length, HEADER_BYTES - start)
