"""A Python program whose system calls are followed, and of which one can be made to fail.

It is traced with ``ptrace(2)``, by way of ctypes; on 64-bit x86 Linux only.  To fail a call, its number is replaced
at its entry by one that does not exist, so that the kernel does nothing, and its result is put in place at its exit.
A close is carried out and only then said to have failed, as the kernel has it; so is a write to the standard error
output, since whoever reads that could wait for the line for ever.

Invariants
----------
* A program is traced, and waited for, by the one thread that has started it, as the kernel demands.
* Calls are followed from the moment when the program's own preparations (its imports) are over.
* Whoever ends this process ends the program with it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Final, Self

__all__ = ["SUPPORTED", "Call", "Fault", "Traced"]

SUPPORTED: Final = sys.platform == "linux" and platform.machine() == "x86_64"

_TRACEME: Final = 0
_POKEUSER: Final = 6
_SYSCALL: Final = 24
_SETOPTIONS: Final = 0x4200
_GET_SYSCALL_INFO: Final = 0x420E
_OPTIONS: Final = 1 | 1 << 20
"""TRACESYSGOOD, which tells stops at system calls from signals; EXITKILL."""
_AT_SYSCALL: Final = signal.SIGTRAP | 0x80
_WALL: Final = 0x40000000
_ENTRY: Final = 1
_EXIT: Final = 2
_RAX: Final = 10 * 8
_ORIG_RAX: Final = 15 * 8
_NO_CALL: Final = ctypes.c_ulong(-1).value
_NEW_FILE: Final = os.O_CREAT | os.O_EXCL
_MAP_ANONYMOUS: Final = 0x20
_PATH_BYTES: Final = 256

_PROGRAM: Final = f"""
import ctypes, os, signal
{{preparation}}
if ctypes.CDLL(None).ptrace({_TRACEME}, 0, None, None):
    raise SystemExit("it cannot be traced")
