from __future__ import annotations

import errno
import mmap
import os
import resource
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shmplasma import attachment as attachments
from shmplasma import layout as layouts
from shmplasma import system
from shmplasma.attachment import Attachment
from shmplasma.backing import Room, check_room, default_capacity
from shmplasma.errors import AttachError, CommitError, LayoutError
from shmplasma.layout import BOARD_WORDS, HEADER_BYTES, MAX_SEGMENT_BYTES, Layout
from shmplasma.segment import Segment
from shmplasma.segment_name import SegmentName
from shmplasma.writable import Pages
from tests.mounts import huge_pages, mounted

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
SHM = Path("/dev/shm")

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this")


def n_descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/dev/fd"))


@pytest.fixture(params=["posix", "file"])
def segment(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Segment]:
    """Give a segment of 1 MB, in POSIX shared memory and in a file."""
    directory = str(tmp_path) if request.param == "file" else None
    with Segment.create(10**6, directory=directory) as segment:
        yield segment


def attach(segment: Segment) -> Attachment:
    """Attach a segment by its name."""
    return Attachment.open(segment.name, segment.token)


def test_header(segment: Segment) -> None:
    """A new segment is as long as its layout says, and its header can be read back."""
    assert Layout.read(segment.words) == (segment.layout, segment.token)
    assert os.fstat(segment.fd).st_size == segment.layout.segment_bytes == len(segment.raw)
    assert segment.layout.capacity == 10**6


@needs_linux
def test_only_what_is_needed_is_committed(segment: Segment) -> None:
    """A new segment takes memory for header, buckets and control, and for nothing else."""
    layout = segment.layout
    taken = layout.entries + layout.boards - layout.control
    assert taken <= os.fstat(segment.fd).st_blocks * 512 < taken + 16 * layout.page_bytes


@needs_linux
def test_commit(segment: Segment) -> None:
    """A commit takes the pages that its range touches, and keeps what is stored there."""
    layout, before = segment.layout, os.fstat(segment.fd).st_blocks
    segment.commit(layout.data + 100, 2 * layout.page_bytes)
    taken = (os.fstat(segment.fd).st_blocks - before) * 512
    assert 3 * layout.page_bytes <= taken < 10 * layout.page_bytes
    segment.raw[layout.data + 100] = 7
    segment.commit(layout.data, layout.segment_bytes - layout.data)
    assert segment.raw[layout.data + 100] == 7
    segment.raw[layout.data + layout.capacity - 1] = 8


@needs_linux
def test_reopen_after_its_name_was_removed(segment: Segment) -> None:
    """Another descriptor is of the same file, and locks for itself."""
    segment.name.remove()
    fd = segment.reopen()
    try:
        assert os.path.samestat(os.fstat(fd), os.fstat(segment.fd))
        assert system.try_lock(segment.fd, 0)
        assert not system.try_lock(fd, 0)
    finally:
        os.close(fd)


