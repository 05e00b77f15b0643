from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import threading
import weakref
from collections.abc import Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from shmplasma import (
    NotConnectedError,
    ObjectID,
    ObjectNotAvailable,
    PlasmaClient,
    Store,
    aio,
    connect,
    system,
)
from tests.clients import MISSING, figure, new_id
from tests.command import PROGRAM
from tests.processes import until

MANY = 1200
"""Waits that need three boards, and more than a socket takes at once."""


def at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that does not leave the event loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    pytest.fail("it waits")


async def asking(
    client: PlasmaClient, count: int = 1
) -> tuple[list[ObjectID], list[asyncio.Task[Any]]]:
    """Return tasks that wait for objects, each of which has sent its request."""
    ids = [new_id() for _ in range(count)]
    tasks = [asyncio.create_task(client.get_async(object_id)) for object_id in ids]
    await until_async(lambda: waiting() == count)
    return ids, tasks


def waiting() -> int:
    """Return how many requests of this event loop wait for their replies."""
    return sum(len(courier._waiting) for courier in couriers())


def couriers() -> list[aio._Courier]:
    """Return what watches channels for this event loop."""
    ours = aio._loops.get(asyncio.get_running_loop())
    return list(ours._couriers.values()) if ours else []


async def until_async(condition: Any) -> None:
    """Let the event loop go on until a condition holds."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def has_let_go(client: PlasmaClient) -> bool:
    """Read what the store has said, and tell whether the client lends nothing any more."""
    client.flush()
    return lent(client) == 0


def lent(client: PlasmaClient) -> int:
    """Return how many slots of a client's boards are in use."""
    assert client._session is not None
    boards = client._session._boards._boards
    return sum(511 - len(board.free) for board in boards)


@pytest.mark.skipif(not system.fast_path_available(), reason="the fast path is off")
def test_what_is_there_is_answered_at_once(client: PlasmaClient) -> None:
    """A get of sealed objects does not leave the event loop; it needs not even one."""
    first, second = client.put("a"), client.put("b")
    client.flush()
    assert at_once(client.get_async(first)) == "a"
    assert at_once(client.get_async([second, first])) == ["b", "a"]
    assert at_once(client.get_async([])) == []


def test_a_miss_waits_and_the_loop_goes_on(client: PlasmaClient, client2: PlasmaClient) -> None:
    """A get of what is missing lets other tasks run, and is answered when the last object comes."""

    async def main() -> None:
        there = client2.put(1)
        missing = [new_id(), new_id()]
        task = asyncio.create_task(client.get_async([missing[0], there, *missing]))
        await until_async(lambda: waiting() == 1)
        client2.put("x", missing[0])
        client2.put("y", missing[1])
        assert await task == ["x", 1, "x", "y"]
        assert not couriers()

    asyncio.run(main())


@pytest.mark.parametrize("timeout_ms", [0, 20])
def test_a_deadline(client: PlasmaClient, timeout_ms: float) -> None:
    """What does not come in time is ObjectNotAvailable, what is there comes beside it."""

    async def main() -> None:
        there = client.put(1)
        assert await client.get_async(MISSING, timeout_ms) is ObjectNotAvailable
        assert await client.get_async([MISSING, there], timeout_ms) == [ObjectNotAvailable, 1]

    asyncio.run(main())
    assert lent(client) == 0


def test_what_is_no_id_is_refused(client: PlasmaClient) -> None:
    """Wrong arguments raise what the synchronous get raises."""

    async def main() -> None:
        with pytest.raises(TypeError, match="ObjectID"):
            await client.get_async([b"no id"])  # type: ignore[list-item]  # on purpose
        with pytest.raises(TypeError, match="sequence"):
            await client.get_async({MISSING})  # type: ignore[arg-type]  # on purpose
        with pytest.raises(ValueError, match="not a number"):
            await client.get_async(MISSING, float("nan"))
        with pytest.raises(TypeError, match="timeout_ms is a number or None, not str"):
            await client.get_async(there, "1")  # type: ignore[arg-type]  # on purpose

    there = client.put(1)
    asyncio.run(main())


