"""Objects that go to an external store and come back, with real stores and real files."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from textwrap import dedent

import pytest

import shmplasma as plasma
from shmplasma import ObjectID
from shmplasma.segment_name import SegmentName
from shmplasma.spiller import is_dead, note_of
from tests.clients import new_id
from tests.command import PROGRAM, run, running, until_ready
from tests.processes import Child, until

CAPACITY = 8_000_000
WORK = """
    import random, sys
    import shmplasma as plasma

    path, seed = sys.argv[1], int(sys.argv[2])
    source = random.Random(seed)
    with plasma.connect(path) as client:
        contents = {}
        for number in range(60):
            data = source.randbytes(source.choice([100, 60_000, 300_000]))
            contents[client.put_raw_buffer(data, metadata=b"%d" % number)] = data, b"%d" % number
            object_id = source.choice(list(contents))
            ((metadata, data),) = client.get_buffers([object_id], with_meta=True)
            assert (bytes(data), bytes(metadata)) == contents[object_id]
            del data, metadata
        print("put", flush=True)
        sys.stdin.readline()
        for object_id, expected in contents.items():
            assert client.contains(object_id)
            ((metadata, data),) = client.get_buffers([object_id], with_meta=True)
            assert (bytes(data), bytes(metadata)) == expected
            del data, metadata
        print("all there", flush=True)
        sys.stdin.readline()
        client.delete(list(contents))
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Give a path for a socket."""
    return str(tmp_path / "s")


def arguments(path: str, tmp_path: Path, *more: str) -> list[str]:
    """Return the arguments of a store with an external store."""
    external = f"file://{tmp_path / 'external'}"
    return ["-s", path, "-m", str(CAPACITY), "-e", external, *more]


def containers(tmp_path: Path) -> list[Path]:
    """Return the files of the external store that hold objects."""
    return [each for each in (tmp_path / "external").glob("*/*") if each.name != "owner"]


def test_a_subscriber_is_told_of_what_is_in_the_external_store(path: str, tmp_path: Path) -> None:
    """Whoever subscribes hears of all sealed objects first, wherever they lie."""
    with running(*arguments(path, tmp_path)), plasma.connect(path) as client:
        sizes = {client.put_raw_buffer(bytes(2_000_000 + n), timeout_ms=5000): n for n in range(8)}
        client.subscribe()
        told = [client.get_next_notification() for _ in sizes]
        assert {object_id: size - 2_000_000 for object_id, size, _ in told} == sizes
        assert containers(tmp_path)


def test_several_times_the_capacity(path: str, tmp_path: Path) -> None:
    """Four clients put and read several times what fits; a kill of the store in between changes nothing."""
    with ExitStack() as stack:
        first, _ = stack.enter_context(running(*arguments(path, tmp_path)))
        workers = [stack.enter_context(Child(WORK, path, str(seed))) for seed in range(4)]
        for worker in workers:
            assert worker.hear() == "put"
        assert containers(tmp_path)
        first.kill()
        first.wait()
        stack.enter_context(running(*arguments(path, tmp_path)))
        client = stack.enter_context(plasma.connect(path))
        for worker in workers:
            worker.say()
        for worker in workers:
            assert worker.hear() == "all there"
        assert len(client.list()) == 240
        for worker in workers:
            worker.say()
            assert worker.end() == 0
        assert not client.list()
        until(lambda: not containers(tmp_path), "no file is left of what was deleted")
    assert not list((tmp_path / "external").iterdir())


def test_files_that_are_damaged_or_gone(path: str, tmp_path: Path) -> None:
    """Who asks for an object of theirs is told so; all others are served."""
    source = random.Random(1)
    with running(*arguments(path, tmp_path)), plasma.connect(path) as client:
        contents = {
            client.put_raw_buffer(data): data
            for data in (source.randbytes(400_000) for _ in range(60))
        }
        files = containers(tmp_path)
        for number, file in enumerate(files):
            if number % 2:
                file.unlink()
            else:
                file.write_bytes(b"x" * 1000 + file.read_bytes()[1000:])
        errors = {}
        for object_id, data in contents.items():
            try:
                got = bytes(client.get_buffers(object_id))
            except plasma.ExternalStoreError as error:
                errors[object_id] = str(error)
            else:
                assert got == data
        assert 0 < len(errors) < 60
        assert all(object_id.binary().hex() in text for object_id, text in errors.items())
        assert client.contains(client.put("the store goes on"))
        client.delete(list(contents))


def test_a_disk_that_is_full(path: str, small_tmpfs: str) -> None:
    """Nothing is lost: who finds no room is refused and told why, and what is there can be had."""
    source = random.Random(1)
    external = ["-s", path, "-m", str(CAPACITY), "-e", f"file://{small_tmpfs}"]
    contents = {}
    with running(*external), plasma.connect(path) as client:
        refusal = ""
        while not refusal:
            data = source.randbytes(400_000)
            try:
                contents[client.put_raw_buffer(data)] = data
            except plasma.PlasmaStoreFull as full:
                refusal = str(full)
        assert "nothing is written to the external store" in refusal
        assert len(contents) > CAPACITY // 400_000
        assert client.list().keys() == contents.keys()
        subprocess.run(["mount", "-o", "remount,size=64m", small_tmpfs], check=True)
        client.put_raw_buffer(source.randbytes(400_000))
        for object_id, data in contents.items():
            assert bytes(client.get_buffers(object_id)) == data


def test_a_place_that_is_none(path: str, tmp_path: Path) -> None:
    """A store that could not spill does not start."""
    (tmp_path / "external").write_text("a file")
    program = [*PROGRAM, *arguments(path, tmp_path)]
    done = subprocess.run(program, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot be written to" in done.stderr
    assert not os.path.exists(path)


def test_files_of_a_dead_store_are_swept(path: str, tmp_path: Path) -> None:
    """Who starts anew removes what a killed store has left in the external store."""
    with running(*arguments(path, tmp_path)) as (first, _), plasma.connect(path) as client:
        for _ in range(30):
            client.put_raw_buffer(bytes(400_000))
        until(lambda: containers(tmp_path), "something was written")
        first.kill()
        first.wait()
    (old,) = (tmp_path / "external").iterdir()
    with running(*arguments(path, tmp_path, "--fresh")), plasma.connect(path) as client:
        assert not old.exists()
        assert client.contains(client.put("new", new_id()))


def test_another_external_store(path: str, tmp_path: Path) -> None:
    """Where objects are in one alone, a successor does not start with another, or none; it does where they were moved to."""
    there = tmp_path / "external"
    contents = {}
    with running(*arguments(path, tmp_path)) as (first, _), plasma.connect(path) as client:
        for number in range(60):
            data = random.Random(number).randbytes(400_000)
            contents[client.put_raw_buffer(data)] = data
        client.flush()
        first.kill()
        first.wait()

    def refusal(*more: str) -> str:
        program = [*PROGRAM, "-s", path, "-m", str(CAPACITY), *more]
        done = subprocess.run(program, check=False, capture_output=True, text=True)
        assert done.returncode == 1
        assert not os.path.exists(path)
        return done.stderr

    other = f"file://{tmp_path / 'other'}"
    for more in ((), ("-e", "memory://x"), ("-e", other)):
        assert "objects in an external store" in (said := refusal(*more))
        assert ("not named now" in said) == (not more)
    with running(*arguments(path, tmp_path)) as (second, _), plasma.connect(path) as client:
        for object_id, data in contents.items():
            assert bytes(client.get_buffers(object_id)) == data
        program = [*PROGRAM, "-s", path, "--replace", "-e", other]
        done = subprocess.run(program, check=False, capture_output=True, text=True)
        assert done.returncode == 1
        assert "start with its -e" in done.stderr
        assert bytes(client.get_buffers(object_id)) == data  # it serves on
        second.kill()
        second.wait()
    shutil.move(there, tmp_path / "moved")
    with running("-s", path, "-e", f"file://{tmp_path / 'moved'}/"), plasma.connect(path) as client:
        for object_id, data in contents.items():
            assert bytes(client.get_buffers(object_id)) == data


@pytest.mark.parametrize("scheme", ["memory", "hashtable"])
def test_what_is_in_the_memory_of_a_store_alone(path: str, scheme: str) -> None:
    """A store that has something there is not replaced, and serves on; one that has nothing there alone is."""
    options = ["-s", path, "-e", f"{scheme}://name"]
    with running(*options, "-m", str(CAPACITY)) as (first, _), plasma.connect(path) as client:
        ids = [client.put_raw_buffer(bytes(1_800_000)) for _ in range(6)]
        refused = run(*options, "--replace")
        assert refused.returncode == 1
        assert "objects in its own memory alone" in refused.stderr
        assert all(bytes(client.get_buffers(each)) == bytes(1_800_000) for each in ids)
        client.delete(ids[:4])
        for each in ids[4:]:
            client.get_buffers(each)
        with running(*options, "--replace"):
            assert first.wait() == 0
            assert all(bytes(client.get_buffers(each)) == bytes(1_800_000) for each in ids[4:])


def test_a_successor_says_what_is_lost(path: str) -> None:
    """What a killed store had in its own memory has ended with it; how much that was is in the log."""
    options = ["-s", path, "-e", "memory://name"]
    with running(*options, "-m", str(CAPACITY)) as (first, _), plasma.connect(path) as client:
        ids = [client.put_raw_buffer(bytes(1_800_000)) for _ in range(6)]
        client.flush()
        first.kill()
        first.wait()
        with running(*options) as (_, said):
            n_lost = 0
            for each in ids:
                try:
                    assert bytes(client.get_buffers(each)) == bytes(1_800_000)
                except plasma.ExternalStoreError:
                    n_lost += 1
            assert n_lost
            assert f"{n_lost} objects that were in the external store alone are not there" in said


SLOW = """
    import sys
    from shmplasma import cli, external

    def slow(place, name, parts):
        if name.rpartition("/")[2].isdecimal():
            print("writing", file=sys.stderr, flush=True)
            open(sys.argv[1]).close()
        write(place, name, parts)

    write, external._Directory.write = external._Directory.write, slow
    sys.exit(cli.main(sys.argv[2:]))
