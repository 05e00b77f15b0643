"""A full store whose free room lies in pieces, with real processes: nobody is refused room, and nobody's bytes change."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

import shmplasma as plasma

CAPACITY = 16 << 20

READER = """
import sys, random
import shmplasma as plasma
path, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)
ids = [plasma.ObjectID(n.to_bytes(20, "big")) for n in range(count)]
reads = 0
with plasma.connect(path) as client:
    print("ready", flush=True)
    while not client.contains(plasma.ObjectID(b"end of the reading.."[:20])):
        n = rng.randrange(0, count, 2)
        buffer = client.get_buffers(ids[n], timeout_ms=0)
        if buffer is None:
            sys.exit(f"object {n} is not there")
        if bytes(buffer) != bytes([n % 251]) * buffer.size:
            sys.exit(f"object {n} has wrong bytes")
        del buffer
        reads += 1
print(reads)
"""


def object_id(number: int) -> plasma.ObjectID:
    """Return an id that is easy to tell from others."""
    return plasma.ObjectID(number.to_bytes(20, "big"))


def fill(client: plasma.PlasmaClient, size: int, *, varied: bool = False) -> int:
    """Fill the store with objects, delete every second one, and return how many there were."""
    count = left = 0
    while CAPACITY - left >= 2 * size:
        own = size + count % 7 * 640 if varied else size
        client.create_and_seal(object_id(count), bytes([count % 251]) * own)
        left += -(-own // 64) * 64
        count += 1
    client.delete([object_id(number) for number in range(1, count, 2)])
    return count


def figures(client: plasma.PlasmaClient) -> dict[str, str]:
    """Return the store's figures."""
    return dict(line.split(": ", 1) for line in client.debug_string().splitlines())


@contextmanager
def readers(store: plasma.Store, count: int, number: int = 2) -> Iterator[None]:
    """Let processes read all the while, and prove afterwards that they have read only what was right."""
    command = [sys.executable, "-c", READER, store.store_socket_name]
    running = [
        subprocess.Popen([*command, str(seed), str(count)], stdout=subprocess.PIPE, text=True)
        for seed in range(number)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield
        with store.connect() as client:
            client.create_and_seal(plasma.ObjectID(b"end of the reading.."), b"")
        for process in running:
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            assert int(output) > 0
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(("size", "varied"), [(4_096, False), (100_000, False), (60_000, True)])
def test_fragmentation_alone_fills_no_store(size: int, varied: bool) -> None:
    """In a store of small objects, every second of which was deleted, one of 45 % of the capacity finds room."""
    with plasma.Store(memory=CAPACITY) as store, store.connect() as client:
        count = fill(client, size, varied=varied)
        array = np.arange(CAPACITY * 45 // 100, dtype=np.uint8)
        large = client.put(array)
        assert np.array_equal(client.get(large), array)
        for number in range(0, count, 2):
            content = bytes(client.get_buffers([object_id(number)], timeout_ms=0)[0])
            assert content == bytes([number % 251]) * len(content)
        told = figures(client)
        assert told["evictions"] == "0"
        assert int(told["moves"]) > 0
        assert int(told["moved bytes"]) < CAPACITY // 2


def test_pinned_objects_stay_and_the_others_go_round_them() -> None:
    """Buffers that somebody holds keep their place and their bytes, and room is made beside them."""
    with plasma.Store(memory=CAPACITY) as store, store.connect() as client:
        count = fill(client, 20_000)
        held = {number: client.get_buffers(object_id(number)) for number in (40, 400, 402)}
        addresses = {number: buffer.address for number, buffer in held.items()}
        large = client.create(object_id(1_000_000), CAPACITY * 3 // 10)
        assert figures(client)["evictions"] == "0"
        for number, buffer in held.items():
            assert buffer.address == addresses[number]
            assert bytes(buffer) == bytes([number % 251]) * 20_000
        for number in range(0, count, 2):
            assert bytes(client.get_buffers(object_id(number))) == bytes([number % 251]) * 20_000
        del held, buffer, large


def test_only_what_cannot_be_moved_is_a_reason_to_refuse() -> None:
    """Where pins leave no gap of the size, the error says so, and nothing is lost for it."""
    with plasma.Store(memory=CAPACITY) as store, store.connect() as client:
        count = fill(client, 20_000)
        held = [client.get_buffers(object_id(number)) for number in range(0, count, 20)]
        with pytest.raises(plasma.PlasmaStoreFull, match="cannot be moved or evicted"):
            client.create(object_id(1_000_000), CAPACITY // 4)
        assert len(client.list()) == len(range(0, count, 2))
        del held


def test_readers_notice_nothing() -> None:
    """While objects move, other processes read them without an error and without a wrong byte."""
    with plasma.Store(memory=CAPACITY) as store, store.connect() as client:
        count = fill(client, 30_000, varied=True)
        with readers(store, count):
            for number in range(1_000_000, 1_000_010):
                large = client.create(object_id(number), CAPACITY * 45 // 100)
                client.abort(object_id(number))
                del large
                small = [object_id(2 * number + n) for n in range(40)]
                for n, each in enumerate(small):
                    client.create_and_seal(each, os.urandom(1_000 + 997 * n))
                client.delete(small[::2])
                client.delete(small[1::2])
        assert int(figures(client)["moves"]) > 0
