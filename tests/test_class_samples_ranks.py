"""Sampled classes of a classifier that is divided among processes: together the loss of one that has all the samples.

Three processes are started once, for all cases: 50 classes are 17, 17 and 16, 4 classes are 2, 2 and none; 12 rows are
5, none and 7. Each process samples among its own classes, all of them with the same seed and step.
"""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import ltkernels as ltk
from ltkernels.functional import ClassSample, linear_cross_entropy, sample_classes

WORLD, ROWS, FEATURES = 3, (5, 0, 7), 6
N = sum(ROWS)
Loss = ltk.losses.LinearCrossEntropyLoss


def ranges(classes: int) -> list[tuple[int, int]]:
    """As torch.chunk cuts."""
    size = -(-classes // WORLD)
    return [(min(rank * size, classes), min((rank + 1) * size, classes)) for rank in range(WORLD)]


def samples(target: Any, classes: int, count: int, step: int, probs: Tensor | None = None) -> list[ClassSample]:
    """Of all processes."""
    return [
        sample_classes(
            target, classes, -(-count * (end - first) // classes), seed=3, step=step, class_range=(first, end),
            class_probs=None if probs is None else probs[first:end],
        )
        for first, end in ranges(classes)
    ]  # fmt: skip


def united(parts: list[ClassSample], classes: int) -> ClassSample:
    """One sample of all classes, for one process."""
    of_all = [part.classes + first for part, (first, _) in zip(parts, ranges(classes), strict=True)]
    return ClassSample(torch.cat(of_all), torch.cat([part.log_expected for part in parts]), classes)


def options(name: str, classes: int) -> dict[str, Any]:
    tables = torch.rand(3, classes, dtype=torch.float64)
    return {
        "plain": {},
        "not corrected": {"correction": False},
        "tables": {"class_scale": tables[0] + 0.5, "class_bias": tables[1], "weight": tables[2], "scale": 2.0},
        "margins": {"class_margin": tables[0], "margin_type": "arc", "normalize": True, "scale": 8.0},
        "focal, none": {"focal_gamma": 2.0, "reduction": "none"},
        "sparse": {"sparse_grad": True, "z_loss": 0.1},
        "smoothing": {"label_smoothing": 0.1, "weight": tables[2].requires_grad_(), "class_bias": tables[1]},
        "smoothing, absent": {
            "label_smoothing": tables[0] * 0.3,
            "smoothing_mode": "off_target",
            "correction": False,
            "class_bias": torch.where(torch.arange(classes) % 5 == 4, -torch.inf, tables[1]),
        },
        "gates": {
            "row_gate": torch.rand(N, dtype=torch.float64),
            "correction": False,
            "label_smoothing": 0.1,
            "class_bias": tables[1],
            "class_margin": tables[2],
        },
    }[name]


NAMES = (
    "plain", "not corrected", "tables", "margins", "focal, none", "sparse", "smoothing", "smoothing, absent", "gates",
)  # fmt: skip


def check_functional(rank: int, name: str, classes: int, batch: str, pair: bool) -> None:
    torch.manual_seed(classes)
    x, w = torch.randn(N, FEATURES).double(), torch.randn(classes, FEATURES).double()
    y: Any = torch.randint(classes, (N,))
    if pair:
        y = (y, torch.randint(classes, (N,)), torch.rand(N).double())
    given = options(name, classes)
    if name == "smoothing, absent":
        y = y - (y % 5 == 4).long()
    parts = samples(y, classes, classes // 2, step=1, probs=torch.arange(1.0, classes + 1) if pair else None)
    first, end = ranges(classes)[rank]
    rows = slice(0, N)
    if batch == "gathered":
        rows = slice(sum(ROWS[:rank]), sum(ROWS[: rank + 1]))
    own_x, own_w = x[rows].clone().requires_grad_(), w[first:end].clone().requires_grad_()
    own_y = tuple(value[rows] for value in y) if pair else y[rows]
    gates = {"row_gate": given["row_gate"][rows]} if "row_gate" in given else {}
    loss = linear_cross_entropy(
        own_x, own_w, own_y, group=dist.group.WORLD, batch=batch, sample=parts[rank], **(given | gates)
    )
    x.requires_grad_(), w.requires_grad_()
    expected = linear_cross_entropy(x, w, y, sample=united(parts, classes), **(given | {"sparse_grad": False}))
    above = torch.linspace(0.5, 1.5, N).double() if expected.dim() else torch.tensor(0.7).double()
    learnt = [value for value in given.values() if isinstance(value, Tensor) and value.requires_grad]
    d_x, d_w, *d_learnt = torch.autograd.grad(expected, (x, w, *learnt), above)
    torch.testing.assert_close(loss, expected[rows] if expected.dim() else expected, rtol=1e-11, atol=0)
    upstream = above[rows] if expected.dim() else above
    found_x, found_w, *found_learnt = torch.autograd.grad(loss, (own_x, own_w, *learnt), upstream)
    for found, whole in zip(found_learnt, d_learnt, strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found_x, d_x[rows] * (WORLD if batch == "gathered" else 1), rtol=1e-10, atol=1e-13)
    assert found_w.is_sparse == given.get("sparse_grad", False)
    torch.testing.assert_close(found_w.to_dense(), d_w[first:end], rtol=1e-10, atol=1e-13)


def check_module(rank: int, batch: str, probs: Tensor | None) -> None:
    """Steps 0 and 1, a state that is taken over, and evaluation by all classes."""
    made_of: dict[str, Any] = {
        "criterion": ltk.losses.CosFaceLoss(scale=8.0), "normalize": True, "sample_rate": 0.5, "seed": 3,
        "class_probs": probs, "dtype": torch.float64, "group": dist.group.WORLD, "batch": batch,
    }  # fmt: skip
    torch.manual_seed(5)
    module = Loss(FEATURES, 50, **made_of)
    whole = module.linear.weight.full_tensor().detach()  # type: ignore[attr-defined]
    x, y = torch.randn(N, FEATURES).double(), torch.randint(50, (N,))
    rows = slice(sum(ROWS[:rank]), sum(ROWS[: rank + 1])) if batch == "gathered" else slice(0, N)
    margins = {"class_margin": module.criterion.class_margin, "normalize": True, "scale": 8.0}  # type: ignore[union-attr]
    for step in range(3):
        if step == 2:
            state, module = module.state_dict(), Loss(FEATURES, 50, **made_of)
            module.load_state_dict(state)
        sample = united(samples(y, 50, 25, step, probs), 50)
        expected = linear_cross_entropy(x, whole, y, sample=sample, **margins)
        torch.testing.assert_close(module(x[rows], y[rows]), expected, rtol=1e-11, atol=0)
    module.eval()
    expected = linear_cross_entropy(x, whole, y, **margins)
    torch.testing.assert_close(module(x[rows], y[rows]), expected, rtol=1e-11, atol=0)


def check_errors(rank: int) -> None:
    """What is wrong on one process is an error on all, before any waits."""
    module = Loss(FEATURES, 50, sample_rate=0.5, group=dist.group.WORLD, batch="gathered")
    x, y = torch.randn(4, FEATURES), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(TypeError if rank == 1 else RuntimeError, match="target: " if rank == 1 else "rank 1 refused"):
        module(x, y.bool() if rank == 1 else y)
    with pytest.raises(IndexError, match=r"target: expected labels in \[0, 50\)"):
        module(x, y + 50 if rank == 1 else y)
    assert int(module.sample_step) == 0
    with pytest.raises(ValueError, match="sparse_grad: expected False with group"):
        Loss(FEATURES, 50, sample_rate=0.5, sparse_grad=True, group=dist.group.WORLD)
    whole = sample_classes(y, 50, 10, seed=0)
    with pytest.raises((ValueError, RuntimeError), match="sample: expected .* found one of 50"):
        linear_cross_entropy(x, module.linear.weight, y, sample=whole)
    of_part = sample_classes(y, 50, 1, seed=0, class_range=ranges(50)[rank])
    with pytest.raises(ValueError, match="sparse_grad: expected False with a DTensor"):
        linear_cross_entropy(x, module.linear.weight, y, sample=of_part, sparse_grad=True)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD)
    for batch in ("replicated", "gathered"):
        for classes in (50, 4):
            for name in NAMES:
                check_functional(rank, name, classes, batch, pair=False)
        check_functional(rank, "tables", 50, batch, pair=True)
        for probs in (None, torch.arange(1.0, 51.0)):
            check_module(rank, batch, probs)
    check_errors(rank)
    dist.destroy_process_group()


def test_three_processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder,), nprocs=WORLD)


