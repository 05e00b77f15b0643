"""Jobs: what the external store is to do for the store, and what becomes of it.  Pure.

`shmplasma.spilling` says what is written and read; here is who hears of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from shmplasma.denials import NoRoom
from shmplasma.parts import Parts
from shmplasma.replies import Failed, Failure
from shmplasma.transfers import Job, Read, Write

__all__ = ["Jobs"]


class Jobs:
    """The jobs of a store, if it has an external store.

    Parameters
    ----------
    parts : Parts
        The parts of the store, some of which it joins.
    """

    def __init__(self, parts: Parts) -> None:
        self._table = parts.table
        self._objects = parts.objects
        self._publishing = parts.publishing
        self._answers = parts.answers
        self._refusals = parts.refusals
        self._answer_later = parts.answer_later

    def take(self, now_ns: int) -> Sequence[Job]:
        """Begin what is due and return what is to be done; refuse those for whom there is no room, and none to come from leases."""
        spilling = self._objects.spilling
        if spilling is None:
            return ()
        spilling.advance()
        if spilling.stuck() is not None:
            # Nobody is refused for want of what was released meanwhile, or left, or is leased.
            self._objects.releases.wake()
            self._objects.unsealed.finish()
            spilling.advance()
            self._publishing.are_awaited = (
                spilling.stuck() is not None and self._publishing.recall()
            )
        while not self._publishing.are_awaited and (entry := spilling.stuck()) is not None:
            spilling.give_up(entry)
            self._fail(entry, "", now_ns)
            spilling.advance()
        jobs = tuple(spilling.jobs)
        spilling.jobs.clear()
        return jobs

    def done(self, job: Job, places: Sequence[int], failure: str) -> None:
        """Take note of what came of a job: see `ObjectStore.job_done`."""
        spilling = self._objects.spilling
        assert spilling is not None, "a job for no external store"
        if isinstance(job, Write):
            spilling.wrote(job, places, failure)
            self._objects.releases.wake()  # what was deleted meanwhile goes
        elif isinstance(job, Read):
            entry = job.part.entry
            if spilling.was_read(job, failure):
                self._answer_later(self._answers.came_back(entry))
            elif failure and self._objects.find_spilled(job.part.object_id) == entry:
                # Had it been deleted meanwhile, who waits for its id would not be concerned.
                failed = Failed(Failure.EXTERNAL, failure)
                self._answers.fail(job.part.object_id, failed)

    @property
    def await_commit(self) -> bool:
        """Whether an object that comes back waits for memory."""
        spilling = self._objects.spilling
        return spilling is not None and spilling.returns.await_commit

    def commit(self, now_ns: int) -> None:
        """Commit one step of the memory of an object that comes back."""
        spilling = self._objects.spilling
        assert spilling is not None, "nothing comes back from no external store"
        entry, failure = spilling.returns.commit()
        if failure:
            self._fail(entry, failure, now_ns)

    def _fail(self, entry: int, why: str, now_ns: int) -> None:
        no_room = NoRoom(self._table.size(entry), why)
        self._answers.fail(self._table.object_id(entry), self._refusals.answer(no_room, now_ns))
