"""The erasure code: k data shards and m parity shards; any k of them restore the stripe.

reedsolo defines the code, and ISA-L computes it.  The parity matrix consists of the
parities of `reedsolo.RSCodec(m)` for unit vectors (field GF(2^8), polynomial 0x11d, the
default of reedsolo).  `ec_encode_data` of ISA-L multiplies by a matrix, and
`gf_invert_matrix` inverts the matrices that rebuild shards.  For k = 1 the parity rows
are all ones, so that replicas are plain copies.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Self

import reedsolo
from cffi import FFI
from typing_extensions import Buffer

from ..errors import FusestoreError, UsageError
from ..limits import SHARD_ALIGN_BYTES, SHARDS_MAX

_ffi = FFI()
_ffi.cdef(
    """
    void ec_init_tables(int k, int rows, unsigned char *a, unsigned char *gftbls);
    void ec_encode_data(int len, int k, int rows, unsigned char *gftbls,
                        unsigned char **data, unsigned char **coding);
    int gf_invert_matrix(unsigned char *in, unsigned char *out, const int n);
    """
)

Matrix = list[list[int]]

_building = threading.RLock()
"""Held while tables are built: the codecs of reedsolo share global tables."""


@dataclass(frozen=True, slots=True, order=True)
class Code:
    """k data shards and m parity shards per stripe; written `2+1`."""

    k: int
    m: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `K+M`; UsageError if it is not a possible code."""
        found = re.fullmatch(r"([1-9][0-9]?)\+(0|[1-9][0-9]?)", text.strip())
        if not found:
            raise UsageError(f"{text!r} is not a code: write it as K+M, for example 2+1 or 4+2.")
        code = cls(int(found[1]), int(found[2]))
        if code.n > SHARDS_MAX:
            raise UsageError(f"code {code} has more than {SHARDS_MAX} shards.")
        if code.m == 0 and code.k > 1:
            raise UsageError(f"code {code} has no parity; only 1+0 may have none.")
        return code

    @property
    def n(self) -> int:
        """The number of shards of a stripe, k + m."""
        return self.k + self.m

    @property
    def is_possible(self) -> bool:
        """Whether `parse` could return this code."""
        return 0 < self.k < self.n <= SHARDS_MAX or self.n == self.k == 1

    def shard_length(self, stripe_length: int) -> int:
        """Return the bytes of each shard of a stripe of `stripe_length` > 0 bytes, padded to 64."""
        step = self.k * SHARD_ALIGN_BYTES
        return (stripe_length + step - 1) // step * SHARD_ALIGN_BYTES

    def __str__(self) -> str:
        return f"{self.k}+{self.m}"


@cache
def _isal() -> Any:
    try:
        return _ffi.dlopen("libisal.so.2")
    except OSError as error:
        raise FusestoreError(
            f"The library libisal.so.2 cannot be loaded ({error}): install libisal2."
        ) from None


@cache
def generator(code: Code) -> Matrix:
    """Return the n × k matrix that maps the data shards of a stripe to all of its shards."""
    rows = [[int(i == j) for j in range(code.k)] for i in range(code.k)]
    if code.k == 1:
        return rows + [[1] for _ in range(code.m)]
    codec = reedsolo.RSCodec(code.m)
    columns = [
        codec.encode(bytes(int(i == j) for i in range(code.k)))[code.k :] for j in range(code.k)
    ]
    return rows + [[column[i] for column in columns] for i in range(code.m)]


def _flat(matrix: Matrix) -> bytes:
    return bytes(value for row in matrix for value in row)


def _inverse(matrix: Matrix) -> Matrix:
    """Return the inverse of a square matrix over GF(2^8); ValueError if it is singular."""
    size = len(matrix)
    inverse = bytearray(size * size)
    work = bytearray(_flat(matrix))  # gf_invert_matrix destroys it
    if _isal().gf_invert_matrix(_ffi.from_buffer(work), _ffi.from_buffer(inverse), size):
        raise ValueError("a singular matrix has no inverse")
    return [list(inverse[start : start + size]) for start in range(0, size * size, size)]


