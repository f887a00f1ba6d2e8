"""ops/class_shards.py: rows whose classes are in several parts, against the reference of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cross_entropy_cases import Form, each_form, seed
from torch import Tensor

from ltkernels.ops import cross_entropy as op
from ltkernels.ops.class_shards import Rows, Shard, finish, gradient_, local_labels, merged, row_sums
from ltkernels.ops.options import CrossEntropyOptions, Reduction

ROWS, CLASSES = 29, 17
CUTS = ((0, 5), (5, 9), (9, 10), (10, 17))  # of different sizes; one class alone, and with "absent" four without a bias
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "tables": {"scale": True, "bias": True, "margin": 1.0, "weight": True, "sample_weight": True},
    "all": {
        "scale": True, "bias": True, "margin": 1.0, "weight": True, "sample_weight": True, "label_smoothing": 0.2,
        "focal_gamma": 2.0, "z_loss": 0.1,
    },
    "absent": {"bias": True, "absent": True, "label_smoothing": 0.1, "focal_gamma": 0.5, "focal_weighted": True},
    "detached": {"focal_gamma": 1.5, "focal_detached": True, "weight": True},
    "margins that move a label far down": {"margin": 100.0},
}  # fmt: skip


def implementation(form: Form) -> Any:
    return next(row for row in op.TABLE.rows if row.backend == form.backend)


@each_form
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_parts_together_are_the_whole(name: str, dtype: torch.dtype, form: Form) -> None:
    if form.backend == "reference":
        pytest.skip("has no kernels")
    seed(len(name))
    case = dict(CASES[name])

    def made(key: str, value: Tensor) -> Tensor | None:
        return value.to(form.device, dtype) if case.pop(key, False) else None

    x = (torch.randn(ROWS, CLASSES, dtype=torch.float64) * 2).to(form.device, dtype)
    y = torch.randint(CLASSES, (ROWS,))
    y[3] = -100
    scale, bias = made("scale", torch.rand(CLASSES) + 0.5), made("bias", torch.randn(CLASSES))
    if case.pop("absent", False):
        assert bias is not None
        bias[5:9] = -torch.inf
        y[(y >= 5) & (y < 9)] = 1
    y = y.to(form.device)
    margin = made("margin", torch.rand(CLASSES) * float(case.get("margin", 0.0)))
    weight, r = made("weight", torch.rand(CLASSES)), made("sample_weight", torch.rand(ROWS))
    options = CrossEntropyOptions(reduction=Reduction.NONE, scale=1.5, **case)
    upstream = torch.randn(ROWS, dtype=torch.float64).to(form.device, dtype)

    exact = [None if v is None else v.double().requires_grad_() for v in (x, scale, bias)]
    fixed = [None if v is None else v.double() for v in (weight, margin, r)]
    loss = op.OP.reference(exact[0], y, fixed[0], exact[1], exact[2], fixed[1], fixed[2], options)
    variables = [v for v in exact if v is not None]
    expected = iter(torch.autograd.grad(loss, variables, upstream.double()))

    smooth = None
    if options.label_smoothing > 0:
        smooth = torch.ones_like(x[0]) if weight is None else weight.clone()
        smooth = smooth if bias is None else torch.where(bias.isfinite(), smooth, 0.0)
    valid = y != -100
    label = torch.where(valid, y, 0)
    row, need = implementation(form), (scale is not None, bias is not None)
    parts, shards, logits = [], [], []
    with form.use():
        for first, last in CUTS:
            here = [None if v is None else v[first:last] for v in (scale, bias)]
            shards.append(
                Shard(
                    local_labels(y, first, last - first, CLASSES, -100), here[0], here[1],
                    None if margin is None else margin[label], None if smooth is None else smooth[first:last],
                )
            )  # fmt: skip
            logits.append(x[:, first:last].clone())
            parts.append(row_sums(row, logits[-1], shards[-1], options))
            assert torch.equal(logits[-1], x[:, first:last])
        sums = merged(torch.stack(parts))
        nested = merged(torch.stack([merged(torch.stack(parts[2:])), merged(torch.stack(parts[:2]))]))
        torch.testing.assert_close(nested, sums)
        reached = CLASSES if bias is None else bias.isfinite().sum()
        total = 0.0 if smooth is None else smooth.sum()
        rows = Rows(valid, None if weight is None else weight[label], r, total, reached)
        found, state = finish(sums, rows, options)
        tables = [gradient_(row, upstream, z, state, s, options, need) for z, s in zip(logits, shards, strict=True)]
    tolerance: dict[str, Any] = (
        {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    )
    torch.testing.assert_close(found.double(), loss.detach(), **tolerance)
    torch.testing.assert_close(torch.cat(logits, dim=1).double(), next(expected), **tolerance)
    for wanted, place in zip(need, range(2), strict=True):
        if wanted:
            together = torch.cat([found[place] for found in tables])
            torch.testing.assert_close(together.double(), next(expected), **tolerance)


def test_labels_of_a_part() -> None:
    y = torch.tensor([0, 4, 5, 8, 9, -100, -1, 17, 2**40])
    assert local_labels(y, 5, 4, 17, -100).tolist() == [-1, -1, 0, 3, -1, -1, 4, 4, 4]


def test_a_label_that_is_no_class_is_not_passed_over() -> None:
    row = next(row for row in op.TABLE.rows if row.backend == "cpu")
    shard = Shard(torch.tensor([0, 3]), None, None, None, None)
    with pytest.raises(IndexError, match="found 3 at row 1"):
        row_sums(row, torch.randn(2, 3), shard, CrossEntropyOptions())
