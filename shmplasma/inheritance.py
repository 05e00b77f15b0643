"""What a forked child inherits: buffers that stay valid as long as it lives.

A child has its parent's mappings, hence its boards, and the buffers that the parent held.  Two things must not
happen: that the child lets go of what its parent holds, and that the parent lets go (or ends) while the child
still looks at a buffer.  So the child gets boards of its own with the same pins::

    before the fork, in the parent    connect once more, and ask for as many boards as we have: an *inheritance*;
                                      put off releases; copy all words of our boards to its boards
    after it, in the parent           release what was put off; close our copy of that connection
    after it, in the child            put private memory in the place of the parent's boards; release there what
                                      was put off; connect as ourselves, copy the inheritance to the boards of
                                      that, and close it; let every pin clear its slot on the new board instead of
                                      the parent's

Why this holds
    *Nothing is unpinned in between.*  A copied word is written while the pin that it copies stands, by the same
    process; x86-64 keeps the order of its stores.  So a store which sees the parent's slot cleared sees the
    copy (`shmplasma.pins` has the argument for the first pin, and for the boards that the store then reads).
    The inheritance lasts until its connection is closed in both processes; by then the child's own boards
    have been written.

    *A parent that is killed* at any of these points closes its copy of the connection and nothing else.  A
    child that is killed closes both, and the store takes its boards back.

    *Each board has its copy.*  Other threads may ask for boards at any time until the fork.  So an inheritance
    says which boards it has copied, in the order of its own, and the child goes by that.  What the child finds
    beyond them has come since, as has everything where the parent held nothing when it was looked at; it gets
    boards on which nothing stands.

    *Pins of other threads* that are made after the copy and before the fork are adopted by the child: where
    nothing stands in a slot that is held, it copies the parent's word, passes a barrier, and looks whether that
    still stands.  This finds nothing where the parent has let go by then, and does not look at a slot that held
    something else at the copy.  Hence the copy is the last step before the fork, when the store has been asked
    for everything, and takes each board at once: what is left are microseconds, and buffers of threads
    that the child does not have.

    *A child's finalizers* do not reach the parent's boards: other hooks, or the collector, may take buffers before
    the child has private memory there.  So from before the copy on a pin that dies is only noted.

    *A slot that is free in the child* is cleared on its boards, also when its pin has died meanwhile; a copied
    word that names nothing harms nobody.

A process that holds nothing pays nothing; one that does pays two connections for a fork.  Without a store
nobody takes anything, and the memory of one that was ended is nobody else's for as long as it is mapped.  Only
where a store has died and may come back, or has no boards left, are the child's buffers in danger, as it would
not know of them; a warning says so.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final, NamedTuple

from shmplasma import system
from shmplasma.arrow_errors import NotConnectedError, PlasmaStoreFull
from shmplasma.endpoint import may_come_back
from shmplasma.errors import ShmPlasmaError
from shmplasma.exchange import close_inherited
from shmplasma.handshake import greet
from shmplasma.layout import BOARD_BYTES, BOARD_WORDS, Layout
from shmplasma.outbox import Outbox
from shmplasma.outcomes import expect
from shmplasma.pinning import Lifeline, Pin, PinBoard
from shmplasma.pins import FIRST_SLOT
from shmplasma.posted import Gone
from shmplasma.replies import Number
from shmplasma.requests import Grow, Role

__all__ = ["register"]

_NOTHING: Final = memoryview(bytes(8)).cast("Q")

_lifelines: Final[weakref.WeakSet[Lifeline]] = weakref.WeakSet()
_prepared: Final[dict[int, tuple[int, dict[Lifeline, Inheritance]]]] = {}
"""The threads that fork, as several may at a time, each into a child of its own; a signal handler may fork in the middle of that."""


def register(lifeline: Lifeline) -> None:
    """Let forked children inherit what is pinned by the boards of a lifeline."""
    _lifelines.add(lifeline)


class Inheritance:
    """A connection with as many boards as a lifeline has, and with the pins of those.

    Parameters
    ----------
    lifeline : Lifeline
        Whose store to connect to.
    in_child : bool
        Whether this is the child, and no other process.

    Attributes
    ----------
    numbers : list of int
        Its boards.
    words : list of memoryview
        The same as native 8-byte words.
    boards : list of PinBoard
        Whose pins the first of them have, in this order.
    connection : Exchange
        What keeps the boards; closed when it is collected.

    Raises
    ------
    ShmPlasmaError, OSError
        There is no such connection to be had.
    """

    def __init__(self, lifeline: Lifeline, *, in_child: bool) -> None:
        self._outbox: Outbox | None = None
        self.connection, welcome = greet(lifeline.path, 0, Role.CLIENT, f"{lifeline.name} (forked)")
        self.wake_fd = -1
        self.boards: list[PinBoard] = []
        self.words: list[memoryview] = []
        try:
            if welcome.token != lifeline.attachment.token:
                raise NotConnectedError("another store listens there now")
            self.wake_fd = self.connection.take_descriptor()
            self.numbers = [welcome.board]
            while len(self.numbers) < len(lifeline.boards):
                frame = self.connection.call(Grow.KIND, b"")
                self.numbers.append(expect(Number, frame).value)
            self.words = [lifeline.attachment.map_board(number) for number in self.numbers]
            if in_child:
                outbox = lifeline.attachment.outbox(welcome.board)
                self._outbox = Outbox(outbox, _NOTHING, _NOTHING, _NOTHING)
        except BaseException:
            self.close()
            raise

    def copy(self, boards: list[PinBoard], contents: Iterable[memoryview]) -> None:
        """Take over the pins of boards, which have these contents, as far as there are any boards for them."""
        self.boards = boards[: len(self.numbers)]
        for words, content in zip(self.words, contents, strict=False):
            words[FIRST_SLOT:] = content[FIRST_SLOT:]  # no other thread runs meanwhile

    def close(self) -> None:
        """Close this process's copy of the connection, and let go of its boards."""
        for words in self.words:
            words.release()
        self.connection.close()
        if self.wake_fd >= 0:
            os.close(self.wake_fd)
            self.wake_fd = -1

    def take_wake_fd(self) -> int:
        """Return the store's wake-up pipe; the caller owns it."""
        fd, self.wake_fd = self.wake_fd, -1
        return fd

    def abandon(self) -> None:
        """Close a forked child's copy of the connection, and leave the parent's alone."""
        self.connection.close()

    def end(self) -> None:
        """Write the only record, when no pin is left: a store that has died cannot see the connection end."""
        if self._outbox is not None:
            self._outbox.append(Gone.KIND, b"", is_last=True)


