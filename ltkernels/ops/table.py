"""What an op with a gradient is, and who computes it: one callable each way for every backend.

``forward(*tensors, *options, with_gradient)`` returns the loss, the state that the backward needs and, where it was
asked for and the backend computes it then, the gradient of the logits. (Of an implementation with ``all_gradients``,
``with_gradient`` says for each of the op's gradients whether it is needed, and what comes third has a method
``times(grad)``, which returns them for an upstream gradient, once.) ``backward(grad, state, *tensors, *options,
*need, inplace)`` returns the gradients of the tensors that have one, empty where not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from importlib import import_module
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ltkernels import backends
from ltkernels.ops import gpu
from ltkernels.ops.options import Reduction

NO_STATE = -1.0  # in the last place of a state, where kernels leave a number that is not negative
Tensors = Sequence[Tensor | None]


class Op:
    """An op: its arguments, its definition, its implementations.

    Attributes:
        name: of the op, of its C++ ops and of its Triton module.
        tensors: names of the tensors among its arguments, logits first; those that may be left out end in ``?``.
        gradients: places in ``tensors`` of those that kernels compute a gradient for, logits first.
        options: a NamedTuple class of the scalars behind them, which has a ``reduction``.
        reference: ``reference(*tensors, options)``: the loss in plain PyTorch.
        check_values: ``check_values(tensors, options)``: raises on values that no backend may accept.
        new_output: ``new_output(tensors, options)``: memory for the result.
        new_state: ``new_state(tensors, options)``: memory for what a forward leaves for its backward; the last number
            is not negative.
        table: the implementations.
        forward, backward: the dispatcher ops, once registered.
    """

    forward: Any
    backward: Any

    def __init__(
        self,
        name: str,
        tensors: tuple[str, ...],
        gradients: tuple[int, ...],
        options: type[Any],
        reference: Callable[..., Tensor],
        check_values: Callable[[Tensors, Any], None],
        new_state: Callable[[Tensors, Any], Tensor],
        preferences: tuple[backends.Preference, ...],
        tickets: Callable[[Tensor, Sequence[bool]], int] = lambda input, need: 1,
        fill_state: Callable[[Tensor, Tensors, Any], None] = lambda state, tensors, options: None,
        forward_tickets: Callable[[Tensor], int] = lambda input: 1,
        new_output: Callable[[Tensors, Any], Tensor] | None = None,
    ) -> None:
        """``tickets(input, need)``: how many counters a backward by CUDA takes (ops/gpu.py).

        ``forward_tickets(input)``: how many a forward takes.

        ``fill_state(state, tensors, options)``: what callers read from a state, written by the reference.

        ``new_output(tensors, options)``: memory for the result, where that is not the loss of ``(N, C, ...)`` logits.
        """
        self.new_output = _new_loss if new_output is None else new_output
        self.fill_state = fill_state
        self.name, self.tensors, self.gradients, self.options = name, tensors, gradients, options
        self.reference, self.check_values, self.new_state = reference, check_values, new_state
        self._fixed = tuple(place for place in range(len(tensors)) if place not in gradients)
        get = itemgetter(*gradients)
        self.variables: Callable[[Tensors], Tensors] = get if len(gradients) > 1 else lambda values: (get(values),)

        refuses = partial(only_reference, self)
        implementation = backends.Implementation
        self.table = backends.Table(
            name,
            [
                implementation("cuda", "cuda", *_cuda(self, tickets, forward_tickets), refuses=refuses),
                implementation("triton", "cuda", *_triton(self), refuses=refuses),
                implementation("cpu", "cpu", *_cpu(self), refuses=refuses, gradient_in_forward=True),
                implementation("reference", None, *_reference(self)),
            ],
            preferences,
        )

    def check_on_cpu(self, tensors: Tensors, options: Any) -> None:
        """Refuses bad values where looking at them does not stop a device. Under vmap the calls it becomes do that."""
        input = tensors[0]
        values = [_unwrapped(value) for value in tensors[1:]]
        shapes = [None if value is None else value.shape for value in tensors[1:]]
        assert input is not None
        if input.device.type == "cpu" and shapes == [None if value is None else value.shape for value in values]:
            self.check_values((input, *values), options)

    def names(self, places: Sequence[int]) -> str:
        """The names of the tensors at ``places``, for a message."""
        *rest, last = [self.tensors[place].rstrip("?") for place in places]
        return f"{', '.join(rest)} or {last}" if rest else last


def _new_loss(tensors: Tensors, options: Any) -> Tensor:
    input = tensors[0]
    assert input is not None
    rows = (input.shape[0], *input.shape[2:])
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return input.new_empty(rows if options.reduction == Reduction.NONE else (), dtype=dtype)


def _unwrapped(value: Tensor | None) -> Tensor | None:
    while value is not None and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def only_reference(op: Op, *tensors: Tensor | None) -> str | None:
    """Derivatives that only PyTorch's autograd through the reference computes."""
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation, which only the reference computes"
    if torch._C._are_functorch_transforms_active():
        followed = any(_followed(tensors[place]) for place in op._fixed)
    else:
        followed = False
        for place in op._fixed:
            value = tensors[place]
            if value is not None and value.requires_grad:
                followed = True
    if followed and torch.is_grad_enabled():
        return f"{op.names(op._fixed)} requires a gradient, which only the reference computes"
    return None


