"""The op behind losses whose adjustments depend on the row: its arguments and its state."""

from __future__ import annotations

import torch
from torch import Tensor

from ltkernels import backends
from ltkernels.ops import entries
from ltkernels.ops.cross_entropy import column_tickets
from ltkernels.ops.options import PairTerm, RowCrossEntropyOptions
from ltkernels.ops.table import Op, Tensors
from ltkernels.reference import row_cross_entropy as reference

TENSORS = (
    "input", "target", "second_target?", "lam?", "weight?", "class_scale?", "class_bias?", "class_margin?",
    "class_smoothing?", "sample_weight?", "row_gate?", "feature_norm?", "pair?", "pair_step?",
)  # fmt: skip
INPUT, SECOND_TARGET, CLASS_SCALE, CLASS_BIAS, ROW_GATE, PAIR = 0, 2, 5, 6, 10, 12


def new_state(tensors: Tensors, options: RowCrossEntropyOptions) -> Tensor:
    """What a forward leaves for its backward.

    Four numbers for each label and row (csrc/common/row_loss.h); for seesaw the row's log-sum-exp; with a gate its
    gradient for each label and row; two values of 1 / denominator. All rows of the first label stand before those of
    the second.
    """
    input = tensors[0]
    assert input is not None
    rows = input.numel() // input.shape[1]
    labels = 1 if tensors[SECOND_TARGET] is None else 2
    a_row = 4 * labels + (options.pair_term == PairTerm.SEESAW) + labels * (tensors[ROW_GATE] is not None)
    return input.new_empty(a_row * rows + 2, dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)


def _check_values(tensors: Tensors, options: RowCrossEntropyOptions) -> None:
    input, *parameters, _ = tensors
    assert input is not None
    reference.check_values(*parameters, input.shape[1], options)  # type: ignore[call-arg,arg-type]


OP = entries.register(
    Op(
        "row_cross_entropy",
        TENSORS,
        (INPUT, CLASS_SCALE, CLASS_BIAS, ROW_GATE),
        RowCrossEntropyOptions,
        reference.row_cross_entropy,
        _check_values,
        new_state,
        (backends.Preference("cuda", "by the model: the same reads as triton, less arithmetic; not measured"),),
        lambda input, need: column_tickets(input, need[:3]),
    )
)


def row_cross_entropy(
    tensors: tuple[Tensor | None, ...], options: RowCrossEntropyOptions, inplace: bool = False
) -> Tensor:
    """The loss of ``(N, C)`` or ``(N, C, D)`` logits by the backend that serves the call; see the reference."""
    return entries.call(OP, tensors, options, inplace)
