"""The benchmark: all workloads for real, in small; what it reports, and that nothing is left."""

from __future__ import annotations

import contextlib
import csv
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fusestore.bench import workloads
from fusestore.bench.children import isolated, together
from fusestore.bench.measured import Goal, Limit, Measured
from fusestore.bench.report import bar, number_text
from fusestore.bench.rounds import WORKLOADS, Row
from fusestore.bench.scale import QUICK, Scale
from fusestore.bench.session import Options, run
from fusestore.cli.main import cli
from fusestore.errors import FusestoreError, UsageError

TINY = replace(
    QUICK,
    warm_mib=1,
    large_mib=2,
    random_reads=5,
    overwritten_mib=1,
    synced_writes=3,
    small_files=5,
    tree_files=4,
    objects=5,
    clients=3,
    documents_per_client=3,
    clients_at_once=(1, 2),
    parallel_mib=2,
    sizes=(1000, 2_000_000),
    size_total_bytes=3000,
    stall_seconds=0.2,
    damaged_mib=2,
    small_write_mib=1,
    memory_mib=2,
    files_before=3,
)
EVERYWHERE = [each.name for each in WORKLOADS if not each.own and not each.once]


def processes_of(place: Path) -> list[str]:
    """The processes that have the place in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes()
            if entry.name.isdigit() and os.fsencode(place) in line:
                found.append(line.decode(errors="replace"))
    return found


def assert_nothing_is_left(place: Path) -> None:
    assert list(place.iterdir()) == []
    assert str(place) not in Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    deadline = time.monotonic() + 30
    while left := processes_of(place):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def measure(scale: Scale = TINY, **options: Any) -> list[str]:
    """Run in this process; the lines that were printed."""
    lines: list[str] = []
    run(Options(**options), lines.append, scale)
    return lines


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where to measure."""
    path = tmp_path / "place"
    path.mkdir()
    return path


# --- directories -------------------------------------------------------------


def test_all_workloads_give_positive_figures_side_by_side(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (place / "mine").write_bytes(b"not to be touched")
    files = {key: tmp_path / f"out.{key}" for key in ("json", "csv", "svg")}
    lines = measure(
        directory=place,
        against=(other,),
        files_in_store=7,
        json_file=files["json"],
        csv_file=files["csv"],
        plot=files["svg"],
        scale=replace(TINY, rounds=2),
    )
    assert (place / "mine").read_bytes() == b"not to be touched"
    assert os.listdir(place) == ["mine"]
    assert os.listdir(other) == []

    result = json.loads(files["json"].read_text())
    figures = result["figures"]
    assert {each["workload"] for each in figures} == {*EVERYWHERE, "many"}
    assert {each["target"] for each in figures} == {"place", "other"}
    assert result["failures"] == []
    for each in figures:
        assert each["median"] > 0, each
        assert each["least"] <= each["median"] <= each["most"]
        assert each["rounds"] == len(each["values"]) == (1 if each["workload"] == "many" else 2)
        assert any(line.startswith(each["figure"]) for line in lines), each
    for key in ("date", "fusestore", "pyfuse3", "Python", "kernel", "CPU", "memory", "caches"):
        assert result["surroundings"][key]

    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(figures)
    for row, each in zip(rows, figures, strict=True):
        assert row == {key: "" if each[key] is None else str(each[key]) for key in row}

    drawing = files["svg"].read_text()
    assert ElementTree.fromstring(drawing).tag.endswith("svg")
    assert "sequential write, then fsync" in drawing


def test_a_plot_may_be_png(place: Path, tmp_path: Path) -> None:
    measure(directory=place, only=("small",), plot=tmp_path / "figures.png")
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_workload_that_fails_is_told_and_others_go_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workloads, "search", lambda top: os.rmdir(top / "absent"))
    lines: list[str] = []
    options = Options(
        directory=place, only=("tree", "overwrite"), json_file=tmp_path / "figures.json"
    )
    with pytest.raises(FusestoreError, match="1 of the workloads' runs failed"):
        run(options, lines.append, TINY)
    (failed,) = (line for line in lines if line.startswith("FAILED"))
    assert failed.startswith("FAILED: tree on place: No such file or directory (")
    result = json.loads((tmp_path / "figures.json").read_text())
    assert {each["workload"] for each in result["figures"]} == {"overwrite"}
    assert result["failures"][0]["workload"] == "tree"
    assert_nothing_is_left(place)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"only": ("big",)}, "There is no workload 'big'; the workloads are large, "),
        ({"only": ("repair",)}, "The workload repair needs a temporary store: omit DIR."),
        ({"only": ("many",)}, "The workload many needs --files-in-store."),
        ({"plot": Path("x.pdf")}, "x.pdf cannot be plotted: its name must end with .png or .svg."),
        ({"json_file": Path("/absent/x")}, "/absent/x cannot be written: No such file or dir"),
        ({"csv_file": Path("/proc/x")}, "/proc/x cannot be written: "),
        ({"plot": Path("/dev/null/x.png")}, "/dev/null/x.png cannot be written: Not a directory."),
        ({"json_file": Path("/")}, "/ cannot be written: Is a directory."),
        ({"against": (Path("/absent"),)}, "/absent is not a directory."),
    ],
)
def test_wrong_use_is_told_before_anything_is_done(
    place: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError) as caught:
        measure(directory=place, **options)
    assert str(caught.value).startswith(reason)
    assert_nothing_is_left(place)


