"""The control socket and the store's lock: who may ask, how much, how long, and alone."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import trio
import trio.testing

from fusestore import errors
from fusestore.config.store_config import StoreConfig
from fusestore.errors import (
    FusestoreError,
    NotDurableError,
    NotMountedError,
    StoreBusyError,
    UnmountedError,
    UsageError,
)
from fusestore.format.erasure import Code
from fusestore.serve.control_client import (
    REQUEST_BYTES_MAX,
    ControlClient,
    Message,
    Progress,
    UnansweredError,
    error_message,
    error_of,
    lock_holder,
)
from fusestore.serve.control_server import ControlLimits, ControlServer, Handler, lock_store
from fusestore.serve.messages.mount import StatusRequest
from fusestore.serve.messages.safety import RepairRequest
from fusestore.serve.running import RunningCommands

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes its user")


async def echo(arguments: Message, progress: Progress) -> Message:
    """Answer with the arguments."""
    return arguments


@asynccontextmanager
async def serving(
    directory: Path, limits: ControlLimits | None = None, **handlers: Handler
) -> AsyncIterator[None]:
    """A server in `directory` with `echo` and the given handlers."""
    async with trio.open_nursery() as nursery:
        await nursery.start(ControlServer({"echo": echo, **handlers}, limits).serve, directory)
        yield
        nursery.cancel_scope.cancel()


async def ask(directory: Path, command: str, arguments: Message | None = None) -> Message:
    """What the client gets, in a thread as it blocks."""
    client = ControlClient(directory, silence_seconds=20)
    return await trio.to_thread.run_sync(client.request, command, arguments)


async def connected(directory: Path) -> trio.SocketStream:
    """A bare connection."""
    connection = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await connection.connect(os.fspath(directory / "control.sock"))
    return trio.SocketStream(connection)


async def lines(stream: trio.SocketStream) -> list[Message]:
    """All that comes, to the end."""
    data = b""
    try:
        async for part in stream:
            data += part
    except trio.BrokenResourceError:
        pass
    return [json.loads(line) for line in data.splitlines()]


# --- asking ------------------------------------------------------------------


async def test_a_command_gets_its_arguments_and_answers(tmp_path: Path) -> None:
    odd = os.fsdecode(b"/\xff\n\xc3\xa4")
    async with serving(tmp_path):
        assert await ask(tmp_path, "echo", {"path": odd}) == {"path": odd}
        assert await ask(tmp_path, "echo") == {}
        assert await trio.to_thread.run_sync(ControlClient(tmp_path).daemon) == os.getpid()


async def test_progress_comes_before_the_answer_and_the_newest_always(tmp_path: Path) -> None:
    async def work(arguments: Message, progress: Progress) -> Message:
        for done in range(1000):
            progress({"phase": "shards", "done": done, "total": 999})
        await trio.testing.wait_all_tasks_blocked()
        return {"shards_rebuilt": 7}

    seen: list[Message] = []
    async with serving(tmp_path, work=work):
        result = await trio.to_thread.run_sync(
            ControlClient(tmp_path).request, "work", None, seen.append
        )
    assert result == {"shards_rebuilt": 7}
    assert seen[-1] == {"phase": "shards", "done": 999, "total": 999}
    assert len(seen) < 10


async def test_many_clients_at_a_time(tmp_path: Path) -> None:
    async with serving(tmp_path), trio.open_nursery() as nursery:
        for number in range(12):
            nursery.start_soon(ask, tmp_path, "echo", {"number": number})


@pytest.mark.parametrize("kind", [StoreBusyError, UsageError, NotDurableError, FusestoreError])
async def test_an_error_is_raised_again_as_what_it_was(
    tmp_path: Path, kind: type[FusestoreError]
) -> None:
    async def fail(arguments: Message, progress: Progress) -> Message:
        raise kind("It is busy, says ä.")

    async with serving(tmp_path, fail=fail):
        with pytest.raises(kind, match="It is busy, says ä") as found:
            await ask(tmp_path, "fail")
    assert type(found.value) is kind


async def test_an_error_out_of_a_nursery_is_still_what_it_was(tmp_path: Path) -> None:
    async def fail(arguments: Message, progress: Progress) -> Message:
        async with trio.open_nursery():
            raise UsageError("No such node.")

    async with serving(tmp_path, fail=fail):
        with pytest.raises(UsageError, match="No such node"):
            await ask(tmp_path, "fail")


@pytest.mark.expects_log(
    r"control_server: the command '(fail|odd)' failed with an unexpected error"
)
async def test_an_unexpected_error_is_logged_with_traceback_and_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(arguments: Message, progress: Progress) -> Message:
        raise ZeroDivisionError("secret")

    async def odd(arguments: Message, progress: Progress) -> Message:
        return {"path": Path("/")}

    async with serving(tmp_path, fail=fail, odd=odd):
        for command in ["fail", "odd"]:
            with pytest.raises(
                FusestoreError, match=r"failed unexpectedly: see the daemon.s log"
            ) as found:
                await ask(tmp_path, command)
            assert "secret" not in str(found.value)
        assert await ask(tmp_path, "echo", {"still": "there"}) == {"still": "there"}
    assert [record.exc_info is not None for record in caplog.records] == [True, True]


def test_every_kind_of_error_crosses_the_socket() -> None:
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, FusestoreError):
            message = error_message(kind("Text."))["error"]
            assert type(error_of(message["kind"], message["message"])) is kind
    assert type(error_of("Path", "x")) is FusestoreError
    assert type(error_of("FromTheFutureError", "x")) is FusestoreError


async def test_an_unknown_command_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path):
        with pytest.raises(UsageError, match="does not know the command 'fly'"):
            await ask(tmp_path, "fly")


# --- a daemon that is not there, or does not answer --------------------------


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(NotMountedError, match="is not mounted"):
        ControlClient(tmp_path).request("status")
    with pytest.raises(NotMountedError):
        ControlClient(tmp_path / "none").daemon()


async def test_a_socket_left_by_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(tmp_path / "control.sock"))
    with pytest.raises(NotMountedError):
        ControlClient(tmp_path).request("status")
    async with serving(tmp_path):
        assert await ask(tmp_path, "echo") == {}
    assert not (tmp_path / "control.sock").exists()


def test_a_daemon_that_is_silent_is_given_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(os.fspath(tmp_path / "control.sock"))
        silent.listen()
        with pytest.raises(UnansweredError, match=rf"process {os.getpid()}\) did not answer"):
            ControlClient(tmp_path, silence_seconds=0.05).request("status")


async def test_a_daemon_that_ends_without_an_answer(tmp_path: Path) -> None:
    async def never(arguments: Message, progress: Progress) -> Message:
        scope.cancel()
        await trio.Event().wait()
        return {}

    problems: list[UnansweredError] = []

    async def client() -> None:
        with pytest.raises(UnansweredError, match="exited without an answer") as found:
            await ask(tmp_path, "never")
        problems.append(found.value)

    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        with scope:
            async with serving(tmp_path, never=never):
                nursery.start_soon(client)
                await trio.sleep_forever()
    assert problems


async def test_a_long_command_shows_that_it_is_alive(tmp_path: Path) -> None:
    async def slow(arguments: Message, progress: Progress) -> Message:
        await trio.sleep(0.4)
        return {"done": True}

    async with serving(tmp_path, ControlLimits(alive_seconds=0.05), slow=slow):
        client = ControlClient(tmp_path, silence_seconds=0.3)
        assert await trio.to_thread.run_sync(client.request, "slow") == {"done": True}


async def test_the_answer_is_sent_even_if_the_daemon_ends_at_that_moment(tmp_path: Path) -> None:
    started, stopped = trio.Event(), trio.Event()
    results: list[Message] = []

    async def stop(arguments: Message, progress: Progress) -> Message:
        started.set()
        await stopped.wait()
        return {"committed": 42}

    async def client() -> None:
        results.append(await ask(tmp_path, "stop"))

    async with trio.open_nursery() as nursery, trio.open_nursery() as daemon:
        await daemon.start(ControlServer({"stop": stop}).serve, tmp_path)
        nursery.start_soon(client)
        await started.wait()
        stopped.set()
        daemon.cancel_scope.cancel()
    assert results == [{"committed": 42}]


# --- commands that an unmount interrupts --------------------------------------


async def test_commands_that_run_are_interrupted_and_others_refused(tmp_path: Path) -> None:
    running = RunningCommands()
    steps: list[str] = []
    both = trio.Event()

    async def repair(arguments: Message, progress: Progress) -> Message:
        with running.command(RepairRequest):
            try:
                steps.append("begun")
                if len(steps) == 2:
                    both.set()
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):  # like the call of a node
                    await trio.sleep(0.2)
                steps.append("ended")
        return {}

    async def asked() -> None:
        with pytest.raises(UnmountedError, match=r"^The repair was interrupted: "):
            await ask(tmp_path, "repair")

    async with serving(tmp_path, repair=repair):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(asked)
            nursery.start_soon(asked)
            await both.wait()
            await running.end(20)
            assert steps == ["begun", "begun", "ended", "ended"]
        with pytest.raises(UnmountedError, match="is being unmounted"):
            await ask(tmp_path, "repair")


async def test_a_command_that_does_not_end_holds_up_an_unmount_for_a_while_only() -> None:
    running, hangs = RunningCommands(), trio.Event()

    async def hang(task_status: trio.TaskStatus[None]) -> None:
        with pytest.raises(UnmountedError), running.command(StatusRequest):
            with trio.CancelScope(shield=True):
                task_status.started()
                await hangs.wait()
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        await nursery.start(hang)
        with trio.fail_after(10):
            await running.end(0.1)
        hangs.set()


async def test_a_command_that_has_its_result_is_not_interrupted() -> None:
    running, results = RunningCommands(), []

    async def finish(task_status: trio.TaskStatus[None]) -> None:
        with running.command(StatusRequest):
            with trio.CancelScope(shield=True):
                task_status.started()
                await trio.sleep(0.05)
            results.append("done")

    async with trio.open_nursery() as nursery:
        await nursery.start(finish)
        await running.end(20)
    assert results == ["done"]


# --- who may ask, how much and how long --------------------------------------


async def test_the_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with serving(tmp_path):
            mode = (tmp_path / "control.sock").stat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600
    finally:
        os.umask(before)


STRANGER = """
import os, socket, sys
os.chdir(sys.argv[1])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect("control.sock")
    try:
        connection.sendall(b'{"command": "echo"}\\n')
    except BrokenPipeError:
        pass  # refused before it asked; the answer can be read all the same
    try:
        while data := connection.recv(1000):
            os.write(1, data)
    except ConnectionResetError:
        pass  # what it asked was not even read
