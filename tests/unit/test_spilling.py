from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from shmplasma.layout import REFERENCED, EntryState, EntryWord
from shmplasma.leases import BUSY_WORD
from shmplasma.posted import Detach, Release, Seal
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
)
from shmplasma.requests import AnswerNow, AskLease, Contains, Delete, Evict, Keep, List
from shmplasma.spilling import HEADER_BYTES, ExternalLimits
from shmplasma.tickets import TICKET_NS
from shmplasma.transfers import Job, Read, Write
from shmplasma.waiters import FOR_EVER, MAX_PASSES
from tests.conversation import Conversation, Peer, ids_of, name, records
from tests.crash.damage import Reopened

SIZE = 1000
MANY = 200
"""Three times what fits."""


@pytest.fixture
def talk() -> Conversation:
    """Return a store of 64 KiB with an external store."""
    return Conversation(external=ExternalLimits())


def content(number: int, size: int = SIZE) -> bytes:
    """Return what an object of this name holds."""
    return (b"%d;" % number * size)[:size]


def put(talk: Conversation, peer: Peer, number: int, size: int = SIZE, codec: int = 0) -> None:
    """Put an object, with an external store that is asked as often as it takes."""
    request = peer.new(name(number), size, codec=codec)
    request_id = peer.post(request)
    talk.settle_outside()
    offset = peer.take(request_id, Created).offset
    talk.raw[offset : offset + size] = content(number, size)
    peer.write(Seal(name(number)))
    peer.release(request.slot)
    talk.settle_outside()
    talk.store.check()


def get(talk: Conversation, peer: Peer, numbers: Sequence[int], *, wait: bool = False) -> None:
    """Get objects and look at what is in them."""
    request = peer.wanted([name(number) for number in numbers], wait=wait)
    request_id = peer.post(request)
    talk.settle_outside()
    for number, found in zip(numbers, peer.take(request_id, Objects).found, strict=True):
        offset, size = found[0], found[1]
        assert bytes(talk.raw[offset : offset + size]) == content(number, size)
    for slot in request.slots:
        peer.release(slot)
    talk.store.check()


def fill(talk: Conversation, peer: Peer, count: int = MANY) -> None:
    """Put more than fits."""
    for number in range(count):
        put(talk, peer, number)


def spilled(talk: Conversation) -> list[int]:
    """Return the numbers of the objects that are in the external store alone."""
    table = talk.store._parts.table
    return [
        int.from_bytes(table.object_id(entry), "big")
        for entry in table.entries()
        if table.state(entry) == EntryState.SPILLED
    ]


def succeed(talk: Conversation) -> dict[int, int]:
    """Have another store take over from one that has died with its clients, and return these."""
    talk.store = talk.new_store(talk.words, talk.raw)
    talk.peers.clear()
    talk._connections = talk.layout.n_boards
    return talk.store.recover(lambda *_: False, talk.now_ns)[0]


def test_more_than_fits_is_there(talk: Conversation) -> None:
    """Everything is listed, contained and got, whatever was put after it; its id is taken."""
    peer = talk.client()
    fill(talk, peer)
    assert len(spilled(talk)) > MANY // 2
    assert set(ids_of(peer.ask(List(0), Listing))) == {name(number) for number in range(MANY)}
    for number in (*spilled(talk)[:3], MANY - 1):
        assert peer.ask(Contains(name(number)), Number).value == 1
        assert peer.refused(peer.new(name(number))) is Failure.EXISTS
        peer.free_slots.append(peer.last_id)
    for number in range(MANY):
        get(talk, peer, [number], wait=number % 2 == 1)


def test_several_come_back_at_once(talk: Conversation) -> None:
    """A get of many is answered when the last is in memory; what is missing is not waited for."""
    peer = talk.client()
    fill(talk, peer)
    get(talk, peer, spilled(talk)[:20])
    gone = spilled(talk)[0]
    request_id = peer.post(peer.wanted([name(gone), name(9999)]))
    talk.settle_outside()
    first, second = peer.take(request_id, Objects).found
    assert first != ABSENT
    assert second == ABSENT


def test_who_gives_up_is_answered(talk: Conversation) -> None:
    """A get whose time is over has what is in memory; the object comes back all the same."""
    peer = talk.client()
    fill(talk, peer)
    gone = spilled(talk)[0]
    request_id = peer.post(peer.wanted([name(gone)], wait=True))
    jobs = talk.take_jobs()
    peer.tell(AnswerNow(request_id))
    talk.turn()
    assert peer.take(request_id, Objects).found == [ABSENT]
    for job in jobs:
        talk.do(job)
    talk.settle_outside()
    assert gone not in spilled(talk)
    talk.store.check()


