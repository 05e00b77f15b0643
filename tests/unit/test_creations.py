from __future__ import annotations

from zlib import crc32

import pytest

from shmplasma.errors import Holder
from shmplasma.leases import BUSY_WORD
from shmplasma.parts import Parts
from shmplasma.posted import Abort, Detach, Publish, Seal
from shmplasma.replies import Created, Done, Failed, Failure, Leased
from shmplasma.requests import AnswerNow, AskLease, Create, Delete, Get, Keep, SetOptions
from shmplasma.store import ObjectStore
from shmplasma.waiters import FOR_EVER, MAX_PASSES
from tests.conversation import Conversation, Peer, name
from tests.crash.damage import Reopened

CAPACITY = 65536
A, B, C, D = map(name, range(1, 5))


class Crowded(Conversation):
    """A store, three clients, and an object that one of them holds and that fills most of it.

    Attributes
    ----------
    holder, one, other : Peer
        The clients.
    slot : int
        What pins the object.
    """

    def __init__(self, capacity: int = CAPACITY, left: int = 8192) -> None:
        super().__init__(capacity)
        self.holder, self.one, self.other = (self.client(text) for text in ("holder", "1", "2"))
        self.slot = self.holder.create(A, capacity - left)
        self.holder.write(Seal(A))

    def wait_for(
        self, peer: Peer, object_id: bytes, size: int = 16384, timeout_ns: int = FOR_EVER
    ) -> int:
        """Let a client wait for room, and return its request's id."""
        request = Create(object_id, size, 0, 0, peer.free_slots.pop(), False, timeout_ns)
        request_id = peer.post(request)
        self.turn()
        return request_id

    def let_go(self) -> None:
        """Let the holder release its object, and tell the store if it wants to be told."""
        self.holder.release(self.slot)
        assert self.wake_word
        self.wake()
        self.turn()


@pytest.fixture
def crowd() -> Crowded:
    """Return a store of 64 KiB in which 8 KiB are left."""
    return Crowded()


def test_a_creation_waits_for_a_release(crowd: Crowded) -> None:
    """It is granted when somebody lets go of a pin, which wakes the store for it; then nobody is to wake it."""
    waiting = crowd.wait_for(crowd.one, B)
    assert crowd.one.replies == {}
    crowd.store.check()
    crowd.let_go()
    crowd.one.take(waiting, Created)
    assert not crowd.wake_word
    crowd.store.check()


def test_a_release_at_the_moment_of_waiting_is_not_missed(crowd: Crowded) -> None:
    """Who lets go just before it could see that somebody waits is seen by the look that follows."""
    crowd.memory.at_barrier = lambda: crowd.holder.release(crowd.slot)
    crowd.one.take(crowd.wait_for(crowd.one, B), Created)


@pytest.mark.parametrize("how", ["abort", "leave", "delete", "cache", "seal"])
def test_whatever_makes_room_serves_those_who_wait(how: str) -> None:
    """An abort, the end of a holder, a delete, what is not kept any more, and what may be evicted once it is sealed."""
    talk = Conversation(CAPACITY)
    holder, one = talk.client(), talk.client()
    slot = holder.create(A, CAPACITY - 100)
    if how in ("delete", "cache"):
        holder.ask(Keep(True, [A]), Done)
        holder.write(Seal(A))
        holder.release(slot)
    elif how != "leave":
        holder.release(slot)
    waiting = one.post(Create(B, 1000, 0, 0, one.free_slots.pop(), False, FOR_EVER))
    talk.turn()
    assert one.replies == {}
    match how:
        case "abort":
            holder.write(Abort(A))
        case "leave":
            talk.disconnect(holder)
        case "delete":
            holder.ask(Delete([A]), Done)
        case "cache":
            holder.ask(Keep(False, [A]), Done)
        case _:
            holder.write(Seal(A))
    talk.turn()
    one.take(waiting, Created)
    talk.store.check()


def test_those_who_wait_are_served_in_order(crowd: Crowded) -> None:
    """The first that came gets the room for one, and the second the next."""
    first = crowd.wait_for(crowd.one, B, CAPACITY)
    second = crowd.wait_for(crowd.other, C, CAPACITY)
    crowd.let_go()
    crowd.one.take(first, Created)
    assert crowd.other.replies == {}
    crowd.disconnect(crowd.one)
    crowd.turn()
    crowd.other.take(second, Created)


