"""The benchmark of linear_cross_entropy: every form is checked, records are whole, targets are judged."""

from __future__ import annotations

import dataclasses

import pytest

from ltkernels.bench import peers, peers_linear, report, runner
from ltkernels.bench.device import Cpu
from ltkernels.bench.peers_linear import LINEAR_VARIANTS, Variant, measure
from ltkernels.bench.scenarios import Scenario
from ltkernels.bench.targets import judge

TINY = Scenario(60, 17, "custom", 6)
QUICK = runner.Plan(seconds=0, compile=False, min_rounds=3, max_rounds=3)


# Not cosines in bfloat16: the other form rounds the directions of the class vectors, which ours leaves as they are.
CASES = [(v, dtype) for v in LINEAR_VARIANTS for dtype in ("float32", "bfloat16") if dtype == "float32" or not v.cosine]


@pytest.mark.parametrize(("variant", "dtype"), CASES, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("mode", runner.MODES)
def test_every_form_computes_the_same(variant: Variant, mode: str, dtype: str) -> None:
    result = measure(variant, TINY, Cpu(), dataclasses.replace(QUICK, mode=mode, dtype=dtype))
    assert not result.refused
    chunked = [] if variant.cosine else [peers_linear.CHUNKED, peers_linear.AUTO]
    assert [record["peer"] for record in result.records] == [peers.OURS, peers.EAGER, *chunked]
    complete = [record | runner.environment(Cpu()) for record in result.records]
    assert all(report.FIELDS <= record.keys() for record in complete)
    assert complete[0]["backend"] == "cpu" and complete[0]["scenario"] == "60x6x17"
    lines = judge(complete)
    assert len(lines) == len(complete) - 1 + (dtype == "float32") + 1


def test_the_figures_are_judged_on_two_threads() -> None:
    (record, *_) = measure(LINEAR_VARIANTS[0], TINY, Cpu(), QUICK).records
    record |= {"scenario": "4096x64x21841", "threads": 2, "ratio": {peers.EAGER: 0.9, peers_linear.CHUNKED: 0.5}}
    verdicts = {line.what: line.verdict for line in judge([record])}
    assert verdicts[f"linear_ce: time of {peers.EAGER}"] == "NOT REACHED"
    assert verdicts[f"linear_ce: time of {peers_linear.CHUNKED}"] == "reached"
    assert verdicts["linear_ce: peak bytes beyond inputs and gradients"] == "reached"


def test_a_wrong_result_of_ours_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Variant.forms

    def forms(self: Variant, head: peers_linear.Head) -> dict[str, peers_linear.Form]:
        found = original(self, head)
        return found | {peers.OURS: lambda x, w: found[peers.EAGER](x, w).square()}

    monkeypatch.setattr(Variant, "forms", forms)
    with pytest.raises(runner.WrongResultError):
        measure(LINEAR_VARIANTS[0], TINY, Cpu(), QUICK)
