"""Public functions, one per hot path: they check arguments, call the op and reduce.

``cross_entropy`` is a drop-in for :func:`torch.nn.functional.cross_entropy` that also takes the parameters of the
softmax losses for long-tailed data: per-class scales, biases and margins, focal factors, sample weights and explicit
denominators. ``sample_indices`` draws class-balanced samples: a pure function of seed, epoch and position.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.class_draws import AliasTable, ClassRounds
from ltkernels.class_index import ClassIndex
from ltkernels.ops import cross_entropy as _op
from ltkernels.ops import sampling as _sampling
from ltkernels.ops.options import CrossEntropyOptions, Reduction


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    scale: float = 1.0,
    class_scale: Tensor | None = None,
    class_bias: Tensor | None = None,
    class_margin: Tensor | float | None = None,
    margin_type: str = "additive",
    focal_gamma: float = 0.0,
    focal_pt: str = "raw",
    focal_grad: str = "full",
    sample_weight: Tensor | None = None,
    smoothing_mode: str = "all",
    z_loss: float = 0.0,
    denominator: str | float | Tensor = "weight",
    empty: str = "nan",
    inplace: bool = False,
) -> Tensor:
    r"""Softmax cross-entropy of affinely adjusted logits, fused: forward and backward each visit a row once.

    With only the arguments of :func:`torch.nn.functional.cross_entropy` the values are torch's. In general, for row
    :math:`i` with logits :math:`x_{ij}` and label :math:`y`,

    .. math::
        u_{ij} = s\,(a_j x_{ij} + b_j - m_y [j = y]), \qquad
        \ell_i = r_i \Bigl(F_i \sum_j -w_j q_{ij} \log\mathrm{softmax}(u_i)_j + z\,\mathrm{logsumexp}(u_i)^2\Bigr)

    where :math:`q_{ij} = (1 - \varepsilon)\,t_{ij} + \varepsilon / K` is the smoothed target (:math:`t` is one-hot
    for labels, the given row for probabilities; the mass :math:`\varepsilon` goes to the K classes with a finite
    bias) and :math:`F_i = (1 - p_i)^\gamma` the focal factor.

    How the arguments combine:

    * **weight × smoothing**: as in torch, the label's term is weighted by :math:`w_y`, the smoothing terms by
      :math:`w_j`.
    * **focal**: :math:`p_i = \exp(-\mathrm{nll}_i)` where, for ``focal_pt="raw"``, nll is the unweighted, unsmoothed
      negative log-likelihood :math:`-\sum_j t_{ij} \log\mathrm{softmax}(u_i)_j` (so :math:`p_i` is the label's
      probability under the adjusted logits), and, for ``"weighted"``, the row's weighted and smoothed cross-entropy
      itself, as the LDAM-DRW code does. The factor multiplies the whole smoothed, weighted row.
      ``focal_grad="detached"`` treats it as a constant.
    * **z_loss** is not multiplied by class weights or the focal factor, only by the row's ``sample_weight``.
    * **denominator** (for ``reduction="mean"``): ``"weight"`` divides by :math:`\sum_i r_i w_{y_i}` over rows that
      are not ignored (torch's mean) and, for probabilities, by :math:`\sum_i r_i` (torch's N); ``"count"`` divides by
      the number of rows that are not ignored, as most long-tail papers do; a float or 0-d tensor divides by that.
    * **ignored rows** have loss 0 and gradient 0, whatever their logits are.
    * a class with **class_bias −inf** (no training samples) has probability 0; as a target it is an error.

    Args:
        input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``; float64, float32, bfloat16 or float16; any strides.
            Half-precision logits are computed in float32 and give a float32 loss.
        target: labels of any integer type, ``()``, ``(N,)`` or ``(N, d1, ...)``; or probabilities of ``input``'s
            shape.
        weight: class weights :math:`w`, ``(C,)``, any floating type, finite and >= 0.
        ignore_index: label of rows that take no part.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        label_smoothing: :math:`\varepsilon` in [0, 1].
        scale: :math:`s` > 0, an inverse temperature.
        class_scale: :math:`a`, ``(C,)``, finite; receives a gradient if it requires one.
        class_bias: :math:`b`, ``(C,)``, finite or −inf; receives a gradient if it requires one.
        class_margin: :math:`m`, ``(C,)`` or one number for all classes, finite; labels only.
        margin_type: ``"additive"``.
        focal_gamma: :math:`\gamma` >= 0.
        focal_pt: ``"raw"`` or ``"weighted"``.
        focal_grad: ``"full"`` or ``"detached"``.
        sample_weight: :math:`r`, of the labels' shape, finite and >= 0.
        smoothing_mode: ``"all"``.
        z_loss: :math:`z` >= 0.
        denominator: ``"weight"``, ``"count"``, a float or a 0-d tensor.
        empty: what the mean over nothing is (the denominator is 0): ``"nan"`` as in torch, or ``"zero"``.
        inplace: allow the backward to write the gradient over ``input``'s memory, which saves one ``(N, C)`` buffer:
            the logits are gone after the backward, which can then run only once and not for double backward. Where
            the memory cannot be reused (a leaf, shared elements, torch.compile, torch.func, the reference backend)
            the permission is not used.

    Returns:
        The loss: 0-d, or of the labels' shape for ``reduction="none"``; float64 for float64 logits, else float32.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, option or value.
        IndexError: a label outside ``[0, C)`` that is not ``ignore_index`` (CPU).

    Example:
        >>> import torch, ltkernels as ltk
        >>> logits = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]], requires_grad=True)
        >>> prior = torch.tensor([0.90, 0.09, 0.01])
        >>> loss = ltk.functional.cross_entropy(logits, torch.tensor([0, 2]), class_bias=prior.log())
        >>> loss.backward()
        >>> [round(v, 4) for v in logits.grad[1].tolist()]
        [0.4448, 0.0492, -0.494]

    Source:
        Logit adjustment: Menon et al. 2021, eq. 10. LDAM: Cao et al. 2019. VS: Kini et al. 2021. Focal loss: Lin et
        al. 2017, eq. 4. z-loss: Chowdhery et al. 2022 (PaLM).
    """
    arg.check_logits("input", input)
    arg.check_target(input, target)
    dim = input.dim()
    x, y = input, target
    if sample_weight is not None:
        sample_weight = arg.row_weight("sample_weight", sample_weight, input)
    if dim == 1:
        x, y = input.unsqueeze(0), target.unsqueeze(0)
        sample_weight = None if sample_weight is None else sample_weight.unsqueeze(0)
    elif dim > 3:
        x, y = input.flatten(2), target.flatten(2 if target.is_floating_point() else 1)
        sample_weight = None if sample_weight is None else sample_weight.flatten(1)

    if weight is not None:
        weight = arg.class_vector("weight", weight, x)
    if class_scale is not None:
        class_scale = arg.class_vector("class_scale", class_scale, x)
    if class_bias is not None:
        class_bias = arg.class_vector("class_bias", class_bias, x)
    if class_margin is not None:
        if y.is_floating_point():
            raise ValueError(
                "class_margin: expected None with probability targets, which have no single target class,"
                f" found {type(class_margin).__name__}"
            )
        class_margin = arg.class_vector("class_margin", class_margin, x, scalar=True)
    given: Tensor | None = None
    if isinstance(denominator, Tensor):
        given, denominator = _given_denominator(denominator, reduction), 1.0
    scalars = (
        ignore_index, reduction, label_smoothing, scale, margin_type, focal_gamma, focal_pt, focal_grad, smoothing_mode,
        z_loss, denominator, empty,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        options, divisor = _options.__wrapped__(*scalars)
    else:
        try:
            options, divisor = _options(*scalars)
        except TypeError:  # a value of the wrong type, or one that the cache cannot hold, of which this says more
            options, divisor = _options.__wrapped__(*scalars)
    if options.ignore_index >= 0 and y.is_floating_point():
        raise ValueError(f"ignore_index: expected a negative number with probability targets, found {ignore_index}")

    loss = _op.cross_entropy(x, y, weight, class_scale, class_bias, class_margin, sample_weight, options, inplace)
    if given is not None:
        given = given.to(loss.dtype)
        if options.empty_zero:
            nothing = given == 0
            loss = torch.where(nothing, loss * 0.0, loss / torch.where(nothing, 1.0, given))
        else:
            loss = loss / given
    elif divisor != 1.0:
        loss = loss / divisor
    if reduction == "none" and (dim == 1 or dim > 3):
        loss = loss.reshape((input.shape[0], *input.shape[2:]) if dim > 1 else ())
    return loss


def _given_denominator(denominator: Tensor, reduction: str) -> Tensor:
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


@lru_cache(maxsize=256, typed=True)  # a training loop passes the same scalars at every step
def _options(
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    scale: float,
    margin_type: str,
    focal_gamma: float,
    focal_pt: str,
    focal_grad: str,
    smoothing_mode: str,
    z_loss: float,
    denominator: str | float,
    empty: str,
) -> tuple[CrossEntropyOptions, float]:
    """The checked scalars as the op takes them, and what its result is still to be divided by."""
    arg.choice("margin_type", margin_type, ("additive",))
    arg.choice("smoothing_mode", smoothing_mode, ("all",))
    kind, divisor = _reduction(reduction, denominator)
    options = CrossEntropyOptions(
        arg.integer("ignore_index", ignore_index),
        kind,
        arg.number("label_smoothing", label_smoothing, 0.0, 1.0),
        arg.number("scale", scale, 0.0, math.inf, open_low=True),
        arg.number("focal_gamma", focal_gamma, 0.0, math.inf),
        arg.choice("focal_pt", focal_pt, ("raw", "weighted")) == "weighted",
        arg.choice("focal_grad", focal_grad, ("full", "detached")) == "detached",
        arg.number("z_loss", z_loss, 0.0, math.inf),
        arg.choice("empty", empty, ("nan", "zero")) == "zero",
    )
    return options, divisor


def _reduction(reduction: str, denominator: str | float) -> tuple[int, float]:
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


def sample_indices(
    class_index: ClassIndex,
    start: int | Tensor,
    stop: int | None = None,
    step: int = 1,
    *,
    seed: int,
    epoch: int | Tensor = 0,
    class_probs: Tensor | AliasTable | ClassRounds | None = None,
    replacement: bool = True,
    num_samples: int | None = None,
) -> Tensor:
    r"""The samples at positions of a class-balanced stream: a pure function of (seed, epoch, position).

    What is at a position does not depend on the call that asks for it, on the device or on the backend. So a stream is
    resumed at any position at once, and rank r of W that takes positions r, r + W, ... has its part of the one stream.

    * With replacement, a position draws a class with the given probabilities, then one of its members.
    * Without replacement, classes are dealt in rounds (every class once, or in proportion to ``class_probs``), shuffled
      within the round, and every member of a class comes once before any comes twice, in an order that is random anew
      each time.

    A sampler for a ``DataLoader`` is :class:`ltkernels.samplers.LongTailSampler`.

    Args:
        class_index: the samples of each class, on the device where the result is wanted.
        start: the first position, >= 0; an int, or a 0-d int64 tensor on that device, which is read when the kernel
            runs: a captured graph that adds to it goes on in the stream at every replay.
        stop: the position before which to end, >= ``start``.
        step: distance of the positions, >= 1.
        seed: which stream; an integer of 64 bits.
        epoch: another stream of the same seed; an int in [0, 2^32) or a 0-d int64 tensor on the device.
        class_probs: with replacement, how probable the classes are relative to one another, ``(C,)``, finite and >= 0,
            or an :class:`~ltkernels.samplers.AliasTable` made of it, which saves making it in this call. Without
            replacement the same or a :class:`~ltkernels.samplers.ClassRounds`. Default: all classes alike.
        replacement: whether members are drawn with replacement.
        num_samples: how many positions, instead of ``stop``.

    Returns:
        int64 tensor ``(n,)`` on the device of ``class_index``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong value, shape or device; a class that can come and has no member.

    Example:
        >>> import ltkernels as ltk
        >>> index = ltk.samplers.ClassIndex([0, 0, 0, 0, 0, 0, 1, 2, 1])
        >>> ltk.functional.sample_indices(index, 0, 6, seed=1, replacement=False).tolist()  # two rounds of classes
        [7, 2, 6, 7, 1, 8]
        >>> ltk.functional.sample_indices(index, 1, 6, 2, seed=1, replacement=False).tolist()  # the second of two ranks
        [2, 7, 8]

    Source:
        Philox4x32-10: Salmon et al. 2011. Alias tables: Walker 1977, Vose 1991.
    """
    if not isinstance(class_index, ClassIndex):
        raise TypeError(f"class_index: expected a ltkernels.samplers.ClassIndex, found {type(class_index).__name__}")
    if not isinstance(replacement, bool):
        raise TypeError(f"replacement: expected a bool, found {replacement!r}")
    device = class_index.offsets.device
    step = arg.integer("step", step)
    if step < 1:
        raise ValueError(f"step: expected >= 1, found {step}")
    start, start_at = _position("start", start, device, 2**63)
    epoch, epoch_at = _position("epoch", epoch, device, 2**32)
    count = _count(start, start_at, stop, step, num_samples)
    table, rounds = _class_draws(class_index, class_probs, replacement)
    slots, quotas = (None, None) if rounds is None else (rounds.slots, rounds.quotas)
    if rounds is not None:
        groups, draws, distinct = rounds.groups, rounds.draws, rounds.distinct
    else:
        groups, draws, distinct = (0 if replacement else class_index.num_classes), 1, False
    return _sampling.sample_indices(
        class_index.offsets, class_index.members, None if table is None else table.entries, slots, quotas, start_at,
        epoch_at, class_index.num_classes, groups, draws, distinct, arg.integer("seed", seed), epoch, start, step,
        count,
    )  # fmt: skip


def _position(name: str, value: int | Tensor, device: torch.device, end: int) -> tuple[int, Tensor | None]:
    """A number, or 0 and the tensor that has it on the device."""
    if isinstance(value, Tensor):
        if value.dtype is not torch.int64 or value.dim() != 0 or value.device != device:
            raise ValueError(
                f"{name}: expected an integer or a 0-d int64 tensor on {device}, found {value.dtype} of shape"
                f" {tuple(value.shape)} on {value.device}"
            )
        return 0, value
    value = arg.integer(name, value)
    if not 0 <= value < end:
        raise ValueError(f"{name}: expected >= 0 and below {end}, found {value}")
    return value, None


def _count(start: int, start_at: Tensor | None, stop: int | None, step: int, num_samples: int | None) -> int:
    if (stop is None) == (num_samples is None):
        raise ValueError(f"stop: expected stop or num_samples, found {stop=} and {num_samples=}")
    if stop is None:
        count = arg.integer("num_samples", num_samples)  # type: ignore[arg-type]
        if count < 0:
            raise ValueError(f"num_samples: expected >= 0, found {count}")
    else:
        stop = arg.integer("stop", stop)
        if start_at is not None:
            raise ValueError(f"stop: expected None with a tensor as start (give num_samples), found {stop}")
        if stop < start:
            raise ValueError(f"stop: expected >= start, which is {start}, found {stop}")
        count = -((start - stop) // step)
    if count and start + (count - 1) * step >= 2**63:
        raise ValueError(f"num_samples: expected positions below 2^63, found {start + (count - 1) * step}")
    return count


def _class_draws(
    class_index: ClassIndex, class_probs: Tensor | AliasTable | ClassRounds | None, replacement: bool
) -> tuple[AliasTable | None, ClassRounds | None]:
    """How classes come, if not all with the same probability; both None where they do."""
    wanted: type[AliasTable] | type[ClassRounds] = AliasTable if replacement else ClassRounds
    classes, device = class_index.num_classes, class_index.offsets.device
    if class_probs is None:
        _check_members(class_index, None)
        return None, None
    if isinstance(class_probs, Tensor):
        if class_probs.device.type != "cpu":
            raise ValueError(
                f"class_probs: expected a tensor on the CPU, or {wanted.__name__}(...).to(device), found a tensor on"
                f" {class_probs.device}"
            )
        class_probs = AliasTable(class_probs) if replacement else ClassRounds(classes, class_probs)
        class_probs = class_probs.to(device)
    if not isinstance(class_probs, wanted):
        raise TypeError(
            f"class_probs: expected None, a torch.Tensor or {wanted.__name__} with replacement={replacement}, found"
            f" {type(class_probs).__name__}"
        )
    has_tables = not isinstance(class_probs, ClassRounds) or class_probs.slots is not None
    if class_probs.num_classes != classes or (has_tables and class_probs.device != device):
        raise ValueError(
            f"class_probs: expected {classes} classes on {device} as class_index has, found {class_probs.num_classes}"
            f" on {class_probs.device}"
        )
    _check_members(class_index, class_probs)
    return (class_probs, None) if isinstance(class_probs, AliasTable) else (None, class_probs)


def _check_members(class_index: ClassIndex, class_draws: AliasTable | ClassRounds | None) -> None:
    """Refuses classes that can be drawn and have no member."""
    if torch.compiler.is_compiling() or not class_index.has_empty_classes:
        return
    empty = class_index.class_counts == 0
    if class_draws is not None:
        empty &= class_draws.drawn
    if empty.any():
        raise ValueError(
            "class_index: expected a member of every class that can be drawn, found none of class"
            f" {int(empty.nonzero()[0])}; give it probability 0 in class_probs"
        )
