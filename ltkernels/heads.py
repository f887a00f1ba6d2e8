"""Classifier heads that the margin losses expect."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltkernels import arguments as arg
from ltkernels.functional.unit import unit

__all__ = ["CosineLinear"]


class CosineLinear(nn.Module):
    """Linear layer whose output is the cosine between the features and each class vector, times ``scale``.

    ``output[..., c] = scale * <x, W_c> / (max(|x|, 1e-12) * max(|W_c|, 1e-12))``; there is no bias.

    For losses that scale by themselves (:class:`ltkernels.losses.LDAMLoss`, :class:`ltkernels.losses.CosFaceLoss`)
    leave ``scale=1``. For cross entropy, logit adjustment and the others choose a scale of 16 to 64: cosines alone
    make a softmax that can not become sure.

    Norms are taken in float32 (float64 for float64), also in half precision: in float16 the sum of squares overflows
    at 65504 and 1e-12 is 0. The scale multiplies the ``(N, D)`` features, not the ``(N, C)`` output.

    Args:
        in_features: D, size of a feature vector.
        out_features: C, number of classes.
        scale: factor on the cosines, above 0.
        device: of the weight.
        dtype: of the weight.

    Attributes:
        weight: ``(C, D)``, as in ``nn.Linear``, starts with random directions of length 1.

    Shape:
        input ``(..., D)``, output ``(..., C)`` of the input's type (of the autocast type under autocast).

    Raises:
        TypeError: sizes are not integers, or ``scale`` is not a number; an input of an integer type.
        ValueError: sizes below 1, ``scale`` not above 0; an input whose last dimension is not D.

    Example:
        >>> import torch, ltkernels as ltk
        >>> head = ltk.CosineLinear(64, 10)
        >>> cosines = head(torch.randn(32, 64))
        >>> cosines.shape, bool(cosines.abs().max() <= 1)
        (torch.Size([32, 10]), True)

    Source:
        ``NormedLinear`` of Cao et al., NeurIPS 2019 (LDAM-DRW). There ``weight`` is ``(D, C)``, so a published
        checkpoint loads transposed. The start is the same: uniform in (-1, 1), then each class vector brought to
        length 1 (its length never changes the output, but a gradient step turns a longer vector less).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = arg.size("in_features", in_features)
        self.out_features = arg.size("out_features", out_features)
        self.scale = arg.number("scale", scale, 0.0, math.inf, open_low=True)
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new class vectors: random directions of length 1."""
        with torch.no_grad():
            self.weight.copy_(unit(self.weight.uniform_(-1, 1)))

    def forward(self, input: Tensor) -> Tensor:
        """Cosines times ``scale``: ``(..., D)`` to ``(..., C)``."""
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(f"input: expected shape (..., {self.in_features}), found {tuple(input.shape)}")
        if not input.is_floating_point():
            raise TypeError(f"input: expected features of a floating type, found {input.dtype}")
        return F.linear(unit(input, self.scale), unit(self.weight))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale:g}"
