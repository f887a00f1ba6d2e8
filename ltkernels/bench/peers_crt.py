"""A step of stage two of decoupled training: drawing a class-balanced batch, classifier, loss, gradients and update.

The features are those of a frozen backbone, so the classifier is all that is trained and a step has nothing else in it.
They are random numbers here, as many as the data set has samples, and lie in memory: what a step takes does not depend
on what they are. ``crt`` trains a new linear classifier; ``lws`` only a factor for each class on the logits of a fixed
one, which are computed once and kept like the features where they are at most MOST_LOGITS.

Forms, all of which draw independently with every class alike and update by SGD with momentum and weight decay:

* ``ltkernels``: as ``python/recipes/crt.py``: DeviceBatches, functional.cross_entropy, and gradients that are written
  where the last step's were;
* ``ltkernels autograd``: the same with ``loss.backward()``; ``ltkernels linear``: that with linear_cross_entropy;
* ``eager``: the cheapest way we know in plain PyTorch: the draw vectorised, gradients written in the same way;
* ``autograd``: the same draw, ``F.linear``, ``F.cross_entropy``, ``loss.backward()``; ``compile``: these compiled;
* ``F.linear_cross_entropy``: PyTorch's own, in chunks, with the same draw;
* ``DataLoader``: the usual form: ``TensorDataset``, ``WeightedRandomSampler``, ``nn.CrossEntropyLoss``, and the SGD
  that comes without asking (the others say ``fused=True``). Its draw of a whole epoch is not in the median;
* ``products`` and ``gather``: only the two products of matrices, only the gather of the batch: floors, less work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from ltkernels import functional
from ltkernels.backends import explain
from ltkernels.bench import peers, runner, sampling
from ltkernels.bench.device import Call, Device
from ltkernels.bench.scenarios import Scenario
from ltkernels.calibration import LearnableWeightScaling
from ltkernels.samplers import DeviceBatches, LongTailSampler

AUTOGRAD = "autograd"
OUR_AUTOGRAD = "ltkernels autograd"
OUR_LINEAR = "ltkernels linear"
TORCH_LINEAR = "F.linear_cross_entropy"
LOADER = "DataLoader"
PRODUCTS = "products"
GATHER = "gather"
LESS_WORK = (PRODUCTS, GATHER)

CRT_SCENARIOS: tuple[Scenario, ...] = (
    Scenario(128, 100, "CIFAR-100-LT, ResNet-32", 64),
    Scenario(512, 1000, "ImageNet-LT, ResNet-10", 512),
    Scenario(512, 1000, "ImageNet-LT, ResNeXt-50", 2048),
    Scenario(512, 8142, "iNaturalist 2018, ResNet-50", 2048),
)
SAMPLES = {100: 10_847, 1000: 115_846, 8142: 437_513}
"""Of the training parts of these data sets, by number of classes."""
SAMPLES_A_CLASS = 100  # of others
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.2, 0.9, 5e-4
MOST_LOGITS = 2**28
SLOW = 2**32  # operations of a product, from which few rounds have to do
SLOW_ROUNDS = 5

HAS_TORCH_LINEAR = hasattr(F, "linear_cross_entropy")  # from torch 2.13 on


@dataclass(frozen=True)
class Data:
    """Features ``(S, D)`` and labels ``(S,)`` of a training part, and how samples are drawn from it."""

    features: Tensor
    labels: Tensor
    of_classes: sampling.Data
    batch_size: int


Draw = Callable[[], tuple[Tensor, ...]]
MakeDraw = Callable[[Data, Tensor], Draw]
"""From a data set and what rows are to be gathered from to a call that gives rows and labels of the next batch."""


@lru_cache(maxsize=1)  # variants of a scenario follow one another
def make_data(shape: Scenario, dtype: torch.dtype, device: str, seed: int) -> Data:
    """Random features of a long-tailed data set."""
    size = SAMPLES.get(shape.c, SAMPLES_A_CLASS * shape.c)
    of_classes = sampling.make_data(Scenario(size, shape.c, shape.source), seed)
    generator = torch.Generator(device).manual_seed(seed)
    features = torch.randn(size, shape.d, generator=generator, device=device, dtype=dtype)
    return Data(features, of_classes.labels.to(device), replace(of_classes, draws=shape.n), shape.n)


@dataclass(frozen=True)
class Form:
    """One way to make a step.

    Attributes:
        source: the rows ``(S, ...)`` that batches are drawn from: features, or kept logits.
        draw: makes the draw of batches.
        backward: from rows and labels to the loss; leaves the gradients in ``.grad`` of the parameters.
        parameters: what is trained.
        fused: whether SGD is asked to update in one pass.
    """

    source: Tensor
    draw: MakeDraw
    backward: peers.LossFn
    parameters: tuple[Tensor, ...]
    fused: bool = True

    def step(self, data: Data) -> Call:
        """The unit that is timed."""
        draw, backward, fused = self.draw(data, self.source), self.backward, self.fused or None
        optimizer = torch.optim.SGD(self.parameters, LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=fused)

        def step() -> None:
            backward(*draw())
            optimizer.step()

        return step

    def loss_and_grad(self, indices: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What a batch of these samples gives."""
        loss = self.backward(self.source.index_select(0, indices), labels).detach()
        gradients = [parameter.grad.flatten() for parameter in self.parameters if parameter.grad is not None]
        return loss, torch.cat(gradients)


