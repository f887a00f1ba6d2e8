"""What the benchmark needs to know of an op. Nothing here knows an op by name.

A ``Case`` is one line of the benchmark: an op, a variant of it, a batch and a type. ``Op.prepare`` turns it into
``Work``: inputs, the forms that compute it, and the truth that they are held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

import ltkernels as ltk
from ltkernels.bench.scenarios import Scenario

STEP, CALL, SCALED, FORWARD = "step", "call", "scaled", "forward"
"""What a form can do with one copy of the inputs: forward and backward, given an upstream gradient of 1; the same as a
user writes it, where autograd makes that gradient by a launch of its own; given another upstream gradient; the forward
alone. An op without a backward has STEP alone."""

OURS = "ltkernels "  # and the backend: the names of our forms
COPY = "copy"

Step = Callable[[Any], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One op on one batch."""

    op: str
    variant: str
    shape: Scenario
    dtype: str
    compile: bool = False  # torch.compile takes seconds a case: only where it says something new
    brief: bool = False  # the main two modes alone

    @property
    def name(self) -> str:
        return f"{self.op} {self.dtype} {self.shape.name} {self.variant}"


@dataclass(frozen=True)
class Form:
    """One way to compute a case.

    Attributes:
        name: in records and tables.
        steps: by STEP, CALL, SCALED and FORWARD; each takes one copy of the inputs and returns its results, which
            for STEP are compared with the truth.
        backend: asked for around each call, out of the timed part.
        captured: a CUDA graph can hold it.
        overwrites: it writes over its inputs, which nobody else may use then.
        less_work: it does less than the case asks for: a bound, not a competitor.
        random: what it draws is another every time, and not compared with the truth.
        note: what a reader of the times has to know.
    """

    name: str
    steps: Mapping[str, Step]
    backend: str | None = None
    captured: bool = True
    overwrites: bool = False
    less_work: bool = False
    random: bool = False
    note: str | None = None

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Inside, ltkernels uses this form's backend."""
        if self.backend is None:
            yield
        else:
            with ltk.use_backend(self.backend):
                yield


@dataclass
class Work:
    """A case with its inputs, ready to be measured.

    Attributes:
        inputs: one copy; ``copy`` makes another in memory of its own.
        forms: those that run here, the copy among them.
        truth: results of STEP in float64.
        tolerance: largest relative difference from it that still counts as the same function.
        footprint: bytes of a copy of the inputs and its results, for staying out of the cache.
        model_bytes: by step, what cannot be avoided to move.
        copied_bytes: what the form called COPY moves, read and written.
        rounding: relative error of the truth rounded to the type of the result.
        absent: forms that do not run here, with reasons.
    """

    case: Case
    inputs: Any
    copy: Callable[[Any], Any]
    forms: list[Form]
    truth: tuple[Tensor, ...]
    tolerance: float
    footprint: int
    model_bytes: Mapping[str, int]
    copied_bytes: int
    rounding: float
    absent: dict[str, str] = field(default_factory=dict)


class Op(Protocol):
    """One hot path in the benchmark."""

    name: str

    def cases(self, quick: bool, dry: bool) -> Sequence[Case]:
        """What is measured, the most telling first: time may run out. ``dry``: a few tiny ones."""

    def prepare(self, case: Case, device: str) -> Work:
        """Makes inputs on ``device``, the forms and their truth."""
