"""What the operating system is asked for, with a portable answer beside whatever only Linux has.

Invariants
----------
* No other module asks which system it runs on, reads ``/proc`` or ``/sys``, or calls the C library.
* A portable answer is slower or knows less, and is never wrong: without `membarrier` there is no
  fast path, and every operation goes through the store; without `populate` the pages of a large
  object are faulted in one by one; without `watch_exit` an owner's end shows on its socket alone.

The portable answers are written for macOS, from its documentation; they have not been run there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Final

__all__ = [
    "MAP_NORESERVE",
    "SHM_DIRECTORY",
    "HugePages",
    "Peer",
    "available_memory",
    "boot_id",
    "command",
    "commit",
    "fast_path_available",
    "file_system",
    "huge_page_bytes",
    "huge_pages",
    "is_alive",
    "keep_away",
    "make_private",
    "membarrier",
    "peer",
    "populate",
    "processors",
    "punch",
    "register_membarrier",
    "reopen",
    "start_time",
    "try_lock",
    "unlock",
    "watch_exit",
]

_LINUX: Final = sys.platform == "linux"
_X86_64: Final = _LINUX and os.uname().machine == "x86_64" and sys.maxsize > 1 << 32

SHM_DIRECTORY: Final = "/dev/shm"  # noqa: S108 - only looked at
"""Where Linux keeps POSIX shared memory; elsewhere it has no directory."""
MAP_NORESERVE: Final = 0x4000 if _LINUX else 0
"""A mapping that takes no pages of a hugetlbfs for itself; in `mmap` only since Python 3.13."""

_LIBC: Final = ctypes.CDLL(None, use_errno=True)

_MAP_FIXED: Final = 0x10  # on Linux and macOS alike
_mmap: Final = _LIBC.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_int64)

# A call by way of PyDLL keeps the interpreter lock, and arguments that are C objects already need
# no conversion (nor argtypes, which would check them again): 0.5 us a barrier instead of 0.9 us.
_syscall: Final = ctypes.PyDLL(None)["syscall"]
_syscall.restype = ctypes.c_long
_MEMBARRIER: Final = ctypes.c_long(324)
_QUERY: Final = ctypes.c_long(0)
_GLOBAL_EXPEDITED: Final = ctypes.c_long(1 << 1)
_REGISTER_GLOBAL_EXPEDITED: Final = ctypes.c_long(1 << 2)
_NO_FLAGS: Final = ctypes.c_long(0)

_MADV_POPULATE_WRITE: Final = 23
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2

_COMMAND_LETTERS: Final = 255
"""Enough to tell one program from another; the whole may have megabytes."""

# <sys/un.h> and <sys/ucred.h> of macOS: version, uid, number of groups, groups (the first counts).
_SOL_LOCAL: Final = 0
_LOCAL_PEERCRED: Final = 1
_LOCAL_PEERPID: Final = 2
_XUCRED: Final = struct.Struct("@IIh2xI60x")
_UCRED: Final = struct.Struct("@iII")
_FLOCK: Final = struct.Struct("@hhqqi4x")


@cache
def _membarrier_works() -> bool:
    if not _X86_64:
        return False
    needed = _GLOBAL_EXPEDITED.value | _REGISTER_GLOBAL_EXPEDITED.value
    commands: int = _syscall(_MEMBARRIER, _QUERY, _NO_FLAGS)
    # -1 (no such call, or a seccomp filter) has all bits set.
    if commands < 0 or commands & needed != needed:
        return False
    return bool(_syscall(_MEMBARRIER, _GLOBAL_EXPEDITED, _NO_FLAGS) == 0)


def fast_path_available() -> bool:
    """Return whether this process may read, or let others read, without asking the store.

    It may on 64-bit x86 Linux whose `membarrier` answers, unless the environment says
    ``SHMPLASMA_FAST_PATH=0``.

    Notes
    -----
    Both ends need it: a store that cannot call `membarrier` has to forbid the fast path to its clients.
    """
    return _membarrier_works() and os.environ.get("SHMPLASMA_FAST_PATH") != "0"


def register_membarrier() -> bool:
    """Have this process take part in every other process's `membarrier`; tell whether it does now.

    Where not, it must leave the fast path alone.

    Notes
    -----
    To be called by whoever pins, before the first pin, and again in a forked child.
    """
    return _membarrier_works() and bool(
        _syscall(_MEMBARRIER, _REGISTER_GLOBAL_EXPEDITED, _NO_FLAGS) == 0
    )


def membarrier() -> None:
    """Pass a full memory barrier on every running thread of all registered processes.

    Raises
    ------
    OSError
        The kernel refused although it had answered before; nothing may be taken on the strength of it.

    Notes
    -----
    To be called only where `fast_path_available`; elsewhere nobody pins without asking, and there is nothing to order against.  0.5 us
    for the call; a barrier interrupts the other processors, which takes a few microseconds more while registered threads run on them.
    """
    if _syscall(_MEMBARRIER, _GLOBAL_EXPEDITED, _NO_FLAGS):
        raise OSError("the kernel refused a membarrier, which it had granted before")


if hasattr(os, "posix_fallocate"):

    def commit(fd: int, offset: int, size: int) -> None:
        """Have the file system set aside the pages of a range, so that writing there cannot fail.

        Parameters
        ----------
        fd : int
            The segment, writable.
        offset, size : int
            Range in bytes; `size` is at least 1.  What is stored there stays as it is.

        Raises
        ------
        OSError
            The pages cannot be had (`errno.ENOSPC` and others).  A tmpfs then takes none, other
            file systems may keep what they had already taken.

        Notes
        -----
        A signal breaks it off and Python starts it anew after the handler has run: commit in steps.
        """
        os.posix_fallocate(fd, offset, size)

else:

    def commit(fd: int, offset: int, size: int) -> None:
        """Do nothing: shared memory is swappable here; a file given with ``-d`` may meet a full file system."""


def punch(fd: int, offset: int, size: int) -> bool:
    """Give whole pages of a file back; they are zeros, and behind none is memory.  Tell whether that was done.

    Notes
    -----
    Not done elsewhere than on Linux, or on a file system without holes.  0.12 ms a MiB.  Mappings of the pages, in whatever
    process, fault them in anew.
    """
    flags = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    return _LINUX and not _LIBC.fallocate(fd, flags, ctypes.c_int64(offset), ctypes.c_int64(size))


def reopen(fd: int) -> int | None:
    """Open the file behind `fd` for a description of its own, also if it has no name any more; None where that takes one."""
    path = f"/proc/self/fd/{fd}"  # elsewhere there is no such directory
    return os.open(path, os.O_RDWR | os.O_CLOEXEC) if os.path.lexists(path) else None


def try_lock(fd: int, at: int) -> bool:
    """Lock a byte of a file, which need not be there, and tell whether nobody else has; Linux only.

    The lock belongs to the open file description behind `fd`, and goes with its last descriptor.  An OSError says that there are
    no such locks, or no more of them.  1 us; 5 us in vain.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
    except BlockingIOError:
        return False
    return True


