"""How kernels over rows of logits are launched: programs, tiles and scratch memory from how tensors lie in memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltkernels.triton import Variant, tiles

_BLOCKS_A_MULTIPROCESSOR = 16  # of four warps; about twice what fits, so that the end of a launch is not ragged
_BLOCKS_WITH_SUMS, _MOST_SPLITS = 4, 128  # the last block of a chunk reads a sum of every split


class Plan(NamedTuple):
    """What a launch takes from how its tensors lie in memory: found once, since looking costs more than launching."""

    programs: int
    tickets: int
    partials: int
    numbers: tuple[int, ...]
    constants: tuple[int, ...]
    warps: int


@lru_cache(maxsize=4096)
def plan_forward(
    shape: tuple[int, ...],
    input: tuple[Any, ...],
    target: tuple[Any, ...],
    heavy: bool,
    multiprocessors: int,
    logits: int,
    out: tuple[Any, ...] | None = None,
) -> Plan:
    """``input`` and ``target`` are strides, bytes an element and address; those of probabilities are as long.

    So is ``out``, a tensor of the logits' shape that is written.
    """
    grouped = tiles.group_rows(shape, input[0], target[0], input[0] if out is None else out[0])
    of_input, of_target, of_out = grouped.strides
    visited = [(of_input, *input[1:])] + ([(of_target, *target[1:])] if len(target[0]) == len(shape) else [])
    visited += [] if out is None else [(of_out, *out[1:])]
    by = tiles.access(shape[1], grouped, visited)
    logits = logits // 2 if heavy or input[1] == 8 else logits
    columns, warps = tiles.next_power_of_2(shape[1]), tiles.WARPS
    if by.unit != tiles.ROWS and columns > logits:
        warps *= 2  # a long row needs the registers of more threads; one in chunks, as many bytes of each thread
        logits *= 2 if columns <= 2 * logits or input[1] == 2 else 1
    tile = tiles.tile(columns, grouped, by, logits, warps)
    most = _BLOCKS_A_MULTIPROCESSOR * multiprocessors * tiles.WARPS // warps
    programs = tiles.even_share(tile.count(grouped), most)
    return Plan(
        programs, 1, 2 * programs,
        (shape[1], grouped.groups, grouped.inner, *of_input, *of_target, *(() if out is None else of_out)),
        (*by, tile.K, tile.R, tile.L, tile.columns >= shape[1]), warps,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def plan_backward(
    shape: tuple[int, ...],
    input: tuple[Any, ...],
    target: tuple[Any, ...],
    out: tuple[Any, ...] | None,
    grad: tuple[int, ...],
    sums: int,
    heavy: bool,
    multiprocessors: int,
    logits: int,
) -> Plan:
    """As above, with the gradient's memory if there is one, the upstream's strides, and how many class sums to take."""
    grouped = tiles.group_rows(shape, input[0], target[0], input[0] if out is None else out[0], grad)
    of_input, of_target, of_out, of_grad = grouped.strides
    visited = [(of_input, *input[1:])]
    if len(target[0]) == len(shape):
        visited.append((of_target, *target[1:]))
    if out is not None:
        visited.append((of_out, *out[1:]))
    by = tiles.access(shape[1], grouped, visited)
    logits = logits // 2 if heavy or input[1] == 8 else logits
    if sums:  # they take registers, and few columns make many splits of the rows
        tile = tiles.tile(tiles.next_power_of_2(min(shape[1], 32 * by.vector)), grouped, by, logits // 2, tiles.WARPS)
    else:
        tile = tiles.tile(tiles.chunk_columns(shape[1], logits), grouped, by, logits, tiles.WARPS)
    chunks = tiles.cdiv(shape[1], tile.columns)
    most = tiles.cdiv((_BLOCKS_WITH_SUMS if sums else _BLOCKS_A_MULTIPROCESSOR) * multiprocessors, chunks)
    splits = tiles.even_share(tile.count(grouped), min(most, _MOST_SPLITS) if sums else most)
    return Plan(
        chunks * splits, chunks, sums * splits * shape[1],
        (shape[1], grouped.groups, grouped.inner, *of_input, *of_target, *of_out, of_grad.group, of_grad.row),
        (*by, tile.K, tile.R, tile.L), tile.warps,
    )  # fmt: skip


def memory(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.stride(), tensor.element_size(), tensor.data_ptr() % 16


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def launch(kernel: Any, plan: Plan, device: torch.device, *arguments: Any) -> None:
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(plan.programs,)](*arguments, *plan.constants, num_warps=plan.warps)
    else:
        kernel[(plan.programs,)](*arguments, *plan.constants, num_warps=plan.warps)


# --- For the machine-code check ---

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}
_ALIGNED = ("weight", "class_scale", "class_bias")  # what Triton specialises for being aligned, as torch's memory is


def variant(
    name: str,
    kernel: Any,
    plan: Plan,
    flags: tuple[Any, ...],
    given: dict[str, str],
    dtype: torch.dtype,
    more_bytes: int = 0,
) -> Variant:
    """What ``plan`` launches with tensors of the types in ``given``; ``flags`` are the constants before the tile's.

    The other tensors are not there. Of a logit, ``more_bytes`` are moved beside itself and its gradient.
    """
    constants: dict[str, Any] = dict(
        zip([p.name for p in kernel.params if p.is_constexpr], (*flags, *plan.constants), strict=True)
    )
    logits, written = constants["K"] * constants["R"] * constants["L"], "d_input" in given
    wide = logits * dtype.itemsize // (16 * 32 * plan.warps) if constants["VEC"] * dtype.itemsize >= 16 else 0
    signature = {p.name: given.get(p.name) or p.annotation_type or "constexpr" for p in kernel.params}
    constants |= {n: None for n, kind in signature.items() if kind == "constexpr" and n not in constants}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {
        (kernel.arg_names.index(table),): [["tt.divisibility", 16]] for table in _ALIGNED if table in given
    }
    return Variant(
        name, kernel, signature, constants, attrs, plan.warps, logits, wide, wide if written else 0,
        float(dtype.itemsize * (1 + written) + more_bytes),
    )  # fmt: skip
