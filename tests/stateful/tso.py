"""x86-TSO as an explicit model, and an explorer of everything that it allows.

The model is that of Owens, Sarkar and Sewell ("A better x86 memory model: x86-TSO", 2009).  The stores of a
CPU wait in its buffer and reach the memory later, one by one, in order; its loads see its own waiting stores
first; nothing else is reordered.

A program is a generator: it yields a step and is sent the result.  It must be deterministic, so that what it
was sent says where it stands, and an explorer can go on from any of its points in as many ways as there are.
A program says by `require` what must hold.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Await",
    "Drain",
    "Fence",
    "Load",
    "Lock",
    "Program",
    "Report",
    "Stage",
    "Step",
    "Store",
    "explore",
    "membarrier",
    "require",
]


class _Violation(Exception):  # noqa: N818 - not an error: it is what an explorer looks for
    """Something that must hold does not."""


def require(holds: bool, what: str) -> None:
    """State what must hold in a program or at an end; `what` says what is wrong if it does not.

    Not an assert statement, the text of which pytest adds to.
    """
    if not holds:
        raise _Violation(what)


@dataclass(frozen=True, slots=True)
class Load:
    """Read a word; the result is its value."""

    word: str


@dataclass(frozen=True, slots=True)
class Store:
    """Put a word into the buffer, which must have room."""

    word: str
    value: int


@dataclass(frozen=True, slots=True)
class Fence:
    """Wait until this CPU's buffer is empty, as locked instructions and system calls with a lock do."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Empty the buffer of a CPU at this point: what membarrier makes it do."""

    cpu: int


@dataclass(frozen=True, slots=True)
class Await:
    """Sleep until a word of the memory has a value."""

    word: str
    value: int


@dataclass(frozen=True, slots=True)
class Lock:
    """Write the own name to a word that is 0, once this CPU's buffer is empty; the result is whether it was.

    What a lock of the kernel does; giving it back is a fence and a store.
    """

    word: str
    owner: int


Step = Load | Store | Fence | Drain | Await | Lock
Program = Generator[Step, int, Hashable]


