"""One of the processes of test_class_parallel.py: ``STAGES``, separated by commas; a stage that fails ends all of them.

Every process makes the same problem from the same seed, computes it alone as one process would, in float64, and then
its part of it with the others. 23 rows and 19 classes are cut at random places, where there are more than two processes
with a part of no classes and one of no rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

import ltkernels as ltk

linear_cross_entropy = ltk.functional.linear_cross_entropy
ROWS, FEATURES, CLASSES, IGNORED = 23, 6, 19, 4
BATCHES = ("replicated", "gathered")
OF_ROWS = ("rows", "norms", "gates", "soft")
LABELS_ONLY = ("class_margin", "row_gate", "feature_norm", "smoothing_mode")

# Names of tables and values of rows (Problem.tables) stand for these; a "*" behind one says that it learns.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "none, all": {
        "reduction": "none", "class_bias": "biases*", "class_margin": "margins", "weight": "weights",
        "label_smoothing": 0.1, "focal_gamma": 2.0,
    },
    "weights": {"weight": "weights"},
    "smoothing": {"label_smoothing": 0.1},
    "tables": {
        "class_bias": "biases*", "class_scale": "scales*", "class_margin": "margins", "weight": "weights", "scale": 1.5,
    },
    "all": {
        "class_bias": "biases*", "class_scale": "scales*", "class_margin": "margins", "weight": "weights", "scale": 1.5,
        "label_smoothing": 0.1, "sample_weight": "rows", "z_loss": 0.05,
    },
    "absent": {"class_bias": "absent", "label_smoothing": 0.2, "weight": "weights"},
    "arc": {"class_margin": 0.3, "margin_type": "arc", "scale": 8.0, "normalize": True},
    "arc, learnable": {
        "class_margin": "margins", "margin_type": "arc_straight_through", "scale": 8.0, "normalize": True,
        "class_scale": "scales*", "class_bias": "biases*",
    },
    "focal": {"focal_gamma": 2.0, "weight": "weights"},
    "focal, weighted": {"focal_gamma": 0.5, "focal_pt": "weighted", "label_smoothing": 0.1, "weight": "weights"},
    "focal, detached": {"focal_gamma": 2.0, "focal_grad": "detached"},
    "z_loss": {"z_loss": 0.1},
    "count": {"denominator": "count", "weight": "weights"},
    "number": {"denominator": 7.0},
    "tensor": {"denominator": "seven"},
    "smoothing by class": {"label_smoothing": "epsilons"},
    "off target": {"label_smoothing": 0.1, "smoothing_mode": "off_target", "class_margin": "margins"},
    "influence": {"feature_norm": "norms", "influence_alpha": 10.0},
    "cosines": {"normalize": True, "scale": 30.0, "class_margin": "margins", "weight": "weights"},
    "learnable": {
        "weight": "weights*", "class_margin": "margins*", "label_smoothing": "epsilons*", "sample_weight": "rows*",
        "class_bias": "biases*", "class_scale": "scales*",
    },
    "learnable, all": {
        "weight": "weights*", "class_margin": "margins*", "label_smoothing": 0.1, "sample_weight": "rows*",
        "class_bias": "biases*", "class_scale": "scales*", "scale": 1.5, "focal_gamma": 2.0, "z_loss": 0.05,
        "denominator": "count",
    },
    "learnable, none": {
        "reduction": "none", "weight": "weights*", "label_smoothing": 0.1, "sample_weight": "rows*",
        "class_bias": "absent", "class_scale": "scales",
    },
    "learnable weights": {"weight": "weights*", "label_smoothing": 0.2, "class_bias": "absent"},
    "learnable, off target": {
        "label_smoothing": "epsilons*", "smoothing_mode": "off_target", "class_margin": "margins*",
        "weight": "weights*",
    },
    "learnable, arc": {
        "class_margin": "margins*", "margin_type": "arc", "scale": 8.0, "normalize": True, "class_scale": "scales*",
        "weight": "weights*", "options": torch.nn.LinearCrossEntropyOptions(batch_chunk_size=5),
    },
    "learnable, influence": {"feature_norm": "norms*", "influence_alpha": 10.0, "sample_weight": "rows*"},
    "gates": {"row_gate": "gates*", "class_bias": "biases*", "class_scale": "scales*"},
    "gates alone": {"row_gate": "gates", "reduction": "none"},
    "gates, all": {
        "row_gate": "gates*", "class_bias": "biases*", "class_scale": "scales*", "class_margin": "margins*",
        "weight": "weights*", "scale": 1.5, "label_smoothing": 0.1, "focal_gamma": 2.0, "z_loss": 0.05,
        "sample_weight": "rows*", "options": torch.nn.LinearCrossEntropyOptions(batch_chunk_size=5),
    },
    "chunks": {"options": torch.nn.LinearCrossEntropyOptions(batch_chunk_size=5)},
    "chunks, none": {"options": torch.nn.LinearCrossEntropyOptions(batch_chunk_size=5), "reduction": "none"},
}  # fmt: skip


@dataclass
class Problem:
    """Features, classifier and all that the cases name, of one process and in one type."""

    x: Tensor
    w: Tensor
    b: Tensor
    targets: dict[str, Any]
    tables: dict[str, Tensor]
    variables: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def made(cls, dtype: torch.dtype) -> Problem:
        torch.manual_seed(11)
        x, w, b = torch.randn(ROWS, FEATURES), torch.randn(CLASSES, FEATURES), torch.randn(CLASSES)
        y, other = torch.randint(CLASSES - 2, (ROWS,)), torch.randint(CLASSES - 2, (ROWS,))
        y[3], other[7], other[5], y[9], other[9] = IGNORED, IGNORED, y[5], IGNORED, IGNORED
        absent = torch.randn(CLASSES)
        absent[-2:] = -torch.inf
        tables = {
            "biases": torch.randn(CLASSES), "scales": torch.rand(CLASSES) + 0.5, "margins": torch.rand(CLASSES) * 0.5,
            "weights": torch.rand(CLASSES), "epsilons": torch.rand(CLASSES) * 0.3, "absent": absent,
            "rows": torch.rand(ROWS), "norms": torch.rand(ROWS) * 5, "gates": torch.rand(ROWS),
            "soft": torch.rand(ROWS, CLASSES).softmax(1), "seven": torch.tensor(7.0),
        }  # fmt: skip
        tables["rows"][8] = tables["weights"][2] = 0.0
        tables["soft"][:, -2:] = 0.0  # which are absent where classes are
        lam = torch.rand(ROWS)
        targets = {
            "labels": y, "two, one lam": (y, other, 0.3), "two": (y, other, lam), "probabilities": "soft",
            "probabilities*": "soft*",
        }  # fmt: skip
        return cls(x, w, b, targets, tables).to(dtype)

    def to(self, dtype: torch.dtype) -> Problem:
        def as_type(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(as_type, value))
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        tables = {name: as_type(table) for name, table in self.tables.items()}
        targets = {name: as_type(target) for name, target in self.targets.items()}
        return Problem(as_type(self.x), as_type(self.w), as_type(self.b), targets, tables)

    def part(self, cut: Cut) -> Problem:
        """What this process has."""

        def rows(value: Any) -> Any:
            return value[cut.rows] if isinstance(value, Tensor) else value

        targets = {
            name: tuple(map(rows, target)) if isinstance(target, tuple) else rows(target)
            for name, target in self.targets.items()
        }
        tables = {name: rows(value) if name in OF_ROWS else value for name, value in self.tables.items()}
        return Problem(rows(self.x), self.w[cut.classes], self.b[cut.classes], targets, tables)

    def loss(self, case: dict[str, Any], target: str, bias: bool, **more: Any) -> Tensor:
        """The loss; afterwards ``variables`` has what its gradients are of."""
        self.variables = {"x": self.x, "w": self.w} | ({"b": self.b} if bias else {})
        for name in (*case.values(), self.targets[target]):
            if isinstance(name, str) and name.endswith("*"):
                self.variables[name] = self.tables[name[:-1]]
        self.variables = {name: value.clone().requires_grad_() for name, value in self.variables.items()}
        known = {**self.tables, **self.variables}
        given = {k: known.get(v, v) if isinstance(v, str) else v for k, v in case.items()}
        labels = self.targets[target]
        if isinstance(labels, str):
            labels = known[labels]
        else:
            given["ignore_index"] = IGNORED
        x, w = self.variables["x"], self.variables["w"]
        return linear_cross_entropy(x, w, labels, linear_bias=self.variables.get("b"), **given, **more)

    def gradients(self, loss: Tensor, upstream: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(self.variables.values()), upstream.to(loss))
        return dict(zip(self.variables, found, strict=True))


@dataclass(frozen=True)
class Cut:
    """This process's rows and classes."""

    rows: slice
    classes: slice

    @classmethod
    def of(cls, batch: str, seed: int = 0) -> Cut:
        """The same cuts on all processes; the second part of three or more has no classes, the last one no rows."""
        generator = torch.Generator().manual_seed(seed)
        rank, world = dist.get_rank(), dist.get_world_size()

        def cuts(count: int) -> list[int]:
            return [0, *sorted(torch.randint(count + 1, (world - 1,), generator=generator).tolist()), count]

        classes, rows = cuts(CLASSES), cuts(ROWS)
        if world > 2:
            classes[2], rows[-2] = classes[1], ROWS
        own = slice(rows[rank], rows[rank + 1]) if batch == "gathered" else slice(0, ROWS)
        return cls(own, slice(classes[rank], classes[rank + 1]))

    def expected(self, name: str, whole: Tensor, batch: str) -> Tensor:
        """This process's part of one process's gradient."""
        if name == "x" or name.rstrip("*") in OF_ROWS:
            return whole[self.rows] * (dist.get_world_size() if batch == "gathered" else 1)
        return whole[self.classes] if name in ("w", "b") else whole


