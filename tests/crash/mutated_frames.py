"""Sends a store frames that are wrong in every way, beside a client that must not notice.

Valid requests of every kind, after a valid introduction or none, are damaged: bits flipped, ends cut off, lengths
and integers replaced by extreme ones, frames doubled and spliced, descriptors attached that nobody asked for.  What
the store should send is often not taken: replies stay unread, descriptors are left in the socket::

    python -m tests.crash.mutated_frames --count 1000000 --seed 1

A client that is dropped keeps its board until its process has gone, so the attackers are short-lived processes,
one after the other.  After a tenth of the frames, and at the end, all of them have gone; what the store then has open
must be the same, and its resident memory may have grown by `RSS_MARGIN_BYTES` in between.
"""

from __future__ import annotations

import argparse
import inspect
import multiprocessing
import os
import random
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, get_args

from shmplasma.endpoint import Endpoint
from shmplasma.errors import EndpointError, ProtocolError
from shmplasma.layout import BOARD_WORDS, ID_BYTES, REFERENCED
from shmplasma.posted import Detach, Publish
from shmplasma.protocol import (
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    PROTOCOL_VERSION,
    Frame,
    FrameDecoder,
    encode_frame,
    split_frames,
)
from shmplasma.replies import Leased, Reply, Welcome, decode_reply
from shmplasma.requests import AnswerNow, Get, Grow, Hello, Request, Role, decode_request
from shmplasma.segment_name import SegmentName
from tests.command import PROGRAM
from tests.processes import in_forked_child, until

if TYPE_CHECKING:  # the attackers are forked, and must not have Arrow's threads
    from shmplasma import ObjectID, PlasmaClient

__all__ = ["Footprint", "StoreProcess", "Summary", "footprint", "requests_of_all_kinds", "run"]

CAPACITY: Final = 8 << 20
RSS_MARGIN_BYTES: Final = 8 << 20
"""What the interpreter's heap may grow by after the warm-up; a leak of 10 bytes a frame takes more in a million."""
_FRAMES_A_PROCESS: Final = 2000
_CONNECTIONS_A_PROCESS: Final = 30
"""Each leaves a board behind until the process has gone, and the store reads all of them again and again."""
_IDS: Final = [f"object {number:>13}".encode() for number in range(24)]
"""So few that the attackers meet each other's objects."""
_EXTREMES: Final = sorted(
    {0, *(value for bits in (7, 8, 16, 31, 32, 62, 63, 64) for value in (2**bits - 1, 2**bits))}
    | {2**63 - 64, 2**64 - 64, 2**64 - 4096}
)
_N_ATTACKERS: Final = 2
_SYNC_ID: Final = 0xF1F1F1F1
"""Request id of what asks whether the store has come so far."""
_HEADER_BYTES: Final = 12
_MAX_PASSED: Final = 253
"""Descriptors that Linux lets one message carry."""
_HELD: Final = 8
_ROUND_BYTES: Final = 20_000


