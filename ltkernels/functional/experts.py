"""What the functions of several experts share: the experts' logits in one tensor, tables with a row an expert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from ltkernels import arguments as arg

Experts = Tensor | Sequence[Tensor]


def stacked(name: str, value: Experts, dims: str) -> Tensor:
    """``(E, ...)`` floating values of three dimensions, called ``dims``; a sequence of tensors is stacked."""
    if isinstance(value, (list, tuple)):
        if len(value) == 0:
            raise ValueError(f"{name}: expected at least one expert, found none")
        for place, one in enumerate(value):
            first, one = value[0], arg.tensor(f"{name}[{place}]", one)
            if one.shape != first.shape or one.dtype != first.dtype or one.device != first.device:
                raise ValueError(
                    f"{name}: expected experts of one shape, dtype and device, found {tuple(first.shape)} {first.dtype}"
                    f" on {first.device} and, at {place}, {tuple(one.shape)} {one.dtype} on {one.device}"
                )
        value = torch.stack(list(value))
    tensor = arg.tensor(name, value)
    if tensor.dtype not in arg.LOGITS_TYPES:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, found {tensor.dtype}")
    if tensor.dim() != 3 or tensor.shape[0] == 0 or tensor.shape[2] == 0:
        last = dims.split(", ")[-1]
        raise ValueError(f"{name}: expected shape ({dims}) with E >= 1 and {last} >= 1, found {tuple(tensor.shape)}")
    return tensor


def expert_table(name: str, value: Tensor | float | None, logits: Tensor, scalar: bool = False) -> Tensor | None:
    """``(E, C)`` parameters in the type the op computes in, of that shape or ``(C,)`` for all experts alike.

    With ``scalar`` also one number for all experts and classes.
    """
    if value is None:
        return None
    experts, _, classes = logits.shape
    dtype = arg.compute_type(logits)
    if scalar and isinstance(value, Real) and not isinstance(value, bool):
        number = arg.number(name, float(value), -math.inf, math.inf)
        return torch.full((experts, classes), number, dtype=dtype, device=logits.device)
    table = arg.tensor(name, value)
    if not table.is_floating_point():
        raise TypeError(f"{name}: expected a floating type, found {table.dtype}")
    if table.shape != (experts, classes) and table.shape != (classes,):
        raise ValueError(f"{name}: expected shape ({experts}, {classes}) or ({classes},), found {tuple(table.shape)}")
    if table.device != logits.device:
        raise ValueError(f"{name}: expected device {logits.device} as input's, found {table.device}")
    return table.to(dtype).expand(experts, classes).contiguous()