# --------------------------------------------------------------------------------------------------------------- draws


def our_draw(data: Data, rows: Tensor) -> Draw:
    sampler = LongTailSampler(data.of_classes.index, "class_balanced", seed=1)
    return DeviceBatches(sampler, rows, data.labels, batch_size=data.batch_size)


def vectorised_draw(data: Data, rows: Tensor) -> Draw:
    indices = sampling._vectorised(data.of_classes, None)

    def draw() -> tuple[Tensor, ...]:
        chosen = indices().to(rows.device)
        return rows.index_select(0, chosen), data.labels.index_select(0, chosen)

    return draw


def loader_draw(data: Data, rows: Tensor) -> Draw:
    weights = data.of_classes.sample_weights(torch.ones(len(data.of_classes.counts), dtype=torch.float64))
    sampler = WeightedRandomSampler(weights, len(weights))  # type: ignore[arg-type]
    loader = DataLoader(TensorDataset(rows, data.labels), data.batch_size, sampler=sampler, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # epoch after epoch
    return lambda: tuple(next(batches))


# ------------------------------------------------------------------------------------------------ losses with gradients


def by_autograd(parameters: Sequence[Tensor], loss_of: peers.LossFn) -> peers.LossFn:
    def backward(rows: Tensor, labels: Tensor) -> Tensor:
        loss = loss_of(rows, labels)
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        return loss

    return backward


def in_place(head: nn.Linear, loss_of: peers.LossFn) -> peers.LossFn:
    """The gradients of a linear classifier where the last ones were, without autograd's new memory for them."""
    weight, bias = head.weight, head.bias
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)

    def backward(rows: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            logits = head(rows)
        loss = loss_of(logits.requires_grad_(), labels)
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.mm(gradient.t(), rows, out=weight.grad)
        torch.sum(gradient, 0, out=bias.grad)
        return loss

    return backward


def make_head(shape: Scenario, like: Tensor) -> nn.Linear:
    """The same classifier each time, of the type and on the device of ``like``."""
    generator, head = torch.Generator().manual_seed(1), nn.Linear(shape.d, shape.c)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / shape.d**0.5)
    return head.to(like.device, like.dtype)