os.kill(os.getpid(), signal.SIGSTOP)
{{program}}
"""

_STDERR: Final = 2
_WRITE: Final = 1
_CLOSE: Final = 3
_MMAP: Final = 9
_NAMES: Final = {
    0: "read",
    _WRITE: "write",
    2: "open",
    _CLOSE: "close",
    4: "stat",
    5: "fstat",
    6: "lstat",
    7: "poll",
    8: "lseek",
    _MMAP: "mmap",
    10: "mprotect",
    11: "munmap",
    12: "brk",
    13: "rt_sigaction",
    14: "rt_sigprocmask",
    15: "rt_sigreturn",
    16: "ioctl",
    17: "pread64",
    18: "pwrite64",
    20: "writev",
    21: "access",
    24: "sched_yield",
    25: "mremap",
    28: "madvise",
    32: "dup",
    39: "getpid",
    41: "socket",
    42: "connect",
    43: "accept",
    44: "sendto",
    45: "recvfrom",
    46: "sendmsg",
    47: "recvmsg",
    48: "shutdown",
    49: "bind",
    50: "listen",
    51: "getsockname",
    52: "getpeername",
    54: "setsockopt",
    55: "getsockopt",
    60: "exit",
    62: "kill",
    63: "uname",
    72: "fcntl",
    73: "flock",
    77: "ftruncate",
    79: "getcwd",
    82: "rename",
    83: "mkdir",
    84: "rmdir",
    87: "unlink",
    89: "readlink",
    90: "chmod",
    91: "fchmod",
    92: "chown",
    93: "fchown",
    94: "lchown",
    95: "umask",
    96: "gettimeofday",
    102: "getuid",
    104: "getgid",
    107: "geteuid",
    108: "getegid",
    110: "getppid",
    131: "sigaltstack",
    137: "statfs",
    138: "fstatfs",
    186: "gettid",
    202: "futex",
    203: "sched_setaffinity",
    204: "sched_getaffinity",
    217: "getdents64",
    228: "clock_gettime",
    230: "clock_nanosleep",
    231: "exit_group",
    232: "epoll_wait",
    233: "epoll_ctl",
    257: "openat",
    260: "fchownat",
    262: "newfstatat",
    263: "unlinkat",
    268: "fchmodat",
    281: "epoll_pwait",
    285: "fallocate",
    288: "accept4",
    291: "epoll_create1",
    293: "pipe2",
    302: "prlimit64",
    318: "getrandom",
    324: "membarrier",
    332: "statx",
    434: "pidfd_open",
    435: "clone3",
}
_PATH_ARGUMENTS: Final = {
    name: index
    for index, names in enumerate(
        (
            "open stat lstat access mkdir rmdir unlink readlink chmod chown lchown statfs",
            "openat newfstatat unlinkat fchmodat fchownat statx",
        )
    )
    for name in names.split()
}


class _EntryInfo(ctypes.Structure):
    """``struct ptrace_syscall_info`` at the entry of a call."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
        ("reserved", ctypes.c_uint64 * 2),
    )


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that was followed.

    Attributes
    ----------
    name : str
        Its name; ``"mmap anonymous"`` for one that only asks for memory.
    path : str
        The path that it names, if it names one.
    """

    name: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.name}({self.path})"


@dataclass(frozen=True, slots=True)
class Fault:
    """Which call is to fail, and how.

    Attributes
    ----------
    nth : int
        Counted from 1, among the calls that are selected.
    code : int
        The error number.
    selects : callable
        Whether a call counts.
    """

    nth: int
    code: int
    selects: Callable[[Call], bool]


class Traced:
    """A running Python program, followed until its end; killed at the end of the block.

    Parameters
    ----------
    preparation, program : str
        What it does before its calls are followed, and from then on.
    arguments : sequence of str
        Its command line.
    fault : Fault
        Which of its calls fails.

    Attributes
    ----------
    stderr : file
        What it writes; ends when the program does.
    selected : int
        How many calls have counted so far.
    met : Call or None
        The call that was made to fail.
    made : set of str
        All paths that it has made a new file at; what it only opened is somebody else's.
    exit_code : int or None
        Minus a signal's number when that has ended it; None while it runs.

    Notes
    -----
    Attributes may be read by any thread at any time.
    """

    def __init__(
        self, preparation: str, program: str, arguments: Sequence[str], fault: Fault
    ) -> None:
        reader, writer = os.pipe()
        self.stderr: IO[str] = open(reader, encoding="utf-8", errors="replace")  # noqa: SIM115 - __exit__ closes it
        self.selected = 0
        self.met: Call | None = None
        self.made: set[str] = set()
        self.exit_code: int | None = None
        self._fault = fault
        code = _PROGRAM.format(preparation=preparation, program=program)
        command = [sys.executable, "-c", code, *arguments]
        started = threading.Event()
        self._pidfd = -1
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(command, writer, started), name="tracer"
        )
        self._thread.start()
        started.wait()

    def _run(self, command: list[str], stderr: int, started: threading.Event) -> None:
        # Coverage would make calls of its own, and write its file at the end.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")
        }
        try:
            try:
                pid = os.posix_spawn(
                    command[0],
                    command,
                    environment,
                    file_actions=[(os.POSIX_SPAWN_DUP2, stderr, 2)],
                    setsigmask=(),
                )
            finally:
                os.close(stderr)
            self._pidfd = os.pidfd_open(pid)
            _, status = os.waitpid(pid, _WALL)  # its preparations are over
            started.set()
            self._follow(pid, status)
        except BaseException as error:  # noqa: BLE001 - `join` raises it
            self._failure = error
            self.kill()
        finally:
            started.set()

    def _follow(self, pid: int, status: int) -> None:
        if os.WIFSTOPPED(status):
            _ptrace(_SETOPTIONS, pid, 0, _OPTIONS)
        pass_on = failing = 0
        while os.WIFSTOPPED(status):
            try:
                _ptrace(_SYSCALL, pid, 0, pass_on)
                _, status = os.waitpid(pid, _WALL)
                if not os.WIFSTOPPED(status):
                    break
                pass_on = 0
                if os.WSTOPSIG(status) != _AT_SYSCALL:
                    pass_on = os.WSTOPSIG(status)
                    continue
                info = _EntryInfo()
                _ptrace(_GET_SYSCALL_INFO, pid, ctypes.sizeof(info), ctypes.addressof(info))
                if info.op == _ENTRY:
                    failing = self._enter(pid, info)
                    if failing and not _is_carried_out(info):
                        _ptrace(_POKEUSER, pid, _ORIG_RAX, _NO_CALL)
                elif info.op == _EXIT and failing:
                    _ptrace(_POKEUSER, pid, _RAX, ctypes.c_ulong(-failing).value)
                    failing = 0
            except ProcessLookupError:  # it was killed while it stood still
                _, status = os.waitpid(pid, _WALL)
        self.exit_code = os.waitstatus_to_exitcode(status)

    def _enter(self, pid: int, info: _EntryInfo) -> int:
        """Take note of a call; return the error with which it is to fail, or 0."""
        call = _call(pid, info)
        if call.name == "openat" and info.arguments[2] & _NEW_FILE == _NEW_FILE:
            self.made.add(call.path)
        fault = self._fault
        if fault.selects(call):
            self.selected += 1
            if self.selected == fault.nth:
                self.met = call
                return fault.code
        return 0

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the program has ended."""
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return

    def kill(self) -> None:
        """Kill the program."""
        if self._pidfd >= 0:
            self.send_signal(signal.SIGKILL)

    def join(self) -> int:
        """Wait for the program's end and return its exit code.

        Raises
        ------
        OSError
            It could not be traced.
        """
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        assert self.exit_code is not None
        return self.exit_code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._thread.join()
        self.stderr.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)


def _is_carried_out(info: _EntryInfo) -> bool:
    """Return whether a call does what it is to do even if it fails."""
    return bool(info.number == _CLOSE or (info.number == _WRITE and info.arguments[0] == _STDERR))


def _call(pid: int, info: _EntryInfo) -> Call:
    number = info.number
    name = _NAMES.get(number, f"call {number}")
    if number == _MMAP and info.arguments[3] & _MAP_ANONYMOUS:
        return Call("mmap anonymous")
    index = _PATH_ARGUMENTS.get(name)
    return Call(name, "" if index is None else _text(pid, info.arguments[index]))


def _text(pid: int, address: int) -> str:
    """Return the text at an address of a program that stands still."""
    if not address:
        return ""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        # A page at a time, as there may be nothing behind it.
        page_end = (address | 4095) + 1
        data = os.pread(memory.fileno(), min(_PATH_BYTES, page_end - address), address)
        if b"\0" not in data and len(data) < _PATH_BYTES:
            data += os.pread(memory.fileno(), _PATH_BYTES - len(data), page_end)
    return os.fsdecode(data.partition(b"\0")[0])


def _ptrace(request: int, pid: int, address: int, data: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_ulong, ctypes.c_ulong)
    if libc.ptrace(request, pid, address, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"ptrace({request}): {os.strerror(code)}")