def test_what_is_marked_is_gone_from_the_external_store(talk: Conversation) -> None:
    """Nobody is told of it, and nothing is left of it, although its record is not read; nor after a death."""
    peer, other = talk.client(), talk.client()
    fill(talk, peer)
    first, second, third = spilled(talk)[:3]
    table = talk.store._parts.table
    for number in (first, second, third):
        entry = table.find(name(number))
        talk.mark_word(entry, table.state_word(entry) >> 8 << 8 | EntryState.SEALED)
    assert other.ask(Contains(name(first)), Number).value == 0
    request_id = other.post(other.wanted([name(second)]))
    talk.settle_outside()
    assert other.take(request_id, Objects).found == [ABSENT]
    assert not {first, second} & set(spilled(talk))
    talk.store.check()
    successor = talk.new_store(talk.words, talk.raw)
    successor.recover(lambda *_: True, talk.now_ns)
    found = {number for number in range(MANY) if successor._parts.table.find(name(number)) >= 0}
    assert found == set(range(MANY)) - {first, second, third}
    successor.check()


def test_deleted_objects_are_gone(talk: Conversation) -> None:
    """Deleting what was spilled, is being written, or is coming back leaves nothing, and its id is free."""
    peer = talk.client()
    fill(talk, peer)
    here, there = MANY - 1, spilled(talk)
    coming = there[0]
    peer.post(peer.wanted([name(coming)], wait=True))
    jobs = talk.take_jobs()
    numbers = [here, *there]
    peer.ask(Delete([name(number) for number in numbers]), Done)
    for job in jobs:
        talk.do(job)
    talk.settle_outside()
    talk.store.check()
    assert set(spilled(talk)).isdisjoint(numbers)
    assert [peer.ask(Contains(name(n)), Number).value for n in numbers] == [0] * len(numbers)
    peer.ask(Delete([name(number) for number in range(MANY)]), Done)
    talk.settle_outside()
    assert not talk.containers
    put(talk, peer, coming)
    get(talk, peer, [coming])


def test_deleted_while_it_is_written(talk: Conversation) -> None:
    """An object that is deleted meanwhile goes when its container is written, and the container with it."""
    peer = talk.client()
    for number in range(60):
        put(talk, peer, number)
    request_id = peer.post(Evict(30_000))
    talk.turn()
    (job,) = [job for job in talk.take_jobs() if isinstance(job, Write)]
    ids = [part.object_id for part in job.parts]
    peer.ask(Delete(ids), Done)
    assert peer.ask(Contains(ids[0]), Number).value == 1  # until it is written
    talk.do(job)
    talk.settle_outside()
    assert peer.ask(Contains(ids[0]), Number).value == 0
    assert peer.take(request_id, Number).value >= 0
    talk.store.check()


def test_an_eviction_frees_what_it_says(talk: Conversation) -> None:
    """It is answered when objects are written, with what has become free; all of them are still there."""
    peer = talk.client()
    for number in range(40):
        put(talk, peer, number)
    request_id = peer.post(Evict(10_000))
    talk.settle_outside()
    assert peer.take(request_id, Number).value >= 10_000
    assert len(spilled(talk)) >= 10
    get(talk, peer, range(40))


def test_a_write_that_fails(talk: Conversation) -> None:
    """Nothing is lost, and who wants room is refused, until it can be written again."""
    peer = talk.client()
    fill(talk, peer, 60)
    before = set(spilled(talk))
    talk.failure = "the disk is full"
    failures = 0
    for number in range(100, 180):
        request = peer.new(name(number), SIZE)
        request_id = peer.post(request)
        talk.settle_outside()
        reply = peer.replies.pop(request_id)
        if isinstance(reply, Failed):
            assert reply.failure is Failure.FULL
            assert "the disk is full" in reply.text
            peer.free_slots.append(request.slot)
            failures += 1
        else:
            peer.write(Seal(name(number)))
            peer.release(request.slot)
    assert failures
    talk.store.check()
    talk.failure = ""
    assert set(spilled(talk)) >= before
    put(talk, peer, 999)
    get(talk, peer, range(60))


