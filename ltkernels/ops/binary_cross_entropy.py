"""The op behind ``functional.binary_cross_entropy``: its arguments, its state and which backend is preferred."""

from __future__ import annotations

import torch
from torch import Tensor

from ltkernels import backends
from ltkernels.ops import entries
from ltkernels.ops.options import BinaryCrossEntropyOptions
from ltkernels.ops.table import Op, Tensors
from ltkernels.reference import binary_cross_entropy as reference

_COLUMNS_A_CHUNK = 128  # or more: csrc/cuda/binary_cross_entropy_launch.cuh


def new_state(tensors: Tensors, options: BinaryCrossEntropyOptions) -> Tensor:
    """Sums of the columns, ``2 C`` where they are wanted, and 1 / denominator: a row needs nothing of its forward."""
    input = tensors[0]
    assert input is not None
    count = (2 * input.shape[1] if options.column_sums else 0) + 1
    return input.new_empty(count, dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)


def _fill_state(state: Tensor, tensors: Tensors, options: BinaryCrossEntropyOptions) -> None:
    if options.column_sums:
        state[:-1] = reference.column_sums(*tensors, options).reshape(-1)  # type: ignore[call-arg,arg-type]


def _check_values(tensors: Tensors, options: BinaryCrossEntropyOptions) -> None:
    input, *parameters, _ = tensors
    assert input is not None
    reference.check_values(*parameters, input.shape[1], options)  # type: ignore[call-arg,arg-type]


OP = entries.register(
    Op(
        "binary_cross_entropy",
        (
            "input", "target", "weight?", "pos_weight?", "neg_weight?", "foreground_keep?", "background_keep?",
            "sample_weight?", "draw_step?",
        ),
        (0,),
        BinaryCrossEntropyOptions,
        reference.binary_cross_entropy,
        _check_values,
        new_state,
        (backends.Preference("cuda", "by the model: every form reads and writes the same bytes; not measured"),),
        fill_state=_fill_state,
        forward_tickets=lambda input: 1 + -(-input.shape[1] // _COLUMNS_A_CHUNK),
    )
)  # fmt: skip


def binary_cross_entropy(
    tensors: tuple[Tensor | None, ...], options: BinaryCrossEntropyOptions
) -> tuple[Tensor, Tensor | None]:
    """The loss of ``(N, C)`` or ``(N, C, D)`` logits by the backend that serves the call, and its column sums."""
    if not options.column_sums:
        return entries.call(OP, tensors, options), None
    kept: list[Tensor] = []
    loss = entries.call(OP, tensors, options, kept=kept)
    input = tensors[0]
    assert input is not None
    if kept:
        return loss, kept[0][:-1].clone().reshape(2, input.shape[1])  # the state itself is the backward's
    return loss, reference.column_sums(*tensors, options)  # type: ignore[call-arg,arg-type]
