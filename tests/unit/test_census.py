"""Lists of objects that a client makes by itself: when they are the store's, and when the store is to be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple, cast
from zlib import crc32

import pytest

from shmplasma import census
from shmplasma.absence import Absence
from shmplasma.attachment import Attachment
from shmplasma.layout import BOARD_WORDS, EntryState, EntryWord, HeaderWord, Layout
from shmplasma.link import Link
from shmplasma.offset_pins import pin_word
from shmplasma.pins import words_on
from shmplasma.posted import Abort, Seal
from shmplasma.replies import Done, Listing, Number
from shmplasma.requests import Delete, Grow, Keep, List
from shmplasma.settling import Settling
from tests.conversation import Conversation, Peer, Record, census_in, name, records

A, B, C = map(name, range(1, 4))


@pytest.fixture
def talk() -> Conversation:
    """Return a store of 2 MiB in which there was an object."""
    talk = Conversation(2 << 20)
    peer = talk.client()
    peer.put(A)
    peer.ask(Delete([A]), Done)
    talk.disconnect(peer)
    return talk


@pytest.fixture
def peer(talk: Conversation) -> Peer:
    """Return a client of it."""
    return talk.client()


def seen(talk: Conversation) -> list[Record] | None:
    """Return what a client sees by itself."""
    listing = census_in(talk).listing(0)
    return None if listing is None else records(listing)


def said(peer: Peer) -> list[Record]:
    """Return what the store says."""
    listing = peer.ask(List(0), Listing)
    there = records(listing)
    while listing.next_start:
        listing = peer.ask(List(listing.next_start), Listing)
        there += records(listing)
    return there


def entry_word(talk: Conversation, object_id: bytes, word: EntryWord) -> int:
    """Return where in the segment a word of an object's entry is."""
    return talk.layout.entry(talk.store._parts.table.find(object_id)) // 8 + word


# -- what is seen ----------------------------------------------------------------------------------


def test_it_is_what_the_store_says(talk: Conversation, peer: Peer) -> None:
    """Sizes, holders, times, states, and what is kept; of unsealed objects, and where entries are free again."""
    reader = talk.client()
    assert seen(talk) == []
    peer.put(C)
    peer.create(A, 10, 2)
    peer.create(B, 3)
    peer.ask(Keep(True, [B]), Done)
    peer.write(Seal(A))
    reader.get(A, A)
    peer.ask(Delete([C]), Done)
    listing = peer.ask(List(0), Listing)
    assert [(each.object_id, each.holders) for each in records(listing)] == [(A, 2), (B, 1)]
    assert census_in(talk).listing(0) == listing


def test_who_makes_an_object_holds_it(talk: Conversation, peer: Peer) -> None:
    """Also when he has let go of it; and he counts once."""
    slot = peer.create(A)
    assert [each.holders for each in seen(talk) or ()] == [1]
    peer.release(slot)
    assert [each.holders for each in seen(talk) or ()] == [1]
    assert seen(talk) == said(peer)
    peer.write(Abort(A))
    assert seen(talk) == []


def test_clients_are_counted_and_not_their_pins(talk: Conversation, peer: Peer) -> None:
    """Whatever one pins how often, on however many boards."""
    peer.put(A)
    _, (slot, _) = peer.get(A, A)
    board = peer.ask(Grow(), Number).value
    talk.write_slot(board * BOARD_WORDS + 300, talk.read_slot(slot))
    assert [each.holders for each in seen(talk) or ()] == [1]
    talk.client().get(A)
    assert [each.holders for each in seen(talk) or ()] == [2]
    assert seen(talk) == said(peer)


def test_what_stands_on_boards_and_is_no_pin_counts_for_nothing(
    talk: Conversation, peer: Peer
) -> None:
    """As with the store; and who has left holds nothing."""
    peer.put(A)
    other = talk.client()
    talk.write_slot(other.free_slots[0], 4711)
    other.get(A)
    talk.disconnect(other)
    assert [each.holders for each in seen(talk) or ()] == [0]


def test_a_long_list_comes_in_parts(talk: Conversation, peer: Peer) -> None:
    """Of so many entries each; together they have everything once."""
    for n in range(4200):
        peer.put(name(n), 0)
    peer.get(name(4150))
    peer.ask(Delete([name(n) for n in range(100)]), Done)
    first = census_in(talk).listing(0)
    assert first is not None
    assert first.next_start == 4096
    second = census_in(talk).listing(4096)
    assert second is not None
    assert second.next_start == 0
    assert records(first) + records(second) == said(peer)
    assert [each.holders for each in records(second)].index(1) == 4150 - 4096
    assert census_in(talk).listing(4320) == Listing(0, b"", b"")


# -- what is asked for -----------------------------------------------------------------------------


class Scene(NamedTuple):
    """A store with a client."""

    talk: Conversation
    peer: Peer


def _unread(scene: Scene) -> None:
    scene.peer.create(C)
    scene.peer.write_silently(Seal(C))


def _doomed(scene: Scene) -> None:
    scene.peer.get(A)
    scene.peer.ask(Delete([A]), Done)


def _in_limbo(scene: Scene) -> None:
    scene.peer.create(C)
    scene.peer.write(Abort(C))
    scene.talk.turn()