# -- the store as a process --------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """What a process has of the machine.

    Attributes
    ----------
    rss_bytes : int
        Resident memory, shared pages included.
    anonymous_bytes : int
        The part of it that is the process's own.
    fds : int
        Open descriptors.
    """

    rss_bytes: int
    anonymous_bytes: int
    fds: int

    def __str__(self) -> str:
        return (
            f"RSS {self.rss_bytes / 2**20:.1f} MiB (own {self.anonymous_bytes / 2**20:.1f}), "
            f"{self.fds} descriptors"
        )


def footprint(pid: int) -> Footprint:
    """Return what a process has at this moment; Linux only."""
    status = Path(f"/proc/{pid}/status").read_text()
    rss, own = (
        int(status.partition(f"{name}:")[2].split(maxsplit=1)[0]) << 10
        for name in ("VmRSS", "RssAnon")
    )
    return Footprint(rss, own, len(os.listdir(f"/proc/{pid}/fd")))


class StoreProcess:
    """A store whose log can be read; it ends with the block, and with this process.

    Parameters
    ----------
    capacity : int
        Its capacity in bytes.

    Attributes
    ----------
    path : str
        Its socket.
    pid : int
        Its process.

    Raises
    ------
    AssertionError
        It does not start, or, at the end, it has died or does not end well.
    """

    def __init__(self, capacity: int) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="t-")
        self.path = f"{self._directory.name}/s"
        self._log = Path(self._directory.name, "log")
        self._alive, theirs = socket.socketpair()
        command = [*PROGRAM, "-m", str(capacity), "-s", self.path]
        with theirs, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--owner", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                pass_fds=[theirs.fileno()],
            )
        self.pid = self._process.pid
        if self._alive.recv(1) != b"R":
            text = self._log.read_text()
            self._end()
            raise AssertionError(f"the store did not start: {text}")

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def footprint(self) -> Footprint:
        """Return what it has at this moment."""
        return footprint(self.pid)

    def drops(self) -> Counter[str]:
        """Return why the store has dropped clients, and how often; numbers are left out of the reasons."""
        reasons: Counter[str] = Counter()
        with self._log.open(errors="replace") as log:
            for line in log:
                reason = line.partition("dropped client ")[2].partition("): ")[2].strip()
                if reason:
                    reasons[re.sub(r"[-+]?\d+|0x[0-9a-f]+", "N", reason)] += 1
        return reasons

    def _end(self) -> None:
        self._process.terminate()
        code = self._process.wait()
        self._alive.close()
        if code:
            with suppress(EndpointError), Endpoint.claim(self.path) as endpoint:
                segment = SegmentName.decode(endpoint.read_note())
                if segment is not None:
                    segment.remove()
                endpoint.write_note(b"")
            text = self._log.read_text(errors="replace")[-4000:]
            self._directory.cleanup()
            raise AssertionError(f"the store ended with {code}: {text}")
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()


# -- what is sent ------------------------------------------------------------------------------


_FIELDS: Final = {
    kind: {
        name: str(field.annotation) for name, field in inspect.signature(kind).parameters.items()
    }
    for kind in get_args(Request)
}
"""The names of each message's fields, and the names of their types."""


def requests_of_all_kinds(
    rng: random.Random, board: int = 0, lease: Leased | None = None
) -> list[Request]:
    """Return a valid request of each kind that there is, `Hello` included.

    Parameters
    ----------
    rng : random.Random
        Chooses ids, sizes and slots.
    board : int
        The board of the client that is to send them.
    lease : Leased, optional
        What it may publish in.
    """
    return [_valid(kind, rng, board, lease) for kind in get_args(Request)]


def _valid(kind: type[Any], rng: random.Random, board: int, lease: Leased | None) -> Request:
    """Return a request, built by the names of its fields; a field that is new gets what fits its type."""
    slots = rng.sample(range(board * BOARD_WORDS + 1, (board + 1) * BOARD_WORDS), 4)
    count = rng.choice((0, 1, 1, 2, 4))
    start, room = (lease.offset, lease.size_bytes) if lease and lease.size_bytes else (4096, 64)
    size = rng.choice((0, 1, 64, 1000, 5000, 70_000))
    wait = rng.random() < 0.5
    by_name: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "role": Role.CLIENT,
        "reclaim": rng.choice((0, 0, 0, 1, 5000)),
        "name": rng.choice(("", "attacker", "ä" * 100, "x" * 255)),
        "object_id": rng.choice(_IDS),
        "object_ids": [rng.choice(_IDS) for _ in range(count)],
        "slots": slots[:count],
        "slot": slots[0],
        "wait": wait,
        "hinted": wait and count == 1,
        "keep": rng.random() < 0.1,
        "timeout_ns": rng.choice((0, 0, 1, 10**6, -1)),
        "data_size": size,
        "metadata_size": rng.choice((0, 0, 0, 7)),
        "codec": rng.randrange(4) | rng.choice((0, REFERENCED)),
        "holds": [(rng.choice(_IDS), rng.randrange(4)) for _ in range(count)],
        "ticket": rng.randrange(8),
        "number": rng.randrange(4),
        "receivers": rng.randrange(3),
        "offset": start + rng.randrange(0, room, 64),
        "request_id": rng.randrange(1, 40),
        "size_bytes": rng.choice((0, 1, 10_000)),
        "limit_bytes": rng.choice((0, 0, 1 << 20)),
        "needed_bytes": rng.choice((0, 100, 4000)),
        "start": rng.choice((0, 1, 4096)),
        "created_ns": rng.choice((0, 1, 10**18)),
        "stamp": rng.choice((0, 1, rng.randrange(1 << 32))),
    }
    by_type: dict[str, Any] = {"int": 1, "bool": True, "str": "x", "bytes": bytes(ID_BYTES)}
    fields = _FIELDS[kind]
    chosen = {name: by_name[name] if name in by_name else by_type[fields[name]] for name in fields}
    request: Request = kind(**chosen)
    return request


