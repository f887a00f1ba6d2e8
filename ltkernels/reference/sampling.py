"""Which sample a position of the stream is, in plain PyTorch: the definition that the kernels are tested against.

Integers only, so that every backend computes the same bits. A sample is a pure function of (seed, epoch, position): a
block of Philox4x32-10 (Salmon et al. 2011) with key = seed and counter = (position, epoch, stream) of 64, 32 and 32
bits.

* Classes that are drawn, with replacement. Words 0 and 1 are a fraction of 64 bits. Its product with C has, in front of
  the point, a column of the alias table (Walker 1977, Vose 1991) and, behind it, what is compared with the column's
  threshold: below it the class is the column, else the column's alias. Words 2 and 3 are a fraction of 64 bits whose
  product with the class's size is the member.
* Classes that are dealt, without replacement. A round has groups of ``draws`` positions of one class. The groups of a
  round are shuffled within windows, in which no class occurs twice, so that the number of draws that a class had before
  is known without looking at them. Members are taken in cycles through random permutations of the class.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DRAWS, CLASS_ORDERS, MEMBER_ORDERS, REPEATS = range(4)  # streams, as in csrc/common/philox.h
PERMUTATION_ROUNDS, SMALL_PERMUTATION = 12, 16  # as in csrc/common/permutation.h
_LOW = 0xFFFFFFFF


class SamplingOptions(NamedTuple):
    """What the op takes beside tensors."""

    classes: int
    groups: int
    """Groups in a round of classes that are dealt; 0 where classes are drawn."""
    draws: int
    """Positions in a group: draws of one class, one after the other."""
    distinct: bool
    """Whether a group has no member twice, where its class has enough."""
    seed: int
    epoch: int
    start: int
    step: int
    num_positions: int


def sample_indices(
    offsets: Tensor,
    members: Tensor,
    alias_table: Tensor | None,
    slots: Tensor | None,
    quotas: Tensor | None,
    start_at: Tensor | None,
    epoch_at: Tensor | None,
    options: SamplingOptions,
) -> Tensor:
    """The samples at positions ``start + i * step``, i < num_positions.

    Args:
        offsets: int64 ``(C + 1,)``: class c has the members ``[offsets[c], offsets[c + 1])``. Empty: every member is a
            class of its own.
        members: int32 or int64: the samples in the order of their classes. Empty: member m is sample m.
        alias_table: int64 ``(C,)``: a threshold in the low and an alias in the high 32 bits. None: all classes have the
            same probability.
        slots: int32 ``(groups, 4)``: start and size of the window, class, draws of this class in the slots before.
            None: a round has every class once, in one window, or the first ``groups`` of them.
        quotas: int32 ``(C,)``: slots of a class, with ``slots``.
        start_at: int64, 0-d, on the device: added to ``start``.
        epoch_at: int64, 0-d, on the device: added to ``epoch``.
        options: the rest.

    Returns:
        int64 ``(num_positions,)``; -1 where a class came that has no member, which callers refuse where they can look.
    """
    position = torch.arange(options.num_positions, device=offsets.device) * options.step + options.start
    epoch = torch.tensor(options.epoch, device=offsets.device)
    if start_at is not None:
        position = position + start_at
    if epoch_at is not None:
        epoch = epoch + epoch_at
    if options.groups:
        classes, at = _dealt(offsets, slots, quotas, position, epoch & _LOW, options)
    else:
        classes, at = _drawn(offsets, alias_table, position, epoch & _LOW, options)
    sizes = _class_sizes(offsets, classes)
    at = classes if offsets.numel() == 0 else offsets[classes] + at
    samples = at if members.numel() == 0 else members[at.clamp(max=members.numel() - 1)].to(torch.int64)
    return torch.where(sizes > 0, samples, -1)


def _drawn(
    offsets: Tensor, alias_table: Tensor | None, position: Tensor, epoch: Tensor, options: SamplingOptions
) -> tuple[Tensor, Tensor]:
    first, second, low, high = philox(position, epoch, DRAWS, options.seed)
    point = first * options.classes + (second * options.classes >> 32)  # C < 2^31: no product overflows
    classes = point >> 32
    if alias_table is not None:
        entry = alias_table[classes]
        classes = torch.where(point & _LOW < entry & _LOW, classes, entry >> 32)
    return classes, _multiply_high(high, low, _class_sizes(offsets, classes))


def _dealt(
    offsets: Tensor,
    slots: Tensor | None,
    quotas: Tensor | None,
    position: Tensor,
    epoch: Tensor,
    options: SamplingOptions,
) -> tuple[Tensor, Tensor]:
    group, draw = position // options.draws, position % options.draws
    turn, place = group // options.groups, group % options.groups
    if slots is None or quotas is None:
        key = philox(turn * options.groups, epoch, CLASS_ORDERS, options.seed)
        classes = permuted(place, torch.full_like(place, options.classes), key)
    else:
        start, size = slots[place, 0].to(torch.int64), slots[place, 1].to(torch.int64)
        key = philox(turn * options.groups + start, epoch, CLASS_ORDERS, options.seed)
        slot = slots[start + permuted(place - start, size, key)]
        classes = slot[:, 2].to(torch.int64)
        turn = turn * quotas[classes] + slot[:, 3]
    sizes = _class_sizes(offsets, classes).clamp(min=1)  # of an empty class the result is not used
    ordinal = turn * options.draws + draw
    length = torch.where(sizes >= options.draws, sizes - sizes % options.draws, sizes) if options.distinct else sizes
    cycle = ordinal // length
    key = philox((classes << 32) | (cycle & _LOW), epoch, MEMBER_ORDERS, options.seed)
    return classes, permuted(ordinal % length, sizes, key)


def _class_sizes(offsets: Tensor, classes: Tensor) -> Tensor:
    return torch.ones_like(classes) if offsets.numel() == 0 else offsets[classes + 1] - offsets[classes]


def philox(position: Tensor, epoch: Tensor, stream: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of a block of Philox4x32-10, as int64 in [0, 2^32).

    Args:
        position: int64, any shape, taken as 64 bits without a sign.
        epoch: int64 in [0, 2^32), of the same shape or 0-d.
        stream: which sequence of blocks: this module's constants.
        seed: 64 bits.
    """
    c0, c1 = position & _LOW, position >> 32 & _LOW
    c2, c3 = epoch.expand_as(position), torch.full_like(position, stream)
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        even, odd = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # the sign of a product that overflows is its highest bit
        c0, c1, c2, c3 = (odd >> 32 & _LOW) ^ c1 ^ k0, odd & _LOW, (even >> 32 & _LOW) ^ c3 ^ k1, even & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _multiply_high(high: Tensor, low: Tensor, n: Tensor) -> Tensor:
    """The high 64 bits of ``(2^32 high + low) n``, from products of 32-bit halves."""
    n_high, n_low = n >> 32, n & _LOW
    of_high, of_low = high * n_low, low * n_high
    middle = (of_high & _LOW) + (of_low & _LOW) + (low * n_low >> 32 & _LOW)
    return high * n_high + (of_high >> 32 & _LOW) + (of_low >> 32 & _LOW) + (middle >> 32)


