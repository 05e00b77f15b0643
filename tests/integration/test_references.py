"""References between real processes: whoever holds one has the object, and the last one takes it along."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shmplasma import (
    ObjectID,
    PlasmaClient,
    PlasmaObjectNotFound,
    PlasmaStoreFull,
    SerializationError,
    Store,
    connect,
    system,
)
from shmplasma.nesting import NESTED
from shmplasma.replies import Done
from shmplasma.requests import MAX_HOLDS, Bequeath, Flush, Hold
from shmplasma.serialization import serialize
from shmplasma.session import Session
from shmplasma.store_ref import StoreRef, _registry, home_of
from tests.clients import figure
from tests.command import PROGRAM
from tests.processes import Child, in_forked_child, until

RECEIVER = """
    import pickle, sys

    for line in sys.stdin:
        command, _, rest = line.strip().partition(": ")
        if command == "take":
            ref = pickle.loads(bytes.fromhex(rest))
        elif command == "keep":
            kept = ref
        elif command == "get":
            print(int(ref.get().sum()), flush=True)
        elif command == "send":
            print(pickle.dumps(ref).hex(), flush=True)
        elif command == "drop":
            del ref
            print("dropped", flush=True)
        elif command == "put":
            import numpy as np, shmplasma
            ref = shmplasma.connect(rest).put_ref(np.arange(1000))
            print(ref.object_id.binary().hex(), flush=True)
        elif command == "put another":
            ref = ref._home.put_ref(np.arange(1000))
            print(ref.object_id.binary().hex(), flush=True)
