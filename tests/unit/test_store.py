from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any
from zlib import crc32

import pytest

from shmplasma import outgoing
from shmplasma.commitment import COMMIT_STEP
from shmplasma.effects import Descriptor, Replay, Send
from shmplasma.errors import CommitError
from shmplasma.layout import (
    BOARD_BYTES,
    BOARD_WORDS,
    CONTROL_BYTES,
    ControlWord,
    EntryState,
    EntryWord,
    HeaderWord,
)
from shmplasma.leases import BUSY_WORD, MIN_LEASE_BYTES, largest_object
from shmplasma.offset_pins import pin_word
from shmplasma.outbox import ANNOUNCED_AT, PLACES, RECORDS
from shmplasma.pins import slots_of
from shmplasma.posted import Abort, Claim, Detach, Publish, Seal
from shmplasma.protocol import MAX_REPLY_BYTES, PROTOCOL_VERSION, Frame
from shmplasma.replies import (
    ABSENT,
    Created,
    Done,
    Failed,
    Failure,
    Leased,
    Listing,
    Number,
    Objects,
    Reply,
    Text,
    Welcome,
)
from shmplasma.reports import notification
from shmplasma.requests import (
    MAX_KEPT_IDS,
    AnswerNow,
    AskLease,
    Attach,
    Contains,
    Create,
    Debug,
    Delete,
    Evict,
    Flush,
    Get,
    Grow,
    Hello,
    Keep,
    List,
    Post,
    Request,
    Role,
    SetOptions,
)
from tests.conversation import TOKEN, Conversation, Peer, ids_of, name, records
from tests.crash.damage import Reopened

A, B, C = (bytes([letter]) * 20 for letter in (0xA, 0xB, 0xC))
MAX = (1 << 63) - 1


@pytest.fixture
def talk() -> Conversation:
    """Return a store of 64 KiB that nobody has talked to."""
    return Conversation()


def flags(peer: Peer, *object_ids: bytes) -> list[int]:
    """Return for each object whether the store says that it is there."""
    return [peer.ask(Contains(object_id), Number).value for object_id in object_ids]


# -- Hello -----------------------------------------------------------------------------------------


def test_a_client_learns_what_it_needs(talk: Conversation) -> None:
    """The welcome names token, board and segment, and brings the descriptor for wake-ups."""
    peer = talk.connect()
    welcome = peer.hello()
    assert (welcome.token, welcome.board) == (TOKEN, 0)
    assert (welcome.segment_kind, welcome.segment_path) == ("posix", "/segment")
    assert welcome.fast_path
    assert peer.descriptors == [Descriptor.WAKE]
    assert talk.connect().hello().board == 1


def test_without_a_barrier_no_client_takes_the_fast_path(talk: Conversation) -> None:
    """Who pins without a message relies on the store's barrier, so the welcome says what there is."""
    talk.memory.has_barrier = False
    assert not talk.connect().hello().fast_path


def test_a_subscriber_gets_no_board(talk: Conversation) -> None:
    """It pins nothing and wakes nobody, so it takes nothing from those who do."""
    subscriber = talk.connect()
    subscriber.hello(Role.SUBSCRIBER)
    assert subscriber.descriptors == []
    assert talk.connect().hello().board == 0


def test_another_protocol_version_is_told_so_and_dropped(talk: Conversation) -> None:
    """The reply names both versions and the remedy; then the connection ends, and only that."""
    other = talk.client()
    peer = talk.connect()
    request_id = peer.post(Hello(PROTOCOL_VERSION + 1, Role.CLIENT, ""))
    failed = peer.take(request_id, Failed)
    assert failed.failure is Failure.VERSION
    assert f"client version {PROTOCOL_VERSION + 1}; run the same release" in failed.text
    assert peer.dropped == f"it speaks protocol version {PROTOCOL_VERSION + 1}"
    assert flags(other, A) == [0]


HELLO = Hello(PROTOCOL_VERSION, Role.CLIENT, "")
SUBSCRIBE = Hello(PROTOCOL_VERSION, Role.SUBSCRIBER, "")
ANY_REQUESTS: list[Request] = [
    Attach(),
    Create(A, 1, 1, 0, 1),
    Seal(A),
    Abort(A),
    Get(False, [], []),
    AnswerNow(1),
    Contains(A),
    Delete([A]),
    Evict(1),
    List(0),
    SetOptions(1, ""),
    Debug(),
    Grow(),
    Detach(),
    AskLease(1),
    Publish(A, 4096, 1, 1, 0),
    Flush(),
]


def of_no_greeting(talk: Conversation) -> Peer:
    """Return a connection that has not said Hello."""
    return talk.connect()


def of_a_subscriber(talk: Conversation) -> Peer:
    """Return a subscriber's connection, on which nothing more is to be said."""
    return talk.subscriber()


def of_a_detached_client(talk: Conversation) -> Peer:
    """Return the connection of a client that has left."""
    peer = talk.client()
    peer.ask(Detach(), Done)
    return peer


@pytest.mark.parametrize("request_", ANY_REQUESTS, ids=lambda request: type(request).__name__)
def test_a_request_after_the_leave_is_passed_over(talk: Conversation, request_: Request) -> None:
    """A thread that has not noticed yet that its client has left costs nobody anything."""
    other = talk.client()
    other.put(B)
    peer = of_a_detached_client(talk)
    peer.post(request_)
    talk.turn()
    assert peer.dropped is None
    assert peer.replies == {}
    assert flags(other, A, B) == [0, 1]
    talk.store.check()


@pytest.mark.parametrize("connection", [of_no_greeting, of_a_subscriber])
@pytest.mark.parametrize("request_", ANY_REQUESTS, ids=lambda request: type(request).__name__)
def test_a_request_at_the_wrong_point_drops_only_the_sender(
    talk: Conversation, connection: Callable[[Conversation], Peer], request_: Request
) -> None:
    """Before Hello, and from a subscriber, no request is answered."""
    other = talk.client()
    other.put(B)
    peer = connection(talk)
    peer.post(request_)
    talk.turn()
    assert peer.dropped == f"{type(request_).__name__} on a connection of no client"
    assert peer.replies == {}
    assert flags(other, A, B) == [0, 1]
    talk.store.check()


@pytest.mark.parametrize("hello", [HELLO, SUBSCRIBE])
@pytest.mark.parametrize("connection", [of_a_subscriber, Conversation.client])
def test_a_second_hello_drops_the_sender(
    talk: Conversation, connection: Callable[[Conversation], Peer], hello: Hello
) -> None:
    """A connection introduces itself once; subscribing twice stalls nobody."""
    peer = connection(talk)
    peer.post(hello)
    assert peer.dropped == "a second Hello"
    talk.store.check()


@pytest.mark.parametrize(
    ("kind", "body"), [(0, b""), (63, b""), (64, b""), (65535, b"x"), (1, b""), (3, b"short")]
)
@pytest.mark.parametrize("connection", [of_no_greeting, Conversation.client])
def test_garbage_drops_only_the_sender(
    talk: Conversation, connection: Callable[[Conversation], Peer], kind: int, body: bytes
) -> None:
    """Unknown kinds and malformed bodies cost the connection, and nobody else anything."""
    other = talk.client()
    peer = connection(talk)
    talk.deliver_frame(peer, Frame(kind, 1, body))
    assert peer.dropped is not None
    assert flags(other, A) == [0]
    talk.store.check()


def test_a_client_without_a_board_may_try_again(talk: Conversation) -> None:
    """When there is no memory for its board a client is refused, and served once there is."""
    peer = talk.connect()
    talk.memory.refuse_from = talk.layout.boards
    failed = peer.ask(HELLO, Failed)
    assert (failed.failure, failed.requested_bytes) == (Failure.FULL, BOARD_BYTES)
    assert "free some memory" in failed.text
    talk.memory.refuse_from = None
    peer.hello()
    talk.store.check()


# -- boards ----------------------------------------------------------------------------------------


def test_a_client_may_have_more_boards(talk: Conversation) -> None:
    """Slots of a second board can be lent like those of the first."""
    peer = talk.client()
    board = peer.ask(Grow(), Number).value
    assert board == 1
    peer.ask(Create(A, 1, 0, 0, board * 512 + 511), Created)
    assert talk.read_slot(1023) == 1
    talk.store.check()


def test_boards_run_out_for_the_one_who_asks(talk: Conversation) -> None:
    """Growing is refused while others may still come, and greeting when all boards are in use."""
    peer = talk.client()
    n_kept = talk.layout.n_boards // 8
    for _ in range(talk.layout.n_boards - n_kept):
        peer.ask(Grow(), Number)
    assert peer.refused(Grow()) is Failure.NO_BOARD
    for _ in range(n_kept - 1):
        talk.client()
    late = talk.connect()
    assert late.refused(HELLO) is Failure.NO_BOARD
    talk.subscriber()
    talk.disconnect(peer)
    late.hello()
    talk.store.check()


def test_the_segment_is_passed_on_request(talk: Conversation) -> None:
    """Who cannot see the segment's name gets its descriptor."""
    peer = talk.client()
    peer.ask(Attach(), Done)
    assert peer.descriptors == [Descriptor.WAKE, Descriptor.SEGMENT]


def test_a_client_attaches_once(talk: Conversation) -> None:
    """Descriptors under way are counted by the system, so one who does not read them is not to have many."""
    peer = talk.client()
    peer.ask(Attach(), Done)
    peer.post(Attach())
    assert peer.dropped == "a second Attach"
    assert len(peer.descriptors) == 2


WRONG_SLOTS = {"word 0": 0, "another's": 513, "nobody's": 1025, "no board's": 2**32 - 1, "used": 5}


@pytest.mark.parametrize("slot", WRONG_SLOTS.values(), ids=WRONG_SLOTS)
@pytest.mark.parametrize(
    "request_for",
    [
        lambda slot: Create(B, 1, 0, 0, slot),
        lambda slot: Get(True, [A, B], [7, slot]),
        lambda slot: Get(False, [A], [slot]),
    ],
    ids=["create", "blocked get", "get"],
)
def test_a_slot_that_is_not_free_and_ones_own_drops_the_sender(
    talk: Conversation, request_for: Callable[[int], Request], slot: int
) -> None:
    """Neither creation nor get writes to a slot that the client cannot lend."""
    peer, other = talk.client(), talk.client()
    other.put(A)
    peer.ask(Get(False, [A], [5]), Objects)
    before = talk.read_slot(slot) if slot < 2048 else 0
    peer.post(request_for(slot))
    assert peer.dropped is not None
    assert "lend" in peer.dropped
    if slot in {513, 1025}:
        assert talk.read_slot(slot) == before
    assert flags(other, A, B) == [1, 0]
    talk.store.check()


def test_a_slot_named_twice_drops_the_sender(talk: Conversation) -> None:
    """Two objects cannot be pinned by one word."""
    peer = talk.client()
    peer.post(Get(True, [A, B], [3, 3]))
    assert peer.dropped == "a get names slots that are not its to lend"
    talk.store.check()


# -- create, seal, abort ---------------------------------------------------------------------------


def test_an_object_lives_from_create_to_delete(talk: Conversation) -> None:
    """What was created and sealed is found with its place, sizes and codec, until it is deleted."""
    writer, reader = talk.client(), talk.client()
    offset = writer.ask(Create(A, 100, 20, 7, writer.free_slots[-1]), Created).offset
    assert talk.layout.data <= offset < talk.layout.segment_bytes
    assert reader.get(A)[0] == [ABSENT]
    assert flags(writer, A) == [0]
    writer.ask(Seal(A), Done)
    found, slots = reader.get(A)
    assert found == [(offset, 100, 20, 7)]
    assert talk.read_slot(slots[0]) == 1
    assert flags(reader, A) == [1]
    talk.write_slot(writer.free_slots[-1], 0)
    reader.release(slots[0])
    reader.ask(Delete([A]), Done)
    assert flags(reader, A) == [0]
    talk.store.check()


