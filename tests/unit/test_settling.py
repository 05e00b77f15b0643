"""Waiting until the store has read what was put: how long, and when it is woken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shmplasma import settling
from shmplasma.absence import Absence
from shmplasma.layout import HeaderWord
from shmplasma.link import Link
from shmplasma.posted import Seal
from shmplasma.replies import Done
from shmplasma.requests import Flush
from shmplasma.settling import Settling
from tests.conversation import Conversation, Peer, name

A, B = map(name, range(1, 3))


class FakeSpin:
    """Looks three times, before each of which something may happen."""

    is_of_use = True

    def __init__(self) -> None:
        self.looked = 0
        self.happens: dict[int, Callable[[], object]] = {}

    def looks(self, _: int) -> Iterator[None]:
        """Yield three times where there are several processors."""
        for _ in range(3 * self.is_of_use):
            self.looked += 1
            self.happens.get(self.looked, lambda: None)()
            yield


class Asker:
    """A client that settles what another one has written and the store has not read.

    Attributes
    ----------
    spin : FakeSpin
        By which it looks.
    woken : int
        How often it has woken the store.
    announced : int
        How often it has told the store of a record.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.talk = Conversation(1 << 20)
        self.peer: Peer = self.talk.client()
        self.spin = FakeSpin()
        self.woken = 0
        monkeypatch.setattr(settling, "Spin", lambda: self.spin)
        talk = self.talk
        segment: Any = SimpleNamespace(layout=talk.layout, read_map=talk.raw, words=talk.words)
        self.announced = 0
        self.channel = SimpleNamespace(is_quiet=True, announce=self._announce)
        link = cast("Link", SimpleNamespace(channel=self.channel))
        self.settling = Settling(segment, Absence(segment), link, self._wake)
        self.slot = self.peer.create(A)
        self.poll(0)

    def _wake(self) -> None:
        self.woken += 1

    def _announce(self) -> None:
        self.announced += 1

    def poll(self, number: int) -> None:
        """Have the store say that it looks by itself, or that it does not."""
        self.talk.words[HeaderWord.POLLED] = number

    def read(self) -> None:
        """Have the store read the outbox."""
        self.peer.ask(Flush(), Done)


@pytest.fixture
def asker(monkeypatch: pytest.MonkeyPatch) -> Asker:
    """Return a client to which nothing happens."""
    return Asker(monkeypatch)


def test_there_is_nothing_to_wait_for(asker: Asker) -> None:
    """Then nobody looks, and nothing is sent."""
    assert asker.settling.settle() is False
    assert asker.spin.looked == 0
    assert asker.settling.are_absent([B])
    assert asker.settling.are_absent_now([B])
    assert not asker.settling.are_absent([A, B])


@pytest.mark.parametrize("polled", [0, 1])
def test_a_store_that_is_awake_is_not_woken(asker: Asker, polled: int) -> None:
    """It reads soon."""
    asker.peer.write_silently(Seal(A))
    assert not asker.settling.are_absent_now([B])
    asker.poll(polled)
    asker.spin.happens[2] = asker.read
    assert asker.settling.settle() is True
    assert asker.spin.looked == 2
    assert asker.woken == 0
    assert asker.settling.are_absent_now([B])


def test_a_store_between_two_looks_is_woken_once(asker: Asker) -> None:
    """When it has not read soon."""
    asker.peer.write_silently(Seal(A))
    asker.poll(1)
    woken: list[int] = []
    for look in range(1, 6):
        asker.spin.happens[look] = lambda: woken.append(asker.woken)
    asker.spin.happens[6] = asker.read
    assert asker.settling.settle() is True
    assert woken == [0, 0, 0, 1, 1]


def test_a_store_is_woken_for_a_delete(asker: Asker) -> None:
    """By a message, after which it goes on looking by itself."""
    asker.peer.write_silently(Seal(A))
    asker.poll(1)
    asker.spin.happens[5] = asker.read
    assert asker.settling.settle(once=True) is True
    assert asker.announced == 1
    assert asker.woken == 0


def test_a_store_that_sleeps_is_told(asker: Asker) -> None:
    """It may have heard of a record from whoever has written it, but not of each."""
    asker.peer.write_silently(Seal(A))
    told: list[int] = []
    for look in range(1, 6):
        asker.spin.happens[look] = lambda: told.append(asker.announced)
    asker.spin.happens[6] = asker.read
    assert asker.settling.settle() is True
    assert told == [0, 0, 0, 1, 1]
    assert asker.woken == 0


def test_a_store_that_does_not_read_is_to_be_asked(asker: Asker) -> None:
    """It may be at something that takes long."""
    asker.peer.write_silently(Seal(A))
    asker.poll(1)
    assert asker.settling.settle() is None
    assert asker.spin.looked == 6


def test_nobody_looks_on_a_single_processor(asker: Asker) -> None:
    """Who looks would keep the store from reading; it learns that it should be told."""
    asker.peer.write_silently(Seal(A))
    asker.poll(1)
    asker.spin.is_of_use = False
    assert asker.settling.settle() is None
    assert asker.woken == 1


def test_so_many_outboxes_are_the_stores_to_look_into(asker: Asker) -> None:
    """It would take longer than to ask."""
    for _ in range(100):
        asker.talk.client()
    assert asker.settling.settle() is None
    assert not asker.settling.are_absent_now([B])


def test_a_connection_that_says_something_is_to_be_heard(asker: Asker) -> None:
    """It may have ended."""
    asker.channel.is_quiet = False
    assert not asker.settling.are_absent([B])
