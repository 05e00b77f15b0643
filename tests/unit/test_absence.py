"""Seeing in the segment that something is not there: what settles it, and what does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shmplasma.absence import Absence
from shmplasma.attachment import Attachment
from shmplasma.layout import ControlWord, EntryWord, HeaderWord
from shmplasma.outbox import PLACES, RECORDS, unread
from shmplasma.posted import Seal
from shmplasma.replies import Done, Objects
from shmplasma.requests import Delete, Flush, Get
from tests.conversation import Conversation, Peer, name

A, B = map(name, range(1, 3))


@pytest.fixture
def talk() -> Conversation:
    """Return a store of 1 MiB."""
    return Conversation(1 << 20)


@pytest.fixture
def peer(talk: Conversation) -> Peer:
    """Return a client of it."""
    return talk.client()


def absence_in(talk: Conversation) -> Absence:
    """Return what a client sees by."""
    segment = SimpleNamespace(layout=talk.layout, read_map=talk.raw, words=talk.words)
    return Absence(cast("Attachment", segment))


def are_absent(absence: Absence, object_ids: Sequence[bytes]) -> bool:
    """Tell whether it can be seen that there are no such objects, without waiting."""
    return absence.unread() == [] and all(map(absence.is_free, object_ids))


def test_what_was_never_there_and_what_has_gone_is_absent(talk: Conversation, peer: Peer) -> None:
    """An object is not as long as there is any."""
    absence = absence_in(talk)
    assert are_absent(absence, [A, B])
    peer.put(A, 64)
    assert are_absent(absence, [B])
    assert not are_absent(absence, [A])
    assert not are_absent(absence, [B, A])
    peer.ask(Delete([A]), Done)
    assert are_absent(absence, [A, B])


def test_an_entry_in_whatever_state_settles_nothing(talk: Conversation, peer: Peer) -> None:
    """One that is not sealed, or was deleted while it is pinned: the store knows what that means."""
    absence = absence_in(talk)
    slot = peer.create(A)
    assert not are_absent(absence, [A])
    peer.write(Seal(A))
    peer.release(slot)
    pin = peer.free_slots.pop()
    peer.ask(Get(True, [A], [pin]), Objects)
    peer.ask(Delete([A]), Done)
    assert not are_absent(absence, [A])
    peer.release(pin)
    talk.wake()
    assert are_absent(absence, [A])


def test_what_the_store_has_not_read_may_be_anything(talk: Conversation, peer: Peer) -> None:
    """Whoever has written it."""
    absence = absence_in(talk)
    other = talk.client()
    slot = other.create(B)
    other.write_silently(Seal(B))
    assert not are_absent(absence, [A])
    peer.ask(Flush(), Done)
    assert not are_absent(absence, [A]), "the store has not read it for somebody else's request"
    other.ask(Flush(), Done)
    assert are_absent(absence, [A])
    other.release(slot)


def test_an_outbox_may_change_hands(talk: Conversation) -> None:
    """The numbers of its next client's records begin anew."""
    absence = absence_in(talk)
    talk.client()
    first = talk.client()
    for number in range(3, RECORDS + 6):
        first.put(name(number), 64)
    talk.disconnect(first)
    second = talk.client()
    assert are_absent(absence, [A])
    slot = second.create(A)
    second.write_silently(Seal(A))
    assert not are_absent(absence, [B])
    second.ask(Flush(), Done)
    assert are_absent(absence, [B])
    second.release(slot)


def test_a_table_whose_chains_are_written_anew_settles_nothing(talk: Conversation) -> None:
    """A successor makes the number odd meanwhile."""
    absence = absence_in(talk)
    talk.words[HeaderWord.INSERTIONS] += 1
    assert not are_absent(absence, [A])
    talk.words[HeaderWord.INSERTIONS] += 1
    assert are_absent(absence, [A])


