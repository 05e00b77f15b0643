"""The beginning of a conversation: who connects, for what, and with what he is given.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from shmplasma.control import Owner
from shmplasma.denials import NoRoom, Refused
from shmplasma.effects import Adopt, Descriptor, HandOver
from shmplasma.errors import CommitError, ProtocolError
from shmplasma.layout import BOARD_BYTES, Layout
from shmplasma.memory import Memory
from shmplasma.outgoing import Outgoing
from shmplasma.pins import Boards
from shmplasma.protocol import PROTOCOL_VERSION
from shmplasma.replies import Done, Failed, Failure, Welcome
from shmplasma.requests import Hello, Role
from shmplasma.table import Table

__all__ = ["Greeter", "Session"]

_KEPT_FOR_OTHERS: Final = 8
"""This share of all boards is not for those who have one already."""


@dataclass(slots=True)
class Session:
    """What the store knows of one connection.

    One that was recovered is *awaited* until its client goes on over another connection.  That connection
    *claims* the awaited client with its `Hello`, and is it from its next message on: whoever gives up in between, as one does that
    is interrupted, is still awaited.  One that is *detached* has left, or is dropped: it is
    answered nothing, hence is claimed by nobody; as long as it is not known to have ended it is awaited for what it may hold.
    """

    client: int
    pid: int
    start_time: int
    name: str = ""
    role: Role | None = None
    detached: bool = False
    limit_bytes: int = 0
    command: str = ""
    connected_ns: int = 0
    board: int = 0
    n_boards: int = 0
    trusted: bool = False
    awaited: bool = False
    left: bool = False
    attached: bool = False
    claims: int | None = None
    lent: set[int] = field(default_factory=set)
    """Slots of its gets that wait: each waits with slots of its own, so there is an end to their number."""

    @property
    def may_come_back(self) -> bool:
        """Whether a connection may go on as this client."""
        return self.awaited and not self.detached


class Greeter:
    """Introduces connections to the store.

    Parameters
    ----------
    layout : Layout
        The segment's layout.
    token : bytes
        The segment's identity.
    segment : tuple of str
        Kind and path of the segment, by which clients find it.
    memory : Memory
        Says whether clients may pin without a message.
    table, boards, outgoing
        The parts of the store that it needs.
    limit_bytes : int
        What a client may hold that has no limit of its own; 0 for no limit.

    Attributes
    ----------
    sessions : dict
        All connections, by their numbers.
    """

    def __init__(
        self,
        layout: Layout,
        token: bytes,
        segment: tuple[str, str],
        table: Table,
        boards: Boards,
        outgoing: Outgoing,
        memory: Memory,
        limit_bytes: int,
    ) -> None:
        self._layout = layout
        self._token = token
        self._segment = segment
        self._memory = memory
        self._table = table
        self._boards = boards
        self._outgoing = outgoing
        self.limit_bytes = limit_bytes
        self.sessions: dict[int, Session] = {}

    def hello(self, session: Session, request_id: int, hello: Hello) -> None:
        """Answer the first message of a connection.

        Raises
        ------
        ProtocolError
            It is none, or not to be granted.
        Refused, NoRoom
            There is no board for it.
        """
        client = session.client
        if session.role is not None or session.claims is not None:
            raise ProtocolError("a second Hello")
        if hello.version != PROTOCOL_VERSION:
            text = (
                f"the store speaks protocol version {PROTOCOL_VERSION}, the client version "
                f"{hello.version}; run the same release of shmplasma on both sides"
            )
            self._outgoing.reply(client, request_id, Failed(Failure.VERSION, text))
            raise ProtocolError(f"it speaks protocol version {hello.version}")
        if hello.reclaim:
            awaited = self.sessions.get(hello.reclaim - 1)
            if awaited is not None and awaited.may_come_back and _same_process(awaited, session):
                session.claims, session.name = awaited.client, hello.name
                welcome = self._welcome(awaited, reclaimed=True)
                self._outgoing.reply(client, request_id, welcome, Descriptor.WAKE)
                return
        if hello.role is Role.SUCCESSOR:
            if not session.trusted:
                raise ProtocolError("it may not replace this store")
            session.role = hello.role
            self._outgoing.reply(client, request_id, Done())
            self._outgoing.effects.append(HandOver(client))
            return
        if hello.role is Role.CLIENT:
            session.board = self.grant(session)
        session.role, session.name = hello.role, hello.name
        welcome = self._welcome(session)
        if hello.role is Role.CLIENT:
            self._outgoing.reply(client, request_id, welcome, Descriptor.WAKE)
        else:
            self._outgoing.subscribe(client, request_id, welcome, self._table)

    def expect(self, owners: Mapping[int, Owner], now_ns: int) -> None:
        """Await the clients of a store that has died; they are known by the numbers of their first boards."""
        for board, owner in owners.items():
            session = Session(board, owner.pid, owner.start_time, "recovered", Role.CLIENT)
            session.board, session.awaited = board, True
            session.connected_ns, session.limit_bytes = now_ns, self.limit_bytes
            self.sessions[board] = session

    @property
    def expects_somebody(self) -> bool:
        """Whether a client is still awaited."""
        return any(session.awaited for session in self.sessions.values())

    def resume(self, session: Session) -> int:
        """Let a client go on with all that it has over the connection that claims it; return its number.

        Raises
        ------
        ProtocolError
            That client is not awaited any more.
        """
        assert session.claims is not None
        awaited = self.sessions.get(session.claims)
        if awaited is None or not awaited.may_come_back:
            raise ProtocolError("what it claims went on over another connection, or was dropped")
        del self.sessions[session.client]
        awaited.awaited, awaited.name, awaited.command = False, session.name, session.command
        self._outgoing.effects.append(Adopt(session.client, awaited.client))
        return awaited.client

    def _welcome(self, session: Session, *, reclaimed: bool = False) -> Welcome:
        return Welcome(
            self._token, session.board, self._memory.has_barrier, reclaimed, *self._segment
        )

    def grant(self, session: Session) -> int:
        """Give a client one more board and return its number.

        Raises
        ------
        Refused
            There is none for it.
        NoRoom
            There is no memory for it.
        """
        others_keep = self._layout.n_boards // _KEPT_FOR_OTHERS
        if session.n_boards and self._boards.n_free < others_keep:
            text = (
                "nearly all pin boards of the store are in use, and the rest is for clients that have "
                "none; release buffers"
            )
            raise Refused(Failed(Failure.NO_BOARD, text))
        try:
            board = self._boards.grant(session.client, session.pid, session.start_time)
        except CommitError as error:
            raise NoRoom(BOARD_BYTES, str(error)) from error
        if board is None:
            text = (
                f"all {self._layout.n_boards} pin boards of the store are in use; close clients or "
                "release buffers"
            )
            raise Refused(Failed(Failure.NO_BOARD, text))
        session.n_boards += 1
        return board


def _same_process(one: Session, other: Session) -> bool:
    """Tell whether two connections are of one process; where it cannot be seen, its word counts."""
    return (one.pid, one.start_time) == (other.pid, other.start_time)