@dataclass(frozen=True, slots=True)
class Stage:
    """What a CPU runs: a program and its arguments.  A program that returns one goes on with that.

    Where a program goes on with another stage, all that it was sent before is forgotten; the explorer then knows
    states as equal that differ in nothing else.
    """

    program: Callable[..., Program]
    arguments: tuple[Hashable, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """What an exploration found.

    Attributes
    ----------
    states : int
        How many different states were visited.
    ends : int
        How many of them have no successor.
    violation : str
        What was wrong, after the shortest run that leads there; empty if nothing was.
    """

    states: int
    ends: int
    violation: str


def membarrier(cpus: Sequence[int]) -> Program:
    """Drain these CPUs, one after the other: all that is promised is a point for each between start and end."""
    yield Fence()
    for cpu in cpus:
        yield Drain(cpu)
    return None


class _Point:
    """One point of a program: what it does next, and where it gets from here."""

    __slots__ = ("after", "error", "received", "result", "stage", "step")

    def __init__(self, stage: Stage, received: tuple[int, ...]) -> None:
        self.stage = stage
        self.received = received
        self.after: dict[int, _Point] = {}
        self.step: Step | None = None
        self.result: Hashable = None
        self.error = ""
        generator = stage.program(*stage.arguments)
        try:
            self.step = next(generator)
            for value in received:
                self.step = generator.send(value)
        except StopIteration as stop:
            self.step, self.result = None, stop.value
        except _Violation as error:
            self.step, self.error = None, str(error)


_Buffer = tuple[tuple[int, int], ...]
_State = tuple[tuple[int, ...], tuple[_Point, ...], tuple[_Buffer, ...]]


class _Explorer:
    """The transitions between states: memory, a point for each CPU, and a buffer for each."""

    def __init__(self, words: Mapping[str, int], buffer_size: int) -> None:
        self.names = list(words)
        self.number = {word: number for number, word in enumerate(words)}
        self.buffer_size = buffer_size
        self.stages: dict[Stage, _Point] = {}

    def begin(self, stage: Stage) -> _Point:
        """Return the first point of a stage."""
        point = self.stages.get(stage)
        if point is None:
            point = self.stages[stage] = self.settled(_Point(stage, ()))
        return point

    def settled(self, point: _Point) -> _Point:
        """Return the point, or the first of the stage that its program has returned."""
        return self.begin(point.result) if isinstance(point.result, Stage) else point

    def go_on(self, point: _Point, value: int) -> _Point:
        """Return the point that follows when the step's result is `value`."""
        after = point.after.get(value)
        if after is None:
            after = self.settled(_Point(point.stage, (*point.received, value)))
            point.after[value] = after
        return after

    def successors(self, state: _State) -> list[_State]:
        """Return what may come next."""
        memory, points, buffers = state
        found: list[_State] = []
        for cpu, buffer in enumerate(buffers):
            if buffer:
                number, value = buffer[0]
                flushed = (*memory[:number], value, *memory[number + 1 :])
                rest = (*buffers[:cpu], buffer[1:], *buffers[cpu + 1 :])
                found.append((flushed, points, rest))
            done = self.execute(cpu, points[cpu].step, memory, buffers)
            if done is not None:
                value, memory_after, buffers_after = done
                point = self.go_on(points[cpu], value)
                moved = (*points[:cpu], point, *points[cpu + 1 :])
                found.append((memory_after, moved, buffers_after))
        return found

    def describe(self, before: _State, after: _State) -> str:
        """Say what led from a state to one of its successors."""
        memory, points, buffers = before
        for cpu, buffer in enumerate(buffers):
            if points[cpu] is not after[1][cpu]:
                step = points[cpu].step
                done = self.execute(cpu, step, memory, buffers)
                assert done is not None
                return f"CPU {cpu}: {step} -> {done[0]}"
            if buffer[1:] == after[2][cpu] != buffer and points == after[1]:
                number, value = buffer[0]
                return f"CPU {cpu}:     {self.names[number]} = {value} reaches the memory"
        raise AssertionError("nothing happened")

    def execute(
        self,
        cpu: int,
        step: Step | None,
        memory: tuple[int, ...],
        buffers: tuple[_Buffer, ...],
    ) -> tuple[int, tuple[int, ...], tuple[_Buffer, ...]] | None:
        """Return the step's result, the memory and the buffers after it; None if it must wait."""
        buffer = buffers[cpu]
        if isinstance(step, Load):
            number = self.number[step.word]
            for at, value in reversed(buffer):
                if at == number:
                    return value, memory, buffers
            return memory[number], memory, buffers
        if isinstance(step, Store):
            if len(buffer) == self.buffer_size:
                return None
            longer = (*buffer, (self.number[step.word], step.value))
            return 0, memory, (*buffers[:cpu], longer, *buffers[cpu + 1 :])
        if isinstance(step, Fence):
            return None if buffer else (0, memory, buffers)
        if isinstance(step, Drain):
            drained = list(memory)
            for number, value in buffers[step.cpu]:
                drained[number] = value
            return 0, tuple(drained), (*buffers[: step.cpu], (), *buffers[step.cpu + 1 :])
        if isinstance(step, Lock):
            if buffer:
                return None
            number = self.number[step.word]
            if memory[number]:
                return 0, memory, buffers
            return 1, (*memory[:number], step.owner, *memory[number + 1 :]), buffers
        if isinstance(step, Await):
            return (0, memory, buffers) if memory[self.number[step.word]] == step.value else None
        return None


def explore(
    stages: Sequence[Stage],
    words: Mapping[str, int],
    *,
    buffer_size: int,
    at_end: Callable[[Mapping[str, int], Sequence[Any]], None] = lambda _words, _results: None,
) -> Report:
    """Visit every state that is reachable, breadth first, until one violates something.

    Parameters
    ----------
    stages : sequence of Stage
        What each CPU runs.
    words : mapping of str to int
        The memory in the beginning.
    buffer_size : int
        How many stores a CPU can hold back.
    at_end : callable, optional
        ``at_end(words, results)`` states by `require` what must hold in a state without successor; a result is
        what the CPU's program has returned, None if it waits for ever.

    Notes
    -----
    Time and memory are proportional to the number of states: about 8 µs and 0.7 KB each with three CPUs.
    """
    with _no_collector():
        return _explore(_Explorer(words, buffer_size), stages, tuple(words.values()), at_end)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Stop the cyclic collector, which would take a third of the time and find nothing in tuples of tuples."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _explore(
    explorer: _Explorer,
    stages: Sequence[Stage],
    values: tuple[int, ...],
    at_end: Callable[[Mapping[str, int], Sequence[Any]], None],
) -> Report:
    points = tuple(explorer.begin(stage) for stage in stages)
    start: _State = (values, points, ((),) * len(stages))
    came_from: dict[_State, _State | None] = {start: None}
    waiting = deque([start])
    ends = 0

    def report(state: _State, what: str) -> Report:
        lines = [what]
        before = came_from[state]
        while before is not None:
            lines.append(explorer.describe(before, state))
            state, before = before, came_from[before]
        return Report(len(came_from), ends, "\n".join(reversed(lines)))

    while waiting:
        state = waiting.popleft()
        memory, points, _ = state
        for point in points:
            if point.error:
                return report(state, point.error)
        successors = explorer.successors(state)
        if not successors:
            ends += 1
            try:
                at_end(
                    dict(zip(explorer.names, memory, strict=True)),
                    [point.result for point in points],
                )
            except _Violation as error:
                return report(state, str(error))
        for successor in successors:
            if successor not in came_from:
                came_from[successor] = state
                waiting.append(successor)
    return Report(len(came_from), ends, "")
