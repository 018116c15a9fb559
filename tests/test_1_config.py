"""`fusestore.toml` and `node.toml`, mkfs with all that it refuses, mount options."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from fusestore.config import mkfs
from fusestore.config import store_config as configuration
from fusestore.config.mkfs import make_store
from fusestore.config.mount_options import MountOptions
from fusestore.config.node_identity import NodeIdentity, read_identity, write_identity
from fusestore.config.store_config import NodeConfig, StoreConfig
from fusestore.config.store_config_write import write_store_config
from fusestore.errors import ConfigError, FusestoreError, NodeError, NodeIdentityError, UsageError
from fusestore.format.erasure import Code
from fusestore.limits import DEFAULTS

REGIONS = ["us-east-1", "us-west-1", "eu-west-1"]


def tree(path: Path) -> set[str]:
    """All that lies below a directory."""
    return {os.fspath(found.relative_to(path)) for found in path.rglob("*")}


def refused(store: Path, *arguments: object, match: str, **named: object) -> str:
    """The sentence with which mkfs refuses; nothing below the store's parent may have changed."""
    before = tree(store.parent)
    with pytest.raises(UsageError, match=match) as found:
        make_store(store, *arguments, **named)  # type: ignore[arg-type]
    assert tree(store.parent) == before
    return str(found.value)


# --- what mkfs makes ---------------------------------------------------------


