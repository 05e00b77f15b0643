"""x86-TSO as an explicit model, and an explorer of everything that it allows.

The model is that of Owens, Sarkar and Sewell ("A better x86 memory model: x86-TSO", 2009).  The stores of a
CPU wait in its buffer and reach the memory later, one by one, in order; its loads see its own waiting stores
first; nothing else is reordered.

A program is a generator: it yields a step and is sent the result.  It must be deterministic, so that what it
was sent says where it stands, and an explorer can go on from any of its points in as many ways as there are.
A program that finds something wrong raises AssertionError.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Await",
    "Drain",
    "Fence",
    "Load",
    "Program",
    "Report",
    "Stage",
    "Step",
    "Store",
    "explore",
    "membarrier",
]


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


Step = Load | Store | Fence | Drain | Await
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

    __slots__ = ("error", "after", "received", "result", "stage", "step")

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
        except AssertionError as error:
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

    def successors(self, state: _State) -> list[tuple[str, _State]]:
        """Return what may happen next, each with a line that describes it."""
        memory, points, buffers = state
        found: list[tuple[str, _State]] = []
        for cpu, buffer in enumerate(buffers):
            if buffer:
                number, value = buffer[0]
                flushed = (*memory[:number], value, *memory[number + 1 :])
                rest = (*buffers[:cpu], buffer[1:], *buffers[cpu + 1 :])
                line = f"CPU {cpu}:     {self.names[number]} = {value} reaches the memory"
                found.append((line, (flushed, points, rest)))
            done = self.execute(cpu, points[cpu].step, memory, buffers)
            if done is not None:
                value, memory_after, buffers_after = done
                point = self.go_on(points[cpu], value)
                line = f"CPU {cpu}: {points[cpu].step} -> {value}"
                moved = (*points[:cpu], point, *points[cpu + 1 :])
                found.append((line, (memory_after, moved, buffers_after)))
        return found

    def execute(
        self,
        cpu: int,
        step: Step | None,
        memory: tuple[int, ...],
        buffers: tuple[_Buffer, ...],
    ) -> tuple[int, tuple[int, ...], tuple[_Buffer, ...]] | None:
        """Return the step's result, the memory and the buffers after it; None if it must wait."""
        buffer = buffers[cpu]
        match step:
            case Load(word):
                number = self.number[word]
                own = [value for at, value in buffer if at == number]
                return (own[-1] if own else memory[number]), memory, buffers
            case Store(word, value):
                if len(buffer) == self.buffer_size:
                    return None
                longer = (*buffer, (self.number[word], value))
                return 0, memory, (*buffers[:cpu], longer, *buffers[cpu + 1 :])
            case Fence():
                return None if buffer else (0, memory, buffers)
            case Drain(other):
                drained = list(memory)
                for number, value in buffers[other]:
                    drained[number] = value
                return 0, tuple(drained), (*buffers[:other], (), *buffers[other + 1 :])
            case Await(word, value):
                return (0, memory, buffers) if memory[self.number[word]] == value else None
            case None:
                return None


def explore(
    stages: Sequence[Stage],
    words: Mapping[str, int],
    *,
    buffer_size: int,
    at_end: Callable[[Mapping[str, int], Sequence[Any]], None],
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
    at_end : callable
        ``at_end(words, results)`` raises AssertionError if a state without successor is wrong; a result is what the
        CPU's program has returned, None if it waits for ever.

    Notes
    -----
    Time and memory are proportional to the number of states: about 10 µs and 0.5 KB each.
    """
    explorer = _Explorer(words, buffer_size)
    points = tuple(explorer.begin(stage) for stage in stages)
    start: _State = (tuple(words.values()), points, ((),) * len(stages))
    came_from: dict[_State, tuple[_State, str] | None] = {start: None}
    waiting = deque([start])
    ends = 0

    def report(state: _State, what: str) -> Report:
        lines = [what]
        origin = came_from[state]
        while origin is not None:
            lines.append(origin[1])
            origin = came_from[origin[0]]
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
            except AssertionError as error:
                return report(state, str(error))
        for line, successor in successors:
            if successor not in came_from:
                came_from[successor] = (state, line)
                waiting.append(successor)
    return Report(len(came_from), ends, "")