def _flip_bits(rng: random.Random, frame: bytes, _: bytes) -> bytes:
    data = bytearray(frame)
    for _n in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _flip_bits_of_body(rng: random.Random, frame: bytes, other: bytes) -> bytes:
    if len(frame) == _HEADER_BYTES:
        return _wrong_id(rng, frame, other)
    return frame[:_HEADER_BYTES] + _flip_bits(rng, frame[_HEADER_BYTES:], other)


def _extreme_integer(rng: random.Random, frame: bytes, other: bytes) -> bytes:
    """Write an extreme integer where the body may have one: fields begin at all sorts of offsets."""
    width = rng.choice((2, 4, 8, 8))
    places = len(frame) - _HEADER_BYTES - width + 1
    if places <= 0:
        return _resize_body(rng, frame, other)
    at = _HEADER_BYTES + rng.randrange(places)
    if rng.random() < 0.7:
        at -= at % 4
    value = rng.choice(_EXTREMES) + rng.choice((0, 0, 1, -1))
    return frame[:at] + (value % (1 << 8 * width)).to_bytes(width, "little") + frame[at + width :]


def _resize_body(rng: random.Random, frame: bytes, other: bytes) -> bytes:
    """Cut or lengthen the body, and state its new length."""
    body = frame[_HEADER_BYTES:]
    cut = body[: rng.randrange(len(body) + 1)]
    body = cut if rng.random() < 0.5 else body + other[: rng.randrange(1, 64)]
    return len(body).to_bytes(4, "little") + frame[4:_HEADER_BYTES] + body


def _wrong_length(rng: random.Random, frame: bytes, _: bytes) -> bytes:
    length = rng.choice((*_EXTREMES, len(frame) - rng.randrange(64), len(frame) + 1))
    return (length % 2**32).to_bytes(4, "little") + frame[4:]


def _wrong_id(rng: random.Random, frame: bytes, _: bytes) -> bytes:
    request_id = rng.choice((0, 1, 2**32 - 1, rng.randrange(40)))
    return frame[:4] + request_id.to_bytes(4, "little") + frame[8:]


def _wrong_kind(rng: random.Random, frame: bytes, _: bytes) -> bytes:
    kind = rng.choice((rng.randrange(24), rng.randrange(256), rng.choice(_EXTREMES) % 2**16))
    return frame[:8] + kind.to_bytes(2, "little") + frame[10:]


def _truncate(rng: random.Random, frame: bytes, _: bytes) -> bytes:
    return frame[: rng.randrange(len(frame))]


def _double(rng: random.Random, frame: bytes, _: bytes) -> bytes:
    return frame * (rng.choice((2, 2, 3, 20)) if len(frame) < 400 else 1)


def _splice(rng: random.Random, frame: bytes, other: bytes) -> bytes:
    return frame[: rng.randrange(len(frame))] + other[rng.randrange(len(other)) :]


def _insert(rng: random.Random, frame: bytes, _: bytes) -> bytes:
    at = rng.randrange(len(frame))
    return frame[:at] + rng.randbytes(rng.randrange(1, 9)) + frame[at:]


Mutation = Callable[[random.Random, bytes, bytes], bytes]
_MILD: Final[Sequence[Mutation]] = (_flip_bits_of_body, _extreme_integer, _wrong_id, _double)
"""They leave a frame a frame, and often a request a request."""
_ROUGH: Final[Sequence[Mutation]] = (
    *(_resize_body, _wrong_kind, _wrong_length, _flip_bits),
    *(_truncate, _splice, _insert),
)


_SELDOM: Final = (Hello, Grow, Detach, Publish)
"""They mostly end the conversation, or use up what all have to share."""
_OFTEN: Final = tuple(kind for kind in get_args(Request) if kind not in _SELDOM)


# -- the attackers -----------------------------------------------------------------------------


