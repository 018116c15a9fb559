"""Options of the tests, and fixtures: stores that are made, mounted and cleaned up.

    pytest --long     runs what takes minutes, too
    pytest --plain    gives the tests of POSIX behaviour a plain directory in place
                      of a mount, which shows that the tests themselves are right

A test that asks for a store gets it below pytest's temporary directory.  When it
is over, however it ended, the daemon must have gone by itself after an umount
and must not have logged a traceback; whatever is left is removed by its pid.
Nobody may have logged a warning or an error that the test does not expect
(`expects_log`).
"""

from __future__ import annotations

import itertools
import logging
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import hypothesis
import pytest

# Before any of it is imported, so that its assertions explain themselves, too.
pytest.register_assert_rewrite("support")

from support.disks import Disks  # noqa: E402
from support.logs import SLOW, Recorder, unexpected  # noqa: E402
from support.mounted_store import Directory, Store  # noqa: E402

hypothesis.settings.register_profile(
    "fusestore",
    database=None,
    deadline=None,
    print_blob=True,
)
hypothesis.settings.load_profile("fusestore")


# A shell starts what it runs in the background with SIGINT ignored, and so are its children.
signal.signal(signal.SIGINT, signal.default_int_handler)


# --- options -----------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusestore")
    group.addoption("--long", action="store_true", help="run the tests that take minutes, too")
    group.addoption(
        "--plain",
        action="store_true",
        help="run the tests of POSIX behaviour on a plain directory, to test the tests",
    )
    group.addoption(
        "--model-seed",
        type=int,
        default=2,
        metavar="N",
        help="the seed of the random sequences in the model tests",
    )


def pytest_report_header(config: pytest.Config) -> str:
    return f"fusestore: --model-seed {config.getoption('--model-seed')}" + (
        ", on a plain directory" if config.getoption("--plain") else ""
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = set()
    if not config.getoption("--long"):
        unwanted.add("long")
    if config.getoption("--plain"):
        unwanted.add("not_plain")
    out = [item for item in items if any(item.get_closest_marker(mark) for mark in unwanted)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what is no UTF-8 in the captured output: processes that run tests send reports."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether there is time."""
    return bool(request.config.getoption("--long"))


# --- the log ------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def _recorder() -> Iterator[Recorder]:
    """The warnings and errors of all tests; a session's, so that it hears a module's fixtures."""
    recorder = Recorder()
    logging.getLogger("fusestore").addHandler(recorder)
    yield recorder
    logging.getLogger("fusestore").removeHandler(recorder)


@pytest.fixture(autouse=True)
def log(request: pytest.FixtureRequest, _recorder: Recorder) -> Iterator[Recorder]:
    """The warnings and errors of a test, which fails if it did not expect them.

    It is torn down after the fixtures that make stores, which add what the daemons logged.
    """
    yield _recorder
    marks = request.node.iter_markers("expects_log")
    # A busy machine can make any read slow.
    patterns = [SLOW, *(pattern for mark in marks for pattern in mark.args)]
    wrong = unexpected(_recorder.take(), patterns)
    assert not wrong, "unexpected in the log:\n" + "\n".join(dict.fromkeys(wrong))


# --- stores ------------------------------------------------------------------


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    """Small file systems; ask for them before `make_store`, so that the stores end first."""
    (tmp_path / "disks").mkdir()
    made = Disks(tmp_path / "disks")
    yield made
    made.clean_up()


@pytest.fixture
def make_store(
    request: pytest.FixtureRequest, tmp_path: Path, log: Recorder
) -> Iterator[Callable[..., Store]]:
    """A function that makes a store with the given options of mkfs, not yet mounted."""
    if request.config.getoption("--plain"):
        pytest.skip("needs a store, not a plain directory")
    stores: list[Store] = []

    def make(*mkfs_options: str | Path) -> Store:
        store = Store(tmp_path / f"s{len(stores)}", *mkfs_options)
        stores.append(store)
        return store

    yield make
    problems = []
    for store in stores:
        try:
            store.clean_up()
        except AssertionError as error:
            problems.append(str(error))
        log.lines += store.logged()
    assert not problems, "\n".join(problems)


@pytest.fixture
def mounted(
    request: pytest.FixtureRequest, tmp_path: Path, log: Recorder
) -> Iterator[Store | Directory]:
    """A fresh store of code 2+1, mounted with allow_other."""
    if request.config.getoption("--plain"):
        yield Directory(tmp_path)
        return
    store = Store(tmp_path)
    try:
        store.mount("allow_other")
        yield store
    finally:
        store.clean_up()
        log.lines += store.logged()


@pytest.fixture(scope="session")
def _session_store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Store | Directory]:
    base = tmp_path_factory.mktemp("shared")
    if request.config.getoption("--plain"):
        yield Directory(base)
        return
    store = Store(base)
    try:
        store.mount("allow_other")
        yield store
    finally:
        store.clean_up()


_numbers = itertools.count(1)


@pytest.fixture
def shared_mount(_session_store: Store | Directory, log: Recorder) -> Iterator[Path]:
    """A fresh directory on a mount (2+1, allow_other) that all tests share."""
    directory = _session_store.mountpoint / f"t{next(_numbers)}"
    directory.mkdir()
    directory.chmod(0o755)
    yield directory
    if isinstance(_session_store, Store):
        log.lines += _session_store.logged()
        if not _session_store.alive():
            _session_store.revive()
            pytest.fail("the daemon died in this test")