def test_refusals_name_their_reason(talk: Conversation) -> None:
    """Existing and unknown ids, double seals and what does not fit are refused, each with its code."""
    peer = talk.client()
    slot = peer.create(A)
    assert peer.refused(peer.new(A)) is Failure.EXISTS
    assert peer.refused(Seal(B)) is Failure.NOT_FOUND
    assert peer.refused(Abort(B)) is Failure.NOT_FOUND
    peer.ask(Seal(A), Done)
    assert peer.refused(Seal(A)) is Failure.SEALED
    peer.release(slot)
    assert peer.refused(Seal(A)) is Failure.NOT_FOUND
    assert peer.refused(peer.new(B, 65537)) is Failure.FULL
    assert flags(peer, B) == [0]
    assert peer.dropped is None
    talk.store.check()


def test_only_the_creator_may_seal_or_abort(talk: Conversation) -> None:
    """An unsealed object of another client does not exist for anyone else."""
    writer, other = talk.client(), talk.client()
    writer.create(A)
    assert other.refused(Seal(A)) is Failure.NOT_FOUND
    assert other.refused(Abort(A)) is Failure.NOT_FOUND
    assert other.refused(other.new(A)) is Failure.EXISTS
    writer.ask(Seal(A), Done)


def test_one_way_messages_are_not_answered(talk: Conversation) -> None:
    """A seal or an abort without a request id brings no reply, not even when it is refused."""
    peer = talk.client()
    peer.create(A)
    peer.create(B)
    for message in (Seal(A), Seal(A), Abort(B), Abort(B), Seal(C)):
        peer.tell(message)
    assert peer.replies == {}
    assert flags(peer, A, B) == [1, 0]
    assert peer.dropped is None


@pytest.mark.parametrize("sizes", [(-1, 0), (0, -1), (-1, 1), (-MAX - 1, MAX), (64, -64)])
def test_a_negative_size_drops_the_sender(talk: Conversation, sizes: tuple[int, int]) -> None:
    """Each size is checked, not only their sum."""
    peer, other = talk.client(), talk.client()
    peer.post(peer.new(A, *sizes))
    assert peer.dropped == f"an object of {sizes[0]}+{sizes[1]} bytes"
    other.put(A)
    talk.store.check()


@pytest.mark.parametrize("sizes", [(MAX, 0), (0, MAX), (MAX, MAX), (MAX - 64, 1), (1 << 62, 0)])
@pytest.mark.parametrize("limit_bytes", [0, 1 << 62, (1 << 64) - 1])
def test_a_size_near_the_largest_number_is_just_too_much(
    talk: Conversation, sizes: tuple[int, int], limit_bytes: int
) -> None:
    """No sum of sizes overflows anything: the store is full, or the limit is reached."""
    peer = talk.client()
    peer.ask(SetOptions(limit_bytes, ""), Done)
    failed = peer.ask(peer.new(A, *sizes), Failed)
    assert failed.failure in {Failure.FULL, Failure.OVER_QUOTA}
    assert failed.requested_bytes == sum(sizes)
    peer.put(A)
    talk.store.check()


def test_an_object_of_the_capacity_fits(talk: Conversation) -> None:
    """All of the store can be one object, metadata included, and one byte more cannot."""
    peer = talk.client()
    assert peer.refused(peer.new(A, 65536, 1)) is Failure.FULL
    slot = peer.create(A, 65500, 36)
    peer.create(B, 0, 0)
    assert peer.refused(peer.new(C, 1)) is Failure.FULL
    peer.tell(Seal(A))
    peer.release(slot)
    peer.create(C, 1)
    assert flags(peer, A) == [0]
    talk.store.check()


def test_an_object_of_no_bytes_is_found(talk: Conversation) -> None:
    """Size 0 is a size: get tells such an object from one that is not there."""
    peer = talk.client()
    peer.put(A, 0)
    found, _ = peer.get(A, B)
    assert found[0] != ABSENT
    assert found[0][1:] == (0, 0, 0)
    assert found[1] == ABSENT


def test_an_aborted_object_leaves_nothing(talk: Conversation) -> None:
    """Nobody is told of it, its id is free at once, and its room once the writer lets go."""
    watcher, peer = talk.subscriber(), talk.client()
    slot = peer.create(A, 65536)
    peer.ask(Abort(A), Done)
    assert peer.refused(peer.new(A, 64)) is Failure.FULL
    assert talk.wake_word == 1
    peer.release(slot)
    talk.wake()
    assert talk.wake_word == 0
    peer.create(A, 65536)
    assert watcher.notifications == []
    talk.store.check()


# -- get -------------------------------------------------------------------------------------------


def test_a_blocked_get_is_answered_by_the_last_seal(talk: Conversation) -> None:
    """It waits until all its objects are there, and each is pinned as it comes."""
    writer, reader = talk.client(), talk.client()
    writer.put(A)
    request = reader.wanted([A, B, C], wait=True)
    request_id = reader.post(request)
    talk.turn()
    pins = [talk.read_slot(slot) for slot in request.slots]
    assert pins == [1, 0, 0]
    writer.put(C)
    assert request_id not in reader.replies
    writer.put(B)
    found = reader.take(request_id, Objects).found
    assert ABSENT not in found
    assert len({talk.read_slot(slot) for slot in request.slots} - {0}) == 3
    assert writer.ask(Evict(MAX), Number).value == 0
    talk.store.check()


def test_a_get_that_misses_is_answered_after_a_drain(talk: Conversation) -> None:
    """Without waiting, a get says what is absent only when it has been settled."""
    peer = talk.client()
    peer.put(A)
    request_id = peer.post(peer.wanted([A, B]))
    assert peer.replies == {}
    talk.settle()
    assert [place != ABSENT for place in peer.take(request_id, Objects).found] == [True, False]


def test_a_get_that_finds_everything_is_answered_at_once(talk: Conversation) -> None:
    """No drain is waited for when nothing depends on one, not even for no objects at all."""
    peer = talk.client()
    peer.put(A)
    first, second = peer.post(peer.wanted([A, A])), peer.post(Get(True, [], []))
    assert ABSENT not in peer.take(first, Objects).found
    assert peer.take(second, Objects).found == []
    assert talk.store.take_unsettled() == []


@pytest.mark.parametrize("wait", [False, True])
def test_an_id_may_be_asked_for_twice_in_a_get(talk: Conversation, wait: bool) -> None:
    """Each mention has its own answer and its own pin, before and after the seal."""
    writer, reader = talk.client(), talk.client()
    request = reader.wanted([A, B, A], wait=wait)
    if not wait:
        writer.put(A)
        writer.put(B)
    request_id = reader.post(request)
    if wait:
        writer.put(A)
        writer.put(B)
    found = reader.take(request_id, Objects).found
    assert found[0] == found[2] != found[1]
    assert ABSENT not in found
    pins = [talk.read_slot(slot) for slot in request.slots]
    assert pins == [1, 2, 1]
    reader.release(request.slots[0])
    reader.ask(Delete([A]), Done)
    assert flags(reader, A) == [1]
    reader.release(request.slots[2])
    talk.wake()
    assert flags(reader, A) == [0]
    talk.store.check()


def test_answer_now_ends_a_wait_with_what_is_there(talk: Conversation) -> None:
    """The part that was found is pinned and told; the slots of the rest are the client's again."""
    writer, reader = talk.client(), talk.client()
    request = reader.wanted([A, B, A], wait=True)
    request_id = reader.post(request)
    writer.put(A)
    found = reader.answer_now(request_id)
    assert [place != ABSENT for place in found] == [True, False, True]
    pins = [talk.read_slot(slot) for slot in request.slots]
    assert pins == [1, 0, 1]
    writer.put(B)
    assert talk.read_slot(request.slots[1]) == 0
    assert reader.replies == {}
    talk.store.check()


def test_answer_now_comes_after_a_drain(talk: Conversation) -> None:
    """A seal that was sent before the wait ended is found, and the get is answered once."""
    writer, reader = talk.client(), talk.client()
    writer.create(A)
    request_id = reader.post(reader.wanted([A], wait=True))
    reader.tell(AnswerNow(request_id))
    assert reader.replies == {}
    writer.tell(Seal(A))
    assert ABSENT not in reader.take(request_id, Objects).found
    talk.settle()
    assert reader.replies == {}


def test_answer_now_for_no_get_does_nothing(talk: Conversation) -> None:
    """A get that was answered, one that never was, and that of another client are not affected."""
    reader, other = talk.client(), talk.client()
    request_id = other.post(other.wanted([A], wait=True))
    reader.tell(AnswerNow(request_id))
    reader.tell(AnswerNow(12345))
    talk.settle()
    assert reader.dropped is None
    assert other.replies == {}
    other.put(A)
    assert other.replies.keys() == {request_id}


def test_a_get_without_a_request_id_of_its_own_drops_the_sender(talk: Conversation) -> None:
    """A one-way get, or one under the id of a get that waits, could never be answered properly."""
    first, second = talk.client(), talk.client()
    first.tell(first.wanted([A], wait=True))
    assert first.dropped == "a get under the request id 0"
    request_id = second.post(second.wanted([A], wait=True))
    talk.deliver(second, second.wanted([B], wait=True), request_id)
    assert second.dropped == f"a get under the request id {request_id}"
    talk.store.check()


def test_many_wait_for_one_object(talk: Conversation) -> None:
    """One seal answers all who wait for it, in the order in which they came."""
    writer, *readers = (talk.client() for _ in range(5))
    for reader in readers:
        reader.post(reader.wanted([A], wait=True))
    writer.put(A)
    assert [list(reader.replies) for reader in readers] == [[2]] * 4
    assert records(writer.ask(List(0), Listing))[0].holders == 4
    talk.store.check()


# -- delete, evict ---------------------------------------------------------------------------------


def test_a_delete_waits_for_the_last_release(talk: Conversation) -> None:
    """Until then the object is there for everybody, new gets included, and its id is taken."""
    watcher, first, second = talk.subscriber(), talk.client(), talk.client()
    first.put(A)
    (slot,) = first.get(A)[1]
    second.ask(Delete([A, B]), Done)
    assert flags(second, A) == [1]
    assert second.refused(second.new(A)) is Failure.EXISTS
    (later,) = second.get(A)[1]
    first.release(slot)
    talk.wake()
    assert flags(first, A) == [1]
    assert talk.wake_word == 1
    second.release(later)
    talk.wake()
    assert flags(first, A) == [0]
    assert talk.wake_word == 0
    assert watcher.notifications == [(A, 64, 0), (A, -1, -1)]
    talk.store.check()


def test_a_release_is_seen_by_the_next_request(talk: Conversation) -> None:
    """A client that deletes, lets go and asks again is not told of the old object.

    The wake-up goes another way than the messages, so it may come after them.
    """
    peer = talk.client()
    peer.put(A)
    (slot,) = peer.get(A)[1]
    peer.ask(Delete([A]), Done)
    peer.release(slot)
    assert flags(peer, A) == [0]
    peer.put(A)
    (slot,) = peer.get(A)[1]
    peer.ask(Delete([A]), Done)
    peer.release(slot)
    peer.create(A)
    talk.store.check()


def test_released_room_can_be_had_before_the_wake_up(talk: Conversation) -> None:
    """A client that aborts, lets go and creates again does not meet a full store."""
    peer = talk.client()
    slot = peer.create(A, 65536)
    peer.ask(Abort(A), Done)
    peer.release(slot)
    peer.create(B, 65536)
    talk.store.check()


def test_deleting_what_is_not_sealed_does_nothing(talk: Conversation) -> None:
    """Missing and unsealed objects are passed over; the answer is the same."""
    peer = talk.client()
    peer.create(A)
    peer.ask(Delete([A, B, A]), Done)
    peer.ask(Delete([]), Done)
    peer.ask(Seal(A), Done)
    assert flags(peer, A) == [1]