def test_a_small_request_passes_a_large_one_so_often(crowd: Crowded) -> None:
    """64 puts that do not wait go before a creation that waits; then they are refused, until it was served."""
    waiting = crowd.wait_for(crowd.one, B, CAPACITY)
    for number in range(MAX_PASSES):
        crowd.other.put(name(100 + number), 64)
    request = crowd.other.new(C)
    failed = crowd.other.ask(request, Failed)
    assert failed.failure is Failure.FULL
    assert "1 requests wait for room" in failed.text
    late = crowd.wait_for(crowd.other, D, 64)
    assert crowd.other.replies == {}
    crowd.let_go()
    crowd.one.take(waiting, Created)
    assert crowd.other.replies == {}, "now the store is full"
    crowd.disconnect(crowd.one)
    crowd.turn()
    crowd.other.take(late, Created)
    crowd.other.put(C)
    crowd.store.check()


def test_a_waiter_passes_those_before_it_that_do_not_fit(crowd: Crowded) -> None:
    """What is enough for the second and not for the first is the second's."""
    first = crowd.wait_for(crowd.one, B, CAPACITY)
    crowd.other.take(crowd.wait_for(crowd.other, C, 4096), Created)
    assert first not in crowd.one.replies


def test_a_deadline_ends_the_wait(crowd: Crowded) -> None:
    """The store says when it wants to be asked again, refuses then, and the id is free."""
    waiting = crowd.wait_for(crowd.one, B, timeout_ns=1000)
    assert crowd.store.deadline_ns == 1000
    crowd.steady_ns = 999
    crowd.turn()
    assert crowd.one.replies == {}
    crowd.steady_ns = 1000
    crowd.turn()
    failed = crowd.one.take(waiting, Failed)
    assert (failed.failure, failed.requested_bytes) == (Failure.FULL, 16384)
    assert not crowd.store.has_waiters
    assert not crowd.wake_word
    crowd.one.put(B)


def test_who_is_interrupted_leaves_the_queue(crowd: Crowded) -> None:
    """It asks for an answer, gets a refusal, and its slot is its own again."""
    waiting = crowd.wait_for(crowd.one, B)
    crowd.one.tell(AnswerNow(waiting))
    crowd.turn()
    crowd.one.take(waiting, Failed)
    assert not crowd.store.has_waiters
    crowd.one.tell(AnswerNow(waiting))
    crowd.turn()
    crowd.store.check()


@pytest.mark.parametrize("how", ["dies", "detaches", "is dropped"])
def test_who_goes_leaves_the_queue(crowd: Crowded, how: str) -> None:
    """However a client ends, it waits no more, and gets nothing that others may have."""
    crowd.wait_for(crowd.one, B, CAPACITY)
    behind = crowd.wait_for(crowd.other, C)
    match how:
        case "dies":
            crowd.disconnect(crowd.one)
        case "detaches":
            crowd.one.ask(Detach(), Done)
        case _:
            crowd.deliver_body(crowd.one, 4711, 99, b"")
            assert crowd.one.dropped
    crowd.let_go()
    crowd.other.take(behind, Created)
    assert not crowd.store.has_waiters
    crowd.store.check()


def test_an_id_that_is_taken_meanwhile_ends_the_wait(crowd: Crowded) -> None:
    """Two wait with one id: the second is told so as soon as the first has it."""
    first = crowd.wait_for(crowd.one, B, CAPACITY)
    second = crowd.wait_for(crowd.other, B, CAPACITY)
    crowd.let_go()
    crowd.one.take(first, Created)
    crowd.turn()
    assert crowd.other.take(second, Failed).failure is Failure.EXISTS
    waiting = crowd.wait_for(crowd.other, B)
    assert crowd.other.take(waiting, Failed).failure is Failure.EXISTS, "it is told at once"


