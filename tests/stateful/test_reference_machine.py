"""References against a model: whatever the store reads when, nothing goes that somebody holds or is yet to receive.

Clients do what clients do, in the order of real time: what they post lies in their outboxes at once, what they send
waits in their sockets until the machine lets the store read it.  The model knows who has which handle and what is
on its way, as a god would.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shmplasma.layout import REFERENCED
from shmplasma.references import LINGER_NS
from shmplasma.replies import Created, Done
from shmplasma.requests import Bequeath, Hold, Lend, Post, Redeem, Release, Request, Seal
from tests.conversation import Conversation, Peer, name

PICK = st.integers(0, 5)


@dataclass
class Client:
    """A process: its handles, and what it has sent and the store has not read."""

    peer: Peer
    handles: set[tuple[bytes, int]] = field(default_factory=set)
    sent: deque[Request] = field(default_factory=deque)
    last_number: int = 0

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
        self.talk = Conversation(1 << 20)
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
    @rule(at=PICK)
    def drop(self, at: int) -> None:
        """Let go of a handle."""
        client, handle = self.handle(at)
        client.handles.remove(handle)
        client.sent.append(Release(*handle))

    @precondition(lambda self: self.handles() and len(self.clients) < 6)
    @rule(at=PICK)
    def fork(self, at: int) -> None:
        """Fork: the parent asks before, and its child tells after."""
        parent, _ = self.handle(at)
        self.read_all(parent)
        self.count += 1
        parent.peer.ask(Bequeath(self.count), Done)
        child = Client(self.talk.client(), set(parent.handles), last_number=parent.last_number)
        child.sent.append(Hold(self.count, sorted(child.handles)))
        self.clients.append(child)

    @precondition(lambda self: len(self.clients) > 1)
    @rule(at=PICK)
    def die(self, at: int) -> None:
        """Kill a client: the store reads what it had sent, and then the end of the connection."""
        client = self.client(at)
        self.clients.remove(client)
        self.read_all(client)
        self.talk.disconnect(client.peer)

    @precondition(lambda self: self.pickles)
    @rule(at=PICK)
    def throw_away(self, at: int) -> None:
        """Close a queue unread."""
        self.thrown_away.append(self.pickles.pop(at % len(self.pickles)))

    # -- the store -----------------------------------------------------------------------------

    @rule(at=PICK, count=st.integers(1, 3))
    def read(self, at: int, count: int) -> None:
        """Let the store read some of what a client has sent."""
        client = self.client(at)
        for _ in range(min(count, len(client.sent))):
            self.deliver(client, client.sent.popleft())

    @rule(at=PICK)
    def heed(self, at: int) -> None:
        """Let the store read the outbox of a client."""
        self.client(at).peer.tell(Post())

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
        assert not self.talk.ids()
        assert "\nreferences on their way: 0\n" in self.talk.store.describe()
        self.talk.store.check()

    # -- helpers -------------------------------------------------------------------------------

    def client(self, at: int) -> Client:
        """Return one of the clients."""
        return self.clients[at % len(self.clients)]

    def handles(self) -> list[tuple[Client, tuple[bytes, int]]]:
        """Return all handles, with who has them."""
        return [(client, each) for client in self.clients for each in sorted(client.handles)]

    def handle(self, at: int) -> tuple[Client, tuple[bytes, int]]:
        """Return one of them."""
        handles = self.handles()
        return handles[at % len(handles)]

    def receive(self, client: Client, pickle: Pickle) -> None:
        """Let a client unpickle something."""
        number = client.new_handle(pickle.object_id)
        client.sent.append(Redeem(pickle.object_id, pickle.ticket, number))

    def post(self, client: Client, message: Seal | Lend) -> None:
        """Write a record, when the store has read some if there is no room."""
        if not client.peer.outbox.append(message.KIND, message.encode()):
            client.peer.tell(Post())
            client.peer.write_silently(message)

    def deliver(self, client: Client, request: Request) -> None:
        """Let the store read a message."""
        if isinstance(request, Hold):
            client.peer.ask(request, Done)
        else:
            client.peer.tell(request)

    def read_all(self, client: Client) -> None:
        """Let the store read all that a client has sent."""
        while client.sent:
            self.deliver(client, client.sent.popleft())


TestReferenceMachine = ReferenceMachine.TestCase
TestReferenceMachine.settings = settings(stateful_step_count=60)
