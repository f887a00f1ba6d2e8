"""linear_cross_entropy with a group: what one process computes, whatever the number of processes.

The workers have the cases that need several processes; each start runs as many of them as there are. 3 processes divide
unevenly, with a part of no classes and one of no rows; 2 are what collectives do between two halves; 4 are more than
some tables are long. Here are the cases that need no other process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from integration_cases import ROOT, WIDTH, torchrun
from torch import Tensor
from torch.library import opcheck

import ltkernels as ltk
from ltkernels.ops import class_parallel as op
from ltkernels.ops.class_shards import HARD, PER_LABEL, SOFT, WEIGHT
from ltkernels.ops.options import ClassParallelOptions, Reduction

VALUES, CALLS = (ROOT / "tests" / f"class_parallel_worker{part}.py" for part in ("", "_calls"))
N, D, C = 7, 4, 5
SOFT_TARGET = torch.full((N, C), 1 / C)
linear_cross_entropy = ltk.functional.linear_cross_entropy


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_values(processes: int) -> None:
    torchrun(processes, VALUES, "values,halves,bits")


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_messages_derivatives_and_surroundings(processes: int) -> None:
    torchrun(processes, CALLS, "messages,wrong_groups,derivatives,ddp,dtensors,reference")


def test_an_error_on_one_process_is_one_on_all() -> None:
    torchrun(3, CALLS, "wrong_calls")


@pytest.mark.parametrize("processes", [1, 2])
def test_compiled(processes: int) -> None:
    torchrun(processes, CALLS, "compiled")


def test_a_process_that_dies_is_an_error_on_the_others() -> None:
    """Killed in the middle; torchrun would end the others itself, so they are started without it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, **WIDTH, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(CALLS), "dies"], env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=90)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[1].returncode == -9
    for place in (0, 2):
        assert ranks[place].returncode == 0, said[place]
        seconds = int(said[place].partition(" in ")[2].partition(" s")[0])
        assert f"rank {place} saw" in said[place] and seconds <= 15, said[place]


@pytest.fixture
def alone() -> Iterator[Any]:
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def arguments(labels: int, group: str, reduction: int, block: int, gate: bool) -> tuple[Any, ...]:
    """Of the op, with all tables; no labels are probabilities."""
    torch.manual_seed(3)
    of = torch.rand(max(1, labels), PER_LABEL, N, dtype=torch.float64)
    of[:, HARD], of[:, SOFT], of[:, WEIGHT] = 0.9, 0.02, 1.0
    places = torch.stack([torch.arange(N) % C, (torch.arange(N) + 2) % C])[:labels]
    shapes = {
        "input": (N, D), "linear_weight": (C, D), "linear_bias": (C,), "class_scale": (C,), "class_bias": (C,),
        "margins": (labels, N),
    }  # fmt: skip
    made = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    made |= {"smooth": torch.ones(C, dtype=torch.float64), "feature_norm": torch.rand(N, dtype=torch.float64)}
    made |= {"of_labels": of, "smooth_total": made["smooth"].sum()}
    if soft := labels == 0:
        made["probabilities"] = torch.rand(N, C, dtype=torch.float64)
        made["class_weight"] = torch.rand(C, dtype=torch.float64)
        del made["feature_norm"]
    if gate:
        made["row_gate"] = torch.rand(N, dtype=torch.float64)
    learnable = [made[name].requires_grad_() if name in made else None for name in op.VARIABLES]
    options = ClassParallelOptions(
        reduction=reduction, scale=1.5, focal_gamma=1.5, z_loss=0.1, smoothing=True, soft_target=soft, chunk_rows=3,
        class_block=block, group=group,
    )  # fmt: skip
    return (*learnable, places, *options)


@pytest.mark.parametrize(
    ("labels", "block", "gate"),
    [(1, 0, False), (2, 0, False), (1, 2, False), (2, 2, False), (1, 0, True), (0, 0, False)],
)
@pytest.mark.parametrize("reduction", [Reduction.SUM, Reduction.NONE])
def test_opcheck(labels: int, reduction: int, block: int, gate: bool, alone: Any) -> None:
    made = arguments(labels, alone.group_name, reduction, block, gate)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(op.OP.forward, made, test_utils=(*tests, "test_aot_dispatch_dynamic"))
    loss, state = op.OP.forward(*made)
    need = [value is not None for value in made[: len(op.VARIABLES)]]
    detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in made]
    opcheck(
        op.OP.backward,
        (torch.ones_like(loss), state.detach(), *detached, *need),
        test_utils=tests,
    )


def test_a_graph_for_other_numbers_of_rows(alone: Any) -> None:
    """The second size makes torch.compile try a graph of any size, of which the header is no constant."""
    torch._dynamo.reset()
    w = torch.randn(C, D, dtype=torch.float64)

    def loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, y, group=alone, label_smoothing=0.1)

    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in (7, 12, 9):
        x, y = torch.randn(rows, D, dtype=torch.float64), torch.randint(C, (rows,))
        results = []
        for function in (fast, loss):
            x_, w_ = x.clone().requires_grad_(), w.clone().requires_grad_()
            value = function(x_, w_, y)
            results.append((value, *torch.autograd.grad(value, (x_, w_))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch._dynamo.reset()


def test_before_torch_distributed() -> None:
    x, w, y = torch.randn(N, D), torch.randn(C, D), torch.zeros(N, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="group: expected torch.distributed to be initialised"):
        linear_cross_entropy(x, w, y, group="world")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='batch: expected "replicated" without a group, found'):
        linear_cross_entropy(x, w, y, batch="gathered")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"target": SOFT_TARGET[:, 1:]}, "target: expected probabilities of all 5 classes, found 4"),
        ({"target": SOFT_TARGET[1:]}, r"target: expected probabilities of shape \(7, 'C'\) or labels"),
        ({"target": SOFT_TARGET, "ignore_index": 3}, "ignore_index: expected None with probability targets, found 3"),
        ({"target": SOFT_TARGET, "row_gate": torch.ones(N)}, "row_gate: expected None with probability targets"),
        ({"target": SOFT_TARGET, "class_margin": 0.1}, "class_margin: expected None with probability targets"),
        ({"target": SOFT_TARGET, "smoothing_mode": "off_target"}, "label_smoothing: expected one number, of all"),
        ({"row_gate": torch.ones(N - 1)}, "row_gate: expected shape"),
        ({"linear_weight": torch.ones(C, 2, D), "target": torch.zeros(N, 2).long()}, "linear_weight: expected shape"),
        ({"linear_bias": torch.ones(C + 1)}, "linear_bias: expected shape"),
        ({"batch": "all"}, "batch: expected"),
        ({"class_bias": torch.ones(C - 1)}, "class_bias: expected shape"),
        ({"sparse_grad": True}, "sparse_grad: expected False"),
    ],
)
def test_what_a_group_does_not_take(more: dict[str, Any], message: str, alone: Any) -> None:
    given = {"input": torch.ones(N, D), "linear_weight": torch.ones(C, D), "target": torch.zeros(N).long(), **more}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**given, group=alone)
