from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shmplasma.control import Control, Owner
from shmplasma.layout import ALIGNMENT, BOARD_WORDS, CONTROL_BYTES, ControlWord, Layout
from tests.conversation import new_segment

LAYOUT = Layout.plan(65536, 4096)
START, END = LAYOUT.data, LAYOUT.data + LAYOUT.data_bytes
BOARD = 3
OWNED = (ControlWord.PID, ControlWord.START_TIME, ControlWord.FIRST_BOARD)
WORDS = st.integers(0, (1 << 64) - 1)


class Lines:
    """Control lines in a new segment, and their words."""

    def __init__(self) -> None:
        self.words, _ = new_segment(LAYOUT)
        self.control = Control(LAYOUT, self.words)

    def at(self, word: ControlWord, board: int = BOARD) -> int:
        """Return the number of a word in the segment."""
        return (LAYOUT.control + board * CONTROL_BYTES) // 8 + word

    def line(self, board: int = BOARD) -> list[int]:
        """Return a line's words."""
        at = self.at(ControlWord.EPOCH, board)
        return self.words[at : at + CONTROL_BYTES // 8].tolist()


def owned(cursor: int = 0, end: int = 0) -> Lines:
    """Return lines of which one has an owner, and perhaps a lease."""
    lines = Lines()
    lines.control.claim(BOARD, Owner(4711, 99, BOARD, 0, 0))
    if end:
        lines.control.lease(BOARD, cursor, end)
    return lines


# -- whose a board is ----------------------------------------------------------------------------


def test_a_new_board_is_nobodys() -> None:
    """Lines of zeros have no owners."""
    lines = Lines()
    assert all(lines.control.owner(board) is None for board in range(LAYOUT.n_boards))


@given(WORDS, WORDS, st.integers(0, LAYOUT.n_boards - 1), st.integers(0, LAYOUT.n_boards - 1))
def test_an_owner_comes_back(pid: int, start_time: int, board: int, first_board: int) -> None:
    """A successor reads whose a board is from its line alone, and the other lines are left alone."""
    lines = Lines()
    owner = Owner(pid, start_time, first_board, 0, 0)
    lines.control.claim(board, owner)
    successor = Control(LAYOUT, lines.words)
    assert successor.owner(board) == owner
    neighbours = {0, board - 1, board + 1, LAYOUT.n_boards - 1} - {board, -1, LAYOUT.n_boards}
    assert all(not any(lines.line(each)) for each in neighbours)
    assert lines.words[LAYOUT.boards // 8 : LAYOUT.boards // 8 + BOARD_WORDS].tolist() == (
        BOARD_WORDS * [0]
    )


def test_a_board_that_was_cleared_is_nobodys() -> None:
    """Who comes next to a board finds neither owner, lease nor anything acknowledged, but the epoch goes on."""
    lines = owned(START, START + 4096)
    lines.control.acknowledge(BOARD, 17)
    lines.control.raise_epoch(BOARD)
    lines.control.clear(BOARD)
    assert lines.control.owner(BOARD) is None
    assert lines.control.acknowledged(BOARD) == 0
    assert lines.control.epoch(BOARD) == 1
    other = Owner(5, 6, BOARD, 0, 0)
    lines.control.claim(BOARD, other)
    assert lines.control.owner(BOARD) == other
    assert lines.control.epoch(BOARD) == 1


@pytest.mark.parametrize("word", OWNED)
@given(bit=st.integers(0, 63))
def test_a_damaged_owner_is_none(word: ControlWord, bit: int) -> None:
    """Whatever bit of these words is flipped, the board is nobody's."""
    lines = owned(START, START + 4096)
    lines.words[lines.at(word)] ^= 1 << bit
    assert lines.control.owner(BOARD) is None


@given(bit=st.integers(0, 31))
def test_a_damaged_check_of_the_owner(bit: int) -> None:
    """The owner's half of the checksum counts for the owner."""
    lines = owned()
    lines.words[lines.at(ControlWord.CHECK)] ^= 1 << bit
    assert lines.control.owner(BOARD) is None


def test_a_line_that_stands_in_anothers_place() -> None:
    """A line is its own board's: copied to another one it is damage."""
    lines = owned(START, START + 4096)
    for number, word in enumerate(lines.line()):
        lines.words[lines.at(ControlWord.EPOCH, BOARD + 1) + number] = word
    assert lines.control.owner(BOARD + 1) is None


@pytest.mark.parametrize("n_written", range(6))
def test_a_death_while_a_board_is_claimed(n_written: int) -> None:
    """Until the last word is written a board is nobody's, whoever's it was before."""
    lines, whole = owned(START, START + 4096), Lines()
    lines.control.clear(BOARD)
    whole.control.claim(BOARD, Owner(5, 6, BOARD, 0, 0))
    order = [
        ControlWord.PID,
        ControlWord.START_TIME,
        ControlWord.FIRST_BOARD,
        ControlWord.LEASE_CURSOR,
        ControlWord.LEASE_END,
    ]
    for word in order[:n_written]:
        lines.words[lines.at(word)] = whole.words[whole.at(word)]
    assert lines.control.owner(BOARD) is None


@given(st.lists(WORDS, min_size=8, max_size=8))
def test_garbage_is_nobodys(line: list[int]) -> None:
    """A line of anything has no owner, but for a chance of one in 2**32."""
    lines = Lines()
    for number, word in enumerate(line):
        lines.words[lines.at(ControlWord.EPOCH) + number] = word
    assert lines.control.owner(BOARD) is None


# -- leases --------------------------------------------------------------------------------------


@given(
    st.integers(START // ALIGNMENT, END // ALIGNMENT),
    st.integers(START // ALIGNMENT, END // ALIGNMENT),
)
def test_a_lease_comes_back(one: int, other: int) -> None:
    """A successor finds cursor and end, wherever in the data region they are."""
    cursor, end = sorted((one * ALIGNMENT, other * ALIGNMENT))
    owner = owned(cursor, end).control.owner(BOARD)
    assert owner == Owner(4711, 99, BOARD, cursor, end)


def test_a_cursor_moves_without_the_check() -> None:
    """The cursor is written at each publication, alone, and the lease stays good up to its end."""
    lines = owned(START, START + 4096)
    before = lines.line()
    for cursor in range(START, START + 4096 + 1, ALIGNMENT):
        lines.control.advance(BOARD, cursor)
        assert lines.control.owner(BOARD) == Owner(4711, 99, BOARD, cursor, START + 4096)
    changed = [number for number, word in enumerate(lines.line()) if word != before[number]]
    assert changed == [ControlWord.LEASE_CURSOR]


def test_who_holds_references() -> None:
    """A successor finds that as well, whatever is written of the lease; and whoever comes next to the board begins anew."""
    lines = owned(START, START + 4096)
    lines.control.note_holder(BOARD, holds=True)
    assert lines.control.owner(BOARD) == Owner(4711, 99, BOARD, START, START + 4096, holds=True)
    lines.control.advance(BOARD, START + 64)
    assert lines.control.owner(BOARD) == Owner(
        4711, 99, BOARD, START + 64, START + 4096, holds=True
    )
    lines.control.lease(BOARD, START + 8192, START + 16384)
    owner = Owner(4711, 99, BOARD, START + 8192, START + 16384, holds=True)
    assert Control(LAYOUT, lines.words).owner(BOARD) == owner
    lines.control.note_holder(BOARD, holds=False)
    assert lines.control.owner(BOARD) == owner._replace(holds=False)
    lines.control.note_holder(BOARD, holds=True)
    lines.control.clear(BOARD)
    lines.control.claim(BOARD, Owner(5, 6, BOARD, 0, 0))
    lines.control.lease(BOARD, START, END)
    assert lines.control.owner(BOARD) == Owner(5, 6, BOARD, START, END)


def test_a_lease_ends() -> None:
    """One that is given back leaves the owner, and the next one takes its place."""
    lines = owned(START, START + 4096)
    lines.control.lease(BOARD, 0, 0)
    assert lines.control.owner(BOARD) == Owner(4711, 99, BOARD, 0, 0)
    lines.control.lease(BOARD, START + 8192, START + 16384)
    assert lines.control.owner(BOARD) == Owner(4711, 99, BOARD, START + 8192, START + 16384)


@pytest.mark.parametrize(
    ("cursor", "end"),
    [
        (START - 64, START + 4096),
        (START + 4160, START + 4096),
        (START, END + 64),
        (0, START + 4096),
        ((1 << 64) - 64, START + 4096),
    ],
)
def test_a_lease_that_cannot_be_is_none(cursor: int, end: int) -> None:
    """What lies outside of the data region, or ends before it begins, is left out; the owner stays."""
    assert owned(cursor, end).control.owner(BOARD) == Owner(4711, 99, BOARD, 0, 0)


@given(st.sampled_from([ControlWord.LEASE_END, ControlWord.CHECK]), st.integers(32, 63))
def test_a_damaged_lease_is_none(word: ControlWord, bit: int) -> None:
    """A flipped bit of the end, or of the lease's half of the checksum, costs the lease only."""
    lines = owned(START, START + 4096)
    lines.words[lines.at(word)] ^= 1 << bit
    assert lines.control.owner(BOARD) == Owner(4711, 99, BOARD, 0, 0)


@given(st.integers(0, 31))
def test_a_damaged_end_of_a_lease_is_noticed(bit: int) -> None:
    """No end passes for another one that may be one, too."""
    lines = owned(START, START + 4096)
    lines.words[lines.at(ControlWord.LEASE_END)] ^= 1 << bit
    assert lines.control.owner(BOARD) == Owner(4711, 99, BOARD, 0, 0)


@given(st.integers(0, 511), st.integers(0, 511), st.integers(0, 511), st.integers(0, 511))
def test_a_death_while_a_lease_is_written(a: int, b: int, c: int, d: int) -> None:
    """A successor sees the old lease, the new one, or none: never the cursor of one and the end of the other."""
    old, new = (
        (START + 64 * low, START + 64 * high) for low, high in map(sorted, ((a, b), (c, d)))
    )
    assume(old != new)
    journal: list[tuple[int, int]] = []

    class Words:
        """Words that note who writes what."""

        def __init__(self, words: memoryview) -> None:
            self.words = words

        def __getitem__(self, at: int) -> int:
            return self.words[at]

        def __setitem__(self, at: int, word: int) -> None:
            journal.append((at, word))
            self.words[at] = word

    lines, before = owned(*old), owned(*old)
    Control(LAYOUT, Words(lines.words)).lease(BOARD, *new)  # type: ignore[arg-type]
    seen = [before.control.owner(BOARD)]
    for at, word in journal:
        before.words[at] = word
        seen.append(before.control.owner(BOARD))
    assert before.line() == lines.line()
    assert seen[0] == Owner(4711, 99, BOARD, *old)
    assert seen[-1] == Owner(4711, 99, BOARD, *new)
    nothing = Owner(4711, 99, BOARD, 0, 0)
    assert all(owner in (seen[0], seen[-1], nothing) for owner in seen)


# -- what the client reads -----------------------------------------------------------------------


def test_an_epoch_rises() -> None:
    """Each recall raises the epoch of one board, where its client reads it, and nothing else."""
    lines = owned(START, START + 4096)
    before = lines.line()
    for epoch in range(1, 4):
        lines.control.raise_epoch(BOARD)
        assert lines.control.epoch(BOARD) == epoch == lines.words[lines.at(ControlWord.EPOCH)]
    assert lines.line()[1:] == before[1:]
    assert lines.control.epoch(BOARD + 1) == 0


def test_what_is_acknowledged_outlasts_the_store() -> None:
    """How many records were handled stands in the line, where client and successor read it."""
    lines = owned(START, START + 4096)
    lines.control.acknowledge(BOARD, 12345)
    assert lines.words[lines.at(ControlWord.ACKNOWLEDGED)] == 12345
    assert Control(LAYOUT, lines.words).acknowledged(BOARD) == 12345
    assert lines.control.owner(BOARD) == Owner(4711, 99, BOARD, START, START + 4096)
    assert lines.control.acknowledged(BOARD + 1) == 0