def test_a_closed_client_is_refused(store: Store) -> None:
    """A get by a client that was disconnected says so."""
    client = store.connect()
    client.disconnect()
    with pytest.raises(NotConnectedError, match="disconnected"):
        asyncio.run(client.get_async(MISSING))


@pytest.mark.parametrize("fast_path", ["1", "0"])
def test_many_wait_without_threads(
    store: Store, monkeypatch: pytest.MonkeyPatch, fast_path: str
) -> None:
    """More tasks than a board has slots wait on one client, and no thread stays with them."""
    monkeypatch.setenv("SHMPLASMA_FAST_PATH", fast_path)

    async def main(client: PlasmaClient, writer: PlasmaClient) -> None:
        threads = threading.active_count()
        ids, tasks = await asking(client, MANY)
        await until_async(lambda: threading.active_count() == threads)
        for number, object_id in enumerate(ids):
            writer.put(number, object_id)
        assert await asyncio.gather(*tasks) == list(range(MANY))
        # All at once, of what is there: without the fast path each is a request.
        assert await asyncio.gather(*map(client.get_async, ids)) == list(range(MANY))

    with store.connect() as client, store.connect() as writer:
        asyncio.run(main(client, writer))
        assert lent(client) == 0


def test_a_cancelled_task_takes_its_request_back(
    client: PlasmaClient, client2: PlasmaClient
) -> None:
    """When a cancellation is through, the store pins nothing for it, and the slot is free again."""

    async def main() -> None:
        (object_id,), (task,) = await asking(client)
        assert lent(client) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        await asyncio.sleep(0)  # the event loop has held the traceback until now
        assert lent(client) == 0
        client2.put(1, object_id)
        assert figure(client2, "pinned objects") == 0
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.get_async(MISSING), 0.01)
        await asyncio.sleep(0)
        assert lent(client) == 0

    asyncio.run(main())


def test_cancelled_while_the_store_does_not_answer(client: PlasmaClient, store: Store) -> None:
    """A cancellation does not wait for long; the slots are free when the store has answered."""

    async def main() -> None:
        os.kill(store.process.pid, signal.SIGSTOP)
        try:
            ids, tasks = await asking(client, MANY // 3)
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in done)
            assert lent(client) == len(ids)
        finally:
            os.kill(store.process.pid, signal.SIGCONT)
        # The rest is sent without anybody's waiting for it.
        await until_async(lambda: not couriers())

    asyncio.run(main())
    until(lambda: has_let_go(client), "the store has answered")


