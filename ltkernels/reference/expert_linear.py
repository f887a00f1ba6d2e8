"""The mean of several linear classifiers, in plain PyTorch: the definition.

With ``z_e = x_e W_e^T + b_e`` the logits of expert e, the result is :mod:`~ltkernels.reference.aggregate_experts`
of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltkernels.ops.options import AggregateExpertsOptions, ExpertLinearOptions
from ltkernels.reference.aggregate_experts import unrounded


def expert_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, expert_weight: Tensor | None, options: ExpertLinearOptions
) -> Tensor:
    """``(N, C)`` of ``input``'s type; computed in float64 for float64, else in float32.

    Args:
        input: features, ``(E, N, D)``, or ``(N, D)`` for all experts alike.
        weight: classifiers, ``(E, C, D)``.
        bias: ``(E, C)``.
        expert_weight: ``(E,)``, ``(N, E)`` or ``(E, C)``, as ``options.weights`` says.
        options: the scalars.
    """
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    z = torch.matmul(input.to(dtype), weight.to(dtype).mT)
    if bias is not None:
        z = z + bias.to(dtype).unsqueeze(1)
    return unrounded(z, expert_weight, AggregateExpertsOptions(*options)).to(input.dtype)