def test_evict_tells_how_much_went(talk: Conversation) -> None:
    """Data and metadata count, pinned objects stay, and nothing or less frees nothing."""
    watcher, peer = talk.subscriber(), talk.client()
    peer.put(A, 100, 10)
    peer.put(B, 200)
    (slot,) = peer.get(A)[1]
    assert [peer.ask(Evict(n), Number).value for n in (0, -1, -MAX, 1, 1)] == [0, 0, 0, 200, 0]
    peer.release(slot)
    assert peer.ask(Evict(MAX), Number).value == 110
    assert watcher.notifications[2:] == [(B, -1, -1), (A, -1, -1)]
    talk.store.check()


def test_an_eviction_of_a_doomed_object_is_its_end(talk: Conversation) -> None:
    """A creation may take the room of a deleted object before its release was noticed, and nobody dies of it."""
    watcher, peer = talk.subscriber(), talk.client()
    peer.put(A, 65536)
    (slot,) = peer.get(A)[1]
    peer.ask(Delete([A]), Done)
    peer.release(slot)
    peer.put(B, 65536)
    talk.wake()
    assert flags(peer, A, B) == [0, 1]
    assert watcher.notifications == [(A, 65536, 0), (A, -1, -1), (B, 65536, 0)]
    assert talk.wake_word == 0
    talk.store.check()


def test_who_keeps_too_many_at_once_is_dropped(talk: Conversation) -> None:
    """All of them would be looked at in one turn."""
    peer = talk.client()
    ids = [name(number) for number in range(MAX_KEPT_IDS + 1)]
    assert peer.refused(Keep(True, ids[1:])) is Failure.NOT_FOUND
    peer.post(Keep(True, ids))
    assert peer.dropped is not None
    assert str(MAX_KEPT_IDS) in peer.dropped


@pytest.mark.parametrize("request_", [Delete([A, B, A]), Keep(True, [A, B, A])])
def test_what_is_let_go_while_others_are_looked_for_is_not_gone_twice(
    talk: Conversation, request_: Delete | Keep
) -> None:
    """Of deleted objects one may lose its last holder just when another one is taken."""
    peer = talk.client()
    for object_id in (A, B, C):
        peer.put(object_id)
    first, second, third = (peer.get(object_id)[1][0] for object_id in (A, B, C))
    peer.ask(Delete([A, B, C]), Done)
    peer.release(third)
    talk.memory.at_barrier = lambda: talk.write_slot(first, 0)
    peer.ask(request_, Done)
    talk.store.check()
    peer.release(second)
    talk.wake()
    assert flags(peer, A, B, C) == [0, 0, 0]
    talk.store.check()


def test_room_is_made_for_a_creation(talk: Conversation) -> None:
    """Objects that nobody uses go, those that were read later than others, those in use never."""
    peer = talk.client()
    for n in range(16):
        peer.put(name(n), 4096)
    peer.release(peer.get(name(0))[1][0])
    held = peer.get(name(1))[1]
    peer.put(A, 8192)
    assert flags(peer, *map(name, range(6))) == [1, 1, 0, 0, 1, 1]
    assert peer.refused(peer.new(B, 65536)) is Failure.FULL
    peer.release(held[0])
    peer.put(B, 65536)
    talk.store.check()


# -- order -----------------------------------------------------------------------------------------


def test_what_was_sealed_before_a_question_is_found(talk: Conversation) -> None:
    """Negative answers wait until all outboxes are read: a seal that is in one changes them all."""
    writer, reader = talk.client(), talk.client()
    writer.create(A)
    questions: list[Request] = [Contains(A), reader.wanted([A]), List(0), Delete([A])]
    ids = [reader.post(question) for question in questions]
    unsettled = talk.store.take_unsettled()
    assert reader.replies == {}
    writer.tell(Seal(A))
    assert list(reader.replies) == [ids[1]], "the get is answered by the seal"
    talk.settle(unsettled)
    assert reader.take(ids[0], Number).value == 1
    assert ABSENT not in reader.take(ids[1], Objects).found
    assert records(reader.take(ids[2], Listing))[0].sealed
    reader.take(ids[3], Done)
    assert reader.replies == {}
    assert talk.wake_word == 1, "the delete has found the object, which is pinned"


@pytest.mark.parametrize(
    "request_",
    [Contains(A), Get(False, [A], [9]), Delete([A]), Evict(1), List(0), Debug()],
    ids=lambda request: type(request).__name__,
)
def test_unsettled_requests_are_answered_by_settle_alone_and_once(
    talk: Conversation, request_: Request
) -> None:
    """Nothing but the drain answers them: no other request, no wake-up, no commit of memory."""
    peer, other = talk.client(), talk.client()
    request_id = peer.post(request_)
    other.post(other.new(B))
    talk.advance()
    other.tell(Seal(B))
    other.post(Flush())
    talk.wake()
    assert len(other.replies) == 2
    assert peer.replies == {}
    unsettled = talk.store.take_unsettled()
    assert len(unsettled) == 1
    talk.settle([])
    assert peer.replies == {}
    talk.settle(unsettled)
    assert list(peer.replies) == [request_id]
    talk.settle()
    talk.store.check()


def test_who_deletes_does_not_wait_for_the_memory(talk: Conversation) -> None:
    """He is answered when nobody finds the objects any more; the barrier and all that follows come after that."""
    peer, other = talk.client(), talk.client()
    peer.put(A, 64)
    slot = peer.create(B)
    peer.tell(Seal(B))
    room = talk.store._parts.room
    free_before = room.free_bytes
    request_id, barriers = peer.post(Delete([A, B])), talk.memory.barriers
    talk.carry_out(talk.store.settle(talk.store.take_unsettled()))
    peer.take(request_id, Done)
    assert talk.memory.barriers == barriers
    table = talk.store._parts.table
    assert {table.state(table.find(object_id)) for object_id in (A, B)} == {EntryState.DOOMED}
    talk.carry_out(talk.store.settled())
    assert talk.memory.barriers > barriers
    assert room.free_bytes == free_before + 64
    assert talk.ids() == {B}
    assert talk.wake_word == 1
    talk.store.check()
    peer.release(slot)
    talk.wake()
    assert other.ask(Contains(B), Number).value == 0
    talk.store.check()


def test_what_follows_a_deletion_in_a_turn_finds_it_done(talk: Conversation) -> None:
    """Whoever asks, and whatever for: also whether to delete the same object once more."""
    peer, other = talk.client(), talk.client()
    subscriber = talk.subscriber()
    for object_id in (A, B):
        peer.put(object_id, 64)
    ids = [peer.post(Delete([A])), other.post(List(0))]
    ids += [peer.post(Delete([A, B])), other.post(Delete([B])), peer.post(Delete([B]))]
    talk.turn()
    peer.take(ids[0], Done)
    assert ids_of(other.take(ids[1], Listing)) == [B]
    for asker, request_id in zip((peer, other, peer), ids[2:], strict=True):
        asker.take(request_id, Done)
    gone = [object_id for object_id, *sizes in subscriber.notifications if sizes == [-1, -1]]
    assert gone == [A, B]
    talk.store.check()


def test_unsettled_requests_are_settled_in_order(talk: Conversation) -> None:
    """What a client asks one after the other is done one after the other."""
    peer = talk.client()
    peer.put(A)
    ids = [peer.post(request) for request in (List(0), Delete([A]), List(0), Evict(MAX))]
    talk.settle()
    assert len(records(peer.take(ids[0], Listing))) == 1
    assert len(records(peer.take(ids[2], Listing))) == 0
    assert peer.take(ids[3], Number).value == 0


def test_each_request_gets_one_reply(talk: Conversation) -> None:
    """Whatever is asked, refused or not, brings one reply under its id; `Peer` refuses a second."""
    peer = talk.client()
    slots = iter(range(100, 200))
    requests: list[Request] = [
        Attach(),
        Create(A, 1, 1, 0, next(slots)),
        Create(A, 1, 1, 0, next(slots)),
        Create(B, 1 << 40, 1, 0, next(slots)),
        Create(B, 64, 0, 0, next(slots)),
        Seal(A),
        Seal(A),
        Seal(C),
        Get(False, [A, C], [next(slots), next(slots)]),
        Get(True, [A], [next(slots)]),
        Contains(A),
        Contains(C),
        Abort(B),
        Abort(B),
        Delete([A]),
        Evict(1),
        List(0),
        List((1 << 64) - 1),
        SetOptions(1, "me"),
        Create(C, 2, 0, 0, next(slots)),
        Debug(),
        Grow(),
        AskLease(1),
        Flush(),
        Detach(),
    ]
    ids = []
    for request in requests:
        ids.append(peer.post(request))
        talk.turn()
    assert sorted(peer.replies) == ids
    assert peer.dropped is None
    talk.store.check()


# -- list, describe, options -----------------------------------------------------------------------


def test_the_list_tells_all_about_objects(talk: Conversation) -> None:
    """Sizes, holders, times and state, of unsealed objects too; what is in limbo is not there."""
    writer, reader = talk.client(), talk.client()
    writer.create(A, 10, 2)
    created = talk.now_ns
    writer.create(B, 3)
    writer.ask(Keep(True, [B]), Done)
    writer.tell(Seal(A))
    sealed = talk.now_ns
    reader.get(A, A)
    writer.create(C)
    writer.ask(Abort(C), Done)
    listing = writer.ask(List(0), Listing)
    assert listing.next_start == 0
    by_id = {record.object_id: record[1:] for record in records(listing)}
    assert by_id.keys() == {A, B}
    assert by_id[A] == (10, 2, 2, created, sealed - created, True, False)
    assert by_id[B][:3] == (3, 0, 1)
    assert by_id[B][4:] == (0, False, True)


def test_a_long_list_comes_in_parts() -> None:
    """Beyond 4096 objects each part says where the next begins; together they have everything once, and gaps cost no part."""
    talk = Conversation(2 << 20)
    peer = talk.client()
    for n in range(4300):
        peer.put(name(n), 0)
    peer.ask(Delete([name(n) for n in range(100)]), Done)

    def parts() -> tuple[list[int], list[bytes]]:
        starts: list[int] = []
        ids: list[bytes] = []
        start = 0
        while not starts or start:
            listing = peer.ask(List(start), Listing)
            starts.append(start)
            ids += ids_of(listing)
            start = listing.next_start
        return starts, ids

    assert parts() == ([0, 4196], [name(n) for n in range(100, 4300)])
    peer.ask(Delete([name(n) for n in range(100, 4250)]), Done)
    assert parts() == ([0], [name(n) for n in range(4250, 4300)])
    assert peer.ask(List(4300), Listing) == Listing(0, b"", b"")


def test_a_description_has_the_stores_figures(talk: Conversation) -> None:
    """What is used, pinned and awaited, and who is there, can be read from the text."""
    peer, _, _ = talk.client("writer"), talk.client(), talk.subscriber()
    peer.create(A, 1000)
    peer.put(B, 24)
    peer.get(B)
    peer.ask(Delete([B]), Done)
    lines = peer.ask(Debug(), Text).text.split("\n")
    assert lines[0] == "capacity bytes: 65536"
    figures = dict(line.split(": ", 1) for line in lines)
    assert figures["free bytes"] == figures["largest free extent"] == str(65536 - 1024 - 64)
    assert figures["committed bytes"] == "65536"
    assert (figures["pinned bytes"], figures["unsealed bytes"]) == ("1024", "1000")
    assert (figures["objects"], figures["pinned objects"]) == ("2", "2")
    assert figures["objects that wait for a release"] == "1"
    assert figures["evictions"] == "0"
    assert figures["clients"] == "writer (pid 4711), unnamed (pid 4711)"


