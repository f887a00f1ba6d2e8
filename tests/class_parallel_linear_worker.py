"""One of the processes of test_class_parallel_linear.py: ``STAGES FOLDER``; a stage that fails ends all of them."""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loss_cases import EVERY
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import ltkernels as ltk

D = 6
SIZES = (10, 4, 1)  # over 3 processes: 4 + 4 + 2; 2 + 2 + none; 1 + none + none
COUNTS = [90, 60, 40, 20, 9, 5, 1]
Loss = ltk.losses.LinearCrossEntropyLoss


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def same(found: Any, expected: Any) -> None:
    """Sums over classes and rows in another order, in float64."""
    torch.testing.assert_close(whole(found), whole(expected), rtol=1e-10, atol=1e-13)


def twin(head: ltk.ClassParallelLinear) -> nn.Module:
    """One process's layer with the same numbers."""
    kind = ltk.CosineLinear if head.normalize else nn.Linear
    layer = kind(D, head.num_classes, dtype=head.weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(whole(head.weight))
        if head.bias is not None and isinstance(layer, nn.Linear):
            layer.bias.copy_(whole(head.bias))
    return layer


# --- The layer ---


def starts() -> None:
    """The numbers of rank 0's generator, whatever the others' seeds and the number of processes are."""
    for classes in SIZES:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            torch.manual_seed(5)
            linear = nn.Linear(D, classes, dtype=dtype)
            after = torch.get_rng_state()
            torch.manual_seed(5)
            cosine = ltk.CosineLinear(D, classes, dtype=dtype)
            torch.manual_seed(5)
            head = ltk.ClassParallelLinear(D, classes, bias=True, dtype=dtype)
            assert torch.equal(after, torch.get_rng_state())
            assert torch.equal(whole(head.weight), linear.weight) and torch.equal(whole(head.bias), linear.bias)
            torch.manual_seed(5 + dist.get_rank())
            mine = torch.get_rng_state()
            head = ltk.ClassParallelLinear(D, classes, normalize=True, dtype=dtype)
            assert torch.equal(whole(head.weight), cosine.weight)
            assert dist.get_rank() == 0 or torch.equal(mine, torch.get_rng_state())
            ranges: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(ranges, (head.class_range, len(head.weight.to_local())))
            assert ranges[0][0][0] == 0 and ranges[-1][0][1] == classes
            assert all(before[0][1] == after[0][0] for before, after in zip(ranges, ranges[1:], strict=False))
            assert all(last - first == rows for (first, last), rows in ranges)


def logits_and_topk() -> None:
    torch.manual_seed(1)
    for classes in SIZES:
        for normalize in (False, True):
            head = ltk.ClassParallelLinear(D, classes, bias=not normalize, normalize=normalize, dtype=torch.float64)
            layer = twin(head)
            x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
            found, expected = head(x), layer(x)
            same(found, expected)
            upstream = torch.randn(2, 5, classes, dtype=torch.float64)
            for mine, other in zip(
                torch.autograd.grad(found, (x, *head.parameters()), upstream),
                torch.autograd.grad(expected, (x, *layer.parameters()), upstream),
                strict=True,
            ):
                same(mine, other)
            for k in {1, min(3, classes), classes}:  # more than some processes have
                values, indices = head.topk(x, k)
                top = expected.topk(k)
                same(values, top.values)
                assert torch.equal(indices, top.indices)
            own = torch.randn(6, D, dtype=torch.float64)[: 3 * dist.get_rank()]  # none on the first
            with torch.no_grad():
                same(head(own, "gathered"), layer(own))
            values, indices = head.topk(own, 1, "gathered")
            assert torch.equal(indices, layer(own).topk(1).indices)
    half = ltk.ClassParallelLinear(D, 10, dtype=torch.bfloat16)
    values, indices = half.topk(torch.randn(4, D).bfloat16(), 5)
    assert values.dtype == torch.bfloat16 and indices.dtype == torch.int64


def topk_in_chunks() -> None:
    """Chunks of 3 rows give what one chunk gives; there is one message beside the header."""
    head, x = ltk.ClassParallelLinear(D, 10), torch.randn(8, D, generator=torch.Generator().manual_seed(0))
    expected = head.topk(x, 3)
    from ltkernels import class_parallel_linear as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", 3 * 4 * 4)
        calls = []
        for name in ("all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "broadcast"):
            if real := getattr(dist, name, None):
                patch.setattr(dist, name, lambda *args, real=real, **kw: (calls.append(args), real(*args, **kw)))
        found = head.topk(x, 3)
    assert torch.equal(found[1], expected[1]) and len(calls) == 2
    torch.testing.assert_close(found[0], expected[0])


def state_dicts() -> None:
    torch.manual_seed(3)
    linear = nn.Linear(D, 10)
    head = ltk.ClassParallelLinear(D, 10, bias=True)
    for assign in (False, True):
        head.reset_parameters()
        head.load_state_dict(linear.state_dict(), assign=assign)
        assert isinstance(head.weight, nn.Parameter) and isinstance(head.weight, DTensor)
        assert torch.equal(whole(head.weight), linear.weight) and torch.equal(whole(head.bias), linear.bias)
    other = ltk.ClassParallelLinear(D, 10, bias=True)
    other.load_state_dict(head.state_dict())
    assert torch.equal(whole(other.weight), linear.weight)
    nn.Linear(D, 10).load_state_dict({name: whole(value) for name, value in head.state_dict().items()})
    copied = copy.deepcopy(head)
    assert torch.equal(whole(copied.weight), linear.weight) and copied.mesh == head.mesh
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        head.load_state_dict(nn.Linear(D, 9).state_dict())
    with pytest.raises(RuntimeError, match='Missing key.*"bias"'):
        head.load_state_dict(nn.Linear(D, 10, bias=False).state_dict())
    with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
        nn.Linear(D, 10).load_state_dict(head.state_dict())
    alone = dist.new_group([0])
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match=r"weight: expected one sharded over .* or a whole tensor"):
            ltk.ClassParallelLinear(D, 10, bias=True, group=alone).load_state_dict(head.state_dict())
    torch.manual_seed(4)  # rank 0 has drawn more
    module, plain = Loss(D, 7, group=dist.group.WORLD), Loss(D, 7)
    module.load_state_dict(plain.state_dict())
    assert torch.equal(whole(module.linear.weight), plain.linear.weight)
    plain.load_state_dict({name: whole(value) for name, value in module.state_dict().items()})


def groups_and_devices() -> None:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    assert ltk.ClassParallelLinear(D, 10, group=mesh).mesh == mesh
    assert ltk.ClassParallelLinear(D, 10, group=dist.group.WORLD).mesh == mesh
    head = ltk.ClassParallelLinear(D, 10, device="meta")
    assert head.weight.is_meta and isinstance(head.weight, DTensor)
    torch.manual_seed(4)
    head.to_empty(device="cpu").reset_parameters()
    torch.manual_seed(4)
    assert torch.equal(whole(head.weight), nn.Linear(D, 10, bias=False).weight)
    assert head.bfloat16().weight.dtype == torch.bfloat16
    assert f"of {world} ranks" in repr(head)
    with pytest.raises(TypeError, match="group: expected a ProcessGroup or a DeviceMesh, found int"):
        ltk.ClassParallelLinear(D, 10, group=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device: expected cpu as the mesh's, found cuda"):
        ltk.ClassParallelLinear(D, 10, group=mesh, device="cuda")
    with pytest.raises(ValueError, match="group: expected a mesh of 1 dimension, found 2"):
        ltk.ClassParallelLinear(D, 10, group=init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b")))
    with pytest.raises(RuntimeError, match='batch: expected "replicated" where gradients are recorded'):
        ltk.ClassParallelLinear(D, 10)(torch.zeros(1, D), "gathered")
    with pytest.raises(ValueError, match=r"out_features: expected \(\) with group"):
        Loss(D, 10, out_features=(2,), group=mesh)
    with pytest.raises(ValueError, match="batch: expected 'replicated' or 'gathered', found 'sharded'"):
        Loss(D, 10, group=mesh, batch="sharded")
    first = dist.new_group([0])
    if dist.get_rank() > 0:
        with pytest.raises(ValueError, match=f"group: expected a group with this process, rank {dist.get_rank()}"):
            ltk.ClassParallelLinear(D, 10, group=first)


def wrong_on_one_process() -> None:
    """An error on all, and none is left waiting: the next call is right again."""
    head, rank = ltk.ClassParallelLinear(D, 10), dist.get_rank()
    x = torch.zeros(3, D)
    with pytest.raises(ValueError, match=r"input: expected the same rows on all ranks .* found \[3, 1"):
        head.topk(x if rank == 0 else x[:1], 2)
    with pytest.raises(ValueError, match=r"k: expected the same on all ranks of the group, found \[1, 2"):
        head.topk(x, min(2, rank + 1))
    with pytest.raises(
        ValueError, match=r"batch: expected the same on all ranks of the group, found \['gathered', 'rep"
    ):
        head.topk(x, 1, "gathered" if rank == 0 else "replicated")
    error, message = (
        (ValueError, "k: expected at most 10") if rank == 0 else (RuntimeError, "found that rank 0 refused")
    )
    with pytest.raises(error, match=message):
        head.topk(x, 11 if rank == 0 else 1)
    error, message = (ValueError, "input: expected shape") if rank == 1 else (RuntimeError, "found that rank 1 refused")
    with pytest.raises(error, match=message):
        head(x[:, : 1 + (rank != 1) * D])
    assert head.topk(x, 2)[1].shape == (3, 2)


# --- Training ---


def parts(group: Any, **options: Any) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(5, D), nn.Tanh()).double()
    return backbone, Loss(D, len(COUNTS), group=group, batch="gathered", dtype=torch.float64, **options)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(13, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(13) % 7


def mine(values: Tensor) -> Tensor:
    """Rows of this process: of two processes 7 and 6."""
    return values[dist.get_rank() :: dist.get_world_size()]


def shared(backbone: nn.Module, kind: str) -> nn.Module:
    if kind == "fsdp":
        fully_shard(backbone, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        return backbone
    return DistributedDataParallel(backbone)


def criteria() -> Iterator[dict[str, Any]]:
    yield {"bias": True}
    for name in ("LogitAdjustedLoss", "VSLoss", "LDAMLoss(reweight_epoch=0)", "ClassBalancedLoss(gamma=1)"):
        yield {"criterion": EVERY[name](COUNTS), "normalize": name.startswith("LDAM")}
    for name in ("CosFaceLoss", "ArcFaceLoss", "ArcFaceLoss(by class)"):
        yield {"criterion": EVERY[name](COUNTS), "normalize": True}


def gradients_are_those_of_one_process() -> None:
    """DDP and FSDP average the backbone's gradient over processes; the head's is whole."""
    x, y = data()
    for kind in ("ddp", "fsdp"):
        for options in criteria():
            backbone, head = parts(dist.group.WORLD, **options)
            expected_backbone, expected_head = parts(None, **options)
            replica = shared(backbone, kind)  # whose hooks live as long as it
            loss, expected = head(replica(mine(x)), mine(y)), expected_head(expected_backbone(x), y)
            same(loss, expected)
            loss.backward()
            expected.backward()
            for found, other in ((backbone, expected_backbone), (head, expected_head)):
                for p, q in zip(found.parameters(), other.parameters(), strict=True):
                    assert whole(q.grad).abs().sum() > 0
                    same(p.grad, q.grad)
            with torch.no_grad():
                same(head.logits(backbone(mine(x))), mine(expected_head.logits(expected_backbone(x))))


def clipped(modules: tuple[nn.Module, ...], max_norm: float) -> Tensor:
    """As docs/distributed.md has it."""
    norms = [torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]) for module in modules]
    total = torch.stack([whole(norm) for norm in norms]).norm()
    for module in modules:
        torch.nn.utils.clip_grads_with_norm_(module.parameters(), max_norm, total)
    return total


def steps_are_those_of_one_process() -> None:
    """Gradients of two micro-batches, the first without DDP's message, clipped as one vector; then Adam."""
    x, y = data()
    for kind in ("ddp", "fsdp"):
        backbone, head = parts(dist.group.WORLD, bias=True)
        replica = shared(backbone, kind)
        expected_backbone, expected_head = parts(None, bias=True)
        groups = [{"params": list(backbone.parameters())}, {"params": list(head.parameters())}]
        optimizer = torch.optim.AdamW(groups, 0.1, foreach=True)
        expected_optimizer = torch.optim.AdamW([*expected_backbone.parameters(), *expected_head.parameters()], 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            expected_optimizer.zero_grad()
            for rows in (slice(0, 6), slice(6, 13)):
                last = rows.start > 0
                if isinstance(replica, DistributedDataParallel):
                    apart: Any = contextlib.nullcontext() if last else replica.no_sync()
                else:
                    replica.set_requires_gradient_sync(last)  # type: ignore[operator]
                    apart = contextlib.nullcontext()
                with apart:
                    (head(replica(mine(x[rows])), mine(y[rows])) / 2).backward()
                (expected_head(expected_backbone(x[rows]), y[rows]) / 2).backward()
            total = clipped((backbone, head), 0.1)
            every = [*expected_backbone.parameters(), *expected_head.parameters()]
            same(total, torch.nn.utils.clip_grad_norm_(every, 0.1))
            assert total > 0.1
            optimizer.step()
            expected_optimizer.step()
        for found, other in ((backbone, expected_backbone), (head, expected_head)):
            for p, q in zip(found.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(whole(p), q, rtol=1e-8, atol=1e-10)  # Adam divides by small numbers


class Both(nn.Module):
    """Backbone and head in one module, as a user may wrap them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(5, D), Loss(D, 8, group=dist.group.WORLD, batch="gathered")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.head(self.backbone(x), y)
        return loss


def a_head_inside_of_ddp_or_fsdp_is_an_error() -> None:
    """Its gradients would be averaged; 8 classes, since of an uneven number DDP can not even make a vector."""
    x, y = data()
    for wrap, error, message in (
        (DistributedDataParallel, RuntimeError, "mixed torch.Tensor and DTensor"),
        (fully_shard, TypeError, ""),
    ):
        with pytest.raises(error, match=message):
            wrap(Both())(mine(x).float(), mine(y)).backward()


def mixed_precision() -> None:
    """A GradScaler with an optimizer for each of the two; an overflow on one process skips the step of all."""
    x, y = data()
    x = x.float()
    torch.manual_seed(0)
    backbone, head = nn.Sequential(nn.Linear(5, D), nn.Tanh()), Loss(D, 7, group=dist.group.WORLD, batch="gathered")
    replica = DistributedDataParallel(backbone)
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in (backbone, head)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = head(replica(mine(x)), mine(y))
        exact = F.cross_entropy(F.linear(backbone(x), whole(head.linear.weight)), y)
        torch.testing.assert_close(loss, exact, rtol=5e-3, atol=0)  # float16 has 2^-11, logits are below 1
        before = whole(head.linear.weight).clone()
        scaler.scale(loss).backward()
        if step == 1 and dist.get_rank() == 1:
            head.linear.weight.grad.to_local()[0, 0] = torch.inf
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, whole(head.linear.weight)) == (step == 1)
        assert scaler.get_scale() == (1024.0, 512.0)[step]


# --- Checkpoints ---


def trained(group: Any, steps: int, folder: Path | None = None) -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    """Trained for some steps of replicated rows, from a checkpoint if there is one."""
    torch.manual_seed(0)
    head = Loss(D, 10, bias=True, group=group, dtype=torch.float64)
    model = nn.ModuleDict({"backbone": nn.Linear(5, D, dtype=torch.float64), "head": head})
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    if folder is not None:
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()  # all that it has comes from the checkpoint
        parameters, state = get_state_dict(model, optimizer)
        content = {"model": parameters, "optimizer": state}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # so it is meant to be
            state_dict_loader.load(content, checkpoint_id=folder, no_dist=not dist.is_initialized())
        set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        head(model["backbone"](x), y).backward()
        optimizer.step()
    return model, optimizer


def save(folder: Path) -> None:
    model, optimizer = trained(dist.group.WORLD, 3)
    parameters, state = get_state_dict(model, optimizer)
    state_dict_saver.save({"model": parameters, "optimizer": state}, checkpoint_id=folder / "checkpoint")


def load(folder: Path) -> None:
    """The rest of the run, with Adam's state, is what one process would have done from the first step on."""
    group = dist.group.WORLD if dist.is_initialized() else None
    model, optimizer = trained(group, 3, folder / "checkpoint")
    expected, expected_optimizer = trained(None, 6)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q, rtol=1e-8, atol=1e-10)
        for name, value in optimizer.state[p].items():
            torch.testing.assert_close(
                whole(value),
                expected_optimizer.state[q][name],
                rtol=1e-7,
                atol=1e-12,
                msg=lambda m, n=name: f"{n}: {m}",
            )


LAYER = (starts, logits_and_topk, topk_in_chunks, state_dicts, groups_and_devices, wrong_on_one_process)
TRAINING = (
    gradients_are_those_of_one_process,
    steps_are_those_of_one_process,
    mixed_precision,
    a_head_inside_of_ddp_or_fsdp_is_an_error,
)


def main(stages: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for stage in stages.split(","):
        if stage in ("save", "load"):
            {"save": save, "load": load}[stage](folder)
        for case in {"layer": LAYER, "training": TRAINING}.get(stage, ()):
            case()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
