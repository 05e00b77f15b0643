"""A store with an external one beside a plain dict: whatever is spilled, read back, lost or killed, objects are what they were.

Workers do their jobs in any order, or fail; the store is killed between any two steps, and another one goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shmplasma.posted import Seal
from shmplasma.replies import ABSENT, Created, Done, Failed, Failure, Listing, Number, Objects
from shmplasma.requests import Contains, Create, Delete, Evict, Get, Keep, List
from shmplasma.spilling import ExternalLimits
from shmplasma.transfers import Delete as DeleteContainers
from shmplasma.transfers import Job, Read, Write
from tests.conversation import Peer, name, records
from tests.crash.damage import Mortal

CAPACITY = 16384
IDS = st.integers(0, 9).map(name)
FAILURES = (Failure.FULL, Failure.EXTERNAL)


@dataclass(eq=False)
class Question:
    """A request that was not answered yet."""

    request: Create | Get
    request_id: int


class Workers(Mortal):
    """A store whose workers do their jobs when they are told to, in any order.

    Attributes
    ----------
    jobs : list of Job
        What they have not done yet.
    is_busy : bool
        Whether they do nothing unless told.
    """

    def __init__(self, capacity: int, external: ExternalLimits) -> None:
        self.jobs: list[Job] = []
        self.is_busy = True
        super().__init__(capacity, external)

    def turn(self) -> None:
        """Do a turn, and all jobs unless the workers are busy."""
        super().turn()
        self.jobs += self.take_jobs()
        while self.jobs and not self.is_busy:
            self.work()
        if not self.is_busy and self.store.upkeep.has_urgent_work:  # what comes back awaits memory
            self.turn()

    def work(self, at: int = 0, trouble: str = "") -> None:
        """Have one of the jobs done, or fail."""
        job = self.jobs.pop(at)
        is_missing = isinstance(job, Read) and job.number not in self.containers
        self.failure = trouble or ("it is missing" if is_missing else "")
        self.do(job)
        self.failure = ""
        super().turn()
        self.jobs += self.take_jobs()

    def revive(self) -> None:
        """Start another store; what workers were doing is lost."""
        self.jobs.clear()
        super().revive()


class SpillMachine(RuleBasedStateMachine):
    """One client, the workers, and the death of the store."""

    def __init__(self) -> None:
        super().__init__()
        self.contents: dict[bytes, bytes] = {}
        self.held: dict[int, bytes] = {}
        self.doomed: set[bytes] = set()
        self.questions: list[Question] = []
        self.may_be_full = False

    @initialize(
        high_water=st.sampled_from([0.3, 0.8, 1.0]),
        limit=st.sampled_from([0, 0, 40_000]),
        at_once=st.sampled_from([1, 512]),
    )
    def start(self, high_water: float, limit: int, at_once: int) -> None:
        """Start a store and a client."""
        self.limit = limit
        self.talk = Workers(CAPACITY, ExternalLimits(limit, high_water))
        self.talk.is_busy = True
        self.talk.store._room.most_at_once = at_once
        self.peer: Peer = self.talk.enter()

    # -- what the client does ------------------------------------------------------------------

    def _has_slots(self) -> bool:
        return len(self.peer.free_slots) > 20

    @precondition(_has_slots)
    @rule(object_id=IDS, size=st.integers(1, CAPACITY // 2), keep=st.booleans())
    def create(self, object_id: bytes, size: int, keep: bool) -> None:
        """Ask for room."""
        if any(isinstance(q.request, Create) for q in self.questions):
            return
        slot = self.peer.free_slots.pop()
        request = Create(object_id, size, 0, 7, slot, keep)
        request_id = self.peer.post(request)
        self.questions.append(Question(request, request_id))
        self.talk.turn()
        self.listen()

    @precondition(_has_slots)
    @rule(object_ids=st.lists(IDS, min_size=1, max_size=3))
    def get(self, object_ids: list[bytes]) -> None:
        """Ask for objects, and not wait for those that are not there."""
        request = self.peer.wanted(object_ids)
        self.questions.append(Question(request, self.peer.post(request)))
        self.talk.turn()
        self.listen()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Let go of an object."""
        slot = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[slot]
        self.peer.release(slot)
        self.talk.wake()
        self.talk.turn()
        self.listen()

    @rule(object_ids=st.lists(IDS, min_size=1, max_size=3))
    def delete(self, object_ids: list[bytes]) -> None:
        """Delete objects."""
        self.peer.ask(Delete(object_ids), Done)
        in_use = self.in_use()
        for object_id in object_ids:
            if object_id in in_use:
                self.doomed.add(object_id)
            else:
                self.contents.pop(object_id, None)
        self.listen()

    @rule(object_id=IDS, keep=st.booleans())
    def keep(self, object_id: bytes, keep: bool) -> None:
        """Change what is kept."""
        if object_id in self.contents and object_id not in self.doomed:
            self.peer.ask(Keep(keep, [object_id]), Done)
        self.listen()

    @rule(object_id=IDS)
    def contains(self, object_id: bytes) -> None:
        """Objects are there wherever they are."""
        if object_id not in self.doomed:
            there = self.peer.ask(Contains(object_id), Number).value == 1
            assert there == (object_id in self.contents)

    @rule()
    def list(self) -> None:
        """Each object is listed once."""
        listed = records(self.peer.ask(List(0), Listing))
        sealed = [record.object_id for record in listed if record.sealed]
        assert len(sealed) == len(set(sealed))
        assert set(self.contents) - self.doomed <= set(sealed)
        assert set(sealed) <= set(self.contents)

    @rule(size=st.integers(1, CAPACITY))
    def evict(self, size: int) -> None:
        """Objects that are evicted stay."""
        request_id = self.peer.post(Evict(size))
        self.talk.turn()
        while request_id not in self.peer.replies:
            self.work_off()
        self.peer.take(request_id, Number)
        self.listen()

    # -- what workers do -----------------------------------------------------------------------

    @precondition(lambda self: self.talk.jobs)
    @rule(data=st.data(), fails=st.integers(0, 5).map(lambda n: not n))
    def work(self, data: st.DataObject, fails: bool) -> None:
        """Do any one of the jobs, or fail."""
        at = data.draw(st.integers(0, len(self.talk.jobs) - 1))
        fails = fails and not isinstance(self.talk.jobs[at], DeleteContainers)
        self.may_be_full |= fails
        self.talk.work(at, "the disk is full" if fails else "")
        self.talk.turn()
        self.listen()

    @rule(seconds=st.sampled_from([0.1, 1.5]))
    def later(self, seconds: float) -> None:
        """Let time pass."""
        self.talk.later(seconds)
        self.listen()

    def work_off(self) -> None:
        """Do all that is to be done."""
        self.talk.later(1.5)
        while self.talk.jobs:
            self.talk.work()
            self.talk.turn()

    # -- what the store does -------------------------------------------------------------------

    @rule()
    def die(self) -> None:
        """Kill the store and its workers; the client goes on with the next one."""
        self.listen()
        self.talk.revive()
        questions, self.questions = self.questions, []
        for question in questions:
            request = question.request
            slots = request.slots if isinstance(request, Get) else [request.slot]
            for slot in slots:
                self.talk.write_slot(slot, 0)
            self.questions.append(Question(request, self.peer.post(request)))
        self.talk.turn()
        self.listen()

    def in_use(self) -> set[bytes]:
        """Return what stays for a while if it is deleted: it is held, a get may have it, or it is being written."""
        gets = [question.request for question in self.questions]
        asked = {each for get in gets if isinstance(get, Get) for each in get.object_ids}
        writes = [job for job in self.talk.jobs if isinstance(job, Write)]
        written = {part.object_id for job in writes for part in job.parts}
        return {*self.held.values()} | asked | written

    def listen(self) -> None:
        """Take in what was answered."""
        for question in list(self.questions):
            if question.request_id in self.peer.replies:
                self.questions.remove(question)
                reply = self.peer.replies.pop(question.request_id)
                self.hear(question.request, reply)
        gone = self.doomed - self.in_use()
        for object_id in gone:
            self.contents.pop(object_id, None)
        self.doomed -= gone

    def hear(self, request: Create | Get, reply: object) -> None:
        """Judge an answer."""
        slots = request.slots if isinstance(request, Get) else [request.slot]
        if isinstance(reply, Failed):
            if reply.failure is Failure.EXISTS:
                assert isinstance(request, Create)
                assert request.object_id in self.contents
            else:
                assert reply.failure in FAILURES
                is_excused = self.may_be_full or self.limit or self.held or self.questions
                assert is_excused, f"nothing stood in its way: {reply.text}"
            for slot in slots:
                self.peer.release(slot)
        elif isinstance(request, Create):
            assert isinstance(reply, Created)
            # The store may hold the old object still if it was deleted just then.
            content = (
                bytes([len(self.contents) * 17 % 256, request.data_size % 251]) * request.data_size
            )
            content = content[: request.data_size]
            self.talk.raw[reply.offset : reply.offset + request.data_size] = content
            self.contents[request.object_id] = content
            self.doomed.discard(request.object_id)
            self.peer.write(Seal(request.object_id))
            self.peer.release(request.slot)
            self.talk.wake()
            self.talk.turn()
        else:
            assert isinstance(reply, Objects)
            for slot, object_id, found in zip(slots, request.object_ids, reply.found, strict=True):
                if found == ABSENT:
                    assert object_id not in self.contents or object_id in self.doomed
                    self.peer.release(slot)
                    continue
                offset, size, _, codec = found
                assert codec == 7
                assert bytes(self.talk.raw[offset : offset + size]) == self.contents[object_id]
                self.held[slot] = object_id

    @invariant()
    def check(self) -> None:
        """Everything is accounted for, and what is held does not change."""
        if not hasattr(self, "talk"):
            return
        self.talk.store.check()
        for slot, object_id in self.held.items():
            start = self.talk.layout.entry(self.talk.read_slot(slot) - 1)
            offset, size = self.talk.words[start // 8 + 4 : start // 8 + 6]
            assert bytes(self.talk.raw[offset : offset + size]) == self.contents[object_id]

    def teardown(self) -> None:
        """When all is let go and the disk has room, each object can be had, and nothing is left behind."""
        if not hasattr(self, "talk"):
            return
        for slot in list(self.held):
            del self.held[slot]
            self.peer.release(slot)
        self.talk.wake()
        while self.questions:
            self.work_off()
            self.listen()
            for slot in list(self.held):
                del self.held[slot]
                self.peer.release(slot)
            self.talk.wake()
            self.listen()
        self.talk.is_busy = False
        self.talk.later(1.5)
        self.listen()
        for object_id, content in self.contents.items():
            self.talk.later(1.5)
            if self.limit:
                continue
            (found,), (slot,) = self.peer.get(object_id)
            offset, size, _, _ = found
            assert bytes(self.talk.raw[offset : offset + size]) == content
            self.peer.release(slot)
        self.peer.ask(Delete(list(self.contents)), Done)
        self.talk.turn()
        assert not self.talk.containers, "files stay behind"
        self.talk.store.check()


TestSpilling = SpillMachine.TestCase
TestSpilling.settings = settings(stateful_step_count=40)
