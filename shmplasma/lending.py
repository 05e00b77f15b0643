"""References in a value that is put: lent when its pickle is written.

A reference that is pickled lends its object to whoever will unpickle it (`shmplasma.references`).  A pickle that is begun anew in another
way, or fails, or is never stored for want of room, has no receiver; what it had lent would stay for ten minutes after this
process has gone.  So the pickler of values collects what its pickle lends.  A pickle that somebody else makes meanwhile, in the same
thread perhaps, goes its own way, and lends at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

__all__ = ["LENDERS", "Loans"]

Loans: TypeAlias = list[Callable[[], object]]
"""What is to be called when a pickle is written; more than once does no harm."""

LENDERS: Final[dict[type, Callable[[Any, Loans], Any]]] = {}
"""By type: reduces a value that lends something, and notes the loan."""
