"""How row losses become one number, and what they are divided by: arguments that the losses share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.ops.options import Reduction


def given_denominator(denominator: Tensor, reduction: str) -> Tensor:
    """A denominator that is a tensor, checked as far as that does not wait for a device."""
    if denominator.dim() != 0 or reduction != "mean":
        raise ValueError(
            "denominator: expected 'weight', or with reduction='mean' 'count', a number or a 0-d tensor,"
            f" found a tensor of shape {tuple(denominator.shape)} with reduction={reduction!r}"
        )
    if denominator.is_complex() or denominator.dtype is torch.bool:
        raise TypeError(f"denominator: expected a real number, found {denominator.dtype}")
    if denominator.device.type == "cpu" and arg.may_look(denominator):
        value = denominator.item()
        if not 0 <= value < math.inf:
            raise ValueError(f"denominator: expected a finite number >= 0, found {value:g}")
    return denominator


def reduction_of(reduction: str, denominator: str | float) -> tuple[int, float]:
    """The op's reduction, and what its result is still to be divided by."""
    arg.choice("reduction", reduction, ("none", "mean", "sum"))
    if reduction != "mean":
        if denominator != "weight":
            raise ValueError(
                f"denominator: expected the default 'weight' with reduction={reduction!r}, found {denominator!r}"
            )
        return (Reduction.NONE if reduction == "none" else Reduction.SUM), 1.0
    if isinstance(denominator, str):
        arg.choice("denominator", denominator, ("weight", "count"), " or a number")
        return (Reduction.MEAN_WEIGHT if denominator == "weight" else Reduction.MEAN_COUNT), 1.0
    return Reduction.SUM, arg.number("denominator", denominator, 0.0, math.inf, open_low=True)


def divided(loss: Tensor, given: Tensor | None, divisor: float, empty_zero: bool) -> Tensor:
    """The op's result over a denominator that the caller gave."""
    if given is None:
        return loss if divisor == 1.0 else loss / divisor
    given = given.to(loss.dtype)
    if not empty_zero:
        return loss / given
    nothing = given == 0
    return torch.where(nothing, loss * 0.0, loss / torch.where(nothing, 1.0, given))
