"""Where everything lies in the segment: offsets, sizes and word numbers, and nothing that acts on them.

The segment is divided into regions.  Each begins on a boundary of the page size in use, so that each
can be mapped with a protection of its own::

    header | buckets | entries | visited | marks | control | boards | outboxes | data

========  ==============  ==============================  =============================================
region    written by      clients map it                  holds
========  ==============  ==============================  =============================================
header    store           read-only                       what this module's `Layout` says, the token
buckets   store           read-only                       heads of the hash chains: entry index + 1
entries   store           read-only                       the object table, `ENTRY_BYTES` an entry
visited   clients, store  read-write                      a byte an entry: "read lately", a hint
marks     clients, store  read-write                      8 bytes an entry: which object is deleted (`shmplasma.removal`)
control   store           read-only                       `CONTROL_BYTES` a board: words to its client
boards    one client each its own boards read-write       8-byte words: BUSY, then pins (`shmplasma.pins`)
outboxes  one client each its own one read-write          what it has told the store one-way
data      the creator     writers rw, readers ro          data, then metadata, 64-byte aligned
========  ==============  ==============================  =============================================

Invariants
----------
* A word that one process writes while another reads is 8 bytes, 8-byte aligned, in native byte order,
  and written by a single store instruction (``memoryview.cast("Q")``).
* All offsets are counted from the start of the segment.
* The capacity is the user's: table, boards and header are not taken out of it.  The data region is the
  capacity rounded up to `ALIGNMENT`, so that one object of exactly the capacity fits.
* The file is sparse: a region costs memory only where it has been committed.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from struct import Struct
from typing import Final

from shmplasma.errors import LayoutError

__all__ = [
    "ALIGNMENT",
    "BOARD_BYTES",
    "BOARD_WORDS",
    "CONTROL_BYTES",
    "ENTRY_BYTES",
    "ENTRY_WORDS",
    "GENERATION_SHIFT",
    "GRANULE_BYTES",
    "HEADER_BYTES",
    "ID_BYTES",
    "ID_FIELD",
    "LAYOUT_VERSION",
    "MARK_BYTES",
    "MAX_SEGMENT_BYTES",
    "OUTBOX_BYTES",
    "REFERENCED",
    "STAGE_BYTES",
    "STAGE_START",
    "STATE_MASK",
    "TOKEN_BYTES",
    "WANTED_WORDS",
    "ControlWord",
    "EntryState",
    "EntryWord",
    "HeaderWord",
    "Layout",
    "align_up",
    "alignment_of",
    "mark_end",
    "read_end",
    "recover_end",
]

LAYOUT_VERSION: Final = 13
MAGIC: Final = int.from_bytes(b"SHMPLASM", "little")
TOKEN_BYTES: Final = 16

ID_BYTES: Final = 20
"""Length of an object id, as in Plasma."""

ALIGNMENT: Final = 64
"""Objects begin on a cache line, which is also what Arrow recommends and NumPy's SIMD loops like."""

_LARGE_BYTES: Final = 16 << 20
_LARGE_ALIGNMENT: Final = 4096
"""Large data begins on a page, as sources mostly do but for the few bytes that an allocator puts before them.  Where the target
lies up to 512 bytes behind its source, pages apart, glibc's way past the caches is the slower one: 6.2 GB/s instead of 15.5
(512 MiB, two threads, AMD EPYC)."""

MAX_SEGMENT_BYTES: Final = 1 << 46
"""64 TiB: what a pin by offset can tell (`shmplasma.offset_pins`)."""
HEADER_BYTES: Final = 4096
WANTED_WORDS: Final = 128
"""So many gets can be hinted at; a power of two."""
ENTRY_BYTES: Final = 128
"""Two cache lines: what a reader needs lies in the first, the rest of the record in the second."""
ENTRY_WORDS: Final = ENTRY_BYTES // 8
MARK_BYTES: Final = 8
"""A state word (see `EntryWord`): that of the object in the entry which is deleted, or of one that was there before."""
BOARD_BYTES: Final = 4096
"""The unit in which pins are granted: the smallest that a mapping of its own can have."""
BOARD_WORDS: Final = BOARD_BYTES // 8
OUTBOX_BYTES: Final = 16384
"""One for each board, of which a client uses that of its first one (see `shmplasma.outbox`).  200 small objects put in a row
take 7 us each; with half as much, 12 us and more, as the ring fills.  Twice as much gains nothing."""
GRANULE_BYTES: Final = 256 << 10
"""The least that is committed or given back of the data region, where pages are not larger: small beside what is worth
a system call, and large enough that the maps of 100 GB take 1.2 MB."""
CONTROL_BYTES: Final = 64
"""A cache line for each board, so that words to different clients do not share one."""

