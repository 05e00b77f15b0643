"""When references that a pickle holds are lent: when the pickle is there, and goes somewhere.

A reference that is pickled lends its object to whoever will unpickle it (`shmplasma.references`).  A pickle that is begun anew in another
way, or fails, or is never stored for want of room, has no receiver; what it had lent would stay for ten minutes after this
process has gone.  So whoever can tell says that loans are to be `deferred`, and makes them when the pickle leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Final, TypeAlias

__all__ = ["Loans", "deferred", "lend"]

Loans: TypeAlias = list[Callable[[], object]]
"""What is to be called once a pickle leaves; more than once does no harm."""

_deferred: Final[ContextVar[Loans | None]] = ContextVar("_deferred", default=None)


class deferred:  # noqa: N801 - a context manager; one made of a generator takes 1 us more
    """Collect, in this thread or task, the loans of what is pickled within; gives them."""

    __slots__ = ("_token",)

    def __enter__(self) -> Loans:
        loans: Loans = []
        self._token = _deferred.set(loans)
        return loans

    def __exit__(self, *_: object) -> None:
        _deferred.reset(self._token)


def lend(loan: Callable[[], object]) -> None:
    """Make a loan, or have it made later, if somebody has said so."""
    loans = _deferred.get()
    if loans is None:
        loan()
    else:
        loans.append(loan)
