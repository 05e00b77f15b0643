from __future__ import annotations

import grp
import os
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING

import pytest

from shmplasma import __version__, connect, succession, system
from shmplasma.errors import EndpointError
from shmplasma.layout import LAYOUT_VERSION, HeaderWord
from shmplasma.options import parse
from shmplasma.protocol import PROTOCOL_VERSION
from shmplasma.segment_name import SegmentName
from tests.command import (
    PROGRAM,
    killed,
    run,
    running,
    segment_in,
    silent_bucket,
    until_ready,
)
from tests.processes import unmeasured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this")


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Give a path for a socket, in a directory of its own."""
    directory = tmp_path / "d"
    directory.mkdir()
    return str(directory / "s")


def exists(name: str) -> bool:
    """Return whether there is a POSIX segment of this name, as ``/dev/shm`` shows it."""
    return Path("/dev/shm", name[1:]).exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-m", "4XB"], "4GB, 512MiB"),
        (["-m", "0"], "less than a byte"),
        (["-m", "-5"], "not a size"),
        (["-d", "/nowhere"], "no directory /nowhere; make it"),
        (["-h"], "-d /mnt/hugepages -h"),
        (["-h", "-d", "/"], "-d /mnt/hugepages -h"),
        (["--spill-above", "2"], "a number from 0 to 1"),
        (
            ["--spill-above", "abc"],
            "'abc' is no share of the capacity; write a number from 0 to 1, as 0.8",
        ),
        (["--spill-above", "0.5"], "--spill-above is about an external store; name one with -e"),
        (["--max-spill-bytes", "1GB"], "--max-spill-bytes is about an external store"),
        (["-e", "", "--max-spill-bytes", "1GB"], "--max-spill-bytes is about an external store"),
        (["--mode", "0777"], "write 0600"),
        (["--mode", "0200"], "write 0600"),
        (["--mode", "rw"], "write 0600"),
        (["--group", "no such group"], "getent group"),
        (["extra"], "unrecognized arguments"),
        (["--mod", "0600"], "unrecognized arguments"),
    ],
)
def test_errors_of_usage(path: str, arguments: list[str], says: str) -> None:
    """An error of usage exits with 2, says what to write instead, and does nothing."""
    done = run("-s", path, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert not os.listdir(Path(path).parent)


def test_help_and_version() -> None:
    """Both print what they should and exit with 0; ``-h`` is not help, and options of ours are hidden."""
    done = run("--help")
    assert done.returncode == 0
    assert "huge pages" in done.stdout
    assert "--owner" not in done.stdout
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"shmplasma-store {__version__}\n")


def test_the_server_needs_no_arrow() -> None:
    """What the server imports, it can import fast."""
    code = "import sys, shmplasma.cli; print(*{'numpy', 'pandas', 'pyarrow'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("directory", [False, True])
def test_ends_on_a_signal(
    tmp_path: Path, path: str, number: signal.Signals, directory: bool
) -> None:
    """A signal ends a store with 0, clients or not; socket, lock file and segment are gone."""
    where = ["-d", str(tmp_path)] if directory else []
    with running("-m", "10MB", "-s", path, *where) as (process, said):
        assert f"socket {path}, capacity 10000000 bytes" in said
        segment = segment_in(said)
        assert Path(segment).exists() if directory else exists(segment)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            process.send_signal(number)
            assert process.wait() == 0
    assert not Path(segment).exists() if directory else not exists(segment)
    assert not os.listdir(Path(path).parent)


def test_a_store_that_outlives_its_terminal(path: str) -> None:
    """Who starts a store with ``nohup`` has it serve on when the terminal is closed."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which a child inherits
    try:
        with running("-m", "10MB", "-s", path) as (process, _):
            process.send_signal(signal.SIGHUP)
            with connect(path) as client:
                assert client.get(client.put("there")) == "there"
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert process.returncode == 0


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_while_the_external_store_does_not_answer(path: str, number: signal.Signals) -> None:
    """A store that is told to end while its external store is being opened ends with 0, and leaves nothing."""
    with (
        silent_bucket() as (silent, uri),
        subprocess.Popen(
            [*PROGRAM, "-m", "10MB", "-s", path, "-e", uri], stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        assert process.stderr is not None
        assert "opening the external store s3://bucket/prefix" in process.stderr.readline()
        with silent.accept()[0]:
            process.send_signal(number)
            assert process.wait() == 0
        assert process.stderr.read() == ""
    assert not os.listdir(Path(path).parent)


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_successor_ends_while_its_external_store_does_not_answer(
    path: str, number: signal.Signals
) -> None:
    """It has asked nothing of the store that it was to replace, which serves on."""
    with (
        running("-m", "10MB", "-s", path),
        connect(path) as client,
        silent_bucket() as (silent, uri),
    ):
        with subprocess.Popen(
            [*PROGRAM, "-s", path, "--replace", "-e", uri], stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            with silent.accept()[0]:
                process.send_signal(number)
                assert process.wait() == 0
            assert process.stderr.read() == ""
        assert client.get(client.put("there")) == "there"


HASTY = """
    import sys
    from shmplasma import cli, connections

    connections._HELLO_SECONDS = 2
    sys.exit(cli.main())
"""
"""A store that gives up on a connection sooner than others."""
THOROUGH = """
    import socket, sys
    from shmplasma import cli, external

    def look(uri, token):
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(sys.argv[2])
            while other.recv(1000):
                pass
        return False

    external.has_containers = look
    sys.exit(cli.main())
"""
"""A store that looks at its external store for longer than another store waits for a connection to introduce itself."""


@linux
def test_a_look_at_an_external_store_that_takes_its_time(tmp_path: Path, path: str) -> None:
    """The store that is to be replaced gives up on no connection of its successor meanwhile."""
    with ExitStack() as stack:

        def start(code: str, *more: str) -> subprocess.Popen[str]:
            program = [sys.executable, "-c", dedent(code), "-s", path, *more]
            process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.terminate)
            until_ready(process)
            return process

        old = start(HASTY, "-m", "10MB")
        new = start(THOROUGH, "--replace", "-e", f"file://{tmp_path}/external")
        assert old.wait() == 0
    assert new.returncode == 0


@linux
def test_a_directory_whose_name_is_no_text(tmp_path: Path, path: str) -> None:
    """A file system takes any bytes for a name, and so does a store; a successor finds its segment there."""
    directory = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(directory)
    with killed("-m", "10MB", "-s", path, "-d", directory):
        client = connect(path)
        object_id = client.put("there")
    with running("-s", path, "-d", directory) as (process, _), client:
        assert client.get(object_id) == "there"
        with connect(path) as late:
            assert late.get(object_id) == "there"
    assert process.returncode == 0
    assert not os.listdir(directory)


def test_a_second_signal_changes_nothing(path: str) -> None:
    """However many signals arrive, a store ends in order."""
    with running("-m", "10MB", "-s", path) as (process, said):
        for _ in range(50):
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
        assert process.wait() == 0
    assert not os.listdir(Path(path).parent)
    assert not exists(segment_in(said))


def test_a_live_store_is_left_alone(path: str) -> None:
    """A second store on a live one's socket exits with 1, and the first serves on."""
    with running("-m", "10MB", "-s", path) as (process, said):
        done = run("-m", "10MB", "-s", path)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "serves" in done.stderr
        assert process.poll() is None
        assert exists(segment_in(said))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)


@pytest.mark.parametrize("directory", [False, True])
def test_a_dead_store_is_succeeded(tmp_path: Path, path: str, directory: bool) -> None:
    """A killed store's socket is taken over and its segment recovered; --fresh sweeps that up instead."""
    where = ["-d", str(tmp_path)] if directory else []

    def is_there(segment: str) -> bool:
        return Path(segment).exists() if directory else exists(segment)

    def kill(process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait()

    with running("-m", "10MB", "-s", path, *where) as (process, said):
        dead = segment_in(said)
        kill(process)
    assert is_there(dead)
    with running("-s", path, *where) as (process, said):
        assert "recovered" in said
        assert segment_in(said) == dead
        kill(process)
    with running("-m", "10MB", "-s", path, *where, "--fresh") as (process, said):
        assert f"removed {dead}" in said
        assert not is_there(dead)
        assert segment_in(said) != dead
    assert process.returncode == 0
    assert not os.listdir(Path(path).parent)


def test_objects_of_a_dead_store_are_not_given_up_by_mistake(path: str) -> None:
    """Another capacity is refused while a dead store's objects are there, and the refusal says what helps."""
    with running("-m", "10MB", "-s", path) as (process, said):
        dead = segment_in(said)
        process.kill()
        process.wait()
    refused = run("-m", "20MB", "-s", path)
    assert refused.returncode == 1
    assert "-m 10000000" in refused.stderr
    assert "--fresh" in refused.stderr
    assert exists(dead)
    with running("-m", "10MB", "-s", path) as (_, said):
        assert segment_in(said) == dead


def test_what_would_have_a_dead_stores_objects_back(path: str, tmp_path: Path) -> None:
    """The refusal says which of the options are others, also where the dead store had none."""
    there = tmp_path / "there is"
    there.mkdir()
    with killed("-m", "10MB", "-s", path):
        pass
    refused = run("-m", "10MB", "-s", path, "-d", str(there))
    assert refused.returncode == 1
    assert "start with -m 10000000 and without -d to have them back" in refused.stderr
    with running("-s", path):
        pass
    with killed("-m", "10MB", "-s", path, "-d", str(there)):
        pass
    refused = run("-m", "10MB", "-s", path)
    assert refused.returncode == 1
    assert f"start with -m 10000000 -d '{there}' to have them back" in refused.stderr
    with running("-s", path, "-d", str(there)):
        pass


def test_a_store_of_another_size_is_replaced_without_its_objects(path: str) -> None:
    """Only with --fresh; without it, the refusal says so, and the old store serves on."""
    with running("-m", "10MB", "-s", path) as (first, said):
        refused = run("-m", "20MB", "-s", path, "--replace")
        assert refused.returncode == 1
        assert "the store that runs here" in refused.stderr
        assert "-m 10000000 to take them over, or with --fresh to give them up" in refused.stderr
        with connect(path) as client:
            object_id = client.put("lost")
            with running("-m", "20MB", "-s", path, "--replace", "--fresh") as (second, _):
                assert first.wait() == 0
                assert not exists(segment_in(said))
                with connect(path) as late:
                    assert late.store_capacity() == 20_000_000
                    assert not late.contains(object_id)
    assert second.returncode == 0


AS_NOBODY = """
import ctypes, os, sys
from shmplasma.cli import main, parse
parse(sys.argv[1:])  # with all that it imports, as nobody may not be allowed to read that
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
PR_SET_DUMPABLE = 4
ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1)  # /proc/self would be root's
sys.exit(main(sys.argv[1:]))
"""
NOBODY = [sys.executable, "-c", AS_NOBODY]
as_others = pytest.mark.skipif(
    os.geteuid() != 0 or sys.platform != "linux", reason="only root can be somebody else"
)


@pytest.fixture
def open_path() -> Iterator[str]:
    """Give a path for a socket in a directory that all users can use."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        Path(directory).chmod(0o777)
        yield f"{directory}/s"


@as_others
@pytest.mark.parametrize("mode", ["0600", "0666"])
def test_another_users_store_is_not_replaced(open_path: str, mode: str) -> None:
    """Whether it lets others connect or not, the refusal says whose affair that is, and it serves on."""
    with running("-m", "10MB", "-s", open_path, "--mode", mode):
        refused = subprocess.run(
            [*NOBODY, "-s", open_path, "--replace"],
            check=False,
            capture_output=True,
            text=True,
            env=unmeasured(),  # he cannot write down what was covered
        )
        assert refused.returncode == 1
        assert "is another user's, and only that user may replace it" in refused.stderr
        assert refused.stderr.count("\n") == 1
        with connect(open_path) as client:
            assert client.get(client.put("there")) == "there"


@as_others
def test_root_replaces_nobody_elses_store(open_path: str) -> None:
    """It could not have the lock file afterwards, and there would be no store at all."""
    with subprocess.Popen(
        [*NOBODY, "-m", "10MB", "-s", open_path], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            until_ready(process)
            refused = run("-s", open_path, "--replace")
            assert refused.returncode == 1
            assert "only that user may replace it" in refused.stderr
            with connect(open_path) as client:
                assert client.get(client.put("there")) == "there"
        finally:
            process.terminate()
    assert process.returncode == 0


@as_others
def test_a_group_of_others(open_path: str) -> None:
    """Who is no member cannot give anything to a group, and is told so."""
    refused = subprocess.run(
        [*NOBODY, "-m", "10MB", "-s", open_path, "--group", "root", "--mode", "0660"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert "this user is no member of the group root" in refused.stderr
    assert "name another socket" not in refused.stderr
    assert not os.listdir(os.path.dirname(open_path))


def overwrite(segment: str, word: HeaderWord | int, value: int) -> None:
    """Write a word of a segment's header."""
    with Path("/dev/shm", segment[1:]).open("r+b") as file:
        file.seek(8 * word)
        file.write(value.to_bytes(8, sys.byteorder))


def shorten(segment: str, size: int) -> None:
    """Truncate a segment."""
    os.truncate(f"/dev/shm{segment}", size)


@linux
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda segment: overwrite(segment, 0, 0), "no magic number"),
        (lambda segment: overwrite(segment, 0, 1), "no magic number"),
        (
            lambda segment: overwrite(segment, 1, LAYOUT_VERSION + 1),
            f"layout version {LAYOUT_VERSION + 1}, this shmplasma reads version {LAYOUT_VERSION}; run",
        ),
        (lambda segment: overwrite(segment, 2, 0), "identity"),
        (lambda segment: overwrite(segment, 5, 1), "header is damaged"),
        (lambda segment: shorten(segment, 100), "only 100 bytes"),
        (lambda segment: shorten(segment, 1 << 20), "size"),
    ],
)
def test_what_cannot_be_recovered_is_not_given_up_by_mistake(
    path: str, damage: Callable[[str], None], says: str
) -> None:
    """A header that is damaged, or another release's, is refused; only --fresh removes the segment."""
    with killed("-m", "10MB", "-s", path) as said:
        segment = segment_in(said)
        with connect(path) as client:
            client.put(1)
    damage(segment)
    for _ in range(2):
        refused = run("-s", path)
        assert refused.returncode == 1
        assert refused.stderr.count("\n") == 1
        assert says in refused.stderr
        assert "--fresh" in refused.stderr
        assert exists(segment)
    with running("-m", "10MB", "-s", path, "--fresh"):
        assert not exists(segment)


