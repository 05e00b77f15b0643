"""What a forked child inherits: buffers that stay valid as long as it lives.

A child has its parent's mappings, hence its boards, and the buffers that the parent held.  Two things must not
happen: that the child lets go of what its parent holds, and that the parent lets go (or ends) while the child
still looks at a buffer.  So the child gets boards of its own with the same pins::

    before the fork, in the parent    connect once more, and copy all words of our boards to the boards of that
                                      connection: an *inheritance*
    after it, in the parent           close our copy of that connection
    after it, in the child            put private memory in the place of the parent's boards; connect as
                                      ourselves, copy the inheritance to the boards of that, and close it; let
                                      every pin clear its slot on the new board instead of the parent's

Why this holds
    *Nothing is unpinned in between.*  A copied word is written while the pin that it copies stands, by the same
    process; x86-64 keeps the order of its stores.  So a store which sees the parent's slot cleared sees the
    copy (`shmplasma.pins` has the argument for the first pin, and for the boards that the store then reads).
    The inheritance lasts until its connection is closed in both processes; by then the child's own boards
    have been written.

    *A parent that is killed* at any of these points closes its copy of the connection and nothing else.  A
    child that is killed closes both, and the store takes its boards back.

    *Pins of other threads* that are made after the copy and before the fork are adopted by the child: it
    copies the parent's word, passes a barrier, and looks whether that still stands.

    *A slot that is free in the child* is cleared on its boards; a copied word that names nothing harms nobody.

A process that holds nothing pays nothing; one that does pays two connections for a fork.  Without a store
nobody takes anything, and the memory of one that was ended is nobody else's for as long as it is mapped.  Only
where a store has died and may come back are the child's buffers in danger, as it would not know of them; a
warning says so.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from typing import Final

from shmplasma import system
from shmplasma.arrow_errors import NotConnectedError
from shmplasma.endpoint import may_come_back
from shmplasma.errors import ProtocolError, ShmPlasmaError
from shmplasma.exchange import Exchange
from shmplasma.handshake import greet
from shmplasma.layout import BOARD_BYTES, BOARD_WORDS, HEADER_BYTES, Layout
from shmplasma.outcomes import expect
from shmplasma.pinning import Lifeline, PinBoard
from shmplasma.pins import FIRST_SLOT
from shmplasma.replies import Number
from shmplasma.requests import Grow, Role

__all__ = ["register"]

_lifelines: Final[weakref.WeakSet[Lifeline]] = weakref.WeakSet()
_prepared: Final[dict[tuple[int, Lifeline], Inheritance]] = {}
"""By the thread that forks, as several may at a time, each into a child of its own."""


def register(lifeline: Lifeline) -> None:
    """Let forked children inherit what is pinned by the boards of a lifeline."""
    _lifelines.add(lifeline)


class Inheritance:
    """A connection whose boards have the pins of other boards.

    Parameters
    ----------
    lifeline : Lifeline
        Whose store to connect to.
    contents : list of bytes
        What to write to the boards, one each.

    Raises
    ------
    ShmPlasmaError, OSError
        There is no such connection to be had.
    """

    def __init__(self, lifeline: Lifeline, contents: list[bytes]) -> None:
        self._connection, welcome = greet(
            lifeline.path, 0, Role.CLIENT, f"{lifeline.name} (forked)"
        )
        self.wake_fd = -1
        try:
            if welcome.token != lifeline.attachment.token:
                raise NotConnectedError("another store listens there now")
            self.wake_fd = self._connection.take_descriptor()
            self.numbers = [welcome.board]
            while len(self.numbers) < len(contents):
                frame = self._connection.call(Grow.KIND, b"")
                self.numbers.append(expect(Number, frame).value)
            for number, content in zip(self.numbers, contents, strict=False):
                words = lifeline.attachment.board(number)
                words[FIRST_SLOT:] = memoryview(content).cast("Q")[FIRST_SLOT:]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close this process's copy of the connection."""
        self._connection.close()
        if self.wake_fd >= 0:
            os.close(self.wake_fd)
            self.wake_fd = -1

    def take_wake_fd(self) -> int:
        """Return the store's wake-up pipe; the caller owns it."""
        fd, self.wake_fd = self.wake_fd, -1
        return fd

    @property
    def connection(self) -> Exchange:
        """What keeps the boards; closed when it is collected."""
        return self._connection


def _before_fork() -> None:
    for lifeline in list(_lifelines):
        boards = lifeline.boards
        if not any(len(board.free) < BOARD_WORDS - FIRST_SLOT for board in boards):
            continue
        try:
            contents = [bytes(board.words) for board in boards]
            _prepared[threading.get_ident(), lifeline] = Inheritance(lifeline, contents)
        except (ShmPlasmaError, ProtocolError, OSError) as error:
            header = lifeline.attachment.words[: HEADER_BYTES // 8]
            if Layout.scratch(header) or not may_come_back(lifeline.path):
                continue
            warnings.warn(
                f"buffers that the child inherits are not pinned for it, as no store answers: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


def _after_fork_in_parent() -> None:
    own = threading.get_ident()
    for thread, lifeline in tuple(_prepared):
        if thread == own:
            _prepared.pop((thread, lifeline)).close()


def _after_fork_in_child() -> None:
    own = threading.get_ident()
    for lifeline in list(_lifelines):
        inherited = _prepared.pop((own, lifeline), None)
        before = {board: board.first_slot for board in lifeline.boards}
        lifeline.isolate()
        if inherited is not None:
            _settle(lifeline, inherited, before)
    while _prepared:  # what other threads of the parent have prepared for theirs
        _prepared.popitem()[1].close()


def _settle(lifeline: Lifeline, inherited: Inheritance, before: dict[PinBoard, int]) -> None:
    """Let the pins of a child hold by boards of its own."""
    attachment = lifeline.attachment
    boards = list(before)
    contents = [bytes(attachment.board(number)) for number in inherited.numbers]
    try:
        own = Inheritance(lifeline, contents)
    except (ShmPlasmaError, ProtocolError, OSError):
        own = inherited  # which is as good, but for a store that comes back: it holds it to be the parent's
    for board, number in zip(boards, own.numbers, strict=False):
        words = attachment.board(number)
        free = set(board.free)
        for slot in range(FIRST_SLOT, BOARD_WORDS):
            if slot in free:
                words[slot] = 0
            elif not words[slot]:
                _adopt(lifeline, words, slot, before[board] + slot)
        board.words = words
        board.first_slot = number * BOARD_WORDS
    if own is not inherited:
        # It counts no more, though the parent may be slow to close its copy.
        nothing = memoryview(bytes(BOARD_BYTES)).cast("Q")[FIRST_SLOT:]
        for number in inherited.numbers:
            attachment.board(number)[FIRST_SLOT:] = nothing
        inherited.close()
    lifeline.reconnect(own.connection, own.take_wake_fd())


def _adopt(lifeline: Lifeline, words: memoryview, slot: int, of_parent: int) -> None:
    """Pin what the parent pinned between the copy and the fork, if it still does."""
    attachment = lifeline.attachment
    at = attachment.layout.boards // 8 + of_parent
    word = attachment.words[at]
    words[slot] = word
    if word and system.register_membarrier():
        system.membarrier()
        if attachment.words[at] != word:
            words[slot] = 0


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
