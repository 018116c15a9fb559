"""What an operator needs besides the mount: config check, units, versions, manual pages, levels."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner, Result

from fusestore.cli.main import cli
from fusestore.config.mkfs import make_store
from fusestore.config.mount_options import MountOptions, of_fstab
from fusestore.config.store_config import StoreConfig
from fusestore.errors import FusestoreError, MetadataError, UnknownVersionError, UsageError
from fusestore.format import records, store_rows
from fusestore.serve import units
from fusestore.serve.messages.safety import ScrubRequest
from fusestore.serve.offline import offline
from fusestore.system import files, logs

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "fusestore"


def run(*arguments: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def config(tmp_path: Path) -> StoreConfig:
    """A store that was just made."""
    return make_store(tmp_path / "store")


# --- config check ------------------------------------------------------------


def line_of(text: str, needle: str, count: int = 1) -> int:
    """The line on which `needle` stands for the `count`th time."""
    found = [i for i, line in enumerate(text.split("\n"), 1) if needle in line]
    return found[count - 1]


def test_a_good_configuration_is_said_to_be_fine(config: StoreConfig) -> None:
    result = run("config", "check", config.store)
    assert result.exit_code == 0
    assert "is fine: code 2+1, nodes us-east-1, us-west-1, eu-west-1." in result.stdout


def test_all_mistakes_are_told_at_once_each_with_its_line(config: StoreConfig) -> None:
    file = config.store / "fusestore.toml"
    text = file.read_text()
    for old, new in [
        ('code = "2+1"', 'code = "7"'),
        ("spare_shards = 0", "spare_shards = [\n  1,\n]"),
        ("scrub_days = 30", "scrub_days = 99999"),
        ('path = "us-west-1"', 'path = "us-east-1"\npaht = "x"'),
        ('name = "eu-west-1"', 'name = "us-east-1"'),
        ('region = "eu-west-1"', ""),
    ]:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    result = run("config", "check", config.store)
    assert result.exit_code == 2
    expected = [
        ('code = "7"', "code cannot be used: '7' is not a code"),
        ("spare_shards", "spare_shards must be a whole number, but is [1]"),
        ("scrub_days", "scrub_days must be a number from 0 to 36500, but is 99999"),
        ("paht", "node 2: paht is not a key that fusestore knows"),
        ('name = "us-east-1"', "node 3: name is 'us-east-1', the name of another node"),
    ]
    lines = result.stderr.splitlines()
    assert len(lines) == len(expected)
    for line, (needle, what) in zip(lines, expected, strict=True):
        count = 2 if needle.startswith("name") else 1
        assert line.startswith(f"{file}:{line_of(text, needle, count)}: {what}"), line
        assert line.endswith(".")


def test_places_that_are_the_same_are_told_with_the_line_of_the_second(config: StoreConfig) -> None:
    file = config.store / "fusestore.toml"
    text = file.read_text().replace('path = "us-west-1"', 'path = "us-east-1"')
    text = text.replace('path = "eu-west-1"', 'path = "metadata/x"')
    file.write_text(text)
    first, second = run("config", "check", config.store).stderr.splitlines()
    assert first.startswith(f"{file}:{line_of(text, 'path =', 2)}: node 2: path cannot be used")
    assert second.startswith(f"{file}:{line_of(text, 'metadata/x')}: node 3: path cannot be used")


def test_an_impossible_code_and_a_missing_key_have_lines(config: StoreConfig) -> None:
    file = config.store / "fusestore.toml"
    text = file.read_text().replace('"2+1"', '"3+1"')
    file.write_text(text)
    (line,) = run("config", "check", file).stderr.splitlines()
    assert line.startswith(f"{file}:{line_of(text, '3+1')}: code cannot be used: Code 3+1 puts 2")
    text = text.replace('name = "us-west-1"\n', "").replace("3+1", "2+1")
    file.write_text(text)
    (line,) = run("config", "check", file).stderr.splitlines()
    assert line == f"{file}:{line_of(text, '[[node]]', 2)}: node 2: name is missing."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"format = 1\n\nx = = 2\n", ":3: not valid TOML: Invalid value."),
        (b"format = 1\n# \xff\n", ":2: not valid TOML: it is not UTF-8."),
        (b'format = 1\nx = "', ":2: not valid TOML: "),
        (b"# new\nformat = 7\n", ":2: format is 7, but this fusestore knows only 1: use a newer"),
        (b"format = 0\n", ":1: format must be 1, but is 0."),
    ],
)
def test_what_cannot_be_read_at_all(config: StoreConfig, text: bytes, message: str) -> None:
    file = config.store / "fusestore.toml"
    file.write_bytes(text)
    result = run("config", "check", config.store)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"{file}{message}")
    assert result.stderr.count("\n") == 1


def test_a_command_that_needs_the_store_names_one_mistake_and_how_to_see_all(
    config: StoreConfig,
) -> None:
    file = config.store / "fusestore.toml"
    file.write_text(file.read_text().replace("scrub_days = 30", "a = 1\nb = 2"))
    result = run("status", config.store)
    assert result.exit_code == 2
    assert "a is not a key" in result.stderr
    assert f"(1 more: `fusestore config check {config.store}`)." in result.stderr


@pytest.mark.parametrize(
    "example", sorted(path.name for path in PACKAGE.glob("config/examples/*.toml"))
)
def test_the_examples_are_right(example: str) -> None:
    result = run("config", "check", PACKAGE / "config" / "examples" / example)
    assert (result.exit_code, result.stderr) == (0, "")


def test_there_are_the_examples_that_are_promised() -> None:
    names = {path.stem for path in PACKAGE.glob("config/examples/*.toml")}
    assert names == {"three-disks", "disk-nas-usb", "laptop"}


# --- a store of a newer version ----------------------------------------------


def opened(config: StoreConfig) -> None:
    """Open the store read-write, and close it."""
    trio.run(offline, config, ScrubRequest("start"), lambda progress: None)


def test_metadata_of_a_newer_format_is_refused_in_one_sentence(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(store_rows, "FORMAT", 2)
        opened(config)
    with pytest.raises(MetadataError, match=r"has format 2; this fusestore knows 1: use a newer"):
        opened(config)


def test_journals_of_a_newer_format_are_refused_in_one_sentence(
    config: StoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(records, "VERSION", 2)
        opened(config)
    with pytest.raises(UnknownVersionError, match=r"format version 2 .* use a newer one\."):
        opened(config)


def test_nodes_of_a_newer_format_are_not_used(config: StoreConfig) -> None:
    opened(config)
    for node in config.nodes:
        file = node.path / "node.toml"
        file.write_text(file.read_text().replace("format = 1", "format = 2"))
    with pytest.raises(FusestoreError, match="format is 2, but this fusestore knows only 1"):
        opened(config)


# --- the log -----------------------------------------------------------------


def record(level: int, text: str) -> logging.LogRecord:
    """A record of a log."""
    return logging.LogRecord("fusestore.serve.daemon", level, __file__, 1, text, None, None)


def test_lines_for_the_journal_have_a_priority_and_no_time() -> None:
    formatter = logs.JournalFormatter()
    for level, priority in [("DEBUG", 7), ("INFO", 6), ("WARNING", 4), ("ERROR", 3)]:
        line = formatter.format(record(getattr(logging, level), "one\ntwo"))
        assert line == f"<{priority}>fusestore.serve.daemon: one\\ntwo"
    line = logs.JournalFormatter(logs.JSONFormatter()).format(record(logging.INFO, "x"))
    assert line.startswith("<6>{")
    assert json.loads(line[3:])["message"] == "x"


def test_a_name_cannot_make_a_line_of_the_log() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s is gone", ("a\nERROR \x1b[2J",), None)
    assert logs.TextFormatter().format(record).endswith(r"INFO x: a\nERROR \x1b[2J is gone")


def test_only_the_journal_gets_priorities(tmp_path: Path) -> None:
    for stream, expected in [("{dev}:{ino}", "<3>"), ("1:1", "fusestore: ")]:
        with open(tmp_path / "stderr", "wb") as stderr:
            status = os.fstat(stderr.fileno())
            stream = stream.format(dev=status.st_dev, ino=status.st_ino)
            command = [sys.executable, "-m", "fusestore", "status", str(tmp_path)]
            subprocess.run(command, stderr=stderr, env={**os.environ, "JOURNAL_STREAM": stream})
        assert (tmp_path / "stderr").read_text().startswith(f"{expected}{tmp_path} is not a store")


def test_the_log_level_of_a_store_that_is_not_mounted(config: StoreConfig) -> None:
    result = run("log-level", config.store, "debug")
    assert result.exit_code == 3
    assert result.stderr == f"fusestore: The store {config.store} is not mounted.\n"
    assert run("log-level", config.store, "loud").exit_code == 2


# --- versions, manual pages --------------------------------------------------


def test_version_names_all_that_takes_part() -> None:
    found = json.loads(run("version", "--json").stdout)
    names = {"fusestore", "format", "Python", "Linux", "libfuse3", "libisal", "pyfuse3", "lmdb"}
    assert names <= set(found)
    assert all(re.match(r"\d", version) for version in found.values()), found
    assert f"libfuse3   {found['libfuse3']}\n" in run("version").stdout


def test_there_is_a_manual_page_for_each_command(tmp_path: Path) -> None:
    subprocess.run([sys.executable, REPOSITORY / "docs/man_pages.py", tmp_path], check=True)
    pages = {path.name: path.read_text() for path in tmp_path.glob("man*/*")}
    for name in cli.commands:
        assert f"fusestore-{name}.1" in pages
    assert {"fusestore.1", "fusestore-service-install.1", "mount.fusestore.8"} <= set(pages)
    assert "EXIT STATUS" in pages["fusestore.1"]
    assert "fusestore mkfs /srv/store \\-\\-code 4+2" in pages["fusestore-mkfs.1"]
    for name, text in pages.items():
        assert text.isascii(), name
        assert "\b" not in text, name
        assert text.startswith(f'.TH "{name[:-2].upper()}" "{name[-1]}"'), name
        assert (tmp_path / f"man{name[-1]}" / name).exists(), name


# --- units -------------------------------------------------------------------

HIDES_THE_MOUNT = {
    *("PrivateTmp", "PrivateDevices", "PrivateMounts", "PrivateNetwork", "PrivateUsers"),
    *("PrivateIPC", "ProtectSystem", "ProtectHome", "ProtectProc", "ProcSubset"),
    *("ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs"),
    *("ProtectControlGroups", "ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths"),
    *("ExecPaths", "NoExecPaths", "BindPaths", "BindReadOnlyPaths", "TemporaryFileSystem"),
    *("MountFlags", "MountAPIVFS", "DynamicUser", "RootDirectory", "RootImage"),
    *("StateDirectory", "RuntimeDirectory", "LogsDirectory", "CacheDirectory"),
    *("MountImages", "ExtensionImages", "ExtensionDirectories", "LogNamespace"),
    *("NetworkNamespacePath", "IPCNamespacePath"),
}
"""Settings of systemd that give a service a mount namespace."""


def test_no_unit_gives_the_mount_a_namespace_of_its_own() -> None:
    for file in PACKAGE.glob("service/**/*.*"):
        if file.is_file():
            settings = re.findall(r"^(\w+)=", file.read_text(), re.M)
            assert not set(settings) & HIDES_THE_MOUNT, file


def settings_of(manager: units.Systemd, config: StoreConfig, place: Path) -> dict[Path, str]:
    """The files of a service, with a program that is there."""
    return units.files(manager, Path("/bin/true"), config, place, MountOptions.parse(["nodev"]))


@pytest.mark.parametrize("name", ["data", "a b", "ö%i", 'it\'s "$HOME" \\x41', "[x]*?"])
def test_units_hold_any_name_and_systemd_finds_nothing_wrong(tmp_path: Path, name: str) -> None:
    config = make_store(tmp_path / name)
    place = tmp_path / "mnt" / name
    place.mkdir(parents=True)
    manager = units.Systemd(tmp_path / "units", user=False)
    for path, text in settings_of(manager, config, place).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    instance = units.instance_of(place)
    names = [f"fusestore@{instance}.service", f"fusestore-scrub@{instance}.timer"]
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path / 'units'}:"},
        capture_output=True,
        text=True,
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_a_user_gets_no_limits_that_only_the_system_can_set(
    config: StoreConfig, tmp_path: Path
) -> None:
    for user in (False, True):
        texts = settings_of(units.Systemd(tmp_path, user), config, tmp_path)
        assert (tmp_path / units.HARDENING in texts) is not user
        assert any("CapabilityBoundingSet" in text for text in texts.values()) is not user


def test_a_longer_wait_from_failure_to_failure_where_systemd_can(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, can in [(252, False), (257, True)]:
        monkeypatch.setattr(units.Systemd, "version", lambda manager, version=version: version)
        texts = settings_of(units.Systemd(tmp_path, False), config, tmp_path)
        assert (tmp_path / units.BACKOFF in texts) is can


@pytest.mark.parametrize("said", ["systemd 252 (252.39-1~deb12u2)\n+PAM", "systemd 252~rc3 (x)"])
def test_versions_of_systemd(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units.Systemd, "control", lambda *arguments: said)
    assert units.Systemd(Path("/"), False).version() == 252


def test_the_disks_of_regions_are_awaited_and_not_required(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = {"us-east-1": "/disks/a b", "us-west-1": "/disks/a b", "eu-west-1": "/"}
    monkeypatch.setattr(units, "_mount_of", lambda path: Path(disks[path.name]))
    texts = settings_of(units.Systemd(tmp_path, False), config, tmp_path / "mnt")
    (text,) = {text for path, text in texts.items() if path.name == "store.conf"}
    assert "\nWants=disks-a\\x20b.mount\nAfter=disks-a\\x20b.mount\n" in text
    assert "/disks" not in text


def test_paths_that_no_unit_can_hold_are_refused(tmp_path: Path) -> None:
    config = make_store(tmp_path / "s")
    for name in ["a\nb", os.fsdecode(b"\xff")]:
        with pytest.raises(UsageError, match="cannot be used in a unit"):
            settings_of(units.Systemd(tmp_path, False), config, tmp_path / name)


def test_service_install_prints_without_writing(config: StoreConfig, tmp_path: Path) -> None:
    place = tmp_path / "mnt"
    place.mkdir()
    result = run("service", "install", config.store, place, "--print", "-o", "allow_other")
    assert result.exit_code == 0, result.stderr
    assert f"Environment=STORE={config.store}\n" in result.stdout
    assert "Environment=OPTIONS=allow_other\n" in result.stdout
    needed = f"{config.store} {config.metadata} {place.parent}"
    assert f"RequiresMountsFor={needed}\n" in result.stdout
    assert not list(Path("/etc/systemd/system").glob(f"fusestore@{units.instance_of(place)}*"))


def test_a_service_is_installed_again_and_uninstalled(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def control(manager: units.Systemd, *arguments: str) -> str:
        asked.append(arguments)
        return "systemd 257 (257)"

    monkeypatch.setattr(units.Systemd, "control", control)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    place = tmp_path / "mnt"
    place.mkdir()
    install = ("service", "install", "--user", config.store, place)
    first = run(*install)
    assert first.exit_code == 0, first.stderr
    instance = units.instance_of(place)
    unit = shlex.quote(f"fusestore@{instance}")
    assert f"systemctl --user enable --now {unit}\n" in first.stdout
    home = tmp_path / "config" / "systemd" / "user"
    written = {path: path.read_text() for path in home.rglob("*") if path.is_file()}
    assert {f"wrote {path}" for path in written} <= set(first.stdout.splitlines())
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in written)
    assert "wrote" not in run(*install).stdout
    edited = home / f"fusestore@{instance}.service.d" / "override.conf"
    edited.touch()
    assert run("service", "uninstall", "--user", place).exit_code == 0
    names = (f"fusestore@{instance}.service", f"fusestore-scrub@{instance}.timer")
    assert ("disable", "--now", *names) in asked
    left = {path for path in home.rglob(f"*{instance}*/*") if path.is_file()}
    assert left == {edited}
    assert (home / units.SERVICE).exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-o", "accept_loss"], "accept_loss is not allowed for a service"),
        (["-o", "max_read=1"], "There is no mount option"),
    ],
)
def test_services_that_are_refused(
    config: StoreConfig, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    (tmp_path / "mnt").mkdir()
    result = run("service", "install", config.store, tmp_path / "mnt", "--print", *arguments)
    assert result.exit_code == 2
    assert reason in result.stderr


def test_units_that_may_not_be_written_say_what_to_do(
    config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(file: Path, text: str, mode: int) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(file.with_name("draft")))

    monkeypatch.setattr(units.Systemd, "control", lambda *arguments: "systemd 257 (257)")
    monkeypatch.setattr(files, "write_whole", refused)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "mnt").mkdir()
    done = run("service", "install", "--user", config.store, tmp_path / "mnt")
    assert done.exit_code == 2
    assert re.search(r"^fusestore: \S+@.service cannot be written: .*home directory", done.stderr)


def test_a_service_on_no_directory_is_refused_and_what_is_none_is_not_removed(
    config: StoreConfig, tmp_path: Path
) -> None:
    result = run("service", "install", config.store, tmp_path / "none", "--print")
    assert result.exit_code == 2
    assert "is not a directory: make it first" in result.stderr
    result = run("service", "uninstall", tmp_path)
    assert result.exit_code == 2
    assert "has no service" in result.stderr


# --- options of fstab --------------------------------------------------------


def test_options_that_are_not_ours_to_understand() -> None:
    line = "defaults,noauto,nofail,_netdev,user,x-systemd.automount,comment=x,uhelper=u,ro,nodev"
    assert of_fstab([line], sloppy=False) == ["defaults", "ro", "nodev"]
    assert of_fstab(["ro,big,x-y"], sloppy=True) == ["ro"]
    assert of_fstab(["ro,big"], sloppy=False) == ["ro", "big"]
    assert MountOptions.parse(of_fstab([line], sloppy=False)).read_only
