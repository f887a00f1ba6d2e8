"""Softmax losses whose adjustments are class tables: parameters of :func:`ltkernels.functional.cross_entropy`.

All of them compute ``u_ij = scale * (class_scale_j * x_ij + class_bias_j - class_margin_y [j = y])`` and the cross
entropy of ``u``:

=======================  ==============================================================================================
loss                     parameters
=======================  ==============================================================================================
`CrossEntropyLoss`       all of them, given directly; none: ``torch.nn.CrossEntropyLoss``
`LogitAdjustedLoss`      ``class_bias = tau log pi``
`BalancedSoftmaxLoss`    ``class_bias = log pi``; the paper's ``log n`` but for a constant that the softmax ignores
`VSLoss`                 ``class_scale = (n / n_max)^gamma``, ``class_bias = tau log pi``; CDT is ``tau=0``
`LDAMLoss`               ``class_margin = max_m (n_min / n)^(1/4)``, ``scale = s``; DRW: ``weight`` too
`CosFaceLoss`            one ``class_margin`` for all classes, ``scale``
`FocalLoss`              ``focal_gamma``
`ClassBalancedLoss`      ``weight`` by effective number, divided by the number of rows
=======================  ==============================================================================================

A class with count 0 has weight 0, margin 0 and scale 1, and, where the loss has a bias, bias -inf, which takes it out
of the softmax. LDAM and the class-balanced loss have no bias: there it stays in the softmax as a class that no label
names, as published. As a label it is an error on the CPU, in every loss.

``gamma`` of a focal factor, ``margin`` of `CosFaceLoss` and ``s`` of `LDAMLoss` may be assigned between steps, as
schedules do. Settings that went into a table (``tau``, ``max_m``, ``beta``, the ``gamma`` of `VSLoss`) are read-only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ltkernels import arguments as arg
from ltkernels import rebalance
from ltkernels.losses.base import AdjustedCrossEntropy, Method, Options, Setting, WeightedOptions, flag
from ltkernels.rebalance import ClassCounts, DeferredReweighting

__all__ = [
    "BalancedSoftmaxLoss",
    "ClassBalancedLoss",
    "CosFaceLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "VSLoss",
]


class CrossEntropyLoss(AdjustedCrossEntropy):
    """``torch.nn.CrossEntropyLoss``, with every parameter of :func:`ltkernels.functional.cross_entropy` beside it.

    Without the keywords after ``label_smoothing`` it gives torch's values and loads its ``state_dict``. It differs on
    purpose in that the loss of half logits is float32, labels may have any integer type, and a float32 ``weight``
    goes with half logits.

    Args:
        weight: class weights, ``(C,)``, at least 0; or a :class:`ltkernels.rebalance.DeferredReweighting`, which
            starts them at an epoch.
        ignore_index: label of rows that take no part.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: in ``[0, 1]``, with torch's meaning together with ``weight``; or ``(C,)``, by the row's label.
        smoothing_mode: ``"all"``: to all classes (torch); ``"off_target"``: to all but the label.
        scale: factor on the adjusted logits, above 0.
        class_scale: factor on each class's logits, ``(C,)``. An ``nn.Parameter`` is learnt.
        class_bias: added to each class's logits, ``(C,)``; -inf takes a class out. An ``nn.Parameter`` is learnt.
        class_margin: taken from the logit of a row's label: ``(C,)``, or one number for all classes.
        margin_type: ``"additive"``, or ``"arc"`` and ``"arc_straight_through"``, see :class:`ArcFaceLoss`.
        focal_gamma: exponent of the focal factor; 0 is none.
        focal_pt: ``"raw"`` or ``"weighted"``, see :class:`FocalLoss`.
        focal_grad: ``"full"`` or ``"detached"``, see :class:`FocalLoss`.
        z_loss: factor on the squared log-sum-exp of each row, at least 0.
        denominator: what ``reduction="mean"`` divides the sum by: ``"weight"``, the weights of the rows (torch);
            ``"count"``, their number, as many long-tail papers do; or a number or a 0-d tensor, as a gradient
            accumulation over several steps needs.
        empty: the mean over no rows: ``"nan"`` (torch) or ``"zero"``.
        inplace: lets the gradient overwrite the logits.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.CrossEntropyLoss(label_smoothing=0.1)
        >>> criterion(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        tensor(0.2951)
    """

    _defaults: ClassVar[Mapping[str, object]] = {
        **AdjustedCrossEntropy._defaults,
        "scale": 1.0,
        "class_scale": None,
        "class_bias": None,
        "class_margin": None,
        "margin_type": "additive",
        "focal_gamma": 0.0,
        "focal_pt": "raw",
        "focal_grad": "full",
    }

    def __init__(
        self,
        weight: Tensor | DeferredReweighting | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float | Tensor = 0.0,
        *,
        smoothing_mode: str = "all",
        scale: float = 1.0,
        class_scale: Tensor | None = None,
        class_bias: Tensor | None = None,
        class_margin: Tensor | float | None = None,
        margin_type: str = "additive",
        focal_gamma: float = 0.0,
        focal_pt: str = "raw",
        focal_grad: str = "full",
        z_loss: float = 0.0,
        denominator: str | float | Tensor = "weight",
        empty: str = "nan",
        inplace: bool = False,
    ) -> None:
        super().__init__(
            None,
            {
                "scale": scale,
                "class_scale": class_scale,
                "class_bias": class_bias,
                "class_margin": class_margin,
                "margin_type": margin_type,
                "focal_gamma": focal_gamma,
                "focal_pt": focal_pt,
                "focal_grad": focal_grad,
            },
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            smoothing_mode=smoothing_mode,
            z_loss=z_loss,
            denominator=denominator,
            empty=empty,
            inplace=inplace,
        )


class LogitAdjustedLoss(AdjustedCrossEntropy):
    """Cross entropy of logits shifted by the log prior: ``x_j + tau log pi_j`` with ``pi = n / sum n``.

    At evaluation use the logits as they are: the model has learnt to do without the prior. For a model trained with
    plain cross entropy there is :func:`ltkernels.rebalance.adjust_logits`. ``class_counts`` should describe what the
    sampler draws: with a class-balanced sampler there is nothing to adjust.

    Args:
        class_counts: training samples of each class, or their frequencies, ``(C,)``; only the ratios matter. A class
            with count 0 gets no gradient, so its logit at evaluation means nothing.
        tau: strength, at least 0.
        **options: ``weight``, ``ignore_index``, ``reduction``, ``label_smoothing``, ``smoothing_mode``,
            ``denominator``, ``z_loss``, ``empty``, ``inplace`` of :class:`CrossEntropyLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.LogitAdjustedLoss([900, 90, 10])
        >>> criterion
        LogitAdjustedLoss(tau=1.0, num_classes=3, class_counts=10..900)
        >>> criterion(torch.zeros(2, 3), torch.tensor([0, 2]))
        tensor(2.3553)

    Source:
        Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10. Its code adds 1e-12 to
        ``pi ** tau`` inside the logarithm, LADE's PriorCE adds 1e-9 to ``pi``; here a class with count 0 is left out.
    """

    _shown = ("tau",)
    tau = Setting()

    def __init__(self, class_counts: ClassCounts, tau: float = 1.0, **options: Unpack[WeightedOptions]) -> None:
        super().__init__(class_counts, {"class_bias": rebalance.logit_adjustment(class_counts, tau)}, **options)
        self.tau = float(tau)


class BalancedSoftmaxLoss(AdjustedCrossEntropy):
    """Balanced Softmax: cross entropy of ``x_j + log pi_j`` with ``pi = n / sum n``.

    It is :class:`LogitAdjustedLoss` with ``tau=1``. The paper adds ``log n_j``, which differs by a constant that the
    softmax ignores; with the prior, ``z_loss`` does not depend on the size of the data set. At evaluation use the
    logits as they are.

    Args:
        class_counts: training samples of each class, or their frequencies, ``(C,)`` (``sample_per_class`` in the
            published code).
        **options: as of :class:`LogitAdjustedLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.BalancedSoftmaxLoss([900, 90, 10])
        >>> criterion(torch.zeros(2, 3), torch.tensor([0, 2]))
        tensor(2.3553)

    Source:
        Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020.
    """

    def __init__(self, class_counts: ClassCounts, **options: Unpack[WeightedOptions]) -> None:
        super().__init__(class_counts, {"class_bias": rebalance.logit_adjustment(class_counts)}, **options)


class VSLoss(AdjustedCrossEntropy):
    """Vector scaling: cross entropy of ``(n_j / n_max)^gamma x_j + tau log pi_j``.

    ``gamma=0`` is :class:`LogitAdjustedLoss`, ``tau=0`` is CDT (class-dependent temperatures). At evaluation use the
    logits as they are.

    Args:
        class_counts: training samples of each class, or their frequencies, ``(C,)``.
        gamma: strength of the scales, at least 0.
        tau: strength of the biases, at least 0.
        **options: as of :class:`LogitAdjustedLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.VSLoss([900, 90, 10], gamma=0.2, tau=1.2)
        >>> criterion(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2]))
        tensor(5.2640)

    Source:
        Kini et al., "Label-Imbalanced and Group-Sensitive Classification under Overparameterization", NeurIPS 2021,
        equation 4; the published code divides by ``(n_max / n)^gamma``, which is this. CDT: Ye et al., "Identifying
        and Compensating for Feature Deviation in Imbalanced Deep Learning", 2020.
    """

    _shown = ("gamma", "tau")
    gamma = Setting()
    tau = Setting()

    def __init__(
        self, class_counts: ClassCounts, gamma: float = 0.3, tau: float = 1.0, **options: Unpack[WeightedOptions]
    ) -> None:
        scale, bias = rebalance.vs_scale(class_counts, gamma), rebalance.logit_adjustment(class_counts, tau)
        super().__init__(class_counts, {"class_scale": scale, "class_bias": bias}, **options)
        self.gamma = float(gamma)
        self.tau = float(tau)


class LDAMLoss(AdjustedCrossEntropy):
    """Label-distribution-aware margins: the label's cosine loses ``max_m (n_min / n_y)^(1/4)``, then ``s`` scales all.

    The logits are cosines, from :class:`ltkernels.CosineLinear` with ``scale=1``; the unbounded logits of a plain
    linear layer, times 30, do not train. Where the head scales (RIDE, SADE: cosines times 30) say
    ``logits_scaled=True``: then ``s`` multiplies the margin only, and nothing is scaled twice.

    LDAM-DRW adds class weights late: give ``reweight_epoch`` and call :meth:`set_epoch` at the start of every epoch.
    At evaluation use the logits as they are, without margin; the loss on validation data includes margin and weights,
    as in the published code.

    Args:
        class_counts: training samples of each class, or, without ``reweight_epoch``, their frequencies, ``(C,)``
            (``cls_num_list`` in the published code).
        max_m: margin of the rarest class, at least 0.
        s: scale, above 0.
        logits_scaled: the logits are ``s`` times cosines already.
        reweight_epoch: first epoch, counted from 0, with effective-number weights (published: 160 of 200); None:
            never. Not with ``weight``.
        beta: of the effective number, in ``[0, 1)``.
        **options: as of :class:`LogitAdjustedLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape; ``weight`` beside ``reweight_epoch``.

    Example:
        >>> import torch, ltkernels as ltk
        >>> head = ltk.CosineLinear(16, 3)
        >>> criterion = ltk.losses.LDAMLoss([900, 90, 10], reweight_epoch=160)
        >>> for epoch in range(2):
        ...     criterion.set_epoch(epoch)
        ...     loss = criterion(head(torch.randn(8, 16)), torch.randint(3, (8,)))

    Source:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, equation
        13. Margins are on the label alone; some papers print them on every class, which would be a bias.
    """

    _shown = ("max_m", "s", "logits_scaled")
    max_m = Setting()
    s = Setting("scale", open_low=True)
    logits_scaled = Setting()

    def __init__(
        self,
        class_counts: ClassCounts,
        max_m: float = 0.5,
        s: float = 30.0,
        *,
        logits_scaled: bool = False,
        reweight_epoch: int | None = None,
        beta: float = 0.9999,
        **options: Unpack[WeightedOptions],
    ) -> None:
        s, logits_scaled = arg.number("s", s, 0.0, math.inf, open_low=True), flag("logits_scaled", logits_scaled)
        if reweight_epoch is not None:
            if options.get("weight") is not None:
                raise ValueError("weight: expected None with reweight_epoch, which makes the weights, found a weight")
            options["weight"] = DeferredReweighting(class_counts, reweight_epoch, beta)
        margin = rebalance.ldam_margin(class_counts, max_m, dtype=torch.float64)
        margin = (s * margin if logits_scaled else margin).float()
        super().__init__(class_counts, {"scale": 1.0 if logits_scaled else s, "class_margin": margin}, **options)
        self.max_m = float(max_m)
        self.logits_scaled = logits_scaled
        if logits_scaled:
            vars(self)["s"] = s  # it is in the margins, not the scale


class CosFaceLoss(AdjustedCrossEntropy):
    """Large-margin cosine loss: the label's cosine loses ``margin``, then all are scaled by ``scale``.

    The logits are cosines, from :class:`ltkernels.CosineLinear` with ``scale=1``. At evaluation use the cosines as
    they are.

    Args:
        margin: in cosine units, at least 0. The default is insightface's; the paper uses 0.35.
        scale: above 0.
        **options: as of :class:`LogitAdjustedLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> head = ltk.CosineLinear(16, 1000)
        >>> criterion = ltk.losses.CosFaceLoss()
        >>> loss = criterion(head(torch.randn(8, 16)), torch.randint(1000, (8,)))

    Source:
        Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018.
    """

    _shown = ("margin", "scale")
    margin = Setting("class_margin")

    def __init__(self, margin: float = 0.4, scale: float = 64.0, **options: Unpack[WeightedOptions]) -> None:
        margin = arg.number("margin", margin, 0.0, math.inf)
        super().__init__(None, {"class_margin": margin, "scale": scale}, **options)


class FocalLoss(AdjustedCrossEntropy):
    """Softmax focal loss: cross entropy times ``(1 - p_y)^gamma``. ``gamma=0`` is :class:`CrossEntropyLoss`.

    Published softmax forms differ in three ways that change the gradient, each an option here. LDAM-DRW: ``gamma=1``,
    ``focal_pt="weighted"``, ``denominator="count"``. LADE and TDE: ``gamma=2``, ``focal_grad="detached"``.

    Args:
        gamma: at least 0.
        weight: class weights, as of :class:`CrossEntropyLoss`.
        focal_pt: ``"raw"``: p is the label's probability. ``"weighted"``: p is the exponential of minus the weighted,
            smoothed cross entropy, ``p_y ** w_y`` without smoothing.
        focal_grad: ``"full"``, or ``"detached"``: the factor is a constant in the backward.
        **options: as of :class:`LogitAdjustedLoss`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> ltk.losses.FocalLoss(gamma=2.0)(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.0018)

    Source:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 4, which is on sigmoids; this is the
        softmax form that the classification papers use.
    """

    _shown = ("gamma",)
    gamma = Setting("focal_gamma")
    _defaults: ClassVar[Mapping[str, object]] = {
        "focal_pt": "raw",
        "focal_grad": "full",
        **AdjustedCrossEntropy._defaults,
    }

    def __init__(
        self,
        gamma: float = 2.0,
        weight: Tensor | DeferredReweighting | None = None,
        *,
        focal_pt: str = "raw",
        focal_grad: str = "full",
        **options: Unpack[Options],
    ) -> None:
        gamma = arg.number("gamma", gamma, 0.0, math.inf)
        method: Method = {"focal_gamma": gamma, "focal_pt": focal_pt, "focal_grad": focal_grad}
        super().__init__(None, method, weight=weight, **options)


class ClassBalancedLoss(AdjustedCrossEntropy):
    """Cross entropy weighted by the effective number of samples, ``(1 - beta) / (1 - beta^n)`` scaled to sum to C.

    The mean divides by the number of rows, as the published code does; ``denominator="weight"`` divides by the
    weights of the rows instead, as torch does. For weights that start at an epoch give
    :class:`ltkernels.rebalance.DeferredReweighting` to another loss. At evaluation use the logits as they are.

    Args:
        class_counts: training samples of each class, ``(C,)`` (``samples_per_cls`` elsewhere).
        beta: in ``[0, 1)``; 0.9999 on long-tailed CIFAR, 0.999 in the published ImageNet code.
        gamma: exponent of a focal factor, at least 0; 0 is the softmax loss. The paper's focal and sigmoid losses are
            on sigmoids; this is the softmax form.
        **options: as of :class:`LogitAdjustedLoss`, but without ``weight``; ``denominator`` is ``"count"`` by default.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.ClassBalancedLoss([900, 90, 10], beta=0.999)
        >>> criterion(torch.zeros(2, 3), torch.tensor([0, 2]))
        tensor(1.4797)

    Source:
        Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019.
    """

    _shown = ("beta", "gamma")
    beta = Setting()
    gamma = Setting("focal_gamma")
    _defaults: ClassVar[Mapping[str, object]] = {
        **{name: default for name, default in AdjustedCrossEntropy._defaults.items() if name != "weight"},
        "denominator": "count",
    }

    def __init__(
        self, class_counts: ClassCounts, beta: float = 0.9999, gamma: float = 0.0, **options: Unpack[Options]
    ) -> None:
        gamma = arg.number("gamma", gamma, 0.0, math.inf)
        if "weight" in options:
            raise TypeError("weight: expected none, the loss makes it from class_counts, found one")
        options.setdefault("denominator", "count")
        weight = rebalance.effective_number_weight(class_counts, beta)
        super().__init__(class_counts, {"focal_gamma": gamma}, weight=weight, **options)
        self.beta = float(beta)