"""


def gone(client: PlasmaClient, object_id: ObjectID) -> None:
    """Wait until an object has gone."""
    until(lambda: object_id not in client.list(), "the object has gone")


@contextmanager
def short_store() -> Iterator[tuple[Store, PlasmaClient]]:
    """Run a store that keeps what is on its way for 0.3 s only."""
    with Store("10MB", ticket_seconds=0.3) as store, store.connect() as client:
        yield store, client


def test_a_reference(client: PlasmaClient) -> None:
    """It gets the value without a copy, and takes the object along when it goes."""
    ref = client.put_ref({"a": np.arange(10_000), "b": "text"})
    array = ref.get()["a"]
    assert np.array_equal(array, np.arange(10_000))
    assert not array.flags.writeable
    assert client.contains(ref.object_id)
    assert repr(ref) == f"StoreRef({ref.object_id.binary().hex()[:12]}...)"
    object_id = ref.object_id
    del ref
    assert array.sum() == 49_995_000
    assert figure(client, "references") == 1, "the view keeps it"
    del array
    gone(client, object_id)


def test_a_small_and_a_raw_value(client: PlasmaClient) -> None:
    """What goes by a lease, and what no codec of ours knows, is owned as well."""
    for value in (b"bytes", 1.5, None, [1, 2]):
        with client.put_ref(value) as ref:
            assert ref.get() == value
            assert client.get(ref.object_id) == value
        gone(client, ref.object_id)


def test_equality(client: PlasmaClient) -> None:
    """Handles of one object are equal, and hash alike; a copy in this process is the same."""
    ref, other = client.put_ref(1), client.put_ref(1)
    again = pickle.loads(pickle.dumps(ref))
    assert again == ref
    assert hash(again) == hash(ref)
    assert ref != other
    assert ref != ref.object_id
    assert copy.copy(ref) is copy.deepcopy(ref) is ref


def test_a_released_reference(client: PlasmaClient) -> None:
    """It says so, whatever is asked of it."""
    ref = client.put_ref(1)
    ref.release()
    ref.release()
    assert repr(ref).endswith("..., released)")
    with pytest.raises(ValueError, match="was released; put the value again"):
        ref.get()
    with pytest.raises(ValueError, match="was released"):
        pickle.dumps(ref)
    gone(client, ref.object_id)


class Sent:
    """Hands its reference on while it is pickled, by a pickle of its own."""

    def __init__(self, ref: StoreRef, sent: list[bytes]) -> None:
        self.ref = ref
        self.sent = sent

    def __reduce__(self) -> tuple[type[int], tuple[()]]:
        self.sent.append(pickle.dumps(self.ref))
        return int, ()


def test_a_pickle_that_leaves_while_another_one_fails(client: PlasmaClient) -> None:
    """It has lent its reference, whatever becomes of the value in which it was made."""
    ref = client.put_ref(np.arange(10))
    sent: list[bytes] = []
    with pytest.raises(SerializationError):
        client.put([Sent(ref, sent), threading.Lock()])
    del ref
    gc.collect()
    client.flush()
    assert pickle.loads(sent[0]).get().sum() == 45


def test_a_reference_that_is_released_before_it_is_written(client: PlasmaClient) -> None:
    """The value is not stored: its reference would be to nothing."""
    ref = client.put_ref(1)
    payload = serialize([ref])
    ref.release()
    with pytest.raises(ValueError, match="released"):
        payload.write(np.empty(payload.size_bytes, np.uint8))


@pytest.mark.parametrize("how", ["twice", "never", "no room"])
def test_a_pickle_that_does_not_leave(client: PlasmaClient, how: str) -> None:
    """It has lent nothing: one that is begun anew, one that fails, and one that finds no room."""
    ref = client.put_ref(np.zeros(1000))
    object_id = ref.object_id
    if how == "twice":  # pickle refuses the lambda, cloudpickle takes it
        client.put([ref, lambda: 1])
    elif how == "never":
        with pytest.raises(SerializationError):
            client.put([ref, threading.Lock()])
    else:
        with pytest.raises(PlasmaStoreFull):
            client.put([ref, bytes(client.store_capacity())])
    assert figure(client, "references on their way") == (how == "twice")
    if how != "twice":
        del ref
        gone(client, object_id)


def test_a_deleted_object(client: PlasmaClient) -> None:
    """A reference does not keep others from deleting; the error names causes and remedy."""
    ref = client.put_ref(1)
    client.delete(ref.object_id)
    with pytest.raises(PlasmaObjectNotFound, match=r"was deleted.*put the value again"):
        ref.get()


def test_a_number_of_receivers_that_makes_no_sense(client: PlasmaClient) -> None:
    """A loan is for one receiver at least."""
    with client.put_ref(1) as ref, pytest.raises(ValueError, match="cannot be lent to 0"):
        ref.lend(0)


def test_a_client_that_is_closed(store: Store, client2: PlasmaClient) -> None:
    """References outlive the client that made them."""
    with store.connect() as client:
        ref = client.put_ref(np.arange(1000))
    assert ref.get().sum() == 499_500
    object_id = ref.object_id
    del ref
    gone(client2, object_id)


def test_garbage(client: PlasmaClient) -> None:
    """A reference in a cycle goes when the collector comes by, in the middle of whatever."""
    for _ in range(200):
        cycle: list[object] = [client.put_ref(1)]
        cycle.append(cycle)
        del cycle
    gc.collect()
    until(lambda: not client.list(), "all have gone")


def test_threads(client: PlasmaClient) -> None:
    """Handles of the same objects come and go in many threads, and none is lost."""
    refs = [client.put_ref(number) for number in range(8)]
    wrong: list[object] = []

    def work() -> None:
        for turn in range(100):
            ref = pickle.loads(pickle.dumps(refs[turn % 8]))
            if ref.get() != turn % 8:
                wrong.append(ref)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    until(lambda: figure(client, "references") == 8, "only the first are left")
    refs.clear()
    client.delete(client.list())


def test_not_evicted(client: PlasmaClient, client2: PlasmaClient) -> None:
    """A store full of referenced objects refuses more, and takes it when they have gone."""
    refs = [client.put_ref(np.zeros(9_000_000, np.uint8)) for _ in range(10)]
    with pytest.raises(PlasmaStoreFull, match="belong to references, until these are released"):
        client2.put(np.zeros(20_000_000, np.uint8))
    assert all(ref.get().size == 9_000_000 for ref in refs)
    refs.clear()
    until(lambda: not client2.list(), "all have gone")
    client2.put(np.zeros(20_000_000, np.uint8))


# -- other processes -------------------------------------------------------------------------------


def test_a_reference_that_moves(client: PlasmaClient) -> None:
    """The sender lets go at once; the receiver has the object, and takes it along."""
    ref = client.put_ref(np.arange(1000))
    object_id = ref.object_id
    with Child(RECEIVER) as child:
        data = pickle.dumps(ref.lend(1))
        del ref
        until(lambda: figure(client, "references") == 0, "the sender has let go")
        assert client.contains(object_id)
        child.say("take: " + data.hex())
        child.say("get")
        assert child.hear() == "499500"
        assert client.contains(object_id)
        child.say("drop")
        child.hear()
        gone(client, object_id)


@pytest.mark.usefixtures("spawning")
def test_through_a_queue(client: PlasmaClient) -> None:
    """References pass through queues of multiprocessing, and come back."""
    context = get_context("spawn")
    to, back = context.SimpleQueue(), context.SimpleQueue()
    process = context.Process(target=double, args=(to, back))
    process.start()
    to.put(client.put_ref(np.arange(1000)))
    result = back.get()
    process.join()
    process.close()
    for queue in (to, back):
        queue.close()
    assert result.get().sum() == 999_000
    assert client.contains(result.object_id)


def double(to: object, back: object) -> None:
    """Take a reference from one queue and put one to another."""
    ref = to.get()  # type: ignore[attr-defined]
    value = 2 * ref.get()
    with connect(ref.store_socket_name) as client:
        back.put(client.put_ref(value))  # type: ignore[attr-defined]


def test_a_holder_that_is_killed(store: Store, client: PlasmaClient) -> None:
    """What it alone had goes with it."""
    with Child(RECEIVER) as child:
        child.say("put: " + store.store_socket_name)
        object_id = ObjectID(bytes.fromhex(child.hear()))
        assert client.contains(object_id)
        child.kill()
        gone(client, object_id)


def test_a_receiver_that_is_killed() -> None:
    """What has not been unpickled stays a while for somebody else, and goes then."""
    with short_store() as (store, client), Child(RECEIVER) as sender:
        sender.say("put: " + store.store_socket_name)
        object_id = ObjectID(bytes.fromhex(sender.hear()))
        sender.say("send")
        data = bytes.fromhex(sender.hear())
        sender.say("drop")
        sender.hear()
        with Child(RECEIVER) as receiver:
            receiver.kill()
        assert client.contains(object_id)
        assert pickle.loads(data).get().sum() == 499_500
        sender.say("take: " + data.hex())
        sender.say("send")
        assert data != bytes.fromhex(sender.hear())
        sender.kill()
        gone(client, object_id)


def test_a_sender_that_keeps_nothing() -> None:
    """What is on its way stays for as long as its process lives, also when that has no handle any more; and no longer."""
    with short_store() as (store, client), Child(RECEIVER) as sender, Child(RECEIVER) as killed:
        ids, sent = [], []
        for child in (sender, killed):
            child.say("put: " + store.store_socket_name)
            ids.append(ObjectID(bytes.fromhex(child.hear())))
            child.say("send")
            sent.append(bytes.fromhex(child.hear()))
            child.say("drop")
            child.hear()
            until(lambda: figure(client, "references") == 0, "its last handle has gone")
        killed.kill()
        gone(client, ids[1])
        assert client.contains(ids[0])
        assert pickle.loads(sent[0]).get().sum() == 499_500


def test_a_queue_that_is_thrown_away() -> None:
    """While its sender lives, what nobody took is there, but gives way when it is old and room is needed."""
    with short_store() as (_, client):
        ref = client.put_ref(np.zeros(6_000_000, np.uint8))
        pickle.dumps(ref.lend(1))
        object_id = ref.object_id
        del ref

        def has_room() -> bool:
            try:
                client.put(np.zeros(6_000_000, np.uint8))
            except PlasmaStoreFull:
                return False
            return True

        until(has_room, "there is room again")
        assert not client.contains(object_id)


def test_one_pickle_for_many(client: PlasmaClient) -> None:
    """The same bytes are taken by many processes, though each lets go before the next one takes them."""
    ref = client.put_ref(np.arange(1000))
    data = pickle.dumps(ref)
    object_id = ref.object_id
    del ref
    for _ in range(3):
        with Child(RECEIVER) as child:
            child.say("take: " + data.hex())
            child.say("get")
            assert child.hear() == "499500"
            child.say("drop")
            child.hear()
    gone(client, object_id)


def test_a_fork(client: PlasmaClient, client2: PlasmaClient) -> None:
    """A child has its parent's references, whatever becomes of the parent's."""
    refs = [client.put_ref(np.arange(1000)), client.put_ref("other")]
    ids = [ref.object_id for ref in refs]
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(writer)
            os.read(reader, 1)
            code = not (refs[0].get().sum() == 499_500 and refs[1].get() == "other")
        finally:
            os._exit(code)
    os.close(reader)
    refs.clear()
    until(lambda: figure(client2, "references") == 2, "only the child has them")
    assert all(map(client2.contains, ids))
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    until(lambda: not client2.list(), "the child has taken them along")


def fork_with(task: Callable[[], object]) -> int:
    """Fork a child that ends well if a task is true in it; return its pid."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = not task()
        finally:
            os._exit(code)
    return pid