@linux
@pytest.mark.parametrize(
    "end",
    [
        lambda segment: shorten(segment, 0),
        lambda segment: overwrite(segment, 0, 0),  # which is written last
        lambda segment: Path("/dev/shm", segment[1:]).unlink(),
    ],
)
def test_a_segment_in_which_nothing_ever_was(path: str, end: Callable[[str], None]) -> None:
    """A store that dies while it makes its segment, or whose segment is gone, is succeeded by an empty one."""
    with killed("-m", "10MB", "-s", path) as said:
        segment = segment_in(said)
    end(segment)
    with running("-m", "10MB", "-s", path) as (_, said):
        assert "nothing to recover" in said
        assert not exists(segment)


@linux
def test_another_releases_store_is_not_replaced(path: str) -> None:
    """A store whose segment the new one cannot read serves on."""
    with running("-m", "10MB", "-s", path) as (_, said):
        overwrite(segment_in(said), 1, LAYOUT_VERSION + 1)
        refused = run("-s", path, "--replace")
        assert refused.returncode == 1
        assert "run the release that made it" in refused.stderr
        overwrite(segment_in(said), 1, LAYOUT_VERSION)
        with connect(path) as client:
            assert client.get(client.put(1)) == 1


def test_a_store_is_replaced(path: str) -> None:
    """A store that takes over has all that its predecessor had, and the predecessor ends well."""
    with running("-m", "10MB", "-s", path) as (first, said):
        segment = segment_in(said)
        with connect(path) as client:
            object_id = client.put("kept")
            buffer = client.get_buffers(client.put_raw_buffer(b"held"))
            with running("-s", path, "--replace") as (second, second_said):
                assert first.wait() == 0
                assert segment_in(second_said) == segment
                client.flush()
                assert client.get(object_id) == "kept"
                assert bytes(buffer) == b"held"
                assert client.get(client.put("new")) == "new"
                del buffer
    assert second.returncode == 0
    assert not exists(segment)


