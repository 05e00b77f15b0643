"""Having the store read what was put, so that the table answers for it: what is deleted, and what there is.

What was put is in the table when the store has read its record; who only wants to have it finds it before that (`shmplasma.unread`).  The store looks for records while it is awake, and is told of them while it
sleeps; so whoever needs one to be read looks for a while whether it is, which takes less than to ask.  If it is not read soon the store may be
between two looks, a millisecond apart: then it is woken, and has itself be told of each record for some time, as others may be looked for as soon.
One that sleeps longer may not have been told that an object is being created (`shmplasma.outbox`): then it is woken by a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from shmplasma.absence import Absence
from shmplasma.attachment import Attachment
from shmplasma.layout import HeaderWord
from shmplasma.link import Link
from shmplasma.spin import Spin

__all__ = ["Settling"]

_POLLED: Final = int(HeaderWord.POLLED)
_AWAKE_NS: Final = 10_000
"""A store that is awake has read a record by then, or is at one."""
_WOKEN_NS: Final = 200_000
"""One that was woken has: a request takes as long, and some more for its answer."""


class Settling:
    """Waits until the store has read what was put.

    Parameters
    ----------
    attachment : Attachment
        The segment.
    absence : Absence
        Sees what was not read.
    link : Link
        The connection.
    wake : callable
        Wakes a store that looks into outboxes from time to time, and has it be told of records for a while.

    Notes
    -----
    Thread-safe.
    """

    __slots__ = ("_absence", "_link", "_spin", "_wake", "_words")

    def __init__(
        self, attachment: Attachment, absence: Absence, link: Link, wake: Callable[[], None]
    ) -> None:
        self._wake = wake
        self._words = attachment.words
        self._absence = absence
        self._link = link
        self._spin = Spin()

    def settle(self, *, once: bool = False) -> bool | None:
        """Have the store read all that was put.

        Parameters
        ----------
        once : bool, optional
            Whether the store, if it is woken, is to go on looking by itself, as what was put is looked for to be deleted.

        Returns
        -------
        bool or None
            True when it has read something meanwhile, so that another look is worth it; False when there was nothing to
            read; None when it has not read all: ask it.
        """
        absence = self._absence
        wanted = absence.unread()
        if not wanted:
            return None if wanted is None else False
        for _ in self._spin.looks(_AWAKE_NS):
            if absence.is_read(wanted):
                return True
        if self._words[_POLLED] and not once:
            self._wake()
        else:
            with suppress(ConnectionError):  # whoever asks hears of it
                self._link.channel.announce()
        for _ in self._spin.looks(_WOKEN_NS):
            if absence.is_read(wanted):
                return True
        return None

    def all_is_read(self) -> bool:
        """Have the store read all that was put and deleted, and tell whether it has; False means: ask it.

        What this client has told it otherwise than by its outbox is handled before it is asked.
        """
        link = self._link
        aside, link.aside = link.aside, 0
        return self.settle() is not None and not aside and link.channel.is_quiet

    def are_absent(self, object_ids: Sequence[bytes]) -> bool:
        """Tell whether none of these objects is in the store, after `settle`; False means: ask it.

        Who asks again and again has to hear when the store has gone.
        """
        return all(map(self._absence.is_free, object_ids)) and self._link.channel.is_quiet

    def are_absent_now(self, object_ids: Sequence[bytes]) -> bool:
        """Tell the same without waiting."""
        return self._absence.unread() == [] and self.are_absent(object_ids)
