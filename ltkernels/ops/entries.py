"""The ways into an op with a gradient, which share one backward: what every loss's op is made of.

There are four ways in, because no single one is right everywhere (``python benchmarks/entries.py`` prints their cost):

* the **lean** ``autograd.Function`` (``forward(ctx, ...)``) for plain eager calls: the cheapest a call;
* a ``Function`` with ``setup_context`` for :mod:`torch.func`, where the lean form is refused;
* the dispatcher op ``ltkernels::NAME`` for ``torch.compile``, ``torch.export`` and tensor subclasses;
* the reference implementation itself, with PyTorch's own autograd, where a parameter needs a gradient that the kernels
  do not compute (weights, margins, probabilities).

**Gradient in forward or recomputation?** A reduced loss is nearly always differentiated once, with an upstream
gradient of 1. Writing the gradient while the forward has the row in cache saves the backward's second read of the
logits and its second exponential: recomputing takes 1.2 to 1.7 times as long, and keeping the gradient to multiply it
later, for another upstream value, takes about as long as recomputing (second table of
``python benchmarks/entries.py``). So the lean entry asks the forward for the gradient at upstream 1 and keeps it; the
first backward hands it out, multiplied in place if the upstream is not 1. The bits are those of the recomputation,
whose last step is that same multiplication (but for subnormal numbers: the kernels flush them to zero, PyTorch's
multiplication does not).

Everything else recomputes from ``(input, state)``, with O(N + C) state: a second backward under ``retain_graph``; half
logits with another upstream (they would be rounded twice); ``reduction="none"`` (the upstream is a vector, not known
yet); learnable parameters (that pass reads the logits anyway); ``inplace``; hooks on saved tensors. Where there is no
gradient to compute (``no_grad``), none is written.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ltkernels.backends import Implementation
from ltkernels.ops import gpu
from ltkernels.ops.options import Reduction
from ltkernels.ops.table import NO_STATE, Op, only_reference

_PLAIN = (Tensor, torch.nn.Parameter)


def call(
    op: Op,
    tensors: tuple[Tensor | None, ...],
    options: Any,
    inplace: bool = False,
    kept: list[Tensor] | None = None,
) -> Tensor:
    """The loss of ``tensors`` by the backend that serves the call; see the op's reference.

    Args:
        op: the op.
        tensors: one for each of ``op.tensors``, logits first; ``None`` where an optional one is not given.
        options: the scalars, of ``op.options``.
        inplace: whether the gradient may be written over the logits.
        kept: receives the state of a forward by an op or a kernel, for ops whose callers read it.
    """
    input = tensors[0]
    assert input is not None
    if is_traced(input):
        if torch._C._are_functorch_transforms_active() or only_reference(op, *tensors):  # a transform inside a graph
            return op.reference(*tensors, options)
        loss: Tensor
        loss, state = op.forward(*tensors, *options)
        if kept is not None:
            kept.append(state.detach())
        return loss
    if not input.is_cpu:
        gpu.check()
    implementation = op.table.choose(input, tensors)
    if implementation.backend == "reference":
        op.check_on_cpu(tensors, options)
        return op.reference(*tensors, options)
    if torch._C._are_functorch_transforms_active():
        loss = _Transformable.apply(op, *tensors, options, implementation)[0]
        return loss
    if kept is not None:
        implementation = _keeping(implementation, kept)
    if torch.is_grad_enabled():
        variables = op.variables(tensors)
        for variable in variables:
            if variable is not None and variable.requires_grad:
                loss = _Lean.apply(*variables, (op, tensors, options, implementation, inplace))
                return loss
    loss = implementation.forward(*tensors, *options, False)[0]
    return loss


def is_traced(input: Tensor) -> bool:
    """Whether what is called now becomes a graph, or a tensor subclass has its own way with it."""
    return torch.compiler.is_compiling() or type(input) not in _PLAIN


def _keeping(implementation: Implementation, kept: list[Tensor]) -> Implementation:
    """``implementation``, whose forward hands its state to ``kept`` too."""

    def forward(*args: Any) -> Any:
        result = implementation.forward(*args)
        kept.append(result[1])
        return result

    return replace(implementation, forward=forward)


class _Lean(torch.autograd.Function):
    """Eager calls. Saves the tensors for recomputation and, where it pays, the gradient itself: see the module.

    An argument of ``apply`` costs time at every call, so what takes no gradient comes as one tuple, the last.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        op, tensors, options, implementation, inplace = arguments[-1]
        now = (
            implementation.gradient_in_forward
            and not (inplace or (True in ctx.needs_input_grad[1:] and not implementation.all_gradients))
            and options.reduction != Reduction.NONE
            # Hooks on saved tensors (checkpointing, offloading) are there to save memory: nothing is kept beside them.
            and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        )
        wanted = ctx.needs_input_grad[:-1] if now and implementation.all_gradients else now
        loss: Tensor
        loss, state, ctx.gradient = implementation.forward(*tensors, *options, wanted)
        ctx.save_for_backward(*tensors, state)
        ctx.call = op, options, implementation, inplace
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        op, options, implementation, inplace = ctx.call
        plain = not (torch.is_grad_enabled() or _is_batched(grad))
        if gradient is not None and plain:
            if implementation.all_gradients:
                return *gradient.times(grad), None
            if grad.item() == 1.0:
                return gradient, *(None,) * len(op.gradients)
            if gradient.dtype in (torch.float32, torch.float64):
                return gradient.mul_(grad), *(None,) * len(op.gradients)
        del gradient  # its memory, before the recomputation allocates
        *tensors, state = ctx.saved_tensors
        need = ctx.needs_input_grad[:-1]
        if not plain:
            return *_wanted(_Backward.apply(op, grad, state, *tensors, options, implementation, need), need), None
        if reuse := inplace and need[0] and _reusable(tensors[0]):
            tensors[0] = tensors[0].detach()  # the gradient is in this memory, but not of the logits' graph
            torch.autograd.graph.increment_version(tensors[0])
        return *_wanted(implementation.backward(grad, state, *tensors, *options, *need, reuse), need), None


