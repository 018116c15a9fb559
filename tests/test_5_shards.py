"""The shards in the regions are what FORMAT.md says: struct and reedsolo decode them.

Nothing of fusestore is imported here.  The layout of a file comes from its
attribute `user.fusestore.layout`; its bytes are then put together from the node
directories alone, for every choice of k of the k + m shards of each stripe.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import reedsolo

from support.mounted_store import Store

pytestmark = pytest.mark.mounted

KIB, MIB = 1 << 10, 1 << 20
CODES = [(2, 1), (4, 2), (6, 3), (1, 2)]

#: Odd sizes, small and large, one of them of several stripes.
SIZES = [1, 7, 64, 127, 4095, 4096, 65_537, 300_001, MIB - 1, MIB, MIB + 1, 3 * MIB + 12_345]

Matrix = list[list[int]]
Layout = dict[str, Any]


# --- the code, by reedsolo alone ---------------------------------------------


def generator(k: int, m: int) -> Matrix:
    """What makes k + m shards of k: the identity above reedsolo's answer to unit vectors."""
    unit = [bytes(int(i == j) for i in range(k)) for j in range(k)]
    if k == 1:  # replicas are plain copies
        return [[1]] * (1 + m)
    columns = [reedsolo.RSCodec(m).encode(vector) for vector in unit]
    return [[column[row] for column in columns] for row in range(k + m)]


