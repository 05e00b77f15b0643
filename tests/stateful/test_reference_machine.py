"""References against a model: whatever the store reads when, nothing goes that somebody holds or is yet to receive.

Clients do what clients do, in the order of real time: what they post lies in their outboxes at once, what they send
waits in their sockets until the machine lets the store read it.  A store that dies takes that along; its clients come
back by and by, and go on meanwhile.  The model knows who has which handle and what is on its way, as a god would.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shmplasma.layout import BOARD_WORDS, REFERENCED
from shmplasma.posted import Lend, Posted, Redeem, Release, Seal
from shmplasma.protocol import PROTOCOL_VERSION
from shmplasma.replies import Created, Done, Welcome
from shmplasma.requests import Bequeath, Hello, Hold, Post, Request, Role
from shmplasma.tickets import LINGER_NS, TICKET_NS
from tests.conversation import Conversation, Peer, name
from tests.crash.damage import Reopened

PICK = st.integers(0, 5)


class Stage(IntEnum):
    """How far a client has come with its store."""

    CONNECTED = 0
    AWAY = 1
    WELCOME = 2
    """A store that has come back knows that the client is there."""
    TOLD = 3
    """The client has noted what it holds, and is about to say so."""


@dataclass
class Client:
    """A process: its handles, and what it has sent and the store has not read.

    Attributes
    ----------
    told : list of Request
        What it has noted to say to a store that has come back.
    untold : list of Request
        What it has sent in vain since that store knows of it.
    """

    peer: Peer
    handles: set[tuple[bytes, int]] = field(default_factory=set)
    sent: deque[Request] = field(default_factory=deque)
    last_number: int = 0
    stage: Stage = Stage.CONNECTED
    claim: Peer | None = None
    told: list[Request] = field(default_factory=list)
    untold: list[Request] = field(default_factory=list)

    @property
    def board(self) -> int:
        """Its only board."""
        return self.slot // BOARD_WORDS

    def __post_init__(self) -> None:
        """Remember a slot, which is of its board."""
        self.slot = self.peer.free_slots[0]

    def send(self, request: Request) -> None:
        """Send a message, to nobody if the store is away."""
        if self.stage is Stage.CONNECTED:
            self.sent.append(request)
        elif self.stage is not Stage.AWAY:
            self.untold.append(request)

    def new_handle(self, object_id: bytes) -> int:
        """Return the number of one more handle."""
        self.last_number += 1
        self.handles.add((object_id, self.last_number))
        return self.last_number


@dataclass
class Pickle:
    """Bytes with a ticket, which so many are yet to unpickle; 0 for any number of them."""

    object_id: bytes
    ticket: int
    receivers: int


class ReferenceMachine(RuleBasedStateMachine):
    """Clients, the store, and a god's view of the handles."""

    def __init__(self) -> None:
        super().__init__()
        self.talk: Conversation = Conversation(1 << 20)
        self.clients = [Client(self.talk.client()) for _ in range(3)]
        self.pickles: list[Pickle] = []
        self.thrown_away: list[Pickle] = []
        self.count = 0

    @initialize(heeded=st.booleans())
    def begin(self, heeded: bool) -> None:
        """Begin with an object, whose seal the store may have read."""
        self.put(0)
        if heeded:
            self.heed(0)

    # -- clients -------------------------------------------------------------------------------

    @rule(at=PICK)
    def put(self, at: int) -> None:
        """Store an object; the seal lies in an outbox."""
        client = self.client(at)
        self.come_back(client)
        self.count += 1
        object_id = name(self.count)
        request = client.peer.new(object_id, codec=REFERENCED)
        client.peer.ask(request, Created)
        self.post(client, Seal(object_id))
        client.peer.release(request.slot)
        client.handles.add((object_id, 0))

    @precondition(lambda self: self.handles())
    @rule(at=PICK, receivers=st.integers(0, 3))
    def pickle(self, at: int, receivers: int) -> None:
        """Pickle a handle."""
        client, (object_id, _) = self.handle(at)
        self.count += 1
        self.post(client, Lend(object_id, self.count, receivers))
        self.pickles.append(Pickle(object_id, self.count, receivers))

    @precondition(lambda self: self.pickles)
    @rule(at=PICK, by=PICK)
    def unpickle(self, at: int, by: int) -> None:
        """Unpickle what has reached a client."""
        pickle = self.pickles[at % len(self.pickles)]
        self.receive(self.client(by), pickle)
        if pickle.receivers == 1:
            self.pickles.remove(pickle)
        elif pickle.receivers:
            pickle.receivers -= 1

    @precondition(lambda self: self.handles())
    @rule(at=PICK, silent=st.booleans())
    def drop(self, at: int, silent: bool) -> None:
        """Let go of a handle, by the outbox or, if that is not to be written to just then, by a message."""
        client, handle = self.handle(at)
        client.handles.remove(handle)
        release = Release(*handle)
        if not silent or not client.peer.outbox.append(release.KIND, release.encode()):
            client.send(release)

    @precondition(lambda self: self.handles() and len(self.clients) < 6)
    @rule(at=PICK)
    def fork(self, at: int) -> None:
        """Fork: the parent asks before, and its child tells after."""
        parent, _ = self.handle(at)
        self.come_back(parent)
        self.count += 1
        parent.peer.ask(Bequeath(self.count, sorted({each for each, _ in parent.handles})), Done)
        child = Client(self.talk.client(), set(parent.handles), last_number=parent.last_number)
        child.sent.append(Hold(self.count, sorted(child.handles)))
        self.clients.append(child)

    @precondition(lambda self: len(self.clients) > 1)
    @rule(at=PICK)
    def die(self, at: int) -> None:
        """Kill a client: the store reads what it had sent, and then the end of the connection."""
        client = self.client(at)
        self.clients.remove(client)
        if client.stage is Stage.CONNECTED:
            self.read_all(client)
        if client.claim is not None:
            self.talk.disconnect(client.claim)
        self.talk.disconnect(client.peer)

    @precondition(lambda self: self.pickles)
    @rule(at=PICK)
    def throw_away(self, at: int) -> None:
        """Close a queue unread."""
        self.thrown_away.append(self.pickles.pop(at % len(self.pickles)))

    @rule(at=PICK)
    def go_on(self, at: int) -> None:
        """Let a client come one step nearer to a store that has come back."""
        self.advance(self.client(at))

    # -- the store -----------------------------------------------------------------------------

    @rule()
    def restart(self) -> None:
        """Kill the store, with all that it has not read but the outboxes, and start another one."""
        for client in self.clients:
            if client.stage is Stage.CONNECTED:
                self.be_born(client)
        self.talk = Reopened(self.talk.layout, self.talk.words, self.talk.raw)
        for client in self.clients:
            client.peer.number = client.board
            client.sent.clear()
            client.untold.clear()
            client.stage, client.claim = Stage.AWAY, None

    @rule()
    def wait(self) -> None:
        """Let so much time pass that a store which has come back judges by what it was told, and waits for those who may hold something."""
        for client in self.clients:
            if client.stage is Stage.CONNECTED:
                self.read_all(client)
        self.thrown_away += self.pickles
        self.pickles.clear()
        self.talk.later((TICKET_NS + LINGER_NS) / 1e9)

    @rule(at=PICK, count=st.integers(1, 3))
    def read(self, at: int, count: int) -> None:
        """Let the store read some of what a client has sent."""
        client = self.client(at)
        for _ in range(min(count, len(client.sent))):
            self.deliver(client, client.sent.popleft())

    @rule(at=PICK)
    def heed(self, at: int) -> None:
        """Let the store read the outbox of a client, or those of all when that is not there."""
        client = self.client(at)
        if client.stage is Stage.CONNECTED:
            client.peer.tell(Post())
        else:
            self.talk.poll()

    @rule()
    def turn(self) -> None:
        """Let the store do what it has to do at the end of a turn."""
        self.talk.turn()

    # -- what holds ----------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost(self) -> None:
        """See that whatever somebody has, or may be yet to receive, is there."""
        there = self.talk.ids()
        wanted = {object_id for client in self.clients for object_id, _ in client.handles}
        # One that was sent to nobody knows how many stays for a while after each of them, and no time passes.
        wanted |= {pickle.object_id for pickle in self.pickles}
        assert wanted <= there

    @invariant()
    def in_order(self) -> None:
        """See that the store's own invariants hold."""
        self.talk.store.check()

    def teardown(self) -> None:
        """See that nothing is left when everything was received and dropped."""
        for client in self.clients:
            self.come_back(client)
        for pickle in self.pickles + self.thrown_away:
            for _ in range(pickle.receivers or 1):
                self.receive(self.clients[0], pickle)
        for client in self.clients:
            client.sent += [Release(*handle) for handle in client.handles]
            self.read_all(client)
            client.peer.tell(Post())
        self.talk.turn()
        assert "\nreferences: 0\n" in self.talk.store.describe()
        self.talk.later(LINGER_NS / 1e9)
        for client in self.clients:
            self.talk.disconnect(client.peer)
        self.talk.later(TICKET_NS / 1e9)
        assert not self.talk.ids()
        assert "\nreferences on their way: 0\n" in self.talk.store.describe()
        self.talk.store.check()

    # -- helpers -------------------------------------------------------------------------------

    def client(self, at: int) -> Client:
        """Return one of the clients; a forked child does nothing before it has said what it holds."""
        client = self.clients[at % len(self.clients)]
        self.be_born(client)
        return client

    def handles(self) -> list[tuple[Client, tuple[bytes, int]]]:
        """Return all handles, with who has them."""
        return [(client, each) for client in self.clients for each in sorted(client.handles)]

    def handle(self, at: int) -> tuple[Client, tuple[bytes, int]]:
        """Return one of them."""
        handles = self.handles()
        client, handle = handles[at % len(handles)]
        self.be_born(client)
        return client, handle

    def receive(self, client: Client, pickle: Pickle) -> None:
        """Let a client unpickle something."""
        number = client.new_handle(pickle.object_id)
        self.post(client, Redeem(pickle.object_id, pickle.ticket, number))

    def post(self, client: Client, message: Posted) -> None:
        """Write a record, when the store has read some if there is no room."""
        if not client.peer.outbox.append(message.KIND, message.encode()):
            self.come_back(client)
            client.peer.tell(Post())
            client.peer.write_silently(message)

    def deliver(self, client: Client, request: Request) -> None:
        """Let the store read a message."""
        if isinstance(request, Hold) and request.ticket:
            client.peer.ask(request, Done)
        else:
            client.peer.tell(request)

    def read_all(self, client: Client) -> None:
        """Let the store read all that a client has sent."""
        while client.sent:
            self.deliver(client, client.sent.popleft())

    def be_born(self, client: Client) -> None:
        """Let the store read what a forked child has inherited, which the child waits for."""
        if any(isinstance(each, Hold) and each.ticket for each in client.sent):
            self.read_all(client)

    def come_back(self, client: Client) -> None:
        """Let a client be connected, and the store have read what it has sent."""
        while client.stage is not Stage.CONNECTED:
            self.advance(client)
        self.read_all(client)

    def advance(self, client: Client) -> None:
        """Let a client come one step nearer to a store that has come back; `shmplasma.link` has them."""
        if client.stage is Stage.AWAY:
            client.claim = self.talk.connect()
            hello = Hello(PROTOCOL_VERSION, Role.CLIENT, "", client.board + 1)
            assert client.claim.ask(hello, Welcome).reclaimed
            client.stage = Stage.WELCOME
        elif client.stage is Stage.WELCOME:
            client.told = [Hold(0, sorted(client.handles)), Hold(0, ())]
            client.stage = Stage.TOLD
        elif client.stage is Stage.TOLD:
            assert client.claim is not None
            client.claim.free_slots, client.claim.outbox = (
                client.peer.free_slots,
                client.peer.outbox,
            )
            client.peer, client.claim = client.claim, None
            client.sent += client.told + client.untold
            client.untold.clear()
            client.stage = Stage.CONNECTED


TestReferenceMachine = ReferenceMachine.TestCase
TestReferenceMachine.settings = settings(stateful_step_count=60)