def test_without_matplotlib_one_sentence_says_what_to_install(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'fusestore\[bench\]'"):
        measure(directory=place, plot=Path("x.svg"))


def test_help_names_every_workload() -> None:
    text = inspect.cleandoc(cli.commands["bench"].help or "")
    assert all(f"\n  {workload.name} " in text for workload in WORKLOADS)


# --- children ----------------------------------------------------------------


def test_children_work_at_the_same_time_and_give_their_answers() -> None:
    reading, writing = os.pipe()  # each waits for the other
    seconds, answers = together([lambda: os.read(reading, 1), lambda: os.write(writing, b"x")])
    os.close(reading)
    os.close(writing)
    assert answers == [b"x", 1]
    assert seconds > 0


def test_a_child_that_fails_or_hangs_does_not_hold_us_up() -> None:
    with pytest.raises(FileNotFoundError):
        isolated(lambda: os.stat("/absent"), lambda: None)
    with pytest.raises(FusestoreError, match="was killed"):
        isolated(lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: None)
    with pytest.raises(FusestoreError, match="did not finish within"):
        isolated(lambda: time.sleep(600), lambda: None, 0.1)


# --- figures -----------------------------------------------------------------


def row(limit: Limit | None = None, goal: Goal | None = None, **values: list[float]) -> Row:
    return Row("w", "f", "MiB/s", True, limit, goal, values)


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds() -> None:
    assert row(a=[1, 2, 9], b=[1, 1, 1]).ratio("a", "b") == 2
    assert row(a=[1, 4], b=[2, 1]).ratio("a", "b") == 2.25
    assert row(a=[1]).ratio("a", "b") is None


def test_the_limit_is_the_least_of_what_bounds() -> None:
    values: dict[str, list[float]] = {"a": [100.0], "raw": [300.0], "null": [400.0]}
    assert row(Limit.WRITTEN, **values).share("a", 2 / 3) == pytest.approx(0.5)
    assert row(Limit.READ, **values).share("a", 2 / 3) == pytest.approx(1 / 3)
    assert row(Limit.NULL, **values).share("a", 2 / 3) == 0.25
    assert row(None, **values).share("a", 2 / 3) is None
    assert row(Limit.NULL, a=[1.0]).share("a", 1.0) is None


def test_goals() -> None:
    assert row(goal=Goal(90), a=[100.0]).goal_met("a") is True
    assert row(goal=Goal(0.9, "null"), a=[80.0], null=[100.0]).goal_met("a") is False
    assert row(goal=Goal(0.9, "null"), a=[80.0]).goal_met("a") is None


def test_what_latencies_come_to() -> None:
    found = list(workloads.latency("x", [value / 1000 for value in range(1, 101)]))
    assert [each.value for each in found] == pytest.approx([50.5, 50.5, 99, 100])
    assert {each.unit for each in found} == {"ms"}
    assert not Measured("x", "ms", 1).is_rate


def test_texts() -> None:
    assert [bar(share) for share in (0, 0.5, 2)] == ["··········", "█████·····", "██████████"]
    assert [number_text(value) for value in (12345.6, 12.34, 1.234, 0.0123, 3, 0)] == [
        *("12,346", "12.3", "1.23", "0.012", "3", "0"),
    ]


# --- mounted -----------------------------------------------------------------


@pytest.mark.mounted
def test_an_own_store_beside_disk_and_null_daemon_leaves_nothing(
    place: Path, tmp_path: Path
) -> None:
    file = tmp_path / "figures.json"
    lines = measure(disk=place, json_file=file)
    everything = {each.name for each in WORKLOADS if not each.once} | {"daemon"}
    figures = json.loads(file.read_text())["figures"]
    assert {each["workload"] for each in figures} == everything
    for each in figures:
        assert each["median"] > 0 or each["unit"] in ("", "s")
    targets = {each["target"] for each in figures if each["workload"] == "large"}
    assert targets == {"fusestore", "raw", "null"}
    (write,) = (line for line in lines if line.startswith("sequential write, then fsync  "))
    assert "goal 0.62 × raw" in write
    assert "%" in write
    assert_nothing_is_left(place)
    assert list(Path("/dev/shm").glob(f"fusestore-bench-{os.getpid()}-*")) == []


def begun(place: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command, with an own store in `place`, when it begins to measure."""
    command = [sys.executable, "-m", "fusestore", "bench", "--disk", str(place), *arguments]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert any("of the limit" in line for line in process.stdout)
    return process


@pytest.mark.mounted
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_cleans_up(place: Path, number: signal.Signals) -> None:
    running = begun(place, "--quick", "--rounds", "1000")
    time.sleep(0.5)  # in the midst of something, whatever it is
    assert len(processes_of(place)) >= 3
    running.send_signal(number)
    _, complaint = running.communicate(timeout=60)
    assert running.returncode == 130
    assert complaint == "fusestore: interrupted\n"
    assert_nothing_is_left(place)


@pytest.mark.mounted
def test_repair_and_a_lost_region_clean_up_when_interrupted(place: Path) -> None:
    running = begun(place, "--quick", "--rounds", "1000", "--only", "degraded,repair")
    time.sleep(2.5)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode == 130
    assert_nothing_is_left(place)


@pytest.mark.mounted
def test_a_full_directory_is_told_in_one_sentence(place: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", place], check=True)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fusestore", "bench", "--quick", str(place)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 3
        assert done.stdout == ""
        assert done.stderr.startswith(f"fusestore: {place} has 16 MiB free, but these workloads ")
        assert done.stderr.count("\n") == 1

        scale = replace(TINY, large_mib=64)
        lines: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fusestore.bench.targets.check_room", lambda directory, needed: None)
            options = Options(directory=place, only=("large", "overwrite"))
            with pytest.raises(FusestoreError, match="1 of the workloads' runs failed"):
                run(options, lines.append, scale)
        assert "FAILED: large on place: No space left on device." in lines
        assert any(line.startswith("4 KiB overwrite") for line in lines)
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.mounted
def test_a_daemon_that_dies_is_told_and_cleaned_up(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(place: workloads.Place) -> Iterator[Measured]:
        assert place.daemon is not None or place.top.parent.name.startswith("fusestore-bench")
        if place.store is not None and place.daemon is not None:
            os.kill(place.daemon, signal.SIGKILL)
        yield Measured("alive", "/s", len(os.listdir(place.top)) + 1.0)

    deadly = replace(WORKLOADS[0], run=kill)
    monkeypatch.setattr("fusestore.bench.session.WORKLOADS", (deadly, *WORKLOADS[1:]))
    lines: list[str] = []
    with pytest.raises(FusestoreError, match="runs failed"):
        run(Options(disk=place, only=("large", "overwrite")), lines.append, TINY)
    failed = [line for line in lines if line.startswith("FAILED")]
    assert [line.split(":")[1] for line in failed] == [
        " large on fusestore",
        " overwrite on fusestore",
    ]
    assert_nothing_is_left(place)
