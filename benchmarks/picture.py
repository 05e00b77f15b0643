"""Draws the figures that most users ask for first: `docs/img/benchmarks.svg`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from benchmarks.cases import Case, Row
    from benchmarks.report import Results

__all__ = ["draw"]

_TIMES: Final = (
    "contains",
    "get-raw",
    "get-array",
    "get-new",
    "put-raw",
    "create",
    "delete",
    "hand-over",
)
_RATES: Final = tuple(f"put-{kind}-{mib}" for kind in ("raw", "array") for mib in (1, 8, 64, 512))
_LEFT_OUT: Final = "floor"
"""It is no store."""
_MARKERS: Final = "osD^v<>P"


def draw(
    results: Results,
    cases: Sequence[Case],
    peers: Mapping[str, tuple[str, str]],
    date: str,
    path: Path,
) -> None:
    """Draw a point for each peer in each row: times in one panel, rates in the other, both on a logarithmic scale.

    Parameters
    ----------
    results : Results
        What was measured.
    cases : sequence of Case
        All that there are.
    peers : mapping
        Title and version of each peer, in the order of the legend.
    date : str
        When that was.
    path : Path
        Where the picture goes, an SVG.
    """
    import matplotlib as mpl  # noqa: PLC0415 - who only wants the figures needs no library to draw them

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "shmplasma"  # the same picture has the same bytes
    mpl.rcParams["svg.fonttype"] = "none"  # words stay words
    from matplotlib import pyplot as plt  # noqa: PLC0415

    rows = {case.name: case.rows[0] for case in cases}
    titles = {name: title for name, (title, _) in peers.items() if name != _LEFT_OUT}
    figure, (times, rates) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    _panel(times, results, {name: rows[name] for name in _TIMES if name in rows}, titles)
    times.set_xlabel("µs: less is better")
    _panel(rates, results, {name: rows[name] for name in _RATES if name in rows}, titles)
    rates.set_xlabel("GB/s: more is better")
    figure.legend(*rates.get_legend_handles_labels(), loc="outside lower center", ncols=len(titles))
    figure.suptitle(f"{results.title.lower()}, medians, {date}", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _panel(
    panel: Axes, results: Results, rows: Mapping[str, Row], titles: Mapping[str, str]
) -> None:
    """Draw what is in one unit, the first row at the top."""
    for number, (name, title) in enumerate(titles.items()):
        points = [
            (value, place)
            for place, (case, row) in enumerate(rows.items())
            if (value := results.value(case, row, name)) is not None
        ]
        panel.plot(
            [value for value, _ in points],
            [place for _, place in points],
            linestyle="none",
            marker=_MARKERS[number],
            markersize=9 if number == 0 else 6,
            label=title,
            zorder=3 if number == 0 else 2,
        )
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_yticks(range(len(rows)), [row.title for row in rows.values()])
    panel.invert_yaxis()
    panel.grid(axis="both", alpha=0.3)
