"""The segment as a file: made, committed and removed by the store, attached by the clients.

A segment is a POSIX shared-memory object, or a file in a directory of the operator's choice (a
tmpfs, a disk, a hugetlbfs).  What lies where in it is `shmplasma.layout`'s.

Invariants
----------
* Whatever the store writes has been committed before (`Segment.commit`), so that no write is a
  SIGBUS. Reading counts as writing here: the first look at a page of a tmpfs or hugetlbfs takes the
  page.
* `Segment.create` either returns a whole segment or leaves nothing behind.
* A client never maps beyond the end of the file, and maps nothing writable but the data region, the
  visited region and the boards that it was given.
* A mapping lives as long as any view of it: closing an end takes away no one's buffer.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import stat
from dataclasses import dataclass
from typing import Final, Literal, Self, cast

import posix_ipc

from shmplasma import system
from shmplasma.errors import AttachError, CommitError
from shmplasma.layout import (
    BOARD_BYTES,
    HEADER_BYTES,
    OUTBOX_BYTES,
    TOKEN_BYTES,
    Layout,
    align_up,
)

__all__ = [
    "SHM_DIRECTORY",
    "Attachment",
    "Segment",
    "SegmentName",
    "check_room",
    "default_capacity",
]

SHM_DIRECTORY: Final = "/dev/shm"  # noqa: S108 - only asked how full it is
"""Where Linux keeps POSIX shared memory; elsewhere it has no directory."""

# Half of the token: macOS allows 31 characters to a name.
_NAME_TOKEN_BYTES: Final = 8
_NOTE: Final = re.compile(rb"(?:posix:|file:(?:/[^\0]*)?)/shmplasma-[0-9a-f]{16}")

_DEFAULT_SHARE: Final = 0.3
"""Ray gives its Plasma store the same: the values that users compute need the greater part."""

_OUT_OF_ROOM: Final = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class SegmentName:
    """How a client of the same mount namespace finds a segment.

    Attributes
    ----------
    kind : {"posix", "file"}
        Whether `path` is a shared-memory name or a file name.
    path : str
        ``/shmplasma-<hex>``, or an absolute file name that ends like that.

    Examples
    --------
    >>> SegmentName.plan(bytes(16), "/mnt/huge")
    SegmentName(kind='file', path='/mnt/huge/shmplasma-0000000000000000')
    """

    kind: Literal["posix", "file"]
    path: str

    @classmethod
    def plan(cls, token: bytes, directory: str | None) -> SegmentName:
        """Return the name of the segment with this identity, which need not exist yet."""
        name = f"shmplasma-{token[:_NAME_TOKEN_BYTES].hex()}"
        if directory is None:
            return cls("posix", f"/{name}")
        return cls("file", os.path.join(os.path.abspath(directory), name))

    def encode(self) -> bytes:
        """Return the name as a line of text that `decode` reads."""
        return f"{self.kind}:".encode() + os.fsencode(self.path)

    @classmethod
    def decode(cls, text: bytes) -> SegmentName | None:
        """Return the name in a text, or None unless it is one that `plan` could have given.

        Examples
        --------
        >>> SegmentName.decode(b"posix:/shmplasma-0000000000000000")
        SegmentName(kind='posix', path='/shmplasma-0000000000000000')
        >>> SegmentName.decode(b"file:/etc/passwd")
        """
        if not _NOTE.fullmatch(text):
            return None
        kind, _, path = text.partition(b":")
        return cls("posix" if kind == b"posix" else "file", os.fsdecode(path))

    def remove(self) -> bool:
        """Remove the name from the system; whoever has the segment open keeps it.

        Returns
        -------
        bool
            Whether there was such a name, and it could be removed.
        """
        try:
            if self.kind == "posix":
                posix_ipc.unlink_shared_memory(self.path)
            else:
                os.unlink(self.path)
        except (OSError, posix_ipc.Error):
            return False
        return True

    def is_gone(self) -> bool:
        """Return whether there is no such name, as far as can be seen."""
        try:
            os.close(_open(self, create=False))
        except (FileNotFoundError, posix_ipc.ExistentialError):
            return True
        except (OSError, ValueError, posix_ipc.Error):
            return False
        return False


def default_capacity(directory: str | None = None) -> int:
    """Return the capacity in bytes of a store whose operator names none: 30 % of what is free."""
    return max(1, int(_free_bytes(directory) * _DEFAULT_SHARE))


def check_room(layout: Layout, directory: str | None) -> None:
    """See to it that a segment's capacity is not an empty promise.

    Parameters
    ----------
    layout : Layout
        The segment that is to be.
    directory : str or None
        Where its file is to be; None for POSIX shared memory.

    Raises
    ------
    CommitError
        The file system, the memory or the control group behind it has less room than the capacity
        and the regions beside it will take.

    Notes
    -----
    The table's entries are not counted, as they cost memory by the number of objects; but the first
    object's are.  On huge pages everything is counted, as one page holds a whole region.
    """
    needed = layout.segment_bytes
    if layout.page_bytes == mmap.PAGESIZE:
        needed -= layout.data - layout.boards + layout.control - layout.entries
        needed += 4 * layout.page_bytes
    free = _free_bytes(directory)
    if free < needed:
        raise CommitError(needed, free, _remedy(needed - free, directory))


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
            layout = Layout.plan(capacity, _page_bytes(directory, huge_pages=huge_pages))
            check_room(layout, directory)
            self = cls(name, token, layout, _open(name, create=True), directory)
        except (OSError, posix_ipc.Error) as error:
            raise _refusal("create", name, error) from error
        try:
            if scratch:
                # By a description of its own: the other one is passed to clients, and a lock with it.
                self._lock = _open(name, create=False)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._format(mode, group, os.fsencode(scratch))
        except BaseException as error:
            self.unlink()
            self.close()
            if isinstance(error, OSError):
                raise _refusal("create", name, error) from error
            raise
        return self

    @classmethod
    def recover(cls, name: SegmentName, directory: str | None) -> Segment:
        """Open the segment that a store left behind when it died.

        Parameters
        ----------
        name : SegmentName
            Its name.
        directory : str or None
            Where its file is; None for POSIX shared memory.

        Raises
        ------
        AttachError, LayoutError
            It is not there, is damaged, or is of another layout version.
        """
        try:
            fd = _open(name, create=False)
        except (OSError, ValueError, posix_ipc.Error) as error:
            raise _refusal("open", name, error) from error
        try:
            size = os.fstat(fd).st_size
            if size < HEADER_BYTES:
                raise AttachError(f"{name.path} is not a segment: it has only {size} bytes")
            raw = memoryview(_map(fd, 0, size, writable=True))
            words = raw[: size & -8].cast("Q")
            layout, token = Layout.read(words[: HEADER_BYTES // 8])
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
        self.raw = memoryview(_map(self.fd, 0, layout.segment_bytes, writable=True))
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
            The file system has not enough room.
        """
        assert 0 <= offset < offset + size <= self.layout.segment_bytes
        start = offset & -self.layout.page_bytes
        needed = align_up(offset + size, self.layout.page_bytes) - start
        try:
            system.commit(self.fd, start, needed)
        except OSError as error:
            free = _free_bytes(self._directory)
            remedy = _remedy(needed, self._directory)
            if error.errno not in _OUT_OF_ROOM:
                remedy = f"it says: {error.strerror}; see the kernel's log (dmesg)"
            raise CommitError(needed, free, remedy) from error

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

    __slots__ = ("_fd", "_own", "_visited", "_write_map", "layout", "read_map", "token", "words")

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
            fd = _open(name, create=False)
        except (OSError, ValueError, posix_ipc.Error) as error:
            raise _refusal("attach", name, error) from error
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
        return self._page_of(self.layout.boards, index, BOARD_BYTES)

    def outbox(self, index: int) -> memoryview:
        """Return the outbox that belongs to a board, writable; otherwise as `board`."""
        return self._page_of(self.layout.outboxes, index, OUTBOX_BYTES)

    def _page_of(self, region: int, index: int, size: int) -> memoryview:
        if not 0 <= index < self.layout.n_boards:
            raise IndexError(
                f"the segment has {self.layout.n_boards} boards, and no number {index}"
            )
        offset = region + index * size
        page = offset & -self.layout.page_bytes
        if page not in self._own:
            whole = self._map_writable(page, self.layout.page_bytes)
            self._own[page] = memoryview(whole)
        start = offset - page
        return self._own[page][start : start + size].cast("Q")

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
            self._write_map = self._visited = None
            self._own.clear()
            del self.read_map, self.words


