from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any, cast
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmplasma.errors import CommitError
from shmplasma.layout import (
    ENTRY_BYTES,
    ENTRY_WORDS,
    MARK_BYTES,
    STATE_MASK,
    EntryState,
    EntryWord,
    HeaderWord,
    Layout,
    read_end,
)
from shmplasma.table import NO_ENTRY, Table
from tests.conversation import RecordedMemory, name, new_segment

LAYOUT = Layout.plan(65536, 4096)
ENTRIES_A_PAGE = 4096 // ENTRY_BYTES
LARGEST = (1 << 63) - 1


def colliding() -> Iterator[bytes]:
    """Yield ids that all fall into the first bucket."""
    return (name(n) for n in count() if crc32(name(n)) & (LAYOUT.n_buckets - 1) == 0)


NEIGHBOURS = list(islice(colliding(), 12))


def empty_table() -> Table:
    """Return a table in a new segment."""
    return Table(LAYOUT, *new_segment(LAYOUT), RecordedMemory().commit)


def insert(table: Table, object_id: bytes, number: int = 1) -> int:
    """Insert an object whose fields all follow from a number."""
    return table.insert(object_id, number, number + 1, number + 2, number + 3, number + 4)


def remove(table: Table, object_id: bytes) -> int:
    """Take an object out as the store does, and return the entry."""
    entry = table.find(object_id)
    table.set_state(entry, EntryState.EVICTING)
    table.unlink(entry)
    table.free(entry)
    return entry


def times(table: Table, entry: int) -> tuple[int, int]:
    """Return when an object was created, and how long after that it was sealed."""
    entries, words = table.listed(entry, entry + 1, 1)
    assert entries == [entry]
    created_ns, construct_ns = memoryview(words).cast("Q")[EntryWord.CREATED_NS :][:2]
    return created_ns, construct_ns


def test_an_empty_table_finds_nothing() -> None:
    """There is no object in a new table, and nothing to iterate over."""
    table = empty_table()
    assert table.find(name(1)) == NO_ENTRY
    assert (len(table), table.end, list(table.entries())) == (0, 0, [])
    table.check()


def test_an_entry_says_what_was_inserted() -> None:
    """All fields come back, the largest numbers included."""
    table = empty_table()
    entry = table.insert(name(1), 0xFFFF_FFFF, LARGEST, LARGEST - 1, 0, LARGEST - 2)
    assert table.find(name(1)) == entry
    assert table.object_id(entry) == name(1)
    assert table.id_and_codec(entry) == (name(1), 0xFFFF_FFFF)
    assert table.location(entry) == (LARGEST, LARGEST - 1, 0)
    assert table.size(entry) == LARGEST - 1
    assert times(table, entry) == (LARGEST - 2, 0)
    assert table.state(entry) == EntryState.CREATED
    assert len(table) == 1


def test_only_entries_with_an_object_have_sizes() -> None:
    """Whatever numbers are asked for: beyond all entries, never used, or freed."""
    table = empty_table()
    entries = [insert(table, name(n), n) for n in range(3)]
    remove(table, name(1))
    asked = [-1, *entries, 3, LAYOUT.n_entries, 1 << 62]
    assert table.sizes(asked) == {entry: table.size(entry) for entry in (entries[0], entries[2])}


def test_sealing_notes_how_long_the_object_took() -> None:
    """The state becomes SEALED under the same generation, and the time since creation is kept."""
    table = empty_table()
    entry = insert(table, name(1), 100)
    before = table.state_word(entry)
    table.seal(entry, 150)
    assert times(table, entry) == (104, 46)
    assert table.state(entry) == EntryState.SEALED
    assert table.state_word(entry) ^ before == EntryState.CREATED ^ EntryState.SEALED


def test_a_clock_that_was_set_back_makes_no_negative_duration() -> None:
    """An object that was sealed before it was created took no time."""
    table = empty_table()
    entry = insert(table, name(1), 100)
    table.seal(entry, 50)
    assert times(table, entry) == (104, 0)


@pytest.mark.parametrize("position", range(len(NEIGHBOURS)))
def test_any_object_of_a_chain_can_go(position: int) -> None:
    """The first, the last and each in the middle are unlinked without loss of another."""
    table = empty_table()
    entries = {object_id: insert(table, object_id) for object_id in NEIGHBOURS}
    remove(table, NEIGHBOURS[position])
    del entries[NEIGHBOURS[position]]
    assert table.find(NEIGHBOURS[position]) == NO_ENTRY
    assert {object_id: table.find(object_id) for object_id in entries} == entries
    table.check()