REFERENCED: Final = 1 << 31
"""The bit of an object's codec by which the object belongs to references (see `shmplasma.references`)."""
STAGE_START: Final = 2048
"""Where the header has room for a piece of an object that is being moved by less than its length."""
STAGE_BYTES: Final = HEADER_BYTES - STAGE_START

GENERATION_SHIFT: Final = 8
STATE_MASK: Final = (1 << GENERATION_SHIFT) - 1

# One entry for each so many bytes of capacity.  The table is sparse, so a generous number costs address
# space and no memory; huge pages are not sparse in so fine a grain.
_BYTES_AN_ENTRY: Final = 256
_BYTES_AN_ENTRY_HUGE: Final = 8192
_MIN_ENTRIES: Final = 4096
_MAX_ENTRIES: Final = 1 << 25
# A bucket costs memory from the start (ids fall anywhere), hence fewer of them than entries: chains reach
# this length only in a table that is full.
_ENTRIES_A_BUCKET: Final = 4
_BOARDS: Final = 4096
_BOARDS_HUGE: Final = 1024


class HeaderWord(IntEnum):
    """Numbers of the header's words that change while the store lives; `Layout` owns the others."""

    WAKE = 32
    """Not zero while somebody waits for a release: who clears a pin then wakes the store, once for each number."""
    ENTRIES_END = 33
    """Above all entries that have memory; for a store that recovers the segment (see `recover_end`)."""
    BOARDS_END = 34
    """Above all boards that are granted; clients and successors look no further."""
    WATERMARK = 35
    """Bytes of the data region beyond which there was never any memory (see `shmplasma.commitment`)."""
    POLLED = 36
    """The store's INCARNATION while it reads the outboxes unasked, else 0 (see `shmplasma.outbox`)."""
    TRIMS = 37
    """How often memory was given back; a client that finds another number maps its pages anew."""
    INCARNATION = 38
    """How many stores this segment has had before."""
    ENTRIES_USED = 39
    """Above all entries with objects, and not above many more; for who looks at all of them (`shmplasma.census`)."""
    MOVE_ENTRY = 40
    """Entry + 1 of the object that is being moved, or 0; this and the next words are the journal of `shmplasma.moves`."""
    MOVE_SOURCE = 41
    MOVE_TARGET = 42
    MOVE_DONE = 43
    """How far it has got, with a checksum of its own."""
    MOVE_CHECK = 44
    """Checksum of words 40 to 42."""
    EXTERNAL = 45
    """Stands for the external store, 0 for none; for a store that recovers the segment (`shmplasma.whereabouts`)."""
    INSERTIONS = 56
    """Twice how many objects were ever inserted, and one more while chains are written anew; on a cache line of its own, as
    it changes often (see `shmplasma.claims`)."""
    SCRATCH_BYTES = 64
    """Length of the socket path, in the bytes that follow, of a store that nobody will start again; else 0."""
    WANTED = 128
    """This and the next words say which gets wait for what (see `shmplasma.hints`)."""


class EntryState(IntEnum):
    """State of an entry: the low byte of its state word, under the generation."""

    FREE = 0
    CREATED = 1
    SEALED = 2
    EVICTING = 3
    DOOMED = 4
    """Sealed, and deleted while it was pinned: to be had from the store only, and gone at the last release."""
    MOVING = 5
    """Sealed, and on its way to another extent: to be had from the store only, when it has arrived."""
    SPILLED = 6
    """Sealed, and in the external store alone: to be had from the store, which brings it back first."""


class EntryWord(IntEnum):
    """Numbers of an entry's words."""

    STATE = 0
    """``generation << 8 | EntryState``: read first and again last by a reader (see `shmplasma.pins`)."""
    ID = 1
    """Words 1, 2 and the low half of 3: the object id's 20 bytes; the high half of 3 is the codec."""
    OFFSET = 4
    DATA_SIZE = 5
    METADATA_SIZE = 6
    NEXT = 7
    """The next entry of the chain, index + 1, or 0."""
    CREATED_NS = 8
    """Time of creation in nanoseconds since 1970."""
    CONSTRUCT_NS = 9
    """Nanoseconds from creation to seal."""
    CHECK = 10
    """Checksum of words 1 to 6, the generation, and whether the object is complete (see `shmplasma.checks`)."""
    OWNER = 11
    """Slot + 1 that its creator lent, or pins it by, which says whose it is while it is CREATED."""
    KEEP = 12
    """0 for an object that may be evicted; for one that may not, all ones, so that no flipped bit drops it."""
    COPY = 14
    """Where in the external store a copy is: container << 32 | place / 64; 0 for none (see `shmplasma.spilling`)."""
    COPY_CHECK = 15
    """Checksum of id, codec, sizes and the word before."""


