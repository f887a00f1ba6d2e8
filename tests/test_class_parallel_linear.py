"""ClassParallelLinear: the same as one process's layer, whatever the number of processes.

``class_parallel_linear_worker.py`` has the cases that need several; they are started twice, with many cases in one
start. 3 processes divide 10, 4 and 1 classes into uneven and empty parts; 2 are trained and read what 3 wrote.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import class_parallel_linear_worker as worker
import pytest
import torch
import torch.distributed as dist
from integration_cases import ROOT, torchrun
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import ltkernels as ltk
from ltkernels import losses

D, C = 6, 10
WORKER = ROOT / "tests/class_parallel_linear_worker.py"


@pytest.fixture(scope="module")
def written_by_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Also the cases of the layer, in uneven and empty parts."""
    folder = tmp_path_factory.mktemp("three")
    torchrun(3, WORKER, "layer,save", folder)
    return folder


def test_three_processes_save_and_two_load_and_train(written_by_three: Path) -> None:
    torchrun(2, WORKER, "layer,training,load", written_by_three)


def test_three_processes_save_and_one_loads(written_by_three: Path) -> None:
    """As a program does that never heard of torch.distributed."""
    assert len(list((written_by_three / "checkpoint").glob("*.distcp"))) == 3
    worker.load(written_by_three)


# --- One process without a group ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_alone_it_is_nn_linear(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(3)
    linear, after = nn.Linear(D, C, bias=bias, dtype=dtype), torch.rand(1)
    torch.manual_seed(3)
    head, mine = ltk.ClassParallelLinear(D, C, bias=bias, dtype=dtype), torch.rand(1)
    assert torch.equal(after, mine)
    assert head.mesh is None and head.class_range == (0, C)
    assert head.state_dict().keys() == linear.state_dict().keys()
    assert all(torch.equal(p, q) for p, q in zip(head.parameters(), linear.parameters(), strict=True))
    x = torch.randn(2, 3, D, dtype=dtype)
    assert torch.equal(head(x), linear(x)) and torch.equal(head(x, "gathered"), linear(x))
    values, classes = head.topk(x, 4)
    assert torch.equal(values, linear(x).topk(4).values) and not values.requires_grad
    assert torch.equal(linear(x).gather(-1, classes), values)


def test_alone_and_normalized_it_is_cosine_linear() -> None:
    torch.manual_seed(3)
    cosine = ltk.CosineLinear(D, C)
    torch.manual_seed(3)
    head, x = ltk.ClassParallelLinear(D, C, normalize=True), torch.randn(4, D)
    assert torch.equal(head.weight, cosine.weight)
    torch.testing.assert_close(head(x), cosine(x))
    assert repr(head) == f"ClassParallelLinear(in_features={D}, num_classes={C}, bias=False, normalize=True)"


def test_the_start_does_not_depend_on_how_much_is_drawn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    expected = ltk.ClassParallelLinear(D, C, bias=True)
    monkeypatch.setattr("ltkernels.class_parallel_linear._CHUNK_BYTES", 3 * D * 4)  # 3 classes
    torch.manual_seed(3)
    found = ltk.ClassParallelLinear(D, C, bias=True)
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_loss_for_all_processes_is_one_for_this_before_there_are_others() -> None:
    """dist.group.WORLD is None until then, and a program without torchrun runs the same lines."""
    module = losses.LinearCrossEntropyLoss(D, C, group=dist.group.WORLD, batch="gathered")
    assert type(module.linear) is nn.Linear
    assert "batch='gathered'" in repr(module)
    x, y = torch.randn(4, D), torch.arange(4)
    assert torch.equal(module(x, y), ltk.functional.linear_cross_entropy(x, module.linear.weight, y))


def test_autocast() -> None:
    head, x = ltk.ClassParallelLinear(D, C), torch.randn(4, D)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == head.topk(x, 2)[0].dtype == torch.bfloat16


