"""Upkeep: what a store does between requests, one short step at a time.  Pure.

Urgent work is somebody's who waits; first comes what he waits for himself, last what is only to be ready when somebody asks.
Idle work is nobody's: memory is committed ahead of need, and given back when it was not used for a while.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shmplasma.answers import Answers
from shmplasma.creations import Creations
from shmplasma.deletions import Deletions
from shmplasma.effects import Effect
from shmplasma.jobs import Jobs
from shmplasma.lifecycle import Lifecycle
from shmplasma.outgoing import Outgoing
from shmplasma.publishing import Publishing
from shmplasma.room import Room
from shmplasma.trims import Trims

__all__ = ["Upkeep"]


class Upkeep:
    """What there is to do for a store that handles no request.

    Parameters
    ----------
    room, objects, deletions, publishing, answers, creations, jobs, trims, outgoing
        The parts of the store that it needs.
    """

    def __init__(
        self,
        room: Room,
        objects: Lifecycle,
        deletions: Deletions,
        publishing: Publishing,
        answers: Answers,
        creations: Creations,
        jobs: Jobs,
        trims: Trims,
        outgoing: Outgoing,
    ) -> None:
        self._room = room
        self._objects = objects
        self._deletions = deletions
        self._publishing = publishing
        self._answers = answers
        self._creations = creations
        self._jobs = jobs
        self._trims = trims
        self._outgoing = outgoing

    # -- urgent --------------------------------------------------------------------------------

    @property
    def has_urgent_work(self) -> bool:
        """Whether a creator waits for memory to be committed, or a client for it to be given back, or objects are moved or removed."""
        return (
            self._creations.await_memory
            or self._room.mover.is_busy
            or bool(self._trims)
            or self._objects.unsealed.are_left
            or self._publishing.is_to_evict
            or self._jobs.await_commit
        )

    def advance(self, now_ns: int) -> Sequence[Effect]:
        """Do one step of the urgent work; answer who has waited for it.

        Room that this makes is whose who waits for it, if `offer_room` is called before another request is handled.
        """
        if self._creations.await_memory:
            self._creations.advance()
        elif self._jobs.await_commit:
            self._jobs.commit(now_ns)
        elif self._room.mover.is_busy:
            self._objects.note_evicted(self._room.advance())
            self._deletions.look_again()
            self._answers.look_again()
        elif self._objects.unsealed.are_left:
            self._objects.unsealed.advance()
        elif self._trims:
            self._trims.advance()
        else:
            self._publishing.evict_ahead()
        return self._outgoing.take()

    # -- idle ----------------------------------------------------------------------------------

    @property
    def has_idle_work(self) -> bool:
        """Whether memory should be committed ahead of need."""
        return not self._room.commitment.is_ahead

    def commit_ahead(self) -> None:
        """Commit one step of memory ahead of need.

        Raises
        ------
        CommitError
            There is no memory.
        """
        self._room.commitment.step_ahead()

    def commit_all(self) -> Iterator[int]:
        """Commit the whole data region by steps; yield how many bytes that are so far.

        Raises
        ------
        CommitError
            There is no memory.
        """
        return self._room.commitment.commit_all()

    def trim_ns(self, now_ns: int) -> int | None:
        """Return when an idle store has to `trim`, in nanoseconds from now; None if not before it is used.

        Any clock will do that does not go back.
        """
        return self._trims.idle_ns(now_ns)

    def trim(self, now_ns: int) -> None:
        """Give back one step of memory that was not used for a while, if it is time to look for some."""
        self._trims.advance_idle(now_ns)
