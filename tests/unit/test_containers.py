"""What the external store holds, by numbers alone."""

from __future__ import annotations

import pytest

from shmplasma.containers import Containers


def with_four() -> tuple[Containers, int]:
    """Return one container of four entries, 100 bytes each."""
    containers = Containers()
    number = containers.new_number()
    containers.wrote(number, 400)
    for entry in range(4):
        containers.name(number, entry, 100)
    return containers, number


def test_the_last_entry_takes_the_container_along() -> None:
    """It is to be deleted when nobody names it any more, and counts until then."""
    containers, number = with_four()
    assert [containers.unname(number, entry) for entry in range(4)] == [False] * 3 + [True]
    assert containers.total_bytes == 0
    assert containers.entries(number) == ()
    assert containers.first_sparse() is None
    containers.check({})


def test_what_is_less_than_half_named_is_sparse_until_it_is_emptied() -> None:
    """Half is not less than half; and what was emptied is not to be emptied again."""
    containers, number = with_four()
    containers.unname(number, 0)
    containers.unname(number, 1)
    assert containers.first_sparse() is None
    containers.unname(number, 2)
    assert containers.first_sparse() == number
    assert not containers.was_emptied(number)
    containers.empty(number)
    assert containers.first_sparse() is None
    assert containers.was_emptied(number)
    containers.check({number: {3: 100}})
    assert containers.unname(number, 3)
    assert not containers.was_emptied(number)


def test_numbers_are_never_used_again() -> None:
    """Not those of what a dead store has written, or of what nobody knows of."""
    containers = Containers()
    containers.recover(7, 1, 100)
    assert containers.new_number() == 8
    assert containers.tidy({7: 1000, 30: 10}) == (30,)
    assert containers.new_number() == 31


def test_what_a_dead_store_left_has_the_size_that_is_found() -> None:
    """Until the external store was looked at, a container counts for what is named of it."""
    containers = Containers()
    containers.recover(1, 5, 100)
    containers.recover(1, 6, 100)
    assert containers.total_bytes == 200
    assert containers.first_sparse() is None
    assert containers.tidy({1: 1000}) == ()
    assert containers.total_bytes == 1000
    assert containers.first_sparse() == 1
    containers.check({1: {5: 100, 6: 100}})


def test_a_wrong_claim_is_found() -> None:
    """`check` compares with what the table says."""
    containers, number = with_four()
    with pytest.raises(AssertionError):
        containers.check({number: {0: 100}})
