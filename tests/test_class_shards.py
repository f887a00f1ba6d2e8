"""ops/class_shards.py: rows whose classes are in several parts, against the float64 reference of the whole.

29 rows are no multiple of a block or of a vector. The parts have 5, 4, 1, 0 and 7 of 17 classes: no multiple either, a
class alone (a row whose label it is has no other class there), none at all, and with "absent" four without a bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cross_entropy_cases import Form, each_kernel_form, seed
from torch import Tensor

from ltkernels.ops import class_shards_plain as plain
from ltkernels.ops import cross_entropy as op
from ltkernels.ops.class_shards import (
    COEFFICIENT,
    HARD,
    LABELS,
    MAX,
    NO_GRADIENTS,
    OTHERS,
    PER_LABEL,
    SOFT,
    WEIGHT,
    Shard,
    differentiated,
    finish,
    gradient_,
    local_places,
    merged,
    numbers,
)
from ltkernels.ops.options import ClassParallelOptions, MarginType, Reduction, RowCrossEntropyOptions
from ltkernels.reference.row_cross_entropy import row_cross_entropy

ROWS, CLASSES, IGNORED = 29, 17, -100
CUTS = ((0, 5), (5, 9), (9, 10), (10, 10), (10, 17))
ABSENT = slice(5, 9)


@dataclass(frozen=True)
class Options:
    """Which tables there are, and the scalars."""

    tables: str = ""
    """Of scale, bias, absent (some biases are -inf), margin, weight, rows (a weight a row) and norm, those named."""
    scalars: dict[str, Any] = field(default_factory=dict)
    largest_margin: float = 1.0


CASES = {
    "plain": Options(),
    "smoothing": Options("", {"label_smoothing": 0.1}),
    "tables": Options("scale bias margin weight rows", {"scale": 1.5}),
    "everything": Options(
        "scale bias margin weight rows",
        {"scale": 1.5, "label_smoothing": 0.2, "focal_gamma": 2.0, "z_loss": 0.1},
    ),
    "absent": Options("bias absent", {"label_smoothing": 0.1, "focal_gamma": 0.5, "focal_weighted": True}),
    "detached": Options("weight", {"focal_gamma": 1.5, "focal_detached": True}),
    "arc": Options("scale margin", {"scale": 4.0, "margin_type": MarginType.ARC}),
    "arc straight through": Options("bias margin", {"scale": 4.0, "margin_type": MarginType.ARC_STRAIGHT_THROUGH}),
    "influence": Options("norm weight", {"influence_alpha": 10.0}),
    "margins that move a label far down": Options("margin", {}, 100.0),
}


@dataclass
class Problem:
    """Logits, labels and tables; None for a table that a case does without."""

    logits: Tensor
    labels: Tensor
    """``(L, N)``."""
    shares: Tensor
    """``(L, N)``: of each label in the loss."""
    tables: dict[str, Tensor | None]
    options: RowCrossEntropyOptions

    @classmethod
    def of(cls, case: Options, count: int, dtype: torch.dtype, device: str) -> Problem:
        seed(len(case.tables) + count)
        arc = case.scalars.get("margin_type", MarginType.ADDITIVE) != MarginType.ADDITIVE
        logits = torch.rand(ROWS, CLASSES) * 1.8 - 0.9 if arc else torch.randn(ROWS, CLASSES) * 2
        labels = torch.stack([torch.randperm(CLASSES).repeat(2)[:ROWS] for _ in range(count)])
        names = case.tables.split()
        bias = torch.randn(CLASSES)
        if "absent" in names:
            bias[ABSENT] = -torch.inf
            labels = torch.where((labels >= ABSENT.start) & (labels < ABSENT.stop), labels - 5, labels)
        if count == 2:
            labels[1] = torch.where(labels[1] == labels[0], (labels[0] + 1) % ABSENT.start, labels[1])
        labels[:, 3] = IGNORED
        labels[-1, 4] = IGNORED  # one of two, or the only one
        lam = torch.rand(ROWS)
        shares = torch.ones(1, ROWS) if count == 1 else torch.stack((lam, 1 - lam))
        tables = {
            "scale": torch.rand(CLASSES) + 0.5,
            "bias": bias,
            "margin": torch.rand(CLASSES) * (0.4 if arc else case.largest_margin),
            "weight": torch.rand(CLASSES),
            "rows": torch.rand(ROWS),
            "norm": torch.rand(ROWS) * 5,
        }
        return cls(
            logits.to(device, dtype),
            labels.to(device),
            shares.to(device, dtype),
            {name: value.to(device, dtype) if name in names else None for name, value in tables.items()},
            RowCrossEntropyOptions(ignore_index=IGNORED, reduction=Reduction.NONE, **case.scalars),
        )

    def truth(self, upstream: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The losses, and the gradients of logits, scale and bias."""
        x = self.logits.double().requires_grad_()
        t = {name: None if value is None else value.double() for name, value in self.tables.items()}
        learnable = [None if v is None else v.requires_grad_() for v in (x, t["scale"], t["bias"])]
        second = self.labels[1] if len(self.labels) == 2 else None
        loss = row_cross_entropy(
            x, self.labels[0], second, None if second is None else self.shares[0].double(), t["weight"], t["scale"],
            t["bias"], t["margin"], None, t["rows"], None, t["norm"], None, None, self.options,
        )  # fmt: skip
        found = iter(torch.autograd.grad(loss, [v for v in learnable if v is not None], upstream.double()))
        return loss.detach(), [None if v is None else next(found) for v in learnable]

    def of_labels(self) -> Tensor:
        """What the caller of the parts knows of the labels."""
        valid, at = self.labels != IGNORED, self.labels.clamp_min(0)
        t, eps = self.tables, self.options.label_smoothing
        of = self.logits.new_zeros(PER_LABEL, *self.labels.shape, dtype=torch.float64)
        of[WEIGHT] = 1.0 if t["weight"] is None else t["weight"][at]
        of[COEFFICIENT] = torch.where(valid, self.shares, 0.0) * (1.0 if t["rows"] is None else t["rows"])
        of[HARD], of[SOFT] = (1 - eps) * of[WEIGHT], eps / len(self.present().nonzero())
        return of.movedim(1, 0).contiguous()

    def margins(self) -> Tensor:
        """Of the labels."""
        table = self.tables["margin"]
        return torch.zeros_like(self.shares) if table is None else table[self.labels.clamp_min(0)]

    def present(self) -> Tensor:
        bias = self.tables["bias"]
        return torch.ones(CLASSES) > 0 if bias is None else bias.isfinite()

    def smooth(self) -> Tensor | None:
        if self.options.label_smoothing == 0:
            return None
        weight = self.tables["weight"]
        given = torch.ones_like(self.logits[0]) if weight is None else weight
        return torch.where(self.present().to(given.device), given, 0.0)

    def shard(self, first: int, last: int) -> Shard:
        def part(table: Tensor | None) -> Tensor | None:
            return None if table is None else table[first:last]

        places = torch.stack([local_places(label, first, last - first, CLASSES, IGNORED) for label in self.labels])
        return Shard(places, part(self.tables["scale"]), part(self.tables["bias"]), part(self.smooth()))

    def scalars(self) -> ClassParallelOptions:
        given = self.options._asdict()
        same = {name: given[name] for name in ClassParallelOptions._fields if name in given}
        return ClassParallelOptions(**same, smoothing=self.options.label_smoothing > 0)