def test_ranges_have_random_numbers_of_their_own() -> None:
    """Ranges of the same size take different places; labels of other ranges are passed over."""
    labels = torch.tensor([1, 150, 199])
    for probs in (None, torch.arange(1.0, 101.0)):
        first, second = (
            sample_classes(labels, 200, 20, seed=0, class_range=(at, at + 100), class_probs=probs) for at in (0, 100)
        )
        assert first.num_classes == second.num_classes == 100
        assert first.classes[first.log_expected == 0].tolist() == [1]
        assert second.classes[second.log_expected == 0].tolist() == [50, 99]
        assert int(torch.isin(first.classes, second.classes).sum()) < 15


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (TypeError, "class_range: expected a tuple of 2 integers, found 3", 3),
        (TypeError, "class_range: expected an integer", (0, 1.5)),
        (ValueError, r"class_range: expected 0 <= first <= end <= 10, found \(5, 11\)", (5, 11)),
        (ValueError, "class_range: expected 0 <= first <= end", (5, 4)),
        (ValueError, "num_sampled: expected at most num_classes, which is 3, found 4", (2, 5)),
    ],
)
def test_wrong_ranges(error: type[Exception], message: str, given: Any) -> None:
    with pytest.raises(error, match=message):
        sample_classes(torch.tensor([1]), 10, 4, seed=0, class_range=given)