def test_a_damaged_chain_is_left(talk: Conversation, peer: Peer) -> None:
    """One that leads in a circle does not keep anybody for ever, and settles nothing."""
    absence = absence_in(talk)
    peer.put(A, 64)
    first = talk.layout.entries // 8
    words, buckets = talk.words, talk.layout.buckets // 8
    words[first + EntryWord.NEXT] = 1
    for bucket in range(talk.layout.n_buckets):
        words[buckets + bucket] = 1
    assert not are_absent(absence, [B])


def test_so_many_outboxes_are_not_looked_into(talk: Conversation) -> None:
    """It would take longer than to ask."""
    absence = absence_in(talk)
    peers = [talk.client() for _ in range(100)]
    assert are_absent(absence, [A])
    peers.append(talk.client())
    assert not are_absent(absence, [A])


class Changing:
    """The segment's words, to which something happens after so many have been read."""

    def __init__(self, words: memoryview, reads: int, happens: Callable[[], object]) -> None:
        self._words = words
        self._reads = reads
        self._happens = happens

    def __getitem__(self, at: int) -> int:
        """Return a word."""
        if self._reads == 0:
            self._happens()
        self._reads -= 1
        return int(self._words[at])


@pytest.mark.parametrize("reads", range(8))
def test_a_ring_that_goes_round_meanwhile_was_not_read(
    talk: Conversation, peer: Peer, reads: int
) -> None:
    """Of two records that are unread when the looking begins one may be so still, although the first one's place has another number."""
    for _ in range(2):
        peer.write_silently(Seal(A))
    count = talk.layout.control // 8 + ControlWord.ACKNOWLEDGED

    def go_round() -> None:
        talk.words[count] += 1
        for _ in range(PLACES - 1):
            peer.write_silently(Seal(A))

    words: Any = Changing(talk.words, reads, go_round)
    found = unread(words, talk.layout, 1)
    assert found in ([(count, 2)], [(count, PLACES + 1)])


def test_what_is_to_be_read_is_what_is_written_now(talk: Conversation, peer: Peer) -> None:
    """So much of each outbox; what is written later is not waited for."""
    absence, other = absence_in(talk), talk.client()
    slots = [each.create(name(number)) for number, each in enumerate((peer, other), 10)]
    peer.write_silently(Seal(name(10)))
    other.write_silently(Seal(name(11)))
    wanted = absence.unread()
    assert wanted is not None
    assert [least for _, least in wanted] == [1, 1]
    assert not absence.is_read(wanted)
    peer.ask(Flush(), Done)
    assert not absence.is_read(wanted)
    other.ask(Flush(), Done)
    peer.put(A, 64)
    assert absence.is_read(wanted)
    for each, slot in zip((peer, other), slots, strict=True):
        each.release(slot)


def test_a_ring_that_is_full_can_be_waited_for(talk: Conversation, peer: Peer) -> None:
    """All records that it takes are unread, from some place on."""
    for number in range(3, 8):
        peer.put(name(number), 64)
    slot = peer.create(A)
    for _ in range(PLACES):
        peer.write_silently(Seal(A))
    count = talk.layout.control // 8 + ControlWord.ACKNOWLEDGED
    before = talk.words[count]
    assert unread(talk.words, talk.layout, 1) == [(count, before + PLACES)]
    peer.release(slot)


def test_what_is_read_all_the_time_is_not_seen(talk: Conversation, peer: Peer) -> None:
    """Who finds that the store has read on each time that he looks asks it."""
    peer.write_silently(Seal(A))
    count = talk.layout.control // 8 + ControlWord.ACKNOWLEDGED

    class Reading:
        def __getitem__(self, at: int) -> int:
            if at == count:
                talk.words[count] += RECORDS
            return int(talk.words[at])

    words: Any = Reading()
    assert unread(words, talk.layout, 1) is None


@pytest.mark.parametrize("reads", range(3))
def test_what_is_put_meanwhile_is_not_taken_for_absent(
    talk: Conversation, peer: Peer, reads: int
) -> None:
    """Whoever has followed a chain looks whether it was still the same."""
    absence = absence_in(talk)
    words: Any = Changing(talk.words, reads, lambda: peer.put(A, 64))
    absence._words = words
    assert not absence.is_free(A)