def compare(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """To ``tolerance`` times the largest of the expected numbers, or 1 if that is less."""
    assert found.shape == expected.shape, f"{what}: {found.shape} is not {expected.shape}"
    assert torch.equal(found.isfinite(), expected.isfinite()), f"{what}: {found}, expected {expected}"
    if expected.numel():
        error, largest = (found.double() - expected).abs().max().item(), expected.abs().max().item()
        assert error <= tolerance * max(1.0, largest), f"{what}: an error of {error:.3g} at {largest:.3g}"


def combinations() -> Iterator[tuple[str, str, str, bool]]:
    """Cases, targets, batches and bias: every target with every case that takes it, the bias with every second."""
    for place, (name, case) in enumerate(CASES.items()):
        soft = not any(key in case for key in LABELS_ONLY) and not isinstance(case.get("label_smoothing"), str)
        for target in ("labels", "two, one lam", "two", *(("probabilities", "probabilities*") if soft else ())):
            for batch in BATCHES:
                yield name, target, batch, (place + len(target) + len(batch)) % 2 == 0


def values() -> None:
    """Losses and all gradients, in float64 and float32, are one process's."""
    exact = Problem.made(torch.float32).to(torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        given = exact.to(dtype)
        for name, target, batch, bias in combinations():
            cut, case = Cut.of(batch, seed=len(name)), CASES[name]
            expected = exact.loss(case, target, bias)
            upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            gradients = exact.gradients(expected, upstream)
            mine = given.part(cut)
            loss = mine.loss(case, target, bias, group=dist.group.WORLD, batch=batch)
            by_row = loss.dim() > 0
            what = f"{name}, {target}, {batch}, {dtype}"
            assert loss.dtype == dtype
            compare(loss, expected[cut.rows] if by_row else expected, tolerance, f"{what}: loss")
            found = mine.gradients(loss, upstream[cut.rows] if by_row else upstream)
            for variable, gradient in found.items():
                assert gradient.dtype == dtype
                whole = cut.expected(variable, gradients[variable], batch)
                compare(gradient, whole, tolerance, f"{what}: {variable}")


def halves() -> None:
    """bfloat16 and float16, and float32 under autocast: errors of at most 1.5 times those of plain PyTorch.

    Plain PyTorch is one process's ``F.cross_entropy(F.linear(...))``, whose logits are rounded as these are, and whose
    gradient of the logits is. 64 classes of 32 features: errors are averages, and not of one number.
    """
    torch.manual_seed(3)
    rows, features, classes = 48, 32, 64
    x, w, y = torch.randn(rows, features), torch.randn(classes, features) / 4, torch.randint(classes, (rows,))
    world, rank = dist.get_world_size(), dist.get_rank()
    bounds = [classes * place // world for place in range(world + 1)]
    ends = [rows * place // world for place in range(world + 1)]
    own = slice(bounds[rank], bounds[rank + 1])

    def plain(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
        loss = F.cross_entropy(F.linear(x, w), y)
        return loss, *torch.autograd.grad(loss, (x, w))

    def error(found: Tensor, exact: Tensor) -> float:
        return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())

    for dtype, cast in ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True)):
        px, pw = x.to(dtype), w.to(dtype)
        exact = plain(px.double(), pw.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            usual = plain(px, pw)
        for batch in BATCHES:
            mine = slice(ends[rank], ends[rank + 1]) if batch == "gathered" else slice(0, rows)
            vx, vw = px[mine].clone().requires_grad_(), pw[own].clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                loss = linear_cross_entropy(vx, vw, y[mine], group=dist.group.WORLD, batch=batch)
            d_x, d_w = torch.autograd.grad(loss, (vx, vw))
            assert loss.dtype == torch.float32 and d_x.dtype == d_w.dtype == dtype
            parts = (loss, d_x / (world if batch == "gathered" else 1), d_w)
            wholes = zip(exact, usual, (..., mine, own), strict=True)
            for name, part, (true, other, place) in zip(("loss", "x", "w"), parts, wholes, strict=True):
                limit = 1.5 * max(error(other[place], true[place]), 1e-3 if cast or dtype != torch.float32 else 0.0)
                assert (e := error(part, true[place])) <= limit, f"{dtype}, {batch}, {name}: {e:.3g} > {limit:.3g}"


def bits() -> None:
    """The loss has the same bits on all processes and in every run; so have gradients from run to run."""
    p = Problem.made(torch.float32)
    for name in ("all", "none, all", "chunks", "cosines"):
        for batch in BATCHES:
            runs = []
            for _ in range(2):
                mine = p.part(Cut.of(batch))
                loss = mine.loss(CASES[name], "two", True, group=dist.group.WORLD, batch=batch)
                runs.append([loss.detach(), *mine.gradients(loss, torch.ones(loss.shape)).values()])
            for first, second in zip(*runs, strict=True):
                assert torch.equal(first, second), f"{name}, {batch}: another run, other bits"
            if runs[0][0].dim() == 0 or batch == "replicated":
                together: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(together, runs[0][0])
                assert all(torch.equal(loss, together[0]) for loss in together), f"{name}, {batch}: {together}"


STAGES: dict[str, Callable[[], None]] = {"values": values, "halves": halves, "bits": bits}


def main(stages: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for stage in stages.split(","):
        STAGES[stage]()
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