def test_an_unlinked_object_makes_way_for_another_of_its_id() -> None:
    """While an entry is unlinked but not free, its id finds the new object and not the old one."""
    table = empty_table()
    old = insert(table, name(1), 10)
    table.set_state(old, EntryState.EVICTING)
    table.unlink(old)
    new = insert(table, name(1), 20)
    assert new != old
    assert table.find(name(1)) == new
    assert table.location(old) == (11, 12, 13)
    table.free(old)
    assert table.find(name(1)) == new
    table.check()


def test_no_two_incarnations_share_a_state_word() -> None:
    """Whoever reads the same (generation, state) pair twice has seen one and the same object."""
    table = empty_table()
    seen: list[int] = []
    for _ in range(300):
        entry = insert(table, name(1))
        assert entry == 0
        seen.append(table.state_word(entry))
        table.seal(entry, 200)
        seen.append(table.state_word(entry))
        remove(table, name(1))
        seen.append(table.state_word(entry))
    assert len(set(seen)) == len(seen)


def test_iteration_yields_what_is_not_free() -> None:
    """Entries are listed by index, and freed ones are left out."""
    table = empty_table()
    for n in range(10):
        insert(table, name(n))
    freed = {remove(table, name(n)) for n in (0, 4, 9)}
    assert list(table.entries()) == [e for e in range(10) if e not in freed]