class ControlWord(IntEnum):
    """Numbers of a control line's words, which the store writes and one client reads.

    All but the first two are for a store that recovers the segment: whose the board is, and what it leases.
    """

    EPOCH = 0
    ACKNOWLEDGED = 1
    """How many records of the client's outbox have been handled."""
    PID = 2
    START_TIME = 3
    FIRST_BOARD = 4
    """The first board of the board's client, + 1; 0 while the board is nobody's."""
    LEASE_CURSOR = 5
    """Where the unpublished part of the client's lease begins; and in the lowest bit, whether it holds references."""
    LEASE_END = 6
    CHECK = 7
    """Checksum of words 2 to 4 and 6."""


_COMPLEMENT: Final = 16
_ALL_ONES: Final = (1 << 64) - 1


def mark_end(words: memoryview, word: HeaderWord, end: int) -> None:
    """Write down how far a region was ever used, and so many words later its complement."""
    words[word] = end
    words[word + _COMPLEMENT] = end ^ _ALL_ONES


def read_end(words: memoryview, word: HeaderWord, limit: int) -> int:
    """Return how far a region was ever used: `limit` where damage, or a store that is just writing it down, makes that unsure."""
    end = int(words[word])
    return end if words[word + _COMPLEMENT] == end ^ _ALL_ONES and end <= limit else limit


def recover_end(words: memoryview, word: HeaderWord, limit: int) -> int:
    """Return what a region was never used above, for the successor of a store that has died: no more than `limit`.

    A death between the two words leaves the end of before in one of them, that of after in the other; where one is damaged, the other says how it was.
    So the greater one is never less than how far the region was used.
    """
    return min(max(words[word], words[word + _COMPLEMENT] ^ _ALL_ONES), limit)


ID_FIELD: Final = Struct("@20sI")
"""Object id and codec, as they lie in words 1 to 3 of an entry."""


def align_up(number: int, alignment: int) -> int:
    """Return the smallest multiple of `alignment`, a power of two, that is not below `number`.

    Examples
    --------
    >>> align_up(65, 64)
    128
    """
    return (number + alignment - 1) & -alignment


