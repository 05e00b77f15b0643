"""Refusals for want of room: what is told to somebody who does not get any.  Pure; changes nothing.

What the store knows of its holders are their boards and its own table.  It cannot see when a buffer was got, since
that sends no message: the age of a holder is that of its connection.  Command and pid are what the system said of
the process when it connected; a client in another pid namespace has neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from itertools import chain
from typing import Final

from shmplasma.denials import NoRoom
from shmplasma.errors import Holder
from shmplasma.greeting import Session
from shmplasma.layout import Layout
from shmplasma.lifecycle import Lifecycle
from shmplasma.pins import Boards
from shmplasma.replies import Failed, Failure
from shmplasma.reports import printable
from shmplasma.room import Room
from shmplasma.table import Table

__all__ = ["Refusals"]

_MAX_HOLDERS: Final = 5
_MAX_LETTERS: Final = 80
"""Of a name or command in the text; as an attribute it has up to 255 bytes."""


class Refusals:
    """Says how the room of a store is used, and by whom.

    Parameters
    ----------
    layout : Layout
        The segment's layout.
    table, boards, room, objects
        The parts of the store that know.
    sessions : mapping
        All connections, by their numbers.
    waiting : sized
        Those who wait for room.

    Notes
    -----
    O(boards in use, and pinned objects) for each refusal.
    """

    def __init__(
        self,
        layout: Layout,
        table: Table,
        boards: Boards,
        room: Room,
        objects: Lifecycle,
        sessions: Mapping[int, Session],
        waiting: Sized,
    ) -> None:
        self._capacity = layout.capacity
        self._table = table
        self._boards = boards
        self._room = room
        self._objects = objects
        self._sessions = sessions
        self._waiting = waiting

    def answer(self, no_room: NoRoom, now_ns: int) -> Failed:
        """Return the reply to a request for which there is no room."""
        objects, residents = self._objects, self._room.residents
        held = self._boards.holdings()
        pinned = set[int]().union(*held.values())
        unsealed = objects.unsealed.creators.keys() - pinned
        sizes = self._table.sizes(chain(pinned, unsealed))
        figures = {
            "requested_bytes": no_room.requested_bytes,
            "free_bytes": self._room.free_bytes,
            "largest_bytes": self._room.largest_bytes,
            "pinned_bytes": sum(sizes.values()) - _sum(sizes, unsealed),
            "unsealed_bytes": objects.unsealed_bytes,
            "leased_bytes": objects.leased_bytes,
            "kept_bytes": residents.kept_bytes,
            "spillable_bytes": residents.kept_bytes - _sum(sizes, residents.kept & pinned),
            "limit_bytes": no_room.limit_bytes,
            "held_bytes": no_room.held_bytes,
        }
        holders = self._holders(held, sizes, now_ns)
        if no_room.limit_bytes:
            text = (
                "this client may hold {limit_bytes} bytes, holds {held_bytes}, and asks for "
                "{requested_bytes} more; release buffers, or raise the limit with set_client_options"
            ).format(**figures)
            return Failed(Failure.OVER_QUOTA, text, **figures, holders=holders)
        text = no_room.text or self._use(figures)
        if objects.spilling is not None and objects.spilling.failure:
            text += f"; nothing is written to the external store: {objects.spilling.failure}"
        if holders:
            text += f"; held most: {'; '.join(map(_described, holders))}"
        return Failed(Failure.FULL, text, **figures, holders=holders)

    def _use(self, figures: Mapping[str, int]) -> str:
        if figures["requested_bytes"] > self._capacity:
            return (
                f"an object of {figures['requested_bytes']} bytes is larger than the store, which has "
                f"{self._capacity}; start it with a larger -m"
            )
        if self._room.is_fragmented(figures["requested_bytes"]):
            return (
                "the store is full: {requested_bytes} bytes were asked for; {free_bytes} are free, but the "
                "largest extent has {largest_bytes}, and what lies between the extents cannot be moved or "
                "evicted: {pinned_bytes} bytes are pinned by clients, {unsealed_bytes} are not sealed yet, "
                "{leased_bytes} are leased; wait with timeout_ms, release buffers, seal or abort what is being "
                "written, or start the store with a larger -m"
            ).format(**figures)
        waiting = f", {len(self._waiting)} requests wait for room" if self._waiting else ""
        if n_bytes := self._room.residents.protected_bytes:
            waiting = f", {n_bytes} belong to references, until these are released{waiting}"
        return (
            "the store is full: {requested_bytes} bytes were asked for; of {capacity} bytes "
            "{free_bytes} are free (the largest extent has {largest_bytes}), {pinned_bytes} are pinned "
            "by clients, {unsealed_bytes} are not sealed yet, {leased_bytes} are leased, {kept_bytes} "
            "are kept ({spillable_bytes} of them not in use){waiting}; wait with timeout_ms, release "
            "buffers, seal or abort what is being written, delete or cache objects, or start the store with a larger "
            "-m"
        ).format(capacity=self._capacity, waiting=waiting, **figures)

    def _holders(
        self, pinned: Mapping[int, set[int]], sizes: Mapping[int, int], now_ns: int
    ) -> list[Holder]:
        """Return who holds most, the largest first."""
        unsealed = self._objects.unsealed
        held = {
            client: _sum(sizes, pinned.get(client, set()).union(unsealed.of(client)))
            for client in self._sessions
        }
        most = sorted((client for client in held if held[client]), key=held.__getitem__)[::-1]
        return [
            Holder(
                self._sessions[client].name,
                self._sessions[client].pid,
                self._sessions[client].command,
                held[client],
                max(0, now_ns - self._sessions[client].connected_ns) / 1e9,
            )
            for client in most[:_MAX_HOLDERS]
        ]


def _sum(sizes: Mapping[int, int], entries: Iterable[int]) -> int:
    """Return the sum of the sizes of entries; what clients made up has none."""
    return sum(sizes[entry] for entry in entries if entry in sizes)


def _described(holder: Holder) -> str:
    process = f"pid {holder.pid}" if holder.pid else "a process that the store cannot see"
    command = f", {_short(holder.command)}" if holder.command else ""
    return (
        f"{_short(holder.name) or 'unnamed'} ({process}{command}) holds {holder.held_bytes} bytes, "
        f"connected for {holder.age_seconds:.0f} s"
    )


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _MAX_LETTERS else f"{text[: _MAX_LETTERS - 3]}..."
