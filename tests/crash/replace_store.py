"""A store that is replaced again and again while clients use it: how long they notice.

Run it by hand::

    python -m tests.crash.replace_store --times 20
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import shmplasma
from tests.command import PROGRAM, until_ready

__all__ = ["Summary", "run"]


@dataclass(frozen=True)
class Summary:
    """What a run has seen.

    Attributes
    ----------
    puts : int
        How many values were put, and read back by another client.
    lost : int
        How many of them were not there at the end, or were another value.
    blocked : int
        How many gets waited through a replacement and were answered after it.
    pauses_ms : list of float
        The longest round trip of a client around each replacement.
    """

    puts: int
    lost: int
    blocked: int
    pauses_ms: list[float]

    def __str__(self) -> str:
        return (
            f"puts: {self.puts:,}, lost: {self.lost}, gets that waited through: {self.blocked}\n"
            f"longest pause of a client: median {median(self.pauses_ms):.0f} ms, "
            f"worst {max(self.pauses_ms):.0f} ms"
        )


def _start(path: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*PROGRAM, "-s", path, *arguments], stderr=subprocess.PIPE, text=True
    )
    until_ready(process)
    return process


def _end(process: subprocess.Popen[str]) -> None:
    with process:
        code = process.wait()
    assert code == 0, f"the store ended with {code}"


class _User(threading.Thread):
    """A client that puts and asks without a pause."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.values: dict[shmplasma.ObjectID, int] = {}
        self.longest = 0.0
        self.failed: BaseException | None = None
        self.done = threading.Event()
        self._path = path

    def run(self) -> None:
        try:
            with shmplasma.connect(self._path) as client:
                while not self.done.is_set():
                    began = time.perf_counter()
                    number = len(self.values)
                    object_id = client.put(number)
                    client.flush()
                    self.values[object_id] = number
                    self.longest = max(self.longest, time.perf_counter() - began)
        except BaseException as error:
            self.failed = error
            raise


def run(times: int) -> Summary:
    """Replace a store under load.

    Parameters
    ----------
    times : int
        How often.

    Returns
    -------
    Summary
        What the clients saw.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "s")
        store = _start(path, "-m", "200MB")
        user = _User(path)
        pauses: list[float] = []
        answers: list[object] = []
        with shmplasma.connect(path) as client:
            user.start()
            try:
                for number in range(times):
                    awaited = shmplasma.ObjectID.from_random()
                    waiting = threading.Thread(target=lambda: answers.append(client.get(awaited)))  # noqa: B023 - joined below
                    waiting.start()
                    user.longest = 0.0
                    successor = _start(path, "--replace")
                    _end(store)
                    store = successor
                    client.flush()
                    client.put(number, awaited)
                    waiting.join()
                    pauses.append(user.longest * 1000)
            finally:
                user.done.set()
                user.join()
            assert user.failed is None
            ids = list(user.values)
            found = client.get(ids, timeout_ms=0)
            lost = sum(user.values[i] != value for i, value in zip(ids, found, strict=True))
        store.terminate()
        _end(store)
    return Summary(len(ids), lost, len(set(map(str, answers))), pauses)


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=20, help="replacements (default: 20)")
    sys.stdout.write(f"{run(parser.parse_args().times)}\n")


if __name__ == "__main__":
    main()