def alignment_of(size_bytes: int) -> int:
    """Return where data of so many bytes should begin, at a multiple of how many bytes.

    Examples
    --------
    >>> alignment_of(1 << 20), alignment_of(1 << 24)
    (64, 4096)
    """
    return ALIGNMENT if size_bytes < _LARGE_BYTES else _LARGE_ALIGNMENT


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes and offsets of one segment, as its header states them.  All sizes and offsets are bytes.

    Use `Layout.plan` for a new segment and `Layout.read` for an existing one.

    Attributes
    ----------
    page_bytes : int
        Boundary on which regions begin: 4096, or the huge page size.
    capacity : int
        What users can fill.
    segment_bytes : int
        Size of the whole file.
    n_buckets : int
        A power of two.
    n_entries, n_boards : int
        Upper limits on objects and on boards.
    buckets, entries, visited, marks, control, boards, outboxes, data : int
        Offset of each region.
    """

    page_bytes: int
    capacity: int
    segment_bytes: int
    n_buckets: int
    n_entries: int
    n_boards: int
    buckets: int
    entries: int
    visited: int
    marks: int
    control: int
    boards: int
    outboxes: int
    data: int

    @classmethod
    def plan(cls, capacity: int, page_bytes: int) -> Layout:
        """Return the layout of a new segment.

        Parameters
        ----------
        capacity : int
            Bytes that users can fill; at least 1.
        page_bytes : int
            Page size of the file that will hold it: a power of two, at least 4096.

        Raises
        ------
        ValueError
            `capacity` is not positive, or `page_bytes` is not a page size.

        Examples
        --------
        >>> layout = Layout.plan(1_000_000, 4096)
        >>> layout.segment_bytes - layout.data >= 1_000_000
        True
        """
        if capacity < 1:
            raise ValueError(f"a store needs a capacity of at least 1 byte, not {capacity}")
        if page_bytes < HEADER_BYTES or page_bytes & (page_bytes - 1):
            raise ValueError(f"{page_bytes} is not a page size")
        huge = page_bytes > HEADER_BYTES
        wanted = capacity // (_BYTES_AN_ENTRY_HUGE if huge else _BYTES_AN_ENTRY)
        n_entries = min(max(wanted, _MIN_ENTRIES), _MAX_ENTRIES)
        n_buckets = 1 << (n_entries // _ENTRIES_A_BUCKET - 1).bit_length()
        n_boards = _BOARDS_HUGE if huge else _BOARDS
        offsets: list[int] = []
        end = HEADER_BYTES
        for size in (
            n_buckets * 8,
            n_entries * ENTRY_BYTES,
            n_entries,
            n_entries * MARK_BYTES,
            n_boards * CONTROL_BYTES,
            n_boards * BOARD_BYTES,
            n_boards * OUTBOX_BYTES,
            capacity,
        ):
            start = align_up(end, page_bytes)
            offsets.append(start)
            end = start + size
        return cls(
            page_bytes,
            capacity,
            align_up(end, page_bytes),
            n_buckets,
            n_entries,
            n_boards,
            *offsets,
        )

    @property
    def data_bytes(self) -> int:
        """Size of the data region that the allocator manages: the capacity in whole cache lines."""
        return align_up(self.capacity, ALIGNMENT)

    @property
    def granule_bytes(self) -> int:
        """What is committed and given back as one: granules begin with the data region; a power of two."""
        return max(GRANULE_BYTES, self.page_bytes)

    @property
    def columns(self) -> tuple[tuple[int, int], ...]:
        """The regions that have something for each entry: where they begin, and how many bytes each has there."""
        return (self.entries, ENTRY_BYTES), (self.visited, 1), (self.marks, MARK_BYTES)

    def entry(self, index: int) -> int:
        """Return the offset of an entry."""
        return self.entries + index * ENTRY_BYTES

    def write(self, words: memoryview, token: bytes, scratch: bytes = b"") -> None:
        """Write the header of a new segment.

        Parameters
        ----------
        words : memoryview
            The segment (or its first page) as native 8-byte words, writable.
        token : bytes
            16 random bytes: the identity of this segment.
        scratch : bytes, optional
            Socket path of a store that nobody will start again.

        Notes
        -----
        The magic goes in last: a header that can be recognized is complete.
        """
        words[1] = LAYOUT_VERSION
        words[2:4] = memoryview(token).cast("Q")
        for number, field in enumerate(fields(self), start=4):
            words[number] = getattr(self, field.name)
        mark_end(words, HeaderWord.ENTRIES_END, 0)
        mark_end(words, HeaderWord.ENTRIES_USED, 0)
        mark_end(words, HeaderWord.BOARDS_END, 0)
        mark_end(words, HeaderWord.WATERMARK, 0)
        words[HeaderWord.SCRATCH_BYTES] = len(scratch)
        start = (HeaderWord.SCRATCH_BYTES + 1) * 8
        words.cast("B")[start : start + len(scratch)] = scratch
        words[0] = MAGIC

    @staticmethod
    def is_unfinished(words: memoryview) -> bool:
        """Tell whether a store has died before its new segment had a header, hence before anything was in it."""
        return not words[0] and not words[HeaderWord.ENTRIES_END]

    @staticmethod
    def scratch(words: memoryview) -> bytes:
        """Return the socket path of a store that nobody will start again; empty for any other."""
        start = (HeaderWord.SCRATCH_BYTES + 1) * 8
        header = bytes(words.cast("B")[: min(HEADER_BYTES, len(words) * 8)])
        return header[start : start + words[HeaderWord.SCRATCH_BYTES]]

    @classmethod
    def read(cls, words: memoryview) -> tuple[Layout, bytes]:
        """Return the layout and the identity token which a header states.

        Parameters
        ----------
        words : memoryview
            The header page as native 8-byte words.

        Raises
        ------
        LayoutError
            It is no header, is of another version, or describes an impossible segment.
        """
        if len(words) * 8 < HEADER_BYTES or words[0] != MAGIC:
            raise LayoutError("this is not a shmplasma segment (no magic number at its start)")
        if words[1] != LAYOUT_VERSION:
            raise LayoutError(
                f"the segment has layout version {words[1]}, this shmplasma reads version "
                f"{LAYOUT_VERSION}; run the release that made it"
            )
        layout = cls(*(words[number] for number in range(4, 4 + len(fields(cls)))))
        try:
            planned = cls.plan(layout.capacity, layout.page_bytes)
        except ValueError as error:
            raise LayoutError(f"the segment's header is damaged: {error}") from error
        if layout != planned:
            raise LayoutError(
                "the segment's header is damaged: its regions do not fit its capacity"
            )
        return layout, bytes(words[2:4])
