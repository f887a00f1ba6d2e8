"""The op behind ``functional.distillation_loss``: its arguments and its state."""

from __future__ import annotations

import torch
from torch import Tensor

from ltkernels import backends
from ltkernels.ops import entries
from ltkernels.ops.options import DistillationOptions
from ltkernels.ops.table import Op, Tensors
from ltkernels.reference import distillation as reference


def new_state(tensors: Tensors, options: DistillationOptions) -> Tensor:
    """What a forward leaves for its backward.

    Seven numbers a row: maximum and 1 / sum of the student's, of the teacher's and, with labels, of the label's
    softmax, and the label's p - 1. Then one over the number of labels that count, and one over the number of rows.
    """
    input = tensors[0]
    assert input is not None
    rows = input.numel() // input.shape[1]
    return input.new_empty(7 * rows + 2, dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)


def _check_values(tensors: Tensors, options: DistillationOptions) -> None:
    input, _, *parameters = tensors
    assert input is not None
    reference.check_values(*parameters, input.shape[1], options)  # type: ignore[call-arg,arg-type]


OP = entries.register(
    Op(
        "distillation",
        ("input", "teacher", "target?", "student_bias?", "teacher_bias?", "class_bias?", "sample_weight?"),
        (0,),
        DistillationOptions,
        reference.distillation,
        _check_values,
        new_state,
        (backends.Preference("cuda", "by the model: the same reads as triton, 16 bytes at a time; not measured"),),
    )
)


def distillation(tensors: tuple[Tensor | None, ...], options: DistillationOptions) -> Tensor:
    """The loss of ``(N, C)`` or ``(N, C, D)`` logits by the backend that serves the call; see the reference."""
    return entries.call(OP, tensors, options)