class _Transformable(torch.autograd.Function):
    """Calls under :mod:`torch.func` transforms, which need ``setup_context``."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        _, *tensors, options, implementation = args
        loss, state, _ = implementation.forward(*tensors, *options, False)
        return loss, state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        op, *tensors, options, implementation = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.call = op, options, implementation

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, state = ctx.saved_tensors
        op, options, implementation = ctx.call
        need = tuple(ctx.needs_input_grad[1 + place] for place in op.gradients)
        grads = _Backward.apply(op, grad, state, *tensors, options, implementation, need)
        return None, *_arranged(op, grads, need), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _one_by_one(_Transformable, info.batch_size, in_dims, args)


class _Backward(torch.autograd.Function):
    """The backward as a differentiable function: the kernel computes it, the reference differentiates it again."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        _, grad, state, *tensors, options, implementation, need = args
        grads: tuple[Tensor, ...] = implementation.backward(grad, state, *tensors, *options, *need, False)
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        op, grad, _, *tensors, options, _, need = inputs
        ctx.save_for_backward(grad, *tensors)
        ctx.call = op, options, need

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        grad, *tensors = ctx.saved_tensors
        op, options, need = ctx.call
        places = [place for place in range(len(op.tensors)) if ctx.needs_input_grad[3 + place]]
        d_grad, d_tensors = _second_order(op, grad, tensors, options, need, cotangents, places)
        return None, d_grad, None, *d_tensors, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _one_by_one(_Backward, info.batch_size, in_dims, args)


def _one_by_one(
    function: Any, count: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The rule of vmap: a call for each element of the batch, stacked."""

    def element(index: int) -> list[Any]:
        return [
            arg.select(dim, index) if isinstance(arg, Tensor) and dim is not None else arg
            for arg, dim in zip(args, in_dims, strict=True)
        ]

    outputs = [function.apply(*element(index)) for index in range(count)]
    return tuple(map(torch.stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])


def _wanted(grads: tuple[Tensor, ...], need: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(grad if wanted else None for grad, wanted in zip(grads, need, strict=True))


def _arranged(op: Op, grads: tuple[Tensor, ...], need: tuple[bool, ...]) -> list[Tensor | None]:
    """The gradients at the places of their tensors in the op's arguments."""
    arranged: list[Tensor | None] = [None] * len(op.tensors)
    for place, grad in zip(op.gradients, _wanted(grads, need), strict=True):
        arranged[place] = grad
    return arranged


def _is_batched(grad: Tensor) -> bool:
    """Many upstream gradients at once: torch.func.vmap, or ``is_grads_batched`` of torch.autograd.grad."""
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad)