def kernels(form: Form) -> Any:
    return next(row for row in op.TABLE.rows if row.backend == form.backend)


@each_kernel_form
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_parts_together_are_the_whole(name: str, labels: int, dtype: torch.dtype, form: Form) -> None:
    p = Problem.of(CASES[name], labels, dtype, form.device)
    upstream = torch.randn(ROWS, dtype=torch.float64).to(form.device, dtype)
    expected, (d_logits, *d_tables) = p.truth(upstream)

    row, scalars, of, margins = kernels(form), p.scalars(), p.of_labels(), p.margins()
    shards = [p.shard(*cut) for cut in CUTS]
    logits = [p.logits[:, first:last].clone() for first, last in CUTS]
    smooth, norm = p.smooth(), p.tables["norm"]
    total = of.new_zeros(()) if smooth is None else smooth.double().sum()
    need = (d_tables[0] is not None, d_tables[1] is not None, *NO_GRADIENTS[2:])
    with form.use():
        parts = [numbers(row, z, s, margins, scalars) for z, s in zip(logits, shards, strict=True)]
        for z, (first, last) in zip(logits, CUTS, strict=True):
            assert torch.equal(z, p.logits[:, first:last]), "the logits are not as they were"
        together = merged(torch.stack(parts))
        nested = merged(torch.stack([merged(torch.stack(parts[2:])), merged(torch.stack(parts[:2]))]))
        torch.testing.assert_close(nested, together, rtol=1e-13, atol=1e-13)
        losses = finish(together, of, total, None if norm is None else norm.double(), scalars)
        found, of_rows = differentiated(together, upstream, of, total, None if norm is None else norm.double(), scalars)
        assert torch.equal(losses, found)
        tables = [
            gradient_(row, of_rows.numbers, together[MAX], z, s, margins, scalars, need)
            for z, s in zip(logits, shards, strict=True)
        ]

    # float32: numbers of up to 1e2 in "margins", each rounded once by the kernels; the largest case is at half of this.
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(torch.cat(logits, dim=1).double(), d_logits, **tolerance)
    for place, gradient in enumerate(d_tables):
        pieces = [part[place] for part in tables]
        if gradient is None:
            assert pieces == [None] * len(CUTS)
        else:
            torch.testing.assert_close(torch.cat(pieces).double(), gradient, **tolerance)  # type: ignore[arg-type]