def test_reopen_by_name(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file cannot be opened without its name, a name that was removed is an OSError."""
    monkeypatch.setattr(system, "reopen", lambda _: None)
    os.close(segment.reopen())
    segment.name.remove()
    with pytest.raises(OSError, match="shmplasma-"):
        segment.reopen()


def test_what_the_client_sees(segment: Segment) -> None:
    """A client reads all and cannot write through what it reads."""
    attachment = attach(segment)
    assert (attachment.layout, attachment.token) == (segment.layout, segment.token)
    segment.words[segment.layout.control // 8] = 42
    assert attachment.words[segment.layout.control // 8] == 42
    assert len(attachment.read_map) == segment.layout.segment_bytes
    assert attachment.words.readonly
    with pytest.raises(TypeError):
        attachment.read_map[0] = 1
    attachment.close()


def test_what_the_client_writes(segment: Segment) -> None:
    """Data, visited bytes and boards arrive where the layout says, and each is mapped once."""
    layout = segment.layout
    segment.commit(0, layout.segment_bytes)
    attachment = attach(segment)
    attachment.write_map[5:8] = b"abc"
    attachment.visited[layout.n_entries - 1] = 1
    last = attachment.board(layout.n_boards - 1)
    attachment.board(3)[0] = 30
    last[BOARD_WORDS - 1] = 99
    assert len(last) == BOARD_WORDS
    assert len(attachment.visited) == layout.n_entries
    assert bytes(segment.raw[layout.data + 5 : layout.data + 8]) == b"abc"
    assert segment.raw[layout.visited + layout.n_entries - 1] == 1
    assert segment.words[layout.boards // 8 + 3 * BOARD_WORDS] == 30
    assert segment.words[layout.boards // 8 + layout.n_boards * BOARD_WORDS - 1] == 99
    descriptors = n_descriptors()
    assert attachment.write_map is attachment.write_map
    assert attachment.visited is attachment.visited
    assert attachment.board(3)[0] == 30
    assert n_descriptors() == descriptors
    attachment.close()


@pytest.mark.parametrize("index", [-1, 4096])
def test_board_that_does_not_exist(segment: Segment, index: int) -> None:
    """A board beyond the region is refused."""
    attachment = attach(segment)
    with pytest.raises(IndexError, match="4096 boards"):
        attachment.board(index)
    attachment.close()


def test_attach_by_descriptor(segment: Segment) -> None:
    """A client that cannot see the name attaches by the descriptor, which it takes over."""
    before = n_descriptors()
    segment.unlink()
    with pytest.raises(AttachError, match="cannot attach"):
        attach(segment)
    attachment = Attachment.from_fd(os.dup(segment.fd), segment.token)
    assert attachment.layout == segment.layout
    attachment.close()
    assert n_descriptors() == before


def test_attach_the_wrong_one(segment: Segment) -> None:
    """A segment with another token is refused, and nothing stays open."""
    before = n_descriptors()
    with pytest.raises(AttachError, match="another store"):
        Attachment.open(segment.name, bytes(16))
    assert n_descriptors() == before


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOMEM, r"ulimit -v"), (errno.EMFILE, r"ulimit -n"), (errno.EIO, "dmesg")],
)
def test_a_mapping_that_is_refused(
    segment: Segment, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    """Who cannot map what a client needs is told what that is, why, and what helps."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    attachment = attach(segment)
    with monkeypatch.context() as patch:
        patch.setattr(attachments, "map_segment", refused)
        text = rf"bytes of the store's segment cannot be mapped here \({os.strerror(number)}\); .*{remedy}"
        attempts = (
            lambda: attach(segment),
            lambda: attachment.board(0),
            lambda: attachment.write_map,
        )
        for attempt in attempts:
            with pytest.raises(OSError, match=text) as raised:
                attempt()
            assert raised.value.errno == number
    assert len(attachment.write_map) == segment.layout.segment_bytes - segment.layout.data
    monkeypatch.setattr(system, "populate", refused)
    with pytest.raises(OSError, match=text):
        Pages(attachment).populate(segment.layout.data, 100)
    attachment.close()


def test_attach_a_symlink(tmp_path: Path) -> None:
    """A symbolic link in the segment's place is not followed."""
    with Segment.create(10**6, directory=str(tmp_path)) as segment:
        link = tmp_path / "link"
        link.symlink_to(segment.name.path)
        with pytest.raises(AttachError, match="cannot attach"):
            Attachment.open(SegmentName("file", str(link)), segment.token)


@pytest.mark.parametrize("change", [-4096, 4096, 4095])
def test_attach_a_file_of_another_length(segment: Segment, change: int) -> None:
    """A file that is not as long as its header says is refused, before anything reads it."""
    os.ftruncate(segment.fd, segment.layout.segment_bytes + change)
    with pytest.raises(AttachError, match="damaged"):
        attach(segment)


def test_attach_what_is_no_segment(tmp_path: Path) -> None:
    """Short files and files without a header are refused, and nothing stays open."""
    before = n_descriptors()
    path = tmp_path / "file"
    name = SegmentName("file", str(path))
    path.write_bytes(b"short")
    with pytest.raises(AttachError, match="only 5 bytes"):
        Attachment.open(name, bytes(16))
    path.write_bytes(bytes(2 * HEADER_BYTES))
    with pytest.raises(LayoutError, match="no magic"):
        Attachment.open(name, bytes(16))
    assert n_descriptors() == before


def test_attach_another_version(segment: Segment) -> None:
    """A segment of another layout version is refused with both versions named."""
    segment.words[1] = layouts.LAYOUT_VERSION + 1
    with pytest.raises(LayoutError, match="layout version"):
        attach(segment)


def test_views_outlive_everything(segment: Segment) -> None:
    """What is held stays readable after the attachment and the segment are closed."""
    segment.commit(segment.layout.data, 4096)
    attachment = attach(segment)
    attachment.write_map[:4] = b"data"
    data = segment.layout.data
    view = memoryview(attachment.read_map)[data : data + 4]
    board = attachment.board(0)
    attachment.close()
    attachment.close()
    segment.unlink()
    segment.close()
    segment.close()
    board[1] = 5
    assert (bytes(view), board[1]) == (b"data", 5)


def test_a_closed_attachment_maps_nothing(segment: Segment) -> None:
    """After `close` no new mapping is made."""
    attachment = attach(segment)
    attachment.close()
    with pytest.raises(ValueError, match="closed"):
        attachment.board(0)
    with pytest.raises(ValueError, match="closed"):
        _ = attachment.write_map


def test_nothing_stays_behind(tmp_path: Path) -> None:
    """Leaving the segment's block leaves no name and no descriptor."""
    before = n_descriptors()
    for directory in (None, str(tmp_path)):
        with Segment.create(10**6, directory=directory) as segment:
            attachment = attach(segment)
            attachment.write_map[0] = attachment.visited[0] = attachment.board(0)[0] = 0
            name = segment.name
            attachment.close()
        with pytest.raises(AttachError):
            Attachment.open(name, bytes(16))
        del segment, attachment
    assert n_descriptors() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("umask", [0, 0o777])
def test_mode_and_group(tmp_path: Path, umask: int, directory: bool) -> None:
    """The file has the mode and the group that were asked for, whatever the umask."""
    group = max(os.getgroups() or [os.getegid()])
    before = os.umask(umask)
    try:
        with Segment.create(
            10**6, directory=str(tmp_path) if directory else None, mode=0o640, group=group
        ) as segment:
            status = os.fstat(segment.fd)
    finally:
        os.umask(before)
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o640, group)


