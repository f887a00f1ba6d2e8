"""The benchmark of accuracy_counts: every form counts the same, records are whole, targets are judged."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ltkernels.bench import peers, report, runner
from ltkernels.bench import peers_accuracy_counts as bench
from ltkernels.bench.device import Cpu
from ltkernels.bench.peers_accuracy_counts import ACCURACY_VARIANTS, Variant, make_batch, measure
from ltkernels.bench.scenarios import Scenario
from ltkernels.bench.targets import ACCURACY_LIMITS, judge

SMALL = Scenario(200, 12, "custom")  # several rows a class, in which a form that counts wrongly shows
QUICK = runner.Plan(seconds=0, compile=False, min_rounds=3, max_rounds=3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ACCURACY_VARIANTS, ids=lambda variant: variant.name)
def test_every_form_counts_the_same(variant: Variant, dtype: str) -> None:
    result = measure(variant, SMALL, Cpu(), dataclasses.replace(QUICK, dtype=dtype))
    assert set(result.refused) <= {bench.TORCHMETRICS}
    assert result.refused.get(bench.TORCHMETRICS, "is not installed") == "is not installed"
    names = {record["peer"] for record in result.records} | result.refused.keys()
    published = {peers.PUBLISHED} if variant.top_k == 1 else set()
    assert names == published | {peers.OURS, peers.EAGER, bench.USUAL, peers.MODULE, bench.TORCHMETRICS, bench.AMAX}
    complete = [record | runner.environment(Cpu()) for record in result.records]
    assert all(record.keys() == report.FIELDS for record in complete)
    assert [record["peer"] for record in complete if record["less_work"]] == [bench.AMAX]
    assert complete[0]["backend"] is not None and all(record["backend"] is None for record in complete[1:])


@pytest.mark.parametrize("variant", ACCURACY_VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_as_many_rows_are_right_as_a_variant_says(variant: Variant, dtype: torch.dtype) -> None:
    x, y = make_batch(variant, Scenario(2000, 50, "custom"), dtype, "cpu", 0)
    own = x.gather(1, y.unsqueeze(1))
    assert int((x == own).sum()) == 2000, "a label's logit is its alone"
    share = float((x > own).any(1).logical_not().double().mean())
    # Chance adds a fiftieth of the rest. Five standard deviations of a share of 2000.
    assert abs(share - (variant.right + (1 - variant.right) / 50)) < 5 * (0.25 / 2000) ** 0.5


def test_a_form_that_counts_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Variant._eager
    monkeypatch.setattr(Variant, "_eager", lambda self, x, y, counts: right(self, x, y.flip(0), counts))
    monkeypatch.setattr(Variant, "_usual", lambda self, x, y, counts: counts.missing)
    result = measure(ACCURACY_VARIANTS[0], SMALL, Cpu(), QUICK)
    assert result.refused[peers.EAGER] == "counts otherwise"
    assert result.refused[bench.USUAL].startswith("does not run: AttributeError")
    assert not {peers.EAGER, bench.USUAL} & {record["peer"] for record in result.records}


def test_our_own_wrong_counts_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Variant, "_ours", lambda self, x, y, counts: self._eager(x.flip(0), y, counts))
    with pytest.raises(runner.WrongResultError, match="top_1 of 200x12: counts otherwise"):
        measure(ACCURACY_VARIANTS[0], SMALL, Cpu(), QUICK)


def test_more_guesses_than_classes_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least 5 classes for top_5, found 7x4"):
        measure(ACCURACY_VARIANTS[2], Scenario(7, 4, "custom"), Cpu(), QUICK)


def test_targets_are_judged_where_they_are_set() -> None:
    record = {"peer": peers.OURS, "op": "accuracy_counts", "variant": "top_1", "scenario": "512x1000", "threads": 1}
    record |= {"mode": "one batch", "dtype": "float32", "ratio": {bench.USUAL: 0.1, peers.EAGER: 0.9, bench.AMAX: 1.1}}
    lines = {line.what: line for line in judge([record])}
    assert lines["top_1: time of usual"].verdict == "reached"
    assert lines["top_1: time of eager"].limit == ACCURACY_LIMITS[peers.EAGER]["512x1000"]
    assert lines["top_1: time of eager"].verdict == "NOT REACHED"
    assert lines["top_1: time of amax"].verdict == "reported"
    for other in ({"threads": 2}, {"scenario": "77x1000"}, {"dtype": "bfloat16"}):
        assert {line.verdict for line in judge([record | other])} == {"reported"}