"""
"""A store whose writes to the external store wait until somebody opens a fifo for writing."""
TALKATIVE = """
    import sys
    from shmplasma import cli, succession

    succession._LOG_SECONDS = 0
    sys.exit(cli.main())
"""


def next_line(process: subprocess.Popen[str]) -> str:
    """Return the next line that a store says."""
    assert process.stderr is not None
    return process.stderr.readline()


@contextmanager
def waiting(path: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path, ObjectID]]:
    """Give a store that is to replace one whose writes do not end; what lets them end; and one of the objects."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def start(stack: ExitStack, code: str, *more: str) -> subprocess.Popen[str]:
        program = [sys.executable, "-c", dedent(code), *more]
        process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
        stack.enter_context(process)
        stack.callback(process.kill)
        return process

    with ExitStack() as stack:
        old = start(stack, SLOW, str(fifo), *arguments(path, tmp_path))
        until_ready(old)
        with plasma.connect(path) as client:
            object_id, *_ = [client.put_raw_buffer(bytes(1_800_000)) for _ in range(4)]
            assert "writing" in next_line(old)
        new = start(stack, TALKATIVE, *arguments(path, tmp_path, "--replace"))
        assert "has agreed to end, and has not for" in next_line(new)
        yield new, fifo, object_id
        assert old.wait() == 0


