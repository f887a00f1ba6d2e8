"""Losses of several experts as modules: class counts in, one call of ``functional.expert_cross_entropy`` out.

==============  =======================================================================================================
loss            parameters
==============  =======================================================================================================
`RIDELoss`      ``class_margin``, a negative ``diversity_factor``; in the second stage ``weight``, temperatures by class
`SADELoss`      ``class_bias`` by expert: none, the prior, and the prior against its reverse
==============  =======================================================================================================

Experts come as ``(E, N, C)`` logits, or as a list of E tensors. Predict from their mean, without margin or bias;
``aggregate=True`` returns it beside the loss.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels import functional, rebalance
from ltkernels.functional.experts import Experts, stacked
from ltkernels.losses.base import LossModule, differing
from ltkernels.rebalance import ClassCounts, DeferredReweighting

__all__ = ["RIDELoss", "SADELoss"]

_DEFAULTS = {"ignore_index": -100, "reduction": "mean"}  # in the repr where they differ from this


class RIDELoss(LossModule):
    r"""RIDE: each expert has LDAM's cross-entropy, and is driven away from the mean of them all.

    .. math:: \sum_e \Bigl(\mathrm{LDAM}(z_e) + \lambda \bar T^2\, \mathrm{KL}\bigl(\sigma(\bar z / T) \,\|\,
        \sigma(z_e / T)\bigr)\Bigr)

    with :math:`\bar z` the mean, which takes no gradient here, and :math:`\bar T` the mean of the classes'
    temperatures. The logits are scaled already: cosines times ``scale``, which multiplies the margins alone.

    From ``reweight_epoch`` on the cross-entropies have effective-number weights, and the temperatures depend on the
    class: :math:`T_c = T k_c / \max_j k_j` with :math:`k_c = f C \pi_c + 1 - f`, so that rare classes are told apart
    more. :meth:`set_epoch` moves both. It counts from 0; published code counts from 1 and starts *after* its
    ``reweight_epoch``, so the same number means the same epoch.

    Args:
        class_counts: training samples of each class, ``(C,)``; None: no margins and no second stage. A class with count
            0 stays in the softmax, and is an error as a label, on the CPU.
        max_margin: of the rarest class, in cosine units, at least 0.
        scale: of the logits, above 0.
        diversity_factor: :math:`\lambda`; negative drives the experts apart. Published: -0.2, -0.45 on CIFAR-100. With
            0, as published, the cross-entropy is that of the mean of the logits, times E.
        diversity_temperature: T above 0.
        reweight_factor: f in ``[0, 1)``. Published: 0.05; 0.02 on ImageNet-LT, 0.015 on iNaturalist.
        reweight_epoch: first epoch (counted from 0) of the second stage; None: never. Published: 160 of 200.
        beta: of the effective number, in ``[0, 1)``.
        distillation_factor: of the divergence from a ``teacher`` to the mean, at least 0.
        distillation_temperature: of both, above 0. Published: 1.5.
        distillation: ``"published"``: with a teacher the whole loss, divergence included, counts E times, as the
            published loop over the experts has it; ``"once"``: it does not.
        ignore_index: label of samples that take no part.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``, over the samples; the mean divides each expert's cross-entropies
            by the weights of the samples, as torch does.

    Shape:
        logits ``(E, N, C)`` of any floating type, labels ``(N,)`` of any integer type; a 0-d loss, or ``(N,)`` with
        ``reduction="none"``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape; ``reweight_epoch`` without ``class_counts``.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.RIDELoss([900, 90, 10], reweight_epoch=160)
        >>> logits = torch.tensor([[[20.0, 5.0, -10.0]], [[10.0, 10.0, 0.0]]])  # two experts, one sample
        >>> criterion(logits, torch.tensor([0]))
        tensor(4.7393)

    Source:
        Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", ICLR 2021. The paper has
        divergences between pairs of experts; its published code and this have those from the mean.
    """

    class_counts: Tensor | None
    class_margin: Tensor | None
    temperature: Tensor | None

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        max_margin: float = 0.5,
        scale: float = 30.0,
        diversity_factor: float = -0.2,
        diversity_temperature: float = 1.0,
        reweight_factor: float = 0.05,
        reweight_epoch: int | None = None,
        *,
        beta: float = 0.9999,
        distillation_factor: float = 1.0,
        distillation_temperature: float = 1.5,
        distillation: Literal["published", "once"] = "published",
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.max_margin = arg.number("max_margin", max_margin, 0.0, math.inf)
        self.scale = arg.number("scale", scale, 0.0, math.inf, open_low=True)
        self.diversity_factor = arg.number("diversity_factor", diversity_factor, -math.inf, math.inf)
        self.diversity_temperature = arg.number(
            "diversity_temperature", diversity_temperature, 0.0, math.inf, open_low=True
        )
        self.reweight_factor = arg.number("reweight_factor", reweight_factor, 0.0, 1.0)
        if self.reweight_factor == 1.0:  # a class without samples would have temperature 0
            raise ValueError("reweight_factor: expected a number below 1, found 1")
        self.distillation_factor, self.distillation_temperature = distillation_factor, distillation_temperature
        self.distillation = arg.choice("distillation", distillation, ("published", "once"))
        self.ignore_index, self.reduction = ignore_index, reduction
        self.weight: DeferredReweighting | None = None
        self.register_buffer("class_counts", None)
        self.register_buffer("class_margin", None)
        self.register_buffer("temperature", None)
        if class_counts is not None:
            self.class_counts = rebalance.counts_buffer(class_counts)
            self._find_absent_classes()
            margin = rebalance.ldam_margin(class_counts, self.max_margin, dtype=torch.float64)
            self.class_margin = (self.scale * margin).float()
        if reweight_epoch is not None:
            if class_counts is None:
                raise ValueError("reweight_epoch: expected None without class_counts, which make the weights, found"
                                 f" {reweight_epoch}")  # fmt: skip
            self.weight = DeferredReweighting(class_counts, reweight_epoch, beta)
            self.temperature = self.temperature_at(0)
        self._check()

    def set_epoch(self, epoch: int) -> None:
        """Moves weights and temperatures to an epoch, counted from 0; call it before the epoch's first step."""
        super().set_epoch(epoch)
        if self.temperature is not None:
            self.temperature.copy_(self.temperature_at(epoch))  # in place: a captured step reads it here

    def temperature_at(self, epoch: int) -> Tensor:
        """The classes' temperatures in an epoch, float32 ``(C,)``, without moving there."""
        counts, schedule = self.class_counts, self.weight
        if counts is None or schedule is None:
            raise ValueError("temperature_at: expected a loss with reweight_epoch, found one with a single temperature")
        counts = counts.cpu().double()
        k = self.reweight_factor * counts.numel() * counts / counts.sum() + 1 - self.reweight_factor
        k = k / k.max() if epoch >= schedule.reweight_epoch else torch.ones_like(k)
        return (self.diversity_temperature * k).float()

    def forward(
        self,
        input: Experts,
        target: Tensor,
        sample_weight: Tensor | None = None,
        *,
        teacher: Tensor | None = None,
        aggregate: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss.

        Args:
            input: the experts' logits, ``(E, N, C)`` or a list of ``(N, C)``.
            target: labels.
            sample_weight: a factor on the loss of each sample, ``(N,)``.
            teacher: logits ``(N, C)`` to distil from; takes no gradient.
            aggregate: also return the mean of the experts' logits, ``(N, C)``.

        Returns:
            0-d, or ``(N,)`` with ``reduction="none"``; float64 for float64 logits, else float32. With ``aggregate`` a
            pair, whose second is the mean in the loss's type.
        """
        z = stacked("input", input, "E, N, C")
        experts = z.shape[0]
        factor = float(experts) if teacher is not None and self.distillation == "published" else 1.0
        distillation = self.distillation_factor
        if self.diversity_factor == 0.0:  # E cross-entropies of the mean
            z = z.mean(dim=0, keepdim=True, dtype=arg.compute_type(z))
            distillation /= experts
            factor *= experts
        result = _loss(
            z,
            target,
            aggregate,
            factor,
            weight=None if self.weight is None else self.weight(),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            class_margin=self.class_margin,
            sample_weight=sample_weight,
            diversity_factor=self.diversity_factor,
            diversity_temperature=self.diversity_temperature if self.temperature is None else self.temperature,
            teacher=teacher,
            distillation_factor=distillation,
            distillation_temperature=self.distillation_temperature,
        )
        if self._has_absent_classes:
            self._refuse_absent_classes(target)
        return result

    def extra_repr(self) -> str:
        shown = ["max_margin", "scale", "diversity_factor", "diversity_temperature"]
        if self.weight is not None:
            shown.append("reweight_factor")
        parts = [f"{name}={getattr(self, name)!r}" for name in shown]
        if self.class_counts is not None:
            parts.append(rebalance.describe_counts(self.class_counts))
        return ", ".join(parts + differing(self, {**_DEFAULTS, "distillation": "published"}))

    def _check(self) -> None:
        """Calls the loss with no samples: what a call would refuse is refused by the constructor, in the same words."""
        classes = 1 if self.class_counts is None else self.class_counts.numel()
        device = torch.device("cpu") if self.class_counts is None else self.class_counts.device
        logits = torch.empty(1, 0, classes, device=device)
        self.forward(logits, torch.empty(0, dtype=torch.int64, device=device), teacher=logits[0])


class SADELoss(LossModule):
    r"""SADE: three experts, skilled for the training's, a uniform and the reverse distribution of the classes.

    .. math:: \sum_{e=1}^{3} \mathrm{CE}(z_e + b_e), \qquad b_1 = 0, \quad b_2 = \log \pi, \quad
        b_3 = \log \pi - \tau \log \bar\pi

    where :math:`\bar\pi` gives the class of rank k the prior of rank C - 1 - k. Classes of equal counts are ranked by
    their number, so that equal priors may change places; published code leaves that to a sort that is not stable. The
    three losses are added, not averaged, and there are no class weights.

    Args:
        class_counts: training samples of each class, ``(C,)``.
        tau: strength of the third expert's adjustment, at least 0. Published: 2 on CIFAR and ImageNet-LT, 1 on
            iNaturalist and Places.
        prior_eps: added to priors inside the logarithm, above 0: a class without samples stays in the softmax, and is
            not refused as a label.
        ignore_index: label of samples that take no part.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``, over the samples.

    Shape:
        logits ``(3, N, C)`` of any floating type, labels ``(N,)`` of any integer type; a 0-d loss, or ``(N,)`` with
        ``reduction="none"``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape; logits of another number of experts.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.SADELoss([900, 90, 10])
        >>> criterion(torch.zeros(3, 2, 3), torch.tensor([0, 2]))
        tensor(10.2048)

    Source:
        Zhang et al., "Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed Recognition",
        NeurIPS 2022, and its published code. :class:`ltkernels.experts.TestTimeAggregation` learns the weights of the
        experts on test data.
    """

    class_counts: Tensor
    class_bias: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        tau: float = 2.0,
        prior_eps: float = 1e-9,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.tau = arg.number("tau", tau, 0.0, math.inf)
        self.prior_eps = arg.number("prior_eps", prior_eps, 0.0, math.inf, open_low=True)
        self.ignore_index, self.reduction = ignore_index, reduction
        self.register_buffer("class_counts", rebalance.counts_buffer(class_counts))
        prior = self.class_counts.double() / self.class_counts.double().sum()
        order = prior.argsort(stable=True)
        reverse = torch.empty_like(prior).scatter(0, order, prior[order.flip(0)])
        log_prior, log_reverse = (prior + self.prior_eps).log(), (reverse + self.prior_eps).log()
        bias = torch.stack([torch.zeros_like(prior), log_prior, log_prior - self.tau * log_reverse])
        self.register_buffer("class_bias", bias.float())
        device = self.class_counts.device
        self.forward(bias.new_empty(3, 0, len(prior)), torch.empty(0, dtype=torch.int64, device=device))

    def forward(
        self, input: Experts, target: Tensor, sample_weight: Tensor | None = None, *, aggregate: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss.

        Args:
            input: the experts' logits, ``(3, N, C)`` or a list of three ``(N, C)``.
            target: labels.
            sample_weight: a factor on the loss of each sample, ``(N,)``.
            aggregate: also return the mean of the experts' logits, ``(N, C)``.

        Returns:
            0-d, or ``(N,)`` with ``reduction="none"``; float64 for float64 logits, else float32. With ``aggregate`` a
            pair, whose second is the mean in the loss's type.
        """
        z = stacked("input", input, "E, N, C")
        if z.shape[0] != 3:
            raise ValueError(f"input: expected the logits of three experts, found {z.shape[0]}")
        return _loss(
            z,
            target,
            aggregate,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            class_bias=self.class_bias,
            sample_weight=sample_weight,
        )

    def extra_repr(self) -> str:
        parts = [f"tau={self.tau!r}", f"prior_eps={self.prior_eps!r}", rebalance.describe_counts(self.class_counts)]
        return ", ".join(parts + differing(self, _DEFAULTS))


def _loss(
    logits: Tensor, target: Tensor, aggregate: bool, factor: float = 1.0, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """``factor`` times the loss and, with ``aggregate``, the mean of the logits."""
    if not aggregate:
        loss: Tensor = functional.expert_cross_entropy(logits, target, **options)
        return loss if factor == 1.0 else loss * factor
    loss, mean = functional.expert_cross_entropy(logits, target, aggregate=True, **options)
    return loss * factor, mean