class _Connection:
    """A connection whose owner knows what he may expect."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(60)  # a store that does not answer for so long hangs
        self.board = 0
        self.entered = False
        self.lease: Leased | None = None
        self._decoder = FrameDecoder(MAX_REPLY_BYTES)
        try:
            self.sock.connect(path)
        except BaseException:
            self.sock.close()
            raise

    def enter(self, role: Role) -> None:
        """Introduce this connection; leave the descriptor that comes with the answer where it is."""
        hello = Hello(PROTOCOL_VERSION, role, "attacker")
        self.sock.sendall(encode_frame(hello.KIND, 1, hello.encode()))
        frame = b""
        while len(frame) < _HEADER_BYTES or len(frame) < _HEADER_BYTES + frame[0]:
            missing = _HEADER_BYTES - len(frame) if len(frame) < _HEADER_BYTES else frame[0]
            frame += self.sock.recv(missing)
        (decoded,) = FrameDecoder(MAX_REPLY_BYTES).feed(frame)
        welcome = decode_reply(decoded)
        if isinstance(welcome, Welcome):
            self.board = welcome.board
            self.entered = True

    def synchronize(self) -> bool:
        """Read up to the answer to what was sent last; False when the connection was ended instead."""
        while True:
            try:
                data = self.sock.recv(1 << 18)
            except ConnectionResetError:
                return False
            if not data:
                return False
            try:
                frames = self._decoder.feed(data)
            except ProtocolError:
                if self.entered:
                    raise
                continue  # it has made itself a subscriber, and will be dropped for its questions
            for frame in frames:
                if frame.request_id == _SYNC_ID:
                    return True
                self._learn(decode_reply(frame))

    def _learn(self, reply: Reply) -> None:
        if isinstance(reply, Leased):
            self.lease = reply

    def wait_for_end(self) -> None:
        """Say that nothing more comes, and read until the store has closed the connection."""
        with suppress(ConnectionError, OSError):
            self.sock.shutdown(socket.SHUT_WR)
            while self.sock.recv(1 << 18):
                pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


class _Attack:
    """What one attacking process does.

    Parameters
    ----------
    path : str
        The store's socket.
    rng : random.Random
        Decides everything.
    """

    def __init__(self, path: str, rng: random.Random) -> None:
        self._path = path
        self._rng = rng
        self.counts: Counter[str] = Counter()
        self._spare = [os.open(os.devnull, os.O_RDONLY)]

    def run(self, count: int) -> None:
        """Send at least so many mutated frames, or as many as fit a process."""
        connections = 0
        while self.counts["frames"] < count and connections < _CONNECTIONS_A_PROCESS:
            connections += 1
            self.counts["connections"] += 1
            with _Connection(self._path) as connection:
                chance = self._rng.random()
                # A connection that the store ends while we write to it is what we are here for.
                with suppress(ConnectionError):
                    if chance < 0.04:
                        self._never_read(connection)
                    elif chance < 0.08:
                        self._subscribe(connection)
                    else:
                        if chance < 0.95:
                            connection.enter(Role.CLIENT)
                        while self._send_group(connection):
                            pass
        for fd in self._spare:
            os.close(fd)

    def _frame(self, connection: _Connection) -> bytes:
        rng = self._rng
        kind = rng.choice(_SELDOM if rng.random() < 0.04 else _OFTEN)
        request = _valid(kind, rng, connection.board, connection.lease)
        request_id = 0 if kind is AnswerNow else rng.randrange(kind is Get, 40)
        return encode_frame(request.KIND, request_id, request.encode())

    def _mutated(self, connection: _Connection, mutations: Sequence[Mutation]) -> bytes:
        rng = self._rng
        data, other = self._frame(connection), self._frame(connection)
        self.counts[f"kind {int.from_bytes(data[8:10], 'little')}"] += 1
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if len(data) >= _HEADER_BYTES:
                data = rng.choice(mutations)(rng, data, other)
        return data or b"\0"

    def _send_group(self, connection: _Connection) -> bool:
        """Send some frames in one piece and wait for their end; tell whether the connection goes on."""
        sync = Get(False, [], [])
        end = encode_frame(sync.KIND, _SYNC_ID, sync.encode())
        pieces = self._pieces(connection)
        data = b"".join(piece for piece, _ in pieces) + end
        if _replaces_the_store(data):
            return True  # this user may do that, and it is not what is tested here
        self._deliver(connection, data)
        expected = _expected(data)
        if expected is None:  # part of a frame is missing, or the client has left
            self.counts["frames"] += sum(mutated for _, mutated in pieces)
            if self._rng.random() < 0.5:
                connection.wait_for_end()
            return False
        if connection.synchronize():
            assert expected, "the store goes on with a connection that sent what is no request"
            self.counts["frames"] += sum(mutated for _, mutated in pieces)
            return True
        # It was dropped, by the first mutated frame at the latest that is counted here.
        self.counts["frames"] += 1
        self.counts["drops"] += 1
        return False

    def _pieces(self, connection: _Connection) -> list[tuple[bytes, bool]]:
        """Return some frames, and of each whether it is mutated."""
        rng = self._rng
        pieces: list[tuple[bytes, bool]] = []
        for _ in range(rng.choice((1, 1, 2, 4, 8))):
            if rng.random() < 0.3:
                pieces.append((self._frame(connection), False))
            pieces.append((self._mutated(connection, _MILD), True))
        if rng.random() < 0.06:  # few connections survive this one
            pieces.append((self._mutated(connection, _ROUGH), True))
        return pieces

    def _deliver(self, connection: _Connection, data: bytes) -> None:
        """Send bytes, sometimes with descriptors, of which some are closed before they can arrive."""
        rng = self._rng
        if rng.random() > 0.05:
            if rng.random() < 0.1:  # in two pieces
                cut = rng.randrange(len(data))
                connection.sock.sendall(data[:cut])
                data = data[cut:]
            connection.sock.sendall(data)
            return
        self.counts["messages with descriptors"] += 1
        reader, writer = os.pipe()
        fds = [reader, connection.sock.fileno(), *self._spare * rng.choice((0, 1, 30, 251))]
        fds = fds[: rng.choice((1, 2, _MAX_PASSED))]
        sent = socket.send_fds(connection.sock, [data], fds)
        os.close(reader)
        os.close(writer)
        connection.sock.sendall(data[sent:])

    def _never_read(self, connection: _Connection) -> None:
        """Ask for a lot, descriptors among it, and leave without having read any of it."""
        rng = self._rng
        connection.enter(Role.CLIENT)
        if rng.random() < 0.3:
            connection.sock.shutdown(socket.SHUT_RD)
        frames = [self._frame(connection) for _ in range(60)]
        frames.insert(30, self._mutated(connection, _MILD))
        self.counts["frames"] += 1
        self.counts["connections that never read"] += 1
        connection.sock.sendall(b"".join(frames))
        if rng.random() < 0.5:
            connection.sock.shutdown(socket.SHUT_WR)
            poll = select.poll()
            poll.register(connection.sock, 0)  # only the end is of interest
            poll.poll(20)

    def _subscribe(self, connection: _Connection) -> None:
        """Say as a subscriber what only a client may say."""
        connection.enter(Role.SUBSCRIBER)
        if self._rng.random() < 0.5:
            self.counts["frames"] += 1
            connection.sock.sendall(self._mutated(connection, _ROUGH))
        connection.wait_for_end()


def _expected(data: bytes) -> bool | None:
    """Tell what has to come of these bytes: an answer to the last request, or the end; None if nothing has."""
    try:
        frames, consumed, _ = split_frames(data, MAX_REQUEST_BYTES)
    except ProtocolError:
        return False
    last: Frame | None = None
    for frame in frames:
        try:
            request = decode_request(frame)
        except ProtocolError:
            return False
        if isinstance(request, Detach):
            return None
        last = frame
    complete = consumed == len(data) and last is not None and last.request_id == _SYNC_ID
    return True if complete else None


def _replaces_the_store(data: bytes) -> bool:
    """Tell whether these bytes begin with what makes their sender the store's successor."""
    with suppress(ProtocolError):
        for frame in split_frames(data, MAX_REQUEST_BYTES)[0]:
            request = decode_request(frame)
            if isinstance(request, Hello):
                return request.role not in (Role.CLIENT, Role.SUBSCRIBER)
    return False


