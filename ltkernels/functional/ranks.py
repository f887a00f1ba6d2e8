"""The processes that share a classifier: who they are, what they agree on, and the rows and gradients they exchange.

Collectives wait for every process. One that raised before its call would leave the others waiting, so each call begins
with a header of numbers that shows whether all may go on (:meth:`Ranks.agree`).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ltkernels.ops.class_parallel import gathered, last_gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Header(NamedTuple):
    """What a process says of its call before any process goes on."""

    refused: int
    """1 where its arguments are wrong."""
    rows: int
    classes: int
    """Of its own."""
    features: int
    arguments: int
    """A digest of what has to be the same everywhere: types, options, shapes of tables."""
    target: int
    """A digest of the labels, where they have to be the same."""


def digest(value: object) -> int:
    """A number that is the same for equal values on all processes."""
    return zlib.crc32(repr(value).encode())


digest._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see _agreed


def digest_of(tensor: Tensor) -> int:
    """The same for the elements of a tensor on the CPU; 0 for others, which only a device can read."""
    if not tensor.is_cpu or torch.compiler.is_compiling():
        return 0
    value = tensor.detach().contiguous()
    array = value.float().numpy() if value.dtype is torch.bfloat16 else value.numpy()  # NumPy has no bfloat16
    return zlib.crc32(array.data)


class Ranks:
    """The processes of a group, in the order of their classes.

    Attributes:
        group: the process group.
        name: what torch.distributed calls it.
        size, rank: how many there are, and which of them this is.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.name = group.group_name
        self.size, self.rank = group.size(), group.rank()

    @classmethod
    def of(cls, group: ProcessGroup | DeviceMesh | None, weight: Tensor) -> Ranks:
        """Those of ``group`` or, where that is None, of a sharded ``weight``.

        Raises:
            RuntimeError: torch.distributed is not there, or not initialised.
            TypeError: ``group`` is no group.
            ValueError: this process is not of the group; a mesh has several dimensions; ``weight`` is sharded in
                another way, or over another group.
        """
        from torch import distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "group: expected torch.distributed to be initialised (init_process_group), found it is not"
            )
        mesh = getattr(weight, "device_mesh", None)
        if mesh is not None:
            placements = tuple(weight.placements)  # type: ignore[attr-defined]
            if mesh.ndim != 1 or not placements[0].is_shard(0):
                raise ValueError(
                    "linear_weight: expected a DTensor that is sharded by dimension 0 over a mesh of 1 dimension, found"
                    f" {placements} over {mesh}"
                )
            if group is None:
                group = mesh
        members = process_group(group)
        if mesh is not None and mesh.get_group() is not members:
            raise ValueError("group: expected None or the group that linear_weight is sharded over, found another")
        return cls(members)

    def agree(self, header: Header, device: torch.device, fixed: bool) -> list[Header]:
        """The headers of all processes, in order, if they may go on.

        On a GPU the answer costs waiting for the device. Where the numbers of rows are ``fixed``, the same on all, it
        is asked for once for each header of this process. A graph keeps the answer that it was made with.

        Raises:
            RuntimeError: a process refused its arguments.
            ValueError: what has to be the same is not.
        """
        if torch.compiler.is_compiling():
            return _agreed(self.name, *header, str(device))
        if device.type == "cpu" or not fixed:
            return _checked(self._all(header, device))
        known = _KNOWN.setdefault(self.group, {})
        if header not in known:
            known[header] = _checked(self._all(header, device))
        return known[header]

    def _all(self, header: Header, device: torch.device) -> list[Header]:
        mine = torch.tensor(header, dtype=torch.int64, device=device)
        return [Header(*values) for values in gathered(mine, self.group).tolist()]

    def gathered(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows ``(n_r, ...)`` of all processes, in order, without gradient."""
        most, mine = max(counts), rows.detach()
        if len(mine) < most:
            mine = torch.cat((mine, mine.new_zeros(most - len(mine), *mine.shape[1:])))
        together = gathered(mine, self.group)
        if min(counts) == most:
            return together.flatten(0, 1)
        return torch.cat([part[:count] for part, count in zip(together, counts, strict=True)])

    def own_sum(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """This process's of the rows of all, summed over the processes; of half types in float32."""
        from torch import distributed as dist

        most, mine = max(counts), counts[self.rank]
        parts = rows.to(torch.promote_types(rows.dtype, torch.float32)).contiguous()
        if min(counts) < most:
            padding = [parts.new_zeros(most - count, *parts.shape[1:]) for count in counts]
            parts = torch.cat([part for pair in zip(parts.split(list(counts)), padding, strict=True) for part in pair])
        own = parts.new_empty(most, *parts.shape[1:])
        # Its name from torch 2.13 on, as of all_gather_single.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(own, parts, group=self.group)
        return own[:mine].to(rows.dtype)

    def summed(self, value: Tensor) -> Tensor:
        """The sum over the processes, the same bits on all; of half types in float32."""
        from torch import distributed as dist

        total = value.to(torch.promote_types(value.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total, group=self.group)
        return total.to(value.dtype)


_KNOWN: WeakKeyDictionary[ProcessGroup, dict[Header, list[Header]]] = WeakKeyDictionary()
"""By group and not by its name, which another group may have after this one was destroyed."""


def process_group(group: object) -> ProcessGroup:
    """A process group, or that of a mesh of one dimension, with this process; torch.distributed is initialised.

    Raises:
        TypeError: it is neither.
        ValueError: this process is not of it; a mesh has several dimensions.
    """
    from torch import distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group: expected a mesh of 1 dimension, found {group.ndim}")
        if group.get_coordinate() is None:
            raise ValueError(f"group: expected a mesh with this process, rank {dist.get_rank()}, found {group}")
        return group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"group: expected a group with this process, rank {dist.get_rank()}, found one without it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a ProcessGroup or a DeviceMesh, found {type(group).__name__}")
    return group


def _checked(headers: list[Header]) -> list[Header]:
    refused = [rank for rank, header in enumerate(headers) if header.refused]
    if refused:
        raise RuntimeError(
            "linear_cross_entropy: expected right arguments on all ranks of the group, found that rank"
            f" {refused[0]} refused its own: see the error there"
        )
    for field, what in (
        ("features", "input: expected the same number of features"),
        ("arguments", "arguments: expected the same types, options and shapes of class tables"),
        ("target", 'target: expected the same labels (batch="gathered" is for a batch of each rank)'),
    ):
        values = [getattr(header, field) for header in headers]
        if len(set(values)) > 1:
            found = f"{values} features" if field == "features" else f"others on rank {_odd(values)}"
            raise ValueError(f"{what} on all ranks of the group, found {found}")
    return headers


def _odd(values: list[int]) -> int:
    """The first rank that differs from most."""
    usual = max(values, key=values.count)
    return next(rank for rank, value in enumerate(values) if value != usual)


def _agreed(name: str, *header_and_device: Any) -> list[Header]:
    """While a graph is made, of which this becomes a constant: all processes make it at the same time."""
    *header, device = header_and_device
    ranks = Ranks(torch._C._distributed_c10d._resolve_process_group(name))  # type: ignore[arg-type]
    return _checked(ranks._all(Header(*header), torch.device(device)))


# What torch.compiler.assume_constant_result does, which imports torch._dynamo for it (tests/test_import.py).
_agreed._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Replicated(torch.autograd.Function):
    """The identity on what all processes have, whose gradient is the sum of what each finds for it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return last_gradient(ctx.ranks.summed, grad), None


class Gathered(torch.autograd.Function):
    """The rows of all processes. The gradient of this one's is that of its own rows, times the number of processes.

    That number because ``DistributedDataParallel`` and FSDP divide by it: their mean of the gradients of all backbones
    is then the gradient of the one loss. It is ``summed`` over the processes where each finds a part of it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, counts: tuple[int, ...], summed: bool) -> Tensor:
        ctx.ranks, ctx.counts, ctx.summed = ranks, counts, summed
        return ranks.gathered(rows, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ranks, counts, summed = ctx.ranks, ctx.counts, ctx.summed

        def own(whole: Tensor) -> Tensor:
            mine = ranks.own_sum(whole, counts) if summed else own_rows(whole, ranks, counts)
            scaled: Tensor = mine * ranks.size
            return scaled

        return last_gradient(own, grad), None, None, None


def own_rows(rows: Tensor, ranks: Ranks, counts: Sequence[int]) -> Tensor:
    """This process's, of those of all."""
    first = sum(counts[: ranks.rank])
    return rows[first : first + counts[ranks.rank]]


class OwnRows(torch.autograd.Function):
    """This process's of the values of all rows, which all have. The gradient is of all rows, on every process."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks, counts: tuple[int, ...]) -> Tensor:
        ctx.ranks, ctx.counts = ranks, counts
        return own_rows(values, ranks, counts).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ranks, counts = ctx.ranks, ctx.counts
        return last_gradient(lambda own: ranks.gathered(own, counts), grad), None, None


class OwnClasses(torch.autograd.Function):
    """This process's part of a class table that all have. The gradient is of the whole table, on every process.

    ``own`` is an index of the table: its classes, or all rows and its classes.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ranks: Ranks, own: Any) -> Tensor:
        ctx.ranks, ctx.own, ctx.shape = ranks, own, table.shape
        return table[own].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ranks, classes, shape = ctx.ranks, ctx.own, ctx.shape

        def summed(own: Tensor) -> Tensor:
            whole = own.new_zeros(shape)
            whole[classes] = own
            total: Tensor = ranks.summed(whole)
            return total

        return last_gradient(summed, grad), None, None


class OfAllRanks(torch.autograd.Function):
    """The sum over the processes of what each knows. What is made of it is the same on all, as its gradient is."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: Ranks) -> Tensor:
        return ranks.summed(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return last_gradient(torch.clone, grad), None
