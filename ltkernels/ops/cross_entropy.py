"""The op behind ``functional.cross_entropy``: schema, fakes, and the autograd entries, which share one backward.

There are four ways in, because no single one is right everywhere (``python benchmarks/entries.py`` prints their cost):

* the **lean** ``autograd.Function`` (``forward(ctx, ...)``) for plain eager calls: the cheapest a call;
* a ``Function`` with ``setup_context`` for :mod:`torch.func`, where the lean form is refused;
* the dispatcher op ``ltkernels::cross_entropy`` for ``torch.compile``, ``torch.export`` and tensor subclasses;
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

Everything else recomputes from ``(input, state)``, with O(N) state: a second backward under ``retain_graph``; half
logits with another upstream (they would be rounded twice); ``reduction="none"`` (the upstream is a vector, not known
yet); learnable class_scale or class_bias (that pass reads the logits anyway); ``inplace``; hooks on saved tensors.
Where there is no gradient to compute (``no_grad``), none is written.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ltkernels.ops import gpu
from ltkernels.ops.cross_entropy_table import (
    CLASS_BIAS,
    CLASS_SCALE,
    INPUT,
    NO_GRADIENT,
    NO_STATE,
    TABLE,
    TENSORS,
    Tensors,
    check_on_cpu,
    new_state,
    only_reference,
)
from ltkernels.ops.options import CrossEntropyOptions, Reduction
from ltkernels.reference import cross_entropy as reference

_ARGUMENTS = (
    "Tensor input, Tensor target, Tensor? weight, Tensor? class_scale, Tensor? class_bias, Tensor? class_margin,"
    " Tensor? sample_weight, int ignore_index, int reduction, float label_smoothing, float scale, float focal_gamma,"
    " bool focal_weighted, bool focal_detached, float z_loss, bool empty_zero"
)
_library = torch.library.Library("ltkernels", "FRAGMENT")
_library.define(f"cross_entropy({_ARGUMENTS}) -> (Tensor loss, Tensor state)")
_library.define(
    f"cross_entropy_backward(Tensor grad, Tensor state, {_ARGUMENTS}, bool need_input, bool need_class_scale,"
    " bool need_class_bias) -> (Tensor, Tensor, Tensor)"
)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_scale: Tensor | None,
    class_bias: Tensor | None,
    class_margin: Tensor | None,
    sample_weight: Tensor | None,
    options: CrossEntropyOptions,
    inplace: bool = False,
) -> Tensor:
    """The loss of ``(N, C)`` or ``(N, C, D)`` logits by the backend that serves the call; see the reference."""
    tensors = (input, target, weight, class_scale, class_bias, class_margin, sample_weight)
    if torch.compiler.is_compiling() or type(input) not in _PLAIN:
        if torch._C._are_functorch_transforms_active() or only_reference(*tensors):  # a transform inside a graph
            return reference.cross_entropy(*tensors, options)
        loss: Tensor = torch.ops.ltkernels.cross_entropy(*tensors, *options)[0]
        return loss
    if not input.is_cpu:
        gpu.check()
    implementation = TABLE.choose(input, tensors)
    if implementation.backend == "reference":
        check_on_cpu(tensors, options)
        return reference.cross_entropy(*tensors, options)
    if torch._C._are_functorch_transforms_active():
        loss = _Transformable.apply(*tensors, options, implementation)[0]
        return loss
    if torch.is_grad_enabled() and (
        input.requires_grad
        or (class_scale is not None and class_scale.requires_grad)
        or (class_bias is not None and class_bias.requires_grad)
    ):
        loss = _Lean.apply(input, class_scale, class_bias, (tensors, options, implementation, inplace))
        return loss
    loss = implementation.forward(*tensors, *options, False)[0]
    return loss


_PLAIN = (Tensor, torch.nn.Parameter)


class _Lean(torch.autograd.Function):
    """Eager calls. Saves the tensors for recomputation and, where it pays, the gradient itself: see the module.

    An argument of ``apply`` costs time at every call, so what takes no gradient comes as one tuple.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, class_scale: Tensor | None, class_bias: Tensor | None, call: tuple[Any, ...]
    ) -> Tensor:
        tensors, options, implementation, inplace = call
        need = ctx.needs_input_grad
        now = (
            implementation.gradient_in_forward
            and not (inplace or need[1] or need[2])
            and options.reduction != Reduction.NONE
            # Hooks on saved tensors (checkpointing, offloading) are there to save memory: nothing is kept beside them.
            and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        )
        loss: Tensor
        loss, state, ctx.gradient = implementation.forward(*tensors, *options, now)
        ctx.save_for_backward(*tensors, state)
        ctx.call = call[1:]
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        plain = not (torch.is_grad_enabled() or _is_batched(grad))
        if gradient is not None and plain:
            if grad.item() == 1.0:
                return gradient, None, None, None
            if gradient.dtype in (torch.float32, torch.float64):
                return gradient.mul_(grad), None, None, None
        del gradient  # its memory, before the recomputation allocates
        *tensors, state = ctx.saved_tensors
        options, implementation, inplace = ctx.call
        need = ctx.needs_input_grad[:3]
        if not plain:
            return *_wanted(_Backward.apply(grad, state, *tensors, options, implementation, need), need), None
        if reuse := inplace and need[0] and _reusable(tensors[INPUT]):
            tensors[INPUT] = tensors[INPUT].detach()  # the gradient is in this memory, but not of the logits' graph
            torch.autograd.graph.increment_version(tensors[INPUT])
        grads = implementation.backward(grad, state, *tensors, *options, *need, reuse)
        return *_wanted(grads, need), None


