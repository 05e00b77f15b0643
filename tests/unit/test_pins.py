from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmplasma.control import Control
from shmplasma.errors import CommitError
from shmplasma.layout import (
    BOARD_BYTES,
    BOARD_WORDS,
    OUTBOX_BYTES,
    HeaderWord,
    Layout,
    read_end,
)
from shmplasma.pins import FIRST_SLOT, Boards, slots_of
from tests.conversation import RecordedMemory, new_segment

LAYOUT = Layout.plan(65536, 4096)
ALICE, BOB = 1, 2


class Pinboard:
    """Boards in a new segment, and a client's way to write to them."""

    def __init__(self) -> None:
        self.words, self.raw = new_segment(LAYOUT)
        self.memory = RecordedMemory()
        self.boards = Boards(
            LAYOUT, self.words, self.raw, Control(LAYOUT, self.words), self.memory.commit
        )

    def write(self, slot: int, word: int) -> None:
        """Write a word as a client does."""
        self.words[LAYOUT.boards // 8 + slot] = word

    def read(self, slot: int) -> int:
        """Return a word."""
        return self.words[LAYOUT.boards // 8 + slot]


def test_slots_leave_out_word_0() -> None:
    """A board has one slot less than words, and the slots of all boards are different numbers."""
    slots = [slot for board in range(5) for slot in slots_of(board)]
    assert len(set(slots)) == len(slots) == 5 * (BOARD_WORDS - 1)
    assert all(slot % BOARD_WORDS >= FIRST_SLOT for slot in slots)


def test_each_board_is_committed_before_it_is_granted() -> None:
    """The memory of a board is asked for once, when it is used first."""
    pinboard = Pinboard()
    boards = pinboard.boards
    assert [
        boards.grant(ALICE, 4711, 1),
        boards.grant(BOB, 4711, 1),
        boards.grant(ALICE, 4711, 1),
    ] == [0, 1, 2]
    commits = [
        (region + board * size, size)
        for board in range(3)
        for region, size in ((LAYOUT.boards, BOARD_BYTES), (LAYOUT.outboxes, OUTBOX_BYTES))
    ]
    assert pinboard.memory.commits == commits
    boards.revoke(BOB)
    assert boards.grant(BOB, 4711, 1) == 1
    assert pinboard.memory.commits == commits
    boards.check()


def test_a_board_without_memory_is_not_granted() -> None:
    """A refused commit raises, takes nothing, and may succeed later."""
    pinboard = Pinboard()
    pinboard.memory.refuse_from = LAYOUT.boards
    with pytest.raises(CommitError):
        pinboard.boards.grant(ALICE, 4711, 1)
    pinboard.boards.check()
    assert not pinboard.boards.may_lend(ALICE, [FIRST_SLOT])
    pinboard.memory.refuse_from = None
    assert pinboard.boards.grant(ALICE, 4711, 1) == 0


def test_clients_look_no_further_than_there_are_boards() -> None:
    """The end falls with the last boards, and the lowest that is free is granted first."""
    pinboard = Pinboard()
    boards, end = pinboard.boards, HeaderWord.BOARDS_END
    clients = range(10, 16)
    assert [boards.grant(client, 4711, 1) for client in clients] == [0, 1, 2, 3, 4, 5]
    for client, ends in ((13, 6), (11, 6), (15, 5), (14, 3)):
        boards.revoke(client)
        assert read_end(pinboard.words, end, LAYOUT.n_boards) == ends
        boards.check()
    assert [boards.grant(client, 4711, 1) for client in (11, 13)] == [1, 3]
    assert pinboard.words[end] == 4
    boards.revoke(13)
    later = Boards(
        LAYOUT,
        pinboard.words,
        pinboard.raw,
        Control(LAYOUT, pinboard.words),
        pinboard.memory.commit,
    )
    pinboard.memory.commits.clear()
    assert later.recover().keys() == {0, 1, 2}
    assert pinboard.memory.commits == [
        (LAYOUT.boards, 3 * BOARD_BYTES),
        (LAYOUT.outboxes, 3 * OUTBOX_BYTES),
    ]
    assert later.n_free == LAYOUT.n_boards - 3
    later.check()


def test_a_successor_knows_the_first_board_though_it_is_not_the_lowest() -> None:
    """By it the client is known, whatever board it was granted after that."""
    pinboard = Pinboard()
    control = Control(LAYOUT, pinboard.words)
    for client in (ALICE, BOB):
        pinboard.boards.grant(client, 4711, 1)
    pinboard.boards.revoke(ALICE)
    assert pinboard.boards.grant(BOB, 4711, 1) == 0
    later = Boards(LAYOUT, pinboard.words, pinboard.raw, control, pinboard.memory.commit)
    assert later.recover().keys() == {1}
    board = later.grant(1, 4711, 1)
    assert board is not None
    owner = control.owner(board)
    assert owner is not None
    assert owner.first_board == 1


def test_a_board_of_which_nobody_knows_is_cleared_before_it_is_granted() -> None:
    """The word that says how far boards were granted may be damaged, when a store has died."""
    pinboard = Pinboard()
    pinboard.write(slots_of(0)[0], 77)
    pinboard.raw[LAYOUT.outboxes] = 1
    assert pinboard.boards.grant(ALICE, 4711, 1) == 0
    assert not pinboard.read(slots_of(0)[0])
    assert not pinboard.raw[LAYOUT.outboxes]


def test_there_are_only_so_many_boards() -> None:
    """When all are granted there is none, until a client leaves."""
    boards = Pinboard().boards
    assert [boards.grant(client, 4711, 1) for client in range(LAYOUT.n_boards)] == list(
        range(LAYOUT.n_boards)
    )
    assert boards.grant(ALICE, 4711, 1) is None
    boards.revoke(7)
    assert boards.grant(BOB, 4711, 1) == 7
    assert boards.grant(BOB, 4711, 1) is None
    boards.check()


def test_a_client_that_leaves_loses_all_its_pins() -> None:
    """Its boards are cleared, word 0 included; those of the others stay as they are."""
    pinboard = Pinboard()
    boards = pinboard.boards
    for client in (ALICE, BOB, ALICE):
        boards.grant(client, 4711, 1)
    for board in range(3):
        pinboard.write(board * BOARD_WORDS, 77)
        for slot in slots_of(board):
            boards.pin(slot, board)
    boards.revoke(ALICE)
    assert boards.pinned() == {1}
    assert [pinboard.read(board * BOARD_WORDS) for board in range(3)] == [0, 77, 0]
    assert boards.held_by(ALICE) == set()
    boards.check()
    boards.revoke(ALICE)
    boards.check()


def test_only_ones_own_free_slots_can_be_lent() -> None:
    """Slots of others, of nobody, of no board, word 0, one named twice, and one in use are refused."""
    pinboard = Pinboard()
    boards = pinboard.boards
    own, others = boards.grant(ALICE, 4711, 1), boards.grant(BOB, 4711, 1)
    assert (own, others) == (0, 1)
    assert boards.may_lend(ALICE, [])
    assert boards.may_lend(ALICE, slots_of(0))
    assert boards.may_lend(BOB, slots_of(1))
    for wrong in ([513], [1, 513], [0], [512], [1, 1], [1, 2, 1], [1024], [2**32 - 1]):
        assert not boards.may_lend(ALICE, wrong)
    boards.pin(5, 0)
    assert not boards.may_lend(ALICE, [5])
    assert not boards.may_lend(ALICE, [4, 5])
    pinboard.write(5, 0)
    assert boards.may_lend(ALICE, [5])
    pinboard.write(6, 2**64 - 1)
    assert not boards.may_lend(ALICE, [6])
    boards.revoke(ALICE)
    assert not boards.may_lend(ALICE, [1])


def test_a_pin_counts_until_it_is_cleared() -> None:
    """What the store has pinned for a client is held until the client writes 0."""
    pinboard = Pinboard()
    boards = pinboard.boards
    boards.grant(ALICE, 4711, 1)
    boards.grant(BOB, 4711, 1)
    boards.pin(1, 0)
    boards.pin(2, 3)
    boards.pin(513, 3)
    assert (boards.held_by(ALICE), boards.held_by(BOB)) == ({0, 3}, {3})
    assert boards.pinned() == {0, 3}
    pinboard.write(2, 0)
    assert boards.held_by(ALICE) == {0}
    assert boards.is_pinned(3)
    pinboard.write(513, 0)
    assert not boards.is_pinned(3)
    assert boards.pinned() == {0}


def test_a_buffer_that_was_never_handed_out_is_unpinned() -> None:
    """All of one client's pins of the entry go; its others, and those of other clients, stay."""
    boards = Pinboard().boards
    for client in (ALICE, ALICE, BOB):
        boards.grant(client, 4711, 1)
    for slot in (1, 511, 513, 1025):
        boards.pin(slot, 9)
    boards.pin(2, 8)
    boards.unpin_all(ALICE, 9)
    assert (boards.held_by(ALICE), boards.held_by(BOB)) == ({8}, {9})
    boards.unpin_all(3, 9)
    assert boards.is_pinned(9)


@pytest.mark.parametrize(
    "word", [LAYOUT.n_entries + 1, 2**32, 2**63, 2**64 - 1, (LAYOUT.n_entries + 1) << 8]
)
def test_a_word_that_names_no_entry_is_no_pin(word: int) -> None:
    """What a client scribbles on its board harms nobody."""
    pinboard = Pinboard()
    pinboard.boards.grant(ALICE, 4711, 1)
    pinboard.write(3, word)
    assert pinboard.boards.pinned() == set()
    pinboard.write(4, LAYOUT.n_entries)
    assert pinboard.boards.pinned() == {LAYOUT.n_entries - 1}


def test_word_0_is_no_pin() -> None:
    """The announcement word pins nothing, even if it looks like a pin."""
    pinboard = Pinboard()
    pinboard.boards.grant(ALICE, 4711, 1)
    pinboard.boards.grant(BOB, 4711, 1)
    pinboard.write(0, 6)
    pinboard.write(512, 6)
    assert not pinboard.boards.is_pinned(5)
    assert pinboard.boards.pinned() == set()


# Bytes that make many places which look like a pin across two words.
PERIODIC = st.sampled_from([0x0101_0101_0101_0101, 1 << 56, 1 << 8, 0x0100_0000_0000_0001, 257])
WORDS = st.integers(1, 4096) | PERIODIC | st.integers(0, 2**64 - 1)


@given(st.dictionaries(st.integers(0, 2 * BOARD_WORDS - 1), WORDS), st.integers(0, 2**32))
def test_all_ways_to_ask_agree(scribbles: dict[int, int], seed: int) -> None:
    """For one entry, for a client's entries and for all, the answer is that of a plain loop."""
    pinboard = Pinboard()
    pinboard.boards.grant(ALICE, 4711, 1)
    pinboard.boards.grant(BOB, 4711, 1)
    for slot, word in scribbles.items():
        pinboard.write(slot, word)
    lawful = {
        slot: word - 1
        for slot, word in scribbles.items()
        if slot % BOARD_WORDS and 0 < word <= LAYOUT.n_entries
    }
    assert pinboard.boards.held_by(ALICE) == {e for slot, e in lawful.items() if slot < 512}
    assert pinboard.boards.held_by(BOB) == {e for slot, e in lawful.items() if slot >= 512}
    assert pinboard.boards.pinned() == set(lawful.values())
    assert pinboard.boards.holdings() == {c: pinboard.boards.held_by(c) for c in (ALICE, BOB)}
    others = {0, 255, 256, random.Random(seed).randrange(LAYOUT.n_entries)}
    for entry in set(lawful.values()) | others:
        assert pinboard.boards.is_pinned(entry) == (entry in lawful.values())


DAMAGES: dict[str, Callable[[Pinboard], None]] = {
    "two owners": lambda pinboard: pinboard.boards._of_client[BOB].append(0),
    "is lost": lambda pinboard: pinboard.boards._free.clear(),
    "board 1 is not clear": lambda pinboard: pinboard.write(600, 1),
}


@pytest.mark.parametrize("complaint", DAMAGES)
def test_the_proof_fails_for_damaged_boards(complaint: str) -> None:
    """Each clause of `check` notices what it is there for."""
    pinboard = Pinboard()
    for client in (ALICE, 3, BOB):
        pinboard.boards.grant(client, 4711, 1)
    pinboard.boards.revoke(3)
    pinboard.boards.check()
    DAMAGES[complaint](pinboard)
    with pytest.raises(AssertionError, match=complaint):
        pinboard.boards.check()
