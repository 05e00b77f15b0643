"""One peer in a process of its own, driven by JSON lines: a case's name comes in, its samples go out.

Plasma needs an interpreter of its own, so every peer gets one: then all are driven alike.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import TYPE_CHECKING, Final

from benchmarks.peers import make_peer
from benchmarks.peers.base import UnsupportedError

if TYPE_CHECKING:
    from typing import Any, TextIO

__all__ = ["Answer", "Worker"]

_SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108 - where POSIX shared memory lies on Linux


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a case: samples, or why there are none (nothing at all if the peer has no such operation)."""

    samples: tuple[float, ...] = ()
    problem: str = ""


class Worker:
    """The driver's side of a worker.

    Attributes
    ----------
    title, version : str
        What is measured; empty if it cannot be, and then `problem` says why.
    """

    def __init__(self, interpreter: str, peer: str, capacity: int, *, quick: bool) -> None:
        command = [interpreter, "-m", "benchmarks.worker", peer, str(capacity), str(int(quick))]
        self._process = Popen(command, stdin=PIPE, stdout=PIPE, text=True)
        hello = self._read()
        self.title: str = hello.get("title", "")
        self.version: str = hello.get("version", "")
        self.problem: str = hello.get("problem", "")

    def run(self, case: str) -> Answer:
        """Run a case."""
        assert self._process.stdin is not None
        print(case, file=self._process.stdin, flush=True)
        answer = self._read()
        return Answer(tuple(answer.get("samples", ())), answer.get("problem", ""))

    def close(self) -> None:
        """Let it end its server, and wait for it."""
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the worker ended with {self._process.wait()}: {self._process.args!r}"
            )
        message: dict[str, Any] = json.loads(line)
        return message


def _main() -> None:
    name, capacity, quick = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1"
    # What a server or a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    where = _SHARED_MEMORY if Path(_SHARED_MEMORY).is_dir() else None
    with tempfile.TemporaryDirectory(prefix="bench-", dir=where) as directory:
        try:
            from benchmarks.cases import CASES, Bench  # noqa: PLC0415 - NumPy may be what is missing

            peer = make_peer(name, directory, capacity)
            hello = {"title": peer.title, "version": peer.version()}
        except ImportError as error:
            _send(answers, {"problem": str(error)})
            return
        cases = {case.name: case for case in CASES}
        with Bench(peer, quick=quick) as bench:
            _send(answers, hello)
            for line in sys.stdin:
                try:
                    _send(answers, {"samples": cases[line.strip()].run(bench)})
                except UnsupportedError:
                    _send(answers, {})
                except Exception:  # noqa: BLE001 - whatever fails in a peer is a result, and the others go on
                    _send(answers, {"problem": traceback.format_exc()})


def _send(answers: TextIO, message: object) -> None:
    print(json.dumps(message), file=answers, flush=True)


if __name__ == "__main__":
    _main()
