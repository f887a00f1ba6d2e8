"""One of the processes of test_class_parallel.py: messages, wrong calls, and what else may surround the loss.

``STAGES``, separated by commas; a stage that fails ends all processes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import ltkernels as ltk

linear_cross_entropy = ltk.functional.linear_cross_entropy
N, D, C = 12, 6, 10
BATCHES = ("replicated", "gathered")


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Features, classifier and labels of one process."""
    torch.manual_seed(2)
    return torch.randn(N, D, dtype=dtype), torch.randn(C, D, dtype=dtype), torch.randint(C, (N,))


def part(count: int) -> slice:
    """This process's of ``count``: as equal as can be, so that the parts of 10 are uneven for 3 and 4 processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return slice(count * rank // world, count * (rank + 1) // world)


def same(found: Tensor, expected: Tensor) -> None:
    """Sums in another order, in float64."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


# --- Messages ---


@contextmanager
def messages() -> Iterator[list[tuple[str, int]]]:
    """The collectives of a block, each with the bytes that this process gives."""
    sent: list[tuple[str, int]] = []

    def noted(name: str, real: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            sent.append((name, args[place].numel() * args[place].element_size()))
            return real(*args, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, place in (
            ("all_gather_single", 1), ("all_gather_into_tensor", 1), ("all_reduce", 0), ("all_gather", 1),
            ("broadcast", 0), ("reduce_scatter_single", 1), ("reduce_scatter_tensor", 1), ("all_to_all_single", 1),
        ):  # fmt: skip
            if hasattr(dist, name):
                kind = next((kind for kind in ("all_gather", "reduce_scatter") if kind in name), name)
                patch.setattr(dist, name, noted(kind, getattr(dist, name), place))
        yield sent


def count_messages() -> None:
    """A header, the numbers of each chunk of rows, and one sum of the features' gradient; nothing has the size of C."""
    x, w, y = problem(torch.float32)
    other = torch.randint(C, (N,))
    own, numbers = part(C), (3 + 2, 3 + 2 * 2)  # float32 numbers a row, of one label and of two
    header = ("all_gather", 6 * 8)
    chunked = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=5)
    for target, a_row in ((y, numbers[0]), ((y, other, 0.3), numbers[1])):
        x_, w_ = x.clone().requires_grad_(), w[own].clone().requires_grad_()
        with messages() as sent:
            loss = linear_cross_entropy(x_, w_, target, group=dist.group.WORLD, options=chunked)
        of_chunks = [("all_gather", 4 * a_row * 4)] * 3  # 12 rows in equal chunks of at most 5
        assert sent == [header, *of_chunks], sent
        with messages() as sent:
            loss.backward()
        assert sent == [("all_reduce", N * D * 4)], sent
        with messages() as sent, torch.no_grad():
            linear_cross_entropy(x_, w_, target, group=dist.group.WORLD)
        assert sent == [header, ("all_gather", N * a_row * 4)], sent
    # A frozen backbone asks for no sum; a table that learns for one of its own.
    w_, bias = w[own].clone().requires_grad_(), torch.zeros(C, requires_grad=True)
    with messages() as sent:
        linear_cross_entropy(x, w_, y, group=dist.group.WORLD, class_bias=bias).backward()
    assert sent == [header, ("all_gather", N * numbers[0] * 4), ("all_reduce", C * 4)], sent
    # With reduction="none" the merged numbers are kept: the backward makes the logits again, and asks nobody.
    x_ = x.clone().requires_grad_()
    loss = linear_cross_entropy(x_, w_, y, group=dist.group.WORLD, reduction="none")
    with messages() as sent:
        loss.sum().backward()
    assert sent == [("all_reduce", N * D * 4)], sent
    # Gathered: the rows and labels before, as many for each process as the largest has.
    rows = part(N)
    most = -(-N // dist.get_world_size())
    x_ = x[rows].clone().requires_grad_()
    with messages() as sent:
        loss = linear_cross_entropy(x_, w_, y[rows], group=dist.group.WORLD, batch="gathered")
    own_rows = [("all_gather", most * D * 4), ("all_gather", most * 8)]
    assert sent == [header, *own_rows, ("all_gather", N * numbers[0] * 4)], sent
    with messages() as sent:
        loss.backward()
    assert sent == [("reduce_scatter", most * dist.get_world_size() * D * 4)], sent


# --- Wrong calls ---

# What the last process gives instead; its own error; that of the others, which have right arguments.
Wrong = tuple[dict[str, Any], type[Exception], str]
REFUSED: dict[str, Wrong] = {
    "input": ({"input": torch.zeros(N, D + 1)}, ValueError, r"input: expected shape \(..., 6\)"),
    "dtype": ({"input": torch.zeros(N, D).double()}, TypeError, "linear_weight: expected torch.float64 as input's"),
    "no tensor": ({"input": [1.0]}, TypeError, "input: expected a torch.Tensor, found list"),
    "weight": ({"linear_weight": torch.zeros(3, 2, D)}, ValueError, r"linear_weight: expected shape \(C, D\) with a"),
    "bias": ({"linear_bias": torch.zeros(C + 1)}, ValueError, r"linear_bias: expected shape"),
    "labels": ({"target": torch.zeros(N + 1, dtype=torch.int64)}, ValueError, r"target: expected labels of shape"),
    "probabilities": ({"target": torch.full((N + 1, C), 0.1)}, ValueError, "target: expected probabilities of shape"),
    "batch": ({"batch": "all"}, ValueError, "batch: expected 'replicated' or 'gathered', found 'all'"),
    "normalize": ({"normalize": 1}, TypeError, "normalize: expected a bool"),
    "rows": ({"sample_weight": torch.zeros(N + 1)}, ValueError, r"sample_weight: expected shape"),
    "gates": ({"row_gate": torch.ones(N + 1)}, ValueError, "row_gate: expected shape"),
    "probabilities and gates": (
        {"target": torch.full((N, C), 0.1), "row_gate": torch.ones(N)}, ValueError, "row_gate: expected None with prob"
    ),
    "sparse": ({"sparse_grad": True}, ValueError, "sparse_grad: expected False"),
}  # fmt: skip
# These are right, but not what the others give: all processes say so.
DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "no option": ({"reduction": "most"}, "arguments: expected the same"),
    "no scale": ({"scale": 0.0}, "arguments: expected the same"),
    "no table": ({"class_bias": torch.zeros(C + 1)}, "arguments: expected the same"),
    "no label": ({"target": torch.full((N,), C)}, "target: expected the same labels"),
    "options": ({"scale": 2.0}, "arguments: expected the same types, options and shapes .* others on rank 2"),
    "reduction": ({"reduction": "sum"}, "arguments: expected the same"),
    "table": ({"class_bias": torch.zeros(C)}, "arguments: expected the same"),
    "batch": ({"batch": "gathered"}, "arguments: expected the same"),
    "gates": ({"row_gate": torch.ones(N)}, "arguments: expected the same"),
    "probabilities": ({"target": torch.full((N, C), 0.1)}, "arguments: expected the same"),
    "learnable": ({"weight": torch.ones(C, requires_grad=True)}, "arguments: expected the same"),
    "features that learn": ({"input": torch.ones(N, D, requires_grad=True)}, "arguments: expected the same"),
    "two labels": ({"target": (torch.arange(N) % C, torch.arange(N) % C, 0.5)}, "arguments: expected the same"),
    "bias": ({"linear_bias": "zeros"}, "arguments: expected the same"),
    "labels": ({"target": torch.zeros(N, dtype=torch.int64)}, "target: expected the same labels .* others on rank 2"),
    "rows": (
        {"input": torch.zeros(N - 1, D), "target": torch.arange(N - 1) % C}, "target: expected the same labels"
    ),
    "features": (
        {"input": torch.zeros(N, D + 1), "linear_weight": "wider"}, r"input: .* found \[6, 6, 7\] features"
    ),
}  # fmt: skip


def wrong_calls() -> None:
    """An error on one of three processes is one on all, at once; and the next call works."""
    last = dist.get_rank() == 2
    own = part(C)
    count = own.stop - own.start

    def call(**instead: Any) -> Any:
        given = {"input": torch.ones(N, D), "linear_weight": torch.ones(count, D), "target": torch.arange(N) % C}
        made = {"zeros": torch.zeros(count), "wider": torch.zeros(count, D + 1)}
        given |= {k: made.get(v, v) if isinstance(v, str) else v for k, v in instead.items()}
        return linear_cross_entropy(**given, group=dist.group.WORLD)

    for name, (instead, error, message) in REFUSED.items():
        expected = (
            (error, message) if last else (RuntimeError, "found that rank 2 refused its own: see the error there")
        )
        try:
            with pytest.raises(expected[0], match=expected[1]):
                call(**(instead if last else {}))
        except BaseException as found:
            raise AssertionError(f"{name}, rank {dist.get_rank()}: {found!r}") from found
    for name, (instead, message) in DIFFERENT.items():
        try:
            with pytest.raises(ValueError, match=message):
                call(**(instead if last else {}))
        except BaseException as found:
            raise AssertionError(f"{name}, rank {dist.get_rank()}: {found!r}") from found
    y = torch.arange(N) % C
    for share, message in ((0.5, "arguments"), (torch.full((N,), 0.5), "target")):
        with pytest.raises(ValueError, match=f"{message}: expected the same"):
            call(target=(y, y.flip(0), share + 0.1 * last))
    soft = torch.full((N, C), 0.1)
    for wrong, message in ((soft + 0.1 * last, "target: expected the same"), (soft[:, : C - last], "arguments: ")):
        with pytest.raises(ValueError, match=message):
            call(target=wrong)
    with pytest.raises(ValueError, match="target: expected probabilities of all 10 classes, found 9"):
        call(target=soft[:, 1:])
    for batch in BATCHES:
        with pytest.raises(IndexError, match=r"target: expected labels in \[0, 10\) .* found 10 at row 3"):
            call(target=torch.tensor([0, 1, 2, C]).repeat(3), batch=batch)
    assert call().isfinite()


def wrong_groups() -> None:
    """These are the same on all processes, or of one that nobody waits for."""
    x, y = torch.ones(N, D), torch.arange(N) % C
    w = torch.ones(2, D)
    one = dist.new_group([0])
    if dist.get_rank() > 0:
        with pytest.raises(ValueError, match=r"group: expected a group with this process, rank \d, found one without"):
            linear_cross_entropy(x, w, y % 2, group=one)
    else:
        assert linear_cross_entropy(x, w, y % 2, group=one).isfinite()
    for group in (3, "world", [0, 1]):
        with pytest.raises(TypeError, match="group: expected a ProcessGroup or a DeviceMesh, found"):
            linear_cross_entropy(x, w, y, group=group)
    world = dist.get_world_size()
    with pytest.raises(ValueError, match="group: expected a mesh of 1 dimension, found 2"):
        linear_cross_entropy(x, w, y, group=init_device_mesh("cpu", (1, world)))
    mesh = init_device_mesh("cpu", (world,))
    with pytest.raises(ValueError, match="linear_weight: expected a DTensor that is sharded by dimension 0"):
        linear_cross_entropy(x, DTensor.from_local(torch.ones(C, 2), mesh, [Shard(1)]), y)
    whole = DTensor.from_local(w, mesh, [Shard(0)])
    with pytest.raises(ValueError, match="group: expected None or the group that linear_weight is sharded over"):
        linear_cross_entropy(x, whole, y, group=dist.new_group(list(range(world))))
    assert linear_cross_entropy(x, whole, y % 2, group=mesh).isfinite()


def derivatives() -> None:
    """What has no second derivative says so; a second backward, saved tensors' hooks and no_grad are as always."""
    x, w, y = problem()
    own = part(C)
    for reduction in ("mean", "none"):
        x_, w_ = x.clone().requires_grad_(), w[own].clone().requires_grad_()
        loss = linear_cross_entropy(x_, w_, y, group=dist.group.WORLD, reduction=reduction).sum()
        for variables in ((x_, w_), (x_,), (w_,)):
            with pytest.raises(RuntimeError, match="expected to be differentiated once with a group"):
                found = torch.autograd.grad(loss, variables, create_graph=True)
                torch.autograd.grad(sum(d.square().sum() for d in found), variables)
        first = torch.autograd.grad(loss, (x_, w_), retain_graph=True)
        again = torch.autograd.grad(3 * loss, (x_, w_))
        for a, b in zip(first, again, strict=True):
            same(3 * a, b)
        packed: list[Tensor] = []

        def pack(value: Tensor, packed: list[Tensor] = packed) -> Tensor:
            packed.append(value)
            return value.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            hooked = linear_cross_entropy(x_, w_, y, group=dist.group.WORLD, reduction=reduction).sum()
        for a, b in zip(first, torch.autograd.grad(hooked, (x_, w_)), strict=True):
            same(a, b)
        assert packed
        with torch.no_grad():
            quiet = linear_cross_entropy(x_, w_, y, group=dist.group.WORLD, reduction=reduction).sum()
        same(quiet, loss.detach())
        assert not quiet.requires_grad
    with pytest.raises(RuntimeError, match="expected no transform of torch.func"):
        torch.func.grad(lambda v: linear_cross_entropy(v, w[own], y, group=dist.group.WORLD))(x)


# --- What else may be around it ---


def train(net: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], w: Tensor) -> list[Tensor]:
    net.zero_grad()
    w.grad = None
    loss(net(x)).backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None] + [w.grad]  # type: ignore[list-item]


