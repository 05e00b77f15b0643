"""The segment as a client has it: attached, readable as a whole, writable where it may write.

What lies where in it is `shmplasma.layout`'s.

Invariants
----------
* A client never maps beyond the end of the file, and maps nothing writable but the data region, the
  visited and marks regions, and the boards and the outbox that it was given.
* A mapping lives as long as any view of it: closing an attachment takes away no one's buffer.
"""

from __future__ import annotations

import mmap
import os

import posix_ipc

from shmplasma import system
from shmplasma.errors import AttachError, what_helps
from shmplasma.layout import (
    BOARD_BYTES,
    HEADER_BYTES,
    MARK_BYTES,
    OUTBOX_BYTES,
    Layout,
    align_up,
)
from shmplasma.segment_name import SegmentName, map_segment, open_segment, refusal

__all__ = ["Attachment", "not_mapped"]


def not_mapped(error: OSError, size_bytes: int) -> OSError:
    """Return the error that says why so many bytes of a segment cannot be mapped, and what helps."""
    remedy = what_helps(error) or "; see the kernel's log (dmesg)"
    return OSError(
        error.errno,
        f"{size_bytes} bytes of the store's segment cannot be mapped here ({error.strerror}){remedy}",
    )


class Attachment:
    """A segment as a client has it: readable as a whole, writable where the client may write.

    Use `Attachment.open` or `Attachment.from_fd`.

    Attributes
    ----------
    layout : Layout
        What lies where.
    token : bytes
        The segment's identity.
    read_map : mmap.mmap
        The whole segment, read-only.
    words : memoryview
        The same as native 8-byte words.

    Notes
    -----
    Writable mappings are made when first asked for; two threads that ask at once may make two.
    """

    __slots__ = (
        "_fd",
        "_marks",
        "_own",
        "_visited",
        "_write_map",
        "layout",
        "read_map",
        "token",
        "words",
    )

    def __init__(self, fd: int, token: bytes) -> None:
        size = os.fstat(fd).st_size
        if size < HEADER_BYTES:
            raise AttachError(f"this is not a segment: it has only {size} bytes")
        self.read_map = _map(fd, 0, size, writable=False)
        header = memoryview(self.read_map)[:HEADER_BYTES].cast("Q")
        self.layout, self.token = Layout.read(header)
        if self.token != token:
            raise AttachError("the segment of this name belongs to another store")
        if self.layout.segment_bytes != size:
            raise AttachError(
                f"the segment is damaged: its file has {size} bytes instead of "
                f"{self.layout.segment_bytes}"
            )
        self.words = memoryview(self.read_map).cast("Q")
        self._fd = fd
        self._write_map: mmap.mmap | None = None
        self._visited: memoryview | None = None
        self._marks: memoryview | None = None
        self._own: dict[int, memoryview] = {}

    @classmethod
    def open(cls, name: SegmentName, token: bytes) -> Attachment:
        """Attach the segment of this name.

        Raises
        ------
        AttachError
            There is none here, it may not be opened, or it is not the one with this token: ask the
            store for its file descriptor.
        LayoutError
            It is of another layout version.
        """
        try:
            fd = open_segment(name, create=False)
        except (OSError, ValueError, posix_ipc.Error) as error:
            raise refusal("attach", name, error) from error
        return cls.from_fd(fd, token)

    @classmethod
    def from_fd(cls, fd: int, token: bytes) -> Attachment:
        """Attach the segment in an open file, and take the descriptor over (also when this fails).

        Raises
        ------
        AttachError
            It is not the segment with this token, or is damaged.
        LayoutError
            It is of another layout version.
        """
        try:
            return cls(fd, token)
        except BaseException:
            os.close(fd)
            raise

    @property
    def write_map(self) -> mmap.mmap:
        """The data region, readable and writable; its first byte is at offset ``layout.data``."""
        if self._write_map is None:
            data = self.layout.data
            self._write_map = self._map_writable(data, self.layout.segment_bytes - data)
        return self._write_map

    @property
    def visited(self) -> memoryview:
        """The visited region, writable: a byte an entry."""
        if self._visited is None:
            start, count = self.layout.visited, self.layout.n_entries
            size = align_up(count, self.layout.page_bytes)
            self._visited = memoryview(self._map_writable(start, size))[:count]
        return self._visited

    @property
    def marks(self) -> memoryview:
        """The marks region, writable: a native 8-byte word an entry."""
        if self._marks is None:
            size = self.layout.n_entries * MARK_BYTES
            mapped = align_up(size, self.layout.page_bytes)
            whole = memoryview(self._map_writable(self.layout.marks, mapped))
            self._marks = whole[:size].cast("Q")
        return self._marks

    def board(self, index: int) -> memoryview:
        """Return a board, writable, as `layout.BOARD_WORDS` native 8-byte words.

        Parameters
        ----------
        index : int
            A board that the store has granted to this client.

        Raises
        ------
        IndexError
            The segment has no such board.

        Notes
        -----
        Maps the page that holds the board, once.  It is the board itself, but for larger pages.
        """
        return self._own_part(self.layout.boards, index, BOARD_BYTES)

    def outbox(self, index: int) -> memoryview:
        """Return the outbox that belongs to a board, writable; otherwise as `board`."""
        return self._own_part(self.layout.outboxes, index, OUTBOX_BYTES)

    def map_board(self, index: int) -> memoryview:
        """Map a board anew, until the last view of it ends; `isolate` leaves that shared.  Otherwise as `board`."""
        offset = self._offset_of(self.layout.boards, index, BOARD_BYTES)
        page, whole = self._map_around(offset, BOARD_BYTES)
        return whole[offset - page : offset - page + BOARD_BYTES].cast("Q")

    def _own_part(self, region: int, index: int, size: int) -> memoryview:
        offset = self._offset_of(region, index, size)
        page = offset & -self.layout.page_bytes
        if page not in self._own:
            page, self._own[page] = self._map_around(offset, size)
        start = offset - page
        return self._own[page][start : start + size].cast("Q")

    def _offset_of(self, region: int, index: int, size: int) -> int:
        if not 0 <= index < self.layout.n_boards:
            raise IndexError(
                f"the segment has {self.layout.n_boards} boards, and no number {index}"
            )
        return region + index * size

    def _map_around(self, offset: int, size: int) -> tuple[int, memoryview]:
        """Map the whole pages around a part; return where they begin, too."""
        page = offset & -self.layout.page_bytes
        end = align_up(offset + size, self.layout.page_bytes)
        return page, memoryview(self._map_writable(page, end - page))

    def private(self, offset: int, size_bytes: int) -> memoryview:
        """Map a part of the segment privately: what is written there stays here, and takes memory by the page.

        Notes
        -----
        Takes no descriptor, but for huge pages, which begin at addresses of their own.
        """
        if self._fd < 0:
            raise ValueError("the attachment is closed")
        start = offset & -self.layout.page_bytes
        end = align_up(offset + size_bytes, self.layout.page_bytes)
        if self.layout.page_bytes == mmap.PAGESIZE:
            whole = mmap.mmap(-1, end - start, mmap.MAP_PRIVATE)
            system.make_private(memoryview(whole), self._fd, start)
        else:
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            whole = mmap.mmap(self._fd, end - start, mmap.MAP_PRIVATE, protection, offset=start)
        return memoryview(whole)[offset - start : offset - start + size_bytes]

    def isolate(self) -> None:
        """Put private memory in the place of boards and outbox: for a forked child, whose they are not.

        Views of them stay valid, and what is written to them reaches nobody.  What is asked for
        afterwards is shared again.
        """
        for whole in self._own.values():
            system.make_private(whole)
        self._own.clear()

    def _map_writable(self, offset: int, size: int) -> mmap.mmap:
        if self._fd < 0:
            raise ValueError("the attachment is closed")
        return _map(self._fd, offset, size, writable=True)

    def close(self) -> None:
        """Close the file and let go of the mappings; each ends with the last view of it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._write_map = self._visited = self._marks = None
            self._own.clear()
            del self.read_map, self.words


def _map(fd: int, offset: int, size: int, *, writable: bool) -> mmap.mmap:
    try:
        return map_segment(fd, offset, size, writable=writable)
    except OSError as error:
        raise not_mapped(error, size) from error