def _open(name: SegmentName, *, create: bool) -> int:
    if name.kind == "posix":
        flags = posix_ipc.O_CREX if create else 0
        return cast("int", posix_ipc.SharedMemory(name.path, flags=flags, mode=0o600).fd)
    flags = os.O_CREAT | os.O_EXCL if create else 0
    return os.open(name.path, flags | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _map(fd: int, offset: int, size: int, *, writable: bool) -> mmap.mmap:
    protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    return mmap.mmap(fd, size, mmap.MAP_SHARED | system.MAP_NORESERVE, protection, offset=offset)


def _refusal(verb: str, name: SegmentName, error: Exception) -> AttachError:
    if isinstance(error, AttachError):
        return error
    return AttachError(f"cannot {verb} the segment {name.path}: {error}")


def _page_bytes(directory: str | None, *, huge_pages: bool) -> int:
    huge = None if directory is None else system.huge_page_bytes(directory)
    if huge_pages and huge is None:
        raise AttachError(
            "huge pages need a directory on a hugetlbfs; mount one (mount -t hugetlbfs none "
            "/mnt/hugepages) and name it with -d"
        )
    return huge or mmap.PAGESIZE


def _free_bytes(directory: str | None) -> int:
    """Return what the file system of a segment, and the memory behind it, can still give."""
    place = directory or SHM_DIRECTORY
    if directory is None and not os.path.isdir(place):
        return system.available_memory()
    status = os.statvfs(place)
    # A file system without a limit of its own has no blocks at all.
    limits = [status.f_bavail * status.f_frsize] if status.f_blocks else []
    kind = system.file_system(place)
    if kind == "hugetlbfs":
        limits.append(system.huge_pages(status.f_bsize).available * status.f_bsize)
    elif kind == "tmpfs" or not limits:
        limits.append(system.available_memory())
    return min(limits)


def _remedy(missing_bytes: int, directory: str | None) -> str:
    """Return what an operator can do about missing bytes."""
    if directory is None:
        return (
            "start the store with a smaller -m, with -d DIRECTORY on a file system that has the "
            "room, or enlarge /dev/shm (in a container: docker run --shm-size=...)"
        )
    page = system.huge_page_bytes(directory)
    if page is None:
        return f"make room in {directory}, name another directory with -d, or a smaller -m"
    pool = system.huge_pages(page)
    wanted = pool.total + -(-missing_bytes // page)
    return f"provide more huge pages (echo {wanted} > {pool.setting}), or name a smaller -m"