def unlock(fd: int, at: int = 0, size: int = 0) -> None:
    """Take back locks of the open file description behind `fd`, all behind `at` if the size is 0; Linux only."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, at, size, 0))


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a unix socket, as the kernel knows it.

    Attributes
    ----------
    pid : int
        Process that connected or made the socket pair; 0 if it is invisible here (another pid namespace).
    uid : int
        Its effective user at that moment.
    """

    pid: int
    uid: int


def peer(sock: socket.socket) -> Peer:
    """Return who is at the other end of a connected unix stream socket.

    Raises
    ------
    OSError
        The socket is not connected, or no unix socket.
    """
    if _LINUX:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, _ = _UCRED.unpack(credentials)
        return Peer(pid, uid)
    credentials = sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED.size)
    _, uid, *_ = _XUCRED.unpack(credentials)
    return Peer(sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID), uid)


def populate(address: int, size: int) -> bool:
    """Map the pages of a range for writing, so that filling it takes no page faults.

    Parameters
    ----------
    address, size : int
        A range of bytes in a writable mapping; every page that it touches is populated.

    Returns
    -------
    bool
        False where the kernel cannot do this (before Linux 5.14, and elsewhere): nothing has been done.

    Raises
    ------
    OSError
        The range is not mapped, or its pages cannot be had; writing there would be a SIGBUS.

    Notes
    -----
    18 GB/s, without the interpreter lock.  Filling then runs at 11.5 GB/s instead of 1.2 to 3.6.
    """
    if not _LINUX:
        return False
    start = address & -mmap.PAGESIZE
    if not _LIBC.madvise(
        ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), _MADV_POPULATE_WRITE
    ):
        return True
    code = ctypes.get_errno()
    if code == errno.EINVAL:
        return False
    raise OSError(code, os.strerror(code))


def processors() -> int:
    """Return how many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_away(threads: Iterable[int]) -> bool:
    """Have threads of this process run elsewhere than the calling one, and tell whether that may use another processor.

    They are given by what the kernel calls them, and are told again whenever it matters: the calling thread may be moved.
    1 us, and 1 us a thread.  Elsewhere than on Linux, and where a filter refuses, they run where they are put.
    """
    if not hasattr(os, "sched_setaffinity"):
        return True
    others = os.sched_getaffinity(0) - {_LIBC.sched_getcpu()}
    try:
        for thread in threads if others else ():
            os.sched_setaffinity(thread, others)
    except OSError:
        return True
    return bool(others)


def make_private(mapping: memoryview, fd: int = -1, offset: int = 0) -> None:
    """Replace all of a writable mapping by private memory at the same address: zeros, or what a file has from `offset` on.

    Raises
    ------
    OSError
        The kernel refused; the mapping is as it was.
    """
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | _MAP_FIXED | (mmap.MAP_ANONYMOUS if fd < 0 else 0)
    if _mmap(start, len(mapping), protection, flags, fd, offset) != start:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def watch_exit(pid: int) -> int | None:
    """Return a file descriptor that becomes readable when a process, of any user, ends; the caller closes it.

    None where processes cannot be watched (before Linux 5.3, and elsewhere).

    Raises
    ------
    ProcessLookupError
        There is no such process any more.
    """
    if not _LINUX:
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:  # the kernel is too old, or a filter refuses
        return None


def boot_id() -> str:
    """Return what tells this boot of this machine from all others; empty where that cannot be known."""
    return (_read("/proc/sys/kernel/random/boot_id") or "").strip()


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; with the pid it names it for good.

    None if there is no such process or no ``/proc``, or it may not be looked at.  An OSError says that there is no descriptor to look with.
    """
    try:
        return int(_status(pid)[19])
    except (ProcessLookupError, PermissionError):
        return None