def test_a_store_that_does_not_read_holds_up_no_loop(
    store: Store, client: PlasmaClient, client2: PlasmaClient
) -> None:
    """More requests than the socket takes are begun while the store stands still, and answered later."""

    async def main() -> None:
        object_id = new_id()
        os.kill(store.process.pid, signal.SIGSTOP)
        try:
            ids = [new_id() for _ in range(MANY // 3)]
            tasks = [asyncio.create_task(client.get_async([object_id, one])) for one in ids]
            await until_async(lambda: waiting() == len(tasks))
        finally:
            os.kill(store.process.pid, signal.SIGCONT)
        client2.put(1, object_id)
        for one in ids:
            client2.put(2, one)
        assert await asyncio.gather(*tasks) == [[1, 2]] * len(tasks)

    # Three boards before, as the store cannot grant one while it stands still.
    asyncio.run(_use_slots(client, MANY))
    asyncio.run(main())


async def _use_slots(client: PlasmaClient, count: int) -> None:
    tasks = (client.get_async(new_id(), timeout_ms=50) for _ in range(count))
    assert set(await asyncio.gather(*tasks)) == {ObjectNotAvailable}


def test_tasks_and_threads_share_a_client(client: PlasmaClient, client2: PlasmaClient) -> None:
    """Threads and two event loops wait on one client; each gets its own objects, in any order."""
    ids = [new_id() for _ in range(90)]
    got: dict[ObjectID, object] = {}

    def wait_for(object_id: ObjectID) -> None:
        got[object_id] = client.get(object_id)

    async def take(object_id: ObjectID) -> None:
        got[object_id] = await client.get_async(object_id)

    async def take_all(some: list[ObjectID]) -> None:
        await asyncio.gather(*map(take, some))

    threads = [threading.Thread(target=wait_for, args=(one,)) for one in ids[:30]]
    threads += [
        threading.Thread(target=asyncio.run, args=(take_all(ids[start : start + 30]),))
        for start in (30, 60)
    ]
    for thread in threads:
        thread.start()
    for number, object_id in reversed(list(enumerate(ids))):
        client2.put(number, object_id)
    for thread in threads:
        thread.join()
    assert got == {object_id: number for number, object_id in enumerate(ids)}


def test_a_loop_that_is_busy_holds_up_no_thread(
    client: PlasmaClient, client2: PlasmaClient
) -> None:
    """Threads get their replies while a task of a loop that does nothing else waits on the same client."""

    async def main() -> None:
        (object_id,), (task,) = await asking(client)
        asked = new_id()
        thread = threading.Thread(target=client.get, args=(asked,))
        thread.start()
        client2.put(1, asked)
        thread.join()  # the loop stands still
        client2.put(2, object_id)
        assert await task == 2

    asyncio.run(main())


def test_sync_calls_of_the_loop_itself(client: PlasmaClient, client2: PlasmaClient) -> None:
    """A reply that a synchronous call of the same thread reads reaches the task that waits for it."""

    async def main() -> None:
        (object_id,), (task,) = await asking(client)
        client2.put(1, object_id)
        client2.flush()
        assert not client.contains(MISSING)
        assert await task == 1

    asyncio.run(main())


def test_the_client_leaves_while_tasks_wait(store: Store) -> None:
    """Tasks that wait when their client is disconnected are told."""

    async def main() -> None:
        client = store.connect()
        _, tasks = await asking(client, 3)
        client.disconnect()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, NotConnectedError)

    asyncio.run(main())


def test_the_store_dies_for_good() -> None:
    """Tasks that wait when an embedded store is killed are told, and so is who asks later."""

    async def main() -> None:
        with Store("10MB") as store, store.connect() as client:
            _, tasks = await asking(client, 3)
            store.process.kill()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, NotConnectedError)
            with pytest.raises(NotConnectedError):
                await client.get_async(MISSING)

    asyncio.run(main())


def test_the_store_dies_and_comes_back(tmp_path: Path) -> None:
    """Tasks go on waiting through the death of the store, and get what is put after it; the loop goes on."""
    path = str(tmp_path / "s")
    program = [*PROGRAM, "-m", "10MB", "-s", path]

    async def main() -> None:
        first = subprocess.Popen(program, stderr=subprocess.DEVNULL)
        with connect(path) as client:
            ids, tasks = await asking(client, 100)
            first.kill()
            first.wait()
            await asyncio.sleep(0)
            late = asyncio.create_task(client.get_async(ids[0]))
            second = subprocess.Popen(program, stderr=subprocess.DEVNULL)
            with connect(path) as writer:
                for number, object_id in enumerate(ids):
                    writer.put(number, object_id)
            assert await asyncio.gather(*tasks, late) == [*range(100), 0]
            del tasks, late
            # The thread that has connected anew may be about to end, and what it knows with it.
            await until_async(lambda: gc.collect() >= 0 and lent(client) == 0)
        second.terminate()
        second.wait()

    asyncio.run(main())


def test_nothing_is_pinned_for_a_value_that_was_dropped(tmp_path: Path) -> None:
    """What a get has brought that waited through the death of the store goes with it, without the collector."""
    path = str(tmp_path / "s")
    program = [*PROGRAM, "-m", "10MB", "-s", path]

    async def main() -> None:
        first = subprocess.Popen(program, stderr=subprocess.DEVNULL)
        with connect(path) as client:
            (object_id,), (task,) = await asking(client)
            first.kill()
            first.wait()
            second = subprocess.Popen(program, stderr=subprocess.DEVNULL)
            with connect(path) as writer:
                writer.put(bytes(1000), object_id)
                assert await task == bytes(1000)
                del task
                await until_async(lambda: figure(writer, "pinned objects") == 0)
        second.terminate()
        second.wait()

    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()


