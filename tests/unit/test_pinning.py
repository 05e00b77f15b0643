"""The client's side of the pins, where the collector or an interrupt comes at a bad moment."""

from __future__ import annotations

import os
import select
from types import SimpleNamespace
from typing import Any

import pytest

from shmplasma.layout import BOARD_BYTES, HEADER_BYTES, HeaderWord
from shmplasma.pinning import Lifeline, Pin, PinBoard


def test_a_pin_that_outlives_its_lifeline_writes_to_nobodys_descriptor() -> None:
    """A collection finalizes both in any order, and others open files in between, which get the number of the pipe."""
    words = memoryview(bytearray(HEADER_BYTES)).cast("Q")
    board = memoryview(bytearray(BOARD_BYTES)).cast("Q")
    attachment: Any = SimpleNamespace(words=words, board=lambda _: board, close=lambda: None)
    (reading, writing), (of_others, written) = os.pipe(), os.pipe()
    lifeline = Lifeline(attachment, writing, None, "path", "name")
    pin = Pin()
    pin.board = PinBoard(lifeline, 0)
    pin.word = pin.board.free.pop()
    words[HeaderWord.WAKE] = 1
    lifeline.__del__()
    try:
        os.dup2(written, writing)
        lifeline.wake_reading_store()
        del pin
        assert not select.select([of_others], [], [], 0)[0]
    finally:
        for fd in (reading, writing, of_others, written):
            os.close(fd)


def test_a_pin_that_was_interrupted_before_it_had_a_slot() -> None:
    """It has none to give back, and says nothing."""
    pin = Pin()
    pin.__del__()
    with pytest.raises(AttributeError):
        _ = pin.slot
