"""A connection whose owner may say whatever he likes."""

from __future__ import annotations

import os
import socket
from typing import Self, TypeVar

from shmplasma.protocol import MAX_REPLY_BYTES, PROTOCOL_VERSION, Frame, FrameDecoder, encode_frame
from shmplasma.replies import Reply, Welcome, decode_reply
from shmplasma.requests import Hello, Request, Role

__all__ = ["Attacker"]

_T = TypeVar("_T", bound=Reply)


class Attacker:
    """A raw connection to a store; closed at the end of the block.

    Parameters
    ----------
    path : str
        The store's socket.

    Attributes
    ----------
    sock : socket.socket
        The connection; it waits for 60 s at most.
    descriptors : list of int
        Those that came with replies.
    """

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(60)
        self.descriptors: list[int] = []
        self._decoder = FrameDecoder(MAX_REPLY_BYTES)
        self._frames: list[Frame] = []
        self._last_id = 0
        try:
            self.sock.connect(path)
        except BaseException:
            self.sock.close()
            raise

    def send(self, data: bytes) -> None:
        """Send bytes, whatever they are."""
        self.sock.sendall(data)

    def frame(self, request: Request) -> bytes:
        """Return the frame of a request, under a new request id."""
        self._last_id += 1
        return encode_frame(request.KIND, self._last_id, request.encode())

    def post(self, request: Request) -> None:
        """Send a request; its reply is left to `reply`."""
        self.send(self.frame(request))

    def ask(self, request: Request, expected: type[_T]) -> _T:
        """Send a request and return its reply."""
        self.post(request)
        return self.reply(expected)

    def reply(self, expected: type[_T]) -> _T:
        """Return the next reply."""
        while not self._frames:
            data, descriptors, _, _ = socket.recv_fds(self.sock, 1 << 16, 4)
            self.descriptors += descriptors
            assert data, "the store closed the connection"
            self._frames += self._decoder.feed(data)
        reply = decode_reply(self._frames.pop(0))
        assert isinstance(reply, expected), reply
        return reply

    def hello(
        self, role: Role = Role.CLIENT, version: int = PROTOCOL_VERSION, name: str = "attacker"
    ) -> Hello:
        """Return an introduction of this process."""
        return Hello(version, role, name)

    def enter(self) -> Welcome:
        """Introduce this connection as a client."""
        return self.ask(self.hello(), Welcome)

    def is_dropped(self) -> bool:
        """Read until the store closes the connection; fail if it does not."""
        try:
            while self.sock.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        return True

    def close(self) -> None:
        """Close the connection and what came over it."""
        self.sock.close()
        while self.descriptors:
            os.close(self.descriptors.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
