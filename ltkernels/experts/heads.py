"""The classifiers of several experts as one layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ltkernels import arguments as arg
from ltkernels import functional
from ltkernels.functional.aggregate_experts import MODES
from ltkernels.functional.expert_linear import EXPERTS
from ltkernels.functional.unit import unit

__all__ = ["ExpertHeads"]


class ExpertHeads(nn.Module):
    r"""E linear classifiers in the place of a backbone's last layer: logits of each in training, their mean after it.

    In ``train()`` mode the output is ``(E, N, C)``, what :class:`ltkernels.losses.RIDELoss`,
    :class:`ltkernels.losses.SADELoss` and the others for several experts take. In ``eval()`` mode it is the mean over
    the experts, ``(N, C)``, without the logits of each in memory: see :func:`ltkernels.functional.expert_linear`.

    Args:
        num_experts: E.
        in_features: D, size of a feature vector.
        num_classes: C.
        bias: whether there is one.
        normalize: cosines of features and class vectors, as of :class:`ltkernels.CosineLinear`.
        scale: factor on ``W x``, above 0.
        mode: what is averaged: ``"logits"``, ``"probs"`` or ``"log_probs"``. With the last two the output is
            probabilities or their logarithms, not logits.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: ``(E, C, D)``. Each expert starts as ``nn.Linear`` does; with ``normalize`` as ``CosineLinear`` does.
        bias: ``(E, C)``, or None.
        mode: as above; may be changed at any time.
        expert_weight: weights of the mean, ``(E,)`` or ``(E, C)``; None, as at the start, for equal ones. Assign a
            tensor, for one what :class:`ltkernels.experts.TestTimeAggregation` learnt. It moves with the module and is
            not in its ``state_dict``.

    Shape:
        input ``(N, D)``, which all experts share, or ``(E, N, D)``; output ``(E, N, C)`` in training, else ``(N, C)``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value; an input of another shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> heads = ltk.experts.ExpertHeads(3, 16, 10)
        >>> features, labels = torch.randn(8, 16), torch.randint(10, (8,))
        >>> ltk.functional.expert_cross_entropy(heads(features), labels).backward()
        >>> heads.eval()(features).shape
        torch.Size([8, 10])

    Source:
        Wang et al., RIDE, ICLR 2021, and Zhang et al., SADE, NeurIPS 2022, which have a layer for each expert: stack
        those of a published checkpoint. Their cosine layers hold ``(D, C)``.
    """

    bias: Tensor | None
    expert_weight: Tensor | None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        normalize: bool = False,
        scale: float = 1.0,
        mode: str = "logits",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = arg.size("num_experts", num_experts)
        self.in_features = arg.size("in_features", in_features)
        self.num_classes = arg.size("num_classes", num_classes)
        self.normalize = normalize
        self.scale = arg.number("scale", scale, 0.0, math.inf, open_low=True)
        self.mode = arg.choice("mode", mode, tuple(MODES))
        shape = self.num_experts, self.num_classes
        self.weight = nn.Parameter(torch.empty(*shape, self.in_features, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if bias else None)
        self.register_buffer("expert_weight", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new classifiers: for each expert what ``nn.Linear`` or ``CosineLinear`` starts with."""
        bound = 1 / math.sqrt(self.in_features)
        with torch.no_grad():
            if self.normalize:
                self.weight.copy_(unit(self.weight.uniform_(-1, 1)))
            else:
                self.weight.uniform_(-bound, bound)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        """Logits of each expert in ``train()`` mode, their mean in ``eval()`` mode."""
        weights, mode = (None, EXPERTS) if self.training else (self.expert_weight, self.mode)
        return functional.expert_linear(input, self.weight, self.bias, weights, mode, self.normalize, self.scale)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, num_classes={self.num_classes},"
            f" bias={self.bias is not None}, normalize={self.normalize}, scale={self.scale:g}, mode={self.mode!r}"
        )
