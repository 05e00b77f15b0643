"""Other users at the socket of a store."""

from __future__ import annotations

import grp
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from shmplasma import ObjectID, connect
from tests.command import running
from tests.processes import Child

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")

STRANGER = """
    import os, sys
    from shmplasma import NotConnectedError, ObjectID, connect  # while it can still read them
    os.chdir(os.path.dirname(sys.argv[1]))
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(12345)
    try:
        with connect("s", num_retries=0) as client:
            print(client.put("from another user").binary().hex(), flush=True)
            mine = ObjectID(bytes.fromhex(sys.stdin.readline()))
            print(client.get(mine), flush=True)
    except NotConnectedError as error:
        print("refused:", error, flush=True)
"""


USURPER = """
    import os, sys
    from shmplasma.exchange import Exchange  # while it can still read them
    from shmplasma.protocol import PROTOCOL_VERSION
    from shmplasma.requests import Hello, Role
    os.chdir(os.path.dirname(sys.argv[1]))
    os.setgroups([])
    os.setuid(12345)
    exchange = Exchange.connect("s", 0, 60)
    hello = Hello(PROTOCOL_VERSION, Role.SUCCESSOR, "usurper")
    try:
        print(exchange.call(hello.KIND, hello.encode()), flush=True)
    except ConnectionError:
        print("refused", flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """Give a path for a socket, in a directory that all may enter who are beside it."""
    directory = tmp_path / "d"
    directory.mkdir()
    directory.chmod(0o755)
    yield str(directory / "s")
    assert not os.listdir(directory)


def group() -> grp.struct_group:
    """Return a group that is not root's."""
    return next(each for each in grp.getgrall() if each.gr_gid)


def test_another_user_cannot_reach_the_socket(path: str) -> None:
    """Without a word from the operator, the socket is closed to others, and they hear what would help."""
    with running("-m", "1MB", "-s", path), Child(STRANGER, path, "12345") as stranger:
        heard = stranger.hear()
        assert heard.startswith("refused:")
        assert "another user's" in heard
        assert "--group" in heard
        assert stranger.end() == 0


def test_another_user_who_reaches_the_socket_is_refused(path: str) -> None:
    """Where somebody has opened the socket to all, the store itself refuses others, says so, and goes on."""
    with running("-m", "1MB", "-s", path) as (process, _), connect(path) as client:
        os.chmod(path, 0o666)  # noqa: S103 - that is the case
        for _ in range(3):
            with Child(STRANGER, path, "12345") as stranger:
                heard = stranger.hear()
                assert heard.startswith("refused: this store serves the user with uid 0 alone")
                assert "--group" in heard
                assert stranger.end() == 0
        assert client.get(client.put(1)) == 1
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert process.stderr.read().count("of uid 12345: not this user") == 3


@pytest.mark.parametrize("by", ["mode", "group"])
def test_another_user_who_is_admitted_shares_all(path: str, by: str) -> None:
    """With --mode or --group, users give objects to each other; who is not in the group stays outside."""
    gid = 12345 if by == "mode" else group().gr_gid
    options = ["--mode", "0666"] if by == "mode" else ["--mode", "0660", "--group", group().gr_name]
    with ExitStack() as stack:
        stack.enter_context(running("-m", "1MB", "-s", path, *options))
        client = stack.enter_context(connect(path))
        stranger = stack.enter_context(Child(STRANGER, path, str(gid)))
        theirs = ObjectID(bytes.fromhex(stranger.hear()))
        assert client.get(theirs) == "from another user"
        stranger.say(client.put("from root").binary().hex())
        assert stranger.hear() == "from root"
        assert stranger.end() == 0
        if by == "group":
            outsider = stack.enter_context(Child(STRANGER, path, "12345"))
            assert "another user's" in outsider.hear()
            assert outsider.end() == 0


def test_another_user_who_is_admitted_does_not_replace_the_store(path: str) -> None:
    """He is dropped for it, and the store serves on."""
    with running("-m", "1MB", "-s", path, "--mode", "0666"), connect(path) as client:
        with Child(USURPER, path) as usurper:
            assert usurper.hear() == "refused"
            assert usurper.end() == 0
        assert client.get(client.put(1)) == 1