def test_a_read_that_fails(talk: Conversation) -> None:
    """Only who asks for that object hears of it, and may ask again."""
    peer = talk.client()
    fill(talk, peer)
    gone, here = spilled(talk)[0], MANY - 1
    talk.failure = "a bit has flipped"
    request_id = peer.post(peer.wanted([name(gone)]))
    talk.settle_outside()
    failed = peer.take(request_id, Failed)
    assert failed.failure is Failure.EXTERNAL
    assert failed.text == "a bit has flipped"
    get(talk, peer, [here])
    talk.failure = ""
    get(talk, peer, [gone])


def test_more_than_fits_at_once(talk: Conversation) -> None:
    """A get of more than fits into the store is refused, and everything is still there."""
    peer = talk.client()
    fill(talk, peer)
    request = peer.wanted([name(number) for number in range(100)])
    request_id = peer.post(request)
    talk.settle_outside()
    assert peer.take(request_id, Failed).failure is Failure.FULL
    for slot in request.slots:
        peer.release(slot)
    get(talk, peer, range(40))
    get(talk, peer, range(40, 80))


def test_what_is_kept_goes_last(talk: Conversation) -> None:
    """It makes room, too, when nothing else does, and comes back as what it was."""
    peer = talk.client()
    for number in range(50):
        put(talk, peer, number)
        peer.ask(Keep(True, [name(number)]), Done)
    put(talk, peer, 500, 30_000)
    assert set(spilled(talk)) <= set(range(50))
    assert spilled(talk)
    get(talk, peer, range(50))
    listing = peer.ask(List(0), Listing)
    assert {record.object_id: record.keep for record in records(listing)} == {
        **{name(number): True for number in range(50)},
        name(500): False,
    }


def test_a_limit_of_the_external_store() -> None:
    """What would exceed it stays in memory, and who finds no room for that is told so."""
    talk = Conversation(external=ExternalLimits(max_bytes=20_000))
    peer = talk.client()
    refused = None
    for number in range(MANY):
        request_id = peer.post(peer.new(name(number), SIZE))
        talk.settle_outside()
        reply = peer.replies.pop(request_id)
        if isinstance(reply, Failed):
            refused = reply
            break
        peer.write(Seal(name(number)))
        peer.release(talk.store._parts.table.owner(talk.store._parts.table.find(name(number))))
    assert refused is not None
    assert "may hold 20000 bytes" in refused.text
    assert "--max-spill-bytes" in refused.text
    for each in 2 * list(range(number)):  # one after the other all can be got
        wanted = peer.wanted([name(each)])
        coming = peer.post(wanted)
        talk.settle_outside()
        assert peer.take(coming, Objects).found[0][1] == SIZE
        peer.release(wanted.slots[0])
    assert sum(map(len, talk.containers.values())) <= 20_000 + 64 * len(talk.containers)


@pytest.mark.parametrize("seed", range(6))
def test_objects_of_all_sizes_beside_a_full_external_store(seed: int) -> None:
    """What was put can be got, one after the other, whatever else is put meanwhile."""
    talk = Conversation(external=ExternalLimits(max_bytes=60_000))
    peer, source = talk.client(), random.Random(seed)
    there: list[int] = []

    def put_one(number: int) -> bool:
        request = peer.new(name(number), source.choice([200, 1_000, 5_000, 9_000]))
        request_id = peer.post(request)
        talk.settle_outside()
        if isinstance(peer.replies.pop(request_id), Failed):
            return False
        peer.write(Seal(name(number)))
        peer.release(request.slot)
        there.append(number)
        return True

    number = 0
    while put_one(number):
        number += 1
    assert talk.store._objects.spilling is not None
    assert talk.store._objects.spilling.spilled_bytes
    for _ in range(3):
        for each in there:
            wanted = peer.wanted([name(each)])
            coming = peer.post(wanted)
            for _ in range(200):
                talk.settle_outside()
                if coming in peer.replies:
                    break
                talk.advance()
            peer.take(coming, Objects)
            peer.release(wanted.slots[0])
            number += 1
            put_one(number)


def is_put(talk: Conversation, peer: Peer, number: int, size: int) -> bool:
    """Put an object; tell whether there is room for it."""
    request = peer.new(name(number), size)
    request_id = peer.post(request)
    while request_id not in peer.replies:
        talk.settle_outside()
    reply = peer.replies.pop(request_id)
    if isinstance(reply, Created):
        talk.raw[reply.offset : reply.offset + size] = content(number, size)
        peer.write(Seal(name(number)))
    peer.release(request.slot)
    return isinstance(reply, Created)