@needs_linux
def test_group_that_is_not_ours() -> None:
    """A group that this user is not in is refused, and nothing stays behind."""
    code = """
        import os
        from shmplasma.errors import AttachError
        from shmplasma.segment import Segment
        if not os.geteuid():
            os.setgroups([])
            os.setgid(12345)
            os.setuid(12345)
        try:
            Segment.create(10**6, group=0, token=bytes(range(16)))
        except AttachError as error:
            print(error)
    """
    program = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    assert "not permitted" in done.stdout
    assert not Path(SHM, SegmentName.plan(bytes(range(16)), None).path[1:]).exists()


def test_a_name_that_is_taken(segment: Segment) -> None:
    """A second segment of the same name is refused, and the first one stays."""
    path = Path(segment.name.path)
    directory = None if segment.name.kind == "posix" else str(path.parent)
    with pytest.raises(AttachError, match=r"cannot create.*; name (a|another) directory with -d"):
        Segment.create(10**6, directory=directory, token=segment.token)
    attach(segment).close()


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    """A missing directory is an `AttachError`, not a traceback from below."""
    with pytest.raises(AttachError, match="cannot create"):
        Segment.create(10**6, directory=str(tmp_path / "missing"))


def test_a_file_that_may_not_be_so_long(tmp_path: Path) -> None:
    """A creation that fails half-way leaves nothing behind."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = n_descriptors()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(AttachError, match="too large"):
            Segment.create(10**6, directory=str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    assert n_descriptors() == before


def test_no_capacity() -> None:
    """A capacity of less than a byte is refused."""
    with pytest.raises(ValueError, match="at least 1 byte"):
        Segment.create(0)


@needs_linux
def test_more_than_shared_memory_has() -> None:
    """A capacity that cannot be had is refused before anything is made, and the remedy is named."""
    before = {path.name for path in SHM.iterdir()}
    with pytest.raises(CommitError, match=r"smaller -m, .*with -d DIRECTORY") as caught:
        Segment.create(1 << 60)
    assert caught.value.needed_bytes >= 1 << 60
    assert 0 < caught.value.free_bytes < 1 << 60
    with pytest.raises(CommitError):
        Segment.create(1 << 90)
    assert {path.name for path in SHM.iterdir()} <= before


@needs_linux
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_short_is_named(
    small_tmpfs: str, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the memory has less room than the file system, it is said to be short, and so the other way round."""
    directory = small_tmpfs if inside else None
    monkeypatch.setattr(system, "available_memory", lambda: 2 * MIB)
    with pytest.raises(
        CommitError, match=r"memory of this machine, .*memory\.max.* on a disk"
    ) as caught:
        Segment.create(6 * MIB, directory=directory)
    assert caught.value.free_bytes == 2 * MIB
    assert "make room" not in str(caught.value)
    assert "--shm-size" not in str(caught.value)
    monkeypatch.setattr(system, "available_memory", lambda: 1 << 61)
    with pytest.raises(
        CommitError, match=r"the file system of the segment .*(make room in|--shm-size)"
    ):
        Segment.create(1 << 60, directory=directory)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_a_directory_that_takes_no_files() -> None:
    """The remedy is another directory."""
    with pytest.raises(AttachError, match=r"No such file.*; name another directory with -d"):
        Segment.create(MIB, directory="/proc")


