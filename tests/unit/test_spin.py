"""When a processor is given away: to look for something, or to let somebody else go first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from shmplasma import spin
from shmplasma.spin import Spin


class Clock:
    """Time that passes only while others run.

    Attributes
    ----------
    slice_ns : int
        For how long they run when the processor is given away.
    yields : int
        How often it was.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
        self.now_ns = 10**12
        self.slice_ns = 0
        self.yields = 0
        time = SimpleNamespace(monotonic_ns=lambda: self.now_ns)
        monkeypatch.setattr(spin, "time", time)
        monkeypatch.setattr(spin, "os", SimpleNamespace(sched_yield=self._sched_yield))
        monkeypatch.setattr(spin, "system", SimpleNamespace(processors=lambda: processors))

    def _sched_yield(self) -> None:
        self.yields += 1
        self.now_ns += self.slice_ns


@pytest.mark.parametrize("processors", [1, 2])
def test_way_is_given_until_that_costs_a_slice(
    monkeypatch: pytest.MonkeyPatch, processors: int
) -> None:
    """Then not for a while, whoever was woken; on a single processor as on several."""
    clock = Clock(monkeypatch, processors)
    own = Spin()
    for slice_ns in (0, 500, 900_000):
        clock.slice_ns = slice_ns
        own.give_way()
    assert clock.yields == 3
    clock.slice_ns = 3_000_000
    for _ in range(10):
        own.give_way()
    assert clock.yields == 4
    clock.now_ns += 200_000_000
    own.give_way()
    assert clock.yields == 5


def test_who_has_given_a_slice_away_does_not_look_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the other way round."""
    clock = Clock(monkeypatch, 2)
    own, other = Spin(), Spin()
    clock.slice_ns = 3_000_000
    own.give_way()
    assert list(own.looks()) == []
    assert len(list(other.looks())) == 2
    yields = clock.yields
    other.give_way()
    assert clock.yields == yields
