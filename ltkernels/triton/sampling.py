"""Class-balanced samples in Triton: one launch, every position alone. What is computed: reference/sampling.py.

To draw is a chain of gathers, which a program has for many positions under way. To deal is arithmetic, in loops that go
on until the last position of a program is through: there a program is a warp, so that few wait for one.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltkernels.triton import Variant, tiles
from ltkernels.triton.philox import high, philox, wide

_DRAWS, _CLASS_ORDERS, _MEMBER_ORDERS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # csrc/common/philox.h
_ROUNDS, _SMALL = tl.constexpr(12), tl.constexpr(16)  # csrc/common/permutation.h
_DRAWN, _DEALT = (512, 4), (64, 1)  # positions and warps of a program

# --- Random bits and permutations ---


@triton.jit
def _joined(high, low):
    return (wide(high) << 32) | wide(low)


@triton.jit
def _multiply_high(a, n):
    """The high 64 bits of the product of uint64."""
    of_high, of_low = wide(high(a)) * wide(n), wide(a) * wide(high(n))
    middle = wide(of_high) + wide(of_low) + wide(high(wide(a) * wide(n)))
    return wide(high(a)) * wide(high(n)) + (of_high >> 32) + (of_low >> 32) + (middle >> 32)


@triton.jit
def _quotient(a, n):
    """``a // n`` of int64 >= 0; what has no more than 32 bits is divided in a fifth of the instructions."""
    if tl.max(tl.where((a | n) >> 32 == 0, 0, 1), 0) == 0:
        quotient = (a.to(tl.uint32) // n.to(tl.uint32)).to(tl.int64)
    else:
        quotient = a // n
    return quotient


@triton.jit
def _mixed_bits(value, key, bits):
    x = (value ^ key) * 0x85EBCA6B
    x = (x ^ (x >> 16)) * 0xC2B2AE35
    return x >> (32 - bits).to(tl.uint32)


@triton.jit
def _permuted_few(x, n, r0, r1):
    """For n <= 16: transpositions, whose partners are the digits of a fraction."""
    fraction = _joined(r1, r0)
    for step in tl.static_range(_SMALL - 1):
        last = _SMALL - 1 - step
        product_high = (fraction >> 32) * (last + 1) + ((fraction & 0xFFFFFFFF) * (last + 1) >> 32)
        partner = (product_high >> 32).to(tl.int64)
        swapped = tl.where(x == last, partner, tl.where(x == partner, last, x))
        x = tl.where(last < n, swapped, x)
        fraction = tl.where(last < n, fraction * (last + 1), fraction)
    return x


@triton.jit
def _permuted_many(x, n, r0, r1, r2, r3):
    """For n > 16: a Feistel network on a power of two, again for what lands beyond n. Smaller n keep their x."""
    # Bits of n - 1, from the exponent of a float that has no second bit to round up.
    most = n - 1
    exponent = ((most & ~(most >> 1)).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    bits = tl.where(n > _SMALL, exponent + 1, 5)
    low_bits = bits >> 1
    high_bits = bits - low_bits
    low, high = (x & ((1 << low_bits.to(tl.int64)) - 1)).to(tl.uint32), (x >> low_bits.to(tl.int64)).to(tl.uint32)
    inside = n <= _SMALL
    while tl.max(tl.where(inside, 0, 1), 0) > 0:
        for turn in tl.static_range(_ROUNDS // 2):
            shift = turn // 2 * 0x9E3779B9 & 0xFFFFFFFF
            high ^= _mixed_bits(low, (r0 if turn % 2 == 0 else r2) + shift, high_bits)
            low ^= _mixed_bits(high, (r1 if turn % 2 == 0 else r3) + shift, low_bits)
        landed = ((wide(high) << low_bits.to(tl.uint64)) | wide(low)).to(tl.int64)
        x = tl.where(inside, x, landed)
        inside = inside | (landed < n)
    return x


@triton.jit
def _permuted(x, n, r0, r1, r2, r3):
    few = n <= _SMALL
    of_few = x
    if tl.max(tl.where(few, 1, 0), 0) > 0:
        of_few = _permuted_few(x, n, r0, r1)
    return tl.where(few, of_few, _permuted_many(x, n, r0, r1, r2, r3))


# --- Positions ---


@triton.jit
def _positions(start_at, epoch_at, epoch, start, step, count, BLOCK: tl.constexpr):
    """Epoch and positions of a program. Beyond the end it is the last position again: nothing needs a mask."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    epoch = tl.full((), epoch, tl.uint32)
    start = tl.full((), start, tl.int64)
    if start_at is not None:
        start += tl.load(start_at)
    if epoch_at is not None:
        epoch += tl.load(epoch_at).to(tl.uint32)
    return epoch, start + tl.minimum(i, tl.full((), count, tl.int64) - 1) * step


@triton.jit
def _class_size(offsets, classes):
    if offsets is None:
        return tl.full(classes.shape, 1, tl.int64)
    else:
        return tl.load(offsets + classes + 1) - tl.load(offsets + classes)


@triton.jit
def _store_samples(out, offsets, members, classes, size, at, count, BLOCK: tl.constexpr):
    at = classes if offsets is None else tl.load(offsets + classes) + at
    samples = at if members is None else tl.load(members + at, mask=size > 0, other=0).to(tl.int64)
    samples = tl.where(size > 0, samples, -1)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, samples, mask=i < count)


@triton.jit(
    do_not_specialize=["classes", "seed", "epoch", "start", "step", "count"],
    do_not_specialize_on_alignment=["out", "offsets", "members", "alias_table", "start_at", "epoch_at"],
)
def draw_kernel(
    out, offsets, members, alias_table, start_at, epoch_at,
    classes: tl.int32, seed: tl.int64, epoch: tl.int64, start: tl.int64, step: tl.int64, count: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Classes by an alias table, or all alike; members with replacement."""
    epoch, position = _positions(start_at, epoch_at, epoch, start, step, count, BLOCK)
    r0, r1, r2, r3 = philox(position, epoch, _DRAWS, tl.full((), seed, tl.int64))
    columns = wide(tl.full((), classes, tl.int32))
    point = wide(r0) * columns + (wide(r1) * columns >> 32)
    drawn = (point >> 32).to(tl.int64)
    if alias_table is not None:
        entry = tl.load(alias_table + drawn)
        drawn = tl.where(point.to(tl.uint32) < entry.to(tl.uint32), drawn, entry >> 32)
    size = _class_size(offsets, drawn)
    at = _multiply_high(_joined(r3, r2), size.to(tl.uint64)).to(tl.int64)
    _store_samples(out, offsets, members, drawn, size, at, count, BLOCK)


@triton.jit(
    do_not_specialize=["classes", "groups", "draws", "seed", "epoch", "start", "step", "count"],
    do_not_specialize_on_alignment=["out", "offsets", "members", "slots", "quotas", "start_at", "epoch_at"],
)
def deal_kernel(
    out, offsets, members, slots, quotas, start_at, epoch_at,
    classes: tl.int32, groups: tl.int64, draws: tl.int64,
    seed: tl.int64, epoch: tl.int64, start: tl.int64, step: tl.int64, count: tl.int64,
    DISTINCT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Classes in rounds, members in cycles of permutations."""
    epoch, position = _positions(start_at, epoch_at, epoch, start, step, count, BLOCK)
    seed = tl.full((), seed, tl.int64)
    groups, draws = tl.full((), groups, tl.int64), tl.full((), draws, tl.int64)
    group = _quotient(position, draws)
    turn = _quotient(group, groups)
    place = group - turn * groups
    first = tl.zeros_like(place)
    size = first + classes
    if slots is not None:
        first += tl.load(slots + 4 * place)
        size = tl.load(slots + 4 * place + 1).to(tl.int64)
    r0, r1, r2, r3 = philox(turn * groups + first, epoch, _CLASS_ORDERS, seed)
    dealt = first + _permuted(place - first, size, r0, r1, r2, r3)
    if slots is not None:
        slot = dealt
        dealt = tl.load(slots + 4 * slot + 2).to(tl.int64)
        turn = turn * tl.load(quotas + dealt) + tl.load(slots + 4 * slot + 3)
    size = _class_size(offsets, dealt)
    ordinal = turn * draws + (position - group * draws)
    length = size
    if DISTINCT:
        length = tl.where(size >= draws, _quotient(size, draws) * draws, size)
    cycle = _quotient(ordinal, tl.maximum(length, 1))
    r0, r1, r2, r3 = philox((dealt << 32) | (cycle & 0xFFFFFFFF), epoch, _MEMBER_ORDERS, seed)
    at = _permuted(ordinal - cycle * length, size, r0, r1, r2, r3)
    _store_samples(out, offsets, members, dealt, size, at, count, BLOCK)


# --- The call ---


def sample_indices(
    offsets: Tensor,
    members: Tensor,
    alias_table: Tensor | None,
    slots: Tensor | None,
    quotas: Tensor | None,
    start_at: Tensor | None,
    epoch_at: Tensor | None,
    classes: int,
    groups: int,
    draws: int,
    distinct: bool,
    seed: int,
    epoch: int,
    start: int,
    step: int,
    count: int,
) -> Tensor:
    """The samples at positions ``start + i * step``; arguments as in ``ltkernels.reference.sampling``."""
    _check_tables(offsets, members, alias_table, slots, quotas, start_at, epoch_at, classes, groups)
    _check_numbers(slots, classes, groups, draws, start, step, count)
    out = torch.empty(count, dtype=torch.int64, device=offsets.device)
    if count == 0:
        return out
    data = tuple(tensor if tensor.numel() else None for tensor in (offsets, members))
    numbers = ((seed + 2**63) % 2**64 - 2**63, epoch, start, step, count)
    kernel: Any
    if groups:
        kernel, (block, warps) = deal_kernel, _DEALT
        arguments = (out, *data, slots, quotas, start_at, epoch_at, classes, groups, draws, *numbers, distinct, block)
    else:
        kernel, (block, warps) = draw_kernel, _DRAWN
        arguments = (out, *data, alias_table, start_at, epoch_at, classes, *numbers, block)
    _launch(kernel, tiles.cdiv(count, block), warps, out.device, *arguments)
    return out


def _launch(kernel: Any, programs: int, warps: int, device: torch.device, *arguments: Any) -> None:
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, num_warps=warps)
    else:
        kernel[(programs,)](*arguments, num_warps=warps)


def _expect(good: bool, what: str) -> None:
    if not good:
        raise RuntimeError(f"ltkernels: sample_indices: expected {what}")


def _check_tables(
    offsets: Tensor,
    members: Tensor,
    alias_table: Tensor | None,
    slots: Tensor | None,
    quotas: Tensor | None,
    start_at: Tensor | None,
    epoch_at: Tensor | None,
    classes: int,
    groups: int,
) -> None:
    """As csrc/bindings/sampling_arguments.h does: a direct call of the op has been checked by nobody."""
    device = offsets.device

    def fits(tensor: Tensor | None, dtype: torch.dtype, *shapes: tuple[int, ...]) -> bool:
        return tensor is None or (
            tensor.dtype is dtype and tensor.shape in shapes and tensor.is_contiguous() and tensor.device == device
        )

    members_fit = fits(members, members.dtype, members.shape) and members.dtype in (torch.int32, torch.int64)
    _expect(fits(offsets, torch.int64, (0,), (classes + 1,)), "offsets: contiguous int64 (classes + 1,) or empty")
    _expect(members_fit, "members: contiguous int32 or int64 on the device of offsets")
    _expect(offsets.numel() > 0 or members.numel() in (0, classes), "a member for each class where offsets is empty")
    _expect(fits(alias_table, torch.int64, (classes,)), "alias_table: contiguous int64 (classes,)")
    _expect(fits(start_at, torch.int64, ()) and fits(epoch_at, torch.int64, ()), "start_at and epoch_at: 0-d int64")
    _expect((slots is None) == (quotas is None), "slots and quotas together")
    _expect(fits(slots, torch.int32, (groups, 4)), "slots: contiguous int32 (groups, 4)")
    _expect(fits(quotas, torch.int32, (classes,)), "quotas: contiguous int32 (classes,)")


def _check_numbers(
    slots: Tensor | None, classes: int, groups: int, draws: int, start: int, step: int, count: int
) -> None:
    _expect(1 <= classes < 2**31, "1 <= classes < 2^31")
    _expect(start >= 0 and step >= 1 and count >= 0, "start >= 0, step >= 1 and count >= 0")
    _expect(count == 0 or start + (count - 1) * step < 2**63, "positions below 2^63")
    _expect(groups == 0 or (groups > 0 and draws >= 1), "groups >= 0 and draws >= 1")
    _expect(slots is not None or groups <= classes, "at most a group for each class where slots is missing")


# --- For the machine-code check ---


def _variant(name: str, kernel: Any, given: dict[str, str], constants: dict[str, Any]) -> Variant:
    """What a call with these tensors launches."""
    given = {"out": "*i64"} | given
    block, warps = _DRAWN if kernel is draw_kernel else _DEALT
    signature = {p.name: given.get(p.name) or p.annotation_type or "constexpr" for p in kernel.params}
    absent = {n: None for n, kind in signature.items() if kind == "constexpr"}
    return Variant(name, kernel, signature, absent | constants | {"BLOCK": block}, {}, warps, None, 0, 0, None)


def variants() -> list[Variant]:
    """Instantiations that stand for all: with and without tables, classes of one member, and both ways to deal."""
    tables = {"offsets": "*i64", "members": "*i32"}
    alias, slots = {"alias_table": "*i64"}, {"slots": "*i32", "quotas": "*i32"}
    on_device = {"start_at": "*i64", "epoch_at": "*i64"}
    return [
        _variant("draw<uniform>", draw_kernel, tables, {}),
        _variant("draw<weighted>", draw_kernel, tables | alias, {}),
        _variant("draw<weighted, on the device>", draw_kernel, tables | alias | on_device, {}),
        _variant("draw<weighted, singletons>", draw_kernel, {"members": "*i64"} | alias, {}),
        _variant("deal<rounds>", deal_kernel, tables, {"DISTINCT": False}),
        _variant("deal<slots>", deal_kernel, tables | slots, {"DISTINCT": False}),
        _variant("deal<slots, distinct>", deal_kernel, tables | slots | on_device, {"DISTINCT": True}),
    ]