def _followed(value: Tensor | None) -> bool:
    """Whether a transform differentiates with respect to this tensor, at this level or at one around it."""
    while value is not None and not value.requires_grad:
        if not torch._C._functorch.is_functorch_wrapped_tensor(value):
            return False
        value = torch._C._functorch.get_unwrapped(value)
    return value is not None


_Pair = tuple[Callable[..., Any], Callable[..., Any]]


def _reference(op: Op) -> _Pair:
    count = len(op.tensors)

    def forward(*args: Any) -> tuple[Tensor, Tensor, None]:
        tensors, options = args[:count], op.options(*args[count:-1])
        op.check_on_cpu(tensors, options)
        with torch.no_grad():
            state = op.new_state(tensors, options).fill_(NO_STATE)
            op.fill_state(state, tensors, options)
            return op.reference(*tensors, options), state, None

    def backward(grad: Tensor, state: Tensor, *args: Any) -> tuple[Tensor, ...]:
        end = len(args) - len(op.gradients) - 1
        tensors, options, need = args[:count], op.options(*args[count:end]), args[end:-1]
        arguments = list(tensors)
        with torch.enable_grad(), _autograd_in_a_kernel():
            for place, wanted in zip(op.gradients, need, strict=True):
                if wanted:
                    arguments[place] = tensors[place].detach().requires_grad_()
            variables = [arguments[place] for place, wanted in zip(op.gradients, need, strict=True) if wanted]
            grads = iter(torch.autograd.grad(op.reference(*arguments, options), variables, grad))
        return tuple(
            torch.empty_like(tensors[place]).copy_(next(grads)) if wanted else state.new_empty(0)
            for place, wanted in zip(op.gradients, need, strict=True)
        )

    return forward, backward


def _autograd_in_a_kernel() -> AbstractContextManager[None]:
    """The dispatcher, in whose ops this runs too, turns autograd off for the inside of an op."""
    autograd = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutogradCUDA
    )
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    guard: AbstractContextManager[None] = torch._C._ForceDispatchKeyGuard(include, exclude - autograd)
    return guard


@cache
def compiled_ops(library: str, name: str) -> tuple[Any, Any]:
    """The overloads' own callables: finding them by name at every call costs a microsecond."""
    namespace = getattr(torch.ops, library)
    return getattr(namespace, f"{name}_forward").default._op, getattr(namespace, f"{name}_backward").default._op


def _cpu(op: Op) -> _Pair:
    name, count, scalars = op.name, len(op.tensors), len(op.options._fields)

    def say_which_value(error: RuntimeError, args: tuple[Any, ...]) -> None:
        """The C++ core can only raise RuntimeError. If a value is why, this raises what all backends raise for it."""
        if str(error).startswith("ltkernels: value:"):
            op.check_values(args[:count], op.options(*args[count : count + scalars]))

    def forward(*args: Any) -> Any:
        try:
            return compiled_ops("ltkernels_cpu", name)[0](*args)
        except RuntimeError as error:
            say_which_value(error, args)
            raise

    def backward(grad: Tensor, state: Tensor, *args: Any) -> Any:
        try:
            return _as_tuple(compiled_ops("ltkernels_cpu", name)[1](grad, state, *args))
        except RuntimeError as error:
            say_which_value(error, args)
            raise

    return forward, backward


def _cuda(op: Op, tickets: Callable[[Tensor, Sequence[bool]], int], forward_tickets: Callable[[Tensor], int]) -> _Pair:
    name, needs = op.name, len(op.gradients)

    def forward(*args: Any) -> tuple[Tensor, Tensor, None]:
        device, count = args[0].device, forward_tickets(args[0])
        loss, state = compiled_ops("ltkernels_cuda", name)[0](
            *args[:-1], gpu.tickets(device, count), gpu.error_word(device)
        )
        return loss, state, None

    def backward(grad: Tensor, state: Tensor, *args: Any) -> Any:
        device, count = args[0].device, tickets(args[0], args[-1 - needs : -1])
        return _as_tuple(
            compiled_ops("ltkernels_cuda", name)[1](
                grad, state, *args, gpu.tickets(device, count), gpu.error_word(device)
            )
        )

    return forward, backward


def _triton(op: Op) -> _Pair:
    def forward(*args: Any) -> Any:
        return import_module(f"ltkernels.triton.{op.name}").forward(*args)

    def backward(grad: Tensor, state: Tensor, *args: Any) -> Any:
        return import_module(f"ltkernels.triton.{op.name}").backward(grad, state, *args)

    return forward, backward


def _as_tuple(grads: Any) -> tuple[Tensor, ...]:
    return (grads,) if isinstance(grads, Tensor) else tuple(grads)