def beside_a_full_external_store() -> tuple[Conversation, Peer]:
    """Return a store in which an object was refused that is larger than the three that were put, and a client."""
    talk = Conversation(4096, external=ExternalLimits(8192, high_water=1.0))
    peer = talk.client()
    for number in range(3):
        put(talk, peer, number, 1300)
    assert not is_put(talk, peer, 3, 4096)
    return talk, peer


def test_what_could_not_make_way_is_not_put_beside_a_full_external_store() -> None:
    """An object that is larger than all that was written needs more room there, once others want to come back."""
    talk, peer = beside_a_full_external_store()
    for number in range(3):
        get(talk, peer, [number])


def test_what_waits_to_make_way_has_room_in_the_external_store() -> None:
    """Nothing else is written to the room that the largest object needs which is in memory alone."""
    talk = Conversation(4096, external=ExternalLimits(5696, high_water=1.0))
    peer = talk.client()
    put(talk, peer, 0, 1400)
    put(talk, peer, 1, 2600)
    there = [number for number in range(2, 40) if is_put(talk, peer, number, 64)]
    for number in (*there, 0, 1, *there):
        get(talk, peer, [number])


def test_what_takes_no_room_is_put_beside_a_full_external_store() -> None:
    """It is in nobody's way."""
    talk, peer = beside_a_full_external_store()
    assert is_put(talk, peer, 4, 0)


def test_a_restart_knows_what_is_where(talk: Conversation) -> None:
    """A successor finds what was spilled, and what is in memory and was written is known to be."""
    peer = talk.client()
    fill(talk, peer)
    there, clean = set(spilled(talk)), talk.store._objects.spilling
    assert clean is not None
    clean_bytes = clean.clean_bytes
    orphan = max(talk.containers) + 7
    talk.containers[orphan] = b"nobody's"
    succeed(talk)
    talk.store.tidy_external({n: len(data) for n, data in talk.containers.items()})
    talk.settle_outside()
    talk.store.check()
    assert orphan not in talk.containers
    assert set(spilled(talk)) == there
    assert talk.store._objects.spilling is not None
    assert talk.store._objects.spilling.clean_bytes == clean_bytes
    other = talk.client()
    get(talk, other, range(MANY - 50, MANY))
    get(talk, other, sorted(there)[:30])


@pytest.mark.parametrize("left", [0, 10])
def test_a_restart_without_the_copies_loses_nothing_that_is_in_memory(left: int) -> None:
    """What another store, or nobody, has kept is written anew before it goes; also what is cut short."""
    talk = Conversation(external=ExternalLimits(high_water=0.0))
    peer = talk.client()
    put(talk, peer, 0, 20_000)
    put(talk, peer, 1, 20_000)
    assert talk.containers
    assert not spilled(talk)
    found = {number: left for number in talk.containers if left}
    talk.containers.clear()
    for client in succeed(talk):
        talk.store.disconnect(client, talk.now_ns)
    talk.store.tidy_external(found)
    talk.store.check()
    other = talk.client()
    put(talk, other, 2, 60_000)
    assert spilled(talk)
    for number, size in ((0, 20_000), (1, 20_000), (2, 60_000)):
        request = other.wanted([name(number)])
        request_id = other.post(request)
        talk.settle_outside()
        (found_at,) = other.take(request_id, Objects).found
        assert bytes(talk.raw[found_at[0] : found_at[0] + size]) == content(number, size)
        other.release(request.slots[0])


def test_an_eviction_asks_for_no_more_when_a_write_fails() -> None:
    """It is answered with what can go without, and asks again when it is asked again."""
    talk = Conversation(external=ExternalLimits())
    peer = talk.client()
    for number in range(8):
        put(talk, peer, number, 4096)
    talk.failure = "no space left on device"
    for _ in range(2):
        request_id = peer.post(Evict(1000))
        writes = 0
        for _ in range(5):
            talk.turn()
            for job in talk.take_jobs():
                writes += 1
                talk.do(job)
        assert peer.take(request_id, Number).value == 0
        assert writes == 1
    talk.failure = ""
    request_id = peer.post(Evict(1000))
    talk.settle_outside()
    assert peer.take(request_id, Number).value >= 1000
    talk.store.check()


# -- what is deleted while it is read ----------------------------------------------------------------