def test_what_cannot_come_is_not_waited_for(crowd: Crowded) -> None:
    """An object larger than the store, one beyond the client's limit, and one for which there is no memory."""
    for_ever = crowd.wait_for(crowd.one, B, CAPACITY + 1)
    assert crowd.one.take(for_ever, Failed).failure is Failure.FULL
    crowd.one.ask(SetOptions(1000, "limited"), Done)
    waiting = crowd.wait_for(crowd.one, B, 1001)
    assert crowd.one.take(waiting, Failed).failure is Failure.OVER_QUOTA
    talk = Conversation(CAPACITY)
    talk.memory.refuse_from = talk.layout.data
    peer = talk.client()
    waiting = peer.post(Create(B, 1000, 0, 0, peer.free_slots.pop(), False, FOR_EVER))
    talk.turn()
    assert "free some memory" in peer.take(waiting, Failed).text


def test_a_limit_counts_when_the_room_comes(crowd: Crowded) -> None:
    """Who has got a limit meanwhile, or has used it up, is refused and not served."""
    waiting = crowd.wait_for(crowd.one, B)
    crowd.one.ask(SetOptions(16383, "limited"), Done)
    crowd.let_go()
    failed = crowd.one.take(waiting, Failed)
    assert (failed.failure, failed.limit_bytes) == (Failure.OVER_QUOTA, 16383)
    assert not crowd.store.has_waiters


@pytest.mark.parametrize(("request_id", "again"), [(0, False), (7, True)])
def test_a_wait_that_cannot_be_answered_costs_the_connection(
    crowd: Crowded, request_id: int, again: bool
) -> None:
    """One-way, or under a request id that waits already."""
    for _ in range(1 + again):
        assert not crowd.one.dropped
        request = Create(B, 16384, 0, 0, crowd.one.free_slots.pop(), False, FOR_EVER)
        crowd.deliver(crowd.one, request, request_id)
    assert crowd.one.dropped
    assert not crowd.store.has_waiters


def test_a_slot_that_waits_is_not_lent_again(crowd: Crowded) -> None:
    """Each waiting request has a slot of its own, so that their number has an end."""
    crowd.wait_for(crowd.one, B)
    slot = crowd.one.free_slots[-1] - 1
    crowd.one.post(Create(C, 1, 0, 0, slot))
    assert crowd.one.dropped


def test_leases_come_back_for_those_who_wait_and_none_is_granted() -> None:
    """A lease is recalled, also one whose client comes to rest later; who asks for another goes by create."""
    crowd = Crowded(4 << 20, left=65536)
    lease = crowd.other.ask(AskLease(100), Leased)
    assert lease.size_bytes == 16384
    busy = crowd.other.free_slots[-1] // 512 * 512 + BUSY_WORD
    crowd.write_slot(busy, 1)
    waiting = crowd.wait_for(crowd.one, B, 65536)
    assert crowd.one.replies == {}
    assert crowd.store.may_miss_a_release, "it says nothing when it comes to rest"
    crowd.other.write(Publish(C, lease.offset, 100, 0, 0))
    crowd.write_slot(busy, 0)
    crowd.turn()
    crowd.one.take(waiting, Created)
    assert crowd.ids() == {A, B}, "what was published could go"
    crowd.wait_for(crowd.one, D)
    assert crowd.other.ask(AskLease(100), Leased).size_bytes == 0
    crowd.store.check()


def test_a_store_that_recovers_serves_who_asks_again(crowd: Crowded) -> None:
    """Nothing of the queue outlives the store; the WAKE word that it has left is taken down."""
    crowd.wait_for(crowd.one, B)
    assert crowd.wake_word
    parts = Parts(
        crowd.layout,
        bytes(16),
        crowd.words,
        crowd.raw,
        "posix",
        "/segment",
        crowd.memory,
        lambda: 0,
    )
    store = ObjectStore(parts)
    store.recover(lambda *_: True, crowd.now_ns)
    assert not store.has_waiters
    assert not crowd.wake_word
    store.check()


# -- what a refusal says ---------------------------------------------------------------------------