class _Dead(NamedTuple):
    """What a pin had whose release was put off."""

    board: PinBoard
    word: int


class _Releases:
    """What pins do that die: usually it is done at once, but while a thread forks it is put off."""

    def __init__(self) -> None:
        self._at_once: Callable[[Pin | _Dead], None] = Pin.__del__  # type: ignore[assignment]  # it reads these two alone
        self._forking: list[int] = []
        self._changing = threading.RLock()
        self._late: list[_Dead] = []

    def put_off(self) -> None:
        """Note the pins that die from now on; this thread forks."""
        with self._changing:
            self._forking.append(threading.get_ident())
            self._set(lambda pin: self._note(pin.board, pin.word))

    def resume(self) -> None:
        """Release what was put off, unless another thread still forks."""
        with self._changing:
            with suppress(ValueError):  # an interrupt may have come before
                self._forking.remove(threading.get_ident())
            if not self._forking:
                self._set(self._at_once)
        self._catch_up()

    def resume_in_child(self) -> None:
        """Release what was put off; a child has none of its parent's other threads."""
        self._changing = threading.RLock()
        self._forking.clear()
        self.resume()

    def _set(self, finalizer: Callable[[Pin], None]) -> None:
        # A test in the finalizer would cost each release some 20 ns.
        Pin.__del__ = finalizer  # type: ignore[method-assign]  # it is what is to be changed

    def _note(self, board: PinBoard, word: int) -> None:
        self._late.append(_Dead(board, word))
        self._catch_up()  # it may have been called just before the fork ended

    def _catch_up(self) -> None:
        while self._late and not self._forking:
            with suppress(IndexError):  # another thread may be faster
                # No pin is made to die: as long as the finalizer is not put back, that would be noted, and end here again.
                self._at_once(self._late.pop())


_releases: Final = _Releases()


