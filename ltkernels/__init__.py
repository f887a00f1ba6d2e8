"""Fast kernels for deep long-tailed learning.

Every public name below is loaded on first use: ``import ltkernels`` costs no more than an empty module, and never
compiles anything.

Example:
    >>> import torch, ltkernels as ltk
    >>> criterion = ltk.losses.LogitAdjustedLoss(class_counts=[900, 90, 10])
    >>> loss = criterion(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import backends, bench, experts, functional, integrations, losses, metrics, rebalance, samplers
    from .backends import available_backends, explain, use_backend
    from .calibration import DisAlignCalibration, LearnableWeightScaling
    from .class_parallel_linear import ClassParallelLinear
    from .conversion import convert
    from .heads import CosineLinear
    from .ops.gpu import check

__version__ = "0.1.0"

__all__ = [
    "ClassParallelLinear",
    "CosineLinear",
    "DisAlignCalibration",
    "LearnableWeightScaling",
    "available_backends",
    "backends",
    "bench",
    "check",
    "convert",
    "experts",
    "explain",
    "functional",
    "integrations",
    "losses",
    "metrics",
    "rebalance",
    "samplers",
    "use_backend",
]

_MODULES = ("backends", "bench", "experts", "functional", "integrations", "losses", "metrics", "rebalance", "samplers")
_OWNERS = {
    "ClassParallelLinear": "class_parallel_linear",
    "CosineLinear": "heads",
    "DisAlignCalibration": "calibration",
    "LearnableWeightScaling": "calibration",
    "available_backends": "backends",
    "check": "ops.gpu",
    "convert": "conversion",
    "explain": "backends",
    "use_backend": "backends",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _OWNERS:
        value = getattr(import_module(f".{_OWNERS[name]}", __name__), name)
        globals()[name] = value  # the next lookup does not come here
        return value
    error = AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    raise error  # whose name and object let Python suggest another


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