def test_a_refusal_says_how_the_room_is_used() -> None:
    """All figures are numbers of the reply and stand in its text, and the largest holders with them."""
    talk = Conversation(CAPACITY)
    one, other = talk.client("one"), talk.client("o\nther")
    for object_id, size in ((A, 1000), (B, 2000), (C, 30_000)):
        other.put(object_id, size)
    other.ask(Keep(True, [A, B]), Done)
    other.get(A)
    other.get(C)
    one.create(D, 500)
    talk.now_ns += 5_000_000_000
    failed = one.ask(one.new(name(9), CAPACITY), Failed)
    assert failed.failure is Failure.FULL
    assert failed.requested_bytes == CAPACITY
    assert failed.free_bytes == failed.largest_bytes == CAPACITY - 1024 - 2048 - 30_016 - 512
    assert (failed.pinned_bytes, failed.unsealed_bytes) == (31_500, 500)
    assert (failed.leased_bytes, failed.kept_bytes, failed.spillable_bytes) == (0, 3000, 2000)
    figures = ("65536", "31936", "31500", "500", "3000", "2000")
    assert all(f" {figure}" in failed.text or f"({figure}" in failed.text for figure in figures)
    first, second = failed.holders
    assert first[:4] == ("o\nther", 4711, "", 31_000)
    assert second[:4] == ("one", 4711, "", 500)
    assert first.age_seconds >= 5
    assert "o?ther (pid 4711) holds 31000 bytes, connected for 5 s" in failed.text


def test_the_sum_of_what_is_kept_is_known() -> None:
    """Also after some were cached or deleted, and at a successor: a refusal does not look at all of them."""
    talk = Conversation(CAPACITY)
    peer = talk.client()
    for number, object_id in enumerate((A, B, C, D)):
        peer.put(object_id, 1000 * (number + 1))
    peer.ask(Keep(True, [A, B, C, D]), Done)
    peer.ask(Keep(False, [A]), Done)
    peer.ask(Delete([B]), Done)
    peer.get(C)
    for each in (talk, Reopened(talk.layout, talk.words, talk.raw)):
        assert each.store._parts.room.residents.kept_bytes == 7000
        other = each.client()
        failed = other.ask(other.new(name(9), CAPACITY + 1), Failed)
        assert (failed.kept_bytes, failed.spillable_bytes) == (7000, 4000)
        each.store.check()


def test_a_refusal_has_an_end() -> None:
    """Five holders at most, and names and commands are cut: a reply is no longer for a thousand clients."""
    talk = Conversation(1 << 20)
    for number in range(64):
        talk._connections += 1
        talk.store.connect(talk._connections, 1, 1, 0, command="ä" * 100_000)
        peer = talk.peers[talk._connections] = Peer(talk, talk._connections)
        peer.hello(text="ö" * 127)
        peer.create(name(number), 100 + number)
    last = talk.client()
    reply = last.ask(last.new(name(1000), 2 << 20), Failed)
    assert [holder.held_bytes for holder in reply.holders] == [163, 162, 161, 160, 159]
    assert all(len(holder.command.encode()) <= 255 for holder in reply.holders)
    assert len(reply.encode()) < 8000
    assert isinstance(reply.holders[0], Holder)


def test_a_default_limit_holds_for_who_has_none() -> None:
    """A client's own limit takes its place, 0 brings it back, and leases are for those without."""
    talk = Conversation(1 << 20)
    parts = Parts(
        talk.layout,
        bytes(16),
        talk.words,
        talk.raw,
        "posix",
        "/segment",
        talk.memory,
        lambda: 0,
        client_limit_bytes=1000,
    )
    talk.store = ObjectStore(parts)
    peer = talk.client()
    assert peer.ask(AskLease(10), Leased).size_bytes == 0
    failed = peer.ask(peer.new(A, 1001), Failed)
    assert failed.failure is Failure.OVER_QUOTA
    assert (failed.limit_bytes, failed.held_bytes, failed.requested_bytes) == (1000, 0, 1001)
    peer.ask(SetOptions(2000, "me"), Done)
    peer.create(A, 2000)
    peer.ask(SetOptions(0, "me"), Done)
    assert peer.refused(peer.new(B, 1)) is Failure.OVER_QUOTA


def test_what_can_never_come_does_not_wait(crowd: Crowded) -> None:
    """A creation larger than the store, or than its client's limit, is refused, also while others wait for room."""
    waiting = crowd.wait_for(crowd.one, B)
    too_large = crowd.wait_for(crowd.other, C, CAPACITY + 1)
    assert "larger than the store" in crowd.other.take(too_large, Failed).text
    crowd.other.ask(SetOptions(1000, "limited"), Done)
    beyond_its_limit = crowd.wait_for(crowd.other, C, 2000)
    assert crowd.other.take(beyond_its_limit, Failed).limit_bytes == 1000
    crowd.let_go()
    crowd.one.take(waiting, Created)
    crowd.store.check()