def test_a_small_file_system(small_tmpfs: str) -> None:
    """30 MB on 8 MB are refused, and nothing is made."""
    with pytest.raises(CommitError, match="-d, or a smaller -m") as caught:
        Segment.create(30 * 10**6, directory=small_tmpfs)
    assert caught.value.free_bytes == 8 * MIB
    assert not os.listdir(small_tmpfs)


def test_what_fits_a_small_file_system(small_tmpfs: str) -> None:
    """A capacity that passes the check can be committed whole, with the first object's entry."""
    capacity = 7 * MIB
    with Segment.create(capacity, directory=small_tmpfs) as segment:
        layout = segment.layout
        for offset in (layout.entries, layout.visited, layout.boards):
            segment.commit(offset, 1)
        segment.commit(layout.data, layout.data_bytes)
        for offset in range(layout.data, layout.data + capacity, mmap.PAGESIZE):
            segment.raw[offset] = 1


def test_a_file_system_that_fills_up(small_tmpfs: str) -> None:
    """A commit that finds no room says how much there is, and takes none of it."""
    with Segment.create(6 * MIB, directory=small_tmpfs) as segment:
        Path(small_tmpfs, "other").write_bytes(bytes(4 * MIB))
        before = os.fstat(segment.fd).st_blocks
        with pytest.raises(CommitError, match=f"make room in {small_tmpfs}") as caught:
            segment.commit(segment.layout.data, 6 * MIB)
        assert caught.value.needed_bytes == 6 * MIB
        assert 2 * MIB < caught.value.free_bytes < 4 * MIB
        assert os.fstat(segment.fd).st_blocks == before
        segment.commit(segment.layout.data, MIB)


def test_a_segment_is_no_larger_than_pins_can_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much the file system has."""
    monkeypatch.setattr("shmplasma.backing.least_room", lambda _: Room(1 << 60, "all"))
    largest = Layout.plan(MAX_SEGMENT_BYTES - (1 << 40), mmap.PAGESIZE)
    assert largest.segment_bytes <= MAX_SEGMENT_BYTES
    check_room(largest, None)
    with pytest.raises(CommitError, match=r"a segment cannot give .* a smaller -m$"):
        check_room(Layout.plan(MAX_SEGMENT_BYTES, mmap.PAGESIZE), None)


def test_a_file_system_that_fills_up_during_creation(
    small_tmpfs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where somebody takes the room after the check, a creation leaves nothing behind."""

    def fill(layout: Layout, directory: str | None) -> None:
        check_room(layout, directory)
        free = os.statvfs(small_tmpfs).f_bavail * mmap.PAGESIZE
        Path(small_tmpfs, "other").write_bytes(bytes(free - 2 * mmap.PAGESIZE))

    monkeypatch.setattr("shmplasma.segment.check_room", fill)
    before = n_descriptors()
    with pytest.raises(CommitError):
        Segment.create(6 * MIB, directory=small_tmpfs)
    assert os.listdir(small_tmpfs) == ["other"]
    assert n_descriptors() == before


def test_default_capacity(small_tmpfs: str) -> None:
    """A store whose operator names no capacity takes 30 % of what can be had."""
    assert default_capacity(small_tmpfs) == int(0.3 * 8 * MIB)
    assert 0 < default_capacity() < system.available_memory()


