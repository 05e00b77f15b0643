"""A store of which the n-th system call fails, for every n until a whole run meets no fault any more.

Each run starts a store, lets one call of it fail, puts a small load on it, ends it by SIGTERM and judges.  Right is:

* the store refuses to start: one clear line, exit code 1, nothing left behind; or
* it serves: at most one client gets a clear exception, whoever connects afterwards is served completely, no buffer
  changes that somebody holds, the exit code is 0 and nothing is left; or
* it ends because it cannot go on, with the memory or the sleep of its very loop refused: one clear line, exit code 1;
  the next store on this socket serves, and leaves nothing.

A traceback, a death by a signal, a hang or anything left behind is a failure of the store.  Only a name whose very
removal fails may stay, and the lock file of a store that did not get to lock it; the next store on this socket has to
sweep them up.  What hangs is tried once more, as a machine may stand still.  Run it by hand for all errors and calls::

    python -m tests.crash.faulty_calls --thorough
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

import shmplasma
from shmplasma.handshake import greet
from shmplasma.requests import Role
from tests.crash.tracer import Call, Fault, Traced

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CALLS", "ERRORS", "Failure", "Summary", "run"]

ERRORS: Final = ("ENOSPC", "EMFILE", "EINTR", "ENOMEM", "EIO")


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


CALLS: Final = _set(
    """
    accept4 bind chmod close connect epoll_create1 epoll_ctl epoll_wait fallocate fchmod fcntl flock ftruncate
    getsockopt ioctl listen membarrier mmap openat pidfd_open pipe2 pread64 pwrite64 read recvfrom recvmsg sendmsg
    sendto socket statfs unlink write
    """
)
"""What a store asks of the system for its own purposes; the interpreter makes some of these calls as well."""

CANNOT_FAIL: Final = _set(
    """
    brk clock_gettime clock_nanosleep exit exit_group futex getegid geteuid getgid getpid getppid gettid gettimeofday
    getuid rt_sigaction rt_sigprocmask rt_sigreturn sched_yield umask
    """
)
"""Calls without an error, or of which nobody, the C library included, ever looks at one."""

INTERRUPTIBLE: Final = _set(
    """
    accept4 close connect epoll_wait fallocate flock fstatfs ftruncate open openat pread64 pwrite64 read recvfrom
    recvmsg sendmsg sendto statfs write writev
    """
)
"""Calls that a signal can break off."""

MAY_END: Final = frozenset(("epoll_wait", "membarrier", "mmap", "mmap anonymous"))
"""Calls without which a store that serves cannot go on; no kernel refuses them to one that is in order."""

CAPACITY: Final = 4_000_000
HANG_SECONDS: Final = 60.0
"""A run takes a second; machines have been seen that were ten times as slow for minutes."""
_ATTEMPTS: Final = 3
_PIECE_BYTES: Final = 400_000
_PIECES: Final = 15
"""Half as much again as the store holds."""
_HANGS: Final = "it hangs"
_ENDED: Final = "ended with a message"
_OF_PYTHON: Final = re.compile(
    r"^Exception ignored when trying to write to the signal wakeup fd:$.*?^OSError: .*?$",
    re.DOTALL | re.MULTILINE,
)
"""What the interpreter says, and a store cannot help; it ends all the same."""

_PREPARATION: Final = """
import argparse, os, sys
os.environ["LC_ALL"] = os.environ["LANGUAGE"] = "C"  # no search for translations
argparse.ArgumentParser("warms up").format_help()
import shmplasma.cli
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # alone, it does not spin: runs are alike
"""
_START: Final = "sys.exit(shmplasma.cli.main())"


@dataclass(frozen=True)
class Failure:
    """What a store did wrong.

    Attributes
    ----------
    error : str
        The error, as ``"ENOSPC"``.
    nth : int
        Which of the calls failed.
    call : str
        Its name, and the path that it named.
    what : str
        What happened then.
    """

    error: str
    nth: int
    call: str
    what: str

    def __str__(self) -> str:
        return f"{self.error} at call {self.nth}, {self.call}: {self.what}"


@dataclass(frozen=True)
class Summary:
    """What all runs have seen.

    Attributes
    ----------
    outcomes : Counter of str
        How many stores refused to start, served, and so on.
    calls : Counter of str
        How many calls of each name were made to fail.
    longest : int
        Calls in the longest run that met no fault.
    failures : tuple of Failure
        What stores did wrong.
    """

    outcomes: Counter[str]
    calls: Counter[str]
    longest: int
    failures: tuple[Failure, ...]

    def __str__(self) -> str:
        lines = [f"faults: {self.calls.total():,}, in runs of up to {self.longest:,} calls"]
        lines += [f"{outcome}: {count:,}" for outcome, count in sorted(self.outcomes.items())]
        lines += [f"FAILURE: {failure}" for failure in self.failures]
        return "\n".join(lines)


class _Wrong(Exception):  # noqa: N818 - it is a verdict
    """The store did something wrong."""


class _Faulty(Exception):  # noqa: N818 - the same
    """The store has failed; the argument is a `Failure`."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