def attack(path: str, count: int, seed: int, report: Connection) -> None:
    """Start one attacking process after the other, until so many mutated frames have been sent.

    Parameters
    ----------
    path : str
        The store's socket.
    count : int
        How many frames.
    seed : int
        What they are.
    report : Connection
        Gets what each process has counted, when it has ended.
    """
    rng = random.Random(seed)
    mine, theirs = multiprocessing.Pipe(duplex=False)
    with report, mine, theirs:
        sent = 0
        while sent < count:
            number = rng.getrandbits(64)

            def be_attacker(number: int = number, left: int = count - sent) -> None:
                each = _Attack(path, random.Random(number))
                each.run(min(_FRAMES_A_PROCESS, left))
                theirs.send(each.counts)

            code = in_forked_child(be_attacker)
            assert not code, f"an attacker failed with {code}"
            counts: Counter[str] = mine.recv()
            sent += counts["frames"]
            report.send(counts)


# -- the honest client -------------------------------------------------------------------------


class _Honest:
    """A client that keeps putting, reading and holding, and looks at every byte."""

    def __init__(self, client: PlasmaClient, rng: random.Random) -> None:
        self._client = client
        self._rng = rng
        self._held: deque[tuple[bytes, Any]] = deque()
        self.counts: Counter[str] = Counter({"wrong bytes": 0})
        self.slowest_seconds = 0.0

    def round(self) -> None:
        """Put an object by each of the ways, read both, hold one of them."""
        from shmplasma import ObjectID, PlasmaStoreFull

        start = time.monotonic()
        data = self._rng.randbytes(self._rng.randrange(1, _ROUND_BYTES))
        self.counts["rounds"] += 1
        try:
            fresh = self._client.put_raw_buffer(data)
            self._look(fresh, data)
            chosen = ObjectID(self._rng.randbytes(ID_BYTES))
            self._client.create_and_seal(chosen, data)
            self._look(chosen, data)
            if self._rng.random() < 0.5:
                self._client.delete([fresh, chosen])
        except PlasmaStoreFull:
            # Other clients may fill a store; they have to use or hold what they take.
            self.counts["refusals"] += 1
        while len(self._held) > _HELD:
            self._let_go()
        self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - start)

    def end(self) -> None:
        """Look at what is still held, and let go of it."""
        while self._held:
            self._let_go()

    def _look(self, object_id: ObjectID, data: bytes) -> None:
        buffer = self._client.get_buffers(object_id, timeout_ms=0)
        if buffer is None:
            self.counts["evicted before they were read"] += 1
            return
        self.counts["reads"] += 1
        self.counts["wrong bytes"] += buffer.to_pybytes() != data
        if self._rng.random() < 0.2:
            self._held.append((data, buffer))

    def _let_go(self) -> None:
        data, buffer = self._held.popleft()
        self.counts["looked at again"] += 1
        self.counts["wrong bytes"] += buffer.to_pybytes() != data


