from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import unmeasured

PROJECT = Path(__file__).parents[2]


def test_the_demo_runs_and_its_answers_agree() -> None:
    """The demo computes the same from the shared table, the shared frame and the pickled frame."""
    program = [sys.executable, str(PROJECT / "examples" / "flights.py")]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "336,776 flights" in done.stdout
    assert "All 3 answers of 4 workers equal that of one process" in done.stdout


def test_a_benchmark_gives_figures(tmp_path: Path) -> None:
    """A quick run writes a page with a figure of ours in each row, both free and pinned."""
    page = tmp_path / "page.md"
    cases = [
        "get-raw",
        "create",
        "put-array-1",
        "put-frame",
        "get-frame",
        "hand-over",
        "hand-over-created",
        "puts-2",
        "half-headers",
        "start",
    ]
    program = [sys.executable, "-m", "benchmarks", "--quick", "--peers", "shmplasma"]
    done = subprocess.run(
        [*program, "--only", *cases, "--output", str(page)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tables = page.read_text().split("\n## ")[1:]
    assert len(tables) == 2
    for table in tables:
        rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")][2:]
        assert len(rows) == len(cases) + 2, "a hand-over has two rows"
        for row in rows:
            assert float(row[2].replace(",", "")) > 0, row
    drawn = (page.parent / "img" / f"{page.stem}.svg").read_text()
    assert all(
        f">{words}</text>" in drawn
        for words in ("shmplasma", "put of 1 MiB, array", "get of 100 B, raw")
    )


def test_the_benchmarks_name_their_cases() -> None:
    """An unknown case is a usage error that lists the known ones."""
    program = [sys.executable, "-m", "benchmarks", "--only", "no-such-case"]
    done = subprocess.run(program, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "get-raw" in done.stderr


def test_the_flight_benchmark_gives_figures() -> None:
    """A quick run prints a row with a figure for each way."""
    program = [sys.executable, "-m", "benchmarks.flight", "--size", "1MB", "--rounds", "1"]
    done = subprocess.run(program, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 4
    assert all(float(row[2]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("dask", ["64000000000.0\n"]),
        ("joblib", ["10000000.0\nTrue\n"]),
        ("references", ["1999998\n"]),
        ("multiprocessing", ["49999995000000\n", "[499999500000, 249999500000, 166666833333]\n"]),
    ],
)
def test_the_programs_of_a_page(tmp_path: Path, page: str, said: list[str]) -> None:
    """What the documentation shows as a program runs as one, and says what it is said to say."""
    text = (PROJECT / "docs" / f"{page}.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    programs = [example for example in examples if '__name__ == "__main__"' in example]
    assert len(programs) == len(said)
    for program, expected in zip(programs, said, strict=True):
        path = tmp_path / "program.py"
        path.write_text(program)
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        assert done.stdout.endswith(expected)


@pytest.mark.parametrize(
    ("module", "jobs"),
    [
        ("workers", ["array", "flights", "queue"]),
        ("tools", ["joblib"]),
        ("tools", ["dask"]),
        ("tools", ["torch"]),
    ],
)
def test_jobs_with_a_store_and_without(module: str, jobs: list[str]) -> None:
    """A quick run prints a row with a figure for either way."""
    if module == "tools":
        pytest.importorskip(jobs[0])
    program = [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--only", *jobs]
    # Coverage handles SIGTERM in Python, and a worker of a pool that is about to wait for a lock then misses it.
    done = subprocess.run(
        program, cwd=PROJECT, env=unmeasured(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(jobs)
    for row in rows:
        assert all(float(cell.removesuffix(" ms ").replace(",", "")) >= 0 for cell in row[2:5])
