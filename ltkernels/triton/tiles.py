"""How kernels over rows of logits see memory: groups of rows, the neighbours in it, tiles, and the width of accesses.

Rows are numbered through ``groups`` of ``inner`` rows at one stride: one group for ``(N, C)`` logits, N groups of D for
``(N, C, D)`` ones, or one again where the strides allow it. A program works on tiles of R rows of a group, and of each
K L classes. A tile has three dimensions, ``[K, R, L]``: class ``k L + l`` stands at ``[k, :, l]``.

Triton gives a tile's last dimension to the threads of a warp first, with as many neighbouring elements each as one
access takes, then another one to the warps, and what is left to the registers of a thread. The other one is the second
since Triton 3.7, but the first before: there, tiles are ``[R, K, L]`` (``ROW_AXIS``). So R and L say who shares a row.
With L = what one access of a warp covers, a warp has its rows for itself: a row's sum is taken in registers (K), then
with five shuffles. With L = what one access of all warps covers, the block shares one long row. Where rows and not
classes are neighbours in memory, L is 1 and all threads lie along R: every one has rows for itself.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import triton
import triton.language as tl

CLASSES, ROWS, NEITHER = 1, 2, 0
"""``Access.unit``: which neighbours in a tile are neighbours in memory."""
_CLASSES, _ROWS = tl.constexpr(CLASSES), tl.constexpr(ROWS)

LOGITS = 4096
"""Logits of a tile, for four warps: 32 a thread, of which bf16 takes four 128-bit loads under way together.

A multiprocessor then waits for 8 KB a block, and the 13 KB that an H100 needs in flight (benchmarks/codecheck) are
there with two blocks, where six to eight fit. float64 has half as many logits, in as many registers.
"""
WARPS = 4

ROW_AXIS = tl.constexpr(1 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 0)
"""The dimension of a tile that the rows are."""


# --- On the host ---


class Strides(NamedTuple):
    """In elements: from group to group, class to class and row to row."""

    group: int
    classes: int
    row: int


class Grouped(NamedTuple):
    """Rows in groups, and the strides of every tensor over them."""

    groups: int
    inner: int
    strides: tuple[Strides, ...]


def group_rows(shape: Sequence[int], *strides: Sequence[int]) -> Grouped:
    """The fewest groups for logits of ``shape`` and tensors with ``strides`` of logits, of rows, or none (a number)."""
    rows, inner = shape[0], shape[2] if len(shape) == 3 else 1
    of_logits, of_rows = len(shape), len(shape) - 1

    def split(of: Sequence[int]) -> tuple[int, int, int]:
        """Strides along N, C, D."""
        if len(of) == of_logits:
            return of[0], of[1], of[2] if len(of) == 3 else 0
        if len(of) == of_rows:
            return of[0], 0, of[1] if len(of) == 2 else 0
        return 0, 0, 0

    parts = [split(of) for of in strides]
    if rows * inner == 0:
        return Grouped(0, 1, tuple(Strides(0, c, 0) for _, c, _ in parts))
    if inner == 1:
        return Grouped(1, rows, tuple(Strides(0, c, n) for n, c, _ in parts))
    if rows == 1 or all(n == d * inner for n, _, d in parts):
        return Grouped(1, rows * inner, tuple(Strides(0, c, d) for _, c, d in parts))
    return Grouped(rows, inner, tuple(Strides(n, c, d) for n, c, d in parts))


class Access(NamedTuple):
    """The neighbours in memory, and how many of them one access may take: every run of so many is aligned."""

    unit: int
    vector: int


def access(classes: int, grouped: Grouped, tensors: Sequence[tuple[Strides, int, int]]) -> Access:
    """For kernels that visit ``tensors``, each with strides, bytes an element and address (modulo 16), together."""
    if classes == 1 or all(strides.classes == 1 for strides, _, _ in tensors):
        unit, vector = CLASSES, gcd(16, classes)
        steps = [strides.row if grouped.inner > 1 else 0 for strides, _, _ in tensors]
    elif all(strides.row == 1 for strides, _, _ in tensors):
        unit, vector = ROWS, gcd(16, grouped.inner)
        steps = [strides.classes for strides, _, _ in tensors]
    else:
        return Access(NEITHER, 1)
    if grouped.groups > 1:
        steps += [strides.group for strides, _, _ in tensors]
    vector = gcd(vector, 16 // min(size for _, size, _ in tensors), *steps)
    while any(address % min(16, vector * size) for _, size, address in tensors):
        vector //= 2
    return Access(unit, vector)


class Tile(NamedTuple):
    """The dimensions of a tile, and the warps that work on it."""

    K: int
    R: int
    L: int
    warps: int

    @property
    def columns(self) -> int:
        return self.K * self.L

    def count(self, grouped: Grouped) -> int:
        """Tiles of ``columns`` classes over all rows."""
        return grouped.groups * cdiv(grouped.inner, self.R)


def tile(columns: int, grouped: Grouped, by: Access, logits: int, warps: int) -> Tile:
    """A tile of ``logits`` logits and at most ``columns`` classes, a power of two.

    It depends on the rows only where they are many small groups: another number of samples compiles no other kernel.
    """
    columns = min(columns, logits)
    rows = next_power_of_2(grouped.inner) if grouped.groups > 1 else logits
    if by.unit == ROWS:
        R = min(rows, 32 * by.vector * warps, logits)
        return Tile(min(columns, logits // R), R, 1, warps)
    sharing = max(1, columns * warps // logits)  # warps that have a row together
    L = min(columns, 32 * by.vector * sharing)
    return Tile(columns // L, min(rows, logits // columns), L, warps)


def chunk_columns(classes: int, widest: int) -> int:
    """A power of two, chunks of which cover the classes with at most an eighth to spare, or with the least."""
    if classes <= widest // 8:
        return next_power_of_2(classes)
    choices = (widest, widest // 2, widest // 4, widest // 8)
    covered = {c: cdiv(classes, c) * c for c in choices}
    return next((c for c in choices if covered[c] <= classes * 9 // 8), min(choices, key=lambda c: covered[c]))


def even_share(tiles: int, most: int) -> int:
    """Programs, at most ``most``, that get equally many tiles, but for the last: none has more while others wait."""
    return max(1, cdiv(tiles, max(1, cdiv(tiles, most))))


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not less than ``n``."""
    return 1 << max(0, n - 1).bit_length()


