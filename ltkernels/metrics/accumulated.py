"""A metric that adds up over batches and processes, for programs without torchmetrics.

The part of ``torchmetrics.Metric`` that training loops use, with its names and its behaviour: code that was written for
one runs with the other. Where torchmetrics is installed, metrics derive from the original.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self

_REDUCTIONS = {"sum": "SUM", "max": "MAX"}  # of torch.distributed.ReduceOp


class AccumulatedMetric(nn.Module):
    """States that batches add to: ``update``, ``compute``, ``reset``, ``forward``, ``sync``.

    A state is a buffer, so it moves with ``to``; it is part of ``state_dict()`` after ``persistent(True)``, as in
    torchmetrics.
    """

    def __init__(self, process_group: Any = None, sync_on_compute: bool = True, **kwargs: Any) -> None:
        """Makes a metric without states.

        Args:
            process_group: whose states are added up; default: all processes'.
            sync_on_compute: whether ``compute`` adds up over processes.
            **kwargs: none; those of ``torchmetrics.Metric`` need torchmetrics.
        """
        super().__init__()
        if kwargs:
            raise TypeError(
                f"{next(iter(kwargs))}: expected process_group or sync_on_compute, found another keyword of"
                " torchmetrics.Metric, which needs torchmetrics to be installed"
            )
        self.process_group, self.sync_on_compute = process_group, sync_on_compute
        self._defaults: dict[str, Tensor] = {}
        self._reductions: dict[str, str] = {}
        self._local: dict[str, Tensor] | None = None  # this process's states while the synchronised are in place
        self._update_count = 0
        self._computed: Any = None
        self._wrap()

    def _wrap(self) -> None:
        """Puts the bookkeeping around the subclass's ``update`` and ``compute``."""
        update, compute = type(self).update, type(self).compute

        @functools.wraps(update)
        def counted(*args: Any, **kwargs: Any) -> None:
            self._check_not_synced()
            update(self, *args, **kwargs)
            self._computed = None
            self._update_count += 1

        @functools.wraps(compute)
        def synchronised() -> Any:
            if self._update_count == 0:
                warnings.warn(
                    f"The ``compute`` method of metric {type(self).__name__} was called before the ``update`` method:"
                    " there is nothing to compute from",
                    UserWarning,
                    stacklevel=2,
                )
            if self._computed is None:
                with self.sync_context(should_sync=self.sync_on_compute):
                    self._computed = compute(self)
            return self._computed

        self.update, self.compute = counted, synchronised  # type: ignore[method-assign]

    def add_state(self, name: str, default: Tensor, dist_reduce_fx: str, persistent: bool = False) -> None:
        """A tensor that ``update`` adds to, what ``reset`` makes of it, and how it adds up over processes."""
        if dist_reduce_fx not in _REDUCTIONS:
            raise ValueError(f"dist_reduce_fx: expected 'sum' or 'max', found {dist_reduce_fx!r}")
        self.register_buffer(name, default, persistent=persistent)
        self._defaults[name], self._reductions[name] = default.detach().clone(), dist_reduce_fx

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Adds a batch to the states."""
        raise NotImplementedError

    def compute(self) -> Any:
        """What the states amount to."""
        raise NotImplementedError

    @property
    def update_count(self) -> int:
        """Updates since the last ``reset``."""
        return self._update_count

    @property
    def update_called(self) -> bool:
        """Whether there has been an update since the last ``reset``."""
        return self._update_count > 0

    @property
    def device(self) -> torch.device:
        """Where the states are."""
        return next(iter(self._states().values())).device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Adds a batch, and returns what ``compute`` would for it alone, in this process."""
        self._check_not_synced()
        before, count = self._states(), self._update_count
        self.reset()
        try:
            self.update(*args, **kwargs)
            value = type(self).compute(self)
        except Exception:  # a batch that cannot be counted: what was before it stays
            for name, state in before.items():
                setattr(self, name, state)
            self._update_count = count
            raise
        for name, state in self._states().items():
            both = torch.stack([before[name], state])
            setattr(self, name, both.sum(0) if self._reductions[name] == "sum" else both.amax(0))
        self._update_count, self._computed = count + 1, None
        return value

    def reset(self) -> None:
        """Back to the beginning."""
        for name, default in self._defaults.items():
            setattr(self, name, default.clone().to(getattr(self, name).device))
        self._local, self._computed, self._update_count = None, None, 0

    def persistent(self, mode: bool = False) -> None:
        """Whether the states are part of ``state_dict()``."""
        change = self._non_persistent_buffers_set.difference_update if mode else self._non_persistent_buffers_set.update
        change(self._defaults)

    def sync(self, process_group: Any = None, should_sync: bool = True) -> None:
        """Puts the states of all processes together, in place of this process's, until ``unsync``."""
        self._check_not_synced()
        if not (should_sync and dist.is_available() and dist.is_initialized()):
            return
        self._local = self._states()
        for name, state in self._local.items():
            everywhere = state.clone()
            operation = getattr(dist.ReduceOp, _REDUCTIONS[self._reductions[name]])
            dist.all_reduce(everywhere, op=operation, group=process_group or self.process_group)
            setattr(self, name, everywhere)

    @property
    def _is_synced(self) -> bool:
        return self._local is not None

    def unsync(self, should_unsync: bool = True) -> None:
        """This process's states again."""
        if not should_unsync or self._local is None:
            return
        for name, state in self._local.items():
            setattr(self, name, state)
        self._local = None

    @contextmanager
    def sync_context(self, should_sync: bool = True, should_unsync: bool = True) -> Iterator[None]:
        """Between ``sync`` and ``unsync``; where the states are synchronised already, they stay so."""
        already = self._is_synced
        if not already:
            self.sync(should_sync=should_sync)
        try:
            yield
        finally:
            self.unsync(should_unsync and not already)

    def clone(self) -> Self:
        """A copy of its own."""
        return copy.deepcopy(self)

    def _states(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._defaults}

    def _check_not_synced(self) -> None:
        if self._is_synced:
            raise RuntimeError(f"{type(self).__name__}: expected states of this process, found those of all; unsync()")

    def __getstate__(self) -> dict[str, Any]:
        """Without the functions of ``_wrap``, which hold this object."""
        return {name: value for name, value in self.__dict__.items() if name not in ("update", "compute")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._wrap()