def test_nobody_to_replace(path: str) -> None:
    """A store that is to replace another one starts where there is none, and recovers what one has left that has died."""
    with killed("-m", "10MB", "-s", path, "--replace") as said:
        assert "ready" in said
    with running("-s", path, "--replace") as (process, said):
        assert "recovered" in said
    assert process.returncode == 0


def test_what_is_no_store_is_not_replaced(path: str) -> None:
    """Whatever listens there is left alone, and the message says why."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        refused = run("-m", "10MB", "-s", path, "--replace")
        assert refused.returncode == 1
        assert f"what listens at {path} is no store that could be replaced" in refused.stderr
        assert "Traceback" not in refused.stderr
    os.unlink(path)


def test_a_store_of_another_protocol_is_not_replaced(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so itself, and serves on."""
    with running("-m", "10MB", "-s", path), connect(path) as client:
        monkeypatch.setattr(succession, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
        text = f"^the store at {path} cannot be replaced: the store speaks protocol version"
        with pytest.raises(EndpointError, match=text):
            succession.replace(path, lambda _: None, lambda: False)
        assert client.get(client.put(1)) == 1


def test_only_segments_are_swept_up(tmp_path: Path, path: str) -> None:
    """A note that names anything but a segment removes nothing."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    Path(f"{path}.lock").write_bytes(SegmentName("file", str(precious)).encode())
    with running("-m", "10MB", "-s", path) as (_, said):
        assert "removed" not in said
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("what", ["file", "symlink", "directory"])
def test_what_is_no_socket_stays(tmp_path: Path, path: str, what: str) -> None:
    """Anything but a socket at the path is refused, and stays."""
    target = tmp_path / "target"
    if what == "file":
        Path(path).write_text("precious")
    elif what == "symlink":
        Path(path).symlink_to(target)
    else:
        Path(path).mkdir()
    done = run("-m", "10MB", "-s", path)
    assert done.returncode == 1
    assert "is no socket" in done.stderr
    assert "-s" in done.stderr
    assert os.listdir(Path(path).parent) == ["s"]
    assert not target.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make others' files")
def test_somebody_elses_socket_stays(path: str) -> None:
    """Another user's socket is refused, dead or not."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
    os.chown(path, 12345, -1)
    done = run("-m", "10MB", "-s", path)
    assert (done.returncode, os.listdir(Path(path).parent)) == (1, ["s"])
    assert "another user's socket" in done.stderr


def test_impossible_paths(tmp_path: Path) -> None:
    """Long paths and missing directories are refused in one line."""
    for path, says in (
        ("", "107 bytes"),
        ("/" + 200 * "a", "107 bytes"),
        (str(tmp_path / "x/s"), "no directory"),
    ):
        done = run("-m", "10MB", "-s", path)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert says in done.stderr


@linux
@pytest.mark.parametrize("umask", [0, 0o777])
def test_mode_and_group(path: str, umask: int) -> None:
    """Socket and segment have the mode and the group that were asked for, whatever the umask."""
    group = grp.getgrgid(os.getegid())
    with running(
        "-m", "10MB", "-s", path, "--mode", "660", "--group", group.gr_name, umask=umask
    ) as (_, said):
        for file in (Path(path), Path("/dev/shm", segment_in(said)[1:])):
            status = file.stat()
            assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, group.gr_gid)


