"""The op behind ``functional.aggregate_experts``: its arguments, its state, the best classes beside the mean."""

from __future__ import annotations

import torch
from torch import Tensor

from ltkernels import backends
from ltkernels.ops import entries
from ltkernels.ops.options import AggregateExpertsOptions, AggregateMode
from ltkernels.ops.table import Op, Tensors
from ltkernels.reference import aggregate_experts as reference


def new_state(tensors: Tensors, options: AggregateExpertsOptions) -> Tensor:
    """What a forward leaves for its backward, and the best classes if they are wanted.

    For each sample and expert maximum and 1 / sum of its softmax, if the mean is not of logits; for each sample the
    ``topk`` best classes, as integers of the numbers' size; their probabilities; then 1.
    """
    input = tensors[0]
    assert input is not None
    experts, rows, _ = input.shape
    count = rows * (2 * experts * (options.mode != AggregateMode.LOGITS) + 2 * options.topk) + 1
    return input.new_empty(count, dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)


def _integers(state: Tensor) -> Tensor:
    return state.view(torch.int64 if state.dtype == torch.float64 else torch.int32)


def _fill_state(state: Tensor, tensors: Tensors, options: AggregateExpertsOptions) -> None:
    if options.topk:
        place, probability = reference.best(*tensors, options)  # type: ignore[call-arg,arg-type]
        end = len(state) - 1 - probability.numel()
        _integers(state)[end - place.numel() : end] = place.reshape(-1)
        state[end:-1] = probability.reshape(-1)


def _new_output(tensors: Tensors, options: AggregateExpertsOptions) -> Tensor:
    input = tensors[0]
    assert input is not None
    return input.new_empty(input.shape[1:])


def _check_values(tensors: Tensors, options: AggregateExpertsOptions) -> None:
    reference.check_values(tensors[1], options)


OP = entries.register(
    Op(
        "aggregate_experts",
        ("input", "expert_weight?"),
        (0, 1),
        AggregateExpertsOptions,
        reference.aggregate_experts,
        _check_values,
        new_state,
        (backends.Preference("cuda", "by the model: the same reads as triton, less arithmetic; not measured"),),
        fill_state=_fill_state,
        new_output=_new_output,
    )
)


def aggregate_experts(
    tensors: tuple[Tensor | None, ...], options: AggregateExpertsOptions
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """``(N, C)`` of ``(E, N, C)`` logits by the backend that serves the call; best classes with probabilities."""
    if options.topk == 0:
        return entries.call(OP, tensors, options), None
    kept: list[Tensor] = []
    mean = entries.call(OP, tensors, options, kept=kept)
    if not kept:
        return mean, reference.best(*tensors, options)  # type: ignore[call-arg,arg-type]
    state = kept[0].detach()
    shape = (len(mean), options.topk)
    end = len(state) - 1 - shape[0] * shape[1]
    place = _integers(state)[end - shape[0] * shape[1] : end].reshape(shape)
    # Copies: the state itself is the backward's.
    return mean, (place.to(torch.int64, copy=True), state[end:-1].reshape(shape).clone())
