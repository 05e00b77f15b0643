from __future__ import annotations

import pytest

from shmplasma.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1000000000", 10**9),
        ("17B", 17),
        ("4GB", 4 * 10**9),
        ("4gb", 4 * 10**9),
        ("512MiB", 512 << 20),
        ("512 MiB", 512 << 20),
        ("1.5G", 3 << 29),
        ("2k", 2048),
        ("0.001KB", 1),
        ("1.9999B", 1),
        ("3TB", 3 * 10**12),
        ("1PiB", 1 << 50),
        ("0.1GB", 10**8),
        ("123456789012345678901234567890", 123456789012345678901234567890),
    ],
)
def test_sizes(text: str, size: int) -> None:
    """Units of 1000 and of 1024, fractions, and either case give exact numbers of bytes."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "4XB", "4 G B", "-1", "1e9", "1,5G", "0x10", ".5G", "٣"]
)
def test_what_is_no_size(text: str) -> None:
    """What is no size is refused, and the message says what to write instead."""
    with pytest.raises(ValueError, match="4GB, 512MiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0GB", "0.4", "0.0001KB"])
def test_less_than_a_byte(text: str) -> None:
    """A size is at least one byte."""
    with pytest.raises(ValueError, match="less than a byte"):
        parse_size(text)
