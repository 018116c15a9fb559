"""The command line: what it prints, its exit statuses, and daemons that fail in every way.

The daemons here are fakes, put in place of `fusestore.serve.daemon` in the processes
that `mount` starts: they show what the command makes of good ones and bad ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result

from fusestore.cli.asking import ANY_PATH
from fusestore.cli.errors import EXIT_STATUS, FAILED
from fusestore.cli.inspect import layout_lines
from fusestore.cli.main import cli
from fusestore.cli.repair import repair_line
from fusestore.cli.status import StoreView, dead_mount, status_lines
from fusestore.config.mkfs import make_store
from fusestore.config.mount_options import MountOptions
from fusestore.config.store_config import load
from fusestore.errors import (
    ConfigError,
    FusestoreError,
    NotDurableError,
    NotHealthyError,
    StoreBusyError,
    UsageError,
)
from fusestore.serve.control_client import ControlClient, Message, Progress
from fusestore.serve.control_server import ControlServer, Handler, lock_store
from fusestore.serve.launch import prepare_mountpoint
from fusestore.serve.messages.files import LayoutResult
from fusestore.serve.messages.safety import RepairDone
from fusestore.system import mounts
from fusestore.text import bytes_text, counted
from fusestore.typed_json import from_json
from fusestore.watch.fields import Status

REPOSITORY = Path(__file__).resolve().parent.parent


def run(*arguments: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store that was just made."""
    return make_store(tmp_path / "store").store


# --- help, version, completion, exit statuses --------------------------------

COMMANDS = list(cli.commands)


def test_help_teaches() -> None:
    text = run("--help").output
    assert all(command in text for command in COMMANDS)
    assert "fusestore mount ~/store ~/files" in text
    for line in [
        "0  the command succeeded",
        "1  the command ran",
        "2  the arguments",
        "3  the command failed",
    ]:
        assert line in text


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_an_example(command: str) -> None:
    assert f"fusestore {command} " in run(command, "--help").output


def test_version() -> None:
    assert run("--version").output.startswith("fusestore 0.")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    assert "_FUSESTORE_COMPLETE" in run("completion", shell).output


