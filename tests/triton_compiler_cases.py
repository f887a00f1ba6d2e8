"""Calls of every op with every set of options that its tests know: test_triton.py lets their kernels be translated.

Of short rows, which a tile holds whole, and of long ones; with logits of bfloat16, and of float64, which is the type of
the computation then. Tiles are small, so that a thousand classes are long.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import expert_cases
import pytest
import row_cross_entropy_cases
import test_aggregate_experts
import test_binary_cross_entropy
import test_distillation
import test_lade
import torch
from cross_entropy_cases import Case, Form, evaluate, labels, probabilities
from test_cross_entropy_values import ARGUMENT_SETS

import ltkernels as ltk
from ltkernels.ops import gpu
from ltkernels.triton import tiles

FORM = Form("triton")
SIZES = pytest.mark.parametrize(("classes", "dtype"), [(24, torch.bfloat16), (1100, torch.float64)])


@pytest.fixture(autouse=True)
def _small_tiles(translated: set[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiles, "LOGITS", 512)
    yield
    assert translated, "nothing was launched"
    gpu.error_word(torch.device("cpu")).zero_()


@SIZES
def test_calls_of_cross_entropy(classes: int, dtype: torch.dtype) -> None:
    for name, arguments in ARGUMENT_SETS.items():
        target = probabilities((4, classes)) if name == "probabilities" else labels((4,), classes)
        learned = ((), ("class_scale",), ("class_bias",), ("class_scale", "class_bias")) if name == "full" else ((),)
        for learnable in learned:
            logits = torch.randn(4, classes).to(dtype)
            evaluate(Case(logits, target, arguments(4, classes), learnable=learnable), FORM)


@SIZES
def test_calls_of_row_cross_entropy(classes: int, dtype: torch.dtype) -> None:
    for call in row_cross_entropy_cases.CALLS.values():
        row_cross_entropy_cases.evaluate(call(4, classes, dtype), FORM)


@SIZES
def test_calls_of_lade(classes: int, dtype: torch.dtype) -> None:
    for kind in test_lade.KINDS:
        y = labels((4,), classes)
        test_lade.evaluate(torch.randn(4, classes).to(dtype), y, test_lade.arguments(kind, classes), FORM)


@SIZES
def test_calls_of_binary_cross_entropy(classes: int, dtype: torch.dtype) -> None:
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = test_binary_cross_entropy.a_batch(5, classes)
    for name in test_binary_cross_entropy.NAMES:
        for target in (y, test_binary_cross_entropy.multi_hot(y, classes)):
            arguments = test_binary_cross_entropy.arguments(name, classes, 5, computed)
            if target.dim() == 2:  # which have neither
                arguments = {k: v for k, v in arguments.items() if k not in ("background_index", "weight")}
            logits = x.to(dtype).requires_grad_()
            with FORM.use():
                loss, _ = ltk.functional.binary_cross_entropy(logits, target, column_sums=True, **arguments)
                loss.backward()


@SIZES
def test_calls_of_distillation(classes: int, dtype: torch.dtype) -> None:
    z, t = torch.randn(4, classes).to(dtype), torch.randn(4, classes).to(dtype)
    for options in test_distillation.options_of(classes, (4,), dtype).values():
        test_distillation.evaluate(FORM, z, t, **options)


@SIZES
def test_calls_of_expert_cross_entropy(classes: int, dtype: torch.dtype) -> None:
    z, y = expert_cases.logits(3, 4, classes, dtype=dtype), expert_cases.labels(4, classes)
    for options in expert_cases.options_of(3, 4, classes).values():
        for aggregate in (False, True):
            expert_cases.evaluate(FORM, z, y, aggregate, **expert_cases.converted(options, FORM, dtype))


@SIZES
def test_calls_of_aggregate_experts(classes: int, dtype: torch.dtype) -> None:
    z = expert_cases.logits(3, 4, classes, dtype=dtype)
    for mode in expert_cases.MODES:
        for weight in expert_cases.weights_of(3, 4, classes).values():
            test_aggregate_experts.evaluate(FORM, z, weight, mode)
        with FORM.use():
            expert_cases.aggregate_experts(z, mode=mode, topk=3)