def test_a_long_name_makes_no_description_that_cannot_be_sent(talk: Conversation) -> None:
    """Names are a client's own words: however long, they do not cost another client its connection."""
    for _ in range(5):
        talk.connect().post(Hello(PROTOCOL_VERSION, Role.CLIENT, "x" * ((2 << 20) - 100)))
    other = talk.connect()
    other.hello()
    assert len(talk.store.describe()) < MAX_REPLY_BYTES
    assert "capacity bytes" in other.ask(Debug(), Text).text


def test_a_limit_is_on_what_is_held(talk: Conversation) -> None:
    """A client over its limit is refused, as long as it holds so much; a limit of 0 is none."""
    peer = talk.client()
    peer.ask(SetOptions(200, "me"), Done)
    slot = peer.create(A, 150, 50)
    failed = peer.ask(peer.new(B, 1), Failed)
    assert (failed.failure, failed.requested_bytes) == (Failure.OVER_QUOTA, 1)
    peer.tell(Seal(A))
    assert peer.refused(peer.new(B, 1)) is Failure.OVER_QUOTA
    peer.release(slot)
    peer.create(B, 200)
    peer.ask(SetOptions(0, "me"), Done)
    peer.create(C, 1000)
    assert "me (pid 4711)" in peer.ask(Debug(), Text).text
    talk.store.check()


# -- subscribers -----------------------------------------------------------------------------------


def test_a_subscriber_is_told_of_seals_and_of_what_goes(talk: Conversation) -> None:
    """Creation and abort are nobody's business; each seal and each end is told once to everyone."""
    first, second, peer = talk.subscriber(), talk.subscriber(), talk.client()
    peer.create(A, 10, 5)
    peer.ask(Seal(A), Done)
    peer.create(B)
    peer.ask(Abort(B), Done)
    peer.put(C, 0)
    peer.ask(Delete([C]), Done)
    talk.disconnect(first)
    peer.put(B)
    assert second.notifications == [(A, 10, 5), (C, 0, 0), (C, -1, -1), (B, 64, 0)]
    assert first.notifications == second.notifications[:-1]


def test_a_new_subscriber_is_told_what_is_there(talk: Conversation) -> None:
    """All sealed objects are replayed, those in use and those that are doomed included."""
    peer = talk.client()
    peer.put(A, 1, 2)
    peer.create(B)
    peer.put(C, 3)
    peer.get(C)
    peer.ask(Delete([C]), Done)
    assert talk.subscriber().notifications == [(A, 1, 2), (C, 3, 0)]
    assert talk.subscriber().dropped is None


def test_a_subscription_begins_with_a_copy(talk: Conversation) -> None:
    """What is there is an effect of its own, so that it can wait for the subscriber; no later change is in it."""
    peer, watcher = talk.client(), talk.connect()
    for number in range(100):
        peer.put(name(number), number)
    hello = Hello(PROTOCOL_VERSION, Role.SUBSCRIBER, "")
    frame = Frame(Hello.KIND, 1, hello.encode())
    welcome, replay = talk.store.handle(watcher.number, frame, talk.now_ns)
    assert (type(welcome), type(replay)) == (Send, Replay)
    talk.disconnect(watcher)
    peer.ask(Delete([name(0)]), Done)
    assert replay == Replay(
        watcher.number, b"".join(notification(name(number), number, 0) for number in range(100))
    )


