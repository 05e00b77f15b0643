"""Other processes for the tests: programs that talk to us line by line, and forked children."""

from __future__ import annotations

import faulthandler
import os
import resource
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from textwrap import dedent
from typing import Self

import psutil  # type: ignore[import-untyped]  # it ships no types

__all__ = [
    "INTERRUPTER",
    "STRICT",
    "Child",
    "in_forked_child",
    "run_python",
    "until",
    "wait_until_asleep",
]

STRICT = (sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning")
"""Runs a program for which warnings are errors; from 3.12 on Python warns of Arrow's threads at a fork."""

_POLL_SECONDS = 0.002
_MEASURING = "COVERAGE_PROCESS_CONFIG"
"""By this variable coverage.py starts itself in a new interpreter."""
_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""What a shell starts in the background ignores SIGINT, and hands that on to its children."""


INTERRUPTER = """
import dis, sys, threading

def chances(count):
    # Between other instructions the interpreter does not look for signals; a `with` counts on that.
    last = {}

    def see(frame, operation):
        nonlocal count
        before = "" if operation == "RESUME" else last.get(frame, "")
        last[frame] = operation
        if (
            before.startswith(("CALL", "JUMP_BACKWARD", "POP_JUMP_BACKWARD", "RESUME"))
            and not before.startswith("CALL_INTRINSIC")
        ):
            count -= 1
            if not count:
                raise KeyboardInterrupt

    return see

if sys.version_info < (3, 12):

    def watch(files, see):
        def trace(frame, event, _):
            if frame.f_code.co_filename not in files:
                return None
            frame.f_trace_opcodes = True

            def each(frame, event, _):
                if event == "opcode":
                    see(id(frame), dis.opname[frame.f_code.co_code[frame.f_lasti]])
                return each

            return each

        sys.settrace(trace)

    def watch_no_more():
        sys.settrace(None)

else:
    TOOL = 4

    def watch(files, see):
        thread = threading.get_ident()
        names = {}

        def instruction(code, offset):
            if code.co_filename not in files:
                return sys.monitoring.DISABLE
            if threading.get_ident() == thread:
                if code not in names:
                    names[code] = {each.offset: each.opname for each in dis.get_instructions(code)}
                see(id(sys._getframe(1)), names[code].get(offset, ""))

        sys.monitoring.use_tool_id(TOOL, "interrupter")
        sys.monitoring.register_callback(TOOL, sys.monitoring.events.INSTRUCTION, instruction)
        sys.monitoring.restart_events()
        sys.monitoring.set_events(TOOL, sys.monitoring.events.INSTRUCTION)

    def watch_no_more():
        sys.monitoring.set_events(TOOL, 0)
        sys.monitoring.free_tool_id(TOOL)

def is_interrupted(count, modules, action, *arguments):
    see = chances(count)
    try:
        watch({module.__file__ for module in modules}, see)
        action(*arguments)
    except KeyboardInterrupt:
        return True
    finally:
        watch_no_more()
    return False
"""
"""What a program begins with that interrupts itself, as Ctrl-C does, where these modules give the count-th chance to.

Since Python 3.12 a trace function misses opcodes, some at each call, so there `sys.monitoring` looks for the chances."""


def until(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    """Ask again and again, until `condition` holds; fail when it does not in so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it never came true that {what}"
        time.sleep(_POLL_SECONDS)


def wait_until_asleep(process: psutil.Process | int) -> None:
    """Wait until a process waits for something."""
    of = psutil.Process(process) if isinstance(process, int) else process
    until(lambda: of.status() == psutil.STATUS_SLEEPING, "the process waits")


def run_python(code: str, *arguments: str) -> str:
    """Run a program to its end, and return what it wrote; it must end well."""
    done = subprocess.run(
        [*STRICT, "-c", dedent(code), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def unmeasured() -> dict[str, str]:
    """Return this process's environment, but for what has the coverage of a program measured."""
    return {name: value for name, value in os.environ.items() if name != _MEASURING}


class Child:
    """A Python program that talks over its standard input and output; killed at the end of the block.

    Its coverage is not measured: the tracer takes a lock, which an interrupt at the wrong moment leaves locked for ever.

    Parameters
    ----------
    code : str
        The program.
    *arguments : str
        Its arguments.
    prefix : sequence of str
        A command that is to run the interpreter.
    """

    def __init__(self, code: str, *arguments: str, prefix: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, *STRICT, "-c", _CTRL_C + dedent(code), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=unmeasured(),
        )

    def hear(self) -> str:
        """Return the next line that the program writes."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the program ended with {self.process.wait()}"
        return line.rstrip("\n")

    def say(self, line: str = "") -> None:
        """Write a line to the program."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """Kill the program and wait for its end."""
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """Wait for the program's own end, and return its exit code."""
        return self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        with self.process:  # closes the pipes
            pass


def in_forked_child(task: Callable[[], object]) -> int:
    """Run a task in a forked child; return 0, 1 if it raises, or minus the signal that killed it."""
    with warnings.catch_warnings():
        # Python 3.12 warns of Arrow's threads, which have nothing to do with what a child does here.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        code = 1
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            task()
            code = 0
        finally:
            if code:
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