# -- the run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What a run has seen.

    Attributes
    ----------
    attackers : Counter of str
        What they have sent; ``frames`` counts only mutated ones that the store has looked at.
    honest : Counter of str
        What the honest client did and met.
    drops : Counter of str
        Why the store dropped clients.
    slowest_seconds : float
        The longest round of the honest client: some ten requests.
    before, warm, after : Footprint
        Of the store: before all attacks, after a tenth of them, and after all.
    """

    attackers: Counter[str]
    honest: Counter[str]
    drops: Counter[str]
    slowest_seconds: float
    before: Footprint
    warm: Footprint
    after: Footprint

    @property
    def is_flat(self) -> bool:
        """Whether the store has as many descriptors as at first, and not much more memory than after a tenth."""
        grown = self.after.rss_bytes - self.warm.rss_bytes
        return self.after.fds == self.before.fds and grown <= RSS_MARGIN_BYTES

    def __str__(self) -> str:
        counts = self.attackers
        kinds = sum(name.startswith("kind ") for name in counts)
        lines = [
            f"mutated frames: {counts['frames']:,} of {kinds} kinds",
            *(f"{name}: {n:,}" for name, n in sorted(counts.items()) if " " not in name),
            *(f"{name}: {counts[name]:,}" for name in sorted(counts) if "connections " in name),
            f"messages with descriptors: {counts['messages with descriptors']:,}",
            f"clients dropped, by the log: {sum(self.drops.values()):,}, for reasons such as",
            *(f"  {n:,} x {reason}" for reason, n in self.drops.most_common(8)),
            *(f"honest client, {name}: {n:,}" for name, n in sorted(self.honest.items())),
            f"honest client, slowest round: {self.slowest_seconds * 1000:.0f} ms",
            f"the store before: {self.before}",
            f"after a tenth:    {self.warm}",
            f"after all:        {self.after}",
        ]
        return "\n".join(lines)


def run(count: int, seed: int = 1, say: Callable[[str], object] = len) -> Summary:
    """Attack a store, and prove that it is in order afterwards.

    Parameters
    ----------
    count : int
        How many mutated frames.
    seed : int
        Which.
    say : callable
        Is told of the progress.

    Raises
    ------
    AssertionError
        The store has died, or keeps pins, room or descriptors of those that have gone.  Wrong bytes and memory are
        only counted.
    """
    from shmplasma import connect

    attackers: Counter[str] = Counter()
    with StoreProcess(CAPACITY) as store:
        with connect(store.path) as client:
            honest = _Honest(client, random.Random(seed))
            for _ in range(50):
                honest.round()
            before = store.footprint()
            feet = []
            for number, part in enumerate((count // 10, count - count // 10)):
                _attack_beside(store, honest, part, seed + number, attackers, say)
                until(
                    lambda: store.footprint().fds <= before.fds, "the store lets go of the dead", 10
                )
                feet.append(store.footprint())
            honest.end()
        _prove_in_order(store.path)
        assert store.is_alive, "the store has died"
        drops = store.drops()
    return Summary(attackers, honest.counts, drops, honest.slowest_seconds, before, *feet)


def _attack_beside(
    store: StoreProcess,
    honest: _Honest,
    count: int,
    seed: int,
    attackers: Counter[str],
    say: Callable[[str], object],
) -> None:
    """Let attackers send so many frames while the honest client works."""
    context = multiprocessing.get_context("spawn")
    processes = []
    reports: list[Connection] = []
    said = time.monotonic()
    try:
        for number in range(_N_ATTACKERS):
            ours, theirs = context.Pipe(duplex=False)
            reports.append(ours)
            arguments = (store.path, -(-count // _N_ATTACKERS), seed + 1000 * number, theirs)
            processes.append(context.Process(target=attack, args=arguments))
            processes[-1].start()
            theirs.close()
        while reports:
            honest.round()
            for report in wait(reports, 0.01):
                assert isinstance(report, Connection)
                try:
                    attackers.update(report.recv())
                except EOFError:
                    report.close()
                    reports.remove(report)
            if time.monotonic() > said + 5:
                said = time.monotonic()
                frames, rounds = attackers["frames"], honest.counts["rounds"]
                say(f"{frames:,} mutated frames, {rounds:,} honest rounds; {store.footprint()}")
    finally:
        for report in reports:  # an attacker that cannot report ends
            report.close()
        for process in processes:
            process.join()
    assert all(process.exitcode == 0 for process in processes), "the attackers have failed"


def _prove_in_order(path: str) -> None:
    """Prove that nobody holds anything any more, and that all room comes back."""
    from shmplasma import ObjectID, connect
    from tests.clients import figures_of

    with connect(path) as client:

        def is_left_alone() -> bool:
            figures = figures_of(client)
            names: Iterable[str] = ("pinned objects", "leased bytes", "unsealed bytes")
            return not any(figures[name] for name in names)

        until(is_left_alone, "nobody else holds anything", 10)
        client.delete(client.list())
        assert not client.list(), "an object cannot be deleted"
        figures = figures_of(client)
        assert figures["free bytes"] == figures["capacity bytes"], f"room is lost: {figures}"
        whole = ObjectID(bytes(ID_BYTES))
        assert len(client.create(whole, CAPACITY)) == CAPACITY
        client.abort(whole)


def main() -> int:
    """Run as the command line says; 1 if the honest client read a wrong byte or the store has grown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="frames (default: 1000000)")
    parser.add_argument("--seed", type=int, default=1, help="which frames (default: 1)")
    arguments = parser.parse_args()
    start = time.monotonic()

    def say(text: str) -> None:
        sys.stdout.write(f"{time.monotonic() - start:6.0f} s: {text}\n")
        sys.stdout.flush()

    summary = run(arguments.count, arguments.seed, say)
    say(f"done\n{summary}\nflat: {'yes' if summary.is_flat else 'NO'}")
    return 1 if summary.honest["wrong bytes"] or not summary.is_flat else 0


if __name__ == "__main__":
    sys.exit(main())
