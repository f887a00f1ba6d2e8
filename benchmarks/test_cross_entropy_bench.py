"""The same calls under pytest-benchmark, for its statistics, histograms and comparison with a saved run.

``pytest benchmarks --benchmark-group-by=group --benchmark-save=NAME``. pytest-benchmark runs one form after the
other, so its ratios carry the drift of the machine; ``ltkernels bench`` takes turns and is what the README quotes.
"""

from __future__ import annotations

import os

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from ltkernels.bench import peers, runner
from ltkernels.bench.scenarios import SCENARIOS, Scenario, make_problem

FORMS = (peers.OURS, peers.EAGER, peers.PUBLISHED, peers.LIBRARY)


@pytest.fixture(autouse=True, scope="module")
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("LTK_BENCH_THREADS", "1")))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", peers.VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("shape", SCENARIOS, ids=lambda shape: shape.name)
def test_forward_backward(benchmark: BenchmarkFixture, shape: Scenario, variant: peers.Variant, form: str):
    benchmark.group = f"{variant.name} {shape.name}"
    problem = make_problem(shape, torch.float32, cosine=variant.cosine)
    forms = peers.loss_forms(variant, problem, torch.float32)
    if form not in forms:
        pytest.skip(f"{variant.name} has no form {form} here")
    exact = problem.logits.detach().double().requires_grad_()
    truth = runner.loss_and_grad(variant.eager(problem, torch.float64), exact, problem.target)
    answers = runner.check_forms({name: forms[name] for name in (peers.OURS, form)}, problem, truth)
    assert not isinstance(answers[form], str), answers[form]
    benchmark(runner.make_call(forms[form], problem, "fwd_bwd"))