# --- A group of one ---


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_of_one(group: Any) -> None:
    """Shards of a DTensor, and all of it here: the same values as without."""
    torch.manual_seed(3)
    plain = losses.LinearCrossEntropyLoss(D, 3, criterion=losses.LDAMLoss([9, 3, 1]), normalize=True)
    torch.manual_seed(3)
    head = losses.LinearCrossEntropyLoss(D, 3, criterion=losses.LDAMLoss([9, 3, 1]), normalize=True, group=group)
    x, y = torch.randn(8, D), torch.arange(8) % 3
    found, expected = head(x, y), plain(x, y)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(head.linear.weight.grad.full_tensor(), plain.linear.weight.grad)
    torch.testing.assert_close(head.logits(x), plain.logits(x))
    torch.testing.assert_close(head.linear.topk(x, 2)[0], plain.logits(x).topk(2).values)
    copied = copy.deepcopy(head)
    assert torch.equal(copied(x, y), head(x, y))


def test_another_mesh_has_the_same_parameters(group: Any) -> None:
    """What ``.to("cuda")`` does after moving them: an optimizer made before goes on with them."""
    head = ltk.ClassParallelLinear(D, C, bias=True)
    before, objects = [p.full_tensor().clone() for p in head.parameters()], list(head.parameters())
    optimizer = torch.optim.SGD(head.parameters(), 1.0)
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("classes",))
    assert mesh != head.mesh
    head._set_mesh(mesh)
    assert head.mesh == mesh and all(p is q for p, q in zip(head.parameters(), objects, strict=True))
    head(torch.ones(1, D)).sum().backward()
    optimizer.step()
    for p, q in zip(head.parameters(), before, strict=True):
        torch.testing.assert_close(p.full_tensor(), q - 1)


def test_gathered_needs_no_grad(group: Any) -> None:
    head = ltk.ClassParallelLinear(D, C)
    with pytest.raises(RuntimeError, match='batch: expected "replicated" where gradients are recorded'):
        head(torch.zeros(1, D), "gathered")


ERRORS: list[tuple[type[Exception], str, Any]] = [
    (TypeError, "in_features: expected an integer, found 6.0", lambda: ltk.ClassParallelLinear(6.0, C)),  # type: ignore[arg-type]
    (ValueError, "num_classes: expected at least 1, found 0", lambda: ltk.ClassParallelLinear(D, 0)),
    (TypeError, "normalize: expected a bool, found int", lambda: ltk.ClassParallelLinear(D, C, normalize=1)),  # type: ignore[arg-type]
    (
        ValueError,
        "group: expected None before torch.distributed.init_process_group, found 3",
        lambda: ltk.ClassParallelLinear(D, C, group=3),  # type: ignore[arg-type]
    ),
    (ValueError, r"input: expected shape \(..., 6\), found \(2, 5\)", lambda: head()(torch.zeros(2, 5))),
    (TypeError, "input: expected a torch.Tensor, found list", lambda: head()([1.0])),
    (
        TypeError,
        "input: expected torch.float32 as weight's, found torch.float64",
        lambda: head()(torch.zeros(2, D).double()),
    ),
    (
        ValueError,
        "input: expected device cpu as weight's, found meta",
        lambda: head()(torch.zeros(2, D, device="meta")),
    ),
    (ValueError, "batch: expected 'replicated' or 'gathered'", lambda: head()(torch.zeros(2, D), "all")),
    (ValueError, r"input: expected shape \(..., 6\), found \(\)", lambda: head().topk(torch.tensor(1.0), 1)),
    (ValueError, "k: expected at most 10, the number of classes, found 11", lambda: head().topk(torch.zeros(2, D), 11)),
    (ValueError, "k: expected at least 1, found 0", lambda: head().topk(torch.zeros(2, D), 0)),
    (
        ValueError,
        "batch: expected 'replicated' or 'gathered', found 'all'",
        lambda: losses.LinearCrossEntropyLoss(D, C, batch="all"),
    ),
]


def head() -> ltk.ClassParallelLinear:
    return ltk.ClassParallelLinear(D, C)


@pytest.mark.parametrize(("error", "message", "call"), ERRORS, ids=[e[1][:40] for e in ERRORS])
def test_wrong_arguments(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()
