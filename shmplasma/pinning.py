"""The client's side of the pins: slots that buffers hold (`shmplasma.pins` has the argument).

A `PinBoard` is one board that the store has granted; a `Pin` holds one of its slots for as long as it lives.
The slot's word is 0 until somebody writes an entry to it: the fast reader of this process, or the store, to
which the slot was lent.  When the pin dies its finalizer writes 0, puts the slot back on the free list and,
if the store has raised its WAKE word, wakes it, unless it is awake for that already (`shmplasma.releases`).

A finalizer runs anywhere, inside the collector too and in any thread.  This one stores a word and appends to
a list, which are single steps under the interpreter lock, takes no lock of its own, and writes to the
wake-up pipe without blocking: a full pipe is a wake-up that is pending.  While the process forks it is put off
(`shmplasma.inheritance`).

A pin is made before its word is written, so that an interrupt in between leaves nothing pinned; before it is made, the slot is lost.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Protocol, runtime_checkable

from shmplasma.attachment import Attachment
from shmplasma.layout import BOARD_BYTES, BOARD_WORDS, HeaderWord
from shmplasma.lock_file import LockFile
from shmplasma.nesting import NESTED, is_inside
from shmplasma.outbox import MISSED
from shmplasma.pins import FIRST_SLOT
from shmplasma.replies import ABSENT, Found

__all__ = ["BoardPool", "Lifeline", "Located", "Pin", "PinBoard", "located"]

_GROWING: Final = frozenset({"with_room"})


@runtime_checkable
class Closable(Protocol):
    """A connection of which a forked child may close its copy."""

    def abandon(self) -> None:
        """Close this process's copy, and leave the other's alone."""

    def end(self) -> None:
        """Say that nothing is left of whose connection it is."""


class Lifeline:
    """What must last as long as the last pin: the segment, the connection, the way to wake the store.

    Parameters
    ----------
    attachment : Attachment
        The segment; closed at the end.
    wake_fd : int
        The writing end of the store's wake-up pipe, not blocking; closed at the end.
    locks : LockFile or None
        By what this client locks ids.
    path : str
        The store's socket.
    name : str
        What the store calls this client.

    Attributes
    ----------
    connection : object
        Whatever closes the connection when it is collected.
    boards : list of PinBoard
        Those that are still used.
    isolate_lease : weakref.WeakMethod or None
        Cuts a forked child off from its parent's lease.
    """

    __slots__ = (
        "__weakref__",
        "_boards",
        "_pid",
        "_rest",
        "_wake_fd",
        "_woken_by",
        "attachment",
        "connection",
        "isolate_lease",
        "locks",
        "name",
        "path",
        "wake_word",
    )

    def __init__(
        self,
        attachment: Attachment,
        wake_fd: int,
        locks: LockFile | None,
        path: str,
        name: str,
    ) -> None:
        self.attachment = attachment
        self.locks = locks
        self.path = path
        self.name = name
        self.connection: object = None
        self.isolate_lease: weakref.WeakMethod[Callable[[], None]] | None = None
        self._boards: weakref.WeakSet[PinBoard] = weakref.WeakSet()
        self.wake_word = attachment.words[HeaderWord.WAKE : HeaderWord.WAKE + 1]
        self._wake_fd = wake_fd
        self._woken_by = 0
        self._pid = os.getpid()

    def wake_store(self) -> None:
        """Tell the store that something was released, if it has looked since it was last told; never blocks, never raises."""
        number = self.wake_word[0]
        if number != self._woken_by:
            # If it cannot be written, the pipe is full, so a wake-up is pending; or the store has gone.
            with suppress(OSError):
                os.write(self._wake_fd, b"r")
            self._woken_by = number

    def wake_reading_store(self) -> None:
        """Have a store that looks into outboxes from time to time do it now; never blocks, never raises."""
        with suppress(OSError):
            os.write(self._wake_fd, MISSED)

    def renew(self, wake_fd: int, locks_fd: int | None) -> None:
        """Take over what a store has given that has taken the place of a dead one; both descriptors are closed in time."""
        if self.locks is not None:
            self.locks.renew(locks_fd)
        elif locks_fd is not None:
            os.close(locks_fd)
        os.set_blocking(wake_fd, False)
        os.dup2(wake_fd, self._wake_fd, inheritable=False)  # finalizers go on using the number
        os.close(wake_fd)
        self._woken_by = 0
        self.wake_store()  # what was released meanwhile told nobody

    @property
    def boards(self) -> list[PinBoard]:
        """The boards that are still used."""
        return list(self._boards)

    def pinned_words(self) -> set[int]:
        """Return what stands in the slots of the boards."""
        return {word for board in self.boards for word in board.words[FIRST_SLOT:]}

    def add(self, board: PinBoard) -> None:
        """Take note of a board."""
        self._boards.add(board)

    def isolate(self) -> None:
        """Cut a forked child off from its parent's boards and from the store."""
        for board in self._boards:
            board.words = memoryview(bytearray(BOARD_BYTES)).cast("Q")
        self.attachment.isolate()
        if self.isolate_lease is not None and (isolate := self.isolate_lease()) is not None:
            isolate()
        if self.locks is not None:
            self.locks.close()
        fd, self._wake_fd = self._wake_fd, -1
        if fd >= 0:  # a child that has found no store forks a child of its own
            os.close(fd)
        connection = self.connection
        if isinstance(connection, Closable):
            connection.abandon()

    def reconnect(self, connection: object, wake_fd: int) -> None:
        """Go on, after `isolate`, with a connection of the child's own."""
        os.set_blocking(wake_fd, False)
        self._wake_fd = wake_fd
        self._woken_by = 0
        self._pid = os.getpid()
        self.connection = connection

    def __del__(self) -> None:
        self._rest = _Rest(self._wake_fd, self.connection, self.attachment, self._pid)