def test_who_has_waited_for_an_entry_hears_so() -> None:
    """The reason is the one that was found when there was no room, not that of another want."""
    talk = Conversation(CAPACITY)
    peer = talk.client()
    for number in range(talk.layout.n_entries):
        slot = peer.free_slots.pop()
        peer.ask(Create(name(number), 0, 0, 0, slot), Created)
        peer.release(slot)
    request_id = peer.post(peer.new(name(99_999), 64)._replace(timeout_ns=1000))
    talk.turn()
    talk.steady_ns += 10**6
    talk.turn()
    assert "the object table is full" in peer.take(request_id, Failed).text


def busy_in_a_lease(talk: Conversation, peer: Peer) -> int:
    """Have a client say that it is putting something into its lease; return the word that says so."""
    peer.ask(AskLease(100), Leased)
    busy = talk.layout.boards // 8 + peer.free_slots[-1] // 512 * 512 + BUSY_WORD
    talk.words[busy] = 1
    return busy


def test_who_uses_a_slot_twice_is_dropped_also_when_it_is_found_late() -> None:
    """A creation that is kept back names a slot that a get waits with by the time it is tried again."""
    talk = Conversation(1 << 24)
    holder, peer = talk.client(), talk.client()
    holder.create(A, (1 << 24) - (1 << 20))
    busy_in_a_lease(talk, peer)
    slot = peer.free_slots.pop()
    peer.post(Create(B, 1 << 20, 0, 0, slot))
    talk.settle()
    assert peer.dropped is None
    peer.post(Get(True, [C], [slot]))
    talk.settle()
    assert "slot" in str(peer.dropped)
    assert holder.dropped is None
    talk.store.check()


def test_an_interrupt_is_not_lost_while_a_creation_is_kept_back() -> None:
    """A creation whose id somebody has locked is answered when that is over, if its client waits no more."""
    talk = Conversation(1 << 20)
    other, holder, peer = talk.client(), talk.client(), talk.client()
    busy = busy_in_a_lease(talk, other)
    talk.memory.locked.add(crc32(A))
    holder.create(B, 900_000)
    request_id = peer.post(peer.new(A, 500_000)._replace(timeout_ns=FOR_EVER))
    talk.settle()
    peer.tell(AnswerNow(request_id))
    talk.settle()
    talk.words[busy] = 0
    talk.memory.locked.clear()
    talk.turn()
    assert "store is full" in peer.take(request_id, Failed).text
    talk.store.check()


class Parted(Conversation):
    """A full store in the middle of which lies a lease, whose client is in the midst of a put; few objects go at once.

    Attributes
    ----------
    size_bytes : int
        How large the object is for which all others go.
    busy : int
        The word that says what the lease's client does.
    """

    def __init__(self) -> None:
        super().__init__(1 << 20)
        peer, other = self.client(), self.client()
        for number in range(16):
            peer.put(name(number), 16384)
        self.busy = busy_in_a_lease(self, other)
        number = 16
        while self.store._room.free_bytes:
            peer.put(name(number), min(16384, self.store._room.free_bytes))
            number += 1
        self.store._room.most_at_once = 4
        self.size_bytes = self.store._room.attainable_bytes


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_creation_for_which_many_objects_go_waits_for_leases(comes_back: bool) -> None:
    """It is not refused for want of what is about to come back; when its client does not stir any more, it is."""
    talk = Parted()
    one = talk.client()
    asked = one.post(one.new(name(100), talk.size_bytes))
    for _ in range(100):
        assert talk.store.has_unsettled, "the store does not look any more"
        talk.settle()
        talk.carry_out(talk.store.offer_room(0, talk.now_ns))
        assert asked not in one.replies
    assert talk.ids() == set(), "all has gone that could"
    if comes_back:
        talk.words[talk.busy] = 0
    talk.turn()
    if comes_back:
        one.take(asked, Created)
    else:
        assert one.take(asked, Failed).leased_bytes == 16384
    talk.store.check()