def _in(state: EntryState) -> Callable[[Scene], None]:
    def enter(scene: Scene) -> None:
        table = scene.talk.store._parts.table
        table.set_state(table.find(A), state)

    return enter


def _deleted_on_its_way(scene: Scene) -> None:
    scene.talk.mark(A)


def _pinned_by_offset(scene: Scene) -> None:
    offset = scene.talk.words[entry_word(scene.talk, A, EntryWord.OFFSET)]
    scene.talk.write_slot(scene.peer.free_slots.pop(), pin_word(crc32(A), offset))


def _of_nobody(scene: Scene) -> None:
    scene.peer.create(C)
    scene.talk.words[entry_word(scene.talk, C, EntryWord.OWNER)] = 0


def _of_a_board_that_is_nobodys(scene: Scene) -> None:
    scene.peer.create(C)
    board = scene.talk.words[HeaderWord.BOARDS_END]
    scene.talk.words[entry_word(scene.talk, C, EntryWord.OWNER)] = board * BOARD_WORDS + 2


@pytest.mark.parametrize(
    "happens",
    [
        _unread,
        _doomed,
        _in_limbo,
        *map(_in, (EntryState.EVICTING, EntryState.MOVING, EntryState.SPILLED)),
        _deleted_on_its_way,
        _pinned_by_offset,
        _of_nobody,
        _of_a_board_that_is_nobodys,
    ],
)
def test_what_the_store_is_asked_about(
    talk: Conversation, peer: Peer, happens: Callable[[Scene], None]
) -> None:
    """Whatever cannot be seen, or means something that only the store knows."""
    for object_id in (A, B):
        peer.put(object_id)
    assert seen(talk) is not None
    happens(Scene(talk, peer))
    assert seen(talk) is None


def test_who_has_spoken_past_his_outbox_asks_once(talk: Conversation) -> None:
    """The answer comes after what he has said; and one whose store has gone asks as well."""
    segment = cast(
        "Attachment", SimpleNamespace(layout=talk.layout, read_map=talk.raw, words=talk.words)
    )
    channel = SimpleNamespace(is_quiet=True)
    link = SimpleNamespace(channel=channel, aside=2)
    settling = Settling(segment, Absence(segment), cast("Link", link), lambda: None)
    own = census.Census(segment, settling)
    assert own.listing(0) is None
    assert own.listing(0) == Listing(0, b"", b"")
    channel.is_quiet = False
    assert own.listing(0) is None


# -- what changes meanwhile ------------------------------------------------------------------------


def between(monkeypatch: pytest.MonkeyPatch, changes: Iterable[Callable[[], object]]) -> None:
    """Have things change after the entries were read, at each attempt another."""
    left = iter(changes)

    def read_and_change(raw: memoryview, layout: Layout, boards: Iterable[int]) -> set[int]:
        next(left, lambda: None)()
        return words_on(raw, layout, boards)

    monkeypatch.setattr(census, "words_on", read_and_change)


def test_an_entry_that_is_used_anew_is_read_anew(
    talk: Conversation, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is SEALED before and afterwards, and another object."""
    peer.put(A, 64)

    def exchange() -> None:
        peer.ask(Delete([A]), Done)
        peer.put(B, 128)

    between(monkeypatch, [exchange])
    assert [(each.object_id, each.data_size) for each in seen(talk) or ()] == [(B, 128)]
    assert seen(talk) == said(peer)


def test_a_seal_is_seen_whole(
    talk: Conversation, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the time that it took."""
    peer.create(A)
    between(monkeypatch, [lambda: peer.write(Seal(A))])
    assert seen(talk) == said(peer)
    assert said(peer)[0].sealed


def test_what_changes_all_the_time_is_asked_for(
    talk: Conversation, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some attempts; what comes meanwhile is no change of what there is."""
    peer.put(A)
    between(monkeypatch, [partial(peer.put, B)])
    assert [each.object_id for each in seen(talk) or ()] == [A]
    changes = 0

    def exchange() -> None:
        nonlocal changes
        peer.ask(Delete([name(changes + 1)]), Done)
        changes += 1
        peer.put(name(changes + 1))

    peer.ask(Delete([B]), Done)
    between(monkeypatch, [exchange] * 10)
    assert seen(talk) is None
    assert changes == census._ATTEMPTS


def test_a_board_that_changes_hands_is_asked_for(
    talk: Conversation, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pins may be those of either client."""
    other = talk.client()
    peer.put(A)
    other.get(A)

    def words_and_leave(raw: memoryview, layout: Layout, boards: Iterable[int]) -> set[int]:
        words = words_on(raw, layout, boards)
        if other.number in talk.peers:
            talk.disconnect(other)
        return words

    monkeypatch.setattr(census, "words_on", words_and_leave)
    assert seen(talk) is None
    assert [each.holders for each in seen(talk) or ()] == [0]


def test_where_it_cannot_be_seen_how_long_the_table_is(talk: Conversation, peer: Peer) -> None:
    """The store has died while it wrote that, or it is damaged: nothing is read where there may be no memory."""
    peer.put(A)
    talk.words[HeaderWord.ENTRIES_USED] += 1
    assert seen(talk) is None
