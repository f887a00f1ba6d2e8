"""The op behind ``functional.lade_cross_entropy``: its arguments and its state."""

from __future__ import annotations

import torch
from torch import Tensor

from ltkernels import backends
from ltkernels.ops import entries
from ltkernels.ops.options import LadeOptions
from ltkernels.ops.table import Op, Tensors
from ltkernels.reference import lade as reference


def new_state(tensors: Tensors, options: LadeOptions) -> Tensor:
    """What a forward leaves for its backward.

    Three numbers a row: maximum of u = z + b, 1 / sum e^(u - maximum), the label's p - 1. Three numbers a class: weight
    pi (1 + 2 remine_lambda S), logsumexp over the rows, weight pi / (n + 1e-8). Then 1 / N.
    """
    input = tensors[0]
    assert input is not None
    classes = input.shape[1]
    rows = input.numel() // classes
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return input.new_empty(3 * rows + 3 * classes + 1, dtype=dtype)


def _check_values(tensors: Tensors, options: LadeOptions) -> None:
    input, *parameters = tensors
    assert input is not None
    reference.check_values(*parameters, input.shape[1], options)  # type: ignore[call-arg,arg-type]


OP = entries.register(
    Op(
        "lade",
        ("input", "target", "prior", "class_bias?", "class_offset?", "row_offset?"),
        (0,),
        LadeOptions,
        reference.lade,
        _check_values,
        new_state,
        (backends.Preference("cuda", "by the model: the same reads as triton, less arithmetic; not measured"),),
        forward_tickets=lambda input: 1 + -(-input.shape[1] // 8),  # chunks have 8 columns or more
    )
)


def lade(tensors: tuple[Tensor | None, ...], options: LadeOptions) -> Tensor:
    """The loss of ``(N, C)`` or ``(N, C, D)`` logits by the backend that serves the call; see the reference."""
    return entries.call(OP, tensors, options)