def test_a_loop_that_was_closed_keeps_no_client(store: Store, client: PlasmaClient) -> None:
    """A get that waited there goes with it, and so do the connection and all that it has open."""
    other = store.connect()
    weak = weakref.ref(other)
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(other.get_async(new_id()))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    other.disconnect()
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]  # that it is not done is the point
    del other, waiting, loop
    gc.collect()
    assert weak() is None
    assert not client.get_buffers([MISSING], 0)[0]


def test_notifications_let_other_tasks_run(client: PlasmaClient) -> None:
    """However many are waiting: between two readings of the socket they have their turn."""
    ids = [client.put_raw_buffer(b"1") for _ in range(20_000)]
    turns = 0
    at: list[int] = []

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        receive = loop.sock_recv

        async def noted(sock: socket.socket, nbytes: int) -> bytes:
            at.append(turns)
            return await receive(sock, nbytes)

        loop.sock_recv = noted  # type: ignore[method-assign]
        counting = asyncio.create_task(count())
        heard = 0
        async with aclosing(client.notifications()) as notifications:
            async for _ in notifications:
                heard += 1
                if heard == len(ids):
                    break
        counting.cancel()

    asyncio.run(main())
    assert len(at) > 3
    assert len(set(at)) == len(at)


def test_the_next_store_is_another(tmp_path: Path) -> None:
    """A client whose store was ended connects, at its next use, to the one that serves the path by then."""
    path = str(tmp_path / "s")

    async def main() -> None:
        with Store("10MB", socket=path) as store:
            client = store.connect()
            _, (task,) = await asking(client)
        with pytest.raises(NotConnectedError):
            await task
        with Store("10MB", socket=path) as store, store.connect() as writer:
            assert await client.get_async(writer.put("new")) == "new"
            client.disconnect()

    asyncio.run(main())


def test_a_coroutine_that_is_closed(client: PlasmaClient) -> None:
    """A coroutine whose event loop has been closed takes its request back when it is closed itself."""
    loop = asyncio.new_event_loop()
    coroutine = client.get_async(MISSING)

    async def start() -> None:
        coroutine.send(None)

    loop.run_until_complete(start())
    assert lent(client) == 1
    loop.close()
    coroutine.close()
    until(lambda: has_let_go(client), "the slot is free")


def test_notifications(client: PlasmaClient, client2: PlasmaClient) -> None:
    """An iteration gives what is sealed, what comes, and what goes, and ends its subscription with it."""

    async def main() -> None:
        first = client2.put_raw_buffer(b"123", metadata=b"x")
        async with aclosing(client.notifications()) as notifications:
            assert await anext(notifications) == (first, 3, 1)
            following = asyncio.create_task(anext(notifications))
            await asyncio.sleep(0)
            second = client2.put_raw_buffer(b"12")
            assert await following == (second, 2, 0)
            client2.delete([first, second])
            gone = [await anext(notifications) for _ in range(2)]
            assert set(gone) == {(first, -1, -1), (second, -1, -1)}
            ids = [client2.put_raw_buffer(b"") for _ in range(3000)]
            assert [(await anext(notifications))[0] for _ in ids] == ids
        with pytest.raises(StopAsyncIteration):
            await anext(notifications)

    asyncio.run(main())


def test_notifications_are_cancelled(client: PlasmaClient) -> None:
    """A task that waits for a notification can be cancelled, which ends its subscription."""

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(client.notifications()), 0.05)

    asyncio.run(main())


def test_notifications_end_with_the_store() -> None:
    """Who waits for a notification when the store ends is told."""

    async def main() -> None:
        with Store("10MB") as store, store.connect() as client:
            object_id = client.put(1)
            notifications = client.notifications()
            assert (await anext(notifications))[0] == object_id
            store.close()
            with pytest.raises(NotConnectedError, match="subscribe again"):
                await anext(notifications)

    asyncio.run(main())