# --- In kernels ---


@triton.jit
def of_rows(values):
    """``values`` ``[R]`` of a tile's rows, so that they go with its logits."""
    return values[None, :, None] if ROW_AXIS == 1 else values[:, None, None]


@triton.jit
def of_lanes(values):
    """``values`` ``[R, L]``, so that they go with a tile's logits."""
    return values[None, :, :] if ROW_AXIS == 1 else values[:, None, :]


@triton.jit
def lane_sum(logits):
    """Over K: ``[R, L]``."""
    return tl.sum(logits, 1 - ROW_AXIS)


@triton.jit
def lane_max(logits):
    """Over K: ``[R, L]``."""
    return tl.max(logits, 1 - ROW_AXIS)


@triton.jit
def no_logits(K: tl.constexpr, R: tl.constexpr, L: tl.constexpr, T: tl.constexpr):
    """A tile of zeros."""
    return tl.zeros((K, R, L) if ROW_AXIS == 1 else (R, K, L), T)


@triton.jit
def tile_columns(K: tl.constexpr, L: tl.constexpr):
    """The classes of a tile that begins at class 0, the same for all rows: of shape 1 along ``ROW_AXIS``."""
    k = tl.arange(0, K) * L
    return (k[:, None, None] if ROW_AXIS == 1 else k[None, :, None]) + tl.arange(0, L)[None, None, :]


@triton.jit
def multiple(value, VEC: tl.constexpr):
    """``value``, which is a multiple of VEC, said so that Triton derives the width of accesses from it.

    Of an argument it would know only whether 16 divides it, and compile again for one that 16 does not divide.
    """
    return value // VEC * VEC


@triton.jit
def pointers(
    base, group, place, columns, stride_group, stride_class, stride_row, UNIT: tl.constexpr, VEC: tl.constexpr
):
    """Pointers to a tile: the rows at ``place`` ``[R]`` of a group, the classes ``columns``."""
    BYTES: tl.constexpr = base.dtype.element_ty.primitive_bitwidth // 8 * VEC
    base += group.to(tl.int64) * stride_group
    base = tl.multiple_of(base, 16 if BYTES > 16 else BYTES)
    if UNIT == _CLASSES:
        return of_rows(base + place.to(tl.int64) * multiple(stride_row, VEC)) + columns
    elif UNIT == _ROWS:
        return base + columns.to(tl.int64) * multiple(stride_class, VEC) + of_rows(place)
    else:
        return of_rows(base + place.to(tl.int64) * stride_row) + columns.to(tl.int64) * stride_class


@triton.jit
def are_classes(columns, classes, UNIT: tl.constexpr, VEC: tl.constexpr):
    """Which columns are classes, the same for all that one access takes."""
    return columns < (multiple(classes, VEC) if UNIT == _CLASSES else classes)


@triton.jit
def are_rows(place, inner, UNIT: tl.constexpr, VEC: tl.constexpr):
    """Which places in a group are rows, the same for all that one access takes."""
    return place < (multiple(inner, VEC) if UNIT == _ROWS else inner)


@triton.jit
def share_of_tiles(split, splits, groups, inner, R: tl.constexpr):
    """The tiles [first, last) of rows that are one of equal shares, and how many tiles a group has."""
    blocks = tl.cdiv(inner, R)
    share = tl.cdiv(groups * blocks, splits)
    first = split * share
    return first, tl.minimum(first + share, groups * blocks), blocks


@triton.jit
def rows_of_tile(tile, blocks, inner, UNIT: tl.constexpr, VEC: tl.constexpr, R: tl.constexpr):
    """Of a tile's rows: their group, places in it ``[R]``, which of them exist, and their numbers."""
    group = tile // blocks
    place = tile % blocks * R + tl.arange(0, R)
    return group, place, are_rows(place, inner, UNIT, VEC), group * inner + place


@triton.jit
def row_offsets(group, place, stride_group, stride_row):
    """Where rows lie in a tensor that has a number for each, or their class 0 in one of logits."""
    return group.to(tl.int64) * stride_group + place.to(tl.int64) * stride_row


@triton.jit
def chunk_of_classes(classes, UNIT: tl.constexpr, VEC: tl.constexpr, K: tl.constexpr, L: tl.constexpr):
    """Of a program that has a chunk of the classes and a split of the rows: both, how many splits, and the classes.

    Programs are numbered chunks first: those that run together read neighbouring parts of the same rows.
    """
    chunks = tl.cdiv(classes, K * L)
    chunk = tl.program_id(0) % chunks
    columns = chunk * (K * L) + tile_columns(K, L)
    inside = are_classes(columns, classes, UNIT, VEC)
    return chunk, tl.program_id(0) // chunks, tl.num_programs(0) // chunks, columns, inside
