"""The erasure code: what reedsolo defines, ISA-L does, and any k shards suffice."""

from __future__ import annotations

import itertools
import random
import sys
import threading

import pytest
import reedsolo

from fusestore.errors import UsageError
from fusestore.format import erasure
from fusestore.format.erasure import Code
from fusestore.format.placement import check_region_rule

CODES = [Code(2, 1), Code(4, 2), Code(6, 3), Code(1, 2), Code(8, 4), Code(10, 4)]
REGIONS = ("a", "b", "c")


def shards(code: Code, length: int, seed: int = 1) -> list[bytes]:
    """All n shards of a random stripe."""
    chance = random.Random(seed)
    data = [chance.randbytes(length) for _ in range(code.k)]
    parity = [bytearray(length) for _ in range(code.m)]
    erasure.encode(code, length, data, parity)
    return [*data, *map(bytes, parity)]


@pytest.mark.parametrize("code", CODES, ids=str)
def test_parity_is_what_reedsolo_says(code: Code) -> None:
    whole = shards(code, 128)
    codec = reedsolo.RSCodec(code.m)
    for column in range(128):
        data = bytes(shard[column] for shard in whole[: code.k])
        if code.k == 1:
            expected = data * code.m
        else:
            expected = bytes(codec.encode(data))[code.k :]
        assert bytes(shard[column] for shard in whole[code.k :]) == expected


@pytest.mark.parametrize("length", [1, 63, 64, 100, 4096])
@pytest.mark.parametrize("code", CODES, ids=str)
def test_any_k_shards_give_all_others(code: Code, length: int) -> None:
    whole = shards(code, length)
    patterns = list(itertools.combinations(range(code.n), code.k))
    for kept in random.Random(2).sample(patterns, min(len(patterns), 500)):
        wanted = [index for index in range(code.n) if index not in kept]
        rebuilt = erasure.rebuild(code, length, {i: whole[i] for i in kept}, wanted)
        assert {i: bytes(data) for i, data in rebuilt.items()} == {i: whole[i] for i in wanted}


def product(left: list[list[int]], right: list[list[int]]) -> list[list[int]]:
    """The product of two matrices, by reedsolo's multiplication without tables."""
    result = [[0] * len(right[0]) for _ in left]
    for i, j, inner in itertools.product(range(len(left)), range(len(right[0])), range(len(right))):
        result[i][j] ^= reedsolo.gf_mult_noLUT(left[i][inner], right[inner][j], prim=0x11D)
    return result


def identity(size: int) -> list[list[int]]:
    """The matrix that changes nothing."""
    return [[int(i == j) for j in range(size)] for i in range(size)]


def test_all_products_are_what_reedsolo_says() -> None:
    column = [[a] for a in range(256)]
    assert erasure._product(column, [list(range(256))]) == product(column, [list(range(256))])


@pytest.mark.parametrize("size", range(1, 11))
def test_matrix_products_are_what_reedsolo_says(size: int) -> None:
    chance = random.Random(size)
    for rows, columns in itertools.product((1, 2, size), (1, size, 70)):
        left = [list(chance.randbytes(size)) for _ in range(rows)]
        right = [list(chance.randbytes(columns)) for _ in range(size)]
        assert erasure._product(left, right) == product(left, right)


@pytest.mark.parametrize("size", range(1, 11))
def test_a_matrix_times_its_inverse_is_one_to_reedsolo(size: int) -> None:
    chance = random.Random(size)
    for _ in range(30):
        lower = [
            [chance.randrange(256) if j < i else int(i == j) for j in range(size)]
            for i in range(size)
        ]
        upper = [[chance.randrange(256) if j > i else 0 for j in range(size)] for i in range(size)]
        for i in range(size):
            upper[i][i] = chance.randrange(1, 256)
        matrix = product(lower, upper)
        chance.shuffle(matrix)
        assert product(matrix, erasure._inverse(matrix)) == identity(size)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_any_k_rows_of_a_code_have_an_inverse(code: Code) -> None:
    patterns = list(itertools.combinations(erasure.generator(code), code.k))
    for rows in random.Random(3).sample(patterns, min(len(patterns), 40)):
        matrix = [*rows]
        assert product(matrix, erasure._inverse(matrix)) == identity(code.k)


def test_a_singular_matrix_has_no_inverse() -> None:
    for matrix in ([[0]], [[1, 2], [1, 2]], [[0, 0], [0, 1]], product([[3], [5]], [[7, 9]])):
        with pytest.raises(ValueError, match="singular"):
            erasure._inverse(matrix)


def test_too_few_shards_are_refused() -> None:
    whole = shards(Code(4, 2), 64)
    with pytest.raises(ValueError, match="too few"):
        erasure.rebuild(Code(4, 2), 64, {0: whole[0], 1: whole[1], 5: whole[5]}, [2])


def test_codes_made_in_many_threads_at_once_are_right() -> None:
    codes = [Code(k, m) for k in range(2, 10) for m in range(1, 5)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=erasure.self_check, args=(code,)) for code in codes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for code in codes:
        unit = [bytes(int(i == j) for j in range(code.k)) for i in range(code.k)]
        codec = reedsolo.RSCodec(code.m)
        columns = [bytes(codec.encode(vector))[code.k :] for vector in unit]
        assert erasure.generator(code)[code.k :] == [
            [column[i] for column in columns] for i in range(code.m)
        ]


@pytest.mark.parametrize(
    "text", ["", "2", "2+", "+1", "0+1", "2-1", "2+1+1", "60+60", "3+0", "x+y"]
)
def test_what_is_no_code_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Code.parse(text)


def test_codes_read_as_they_are_written() -> None:
    for code in CODES:
        assert Code.parse(str(code)) == code


@pytest.mark.parametrize("code", CODES[:4], ids=str)
def test_shards_are_padded_to_64_bytes_and_hold_the_stripe(code: Code) -> None:
    for length in (1, 63, 64 * code.k, 64 * code.k + 1, 1 << 20):
        shard = code.shard_length(length)
        assert shard % 64 == 0
        assert shard * code.k >= length > (shard - 64) * code.k


def test_the_region_rule_names_codes_that_a_region_could_take_away() -> None:
    for text in ("2+1", "4+2", "6+3", "1+2", "8+4"):
        assert check_region_rule(Code.parse(text), REGIONS) is None
    for text in ("10+4", "1+0", "4+1"):
        assert text in str(check_region_rule(Code.parse(text), REGIONS))
    assert check_region_rule(Code(2, 1), ("a", "b")) is not None
    assert check_region_rule(Code(4, 2), ("a", "a", "b", "b", "c", "c")) is None