def ddp() -> None:
    """DDP averages what the processes find for the backbone: with gathered rows that is the one loss's gradient."""
    x, w, y = problem()
    net = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, D)).double()
    expected_w = w.clone().requires_grad_()
    bias = torch.randn(C, dtype=torch.float64)
    expected = train(net, x, lambda f: linear_cross_entropy(f, expected_w, y, class_bias=bias), expected_w)
    rows, own = part(N), part(C)
    mine = w[own].clone().requires_grad_()
    replica = DistributedDataParallel(net)
    found = train(
        replica,
        x[rows],
        lambda f: linear_cross_entropy(f, mine, y[rows], class_bias=bias, group=dist.group.WORLD, batch="gathered"),
        mine,
    )
    for a, b in zip(found, [*expected[:-1], expected[-1][own]], strict=True):
        same(a, b)


def dtensors() -> None:
    """Sharded as torch.chunk cuts: unevenly, with no class on some; gradients are DTensors as the parameters are."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    x, _, _ = problem()
    for classes in (C, world + 1 if world > 2 else 3, 1):
        w, b = torch.randn(classes, D, dtype=torch.float64), torch.randn(classes, dtype=torch.float64)
        y = torch.randint(classes, (N,))

        def sharded(value: Tensor) -> Tensor:
            size = -(-len(value) // world)
            local = value[size * rank : size * (rank + 1)].clone()
            whole = DTensor.from_local(local, mesh, [Shard(0)], shape=value.shape, stride=value.stride())
            return whole.detach().requires_grad_()

        for arguments in ({}, {"reduction": "none", "label_smoothing": 0.1}):
            wd, bd = sharded(w), sharded(b)
            xs = [x.clone().requires_grad_() for _ in range(2)]
            ws, bs = w.clone().requires_grad_(), b.clone().requires_grad_()
            loss = linear_cross_entropy(xs[0], wd, y, linear_bias=bd, **arguments)
            expected = linear_cross_entropy(xs[1], ws, y, linear_bias=bs, **arguments)
            same(loss, expected)
            upstream = torch.rand(loss.shape, dtype=torch.float64) + 0.5
            loss.backward(upstream)
            expected.backward(upstream)
            assert isinstance(wd.grad, DTensor) and wd.grad.placements == (Shard(0),) and wd.grad.shape == w.shape
            same(wd.grad.full_tensor(), ws.grad)
            same(bd.grad.full_tensor(), bs.grad)  # type: ignore[union-attr]
            same(xs[0].grad, xs[1].grad)


def compiled() -> None:
    """One graph, which sends the same messages; a second call goes through the same graph."""
    x, w, y = problem()
    rows, own = part(N), part(C)
    table = torch.rand(C, dtype=torch.float64).requires_grad_()
    gates, soft = torch.rand(N, dtype=torch.float64).requires_grad_(), torch.rand(N, C, dtype=torch.float64).softmax(1)
    for batch, given in (
        ("replicated", {"class_margin": 0.2}),
        ("replicated", {"reduction": "none", "label_smoothing": 0.1}),
        ("gathered", {"focal_gamma": 2.0}),
        ("replicated", {"weight": "learns", "class_margin": "learns", "label_smoothing": 0.1}),
        ("gathered", {"row_gate": "gates", "class_scale": "learns"}),
        ("gathered", {"target": "soft", "weight": "learns"}),
    ):
        mine = rows if batch == "gathered" else slice(0, N)
        known = {"learns": table, "gates": gates[mine], "soft": soft[mine]}
        arguments = {
            name: known.get(value, value) if isinstance(value, str) else value for name, value in given.items()
        }
        target = arguments.pop("target", y[mine])
        tables = [value for value in arguments.values() if isinstance(value, Tensor)]

        def loss(x: Tensor, w: Tensor, y: Tensor, batch: str = batch, arguments: Any = arguments) -> Tensor:
            return linear_cross_entropy(x, w, y, group=dist.group.WORLD, batch=batch, **arguments)

        torch._dynamo.reset()
        fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for step in range(2):
            found, expected = [], []
            for function, results in ((fast, found), (loss, expected)):
                x_, w_ = (x[mine] + step).requires_grad_(), w[own].clone().requires_grad_()
                value = function(x_, w_, target)
                results += [value, *torch.autograd.grad(value.sum(), (x_, w_, *tables))]
            for a, b in zip(found, expected, strict=True):
                same(a, b)


def reference() -> None:
    """The definition, by plain PyTorch and its autograd, says the same as the kernels."""
    x, w, y = problem()
    rows, own = part(N), part(C)
    other, lam = y.flip(0), torch.rand(N, dtype=torch.float64)
    table = torch.rand(C, dtype=torch.float64)
    for batch in BATCHES:
        mine = rows if batch == "gathered" else slice(0, N)
        for target in (y[mine], (y[mine], other[mine], lam[mine])):
            for arguments in (
                {},
                {"label_smoothing": 0.1, "class_margin": table, "weight": table, "scale": 2.0, "z_loss": 0.1},
                {"normalize": True, "margin_type": "arc", "class_margin": 0.2, "scale": 8.0, "reduction": "none"},
            ):
                results = []
                for backend in ("reference", "cpu"):
                    x_, w_ = x[mine].clone().requires_grad_(), w[own].clone().requires_grad_()
                    bias = table.clone().requires_grad_()
                    with ltk.use_backend(backend):
                        loss = linear_cross_entropy(
                            x_, w_, target, group=dist.group.WORLD, batch=batch, class_bias=bias, **arguments
                        )
                        results.append([loss, *torch.autograd.grad(loss.sum(), (x_, w_, bias))])
                for a, b in zip(*results, strict=True):
                    same(a, b)


def dies() -> None:
    """One of three is killed while the others wait for it: they get an error in the group's 5 seconds, or before."""
    group = dist.new_group(timeout=timedelta(seconds=5))
    x, w, y = problem()
    assert linear_cross_entropy(x, w[part(C)], y, group=group).isfinite()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        for _ in range(2):  # the first one's messages may have been on their way
            linear_cross_entropy(x, w[part(C)], y, group=group)
    except RuntimeError as error:
        print(f"rank {dist.get_rank()} saw {type(error).__name__} in {time.monotonic() - start:.0f} s", flush=True)
        os._exit(0)  # without waiting for what torch.distributed still waits for
    raise AssertionError("a process is dead, and nobody noticed")


STAGES: dict[str, Callable[[], None]] = {
    "messages": count_messages,
    "wrong_calls": wrong_calls,
    "wrong_groups": wrong_groups,
    "derivatives": derivatives,
    "ddp": ddp,
    "dtensors": dtensors,
    "compiled": compiled,
    "reference": reference,
    "dies": dies,
}


def main(stages: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for stage in stages.split(","):
        STAGES[stage]()
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