def _reusable(input: Tensor) -> bool:
    """Whether the gradient may be written over these logits: not a leaf's data, no element that is two logits."""
    owner = input if input._base is None else input._base
    reach = 0
    for stride, size in sorted(zip(input.stride(), input.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += stride * (size - 1)
    return not owner.is_leaf


def _second_order(
    op: Op,
    grad: Tensor,
    tensors: list[Tensor | None],
    options: Any,
    need: tuple[bool, ...],
    cotangents: tuple[Tensor, ...],
    places: list[int],
) -> tuple[Tensor, list[Tensor | None]]:
    """Pull cotangents of the gradients back to ``grad`` and the tensors at ``places``.

    Two nested vector-Jacobian products of the reference; :mod:`torch.func` makes them differentiable further. The
    backward was with respect to what ``need`` says; what is differentiated now may be more, since an outer transform
    may follow tensors that the inner one held fixed.
    """
    first = [place for place, wanted in zip(op.gradients, need, strict=True) if wanted]
    order = first + [place for place in places if place not in first]
    wanted = tuple(cotangent for cotangent, needed in zip(cotangents, need, strict=True) if needed)

    def gradients(upstream: Tensor, *variables: Tensor) -> Any:
        arguments = list(tensors)
        for place, variable in zip(order, variables, strict=True):
            arguments[place] = variable

        def loss(*inner: Tensor) -> Tensor:
            for place, variable in zip(first, inner, strict=True):
                arguments[place] = variable
            return op.reference(*arguments, options)

        return torch.func.vjp(loss, *variables[: len(first)])[1](upstream)

    d_grad, *d_variables = torch.func.vjp(gradients, grad, *[tensors[place] for place in order])[1](wanted)
    d_tensors: list[Tensor | None] = [None] * len(op.tensors)
    for place, d_variable in zip(order, d_variables, strict=True):
        d_tensors[place] = d_variable if place in places else None
    return d_grad, d_tensors


# --- The dispatcher op: what torch.compile, torch.export and tensor subclasses see ---

_library = torch.library.Library("ltkernels", "FRAGMENT")


def register(op: Op) -> Op:
    """Makes ``ltkernels::NAME`` and ``ltkernels::NAME_backward`` of ``op``, with fakes and derivatives."""
    name, count, options = op.name, len(op.tensors), op.options
    kinds = get_type_hints(options)
    arguments = ", ".join(f"Tensor{'?' if t.endswith('?') else ''} {t.rstrip('?')}" for t in op.tensors)
    arguments += "".join(f", {kind.__name__} {key}" for key, kind in kinds.items())
    needs = "".join(f", bool need_{op.tensors[place].rstrip('?')}" for place in op.gradients)
    results = f"({', '.join(['Tensor'] * len(op.gradients))})"
    _library.define(f"{name}({arguments}) -> (Tensor loss, Tensor state)")
    _library.define(f"{name}_backward(Tensor grad, Tensor state, {arguments}{needs}) -> {results}")
    scalars = len(kinds)

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        loss, state, _ = op.table.choose(args[0], args[:count]).forward(*args, False)
        return loss, state

    def backward(grad: Tensor, state: Tensor, *args: Any) -> Any:
        # A forward by the reference left no state for a kernel: use_backend was on for the forward alone.
        by_reference = state.device.type == "cpu" and state.numel() > 0 and state[-1].item() == NO_STATE
        implementation = op.table.rows[-1] if by_reference else op.table.choose(args[0], args[:count])
        return _returned(implementation.backward(grad, state, *args, False))

    for key in ("CPU", "CUDA"):
        _library.impl(name, forward, key)
        _library.impl(f"{name}_backward", backward, key)

    @torch.library.register_fake(f"ltkernels::{name}", lib=_library)
    def fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
        tensors, given = args[:count], options(*args[count:])
        return op.new_output(tensors, given), op.new_state(tensors, given)

    @torch.library.register_fake(f"ltkernels::{name}_backward", lib=_library)
    def fake_backward(grad: Tensor, state: Tensor, *args: Any) -> Any:
        need = args[count + scalars :]
        return _returned(
            tuple(
                torch.empty_like(args[place]) if wanted else state.new_empty(0)
                for place, wanted in zip(op.gradients, need, strict=True)
            )
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:count], output[1])
        ctx.options = inputs[count:]
        ctx.set_materialize_grads(False)

    def autograd(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, state = ctx.saved_tensors
        for place, tensor in enumerate(op.tensors):
            if ctx.needs_input_grad[place] and place not in op.gradients:
                raise RuntimeError(f"ltkernels::{name} has no gradient for {tensor.rstrip('?')}; the reference has")
        if grad is None:
            return (None,) * (count + scalars)
        need = tuple(ctx.needs_input_grad[place] for place in op.gradients)
        grads = _as_tuple(op.backward(grad, state, *tensors, *ctx.options, *need))
        return *_arranged(op, grads, need), *(None,) * scalars

    def backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, _, *rest = inputs
        ctx.save_for_backward(grad, *rest[:count])
        ctx.options, ctx.need = options(*rest[count : count + scalars]), tuple(rest[count + scalars :])

    def backward_autograd(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        grad, *tensors = ctx.saved_tensors
        places = [place for place in range(count) if ctx.needs_input_grad[2 + place]]
        d_grad, d_tensors = _second_order(op, grad, tensors, ctx.options, ctx.need, cotangents, places)
        return d_grad, None, *d_tensors, *(None,) * (scalars + len(op.gradients))

    register_autograd = torch.library.register_autograd
    register_autograd(f"ltkernels::{name}", autograd, setup_context=setup_context, lib=_library)
    register_autograd(
        f"ltkernels::{name}_backward", backward_autograd, setup_context=backward_setup_context, lib=_library
    )
    op.forward = getattr(torch.ops.ltkernels, name)
    op.backward = getattr(torch.ops.ltkernels, f"{name}_backward")
    return op


def _returned(grads: tuple[Tensor, ...]) -> Any:
    """As a dispatcher op returns them: one by itself."""
    return grads[0] if len(grads) == 1 else grads


def _as_tuple(grads: Any) -> tuple[Tensor, ...]:
    return (grads,) if isinstance(grads, Tensor) else tuple(grads)
