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
to prove itself: both losses are called on random logits, and values and gradients have to agree. Where the loss has an
``ignore_index``, ignored labels are among them.

``SoftmaxFocalLoss`` without ``gather_distributed=False`` is left where torch.distributed runs already; where it starts
later, the counterpart does not gather.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
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


@dataclass(repr=False)
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

    __repr__ = __str__


def convert(module: nn.Module, *, inplace: bool = False) -> tuple[nn.Module, ConversionReport]:
    """Replaces the losses in a module, or a loss itself, by those of this package that compute the same.

    Parameters stay as they are, and so does the ``state_dict``; where a key goes, the report says so. What changes is
    what :class:`ltkernels.losses.CrossEntropyLoss` does differently on purpose: the loss of half-precision logits is
    float32, labels may have any integer type, and classes are the second dimension where timm has them in the last. A
    loss that is found twice stays one.

    Not seen are functions that the module's code calls, and losses in closures and bound methods. Convert before
    ``torch.compile`` and ``torch.jit.script``: a loss that is compiled or scripted itself stays.

    Args:
        module: a model with losses among its submodules, or a loss.
        inplace: change ``module`` itself; else a deep copy, of whose parameters an optimizer made before knows nothing.

    Returns:
        The module, and a report of what was changed and what was left, and why.

    Raises:
        TypeError: not a module.
        ValueError: ``inplace=True`` for a loss, which can not become an object of another class; or a module that can
            not be copied.

    Example:
        >>> import torch, ltkernels as ltk
        >>> model = torch.nn.ModuleDict({"loss": torch.nn.CrossEntropyLoss(label_smoothing=0.1)})
        >>> model, report = ltk.convert(model, inplace=True)
        >>> print(report)
        changed 1, left 0
          loss: CrossEntropyLoss(label_smoothing=0.1) -> ltkernels.losses.CrossEntropyLoss(label_smoothing=0.1)
    """
    if not isinstance(module, nn.Module):
        given = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise TypeError(f"module: expected a torch.nn.Module, found {given}")
    report = ConversionReport()
    result = module if inplace else _copied(module)
    if _is_loss(result) and (replacement := _converted("", result, report)) is not None:
        if inplace:
            raise ValueError("inplace: expected False for a loss, which can not become another class, found True")
        return replacement, report

    gone: set[int] = set()
    for loss, places in _losses_in(result):
        places = [place for place in places if id(place[0]) not in gone]
        paths = [f"{prefix}.{name}" if prefix else name for _, prefix, name in places]
        if places and (replacement := _converted(", ".join(paths), loss, report)) is not None:
            gone.update(map(id, loss.modules()))
            for parent, _, name in places:
                setattr(parent, name, replacement)
    registered = set(map(id, result.modules()))
    for prefix, parent in result.named_modules():
        if not isinstance(parent, torch.jit.ScriptModule):
            report.left.extend(_unregistered(prefix, parent, registered))
    return result, report


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise ValueError(
            f"module: it can not be copied ({type(error).__name__}: {error}); inplace=True changes it itself"
        ) from error


def _losses_in(module: nn.Module) -> list[tuple[nn.Module, list[tuple[nn.Module, str, str]]]]:
    """Each loss once, an outer one before those in it, with all its places: parent, the parent's path, name."""
    found: dict[int, tuple[nn.Module, list[tuple[nn.Module, str, str]]]] = {}
    for prefix, parent in module.named_modules():
        for name, child in parent._modules.items():
            if child is not None and _is_loss(child):
                found.setdefault(id(child), (child, []))[1].append((parent, prefix, name))
    return list(found.values())


def _is_loss(module: nn.Module) -> bool:
    name = str(getattr(module, "original_name", type(module).__name__))  # a scripted module has the other one
    return not isinstance(module, LossModule) and (
        isinstance(module, _Loss) or "Loss" in name or name.endswith("CrossEntropy") or name in _PUBLISHED
    )


def _converted(path: str, loss: nn.Module, report: ConversionReport) -> nn.Module | None:
    """The counterpart, noted in the report; or None."""
    try:
        result, note = _counterpart(path, loss)
        note += _keep_state(loss, result)
        result.train(loss.training)
    except _Left as reason:
        report.left.append(Entry(path, _shown(loss), str(reason)))
        return None
    except Exception as error:  # a setting that the counterpart refuses; whatever it is, other losses are converted
        report.left.append(Entry(path, _shown(loss), f"{type(error).__name__}: {error}"))
        return None
    report.changed.append(Entry(path, _shown(loss), f"ltkernels.losses.{result!r}{note}"))
    return result


