"""What loss modules share: epochs, tables that may be assigned, settings, and the softmax losses' call.

=======================  ==============================================================================================
class                    for
=======================  ==============================================================================================
`LossModule`             every loss: ``set_epoch``, buffers that keep their precision, classes without samples
`WeightedLossModule`     losses whose class weights may be assigned, a schedule among them
`AdjustedCrossEntropy`   losses that are parameters of :func:`ltkernels.functional.cross_entropy`
=======================  ==============================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict, overload

import torch
from torch import Tensor, nn

from ltkernels import arguments as arg
from ltkernels import functional, rebalance
from ltkernels.functional.row_cross_entropy import Target
from ltkernels.rebalance import ClassCounts, ClassTableModule, DeferredReweighting


class Options(TypedDict, total=False):
    """Keyword arguments that every loss has; :class:`CrossEntropyLoss` explains them."""

    ignore_index: int
    reduction: str
    label_smoothing: float | Tensor
    smoothing_mode: str
    denominator: str | float | Tensor
    z_loss: float
    empty: str
    inplace: bool


class WeightedOptions(Options, total=False):
    """The same for losses that leave the class weights to the caller."""

    weight: Tensor | DeferredReweighting | None


class Method(TypedDict, total=False):
    """What makes the method, and is no option of its users; :class:`CrossEntropyLoss` explains it."""

    scale: float
    class_scale: Tensor | None
    class_bias: Tensor | None
    class_margin: Tensor | float | None
    margin_type: str
    focal_gamma: float
    focal_pt: str
    focal_grad: str


def _described(name: str, value: object) -> str:
    return f"{name}={tuple(value.shape) if isinstance(value, Tensor) and value.ndim else repr(value)}"


class Setting:
    """A number of a method under the method's own name; what it reads is always what the call uses.

    With ``attribute`` it is that attribute of the module, to read and to write. Without, or for a module that has
    the number in its ``__dict__`` already, it went into a class table, where writing it would change nothing: the
    constructor sets it, and from then on it is read-only.
    """

    def __init__(self, attribute: str | None = None, *, open_low: bool = False) -> None:
        self._attribute = attribute
        self._open_low = open_low

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, module: None, owner: type) -> Setting: ...
    @overload
    def __get__(self, module: nn.Module, owner: type) -> float: ...
    def __get__(self, module: nn.Module | None, owner: type) -> Any:
        if module is None:
            return self
        if self._attribute is None or self._name in vars(module):
            return vars(module)[self._name]
        return getattr(module, self._attribute)

    def __set__(self, module: nn.Module, value: float) -> None:
        if self._name in vars(module):
            raise AttributeError(
                f"{self._name}: expected no assignment, because the class tables were made with it; to change it make"
                f" a new {type(module).__name__}"
            )
        if self._attribute is None:
            vars(module)[self._name] = value
        else:
            setattr(module, self._attribute, arg.number(self._name, value, 0.0, math.inf, open_low=self._open_low))


def differing(module: nn.Module, defaults: Mapping[str, object]) -> list[str]:
    """For a repr: the options that are not as they are by default."""
    parts = []
    for name, default in defaults.items():
        value = getattr(module, name)
        if isinstance(value, Tensor) and value.ndim:
            parts.append(_described(name, value))
        elif not isinstance(value, nn.Module) and value is not default and value != default:
            parts.append(_described(name, value))
    return parts


def flag(name: str, value: bool) -> bool:
    """``value`` if it is a bool: ``bool("no")`` is True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, found {value!r}")
    return value


