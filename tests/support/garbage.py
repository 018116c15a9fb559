"""Programs that overwrite and delete all the time; each runs until it is told to stop."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

KIB, MIB = 1 << 10, 1 << 20
MAILS = 1500
POSTGRES = Path("/usr/lib/postgresql")

Goes = Callable[[], bool]


def run(*command: str | Path, **options: object) -> str:
    """Run a command; return what it writes."""
    done = subprocess.run(
        [*map(str, command)],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return str(done.stdout)


def temporaries(top: Path, goes_on: Goes, chance: random.Random) -> None:
    """Between large files that are deleted, small ones stay."""
    number = 0
    while goes_on():
        (top / "temporary").write_bytes(chance.randbytes(1_000_000))
        (top / f"small{number % 600}").write_bytes(chance.randbytes(4096))
        (top / "temporary").unlink()
        number += 1


def overwrites(top: Path, goes_on: Goes, chance: random.Random) -> None:
    """A large file is overwritten at random."""
    with (top / "large").open("wb", buffering=0) as file:
        for _ in range(64):
            file.write(chance.randbytes(MIB))
        while goes_on():
            os.pwrite(file.fileno(), chance.randbytes(8 * KIB), chance.randrange(8192) * 8 * KIB)


def database(top: Path, goes_on: Goes, chance: random.Random) -> None:
    """SQLite, and a log beside it to which each transaction adds a line."""
    with (top / "log").open("ab", buffering=0) as log:
        base = sqlite3.connect(top / "base", isolation_level=None)
        base.execute("CREATE TABLE t (key INTEGER PRIMARY KEY, value BLOB)")
        while goes_on():
            base.execute("BEGIN")
            for _ in range(8):
                row = (chance.randrange(4000), chance.randbytes(1500))
                base.execute("INSERT OR REPLACE INTO t VALUES (?, ?)", row)
            base.execute("COMMIT")
            log.write(b"eight rows were written\n")
        assert base.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        base.close()


def mail(top: Path, goes_on: Goes, chance: random.Random) -> None:
    """A maildir: each message is synchronised, moved, and deleted some time later."""
    for name in ("tmp", "new", "cur"):
        (top / name).mkdir()
    kept: list[Path] = []
    number = 0
    while goes_on():
        number += 1
        arriving, read = top / "tmp" / str(number), top / "cur" / f"{number}:2,S"
        with arriving.open("wb") as file:
            file.write(chance.randbytes(chance.choice((2, 2, 5, 20, 200)) * KIB))
            file.flush()
            os.fsync(file.fileno())
        arriving.rename(top / "new" / str(number))
        (top / "new" / str(number)).rename(read)
        kept.append(read)
        while len(kept) > MAILS:
            kept.pop(chance.randrange(len(kept))).unlink()


def repository(top: Path, goes_on: Goes, chance: random.Random) -> None:
    """A git repository that is packed again and again."""
    git = ["git", "-C", top, "-c", "user.name=a", "-c", "user.email=a@b", "-c", "gc.auto=0"]
    run("git", "init", "--quiet", top)
    while goes_on():
        for _ in range(20):
            (top / f"file{chance.randrange(300)}").write_bytes(chance.randbytes(10_000))
        run(*git, "add", "--all")
        run(*git, "commit", "--quiet", "--message", "more")
        if chance.random() < 0.2:
            run(*git, "gc", "--quiet", "--prune=now")
        if chance.random() < 0.05:  # the history becomes garbage
            run(*git, "checkout", "--quiet", "--orphan", "new")
            run(*git, "commit", "--quiet", "--message", "first")
            run(*git, "branch", "--delete", "--force", "--quiet", "master")
            run(*git, "branch", "--move", "master")
            run(*git, "reflog", "expire", "--expire=now", "--all")
    run(*git, "fsck", "--full", "--strict")


def image(top: Path, goes_on: Goes, chance: random.Random) -> None:
    """A file system in a file: all of its blocks are written here and there."""
    file = top / "image"
    with file.open("wb") as made:
        made.truncate(384 * MIB)
    run("mkfs.ext4", "-q", "-F", file)
    with ExitStack() as stack:
        inside = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run("mount", "-o", "loop", file, inside)
        stack.callback(run, "umount", inside)
        churn(inside, goes_on, chance)
    run("e2fsck", "-fn", file)


def churn(top: Path, goes_on: Goes, chance: random.Random) -> None:
    """Random files come, change and go; at most 150 MiB, and half a gibibyte is never full."""
    names = [top / f"{number}" for number in range(200)]
    while goes_on():
        path = chance.choice(names)
        match chance.choice(("new", "write", "write", "cut", "append", "move", "delete", "sync")):
            case "new":
                path.write_bytes(chance.randbytes(chance.choice((1, 50, 700)) * KIB))
            case "write" if path.exists():
                with path.open("r+b") as file:
                    file.seek(chance.randrange(700) * KIB)
                    file.write(chance.randbytes(4 * KIB))
            case "cut" if path.exists():
                os.truncate(path, chance.randrange(700) * KIB)
            case "append" if path.exists() and path.stat().st_size < MIB:
                with path.open("ab") as file:
                    file.write(chance.randbytes(20 * KIB))
            case "move" if path.exists():
                path.rename(chance.choice(names))
            case "delete":
                path.unlink(missing_ok=True)
            case "sync":
                os.sync()


def postgres(top: Path, goes_on: Goes, chance: random.Random) -> None:
    """PostgreSQL under pgbench."""
    programs = max(POSTGRES.iterdir(), key=lambda path: int(path.name)) / "bin"
    data, port = top / "postgres", str(50_000 + chance.randrange(10_000))

    def as_user(*command: str | Path) -> str:
        return run("runuser", "-u", "postgres", "--", *command, cwd="/")

    with ExitStack() as stack:
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data.mkdir()
        for path in data.parents:  # those of the test are its own
            if not path.stat().st_mode & 1:
                path.chmod(path.stat().st_mode | 1)
        for path in (data, sockets):
            shutil.chown(path, "postgres")
        options = f"-p {port} -k {sockets} -c listen_addresses= -c max_wal_size=128MB"
        at = ("-h", sockets, "-p", port)
        data.chmod(0o700)
        as_user(programs / "initdb", "-D", data, "-A", "trust")
        log = sockets / "log"
        as_user(programs / "pg_ctl", "-D", data, "-o", options, "-l", log, "-w", "start")
        stack.callback(as_user, programs / "pg_ctl", "-D", data, "-m", "fast", "stop")
        as_user("pgbench", *at, "-i", "-q", "-s", "10", "postgres")
        while goes_on():
            as_user("pgbench", *at, "-c", "4", "-T", "10", "postgres")
        as_user("psql", *at, "-c", "SELECT sum(abalance) FROM pgbench_accounts", "postgres")