def read_in_vain(talk: Conversation, peer: Peer) -> Read:
    """Spill object 0, ask for it, and delete it before the worker has read it; return what that is to do."""
    put(talk, peer, 0, 40_000)
    put(talk, peer, 1, 60_000)
    peer.ask(Delete([name(1)]), Done)
    assert spilled(talk) == [0]
    peer.post(peer.wanted([name(0)], wait=True))
    talk.turn()
    (job,) = (job for job in talk.take_jobs() if isinstance(job, Read))
    peer.ask(Delete([name(0)]), Done)
    return job


def test_an_entry_that_is_used_anew_while_its_old_object_is_read(talk: Conversation) -> None:
    """The new object can be spilled and come back, whatever becomes of the old one."""
    peer = talk.client()
    job = read_in_vain(talk, peer)
    put(talk, peer, 2, 10_000)
    asked = peer.post(Evict(10_000))
    talk.settle_outside()
    peer.take(asked, Number)
    assert spilled(talk) == [2]
    get(talk, peer, [2])
    talk.containers[job.number] = bytes(HEADER_BYTES + 40_000)
    talk.do(job)
    talk.settle_outside()
    get(talk, peer, [2])
    assert not list(talk.store._objects.spilling.extents())  # type: ignore[union-attr]  # it has one


@pytest.mark.parametrize("is_read", [True, False])
def test_a_get_of_what_is_deleted_while_it_comes_back(talk: Conversation, is_read: bool) -> None:
    """Who does not wait is told that it is not there, be it read already or not; who waits goes on waiting."""
    peer = talk.client()
    put(talk, peer, 0, 40_000)
    put(talk, peer, 1, 60_000)
    peer.ask(Delete([name(1)]), Done)
    asked = peer.post(peer.wanted([name(0), name(9)]))
    waits = peer.post(peer.wanted([name(0)], wait=True))
    talk.turn()
    jobs = talk.take_jobs() if is_read else []
    peer.ask(Delete([name(0)]), Done)
    for job in jobs:
        talk.do(job)
    talk.settle_outside()
    assert peer.take(asked, Objects).found == [ABSENT, ABSENT]
    assert waits not in peer.replies
    put(talk, peer, 0, 10)
    peer.take(waits, Objects)


def test_a_reading_that_fails_of_what_was_deleted(talk: Conversation) -> None:
    """Who waits for that id goes on waiting, for another object."""
    peer = talk.client()
    job = read_in_vain(talk, peer)
    other = talk.client()
    asked = other.post(other.wanted([name(0)], wait=True))
    talk.failure = "its container is gone"
    talk.do(job)
    talk.failure = ""
    assert asked not in other.replies
    put(talk, peer, 0, 10)
    other.take(asked, Objects)


def test_a_get_has_what_is_not_written_yet_make_room(talk: Conversation) -> None:
    """It is not refused before anything was written for it; nor are those behind it, for which there is room."""
    peer = talk.client()
    put(talk, peer, 0, 20_000)
    put(talk, peer, 1, 20_000)
    asked = peer.post(Evict(40_000))
    talk.settle_outside()
    peer.take(asked, Number)
    for number in range(2, 8):
        put(talk, peer, number, 9_000)
    get(talk, peer, [0, 1])


# -- room ---------------------------------------------------------------------------------------------


def test_one_extent_is_made_of_copies_that_go(talk: Conversation) -> None:
    """What is free lies scattered: what lies between is written, and goes; nothing is moved, and nothing lost."""
    peer = talk.client()
    for number in range(60):
        put(talk, peer, number)
    get(talk, peer, range(0, 60, 2))  # the others go first
    put(talk, peer, 500, 20_000)
    gone = spilled(talk)
    assert any(number % 2 == 0 for number in gone)
    assert any(number % 2 == 1 for number in gone)
    assert not talk.store._room.mover.compactions
    for number in range(60):
        get(talk, peer, [number], wait=True)
    assert not talk.store._room.mover.moves


def test_what_is_kept_is_not_in_the_way_where_others_are() -> None:
    """A stretch of others is written, though less would have to be where kept objects lie."""
    talk = Conversation(external=ExternalLimits(high_water=1.0))
    peer = talk.client()
    for number in range(60):
        put(talk, peer, number)
    kept = range(0, 20, 2)
    peer.ask(Keep(True, [name(number) for number in kept]), Done)
    peer.ask(Delete([name(number) for number in range(1, 20, 2)]), Done)
    put(talk, peer, 500, 18_000)
    assert spilled(talk)
    assert not set(spilled(talk)) & set(kept)


