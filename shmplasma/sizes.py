"""Sizes as people write them."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["parse_size"]

_UNITS: Final[dict[str, int]] = {
    suffix: base**power
    for power, letter in enumerate("KMGTP", start=1)
    for suffix, base in ((letter, 1024), (f"{letter}IB", 1024), (f"{letter}B", 1000))
} | {"": 1, "B": 1}
_SIZE: Final = re.compile(r"\s*([0-9]+)(?:\.([0-9]+))?\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the number of bytes that a text names.

    Parameters
    ----------
    text : str
        A number, perhaps with a decimal point and a unit: ``B``; ``KB``, ``MB``, ``GB``, ``TB``,
        ``PB`` (powers of 1000); ``KiB`` to ``PiB`` or just ``K`` to ``P`` (powers of 1024).  Case
        does not matter.

    Returns
    -------
    int
        Bytes, at least 1; a fraction of a byte is dropped.

    Raises
    ------
    ValueError
        It is no such text, or names less than a byte.

    Examples
    --------
    >>> parse_size("4GB"), parse_size("512MiB"), parse_size("1.5G")
    (4000000000, 536870912, 1610612736)
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[3].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(
            f"{text!r} is not a size; write a number of bytes, or a number with one of the units "
            "KB MB GB TB (powers of 1000) and KiB MiB GiB TiB (powers of 1024): 4GB, 512MiB"
        )
    whole, fraction = match[1], match[2] or ""
    size: int = int(whole + fraction) * unit // 10 ** len(fraction)
    if size < 1:
        raise ValueError(f"{text!r} is less than a byte; a size is at least 1")
    return size