def test_a_store_is_made_of_three_regions_by_default(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store")
    assert [node.name for node in made.nodes] == REGIONS
    assert [node.region for node in made.nodes] == REGIONS
    assert made.code == Code(2, 1)
    assert made.metadata == tmp_path / "store" / "metadata"
    assert made.metadata.is_dir()
    for node in made.nodes:
        assert node.path == tmp_path / "store" / node.name
        assert (node.path / "journal").is_dir()
        assert (node.path / "shards").is_dir()
        identity = read_identity(node.path)
        assert (identity.store, identity.node, identity.region) == (made.uuid, node.name, node.name)
    incarnations = {read_identity(node.path).incarnation for node in made.nodes}
    assert len(incarnations) == 3


def test_only_the_owner_may_look_into_a_store(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store").store
    for path in [store, *store.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_what_was_made_is_what_is_loaded(tmp_path: Path) -> None:
    regions = [("a", tmp_path / "disk 1" / "ä\\\"'"), ("b", None), ("c", tmp_path / "c\nd")]
    made = make_store(tmp_path / "s", regions, Code(4, 2), tmp_path / "meta", False)
    assert configuration.load(tmp_path / "s") == made
    assert made.metadata == tmp_path / "meta"


def test_paths_below_the_store_are_relative_so_that_it_can_be_moved(tmp_path: Path) -> None:
    made = make_store(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    moved = configuration.load(tmp_path / "new")
    assert moved.uuid == made.uuid
    assert moved.nodes[0].path == tmp_path / "new" / "us-east-1"


def test_the_file_is_for_people(tmp_path: Path) -> None:
    text = (make_store(tmp_path / "s").store / "fusestore.toml").read_text()
    assert text.startswith("# The configuration of a fusestore store")
    assert re.search(r'^code = "2\+1" # ', text, re.M)
    assert 'path = "us-east-1"' in text


def test_a_store_is_found_through_a_link(tmp_path: Path) -> None:
    made = make_store(tmp_path / "s")
    (tmp_path / "link").symlink_to("s")
    assert configuration.load(tmp_path / "link") == made


def test_empty_directories_are_taken_and_those_of_a_new_disk(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    made = make_store(tmp_path / "s", [("a", tmp_path / "disk"), ("b", None), ("c", None)])
    assert read_identity(tmp_path / "disk").store == made.uuid


def test_the_limits_of_cleaning_are_those_of_the_file(tmp_path: Path) -> None:
    file = make_store(tmp_path / "s").store / "fusestore.toml"
    text = file.read_text()
    assert "waste" not in text
    assert configuration.load(tmp_path / "s").limits == DEFAULTS
    file.write_text(f"waste_percent = 50\nwaste_mib = 100\nclean_rate = 2.5\n{text}")
    config = configuration.load(tmp_path / "s")
    limits = config.limits
    assert (limits.waste_percent_max, limits.waste_bytes_min) == (50, 100 << 20)
    assert limits.clean_rate == 2_500_000
    assert limits == replace(
        DEFAULTS, waste_percent_max=50, waste_bytes_min=100 << 20, clean_rate=2_500_000
    )
    write_store_config(replace(config, nodes=config.nodes[:2]))
    assert file.read_text().startswith("waste_percent = 50\nwaste_mib = 100\nclean_rate = 2.5\n")
    file.write_text(f"clean_rate = 0\n{text}")
    assert configuration.load(tmp_path / "s").limits == DEFAULTS


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("waste_percent = 9", "waste_percent must be a number from 10 to 1000, but is 9"),
        ("waste_percent = 20.5", "waste_percent must be a whole number, but is 20.5"),
        ("waste_mib = 0", "waste_mib must be a number from 8 to 1048576, but is 0"),
        ('waste_mib = "32"', "waste_mib must be a whole number, but is '32'"),
        ("clean_rate = -1", "clean_rate must be a number from 0 to 1e+06, but is -1"),
        ("clean_rate = nan", "clean_rate must be a number from 0 to 1e+06, but is nan"),
        ("clean_rate = true", "clean_rate must be a number from 0 to 1e+06, but is True"),
    ],
)
def test_wrong_limits_of_cleaning_are_refused(tmp_path: Path, line: str, what: str) -> None:
    file = make_store(tmp_path / "s").store / "fusestore.toml"
    file.write_text(f"{line}\n{file.read_text()}")
    with pytest.raises(ConfigError) as found:
        configuration.load(tmp_path / "s")
    assert str(found.value) == f"{file}:1: {what}."


# --- what mkfs refuses -------------------------------------------------------


def test_refuses_a_store_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "letter").touch()
    assert "letter" in refused(tmp_path / "s", match="not empty")


def test_refuses_a_store_that_is_one_already(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    refused(tmp_path / "s", match="is already a store")


def test_refuses_a_file_for_a_store(tmp_path: Path) -> None:
    (tmp_path / "s").touch()
    refused(tmp_path / "s", match="not a directory")


@pytest.mark.parametrize(
    ("first", "second"), [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("link", "a"), ("a", "link/b")]
)
def test_refuses_regions_that_are_equal_or_nested(tmp_path: Path, first: str, second: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    regions = [("x", tmp_path / first), ("y", tmp_path / second), ("z", None)]
    refused(tmp_path / "s", regions, match="region y.*region x")


@pytest.mark.parametrize(("region", "metadata"), [("a", "a"), ("a", "a/b"), ("a/b", "a")])
def test_refuses_metadata_in_or_around_a_region(tmp_path: Path, region: str, metadata: str) -> None:
    regions = [("x", tmp_path / region), ("y", None), ("z", None)]
    refused(
        tmp_path / "s", regions, Code(2, 1), tmp_path / metadata, match="region x.*the metadata"
    )


@pytest.mark.parametrize("place", ["s", ""])
def test_refuses_a_region_that_holds_the_store(tmp_path: Path, place: str) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    regions = [("x", parent / place), ("y", None), ("z", None)]
    refused(parent / "s", regions, match="holds the store")


def test_refuses_a_region_of_another_store(tmp_path: Path) -> None:
    other = make_store(tmp_path / "other")
    for place in [other.nodes[0].path, other.nodes[0].path / "below"]:
        regions = [("x", place), ("y", None), ("z", None)]
        message = refused(tmp_path / "s", regions, match="already belongs to a store|inside")
        assert str(tmp_path / "other") in message


def test_refuses_a_region_inside_another_stores_node_elsewhere(tmp_path: Path) -> None:
    make_store(tmp_path / "other", [("x", tmp_path / "disk"), ("y", None), ("z", None)])
    regions = [("x", tmp_path / "disk" / "mine"), ("y", None), ("z", None)]
    refused(tmp_path / "s", regions, match="already belongs to a store")


def test_refuses_a_store_inside_another_store(tmp_path: Path) -> None:
    make_store(tmp_path / "other")
    refused(tmp_path / "other" / "s", match="inside the store")


def test_refuses_a_node_whose_identity_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "node.toml").write_bytes(b"\xff")
    regions = [("x", tmp_path / "disk"), ("y", None), ("z", None)]
    refused(tmp_path / "s", regions, match="already belongs to a store")


def test_refuses_a_region_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "photo").touch()
    regions = [("x", tmp_path / "disk"), ("y", None), ("z", None)]
    refused(tmp_path / "s", regions, match="x's directory .* is not empty")


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".x", "a/b", "a b", "-x", "ä", "x" * 64, "metadata", "fusestore.toml"]
)
def test_refuses_bad_names(tmp_path: Path, name: str) -> None:
    refused(tmp_path / "s", [(name, None), ("y", None), ("z", None)], match="region|Region")


