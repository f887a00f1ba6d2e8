"""RIDE's routing: samples that the first experts are sure of leave, and later experts see only the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltkernels import arguments as arg
from ltkernels.functional.experts import Experts, stacked

__all__ = ["ExpertRouter", "RoutedLogits"]

Expert = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From some rows of what the experts share, ``(n, ...)``, to their logits ``(n, C)`` and features ``(n, D)``."""


class RoutedLogits(NamedTuple):
    """What a router gives for N samples."""

    logits: Tensor
    """``(N, C)``: of each sample the mean of the experts that it went through."""
    num_experts: Tensor
    """``(N,)`` int64: how many these were."""


class ExpertRouter(nn.Module):
    r"""E - 1 gates that decide, after each expert but the last, whether a sample needs another one.

    The gate after expert i sees the ``topk`` largest logits of the mean so far and the expert's features, brought to
    length 1:

    .. math:: h_i = u^\top [\mathrm{topk}(\bar z_{\le i}),\ \mathrm{relu}(W_i f_i / \|f_i\| + b_i)] + c

    with one u for all gates. Above 0 the sample goes on. The gates are trained after the experts, by :meth:`loss`; the
    experts do not move then.

    Args:
        num_experts: E, at least 2.
        in_features: D, size of an expert's features.
        topk: number of logits that a gate sees, at most C. Published: 30; 50 on iNaturalist.
        hidden_features: what a gate makes of the features.
        pos_weight: of the samples that need a further expert, above 0; the larger, the more go on.
        device: of the parameters.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value; an input of another shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> heads = [torch.nn.Linear(16, 10) for _ in range(3)]
        >>> router = ltk.experts.ExpertRouter(3, in_features=16, topk=5)
        >>> x, labels = torch.randn(8, 16), torch.randint(10, (8,))
        >>> router.loss([head(x) for head in heads], [x] * 3, labels).backward()
        >>> logits, num_experts = router(x, [lambda rows, head=head: (head(rows), rows) for head in heads])
        >>> logits.shape, num_experts.shape
        (torch.Size([8, 10]), torch.Size([8]))

    Source:
        Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts" (RIDE), ICLR 2021, and its
        published code.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        topk: int = 30,
        hidden_features: int = 16,
        pos_weight: float = 100.0,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_experts": (num_experts, 2), "in_features": (in_features, 1), "topk": (topk, 1)}
        for name, (value, least) in (sizes | {"hidden_features": (hidden_features, 1)}).items():
            if arg.integer(name, value) < least:
                raise ValueError(f"{name}: expected at least {least}, found {value}")
        self.num_experts, self.in_features, self.topk = num_experts, in_features, topk
        self.pos_weight = arg.number("pos_weight", pos_weight, 0.0, math.inf, open_low=True)
        self.hidden = nn.ModuleList(
            nn.Linear(in_features, hidden_features, device=device) for _ in range(num_experts - 1)
        )
        self.help = nn.Linear(topk + hidden_features, 1, device=device)

    def gate(self, place: int, mean_logits: Tensor, features: Tensor) -> Tensor:
        """``h`` after expert ``place``, ``(n,)``: above 0 where a sample needs another one.

        Args:
            place: which gate, in ``[0, num_experts - 1)``.
            mean_logits: mean of the experts so far, ``(n, C)``.
            features: of this expert, ``(n, D)``.
        """
        if mean_logits.shape[1] < self.topk:
            raise ValueError(f"topk: expected at most the number of classes, {mean_logits.shape[1]}, found {self.topk}")
        dtype = self.help.weight.dtype  # experts may be half where the gates are not
        hidden = F.relu(self.hidden[place](F.normalize(features.to(dtype), dim=1)))
        best = mean_logits.topk(self.topk, dim=1).values.to(dtype)
        h: Tensor = self.help(torch.cat([best, hidden.to(dtype)], dim=1)).squeeze(1)
        return h

    def loss(self, logits: Experts, features: Experts, target: Tensor) -> Tensor:
        """The mean of the gates' losses: whether a later mean is right where the mean so far is wrong.

        Args:
            logits: of every expert, ``(E, N, C)`` or a list; they take no gradient.
            features: of every expert, ``(E, N, D)`` or a list; those of the last are not looked at; no gradient.
            target: labels ``(N,)`` of any integer type.

        Returns:
            0-d.
        """
        z, f = stacked("logits", logits, "E, N, C").detach(), stacked("features", features, "E, N, D").detach()
        expected = (self.num_experts, z.shape[1])
        for name, value in (("logits", z), ("features", f)):
            if value.shape[:2] != expected:
                raise ValueError(f"{name}: expected shape {(*expected, '...')}, found {tuple(value.shape)}")
        if target.shape != z.shape[1:2]:
            raise ValueError(f"target: expected labels of shape ({z.shape[1]},), found {tuple(target.shape)}")
        total = z.cumsum(dim=0, dtype=arg.compute_type(z))
        right = total.argmax(dim=2) == target.long()
        losses = []
        for place in range(self.num_experts - 1):
            needs = ~right[place] & right[place + 1 :].any(dim=0)
            h = self.gate(place, total[place] / (place + 1), f[place])
            weight = h.new_full((), self.pos_weight)  # filled on the device: nothing waits
            losses.append(F.binary_cross_entropy_with_logits(h, needs.to(h.dtype), pos_weight=weight))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def forward(self, shared: Tensor, experts: Sequence[Expert]) -> RoutedLogits:
        """Routes samples, for evaluation: the rows that remain are gathered before each further expert.

        How many remain has to be known to gather them, so a GPU is waited for once a gate; the work of all experts but
        the first shrinks with them.

        Args:
            shared: what every expert takes, ``(N, ...)``.
            experts: E callables, from rows of it to their logits ``(n, C)`` and features ``(n, D)``.

        Returns:
            Logits and numbers of experts; no gradient.
        """
        if len(experts) != self.num_experts:
            raise ValueError(f"experts: expected {self.num_experts}, found {len(experts)}")
        rows, current = shared, torch.arange(shared.shape[0], device=shared.device)  # of the samples still under way
        output, features = experts[0](rows)
        total = output.to(arg.compute_type(output), copy=True)
        num_experts = torch.ones_like(current)
        for place, expert in enumerate(experts[1:]):
            going_on = (self.gate(place, total[current] / (place + 1), features) > 0).nonzero().squeeze(1)
            if going_on.numel() == 0:
                break
            rows, current = rows[going_on], current[going_on]
            output, features = expert(rows)
            total.index_add_(0, current, output.to(total.dtype))
            num_experts[current] += 1
        return RoutedLogits((total / num_experts[:, None]).to(output.dtype), num_experts)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, topk={self.topk}, pos_weight={self.pos_weight!r}"
