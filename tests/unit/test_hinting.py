"""What a getter takes that was hinted at it: the record of a put, or of a seal, and whether that says all that is to be known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from zlib import crc32

import pytest

from shmplasma.hinting import Hints
from shmplasma.hints import HINT, TAKEN
from shmplasma.layout import BOARD_WORDS
from shmplasma.offset_pins import pin_word
from shmplasma.pinning import Pin
from shmplasma.posted import Abort, Claim, Posted, Publish, Seal
from shmplasma.replies import Done, Leased, Number, Objects
from shmplasma.requests import AskLease, Evict, Flush
from shmplasma.unread import Unread
from tests.conversation import Conversation, Peer, name

if TYPE_CHECKING:
    from collections.abc import Callable

A, B = map(name, range(1, 3))
SIZE = 1000
CODEC = 3


class Scene:
    """A client that waits for A, one that is going to put it, and a third one.

    Attributes
    ----------
    offset : int
        Where the putter's lease begins.
    """

    def __init__(self) -> None:
        talk = self.talk = Conversation(1 << 20)
        self.getter, self.putter, self.other = talk.client(), talk.client(), talk.client()
        self.offset = self.putter.ask(AskLease(SIZE), Leased).offset
        request = self.getter.wanted([A], wait=True, hinted=True)
        self.request_id = self.getter.post(request)
        self.lent, self.own = request.slots[0], self.getter.free_slots.pop()
        segment: Any = SimpleNamespace(
            layout=talk.layout, read_map=talk.raw, words=talk.words, token=b""
        )
        nothing: Any = None
        self.unread = Unread(segment, nothing, nothing, self._find)
        board = self._board_of(self.getter)
        self.hints = Hints(segment, board, self.getter.outbox, self.unread)

    def _board_of(self, peer: Peer) -> int:
        return peer.free_slots[-1] // BOARD_WORDS

    def _find(self, object_id: bytes) -> int:
        entry = self.entry_of(object_id)
        return -1 if entry < 0 else self.talk.layout.entry(entry)

    def entry_of(self, object_id: bytes) -> int:
        """Return the entry of an object."""
        return self.talk.store._parts.table.find(object_id)

    def _pin(self, slot: int, pin: Pin) -> None:
        first = self.talk.layout.boards // 8
        words = self.talk.words[first : first + self.talk.layout.n_boards * BOARD_WORDS]
        pin.board = SimpleNamespace(words=words, free=[], wake_word=b"\0")  # type: ignore[assignment]
        pin.word = slot

    def claim(self, size_bytes: int = SIZE, object_id: bytes = A) -> None:
        """Have the putter create the object in its lease, and tell nobody."""
        slot = self.putter.free_slots.pop()
        self.talk.write_slot(slot, pin_word(crc32(object_id), self.offset))
        fields = object_id, self.offset, size_bytes, 0, CODEC, slot
        self.putter.write_silently(Claim(*fields))

    def take(self, putter: Peer | None = None, n_posted: int | None = None) -> Any:
        """Hint at the last record of a putter; return what the getter takes."""
        putter = putter or self.putter
        own, lent = Pin(), Pin()
        self._pin(self.own, own)
        self._pin(self.lent, lent)
        self.pins = own, lent
        n_posted = putter.outbox.written if n_posted is None else n_posted
        return self.hints.take(
            HINT.pack(self.request_id, self._board_of(putter), n_posted), A, own, lent
        )

    def slots(self) -> tuple[int, int]:
        """Return what the getter's own slot and the lent one say."""
        return self.talk.read_slot(self.own), self.talk.read_slot(self.lent)


@pytest.fixture
def scene() -> Scene:
    """Return one in which nothing was put yet."""
    return Scene()


def _claimed(scene: Scene) -> None:
    scene.claim()


def _claimed_and_read(scene: Scene) -> None:
    scene.claim()
    scene.putter.ask(Flush(), Done)


def _created(scene: Scene) -> None:
    scene.putter.create(A, SIZE)


def _put(scene: Scene) -> None:
    scene.putter.write_silently(Publish(A, scene.offset, SIZE, 0, CODEC))