def test_a_fork_with_many(
    client: PlasmaClient, client2: PlasmaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child has all its parent's references, though its parent lets go before it has told the store of all of them."""
    refs = [client.put_ref(number) for number in range(MAX_HOLDS + 10)]
    reader, writer = os.pipe()
    parent, call = os.getpid(), Session.call
    told: list[object] = []
    lent: list[int] = []

    def in_between(self: Session, request: Any, expected: Any) -> Any:
        reply = call(self, request, expected)
        if isinstance(request, Bequeath):
            lent.append(len(request.object_ids))
        if os.getpid() != parent and isinstance(request, Hold) and not told:
            told.append(request)
            os.close(writer)
            os.read(reader, 1)
        return reply

    monkeypatch.setattr(Session, "call", in_between)
    pid = fork_with(lambda: told and [ref.get() for ref in refs] == list(range(len(refs))))
    os.close(reader)
    assert lent == [MAX_HOLDS, 10]
    refs.clear()
    until(lambda: figure(client2, "references") == MAX_HOLDS, "only the child has any")
    assert len(client2.list()) == MAX_HOLDS + 10
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_handle_that_dies_while_a_child_tells(
    client: PlasmaClient, client2: PlasmaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store hears of its end as well."""
    refs = [client.put_ref("dies"), client.put_ref("stays")]
    object_id = refs[0].object_id
    reader, writer = os.pipe()
    parent, call = os.getpid(), Session.call

    def in_between(self: Session, request: Any, expected: Any) -> Any:
        reply = call(self, request, expected)
        if os.getpid() != parent and isinstance(request, Hold) and len(refs) == 2:
            del refs[0]
        return reply

    def task() -> bool:
        os.close(writer)
        os.read(reader, 1)
        return bool(refs[0].get() == "stays")

    monkeypatch.setattr(Session, "call", in_between)
    pid = fork_with(task)
    os.close(reader)
    del refs[0]
    gone(client2, object_id)
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_child_that_lets_go(client: PlasmaClient) -> None:
    """A forked child's end is no affair of its parent's reference."""
    ref = client.put_ref("of both")
    refs = [pickle.loads(pickle.dumps(ref))]
    assert in_forked_child(refs.clear) == 0
    assert in_forked_child(lambda: client.put_ref("of the child").get()) == 0
    until(lambda: figure(client, "references") == 2, "the children have gone")
    assert ref.get() == "of both"


# -- a store that dies -----------------------------------------------------------------------------


@contextmanager
def served(path: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a store that is killed at the end of the block."""
    command = [*PROGRAM, "-m", "10MB", "-s", path, *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let a store stand still within the block."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a store, and what is in it."""
    process.terminate()
    process.wait()


def test_a_store_that_is_killed(tmp_path: Path) -> None:
    """Who holds holds on, what is on its way arrives, and what was dropped meanwhile goes."""
    path = str(tmp_path / "s")
    with Child(RECEIVER) as idle:
        with served(path):
            client = connect(path)
            held, dropped, sent = (client.put_ref(np.arange(1000)) for _ in range(3))
            ids = [ref.object_id for ref in (held, dropped, sent)]
            idle.say("take: " + pickle.dumps(held.lend(1)).hex())
            idle.say("get")
            assert idle.hear() == "499500"
            data = pickle.dumps(sent.lend(1))
            client.flush()
        del dropped, sent
        with served(path, "--ticket-seconds", "1") as process, client:
            assert held.get().sum() == 499_500
            received = pickle.loads(data)
            assert received.get().sum() == 499_500
            assert all(map(client.contains, ids))
            # What was said in silence while no store was there is known; by what is said to this one it is noticed.
            assert figure(client, "objects") >= 3
            assert client.put_ref(1).get() == 1
            # The child has not noticed, and it lives: nothing goes before it has come back.
            idle.say("send")
            idle.hear()
            gone(client, ids[1])
            del held
            until(lambda: figure(client, "references") == 2, "the child holds it, and we the other")
            del received
            gone(client, ids[2])
            assert client.contains(ids[0])
            end(process)


@pytest.mark.skipif(not system.fast_path_available(), reason="the fast path is off")
def test_nothing_is_waited_for(tmp_path: Path) -> None:
    """While the store stands still an object is put, sent, received and let go; it goes when the store goes on."""
    path = str(tmp_path / "s")
    with (
        served(path, "-m", "40MB") as process,
        connect(path) as client,
        Child(RECEIVER) as receiver,
    ):
        # It takes a lease for such as these at the fifth time.
        first = [client.put_ref(np.arange(12_000)) for _ in range(5)][-1]
        receiver.say("take: " + pickle.dumps(first.lend(1)).hex())
        receiver.say("get")
        assert receiver.hear() == "71994000"
        receiver.say("keep")  # or the last one would take the connection along
        with stopped(process):
            for value in range(3):
                ref = client.put_ref(np.full(12_000, value))
                data = pickle.dumps(ref.lend(1))
                del ref
                with pickle.loads(data) as received:
                    assert received.object_id != first.object_id
                    receiver.say("take: " + pickle.dumps(received.lend(1)).hex())
                receiver.say("drop")
                assert receiver.hear() == "dropped"
        until(lambda: client.list().keys() == {first.object_id}, "all others have gone")
        end(process)


@pytest.mark.skipif(not system.fast_path_available(), reason="the fast path is off")
@pytest.mark.parametrize("killed", ["none", "sender", "receiver"])
def test_a_store_that_is_killed_before_it_reads(tmp_path: Path, killed: str) -> None:
    """Object, loan, receipt and release lie in outboxes; whoever then lives holds what he held."""
    path = str(tmp_path / "s")
    with Child(RECEIVER) as sender, Child(RECEIVER) as receiver:
        with served(path) as process:
            sender.say("put: " + path)
            sender.hear()
            sender.say("keep")
            sender.say("send")
            receiver.say("take: " + sender.hear())
            receiver.say("keep")
            receiver.say("get")
            assert receiver.hear() == "499500"
            with stopped(process):
                sender.say("put another")
                object_id = ObjectID(bytes.fromhex(sender.hear()))
                sender.say("send")
                receiver.say("take: " + sender.hear())
                sender.say("drop")
                assert sender.hear() == "dropped"
                receiver.say("send")
                receiver.hear()  # it has received, and sends to nobody
                if killed != "none":
                    {"sender": sender, "receiver": receiver}[killed].kill()
                process.kill()
        with served(path, "--ticket-seconds", "0.2") as process, connect(path) as client:
            if killed in ("none", "receiver"):
                sender.say("put: " + path)  # so it comes back, and is not waited for
                sender.hear()
                sender.say("drop")
                sender.hear()
            if killed in ("none", "sender"):
                receiver.say("get")
                assert receiver.hear() == "499500"
                assert client.contains(object_id)
                receiver.kill()
            gone(client, object_id)
            end(process)


@pytest.mark.parametrize("received", [False, True])
def test_a_sender_that_is_killed(received: bool) -> None:
    """What it has put and sent is the receiver's; what is not received stays a while, and goes."""
    with short_store() as (store, client), Child(RECEIVER) as receiver:
        with Child(RECEIVER) as sender:
            sender.say("put: " + store.store_socket_name)
            object_id = ObjectID(bytes.fromhex(sender.hear()))
            sender.say("send")
            data = sender.hear()
            if received:
                receiver.say("take: " + data)
                receiver.say("get")
                assert receiver.hear() == "499500"
            sender.kill()
        if received:
            until(lambda: figure(client, "references on their way") == 0, "no ticket is left")
            assert client.contains(object_id)
            receiver.kill()
        gone(client, object_id)


def test_clients_that_ask_nothing_of_a_store_that_comes_back(tmp_path: Path) -> None:
    """They hold nothing, so nothing is kept for them: what is put and let go makes room, as before."""
    path = str(tmp_path / "s")
    with served(path):
        client, idle = connect(path), connect(path)
        refs = [client.put_ref(bytes(1_000_000)) for _ in range(9)]
        with idle.put_ref("let go"):
            pass
        idle.flush()
        until(lambda: figure(idle, "references") == len(refs), "the store knows that")
    with served(path, "--ticket-seconds", "0.2") as process, client, idle:
        refs.clear()

        def has_room() -> bool:
            try:
                client.put_ref(bytes(5_000_000)).release()
            except PlasmaStoreFull:
                return False
            return True

        until(has_room, "there is room again")
        end(process)


def test_a_client_that_is_closed_while_no_store_is_there(tmp_path: Path) -> None:
    """A successor waits for it no more: the ids that it had not sealed are free, and what it alone held goes."""
    path = str(tmp_path / "s")
    with served(path):
        client, closed = connect(path), connect(path)
        object_id, half = closed.put_ref("of nobody").object_id, ObjectID.from_random()
        with Child(RECEIVER) as child:
            child.say("put: " + path)
            held = ObjectID(bytes.fromhex(child.hear()))
            child.say("send")
            ref = pickle.loads(bytes.fromhex(child.hear()))
        closed.create(half, 1000)
        client.flush()
    closed.disconnect()
    del ref, closed
    gc.collect()
    with served(path, "--ticket-seconds", "0.2") as process, client:
        client.create(half, 10)
        client.abort(half)
        gone(client, held)
        assert not client.contains(object_id)
        assert client.debug_string().count("(pid ") == 1
        end(process)


def test_a_process_that_the_store_has_dropped(store: Store, client: PlasmaClient) -> None:
    """It hears of that once; then it has its references by a connection anew, and what it lets go goes."""
    ref = client.put_ref("old")
    ids = [ref.object_id]
    session = ref._home._session
    assert session is not None
    session._link.channel.send(250, b"no request")
    with pytest.raises(ConnectionError, match="has dropped this client"):
        session.call(Flush(), Done)
    del session
    assert client.contains(ids[0])
    client.flush()  # and a turn later
    assert client.contains(ids[0])
    with connect(store.store_socket_name) as other:
        new = other.put_ref(np.arange(1_000_000))
        ids.append(new.object_id)
        assert (ref.get(), new.get()[-1]) == ("old", 999_999)
        assert client.contains(new.object_id)
        del ref, new
        for object_id in ids:
            gone(client, object_id)


def test_many_that_are_let_go_at_once(client: PlasmaClient) -> None:
    """More releases than the outbox takes records all reach the store, though nobody says anything afterwards."""
    refs = [client.put_ref(number) for number in range(500)]
    refs.clear()
    gc.collect()
    with connect(client.store_socket_name) as other:
        until(lambda: not other.list(), "all have gone")


def test_a_home_that_cannot_be_asked_keeps_nothing_from_the_others(
    client: PlasmaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a signal handler forks in the middle of a call; a child inherits what other stores have."""
    with Store("10MB") as other, other.connect() as client2:
        of_one, ref = client.put_ref(1), client2.put_ref(2)
        interrupted = home_of(client.store_socket_name)

        def refuse() -> int:
            raise RuntimeError(NESTED)

        monkeypatch.setattr(interrupted, "bequeath", refuse)
        monkeypatch.setattr(_registry, "homes", {"": interrupted, "other": client2._home})
        told, telling = os.pipe()
        try:
            with pytest.warns(RuntimeWarning, match="cannot be asked: a signal handler"):  # noqa: PT031 - the child is to see it, too
                pid = os.fork()
                if not pid:
                    os.read(told, 1)
                    os._exit(0)
            object_id = ref.object_id
            del ref
            client2.flush()
            assert client2.contains(object_id)
        finally:
            os.write(telling, b"x")
            os.waitpid(pid, 0)
            os.close(told)
            os.close(telling)
        until(lambda: not client2.contains(object_id), "the child's reference goes with it")
        of_one.release()


def test_a_store_that_is_started_anew(tmp_path: Path) -> None:
    """A reference to what is gone says so; a new one is good."""
    path = str(tmp_path / "s")
    with served(path) as first:
        client = connect(path)
        old = client.put_ref(1)
        end(first)
    with served(path) as second, client:
        until(lambda: is_there(path), "the store is there")
        with pytest.raises(ConnectionError):
            client.put_ref(2)
        with pytest.raises(PlasmaObjectNotFound, match="started anew"):
            old.get()
        with client.put_ref(2) as ref:
            assert ref.get() == 2
        del old, ref
        end(second)


def is_there(path: str) -> bool:
    """Tell whether a store serves a path."""
    with connect(path):
        return True
