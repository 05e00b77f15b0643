"""Threads that work beside their caller: each job is done once, and when the caller returns nobody works for him any more."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from textwrap import dedent

import numpy as np
import pytest

from shmplasma import helpers, system
from shmplasma.copying import copy_into
from shmplasma.helpers import share
from tests.processes import INTERRUPTER, Child, in_forked_child, run_python, until

needs_two = pytest.mark.skipif(system.processors() < 2, reason="one processor helps nobody")


@pytest.fixture
def busy() -> Iterator[None]:
    """Keep all helpers busy."""
    share([])
    end, begun = threading.Event(), []

    def wait() -> None:
        begun.append(threading.get_ident())
        end.wait(60)

    share_out = threading.Thread(target=share, args=([wait for _ in range(system.processors())],))
    share_out.start()
    until(lambda: len(begun) == system.processors(), "all threads are at work")
    yield
    end.set()
    share_out.join()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 17])
def test_each_job_is_done_once(count: int) -> None:
    """However many there are, and by whomever."""
    done: list[int] = []
    share(partial(done.append, number) for number in range(count))
    assert sorted(done) == list(range(count))


@needs_two
def test_another_thread_helps() -> None:
    """Two jobs that wait for each other are done: by two threads, the same ones each time."""
    threads: set[int] = set()

    def meet(barrier: threading.Barrier) -> None:
        barrier.wait(60)
        threads.add(threading.get_ident())

    for _ in range(3):
        share(2 * [partial(meet, threading.Barrier(2))])
    assert len(threads) <= system.processors()
    assert threading.get_ident() in threads


@needs_two
@pytest.mark.usefixtures("busy")
def test_where_helpers_are_busy_the_caller_does_all() -> None:
    """Nobody waits for a helper that has not begun."""
    threads: set[int] = set()
    share(5 * [lambda: threads.add(threading.get_ident())])
    assert threads == {threading.get_ident()}


def test_who_may_use_one_processor_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper would take his time."""
    monkeypatch.setattr(system, "keep_away", lambda _threads: False)
    threads: set[int] = set()
    share(5 * [lambda: threads.add(threading.get_ident())])
    assert threads == {threading.get_ident()}


def test_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be made, the caller does all."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(helpers, "_helpers", [])
    monkeypatch.setattr(threading.Thread, "start", refuse)
    done: list[int] = []
    share(2 * [partial(done.append, 1)])
    assert done == [1, 1]
    assert not helpers._helpers


@needs_two
@pytest.mark.parametrize("in_helper", [False, True])
def test_errors_are_the_callers(in_helper: bool) -> None:
    """What is raised in a helper is raised in the caller; whoever raises, the other one is waited for."""
    barrier, ended = threading.Barrier(2), []
    caller = threading.get_ident()

    def job() -> None:
        barrier.wait(60)
        if (threading.get_ident() != caller) == in_helper:
            raise LookupError("a job of the test")
        time.sleep(0.02)
        ended.append(1)

    with pytest.raises(LookupError, match="of the test"):
        share([job, job])
    assert ended == [1]
    done: list[int] = []
    share(2 * [partial(done.append, 1)])
    assert done == [1, 1]


@needs_two
def test_a_forked_child_has_helpers_of_its_own() -> None:
    """It does not wait for threads that it has not got."""
    share(2 * [partial(threading.Barrier(2).wait, 60)])
    assert in_forked_child(lambda: share(2 * [partial(threading.Barrier(2).wait, 60)])) == 0


@needs_two
def test_helpers_keep_away_from_the_callers_processor() -> None:
    """They may use all other processors that the caller may, and leave him his; one who has just one is told so."""
    allowed = os.sched_getaffinity(0)
    seen: list[set[int]] = []
    caller, barrier = threading.get_native_id(), threading.Barrier(2)

    def look() -> None:
        barrier.wait(60)
        if threading.get_native_id() != caller:
            seen.append(os.sched_getaffinity(0))

    share([look, look])
    (helpers_may_use,) = seen
    assert helpers_may_use < allowed
    assert len(helpers_may_use) == len(allowed) - 1
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert not system.keep_away([])
        share(2 * [lambda: seen.append(os.sched_getaffinity(0))])
    finally:
        os.sched_setaffinity(0, allowed)
    assert seen[1:] == 2 * [{min(allowed)}]


