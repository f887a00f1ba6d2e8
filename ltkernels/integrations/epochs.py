"""What has an epoch in a training run: the losses and schedules of a model, the samplers behind a ``DataLoader``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ltkernels.losses.base import LossModule
from ltkernels.rebalance import DeferredReweighting
from ltkernels.samplers.sampler import LongTailSampler

# How wrappers call what they wrap: a batch sampler its sampler; Accelerate's shards and skips a batch sampler; a
# Lightning wrapper is a data set over a sampler.
_INNER = ("batch_sampler", "sampler", "dataset", "_sampler", "base_dataloader")


def schedules(module: nn.Module) -> list[LossModule | DeferredReweighting]:
    """Losses and schedules in a module, each once; a loss drives what it holds, so that is not listed beside it."""
    found: list[LossModule | DeferredReweighting] = []
    held: set[int] = set()
    for part in module.modules():
        if isinstance(part, (LossModule, DeferredReweighting)) and id(part) not in held:
            found.append(part)
            held.update(id(child) for child in part.modules())
    return found


def samplers(loader: Any) -> list[LongTailSampler]:
    """The samplers of this package that a loader draws from, through whatever wraps them, each once."""
    found: dict[int, LongTailSampler] = {}
    seen: set[int] = set()

    def visit(part: Any) -> None:
        if part is None or id(part) in seen:
            return
        seen.add(id(part))
        if isinstance(part, LongTailSampler):
            found[id(part)] = part
            return
        for inner in _inner(part):
            visit(inner)

    visit(loader)
    return list(found.values())


def _inner(part: Any) -> Iterator[Any]:
    attributes = getattr(part, "__dict__", {})
    for name in _INNER:
        if name in attributes:
            yield attributes[name]
