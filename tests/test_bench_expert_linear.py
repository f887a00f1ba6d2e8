"""The benchmark of expert_linear: every form is checked, records are whole, targets are judged."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ltkernels.bench import peers, report, runner
from ltkernels.bench.device import Cpu
from ltkernels.bench.peers_expert_linear import EXPERT_LINEAR_VARIANTS, Variant, measure
from ltkernels.bench.scenarios import Scenario
from ltkernels.bench.targets import judge

TINY = Scenario(6, 5, "custom")
QUICK = runner.Plan(seconds=0, compile=False, min_rounds=3, max_rounds=3)


@pytest.mark.parametrize("variant", EXPERT_LINEAR_VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("mode", runner.MODES)
def test_every_form_computes_the_same(variant: Variant, mode: str) -> None:
    result = measure(variant, TINY, Cpu(), dataclasses.replace(QUICK, mode=mode))
    assert not result.refused
    assert [record["peer"] for record in result.records] == [peers.OURS, peers.EAGER, peers.PUBLISHED]
    complete = [record | runner.environment(Cpu()) for record in result.records]
    assert all(report.FIELDS <= record.keys() for record in complete)
    assert (complete[0]["backend"] is None) == (variant.mode == "logits")
    lines = judge(complete)
    assert [line.limit is None for line in lines[:2]] == [mode != "fwd_bwd", variant.mode != "logits"]
    assert lines[-1].found < 1e-6


def test_a_form_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Variant, "_published", lambda self, x, w, b: self._eager(x, w, 1.1 * b))
    assert peers.PUBLISHED in measure(EXPERT_LINEAR_VARIANTS[0], TINY, Cpu(), QUICK).refused


def test_a_wrong_result_of_ours_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Variant, "_ours", lambda self, x, w, b: torch.relu(self._eager(x, w, b)))
    with pytest.raises(runner.WrongResultError):
        measure(EXPERT_LINEAR_VARIANTS[0], TINY, Cpu(), QUICK)
