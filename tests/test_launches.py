"""How often the memory of the logits is touched: one op forward, one backward, three passes in all, nothing of that
size beside.

On a GPU each op is a launch, and beyond small sizes each pass over (N, C) is the time. Both are counted below the
dispatcher, so the count is that of the public call with all that autograd and the loss modules add.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import ltkernels as ltk
from ltkernels import backends
from ltkernels.bench import device

pytestmark = pytest.mark.skipif(
    backends.status()["cpu"] is not None, reason="the C++ library is not built: " + str(backends.status()["cpu"])
)

N, C = 96, 130
COUNTS = [1 + (C - c) ** 2 for c in range(C)]
WEIGHT = ltk.rebalance.effective_number_weight(COUNTS)
BIAS = ltk.rebalance.logit_adjustment(COUNTS)

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "functional": ltk.functional.cross_entropy,
    "CE": ltk.losses.CrossEntropyLoss(),
    "CE, given denominator": ltk.losses.CrossEntropyLoss(denominator=torch.tensor(7.0), label_smoothing=0.1),
    "LA and weight": ltk.losses.LogitAdjustedLoss(COUNTS, weight=WEIGHT),
    "LDAM": ltk.losses.LDAMLoss(COUNTS, reweight_epoch=0),
    "VS": ltk.losses.VSLoss(COUNTS),
    "focal": ltk.losses.FocalLoss(weight=WEIGHT),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
each_type = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)


class Launches(TorchDispatchMode):
    """The ops that read or write a tensor as large as the logits, with the number of such passes; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.large: list[tuple[str, int]] = []
        self.small: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        passes = sum(t.numel() >= N * C for t in (*read, *written))
        if func.is_view or func._opname == "detach":
            return result
        if passes:
            self.large.append((func._opname, passes))
        else:
            self.small.append(func._opname)
        return result

    @property
    def passes(self) -> int:
        return sum(count for _, count in self.large)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits as a model hands them over: not a leaf."""
    return torch.randn(N, C).to(dtype).requires_grad_().view(N, C), torch.randint(C, (N,))


def count(run: Callable[[], Any]) -> Launches:
    with Launches() as launches:
        run()
    return launches


def test_the_counter_sees_what_pytorch_does() -> None:
    """F.cross_entropy: log-softmax and its backward over two buffers, and a buffer of zeros for nll_loss: the counter
    must say so.
    """
    x, y = batch()
    forward = count(lambda: torch.nn.functional.cross_entropy(x, y))
    names = [name for name, _ in forward.large]
    assert names == ["_log_softmax", "nll_loss_forward"] and forward.passes == 3
    loss = torch.nn.functional.cross_entropy(x, y)
    backward = count(lambda: torch.autograd.grad(loss, x))
    assert len(backward.large) >= 2 and backward.passes >= 5


@each_type
@each_loss
def test_one_op_forward_and_none_backward_for_a_reduced_loss(
    loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Logits in, gradient out in the forward; the backward hands it over."""
    x, y = batch(dtype)
    kept: list[Tensor] = []
    forward = count(lambda: kept.append(loss(x, y)))
    assert forward.large == [("cross_entropy_forward", 2)]
    backward = count(lambda: kept.append(torch.autograd.grad(kept[0], x)[0]))
    if (
        loss is LOSSES["CE, given denominator"]
    ):  # the upstream gradient is not 1; half would round twice, so it is recomputed
        assert backward.large == [("mul_" if dtype == torch.float32 else "cross_entropy_backward", 2)]
    else:
        assert backward.large == []
    # An upstream gradient of 1, one read of it, and in the loss at most an arithmetic step on 0-d tensors.
    assert len(forward.small) <= 2 and len(backward.small) <= 3, (forward.small, backward.small)


@each_type
@pytest.mark.parametrize("learnable", (False, True))
def test_one_op_each_way_for_row_losses_and_learnable_adjustments(learnable: bool, dtype: torch.dtype) -> None:
    x, y = batch(dtype)
    bias = BIAS.clone().requires_grad_(learnable)
    kept: list[Tensor] = []
    forward = count(lambda: kept.append(ltk.functional.cross_entropy(x, y, class_bias=bias, reduction="none")))
    assert forward.large == [("cross_entropy_forward", 1)], "logits are read and nothing of their size is written"
    wanted = (x, bias) if learnable else (x,)
    upstream = torch.rand(N)
    backward = count(lambda: kept.append(torch.autograd.grad(kept[0], wanted, upstream)[0]))
    assert backward.large == [("cross_entropy_backward", 2)]
    assert forward.small == [] and len(backward.small) <= 1


@each_loss
def test_nothing_is_written_without_a_backward_to_come(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, y = batch()
    with torch.no_grad():
        assert count(lambda: loss(x, y)).large == [("cross_entropy_forward", 1)]


def test_frozen_logits_are_not_given_a_gradient() -> None:
    x, y = batch()
    bias = BIAS.clone().requires_grad_()
    both = count(lambda: ltk.functional.cross_entropy(x.detach(), y, class_bias=bias).backward())
    assert both.large == [("cross_entropy_forward", 1), ("cross_entropy_backward", 1)]


def test_in_place_writes_over_what_it_reads() -> None:
    x, y = torch.randn(N, C, requires_grad=True) * 1, batch()[1]
    both = count(lambda: torch.autograd.grad(ltk.functional.cross_entropy(x, y, inplace=True), x))
    assert both.large == [("cross_entropy_forward", 1), ("cross_entropy_backward", 2)]


@each_type
def test_transposed_logits_are_not_copied(dtype: torch.dtype) -> None:
    x = torch.randn(C, N).to(dtype).t().requires_grad_()
    y = batch()[1]
    kept: list[Tensor] = []
    both = count(lambda: kept.append(torch.autograd.grad(ltk.functional.cross_entropy(x, y), x)[0]))
    assert both.large == [("cross_entropy_forward", 2)]
    assert kept[0].stride() == x.stride()


@each_type
@each_loss
def test_peak_memory_beyond_logits_and_gradient(loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    """O(N + C): state, row losses and class tables. Measured as `ltkernels bench` does."""
    x, y = batch(dtype)

    def step() -> None:
        value = loss(x, y)
        torch.autograd.grad(value, x)

    step()
    beyond = device.Cpu().peak_bytes(step) - x.nbytes
    assert beyond < 16 * 4 * (N + C), f"{beyond} bytes"
    assert 16 * 4 * (N + C) < x.nbytes  # the bound would see a buffer of (N, C)
