"""The client's side of the pins, where the collector or an interrupt comes at a bad moment."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from shmplasma.layout import BOARD_BYTES, BOARD_WORDS, HEADER_BYTES, HeaderWord
from shmplasma.owned_socket import OwnedSocket
from shmplasma.pinning import BoardPool, Lifeline, Pin, PinBoard
from shmplasma.pins import FIRST_SLOT


class Connection:
    """Notes what it finds when it is told that nothing is left."""

    def __init__(self, find: Callable[[], object]) -> None:
        self.find = find
        self.found: list[object] = []

    def abandon(self) -> None:
        """Belong to somebody else."""

    def end(self) -> None:
        """Be told."""
        self.found.append(self.find())


def test_a_board_that_cannot_be_mapped() -> None:
    """It is tried again, and the store is asked for no other one meanwhile."""
    words = memoryview(bytearray(HEADER_BYTES)).cast("Q")
    refusals: list[OSError] = []

    def board(_: int) -> memoryview:
        if refusals:
            raise refusals.pop()
        return memoryview(bytearray(BOARD_BYTES)).cast("Q")

    attachment: Any = SimpleNamespace(words=words, board=board, close=lambda: None)
    reading, writing = os.pipe()
    lifeline = Lifeline(attachment, writing, None, "path", "name")
    lifeline.connection = Connection(bool)
    numbers = iter((7, 8))
    boards = BoardPool(lifeline, 3, lambda: next(numbers))
    held = boards.take(BOARD_WORDS - FIRST_SLOT)
    for _ in range(2):
        refusals.append(OSError())
        with pytest.raises(OSError, match=r"^$"):
            boards.take(1)
    held += boards.take(1)
    assert held[-1].board.first_slot == 7 * BOARD_WORDS
    assert next(numbers) == 8
    os.close(reading)


@pytest.mark.parametrize("pin_is_first", [True, False])
def test_a_collection_of_a_pin_and_its_lifeline(pin_is_first: bool) -> None:
    """In whatever order it finalizes them, the pin clears its slot and wakes the store before that hears of the end."""
    words = memoryview(bytearray(HEADER_BYTES)).cast("Q")
    board = memoryview(bytearray(BOARD_BYTES)).cast("Q")
    attachment: Any = SimpleNamespace(words=words, board=lambda _: board, close=lambda: None)
    reading, writing = os.pipe()
    gc.disable()
    try:
        pins = [Pin()] if pin_is_first else []
        lifeline = Lifeline(attachment, writing, None, "path", "name")
        pins = pins or [Pin()]
        (pin,) = pins
        pin.board = PinBoard(lifeline, 0)
        pin.word = word = pin.board.free.pop()
        board[word] = words[HeaderWord.WAKE] = 1
        lifeline.connection = connection = Connection(lambda: (board[word], os.read(reading, 2)))
        loop: list[object] = [lifeline, pin]
        loop.append(loop)
        del pins, lifeline, pin, loop
        assert not connection.found
        gc.collect()
        assert connection.found == [(0, b"r")]
        assert not os.read(reading, 2), "the writing end is closed"
    finally:
        gc.enable()
        os.close(reading)


def test_a_pin_that_was_interrupted_before_it_had_a_slot() -> None:
    """It has none to give back, and says nothing."""
    pin = Pin()
    pin.__del__()
    with pytest.raises(AttributeError):
        _ = pin.slot


def test_a_socket_that_could_not_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing when it is freed, as there is nothing to close."""
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with pytest.raises(OSError, match="not supported"):
        OwnedSocket(socket.AF_UNIX, socket.SOCK_RDM)
    assert not unraisable
