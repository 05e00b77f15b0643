"""What a client concludes from what it sees before and after a record that deletes an object."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from shmplasma.absence import NOWHERE, Absence
from shmplasma.layout import EntryState
from shmplasma.posted import Remove
from shmplasma.removal import Removal
from tests.conversation import name

if TYPE_CHECKING:
    from shmplasma.link import Link

A = name(1)
SEALED, DOOMED = (int(EntryState.SEALED), 7), (int(EntryState.DOOMED), 7)
Seen = tuple[int, int] | None


class Sight:
    """A client that sees one thing after the other, and notes what it tells and asks the store."""

    def __init__(self, *seen: Seen, are_read: bool = True) -> None:
        self.seen = list(seen)
        self.posted: list[bytes] = []
        self.asked: list[Remove] = []
        self.channel: Any = SimpleNamespace(is_entered=False, is_quiet=True)
        absence = SimpleNamespace(are_read=are_read, look_up=lambda _: self.seen.pop(0))
        link = SimpleNamespace(
            may_look=True,
            channel=self.channel,
            post_and_wait=lambda _, bodies: self.posted.extend(bodies),
            call=lambda request, _: self.asked.append(request),
        )
        self.removal = Removal(cast("Link", link), cast("Absence", absence))


@pytest.mark.parametrize("after", [NOWHERE, DOOMED, (int(EntryState.FREE), 7)])
def test_what_has_gone_is_asked_for_no_more(after: Seen) -> None:
    """Nor what goes at its last release."""
    sight = Sight(SEALED, after)
    assert sight.removal.delete([A])
    assert (sight.posted, sight.asked) == ([Remove(A, 7).encode()], [])


@pytest.mark.parametrize("state", [EntryState.SEALED, EntryState.MOVING, EntryState.EVICTING, None])
def test_what_is_still_there_is_asked_for(state: EntryState | None) -> None:
    """As is what cannot be seen; by the object, not by its id alone."""
    sight = Sight(SEALED, None if state is None else (int(state), 7))
    assert sight.removal.delete([A])
    assert sight.asked == [Remove(A, 7)]


def test_what_was_put_anew_stays() -> None:
    """It has another time of creation."""
    sight = Sight(SEALED, (SEALED[0], 8))
    assert sight.removal.delete([A])
    assert sight.asked == []


@pytest.mark.parametrize("before", [NOWHERE, DOOMED, (int(EntryState.CREATED), 7)])
def test_what_is_not_sealed_costs_nothing(before: Seen) -> None:
    """But where the connection has ended, somebody has to hear of it."""
    sight = Sight(before, before)
    assert sight.removal.delete([A])
    sight.channel.is_quiet = False
    assert not sight.removal.delete([A])
    assert sight.posted == []


@pytest.mark.parametrize("before", [None, (int(EntryState.EVICTING), 7)])
def test_what_is_unsure_is_left_to_the_store(before: Seen) -> None:
    """Before any of the objects is told of."""
    sight = Sight(SEALED, before)
    assert not sight.removal.delete([A, name(2)])
    assert sight.posted == []


def test_unread_outboxes_and_calls_inside_another_are_left_to_the_store() -> None:
    """The one for what may be in them, the other to be refused."""
    assert not Sight(are_read=False).removal.delete([A])
    sight = Sight()
    sight.channel.is_entered = True
    assert not sight.removal.delete([A])
    assert not Sight().removal.delete([])
    assert not Sight().removal.delete(9 * [A])