def test_refuses_a_name_twice(tmp_path: Path) -> None:
    regions = [("x", None), ("y", None), ("x", tmp_path / "x")]
    refused(tmp_path / "s", regions, match="'x' is given 2 times")


@pytest.mark.parametrize(
    ("code", "regions"),
    [(Code(3, 1), 3), (Code(2, 1), 2), (Code(1, 0), 3), (Code(2, 1), 1), (Code(5, 2), 3)],
)
def test_refuses_codes_that_break_the_region_rule(tmp_path: Path, code: Code, regions: int) -> None:
    names: list[tuple[str, Path | None]] = [(f"r{i}", None) for i in range(regions)]
    refused(tmp_path / "s", names, code, match="would lose data.*--allow-unsafe")
    assert make_store(tmp_path / "s", names, code, allow_unsafe=True).allow_unsafe
    assert configuration.load(tmp_path / "s").code == code


def test_a_failure_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    before = tree(tmp_path)

    def full(config: StoreConfig) -> None:
        raise OSError(28, "No space left on device", "fusestore.toml")

    monkeypatch.setattr(mkfs, "write_store_config", full)
    regions = [("x", tmp_path / "disk"), ("y", None), ("z", tmp_path / "deep" / "z")]
    with pytest.raises(FusestoreError, match="No space left on device"):
        make_store(tmp_path / "a" / "s", regions, metadata=tmp_path / "meta")
    assert tree(tmp_path) == before


def test_a_path_that_toml_cannot_hold_is_refused(tmp_path: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match="not UTF-8"):
        make_store(tmp_path / "s", [("x", place), ("y", None), ("z", None)])
    assert tree(tmp_path) == before


# --- mistakes in fusestore.toml ----------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store that was just made."""
    return make_store(tmp_path / "s").store


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            "format = 1",
            "format = 2",
            "format is 2, but this fusestore knows only 1: use a newer one",
        ),
        ("format = 1", "", "format is missing"),
        ("format = 1", 'format = "1"', "format must be a whole number"),
        ("format = 1", "format = true", "format must be a whole number"),
        ("uuid = ", 'uuid = "x" #', "uuid must be a UUID"),
        ('code = "2+1"', 'code = "two"', "code cannot be used"),
        ('code = "2+1"', "code = 3", "code must be text"),
        ('code = "2+1"', 'code = "3+1"', "the loss of a region would lose data"),
        ("allow_unsafe = false", "allow_unsafe = 1", "allow_unsafe must be true or false"),
        ('name = "us-west-1"', 'nome = "us-west-1"', "node 2: name is missing"),
        ('region = "us-west-1"', 'region = "a/b"', "node 2: region cannot be used"),
        ('name = "us-west-1"', 'name = "us-east-1"', "node 2: name is 'us-east-1', the"),
        ('path = "us-west-1"', 'path = "us-east-1"', "both at"),
        ('path = "us-west-1"', 'path = "metadata/x"', "nested"),
        ('path = "us-west-1"', 'path = ""', "holds the store"),
        ('path = "us-west-1"', 'path = "a\\u0000"', "node 2: path contains a zero byte"),
        ("[[node]]", "[[nodes]]", "node must occur"),
        ("metadata =", "limit = 1\nmetadata =", "limit is not a key"),
        ("metadata =", "metadata", "not valid TOML"),
        ("scrub_days = 30", "scrub_days = " + "9" * 5000, "a number is too long"),
        ("scrub_days = 30", "scrub_days = 0x" + "f" * 9000, ":10: scrub_days must be a number"),
        ("code = ", "code = 0x" + "f" * 9000 + " #", ":6: code must be text"),
        ("format = 1", "format = 0x" + "f" * 9000, ":4: format is a number with thousands"),
        ("uuid = ", 'uuid = "' + "x" * 500 + '" #', "x…"),
        ("metadata =", ".".join("a" * 99) + " = 1\nmetadata =", ":8: a is not a key"),
        ("metadata =", 'metrics = "' + "9" * 5000 + '"\nmetadata =', ":8: metrics cannot be used"),
    ],
)
def test_a_mistake_is_one_sentence_with_file_and_key(
    store: Path, old: str, new: str, complaint: str
) -> None:
    file = store / "fusestore.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=re.escape(complaint)) as found:
        configuration.load(store)
    message = str(found.value)
    assert message.startswith(str(file))
    assert message.endswith(".")
    assert "\n" not in message


