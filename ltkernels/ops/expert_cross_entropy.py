"""The op behind ``functional.expert_cross_entropy``: its arguments, its state, the mean of the experts beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltkernels import backends
from ltkernels.ops import entries
from ltkernels.ops.options import ExpertCrossEntropyOptions
from ltkernels.ops.table import Op, Tensors
from ltkernels.reference import expert_cross_entropy as reference


def new_state(tensors: Tensors, options: ExpertCrossEntropyOptions) -> Tensor:
    """What a forward leaves for its backward, and the mean of the experts' logits if it is wanted.

    The mean, ``N C`` numbers. For each sample ``5 E + 6``: for each expert maximum of u, 1 / sum e^(u - maximum), the
    label's p - 1, and maximum and 1 / sum of the softened logits t z; then maximum and 1 / sum of t zbar, of tau zbar
    and of the teacher's. Then one over the denominator of each expert, 0 for one without weight, and one over the
    number of samples that count.
    """
    input = tensors[0]
    assert input is not None
    experts, rows, classes = input.shape
    count = rows * classes * options.aggregate + rows * (5 * experts + 6) + experts + 1
    return input.new_empty(count, dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)


def _new_loss(tensors: Tensors, options: ExpertCrossEntropyOptions) -> Tensor:
    input = tensors[0]
    assert input is not None
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return input.new_empty(input.shape[1:2] if options.reduction == 0 else (), dtype=dtype)


def _fill_state(state: Tensor, tensors: Tensors, options: ExpertCrossEntropyOptions) -> None:
    input = tensors[0]
    assert input is not None
    if options.aggregate:
        mean = reference.mean_logits(input)
        state[: mean.numel()] = mean.reshape(-1)


def _check_values(tensors: Tensors, options: ExpertCrossEntropyOptions) -> None:
    input, *parameters = tensors
    assert input is not None
    reference.check_values(*parameters, input.shape[2], options)  # type: ignore[call-arg,arg-type]


OP = entries.register(
    Op(
        "expert_cross_entropy",
        (
            "input", "target", "weight?", "class_scale?", "class_bias?", "class_margin?", "temperature?",
            "sample_weight?", "teacher?",
        ),
        (0,),
        ExpertCrossEntropyOptions,
        reference.expert_cross_entropy,
        _check_values,
        new_state,
        (backends.Preference("cuda", "by the model: the same reads as triton, less arithmetic; not measured"),),
        fill_state=_fill_state,
        new_output=_new_loss,
    )
)  # fmt: skip


class _Mean(torch.autograd.Function):
    """The mean that the loss's kernel left in its state; its gradient spreads evenly over the experts."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, mean: Tensor) -> Tensor:
        ctx.experts, ctx.dtype = len(input), input.dtype
        return mean.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad / ctx.experts).to(ctx.dtype).expand(ctx.experts, *grad.shape), None


def expert_cross_entropy(
    tensors: tuple[Tensor | None, ...], options: ExpertCrossEntropyOptions
) -> tuple[Tensor, Tensor | None]:
    """The loss of ``(E, N, C)`` logits by the backend that serves the call, and the mean of the experts' logits."""
    if not options.aggregate:
        return entries.call(OP, tensors, options), None
    kept: list[Tensor] = []
    loss = entries.call(OP, tensors, options, kept=kept)
    input = tensors[0]
    assert input is not None
    if not kept:
        return loss, reference.mean_logits(input)
    _, rows, classes = input.shape
    mean: Tensor = _Mean.apply(input, kept[0].detach()[: rows * classes].view(rows, classes))
    return loss, mean
