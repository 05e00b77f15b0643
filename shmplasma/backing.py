"""What is behind a segment: the file system and the memory that are to give it its pages.

Invariants
----------
* What is said to be free is the least of all that limits it: the file system, the memory, the
  control group, the pool of huge pages.
* An error about room names the limit that was met, and the remedy that fits it.
"""

from __future__ import annotations

import mmap
import os
from typing import Final, NamedTuple

from shmplasma import system
from shmplasma.errors import AttachError, CommitError
from shmplasma.layout import MAX_SEGMENT_BYTES, OUTBOX_BYTES, Layout

__all__ = [
    "Room",
    "check_room",
    "default_capacity",
    "least_room",
    "remedy",
    "segment_page_bytes",
]

_FILE_SYSTEM: Final = "the file system of the segment"
_MEMORY: Final = "the memory of this machine, or of the control group of this process,"
_HUGE_PAGES: Final = "the pool of huge pages"
_SEGMENT: Final = "a segment"

_DEFAULT_SHARE: Final = 0.3
"""Ray gives its Plasma store the same: the values that users compute need the greater part."""


class Room(NamedTuple):
    """What one of the limits of a segment leaves.

    Attributes
    ----------
    free_bytes : int
        How much it can still give.
    limit : str
        What it is.
    """

    free_bytes: int
    limit: str


def default_capacity(directory: str | None = None) -> int:
    """Return the capacity in bytes of a store whose operator names none: 30 % of what is free."""
    return max(1, int(least_room(directory).free_bytes * _DEFAULT_SHARE))


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
        # Entries, visited, marks, a board and its outbox.
        needed += 4 * layout.page_bytes + OUTBOX_BYTES
    # Beyond what a pin by offset can name there is no room, whatever the file system has.
    largest = Room(MAX_SEGMENT_BYTES - layout.segment_bytes + needed, _SEGMENT)
    room = min(least_room(directory), largest)
    free = room.free_bytes
    if free < needed:
        raise CommitError(needed, free, remedy(needed - free, directory, room), room.limit)


def segment_page_bytes(directory: str | None, *, huge_pages: bool) -> int:
    """Return the page size of a segment in this place.

    Raises
    ------
    AttachError
        Huge pages are asked for, and it is no hugetlbfs.
    """
    huge = None if directory is None else system.huge_page_bytes(directory)
    if huge_pages and huge is None:
        raise AttachError(
            "huge pages need a directory on a hugetlbfs; mount one (mount -t hugetlbfs none "
            "/mnt/hugepages) and name it with -d"
        )
    return huge or mmap.PAGESIZE


def least_room(directory: str | None) -> Room:
    """Return what the file system of a segment, and the memory behind it, can still give: the least of it."""
    place = directory or system.SHM_DIRECTORY
    if directory is None and not os.path.isdir(place):
        return Room(system.available_memory(), _MEMORY)
    status = os.statvfs(place)
    # A file system without a limit of its own has no blocks at all.
    rooms = [Room(status.f_bavail * status.f_frsize, _FILE_SYSTEM)] if status.f_blocks else []
    kind = system.file_system(place)
    if kind == "hugetlbfs":
        free = system.huge_pages(status.f_bsize).available * status.f_bsize
        rooms.append(Room(free, _HUGE_PAGES))
    elif kind == "tmpfs" or not rooms:
        rooms.append(Room(system.available_memory(), _MEMORY))
    return min(rooms)


def remedy(missing_bytes: int, directory: str | None, room: Room) -> str:
    """Return what an operator can do about bytes that are missing where there is so much room."""
    if room.limit == _SEGMENT:
        return "start the store with a smaller -m"
    if room.limit == _MEMORY:
        return (
            "free some, raise the limit of the control group (memory.max) if it is the lesser, or start the store with "
            "a smaller -m, or with -d DIRECTORY on a disk"
        )
    if directory is None:
        return (
            "start the store with a smaller -m, with -d DIRECTORY on a file system that has the "
            "room, or enlarge /dev/shm (in a container: docker run --shm-size=...)"
        )
    page = system.huge_page_bytes(directory)
    if page is None:
        return f"make room in {directory}, name another directory with -d, or a smaller -m"
    status = os.statvfs(directory)
    pool = system.huge_pages(page)
    missing = -(-missing_bytes // page)
    if status.f_blocks and status.f_bavail < pool.available:
        size = (status.f_blocks + missing) * page
        return (
            f"the mount is limited to {status.f_blocks} huge pages of {page >> 10} KiB, and {missing} "
            f"more are needed: mount -o remount,size={size} {directory}, or name a smaller -m"
        )
    wanted = pool.total + missing
    return (
        f"{missing} more huge pages of {page >> 10} KiB are needed than the {pool.available} that are "
        f"free; as root: echo {wanted} > {pool.setting} (and see by cat whether the kernel gave as many), "
        "or name a smaller -m"
    )