"""


@needs_root
async def test_a_stranger_is_refused_even_if_the_socket_lets_him_in(tmp_path: Path) -> None:
    async with serving(tmp_path):
        tmp_path.chmod(0o755)
        command = [sys.executable, "-c", STRANGER, os.fspath(tmp_path)]
        closed = await trio.run_process(command, capture_stderr=True, check=False)
        assert b"PermissionError" in closed.stderr
        (tmp_path / "control.sock").chmod(0o666)
        opened = await trio.run_process(command, capture_stdout=True)
    answer = json.loads(opened.stdout)
    assert "only root and its own user" in answer["error"]["message"]
    assert "result" not in answer


async def test_a_path_longer_than_a_sockets_address(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 100] * 5)
    deep.mkdir(parents=True)
    async with serving(deep):
        assert (deep / "control.sock").is_socket()
        assert await ask(deep, "echo", {"deep": 1}) == {"deep": 1}


async def test_a_request_is_bounded(tmp_path: Path) -> None:
    async with serving(tmp_path):
        with pytest.raises(UsageError, match="too long for a request"):
            await ask(tmp_path, "echo", {"text": "x" * REQUEST_BYTES_MAX})
    async with serving(tmp_path):
        stream = await connected(tmp_path)
        async with stream, trio.open_nursery() as nursery:

            async def flood() -> None:
                try:
                    while True:
                        await stream.send_all(b"x" * 65536)
                except trio.BrokenResourceError:
                    pass

            nursery.start_soon(flood)
            (answer,) = await lines(stream)
        assert "may have at most 1048576 bytes" in answer["error"]["message"]


async def test_a_request_just_within_the_bound(tmp_path: Path) -> None:
    text = "x" * (REQUEST_BYTES_MAX - 100)
    async with serving(tmp_path):
        assert await ask(tmp_path, "echo", {"text": text}) == {"text": text}


@pytest.mark.parametrize(
    "request_line",
    [
        b"\n",
        b"{\n",
        b"[]\n",
        b"1\n",
        b"\xff\n",
        b"[" * 10_000 + b"\n",
        b'{"arguments": {}}\n',
        b'{"command": 1}\n',
        b'{"command": "echo", "arguments": 1}\n',
    ],
)
async def test_nonsense_is_refused_in_a_sentence(tmp_path: Path, request_line: bytes) -> None:
    async with serving(tmp_path):
        async with await connected(tmp_path) as stream:
            await stream.send_all(request_line)
            (answer,) = await lines(stream)
        assert answer["error"]["kind"] == "UsageError"
        assert await ask(tmp_path, "echo") == {}


async def test_a_silent_client_is_shown_out(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(tmp_path), await connected(tmp_path) as stream:
        start = trio.current_time()
        await stream.send_all(b'{"comm')
        (answer,) = await lines(stream)
        assert "No request came within 10 seconds" in answer["error"]["message"]
        assert trio.current_time() - start == pytest.approx(10, abs=0.5)


async def test_the_number_of_clients_is_bounded(tmp_path: Path) -> None:
    async def hold(arguments: Message, progress: Progress) -> Message:
        await trio.sleep_forever()
        return {}

    async with serving(tmp_path, ControlLimits(clients=2), hold=hold):
        async with await connected(tmp_path) as one, await connected(tmp_path) as other:
            await one.send_all(b'{"command": "hold"}\n')
            await other.send_all(b'{"command": "hold"}\n')
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(FusestoreError, match="already has 2 clients"):
                await ask(tmp_path, "echo")
        await trio.testing.wait_all_tasks_blocked()
        assert await ask(tmp_path, "echo") == {}


@pytest.mark.parametrize("begun", [b"", b'{"comm'])
@pytest.mark.parametrize("count", [16, 64, 100])
async def test_silent_clients_keep_nobody_away(tmp_path: Path, count: int, begun: bytes) -> None:
    async with serving(tmp_path), AsyncExitStack() as stack:
        silent = []
        for _ in range(count):
            silent.append(await stack.enter_async_context(await connected(tmp_path)))
            await silent[-1].send_all(begun)
        await trio.testing.wait_all_tasks_blocked(0.05)
        with trio.fail_after(2):
            assert await ask(tmp_path, "echo", {"number": 1}) == {"number": 1}
            await silent[-1].send_all(b'{"command": "echo"}\n'[len(begun) :])  # it is served, too
            assert (await lines(silent[-1]))[-1] == {"result": {}}


async def test_a_client_that_does_not_listen_is_given_up(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    cancelled = trio.Event()

    async def talk(arguments: Message, progress: Progress) -> Message:
        try:
            while True:
                progress({"text": "x" * 100_000})
                await trio.sleep(1)
        finally:
            cancelled.set()

    async with serving(tmp_path, talk=talk), await connected(tmp_path) as stream:
        await stream.send_all(b'{"command": "talk"}\n')
        await cancelled.wait()


async def test_a_client_that_hangs_up_gives_its_command_up(tmp_path: Path) -> None:
    started, cancelled = trio.Event(), trio.Event()

    async def work(arguments: Message, progress: Progress) -> Message:
        started.set()
        try:
            await trio.Event().wait()
        finally:
            cancelled.set()
        return {}

    async with serving(tmp_path, work=work):
        async with await connected(tmp_path) as stream:
            await stream.send_all(b'{"command": "work"}\n')
            await started.wait()
        with trio.fail_after(10):
            await cancelled.wait()
        assert await ask(tmp_path, "echo") == {}


async def test_no_descriptor_is_left(tmp_path: Path) -> None:
    async with serving(tmp_path):
        await ask(tmp_path, "echo")
        await trio.testing.wait_all_tasks_blocked()
        gc.collect()  # what other tests left behind is not of interest here
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            await ask(tmp_path, "echo")
            (await connected(tmp_path)).socket.close()
        await trio.testing.wait_all_tasks_blocked()
        assert len(os.listdir("/proc/self/fd")) == before


# --- the lock ----------------------------------------------------------------


def a_store(path: Path) -> StoreConfig:
    """As much of a configuration as the lock needs."""
    return StoreConfig(path, uuid4(), Code(2, 1), False, path / "metadata", ())


HOLDER = """
import sys
from pathlib import Path
from fusestore.serve.control_server import lock_store
with lock_store(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def another_process(tmp_path: Path) -> Any:
    """Starts a process that holds the lock of the store in `tmp_path`."""
    children: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", HOLDER, os.fspath(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parent.parent,
        )
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def test_two_processes_never_have_a_store_open(
    tmp_path: Path, another_process: Callable[[], subprocess.Popen[str]]
) -> None:
    child = another_process()
    with pytest.raises(StoreBusyError) as found, lock_store(a_store(tmp_path).store):
        pass
    assert str(found.value) == f"{tmp_path} is in use by process {child.pid}."
    assert lock_holder(tmp_path) == child.pid
    child.communicate()
    assert lock_holder(tmp_path) is None
    with lock_store(a_store(tmp_path).store):
        assert lock_holder(tmp_path) == os.getpid()


