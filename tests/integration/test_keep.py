"""Objects that are never evicted, and evictions that take no more than they must."""

from __future__ import annotations

from pathlib import Path

import pytest

import shmplasma as plasma
from shmplasma import ObjectID, PlasmaClient, Store
from shmplasma.requests import MAX_KEPT_IDS
from tests.clients import MISSING, figure, new_id

MB = 1_000_000


def fill(client: PlasmaClient, n_bytes: int = 200 * MB) -> None:
    """Put more than a store of 100 MB has room for, so that whatever may go goes."""
    for _ in range(n_bytes // (5 * MB)):
        client.put_raw_buffer(bytes(5 * MB))


def keep_some(client: PlasmaClient) -> list[ObjectID]:
    """Store objects in each of the ways there are to keep them."""
    created, array = new_id(), new_id()
    client.create(created, 1000, keep=True)
    client.seal(created)
    with client.create_array(array, 100, keep=True) as values:
        values[:] = 1
    sealed = new_id()
    client.create_and_seal(sealed, b"sealed", keep=True)
    later = client.put("later")
    client.keep(later)
    own = new_id()
    client.create(own, 10)
    client.keep([own])
    client.seal(own)
    return [
        created,
        array,
        sealed,
        client.put("a small value", keep=True),
        client.put_raw_buffer(bytes(MB), keep=True),
        later,
        own,
    ]


def test_what_is_kept_stays_until_it_is_deleted(client: PlasmaClient) -> None:
    """However much is stored afterwards; a list tells it, and a delete removes it like any other."""
    kept = keep_some(client)
    cached = client.put("a small value")
    assert not client.list()[cached]["keep"]
    fill(client)
    there = client.list()
    assert all(there[object_id]["keep"] for object_id in kept)
    assert client.evict(100 * MB) > 90 * MB
    assert client.list().keys() == set(kept)
    assert figure(client, "kept bytes") > MB
    client.delete(kept)
    assert not client.list()


def test_cache_lets_an_object_go_again(client: PlasmaClient, client2: PlasmaClient) -> None:
    """Anybody may change it, and what was kept before goes when room is needed."""
    object_id = client.put("value", keep=True)
    client2.cache([object_id])
    client.evict(1)
    assert not client.contains(object_id)


def test_what_is_not_there_cannot_be_kept(client: PlasmaClient, client2: PlasmaClient) -> None:
    """A promise for a missing object, or another client's unsealed one, is refused and changes nothing."""
    object_id, foreign = client.put("value"), new_id()
    client2.create(foreign, 10)
    for missing in (MISSING, foreign):
        with pytest.raises(plasma.PlasmaObjectNotFound, match=missing.binary().hex()):
            client.keep([object_id, missing])
    assert not client.list()[object_id]["keep"]
    with pytest.raises(TypeError):
        client.keep(["text"])  # type: ignore[list-item] # which is the test


def test_many_are_kept(client: PlasmaClient) -> None:
    """They go in several requests, each of which keeps all of its objects or none."""
    kept = [client.put_raw_buffer(b"kept") for _ in range(MAX_KEPT_IDS + 10)]
    client.keep(kept)
    assert sum(info["keep"] for info in client.list().values()) == len(kept)
    with pytest.raises(plasma.PlasmaObjectNotFound):
        client.cache([*kept, MISSING])
    assert sum(info["keep"] for info in client.list().values()) == 10


def test_what_is_kept_outlives_the_store(tmp_path: Path) -> None:
    """A store that is started again after a kill evicts it no more than the first one."""
    path = str(tmp_path / "socket")
    first = Store("100MB", socket=path)
    client = plasma.connect(path)
    kept = keep_some(client)
    client.cache(client.put("not any more", keep=True))
    client.flush()
    first.process.kill()
    first.process.wait()
    with Store("100MB", socket=path):
        fill(client)
        assert {object_id for object_id, info in client.list().items() if info["keep"]} == set(kept)
        client.disconnect()
    first.close()


def test_no_more_is_evicted_than_needed(client: PlasmaClient) -> None:
    """A larger victim that does it alone spares the smaller ones before it; the sum of what went is told."""
    small = [client.put_raw_buffer(bytes(1000)) for _ in range(3)]
    large = client.put_raw_buffer(bytes(90_000))
    last = client.put_raw_buffer(bytes(1000))
    assert client.evict(90_000) == 90_000
    assert set(client.list()) == {*small, last} != {large}
    assert client.evict(1500) == 2000
    assert client.evict(10_000) == 2000
    assert client.evict(1) == 0
