"""Who computes cross_entropy: one callable each way for every backend, and which calls it cannot serve.

``forward(*tensors, *options, with_gradient)`` returns the loss, the state that the backward needs and, where it was
asked for and the backend computes it then, the gradient. ``backward(grad, state, *tensors, *options, need_input,
need_class_scale, need_class_bias, inplace)`` returns the three gradients, empty where not needed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ltkernels import backends
from ltkernels.ops import gpu
from ltkernels.ops.options import CrossEntropyOptions
from ltkernels.reference import cross_entropy as reference

TENSORS = 7  # the first arguments of _ARGUMENTS; the rest are CrossEntropyOptions
INPUT, CLASS_SCALE, CLASS_BIAS = 0, 3, 4
NO_GRADIENT = {"target": 1, "weight": 2, "class_margin": 5, "sample_weight": 6}
Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Parameters = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # but the first
NO_STATE = -1.0  # in the place of 1 / denominator, which is not negative


def new_state(input: Tensor) -> Tensor:
    """What a forward leaves for the backward: four numbers a row and one for the batch (csrc/common/row_loss.h)."""
    rows = input.numel() // input.shape[1]
    return input.new_empty(4 * rows + 1, dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)


def check_on_cpu(tensors: Tensors, options: CrossEntropyOptions) -> None:
    """Refuses bad values where looking at them does not stop a device. Under vmap the calls that it becomes do that."""
    input = tensors[0]
    values = [_unwrapped(value) for value in tensors[1:]]
    shapes = [None if value is None else value.shape for value in tensors[1:]]
    if input.device.type == "cpu" and shapes == [None if value is None else value.shape for value in values]:
        reference.check_values(*cast(Parameters, tuple(values)), input.shape[1], options.ignore_index)


def _unwrapped(value: Tensor | None) -> Tensor | None:
    while value is not None and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def only_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_scale: Tensor | None,
    class_bias: Tensor | None,
    class_margin: Tensor | None,
    sample_weight: Tensor | None,
) -> str | None:
    """Derivatives that only PyTorch's autograd through the reference computes."""
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation, which only the reference computes"
    if torch._C._are_functorch_transforms_active():
        followed = any(map(_followed, (target, weight, class_margin, sample_weight)))
    else:
        followed = (
            target.requires_grad
            or (weight is not None and weight.requires_grad)
            or (class_margin is not None and class_margin.requires_grad)
            or (sample_weight is not None and sample_weight.requires_grad)
        )
    if followed and torch.is_grad_enabled():
        return "target, weight, class_margin or sample_weight requires a gradient, which only the reference computes"
    return None


def _followed(value: Tensor | None) -> bool:
    """Whether a transform differentiates with respect to this tensor, at this level or at one around it."""
    while value is not None and not value.requires_grad:
        if not torch._C._functorch.is_functorch_wrapped_tensor(value):
            return False
        value = torch._C._functorch.get_unwrapped(value)
    return value is not None


def _reference_forward(*args: Any) -> tuple[Tensor, Tensor, None]:
    tensors = cast(Tensors, args[:TENSORS])
    options = CrossEntropyOptions(*args[TENSORS:-1])
    check_on_cpu(tensors, options)
    with torch.no_grad():
        return reference.cross_entropy(*tensors, options), new_state(tensors[0]).fill_(NO_STATE), None


def _reference_backward(grad: Tensor, state: Tensor, *args: Any) -> tuple[Tensor, ...]:
    tensors, options, need = args[:TENSORS], CrossEntropyOptions(*args[TENSORS:-4]), args[-4:-1]
    arguments = list(tensors)
    places = (INPUT, CLASS_SCALE, CLASS_BIAS)
    with torch.enable_grad(), _autograd_in_a_kernel():
        for place, wanted in zip(places, need, strict=True):
            if wanted:
                arguments[place] = tensors[place].detach().requires_grad_()
        variables = [arguments[place] for place, wanted in zip(places, need, strict=True) if wanted]
        grads = iter(
            torch.autograd.grad(reference.cross_entropy(*cast(Tensors, tuple(arguments)), options), variables, grad)
        )
    return tuple(
        torch.empty_like(tensors[place]).copy_(next(grads)) if wanted else state.new_empty(0)
        for place, wanted in zip(places, need, strict=True)
    )


