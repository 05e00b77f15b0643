"""Further processes that use the same store: clients that load it together, and the one that waits for an object.

They are started once and kept: the cases measure stores, not interpreters that start.
"""

from __future__ import annotations

import time
from itertools import repeat
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, Final, Self

from benchmarks.peers.base import UnsupportedError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from types import TracebackType

    from benchmarks.peers.base import Client, Peer

__all__ = ["Crew"]

_OPERATIONS_A_LOOK: Final = 16
"""Operations between two looks at the clock, which then costs the fastest peer 1 % or so."""
_START_AFTER_SECONDS: Final = 0.05
_PATIENCE_SECONDS: Final = 30.0


class Crew:
    """Processes with one connection each; a context manager that ends them."""

    def __init__(self, peer: Peer[Any]) -> None:
        self._peer = peer
        self._members: list[tuple[Any, Connection]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._members:
            self.dismiss()

    def pipe(self, number: int) -> Connection:
        """Return the pipe to a member, starting as many as are missing."""
        context = get_context("spawn")
        while len(self._members) <= number:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(self._peer, theirs), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))
        return self._members[number][1]

    def dismiss(self) -> None:
        """End the newest member, whatever it is doing."""
        process, pipe = self._members.pop()
        pipe.close()
        process.join(timeout=0.5)
        process.kill()
        process.join()

    def ask(self, number: int, *request: object) -> Any:
        """Return a member's answer.

        Raises
        ------
        UnsupportedError
            The peer has no such operation.
        TimeoutError
            There was no answer within 30 seconds.
        """
        self.pipe(number).send(request)
        return self.answer(number)

    def answer(self, number: int, patience_seconds: float = _PATIENCE_SECONDS) -> Any:
        """Return a member's answer to what it was sent; see `ask`."""
        pipe = self.pipe(number)
        if not pipe.poll(patience_seconds):
            raise TimeoutError
        answer = pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def rate(self, n_members: int, seconds: float, *request: object) -> float:
        """Return how many operations a second `n_members` members do together."""
        for number in range(n_members):
            self.ask(number, "ready")
        start = time.perf_counter() + _START_AFTER_SECONDS
        for number in range(n_members):
            self.pipe(number).send((*request, start, seconds))
        return sum(float(self.answer(number)) for number in range(n_members))


def _serve(peer: Peer[Any], pipe: Connection) -> None:
    try:
        client = peer.connect()
        while True:
            request = pipe.recv()
            try:
                pipe.send(_carry_out(client, pipe, *request))
            except UnsupportedError as error:
                pipe.send(error)
    except (EOFError, ConnectionError):  # dismissed, perhaps with an answer on the way
        return


def _carry_out(client: Client[Any], pipe: Connection, command: str, *arguments: Any) -> object:
    match command, arguments:
        case "ready", ():
            return None
        case "gets", (name, start, seconds):
            return _loop(client.get_raw(client.key(name)), start, seconds, None)
        case "puts", (data, start, seconds):
            keys: list[Any] = []
            rate = _loop(client.put_raw(data), start, seconds, keys)
            client.drop(keys)
            return rate
        case "store", (name, data):
            client.store_raw(client.key(name), data)
            return None
        case "contains", (name, n_operations):
            return _each(client.contains(client.key(name)), n_operations)
        case "get_frame", (name, n_operations):
            get: Any = client.get_object(client.key(name))
            return _each(lambda: _use_frame(get()), n_operations)
        case "take_over", (name,):
            client.take_over(client.key(name), pipe)
            return time.perf_counter()
        case _:
            raise ValueError(f"a crew member cannot {command}{arguments}")


def _use_frame(frame: Any) -> None:
    """Touch both ends of each column of a data frame."""
    for column in frame.columns:
        values = frame[column]
        if values.iloc[0] == values.iloc[-1]:
            raise ValueError(f"the column {column} is not what was stored")


def _loop(operation: Any, start: float, seconds: float, results: list[Any] | None) -> float:
    now = time.perf_counter
    time.sleep(max(0.0, start - now()))
    began, n_operations = now(), 0
    while (ended := now()) - began < seconds:
        if results is None:
            for _ in repeat(None, _OPERATIONS_A_LOOK):
                operation()
        else:
            results.extend([operation() for _ in repeat(None, _OPERATIONS_A_LOOK)])
        n_operations += _OPERATIONS_A_LOOK
    return n_operations / (ended - began)


def _each(operation: Any, n_operations: int) -> list[float]:
    now = time.perf_counter
    samples = []
    for _ in repeat(None, n_operations):
        began = now()
        operation()
        samples.append(now() - began)
    return samples