def test_no_more_is_written_than_somebody_waits_for() -> None:
    """Once a creation has its room, nothing is written on its behalf."""
    talk = Conversation(external=ExternalLimits(high_water=1.0))
    peer = talk.client()
    for number in range(60):
        put(talk, peer, number)
    put(talk, peer, 500, 18_000)
    assert len(spilled(talk)) < 20
    assert talk.store._room.residents.external is not None
    assert not talk.store._room.residents.external.copies


def test_where_nothing_can_be_written_objects_are_moved() -> None:
    """A full external store makes no room; what lies scattered is brought together all the same, whatever is read meanwhile."""
    talk = Conversation(external=ExternalLimits(max_bytes=4_700))
    peer = talk.client()
    for number in range(60):
        put(talk, peer, number)
    asked = peer.post(Evict(2_000))
    talk.settle_outside()
    peer.take(asked, Number)
    gone = spilled(talk)
    assert len(gone) == 2
    peer.ask(Delete([name(number) for number in range(10, 60, 2)]), Done)
    wanted = peer.wanted([name(gone[0])])
    coming = peer.post(wanted)
    jobs = talk.take_jobs()
    assert any(isinstance(job, Read) for job in jobs)
    created = peer.post(peer.new(name(500), 20_000))
    talk.turn()
    assert talk.store._room.mover.compactions
    for job in jobs:
        talk.do(job)
    talk.settle_outside()
    peer.take(coming, Objects)
    peer.take(created, Created)
    talk.store.check()


def test_where_copies_cannot_go_objects_are_moved() -> None:
    """The same when nothing was ever written."""
    talk = Conversation(external=ExternalLimits(max_bytes=1))
    peer = talk.client()
    for number in range(60):
        peer.put(name(number), SIZE)
    peer.ask(Delete([name(number) for number in range(0, 60, 2)]), Done)
    put(talk, peer, 500, 20_000)
    assert talk.store._room.mover.compactions
    get(talk, peer, [500])


def test_what_is_deleted_while_it_is_written_is_no_pin_in_passing() -> None:
    """It is in the way until it is written, however often the store looks whether it can go; nothing is moved in vain meanwhile."""
    talk = Conversation(16 * 64, external=ExternalLimits(high_water=0.0))
    peer, other = talk.client(), talk.client()
    for number, lines in enumerate((4, 1, 4)):
        put(talk, peer, number, 64 * lines)
    other.get(name(1))
    request = peer.new(name(3), 64 * 7)
    peer.ask(request, Created)
    peer.write(Seal(name(3)))
    peer.release(request.slot)
    (job,) = talk.take_jobs()
    for number in (0, 2, 3):
        peer.ask(Delete([name(number)]), Done)
    request_id = peer.post(peer.new(name(4), 64 * 8)._replace(timeout_ns=FOR_EVER))
    for _ in range(20):
        talk.carry_out(talk.store.offer_room(0, talk.now_ns))
        talk.wake()
        if talk.store.upkeep.has_urgent_work:
            talk.advance()
    assert talk.store._room.mover.compactions == 1
    talk.do(job)
    talk.turn()
    peer.take(request_id, Created)
    talk.store.check()


@pytest.mark.parametrize(("n_in_vain", "comes"), [(1, True), (7, True), (8, False)])
def test_what_comes_back_has_objects_moved_that_are_pinned_in_passing(
    n_in_vain: int, comes: bool
) -> None:
    """They are moved when nobody looks at them any more; who waits is told when somebody does again and again."""
    talk = Conversation(external=ExternalLimits(high_water=1.0))
    peer, reader = talk.client(), talk.client()
    put(talk, peer, 0, 20_000)
    asked = peer.post(Evict(20_000))
    talk.settle_outside()
    peer.take(asked, Number)
    for number, size in ((1, 16_000), (2, 65536 - 32_000), (3, 16_000)):
        put(talk, peer, number, size)
    spilling = talk.store._objects.spilling
    assert spilling is not None
    # Nothing more can be written.
    spilling.limits = ExternalLimits(max_bytes=20_500, high_water=1.0)
    peer.ask(Delete([name(1), name(3)]), Done)
    mover, slot = talk.store._room.mover, reader.free_slots.pop()

    def look_at_it() -> None:
        talk.memory.barrier()
        if mover.compactions <= n_in_vain:
            talk.write_slot(slot, talk.store._parts.table.find(name(2)) + 1)

    mover._barrier = look_at_it

    def ask() -> tuple[int, list[Job]]:
        wanted = peer.post(peer.wanted([name(0)]))
        while not (jobs := talk.take_jobs()) and wanted not in peer.replies:
            talk.advance()
            talk.write_slot(slot, 0)
        return wanted, jobs

    wanted, jobs = ask()
    assert mover.compactions == n_in_vain + comes
    if not comes:
        assert peer.take(wanted, Failed).failure is Failure.FULL
        wanted, jobs = ask()
    for job in jobs:
        talk.do(job)
    talk.settle_outside()
    peer.take(wanted, Objects)
    get(talk, peer, [0, 2])