class Watched:
    """A segment's words; no entry may get an object above ENTRIES_USED, and no entry be below that has no memory."""

    def __init__(self, words: memoryview) -> None:
        self.words = words
        self.n_objects = 0

    def __getitem__(self, at: int | slice) -> Any:
        return self.words[at]

    def __setitem__(self, at: int, value: int) -> None:
        self.words[at] = value
        entry, word = divmod(at - LAYOUT.entries // 8, ENTRY_WORDS)
        if 0 <= entry < LAYOUT.n_entries and word == EntryWord.STATE and value & STATE_MASK:
            used = read_end(self.words, HeaderWord.ENTRIES_USED, LAYOUT.n_entries)
            assert entry < used <= read_end(self.words, HeaderWord.ENTRIES_END, LAYOUT.n_entries)
            self.n_objects += 1


def test_how_far_entries_are_used_is_said_before_they_are() -> None:
    """Whoever looks at all objects need not look beyond."""
    words, raw = new_segment(LAYOUT)
    watched = Watched(words)
    table = Table(LAYOUT, cast("memoryview", watched), raw, RecordedMemory().commit)
    table.prepare(20 * ENTRIES_A_PAGE)
    assert not words[HeaderWord.ENTRIES_USED]
    for n in range(LAYOUT.n_entries):
        insert(table, name(n))
    assert insert(table, name(LAYOUT.n_entries)) == NO_ENTRY
    assert watched.n_objects == LAYOUT.n_entries
    used = words[HeaderWord.ENTRIES_USED]
    for n in range(1, LAYOUT.n_entries):
        remove(table, name(n))
    assert words[HeaderWord.ENTRIES_USED] == used


def test_a_table_that_is_empty_again_begins_anew() -> None:
    """Who looks at all objects need not look where many were once; no (generation, state) comes twice."""
    words, raw = new_segment(LAYOUT)
    table = Table(LAYOUT, words, raw, RecordedMemory().commit)
    seen: set[tuple[int, int]] = set()
    for _ in range(3):
        for n in range(300):
            entry = insert(table, name(n))
            assert entry == n
            seen.add((entry, table.state_word(entry)))
        assert not table.prepare(table.free_entries + 1)
        assert 300 <= words[HeaderWord.ENTRIES_USED] < 300 + 128
        for n in range(150):
            table.remove(table.find(name(n)))
        for n in range(299, 149, -1):
            remove(table, name(n))
        table.check()
        assert read_end(words, HeaderWord.ENTRIES_USED, 1) == 0
        assert (len(table), table.end, table.free_entries) == (0, 0, LAYOUT.n_entries)
    assert len(seen) == 3 * 300


def test_memory_is_committed_a_page_of_entries_at_a_time() -> None:
    """Before an entry is first used, its page, its visited byte and its mark have memory behind them."""
    memory = RecordedMemory()
    table = Table(LAYOUT, *new_segment(LAYOUT), memory.commit)
    assert memory.commits == []
    for n in range(ENTRIES_A_PAGE):
        insert(table, name(n))
    first = [
        (LAYOUT.entries, 4096),
        (LAYOUT.visited, ENTRIES_A_PAGE),
        (LAYOUT.marks, ENTRIES_A_PAGE * MARK_BYTES),
    ]
    assert memory.commits == first
    remove(table, name(0))
    insert(table, name(0))
    assert memory.commits == first
    insert(table, name(ENTRIES_A_PAGE))
    assert memory.commits[3:] == [
        (LAYOUT.entries + 4096, 4096),
        (LAYOUT.visited + ENTRIES_A_PAGE, ENTRIES_A_PAGE),
        (LAYOUT.marks + ENTRIES_A_PAGE * MARK_BYTES, ENTRIES_A_PAGE * MARK_BYTES),
    ]


def test_the_last_commit_ends_with_the_table() -> None:
    """Where the entries are no whole number of pages nothing beyond them is committed."""
    layout = Layout.plan(8192 * 5000, 2 << 20)
    memory = RecordedMemory()
    table = Table(layout, *new_segment(layout), memory.commit)
    for n in range(layout.n_entries):
        insert(table, name(n))
    assert layout.n_entries == 5000
    assert memory.commits == [
        (layout.entries, 5000 * ENTRY_BYTES),
        (layout.visited, 5000),
        (layout.marks, 5000 * MARK_BYTES),
    ]


@pytest.mark.parametrize("refused", ["entries", "visited", "marks"])
def test_a_table_that_cannot_grow_stays_as_it_was(refused: str) -> None:
    """A commit that is refused leaves no trace, and the insertion succeeds once there is memory."""
    memory = RecordedMemory()
    table = Table(LAYOUT, *new_segment(LAYOUT), memory.commit)
    for n in range(ENTRIES_A_PAGE):
        insert(table, name(n))
    memory.refuse_from = {
        "entries": LAYOUT.entries + 4096,
        "visited": LAYOUT.visited,
        "marks": LAYOUT.marks,
    }[refused]
    with pytest.raises(CommitError):
        insert(table, name(100))
    assert table.find(name(100)) == NO_ENTRY
    assert len(table) == table.end == ENTRIES_A_PAGE
    table.check()
    memory.refuse_from = None
    assert insert(table, name(100)) == ENTRIES_A_PAGE
    table.check()


def test_a_full_table_takes_nothing_until_something_goes() -> None:
    """Without a free entry an insertion says so; the next free one is used again."""
    table = empty_table()
    for n in range(LAYOUT.n_entries):
        assert insert(table, name(n)) == n
    assert insert(table, name(LAYOUT.n_entries)) == NO_ENTRY
    table.check()
    remove(table, name(77))
    assert insert(table, name(LAYOUT.n_entries)) == 77
    assert insert(table, name(77)) == NO_ENTRY
    table.check()


STEPS = st.lists(
    st.tuples(st.sampled_from(["insert", "seal", "remove"]), st.sampled_from(NEIGHBOURS)),
    max_size=60,
)


@given(STEPS)
def test_the_table_is_a_dictionary(steps: list[tuple[str, bytes]]) -> None:
    """Any sequence of changes leaves what a dict would hold, though all ids share a bucket."""
    table = empty_table()
    model: dict[bytes, tuple[int, EntryState]] = {}
    for number, (step, object_id) in enumerate(steps):
        if step == "insert" and object_id not in model:
            insert(table, object_id, number)
            model[object_id] = number, EntryState.CREATED
        elif step == "seal" and object_id in model:
            table.seal(table.find(object_id), number)
            model[object_id] = model[object_id][0], EntryState.SEALED
        elif step == "remove" and object_id in model:
            remove(table, object_id)
            del model[object_id]
        table.check()
        assert len(table) == len(model)
        for neighbour in NEIGHBOURS:
            entry = table.find(neighbour)
            assert (entry == NO_ENTRY) == (neighbour not in model)
            if neighbour in model:
                number_then, state = model[neighbour]
                assert table.location(entry) == (number_then + 1, number_then + 2, number_then + 3)
                assert table.state(entry) == state


class WatchedWords:
    """The words of a segment; somebody looks at them after each write."""

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self.look: Callable[[], None] = lambda: None

    def __getitem__(self, at: int) -> int:
        return self._words[at]

    def __setitem__(self, at: int, word: int) -> None:
        self._words[at] = word
        self.look()


def test_a_reader_between_any_two_writes_sees_no_half_truth() -> None:
    """At each moment of a change all other objects are found, and what is sealed is whole.

    The reader goes by the order that `shmplasma.pins` gives: state word, then id, then fields.
    """
    words, raw = new_segment(LAYOUT)
    watched = WatchedWords(words)
    table = Table(LAYOUT, cast("memoryview", watched), raw, RecordedMemory().commit)
    sealed: dict[bytes, tuple[int, ...]] = {}
    changing, lawful = b"", set[tuple[int, ...] | None]()
    looks = 0

    def read(object_id: bytes) -> tuple[int, ...] | None:
        entry = words[LAYOUT.buckets // 8] - 1
        while entry >= 0:
            at = LAYOUT.entries // 8 + entry * ENTRY_WORDS
            is_sealed = words[at] & STATE_MASK == EntryState.SEALED
            start = (at + EntryWord.ID) * 8
            if raw[start : start + 20] == object_id:
                fields = tuple(words[at + EntryWord.OFFSET : at + EntryWord.NEXT])
                return fields if is_sealed else None
            entry = words[at + EntryWord.NEXT] - 1
        return None

    def look() -> None:
        nonlocal looks
        looks += 1
        assert read(changing) in lawful
        for object_id in set(NEIGHBOURS) - {changing}:
            assert read(object_id) == sealed.get(object_id)

    def add(object_id: bytes, number: int, *, published: bool) -> None:
        nonlocal changing, lawful
        changing, fields = object_id, (number + 1, number + 2, number + 3)
        if published:
            lawful = {None, fields}
            table.insert(object_id, 7, *fields, 8, EntryState.SEALED)
        else:
            lawful = {None}
            entry = insert(table, object_id, number)
            lawful = {None, fields}
            table.seal(entry, number + 9)
        sealed[object_id] = fields

    def take(object_id: bytes) -> None:
        nonlocal changing, lawful
        changing, lawful = object_id, {None, sealed.pop(object_id)}
        remove(table, object_id)

    watched.look = look
    for number, object_id in enumerate(NEIGHBOURS):
        add(object_id, number, published=number % 3 == 0)
    for first, second in zip(NEIGHBOURS[::2], NEIGHBOURS[::-2], strict=True):
        take(first)
        take(second)
        add(second, 1000, published=second > first)  # in an entry that was used before
        look()
    assert looks > 80
    table.check()


@pytest.mark.parametrize("position", range(len(NEIGHBOURS) - 1))
def test_a_reader_on_an_entry_that_goes_still_finds_the_rest(position: int) -> None:
    """The link of an entry that was unlinked and freed leads on until the entry is used again."""
    words, raw = new_segment(LAYOUT)
    table = Table(LAYOUT, words, raw, RecordedMemory().commit)
    for object_id in reversed(NEIGHBOURS):
        insert(table, object_id)  # each goes to the head of the chain
    stands_on = remove(table, NEIGHBOURS[position])
    following = words[LAYOUT.entries // 8 + stands_on * ENTRY_WORDS + EntryWord.NEXT] - 1
    assert following == table.find(NEIGHBOURS[position + 1])


def link_to_itself(_: Table, words: memoryview) -> None:
    """Make the chain of the first bucket a loop of the first entry."""
    words[LAYOUT.buckets // 8] = 1
    words[LAYOUT.entries // 8 + EntryWord.NEXT] = 1


def link_elsewhere(_: Table, words: memoryview) -> None:
    """Put the chain into the next bucket."""
    words[LAYOUT.buckets // 8 + 1] = words[LAYOUT.buckets // 8]
    words[LAYOUT.buckets // 8] = 0


def lose(table: Table, _: memoryview) -> None:
    """Free an entry without keeping it."""
    table.unlink(1)
    table.set_state(1, EntryState.FREE)


DAMAGES: dict[str, Callable[[Table, memoryview], None]] = {
    "an entry is free twice": lambda table, _: table._free.extend([2, 2]),
    "in two chains or in a loop": link_to_itself,
    "entry 0 is free": lambda table, _: table._free.append(0),
    "a wrong chain": link_elsewhere,
    "linked but free": lambda table, _: table.set_state(0, EntryState.FREE),
    "number of objects is wrong": lambda _, words: words.__setitem__(LAYOUT.buckets // 8, 0),
    "entry 1 leaks": lose,
}


@pytest.mark.parametrize("complaint", DAMAGES)
def test_the_proof_fails_for_a_damaged_table(complaint: str) -> None:
    """Each clause of `check` notices what it is there for."""
    words, raw = new_segment(LAYOUT)
    table = Table(LAYOUT, words, raw, RecordedMemory().commit)
    for object_id in NEIGHBOURS[:2]:
        insert(table, object_id)
    table.check()
    DAMAGES[complaint](table, words)
    with pytest.raises(AssertionError, match=complaint):
        table.check()


def test_no_two_objects_have_the_same_time_of_creation() -> None:
    """What is entered at one time is told apart by nanoseconds."""
    table = empty_table()
    entries = [table.insert(name(number), 0, 0, 0, 0, 5000) for number in range(3)]
    entries.append(table.insert(name(3), 0, 0, 0, 0, 6000))
    table.remove(entries.pop(0))
    entries.append(table.insert(name(0), 0, 0, 0, 0, 6000))
    assert [table.created_ns(entry) for entry in entries] == [5001, 5002, 6000, 6001]