def _keep_state(loss: nn.Module, result: nn.Module) -> str:
    """Gives the counterpart no keys of ``state_dict`` that the loss does not have; a note on those that are missing."""
    if own := [name for name, _ in loss.named_parameters() if name not in dict(result.named_parameters())]:
        raise _Left(f"it has parameters of its own: {', '.join(own)}")
    before, after = loss.state_dict().keys(), result.state_dict().keys()
    result._non_persistent_buffers_set.update(after - before)
    missing = ", ".join(repr(name) for name in before if name not in after)
    return f"; without {missing} in its state_dict" if missing else ""


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
        elif not isinstance(value, (bool, int, float, str, type(None))):  # of others, == and repr can be anything
            settings.append(f"{name}={type(value).__name__}")
        elif value != default:
            settings.append(f"{name}={value!r}")
    return f"{getattr(loss, 'original_name', type(loss).__name__)}({', '.join(settings)})"


def _unregistered(prefix: str, parent: nn.Module, registered: set[int]) -> Iterator[Entry]:
    """Losses that the module holds without their being part of it."""
    for name, value in vars(parent).items():
        if name not in _OF_EVERY_MODULE:
            yield from _held(f"{prefix}.{name}" if prefix else name, value, registered, set())


_OF_EVERY_MODULE = vars(nn.Module()).keys()
_UNSEEN = "torch does not see it there; as an attribute or in nn.ModuleList it is part of the module"