class Wanted(Conversation):
    """A store in which nothing may go, where there is a little less room than an object needs that is to come back.

    Attributes
    ----------
    writer, peer : Peer
        Who is writing something, as large as all that is left, and who has put object 0.
    """

    def __init__(self) -> None:
        super().__init__(1 << 20, external=ExternalLimits(high_water=1.0))
        self.writer, self.peer = self.client(), self.client()
        put(self, self.peer, 0, 10_000)
        asked = self.peer.post(Evict(10_000))
        self.settle_outside()
        self.peer.take(asked, Number)

    def fill(self) -> None:
        """Have the rest of the store written."""
        self.writer.create(name(100), self.store._room.largest_bytes - 5_000)

    def ask(self) -> int:
        """Ask for the object."""
        asked = self.peer.post(self.peer.wanted([name(0)]))
        self.settle()
        return asked

    def take(self, asked: int) -> None:
        """See that it comes."""
        self.settle_outside()
        (found,) = self.peer.take(asked, Objects).found
        assert bytes(self.raw[found[0] : found[0] + 10_000]) == content(0, 10_000)
        self.store.check()


@pytest.mark.parametrize("comes_back", [True, False])
def test_what_comes_back_waits_for_leases(comes_back: bool) -> None:
    """They are recalled, and none is granted meanwhile; it is refused only when a client keeps its own."""
    talk = Wanted()
    lessee = talk.client()
    lease = lessee.ask(AskLease(100), Leased)
    busy = talk.layout.boards // 8 + lessee.free_slots[-1] // 512 * 512 + BUSY_WORD
    talk.words[busy] = 1
    talk.fill()
    asked, turns = talk.ask(), 0
    while not talk.take_jobs() and asked not in talk.peer.replies:
        assert talk.store.has_unsettled, "the store does not look any more"
        talk.settle()
        turns += 1
        assert turns < 2000
        if turns == 5:
            assert talk.writer.ask(AskLease(100), Leased).size_bytes == 0
        if turns == 10 and comes_back:
            talk.words[busy] = 0
    if comes_back:
        assert turns == 11
    else:
        assert talk.peer.take(asked, Failed).leased_bytes == lease.size_bytes
        assert not talk.store.has_unsettled
    talk.store.check()


@pytest.mark.parametrize("how", ["released", "left"])
def test_what_comes_back_has_room_that_nobody_has_any_more(how: str) -> None:
    """What is deleted has been let go of since, or a client has left much that it was writing, which goes by and by."""
    talk = Wanted()
    leaver = talk.client()
    slots = [leaver.create(name(number), 6_000) for number in (1, 2, 3)]
    if how == "released":
        for number in (1, 2, 3):
            leaver.write(Seal(name(number)))
        leaver.ask(Delete([name(number) for number in (1, 2, 3)]), Done)
    talk.fill()
    if how == "released":
        for slot in slots:
            leaver.release(slot)
    else:
        talk.store._room.most_at_once = 1
        leaver.post(Detach())
        for slot in slots:
            leaver.release(slot)
    asked = talk.ask()
    for job in talk.take_jobs():
        talk.do(job)
    talk.take(asked)


def test_who_may_not_pass_waits_for_what_is_being_written(talk: Conversation) -> None:
    """It is not refused while that may make room; and it is when nothing is written any more, though another one goes on waiting."""
    peer = talk.client()
    peer.create(name(1000), 40_000)  # and goes on writing it
    large = peer.post(peer.new(name(1001), 60_000)._replace(timeout_ns=FOR_EVER))
    for number in range(MAX_PASSES):
        peer.put(name(number), 300)
    small = peer.post(peer.new(name(500), 300))
    talk.turn()
    assert small not in peer.replies
    talk.settle_outside()
    assert peer.take(small, Failed).failure is Failure.FULL
    assert large not in peer.replies
    talk.store.check()