def _autograd_in_a_kernel() -> AbstractContextManager[None]:
    """The dispatcher, in whose ops this runs too, turns autograd off for the inside of an op."""
    autograd = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutogradCUDA
    )
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    guard: AbstractContextManager[None] = torch._C._ForceDispatchKeyGuard(include, exclude - autograd)
    return guard


@cache
def _cpu_ops() -> tuple[Any, Any]:
    """The overloads' own callables: finding them by name at every call costs a microsecond."""
    namespace = torch.ops.ltkernels_cpu
    return namespace.cross_entropy_forward.default._op, namespace.cross_entropy_backward.default._op


def _cpu_forward(*args: Any) -> Any:
    try:
        return _cpu_ops()[0](*args)
    except RuntimeError as error:
        _say_which_value(error, *args)
        raise


def _cpu_backward(grad: Tensor, state: Tensor, *args: Any) -> Any:
    try:
        return _cpu_ops()[1](grad, state, *args)
    except RuntimeError as error:
        _say_which_value(error, *args)
        raise


def _say_which_value(error: RuntimeError, *args: Any) -> None:
    """The C++ core can only raise RuntimeError. If a value is why, this raises what all backends raise for it."""
    if str(error).startswith("ltkernels: value:"):
        tensors: Tensors = args[:TENSORS]
        reference.check_values(*tensors[1:], args[INPUT].shape[1], args[TENSORS])


@cache
def _cuda_ops() -> tuple[Any, Any]:
    namespace = torch.ops.ltkernels_cuda
    return namespace.cross_entropy_forward.default._op, namespace.cross_entropy_backward.default._op


def _cuda_forward(*args: Any) -> tuple[Tensor, Tensor, None]:
    device = args[INPUT].device
    loss, state = _cuda_ops()[0](*args[:-1], gpu.tickets(device), gpu.error_word(device))
    return loss, state, None


_COLUMNS_A_TICKET = 128  # csrc/cuda/cross_entropy.h: column_threads


def _cuda_backward(grad: Tensor, state: Tensor, *args: Any) -> Any:
    input, (_, need_class_scale, need_class_bias) = args[INPUT], args[-4:-1]
    count = -(-input.shape[1] // _COLUMNS_A_TICKET) if need_class_scale or need_class_bias else 1
    device = input.device
    return _cuda_ops()[1](grad, state, *args, gpu.tickets(device, count), gpu.error_word(device))


def _triton_forward(*args: Any) -> Any:
    from ltkernels.triton import cross_entropy as kernels

    return kernels.forward(*args)


def _triton_backward(*args: Any) -> Any:
    from ltkernels.triton import cross_entropy as kernels

    return kernels.backward(*args)


TABLE = backends.Table(
    "cross_entropy",
    [
        backends.Implementation("cuda", "cuda", _cuda_forward, _cuda_backward, refuses=only_reference),
        backends.Implementation("triton", "cuda", _triton_forward, _triton_backward, refuses=only_reference),
        backends.Implementation(
            "cpu", "cpu", _cpu_forward, _cpu_backward, refuses=only_reference, gradient_in_forward=True
        ),
        backends.Implementation("reference", None, _reference_forward, _reference_backward),
    ],
    # Measured winners would come first (`python -m benchmarks.gpu --winners benchmarks/results/GPU.jsonl`).
    preferences=(
        backends.Preference(
            "cuda", "by the model: no form reads fewer bytes, or wider, for any number of classes; not measured"
        ),
    ),
)
"""Implementations of cross_entropy, fastest first."""