class _Rest:
    """Ends what a lifeline had, when that is freed.

    The collector finalizes all that it has found, in any order, and then frees it.  So pins, and all else that may tell the store something, may
    come after their lifeline, and none of them after this.  What they wrote when the store has heard of the end would reach another
    client, which has the boards and the outbox by then.
    """

    __slots__ = ("_attachment", "_connection", "_pid", "_wake_fd")

    def __init__(self, wake_fd: int, connection: object, attachment: Attachment, pid: int) -> None:
        self._wake_fd = wake_fd
        self._connection = connection
        self._attachment = attachment
        self._pid = pid

    def __del__(self) -> None:
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
        # In a child that was just forked it may be collected before it is isolated: there it is its parent's.
        if isinstance(self._connection, Closable) and self._pid == os.getpid():
            self._connection.end()
        self._attachment.close()


class PinBoard:
    """One board of this client.

    Parameters
    ----------
    lifeline : Lifeline
        Kept by every pin of the board.
    number : int
        Which board.

    Attributes
    ----------
    words : memoryview
        The board's native 8-byte words.
    free : list of int
        The words that are no pin's; popped from the end, low words first, so that a store which looks at
        the board finds what it seeks in few cache lines.
    """

    __slots__ = ("__weakref__", "first_slot", "free", "lifeline", "wake_word", "words")

    def __init__(self, lifeline: Lifeline, number: int) -> None:
        self.lifeline = lifeline
        self.wake_word = lifeline.wake_word
        self.words = lifeline.attachment.board(number)
        self.first_slot = number * BOARD_WORDS
        self.free = list(range(BOARD_WORDS - 1, FIRST_SLOT - 1, -1))
        lifeline.add(self)


class Pin:
    """Holds one slot of a board; who makes one sets both attributes before anything else.

    Attributes
    ----------
    board : PinBoard
        The board.
    word : int
        The slot's number on it, popped from ``board.free``.
    """

    # Without __init__, which would double the time that it takes to make one.
    __slots__ = ("board", "word")

    board: PinBoard
    word: int

    @property
    def slot(self) -> int:
        """The slot's number in the segment, by which the store knows it."""
        return self.board.first_slot + self.word

    @property
    def is_set(self) -> bool:
        """Whether the slot pins something."""
        return self.board.words[self.word] != 0

    def clear(self) -> None:
        """Let go of whatever the slot pins, and keep the slot."""
        self.board.words[self.word] = 0

    def __del__(self) -> None:
        try:
            board, word = self.board, self.word
        except AttributeError:
            return  # an interrupt came before it had a slot
        board.words[word] = 0
        board.free.append(word)
        if board.wake_word[0]:
            board.lifeline.wake_store()


Located = tuple[int, int, int, int, Pin]
"""An object that is pinned: offset, data size, metadata size (bytes), codec, pin."""


def located(found: Sequence[Found], pins: Sequence[Pin]) -> list[Located | None]:
    """Return what a get has found with the pins that it lent; None for what is not there."""
    # A pin that was not used dies with its list, which gives its slot back.
    return [
        None if where == ABSENT else (*where, pin) for where, pin in zip(found, pins, strict=True)
    ]


class BoardPool:
    """All boards of a client.

    Parameters
    ----------
    lifeline : Lifeline
        Kept by every pin.
    number : int
        The first board.
    grant : callable
        Asks the store for one more board and returns its number.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, lifeline: Lifeline, number: int, grant: Callable[[], int]) -> None:
        self._lifeline = lifeline
        self._grant = grant
        self._growing = threading.Lock()
        self._granted: list[int] = []
        self._boards = [PinBoard(lifeline, number)]

    def with_room(self) -> PinBoard:
        """Return a board with a free slot, a new one if all are full.

        Raises
        ------
        OSError
            The new one cannot be mapped.
        RuntimeError
            A call of this thread was interrupted in it.
        """
        if self._growing.locked() and is_inside(self, _GROWING):
            raise RuntimeError(NESTED)
        with self._growing:
            for board in self._boards:
                if board.free:
                    return board
            if not self._granted:  # one that could not be mapped is tried again
                self._granted.append(self._grant())
            board = PinBoard(self._lifeline, self._granted[0])
            self._boards.append(board)
            self._granted.clear()
            return board

    def take(self, count: int) -> list[Pin]:
        """Return pins of free slots, to be lent to the store."""
        pins = self.take_free(count)
        while len(pins) < count:
            self.with_room()
            pins += self.take_free(count - len(pins))
        return pins

    def take_free(self, count: int) -> list[Pin]:
        """Return so many pins, or fewer if there are not more free slots; asks the store for nothing."""
        pins: list[Pin] = []
        for board in reversed(self._boards):
            while len(pins) < count:
                try:
                    word = board.free.pop()
                except IndexError:
                    break
                pin = Pin()
                pin.board, pin.word = board, word
                pins.append(pin)
        return pins

    def take_one(self) -> Pin | None:
        """Return a pin of a free slot; None if there is none, and asks the store for nothing."""
        for board in reversed(self._boards):
            try:
                word = board.free.pop()
            except IndexError:
                continue
            pin = Pin()
            pin.board, pin.word = board, word
            return pin
        return None
