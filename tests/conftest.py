"""What all tests share: Hypothesis profiles, the check that nothing stays behind, a store and its clients.

The usual profile is quick; HYPOTHESIS_PROFILE=thorough looks much further.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.leaks import Belongings
from tests.processes import until

if TYPE_CHECKING:  # it needs Arrow, which most tests do without
    from shmplasma import PlasmaClient, Store

settings.register_profile(
    "quick",
    max_examples=60,
    deadline=None,  # an example that is slow on a busy machine is no failure
)
settings.register_profile(
    "thorough",
    max_examples=2000,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note which tests have failed: their tracebacks keep alive whatever they had."""
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


@pytest.fixture(scope="session", autouse=True)
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Let temporary files be made in a directory of ours, with a name short enough for a socket."""
    tmp_path_factory.getbasetemp()  # it is to stay where it was
    directory = Path(tempfile.mkdtemp(prefix="t-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(directory))
        patch.setattr(tempfile, "tempdir", None)
        yield directory
    shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def _nothing_stays(request: pytest.FixtureRequest, scratch: Path) -> Iterator[None]:
    """Fail a test that leaves a descriptor, process, thread, socket file or shared memory behind."""
    places = [scratch]
    if "tmp_path" in request.fixturenames:
        places.append(request.getfixturevalue("tmp_path"))
    belongings = Belongings(places)
    yield
    if not request.node.stash.get(_FAILED, False):
        left = belongings.new()
        assert not left, f"the test leaves behind: {left}"


@pytest.fixture(scope="module")
def _stores() -> Iterator[list[Store]]:
    """Run a store for all tests of a module; one whose test has failed is replaced."""
    from shmplasma import Store

    stores = [Store("100MB")]
    yield stores
    stores[0].close()


@pytest.fixture
def store(request: pytest.FixtureRequest, _stores: list[Store]) -> Iterator[Store]:
    """Give an empty store of 100 MB, to which nobody is connected; see that it is left in order."""
    from shmplasma import Store

    yield _stores[0]
    in_order = False
    try:
        if not request.node.stash.get(_FAILED, False):
            _empty(_stores[0])
            in_order = True
    finally:
        if not in_order:  # the next test is not to suffer from it
            _stores[0].close()
            _stores[0] = Store("100MB")


def _empty(store: Store) -> None:
    """Empty a store, and prove that nobody holds anything any more and that no room has got lost."""
    assert store.process.poll() is None, "the store has died"
    with store.connect() as client:

        def is_left_alone() -> bool:
            text = client.debug_string()
            if "\npinned objects: 0\n" in text and text.count("(pid ") == 1:
                return True
            gc.collect()
            return False

        try:
            until(is_left_alone, "nobody else is connected and nothing is pinned", seconds=10)
        except AssertionError:
            pytest.fail(f"somebody is connected, or something is pinned: {client.debug_string()}")
        client.delete(client.list())
        assert not client.list(), "an object is left that cannot be deleted"
        text = client.debug_string()
        assert "\nfree bytes: 100000000\n" in text, f"room has got lost: {text}"


@pytest.fixture
def client(store: Store) -> Iterator[PlasmaClient]:
    """Give a client of the store."""
    with store.connect() as client:
        yield client


@pytest.fixture
def client2(store: Store) -> Iterator[PlasmaClient]:
    """Give another client of the same store."""
    with store.connect() as client:
        yield client


@pytest.fixture(scope="session")
def spawning() -> None:
    """Start the process that `multiprocessing` keeps for the rest of the session once it spawns."""
    resource_tracker.ensure_running()