def test_a_subscription_takes_turns(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many entries are listed at a time; what changes meanwhile is told, each once, where that concerns what was listed."""
    monkeypatch.setattr(outgoing, "_LISTED_AT_ONCE", 3)
    peer, watcher = talk.client(), talk.connect()
    for number in range(8):
        peer.put(name(number), number)
    watcher._role = Role.SUBSCRIBER

    def put(object_id: bytes) -> None:
        request = peer.new(object_id)
        peer.take(peer.post(request), Created)
        peer.write(Seal(object_id))
        peer.release(request.slot)

    request_id = watcher.post(Hello(PROTOCOL_VERSION, Role.SUBSCRIBER, ""))
    for object_ids in [name(0), name(7)], [name(1)]:
        peer.post(Delete(object_ids))
        talk.settle()
    put(name(1))
    put(name(9))
    turns = 0
    while request_id not in watcher.replies:
        assert talk.store.upkeep.has_urgent_work
        talk.advance()
        turns += 1
    assert turns == 2
    assert not talk.store.is_quiet
    talk.turn()
    peer.put(name(10))
    there: set[bytes] = set()
    for object_id, data_size, _ in watcher.notifications:
        assert (object_id in there) == (data_size < 0)
        there ^= {object_id}
    assert there == talk.ids()
    assert name(7) not in [object_id for object_id, _, _ in watcher.notifications]
    peer.ask(Delete([name(2), name(9)]), Done)
    assert watcher.notifications[-3:] == [(name(10), 64, 0), (name(2), -1, -1), (name(9), -1, -1)]


def test_a_subscriber_that_leaves_before_it_is_answered(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody goes on with its list."""
    monkeypatch.setattr(outgoing, "_LISTED_AT_ONCE", 1)
    peer, watcher = talk.client(), talk.connect()
    for number in range(3):
        peer.put(name(number))
    watcher.post(Hello(PROTOCOL_VERSION, Role.SUBSCRIBER, ""))
    talk.disconnect(watcher)
    assert talk.store.is_quiet
    assert not talk.store.upkeep.has_urgent_work
    peer.put(name(3))


# -- leaving ---------------------------------------------------------------------------------------


def test_a_client_that_dies_loses_pins_and_unsealed_objects(talk: Conversation) -> None:
    """Nothing else goes with it, and its board is another's afterwards."""
    peer, other = talk.client(), talk.client()
    peer.put(A)
    peer.get(A)
    peer.create(B, 60000)
    talk.disconnect(peer)
    assert flags(other, A, B) == [1, 0]
    other.create(B, 60000)
    assert other.ask(Evict(1), Number).value == 64
    assert talk.connect().hello().board == 0
    talk.store.check()


def test_a_death_is_the_last_release(talk: Conversation) -> None:
    """Doomed objects that only the dead client held go at once."""
    watcher, peer, other = talk.subscriber(), talk.client(), talk.client()
    other.put(A)
    peer.get(A)
    other.ask(Delete([A]), Done)
    talk.disconnect(peer)
    assert watcher.notifications[-1] == (A, -1, -1)
    assert talk.wake_word == 0
    talk.store.check()


def waits_for_an_answer(talk: Conversation, peer: Peer) -> None:
    """Block in a get of which a part was found."""
    talk.client().put(A)
    peer.post(peer.wanted([A, B], wait=True))


def waits_for_a_drain(_: Conversation, peer: Peer) -> None:
    """Have requests of each kind unsettled."""
    for request in (Contains(A), peer.wanted([A]), Delete([A]), Evict(1), List(0), Debug()):
        peer.post(request)


def waits_for_memory(_: Conversation, peer: Peer) -> None:
    """Have a creation wait for its memory."""
    peer.post(peer.new(B, 5000))


def holds_what_was_deleted(_: Conversation, peer: Peer) -> None:
    """Hold a doomed object, and one in limbo."""
    peer.put(A)
    peer.get(A)
    peer.ask(Delete([A]), Done)
    peer.create(B)
    peer.ask(Abort(B), Done)


def has_seen_nothing(_: Conversation, __: Peer) -> None:
    """Just be there."""


def has_scribbled(talk: Conversation, peer: Peer) -> None:
    """Have pins that are none on the board."""
    peer.put(A)
    for slot, word in ((1, 1), (2, 2), (3, 1 << 63), (4, talk.layout.n_entries)):
        talk.write_slot(slot, word)


STATES = [
    has_seen_nothing,
    waits_for_an_answer,
    waits_for_a_drain,
    waits_for_memory,
    holds_what_was_deleted,
    has_scribbled,
]


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_a_connection_may_end_in_any_state(
    talk: Conversation, state: Callable[[Conversation, Peer], None], detached: bool
) -> None:
    """Nothing of it is left: all room can be had again, and nothing waits for anything."""
    peer = talk.client()
    state(talk, peer)
    if detached:
        peer.ask(Detach(), Done)
    talk.disconnect(peer)
    talk.turn()
    assert not talk.store.upkeep.has_urgent_work
    assert talk.wake_word == 0
    other = talk.client()
    assert other.free_slots[-1] == 1, "the board is granted anew"
    other.put(B, 65536)
    assert flags(other, A, B) == [0, 1]
    talk.store.check()


@pytest.mark.parametrize("role", [None, Role.SUBSCRIBER])
def test_a_connection_may_end_before_it_does_anything(
    talk: Conversation, role: Role | None
) -> None:
    """A connection without Hello, and a subscriber, leave nothing either."""
    peer = talk.connect()
    if role is not None:
        peer.hello(role)
    talk.disconnect(peer)
    talk.client().put(A)
    talk.store.check()


def test_a_detached_client_keeps_its_pins(talk: Conversation) -> None:
    """Buffers stay valid after the client was closed: nothing takes their memory away."""
    peer, other = talk.client(), talk.client()
    peer.put(A, 60000)
    (slot,) = peer.get(A)[1]
    created = peer.create(B, 1000)
    peer.ask(Detach(), Done)
    other.ask(Delete([A]), Done)
    assert flags(other, A, B) == [1, 0]
    assert other.refused(other.new(C, 60000)) is Failure.FULL
    assert other.refused(other.new(C, 5000)) is Failure.FULL
    talk.write_slot(created, 0)
    talk.write_slot(slot, 0)
    talk.wake()
    other.create(C, 65536)
    talk.store.check()


def test_a_detached_client_is_answered_no_more(talk: Conversation) -> None:
    """Gets that waited and requests that were unsettled end with the detachment, without a word."""
    peer, other = talk.client(), talk.client()
    peer.post(peer.wanted([A], wait=True))
    waits_for_a_drain(talk, peer)
    request_id = peer.post(Detach())
    other.put(A)
    talk.turn()
    assert list(peer.replies) == [request_id]
    assert peer.dropped is None
    talk.store.check()


def test_a_dropped_client_keeps_what_it_was_given(talk: Conversation) -> None:
    """Its process may still read and write there, so all that stays its own until it has gone."""
    peer, other = talk.client(), talk.client()
    peer.put(A, 1000)
    (slot,) = peer.get(A)[1]
    peer.create(B, 60000)
    peer.post(Hello(PROTOCOL_VERSION, Role.CLIENT, ""))
    assert peer.dropped is not None
    other.ask(Delete([A]), Done)
    assert talk.read_slot(slot) == 1
    assert flags(other, A, B) == [1, 0]
    assert other.refused(other.new(B)) is Failure.EXISTS
    assert other.refused(other.new(C, 60000)) is Failure.FULL
    talk.store.check()
    talk.disconnect(peer)
    assert flags(other, A, B) == [0, 0]
    other.create(C, 65536)
    talk.store.check()


@pytest.mark.parametrize("state", STATES)
def test_a_dropped_client_is_answered_no_more(
    talk: Conversation, state: Callable[[Conversation, Peer], None]
) -> None:
    """Whatever it waited for goes on without it, and when it has gone nothing of it is left."""
    peer, other = talk.client(), talk.client()
    state(talk, peer)
    peer.post(Hello(PROTOCOL_VERSION, Role.CLIENT, ""))
    assert peer.dropped is not None
    replies = dict(peer.replies)
    if flags(other, B) == [0]:
        other.put(B)
    talk.turn()
    talk.wake()
    assert peer.replies == replies
    talk.store.check()
    talk.disconnect(peer)
    talk.turn()
    assert not talk.store.upkeep.has_urgent_work
    assert talk.wake_word == 0
    other.put(C, 65536)
    talk.store.check()


def test_a_dropped_client_waits_for_no_memory() -> None:
    """What it was not told the place of goes at once, and what it claims after that takes nothing from what the store is at."""
    talk = Conversation(4 * COMMIT_STEP)
    peer, other = talk.client(), talk.client()
    lease = peer.ask(AskLease(1000), Leased)
    request = peer.new(A, 2 * COMMIT_STEP)
    peer.post(request)
    talk.advance()
    peer.post(Hello(PROTOCOL_VERSION, Role.CLIENT, ""))
    assert peer.dropped is not None
    assert not talk.store.upkeep.has_urgent_work
    assert talk.read_slot(request.slot) == 0
    talk.store.check()
    talk.memory.refuse_from = talk.layout.data + 2 * COMMIT_STEP
    slot = peer.free_slots.pop()
    talk.write_slot(slot, pin_word(crc32(B), lease.offset))
    peer.write_silently(Claim(B, lease.offset, 100, 0, 0, slot))
    assert other.refused(other.new(C, 3 * COMMIT_STEP)) is Failure.FULL
    assert flags(other, A, B) == [0, 0]
    talk.store.check()


# -- memory ----------------------------------------------------------------------------------------


def test_no_writer_is_told_of_memory_that_is_not_there() -> None:
    """A creation is answered once its memory is committed, a step at a time."""
    talk = Conversation(3 * COMMIT_STEP)
    peer = talk.client()
    request_id = peer.post(peer.new(A, 2 * COMMIT_STEP + 1))
    for _ in range(2):
        talk.advance()
        assert peer.replies == {}
    talk.advance()
    offset = peer.take(request_id, Created).offset
    data_commits = [commit for commit in talk.memory.commits if commit[0] >= talk.layout.data]
    assert data_commits == [(talk.layout.data + n * COMMIT_STEP, COMMIT_STEP) for n in range(3)]
    assert offset == talk.layout.data
    assert not talk.store.upkeep.has_urgent_work
    talk.store.check()


def test_memory_is_committed_while_nothing_is_to_do() -> None:
    """Ahead of need the store works towards a target, and nobody hears of it."""
    talk = Conversation(3 * COMMIT_STEP)
    talk.commit_ahead()
    assert talk.memory.has(talk.layout.data, 3 * COMMIT_STEP)
    peer = talk.client()
    request_id = peer.post(peer.new(A, 3 * COMMIT_STEP))
    assert not talk.store.upkeep.has_urgent_work
    peer.take(request_id, Created)


def test_a_refused_commit_ahead_of_need_is_the_callers_affair() -> None:
    """Nobody waits for it, so it is raised and not told to a client."""
    talk = Conversation(COMMIT_STEP)
    talk.memory.refuse_from = talk.layout.data
    assert not talk.store.commitment.is_ahead
    with pytest.raises(CommitError):
        talk.store.commitment.step_ahead()
    talk.store.check()


def test_a_refused_commit_is_a_full_store() -> None:
    """The creator learns what the file system said; its id, its slot and its room are free again."""
    talk = Conversation(3 * COMMIT_STEP)
    peer, other = talk.client(), talk.client()
    talk.memory.refuse_from = talk.layout.data + 2 * COMMIT_STEP
    request = peer.new(A, 3 * COMMIT_STEP - 100, 50)
    failed = peer.ask(request, Failed)
    assert failed.failure is Failure.FULL
    assert failed.requested_bytes == 3 * COMMIT_STEP - 50
    assert failed.free_bytes == 3 * COMMIT_STEP
    assert "free some memory" in failed.text
    assert talk.read_slot(request.slot) == 0
    other.create(A, 2 * COMMIT_STEP)
    assert not talk.store.upkeep.has_urgent_work
    talk.store.check()
    talk.memory.refuse_from = None
    peer.create(B, COMMIT_STEP)
    talk.store.check()


def test_creators_wait_for_memory_in_order() -> None:
    """Each is answered when its own object is committed, and a refusal of one is not the next one's."""
    talk = Conversation(3 * COMMIT_STEP)
    first, second = talk.client(), talk.client()
    one = first.post(first.new(A, 2 * COMMIT_STEP))
    two = second.post(second.new(B, COMMIT_STEP))
    talk.memory.refuse_from = talk.layout.data + COMMIT_STEP
    talk.turn()
    assert first.take(one, Failed).failure is Failure.FULL
    assert second.take(two, Failed).failure is Failure.FULL
    talk.memory.refuse_from = None
    second.create(A, 3 * COMMIT_STEP)
    talk.store.check()


def test_a_creator_that_leaves_does_not_hold_up_the_next(talk: Conversation) -> None:
    """Its turn passes, and the next one's memory is committed."""
    peer, other = talk.client(), talk.client()
    peer.post(peer.new(A, 1000))
    request_id = other.post(other.new(B, 1000))
    talk.disconnect(peer)
    talk.turn()
    other.take(request_id, Created)
    talk.store.check()


def test_what_waits_for_memory_cannot_be_sealed(talk: Conversation) -> None:
    """A client that seals before it was told where to write makes no object that others read without memory."""
    peer, reader = talk.client(), talk.client()
    peer.post(peer.new(A, 1000))
    talk.memory.refuse_from = talk.layout.data
    peer.post(Seal(A))
    found, _ = reader.get(A)
    assert found == [ABSENT], "an object without memory was handed out"
    talk.turn()
    talk.store.check()


def test_a_creation_that_is_aborted_while_it_waits_gets_its_reply(talk: Conversation) -> None:
    """Each request is answered, also the one that its client has taken back meanwhile."""
    peer = talk.client()
    create = peer.post(peer.new(A, 1000))
    abort = peer.post(Abort(A))
    talk.turn()
    assert set(peer.replies) == {create, abort}
    talk.store.check()


def test_a_creation_that_was_aborted_is_not_taken_for_a_later_one(talk: Conversation) -> None:
    """The place of a creation that waits may be used again by the same client: each gets its own reply."""
    peer = talk.client()
    first = peer.new(A, 1000)
    one = peer.post(first)
    peer.release(first.slot)
    peer.tell(Abort(A))
    two = peer.post(peer.new(B, 2000))
    talk.turn()
    assert isinstance(peer.replies.pop(two), Created)
    assert isinstance(peer.replies.pop(one, None), Failed)
    talk.store.check()


def test_a_creation_that_waits_is_not_another_clients_to_end(talk: Conversation) -> None:
    """Seal and abort of an object that somebody else waits for are refused, or cost the sender."""
    peer, other, third = talk.client(), talk.client(), talk.client()
    request_id = peer.post(peer.new(A, 1000))
    other.post(Abort(A))
    third.post(Seal(A))
    talk.turn()
    peer.take(request_id, Created)
    peer.ask(Seal(A), Done)
    talk.store.check()


def test_without_a_barrier_the_store_looks_for_releases_by_itself(talk: Conversation) -> None:
    """While something waits for a release that may not wake the store, it says so."""
    peer = talk.client()
    peer.put(A)
    (slot,) = peer.get(A)[1]
    peer.ask(Delete([A]), Done)
    with_barrier = talk.store.may_miss_a_release
    talk.memory.has_barrier = False
    without = talk.store.may_miss_a_release
    peer.release(slot)
    talk.wake()
    assert (with_barrier, without, talk.store.may_miss_a_release) == (False, True, False)


def test_an_object_of_no_bytes_waits_for_no_memory(talk: Conversation) -> None:
    """It is answered at once, with a place that nothing is written to."""
    talk.memory.refuse_from = None
    peer = talk.client()
    request_id = peer.post(peer.new(A, 0))
    assert not talk.store.upkeep.has_urgent_work
    peer.take(request_id, Created)


def test_a_full_table_refuses_and_the_client_goes_on() -> None:
    """With all entries in use a creation is refused; with one that may go it goes."""
    talk = Conversation(4096)
    peer = talk.client()
    for n in range(talk.layout.n_entries):
        if not peer.free_slots:
            board = peer.ask(Grow(), Number).value
            peer.free_slots = list(range(board * 512 + 1, board * 512 + 512))
        peer.post(peer.new(name(n), 0))
    board = peer.ask(Grow(), Number).value
    new = name(5000)
    failed = peer.ask(Create(new, 64, 0, 0, board * 512 + 1), Failed)
    assert failed.failure is Failure.FULL
    assert "4096 objects, all of them in use" in failed.text
    peer.tell(Seal(name(7)))
    for slot in range(1, 512):
        talk.write_slot(slot, 0)
    peer.ask(Create(new, 64, 0, 0, board * 512 + 1), Created)
    assert flags(peer, name(7)) == [0]
    talk.store.check()


# -- leases ----------------------------------------------------------------------------------------


class Tenant:
    """A client with a lease, in a store that is large enough for one."""

    def __init__(self, talk: Conversation) -> None:
        self.talk = talk
        self.peer = talk.client()
        self.board_word = talk.layout.boards // 8 + self.peer.free_slots[-1] - 1
        self.lease = self.peer.ask(AskLease(100), Leased)
        self.next = self.lease.offset

    def publish(self, object_id: bytes, size_bytes: int = 64) -> None:
        """Publish an object behind the last one."""
        self.peer.write(Publish(object_id, self.next, size_bytes, 0, 3))
        self.next += (size_bytes + 63) & -64

    def control(self, word: ControlWord) -> int:
        """Return a word of the board's control line."""
        board = (self.board_word - self.talk.layout.boards // 8) // 512
        return self.talk.words[(self.talk.layout.control + board * CONTROL_BYTES) // 8 + word]

    def set_busy(self, busy: bool) -> None:
        """Write the board's word that says whether an object is being made."""
        self.talk.words[self.board_word + BUSY_WORD] = busy


@pytest.fixture
def tenant() -> Tenant:
    """Return a client with a lease in a store of 1 MiB."""
    return Tenant(Conversation(1 << 20))


@pytest.fixture
def roomy() -> Tenant:
    """Return a client whose lease has room for more objects than its outbox has for records."""
    tenant = Tenant(Conversation(16 << 20))
    tenant.next = tenant.peer.ask(AskLease(64 * RECORDS), Leased).offset
    return tenant


def test_what_was_aborted_counts_as_long_as_its_writer_holds_it(tenant: Tenant) -> None:
    """Its room is not free, and he is who could give it back."""
    peer, objects = tenant.peer, tenant.talk.store._objects
    slot = peer.free_slots.pop()
    tenant.talk.write_slot(slot, pin_word(crc32(A), tenant.next))
    peer.write(Claim(A, tenant.next, 64, 0, 3, slot))
    peer.write(Abort(A))
    assert objects.bytes_of(objects.held_by(peer.number)) == 64
    tenant.talk.write_slot(slot, 0)
    assert not objects.held_by(peer.number)


def test_who_writes_on_and_on_keeps_nobody_waiting(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one outbox so many records are read that it may have held, before others have their turn."""
    peer = talk.client()
    posts, session = talk.store._posts, talk.store._greeter.sessions[peer.number]
    carry_out, written = posts._carry_out, count()

    def write_on(*arguments: Any) -> None:
        if next(written) < 2 * RECORDS:
            peer.write_silently(Seal(A))
        carry_out(*arguments)

    monkeypatch.setattr(posts, "_carry_out", write_on)
    peer.write_silently(Seal(A))
    assert posts.heed(session, talk.now_ns) == RECORDS


def test_a_lease_lies_in_committed_memory(tenant: Tenant) -> None:
    """Its client may write at once, and it does not count as free."""
    assert tenant.lease.size_bytes == MIN_LEASE_BYTES
    assert tenant.lease.objects > 0
    committed = [offset + size for offset, size in tenant.talk.memory.commits]
    assert max(committed) >= tenant.lease.offset + tenant.lease.size_bytes
    assert f"leased bytes: {MIN_LEASE_BYTES}" in tenant.talk.store.describe()
    tenant.talk.store.check()


def test_a_lease_is_not_exchanged_before_what_is_published_in_it(tenant: Tenant) -> None:
    """An object whose message was interrupted is entered before its client's next lease takes its room."""
    tenant.peer.write_silently(Publish(A, tenant.next, 64, 0, 3))
    lease = tenant.peer.ask(AskLease(100), Leased)
    start, end = lease.offset, lease.offset + lease.size_bytes
    assert not start <= tenant.next < end
    tenant.next = start
    tenant.publish(B)
    assert tenant.peer.dropped is None
    assert flags(tenant.talk.client(), A, B) == [1, 1]
    tenant.talk.store.check()


def test_what_was_not_announced_is_found_by_who_asks(tenant: Tenant) -> None:
    """No negative answer is given while an outbox has something that nobody has announced."""
    tenant.peer.write_silently(Publish(A, tenant.next, 64, 0, 3))
    assert flags(tenant.talk.client(), A) == [1]
    tenant.talk.store.check()


def test_what_was_not_announced_counts_at_the_end(tenant: Tenant) -> None:
    """A client that ends before it has sent its last message has put what it has written down."""
    tenant.peer.create(B)
    tenant.peer.write_silently(Publish(A, tenant.next, 64, 0, 3))
    tenant.peer.write_silently(Seal(B))
    tenant.talk.disconnect(tenant.peer)
    assert flags(tenant.talk.client(), A, B) == [1, 1]
    tenant.talk.store.check()


def test_a_store_that_looks_is_not_told(roomy: Tenant) -> None:
    """After a message clients are silent, unless half a ring waits, until the store has looked in vain."""
    store = roomy.talk.store
    roomy.peer.write(Publish(name(0), roomy.next, 64, 0, 3))
    assert store.polls
    told = []
    for number in range(1, PLACES):
        message = Publish(name(number), roomy.next + 64 * number, 64, 0, 3)
        told.append(roomy.peer.write_silently(message))
    assert [number for number, is_told in enumerate(told, 1) if is_told] == [ANNOUNCED_AT]
    roomy.talk.poll()
    assert roomy.control(ControlWord.ACKNOWLEDGED) == PLACES
    barriers = roomy.talk.memory.barriers
    looks = 0
    while roomy.talk.words[HeaderWord.POLLED]:
        assert store.polls
        roomy.talk.poll()
        looks += 1
    assert looks == 3
    assert roomy.talk.memory.barriers == barriers + 1
    assert roomy.peer.write_silently(Publish(name(PLACES), roomy.next + 64 * PLACES, 64, 0, 3))
    store.check()


def test_a_record_at_the_barrier_is_not_slept_over(tenant: Tenant) -> None:
    """What a client writes while it still sees that the store looks is read before the store stops looking."""
    tenant.peer.write(Publish(A, tenant.next, 64, 0, 3))
    message = Publish(B, tenant.next + 64, 64, 0, 3)
    tenant.talk.memory.at_barrier = lambda: tenant.peer.write_silently(message)
    while tenant.talk.store.polls:
        tenant.talk.poll()
    assert tenant.control(ControlWord.ACKNOWLEDGED) == 2
    assert flags(tenant.talk.client(), A, B) == [1, 1]


def test_who_waits_is_not_kept_waiting_by_silence(tenant: Tenant) -> None:
    """While a get waits, or somebody subscribes, every record is announced."""
    reader = tenant.talk.client()
    tenant.peer.write(Publish(A, tenant.next, 64, 0, 3))
    stops = [tenant.talk.store.is_to_stop_polling]
    request_id = reader.post(reader.wanted([B], wait=True))
    stops.append(tenant.talk.store.is_to_stop_polling)
    assert stops == [False, True]
    tenant.peer.write_silently(Publish(B, tenant.next + 64, 64, 0, 3))
    tenant.talk.carry_out(tenant.talk.store.stop_polling(tenant.talk.now_ns))
    assert reader.take(request_id, Objects).found[0] != ABSENT
    tenant.talk.subscriber()
    assert tenant.peer.write_silently(Publish(C, tenant.next + 128, 64, 0, 3))
    tenant.peer.tell(Post())
    assert not tenant.talk.store.polls


def test_a_glance_reads_all_outboxes_where_there_are_few(tenant: Tenant) -> None:
    """Whoever has written, without being asked."""
    talk = tenant.talk
    talk.client()
    tenant.peer.write_silently(Publish(A, tenant.next, 64, 0, 3))
    assert talk.glance() == 1
    assert talk.glance() == 0
    assert tenant.control(ControlWord.ACKNOWLEDGED) == 1


def test_a_glance_reads_the_last_client_where_there_are_many(tenant: Tenant) -> None:
    """What the client of the last request has written since is read by a glance, what others wrote is not."""
    talk = tenant.talk
    tenant.peer.write_silently(Publish(A, tenant.next, 64, 0, 3))
    others = [talk.client() for _ in range(8)]
    assert talk.glance() == 0
    assert tenant.control(ControlWord.ACKNOWLEDGED) == 0
    tenant.peer.ask(Contains(B), Number)
    tenant.peer.write_silently(Publish(B, tenant.next + 64, 64, 0, 3))
    assert talk.glance() == 1
    assert tenant.control(ControlWord.ACKNOWLEDGED) == 2
    others[0].tell(Post())
    talk.disconnect(tenant.peer)
    assert talk.glance() == 0


# -- removing by records --------------------------------------------------------------------------


def test_what_is_removed_by_records_goes_at_once(talk: Conversation) -> None:
    """One after the other is hidden when it is acknowledged; one barrier later their room is free."""
    peer, subscriber = talk.client(), talk.subscriber()
    for object_id in (A, B, C):
        peer.put(object_id, 64)
    room, free_before = talk.store._parts.room, talk.store._parts.room.free_bytes
    barriers = talk.memory.barriers
    for number, object_id in enumerate((A, B), 1):
        peer.write_silently(talk.removal(object_id))
        read = peer.outbox.read
        count, effects = talk.store.glance(talk.now_ns)
        assert (count, list(effects)) == (1, [])
        assert peer.outbox.read == read + 1
        assert len(talk.store.deleting) == number
    assert talk.memory.barriers == barriers
    assert room.free_bytes == free_before
    assert talk.glance() == 0
    assert talk.memory.barriers == barriers + 1
    assert room.free_bytes == free_before + 128
    assert talk.ids() == {C}
    gone = [object_id for object_id, *sizes in subscriber.notifications if sizes == [-1, -1]]
    assert gone == [A, B]
    talk.store.check()


def begin_to_remove(talk: Conversation, peer: Peer, object_id: bytes) -> int:
    """Remove an object by a record which the store reads by a glance; return how many barriers there were until then."""
    peer.write_silently(talk.removal(object_id))
    barriers = talk.memory.barriers
    assert talk.store.glance(talk.now_ns)[0] == 1
    assert talk.store.deleting
    return barriers


def hand_over(talk: Conversation, peer: Peer, request: Request) -> None:
    """Hand a request to the store, and do nothing that may follow."""
    peer.last_id += 1
    frame = Frame(request.KIND, peer.last_id, request.encode())
    talk.carry_out(talk.store.handle(peer.number, frame, talk.now_ns))


def test_a_lease_that_is_asked_for_ahead_comes_before_the_barrier(tenant: Tenant) -> None:
    """Who puts, deletes and puts again waits for no deletion: neither for one that has begun, nor for one that nobody has read."""
    talk, peer, other = tenant.talk, tenant.peer, tenant.talk.client()
    for object_id in (A, B, C):
        tenant.publish(object_id)
    barriers = begin_to_remove(talk, peer, A)
    peer.write_silently(talk.removal(B))
    other.write_silently(talk.removal(C))
    hand_over(talk, peer, AskLease(100, ahead=True))
    assert peer.take(peer.last_id, Leased).size_bytes
    assert (talk.memory.barriers, len(talk.store.deleting)) == (barriers, 2)
    talk.carry_out(talk.store.settled())
    assert talk.memory.barriers == barriers + 1
    assert talk.ids() == {C}
    talk.glance()
    talk.store.check()


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (AskLease(100), Leased),
        (Contains(A), Number),
        (Create(A, 64, 0, 0, -1), Created),
        (Flush(), Done),
        (Evict(1), Number),
        (List(0), Listing),
        (Hello(PROTOCOL_VERSION, Role.CLIENT, ""), Welcome),
    ],
    ids=str,
)
def test_any_other_request_comes_after_the_barrier(
    tenant: Tenant, request_: Request, expected: type[Reply]
) -> None:
    """Deletions that have begun end first, so that it finds room and ids as if there had been no such objects."""
    talk = tenant.talk
    other = talk.connect() if isinstance(request_, Hello) else talk.client()
    tenant.publish(A)
    if isinstance(request_, Create):
        request_ = other.new(A)
    barriers = begin_to_remove(talk, tenant.peer, A)
    hand_over(talk, other, request_)
    assert talk.memory.barriers > barriers
    assert not talk.store.deleting
    talk.turn()
    assert other.take(other.last_id, expected) not in (Number(1), Number(64))


def test_a_lease_that_is_asked_for_ahead_has_the_room_of_what_is_deleted() -> None:
    """Where no other is free; it is not refused for want of what was about to go."""
    talk = Conversation(1 << 20)
    peer = talk.client()
    size = largest_object(1 << 20)
    ids = [number.to_bytes(20, "big") for number in range((1 << 20) // size)]
    for object_id in ids:
        peer.put(object_id, size)
    begin_to_remove(talk, peer, ids[5])
    assert peer.ask(AskLease(size, ahead=True), Leased).size_bytes == size


def test_nothing_is_half_deleted_when_a_client_goes(tenant: Tenant) -> None:
    """It is forgotten, or dropped, when what has begun has ended."""
    talk = tenant.talk
    tenant.publish(A)
    tenant.publish(B)
    begin_to_remove(talk, tenant.peer, A)
    talk.store.expel(tenant.peer.number)
    assert not talk.store.deleting
    other = talk.client()
    begin_to_remove(talk, other, B)
    talk.disconnect(other)
    assert talk.ids() == set()
    talk.store.check()


def test_what_is_put_anew_is_not_removed_with_what_was_there(tenant: Tenant) -> None:
    """In one reading an object is removed, put again under the same id, and the first one is removed once more."""
    talk, peer = tenant.talk, tenant.peer
    tenant.publish(A)
    removal = talk.removal(A)
    peer.write_silently(removal)
    peer.write_silently(removal)
    peer.write_silently(Publish(A, tenant.next, 64, 0, 3))
    peer.write_silently(removal)
    assert talk.glance() == 4
    assert talk.ids() == {A}
    assert peer.replies == {}, "nothing was refused"
    peer.ask(removal, Done)
    assert talk.ids() == {A}
    peer.write(talk.removal(A))
    assert talk.ids() == set()
    talk.store.check()


def test_what_is_pinned_is_removed_by_its_last_release(talk: Conversation) -> None:
    """As after a `Delete`; what is not there, or not sealed, is left alone."""
    peer, other = talk.client(), talk.client()
    slot = peer.create(A)
    peer.create(B)
    peer.write(Seal(A))
    for object_id in (A, B, C):
        other.write(talk.removal(object_id))
    assert talk.ids() == {A, B}
    assert talk.wake_word == 1
    talk.store.check()
    peer.release(slot)
    talk.wake()
    assert talk.ids() == {B}
    peer.ask(Seal(B), Done)
    talk.store.check()


def test_a_run_of_removals_does_not_pile_up(roomy: Tenant) -> None:
    """After so many the room is given back, however long the store goes on looking."""
    talk, ids = roomy.talk, [name(number) for number in range(100)]
    for object_id in ids:
        roomy.publish(object_id)
    most = 0
    for object_id in ids:
        roomy.peer.write_silently(talk.removal(object_id))
        talk.store.glance(talk.now_ns)
        most = max(most, len(talk.store.deleting))
    assert most == 31
    talk.glance()
    assert talk.ids() == set()
    talk.store.check()


def test_a_removal_that_is_asked_for_is_answered(talk: Conversation) -> None:
    """Whoever sends one as a request, or one-way, has it carried out like a record."""
    peer = talk.client()
    for object_id in (A, B):
        peer.put(object_id, 64)
    peer.ask(talk.removal(A), Done)
    peer.tell(talk.removal(B))
    assert talk.ids() == set()
    talk.store.check()


def test_a_client_that_breaks_off_has_removed_what_it_said(talk: Conversation) -> None:
    """Also if what it says next costs it the connection."""
    peer = talk.client()
    peer.put(A, 64)
    peer.write_silently(talk.removal(A))
    peer.write_silently(Publish(B, 0, 64, 0, 3))
    talk.glance()
    assert peer.dropped is not None
    assert talk.ids() == set()
    talk.store.check()


def test_a_full_outbox_and_one_message(roomy: Tenant) -> None:
    """One message has all records handled, in order, and the ring is free again."""
    ids = [name(number) for number in range(PLACES)]
    for number, object_id in enumerate(ids):
        roomy.peer.write_silently(Publish(object_id, roomy.next + 64 * number, 64, 0, 3))
    assert not roomy.peer.outbox.append(Abort.KIND, Abort(A).encode())
    before = roomy.control(ControlWord.ACKNOWLEDGED)
    roomy.peer.tell(Post())
    assert roomy.control(ControlWord.ACKNOWLEDGED) == before + PLACES
    roomy.next = roomy.peer.ask(AskLease(100), Leased).offset
    roomy.publish(name(PLACES))
    assert flags(roomy.talk.client(), *ids, name(PLACES)) == (PLACES + 1) * [1]
    roomy.talk.store.check()


def test_a_record_that_clients_do_not_write(tenant: Tenant) -> None:
    """A record of no kind that is posted costs its writer the connection, and what came before it counts."""
    tenant.peer.write_silently(Publish(A, tenant.next, 64, 0, 3))
    assert tenant.peer.outbox.append(Flush.KIND, b"")
    tenant.peer.tell(Post())
    assert tenant.peer.dropped is not None
    assert flags(tenant.talk.client(), A) == [1]
    tenant.talk.store.check()


def test_a_published_object_is_there_and_acknowledged(tenant: Tenant) -> None:
    """Who waits for it is answered, who subscribed is told, and its client can see that it was handled."""
    reader, watcher = tenant.talk.client(), tenant.talk.subscriber()
    request_id = reader.post(reader.wanted([A], wait=True))
    before = tenant.control(ControlWord.ACKNOWLEDGED)
    tenant.publish(A, 100)
    assert reader.take(request_id, Objects).found == [(tenant.lease.offset, 100, 0, 3)]
    assert watcher.notifications == [(A, 100, 0)]
    tenant.publish(B)
    assert tenant.control(ControlWord.ACKNOWLEDGED) == before + 2
    assert tenant.peer.replies == {}
    assert flags(reader, A, B) == [1, 1]
    tenant.peer.ask(Flush(), Done)
    tenant.talk.store.check()


def test_an_object_that_is_published_again_is_the_same(tenant: Tenant) -> None:
    """A message that is sent twice makes one object, and its second room goes back."""
    tenant.publish(A)
    tenant.publish(A)
    tenant.publish(B)
    assert flags(tenant.peer, A, B) == [1, 1]
    assert tenant.peer.dropped is None
    tenant.talk.store.check()


@pytest.mark.parametrize(
    ("shift", "sizes"),
    [
        (-64, (64, 0)),
        (32, (64, 0)),
        (0, (MAX, 1 << 31)),
        (MIN_LEASE_BYTES, (1, 0)),
        (1 << 40, (0, 0)),
    ],
)
def test_publishing_outside_of_the_lease_drops_the_sender(
    tenant: Tenant, shift: int, sizes: tuple[int, int]
) -> None:
    """What lies before it, behind it or across a line is nobody's to publish."""
    other = tenant.talk.client()
    tenant.peer.tell(Publish(A, tenant.lease.offset + shift, *sizes, 0))
    assert tenant.peer.dropped is not None
    assert "outside of its lease" in tenant.peer.dropped
    assert flags(other, A) == [0]
    tenant.talk.store.check()


def test_publishing_too_often_drops_the_sender(tenant: Tenant) -> None:
    """Although its lease has room, and others may publish still: these entries are theirs."""
    other = Tenant(tenant.talk)
    for number in range(tenant.lease.objects):
        tenant.publish(name(100 + number))
    assert len(tenant.talk.ids()) == tenant.lease.objects
    tenant.publish(A)
    assert tenant.peer.dropped is not None
    assert "outside of its lease" in tenant.peer.dropped
    assert flags(other.peer, A) == [0]
    tenant.talk.store.check()


def test_publishing_without_a_lease_drops_the_sender(talk: Conversation) -> None:
    """A small store grants none, and says so with a size of 0."""
    peer = talk.client()
    assert peer.ask(AskLease(1), Leased) == Leased(0, 0, 0, 0)
    peer.tell(Publish(A, talk.layout.data, 1, 0, 0))
    assert peer.dropped is not None
    talk.store.check()


def test_a_lease_is_never_the_reason_for_a_full_store(tenant: Tenant) -> None:
    """A creation that needs its room gets it, once all sockets were drained; the epoch says that it has gone."""
    tenant.publish(A)
    epoch = tenant.control(ControlWord.EPOCH)
    assert epoch == tenant.lease.epoch
    other = tenant.talk.client()
    request_id = other.post(other.new(B, 1 << 20))
    assert other.replies == {}
    assert tenant.control(ControlWord.EPOCH) != epoch
    tenant.talk.turn()
    other.take(request_id, Created)
    assert flags(other, A) == [0]
    tenant.talk.store.check()


def test_a_busy_client_keeps_its_lease_until_it_rests(tenant: Tenant) -> None:
    """Who is making an object is waited for, and what it publishes meanwhile is taken."""
    other = tenant.talk.client()
    tenant.set_busy(True)
    request_id = other.post(other.new(B, (1 << 20) - 64))
    for _ in range(3):
        tenant.talk.settle()
        assert other.replies == {}
        assert tenant.talk.store.has_unsettled
    tenant.publish(A)
    tenant.set_busy(False)
    tenant.talk.turn()
    other.take(request_id, Created)
    assert tenant.peer.dropped is None
    tenant.talk.store.check()


def test_a_client_that_stays_busy_is_not_waited_for_for_ever(tenant: Tenant) -> None:
    """A stopped client costs the other one its room, with an answer."""
    other = tenant.talk.client()
    tenant.set_busy(True)
    assert other.refused(other.new(B, 1 << 20)) is Failure.FULL
    tenant.publish(A)
    assert flags(other, A) == [1]
    tenant.talk.store.check()


def test_a_lease_ends_with_its_client(tenant: Tenant) -> None:
    """What it has not used is free again, what it has published stays."""
    tenant.publish(A)
    tenant.talk.disconnect(tenant.peer)
    tenant.talk.store.check()
    other = tenant.talk.client()
    assert flags(other, A) == [1]
    request_id = other.post(other.new(B, (1 << 20) - 64))
    assert not tenant.talk.store.has_unsettled
    tenant.talk.turn()
    other.take(request_id, Created)


def test_who_has_a_limit_gets_no_lease(tenant: Tenant) -> None:
    """What such a client stores is counted object by object."""
    tenant.peer.ask(SetOptions(1000, ""), Done)
    assert tenant.peer.ask(AskLease(1), Leased).size_bytes == 0
    tenant.talk.store.check()


def test_a_new_lease_ends_the_last_one(tenant: Tenant) -> None:
    """Asking again gives back what is left, and the next lease is not smaller."""
    tenant.publish(A)
    lease = tenant.peer.ask(AskLease(10), Leased)
    assert lease.size_bytes >= MIN_LEASE_BYTES
    assert f"leased bytes: {lease.size_bytes}" in tenant.talk.store.describe()
    tenant.talk.store.check()


@pytest.mark.parametrize(
    ("size_bytes", "objects"),
    [
        (100_000, 3),
        (100_001, 3),
        (1 << 18, 3),
        (349_504, 3),
        (400_000, 2),
        (1 << 19, 2),
        ((1 << 19) + 1, 1),
        (1 << 20, 1),
    ],
)
def test_a_lease_for_large_objects_has_room_for_some(size_bytes: int, objects: int) -> None:
    """It is for three of them, or for as many as a client's share of the store has room for."""
    share = 1 << 20
    talk = Conversation(64 * share)
    peer = talk.client()
    lease = peer.ask(AskLease(size_bytes), Leased)
    each = (size_bytes + 63) & -64
    assert lease.size_bytes == min(3 * each, share)
    assert lease.size_bytes // each == objects
    assert lease.objects == min(lease.size_bytes // 128, 8192)
    for number in range(objects):
        offset = lease.offset + number * each
        peer.write(Publish(bytes([number]) * 20, offset, size_bytes, 0, 3))
    assert peer.dropped is None
    assert len(talk.ids()) == objects
    assert peer.ask(AskLease(share + 1), Leased).size_bytes == 0, "it is too large for this store"
    talk.store.check()


@pytest.mark.parametrize("mib_and_objects", [(2, 3), (3, 2), (4, 2), (5, 1), (8, 1), (16, 1)])
def test_a_lease_for_objects_of_some_mib_fits_into_caches(mib_and_objects: tuple[int, int]) -> None:
    """What is deleted soon is written again soon."""
    mib, objects = mib_and_objects
    talk = Conversation(1 << 30)
    lease = talk.client().ask(AskLease(mib << 20), Leased)
    while not lease.size_bytes:  # its memory comes by steps
        talk.commit_ahead()
        lease = talk.client().ask(AskLease(mib << 20), Leased)
    assert lease.size_bytes == objects * mib << 20


def test_a_lease_without_memory_is_none() -> None:
    """Where the file system cannot give the pages the client puts by round trip instead."""
    talk = Conversation(1 << 20)
    peer = talk.client()
    talk.memory.refuse_from = talk.layout.data
    assert peer.ask(AskLease(1), Leased).size_bytes == 0
    talk.store.check()


def test_a_full_store_evicts_for_a_lease() -> None:
    """Who puts small objects into a full store gets room as the oldest objects go, and not much more."""
    talk = Conversation(1 << 20)
    watcher, peer = talk.subscriber(), talk.client()
    for n in range((1 << 20) // 320):
        peer.put(name(n), 257)
    peer.put(A, (1 << 20) % 320)
    lease = peer.ask(AskLease(10), Leased)
    assert lease.size_bytes == MIN_LEASE_BYTES
    gone = [object_id for object_id, size, _ in watcher.notifications if size < 0]
    assert gone == [name(n) for n in range(len(gone))]
    assert len(gone) <= -(-MIN_LEASE_BYTES // 320)
    talk.store.check()


def test_leases_take_an_eighth_of_the_capacity_at_most() -> None:
    """Who comes after that gets none."""
    talk = Conversation(1 << 20)
    sizes = [talk.client().ask(AskLease(100), Leased).size_bytes for _ in range(9)]
    assert sizes == [*8 * [MIN_LEASE_BYTES], 0]
    talk.store.check()


def test_nothing_goes_for_a_lease_while_the_object_has_room() -> None:
    """A store that is filled to the last byte by clients with leases loses nothing for the sake of the next lease."""
    talk = Conversation(1 << 20)
    watcher, tenant = talk.subscriber(), Tenant(talk)
    left, number = 1 << 20, 0
    while left:
        if tenant.next + 1024 > tenant.lease.offset + tenant.lease.size_bytes:
            tenant.lease = tenant.peer.ask(AskLease(1024), Leased)
            tenant.next = tenant.lease.offset
        if tenant.lease.size_bytes:
            tenant.publish(name(number), 1024)
        else:
            tenant.peer.put(name(number), 1024)
        talk.turn()
        left, number = left - 1024, number + 1
    assert len(watcher.notifications) == number == 1024
    assert not talk.store._room.free_bytes
    talk.store.check()


def test_what_is_in_use_does_not_go_for_a_lease() -> None:
    """Where nothing may go there is no lease; objects are put by round trip instead."""
    talk = Conversation(1 << 20)
    peer = talk.client()
    peer.create(A, 1 << 20)
    assert peer.ask(AskLease(1), Leased) == Leased(0, 0, 0, 0)
    talk.store.check()


def test_a_smaller_lease_is_better_than_an_eviction() -> None:
    """Where there is room for a small lease only, the client gets that, and nothing goes for a larger one."""
    talk = Conversation(2 << 20)
    watcher, peer = talk.subscriber(), talk.client()
    first = peer.ask(AskLease(1), Leased)
    while talk.store._room.largest_bytes >= 65536:
        peer.put(name(len(watcher.notifications)), 65536)
    peer.put(A, talk.store._room.largest_bytes)
    request_id = peer.post(AskLease(1))
    assert peer.take(request_id, Leased).size_bytes == first.size_bytes == MIN_LEASE_BYTES
    assert all(size >= 0 for _, size, _ in watcher.notifications)
    talk.store.check()


def test_nothing_goes_for_a_lease_while_there_is_room() -> None:
    """A free extent whose memory is not committed yet is no reason to evict anything."""
    talk = Conversation(4 * COMMIT_STEP)
    watcher, peer, other = talk.subscriber(), talk.client(), talk.client()
    peer.put(A)
    other.post(other.new(B, 3 * COMMIT_STEP))
    peer.post(AskLease(1))
    assert watcher.notifications == [(A, 64, 0)]
    talk.turn()
    assert flags(peer, A) == [1]
    talk.store.check()


def test_a_lease_whose_entries_have_no_memory_is_none() -> None:
    """Where the table cannot grow by as many entries as a lease may need there is no lease."""
    talk = Conversation(1 << 20)
    peer = talk.client()
    talk.memory.refuse_from = talk.layout.entries
    assert peer.ask(AskLease(1), Leased).size_bytes == 0
    talk.store.check()
    talk.memory.refuse_from = None
    assert peer.ask(AskLease(1), Leased).size_bytes == MIN_LEASE_BYTES
    talk.store.check()


def test_entries_are_kept_for_leases(tenant: Tenant) -> None:
    """However many empty objects others create, a lease can publish as many as it was promised."""
    other = tenant.talk.client()
    n_entries = tenant.talk.layout.n_entries
    for n in range(n_entries + 10):
        other.put(name(n), 0)
    for n in range(tenant.lease.objects):
        tenant.publish(name(100_000 + n))
    before = tenant.peer.dropped
    tenant.publish(A)
    after = tenant.peer.dropped
    assert before is None
    assert after is not None
    tenant.talk.store.check()


@pytest.mark.parametrize("claims", [False, True])
def test_leases_of_a_dead_store_find_the_entries_that_they_had(claims: bool) -> None:
    """In a table that is full but for them, its clients publish what they were promised, and who wants more is dropped."""
    talk = Conversation(1 << 20)
    tenants = [Tenant(talk), Tenant(talk)]
    numbers = count()
    for tenant, n_left in zip(tenants, (8, 28), strict=True):
        for _ in range(tenant.lease.objects - n_left):
            tenant.publish(name(next(numbers)))
    other = talk.client()
    while talk.store._parts.table.free_entries > 36:
        other.put(name(next(numbers)), 0)
    later = Reopened(talk.layout, talk.words, talk.raw)
    peers = []
    for tenant, n_left in zip(tenants, (8, 28), strict=True):
        peer, _ = claim(later, (tenant.board_word - talk.layout.boards // 8) // BOARD_WORDS)
        peer.outbox, tenant.peer = tenant.peer.outbox, peer
        for _ in range(n_left):
            tenant.publish(name(next(numbers)))
        peers.append(peer)
    assert [peer.dropped for peer in peers] == [None, None]
    later.store.check()
    liar = tenants[1]
    if claims:
        liar.peer.write(Claim(A, liar.next, 64, 0, 3, slots_of(1)[0]))
    else:
        liar.publish(A)
    assert liar.peer.dropped is not None
    assert "outside of its lease" in liar.peer.dropped
    later.store.check()


def test_a_successor_writes_down_how_far_a_lease_was_published(tenant: Tenant) -> None:
    """The store died when the object was in the table, and before it could say so; the one after next is to know it all the same."""
    talk = tenant.talk
    tenant.publish(A)
    assert tenant.control(ControlWord.LEASE_CURSOR) == tenant.next
    talk.words[talk.layout.control // 8 + ControlWord.LEASE_CURSOR] = tenant.lease.offset
    assert tenant.control(ControlWord.LEASE_CURSOR) == tenant.lease.offset
    Reopened(talk.layout, talk.words, talk.raw)
    assert tenant.control(ControlWord.LEASE_CURSOR) == tenant.next


def test_a_lease_of_a_dead_store_does_not_grow() -> None:
    """Not by what was deleted before it."""
    talk = Conversation(1 << 20)
    peer = talk.client()
    for object_id in (A, B):
        peer.put(object_id, 1000)
    lease = Tenant(talk).lease
    peer.ask(Delete([B]), Done)
    later = Reopened(talk.layout, talk.words, talk.raw)
    leases = later.store._parts.publishing.leases
    assert leases.extents() == [(lease.offset, lease.size_bytes)]


def test_of_leases_that_overlap_one_goes_on() -> None:
    """The words that say so cannot both be right."""
    talk = Conversation(16 << 20)
    first, second = Tenant(talk), Tenant(talk)
    end = first.lease.offset + first.lease.size_bytes
    board = (second.board_word - talk.layout.boards // 8) // BOARD_WORDS
    talk.store._parts.control.lease(board, first.lease.offset + 64, end)
    later = Reopened(talk.layout, talk.words, talk.raw)
    leases = later.store._parts.publishing.leases
    assert leases.extents() == [(first.lease.offset, first.lease.size_bytes)]


def test_what_cannot_be_is_written_by_nobody(talk: Conversation) -> None:
    """An unsealed object where another one lies: its room is kept as long as its creator holds it."""
    peer = talk.client()
    peer.put(A, 1000)
    peer.create(B, 1000)
    table = talk.store._parts.table
    first, second = table.find(A), table.find(B)
    talk.words[talk.layout.entry(first) // 8 + EntryWord.OFFSET] = table.location(second)[0]
    table.seal(first, 1)
    later = Reopened(talk.layout, talk.words, talk.raw)
    assert not later.store._objects.unsealed.creators
    assert later.ids() == {A}


def test_a_lease_of_a_dead_store_goes_on_with_small_objects(tenant: Tenant) -> None:
    """A client that put a large object first may still put as many small ones as there is room for."""
    tenant.publish(A, 15_000)
    later = Reopened(tenant.talk.layout, tenant.talk.words, tenant.talk.raw)
    peer, _ = claim(later, 0)
    peer.outbox, tenant.peer = tenant.peer.outbox, peer
    for n in range((MIN_LEASE_BYTES - 15_000) // 64):
        tenant.publish(name(n))
    assert peer.dropped is None
    later.store.check()


# -- clients of a store that has died ----------------------------------------------------------------


def claim(talk: Conversation, board: int) -> tuple[Peer, bool]:
    """Return a connection of a client that wants to go on, and whether the store takes it for that."""
    peer = talk.connect()
    return peer, peer.ask(Hello(PROTOCOL_VERSION, Role.CLIENT, "", board + 1), Welcome).reclaimed


def test_a_connection_is_the_client_that_it_claims_from_its_next_message_on(
    talk: Conversation,
) -> None:
    """One that ends before that has changed nothing; then no other connection may be that client."""
    peer = talk.client()
    peer.put(A, 1000)
    (slot,) = peer.get(A)[1]
    board = slot // BOARD_WORDS
    later = Reopened(talk.layout, talk.words, talk.raw)
    for _ in range(3):
        interrupted, reclaimed = claim(later, board)
        assert reclaimed
        later.disconnect(interrupted)
        assert talk.read_slot(slot) == 1
    first, reclaimed = claim(later, board)
    assert reclaimed
    second, reclaimed = claim(later, board)
    assert reclaimed
    second.tell(Post())
    assert second.number == board
    first.tell(Post())
    assert first.dropped == "what it claims went on over another connection, or was dropped"
    _, reclaimed = claim(later, board)
    assert not reclaimed
    assert talk.read_slot(slot) == 1
    later.disconnect(second)
    assert talk.read_slot(slot) == 0
    later.store.check()


def test_what_cannot_be_does_not_come_back(talk: Conversation) -> None:
    """Of two objects under one id one goes; held, it lies where it lay, and the next store takes it for nothing more either."""
    peer = talk.client()
    peer.put(A)
    peer.put(B)
    peer.get(B)
    table = talk.store._parts.table
    entry = table.find(B)
    start = talk.layout.entry(entry) + 8
    talk.raw[start : start + len(A)] = A
    table.seal(entry, 1)
    later = Reopened(talk.layout, talk.words, talk.raw)
    other, _ = claim(later, 0)
    assert later.store._objects.releases.limbo == {entry}
    other.ask(Delete([A]), Done)
    assert flags(other, A, B) == [0, 0]
    last = Reopened(talk.layout, talk.words, talk.raw)
    assert last.store._objects.releases.limbo == {entry}
    assert flags(claim(last, 0)[0], A, B) == [0, 0]
    last.store.check()


@pytest.mark.parametrize("word", [HeaderWord.ENTRIES_END, HeaderWord.BOARDS_END])
def test_a_store_that_dies_while_it_grows_leaves_no_more_than_that(
    talk: Conversation, word: HeaderWord
) -> None:
    """Its successor has memory behind what was used, and what was about to be, not behind all that could ever be."""
    peer = talk.client()
    peer.put(A)
    talk.words[word] += 1  # and not its complement
    later = Reopened(talk.layout, talk.words, talk.raw)
    assert flags(claim(later, 0)[0], A) == [1]
    assert later.store._parts.table.end == talk.words[HeaderWord.ENTRIES_END] < 50
    assert talk.words[HeaderWord.BOARDS_END] == 1
    assert sum(size for _, size in later.memory.commits) < 100_000
    later.store.check()


def test_a_connection_that_claims_a_client_introduces_itself_once(talk: Conversation) -> None:
    """A second Hello costs it the connection, and the client is awaited still."""
    talk.client()
    later = Reopened(talk.layout, talk.words, talk.raw)
    peer, _ = claim(later, 0)
    peer.post(Hello(PROTOCOL_VERSION, Role.CLIENT, "", 1))
    assert peer.dropped == "a second Hello"
    assert claim(later, 0)[1]


@pytest.mark.parametrize("is_late", [False, True])
def test_who_has_posted_what_is_no_record_does_not_come_back(
    talk: Conversation, is_late: bool
) -> None:
    """It is told so when it asks, instead of being answered nothing; what it holds stays its own until it has ended."""
    peer = talk.client()
    peer.put(A, 1000)
    (slot,) = peer.get(A)[1]
    if not is_late:
        peer.outbox.append(99, b"no record")
    later = Reopened(talk.layout, talk.words, talk.raw)
    if is_late:
        peer.outbox.append(99, b"no record")
        assert claim(later, 0)[0].dropped is not None
    other, reclaimed = claim(later, 0)
    assert not reclaimed
    other.ask(Delete([A]), Done)
    assert flags(other, A) == [1]
    assert talk.read_slot(slot) == 1
    later.carry_out(later.store.disconnect(0, later.now_ns))
    assert flags(other, A) == [0]
    later.store.check()


def test_a_claim_ends_where_its_client_is_dropped(talk: Conversation) -> None:
    """Of two connections that claim a client, the one that finds what is no record ends the other's claim as well."""
    peer = talk.client()
    later = Reopened(talk.layout, talk.words, talk.raw)
    first, reclaimed = claim(later, 0)
    assert reclaimed
    peer.outbox.append(99, b"no record")
    assert claim(later, 0)[0].dropped is not None
    first.tell(Post())
    assert first.dropped == "what it claims went on over another connection, or was dropped"
    later.store.check()
