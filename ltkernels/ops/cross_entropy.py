"""The op behind ``functional.cross_entropy``: its arguments, its state and which backend is preferred."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ltkernels import backends
from ltkernels.ops import entries
from ltkernels.ops.options import CrossEntropyOptions
from ltkernels.ops.table import Op, Tensors
from ltkernels.reference import cross_entropy as reference

_COLUMNS_A_TICKET = 128  # csrc/cuda/cross_entropy.h: column_threads


def new_state(tensors: Tensors, options: CrossEntropyOptions) -> Tensor:
    """Four numbers a row and one for the batch (csrc/common/row_loss.h)."""
    input = tensors[0]
    assert input is not None
    rows = input.numel() // input.shape[1]
    return input.new_empty(4 * rows + 1, dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)


def _check_values(tensors: Tensors, options: CrossEntropyOptions) -> None:
    input, *parameters = tensors
    assert input is not None
    reference.check_values(*parameters, input.shape[1], options.ignore_index)  # type: ignore[call-arg,arg-type]


def column_tickets(input: Tensor, need: Sequence[bool]) -> int:
    """Sums over rows take a counter for every chunk of columns."""
    return -(-input.shape[1] // _COLUMNS_A_TICKET) if any(need[1:]) else 1


OP = entries.register(
    Op(
        "cross_entropy",
        ("input", "target", "weight?", "class_scale?", "class_bias?", "class_margin?", "sample_weight?"),
        (0, 3, 4),
        CrossEntropyOptions,
        reference.cross_entropy,
        _check_values,
        new_state,
        # Measured winners would come first (`python -m benchmarks.gpu --winners benchmarks/results/GPU.jsonl`).
        (
            backends.Preference(
                "cuda", "by the model: no form reads fewer bytes, or wider, for any number of classes; not measured"
            ),
        ),
        column_tickets,
    )
)
TABLE = OP.table


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_scale: Tensor | None,
    class_bias: Tensor | None,
    class_margin: Tensor | None,
    sample_weight: Tensor | None,
    options: CrossEntropyOptions,
    inplace: bool = False,
) -> Tensor:
    """The loss of ``(N, C)`` or ``(N, C, D)`` logits by the backend that serves the call; see the reference."""
    tensors = (input, target, weight, class_scale, class_bias, class_margin, sample_weight)
    return entries.call(OP, tensors, options, inplace)