def _before_fork() -> None:
    prepared: dict[Lifeline, Inheritance] = {}
    _prepared[id(prepared)] = threading.get_ident(), prepared
    failures: list[tuple[Lifeline, Exception]] = []
    for lifeline in list(_lifelines):
        if any(map(_holds, lifeline.boards)):
            try:
                prepared[lifeline] = Inheritance(lifeline, in_child=False)
            except (ShmPlasmaError, OSError) as error:
                failures.append((lifeline, error))
    try:
        _warn(failures)
    finally:
        _releases.put_off()
        for lifeline, inheritance in prepared.items():
            boards = lifeline.boards
            inheritance.copy(boards, [board.words for board in boards])


def _after_fork_in_parent() -> None:
    _releases.resume()
    for inheritance in _take_prepared().values():
        inheritance.close()


def _take_prepared() -> dict[Lifeline, Inheritance]:
    """Return what this thread has prepared for the fork that just was."""
    own = threading.get_ident()
    for thread, prepared in reversed(list(_prepared.values())):
        if thread == own:
            del _prepared[id(prepared)]
            return prepared
    return {}  # an interrupt came before


def _after_fork_in_child() -> None:
    failures: list[tuple[Lifeline, Exception]] = []
    lifelines = list(_lifelines)
    for lifeline in lifelines:
        lifeline.isolate()
    prepared = _take_prepared()
    close_inherited(each.connection for each in prepared.values())
    _releases.resume_in_child()
    for lifeline in lifelines:
        inherited = prepared.pop(lifeline, None)
        if inherited is not None or any(map(_holds, lifeline.boards)):
            error = _settle(lifeline, inherited)
            if error is not None:
                failures.append((lifeline, error))
    # What other threads of the parent have prepared for theirs, or this one when a signal handler forked.
    for each in (prepared, *(others for _, others in _prepared.values())):
        for inheritance in each.values():
            inheritance.close()
    _prepared.clear()
    _warn(failures)


def _holds(board: PinBoard) -> bool:
    return len(board.free) < BOARD_WORDS - FIRST_SLOT


def _warn(failures: list[tuple[Lifeline, Exception]]) -> None:
    for lifeline, error in failures:
        is_there = isinstance(error, PlasmaStoreFull)  # but has no boards
        may_be_again = not Layout.scratch(lifeline.attachment.words)
        if is_there or (may_be_again and may_come_back(lifeline.path)):
            warnings.warn(
                f"buffers that the child inherits are not pinned for it: {error}",
                RuntimeWarning,
                stacklevel=3,
            )


def _settle(lifeline: Lifeline, inherited: Inheritance | None) -> Exception | None:
    """Let the pins of a child hold by boards of its own; return what prevents it, if some have none."""
    copied = [] if inherited is None else inherited.boards
    boards = copied + [board for board in lifeline.boards if board not in copied]
    failure: Exception | None = None
    try:
        own = Inheritance(lifeline, in_child=True)
    except (ShmPlasmaError, OSError) as error:
        if inherited is None:
            return error
        failure = error
        own = inherited  # which is as good, but for a store that comes back: it holds it to be the parent's
    else:
        if inherited is not None:
            own.copy(boards, inherited.words)
    for board, number, words in zip(boards, own.numbers, own.words, strict=False):
        _move(board, number, words)
    if inherited is not None and own is not inherited:
        # It counts no more, though the parent may be slow to close its copy.
        nothing = memoryview(bytes(BOARD_BYTES)).cast("Q")[FIRST_SLOT:]
        for words in inherited.words:
            words[FIRST_SLOT:] = nothing
        inherited.close()
    own.boards = []  # they keep the lifeline, which keeps this
    lifeline.reconnect(own, own.take_wake_fd())
    return failure if any(map(_holds, boards[len(own.numbers) :])) else None


def _move(board: PinBoard, number: int, words: memoryview) -> None:
    """Let the pins of a board hold by another one, which has their words as far as they were copied."""
    of_parent = board.first_slot
    board.words, board.first_slot = words, number * BOARD_WORDS
    free = set(board.free)
    for slot in range(FIRST_SLOT, BOARD_WORDS):
        if slot not in free and not words[slot]:
            _adopt(board.lifeline, words, slot, of_parent + slot)
    for slot in board.free:  # also what the collector has freed meanwhile
        words[slot] = 0


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
