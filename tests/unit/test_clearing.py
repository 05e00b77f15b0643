from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shmplasma.clearing import cheapest_stretch

FREE, FIXED, GOODS = "free", "fixed", "goods"

region = st.lists(
    st.tuples(st.sampled_from((FREE, FIXED, GOODS)), st.integers(1, 5), st.integers(0, 9)),
    max_size=12,
)


@given(region, st.integers(1, 30))
def test_the_cheapest_of_all_stretches(pieces: list[tuple[str, int, int]], wanted: int) -> None:
    """What is chosen makes an extent that is long enough, and no other choice costs less."""
    free, goods, start = [], [], 0
    for entry, (kind, size, price) in enumerate(pieces):
        if kind == FREE:
            free.append((start, size))
        elif kind == GOODS:
            goods.append((start, size, entry, price))
        start += size
    count = len(pieces)
    parts = [pieces[first:last] for first in range(count) for last in range(first + 1, count + 1)]
    prices = [
        sum(price for kind, _, price in part if kind == GOODS)
        for part in parts
        if FIXED not in (kind for kind, _, _ in part) and sum(size for _, size, _ in part) >= wanted
    ]
    chosen = cheapest_stretch(reversed(free), reversed(goods), wanted)
    if not prices:
        assert not chosen
        return
    assert sum(pieces[entry][2] for entry in chosen) == min(prices)
    cleared = "".join(
        "." * size if kind == FREE or entry in chosen else "x" * size
        for entry, (kind, size, _) in enumerate(pieces)
    )
    assert "." * wanted in cleared


def test_nothing_has_to_go() -> None:
    """Where a free extent is long enough, nothing is chosen."""
    assert not cheapest_stretch([(0, 10)], [(10, 5, 3, 1)], 10)