@each_kernel_form
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("labels", [1, 2])
def test_gradients_of_all_that_is_known_of_a_part(name: str, labels: int, form: Form) -> None:
    """Beside those above: of what smoothing gives the classes, and of margins; against autograd and the definition."""
    p = Problem.of(CASES[name], labels, torch.float64, form.device)
    row, scalars, of, margins = kernels(form), p.scalars(), p.of_labels(), p.margins()
    need = (True, True, p.options.label_smoothing > 0, True, False, False, False)
    smooth, norm = p.smooth(), p.tables["norm"]
    total = of.new_zeros(()) if smooth is None else smooth.double().sum()
    upstream = torch.randn(ROWS, dtype=torch.float64, device=form.device)
    with form.use():
        shards = [p.shard(*cut) for cut in CUTS]
        logits = [p.logits[:, first:last].clone() for first, last in CUTS]
        parts = [plain.numbers(z, s, margins, scalars) for z, s in zip(logits, shards, strict=True)]
        together = merged(torch.stack(parts))
        _, of_rows = differentiated(together, upstream, of, total, None if norm is None else norm.double(), scalars)
        for z, s in zip(logits, shards, strict=True):
            arguments = (of_rows.numbers, together[MAX])
            given = z.clone(), z.clone()
            exact = plain.gradient_(*arguments, given[0], s, margins, scalars, need)
            found = gradient_(row, *arguments, given[1], s, margins, scalars, need)
            torch.testing.assert_close(given[1], given[0], rtol=1e-10, atol=1e-12)
            for gradient, expected in zip(found, exact, strict=True):
                if expected is not None:  # what is not given has no gradient there
                    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@each_kernel_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_sure_row_keeps_its_digits(dtype: torch.dtype, form: Form) -> None:
    """Losses of e^-4 to e^-40, of which log-sum-exp minus the label's logit would have no digit left in float32."""
    gap = torch.linspace(4, 40, 10).round().to(dtype)  # whole numbers, which half types have too
    logits = torch.stack((gap, torch.zeros_like(gap), torch.zeros_like(gap)), dim=1).to(form.device)
    row, scalars = kernels(form), ClassParallelOptions(reduction=Reduction.NONE)
    of = torch.zeros(1, PER_LABEL, 10, dtype=torch.float64, device=form.device)
    of[:, [COEFFICIENT, HARD, WEIGHT]] = 1.0
    halves = [logits[:, :1].clone(), logits[:, 1:].clone()]
    places = [torch.zeros(1, 10, dtype=torch.int64, device=form.device), torch.full((1, 10), -1, device=form.device)]
    zero, margins = of.new_zeros(()), of.new_zeros(1, 10)
    with form.use():
        parts = [numbers(row, z, Shard(at), margins, scalars) for z, at in zip(halves, places, strict=True)]
        together = merged(torch.stack(parts))
        loss, of_rows = differentiated(together, torch.ones_like(gap).to(form.device), of, zero, None, scalars)
        for z, at in zip(halves, places, strict=True):
            gradient_(row, of_rows.numbers, together[MAX], z, Shard(at), margins, scalars)
    exact = torch.log1p(2 * (-gap.double()).exp())
    torch.testing.assert_close(loss.cpu(), exact, rtol=2e-6, atol=0)
    missing = 2 / (gap.double().exp() + 2)  # 1 - p
    least = {torch.float16: 6e-8}.get(dtype, 0.0)  # the smallest number of float16
    torch.testing.assert_close(
        halves[0][:, 0].cpu().double(), -missing, rtol=2 * torch.finfo(dtype).eps + 2e-6, atol=least
    )