def inverse(matrix: Matrix) -> Matrix:
    """The inverse over reedsolo's field, by Gauss and Jordan."""
    reedsolo.init_tables(0x11D)
    size = len(matrix)
    rows = [[*row, *(int(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for column in range(size):
        pivot = next(row for row in rows[column:] if row[column])
        rows.remove(pivot)
        pivot = [reedsolo.gf_div(value, pivot[column]) for value in pivot]
        rows = [
            [a ^ reedsolo.gf_mul(row[column], b) for a, b in zip(row, pivot, strict=True)]
            for row in rows
        ]
        rows.insert(column, pivot)
    return [row[size:] for row in rows]


def combine(factors: Sequence[int], shards: Sequence[bytes]) -> bytes:
    """The sum of the shards, each times its factor."""
    total = 0
    for factor, shard in zip(factors, shards, strict=True):
        table = bytes(reedsolo.gf_mul(factor, value) for value in range(256))
        total ^= int.from_bytes(shard.translate(table), "little")
    return total.to_bytes(len(shards[0]), "little")


def decode(code: tuple[int, int], shards: Mapping[int, bytes]) -> bytes:
    """A stripe (padded) from k of its shards by index."""
    matrix = generator(*code)
    back = inverse([matrix[index] for index in shards])
    return b"".join(combine(row, list(shards.values())) for row in back)


def decode_by_column(code: tuple[int, int], shards: Mapping[int, bytes], columns: int) -> list[int]:
    """The first bytes of each data shard, by reedsolo's own decoder of erasures."""
    k, m = code
    codec = reedsolo.RSCodec(m)
    erased = [index for index in range(k + m) if index not in shards]
    found = []
    for column in range(columns):
        word = bytes(shards[i][column] if i in shards else 0 for i in range(k + m))
        found += codec.decode(word, erase_pos=erased)[0]
    return found


# --- files, by their layout --------------------------------------------------


def layout_of(path: Path) -> Layout:
    answer = json.loads(os.getxattr(path, "user.fusestore.layout"))
    assert isinstance(answer, dict)
    return answer


def read_shards(nodes: Mapping[str, Path], stripe: Layout) -> dict[int, bytes]:
    """All shards of a stripe, read from where the layout says they are."""
    found = {}
    for shard in stripe["shards"]:
        with (nodes[shard["node"]] / shard["segment"]).open("rb") as segment:
            segment.seek(shard["offset"])
            found[shard["index"]] = segment.read(shard["length"])
        assert len(found[shard["index"]]) == shard["length"] == stripe["shard_length"]
    return found


def assemble(layout: Layout, stripes: Mapping[int, bytes]) -> bytes:
    """A file from its stripes; what no extent covers is zeros."""
    content = bytearray(layout["size"])
    for extent in layout["extents"]:
        start = extent["stripe_offset"]
        piece = stripes[extent["stripe"]][start : start + extent["length"]]
        assert len(piece) == extent["length"]
        content[extent["offset"] : extent["offset"] + extent["length"]] = piece
    assert len(content) == layout["size"]
    return bytes(content)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- the tests ---------------------------------------------------------------


@pytest.fixture(params=CODES, ids=["+".join(map(str, code)) for code in CODES])
def code(request: pytest.FixtureRequest) -> tuple[int, int]:
    k, m = request.param
    return k, m


@pytest.fixture
def store(make_store: Callable[..., Store], code: tuple[int, int]) -> Store:
    made = make_store("--code", "+".join(map(str, code)))
    made.mount()
    return made


def write_all(top: Path, sizes: Iterable[int]) -> dict[Path, bytes]:
    """A file of each size, and one with holes that was written piece by piece."""
    written = {}
    for size in sizes:
        path = top / f"{size}"
        written[path] = random.Random(size).randbytes(size)
        path.write_bytes(written[path])
    path = top / "pieces"
    content = bytearray(2 * MIB + 77)
    with path.open("wb", buffering=0) as file:
        file.truncate(len(content))
        for start in (0, 999, 5000, 500_000, MIB - 100, 2 * MIB):
            piece = random.Random(start).randbytes(700 if start < 2 * MIB else 50)
            os.pwrite(file.fileno(), piece, start)
            content[start : start + len(piece)] = piece
    written[path] = bytes(content)
    return written


def nodes_of(store: Store) -> dict[str, Path]:
    return {node["name"]: Path(node["path"]) for node in store.status()["nodes"]}


def test_files_come_back_from_any_k_shards(store: Store, code: tuple[int, int]) -> None:
    k, m = code
    written = write_all(store.mountpoint, SIZES)
    store.remount()  # seals what is still open
    layouts = {path: layout_of(path) for path in written}
    nodes = nodes_of(store)
    store.umount()

    descriptions: dict[int, Layout] = {}
    for layout in layouts.values():
        assert layout["code"] == f"{k}+{m}"
        for number, stripe in layout["stripes"].items():
            assert stripe["state"] == "sealed"
            assert stripe == descriptions.setdefault(int(number), stripe)

    shards = {number: read_shards(nodes, stripe) for number, stripe in descriptions.items()}
    data = {}
    for number, stripe in descriptions.items():
        assert sorted(shards[number]) == list(range(k + m))
        assert stripe["shard_length"] * k >= stripe["length"] > 0
        whole = b"".join(shards[number][index] for index in range(k))
        assert set(whole[stripe["length"] :]) <= {0}
        data[number] = whole
        for chosen in itertools.combinations(range(k + m), k):
            these = {index: shards[number][index] for index in chosen}
            assert decode(code, these) == whole
            if k > 1:
                columns = min(3, stripe["shard_length"])
                assert decode_by_column(code, these, columns) == [
                    shards[number][index][column] for column in range(columns) for index in range(k)
                ]

    for path, layout in layouts.items():
        assert digest(assemble(layout, data)) == digest(written[path]), path.name


def test_no_region_holds_more_shards_than_may_be_lost(store: Store, code: tuple[int, int]) -> None:
    _, m = code
    path = store.mountpoint / "file"
    path.write_bytes(random.Random(1).randbytes(3 * MIB))
    store.remount()
    regions = {node["name"]: node["region"] for node in store.status()["nodes"]}
    for stripe in layout_of(path)["stripes"].values():
        held = [regions[shard["node"]] for shard in stripe["shards"]]
        assert max(held.count(region) for region in held) <= m
        counts = [held.count(region) for region in set(regions.values())]
        assert max(counts) - min(counts) <= 1


def test_a_small_file_lies_in_an_open_stripe_until_it_is_sealed(store: Store) -> None:
    path = store.mountpoint / "small"
    path.write_bytes(b"a few bytes")
    layout = layout_of(path)
    assert layout["size"] == 11
    (extent,) = layout["extents"]
    assert (extent["offset"], extent["length"]) == (0, 11)
    assert layout["stripes"][str(extent["stripe"])]["state"] == "open"
    store.remount()
    (stripe,) = layout_of(path)["stripes"].values()
    assert stripe["state"] == "sealed"


def test_a_hole_has_no_extent(store: Store) -> None:
    path = store.mountpoint / "sparse"
    with path.open("wb", buffering=0) as file:
        file.truncate(1 << 40)
        os.pwrite(file.fileno(), b"island", 1 << 35)
    layout = layout_of(path)
    assert layout["size"] == 1 << 40
    assert [(e["offset"], e["length"]) for e in layout["extents"]] == [(1 << 35, 6)]


def test_an_empty_file_has_no_stripe(store: Store) -> None:
    (store.mountpoint / "empty").touch()
    layout = layout_of(store.mountpoint / "empty")
    assert (layout["size"], layout["extents"], layout["stripes"]) == (0, [], {})


def test_the_shards_of_a_directorys_own_code_decode_too(make_store: Callable[..., Store]) -> None:
    store = make_store()
    store.mount()
    for k, m in CODES:
        directory = store.mountpoint / f"{k}+{m}"
        directory.mkdir()
        os.setxattr(directory, "user.fusestore.code", f"{k}+{m}".encode())
        (directory / "file").write_bytes(random.Random(k).randbytes(MIB + 333))
    store.remount()
    nodes = nodes_of(store)
    for k, m in CODES:
        layout = layout_of(store.mountpoint / f"{k}+{m}/file")
        assert layout["code"] == f"{k}+{m}"
        stripes = {}
        for number, stripe in layout["stripes"].items():
            shards = read_shards(nodes, stripe)
            last = {index: shards[index] for index in range(m, k + m)}
            stripes[int(number)] = decode((k, m), last)
        assert digest(assemble(layout, stripes)) == digest(random.Random(k).randbytes(MIB + 333))


def test_inspect_prints_the_same(store: Store) -> None:
    path = store.mountpoint / "file"
    path.write_bytes(b"x" * 100_000)
    store.remount()
    done = store.cli("inspect", path)
    for stripe in layout_of(path)["stripes"].values():
        for shard in stripe["shards"]:
            assert shard["node"] in done.stdout
            assert shard["segment"] in done.stdout
