"""Stores that are run by their command, as an operator runs them."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["PROGRAM", "killed", "run", "running", "segment_in", "silent_bucket", "until_ready"]

PROGRAM = [sys.executable, "-m", "shmplasma.cli"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run([*PROGRAM, *arguments], check=False, capture_output=True, text=True)


def until_ready(process: subprocess.Popen[str]) -> str:
    """Return what a store says until it is ready, that line included."""
    assert process.stderr is not None
    said = ""
    while "ready:" not in said:
        line = process.stderr.readline()
        assert line, f"the store ended: {said}"
        said += line
    return said


@contextmanager
def running(*arguments: str, **options: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a store for the duration of a block; give the process and what it said."""
    with subprocess.Popen(
        [*PROGRAM, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]  # Popen's overloads know no such dictionary
    ) as process:
        try:
            yield process, until_ready(process)
        except BaseException as error:
            if process.poll() is not None and process.stderr is not None:
                error.add_note(
                    f"the store has ended with {process.returncode}: {process.stderr.read()}"
                )
            raise
        finally:
            process.terminate()


@contextmanager
def killed(*arguments: str) -> Iterator[str]:
    """Run a store for the duration of a block, and kill it; give what it said."""
    with running(*arguments) as (process, said):
        try:
            yield said
        finally:
            process.kill()
            process.wait()


def segment_in(said: str) -> str:
    """Return the segment that a store says it has."""
    match = re.search(r"segment (\S+) \(", said)
    assert match
    return match[1]


@contextmanager
def silent_bucket() -> Iterator[tuple[socket.socket, str]]:
    """Give what listens where an external store is said to be and answers nobody, and the URI of that."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"127.0.0.1:{listener.getsockname()[1]}"
        options = f"endpoint_override={place}&scheme=http&region=us-east-1"
        yield listener, f"s3://key:secret@bucket/prefix?{options}"
