"""The segment as its store has it: made, committed and removed.

What lies where in it is `shmplasma.layout`'s, how clients attach it `shmplasma.attachment`'s.

Invariants
----------
* Whatever the store writes has been committed before (`Segment.commit`), so that no write is a
  SIGBUS. Reading counts as writing here: the first look at a page of a tmpfs or hugetlbfs takes the
  page.
* `Segment.create` either returns a whole segment or leaves nothing behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import Final, Self

import posix_ipc

from shmplasma import system
from shmplasma.backing import check_room, least_room, remedy, segment_page_bytes
from shmplasma.errors import AttachError, CommitError
from shmplasma.layout import HEADER_BYTES, TOKEN_BYTES, Layout, align_up
from shmplasma.segment_name import SegmentName, map_segment, open_segment, refusal

__all__ = ["Segment"]

_OUT_OF_ROOM: Final = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT)


class Segment:
    """A segment as its store has it: the whole of it, readable and writable.

    Attributes
    ----------
    name : SegmentName
        Where clients find it.
    token : bytes
        Its identity: 16 random bytes, also in its header.
    layout : Layout
        What lies where.
    fd : int
        The open file, for clients that cannot see the name.
    words : memoryview
        All of it as native 8-byte words.
    raw : memoryview
        All of it as bytes.

    Notes
    -----
    A context manager: leaving it removes the name and closes the file.
    """

    __slots__ = ("_directory", "_lock", "fd", "layout", "name", "raw", "token", "words")

    def __init__(
        self, name: SegmentName, token: bytes, layout: Layout, fd: int, directory: str | None
    ) -> None:
        self.name = name
        self.token = token
        self.layout = layout
        self.fd = fd
        self.raw = self.words = memoryview(b"")
        self._directory = directory
        self._lock = -1

    @classmethod
    def create(
        cls,
        capacity: int,
        *,
        directory: str | None = None,
        huge_pages: bool = False,
        mode: int = 0o600,
        group: int | None = None,
        token: bytes | None = None,
        scratch: str = "",
    ) -> Segment:
        """Make a new segment: its file, its header, and the regions that are written at random.

        Parameters
        ----------
        capacity : int
            Bytes that users can fill, at least 1.
        directory : str, optional
            Where to make a file; POSIX shared memory if not given.
        huge_pages : bool, optional
            Insist that the directory is a hugetlbfs.  On one, huge pages are used in any case.
        mode : int, optional
            Permission bits of the file, whatever the umask.
        group : int, optional
            Group of the file; that of this process if not given.
        token : bytes, optional
            Its identity, for a caller who has to know the name beforehand; random if not given.
        scratch : str, optional
            The socket path of a store that nobody will start again; such a segment is locked as long as
            this process lives, and swept up by others after that (`shmplasma.orphans`).

        Raises
        ------
        AttachError
            The file cannot be made there.
        CommitError
            There is not enough room for the capacity.
        ValueError
            `capacity` is less than 1.
        """
        token = token or os.urandom(TOKEN_BYTES)
        name = SegmentName.plan(token, directory)
        try:
            layout = Layout.plan(capacity, segment_page_bytes(directory, huge_pages=huge_pages))
            check_room(layout, directory)
            self = cls(name, token, layout, open_segment(name, create=True), directory)
        except (OSError, posix_ipc.Error) as error:
            which = "a" if directory is None else "another"
            elsewhere = f"; name {which} directory with -d"
            raise refusal("create", name, error, elsewhere) from error
        try:
            if scratch:
                # By a description of its own: the other one is passed to clients, and a lock with it.
                self._lock = open_segment(name, create=False)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._format(mode, group, os.fsencode(scratch))
        except BaseException as error:
            self.unlink()
            self.close()
            if isinstance(error, OSError):
                raise refusal("create", name, error) from error
            raise
        return self

    @classmethod
    def recover(cls, name: SegmentName, directory: str | None) -> Segment | None:
        """Open the segment that a store left behind when it died.

        Parameters
        ----------
        name : SegmentName
            Its name.
        directory : str or None
            Where its file is; None for POSIX shared memory.

        Returns
        -------
        Segment or None
            None where it is not there any more, or was never finished: nothing was ever in it.

        Raises
        ------
        AttachError, LayoutError
            It cannot be opened, is damaged, or is of another layout version.
        CommitError
            Memory that the dead store had cannot be had any more.
        """
        try:
            fd = open_segment(name, create=False)
        except (FileNotFoundError, posix_ipc.ExistentialError):
            return None
        except (OSError, ValueError, posix_ipc.Error) as error:
            raise refusal("open", name, error) from error
        try:
            size = os.fstat(fd).st_size
            if not size:
                os.close(fd)
                return None
            if size < HEADER_BYTES:
                raise AttachError(f"the segment {name.path} is damaged: it has only {size} bytes")
            raw = memoryview(map_segment(fd, 0, size, writable=True))
            words = raw[: size & -8].cast("Q")
            if Layout.is_unfinished(words):
                os.close(fd)
                return None
            layout, token = Layout.read(words)
            if layout.segment_bytes != size or SegmentName.plan(token, directory) != name:
                raise AttachError(f"the segment {name.path} is damaged: size or identity is wrong")
        except BaseException:
            os.close(fd)
            raise
        self = cls(name, token, layout, fd, directory)
        self.raw, self.words = raw, words
        # What is there stays as it is; only what the dead store had not come to is new.
        self.commit(0, layout.entries)
        self.commit(layout.control, layout.boards - layout.control)
        return self

    def _format(self, mode: int, group: int | None, scratch: bytes) -> None:
        if group is not None:
            os.fchown(self.fd, -1, group)
        # macOS cannot change the mode of shared memory; the default needs no change there.
        if stat.S_IMODE(os.fstat(self.fd).st_mode) != mode:
            os.fchmod(self.fd, mode)
        layout = self.layout
        os.ftruncate(self.fd, layout.segment_bytes)
        self.raw = memoryview(map_segment(self.fd, 0, layout.segment_bytes, writable=True))
        self.words = self.raw.cast("Q")
        # Ids and boards fall anywhere in these; the other regions fill from their beginning.
        self.commit(0, layout.entries)
        self.commit(layout.control, layout.boards - layout.control)
        layout.write(self.words, self.token, scratch)

    def commit(self, offset: int, size: int) -> None:
        """Make sure that a range can be written (or read) without a SIGBUS.

        Parameters
        ----------
        offset, size : int
            Range in bytes, rounded out to whole pages; `size` is at least 1.  Its contents stay.

        Raises
        ------
        CommitError
            The file system, or the memory behind it, has not enough room.
        """
        assert 0 <= offset < offset + size <= self.layout.segment_bytes
        start = offset & -self.layout.page_bytes
        needed = align_up(offset + size, self.layout.page_bytes) - start
        try:
            system.commit(self.fd, start, needed)
        except OSError as error:
            room = least_room(self._directory)
            advice = remedy(needed, self._directory, room)
            if error.errno not in _OUT_OF_ROOM:
                advice = f"it says: {error.strerror}; see the kernel's log (dmesg)"
            raise CommitError(needed, room.free_bytes, advice, room.limit) from error

    def punch(self, offset: int, size: int) -> bool:
        """Give the memory behind a range back to the system; what is stored there is lost.

        Parameters
        ----------
        offset, size : int
            Range in bytes that begins with a page; the page in which it ends goes as a whole.

        Returns
        -------
        bool
            False where the file system keeps it.
        """
        assert 0 <= offset < offset + size <= self.layout.segment_bytes
        assert not offset % self.layout.page_bytes
        return system.punch(self.fd, offset, align_up(size, self.layout.page_bytes))

    def reopen(self) -> int:
        """Return another descriptor of the file, with a description of its own; the caller closes it.

        Raises
        ------
        OSError
            It cannot be opened, or somebody has removed its name, where it cannot be opened without.
        """
        fd = system.reopen(self.fd)
        try:
            return open_segment(self.name, create=False) if fd is None else fd
        except (ValueError, posix_ipc.Error) as error:
            raise refusal("reopen", self.name, error) from error

    def check_size(self) -> None:
        """See whether the file is still whole.

        Raises
        ------
        AttachError
            Somebody has truncated it.  Named files cannot be sealed against that, and whoever touches the
            missing part is killed.
        """
        size = os.fstat(self.fd).st_size
        if size != self.layout.segment_bytes:
            raise AttachError(
                f"somebody has changed the size of the segment {self.name.path} to {size} bytes; objects "
                "are lost, and the store cannot go on: find out who, and start it again"
            )

    def unlink(self) -> None:
        """Remove the name; nobody attaches by it any more, and who has attached stays attached."""
        if self.fd >= 0:
            self.name.remove()

    def close(self) -> None:
        """Close the file.  The mapping ends with the last view of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self.raw = self.words = memoryview(b"")
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.unlink()
        self.close()
