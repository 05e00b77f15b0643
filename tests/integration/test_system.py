from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shmplasma import system
from shmplasma.readiness import notify
from shmplasma.spin import Spin
from tests.processes import until

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this")
needs_membarrier = pytest.mark.skipif(
    not system.register_membarrier(), reason="no membarrier on this system"
)

PAGE = mmap.PAGESIZE


def run(code: str) -> str:
    """Return what a Python program writes; it must end well."""
    program = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(program, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def sparse() -> Iterator[int]:
    """Give a sparse file of 1 MiB on a tmpfs: one without a limit, so ask it for little."""
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, 1 << 20)
    yield fd
    os.close(fd)


@needs_membarrier
def test_membarrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where membarrier works, it can be called at once and the fast path is on."""
    monkeypatch.delenv("SHMPLASMA_FAST_PATH", raising=False)
    system.membarrier()
    assert system.fast_path_available()


def test_fast_path_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment switches the fast path off."""
    monkeypatch.setenv("SHMPLASMA_FAST_PATH", "0")
    assert not system.fast_path_available()


FORBID_MEMBARRIER = """
    import ctypes, struct
    from shmplasma import system

    def forbid():
        # Load the system call's number; if it is membarrier return EPERM, else allow.
        code = b"".join(
            struct.pack("HBBI", *instruction)
            for instruction in (
                (0x20, 0, 0, 0), (0x15, 0, 1, 324), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)
            )
        )
        filters = ctypes.create_string_buffer(code)
        program = struct.pack("HxxxxxxQ", 4, ctypes.addressof(filters))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0, ctypes.get_errno()
        assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
"""


@needs_membarrier
def test_membarrier_that_is_blocked() -> None:
    """Under a filter that refuses membarrier there is no fast path."""
    assert (
        run(
            FORBID_MEMBARRIER
            + """
    forbid()
    print(system.register_membarrier(), system.fast_path_available())
    """
        )
        == "False False"
    )


@needs_membarrier
def test_membarrier_that_is_blocked_later() -> None:
    """A membarrier that stops working is an error, and never taken for a barrier."""
    assert (
        run(
            FORBID_MEMBARRIER
            + """
    assert system.register_membarrier()
    forbid()
    try:
        system.membarrier()
    except OSError as error:
        print("refused" in str(error))
    """
        )
        == "True"
    )


@needs_linux
def test_commit_takes_pages_and_keeps_contents(sparse: int) -> None:
    """A commit takes the pages of the range, and no others, and leaves what is stored there."""
    os.pwrite(sparse, b"kept", PAGE)
    system.commit(sparse, 0, 4 * PAGE)
    assert os.fstat(sparse).st_blocks * 512 == 4 * PAGE
    assert os.pread(sparse, 4, PAGE) == b"kept"


@needs_linux
def test_commit_outlasts_signals(sparse: int) -> None:
    """Signals that arrive during a commit are handled, and the commit completes."""
    size = 64 << 20
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _frame: seen.append(number))
    os.ftruncate(sparse, size)
    try:
        # Slowly enough that some attempt fits between two of them.
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.5)
        while not seen:
            system.commit(sparse, 0, size)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert os.fstat(sparse).st_blocks * 512 == size


def test_peer() -> None:
    """The peer of a socket pair is who made it."""
    left, right = socket.socketpair()
    with left, right:
        assert system.peer(left) == system.Peer(os.getpid(), os.geteuid())


def test_peer_in_another_process(tmp_path: Path) -> None:
    """The peer of an accepted connection is the process that connected."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({path!r}); s.recv(1)"
        with subprocess.Popen([sys.executable, "-c", code]) as process:
            accepted, _ = listener.accept()
            with accepted:
                assert system.peer(accepted).pid == process.pid


def address_of(mapping: mmap.mmap) -> int:
    """Return where a writable mapping begins; the export ends at once."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


@needs_linux
def test_populate() -> None:
    """Filling a range that has been populated takes no page faults."""
    pages = 4096
    with mmap.mmap(-1, pages * PAGE) as mapping:
        # Begins and ends within a page.
        if not system.populate(address_of(mapping) + 100, pages * PAGE - 200):
            pytest.skip("this kernel is older than Linux 5.14")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for offset in range(0, pages * PAGE, PAGE):
            mapping[offset] = 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < pages // 8


@needs_linux
def test_populate_what_cannot_be_written() -> None:
    """A mapping that the kernel will not populate is reported, and nothing is done."""
    with mmap.mmap(-1, PAGE) as mapping:
        address = address_of(mapping)
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), mmap.PROT_READ)
        assert not system.populate(address, PAGE)


@needs_linux
def test_populate_what_is_not_mapped() -> None:
    """A range that is not mapped is an error."""
    with mmap.mmap(-1, PAGE) as mapping:
        address = address_of(mapping)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        system.populate(address, PAGE)


@needs_linux
def test_watch_exit() -> None:
    """The descriptor becomes readable when the process ends, and not before."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        fd = system.watch_exit(process.pid)
        assert fd is not None
        try:
            assert not select.select([fd], [], [], 0)[0]
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.close()
            assert select.select([fd], [], [])[0] == [fd]
        finally:
            os.close(fd)


@needs_linux
def test_watch_exit_of_nobody() -> None:
    """A process that is gone cannot be watched."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    with pytest.raises(ProcessLookupError):
        system.watch_exit(process.pid)
    assert system.start_time(process.pid) is None