@linux
def test_private_by_default(path: str) -> None:
    """Without a word from the operator, socket and segment are this user's alone."""
    with running("-m", "10MB", "-s", path, umask=0) as (_, said):
        for file in (Path(path), Path("/dev/shm", segment_in(said)[1:])):
            assert stat.S_IMODE(file.stat().st_mode) == 0o600


@linux
def test_defaults(tmp_path: Path) -> None:
    """With no arguments at all, a store serves at a private path with a share of what there is."""
    with running(env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}) as (process, said):
        assert f"socket {tmp_path}/shmplasma/store.sock" in said
        match = re.search(r"capacity (\d+) bytes", said)
        assert match
        assert 0 < int(match[1]) < 0.4 * system.available_memory()
    assert process.returncode == 0


def test_too_small_a_file_system(path: str, small_tmpfs: str) -> None:
    """30 MB on a file system of 8 MB exit with 1 and the remedy; nothing stays behind."""
    done = run("-m", "30MB", "-d", small_tmpfs, "-s", path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"make room in {small_tmpfs}, name another directory with -d" in done.stderr
    assert not os.listdir(small_tmpfs)
    assert not os.listdir(Path(path).parent)


@linux
def test_more_than_there_is(path: str) -> None:
    """A capacity beyond shared memory exits with 1 and names the remedies."""
    done = run("-m", "1000TB", "-s", path)
    assert done.returncode == 1
    assert "a smaller -m" in done.stderr
    assert "-d DIRECTORY" in done.stderr
    assert not os.listdir(Path(path).parent)


LIMITED = """
    import os, resource, sys
    from shmplasma import cli

    kind, limit = getattr(resource, sys.argv[1]), int(sys.argv[2])
    if kind == resource.RLIMIT_NOFILE:
        probe = os.dup(0)
        os.close(probe)
        limit += probe
    resource.setrlimit(kind, (limit, limit))
    sys.exit(cli.main(sys.argv[3:]))
"""


@linux
@pytest.mark.parametrize(
    ("kind", "limit", "says"),
    [
        *[("RLIMIT_NOFILE", count, "ulimit -n") for count in (1, 3, 4)],
        ("RLIMIT_FSIZE", 100_000, "ulimit -f"),
        ("RLIMIT_AS", 500_000_000, "ulimit -v"),
    ],
)
def test_limits_of_the_process(path: str, kind: str, limit: int, says: str) -> None:
    """A store that meets one while it starts exits with 1, says which, and leaves nothing."""
    program = [sys.executable, "-c", dedent(LIMITED), kind, str(limit), "-s", path, "-m", "500MB"]
    done = subprocess.run(program, check=False, capture_output=True, text=True, env=unmeasured())
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert not os.listdir(Path(path).parent)


def fill(directory: str) -> None:
    """Leave no room in a file system."""
    with open(f"{directory}/rest", "wb", buffering=0) as rest, suppress(OSError):
        while True:
            rest.write(bytes(1 << 12))


def test_a_lock_file_without_room(small_tmpfs: str) -> None:
    """A full file system below the socket is named, with what helps; nothing is left there."""
    fill(small_tmpfs)
    done = run("-s", f"{small_tmpfs}/s", "-m", "1MB")
    assert done.returncode == 1
    assert f"cannot write the lock file {small_tmpfs}/s.lock: No space left" in done.stderr
    assert os.listdir(small_tmpfs) == ["rest"]


def test_an_external_store_without_room(path: str, small_tmpfs: str) -> None:
    """A store that cannot be started leaves nothing there, however often it is tried."""
    fill(small_tmpfs)
    for directory in (small_tmpfs, f"{small_tmpfs}/new"):
        done = run("-s", path, "-m", "1MB", "-e", f"file://{directory}")
        assert done.returncode == 1
        assert "cannot be written to" in done.stderr
        assert not os.listdir(Path(path).parent)
        assert not [each for each in os.listdir(directory) if each.startswith("shmplasma-")]


def test_systemd(tmp_path: Path, path: str) -> None:
    """The service manager hears that the store is ready, and that it is stopping."""
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        with running("-m", "10MB", "-s", path, env={**os.environ, "NOTIFY_SOCKET": name}) as (
            process,
            _,
        ):
            assert manager.recv(100) == b"READY=1"
            process.terminate()
            assert manager.recv(100) == b"STOPPING=1"


@linux
def test_as_many_files_as_allowed(path: str) -> None:
    """The soft limit of open files is raised to the hard one."""
    limited = ["sh", "-c", 'ulimit -Sn 64; exec "$@"', "sh", *PROGRAM]
    with subprocess.Popen(
        [*limited, "-m", "10MB", "-s", path], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            until_ready(process)
            limits = Path(f"/proc/{process.pid}/limits").read_text()
        finally:
            process.terminate()
    _, _, _, soft, hard, _ = next(
        line.split() for line in limits.splitlines() if line.startswith("Max open files")
    )
    assert soft == hard


class TestOwner:
    """A store that was started by a program of ours."""

    @pytest.fixture
    def owned(self, path: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
        """Give a store that is ready, and its owner's end."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = subprocess.Popen(
                    [*PROGRAM, "-m", "10MB", "-s", path, "--owner", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stderr=subprocess.DEVNULL,
                )
            with process:
                assert ours.recv(10) == b"R"
                yield process, ours
                process.terminate()

    def test_ends_with_the_owners_end(
        self, owned: tuple[subprocess.Popen[bytes], socket.socket], path: str
    ) -> None:
        """When the owner's end closes, the store ends as by a signal."""
        process, ours = owned
        ours.close()
        assert process.wait() == 0
        assert not os.listdir(Path(path).parent)

    def test_an_owner_that_did_not_listen(self, path: str) -> None:
        """An owner that ends without having read anything ends the store all the same."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [*PROGRAM, "-m", "10MB", "-s", path, "--owner", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stderr=subprocess.DEVNULL,
            )
        with process:
            with ours:
                assert ours.recv(10, socket.MSG_PEEK) == b"R"
            assert process.wait() == 0
        assert not os.listdir(Path(path).parent)

    def test_what_the_owner_says(
        self, owned: tuple[subprocess.Popen[bytes], socket.socket], path: str
    ) -> None:
        """Bytes from the owner's end mean nothing, and end nothing."""
        process, ours = owned
        ours.send(b"?")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
        assert process.poll() is None

    def test_an_owner_that_is_gone_already(self, tmp_path: Path, path: str) -> None:
        """A store whose owner ends before it is ready ends at once, and leaves nothing."""
        code = """if True:
            import os, socket, subprocess, sys
            ours, theirs = socket.socketpair()
            keeps = os.dup(ours.fileno())
            subprocess.Popen(sys.argv[1:] + ["--owner", str(theirs.fileno())],
                             pass_fds=[theirs.fileno(), keeps])
            os._exit(0)
        """
        out, into = os.pipe()
        with open(out, "rb") as reader:
            arguments = ["-m", "10MB", "-s", path, "-d", str(tmp_path)]
            subprocess.run(
                [sys.executable, "-c", code, *PROGRAM, *arguments],
                check=True,
                stdout=into,
                stderr=subprocess.DEVNULL,
            )
            os.close(into)
            # The store holds the other end of the pipe until its end.
            assert select.select([reader], [], [], 60)[0]
            assert reader.read() == b""
        assert not os.listdir(Path(path).parent)
        assert os.listdir(tmp_path) == ["d"]


def test_the_share_above_which_objects_are_written() -> None:
    """Any from 0 to 1, and 0.8 if nobody names one."""
    external = ["-e", "memory://spilled"]
    assert parse(external).spill_above == 0.8
    named = [parse([*external, "--spill-above", share]).spill_above for share in ("0", "0.5", "1")]
    assert named == [0, 0.5, 1]
