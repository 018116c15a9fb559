"""Recovery as the command does it, and stores that lose their metadata."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from click.testing import CliRunner
from xxhash import xxh3_64_intdigest

from fusestore.cli import rescue
from fusestore.config.owner_record import OWNER_NAME
from fusestore.config.store_config import StoreConfig
from fusestore.format.records import Header, Place, SegmentKind, records
from fusestore.rescue.recover import recover
from support.mounted_store import FUSESTORE, REPOSITORY
from support.opened_store import opened

Print = dict[str, tuple[int, int, int, int]]
"""By path: mode, size, time of change and checksum of a file or directory."""


def copy_there(source: str, target: str) -> None:
    """Copy a file that may be deleted at this moment."""
    try:
        shutil.copy2(source, target)
    except FileNotFoundError:
        pass


def copy_tree(source: Path, target: Path) -> None:
    ignore = shutil.ignore_patterns("*.sock")
    shutil.copytree(source, target, ignore=ignore, copy_function=copy_there)


def instead(copy: Path, original: Path) -> None:
    """Let a copy take the place of the original."""
    shutil.rmtree(original)
    copy.rename(original)


def fingerprint(*roots: Path) -> Print:
    """All that can be told of the files below some nodes, but of who used them last."""
    found: Print = {}
    for root in roots:
        for path in sorted(root.rglob("*")):
            about = path.stat()
            if path == root / OWNER_NAME:
                continue
            digest = xxh3_64_intdigest(path.read_bytes()) if path.is_file() else 0
            found[str(path)] = (about.st_mode, about.st_size, about.st_mtime_ns, digest)
    return found


def recovered(
    config: StoreConfig,
    *extra: Path,
    accept_loss: bool = False,
    metadata: Path | None = None,
    history: str = "",
) -> dict[str, Any]:
    """Run the command in this process, with the limits of `config`; return its report.

    FusestoreError as the command reports it.  The nodes must be as they were before.
    """
    roots = [path for path in (*(node.path for node in config.nodes), *extra) if path.exists()]
    before = fingerprint(*roots)
    told: list[dict[str, Any]] = []
    reports: list[dict[str, Any]] = []

    def run(*arguments: Any, **options: Any) -> dict[str, Any]:
        reports.append(recover(*arguments, **options | {"progress": told.append}, limits=limits))
        return reports[-1]

    limits = config.limits
    options = [
        *(f"--from={path}" for path in extra),
        *([f"--metadata={metadata}"] if metadata is not None else []),
        *(["--accept-loss"] if accept_loss else []),
        *([f"--history={history}"] if history else []),
    ]
    with patch("fusestore.rescue.recover.recover", run):
        done = CliRunner().invoke(
            rescue.recover, [os.fspath(config.store), *options], standalone_mode=False
        )
    assert fingerprint(*roots) == before
    assert all(0 <= message["done"] <= message["total"] for message in told), told
    if done.exception is not None:
        raise done.exception
    return reports[0]


def forget(config: StoreConfig) -> None:
    """The metadata is gone."""
    shutil.rmtree(config.metadata)


def has_metadata(config: StoreConfig) -> bool:
    return config.metadata.exists() and bool(set(os.listdir(config.metadata)) - {"lost+found"})


async def dump_metadata(config: StoreConfig) -> None:
    async with opened(config) as one:
        await one.store.dumper.take()


def journal_records(config: StoreConfig, node: int) -> list[tuple[Path, int, Header]]:
    """(file, offset, header) of the records of a node's journal, in order."""
    found = []
    for path in sorted((config.nodes[node].path / "journal").iterdir()):
        place = Place(config.uuid, config.nodes[node].name, SegmentKind.JOURNAL, int(path.stem))
        found += [(path, offset, header) for offset, header, _ in records(place, path.read_bytes())]
    return found


def command(config: StoreConfig, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `fusestore recover` on the store; whatever its exit status."""
    return subprocess.run(
        [*FUSESTORE, "recover", config.store, *arguments],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