def permuted(x: Tensor, n: Tensor, key: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The image of ``x`` in a random permutation of ``[0, n)``, which ``key`` chooses: elementwise, without a table.

    Up to 16 elements, transpositions with partners that are the digits of a fraction in bases n, n - 1, ..., 2. Beyond,
    a Feistel network on the smallest power of two that holds n, repeated for what lands beyond n. How good both are
    stands in csrc/common/permutation.h.
    """
    fraction, of_few = key[1] << 32 | key[0], x
    for last in range(SMALL_PERMUTATION - 1, 0, -1):
        base = last + 1
        partner = ((fraction >> 32 & _LOW) * base + ((fraction & _LOW) * base >> 32)) >> 32
        swapped = torch.where(of_few == last, partner, torch.where(of_few == partner, last, of_few))
        of_few = torch.where(last < n, swapped, of_few)
        fraction = torch.where(last < n, fraction * base, fraction)

    bits = torch.full_like(n, 5)
    for power in range(5, int(n.max()).bit_length() if n.numel() else 0):
        bits += (1 << power) < n
    low_bits = bits // 2
    high_bits = bits - low_bits
    inside, of_many = n <= SMALL_PERMUTATION, x
    low, high = x & ((1 << low_bits) - 1), x >> low_bits
    while not bool(inside.all()):
        for turn in range(0, PERMUTATION_ROUNDS, 2):
            shift = turn // 4 * 0x9E3779B9
            high = high ^ _mixed_bits(low, key[turn % 4] + shift & _LOW, high_bits)
            low = low ^ _mixed_bits(high, key[turn % 4 + 1] + shift & _LOW, low_bits)
        landed = high << low_bits | low
        of_many = torch.where(inside, of_many, landed)
        inside = inside | (landed < n)
    return torch.where(n <= SMALL_PERMUTATION, of_few, of_many)


def _mixed_bits(value: Tensor, key: Tensor, bits: Tensor) -> Tensor:
    x = (value ^ key) * 0x85EBCA6B & _LOW
    x = (x ^ x >> 16) * 0xC2B2AE35 & _LOW
    return x >> (32 - bits)