@needs_linux
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_process_that_cannot_be_looked_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no descriptor to look with nobody is held for dead, nor for a process of no start time."""
    pid, started = os.getpid(), system.start_time(os.getpid())
    assert started is not None

    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("builtins.open", refused)
    assert system.is_alive(pid, started)
    with pytest.raises(OSError, match=os.strerror(number)):
        system.start_time(pid)


@needs_linux
def test_who_has_ended_is_not_alive_though_nobody_has_waited_for_it() -> None:
    """The kernel keeps its pid and start time until then."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        started = system.start_time(process.pid)
        assert started is not None
        assert not system.is_alive(process.pid, started)


@needs_linux
def test_start_time_of_a_process_with_an_awkward_name() -> None:
    """Spaces and parentheses in a command's name do not shift the fields."""
    before, after = run("""
        import os
        from shmplasma import system
        print(system.start_time(os.getpid()))
        with open("/proc/self/comm", "w") as file:
            file.write("a) R 1 (b")
        print(system.start_time(os.getpid()))
    """).split()
    assert before == after


@needs_linux
def test_start_time_tells_processes_apart() -> None:
    """A process that started later has a later time."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ours, theirs = system.start_time(os.getpid()), system.start_time(process.pid)
        assert ours is not None
        assert theirs is not None
        assert ours < theirs


@needs_linux
def test_file_system() -> None:
    """The type of a file system is known by any path on it."""
    assert system.file_system("/proc/self/stat") == "proc"
    assert system.huge_page_bytes("/proc") is None
    with pytest.raises(FileNotFoundError):
        system.file_system("/proc/nothing")


def test_available_memory() -> None:
    """There is some memory to be had, and not more than there is (swap aside)."""
    available = system.available_memory()
    assert available > 0
    if sys.platform == "linux":
        with Path("/proc/meminfo").open() as file:
            sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file}
        assert available <= sizes["MemTotal"] + sizes["SwapTotal"]


GIB = 1 << 30
FILES = {
    "/proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 8388608 kB\nSwapFree: 1048576 kB\nPages: 3\n",
    "/proc/self/cgroup": "1:name=systemd:/x\n0::/a/b\n",
    "/sys/fs/cgroup/a/memory.max": f"{6 * GIB}\n",
    "/sys/fs/cgroup/a/memory.current": f"{4 * GIB}\n",
    "/sys/fs/cgroup/a/memory.stat": f"anon 1\nactive_file {GIB}\ninactive_file {GIB // 2}\n",
    "/sys/fs/cgroup/a/b/memory.max": "max\n",
    "/sys/fs/cgroup/a/b/memory.current": "1\n",
}


@pytest.mark.parametrize(
    ("changes", "gib"),
    [
        ({}, 3.5),
        ({"/sys/fs/cgroup/a/memory.current": f"{7 * GIB}"}, 0.5),
        ({"/sys/fs/cgroup/a/memory.current": f"{9 * GIB}"}, 0),
        ({"/sys/fs/cgroup/a/b/memory.max": f"{GIB}", "/sys/fs/cgroup/a/b/memory.current": "0"}, 1),
        (
            {
                "/proc/self/cgroup": "0::/\n",
                "/sys/fs/cgroup/memory.max": f"{2 * GIB}",
                "/sys/fs/cgroup/memory.current": "0",
            },
            2,
        ),
        ({"/proc/self/cgroup": "2:memory:/a\n"}, 9),
    ],
)
def test_available_memory_in_control_groups(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], gib: float
) -> None:
    """The tightest group above the process counts; clean file pages in it are room."""
    monkeypatch.setattr(system, "_read", (FILES | changes).get)
    assert system.available_memory() == gib * GIB


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    """A state arrives at the socket in the environment, which may have an abstract name."""
    if abstract and sys.platform != "linux":
        pytest.skip("only Linux has abstract names")
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}" if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
        notify("READY=1")
        assert listener.recv(100) == b"READY=1"


def test_notify_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a socket to notify, or with nobody there any more, nothing happens."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")
    assert not list(tmp_path.iterdir())


def test_portable_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than on Linux, what is missing says so and does nothing."""
    monkeypatch.setattr(system, "_LINUX", False)
    with mmap.mmap(-1, PAGE) as mapping:
        assert not system.populate(address_of(mapping), PAGE)
    assert system.watch_exit(os.getpid()) is None

    def nothing(path: str, **_: object) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr("builtins.open", nothing)
    assert system.start_time(os.getpid()) is None
    assert system.file_system("/") is None
    assert system.available_memory() == os.sysconf("SC_PHYS_PAGES") * PAGE


@pytest.mark.skipif(system.processors() < 2, reason="on a single processor nobody looks anyway")
def test_who_shares_a_crowded_processor_does_not_look() -> None:
    """Where giving the processor away costs a slice of time, both ends sleep instead, for a while."""
    spin, processors = Spin(), os.sched_getaffinity(0)
    assert list(spin.looks())
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            for pid in (0, other.pid):
                os.sched_setaffinity(pid, {min(processors)})
            until(lambda: not list(spin.looks()), "nobody looks any more")
        finally:
            os.sched_setaffinity(0, processors)
            other.kill()
    until(lambda: list(spin.looks()), "they look again")