def test_huge_pages(huge_directory: str) -> None:
    """On a hugetlbfs regions are huge pages, taken only by commits, and boards share them."""
    page_bytes = system.huge_page_bytes(huge_directory)
    assert page_bytes is not None
    before = system.huge_pages(page_bytes).available
    with Segment.create(page_bytes, directory=huge_directory, huge_pages=True) as segment:
        layout = segment.layout
        assert layout.page_bytes == page_bytes
        # Header, buckets, control.
        assert system.huge_pages(page_bytes).available == before - 3
        segment.commit(layout.boards, 1)
        segment.commit(layout.data, 1)
        assert system.huge_pages(page_bytes).available == before - 5
        attachment = attach(segment)
        descriptors = n_descriptors()
        attachment.board(0)[0] = 1
        attachment.board(1)[0] = 2
        assert n_descriptors() <= descriptors + 1
        assert segment.words[layout.boards // 8] == 1
        assert segment.words[layout.boards // 8 + BOARD_WORDS] == 2
        attachment.write_map[page_bytes - 1] = 3
        assert segment.raw[layout.data + page_bytes - 1] == 3
        attachment.close()
        del attachment
    del segment
    assert system.huge_pages(page_bytes).available == before


def test_too_few_huge_pages(huge_directory: str) -> None:
    """Too few huge pages are refused with the number that is wanted, and that number is enough."""
    page_bytes = system.huge_page_bytes(huge_directory)
    assert page_bytes is not None
    pool = system.huge_pages(page_bytes)
    with pytest.raises(CommitError, match="echo") as caught:
        Segment.create(12 * page_bytes, directory=huge_directory, huge_pages=True)
    wanted = int(caught.value.remedy.split("echo ")[1].split(" ")[0])
    assert pool.total < wanted < pool.total + 12
    assert f"> {pool.setting}" in caught.value.remedy
    assert not os.listdir(huge_directory)
    Path(pool.setting).write_text(str(wanted))
    if system.huge_pages(page_bytes).total < wanted:
        pytest.skip("this machine has no memory in pieces of a huge page")
    with Segment.create(12 * page_bytes, directory=huge_directory, huge_pages=True) as segment:
        segment.commit(0, segment.layout.segment_bytes)


def test_huge_pages_elsewhere(tmp_path: Path) -> None:
    """Huge pages without a hugetlbfs are refused, and the remedy is named."""
    for directory in (None, str(tmp_path)):
        with pytest.raises(AttachError, match="mount -t hugetlbfs"):
            Segment.create(10**6, directory=directory, huge_pages=True)


def test_names(tmp_path: Path) -> None:
    """A name survives being written down; what no store could have written is no name."""
    token = bytes(range(16))
    for directory in (None, str(tmp_path), "/", "/a:b\n c"):
        name = SegmentName.plan(token, directory)
        assert SegmentName.decode(name.encode()) == name
    assert len(SegmentName.plan(token, None).path) <= 31
    for text in (
        b"",
        b"file:/etc/passwd",
        b"posix:/other",
        b"posix:/tmp/shmplasma-0001020304050607",
        b"file:shmplasma-0001020304050607",
        b"file:/tmp/shmplasma-0001020304050607/",
        b"file:/tmp/shmplasma-0001020304050607\n",
        b"file:/t\0mp/shmplasma-0001020304050607",
    ):
        assert SegmentName.decode(text) is None


def test_remove(segment: Segment) -> None:
    """A name is removed once; after that there is nothing to remove."""
    assert segment.name.remove()
    assert not segment.name.remove()


def test_a_name_that_the_system_refuses() -> None:
    """A name that cannot be opened is an `AttachError`."""
    with pytest.raises(AttachError, match="cannot attach"):
        Attachment.open(SegmentName("posix", "/" + 300 * "a"), bytes(16))


def test_a_truncated_segment_is_noticed() -> None:
    """A store sees that somebody has changed the size of its file, and says what it means."""
    with Segment.create(1_000_000) as segment:
        segment.check_size()
        os.ftruncate(segment.fd, segment.layout.segment_bytes - 4096)
        with pytest.raises(AttachError, match="changed the size"):
            segment.check_size()


def test_a_limited_mount(tmp_path: Path) -> None:
    """Where the mount is what limits huge pages, the remedy is another mount and not more pages."""
    target = tmp_path / "huge"
    target.mkdir()
    with mounted("hugetlbfs", target, "size=8M") as directory:
        page_bytes = system.huge_page_bytes(directory)
        assert page_bytes is not None
        if page_bytes > 8 * MIB:
            pytest.skip("the default huge pages of this machine are larger")
        with (
            huge_pages(page_bytes, 16),
            pytest.raises(CommitError, match="remount,size=") as caught,
        ):
            Segment.create(12 * page_bytes, directory=directory, huge_pages=True)
        assert "more huge pages" not in caught.value.remedy
