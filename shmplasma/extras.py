"""What an integration cannot do without is an extra of the package: says which, where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["needed_by"]


@contextmanager
def needed_by(name: str, extra: str) -> Iterator[None]:
    """Import what the extra brings, or say how to install it.

    Parameters
    ----------
    name : str
        What needs it.
    extra : str
        The name of the extra.

    Raises
    ------
    ModuleNotFoundError
        A module is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{name} needs {error.name}: pip install 'shmplasma[{extra}]'"
        raise ModuleNotFoundError(message, name=error.name) from error
