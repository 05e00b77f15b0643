"""The stores that are compared, by name.

A module of a peer is only imported by that peer's own worker: not every interpreter has every package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from benchmarks.peers.base import Peer

__all__ = ["PEERS", "make_peer"]

PEERS: Final = {
    "shmplasma": "benchmarks.peers.plasma:ShmPlasma",
    "plasma": "benchmarks.peers.plasma:Plasma11",
    "lmdb": "benchmarks.peers.lmdb:Lmdb",
    "redis": "benchmarks.peers.redis:Redis",
    "manager": "benchmarks.peers.manager:ManagerDict",
    "pipe": "benchmarks.peers.pipe:PicklePipe",
    "shared_memory": "benchmarks.peers.shared_memory:SharedMemoryBlocks",
    "floor": "benchmarks.peers.floor:Floor",
}


def make_peer(name: str, directory: str, capacity: int) -> Peer[Any]:
    """Return the named peer, which will keep its socket and files in `directory` and hold `capacity` bytes."""
    module, _, cls = PEERS[name].partition(":")
    peer: Peer[Any] = getattr(import_module(module), cls)(directory, capacity)
    return peer
