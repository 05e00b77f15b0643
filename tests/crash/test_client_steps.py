"""A client that is killed after each single step of what it does; nobody else notices, and nothing stays."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from zlib import crc32

import pytest

from shmplasma.layout import BOARD_WORDS, align_up
from shmplasma.leases import BUSY_WORD
from shmplasma.offset_pins import pin_word
from shmplasma.posted import Claim, Publish, Seal
from shmplasma.replies import ABSENT, Created, Leased, Listing
from shmplasma.requests import AskLease, Create, List, Post
from tests.conversation import Conversation, Peer, name, records

SHARED, CHOSEN, PUT, SECOND, CLAIMED = map(name, range(1, 6))


def steps(talk: Conversation, peer: Peer) -> Iterator[bytes | None]:
    """Create, seal, put and read step by step; yield the id of each object that is complete from then on."""
    layout = talk.layout
    slot = peer.free_slots.pop()
    yield None
    peer.post(Create(CHOSEN, 100, 0, 0, slot))
    yield None
    talk.turn()
    peer.take(peer.last_id, Created)
    yield None
    assert peer.outbox.append(Seal.KIND, CHOSEN)
    yield CHOSEN  # the store reads the outbox of a client that has died
    peer.tell(Post())
    yield None
    talk.write_slot(slot, 0)
    yield None
    busy = layout.boards // 8 + slot // BOARD_WORDS * BOARD_WORDS + BUSY_WORD
    talk.words[busy] = 1
    yield None
    lease = peer.ask(AskLease(100), Leased)
    yield None
    talk.raw[lease.offset : lease.offset + 100] = bytes(100)
    yield None
    message = Publish(PUT, lease.offset, 100, 0, 0)
    assert peer.outbox.append(message.KIND, message.encode())
    yield PUT
    peer.tell(Post())
    yield None
    message = Publish(SECOND, lease.offset + 256, 100, 0, 0)
    assert peer.outbox.append(message.KIND, message.encode())
    yield SECOND
    offset = lease.offset + 512
    talk.write_slot(slot, pin_word(crc32(CLAIMED), offset))
    yield None
    claim = Claim(CLAIMED, offset, 100, 0, 0, slot)
    assert peer.outbox.append(claim.KIND, claim.encode())
    yield None
    talk.words[busy] = 0
    yield None
    talk.raw[offset : offset + 100] = bytes(100)
    assert peer.outbox.append(Seal.KIND, CLAIMED)
    yield CLAIMED
    talk.write_slot(slot, 0)
    yield None
    entry = shared_entry(talk)
    talk.write_slot(slot, entry + 1)
    yield None
    talk.write_slot(slot, 0)
    yield None


def shared_entry(talk: Conversation) -> int:
    """Return the entry of the object that is there from the beginning."""
    layout = talk.layout
    for entry in range(16):
        start = layout.entry(entry)
        if bytes(talk.raw[start + 8 : start + 28]) == SHARED:
            return entry
    raise AssertionError("it is not there")


def used_bytes(talk: Conversation) -> int:
    """Return what the store says is in use."""
    lines = dict(line.split(": ") for line in talk.store.describe().splitlines() if ": " in line)
    return int(lines["capacity bytes"]) - int(lines["free bytes"])


N_STEPS = 15


@pytest.mark.parametrize("number", range(N_STEPS + 1))
def test_killed_after_each_step(number: int) -> None:
    """What it sealed stays, all else of it goes at once, and others hold what they held."""
    talk = Conversation(4 << 20)
    other = talk.client()
    other.put(SHARED, 100)
    (found,), (held,) = other.get(SHARED)
    assert found != ABSENT
    victim = talk.client()
    complete = {SHARED}
    taken = list(islice(steps(talk, victim), number))
    assert len(taken) == number
    complete.update(object_id for object_id in taken if object_id is not None)
    talk.disconnect(victim)
    talk.turn()
    talk.store.check()
    listed = records(other.ask(List(0), Listing))
    assert {record.object_id for record in listed if record.sealed} == complete
    assert all(record.sealed for record in listed), "an unsealed object is left"
    assert used_bytes(talk) == sum(
        align_up(each.data_size + each.metadata_size, 64) for each in listed
    )
    assert talk.read_slot(held) == shared_entry(talk) + 1
    later = talk.client()
    later.put(name(99), 100)
    assert "leased bytes: 0" in talk.store.describe()