def test_a_successor_waits_for_the_last_writes(path: str, tmp_path: Path) -> None:
    """However long these take, clients find everything in the new store."""
    with waiting(path, tmp_path) as (new, fifo, object_id), fifo.open("w"):
        until_ready(new)
        with plasma.connect(path) as client:
            assert bytes(client.get_buffers(object_id)) == bytes(1_800_000)
        new.terminate()
        assert new.wait() == 0


def test_a_successor_that_is_told_to_end(path: str, tmp_path: Path) -> None:
    """It does not wait any longer for the old store, which ends, and leaves everything for another one."""
    with waiting(path, tmp_path) as (new, fifo, object_id):
        new.terminate()
        assert new.wait() == 1
        assert new.stderr is not None
        assert "told to end before" in new.stderr.read()
        with (
            fifo.open("w"),
            running(*arguments(path, tmp_path, "--replace")),
            plasma.connect(path) as client,
        ):
            assert bytes(client.get_buffers(object_id)) == bytes(1_800_000)


HANGING = """
    import sys
    from shmplasma import cli, endings

    endings.hold_back()  # before Arrow, which starts threads
    from shmplasma import external

    def hang(place, name):
        if name:  # what others have left beside it is no matter here
            print("looking", file=sys.stderr, flush=True)
            open(sys.argv[1]).close()
        return {}

    external._Directory.list = hang
    sys.exit(cli.main(sys.argv[2:]))
"""
"""A store whose look at its containers waits until somebody opens a fifo for writing."""


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_store_that_is_told_to_end_while_it_looks_at_what_there_is(
    path: str, tmp_path: Path, elsewhere: bool
) -> None:
    """It ends with 0, and leaves everything for another one, whichever place does not answer."""
    os.mkfifo(tmp_path / "fifo")
    with running(*arguments(path, tmp_path)) as (first, _), plasma.connect(path) as client:
        ids = [client.put_raw_buffer(bytes(1_800_000)) for _ in range(8)]
        client.flush()
        first.kill()
        first.wait()
    hanging = [sys.executable, "-c", dedent(HANGING), str(tmp_path / "fifo")]
    more = ["-e", f"file://{tmp_path / 'elsewhere'}"] if elsewhere else []
    with subprocess.Popen(
        [*hanging, *arguments(path, tmp_path, *more)], stderr=subprocess.PIPE, text=True
    ) as second:
        while "looking" not in (line := next_line(second)):
            assert line, "it has ended"
        second.terminate()
        assert second.wait() == 0
    with running(*arguments(path, tmp_path)), plasma.connect(path) as client:
        assert all(bytes(client.get_buffers(each)) == bytes(1_800_000) for each in ids)