@each_kernel_form
def test_a_part_of_labels_alone_and_one_of_nothing(form: Form) -> None:
    """There is no other class whose maximum could be taken: the sum is 0, and what stands for the maximum finite."""
    row, scalars = kernels(form), ClassParallelOptions(reduction=Reduction.NONE)
    margins = torch.zeros(2, 3, device=form.device)
    alone = Shard(torch.tensor([[0, 0, -1], [1, -1, -1]], device=form.device))
    logits = torch.randn(3, 2, device=form.device)
    with form.use():
        found = numbers(row, logits, alone, margins, scalars).cpu()
        empty = numbers(row, logits[:, :0], alone, margins, scalars).cpu()
    x = logits.cpu()
    assert found[OTHERS, 0] == 0 and found[MAX].isfinite().all()
    assert found[LABELS : LABELS + 4, 0].tolist() == [x[0, 0], x[0, 0], x[0, 1], x[0, 1]]
    assert found[LABELS : LABELS + 4, 1].tolist() == [x[1, 0], x[1, 0], -torch.inf, -torch.inf]
    torch.testing.assert_close(found[MAX, 2] + found[OTHERS, 2].log(), x[2].logsumexp(0))
    assert empty[OTHERS].tolist() == [0.0] * 3 and (empty[LABELS:] == -torch.inf).all() and empty[MAX].isfinite().all()


def test_labels_of_a_part() -> None:
    y = torch.tensor([0, 4, 5, 8, 9, IGNORED, -1, 17, 2**40])
    assert local_places(y, 5, 4, 17, IGNORED).tolist() == [-1, -1, 0, 3, -1, -1, 4, 4, 4]
    assert local_places(y, 5, 4, 17, 8).tolist() == [-1, -1, 0, -1, -1, 4, 4, 4, 4]
    assert local_places(y, 5, 0, 17, IGNORED).tolist() == [-1, -1, -1, -1, -1, -1, 0, 0, 0]


def test_a_label_that_is_no_class_is_not_passed_over() -> None:
    row = next(row for row in op.TABLE.rows if row.backend == "cpu")
    shard = Shard(torch.tensor([[0, 3]]))
    with pytest.raises(IndexError, match="found 3 at row 1"):
        numbers(row, torch.randn(2, 3), shard, torch.zeros(1, 2), ClassParallelOptions())