class LossModule(ClassTableModule):
    """What every loss is: a module with tables, which is told of epochs."""

    _has_absent_classes = False  # among ``class_counts``, for losses that refuse labels of such classes
    ignore_index: int

    def set_epoch(self, epoch: int) -> None:
        """Tells a schedule which epoch starts, counted from 0; without a schedule nothing changes.

        Call it before the first step of every epoch (in Lightning, in ``on_train_epoch_start``).
        """
        for part in self.children():
            if isinstance(part, DeferredReweighting):
                part.set_epoch(epoch)

    def _find_absent_classes(self) -> None:
        counts = self._buffers.get("class_counts")
        self._has_absent_classes = counts is not None and not counts.is_meta and bool((counts == 0).any())

    def _refuse_absent_classes(self, target: Target) -> None:
        """Refuses labels that, without a bias of -inf, the functional takes.

        Not on a GPU, which would have to stop, nor in a compiled graph or under torch.func, where values can not be
        looked at.
        """
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return
        if isinstance(target, tuple):
            for labels in target[:2]:
                self._refuse_absent_classes(labels)
            return
        counts = self._buffers.get("class_counts")
        if counts is None or target.is_floating_point() or target.device.type != "cpu":
            return
        labels = target.long()
        labels = labels[labels != self.ignore_index]
        absent = labels[counts.cpu()[labels] == 0]
        if len(absent):
            raise ValueError(
                f"target: expected labels of classes with training samples, found class {int(absent[0])} with count 0"
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._find_absent_classes()


class WeightedLossModule(LossModule):
    """A loss with class weights: a tensor, a parameter, a schedule or None, which may be assigned."""

    _tables: ClassVar[tuple[str, ...]] = ("weight",)
    weight: Tensor | DeferredReweighting | None

    def __setattr__(self, name: str, value: Any) -> None:
        """Lets a table become a buffer, a parameter, a schedule or None, whatever it was; nn.Module keeps the kind."""
        if name in self._tables and not hasattr(type(self), name):  # torch's parametrizations make it a property
            for registry in (vars(self), self._parameters, self._buffers, self._modules):
                registry.pop(name, None)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
                return
        super().__setattr__(name, value)

    def _class_weight(self) -> Tensor | None:
        """The class weights of the current epoch."""
        weight = self._buffers["weight"] if "weight" in self._buffers else self.weight  # a buffer is found last
        return weight() if isinstance(weight, DeferredReweighting) else weight


class AdjustedCrossEntropy(WeightedLossModule):
    """The common options, checks, repr and the call."""

    _tables = ("weight", "class_scale", "class_bias", "class_margin", "label_smoothing")
    _shown: ClassVar[tuple[str, ...]] = ()  # attributes of the method, always in the repr
    _defaults: ClassVar[Mapping[str, object]] = {  # options, in the repr where they differ from this
        "weight": None,
        "ignore_index": -100,
        "reduction": "mean",
        "label_smoothing": 0.0,
        "smoothing_mode": "all",
        "denominator": "weight",
        "z_loss": 0.0,
        "empty": "nan",
        "inplace": False,
    }
    class_counts: Tensor | None
    class_scale: Tensor | None
    class_bias: Tensor | None
    class_margin: Tensor | float | None
    label_smoothing: Tensor | float

    def __init__(
        self,
        class_counts: ClassCounts | None = None,
        method: Method | None = None,
        *,
        weight: Tensor | DeferredReweighting | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float | Tensor = 0.0,
        smoothing_mode: str = "all",
        z_loss: float = 0.0,
        denominator: str | float | Tensor = "weight",
        empty: str = "nan",
        inplace: bool = False,
    ) -> None:
        super().__init__()
        method = {} if method is None else method
        if class_counts is None:
            self.class_counts = None  # not a buffer that is None, beside which torch.export loses count of the others
        else:
            self.register_buffer("class_counts", rebalance.counts_buffer(class_counts))
        self.weight = weight
        self.class_scale = method.get("class_scale")
        self.class_bias = method.get("class_bias")
        self.class_margin = method.get("class_margin")
        self.margin_type = method.get("margin_type", "additive")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.smoothing_mode = smoothing_mode
        self.scale = method.get("scale", 1.0)
        self.focal_gamma = method.get("focal_gamma", 0.0)
        self.focal_pt = method.get("focal_pt", "raw")
        self.focal_grad = method.get("focal_grad", "full")
        self.z_loss = z_loss
        self.denominator = denominator
        self.empty = empty
        self.inplace = inplace
        self._find_absent_classes()
        self._check()

    def forward(self, input: Tensor, target: Target, sample_weight: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            input: logits, ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)``; float64, float32, bfloat16 or float16.
            target: labels of any integer type, ``()``, ``(N,)`` or ``(N, d1, ...)``; or probabilities of ``input``'s
                shape; or ``(labels, other labels, lam)``, whose loss is ``lam`` of the one and ``1 - lam`` of the other
                (mixup, CutMix).
            sample_weight: a factor on the loss of each row, of the labels' shape.

        Returns:
            A 0-d tensor, or the labels' shape with ``reduction="none"``; float64 for float64 logits, else float32.
        """
        loss = functional.cross_entropy(input, target, sample_weight=sample_weight, **self._arguments())
        if self._has_absent_classes:
            self._refuse_absent_classes(target)
        return loss

    def extra_repr(self) -> str:
        parts = [_described(name, getattr(self, name)) for name in self._shown]
        if self.class_counts is not None:
            parts.append(rebalance.describe_counts(self.class_counts))
        return ", ".join(parts + differing(self, self._defaults))

    def _arguments(self) -> dict[str, Any]:
        # Spelt out for speed: nn.Module finds a buffer after all else, and a loop over the names takes as long again.
        buffers = self._buffers
        reduction = self.reduction
        return {
            "weight": self._class_weight(),
            "class_scale": buffers["class_scale"] if "class_scale" in buffers else self.class_scale,
            "class_bias": buffers["class_bias"] if "class_bias" in buffers else self.class_bias,
            "class_margin": buffers["class_margin"] if "class_margin" in buffers else self.class_margin,
            "margin_type": self.margin_type,
            "ignore_index": self.ignore_index,
            "reduction": reduction,
            "label_smoothing": self.label_smoothing,
            "smoothing_mode": self.smoothing_mode,
            "scale": self.scale,
            "focal_gamma": self.focal_gamma,
            "focal_pt": self.focal_pt,
            "focal_grad": self.focal_grad,
            "z_loss": self.z_loss,
            # Libraries set `loss.reduction = "none"` on a loss they were given; a denominator is for the mean alone.
            "denominator": self.denominator if reduction == "mean" else "weight",
            "empty": self.empty,
            "inplace": self.inplace,
        }

    def _check(self) -> None:
        """Calls the loss with no rows: what the call would refuse is refused by the constructor, in the same words."""
        arguments: dict[str, Any] = {
            name: v.detach().cpu() if isinstance(v, Tensor) else v for name, v in self._arguments().items()
        }
        tables = [self.class_counts, *(arguments[name] for name in self._tables)]
        num_classes = next((len(table) for table in tables if isinstance(table, Tensor) and table.ndim == 1), 1)
        with torch.device("cpu"):  # whatever the default is: a model may be made on the meta device
            functional.cross_entropy(torch.empty(0, num_classes), torch.empty(0, dtype=torch.int64), **arguments)
