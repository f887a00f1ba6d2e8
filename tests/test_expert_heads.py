"""ExpertHeads: what it starts with, what it gives in training and after, its state, torch.compile, AMP, export."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ltkernels as ltk

ExpertHeads = ltk.experts.ExpertHeads
each_sharing = pytest.mark.parametrize("shape", [(9, 16), (3, 9, 16)], ids=["shared", "own"])


def linear_layers(heads: Any, features: Tensor) -> Tensor:
    """The logits of a layer for each expert with the same parameters."""
    outputs = []
    for e in range(heads.num_experts):
        layer = torch.nn.Linear(heads.in_features, heads.num_classes, bias=heads.bias is not None)
        layer.weight.data = heads.weight.data[e]
        if heads.bias is not None:
            layer.bias.data = heads.bias.data[e]
        outputs.append(layer(features if features.dim() == 2 else features[e]))
    return torch.stack(outputs)


@each_sharing
@pytest.mark.parametrize("bias", [True, False])
def test_is_a_linear_layer_for_each_expert(shape: tuple[int, ...], bias: bool) -> None:
    heads, features = ExpertHeads(3, 16, 10, bias=bias), torch.randn(shape)
    layers = linear_layers(heads, features)
    torch.testing.assert_close(heads(features), layers)
    heads.eval()
    torch.testing.assert_close(heads(features), layers.mean(0))
    heads.mode, heads.expert_weight = "probs", torch.tensor([1.0, 0.0, 3.0])
    torch.testing.assert_close(heads(features), layers.softmax(2)[0] / 4 + layers.softmax(2)[2] * 3 / 4)


@each_sharing
def test_normalized_heads_are_cosine_layers(shape: tuple[int, ...]) -> None:
    heads, features = ExpertHeads(3, 16, 10, bias=False, normalize=True, scale=30.0), torch.randn(shape)
    torch.testing.assert_close(heads.weight.norm(dim=2), torch.ones(3, 10))
    with torch.no_grad():
        heads.weight.mul_(2.0)  # lengths do not matter
    for e, logits in enumerate(heads(features)):
        layer = ltk.CosineLinear(16, 10, scale=30.0)
        layer.weight.data = heads.weight.data[e]
        torch.testing.assert_close(logits, layer(features if features.dim() == 2 else features[e]))


def test_starts_as_linear_does() -> None:
    """Uniform in +-1/sqrt(D), whatever E and C: spread bound/sqrt(3), the largest close to the bound."""
    heads = ExpertHeads(3, 64, 250)
    bound = 1 / math.sqrt(64)
    for value in (heads.weight, heads.bias):
        assert 0.98 * bound < float(value.detach().abs().max()) <= bound
        assert float(value.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not torch.equal(heads.weight[0], heads.weight[1])


def test_state_dict_and_moves() -> None:
    heads = ExpertHeads(2, 4, 5, dtype=torch.float64)
    heads.expert_weight = torch.tensor([1.0, 2.0])
    assert set(heads.state_dict()) == {"weight", "bias"}
    assert set(ExpertHeads(2, 4, 5, bias=False).state_dict()) == {"weight"}
    other = ExpertHeads(2, 4, 5, dtype=torch.float64)
    other.load_state_dict(heads.state_dict())
    features = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(other(features), heads(features))
    assert heads.to("meta").expert_weight.device.type == "meta"
    assert ExpertHeads(2, 4, 5, device="meta").weight.is_meta


def test_trains_all_experts() -> None:
    torch.manual_seed(0)
    heads = ExpertHeads(3, 16, 10)
    features, labels = torch.randn(64, 16), torch.randint(10, (64,))
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0)
    losses = []
    for _ in range(20):
        loss = ltk.functional.expert_cross_entropy(heads(features), labels)
        optimizer.zero_grad()
        loss.backward()
        assert bool((heads.weight.grad.abs().amax(dim=(1, 2)) > 0).all())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("mode", ["logits", "probs"])
@each_sharing
def test_compiles_to_one_graph(shape: tuple[int, ...], mode: str) -> None:
    torch._dynamo.reset()
    heads, features = ExpertHeads(3, 16, 10, normalize=True, scale=4.0, mode=mode), torch.randn(shape)
    compiled = torch.compile(heads, fullgraph=True, backend="aot_eager", dynamic=True)
    for training in (True, False):
        heads.train(training)
        for x in (features, torch.cat([features, features], dim=-2)):
            torch.testing.assert_close(compiled(x), heads(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["logits", "probs", "log_probs"])
@pytest.mark.parametrize("by_class", [False, True])
@each_sharing
def test_exports_for_any_number_of_samples(shape: tuple[int, ...], by_class: bool, mode: str) -> None:
    heads = ExpertHeads(3, 16, 10, mode=mode).eval()
    heads.expert_weight = torch.rand(3, 10) if by_class else None
    dynamic = ({len(shape) - 2: torch.export.Dim("samples")},)
    program = torch.export.export(heads, (torch.randn(shape),), dynamic_shapes=dynamic)
    features = torch.randn(*shape[:-2], 21, 16)
    torch.testing.assert_close(program.module()(features), heads(features))
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("ltkernels" in op for op in ops) == (mode != "logits")  # a mean of logits runs without ltkernels


def test_half_precision() -> None:
    heads, features = ExpertHeads(3, 16, 10), torch.randn(9, 16)
    logits = linear_layers(heads, features)
    with torch.autocast("cpu", torch.bfloat16):
        assert heads(features).dtype == torch.bfloat16
        torch.testing.assert_close(heads(features).float(), logits, rtol=0.02, atol=0.02)
        heads.eval()
        torch.testing.assert_close(heads(features).float(), logits.mean(0), rtol=0.02, atol=0.02)
    torch.testing.assert_close(heads.bfloat16()(features.bfloat16()).float(), logits.mean(0), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "num_experts: expected at least 1, found 0", {"num_experts": 0}),
        (TypeError, "in_features: expected an integer, found 4.0", {"in_features": 4.0}),
        (ValueError, "num_classes: expected at least 1, found -1", {"num_classes": -1}),
        (ValueError, "scale: expected a finite number > 0", {"scale": -1.0}),
        (ValueError, "mode: expected 'logits' or 'probs' or 'log_probs', found 'experts'", {"mode": "experts"}),
    ],
)
def test_wrong_construction(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        ExpertHeads(**({"num_experts": 2, "in_features": 4, "num_classes": 5} | options))


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"input: expected shape \(2, N, 4\), or \(N, 4\) .* found \(3, 5\)"):
        ExpertHeads(2, 4, 5)(torch.zeros(3, 5))
