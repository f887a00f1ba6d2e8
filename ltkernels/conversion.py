"""``ltk.convert``: the losses of a model that have an exact counterpart here, replaced by it.

What is known:

======================================================  ===============================================================
loss                                                    becomes
======================================================  ===============================================================
``torch.nn.CrossEntropyLoss``                           `CrossEntropyLoss`
timm's ``LabelSmoothingCrossEntropy``,                  `CrossEntropyLoss`
``SoftTargetCrossEntropy``
imbalanced-losses' ``SoftmaxFocalLoss``                 `FocalLoss`
classes called ``LDAMLoss``, ``FocalLoss`` and          `CrossEntropyLoss` with their margins and scale, `FocalLoss`,
``BalancedSoftmax`` of published code                   `BalancedSoftmaxLoss`
======================================================  ===============================================================

Published code is copied and changed, so a class of the last line is recognised by its name and attributes and then has
to prove itself: both losses are called on random logits, and values and gradients have to agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

from ltkernels import losses
from ltkernels.losses.base import LossModule

__all__ = ["ConversionReport", "convert"]


class _Left(Exception):  # noqa: N818
    """A loss stays as it is; the message says why."""


@dataclass(frozen=True)
class Entry:
    """One loss: where it is in the module, what it was, and what it has become or why it was left."""

    name: str
    loss: str
    result: str


@dataclass
class ConversionReport:
    """What :func:`convert` has done: ``changed`` and ``left``, each a list of entries. Prints as a list."""

    changed: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"changed {len(self.changed)}, left {len(self.left)}"]
        lines += [f"  {entry.name or 'the loss'}: {entry.loss} -> {entry.result}" for entry in self.changed]
        lines += [f"  {entry.name or 'the loss'}: {entry.loss} stays: {entry.result}" for entry in self.left]
        if not self.changed and not self.left:
            lines.append("  no loss is part of the module; one that its code calls as a function is not seen")
        return "\n".join(lines)


def convert(module: nn.Module, *, inplace: bool = False) -> tuple[nn.Module, ConversionReport]:
    """Replaces the losses in a module, or a loss itself, by those of this package that compute the same.

    Parameters, buffers and ``state_dict`` stay as they are. What changes is what
    :class:`ltkernels.losses.CrossEntropyLoss` does differently on purpose: the loss of half-precision logits is
    float32, and labels may have any integer type. A loss that is found twice stays one.

    Args:
        module: a model with losses among its submodules, or a loss.
        inplace: change ``module`` itself; else a deep copy, of whose parameters an optimizer made before knows nothing.

    Returns:
        The module, and a report of what was changed and what was left, and why.

    Raises:
        TypeError: not a module.
        ValueError: ``inplace=True`` for a loss, which can not become an object of another class.

    Example:
        >>> import torch, ltkernels as ltk
        >>> model = torch.nn.ModuleDict({"loss": torch.nn.CrossEntropyLoss(label_smoothing=0.1)})
        >>> model, report = ltk.convert(model, inplace=True)
        >>> print(report)
        changed 1, left 0
          loss: CrossEntropyLoss(label_smoothing=0.1) -> ltkernels.losses.CrossEntropyLoss(label_smoothing=0.1)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, found {type(module).__name__}")
    report = ConversionReport()
    if _is_loss(module):
        if inplace:
            raise ValueError("inplace: expected False for a loss, which can not become another class, found True")
        module = copy.deepcopy(module)
        return _converted("", module, report) or module, report
    result = module if inplace else copy.deepcopy(module)
    made: dict[int, nn.Module | None] = {}
    for prefix, parent in list(result.named_modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and _is_loss(child):
                path = f"{prefix}.{name}" if prefix else name
                if id(child) not in made:
                    made[id(child)] = _converted(path, child, report)
                replacement = made[id(child)]
                if replacement is not None:
                    setattr(parent, name, replacement)
        report.left.extend(_unregistered(prefix, parent))
    return result, report


def _is_loss(module: nn.Module) -> bool:
    name = type(module).__name__
    return not isinstance(module, LossModule) and (
        isinstance(module, _Loss) or name.endswith(("Loss", "CrossEntropy")) or name in _PUBLISHED
    )


def _converted(path: str, loss: nn.Module, report: ConversionReport) -> nn.Module | None:
    """The counterpart, noted in the report; or None."""
    try:
        if any(vars(loss)[hooks] for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")):
            raise _Left("it has hooks, which would be lost")
        result = _counterpart(loss)
        result.train(loss.training)
    except _Left as reason:
        report.left.append(Entry(path, _shown(loss), str(reason)))
        return None
    except (TypeError, ValueError) as error:  # a setting that the counterpart refuses
        report.left.append(Entry(path, _shown(loss), f"{type(error).__name__}: {error}"))
        return None
    report.changed.append(Entry(path, _shown(loss), f"ltkernels.losses.{result!r}"))
    return result


_SETTINGS: dict[str, Any] = {  # with their defaults
    **dict.fromkeys(("weight", "alpha", "gamma", "smoothing")),
    "ignore_index": -100,
    "reduction": "mean",
    "label_smoothing": 0.0,
}


def _shown(loss: nn.Module) -> str:
    """Class and settings: torch's and others' losses print none."""
    settings = []
    for name, default in _SETTINGS.items():
        value = getattr(loss, name, default)
        if isinstance(value, Tensor):
            settings.append(f"{name}={tuple(value.shape)}")
        elif value != default:
            settings.append(f"{name}={value!r}")
    return f"{type(loss).__name__}({', '.join(settings)})"


def _unregistered(prefix: str, parent: nn.Module) -> Iterator[Entry]:
    """Losses that the module holds without their being part of it."""
    for name, value in vars(parent).items():
        path = f"{prefix}.{name}" if prefix else name
        if value is F.cross_entropy:
            yield Entry(path, "torch.nn.functional.cross_entropy", "a function; ltkernels.functional has its twin")
        inside = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
        if not name.startswith("_"):
            for item in inside:
                if isinstance(item, nn.Module) and _is_loss(item):
                    yield Entry(path, _shown(item), _UNSEEN)


_UNSEEN = "it is in a plain container; nn.ModuleList makes it part of the module"


# From a loss to its counterpart.


def _counterpart(loss: Any) -> nn.Module:
    kind = type(loss)
    library, name = kind.__module__.partition(".")[0], kind.__name__
    if kind is nn.CrossEntropyLoss:
        return losses.CrossEntropyLoss(loss.weight, loss.ignore_index, loss.reduction, loss.label_smoothing)
    if isinstance(loss, nn.CrossEntropyLoss):
        raise _Left("a subclass of torch.nn.CrossEntropyLoss, whose own code would be lost")
    if library == "timm" and name == "LabelSmoothingCrossEntropy":
        return losses.CrossEntropyLoss(label_smoothing=loss.smoothing)
    if library == "timm" and name == "SoftTargetCrossEntropy":
        return losses.CrossEntropyLoss()
    if library == "imbalanced_losses" and name == "SoftmaxFocalLoss":
        return _imbalanced_losses_focal(loss)
    if library not in ("torch", "timm") and name in _PUBLISHED:
        try:
            candidates = _PUBLISHED[name](loss)
        except AttributeError as error:
            raise _Left(f"it is not the published class of this name ({error})") from error
        return _published(loss, candidates)
    raise _Left(_WHY.get(name, "it has no exact counterpart"))


_WHY = {
    "NLLLoss": "it takes log-probabilities; CrossEntropyLoss takes the logits they are made of",
    "BCELoss": "it takes probabilities; ltkernels.functional.binary_cross_entropy takes logits",
    "BCEWithLogitsLoss": "a sigmoid loss of elements; ltkernels.functional.binary_cross_entropy is one of rows",
    "BinaryCrossEntropy": "a sigmoid loss of elements; ltkernels.functional.binary_cross_entropy is one of rows",
}


def _imbalanced_losses_focal(loss: Any) -> nn.Module:
    if loss.reduction not in ("mean", "sum", "none"):
        raise _Left(f"reduction={loss.reduction!r} has no counterpart")
    if loss.alpha is not None and loss.label_smoothing:
        raise _Left("alpha and label_smoothing together: its alpha is the label's, here each class has its weight")
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if loss.gather_distributed or (loss.gather_distributed is None and several):
        raise _Left("it gathers the logits of all processes (gather_distributed)")
    options: dict[str, Any] = {name: getattr(loss, name) for name in ("ignore_index", "reduction", "label_smoothing")}
    if loss.reduction == "mean":
        options |= {"denominator": "count", "empty": "zero"}
    return losses.FocalLoss(loss.gamma, loss.alpha, **options)


# Published code: what a loss may be, by name and attributes, first the original's form.


def _ldam(loss: Any) -> list[nn.Module]:
    margin, scale = _table(loss, "m_list"), float(loss.s)
    weight = getattr(loss, "weight", getattr(loss, "per_cls_weights", None))
    return [  # the scale in the loss, or in the head, and then only on the margin
        losses.CrossEntropyLoss(weight, class_margin=margin, scale=scale),
        losses.CrossEntropyLoss(weight, class_margin=margin * scale),
    ]


def _focal(loss: Any) -> list[nn.Module]:
    gamma, weight = float(loss.gamma), getattr(loss, "weight", None)
    return [losses.FocalLoss(gamma, weight, focal_pt=pt, denominator="count") for pt in ("weighted", "raw")]


def _balanced_softmax(loss: Any) -> list[nn.Module]:
    return [losses.BalancedSoftmaxLoss(_table(loss, "sample_per_class"))]


_PUBLISHED: dict[str, Callable[[Any], list[nn.Module]]] = {
    "LDAMLoss": _ldam,
    "FocalLoss": _focal,
    "BalancedSoftmax": _balanced_softmax,
}


def _table(loss: nn.Module, name: str) -> Tensor:
    value = getattr(loss, name, None)
    if not isinstance(value, Tensor):
        raise _Left(f"it has no tensor {name!r}, as the published class of this name")
    return value.detach().flatten()


_PROBED_CLASSES = 256


def _published(loss: nn.Module, candidates: list[nn.Module]) -> nn.Module:
    """The candidate that computes what the loss does."""
    tables = [value for value in (*vars(loss).values(), *loss.buffers()) if isinstance(value, Tensor) and value.dim()]
    classes = max((table.numel() for table in tables), default=10)
    device = tables[0].device if tables else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    # The first labels twice: with each label once, weights that sum to C and their number divide alike.
    labels = torch.randperm(classes, generator=generator)[:_PROBED_CLASSES]
    labels = torch.cat([labels, labels[: len(labels) // 2 + 1]]).to(device)
    logits = (2 * torch.randn(len(labels), classes, generator=generator)).to(device)

    def answer(of: nn.Module) -> tuple[Tensor, Tensor]:
        x = logits.clone().requires_grad_()
        value: Tensor = of.to(device)(x, labels)
        return value.detach().float(), torch.autograd.grad(value.sum(), x)[0]

    try:
        expected = answer(copy.deepcopy(loss))  # a copy, since some have a state
    except Exception as error:
        raise _Left(f"it could not be tried on random logits ({type(error).__name__}: {error})") from error
    for candidate in candidates:
        found = answer(candidate)
        if found[0].shape == expected[0].shape and all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))
            for a, b in zip(found, expected, strict=True)
        ):
            return candidate
    raise _Left("on random logits it computes something else than the published class of this name")
