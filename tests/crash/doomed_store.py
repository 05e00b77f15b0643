"""A real store that kills itself at one of its writes to the segment, and clients that go on with the next one.

`test_every_write` looks at every write of the state machine alone; here the writes are those of a store process,
and the clients are real.  Run it by hand, for every so manieth write::

    python -m tests.crash.doomed_store --step 5
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

import shmplasma
from shmplasma import cli
from shmplasma.parts import Parts
from tests.command import PROGRAM
from tests.crash.damage import Clock, Dying

__all__ = ["Summary", "run"]

_DIES_AT: Final = "SHMPLASMA_TEST_DIES_AT"
_END: Final = 700
"""More writes than the load of `_use` makes."""


@dataclass(frozen=True)
class Summary:
    """What a run has seen.

    Attributes
    ----------
    stores, deaths : int
        How many stores were started to die, and how many did.
    """

    stores: int
    deaths: int

    def __str__(self) -> str:
        return f"stores: {self.stores}, of which {self.deaths} died; lost: 0, wrong bytes: 0"


class _Lethal(Clock):
    """Kills the process at a write."""

    def tick(self) -> None:
        """Count a write, or end here."""
        if self.writes == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.writes += 1


def doom() -> None:
    """Be a store that dies at the write which the environment names."""
    clock = _Lethal()
    clock.dies_at = int(os.environ[_DIES_AT])
    begin: Any = Parts.__init__

    def begin_mortal(parts: Parts, layout: Any, token: bytes, *rest: Any, **options: Any) -> None:
        words, raw, *others = rest
        begin(parts, layout, token, Dying(words, clock), Dying(raw, clock), *others, **options)

    setattr(Parts, "__init__", begin_mortal)  # noqa: B010 - mypy knows no other way
    sys.exit(cli.main())


class _Stores(threading.Thread):
    """Runs a doomed store, and an ordinary one when it has died."""

    def __init__(self, path: str, dies_at: int) -> None:
        super().__init__()
        self.deaths = 0
        self._path = path
        self._ending = False
        program = "from tests.crash.doomed_store import doom; doom()"
        self._process = self._begin(
            [sys.executable, "-c", program], {**os.environ, _DIES_AT: str(dies_at)}
        )

    def _begin(self, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, "-m", "4MB", "-s", self._path], stderr=subprocess.DEVNULL, env=env
        )

    def run(self) -> None:
        while self._process.wait() and not self._ending:
            assert self._process.returncode == -signal.SIGKILL
            self.deaths += 1
            env = dict(os.environ)
            self._process = self._begin(PROGRAM, env)

    def end(self) -> None:
        """End the store that runs now; it must end well, or die as it was to."""
        with shmplasma.connect(self._path):
            self._ending = True
        self._process.terminate()
        self.join()
        if self._process.returncode == -signal.SIGKILL:
            # It died while it ended; somebody has to clean up.
            self._process = self._begin(PROGRAM, dict(os.environ))
            with shmplasma.connect(self._path):
                self._process.terminate()
            self._process.wait()
        assert self._process.returncode == 0


def _use(path: str) -> None:
    """Do one of each thing, and prove that what was promised holds."""
    chosen, dropped, deleted = (shmplasma.ObjectID(20 * bytes([letter])) for letter in b"cxd")
    with shmplasma.connect(path) as one, shmplasma.connect(path) as other:
        values: dict[shmplasma.ObjectID, object] = {one.put(number): number for number in range(4)}
        array = np.arange(20_000)
        large = one.put(array)
        held = other.get(large)
        target = one.create(chosen, 300)
        memoryview(target).cast("B")[:] = bytes([7]) * 300
        one.seal(chosen)
        one.create(dropped, 300)
        one.abort(dropped)
        one.create_and_seal(deleted, b"to be deleted")
        buffer = other.get_buffers(deleted)
        one.delete([deleted, large])
        values |= {other.put(str(number)): str(number) for number in range(3)}
        assert bytes(buffer) == b"to be deleted"
        del buffer
        one.create_and_seal(dropped, b"second life")
        assert other.get(list(values)) == list(values.values())
        assert bytes(other.get_buffers(chosen)) == bytes([7]) * 300
        assert bytes(other.get_buffers(dropped)) == b"second life"
        assert np.array_equal(held, array)
        assert not other.contains(deleted)
        del held, target
        one.flush()
        other.flush()
        assert set(one.list()) == {*values, chosen, dropped}
        _fill_up(one, other)


def _fill_up(one: shmplasma.PlasmaClient, other: shmplasma.PlasmaClient) -> None:
    """Put what there is only room for when others move, by less than their lengths."""
    ids = [shmplasma.ObjectID(20 * bytes([100 + number])) for number in range(8)]
    for number, object_id in enumerate(ids[:-1]):
        one.create_and_seal(object_id, bytes([number]) * (350_000 if number % 2 else 600_000))
    one.delete(ids[1:-1:2])
    one.create_and_seal(ids[-1], bytes(1_300_000))
    for number in range(0, 7, 2):
        assert bytes(other.get_buffers(ids[number])) == bytes([number]) * 600_000
    assert bytes(other.get_buffers(ids[-1])) == bytes(1_300_000)
    assert other.debug_string().count("evictions: 0") == 1


def run(start: int, step: int, *, progress: bool = False) -> Summary:
    """Let stores die at every so manieth write.

    Parameters
    ----------
    start, step : int
        The first write, and how many further the next store gets.
    progress : bool, optional
        Whether to say how far it is.

    Returns
    -------
    Summary
        What was seen.
    """
    stores = deaths = 0
    for dies_at in range(start, _END, step):
        with tempfile.TemporaryDirectory() as directory:
            path = str(Path(directory) / "s")
            keeper = _Stores(path, dies_at)
            keeper.start()
            try:
                _use(path)
            except BaseException as error:
                error.add_note(f"the store died at its write {dies_at}")
                raise
            finally:
                keeper.end()
            stores += 1
            deaths += keeper.deaths
            if progress:
                sys.stderr.write(f"\rwrite {dies_at}: {deaths} deaths")
            if not keeper.deaths:
                break
    return Summary(stores, deaths)


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--step", type=int, default=5, help="of writes (default: 5)")
    sys.stdout.write(f"\n{run(0, parser.parse_args().step, progress=True)}\n")


if __name__ == "__main__":
    main()