def test_referenced_objects_go_and_come_back(talk: Conversation) -> None:
    """A reference says that an object is not lost, not where it is; it goes with its last owner, wherever it is."""
    peer = talk.client()
    for number in range(90):
        put(talk, peer, number, codec=REFERENCED)
    assert len(spilled(talk)) > 20
    for number in range(90):
        get(talk, peer, [number])
    for number in range(90):
        peer.tell(Release(name(number), 0))
    talk.settle_outside()
    assert not talk.ids()
    assert not talk.containers
    talk.store.check()


def test_nobodys_objects_go_after_a_restart_though_they_are_spilled(talk: Conversation) -> None:
    """A successor waits for their owners, as for those in memory."""
    peer = talk.client()
    for number in range(90):
        put(talk, peer, number, codec=REFERENCED)
    assert spilled(talk)
    succeed(talk)
    for owner in list(talk.store._greeter.sessions):
        talk.carry_out(talk.store.disconnect(owner, talk.now_ns))
    talk.later(2 * TICKET_NS / 1e9)
    talk.settle_outside()
    assert not talk.ids()
    talk.store.check()


def test_a_store_without_the_external_store_protects_only_what_is_in_memory() -> None:
    """A referenced object that was spilled before leaves nothing behind in its entry: the next one there can be evicted."""
    talk = Conversation(external=ExternalLimits())
    put(talk, talk.client(), 0, 30_000, codec=REFERENCED)
    talk.client().post(Evict(30_000))
    talk.settle_outside()
    assert spilled(talk) == [0]
    later = Reopened(talk.layout, talk.words, talk.raw)
    peer = later.client()
    entry = later.store._parts.table.find(name(0))
    peer.ask(Delete([name(0)]), Done)
    peer.put(name(1), 30_000)
    assert later.store._parts.table.find(name(1)) == entry
    assert peer.ask(Evict(30_000), Number).value == 30_000
    later.store.check()


def test_a_copy_of_which_nothing_is_known_is_none(talk: Conversation) -> None:
    """A successor that finds the word damaged writes the object anew before it goes."""
    put(talk, talk.client(), 0, 30_000)
    talk.client().post(Evict(30_000))
    talk.settle_outside()
    get(talk, talk.client(), [0])
    table = talk.store._parts.table
    entry = table.find(name(0))
    assert table.copy_of(entry)[0]
    talk.words[talk.layout.entry(entry) // 8 + EntryWord.COPY_CHECK] ^= 1
    succeed(talk)
    assert talk.store._parts.table.copy_of(entry) == (0, 0)
    talk.store.check()


def test_what_goes_though_it_has_a_copy_leaves_it_to_nobody(talk: Conversation) -> None:
    """A successor keeps its room for who holds it, and its container is deleted."""
    peer = talk.client()
    put(talk, peer, 0, 30_000)
    peer.post(Evict(30_000))
    talk.settle_outside()
    get(talk, peer, [0])
    peer.get(name(0))
    table = talk.store._parts.table
    entry = table.find(name(0))
    table.spoil(entry)
    successor = talk.new_store(talk.words, talk.raw)
    successor.recover(lambda *_: True, talk.now_ns)
    assert successor._objects.releases.limbo == {entry}
    successor.check()


def test_a_container_of_which_little_is_left_is_emptied(talk: Conversation) -> None:
    """What is wanted of it is written anew with others: there is never more than twice of that."""
    peer = talk.client()
    fill(talk, peer)
    left = range(0, MANY, 5)
    peer.ask(Delete([name(number) for number in range(MANY) if number not in left]), Done)
    talk.settle_outside()
    talk.store.check()
    spilling = talk.store._objects.spilling
    assert spilling is not None
    containers = spilling._containers
    n_copied = sum(len(containers.entries(number)) for number in talk.containers)
    assert n_copied
    assert containers.total_bytes <= 2 * n_copied * (HEADER_BYTES + 1024)
    for number in left:
        get(talk, peer, [number])
    peer.ask(Delete([name(number) for number in left]), Done)
    talk.settle_outside()
    assert not talk.containers


def test_a_successor_empties_containers_too(talk: Conversation) -> None:
    """How much of a container is left it sees by the size of its file."""
    peer = talk.client()
    fill(talk, peer, 90)
    there = spilled(talk)
    succeed(talk)
    talk.store.tidy_external({n: 10 * len(data) for n, data in talk.containers.items()})
    before = set(talk.containers)
    for _ in before:
        talk.settle_outside()
    talk.store.check()
    assert not before & talk.containers.keys()
    other = talk.client()
    get(talk, other, there)
