"""CosineLinear against the formula, in every precision."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ltkernels as ltk


def published(x: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """LDAM-DRW's NormedLinear, whose weight is (D, C)."""
    return scale * F.normalize(x, dim=1).mm(F.normalize(weight, dim=0))


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_matches_the_published_head_in_value_and_gradient(scale: float) -> None:
    head = ltk.CosineLinear(16, 7, scale).double()
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        head.weight.mul_(torch.rand(7, 1) * 3 + 0.1)  # lengths other than the initial 1
    transposed = head.weight.detach().T.clone().requires_grad_()
    upstream = torch.randn(5, 7, dtype=torch.float64)

    expected = published(x, transposed, scale)
    expected_x, expected_weight = torch.autograd.grad(expected, (x, transposed), upstream)
    actual = head(x)
    actual_x, actual_weight = torch.autograd.grad(actual, (x, head.weight), upstream)

    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(actual_x, expected_x, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(actual_weight, expected_weight.T, rtol=1e-11, atol=1e-13)


def test_gradcheck() -> None:
    head = ltk.CosineLinear(3, 4, 2.0).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(head, {"weight": w}, (x,)), (x, head.weight)
    )


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 5, 16), (0, 16)])
def test_shapes(shape: tuple[int, ...]) -> None:
    assert ltk.CosineLinear(16, 7)(torch.randn(shape)).shape == (*shape[:-1], 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1e-6, 1.0, 3e4])
def test_half_precision_has_only_its_own_rounding(dtype: torch.dtype, length: float) -> None:
    """Norms are float32: in float16 the squares of 3e4 overflow, and those of 1e-6 vanish (eps = 1e-12 is 0 there)."""
    x = (F.normalize(torch.randn(8, 64), dim=1) * length).to(dtype)
    head = ltk.CosineLinear(64, 10, 30.0).to(dtype)
    exact = published(x.double(), head.weight.detach().double().T, 30.0)
    output = head(x)
    assert output.dtype == dtype
    # Both unit vectors and the result are rounded once each: 3 half units in the last place, on a product below 30.
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=30 * 1.5 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_zero_vector_has_cosine_zero(dtype: torch.dtype) -> None:
    output = ltk.CosineLinear(4, 3).to(dtype)(torch.zeros(2, 4, dtype=dtype))
    assert torch.equal(output, torch.zeros(2, 3, dtype=dtype))


def test_autocast() -> None:
    head, x = ltk.CosineLinear(64, 10), torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        output = head(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), head(x), rtol=0, atol=0.02)
    output.float().sum().backward()
    assert head.weight.grad is not None and head.weight.grad.dtype == torch.float32


def test_the_length_of_neither_vector_matters() -> None:
    head, x = ltk.CosineLinear(16, 7, 30.0), torch.randn(5, 16)
    before = head(x)
    with torch.no_grad():
        head.weight.mul_(1000)
    torch.testing.assert_close(head(x * 1e-3), before, rtol=1e-5, atol=1e-5)
    assert before.abs().max() <= 30 * (1 + 1e-6)


def test_starts_with_random_directions_of_length_1() -> None:
    head = ltk.CosineLinear(256, 1000)
    torch.testing.assert_close(head.weight.detach().norm(dim=1), torch.ones(1000))
    cosines = head.weight.detach() @ head.weight.detach().T
    assert cosines.fill_diagonal_(0).abs().max() < 0.5  # 5 * 10^5 pairs, standard deviation 1/16
    first = head.weight.detach().clone()
    head.reset_parameters()
    assert not torch.equal(head.weight, first)
    assert head.weight.requires_grad


def test_state_dict_is_nn_linears() -> None:
    linear = nn.Linear(16, 7, bias=False)
    head = ltk.CosineLinear(16, 7)
    head.load_state_dict(linear.state_dict())
    assert torch.equal(head.weight, linear.weight)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other(torch.ones(1, 16)), head(torch.ones(1, 16)))


def test_compiles_in_one_graph() -> None:
    head, x = ltk.CosineLinear(16, 7, 30.0), torch.randn(5, 16)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), head(x))


def test_device_and_dtype() -> None:
    assert ltk.CosineLinear(4, 3, device="meta").weight.is_meta
    assert ltk.CosineLinear(4, 3, dtype=torch.float64).weight.dtype == torch.float64
    assert repr(ltk.CosineLinear(4, 3, 30)) == "CosineLinear(in_features=4, out_features=3, scale=30)"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ltk.CosineLinear(0, 3), ValueError, "in_features: expected at least 1, found 0"),
        (lambda: ltk.CosineLinear(4, -1), ValueError, "out_features: expected at least 1, found -1"),
        (lambda: ltk.CosineLinear(4.0, 3), TypeError, "in_features: expected an integer, found 4.0"),
        (lambda: ltk.CosineLinear(4, 3, 0), ValueError, "scale: expected a finite number > 0, found 0.0"),
        (lambda: ltk.CosineLinear(4, 3, "30"), TypeError, "scale: expected a number, found str"),
        (
            lambda: ltk.CosineLinear(4, 3)(torch.zeros(2, 5)),
            ValueError,
            "input: expected shape (..., 4), found (2, 5)",
        ),
        (
            lambda: ltk.CosineLinear(4, 3)(torch.ones(2, 4, dtype=torch.int64)),
            TypeError,
            "input: expected features of a floating type, found torch.int64",
        ),
        (
            lambda: ltk.LearnableWeightScaling(3)(torch.zeros(2, 5)),
            ValueError,
            "logits: expected shape (..., 3), found (2, 5)",
        ),
        (
            lambda: ltk.DisAlignCalibration(4, 3)(torch.zeros(2, 1), torch.zeros(2, 4)),
            ValueError,
            "logits: expected shape (..., 3), found (2, 1)",
        ),
        (lambda: ltk.explain("focal"), TypeError, "fn: expected a function or a loss, found str"),
        (lambda: ltk.CosineLinear(4, 3)(torch.tensor(1.0)), ValueError, "input: expected shape (..., 4), found ()"),
    ],
)
def test_bad_input(call, error, message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
