"""Whether a store that takes over a segment has the external store of the one before it.

What is there alone can be had from there only.  With another place, or none, it could not be read; and what would then be
written to the other place could not be read by whoever came back to the first one.  So the header has a word that stands for the
place, and a store that is started with another one does not start, as with another capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from zlib import crc32

from shmplasma.endings import wait_for
from shmplasma.errors import EndpointError
from shmplasma.layout import ENTRY_WORDS, STATE_MASK, EntryState, EntryWord, HeaderWord
from shmplasma.segment import Segment

__all__ = ["check_place", "note_place"]

_SOME = 1 << 32
"""Tells a place from none."""


def note_place(segment: Segment, uri: str | None) -> None:
    """Write down with which external store a segment is served."""
    segment.words[HeaderWord.EXTERNAL] = _word(uri)


def check_place(
    segment: Segment, uri: str | None, is_ending: Callable[[], bool], *, runs: bool = False
) -> None:
    """See whether the objects of a segment that are in the external store alone can be had.

    Parameters
    ----------
    segment : Segment
        What another store has left.
    uri : str or None
        The external store that there is to be now; none if it is empty, too.
    is_ending : callable
        Whether this store is to end, so that it waits no longer for the place to answer.
    runs : bool
        A store serves the segment still: it may write more there before it ends, and goes on if the new place cannot be had.

    Raises
    ------
    EndpointError
        They are at another place, or in the memory of a store that is to end.
    ExternalStoreError
        The place cannot be looked at.
    EndedEarly
        This store is to end.
    """
    before, count = segment.words[HeaderWord.EXTERNAL], _count_spilled(segment)
    is_same = before == _word(uri)
    if runs and count and is_same and uri and _is_memory(uri):
        raise EndpointError(
            f"the store that runs here has {count} objects in its own memory alone ({uri}), and they would end with it; "
            "delete objects and get those until all fit, or start with --fresh to give all objects up"
        )
    if uri and (runs or (count and not is_same)):
        from shmplasma.external import has_containers  # noqa: PLC0415 - Arrow takes its time to import

        token = segment.token
        if wait_for(lambda: has_containers(uri, token), is_ending):  # somebody may have moved them
            return
    if is_same or not (count or (runs and before)):
        return
    done = f"left {count} objects in" if count else "writes objects to"
    raise EndpointError(
        f"the store that was here {done} an external store, and it is not {'this one' if uri else 'named now'}; start with "
        "its -e to have them back, or with --fresh to give all objects up (if you have moved it, its files are to be in "
        f"shmplasma-{segment.token.hex()} at the new place)"
    )


def _word(uri: str | None) -> int:
    """Return what stands for a place: its URI without user, password and options."""
    if not uri:
        return 0
    from urllib.parse import urlsplit  # noqa: PLC0415 - takes 4 ms, and most stores need none

    try:
        parts = urlsplit(uri)
    except ValueError:
        return _SOME  # it is none, which is said when it is opened
    place = parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/")
    return _SOME | crc32("\0".join(place).encode(errors="surrogateescape"))


def _is_memory(uri: str) -> bool:
    """Tell whether a place is a store's own memory (`shmplasma.external`)."""
    return uri.lower().startswith(("memory:", "hashtable:"))


def _count_spilled(segment: Segment) -> int:
    layout, words = segment.layout, segment.words
    first = layout.entry(0) // 8 + EntryWord.STATE
    end = first + words[HeaderWord.ENTRIES_USED] * ENTRY_WORDS
    states = words[first:end:ENTRY_WORDS].tolist()
    return sum(state & STATE_MASK == EntryState.SPILLED for state in states)
