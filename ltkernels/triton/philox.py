"""Random bits: csrc/common/philox.h in Triton."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def high(x):
    return (x >> 32).to(tl.uint32)


@triton.jit
def wide(x):
    """So that a product of two has all its 64 bits: one instruction."""
    return x.to(tl.uint32).to(tl.uint64)


@triton.jit
def philox(position, epoch, STREAM: tl.constexpr, seed):
    """A block of Philox4x32-10: four vectors of uint32, of the shape of ``position``."""
    c0, c1 = position.to(tl.uint32), high(position)
    c2, c3 = tl.zeros_like(c0) + epoch, tl.zeros_like(c0) + STREAM
    k0, k1 = seed.to(tl.uint32), high(seed)
    for _ in tl.static_range(10):
        even, odd = wide(c0) * 0xD2511F53, wide(c2) * 0xCD9E8D57
        c0, c1, c2, c3 = high(odd) ^ c1 ^ k0, odd.to(tl.uint32), high(even) ^ c3 ^ k1, even.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def class_words(row, columns, classes, epoch, STREAM: tl.constexpr, seed):
    """A word for each class of a row: a block is four neighbouring classes'."""
    r0, r1, r2, r3 = philox(row.to(tl.int64) * ((classes + 3) // 4) + columns // 4, epoch, STREAM, seed)
    place = columns % 4
    return tl.where(place < 2, tl.where(place == 0, r0, r1), tl.where(place == 2, r2, r3))
