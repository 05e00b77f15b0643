"""Pins: how a reader keeps an object in place without a message, and how the store takes one away.

Boards and slots
----------------
A board is a page of 8-byte words in the segment and belongs to one client.  Word 0 is the client's BUSY word
(`shmplasma.leases`); each of the others is a *slot*: 0, or entry index + 1 while a buffer over that entry's
object is alive.  A slot is named by a number that is unique in the segment: board * `BOARD_WORDS` + word.
Who may write a slot changes by agreement, never by chance:

=========  ====================================================  ==============================================
slot is    writer                                                leaves this state by
=========  ====================================================  ==============================================
free       nobody; its number lies in the client's free list     being popped from the list
held       the client: a reader pins, a finalizer clears         the finalizer, which puts it on the free list
lent       the store, which may write entry index + 1 to it      the reply to the request that named it: held
=========  ====================================================  ==============================================

Who has an object that the store has not entered yet holds it by its offset, until the buffer dies (`shmplasma.offset_pins`): its creator, and
who has it from him.  One that was hinted at it writes to the slot that he has lent, as the store does (`shmplasma.hints`).

So every word has one writer at a time, and a buffer is released by one 8-byte store.  The store reads the
boards when it wants to know who holds what; a word that names no object counts for nothing and harms only
the client that wrote it.  A client that leaves loses its boards: the store clears them and grants them anew.

Reading without a message, and taking
-------------------------------------
::

    reader (shmplasma.reader)                       store: take (shmplasma.room)
    R1  w = state[e]; not SEALED: ask the store     T1  state[e] = EVICTING
    R2  id, offset, sizes of e                      T2  membarrier
    R3  slot = e + 1                                T3  read all boards
    R4  state[e] == w?  no: slot = 0, ask the store T4a somebody pins e: state[e] = w again
    R5  the buffer is good until slot = 0           T4b nobody: state[e] = FREE, g + 1, unlink, free the extent

``state[e]`` is one word, generation << 8 | state.  x86-64 keeps the order of loads and that of stores, but a
load may overtake an earlier store to another word: R4 may run while R3 still waits in the store buffer of
its processor.

*A reader that passes R4 holds what it looked up.*  The word that R4 read is w.  If R4 read it before T1 was
visible, then the membarrier of T2, which passes a full barrier on every processor that runs a registered
process, at some point between T1 and T3, came after R4 (a load that follows this point sees EVICTING); so
R3, which precedes R4 in program order, left the store buffer at that point, and T3 sees the pin: the take
is given up.  If R4 read w after T1, then w was written again: by T4a, and the object is where it was, or not
at all, because after T4b the generation has changed and w never returns.

*What it looked up is of one incarnation.*  Fields change only while the entry is free or being created
(`shmplasma.table`).  R1 and R4 read the same w, and a (generation, state) pair returns only when a take was
given up; so no change lies between them, and what R2 read belongs to w.  Read R2 before R1, and an entry that
was freed and reused in between hands out another object's bytes under this id.

*A doomed object* is hidden from readers already, by DOOMED in place of EVICTING (`shmplasma.releases`): it is
taken without T1, so that a successor of a store that dies meanwhile still sees that it was deleted.

*A pin that fails R4 is harmless.*  It may make a take give up, or a deletion wait; its release wakes the
store like any other (see `shmplasma.releases` for the WAKE word, whose argument is the same: the releaser's
slot = 0 and its reading of WAKE against the store's new number in WAKE, membarrier, reading of the boards).

*Data.*  The creator's writes are visible before SEALED is: the number of the record that says so is stored after
them, the store reads it before it writes SEALED, and x86-64 keeps the order of stores, and that of loads.  The reader's loads of the data precede its slot = 0, as x86-64 lets no store
overtake an earlier load; so memory is reused only when it was read.

Interruptions: a signal handler or the collector may run between any two steps of a reader, and even read or
release by the same board: it uses other slots.  A pin object exists before R3, so an exception after it
clears the slot.  Only an interrupt that arrives in the finalizer itself, whose exception Python drops, leaves a
pin behind, until the client leaves.  A forked child has boards of its own (`shmplasma.inheritance`).  A client that
is killed between R3 and R4 leaves a pin that goes with its board.

Where there is no membarrier, or the machine is not x86-64, nobody reads like this: the store itself writes
the pin to a lent slot before it replies, and being one thread it takes nothing in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from struct import Struct
from typing import Final

from shmplasma.control import Control, Owner
from shmplasma.layout import (
    BOARD_BYTES,
    BOARD_WORDS,
    OUTBOX_BYTES,
    HeaderWord,
    Layout,
    mark_end,
    recover_end,
)
from shmplasma.offset_pins import AT_OFFSET, OffsetPins, offset_of

__all__ = ["FIRST_SLOT", "Boards", "slots_of", "words_on"]

FIRST_SLOT: Final = 1
"""Word 0 of a board is not a slot."""

_WORD: Final = Struct("@Q")
_EMPTY: Final = bytes(BOARD_BYTES - FIRST_SLOT * 8)
_PART_BYTES: Final = len(_EMPTY) // 7
"""Boards are looked through by parts of 73 slots: most are empty, and comparing is much faster than taking words apart."""
_EMPTY_PART: Final = bytes(_PART_BYTES)
_PART: Final = Struct(f"@{_PART_BYTES // 8}Q")


def slots_of(board: int) -> range:
    """Return the numbers of a board's slots.

    Examples
    --------
    >>> slots_of(1)
    range(513, 1024)
    """
    return range(board * BOARD_WORDS + FIRST_SLOT, (board + 1) * BOARD_WORDS)


def words_on(raw: memoryview, layout: Layout, boards: Iterable[int]) -> set[int]:
    """Return what stands in the slots of some boards, but 0.

    Parameters
    ----------
    raw : memoryview
        The segment as bytes.
    layout : Layout
        Where the boards lie.
    boards : iterable of int
        Which ones; 0.3 us for one that is empty, else some.
    """
    words = set(_list_on(raw, layout, boards))
    words.discard(0)
    return words


def _list_on(raw: memoryview, layout: Layout, boards: Iterable[int]) -> list[int]:
    """Return what stands in the slots of some boards: each word as often as it is there, and 0 now and then."""
    words: list[int] = []
    for board in boards:
        start = layout.boards + board * BOARD_BYTES
        content = bytes(raw[start + FIRST_SLOT * 8 : start + BOARD_BYTES])
        if content != _EMPTY:
            for at in range(0, len(content), _PART_BYTES):
                part = content[at : at + _PART_BYTES]
                if part != _EMPTY_PART:
                    words += _PART.unpack(part)
    return words


class Boards:
    """The store's view of all boards: who owns which, and what they say.

    Parameters
    ----------
    layout : Layout
        Where the boards lie.
    words, raw : memoryview
        The segment as native 8-byte words and as bytes, writable.
    control : Control
        The boards' control lines.
    commit : callable
        ``commit(offset, size_bytes)``, as for `shmplasma.table.Table`.

    Attributes
    ----------
    limbo : set of int
        The entries that are in no chain of the table (see `shmplasma.releases`).

    Notes
    -----
    Reading all boards is O(boards in use); one that is full takes 20 us.  Where room is looked for, one reading says who may go, and a second
    one, after the barrier of a take, who goes; what is told of holders is one reading.  Not thread-safe.
    """

    def __init__(
        self,
        layout: Layout,
        words: memoryview,
        raw: memoryview,
        control: Control,
        commit: Callable[[int, int], None],
    ) -> None:
        self._words = words
        self._raw = raw
        self._control = control
        self._commit = commit
        self._layout = layout
        self._first_word = layout.boards // 8
        self._owner: dict[int, int] = {}
        self._of_client: dict[int, list[int]] = {}
        self._free: list[int] = []
        self._used_once = 0
        self._offset_pins = OffsetPins(layout, words)
        self.limbo: set[int] = set()

    def grant(self, client: int, pid: int, start_time: int) -> int | None:
        """Give a client one more board and return its number, or None when all are in use.

        Parameters
        ----------
        client : int
            Who gets it.
        pid, start_time : int
            Its process, by which a successor of this store will know it.

        Raises
        ------
        CommitError
            There is no memory for it.
        """
        if self._free:
            board = self._free.pop()
        elif self._used_once < self._layout.n_boards:
            board = self._used_once
            self._commit(self._layout.boards + board * BOARD_BYTES, BOARD_BYTES)
            self._commit(self._layout.outboxes + board * OUTBOX_BYTES, OUTBOX_BYTES)
            self._clear(board)  # a predecessor's, of which nobody knows any more, may be damaged
            self._used_once += 1
            mark_end(self._words, HeaderWord.BOARDS_END, self._used_once)
        else:
            return None
        own = self._of_client.setdefault(client, [])
        own.append(board)
        self._owner[board] = client
        self._control.claim(board, Owner(pid, start_time, own[0], 0, 0))
        return board

    @property
    def n_free(self) -> int:
        """How many boards are nobody's."""
        return len(self._free) + self._layout.n_boards - self._used_once

    def clear(self, client: int) -> None:
        """Clear the client's pins; its boards stay its own."""
        for board in self._of_client.get(client, ()):
            self._clear_pins(board)

    def revoke(self, client: int) -> None:
        """Clear the client's boards and take them back."""
        for board in self._of_client.pop(client, ()):
            self._clear(board)
            del self._owner[board]
            self._free.append(board)
        self._lower_end()

    def _lower_end(self) -> None:
        """Have the lowest board be granted first, and clients look no further than there are any."""
        free = self._free
        free.sort(reverse=True)
        end = self._used_once
        while free and free[0] == self._used_once - 1:
            del free[0]
            self._used_once -= 1
        if self._used_once != end:
            mark_end(self._words, HeaderWord.BOARDS_END, self._used_once)

    def _clear(self, board: int) -> None:
        """Make a board nobody's: first its pins go, then the line that says whose they were."""
        self._clear_pins(board)
        start = self._layout.outboxes + board * OUTBOX_BYTES
        self._raw[start : start + OUTBOX_BYTES] = bytes(OUTBOX_BYTES)
        self._control.clear(board)

    def _clear_pins(self, board: int) -> None:
        start = self._layout.boards + board * BOARD_BYTES
        self._raw[start : start + BOARD_BYTES] = bytes(BOARD_BYTES)

    def recover(self) -> dict[int, Owner]:
        """Take over the boards of a store that has died.

        Returns
        -------
        dict
            Its clients, dead ones too, by their first board, which is their number from now on.
        """
        end = recover_end(self._words, HeaderWord.BOARDS_END, self._layout.n_boards)
        if end:
            self._commit(self._layout.boards, end * BOARD_BYTES)
            self._commit(self._layout.outboxes, end * OUTBOX_BYTES)
        self._used_once = end
        mark_end(self._words, HeaderWord.BOARDS_END, end)
        owners = [self._control.owner(board) for board in range(end)]
        clients = {
            board: owner
            for board, owner in enumerate(owners)
            if owner is not None and owner.first_board == board
        }
        for board, owner in enumerate(owners):
            if owner is not None and owner.first_board in clients:
                self._owner[board] = owner.first_board
                if owner.holds:
                    self._control.note_holder(board, holds=True)
                own = self._of_client.setdefault(owner.first_board, [])
                own.insert(0 if board == owner.first_board else len(own), board)
            else:
                self._clear(board)
                self._free.append(board)
        self._lower_end()
        return clients

    def note_holder(self, client: int, holds: bool) -> None:
        """Write down whether a client holds references, if it has boards still."""
        own = self._of_client.get(client)
        if own:
            self._control.note_holder(own[0], holds=holds)

    def owner(self, board: int) -> int | None:
        """Return the client whose board it is."""
        return self._owner.get(board)

    def may_lend(self, client: int, slots: Iterable[int]) -> bool:
        """Tell whether these are slots of the client's own boards, each named once and not in use."""
        slots = tuple(slots)
        if len(set(slots)) < len(slots):
            return False
        for slot in slots:
            board, word = divmod(slot, BOARD_WORDS)
            if self._owner.get(board) != client or word < FIRST_SLOT:
                return False
            if self._words[self._first_word + slot]:
                return False
        return True

    def owns(self, client: int, slot: int) -> bool:
        """Tell whether this is a slot of one of the client's boards."""
        return self._owner.get(slot // BOARD_WORDS) == client and slot % BOARD_WORDS >= FIRST_SLOT

    def may_lend_one(self, client: int, slot: int) -> bool:
        """Tell as much of a single slot."""
        return self.owns(client, slot) and not self._words[self._first_word + slot]

    def word(self, slot: int) -> int:
        """Return what stands in a slot."""
        return int(self._words[self._first_word + slot])

    def pin(self, slot: int, entry: int) -> None:
        """Write a pin to a slot that its client has lent."""
        self._words[self._first_word + slot] = entry + 1

    def unpin_all(self, client: int, entry: int) -> None:
        """Clear the pins of an entry whose buffer was never handed out to this client."""
        for board in self._of_client.get(client, ()):
            for slot in slots_of(board):
                if self._words[self._first_word + slot] == entry + 1:
                    self._words[self._first_word + slot] = 0

    def held_by(self, client: int) -> set[int]:
        """Return the entries that a client pins; words which name no object in the table are left out."""
        return self._on(self._of_client.get(client, ()))

    def holdings(self) -> dict[int, set[int]]:
        """Return what `held_by` says of each client that has boards."""
        return {client: self.held_by(client) for client in self._of_client}

    def _on(self, boards: Iterable[int]) -> set[int]:
        """Return the entries that are pinned on some boards."""
        words, n_entries = _list_on(self._raw, self._layout, boards), self._layout.n_entries
        found = [word - 1 for word in words if word <= n_entries]
        entries = set(found)
        entries.discard(-1)
        if len(found) < len(words):
            by_offset = {word for word in words if word >= AT_OFFSET}
            entries |= set(map(self._offset_pins.entry, by_offset))
            entries.discard(-1)
            if self.limbo:  # in which there is what is in no chain
                offsets = set(map(offset_of, by_offset))
                entries |= {
                    each for each in self.limbo if self._offset_pins.offset(each) in offsets
                }
        return entries

    def pinned(self) -> set[int]:
        """Return all entries that anybody pins."""
        return self._on(self._owner)

    def pinned_among(self, entries: Iterable[int]) -> set[int]:
        """Return those of these entries that anybody pins, in a chain of the table or not."""
        words = words_on(self._raw, self._layout, self._owner)
        offsets = {offset_of(word) for word in words if word >= AT_OFFSET}
        if not offsets:
            return {entry for entry in entries if entry + 1 in words}
        offset = self._offset_pins.offset
        return {entry for entry in entries if entry + 1 in words or offset(entry) in offsets}

    def is_pinned(self, entry: int) -> bool:
        """Tell whether anybody pins the entry; cheaper than `pinned_among` for a single one."""
        at_offset = self._offset_pins.word(entry)
        words = [_WORD.pack(word) for word in (entry + 1, at_offset) if word]
        for board in self._owner:
            start = self._layout.boards + board * BOARD_BYTES
            content = bytes(self._raw[start + FIRST_SLOT * 8 : start + BOARD_BYTES])
            if content != _EMPTY and any(_is_in(content, word) for word in words):
                return True
        return False

    def check(self) -> None:
        """Prove that each board has one owner or none, and that boards without owner are clear."""
        owned = [board for boards in self._of_client.values() for board in boards]
        assert sorted(owned) == sorted(self._owner), "a board has two owners"
        assert sorted(owned + self._free) == list(range(self._used_once)), "a board is lost"
        for board in self._free:
            start = self._first_word + board * BOARD_WORDS
            assert not any(self._words[start : start + BOARD_WORDS]), f"board {board} is not clear"


def _is_in(content: bytes, word: bytes) -> bool:
    """Tell whether this is one of the words."""
    # Nearly all of a board is zeros, which are best not looked for.
    start_of_word = word.rstrip(b"\0")
    at = content.find(start_of_word)
    while at >= 0:
        if at % 8 == 0 and content.startswith(word, at):
            return True
        at = content.find(start_of_word, at + 1)
    return False