# -- the load ----------------------------------------------------------------------------------


class Load:
    """Clients of one store, and the buffers that they hold until the end.

    Parameters
    ----------
    path : str
        The store's socket.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._held: list[tuple[memoryview, bytes]] = []
        self._number = 0

    def once(self) -> None:
        """Use everything that a store offers, a little.

        Raises
        ------
        ShmPlasmaError, ConnectionError
            The store, or its end, refused something.
        _Wrong
            It did not do what it said.
        """
        self._number += 1
        with (
            shmplasma.connect(self._path, num_retries=0) as client,
            shmplasma.connect(self._path, num_retries=0) as other,
        ):
            client.subscribe()
            try:
                self._use(client, other)
            finally:
                client.get_notification_socket().close()
        self._be_rude()

    def _use(self, client: shmplasma.PlasmaClient, other: shmplasma.PlasmaClient) -> None:
        name = shmplasma.ObjectID(self._number.to_bytes(20, "big"))
        value = {"number": self._number}
        fresh = client.put(value)
        _must(client.get(fresh) == value, "a value is another one")
        _must(client.contains(fresh), "what was put is not there")  # or the connection has failed
        _must(other.get(fresh, timeout_ms=1000) == value, "a value is not there for another client")
        text = bytes([self._number % 256]) * 3000
        np.frombuffer(memoryview(client.create(name, len(text))), np.uint8)[:] = self._number % 256
        client.seal(name)
        _must(client.contains(name), "what was sealed is not there")
        _must(other.contains(name), "what was sealed is not there for another client")
        (found,) = other.get_buffers([name], timeout_ms=1000)
        _must(found is not None, "what was sealed cannot be got")
        self._held.append((memoryview(found), text))
        # Those of objects that were there come first.
        while client.get_next_notification()[0] != name:
            pass
        # What a client that was dropped has not sealed stays its own, and this process lives on.
        aborted = shmplasma.ObjectID((1000 + self._number).to_bytes(20, "big"))
        client.create(aborted, 100)
        client.abort(aborted)
        _must(other.get(aborted, timeout_ms=1) is shmplasma.ObjectNotAvailable, "it was aborted")
        client.delete([fresh])
        _must(not other.contains(fresh), "it was deleted")
        client.evict(1000)
        for number in range(_PIECES):
            piece = np.full(_PIECE_BYTES, number, np.uint8)
            (other if number % 2 else client).put_raw_buffer(piece)
            self.prove_unchanged()
        _must(name in other.list(), "what is held has gone")
        _must("pinned objects" in client.debug_string(), "another text")

    def _be_rude(self) -> None:
        """Be a client that the store has to drop."""
        exchange, _ = greet(self._path, 0, Role.CLIENT, "rude")
        os.close(exchange.take_descriptor())
        with exchange.detach() as sock:
            sock.sendall(64 * b"\xff")
            with suppress(ConnectionError):
                while sock.recv(4096):
                    pass

    def prove_unchanged(self) -> None:
        """Prove that all buffers are what they were when they were got."""
        _must(all(held == text for held, text in self._held), "a held buffer has changed")


def _must(condition: object, what: str) -> None:
    if not condition:
        raise _Wrong(f"the store is wrong: {what}")


# -- a run -------------------------------------------------------------------------------------


@contextmanager
def _limit(store: Traced) -> Iterator[threading.Event]:
    """Kill a store that hangs: that ends whatever waits for it; the event says so."""
    hung = threading.Event()

    def kill() -> None:
        hung.set()
        store.kill()

    timer = threading.Timer(HANG_SECONDS, kill)
    timer.start()
    try:
        yield hung
    finally:
        timer.cancel()
        timer.join()


def _one(error: str, fault: Fault, directory: str) -> tuple[str, Call | None, int]:
    """Run a store whose n-th call fails with this error.

    Returns
    -------
    outcome : str
        In a word or two.
    met : Call or None
        What failed; None when the run made no such call.
    selected : int
        How many calls have counted.

    Raises
    ------
    _Faulty
        The store has failed.
    """
    path = os.path.join(directory, "s")
    arguments = ["-m", str(CAPACITY), "-s", path]
    with Traced(_PREPARATION, _START, arguments, fault) as store:
        try:
            with _limit(store) as hung:
                outcome = _work(store, path, hung)
            _judge_what_is_left(store, path, outcome)
        except _Wrong as wrong:
            _remove(_left(store, directory))
            call = str(store.met or "no call")
            raise _Faulty(Failure(error, fault.nth, call, str(wrong))) from wrong
        return outcome, store.met, store.selected


def _work(store: Traced, path: str, hung: threading.Event) -> str:
    said = ""
    for line in store.stderr:
        said += line
        if "ready:" in line:
            break
    is_ready = "ready:" in said
    load = Load(path)
    trouble: list[str] = []
    try:
        if is_ready:
            trouble = _put_under(load, store)
        if len(trouble) < _ATTEMPTS:  # otherwise it is ending, or hangs
            store.send_signal(signal.SIGTERM)
        said += store.stderr.read()
        code = store.join()
        load.prove_unchanged()
    finally:
        # What a client holds keeps its connection, and what failed holds a client.
        del load
        gc.collect()
    if hung.is_set():
        raise _Wrong(f"{_HANGS}: clients saw {trouble}, and it says: {said}")
    return _judge(store.met, code, said, trouble)


def _judge(met: Call | None, code: int, said: str, trouble: list[str]) -> str:
    """Return what a store did, by its exit code, what it said, and what clients were refused with."""
    complaint = said.rpartition("shmplasma-store: error: ")[2] if "error: " in said else ""
    # At its end Python gives up its signal handlers, so that SIGTERM may overtake an exit code of 1.
    if code == -signal.SIGTERM and complaint:
        code = 1
    said = _OF_PYTHON.sub("", said)
    if not any(word in said for word in ("Traceback", "Exception", "Error:", "Fatal")):
        is_ready = "ready:" in said
        if code == 0 and is_ready and len(trouble) < 2:
            return "served, and one client was refused" if trouble else "served"
        if code == 1 and complaint.count("\n") == 1:
            if not is_ready:
                return "refused to start"
            if met is not None and (met.name in MAY_END or not trouble):
                return _ENDED
    raise _Wrong(f"exit code {code}, clients saw {trouble}, and it says: {said}")


def _put_under(load: Load, store: Traced) -> list[str]:
    """Load a store until that goes well once the fault has been met; return what clients have been refused with."""
    trouble: list[str] = []
    for _ in range(_ATTEMPTS):
        try:
            load.once()
        except (shmplasma.ShmPlasmaError, ConnectionError) as error:
            trouble.append(f"{type(error).__name__}: {error}")
        else:
            if trouble or store.met is None:
                break
    return trouble


def _left(store: Traced, directory: str) -> list[str]:
    """Return what a store that has ended has left behind."""
    left = [os.path.join(directory, name) for name in os.listdir(directory)]
    return left + [path for path in store.made if "/shmplasma-" in path and os.path.exists(path)]


def _judge_what_is_left(store: Traced, path: str, outcome: str) -> None:
    directory = os.path.dirname(path)
    left = _left(store, directory)
    if not left:
        return
    met = store.met
    may_stay = met is not None and (met.path in left or left == [f"{path}.lock"])
    if outcome != _ENDED and not may_stay:
        raise _Wrong(f"it leaves behind {left}")
    nothing = Fault(0, 0, lambda _: False)
    with Traced(_PREPARATION, _START, ["-m", str(CAPACITY), "-s", path], nothing) as successor:
        with _limit(successor):
            said = next(iter(successor.stderr), "")
            while said and "ready:" not in said:
                said = next(iter(successor.stderr), "")
            successor.send_signal(signal.SIGTERM)
            said += successor.stderr.read()
            code = successor.join()
        left = [name for name in left if os.path.exists(name)] + _left(successor, directory)
    if code or left:
        raise _Wrong(f"the next store ends with {code}, leaves behind {left}, and says: {said}")


def _remove(paths: Iterable[str]) -> None:
    for path in paths:
        with suppress(FileNotFoundError):
            os.unlink(path)


# -- all runs ----------------------------------------------------------------------------------


def run(
    errors: Sequence[str] = ERRORS,
    calls: Collection[str] | None = CALLS,
    *,
    step: int = 1,
    say: Callable[[str], object] = lambda _: None,
) -> Summary:
    """Let one call after the other fail, in a store of its own each, until a run meets no fault.

    Parameters
    ----------
    errors : sequence of str, optional
        Names of the errors.
    calls : collection of str, optional
        Names of the calls that count; None for all that can fail.
    step : int, optional
        Take every so many-th call only; each error begins at another one.
    say : callable, optional
        Is told of the progress, and at once of each failure.

    Notes
    -----
    Uses processes, threads and a temporary directory, all of which have gone when it returns.
    """
    outcomes: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    failures: list[Failure] = []
    longest = 0
    for index, error in enumerate(errors):
        code = getattr(errno, error)

        def selects(call: Call, error: str = error) -> bool:
            if call.name in CANNOT_FAIL or (calls is not None and call.name not in calls):
                return False
            return error != "EINTR" or call.name in INTERRUPTIBLE

        nth = 1 + index * step // len(errors)
        while True:
            with tempfile.TemporaryDirectory(prefix="t-") as directory:
                try:
                    fault = Fault(nth, code, selects)
                    try:
                        outcome, met, selected = _one(error, fault, directory)
                    except _Faulty as faulty:
                        if _HANGS not in faulty.failure.what:
                            raise
                        say(f"again, in case that the machine stood still: {faulty.failure}")
                        outcome, met, selected = _one(error, fault, directory)
                except _Faulty as faulty:
                    failures.append(faulty.failure)
                    say(f"FAILURE: {faulty.failure}")
                    outcomes["failure"] += 1
                else:
                    if met is None:
                        longest = max(longest, selected)
                        say(f"{error}: {selected} calls")
                        break
                    failed[met.name] += 1
                    outcomes[outcome] += 1
                    say(f"{error} {nth} {met}: {outcome}")
            nth += step
    return Summary(outcomes, failed, longest, tuple(failures))


def main() -> int:
    """Run as the command line says; 1 if a store has failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--errors",
        type=_names,
        default=ERRORS,
        help=f"names, joined by commas (default: {','.join(ERRORS)})",
    )
    parser.add_argument(
        "--calls",
        type=_names,
        default=tuple(sorted(CALLS)),
        help="names of system calls, joined by commas (default: those of the store itself)",
    )
    parser.add_argument(
        "--thorough", action="store_true", help="all system calls that can fail, not only --calls"
    )
    parser.add_argument("--step", type=int, default=1, help="every so many-th only (default: 1)")
    arguments = parser.parse_args()
    calls = None if arguments.thorough else arguments.calls
    began = time.monotonic()
    summary = run(arguments.errors, calls, step=arguments.step, say=_say)
    _say(f"{summary}\nseconds: {time.monotonic() - began:.0f}")
    return 1 if summary.failures else 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    sys.exit(main())