class _Transformable(torch.autograd.Function):
    """Calls under :mod:`torch.func` transforms, which need ``setup_context``."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        *tensors, options, implementation = args
        loss, state, _ = implementation.forward(*tensors, *options, False)
        return loss, state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, options, implementation = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.options, ctx.implementation = options, implementation

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, state = ctx.saved_tensors
        need = _needs(ctx)
        grads = _Backward.apply(grad, state, *tensors, ctx.options, ctx.implementation, need)
        return *_arranged(grads, need), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _one_by_one(_Transformable, info.batch_size, in_dims, args)


class _Backward(torch.autograd.Function):
    """The backward as a differentiable function: the kernel computes it, the reference differentiates it again."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        grad, state, *tensors, options, implementation, need = args
        grads: tuple[Tensor, Tensor, Tensor] = implementation.backward(grad, state, *tensors, *options, *need, False)
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad, _, *tensors, options, _, need = inputs
        ctx.save_for_backward(grad, *tensors)
        ctx.options, ctx.need = options, need

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        grad, *tensors = ctx.saved_tensors
        places = [place for place in range(TENSORS) if ctx.needs_input_grad[2 + place]]
        d_grad, d_tensors = _second_order(grad, tensors, ctx.options, ctx.need, cotangents, places)
        return d_grad, None, *d_tensors, None, None, None

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


def _needs(ctx: Any) -> tuple[bool, bool, bool]:
    need = ctx.needs_input_grad
    return need[INPUT], need[CLASS_SCALE], need[CLASS_BIAS]


