"""What the log of a test is searched for: warnings and errors, in both formats of a log file."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fusestore.system import logs
from support.logs import LogFile, Recorder, unexpected

WARNING = "WARNING test_0_logs: A warning of '/a file'."
ERROR = "ERROR test_0_logs: An error."


def log_to(handler: logging.Handler) -> None:
    """Log a line of each level, one of them with a traceback."""
    log = logging.getLogger("test_0_logs")
    log.addHandler(handler)
    log.info("WARNING: this is none.")
    log.warning("A warning of %r.", "/a file")
    try:
        raise ValueError("ERROR test_0_logs: neither is this")
    except ValueError:
        log.exception("An error.")
    log.removeHandler(handler)


@pytest.mark.parametrize("formatter", [logs.TextFormatter(), logs.JSONFormatter()])
def test_a_log_file_gives_its_warnings_and_errors_once(
    tmp_path: Path, formatter: logging.Formatter
) -> None:
    log = LogFile(tmp_path / "log")
    assert log.new_lines() == []
    for _ in range(2):
        handler = logging.FileHandler(log.path)
        handler.setFormatter(formatter)
        log_to(handler)
        handler.close()
        assert log.new_lines() == [WARNING, ERROR]
        assert log.new_lines() == []


NASTY = {
    "newline": "a\n2026-01-31T12:00:00.000Z ERROR fusestore: forged",
    "return": "a\r2026-01-31T12:00:00.000Z ERROR fusestore: forged",
    "priority": "a\n<0>fusestore: forged",
    "escape": "a\x1b[2J\x1b]0;title\x07",
    "C1 control": "a\x9b2J\x85b",
    "line separator": "a\u2028b\u2029c",
    "vertical tab, form feed, separators": "a\x0bb\x0cc\x1cd\x1de\x1ef",
    "right to left": "a\u202egpj.exe",
    "no UTF-8": "a\udcff\udc80",
    "tab, delete, NUL": "a\tb\x7f\0",
}


@pytest.mark.parametrize("name", NASTY.values(), ids=NASTY.keys())
@pytest.mark.parametrize(
    "formatter",
    [
        logs.TextFormatter(),
        logs.JSONFormatter(),
        logs.JournalFormatter(),
        logs.JournalFormatter(logs.JSONFormatter()),
    ],
    ids=["text", "json", "journal", "journal of json"],
)
def test_no_name_makes_a_line_of_its_own(
    tmp_path: Path, formatter: logging.Formatter, name: str
) -> None:
    """Neither in a message nor in the text of an exception; each line begins as a record does."""
    handler = logging.FileHandler(tmp_path / "log", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(formatter)
    log = logging.getLogger("test_0_logs")
    log.addHandler(handler)
    log.warning("%s cannot be read", name)
    try:
        raise ValueError(name) from OSError(5, name)
    except ValueError:
        log.exception("Node %s failed", name)
    log.removeHandler(handler)
    handler.close()
    text = (tmp_path / "log").read_bytes().decode()
    assert text.replace("\n", "").isprintable()
    lines = text.splitlines()
    records = [line for line in lines if not line.removeprefix("<3>").startswith("  ")]
    assert len(records) == 2
    if "Journal" in type(formatter).__name__:
        assert all(line.startswith(("<3>", "<4>")) for line in lines)


def test_a_log_file_that_was_rolled_is_read_from_its_oldest_part(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log")
    for number, name in enumerate(("log.2", "log.1", "log")):
        text = f"2026-01-31T12:00:00.000Z ERROR a: {number}\n"
        (tmp_path / name).write_text(text)
    assert log.new_lines() == ["ERROR a: 0", "ERROR a: 1", "ERROR a: 2"]


def test_a_recorder_has_the_same_lines() -> None:
    recorder = Recorder()
    log_to(recorder)
    assert recorder.take() == [WARNING, ERROR]
    assert recorder.take() == []


def test_lines_that_no_pattern_is_found_in_are_unexpected() -> None:
    assert unexpected([WARNING, ERROR], []) == [WARNING, ERROR]
    assert unexpected([WARNING, ERROR], ["^WARNING .* '/a"]) == [ERROR]
    assert unexpected([WARNING, ERROR], ["warning of", r"error\."]) == []
