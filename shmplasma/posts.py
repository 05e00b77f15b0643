"""Posts: what clients have written to their outboxes, and when the store looks there.  Pure.

`shmplasma.outbox` has the argument; here records become requests, in the order of each outbox.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from shmplasma.denials import Refused
from shmplasma.dispatch import Dispatch
from shmplasma.effects import Drop, Forget
from shmplasma.errors import ProtocolError
from shmplasma.greeting import Session
from shmplasma.layout import OUTBOX_BYTES
from shmplasma.outbox import RECORDS, is_written, read_record
from shmplasma.parts import Parts
from shmplasma.posted import Claim, Gone, Publish, Remove, Seal, decode_posted
from shmplasma.protocol import ONE_WAY
from shmplasma.requests import Role

__all__ = ["Posts"]

_FEW: Final = 8
"""Into the outboxes of so many connections the store looks while it looks for messages; 0.5 us each."""
_DELETED_AT_ONCE: Final = 32
"""So many objects that were deleted one after the other are given back as one: one barrier, and one look at the boards."""


class Posts:
    """The outboxes of all clients.

    Parameters
    ----------
    parts : Parts
        The parts of the store.
    dispatch : Dispatch
        Carries out what they say.

    Notes
    -----
    O(1) for an outbox in which there is nothing.
    """

    def __init__(self, parts: Parts, dispatch: Dispatch) -> None:
        self._words = parts.words
        self._raw = parts.raw
        self._outboxes = parts.layout.outboxes
        self._control = parts.control
        self._publishing = parts.publishing
        self._deletions = parts.deletions
        self._outgoing = parts.outgoing
        self._sessions = parts.greeter.sessions
        self._polling = parts.polling
        self._publish = dispatch.publish
        self._carry_out = dispatch.request
        self._glances = False

    def heed(self, session: Session, now_ns: int) -> int:
        """Carry out what a client has posted, and return how much that was.

        What a record makes readable goes at the earliest when that is acknowledged (`shmplasma.unread`).

        Raises
        ------
        ProtocolError
            A record is malformed, or may not be there.
        """
        board = session.board
        start = self._outboxes + board * OUTBOX_BYTES
        acknowledged = self._control.acknowledged(board)
        if not is_written(self._words, start, acknowledged):
            return 0
        page = self._raw[start : start + OUTBOX_BYTES]
        count, begun = 0, self._deletions.begun
        try:
            # A client that writes on and on is not to keep the others waiting.
            while count < RECORDS and (record := read_record(page, acknowledged)) is not None:
                message = decode_posted(*record)
                if isinstance(message, Gone):
                    self._note_gone(session)
                    break
                if begun and type(message) is not Remove:
                    self._deletions.end()
                refused = None
                try:
                    if type(message) is Publish:
                        self._publish(session, message, now_ns)
                    else:
                        self._carry_out(session, ONE_WAY, message, now_ns)
                except Refused as error:
                    refused = error.failed
                acknowledged += 1
                count += 1
                self._control.acknowledge(board, acknowledged)
                if refused is not None:
                    self._publishing.note_refused(session.client)
                    self._outgoing.reply(session.client, ONE_WAY, refused)
        finally:
            if begun and (not self._glances or len(begun) >= _DELETED_AT_ONCE):
                self._deletions.end()
        return count

    def _note_gone(self, session: Session) -> None:
        if not session.left:
            session.left = True
            self._outgoing.effects.append(Forget(session.client))

    def acknowledge_published(self, referenced: Collection[bytes]) -> set[int]:
        """Acknowledge what a store that has died had carried out, and could not say so any more: the first record of an outbox.

        Parameters
        ----------
        referenced : collection of bytes
            The sealed objects that belong to references.

        Returns
        -------
        set of int
            The clients that may hold one of these by such a record.
        """
        holders: set[int] = set()
        for session in self._sessions.values():
            board = session.board
            start = self._outboxes + board * OUTBOX_BYTES
            acknowledged = self._control.acknowledged(board)
            record = read_record(self._raw[start : start + OUTBOX_BYTES], acknowledged)
            try:
                message = None if record is None else decode_posted(*record)
            except ProtocolError:
                continue  # for which its client is dropped when it is read
            if isinstance(message, (Publish, Seal)) and message.object_id in referenced:
                holders.add(session.client)
            if isinstance(message, (Publish, Claim)) and self._publishing.leases.was_published(
                session.client, message.offset
            ):
                self._control.acknowledge(board, acknowledged + 1)
        return holders

    def heed_or_drop(self, session: Session | None, now_ns: int) -> int:
        """Carry out what a connection has posted, if it is a client's; drop it for what it may not post."""
        if session is None or session.role is not Role.CLIENT:
            return 0
        if session.detached:
            return self.heed_out(session, now_ns)
        try:
            return self.heed(session, now_ns)
        except ProtocolError as error:
            self._outgoing.effects.append(Drop(session.client, str(error)))
            return self.heed_out(session, now_ns)

    def heed_out(self, session: Session, now_ns: int) -> int:
        """Carry out what a client has posted that is leaving, or has left, but for what it may not post.

        Others may have taken what it has put (`shmplasma.hints`), so its lease is not given back before this.
        """
        for _ in range(RECORDS):  # it may write on
            try:
                return self.heed(session, now_ns)
            except ProtocolError:
                board = session.board
                self._control.acknowledge(board, self._control.acknowledged(board) + 1)
        return 0

    def heed_all(self, now_ns: int) -> int:
        """Carry out whatever anybody has posted, and return how much that was."""
        words, outboxes, acknowledged = self._words, self._outboxes, self._control.acknowledged
        written = [
            session
            for session in self._sessions.values()
            if session.role is Role.CLIENT
            and is_written(
                words, outboxes + (board := session.board) * OUTBOX_BYTES, acknowledged(board)
            )
        ]
        return sum([self.heed_or_drop(session, now_ns) for session in written]) if written else 0

    def glance(self, latest: int, now_ns: int) -> int:
        """Read all outboxes where there are few, else that of the client that was handled last, which most likely goes on.

        Deletions are only begun, as by `begin`.
        """
        self._glances = True
        try:
            if len(self._sessions) <= _FEW:
                return self.heed_all(now_ns)
            return self.heed_or_drop(self._sessions.get(latest), now_ns)
        finally:
            self._glances = False

    def begin(self, session: Session, now_ns: int) -> int:
        """Carry out what a client has posted, and only begin the last deletions: `Deletions.end` is to follow (see `shmplasma.deletions`)."""
        self._glances = True
        try:
            return self.heed(session, now_ns)
        finally:
            self._glances = False

    def poll(self, now_ns: int) -> None:
        """Read all outboxes unasked; have clients announce again when nothing comes of it any more."""
        if self._polling.is_fruitless:
            self.stop_polling(now_ns)
        else:
            self._polling.found(self.heed_all(now_ns))

    def stop_polling(self, now_ns: int) -> None:
        """Have clients announce what they put into their outboxes, and read what they did not."""
        self._polling.stop()
        self.heed_all(now_ns)