def test_completion_completes() -> None:
    environment = {"_FUSESTORE_COMPLETE": "bash_complete", "COMP_WORDS": "fusestore mo"}
    done = subprocess.run(
        [sys.executable, "-m", "fusestore"],
        env={**os.environ, **environment, "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "plain,mount\n"


def test_exit_statuses() -> None:
    kinds = [NotHealthyError, UsageError, ConfigError, StoreBusyError, FusestoreError]
    assert [EXIT_STATUS.get(kind, FAILED) for kind in kinds] == [1, 2, 2, 3, 3]


def test_an_error_is_one_sentence_on_standard_error(tmp_path: Path) -> None:
    result = run("status", tmp_path)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"fusestore: {tmp_path} is not a store")
    assert result.stderr.count("\n") == 1


# --- how a command is started, and how it ends --------------------------------


def shell(command: str, **names: object) -> subprocess.CompletedProcess[str]:
    """Run a line of shell, in which $FUSESTORE is the program."""
    program = f"{shlex.quote(sys.executable)} -P -m fusestore"
    variables = {name: str(value) for name, value in names.items()}
    return subprocess.run(
        ["bash", "-c", command.replace("$FUSESTORE", program)],
        env={**os.environ, "PYTHONPATH": os.fspath(REPOSITORY), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("streams", [">&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_closed_and_full_streams_change_no_exit_status(store: Path, streams: str) -> None:
    done = shell(f"$FUSESTORE status nothing {streams}; echo $?", S=store)
    assert done.stdout == "2\n"
    export = shell(f'$FUSESTORE metrics export "$S" {streams}; echo $?', S=store)
    assert export.stdout == ("3\n" if "full" in streams else "0\n")


def test_a_reader_that_has_seen_enough_does_not_make_a_store_unhealthy(store: Path) -> None:
    first = shell('set -o pipefail; $FUSESTORE status "$S" | head -1; echo $?', S=store)
    assert first.stdout.startswith("All data is safe")
    assert (first.stdout.endswith("\n0\n"), first.stderr) == (True, "")
    unread = shell('($FUSESTORE status "$S" >&7; echo $? >&2) 7> >(exec true)', S=store)
    assert unread.stderr in ("141\n", "0\n")  # not 1, and no complaint


@pytest.mark.parametrize("command", ["--help", "status --help", "version"])
def test_help_on_a_full_disk_is_one_sentence(command: str) -> None:
    done = shell(f"$FUSESTORE {command} >/dev/full; echo $? >&2")
    assert done.stderr == "fusestore: No space left on device\n3\n"


def test_ctrl_c_while_a_store_is_worked_on_is_no_traceback(store: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.fspath(REPOSITORY)}
    program = """
import os, signal, sys, trio
from fusestore.cli.main import main
from fusestore.repair import scrub
async def interrupted(self, *arguments, **named):
    async with trio.open_nursery():
        os.kill(os.getpid(), signal.SIGINT)
        print("goes on to the next checkpoint")
        await trio.sleep_forever()
scrub.Scrubber.command = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "scrub", store, "start", "--wait"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 130
    assert done.stdout == "goes on to the next checkpoint\n"
    assert done.stderr == "fusestore: interrupted\n"


def test_no_name_moves_the_cursor(tmp_path: Path) -> None:
    store = make_store(Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\x1b[31m\n\xff"))).store
    done = run("status", store)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "a\\x1b[31m\\n\\udcff (" in done.stdout
    assert "a\\x1b[31m\\n\\udcff/x is not a store" in run("status", store / "x").stderr


def test_metadata_that_cannot_be_there_is_a_sentence(store: Path) -> None:
    (store / "metadata").rmdir()
    (store / "metadata").touch()
    done = run("status", store)
    reason = f"fusestore: The metadata in {store / 'metadata'} cannot be opened: File exists.\n"
    assert (done.exit_code, done.stderr) == (3, reason)


def test_a_path_that_is_given_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(path: object) -> None:
        raise AssertionError

    monkeypatch.setattr(os, "stat", hangs)
    assert ANY_PATH.convert("mnt", None, None) == Path("mnt")


@pytest.mark.parametrize("name", ["a b", "-a", "it's"])
def test_what_mkfs_says_to_do_can_be_done(tmp_path: Path, name: str) -> None:
    done = shell('cd "$TOP" && $FUSESTORE mkfs -- "$NAME"', TOP=tmp_path, NAME=name)
    command = shlex.split(done.stdout.splitlines()[1].partition("directory: ")[2])
    assert tmp_path / command[2] == tmp_path / name


# --- mkfs --------------------------------------------------------------------


def test_mkfs_takes_regions_code_and_metadata(tmp_path: Path) -> None:
    result = run(
        *("mkfs", tmp_path / "s", "--code", "4+2", "--metadata", tmp_path / "m"),
        *("--region", f"a={tmp_path}/x=y", "--region", "b", "--region", "c"),
    )
    assert result.exit_code == 0, result.output
    config = load(tmp_path / "s")
    assert str(config.code) == "4+2"
    assert config.metadata == tmp_path / "m"
    assert config.node("a").path == tmp_path / "x=y"
    assert config.node("b").path == tmp_path / "s" / "b"


def test_mkfs_of_every_code_that_is_promised(tmp_path: Path) -> None:
    for code in ["2+1", "4+2", "6+3", "1+2"]:
        assert run("mkfs", tmp_path / code, "--code", code).exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--code", "3+1"],
        ["--code", "x"],
        ["--code", "1+0"],
        ["--region", "a/b"],
        ["--region", "a="],
    ],
)
def test_mkfs_refuses_with_exit_status_2(tmp_path: Path, arguments: list[str]) -> None:
    assert run("mkfs", tmp_path / "s", *arguments).exit_code == 2
    assert not (tmp_path / "s").exists()


def test_mkfs_of_an_unsafe_code_if_asked_to(tmp_path: Path) -> None:
    assert run("mkfs", tmp_path / "s", "--code", "1+0", "--allow-unsafe").exit_code == 0
    assert load(tmp_path / "s").allow_unsafe


# --- numbers ------------------------------------------------------------------


def test_nouns_agree_with_their_numbers() -> None:
    assert [counted(n, "file") for n in (0, 1, 2, 2000)] == [
        "0 files",
        "1 file",
        "2 files",
        "2,000 files",
    ]
    assert counted(1, "loss", "losses") == "1 loss"
    assert counted(3, "stripe lacks", "stripes lack") == "3 stripes lack"


NEVER_ONE = ("files with the names of journal segments", "shards are too few")


@pytest.mark.parametrize("package", ["fusestore", "nodes"])
def test_no_text_counts_by_hand(package: str) -> None:
    """A number before a plural that may be 1; limits and what is named twice are no counts."""
    nouns = "files|regions|stripes|findings|shards|rows|segments|commits|operations|extents"
    by_hand = re.compile(rf"\{{(?:[^{{}}]*:,|len\([^{{}}(]*\))\}} ({nouns})\b|%d ({nouns})\b")
    found = [
        f"{path}: {line.strip()}"
        for path in (REPOSITORY / package).rglob("*.py")
        if "bench" not in path.parts
        for line in path.read_text().splitlines()
        if by_hand.search(line) and not any(text in line for text in NEVER_ONE)
    ]
    assert found == [], found


# --- mountinfo ---------------------------------------------------------------

MOUNTINFO = (
    b"22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
    b"40 22 0:50 / /mnt/a\\040b\\134c\\011d\\012e\xff rw,nosuid,noatime shared:2 master:3 - "
    b"fuse.fusestore /srv/my%20store%2C100%25%FF rw,user_id=0,group_id=0\n"
    b"41 22 0:51 / /mnt/other rw - fuse.sshfs host:/x rw\n"
    b"42 22 0:1500 / /mnt/plain ro - fuse.fusestore /srv/a\\040store rw\n"
    b"43 22 0:53 / /mnt/- rw - fuse.fusestore - rw\n"
    b"nonsense\n"
)


def test_mountinfo_with_odd_names() -> None:
    first, second, third = mounts.parse_mountinfo(MOUNTINFO)
    assert os.fsencode(first.mountpoint) == b"/mnt/a b\\c\td\ne\xff"
    assert os.fsencode(first.store) == b"/srv/my store,100%\xff"
    assert first.device == os.makedev(0, 50)
    assert first.options == ("rw", "nosuid", "noatime")
    assert second.store == Path("/srv/a store")
    assert second.device == os.makedev(0, 1500)
    assert third.mountpoint == Path("/mnt/-")


def test_a_store_of_any_name_is_a_source_of_plain_characters() -> None:
    for name in [b"/srv/store", b"/a b,c\\d%20\xff\xc3\xa4\n\t#x", bytes(range(1, 256))]:
        source = mounts.source_of(Path(os.fsdecode(name)))
        assert source.isascii()
        assert source.isprintable()
        assert "," not in source
        assert "\\" not in source
        escaped = source.encode().replace(b" ", b"\\040").replace(b"#", b"\\043")
        line = b"1 2 0:3 / /m rw - fuse.fusestore " + escaped + b" rw\n"
        (mount,) = mounts.parse_mountinfo(line)
        assert os.fsencode(mount.store) == os.fsencode(Path(os.fsdecode(name)))
    assert mounts.source_of(Path("/srv/a-b_c.d/~x")) == "/srv/a-b_c.d/~x"


def test_what_is_not_mounted(tmp_path: Path) -> None:
    assert mounts.find(tmp_path) is None
    assert mounts.containing(tmp_path) is None
    assert not mounts.clear_dead(tmp_path)
    assert not mounts.is_dead(tmp_path)
    with pytest.raises(UsageError, match="No store is mounted"):
        mounts.unmount(tmp_path)
    result = run("umount", tmp_path)
    assert (result.exit_code, result.stderr) == (
        2,
        f"fusestore: No store is mounted on {tmp_path}.\n",
    )


def test_a_probe_says_what_stat_says(tmp_path: Path) -> None:
    assert mounts.probe(tmp_path) == mounts.Answer(0, tmp_path.stat().st_dev)
    assert mounts.probe(tmp_path / "none") == mounts.Answer(2, 0)


def test_a_probe_that_hangs_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_PROBE", "import sys; sys.stdin = open('/dev/zero'); input()")
    assert mounts.probe(tmp_path, 0.05) is None


def test_the_users_of_a_directory_are_found(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w"):
        assert (os.getpid(), Path("/proc/self/comm").read_text().strip()) in mounts.users_of(
            tmp_path
        )
    assert mounts.users_of(tmp_path) == []


# --- where a store may be mounted --------------------------------------------


def test_mountpoints_that_are_refused(tmp_path: Path, store: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full" / "x").mkdir(parents=True)
    (store / "mnt").mkdir()
    (tmp_path / "link").symlink_to(store / "us-east-1")
    for place, reason in [
        (tmp_path / "none", "is not a directory"),
        (tmp_path / "file", "is not a directory"),
        (tmp_path / "full", "is not empty"),
        (store / "mnt", "inside the store"),
        (store, "inside the store"),
        (tmp_path / "link", "inside the store"),
        (tmp_path, "would hide the store"),
    ]:
        result = run("mount", store, place)
        assert result.exit_code == 2, place
        assert reason in result.stderr
    options = MountOptions(nonempty=True)
    assert prepare_mountpoint(load(store), tmp_path / "full", options) == tmp_path / "full"


def test_a_mountpoint_inside_a_region_elsewhere_is_refused(tmp_path: Path) -> None:
    regions = [("x", tmp_path / "disk"), ("y", None), ("z", None)]
    config = make_store(tmp_path / "s", regions, metadata=tmp_path / "meta")
    for part in ["disk/journal", "meta"]:
        result = run("mount", config.store, tmp_path / part)
        assert result.exit_code == 2
        assert "lies inside its" in result.stderr


def test_unknown_options_are_wrong_use(tmp_path: Path, store: Path) -> None:
    result = run("mount", store, tmp_path, "-o", "ro,max_read=4")
    assert result.exit_code == 2
    assert "no mount option 'max_read=4'" in result.stderr


# --- commands to a daemon ----------------------------------------------------

NO_SCRUB = {
    "state": "never",
    "position": "",
    "end": "",
    "rate": None,
    "started": 0,
    "finished": 0,
    "stripes": 0,
    "total": 0,
    "shards": 0,
    "size": 0,
    "skipped": 0,
    "found": 0,
    "left": 0,
    "unread": 0,
    "problem": "",
    "eta_seconds": None,
}
STATUS: dict[str, Any] = {
    "summary": "All data is safe.",
    "healthy": True,
    "store": "/s",
    "uuid": "u",
    "code": "2+1",
    "files": 12345,
    "bytes": 6_000_000_000,
    "stripes": 5723,
    "last_commit": 88,
    "checkpoint": 80,
    "unsafe_codes": [],
    "regions_borne": 1,
    "readable": True,
    "read_only": False,
    "error": "",
    "metadata_error": "",
    "bytes_total": 24_000_000_000,
    "bytes_free": 18_000_000_000,
    "full": "",
    "last_commit_at": None,
    "uncommitted_bytes": 0,
    "epoch": 3,
    "metadata_bytes": 1_000_000,
    "degraded_reads": 0,
    "failed_reads": 0,
    "rows_mended": 0,
    "rows_in_doubt": 0,
    "lost_bytes": 0,
    "stripes_put_back": 0,
    "repair": None,
    "repairs": [],
    "scrub": NO_SCRUB,
    "nodes": [
        {
            "name": name,
            "region": name,
            "path": f"/srv/{name}",
            "weight": 1.0,
            "draining": False,
            "state": "up",
            "in_sync": True,
            "error": "",
            "bytes_used": 3_000_000_000,
            "bytes_free": 9_000_000_000,
            "bytes_total": 12_000_000_000,
            "missing_shards": 0,
            "checksum_failures": 0,
        }
        for name in ("us-east-1", "us-west-1", "eu-west-1")
    ],
}
MOUNT = {
    "mounted": True,
    "mounted_at": 1e9,
    "mountpoint": "/mnt",
    "pid": 7,
    "metrics": None,
    "options": "",
}


def a_command(answer: Message | FusestoreError) -> Handler:
    """A handler that tells of some progress and then gives this answer."""

    async def handler(arguments: Message, progress: Progress) -> Message:
        progress({"phase": "shards", "done": 1, "total": 2})
        if isinstance(answer, FusestoreError):
            raise answer
        return answer

    return handler


@pytest.fixture
def daemon() -> Iterator[Callable[..., None]]:
    """Starts a control server in a thread, with the given answers."""
    with contextlib.ExitStack() as ends:

        def start(directory: Path, **answers: Message | FusestoreError) -> None:
            handlers = {name: a_command(answer) for name, answer in answers.items()}
            listening = threading.Event()
            scope = trio.CancelScope()
            tokens: list[trio.lowlevel.TrioToken] = []

            async def serve() -> None:
                tokens.append(trio.lowlevel.current_trio_token())
                with scope:
                    async with trio.open_nursery() as nursery:
                        await nursery.start(ControlServer(handlers).serve, directory)
                        listening.set()

            thread = threading.Thread(target=trio.run, args=(serve,))
            thread.start()
            ends.callback(thread.join)
            assert listening.wait(10)
            ends.callback(lambda: tokens[0].run_sync_soon(scope.cancel))

        yield start


def test_status_of_a_mounted_store(store: Path, daemon: Callable[..., None]) -> None:
    daemon(store, status={**STATUS, **MOUNT, "told by a newer daemon": 1})
    result = run("status", store, "--json")
    assert result.exit_code == 0
    status = json.loads(result.stdout)
    assert status == {**STATUS, **MOUNT, "dead_mount": None, "log_file": status["log_file"]}
    text = run("status", store).stdout.splitlines()
    assert text[0] == "All data is safe: every node is up, and any one region may be lost."
    assert len(text) < 24
    assert any("12,345, 5.6 GiB" in line for line in text)


def test_status_that_is_not_healthy(store: Path, daemon: Callable[..., None]) -> None:
    bad = {"state": "down", "missing_shards": 7, "error": "There is no directory /srv/us-east-1."}
    nodes = [{**STATUS["nodes"][0], **bad}, *STATUS["nodes"][1:]]
    daemon(store, status={**STATUS, **MOUNT, "healthy": False, "nodes": nodes})
    result = run("status", store, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["healthy"] is False
    text = run("status", store)
    assert text.exit_code == 1
    first, second, *_ = text.stdout.splitlines()
    assert first == "Not healthy: us-east-1 is not up; 7 shards are missing."
    assert second == "  us-east-1: There is no directory /srv/us-east-1."


@pytest.mark.parametrize("error", [NotDurableError("No space is left."), FusestoreError("Odd.")])
def test_a_status_that_fails_is_json_all_the_same(
    store: Path, daemon: Callable[..., None], error: FusestoreError
) -> None:
    daemon(store, status=error)
    result = run("status", store, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == {"healthy": False, "error": str(error)}
    assert result.stderr == f"fusestore: {error}\n"


def test_the_status_of_no_store_is_json_all_the_same(tmp_path: Path) -> None:
    result = run("status", tmp_path, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["healthy"] is False


PLAN = {
    "node": "us-east-1",
    "path": "/srv/us-east-1",
    "stripes": 1300,
    "weak_stripes": 2,
    "shards_to_rebuild": 1234,
    "bytes_to_rebuild": 600_000_000,
    "bytes_to_check": 0,
    "hopeless_shards": 1,
    "reads": {"us-west-1": 600_000_000},
}


def test_repair_says_what_it_will_do_and_what_it_did(
    store: Path, daemon: Callable[..., None]
) -> None:
    done = {
        "plan": PLAN,
        "node": "us-east-1",
        "shards_copied": 0,
        "shards_rebuilt": 1234,
        "bytes": 600_000_000,
        "seconds": 2.0,
        "away": [],
        "stripes_lost": 0,
        "unrepairable": [],
    }
    daemon(store, repair=done)
    result = run("repair", store, "us-east-1", "--quiet")
    assert result.exit_code == 0
    assert "1,300 stripes, 0 B to check, 1,234 shards (572.2 MiB) to rebuild" in result.stdout
    assert "572.2 MiB from us-west-1" in result.stdout
    assert "1 shard cannot be rebuilt" in result.stdout
    assert "1,234 shards rebuilt and checked, 572.2 MiB in 2.0 s (300.0 MB/s)" in result.stdout
    assert result.stderr == ""
    assert json.loads(run("repair", store, "us-east-1", "--json").stdout) == done


def test_what_cannot_be_repaired_is_named(store: Path, daemon: Callable[..., None]) -> None:
    lost = [f"a/{i}" for i in range(30)]
    done = {"node": "us-east-1", "shards_copied": 0, "shards_rebuilt": 0, "bytes": 0}
    daemon(
        store,
        repair={
            "plan": PLAN,
            **done,
            "seconds": 0.0,
            "away": ["eu-west-1"],
            "stripes_lost": 30,
            "unrepairable": lost,
        },
    )
    result = run("repair", store, "us-east-1")
    assert result.exit_code == 1
    assert "30 files cannot be repaired while eu-west-1 cannot be read" in result.stdout
    assert "not repaired: a/0\n" in result.stderr
    assert "and 10 more" in result.stderr


def test_repair_of_an_unknown_node_is_wrong_use(store: Path) -> None:
    result = run("repair", store, "mars")
    assert result.exit_code == 2
    assert "its nodes are us-east-1, us-west-1, eu-west-1" in result.stderr


@pytest.mark.parametrize(
    "command", [["inspect"], ["policy", "get"], ["policy", "clear"], ["policy", "set"]]
)
def test_files_that_are_not_on_a_mount(tmp_path: Path, command: list[str]) -> None:
    code = ["2+1"] if command[-1] == "set" else []
    result = run(*command, tmp_path, *code)
    assert result.exit_code == 2
    assert "is not on a mount of a store" in result.stderr
    assert run(*command, tmp_path / "none", *code).exit_code == 2


def test_policy_of_no_code(tmp_path: Path) -> None:
    result = run("policy", "set", tmp_path, "two")
    assert result.exit_code == 2
    assert "is not a code" in result.stderr


# --- text --------------------------------------------------------------------


def test_sizes_read_well() -> None:
    sizes = [0, 1023, 1024, 1536, 1024**2 - 1, 1024**3, 5 * 1024**5, 3 * 1024**6]
    texts = ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "1.0 GiB", "5.0 PiB", "3072.0 PiB"]
    assert [bytes_text(size) for size in sizes] == texts


def test_unsafe_codes_stay_loud() -> None:
    status = from_json(Status, {**STATUS, "unsafe_codes": ["1+0"]})
    first = next(status_lines(StoreView(status, None, None)))
    assert "1+0 does not survive the loss of a region" in first


def test_a_layout_as_a_table() -> None:
    layout = {
        "code": "2+1",
        "size": 1048676,
        "extents": [
            {"offset": 0, "length": 1048576, "stripe": 7, "stripe_offset": 0},
            {"offset": 1048576, "length": 100, "stripe": 8, "stripe_offset": 64},
        ],
        "stripes": {
            "7": {
                "length": 1048576,
                "shard_length": 524288,
                "state": "sealed",
                "shards": [
                    {
                        "index": 0,
                        "node": "us-east-1",
                        "segment": "shards/00000001.seg",
                        "offset": 192,
                        "length": 524288,
                    }
                ],
            },
            "8": {"length": 164, "shard_length": 0, "state": "open", "shards": []},
        },
    }
    text = list(layout_lines("letter", from_json(LayoutResult, layout)))
    assert text[0] == "letter: 1.0 MiB, code 2+1, 2 extents in 2 stripes"
    assert text[1] == "All shards are present; 1 stripe is still open."
    assert any("us-east-1  shards/00000001.seg     192  524288" in line for line in text)


def test_a_repair_in_no_time() -> None:
    done = RepairDone("n", 0, 0, 0, 0.0, (), 0, ())
    assert repair_line("n", done) == "n: 0 shards rebuilt and checked, 0 B in 0.0 s (0.0 MB/s)."


# --- good daemons and bad ones -----------------------------------------------

FAKE = """
import os, stat, sys, types
import trio

async def serve(config, mountpoint, options, on_ready):
    from fusestore import errors
    mode = os.environ["FAKE_DAEMON"]
    if mode == "refuses":
        raise errors.StoreBusyError("The store is in use by process 7.")
    if mode == "dies":
        os._exit(9)
    if mode == "crashes":
        raise ZeroDivisionError
    if mode == "lies":
        on_ready([])
        await trio.sleep_forever()
    await mounted(config, mountpoint, options, on_ready, mode)

async def mounted(config, mountpoint, options, on_ready, mode):
    import pyfuse3
    from fusestore import errors
    from fusestore.serve.control_server import ControlServer, lock_store
    from fusestore.system import mounts

    class Null(pyfuse3.Operations):
        async def getattr(self, ino, ctx=None):
            entry = pyfuse3.EntryAttributes()
            entry.st_ino, entry.st_mode, entry.st_nlink = 1, stat.S_IFDIR | 0o755, 2
            return entry
        async def statfs(self, ctx):
            return pyfuse3.StatvfsData()
        async def opendir(self, ino, ctx):
            return 1
        async def readdir(self, fh, start, token):
            pass

    stopped = trio.Event()
    stopping = trio.Event()

    async def stop(arguments, progress):
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(mounts.unmount, mountpoint)
            stopping.set()
            await stopped.wait()
        if mode == "cannot commit":
            raise errors.NotDurableError("The last commit failed.")
        return {}

    async def run_fuse():
        await pyfuse3.main()
        stopping.set()

    with lock_store(config.store):
        source = "fsname=" + mounts.source_of(config.store)
        pyfuse3.init(Null(), str(mountpoint),
            {"default_permissions", source, "subtype=fusestore", *options.kernel})
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(ControlServer({"stop": stop}).serve, config.store)
                nursery.start_soon(run_fuse)
                if mode == "dies mounted":
                    os._exit(9)
                if mode == "never ready":
                    await trio.sleep_forever()
                on_ready(["us-east-1 is not there."] if mode == "warns" else [])
                await stopping.wait()
                stopped.set()
                nursery.cancel_scope.cancel()
        finally:
            pyfuse3.close(unmount=True)

module = types.ModuleType("fusestore.serve.daemon")
module.serve = serve
sys.modules["fusestore.serve.daemon"] = module
"""


class Fakes:
    """Runs the command line with a fake daemon of a given kind."""

    def __init__(self, store: Path, mountpoint: Path, directory: Path) -> None:
        self.store, self.mountpoint = store, mountpoint
        directory.mkdir()
        (directory / "sitecustomize.py").write_text(FAKE)
        self._path = os.pathsep.join([os.fspath(directory), os.fspath(REPOSITORY)])

    def run(self, *arguments: object, kind: str = "good") -> subprocess.CompletedProcess[str]:
        """Run a command in a process of its own."""
        child = self.start(*arguments, kind=kind)
        output, complaint = child.communicate(timeout=120)
        return subprocess.CompletedProcess(child.args, child.returncode, output, complaint)

    def start(self, *arguments: object, kind: str = "good") -> subprocess.Popen[str]:
        """Start a command in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "fusestore", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": self._path, "FAKE_DAEMON": kind},
        )

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a line of shell, in which $S and $M are the store and the mount point."""
        names = {"S": self.store, "M": self.mountpoint, "PYTHONPATH": self._path}
        return shell(command, FAKE_DAEMON="good", **names)

    def mount(self, *options: str, kind: str = "good") -> subprocess.CompletedProcess[str]:
        """`fusestore mount`."""
        return self.run("mount", self.store, self.mountpoint, *options, kind=kind)

    def kill(self) -> int:
        """Kill the daemon; returns its number."""
        pid = ControlClient(self.store).daemon()
        daemon = os.pidfd_open(pid)
        os.kill(pid, 9)
        with open(daemon):
            select.select([daemon], [], [])
        return pid

    def nothing_is_left(self) -> bool:
        """No mount, and nobody who has the store."""
        with lock_store(load(self.store).store):
            return mounts.find(self.mountpoint) is None


@pytest.fixture
def fakes(tmp_path: Path, store: Path) -> Iterator[Fakes]:
    """A store, a mount point and fake daemons; ends what a test leaves."""
    mountpoint = tmp_path / "mnt ä"
    mountpoint.mkdir()
    fakes = Fakes(store, mountpoint, tmp_path / "fake")
    yield fakes
    with contextlib.suppress(FusestoreError):
        fakes.kill()
    mounts.clear_dead(mountpoint)


@pytest.mark.mounted
def test_mount_returns_when_the_mount_answers_and_umount_when_the_daemon_is_gone(
    fakes: Fakes,
) -> None:
    mounted = fakes.mount()
    assert (mounted.returncode, mounted.stdout, mounted.stderr) == (0, "", "")
    assert os.path.ismount(fakes.mountpoint)
    with open(os.pidfd_open(ControlClient(fakes.store).daemon())) as daemon:
        unmounted = fakes.run("umount", fakes.mountpoint)
        assert (unmounted.returncode, unmounted.stdout, unmounted.stderr) == (0, "", "")
        assert not os.path.ismount(fakes.mountpoint)
        assert select.select([daemon], [], [], 0)[0], "the daemon still runs"
    assert fakes.nothing_is_left()


@pytest.mark.mounted
def test_a_mount_without_standard_streams_is_like_any_other(fakes: Fakes) -> None:
    command = '$FUSESTORE mount "$S" "$M" <&- >&- 2>&-; echo $?'
    assert fakes.shell(command).stdout == "0\n"
    pid = ControlClient(fakes.store).daemon()
    log_file = str(fakes.store / "fusestore.log")
    assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)] == [
        *("/dev/null", log_file, log_file)
    ]
    assert fakes.run("umount", fakes.mountpoint).returncode == 0


@pytest.mark.mounted
def test_the_daemon_holds_nothing_that_it_inherited(fakes: Fakes) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    try:
        assert fakes.mount().returncode == 0
        pid = ControlClient(fakes.store).daemon()
        places = {}
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                places[fd] = os.readlink(f"/proc/{pid}/fd/{fd}")
        log_file = str(fakes.store / "fusestore.log")
        assert [places[fd] for fd in "012"] == ["/dev/null", log_file, log_file]
        assert f"pipe:[{os.fstat(reading).st_ino}]" not in places.values()
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert os.getsid(pid) == pid
    finally:
        os.close(reading)
        os.close(writing)
    assert fakes.run("umount", fakes.mountpoint).returncode == 0


@pytest.mark.mounted
def test_a_degraded_store_mounts_with_a_warning(fakes: Fakes) -> None:
    mounted = fakes.mount(kind="warns")
    assert mounted.returncode == 0
    assert mounted.stderr == "fusestore: warning: us-east-1 is not there.\n"


@pytest.mark.mounted
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("refuses", "The store is in use by process 7."),
        ("dies", "The daemon ended with status 9 before it was ready: see "),
        ("dies mounted", "The daemon ended with status 9 before it was ready: see "),
        ("crashes", "The daemon ended with status 3 before it was ready: see "),
        ("lies", "The daemon reports that it is ready, but "),
    ],
)
def test_never_mounted_and_dead(fakes: Fakes, kind: str, reason: str) -> None:
    result = fakes.mount(kind=kind)
    assert result.returncode == 3
    assert result.stderr.startswith(f"fusestore: {reason}")
    assert result.stderr.count("\n") == 1
    assert fakes.nothing_is_left()
    if kind == "crashes":
        assert "ZeroDivisionError" in (fakes.store / "fusestore.log").read_text()


@pytest.mark.mounted
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_mount_that_is_interrupted_ends_its_daemon(
    fakes: Fakes, number: signal.Signals, status: int
) -> None:
    child = fakes.start("mount", fakes.store, fakes.mountpoint, kind="never ready")
    while mounts.find(fakes.mountpoint) is None and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(number)
    output, complaint = child.communicate(timeout=60)
    assert child.returncode == status, output + complaint
    assert fakes.nothing_is_left()


@pytest.mark.mounted
def test_a_second_mount_is_refused_in_one_sentence(fakes: Fakes, tmp_path: Path) -> None:
    assert fakes.mount().returncode == 0
    again = fakes.mount()
    assert again.returncode == 3
    assert again.stderr == f"fusestore: This store is already mounted on {fakes.mountpoint}.\n"
    (tmp_path / "elsewhere").mkdir()
    second = fakes.run("mount", fakes.store, tmp_path / "elsewhere")
    assert second.returncode == 3
    pid = ControlClient(fakes.store).daemon()
    assert second.stderr == f"fusestore: {fakes.store} is in use by process {pid}.\n"
    assert fakes.run("umount", fakes.mountpoint).returncode == 0


@pytest.mark.mounted
def test_a_dead_mount_is_cleared_by_the_next_mount(fakes: Fakes) -> None:
    assert fakes.mount().returncode == 0
    fakes.kill()
    assert mounts.is_dead(fakes.mountpoint)
    assert dead_mount(load(fakes.store)) == str(fakes.mountpoint)
    result = fakes.mount()
    assert result.returncode == 0, result.stderr
    assert "cleared the mount that a dead daemon left" in result.stderr
    assert fakes.run("umount", fakes.mountpoint).returncode == 0


@pytest.mark.mounted
def test_a_dead_mount_of_another_store_is_not_touched(fakes: Fakes, tmp_path: Path) -> None:
    assert fakes.mount().returncode == 0
    fakes.kill()
    make_store(tmp_path / "other")
    result = fakes.run("mount", tmp_path / "other", fakes.mountpoint)
    assert result.returncode == 2
    assert f"clear it with `fusestore umount {fakes.mountpoint}`" in result.stderr
    assert mounts.is_dead(fakes.mountpoint)


@pytest.mark.mounted
def test_umount_of_a_dead_mount_clears_it_and_says_so(fakes: Fakes) -> None:
    assert fakes.mount().returncode == 0
    fakes.kill()
    result = fakes.run("umount", fakes.mountpoint)
    assert result.returncode == 1
    assert "had died: the mount is cleared" in result.stderr
    assert fakes.nothing_is_left()


@pytest.mark.mounted
def test_a_busy_mount_names_who_uses_it_and_stays(fakes: Fakes) -> None:
    assert fakes.mount().returncode == 0
    with subprocess.Popen(["sleep", "60"], cwd=fakes.mountpoint) as user:
        while "sleep" not in Path(f"/proc/{user.pid}/comm").read_text():
            time.sleep(0.01)
        result = fakes.run("umount", fakes.mountpoint)
        user.kill()
    assert result.returncode == 3
    assert f"{fakes.mountpoint} is busy: in use by sleep (process {user.pid})" in result.stderr
    assert os.path.ismount(fakes.mountpoint)
    assert fakes.run("umount", fakes.mountpoint).returncode == 0


@pytest.mark.mounted
def test_a_last_commit_that_fails_is_told(fakes: Fakes) -> None:
    assert fakes.mount(kind="cannot commit").returncode == 0
    result = fakes.run("umount", fakes.mountpoint)
    assert result.returncode == 3
    assert result.stderr == "fusestore: The last commit failed.\n"
    assert fakes.nothing_is_left()


@pytest.mark.mounted
def test_a_foreground_daemon_logs_to_standard_error(fakes: Fakes) -> None:
    result = fakes.mount("--foreground", "--log-format", "json", kind="refuses")
    assert result.returncode == 3
    assert result.stderr == "fusestore: The store is in use by process 7.\n"
    assert not (fakes.store / "fusestore.log").exists()


@pytest.mark.mounted
def test_a_daemon_that_does_not_listen_is_unmounted_all_the_same(fakes: Fakes) -> None:
    assert fakes.mount().returncode == 0
    (fakes.store / "control.sock").unlink()
    result = fakes.run("umount", fakes.mountpoint)
    assert (result.returncode, result.stderr) == (0, "")
    assert fakes.nothing_is_left()