def command(pid: int) -> str:
    """Return the beginning of a process's command line; empty where it cannot be seen."""
    line = _read(f"/proc/{pid}/cmdline", _COMMAND_LETTERS) or ""
    return line.replace("\0", " ").strip()


def is_alive(pid: int, started: int) -> bool:
    """Tell whether the process of this pid still lives; true where that cannot be known.

    Parameters
    ----------
    pid : int
        The process; 0 if it could not be seen when it was met.
    started : int
        Its `start_time`, by which another one of the same pid is told from it; 0 if there was none.
    """
    if not pid:
        return True
    try:
        if not started:
            os.kill(pid, 0)
            return True
        fields = _status(pid)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's, or there is no descriptor to look with
        return True
    return fields[0] not in "ZX" and int(fields[19]) == started


def file_system(path: str) -> str | None:
    """Return the type of the file system that holds a path (``"tmpfs"``, ``"hugetlbfs"``, ...).

    None where there is no ``/proc``, or the file system is not listed there.

    Raises
    ------
    OSError
        The path does not exist.
    """
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in (_read("/proc/self/mountinfo") or "").splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == number:
            return source.split()[0]
    return None


@dataclass(frozen=True, slots=True)
class HugePages:
    """How many huge pages of one size the system has.

    Attributes
    ----------
    total : int
        Pages in the pool: what ``nr_hugepages`` says.
    available : int
        Those that nobody has or has reserved, and those by which the pool may grow.
    setting : str
        The file whose number is `total`.
    """

    total: int
    available: int
    setting: str


def huge_page_bytes(directory: str) -> int | None:
    """Return the page size of a hugetlbfs, or None if the directory is on another file system."""
    return os.statvfs(directory).f_bsize if file_system(directory) == "hugetlbfs" else None


def huge_pages(page_bytes: int) -> HugePages:
    """Return the state of the pool of huge pages of this size, which is one that the system has."""
    folder = f"/sys/kernel/mm/hugepages/hugepages-{page_bytes >> 10}kB"

    def number(name: str) -> int:
        return int(_read(f"{folder}/{name}") or 0)

    may_grow = max(0, number("nr_overcommit_hugepages") - number("surplus_hugepages"))
    is_default = _meminfo().get("Hugepagesize") == page_bytes
    return HugePages(
        total=number("nr_hugepages"),
        available=number("free_hugepages") - number("resv_hugepages") + may_grow,
        setting="/proc/sys/vm/nr_hugepages" if is_default else f"{folder}/nr_hugepages",
    )


def available_memory() -> int:
    """Return how many bytes of memory this process could still fill, swap included.

    Notes
    -----
    The least of what the kernel calls available and of what the control groups (version 2) above this process still allow, where
    clean file pages count as free.  Elsewhere than on Linux: all memory that the machine has.
    """
    memory = _meminfo()
    if not memory:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room = memory["MemAvailable"] + memory["SwapFree"]
    group = (_read("/proc/self/cgroup") or "").rpartition("0::")[2].strip().rstrip("/")
    while True:
        folder = f"/sys/fs/cgroup{group}"
        limit, used = _read(f"{folder}/memory.max"), _read(f"{folder}/memory.current")
        if limit and used and limit.strip() != "max":
            counts = dict(
                line.split() for line in (_read(f"{folder}/memory.stat") or "").splitlines()
            )
            clean = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
            room = min(room, max(0, int(limit) - int(used) + clean))
        if not group:
            return room
        group = group.rpartition("/")[0]


def _read(path: str, letters: int = -1) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read(letters)
    except OSError:
        return None


def _status(pid: int) -> list[str]:
    """Return what ``/proc`` says of a process behind its command, which may hold parentheses: its state, and so on."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="surrogateescape") as file:
            return file.read().rpartition(")")[2].split()
    except FileNotFoundError as error:
        raise ProcessLookupError from error


def _meminfo() -> dict[str, int]:
    """Return the sizes in ``/proc/meminfo`` in bytes; empty where there is none."""
    fields = (line.split() for line in (_read("/proc/meminfo") or "").splitlines())
    return {words[0][:-1]: int(words[1]) << 10 for words in fields if words[-1] == "kB"}