def crt_forms(shape: Scenario, data: Data, compile: bool) -> dict[str, Form]:
    def form(draw: MakeDraw, make: Callable[[nn.Linear], peers.LossFn], fused: bool = True) -> Form:
        head = make_head(shape, data.features)
        return Form(data.features, draw, make(head), tuple(head.parameters()), fused)

    def of_logits(loss_of: peers.LossFn) -> Callable[[nn.Linear], peers.LossFn]:
        return lambda head: by_autograd([head.weight, head.bias], lambda x, y: loss_of(head(x), y))

    def of_features(loss_of: Callable[..., Tensor], **options: Any) -> Callable[[nn.Linear], peers.LossFn]:
        def make(head: nn.Linear) -> peers.LossFn:
            weight, bias = head.weight, head.bias
            return by_autograd([weight, bias], lambda x, y: loss_of(x, weight, y, linear_bias=bias, **options))

        return make

    def compiled(head: nn.Linear) -> peers.LossFn:
        weight, bias = head.weight, head.bias
        return by_autograd([weight, bias], peers.compiled(lambda x, y: F.cross_entropy(F.linear(x, weight, bias), y)))

    forms = {
        peers.OURS: form(our_draw, lambda head: in_place(head, functional.cross_entropy)),
        OUR_AUTOGRAD: form(our_draw, of_logits(functional.cross_entropy)),
        OUR_LINEAR: form(our_draw, of_features(functional.linear_cross_entropy)),
        peers.EAGER: form(vectorised_draw, lambda head: in_place(head, F.cross_entropy)),
        AUTOGRAD: form(vectorised_draw, of_logits(F.cross_entropy)),
        LOADER: form(loader_draw, of_logits(nn.CrossEntropyLoss()), fused=False),
    }
    if HAS_TORCH_LINEAR:
        chunks = nn.LinearCrossEntropyOptions()
        forms[TORCH_LINEAR] = form(vectorised_draw, of_features(F.linear_cross_entropy, options=chunks))
    if compile:
        forms[peers.COMPILE] = form(vectorised_draw, compiled)
    return forms


def lws_forms(shape: Scenario, data: Data, compile: bool) -> dict[str, Form]:
    head = make_head(shape, data.features).requires_grad_(False)
    kept = len(data.features) * shape.c <= MOST_LOGITS
    source: Tensor = head(data.features) if kept else data.features

    def logits(rows: Tensor) -> Tensor:
        result: Tensor = rows if kept else head(rows)
        return result

    def form(draw: MakeDraw, make: Callable[[Tensor], peers.LossFn], source: Tensor = source, **fused: bool) -> Form:
        scale = nn.Parameter(torch.ones(shape.c, device=source.device, dtype=source.dtype))
        return Form(source, draw, by_autograd([scale], make(scale)), (scale,), **fused)

    def plain(scale: Tensor) -> peers.LossFn:
        return lambda x, y: F.cross_entropy(logits(x) * scale, y)

    scaling = LearnableWeightScaling(shape.c, device=source.device).to(source.dtype)
    learnt = scaling.class_scale
    ours = by_autograd([learnt], lambda x, y: scaling.loss(logits(x), y))
    forms = {
        peers.OURS: Form(source, our_draw, ours, (learnt,)),
        peers.EAGER: form(vectorised_draw, plain),
        LOADER: form(
            loader_draw, lambda scale: lambda x, y: F.cross_entropy(head(x) * scale, y), data.features, fused=False
        ),
    }
    if compile:
        forms[peers.COMPILE] = form(vectorised_draw, lambda scale: peers.compiled(plain(scale)))
    return forms


@dataclass(frozen=True)
class Variant:
    """One method: its name in records, its title in tables, its forms for a data set."""

    name: str
    title: str
    forms: Callable[[Scenario, Data, bool], dict[str, Form]]


CRT_VARIANTS: tuple[Variant, ...] = (
    Variant("crt", "cRT, a step", crt_forms),
    Variant("lws", "LWS, a step", lws_forms),
)


# ------------------------------------------------------------------------------------------------------------ measuring