INTERRUPTED = """
    import time
    from shmplasma import helpers

    running, begun, at_once = [], 0, 0

    def job():
        global begun, at_once
        running.append(1)
        begun += 1
        at_once = max(at_once, len(running))
        time.sleep(0.001)
        running.pop()

    count, interrupted = 0, True
    while interrupted:
        count += 1
        helpers.share([job])
        begun = at_once = 0
        interrupted = is_interrupted(count, [helpers], helpers.share, 4 * [job])
        assert not running, count
        before = begun
        time.sleep(0.002)
        assert begun == before, count
    assert begun == 4
    print(count, flush=True)
    helpers.share(4 * [job])
"""


@needs_two
def test_interrupts_at_each_point() -> None:
    """Wherever Ctrl-C meets the caller, what a helper has begun is ended when he has gone, and nothing is begun."""
    with Child(INTERRUPTER + dedent(INTERRUPTED)) as child:
        assert int(child.hear()) > 20
        assert child.end() == 0


INTERRUPTED_TWICE = """
    import signal, threading, time
    from shmplasma import helpers

    caller, ended = threading.main_thread().ident, []
    both = threading.Barrier(2)

    def job():
        both.wait(60)
        if threading.get_ident() == caller:
            return
        for _ in range(2):
            time.sleep(0.1)  # by now the caller waits
            signal.pthread_kill(caller, signal.SIGINT)
        time.sleep(0.1)
        ended.append(1)

    try:
        helpers.share([job, job])
    except KeyboardInterrupt:
        print("interrupted", ended, flush=True)
"""


@needs_two
def test_an_interrupt_while_it_waits() -> None:
    """It is raised, and only when the helper has ended, however often it comes."""
    with Child(INTERRUPTED_TWICE) as child:
        assert child.hear() == "interrupted [1]"
        assert child.end() == 0


def test_jobs_at_the_end_of_the_interpreter() -> None:
    """Whoever shares while the interpreter ends does all himself: from its handlers, and from a finalizer."""
    written = run_python(
        """
        import atexit, os
        from shmplasma.helpers import share

        done = []

        class Late:
            share = staticmethod(share)
            write = staticmethod(print)

            def __del__(self):
                done = []
                self.share(3 * [lambda: done.append(1)])
                self.write(len(done), "in a finalizer", flush=True)

        atexit.register(lambda: share(2 * [lambda: done.append(1)]))
        atexit.register(lambda: share(2 * [lambda: os.write(1, b"at exit\\n")]))
        late = Late()
        late.self = late
        """
    )
    assert written == 2 * "at exit\n" + "3 in a finalizer\n"


FORKED = """
    import os, signal, threading, time
    from shmplasma import helpers

    both, pids, done = threading.Barrier(2), [], []
    caller = threading.main_thread().ident

    def fork(*_):
        pids.append(os.fork())

    def job():
        if threading.get_ident() != caller:
            both.wait(60)
            time.sleep(0.1)  # by now the caller waits
            signal.pthread_kill(caller, signal.SIGUSR1)
            time.sleep(0.1)
        elif not pids:
            both.wait(60)
        done.append(1)

    signal.signal(signal.SIGUSR1, fork)
    try:
        helpers.share([job, job])
    except RuntimeError as error:
        os._exit(7 if "which is the parent's" in str(error) and not done[1:] else 8)
    assert len(done) == 2
    print(os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]), flush=True)
"""


@needs_two
def test_a_fork_while_it_waits() -> None:
    """The child waits for no helper, as it has none, and writes nothing more: the copy is its parent's, who completes it."""
    with Child("import warnings; warnings.simplefilter('ignore')\n" + dedent(FORKED)) as child:
        assert child.hear() == "7"
        assert child.end() == 0


def test_after_a_late_helper_others_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where helpers come late, as other threads compute, so many copies are made without them."""
    monkeypatch.setattr(helpers, "_countdown", [0])
    work = helpers._Work([])
    work.help()
    assert not helpers.are_late()
    work._asked_ns -= 10**9
    work.help()
    late = 0
    while helpers.are_late():
        late += 1
    assert late == 32
    target, source = np.zeros(5 << 20, np.uint8), np.arange(5 << 20).astype(np.uint8)
    for countdown in (0, 1):
        monkeypatch.setattr(helpers, "_countdown", [countdown])
        target[:] = 0
        copy_into(target, source, 2)
        assert np.array_equal(target, source)
        assert not helpers.are_late()