def _product(left: Matrix, right: Matrix) -> Matrix:
    """Return the product of two matrices over GF(2^8)."""
    length = len(right[0])
    rows = [bytearray(length) for _ in left]
    _apply(_expand(left), length, [bytes(row) for row in right], rows)
    return [list(row) for row in rows]


def _expand(matrix: Matrix) -> Any:
    """Return ISA-L's multiplication tables for a matrix: 32 bytes per element."""
    rows, k = len(matrix), len(matrix[0])
    tables = _ffi.new("unsigned char[]", 32 * rows * k)
    _isal().ec_init_tables(k, rows, _ffi.from_buffer(_flat(matrix)), tables)
    return tables


@cache
def _checked_tables(code: Code) -> Any:
    tables = _expand(generator(code)[code.k :])
    if code.k > 1:
        _check(code, tables)
    return tables


def _encode_tables(code: Code) -> Any:
    with _building:
        return _checked_tables(code)


@lru_cache(maxsize=1024)
def _inverted_tables(code: Code, present: tuple[int, ...], wanted: tuple[int, ...]) -> Any:
    matrix = generator(code)
    inverse = _inverse([matrix[index] for index in present])
    return _expand(_product([matrix[index] for index in wanted], inverse))


def _rebuild_tables(code: Code, present: tuple[int, ...], wanted: tuple[int, ...]) -> Any:
    with _building:
        return _inverted_tables(code, present, wanted)


def _apply(tables: Any, length: int, inputs: Sequence[Buffer], outputs: Sequence[Buffer]) -> None:
    sources = [_ffi.from_buffer("unsigned char[]", data) for data in inputs]
    targets = [_ffi.from_buffer("unsigned char[]", data, require_writable=True) for data in outputs]
    if any(len(data) < length for data in (*sources, *targets)):
        raise ValueError("a shard is shorter than the length to code")
    _isal().ec_encode_data(
        length,
        len(sources),
        len(targets),
        tables,
        _ffi.new("unsigned char *[]", sources),
        _ffi.new("unsigned char *[]", targets),
    )


def encode(code: Code, length: int, data: Sequence[Buffer], parity: Sequence[Buffer]) -> None:
    """Fill the m buffers `parity` from the k buffers `data`, `length` bytes of each.

    Releases the GIL meanwhile.
    """
    if code.m:
        _apply(_encode_tables(code), length, data, parity)


def rebuild(
    code: Code, length: int, present: Mapping[int, Buffer], wanted: Sequence[int]
) -> dict[int, bytearray]:
    """Compute the shards `wanted` (by index) from any k of `present`.

    The code works byte by byte, so the buffers may hold the same range of each shard
    instead of whole shards; `length` is the length of the buffers.
    """
    chosen = tuple(sorted(present)[: code.k])
    if len(chosen) < code.k:
        raise ValueError(f"{len(chosen)} shards are too few for code {code}")
    outputs = {index: bytearray(length) for index in wanted}
    tables = _rebuild_tables(code, chosen, tuple(wanted))
    _apply(tables, length, [present[index] for index in chosen], list(outputs.values()))
    return outputs


def self_check(code: Code) -> None:
    """Prepare a code; FusestoreError if ISA-L and reedsolo disagree about it.

    Every code is checked this way before its first use.
    """
    _encode_tables(code)


def _check(code: Code, tables: Any) -> None:
    """Compare one small stripe with the result of reedsolo."""
    data = [bytes((7 * i + 31 * j + 1) & 0xFF for j in range(64)) for i in range(code.k)]
    parity = [bytearray(64) for _ in range(code.m)]
    if code.m:
        _apply(tables, 64, data, parity)
    codec = reedsolo.RSCodec(code.m)
    for column in (0, 17, 63):
        expected = codec.encode(bytes(shard[column] for shard in data))[code.k :]
        if bytes(shard[column] for shard in parity) != bytes(expected):
            raise FusestoreError(
                f"ISA-L and reedsolo disagree about code {code} on this machine: "
                "do not use it for data; check libisal2 and the memory."
            )