def floors(variant: Variant, shape: Scenario, data: Data, source: Tensor) -> dict[str, Call]:
    """What no form of the step goes without: the gather of our batches, and cRT's products of matrices."""
    chosen = sampling._vectorised(data.of_classes, None)().to(source.device)
    calls: dict[str, Call] = {GATHER: lambda: source.index_select(0, chosen)}
    if variant.name == "crt":
        rows, weight = source.index_select(0, chosen), make_head(shape, source).weight.detach()
        logits, gradient = rows.new_empty(shape.n, shape.c), torch.empty_like(weight)

        def products() -> None:
            torch.mm(rows, weight.t(), out=logits)
            torch.mm(logits.t(), rows, out=gradient)

        calls[PRODUCTS] = products
    return calls


def true_loss_and_grad(variant: Variant, shape: Scenario, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of a batch of features, in float64."""
    rows = rows.double()
    head = make_head(shape, rows)
    learnt: tuple[Tensor, ...] = tuple(head.parameters())
    logits = head(rows)
    if variant.name == "lws":
        scale = torch.ones(shape.c, dtype=rows.dtype, device=rows.device, requires_grad=True)
        learnt, logits = (scale,), logits.detach() * scale
    loss = F.cross_entropy(logits, labels)
    return loss.detach(), torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, learnt)])


def measure(variant: Variant, shape: Scenario, device: Device, plan: runner.Plan) -> runner.Measurement:
    """Checks and times every form of a step.

    Args:
        variant: cRT or LWS.
        shape: rows of a batch, features and classes.
        device: where to run.
        plan: type, budget; its mode means nothing here.

    Returns:
        One record a form, and the refused forms with reasons.

    Raises:
        WrongResultError: our loss or gradients are not those in float64.
        ValueError: a half type, in which nobody keeps the classifier.
    """
    dtype = runner.DTYPES[plan.dtype]
    if dtype.itemsize < 4:
        raise ValueError(f"--dtype: expected float32 or float64 for this op, found {plan.dtype}")
    torch.default_generator.manual_seed(plan.seed)
    data = make_data(shape, dtype, device.name, plan.seed)
    forms = variant.forms(shape, data, plan.compile)
    indices = sampling._vectorised(data.of_classes, None)().to(data.labels.device)
    labels = data.labels[indices]
    truth = true_loss_and_grad(variant, shape, data.features[indices], labels)
    answers = runner.check_results(
        {name: partial(form.loss_and_grad, indices, labels) for name, form in forms.items()}, dtype, truth
    )
    refused = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
    if variant.name == "crt" and not HAS_TORCH_LINEAR:
        refused[TORCH_LINEAR] = "is not in this version of torch"
    calls = {name: form.step(data) for name, form in forms.items() if name not in refused}
    calls |= floors(variant, shape, data, forms[peers.OURS].source)
    if shape.n * shape.d * shape.c >= SLOW:
        plan = replace(plan, min_rounds=min(plan.min_rounds, SLOW_ROUNDS), warm_up_rounds=1)
    samples = runner.interleave(calls, device, plan)
    backend = explain(functional.cross_entropy, data.features[:1, :1], data.labels[:1] * 0).backend
    common = {
        **{"op": "crt", "variant": variant.name, "scenario": shape.name, "source": shape.source},
        **{"N": shape.n, "C": shape.c, "features": shape.d, "samples": len(data.labels), "dtype": plan.dtype},
        **{"mode": "step", "memory": plan.memory, "threads": torch.get_num_threads()},
        **dict.fromkeys(("model_bytes", "frac_copy", "rounding_grad")),
    }
    records = []
    for name, call in calls.items():
        answer, peak = answers.get(name), device.peak_bytes(call)
        error = answer if isinstance(answer, runner.Error) else None
        times = runner.time_fields(name, samples)
        of_form = {
            "peer": name,
            "less_work": name in LESS_WORK,
            "backend": backend if name == peers.OURS else None,
            "samples_per_second": round(shape.n / times["p50_us"] * 1e6),
            "launches": runner.count_launches(call) if name != peers.COMPILE else None,
            "peak_mb": round(peak / 2**20, 4),
            "peak_bytes": peak,
            "rel_err_loss": None if error is None else error.loss,
            "rel_err_grad": None if error is None else error.grad,
        }
        records.append(common | of_form | times)
    return runner.Measurement(records, refused)
