"""The open file description by which a client locks ids (`shmplasma.claims` has the argument)."""

from __future__ import annotations

import os

from shmplasma import system

__all__ = ["LockFile"]


class LockFile:
    """What the store has given to this client for its locks.

    Parameters
    ----------
    fd : int
        Closed when this is collected.

    Notes
    -----
    One that a store which comes back has given takes the place of the old one for new locks; what was locked by the old one
    stays so until `unlock_all`.  Where nothing was, all but the last are closed.
    """

    __slots__ = ("_fd", "_has_locked", "_old")

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._old: list[int] = []
        self._has_locked = False

    def lock(self, at: int) -> bool:
        """Lock a byte, and tell whether that was granted; OSError where there are no such locks, or no more of them."""
        self._has_locked = True
        return self._fd >= 0 and system.try_lock(self._fd, at)

    def unlock(self, at: int) -> None:
        """Take back the lock on a byte."""
        if self._fd >= 0:
            system.unlock(self._fd, at, 1)

    def unlock_all(self) -> None:
        """Take back all locks, those by old descriptions as well."""
        if self._fd >= 0:
            system.unlock(self._fd)
        self._has_locked = False
        while self._old:
            os.close(self._old.pop())

    def renew(self, fd: int | None) -> None:
        """Lock by this description from now on; None if there is none, and nothing is locked."""
        if self._fd >= 0:
            self._old.append(self._fd)
        # The last one may be just in use by another thread.
        while not self._has_locked and len(self._old) > 1:
            os.close(self._old.pop(0))
        self._fd = -1 if fd is None else fd

    def close(self) -> None:
        """Close all descriptors; what was locked stays locked as long as another process has them."""
        fds, self._fd = [self._fd, *self._old], -1
        self._old.clear()
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def __del__(self) -> None:
        self.close()
