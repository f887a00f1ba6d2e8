"""Losses and samplers in other libraries' training loops. Each module needs its library, and none is imported here.

=====================  ================================================================================================
module                 for
=====================  ================================================================================================
`huggingface`          ``transformers.Trainer``: loss function, sampler, metrics
`lightning`            ``lightning.pytorch.Trainer``: a callback for epochs, samplers and resuming
`accelerate`           a loop of your own with ``accelerate``
`timm`                 mixup for losses that need labels
=====================  ================================================================================================

torch's own ``DistributedDataParallel`` needs none: :class:`ltkernels.samplers.DistributedLongTailSampler` is all.
``python/integrations/`` of the repository has a program for each of them that runs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import accelerate as accelerate
    from . import huggingface as huggingface
    from . import lightning as lightning
    from . import timm as timm

__all__ = ["accelerate", "huggingface", "lightning", "timm"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
