"""Pins: how a reader keeps an object in place, and how the store finds out.

Theory of operation
-------------------
A board is a page of 8-byte words in the segment.  It belongs to one client.  Word 0 is reserved for the
client's announcements; each of the others is a *slot*: 0, or entry index + 1 while a buffer over that
entry's object is alive.  A slot is named by a number that is unique in the segment: board *
`BOARD_WORDS` + word.

Who may write a slot changes by message, never by chance:

=========  ====================================================  ==============================================
slot is    writer                                                leaves this state by
=========  ====================================================  ==============================================
unused     nobody; its number lies in the client's free list     the client sends it along with a create or get
lent       the store, which may write entry index + 1 to it      the reply
held       the client: the finalizer of the buffer clears it     the finalizer, which puts it on the free list
=========  ====================================================  ==============================================

So every word has one writer at a time, a client clears only what it holds, and a buffer is released by one
8-byte store without any message.  The store reads the boards when it wants to know who holds what: a word
that is not a valid pin counts as none, which harms only the client that wrote it.

A client that leaves loses its boards: the store clears them and grants them anew.

A finalizer runs anywhere, inside the collector too and in any thread.  It stores one word and appends to a
list; both are single steps under the interpreter lock, and neither takes a lock of its own.  Where the
machine is not of total store order (not x86-64), the reads of the data that came before must not be
overtaken by that word; the take protocol's second barrier answers for this on the store's side.

Taking an object (evict, delete) is, for the store::

    state = EVICTING; barrier; scan the boards
    pinned: state as before      not pinned: unlink, free the extent, generation + 1, FREE

While every pin is written by the store itself nothing can come between scan and free; the state and the
barrier are there for readers who pin without a message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from struct import Struct
from typing import Final

from shmplasma.layout import BOARD_BYTES, BOARD_WORDS, Layout

__all__ = ["FIRST_SLOT", "Boards", "slots_of"]

FIRST_SLOT: Final = 1
"""Word 0 of a board is not a slot."""

_WORD: Final = Struct("@Q")


def slots_of(board: int) -> range:
    """Return the numbers of a board's slots.

    Examples
    --------
    >>> slots_of(1)
    range(513, 1024)
    """
    return range(board * BOARD_WORDS + FIRST_SLOT, (board + 1) * BOARD_WORDS)


class Boards:
    """The store's view of all boards: who owns which, and what they say.

    Parameters
    ----------
    layout : Layout
        Where the boards lie.
    words, raw : memoryview
        The segment as native 8-byte words and as bytes, writable.
    commit : callable
        ``commit(offset, size_bytes)``, as for `shmplasma.table.Table`.

    Notes
    -----
    Reading all boards is O(boards in use); a board takes about 6 µs.  Not thread-safe.
    """

    def __init__(
        self,
        layout: Layout,
        words: memoryview,
        raw: memoryview,
        commit: Callable[[int, int], None],
    ) -> None:
        self._words = words
        self._raw = raw
        self._commit = commit
        self._layout = layout
        self._first_word = layout.boards // 8
        self._owner: dict[int, int] = {}
        self._of_client: dict[int, list[int]] = {}
        self._free: list[int] = []
        self._used_once = 0

    def grant(self, client: int) -> int | None:
        """Give a client one more board and return its number, or None when all are in use.

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
            self._used_once += 1
        else:
            return None
        self._owner[board] = client
        self._of_client.setdefault(client, []).append(board)
        return board

    def revoke(self, client: int) -> None:
        """Clear the client's boards and take them back."""
        for board in self._of_client.pop(client, ()):
            start = self._layout.boards + board * BOARD_BYTES
            self._raw[start : start + BOARD_BYTES] = bytes(BOARD_BYTES)
            del self._owner[board]
            self._free.append(board)

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
        """Return the entries that a client pins; words which name no entry are left out."""
        held: set[int] = set()
        for board in self._of_client.get(client, ()):
            start = self._first_word + board * BOARD_WORDS
            held.update(self._words[start + FIRST_SLOT : start + BOARD_WORDS].tolist())
        held.discard(0)
        n_entries = self._layout.n_entries
        return {word - 1 for word in held if word <= n_entries}

    def pinned(self) -> set[int]:
        """Return all entries that anybody pins."""
        pinned: set[int] = set()
        for client in self._of_client:
            pinned |= self.held_by(client)
        return pinned

    def is_pinned(self, entry: int) -> bool:
        """Tell whether anybody pins the entry; cheaper than `pinned` for a single one."""
        word = _WORD.pack(entry + 1)
        for board in self._owner:
            start = self._layout.boards + board * BOARD_BYTES
            content = bytes(self._raw[start : start + BOARD_BYTES])
            at = content.find(word, FIRST_SLOT * 8)
            while at >= 0:
                if at % 8 == 0:
                    return True
                at = content.find(word, at + 1)
        return False

    def check(self) -> None:
        """Prove that each board has one owner or none, and that boards without owner are clear."""
        owned = [board for boards in self._of_client.values() for board in boards]
        assert sorted(owned) == sorted(self._owner), "a board has two owners"
        assert sorted(owned + self._free) == list(range(self._used_once)), "a board is lost"
        for board in self._free:
            start = self._first_word + board * BOARD_WORDS
            assert not any(self._words[start : start + BOARD_WORDS]), f"board {board} is not clear"