@pytest.mark.parametrize(
    ("happens", "is_in_table"),
    [(_put, False), (_claimed, False), (_claimed_and_read, True), (_created, True)],
)
def test_what_was_sealed_is_had_before_the_store_reads_of_it(
    scene: Scene, happens: Callable[[Scene], None], is_in_table: bool
) -> None:
    """It is where its record says, or its entry; nothing takes it away until it is let go of."""
    happens(scene)
    if happens is not _put:
        scene.putter.write_silently(Seal(A))
    taken = scene.take()
    offset = taken[0]
    assert taken[1:3] == (SIZE, 0)
    word = scene.entry_of(A) + 1 if is_in_table else pin_word(crc32(A), offset)
    assert scene.slots() == (word, TAKEN)
    scene.putter.ask(Flush(), Done)
    scene.talk.store.check()
    assert scene.getter.take(scene.request_id, Objects).found[0][0] == offset
    for slot in (each for each in range(BOARD_WORDS * 4) if each // BOARD_WORDS == 1):
        scene.talk.write_slot(slot, 0)  # the putter lets go
    scene.other.ask(Evict(1 << 20), Number)
    assert scene.talk.ids() == {A}
    scene.talk.write_slot(scene.own, 0)
    scene.other.ask(Evict(1 << 20), Number)
    assert scene.talk.ids() == set()
    scene.talk.store.check()


def _refused(*records: Posted) -> Callable[[Scene], None]:
    def write(scene: Scene) -> None:
        for record in records:
            scene.putter.write_silently(record)

    return write


def _sealed_by_another(scene: Scene) -> None:
    scene.other.create(A, SIZE)
    scene.putter.write_silently(Seal(A))


def _aborted_before(scene: Scene) -> None:
    _created(scene)
    _refused(Abort(A), Seal(A))(scene)


def _claimed_and_aborted(scene: Scene) -> None:
    scene.claim()
    _refused(Abort(A), Seal(A))(scene)


def _of_no_bytes(scene: Scene) -> None:
    scene.putter.create(A, 0)
    scene.putter.write_silently(Seal(A))


def _of_another_id(scene: Scene) -> None:
    scene.putter.create(B, SIZE)
    scene.putter.write_silently(Seal(B))


def _put_under_another_id(scene: Scene) -> None:
    scene.putter.write_silently(Publish(B, scene.offset, SIZE, 0, CODEC))


def _read_already(scene: Scene) -> None:
    _created(scene)
    scene.putter.write_silently(Seal(A))
    scene.putter.ask(Flush(), Done)


def _sealed_meanwhile(scene: Scene) -> None:
    _created(scene)
    scene.putter.write_silently(Seal(A))
    table = scene.talk.store._parts.table
    table.seal(table.find(A), 1)  # the store is at the record


@pytest.mark.parametrize(
    "happens",
    [
        _refused(Seal(A)),
        _refused(Abort(A)),
        _sealed_by_another,
        _aborted_before,
        _claimed_and_aborted,
        _of_no_bytes,
        _of_another_id,
        _put_under_another_id,
        _read_already,
        _sealed_meanwhile,
    ],
)
def test_what_is_left_to_the_store(scene: Scene, happens: Callable[[Scene], None]) -> None:
    """Where the record does not say that this putter has made this object readable; nothing is written then."""
    happens(scene)
    before = scene.slots()
    assert scene.take() is None
    assert scene.slots() == before


@pytest.mark.parametrize("changed", ["wanted", "state"])
def test_who_is_too_late_has_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """The store has read of it while he pinned it, or it is not the same any more: the reply will tell."""
    _created(scene)
    scene.putter.write_silently(Seal(A))
    made_by = Unread.made_by

    def read_meanwhile(unread: Unread, *arguments: Any) -> Any:
        made = made_by(unread, *arguments)
        table = scene.talk.store._parts.table
        if changed == "wanted":
            scene.putter.ask(Flush(), Done)
        else:
            table.set_state(table.find(A), 3)
        return made

    monkeypatch.setattr(Unread, "made_by", read_meanwhile)
    assert scene.take() is None
    assert scene.slots() == (0, 0)


def test_who_is_too_late_for_what_was_put_has_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store may have given its room away since."""
    _put(scene)
    published = Unread.published

    def read_meanwhile(unread: Unread, *arguments: Any) -> Any:
        found = published(unread, *arguments)
        scene.putter.ask(Flush(), Done)
        return found

    monkeypatch.setattr(Unread, "published", read_meanwhile)
    assert scene.take() is None
    assert scene.slots() == (0, 0)


def test_a_hint_at_an_outbox_that_there_is_not_is_nothing(scene: Scene) -> None:
    """Anybody can say one."""
    assert not scene.hints.is_there(HINT.pack(scene.request_id, (1 << 32) - 1, 1))