SILENT = """
    import sys
    from shmplasma import cli, endings

    endings.hold_back()  # before Arrow, which starts threads
    from shmplasma import external, spiller

    fifo, operation, *arguments = sys.argv[1:]
    spiller._PATIENCE_SECONDS = 0.2

    do = getattr(external._Directory, operation)

    def hang(place, name, *rest):
        if name.endswith("owner"):
            return do(place, name, *rest)
        print("hanging", file=sys.stderr, flush=True)
        open(fifo).close()

    setattr(external._Directory, operation, hang)
    sys.exit(cli.main(arguments))
"""
"""A store whose files cannot be written, or removed, until somebody opens a fifo for writing."""


@pytest.mark.parametrize("operation", ["write", "delete_directory"])
def test_a_store_that_ends_while_its_external_store_does_not_answer(
    path: str, tmp_path: Path, operation: str
) -> None:
    """It ends with 0, without what is in memory, and says what stays: that goes with the next store."""
    os.mkfifo(tmp_path / "fifo")
    silent = [sys.executable, "-c", dedent(SILENT), str(tmp_path / "fifo"), operation]
    with subprocess.Popen(
        [*silent, *arguments(path, tmp_path)], stderr=subprocess.PIPE, text=True
    ) as store:
        until_ready(store)
        with plasma.connect(path) as client:
            client.put_raw_buffer(bytes(CAPACITY))
            if operation == "write":  # once somebody wants room
                with pytest.raises(plasma.PlasmaStoreFull):
                    client.put_raw_buffer(bytes(CAPACITY), timeout_ms=100)
        store.terminate()
        assert store.stderr is not None
        said = store.stderr.read()
        assert said.startswith("hanging")
        assert "the external store has not answered for 0.2 s" in said
        assert store.wait() == 0
    assert not Path(path).exists()
    (left,) = (tmp_path / "external").iterdir()
    with running(*arguments(path, tmp_path)) as (_, said):
        assert f"removed {left.name}" in said
        assert not left.exists()


def test_what_proves_that_a_store_is_dead(tmp_path: Path) -> None:
    """Only what is seen from the same place in the same boot; or, on a disk of one's own, that the boot is over."""
    shared = SegmentName.plan(os.urandom(16), None)
    file = SegmentName.plan(os.urandom(16), str(tmp_path))
    gone = b"%d 1" % os.getpid()  # this process began later
    for name in (shared, file):
        boot, living, where, text = note_of(name).split(b"\n")
        assert is_dead(b"\n".join([boot, gone, where, text]), on_own_disk=False)
        for process in (living, b"", b"of another release"):
            assert not is_dead(b"\n".join([boot, process, where, text]), on_own_disk=True)
        elsewhere = b"\n".join([boot, gone, b"0:1", text])
        earlier = b"\n".join([b"another", living, where, text])
        assert not is_dead(elsewhere, on_own_disk=True)
        assert not is_dead(earlier, on_own_disk=False)
        assert is_dead(earlier, on_own_disk=True) == (name is shared)
        assert not is_dead(b"\n".join([b"", gone, where, text]), on_own_disk=True)
    Path(file.path).touch()
    boot, _, where, text = note_of(file).split(b"\n")
    assert not is_dead(b"\n".join([boot, gone, where, text]), on_own_disk=False)
    file.remove()
    for note in (b"", b"host\nposix:/shmplasma-0000000000000000", b"a\n1 1\nb\nposix:/etc/passwd"):
        assert not is_dead(note, on_own_disk=True)