def test_no_file_and_no_directory_say_how_to_make_a_store(tmp_path: Path) -> None:
    for path in [tmp_path, tmp_path / "none"]:
        with pytest.raises(ConfigError, match=r"is not a store: .*'fusestore mkfs"):
            configuration.load(path)


def test_a_file_that_is_not_text(store: Path) -> None:
    (store / "fusestore.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        configuration.load(store)


def test_a_node_is_found_by_name(store: Path) -> None:
    config = configuration.load(store)
    assert config.node("us-west-1") == NodeConfig("us-west-1", "us-west-1", store / "us-west-1")
    with pytest.raises(UsageError, match="no node 'mars'; its nodes are us-east-1"):
        config.node("mars")


def test_a_file_is_replaced_whole_or_not_at_all(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, text = tree(store), (store / "fusestore.toml").read_bytes()

    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(ConfigError, match="Input/output error"):
        write_store_config(configuration.load(store))
    assert tree(store) == before
    assert (store / "fusestore.toml").read_bytes() == text


# --- node.toml ---------------------------------------------------------------


def test_an_identity_survives_being_written(tmp_path: Path) -> None:
    identity = NodeIdentity(uuid4(), "n", "r", uuid4(), 1)
    write_identity(tmp_path, identity)
    assert read_identity(tmp_path) == identity


def test_a_directory_without_the_right_identity_is_no_node(tmp_path: Path) -> None:
    def problem(path: Path) -> str:
        with pytest.raises(NodeIdentityError) as found:
            read_identity(path)
        return str(found.value)

    assert problem(tmp_path / "gone") == f"There is no directory {tmp_path / 'gone'}."
    assert "is its disk mounted?" in problem(tmp_path)
    file = tmp_path / "node.toml"
    assert "There is no directory" in problem(file)
    file.write_bytes(b"\xff")
    assert "not UTF-8" in problem(tmp_path)
    file.write_text("format = 99")
    assert "format is 99" in problem(tmp_path)
    file.write_text("[tool.other]\nx = 1")
    assert "format is missing" in problem(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(NodeError, match="it is a directory, not a regular file") as unread:
        read_identity(tmp_path)  # it may be there
    assert not isinstance(unread.value, NodeIdentityError)


# --- mount options -----------------------------------------------------------


def test_mount_options_are_read_as_mount_does() -> None:
    options = MountOptions.parse(["ro,nosuid", "allow_other,nodev", "noexec,exec,noatime"])
    assert options == MountOptions(read_only=True, allow_other=True, switches=("nosuid", "nodev"))
    assert options.kernel == ("noatime", "ro", "allow_other", "nosuid", "nodev")
    assert MountOptions.parse([str(options)]) == options
    usual = MountOptions.parse(["nosuid"]).kernel
    assert usual == (("noatime", "nosuid", "dev") if os.geteuid() == 0 else ("noatime", "nosuid"))
    assert MountOptions.parse(["ro,rw,,defaults,suid,dev,atime"]) == MountOptions()
    quick = MountOptions.parse(["writeback,noxattr,nospin"])
    assert quick.writeback
    assert quick.noxattr
    assert quick.nospin
    assert MountOptions.parse([str(quick)]) == quick
    assert str(MountOptions()) == ""


@pytest.mark.parametrize("value", ["big", "ro,max_read=1", "fsname=x", "RO"])
def test_unknown_mount_options_are_refused(value: str) -> None:
    with pytest.raises(UsageError, match="There is no mount option"):
        MountOptions.parse([value])