def _wanted(grads: tuple[Tensor, ...], need: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
    return tuple(grad if wanted else None for grad, wanted in zip(grads, need, strict=True))


def _arranged(grads: tuple[Tensor, ...], need: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """The three gradients at the places of their tensors in the op's arguments."""
    d_input, d_scale, d_bias = _wanted(grads, need)
    return d_input, None, None, d_scale, d_bias, None, None


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
    grad: Tensor,
    tensors: list[Tensor | None],
    options: CrossEntropyOptions,
    need: tuple[bool, bool, bool],
    cotangents: tuple[Tensor, ...],
    places: list[int],
) -> tuple[Tensor, list[Tensor | None]]:
    """Pull cotangents of the three gradients back to ``grad`` and the tensors at ``places``.

    Two nested vector-Jacobian products of the reference; :mod:`torch.func` makes them differentiable further. The
    backward was with respect to what ``need`` says; what is differentiated now may be more, since an outer transform
    may follow tensors that the inner one held fixed.
    """
    first = [place for place, wanted in zip((INPUT, CLASS_SCALE, CLASS_BIAS), need, strict=True) if wanted]
    order = first + [place for place in places if place not in first]
    wanted = tuple(cotangent for cotangent, needed in zip(cotangents, need, strict=True) if needed)

    def gradients(upstream: Tensor, *variables: Tensor) -> Any:
        arguments = list(tensors)
        for place, variable in zip(order, variables, strict=True):
            arguments[place] = variable

        def loss(*inner: Tensor) -> Tensor:
            for place, variable in zip(first, inner, strict=True):
                arguments[place] = variable
            return reference.cross_entropy(*cast(Tensors, tuple(arguments)), options)

        return torch.func.vjp(loss, *variables[: len(first)])[1](upstream)

    d_grad, *d_variables = torch.func.vjp(gradients, grad, *[tensors[place] for place in order])[1](wanted)
    d_tensors: list[Tensor | None] = [None] * TENSORS
    for place, d_variable in zip(order, d_variables, strict=True):
        d_tensors[place] = d_variable if place in places else None
    return d_grad, d_tensors


# --- The dispatcher op: what torch.compile, torch.export and tensor subclasses see ---


def _op_forward(*args: Any) -> tuple[Tensor, Tensor]:
    tensors, options = args[:TENSORS], args[TENSORS:]
    loss, state, _ = TABLE.choose(args[INPUT], tensors).forward(*tensors, *options, False)
    return loss, state


def _op_backward(grad: Tensor, state: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    # A forward by the reference left no state for a kernel: use_backend was on for the forward alone.
    by_reference = state.device.type == "cpu" and state.numel() > 0 and state[-1].item() == NO_STATE
    implementation = TABLE.rows[-1] if by_reference else TABLE.choose(args[INPUT], args[:TENSORS])
    grads: tuple[Tensor, Tensor, Tensor] = implementation.backward(grad, state, *args, False)
    return grads


for _key in ("CPU", "CUDA"):
    _library.impl("cross_entropy", _op_forward, _key)
    _library.impl("cross_entropy_backward", _op_backward, _key)


@torch.library.register_fake("ltkernels::cross_entropy", lib=_library)
def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    input, reduction = args[INPUT], args[TENSORS + 1]
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    rows = (input.shape[0], *input.shape[2:])
    loss = input.new_empty(rows if reduction == Reduction.NONE else (), dtype=dtype)
    return loss, new_state(input)


@torch.library.register_fake("ltkernels::cross_entropy_backward", lib=_library)
def _fake_backward(grad: Tensor, state: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    input, need = args[INPUT], args[-3:]
    vector = state.new_empty(input.shape[1])
    return (
        torch.empty_like(input) if need[0] else state.new_empty(0),
        torch.empty_like(vector) if need[1] else state.new_empty(0),
        torch.empty_like(vector) if need[2] else state.new_empty(0),
    )


def _op_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:TENSORS], output[1])
    ctx.options = inputs[TENSORS:]
    ctx.set_materialize_grads(False)


def _op_autograd(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, state = ctx.saved_tensors
    for name, place in NO_GRADIENT.items():
        if ctx.needs_input_grad[place]:
            raise RuntimeError(f"ltkernels::cross_entropy has no gradient for {name}; the reference has")
    if grad is None:
        return (None,) * (TENSORS + len(ctx.options))
    need = _needs(ctx)
    grads = torch.ops.ltkernels.cross_entropy_backward(grad, state, *tensors, *ctx.options, *need)
    return *_arranged(grads, need), *(None,) * len(ctx.options)


torch.library.register_autograd("ltkernels::cross_entropy", _op_autograd, setup_context=_op_setup_context, lib=_library)


def _op_backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, _, *rest = inputs
    ctx.save_for_backward(grad, *rest[:TENSORS])
    ctx.options, ctx.need = CrossEntropyOptions(*rest[TENSORS:-3]), tuple(rest[-3:])


def _op_backward_autograd(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    grad, *tensors = ctx.saved_tensors
    places = [place for place in range(TENSORS) if ctx.needs_input_grad[2 + place]]
    d_grad, d_tensors = _second_order(grad, tensors, ctx.options, ctx.need, cotangents, places)
    return d_grad, None, *d_tensors, *(None,) * (len(ctx.options) + 3)


torch.library.register_autograd(
    "ltkernels::cross_entropy_backward", _op_backward_autograd, setup_context=_op_backward_setup_context, lib=_library
)