def test_a_process_that_is_killed_loses_the_lock(
    tmp_path: Path, another_process: Callable[[], subprocess.Popen[str]]
) -> None:
    child = another_process()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert lock_holder(tmp_path) == child.pid
    with lock_store(a_store(tmp_path).store):
        pass


def test_the_lock_is_held_alone_within_a_process_too_and_is_let_go_on_errors(
    tmp_path: Path,
) -> None:
    with pytest.raises(ZeroDivisionError), lock_store(a_store(tmp_path).store):
        with pytest.raises(StoreBusyError), lock_store(a_store(tmp_path).store):
            pass
        raise ZeroDivisionError
    with lock_store(a_store(tmp_path).store):
        assert stat.S_IMODE((tmp_path / "fusestore.lock").stat().st_mode) == 0o600


def test_a_store_that_cannot_be_locked_is_one_sentence(tmp_path: Path) -> None:
    problem = pytest.raises(FusestoreError, match="cannot be opened: No such file")
    with problem, lock_store(a_store(tmp_path / "gone").store):
        pass


def test_commands_start_without_the_weight_of_the_daemon() -> None:
    code = "import sys, fusestore.cli.main, fusestore.serve.control_client; "
    code += "import fusestore.system.mounts; "
    code += "print([name for name in ('trio', 'pyfuse3', 'lmdb', 'tqdm') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    assert done.stdout == "[]\n"