def _held(path: str, value: Any, registered: set[int], seen: set[int]) -> Iterator[Entry]:
    if value is F.cross_entropy:
        yield Entry(path, "torch.nn.functional.cross_entropy", "a function; ltkernels.functional has its twin")
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        for name, part in value.named_modules():
            if id(part) not in registered and _is_loss(part):
                yield Entry(f"{path}.{name}" if name else path, _shown(part), _UNSEEN)
    elif not isinstance(value, type):
        for place, part in _parts(value):
            yield from _held(f"{path}{place}", part, registered, seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a plain container holds, and where."""
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from (("", part) for part in value)
    elif isinstance(value, partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif is_dataclass(value):
        yield from ((f".{part.name}", getattr(value, part.name, None)) for part in fields(value))


# From a loss to its counterpart.


def _counterpart(path: str, loss: Any) -> tuple[nn.Module, str]:
    """The counterpart, and what the report has to add."""
    kind = type(loss)
    library, name = kind.__module__.partition(".")[0], kind.__name__
    if isinstance(loss, torch.jit.ScriptModule):
        raise _Left("it is scripted; convert first, script then")
    if isinstance(loss, nn.CrossEntropyLoss) and kind is not nn.CrossEntropyLoss:
        raise _Left("a subclass of torch.nn.CrossEntropyLoss, whose own code would be lost")
    exact = _EXACT.get((library, name))
    published = None if library in ("torch", "timm") else _PUBLISHED.get(name)
    if exact is None and published is None:
        if any(map(_is_loss, loss.children())):
            raise _Left("it has no exact counterpart; the losses in it are looked at one by one")
        raise _Left(_WHY.get(name, "it has no exact counterpart"))
    compiled = any(place.rpartition(".")[2] == "_orig_mod" for place in path.split(", "))
    if compiled or loss._compiled_call_impl is not None:
        raise _Left("it is compiled; convert first, compile then")
    if any(value for name, value in vars(loss).items() if name.endswith("_hooks")):
        raise _Left("it has hooks, which would be lost")
    if any(isinstance(value, Tensor) and value.is_meta for value in (*vars(loss).values(), *loss.buffers())):
        raise _Left("its tensors are on the meta device; convert when they have values")
    if exact is not None:
        return _same(loss, *exact(loss))
    assert published is not None
    try:
        options = {"ignore_index": loss.ignore_index} if hasattr(loss, "ignore_index") else {}
        candidates = published(loss, options)
    except AttributeError as error:
        raise _Left(f"it is not the published class of this name ({error})") from error
    return _published(loss, candidates), ""


_WHY = {
    "NLLLoss": "it takes log-probabilities; CrossEntropyLoss takes the logits they are made of",
    "BCELoss": "it takes probabilities; ltkernels.functional.binary_cross_entropy takes logits",
    "BCEWithLogitsLoss": "a sigmoid loss of elements; ltkernels.functional.binary_cross_entropy is one of rows",
    "BinaryCrossEntropy": "a sigmoid loss of elements; ltkernels.functional.binary_cross_entropy is one of rows",
    "SigmoidFocalLoss": "a sigmoid loss of elements; ltkernels.losses.SigmoidFocalLoss is one of rows",
    "AsymmetricLossMultiLabel": "it cuts probabilities off at eps; ltkernels.losses.AsymmetricLoss does not",
}


def _same(loss: nn.Module, result: nn.Module, note: str = "") -> tuple[nn.Module, str]:
    """The counterpart of a loss whose class is known, with what its user has added to it."""
    fresh = type(loss)()
    if "forward" in vars(loss):
        raise _Left("its forward was replaced")
    parts = [*loss._parameters, *loss._buffers, *loss._modules]
    if own := [name for name in parts if not hasattr(fresh, name)]:
        raise _Left(f"it has parts of its own: {', '.join(own)}")
    for name, value in vars(loss).items():
        if name not in vars(fresh):
            if hasattr(result, name):
                raise _Left(f"it has an attribute {name!r} of its own, which means something else here")
            vars(result)[name] = value
    return result, note


def _cross_entropy(loss: nn.CrossEntropyLoss) -> tuple[nn.Module]:
    weight = loss.weight
    if isinstance(weight, nn.Parameter) and "weight" in loss._buffers:
        weight = weight.detach()  # torch makes a buffer of it, ours would have a parameter
    return (losses.CrossEntropyLoss(weight, loss.ignore_index, loss.reduction, loss.label_smoothing),)


def _label_smoothing(loss: Any) -> tuple[nn.Module]:
    if loss.confidence != 1.0 - loss.smoothing:
        raise _Left(f"its confidence is {loss.confidence!r}, and not 1 - smoothing")
    return (losses.CrossEntropyLoss(label_smoothing=loss.smoothing),)


def _soft_target(loss: Any) -> tuple[nn.Module]:
    return (losses.CrossEntropyLoss(),)


def _imbalanced_losses_focal(loss: Any) -> tuple[nn.Module, str]:
    if loss.reduction not in ("mean", "sum", "none"):
        raise _Left(f"reduction={loss.reduction!r} has no counterpart")
    if loss.alpha is not None and loss.label_smoothing:
        raise _Left("alpha and label_smoothing together: its alpha is the label's, here each class has its weight")
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if loss.gather_distributed or (loss.gather_distributed is None and several):
        raise _Left("it gathers the logits of all processes (gather_distributed)")
    options: dict[str, Any] = {name: getattr(loss, name) for name in ("ignore_index", "reduction", "label_smoothing")}
    note = ""
    if loss.reduction == "mean":  # its mean divides by the rows, or by their sample_weight, but never by alpha
        options |= {"denominator": "weight" if loss.alpha is None else "count", "empty": "zero"}
        note = "" if loss.alpha is None else "; with sample_weight, its mean divides by the rows and not their weights"
    return losses.FocalLoss(loss.gamma, loss.alpha, **options), note


_EXACT: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("torch", "CrossEntropyLoss"): _cross_entropy,
    ("timm", "LabelSmoothingCrossEntropy"): _label_smoothing,
    ("timm", "SoftTargetCrossEntropy"): _soft_target,
    ("imbalanced_losses", "SoftmaxFocalLoss"): _imbalanced_losses_focal,
}


# Published code: what a loss may be, by name and attributes, first the original's form.


def _ldam(loss: Any, options: Any) -> list[nn.Module]:
    margin, scale = _table(loss, "m_list"), _number(loss.s)
    weight = getattr(loss, "weight", getattr(loss, "per_cls_weights", None))
    return [  # the scale in the loss, or in the head, and then only on the margin
        losses.CrossEntropyLoss(weight, class_margin=margin, scale=scale, **options),
        losses.CrossEntropyLoss(weight, class_margin=margin * scale, **options),
    ]


def _focal(loss: Any, options: Any) -> list[nn.Module]:
    gamma, weight = _number(loss.gamma), getattr(loss, "weight", None)
    options |= {"denominator": "count"}
    return [losses.FocalLoss(gamma, weight, focal_pt=pt, **options) for pt in ("weighted", "raw")]


def _balanced_softmax(loss: Any, options: Any) -> list[nn.Module]:
    return [losses.BalancedSoftmaxLoss(_table(loss, "sample_per_class"), **options)]


_PUBLISHED: dict[str, Callable[[Any, dict[str, Any]], list[nn.Module]]] = {
    "LDAMLoss": _ldam,
    "FocalLoss": _focal,
    "BalancedSoftmax": _balanced_softmax,
}


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _table(loss: nn.Module, name: str) -> Tensor:
    value = getattr(loss, name, None)
    if not isinstance(value, Tensor):
        raise _Left(f"it has no tensor {name!r}, as the published class of this name")
    return value.detach().flatten()


_PROBED_CLASSES, _PROBED_ELEMENTS = 256, 2**22


@torch.inference_mode(False)
@torch.enable_grad()
def _published(loss: nn.Module, candidates: list[nn.Module]) -> nn.Module:
    """The candidate that computes what the loss does."""
    tables = [value for value in (*vars(loss).values(), *loss.buffers()) if isinstance(value, Tensor) and value.dim()]
    classes = max((table.numel() for table in tables), default=10)
    device = tables[0].device if tables else torch.device("cpu")
    dtype = next((table.dtype for table in tables if table.dtype is torch.float64), torch.float32)
    generator = torch.Generator("cpu").manual_seed(0)
    # The first labels twice: with each label once, weights that sum to C and their number divide alike.
    labels = torch.randperm(classes, generator=generator, device="cpu")[:_PROBED_CLASSES]
    labels = labels[: max(2, _PROBED_ELEMENTS // classes)]
    labels = torch.cat([labels, labels[: len(labels) // 2 + 1]])
    if isinstance(ignored := getattr(loss, "ignore_index", None), int):
        labels[::5] = ignored
    labels = labels.to(device)
    logits = (2 * torch.randn(len(labels), classes, generator=generator, dtype=dtype, device="cpu")).to(device)

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
