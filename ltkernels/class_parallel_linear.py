"""A classifier whose classes are divided among the processes of a group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from ltkernels import arguments as arg
from ltkernels.functional.ranks import Ranks, process_group
from ltkernels.functional.unit import unit
from ltkernels.ops.class_parallel import gathered

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ClassParallelLinear"]

_CHUNK_BYTES = 2**25  # of logits that topk has at a time, and of the start that is drawn at a time
BATCHES = ("replicated", "gathered")


class ClassParallelLinear(nn.Module):
    """``nn.Linear`` for more classes than one device holds: each process of a group has the class vectors of some.

    ``weight`` and ``bias`` are parameters that are a :class:`torch.distributed.tensor.DTensor`, sharded by classes
    over the group: rank r of W has the classes ``[r s, (r + 1) s)`` with ``s = ceil(C / W)``, as ``torch.chunk`` cuts;
    the last ranks may have fewer, or none. Optimizers, :mod:`torch.distributed.checkpoint` (save with W processes,
    load with any other number) and ``state_dict`` understand that. Train it with
    :func:`ltkernels.functional.linear_cross_entropy`, or let :class:`ltkernels.losses.LinearCrossEntropyLoss` with
    ``group=`` make and own it; then no process ever has the logits of all classes.

    * Its gradients are those of the whole batch already. So wrap the backbone with ``DistributedDataParallel`` or
      ``fully_shard``, and leave this layer outside. ``docs/distributed.md`` has a whole program.
    * **Start**: the numbers that ``nn.Linear`` (with ``normalize`` :class:`ltkernels.CosineLinear`) draws on a CPU
      from rank 0's generator, bit for bit, however many processes there are. Every process draws all ``C D`` numbers,
      a block at a time, and keeps its own: about ten seconds for 10^9 of them. ``device="meta"`` draws nothing, for
      a layer that is loaded next.
    * Without ``torch.distributed``, or before it is initialised, there is one process with all classes, and the
      parameters are plain.

    Args:
        in_features: D, size of a feature vector.
        num_classes: C, of all processes together.
        bias: whether each class has one, too.
        group: the processes, each of which makes the layer: a process group, a ``DeviceMesh`` of one dimension,
            or None for the default group.
        normalize: whether logits are the cosines of features and class vectors (plus the bias).
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: ``(C, D)``.
        bias: ``(C,)`` or None.

    Shape:
        input ``(..., D)``, output ``(..., C)``.

    Raises:
        TypeError: sizes are not integers, ``group`` is no group, ``normalize`` no bool; an input of another type
            than ``weight`` without autocast.
        RuntimeError: another process was given wrong arguments.
        ValueError: sizes below 1, a mesh of several dimensions or of another device, this process is not of the group;
            an input whose last dimension is not D, or on another device.

    Example:
        >>> import torch, ltkernels as ltk
        >>> head = ltk.ClassParallelLinear(16, 1000)  # in a program that torchrun starts: a part on each process
        >>> features, labels = torch.randn(8, 16), torch.arange(8)
        >>> ltk.functional.linear_cross_entropy(features, head.weight, labels).backward()
        >>> values, classes = head.topk(features, 5)
        >>> head.class_range, classes.shape
        ((0, 1000), torch.Size([8, 5]))

    Source:
        Classes over ranks: Deng et al., "ArcFace", CVPR 2019, section 3.2; An et al., "Partial FC", ICCVW 2021.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        group: ProcessGroup | DeviceMesh | None = None,
        normalize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = arg.size("in_features", in_features)
        self.num_classes = arg.size("num_classes", num_classes)
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize: expected a bool, found {type(normalize).__name__}")
        self.normalize = normalize
        mesh = _mesh(group, device)
        if mesh is not None and device is None and mesh.device_type != torch.get_default_device().type:
            device = mesh.device_type  # the caller's mesh says where
        first, last = _class_range(self.num_classes, mesh)
        weight = torch.empty(last - first, self.in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(_sharded(weight, self.num_classes, mesh))
        if bias:
            self.bias = nn.Parameter(_sharded(weight.new_empty(last - first), self.num_classes, mesh))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @property
    def mesh(self) -> DeviceMesh | None:
        """The processes, in the order of their classes; None where the parameters are plain."""
        return _mesh_of(self.weight)

    @property
    def class_range(self) -> tuple[int, int]:
        """First class of this process, and the one after its last."""
        return _class_range(self.num_classes, self.mesh)

    def reset_parameters(self) -> None:
        """Draws a new start; on all processes together."""
        if self.weight.is_meta:
            return
        generator, mine = None, torch.get_rng_state()
        if self.mesh is not None:
            states = [mine]
            dist.broadcast_object_list(states, group=self.mesh.get_group(), group_src=0)
            generator = torch.Generator()
            generator.set_state(states[0])
        for parameter, bound in self._bounds():
            self._draw(parameter, bound, generator)
        if generator is not None and torch.equal(mine, states[0]):
            torch.set_rng_state(generator.get_state())  # as if it had been drawn here: ranks of one seed stay together

    def forward(self, input: Tensor, batch: str = "replicated") -> Tensor:
        """Whole logits on every process, ``(..., D)`` to ``(..., C)``: for evaluation with few classes.

        Args:
            input: features.
            batch: ``"replicated"``: the same features on all processes. A gradient goes back through the logits, if
                what is made of them is the same on all processes too. ``"gathered"``: each process has rows of its
                own, ``(N, D)`` with any N, and gets their logits; only under ``torch.no_grad()``.

        Returns:
            The logits, the same bits on all processes.
        """
        x, mine = self._rows(input, batch)
        weight, bias, mesh = _local(self.weight), _local(self.bias), self.mesh
        if mesh is not None and x.requires_grad:
            x = _summed_over(mesh, x)
        z = _logits(x, weight, bias, self.normalize)
        if mesh is not None:
            z = _gathered_classes(mesh, z, self.num_classes)
        return z[mine].reshape(*input.shape[:-1], self.num_classes)

    @torch.no_grad()
    def topk(self, input: Tensor, k: int, batch: str = "replicated") -> tuple[Tensor, Tensor]:
        """The k largest logits of each row and their classes, without the logits of all: for evaluation.

        Each process multiplies with its classes, a chunk of rows at a time, and one message has the k best of each; as
        before every result of several processes, another of a few numbers shows whether they agree.

        Args:
            input: features ``(..., D)``.
            k: at most C.
            batch: ``"replicated"``: the same features on all processes. ``"gathered"``: each process has rows of its
                own, ``(N, D)`` with any N, and gets their results.

        Returns:
            Values ``(..., k)`` of the logits' type, in descending order, and their classes, int64; without gradient.

        Raises:
            ValueError: k is not in [1, C], or an input whose last dimension is not D.
        """
        x, mine = self._rows(input, batch, k)
        weight, bias, mesh = _local(self.weight), _local(self.bias), self.mesh
        first, count = self.class_range[0], len(weight)
        best = [
            (values, classes + first)
            for rows in x.split(max(1, _CHUNK_BYTES // max(1, count * x.element_size())))
            for values, classes in [_logits(rows, weight, bias, self.normalize).topk(min(k, count))]
        ]
        values, classes = (torch.cat(parts) for parts in zip(*best, strict=True))
        if mesh is not None:
            values, classes = _best_of_all(mesh, values, classes, k, self.num_classes)
        shape = (*input.shape[:-1], k)
        return values[mine].reshape(shape), classes[mine].reshape(shape)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.bias is not None}"
        if self.normalize:
            text += ", normalize=True"
        first, last = self.class_range
        return text if self.mesh is None else f"{text}, classes [{first}, {last}) here, of {self.mesh.size()} ranks"

    def _rows(self, input: Tensor, batch: str, k: int = 1) -> tuple[Tensor, slice]:
        """The rows to compute, ``(N, D)``, and which of them are this process's.

        Wrong arguments on one process are an error on all, which would wait for it.
        """
        problem: Exception | None = None
        try:
            self._check(input, batch, k)
        except (TypeError, ValueError, RuntimeError) as error:
            problem = error
        rows = self.weight.new_empty(0, self.in_features) if problem else input.reshape(-1, self.in_features)
        if self.mesh is None:
            if problem is not None:
                raise problem
            return rows, slice(None)
        header = (int(problem is not None), len(rows), *((0, 0) if problem else (k, BATCHES.index(batch))))
        ranks = Ranks(self.mesh.get_group())
        found = gathered(torch.tensor(header, device=_local(self.weight).device), ranks.group).tolist()
        if problem is not None:
            raise problem
        refused, counts, ks, batches = zip(*found, strict=True)
        if any(refused):
            raise RuntimeError(
                "input: expected right arguments on all ranks of the group, found that rank"
                f" {refused.index(1)} refused its own: see the error there"
            )
        for name, values in (("k", ks), ("batch", [BATCHES[at] for at in batches])):
            if len(set(values)) > 1:
                raise ValueError(f"{name}: expected the same on all ranks of the group, found {list(values)}")
        if batch == "gathered":
            first = sum(counts[: ranks.rank])
            return ranks.gathered(rows, counts), slice(first, first + len(rows))
        if len(set(counts)) > 1:
            raise ValueError(
                'input: expected the same rows on all ranks of the group (batch="gathered" is for rows of each), found'
                f" {list(counts)} rows"
            )
        return rows, slice(None)

    def _check(self, input: Tensor, batch: str, k: int) -> None:
        if arg.tensor("input", input).shape[-1:] != (self.in_features,):
            raise ValueError(f"input: expected shape (..., {self.in_features}), found {tuple(input.shape)}")
        weight = _local(self.weight)
        if input.device != weight.device:
            raise ValueError(f"input: expected device {weight.device} as weight's, found {input.device}")
        if input.dtype != weight.dtype and not torch.is_autocast_enabled(input.device.type):
            raise TypeError(f"input: expected {weight.dtype} as weight's, found {input.dtype}")
        arg.choice("batch", batch, BATCHES)
        if arg.size("k", k) > self.num_classes:
            raise ValueError(f"k: expected at most {self.num_classes}, the number of classes, found {k}")
        if batch == "gathered" and self.mesh is not None and torch.is_grad_enabled():
            raise RuntimeError('batch: expected "replicated" where gradients are recorded, found "gathered"')

    def _bounds(self) -> Iterator[tuple[nn.Parameter, float]]:
        """The parameters, each with the bound of its uniform start."""
        # As nn.init.kaiming_uniform_ of nn.Linear rounds it.
        kaiming = math.sqrt(3.0) * (nn.init.calculate_gain("leaky_relu", math.sqrt(5)) / math.sqrt(self.in_features))
        yield self.weight, 1.0 if self.normalize else kaiming
        if self.bias is not None:
            yield self.bias, 1 / math.sqrt(self.in_features)

    @torch.no_grad()
    def _draw(self, parameter: nn.Parameter, bound: float, generator: torch.Generator | None) -> None:
        """The numbers of all classes in order, of which this process keeps its own."""
        local, (first, last) = _local(parameter), self.class_range
        step = max(1, _CHUNK_BYTES // (local[:1].numel() * local.element_size() or _CHUNK_BYTES))
        for start in range(0, self.num_classes, step):
            end = min(start + step, self.num_classes)
            block = torch.empty(end - start, *local.shape[1:], dtype=local.dtype, device="cpu")
            block.uniform_(-bound, bound, generator=generator)
            low, high = max(start, first), min(end, last)
            if low < high:
                rows = block[low - start : high - start]
                local[low - first : high - first] = unit(rows) if self.normalize and rows.dim() > 1 else rows

    def _apply(self, fn: Any, recurse: bool = True) -> ClassParallelLinear:
        """Another device is another mesh: ``.to("cuda")`` moves what the parameters have here, and this the rest."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        mesh = self.mesh
        device = _local(self.weight).device.type
        if mesh is not None and device not in (mesh.device_type, "meta"):
            self._set_mesh(_mesh(mesh.get_group(), device))
        return self

    def _set_mesh(self, mesh: DeviceMesh | None) -> None:
        """The same parameters, which an optimizer may have already, over the same processes on another device."""
        for parameter in self.parameters():
            local = _local(parameter).detach()
            torch.utils.swap_tensors(parameter, nn.Parameter(_sharded(local, self.num_classes, mesh)))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Takes its shard of whole tensors, such as ``nn.Linear`` has, which every process has to give."""
        taken = dict(state_dict)
        for name, parameter in self.named_parameters():
            value = state_dict.get(prefix + name)
            mesh, given = self.mesh, _mesh_of(value)
            if not isinstance(value, Tensor) or value.shape != parameter.shape or mesh == given:
                continue  # what is missing or of another shape is reported by nn.Module
            if mesh is None or given is not None:
                there = "a plain tensor" if mesh is None else f"one sharded over {mesh}"
                raise ValueError(
                    f"{prefix}{name}: expected {there} or a whole tensor, found one sharded over {given}; full_tensor()"
                    " of it, on all of its processes, is whole, and torch.distributed.checkpoint loads any shards"
                )
            first, last = self.class_range
            own = value[first:last].to(_local(parameter).device, copy=True)  # with assign=True the whole may go then
            taken[prefix + name] = _sharded(own, self.num_classes, mesh)
        super()._load_from_state_dict(taken, prefix, local_metadata, *args)
        # nn.Module's reports are appended to lists of the caller; only `taken` was another dict.


def _mesh(group: object, device: torch.device | str | None) -> DeviceMesh | None:
    """The group as a mesh of one dimension; None where there is but this process."""
    if not dist.is_available() or not dist.is_initialized():
        if group is None:
            return None
        raise ValueError(f"group: expected None before torch.distributed.init_process_group, found {group!r}")
    from torch.distributed.device_mesh import DeviceMesh

    kind = torch.get_default_device().type if device is None else torch.device(device).type
    members = process_group(dist.group.WORLD if group is None else group)
    if isinstance(group, DeviceMesh):
        if device is not None and kind not in (group.device_type, "meta"):
            raise ValueError(f"device: expected {group.device_type} as the mesh's, found {device}")
        return group
    if kind == "meta":
        kind = "cuda" if "nccl" in dist.get_backend(members) else "cpu"
    return DeviceMesh.from_group(members, kind)


def _class_range(classes: int, mesh: DeviceMesh | None) -> tuple[int, int]:
    """As torch.chunk and DTensor cut."""
    if mesh is None:
        return 0, classes
    size = -(-classes // mesh.size())
    rank = mesh.get_local_rank()
    return min(rank * size, classes), min((rank + 1) * size, classes)


def _sharded(local: Tensor, classes: int, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return local
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((classes, *local.shape[1:]))
    stride = (*shape[1:], 1)
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _mesh_of(value: object) -> DeviceMesh | None:
    """Of a DTensor."""
    return getattr(value, "device_mesh", None)


def _local(value: Any) -> Any:
    """What this process has of a parameter, through which its gradient goes back; None of None."""
    return value if _mesh_of(value) is None else value.to_local()


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, normalize: bool) -> Tensor:
    return F.linear(unit(x), unit(weight), bias) if normalize else F.linear(x, weight, bias)


def _summed_over(mesh: DeviceMesh, x: Tensor) -> Tensor:
    """``x``, whose gradient is the sum of what all processes find for it: each knows that of its own classes."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


def _gathered_classes(mesh: DeviceMesh, z: Tensor, classes: int) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((len(z), classes))
    whole: Tensor = DTensor.from_local(
        z, mesh, [Shard(1)], run_check=False, shape=shape, stride=(classes, 1)
    ).full_tensor()
    return whole


def _best_of_all(mesh: DeviceMesh, values: Tensor, labels: Tensor, k: int, classes: int) -> tuple[Tensor, Tensor]:
    """The k largest of what the processes have found, each among its own classes."""
    # float64 holds the values of every type and classes up to 2^53: one message for both.
    mine = torch.zeros(2, len(values), k, dtype=torch.float64, device=values.device)
    mine[0, :, : values.shape[1]], mine[1, :, : values.shape[1]] = values, labels
    size = -(-classes // mesh.size())
    counts = [min(k, max(0, min(size, classes - rank * size))) for rank in range(mesh.size())]
    found = torch.cat([part[..., :n] for part, n in zip(gathered(mine, mesh.get_group()), counts, strict=True)], dim=-1)
    top, at = found[0].topk(k)
    return top.to(values.dtype), found[1].gather(1, at).long()
